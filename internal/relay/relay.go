// Package relay feeds sinks from the log. It hides order, retry, cursors, and the
// choice of the one process that feeds a sink; a sink only delivers.
//
// # Invariants
//
// A sink gets every event after its cursor, in order, at least once. The cursor
// moves only past what the sink has confirmed. What one sink does or suffers
// delays no other sink and no writer.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/rescindhq/rescind/api/revocation"
)

// Log is what the relay reads.
type Log interface {
	// After returns up to limit events that follow seq, in order, without a gap.
	After(ctx context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error)
	// Head reads the position of the last event from the database.
	Head(ctx context.Context) (revocation.Position, error)
	// Grown returns a channel that is closed when the log has grown.
	Grown() <-chan struct{}
	// Cursors returns how far each sink has come.
	Cursors(ctx context.Context) (map[string]revocation.Seq, error)
	// Lead waits until this process may feed sink.
	Lead(ctx context.Context, sink string) (Lead, error)
}

// Lead is the right to feed one sink.
type Lead interface {
	// Context ends when the right is lost.
	Context() context.Context
	Cursor() (revocation.Position, error)
	// Save moves the cursor forward to seq, never back.
	Save(seq revocation.Seq) error
	Release()
}

// Config tunes the relay. The zero value is ready for production.
type Config struct {
	// Batch caps the events in one delivery. Default 1024, 1 to 10000.
	Batch int
	// BeatEvery is the time between heartbeats, and also how long an event waits at
	// most when every wake-up was lost. Default 1s, at least 10ms.
	BeatEvery time.Duration
	// SaveEvery is how often a cursor is saved while there is more to deliver: it
	// bounds what is delivered again after a crash. Default 100ms.
	SaveEvery time.Duration
	// MaxRetryWait caps the wait between two tries. Default 5s.
	MaxRetryWait time.Duration
	// Source is the CloudEvents source of heartbeats.
	Source string
}

// Relay feeds sinks. Make one with [New].
type Relay struct {
	cfg    Config
	events Log
	log    *slog.Logger
	sinks  []*feed
}

// Named is a sink and the name that its cursor and lock go by.
type Named struct {
	Name string
	Sink Sink
}

// New returns a relay from events to sinks, whose names must differ.
func New(cfg Config, events Log, sinks []Named, reg prometheus.Registerer, log *slog.Logger) (*Relay, error) {
	if cfg.Batch == 0 {
		cfg.Batch = 1024
	}
	for _, d := range []struct {
		p *time.Duration
		d time.Duration
	}{{&cfg.BeatEvery, time.Second}, {&cfg.SaveEvery, 100 * time.Millisecond}, {&cfg.MaxRetryWait, 5 * time.Second}} {
		if *d.p == 0 {
			*d.p = d.d
		}
	}
	var errs []error
	if cfg.Batch < 1 || cfg.Batch > 10000 {
		errs = append(errs, fmt.Errorf("batch is %d, must be 1 to 10000", cfg.Batch))
	}
	if cfg.BeatEvery < 10*time.Millisecond {
		errs = append(errs, fmt.Errorf("time between heartbeats is %s, must be at least 10ms", cfg.BeatEvery))
	}
	r := &Relay{cfg: cfg, events: events, log: log.With("component", "relay")}
	m := newMetrics(reg)
	names := make(map[string]bool)
	for _, s := range sinks {
		if names[s.Name] || s.Name == "" {
			errs = append(errs, fmt.Errorf("sink name %q is empty or used twice", s.Name))
			continue
		}
		names[s.Name] = true
		f := &feed{name: s.Name, sink: s.Sink, metrics: m.of(s.Name)}
		f.status.Name = s.Name
		f.set(Waiting, nil)
		r.sinks = append(r.sinks, f)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configure relay: %w", err)
	}
	return r, nil
}

// State is what a sink does in this process.
type State string

// The states of a sink.
const (
	Waiting  State = "waiting"  // another process feeds it, or Postgres cannot be asked
	Running  State = "running"  // this process feeds it
	Retrying State = "retrying" // this process feeds it, and the last try failed
	Stopped  State = "stopped"  // needs an operator
)

