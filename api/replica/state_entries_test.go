package replica

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/rescindhq/rescind/api/revocation"
)

// textOfKey is the UUID of a key.
func textOfKey(k key) string {
	s := fmt.Sprintf("%016x%016x", k[0], k[1])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// uuidKeyPlainly is uuidKey, byte by byte.
func uuidKeyPlainly(s string) (k key, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 {
		return k, false
	}
	for i, c := range b {
		k[i/8] = k[i/8]<<8 | uint64(c)
	}
	return k, textOfKey(k) == s
}

func TestUUIDKey(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		k := key{rng.Uint64(), rng.Uint64()}
		s := textOfKey(k)
		if got, ok := uuidKey(s); !ok || got != k {
			t.Fatalf("uuidKey(%q) = %x, %t", s, got, ok)
		}
		if text, _ := uuidText(s); text != k.digits() {
			t.Fatalf("the digits of %s are not those of its key", s)
		}
		// Any byte in any place.
		place, c := rng.IntN(len(s)), 0
		for ; c < 256; c++ {
			changed := s[:place] + string([]byte{byte(c)}) + s[place+1:]
			want, valid := uuidKeyPlainly(changed)
			if got, ok := uuidKey(changed); ok != valid || ok && got != want {
				t.Fatalf("uuidKey(%q) = %x, %t, want %x, %t", changed, got, ok, want, valid)
			}
		}
	}
	for _, s := range []string{"", "-", strings.Repeat("0", 36), textOfKey(key{})[:35], textOfKey(key{}) + "0"} {
		if k, ok := uuidKey(s); ok {
			t.Errorf("uuidKey(%q) = %x", s, k)
		}
	}
}

// end is what is known of an entry.
type end struct{ exp, notAfter int64 }

// holdsEntries fails the test unless s has these entries of a set, and no others.
func holdsEntries(t *testing.T, s *State, iss string, c class, want map[key]end) {
	t.Helper()
	got := make(map[key]end)
	set := s.content.marks.set(c, iss)
	set.each(func(e entry) {
		if _, ok := got[e.key()]; ok {
			t.Fatalf("%x is there twice", e.key())
		}
		got[e.key()] = end{e.exp(), e.notAfter(set)}
	})
	if !maps.Equal(got, want) {
		t.Fatalf("class %d has %d entries, want %d, or they differ", c, len(got), len(want))
	}
	for k := range want {
		if e := set.find(k); !e.ok() || e.key() != k {
			t.Fatalf("%x is not found", k)
		}
	}
	if set.n != len(want) {
		t.Fatalf("class %d has %d entries and counts %d", c, len(want), set.n)
	}
}

// What is loaded many at a time is what would be one by one, whatever is said to come.
func TestEntries(t *testing.T) {
	t.Parallel()
	for _, about := range []int{0, 3000, 3_000_000, 1 << 62} {
		rng := rand.New(rand.NewPCG(uint64(about), 1))
		s := newClock().newReplica(false)
		want := make(map[class]map[key]end)
		load(t, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
			for _, c := range []class{uuids, digests, clients, tenants} {
				all := make(map[key]end)
				of := iss
				if c == tenants {
					of = ""
				}
				for n := 1000 + rng.IntN(10_000); n > 0; {
					list := make([]loaded, 1+rng.IntN(2000))
					for i := range list {
						// Few keys, so that many come again.
						e := loaded{key{uint64(rng.IntN(1 << 6)), uint64(rng.IntN(1 << 8))}, begin + rng.Int64N(1000) - 1, rng.Int64N(1000)}
						if rng.IntN(50) == 0 {
							e.exp = -rng.Int64N(10)
						}
						list[i] = e
						if e.exp <= 0 {
							continue
						}
						if !classes[c].kind.HasTime() {
							e.notAfter = 0
						}
						was := all[e.key]
						all[e.key] = end{max(was.exp, e.exp), max(was.notAfter, e.notAfter)}
					}
					n -= len(list)
					l.entries(of, c, list, about)
				}
				want[c] = all
			}
		})
		for c, all := range want {
			of := iss
			if c == tenants {
				of = ""
			}
			holdsEntries(t, s, of, c, all)
		}
		for range 2000 {
			k := key{uint64(rng.IntN(1 << 8)), uint64(rng.IntN(1 << 8))}
			e, is := want[uuids][k]
			if _, ok := s.Check(Token{Iss: iss, JTI: textOfKey(k)}, e.exp+leeway); ok != is {
				t.Fatalf("%x is revoked: %t, want %t", k, ok, is)
			}
		}
		// Room that was made in vain is given back.
		for range s.content.marks.steps() {
			s.content.marks.sweep(0, nil)
		}
		if n := s.entries(); s.bytes() > 64*n+20_000 { // most have two ends
			t.Errorf("with about %d, %d entries take %d bytes", about, n, s.bytes())
		}
		for c, all := range want {
			of := iss
			if c == tenants {
				of = ""
			}
			holdsEntries(t, s, of, c, all)
		}
	}
}

