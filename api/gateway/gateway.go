// Package gateway is the whole check of a gateway: the JWT, what is revoked, and what the
// catalog says. It hides key sets and what is asked of whom when too little is known, so that a
// gateway in Go is a few lines around [Gateway.Handler].
package gateway

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/token"
)

// Config is what [New] makes a gateway of. Replica is needed, and Audiences or AnyAudience, and
// URL or Issuers.
type Config struct {
	// Replica is run by [Gateway.Run].
	Replica *replica.Replica
	// URL is the service's base URL: the keys of issuers of its own are fetched there.
	URL string
	// AllowHTTP permits http:// to other hosts than loopback.
	AllowHTTP bool
	// Issuers are trusted besides the key managers in the catalog, and before those with the
	// same iss. Needed where the replica has revocations only.
	Issuers []token.Issuer
	// Networks are ranges in which key sets may be fetched though they are not public.
	Networks []netip.Prefix
	// Folder is where key sets are kept for a start without those who serve them. It may be
	// the replica's. Empty: nowhere.
	Folder string

	// Audiences are the identifiers of this gateway, one of which aud must have. AnyAudience
	// in their place: aud is not looked at.
	Audiences   []string
	AnyAudience bool
	// Leeway is for the clocks of issuers. 0 to 120 s, whole seconds. Default 30 s; negative: none.
	Leeway time.Duration
	// Realm is in WWW-Authenticate. Default "api".
	Realm string
	// Introspection is needed where a staleness is [replica.Introspect].
	Introspection *Introspection
	// Logger is told of keys that cannot be fetched, and of issuers that cannot be used. Default: nobody.
	Logger *slog.Logger
}

// Introspection is whom to ask about tokens when too little is known (RFC 7662).
type Introspection struct {
	// URL is the introspection endpoint, https unless the host is loopback.
	URL string
	// ClientID and ClientSecret are of a client that is the resource server of the tokens' audience.
	ClientID, ClientSecret string
	// Client sends the requests. Default: one with timeouts.
	Client *http.Client
	// Timeout bounds one question. Default 2 s.
	Timeout time.Duration
	// MaxConcurrent are asked at a time; past it the token is refused. Default 64.
	MaxConcurrent int
}

// Gateway decides about requests. Its methods may be called from any goroutine.
type Gateway struct{}

// New checks cfg. It connects to nothing.
func New(cfg Config) (*Gateway, error) { panic("skeleton") }

// Run keeps the replica and the key sets up to date until ctx ends, then returns nil. It is called once.
func (g *Gateway) Run(ctx context.Context) error { panic("skeleton") }

// Ready reports whether the replica is ready and the keys of at least one issuer are here (JWT-23).
func (g *Gateway) Ready() bool { panic("skeleton") }

// Request is a request that a gateway has got.
type Request struct {
	// Method is the HTTP method.
	Method string
	// Target is the request target in origin form as it is on the wire: path and query.
	Target string
	// Authorization are the values of the header field of that name.
	Authorization []string
}

// Decision is what becomes of a request.
type Decision struct {
	// Allowed: it is to be passed on.
	Allowed bool
	// Status is what to answer when it is not: 400, 401, 403 or 503.
	Status int
	// Challenge is for WWW-Authenticate, empty if there is none to send.
	Challenge string
	// Reason is the check that failed, one of [Reasons], for metrics and logs. Callers are not told
	// which one it was.
	Reason string
	// Token is nil if there is none that is genuine.
	Token *token.Token
	// Authorization is what the replica says; the zero value if it was not asked.
	replica.Authorization
}

// Reasons are the values of [Decision.Reason].
var Reasons []string

// Decide says what becomes of a request. It waits for nobody unless keys are not here yet or an issuer
// is to be asked.
func (g *Gateway) Decide(ctx context.Context, r Request) Decision { panic("skeleton") }

// Body is the JSON that WSO2's gateways answer with when a request is not allowed.
func (d Decision) Body() []byte { panic("skeleton") }

// WriteError answers a request that is not allowed.
func (d Decision) WriteError(w http.ResponseWriter) { panic("skeleton") }

// IdentityHeaders are the names of the header fields that [Decision.SetIdentity] may set, all of which
// whoever passes requests on must remove from them first.
var IdentityHeaders []string

// SetIdentity tells a backend who calls: it removes every one of [IdentityHeaders], and sets those that are known.
func (d Decision) SetIdentity(h http.Header) { panic("skeleton") }

// Handler is a middleware: it answers what is not allowed, and passes on the rest with the identity
// headers set. See [FromContext].
func (g *Gateway) Handler(next http.Handler) http.Handler { panic("skeleton") }

// FromContext is the decision by which [Gateway.Handler] passed a request on.
func FromContext(ctx context.Context) (Decision, bool) { panic("skeleton") }
