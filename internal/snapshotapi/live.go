package snapshotapi

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/follow"
)

const (
	// coalesce is how long events wait for others when the last ones went out less than
	// that ago (HTTP-14).
	coalesce = 20 * time.Millisecond
	// settleFor is how much longer they wait while most readers still write: when there is
	// more to do than the machine can, larger batches cost less.
	settleFor = 80 * time.Millisecond
	// beatEvery is the time between heartbeats on a stream.
	beatEvery = 5 * time.Second
	// beatAge is how old a head may be that a heartbeat goes by, if a newer one is not to be had
	// at once; so much earlier than it was read the heartbeat's time may be.
	beatAge = 100 * time.Millisecond
	// beatTimeout is how long a heartbeat may hold up events to learn the head.
	beatTimeout = 200 * time.Millisecond
	// pageFrames is how many events are looked at at a time.
	pageFrames = 1000
	// batchSize is how many bytes of events are put together, at most unless one has more.
	batchSize = 256 << 10
	// keepFor is how long a batch is kept for those that have not come to it. It is longer
	// than a write may take.
	keepFor = 15 * time.Second
	// retryStale is the time between tries while the follower cannot tell what is new.
	retryStale = 100 * time.Millisecond
)

// hub has the live streams that somebody reads.
type hub struct {
	follower  Follower
	maxBehind int
	beatEvery time.Duration // a constant but in tests

	mu     sync.Mutex
	lives  map[string]*live // by scope.key
	closed bool
}

func newHub(f Follower, maxBehind int) *hub {
	return &hub{follower: f, maxBehind: maxBehind, beatEvery: beatEvery, lives: make(map[string]*live)}
}

// enter returns the stream of s, which leave must give back.
func (h *hub) enter(s scope) *live {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.lives[s.key]
	if l == nil {
		ctx, stop := context.WithCancel(context.Background())
		at := h.follower.Replica().At()
		l = &live{
			follower: h.follower, scope: s, maxBehind: h.maxBehind, beatEvery: h.beatEvery, stop: stop,
			last: at, at: at, grown: make(chan struct{}), advanced: make(chan struct{}, 1), ended: h.closed,
		}
		h.lives[s.key] = l
		go l.run(ctx)
	}
	l.readers++
	return l
}

func (h *hub) leave(l *live) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if l.readers--; l.readers == 0 {
		delete(h.lives, l.scope.key)
		l.stop()
	}
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for _, l := range h.lives {
		l.end()
	}
}

// batch is what is written to all at once. Batches follow each other: one begins where
// the one before ended, whatever of the log between was for others.
type batch struct {
	data          []byte
	from, through revocation.Position
	what          batchKind
	made          time.Time
}

type batchKind int

const (
	ofEvents batchKind = iota
	ofHeartbeat
	ofReset // what came between from and through is not there
)

// live is the stream of those who see the same tenants: one goroutine puts the newest
// events together, and any number of readers take the same bytes, each at its own pace
// within bounds. It runs ahead of the fastest by a quarter of maxBehind at most, so that a
// burst of events drops none of those who keep up with each other.
type live struct {
	follower  Follower
	scope     scope
	maxBehind int
	beatEvery time.Duration
	stop      context.CancelFunc
	readers   int // guarded by hub.mu
	// advanced is sent to when the fastest has come further, or one has written all.
	advanced chan struct{}

	mu      sync.Mutex
	batches []batch             // the newest
	first   int                 // the number of batches[0]
	bytes   int                 // in batches
	last    revocation.Position // where the last of all batches ended
	at      revocation.Position // everything up to it was in batches, or was for others
	joined  int                 // readers that take batches
	idle    int                 // of those, the ones that have written all
	front   int                 // the number of the batch that the fastest of them takes next
	grown   chan struct{}       // closed and replaced when there are more batches, or it is the end
	ended   bool
}

// The errors of [live.next].
var (
	errBehind = errors.New("the reader is too far behind")
	errEnded  = errors.New("the service is stopping")
)

// join returns the number of the batch to come, and what is before it. Who has joined must
// leave.
func (l *live) join() (n int, at revocation.Position) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.joined++
	l.front = l.first + len(l.batches)
	return l.front, l.at
}

func (l *live) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.joined--
	l.idle = min(l.idle, l.joined) // nearly right is good enough
	l.advance()
}

// advance needs l.mu.
func (l *live) advance() {
	select {
	case l.advanced <- struct{}{}:
	default: // it is on its way
	}
}

// next returns batch n, if it is there. Whoever asks is done with all before it.
func (l *live) next(n int) (b batch, ok bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n > l.front {
		l.front = n
		l.advance()
	}
	switch i := n - l.first; {
	case l.ended:
		return batch{}, false, errEnded
	case i < 0:
		return batch{}, false, errBehind
	case i < len(l.batches):
		return l.batches[i], true, nil
	}
	return batch{}, false, nil
}

// wait returns a channel that is closed when there may be batch n, for one who has
// nothing to do until then.
func (l *live) wait(n int) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended || n < l.first+len(l.batches) {
		return ready
	}
	l.idle++
	l.advance()
	return l.grown
}

func (l *live) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.wake()
}

// wake needs l.mu.
func (l *live) wake() {
	close(l.grown)
	l.grown = make(chan struct{})
}

