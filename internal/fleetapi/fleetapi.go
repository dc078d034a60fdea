// Package fleetapi hides how gateways report over HTTP, and how admins read what the fleet has applied.
package fleetapi

import (
	"context"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/rest"
)

// Fleet is [fleet.Fleet].
type Fleet interface {
	Report(ctx context.Context, by authn.Account, id string, r replica.Report, hold bool) (replica.Instructions, error)
	Refresh(ctx context.Context) error
	Gateways() []fleet.Gateway
	Gateway(id string) (fleet.Gateway, bool)
	Forget(ctx context.Context, id string) error
	SetCanary(ctx context.Context, id, url string) error
	Wait(ctx context.Context, b fleet.Barrier) (fleet.BarrierResult, error)
}

// State is the service's replica. [follow.Follower] is one.
type State interface {
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
}

// Deps are the parts of the service that requests reach. All are required.
type Deps struct {
	Fleet       Fleet
	State       State
	Accounts    rest.Accounts
	Idempotency rest.IdempotencyStore
}

// Config tunes the API.
type Config struct {
	// MaxWaiting is how many barriers wait at a time. Default 64.
	MaxWaiting int
}

// API serves /v1/gateways and /v1/barrier.
type API struct{}

// New returns the API. Its error names what is missing.
func New(cfg Config, deps Deps) (*API, error) { panic("skeleton") }

// Routes adds the routes to r, which stands at the root of the host.
func (a *API) Routes(r chi.Router) { panic("skeleton") }

// Close answers all that wait. Those that begin to wait afterwards are answered at once.
func (a *API) Close() { panic("skeleton") }

// View is a gateway as a caller sees it, in JSON.
type View struct{}

// Show is g as it is told to a caller who sees all, or, with whole false, to one of another tenant that g
// serves: without what is its operator's alone. Head is the log's.
func Show(g *fleet.Gateway, head revocation.Position, whole bool, now time.Time) View {
	panic("skeleton")
}

// Standing is what a gateway has of one position, as it is shown with a revocation and a barrier.
type Standing struct{}

// ShowStanding is what a gateway has of a position.
func ShowStanding(c *fleet.Confirmation, now time.Time) Standing { panic("skeleton") }
