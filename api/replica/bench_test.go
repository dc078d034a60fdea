package replica

import (
	"fmt"
	"sync"
	"testing"
	"unsafe"

	"github.com/rescindhq/rescind/api/revocation"
)

const million = 1_000_000

// full returns a replica with a million revoked tokens, and a few of every other kind.
func full(b *testing.B, records bool) *State {
	b.Helper()
	r := newClock().newReplica(records)
	load(b, r, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		for i := range million {
			l.Revocation(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + 3600})
		}
	})
	return r
}

// others revokes something of every kind that is found by a hash.
func others(b *testing.B, r *State) {
	b.Helper()
	m := newModel()
	m.log = make([]revocation.Event, r.At().Seq)
	for _, kind := range revocation.Kinds {
		target := revocation.Target{Kind: kind, Iss: iss, ID: "other"}
		if kind == revocation.KindTenant {
			target = revocation.Target{Kind: kind, ID: "other.example"}
		}
		must(b, r.Apply(m.revoke(Record{Target: target, Tenant: revocation.Tenant{ID: 2, Domain: "other.example"}, Exp: begin + 3600, NotAfter: begin})))
	}
}

// plain is the baseline: a map behind a lock.
type plain struct {
	mu      sync.RWMutex
	revoked map[revocation.Target]struct{ exp, notAfter int64 }
}

func (p *plain) check(t Token, now int64) bool {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for _, target := range []revocation.Target{
		{Kind: revocation.KindKey, Iss: t.Iss, ID: t.KID},
		{Kind: revocation.KindToken, Iss: t.Iss, ID: t.JTI},
		{Kind: revocation.KindSession, Iss: t.Iss, ID: t.SID},
		{Kind: revocation.KindClient, Iss: t.Iss, ID: t.ClientID},
		{Kind: revocation.KindSubject, Iss: t.Iss, ID: t.Sub},
		{Kind: revocation.KindTenant, ID: t.Tenant},
	} {
		if e, ok := p.revoked[target]; ok && now <= e.exp+leeway && (!target.Kind.HasTime() || t.IssuedAt <= e.notAfter) {
			return true
		}
	}
	return false
}

// BenchmarkCheck is with a million entries. "tokens" has nothing but revoked tokens,
// "all" has revocations of every kind as well, so that each identifier is hashed.
func BenchmarkCheck(b *testing.B) {
	base := &plain{revoked: make(map[revocation.Target]struct{ exp, notAfter int64 }, million)}
	for i := range million {
		base.revoked[ofJTI(uuidOf(i))] = struct{ exp, notAfter int64 }{exp: begin + 3600}
	}
	tokens, all := full(b, false), full(b, false)
	others(b, all)
	for _, hit := range []bool{false, true} {
		// The token in hand is in the processor's cache, as one that was just parsed; where
		// its entry would be is not.
		jti := []byte(uuidOf(0))
		tok := Token{
			Iss: iss, Tenant: acme.Domain, JTI: unsafe.String(&jti[0], len(jti)), ClientID: "app-1", Sub: "u-1009", KID: "k-1",
			IssuedAt: begin - 10,
		}
		check := func(name string, f func(Token) bool) {
			b.Run(fmt.Sprintf("%s/hit=%t", name, hit), func(b *testing.B) {
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					n := i * 7919 % million
					if !hit {
						n += million
					}
					for d := range 6 {
						jti[len(jti)-1-d] = "0123456789abcdef"[n>>(4*d)&15]
					}
					if f(tok) != hit {
						b.Fatal("wrong answer")
					}
				}
			})
		}
		check("tokens", func(t Token) bool { _, ok := tokens.Check(t, begin); return ok })
		check("all", func(t Token) bool { _, ok := all.Check(t, begin); return ok })
		check("baseline=map+RWMutex", func(t Token) bool { return base.check(t, begin) })
	}
}

// BenchmarkCheckParallel is Check in every processor, as a gateway does it.
func BenchmarkCheckParallel(b *testing.B) {
	r := full(b, false)
	base := &plain{revoked: map[revocation.Target]struct{ exp, notAfter int64 }{}}
	for i := range million {
		base.revoked[ofJTI(uuidOf(i))] = struct{ exp, notAfter int64 }{exp: begin + 3600}
	}
	for name, f := range map[string]func(Token){
		"replica":              func(t Token) { r.Check(t, begin) },
		"baseline=map+RWMutex": func(t Token) { base.check(t, begin) },
	} {
		b.Run(name, func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				tok := Token{Iss: iss, Tenant: acme.Domain, JTI: uuidOf(5), ClientID: "app-1", Sub: "u-1009", KID: "k-1"}
				for pb.Next() {
					f(tok)
				}
			})
		})
	}
}

func BenchmarkApply(b *testing.B) {
	for _, records := range []bool{false, true} {
		b.Run(fmt.Sprintf("records=%t", records), func(b *testing.B) {
			r := full(b, records)
			e := revoke(Record{Target: ofJTI("x"), Tenant: acme, Exp: begin + 3600})
			data := string(e.Data)
			at := r.At()
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				at.Seq++
				e.Position = at
				e.Data = fmt.Appendf(e.Data[:0], "%s%s%s", data[:len(`{"id":"`)], uuidOf(i), data[len(`{"id":"`)+36:])
				if err := r.Apply(e); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkLoad is of a million revocations, with the time for each.
func BenchmarkLoad(b *testing.B) {
	for _, records := range []bool{false, true} {
		b.Run(fmt.Sprintf("records=%t", records), func(b *testing.B) {
			var all []Record
			for i := range million {
				all = append(all, Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + 3600})
			}
			for b.Loop() {
				load(b, newClock().newReplica(records), revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
					for _, rec := range all {
						l.Revocation(rec)
					}
				})
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/million, "ns/entry")
		})
	}
}

// BenchmarkRevocations goes through a list of a million.
func BenchmarkRevocations(b *testing.B) {
	r := full(b, true)
	b.ReportAllocs()
	for b.Loop() {
		var list Revocations
		r.View(func(v *View) { list = v.Revocations() })
		n := 0
		for rec := range list.All() {
			n += len(rec.Target.ID)
		}
		if n != 36*million {
			b.Fatal(n)
		}
	}
}
