package replica

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// SnapshotType is the media type of snapshots in the binary form, as GET /v1/snapshots/{kind}
// gives them to those who accept it, and as replicas keep them on disk. The form is described in
// api/snapshot.md.
const SnapshotType = "application/vnd.rescind.snapshot.v1"

// SnapshotHeader is what a binary snapshot begins with.
type SnapshotHeader struct {
	revocation.Position
	// Kind is the last segment of the snapshot's path, for example "all".
	Kind string
	// Tenants are the domains of those that it is about. Nil: all there are.
	Tenants []string
	// Entries is about how many revocations follow, so that room can be made. It may be 0.
	Entries int
}

// The kinds of snapshots that states are loaded from.
const (
	kindAll         = "all"
	kindRevocations = "revocations"
)

const (
	// snapshotMagic has a byte that is no text and both line ends, so that what passes for
	// text on its way is noticed at once.
	snapshotMagic = "\x89RSNAP\r\n"
	snapshotMajor = 1
	snapshotMinor = 0

	// maxBlock bounds what a reader holds: the bytes of a block after its length.
	maxBlock = 64 << 10
	// maxTenants and maxSets bound what it holds of blocks that may be as small as some bytes.
	maxTenants = 1 << 20
	maxSets    = 1 << 20
)

// The types of blocks. A reader may skip those from optional on.
const (
	blockHeader      = 1
	blockTenant      = 2
	blockSet         = 3
	blockRevocations = 4
	blockEntity      = 5
	blockEnd         = 6
	optional         = 0x80

	// Of states that are kept; services do not send them.
	blockFresh  = 0x80
	blockTold   = 0x81
	blockChange = 0x82
	blockAside  = 0x83
)

// setClasses are the classes of sets by their number in a snapshot.
var setClasses = [...]class{
	1: signingKeys, 2: uuids, 3: jtis, 4: digests, 5: sessions, 6: clients, 7: subjects, 8: tenants,
}

// setNumbers is setClasses the other way around.
var setNumbers = func() (numbers [len(classes)]byte) {
	for number, c := range setClasses {
		if number > 0 {
			numbers[c] = byte(number)
		}
	}
	return numbers
}()

// headerTenants is the flag of a snapshot that is about some tenants only.
const headerTenants = 1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

const (
	// blockFill is how many bytes of a set's revocations are written at a time, about 900.
	// More would save less than a hundredth.
	blockFill = 16 << 10
	// maxHeld bounds the bytes that wait for more of their set, of all sets.
	maxHeld = 1 << 20
	// maxEntry is the most that a revocation takes.
	maxEntry = len(key{})*8 + 2*binary.MaxVarintLen64
)

// SnapshotEncoder makes the binary form of a snapshot, in pieces that are appended to the
// caller's buffers: the header, then revocations and entities in any order, then the end. It
// is for one goroutine. It holds 1 MiB at most, however many issuers there are.
type SnapshotEncoder struct {
	header SnapshotHeader
	sum    uint32 // of everything that was appended

	names map[setName]*openSet
	sets  []*openSet // by number
	last  *openSet   // of the revocation before: most are of the same
	held  int
	about map[setName]int // see Expect

	revocations, entities uint64
	scratch               bytes.Buffer
}

type setName struct {
	class class
	iss   string
}

// openSet is a set of which some revocations were not appended yet.
type openSet struct {
	name          setName
	number        int
	timed         bool
	entries       []byte
	exp, notAfter int64 // of the last of entries
}

// NewSnapshotEncoder returns an encoder for one snapshot.
func NewSnapshotEncoder(h SnapshotHeader) *SnapshotEncoder {
	return &SnapshotEncoder{header: h, names: make(map[setName]*openSet)}
}

