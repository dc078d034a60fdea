package replica

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// ClaimsMode says whether Authorize believes what self-contained tokens carry (WSO2 contract,
// section 10.3). Its text is "claims-first", "catalog-first" or "claims-only".
//
// A token is self-contained if it has the claim subscribedAPIs. One that is believed must have
// application too, and all of the types that the contract says: else it is refused. It is believed
// about subscriptions of its issuer's tenant only, to APIs of that tenant: those are in the
// catalog, or with ClaimsOnly have contexts that are the tenant's, see [Config.Tenant].
type ClaimsMode uint8

const (
	// ClaimsFirst: a token with the claims is validated by them, others by the catalog. Which
	// APIs and operations there are, whether an API is blocked and what scopes it takes is always
	// for the catalog to say.
	ClaimsFirst ClaimsMode = iota
	// CatalogFirst: by the claims only if the catalog has no key mapping for the token.
	CatalogFirst
	// ClaimsOnly: the catalog is not looked at, but for the key manager, if it is there. Needed
	// where only revocations are known. Nobody knows of operations then, so neither their scopes
	// nor their kinds of token are asked for, and none is without authentication. An issuer can
	// let itself into whatever is below the contexts of its tenant.
	ClaimsOnly
)

var claimsModes = [...]string{ClaimsFirst: "claims-first", CatalogFirst: "catalog-first", ClaimsOnly: "claims-only"}

// String returns the mode's text.
func (m ClaimsMode) String() string {
	if int(m) < len(claimsModes) {
		return claimsModes[m]
	}
	return fmt.Sprintf("ClaimsMode(%d)", uint8(m))
}

