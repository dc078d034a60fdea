package revoke

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/rescindhq/rescind/internal/ledger"
)

const (
	// maxHeavy is how many previews, and plans of more than maxLight orders, are worked on at a
	// time, and maxWaiting how many more may wait.
	maxHeavy   = 2
	maxWaiting = 8
	maxLight   = 100
)

// turns lets maxHeavy in at a time.
type turns struct {
	inside  chan struct{} // has one for each who is in
	waiting atomic.Int32
}

// enter returns nil once the caller is in, and must leave again; else [ledger.ErrBusy], or why
// ctx has ended.
func (t *turns) enter(ctx context.Context) error {
	select {
	case t.inside <- struct{}{}:
		return nil
	default:
	}
	defer t.waiting.Add(-1)
	if t.waiting.Add(1) > maxWaiting {
		return fmt.Errorf("%w: %d large requests and previews wait for their turn", ledger.ErrBusy, maxWaiting)
	}
	select {
	case t.inside <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t *turns) leave() { <-t.inside }

// planInTurn is plan, in its turn if there are many orders.
func (r *Revoker) planInTurn(ctx context.Context, by Caller, orders []Order) (*planner, []plan, error) {
	if len(orders) > maxLight {
		if err := r.turns.enter(ctx); err != nil {
			return nil, nil, err
		}
		defer r.turns.leave()
	}
	return r.plan(ctx, by, orders)
}