// add publishes a batch that goes up to through. Only run calls it.
func (l *live) add(data []byte, what batchKind, through revocation.Position) {
	l.mu.Lock()
	defer l.mu.Unlock()
	made := time.Now()
	l.batches = append(l.batches, batch{data: data, from: l.last, through: through, what: what, made: made})
	l.bytes += len(data)
	l.last, l.at = through, through
	l.idle = 0
	for len(l.batches) > 1 && (l.bytes > l.maxBehind || made.Sub(l.batches[0].made) > keepFor) {
		l.bytes -= len(l.batches[0].data)
		l.batches[0] = batch{} // its bytes are held by no more than those who write them
		l.batches = l.batches[1:]
		l.first++
	}
	l.wake()
}

// skip notes that up to through there is nothing for the readers.
func (l *live) skip(through revocation.Position) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.at = through
}

// run publishes until ctx ends.
func (l *live) run(ctx context.Context) {
	beat := time.NewTicker(l.beatEvery)
	defer beat.Stop()
	at := l.at // l.at is changed by this goroutine only
	for ctx.Err() == nil {
		changed := l.follower.Changed()
		frames, err := l.follower.Frames(ctx, at, pageFrames)
		switch {
		case len(frames) > 0:
			at = frames[len(frames)-1].Position
			l.publish(ctx, frames)
			pause(ctx, coalesce)
			l.await(ctx, settleFor, l.isBusy)
			changed = ready // there may be more
		case errors.Is(err, follow.ErrGone), errors.Is(err, follow.ErrAhead):
			at = l.follower.Replica().At()
			l.add(resetFrame(at), ofReset, at)
			pause(ctx, coalesce)
			changed = ready
		case err != nil:
			pause(ctx, retryStale)
			changed = ready
		}
		select {
		case <-changed:
		case <-beat.C: // not starved: of two that are ready it is any
			l.beat(ctx, at)
		case <-ctx.Done():
		}
	}
}

// ready is a channel that nobody waits for.
var ready = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// publish adds batches of what of frames is for the readers.
func (l *live) publish(ctx context.Context, frames []follow.Frame) {
	size := 0
	for _, f := range frames {
		if l.scope.has(f.Tenant) {
			size += len(f.SSE)
		}
	}
	var data []byte
	for i, f := range frames {
		last := i == len(frames)-1
		if l.scope.has(f.Tenant) {
			if data == nil {
				data = make([]byte, 0, min(size, batchSize))
			}
			data = append(data, f.SSE...)
		}
		if len(data) > 0 && (last || len(data)+len(frames[i+1].SSE) > batchSize) {
			l.await(ctx, keepFor, l.isAhead) // who takes nothing for that long is dropped
			l.add(data, ofEvents, f.Position)
			size -= len(data)
			data = nil
		} else if last {
			l.skip(f.Position)
		}
	}
}

// await waits while the readers are as tooMuch says, at most for d.
func (l *live) await(ctx context.Context, d time.Duration, tooMuch func() bool) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	for tooMuch() {
		select {
		case <-l.advanced:
		case <-ctx.Done():
			return
		}
	}
}

// isAhead reports whether even the fastest reader has much to write.
func (l *live) isAhead() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	bytes := 0
	for i := len(l.batches); i > max(l.front-l.first, 0); i-- {
		bytes += len(l.batches[i-1].data)
	}
	return l.joined > 0 && bytes > l.maxBehind/4
}

// isBusy reports whether most readers have something to write.
func (l *live) isBusy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.idle < l.joined/2
}

// beat publishes a heartbeat.
func (l *live) beat(ctx context.Context, at revocation.Position) {
	l.add(beat(ctx, l.follower, at), ofHeartbeat, at)
}

// beat is a heartbeat of a stream that stands at at, if the head is known. Otherwise it
// shows those between that the connection lives.
func beat(ctx context.Context, f Follower, at revocation.Position) []byte {
	for _, age := range []time.Duration{beatAge, headAge} { // when the database is slow an older one has to do
		asked := time.Now()
		if head, err := freshWithin(ctx, f, age, beatTimeout/2); err == nil && head.Epoch == at.Epoch {
			return heartbeatFrame(at, head, asked.Add(-age))
		}
	}
	return []byte(": the head of the log is not known now\n\n")
}

func freshWithin(ctx context.Context, f Follower, age, timeout time.Duration) (revocation.Position, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return f.Fresh(ctx, age)
}

// heartbeatFrame says that a stream has sent everything up to through. The head was read
// before, so the log may have got further than that, and reaches to through at least. Since when
// is not later than when it was read: what a reader has up to the head is all there was then.
func heartbeatFrame(through, head revocation.Position, since time.Time) []byte {
	if head.Epoch != through.Epoch {
		head.Seq = 0
	}
	return fmt.Appendf(nil, "id: %s\nevent: heartbeat\ndata: {\"epoch\":\"%s\",\"head\":%d,\"through\":%d,\"time\":\"%s\"}\n\n",
		through, through.Epoch, max(head.Seq, through.Seq), through.Seq, since.UTC().Format(timeForm))
}

// timeForm is that of events: RFC 3339, in milliseconds.
const timeForm = "2006-01-02T15:04:05.000Z07:00"

// resetFrame says that a snapshot must be loaded, and that events after at follow.
func resetFrame(at revocation.Position) []byte {
	return fmt.Appendf(nil, "id: %s\nevent: reset\ndata: {\"epoch\":\"%s\",\"seq\":%d}\n\n", at, at.Epoch, at.Seq)
}

// pause waits for d.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
