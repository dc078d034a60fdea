package replica

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// partLog is a log of several tenants, whose events name the tenant's preceding one.
type partLog struct {
	epoch  revocation.Epoch
	events []revocation.Event
	what   []any // a Record, a catalog.Change or nil, as events
}

func (l *partLog) append(e revocation.Event, what any) {
	e.Position = l.at(l.head() + 1)
	for _, before := range l.events {
		if before.Tenant == e.Tenant {
			e.Previous = before.Seq
		}
	}
	l.events, l.what = append(l.events, e), append(l.what, what)
}

func (l *partLog) at(seq revocation.Seq) revocation.Position {
	return revocation.Position{Epoch: l.epoch, Seq: seq}
}

func (l *partLog) head() revocation.Seq { return revocation.Seq(len(l.events)) }

// partScope is what a reader is about.
type partScope struct {
	tenants         []string // nil: all
	revocationsOnly bool
}

func (s partScope) whole() bool { return s.tenants == nil && !s.revocationsOnly }

func (s partScope) about(e revocation.Event) bool {
	return s.tenants == nil || slices.Contains(s.tenants, e.Tenant.Domain)
}

func (s partScope) equal(o partScope) bool {
	return s.revocationsOnly == o.revocationsOnly && cmp.Equal(s.tenants, o.tenants)
}

// fold is the state of the log at seq, as far as a reader is about it.
func (l *partLog) fold(seq revocation.Seq, s partScope) *model {
	m := newModel()
	for i, what := range l.what[:seq] {
		if !s.about(l.events[i]) {
			continue
		}
		switch what := what.(type) {
		case Record:
			m.hold(what)
		case catalog.Change:
			uuid := what.Entity.Base().UUID
			if delete(m.entities, uuid); what.Verb != catalog.Deleted && !s.revocationsOnly {
				m.entities[uuid] = what.Entity
			}
		}
	}
	return m
}

func (l *partLog) load(s *State, seq revocation.Seq, scope partScope) error {
	return s.Load(l.at(seq), func(to *Loader) error {
		l.fold(seq, scope).fill(to)
		to.Tenants(scope.tenants)
		if scope.revocationsOnly {
			to.RevocationsOnly()
		}
		return nil
	})
}