// AppendHeader appends what comes first.
func (e *SnapshotEncoder) AppendHeader(b []byte) []byte {
	from := len(b)
	b = append(append(b, snapshotMagic...), snapshotMajor, snapshotMinor)
	flags := uint64(0)
	if e.header.Tenants != nil {
		flags = headerTenants
	}
	p := appendText(e.scratch.AvailableBuffer(), string(e.header.Epoch))
	p = binary.AppendUvarint(p, uint64(e.header.Seq))
	p = appendText(p, e.header.Kind)
	p = binary.AppendUvarint(p, flags)
	p = binary.AppendUvarint(p, uint64(max(e.header.Entries, 0)))
	b = appendBlock(b, blockHeader, p)
	for _, domain := range e.header.Tenants {
		b = appendBlock(b, blockTenant, []byte(domain))
	}
	return e.appended(b, from)
}

// Expect counts what all has, so that each set begins with how many revocations it will have:
// then a reader makes room at once, which takes half as long as to grow. Fewer may come.
func (e *SnapshotEncoder) Expect(all Revocations) {
	e.about = all.count()
}

// appended notes that b is new from there on.
func (e *SnapshotEncoder) appended(b []byte, from int) []byte {
	e.sum = crc32.Update(e.sum, castagnoli, b[from:])
	return b
}

