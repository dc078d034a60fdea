package eventhub

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"

var (
	super = revocation.SuperTenant
	org   = revocation.Tenant{ID: 7, Domain: "org.example"}
	other = revocation.Tenant{ID: 8, Domain: "other.example"}
)

const (
	superISS = "https://km.example.com"
	idpISS   = "https://idp.example.com"
	orgISS   = "https://km.example.com/t/org.example"
	otherISS = "https://km.example.com/t/other.example"
)

func meta(t revocation.Tenant, id int32) catalog.Meta {
	return catalog.Meta{ID: id, UUID: fmt.Sprintf("d1a2b3c4-0000-4000-8000-%012d", id), Tenant: t, Timestamp: 1760000000000 + int64(id)}
}

func ref(id int32) catalog.Ref { return catalog.Ref{ID: id, UUID: meta(super, id).UUID} }

// entities of the catalog, with ids that are unique over all nouns.
func testCatalog() []catalog.Entity {
	all := []catalog.Entity{
		&catalog.Tenant{Meta: catalog.Meta{ID: super.ID, UUID: meta(super, 900).UUID, Tenant: super, Timestamp: 1}},
		&catalog.Tenant{Meta: catalog.Meta{ID: org.ID, UUID: meta(org, 901).UUID, Tenant: org, Timestamp: 1}},
		&catalog.Tenant{Meta: catalog.Meta{ID: other.ID, UUID: meta(other, 902).UUID, Tenant: other, Timestamp: 1}},
		&catalog.KeyManager{
			Meta: meta(super, 1), Name: "Resident Key Manager", Type: "default", Enabled: true, Resident: true, Iss: superISS,
			MaxTokenLifetime: 3600, TokenType: "DIRECT",
		},
		&catalog.KeyManager{
			Meta: meta(super, 2), Name: "OurIDP", DisplayName: "The <IdP> & more", Type: "WSO2-IS", Enabled: false, Iss: idpISS,
			MaxTokenLifetime: 600, TokenType: "BOTH", JWKSURI: "https://idp.example.com/jwks", ConsumerKeyClaim: "client_id",
			ClaimMappings: []catalog.ClaimMapping{{Remote: "sub", Local: "user"}},
			Properties:    map[string]any{"grant_types": []any{"client_credentials"}, "enable_token_hash": false, "VALIDITY_PERIOD": "3600"},
		},
		&catalog.KeyManager{
			Meta: meta(org, 3), Name: "Resident Key Manager", Type: "default", Enabled: true, Resident: true, Iss: orgISS,
			MaxTokenLifetime: 3600, TokenType: "DIRECT",
		},
		&catalog.KeyManager{
			Meta: meta(other, 4), Name: "Resident Key Manager", Type: "default", Enabled: true, Resident: true, Iss: otherISS,
			MaxTokenLifetime: 3600, TokenType: "DIRECT",
		},
		&catalog.Policy{
			Meta: meta(super, 14), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount", Quota: 5000, UnitTime: 2, TimeUnit: "hour",
			RateLimitCount: 10, RateLimitTimeUnit: "sec", StopOnQuotaReach: true, GraphQLMaxDepth: 5, GraphQLMaxComplexity: 400,
		},
		&catalog.Policy{
			Meta: meta(super, 15), Kind: catalog.PolicySubscription, Name: "Data", QuotaType: "bandwidthVolume", Quota: 1 << 20, UnitTime: 1, TimeUnit: "day",
		},
		&catalog.Policy{Meta: meta(super, 16), Kind: catalog.PolicySubscription, Name: "Streams", QuotaType: "eventCount", Quota: 100, UnitTime: 1, TimeUnit: "month"},
		&catalog.Policy{Meta: meta(super, 17), Kind: catalog.PolicySubscription, Name: "Models", QuotaType: "aiApiQuota", Quota: 100, UnitTime: 1, TimeUnit: "min"},
		&catalog.Policy{Meta: meta(super, 18), Kind: catalog.PolicyApplication, Name: "50PerMin", QuotaType: "requestCount", Quota: 50, UnitTime: 1, TimeUnit: "min"},
		&catalog.Policy{
			Meta: meta(super, 19), Kind: catalog.PolicyAPI, Name: "10KPerHour", QuotaType: "requestCount", Quota: 10000, UnitTime: 1, TimeUnit: "hour", Level: "apiLevel",
		},
		&catalog.Scope{Meta: meta(super, 21), Name: "menu:read", DisplayName: "Read menus", Roles: []string{"customer", "clerk"}},
		&catalog.Scope{Meta: meta(super, 22), Name: "bare"},
		&catalog.API{
			Meta: meta(super, 31), Name: "Pizza & Co", Version: "1.0.0", Context: "/pizza/1.0.0", Provider: "admin", Type: "HTTP", Status: catalog.APIPublished,
			DefaultVersion: true, Policy: "10KPerHour", SecurityScheme: []string{"oauth2"}, GatewayLabels: []string{"Default", "EU edge"},
			Operations: []catalog.Operation{
				{Target: "/menu/{id}", Verb: "GET", AuthType: "Any", Policy: "Unlimited", Scopes: []string{"menu:read"}},
				{Target: "/*", Verb: "POST", AuthType: "None"},
			},
		},
		&catalog.API{
			Meta: meta(super, 32), Name: "Bare", Version: "2", Context: "/bare/2", Provider: "admin", Type: "WS", Status: catalog.APIBlocked,
		},
		&catalog.API{
			Meta: meta(super, 33), Name: "Gone", Version: "1", Context: "/gone/1", Provider: "admin", Type: "HTTP", Status: catalog.APIRetired, GatewayLabels: []string{"Default"},
		},
		&catalog.Application{
			Meta: meta(super, 41), Name: "Mobile", Owner: "ann", Policy: "50PerMin", TokenType: "JWT", Groups: []string{"sales"},
			Attributes: map[string]string{"cost centre": "42", "note": `a "b" <c>`},
		},
		&catalog.Application{Meta: meta(super, 42), Name: "Späti \u2028", Owner: "bob", Policy: "Unlimited", TokenType: "OAUTH", Blocked: true},
		&catalog.KeyMapping{
			Meta: meta(super, 51), Application: ref(41), ConsumerKey: "Jx3k9aAbCq", KeyType: catalog.Production, KeyManager: "Resident Key Manager", Iss: superISS, Generated: true,
		},
		&catalog.KeyMapping{
			Meta: meta(super, 52), Application: ref(41), ConsumerKey: "Jx3k9aAbCq", KeyType: catalog.Sandbox, KeyManager: "OurIDP", Iss: idpISS,
		},
		&catalog.KeyMapping{
			Meta: meta(super, 53), Application: ref(42), ConsumerKey: "bob/1+1=2", KeyType: catalog.Production, KeyManager: "OurIDP", Iss: idpISS,
		},
		&catalog.Subscription{Meta: meta(super, 61), Application: ref(41), API: ref(31), Policy: "Gold", State: catalog.Unblocked},
		&catalog.Subscription{Meta: meta(super, 62), Application: ref(41), API: ref(32), Policy: "Unlimited", State: catalog.OnHold},
		&catalog.Subscription{Meta: meta(super, 63), Application: ref(42), API: ref(31), Policy: "Unlimited", State: catalog.Unblocked, ApplicationBlocked: true},

		&catalog.API{
			Meta: meta(org, 71), Name: "Books", Version: "1", Context: "/pizza/1.0.0", Provider: "org", Type: "HTTP", Status: catalog.APIPublished, GatewayLabels: []string{"Default"},
		},
		&catalog.Application{Meta: meta(org, 72), Name: "Shop", Owner: "cy", Policy: "Unlimited", TokenType: "JWT"},
		&catalog.KeyMapping{
			Meta: meta(org, 73), Application: ref(72), ConsumerKey: "Jx3k9aAbCq", KeyType: catalog.Production, KeyManager: "Resident Key Manager", Iss: orgISS,
		},
		&catalog.Subscription{Meta: meta(org, 74), Application: ref(72), API: ref(71), Policy: "Unlimited", State: catalog.Unblocked},
		&catalog.Scope{Meta: meta(org, 75), Name: "menu:read", DisplayName: "Another tenant's"},
	}
	id := int32(100)
	for _, t := range []revocation.Tenant{super, org, other} {
		for _, kind := range []string{catalog.PolicySubscription, catalog.PolicyApplication, catalog.PolicyAPI} {
			p := &catalog.Policy{Meta: meta(t, id), Kind: kind, Name: "Unlimited", QuotaType: "requestCount"}
			if kind == catalog.PolicyAPI {
				p.Level = "apiLevel"
			}
			all = append(all, p)
			id++
		}
	}
	return all
}

