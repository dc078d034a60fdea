package replica

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	mathbig "math/big"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// plainDigest is the digest of what is given, by the words of api/digest.md.
func plainDigest(at revocation.Position, cutoff int64, revoked iter.Seq[Record], entities iter.Seq[catalog.Entity]) Digest {
	d := Digest{Position: at, Cutoff: cutoff}
	half := func(parts ...any) []byte {
		var b []byte
		for _, part := range parts {
			switch part := part.(type) {
			case string:
				b = append(b, part...)
			case []byte:
				b = append(b, part...)
			case int64:
				b = binary.BigEndian.AppendUint64(b, uint64(part))
			}
		}
		sum := sha256.Sum256(b)
		return sum[:16]
	}
	sums := [2]*mathbig.Int{new(mathbig.Int), new(mathbig.Int)}
	add := func(to *mathbig.Int, hash []byte) { to.Add(to, new(mathbig.Int).SetBytes(hash)) }
	for rec := range revoked {
		if rec.Exp < cutoff {
			continue
		}
		label, notAfter := string(rec.Target.Kind), int64(0)
		if rec.Target.Digest {
			label = "digest"
		}
		key := half(label, "\x00", rec.Target.ID)
		if uuid, ok := uuidKeyPlainly(rec.Target.ID); ok && rec.Target.Kind == revocation.KindToken && !rec.Target.Digest {
			label, key = "", binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uuid[0]), uuid[1])
		}
		if rec.Target.Kind.HasTime() {
			notAfter = rec.NotAfter
		}
		add(sums[0], half(half(label, "\x00", rec.Target.Iss), key, rec.Exp, notAfter))
		d.Count++
	}
	for e := range entities {
		add(sums[1], half(string(e.Noun()), "\x00", e.Base().UUID, "\x00", e.Base().Timestamp))
		d.Entities++
	}
	all := new(mathbig.Int).Lsh(mathbig.NewInt(1), 128)
	sums[0].Mod(sums[0], all).FillBytes(d.Revocations[:])
	sums[1].Mod(sums[1], all).FillBytes(d.Catalog[:])
	return d
}

// digest is that of the model.
func (m *model) digest(at revocation.Position, cutoff int64) Digest {
	return plainDigest(at, cutoff, maps.Values(m.revoked), maps.Values(m.entities))
}

func digestOf(t testing.TB, s *State, cutoff int64) Digest {
	t.Helper()
	d, err := s.Digest(t.Context(), cutoff, revocation.Position{})
	must(t, err)
	return d
}

// digestLog makes up events of tenants that each have an issuer.
type digestLog struct {
	partLog
	rng     *rand.Rand
	version int64
	ids     int                       // of identifiers: few are extended often
	last    map[string]revocation.Seq // of each tenant
}

var digestTenants = []revocation.Tenant{acme, {ID: 2, Domain: "b.example"}, {ID: 3, Domain: "c.example"}}

func newDigestLog(seed uint64, ids int) *digestLog {
	return &digestLog{
		partLog: partLog{epoch: epoch}, rng: rand.New(rand.NewPCG(seed, 6)), ids: ids, last: make(map[string]revocation.Seq),
	}
}

// append is partLog's, for many events.
func (l *digestLog) append(e revocation.Event, what any) revocation.Event {
	e.Position, e.Previous = l.at(l.head()+1), l.last[e.Tenant.Domain]
	l.last[e.Tenant.Domain] = e.Seq
	l.events, l.what = append(l.events, e), append(l.what, what)
	return e
}

func (l *digestLog) record() Record {
	tenant := digestTenants[l.rng.IntN(len(digestTenants))]
	target := revocation.Target{Kind: revocation.Kinds[l.rng.IntN(len(revocation.Kinds))], Iss: "https://" + tenant.Domain}
	switch n := l.rng.IntN(l.ids); {
	case target.Kind == revocation.KindTenant:
		target.Iss, target.ID = "", tenant.Domain
	case target.Kind != revocation.KindToken || n%3 == 0:
		target.ID = fmt.Sprint("id-", n)
	case n%3 == 1:
		target.ID, target.Digest = fmt.Sprintf("%064x", n), true
	default:
		target.ID = uuidOf(n)
	}
	return Record{Target: target, Tenant: tenant, Exp: begin + l.rng.Int64N(200) - 50, NotAfter: begin - l.rng.Int64N(100)}
}

