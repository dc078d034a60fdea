package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// mender lets any number of goroutines ask for what is missing, and one fetch it from the source for
// all of them: whoever asks is served by an attempt that began afterwards.
type mender struct {
	ring  chan struct{} // something was asked for
	hurry chan struct{} // try again now

	mending sync.Mutex
	asked   uint64 // how often
	begun   uint64 // up to which of them the last attempt is for
	served  uint64 // up to which of them one has succeeded
	goal    goal   // of those that no attempt has begun for
	running bool
	since   time.Time     // when it began
	failing bool          // the last attempt that ended has failed
	err     error         // why
	ended   chan struct{} // closed and replaced when an attempt has ended
}

// goal is what an attempt is to come to, besides to how far the source's log reaches.
type goal struct {
	// Position has to be reached, unless the state comes to be of another epoch.
	revocation.Position
	// load: the events that follow cannot be used, or do not tell what has to be known.
	load bool
	// repair: the state is not what the log says. A snapshot is to take its place, though events go on.
	// That is tried once, and nothing else depends on it.
	repair bool
}

// and is g and h, or of two epochs that of h.
func (g goal) and(h goal) goal {
	if h.Epoch != "" && (h.Epoch != g.Epoch || h.Seq > g.Seq) {
		g.Position = h.Position
	}
	g.load, g.repair = g.load || h.load, g.repair || h.repair
	return g
}

func newMender() mender {
	return mender{ring: make(chan struct{}, 1), hurry: make(chan struct{}, 1), ended: make(chan struct{})}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it is on its way
	}
}

// ask asks for g, and returns the number for await.
func (m *mender) ask(g goal) uint64 {
	m.mending.Lock()
	defer m.mending.Unlock()
	m.asked++
	m.goal = m.goal.and(g)
	signal(m.ring)
	return m.asked
}

// pending reports whether something was asked for that is not served.
func (m *mender) pending() bool {
	m.mending.Lock()
	defer m.mending.Unlock()
	return m.served < m.asked
}

// errLate is that nobody waits for the source any longer.
var errLate = errors.New("the source cannot be asked now, or takes long")

// patience is how long those who have something to tell wait for an attempt. It goes on without them.
const patience = 2 * time.Second

