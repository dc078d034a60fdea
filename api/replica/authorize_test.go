package replica

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

var update = flag.Bool("update", false, "write the golden files")

// Issuers besides iss, of home, the tenant that has what these tests are about.
const (
	otherKM    = "https://other.example.com"    // of other
	disabledKM = "https://disabled.example.com" // of home, not enabled
	renamingKM = "https://renaming.example.com" // of home, with claims of its own names
	thirdKM    = "https://third.example.com"    // of a tenant without APIs
	strangerKM = "https://stranger.example.com" // not in the catalog
)

var (
	home        = revocation.SuperTenant
	otherTenant = revocation.Tenant{ID: 2, Domain: "other.example"}
)

// mint makes tokens that were verified.
type mint struct {
	verifier *token.Verifier
	signer   jose.Signer
}

func newMint(t testing.TB) mint {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "key-1"}}})
	must(t, err)
	keys, err := token.ParseKeySet(set)
	must(t, err)
	var issuers []token.Issuer
	for _, iss := range []string{iss, otherKM, disabledKM, renamingKM, thirdKM, strangerKM} {
		issuers = append(issuers, token.Issuer{Iss: iss, Keys: keys})
	}
	var m mint
	m.verifier, err = token.NewVerifier(issuers...)
	must(t, err)
	m.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("at+jwt"))
	must(t, err)
	return m
}

type claims map[string]any

// token makes one of the application's production key, with other claims where changes say so; null
// takes one away.
func (m mint) token(t testing.TB, changes ...claims) *token.Token {
	t.Helper()
	all := claims{
		"iss": iss, "sub": "alice", "azp": "prod-key", "jti": "at-1", "iat": frozen - 60, "exp": frozen + 540, "scope": "read order:write",
	}
	for _, c := range changes {
		maps.Copy(all, c)
	}
	maps.DeleteFunc(all, func(_ string, value any) bool { return value == nil })
	payload, err := json.Marshal(all)
	must(t, err)
	jws, err := m.signer.Sign(payload)
	must(t, err)
	compact, err := jws.CompactSerialize()
	must(t, err)
	got, err := m.verifier.Verify(t.Context(), compact)
	must(t, err)
	return got
}

// world is the catalog of these tests.
type world struct {
	entities []catalog.Entity
	ids      int32
}

func (w *world) add(tenant revocation.Tenant, e catalog.Entity) catalog.Ref {
	w.ids++
	*e.Base() = catalog.Meta{ID: w.ids, UUID: uuidOf(int(w.ids)), Tenant: tenant}
	w.entities = append(w.entities, e)
	return catalog.Ref{ID: w.ids, UUID: e.Base().UUID}
}

// subscriptionStates have an API each, at /state/<state in lower case>.
var subscriptionStates = []string{
	catalog.Unblocked, catalog.TierUpdatePending, catalog.Blocked, catalog.ProdOnlyBlocked, catalog.OnHold, catalog.Rejected, "INVENTED",
}

func newWorld() *world {
	w := new(world)
	for _, tenant := range []revocation.Tenant{home, otherTenant} {
		w.add(tenant, &catalog.Tenant{})
		for _, kind := range []string{catalog.PolicySubscription, catalog.PolicyApplication, catalog.PolicyAPI} {
			w.add(tenant, &catalog.Policy{Kind: kind, Name: "Unlimited", QuotaType: "requestCount"})
		}
	}
	w.add(home, &catalog.Policy{
		Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount", RateLimitCount: 10, RateLimitTimeUnit: "sec",
		StopOnQuotaReach: true, GraphQLMaxDepth: 5, GraphQLMaxComplexity: 400,
	})
	w.add(home, &catalog.Policy{Kind: catalog.PolicyAPI, Name: "10KPerMin", QuotaType: "requestCount"})
	w.add(home, &catalog.Policy{Kind: catalog.PolicyApplication, Name: "Bytes", QuotaType: "bandwidthVolume"})
	w.add(home, &catalog.Policy{Kind: catalog.PolicyAPI, Name: "Bytes", QuotaType: "bandwidthVolume"})
	w.add(home, &catalog.Policy{Kind: catalog.PolicySubscription, Name: "Bytes", QuotaType: "bandwidthVolume"})
	w.add(home, &catalog.KeyManager{Name: "STS", Enabled: true, Iss: iss})
	w.add(home, &catalog.KeyManager{Name: "off", Iss: disabledKM})
	w.add(home, &catalog.KeyManager{Name: "renaming", Enabled: true, Iss: renamingKM, ConsumerKeyClaim: "cid", ScopesClaim: "scp"})
	w.add(otherTenant, &catalog.KeyManager{Name: "other", Enabled: true, Iss: otherKM})
	w.add(revocation.Tenant{ID: 3, Domain: "third.example"}, &catalog.KeyManager{Name: "third", Enabled: true, Iss: thirdKM})

	app := w.add(home, &catalog.Application{
		Name: "Mobile", Owner: "bob", Policy: "Unlimited", TokenType: "JWT", Attributes: map[string]string{"team": "blue"},
	})
	bytes := w.add(home, &catalog.Application{Name: "Bytes", Owner: "cy", Policy: "Bytes", TokenType: "JWT"})
	odd := w.add(home, &catalog.Application{Name: "Odd", Owner: "cy", Policy: "Missing", TokenType: "JWT"})
	blocked := w.add(home, &catalog.Application{Name: "Blocked", Owner: "di", Policy: "Unlimited", TokenType: "JWT", Blocked: true})
	foreign := w.add(otherTenant, &catalog.Application{Name: "Foreign", Owner: "ed", Policy: "Unlimited", TokenType: "JWT"})
	key := func(tenant revocation.Tenant, app catalog.Ref, iss, key, keyType string) {
		w.add(tenant, &catalog.KeyMapping{Application: app, ConsumerKey: key, KeyType: keyType, Iss: iss})
	}
	key(home, app, iss, "prod-key", catalog.Production)
	key(home, app, iss, "sandbox-key", catalog.Sandbox)
	key(home, app, renamingKM, "cid-key", catalog.Production)
	key(home, app, renamingKM, "azp-key", catalog.Sandbox)
	key(home, app, disabledKM, "prod-key", catalog.Production)
	key(home, app, strangerKM, "prod-key", catalog.Production)
	key(home, bytes, iss, "bytes-key", catalog.Production)
	key(home, odd, iss, "odd-key", catalog.Production)
	key(home, blocked, iss, "blocked-key", catalog.Production)
	key(home, catalog.Ref{UUID: uuidOf(9999)}, iss, "orphan-key", catalog.Production)
	key(otherTenant, foreign, otherKM, "prod-key", catalog.Production)

	api := func(tenant revocation.Tenant, context, status string, change ...func(*catalog.API)) catalog.Ref {
		a := &catalog.API{Name: strings.Trim(context, "/"), Version: "1", Context: context, Provider: "ann", Type: "HTTP", Status: status}
		for _, f := range change {
			f(a)
		}
		return w.add(tenant, a)
	}
	subscribe := func(tenant revocation.Tenant, app, api catalog.Ref, policy, state string, byApplication bool) {
		w.add(tenant, &catalog.Subscription{Application: app, API: api, Policy: policy, State: state, ApplicationBlocked: byApplication})
	}
	pizza := api(home, "/pizza/1.0.0", catalog.APIPublished, func(a *catalog.API) {
		a.Name, a.Version, a.Policy = "Pizza", "1.0.0", "10KPerMin"
		a.Operations = []catalog.Operation{
			{Verb: "GET", Target: "/menu", AuthType: "Any"},
			{Verb: "POST", Target: "/order", AuthType: "Any", Scopes: []string{"order:write", "order:admin"}},
			{Verb: "GET", Target: "/order/{id}", AuthType: "Any", Scopes: []string{"order:read"}},
			{Verb: "GET", Target: "/public", AuthType: "None", Scopes: []string{"order:read"}},
			{Verb: "GET", Target: "/application", AuthType: "Application"},
			{Verb: "GET", Target: "/user", AuthType: "Application_User"},
			{Verb: "GET", Target: "/both", AuthType: "Application & Application User"},
			{Verb: "GET", Target: "/odd", AuthType: "Invented"},
		}
	})
	for _, app := range []catalog.Ref{app, bytes, odd, blocked} {
		subscribe(home, app, pizza, "Gold", catalog.Unblocked, false)
	}
	for _, state := range subscriptionStates {
		subscribe(home, app, api(home, "/state/"+strings.ToLower(state), catalog.APIPublished), "Unlimited", state, false)
	}
	subscribe(home, app, api(home, "/by-application", catalog.APIPublished), "Unlimited", catalog.OnHold, true)
	for _, status := range []string{
		catalog.APICreated, catalog.APIPrototyped, catalog.APIPublished, catalog.APIBlocked, catalog.APIDeprecated, catalog.APIRetired,
	} {
		subscribe(home, app, api(home, "/status/"+strings.ToLower(status), status), "Unlimited", catalog.Unblocked, false)
	}
	api(home, "/unsubscribed", catalog.APIPublished)
	subscribe(home, app, api(home, "/no-tier", catalog.APIPublished), "Missing", catalog.Unblocked, false)
	subscribe(home, app, api(home, "/no-api-policy", catalog.APIPublished, func(a *catalog.API) { a.Policy = "Missing" }), "Unlimited", catalog.Unblocked, false)
	subscribe(home, app, api(home, "/bytes", catalog.APIPublished, func(a *catalog.API) { a.Policy = "Bytes" }), "Unlimited", catalog.Unblocked, false)
	subscribe(home, app, api(home, "/bytes-tier", catalog.APIPublished), "Bytes", catalog.Unblocked, false)
	subscribe(home, app, api(home, "/eu", catalog.APIPublished, func(a *catalog.API) { a.GatewayLabels = []string{"eu"} }), "Unlimited", catalog.Unblocked, false)
	subscribe(home, app, api(home, "/shared", catalog.APIPublished), "Unlimited", catalog.Unblocked, false)
	subscribe(otherTenant, foreign, api(otherTenant, "/shared", catalog.APIBlocked), "Unlimited", catalog.Unblocked, false)
	for _, tenant := range []revocation.Tenant{otherTenant, home} {
		api(tenant, "/open", catalog.APIPublished, func(a *catalog.API) {
			a.Operations = []catalog.Operation{{Verb: "GET", Target: "/*", AuthType: "None"}}
		})
	}
	// As no log has it: across tenants.
	subscribe(home, app, api(otherTenant, "/t/other.example/theirs", catalog.APIPublished), "Unlimited", catalog.Unblocked, false)
	return w
}

