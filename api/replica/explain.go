package replica

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// Check is one of the checks of a request, in an explanation. Which there are, and what their facts
// are, is in api/explain.md.
type Check struct {
	// Name is one of [CheckNames], or of those that package gateway adds.
	Name string `json:"name"`
	// Result is what came of it.
	Result CheckResult `json:"result"`
	// Detail is a sentence for people: what was looked at, and what was found. It may have identifiers
	// of the token; no token, no secret. Empty if the check was not reached.
	Detail string `json:"detail"`
	// Facts are the same for programs; times are Unix seconds. Those of a check that failed have
	// "reason", which is [Authorization.Reason]. Nil if there are none.
	Facts map[string]any `json:"facts,omitempty"`
}

// CheckResult is what came of a [Check].
type CheckResult string

const (
	Passed     CheckResult = "passed"
	Failed     CheckResult = "failed"
	NotReached CheckResult = "not_reached" // an earlier one failed
	NotLooked  CheckResult = "not_looked"  // cannot be looked at here, or the question does not say enough
)

// Explanation says why a request is let through or refused: what [Replica.Authorize] says, and the
// checks that it made, in order. One of them failed if the request is refused, else none did.
type Explanation struct {
	Authorization Authorization
	// HTTPStatus is what a gateway answers with, 200 if it answers nothing.
	HTTPStatus int
	Checks     []Check
	// Next is what to do about a refusal, a sentence for people; empty if there is none.
	Next string
}

// Explainer is what an explanation goes by besides a state. The zero value is a gateway of all tenants.
type Explainer struct {
	Claims       ClaimsMode
	Tenant       string   // as in [Config]
	Environments []string // as in [Config]
	// AnyOperation: Request has no Method, its Path is the context of an API, and what is asked of an
	// operation is not looked at.
	AnyOperation bool
}

// Explain says what a gateway whose state this is makes of a request with a verified token, or with none,
// at now (Unix seconds), however old the state is. A state that nothing was loaded into refuses.
//
// What it names besides what the request is about (an API that is nearest to one that is not there, other
// subscriptions, other issuers) is of the tenant of the token's issuer alone.
func (e Explainer) Explain(s *State, t *token.Token, req Request, now int64) Explanation {
	by := authorizer{mode: e.Claims, only: e.Tenant, environments: e.Environments, anyOperation: e.AnyOperation}
	n := narrator{by: &by, state: s, token: t, req: req, now: now}
	tenants, _ := s.Scope()
	by.check = func(t Token) Decision {
		kind, revoked := s.Check(t, now)
		switch {
		case revoked:
			return Decision{Outcome: Revoked, Kind: kind}
		case s.At() == revocation.Position{}, t.Tenant != "" && len(tenants) > 0 && !slices.Contains(tenants, t.Tenant):
			return Decision{Outcome: Refused}
		}
		return Decision{Outcome: Valid}
	}
	return n.explain()
}

// Explain is [Replica.Authorize] with its reasons. A request without a Method asks about an API as a whole, as
// [Explainer].AnyOperation does. It takes longer than a request should wait: it is for operators.
func (r *Replica) Explain(t *token.Token, req Request) Explanation {
	staleness := r.StalenessOf(req.Path).withDefault()
	by := r.authorizer(staleness)
	by.anyOperation = req.Method == ""
	n := narrator{by: &by, state: r.state, token: t, req: req, now: time.Now().Unix(), staleness: &staleness, empty: r.cfg.Empty}
	return n.explain()
}

// CheckNames are the names of the checks that [Replica.Explain] makes, in their order.
var CheckNames = func() (names []string) {
	for _, c := range checks {
		names = append(names, c.name)
	}
	return names
}()

// checks are in the order in which authorize makes them. Each is refused for these reasons; said tells
// what was looked at, and found; it does not decide what failed.
var checks = []struct {
	name    string
	reasons []string
	said    func(*narrator) finding
}{
	{"path", []string{reasonPath}, (*narrator).pathOf},
	{"catalog", []string{reasonNoCatalog}, (*narrator).catalog},
	{"api", []string{reasonNoAPI}, (*narrator).api},
	{"api_state", []string{reasonAPIBlocked}, (*narrator).apiState},
	{"operation", []string{reasonNoOperation}, (*narrator).operation},
	{"credentials", []string{reasonNoCredentials}, (*narrator).credentials},
	{"issuer", []string{reasonIssuer}, (*narrator).issuer},
	{"revocation", []string{reasonRevoked}, (*narrator).revocation},
	{"freshness", []string{reasonStale}, (*narrator).freshness},
	{"claims", []string{reasonClaims}, (*narrator).claims},
	{"token_type", []string{reasonTokenType}, (*narrator).tokenType},
	{"api_tenant", []string{reasonNoSubscription}, (*narrator).apiTenant},
	{"token_subscriptions", []string{reasonClaims}, (*narrator).tokenSubscriptions},
	{"key_mapping", []string{reasonNoKeyMapping}, (*narrator).keyMapping},
	{"application", []string{reasonNoApplication}, (*narrator).application},
	{"subscription", []string{reasonNoSubscription}, (*narrator).subscription},
	{"policy", []string{reasonNoPolicy, reasonClaims}, (*narrator).policy},
	{"subscription_state", []string{reasonBlocked, reasonNotActive}, (*narrator).subscriptionState},
	{"scope", []string{reasonScope}, (*narrator).scope},
}

