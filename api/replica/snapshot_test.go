package replica

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// blocks builds snapshots, well-formed or not.
type blocks struct{ b []byte }

func newBlocks(version ...byte) *blocks {
	return &blocks{append([]byte(snapshotMagic), version...)}
}

// block adds one; parts are texts as they are, and numbers as varints.
func (s *blocks) block(typ byte, parts ...any) *blocks {
	var p []byte
	for _, part := range parts {
		switch part := part.(type) {
		case string:
			p = append(p, part...)
		case int:
			p = binary.AppendUvarint(p, uint64(part))
		}
	}
	s.b = appendBlock(s.b, typ, p)
	return s
}

func (s *blocks) header(kind string, flags int) *blocks {
	return s.block(blockHeader, len(epoch), string(epoch), 7, len(kind), kind, flags, 2)
}

// end adds the end with the right checksum.
func (s *blocks) end(revocations, entities int) []byte {
	s.block(blockEnd, revocations, entities, "\x00\x00\x00\x00")
	return fixed(s.b)
}

// fixed makes the last four bytes the checksum of those before.
func fixed(b []byte) []byte {
	if len(b) < crc32.Size {
		return b
	}
	n := len(b) - crc32.Size
	return binary.LittleEndian.AppendUint32(bytes.Clone(b[:n]), crc32.Checksum(b[:n], castagnoli))
}

const someKey = "0123456789abcdef"

// example is the snapshot that api/snapshot.md shows.
func example(t testing.TB) []byte {
	e := NewSnapshotEncoder(SnapshotHeader{
		Position: revocation.Position{Epoch: epoch, Seq: 88213}, Kind: kindAll, Tenants: []string{"acme.example"}, Entries: 3,
	})
	b := e.AppendHeader(nil)
	for _, rec := range []Record{
		{Target: ofJTI("0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3"), Exp: begin + 3600},
		{Target: revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "app-1"}, Exp: begin + 3600, NotAfter: begin},
		{Target: ofJTI("0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e4"), Exp: begin + 3500},
	} {
		b = e.AppendRevocation(b, rec)
	}
	b, err := e.AppendEntity(b, &catalog.Scope{
		Meta: catalog.Meta{ID: 3, UUID: uuidOf(3), Tenant: acme, Timestamp: 1795200598214}, Name: "menu:read",
	})
	must(t, err)
	return e.AppendEnd(b)
}

// What the description of the form shows is what is written.
func TestSnapshotIsDescribed(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../snapshot.md")
	must(t, err)
	var shown []byte
	for _, row := range regexp.MustCompile(`(?m)^((?:[0-9a-f]{2} )+) `).FindAllSubmatch(doc, -1) {
		b, err := hex.DecodeString(strings.ReplaceAll(string(row[1]), " ", ""))
		must(t, err)
		shown = append(shown, b...)
	}
	if diff := cmp.Diff(hex.Dump(example(t)), hex.Dump(shown)); diff != "" {
		t.Errorf("the example in snapshot.md (-written +shown):\n%s", diff)
	}
	s := newClock().newReplica(false)
	h, err := s.ReadSnapshot(bytes.NewReader(shown))
	must(t, err)
	want := SnapshotHeader{Position: revocation.Position{Epoch: epoch, Seq: 88213}, Kind: kindAll, Tenants: []string{"acme.example"}, Entries: 3}
	if diff := cmp.Diff(want, h); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	if _, ok := s.Check(Token{Iss: iss, JTI: uuidOf(0x5f6a70c1d2e4)}, begin+3500+leeway); !ok {
		t.Error("a token of the example is not revoked")
	}
	if _, ok := s.Check(Token{Iss: iss, ClientID: "app-1", IssuedAt: begin + 1}, begin); ok {
		t.Error("a later token of the example's client is revoked")
	}
}