func (w *world) state(t testing.TB, records ...Record) *State {
	t.Helper()
	s := NewState(StateConfig{})
	load(t, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		for _, e := range w.entities {
			l.Entity(e)
		}
		for _, rec := range records {
			l.Revocation(rec)
		}
	})
	return s
}

// asked is an authorizer of a replica that says this of what is not revoked.
func asked(s *State, mode ClaimsMode, unless Outcome, environments []string) authorizer {
	return authorizer{mode: mode, environments: environments, check: func(tok Token) Decision {
		if kind, revoked := s.Check(tok, frozen); revoked {
			return Decision{Outcome: Revoked, Kind: kind, Age: time.Second}
		}
		return Decision{Outcome: unless, Age: time.Second}
	}}
}

// ask is Authorize, of such a replica, and sees that Explain says the same.
func ask(s *State, mode ClaimsMode, unless Outcome, t *token.Token, req Request, environments ...string) Authorization {
	a := askOnly(s, mode, unless, t, req, environments...)
	mustExplain(s, asked(s, mode, unless, environments), t, req, a)
	return a
}

// askOnly is ask for those who measure.
func askOnly(s *State, mode ClaimsMode, unless Outcome, t *token.Token, req Request, environments ...string) (a Authorization) {
	by := asked(s, mode, unless, environments)
	s.View(func(v *View) { by.authorize(&a, v, t, req) })
	return a
}

// consistent checks what holds for all.
func consistent(t *testing.T, a Authorization) {
	t.Helper()
	if a.Authorized != (a.Code == 0) || a.Authorized != (a.Reason == "") || a.Info.Authorized != a.Authorized || a.Info.ValidationStatus != a.Code ||
		(len(a.Scopes) > 0) != (a.Code == CodeScope) || !a.Authorized && !slices.Contains(Reasons, a.Reason) {
		t.Errorf("inconsistent: %+v", a)
	}
	b, err := json.Marshal(a.Info)
	if err != nil || strings.Contains(string(b), "null") {
		t.Errorf("%s, %v", b, err)
	}
}

var allModes = []ClaimsMode{ClaimsFirst, CatalogFirst, ClaimsOnly}

// selfContained are the claims of a token for the APIs with these contexts, of home.
func selfContained(contexts ...string) claims {
	list := []any{}
	for _, context := range contexts {
		list = append(list, claims{
			"name": strings.Trim(context, "/"), "context": context, "version": "1", "publisher": "claimed", "subscriptionTier": "Silver",
			"subscriberTenantDomain": home.Domain,
		})
	}
	return claims{
		"keytype": "PRODUCTION", "subscribedAPIs": list,
		"application": claims{"id": 77, "uuid": "claimed-uuid", "name": "Claimed", "tier": "Ten", "owner": "claimant", "tierQuotaType": "requestCount"},
		"tierInfo": claims{"Silver": claims{
			"stopOnQuotaReach": true, "spikeArrestLimit": 7, "spikeArrestUnit": "min", "tierQuotaType": "requestCount", "graphQLMaxDepth": 3,
			"graphQLMaxComplexity": 30,
		}},
	}
}

// The table of the WSO2 contract, section 10.2, for both types of keys, in every mode, with and
// without claims that say something else.
func TestAuthorizeStates(t *testing.T) {
	t.Parallel()
	m, s := newMint(t), newWorld().state(t)
	type codes struct{ production, sandbox Code }
	want := map[string]codes{
		catalog.Unblocked: {}, catalog.TierUpdatePending: {}, "INVENTED": {},
		catalog.Blocked:         {CodeSubscriptionBlocked, CodeSubscriptionBlocked},
		catalog.ProdOnlyBlocked: {CodeSubscriptionBlocked, 0},
		catalog.OnHold:          {CodeNotActive, CodeNotActive},
		catalog.Rejected:        {CodeNotActive, CodeNotActive},
	}
	for _, keyType := range []string{catalog.Production, catalog.Sandbox} {
		key := map[string]string{catalog.Production: "prod-key", catalog.Sandbox: "sandbox-key"}[keyType]
		plainToken := m.token(t, claims{"azp": key})
		var contexts []string
		for _, state := range subscriptionStates {
			contexts = append(contexts, "/state/"+strings.ToLower(state))
		}
		claiming := m.token(t, claims{"azp": key}, selfContained(contexts...), claims{"keytype": keyType})
		claimsNothing := m.token(t, claims{"azp": key}, selfContained(), claims{"keytype": keyType})
		stranger := m.token(t, claims{"azp": "unknown"}, selfContained(contexts...), claims{"keytype": keyType})
		for i, state := range subscriptionStates {
			byCatalog := want[state].production
			if keyType == catalog.Sandbox {
				byCatalog = want[state].sandbox
			}
			for _, mode := range allModes {
				for _, tt := range []struct {
					name  string
					token *token.Token
					codes [3]Code // by mode
				}{
					{"without claims", plainToken, [3]Code{byCatalog, byCatalog, CodeForbidden}},
					{"with claims", claiming, [3]Code{0, byCatalog, 0}},
					{"with an empty list", claimsNothing, [3]Code{CodeForbidden, byCatalog, CodeForbidden}},
					{"with claims, unknown to the catalog", stranger, [3]Code{0, 0, 0}},
				} {
					got := ask(s, mode, Valid, tt.token, Request{Method: "GET", Path: contexts[i] + "/x"})
					consistent(t, got)
					if got.Code != tt.codes[mode] {
						t.Errorf("%s, %s, %s, %s: %d (%s), want %d", state, keyType, mode, tt.name, got.Code, got.Reason, tt.codes[mode])
					}
					if got.Authorized && got.Info.Type != keyType {
						t.Errorf("%s, %s, %s: type %q, want %q", state, mode, tt.name, got.Info.Type, keyType)
					}
				}
			}
		}
	}
}

