// Package introspect hides the introspection endpoint of RFC 7662: who may ask about which
// token, and what of it they are told.
package introspect

import (
	"context"
	"net/http"
	"net/url"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
)

// Config is for [New]. The zero value is ready for production.
type Config struct {
	// Leeway is what is added to a token's exp, and its nbf and iat may be ahead of our clock.
	// Default 30 s, up to [revocation.MaxLeeway]; negative for none.
	Leeway time.Duration
}

// Callers finds out who asks. [authn.Authenticator] does.
type Callers interface {
	FormOrBearer(w http.ResponseWriter, r *http.Request, known ...string) (client authn.Client, bearer string, form url.Values, err error)
	Client(ctx context.Context, id string) (authn.Client, bool, error)
}

// Verifier tells genuine tokens from others. [token.Verifier] is one.
type Verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// State is the state of the log in this process. [follow.Follower] is one.
type State interface {
	Replica() *replica.Replica
	// Reach waits until the replica is at p of its epoch, or past it.
	Reach(ctx context.Context, p revocation.Position) error
}

// Deps are the parts of the service that requests reach. All are required.
type Deps struct {
	Callers  Callers
	Verifier Verifier
	State    State
	// Seen is the last position that this process has answered for: see [ledger.Ledger.Seen].
	Seen       func() revocation.Position
	Registerer prometheus.Registerer
}

// Endpoint is the introspection endpoint.
type Endpoint struct{}

// New returns the endpoint. Its error names what is missing or out of its range.
func New(cfg Config, deps Deps) (*Endpoint, error) { panic("skeleton") }

// ServeHTTP answers a request of any method.
func (e *Endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) { panic("skeleton") }
