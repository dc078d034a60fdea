package follow

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/rescindhq/rescind/api/revocation"
)

// Frame is an event, encoded for everybody. It must not be changed.
type Frame struct {
	revocation.Position
	Tenant string // domain
	// JSON is the structured CloudEvent in one line, without its end.
	JSON []byte
	// SSE is the event as a server-sent one: id, event, data and an empty line.
	SSE []byte
}

// frameBytes is about what a frame takes beside its SSE.
const frameBytes = 128

func encode(e revocation.Event) (Frame, error) {
	data, err := e.MarshalJSON()
	if err != nil {
		return Frame{}, err
	}
	if bytes.ContainsAny(data, "\r\n") { // between the members of e.Data
		var line bytes.Buffer
		if err := json.Compact(&line, data); err != nil {
			return Frame{}, fmt.Errorf("encode event %s: %w", e.Position, err)
		}
		data = line.Bytes()
	}
	sse := make([]byte, 0, len(data)+128)
	sse = fmt.Appendf(sse, "id: %s\nevent: %s\ndata: ", e.Position, e.Type)
	from := len(sse)
	sse = append(sse, data...)
	to := len(sse)
	sse = append(sse, "\n\n"...)
	return Frame{Position: e.Position, Tenant: e.Tenant.Domain, JSON: sse[from:to:to], SSE: slices.Clip(sse)}, nil
}

// ring is the newest frames, without a gap, as far as they fit.
type ring struct {
	max    int
	bytes  int
	frames []Frame // readers have parts of it: it is never written to but after its end
	end    revocation.Position
}

func (r *ring) reset(at revocation.Position) {
	r.frames, r.bytes, r.end = nil, 0, at
}

// add takes frames that follow the last one.
func (r *ring) add(frames []Frame) {
	if len(frames) == 0 {
		return
	}
	for _, f := range frames {
		r.bytes += len(f.SSE) + frameBytes
	}
	r.frames = append(r.frames, frames...)
	r.end = frames[len(frames)-1].Position
	if r.bytes <= r.max {
		return
	}
	// A quarter more than must go, so that the rest is not copied each time.
	from := 0
	for from < len(r.frames) && r.bytes > r.max-r.max/4 {
		r.bytes -= len(r.frames[from].SSE) + frameBytes
		from++
	}
	r.frames = slices.Clone(r.frames[from:])
}

// after returns up to limit frames that follow seq, not found if they are older than
// what is there.
func (r *ring) after(seq revocation.Seq, limit int) (frames []Frame, found bool) {
	from := len(r.frames) - int(r.end.Seq-seq)
	if from < 0 {
		return nil, false
	}
	return first(r.frames[from:], limit), true
}

// maxFrames is about how many bytes of events are returned at a time.
const maxFrames = 256 << 10

// first returns up to limit of frames, and no more than maxFrames but for one.
func first(frames []Frame, limit int) []Frame {
	n := 0
	for bytes := 0; n < min(limit, len(frames)); n++ {
		if bytes += len(frames[n].SSE); bytes > maxFrames && n > 0 {
			break
		}
	}
	return slices.Clip(frames[:n])
}

// Frames returns up to limit frames that follow after, or as many as are 256 KiB, in order
// and without a gap, and none when the replica stands there. A position a little ahead
// of this process waits for the replica. Limit is positive. Errors: [ErrGone], [ErrAhead], [ErrStale], ctx's.
func (f *Follower) Frames(ctx context.Context, after revocation.Position, limit int) ([]Frame, error) {
	for {
		f.mu.Lock()
		end := f.ring.end
		if after.Epoch == end.Epoch && after.Seq <= end.Seq {
			frames, found := f.ring.after(after.Seq, limit)
			f.mu.Unlock()
			if found {
				return frames, nil
			}
			return f.older(ctx, after, end, limit)
		}
		f.mu.Unlock()
		if after.Epoch != end.Epoch {
			return nil, fmt.Errorf("%w: the log is of epoch %s now", ErrGone, end.Epoch)
		}
		head, err := f.Fresh(ctx, 0)
		if err != nil {
			return nil, err
		}
		if head.Epoch == after.Epoch && after.Seq > head.Seq {
			return nil, fmt.Errorf("%w: it ends at %d", ErrAhead, head.Seq)
		}
	}
}
