package replica

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// Hours of revocations that come and end, then hours of silence: nothing is gone before its end
// and leeway, all is gone some minutes after it may be, and the memory is that of what is left.
func TestExpiryChurn(t *testing.T) {
	t.Parallel()
	const (
		step     = 60 // seconds
		perStep  = 200
		lifetime = 3600
		gone     = kept + 2*sweepTime + step
	)
	for _, tt := range []struct {
		name   string
		told   func(s *State, m *model, rec Record, i int)
		silent bool // there are no events that tell the time
	}{
		{name: "events", told: func(s *State, m *model, rec Record, _ int) { must(t, s.Apply(m.revoke(rec))) }},
		{name: "ahead", silent: true, told: func(s *State, m *model, rec Record, i int) {
			s.Revoke(rec, revocation.Position{Epoch: epoch, Seq: revocation.Seq(i + 1)})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(5, 5))
			clk, m := newClock(), newModel()
			m.clock = clk
			s := clk.newReplica(false)
			load(t, s, m.head(), func(l *Loader) {
				if tt.silent {
					l.RevocationsOnly()
				}
			})
			var all []int64 // the ends, by number
			pass := func() {
				t.Helper()
				clk.seconds.Add(step)
				now := clk.now()
				s.tick(time.Unix(now, 0))
				for range 30 {
					if len(all) == 0 {
						break
					}
					i := rng.IntN(len(all))
					tok := Token{Iss: iss, JTI: uuidOf(i)}
					if _, ok := s.Check(tok, now); ok != (now <= all[i]+leeway) {
						t.Fatalf("at %d what ends at %d is revoked: %t", now, all[i], ok)
					}
					if _, ok := s.Check(tok, all[i]+leeway); !ok && now <= all[i]+leeway {
						t.Fatalf("at %d what ends at %d is gone", now, all[i])
					}
				}
				may := 0 // be there
				for _, end := range all {
					if end >= now-gone {
						may++
					}
				}
				if n := s.entries(); n > may {
					t.Fatalf("at %d there are %d entries, and %d that ended less than %d s before", now, n, may, gone)
				}
				if size := s.bytes(); size > 45*may+60_000 {
					t.Fatalf("at %d, %d entries take %d bytes", now, may, size)
				}
			}
			for range size(2, 3) * 3600 / step {
				for range perStep {
					end := clk.now() + 1 + rng.Int64N(lifetime)
					tt.told(s, m, Record{Target: ofJTI(uuidOf(len(all))), Tenant: acme, Exp: end}, len(all))
					all = append(all, end)
				}
				pass()
			}
			for range (lifetime + gone) / step {
				pass()
			}
			if n, bytes := s.entries(), s.bytes(); n != 0 || bytes != 0 {
				t.Errorf("%d entries are left, which take %d bytes", n, bytes)
			}
		})
	}
}

// However much has ended, no step of the cleaning up is long: it is one table's.
func TestSweepIsDoneInSteps(t *testing.T) {
	t.Parallel()
	const n = 200_000
	clk := newClock()
	s := clk.newReplica(false)
	rng := rand.New(rand.NewPCG(7, 7))
	load(t, s, revocation.Position{Epoch: epoch}, func(l *Loader) {
		list := []loaded{{key: key{0, 1}, exp: math.MaxInt64}}
		for range n {
			list = append(list, loaded{key: key{rng.Uint64(), rng.Uint64()}, exp: begin})
		}
		l.entries(iss, uuids, list, n)
	})
	clk.seconds.Add(kept + 10)
	s.tick(time.Unix(clk.now(), 0))
	if got := s.entries(); got != n+1 {
		t.Fatalf("%d of %d entries are left before the log's time is known", got, n+1)
	}
	s.showed(time.Unix(clk.now(), 0))
	longest, seconds := 0, 0
	for ; s.entries() > 1 && seconds < 2*sweepTime; seconds++ {
		clk.seconds.Add(1)
		s.mu.Lock()
		s.reckon(time.Unix(clk.now(), 0))
		for before := s.entriesLocked(); s.sweep(time.Unix(clk.now(), 0)); {
			after := s.entriesLocked()
			longest, before = max(longest, before-after), after
		}
		s.mu.Unlock()
	}
	if s.entries() != 1 || longest > 2*tableMax {
		t.Errorf("after %d s %d entries are left; up to %d were forgotten at once", seconds, s.entries(), longest)
	}
	if _, ok := s.Check(Token{Iss: iss, JTI: textOfKey(key{0, 1})}, math.MaxInt64); !ok {
		t.Error("an entry without an end has ended")
	}
}

// In sweepTime all steps are due, however many they are.
func TestSweepComesAround(t *testing.T) {
	t.Parallel()
	for _, reserved := range []int{1, 10_000, 10 * tableMax * sweepTime} {
		s := newClock().newReplica(false)
		s.content.marks.set(uuids, iss).reserve(reserved)
		s.reckon(time.Unix(begin, 0))
		s.owed = 0
		for second := range int64(sweepTime) {
			s.reckon(time.Unix(begin+1+second, 0))
		}
		if all := s.content.marks.steps(); s.owed != all {
			t.Errorf("of %d steps %d are due in %d s", all, s.owed, sweepTime)
		}
	}
}