// runPart has a reader of a part of a log, which is told of it in any order, by events, by
// snapshots of any age, and from ahead. What it was ever told to be revoked must stay so, and what
// it is said to have it must have.
func runPart(t *testing.T, data []byte) {
	c := &choices{data}
	scopes := []partScope{
		{}, {tenants: []string{acme.Domain}}, {tenants: []string{acme.Domain, "b.example"}}, {tenants: []string{}},
		{revocationsOnly: true}, {tenants: []string{acme.Domain}, revocationsOnly: true},
	}
	owners := []revocation.Tenant{acme, {ID: 2, Domain: "b.example"}, {ID: 3, Domain: "c.example"}}
	log := &partLog{epoch: epoch}
	// told is what the state knows to be revoked, got which events of the log it has.
	s, told, got := newClock().newReplica(false), newModel(), map[revocation.Seq]bool{}
	scope, restored := scopes[c.n(len(scopes))], 0
	must(t, log.load(s, 0, scope))

	apply := func(e revocation.Event) error {
		err := s.Apply(e)
		if err == nil && scope.about(e) {
			got[e.Seq] = true
			if rec, ok := log.what[e.Seq-1].(Record); ok {
				told.hold(rec)
			}
		}
		return err
	}
	// complete is up to where it has everything.
	complete := func() revocation.Seq {
		seq := s.At().Seq
		for seq < log.head() && (got[seq+1] || !scope.about(log.events[seq])) {
			seq++
		}
		return seq
	}
	stays := func() {
		t.Helper()
		for target, rec := range told.revoked {
			if !matches(s, target, rec.Exp+leeway) {
				t.Fatalf("%+v was revoked and is not any more", target)
			}
		}
	}
	catchUp := func() {
		t.Helper()
		for _, e := range log.events[s.At().Seq:] {
			if scope.about(e) {
				must(t, apply(e))
			}
		}
		must(t, s.Through(log.at(log.head())))
		if s.At() != log.at(log.head()) {
			t.Fatalf("the state is at %s, the log at %d", s.At(), log.head())
		}
		want := log.fold(log.head(), scope)
		for _, rec := range told.revoked {
			want.hold(rec)
		}
		for target, rec := range want.revoked {
			if !matches(s, target, rec.Exp+leeway) || matches(s, target, rec.Exp+leeway+1) {
				t.Fatalf("%+v does not end at %d", target, rec.Exp)
			}
		}
		if n := s.entries(); n != len(want.revoked) {
			t.Fatalf("there are %d entries, want %d", n, len(want.revoked))
		}
		entities := make(map[string]catalog.Entity)
		s.View(func(v *View) {
			collect(t, entities, v.Tenants())
			collect(t, entities, v.KeyManagers())
			collect(t, entities, v.Policies())
			collect(t, entities, v.Scopes())
			collect(t, entities, v.APIs())
			collect(t, entities, v.Applications())
			collect(t, entities, v.KeyMappings())
			collect(t, entities, v.Subscriptions())
		})
		if diff := cmp.Diff(want.entities, entities); diff != "" {
			t.Fatalf("the catalog differs (-model +state):\n%s", diff)
		}
	}
	record := func() Record {
		rec := Record{Target: c.target(), Tenant: owners[c.n(len(owners))], Exp: begin + 1000 + int64(c.n(100))}
		if rec.Target.Kind.HasTime() {
			rec.NotAfter = begin
		}
		if rec.Target.Kind == revocation.KindTenant {
			rec.Tenant = acme
			if rec.Target.ID != acme.Domain {
				rec.Tenant = revocation.SuperTenant
			}
		}
		return rec
	}
	for c.more() {
		switch c.n(24) {
		case 0, 1, 2, 12, 13:
			rec := record()
			log.append(revoke(rec), rec)
		case 3, 4, 14, 15, 16:
			owner := owners[c.n(len(owners))]
			change := catalog.Change{Verb: catalog.Updated, Entity: c.entity()}
			if c.n(2) == 0 { // one that is often changed
				change.Entity = &catalog.Scope{Meta: catalog.Meta{ID: 1, UUID: uuidOf(0), Tenant: acme}, Name: fmt.Sprint(c.n(9))}
			}
			if c.n(4) == 0 {
				change.Verb = catalog.Deleted
			}
			base := change.Entity.Base()
			base.UUID = fmt.Sprint(owner.ID) + base.UUID[1:] // no entity changes its tenant
			e, err := catalog.NewEvent(change)
			must(t, err)
			e.Tenant = owner
			log.append(e, change)
		case 5, 6, 7, 17, 18, 19: // some that come next or were there, or too soon
			for range c.n(8) {
				if near := int(s.At().Seq) - 2 + c.n(10); near >= 0 && near < len(log.events) {
					if err := apply(log.events[near]); err != nil && !errors.Is(err, ErrGap) {
						t.Fatal(err)
					}
				}
			}
		case 8, 20:
			to := complete()
			must(t, s.Through(log.at(to)))
			if s.At().Seq != to {
				t.Fatalf("the state is at %s, not at %d", s.At(), to)
			}
			if scope.whole() {
				if err := s.Through(log.at(to + 1)); !errors.Is(err, ErrGap) {
					t.Fatalf("through more than there is: %v", err)
				}
			}
		case 9: // from ahead
			rec := record()
			for range c.n(3) {
				log.append(revocation.Event{Type: "moon.risen", Tenant: owners[c.n(len(owners))]}, nil)
			}
			log.append(revoke(rec), rec)
			s.Revoke(rec, log.at(log.head()))
			told.hold(rec)
		case 10:
			catchUp()
		case 11, 21, 22, 23:
			next, seq, was := scope, revocation.Seq(c.n(int(log.head())+1)), s.At()
			if c.n(4) > 0 { // most are about as new as the state
				seq = min(max(was.Seq-2+revocation.Seq(c.n(8)), 0), log.head())
			}
			if c.n(4) == 0 {
				next = scopes[c.n(len(scopes))]
			}
			if c.n(16) == 0 { // the log was restored
				restored++
				log.epoch = revocation.Epoch(fmt.Sprintf("%08x%s", restored, epoch[8:]))
				log.events, log.what = slices.Clone(log.events[:seq]), slices.Clone(log.what[:seq])
				for i := range log.events {
					log.events[i].Epoch = log.epoch
				}
			}
			if err := log.load(s, seq, next); err != nil {
				if next.equal(scope) || s.At() != was {
					t.Fatal(err)
				}
				break
			}
			if s.At() != log.at(seq) {
				if s.At() != was || was.Epoch != log.epoch || was.Seq < seq || !next.equal(scope) {
					t.Fatalf("a snapshot of %s in the place of %s leads to %s", log.at(seq), was, s.At())
				}
				break // it is old
			}
			scope = next
			if was.Epoch != log.epoch {
				got = map[revocation.Seq]bool{}
			}
			for _, rec := range log.fold(seq, scope).revoked {
				told.hold(rec)
			}
			stays()
		}
	}
	catchUp()
	stays()
	if tenants, only := s.Scope(); !scope.equal(partScope{tenants, only}) {
		t.Fatalf("the state is about %q, %t, want %+v", tenants, only, scope)
	}
}

