package replica

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// A journal is a head and records. The head is a magic, the version of the form, the link
// to the journal before, and a byte that is not 0 if the journal lacks something. That is in the
// head because it can be changed there on a disk that is full. A record is a mark, the length and the CRC-32C of what follows, 4 bytes
// each, then a byte for its type and its members. The mark is there to find the next record
// after one that is damaged.
const (
	journalMagic   = "\x89RJRNL\r\n"
	journalVersion = 1
	journalHead    = len(journalMagic) + 1 + 8 + 8 + 1
	journalLacks   = journalHead - 1 // where the byte is

	recordMark = "\xa5Rj\x96"
	recordHead = len(recordMark) + 4 + 4
	// maxRecord is more than any event has, and a bound for what a damaged length may ask for.
	maxRecord = 128 << 10

	recordEvent   = 1
	recordRevoked = 2
	recordFresh   = 3
)

// link is a place in a journal: everything before it must be there for what follows to make
// sense.
type link struct {
	number int
	end    int64
}

// unlinked is followed by what makes sense only after the next snapshot.
var unlinked = link{number: math.MaxInt64}

func appendJournalHead(b []byte, follows link) []byte {
	b = append(append(b, journalMagic...), journalVersion)
	b = binary.LittleEndian.AppendUint64(b, uint64(follows.number))
	b = binary.LittleEndian.AppendUint64(b, uint64(follows.end))
	return append(b, 0)
}

// appendRecord appends a record of what what appends.
func appendRecord(b []byte, what func(b []byte) []byte) ([]byte, error) {
	from := len(b)
	b = what(append(append(b, recordMark...), make([]byte, recordHead-len(recordMark))...))
	payload := b[from+recordHead:]
	if len(payload) > maxRecord {
		return b[:from], fmt.Errorf("a record has %d bytes, must have at most %d", len(payload), maxRecord)
	}
	binary.LittleEndian.PutUint32(b[from+len(recordMark):], uint32(len(payload)))
	binary.LittleEndian.PutUint32(b[from+len(recordMark)+4:], crc32.Checksum(payload, castagnoli))
	return b, nil
}

// appendEvent appends what [State.Apply] needs of e.
func appendEvent(b []byte, e revocation.Event) []byte {
	b = appendPosition(append(b, recordEvent), e.Position)
	b = binary.AppendUvarint(b, uint64(e.Previous))
	b = binary.AppendVarint(b, e.Time.UnixMilli())
	b = appendText(b, e.Type)
	b = binary.AppendVarint(b, int64(e.Tenant.ID))
	b = appendText(b, e.Tenant.Domain)
	return append(b, e.Data...)
}

// appendRevoked appends what was revoked ahead of the log or, if missed, what was at or before the position
// and missing. That is told last, for programs that do not know it.
func appendRevoked(b []byte, rec Record, at revocation.Position, missed bool) []byte {
	b = appendPosition(append(b, recordRevoked), at)
	b = appendText(b, string(rec.Target.Kind))
	b = appendText(b, rec.Target.Iss)
	b = appendText(b, rec.Target.ID)
	digest := uint64(0)
	if rec.Target.Digest {
		digest = 1
	}
	b = binary.AppendUvarint(b, digest)
	b = binary.AppendVarint(b, rec.Exp)
	b = binary.AppendVarint(b, rec.NotAfter)
	if missed {
		b = append(b, 1)
	}
	return b
}

func appendFresh(b []byte, fresh time.Time, at revocation.Position) []byte {
	return binary.AppendVarint(appendPosition(append(b, recordFresh), at), fresh.UnixMilli())
}

func appendPosition(b []byte, p revocation.Position) []byte {
	return binary.AppendUvarint(appendText(b, string(p.Epoch)), uint64(p.Seq))
}

func (f *fields) varint() int64 { return unzigzag(f.uvarint()) }

func (f *fields) position() revocation.Position {
	return revocation.Position{Epoch: revocation.Epoch(f.text()), Seq: revocation.Seq(f.uvarint())}
}

// replay is what journals do to a state.
type replay struct {
	state *State
	base  int // the snapshot that was loaded; 0: none
	fresh time.Time
	// lost: something after the snapshot is missing.
	lost bool
	// chain is where what was read ends.
	chain link
}

