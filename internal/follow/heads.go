package follow

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// freshWait bounds a read of the head, and the wait for the replica to get there.
const freshWait = 5 * time.Second

// headRead is one read, for all who can use it. What it found may be read once done is
// closed.
type headRead struct {
	done    chan struct{}
	started time.Time // under heads.mu; zero until it has begun
	at      revocation.Position
	err     error
}

// heads are the reads of the log's head: the last that succeeded, one that is under
// way and one that is to come.
type heads struct {
	wanted chan struct{} // tells readHeads that next is there

	mu            sync.Mutex
	last          revocation.Position
	lastStarted   time.Time
	running, next *headRead
	stopped       bool
}

func newHeads() *heads { return &heads{wanted: make(chan struct{}, 1)} }

// newest is the zero value if nothing is known.
func (h *heads) newest() revocation.Position {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.last
}

// forget drops a head of another epoch than the one that the state was loaded in now:
// it was read before.
func (h *heads) forget(now revocation.Epoch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.last.Epoch != now {
		h.last, h.lastStarted = revocation.Position{}, time.Time{}
	}
}

// join returns a head that was read at most maxAge ago, or the read to wait for. With a
// maxAge of 0 that is one that has not begun yet.
func (h *heads) join(maxAge time.Duration) (revocation.Position, *headRead) {
	h.mu.Lock()
	defer h.mu.Unlock()
	recent := func(started time.Time) bool { return maxAge > 0 && time.Since(started) <= maxAge }
	switch {
	case recent(h.lastStarted):
		return h.last, nil
	case h.running != nil && recent(h.running.started):
		return h.last, h.running
	case h.next == nil:
		h.next = &headRead{done: make(chan struct{})}
		if h.stopped {
			h.next.err = errStopped
			close(h.next.done)
			return h.last, h.next
		}
		select {
		case h.wanted <- struct{}{}:
		default:
		}
	}
	return h.last, h.next
}

var errStopped = errors.New("the service is stopping")

// begin makes the read that is to come the one that is under way.
func (h *heads) begin() *headRead {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.next
	if r == nil { // nobody waits for it: a poll
		r = &headRead{done: make(chan struct{})}
	}
	select {
	case <-h.wanted: // this is the one
	default:
	}
	r.started = time.Now()
	h.running, h.next = r, nil
	return r
}

func (h *heads) finish(r *headRead, at revocation.Position, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.at, r.err = at, err
	if err == nil {
		h.last, h.lastStarted = at, r.started
	}
	h.running = nil
	close(r.done)
}

// stop fails who waits, now and later.
func (h *heads) stop() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stopped = true
	if h.next != nil {
		h.next.err = errStopped
		close(h.next.done)
	}
}

// readHeads reads the head whenever somebody wants to know, and when nobody did for a
// while.
func (f *Follower) readHeads(ctx context.Context) {
	defer f.heads.stop()
	pause, down := f.cfg.PollEvery, false
	wait := newWait()
	for {
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-f.heads.wanted:
			t.Stop()
		case <-ctx.Done():
			t.Stop()
			return
		}
		r := f.heads.begin()
		rctx, cancel := context.WithTimeoutCause(ctx, freshWait, fmt.Errorf("no answer within %s", freshWait))
		at, err := f.source.Head(rctx)
		cancel()
		f.heads.finish(r, at, err)
		if ctx.Err() != nil {
			return
		}
		f.metrics.readHead(err)
		if err != nil {
			if !down {
				f.log.Warn("cannot read the log's head, what is served may be old; it is tried until it is back", "error", err)
				down = true
			}
			pause = max(f.cfg.PollEvery, wait.NextBackOff())
			continue
		}
		if down {
			f.log.Info("reads the log's head again")
			down = false
		}
		wait.Reset()
		pause = max(0, f.cfg.PollEvery-time.Since(r.started))
		if now := f.replica.At(); at.Epoch != now.Epoch || at.Seq > now.Seq {
			select {
			case f.behind <- struct{}{}:
			default:
			}
		}
	}
}

// Fresh waits until the replica has everything up to a head that was read from the
// database at most maxAge before the call, or after it with 0, and returns that head.
// Any number of callers share one read. It waits for some seconds at most. Errors:
// [ErrStale], ctx's.
func (f *Follower) Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error) {
	head, read := f.heads.join(maxAge)
	if read == nil && f.reached(head) {
		return head, nil
	}
	bound := time.NewTimer(freshWait)
	defer bound.Stop()
	if read != nil {
		select {
		case <-read.done:
		case <-bound.C:
			return head, fmt.Errorf("%w: the log's head was not read within %s", ErrStale, freshWait)
		case <-ctx.Done():
			return head, context.Cause(ctx)
		}
		if read.err != nil {
			return head, fmt.Errorf("%w: %w", ErrStale, read.err)
		}
		head = read.at
	}
	return f.await(ctx, head, bound.C)
}

// await waits until the replica has reached head, or bound fires.
func (f *Follower) await(ctx context.Context, head revocation.Position, bound <-chan time.Time) (revocation.Position, error) {
	for {
		changed := f.Changed()
		if f.reached(head) {
			return head, nil
		}
		select {
		case <-changed:
		case <-bound:
			return head, fmt.Errorf("%w: the log is at %s, this process at %s", ErrStale, head, f.position())
		case <-ctx.Done():
			return head, context.Cause(ctx)
		}
	}
}

// Reach waits until the replica is at p, or past it in p's epoch. It asks nobody, and takes no
// lock where p is reached. It waits for some seconds at most. Errors: [ErrStale], ctx's.
func (f *Follower) Reach(ctx context.Context, p revocation.Position) error {
	if at := f.replica.At(); at.Epoch == p.Epoch && at.Seq >= p.Seq {
		return nil
	}
	bound := time.NewTimer(freshWait)
	defer bound.Stop()
	_, err := f.await(ctx, p, bound.C)
	return err
}

func (f *Follower) reached(head revocation.Position) bool {
	at := f.position()
	return at.Epoch == head.Epoch && at.Seq >= head.Seq
}
