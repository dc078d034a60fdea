package replica

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/bits-and-blooms/bloom/v3"

	"github.com/rescindhq/rescind/api/revocation"
)

const million = 1_000_000

// benchKeys yields n random UUIDs, the same for one seed.
func benchKeys(seed uint64, n int, yield func(k key)) {
	rng := rand.New(rand.NewPCG(seed, 1))
	for range n {
		yield(key{rng.Uint64(), rng.Uint64()})
	}
}

// benchText is textOfKey, fast.
func benchText(k key) string {
	var b [36]byte
	d := k.digits()
	for i, w := range []uint64{d.a, d.b, d.c, d.d} {
		binary.LittleEndian.PutUint64(b[[]int{0, 9, 19, 28}[i]:], w)
	}
	copy(b[14:18], b[13:17])
	copy(b[24:28], b[23:27])
	b[8], b[13], b[18], b[23] = '-', '-', '-', '-'
	return string(b[:])
}

// benchLoad loads n random UUIDs of one seed as a binary snapshot does.
func benchLoad(tb testing.TB, s *State, n int) {
	tb.Helper()
	load(tb, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		list := make([]loaded, 0, 4096)
		benchKeys(1, n, func(k key) {
			if list = append(list, loaded{key: k, exp: begin + 3600}); len(list) == cap(list) {
				l.entries(iss, uuids, list, n)
				list = list[:0]
			}
		})
		l.entries(iss, uuids, list, n)
	})
}

// full is a state with a million revoked tokens.
func full(b *testing.B, records bool) *State {
	b.Helper()
	s := newClock().newReplica(records)
	load(b, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		for i := range million {
			l.Revocation(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + 3600})
		}
	})
	return s
}

// others revokes something of every kind that is found by a hash.
func others(s *State) {
	for _, kind := range revocation.Kinds {
		target := revocation.Target{Kind: kind, Iss: iss, ID: "other"}
		if kind == revocation.KindTenant {
			target = revocation.Target{Kind: kind, ID: "other.example"}
		}
		s.Revoke(Record{Target: target, Exp: begin + 3600, NotAfter: begin}, revocation.Position{Epoch: newEpoch})
	}
}

// checked is what look-ups are compared with: state, and what gateways do without it.
type checked struct {
	state  *State
	filter *bloom.BloomFilter // of nothing but jti, with 1e-7 false positives; nobody writes to it

	mu    sync.RWMutex
	plain map[string]int64
}

func newChecked(b *testing.B, n int) *checked {
	c := &checked{state: newClock().newReplica(false), filter: bloom.NewWithEstimates(uint(n), 1e-7), plain: make(map[string]int64, n)}
	benchLoad(b, c.state, n)
	benchKeys(1, n, func(k key) {
		jti := benchText(k)
		c.filter.AddString(jti)
		c.plain[jti] = begin + 3600
	})
	return c
}

// apply revokes 5,000 tokens a second until done is closed.
func (c *checked) apply(b *testing.B, done <-chan struct{}) {
	e := revoke(Record{Target: ofJTI(uuidOf(0)), Tenant: acme, Exp: begin + 3600})
	before, after := e.Data[:len(`{"id":"`)+36], e.Data[len(`{"id":"`)+36:]
	e.Position = c.state.At()
	rng := rand.New(rand.NewPCG(9, 9))
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		for range 10 {
			jti := benchText(key{rng.Uint64(), rng.Uint64()})
			e.Seq++
			e.Data = slices.Concat(before, []byte(replaceJTI(after, jti)))
			if err := c.state.Apply(e); err != nil {
				b.Error(err)
				return
			}
			c.mu.Lock()
			c.plain[jti] = begin + 3600
			c.mu.Unlock()
		}
	}
}

// replaceJTI puts jti in the place of uuidOf(0).
func replaceJTI(data []byte, jti string) string {
	const was = "0193a2f4-7c11-7d02-9b1e-000000000000"
	s := string(data)
	for i := 0; i+len(was) <= len(s); i++ {
		if s[i:i+len(was)] == was {
			return s[:i] + jti + s[i+len(was):]
		}
	}
	panic("no jti in the event")
}

// BenchmarkCheck is Check while 5,000 events are applied a second, beside a map with a lock and a
// Bloom filter, which look for the jti alone. They take turns, each with some thousand look-ups, of
// which batches are timed: what one takes is in the metrics. In "tokens" nothing but tokens is
// revoked; in "all" something of every kind is, so that Check hashes six identifiers.
func BenchmarkCheck(b *testing.B) {
	for _, n := range []int{million, 10 * million} {
		var c *checked
		for _, kinds := range []string{"tokens", "all"} {
			for _, hit := range []bool{false, true} {
				b.Run(fmt.Sprintf("entries=%d/kinds=%s/hit=%t", n, kinds, hit), func(b *testing.B) {
					if c == nil {
						c = newChecked(b, n)
					}
					if kinds == "all" {
						others(c.state)
					}
					c.bench(b, n, hit)
				})
			}
		}
	}
}