// Issuers are found however many there are, and while others come: what Check reads is not locked.
func TestManyIssuers(t *testing.T) {
	t.Parallel()
	s := newClock().newReplica(false)
	name := func(i int) string { return fmt.Sprintf("https://%d.example", i) }
	record := func(i int) Record {
		return Record{Target: revocation.Target{Kind: revocation.KindToken, Iss: name(i), ID: uuidOf(i)}, Tenant: acme, Exp: begin}
	}
	const loaded, all = 30_000, 32_000
	load(t, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		for i := range loaded {
			l.Revocation(record(i))
		}
	})
	check := func(n int) {
		t.Helper()
		for i := range n {
			if _, ok := s.Check(Token{Iss: name(i), JTI: uuidOf(i)}, begin); !ok {
				t.Errorf("of %d, issuer %d is not found", n, i)
				return
			}
		}
		for _, is := range []string{name(all), ""} {
			if _, ok := s.Check(Token{Iss: is, JTI: uuidOf(0)}, begin); ok {
				t.Errorf("issuer %q is found", is)
			}
		}
	}
	check(loaded)
	var readers sync.WaitGroup
	readers.Go(func() { check(loaded) })
	for i := loaded; i < all; i++ {
		s.Revoke(record(i), revocation.Position{Epoch: newEpoch})
	}
	readers.Wait()
	check(all)

	few := newClock().newReplica(false)
	for i := range 5 * fewIssuers {
		few.Revoke(record(i), revocation.Position{Epoch: newEpoch})
		seen := make(map[string]int)
		few.content.marks.each(func(iss string, _ *set) { seen[iss]++ })
		if delete(seen, ""); len(seen) != i+1 || seen[name(i)] != int(ofIssuers) {
			t.Fatalf("of %d issuers there are %v", i+1, seen)
		}
		for j := range 5 * fewIssuers {
			if _, ok := few.Check(Token{Iss: name(j), JTI: uuidOf(j)}, begin); ok != (j <= i) {
				t.Fatalf("of %d issuers, %d is found: %t", i+1, j, ok)
			}
		}
	}
}

func TestEntriesWithoutIdentifiers(t *testing.T) {
	t.Parallel()
	s := newClock().newReplica(true)
	err := s.Load(revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) error {
		l.entries(iss, uuids, []loaded{{exp: begin}}, 1)
		return nil
	})
	if !errors.Is(err, errNoRecords) || s.At().Seq != 0 {
		t.Errorf("Load: %v, and the state is at %s", err, s.At())
	}
}

// bytes is what the entries take, as the allocator rounds it.
func (s *State) bytes() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rounded := func(n int) int {
		if n > 32<<10 {
			return (n + 8191) &^ 8191
		}
		return n + n/8
	}
	s.content.marks.each(func(_ string, set *set) {
		dir := set.dir.Load()
		if dir == nil {
			return
		}
		n += rounded(8*cap(dir.tables)) + rounded(24*cap(dir.tags))
		for i := 0; i < len(dir.tables); i += dir.span(dir.tables[i]) {
			t := dir.tables[i]
			n += rounded(8*cap(t.tags)) + rounded(8*cap(t.words)) + 64
		}
	})
	return n
}

// An entry takes 40 bytes at most, keys, ends, tags and directories included: a million that were
// known to come, and any number that came bit by bit.
func TestBytesOfEntries(t *testing.T) {
	t.Parallel()
	const limit = 40.0
	fill := func(all, about int, each func(s *State, n int)) *State {
		rng := rand.New(rand.NewPCG(3, uint64(about)))
		s := newClock().newReplica(false)
		load(t, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
			list := make([]loaded, 1000)
			for n := 0; n < all; n += len(list) {
				for i := range list {
					list[i] = loaded{key: key{rng.Uint64(), rng.Uint64()}, exp: begin}
				}
				l.entries(iss, uuids, list, about)
				each(&State{content: l.content}, n+len(list))
			}
		})
		return s
	}
	most := 0.0
	note := func(s *State, n int) { most = max(most, float64(s.bytes())/float64(n)) }
	s := fill(million, million, func(*State, int) {})
	note(s, million)
	t.Logf("one of a million takes %.1f bytes", most)
	for i := range 1000 { // in tables that were made for those before
		s.Revoke(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin}, revocation.Position{Epoch: newEpoch})
	}
	note(s, s.entries())
	// From one doubling of the tables to the next but one.
	fill(size(100_000, 300_000), 0, func(s *State, n int) {
		if n >= 20_000 {
			note(s, n)
		}
	})
	t.Logf("an entry takes up to %.1f bytes while others come", most)
	if most > limit {
		t.Errorf("an entry takes up to %.1f bytes, must be at most %v", most, limit)
	}
}

// It is not parallel: it counts allocations.
func TestStateCheckAllocatesNothing(t *testing.T) {
	s := newClock().newReplica(false)
	ids := []string{uuidOf(1), "x", strings.Repeat("ab", 32), strings.Repeat("y", maxID)}
	load(t, s, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) {
		for _, kind := range revocation.Kinds {
			for _, id := range ids {
				target := revocation.Target{Kind: kind, Iss: iss, ID: id}
				if kind == revocation.KindTenant {
					target.Iss = ""
				}
				l.Revocation(Record{Target: target, Tenant: acme, Exp: begin, NotAfter: begin})
			}
		}
	})
	for _, id := range slices.Concat(ids, []string{uuidOf(2), "z", strings.Repeat("z", 300), ""}) {
		for _, tok := range []Token{
			{Iss: iss, JTI: id}, {Iss: iss, Digest: id, ClientID: id, Sub: id}, {Iss: iss, SID: id}, {Iss: iss, KID: id}, {Iss: id, Tenant: id},
			{Iss: iss, JTI: id, Digest: id, ClientID: id, Sub: id, SID: id, KID: id, Tenant: id, IssuedAt: begin + 1},
		} {
			if n := testing.AllocsPerRun(10, func() { s.Check(tok, begin) }); n != 0 {
				t.Errorf("Check(%+v) allocates %v times", tok, n)
			}
		}
	}
}
