package snapshotapi

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/rest"
)

const (
	// chunkSize is how many bytes of a snapshot are handed on at a time.
	chunkSize = 256 << 10
	// ahead is how many chunks a snapshot is made ahead of its fastest reader.
	ahead = 16
	// reuseFor is how long a snapshot is given to new readers whatever has changed since.
	// With [headAge] it has all that was in the log two seconds before they asked.
	reuseFor = time.Second
	// cutoffStep is how often what has ended is left out anew, in seconds. An ETag is
	// good for as long at most.
	cutoffStep = 60
	// minCoded is the smallest body that is compressed, in bytes.
	minCoded = 1 << 10
	// zstdWindow bounds what a decoder needs; RFC 9659 allows 8 MiB.
	zstdWindow = 1 << 20
	// maxBuilds is how many snapshots are worked on at a time.
	maxBuilds = 4
	// blobBytes is about what a blob takes beside its chunks, buildBytes what the making
	// of one takes: a buffer and a compressor.
	blobBytes, buildBytes = 4 << 10, 2 << 20
)

// key is what distinguishes snapshots of one position.
type key struct {
	kind   string
	scope  string
	form   form
	coding rest.Coding
}

// cache shares snapshots among their readers: for each key there is at most one that new
// readers get, its blob. It can be sent while it is being made. When it is too old it is
// retired, which leaves it to its readers, chunk by chunk until the slowest is past them.
// When all that may be held is held, those who have read for longest must leave.
//
// One lock guards the cache and all blobs; nothing takes long under it.
type cache struct {
	follower Follower
	max      int
	metrics  *metrics
	log      *slog.Logger
	nonce    [8]byte       // of this process
	builds   chan struct{} // has one for each blob that is being worked on
	slowFor  time.Duration // a constant but in tests

	mu      sync.Mutex
	blobs   map[key]*blob // none of them retired
	retired map[*blob]struct{}
	bytes   int         // of all blobs, retired ones too
	sweeps  *time.Timer // nil while there are no blobs
	closed  bool
}

func newCache(f Follower, maxBytes int, m *metrics, log *slog.Logger) *cache {
	c := &cache{
		follower: f, max: maxBytes, metrics: m, log: log, builds: make(chan struct{}, maxBuilds), slowFor: slowFor,
		blobs: make(map[key]*blob), retired: make(map[*blob]struct{}),
	}
	rand.Read(c.nonce[:]) // never fails
	return c
}

// blob is the bytes of one snapshot. Chunks do not change once they are in it.
type blob struct {
	key    key
	scope  scope
	born   time.Time // when its first reader asked, before the head was known that it reaches
	cutoff int64     // see encoder

	at      revocation.Position // zero until its content was taken
	loads   uint64              // see replica.View
	decided bool                // coding is
	coding  rest.Coding         // identity for a body that is too small for that of key
	chunks  [][]byte
	size    int64
	done    bool
	err     error         // why it will never be done
	grown   chan struct{} // closed and replaced when something above has changed
	room    *sync.Cond    // signalled when more may be made, or need not be

	retired  bool
	readings map[*reading]struct{}
	wanted   []int // how many readers are at each chunk; the last is for the one to come
	front    int   // the chunk that the fastest reader is at
	low      int   // the chunks before it were given back
	used     time.Time
}

// errFull is that there is no room for another snapshot.
var errFull = errors.New("the snapshots that are being sent take all the memory that they may")

// errDropped is told a reader who had to make room.
var errDropped = errors.New("the reader was dropped for others, since it took too long")

// errAbandoned ends the making of a blob that nobody wants.
var errAbandoned = errors.New("nobody reads the snapshot any more")

// open returns a reading of the blob for k, which has everything up to head, or nothing to
// do with a reader who asked reuseFor before. The head was read after this one asked. It
// begins a blob if there is none.
func (c *cache) open(k key, s scope, asked time.Time, head revocation.Position) (*reading, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.blobs[k]
	if b != nil && !b.usable(asked, head) {
		c.retire(b)
		b = nil
	}
	if b == nil {
		if !c.makeRoom(blobBytes+buildBytes, nil) {
			return nil, errFull
		}
		b = &blob{
			key: k, scope: s, born: asked, cutoff: cutoffAt(asked), wanted: []int{0}, readings: make(map[*reading]struct{}),
			grown: make(chan struct{}), room: sync.NewCond(&c.mu),
		}
		c.blobs[k] = b
		c.count(blobBytes + buildBytes)
		c.metrics.builds[k.kind].Inc()
		go c.build(b)
		if c.sweeps == nil && !c.closed {
			c.sweeps = time.AfterFunc(reuseFor, c.sweep)
		}
	}
	rd := &reading{c: c, b: b, began: time.Now()}
	b.readings[rd] = struct{}{}
	b.wanted[0]++
	b.used = rd.began
	return rd, nil
}

