package snapshotapi

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"os"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/follow"
)

// streamFor is how long a stream lasts at least. Then its reader comes back, and is asked
// again who it is.
const streamFor = time.Hour

// stream is one reader's stream of server-sent events (HTTP-14, HTTP-15).
type stream struct {
	api   *API
	conn  *connection
	scope scope
	// at: everything up to it was written, or was for others.
	at revocation.Position
}

// errReset is that the events after a position are not to be had.
var errReset = errors.New("the stream begins anew")

// stream answers GET /v1/events for those who want a stream.
func (a *API) stream(w http.ResponseWriter, r *http.Request, q query) error {
	ctx := r.Context()
	s := &stream{api: a, scope: q.scope}
	first, err := s.begin(ctx, r.Header.Get("Last-Event-ID"), q)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no")
	h.Set("Transfer-Encoding", "identity") // to the server: no chunks, see the package's decisions
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	s.conn = a.connection(w)
	if err := s.write(append([]byte("retry: 3000\n\n"), first...)); err == nil {
		s.run(ctx)
	}
	return nil
}

// begin finds out where the stream begins, before anything is written, and returns what
// it begins with. Its error is for [rest.Write].
func (s *stream) begin(ctx context.Context, lastID string, q query) ([]byte, error) {
	var after revocation.Position
	switch {
	case lastID != "":
		var ok bool
		if after, ok = parsePosition(lastID); !ok {
			return s.reset(), nil
		}
	case q.values.Has("after"):
		var err error
		if after, err = q.after(); err != nil {
			return nil, err
		}
	default:
		head, err := s.api.fresh(ctx)
		if err != nil {
			return nil, err
		}
		s.at = s.api.follower.Replica().At()   // at the head, or past it
		return heartbeatFrame(s.at, head), nil // so that the reader knows where it stands
	}
	s.at = after
	frames, err := s.frames(ctx, pageFrames)
	switch {
	case errors.Is(err, errReset):
		return s.reset(), nil
	case err != nil:
		return nil, stale(err)
	}
	return s.take(frames), nil
}

// reset moves the stream to where the replica is.
func (s *stream) reset() []byte {
	s.at = s.api.follower.Replica().At()
	return resetFrame(s.at)
}

// frames returns up to limit events after s.at. Its error is errReset, or one after which
// it can be tried again later.
func (s *stream) frames(ctx context.Context, limit int) ([]follow.Frame, error) {
	frames, err := s.api.follower.Frames(ctx, s.at, limit)
	if errors.Is(err, follow.ErrGone) || errors.Is(err, follow.ErrAhead) {
		return nil, errReset
	}
	return frames, err
}

// take is what of frames the reader sees. The stream stands after them.
func (s *stream) take(frames []follow.Frame) []byte {
	var data []byte
	for _, f := range frames {
		if s.scope.has(f.Tenant) {
			data = append(data, f.SSE...)
		}
		s.at = f.Position
	}
	return data
}

// write sends data at once. After an error the reader is gone.
func (s *stream) write(data []byte) error {
	err := s.conn.write(data)
	if err == nil {
		err = s.conn.flush()
	}
	return s.wrote(len(data), err)
}

func (s *stream) wrote(n int, err error) error {
	switch {
	case err == nil:
		s.api.metrics.eventBytes.Add(float64(n))
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.api.metrics.streamDrop[droppedStalled].Inc()
	}
	return err
}

// run writes what comes until the reader is gone, is dropped, or the service stops.
func (s *stream) run(ctx context.Context) {
	l := s.api.hub.enter(s.scope)
	defer s.api.hub.leave(l)
	for n := pageFrames; n == pageFrames; {
		var err error
		if n, err = s.catchUp(ctx, pageFrames); err != nil {
			return
		}
	}
	n, at := l.join()
	defer l.leave()
	if s.catchUpTo(ctx, at) != nil {
		return
	}
	over := time.NewTimer(s.api.streamFor + rand.N(s.api.streamFor/4)) // not all at once
	defer over.Stop()
	for {
		for {
			b, ok, err := l.next(n)
			if errors.Is(err, errBehind) {
				s.api.metrics.streamDrop[droppedBehind].Inc()
			}
			if err != nil {
				return
			}
			if !ok {
				break
			}
			if s.follow(ctx, b) != nil {
				return
			}
			n++
		}
		if s.wrote(0, s.conn.flush()) != nil {
			return
		}
		select {
		case <-l.wait(n):
		case <-over.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// follow writes b, or as much of it as the reader does not have.
func (s *stream) follow(ctx context.Context, b batch) error {
	sameEpoch := s.at.Epoch == b.through.Epoch
	switch {
	case b.what == ofReset && !sameEpoch,
		b.what == ofEvents && b.from == s.at,
		b.what == ofHeartbeat && sameEpoch && b.from.Seq <= s.at.Seq && s.at.Seq <= b.through.Seq:
		s.at = b.through
		return s.wrote(len(b.data), s.conn.write(b.data))
	case sameEpoch: // it has had all of it, or a part
		return s.catchUpTo(ctx, b.through)
	}
	_, err := s.catchUp(ctx, pageFrames)
	return err
}

// catchUpTo writes events until the stream stands at to, or no longer in its epoch.
func (s *stream) catchUpTo(ctx context.Context, to revocation.Position) error {
	for s.at.Epoch == to.Epoch && s.at.Seq < to.Seq {
		if _, err := s.catchUp(ctx, min(int(to.Seq-s.at.Seq), pageFrames)); err != nil {
			return err
		}
	}
	return nil
}

// catchUp writes what the reader sees of up to limit events, and returns of how many. They
// come from what is kept for all. Its error ends the stream.
func (s *stream) catchUp(ctx context.Context, limit int) (n int, err error) {
	select {
	case <-s.api.closing:
		return 0, errEnded
	default:
	}
	frames, err := s.frames(ctx, limit)
	if errors.Is(err, errReset) {
		return 0, s.write(s.reset())
	}
	if err != nil {
		return 0, err // the reader comes back
	}
	if data := s.take(frames); len(data) > 0 {
		err = s.write(data)
	}
	return len(frames), err
}
