package replica

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

const (
	epoch    revocation.Epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	newEpoch revocation.Epoch = "5f0c1a7e-0b52-4f0d-8f7b-2d8f5f9c6a11"
	iss                       = "https://km.example.com"
	begin    int64            = 1_800_000_000
)

var acme = revocation.Tenant{ID: 1, Domain: "acme.example"}

// clock is the time that a state under test forgets by.
type clock struct{ seconds atomic.Int64 }

func newClock() *clock {
	c := new(clock)
	c.seconds.Store(begin)
	return c
}

func (c *clock) now() int64 { return c.seconds.Load() }

func (c *clock) newReplica(records bool) *State {
	r := NewState(StateConfig{Records: records})
	r.now = func() time.Time { return time.Unix(c.now(), 0) }
	return r
}

// size is of what a test makes: much if it may take long, as RESCIND_HEAVY says, else some.
func size(some, much int) int {
	if os.Getenv("RESCIND_HEAVY") != "" {
		return much
	}
	return some
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// load gives r an empty state at seq 0, or what fill adds.
func load(t testing.TB, r *State, at revocation.Position, fill ...func(*Loader)) {
	t.Helper()
	must(t, r.Load(at, func(l *Loader) error {
		for _, f := range fill {
			f(l)
		}
		return nil
	}))
}

func revoke(rec Record) revocation.Event {
	e, err := revocation.NewEvent(revocation.Revocation{
		ID: "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Target: rec.Target, Tenant: rec.Tenant,
		Exp: rec.Exp, NotAfter: rec.NotAfter, Signature: rec.Signature, Reason: "client",
	})
	if err != nil {
		panic(err)
	}
	return e
}

// model is the log and the state that it stands for, done plainly.
type model struct {
	clock    *clock // of the log; nil: its events have no time
	log      []revocation.Event
	revoked  map[revocation.Target]Record
	entities map[string]catalog.Entity
}

func newModel() *model {
	return &model{revoked: make(map[revocation.Target]Record), entities: make(map[string]catalog.Entity)}
}

func (m *model) head() revocation.Position {
	return revocation.Position{Epoch: epoch, Seq: revocation.Seq(len(m.log))}
}

func (m *model) append(e revocation.Event) revocation.Event {
	e.Position = revocation.Position{Epoch: epoch, Seq: revocation.Seq(len(m.log) + 1)}
	e.Source = iss
	if m.clock != nil {
		e.Time = time.Unix(m.clock.now(), 0)
	}
	m.log = append(m.log, e)
	return e
}

// revoke appends the whole state after the change, as the log does, or if there is no
// change rec as it is, which must then change nothing.
func (m *model) revoke(rec Record) revocation.Event {
	if m.hold(rec) {
		rec = m.revoked[rec.Target]
	}
	return m.append(revoke(rec))
}

func (m *model) hold(rec Record) (changed bool) {
	old, ok := m.revoked[rec.Target]
	if ok && rec.Exp <= old.Exp && rec.NotAfter <= old.NotAfter {
		return false
	}
	rec.Exp, rec.NotAfter = max(rec.Exp, old.Exp), max(rec.NotAfter, old.NotAfter)
	m.revoked[rec.Target] = rec
	return true
}

func (m *model) change(c catalog.Change) revocation.Event {
	e, err := catalog.NewEvent(c)
	if err != nil {
		panic(err)
	}
	if c.Verb == catalog.Deleted {
		delete(m.entities, c.Entity.Base().UUID)
	} else {
		m.entities[c.Entity.Base().UUID] = c.Entity
	}
	return m.append(e)
}

// fill loads the state.
func (m *model) fill(l *Loader) {
	for _, rec := range m.revoked {
		l.Revocation(rec)
	}
	for _, e := range m.entities {
		l.Entity(e)
	}
}

// apply does with an event what a reader does: events that are missing are fetched.
func (m *model) apply(r *State, e revocation.Event) error {
	err := r.Apply(e)
	if !errors.Is(err, ErrGap) {
		return err
	}
	for _, e := range m.log[r.At().Seq:e.Seq] {
		if err := r.Apply(e); err != nil {
			return err
		}
	}
	return nil
}

func (m *model) check(t Token, now int64) (revocation.Kind, bool) {
	holds := func(target revocation.Target) bool {
		rec, ok := m.revoked[target]
		return ok && now <= rec.Exp+120 && (!target.Kind.HasTime() || t.IssuedAt <= rec.NotAfter)
	}
	for _, kind := range revocation.Kinds {
		target := revocation.Target{Kind: kind, Iss: t.Iss}
		switch kind {
		case revocation.KindToken:
			target.ID = t.JTI
			if holds(revocation.Target{Kind: kind, Iss: t.Iss, ID: t.Digest, Digest: true}) {
				return kind, true
			}
		case revocation.KindClient:
			target.ID = t.ClientID
		case revocation.KindSubject:
			target.ID = t.Sub
		case revocation.KindSession:
			target.ID = t.SID
		case revocation.KindKey:
			target.ID = t.KID
		case revocation.KindTenant:
			target.Iss, target.ID = "", t.Tenant
		}
		if holds(target) {
			return kind, true
		}
	}
	return "", false
}

// The identifiers of histories. Some are alike on purpose.
var (
	issuers = []string{iss, "https://acme.example/t"}
	ids     = []string{
		"a", "b", "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", "0193A2F4-7C11-7D02-9B1E-5F6A70C1D2E3", "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e4",
		strings.Repeat("ab", 32), strings.Repeat("é", 127) + "x",
	}
	domains = []string{revocation.SuperTenant.Domain, acme.Domain}
)

// choices turn bytes into decisions, so that a fuzzer can steer a history.
type choices struct{ left []byte }

func (c *choices) more() bool { return len(c.left) > 0 }

func (c *choices) n(n int) int {
	if len(c.left) == 0 {
		return 0
	}
	b := c.left[0]
	c.left = c.left[1:]
	return int(b) % n
}

func (c *choices) target() revocation.Target {
	t := revocation.Target{
		Kind: revocation.Kinds[c.n(len(revocation.Kinds))], Iss: issuers[c.n(len(issuers))], ID: ids[c.n(len(ids))],
	}
	switch {
	case t.Kind == revocation.KindTenant:
		t.Iss, t.ID = "", domains[c.n(len(domains))]
	case t.Kind == revocation.KindToken && c.n(3) == 0:
		t.Digest, t.ID = true, ids[5]
	}
	return t
}

func (c *choices) token(now int64) Token {
	return Token{
		Iss: issuers[c.n(len(issuers))], Tenant: domains[c.n(len(domains))], JTI: ids[c.n(len(ids))],
		Digest: []string{"", ids[5]}[c.n(2)], ClientID: ids[c.n(len(ids))], Sub: ids[c.n(len(ids))], SID: ids[c.n(len(ids))],
		KID: ids[c.n(len(ids))], IssuedAt: now + int64(c.n(256)) - 128,
	}
}

func (c *choices) entity() catalog.Entity {
	id := int32(1 + c.n(4))
	noun := catalog.Nouns[c.n(len(catalog.Nouns))]
	e := catalog.New(noun)
	*e.Base() = catalog.Meta{ID: id, UUID: fmt.Sprintf("00000000-0000-4000-8000-%08x%04x", noun[0]+noun[len(noun)-1], id), Tenant: acme}
	ref := func() catalog.Ref {
		id := int32(c.n(3))
		return catalog.Ref{ID: id, UUID: fmt.Sprint("ref-", id)}
	}
	switch e := e.(type) {
	case *catalog.Tenant:
		e.Meta.Tenant.Domain = fmt.Sprint("t", id)
	case *catalog.API:
		e.Context, e.Version = fmt.Sprint("/", c.n(2)), fmt.Sprint(id)
	case *catalog.KeyMapping:
		e.ConsumerKey, e.Application = fmt.Sprint("key-", c.n(2)), ref()
	case *catalog.Subscription:
		e.Application, e.API = ref(), catalog.Ref{ID: id, UUID: fmt.Sprint("api-", id)}
		e.State = catalog.Unblocked
	case *catalog.Policy:
		e.Kind, e.Name = catalog.PolicyAPI, fmt.Sprint("p", id)
		e.Quota = int64(c.n(100))
	case *catalog.Scope:
		e.Name = fmt.Sprint("s", id)
	case *catalog.KeyManager:
		e.Iss = fmt.Sprint("https://", id)
		e.Enabled = c.n(2) == 0
	}
	return e
}

// runHistory makes up a history, delivers it badly, and compares what comes of it.
func runHistory(t *testing.T, data []byte) {
	c, m, clk := &choices{data}, newModel(), newClock()
	m.clock = clk
	r, gateway := clk.newReplica(true), clk.newReplica(false)
	load(t, r, m.head())
	load(t, gateway, m.head())
	var wire []revocation.Event
	type taken struct {
		list Revocations
		want map[revocation.Target]Record
	}
	var lists []taken
	send := func(e revocation.Event) {
		for range c.n(4) % 3 { // none, once or twice
			wire = append(wire, e)
		}
	}
	deliver := func(r *State, e revocation.Event) {
		t.Helper()
		must(t, m.apply(r, e))
	}
	catchUp := func() {
		t.Helper()
		for _, r := range []*State{r, gateway} {
			if n := len(m.log); n > 0 {
				deliver(r, m.log[n-1])
			}
			if r.At() != m.head() {
				t.Fatalf("the state is at %s, the log at %s", r.At(), m.head())
			}
		}
		compare(t, r, gateway, m, c, clk.now())
	}
	for c.more() {
		switch now := clk.now(); c.n(12) {
		case 0, 1, 2, 3:
			rec := Record{Target: c.target(), Tenant: acme, Exp: now + int64(c.n(200))*7, Signature: []string{"", "c2ln"}[c.n(2)]}
			if rec.Target.Kind == revocation.KindTenant {
				rec.Tenant.Domain = rec.Target.ID
			}
			if rec.Target.Kind.HasTime() {
				rec.NotAfter = now + 2
				if old, ok := m.revoked[rec.Target]; ok && old.Exp > now {
					rec.NotAfter += int64(c.n(100)) - 90 // an earlier one must not count
				}
			}
			send(m.revoke(rec))
		case 4, 5, 6:
			verbs := []catalog.Verb{catalog.Created, catalog.Updated, catalog.LifecycleChanged, catalog.Deployed, "renamed", catalog.Deleted, catalog.Deleted}
			e := c.entity()
			verb := verbs[c.n(len(verbs))]
			if old, ok := m.entities[e.Base().UUID]; ok && verb == catalog.Deleted {
				e = old
			}
			send(m.change(catalog.Change{Verb: verb, Entity: e}))
		case 7:
			send(m.append(revocation.Event{Type: "moon.risen", Tenant: acme, Data: []byte(`{"tenant":{"id":1}}`)}))
		case 8:
			clk.seconds.Add(int64(c.n(256)) * 3)
		case 9:
			for range c.n(20) {
				if len(wire) > 0 {
					i := c.n(len(wire))
					deliver(r, wire[i])
					deliver(gateway, wire[i])
					wire = slices.Delete(wire, i, i+1)
				}
			}
		case 10:
			catchUp()
			r.View(func(v *View) {
				list := v.Revocations()
				lists = append(lists, taken{list, maps.Collect(byTarget(t, list))})
			})
		case 11:
			// A process starts, or starts over, from a snapshot. Events of before arrive late.
			if c.n(2) == 0 {
				r, gateway = clk.newReplica(true), clk.newReplica(false)
			}
			load(t, r, m.head(), m.fill)
			load(t, gateway, m.head(), m.fill)
		}
	}
	catchUp()
	r.View(func(v *View) { compareLookups(t, v, m) })
	for _, l := range lists {
		if diff := cmp.Diff(l.want, maps.Collect(byTarget(t, l.list))); diff != "" {
			t.Fatalf("a list changed after it was taken (-before +after):\n%s", diff)
		}
	}
}

// byTarget fails the test for a revocation that is there twice, or a wrong Len.
func byTarget(t *testing.T, list Revocations) func(func(revocation.Target, Record) bool) {
	t.Helper()
	n := 0
	seen := make(map[revocation.Target]bool)
	return func(yield func(revocation.Target, Record) bool) {
		for rec := range list.All() {
			if seen[rec.Target] {
				t.Fatalf("%+v is in the list twice", rec.Target)
			}
			seen[rec.Target] = true
			n++
			if !yield(rec.Target, rec) {
				return
			}
		}
		if n != list.Len() {
			t.Fatalf("a list of %d has Len %d", n, list.Len())
		}
	}
}

// compare r, of records, and gateway with m.
func compare(t *testing.T, r, gateway *State, m *model, c *choices, now int64) {
	t.Helper()
	for range 20 {
		tok := c.token(now)
		for _, at := range []int64{now, now + 60, now + 500} {
			want, revoked := m.check(tok, at)
			for _, r := range []*State{r, gateway} {
				if got, ok := r.Check(tok, at); ok != revoked || got != want {
					t.Fatalf("Check(%+v, %d) = %q, %t, want %q, %t", tok, at, got, ok, want, revoked)
				}
			}
		}
	}
	var got map[revocation.Target]Record
	entities := make(map[string]catalog.Entity)
	r.View(func(v *View) {
		got = maps.Collect(byTarget(t, v.Revocations()))
		collect(t, entities, v.Tenants())
		collect(t, entities, v.KeyManagers())
		collect(t, entities, v.Policies())
		collect(t, entities, v.Scopes())
		collect(t, entities, v.APIs())
		collect(t, entities, v.Applications())
		collect(t, entities, v.KeyMappings())
		collect(t, entities, v.Subscriptions())
	})
	if diff := cmp.Diff(m.entities, entities); diff != "" {
		t.Fatalf("the catalog differs (-model +state):\n%s", diff)
	}
	want := make(map[revocation.Target]Record)
	for target, rec := range m.revoked {
		has, there := got[target]
		switch {
		case there && now > rec.Exp+kept:
			want[target] = has // it may be forgotten, or have come too late to matter
		case there || now <= rec.Exp+leeway:
			want[target] = rec
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("the revocations differ (-model +state):\n%s", diff)
	}
}

func collect[E entity](t *testing.T, into map[string]catalog.Entity, all []E) {
	t.Helper()
	if !slices.IsSortedFunc(all, order) {
		t.Fatalf("a list of %T is not sorted", all)
	}
	for _, e := range all {
		into[e.Base().UUID] = e
	}
}

// compareLookups asks for everything that is there, and for what is not.
func compareLookups(t *testing.T, v *View, m *model) {
	t.Helper()
	pick := func(where func(catalog.Entity) bool) []catalog.Entity {
		var all []catalog.Entity
		for _, e := range m.entities {
			if where(e) {
				all = append(all, e)
			}
		}
		slices.SortFunc(all, func(a, b catalog.Entity) int { return int(a.Base().ID - b.Base().ID) })
		return all
	}
	same := func(what string, got any, where func(catalog.Entity) bool) {
		t.Helper()
		want := pick(where)
		var gotAll []catalog.Entity
		switch got := got.(type) {
		case []*catalog.API:
			gotAll = widen(got)
		case []*catalog.KeyMapping:
			gotAll = widen(got)
		case []*catalog.Subscription:
			gotAll = widen(got)
		default:
			if e := got.(catalog.Entity); !isNil(e) {
				gotAll = append(gotAll, e)
			}
		}
		if diff := cmp.Diff(want, gotAll); diff != "" {
			t.Fatalf("%s (-model +state):\n%s", what, diff)
		}
	}
	for id := range int32(6) {
		uuidOf := func(e catalog.Entity) string {
			m := *e.Base()
			m.ID = id
			return fmt.Sprintf("%s%04x", m.UUID[:32], id)
		}
		name := fmt.Sprint(id)
		same("APIByID", v.APIByID(id), func(e catalog.Entity) bool { return e.Noun() == catalog.NounAPI && e.Base().ID == id })
		same("ApplicationByID", v.ApplicationByID(id), func(e catalog.Entity) bool { return e.Noun() == catalog.NounApplication && e.Base().ID == id })
		same("Tenant", v.Tenant("t"+name), func(e catalog.Entity) bool { return e.Noun() == catalog.NounTenant && e.Base().ID == id })
		same("Policy", v.Policy(acme.ID, catalog.PolicyAPI, "p"+name), func(e catalog.Entity) bool { return e.Noun() == catalog.NounPolicy && e.Base().ID == id })
		same("Scope", v.Scope(acme.ID, "s"+name), func(e catalog.Entity) bool { return e.Noun() == catalog.NounScope && e.Base().ID == id })
		same("KeyManager", v.KeyManager("https://"+name), func(e catalog.Entity) bool { return e.Noun() == catalog.NounKeyManager && e.Base().ID == id })
		same("KeyMappingsOf", v.KeyMappingsOf("key-"+name), func(e catalog.Entity) bool {
			k, ok := e.(*catalog.KeyMapping)
			return ok && k.ConsumerKey == "key-"+name
		})
		same("SubscriptionsOf", v.SubscriptionsOf("ref-"+name), func(e catalog.Entity) bool {
			s, ok := e.(*catalog.Subscription)
			return ok && s.Application.ID == id && s.Application.UUID != ""
		})
		for other := range int32(6) {
			same("Subscription", v.Subscription("ref-"+name, fmt.Sprint("api-", other)), func(e catalog.Entity) bool {
				s, ok := e.(*catalog.Subscription)
				return ok && s.Application.ID == id && s.API.ID == other
			})
			same("APIsByContext", v.APIsByContext("/"+name, fmt.Sprint(other)), func(e catalog.Entity) bool {
				a, ok := e.(*catalog.API)
				return ok && a.Context == "/"+name && a.Version == fmt.Sprint(other)
			})
		}
		for _, e := range m.entities {
			uuid := uuidOf(e)
			switch e.(type) {
			case *catalog.API:
				same("API", v.API(uuid), func(e catalog.Entity) bool { return e.Base().UUID == uuid })
			case *catalog.Application:
				same("Application", v.Application(uuid), func(e catalog.Entity) bool { return e.Base().UUID == uuid })
			}
		}
	}
}

func widen[E catalog.Entity](all []E) (wide []catalog.Entity) {
	for _, e := range all {
		wide = append(wide, e)
	}
	return wide
}

// isNil reports whether e is a nil pointer.
func isNil(e catalog.Entity) bool {
	switch e := e.(type) {
	case *catalog.Tenant:
		return e == nil
	case *catalog.KeyManager:
		return e == nil
	case *catalog.Policy:
		return e == nil
	case *catalog.Scope:
		return e == nil
	case *catalog.API:
		return e == nil
	case *catalog.Application:
		return e == nil
	case *catalog.Subscription:
		return e == nil
	}
	return false
}

func TestHistories(t *testing.T) {
	t.Parallel()
	for seed := range size(6, 12) {
		data := make([]byte, 4000)
		rng := rand.NewChaCha8([32]byte{byte(seed)})
		rng.Read(data)
		runHistory(t, data)
	}
}

func FuzzHistory(f *testing.F) {
	for seed := range byte(4) {
		data := make([]byte, 150)
		rand.NewChaCha8([32]byte{100 + seed}).Read(data)
		f.Add(data)
	}
	f.Fuzz(runHistory)
}

func ofJTI(id string) revocation.Target {
	return revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: id}
}

func uuidOf(n int) string { return fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012x", n) }

func TestApplyRefuses(t *testing.T) {
	t.Parallel()
	clk, m := newClock(), newModel()
	r := clk.newReplica(true)
	for n := range 4 {
		m.revoke(Record{Target: ofJTI(uuidOf(n)), Tenant: acme, Exp: begin + 100})
	}
	if err := r.Apply(m.log[0]); !errors.Is(err, ErrEpoch) {
		t.Errorf("before Load: %v", err)
	}
	load(t, r, revocation.Position{Epoch: epoch})
	must(t, r.Apply(m.log[0]))
	other := m.log[1]
	other.Epoch = newEpoch
	broken, unknown, noEntity := m.log[1], m.log[1], m.log[1]
	broken.Data = []byte(`{"kind":"token"}`)
	unknown.Type, unknown.Data = "revocation.galaxy", []byte(`{"kind":"galaxy","iss":"x"}`)
	noEntity.Type = "api.created"
	for name, e := range map[string]revocation.Event{
		"gap": m.log[2], "epoch": other, "no target": broken, "unknown kind": unknown, "no entity": noEntity,
	} {
		err := r.Apply(e)
		if err == nil || errors.Is(err, ErrGap) != (name == "gap") || errors.Is(err, ErrEpoch) != (name == "epoch") {
			t.Errorf("%s: %v", name, err)
		}
		if r.At().Seq != 1 {
			t.Fatalf("%s: the state is at %s", name, r.At())
		}
	}
	must(t, r.Apply(m.log[1]))
	must(t, r.Apply(m.log[0]))
	r.View(func(v *View) {
		if v.At() != (revocation.Position{Epoch: epoch, Seq: 2}) || v.Revocations().Len() != 2 {
			t.Errorf("at %s with %d revocations", v.At(), v.Revocations().Len())
		}
	})
}

func TestLoad(t *testing.T) {
	t.Parallel()
	for _, records := range []bool{true, false} {
		clk := newClock()
		r := clk.newReplica(records)
		fill := func(targets ...revocation.Target) func(*Loader) {
			return func(l *Loader) {
				for i, target := range targets {
					l.Revocation(Record{Target: target, Tenant: acme, Exp: begin + 1000 + int64(i), NotAfter: begin})
				}
			}
		}
		revoked := func(target revocation.Target) bool {
			t.Helper()
			_, ok := r.Check(Token{Iss: target.Iss, JTI: target.ID, ClientID: target.ID, Tenant: target.ID}, begin)
			return ok
		}
		a, b, c := ofJTI("a"), ofJTI(uuidOf(1)), ofJTI("c")
		client := revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "client"}
		tenant := revocation.Target{Kind: revocation.KindTenant, ID: acme.Domain}
		load(t, r, revocation.Position{Epoch: epoch, Seq: 10}, fill(a, client))

		// What fails changes nothing.
		boom := errors.New("boom")
		if err := r.Load(revocation.Position{Epoch: epoch, Seq: 11}, func(l *Loader) error { fill(b)(l); return boom }); err != boom {
			t.Errorf("Load: %v, want %v", err, boom)
		}
		err := r.Load(revocation.Position{Epoch: epoch, Seq: 11}, func(l *Loader) error {
			fill(b, revocation.Target{Kind: "galaxy", ID: "secret"})(l)
			return nil
		})
		if _, ok := errors.AsType[*revocation.InvalidError](err); !ok || strings.Contains(err.Error(), "secret") {
			t.Errorf("Load of an unknown kind: %v", err)
		}
		if r.At().Seq != 10 || !revoked(a) || revoked(b) {
			t.Errorf("after an error the state is at %s", r.At())
		}

		// A snapshot from before what was applied would take back revocations.
		load(t, r, revocation.Position{Epoch: epoch, Seq: 9}, fill(b))
		if r.At().Seq != 10 || !revoked(a) || revoked(b) {
			t.Errorf("an old snapshot was loaded: %s", r.At())
		}

		load(t, r, revocation.Position{Epoch: epoch, Seq: 12}, fill(b, client, tenant))
		if r.At().Seq != 12 || !revoked(a) || !revoked(b) || !revoked(client) || !revoked(tenant) {
			t.Error("a snapshot of the same epoch does not add to what is revoked")
		}

		// On a new epoch too everything stays until it ends, with its later end.
		load(t, r, revocation.Position{Epoch: newEpoch, Seq: 3}, fill(c, b), func(l *Loader) {
			l.Revocation(Record{Target: client, Tenant: acme, Exp: begin + 1, NotAfter: begin - 100})
		})
		if r.At() != (revocation.Position{Epoch: newEpoch, Seq: 3}) || !revoked(b) || !revoked(c) || !revoked(client) || !revoked(tenant) {
			t.Error("a new epoch un-revokes")
		}
		if _, ok := r.Check(Token{Iss: iss, ClientID: "client", IssuedAt: begin}, begin+1001+120); !ok {
			t.Error("a new epoch shortens a revocation")
		}
		if records {
			r.View(func(v *View) {
				if n := len(maps.Collect(byTarget(t, v.Revocations()))); n != 5 {
					t.Errorf("%d revocations on the new epoch, want 5", n)
				}
			})
		}
		clk.seconds.Add(1000 + kept + 10)
		must(t, r.Apply(revocation.Event{
			Position: revocation.Position{Epoch: newEpoch, Seq: 4}, Type: "moon.risen", Time: time.Unix(clk.now(), 0),
		}))
		load(t, r, revocation.Position{Epoch: epoch, Seq: 1})
		if got := r.entries(); got != 0 {
			t.Errorf("%d ended entries came along to a new epoch", got)
		}
	}
}

// What the catalog says cannot be leaves the rest of it right all the same.
func TestOddEntities(t *testing.T) {
	t.Parallel()
	api := func(id int32, uuid, context string) *catalog.API {
		return &catalog.API{Meta: catalog.Meta{ID: id, UUID: uuid, Tenant: acme}, Context: context}
	}
	r, m := newClock().newReplica(false), newModel()
	load(t, r, m.head())
	const one, two, three = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002", "00000000-0000-4000-8000-000000000003"
	scope := func(id int32, uuid string) *catalog.Scope {
		return &catalog.Scope{Meta: catalog.Meta{ID: id, UUID: uuid, Tenant: acme}, Name: "s"}
	}
	for _, c := range []catalog.Change{
		{Verb: catalog.Created, Entity: api(1, one, "/1")}, {Verb: catalog.Created, Entity: api(2, two, "/2")},
		{Verb: catalog.Created, Entity: api(3, three, "/3")},
		{Verb: catalog.Updated, Entity: api(5, one, "/5")}, // another id
		{Verb: catalog.Deleted, Entity: api(3, three, "/3")},
		{Verb: catalog.Deleted, Entity: api(3, three, "/3")},                                           // twice
		{Verb: catalog.Created, Entity: scope(1, one)}, {Verb: catalog.Created, Entity: scope(2, two)}, // one name
		{Verb: catalog.Deleted, Entity: scope(1, one)},
	} {
		must(t, r.Apply(m.change(c)))
	}
	r.View(func(v *View) {
		if diff := cmp.Diff([]*catalog.API{api(2, two, "/2"), api(5, one, "/5")}, v.APIs()); diff != "" {
			t.Error(diff)
		}
		if v.APIByID(1) != nil || v.APIByID(5) == nil || v.APIsByContext("/1", "") != nil || len(v.APIsByContext("/5", "")) != 1 {
			t.Error("an API is found by what it was")
		}
		if got := v.Scope(acme.ID, "s"); got == nil || got.UUID != two {
			t.Errorf("the scope that is left: %+v", got)
		}
	})
}

// entries is how many there are, ended ones included.
func (r *State) entries() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.entriesLocked()
}

