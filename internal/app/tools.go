package app

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/user"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/revoke"
	"github.com/rescindhq/rescind/internal/sts"
)

// Operator is who runs a command, for the audit: as far as the machine knows him.
func Operator() ledger.Actor {
	name := "unknown"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	host, _ := os.Hostname() // without one, the name has to do
	return ledger.Actor{Name: "operator:" + name, RequestID: uuid.NewString(), Remote: host}
}

// Revoker ends tokens for a command, without a running service.
type Revoker struct {
	tools *CatalogTools
	*revoke.Revoker
	watch *watch // nil before Watch
}

// OpenRevoker is [OpenCatalog] for ending tokens. It reads the whole state, which takes a
// second for about a million revocations. The Revoker is to be closed.
func OpenRevoker(ctx context.Context, cfg Config, log *slog.Logger) (*Revoker, error) {
	tools, err := OpenCatalog(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	r, err := newCommandRevoker(ctx, cfg, tools, log)
	if err != nil {
		tools.Close()
		return nil, err
	}
	return &Revoker{tools: tools, Revoker: r}, nil
}

func newCommandRevoker(ctx context.Context, cfg Config, tools *CatalogTools, log *slog.Logger) (*revoke.Revoker, error) {
	follower, err := follow.New(follow.Config{}, stateSource{tools.ledger}, prometheus.NewRegistry(), log)
	if err != nil {
		return nil, err
	}
	if err := follower.Load(ctx); err != nil {
		return nil, err
	}
	loaded := loadedState{follower.Replica()}
	verifier, err := newCommandIssuers(ctx, cfg, tools.Pool, loaded, log)
	if err != nil {
		return nil, err
	}
	return newRevoker(cfg, tools.ledger, loaded, verifier), nil
}

// newCommandIssuers are those of state, with keys that are read when they are needed.
func newCommandIssuers(ctx context.Context, cfg Config, pool *pgxpool.Pool, state state, log *slog.Logger) (*issuers, error) {
	trusted, err := registeredIssuers(ctx, cfg, state, log)
	if err != nil {
		return nil, err
	}
	return newIssuers(trusted, cfg.KeySetNetworks, sts.NewVerifier(pool, log), state, log), nil
}

// registeredIssuers are those that cfg names and a service has registered.
func registeredIssuers(ctx context.Context, cfg Config, state state, log *slog.Logger) (trusted []token.Issuer, err error) {
	managers := make(map[string]*catalog.KeyManager)
	state.Replica().View(func(v *replica.View) {
		for _, m := range v.KeyManagers() {
			managers[m.Iss] = m
		}
	})
	for _, t := range cfg.TrustedIssuers {
		m := managers[t.Iss]
		if m == nil || m.Resident {
			continue
		}
		issuer, err := t.issuer(ctx, m, log)
		if err != nil {
			return nil, fmt.Errorf("trusted issuer %s: %w", t.Iss, err)
		}
		trusted = append(trusted, issuer)
	}
	return trusted, nil
}

func newRevoker(cfg Config, l *ledger.Ledger, state revoke.State, v *issuers) *revoke.Revoker {
	return revoke.New(revoke.Config{ClockSkew: cfg.ClockSkew}, l, state, v)
}

// loadedState is as new as it gets in a command that has just begun.
type loadedState struct{ replica *replica.State }

func (s loadedState) Replica() *replica.State { return s.replica }

func (s loadedState) Fresh(context.Context, time.Duration) (revocation.Position, error) {
	return s.replica.At(), nil
}

// Revoke is [revoke.Revoker.Revoke] by the operator, who sees all tenants.
func (r *Revoker) Revoke(ctx context.Context, orders []revoke.Order) ([]revoke.Outcome, error) {
	return r.Revoker.Revoke(ctx, revoke.Caller{Actor: Operator()}, orders)
}

// Preview is [revoke.Revoker.Preview] for the operator, who sees all tenants.
func (r *Revoker) Preview(ctx context.Context, orders []revoke.Order) ([]revoke.Effect, error) {
	return r.Revoker.Preview(ctx, revoke.Caller{Actor: Operator()}, orders)
}

// Close ends all connections.
func (r *Revoker) Close() {
	if r.watch != nil {
		r.watch.close()
	}
	r.tools.Close()
}

// KeyTools manages signing keys for a command, without a running service.
type KeyTools struct {
	tools *CatalogTools
	keys  *sts.Keys
	iss   string
}

// OpenKeys is [OpenCatalog] for signing keys. The tools are to be closed.
func OpenKeys(ctx context.Context, cfg Config, log *slog.Logger) (*KeyTools, error) {
	tools, err := OpenCatalog(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	keys, err := masterKeys(cfg)
	if err != nil {
		tools.Close()
		return nil, err
	}
	return &KeyTools{tools: tools, keys: sts.NewKeys(tools.Pool, tools.ledger, keys), iss: cfg.Issuer}, nil
}

// List returns the signing keys of an issuer of our own, or of all for "".
func (t *KeyTools) List(ctx context.Context, iss string) ([]sts.KeyInfo, error) {
	return t.keys.List(ctx, iss)
}

// Rotate is [sts.Keys.Rotate] by the operator; without an issuer it is about that of the super
// tenant.
func (t *KeyTools) Rotate(ctx context.Context, r sts.Rotation) ([]sts.KeyInfo, error) {
	r.Iss = cmp.Or(r.Iss, t.iss)
	changed, err := t.keys.Rotate(ctx, Operator(), r)
	if errors.Is(err, sts.ErrNoIssuer) {
		err = fmt.Errorf("%w: see rescind keys list for those that there are", err)
	}
	return changed, err
}

// Retire is [sts.Keys.Retire] by the operator.
func (t *KeyTools) Retire(ctx context.Context, kid, reason string) (sts.KeyInfo, error) {
	return t.keys.Retire(ctx, Operator(), kid, reason)
}

// Close ends all connections.
func (t *KeyTools) Close() { t.tools.Close() }