// testRevocations end after now, but for the last of each kind.
func testRevocations(now time.Time) []replica.Record {
	token := func(iss, jti string) revocation.Target {
		return revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: jti}
	}
	timed := func(kind revocation.Kind, iss, id string) revocation.Target {
		return revocation.Target{Kind: kind, Iss: iss, ID: id}
	}
	s := now.Unix()
	return []replica.Record{
		{Target: token(superISS, "3f1d2c0e-7b1a-4f53-9a50-8a2f6b1f2f10"), Tenant: super, Exp: s + 1740},
		{Target: token(idpISS, `odd "jti" /é`), Tenant: super, Exp: s - 60},
		{Target: revocation.DigestTarget(superISS, "e30.e30"), Signature: "MEUCIQDx-kZ_3n2Bq9", Tenant: super, Exp: s + 60},
		{Target: revocation.DigestTarget(idpISS, "an opaque token"), Tenant: super, Exp: s + 60},
		{Target: token(orgISS, "org-1"), Tenant: org, Exp: s + 10},
		{Target: token(otherISS, "other-1"), Tenant: other, Exp: s + 10},
		{Target: token(superISS, "over"), Tenant: super, Exp: s - 120},
		{Target: timed(revocation.KindClient, superISS, "Jx3k9aAbCq"), Tenant: super, Exp: s + 3600, NotAfter: s},
		{Target: timed(revocation.KindClient, superISS, "over"), Tenant: super, Exp: s - 120, NotAfter: s},
		{Target: timed(revocation.KindClient, orgISS, "Jx3k9aAbCq"), Tenant: org, Exp: s + 3600, NotAfter: s + 1},
		{Target: timed(revocation.KindSubject, superISS, "ann@example.com"), Tenant: super, Exp: s + 3600, NotAfter: s},
		{Target: timed(revocation.KindSession, superISS, "sid-1"), Tenant: super, Exp: s + 3600},
		{Target: timed(revocation.KindKey, superISS, "kid-1"), Tenant: super, Exp: s + 3600},
		{Target: revocation.Target{Kind: revocation.KindTenant, ID: other.Domain}, Tenant: other, Exp: s + 3600, NotAfter: s},
	}
}

