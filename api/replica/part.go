package replica

import (
	"maps"
	"slices"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// part is what a state of some tenants, or of revocations only, goes by: it does not get every
// event of the log, so an event does not tell that those before it were there. Its position
// moves when it is told so, see [State.Through]; events after the position are applied all
// the same, and are in order within their tenant.
type part struct {
	tenants         map[string]bool // by domain; nil: all
	keys            map[key]bool    // of their revocations as a whole
	revocationsOnly bool

	last    map[string]revocation.Seq // of each tenant's events after the position, the last one
	changes []lateChange              // of the catalog, after the position
}

// lateChange is kept because a snapshot may be older.
type lateChange struct {
	seq revocation.Seq
	catalog.Change
}

// about reports whether the state is about a tenant.
func (p *part) about(domain string) bool { return p.tenants == nil || p.tenants[domain] }

// passed forgets what is up to seq: the state's position says that it was there.
func (p *part) passed(seq revocation.Seq) {
	maps.DeleteFunc(p.last, func(_ string, last revocation.Seq) bool { return last <= seq })
	p.changes = slices.DeleteFunc(p.changes, func(c lateChange) bool { return c.seq <= seq })
}

// sameScope reports whether two states are about the same. Nil is everything.
func sameScope(a, b *part) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.revocationsOnly == b.revocationsOnly && (a.tenants == nil) == (b.tenants == nil) && maps.Equal(a.tenants, b.tenants)
}

// reach is the last seq of which anything is in c, which is at seq.
func (c *content) reach(seq revocation.Seq) revocation.Seq {
	if c.part != nil {
		for _, last := range c.part.last {
			seq = max(seq, last)
		}
	}
	return seq
}

// redo does to c, a snapshot at seq, what came to o from after it, in the same scope: changes are those
// of the catalog, and maybe some from before.
func (c *content) redo(o *content, seq revocation.Seq, changes []lateChange) {
	for _, change := range changes {
		if change.seq > seq {
			c.shelves.change(change.Entity, change.Verb == catalog.Deleted)
		}
	}
	if o.part == nil {
		return
	}
	c.part.last, c.part.changes = o.part.last, o.part.changes
	c.part.passed(seq)
	if c.part.tenants != nil {
		c.marks.ownAs(o.marks)
	}
}

// counts reports whether an entry is of what the state is about, so that digests count it. A feed that
// does not name tenants (etcd) tells of all of them: what the log, as this state sees it, has nothing of
// is another tenant's.
func (c *content) counts(s *set, k key) bool {
	switch {
	case c.part == nil || c.part.tenants == nil:
		return true
	case s.class == tenants:
		return c.part.keys[k]
	}
	return c.marks.owns(s)
}

// own notes that the log has entries of the issuer of this set.
func (c *content) own(s *set) {
	if s.class == tenants || c.marks.owns(s) {
		return
	}
	held := c.marks.own(s)
	if held && c.part != nil && c.part.tenants != nil && c.observer != nil && c.observer.scan != nil {
		c.observer.scan.restart() // it may have passed over them
	}
}

// partly makes c a part.
func (c *content) partly() *part {
	if c.part == nil {
		c.part = &part{last: make(map[string]revocation.Seq)}
	}
	return c.part
}

// Tenants says that what is loaded is about these tenants only, by their domains: then events
// of others are passed over, gaps are noticed by an event's Previous, and the state's position
// is moved by [State.Through] alone. Nil are all tenants.
func (l *Loader) Tenants(domains []string) {
	if domains == nil {
		return
	}
	p := l.content.partly()
	p.tenants, p.keys = make(map[string]bool, len(domains)), make(map[key]bool, len(domains))
	for _, domain := range domains {
		p.tenants[domain] = true
		p.keys[hashedKey(tenants, domain)] = true
	}
}

// RevocationsOnly says that the catalog is not loaded, and events about it are passed over. The
// state's position is moved by [State.Through] alone.
func (l *Loader) RevocationsOnly() { l.content.partly().revocationsOnly = true }

// Scope is what the state is about: tenants by their domains, sorted, nil for all of them; and
// whether it has revocations only.
func (s *State) Scope() (tenants []string, revocationsOnly bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	p := s.content.part
	if p == nil {
		return nil, false
	}
	if p.tenants != nil {
		tenants = slices.AppendSeq([]string{}, maps.Keys(p.tenants)) // not nil, though there be none
		slices.Sort(tenants)
	}
	return tenants, p.revocationsOnly
}