// write returns the snapshot of s.
func write(t testing.TB, s *State) []byte {
	t.Helper()
	var b bytes.Buffer
	at, err := s.WriteSnapshot(&b)
	must(t, err)
	if at != s.At() {
		t.Errorf("the snapshot is of %s, the state at %s", at, s.At())
	}
	return b.Bytes()
}

// encode returns the snapshot of s, of records, as a server makes it.
func encode(t testing.TB, s *State) []byte {
	t.Helper()
	var b []byte
	s.View(func(v *View) {
		e := NewSnapshotEncoder(SnapshotHeader{Position: v.At(), Kind: kindAll})
		b = e.AppendHeader(b)
		e.Expect(v.Revocations())
		for rec := range v.Revocations().All() {
			b = e.AppendRevocation(b, rec)
		}
		for _, entity := range v.entities() {
			var err error
			b, err = e.AppendEntity(b, entity)
			must(t, err)
		}
		b = e.AppendEnd(b)
	})
	return b
}

// entriesOf is all that s has, by set and key.
func entriesOf(s *State) map[string][2]int64 {
	all := make(map[string][2]int64)
	s.View(func(v *View) {
		v.content.marks.each(func(iss string, set *set) {
			set.each(func(e entry) { all[fmt.Sprint(set.class, " ", iss, " ", e.key())] = [2]int64{e.exp(), e.notAfter(set)} })
		})
	})
	return all
}

// compareStates compares what two states say.
func compareStates(t *testing.T, want, got *State, c *choices, now int64) {
	t.Helper()
	if want.At() != got.At() {
		t.Fatalf("at %s, want %s", got.At(), want.At())
	}
	for range 20 {
		tok := c.token(now)
		for _, at := range []int64{now, now + 60, now + 500} {
			wantKind, wantOK := want.Check(tok, at)
			if kind, ok := got.Check(tok, at); kind != wantKind || ok != wantOK {
				t.Fatalf("Check(%+v, %d) = %q, %t, want %q, %t", tok, at, kind, ok, wantKind, wantOK)
			}
		}
	}
	if diff := cmp.Diff(entriesOf(want), entriesOf(got)); diff != "" {
		t.Fatalf("revocations (-want +got):\n%s", diff)
	}
	entities := func(s *State) (all []catalog.Entity) {
		s.View(func(v *View) { all = v.entities() })
		return all
	}
	if diff := cmp.Diff(entities(want), entities(got)); diff != "" {
		t.Fatalf("the catalog (-want +got):\n%s", diff)
	}
}

// Whatever happened: what was written and read says the same.
func TestSnapshotOfHistories(t *testing.T) {
	t.Parallel()
	for seed := range byte(size(4, 10)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			data := make([]byte, 6000)
			rand.NewChaCha8([32]byte{seed}).Read(data)
			c, m, clk := &choices{data}, newModel(), newClock()
			server, gateway := clk.newReplica(true), clk.newReplica(false)
			load(t, server, m.head())
			load(t, gateway, m.head())
			for c.more() {
				for range 30 {
					var e revocation.Event
					if c.n(2) == 0 {
						rec := Record{Target: c.target(), Tenant: acme, Exp: clk.now() + int64(c.n(200))*7}
						if rec.Target.Kind == revocation.KindTenant {
							rec.Tenant.Domain = rec.Target.ID
						}
						if rec.Target.Kind.HasTime() {
							rec.NotAfter = clk.now() + int64(c.n(100)) - 50
						}
						e = m.revoke(rec)
					} else {
						verbs := []catalog.Verb{catalog.Created, catalog.Updated, catalog.Deleted}
						e = m.change(catalog.Change{Verb: verbs[c.n(len(verbs))], Entity: c.entity()})
					}
					must(t, server.Apply(e))
					must(t, gateway.Apply(e))
				}
				ahead := Record{Target: c.target(), Exp: clk.now() + 500, NotAfter: clk.now()}
				gateway.Revoke(ahead, revocation.Position{Epoch: epoch, Seq: m.head().Seq + 10})
				for name, tt := range map[string]struct {
					of *State
					b  []byte
				}{"written": {gateway, write(t, gateway)}, "encoded": {server, encode(t, server)}} {
					read := clk.newReplica(false)
					_, err := read.ReadSnapshot(bytes.NewReader(tt.b))
					must(t, err)
					compareStates(t, tt.of, read, c, clk.now())
					if name == "written" {
						// It goes on where the other was, also if it then loads what is older than
						// what was revoked ahead.
						load(t, read, m.head(), m.fill)
						load(t, gateway, m.head(), m.fill)
						compareStates(t, gateway, read, c, clk.now())
						gateway = read
					}
				}
			}
		})
	}
}