// One row for every refusal and its neighbours, in the order of the checks.
func TestAuthorize(t *testing.T) {
	t.Parallel()
	m, w := newMint(t), newWorld()
	s := w.state(t)
	tok := m.token(t)
	const menu = "GET /pizza/1.0.0/menu"
	type row struct {
		name    string
		token   *token.Token
		request string
		code    Code
		reason  string
	}
	rows := []row{
		{"all is well", tok, menu, 0, ""},
		{"head", tok, "HEAD /pizza/1.0.0/menu", 0, ""},

		{"path that is not clean", tok, "GET /pizza/1.0.0/x/../menu", CodeForbidden, "path"},
		{"path with a query", tok, menu + "?a=b", CodeForbidden, "path"},
		{"no path", tok, "GET ", CodeForbidden, "path"},
		{"no API", tok, "GET /none", CodeForbidden, "no_api"},
		{"no API, no token", nil, "GET /none", CodeForbidden, "no_api"},
		{"API in part", tok, "GET /pizza/1.0", CodeForbidden, "no_api"},
		{"API in another case", tok, "GET /Pizza/1.0.0/menu", CodeForbidden, "no_api"},
		{"no operation", tok, "GET /pizza/1.0.0/none", CodeForbidden, "no_operation"},
		{"another verb", tok, "PUT /pizza/1.0.0/menu", CodeForbidden, "no_operation"},
		{"OPTIONS is no exception", nil, "OPTIONS /pizza/1.0.0/menu", CodeForbidden, "no_operation"},
		{"slash at the end", tok, menu + "/", CodeForbidden, "no_operation"},
		{"blocked API", tok, "GET /status/blocked", CodeAPIBlocked, "api_blocked"},
		{"blocked API, no token", nil, "GET /status/blocked/x", CodeAPIBlocked, "api_blocked"},
		{"API of every status: created", tok, "GET /status/created", CodeForbidden, "no_api"},
		{"prototyped", tok, "GET /status/prototyped", 0, ""},
		{"published", tok, "GET /status/published", 0, ""},
		{"deprecated", tok, "GET /status/deprecated", 0, ""},
		{"retired", tok, "GET /status/retired", CodeForbidden, "no_api"},

		{"no authentication", nil, "GET /pizza/1.0.0/public", 0, ""},
		{"no authentication, a token of nobody", m.token(t, claims{"iss": strangerKM}), "GET /pizza/1.0.0/public", 0, ""},
		{"no token", nil, menu, CodeMissingCredentials, "no_credentials"},
		{"no token, no operations", nil, "GET /state/unblocked", CodeMissingCredentials, "no_credentials"},
		{"no token, where another tenant has the context too", nil, "GET /open/x", 0, ""},

		{"issuer that nobody knows", m.token(t, claims{"iss": strangerKM}), menu, CodeInvalidCredentials, "issuer"},
		{"issuer that is disabled", m.token(t, claims{"iss": disabledKM}), menu, CodeInvalidCredentials, "issuer"},
		{"issuer that nobody knows, shared context", m.token(t, claims{"iss": strangerKM}), "GET /shared", CodeInvalidCredentials, "issuer"},

		{"Application, user", tok, "GET /pizza/1.0.0/application", CodeWrongTokenType, "token_type"},
		{"Application, application by aut", m.token(t, claims{"aut": "APPLICATION"}), "GET /pizza/1.0.0/application", 0, ""},
		{"Application, application by sub", m.token(t, claims{"sub": "prod-key"}), "GET /pizza/1.0.0/application", 0, ""},
		{"Application, no sub", m.token(t, claims{"sub": nil}), "GET /pizza/1.0.0/application", 0, ""},
		{"Application, user by aut", m.token(t, claims{"sub": "prod-key", "aut": "APPLICATION_USER"}), "GET /pizza/1.0.0/application", CodeWrongTokenType, "token_type"},
		{"Application_User, user", tok, "GET /pizza/1.0.0/user", 0, ""},
		{"Application_User, application", m.token(t, claims{"sub": "prod-key"}), "GET /pizza/1.0.0/user", CodeWrongTokenType, "token_type"},
		{"Application_User, application by aut", m.token(t, claims{"aut": "APPLICATION"}), "GET /pizza/1.0.0/user", CodeWrongTokenType, "token_type"},
		{"Application_User, aut is not known", m.token(t, claims{"aut": "DEVICE", "sub": "prod-key"}), "GET /pizza/1.0.0/user", CodeWrongTokenType, "token_type"},
		{"both, user", tok, "GET /pizza/1.0.0/both", 0, ""},
		{"both, application", m.token(t, claims{"sub": "prod-key"}), "GET /pizza/1.0.0/both", 0, ""},
		{"a type that is not known", tok, "GET /pizza/1.0.0/odd", CodeWrongTokenType, "token_type"},
		{"aut is no text", m.token(t, claims{"aut": 1}), menu, CodeInvalidCredentials, "malformed_claims"},

		{"key that is mapped nowhere", m.token(t, claims{"azp": "unknown"}), menu, CodeForbidden, "no_key_mapping"},
		{"no key", m.token(t, claims{"azp": nil}), menu, CodeForbidden, "no_key_mapping"},
		{"key of another issuer", m.token(t, claims{"azp": "cid-key"}), menu, CodeForbidden, "no_key_mapping"},
		{"no application", m.token(t, claims{"azp": "orphan-key"}), menu, CodeForbidden, "no_application"},
		{"no subscription", tok, "GET /unsubscribed", CodeForbidden, "no_subscription"},
		{"no application policy", m.token(t, claims{"azp": "odd-key"}), menu, CodeForbidden, "no_policy"},
		{"no subscription policy", tok, "GET /no-tier", CodeForbidden, "no_policy"},
		{"no API policy", tok, "GET /no-api-policy", CodeForbidden, "no_policy"},
		{"application is blocked", m.token(t, claims{"azp": "blocked-key"}), menu, CodeSubscriptionBlocked, "subscription_blocked"},
		{"blocked by its application, whatever its state", tok, "GET /by-application", CodeSubscriptionBlocked, "subscription_blocked"},

		{"another tenant's token", m.token(t, claims{"iss": otherKM}), menu, CodeForbidden, "no_subscription"},
		{"another tenant's API, even with a subscription", tok, "GET /t/other.example/theirs", CodeForbidden, "no_subscription"},
		{"another tenant's API, without one", nil, "GET /t/other.example/theirs", CodeMissingCredentials, "no_credentials"},
		{"the context decides", tok, "GET /shared/x", 0, ""},
		{"the context decides, not the issuer's tenant", m.token(t, claims{"iss": otherKM}), "GET /shared/x", CodeForbidden, "no_subscription"},
		{"a tenant that has no API there", m.token(t, claims{"iss": thirdKM}), "GET /shared/x", CodeForbidden, "no_subscription"},

		{"one of two scopes", tok, "POST /pizza/1.0.0/order", 0, ""},
		{"scopes in an array", m.token(t, claims{"scope": []string{"x", "order:admin"}}), "POST /pizza/1.0.0/order", 0, ""},
		{"a scope with a space is none", m.token(t, claims{"scope": []string{"x", "y order:admin"}}), "POST /pizza/1.0.0/order", CodeScope, "scope"},
		{"nor are those in it, though it is alone", m.token(t, claims{"scope": []string{"order:admin y"}}), "POST /pizza/1.0.0/order", CodeScope, "scope"},
		{"spaces around scopes", m.token(t, claims{"scope": "  y  order:admin "}), "POST /pizza/1.0.0/order", 0, ""},
		{"what Unicode calls a space", m.token(t, claims{"scope": "y\u00a0order:admin y\u2003order:admin y\u0085order:admin y\torder:admin"}), "POST /pizza/1.0.0/order", CodeScope, "scope"},

		{"no scope of those", tok, "GET /pizza/1.0.0/order/7", CodeScope, "scope"},
		{"no scope at all", m.token(t, claims{"scope": nil}), "GET /pizza/1.0.0/order/7", CodeScope, "scope"},
		{"part of a scope", m.token(t, claims{"scope": "order"}), "GET /pizza/1.0.0/order/7", CodeScope, "scope"},

		{"claims of other names", m.token(t, claims{"iss": renamingKM, "azp": "azp-key", "cid": "cid-key", "scp": []string{"order:read"}}), "GET /pizza/1.0.0/order/7", 0, ""},
		{"theirs with a space in one", m.token(t, claims{"iss": renamingKM, "azp": "azp-key", "cid": "cid-key", "scp": []string{"order:read x"}}), "GET /pizza/1.0.0/order/7", CodeScope, "scope"},
		{"their key is not there", m.token(t, claims{"iss": renamingKM, "azp": "azp-key"}), menu, 0, ""},
		{"their key is not one", m.token(t, claims{"iss": renamingKM, "azp": "azp-key", "cid": []string{"cid-key", "b"}}), menu, CodeInvalidCredentials, "malformed_claims"},
		{"their key is one in an array", m.token(t, claims{"iss": renamingKM, "azp": "nobody", "cid": []string{"cid-key"}}), menu, 0, ""},
		{"their key is no text", m.token(t, claims{"iss": renamingKM, "azp": "azp-key", "cid": 7}), menu, CodeInvalidCredentials, "malformed_claims"},
		{"their scopes are no texts", m.token(t, claims{"iss": renamingKM, "azp": "azp-key", "scp": claims{}}), menu, CodeInvalidCredentials, "malformed_claims"},
		{"scope in place of theirs", m.token(t, claims{"iss": renamingKM, "azp": "azp-key", "scope": "order:read"}), "GET /pizza/1.0.0/order/7", CodeScope, "scope"},
	}
	reached := make(map[string]bool)
	for _, tt := range rows {
		method, path, _ := strings.Cut(tt.request, " ")
		// Without claims ClaimsFirst and CatalogFirst are the same.
		for _, mode := range []ClaimsMode{ClaimsFirst, CatalogFirst} {
			got := ask(s, mode, Valid, tt.token, Request{Method: method, Path: path, Tenant: "counts.nowhere"})
			consistent(t, got)
			reached[got.Reason] = true
			if got.Code != tt.code || got.Reason != tt.reason {
				t.Errorf("%s, %s: %d (%s), want %d (%s)", tt.name, mode, got.Code, got.Reason, tt.code, tt.reason)
			}
		}
	}

	if got := ask(s, ClaimsFirst, Valid, tok, Request{Method: "GET", Path: "/pizza/1.0.0/order/7"}); !slices.Equal(got.Scopes, []string{"order:read"}) {
		t.Errorf("scopes %q", got.Scopes)
	}
	for environments, want := range map[string]string{"": "", "eu": "", "us,eu": "", "us": "no_api", "EU": "no_api"} {
		var list []string
		if environments != "" {
			list = strings.Split(environments, ",")
		}
		if got := ask(s, ClaimsFirst, Valid, tok, Request{Method: "GET", Path: "/eu"}, list...); got.Reason != want {
			t.Errorf("environments %q: %q, want %q", environments, got.Reason, want)
		}
	}

	// What remains takes other states and other answers about revocations.
	for _, got := range []Authorization{
		ask(s, ClaimsFirst, Refused, tok, Request{Method: "GET", Path: "/pizza/1.0.0/menu"}),
		ask(s, ClaimsFirst, Revoked, tok, Request{Method: "GET", Path: "/pizza/1.0.0/menu"}),
		ask(revocationsOnly(t), ClaimsFirst, Valid, tok, Request{Method: "GET", Path: "/pizza/1.0.0/menu"}),
	} {
		consistent(t, got)
		reached[got.Reason] = true
	}
	reached["subscription_inactive"] = true // in TestAuthorizeStates
	for _, reason := range Reasons {
		if !reached[reason] {
			t.Errorf("nothing is refused for %q", reason)
		}
	}
}

