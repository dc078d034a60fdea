package snapshotapi

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/rest"
)

// maxWait is how long a poll may wait for events.
const maxWait = 60 * time.Second

// pollWork is how long a poll looks for events among those of others. Then it says how far
// it has come.
const pollWork = 2 * time.Second

// events answers GET /v1/events.
func (a *API) events(w http.ResponseWriter, r *http.Request) error {
	q, err := a.readQuery(r, "after", "wait")
	if err != nil {
		return err
	}
	w.Header().Set("Vary", "Accept")
	if err := a.streams.take(q.account.Username); err != nil {
		return err
	}
	defer a.streams.release(q.account.Username)
	if prefers(r, "text/event-stream") != "" {
		return a.stream(w, r, q)
	}
	return a.poll(w, r, q)
}

// after is the parameter of this name.
func (q query) after() (revocation.Position, error) {
	if !q.values.Has("after") {
		return revocation.Position{}, rest.InvalidParameter(
			"The parameter after is missing. Take a snapshot first, then send after=<epoch>:<seq> with what it says.")
	}
	p, ok := parsePosition(q.values.Get("after"))
	if !ok {
		return p, rest.InvalidParameter("The parameter after must be <epoch>:<seq>, as snapshots and events name them.")
	}
	return p, nil
}

// wait is the parameter of this name.
func (q query) wait() (time.Duration, error) {
	if !q.values.Has("wait") {
		return 0, nil
	}
	d, err := time.ParseDuration(q.values.Get("wait"))
	if err != nil || d < 0 || d > maxWait {
		return 0, rest.InvalidParameter("The parameter wait must be a time of 0s to 60s, for example 30s.")
	}
	return d, nil
}

// parsePosition reads what [revocation.Position.String] writes.
func parsePosition(s string) (revocation.Position, bool) {
	epoch, seq, _ := strings.Cut(s, ":")
	n, err := strconv.ParseInt(seq, 10, 64)
	p := revocation.Position{Epoch: revocation.Epoch(epoch), Seq: revocation.Seq(n)}
	// The shape of a UUID is enough: another log's is as foreign as one that is none.
	return p, err == nil && n >= 0 && len(epoch) == 36 && strings.Trim(epoch, "0123456789abcdef-") == "" && p.String() == s
}

// poll answers with the events after a position, and waits for one if there is none.
func (a *API) poll(w http.ResponseWriter, r *http.Request, q query) error {
	ctx := r.Context()
	at, err := q.after()
	if err != nil {
		return err
	}
	wait, err := q.wait()
	if err != nil {
		return err
	}
	rc := http.NewResponseController(w)
	last := time.Now().Add(wait + 2*pollWork + freshTimeout + sendTimeout)
	_ = rc.SetReadDeadline(last) // past it the server takes the reader for gone
	_ = rc.SetWriteDeadline(last)
	found, at, err := a.find(ctx, q, at, wait)
	if err != nil {
		return a.pollError(ctx, err)
	}
	head, err := a.fresh(ctx)
	switch {
	case err != nil && len(found) == 0:
		return err
	case err == nil && head.Epoch != at.Epoch:
		return a.pollError(ctx, follow.ErrGone)
	}
	const between, end = ",\n", "]}\n"
	begin := append([]byte(`{"epoch":"`), at.Epoch...)
	begin = append(begin, '"')
	if err == nil { // else the head is not known, which is no reason to keep revocations back
		begin = strconv.AppendInt(append(begin, `,"head":`...), int64(max(head.Seq, at.Seq)), 10)
	}
	begin = strconv.AppendInt(append(begin, `,"through":`...), int64(at.Seq), 10)
	begin = append(begin, `,"events":[`...)
	size := len(begin) + len(between)*max(len(found)-1, 0) + len(end)
	for _, event := range found {
		size += len(event)
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Length", strconv.Itoa(size))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	// Events are everybody's bytes: they are not put together for one. A caller that is
	// gone takes no more of them; net/http remembers.
	_ = rc.SetWriteDeadline(time.Now().Add(a.sendTimeout)) // for all of it
	_, _ = w.Write(begin)
	for i, event := range found {
		if i > 0 {
			_, _ = io.WriteString(w, between)
		}
		if _, err := w.Write(event); err != nil {
			return nil
		}
	}
	_, _ = io.WriteString(w, end)
	return nil
}

// find returns the events after a position that q is about, and how far it has looked. If
// there is none it waits for one.
func (a *API) find(ctx context.Context, q query, at revocation.Position, wait time.Duration) (found [][]byte, _ revocation.Position, err error) {
	until := time.NewTimer(wait)
	defer until.Stop()
	enough := time.Now().Add(pollWork)
	for over := wait == 0; len(found) == 0; {
		changed := a.follower.Changed()
		frames, err := a.framesUntil(ctx, at, enough, pageFrames)
		switch {
		case ctx.Err() != nil:
			return nil, at, context.Cause(ctx)
		case errors.Is(err, errLate):
			return nil, at, nil
		case err != nil:
			return nil, at, err
		}
		for _, f := range frames {
			if len(found) == q.limit {
				break
			}
			if q.scope.has(f.Tenant) {
				found = append(found, f.JSON)
			}
			at = f.Position
		}
		if len(frames) > 0 { // others' events are not waited behind
			if time.Now().After(enough) || a.closing.Err() != nil {
				break
			}
			continue
		}
		if over {
			break
		}
		select {
		case <-changed:
		case <-until.C:
			over = true
		case <-a.closing.Done():
			over = true
		case <-ctx.Done():
			return nil, at, context.Cause(ctx)
		}
		enough = time.Now().Add(pollWork)
	}
	return found, at, nil
}

// errLate is that the time was over before there was an answer.
var errLate = errors.New("the events were not read in time")

// framesUntil returns up to limit events after a position. Its errors are those of
// [follow.Follower.Frames], and errLate.
func (a *API) framesUntil(ctx context.Context, at revocation.Position, until time.Time, limit int) ([]follow.Frame, error) {
	ctx, cancel := context.WithDeadlineCause(ctx, until, errLate)
	defer cancel()
	return a.follower.Frames(ctx, at, limit)
}

// pollError is what a poll answers when the follower has refused.
func (a *API) pollError(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, follow.ErrGone):
		at := a.follower.Replica().At()
		return &rest.Problem{
			Slug: "seq-gone", Title: "The events after this position are gone.", Status: http.StatusGone,
			Detail:  "Take a snapshot, and go on after its position.",
			Members: map[string]any{"epoch": at.Epoch, "seq": at.Seq},
		}
	case errors.Is(err, follow.ErrAhead):
		// Package replica knows by these words that the log was restored.
		return rest.InvalidParameter("The parameter after is past the end of the log.")
	case errors.Is(err, follow.ErrStale):
		return stale(err)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return err
}