// entity is of one of some that there may be.
func (l *digestLog) entity() catalog.Entity {
	n := l.rng.IntN(len(digestTenants) * 4)
	noun := l.rng.IntN(len(catalog.Nouns))
	e := catalog.New(catalog.Nouns[noun])
	l.version++
	*e.Base() = catalog.Meta{
		ID: int32(n + 1), UUID: fmt.Sprintf("0193a2f4-7c11-7d02-%04x-%012x", noun, n), Tenant: digestTenants[n%len(digestTenants)], Timestamp: begin*1000 + l.version,
	}
	return e
}

// add appends an event.
func (l *digestLog) add() revocation.Event {
	if l.rng.IntN(3) > 0 {
		rec := l.record()
		return l.append(revoke(rec), rec)
	}
	c := catalog.Change{Verb: catalog.Updated, Entity: l.entity()}
	if l.rng.IntN(3) == 0 {
		c.Verb = catalog.Deleted
	}
	e, err := catalog.NewEvent(c)
	if err != nil {
		panic(err)
	}
	return l.append(e, c)
}

// Whatever way a state was filled, it has the digest that the log says.
func TestDigest(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		clk, log := newClock(), newDigestLog(seed, 40)
		for range 400 {
			log.add()
		}
		const cutoff = begin
		at := log.at(log.head())
		want := log.fold(log.head(), partScope{}).digest(at, cutoff)
		if want.Count < 100 || want.Entities < 20 {
			t.Fatalf("the log makes %d revocations and %d entities", want.Count, want.Entities)
		}

		follow := func(records bool) *State {
			s := clk.newReplica(records)
			must(t, log.load(s, 0, partScope{}))
			for _, e := range log.events {
				must(t, s.Apply(e))
			}
			return s
		}
		written := func(from *State) *bytes.Buffer {
			var b bytes.Buffer
			_, err := from.WriteSnapshot(&b)
			must(t, err)
			return &b
		}
		read := func(from *bytes.Buffer) *State {
			s := clk.newReplica(false)
			_, err := s.ReadSnapshot(from)
			must(t, err)
			return s
		}
		loaded := func(records bool, scope partScope) *State {
			s := clk.newReplica(records)
			must(t, log.load(s, log.head(), scope))
			return s
		}
		service := follow(true)
		all, err := service.Digests(t.Context(), cutoff)
		must(t, err)
		got, err := all.At(at, DigestScope{})
		must(t, err)
		onlyRevocations := want
		onlyRevocations.Catalog, onlyRevocations.Entities = Sum{}, 0
		for name, tt := range map[string]struct{ got, want Digest }{
			"all scopes":          {got, want},
			"a service's":         {digestOf(t, service, cutoff), want},
			"by events":           {digestOf(t, follow(false), cutoff), want},
			"binary":              {digestOf(t, read(written(service)), cutoff), want},
			"from disk":           {digestOf(t, read(written(follow(false))), cutoff), want},
			"listed":              {digestOf(t, loaded(false, partScope{}), cutoff), want},
			"listed, a service's": {digestOf(t, loaded(true, partScope{}), cutoff), want},
			"revocations":         {digestOf(t, loaded(false, partScope{revocationsOnly: true}), cutoff), onlyRevocations},
			"revocations, binary": {digestOf(t, read(written(loaded(false, partScope{revocationsOnly: true}))), cutoff), onlyRevocations},
			"loaded over an old one": {func() Digest {
				s := clk.newReplica(false)
				must(t, log.load(s, log.head()/2, partScope{}))
				must(t, log.load(s, log.head(), partScope{}))
				return digestOf(t, s, cutoff)
			}(), want},
		} {
			if diff := cmp.Diff(tt.want, tt.got); diff != "" {
				t.Errorf("seed %d, %s (-want +got):\n%s", seed, name, diff)
			}
		}
		// What a gateway holds of a log that is no more it holds beside.
		s := clk.newReplica(false)
		load(t, s, revocation.Position{Epoch: newEpoch, Seq: 9}, func(l *Loader) {
			l.Revocation(Record{Target: ofJTI("of before"), Exp: cutoff})
			l.Revocation(Record{Target: ofJTI("of before, ended"), Exp: cutoff - 1})
		})
		must(t, log.load(s, log.head(), partScope{}))
		if d := digestOf(t, s, cutoff); d.Count != want.Count+1 || d.Revocations == want.Revocations || d.Catalog != want.Catalog {
			t.Errorf("with a revocation of an epoch before: %+v, the log has %+v", d, want)
		}
	}
}