// Status is how a sink stands, as this process knows it.
type Status struct {
	Name  string
	State State
	// Seq is the last event that is safe at the far side.
	Seq revocation.Seq
	// Behind is how many events wait, and Lag since when the oldest of them waits.
	Behind int64
	Lag    time.Duration
	// Err is why the last try failed. Nil unless Retrying or Stopped.
	Err error
}

// Status returns the sinks in the order given to New.
func (r *Relay) Status() []Status {
	all := make([]Status, len(r.sinks))
	for i, f := range r.sinks {
		all[i] = f.get()
	}
	return all
}

// Run feeds the sinks until ctx ends, then returns nil. It returns an error only
// if going on would be wrong: [ErrRestored].
func (r *Relay) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	for _, f := range r.sinks {
		g.Go(func() error { return r.keep(gctx, f) })
	}
	g.Go(func() error { r.watchOthers(gctx); return nil })
	err := g.Wait()
	if ctx.Err() != nil && !errors.Is(err, ErrRestored) {
		return nil
	}
	return err
}

// feed is one sink and how it stands.
type feed struct {
	name    string
	sink    Sink
	metrics sinkMetrics

	mu     sync.Mutex
	status Status
	oldest time.Time // when the oldest event that waits was committed; zero if none
}

func (f *feed) set(state State, err error) (changed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	changed = f.status.State != state
	f.status.State, f.status.Err = state, err
	f.metrics.state(state)
	return changed
}

func (f *feed) get() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.status
	if !f.oldest.IsZero() {
		s.Lag = max(0, time.Since(f.oldest))
	}
	return s
}

// at records that the sink stands at seq, the log at head, and that the next event
// waits since oldest.
func (f *feed) at(seq, head revocation.Seq, oldest time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status.Seq, f.status.Behind, f.oldest = seq, max(0, int64(head-seq)), oldest
	lag := 0.0
	if !oldest.IsZero() {
		lag = max(0, time.Since(oldest).Seconds())
	}
	f.metrics.position(float64(seq), float64(f.status.Behind), lag)
}

// keep leads the sink whenever it may, until ctx ends.
func (r *Relay) keep(ctx context.Context, f *feed) error {
	wait := r.newWait()
	for {
		err := r.lead(ctx, f, wait.Reset)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, ErrRestored) {
			return fmt.Errorf("sink %s: %w", f.name, err)
		}
		if f.set(Waiting, nil) {
			r.log.Warn("no longer feeds the sink", "sink", f.name, "error", err)
		}
		if !sleep(ctx, wait.NextBackOff()) {
			return nil
		}
	}
}

func (r *Relay) newWait() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = 100*time.Millisecond, r.cfg.MaxRetryWait
	return b
}

// lead feeds the sink as long as this process has the right to.
func (r *Relay) lead(ctx context.Context, f *feed, led func()) error {
	lead, err := r.events.Lead(ctx, f.name)
	if err != nil {
		return err
	}
	defer lead.Release()
	if c, ok := f.sink.(Closer); ok {
		defer c.Close()
	}
	led()
	r.log.Info("feeds the sink", "sink", f.name)
	ctx = lead.Context()
	wait := r.newWait()
	for {
		err := r.feed(ctx, lead, f, func() {
			wait.Reset()
			if f.set(Running, nil) {
				r.log.Info("sink is up", "sink", f.name)
			}
		})
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, ErrRestored):
			return err
		case errors.As(err, new(permanentError)):
			f.set(Stopped, err)
			r.log.Error("sink stopped, nothing is lost; restart the service when the cause is mended", "sink", f.name, "error", err)
			<-ctx.Done()
			return context.Cause(ctx)
		}
		f.metrics.retries.Inc()
		if f.set(Retrying, err) {
			r.log.Warn("sink is down, nothing is lost; it is tried until it is back", "sink", f.name, "seq", f.get().Seq, "error", err)
		} else {
			r.log.Debug("sink is still down", "sink", f.name, "error", err)
		}
		if !sleep(ctx, wait.NextBackOff()) {
			return context.Cause(ctx)
		}
	}
}

