// Package fleetapi hides how gateways report over HTTP, how admins read what the fleet has applied, and
// how they wait for it.
//
// # Decisions
//
// A report's answer is held until the fleet has something to ask: see [fleet.Fleet.Report]. It takes a
// connection and a little memory meanwhile, and ends with the caller, or with [API.Close].
//
// What a newer gateway adds to its report is passed over, so gateways and services are upgraded in any
// order. What is wrong with the rest is the fleet's to say.
//
// Whoever is bound to a tenant sees the gateways that serve it. Of those that belong to another tenant
// it learns what it needs to know whether its own revocations have arrived, and nothing about how they
// are run: they are not found by account or label either.
//
// A barrier changes nothing, so an Idempotency-Key has no meaning for it and is passed over.
package fleetapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
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

// Audit records who did what. [ledger.Ledger] is one.
type Audit interface {
	Audit(ctx context.Context, e ledger.AuditEntry) error
}

// Deps are the parts of the service that requests reach. All are required.
type Deps struct {
	Fleet    Fleet
	State    State
	Accounts rest.Accounts
	Audit    Audit
	// CheckCanaryURL says what is wrong with where a canary is called, in words for people.
	CheckCanaryURL func(url string) error
}

// Config tunes the API. The zero value is ready for production.
type Config struct {
	// MaxWaiting is how many barriers wait at a time, of one account half as many; past it the answer is
	// 503. Default 64, 1 to 10000.
	MaxWaiting int
}

// API serves /v1/gateways and /v1/barrier. Make one with [New].
type API struct {
	deps    Deps
	waiting slots
	// closing ends with Close.
	closing context.Context
	close   context.CancelFunc
}

// New returns the API. Its error names what is missing or wrong.
func New(cfg Config, deps Deps) (*API, error) {
	if cfg.MaxWaiting == 0 {
		cfg.MaxWaiting = 64
	}
	var errs []error
	if cfg.MaxWaiting < 1 || cfg.MaxWaiting > 10000 {
		errs = append(errs, fmt.Errorf("MaxWaiting is %d, must be 1 to 10000", cfg.MaxWaiting))
	}
	if deps.Fleet == nil {
		errs = append(errs, errors.New("a fleet is missing"))
	}
	if deps.State == nil {
		errs = append(errs, errors.New("a state is missing"))
	}
	if deps.Accounts == nil {
		errs = append(errs, errors.New("accounts are missing"))
	}
	if deps.Audit == nil {
		errs = append(errs, errors.New("an audit is missing"))
	}
	if deps.CheckCanaryURL == nil {
		errs = append(errs, errors.New("a check of canary URLs is missing"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	a := &API{deps: deps, waiting: slots{max: cfg.MaxWaiting, by: make(map[string]int)}}
	a.closing, a.close = context.WithCancel(context.Background())
	return a, nil
}

const (
	path       = "/v1/gateways"
	onePath    = path + "/{id}"
	statusPath = onePath + "/status"
	canaryPath = onePath + "/canary"
)

// Routes adds the routes to r, which stands at the root of the host. A HEAD must be routed like a GET.
func (a *API) Routes(r chi.Router) {
	gateways := rest.Require(a.deps.Accounts, nil, rest.Gateway)
	admins := rest.Require(a.deps.Accounts, nil, rest.Admin)
	writers := rest.Require(a.deps.Accounts, nil, rest.Admin, rest.TenantAdmin)
	readers := rest.Require(a.deps.Accounts, nil, rest.Admin, rest.TenantAdmin, rest.Auditor)
	r.With(gateways).Method(http.MethodPost, statusPath, rest.Handler(a.report))
	r.With(readers).Method(http.MethodGet, path, rest.Handler(a.list))
	r.With(readers).Method(http.MethodGet, onePath, rest.Handler(a.get))
	r.With(writers).Method(http.MethodDelete, onePath, rest.Handler(a.forget))
	r.With(admins).Method(http.MethodPut, canaryPath, rest.Handler(a.setCanary))
	r.With(writers).Method(http.MethodPost, "/v1/barrier", rest.Handler(a.barrier))
}

// Close answers all that wait, barriers with what is known by then. Those that begin to wait afterwards
// are answered at once. It may be called more than once.
func (a *API) Close() { a.close() }

// open returns a context for what a request waits for, which ends after d at most, and with Close.
func (a *API) open(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, d)
	stop := context.AfterFunc(a.closing, cancel)
	return ctx, func() {
		stop()
		cancel()
	}
}

// sendTime bounds what is left to do after a wait: sending the answer.
const sendTime = 20 * time.Second

// extend bounds from now on the time of a request: the server's is for those that do not wait. Past the
// time for reading the server takes the caller for gone.
func extend(w http.ResponseWriter, d time.Duration) {
	rc, at := http.NewResponseController(w), time.Now().Add(d)
	_ = rc.SetReadDeadline(at) // a recorder in a test has none
	_ = rc.SetWriteDeadline(at)
}

// slots bound what goes on at a time, and what one account has of it: half.
type slots struct {
	max int

	mu    sync.Mutex
	taken int
	by    map[string]int // accounts that have some
}

// take takes one until leave is called. It does not wait.
func (s *slots) take(account string) (leave func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken >= s.max || s.by[account] >= (s.max+1)/2 {
		return nil, false
	}
	s.taken++
	s.by[account]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.taken--
		if s.by[account]--; s.by[account] == 0 {
			delete(s.by, account)
		}
	}, true
}

// viewer is who asks, by the domains of the tenants that it sees. None: all of them.
type viewer []string

func viewerOf(r *http.Request) viewer {
	account := rest.AccountOf(r.Context())
	switch {
	case account.SeesAll() && account.Role != rest.TenantAdmin: // what else that may read, its role ends with its tenant
		return nil
	case account.Role == rest.Auditor:
		return append(viewer{account.Tenant.Domain}, account.ExtraTenants...)
	}
	return viewer{account.Tenant.Domain}
}

// isServed reports whether requests for APIs of v's tenants may come to g.
func (v viewer) isServed(g *fleet.Gateway) bool { return v == nil || slices.ContainsFunc(v, g.Serves) }

// owns reports whether g belongs to v's tenants, and so nothing of it is kept from v.
func (v viewer) owns(g *fleet.Gateway) bool { return v == nil || slices.Contains(v, g.Tenant) }

func (v viewer) sees(g *fleet.Gateway) bool { return v.owns(g) || v.isServed(g) }

// What callers are asked to wait for when too many wait, when it is not known whether the state is up to
// date, and when there are too many gateways, which takes an admin.
const (
	busyRetry  = 2 * time.Second
	staleRetry = time.Second
	manyRetry  = 30 * time.Second
)

// freshTimeout is how long a caller waits for the head to be known.
const freshTimeout = 5 * time.Second

// head is the log's, read at most maxAge ago. Its error is a [rest.Problem].
func (a *API) head(ctx context.Context, maxAge time.Duration) (revocation.Position, error) {
	ctx, cancel := context.WithTimeout(ctx, freshTimeout)
	defer cancel()
	head, err := a.deps.State.Fresh(ctx, maxAge)
	if err != nil {
		p := rest.Status(http.StatusServiceUnavailable, "How far the log is cannot be told now.")
		p.RetryAfter, p.Cause = staleRetry, err
		return head, p
	}
	return head, nil
}

// notFound is for a gateway that is not there, or that the caller does not see.
func notFound() error {
	return rest.Status(http.StatusNotFound, "There is no such gateway, or it serves other tenants only.")
}
