package eventhub

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/rescindhq/rescind/api/revocation"
)

const (
	// chunkBytes is how much of a list of revocations is handed on at a time.
	chunkBytes = 256 << 10
	// ahead is how many chunks a list is made ahead of its fastest reader. So many are
	// left to those behind it when there is no room.
	ahead = 4
	// sharedFor is how long a list is given to new readers if nothing changes.
	sharedFor = 5 * time.Second
)

// blobKey distinguishes lists of revocations of one position.
type blobKey struct {
	list    string
	tenants string
	packed  bool // in gzip, if it is large enough
}

// blobs shares encoded lists of revocations among their readers. For each key there is at
// most one that new readers get; it is sent while it is made, no faster than its fastest
// reader takes it. When it is too old it is retired, which leaves it to its readers,
// chunk by chunk until the slowest is past them.
//
// A reader gets nothing that is older than its request: what has yet to be taken from the
// replica will do, and what stands at the head that was read for the request.
//
// One lock guards everything; nothing takes long under it.
type blobs struct {
	limit     int
	encodings chan struct{} // see Hub
	metrics   *metrics

	mu    sync.Mutex
	byKey map[blobKey]*blob
	live  map[*blob]struct{} // retired ones too, as long as they have bytes or readers
	bytes int
}

// blob is the bytes of one list. Chunks do not change once they are in it.
type blob struct {
	key    blobKey
	take   func() needed
	encode func(*encoder, needed)

	begun  bool                // its content is being taken, or was
	at     revocation.Position // zero until it was
	packed bool                // known with the first chunk
	chunks [][]byte            // those before low are nil
	size   int
	done   bool
	grown  chan struct{} // closed and replaced when something above has changed
	room   *sync.Cond    // signalled when more may be made, or need not be

	retired bool
	readers int
	wanted  []int // how many readers are at each chunk; the last is for the one to come
	front   int   // the chunk that the fastest reader is at
	low     int
}

var (
	errAbandoned = errors.New("nobody reads the list any more")
	errBehind    = errors.New("the reader is too far behind for the memory that there is")
)

func newBlobs(limit int, encodings chan struct{}, m *metrics) *blobs {
	return &blobs{limit: limit, encodings: encodings, metrics: m, byKey: make(map[blobKey]*blob), live: make(map[*blob]struct{})}
}

// open returns a reading of the list of k with everything up to head, which was read for
// this request. Take and encode make it if there is none.
func (c *blobs) open(k blobKey, head revocation.Position, take func() needed, encode func(*encoder, needed)) (*reading, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b, result := c.byKey[k], listShared
	if b != nil && b.begun && (b.at.Epoch != head.Epoch || b.at.Seq < head.Seq) {
		c.retire(b)
		b = nil
	}
	if b == nil {
		if c.makeRoom(); c.bytes > c.limit {
			return nil, errBusy
		}
		b = &blob{key: k, take: take, encode: encode, wanted: []int{0}, grown: make(chan struct{}), room: sync.NewCond(&c.mu)}
		c.byKey[k], c.live[b] = b, struct{}{}
		result = listEncoded
		go c.build(b)
		time.AfterFunc(sharedFor, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.retire(b)
		})
	}
	c.metrics.revoked.WithLabelValues(result).Inc()
	b.readers++
	b.wanted[0]++
	return &reading{c: c, b: b}, nil
}

// The methods from here to abandoned need c.mu.

func (c *blobs) retire(b *blob) {
	if b.retired {
		return
	}
	b.retired = true
	if c.byKey[b.key] == b {
		delete(c.byKey, b.key)
	}
	c.free(b)
	b.room.Signal()
}

// free gives the chunks of a retired blob back that no reader will come to.
func (c *blobs) free(b *blob) {
	for b.retired && b.low < len(b.chunks) && b.wanted[b.low] == 0 {
		c.drop(b)
	}
	if b.retired && b.readers == 0 {
		delete(c.live, b)
	}
}

// drop gives the first chunk of b back, whoever wants it.
func (c *blobs) drop(b *blob) {
	c.bytes -= len(b.chunks[b.low])
	b.chunks[b.low] = nil
	b.low++
}

// makeRoom gives back what nobody reads, and then what those readers want that are
// furthest behind others of theirs: a few that are slow must not keep out everybody.
func (c *blobs) makeRoom() {
	for c.bytes > c.limit {
		var longest *blob
		for b := range c.live {
			if b.readers == 0 {
				c.retire(b)
			} else if held := len(b.chunks) - b.low; held > ahead && (longest == nil || held > len(longest.chunks)-longest.low) {
				longest = b
			}
		}
		if c.bytes <= c.limit || longest == nil {
			return
		}
		c.retire(longest)
		for len(longest.chunks)-longest.low > ahead { // its slowest have lost already
			c.drop(longest)
		}
	}
}

func (b *blob) changed() {
	close(b.grown)
	b.grown = make(chan struct{})
}