func appendText(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendBlock(b []byte, typ byte, payload []byte) []byte {
	return append(binary.AppendUvarint(append(b, typ), uint64(len(payload))), payload...)
}

// AppendRevocation appends rec, whose target must be valid, or keeps it until there are more
// of its issuer and kind. What has no end later than 1970 matches nothing, and is left out.
func (e *SnapshotEncoder) AppendRevocation(b []byte, rec Record) []byte {
	if rec.Exp <= 0 {
		return b
	}
	c, k := keyOf(rec.Target)
	b, s := e.set(b, setName{c, rec.Target.Iss})
	return e.add(b, s, k, rec.Exp, rec.NotAfter)
}

// set returns the set of a name, and appends what defines it if it is new.
func (e *SnapshotEncoder) set(b []byte, name setName) ([]byte, *openSet) {
	if e.last != nil && e.last.name == name {
		return b, e.last
	}
	s, ok := e.names[name]
	if !ok {
		name.iss = strings.Clone(name.iss)
		s = &openSet{name: name, number: len(e.sets), timed: classes[name.class].kind.HasTime()}
		e.names[name] = s
		e.sets = append(e.sets, s)
		p := append(e.scratch.AvailableBuffer(), setNumbers[name.class])
		p = appendText(p, name.iss)
		from := len(b)
		b = e.appended(appendBlock(b, blockSet, binary.AppendUvarint(p, uint64(e.about[name]))), from)
	}
	e.last = s
	return b, s
}

// add appends a revocation of s, or keeps it.
func (e *SnapshotEncoder) add(b []byte, s *openSet, k key, exp, notAfter int64) []byte {
	if len(s.entries)+maxEntry > cap(s.entries) {
		b = e.grow(b, s)
	}
	p := binary.BigEndian.AppendUint64(s.entries, k[0])
	p = binary.BigEndian.AppendUint64(p, k[1])
	p = binary.AppendUvarint(p, zigzag(exp-s.exp))
	if s.timed {
		p = binary.AppendUvarint(p, zigzag(notAfter-s.notAfter))
	}
	s.entries, s.exp, s.notAfter = p, exp, notAfter
	e.revocations++
	if len(p) >= blockFill {
		b = e.flush(b, s)
	}
	return b
}

// grow gives s room for one more, and appends what all sets hold if it is too much.
func (e *SnapshotEncoder) grow(b []byte, s *openSet) []byte {
	size := min(max(2*cap(s.entries), 8*maxEntry), blockFill+maxEntry)
	if e.held+size-cap(s.entries) > maxHeld {
		for _, s := range e.sets {
			b = e.flush(b, s)
			s.entries = nil
		}
		e.held, size = 0, 8*maxEntry
	}
	e.held += size - cap(s.entries)
	s.entries = append(make([]byte, 0, size), s.entries...)
	return b
}

// flush appends what s holds.
func (e *SnapshotEncoder) flush(b []byte, s *openSet) []byte {
	if len(s.entries) == 0 {
		return b
	}
	from := len(b)
	var number [binary.MaxVarintLen64]byte
	n := binary.PutUvarint(number[:], uint64(s.number))
	b = binary.AppendUvarint(append(b, blockRevocations), uint64(n+len(s.entries)))
	b = append(append(b, number[:n]...), s.entries...)
	s.entries, s.exp, s.notAfter = s.entries[:0], 0, 0
	return e.appended(b, from)
}

// zigzag makes small numbers of either sign small.
func zigzag(n int64) uint64   { return uint64(n)<<1 ^ uint64(n>>63) }
func unzigzag(u uint64) int64 { return int64(u>>1) ^ -int64(u&1) }

// AppendEntity appends an entity of the catalog.
func (e *SnapshotEncoder) AppendEntity(b []byte, entity catalog.Entity) ([]byte, error) {
	b, err := e.appendEntity(b, blockEntity, nil, entity)
	if err == nil {
		e.entities++
	}
	return b, err
}

// appendEntity appends a block with an entity, after first.
func (e *SnapshotEncoder) appendEntity(b []byte, typ byte, first []byte, entity catalog.Entity) ([]byte, error) {
	from, noun := len(b), string(entity.Noun())
	e.scratch.Reset()
	e.scratch.Write(first)
	e.scratch.Write(appendText(e.scratch.AvailableBuffer(), noun))
	enc := json.NewEncoder(&e.scratch)
	enc.SetEscapeHTML(false) // as in events
	if err := enc.Encode(entity); err != nil {
		return b, fmt.Errorf("encode %s %s: %w", noun, entity.Base().UUID, err)
	}
	payload := e.scratch.Bytes()
	payload = payload[:len(payload)-1] // without the encoder's line end
	if len(payload) > maxBlock {
		return b, fmt.Errorf("encode %s %s: %d bytes, must be at most %d", noun, entity.Base().UUID, len(payload), maxBlock)
	}
	return e.appended(appendBlock(b, typ, payload), from), nil
}

// appendFresh appends when the state was known to have everything.
func (e *SnapshotEncoder) appendFresh(b []byte, fresh time.Time) []byte {
	from := len(b)
	p := binary.AppendUvarint(e.scratch.AvailableBuffer(), uint64(fresh.UnixMilli()))
	return e.appended(appendBlock(b, blockFresh, p), from)
}

// appendLate appends what [part] knows of after the position.
func (e *SnapshotEncoder) appendLate(b []byte, last map[string]revocation.Seq, changes []lateChange) ([]byte, error) {
	from := len(b)
	for domain, seq := range last {
		b = appendBlock(b, blockTold, append(binary.AppendUvarint(nil, uint64(seq)), domain...))
	}
	b = e.appended(b, from)
	for _, c := range changes {
		first := binary.AppendUvarint(nil, uint64(c.seq))
		first = appendText(first, string(c.Verb))
		var err error
		if b, err = e.appendEntity(b, blockChange, first, c.Entity); err != nil {
			return b, err
		}
	}
	return b, nil
}

// appendAside appends the issuers of which there is something beside the log only, see content.counts.
func (e *SnapshotEncoder) appendAside(b []byte, issuers []string) []byte {
	from := len(b)
	for _, iss := range issuers {
		b = appendBlock(b, blockAside, []byte(iss))
	}
	return e.appended(b, from)
}

// AppendEnd appends what was kept, and the checksum by which a reader knows that it has all.
func (e *SnapshotEncoder) AppendEnd(b []byte) []byte {
	for _, s := range e.sets {
		b = e.flush(b, s)
	}
	from := len(b)
	p := binary.AppendUvarint(e.scratch.AvailableBuffer(), e.revocations)
	p = binary.AppendUvarint(p, e.entities)
	b = binary.AppendUvarint(append(b, blockEnd), uint64(len(p)+crc32.Size))
	b = e.appended(append(b, p...), from)
	return binary.LittleEndian.AppendUint32(b, e.sum)
}

// ReadSnapshot is [State.Load] of a binary snapshot. Nothing is changed unless r has all of
// it, undamaged, and ends there. It holds no more of it at a time than a block, of 64 KiB at most,
// beside what the state becomes.
//
// Snapshots of other kinds than "all" and "revocations" have no revocations: they are loaded only
// into a state that has nothing, since one that goes on from there would lack what was revoked
// before. A state with [StateConfig.Records] cannot be loaded from what has no identifiers.
func (s *State) ReadSnapshot(r io.Reader) (SnapshotHeader, error) {
	h, _, err := s.readSnapshot(r)
	return h, err
}

// readSnapshot is ReadSnapshot. Fresh is what [State.writeSnapshot] was told, zero if that
// was nothing.
func (s *State) readSnapshot(r io.Reader) (h SnapshotHeader, fresh time.Time, err error) {
	d := &snapshotDecoder{r: bufio.NewReaderSize(r, maxBlock)}
	if err = d.readHeader(); err == nil {
		err = s.Load(d.header.Position, func(l *Loader) error {
			if d.header.Kind != kindAll && d.header.Kind != kindRevocations && s.At() != (revocation.Position{}) {
				return fmt.Errorf("it is of kind %q, which has no revocations", d.header.Kind)
			}
			return d.readContent(l)
		})
	}
	if err != nil {
		return SnapshotHeader{}, time.Time{}, fmt.Errorf("read snapshot: %w", err)
	}
	return d.header, d.fresh, nil
}

// snapshotDecoder reads what may be damaged, or made to do harm: what it holds is bounded by
// what it has read, whatever that says of what is to come.
type snapshotDecoder struct {
	r      *bufio.Reader
	sum    uint32 // of what was read, but for the last bytes of the end
	header SnapshotHeader
	fresh  time.Time
	late   part // what of it is after the position
	aside  []string

	payload               []byte // of the block
	sets                  []announced
	batch                 []loaded
	revocations, entities uint64
}

// announced is a set by its number, and how many revocations it is said to have.
type announced struct {
	setName
	about int
}

// block reads the next block into d.payload. A reader of blocks wants all of them: the end of
// the input is an error.
func (d *snapshotDecoder) block() (typ byte, err error) {
	var head [1 + binary.MaxVarintLen64]byte
	n := 0
	for n < 2 || head[n-1] >= 0x80 {
		if n == len(head) {
			return 0, errors.New("a block's length is no number")
		}
		if head[n], err = d.r.ReadByte(); err != nil {
			return 0, brokenOff(err)
		}
		n++
	}
	typ = head[0]
	size, got := binary.Uvarint(head[1:n])
	if got <= 0 || size > maxBlock {
		return 0, fmt.Errorf("a block of type %d has more than %d bytes", typ, maxBlock)
	}
	if d.payload == nil {
		d.payload = make([]byte, maxBlock)
	}
	d.payload = d.payload[:size]
	if _, err := io.ReadFull(d.r, d.payload); err != nil {
		return 0, brokenOff(err)
	}
	d.sum = crc32.Update(d.sum, castagnoli, head[:n])
	summed := d.payload
	if typ == blockEnd {
		summed = summed[:max(0, len(summed)-crc32.Size)]
	}
	d.sum = crc32.Update(d.sum, castagnoli, summed)
	return typ, nil
}

// brokenOff says what an end of the input means that is none of the snapshot.
func brokenOff(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("it breaks off: %w", io.ErrUnexpectedEOF)
	}
	return err
}

