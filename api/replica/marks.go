package replica

import (
	"crypto/sha256"
	"encoding/binary"
	"hash/maphash"
	"maps"
	"math/bits"
	"sync/atomic"

	"github.com/rescindhq/rescind/api/revocation"
)

// key is what is kept of an identifier: the 16 bytes of a jti that is a UUID, else the
// first 16 of a SHA-256.
type key [2]uint64

// class says which set of an issuer a target is in. Keys of two classes are never
// compared.
type class uint8

const (
	signingKeys class = iota
	uuids             // jti in the canonical form of a UUID
	jtis              // other jti
	digests
	sessions
	clients
	subjects
	ofIssuers // how many classes an issuer has

	tenants = ofIssuers // are of no issuer
)

// classes say what their entries are. The label is hashed with the identifier.
var classes = [...]struct {
	kind  revocation.Kind
	label string
}{
	signingKeys: {revocation.KindKey, "key"},
	uuids:       {revocation.KindToken, ""},
	jtis:        {revocation.KindToken, "token"},
	digests:     {revocation.KindToken, "digest"},
	sessions:    {revocation.KindSession, "session"},
	clients:     {revocation.KindClient, "client"},
	subjects:    {revocation.KindSubject, "subject"},
	tenants:     {revocation.KindTenant, "tenant"},
}

// keyOf needs a valid target.
func keyOf(t revocation.Target) (class, key) {
	c := tenants
	switch t.Kind {
	case revocation.KindToken:
		c = jtis
		if t.Digest {
			c = digests
		} else if k, ok := uuidKey(t.ID); ok {
			return uuids, k
		}
	case revocation.KindClient:
		c = clients
	case revocation.KindSubject:
		c = subjects
	case revocation.KindSession:
		c = sessions
	case revocation.KindKey:
		c = signingKeys
	}
	return c, hashedKey(c, t.ID)
}

// maxID is the length of the longest identifier that can be revoked.
const maxID = 255

// hashedKey needs a value of at most maxID bytes.
func hashedKey(c class, value string) key {
	var b [len("session") + 1 + maxID]byte
	n := copy(b[:], classes[c].label) + 1
	n += copy(b[n:], value)
	sum := sha256.Sum256(b[:n])
	return key{binary.BigEndian.Uint64(sum[:]), binary.BigEndian.Uint64(sum[8:])}
}

// notHex marks bytes that are no lower-case hexadecimal digits.
const notHex = 0xff

var hexValue = func() (table [256]byte) {
	for i := range table {
		table[i] = notHex
	}
	for i, c := range []byte("0123456789abcdef") {
		table[c] = byte(i)
	}
	return table
}()

func uuidKey(s string) (k key, ok bool) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return k, false
	}
	var all byte
	digits := func(w uint64, s string) uint64 {
		for i := range len(s) {
			v := hexValue[s[i]]
			all |= v
			w = w<<4 | uint64(v&15)
		}
		return w
	}
	k[0] = digits(digits(digits(0, s[:8]), s[9:13]), s[14:18])
	k[1] = digits(digits(0, s[19:23]), s[24:])
	return k, all != notHex
}

// seed keeps those who choose identifiers from choosing where they go.
var seed = maphash.MakeSeed()

func (k key) hash() uint64 {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], k[0])
	binary.LittleEndian.PutUint64(b[8:], k[1])
	return maphash.Bytes(seed, b[:])
}

// marks are all entries. Check reads them while the one writer changes them.
type marks struct {
	issuers atomic.Pointer[map[string]*issuer] // the map is replaced, never changed
	tenants set

	// The writer's own.
	listed bool // entries have records
	turn   struct{ set, table int }
	sets   []*set
}

type issuer struct {
	sets [ofIssuers]set
}

func newMarks(listed bool) *marks {
	m := &marks{listed: listed}
	m.issuers.Store(&map[string]*issuer{})
	m.init(&m.tenants, tenants)
	return m
}

func (m *marks) init(s *set, c class) {
	s.class, s.timed = c, classes[c].kind.HasTime()
	s.stride = wordNotAfter
	if s.timed {
		s.stride++
	}
	if m.listed {
		s.stride++
	}
	m.sets = append(m.sets, s)
}

// set is for the writer. It makes what is not there.
func (m *marks) set(c class, iss string) *set {
	if c == tenants {
		return &m.tenants
	}
	old := *m.issuers.Load()
	if is := old[iss]; is != nil {
		return &is.sets[c]
	}
	is := new(issuer)
	for c := range ofIssuers {
		m.init(&is.sets[c], c)
	}
	all := maps.Clone(old)
	all[iss] = is
	m.issuers.Store(&all)
	return &is.sets[c]
}

func (m *marks) each(f func(iss string, s *set)) {
	f("", &m.tenants)
	for iss, is := range *m.issuers.Load() {
		for c := range is.sets {
			f(iss, &is.sets[c])
		}
	}
}

// sweepSteps is in how many calls sweep comes around, hence in seconds.
const sweepSteps = 60