// matches reports whether s refuses the tokens of a target at now.
func matches(s *State, target revocation.Target, now int64) bool {
	tok := Token{Iss: target.Iss}
	switch target.Kind {
	case revocation.KindToken:
		if target.Digest {
			tok.Digest = target.ID
		} else {
			tok.JTI = target.ID
		}
	case revocation.KindClient:
		tok.ClientID = target.ID
	case revocation.KindSubject:
		tok.Sub = target.ID
	case revocation.KindSession:
		tok.SID = target.ID
	case revocation.KindKey:
		tok.KID = target.ID
	case revocation.KindTenant:
		tok.Tenant = target.ID
	}
	kind, ok := s.Check(tok, now)
	return ok && kind == target.Kind
}

func TestPartHistories(t *testing.T) {
	t.Parallel()
	for seed := range size(250, 600) {
		data := make([]byte, 600)
		rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1}).Read(data)
		runPart(t, data)
	}
}

// A snapshot wins over what was applied from before it, and loses to what was from after it.
func TestPartLoadOrder(t *testing.T) {
	t.Parallel()
	log, scope := &partLog{epoch: epoch}, partScope{tenants: []string{acme.Domain}}
	rename := func(name string) revocation.Event {
		change := catalog.Change{Verb: catalog.Updated, Entity: &catalog.Scope{Meta: catalog.Meta{ID: 1, UUID: uuidOf(0), Tenant: acme}, Name: name}}
		e, err := catalog.NewEvent(change)
		must(t, err)
		log.append(e, change)
		return log.events[len(log.events)-1]
	}
	s := newClock().newReplica(false)
	must(t, log.load(s, 0, scope))
	is := func(seq revocation.Seq, name string) {
		t.Helper()
		s.View(func(v *View) {
			if v.Scope(acme.ID, name) == nil || len(v.Scopes()) != 1 || v.At().Seq != seq {
				t.Fatalf("at %s the scope is %+v, want %q at %d", v.At(), v.Scopes(), name, seq)
			}
		})
	}
	must(t, s.Apply(rename("one")))
	is(0, "one")
	rename("two")
	must(t, log.load(s, 2, scope))
	is(2, "two")
	must(t, s.Apply(rename("three")))
	four := rename("four")
	must(t, s.Apply(four))
	must(t, log.load(s, 3, scope))
	is(3, "four")
	rename("five")
	if err := s.Apply(rename("six")); !errors.Is(err, ErrGap) {
		t.Fatalf("after %d: %v", four.Seq, err)
	}
	must(t, s.Through(four.Position))
	is(4, "four")

	// Of other tenants, one must not be older than anything that is known.
	must(t, s.Apply(log.events[4]))
	must(t, s.Apply(log.events[5]))
	wider := partScope{tenants: []string{acme.Domain, "b.example"}}
	if err := log.load(s, 5, wider); err == nil {
		t.Fatal("an old snapshot of other tenants was loaded")
	}
	is(4, "six")
	must(t, log.load(s, 6, wider))
	is(6, "six")
}

func FuzzPart(f *testing.F) {
	for seed := range byte(4) {
		data := make([]byte, 150)
		rand.NewChaCha8([32]byte{200 + seed}).Read(data)
		f.Add(data)
	}
	f.Fuzz(runPart)
}