// fields reads what a block consists of.
type fields struct {
	left []byte
	bad  bool // there was less than was asked for
}

func (f *fields) uvarint() uint64 {
	v, n := binary.Uvarint(f.left)
	if n <= 0 {
		f.left, f.bad = nil, true
		return 0
	}
	f.left = f.left[n:]
	return v
}

func (f *fields) text() string {
	n := f.uvarint()
	if n > uint64(len(f.left)) {
		f.left, f.bad = nil, true
		return ""
	}
	s := string(f.left[:n])
	f.left = f.left[n:]
	return s
}

// seq is a uvarint that is one.
func (f *fields) seq() revocation.Seq {
	v := f.uvarint()
	f.bad = f.bad || v > math.MaxInt64
	return revocation.Seq(v)
}

// count is a uvarint that is no more than room is made for.
func (f *fields) count() int { return int(min(f.uvarint(), 1<<31-1)) }

func (d *snapshotDecoder) readHeader() error {
	var begin [len(snapshotMagic) + 2]byte
	if _, err := io.ReadFull(d.r, begin[:]); err != nil {
		return brokenOff(err)
	}
	if string(begin[:len(snapshotMagic)]) != snapshotMagic {
		return errors.New("this is no snapshot")
	}
	if major := begin[len(snapshotMagic)]; major != snapshotMajor {
		return fmt.Errorf("it is of version %d, and this program reads version %d", major, snapshotMajor)
	}
	d.sum = crc32.Update(d.sum, castagnoli, begin[:])
	typ, err := d.block()
	if err != nil {
		return err
	}
	if typ != blockHeader {
		return errors.New("it does not begin with a header")
	}
	f := fields{left: d.payload}
	h := &d.header
	h.Epoch = revocation.Epoch(f.text())
	h.Seq = f.seq()
	h.Kind = f.text()
	if f.uvarint()&headerTenants != 0 {
		h.Tenants = []string{}
	}
	h.Entries = f.count()
	_, isUUID := uuidKey(string(h.Epoch))
	if f.bad || !isUUID || h.Kind == "" || strings.Trim(h.Kind, "abcdefghijklmnopqrstuvwxyz-") != "" {
		return errors.New("its header is not well-formed")
	}
	return nil
}