// full reports whether b is far enough ahead of its readers.
func (b *blob) full() bool { return len(b.chunks)-b.front >= ahead && !b.abandoned() }

func (b *blob) abandoned() bool { return b.retired && b.readers == 0 }

// put adds a chunk to b, once its fastest reader is near enough. Others encode meanwhile.
func (c *blobs) put(b *blob, packed bool, chunk []byte) error {
	c.mu.Lock()
	if b.full() {
		<-c.encodings
		for b.full() {
			b.room.Wait()
		}
		c.mu.Unlock()
		c.encodings <- struct{}{}
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	if b.abandoned() {
		return errAbandoned
	}
	b.packed = packed
	b.chunks = append(b.chunks, chunk)
	b.wanted = append(b.wanted, 0)
	b.size += len(chunk)
	c.bytes += len(chunk)
	c.makeRoom()
	b.changed()
	return nil
}

// build makes b.
func (c *blobs) build(b *blob) {
	c.encodings <- struct{}{}
	defer func() { <-c.encodings }()
	c.mu.Lock()
	b.begun = true
	c.mu.Unlock()
	content := b.take()
	c.mu.Lock()
	b.at = content.at
	c.mu.Unlock()

	w := &blobWriter{c: c, b: b}
	e := &encoder{buf: make([]byte, 0, chunkBytes+chunkBytes/8), emit: w.emit}
	b.encode(e, content)
	if e.err == nil {
		e.err = w.finish(e.buf)
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	b.done = e.err == nil
	b.changed()
}

// blobWriter compresses what an encoder makes, and puts it into a blob.
type blobWriter struct {
	c   *blobs
	b   *blob
	zip *gzip.Writer // nil for a list that is not packed
	out []byte       // compressed, not yet a chunk
}

// emit implements encoder.emit.
func (w *blobWriter) emit(full []byte) ([]byte, error) {
	if !w.b.key.packed {
		return make([]byte, 0, cap(full)), w.c.put(w.b, false, full)
	}
	if w.zip == nil {
		w.zip = newGzip(w)
	}
	_, err := w.zip.Write(full)
	return full[:0], err
}

// Write takes what was compressed.
func (w *blobWriter) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		if w.out == nil {
			w.out = make([]byte, 0, chunkBytes)
		}
		n := min(len(rest), chunkBytes-len(w.out))
		w.out, rest = append(w.out, rest[:n]...), rest[n:]
		if len(w.out) == chunkBytes {
			if err := w.c.put(w.b, true, w.out); err != nil {
				return 0, err
			}
			w.out = nil
		}
	}
	return len(p), nil
}

// finish takes the last bytes of the encoder.
func (w *blobWriter) finish(last []byte) error {
	if w.zip == nil && (!w.b.key.packed || len(last) < minPacked) {
		return w.c.put(w.b, false, bytes.Clone(last)) // its buffer is large
	}
	if _, err := w.emit(last); err != nil {
		return err
	}
	if err := w.zip.Close(); err != nil {
		return err
	}
	return w.c.put(w.b, true, bytes.Clone(w.out))
}

func (c *blobs) held() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.bytes
}

// reading is one reader's place in a blob. It must be closed.
type reading struct {
	c       *blobs
	b       *blob
	i       int
	started bool
}

// info is what the header of an answer says.
type info struct {
	at     revocation.Position
	packed bool
	size   int // -1 while it is not known
}

// info is known once next has returned.
func (rd *reading) info() info {
	rd.c.mu.Lock()
	defer rd.c.mu.Unlock()
	in := info{rd.b.at, rd.b.packed, -1}
	if rd.b.done {
		in.size = rd.b.size
	}
	return in
}

// next returns the chunk after the one before, when it is there, and [io.EOF] after the
// last. The caller is done with the one before.
func (rd *reading) next(ctx context.Context) ([]byte, error) {
	c, b := rd.c, rd.b
	c.mu.Lock()
	defer c.mu.Unlock()
	if rd.started && rd.i < len(b.chunks) {
		b.wanted[rd.i]--
		rd.i++
		b.wanted[rd.i]++
		c.free(b)
		if rd.i > b.front {
			b.front = rd.i
			b.room.Signal()
		}
	}
	rd.started = true
	for rd.i == len(b.chunks) {
		if b.done {
			return nil, io.EOF
		}
		grown := b.grown
		c.mu.Unlock()
		select {
		case <-grown:
			c.mu.Lock()
		case <-ctx.Done():
			c.mu.Lock()
			rd.started = false
			return nil, context.Cause(ctx)
		}
	}
	if b.chunks[rd.i] == nil {
		return nil, errBehind
	}
	return b.chunks[rd.i], nil
}

func (rd *reading) close() {
	c, b := rd.c, rd.b
	c.mu.Lock()
	defer c.mu.Unlock()
	b.wanted[rd.i]--
	b.readers--
	if b.readers == 0 && !b.done {
		c.retire(b)
	}
	c.free(b)
	b.room.Signal()
}