func revocationsOnly(t testing.TB, records ...Record) *State {
	t.Helper()
	s := NewState(StateConfig{})
	load(t, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		l.RevocationsOnly()
		for _, rec := range records {
			l.Revocation(rec)
		}
	})
	return s
}

// Every kind of revocation refuses, in every mode, and before what comes after it in the order of
// checks; what an issuer's own claim names as the client counts too.
func TestAuthorizeRevoked(t *testing.T) {
	t.Parallel()
	m, w := newMint(t), newWorld()
	full := selfContained("/state/unblocked")
	self := m.token(t, full, claims{"sid": "s-1"})
	for kind, id := range map[revocation.Kind]string{
		revocation.KindToken: "at-1", revocation.KindClient: "prod-key", revocation.KindSubject: "alice", revocation.KindSession: "s-1",
		revocation.KindKey: "key-1", revocation.KindTenant: home.Domain,
	} {
		rec := Record{Target: revocation.Target{Kind: kind, Iss: iss, ID: id}, Tenant: home, Exp: frozen + 3600}
		if kind.HasTime() {
			rec.NotAfter = frozen - 60
		}
		if kind == revocation.KindTenant {
			rec.Target.Iss = ""
		}
		for name, s := range map[string]*State{"catalog": w.state(t, rec), "revocations only": revocationsOnly(t, rec)} {
			for _, mode := range allModes {
				if name != "catalog" && mode != ClaimsOnly {
					continue
				}
				for _, request := range []Request{
					{Method: "GET", Path: "/state/unblocked"},
					{Method: "GET", Path: "/state/unblocked", Tenant: home.Domain},
				} {
					got := ask(s, mode, Valid, self, request)
					consistent(t, got)
					if got.Code != CodeInvalidCredentials || got.Reason != "revoked" || got.Kind != kind || got.Outcome != Revoked {
						t.Errorf("%s, %s, %s: %+v", kind, name, mode, got)
					}
				}
			}
			if later := m.token(t, full, claims{"sid": "s-1", "iat": frozen}); kind.HasTime() {
				if got := ask(s, ClaimsOnly, Valid, later, Request{Method: "GET", Path: "/state/unblocked"}); !got.Authorized {
					t.Errorf("%s, %s: a later token: %+v", kind, name, got)
				}
			}
		}
	}

	// Before the kind of token, the subscription, the scopes.
	s := w.state(t, Record{Target: ofJTI("at-1"), Tenant: home, Exp: frozen + 3600})
	for _, path := range []string{"/pizza/1.0.0/application", "/pizza/1.0.0/order/7", "/unsubscribed", "/state/blocked"} {
		if got := ask(s, ClaimsFirst, Valid, m.token(t), Request{Method: "GET", Path: path}); got.Reason != "revoked" {
			t.Errorf("%s: %q, want revoked", path, got.Reason)
		}
	}
	if got := ask(s, ClaimsFirst, Valid, m.token(t), Request{Method: "GET", Path: "/pizza/1.0.0/public"}); !got.Authorized {
		t.Errorf("a revoked token keeps its bearer from what is for everybody: %+v", got)
	}

	renamed := m.token(t, claims{"iss": renamingKM, "azp": "azp-key", "cid": "cid-key"})
	for _, key := range []string{"azp-key", "cid-key", "unrelated"} {
		s := w.state(t, Record{Target: revocation.Target{Kind: revocation.KindClient, Iss: renamingKM, ID: key}, Tenant: home, Exp: frozen + 3600, NotAfter: frozen})
		got := ask(s, ClaimsFirst, Valid, renamed, Request{Method: "GET", Path: "/pizza/1.0.0/menu"})
		if revoked := key != "unrelated"; got.Authorized == revoked || revoked && got.Kind != revocation.KindClient {
			t.Errorf("client %s is revoked: %+v", key, got)
		}
	}
}

