package replica

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

const (
	// tickEvery is how often it is looked at what is due.
	tickEvery = 500 * time.Millisecond
	// freshEvery is how often the folder is told how old the state is, at most.
	freshEvery = 2 * time.Second
	// pollEvery is the time between questions to the source while no feed is connected, and while
	// what the feeds tell is older than oldAge: their heartbeats may be late, or their clocks wrong, and
	// the source knows.
	pollEvery = 3 * time.Second
	oldAge    = 10 * time.Second
	// steady is how long a connection must have lasted to be no part of a series that fails.
	steady = 10 * time.Second
	// What the source is about only a snapshot tells. One of a part of the log is loaded when the
	// source's own feed connects, and besides this often, without feeds and with some.
	scopeEvery       = time.Minute
	scopeEveryBeside = 10 * time.Minute
)

// Run keeps the replica up to date until ctx ends, then returns nil. It is called once: to call it again,
// or after Close, is an error. What fails is tried again, with growing waits of 5 s at most unless the
// service asks for more; it is logged and told by Status. It returns up to half a second after ctx has ended, for
// the service is told then that this replica stops; the folder is given back before that.
func (r *Replica) Run(ctx context.Context) error {
	if r.used.Swap(true) {
		return errors.New("run replica: it was run or closed before, and has to be made anew")
	}
	var all sync.WaitGroup
	r.ask(goal{load: r.isPart()}) // what the source is about may have changed since the folder was written
	all.Go(func() { r.serve(ctx) })
	for _, f := range r.feeds {
		all.Go(func() { r.follow(ctx, f) })
	}
	if r.folder != nil {
		all.Go(func() { r.keepSaving(ctx) })
	}
	var tells *teller
	if r.cfg.Reporter != nil {
		tells = newTeller(r)
		all.Go(func() { tells.run(ctx) })
	}
	r.watch(ctx)
	all.Wait()
	if r.folder != nil {
		r.keepFresh()
		if err := r.folder.close(); err != nil {
			r.folderFails(err)
		}
	}
	if tells != nil {
		tells.leave(ctx)
	}
	return nil
}

// watch does what is due by the clock.
func (r *Replica) watch(ctx context.Context) {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	var ticked, kept instant
	polled, poll := r.now(), jittered(pollEvery)
	scoped := polled
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now := r.now()
		r.age.reached(r.state.At())
		r.checkExpectations(now)
		if now.since(ticked) >= time.Second {
			ticked = now
			r.state.tick(time.Now())
		}
		if r.folder != nil && now.since(kept) >= freshEvery {
			kept = now
			r.keepFresh()
		}
		switch {
		case r.pending():
			polled = now
		case r.scopeDue(now.since(scoped)):
			r.ask(goal{load: true})
			scoped = now
		case now.since(polled) >= poll && (!r.connected(nil) || r.age.of(now) > oldAge && !r.scope.Load().revocationsOnly):
			r.ask(goal{})
			polled, poll = now, jittered(pollEvery)
		}
	}
}

// isPart reports whether the state is known, and not whole.
func (r *Replica) isPart() bool { return r.state.At().Epoch != "" && !r.scope.Load().whole() }

// scopeDue reports whether a snapshot is to tell what the source is about, which was asked for so long
// ago. A source of revocations only is about nothing else.
func (r *Replica) scopeDue(since time.Duration) bool {
	if since < scopeEvery || !r.isPart() {
		return false
	}
	return !r.connected(nil) || since >= scopeEveryBeside && !r.scope.Load().revocationsOnly
}

func jittered(d time.Duration) time.Duration { return d - d/6 + rand.N(d/3) }

// connected reports whether a feed is connected, but for one.
func (r *Replica) connected(but *feed) bool {
	for _, f := range r.feeds {
		if f != but && f.status().Connected {
			return true
		}
	}
	return false
}

// expectation is that the state comes to a position without help until it is due. Of each kind there
// is one at a time; heartbeats renew it.
type expectation struct {
	revocation.Position
	due instant
}

const (
	ofOthers     = iota // another feed brings what a heartbeat says was told
	ofHead              // this feed brings what the log has
	expectations        // how many kinds there are
)

// The patience with each kind. A position that moves by heartbeats alone may be as late as these are.
const (
	otherPatience = tickEvery
	headPatience  = 3 * time.Second
	partPatience  = 7 * time.Second
)

func (r *Replica) expect(kind int, p revocation.Position, within time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := &r.expected[kind]; e.Epoch != p.Epoch || reached(r.state.At(), e.Position) {
		*e = expectation{p, r.now().add(within)}
	}
}

