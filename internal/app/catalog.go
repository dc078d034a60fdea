package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/sts"
)

// CatalogTools are what a command changes the catalog and the accounts with, without a
// running service: what it changes is told through the log like everything else.
type CatalogTools struct {
	Pool     *pgxpool.Pool
	Catalog  *store.Store
	Accounts *authn.Authenticator

	ledger *ledger.Ledger
}

// commandConns are enough for one transaction at a time, and a read beside it.
const commandConns = 4

// OpenCatalog connects to the database, which must have the current schema. It makes the
// epoch of a new one, and returns [ledger.ErrRestored] or [ledger.ErrIdentity] for one
// that was restored: what is written to it would be lost, and hide the loss. Where etcd
// is a sink it must answer, for it tells. The tools are to be closed.
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
	published, err := witness(ctx, cfg, l, log)
	if err != nil {
		return nil, err
	}
	if _, err := l.Start(ctx, published); err != nil {
		return nil, err
	}
	keys, err := masterKeys(cfg)
	if err != nil {
		return nil, err
	}
	accounts, err := authn.New(authn.Config{Issuer: cfg.Issuer}, pool, keys, reg, log)
	if err != nil {
		return nil, err
	}
	return &CatalogTools{Pool: pool, Catalog: store.New(catalogConfig(cfg), pool, l, accounts, log), Accounts: accounts, ledger: l}, nil
}

// witness is how far etcd says that the log once was, nil if it does not say or is no
// sink of this log. A command waits for nobody to look into it, so unlike [Serve] it does
// not go on when etcd cannot be asked.
func witness(ctx context.Context, cfg Config, l *ledger.Ledger, log *slog.Logger) (*revocation.Position, error) {
	cursors, err := l.Cursors(ctx)
	if err != nil {
		return nil, err
	}
	_, fed := cursors[sinkEtcd]
	configured := len(cfg.Etcd.Endpoints) > 0
	switch {
	case fed && !configured:
		return nil, errors.New("the log is fed to etcd, which is to be asked whether the database was restored: give RESCIND_ETCD_ENDPOINTS " +
			"as the service has it; if etcd is no sink any more, the owner of the schema can delete it from rescind.sink_cursors")
	case !fed && !(configured && slices.Contains(cfg.Sinks, sinkEtcd)):
		return nil, nil
	}
	etcd, err := newEtcd(cfg, l, log)
	if err != nil {
		return nil, err
	}
	defer etcd.Close()
	ctx, cancel := context.WithTimeout(ctx, etcdPatience)
	defer cancel()
	p, err := etcd.Stream(ctx)
	if err != nil {
		return nil, fmt.Errorf("etcd cannot be asked whether the database was restored: %w; make the members that RESCIND_ETCD_ENDPOINTS names reachable, or correct it", err)
	}
	if p.Epoch == "" {
		return nil, nil
	}
	return &p, nil
}

// etcdPatience bounds the question.
const etcdPatience = 5 * time.Second

// PutAccount changes or makes an account, as [authn.Authenticator.StoreAccount], and
// records it in the audit.
func (t *CatalogTools) PutAccount(ctx context.Context, c authn.AccountChange) error {
	return t.changeAccount(ctx, "put_account", c.Username, func(ctx context.Context, tx pgx.Tx) (authn.Account, error) {
		return t.Accounts.StoreAccount(ctx, tx, c)
	})
}

// DeleteAccount removes an account, as [authn.Authenticator.DeleteAccount], and records
// it in the audit.
func (t *CatalogTools) DeleteAccount(ctx context.Context, username string) error {
	return t.changeAccount(ctx, "delete_account", username, func(ctx context.Context, tx pgx.Tx) (authn.Account, error) {
		return t.Accounts.DeleteAccount(ctx, tx, username)
	})
}

func (t *CatalogTools) changeAccount(ctx context.Context, action, username string, change func(context.Context, pgx.Tx) (authn.Account, error)) error {
	defer t.Accounts.ForgetAccount(username)
	_, err := t.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
		account, err := change(ctx, tx)
		if err != nil {
			return err
		}
		tx.Audit(ledger.AuditEntry{Tenant: account.Tenant, Action: action, Subject: username, Actor: Operator()})
		return nil
	})
	return err
}

func catalogConfig(cfg Config) store.Config {
	return store.Config{Issuer: cfg.Issuer, MaxTokenLifetime: sts.MaxTokenLifetime}
}

// Close ends all connections.
func (t *CatalogTools) Close() { t.Pool.Close() }