// finding is what a check looked at. Unlooked: it was not, and detail says why.
type finding struct {
	unlooked bool
	detail   string
	facts    map[string]any
}

type facts = map[string]any

func found(f facts, format string, args ...any) finding {
	return finding{detail: fmt.Sprintf(format, args...), facts: f}
}

func notLooked(why string) finding { return finding{unlooked: true, detail: why} }

// narrator tells what an authorizer has found.
type narrator struct {
	by        *authorizer
	state     *State
	token     *token.Token
	req       Request
	now       int64
	staleness *Staleness // nil: the age of the state is not looked at
	empty     OnStale

	a     Authorization
	v     *View
	looks *looked
	path  string // of req, without a query or a fragment, which may have a token
	cut   bool   // it had one
}

func (n *narrator) explain() Explanation {
	e := Explanation{Checks: make([]Check, len(checks))}
	n.looks = &n.by.looked
	n.path = withoutQuery(n.req.Path)
	n.cut = n.path != n.req.Path
	n.state.View(func(v *View) {
		n.v = v
		n.by.authorize(&n.a, v, n.token, n.req)
		failed := len(checks)
		if !n.a.Authorized {
			failed = n.failed()
		}
		for i, c := range checks {
			e.Checks[i] = Check{Name: c.name, Result: NotReached}
			if i > failed {
				continue
			}
			f := c.said(n)
			result := Passed
			switch {
			case i == failed:
				result = Failed
				if f.facts == nil {
					f.facts = make(facts)
				}
				f.facts["reason"] = n.a.Reason
			case f.unlooked:
				result = NotLooked
			}
			e.Checks[i] = Check{Name: c.name, Result: result, Detail: f.detail, Facts: f.facts}
		}
	})
	e.Authorization, e.HTTPStatus, e.Next = n.a, n.a.Code.HTTPStatus(), Next(n.a.Reason)
	switch n.a.Reason {
	case reasonNoAPI:
		n.nearestAPIs(&e)
	case reasonNoOperation:
		n.nearestOperations(&e)
	}
	return e
}

// withoutQuery is a path up to where a query or a fragment begins that does not belong there.
func withoutQuery(path string) string {
	if i := strings.IndexAny(path, "?#"); i >= 0 {
		return path[:i]
	}
	return path
}

// failed is the index of the check that the request was refused for.
func (n *narrator) failed() int {
	name := ""
	switch n.a.Reason {
	case reasonClaims: // by the first one that is wrong
		switch {
		case n.looks.claims != nil:
			name = "claims"
		case n.looks.carriedErr != nil:
			name = "token_subscriptions"
		default:
			name = "policy"
		}
	case reasonNoSubscription:
		name = "api_tenant"
		if n.looks.subscribed {
			name = "subscription"
		}
	}
	for i, c := range checks {
		if slices.Contains(c.reasons, n.a.Reason) && (name == "" || c.name == name) {
			return i
		}
	}
	panic("replica: no check for the reason " + n.a.Reason) // a test goes through all of them
}

// next are by reason.
var next = map[string]string{
	reasonPath: "Call the API with a path that can be read in one way only: no empty segment, no . and .., nothing encoded that need not be; " +
		"see CleanPath in the documentation of package replica.",
	reasonNoCatalog: "Give the gateway the catalog (not revocations only), or set its claims mode to claims-only if all its tokens carry their subscriptions.",
	reasonNoAPI: "Compare the path with the contexts of the tenant's APIs: correct the caller's URL, or publish or deploy the API; " +
		"if it was published a moment ago, see whether the gateway has come to that position.",
	reasonAPIBlocked:     "Unblock the API in the publisher (lifecycle state BLOCKED), or tell the caller that it is closed.",
	reasonNoOperation:    "Correct the caller's method or path, or add the operation to the API and deploy it; a slash at the end makes another path.",
	reasonNoCredentials:  "Send the header field Authorization: Bearer with an access token.",
	reasonIssuer:         "Register the token's issuer as a key manager of the tenant, or enable it; or take a token of one that is.",
	reasonClaims:         "Correct what the issuer puts into its tokens: the check names the claim, and the type that it must have is in the WSO2 contract.",
	reasonRevoked:        "Get a new token. If the revocation was a mistake, it cannot be taken back: it ends when the check says.",
	reasonStale:          "Look at the gateway's /status: its feeds, its source and its log tell why what it knows is old or missing; a restart does not help.",
	reasonTokenType:      "Take a token of the kind that the operation is for: of a user, or of the application itself (client credentials).",
	reasonNoKeyMapping:   "Generate or map keys for the application with this consumer key at the token's issuer, or take a token of a key that is mapped.",
	reasonNoApplication:  "The application was deleted, or the gateway does not have it yet: subscribe with one that exists, and take a token of its keys.",
	reasonNoSubscription: "Subscribe the application to this API and version, in the tenant that the API belongs to.",
	reasonNoPolicy:       "Create the policy in the tenant, or choose another one for the application, the subscription or the API that names it.",
	reasonBlocked:        "Unblock the subscription, or the application that is blocked as a whole, in the publisher.",
	reasonNotActive:      "Have the subscription approved: it is on hold or rejected. If it was rejected, subscribe anew.",
	reasonScope:          "Get a token with one of the scopes that the operation needs; the user must have a role that the scope is for.",
}

