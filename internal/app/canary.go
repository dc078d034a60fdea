package app

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/canary"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/sts"
)

// canaryLifetime is how long a canary's token lives: a round in which no gateway answers takes a third of it.
const canaryLifetime = 5 * time.Minute

// canaryLock is what the canary is led under. No sink has this name.
const canaryLock = "canary"

// newCanary makes the canary that cfg asks for, nil if it asks for none.
func newCanary(cfg Config, entities *store.Store, own *sts.Server, l *ledger.Ledger, f canary.Fleet, reg prometheus.Registerer, log *slog.Logger) (*canary.Canary, error) {
	if cfg.Canary.Every == 0 {
		return nil, nil
	}
	issuer := &canaryIssuer{entities: entities, own: own, ledger: l}
	if cfg.Canary.Audience != "" {
		issuer.audience = []string{cfg.Canary.Audience}
	}
	return canary.New(canary.Config{Every: cfg.Canary.Every, Limit: cfg.Canary.Limit}, issuer, f, leadCanary(l), reg, log)
}

// leadCanary has one process run the canary.
func leadCanary(l *ledger.Ledger) canary.Lead {
	return func(ctx context.Context) (context.Context, func(), error) {
		lead, err := l.Lead(ctx, canaryLock)
		if err != nil {
			return nil, nil, err
		}
		return lead.Context(), lead.Release, nil
	}
}

// canaryIssuer makes tokens of the canary's application, and revokes them as others' are.
type canaryIssuer struct {
	entities *store.Store
	own      *sts.Server
	ledger   *ledger.Ledger
	audience []string
}

var _ canary.Issuer = (*canaryIssuer)(nil)

// Issue implements [canary.Issuer]. It makes the application first, if it is not there.
func (i *canaryIssuer) Issue(ctx context.Context) (canary.Token, error) {
	if err := i.entities.EnsureCanary(ctx); err != nil {
		return canary.Token{}, err
	}
	t, err := i.own.Mint(ctx, sts.Order{
		Tenant: revocation.SuperTenant.Domain, ClientID: store.CanaryKey, Audience: i.audience, Lifetime: canaryLifetime,
	})
	if err != nil {
		return canary.Token{}, err
	}
	return canary.Token{Compact: t.Compact, Iss: t.Iss, ID: t.ID, Expires: t.Expiry}, nil
}

// Revoke implements [canary.Issuer].
func (i *canaryIssuer) Revoke(ctx context.Context, t canary.Token) (revocation.Position, error) {
	result, err := i.ledger.Revoke(ctx, ledger.Request{
		Target: revocation.Target{Kind: revocation.KindToken, Iss: t.Iss, ID: t.ID}, Tenant: revocation.SuperTenant, Exp: t.Expires.Unix(),
		ClientID: store.CanaryKey, Reason: "canary", Action: "revoke_token", Actor: ledger.Actor{Name: store.CanaryActor},
	})
	if err != nil {
		return revocation.Position{}, err
	}
	return revocation.Position{Epoch: i.ledger.Seen().Epoch, Seq: result.Seq}, nil
}