// A part stays one, with what came to it after its position.
func TestSnapshotOfParts(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fill            func(*Loader)
		tenants         []string
		revocationsOnly bool
		kind            string
	}{
		"whole":       {func(l *Loader) {}, nil, false, kindAll},
		"tenants":     {func(l *Loader) { l.Tenants([]string{"b.example", "a.example"}) }, []string{"a.example", "b.example"}, false, kindAll},
		"no tenants":  {func(l *Loader) { l.Tenants([]string{}) }, []string{}, false, kindAll},
		"revocations": {func(l *Loader) { l.RevocationsOnly() }, nil, true, kindRevocations},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, read := newClock().newReplica(false), newClock().newReplica(false)
			load(t, s, revocation.Position{Epoch: epoch, Seq: 3}, tt.fill, func(l *Loader) {
				l.Revocation(Record{Target: ofJTI("a"), Exp: begin})
			})
			s.Revoke(Record{Target: ofJTI("b"), Exp: begin}, revocation.Position{Epoch: epoch, Seq: 9})
			h, err := read.ReadSnapshot(bytes.NewReader(write(t, s)))
			must(t, err)
			want := SnapshotHeader{Position: s.At(), Kind: tt.kind, Tenants: tt.tenants, Entries: 2}
			if diff := cmp.Diff(want, h); diff != "" {
				t.Errorf("header (-want +got):\n%s", diff)
			}
			// One that is of before what was revoked ahead does not take it back.
			load(t, read, revocation.Position{Epoch: epoch, Seq: 8}, tt.fill)
			if _, ok := read.Check(Token{Iss: iss, JTI: "b"}, begin); !ok {
				t.Error("what was revoked ahead is taken back")
			}
		})
	}
}

