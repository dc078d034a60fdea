package replica

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// badLoads is a service whose snapshots are what goes wrong, once it is told so.
type badLoads struct {
	*service
	load func(ctx context.Context) error
}

func (b *badLoads) Load(ctx context.Context, to *State) error {
	b.mu.Lock()
	load := b.load
	b.mu.Unlock()
	if load != nil {
		if err := load(ctx); err != nil {
			return err
		}
	}
	return b.service.Load(ctx, to)
}

// lose takes all revocations out of a replica's state.
func lose(r *Replica) {
	r.state.mu.Lock()
	defer r.state.mu.Unlock()
	r.state.content.marks = newMarks(false)
	r.state.marks.Store(r.state.content.marks)
}

// A snapshot that is to repair a state, and does not come or takes long, holds up nothing that is told.
func TestRepairHoldsUpNothing(t *testing.T) {
	for name, tt := range map[string]struct {
		load    func(ctx context.Context) error
		repairs bool
	}{
		"it fails": {func(context.Context) error { return errors.New("no snapshot today") }, false},
		"it hangs": {func(ctx context.Context) error {
			<-ctx.Done()
			return context.Cause(ctx)
		}, false},
		"it takes long": {func(ctx context.Context) error {
			sleep(ctx, 12*time.Second, nil)
			return context.Cause(ctx)
		}, true},
	} {
		for _, tenants := range [][]string{nil, {acme.Domain}} {
			t.Run(fmt.Sprint(name, ", of ", tenants), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					s, d := &badLoads{service: newService(t)}, &desk{hold: 2 * time.Second}
					s.tenants = tenants
					s.revoke("lost")
					s.change("created", application(1, "a"))
					s.change("created", application(2, "b"))
					r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s.service}}, Reporter: d, Staleness: Staleness{Max: 5 * time.Minute}})
					within(t, 5*time.Second, "it is connected", func() bool { return r.connected(nil) && s.reachedBy(r)() })
					time.Sleep(time.Minute)
					lose(r)
					s.set(func() { s.load = tt.load })
					d.set(func() { d.asks = []Instructions{{Load: "one"}} })
					for i := range 300 {
						s.revoke(fmt.Sprint("meanwhile-", i))
						switch i % 3 {
						case 1:
							s.change("created", application(int32(i+10), "new"))
						case 2:
							s.change("deleted", application(int32(i+10-1), "new"))
						}
						time.Sleep(200 * time.Millisecond) // a heartbeat comes each second
						if age := r.Age(); age > 4*time.Second {
							t.Fatalf("after %d events what is known is %s old, at %s", i, age, r.state.At())
						}
						if behind := s.head().Seq - r.state.At().Seq; tenants == nil && behind > 0 || behind > 15 {
							t.Fatalf("after %d events it is at %s, the log at %s", i, r.state.At(), s.head())
						}
					}
					if got := r.Check(tokenOf("lost")).Outcome == Revoked; got != tt.repairs {
						t.Errorf("what was lost is there: %t", got)
					}
					// What the service asks for later is done.
					s.set(func() { s.load = nil })
					d.set(func() { d.asks = []Instructions{{Load: "two"}} })
					time.Sleep(time.Minute)
					s.equal(t, r)
				})
			})
		}
	}
}

// What a feed has lost while a repair hangs is fetched, without a snapshot.
func TestGapWhileRepairHangs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, d := &badLoads{service: newService(t)}, &desk{hold: 2 * time.Second}
		s.revoke("a")
		drop := ""
		w := &wire{s: s.service, spoil: func(e revocation.Event) ([]revocation.Event, error) {
			if rec, ok := recordOf(e); ok && rec.Target.ID == drop {
				return nil, nil
			}
			return []revocation.Event{e}, nil
		}}
		r, _ := start(t, Config{Source: s, Feeds: []Feed{w}, Reporter: d, Staleness: Staleness{Max: 20 * time.Second}})
		within(t, 5*time.Second, "it is connected", func() bool { return r.connected(nil) && s.reachedBy(r)() })
		time.Sleep(time.Minute)
		s.set(func() {
			s.load = func(ctx context.Context) error {
				<-ctx.Done()
				return context.Cause(ctx)
			}
		})
		d.set(func() { d.asks = []Instructions{{Load: "one"}} })
		time.Sleep(3 * time.Second)
		drop = "dropped"
		s.revoke("dropped")
		s.revoke("after it")
		for range 200 {
			time.Sleep(100 * time.Millisecond)
			if d := r.Check(tokenOf("never")); d.Outcome != Valid {
				t.Fatalf("requests are %s, what is known is %s old", d.Outcome, d.Age)
			}
		}
		s.equal(t, r)
	})
}