// reached reports whether the position at has p, or will never have it.
func reached(at, p revocation.Position) bool { return at.Epoch != p.Epoch || at.Seq >= p.Seq }

func (r *Replica) checkExpectations(now instant) {
	at := r.state.At()
	r.mu.Lock()
	var missed []goal
	for kind := range r.expected {
		e := &r.expected[kind]
		if e.Epoch == "" || now.mono < e.due.mono {
			continue
		}
		if !reached(at, e.Position) {
			missed = append(missed, goal{Position: e.Position})
		}
		*e = expectation{}
	}
	r.mu.Unlock()
	for _, g := range missed {
		r.ask(g)
	}
}

// feed is a Feed and how it does.
type feed struct {
	Feed
	isSource bool
	delays   delays // of Follow's goroutine

	mu   sync.Mutex
	told revocation.Position // everything that it has for this reader, up to it, was told and applied
	is   FeedStatus
}

func (f *feed) status() FeedStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.is
	s.Name = f.Name()
	return s
}

// heard notes that something came.
func (f *feed) heard(events uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.is.Heard = time.Now().UnixMilli()
	f.is.Events += events
}

// at is where the feed may begin: where the state stands or, if that moves by heartbeats, where
// the feed has come since.
func (r *Replica) at(f *feed) revocation.Position {
	f.mu.Lock()
	told := f.told
	f.mu.Unlock()
	at := r.state.At()
	if told.Epoch == at.Epoch && told.Seq > at.Seq {
		return told
	}
	return at
}

// follow keeps f connected until ctx ends.
func (r *Replica) follow(ctx context.Context, f *feed) {
	var wait backoff
	log := r.log.With("feed", f.Name())
	for failed := false; ; failed = true {
		s := &session{r: r, f: f}
		err := f.Follow(ctx, func() revocation.Position { return r.at(f) }, s)
		if err == nil {
			err = errors.New("the feed has ended")
		}
		f.mu.Lock()
		was := f.is.Connected
		f.is.Connected, f.is.Error = false, err.Error()
		f.mu.Unlock()
		if ctx.Err() != nil {
			return
		}
		switch {
		case was && r.now().since(s.began) >= steady:
			wait.reset()
			failed = false
			fallthrough
		case !failed:
			log.Warn("the feed is not connected; it is tried again until it is", "error", err)
		default:
			log.Debug("the feed is still not connected", "error", err)
		}
		if _, d := wait.next(err); !sleep(ctx, d, nil) {
			return
		}
	}
}

// session is a connection of a feed: the [Receiver] that it tells. It is for one goroutine.
type session struct {
	r     *Replica
	f     *feed
	began instant // when it was connected
	// scope is what the state was about then. When it is about something else the session ends: what
	// the feed is about may have changed with it.
	scope *scope
	// asked is the number of what Connected asked the source for.
	asked uint64
	// ahead is where the state was when a heartbeat first told of a head below it. Zero: none does.
	ahead struct {
		revocation.Position
		since instant
	}
	// anchor is the scope in which the session has missed nothing after the state's position.
	anchor *scope
	// revocationsOnly: so is the feed.
	revocationsOnly bool
}

// connectPatience is how long a feed waits for what was before, if something is known: what it has
// to tell would be late.
const connectPatience = 5 * time.Second

// sure reports whether the feed is about the same as the state. The source's own is about what the
// source was about after it was connected, as a snapshot tells. What another one is about its heartbeats
// tell, if that may differ.
func (s *session) sure() bool {
	return !s.f.isSource || s.scope.whole() || s.r.isServed(s.asked)
}

// goesOn returns an error if the session has to begin anew, because the state is about something else.
func (s *session) goesOn() error {
	if now := s.r.scope.Load(); s.scope != now && !s.scope.sameBut(now) {
		return errors.New("what the account sees has changed: the feed begins anew")
	}
	return nil
}

// mend waits for what the source was asked for with number n, and reports whether that was done. If it
// was not, that is only an error if the feed cannot go on.
func (s *session) mend(ctx context.Context, n uint64, insist bool) (done bool, err error) {
	r := s.r
	known := r.state.At().Epoch != ""
	waiting := ctx
	if insist && known {
		var cancel context.CancelFunc
		waiting, cancel = context.WithTimeoutCause(ctx, connectPatience, errLate)
		defer cancel()
	}
	err = r.await(waiting, n, insist)
	if err != nil && ctx.Err() == nil && r.state.At().Epoch != "" {
		return false, nil
	}
	return err == nil, err
}