func cutoffAt(now time.Time) int64 { return now.Unix() / cutoffStep * cutoffStep }

// usable reports whether a reader may get b who asked at a time, and must get what is up
// to head.
func (b *blob) usable(asked time.Time, head revocation.Position) bool {
	switch {
	case b.err != nil:
		return false
	case b.at == revocation.Position{}:
		return true // its content has yet to be taken
	case b.at.Epoch != head.Epoch:
		return false
	case asked.Sub(b.born) < reuseFor:
		return true
	}
	return b.at.Seq >= head.Seq && (!kinds[b.key.kind].revocations || b.cutoff == cutoffAt(asked))
}

// sweep retires what new readers would not get.
func (c *cache) sweep() {
	now, at := time.Now(), c.follower.Replica().At()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.blobs {
		if !b.usable(now, at) {
			c.retire(b)
		}
	}
	c.sweeps = nil
	if len(c.blobs) > 0 && !c.closed {
		c.sweeps = time.AfterFunc(reuseFor, c.sweep)
	}
}

// close gives back what is not being sent.
func (c *cache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.sweeps != nil {
		c.sweeps.Stop()
	}
	for _, b := range c.blobs {
		c.retire(b)
	}
}

// retire needs c.mu.
func (c *cache) retire(b *blob) {
	if b.retired {
		return
	}
	b.retired = true
	delete(c.blobs, b.key)
	c.retired[b] = struct{}{}
	c.free(b)
	b.room.Signal()
}

// free gives the chunks of a retired blob back that no reader will come to. It needs c.mu.
func (c *cache) free(b *blob) {
	if !b.retired {
		return
	}
	for ; b.low < len(b.chunks) && b.wanted[b.low] == 0; b.low++ {
		c.count(-len(b.chunks[b.low]))
		b.chunks[b.low] = nil
	}
	if _, held := c.retired[b]; held && len(b.readings) == 0 {
		delete(c.retired, b)
		c.count(-blobBytes)
	}
}

// count needs c.mu.
func (c *cache) count(n int) {
	c.bytes += n
	c.metrics.cached.Add(float64(n))
}

// makeRoom makes room for n bytes, and reports whether there is any. First go blobs without
// readers, those first that were asked for longest ago, then readers who have taken
// longer than slowFor, and last those of b, if it is given, that hold up its fastest. It
// needs c.mu.
func (c *cache) makeRoom(n int, b *blob) bool {
	for c.bytes+n > c.max {
		var oldest *blob
		for _, b := range c.blobs {
			if len(b.readings) == 0 && (oldest == nil || b.used.Before(oldest.used)) {
				oldest = b
			}
		}
		switch {
		case oldest != nil:
			c.retire(oldest)
		case !c.dropSlow() && (b == nil || !c.dropBehind(b)):
			return false
		}
	}
	return true
}

// dropSlow drops the slowest readers of the blob that is held for longest. It needs c.mu.
func (c *cache) dropSlow() bool {
	var slow *blob
	now := time.Now()
	older := func(b *blob) {
		for rd := range b.readings {
			if now.Sub(rd.began) >= c.slowFor && (slow == nil || b.born.Before(slow.born)) {
				slow = b
			}
		}
	}
	for b := range c.retired {
		older(b)
	}
	if slow == nil {
		for _, b := range c.blobs {
			older(b)
		}
	}
	if slow == nil {
		return false
	}
	least := -1
	for rd := range slow.readings {
		if now.Sub(rd.began) >= c.slowFor && (least < 0 || rd.i < least) {
			least = rd.i
		}
	}
	c.drop(slow, func(rd *reading) bool { return rd.i <= least && now.Sub(rd.began) >= c.slowFor })
	return true
}

// dropBehind leaves b to its fastest readers, and gives back what these have. It reports
// whether that helped. It needs c.mu.
func (c *cache) dropBehind(b *blob) bool {
	before := c.bytes
	c.drop(b, func(rd *reading) bool { return rd.i < b.front })
	return c.bytes < before
}

// drop retires b and drops readers of it. It needs c.mu.
func (c *cache) drop(b *blob, which func(*reading) bool) {
	c.retire(b)
	for rd := range b.readings {
		if which(rd) {
			rd.leave()
			c.metrics.snapshotDrop.Inc()
		}
	}
	b.changed() // one of them may wait
}