// fakeState is a replica that nobody feeds.
type fakeState struct {
	replica *replica.State
	err     error // of Fresh
}

func newState(t testing.TB) *fakeState {
	t.Helper()
	s := &fakeState{replica: replica.NewState(replica.StateConfig{Records: true})}
	s.load(t, 41, testCatalog(), testRevocations(time.Now()))
	return s
}

func (s *fakeState) load(t testing.TB, seq revocation.Seq, entities []catalog.Entity, revoked []replica.Record) {
	t.Helper()
	err := s.replica.Load(revocation.Position{Epoch: epoch, Seq: seq}, func(l *replica.Loader) error {
		for _, e := range entities {
			l.Entity(e)
		}
		for _, r := range revoked {
			l.Revocation(r)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (s *fakeState) Fresh(context.Context, time.Duration) (revocation.Position, error) {
	return s.replica.At(), s.err
}

func (s *fakeState) Replica() *replica.State { return s.replica }

// fakeAccounts knows who calls by the user name alone. Password "wrong" is.
type fakeAccounts map[string]authn.Account

func (a fakeAccounts) Account(r *http.Request) (authn.Account, error) {
	user, password, _ := r.BasicAuth()
	account, ok := a[user]
	switch {
	case user == "throttled":
		return account, authn.TooMany("Too many failures.", 7*time.Second)
	case user == "unlucky":
		return account, authn.Unavailable(3*time.Second, errors.New("the database is away"))
	case !ok || password == "wrong":
		return account, &authn.OAuthError{Status: http.StatusUnauthorized, Code: authn.InvalidClient, Description: "The user name or the password is wrong."}
	}
	return account, nil
}

var accounts = fakeAccounts{
	"gateway":  {Username: "gateway", Tenant: super, Role: rest.Gateway},
	"newer":    {Username: "newer", Tenant: super, Role: rest.Gateway, RevokedJWTObject: true},
	"org":      {Username: "org", Tenant: org, Role: rest.Gateway},
	"two":      {Username: "two", Tenant: super, Role: rest.Gateway, ExtraTenants: []string{org.Domain}, RevokedJWTObject: true},
	"all":      {Username: "all", Tenant: super, Role: rest.Gateway, ExtraTenants: []string{"*"}},
	"admin":    {Username: "admin", Tenant: super, Role: rest.Admin},
	"tadmin":   {Username: "tadmin", Tenant: org, Role: rest.TenantAdmin},
	"auditor":  {Username: "auditor", Tenant: super, Role: rest.Auditor},
	"bare":     {Username: "bare", Tenant: revocation.Tenant{ID: 9, Domain: "bare.example"}, Role: rest.Gateway},
	"newbare":  {Username: "newbare", Tenant: revocation.Tenant{ID: 9, Domain: "bare.example"}, Role: rest.Gateway, RevokedJWTObject: true},
	"notifier": {Username: "notifier", Tenant: super, Role: rest.Notifier},
}

// noLedger refuses everything.
type noLedger struct{}

func (noLedger) Revoke(context.Context, ledger.Request) (ledger.Result, error) {
	return ledger.Result{}, errors.New("no revocation was expected")
}

// world is a hub on its routes.
type world struct {
	*Hub
	router chi.Router
	reg    *prometheus.Registry
}

func newWorld(t testing.TB, cfg Config, state State, l Ledger, store rest.IdempotencyStore) *world {
	t.Helper()
	w := &world{router: chi.NewRouter(), reg: prometheus.NewRegistry()}
	hub, err := New(cfg, Deps{
		State: state, Accounts: accounts, Ledger: l, Idempotency: store, Registerer: w.reg, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Hub = hub
	hub.Routes(w.router)
	return w
}

func readWorld(t testing.TB, cfg Config) *world {
	return newWorld(t, cfg, newState(t), noLedger{}, nil)
}

// send asks as user; header has pairs of names and values.
func (w *world) send(method, user, target string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "/", nil)
	path, query, _ := strings.Cut(target, "?")
	r.URL.RawPath, r.URL.RawQuery = path, query // as it came: the parser would take //x for a host
	r.URL.Path, _ = url.PathUnescape(path)
	if user != "" {
		r.SetBasicAuth(user, "right")
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	rec := httptest.NewRecorder()
	w.router.ServeHTTP(rec, r)
	return rec
}

func (w *world) get(user, target string, header ...string) *httptest.ResponseRecorder {
	return w.send(http.MethodGet, user, target, header...)
}

func (w *world) count(t testing.TB, name string, labels ...string) float64 {
	t.Helper()
	families, err := w.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	total := 0.0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var values []string
			for _, l := range m.GetLabel() {
				values = append(values, l.GetValue())
			}
			if f.GetName() == name && !slices.ContainsFunc(labels, func(l string) bool { return !slices.Contains(values, l) }) {
				total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return total
}

const base = "/internal/data/v1"

func TestGolden(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, user, path string
		header           []string
	}{
		{"subscriptions", "gateway", base + "/subscriptions", nil},
		{"applications", "gateway", base + "/applications", nil},
		{"application-key-mappings", "gateway", base + "/application-key-mappings", nil},
		{"apis", "gateway", base + "/apis", nil},
		{"application-policies", "gateway", base + "/application-policies", nil},
		{"subscription-policies", "gateway", base + "/subscription-policies", nil},
		{"api-policies", "gateway", base + "/api-policies", nil},
		{"scopes", "gateway", base + "/scopes", nil},
		{"keymanagers", "gateway", base + "/keymanagers", nil},
		{"subscriptions-all", "all", base + "/subscriptions", []string{"xWSO2Tenant", "ALL"}},
		{"subscriptions-none", "gateway", base + "/subscriptions?appId=999", nil},
		{"revokedjwt-array", "gateway", base + "/revokedjwt", nil},
		{"revokedjwt-array-none", "bare", base + "/revokedjwt", nil},
		{"revokedjwt-object", "newer", base + "/revokedjwt", nil},
		{"revokedjwt-object-two-tenants", "two", base + "/revokedjwt", nil},
		{"revokedjwt-object-none", "newbare", base + "/revokedjwt", nil},
		{"block", "gateway", base + "/block", nil},
		{"keyTemplates", "gateway", base + "/keyTemplates", nil},
		{"runtime-artifacts-envoy", "gateway", base + "/runtime-artifacts?gatewayLabel=RGVmYXVsdA==&type=Envoy", nil},
		{"runtime-artifacts-synapse", "gateway", base + "/runtime-artifacts?gatewayLabel=RGVmYXVsdA==&type=Synapse", nil},
		{"llm-providers", "gateway", base + "/llm-providers", nil},
		{"ga-config", "gateway", base + "/ga-config", nil},
		{"webhooks-subscriptions", "gateway", base + "/webhooks-subscriptions", nil},
		{"healthz", "gateway", base + "/healthz", nil},
		{"unknown", "gateway", base + "/nothing-of-ours", nil},
		{"unauthorized", "", base + "/subscriptions", nil},
		{"forbidden", "notifier", base + "/subscriptions", nil},
		{"unavailable", "unlucky", base + "/subscriptions", nil},
		{"keys-root", "gateway", "/v2/keys", nil},
		{"keys-jti", "gateway", "/v2/keys/jti/", nil},
		{"keys-consumer-keys", "gateway", "/v2/keys/consumer-keys", nil},
		{"keys-users", "gateway", "/v2/keys/users", nil},
		{"keys-users-empty", "org", "/v2/keys/users", nil},
		{"keys-one", "gateway", "/v2/keys/jti/3f1d2c0e-7b1a-4f53-9a50-8a2f6b1f2f10", nil},
		{"keys-one-odd", "gateway", "/v2/keys/jti/odd%20%22jti%22%20%2F%C3%A9", nil},
		{"keys-no-key", "gateway", "/v2/keys/jti/none", nil},
		{"keys-no-directory", "gateway", "/v2/keys/none", nil},
		{"keys-unauthorized", "", "/v2/keys/jti", nil},
		{"keys-unavailable", "unlucky", "/v2/keys/jti", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { // whose clock always begins at the same time
				w := readWorld(t, Config{})
				rec := w.get(tt.user, tt.path, tt.header...)
				var got strings.Builder
				fmt.Fprintf(&got, "%d\n", rec.Code)
				for _, name := range []string{"Allow", "Content-Type", "Retry-After", "WWW-Authenticate", etcdIndex} {
					for _, value := range rec.Header().Values(name) {
						fmt.Fprintf(&got, "%s: %s\n", name, value)
					}
				}
				fmt.Fprintf(&got, "\n%s\n", inOrder(t, rec.Body.Bytes()))
				golden := filepath.Join("testdata", tt.name+".golden")
				if *update {
					if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(string(want), got.String()); diff != "" {
					t.Errorf("answer (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// inOrder sorts the items of the innermost lists of body, each of which is put on a line
// of its own: revocations come in no order.
func inOrder(t *testing.T, body []byte) string {
	t.Helper()
	s := string(body)
	if !strings.Contains(s, "jwt_signature") && !strings.Contains(s, `"nodes":[{"key":"/jti/`) && !strings.Contains(s, `"nodes":[{"key":"/consumer-keys/`) {
		return s
	}
	var out strings.Builder
	for {
		open := strings.Index(s, "[{")
		if open < 0 {
			return out.String() + s
		}
		end := strings.Index(s[open:], "}]") + open
		items := strings.Split(s[open+2:end], "},{")
		slices.Sort(items)
		out.WriteString(s[:open] + "[\n{" + strings.Join(items, "},\n{") + "}\n]")
		s = s[end+2:]
	}
}

// Every answer of every resource is JSON in which nothing is null and every number is
// an integer.
func TestNothingIsNull(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{})
	for user := range accounts {
		if user == "notifier" {
			continue
		}
		for name := range resources {
			for _, tenant := range []string{"", "ALL", org.Domain, "none.example"} {
				rec := w.get(user, base+"/"+name, "xWSO2Tenant", tenant)
				if rec.Body.Len() == 0 {
					continue
				}
				dec := json.NewDecoder(rec.Body)
				dec.UseNumber()
				var v any
				if err := dec.Decode(&v); err != nil || dec.More() {
					t.Errorf("%s %s: %v", user, name, err)
				}
				noNull(t, name, v)
			}
		}
	}
}

func noNull(t *testing.T, at string, v any) {
	t.Helper()
	switch v := v.(type) {
	case nil:
		t.Errorf("%s is null", at)
	case json.Number:
		if _, err := v.Int64(); err != nil {
			t.Errorf("%s is %s, want an integer", at, v)
		}
	case []any:
		for _, item := range v {
			noNull(t, at+"[]", item)
		}
	case map[string]any:
		for name, item := range v {
			noNull(t, at+"."+name, item)
		}
	}
}

// ids returns those of a list's rows.
func ids(t *testing.T, rec *httptest.ResponseRecorder) []int {
	t.Helper()
	var body struct {
		Count int
		List  []map[string]any
	}
	if rec.Code != http.StatusOK {
		t.Fatalf("status %d: %s", rec.Code, rec.Body)
	}
	if err := json.Unmarshal(rec.Body.Bytes(), &body); err != nil {
		t.Fatalf("%v: %s", err, rec.Body)
	}
	if body.Count != len(body.List) {
		t.Errorf("count is %d, the list has %d", body.Count, len(body.List))
	}
	found := []int{}
	for _, row := range body.List {
		for _, name := range []string{"subscriptionId", "apiId", "id", "applicationId"} {
			if id, ok := row[name].(float64); ok {
				found = append(found, int(id))
				break
			}
		}
	}
	return found
}

func TestFilters(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{})
	app41, api31 := ref(41).UUID, ref(31).UUID
	for _, tt := range []struct {
		user, path string
		want       []int
		header     []string
	}{
		{"gateway", "/subscriptions?apiId=31&appId=41", []int{61}, nil},
		{"gateway", "/subscriptions?apiUUID=" + api31 + "&applicationUUID=" + app41, []int{61}, nil},
		{"gateway", "/subscriptions?apiId=31", []int{61, 63}, nil},
		{"gateway", "/subscriptions?appId=41", []int{61, 62}, nil},
		{"gateway", "/subscriptions?appId=41&applicationUUID=" + ref(42).UUID, nil, nil},
		{"gateway", "/subscriptions?appId=one", nil, nil},
		{"gateway", "/subscriptions?apiId=4294967327", nil, nil}, // 31 in 32 bits
		{"gateway", "/subscriptions?appId=&apiId=", []int{61, 62, 63}, nil},
		{"gateway", "/subscriptions?appId=%zz", nil, nil},
		{"gateway", "/subscriptions?appId=72", nil, nil}, // another tenant's
		{"gateway", "/subscriptions?other=1", []int{61, 62, 63}, nil},
		{"gateway", "/applications?appId=42", []int{42}, nil},
		{"gateway", "/applications?appId=x", nil, nil},
		{"gateway", "/application-key-mappings?consumerKey=Jx3k9aAbCq", []int{41, 41}, nil},
		{"gateway", "/application-key-mappings?consumerKey=Jx3k9aAbCq&keymanager=Resident%20Key+Manager", []int{41}, nil},
		{"gateway", "/application-key-mappings?consumerKey=bob%2F1%2B1%3D2&keymanager=OurIDP", []int{42}, nil},
		{"gateway", "/application-key-mappings?keymanager=OurIDP", []int{41, 42}, nil},
		{"gateway", "/apis?gatewayLabel=Default", []int{31}, nil},
		{"gateway", "/apis?gatewayLabel=EU+edge", []int{31}, nil},
		{"gateway", "/apis?gatewayLabel=none", nil, nil},
		{"gateway", "/apis?context=/pizza/1.0.0&version=1.0.0", []int{31}, nil},
		{"gateway", "/apis?gatewayLabel=Default&context=/bare/2&version=2", nil, nil},
		{"gateway", "/apis?context=/bare/2", []int{32}, nil},
		{"gateway", "/apis?apiId=32", []int{32}, nil},
		{"gateway", "/apis?apiId=" + api31, []int{31}, nil},
		{"gateway", "/apis?apiId=71", nil, nil},
		{"gateway", "/apis?apiId=33", nil, nil}, // RETIRED
		{"gateway", "/apis?context=/gone/1&version=1", nil, nil},
		{"gateway", "/subscription-policies?policyName=Gold", []int{14}, nil},
		{"gateway", "/subscription-policies?policyName=50PerMin", nil, nil},
		{"gateway", "/application-policies?policyName=50PerMin", []int{18}, nil},
		{"gateway", "/api-policies?policyName=10KPerHour", []int{19}, nil},

		{"org", "/subscriptions", []int{74}, nil},
		{"org", "/subscriptions", []int{74}, []string{"xWSO2Tenant", "ALL"}},
		{"org", "/subscriptions", nil, []string{"xWSO2Tenant", "carbon.super"}},
		{"org", "/subscriptions?organizationId=ALL", []int{74}, nil},
		{"org", "/subscriptions?organizationId=carbon.super", nil, nil},
		{"org", "/subscriptions?appId=41", nil, []string{"xWSO2Tenant", "ALL"}},
		{"org", "/apis?apiId=" + api31, nil, []string{"xWSO2Tenant", "ALL"}},
		{"gateway", "/subscriptions", []int{61, 62, 63}, []string{"xWSO2Tenant", "carbon.super"}},
		{"gateway", "/subscriptions", nil, []string{"xWSO2Tenant", "org.example"}},
		{"gateway", "/subscriptions", nil, []string{"xWSO2Tenant", "\"; DROP"}},
		{"all", "/subscriptions?organizationId=*", nil, nil},
		{"all", "/subscriptions?organizationId=carbon.super%22+%22org.example", nil, nil},
		{"all", "/subscriptions?organizationId=carbon.super,org.example", nil, nil},
		{"all", "/subscriptions", []int{61, 62, 63, 74}, []string{"xWSO2Tenant", "ALL"}},
		{"all", "/apis?organizationId=all", []int{31, 32, 71}, nil},
		{"two", "/subscriptions", []int{61, 62, 63}, nil},
		{"two", "/subscriptions", []int{74}, []string{"xWSO2Tenant", "org.example"}},
		{"two", "/subscriptions", []int{61, 62, 63, 74}, []string{"x-wso2-tenant", "all"}},
		{"two", "/subscriptions?organizationId=org.example", []int{74}, nil},
		{"two", "/subscriptions?organizationId=ALL", []int{74}, []string{"xWSO2Tenant", "Org.Example"}},
		{"two", "/apis?context=/pizza/1.0.0&version=1", []int{71}, []string{"xWSO2Tenant", "ALL"}},
		{"admin", "/applications", []int{41, 42}, nil},
		{"admin", "/applications", []int{41, 42, 72}, []string{"xWSO2Tenant", "ALL"}},
		{"tadmin", "/applications", []int{72}, []string{"xWSO2Tenant", "ALL"}},
		{"auditor", "/applications?organizationId=org.example", nil, nil},
	} {
		got := ids(t, w.get(tt.user, base+tt.path, tt.header...))
		if diff := cmp.Diff(append([]int{}, tt.want...), got); diff != "" {
			t.Errorf("%s %s %q (-want +got):\n%s", tt.user, tt.path, tt.header, diff)
		}
	}
	if got := w.count(t, "rescind_eventhub_foreign_tenant_total"); got != 8 {
		t.Errorf("counted %v requests for a tenant that the account does not see, want 8", got)
	}
	var found struct {
		List []struct{ Name, DisplayName string }
	}
	if err := json.Unmarshal(w.get("all", base+"/scopes?scopeKey=menu:read", "xWSO2Tenant", "ALL").Body.Bytes(), &found); err != nil || len(found.List) != 2 {
		t.Errorf("scopes of two tenants: %+v, %v", found, err)
	}
}

// What belongs to one tenant is in no answer that another tenant's gateway gets.
func TestTenantsAreApart(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{})
	secrets := []string{"Pizza", "Mobile", "OurIDP", "Gold", "50PerMin", "10KPerHour", "3f1d2c0e", "odd", "MEUCIQDx", "other-1", "carbon.super", "ann@example.com", "other.example"}
	paths := []string{"/v2/keys/jti", "/v2/keys/consumer-keys", "/v2/keys/users"}
	for name := range resources {
		paths = append(paths, base+"/"+name)
	}
	for _, path := range paths {
		for _, header := range [][]string{nil, {"xWSO2Tenant", "ALL"}, {"xWSO2Tenant", "carbon.super"}, {"x-wso2-tenant", "*"}} {
			body := w.get("org", path, header...).Body.String()
			for _, secret := range secrets {
				if strings.Contains(body, secret) {
					t.Errorf("%s %q tells %s", path, header, secret)
				}
			}
		}
	}
	if body := w.get("org", base+"/revokedjwt").Body.String(); !strings.Contains(body, "org-1") {
		t.Errorf("its own revocation is missing: %s", body)
	}
	if body := w.get("all", base+"/revokedjwt").Body.String(); !strings.Contains(body, "org-1") || !strings.Contains(body, "other-1") {
		t.Errorf("a gateway that sees all tenants lacks revocations: %s", body)
	}
}

// Whatever tenant a request for revocations names, it is never told of none because of
// that: of one that the account sees, or of all that it does.
func TestRevocationsOfATenant(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{})
	for _, tt := range []struct {
		user, tenant string
		want         []string
	}{
		{"gateway", "carbon.super", []string{"3f1d2c0e"}},
		{"gateway", "org.example", []string{"3f1d2c0e"}},
		{"gateway", "none.example", []string{"3f1d2c0e"}},
		{"org", "carbon.super", []string{"org-1"}},
		{"two", "Org.Example", []string{"org-1"}},
		{"two", "other.example", []string{"3f1d2c0e", "org-1"}},
		{"all", "org.example", []string{"org-1"}},
		{"all", "none.example", []string{"3f1d2c0e", "org-1", "other-1"}},
		{"all", "*", []string{"3f1d2c0e", "org-1", "other-1"}},
		{"admin", "\"", []string{"3f1d2c0e", "org-1", "other-1"}},
		{"all", "all", []string{"3f1d2c0e", "org-1", "other-1"}},
	} {
		for _, path := range []string{base + "/revokedjwt", "/v2/keys/jti"} {
			body := w.get(tt.user, path, "xWSO2Tenant", tt.tenant).Body.String()
			for _, jti := range []string{"3f1d2c0e", "org-1", "other-1"} {
				if got, want := strings.Contains(body, jti), slices.Contains(tt.want, jti); got != want {
					t.Errorf("%s of %q as %s has %s: %t, want %t", path, tt.tenant, tt.user, jti, got, want)
				}
			}
		}
	}
}

// A body that does not come holds nothing.
func TestBodyOfAGET(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{MaxInFlight: 1})
	server := httptest.NewServer(w.router)
	t.Cleanup(server.Close)
	for _, field := range []string{"Content-Length: 1000000", "Transfer-Encoding: chunked"} {
		for _, path := range []string{base + "/subscriptions", base + "/revokedjwt", "/v2/keys/jti"} {
			conn, err := net.Dial("tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: hub\r\nAuthorization: Basic Z2F0ZXdheTpyaWdodA==\r\n%s\r\n\r\n", path, field)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatalf("%s with %s: %v", path, field, err)
			}
			if resp.StatusCode != http.StatusBadRequest || !resp.Close {
				t.Errorf("%s with %s: %d, %q", path, field, resp.StatusCode, resp.Header)
			}
		}
	}
	if got := w.count(t, "rescind_eventhub_requests_in_flight"); got != 0 {
		t.Errorf("%v are in flight", got)
	}
}

func TestSlashes(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{})
	server := httptest.NewServer(w.router)
	t.Cleanup(server.Close)
	for path, want := range map[string]string{
		"/internal/data/v1/subscriptions":       `{"count":3`,
		"/internal/data/v1//subscriptions":      `{"count":3`,
		"//internal/data/v1/subscriptions":      `{"count":3`,
		"///internal//data///v1//subscriptions": `{"count":3`,
		"/internal/data/v1/subscriptions/":      `{"count":3`,
		"/internal//data/v1/subscriptions?":     `{"count":3`,
		"//v2/keys/jti":                         `{"action":"get"`,
		"/v2//keys//jti//":                      `{"action":"get"`,
		"/v2/keys/":                             `{"action":"get"`,
		"/v2/keys":                              `{"action":"get"`,
	} {
		// A client of net/http would take two slashes for a host.
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: hub\r\nAuthorization: Basic Z2F0ZXdheTpyaWdodA==\r\n\r\n", path)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		if resp.StatusCode != http.StatusOK || !strings.HasPrefix(string(body), want) || err != nil {
			t.Errorf("%s: %d %s, %v", path, resp.StatusCode, body, err)
		}
	}
	for _, path := range []string{"//revoke", "/internal", "/internal/data", "/internal/data/v10/subscriptions", "/v2/keysx", "/v2/other"} {
		if rec := w.get("gateway", path); rec.Code != http.StatusNotFound {
			t.Errorf("%s: status %d, want 404", path, rec.Code)
		}
	}
}

func TestMethods(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{})
	for _, tt := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"POST", "/internal/data/v1/subscriptions", 405, "GET"},
		{"PUT", "/internal/data/v1/revokedjwt", 405, "GET"},
		{"HEAD", "/internal/data/v1/subscriptions", 200, ""},
		{"HEAD", "/internal/data/v1/revokedjwt", 200, ""},
		{"HEAD", "/v2/keys/jti", 200, ""},
		{"PUT", "/v2/keys/jti/x", 405, "GET, HEAD"},
		{"DELETE", "/v2/keys/jti", 405, "GET, HEAD"},
		{"PATCH", "/internal/data/v1/apis/deployed-revisions", 200, ""},
		{"GET", "/internal/data/v1/apis/deployed-revisions", 405, "PATCH"},
		{"POST", "/internal/data/v1/apis/undeployed-revision", 200, ""},
		{"POST", "/internal/data/v1/retrieve-api-artifacts", 204, ""},
		{"GET", "/internal/data/v1/runtime-artifacts?type=Envoy", 204, ""},
		{"GET", "/internal/data/v1/notify-gateway", 404, ""},
	} {
		rec := w.send(tt.method, "gateway", tt.path)
		if rec.Code != tt.status || rec.Header().Get("Allow") != tt.allow {
			t.Errorf("%s %s: %d, Allow %q; want %d, %q", tt.method, tt.path, rec.Code, rec.Header().Get("Allow"), tt.status, tt.allow)
		}
		if tt.status >= 400 && rec.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s %s: %q", tt.method, tt.path, rec.Header())
		}
	}
	if rec := w.send("GET", "notifier", "/internal/data/v1/notify"); rec.Code != 405 || rec.Header().Get("Allow") != "POST" {
		t.Errorf("GET notify: %d, %q", rec.Code, rec.Header())
	}
	if rec := w.send("POST", "gateway", "/internal/data/v1/notify"); rec.Code != http.StatusForbidden {
		t.Errorf("a gateway may notify: %d", rec.Code)
	}
}

// While the newest state cannot be had, whatever depends on it is 503 and never a 4xx,
// and so is what is asked for by a gateway that is throttled.
func TestUnavailable(t *testing.T) {
	t.Parallel()
	state := newState(t)
	state.err = fmt.Errorf("read head: %w", follow.ErrStale)
	w := newWorld(t, Config{}, state, noLedger{}, nil)
	static := []string{
		"block", "keyTemplates", "runtime-artifacts", "retrieve-api-artifacts", "apis/deployed-revisions", "apis/undeployed-revision",
		"llm-providers", "ga-config", "healthz", "global-policies", "runtime-metadata", "gateway-policy-artifacts", "synapse-attributes",
		"webhooks-subscriptions", "api-logging-configs", "endpoint-certificates", "correlation-configs", "llm-provider-configs", "api-keys",
	}
	paths := []string{"/v2/keys", "/v2/keys/jti", "/v2/keys/jti/x"}
	for name := range resources {
		if !slices.Contains(static, name) {
			paths = append(paths, base+"/"+name)
		}
	}
	for _, path := range paths {
		for user, wait := range map[string]string{"gateway": "5", "unlucky": "3", "throttled": "7"} {
			rec := w.get(user, path)
			if rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Retry-After") != wait {
				t.Errorf("%s as %s: %d, Retry-After %q", path, user, rec.Code, rec.Header().Get("Retry-After"))
			}
		}
	}
	state.err = nil
	for _, path := range paths[3:] {
		if rec := w.get("gateway", path); rec.Code != http.StatusOK {
			t.Errorf("%s after it has healed: %d", path, rec.Code)
		}
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	_, err := New(Config{MaxInFlight: -1, MaxReaders: -1, MaxEncodings: 1001, Wait: time.Hour, SendBytes: 1, CacheBytes: 1, Timeout: time.Minute, ClockSkew: time.Hour}, Deps{})
	if err == nil {
		t.Fatal("nothing is wrong with it")
	}
	for _, name := range []string{"MaxInFlight", "MaxReaders", "MaxEncodings", "Wait", "SendBytes", "CacheBytes", "Timeout", "ClockSkew"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%q does not say what is wrong with %s", err, name)
		}
	}
}