// Connected implements [Receiver].
func (s *session) Connected(ctx context.Context) error {
	s.anchor = nil
	s.f.heard(0)
	s.asked = s.r.ask(goal{load: s.f.isSource && s.r.isPart()})
	done, err := s.mend(ctx, s.asked, true)
	if err != nil {
		return err
	}
	s.scope = s.r.scope.Load()
	if done && s.f.isSource && s.scope.revocationsOnly {
		s.anchor = s.scope // the snapshot was of after the feed began
	}
	s.f.mu.Lock()
	was := s.f.is.Connected
	s.f.is.Connected, s.f.is.Error = true, ""
	s.f.told = revocation.Position{}
	s.f.mu.Unlock()
	if !was {
		s.began = s.r.now()
		s.r.log.Info("the feed is connected", "feed", s.f.Name(), "position", s.r.state.At())
	}
	return nil
}

// Event implements [Receiver].
func (s *session) Event(ctx context.Context, e revocation.Event) error {
	s.f.heard(1)
	r := s.r
	if err := s.goesOn(); err != nil {
		r.revokeAhead(e)
		return err
	}
	if s.f.isSource && r.scope.Load().learns(e.Tenant.Domain) {
		r.ask(goal{load: true})
	}
	err := r.apply(e)
	if errors.Is(err, ErrEpoch) {
		if r.isForeign(e.Epoch) {
			return nil
		}
		r.revokeAhead(e)
		if known, err := s.meet(ctx, e.Epoch); !known || err != nil {
			return err
		}
		err = r.apply(e)
	}
	if err == nil {
		s.tell(e.Position)
		return nil
	}
	// It is not applied: what was before it is missing, or it cannot be read. What is known of
	// it holds nevertheless.
	s.anchor = nil
	r.revokeAhead(e)
	g := goal{load: true}
	if errors.Is(err, ErrGap) {
		r.settle(ctx) // another feed may have missed the same
		if r.apply(e) == nil {
			return nil
		}
		g = goal{Position: revocation.Position{Epoch: e.Epoch, Seq: e.Seq - 1}}
	}
	done, err := s.mend(ctx, r.ask(g), false)
	if err != nil || !done {
		return err // if it is nil, what is missing comes later, and this event with it
	}
	if err := r.apply(e); errors.Is(err, ErrGap) {
		r.ask(goal{Position: e.Position})
	}
	return nil
}

