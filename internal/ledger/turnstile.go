package ledger

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
)

// maxChangesWaiting is how many changes may wait for their turn, and changeWait for how
// long: more than that and their callers should come back later.
const (
	maxChangesWaiting = 64
	changeWait        = 2 * time.Second
)

// turnstile lets a few in at a time, and a few wait for a while.
type turnstile struct {
	inside  chan struct{} // has one for each who is in
	waiting atomic.Int32
}

func newTurnstile(n int) *turnstile { return &turnstile{inside: make(chan struct{}, n)} }

// enter returns nil once the caller is in, and must leave again.
func (t *turnstile) enter(ctx context.Context) error {
	select {
	case t.inside <- struct{}{}:
		return nil
	default:
	}
	defer t.waiting.Add(-1)
	if t.waiting.Add(1) > maxChangesWaiting {
		return fmt.Errorf("%w: %d changes wait for their turn", ErrBusy, maxChangesWaiting)
	}
	timeout := time.NewTimer(changeWait)
	defer timeout.Stop()
	select {
	case t.inside <- struct{}{}:
		return nil
	case <-timeout.C:
		return fmt.Errorf("%w: the change had no turn within %s", ErrBusy, changeWait)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t *turnstile) leave() { <-t.inside }