// An entry or an entity that is gone, or is another, makes another digest.
func TestDigestFinds(t *testing.T) {
	t.Parallel()
	fill := func(s *State) Digest {
		load(t, s, revocation.Position{Epoch: epoch, Seq: 5}, func(l *Loader) {
			for n := range 8000 {
				l.Revocation(Record{Target: ofJTI(uuidOf(n)), Tenant: acme, Exp: begin + 60})
			}
			l.Entity(&catalog.Scope{Meta: catalog.Meta{ID: 1, UUID: uuidOf(1), Tenant: acme, Timestamp: 1}, Name: "a"})
		})
		return digestOf(t, s, begin)
	}
	for _, records := range []bool{false, true} {
		s := newClock().newReplica(records)
		want := fill(s)
		set := s.content.marks.set(uuids, iss)
		k, _ := uuidKey(uuidOf(777))
		e := set.find(k)
		e[wordEnd]++
		if got := digestOf(t, s, begin); got.Revocations == want.Revocations || got.Count != want.Count {
			t.Errorf("with a later end: %+v, before %+v", got, want)
		}
		e[wordEnd]--
		if got := digestOf(t, s, begin); got != want {
			t.Errorf("as before: %+v, before %+v", got, want)
		}
		hash, dir := set.hash(k), set.dir.Load()
		table := dir.tables[dir.index(hash)]
		for g := range table.tags {
			for i := range groupSize {
				if &table.slot(g, i, set.stride)[0] == &e[0] {
					table.tags[g] &^= 0xff << (8 * i)
				}
			}
		}
		if got := digestOf(t, s, begin); got.Revocations == want.Revocations || got.Count != want.Count-1 || got.Catalog != want.Catalog {
			t.Errorf("without an entry: %+v, before %+v", got, want)
		}
		s.content.shelves.scopes.sorted = nil
		if got := digestOf(t, s, begin); got.Catalog != (Sum{}) || got.Entities != 0 {
			t.Errorf("without the scope: %+v, before %+v", got, want)
		}
	}
}

