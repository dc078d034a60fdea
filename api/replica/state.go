// Package replica keeps in memory what a gateway must know of the log: what is revoked, and the
// catalog that subscriptions are validated with, so that it asks nobody on the path of a
// request. It hides how that is stored, and how it is kept up to date.
//
// A [State] is that of one position of the log. Feed it with a snapshot, then with the
// events that follow; the service itself has one. A [Replica] is a State that a gateway
// embeds: it is loaded from a [Source] and follows [Feed]s, outlives restarts and the
// service's absence in a folder, and knows how old it is.
//
// # Invariants
//
// The state is always that of one position of the log, or of a part of the log, see
// [State.Through]. An event that came before changes nothing, one that comes too soon is
// refused, and one that cannot be read leaves the state before it.
//
// A revocation that was once known matches until its end plus [revocation.MaxLeeway], whatever
// is cleaned up, repeated or loaded meanwhile. Nothing takes it back, no snapshot either.
//
// # Decisions
//
// [State.Check] takes no lock. What it reads are tables to which entries are only
// ever added and whose ends only rise; all else, growing and forgetting, makes a new
// table and swaps it in. No table is larger than a few thousand entries, so neither
// takes long.
//
// Entries are 16 bytes of an identifier and their end: the collector has no pointers
// to follow, and a million of them fit in 40 MB. Identifiers in full are kept only for
// those who serve lists, see [StateConfig.Records].
//
// A snapshot is joined with what was revoked before it, also in the same epoch, where it
// should have all of that: it takes little, and nobody needs to reckon what a snapshot may lack
// that is old, about other tenants, of a restored log, or loaded over what came from ahead.
//
// What has ended is forgotten a little at a time, some minutes later than it must be
// kept, and by the clock that is behind: this process's or the log's, which the events tell and
// which runs on between them. So a clock that is fast here un-revokes nothing, and a snapshot
// is taken as it is.
package replica

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// ErrGap is returned by [State.Apply] for an event that does not follow the last
// one: fetch those between, or load a snapshot. Nothing was changed.
var ErrGap = errors.New("events are missing before this one")

// ErrEpoch is returned by [State.Apply] for an event of another epoch: load a
// snapshot. Nothing was changed.
var ErrEpoch = errors.New("the event is of another epoch of the log")

// StateConfig tunes a state. The zero value is for a gateway.
type StateConfig struct {
	// Records keeps identifiers, so that revocations can be listed, see
	// [View.Revocations]. Only those who serve snapshots need it.
	Records bool
	// History is how many of the last events [Digests.At] can go back or forward by. Memory is taken for
	// all of them at once, 56 bytes for each. It needs Records, and is passed over without.
	History int
}

// Record is a revocation as it is listed.
type Record struct {
	Target   revocation.Target
	Tenant   revocation.Tenant
	Exp      int64 // as in [revocation.Revocation]
	NotAfter int64 // as there
	// Signature is of JWTs without jti only.
	Signature string
}

// Token is what a revocation is compared with. What is empty matches none.
type Token struct {
	Iss string
	// Tenant is the domain of the tenant that Iss belongs to.
	Tenant string
	// JTI, or Digest in lower-case hexadecimal for a token without one. See
	// [revocation.DigestTarget].
	JTI, Digest string
	ClientID    string
	Sub         string
	SID         string
	KID         string
	// IssuedAt is iat in Unix seconds.
	IssuedAt int64
}

// TokenOf is what revocations are compared with of t, whose issuer belongs to the tenant of
// this domain.
func TokenOf(t *token.Token, tenant string) Token {
	c := Token{
		Iss: t.Issuer, Tenant: tenant, JTI: t.ID, ClientID: t.ClientID, Sub: t.Subject, SID: t.Session,
		KID: t.KeyID, IssuedAt: t.IssuedAt,
	}
	if c.JTI == "" {
		c.Digest = revocation.DigestTarget(t.Issuer, t.SigningInput).ID
	}
	return c
}