// What a part has from after its position stays: neither what is told again nor an older snapshot
// changes it.
func TestSnapshotOfAPartThatIsAhead(t *testing.T) {
	t.Parallel()
	m, s := newModel(), newClock().newReplica(false)
	scope := func(name string) *catalog.Scope {
		return &catalog.Scope{Meta: catalog.Meta{ID: 3, UUID: uuidOf(3), Tenant: acme}, Name: name}
	}
	gone := &catalog.Scope{Meta: catalog.Meta{ID: 4, UUID: uuidOf(4), Tenant: acme}, Name: "gone"}
	for i, c := range []catalog.Change{
		{Verb: catalog.Created, Entity: scope("1")}, {Verb: catalog.Created, Entity: gone}, {Verb: catalog.Updated, Entity: scope("3")},
		{Verb: catalog.Deleted, Entity: gone}, {Verb: catalog.Updated, Entity: scope("5")},
	} {
		m.change(c)
		m.log[i].Previous = revocation.Seq(i)
	}
	ofAcme := func(l *Loader) { l.Tenants([]string{acme.Domain}) }
	load(t, s, revocation.Position{Epoch: epoch}, ofAcme)
	for _, e := range m.log {
		must(t, s.Apply(e))
	}
	read := newClock().newReplica(false)
	_, err := read.ReadSnapshot(bytes.NewReader(write(t, s)))
	must(t, err)
	check := func(when string) {
		t.Helper()
		read.View(func(v *View) {
			if diff := cmp.Diff([]*catalog.Scope{scope("5")}, v.Scopes()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
		})
	}
	check("as it was read")
	for _, e := range m.log[:4] {
		must(t, read.Apply(e))
		check("after " + e.Position.String())
	}
	load(t, read, revocation.Position{Epoch: epoch, Seq: 3}, ofAcme, func(l *Loader) {
		l.Entity(scope("3"))
		l.Entity(gone)
	})
	check("after an older snapshot")
	if read.At().Seq != 3 {
		t.Errorf("at %s", read.At())
	}
}

// bytesOf is a revocation's bytes with a key of text.
func bytesOf(exp int) []any { return []any{someKey, exp * 2} }

func TestReadSnapshotRefuses(t *testing.T) {
	t.Parallel()
	set := func(s *blocks) *blocks { return s.block(blockSet, "\x03", len(iss), iss, 0) }
	scope := `{"id":3,"uuid":"` + uuidOf(3) + `","tenant":{"id":1,"domain":"acme.example"},"name":"s"}`
	for _, tt := range []struct {
		name string
		b    []byte
		err  string // empty: it is read
	}{
		{"a good one", set(newBlocks(1, 0).header("all", 0)).block(blockRevocations, append([]any{0}, bytesOf(5)...)...).
			block(blockEntity, 5, "scope", scope).end(1, 1), ""},
		{"blocks and members of a later minor version", newBlocks(1, 9).
			block(blockHeader, len(epoch), string(epoch), 7, 3, "all", 0, 0, "more").
			block(0x81, "anything").block(0xff).end(0, 0), ""},
		{"an entity of a later version", newBlocks(1, 0).header("all", 0).block(blockEntity, 4, "moon", `{"phase":"full"}`).end(0, 1), ""},
		{"another major version", newBlocks(2, 0).header("all", 0).end(0, 0), "version 2"},
		{"no snapshot", []byte(`{"epoch":"x","seq":5}`), "no snapshot"},
		{"nothing", nil, "breaks off"},
		{"no header", newBlocks(1, 0).end(0, 0), "header"},
		{"two headers", newBlocks(1, 0).header("all", 0).header("all", 0).end(0, 0), "block of type 1"},
		{"an epoch that is none", newBlocks(1, 0).block(blockHeader, 1, "x", 7, 3, "all", 0, 0).end(0, 0), "header"},
		{"a seq past the last", newBlocks(1, 0).block(blockHeader, len(epoch), string(epoch), "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 3, "all", 0, 0).end(0, 0), "header"},
		{"a kind that is none", newBlocks(1, 0).header("All\n", 0).end(0, 0), "header"},
		{"a short header", newBlocks(1, 0).block(blockHeader, len(epoch), string(epoch)).end(0, 0), "header"},
		{"a text past its block", newBlocks(1, 0).block(blockHeader, math.MaxInt, "x").end(0, 0), "header"},
		{"a block that may not be skipped", newBlocks(1, 0).header("all", 0).block(7, "x").end(0, 0), "may not be skipped"},
		{"a block that is too long", newBlocks(1, 0).header("all", 0).block(0x90, strings.Repeat("x", maxBlock+1)).end(0, 0), "more than 65536 bytes"},
		{"a length that is no number", append(newBlocks(1, 0).header("all", 0).b, bytes.Repeat([]byte{0xff}, 20)...), "length"},
		{"a length without its block", append(newBlocks(1, 0).header("all", 0).b, blockEntity, 0xff, 0xff, 0x03), "breaks off"},
		{"tenants of all", newBlocks(1, 0).header("all", 0).block(blockTenant, "acme.example").end(0, 0), "block of type 2"},
		{"a tenant that is none", newBlocks(1, 0).header("all", headerTenants).block(blockTenant, "Acme!").end(0, 0), "block of type 2"},
		{"a set of an unknown class", newBlocks(1, 0).header("all", 0).block(blockSet, "\x09", len(iss), iss, 0).end(0, 0), "class 9"},
		{"a set of class 0", newBlocks(1, 0).header("all", 0).block(blockSet, "\x00", len(iss), iss, 0).end(0, 0), "class 0"},
		{"an empty set", newBlocks(1, 0).header("all", 0).block(blockSet).end(0, 0), "well-formed"},
		{"a set of no issuer", newBlocks(1, 0).header("all", 0).block(blockSet, "\x03", 0, 0).end(0, 0), "iss is empty"},
		{"tenants of an issuer", newBlocks(1, 0).header("all", 0).block(blockSet, "\x08", len(iss), iss, 0).end(0, 0), "names no issuer"},
		{"revocations of no set", newBlocks(1, 0).header("all", 0).block(blockRevocations, append([]any{0}, bytesOf(5)...)...).end(1, 0), "not defined"},
		{"half a key", set(newBlocks(1, 0).header("all", 0)).block(blockRevocations, 0, "0123").end(1, 0), "well-formed"},
		{"a key without an end", set(newBlocks(1, 0).header("all", 0)).block(blockRevocations, 0, someKey).end(1, 0), "well-formed"},
		{"an end before 1970", set(newBlocks(1, 0).header("all", 0)).block(blockRevocations, 0, someKey, 1).end(1, 0), "no end"},
		{"no not_after", newBlocks(1, 0).header("all", 0).block(blockSet, "\x06", len(iss), iss, 0).block(blockRevocations, 0, someKey, 2).end(1, 0), "well-formed"},
		{"too few revocations", set(newBlocks(1, 0).header("all", 0)).block(blockRevocations, append([]any{0}, bytesOf(5)...)...).end(2, 0), "ends after 2"},
		{"too many entities", newBlocks(1, 0).header("all", 0).block(blockEntity, 5, "scope", scope).end(0, 0), "ends after 0"},
		{"an entity that is none", newBlocks(1, 0).header("all", 0).block(blockEntity, 5, "scope", `{"id":3}`).end(0, 1), "lacks"},
		{"an entity that is no JSON", newBlocks(1, 0).header("all", 0).block(blockEntity, 5, "scope", `{`).end(0, 1), "scope"},
		{"an entity among revocations", newBlocks(1, 0).header("revocations", 0).block(blockEntity, 5, "scope", scope).end(0, 1), "snapshot of revocations"},
		{"no end", newBlocks(1, 0).header("all", 0).b, "breaks off"},
		{"a wrong sum", newBlocks(1, 0).header("all", 0).block(blockEnd, 0, 0, "abcd").b, "checksum"},
		{"an end without a sum", newBlocks(1, 0).header("all", 0).block(blockEnd, 0, 0).b, "well-formed"},
		{"more after the end", append(newBlocks(1, 0).header("all", 0).end(0, 0), 0), "follows its end"},
		{"a kind without revocations", newBlocks(1, 0).header("apis", 0).end(0, 0), "no revocations"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newClock().newReplica(false)
			load(t, s, revocation.Position{Epoch: epoch, Seq: 5}, func(l *Loader) { l.Revocation(Record{Target: ofJTI("a"), Exp: begin}) })
			h, err := s.ReadSnapshot(bytes.NewReader(tt.b))
			if tt.err == "" {
				must(t, err)
				if h.Seq != 7 || s.At().Seq != 7 {
					t.Errorf("header %+v, state at %s", h, s.At())
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.HasPrefix(err.Error(), "read snapshot: ") {
				t.Errorf("error is %v, want one of %q", err, tt.err)
			}
			if _, ok := s.Check(Token{Iss: iss, JTI: "a"}, begin); s.At().Seq != 5 || !ok || s.entries() != 1 {
				t.Error("what failed changed the state")
			}
		})
	}
	// An error of the reader is not taken for an end.
	boom := errors.New("boom")
	s := newClock().newReplica(false)
	if _, err := s.ReadSnapshot(io.MultiReader(bytes.NewReader(example(t)), errorReader{boom})); !errors.Is(err, boom) || s.At().Seq != 0 {
		t.Errorf("error is %v", err)
	}
	// A snapshot of another kind is loaded where nothing is taken back.
	_, err := s.ReadSnapshot(bytes.NewReader(newBlocks(1, 0).header("apis", 0).end(0, 0)))
	must(t, err)
}

type errorReader struct{ err error }

func (r errorReader) Read([]byte) (int, error) { return 0, r.err }

// Not a bit may be another, and no byte may be missing.
func TestDamagedSnapshot(t *testing.T) {
	t.Parallel()
	good := example(t)
	refused := func(what string, b []byte) {
		t.Helper()
		s := NewState(StateConfig{})
		if _, err := s.ReadSnapshot(bytes.NewReader(b)); err == nil || s.At() != (revocation.Position{}) || s.entries() != 0 {
			t.Errorf("%s: error %v, state at %s", what, err, s.At())
		}
	}
	for i := range good {
		refused(fmt.Sprintf("cut at %d", i), good[:i])
		for bit := range 8 {
			b := bytes.Clone(good)
			b[i] ^= 1 << bit
			refused(fmt.Sprintf("bit %d of byte %d", bit, i), b)
		}
	}
}

// Claims take no more memory than a bound, nor does what is skipped. It is not parallel: it measures the heap.
func TestSnapshotClaims(t *testing.T) {
	claims := newBlocks(1, 0).block(blockHeader, len(epoch), string(epoch), 7, 3, "all", 0, math.MaxInt)
	for i := range 20 {
		name := fmt.Sprint(iss, i)
		claims.block(blockSet, "\x02", len(name), name, math.MaxInt).block(blockRevocations, append([]any{i}, bytesOf(5)...)...)
	}
	skipped := newBlocks(1, 0).header("all", 0)
	for range 4000 {
		skipped.block(0x90, strings.Repeat("x", 10_000))
	}
	for name, b := range map[string][]byte{"claims": claims.end(20, 0), "skipped": skipped.end(0, 0)} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := NewState(StateConfig{}).ReadSnapshot(bytes.NewReader(b))
		must(t, err)
		runtime.ReadMemStats(&after)
		if got := int(after.TotalAlloc - before.TotalAlloc); got > 50*maxReserve {
			t.Errorf("%s: %d bytes were allocated", name, got)
		}
	}
}

// What may be said in some bytes each is not kept without end.
func TestSnapshotCaps(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		d    snapshotDecoder
		typ  byte
		part string
	}{
		"tenants": {snapshotDecoder{header: SnapshotHeader{Tenants: make([]string, maxTenants-1)}}, blockTenant, "acme.example"},
		"sets":    {snapshotDecoder{sets: make([]announced, maxSets-1)}, blockSet, "\x08\x00\x00"},
	} {
		for i, want := range []string{"", "more than 1048576 " + name} {
			tt.d.payload = []byte(tt.part)
			if err := tt.d.read(tt.typ, nil); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s, %d: %v, want %q", name, i, err, want)
			}
		}
	}
}

// tokens yields records of random tokens that end within an hour.
func randomTokens(n int, issuer func(i int) string) func(func(Record) bool) {
	return func(yield func(Record) bool) {
		rnd := rand.New(rand.NewPCG(1, 2))
		var raw [16]byte
		for i := range n {
			binary.BigEndian.PutUint64(raw[:], rnd.Uint64())
			binary.BigEndian.PutUint64(raw[8:], rnd.Uint64())
			text := make([]byte, 0, 36)
			for j, part := range [][]byte{raw[:4], raw[4:6], raw[6:8], raw[8:10], raw[10:]} {
				if j > 0 {
					text = append(text, '-')
				}
				text = hex.AppendEncode(text, part)
			}
			target := revocation.Target{Kind: revocation.KindToken, Iss: issuer(i), ID: string(text)}
			if !yield(Record{Target: target, Tenant: acme, Exp: begin + rnd.Int64N(3600)}) {
				return
			}
		}
	}
}

func ofOne(int) string { return iss }

func TestSnapshotSize(t *testing.T) {
	t.Parallel()
	many := make([]string, 3000)
	for i := range many {
		many[i] = fmt.Sprintf("https://km-%d.example.com", i)
	}
	for name, tt := range map[string]struct {
		n      int
		issuer func(int) string
	}{
		"one issuer":                 {1_000_000, ofOne},
		"3000 issuers, taking turns": {size(150_000, 300_000), func(i int) string { return many[i%len(many)] }},
		"issuers, one after another": {size(100_000, 300_000), func(i int) string { return many[i/1000] }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := NewSnapshotEncoder(SnapshotHeader{Position: revocation.Position{Epoch: epoch, Seq: 1}, Kind: kindAll, Entries: tt.n})
			b := make([]byte, 0, 2*maxHeld)
			total, most := 0, 0
			spill := func() {
				total += len(b)
				b = b[:0]
			}
			b = e.AppendHeader(b)
			for rec := range randomTokens(tt.n, tt.issuer) {
				b = e.AppendRevocation(b, rec)
				held := 0
				if most = max(most, e.held); e.revocations%100_000 == 0 {
					for _, s := range e.sets {
						held += cap(s.entries)
					}
					if held != e.held {
						t.Fatalf("it holds %d bytes and counts %d", held, e.held)
					}
				}
				spill()
			}
			b = e.AppendEnd(b)
			spill()
			if most > maxHeld {
				t.Errorf("it held %d bytes, must be at most %d", most, maxHeld)
			}
			if perEntry := float64(total) / float64(tt.n); perEntry > 20 {
				t.Errorf("an entry takes %.2f bytes, must be at most 20", perEntry)
			} else {
				t.Logf("an entry takes %.2f bytes", perEntry)
			}
		})
	}
}