// A state is changed between any two steps of a scan, which must come to what the log says at its end.
func TestDigestScan(t *testing.T) {
	t.Parallel()
	for seed := range uint64(size(1, 10)) {
		for _, byTenant := range []bool{false, true} {
			clk, log := newClock(), newDigestLog(seed, 3000)
			s := clk.newReplica(byTenant)
			// Of one set and one shelf there is more than a step reads; the set has two tables, for a while.
			before := newModel()
			for n := range 9000 {
				before.hold(Record{Target: revocation.Target{Kind: revocation.KindToken, Iss: "https://acme.example", ID: uuidOf(n)}, Tenant: acme, Exp: begin})
			}
			for n := range 2500 {
				e := &catalog.Scope{Meta: catalog.Meta{ID: int32(n), UUID: uuidOf(n), Tenant: acme, Timestamp: int64(n)}}
				before.entities[e.UUID] = e
			}
			load(t, s, log.at(0), before.fill)
			set := s.content.marks.set(uuids, "https://acme.example")
			change := func(events int) {
				t.Helper()
				for n := range events {
					if n%8 == 0 {
						must(t, s.Apply(log.add()))
					}
					rec := Record{Target: revocation.Target{Kind: revocation.KindToken, Iss: "https://acme.example"}, Tenant: acme, Exp: begin}
					rec.Target.ID = uuidOf(log.rng.IntN(100_000))
					must(t, s.Apply(log.append(revoke(rec), rec)))
				}
			}
			change(100)
			const cutoff = begin - 20
			sc := newScan(cutoff, revocation.Position{}, byTenant)
			s.observe(sc)
			steps, tables := 0, len(set.dir.Load().tables)
			for more := true; more; steps++ {
				change(800)
				more, _ = s.readOn(sc)
			}
			if tables == len(set.dir.Load().tables) || !sc.over || steps < 4 {
				t.Fatalf("it is over: %t, after %d steps, with %d tables of %d", sc.over, steps, len(set.dir.Load().tables), tables)
			}
			change(100) // is of later
			s.observe(nil)
			at, m := sc.at, log.fold(sc.at.Seq, partScope{})
			for _, rec := range before.revoked {
				m.hold(rec)
			}
			maps.Copy(m.entities, before.entities) // their UUIDs are others
			var sum tally
			for _, one := range sc.sums {
				sum.join(one)
			}
			if diff := cmp.Diff(m.digest(at, cutoff), sum.digest(at, cutoff)); diff != "" {
				t.Errorf("seed %d, by tenant %t, after %d steps (-want +got):\n%s", seed, byTenant, steps, diff)
			}
		}
	}
}

// A set that becomes empty behind the scan, or before it, begins anew with one table.
func TestDigestScanOfEmptiedSet(t *testing.T) {
	t.Parallel()
	for _, records := range []bool{false, true} {
		clk, m := newClock(), newModel()
		m.clock = clk
		s := clk.newReplica(records)
		load(t, s, m.head())
		for n := range 6500 {
			must(t, s.Apply(m.revoke(Record{Target: ofJTI(uuidOf(n)), Tenant: acme, Exp: begin + 10})))
		}
		cutoff := begin + kept + 60
		sc := newScan(cutoff, revocation.Position{}, false)
		s.observe(sc)
		set := s.content.marks.set(uuids, iss)
		for sc.from == 0 {
			s.readOn(sc)
		}
		if dir := set.dir.Load(); sc.complete || sc.from>>(64-dir.depth) == 0 || s.content.marks.sets[sc.set] != set {
			t.Fatalf("the scan is at %x of set %d, not within one of several tables", sc.from, sc.set)
		}
		clk.seconds.Store(begin + kept + 20)
		s.showed(time.Unix(clk.now(), 0))
		for range sweepTime + 2 {
			clk.seconds.Add(1)
			s.tick(time.Unix(clk.now(), 0))
			if set.dir.Load() == nil {
				break
			}
		}
		if set.dir.Load() != nil {
			t.Fatalf("the set still has %d entries", set.n)
		}
		for n := range 500 {
			must(t, s.Apply(m.revoke(Record{Target: ofJTI(uuidOf(n)), Tenant: acme, Exp: cutoff + int64(n%2)})))
		}
		for more, over := true, false; !over; more, over = s.readOn(sc) {
			if !more {
				t.Fatal("the scan is not over")
			}
		}
		s.observe(nil)
		if diff := cmp.Diff(m.digest(m.head(), cutoff), sc.sum("").digest(sc.at, cutoff)); diff != "" {
			t.Errorf("records %t (-want +got):\n%s", records, diff)
		}
	}
}

// Digests are made while events are applied and snapshots loaded: each is that of its position.
func TestDigestBeside(t *testing.T) {
	t.Parallel()
	log, s := newDigestLog(7, 20_000), newClock().newReplica(false)
	for range 3000 {
		log.add()
	}
	const half = 1500
	must(t, log.load(s, half, partScope{}))
	ctx, stop := context.WithCancel(t.Context())
	var got []Digest
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 50 {
			d, err := s.Digest(ctx, begin, revocation.Position{})
			if err != nil {
				break
			}
			got = append(got, d)
		}
	})
	for i, e := range log.events[half:] {
		must(t, s.Apply(e))
		if i%400 == 300 {
			must(t, log.load(s, e.Seq, partScope{}))
		}
	}
	last, err := s.Digest(t.Context(), begin, log.at(log.head()))
	must(t, err)
	stop()
	wg.Wait()
	for _, d := range append(got[max(0, len(got)-2):], last) {
		if diff := cmp.Diff(log.fold(d.Seq, partScope{}).digest(d.Position, begin), d); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
}

