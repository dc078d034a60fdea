package ledger

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/internal/pgtest"
)

// BenchmarkRevoke compares callers that share commits with callers that commit one
// revocation and one outbox row each.
func BenchmarkRevoke(b *testing.B) {
	for _, callers := range []int{1, 32, 256} {
		b.Run(fmt.Sprintf("baseline/callers=%d", callers), func(b *testing.B) {
			pool := pgtest.New(b)
			var n atomic.Int64
			inParallel(b, min(callers, 8), func() error {
				return pgx.BeginFunc(b.Context(), pool, func(tx pgx.Tx) error {
					i := n.Add(1)
					_, err := tx.Exec(b.Context(), `INSERT INTO rescind.revocations
						(id, tenant_id, kind, iss, ident, digest, exp, revoked_at)
						VALUES (gen_random_uuid(), -1234, 'token', $1, $2, false, $3, now())`, iss, fmt.Sprint(i), leap)
					if err != nil {
						return err
					}
					_, err = tx.Exec(b.Context(), `INSERT INTO rescind.log (seq, previous, tenant_id, tenant, entity_id, type, subject, at, data)
						VALUES ($1, 0, -1234, 'carbon.super', gen_random_uuid(), 'revocation.token', $2, now(), '{}')`, i, fmt.Sprint(i))
					return err
				})
			})
		})
		b.Run(fmt.Sprintf("group/callers=%d", callers), func(b *testing.B) {
			l := open(b, pgtest.New(b), Config{})
			run(b, l)
			var n atomic.Int64
			inParallel(b, callers, func() error {
				_, err := l.Revoke(b.Context(), request(fmt.Sprint(n.Add(1))))
				return err
			})
		})
	}
}

// BenchmarkRemember is what each issued token costs where tokens are remembered.
func BenchmarkRemember(b *testing.B) {
	for _, callers := range []int{1, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			l := open(b, keyManagers(b), Config{})
			run(b, l)
			inParallel(b, callers, func() error { return l.Remember(b.Context(), issued("app-1", "app-1")) })
		})
	}
}

func inParallel(b *testing.B, callers int, f func() error) {
	b.Helper()
	var left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	start := time.Now()
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if err := f(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "calls/s")
}