// It is not parallel: it counts allocations.
func TestSnapshotAllocations(t *testing.T) {
	var targets []Record
	for i := range 100 {
		targets = append(targets, Record{Target: ofJTI(uuidOf(i)), Exp: begin}, Record{Target: ofJTI(fmt.Sprint(i)), Exp: begin})
	}
	e := NewSnapshotEncoder(SnapshotHeader{Kind: kindAll})
	b := e.AppendHeader(make([]byte, 0, maxHeld))
	i := 0
	next := func() {
		b = e.AppendRevocation(b[:0], targets[i%len(targets)])
		i++
	}
	for range 10_000 {
		next()
	}
	if got := testing.AllocsPerRun(10_000, next); got > 0 {
		t.Errorf("%v allocations for a revocation", got)
	}
}

// A snapshot of a state that changes meanwhile has all of its position.
func TestWriteSnapshotWhileApplying(t *testing.T) {
	t.Parallel()
	s := newClock().newReplica(false)
	load(t, s, revocation.Position{Epoch: epoch})
	n := size(3000, 10_000)
	m := newModel()
	for i := range n {
		m.revoke(Record{Target: ofJTI(uuidOf(i)), Tenant: acme, Exp: begin + int64(i)})
	}
	var writers sync.WaitGroup
	done := make(chan struct{})
	writers.Go(func() {
		defer close(done)
		for _, e := range m.log {
			must(t, s.Apply(e))
		}
	})
	for over := false; !over; {
		select {
		case <-done:
			over = true
		default:
		}
		var b bytes.Buffer
		at, err := s.WriteSnapshot(&b)
		must(t, err)
		read := newClock().newReplica(false)
		_, err = read.ReadSnapshot(&b)
		must(t, err)
		if read.At() != at {
			t.Fatalf("at %s, want %s", read.At(), at)
		}
		for i := range int(at.Seq) {
			if _, ok := read.Check(Token{Iss: iss, JTI: uuidOf(i)}, begin+int64(i)); !ok {
				t.Fatalf("the snapshot of %s lacks revocation %d", at, i+1)
			}
		}
	}
	writers.Wait()
	if _, err := NewState(StateConfig{}).WriteSnapshot(io.Discard); err == nil {
		t.Error("a snapshot of nothing was written")
	}
	boom := errors.New("boom")
	if _, err := s.WriteSnapshot(failingWriter{boom}); !errors.Is(err, boom) {
		t.Errorf("a writer's error: %v", err)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// Whatever comes in: nothing is changed, or it is a state whose snapshot says the same.
func FuzzReadSnapshot(f *testing.F) {
	f.Add(example(f), false)
	f.Add(example(f), true)
	f.Add(newBlocks(1, 0).header("revocations", headerTenants).block(blockTenant, "acme.example").end(0, 0), true)
	f.Add(newBlocks(1, 3).header("apis", 0).block(0x90, "x").block(blockFresh, 9).end(0, 0), true)
	f.Add(newBlocks(1, 0).header("all", 0).block(blockSet, "\x06", len(iss), iss, 1).
		block(blockRevocations, 0, someKey, math.MaxInt, "\x00").end(1, 0), true)
	f.Add(newBlocks(2, 0).header("all", 0).b, false)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix { // else hardly any would get past the checksum
			b = fixed(b)
		}
		s := newClock().newReplica(false)
		h, err := s.ReadSnapshot(bytes.NewReader(b))
		if err != nil {
			if s.At() != (revocation.Position{}) || s.entries() != 0 {
				t.Fatalf("after %v the state is at %s", err, s.At())
			}
			return
		}
		if h.Position != s.At() {
			t.Fatalf("header %+v, state at %s", h, s.At())
		}
		again := newClock().newReplica(false)
		if _, err := again.ReadSnapshot(bytes.NewReader(write(t, s))); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(entriesOf(s), entriesOf(again)); diff != "" {
			t.Fatalf("revocations (-read +written and read):\n%s", diff)
		}
		tenants, only := s.Scope()
		againTenants, againOnly := again.Scope()
		if !slices.Equal(tenants, againTenants) || (tenants == nil) != (againTenants == nil) || only != againOnly {
			t.Fatalf("scope is %q, %t; of what was written and read %q, %t", tenants, only, againTenants, againOnly)
		}
	})
}

