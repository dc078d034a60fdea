package replica

import (
	"crypto/sha256"
	"encoding/binary"
	"hash/maphash"
	"math/bits"
	"math/rand/v2"
	"slices"
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

// uuidKey reads a UUID in its canonical form.
func uuidKey(s string) (k key, ok bool) {
	text, ok := uuidText(s)
	if !ok {
		return k, false
	}
	a, badA := hexOf(text.a)
	b, badB := hexOf(text.b)
	c, badC := hexOf(text.c)
	d, badD := hexOf(text.d)
	return key{a<<32 | b, c<<32 | d}, badA|badB|badC|badD == 0
}

// digits are the 32 of a UUID as it is written, eight in each word, the first one in the lowest
// byte.
type digits struct{ a, b, c, d uint64 }

// uuidText takes out of a string what are digits if it is a UUID. Ok: it has the length and
// the dashes of one.
func uuidText(s string) (d digits, ok bool) {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return d, false
	}
	return digits{
		a: four(s[:4]) | four(s[4:8])<<32,
		b: four(s[9:13]) | four(s[14:18])<<32,
		c: four(s[19:23]) | four(s[24:28])<<32,
		d: four(s[28:32]) | four(s[32:36])<<32,
	}, true
}

// four is the first four bytes of s.
func four(s string) uint64 {
	_ = s[3]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24
}

// hexOf is the value of eight lower-case hexadecimal digits. Bad is not 0 if they are something
// else. It works on all of them at once, as digitsOf does.
func hexOf(digits uint64) (value, bad uint64) {
	n := digits&(0x0f*everyByte) + digits>>6&everyByte*9 // a letter has the bit 0x40, and 'a' is 0x61
	bad = n&(0xf0*everyByte) | (digits ^ written(n))
	n = bits.ReverseBytes64(n)
	n = (n | n>>4) & 0x00ff00ff00ff00ff
	n = (n | n>>8) & 0x0000ffff0000ffff
	return (n | n>>16) & 0xffffffff, bad
}

// digitsOf are the eight digits of the lower half of n.
func digitsOf(n uint64) uint64 {
	n = (n&0xffffffff | n<<16) & 0x0000ffff0000ffff
	n = (n | n<<8) & 0x00ff00ff00ff00ff
	n = (n | n<<4) & (0x0f * everyByte)
	return written(bits.ReverseBytes64(n))
}

// written makes a digit of each byte, which is 0 to 15.
func written(n uint64) uint64 {
	letters := (n + 6*everyByte) >> 4 & everyByte
	return n + '0'*everyByte + letters*('a'-10-'0')
}