// changed wakes the readers of b that wait. It needs c.mu.
func (b *blob) changed() {
	close(b.grown)
	b.grown = make(chan struct{})
}

// put adds a chunk to b, once its fastest reader is near enough. While there is no room
// that is when it has nothing else to read.
func (c *cache) put(b *blob, chunk []byte) error {
	worked, err := c.place(b, chunk)
	if !worked {
		c.builds <- struct{}{}
	}
	return err
}

// place is put. It reports whether it still has its place among those who work: whoever
// waits for readers gives it up.
func (c *cache) place(b *blob, chunk []byte) (working bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	working = true
	for {
		if b.abandoned() {
			return working, errAbandoned
		}
		made := len(b.chunks) - b.front
		if made == 0 {
			c.makeRoom(len(chunk), b)
			break
		}
		if made < ahead && c.makeRoom(len(chunk), nil) {
			break
		}
		if working {
			<-c.builds
			working = false
		}
		b.room.Wait()
	}
	b.chunks = append(b.chunks, chunk)
	b.wanted = append(b.wanted, 0)
	b.size += int64(len(chunk))
	c.count(len(chunk))
	c.free(b) // its readers may have been dropped
	b.changed()
	return working, nil
}

// abandoned needs the cache's lock.
func (b *blob) abandoned() bool { return b.retired && len(b.readings) == 0 }

// build makes b.
func (c *cache) build(b *blob) {
	c.builds <- struct{}{}
	start := time.Now()
	content := contentOf(c.follower.Replica(), kinds[b.key.kind])
	c.mu.Lock()
	b.at, b.loads = content.at, content.loads
	c.mu.Unlock()

	w := &builder{c: c, b: b}
	e := &encoder{kind: b.key.kind, form: b.key.form, scope: b.scope, cutoff: b.cutoff, emit: w.emit}
	err := e.encode(content)
	if err == nil {
		err = w.finish(e.buf)
	}
	<-c.builds
	if err != nil && !errors.Is(err, errAbandoned) {
		c.log.Error("a snapshot cannot be made; please report this", "kind", b.key.kind, "error", err)
	}
	c.metrics.buildSeconds.Observe(time.Since(start).Seconds())

	c.mu.Lock()
	defer c.mu.Unlock()
	c.count(-buildBytes)
	b.done, b.err = err == nil, err
	if err != nil {
		c.retire(b)
	}
	b.changed()
}

// builder compresses what an encoder makes, and puts it into a blob.
type builder struct {
	c     *cache
	b     *blob
	coder coder  // nil for identity
	out   []byte // compressed, not yet a chunk
}

// coder is what compressors have in common.
type coder interface {
	io.WriteCloser
	Reset(io.Writer)
}

// Compressors hold much memory, and making one takes long.
var coders = map[rest.Coding]*sync.Pool{
	rest.Gzip: {New: func() any {
		w, err := gzip.NewWriterLevel(nil, gzip.BestSpeed)
		if err != nil {
			panic(err) // the level is a constant
		}
		return w
	}},
	rest.Zstd: {New: func() any {
		w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(zstdWindow),
			zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true))
		if err != nil {
			panic(err) // the options are constants
		}
		return w
	}},
}

// decide settles the coding of the blob once it is known whether its body is small.
func (w *builder) decide(small bool) {
	if w.b.decided {
		return
	}
	coding := w.b.key.coding
	if small {
		coding = rest.Identity
	}
	if coding != rest.Identity {
		w.coder = coders[coding].Get().(coder)
		w.coder.Reset(w)
	}
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	w.b.coding, w.b.decided = coding, true
	w.b.changed()
}

// emit implements encoder.emit.
func (w *builder) emit(full []byte) ([]byte, error) {
	w.decide(false)
	if w.coder == nil {
		return make([]byte, 0, chunkSize+chunkSize/8), w.put(full)
	}
	_, err := w.coder.Write(full)
	return full[:0], err
}

// put adds b. It may be several chunks, each of which has its own time to be sent: what was
// kept of many issuers comes at once.
func (w *builder) put(b []byte) error {
	for len(b) > 2*chunkSize {
		if err := w.c.put(w.b, b[:chunkSize:chunkSize]); err != nil {
			return err
		}
		b = b[chunkSize:]
	}
	return w.c.put(w.b, b)
}

