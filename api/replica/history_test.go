package replica

import (
	"errors"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
)

// Any digest of any scope, at any position that is known, is that of a state which was fed with the log
// up to there, in that scope.
func TestDigestsAt(t *testing.T) {
	t.Parallel()
	const keeps = 300
	for seed := range uint64(size(2, 20)) {
		clk, log := newClock(), newDigestLog(seed, 60)
		s := NewState(StateConfig{Records: true, History: keeps})
		s.now = func() time.Time { return time.Unix(clk.now(), 0) }
		for range 100 {
			log.add()
		}
		began := log.head()
		must(t, log.load(s, began, partScope{}))
		var all []*Digests
		for range 5 {
			for range 100 + log.rng.IntN(60) {
				must(t, s.Apply(log.add()))
			}
			for _, cutoff := range []int64{begin - 60, begin, begin + 60} {
				d, err := s.Digests(t.Context(), cutoff)
				must(t, err)
				all = append(all, d)
			}
		}
		answered, forgotten := 0, 0
		for range size(60, 500) {
			d := all[log.rng.IntN(len(all))]
			seq := log.head() - revocation.Seq(log.rng.IntN(int(log.head())))
			scope := partScope{revocationsOnly: log.rng.IntN(3) == 0}
			var sees func(string) bool
			if log.rng.IntN(4) > 0 {
				scope.tenants = []string{} // none is a scope, too
				for _, tenant := range digestTenants {
					if log.rng.IntN(2) == 0 {
						scope.tenants = append(scope.tenants, tenant.Domain)
					}
				}
				sees = func(domain string) bool { return slices.Contains(scope.tenants, domain) }
			}
			got, err := d.At(log.at(seq), DigestScope{Sees: sees, RevocationsOnly: scope.revocationsOnly})
			if oldest := log.head() - keeps; seq != d.at.Seq && min(seq, d.at.Seq) < max(oldest, began) {
				forgotten++
				if !errors.Is(err, ErrForgotten) {
					t.Fatalf("from %s to %d of %d: %+v, %v", d.at, seq, log.head(), got, err)
				}
				continue
			}
			must(t, err)
			answered++

			gateway := clk.newReplica(false)
			must(t, log.load(gateway, min(20, seq), scope))
			for _, e := range log.events[:seq] {
				must(t, gateway.Apply(e))
			}
			if !scope.whole() {
				must(t, gateway.Through(log.at(seq)))
			}
			if diff := cmp.Diff(digestOf(t, gateway, d.cutoff), got); diff != "" {
				t.Fatalf("seed %d, from %s to %d for %+v (-gateway +service):\n%s", seed, d.at, seq, scope, diff)
			}
		}
		if answered < 10 || forgotten < 10 {
			t.Errorf("%d were answered and %d forgotten", answered, forgotten)
		}
	}
}

func TestDigestsAtRefuses(t *testing.T) {
	t.Parallel()
	clk, log := newClock(), newDigestLog(1, 60)
	newService := func(history int) (*State, *Digests) {
		s := NewState(StateConfig{Records: true, History: history})
		s.now = func() time.Time { return time.Unix(clk.now(), 0) }
		must(t, log.load(s, 0, partScope{}))
		d, err := s.Digests(t.Context(), begin)
		must(t, err)
		return s, d
	}
	at := func(d *Digests, p revocation.Position, want error) {
		t.Helper()
		if _, err := d.At(p, DigestScope{}); !errors.Is(err, want) {
			t.Errorf("at %s: %v, want %v", p, err, want)
		}
	}
	for range 3 {
		log.add()
	}
	s, d := newService(10)
	at(d, log.at(0), nil)
	at(d, log.at(1), ErrNotYet)
	at(d, revocation.Position{Epoch: newEpoch}, ErrForgotten)
	must(t, s.Apply(log.events[0]))
	at(d, log.at(1), nil)
	at(d, revocation.Position{Epoch: epoch, Seq: -1}, ErrForgotten)
	must(t, log.load(s, 2, partScope{}))
	at(d, log.at(1), ErrForgotten)

	// It is not for states with records, and then nothing is said that may be wrong.
	s, d = newService(10)
	s.Revoke(log.record(), log.at(2))
	must(t, s.Apply(log.events[0]))
	at(d, log.at(1), ErrForgotten)

	s, d = newService(0)
	must(t, s.Apply(log.events[0]))
	at(d, log.at(0), nil)
	at(d, log.at(1), ErrForgotten)

	part := clk.newReplica(true)
	must(t, log.load(part, 0, partScope{tenants: []string{acme.Domain}}))
	if _, err := part.Digests(t.Context(), begin); err == nil {
		t.Error("a state of some tenants has the digests of all")
	}
	if size := unsafe.Sizeof(change{}); size != 56 {
		t.Errorf("an event of the past takes %d bytes, StateConfig.History says 56", size)
	}
}