// sweep forgets what ended before cutoff in some of the tables, in turn.
func (m *marks) sweep(cutoff int64, drop func(record uint32)) {
	total := 0
	for _, s := range m.sets {
		total++
		if dir := s.dir.Load(); dir != nil {
			total += len(dir.tables)
		}
	}
	for range total/sweepSteps + 1 {
		m.turn.set %= len(m.sets)
		s := m.sets[m.turn.set]
		dir := s.dir.Load()
		if dir == nil || m.turn.table >= len(dir.tables) {
			m.turn.set, m.turn.table = m.turn.set+1, 0
			continue
		}
		t := dir.tables[m.turn.table]
		if t.hasBefore(cutoff, s.stride) {
			s.rebuild(m.turn.table, cutoff, drop)
		}
		m.turn.table += dir.span(t)
	}
}

// set is the entries of one class of one issuer: an extendible hash table, so that it
// grows by one small table at a time.
type set struct {
	dir    atomic.Pointer[directory] // nil: empty
	class  class
	timed  bool
	stride int
	n      int // the writer's own
}

// directory has the table of an entry at the first depth bits of its hash. It is
// replaced, never changed.
type directory struct {
	depth  uint8
	tables []*table // 1<<depth of them; one whose depth is less is there several times
}

func (d *directory) index(hash uint64) int { return int(hash >> (64 - d.depth)) }
func (d *directory) span(t *table) int     { return 1 << (d.depth - t.depth) }

// table has slots in groups of eight, with open addressing by group. A slot is written
// before its tag: a reader that sees the tag sees the key. After that only its end and
// its not-after change, and only rise. An eighth of the slots is empty, so every search
// ends.
//
// Tags are a byte for each slot: 0 in an empty one, else some of the hash. They are few
// enough to stay in the processor's cache, so that a search for what is not there, as
// most are, does not wait for memory.
type table struct {
	tags  []uint64 // one for each group
	words []uint64 // stride for each slot
	depth uint8
	n     int // entries; the writer's own
}

// tableMax is how many entries a table may have before it is split in two: copying
// them takes a fraction of a millisecond.
const tableMax = 5000

const (
	groupSize = 8                  // slots
	groupMax  = groupSize - 1      // entries, on average
	everyByte = 0x0101010101010101 // times a byte: the byte eight times
	topBits   = 0x80 * everyByte
)

// The words of an entry. The number of its record comes last, if it has one.
const (
	wordEnd      = iota // exp
	wordKey             // and the next one
	_                   //
	wordNotAfter        // if the set is timed
)

// entry is a slot in a table.
type entry []uint64

func (e entry) ok() bool   { return len(e) > 0 }
func (e entry) key() key   { return key{e[wordKey], e[wordKey+1]} }
func (e entry) exp() int64 { return int64(atomic.LoadUint64(&e[wordEnd])) }

// notAfter is 0 if the set is not timed.
func (e entry) notAfter(s *set) int64 {
	if !s.timed {
		return 0
	}
	return int64(atomic.LoadUint64(&e[wordNotAfter]))
}

// record is the writer's own.
func (e entry) record(s *set) uint32 { return uint32(e[s.stride-1]) }

// newTable has room for half as many entries more.
func newTable(entries int, depth uint8, stride int) *table {
	groups := (entries+entries/2)/groupSize + 1
	return &table{tags: make([]uint64, groups), words: make([]uint64, groups*groupSize*stride), depth: depth}
}

func (t *table) full() bool { return t.n >= groupMax*len(t.tags) }

// The directory goes by the upper bits of a hash, the group by the lower half, the tag
// by what is in between.

func (t *table) group(hash uint64) int { return int(uint64(uint32(hash)) * uint64(len(t.tags)) >> 32) }
func tagOf(hash uint64) uint64         { return hash>>32&0x7f | 0x80 }

func (t *table) slot(group, i, stride int) entry {
	from := (group*groupSize + i) * stride
	return entry(t.words[from : from+stride : from+stride])
}

// find returns the entry of k, none if there is none.
func (t *table) find(hash uint64, k key, stride int) entry {
	for g := t.group(hash); ; g++ {
		if g == len(t.tags) {
			g = 0
		}
		tags := atomic.LoadUint64(&t.tags[g])
		// The bytes that are the tag become 0, and those get their top bit; so may the one
		// above such a byte, but never an empty slot's, whose top bit is set before.
		x := tags ^ tagOf(hash)*everyByte
		for found := (x - everyByte) &^ x & topBits; found != 0; found &= found - 1 {
			if e := t.slot(g, bits.TrailingZeros64(found)/8, stride); e.key() == k {
				return e
			}
		}
		if ^tags&topBits != 0 {
			return nil
		}
	}
}

// add calls write with the slot for a new entry, then shows it to readers.
func (t *table) add(hash uint64, stride int, write func(e entry)) {
	g := t.group(hash)
	for t.tags[g]&topBits == topBits {
		if g++; g == len(t.tags) {
			g = 0
		}
	}
	i := bits.TrailingZeros64(^t.tags[g]&topBits) / 8
	write(t.slot(g, i, stride))
	atomic.StoreUint64(&t.tags[g], t.tags[g]|tagOf(hash)<<(8*i))
	t.n++
}