// MarshalText implements [encoding.TextMarshaler].
func (m ClaimsMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (m *ClaimsMode) UnmarshalText(text []byte) error {
	i := slices.Index(claimsModes[:], string(text))
	if i < 0 {
		return fmt.Errorf("read claims mode %q: must be one of %s", text, strings.Join(claimsModes[:], ", "))
	}
	*m = ClaimsMode(i)
	return nil
}

// Request is what a token is presented for.
type Request struct {
	// Method is the HTTP method, or the verb of an operation that is no HTTP method, such as
	// QUERY or SUBSCRIBE, for those who know more of a request than its method: an operation
	// is found by just this verb.
	Method string
	// Path is the path of the request, as [CleanPath] returns it. Others are refused.
	Path string
	// Tenant is the domain of the tenant that the token's issuer belongs to. It counts only
	// where the catalog does not have the issuer: with ClaimsOnly. Empty: the only tenant that is
	// served, else the token is believed, if it names one alone. Such an issuer can let itself
	// in everywhere.
	Tenant string
}

// Code is WSO2's code of a refusal (WSO2 contract, section 10.2). 0: there is none.
type Code int

const (
	CodeGeneral             Code = 900900 // too little is known
	CodeInvalidCredentials  Code = 900901
	CodeMissingCredentials  Code = 900902
	CodeWrongTokenType      Code = 900905
	CodeSubscriptionBlocked Code = 900907
	CodeForbidden           Code = 900908 // no valid subscription, or the resource is not there
	CodeNotActive           Code = 900909
	CodeScope               Code = 900910
	CodeKeyManagerDown      Code = 900912
	CodeAPIBlocked          Code = 700700
)

// HTTPStatus is what a gateway answers with: 401, 403 or 503; 200 for 0. 503 is where trying
// again may help, though some of WSO2's gateways answer 401 or 500 then.
func (c Code) HTTPStatus() int {
	switch c {
	case 0:
		return http.StatusOK
	case CodeInvalidCredentials, CodeMissingCredentials, CodeSubscriptionBlocked:
		return http.StatusUnauthorized
	case CodeGeneral, CodeKeyManagerDown, CodeAPIBlocked:
		return http.StatusServiceUnavailable
	}
	return http.StatusForbidden
}

// Message is what WSO2's gateways say for the code, for example "Invalid Credentials". Empty for 0.
func (c Code) Message() string {
	switch c {
	case 0:
		return ""
	case CodeInvalidCredentials:
		return "Invalid Credentials"
	case CodeMissingCredentials:
		return "Missing Credentials"
	case CodeWrongTokenType:
		return "Incorrect Access Token Type is provided"
	case CodeSubscriptionBlocked:
		return "The requested API is temporarily blocked"
	case CodeForbidden:
		return "Resource forbidden"
	case CodeNotActive:
		return "The subscription to the API is inactive"
	case CodeScope:
		return "The access token does not allow you to access the requested resource"
	case CodeKeyManagerDown:
		return "The key manager is not available"
	case CodeAPIBlocked:
		return "API blocked"
	}
	return "Unclassified Authentication Failure"
}

// Authorization says whether a request is let through, and what a gateway tells of it. What it
// points to is shared, and not to be changed.
type Authorization struct {
	// Decision is about revocations: the zero value where the checks did not come to them. If
	// its Outcome is Ask, Authorized supposes that the issuer says "active".
	Decision
	Authorized bool
	// Code says why not.
	Code Code
	// Reason is the check that failed, one of [Reasons], for metrics and logs; empty if none did.
	Reason string
	// Scopes are those of which the token has none, if Code is CodeScope.
	Scopes []string
	// Info is WSO2's validation info, as far as the checks came.
	Info Info
	// API and Operation are what the request is for. API is nil if there is none, and with
	// ClaimsOnly; Operation is nil if the API has no operations.
	API       *catalog.API
	Operation *catalog.Operation
}

// Info is what WSO2's key validation returns (WSO2 contract, section 10.2), by WSO2's names. Members
// that nothing is known of are empty; AuthorizedDomains and EndUserToken always are. In JSON no member is null or left out.
type Info struct {
	Authorized             bool              `json:"authorized"`
	ValidationStatus       Code              `json:"validationStatus"`
	Tier                   string            `json:"tier"`       // the subscription's
	Subscriber             string            `json:"subscriber"` // the application's owner
	ApplicationID          int32             `json:"applicationId"`
	ApplicationUUID        string            `json:"applicationUUID"`
	ApplicationName        string            `json:"applicationName"`
	ApplicationTier        string            `json:"applicationTier"`
	ApplicationAttributes  map[string]string `json:"applicationAttributes"`
	APIName                string            `json:"apiName"`
	APIVersion             string            `json:"apiVersion"`
	APIUUID                string            `json:"apiUUID"`
	APIPublisher           string            `json:"apiPublisher"`
	APITier                string            `json:"apiTier"`
	Type                   string            `json:"type"` // of the key: PRODUCTION or SANDBOX
	ConsumerKey            string            `json:"consumerKey"`
	EndUserName            string            `json:"endUserName"` // sub
	SubscriberTenantDomain string            `json:"subscriberTenantDomain"`
	ContentAware           bool              `json:"contentAware"` // a tier's quota is of bandwidth
	SpikeArrestLimit       int32             `json:"spikeArrestLimit"`
	SpikeArrestUnit        string            `json:"spikeArrestUnit"`
	StopOnQuotaReach       bool              `json:"stopOnQuotaReach"`
	GraphQLMaxDepth        int32             `json:"graphQLMaxDepth"`
	GraphQLMaxComplexity   int32             `json:"graphQLMaxComplexity"`
	ThrottlingDataList     []string          `json:"throttlingDataList"`
	Scopes                 []string          `json:"scopes"`         // the token's
	UserType               string            `json:"userType"`       // APPLICATION or APPLICATION_USER
	IssuedTime             int64             `json:"issuedTime"`     // ms
	ValidityPeriod         int64             `json:"validityPeriod"` // ms
	AuthorizedDomains      string            `json:"authorizedDomains"`
	EndUserToken           string            `json:"endUserToken"`
}

// MarshalJSON implements [json.Marshaler].
func (i Info) MarshalJSON() ([]byte, error) {
	type members Info // without this method
	if i.ApplicationAttributes == nil {
		i.ApplicationAttributes = map[string]string{}
	}
	if i.ThrottlingDataList == nil {
		i.ThrottlingDataList = []string{}
	}
	if i.Scopes == nil {
		i.Scopes = []string{}
	}
	return json.Marshal(members(i))
}

// User types: whom a token was issued for (the claim aut).
const (
	ofApplication = "APPLICATION"
	ofUser        = "APPLICATION_USER"
)

// throttlingData is what WSO2's gateways throttle by: the API as a whole.
var throttlingData = []string{"api_level_throttling_key"}

// Reasons are the values of [Authorization.Reason].
var Reasons = []string{
	reasonPath, reasonNoAPI, reasonAPIBlocked, reasonNoOperation, reasonNoCredentials, reasonIssuer, reasonClaims,
	reasonRevoked, reasonStale, reasonNoCatalog, reasonTokenType, reasonNoKeyMapping, reasonNoApplication,
	reasonNoSubscription, reasonNoPolicy, reasonBlocked, reasonNotActive, reasonScope,
}

const (
	reasonPath           = "path" // not clean
	reasonNoAPI          = "no_api"
	reasonAPIBlocked     = "api_blocked"
	reasonNoOperation    = "no_operation"
	reasonNoCredentials  = "no_credentials"
	reasonIssuer         = "issuer" // not known, or not enabled
	reasonClaims         = "malformed_claims"
	reasonRevoked        = "revoked"
	reasonStale          = "stale"      // too little is known of revocations
	reasonNoCatalog      = "no_catalog" // nothing but revocations is
	reasonTokenType      = "token_type"
	reasonNoKeyMapping   = "no_key_mapping"
	reasonNoApplication  = "no_application"
	reasonNoSubscription = "no_subscription"
	reasonNoPolicy       = "no_policy"
	reasonBlocked        = "subscription_blocked"
	reasonNotActive      = "subscription_inactive"
	reasonScope          = "scope"
)

// Authorize says whether a request with a verified token is let through: what it is for, what
// is revoked, the key mapping, the application, the subscription and its state, the policies
// and the scopes, in this order. T is nil for a request without a token, which only operations without
// authentication let through; those do so with any token, and at any age of what is known. It asks nobody.
//
// An API is found by the longest of the contexts that Path begins with, whosever token it is, and no
// token is good for an API of another tenant. Since tenants choose contexts themselves, one whose
// context is not its tenant's is not there, unless one tenant alone is served: see [Config.Tenant]. Of its operations the most specific one that Method and Path match counts, segment
// by segment: a text before a {variable} before what ends in /*, which is for the path without it as
// well. HEAD is GET if no operation is for HEAD; OPTIONS is no exception. "/menu/" is not "/menu": where
// the catalog has only one of them, the other is refused, even with a /* beside it. An API
// without operations lets everything below its context through.
//
// Where only revocations are known it can do no more than Check: unless Config.Claims is
// ClaimsOnly, it refuses with CodeGeneral. Where nothing at all is known, and Config.Empty is Serve,
// every token is let through.
func (r *Replica) Authorize(t *token.Token, req Request) (a Authorization) {
	by := r.authorizer(r.StalenessOf(req.Path))
	r.state.View(func(v *View) { by.authorize(&a, v, t, req) })
	return a
}

func (r *Replica) authorizer(s Staleness) authorizer {
	return authorizer{
		mode:         r.cfg.Claims,
		only:         r.cfg.Tenant,
		environments: r.cfg.Environments,
		check:        func(t Token) Decision { return r.CheckWith(t, s) },
	}
}

// Tenant is the domain of the only tenant that is served: Config.Tenant, or else the one that the
// state is about. Empty if it is not one alone.
func (r *Replica) Tenant() (domain string) {
	r.state.View(func(v *View) { domain = cmp.Or(r.cfg.Tenant, v.content.part.only()) })
	return domain
}

// only is the domain of the only tenant that a state is about, empty if it is not one alone. Nil is
// everything.
func (p *part) only() (domain string) {
	if p != nil && len(p.tenants) == 1 {
		for domain = range p.tenants {
		}
	}
	return domain
}

// authorizer is what Authorize goes by besides the state.
type authorizer struct {
	mode         ClaimsMode
	only         string // the domain of the only tenant that is served; empty: the state knows
	environments []string
	anyOperation bool // as in [Explainer]
	check        func(Token) Decision

	looked looked // what authorize leaves behind
}

// looked is what was looked at, as far as the checks came, for those who explain.
type looked struct {
	source     source
	bearer     bearer
	token      Token // what Decision is about
	place      *place
	rest       string
	claims     error // of those that every token has, see tellToken
	subscribed bool  // the subscription was looked for

	carried    *carried
	carriedErr error // carried cannot be read
	item       carriedAPI
	tierErr    error // or what it says of item's tier

	mapping          *catalog.KeyMapping
	application      *catalog.Application
	subscription     *catalog.Subscription
	own, tier, whole *catalog.Policy // of application, subscription and API
	state            string          // of the subscription
}

// source is what subscriptions are looked for in.
type source uint8

const (
	nowhere   source = iota // it did not come to that
	inNothing               // nothing is known
	inClaims
	inCatalog
)

func (by *authorizer) authorize(a *Authorization, v *View, t *token.Token, req Request) {
	if path, ok := CleanPath(req.Path); !ok || path != req.Path {
		a.refuse(CodeForbidden, reasonPath)
		return
	}
	path := unescaped(req.Path)
	by.only = cmp.Or(by.only, v.content.part.only())
	var b bearer
	if t != nil {
		b = bearer{token: t, manager: v.KeyManager(t.Issuer), tenant: cmp.Or(req.Tenant, by.only)}
		if b.manager != nil {
			b.tenant = b.manager.Tenant.Domain
		}
	}
	by.looked.bearer = b
	switch {
	case by.mode == ClaimsOnly:
		by.looked.source = inClaims
		by.byClaims(a, path, b)
		return
	case v.at == revocation.Position{}:
		by.looked.source = inNothing
		by.byNothing(a, b)
		return
	case v.content.part != nil && v.content.part.revocationsOnly:
		a.refuse(CodeGeneral, reasonNoCatalog)
		return
	}

	by.looked.source = inCatalog
	p, rest := v.content.shelves.placeOf(path, by.only, by.environments)
	by.looked.place, by.looked.rest = p, rest
	switch {
	case p == nil:
		a.refuse(CodeForbidden, reasonNoAPI)
		return
	case !by.find(a, p, req.Method, rest):
		return
	case a.Operation != nil && a.Operation.AuthType == "None":
		a.allow()
		return
	case !by.accept(a, &b, true):
		return
	case !takes(a.Operation, a.Info.UserType):
		a.refuse(CodeWrongTokenType, reasonTokenType)
		return
	case b.tenant != a.API.Tenant.Domain:
		a.refuse(CodeForbidden, reasonNoSubscription)
		return
	}
	if by.subscribed(a, v, b) && a.permitted() {
		a.allow()
	}
}

// byClaims authorises by what a token carries alone.
func (by *authorizer) byClaims(a *Authorization, path string, b bearer) {
	if b.token == nil {
		a.refuse(CodeMissingCredentials, reasonNoCredentials)
		return
	}
	c, err := readCarried(b.token)
	by.looked.carried, by.looked.carriedErr = c, err
	if b.tenant == "" {
		b.tenant = c.tenant()
	}
	if !by.accept(a, &b, false) {
		return
	}
	if err != nil {
		a.refuse(CodeInvalidCredentials, reasonClaims)
		return
	}
	by.looked.subscribed = true
	item, ok := c.below(path, b.tenant, by.only)
	if !ok {
		a.refuse(CodeForbidden, reasonNoSubscription)
		return
	}
	a.Info.APIName, a.Info.APIVersion, a.Info.APIPublisher = item.name, item.version, item.publisher
	if by.tellCarried(a, c, item) {
		a.allow()
	}
}

// byNothing lets tokens through if the operator wants it so. Whether anything may be had
// without one is not known.
func (by *authorizer) byNothing(a *Authorization, b bearer) {
	if b.token != nil {
		if by.accept(a, &b, false) {
			a.allow()
		}
		return
	}
	if a.Decision = by.check(Token{}); a.Outcome == Refused {
		a.refuse(CodeGeneral, reasonStale)
		return
	}
	a.refuse(CodeMissingCredentials, reasonNoCredentials)
}

// bearer is a token with what decides on how it is read.
type bearer struct {
	token   *token.Token
	manager *catalog.KeyManager // of the issuer; nil: not known
	tenant  string              // the domain of the issuer's tenant
	key     string              // the consumer key
}

// accept does what is about the token alone, and tells of it. Known says that the issuer must be
// in the catalog.
func (by *authorizer) accept(a *Authorization, b *bearer, known bool) bool {
	switch {
	case b.token == nil:
		a.refuse(CodeMissingCredentials, reasonNoCredentials)
		return false
	case b.manager == nil && known, b.manager != nil && !b.manager.Enabled, by.only != "" && b.tenant != by.only:
		a.refuse(CodeInvalidCredentials, reasonIssuer)
		return false
	}
	unreadable := a.tellToken(b)
	compared := TokenOf(b.token, b.tenant)
	a.Decision = by.check(compared)
	if a.Outcome != Revoked && b.key != b.token.ClientID {
		// For a key manager whose consumer keys are in a claim of its own, that is the client.
		client := Token{Iss: b.token.Issuer, ClientID: b.key, IssuedAt: b.token.IssuedAt}
		if d := by.check(client); d.Outcome == Revoked {
			a.Decision, compared = d, client
		}
	}
	by.looked.bearer, by.looked.token, by.looked.claims = *b, compared, unreadable
	switch {
	case a.Outcome == Revoked:
		a.refuse(CodeInvalidCredentials, reasonRevoked)
	case a.Outcome == Refused:
		a.refuse(CodeGeneral, reasonStale)
	case unreadable != nil:
		a.refuse(CodeInvalidCredentials, reasonClaims)
	default:
		return true
	}
	return false
}

// tellToken tells of the token, and finds its consumer key. Its error is [token.ErrClaims], for the first
// claim that has another type than it must.
func (a *Authorization) tellToken(b *bearer) (wrong error) {
	t, claims := b.token, b.token.Claims()
	b.key = t.ClientID
	scope := "scope"
	if m := b.manager; m != nil {
		if m.ConsumerKeyClaim != "" && m.ConsumerKeyClaim != "azp" {
			keys, err := claims.Texts(m.ConsumerKeyClaim)
			switch {
			case err != nil:
				wrong = err
			case len(keys) > 1:
				wrong = fmt.Errorf("%w: %s has several consumer keys", token.ErrClaims, m.ConsumerKeyClaim)
			case len(keys) == 1 && keys[0] != "":
				b.key = keys[0]
			}
		}
		scope = cmp.Or(m.ScopesClaim, scope)
	}
	i := &a.Info
	var err error
	if i.Scopes, err = readScopes(claims, scope); err != nil {
		wrong = cmp.Or(wrong, err)
	}
	i.UserType = ofUser
	switch aut, err := claims.Text("aut"); {
	case err != nil:
		wrong = cmp.Or(wrong, err)
	case aut == ofApplication, aut != ofUser && (t.Subject == "" || t.Subject == b.key):
		i.UserType = ofApplication
	}
	i.ConsumerKey, i.EndUserName = b.key, t.Subject
	i.IssuedTime = t.IssuedAt * 1000
	i.ValidityPeriod = max(0, t.Expiry-t.IssuedAt) * 1000
	i.SubscriberTenantDomain = b.tenant
	return wrong
}

// readScopes reads a claim that has scopes: a string with spaces between them (RFC 6749 section 3.3, and
// nothing else that Unicode calls a space), or an array with one in each string. What no scope can be,
// since it is empty or has a space, is left out: nobody could tell it from two where they are joined.
func readScopes(claims token.Object, name string) ([]string, error) {
	list, err := claims.Texts(name)
	if len(list) == 1 {
		if s, err := claims.Text(name); err == nil {
			list = strings.Split(s, " ")
		}
	}
	return slices.DeleteFunc(list, func(scope string) bool { return scope == "" || strings.Contains(scope, " ") }), err
}

// find finds the operation at a place, and tells of the API.
func (by *authorizer) find(a *Authorization, p *place, method, rest string) bool {
	a.API = p.api
	i := &a.Info
	i.APIName, i.APIVersion, i.APIUUID, i.APIPublisher, i.APITier = p.api.Name, p.api.Version, p.api.UUID, p.api.Provider, p.api.Policy
	if p.api.Status == catalog.APIBlocked {
		a.refuse(CodeAPIBlocked, reasonAPIBlocked)
		return false
	}
	if by.anyOperation {
		return true
	}
	var ok bool
	if a.Operation, ok = p.operation(method, rest); !ok {
		a.refuse(CodeForbidden, reasonNoOperation)
	}
	return ok
}

// takes reports whether an operation is for tokens of a user type.
func takes(op *catalog.Operation, userType string) bool {
	if op == nil {
		return true
	}
	switch op.AuthType {
	case "", "Any", "Application & Application User":
		return true
	case "Application":
		return userType == ofApplication
	case "Application_User":
		return userType == ofUser
	}
	return false
}

// subscribed finds the subscription, by the claims or in the catalog, and tells of it.
func (by *authorizer) subscribed(a *Authorization, v *View, b bearer) bool {
	mapping := v.keyMapping(b.key, b.token.Issuer)
	by.looked.mapping, by.looked.subscribed = mapping, true
	if by.mode == ClaimsFirst || mapping == nil {
		c, err := readCarried(b.token)
		by.looked.carried, by.looked.carriedErr = c, err
		switch {
		case err != nil:
			a.refuse(CodeInvalidCredentials, reasonClaims)
			return false
		case c != nil:
			by.looked.source = inClaims
			item, ok := c.api(a.API)
			if !ok {
				a.refuse(CodeForbidden, reasonNoSubscription)
				return false
			}
			if !by.tellCarried(a, c, item) {
				return false
			}
			whole := v.apiPolicy(a.API)
			a.Info.ContentAware = a.Info.ContentAware || whole != nil && whole.QuotaType == bandwidth
			return true
		}
	}
	if mapping == nil {
		a.refuse(CodeForbidden, reasonNoKeyMapping)
		return false
	}
	a.Info.Type = mapping.KeyType
	app := v.Application(mapping.Application.UUID)
	by.looked.application = app
	if app == nil {
		a.refuse(CodeForbidden, reasonNoApplication)
		return false
	}
	i := &a.Info
	i.Subscriber, i.ApplicationID, i.ApplicationUUID, i.ApplicationName = app.Owner, app.ID, app.UUID, app.Name
	i.ApplicationTier, i.ApplicationAttributes = app.Policy, app.Attributes
	s := v.Subscription(app.UUID, a.API.UUID)
	by.looked.subscription = s
	if s == nil {
		a.refuse(CodeForbidden, reasonNoSubscription)
		return false
	}
	i.Tier = s.Policy
	own, tier := v.Policy(app.Tenant.ID, catalog.PolicyApplication, app.Policy), v.Policy(s.Tenant.ID, catalog.PolicySubscription, s.Policy)
	whole := v.apiPolicy(a.API)
	by.looked.own, by.looked.tier, by.looked.whole = own, tier, whole
	if own == nil || tier == nil || whole == nil && a.API.Policy != "" {
		a.refuse(CodeForbidden, reasonNoPolicy)
		return false
	}
	i.ContentAware = own.QuotaType == bandwidth || tier.QuotaType == bandwidth || whole != nil && whole.QuotaType == bandwidth
	i.SpikeArrestLimit, i.SpikeArrestUnit, i.StopOnQuotaReach = tier.RateLimitCount, tier.RateLimitTimeUnit, tier.StopOnQuotaReach
	i.GraphQLMaxDepth, i.GraphQLMaxComplexity = tier.GraphQLMaxDepth, tier.GraphQLMaxComplexity
	i.ThrottlingDataList = throttlingData

	state := s.Effective()
	if app.Blocked {
		state = catalog.Blocked // its subscriptions say so too, each a moment later
	}
	by.looked.state = state
	switch {
	case catalog.LetsThrough(state, mapping.KeyType):
		return true
	case state == catalog.OnHold, state == catalog.Rejected:
		a.refuse(CodeNotActive, reasonNotActive)
	default:
		a.refuse(CodeSubscriptionBlocked, reasonBlocked)
	}
	return false
}

// bandwidth is the type of quotas for which gateways count bytes.
const bandwidth = "bandwidthVolume"

// tellCarried tells what a token carries of its application, and of the tier of its subscription, item. It
// is false if that is not what it must be.
func (by *authorizer) tellCarried(a *Authorization, c *carried, item carriedAPI) bool {
	tier, err := c.tierOf(item.tier)
	by.looked.item, by.looked.tierErr = item, err
	if err != nil {
		a.refuse(CodeInvalidCredentials, reasonClaims)
		return false
	}
	i := &a.Info
	i.Type, i.Tier = c.keyType, item.tier
	i.Subscriber, i.ApplicationID, i.ApplicationUUID, i.ApplicationName, i.ApplicationTier = c.owner, c.id, c.uuid, c.name, c.tier
	i.ContentAware = c.quota == bandwidth || tier.quota == bandwidth
	i.SpikeArrestLimit, i.SpikeArrestUnit, i.StopOnQuotaReach = tier.limit, tier.unit, tier.stop
	i.GraphQLMaxDepth, i.GraphQLMaxComplexity = tier.depth, tier.complexity
	i.ThrottlingDataList = throttlingData
	return true
}

// permitted looks at the scopes, any one of which permits the operation.
func (a *Authorization) permitted() bool {
	if a.Operation == nil || len(a.Operation.Scopes) == 0 {
		return true
	}
	if slices.ContainsFunc(a.Operation.Scopes, func(scope string) bool { return slices.Contains(a.Info.Scopes, scope) }) {
		return true
	}
	a.Scopes = a.Operation.Scopes
	a.refuse(CodeScope, reasonScope)
	return false
}

func (a *Authorization) allow() {
	a.Authorized, a.Info.Authorized = true, true
}

func (a *Authorization) refuse(code Code, reason string) {
	a.Code, a.Reason, a.Info.ValidationStatus = code, reason, code
}