func (r *State) entriesLocked() (n int) {
	r.content.marks.each(func(_ string, s *set) { n += s.n })
	return n
}

// An entry matches to the second of its end and leeway, whatever is forgotten around
// it, and is forgotten some minutes later, records included.
func TestForget(t *testing.T) {
	t.Parallel()
	clk, m := newClock(), newModel()
	m.clock = clk
	r := clk.newReplica(true)
	load(t, r, m.head())
	n := size(8000, 10_000) // several tables and chunks
	for i := range n {
		must(t, r.Apply(m.revoke(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + int64(i%1000)})))
	}
	stay := Record{Target: ofJTI("stay"), Tenant: acme, Exp: math.MaxInt64}
	must(t, r.Apply(m.revoke(stay)))
	must(t, r.Apply(m.revoke(Record{Target: ofJTI("over"), Tenant: acme, Exp: begin - kept - 1})))
	if got := r.entries(); got != n+1 {
		t.Fatalf("%d entries, want %d", got, n+1)
	}
	unknown := revocation.Event{Type: "moon.risen"}
	for clk.now() < begin+1000+kept+2*sweepTime {
		clk.seconds.Add(1)
		must(t, r.Apply(m.append(unknown)))
		for i := int(clk.now()-begin-leeway) % 1000; i < n; i += 1000 {
			tok, end := Token{Iss: iss, JTI: uuidOf(max(i, 0))}, begin+int64(max(i, 0)%1000)
			if _, ok := r.Check(tok, end+leeway); clk.now() <= end+leeway && !ok {
				t.Fatalf("at %d an entry that ends at %d is gone", clk.now(), end)
			}
			if _, ok := r.Check(tok, end+leeway+1); ok {
				t.Fatal("an entry matches after its end and leeway")
			}
		}
		if over := clk.now() - begin - kept - 2*sweepTime; over > 0 && r.entries() > n-int(over)*(n/1000)+1 {
			t.Fatalf("%d seconds after the first could be forgotten there are %d entries", over+2*sweepTime, r.entries())
		}
	}
	for range n / chunkSize { // one chunk at a time
		must(t, r.Apply(m.append(unknown)))
	}
	if got := r.entries(); got != 1 {
		t.Errorf("%d entries are left", got)
	}
	if _, ok := r.Check(Token{Iss: iss, JTI: "stay"}, math.MaxInt64); !ok {
		t.Error("an entry without an end has ended")
	}
	r.View(func(v *View) {
		list := v.Revocations()
		if diff := cmp.Diff(map[revocation.Target]Record{stay.Target: stay}, maps.Collect(byTarget(t, list))); diff != "" {
			t.Error(diff)
		}
		if len(list.closed) > 1 {
			t.Errorf("%d chunks are left for one record", len(list.closed)+1)
		}
	})
}