// digits are those of the UUID of which k is the key.
func (k key) digits() digits {
	return digits{a: digitsOf(k[0] >> 32), b: digitsOf(k[0]), c: digitsOf(k[1] >> 32), d: digitsOf(k[1])}
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

// seed keeps those who choose identifiers from choosing where they go.
var seed = struct{ a, b, c, d, e uint64 }{rand.Uint64(), rand.Uint64(), rand.Uint64(), rand.Uint64(), rand.Uint64()}

// mix is what the runtime hashes with where there are no instructions for it (wyhash). Other
// than the runtime's, it is inlined.
func mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

func (k key) hash() uint64 { return mix(mix(k[0]^seed.a, k[1]^seed.b), seed.e) }

// hash is of the digits rather than of the key that they are: of most tokens Check needs no
// key then.
func (d digits) hash() uint64 {
	return mix(mix(d.a^seed.a, d.b^seed.b)^mix(d.c^seed.c, d.d^seed.d), seed.e)
}

// marks are all entries. Check reads them while the one writer changes them.
type marks struct {
	issuers atomic.Pointer[issuerList]
	tenants set

	// The writer's own.
	listed bool // entries have records
	turn   struct{ set, table int }
	sets   []*set   // that of tenants, then those of each issuer
	names  []string // of the issuers, as their sets
	owned  []bool   // of the issuers: an entry came from the log, not only from ahead of it
}

// issuerList finds issuers by name: in a list of few, or in a hash table. A list is replaced, never
// changed. A table is replaced when it has become too small; until then chains get longer at their
// heads, so that readers need no lock and one more issuer costs no copy of the others.
type issuerList struct {
	few    []namedIssuer // all of them, if there are so few that to compare is faster than to hash
	chains []atomic.Pointer[chainedIssuer]
	n      int // how many there are; the writer's own
}

// fewIssuers is how many.
const fewIssuers = 8

// issuerSeed keeps those who choose issuers from choosing where they go.
var issuerSeed = maphash.MakeSeed()

type namedIssuer struct {
	name string
	*issuer
}

type chainedIssuer struct {
	namedIssuer
	next *chainedIssuer
}

type issuer struct {
	sets [ofIssuers]set
}

// find returns nil if there is none.
func (is *issuerList) find(name string) *issuer {
	for _, one := range is.few {
		if one.name == name {
			return one.issuer
		}
	}
	return is.hashed(name)
}

// hashed is find in a table. It is apart so that find is inlined.
func (is *issuerList) hashed(name string) *issuer {
	if is.chains == nil {
		return nil
	}
	for c := is.chain(name).Load(); c != nil; c = c.next {
		if c.name == name {
			return c.issuer
		}
	}
	return nil
}

// chain needs a table. The number of its chains is a power of two.
func (is *issuerList) chain(name string) *atomic.Pointer[chainedIssuer] {
	return &is.chains[maphash.String(issuerSeed, name)&uint64(len(is.chains)-1)]
}

// with is the list with one more: the same list, if that is a table with room.
func (is *issuerList) with(one namedIssuer) *issuerList {
	if is.n < fewIssuers {
		return &issuerList{few: append(is.few[:is.n:is.n], one), n: is.n + 1}
	}
	if is.n >= len(is.chains) {
		wider := &issuerList{chains: make([]atomic.Pointer[chainedIssuer], max(4*fewIssuers, 2*len(is.chains)))}
		is.each(wider.add)
		is = wider
	}
	is.add(one)
	return is
}

// add needs a table.
func (is *issuerList) add(one namedIssuer) {
	chain := is.chain(one.name)
	chain.Store(&chainedIssuer{one, chain.Load()})
	is.n++
}

// each may miss what is added meanwhile, and nothing else.
func (is *issuerList) each(f func(one namedIssuer)) {
	for _, one := range is.few {
		f(one)
	}
	for i := range is.chains {
		for c := is.chains[i].Load(); c != nil; c = c.next {
			f(c.namedIssuer)
		}
	}
}

func newMarks(listed bool) *marks {
	m := &marks{listed: listed}
	m.issuers.Store(new(issuerList))
	m.init(&m.tenants, tenants)
	return m
}

func (m *marks) init(s *set, c class) {
	s.class, s.timed, s.number = c, classes[c].kind.HasTime(), uint32(len(m.sets))
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
	all := m.issuers.Load()
	is := all.find(iss)
	if is == nil {
		is = new(issuer)
		for c := range ofIssuers {
			m.init(&is.sets[c], c)
		}
		m.names, m.owned = append(m.names, iss), append(m.owned, false)
		m.issuers.Store(all.with(namedIssuer{iss, is}))
	}
	return &is.sets[c]
}

// issuerOf is the issuer of a set, empty for that of tenants.
func (m *marks) issuerOf(s *set) string {
	if s.class == tenants {
		return ""
	}
	return m.names[s.issuer()]
}

// issuer is the index of a set's issuer, which tenants have none of.
func (s *set) issuer() uint32 { return (s.number - 1) / uint32(ofIssuers) }

// owns reports whether the log has, or had, entries of the issuer of a set.
func (m *marks) owns(s *set) bool { return m.owned[s.issuer()] }

// own notes that it has, and reports whether there are entries of the issuer already.
func (m *marks) own(s *set) (held bool) {
	n := s.issuer()
	m.owned[n] = true
	first := 1 + int(n)*int(ofIssuers)
	return slices.ContainsFunc(m.sets[first:first+int(ofIssuers)], func(s *set) bool { return s.n > 0 })
}

// ownAs notes of issuers what o knows of them.
func (m *marks) ownAs(o *marks) {
	for n, owned := range o.owned {
		if !owned {
			continue
		}
		if is := m.issuers.Load().find(o.names[n]); is != nil {
			m.own(&is.sets[0])
		}
	}
}

// disown takes back that the log has entries of an issuer.
func (m *marks) disown(iss string) {
	if is := m.issuers.Load().find(iss); is != nil {
		m.owned[is.sets[0].issuer()] = false
	}
}

func (m *marks) each(f func(iss string, s *set)) {
	f("", &m.tenants)
	m.issuers.Load().each(func(is namedIssuer) {
		for c := range is.sets {
			f(is.name, &is.sets[c])
		}
	})
}

// sweepSets is how many sets without entries a step of sweep passes at most.
const sweepSets = 100

// steps is in how many steps sweep comes around, at most.
func (m *marks) steps() int {
	n := len(m.sets)/sweepSets + 1
	for _, s := range m.sets {
		if dir := s.dir.Load(); dir != nil {
			n += len(dir.tables)
		}
	}
	return n
}

// sweep forgets what ended before cutoff in the next table, in turn.
func (m *marks) sweep(cutoff int64, drop func(record uint32)) {
	for range sweepSets {
		m.turn.set %= len(m.sets)
		s := m.sets[m.turn.set]
		dir := s.dir.Load()
		if dir == nil || m.turn.table >= len(dir.tables) {
			m.turn.set, m.turn.table = m.turn.set+1, 0
			continue
		}
		t := dir.tables[m.turn.table]
		m.turn.table += dir.span(t)
		if t.hasBefore(cutoff, s.stride) || t.sparse() {
			s.rebuild(m.turn.table-1, cutoff, drop)
		}
		return
	}
}

// set is the entries of one class of one issuer: an extendible hash table, so that it
// grows by one small table at a time.
type set struct {
	dir    atomic.Pointer[directory] // nil: empty
	class  class
	timed  bool
	number uint32 // in marks.sets
	stride int
	n      int // the writer's own
}

// directory has the table of an entry at the first depth bits of its hash. It is
// replaced, never changed.
type directory struct {
	depth  uint8
	tables []*table   // 1<<depth of them; one whose depth is less is there several times
	tags   [][]uint64 // of tables, to wait for memory once less
}

func newDirectory(depth uint8) *directory {
	return &directory{depth: depth, tables: make([]*table, 1<<depth), tags: make([][]uint64, 1<<depth)}
}

func (d *directory) put(i int, t *table) { d.tables[i], d.tags[i] = t, t.tags }

func (d *directory) index(hash uint64) int { return int(hash >> (64 - d.depth)) }
func (d *directory) span(t *table) int     { return 1 << (d.depth - t.depth) }

// mayHave reports whether there may be an entry of this hash. To most hashes that no entry has
// it says no.
func (d *directory) mayHave(hash uint64) bool {
	tags, tag := d.tags[d.index(hash)], tagOf(hash)*everyByte
	for g := groupOf(hash, tags); ; g++ {
		if g == len(tags) {
			g = 0
		}
		group := atomic.LoadUint64(&tags[g])
		if equalBytes(group, tag) != 0 {
			return true
		}
		if ^group&topBits != 0 {
			return false
		}
	}
}

// find returns the entry of k, none if there is none.
func (d *directory) find(hash uint64, k key, stride int) entry {
	n := d.index(hash)
	tags, tag := d.tags[n], tagOf(hash)*everyByte
	for g := groupOf(hash, tags); ; g++ {
		if g == len(tags) {
			g = 0
		}
		group := atomic.LoadUint64(&tags[g])
		for found := equalBytes(group, tag); found != 0; found &= found - 1 {
			if e := d.tables[n].slot(g, bits.TrailingZeros64(found)/8, stride); e.key() == k {
				return e
			}
		}
		if ^group&topBits != 0 {
			return nil
		}
	}
}

// equalBytes has the top bits of the bytes of a group that are the tag, and maybe of the one above
// such a byte, but never of an empty slot's.
func equalBytes(group, tag uint64) uint64 {
	x := group ^ tag // those become 0, and an empty slot's has its top bit set
	return (x - everyByte) &^ x & topBits
}

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
	wordEnd      = iota // exp; 0 in an empty slot
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

// newTable has room for that many entries.
func newTable(room int, depth uint8, stride int) *table {
	groups := room/groupMax + 1
	return &table{tags: make([]uint64, groups), words: make([]uint64, groups*groupSize*stride), depth: depth}
}

// withRoom is how much room a table gets for its entries: for a quarter more. Less would be
// copied more often, and more takes memory.
func withRoom(entries int) int { return entries + entries/4 }

func (t *table) room() int  { return groupMax * len(t.tags) }
func (t *table) full() bool { return t.n >= t.room() }

// sparse reports whether most of t is empty. One that became so as entries ended is not: it
// was rebuilt.
func (t *table) sparse() bool { return t.room() > 4*(t.n+groupMax) }

// The directory goes by the upper bits of a hash, the group by the lower half, the tag
// by what is in between.

func groupOf(hash uint64, tags []uint64) int {
	return int(uint64(uint32(hash)) * uint64(len(tags)) >> 32)
}
func tagOf(hash uint64) uint64 { return hash>>32&0x7f | 0x80 }

func (t *table) slot(group, i, stride int) entry {
	from := (group*groupSize + i) * stride
	return entry(t.words[from : from+stride : from+stride])
}

// vacant is the group and the slot for a new entry.
func (t *table) vacant(hash uint64) (g, i int) {
	g = groupOf(hash, t.tags)
	for t.tags[g]&topBits == topBits {
		if g++; g == len(t.tags) {
			g = 0
		}
	}
	return g, bits.TrailingZeros64(^t.tags[g]&topBits) / 8
}

// show makes an entry of what was written to a vacant slot.
func (t *table) show(hash uint64, g, i int) {
	atomic.StoreUint64(&t.tags[g], t.tags[g]|tagOf(hash)<<(8*i))
	t.n++
}

// take is show in a table that has no readers yet: the processor need not wait until the entry is
// written.
func (t *table) take(hash uint64, g, i int) {
	t.tags[g] |= tagOf(hash) << (8 * i)
	t.n++
}

// each may miss what is added meanwhile, and nothing else.
func (t *table) each(stride int, f func(e entry)) {
	for g := range t.tags {
		for used := atomic.LoadUint64(&t.tags[g]) & topBits; used != 0; used &= used - 1 {
			f(t.slot(g, bits.TrailingZeros64(used)/8, stride))
		}
	}
}

func (t *table) hasBefore(cutoff int64, stride int) bool {
	for i := wordEnd; i < len(t.words); i += stride {
		if end := int64(t.words[i]); end < cutoff && end != 0 {
			return true
		}
	}
	return false
}

// hash is that of the entry of k.
func (s *set) hash(k key) uint64 {
	if s.class == uuids {
		return k.digits().hash()
	}
	return k.hash()
}

// find returns the entry of k, none if there is none.
func (s *set) find(k key) entry {
	dir := s.dir.Load()
	if dir == nil {
		return nil
	}
	return dir.find(s.hash(k), k, s.stride)
}

// has reports whether an entry of k matches a token of iat at now.
func (s *set) has(k key, iat, now int64) bool {
	e := s.find(k)
	// Not exp+leeway: exp is from outside, and the sum could wrap around.
	return e.ok() && e.exp() >= now-leeway && (!s.timed || iat <= e.notAfter(s))
}

// matches reports whether an entry of value matches a token of iat at now. Most sets are
// empty, which takes no call.
func (s *set) matches(value string, iat, now int64) bool {
	return s.dir.Load() != nil && s.hasValue(value, iat, now)
}

func (s *set) hasValue(value string, iat, now int64) bool {
	return value != "" && len(value) <= maxID && s.has(hashedKey(s.class, value), iat, now)
}

func (is *issuer) matchesJTI(jti string, now int64) bool {
	all, others := is.sets[uuids].dir.Load(), is.sets[jtis].dir.Load()
	if text, form := uuidText(jti); form && (others != nil || all != nil && all.mayHave(text.hash())) {
		if k, ok := uuidKey(jti); ok {
			return is.sets[uuids].has(k, 0, now)
		}
	}
	return others != nil && is.sets[jtis].hasValue(jti, 0, now)
}

// each may miss what is added meanwhile, and nothing else.
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

// write is extend for a slot that no reader sees.
func (s *set) write(e entry, k key, exp, notAfter int64, record uint32) {
	e[wordEnd], e[wordKey], e[wordKey+1] = uint64(exp), k[0], k[1]
	if s.timed {
		e[wordNotAfter] = uint64(notAfter)
	}
	s.move(e, record)
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
	hash := s.hash(k)
	t := s.roomFor(hash, cutoff, drop)
	g, i := t.vacant(hash)
	s.write(t.slot(g, i, s.stride), k, exp, notAfter, record)
	t.show(hash, g, i)
	s.n++
}

// roomFor returns the table of a hash, with room for one more entry.
func (s *set) roomFor(hash uint64, cutoff int64, drop func(record uint32)) *table {
	for {
		dir := s.dir.Load()
		if dir == nil {
			dir = newDirectory(0)
			dir.put(0, newTable(0, 0, s.stride))
			s.dir.Store(dir)
		}
		i := dir.index(hash)
		if t := dir.tables[i]; !t.full() {
			return t
		}
		s.rebuild(i, cutoff, drop)
	}
}

// fillAtOnce is how many entries fill looks up side by side, so that memory is waited for
// once.
const fillAtOnce = 64

// fill adds entries, without records, to a set that has no readers.
func (s *set) fill(list []loaded) {
	var hashes [fillAtOnce]uint64
	for len(list) > 0 {
		some := list[:min(len(list), fillAtOnce)]
		list = list[len(some):]
		dir := s.dir.Load()
		for i := range some {
			hashes[i] = s.hash(some[i].key)
			if dir != nil {
				tags := dir.tags[dir.index(hashes[i])]
				atomic.LoadUint64(&tags[groupOf(hashes[i], tags)]) // fetches it
			}
		}
		for i := range some {
			s.fillOne(&some[i], hashes[i])
		}
	}
}

func (s *set) fillOne(from *loaded, hash uint64) {
	if from.exp <= 0 {
		return
	}
	t := s.roomFor(hash, dropNothing, nil)
	if e := s.dir.Load().find(hash, from.key, s.stride); e.ok() {
		e[wordEnd] = max(e[wordEnd], uint64(from.exp))
		if s.timed {
			e[wordNotAfter] = uint64(max(int64(e[wordNotAfter]), from.notAfter))
		}
		return
	}
	g, i := t.vacant(hash)
	s.write(t.slot(g, i, s.stride), from.key, from.exp, from.notAfter, 0)
	t.take(hash, g, i)
	s.n++
}

// reserve makes room in an empty set.
func (s *set) reserve(entries int) {
	depth := uint8(bits.Len(uint(entries / tableMax)))
	dir := newDirectory(depth)
	each := entries >> depth
	for i := range dir.tables {
		dir.put(i, newTable(each+each/10, depth, s.stride)) // they are not equally full
	}
	s.dir.Store(dir)
}

// rebuild replaces table i by one, or two, with room for more and without what ended
// before cutoff.
func (s *set) rebuild(i int, cutoff int64, drop func(record uint32)) {
	dir := s.dir.Load()
	old := dir.tables[i]
	var left [2]int // for each half, by the next bit of the hash
	half := func(hash uint64) uint64 { return hash >> (63 - old.depth) & 1 }
	hashes := make([]uint64, 0, old.n) // of those that stay
	old.each(s.stride, func(e entry) {
		if e.exp() < cutoff {
			drop(e.record(s))
			s.n--
			return
		}
		hash := s.hash(e.key())
		hashes = append(hashes, hash)
		left[half(hash)]++
	})
	if s.n == 0 {
		s.dir.Store(nil)
		return
	}
	split := left[0]+left[1] >= tableMax
	depth := dir.depth
	var halves [2]*table
	if split {
		depth = max(depth, old.depth+1)
		halves[0] = newTable(withRoom(left[0]), old.depth+1, s.stride)
		halves[1] = newTable(withRoom(left[1]), old.depth+1, s.stride)
	} else {
		halves[0] = newTable(withRoom(left[0]+left[1]), old.depth, s.stride)
		halves[1] = halves[0]
	}
	old.each(s.stride, func(e entry) {
		if e.exp() < cutoff {
			return
		}
		hash := hashes[0]
		hashes = hashes[1:]
		to := halves[half(hash)]
		g, i := to.vacant(hash)
		copy(to.slot(g, i, s.stride), e)
		to.take(hash, g, i)
	})
	next := newDirectory(depth)
	for j := range next.tables {
		t := dir.tables[j>>(depth-dir.depth)]
		switch {
		case t != old:
		case split:
			t = halves[j>>(depth-old.depth-1)&1]
		default:
			t = halves[0]
		}
		next.put(j, t)
	}
	s.dir.Store(next)
}