// tell notes that the feed has come to p, and nothing is missing before.
func (s *session) tell(p revocation.Position) {
	if s.anchor == nil || s.anchor != s.r.scope.Load() || p.Epoch != s.anchor.epoch {
		return
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	s.f.told = p
}

// revokeAhead makes hold what e revokes, if it does and can be read, though e cannot be applied yet. What is
// of a tenant that the state is not about it would pass over.
func (r *Replica) revokeAhead(e revocation.Event) {
	if scope := r.scope.Load(); scope.epoch == e.Epoch && !scope.about(e.Tenant.Domain) {
		return
	}
	if rec, ok := recordOf(e); ok {
		r.revoke(rec, e.Position)
	}
}

// recordOf is what e revokes, if it does and can be read.
func recordOf(e revocation.Event) (Record, bool) {
	if !strings.HasPrefix(e.Type, "revocation.") {
		return Record{}, false
	}
	rev, err := e.Revocation()
	return Record{
		Target: rev.Target, Tenant: rev.Tenant, Exp: rev.Exp, NotAfter: rev.NotAfter, Signature: rev.Signature,
	}, err == nil
}

// Revoked implements [Receiver].
func (s *session) Revoked(rec Record, at revocation.Position) {
	s.f.heard(1)
	s.revocationsOnly = true
	s.r.revoke(rec, at)
}

// Heartbeat implements [Receiver].
func (s *session) Heartbeat(ctx context.Context, b Beat) error {
	s.f.heard(0)
	r := s.r
	if err := s.goesOn(); err != nil {
		return err
	}
	when := s.f.delays.moment(b.Time, r.now())
	r.state.showed(b.Time)
	if b.Epoch != r.state.At().Epoch {
		if known, err := s.meet(ctx, b.Epoch); !known || err != nil {
			return err
		}
	}
	head := revocation.Position{Epoch: b.Epoch, Seq: b.Head}
	if s.wentBack(head, when) {
		r.logWentBack(head)
		return nil
	}
	r.logReaches(head)
	r.age.saw(head, r.state.At(), when)
	if err := s.through(ctx, b); err != nil {
		return err
	}
	r.age.reached(r.state.At())
	if within := headPatience; !reached(r.state.At(), head) {
		if !r.scope.Load().whole() {
			within = partPatience
		}
		r.expect(ofHead, head, within)
	}
	return nil
}

// through brings the state to what b says was told.
//
// A state of the whole log knows by itself what is missing. Another has to believe the feed, and
// does so from a heartbeat on whose position it has reached with what came from the source: a feed
// tells everything that is after its first heartbeat, but what was before its connection it may
// have missed, and the source may be behind the feed.
func (s *session) through(ctx context.Context, b Beat) error {
	r := s.r
	scope := r.scope.Load()
	partial := (b.RevocationsOnly || s.revocationsOnly) && !scope.revocationsOnly || !scope.within(b.Tenants)
	believed := !partial && b.Epoch == scope.epoch && s.sure()
	if reached(r.state.At(), b.Position) {
		if believed {
			s.anchor = scope
		}
		return nil
	}
	switch {
	case partial && !scope.whole():
		r.expect(ofOthers, b.Position, partPatience)
		return nil
	case partial, scope.whole() && r.connected(s.f):
		r.expect(ofOthers, b.Position, otherPatience)
		return nil
	case believed && !scope.whole() && s.anchor == scope:
		if r.state.throughIn(b.Position, scope) {
			return nil
		}
	}
	r.settle(ctx)
	if !reached(r.state.At(), b.Position) {
		if _, err := s.mend(ctx, r.ask(goal{Position: b.Position}), false); err != nil {
			return err
		}
	}
	if believed && scope == r.scope.Load() && r.state.At().Epoch == b.Epoch && reached(r.state.At(), b.Position) {
		s.anchor = scope
	}
	return nil
}

// wentBack reports whether the log ends before the state, as a heartbeat tells of a moment long after the
// state was there: then it is no heartbeat that was late.
func (s *session) wentBack(head revocation.Position, when instant) bool {
	at := s.r.state.At()
	switch {
	case reached(head, at):
		s.ahead.Position = revocation.Position{}
		return false
	case s.ahead.Epoch != head.Epoch || head.Seq >= s.ahead.Seq:
		s.ahead.Position, s.ahead.since = at, s.r.now()
		return false
	}
	return when.mono-s.ahead.since.mono > int64(maxLag)
}

// logWentBack notes that the log ends at p, before what was applied. What was revoked stays so, and
// what is revoked anew is added, but changes of the catalog in seqs that were there before are not seen.
func (r *Replica) logWentBack(p revocation.Position) {
	r.mu.Lock()
	r.back = r.state.At()
	r.mu.Unlock()
	r.fails(&r.logErr, fmt.Errorf("the log ends at seq %d, before what was applied: it was restored; run rescind epoch new", p.Seq),
		"the log has lost what was applied here", "")
}

// logReaches notes how far the log reaches. It has gone on once that is as far as it ever did, or it is
// another log.
func (r *Replica) logReaches(p revocation.Position) {
	r.mu.Lock()
	on := r.logErr != "" && reached(p, r.back)
	r.mu.Unlock()
	if on {
		r.fails(&r.logErr, nil, "", "the log has come to what was applied here, or is another one")
	}
}

// foreignFor is how long nobody asks the source again about an epoch of which it knew nothing. What
// tells of one is old, or ahead of the source. maxForeign bounds how many of them are known.
const (
	foreignFor = 10 * time.Second
	maxForeign = 8
)

// isForeign reports whether the source was asked about an epoch lately, to no avail.
func (r *Replica) isForeign(epoch revocation.Epoch) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	maps.DeleteFunc(r.foreign, func(_ revocation.Epoch, asked instant) bool { return now.since(asked) >= foreignFor })
	_, known := r.foreign[epoch]
	return known || len(r.foreign) == maxForeign
}

// meet finds out whether epoch is that of the log now, and reports whether it is that of the state.
func (s *session) meet(ctx context.Context, epoch revocation.Epoch) (known bool, err error) {
	r := s.r
	if r.isForeign(epoch) {
		return false, nil
	}
	done, err := s.mend(ctx, r.ask(goal{}), false)
	if known = r.state.At().Epoch == epoch; known || !done || err != nil {
		return known, err
	}
	r.mu.Lock()
	r.foreign[epoch] = r.now()
	r.mu.Unlock()
	r.log.Warn("a feed tells of another epoch of the log than the source, which is believed", "feed", s.f.Name(), "epoch", epoch, "position", r.state.At())
	return false, nil
}