// State is what is known of the log in memory. Its methods may be called from any goroutine.
type State struct {
	cfg StateConfig
	now func() time.Time // for forgetting only

	at    atomic.Pointer[revocation.Position] // written under mu
	marks atomic.Pointer[marks]               // content.marks, for Check

	loading sync.Mutex // of Load, once it has the snapshot
	// replacing, if there is one, is called with loading held before a snapshot replaces content. It
	// is set before the state has readers.
	replacing func()

	mu      sync.RWMutex
	content *content
	loads   uint64 // states that there were
	waiters []waiter

	// What is held ahead of the position reaches up to ahead, in the epoch of the state, and up to
	// foreign in the one that was last heard of beside it.
	ahead   revocation.Seq
	foreign revocation.Position

	// forgotten is the end before which content may lack what ended.
	forgotten int64
	scanning  chan struct{} // holds one while a scan runs
	breaks    uint64        // how often the state has changed otherwise than by the log's next event

	// While a snapshot is made ready to replace content, what is revoked meanwhile.
	joining bool
	late    []Record
	// replayed, if it is not nil, is what comes to the catalog while a repair runs, see repairable.
	replayed *replayed

	// The log's clock: what it showed, in Unix seconds, and when that was heard. The zero time:
	// never.
	logTime int64
	heard   time.Time

	swept int64 // the second up to which owed was reckoned
	owed  int   // steps of sweep that are due
}

// content is what a snapshot replaces. It belongs to whoever holds State.mu, but for
// what Check and join read of marks.
type content struct {
	marks   *marks
	archive *archive // nil without StateConfig.Records
	shelves *shelves
	part    *part // nil if it is about everything

	observer *observer // nil if nobody needs to be told of changes
}

func newContent(cfg StateConfig) *content {
	c := &content{shelves: newShelves()}
	if cfg.Records {
		c.archive = newArchive()
	}
	c.marks = newMarks(cfg.Records)
	return c
}

// NewState returns a state that is at no position yet.
func NewState(cfg StateConfig) *State {
	s := &State{cfg: cfg, now: time.Now, content: newContent(cfg), scanning: make(chan struct{}, 1)}
	s.content.shelves.sort()
	if cfg.Records && cfg.History > 0 {
		s.content.observer = &observer{history: newHistory(cfg.History)}
	}
	s.marks.Store(s.content.marks)
	s.at.Store(&revocation.Position{})
	return s
}

// At is the position of the state: everything up to it is part of it. The zero value: nothing
// was loaded.
func (s *State) At() revocation.Position { return *s.at.Load() }

// Kept is how long after its end a revocation is part of the state: the leeway in which
// it can match, and ten minutes more for clocks that differ.
const Kept = revocation.MaxLeeway + 10*time.Minute

// leeway and kept are seconds.
const (
	leeway = int64(revocation.MaxLeeway / time.Second)
	kept   = int64(Kept / time.Second)
)

// showed says that the log's clock showed t, as a heartbeat tells it. Events tell it too.
func (s *State) showed(t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hear(t, s.now())
}

// hear notes that the log's clock showed t, now or before. It needs s.mu.
func (s *State) hear(t, now time.Time) {
	if t.IsZero() || !s.heard.IsZero() && t.Unix() <= s.logClock(now) {
		return
	}
	s.logTime, s.heard = t.Unix(), now
}

// logClock is what the log's clock shows at least, in Unix seconds; it runs on between two
// events. It needs s.mu.
func (s *State) logClock(now time.Time) int64 {
	return s.logTime + max(0, int64(now.Sub(s.heard)/time.Second))
}

// cutoff is the end, in Unix seconds, before which entries are forgotten. Until the log's
// time is known nothing is; a state of revocations only may never hear of it, and goes by the
// clock here. It needs s.mu.
func (s *State) cutoff(now time.Time) int64 {
	clock := now.Unix()
	if !s.heard.IsZero() {
		clock = min(clock, s.logClock(now))
	} else if s.content.part == nil || !s.content.part.revocationsOnly {
		clock = 0
	}
	return clock - kept
}

// forget is cutoff for those who forget what ended before. It needs s.mu.
func (s *State) forget(now time.Time) int64 {
	cutoff := s.cutoff(now)
	s.forgotten = max(s.forgotten, cutoff)
	return cutoff
}

