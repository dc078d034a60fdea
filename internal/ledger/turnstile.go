package ledger

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
)

// maxChangesWaiting is how many changes may wait for their turn, and changeWait for how
// long: more than that and their callers should come back later. A bulk takes much longer
// than a change. Small lists of revocations take a few milliseconds each, and are many when
// something was stolen.
const (
	maxChangesWaiting = 64
	changeWait        = 2 * time.Second
	maxBulksWaiting   = 4
	bulkWait          = 10 * time.Second
	smallsInside      = 2
	maxSmallsWaiting  = 256
)

// turnstile lets a few in at a time, and a few wait for a while.
type turnstile struct {
	what     string        // for errors: who passes
	inside   chan struct{} // has one for each who is in
	most     int32         // that may wait
	patience time.Duration
	waiting  atomic.Int32
}

func newTurnstile(what string, n int, most int32, patience time.Duration) *turnstile {
	return &turnstile{what: what, inside: make(chan struct{}, n), most: most, patience: patience}
}

// enter returns nil once the caller is in, and must leave again.
func (t *turnstile) enter(ctx context.Context) error {
	select {
	case t.inside <- struct{}{}:
		return nil
	default:
	}
	defer t.waiting.Add(-1)
	if t.waiting.Add(1) > t.most {
		return fmt.Errorf("%w: %d %s wait for their turn", ErrBusy, t.most, t.what)
	}
	timeout := time.NewTimer(t.patience)
	defer timeout.Stop()
	select {
	case t.inside <- struct{}{}:
		return nil
	case <-timeout.C:
		return fmt.Errorf("%w: other %s left no turn within %s", ErrBusy, t.what, t.patience)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t *turnstile) leave() { <-t.inside }