// What is decided where too little is known.
func TestAuthorizeStale(t *testing.T) {
	t.Parallel()
	m, s := newMint(t), newWorld().state(t)
	none := NewState(StateConfig{})
	only := revocationsOnly(t)
	self := m.token(t, selfContained("/state/unblocked"))
	tok := m.token(t)
	at := Request{Method: "GET", Path: "/state/unblocked"}
	public := Request{Method: "GET", Path: "/pizza/1.0.0/public"}
	for _, tt := range []struct {
		name    string
		state   *State
		mode    ClaimsMode
		outcome Outcome
		token   *token.Token
		request Request
		code    Code
		reason  string
	}{
		{"stale", s, ClaimsFirst, Refused, tok, at, CodeGeneral, "stale"},
		{"stale, claims", s, ClaimsFirst, Refused, self, at, CodeGeneral, "stale"},
		{"stale, claims only", only, ClaimsOnly, Refused, self, at, CodeGeneral, "stale"},
		{"stale, no token", s, ClaimsFirst, Refused, nil, at, CodeMissingCredentials, "no_credentials"},
		{"stale, for everybody", s, ClaimsFirst, Refused, nil, public, 0, ""},
		{"ask", s, ClaimsFirst, Ask, tok, at, 0, ""},
		{"ask, and no subscription", s, ClaimsFirst, Ask, tok, Request{Method: "GET", Path: "/unsubscribed"}, CodeForbidden, "no_subscription"},
		{"nothing known, closed", none, ClaimsFirst, Refused, tok, at, CodeGeneral, "stale"},
		{"nothing known, closed, no token", none, ClaimsFirst, Refused, nil, public, CodeGeneral, "stale"},
		{"nothing known, closed, claims only", none, ClaimsOnly, Refused, self, at, CodeGeneral, "stale"},
		{"nothing known, open", none, ClaimsFirst, Valid, tok, at, 0, ""},
		{"nothing known, open, not clean", none, ClaimsFirst, Valid, tok, Request{Method: "GET", Path: "/a//b"}, CodeForbidden, "path"},
		{"nothing known, open, no token", none, ClaimsFirst, Valid, nil, public, CodeMissingCredentials, "no_credentials"},
		{"nothing known, open, claims only", none, ClaimsOnly, Valid, self, at, 0, ""},
		{"nothing known, open, claims only, not there", none, ClaimsOnly, Valid, self, public, CodeForbidden, "no_subscription"},
		{"revocations only", only, ClaimsFirst, Valid, self, at, CodeGeneral, "no_catalog"},
		{"revocations only", only, CatalogFirst, Valid, self, at, CodeGeneral, "no_catalog"},
		{"revocations only, no token", only, ClaimsFirst, Valid, nil, at, CodeGeneral, "no_catalog"},
		{"revocations only, claims only", only, ClaimsOnly, Valid, self, at, 0, ""},
		{"revocations only, claims only, no claims", only, ClaimsOnly, Valid, tok, at, CodeForbidden, "no_subscription"},
		{"revocations only, claims only, no token", only, ClaimsOnly, Valid, nil, public, CodeMissingCredentials, "no_credentials"},
	} {
		got := ask(tt.state, tt.mode, tt.outcome, tt.token, tt.request)
		consistent(t, got)
		if got.Code != tt.code || got.Reason != tt.reason {
			t.Errorf("%s, %s: %d (%s), want %d (%s)", tt.name, tt.mode, got.Code, got.Reason, tt.code, tt.reason)
		}
		if got.Authorized && tt.token != nil && got.Outcome != tt.outcome {
			t.Errorf("%s: outcome %d, want %d", tt.name, got.Outcome, tt.outcome)
		}
	}
}

// idle is a source that is never asked.
type idle struct{ Source }

// Authorize goes by the replica's configuration, and by the staleness of the route.
func TestReplicaAuthorize(t *testing.T) {
	t.Parallel()
	m, w := newMint(t), newWorld()
	rec := Record{Target: ofJTI("revoked"), Tenant: home, Exp: time.Now().Unix() + 3600}
	fill := func(l *Loader) {
		l.Revocation(rec)
		for _, e := range w.entities {
			l.Entity(e)
		}
	}
	r, err := New(Config{
		Source: idle{}, Claims: CatalogFirst, Environments: []string{"eu"}, Empty: Serve,
		Routes: []Route{{"/eu/served", Staleness{Then: Serve}}, {"/eu/asked", Staleness{Then: Introspect}}},
	})
	must(t, err)
	tok, revoked := m.token(t), m.token(t, claims{"jti": "revoked"})
	if got := r.Authorize(tok, Request{Method: "GET", Path: "/eu"}); !got.Authorized || got.Outcome != Valid || got.Age != Never {
		t.Errorf("nothing is known, and to be served: %+v", got)
	}
	load(t, r.State(), revocation.Position{Epoch: epoch, Seq: 1}, fill)
	for _, tt := range []struct {
		token  *token.Token
		path   string
		reason string
		want   Outcome
	}{
		{tok, "/eu", "stale", Refused},
		{tok, "/eu/served/x", "", Valid},
		{tok, "/eu/asked", "", Ask},
		{revoked, "/eu/served", "revoked", Revoked},
		{revoked, "/eu/asked", "revoked", Revoked},
		{tok, "/state/unblocked", "no_api", Refused},
	} {
		got := r.Authorize(tt.token, Request{Method: "GET", Path: tt.path})
		consistent(t, got)
		if got.Reason != tt.reason || got.Outcome != tt.want {
			t.Errorf("%s: %q, %v, want %q, %v", tt.path, got.Reason, got.Outcome, tt.reason, tt.want)
		}
	}
}

