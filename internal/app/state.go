package app

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/sink"
	"github.com/rescindhq/rescind/internal/tlsfile"
)

// history is how many events a gateway may be behind, or ahead, to be compared with this process's state. It
// takes some MiB.
const history = 1 << 16

// stateSource is the log and the state as the service's own replica sees them.
type stateSource struct{ *ledger.Ledger }

var _ follow.Source = stateSource{}

// Load implements [follow.Source].
func (s stateSource) Load(ctx context.Context, at func(revocation.Position), revoked func(replica.Record), entity func(catalog.Entity)) error {
	return s.View(ctx, func(ctx context.Context, tx pgx.Tx, position revocation.Position, revocations func(func(directory.Stored)) error) error {
		at(position)
		for e, err := range store.ReadAll(ctx, tx) {
			if err != nil {
				return err
			}
			entity(e)
		}
		return revocations(func(s directory.Stored) {
			revoked(replica.Record{Target: s.Target, Tenant: s.Tenant, Exp: s.Exp, NotAfter: s.NotAfter, Signature: s.Signature})
		})
	})
}

// liveTokens yields the revocations of single tokens that state has.
func liveTokens(state *follow.Follower) func(context.Context) iter.Seq2[revocation.Revocation, error] {
	return func(ctx context.Context) iter.Seq2[revocation.Revocation, error] {
		return func(yield func(revocation.Revocation, error) bool) {
			var list replica.Revocations
			state.Replica().View(func(v *replica.View) { list = v.Revocations() })
			for r := range list.All() {
				if ctx.Err() != nil {
					return
				}
				rev := revocation.Revocation{Target: r.Target, Tenant: r.Tenant, Exp: r.Exp, NotAfter: r.NotAfter, Signature: r.Signature}
				if r.Target.Kind == revocation.KindToken && !yield(rev, nil) {
					return
				}
			}
		}
	}
}

// newWebhook makes the sink of a receiver.
func newWebhook(hook Webhook) (*sink.Webhook, error) {
	secrets := make([]string, len(hook.Secrets))
	for i, s := range hook.Secrets {
		secrets[i] = string(s)
	}
	var tlsConfig *tls.Config
	if hook.CA != "" {
		var err error
		if tlsConfig, err = (tlsfile.Files{CA: hook.CA}).Client(); err != nil {
			return nil, fmt.Errorf("webhook %s of RESCIND_WEBHOOKS_FILE: ca_file: %w", hook.Name, err)
		}
	}
	s, err := sink.NewWebhook(sink.WebhookConfig{
		URL: string(hook.URL), Secrets: secrets, Name: hook.sink(), AllowHTTP: hook.AllowHTTP, Types: hook.Types, TLS: tlsConfig,
		MaxEvents: hook.MaxEvents, MaxBytes: hook.MaxBytes, Timeout: hook.Timeout,
	})
	if err != nil {
		return nil, fmt.Errorf("webhook %s of RESCIND_WEBHOOKS_FILE: %w", hook.Name, err)
	}
	return s, nil
}

// After implements [follow.Source].
func (s stateSource) After(ctx context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error) {
	events, err := s.Ledger.After(ctx, seq, limit)
	if errors.Is(err, ledger.ErrSeqGone) {
		return nil, fmt.Errorf("%w: %w", follow.ErrGone, err)
	}
	return events, err
}