// Load replaces the catalog by what fill adds, and adds the revocations that fill adds, as they
// were at at; fill must not keep the loader. Events can be applied while fill runs: if they have
// led past at in its epoch by then, the state stays, for it has all of the snapshot; while a replica
// repairs it, what came after at is done again instead. If fill returns an error, or adds what is no
// revocation, the state stays as it was.
//
// No snapshot takes a revocation back: what is revoked stays until it ends. What was applied from
// after at, as it can be in a state of some tenants, stays altogether.
//
// A snapshot of the same epoch that is about other tenants cannot replace a later state: that is
// an error.
func (s *State) Load(at revocation.Position, fill func(*Loader) error) error {
	l := &Loader{content: newContent(s.cfg)}
	if err := fill(l); err != nil {
		return err
	}
	if l.err != nil {
		return l.err
	}
	next := l.content
	next.shelves.sort()

	s.loading.Lock() // so that content is replaced by nobody else meanwhile
	defer s.loading.Unlock()
	s.mu.Lock()
	old, cutoff := s.content, s.cutoff(s.now())
	if stays, err := s.stays(at, next); stays || err != nil {
		s.mu.Unlock()
		return err
	}
	revoked := old.revocations()
	s.joining = true
	s.mu.Unlock()
	next.join(revoked, cutoff) // this takes long
	if s.replacing != nil {
		s.replacing()
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	late := s.late
	s.joining, s.late = false, nil
	if stays, err := s.stays(at, next); stays || err != nil {
		return err
	}
	for _, rec := range late {
		next.add(rec, cutoff)
	}
	if was := s.At(); was.Epoch == at.Epoch && sameScope(old.part, next.part) {
		next.redo(old, at.Seq, s.changesAfter(at))
		at.Seq = max(at.Seq, was.Seq)
	}
	s.enter(at.Epoch)
	s.forgotten = cutoff // a snapshot has what it must, whatever was forgotten before
	if o := old.observer; o != nil {
		old.observer, next.observer = nil, o
		o.replaced()
	}
	s.content = next
	s.loads++
	s.breaks++
	s.marks.Store(next.marks)
	s.move(at)
	return nil
}

// stays reports whether the state has all of next, a snapshot at at. It needs s.mu.
func (s *State) stays(at revocation.Position, next *content) (bool, error) {
	was := s.At()
	switch {
	case was.Epoch != at.Epoch:
		return false, nil
	case sameScope(s.content.part, next.part):
		return at.Seq < was.Seq && !s.repairs(at), nil
	case at.Seq < s.content.reach(was.Seq):
		return false, fmt.Errorf("load snapshot %s over the later state %s, which is about other tenants: a newer one is needed", at, was)
	}
	return false, nil
}

// Apply takes the event that follows the last one. One that was applied already
// changes nothing. Errors: [ErrGap], [ErrEpoch], or one that says that the event
// cannot be read; then the state stays before it. Events about what this version does
// not know change the position only, but a revocation of a kind that it does not know
// cannot be read: it must not be passed over in silence.
//
// A state of some tenants, or of revocations only, gets a part of the log: there an event
// follows its tenant's last one, events of other tenants change nothing, and no event moves the
// position, see [State.Through].
func (s *State) Apply(e revocation.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, part := s.At(), s.content.part
	switch {
	case e.Epoch != at.Epoch:
		return fmt.Errorf("apply event %s at %s: %w", e.Position, at, ErrEpoch)
	case e.Seq <= at.Seq:
		return nil
	case part == nil:
		if e.Seq != at.Seq+1 {
			return fmt.Errorf("apply event %s at %s: %w", e.Position, at, ErrGap)
		}
	case !part.about(e.Tenant.Domain):
		return nil
	default:
		last := max(at.Seq, part.last[e.Tenant.Domain])
		if e.Seq <= last {
			return nil
		}
		if e.Previous > last {
			return fmt.Errorf("apply event %s of tenant %s, which follows %d, at %s after its %d: %w",
				e.Position, e.Tenant.Domain, e.Previous, at, last, ErrGap)
		}
	}
	now := s.now()
	s.hear(e.Time, now)
	switch {
	case strings.HasPrefix(e.Type, "revocation."):
		rev, err := e.Revocation()
		if err != nil {
			return fmt.Errorf("apply event %s: %w", e.Position, err)
		}
		s.hold(Record{
			Target: rev.Target, Tenant: rev.Tenant, Exp: rev.Exp, NotAfter: rev.NotAfter, Signature: rev.Signature,
		}, true, now)
	case catalog.IsChange(e.Type) && (part == nil || !part.revocationsOnly):
		c, err := catalog.ParseChange(e)
		if err != nil {
			return fmt.Errorf("apply event %s: %w", e.Position, err)
		}
		deleted := c.Verb == catalog.Deleted
		was := s.content.shelves.change(c.Entity, deleted)
		if o := s.content.observer; o != nil {
			o.changed(was, c.Entity, deleted)
		}
		if part != nil {
			part.changes = append(part.changes, lateChange{e.Seq, c})
		}
		s.replay(e.Position, c)
	}
	if part != nil {
		part.last[e.Tenant.Domain] = e.Seq
	} else {
		if o := s.content.observer; o != nil {
			o.applied(e.Seq, s.ahead)
		}
		s.move(e.Position)
	}
	s.tidy(now)
	return nil
}

// Through says that everything up to p is part of the state, or does not concern it. A state
// that is about everything knows that itself: the error is [ErrGap] if events up to p are
// missing. Others move to p. [ErrEpoch]: p is of another epoch.
func (s *State) Through(p revocation.Position) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, part := s.At(), s.content.part
	switch {
	case p.Epoch != at.Epoch:
		return fmt.Errorf("go through %s at %s: %w", p, at, ErrEpoch)
	case p.Seq <= at.Seq:
		return nil
	case part == nil:
		return fmt.Errorf("go through %s at %s: %w", p, at, ErrGap)
	}
	part.passed(p.Seq)
	s.move(p)
	return nil
}