// A clock that is wrong un-revokes nothing: what forgets is the slower of this one and
// the log's.
func TestWrongClock(t *testing.T) {
	t.Parallel()
	const year = 365 * 24 * 3600
	for _, tt := range []struct {
		name       string
		here, log  int64 // seconds off
		forgetting bool
	}{
		{"right", 0, 0, true},
		{"fast here", year, 0, false},
		{"fast in the log", 0, year, false},
		{"fast in both", year, year, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			const n = 2000
			clk, m := newClock(), newModel()
			m.clock = newClock()
			r := clk.newReplica(true)
			past := begin
			if tt.name == "right" {
				past -= year
			}
			clk.seconds.Add(tt.here)
			m.clock.seconds.Add(tt.log)
			load(t, r, m.head(), func(l *Loader) {
				for i := range n {
					l.Revocation(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: past + 100})
				}
			})
			holds := func(when string) {
				t.Helper()
				for i := range 2 * n {
					if _, ok := r.Check(Token{Iss: iss, JTI: uuidOf(i)}, past+100); !ok {
						t.Fatalf("%s: %d is not revoked", when, i)
					}
				}
			}
			for i := range n {
				must(t, r.Apply(m.revoke(Record{Target: ofJTI(uuidOf(n + i)), Tenant: acme, Exp: past + 100 + kept + year})))
			}
			if r.entries() < n || !tt.forgetting && r.entries() != 2*n {
				t.Fatalf("%d entries after as many events", r.entries())
			}
			for range 2 * sweepTime {
				clk.seconds.Add(1)
				must(t, r.Apply(m.append(revocation.Event{Type: "moon.risen"})))
			}
			if tt.forgetting {
				if got := r.entries(); got != n {
					t.Errorf("%d entries are left, want %d", got, n)
				}
				return
			}
			holds("a while later")
			load(t, r, revocation.Position{Epoch: newEpoch, Seq: 1})
			holds("in a new epoch")
		})
	}
}