// await waits until number n is served, and returns the error of an attempt for it that failed. It
// waits for no attempt longer than patience, and not at all while the source fails; with insist as long as it
// takes, and has the source asked at once.
func (m *mender) await(ctx context.Context, n uint64, insist bool) error {
	for {
		m.mending.Lock()
		ended, running, left := m.ended, m.running, patience
		if running {
			left -= time.Since(m.since)
		}
		over, err := true, error(nil)
		switch {
		case m.served >= n:
		case m.failing && m.begun >= n && !running:
			err = m.err
		case !insist && (m.failing || left <= 0):
			err = errLate
		default:
			over = false
		}
		m.mending.Unlock()
		switch {
		case over:
			return err
		case !insist:
			if !sleep(ctx, left, ended) {
				return context.Cause(ctx)
			}
			continue
		case !running:
			signal(m.hurry)
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// isServed reports whether number n is.
func (m *mender) isServed(n uint64) bool {
	m.mending.Lock()
	defer m.mending.Unlock()
	return m.served >= n
}

// settle waits for the attempt that runs, if there is one: it may bring what is missing.
func (m *mender) settle(ctx context.Context) {
	m.mending.Lock()
	ended, left := m.ended, patience-time.Since(m.since)
	wait := m.running && !m.failing && left > 0
	m.mending.Unlock()
	if wait {
		sleep(ctx, left, ended)
	}
}

// begin returns what an attempt has to come to; false if there is nothing to do.
func (m *mender) begin() (goal, bool) {
	m.mending.Lock()
	defer m.mending.Unlock()
	if m.served == m.asked {
		return goal{}, false
	}
	m.begun, m.running, m.since = m.asked, true, time.Now()
	g := m.goal
	m.goal = goal{}
	return g, true
}

// end notes how an attempt for g went.
func (m *mender) end(g goal, err error) {
	m.mending.Lock()
	defer m.mending.Unlock()
	m.running, m.failing, m.err = false, err != nil, err
	if err == nil {
		m.served = m.begun
	} else {
		m.goal = g.and(m.goal)
	}
	close(m.ended)
	m.ended = make(chan struct{})
}

// backoff makes waits that grow, and differ from those of others.
type backoff struct{ last time.Duration }

const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = 5 * time.Second
)

// next is how long to wait after err, and how long of that at least, whoever is in a hurry.
func (b *backoff) next(err error) (least, all time.Duration) {
	b.last = min(max(2*b.last, minBackoff), maxBackoff)
	least, all = minBackoff/2, b.last/2+rand.N(b.last/2)
	told := time.Duration(0)
	if e, ok := errors.AsType[*refusal](err); ok {
		told = e.wait
	} else if e, ok := errors.AsType[*laterError](err); ok {
		told = e.wait
	}
	if told > 0 {
		least = told
		all = max(all, told+rand.N(told/4+1)) // nobody comes sooner than told, nor all at once
	}
	return least, all
}

func (b *backoff) reset() { b.last = 0 }

// sleep waits for d, or until sooner can be received from. It reports whether ctx goes on.
func sleep(ctx context.Context, d time.Duration, sooner <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-sooner:
	case <-ctx.Done():
		return false
	}
	return true
}

// serve fetches what is asked for until ctx ends.
func (r *Replica) serve(ctx context.Context) {
	var wait backoff
	behind := 0
	for {
		select {
		case <-r.ring:
		case <-ctx.Done():
			return
		}
		for {
			g, ok := r.begin()
			if !ok {
				break
			}
			err := r.attempt(ctx, g)
			if ctx.Err() != nil {
				return
			}
			g.repair = false // it is tried once
			r.sourceFails(err)
			if errors.Is(err, errBehind) {
				// A feed that tells of what is not in the log must not keep this going.
				if behind++; behind == maxBehind {
					r.log.Warn("a feed has told of events that the source does not have; it is not waited for them any more", "goal", g.Position)
					err, behind = nil, 0
				}
			} else {
				behind = 0
			}
			r.end(g, err)
			if err == nil {
				wait.reset()
				continue
			}
			least, most := wait.next(err)
			if !sleep(ctx, least, nil) || !sleep(ctx, most-least, r.hurry) {
				return
			}
		}
	}
}

// errBehind is that the source's log ends before what a feed has told of.
var errBehind = errors.New("the source does not have what a feed has told of")

// maxBehind is how often a source may be asked in vain for what a feed has told of: for some 20 s.
const maxBehind = 10

// attempt fetches what follows the state, or a snapshot if there is no other way.
func (r *Replica) attempt(ctx context.Context, g goal) error {
	defer func() { r.age.reached(r.state.At()) }()
	repaired := g.repair && r.repaired(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if r.state.At().Epoch != "" && !g.load && !repaired {
		err := r.catchUp(ctx, g)
		useless, ok := errors.AsType[*uselessError](err)
		if !ok {
			return err
		}
		r.log.Info("a snapshot is needed", "position", r.state.At(), "reason", useless.cause)
	}
	if !repaired {
		if err := r.load(ctx); err != nil {
			return err
		}
	}
	// A snapshot may be a little older than the question.
	err := r.catchUp(ctx, g)
	if useless, ok := errors.AsType[*uselessError](err); ok && errors.Is(err, ErrGone) && r.scope.Load().revocationsOnly {
		return useless.reached // it has snapshots only
	}
	return err
}

// uselessError is that events cannot lead the state further, and a snapshot is needed.
type uselessError struct {
	cause   error
	reached error // whether the goal is reached
}

func (e *uselessError) Error() string { return e.cause.Error() }
func (e *uselessError) Unwrap() error { return e.cause }

// catchUp applies events of the source up to the head that it tells first, and to g.
func (r *Replica) catchUp(ctx context.Context, g goal) error {
	var head revocation.Seq
	fetched := false
	defer func() {
		if fetched {
			r.mu.Lock()
			r.deltas++
			r.mu.Unlock()
		}
	}()
	reached := func() error {
		if at := r.state.At(); at.Epoch == g.Epoch && at.Seq < g.Seq {
			return fmt.Errorf("reach %s, come to %s: %w", g.Position, at, errBehind)
		}
		return nil
	}
	useless := func(err error) error { return &uselessError{err, reached()} }
	for first := true; ; first = false {
		at, asked := r.state.At(), r.now()
		page, err := r.cfg.Source.Events(ctx, at)
		if errors.Is(err, ErrGone) {
			return useless(err)
		} else if err != nil {
			return err
		}
		if first {
			head = max(page.Head, page.Through)
		}
		for _, e := range page.Events {
			if r.scope.Load().learns(e.Tenant.Domain) {
				return useless(fmt.Errorf("the source is about tenant %s too, the state is not", e.Tenant.Domain))
			}
			if err := r.apply(e); err != nil {
				return useless(err)
			}
			fetched = true
		}
		if err := r.state.Through(revocation.Position{Epoch: at.Epoch, Seq: page.Through}); err != nil {
			return useless(err)
		}
		known := page.Head >= page.Through
		if known {
			r.logReaches(revocation.Position{Epoch: at.Epoch, Seq: page.Head})
			r.age.saw(revocation.Position{Epoch: at.Epoch, Seq: page.Head}, r.state.At(), asked.add(-headAge))
		}
		if page.Through <= at.Seq || known && page.Through >= head && reached() == nil {
			return reached()
		}
	}
}

// laterError is that something was done too often.
type laterError struct{ wait time.Duration }

func (e *laterError) Error() string {
	return fmt.Sprintf("%d snapshots were loaded within %s: the next one has to wait", loadsAtOnce, loadsWithin)
}

// No more than loadsAtOnce snapshots are loaded within loadsWithin, whatever asks for them. Each
// takes much of the service's network, and none is needed often.
const (
	loadsAtOnce = 3
	loadsWithin = 30 * time.Second
)

// load replaces the state by a snapshot. Only serve's goroutine calls it.
func (r *Replica) load(ctx context.Context) error {
	asked := r.now()
	if n := len(r.loads); n >= loadsAtOnce {
		if wait := loadsWithin - asked.since(r.loads[n-loadsAtOnce]); wait > 0 {
			return &laterError{wait}
		}
	}
	if err := r.cfg.Source.Load(ctx, r.state); err != nil {
		return err
	}
	if r.state.At().Epoch == "" {
		return errors.New("load snapshot: the source has loaded nothing")
	}
	r.loads = append(r.loads, r.now())
	r.loads = r.loads[max(0, len(r.loads)-loadsAtOnce):]
	r.rescope()
	r.logReaches(revocation.Position{Epoch: r.state.At().Epoch})
	r.mu.Lock()
	r.snapshots++
	r.from = "source"
	r.mu.Unlock()
	r.log.Info("a snapshot was loaded", "position", r.state.At(), "took", r.now().since(asked))
	signal(r.save) // what the folder has is another state
	return nil
}

const (
	// snapshotAge is how old a snapshot may be that the service has at hand (GET /v1/snapshots).
	snapshotAge = 2 * time.Second
	// A repair takes no longer than maxRepair: until it ends nothing that is missing is fetched. Nor does it
	// take more than half of the age past which requests are refused, if that leaves it minRepair.
	minRepair = 5 * time.Second
	maxRepair = 30 * time.Second
)

// errRepairLate is the cause of repairs that are given up.
var errRepairLate = errors.New("it takes long")

// repaired is repair, and reports whether it went well. If not, the state goes on as it is: it is not worse
// than before, and the service asks again.
func (r *Replica) repaired(ctx context.Context) bool {
	within := r.cfg.Staleness.Max
	for _, route := range r.cfg.Routes {
		within = min(within, route.Max)
	}
	repair, cancel := context.WithTimeoutCause(ctx, min(max(within/2, minRepair), maxRepair), errRepairLate)
	defer cancel()
	err := r.repair(repair)
	if err != nil && ctx.Err() == nil {
		r.log.Warn("what is known here differs from the log and was not repaired, until the service asks again", "position", r.state.At(), "error", err)
	}
	return err == nil
}

// repair is load for a state that is not what the log says at its position, while events go on. The service
// may have a snapshot at hand that is older than the state was then; then it makes another one in a moment.
func (r *Replica) repair(ctx context.Context) error {
	defer r.state.repairable()()
	before := r.state.loadCount()
	for again := false; ; again = true {
		if err := r.load(ctx); err != nil {
			return err
		}
		switch {
		case r.state.loadCount() != before:
			return nil
		case again:
			return errors.New("the source's snapshot is older than what was known before, or too much has changed since")
		case !sleep(ctx, snapshotAge+snapshotAge/4, nil):
			return context.Cause(ctx)
		}
	}
}

// scope is what a state is about. There is a new one when that, or the epoch, has changed.
type scope struct {
	epoch           revocation.Epoch
	tenants         map[string]bool // nil: all
	revocationsOnly bool
	reloaded        atomic.Bool // because of a tenant that it is not about
}

// whole reports whether the state goes by every event of the log.
func (s *scope) whole() bool { return s.tenants == nil && !s.revocationsOnly }

// about reports whether the state is about a tenant.
func (s *scope) about(domain string) bool { return s.tenants == nil || s.tenants[domain] }

// within reports whether all that the state is about are among tenants, which are all if nil.
func (s *scope) within(tenants []string) bool {
	if tenants == nil || s.tenants == nil {
		return tenants == nil
	}
	for domain := range s.tenants {
		if !slices.Contains(tenants, domain) {
			return false
		}
	}
	return true
}

// learns reports, once, that the source has events of a tenant that the state is not about: the
// account may see more than it did.
func (s *scope) learns(domain string) bool {
	return !s.about(domain) && s.reloaded.CompareAndSwap(false, true)
}

// rescope looks at what the state is about.
func (r *Replica) rescope() {
	next := new(scope)
	r.state.View(func(v *View) {
		if p := v.content.part; p != nil {
			next.tenants, next.revocationsOnly = p.tenants, p.revocationsOnly
		}
		next.epoch = v.At().Epoch
	})
	if old := r.scope.Load(); old == nil || !old.equal(next) {
		r.scope.Store(next)
	}
}

func (s *scope) equal(o *scope) bool { return s.epoch == o.epoch && s.sameBut(o) }

// sameBut reports whether s and o are the same, but for the epoch.
func (s *scope) sameBut(o *scope) bool {
	return s.revocationsOnly == o.revocationsOnly && (s.tenants == nil) == (o.tenants == nil) && maps.Equal(s.tenants, o.tenants)
}

// throughIn is Through for a state that is of scope, and reports whether it is: a snapshot of another
// one may have been loaded a moment ago, of which p says nothing.
func (s *State) throughIn(p revocation.Position, scope *scope) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, part := s.At(), s.content.part
	if part == nil || at.Epoch != p.Epoch || at.Epoch != scope.epoch || !maps.Equal(part.tenants, scope.tenants) ||
		(part.tenants == nil) != (scope.tenants == nil) || part.revocationsOnly != scope.revocationsOnly {
		return false
	}
	if p.Seq > at.Seq {
		part.passed(p.Seq)
		s.move(p)
	}
	return true
}
