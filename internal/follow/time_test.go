package follow

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// memoryLog is a source whose time passes in the test alone.
type memoryLog struct {
	mu     sync.Mutex
	events []revocation.Event
	heads  int
	err    error         // of every read
	hold   chan struct{} // if set, reads of the head wait for it
	stuck  bool          // reads of events wait until they are given up
	afters int           // reads of events
	gone   revocation.Seq
	data   string // of the next event, if set
}

func (l *memoryLog) head() revocation.Position {
	return revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: revocation.Seq(len(l.events))}
}

// write adds an event that nobody is told of.
func (l *memoryLog) write() {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.head()
	at.Seq++
	l.events = append(l.events, revocation.Event{
		Position: at, Type: "moon.risen", Tenant: revocation.SuperTenant, Data: []byte(cmp.Or(l.data, "{\n\"a\": 1\n}")),
	})
}

func (l *memoryLog) Load(_ context.Context, at func(revocation.Position), _ func(replica.Record), _ func(catalog.Entity)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	at(l.head())
	return l.err
}

func (l *memoryLog) After(ctx context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.afters++
	if l.stuck {
		l.mu.Unlock()
		<-ctx.Done()
		l.mu.Lock()
		return nil, ctx.Err()
	}
	if seq < l.gone {
		return nil, ErrGone
	}
	return l.events[seq:min(int(seq)+limit, len(l.events))], l.err
}

func (l *memoryLog) Head(ctx context.Context) (revocation.Position, error) {
	l.mu.Lock()
	l.heads++
	hold := l.hold
	l.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return revocation.Position{}, context.Cause(ctx)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head(), l.err
}

func (l *memoryLog) Grown() <-chan struct{} { return nil }

func (l *memoryLog) set(err error, hold chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err, l.hold = err, hold
}

// eventReads is how many reads of events there were.
func (l *memoryLog) eventReads() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.afters
}

func (l *memoryLog) end() revocation.Position {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head()
}

// forget leaves nothing in memory.
func (f *Follower) forget() {
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ring.reset(f.ring.end)
}

func (l *memoryLog) reads() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.heads
}

