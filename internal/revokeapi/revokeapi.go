// Package revokeapi hides how admins end tokens over HTTP, and read what is revoked.
package revokeapi

import (
	"context"

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
	deps Deps
}

// New returns the API. Its error names what is missing.
func New(deps Deps) (*API, error) { panic("skeleton") }

// Routes adds /v1/revocations and what is below it to r, which stands at the root of the host.
func (a *API) Routes(r chi.Router) { panic("skeleton") }
