package sink

import (
	"fmt"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
)

// BenchmarkEtcdPut compares deliveries as the relay makes them with the simple way,
// one put with a lease of its own for each key.
func BenchmarkEtcdPut(b *testing.B) {
	for _, batch := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("deliver %d", batch), func(b *testing.B) {
			et := newEtcdTest(b)
			e := et.opened()
			events := et.log.revoke(tokens(0, b.N)...)
			b.ReportAllocs()
			b.ResetTimer()
			for len(events) > 0 {
				n := min(batch, len(events))
				et.deliver(e, events[:n])
				events = events[n:]
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
		})
	}
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprintf("put and lease by %d", writers), func(b *testing.B) {
			et := newEtcdTest(b)
			rs := make(chan int, b.N)
			for i := range b.N {
				rs <- i
			}
			close(rs)
			exp := time.Now().Unix() + 3600
			b.ResetTimer()
			done := make(chan error, writers)
			for range writers {
				go func() {
					for i := range rs {
						lease, err := et.client.Grant(b.Context(), 3720)
						if err != nil {
							done <- err
							return
						}
						entry := directory.Entry{Target: tokens(i, 1)[0].Target, Exp: exp, Seq: 1}
						_, err = et.client.Put(b.Context(), et.key(entry.Target), entry.Value(), clientv3.WithLease(lease.ID))
						if err != nil {
							done <- err
							return
						}
					}
					done <- nil
				}()
			}
			for range writers {
				if err := <-done; err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "keys/s")
		})
	}
}

// BenchmarkEtcdBuild is a build of 50,000 entries, and BenchmarkEtcdReconcile a
// comparison of them; a delivery waits for one page of the latter at most.
func BenchmarkEtcdBuild(b *testing.B) {
	const n = 50_000
	et := newEtcdTest(b)
	et.log.revoke(tokens(0, n)...)
	for b.Loop() {
		et.hand(clientv3.OpDelete(directory.StreamKey(et.cfg.Prefix)))
		et.opened().Close()
	}
	b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "keys/s")
}

func BenchmarkEtcdReconcile(b *testing.B) {
	const n = 50_000
	et := newEtcdTest(b)
	et.log.revoke(tokens(0, n)...)
	e := et.opened()
	var longest time.Duration
	var before time.Time
	et.log.onPage = func() {
		if !before.IsZero() {
			longest = max(longest, time.Since(before)/2) // half of it is the pause
		}
		before = time.Now()
	}
	for b.Loop() {
		before = time.Time{}
		if put, removed, err := e.reconcile(b.Context(), e.term); err != nil || put+removed > 0 {
			b.Fatalf("put %d, removed %d: %v", put, removed, err)
		}
	}
	b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "keys/s")
	b.ReportMetric(longest.Seconds()*1000, "ms/page-max")
}