// A digest waits until the state is at a position that is far enough, and holds nothing ahead of it.
func TestDigestWaits(t *testing.T) {
	t.Parallel()
	rec := func(n int) Record { return Record{Target: ofJTI(uuidOf(n)), Tenant: acme, Exp: begin + 60} }
	at := func(seq revocation.Seq) revocation.Position { return revocation.Position{Epoch: epoch, Seq: seq} }
	type step struct {
		do   func(t *testing.T, s *State)
		want error // nil: it still waits
		done bool
		seq  revocation.Seq
	}
	loads := func(p revocation.Position, scope partScope) func(*testing.T, *State) {
		return func(t *testing.T, s *State) {
			must(t, s.Load(p, func(l *Loader) error {
				l.Tenants(scope.tenants)
				if scope.revocationsOnly {
					l.RevocationsOnly()
				}
				return nil
			}))
		}
	}
	applies := func(n int) func(*testing.T, *State) {
		return func(t *testing.T, s *State) {
			e := revoke(rec(n))
			e.Position = at(revocation.Seq(n))
			if s.content.part != nil {
				e.Previous = revocation.Seq(n - 1)
			}
			must(t, s.Apply(e))
		}
	}
	revokes := func(n int, p revocation.Position) func(*testing.T, *State) {
		return func(_ *testing.T, s *State) { s.Revoke(rec(n), p) }
	}
	through := func(seq revocation.Seq) func(*testing.T, *State) {
		return func(t *testing.T, s *State) { must(t, s.Through(at(seq))) }
	}
	one := partScope{tenants: []string{acme.Domain}}
	foreign := revocation.Position{Epoch: newEpoch, Seq: 3}
	for name, tt := range map[string]struct {
		after revocation.Position
		steps []step
	}{
		"nothing yet": {steps: []step{{}, {do: loads(at(4), partScope{}), done: true, seq: 4}}},
		"after": {after: at(3), steps: []step{
			{do: loads(at(1), partScope{})}, {do: applies(2)}, {do: applies(3), done: true, seq: 3}}},
		"ahead of the first snapshot": {steps: []step{
			{do: revokes(2, at(2))}, {do: loads(at(0), partScope{})}, {do: applies(1)}, {do: applies(2), done: true, seq: 2}}},
		"ahead here": {after: at(1), steps: []step{
			{do: loads(at(0), partScope{})}, {do: revokes(3, at(3))}, {do: applies(1)}, {do: applies(2)}, {do: applies(3), done: true, seq: 3}}},
		"ahead, then a snapshot": {after: at(1), steps: []step{
			{do: loads(at(0), partScope{})}, {do: revokes(3, at(3))}, {do: loads(at(2), partScope{})}, {do: loads(at(3), partScope{}), done: true, seq: 3}}},
		"a part": {after: at(1), steps: []step{
			{do: loads(at(0), one)}, {do: applies(1)}, {do: applies(2)}, {do: through(1)}, {do: through(2), done: true, seq: 2}}},
		"revocations of a part": {after: at(1), steps: []step{
			{do: loads(at(0), partScope{revocationsOnly: true})}, {do: revokes(2, at(2))}, {do: through(1)}, {do: through(5), done: true, seq: 5}}},
		"an epoch to come": {after: at(1), steps: []step{
			{do: loads(foreign, partScope{}), want: ErrEpoch, done: true}}},
		"ahead of an epoch to come": {after: foreign, steps: []step{
			{do: func(_ *testing.T, s *State) { s.Revoke(rec(9), revocation.Position{Epoch: newEpoch, Seq: 8}) }},
			{do: loads(foreign, partScope{})},
			{do: loads(revocation.Position{Epoch: newEpoch, Seq: 8}, partScope{}), done: true, seq: 8}}},
		"missed, then ahead": {after: at(1), steps: []step{
			{do: func(_ *testing.T, s *State) { s.restore(rec(8)) }}, {do: loads(at(0), partScope{})},
			{do: func(_ *testing.T, s *State) { s.restore(rec(9)) }}, {do: revokes(2, at(2))}, {do: loads(at(1), partScope{})},
			{do: applies(2), done: true, seq: 2}}},
		"beside": {after: at(1), steps: []step{
			{do: loads(at(0), partScope{})}, {do: revokes(9, foreign)}, {do: applies(1), done: true, seq: 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := NewState(StateConfig{})
				s.now = func() time.Time { return time.Unix(begin, 0) }
				var got Digest
				var err error
				done := make(chan struct{})
				go func() {
					defer close(done)
					got, err = s.Digest(t.Context(), begin, tt.after)
				}()
				for i, step := range tt.steps {
					if step.do != nil {
						step.do(t, s)
					}
					synctest.Wait()
					over := false
					select {
					case <-done:
						over = true
					default:
					}
					if over != step.done {
						t.Fatalf("after step %d it is over: %t (%+v, %v)", i, over, got, err)
					}
				}
				last := tt.steps[len(tt.steps)-1]
				if !errors.Is(err, last.want) || err == nil && got.Seq != last.seq {
					t.Errorf("at %d, %v; want %d, %v", got.Seq, err, last.seq, last.want)
				}
				if s.content.observer != nil {
					t.Error("changes are still observed")
				}
			})
		})
	}
}