// journal reads a journal. Its error says that it is damaged; the sound part of it counts.
// A record that is cut off at the end is no damage: that is how a process that ends leaves it.
func (r *replay) journal(n int, in io.Reader) error {
	b := bufio.NewReaderSize(in, recordHead+maxRecord)
	head, err := b.Peek(journalHead)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return err
	case err != nil && bytes.HasPrefix(appendJournalHead(nil, link{}), head[:min(len(head), len(journalMagic)+1)]):
		r.chain = link{number: n}
		return nil // it has no records
	case !strings.HasPrefix(string(head), journalMagic):
		return errors.New("it does not begin as a journal does")
	case head[len(journalMagic)] != journalVersion:
		return fmt.Errorf("it is of version %d, and this program reads version %d", head[len(journalMagic)], journalVersion)
	}
	numbers := head[len(journalMagic)+1:]
	follows := link{number: int(binary.LittleEndian.Uint64(numbers)), end: int64(binary.LittleEndian.Uint64(numbers[8:]))}
	if n >= r.base && head[journalLacks] != 0 || n > r.base && (follows.number != r.chain.number || follows.end > r.chain.end) {
		r.lost = true
	}
	r.chain = link{number: n, end: int64(journalHead)}
	_, _ = b.Discard(journalHead)
	return r.records(n, b)
}

// records reads records until the end.
func (r *replay) records(n int, b *bufio.Reader) error {
	var skipped int64 // bytes that were no record, since the last one
	var damaged error
	for {
		payload, err := peekRecord(b)
		switch {
		case err != nil && !errors.Is(err, io.EOF):
			return err
		case payload == nil:
			if k, err := b.Discard(1); k == 0 || err != nil {
				return damaged // what follows the last record is what a crash left
			}
			skipped++
			continue
		}
		if skipped > 0 {
			damaged = fmt.Errorf("%d bytes at %d are no record", skipped, r.chain.end)
			r.lost = true
			r.chain.end += skipped
			skipped = 0
		}
		r.record(n, payload)
		_, _ = b.Discard(recordHead + len(payload))
		r.chain.end += int64(recordHead + len(payload))
	}
}

// peekRecord returns what the next record has, nil if there is none right here. An error other
// than [io.EOF] is the reader's.
func peekRecord(b *bufio.Reader) ([]byte, error) {
	head, err := b.Peek(recordHead)
	if err != nil || string(head[:len(recordMark)]) != recordMark {
		return nil, err
	}
	size := binary.LittleEndian.Uint32(head[len(recordMark):])
	sum := binary.LittleEndian.Uint32(head[len(recordMark)+4:])
	if size > maxRecord {
		return nil, nil
	}
	all, err := b.Peek(recordHead + int(size))
	if err != nil {
		return nil, err
	}
	if payload := all[recordHead:]; crc32.Checksum(payload, castagnoli) == sum {
		return payload, nil
	}
	return nil, nil
}

// record does what a record of journal n says.
func (r *replay) record(n int, payload []byte) {
	if len(payload) == 0 {
		return
	}
	f := fields{left: payload[1:]}
	p := f.position()
	ok := true
	switch payload[0] {
	case recordEvent:
		ok = r.event(p, f)
	case recordRevoked:
		rec := Record{Target: revocation.Target{Kind: revocation.Kind(f.text()), Iss: f.text(), ID: f.text(), Digest: f.uvarint() == 1}}
		rec.Exp, rec.NotAfter = f.varint(), f.varint()
		switch ok = !f.bad; {
		case ok && len(f.left) > 0 && f.left[0] == 1:
			r.state.restore(rec)
		case ok:
			r.state.Revoke(rec, p)
		}
	case recordFresh:
		ms := f.varint()
		if r.lost || n < r.base {
			return // the snapshot knows better
		}
		if ok = !f.bad && r.state.Through(p) == nil; ok {
			r.fresh = time.UnixMilli(ms)
		}
	default:
		ok = false // of a later version
	}
	// What does not fit from before the snapshot is of an epoch that is over, or follows what was
	// missing then.
	r.lost = r.lost || !ok && n >= r.base
}

// event applies an event. One that does not fit is not lost if it revokes: what was known to be
// revoked stays so.
func (r *replay) event(p revocation.Position, f fields) (fits bool) {
	e := revocation.Event{Position: p, Previous: revocation.Seq(f.uvarint()), Time: time.UnixMilli(f.varint()), Type: f.text()}
	e.Tenant = revocation.Tenant{ID: int32(f.varint()), Domain: f.text()}
	e.Data = bytes.Clone(f.left) // entities may keep some of it
	if f.bad {
		return false
	}
	if r.state.Apply(e) == nil {
		return true
	}
	if rev, err := e.Revocation(); err == nil {
		r.state.Revoke(Record{Target: rev.Target, Tenant: rev.Tenant, Exp: rev.Exp, NotAfter: rev.NotAfter}, p)
	}
	return false
}
