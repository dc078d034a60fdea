package replica

import (
	"errors"
	"fmt"
	"math"

	"github.com/rescindhq/rescind/api/catalog"
)

// Loader takes a snapshot's content. It is for one goroutine, and for the length of
// [State.Load]'s function.
type Loader struct {
	content *content
	err     error
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
	l.content.add(rec, dropNothing)
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

// entries adds many revocations of a class of an issuer ("" for tenants) at once, as
// Revocation does. About is how many of it are expected in all, 0 if that is not known. It
// makes Load fail if the state has records.
func (l *Loader) entries(iss string, c class, list []loaded, about int) {
	if l.content.archive != nil {
		l.err = errNoRecords
		return
	}
	set := l.content.marks.set(c, iss)
	if set.n == 0 && about > 0 {
		set.reserve(about)
	}
	set.fill(list)
}