func (c *checked) bench(b *testing.B, n int, hit bool) {
	// Few enough to be in the processor's cache, as a token that was just parsed.
	tokens := make([]Token, 0, 1024)
	every := n / cap(tokens)
	i := 0
	pick := func(k key) {
		if i++; i%every == 0 && len(tokens) < cap(tokens) {
			tokens = append(tokens, Token{
				Iss: iss, Tenant: acme.Domain, JTI: benchText(k), ClientID: "app-1", Sub: "u-1009", KID: "k-1", IssuedAt: begin - 10,
			})
		}
	}
	if hit {
		benchKeys(1, n, pick)
	} else {
		benchKeys(2, n, pick)
	}
	const batch = 16
	timed := make(map[string][]time.Duration)
	turn := func(name string, look func(t *Token) bool) {
		for some := range slices.Chunk(tokens, batch) {
			begin := time.Now()
			for i := range some {
				if look(&some[i]) != hit {
					b.Fatalf("%s is wrong about %s", name, some[i].JTI)
				}
			}
			timed[name] = append(timed[name], time.Since(begin))
		}
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { c.apply(b, done) })
	for b.Loop() {
		for range 4 {
			turn("check", func(t *Token) bool { _, ok := c.state.Check(*t, begin); return ok })
		}
		for range 4 {
			turn("bloom", func(t *Token) bool { return c.filter.TestString(t.JTI) })
		}
		for range 4 {
			turn("map", func(t *Token) bool {
				c.mu.RLock()
				defer c.mu.RUnlock()
				exp, ok := c.plain[t.JTI]
				return ok && exp+leeway >= begin
			})
		}
	}
	close(done)
	wg.Wait()
	b.ReportMetric(0, "ns/op") // of all turns: it says nothing
	for name, all := range timed {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Nanoseconds())/batch, name+"-p50-ns")
		b.ReportMetric(float64(all[len(all)*99/100].Nanoseconds())/batch, name+"-p99-ns")
	}
}

// BenchmarkCheckParallel is Check in every processor, as a gateway does it.
func BenchmarkCheckParallel(b *testing.B) {
	c := newChecked(b, million)
	for name, look := range map[string]func(Token){
		"check": func(t Token) { c.state.Check(t, begin) },
		"map+RWMutex": func(t Token) {
			c.mu.RLock()
			defer c.mu.RUnlock()
			_ = c.plain[t.JTI]
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				tok := Token{Iss: iss, Tenant: acme.Domain, JTI: uuidOf(5), ClientID: "app-1", Sub: "u-1009", KID: "k-1"}
				for pb.Next() {
					look(tok)
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

// BenchmarkLoad is of a million revocations, with the time for each: one by one, and from a binary
// snapshot, whose decoding is not in it, with the bytes that each then takes. The best of all
// times is there too, for machines that do something else besides.
func BenchmarkLoad(b *testing.B) {
	measure := func(name string, records bool, fill func(l *Loader)) {
		b.Run(name, func(b *testing.B) {
			best := time.Hour
			var s *State
			for b.Loop() {
				began := time.Now()
				s = newClock().newReplica(records)
				load(b, s, revocation.Position{Epoch: epoch, Seq: 1}, fill)
				best = min(best, time.Since(began))
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/million, "ns/entry")
			b.ReportMetric(float64(best.Nanoseconds())/million, "best-ns/entry")
			b.ReportMetric(float64(s.bytes())/million, "bytes/entry")
		})
	}
	var list []loaded
	benchKeys(1, million, func(k key) { list = append(list, loaded{key: k, exp: begin + 3600}) })
	for _, about := range []int{million, 0} {
		measure(fmt.Sprintf("entries/about=%d", about), false, func(l *Loader) {
			for some := range slices.Chunk(list, 4096) {
				l.entries(iss, uuids, some, about)
			}
		})
	}
	all := make([]Record, 0, million)
	for _, e := range list {
		all = append(all, Record{Target: ofJTI(benchText(e.key)), Tenant: acme, Exp: e.exp})
	}
	for _, records := range []bool{false, true} {
		measure(fmt.Sprintf("records=%t", records), records, func(l *Loader) {
			for _, rec := range all {
				l.Revocation(rec)
			}
		})
	}
}

// BenchmarkTick is the cleaning up of ten million entries, of which one in 3,600 ends each second:
// what a second's share of it takes, and how long events wait at a time.
func BenchmarkTick(b *testing.B) {
	clk := newClock()
	s := clk.newReplica(false)
	load(b, s, revocation.Position{Epoch: epoch}, func(l *Loader) {
		i := int64(0)
		list := make([]loaded, 0, 4096)
		benchKeys(1, 10*million, func(k key) {
			i++
			if list = append(list, loaded{key: k, exp: begin + i%3600}); len(list) == cap(list) {
				l.entries(iss, uuids, list, 10*million)
				list = list[:0]
			}
		})
	})
	clk.seconds.Add(kept)
	s.showed(s.now())
	var holds []time.Duration
	for b.Loop() {
		if s.entries() < million {
			b.Fatal("too much has ended to measure: give it a shorter -benchtime")
		}
		clk.seconds.Add(1)
		now := s.now()
		for more := true; more; { // as tick does
			s.mu.Lock()
			began := time.Now()
			s.reckon(now)
			more = s.sweep(now)
			holds = append(holds, time.Since(began))
			s.mu.Unlock()
		}
	}
	slices.Sort(holds)
	b.ReportMetric(float64(holds[len(holds)/2].Nanoseconds())/1000, "hold-p50-µs")
	b.ReportMetric(float64(holds[len(holds)*99/100].Nanoseconds())/1000, "hold-p99-µs")
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