// Next says what to do about a refusal for a reason, one of [Reasons]: a sentence for people, empty for others.
func Next(reason string) string { return next[reason] }

// mine reports whether an entity of a tenant may be told of to who holds the token.
func (n *narrator) mine(domain string) bool {
	tenant := n.tenant()
	return tenant != "" && domain == tenant
}

// tenant is that of the token's issuer; without a token it is the only one that is served.
func (n *narrator) tenant() string {
	if n.token == nil {
		return n.by.only
	}
	return n.looks.bearer.tenant
}

// why says why a check that is about the catalog, or about a token, was not looked at; empty if it was.
func (n *narrator) why(ofToken bool) string {
	switch {
	case n.by.mode == ClaimsOnly && !ofToken:
		return "The gateway goes by the claims of tokens alone (claims-only), so the catalog is not looked at."
	case n.looks.source == inNothing && !ofToken:
		return "Nothing at all is known yet, so there is no catalog to look at."
	case ofToken && n.a.Authorized && n.a.Operation != nil && n.a.Operation.AuthType == "None":
		return "The operation takes no authentication, so no token is looked at."
	case ofToken && n.token == nil && n.looks.source == inNothing:
		return "There is no token, and nothing at all is known yet."
	}
	return ""
}

// ofBoth is why for what takes a token and the catalog.
func (n *narrator) ofBoth() string { return cmp.Or(n.why(true), n.why(false)) }

func (n *narrator) pathOf() finding {
	f := facts{"path": n.path}
	if n.req.Method != "" {
		f["method"] = n.req.Method
	}
	switch {
	case n.a.Reason == reasonPath && n.cut:
		return found(f, "The path %q is followed by a query or a fragment, which is no part of a path.", n.path)
	case n.a.Reason == reasonPath:
		return found(f, "The path %q can be read in more than one way, or is no path.", n.path)
	}
	return found(f, "The path %q means the same to everyone who reads it.", n.path)
}

func (n *narrator) catalog() finding {
	if n.a.Reason == reasonNoCatalog {
		return found(facts{"claims": n.by.mode.String()}, "The gateway has revocations only, and no catalog; its claims mode is %s, which needs one.", n.by.mode)
	}
	if why := n.why(false); why != "" {
		return notLooked(why)
	}
	at := n.v.At()
	return found(facts{"epoch": string(at.Epoch), "seq": int64(at.Seq)}, "There is a catalog, as of seq %d of epoch %s.", at.Seq, at.Epoch)
}

// apiFact is an API, or the version of one, in a fact.
type apiFact struct {
	Context string `json:"context"`
	Version string `json:"version"`
	Name    string `json:"name,omitempty"`
	Note    string `json:"note,omitempty"`
}

func factOf(a *catalog.API) apiFact {
	return apiFact{Context: a.Context, Version: a.Version, Name: a.Name}
}

func (f apiFact) String() string {
	s := f.Context + " (" + f.Name + " " + f.Version + ")"
	if f.Note != "" {
		s += ", " + f.Note
	}
	return s
}

func join(list []apiFact) string {
	texts := make([]string, len(list))
	for i, f := range list {
		texts[i] = f.String()
	}
	return strings.Join(texts, "; ")
}

func (n *narrator) api() finding {
	if why := n.why(false); why != "" {
		return notLooked(why)
	}
	a := n.a.API
	switch {
	case a == nil:
		return found(facts{"path": n.path}, "No API is at the beginning of the path %q.", n.path)
	case !n.mine(a.Tenant.Domain):
		return found(facts{"context": a.Context}, "The path is for the API at %s.", a.Context)
	}
	return found(facts{"context": a.Context, "version": a.Version, "name": a.Name, "uuid": a.UUID},
		"The path is for the API %s %s at %s.", a.Name, a.Version, a.Context)
}

