// Package replica is the state of the log in memory: what is revoked, and the catalog
// that subscriptions are validated with. It hides how that is stored, so that a
// gateway asks nobody on the path of a request. Feed it with a snapshot, then with
// the events that follow.
//
// # Invariants
//
// The state is always that of one position of the log. An event that came before
// changes nothing, one that comes too soon is refused, and one that cannot be read
// leaves the state before it.
//
// A revocation matches until its end plus [revocation.MaxLeeway], whatever is cleaned
// up, repeated or loaded meanwhile; only a snapshot of the same epoch that is no older
// than the state can take it back.
//
// # Decisions
//
// [State.Check] takes no lock. What it reads are tables to which entries are only
// ever added and whose ends only rise; all else, growing and forgetting, makes a new
// table and swaps it in. No table is larger than a few thousand entries, so neither
// takes long.
//
// Entries are 16 bytes of an identifier and their end: the collector has no pointers
// to follow, and a million of them fit in 50 MB. Identifiers in full are kept only for
// those who serve lists, see [StateConfig.Records].
//
// What has ended is forgotten while events are applied, a little at a time, some
// minutes later than it must be kept, and by the clock that is behind: this process's
// or the log's, which the events tell. So a clock that is fast here un-revokes nothing,
// and a snapshot is taken as it is.
package replica

