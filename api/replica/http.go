package replica

import (
	"context"
	"net/http"

	"github.com/rescindhq/rescind/api/revocation"
)

// HTTPConfig says where the service is. URL, Username and Password are needed.
type HTTPConfig struct {
	// URL is the service's base URL, for example https://rescind.example.com. Plain http is
	// for loopback only, unless AllowHTTP.
	URL string
	// AllowHTTP permits http:// to other hosts, for those who have TLS of their own in between.
	AllowHTTP bool
	// Username and Password are of an account with the role gateway.
	Username, Password string
	// Tenant narrows what is fetched to one tenant, by its domain. Empty: all that the
	// account sees.
	Tenant string
	// Client sends the requests. It must have no timeout of its own: streams last. Default: one
	// with timeouts to connect and for headers, and the system's authorities.
	Client *http.Client
}

// HTTP is the service's own API: a [Source] of snapshots and deltas, and a [Feed] of
// server-sent events.
type HTTP struct{}

var (
	_ Source = (*HTTP)(nil)
	_ Feed   = (*HTTP)(nil)
)

// NewHTTP checks cfg. It does not connect.
func NewHTTP(cfg HTTPConfig) (*HTTP, error) { panic("skeleton") }

// Load implements [Source].
func (h *HTTP) Load(ctx context.Context, s *State) error { panic("skeleton") }

// Events implements [Source].
func (h *HTTP) Events(ctx context.Context, after revocation.Position) (Page, error) {
	panic("skeleton")
}

// Name implements [Feed]. It is "sse".
func (h *HTTP) Name() string { return "sse" }

// Follow implements [Feed].
func (h *HTTP) Follow(ctx context.Context, at func() revocation.Position, to Receiver) error {
	panic("skeleton")
}
