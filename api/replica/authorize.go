package replica

import (
	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/token"
)

// ClaimsMode says whether Authorize believes what self-contained tokens carry (WSO2 contract,
// section 10.3). Its text is "claims-first", "catalog-first" or "claims-only".
type ClaimsMode uint8

const (
	// ClaimsFirst: a token with the claims is validated by them, others by the catalog.
	ClaimsFirst ClaimsMode = iota
	// CatalogFirst: by the claims only if the catalog has no key mapping for the token.
	CatalogFirst
	// ClaimsOnly: the catalog is not looked at. Needed where only revocations are known.
	ClaimsOnly
)

// Request is what a token is presented for.
type Request struct {
	// Method is the HTTP method. Path is the path of the request, as [CleanPath] returns it.
	Method, Path string
}

// Code is WSO2's code of a refusal (WSO2 contract, section 10.2). 0: there is none.
type Code int

const (
	CodeGeneral             Code = 900900
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

// HTTPStatus is what a gateway answers with: 401, 403 or 503.
func (c Code) HTTPStatus() int { panic("skeleton") }

// Message is what WSO2's gateways say for the code, for example "Invalid Credentials".
func (c Code) Message() string { panic("skeleton") }

// Authorization says whether a request is let through, and what a gateway tells of it.
type Authorization struct {
	// Decision is about revocations. If its Outcome is Ask, Authorized supposes that the
	// issuer says "active".
	Decision
	Authorized bool
	// Code says why not.
	Code Code
	// Reason is the check that failed, one of [Reasons], for metrics and logs.
	Reason string
	// Scopes are those of which the token has none, if Code is CodeScope.
	Scopes []string
	// Info is WSO2's validation info, as far as the checks came.
	Info Info
	// API and Operation are what the request is for. API is nil if there is none; Operation
	// is nil if the API has no operations.
	API       *catalog.API
	Operation *catalog.Operation
}

// Info is what WSO2's key validation returns (WSO2 contract, section 10.2).
type Info struct {
	Authorized             bool              `json:"authorized"`
	ValidationStatus       Code              `json:"validationStatus"`
	Tier                   string            `json:"tier"`
	Subscriber             string            `json:"subscriber"`
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
	Type                   string            `json:"type"`
	ConsumerKey            string            `json:"consumerKey"`
	EndUserName            string            `json:"endUserName"`
	SubscriberTenantDomain string            `json:"subscriberTenantDomain"`
	ContentAware           bool              `json:"contentAware"`
	SpikeArrestLimit       int32             `json:"spikeArrestLimit"`
	SpikeArrestUnit        string            `json:"spikeArrestUnit"`
	StopOnQuotaReach       bool              `json:"stopOnQuotaReach"`
	GraphQLMaxDepth        int32             `json:"graphQLMaxDepth"`
	GraphQLMaxComplexity   int32             `json:"graphQLMaxComplexity"`
	ThrottlingDataList     []string          `json:"throttlingDataList"`
	Scopes                 []string          `json:"scopes"`
	UserType               string            `json:"userType"`
	IssuedTime             int64             `json:"issuedTime"`     // ms
	ValidityPeriod         int64             `json:"validityPeriod"` // ms
	AuthorizedDomains      string            `json:"authorizedDomains"`
	EndUserToken           string            `json:"endUserToken"`
}

// Reasons are the values of [Authorization.Reason].
var Reasons []string

// Authorize says whether a request with a verified token is let through: what it is for, what
// is revoked, the key mapping, the application, the subscription and its state, the policies
// and the scopes. T is nil for a request without a token, which only operations without
// authentication let through. It asks nobody.
//
// Where only revocations are known it can do no more than Check: unless Config.Claims is
// ClaimsOnly, it refuses with CodeGeneral.
func (r *Replica) Authorize(t *token.Token, req Request) Authorization { panic("skeleton") }

// CleanPath returns the path of a request target in origin form, as it is on the wire, and
// whether it means the same to everyone who reads it: it has no segment . or .., no empty one, no
// encoded slash, backslash or NUL, nothing encoded that needs no encoding, and no ;parameters. Whoever
// authorises must refuse others: what is authorised would not be what is forwarded.
func CleanPath(target string) (path string, ok bool) { panic("skeleton") }
