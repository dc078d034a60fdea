package replica

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// Snapshots that lack everything are loaded all the time, while tokens are revoked and entries are
// cleaned up: no token that was revoked is let through at any moment.
func TestLoadTakesNothingBack(t *testing.T) {
	t.Parallel()
	for _, records := range []bool{false, true} {
		t.Run(fmt.Sprintf("records=%t", records), func(t *testing.T) {
			t.Parallel()
			const before, n, ended = 6000, 4000, 3000
			clk := newClock()
			s := clk.newReplica(records)
			id := func(i int) Record { return Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + 3600} }
			load(t, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
				for i := range before {
					l.Revocation(id(i))
				}
				for i := range ended {
					l.Revocation(Record{Target: ofJTI(fmt.Sprint("ended-", i)), Tenant: acme, Exp: begin - 2*kept})
				}
			})
			s.showed(s.now())
			var revoked, loads atomic.Int64
			revoked.Store(before)
			var wg sync.WaitGroup
			wg.Go(func() {
				for i := before; i < before+n || loads.Load() < 5; i++ {
					s.Revoke(id(i), revocation.Position{Epoch: epoch, Seq: revocation.Seq(1000 + i)})
					revoked.Store(int64(i + 1))
					if i%50 == 0 {
						clk.seconds.Add(1)
						s.tick(time.Unix(clk.now(), 0))
						runtime.Gosched()
					}
				}
				revoked.Add(1 << 32) // it is over
			})
			wg.Go(func() {
				for i := int64(0); revoked.Load() < 1<<32; i++ {
					at := revocation.Position{Epoch: epoch, Seq: revocation.Seq(2 + i)}
					if i%3 == 0 {
						at.Epoch = newEpoch
					}
					if err := s.Load(at, func(*Loader) error { return nil }); err != nil {
						t.Error(err)
					}
					loads.Add(1)
				}
			})
			rng := rand.New(rand.NewPCG(1, 1))
			for over := false; !over; {
				last := revoked.Load()
				over, last = last >= 1<<32, last&(1<<32-1)
				tries := 1
				if over {
					wg.Wait()
					tries = int(last)
				}
				for try := range tries {
					i := rng.IntN(int(last))
					if over {
						i = try
					}
					if _, ok := s.Check(Token{Iss: iss, JTI: uuidOf(i)}, begin); !ok {
						t.Fatalf("%d of %d was revoked, and is let through after %d snapshots", i, last, loads.Load())
					}
				}
			}
			if got := s.entries(); got != int(revoked.Load()&(1<<32-1)) {
				t.Errorf("%d entries, want %d", got, revoked.Load()&(1<<32-1))
			}
		})
	}
}