// Revoke makes rec hold at once, ahead of the log's events, until it ends: at is of its event,
// or of a later one, maybe of another epoch. The position does not move. What can be no
// revocation, see [revocation.Target.Validate], matches no token and is passed over. It is not for
// states with [StateConfig.Records], whose lists would lack what only events tell.
func (s *State) Revoke(rec Record, at revocation.Position) {
	if rec.Target.Validate() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if was := s.At(); s.content.part == nil && was.Epoch == at.Epoch && was.Seq >= at.Seq {
		return // its event was applied
	}
	s.lead(at)
	s.reveal(rec)
}

// restore is Revoke for what is at or before the position, and missing all the same. It is not ahead of
// anything: digests do not wait for it.
func (s *State) restore(rec Record) {
	if rec.Target.Validate() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.breakOff()
	s.reveal(rec)
}

// reveal makes rec hold, which is not of the log's next event. It needs s.mu.
func (s *State) reveal(rec Record) {
	now := s.now()
	s.hold(rec, false, now)
	s.tidy(now)
}

// hold makes rec hold. OfLog: its event is applied. It needs s.mu.
func (s *State) hold(rec Record, ofLog bool, now time.Time) {
	class, k := keyOf(rec.Target)
	set := s.content.marks.set(class, rec.Target.Iss)
	if ofLog {
		s.content.own(set)
	}
	s.content.put(set, k, rec, s.forget(now))
	if s.joining {
		s.late = append(s.late, rec)
	}
}

// sweepTime is in how many seconds all that has ended is forgotten, once it may be.
const sweepTime = 120

// tick cleans up what is due. It is to be called each second, whether there are events or not.
// With millions of entries it takes some milliseconds, and holds up events for a fraction of one
// at a time.
func (s *State) tick(now time.Time) {
	for more := true; more; {
		s.mu.Lock()
		s.reckon(now)
		more = s.sweep(now)
		s.mu.Unlock()
	}
}

// tidy does a little of the cleaning up, for those who apply events and call no tick. It needs
// s.mu.
func (s *State) tidy(now time.Time) {
	s.reckon(now)
	for range 4 {
		if !s.sweep(now) {
			break
		}
	}
	if s.content.archive != nil {
		s.content.compact()
	}
}

// reckon adds to what is due as time goes by. It needs s.mu.
func (s *State) reckon(now time.Time) {
	second := now.Unix()
	if second == s.swept {
		return
	}
	all := s.content.marks.steps()
	passed := int64(1) // also if the clock was set back
	if s.swept != 0 && second > s.swept {
		passed = min(second-s.swept, sweepTime)
	}
	s.owed = min(s.owed+all*int(passed)/sweepTime+1, all)
	s.swept = second
}

