package snapshotapi

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/rest"
)

const (
	// streamFor is how long a stream lasts at least. Then its reader comes back: a balancer
	// before the service can spread streams anew.
	streamFor = time.Hour
	// askEvery is how often, at most, it is asked again who reads.
	askEvery = time.Minute
	// askTimeout is how long the events wait for that.
	askTimeout = 2 * time.Second
)

// stream is one reader's stream of server-sent events (HTTP-14, HTTP-15).
type stream struct {
	api   *API
	r     *http.Request
	query query
	conn  *connection
	last  time.Time // when something was written
	ask   time.Time // when to ask again who reads
	end   time.Time
	// at: everything up to it was written, or was for others.
	at revocation.Position
}

// errReset is that the events after a position are not to be had.
var errReset = errors.New("the stream begins anew")

// stream answers GET /v1/events for those who want a stream.
func (a *API) stream(w http.ResponseWriter, r *http.Request, q query) error {
	ctx := r.Context()
	now := time.Now()
	s := &stream{
		api: a, r: r, query: q,
		ask: now.Add(fromThreeQuarters(a.askEvery)), end: now.Add(a.streamFor + rand.N(a.streamFor/4)), // not all at once
	}
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
		asked := time.Now()
		head, err := s.api.fresh(ctx)
		if err != nil {
			return nil, err
		}
		s.at = s.api.follower.Replica().At()                        // at the head, or past it
		return heartbeatFrame(s.at, head, asked.Add(-headAge)), nil // so that the reader knows where it stands
	}
	s.at = after
	frames, err := s.frames(ctx, freshTimeout, pageFrames)
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

// frames returns up to limit events after s.at. Its error is errReset, errLate, or another after
// which it can be tried again later.
func (s *stream) frames(ctx context.Context, within time.Duration, limit int) ([]follow.Frame, error) {
	frames, err := s.api.framesUntil(ctx, s.at, time.Now().Add(within), limit)
	if errors.Is(err, follow.ErrGone) || errors.Is(err, follow.ErrAhead) {
		return nil, errReset
	}
	return frames, err
}

// take is what of frames the reader sees. The stream stands after them.
func (s *stream) take(frames []follow.Frame) []byte {
	var data []byte
	for _, f := range frames {
		if s.query.scope.has(f.Tenant) {
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
		s.last = time.Now()
		s.api.metrics.eventBytes.Add(float64(n))
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.api.metrics.streamDrop[droppedStalled].Inc()
	}
	return err
}

// run writes what comes until the reader is gone, is dropped or may read no more, or the
// service stops.
func (s *stream) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.api.closing, cancel)()
	l := s.api.hub.enter(s.query.scope)
	defer s.api.hub.leave(l)
	for far := true; far; {
		if s.catchUp(ctx, pageFrames) != nil {
			return
		}
		head := s.api.follower.Replica().At()
		far = s.at.Epoch == head.Epoch && head.Seq-s.at.Seq > pageFrames
	}
	n, at := l.join()
	defer l.leave()
	if s.catchUpTo(ctx, at) != nil {
		return
	}
	due := time.NewTimer(time.Until(s.due()))
	defer due.Stop()
	for {
		for {
			b, ok, err := l.next(n)
			if errors.Is(err, errBehind) {
				s.api.metrics.streamDrop[droppedBehind].Inc()
			}
			if err != nil || !s.mayGoOn(ctx) {
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
		due.Reset(time.Until(s.due()))
		select {
		case <-l.wait(n):
		case <-due.C:
		case <-ctx.Done():
			return
		}
	}
}

// due is when mayGoOn has something to do.
func (s *stream) due() time.Time {
	if s.ask.Before(s.end) {
		return s.ask
	}
	return s.end
}

// mayGoOn reports whether the stream goes on, and asks when it is time whether its reader
// still sees what is in it. It does if that cannot be told now.
func (s *stream) mayGoOn(ctx context.Context) bool {
	now := time.Now()
	switch {
	case !now.Before(s.end):
		return false
	case now.Before(s.ask):
		return true
	}
	s.ask = now.Add(fromThreeQuarters(s.api.askEvery))
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	account, err := s.api.accounts.Account(s.r.WithContext(ctx))
	if err == nil && !slices.Contains(roles, account.Role) {
		return false
	}
	scope := s.query.scope
	if err == nil {
		scope, err = s.api.scopeOf(ctx, account, s.query.tenant)
	}
	if err != nil {
		return !isRefusal(err)
	}
	return scope.key == s.query.scope.key
}

// fromThreeQuarters is some time between three quarters of d and d, so that it is not the
// same for all.
func fromThreeQuarters(d time.Duration) time.Duration { return d - rand.N(d/4) }

// isRefusal reports whether err says that the reader may not read, rather than that it is
// not known now.
func isRefusal(err error) bool {
	status := 0
	if e, ok := errors.AsType[*authn.OAuthError](err); ok {
		status = e.Status
	} else if p, ok := errors.AsType[*rest.Problem](err); ok {
		status = p.Status
	}
	return status == http.StatusUnauthorized || status == http.StatusForbidden || status == http.StatusNotFound
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
	return s.catchUp(ctx, pageFrames)
}

// catchUpTo writes events until the stream stands at to, or no longer in its epoch.
func (s *stream) catchUpTo(ctx context.Context, to revocation.Position) error {
	for s.at.Epoch == to.Epoch && s.at.Seq < to.Seq {
		if err := s.catchUp(ctx, min(int(to.Seq-s.at.Seq), pageFrames)); err != nil {
			return err
		}
	}
	return nil
}

// catchUp writes what the reader sees of up to limit events. They come from what is kept
// for all. If that is nothing for long, it writes a heartbeat. Its error ends the stream.
func (s *stream) catchUp(ctx context.Context, limit int) error {
	if ctx.Err() != nil || !s.mayGoOn(ctx) {
		return errEnded
	}
	frames, err := s.frames(ctx, s.api.hub.beatEvery, limit)
	switch {
	case errors.Is(err, errReset):
		return s.write(s.reset())
	case err != nil && !errors.Is(err, errLate):
		return err // the reader comes back
	}
	data := s.take(frames)
	if len(data) == 0 && time.Since(s.last) >= s.api.hub.beatEvery {
		data = beat(ctx, s.api.follower, s.at)
	}
	if len(data) == 0 {
		return nil
	}
	return s.write(data)
}
