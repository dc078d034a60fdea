package catalog

import (
	"context"
	"fmt"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

// blockedOtherwiseSQL finds subscriptions that do not say what their application does.
const blockedOtherwiseSQL = ` WHERE e.application_id = $1 AND e.application_blocked <> $2 ORDER BY e.id LIMIT $3 FOR NO KEY UPDATE OF e`

// Block makes an application, by its UUID or id, blocked or not, and its subscriptions with
// it, and revokes the tokens that its consumer keys have so far unless told not to, also of one
// that is blocked already; tokens that are self-contained cannot be kept. An application with very
// many subscriptions takes several transactions, the first of which blocks and revokes; one that
// stopped is finished by calling it again. Errors are those of Apply.
func (s *Store) Block(ctx context.Context, by Caller, application string, ifTimestamp int64, blocked, keepTokens bool) (*catalog.Application, error) {
	found, err := s.Get(ctx, by, catalog.NounApplication, application)
	if err != nil {
		return nil, err
	}
	m := found.Base()
	reason := "application unblocked"
	if blocked {
		reason = "application blocked"
	}
	for first := true; ; first = false {
		var b *batch
		var app *step
		more := false
		_, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
			b = s.newBatch(by, tx)
			app = &step{op: Update, noun: catalog.NounApplication, uuid: m.UUID, keepTokens: keepTokens}
			if first {
				app.ifTimestamp = ifTimestamp
			}
			if err := b.lock(ctx, wanted{domains: []string{m.Tenant.Domain}}); err != nil {
				return err
			}
			if err := b.load(ctx, applications{}, []*step{app}, `FOR NO KEY UPDATE OF e`); err != nil {
				return b.failed("read", err)
			}
			app.want = copyOf(app.cur)
			if !first && app.cur.(*catalog.Application).Blocked != blocked {
				more = false
				return nil // somebody wants it otherwise since
			}
			if err := b.block(ctx, app, blocked, reason, first); err != nil {
				return err
			}
			more, err = b.pass(ctx, app, reason)
			return err
		})
		s.forget(b)
		if err != nil {
			return nil, fmt.Errorf("block application %s: %w", application, err)
		}
		if !more {
			return app.want.(*catalog.Application), nil
		}
	}
}

// block sets what app's application says, and ends the tokens of one that is blocked now, or
// again with first.
func (b *batch) block(ctx context.Context, app *step, blocked bool, reason string, first bool) error {
	a := app.want.(*catalog.Application)
	if a.Blocked == blocked && !(blocked && first) {
		return nil
	}
	changed := a.Blocked != blocked
	a.Blocked, app.reason = blocked, reason
	keys, err := b.keysOf(ctx, []int32{a.ID})
	if err != nil {
		return b.failed("read keys", err)
	}
	if len(keys[a.ID]) >= maxEvents {
		return &Conflict{Slug: "limit", Detail: fmt.Sprintf("the application has %d consumer keys: delete some first", len(keys[a.ID]))}
	}
	for _, k := range keys[a.ID] {
		b.forget = append(b.forget, k.consumer)
		if !blocked {
			continue
		}
		if err := b.endTokens(app, k, a.Tenant, reason); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	return b.put(ctx, applications{}, []*step{app})
}

// pass makes subscriptions say what their application does, as many as fit. more is true if
// some are left.
func (b *batch) pass(ctx context.Context, app *step, reason string) (more bool, err error) {
	a := app.want.(*catalog.Application)
	room := maxEvents - b.size()
	if room <= 0 {
		return true, nil
	}
	entities, err := b.fetch(ctx, subscriptions{}, blockedOtherwiseSQL, a.ID, a.Blocked, room+1)
	if err != nil {
		return false, b.failed("read subscriptions", err)
	}
	if more = len(entities) > room; more {
		entities = entities[:room]
	}
	run := make([]*step, len(entities))
	for i, e := range entities {
		want := copyOf(e).(*catalog.Subscription)
		want.ApplicationBlocked = a.Blocked
		run[i] = &step{op: Update, cur: e, want: want, keepTokens: true, reason: reason} // the keys' revocations cover it
	}
	return more, b.put(ctx, subscriptions{}, run)
}

// deleteApplication deletes an application however much it holds: while that is too much
// for one transaction, it blocks the application and deletes what fits.
func (s *Store) deleteApplication(ctx context.Context, by Caller, asked *step) ([]catalog.Entity, revocation.Position, error) {
	for first := true; ; first = false {
		var b *batch
		var st *step
		done := false
		at, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
			b = s.newBatch(by, tx)
			st = b.steps([]*step{asked})[0]
			if !first {
				st.ifTimestamp = 0
			}
			var w wanted
			w.add(st)
			if err := b.lock(ctx, w); err != nil {
				return err
			}
			if err := b.load(ctx, applications{}, []*step{st}, `FOR UPDATE OF e`); err != nil {
				return b.failed("read", err)
			}
			var err error
			done, err = b.end(ctx, st, first)
			return err
		})
		s.forget(b)
		switch {
		case err != nil:
			return nil, revocation.Position{}, err
		case done:
			return []catalog.Entity{st.cur}, at, nil
		}
	}
}

const heldSQL = `
SELECT (SELECT count(*) FROM rescind.subscriptions WHERE application_id = $1),
       (SELECT count(*) FROM rescind.key_mappings WHERE application_id = $1)`

// end deletes st's application with all that it holds, or blocks it and deletes a part. With
// first, it ends the tokens also of one that is blocked already: they may have been kept.
func (b *batch) end(ctx context.Context, st *step, first bool) (done bool, err error) {
	a := st.cur.(*catalog.Application)
	var held, keys int
	if err := b.tx.QueryRow(ctx, heldSQL, a.ID).Scan(&held, &keys); err != nil {
		return false, b.failed("count what the application holds", err)
	}
	all := 1 + held + keys
	if !st.keepTokens {
		all += keys // revocations
	}
	if all <= maxEvents {
		if err := (applications{}).release(ctx, b, []*step{st}); err != nil {
			return false, b.failed("delete what the application holds", err)
		}
		return true, b.remove(ctx, applications{}, []*step{st})
	}
	if held == 0 {
		return false, st.fail(&Conflict{Slug: "limit", Detail: fmt.Sprintf("the application has %d consumer keys: delete some first", keys)})
	}
	app := &step{op: Update, cur: a, want: copyOf(a), keepTokens: st.keepTokens}
	if err := b.block(ctx, app, true, applicationDeleted, first); err != nil {
		return false, err
	}
	entities, err := b.fetch(ctx, subscriptions{}, subscriptionsOfSQL, []int32{a.ID}, maxEvents-b.size())
	if err != nil {
		return false, b.failed("read subscriptions", err)
	}
	run := make([]*step, len(entities))
	for i, e := range entities {
		run[i] = &step{op: Delete, cur: e, reason: applicationDeleted}
	}
	return false, b.remove(ctx, subscriptions{}, run)
}