func (n *narrator) apiState() finding {
	if why := n.why(false); why != "" {
		return notLooked(why)
	}
	if !n.mine(n.a.API.Tenant.Domain) && n.a.Reason != reasonAPIBlocked {
		return found(nil, "The API is open.")
	}
	return found(facts{"status": n.a.API.Status}, "The API's lifecycle state is %s.", n.a.API.Status)
}

func (n *narrator) operation() finding {
	switch why := n.why(false); {
	case why != "":
		return notLooked(why)
	case n.by.anyOperation:
		return notLooked("The question is about the API as a whole, so no operation is looked for.")
	case n.a.Reason == reasonNoOperation:
		return n.noOperation()
	case n.a.Operation == nil:
		return found(nil, "The API has no operations, so every method and path below its context is one.")
	}
	op := n.a.Operation
	if !n.mine(n.a.API.Tenant.Domain) {
		return found(nil, "The API has an operation for this method and path.")
	}
	return found(facts{"verb": op.Verb, "target": op.Target, "authentication": cmp.Or(op.AuthType, "Any")},
		"The operation is %s %s, with authentication %s.", op.Verb, op.Target, cmp.Or(op.AuthType, "Any"))
}

// maxOperations, maxSubscriptions and maxNearest are how many an explanation names.
const (
	maxOperations    = 10
	maxSubscriptions = 10
	maxNearest       = 5
)

func (n *narrator) noOperation() finding {
	path := cmp.Or(withoutQuery(n.looks.rest), "/")
	return found(facts{"method": n.req.Method, "path": path}, "The API has no operation %s %s.", n.req.Method, path)
}

func (n *narrator) credentials() finding {
	if why := n.why(true); why != "" && n.a.Reason != reasonNoCredentials {
		return notLooked(why)
	}
	if n.token == nil {
		return found(nil, "There is no token, and one is needed here.")
	}
	f := facts{"iss": n.token.Issuer, "jti": n.token.ID, "sub": n.token.Subject, "client_id": n.token.ClientID}
	return found(f, "There is a token: iss %q, jti %q, sub %q, client %q.", n.token.Issuer, n.token.ID, n.token.Subject, n.token.ClientID)
}

func (n *narrator) issuer() finding {
	if why := n.why(true); why != "" {
		return notLooked(why)
	}
	b := n.looks.bearer
	f := facts{"iss": b.token.Issuer, "known": b.manager != nil}
	if b.tenant != "" {
		f["tenant"] = b.tenant
	}
	if b.manager != nil {
		f["enabled"], f["key_manager"] = b.manager.Enabled, b.manager.Name
	}
	switch {
	case n.a.Reason == reasonIssuer && b.manager != nil && !b.manager.Enabled:
		return found(f, "The issuer %q is the key manager %q, which is disabled.", b.token.Issuer, b.manager.Name)
	case n.a.Reason == reasonIssuer && b.manager == nil && n.looks.source == inCatalog:
		return found(f, "No key manager in the catalog has the issuer %q.", b.token.Issuer)
	case n.a.Reason == reasonIssuer:
		f["served"] = n.by.only
		return found(f, "The gateway serves the tenant %s only, and the issuer %q is not of it.", n.by.only, b.token.Issuer)
	case b.manager == nil:
		return found(f, "The catalog does not have the issuer %q, and need not; its tenant is %q as far as is known.", b.token.Issuer, b.tenant)
	}
	return found(f, "The issuer %q is the key manager %q of %s, which is enabled.", b.token.Issuer, b.manager.Name, b.tenant)
}

// identifiers is what of a token a revocation of a kind is compared with, and what it is called.
func (t Token) identifier(kind revocation.Kind) (claim string, target revocation.Target) {
	target = revocation.Target{Kind: kind, Iss: t.Iss}
	switch kind {
	case revocation.KindKey:
		claim, target.ID = "kid", t.KID
	case revocation.KindToken:
		claim, target.ID = "jti", t.JTI
		if t.JTI == "" {
			claim, target.ID, target.Digest = "digest", t.Digest, true
		}
	case revocation.KindSession:
		claim, target.ID = "sid", t.SID
	case revocation.KindClient:
		claim, target.ID = "client_id", t.ClientID
	case revocation.KindSubject:
		claim, target.ID = "sub", t.Sub
	case revocation.KindTenant:
		claim, target.Iss, target.ID = "tenant", "", t.Tenant
	}
	return claim, target
}

// entry finds what is kept of a revocation; ok is false if nothing is.
func (v *View) entry(t revocation.Target) (exp, notAfter int64, ok bool) {
	if len(t.ID) > maxID {
		return 0, 0, false
	}
	class, k := keyOf(t)
	s := &v.content.marks.tenants
	if class != tenants {
		is := v.content.marks.issuers.Load().find(t.Iss)
		if is == nil {
			return 0, 0, false
		}
		s = &is.sets[class]
	}
	e := s.find(k)
	if !e.ok() {
		return 0, 0, false
	}
	return e.exp(), e.notAfter(s), true
}