// snapshotOf is a snapshot of n tokens of one issuer, as a server makes it.
func snapshotOf(n int) []byte {
	e := NewSnapshotEncoder(SnapshotHeader{Position: revocation.Position{Epoch: epoch, Seq: revocation.Seq(n)}, Kind: kindAll, Entries: n})
	e.about = map[setName]int{{uuids, iss}: n}
	b := e.AppendHeader(make([]byte, 0, 19*n+1000))
	for rec := range randomTokens(n, ofOne) {
		b = e.AppendRevocation(b, rec)
	}
	return e.AppendEnd(b)
}

func BenchmarkReadSnapshot(b *testing.B) {
	for _, n := range []int{100_000, million} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			snapshot := snapshotOf(n)
			b.SetBytes(int64(len(snapshot)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := NewState(StateConfig{}).ReadSnapshot(bytes.NewReader(snapshot)); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

func BenchmarkWriteSnapshot(b *testing.B) {
	s := NewState(StateConfig{})
	_, err := s.ReadSnapshot(bytes.NewReader(snapshotOf(million)))
	must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.WriteSnapshot(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(million*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}

func BenchmarkAppendRevocation(b *testing.B) {
	records := slices.Collect(randomTokens(100_000, ofOne))
	e := NewSnapshotEncoder(SnapshotHeader{Kind: kindAll})
	buf := e.AppendHeader(nil)
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		buf = e.AppendRevocation(buf[:0], records[i%len(records)])
		i++
	}
}