// Deciding goes on while the catalog changes. An API that is replaced is there all the time.
func TestAuthorizeWhileApplying(t *testing.T) {
	t.Parallel()
	m, w := newMint(t), newWorld()
	s, tok, log := w.state(t), m.token(t), newModel()
	log.append(revocation.Event{}) // the snapshot is at 1
	i := slices.IndexFunc(w.entities, func(e catalog.Entity) bool { a, ok := e.(*catalog.API); return ok && a.Name == "Pizza" })
	api := *w.entities[i].(*catalog.API)
	done := make(chan struct{})
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for {
				if got := askOnly(s, ClaimsFirst, Valid, tok, Request{Method: "GET", Path: "/pizza/1.0.0/menu"}); !got.Authorized {
					t.Errorf("refused: %+v", got)
					return
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	for n := range 100 {
		changed := api
		changed.Timestamp = int64(n)
		must(t, s.Apply(log.change(catalog.Change{Verb: catalog.Updated, Entity: &changed})))
	}
	close(done)
	all.Wait()
	if n := len(s.content.shelves.places["/pizza/1.0.0"]); n != 1 {
		t.Errorf("%d places of one API", n)
	}
}

func TestAuthorizeAllocates(t *testing.T) {
	m, s := newMint(t), newWorld().state(t)
	tok, request := m.token(t), Request{Method: "GET", Path: "/pizza/1.0.0/menu"}
	if n := testing.AllocsPerRun(100, func() { askOnly(s, ClaimsFirst, Valid, tok, request) }); n > 5 {
		t.Errorf("%v allocations for a decision, want at most 5", n)
	}
}

// What self-contained tokens are believed, and what they are refused for.
func TestAuthorizeClaims(t *testing.T) {
	t.Parallel()
	m, s := newMint(t), newWorld().state(t)
	only := revocationsOnly(t)
	item := func(changes claims) claims {
		all := claims{
			"name": "state/unblocked", "context": "/state/unblocked", "version": "1", "publisher": "p", "subscriptionTier": "Silver",
			"subscriberTenantDomain": home.Domain,
		}
		maps.Copy(all, changes)
		maps.DeleteFunc(all, func(_ string, value any) bool { return value == nil })
		return all
	}
	listing := func(items ...any) claims { return claims{"subscribedAPIs": append([]any{}, items...)} }
	type codes [3]Code // by mode, for a key that the catalog does not have
	yes, no, bad := codes{}, codes{CodeForbidden, CodeForbidden, CodeForbidden}, codes{CodeInvalidCredentials, CodeInvalidCredentials, CodeInvalidCredentials}
	for _, tt := range []struct {
		name    string
		changes claims
		want    codes
	}{
		{"as it should be", nil, yes},
		{"no keytype", claims{"keytype": nil}, yes},
		{"sandbox", claims{"keytype": "SANDBOX"}, yes},
		{"strange keytype", claims{"keytype": "production"}, bad},
		{"keytype is no text", claims{"keytype": 1}, bad},
		{"no application", claims{"application": nil}, bad},
		{"application is a text", claims{"application": "Mobile"}, bad},
		{"application without members", claims{"application": claims{}}, yes},
		{"application.id is a text", claims{"application": claims{"id": "7"}}, bad},
		{"application.name is a number", claims{"application": claims{"name": 7}}, bad},
		{"no tierInfo", claims{"tierInfo": nil}, yes},
		{"tierInfo is an array", claims{"tierInfo": []any{}}, bad},
		{"tierInfo of another tier", claims{"tierInfo": claims{"Gold": 1}}, yes},
		{"a tier is no object", claims{"tierInfo": claims{"Silver": 1}}, bad},
		{"a tier's limit is a text", claims{"tierInfo": claims{"Silver": claims{"spikeArrestLimit": "1"}}}, bad},
		{"a tier's stop is a text", claims{"tierInfo": claims{"Silver": claims{"stopOnQuotaReach": "true"}}}, bad},
		{"a tier's unit is null", claims{"tierInfo": claims{"Silver": map[string]any{"spikeArrestUnit": nil}}}, yes},
		{"subscribedAPIs is an object", claims{"subscribedAPIs": item(nil)}, bad},
		{"subscribedAPIs is a text", claims{"subscribedAPIs": "all"}, bad},
		{"subscribedAPIs of texts", listing("state/unblocked"), bad},
		{"a null among them", listing(nil, item(nil)), bad},
		{"another one is malformed", listing(item(nil), item(claims{"tier": "x", "version": 2})), bad},
		{"subscribedAPIs is null: not self-contained", claims{"subscribedAPIs": nil}, no},
		{"empty list", listing(), no},
		{"in another case", claims{"subscribedAPIs": nil, "SubscribedAPIs": []any{item(nil)}}, no},
		{"members in another case", listing(item(claims{"context": nil, "name": nil, "Context": "/state/unblocked", "Name": "state/unblocked"})), no},
		{"another API", listing(item(claims{"context": "/state/other", "name": "other"})), no},
		{"another version", listing(item(claims{"version": "2", "context": "/state/x"})), no},
		{"any version", listing(item(claims{"version": "*"})), no},
		{"no version", listing(item(claims{"version": nil})), no},
		{"another tenant", listing(item(claims{"subscriberTenantDomain": otherTenant.Domain})), no},
		{"no tenant", listing(item(claims{"subscriberTenantDomain": nil})), no},
		{"the second", listing(item(claims{"context": "/a", "name": "a"}), item(nil)), yes},
		// The catalog knows the API by its name as well; who has no catalog goes by the context.
		{"another context", listing(item(claims{"context": "/was/here"})), codes{0, 0, CodeForbidden}},
		{"another name", listing(item(claims{"name": "was called so"})), yes},
		{"another version, the same context", listing(item(claims{"version": "2"})), codes{CodeForbidden, CodeForbidden, 0}},
		{"root context", listing(item(claims{"context": "/", "name": "x"})), no},
		{"empty context", listing(item(claims{"context": "", "name": "x"})), no},
		{"part of a segment", listing(item(claims{"context": "/state/un", "name": "x"})), no},
		{"disabled issuer", claims{"iss": disabledKM}, bad},
	} {
		tok := m.token(t, claims{"azp": "unknown"}, selfContained("/state/unblocked"), tt.changes)
		for _, mode := range allModes {
			got := ask(s, mode, Valid, tok, Request{Method: "GET", Path: "/state/unblocked/x"})
			consistent(t, got)
			if got.Code != tt.want[mode] {
				t.Errorf("%s, %s: %d (%s), want %d", tt.name, mode, got.Code, got.Reason, tt.want[mode])
			}
		}
		// A catalog that knows the key may do without the claims.
		known := m.token(t, selfContained("/state/unblocked"), tt.changes)
		if got := ask(s, CatalogFirst, Valid, known, Request{Method: "GET", Path: "/state/unblocked/x"}); !got.Authorized && known.Issuer == iss {
			t.Errorf("%s, key mapping: %d (%s)", tt.name, got.Code, got.Reason)
		}
		if want := tt.want[ClaimsOnly]; known.Issuer == iss {
			for _, request := range []Request{
				{Method: "BREW", Path: "/state/unblocked/x/", Tenant: home.Domain}, {Method: "GET", Path: "/state/unblocked", Tenant: home.Domain},
			} {
				got := ask(only, ClaimsOnly, Valid, known, request)
				consistent(t, got)
				if got.Code != want {
					t.Errorf("%s, revocations only: %d (%s), want %d", tt.name, got.Code, got.Reason, want)
				}
			}
		}
	}

	// Where nobody else knows the tenant, the token does, unless it names several.
	two := m.token(t, selfContained("/a/1"), listing(item(claims{"context": "/a/1"}), item(claims{"context": "/t/other.example/b/1", "subscriberTenantDomain": otherTenant.Domain})))
	one := m.token(t, selfContained("/a/1", "/a/1/b"))
	for _, tt := range []struct {
		token      *token.Token
		path, told string
		authorized bool
	}{
		{one, "/a/1", "", true},
		{one, "/a/1", otherTenant.Domain, false},
		{two, "/a/1", "", false},
		{two, "/t/other.example/b/1", "", false},
		{two, "/a/1", home.Domain, true},
		{two, "/t/other.example/b/1", home.Domain, false},
		{two, "/t/other.example/b/1", otherTenant.Domain, true},
	} {
		got := ask(only, ClaimsOnly, Valid, tt.token, Request{Method: "GET", Path: tt.path, Tenant: tt.told})
		if got.Authorized != tt.authorized || got.Authorized && got.Info.SubscriberTenantDomain == "" {
			t.Errorf("%s of tenant %q: %+v", tt.path, tt.told, got)
		}
	}
	if got := ask(only, ClaimsOnly, Valid, one, Request{Method: "GET", Path: "/a/1/b/c"}); got.Info.APIName != "a/1/b" {
		t.Errorf("of two contexts not the longer one: %+v", got.Info)
	}

	// The catalog says what there is, whatever the claims say.
	all := m.token(t, selfContained("/status/blocked", "/status/retired", "/nowhere", "/t/other.example/theirs", "/shared", "/eu"),
		claims{"azp": "unknown"})
	for path, want := range map[string]Code{
		"/status/blocked": CodeAPIBlocked, "/status/retired": CodeForbidden, "/nowhere": CodeForbidden, "/t/other.example/theirs": CodeForbidden, "/shared": 0, "/eu": CodeForbidden,
	} {
		if got := ask(s, ClaimsFirst, Valid, all, Request{Method: "GET", Path: path}, environmentsOf(path)...); got.Code != want {
			t.Errorf("%s: %d (%s), want %d", path, got.Code, got.Reason, want)
		}
	}
	pizza := m.token(t, claims{"azp": "unknown"}, selfContained(), listing(item(claims{"name": "Pizza", "context": "/pizza/1.0.0", "version": "1.0.0"})))
	for request, want := range map[string]Code{
		"GET /menu": 0, "POST /order": 0, "GET /order/7": CodeScope, "GET /application": CodeWrongTokenType, "GET /user": 0, "GET /none": CodeForbidden,
	} {
		method, rest, _ := strings.Cut(request, " ")
		if got := ask(s, ClaimsFirst, Valid, pizza, Request{Method: method, Path: "/pizza/1.0.0" + rest}); got.Code != want {
			t.Errorf("%s: %d (%s), want %d", request, got.Code, got.Reason, want)
		}
	}
}

// Tenants choose the contexts of their APIs themselves. None has a say in the paths of another one.
func TestAuthorizeTenants(t *testing.T) {
	t.Parallel()
	m := newMint(t)
	evil, acmeKM := otherTenant, thirdKM
	// worldOf has an API at this context of carbon.super and of acme, for which an application of each has a
	// subscription, and what evil puts there.
	worldOf := func(evils ...string) *world {
		w := new(world)
		for tenant, km := range map[revocation.Tenant]string{home: iss, acme: acmeKM, evil: otherKM} {
			w.add(tenant, &catalog.Policy{Kind: catalog.PolicySubscription, Name: "Unlimited"})
			w.add(tenant, &catalog.Policy{Kind: catalog.PolicyApplication, Name: "Unlimited"})
			w.add(tenant, &catalog.KeyManager{Name: tenant.Domain, Enabled: true, Iss: km})
			app := w.add(tenant, &catalog.Application{Name: "Mobile", Policy: "Unlimited"})
			w.add(tenant, &catalog.KeyMapping{Application: app, ConsumerKey: "prod-key", KeyType: catalog.Production, Iss: km})
			contexts := map[revocation.Tenant][]string{home: {"/shop/1"}, acme: {"/t/acme.example/shop/1", "/plain/1"}, evil: evils}
			for _, context := range contexts[tenant] {
				authType := "Any"
				if tenant == evil {
					authType = "None"
				}
				a := w.add(tenant, &catalog.API{Name: context, Version: "1", Context: context, Status: catalog.APIPublished, Operations: []catalog.Operation{
					{Verb: "GET", Target: "/*", AuthType: authType}, {Verb: "POST", Target: "/*", AuthType: "Any"},
				}})
				w.add(tenant, &catalog.Subscription{Application: app, API: a, Policy: "Unlimited", State: catalog.Unblocked})
			}
		}
		return w
	}
	homes, acmes, evils := m.token(t), m.token(t, claims{"iss": acmeKM}), m.token(t, claims{"iss": otherKM})
	get := func(path string) Request { return Request{Method: "GET", Path: path} }
	post := func(path string) Request { return Request{Method: "POST", Path: path} }
	type row struct {
		name    string
		token   *token.Token
		request Request
		reason  string
	}
	check := func(s *State, only string, rows ...row) {
		t.Helper()
		for _, tt := range rows {
			var got Authorization
			by := authorizer{only: only, check: func(tok Token) Decision { return Decision{Outcome: Valid} }}
			explained := by
			s.View(func(v *View) { by.authorize(&got, v, tt.token, tt.request) })
			mustExplain(s, explained, tt.token, tt.request, got)
			consistent(t, got)
			if got.Reason != tt.reason {
				t.Errorf("%s, %s: %q, want %q", tt.name, tt.request.Path, got.Reason, tt.reason)
			}
		}
	}
	for _, context := range []string{
		"/shop/1/orders", // below another's
		"/shop/1",        // another's
		"/shop",          // above another's
		"/%73hop/1",
		"/t", "/t/acme.example", "/t/acme.example/shop/1", "/t/acme.example/shop/1/orders", "/t/acme%2eexample/shop/1/orders",
		"/t/other.example.com", "/t/other.exampl", "/T/other.example", "/t%2Fother.example",
	} {
		s := worldOf(context).state(t)
		check(s, "",
			row{context + ": nobody", nil, get("/shop/1/orders"), "no_credentials"},
			row{context + ": nobody, of acme's", nil, get("/t/acme.example/shop/1/orders"), "no_credentials"},
			row{context + ": his own", evils, post("/shop/1/orders"), "no_subscription"},
			row{context + ": his own, of acme's", evils, post("/t/acme.example/shop/1/orders"), "no_subscription"},
			row{context + ": home's", homes, get("/shop/1/orders"), ""},
			row{context + ": acme's", acmes, post("/t/acme.example/shop/1/orders"), ""},
			row{context + ": above", nil, get("/shop"), "no_api"},
		)
	}
	s := worldOf("/t/other.example", "/t/%6Fther.example/x/1").state(t)
	check(s, "",
		row{"his own place", nil, get("/t/other.example/anything"), ""},
		row{"his own place, encoded", evils, post("/t/other.example/x/1/y"), ""},
		row{"acme's without its prefix", acmes, post("/plain/1/x"), "no_api"},
		row{"acme's on home's", acmes, post("/shop/1/x"), "no_subscription"},
	)
	w := worldOf()
	w.add(home, &catalog.API{Name: "t", Version: "1", Context: "/t/acme.example/more", Status: catalog.APIPublished})
	w.add(home, &catalog.API{Name: "t", Version: "1", Context: "/t", Status: catalog.APIPublished})
	w.add(home, &catalog.API{Name: "t", Version: "1", Context: "/tea", Status: catalog.APIPublished})
	s = w.state(t)
	check(s, "",
		row{"home's in acme's place", homes, get("/t/acme.example/more"), "no_api"},
		row{"home's above all", homes, get("/t/nobody.example"), "no_api"},
		row{"home's beside it", homes, get("/tea"), "no_subscription"},
	)

	// Where one tenant is served, the prefix is for it to choose, and nobody else is there.
	s = worldOf("/shop/1", "/plain/1/x", "/t/acme.example/shop/1/orders", "/t/other.example").state(t)
	alone := []row{
		{"no prefix", acmes, get("/plain/1/x"), ""},
		{"prefix", acmes, get("/t/acme.example/shop/1/orders"), ""},
		{"nobody", nil, get("/plain/1/x"), "no_credentials"},
		{"another's", nil, get("/t/other.example"), "no_api"},
		{"another issuer", evils, get("/plain/1/x"), "issuer"},
		{"home's", homes, get("/shop/1"), "no_api"},
		{"home's issuer", homes, get("/plain/1/x"), "issuer"},
	}
	check(s, acme.Domain, alone...)
	part := NewState(StateConfig{})
	load(t, part, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		l.Tenants([]string{acme.Domain})
		for _, e := range worldOf().entities {
			if e.Base().Tenant == acme {
				l.Entity(e)
			}
		}
	})
	check(part, "", alone...)

	// By claims alone each issuer has a say in its tenant's paths.
	only := revocationsOnly(t)
	alone1 := NewState(StateConfig{})
	load(t, alone1, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		l.RevocationsOnly()
		l.Tenants([]string{evil.Domain})
	})
	for _, tt := range []struct {
		tenant, context, path string
		several, one          bool // served
	}{
		{evil.Domain, "/t/other.example/x", "/t/other.example/x/y", true, true},
		{evil.Domain, "/t/%6fther.example", "/t/other.example/x/y", true, true},
		{evil.Domain, "/shop/1", "/shop/1/orders", false, true},
		{evil.Domain, "/t/acme.example/shop/1", "/t/acme.example/shop/1/orders", false, true},
		{evil.Domain, "/t", "/t/acme.example/shop/1/orders", false, true},
		{evil.Domain, "/t/other.example", "/t/other.example.com/x", false, false},
		{home.Domain, "/shop/1", "/shop/1/orders", true, false},
		{home.Domain, "/t/acme.example/shop/1", "/t/acme.example/shop/1/orders", false, false},
		{home.Domain, "/t", "/t/acme.example/shop/1/orders", false, false},
		{"", "/shop/1", "/shop/1/orders", false, false},
	} {
		full := selfContained(tt.context)
		for _, item := range full["subscribedAPIs"].([]any) {
			item.(claims)["subscriberTenantDomain"] = tt.tenant
		}
		tok := m.token(t, full)
		for s, want := range map[*State]bool{only: tt.several, alone1: tt.one} {
			for _, told := range []string{tt.tenant, ""} {
				got := ask(s, ClaimsOnly, Valid, tok, Request{Method: "GET", Path: tt.path, Tenant: told})
				consistent(t, got)
				if got.Authorized != want {
					t.Errorf("%q of %q for %s, told %q, one tenant: %t: %q", tt.context, tt.tenant, tt.path, told, s == alone1, got.Reason)
				}
			}
		}
	}
}

