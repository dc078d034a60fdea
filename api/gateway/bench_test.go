package gateway

import (
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/replica"
)

// BenchmarkDecide stands beside what cannot be avoided: the verification of the token, which is
// nearly all signature. Overhead is what Decide takes besides, from runs of both in turn.
func BenchmarkDecide(b *testing.B) {
	for _, bb := range []struct {
		name string
		key  any
	}{{"ES256", ecKey}, {"RS256", rsaKey()}} {
		compact := mint(bb.key, nil, nil)
		b.Run(bb.name, func(b *testing.B) {
			w := start(b, newService(), replica.Config{}, Config{})
			ctx := b.Context()
			r := Request{Method: "GET", Target: "/shop/1.0.0/orders?page=2", Authorization: []string{"Bearer " + compact}}
			var verify, decide time.Duration
			b.ReportAllocs()
			for b.Loop() {
				began := time.Now()
				if _, err := w.issuers.trusted.Load().Verify(ctx, compact); err != nil {
					b.Fatal(err)
				}
				between := time.Now()
				if d := w.Decide(ctx, r); !d.Allowed {
					b.Fatal(d.Reason)
				}
				verify += between.Sub(began)
				decide += time.Since(between)
			}
			n := float64(b.N)
			b.ReportMetric(float64(verify)/n, "verify-ns/op")
			b.ReportMetric(float64(decide)/n, "decide-ns/op")
			b.ReportMetric(float64(decide-verify)/n, "overhead-ns/op")
		})
	}

	// The same without a token to verify, which shows where the overhead comes from.
	b.Run("verified", func(b *testing.B) {
		w := start(b, newService(), replica.Config{}, Config{})
		ctx := b.Context()
		t, issuer, err := w.accept(ctx, t1(), nil)
		if err != nil {
			b.Fatal(err)
		}
		r := Request{Method: "GET", Target: "/shop/1.0.0/orders?page=2", Authorization: []string{bearing("x.y.z")[len("Authorization: "):]}}
		b.ReportAllocs()
		for b.Loop() {
			path, ok := replica.CleanPath(r.Target)
			_, reason := bearer(r.Authorization)
			if !ok || reason != "" || w.acceptance.Check(t, issuer, time.Now()) != nil {
				b.Fatal(reason)
			}
			a := w.replica.Authorize(t, replica.Request{Method: r.Method, Path: path})
			if d := w.decided(t, issuer, a); !d.Allowed {
				b.Fatal(d.Reason)
			}
		}
	})
}
