package follow

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

const (
	// pageEvents is how many events are read at once for those who are far behind. Pages
	// begin at multiples of it, so that any number of readers share them.
	pageEvents = 500
	// keepPages bounds the pages in memory, in bytes; the newest is kept whatever its size.
	keepPages = 8 << 20
	// maxOldReads bounds what those who are far behind ask of the database at a time.
	maxOldReads = 2
)

// page is one read of events that are no longer in memory, for all who want them. What it
// found may be read once done is closed.
type page struct {
	start  revocation.Position // the events follow it
	done   chan struct{}
	frames []Frame
	bytes  int
	err    error
}

// pages are the reads that are under way and the newest that have succeeded, those last
// that were wanted last.
type pages struct {
	reads chan struct{} // has one for each read

	mu    sync.Mutex
	all   []*page
	bytes int
}

func newPages() *pages { return &pages{reads: make(chan struct{}, maxOldReads)} }

// join returns the page after start, and whether the caller must read it.
func (ps *pages) join(start revocation.Position) (p *page, mine bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for i, p := range ps.all {
		if p.start == start {
			ps.all = append(slices.Delete(ps.all, i, i+1), p)
			return p, false
		}
	}
	p = &page{start: start, done: make(chan struct{})}
	ps.all = append(ps.all, p)
	return p, true
}

// drop forgets p, if it is there.
func (ps *pages) drop(p *page) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if i := slices.Index(ps.all, p); i >= 0 {
		ps.all = slices.Delete(ps.all, i, i+1)
		ps.bytes -= p.bytes
	}
}

// finish gives p to those who wait.
func (ps *pages) finish(p *page) {
	defer close(p.done)
	if p.err != nil {
		ps.drop(p)
		return
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, f := range p.frames {
		p.bytes += len(f.SSE) + frameBytes
	}
	ps.bytes += p.bytes
	for i := 0; ps.bytes > keepPages && i < len(ps.all); {
		if old := ps.all[i]; old != p && old.bytes > 0 {
			ps.bytes -= old.bytes
			ps.all = slices.Delete(ps.all, i, i+1)
			continue
		}
		i++
	}
}

// older returns frames from the database, but none that the replica, which stands at end,
// does not have. A read goes on for the others if ctx ends.
func (f *Follower) older(ctx context.Context, after, end revocation.Position, limit int) ([]Frame, error) {
	if after.Seq < 0 {
		return nil, ErrGone
	}
	start := revocation.Position{Epoch: after.Epoch, Seq: after.Seq - after.Seq%pageEvents}
	for {
		p, mine := f.pages.join(start)
		if mine {
			go func() {
				p.frames, p.err = f.read(f.life, start, min(pageEvents, int(end.Seq-start.Seq)))
				f.pages.finish(p)
			}()
		}
		select {
		case <-p.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		switch {
		case errors.Is(p.err, ErrGone) && start.Seq < after.Seq:
			// The page's beginning is gone, which says nothing of what the caller wants.
			frames, err := f.read(ctx, after, min(pageEvents, int(end.Seq-after.Seq)))
			if err != nil && ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			return first(frames, limit), err
		case p.err != nil:
			return nil, p.err
		case p.frames[len(p.frames)-1].Seq > after.Seq:
			return first(p.frames[after.Seq-start.Seq:], limit), nil
		case mine: // there were more once
			return nil, ErrGone
		}
		f.pages.drop(p) // it is of a time when the log ended there
	}
}

// read reads the frames after a position from the database: at least one, without a gap.
func (f *Follower) read(ctx context.Context, after revocation.Position, limit int) ([]Frame, error) {
	select {
	case f.pages.reads <- struct{}{}:
		defer func() { <-f.pages.reads }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", ErrStale, context.Cause(ctx))
	}
	f.metrics.oldReads.Inc()
	events, err := f.after(ctx, after.Seq, limit)
	switch {
	case errors.Is(err, ErrGone):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrStale, err)
	case len(events) == 0: // there were some once
		return nil, ErrGone
	}
	frames := make([]Frame, 0, len(events))
	for _, e := range events {
		if e.Epoch != after.Epoch {
			return nil, fmt.Errorf("%w: the log is of epoch %s now", ErrGone, e.Epoch)
		}
		frame, err := encode(e)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrStale, err)
		}
		frames = append(frames, frame)
	}
	return frames, nil
}

// What a database may take before it is taken for gone: its connection may be to one that
// no longer answers.
const (
	readTimeout = 10 * time.Second
	loadTimeout = 2 * time.Minute
)

func (f *Follower) after(ctx context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, readTimeout, fmt.Errorf("no answer within %s", readTimeout))
	defer cancel()
	return f.source.After(ctx, seq, limit)
}
