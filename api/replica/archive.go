package replica

import (
	"iter"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/rescindhq/rescind/api/revocation"
)

// archive is the records of all entries, for lists. A list is the chunks that there
// are and a version: records are added after those it knows, and one that dies notes
// the version from which it is dead. So a list stays as it was, without a lock and
// without a copy of the records.
type archive struct {
	chunks  []*chunk // nil where one was given up
	free    []int    // where
	open    int      // the chunk that records are added to
	used    int      // its records
	text    strings.Builder
	live    int
	version uint64
	worn    []int // chunks of which half or more is dead

	issuers interned[string]
	tenants interned[revocation.Tenant]
}

// chunkSize records are copied at once when half of them are dead.
const chunkSize = 1024

type chunk struct {
	records [chunkSize]record
	text    string // of identifiers and signatures. Empty while the chunk is open
	dead    int    // the writer's own
}

// record is as it was written, but for died.
type record struct {
	exp, notAfter int64
	died          atomic.Uint64 // the version from which it is dead; 0: none
	iss, tenant   uint32
	at            uint32 // where its text begins: the identifier, then the signature
	signature     uint32 // length
	id            uint8  // length
	class         class
}

// interned are values of which there are few, and many references.
type interned[T comparable] struct {
	values  []T // only ever added to
	numbers map[T]uint32
}

func (in *interned[T]) number(v T) uint32 {
	n, ok := in.numbers[v]
	if !ok {
		if in.numbers == nil {
			in.numbers = make(map[T]uint32)
		}
		n = uint32(len(in.values))
		in.values = append(in.values, v)
		in.numbers[v] = n
	}
	return n
}

func newArchive() *archive {
	return &archive{chunks: []*chunk{new(chunk)}}
}

// append adds a record and returns its number.
func (a *archive) append(c class, rec Record) uint32 {
	if a.used == chunkSize {
		a.close()
	}
	r := &a.chunks[a.open].records[a.used]
	r.exp, r.notAfter, r.class = rec.Exp, rec.NotAfter, c
	r.iss, r.tenant = a.issuers.number(rec.Target.Iss), a.tenants.number(rec.Tenant)
	r.at, r.id, r.signature = uint32(a.text.Len()), uint8(len(rec.Target.ID)), uint32(len(rec.Signature))
	a.text.WriteString(rec.Target.ID)
	a.text.WriteString(rec.Signature)
	n := uint32(a.open*chunkSize + a.used)
	a.used++
	a.live++
	return n
}

// close begins a new chunk.
func (a *archive) close() {
	full := a.chunks[a.open]
	full.text = strings.Clone(a.text.String()) // without the builder's spare room
	switch {
	case full.dead == chunkSize:
		a.give(a.open)
	case full.dead >= chunkSize/2:
		a.worn = append(a.worn, a.open)
	}
	a.text = strings.Builder{}
	a.used = 0
	if n := len(a.free); n > 0 {
		a.open, a.free = a.free[n-1], a.free[:n-1]
		a.chunks[a.open] = new(chunk)
		return
	}
	a.open = len(a.chunks)
	a.chunks = append(a.chunks, new(chunk))
}

// kill takes record n out of the lists from now on.
func (a *archive) kill(n uint32) {
	i := int(n / chunkSize)
	c := a.chunks[i]
	a.version++
	c.records[n%chunkSize].died.Store(a.version)
	c.dead++
	a.live--
	switch {
	case i == a.open:
	case c.dead == chunkSize:
		a.worn = slices.DeleteFunc(a.worn, func(worn int) bool { return worn == i })
		a.give(i)
	case c.dead == chunkSize/2:
		a.worn = append(a.worn, i)
	}
}

// give gives up chunk i, of which no list to come has anything.
func (a *archive) give(i int) {
	a.chunks[i] = nil
	a.free = append(a.free, i)
}

// compact gives up one worn chunk, if there is any, after adding its live records
// anew; moved is told their new numbers.
func (a *archive) compact(moved func(t revocation.Target, n uint32)) {
	if len(a.worn) == 0 {
		return
	}
	i := a.worn[0]
	a.worn = a.worn[1:]
	old := a.chunks[i]
	for j := range old.records {
		if r := &old.records[j]; r.died.Load() == 0 {
			rec := r.read(old.text, a.issuers.values, a.tenants.values)
			moved(rec.Target, a.append(r.class, rec))
			a.live-- // it was counted twice
		}
	}
	a.give(i)
}

func (r *record) read(text string, issuers []string, tenants []revocation.Tenant) Record {
	id := r.at + uint32(r.id)
	return Record{
		Target: revocation.Target{
			Kind: classes[r.class].kind, Iss: issuers[r.iss], ID: text[r.at:id], Digest: r.class == digests,
		},
		Tenant:    tenants[r.tenant],
		Exp:       r.exp,
		NotAfter:  r.notAfter,
		Signature: text[id : id+r.signature],
	}
}

// Revocations is a list that stays as it was.
type Revocations struct {
	closed  []*chunk
	open    *chunk
	used    int    // records of open
	text    string // of open
	live    int
	version uint64
	issuers []string
	tenants []revocation.Tenant
}

func (a *archive) list() Revocations {
	s := Revocations{
		closed: make([]*chunk, 0, len(a.chunks)), open: a.chunks[a.open], used: a.used, text: a.text.String(),
		live: a.live, version: a.version,
		issuers: slices.Clip(a.issuers.values), tenants: slices.Clip(a.tenants.values),
	}
	for _, c := range a.chunks {
		if c != nil && c != s.open {
			s.closed = append(s.closed, c)
		}
	}
	return s
}

// All yields each revocation once, in no order, ended ones too until they are
// forgotten. Only of a state with [StateConfig.Records]. The strings in a record share
// memory with many others: clone those that are kept for long.
func (s Revocations) All() iter.Seq[Record] {
	return func(yield func(Record) bool) {
		for _, c := range s.closed {
			if !s.each(c.records[:], c.text, yield) {
				return
			}
		}
		if s.open != nil {
			s.each(s.open.records[:s.used], s.text, yield)
		}
	}
}

func (s Revocations) each(records []record, text string, yield func(Record) bool) bool {
	for i := range records {
		r := &records[i]
		if died := r.died.Load(); died != 0 && died <= s.version {
			continue
		}
		if !yield(r.read(text, s.issuers, s.tenants)) {
			return false
		}
	}
	return true
}

// Len is how many All yields.
func (s Revocations) Len() int { return s.live }