// stamp is a time for people.
func stamp(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }

func (n *narrator) revocation() finding {
	if why := n.why(true); why != "" {
		return notLooked(why)
	}
	if n.a.Reason != reasonRevoked {
		return found(nil, "Nothing that is known revokes the token: neither its key, the token itself, its session, its client, its subject nor its tenant.")
	}
	t := n.looks.token
	claim, target := t.identifier(n.a.Kind)
	f := facts{"kind": string(n.a.Kind), "claim": claim, "identifier": target.ID}
	detail := fmt.Sprintf("The token's %s %q was revoked: kind %s", claim, target.ID, n.a.Kind)
	if exp, notAfter, ok := n.v.entry(target); ok {
		f["exp"] = exp
		if n.a.Kind.HasTime() {
			f["not_after"], f["iat"] = notAfter, t.IssuedAt
			detail += fmt.Sprintf(", tokens issued up to %s, and this one was issued at %s", stamp(notAfter), stamp(t.IssuedAt))
		}
		detail += fmt.Sprintf("; the entry is kept until %s", stamp(exp))
	}
	return finding{detail: detail + ".", facts: f}
}

func (n *narrator) freshness() finding {
	if why := n.why(true); why != "" && n.a.Reason != reasonStale {
		return notLooked(why)
	}
	f := facts{}
	known := n.v.At() != revocation.Position{}
	if tenant := n.looks.token.Tenant; known && tenant != "" && n.v.content.part != nil && !n.v.content.part.about(tenant) {
		f["tenant"] = tenant
		return found(f, "The state is not about the tenant %s of the token's issuer, so nobody here can say whether the token is revoked.", tenant)
	}
	if n.staleness == nil {
		if !known {
			return found(nil, "Nothing at all is known yet: no snapshot was loaded.")
		}
		return notLooked("How old the gateway's state is can be looked at on the gateway only.")
	}
	f["max_seconds"], f["then"] = int64(n.staleness.Max/time.Second), n.staleness.Then.String()
	age := n.a.Age
	switch {
	case !known:
		delete(f, "max_seconds")
		f["then"] = n.empty.String()
		return found(f, "Nothing at all is known yet: no snapshot was loaded, neither from the source nor from the folder. The gateway is set to %s then.", n.empty)
	case age == Never:
		return found(f, "Nobody knows how old what is known is; past %s the gateway is set to %s.", n.staleness.Max, n.staleness.Then)
	}
	f["age_seconds"] = int64(age / time.Second)
	text := fmt.Sprintf("What is known is %s old, and on this path up to %s is fresh enough", age.Round(time.Millisecond), n.staleness.Max)
	if age > n.staleness.Max {
		text += fmt.Sprintf("; past that the gateway is set to %s", n.staleness.Then)
	}
	return finding{detail: text + ".", facts: f}
}

func (n *narrator) claims() finding {
	switch why := n.why(true); {
	case why != "":
		return notLooked(why)
	case n.looks.claims != nil:
		return found(facts{"error": n.looks.claims.Error()}, "A claim cannot be read: %v.", n.looks.claims)
	}
	i := &n.a.Info
	return found(facts{"consumer_key": i.ConsumerKey, "scopes": append([]string{}, i.Scopes...), "user_type": i.UserType},
		"The consumer key is %q, the scopes are %q, and the token is of type %s.", i.ConsumerKey, i.Scopes, i.UserType)
}

func (n *narrator) tokenType() finding {
	switch why := n.ofBoth(); {
	case why != "":
		return notLooked(why)
	case n.by.anyOperation:
		return notLooked("The question is about the API as a whole, and operations differ.")
	case n.a.Operation == nil:
		return found(nil, "The API has no operations, so tokens of any type will do.")
	}
	if !n.mine(n.a.API.Tenant.Domain) {
		return found(facts{"user_type": n.a.Info.UserType}, "The token is of type %s.", n.a.Info.UserType)
	}
	needed := cmp.Or(n.a.Operation.AuthType, "Any")
	return found(facts{"user_type": n.a.Info.UserType, "authentication": needed},
		"The operation's authentication is %s, and the token is of type %s.", needed, n.a.Info.UserType)
}

func (n *narrator) apiTenant() finding {
	if why := n.ofBoth(); why != "" {
		return notLooked(why)
	}
	f := facts{"token_tenant": n.looks.bearer.tenant}
	if n.mine(n.a.API.Tenant.Domain) {
		return found(f, "API and issuer are both of the tenant %s.", n.looks.bearer.tenant)
	}
	f["other_tenant"], f["context"] = true, n.a.API.Context
	return found(f, "The API at %s is another tenant's, and the token's issuer is of %s: tokens are good for APIs of their own tenant only.",
		n.a.API.Context, n.looks.bearer.tenant)
}