func (d *snapshotDecoder) readContent(l *Loader) error {
	for {
		typ, err := d.block()
		if err != nil {
			return err
		}
		if err := d.read(typ, l); err != nil {
			return fmt.Errorf("block of type %d: %w", typ, err)
		}
		if typ != blockEnd {
			continue
		}
		switch _, err := d.r.ReadByte(); {
		case err == nil:
			return errors.New("something follows its end")
		case err != io.EOF:
			return err
		}
		if d.header.Tenants != nil {
			l.Tenants(d.header.Tenants)
		}
		if d.header.Kind == kindRevocations {
			l.RevocationsOnly()
		}
		if p := l.content.part; p != nil {
			maps.Copy(p.last, d.late.last)
			p.changes = d.late.changes
		}
		for _, iss := range d.aside {
			l.content.marks.disown(iss)
		}
		return nil
	}
}

// errMalformed is of a block that has too little or too much in it.
var errMalformed = errors.New("it is not well-formed")

// read reads what a block has.
func (d *snapshotDecoder) read(typ byte, l *Loader) error {
	f := fields{left: d.payload}
	switch typ {
	case blockTenant:
		domain := string(d.payload)
		if d.header.Tenants == nil || !catalog.ValidDomain(domain) {
			return errMalformed
		}
		if len(d.header.Tenants) == maxTenants {
			return fmt.Errorf("it is about more than %d tenants", maxTenants)
		}
		d.header.Tenants = append(d.header.Tenants, domain)
	case blockSet:
		return d.readSet(f)
	case blockRevocations:
		return d.readRevocations(f, l)
	case blockEntity:
		return d.readEntity(f, l)
	case blockEnd:
		revocations, entities := f.uvarint(), f.uvarint()
		switch {
		case f.bad || len(f.left) != crc32.Size:
			return errMalformed
		case binary.LittleEndian.Uint32(f.left) != d.sum:
			return errors.New("the checksum is not that of what was read")
		case revocations != d.revocations || entities != d.entities:
			return fmt.Errorf("it ends after %d revocations and %d entities, and there were %d and %d",
				revocations, entities, d.revocations, d.entities)
		}
	case blockFresh:
		ms := f.uvarint()
		if f.bad || ms > math.MaxInt64 {
			return errMalformed
		}
		d.fresh = time.UnixMilli(int64(ms))
	case blockTold:
		seq := f.seq()
		if f.bad || seq <= d.header.Seq || len(f.left) == 0 {
			return errMalformed
		}
		if len(d.late.last) == maxTenants {
			return fmt.Errorf("it is about more than %d tenants", maxTenants)
		}
		if d.late.last == nil {
			d.late.last = make(map[string]revocation.Seq)
		}
		d.late.last[string(f.left)] = seq
	case blockChange:
		seq, verb := f.seq(), f.text()
		if f.bad || seq <= d.header.Seq {
			return errMalformed
		}
		c, err := f.entity(catalog.Verb(verb))
		if err != nil {
			return err
		}
		if c.Entity != nil {
			d.late.changes = append(d.late.changes, lateChange{seq, c})
		}
	case blockAside:
		if len(d.aside) == maxSets {
			return fmt.Errorf("it has more than %d issuers", maxSets)
		}
		d.aside = append(d.aside, string(d.payload))
	default:
		if typ < optional {
			return errors.New("this program does not know it, and it may not be skipped")
		}
	}
	return nil
}

