package eventhub

import (
	"bytes"
	"container/list"
	"context"
	"encoding/binary"
	"encoding/json"
	"hash/maphash"
	"io"
	"strconv"
	"sync"

	"github.com/klauspost/compress/gzip"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// listing is what a list has at one position.
type listing struct {
	at  revocation.Position
	sum uint64 // of the entities and their timestamps
	// bare is an array in place of an object with count and list.
	bare bool
	len  int
	rows func(add func(row any))
}

// encode returns l as JSON, in which nothing is null. about is how long it may be.
func (l listing) encode(about int) []byte {
	var b bytes.Buffer
	b.Grow(about)
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if !l.bare {
		b.WriteString(`{"count":` + strconv.Itoa(l.len) + `,"list":`)
	}
	b.WriteByte('[')
	if l.rows != nil {
		first := true
		l.rows(func(row any) {
			if !first {
				b.WriteByte(',')
			}
			first = false
			if err := enc.Encode(row); err != nil {
				panic(err) // rows have texts, numbers and what was JSON before
			}
			b.Truncate(b.Len() - 1) // the encoder ends lines
		})
	}
	b.WriteByte(']')
	if !l.bare {
		b.WriteByte('}')
	}
	return b.Bytes()
}

// sum adds up entities: each change of one gives it another timestamp, so equal sums
// are of equal entities.
type sum struct{ hash maphash.Hash }

var sumSeed = maphash.MakeSeed()

func newSum() *sum {
	var s sum
	s.hash.SetSeed(sumSeed)
	return &s
}

func (s *sum) add(m *catalog.Meta) {
	var b [12]byte
	binary.LittleEndian.PutUint32(b[:], uint32(m.ID))
	binary.LittleEndian.PutUint64(b[4:], uint64(m.Timestamp))
	_, _ = s.hash.Write(b[:]) // never fails
}

func (s *sum) value() uint64 { return s.hash.Sum64() }

// lists keeps encoded lists, those that were asked for last, so that a thousand
// gateways that start at once are encoded for once.
type lists struct {
	limit    int
	encoding func(context.Context) (done func(), err error)
	metrics  *metrics

	mu     sync.Mutex
	byKey  map[string]*encoded
	recent *list.List // of *encoded, the one asked for last in front
	bytes  int
}

// encoded is a list. Its turn is taken by who brings it up to date, and guards what
// follows.
type encoded struct {
	turn    chan struct{}
	listing listing // without rows
	plain   *body   // nil before the first time
	packed  *body   // plain in gzip; nil until someone asks, and for what is small

	key  string
	size int           // as counted in lists.bytes; guarded by lists.mu
	elem *list.Element // nil once it is forgotten; guarded by lists.mu
}

func newLists(limit int, encoding func(context.Context) (func(), error), m *metrics) *lists {
	return &lists{limit: limit, encoding: encoding, metrics: m, byKey: make(map[string]*encoded), recent: list.New()}
}

// minPacked is the least that is worth a content coding.
const minPacked = 1 << 10

// get returns the list of key as it was at head or later, and with packed in gzip too
// if it is large enough. take takes it from the state. What is returned is shared. An
// empty list is not kept: what is not there has any number of names.
func (c *lists) get(ctx context.Context, key string, head revocation.Position, packed bool, take func() listing) (*body, *body, error) {
	e := c.find(key)
	select {
	case e.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	defer func() { <-e.turn }()
	stale := e.plain == nil || e.listing.at.Epoch != head.Epoch || e.listing.at.Seq < head.Seq
	if stale || packed && e.packed == nil && len(e.plain.bytes) >= minPacked {
		done, err := c.encoding(ctx)
		if err != nil {
			return nil, nil, err
		}
		defer done()
	}
	result := listShared
	if stale {
		l := take()
		if e.plain == nil || e.listing.at.Epoch != l.at.Epoch || e.listing.sum != l.sum || e.listing.len != l.len {
			e.plain, e.packed = &body{bytes: l.encode(minPacked)}, nil
			result = listEncoded
		}
		l.rows = nil // holds the entities
		e.listing = l
	}
	c.metrics.lists.WithLabelValues(result).Inc()
	size := len(e.plain.bytes)
	if packed && e.packed == nil && size >= minPacked {
		e.packed = &body{bytes: pack(e.plain.bytes)}
	}
	if e.packed != nil {
		size += len(e.packed.bytes)
	}
	c.keep(e, size, e.listing.len > 0)
	return e.plain, e.packed, nil
}

func (c *lists) find(key string) *encoded {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.byKey[key]
	if e == nil {
		e = &encoded{turn: make(chan struct{}, 1), key: key, size: len(key) + entryBytes}
		c.bytes += e.size
		e.elem = c.recent.PushFront(e)
		c.byKey[key] = e
	}
	c.recent.MoveToFront(e.elem)
	return e
}

// entryBytes is about what a list costs beside its bytes and its key.
const entryBytes = 512

// keep counts e's bytes, and forgets what was not asked for longest while there are
// too many. It forgets e if it is not worth keeping.
func (c *lists) keep(e *encoded, size int, worth bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.elem == nil {
		return // forgotten meanwhile
	}
	size += len(e.key) + entryBytes
	c.bytes += size - e.size
	e.size = size
	if !worth {
		c.forget(e)
	}
	for c.bytes > c.limit {
		c.forget(c.recent.Back().Value.(*encoded))
	}
}

// forget needs c.mu.
func (c *lists) forget(e *encoded) {
	c.recent.Remove(e.elem)
	delete(c.byKey, e.key)
	c.bytes -= e.size
	e.elem = nil
}

func (c *lists) held() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}

// pack is b in gzip, fast rather than small.
func pack(b []byte) []byte {
	var out bytes.Buffer
	w := newGzip(&out)
	_, _ = w.Write(b) // a buffer takes everything
	_ = w.Close()
	return out.Bytes()
}

func newGzip(w io.Writer) *gzip.Writer {
	z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		panic(err) // the level is a constant
	}
	return z
}
