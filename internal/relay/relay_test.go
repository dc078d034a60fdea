package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
)

const epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"

// memLog is a log in memory, with one lock per sink as Postgres has.
type memLog struct {
	mu      sync.Mutex
	events  []revocation.Event
	grown   chan struct{}
	cursors map[string]revocation.Seq
	locks   map[string]chan struct{} // holds a value while the sink is led
	leads   map[string]context.CancelCauseFunc
	down    error
}

func newLog() *memLog {
	return &memLog{
		grown: make(chan struct{}), cursors: make(map[string]revocation.Seq),
		locks: make(map[string]chan struct{}), leads: make(map[string]context.CancelCauseFunc),
	}
}

func (l *memLog) add(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range n {
		seq := revocation.Seq(len(l.events) + 1)
		l.events = append(l.events, revocation.Event{Position: revocation.Position{Epoch: epoch, Seq: seq}, Time: time.Now()})
	}
	close(l.grown)
	l.grown = make(chan struct{})
}

func (l *memLog) setDown(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = err
}

func (l *memLog) After(_ context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down != nil {
		return nil, l.down
	}
	rest := l.events[seq:]
	return slices.Clone(rest[:min(limit, len(rest))]), nil
}

func (l *memLog) Head(context.Context) (revocation.Position, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return revocation.Position{Epoch: epoch, Seq: revocation.Seq(len(l.events))}, l.down
}

func (l *memLog) Grown() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.grown
}

func (l *memLog) Cursors(context.Context) (map[string]revocation.Seq, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := make(map[string]revocation.Seq)
	for sink, seq := range l.cursors {
		c[sink] = seq
	}
	return c, l.down
}

func (l *memLog) lock(sink string) chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.locks[sink] == nil {
		l.locks[sink] = make(chan struct{}, 1)
	}
	return l.locks[sink]
}

func (l *memLog) Lead(ctx context.Context, sink string) (Lead, error) {
	lock := l.lock(sink)
	select {
	case lock <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leads[sink] = cancel
	return &memLead{l, sink, ctx, cancel, lock}, nil
}

type memLead struct {
	log    *memLog
	sink   string
	ctx    context.Context
	cancel context.CancelCauseFunc
	lock   chan struct{}
}

func (l *memLead) Context() context.Context { return l.ctx }
func (l *memLead) Release()                 { l.cancel(context.Canceled); <-l.lock }

func (l *memLead) Cursor() (revocation.Position, error) {
	l.log.mu.Lock()
	defer l.log.mu.Unlock()
	return revocation.Position{Epoch: epoch, Seq: l.log.cursors[l.sink]}, l.log.down
}

func (l *memLead) Save(seq revocation.Seq) error {
	l.log.mu.Lock()
	defer l.log.mu.Unlock()
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	l.log.cursors[l.sink] = max(l.log.cursors[l.sink], seq)
	return l.log.down
}

// memSink keeps what it is given. Its fields are set before it is used.
type memSink struct {
	fail  func(attempt int) error // called for each delivery
	block bool                    // deliveries last until they are cancelled
	open  func(revocation.Position) (revocation.Seq, error)

	mu       sync.Mutex
	attempts int
	seqs     []revocation.Seq
	beats    []revocation.Heartbeat
	closed   int
}

func (s *memSink) Open(_ context.Context, cursor revocation.Position) (revocation.Seq, error) {
	if s.open != nil {
		return s.open(cursor)
	}
	return cursor.Seq, nil
}

func (s *memSink) Deliver(ctx context.Context, events []revocation.Event) error {
	s.mu.Lock()
	s.attempts++
	attempt := s.attempts
	s.mu.Unlock()
	if s.block {
		<-ctx.Done()
		return ctx.Err()
	}
	if s.fail != nil {
		if err := s.fail(attempt); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range events {
		s.seqs = append(s.seqs, e.Seq)
	}
	return nil
}

func (s *memSink) Beat(_ context.Context, h revocation.Heartbeat) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.beats = append(s.beats, h)
	return nil
}

func (s *memSink) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed++
}

func (s *memSink) got() []revocation.Seq {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.seqs)
}

func upTo(n revocation.Seq) []revocation.Seq {
	var s []revocation.Seq
	for i := revocation.Seq(1); i <= n; i++ {
		s = append(s, i)
	}
	return s
}