func (d *snapshotDecoder) readSet(f fields) error {
	if len(f.left) == 0 {
		return errMalformed
	}
	number := int(f.left[0])
	f.left = f.left[1:]
	name := setName{iss: f.text()}
	about := f.count()
	if f.bad {
		return errMalformed
	}
	if number == 0 || number >= len(setClasses) {
		return fmt.Errorf("this program does not know revocations of class %d", number)
	}
	name.class = setClasses[number]
	any := revocation.Target{Kind: classes[name.class].kind, Iss: name.iss, ID: "any"}
	if err := any.Validate(); err != nil {
		return err
	}
	if len(d.sets) == maxSets {
		return fmt.Errorf("it has more than %d sets", maxSets)
	}
	d.sets = append(d.sets, announced{name, about})
	return nil
}

func (d *snapshotDecoder) readRevocations(f fields, l *Loader) error {
	number := f.uvarint()
	if f.bad || number >= uint64(len(d.sets)) {
		return errors.New("it is of a set that is not defined")
	}
	set := d.sets[number]
	timed := classes[set.class].kind.HasTime()
	batch, p := d.batch[:0], f.left
	var exp, notAfter int64
	for len(p) > 0 {
		const keySize = len(key{}) * 8
		if len(p) < keySize {
			return errMalformed
		}
		k := key{binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])}
		p = p[keySize:]
		step, n := binary.Uvarint(p)
		if n <= 0 {
			return errMalformed
		}
		p = p[n:]
		exp += unzigzag(step)
		if timed {
			if step, n = binary.Uvarint(p); n <= 0 {
				return errMalformed
			}
			p = p[n:]
			notAfter += unzigzag(step)
		}
		if exp <= 0 {
			return errors.New("a revocation has no end")
		}
		batch = append(batch, loaded{key: k, exp: exp, notAfter: notAfter})
	}
	d.batch = batch
	d.revocations += uint64(len(batch))
	l.entries(set.iss, set.class, batch, set.about)
	return nil
}

func (d *snapshotDecoder) readEntity(f fields, l *Loader) error {
	if d.header.Kind == kindRevocations {
		return errors.New("an entity is in a snapshot of revocations")
	}
	c, err := f.entity(catalog.Updated)
	if err != nil {
		return err
	}
	d.entities++
	if c.Entity != nil {
		l.Entity(c.Entity)
	}
	return nil
}

// entity reads the rest: a change of an entity, of none if the noun is not known. That is
// as with its events.
func (f *fields) entity(verb catalog.Verb) (catalog.Change, error) {
	noun := f.text()
	if f.bad {
		return catalog.Change{}, errMalformed
	}
	e := revocation.Event{Type: noun + "." + string(verb), Data: f.left}
	if !catalog.IsChange(e.Type) {
		return catalog.Change{}, nil
	}
	c, err := catalog.ParseChange(e)
	if err != nil {
		return catalog.Change{}, fmt.Errorf("%s: %w", noun, err)
	}
	return c, nil
}

// WriteSnapshot writes the state in the binary form: one of kind "all", or "revocations" if it
// has no more than these. Events wait only while the lists of the catalog are copied; those that
// are applied meanwhile may be among the revocations, and the position is that before. What
// holds ahead of the log is among them too. It returns the position, and an error if nothing was
// loaded yet.
func (s *State) WriteSnapshot(w io.Writer) (revocation.Position, error) {
	at, _, err := s.writeSnapshot(w, time.Time{})
	return at, err
}

