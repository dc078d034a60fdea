package snapshotapi

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/internal/rest"
)

// sendTimeout is how long a reader may take for what is written at once, [chunkSize] of a
// snapshot or a batch of events, before it is dropped.
const sendTimeout = 10 * time.Second

// A reader of a snapshot that has taken longer than slowFor must have taken leastRate
// since then, in bytes a second.
const (
	slowFor   = 30 * time.Second
	leastRate = 64 << 10
)

// makeTimeout is how long a reader waits for a snapshot to be begun.
const makeTimeout = 5 * time.Second

// idleFor is how long the service may have nothing to write.
const idleFor = time.Minute

// snapshot answers GET /v1/snapshots/{kind}.
func (a *API) snapshot(w http.ResponseWriter, r *http.Request) error {
	k := key{kind: chi.URLParam(r, "kind"), form: formJSON}
	if _, ok := kinds[k.kind]; !ok {
		return rest.Status(http.StatusNotFound, "There are no snapshots of this kind.")
	}
	// A snapshot has no pages: limit is for callers that send it with every list.
	q, err := a.readQuery(r)
	if err != nil {
		return err
	}
	h := w.Header()
	h.Set("Vary", "Accept-Encoding, Accept")
	var ok bool
	if k.coding, ok = rest.Negotiate(r); !ok {
		return rest.Status(http.StatusNotAcceptable, "There are zstd, gzip and no content coding.")
	}
	if other := prefers(r, string(formBinary), string(formNDJSON)); other != "" {
		k.form = form(other)
	}
	k.scope = q.scope.key
	if err := a.readers.take(q.account.Username); err != nil {
		return err
	}
	defer a.readers.release(q.account.Username)

	asked := time.Now()
	head, err := a.fresh(r.Context())
	if err != nil {
		return err
	}
	rd, err := a.cache.open(k, q.scope, asked, head)
	if errors.Is(err, errFull) {
		p := rest.Status(http.StatusServiceUnavailable, "Too much is being sent. Sending the same request again is safe.")
		p.RetryAfter, p.Cause = busyRetry, err
		return p
	} else if err != nil {
		return err
	}
	defer rd.close()
	ctx, cancel := context.WithTimeout(r.Context(), makeTimeout)
	defer cancel()
	in, err := rd.info(ctx)
	if err != nil {
		return err
	}
	h.Set("ETag", in.etag)
	h.Set("Cache-Control", "private, no-cache")
	h.Set("Accept-Ranges", "none")
	if rest.NoneMatch(r, in.etag) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	h.Set("Content-Type", string(k.form))
	if in.coding != rest.Identity {
		h.Set("Content-Encoding", string(in.coding))
	}
	if in.size >= 0 {
		h.Set("Content-Length", strconv.FormatInt(in.size, 10))
	}
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		a.send(w, r, rd)
	}
	return nil
}

// send panics with [http.ErrAbortHandler] if the body does not get to its end, so that
// it does not look whole.
func (a *API) send(w http.ResponseWriter, r *http.Request, rd *reading) {
	conn := a.connection(w)
	var sent int64
	var took time.Duration // that it was the reader who was waited for
	for {
		chunk, err := rd.next(r.Context())
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		began := time.Now()
		err = conn.write(chunk)
		took += time.Since(began)
		sent += int64(len(chunk))
		if errors.Is(err, os.ErrDeadlineExceeded) || err == nil && isSlow(sent, took-a.slowFor) {
			a.metrics.snapshotDrop.Inc()
			err = errDropped
		}
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		a.metrics.snapshotBytes.Add(float64(len(chunk)))
	}
}

// isSlow reports whether so many bytes are too few for a time, which may be negative.
func isSlow(sent int64, took time.Duration) bool {
	return float64(sent) < took.Seconds()*leastRate
}

// connection writes an answer that may take long. Deadlines that are not supported are
// not needed: such a writer has no network below it.
type connection struct {
	w        http.ResponseWriter
	rc       *http.ResponseController
	timeout  time.Duration
	extended time.Time
}

func (a *API) connection(w http.ResponseWriter) *connection {
	c := &connection{w: w, rc: http.NewResponseController(w), timeout: a.sendTimeout}
	c.extend()
	return c
}

// write fails with [os.ErrDeadlineExceeded] if the reader does not take p, or what was
// written before it, within c.timeout.
func (c *connection) write(p []byte) error {
	c.extend()
	_, err := c.w.Write(p)
	return err
}

func (c *connection) flush() error {
	c.extend()
	return c.rc.Flush()
}

// extend gives the next write time. A deadline is good for the writes of a second: setting
// it for each would be a good part of what they take.
func (c *connection) extend() {
	step := c.timeout / 10
	if now := time.Now(); now.Sub(c.extended) >= step {
		_ = c.rc.SetWriteDeadline(now.Add(c.timeout + step))
		_ = c.rc.SetReadDeadline(now.Add(c.timeout + idleFor)) // past it the server takes the reader for gone
		c.extended = now
	}
}