// Whatever is added and dies, the lists have what lives, and no memory is held for what
// does not.
func TestArchive(t *testing.T) {
	t.Parallel()
	for seed := range uint64(size(3, 5)) {
		rng := rand.New(rand.NewPCG(seed, 1))
		a := newArchive()
		numbers, next := map[string]uint32{}, 0
		compact := func() {
			a.compact(func(target revocation.Target, n uint32) { numbers[target.ID] = n })
		}
		for range 30 {
			for range rng.IntN(2 * chunkSize) {
				id := uuidOf(next)
				next++
				numbers[id] = a.append(uuids, Record{Target: ofJTI(id), Tenant: acme, Exp: begin})
			}
			share := rng.IntN(4) // of three
			for id, n := range numbers {
				if rng.IntN(3) < share {
					a.kill(n)
					delete(numbers, id)
				}
			}
			if rng.IntN(2) == 0 {
				compact()
			}
			got := maps.Collect(byTarget(t, a.list()))
			if len(got) != len(numbers) {
				t.Fatalf("%d records are listed, want %d", len(got), len(numbers))
			}
			for id := range numbers {
				if _, ok := got[ofJTI(id)]; !ok {
					t.Fatalf("%s is not listed", id)
				}
			}
		}
		for _, n := range numbers {
			a.kill(n)
		}
		for i, c := range a.chunks {
			if c != nil && i != a.open {
				t.Errorf("chunk %d of %d is held, and all of it is dead", i, c.dead)
			}
		}
		if len(a.worn) > 0 || len(a.free) != len(a.chunks)-1 {
			t.Errorf("%d chunks are to be copied, %d of %d are free", len(a.worn), len(a.free), len(a.chunks))
		}
	}
}