func TestDigestEnds(t *testing.T) {
	t.Parallel()
	clk := newClock()
	s := clk.newReplica(false)
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := s.Digest(ctx, begin, revocation.Position{})
		first <- err
	}()
	second, end := context.WithCancel(t.Context())
	end()
	if _, err := s.Digest(second, begin, revocation.Position{}); !errors.Is(err, context.Canceled) {
		t.Errorf("the second: %v", err)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}

	load(t, s, revocation.Position{Epoch: epoch, Seq: 1})
	if _, err := s.Digest(t.Context(), begin, revocation.Position{Epoch: newEpoch}); !errors.Is(err, ErrEpoch) {
		t.Errorf("of another epoch: %v", err)
	}
	// What was forgotten cannot be counted, until a snapshot has brought it back.
	e := revoke(Record{Target: ofJTI("a"), Tenant: acme, Exp: begin + 9000})
	e.Position, e.Time = revocation.Position{Epoch: epoch, Seq: 2}, time.Unix(begin+kept+60, 0)
	clk.seconds.Store(begin + kept + 60)
	must(t, s.Apply(e))
	if _, err := s.Digest(t.Context(), begin+59, revocation.Position{}); err == nil || !strings.Contains(err.Error(), "forgotten") {
		t.Errorf("with a cutoff before what is kept: %v", err)
	}
	digestOf(t, s, begin+60)
	clk.seconds.Store(begin)
	load(t, s, revocation.Position{Epoch: epoch, Seq: 3})
	digestOf(t, s, begin+59)
}

// To read a large state takes no more memory than a small one.
func TestDigestAllocations(t *testing.T) {
	for _, records := range []bool{false, true} {
		var got [2]float64
		for i, n := range []int{1, 15_000} {
			s := newClock().newReplica(records)
			load(t, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
				for i := range n {
					l.Revocation(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + 60})
					if i%5 == 0 {
						l.Entity(&catalog.Scope{Meta: catalog.Meta{ID: int32(i), UUID: uuidOf(i), Tenant: acme}})
					}
				}
			})
			got[i] = testing.AllocsPerRun(3, func() {
				if records {
					_, err := s.Digests(context.Background(), begin)
					must(t, err)
				} else {
					digestOf(t, s, begin)
				}
			})
		}
		if got[1] > got[0]+1 || got[0] > 30 {
			t.Errorf("records %t: %v allocations for one entry, %v for 15,000", records, got[0], got[1])
		}
	}
}