func (n *narrator) tokenSubscriptions() finding {
	switch why := n.why(true); {
	case why != "":
		return notLooked(why)
	case n.looks.source == inNothing:
		return notLooked(n.why(false))
	case n.looks.carriedErr != nil:
		return found(facts{"error": n.looks.carriedErr.Error()}, "What the token says of its subscriptions cannot be read: %v.", n.looks.carriedErr)
	case n.looks.carried != nil:
		return found(facts{"subscribed_apis": len(n.looks.carried.apis)},
			"The token carries its subscriptions itself, %d of them, and they count.", len(n.looks.carried.apis))
	case n.looks.mapping != nil && n.by.mode == CatalogFirst:
		return notLooked("The catalog has the token's key, and counts before what the token carries (catalog-first).")
	case n.by.mode == ClaimsOnly:
		return found(nil, "The token carries no subscriptions, and nothing else counts here.")
	}
	return found(nil, "The token carries no subscriptions, so the catalog counts.")
}

// carries is why for what tokens that carry their subscriptions are not asked for.
func (n *narrator) carries() string {
	if n.looks.source == inNothing {
		return cmp.Or(n.why(true), n.why(false))
	}
	if why := n.ofBoth(); why != "" {
		return why
	}
	if n.looks.source == inClaims {
		return "The token carries its subscriptions itself, so the catalog is not asked."
	}
	return ""
}

func (n *narrator) keyMapping() finding {
	if why := n.carries(); why != "" {
		return notLooked(why)
	}
	b := n.looks.bearer
	f := facts{"consumer_key": b.key, "iss": b.token.Issuer}
	if m := n.looks.mapping; m != nil {
		f["key_type"], f["application_uuid"] = m.KeyType, m.Application.UUID
		return found(f, "The consumer key %q of the issuer %q is the %s key of an application.", b.key, b.token.Issuer, m.KeyType)
	}
	var others []string
	for _, k := range n.v.KeyMappingsOf(b.key) {
		if n.mine(k.Tenant.Domain) {
			others = append(others, k.Iss)
		}
	}
	detail := fmt.Sprintf("No application has the consumer key %q of the issuer %q", b.key, b.token.Issuer)
	if len(others) > 0 {
		slices.Sort(others)
		others = slices.Compact(others)
		others = others[:min(len(others), maxNearest)]
		f["other_issuers"] = others
		return finding{detail: detail + fmt.Sprintf("; the same key is mapped at %s.", strings.Join(others, ", ")), facts: f}
	}
	return finding{detail: detail + ", nor of another issuer of its tenant.", facts: f}
}

func (n *narrator) application() finding {
	if why := n.carries(); why != "" {
		return notLooked(why)
	}
	uuid := n.looks.mapping.Application.UUID
	app := n.looks.application
	if app == nil {
		return found(facts{"uuid": uuid}, "The consumer key is mapped to the application %s, which is not there.", uuid)
	}
	return found(facts{"uuid": app.UUID, "name": app.Name, "owner": app.Owner, "status": statusOf(app)},
		"The application is %q of %s, uuid %s.", app.Name, app.Owner, app.UUID)
}

func statusOf(app *catalog.Application) string {
	if app.Blocked {
		return "blocked"
	}
	return "active"
}

func (n *narrator) subscription() finding {
	if n.looks.source == inNothing {
		return notLooked(n.ofBoth())
	}
	if why := n.why(true); why != "" {
		return notLooked(why)
	}
	if n.looks.source == inClaims {
		return n.carriedSubscription()
	}
	if s := n.looks.subscription; s != nil {
		return found(facts{"uuid": s.UUID, "policy": s.Policy}, "The application %q is subscribed to the API, with the policy %s.", n.looks.application.Name, s.Policy)
	}
	app, api := n.looks.application, n.a.API
	var same, all []apiFact
	for _, s := range n.v.SubscriptionsOf(app.UUID) {
		a := n.v.API(s.API.UUID)
		if a == nil || !n.mine(a.Tenant.Domain) {
			continue
		}
		if all = append(all, factOf(a)); a.Name == api.Name {
			same = append(same, factOf(a))
		}
	}
	f := facts{"application": app.Name, "application_uuid": app.UUID, "context": api.Context, "version": api.Version}
	detail := fmt.Sprintf("The application %q has no subscription to the API %s %s at %s", app.Name, api.Name, api.Version, api.Context)
	return n.withNearest(f, detail, same, all)
}

// withNearest adds the subscriptions that there are: to other versions of the API, or else all.
func (n *narrator) withNearest(f facts, detail string, same, all []apiFact) finding {
	name, list, lead := "other_versions", same, "; it has one to another version of it: "
	if len(same) == 0 {
		name, list, lead = "subscriptions", all, "; it has: "
	}
	f["subscriptions_total"] = len(all)
	if len(list) == 0 {
		return finding{detail: detail + ", and none to any other.", facts: f}
	}
	slices.SortFunc(list, func(a, b apiFact) int {
		return cmp.Or(strings.Compare(a.Context, b.Context), strings.Compare(a.Version, b.Version))
	})
	list = list[:min(len(list), maxSubscriptions)]
	f[name] = list
	return finding{detail: detail + lead + join(list) + ".", facts: f}
}