// inTime runs f with a follower that runs, in a bubble of its own time.
func inTime(t *testing.T, cfg Config, f func(t *testing.T, l *memoryLog, fw *Follower, log *bytes.Buffer)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l, log := new(memoryLog), new(bytes.Buffer)
		fw, err := New(cfg, l, prometheus.NewRegistry(), slog.New(slog.NewTextHandler(log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		if err := fw.Load(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- fw.Run(ctx) }()
		synctest.Wait()
		f(t, l, fw, log)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if _, err := fw.Fresh(t.Context(), 0); !errors.Is(err, ErrStale) {
			t.Errorf("Fresh after Run: %v", err)
		}
	})
}

type answer struct {
	at  revocation.Position
	err error
}

func (f *Follower) ask(ctx context.Context, callers int, maxAge time.Duration) <-chan answer {
	answers := make(chan answer, callers)
	for range callers {
		go func() { at, err := f.Fresh(ctx, maxAge); answers <- answer{at, err} }()
	}
	synctest.Wait()
	return answers
}

func TestFreshSharesReads(t *testing.T) {
	inTime(t, Config{PollEvery: 2 * time.Second}, func(t *testing.T, l *memoryLog, f *Follower, _ *bytes.Buffer) {
		expect := func(what string, answers <-chan answer, n int, seq revocation.Seq, reads int) {
			t.Helper()
			for range n {
				if a := <-answers; a.err != nil || a.at.Seq != seq {
					t.Fatalf("%s: %s, %v; want %d", what, a.at, a.err, seq)
				}
			}
			if got := l.reads(); got != reads {
				t.Errorf("%s: %d reads of the head, want %d", what, got, reads)
			}
		}
		const callers = 1000
		hold := make(chan struct{})
		l.set(nil, hold)
		first := f.ask(t.Context(), 1, 0)
		// A read has begun: who calls now needs another, which is the same for all.
		l.write()
		many := f.ask(t.Context(), callers, 0)
		old := f.ask(t.Context(), callers, time.Millisecond)
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := f.ask(ctx, 1, 0)
		left := errors.New("left")
		cancel(left)
		if a := <-gone; a.err != left {
			t.Errorf("one who left: %v", a.err)
		}
		l.set(nil, nil)
		close(hold)
		expect("the first", first, 1, 1, 2)
		expect("those after it", many, callers, 1, 2)
		expect("those who take an older one", old, callers, 1, 2)
		l.write()
		time.Sleep(500 * time.Millisecond)
		expect("half a second later", f.ask(t.Context(), callers, time.Second), callers, 1, 2)
		hold = make(chan struct{})
		l.set(nil, hold)
		now := f.ask(t.Context(), callers, 0) // one begins the read, the rest wait for another
		close(hold)
		expect("now", now, callers, 2, 4)
	})
}

// A second's freshness costs a read a second, however many want it.
func TestFreshWhenIdle(t *testing.T) {
	inTime(t, Config{}, func(t *testing.T, l *memoryLog, f *Follower, _ *bytes.Buffer) {
		time.Sleep(time.Second)
		before := l.reads()
		for range 100 {
			for range 10 {
				if _, err := f.Fresh(t.Context(), time.Second); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		if got := l.reads() - before; got > 11 {
			t.Errorf("%d reads of the head in 10 seconds", got)
		}
	})
}

func TestPollFindsWhatNobodyTold(t *testing.T) {
	inTime(t, Config{}, func(t *testing.T, l *memoryLog, f *Follower, _ *bytes.Buffer) {
		for n := range 3000 {
			l.write()
			if n%1500 == 0 {
				begin := time.Now()
				for {
					changed := f.Changed()
					if f.Replica().At() == l.head() {
						break
					}
					<-changed
				}
				if took := time.Since(begin); took > time.Second {
					t.Errorf("it took %s", took)
				}
			}
		}
		frames, err := f.Frames(t.Context(), revocation.Position{Epoch: l.head().Epoch}, 1)
		if err != nil || len(frames) != 1 {
			t.Fatal(len(frames), err)
		}
		want := fmt.Sprintf("id: %s\nevent: moon.risen\ndata: %s\n\n", frames[0].Position, frames[0].JSON)
		if string(frames[0].SSE) != want || bytes.ContainsAny(frames[0].JSON, "\r\n") {
			t.Errorf("%s", frames[0].SSE)
		}
	})
}

func TestStale(t *testing.T) {
	inTime(t, Config{}, func(t *testing.T, l *memoryLog, f *Follower, log *bytes.Buffer) {
		away := errors.New("away")
		stale := func(ctx context.Context, within time.Duration, cause string) {
			t.Helper()
			begin := time.Now()
			_, err := f.Fresh(ctx, 0)
			if took := time.Since(begin); !errors.Is(err, ErrStale) || !strings.Contains(err.Error(), cause) || took > within {
				t.Errorf("after %s: %v; want within %s: %s", took, err, within, cause)
			}
		}
		l.set(away, nil)
		stale(t.Context(), 0, "away")
		l.write()
		time.Sleep(time.Minute)
		if got := l.reads(); got > 30 {
			t.Errorf("%d reads in a minute of an outage", got)
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 1 {
			t.Errorf("%d warnings of one outage:\n%s", n, log)
		}
		l.set(nil, nil)
		if at, err := f.Fresh(t.Context(), 0); err != nil || at.Seq != 1 || f.Replica().At().Seq != 1 {
			t.Errorf("when it is back: %s, %v", at, err)
		}
		if n := strings.Count(log.String(), "again"); n != 1 {
			t.Errorf("%d words of its end:\n%s", n, log)
		}

		// No answer at all.
		l.set(nil, make(chan struct{}))
		stale(t.Context(), freshWait, "")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, away)
		defer cancel()
		if _, err := f.Fresh(ctx, 0); err != away {
			t.Errorf("a caller who left: %v", err)
		}
	})
}

func TestConfig(t *testing.T) {
	t.Parallel()
	_, err := New(Config{PollEvery: time.Minute, KeepBytes: 1}, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "PollEvery is 1m0s") || !strings.Contains(err.Error(), "KeepBytes is 1,") {
		t.Error(err)
	}
}

// Who cannot be served from memory shares pages with others, wherever in them it stands,
// and a page is small in bytes too.
func TestOlderFramesAreShared(t *testing.T) {
	inTime(t, Config{}, func(t *testing.T, l *memoryLog, f *Follower, _ *bytes.Buffer) {
		const n = 2*pageEvents + 10
		for range n {
			l.write()
		}
		if _, err := f.Fresh(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		after := func(seq int) revocation.Position {
			return revocation.Position{Epoch: l.end().Epoch, Seq: revocation.Seq(seq)}
		}
		f.forget()
		follow := func(from, limit int) error {
			for seq := from; seq < n; {
				frames, err := f.Frames(t.Context(), after(seq), limit)
				if err != nil || len(frames) == 0 || len(frames) > limit {
					return fmt.Errorf("after %d: %d frames, %w", seq, len(frames), err)
				}
				for _, frame := range frames {
					if seq++; frame.Position != after(seq) {
						return fmt.Errorf("%s, want %d", frame.Position, seq)
					}
				}
			}
			return nil
		}
		before := l.eventReads()
		var readers sync.WaitGroup
		for i := range 1000 {
			readers.Go(func() {
				if err := follow(i, 1+i%300); err != nil {
					t.Errorf("reader %d: %v", i, err)
				}
			})
		}
		readers.Wait()
		if got := l.eventReads() - before; got != 3 {
			t.Errorf("%d reads of three pages", got)
		}

		// The last page was read when it had ten events.
		for range 20 {
			l.write()
		}
		if _, err := f.Fresh(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		f.forget()
		if frames, err := f.Frames(t.Context(), after(n), 100); err != nil || len(frames) != 20 {
			t.Errorf("%d frames of a page that has grown, %v", len(frames), err)
		}

		// Its beginning is no longer there.
		f.pages = newPages()
		l.mu.Lock()
		l.gone = pageEvents + 7
		l.mu.Unlock()
		if frames, err := f.Frames(t.Context(), after(pageEvents+7), 100); err != nil || len(frames) != 100 {
			t.Errorf("%d frames after what is gone, %v", len(frames), err)
		}
		if _, err := f.Frames(t.Context(), after(pageEvents+6), 100); !errors.Is(err, ErrGone) {
			t.Errorf("what is gone: %v", err)
		}

		// The memory of pages is bounded, and so is that of what is returned at a time.
		l.mu.Lock()
		l.gone, l.data = 0, `"`+strings.Repeat("x", 20<<10)+`"`
		l.mu.Unlock()
		for range 3 * pageEvents {
			l.write()
		}
		end := int(l.end().Seq)
		if _, err := f.Fresh(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		f.forget()
		for seq := n + 20; seq < end; {
			frames, err := f.Frames(t.Context(), after(seq), 1000)
			bytes := 0
			for _, frame := range frames {
				bytes += len(frame.SSE)
			}
			if err != nil || len(frames) == 0 || bytes > maxFrames {
				t.Fatalf("%d frames of %d bytes, %v", len(frames), bytes, err)
			}
			seq += len(frames)
		}
		held := 0
		for _, p := range f.pages.all {
			held += p.bytes
		}
		if held != f.pages.bytes || held > keepPages && len(f.pages.all) > 1 || held == 0 {
			t.Errorf("%d bytes are held in %d pages, and said to be %d", held, len(f.pages.all), f.pages.bytes)
		}
	})
}

// A connection to a database that is gone may say nothing for ever.
func TestReadsHaveAnEnd(t *testing.T) {
	inTime(t, Config{}, func(t *testing.T, l *memoryLog, f *Follower, _ *bytes.Buffer) {
		stuck := func(is bool) {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.stuck = is
		}
		stuck(true)
		l.write()
		time.Sleep(2 * time.Second) // it reads
		stuck(false)
		begin := time.Now()
		for changed := f.Changed(); f.Replica().At() != l.end(); changed = f.Changed() {
			<-changed
		}
		if took := time.Since(begin); took > readTimeout+maxRetryWait {
			t.Errorf("it went on after %s", took)
		}

		f.forget()
		stuck(true)
		begin = time.Now()
		old := revocation.Position{Epoch: l.end().Epoch}
		if _, err := f.Frames(t.Context(), old, 1); !errors.Is(err, ErrStale) || time.Since(begin) != readTimeout {
			t.Errorf("old frames after %s: %v", time.Since(begin), err)
		}
		// The read goes on for another when the one who began it leaves.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := f.Frames(ctx, old, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("old frames for one who left: %v", err)
		}
		before := l.eventReads()
		if _, err := f.Frames(t.Context(), old, 1); !errors.Is(err, ErrStale) || l.eventReads() != before {
			t.Errorf("old frames for the other: %v, %d reads more", err, l.eventReads()-before)
		}
	})
}