// each is for the writer.
func (t *table) each(stride int, f func(e entry)) {
	for g, tags := range t.tags {
		for used := tags & topBits; used != 0; used &= used - 1 {
			f(t.slot(g, bits.TrailingZeros64(used)/8, stride))
		}
	}
}

func (t *table) hasBefore(cutoff int64, stride int) (has bool) {
	t.each(stride, func(e entry) { has = has || e.exp() < cutoff })
	return has
}

// find returns the entry of k, none if there is none.
func (s *set) find(k key) entry {
	dir := s.dir.Load()
	if dir == nil {
		return nil
	}
	hash := k.hash()
	return dir.tables[dir.index(hash)].find(hash, k, s.stride)
}

// has reports whether an entry of k matches a token of iat at now.
func (s *set) has(k key, iat, now int64) bool {
	e := s.find(k)
	// Not exp+leeway: exp is from outside, and the sum could wrap around.
	return e.ok() && e.exp() >= now-leeway && (!s.timed || iat <= e.notAfter(s))
}

// matches reports whether an entry of value matches a token of iat at now.
func (s *set) matches(value string, iat, now int64) bool {
	if s.dir.Load() == nil || value == "" || len(value) > maxID {
		return false // without the cost of a hash
	}
	return s.has(hashedKey(s.class, value), iat, now)
}

func (is *issuer) matchesJTI(jti string, now int64) bool {
	if k, ok := uuidKey(jti); ok {
		return is.sets[uuids].has(k, 0, now)
	}
	return is.sets[jtis].matches(jti, 0, now)
}

// each is for the writer.
func (s *set) each(f func(e entry)) {
	dir := s.dir.Load()
	if dir == nil {
		return
	}
	for i := 0; i < len(dir.tables); i += dir.span(dir.tables[i]) {
		dir.tables[i].each(s.stride, f)
	}
}

// extend moves the ends of an entry, which must not be earlier than they were. A
// reader in between sees one of them moved: it is right about both.
func (s *set) extend(e entry, exp, notAfter int64, record uint32) {
	s.move(e, record)
	if s.timed {
		atomic.StoreUint64(&e[wordNotAfter], uint64(notAfter))
	}
	atomic.StoreUint64(&e[wordEnd], uint64(exp))
}

// move changes the number of an entry's record, if it has one.
func (s *set) move(e entry, record uint32) {
	last := wordNotAfter
	if s.timed {
		last++
	}
	if last < s.stride {
		e[last] = uint64(record)
	}
}

// insert adds an entry for k, which must have none. To make room it forgets what ended
// before cutoff.
func (s *set) insert(k key, exp, notAfter int64, record uint32, cutoff int64, drop func(record uint32)) {
	hash := k.hash()
	for {
		dir := s.dir.Load()
		if dir == nil {
			dir = &directory{tables: []*table{newTable(0, 0, s.stride)}}
			s.dir.Store(dir)
		}
		i := dir.index(hash)
		if t := dir.tables[i]; !t.full() {
			t.add(hash, s.stride, func(e entry) {
				e[wordKey], e[wordKey+1] = k[0], k[1]
				s.extend(e, exp, notAfter, record)
			})
			s.n++
			return
		}
		s.rebuild(i, cutoff, drop)
	}
}

// rebuild replaces table i by one, or two, with room for more and without what ended
// before cutoff.
func (s *set) rebuild(i int, cutoff int64, drop func(record uint32)) {
	dir := s.dir.Load()
	old := dir.tables[i]
	var left [2]int // for each half, by the next bit of the hash
	half := func(hash uint64) uint64 { return hash >> (63 - old.depth) & 1 }
	old.each(s.stride, func(e entry) {
		if e.exp() < cutoff {
			drop(e.record(s))
			s.n--
			return
		}
		left[half(e.key().hash())]++
	})
	if s.n == 0 {
		s.dir.Store(nil)
		return
	}
	split := left[0]+left[1] >= tableMax
	next := &directory{depth: dir.depth}
	var halves [2]*table
	if split {
		next.depth = max(dir.depth, old.depth+1)
		halves[0] = newTable(left[0], old.depth+1, s.stride)
		halves[1] = newTable(left[1], old.depth+1, s.stride)
	} else {
		halves[0] = newTable(left[0]+left[1], old.depth, s.stride)
		halves[1] = halves[0]
	}
	old.each(s.stride, func(e entry) {
		if e.exp() >= cutoff {
			hash := e.key().hash()
			halves[half(hash)].add(hash, s.stride, func(to entry) { copy(to, e) })
		}
	})
	next.tables = make([]*table, 1<<next.depth)
	for j := range next.tables {
		t := dir.tables[j>>(next.depth-dir.depth)]
		switch {
		case t != old:
		case split:
			t = halves[j>>(next.depth-old.depth-1)&1]
		default:
			t = halves[0]
		}
		next.tables[j] = t
	}
	s.dir.Store(next)
}