// apply keeps and applies an event. Its errors are those of [State.Apply].
func (r *Replica) apply(e revocation.Event) error {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	at := r.state.At()
	switch {
	case e.Epoch != at.Epoch:
		return ErrEpoch
	case e.Seq <= at.Seq:
		// It was applied, unless the log was restored to before it, and goes on in the same epoch.
		if r.scope.Load().about(e.Tenant.Domain) {
			if rec, ok := recordOf(e); ok {
				r.hold(rec, e.Position)
			}
		}
		return nil
	case e.Seq != at.Seq+1 && r.scope.Load().whole():
		return ErrGap
	}
	if r.folder != nil {
		r.kept(r.folder.event(e))
	}
	return r.state.Apply(e)
}

// revoke keeps rec and makes it hold, if the state does not have it.
func (r *Replica) revoke(rec Record, at revocation.Position) {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	r.hold(rec, at)
}

// hold is revoke for those who have r.keeping. It is for what is at or before the state's position
// too: a directory is repaired at the position where it stands, and a restored log has others' seqs.
func (r *Replica) hold(rec Record, at revocation.Position) {
	if !r.state.lacks(rec) {
		return
	}
	here := r.state.At()
	missed := has(here, at)
	if r.folder != nil {
		if missed {
			at.Seq = here.Seq + 1 // a program that does not know what missed is would pass it over
		}
		r.kept(r.folder.revoked(rec, at, missed))
	}
	if missed {
		r.state.restore(rec)
		return
	}
	r.state.Revoke(rec, at)
}

// lacks reports whether rec would make a difference.
func (s *State) lacks(rec Record) bool {
	if rec.Target.Validate() != nil {
		return false
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if rec.Exp <= 0 || rec.Exp < s.cutoff(s.now()) {
		return false
	}
	m := s.content.marks
	class, k := keyOf(rec.Target)
	set := &m.tenants
	if class != tenants {
		iss := m.issuers.Load().find(rec.Target.Iss)
		if iss == nil {
			return true
		}
		set = &iss.sets[class]
	}
	e := set.find(k)
	return !e.ok() || e.exp() < rec.Exp || set.timed && e.notAfter(set) < rec.NotAfter
}

// kept notes whether something was kept. What was not is in the next snapshot.
func (r *Replica) kept(err error) {
	if err != nil {
		r.folderFails(err)
		signal(r.save)
	}
}

// keepFresh tells the folder how old the state is, and has a snapshot made when one is due.
func (r *Replica) keepFresh() {
	r.keeping.Lock()
	defer r.keeping.Unlock()
	if fresh := r.age.asOf(); !fresh.IsZero() {
		r.kept(r.folder.fresh(fresh))
	}
	if r.folder.due() {
		signal(r.save)
	}
}

// keepSaving saves the state when that is asked for, and due.
func (r *Replica) keepSaving(ctx context.Context) {
	var wait backoff
	for {
		select {
		case <-r.save:
		case <-ctx.Done():
			return
		}
		r.keeping.Lock()
		due := r.folder.due()
		r.keeping.Unlock()
		if !due {
			continue
		}
		fresh, began := r.age.asOf(), r.now()
		err := r.folder.save(r.state, fresh)
		r.folderFails(err)
		if err == nil {
			wait.reset()
			r.log.Debug("the state was saved", "position", r.state.At(), "took", r.now().since(began))
			continue
		}
		signal(r.save)
		if _, d := wait.next(err); !sleep(ctx, 10*d, nil) {
			return
		}
	}
}

// sourceFails notes how the source does.
func (r *Replica) sourceFails(err error) {
	r.fails(&r.sourceErr, err, "the source cannot be asked; it is tried again until it can", "the source can be asked again")
}

// folderFails notes how the folder does.
func (r *Replica) folderFails(err error) {
	r.fails(&r.folderErr, err, "the folder cannot be used: what happens now would be missing after a restart without the source", "the folder can be used again")
}

// fails logs changes only.
func (r *Replica) fails(last *string, err error, broken, healed string) {
	r.mu.Lock()
	was := *last
	*last = ""
	if err != nil {
		*last = err.Error()
	}
	r.mu.Unlock()
	switch {
	case err != nil && was == "":
		r.log.Warn(broken, "error", err)
	case err == nil && was != "":
		r.log.Info(healed)
	}
}