func (n *narrator) carriedSubscription() finding {
	l := n.looks
	if n.a.Reason != reasonNoSubscription {
		return found(facts{"context": l.item.context, "version": l.item.version, "policy": l.item.tier},
			"The token carries a subscription to %s (%s %s), with the policy %s.", l.item.context, l.item.name, l.item.version, l.item.tier)
	}
	var same, all []apiFact
	if l.carried != nil {
		for _, item := range l.carried.apis {
			if !n.mine(item.tenant) {
				continue
			}
			all = append(all, apiFact{Context: item.context, Version: item.version, Name: item.name})
			if n.a.API != nil && item.name == n.a.API.Name {
				same = append(same, all[len(all)-1])
			}
		}
	}
	f := facts{"path": n.path}
	detail := fmt.Sprintf("The token carries no subscription for the path %q", n.path)
	if n.a.API != nil {
		f = facts{"context": n.a.API.Context, "version": n.a.API.Version}
		detail = fmt.Sprintf("The token carries no subscription to the API %s %s at %s", n.a.API.Name, n.a.API.Version, n.a.API.Context)
	}
	return n.withNearest(f, detail, same, all)
}

func (n *narrator) policy() finding {
	l := n.looks
	switch why := n.why(true); {
	case why != "":
		return notLooked(why)
	case l.source == inNothing:
		return notLooked(n.why(false))
	case l.tierErr != nil:
		return found(facts{"policy": l.item.tier, "error": l.tierErr.Error()}, "What the token says of the policy %q cannot be read: %v.", l.item.tier, l.tierErr)
	case l.source == inClaims:
		return found(facts{"subscription": l.item.tier}, "The token says itself what the policy %q is.", l.item.tier)
	}
	f := facts{"application": l.application.Policy, "subscription": l.subscription.Policy}
	if n.a.API.Policy != "" {
		f["api"] = n.a.API.Policy
	}
	type missing struct {
		Kind string `json:"kind"`
		Name string `json:"name"`
	}
	var lacks []missing
	var names []string
	for _, p := range []struct {
		kind, name string
		is         *catalog.Policy
	}{
		{catalog.PolicyApplication, l.application.Policy, l.own},
		{catalog.PolicySubscription, l.subscription.Policy, l.tier},
		{catalog.PolicyAPI, n.a.API.Policy, l.whole},
	} {
		if p.is == nil && (p.kind != catalog.PolicyAPI || p.name != "") {
			lacks = append(lacks, missing{p.kind, p.name})
			names = append(names, fmt.Sprintf("%s policy %q", p.kind, p.name))
		}
	}
	if len(lacks) > 0 {
		f["missing"] = lacks
		return found(f, "The catalog does not have the %s.", strings.Join(names, ", nor the "))
	}
	return found(f, "The policies of application (%s), subscription (%s) and API (%s) are there.",
		l.application.Policy, l.subscription.Policy, cmp.Or(n.a.API.Policy, "none"))
}

func (n *narrator) subscriptionState() finding {
	if why := n.carries(); why != "" {
		return notLooked(why)
	}
	app, s := n.looks.application, n.looks.subscription
	f := facts{
		"state": n.looks.state, "key_type": n.a.Info.Type,
		"application": app.Name, "application_uuid": app.UUID, "application_status": statusOf(app),
	}
	switch {
	case app.Blocked:
		return found(f, "The application %q, uuid %s, is blocked, and hence all its subscriptions.", app.Name, app.UUID)
	case s.ApplicationBlocked:
		f["application_status"] = "blocked"
		return found(f, "The subscription is blocked with its application %q, uuid %s.", app.Name, app.UUID)
	}
	return found(f, "The subscription's state is %s, and the key is of type %s.", n.looks.state, n.a.Info.Type)
}

func (n *narrator) scope() finding {
	switch why := n.ofBoth(); {
	case why != "":
		return notLooked(why)
	case n.by.anyOperation:
		return notLooked("The question is about the API as a whole, and operations differ.")
	case n.a.Operation == nil || len(n.a.Operation.Scopes) == 0:
		return found(facts{"present": append([]string{}, n.a.Info.Scopes...)}, "No scope is needed.")
	}
	return found(facts{"needed": n.a.Operation.Scopes, "present": append([]string{}, n.a.Info.Scopes...)},
		"One of the scopes %q is needed, and the token has %q.", n.a.Operation.Scopes, n.a.Info.Scopes)
}

