// Package revokeapi hides how admins end tokens over HTTP, and read what is revoked.
//
// # Decisions
//
// A revocation is final: there is no DELETE, and whoever tries learns why.
//
// Orders have up to 16 MiB, for 10,000 tokens in full. Requests that are not small have few
// places, and are refused when none is free rather than read into memory. The size is that of
// the request, which is known before anything is read: what is answered goes with it, also when
// it comes again.
//
// dry_run is one for all of a request: orders of which some are carried out and some only looked
// at are a mistake. The answer to a dry run is not kept under an Idempotency-Key: it is large, and
// changes from minute to minute.
//
// Waiting for the gateways begins when the revocations are durable, and nothing that happens then makes
// them undone: that too many wait, or that the fleet cannot be asked, is said in the answer's convergence,
// never by another status. A request that waits has given its place back, and takes one of those who
// wait. When there is none it does not wait.
package revokeapi

import (
	"context"
	"errors"
	"net/http"
	"slices"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/revoke"
)

// Revoker carries out orders. [revoke.Revoker] is one.
type Revoker interface {
	Revoke(ctx context.Context, by revoke.Caller, orders []revoke.Order) ([]revoke.Outcome, error)
	Preview(ctx context.Context, by revoke.Caller, orders []revoke.Order) ([]revoke.Effect, error)
}

// Ledger reads what is revoked. [ledger.Ledger] is one.
type Ledger interface {
	List(ctx context.Context, f ledger.ListFilter, after string, limit int) ([]ledger.Listed, error)
	Get(ctx context.Context, id string) (ledger.Listed, bool, error)
	// Oldest is the lowest seq that the log still has, Cursors how far each sink has come, and Seen the
	// newest position that this process knows of.
	Oldest(ctx context.Context) (revocation.Seq, error)
	Cursors(ctx context.Context) (map[string]revocation.Seq, error)
	Seen() revocation.Position
}

// Fleet knows what the gateways have applied. [fleet.Fleet] is one.
type Fleet interface {
	Refresh(ctx context.Context) error
	Gateways() []fleet.Gateway
	Wait(ctx context.Context, b fleet.Barrier) (fleet.BarrierResult, error)
}

// Deps are the parts of the service that requests reach. All are required.
type Deps struct {
	Revoker     Revoker
	Ledger      Ledger
	Fleet       Fleet
	Accounts    rest.Accounts
	Idempotency rest.IdempotencyStore
	// MaxWaiting is how many requests that are not large wait for gateways at a time; each is one that is worked on.
	// Past it they are answered at once. At most 64, which 0 stands for.
	MaxWaiting int
}

// API is the management API of revocations.
type API struct {
	deps Deps
	// Those that are worked on, and those that wait for gateways, by the size of their requests.
	medium, large                             *places
	waitingSmall, waitingMedium, waitingLarge *places
	// closing ends with Close.
	closing context.Context
	close   context.CancelFunc
}

// New returns the API. Its error names what is missing.
func New(deps Deps) (*API, error) {
	var errs []error
	if deps.Revoker == nil {
		errs = append(errs, errors.New("a revoker is missing"))
	}
	if deps.Ledger == nil {
		errs = append(errs, errors.New("a ledger is missing"))
	}
	if deps.Fleet == nil {
		errs = append(errs, errors.New("a fleet is missing"))
	}
	if deps.Accounts == nil {
		errs = append(errs, errors.New("accounts are missing"))
	}
	if deps.Idempotency == nil {
		errs = append(errs, errors.New("a store for idempotency keys is missing"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	waiting := maxWaiting
	if deps.MaxWaiting > 0 {
		waiting = min(waiting, deps.MaxWaiting)
	}
	a := &API{
		deps: deps, medium: newPlaces(maxMedium, 1), large: newPlaces(maxLarge, 1),
		waitingSmall: newPlaces(waiting, max(1, waiting/2)), waitingMedium: newPlaces(maxMedium, 1), waitingLarge: newPlaces(maxLarge, 1),
	}
	a.closing, a.close = context.WithCancel(context.Background())
	return a, nil
}

// Close answers all that wait for gateways with what is known by then. Those that begin to wait afterwards
// are answered at once. It may be called more than once.
func (a *API) Close() { a.close() }

const (
	path    = "/v1/revocations"
	onePath = path + "/{id}"
)

// Routes adds /v1/revocations and what is below it to r, which stands at the root of the host.
func (a *API) Routes(r chi.Router) {
	writers := rest.Require(a.deps.Accounts, nil, rest.Admin, rest.TenantAdmin)
	readers := rest.Require(a.deps.Accounts, nil, rest.Admin, rest.TenantAdmin, rest.Auditor)
	// Require comes first: an Idempotency-Key is its caller's.
	r.With(writers, a.admit, rest.Idempotent(a.deps.Idempotency)).Method(http.MethodPost, path, rest.Handler(a.post))
	r.With(readers).Method(http.MethodGet, path, rest.Handler(a.list))
	get := readers(rest.Handler(a.get))
	r.Handle(onePath, rest.Handler(final)) // of every method but these
	r.Method(http.MethodGet, onePath, get)
	r.Method(http.MethodHead, onePath, get)
}

// final refuses to change a revocation.
func final(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Allow", http.MethodGet+", "+http.MethodHead)
	return &rest.Problem{
		Slug: "revocation-final", Title: "A revocation is final.", Status: http.StatusMethodNotAllowed,
		Detail: "It can be neither changed nor taken back: gateways may have refused the tokens already, and one that cannot be " +
			"reached would go on refusing them. Issue new tokens instead.",
	}
}

// tenants are the domains that an account sees: home, and for an auditor others that it must
// name. An empty home sees all.
type tenants struct {
	home   string
	others []string
}

func (t tenants) sees(domain string) bool {
	return t.home == "" || t.home == domain || slices.Contains(t.others, domain)
}

func tenantsOf(r *http.Request) tenants {
	account := rest.AccountOf(r.Context())
	switch {
	case account.SeesAll() && account.Role != rest.TenantAdmin: // what else that may read, its role ends with its tenant
		return tenants{}
	case account.Role == rest.Auditor:
		return tenants{account.Tenant.Domain, account.ExtraTenants}
	}
	return tenants{home: account.Tenant.Domain}
}