// writeSnapshot is WriteSnapshot. Fresh is when the state was known to have everything, zero if
// it was not. Loads is [View.Loads].
func (s *State) writeSnapshot(w io.Writer, fresh time.Time) (at revocation.Position, loads uint64, err error) {
	h := SnapshotHeader{Kind: kindAll}
	var entities []catalog.Entity
	var late part
	type source struct {
		setName
		set *set
	}
	var sets []source
	var aside []string
	about := make(map[setName]int)
	s.View(func(v *View) {
		h.Position, loads = v.At(), v.Loads()
		if p := v.content.part; p != nil {
			if p.revocationsOnly {
				h.Kind = kindRevocations
			}
			if p.tenants != nil {
				h.Tenants = slices.AppendSeq([]string{}, maps.Keys(p.tenants))
				slices.Sort(h.Tenants)
			}
			late = part{last: maps.Clone(p.last), changes: slices.Clone(p.changes)}
			for n, owned := range v.content.marks.owned {
				if !owned && p.tenants != nil {
					aside = append(aside, v.content.marks.names[n])
				}
			}
		}
		if h.Kind == kindAll {
			entities = v.entities()
		}
		v.content.marks.each(func(iss string, set *set) {
			if set.n > 0 {
				name := setName{set.class, iss}
				sets = append(sets, source{name, set})
				about[name] = set.n
				h.Entries += set.n
			}
		})
	})
	if h.Position == (revocation.Position{}) {
		return h.Position, loads, errors.New("write snapshot: nothing was loaded yet")
	}
	e := NewSnapshotEncoder(h)
	e.about = about
	b := e.AppendHeader(make([]byte, 0, maxBlock+2*blockFill))
	spill := func(least int) {
		if len(b) < least {
			return
		}
		if err == nil {
			_, err = w.Write(b)
		}
		b = b[:0]
	}
	for _, from := range sets {
		var to *openSet
		b, to = e.set(b, from.setName)
		from.set.each(func(en entry) {
			b = e.add(b, to, en.key(), en.exp(), en.notAfter(from.set))
			spill(maxBlock)
		})
	}
	for _, entity := range entities {
		if err != nil {
			break
		}
		if b, err = e.AppendEntity(b, entity); err == nil {
			spill(maxBlock)
		}
	}
	if err == nil {
		b, err = e.appendLate(b, late.last, late.changes)
	}
	b = e.appendAside(b, aside)
	if !fresh.IsZero() {
		b = e.appendFresh(b, fresh)
	}
	b = e.AppendEnd(b)
	if spill(0); err != nil {
		return h.Position, loads, fmt.Errorf("write snapshot: %w", err)
	}
	return h.Position, loads, nil
}

// entities are all of the catalog, each after those that it refers to.
func (v *View) entities() (all []catalog.Entity) {
	s := v.content.shelves
	all = appendEntities(all, s.tenants.sorted)
	all = appendEntities(all, s.keyManagers.sorted)
	all = appendEntities(all, s.policies.sorted)
	all = appendEntities(all, s.scopes.sorted)
	all = appendEntities(all, s.apis.sorted)
	all = appendEntities(all, s.applications.sorted)
	all = appendEntities(all, s.keyMappings.sorted)
	return appendEntities(all, s.subscriptions.sorted)
}

// count is how many there are of each set, ended ones included.
func (s Revocations) count() map[setName]int {
	n := make([][len(classes)]int, len(s.issuers))
	count := func(records []record) {
		for i := range records {
			if r := &records[i]; r.died.Load() == 0 {
				n[r.iss][r.class]++
			}
		}
	}
	for _, c := range s.closed {
		count(c.records[:])
	}
	if s.open != nil {
		count(s.open.records[:s.used])
	}
	all := make(map[setName]int)
	for iss := range n {
		for c, n := range n[iss] {
			if n > 0 {
				all[setName{class(c), s.issuers[iss]}] = n
			}
		}
	}
	return all
}

func appendEntities[E entity](all []catalog.Entity, list []E) []catalog.Entity {
	for _, e := range list {
		all = append(all, e)
	}
	return all
}