// sweep takes a step if one is due, and reports whether there was. It needs s.mu.
func (s *State) sweep(now time.Time) bool {
	if s.owed == 0 {
		return false
	}
	s.owed--
	s.content.marks.sweep(s.forget(now), s.content.drop)
	return true
}

// Check reports whether a revocation matches t at now, Unix seconds, and of which kind.
// It never waits, and sees every event that Apply has returned from.
func (s *State) Check(t Token, now int64) (revocation.Kind, bool) {
	m := s.marks.Load()
	if iss := m.issuers.Load().find(t.Iss); iss != nil {
		switch {
		case iss.sets[signingKeys].matches(t.KID, t.IssuedAt, now):
			return revocation.KindKey, true
		case iss.matchesJTI(t.JTI, now), iss.sets[digests].matches(t.Digest, t.IssuedAt, now):
			return revocation.KindToken, true
		case iss.sets[sessions].matches(t.SID, t.IssuedAt, now):
			return revocation.KindSession, true
		case iss.sets[clients].matches(t.ClientID, t.IssuedAt, now):
			return revocation.KindClient, true
		case iss.sets[subjects].matches(t.Sub, t.IssuedAt, now):
			return revocation.KindSubject, true
		}
	}
	if m.tenants.matches(t.Tenant, t.IssuedAt, now) {
		return revocation.KindTenant, true
	}
	return "", false
}

// add makes rec hold, or an earlier one of its target until rec's end.
func (c *content) add(rec Record, cutoff int64) {
	class, k := keyOf(rec.Target)
	c.put(c.marks.set(class, rec.Target.Iss), k, rec, cutoff)
}

// put is add with the set and the key, which are all that a state without records
// needs of rec.Target.
func (c *content) put(set *set, k key, rec Record, cutoff int64) {
	if rec.Exp < cutoff || rec.Exp <= 0 {
		return
	}
	e := set.find(k)
	if e.ok() {
		exp, notAfter := max(rec.Exp, e.exp()), max(rec.NotAfter, e.notAfter(set))
		if exp == e.exp() && (notAfter == e.notAfter(set) || !set.timed) {
			return
		}
		rec.Exp, rec.NotAfter = exp, notAfter
	}
	if c.observer != nil {
		c.observer.revoked(c, set, k, e, rec)
	}
	var at uint32
	if c.archive != nil {
		at = c.archive.append(set.class, rec)
	}
	if e.ok() {
		if c.archive != nil {
			c.archive.kill(e.record(set))
		}
		set.extend(e, rec.Exp, rec.NotAfter, at)
		return
	}
	set.insert(k, rec.Exp, rec.NotAfter, at, cutoff, c.drop)
}

// drop is told of the record of each entry that is forgotten.
func (c *content) drop(record uint32) {
	if c.archive != nil {
		c.archive.kill(record)
	}
}

// compact gives back the memory of records that are dead, see [archive.worn].
func (c *content) compact() {
	c.archive.compact(func(t revocation.Target, moved uint32) {
		class, k := keyOf(t)
		set := c.marks.set(class, t.Iss)
		set.move(set.find(k), moved)
	})
}

// held are the revocations of a content, for those who do not hold State.mu. What is added
// meanwhile may be missing.
type held struct {
	list  Revocations // with records
	marks *marks      // without
}

func (c *content) revocations() held {
	if c.archive != nil {
		return held{list: c.archive.list()}
	}
	return held{marks: c.marks}
}

// join adds revocations.
func (c *content) join(h held, cutoff int64) {
	if h.marks == nil {
		for rec := range h.list.All() {
			c.add(rec, cutoff)
		}
		return
	}
	h.marks.each(func(iss string, from *set) {
		var to *set // made only if it is needed
		from.each(func(e entry) {
			if to == nil {
				to = c.marks.set(from.class, iss)
			}
			c.put(to, e.key(), Record{Exp: e.exp(), NotAfter: e.notAfter(from)}, cutoff)
		})
	})
}

// View calls f with the state at one position. Events wait while f runs: it should
// take what it needs and leave, and call no other method of the state but At and
// Check. What it took stays as it was. The catalog of a state of some tenants may be ahead of
// the position.
func (s *State) View(f func(v *View)) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	f(&View{at: s.At(), loads: s.loads, content: s.content})
}