// environmentsOf is us for what is not deployed there.
func environmentsOf(path string) []string {
	if path == "/eu" {
		return []string{"us"}
	}
	return nil
}

// Info is WSO2's, letter for letter.
func TestInfo(t *testing.T) {
	t.Parallel()
	m, s := newMint(t), newWorld().state(t)
	only := revocationsOnly(t)
	self := m.token(t, selfContained("/bytes"))
	bytesApplication := m.token(t, selfContained("/state/unblocked"), claims{"application": claims{"tierQuotaType": "bandwidthVolume"}, "keytype": "SANDBOX"})
	bytesTier := m.token(t, selfContained("/state/unblocked"), claims{"tierInfo": claims{"Silver": claims{"tierQuotaType": "bandwidthVolume"}}})
	for _, tt := range []struct {
		name string
		a    Authorization
	}{
		{"catalog", ask(s, ClaimsFirst, Valid, m.token(t), Request{Method: "POST", Path: "/pizza/1.0.0/order"})},
		{"application", ask(s, ClaimsFirst, Valid, m.token(t, claims{"azp": "bytes-key", "sub": "bytes-key", "scope": nil}), Request{Method: "GET", Path: "/pizza/1.0.0/menu"})},
		{"api-policy", ask(s, ClaimsFirst, Valid, m.token(t, claims{"azp": "sandbox-key"}), Request{Method: "GET", Path: "/bytes"})},
		{"claims", ask(s, ClaimsFirst, Valid, self, Request{Method: "GET", Path: "/bytes"})},
		{"subscription-tier", ask(s, ClaimsFirst, Valid, m.token(t), Request{Method: "GET", Path: "/bytes-tier"})},
		{"claims-tier", ask(s, ClaimsFirst, Valid, bytesTier, Request{Method: "GET", Path: "/state/unblocked"})},
		{"claims-only", ask(only, ClaimsOnly, Valid, bytesApplication, Request{Method: "GET", Path: "/state/unblocked"})},
		{"public", ask(s, ClaimsFirst, Valid, nil, Request{Method: "GET", Path: "/pizza/1.0.0/public"})},
		{"scope", ask(s, ClaimsFirst, Valid, m.token(t), Request{Method: "GET", Path: "/pizza/1.0.0/order/7"})},
		{"nothing", ask(s, ClaimsFirst, Valid, nil, Request{Method: "GET", Path: "/none"})},
	} {
		consistent(t, tt.a)
		got, err := json.MarshalIndent(tt.a.Info, "", "  ")
		must(t, err)
		got = append(got, '\n')
		file := filepath.Join("testdata", "info-"+tt.name+".golden")
		if *update {
			must(t, os.WriteFile(file, got, 0o644))
		}
		want, err := os.ReadFile(file)
		must(t, err)
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s (-golden +got):\n%s", tt.name, diff)
		}
	}
	// The golden files have every member of section 10.2.
	b, err := json.Marshal(Info{})
	must(t, err)
	var members map[string]any
	must(t, json.Unmarshal(b, &members))
	want := strings.Fields(`authorized validationStatus tier subscriber applicationId applicationUUID applicationName applicationTier
		applicationAttributes apiName apiVersion apiUUID apiPublisher apiTier type consumerKey endUserName subscriberTenantDomain contentAware
		spikeArrestLimit spikeArrestUnit stopOnQuotaReach graphQLMaxDepth graphQLMaxComplexity throttlingDataList scopes userType issuedTime
		validityPeriod authorizedDomains endUserToken`)
	slices.Sort(want)
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(members))); diff != "" {
		t.Errorf("members (-want +got):\n%s", diff)
	}
	if b, err := json.Marshal(&Authorization{}); err != nil || strings.Contains(string(b), `"scopes":null`) {
		t.Errorf("%s, %v", b, err)
	}
}