// Write takes what was compressed.
func (w *builder) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		if w.out == nil {
			w.out = make([]byte, 0, chunkSize)
		}
		n := min(len(rest), chunkSize-len(w.out))
		w.out, rest = append(w.out, rest[:n]...), rest[n:]
		if len(w.out) == chunkSize {
			if err := w.c.put(w.b, w.out); err != nil {
				return 0, err
			}
			w.out = nil
		}
	}
	return len(p), nil
}

// finish takes the last bytes of the encoder.
func (w *builder) finish(last []byte) error {
	w.decide(len(last) < minCoded) // there were none before, or it is decided
	if w.coder == nil {
		return w.put(bytes.Clone(last)) // without the room that it was given
	}
	if _, err := w.coder.Write(last); err != nil {
		return err
	}
	if err := w.coder.Close(); err != nil {
		return err
	}
	w.coder.Reset(nil)
	coders[w.b.coding].Put(w.coder)
	if len(w.out) == 0 {
		return nil
	}
	return w.c.put(w.b, bytes.Clone(w.out))
}

// reading is one reader's place in a blob. It must be closed.
type reading struct {
	c       *cache
	b       *blob
	i       int
	began   time.Time
	started bool
	left    bool // closed, or dropped
}

// info is what the header of an answer says.
type info struct {
	etag   string
	coding rest.Coding
	size   int64 // -1 while it is not known
}

// info waits until it is known.
func (rd *reading) info(ctx context.Context) (info, error) {
	rd.c.mu.Lock()
	defer rd.c.mu.Unlock()
	for !rd.b.decided {
		if err := rd.await(ctx); err != nil {
			return info{}, err
		}
	}
	in := info{etag: rd.c.etag(rd.b), coding: rd.b.coding, size: -1}
	if rd.b.done {
		in.size = rd.b.size
	}
	return in, nil
}

// next returns the chunk after the one before, when it is there, and [io.EOF] after the
// last. The caller is done with the one before.
func (rd *reading) next(ctx context.Context) ([]byte, error) {
	rd.c.mu.Lock()
	defer rd.c.mu.Unlock()
	if rd.left {
		return nil, errDropped
	}
	if rd.started {
		rd.b.wanted[rd.i]--
		rd.i++
		rd.b.wanted[rd.i]++
		rd.c.free(rd.b)
		if rd.i > rd.b.front {
			rd.b.front = rd.i
			rd.b.room.Signal()
		}
	}
	rd.started = true
	for rd.i == len(rd.b.chunks) {
		if rd.b.done {
			rd.started = false // stays at the end
			return nil, io.EOF
		}
		if err := rd.await(ctx); err != nil {
			rd.started = false
			return nil, err
		}
	}
	return rd.b.chunks[rd.i], nil
}

// await waits until the blob has changed. It needs the cache's lock, which it gives up meanwhile.
func (rd *reading) await(ctx context.Context) error {
	if rd.b.err != nil {
		return fmt.Errorf("make snapshot: %w", rd.b.err)
	}
	grown := rd.b.grown
	rd.c.mu.Unlock()
	var err error
	select {
	case <-grown:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	rd.c.mu.Lock()
	if rd.left {
		return errDropped
	}
	return err
}

func (rd *reading) close() {
	rd.c.mu.Lock()
	defer rd.c.mu.Unlock()
	rd.leave()
}

// leave needs the cache's lock.
func (rd *reading) leave() {
	if rd.left {
		return
	}
	rd.left = true
	rd.b.wanted[rd.i]--
	delete(rd.b.readings, rd)
	rd.c.free(rd.b)
	if rd.i == rd.b.front && !rd.b.done {
		rd.b.front = 0
		for other := range rd.b.readings {
			rd.b.front = max(rd.b.front, other.i)
		}
	}
	rd.b.room.Signal()
}

// etag is of epoch, seq, all that distinguishes what can be asked for, and the coding
// (HTTP-04). The order of revocations is another in each process, and whenever its replica
// is loaded: so a tag is strong, and good with this process until then. It needs c.mu.
func (c *cache) etag(b *blob) string {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s%d\x00%s\x00%s\x00%s", c.nonce, b.loads, b.key.kind, b.scope.key, b.key.form)
	if kinds[b.key.kind].revocations {
		fmt.Fprintf(h, "\x00%d", b.cutoff)
	}
	suffix := map[rest.Coding]string{rest.Identity: "", rest.Gzip: ".gz", rest.Zstd: ".zst"}[b.coding]
	return fmt.Sprintf(`"%.8s.%d.%x%s"`, b.at.Epoch, b.at.Seq, h.Sum64(), suffix)
}