// What others' tokens are revoked with no reader of some tenants holds, whatever the way that it is told.
func TestAheadOfOthers(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.tenants = []string{acme.Domain}
	r, err := New(Config{Source: s})
	must(t, err)
	must(t, s.Load(t.Context(), r.state))
	r.rescope()
	r.revokeAhead(s.revoke("others", other))
	r.revokeAhead(s.revoke("ours"))
	if r.Status().Revocations != 1 || r.Check(tokenOf("ours")).Outcome != Revoked {
		t.Errorf("%+v", r.Status())
	}
}

// A feed that does not name tenants tells of all of them: what is of others does not count, also after a restart.
func TestDigestBesideDirectory(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, folder := newService(t), t.TempDir()
		s.tenants = []string{acme.Domain}
		s.revoke("a")
		cutoff := time.Now().Unix() / 60 * 60
		same := func(when string, r *Replica) {
			t.Helper()
			within(t, 30*time.Second, "it is where the log is", s.reachedBy(r))
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			got, err := r.state.Digest(ctx, cutoff, revocation.Position{})
			must(t, err)
			sound := NewState(StateConfig{})
			must(t, s.Load(t.Context(), sound))
			if diff := gocmp.Diff(digestOf(t, sound, cutoff), got); diff != "" {
				t.Errorf("%s (-log +replica):\n%s", when, diff)
			}
		}
		others := func(id string) {
			end := time.Now().Add(24 * time.Hour).Unix()
			s.append(revoke(Record{Target: revocation.Target{Kind: revocation.KindToken, Iss: "https://other.example", ID: id}, Tenant: other, Exp: end}))
			s.append(revoke(Record{Target: revocation.Target{Kind: revocation.KindTenant, ID: other.Domain}, Tenant: other, Exp: end}))
		}
		cfg := Config{Source: s, Feeds: []Feed{&wire{s: s}, &etcd{s}}, Folder: folder}
		r, stop := start(t, cfg)
		within(t, 5*time.Second, "it is connected", func() bool { return s.reachedBy(r)() })
		time.Sleep(2 * time.Second)
		others("one")
		s.revoke("b")
		s.append(revoke(Record{Target: revocation.Target{Kind: revocation.KindTenant, ID: acme.Domain}, Tenant: acme, Exp: time.Now().Add(time.Hour).Unix()}))
		time.Sleep(2 * time.Second)
		if n := r.Status().Revocations; n != 5 {
			t.Fatalf("%d revocations are held, want those of others too", n)
		}
		same("at first", r)
		r.ask(goal{repair: true})
		time.Sleep(10 * time.Second)
		others("two")
		same("after a repair", r)
		signal(r.save)
		must(t, r.folder.save(r.state, time.Now()))
		others("three")
		s.revoke("c")
		time.Sleep(2 * time.Second)
		stop()
		r, stop = start(t, cfg)
		same("after a restart", r)
		if n := r.Status().Revocations; n != 8 {
			t.Errorf("%d revocations are held after a restart", n)
		}
		stop()
	})
}

// An issuer that the log names while it is read, and whose entries were passed over, is read anew.
func TestDigestOfIssuerToldLate(t *testing.T) {
	t.Parallel()
	for _, steps := range []int{0, 1, 3, 100} {
		s := newClock().newReplica(false)
		must(t, s.Load(revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) error {
			l.Tenants([]string{acme.Domain})
			return nil
		}))
		rec := func(n int) Record { return Record{Target: ofJTI(uuidOf(n)), Tenant: acme, Exp: begin + 60} }
		for n := range 3000 {
			s.Revoke(rec(n), revocation.Position{Epoch: epoch, Seq: 1})
		}
		if d := digestOf(t, s, begin); d.Count != 0 {
			t.Fatalf("%d of an issuer that the log does not have", d.Count)
		}
		sc := newScan(begin, revocation.Position{Epoch: epoch, Seq: 2}, false)
		s.observe(sc)
		for range steps {
			s.readOn(sc)
		}
		e := revoke(rec(7))
		e.Position = revocation.Position{Epoch: epoch, Seq: 2}
		must(t, s.Apply(e))
		must(t, s.Through(e.Position))
		for more := true; more; {
			more, _ = s.readOn(sc)
		}
		s.observe(nil)
		if got := sc.sum("").count; !sc.over || got != 3000 {
			t.Errorf("after %d steps: %d count, over %t", steps, got, sc.over)
		}
	}
}

