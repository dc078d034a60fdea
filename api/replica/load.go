package replica

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// Loader takes a snapshot's content. It is for one goroutine, and for the length of
// [State.Load]'s function.
type Loader struct {
	content *content
	err     error

	// Of entries: how many came, and for how many room was made before.
	came, reserved int
}

// dropNothing is the cutoff of a snapshot: whoever made it knows what is needed.
const dropNothing = math.MinInt64

// Revocation adds a revocation. Of two with one target the later end counts.
func (l *Loader) Revocation(rec Record) {
	if l.err != nil {
		return
	}
	if err := rec.Target.Validate(); err != nil {
		l.err = fmt.Errorf("load revocation of kind %q: %w", rec.Target.Kind, err)
		return
	}
	class, k := keyOf(rec.Target)
	set := l.content.marks.set(class, rec.Target.Iss)
	l.content.own(set)
	l.content.put(set, k, rec, dropNothing)
}

// Entity adds an entity of the catalog, which must not be changed afterwards.
func (l *Loader) Entity(e catalog.Entity) { l.content.shelves.change(e, false) }

// loaded is a revocation as a binary snapshot has it.
type loaded struct {
	key           key
	exp, notAfter int64
}

// errNoRecords is the error of a load of entries without identifiers by a state that lists them.
var errNoRecords = errors.New("load entries without identifiers: a state with StateConfig.Records needs those")

// maxReserve is for how many entries more than came room is made, of all sets: who says how many
// there will be may be wrong, or want to do harm.
const maxReserve = 1 << 20

// entries adds many revocations of a class of an issuer ("" for tenants) at once: some thousand
// are best. About is how many of it are expected in all, 0 if that is not known. Of two with one
// key the later end counts; those without an end (exp <= 0) are passed over. If the state has
// records, Load fails.
func (l *Loader) entries(iss string, c class, list []loaded, about int) {
	if l.content.archive != nil {
		l.err = errNoRecords
		return
	}
	set := l.content.marks.set(c, iss)
	l.content.own(set)
	if room := min(about, maxReserve+l.came-l.reserved); set.n == 0 && room > 0 {
		set.reserve(room)
		l.reserved += room
	}
	set.fill(list)
	l.came += len(list)
}

// replayed is what came to the catalog after a position.
type replayed struct {
	revocation.Position
	changes []lateChange
}

// maxReplayed bounds what a repair holds, which more changes than that give up.
const maxReplayed = 1 << 16

// repairable has a snapshot of the position of now, or of a later one, take the place of the content though
// events have led past it by then: what came after it is done again. Otherwise a snapshot that events have
// passed while it was read changes nothing, for a sound state has all of it. It ends with done.
func (s *State) repairable() (done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replayed = &replayed{Position: s.At()}
	if p := s.content.part; p != nil {
		s.replayed.changes = slices.Clone(p.changes)
	}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.replayed = nil
	}
}

// replay notes a change for who repairs. It needs s.mu.
func (s *State) replay(at revocation.Position, c catalog.Change) {
	switch r := s.replayed; {
	case r == nil || r.Epoch != at.Epoch:
	case len(r.changes) == maxReplayed:
		s.replayed = nil
	default:
		r.changes = append(r.changes, lateChange{at.Seq, c})
	}
}

// repairs reports whether a snapshot at at is to take the place of a content of a later position. It needs s.mu.
func (s *State) repairs(at revocation.Position) bool {
	return s.replayed != nil && has(at, s.replayed.Position)
}

// changesAfter are the changes of the catalog after at, and maybe some from before, that are known. It
// needs s.mu.
func (s *State) changesAfter(at revocation.Position) []lateChange {
	switch p := s.content.part; {
	case s.repairs(at):
		return s.replayed.changes
	case p != nil:
		return p.changes
	}
	return nil
}