// feed opens the sink and delivers until something fails. It calls up when something
// has got through to the far side; that Open succeeded does not say so.
func (r *Relay) feed(ctx context.Context, lead Lead, f *feed, up func()) error {
	cursor, err := lead.Cursor()
	if err != nil {
		return err
	}
	head, err := r.events.Head(ctx)
	if err != nil {
		return err
	}
	if head.Epoch == cursor.Epoch && head.Seq < cursor.Seq {
		return fmt.Errorf("the cursor is at %d, the log ends at %d: %w", cursor.Seq, head.Seq, ErrRestored)
	}
	at := cursor.Seq
	if o, ok := f.sink.(Opener); ok {
		if at, err = o.Open(ctx, cursor); err != nil {
			return err
		}
	}
	beat := time.NewTicker(r.cfg.BeatEvery)
	defer beat.Stop()
	saved, savedAt := cursor.Seq, time.Time{}
	for {
		grown := r.events.Grown()
		events, err := r.events.After(ctx, at, r.cfg.Batch)
		if err != nil {
			return err
		}
		more := len(events) == r.cfg.Batch
		if len(events) > 0 {
			last := events[len(events)-1]
			f.at(at, max(head.Seq, last.Seq), events[0].Time)
			if err := f.sink.Deliver(ctx, events); err != nil {
				if at > saved {
					_ = lead.Save(at) // only spares repeats
				}
				return err
			}
			up()
			f.metrics.delivered(events)
			at = last.Seq
			if at < head.Seq {
				f.at(at, head.Seq, last.Time) // the next one is not much younger
			} else {
				f.at(at, at, time.Time{})
			}
		}
		if at > saved && (!more || time.Since(savedAt) >= r.cfg.SaveEvery) {
			if err := lead.Save(at); err != nil {
				return err
			}
			saved, savedAt = at, time.Now()
		}
		if due, err := r.idle(ctx, more, grown, beat.C); err != nil {
			return err
		} else if due {
			if head, err = r.events.Head(ctx); err != nil {
				return err
			}
			if err := r.beat(ctx, f, head, at); err != nil {
				return err
			}
			up()
		}
	}
}

// idle waits until there may be more to deliver and reports whether a heartbeat is
// due. With more it does not wait.
func (r *Relay) idle(ctx context.Context, more bool, grown <-chan struct{}, beat <-chan time.Time) (due bool, err error) {
	if more {
		select {
		case <-beat:
			return true, nil
		default:
			return false, context.Cause(ctx)
		}
	}
	select {
	case <-beat:
		return true, nil
	case <-grown:
		return false, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

func (r *Relay) beat(ctx context.Context, f *feed, head revocation.Position, at revocation.Seq) error {
	b, ok := f.sink.(Beater)
	if !ok {
		return nil
	}
	return b.Beat(ctx, revocation.Heartbeat{
		Epoch: head.Epoch, ID: fmt.Sprintf("%s:hb:%s", head.Epoch, uuid.New()), Source: r.cfg.Source, Time: time.Now(),
		Head: head.Seq, Through: min(at, head.Seq),
	})
}

// watchOthers keeps the lag true of sinks that are slow here, are down, or are fed by
// another process.
func (r *Relay) watchOthers(ctx context.Context) {
	for sleep(ctx, r.cfg.BeatEvery) {
		var idle []*feed
		for _, f := range r.sinks {
			if f.get().State == Running {
				f.metrics.lag.Set(f.get().Lag.Seconds())
			} else {
				idle = append(idle, f)
			}
		}
		if len(idle) == 0 {
			continue
		}
		r.look(ctx, idle)
	}
}

// look asks the database where sinks stand. What fails is tried again soon, and told
// by the ledger.
func (r *Relay) look(ctx context.Context, sinks []*feed) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	head, err := r.events.Head(ctx)
	if err != nil {
		return
	}
	cursors, err := r.events.Cursors(ctx)
	if err != nil {
		return
	}
	for _, f := range sinks {
		seq := cursors[f.name]
		var oldest time.Time
		if seq < head.Seq {
			if next, err := r.events.After(ctx, seq, 1); err == nil && len(next) > 0 {
				oldest = next[0].Time
			}
		}
		if f.get().State != Running {
			f.at(seq, head.Seq, oldest)
		}
	}
}

const lookTimeout = 5 * time.Second

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