func TestSum(t *testing.T) {
	t.Parallel()
	const text = "00ff102030405060708090a0b0c0d0e0"
	var s Sum
	must(t, s.UnmarshalText([]byte(text)))
	if got, err := s.MarshalText(); err != nil || string(got) != text {
		t.Errorf("%s became %s, %v", text, got, err)
	}
	for _, bad := range []string{"", text[1:], text + "00", text[:31] + "g"} {
		if err := s.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q is a sum", bad)
		}
	}
}

// TestDigestDocument checks the examples of api/digest.md: each is a snapshot, then its digest.
func TestDigestDocument(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../digest.md")
	must(t, err)
	shown := regexp.MustCompile("(?s)```json\n(.*?)```").FindAllSubmatch(doc, -1)
	if len(shown) != 4 {
		t.Fatalf("%d blocks of JSON, want two examples of two", len(shown))
	}
	for i := 0; i < len(shown); i += 2 {
		var snapshot struct {
			revocation.Position
			Revocations []struct {
				Kind          revocation.Kind
				Tenant, Iss   string
				JTI, Digest   string
				ClientID      string `json:"client_id"`
				Sub, SID, KID string
				Exp           int64
				NotAfter      int64 `json:"not_after"`
			}
			Scopes       []*catalog.Scope
			Applications []*catalog.Application
		}
		must(t, json.Unmarshal(shown[i][1], &snapshot))
		var want Digest
		must(t, json.Unmarshal(shown[i+1][1], &want))
		s := newClock().newReplica(true)
		load(t, s, snapshot.Position, func(l *Loader) {
			for _, r := range snapshot.Revocations {
				target := revocation.Target{Kind: r.Kind, Iss: r.Iss, ID: r.JTI + r.Digest + r.ClientID + r.Sub + r.SID + r.KID, Digest: r.Digest != ""}
				if r.Kind == revocation.KindTenant {
					target.ID = r.Tenant
				}
				l.Revocation(Record{Target: target, Tenant: revocation.Tenant{Domain: r.Tenant}, Exp: r.Exp, NotAfter: r.NotAfter})
			}
			for _, e := range snapshot.Scopes {
				l.Entity(e)
			}
			for _, e := range snapshot.Applications {
				l.Entity(e)
			}
		})
		got := digestOf(t, s, want.Cutoff)
		if diff := cmp.Diff(want, got); diff != "" {
			text, _ := json.Marshal(got)
			t.Errorf("example %d (-written +is):\n%s%s", i/2+1, diff, text)
		}
	}
	// The numbers on the way to the first sum.
	set := hashSet(uuids, "https://km.example.com")
	k, _ := uuidKey("0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3")
	for what, part := range map[string]total{"set": set.total, "hash": set.entry(k, 1_800_003_600, 0)} {
		if text, _ := part.sum().MarshalText(); !bytes.Contains(doc, text) {
			t.Errorf("the %s of the first example, %s, is not shown", what, text)
		}
	}
}

// BenchmarkDigest reads a million entries, beside a loop over them.
func BenchmarkDigest(b *testing.B) {
	for _, records := range []bool{false, true} {
		b.Run(fmt.Sprintf("records=%t", records), func(b *testing.B) {
			s := full(b, records)
			b.ReportAllocs()
			for b.Loop() {
				if d := digestOf(b, s, begin); d.Count != million {
					b.Fatalf("%d of %d", d.Count, million)
				}
			}
			if records {
				if _, err := s.Digests(b.Context(), begin); err != nil {
					b.Fatal(err)
				}
			}
			per := float64(b.Elapsed().Nanoseconds()) / float64(b.N) / million
			b.ReportMetric(per, "ns/entry")
			start, ends := time.Now(), int64(0)
			s.content.marks.each(func(_ string, set *set) { set.each(func(e entry) { ends ^= e.exp() }) })
			b.ReportMetric(per/(float64(time.Since(start).Nanoseconds())/million), "times-a-loop")
		})
	}
}