// nearestAPIs adds to the check of an API that is not there which ones are near: the tenant's
// own. It has the state wait no longer than it takes to copy the list.
func (n *narrator) nearestAPIs(e *Explanation) {
	if n.tenant() == "" {
		return
	}
	type candidate struct {
		apiFact
		here             bool // at the beginning of the path
		shared, distance int
	}
	var list []*catalog.API
	n.state.View(func(v *View) { list = v.APIs() })
	path := unescaped(n.req.Path)
	prefix := ""
	if rest, ok := beneath(path, tenantPath+"/"+n.tenant()); ok {
		prefix, path = strings.TrimSuffix(path, rest), rest
	}
	var near []candidate
	for _, a := range list {
		if !n.mine(a.Tenant.Domain) {
			continue
		}
		c := candidate{apiFact: factOf(a)}
		p := place{api: a, fits: fits(unescaped(a.Context), a.Tenant.Domain)}
		switch {
		case !p.of(n.by.only):
			c.Note = "which is not there, since its context is not one of its tenant's"
		case a.Status == catalog.APICreated || a.Status == catalog.APIRetired:
			c.Note = "which is " + a.Status
		case !p.served(n.by.environments):
			c.Note = "which is not deployed to the gateway's environments"
		}
		context := strings.TrimPrefix(unescaped(a.Context), prefix)
		_, c.here = beneath(path, context)
		c.shared = sharedSegments(path, context)
		c.distance = distance(firstSegments(path, strings.Count(context, "/")), context)
		if c.here || c.shared > 0 || c.distance <= max(1, len(context)/4) {
			near = append(near, c)
		}
	}
	slices.SortFunc(near, func(a, b candidate) int {
		switch {
		case a.here != b.here && a.here:
			return -1
		case a.here != b.here:
			return 1
		}
		return cmp.Or(cmp.Compare(b.shared, a.shared), cmp.Compare(a.distance, b.distance), strings.Compare(a.Context, b.Context))
	})
	var nearest []apiFact
	for _, c := range near[:min(len(near), maxNearest)] {
		nearest = append(nearest, c.apiFact)
	}
	c := e.failed()
	if len(nearest) == 0 {
		c.Detail += " The tenant has none near it."
		return
	}
	c.Facts["nearest"] = nearest
	c.Detail += " The nearest of the tenant: " + join(nearest) + "."
}

// nearestOperations adds to the check of an operation that is not there which ones are near, if the API is the
// tenant's own. It has the state not wait.
func (n *narrator) nearestOperations(e *Explanation) {
	p, rest := n.looks.place, n.looks.rest
	if !n.mine(p.api.Tenant.Domain) {
		return
	}
	var methods []string
	type ranked struct {
		text     string
		distance int
	}
	var near []ranked
	for i := range p.api.Operations {
		op := &p.api.Operations[i]
		if _, ok := p.operation(op.Verb, rest); ok && !slices.Contains(methods, op.Verb) && len(methods) < maxOperations {
			methods = append(methods, op.Verb)
		}
		near = append(near, ranked{op.Verb + " " + op.Target, distance(rest, op.Target)})
	}
	c := e.failed()
	if len(methods) > 0 {
		slices.Sort(methods)
		c.Facts["methods"] = methods
		c.Detail += " For this path it has: " + strings.Join(methods, ", ") + "."
		return
	}
	slices.SortStableFunc(near, func(a, b ranked) int { return cmp.Compare(a.distance, b.distance) })
	var list []string
	for _, r := range near[:min(len(near), maxOperations)] {
		list = append(list, r.text)
	}
	c.Facts["operations"], c.Facts["operations_total"] = list, len(near)
	c.Detail += " It has, the nearest first: " + strings.Join(list, ", ") + "."
}

// failed is the check that failed.
func (e *Explanation) failed() *Check {
	return &e.Checks[slices.IndexFunc(e.Checks, func(c Check) bool { return c.Result == Failed })]
}

// firstSegments is the beginning of a path, n segments of it.
func firstSegments(path string, n int) string {
	for i := range len(path) {
		if path[i] == '/' {
			if n--; n < 0 {
				return path[:i]
			}
		}
	}
	return path
}

// sharedSegments is how many segments two paths begin with that are the same.
func sharedSegments(a, b string) (n int) {
	x, y := strings.Split(strings.TrimPrefix(a, "/"), "/"), strings.Split(strings.TrimPrefix(b, "/"), "/")
	for n < len(x) && n < len(y) && x[n] == y[n] && x[n] != "" {
		n++
	}
	return n
}

// maxCompared bounds the texts whose distance is reckoned, in bytes: it takes the product of the two.
const maxCompared = 128

// distance is how many bytes must be added, removed or replaced to make a of b, in letters of any case. What is
// longer than maxCompared counts as far.
func distance(a, b string) int {
	if len(a) > maxCompared || len(b) > maxCompared {
		return 2 * maxCompared
	}
	a, b = strings.ToLower(a), strings.ToLower(b)
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		corner := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := corner
			if a[i] != b[j] {
				change++
			}
			corner = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
