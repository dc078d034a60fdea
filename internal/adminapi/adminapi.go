// Package adminapi hides the management API: which routes change the catalog, who may
// use them, and what their bodies may say; and what else admins read: claims of tokens,
// and the audit.
//
// # Decisions
//
// A body is a type of its own, and never an entity: what only the service sets is an
// unknown member, so nobody believes to have set it.
//
// PUT replaces all of an entity: a member that is left out takes its default. There is
// no PATCH. PUT and DELETE are for one version of the entity (If-Match), so that no
// change of another person is lost unseen. Block, unblock and rotate, which are for
// emergencies, go by If-Match only if it is sent.
//
// A parameter that is not known is refused: revoke_token=false, with an s left out, would
// else revoke.
//
// What another tenant has does not exist for those who may not see it: 404, never 403. The
// extra tenants of an account count here for those only who do nothing but read: an auditor,
// to whom lists show one of them when it is named, and a gateway, which reads claims. For
// others they are about snapshots, events and WSO2's reads.
//
// Whose tokens are believed concerns all tenants: key managers are made and deleted by the
// role admin.
package adminapi

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

// State is the service's replica. [follow.Follower] is one.
type State interface {
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.State
}

// Audit reads who did what to what. [ledger.Ledger] is one.
type Audit interface {
	AuditPage(ctx context.Context, f ledger.AuditFilter, before int64, limit int) ([]ledger.AuditRecord, error)
}

// Deps are the parts of the service that requests reach. All are required.
type Deps struct {
	Catalog     *store.Store
	State       State
	Audit       Audit
	Accounts    rest.Accounts
	Idempotency rest.IdempotencyStore
}

// API is the management API of the catalog, and of the audit.
type API struct {
	deps   Deps
	audits chan struct{} // has one for each read of the audit that is under way
}

// New returns the API. Its error names what is missing.
func New(deps Deps) (*API, error) {
	var errs []error
	if deps.Catalog == nil {
		errs = append(errs, errors.New("a catalog is missing"))
	}
	if deps.State == nil {
		errs = append(errs, errors.New("a replica is missing"))
	}
	if deps.Audit == nil {
		errs = append(errs, errors.New("an audit is missing"))
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
	return &API{deps: deps, audits: make(chan struct{}, maxAudits)}, nil
}

// Route is one operation of the API.
type Route struct {
	// Method and Pattern are as chi knows them.
	Method, Pattern string
	// Roles are those whose accounts may use it.
	Roles []string

	serve func(*API, http.ResponseWriter, *http.Request) error
}

var (
	readers = []string{rest.Admin, rest.TenantAdmin, rest.Auditor}
	writers = []string{rest.Admin, rest.TenantAdmin}
	admins  = []string{rest.Admin}
	// To us, a token issuer of somebody else's is a gateway.
	claimReaders = []string{rest.Admin, rest.TenantAdmin, rest.Auditor, rest.Gateway}
)

// Access returns every route of the API: [API.Routes] adds these and no others.
func Access() []Route {
	var routes []Route
	for _, res := range resources {
		routes = append(routes, res.routes()...)
	}
	return slices.Concat(routes, []Route{
		{http.MethodPost, applicationsPath + "/{id}/block", writers, (*API).block},
		{http.MethodPost, applicationsPath + "/{id}/unblock", writers, (*API).unblock},
		{http.MethodPost, keysPath + "/{key}/rotate", writers, (*API).rotateKey},
		{http.MethodGet, applicationsPath + "/{id}/claims", claimReaders, (*API).claims},
		{http.MethodGet, auditPath, readers, (*API).audit},
	})
}

// Routes adds the routes of [Access] to r, which stands at the root of the host.
func (a *API) Routes(r chi.Router) {
	for _, route := range Access() {
		// Require comes first: an Idempotency-Key is its caller's.
		around := chi.Chain(rest.Require(a.deps.Accounts, nil, route.Roles...))
		if route.Method == http.MethodPost {
			around = append(around, rest.Idempotent(a.deps.Idempotency))
		}
		r.With(around...).Method(route.Method, route.Pattern, rest.Handler(func(w http.ResponseWriter, r *http.Request) error {
			w.Header().Set("Cache-Control", "no-store")
			return problem(route.serve(a, w, r))
		}))
	}
}

// caller is who sent r, and the tenant that it is bound to.
func caller(w http.ResponseWriter, r *http.Request) store.Caller {
	account := rest.AccountOf(r.Context())
	c := store.Caller{
		Actor: rest.ActorOf(w, r), Traceparent: rest.ExchangeOf(w).Traceparent(), Tenant: account.Tenant.Domain,
	}
	// What else a tenant's admin may read, its role ends with its tenant.
	if account.SeesAll() && account.Role != rest.TenantAdmin {
		c.Tenant = ""
	}
	if account.Role == rest.Auditor || account.Role == rest.Gateway {
		c.AlsoReads = account.ExtraTenants
	}
	return c
}