import (
	"errors"
	"fmt"
	"math"
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

// StateConfig tunes a replica. The zero value is for a gateway.
type StateConfig struct {
	// Records keeps identifiers, so that revocations can be listed, see
	// [View.Revocations]. Only those who serve snapshots need it.
	Records bool
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

	mu      sync.RWMutex
	content *content
	loads   uint64 // states that there were
	latest  int64  // the greatest time of an event, in Unix seconds: the log's clock
	swept   int64  // the second in which sweep last ran
}

// content is what a snapshot replaces. It belongs to whoever holds State.mu, but for
// what Check reads of marks.
type content struct {
	marks   *marks
	archive *archive // nil without StateConfig.Records
	shelves *shelves
}

func newContent(cfg StateConfig) *content {
	s := &content{shelves: newShelves()}
	if cfg.Records {
		s.archive = newArchive()
	}
	s.marks = newMarks(cfg.Records)
	return s
}

// NewState returns a replica that is at no position yet.
func NewState(cfg StateConfig) *State {
	r := &State{cfg: cfg, now: time.Now, content: newContent(cfg)}
	r.content.shelves.sort()
	r.marks.Store(r.content.marks)
	r.at.Store(&revocation.Position{})
	return r
}

// At is the position of the last event in the state. The zero value: nothing was loaded.
func (r *State) At() revocation.Position { return *r.at.Load() }

// Kept is how long after its end a revocation is part of the state: the leeway in which
// it can match, and ten minutes more for clocks that differ.
const Kept = revocation.MaxLeeway + 10*time.Minute

// leeway and kept are seconds.
const (
	leeway = int64(revocation.MaxLeeway / time.Second)
	kept   = int64(Kept / time.Second)
)

// cutoff is the end, in Unix seconds, before which entries are forgotten. Until there
// was an event nothing is. It needs r.mu.
func (r *State) cutoff(now time.Time) int64 { return min(now.Unix(), r.latest) - kept }

// Load replaces the state by what fill adds, as it was at at; fill must not keep the
// loader. Events can be applied while fill runs: if they have led past at in its epoch
// by then, the state stays, for it has all of the snapshot. On a new epoch the
// revocations there were stay until they end (a restored log may lack them). If fill
// returns an error, or adds what is no revocation, the state stays as it was.
func (r *State) Load(at revocation.Position, fill func(*Loader) error) error {
	l := &Loader{content: newContent(r.cfg)}
	if err := fill(l); err != nil {
		return err
	}
	if l.err != nil {
		return l.err
	}
	l.content.shelves.sort()

	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.At()
	if was.Epoch == at.Epoch && at.Seq < was.Seq {
		return nil
	}
	if was.Epoch != "" && was.Epoch != at.Epoch {
		l.content.join(r.content, r.cutoff(r.now()))
	}
	r.content = l.content
	r.loads++
	r.marks.Store(l.content.marks)
	r.at.Store(&at)
	return nil
}

// Loader takes a snapshot's content. It is for one goroutine, and for the length of
// [State.Load]'s function.
type Loader struct {
	content *content
	err     error
}

// Revocation adds a revocation. Of two with one target the later end counts.
func (l *Loader) Revocation(rec Record) {
	if l.err != nil {
		return
	}
	if err := rec.Target.Validate(); err != nil {
		l.err = fmt.Errorf("load revocation of kind %q: %w", rec.Target.Kind, err)
		return
	}
	l.content.add(rec, dropNothing)
}

// dropNothing is the cutoff of a snapshot: whoever made it knows what is needed.
const dropNothing = math.MinInt64

// Entity adds an entity of the catalog, which must not be changed afterwards.
func (l *Loader) Entity(e catalog.Entity) { l.content.shelves.change(e, false) }

// Apply takes the event that follows the last one. One that was applied already
// changes nothing. Errors: [ErrGap], [ErrEpoch], or one that says that the event
// cannot be read; then the state stays before it. Events about what this version does
// not know change the position only, but a revocation of a kind that it does not know
// cannot be read: it must not be passed over in silence.
func (r *State) Apply(e revocation.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch at := r.At(); {
	case e.Epoch != at.Epoch:
		return fmt.Errorf("apply event %s at %s: %w", e.Position, at, ErrEpoch)
	case e.Seq <= at.Seq:
		return nil
	case e.Seq != at.Seq+1:
		return fmt.Errorf("apply event %s at %s: %w", e.Position, at, ErrGap)
	}
	now := r.now()
	r.latest = max(r.latest, e.Time.Unix())
	switch {
	case strings.HasPrefix(e.Type, "revocation."):
		rev, err := e.Revocation()
		if err != nil {
			return fmt.Errorf("apply event %s: %w", e.Position, err)
		}
		r.content.add(Record{
			Target: rev.Target, Tenant: rev.Tenant, Exp: rev.Exp, NotAfter: rev.NotAfter, Signature: rev.Signature,
		}, r.cutoff(now))
	case catalog.IsChange(e.Type):
		c, err := catalog.ParseChange(e)
		if err != nil {
			return fmt.Errorf("apply event %s: %w", e.Position, err)
		}
		r.content.shelves.change(c.Entity, c.Verb == catalog.Deleted)
	}
	at := e.Position // a pointer into e would keep its data
	r.at.Store(&at)
	r.tidy(now)
	return nil
}

// tidy does a little of the cleaning up. It needs r.mu.
func (r *State) tidy(now time.Time) {
	if second := now.Unix(); second != r.swept {
		r.swept = second
		r.content.marks.sweep(r.cutoff(now), r.content.drop)
	}
	if r.content.archive != nil {
		r.content.compact()
	}
}

// Check reports whether a revocation matches t at now, Unix seconds, and of which kind.
// It never waits, and sees every event that Apply has returned from.
func (r *State) Check(t Token, now int64) (revocation.Kind, bool) {
	m := r.marks.Load()
	if iss := (*m.issuers.Load())[t.Iss]; iss != nil {
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
func (s *content) add(rec Record, cutoff int64) {
	c, k := keyOf(rec.Target)
	s.put(s.marks.set(c, rec.Target.Iss), k, rec, cutoff)
}

// put is add with the set and the key, which are all that a replica without records
// needs of rec.Target.
func (s *content) put(set *set, k key, rec Record, cutoff int64) {
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
	var at uint32
	if s.archive != nil {
		at = s.archive.append(set.class, rec)
	}
	if e.ok() {
		if s.archive != nil {
			s.archive.kill(e.record(set))
		}
		set.extend(e, rec.Exp, rec.NotAfter, at)
		return
	}
	set.insert(k, rec.Exp, rec.NotAfter, at, cutoff, s.drop)
}

// drop is told of the record of each entry that is forgotten.
func (s *content) drop(record uint32) {
	if s.archive != nil {
		s.archive.kill(record)
	}
}

// compact gives back the memory of records that are dead, see [archive.worn].
func (s *content) compact() {
	s.archive.compact(func(t revocation.Target, moved uint32) {
		c, k := keyOf(t)
		set := s.marks.set(c, t.Iss)
		set.move(set.find(k), moved)
	})
}

// join adds the revocations of o.
func (s *content) join(o *content, cutoff int64) {
	if o.archive != nil {
		for rec := range o.archive.list().All() {
			s.add(rec, cutoff)
		}
		return
	}
	o.marks.each(func(iss string, from *set) {
		var to *set // made only if it is needed
		from.each(func(e entry) {
			if to == nil {
				to = s.marks.set(from.class, iss)
			}
			s.put(to, e.key(), Record{Exp: e.exp(), NotAfter: e.notAfter(from)}, cutoff)
		})
	})
}

// View calls f with the state at one position. Events wait while f runs: it should
// take what it needs and leave, and call no other method of the replica but At and
// Check. What it took stays as it was.
func (r *State) View(f func(v *View)) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	f(&View{at: r.At(), loads: r.loads, content: r.content})
}
