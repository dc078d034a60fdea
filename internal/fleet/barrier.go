package fleet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// Barrier is what to wait for.
type Barrier struct {
	revocation.Position
	// Select says which gateways count; nil: all do. It must be quick, and call no method of the fleet.
	Select func(*Gateway) bool
}

// BarrierResult says who has applied a position.
type BarrierResult struct {
	// Reached: every live gateway that counts has.
	Reached  bool
	Gateways []Confirmation // sorted by ID; those that count
	Took     time.Duration
}

// Confirmation is a gateway at a barrier.
type Confirmation struct {
	Gateway
	// Applied: it is live and has. What is lost never has.
	Applied bool
	// After is how long after the barrier began that was known, 0 if it was before.
	After time.Duration
}

// waiting is a barrier that somebody waits at. It belongs to the Fleet's mutex. What a report changes of
// it is found without looking at the other gateways.
type waiting struct {
	Barrier
	began   time.Time
	pending map[string]*gateway // those that it waits for
	after   map[string]time.Duration
	wake    chan struct{}
}

// observe notes what a report says of g. It needs f.mu.
func (w *waiting) observe(f *Fleet, g *gateway, now time.Time) {
	_, waits := w.pending[g.id]
	switch done := f.confirms(g, now) && applied(g.report.Position, w.Position); {
	case done && waits:
		delete(w.pending, g.id)
		w.after[g.id] = now.Sub(w.began)
		if len(w.pending) == 0 {
			kick(w.wake)
		}
	case !done && !waits && f.standing(g, now) == Live && w.counts(f, g, now):
		w.pending[g.id] = g
		delete(w.after, g.id)
		kick(w.wake) // it may be the next one to be lost
	}
}

func (w *waiting) counts(f *Fleet, g *gateway, now time.Time) bool {
	if w.Select == nil {
		return true
	}
	v := f.view(g, now)
	return w.Select(&v)
}

// drop is about a gateway that is removed.
func (w *waiting) drop(id string) {
	if _, waits := w.pending[id]; waits {
		delete(w.pending, id)
		kick(w.wake)
	}
}

// prune stops waiting for the lost, and returns when the next one will be. It needs f.mu.
func (w *waiting) prune(f *Fleet, now time.Time) (next time.Time) {
	for id, g := range w.pending {
		switch at := f.expiry(g); {
		case now.After(at):
			delete(w.pending, id)
		case next.IsZero() || at.Before(next):
			next = at
		}
	}
	return next
}

// Wait waits until every live gateway that counts has applied b's position, those included that report
// for the first time meanwhile, or until ctx ends; that is no error. A gateway that is lost meanwhile is
// no longer waited for. Its error is one of the database: other processes could not be asked.
func (f *Fleet) Wait(ctx context.Context, b Barrier) (BarrierResult, error) {
	w := &waiting{
		Barrier: b, began: time.Now(), pending: make(map[string]*gateway), after: make(map[string]time.Duration),
		wake: make(chan struct{}, 1),
	}
	f.mu.Lock()
	f.barriers[w] = struct{}{}
	for _, g := range f.gateways {
		w.observe(f, g, w.began)
	}
	q, done := f.open(message{Confirm: b.Position}, never)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.barriers, w)
		f.mu.Unlock()
		done()
		f.metrics.barriers.Observe(time.Since(w.began).Seconds())
	}()
	if err := f.pose(ctx, q); err != nil && ctx.Err() == nil {
		return BarrierResult{}, fmt.Errorf("ask for a barrier at %s: %w", b.Position, err)
	}
	patience := w.began.Add(answerWithin)
	t := time.NewTimer(answerWithin)
	defer t.Stop()
	for synced := false; ; {
		f.mu.Lock()
		now := time.Now()
		next := w.prune(f, now)
		answered, without := f.talk.answered(q, now)
		late := !answered && now.After(patience)
		if (late || without) && !synced && ctx.Err() == nil {
			if late {
				f.talk.missed(q, now)
			}
			f.mu.Unlock()
			// Gateways of a process that does not answer are known to the database.
			if err := f.sync(ctx, nil, false); err != nil && ctx.Err() == nil {
				return BarrierResult{}, fmt.Errorf("wait at %s: %w", b.Position, err)
			}
			synced = true
			continue
		}
		known := answered && !without || synced
		if known && len(w.pending) == 0 || ctx.Err() != nil {
			r := w.result(f, now)
			// It may be that one was lost a moment ago, and is back.
			if r.Reached = r.Reached && known; r.Reached || ctx.Err() != nil {
				f.mu.Unlock()
				return r, nil
			}
		}
		f.mu.Unlock()
		if !known && (next.IsZero() || patience.Before(next)) {
			next = patience
		}
		if next.IsZero() {
			next = now.Add(answerWithin)
		}
		t.Reset(max(next.Sub(now), time.Millisecond))
		select {
		case <-w.wake:
		case <-t.C:
		case <-ctx.Done():
		}
	}
}

// result needs f.mu.
func (w *waiting) result(f *Fleet, now time.Time) BarrierResult {
	r := BarrierResult{Reached: true, Took: now.Sub(w.began)}
	for _, g := range f.gateways {
		v := f.view(g, now)
		if w.Select != nil && !w.Select(&v) {
			continue
		}
		c := Confirmation{Gateway: v, Applied: v.Standing == Live && v.Applied(w.Position)}
		if c.Applied {
			c.After = w.after[g.id]
		} else if v.Standing == Live {
			r.Reached = false
			w.pending[g.id] = g
		}
		r.Gateways = append(r.Gateways, c)
	}
	slices.SortFunc(r.Gateways, func(a, b Confirmation) int { return cmp.Compare(a.ID, b.ID) })
	return r
}

// Refresh asks all processes for what they know now, and waits for it a second at most. What does not
// answer by then is passed over, and not waited for again until it answers, or for ten seconds: the
// gateways that may report to it are not lost for that, and confirm nothing once they were silent for
// their lease. Errors: that of ctx, or one of the database.
func (f *Fleet) Refresh(ctx context.Context) error {
	called := time.Now()
	select {
	case f.talk.refreshing <- struct{}{}:
		defer func() { <-f.talk.refreshing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if f.talk.refreshed.After(called) { // somebody else has asked since
		return nil
	}
	began := time.Now()
	parent := ctx
	ctx, cancel := context.WithTimeoutCause(ctx, answerWithin, errNoAnswer)
	defer cancel()
	f.mu.Lock()
	q, done := f.open(message{}, never)
	f.mu.Unlock()
	defer done()
	err := f.pose(ctx, q)
	for err == nil {
		f.mu.Lock()
		read := f.talk.read
		answered, without := f.talk.answered(q, time.Now())
		f.mu.Unlock()
		if answered && !without {
			break
		}
		if !answered {
			select {
			case <-read:
				continue
			case <-ctx.Done():
			}
			if !errors.Is(context.Cause(ctx), errNoAnswer) {
				return ctx.Err()
			}
			f.mu.Lock()
			f.talk.missed(q, time.Now())
			f.mu.Unlock()
		}
		// Gateways of a process that does not answer are known to the database.
		err = f.sync(parent, nil, false)
		break
	}
	if err == nil {
		err = f.readChanged(parent)
	}
	if err != nil {
		return fmt.Errorf("ask other processes for their gateways: %w", err)
	}
	f.talk.refreshed = began
	return nil
}

var errNoAnswer = errors.New("not all processes have answered in time")