// start runs a relay in the bubble until stop.
func start(t *testing.T, cfg Config, log Log, sinks ...Named) (r *Relay, stop func() error) {
	t.Helper()
	cfg.Source = "https://km.example.com"
	r, err := New(cfg, log, sinks, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return r, func() error { cancel(); return <-done }
}

func stopped(t *testing.T, stop func() error) {
	t.Helper()
	if err := stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestDelivers(t *testing.T) {
	refused := errors.New("connection refused")
	tests := []struct {
		name      string
		failFirst int
		err       error
		state     State
		delivered bool
	}{
		{name: "first time", state: Running, delivered: true},
		{name: "down for a while", failFirst: 6, err: refused, state: Running, delivered: true},
		{name: "still down", failFirst: 1 << 30, err: refused, state: Retrying},
		{name: "refused for good", failFirst: 1 << 30, err: Permanent(refused), state: Stopped},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, sink := newLog(), &memSink{fail: func(attempt int) error {
					if attempt <= tt.failFirst {
						return tt.err
					}
					return nil
				}}
				other := &memSink{}
				r, stop := start(t, Config{Batch: 3}, log, Named{"sink", sink}, Named{"other", other})
				log.add(10)
				time.Sleep(time.Minute) // passes at once while all wait
				synctest.Wait()
				if diff := cmp.Diff(upTo(10), other.got()); diff != "" {
					t.Errorf("the other sink: %s", diff)
				}
				got := r.Status()[0]
				if got.State != tt.state || !errors.Is(got.Err, tt.err) && tt.state != Running {
					t.Errorf("status %+v, want %s with %v", got, tt.state, tt.err)
				}
				if tt.delivered {
					if diff := cmp.Diff(upTo(10), sink.got()); diff != "" {
						t.Error(diff)
					}
					if got.Behind != 0 || got.Lag != 0 || log.cursors["sink"] != 10 {
						t.Errorf("status %+v, cursor %d", got, log.cursors["sink"])
					}
				} else if sink.attempts > 60 {
					t.Errorf("%d tries in a minute: that the sink could be opened must not shorten the wait", sink.attempts)
				} else if got.Behind != 10 || got.Lag < 50*time.Second || log.cursors["sink"] != 0 {
					t.Errorf("status %+v, cursor %d", got, log.cursors["sink"])
				}
				stopped(t, stop)
				if sink.closed == 0 {
					t.Error("not closed")
				}
			})
		})
	}
}

// A delivery that failed is repeated from what was confirmed, not from the start.
func TestGoesOnFromTheConfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, sink := newLog(), &memSink{fail: func(attempt int) error {
			if attempt == 3 {
				return errors.New("cut")
			}
			return nil
		}}
		_, stop := start(t, Config{Batch: 2, SaveEvery: time.Nanosecond}, log, Named{"s", sink})
		log.add(7)
		time.Sleep(time.Minute)
		stopped(t, stop)
		got := sink.got()
		if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != 7 || len(got) > 9 {
			t.Errorf("delivered %d", got)
		}
	})
}

func TestHeartbeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, sink := newLog(), &memSink{}
		_, stop := start(t, Config{}, log, Named{"s", sink})
		time.Sleep(2500 * time.Millisecond)
		log.add(4)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		log.setDown(errors.New("postgres is away")) // no head, no heartbeat
		before := len(sink.beats)
		time.Sleep(10 * time.Second)
		log.setDown(nil)
		stopped(t, stop)
		if before != 4 || len(sink.beats) != before {
			t.Errorf("%d heartbeats in 4.5 s, %d while Postgres was away", before, len(sink.beats)-before)
		}
		ids := make(map[string]bool)
		for i, h := range sink.beats {
			want := revocation.Seq(0)
			if i >= 2 {
				want = 4
			}
			if h.Head != want || h.Through != want || h.Epoch != epoch {
				t.Errorf("heartbeat %d: %+v, want %d", i, h, want)
			}
			ids[h.ID] = true
		}
		if len(ids) != len(sink.beats) {
			t.Error("heartbeats share an id")
		}
	})
}

// Every wake-up is lost, and the events come all the same.
func TestPolls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, sink := newLog(), &memSink{}
		_, stop := start(t, Config{}, deaf{log}, Named{"s", sink})
		time.Sleep(time.Millisecond)
		log.add(3)
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		if diff := cmp.Diff(upTo(3), sink.got()); diff != "" {
			t.Error(diff)
		}
		stopped(t, stop)
	})
}

type deaf struct{ *memLog }

func (deaf) Grown() <-chan struct{} { return nil }

func TestHandOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLog()
		sinks := []*memSink{{}, {}}
		var relays []*Relay
		for _, s := range sinks {
			r, stop := start(t, Config{}, log, Named{"s", s})
			defer stopped(t, stop)
			relays = append(relays, r)
			time.Sleep(time.Millisecond) // the first leads
		}
		log.add(5)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if got := relays[1].Status()[0]; got.State != Waiting || got.Seq != 5 || len(sinks[1].got()) != 0 {
			t.Errorf("the one that waits: %+v, delivered %d", got, sinks[1].got())
		}
		log.leads["s"](errors.New("connection lost"))
		time.Sleep(time.Millisecond)
		log.add(5)
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if diff := cmp.Diff(upTo(10), append(sinks[0].got(), sinks[1].got()...)); diff != "" {
			t.Error(diff)
		}
		if relays[0].Status()[0].State != Waiting || relays[1].Status()[0].State != Running {
			t.Error("no hand-over")
		}
	})
}

// Losing the lock ends a delivery that hangs.
func TestLostLeadCancelsDelivery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, sink := newLog(), &memSink{block: true}
		_, stop := start(t, Config{}, log, Named{"s", sink})
		log.add(1)
		synctest.Wait()
		log.leads["s"](errors.New("connection lost"))
		synctest.Wait()
		if sink.closed != 1 {
			t.Errorf("closed %d times", sink.closed)
		}
		stopped(t, stop)
	})
}

func TestOpenDecidesWhereToGoOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := newLog()
		log.cursors["s"] = 2
		sink := &memSink{open: func(cursor revocation.Position) (revocation.Seq, error) {
			if cursor != (revocation.Position{Epoch: epoch, Seq: 2}) {
				return 0, fmt.Errorf("cursor %v", cursor)
			}
			return 5, nil
		}}
		log.add(8)
		_, stop := start(t, Config{}, log, Named{"s", sink})
		synctest.Wait()
		if diff := cmp.Diff([]revocation.Seq{6, 7, 8}, sink.got()); diff != "" {
			t.Error(diff)
		}
		stopped(t, stop)
	})
}

func TestRestoredLogStopsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sink := &memSink{open: func(revocation.Position) (revocation.Seq, error) {
			return 0, fmt.Errorf("the directory stands at 9, the log ends at 3: %w", ErrRestored)
		}}
		r, err := New(Config{}, newLog(), []Named{{"etcd", sink}, {"amqp", &memSink{}}}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Run(t.Context()); !errors.Is(err, ErrRestored) {
			t.Errorf("Run: %v, want ErrRestored", err)
		}
	})
}

// The cursor was saved before anybody noticed that the log had gone back.
func TestCursorBeyondTheLogStopsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, sink := newLog(), &memSink{}
		log.add(3)
		log.cursors["s"] = 5
		r, err := New(Config{}, log, []Named{{"s", sink}}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Run(t.Context()); !errors.Is(err, ErrRestored) || len(sink.got()) != 0 {
			t.Errorf("Run: %v after %d events, want ErrRestored", err, len(sink.got()))
		}
	})
}

// While a sink catches up its lag is that of the whole log, not of a batch.
func TestLagWhileCatchingUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, gate := newLog(), make(chan struct{})
		sink := &memSink{fail: func(int) error { <-gate; return nil }}
		log.add(100)
		time.Sleep(time.Minute)
		r, stop := start(t, Config{Batch: 10}, log, Named{"s", sink})
		for want := int64(100); want > 10; want -= 10 {
			synctest.Wait()
			if got := r.Status()[0]; got.Behind != want || got.Lag < time.Minute {
				t.Errorf("status %+v, want %d behind for a minute", got, want)
			}
			gate <- struct{}{}
		}
		close(gate)
		synctest.Wait()
		time.Sleep(time.Second) // to the next look, which finds nothing more
		synctest.Wait()
		if got := r.Status()[0]; got.Behind != 0 || got.Lag != 0 {
			t.Errorf("status %+v after it has caught up", got)
		}
		stopped(t, stop)
	})
}

func TestStartAndStop(t *testing.T) {
	t.Parallel()
	log := newLog()
	for range 10 {
		_, stop := start(t, Config{}, log, Named{"a", &memSink{}}, Named{"b", &memSink{}})
		stopped(t, stop)
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	_, err := New(Config{Batch: -1, BeatEvery: time.Nanosecond}, newLog(), []Named{{"a", nil}, {"a", nil}},
		prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	joined, ok := errors.Unwrap(err).(interface{ Unwrap() []error })
	if !ok || len(joined.Unwrap()) != 3 {
		t.Errorf("%v, want three mistakes", err)
	}
}