// What a state lacks at or before its position is told, and no digest waits for anything to come.
func TestDigestOfWhatWasMissed(t *testing.T) {
	for _, tenants := range [][]string{nil, {acme.Domain}} {
		t.Run(fmt.Sprint(tenants), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s, folder := newService(t), t.TempDir()
				s.tenants = tenants
				cutoff := time.Now().Unix() / 60 * 60
				s.revoke("a")
				lost := s.revoke("lost")
				s.revoke("b")
				at := s.head()
				digest := func(when string, r *Replica) {
					t.Helper()
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					defer cancel()
					if d, err := r.state.Digest(ctx, cutoff, revocation.Position{}); err != nil || d.Count != 3 || d.Position != at {
						t.Errorf("%s: %+v, %v", when, d, err)
					}
				}
				r, err := New(Config{Source: s, Folder: folder})
				must(t, err)
				s.set(func() { s.log[1] = s.log[0] }) // the snapshot lacks it
				must(t, s.Load(t.Context(), r.state))
				r.rescope()
				must(t, r.folder.save(r.state, time.Time{}))
				s.set(func() { s.log[1] = lost })
				rec, _ := recordOf(lost)
				r.revoke(rec, lost.Position)
				digest("at once", r)
				must(t, r.Close())
				if r, err = New(Config{Source: s, Folder: folder}); err != nil {
					t.Fatal(err)
				}
				digest("after a restart", r)
				r.ask(goal{repair: true})
				g, _ := r.begin()
				must(t, r.attempt(t.Context(), g))
				digest("after a repair", r)
				must(t, r.Close())
			})
		})
	}
}

// A snapshot that is to repair a state may be of any moment since: what came after it is not undone.
func TestRepairAfterEvents(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		for _, scope := range []partScope{{}, {tenants: []string{acme.Domain, "b.example"}}, {revocationsOnly: true}} {
			log := newDigestLog(seed, 40)
			for range 300 {
				log.add()
			}
			const before, after = 100, 200
			for _, at := range []revocation.Seq{before - 1, before, before + 1, 150, after, after + 50} {
				s := newClock().newReplica(false)
				must(t, log.load(s, before, scope))
				s.content.marks = newMarks(false)
				s.marks.Store(s.content.marks)
				if !scope.whole() { // it has something ahead of its position
					for _, e := range log.events[before : before+20] {
						must(t, s.Apply(e))
					}
				}
				done := s.repairable()
				for _, e := range log.events[s.At().Seq:after] {
					must(t, s.Apply(e))
				}
				if !scope.whole() {
					must(t, s.Through(log.at(150)))
				}
				loads, was := s.loadCount(), s.At()
				must(t, log.load(s, at, scope))
				done()
				if s.At().Seq != max(at, was.Seq) || s.replayed != nil {
					t.Fatalf("the state was at %s, and is at %s after a snapshot at %d", was, s.At(), at)
				}
				if !scope.whole() {
					must(t, s.Through(log.at(max(at, after))))
				}
				if at < before {
					if s.loadCount() != loads {
						t.Error("a snapshot of before is loaded")
					}
					continue
				}
				want := log.fold(s.At().Seq, scope).digest(s.At(), begin)
				if diff := gocmp.Diff(want, digestOf(t, s, begin)); diff != "" {
					t.Errorf("seed %d, %+v, with a snapshot at %d (-want +got):\n%s", seed, scope, at, diff)
				}
			}
		}
	}
}

// A repair does not hold more than it may, however much changes meanwhile.
func TestRepairIsBounded(t *testing.T) {
	t.Parallel()
	s := newClock().newReplica(false)
	load(t, s, revocation.Position{Epoch: epoch})
	done := s.repairable()
	s.replayed.changes = make([]lateChange, maxReplayed)
	s.replay(revocation.Position{Epoch: newEpoch, Seq: 1}, catalog.Change{})
	if s.replayed == nil {
		t.Error("a change of another epoch ends it")
	}
	s.replay(revocation.Position{Epoch: epoch, Seq: 1}, catalog.Change{})
	if s.replayed != nil {
		t.Error("it goes on")
	}
	done()
}