func TestCodes(t *testing.T) {
	t.Parallel()
	for code, want := range map[Code]int{
		0: 200, CodeGeneral: 503, CodeInvalidCredentials: 401, CodeMissingCredentials: 401, CodeWrongTokenType: 403, CodeSubscriptionBlocked: 401,
		CodeForbidden: 403, CodeNotActive: 403, CodeScope: 403, CodeKeyManagerDown: 503, CodeAPIBlocked: 503,
	} {
		if got := code.HTTPStatus(); got != want {
			t.Errorf("HTTPStatus of %d is %d, want %d", code, got, want)
		}
		if got := code.Message(); (got == "") != (code == 0) {
			t.Errorf("Message of %d is %q", code, got)
		}
	}
	for _, mode := range allModes {
		text, err := mode.MarshalText()
		must(t, err)
		var again ClaimsMode
		if err := again.UnmarshalText(text); err != nil || again != mode {
			t.Errorf("%q is %v, %v", text, again, err)
		}
	}
	var mode ClaimsMode
	if err := mode.UnmarshalText([]byte("Claims-First")); err == nil || !strings.Contains(err.Error(), "claims-first, catalog-first, claims-only") {
		t.Errorf("a mode that is none: %v", err)
	}
	if got := ClaimsMode(9).String(); got != "ClaimsMode(9)" {
		t.Error(got)
	}
	sorted := slices.Clone(Reasons)
	slices.Sort(sorted)
	if got := slices.Compact(sorted); len(got) != len(Reasons) || got[0] == "" {
		t.Errorf("Reasons are %q", Reasons)
	}
}

// big is a catalog of 1,000 APIs, 10,000 applications with a key each, and 100,000 subscriptions.
func big(t testing.TB) *State {
	t.Helper()
	w := new(world)
	for _, kind := range []string{catalog.PolicySubscription, catalog.PolicyApplication, catalog.PolicyAPI} {
		w.add(home, &catalog.Policy{Kind: kind, Name: "Unlimited", QuotaType: "requestCount"})
	}
	w.add(home, &catalog.KeyManager{Name: "STS", Enabled: true, Iss: iss})
	var apis []catalog.Ref
	for i := range 1000 {
		apis = append(apis, w.add(home, &catalog.API{
			Name: fmt.Sprint("api", i), Version: "1.0.0", Context: fmt.Sprintf("/acme/api%d/1.0.0", i), Status: catalog.APIPublished, Policy: "Unlimited",
			Operations: []catalog.Operation{
				{Verb: "GET", Target: "/menu", AuthType: "Any"},
				{Verb: "POST", Target: "/order", AuthType: "Any", Scopes: []string{"order:write"}},
				{Verb: "GET", Target: "/order/{orderId}", AuthType: "Any", Scopes: []string{"order:read", "order:write"}},
				{Verb: "DELETE", Target: "/order/{orderId}", AuthType: "Any", Scopes: []string{"order:write"}},
				{Verb: "GET", Target: "/*", AuthType: "Any"},
			},
		}))
	}
	for i := range 10000 {
		app := w.add(home, &catalog.Application{Name: fmt.Sprint("app", i), Owner: "bob", Policy: "Unlimited", TokenType: "JWT"})
		w.add(home, &catalog.KeyMapping{Application: app, ConsumerKey: uuidOf(1<<30 + i), KeyType: catalog.Production, Iss: iss})
		for j := range 10 {
			w.add(home, &catalog.Subscription{Application: app, API: apis[(i+j*97)%len(apis)], Policy: "Unlimited", State: catalog.Unblocked})
		}
	}
	return w.state(t, Record{Target: ofJTI(uuidOf(1)), Tenant: home, Exp: frozen + 3600})
}

// BenchmarkAuthorize is the decision without the signature: by a catalog of 10,000 applications and 100,000
// subscriptions, and by a token's claims. "table" is the least that any such decision takes: its
// five look-ups in maps.
func BenchmarkAuthorize(b *testing.B) {
	m, s := newMint(b), big(b)
	var tokens []*token.Token
	var requests []Request
	for i := range 500 {
		tokens = append(tokens, m.token(b, claims{"azp": uuidOf(1<<30 + i*20), "jti": uuidOf(5000 + i)}))
		requests = append(requests, Request{Method: "GET", Path: fmt.Sprintf("/acme/api%d/1.0.0/order/%d", (i*20+97*(i%10))%1000, i)})
	}
	var self []*token.Token
	for i := range 500 {
		api := fmt.Sprintf("/acme/api%d/1.0.0", (i*20+97*(i%10))%1000)
		full := selfContained(api+"x", api+"y", api+"z", api)
		for _, item := range full["subscribedAPIs"].([]any) {
			item.(claims)["version"] = "1.0.0"
		}
		self = append(self, m.token(b, claims{"azp": "unknown", "jti": uuidOf(5000 + i)}, full))
	}
	run := func(name string, mode ClaimsMode, tokens []*token.Token) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if a := askOnly(s, mode, Valid, tokens[i%500], requests[i%500]); !a.Authorized {
					b.Fatalf("%s: %+v", requests[i%500].Path, a)
				}
			}
		})
	}
	run("catalog", ClaimsFirst, tokens)
	run("claims", ClaimsFirst, self)
	run("claims-only", ClaimsOnly, self)
	b.Run("table", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			t := tokens[i%500]
			s.View(func(v *View) {
				app := v.Application(v.keyMapping(t.ClientID, t.Issuer).Application.UUID)
				if v.Subscription(app.UUID, app.UUID) != nil || v.KeyManager(t.Issuer) == nil || v.Policy(home.ID, catalog.PolicyApplication, app.Policy) == nil {
					b.Fatal("wrong answer")
				}
			})
		}
	})
}
