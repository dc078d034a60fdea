package app

import (
	"context"
	"encoding/base64"
	"errors"
	"log/slog"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
)

// CatalogTools are what a command changes the catalog and the accounts with, without a
// running service: what it changes is told through the log like everything else.
type CatalogTools struct {
	Pool     *pgxpool.Pool
	Catalog  *store.Store
	Accounts *authn.Authenticator
}

// commandConns are enough for one transaction at a time, and a read beside it.
const commandConns = 4

// OpenCatalog connects to the database, which must have the current schema. It makes the
// epoch of a new one, and returns [ledger.ErrRestored] or [ledger.ErrIdentity] for one
// that was restored. The tools are to be closed.
func OpenCatalog(ctx context.Context, cfg Config, log *slog.Logger) (*CatalogTools, error) {
	cfg.Database.MaxConns = commandConns
	pool, err := openPool(ctx, cfg.Database)
	if err != nil {
		return nil, err
	}
	tools, err := newCatalogTools(ctx, cfg, pool, log)
	if err != nil {
		pool.Close()
		return nil, err
	}
	return tools, nil
}

func newCatalogTools(ctx context.Context, cfg Config, pool *pgxpool.Pool, log *slog.Logger) (*CatalogTools, error) {
	if err := checkSchema(ctx, pool, log); err != nil {
		return nil, err
	}
	reg := prometheus.NewRegistry()
	l, err := newLedger(cfg, pool, reg, log)
	if err != nil {
		return nil, err
	}
	if _, err := l.Start(ctx, nil); err != nil {
		return nil, err
	}
	raw, err := base64.StdEncoding.DecodeString(string(cfg.MasterKey))
	if err != nil {
		return nil, errors.New("RESCIND_MASTER_KEY is not base64")
	}
	master, err := authn.NewMasterKey(raw)
	if err != nil {
		return nil, err
	}
	accounts, err := authn.New(authn.Config{}, pool, []authn.MasterKey{master}, reg, log)
	if err != nil {
		return nil, err
	}
	return &CatalogTools{Pool: pool, Catalog: store.New(pool, l, accounts, log), Accounts: accounts}, nil
}

// Close ends all connections.
func (t *CatalogTools) Close() { t.Pool.Close() }