// Readers at all times, while entries come, are extended and forgotten.
func TestReadersWhileApplying(t *testing.T) {
	t.Parallel()
	clk, m := newClock(), newModel()
	const ends, window = 300, 5000
	n := size(10_000, 15_000)
	record := func(seq int) Record { // of the event of seq
		if seq%3 == 0 {
			return Record{Target: ofJTI(uuidOf(seq / 2)), Tenant: acme, Exp: begin + int64(seq)/10 + 2*ends}
		}
		return Record{Target: ofJTI(uuidOf(seq)), Tenant: acme, Exp: begin + int64(seq)/10 + ends}
	}
	for seq := 1; seq <= n; seq++ {
		m.revoke(record(seq))
		m.log[seq-1].Time = time.Unix(begin+int64(seq)/10, 0)
	}
	r := clk.newReplica(true)
	load(t, r, revocation.Position{Epoch: epoch})
	type taken struct {
		at   revocation.Position
		list Revocations
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		for _, e := range m.log {
			clk.seconds.Store(begin + int64(e.Seq)/10) // ends pass as events come
			if err := r.Apply(e); err != nil {
				t.Error(err)
				return
			}
		}
	})
	running := func() bool {
		select {
		case <-done:
			return false
		default:
			return true
		}
	}
	for id := range uint64(3) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(id, 1))
			for running() {
				at := int(r.At().Seq)
				if at == 0 {
					runtime.Gosched()
					continue
				}
				rec := record(max(1, at-rng.IntN(window)))
				if _, ok := r.Check(Token{Iss: iss, JTI: rec.Target.ID}, rec.Exp+leeway); !ok && clk.now() <= rec.Exp+leeway {
					t.Errorf("at %d an entry that ends at %d is not there", at, rec.Exp)
					return
				}
				if kind, ok := r.Check(Token{Iss: iss, JTI: uuidOf(n + 1 + rng.IntN(n)), ClientID: "x"}, begin); ok {
					t.Errorf("what nobody revoked is revoked: %s", kind)
					return
				}
			}
		})
	}
	var lists []taken
	for next := revocation.Seq(1); running(); runtime.Gosched() {
		if r.At().Seq < next {
			continue
		}
		var l taken
		r.View(func(v *View) { l = taken{v.At(), v.Revocations()} })
		lists = append(lists, l)
		next = l.at.Seq + revocation.Seq(n/20)
		for _, l := range lists { // while others write to what they share
			got := 0
			for range l.list.All() {
				got++
			}
			if got != l.list.Len() {
				t.Fatalf("a list of %d has %d", l.list.Len(), got)
			}
		}
	}
	wg.Wait()
	if len(lists) < 3 {
		t.Fatalf("%d lists were taken, too few to tell", len(lists))
	}
	then, seq := newModel(), 0
	for _, l := range lists {
		for ; seq < int(l.at.Seq); seq++ {
			then.hold(record(seq + 1))
		}
		got := maps.Collect(byTarget(t, l.list))
		now := begin + int64(l.at.Seq)/10
		for target, rec := range then.revoked {
			if has, ok := got[target]; ok && has != rec || !ok && rec.Exp+leeway >= now {
				t.Fatalf("in the list of %s: %+v, %t; want %+v", l.at, has, ok, rec)
			}
			delete(got, target)
		}
		if len(got) > 0 {
			t.Fatalf("the list of %s has %d that were not revoked then", l.at, len(got))
		}
	}
}

// It is not parallel: it measures the heap.
func TestMemory(t *testing.T) {
	const n = 200_000
	for _, tt := range []struct {
		records bool
		limit   int
	}{{false, 40}, {true, 200}} {
		before := heap()
		r := NewState(StateConfig{Records: tt.records})
		load(t, r, revocation.Position{Epoch: epoch}, func(l *Loader) {
			for i := range n {
				l.Revocation(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: math.MaxInt64})
			}
		})
		if got := (heap() - before) / n; got > tt.limit {
			t.Errorf("with records %t an entry takes %d bytes, must be at most %d", tt.records, got, tt.limit)
		} else {
			t.Logf("with records %t an entry takes %d bytes", tt.records, got)
		}
		runtime.KeepAlive(r)
	}
}

func heap() int {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int(s.HeapAlloc)
}
