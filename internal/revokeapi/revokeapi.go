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
package revokeapi

import (
	"context"
	"errors"
	"net/http"

	"github.com/go-chi/chi/v5"

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
}

// Deps are the parts of the service that requests reach. All are required.
type Deps struct {
	Revoker     Revoker
	Ledger      Ledger
	Accounts    rest.Accounts
	Idempotency rest.IdempotencyStore
}

// API is the management API of revocations.
type API struct {
	deps          Deps
	medium, large *places
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
	if deps.Accounts == nil {
		errs = append(errs, errors.New("accounts are missing"))
	}
	if deps.Idempotency == nil {
		errs = append(errs, errors.New("a store for idempotency keys is missing"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &API{deps: deps, medium: newPlaces(maxMedium), large: newPlaces(maxLarge)}, nil
}

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
