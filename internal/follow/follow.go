// Package follow keeps the service's own replica at the head of its log. It hides
// loading, catching up, how fresh the replica is known to be, and the newest events,
// which are encoded once for all who follow them.
//
// # Invariants
//
// The replica is at one position of the log at any time, while it is loaded again too.
// Frames follow each other without a gap, and none is ahead of the replica: who has one
// finds at least its state here.
//
// # Decisions
//
// Everything that any number of callers need to know of the database comes from one
// read of the log's head at a time, and from reads of events that one goroutine makes.
// Events that are no longer in memory are read in pages that those who want them share,
// two at a time. No read may take for ever.
//
// What cannot be applied, because events are gone, the epoch is another or an event
// cannot be read, is got over by loading everything again: what was loaded has it.
package follow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// Source is the log and the state that it stands for.
type Source interface {
	// Load reads the whole state at one position: it calls at first, once, then the
	// others with everything there is.
	Load(ctx context.Context, at func(revocation.Position), revoked func(replica.Record), entity func(catalog.Entity)) error
	// After returns up to limit events that follow seq, in order, without a gap; none
	// when the log ends at seq. Its error is [ErrGone] if the next one was removed.
	After(ctx context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error)
	// Head reads the position of the last event from the database.
	Head(ctx context.Context) (revocation.Position, error)
	// Grown returns a channel that is closed when the log has grown.
	Grown() <-chan struct{}
}

// Config tunes a follower. The zero value is ready for production.
type Config struct {
	// PollEvery is how often the head is read when nothing else makes it known, hence
	// how old what is served at [Follower.Fresh]'s word may be. Default 1s, 10ms to 2s.
	PollEvery time.Duration
	// KeepBytes of the newest encoded events are kept for those who follow; older ones
	// are read from the database, and some MiB of them kept. Default 16 MiB, at least 1 MiB.
	KeepBytes int
	// History is that of the replica's [replica.StateConfig]: how many events its digests can go back by.
	// 0: none, and nothing can be compared.
	History int
}

func (c Config) withDefaults() (Config, error) {
	if c.PollEvery == 0 {
		c.PollEvery = time.Second
	}
	if c.KeepBytes == 0 {
		c.KeepBytes = 16 << 20
	}
	var errs []error
	if c.PollEvery < 10*time.Millisecond || c.PollEvery > 2*time.Second {
		errs = append(errs, fmt.Errorf("PollEvery is %s, must be 10ms to 2s", c.PollEvery))
	}
	if c.KeepBytes < 1<<20 {
		errs = append(errs, fmt.Errorf("KeepBytes is %d, must be at least %d", c.KeepBytes, 1<<20))
	}
	return c, errors.Join(errs...)
}

// The errors of [Follower.Frames].
var (
	// ErrGone: the log no longer has the events after this position, or it is of
	// another epoch.
	ErrGone = errors.New("the events after this position are gone")
	// ErrAhead: the position is above the log's head.
	ErrAhead = errors.New("the position is after the end of the log")
)

// ErrStale means that the database cannot be asked, or that the replica does not get
// to where the log is.
var ErrStale = errors.New("whether this is the newest state cannot be told now")

// Follower is the service's replica. Its methods may be called from any goroutine.
type Follower struct {
	cfg     Config
	source  Source
	log     *slog.Logger
	metrics *metrics
	replica *replica.State
	heads   *heads
	behind  chan struct{} // tells follow that the head is not where the replica is
	pages   *pages
	life    context.Context // of the reads of pages, until Run is over
	end     context.CancelCauseFunc

	mu      sync.Mutex
	ring    ring
	changed chan struct{}
}

// batch is how many events are read at once.
const batch = 1024

// New returns a follower that has loaded nothing.
func New(cfg Config, source Source, reg prometheus.Registerer, log *slog.Logger) (*Follower, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("configure follower: %w", err)
	}
	f := &Follower{
		cfg:     cfg,
		source:  source,
		log:     log.With("component", "follow"),
		replica: replica.NewState(replica.StateConfig{Records: true, History: cfg.History}),
		heads:   newHeads(),
		behind:  make(chan struct{}, 1),
		pages:   newPages(),
		changed: make(chan struct{}),
	}
	f.life, f.end = context.WithCancelCause(context.Background())
	f.ring.max = cfg.KeepBytes
	f.metrics = newMetrics(reg, f.replica)
	return f, nil
}

// Replica is the state, which Run keeps up to date.
func (f *Follower) Replica() *replica.State { return f.replica }

// Load fills the replica, within two minutes. It must have returned nil before anything
// else is called.
func (f *Follower) Load(ctx context.Context) error {
	if err := f.load(ctx); err != nil {
		return fmt.Errorf("load the state: %w", err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ring.reset(f.replica.At())
	f.announce()
	return nil
}

func (f *Follower) load(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, loadTimeout, fmt.Errorf("not loaded within %s", loadTimeout))
	defer cancel()
	// The replica wants the position before the rest, and the source tells it as it
	// begins: so the source is stopped there until the replica is ready.
	var l *replica.Loader
	loadErr := errors.New("the source told no position")
	next, stop := iter.Pull(func(yield func(revocation.Position) bool) {
		err := f.source.Load(ctx, func(at revocation.Position) { loadErr = nil; yield(at) },
			func(rec replica.Record) { l.Revocation(rec) }, func(e catalog.Entity) { l.Entity(e) })
		loadErr = cmp.Or(err, loadErr)
	})
	defer stop()
	at, ok := next()
	if !ok {
		return loadErr
	}
	return f.replica.Load(at, func(loader *replica.Loader) error {
		l = loader
		next()
		return loadErr
	})
}

// position is that of the last event that is in the replica and announced.
func (f *Follower) position() revocation.Position {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ring.end
}

// Run follows the log until ctx ends, then returns nil. It is called once.
func (f *Follower) Run(ctx context.Context) error {
	defer f.end(errStopped)
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { f.readHeads(gctx); return nil })
	g.Go(func() error { f.follow(gctx); return nil })
	return g.Wait()
}

// maxRetryWait caps the wait between two tries.
const maxRetryWait = 5 * time.Second

func newWait() *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = 50*time.Millisecond, maxRetryWait
	return b
}

func (f *Follower) follow(ctx context.Context) {
	wait, down := newWait(), false
	for {
		grown, err := f.catchUp(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			if down {
				f.log.Info("follows the log again", "at", f.replica.At().String())
				down = false
			}
			wait.Reset()
			select {
			case <-grown:
			case <-f.behind:
			case <-ctx.Done():
				return
			}
			continue
		}
		if !down {
			f.log.Warn("cannot follow the log, what is served grows old; it is tried until it is back",
				"at", f.replica.At().String(), "error", err)
			down = true
		}
		t := time.NewTimer(wait.NextBackOff())
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// catchUp applies what there is, and returns a channel that is closed when there is
// more.
func (f *Follower) catchUp(ctx context.Context) (<-chan struct{}, error) {
	for reloaded := false; ; {
		head := f.heads.newest() // before the events are read, so they must reach it
		grown := f.source.Grown()
		at := f.replica.At()
		events, err := f.after(ctx, at.Seq, batch)
		var reload error
		switch {
		case errors.Is(err, ErrGone):
			reload = err
		case err != nil:
			return nil, err
		case len(events) > 0:
			reload = f.apply(events)
		case head.Epoch != "" && head.Epoch != at.Epoch:
			reload = replica.ErrEpoch
		case head.Seq > at.Seq: // everything since was removed
			reload = ErrGone
		default:
			return grown, nil
		}
		switch {
		case reload == nil:
			continue
		case reloaded:
			return nil, fmt.Errorf("after loading the whole state: %w", reload)
		}
		f.log.Warn("loads the whole state again", "at", at.String(), "reason", reload)
		f.metrics.reloads.Inc()
		if err := f.Load(ctx); err != nil {
			return nil, err
		}
		reloaded = true
		f.heads.forget(f.replica.At().Epoch)
		f.log.Info("loaded the whole state", "at", f.replica.At().String())
	}
}

// apply makes events part of the state and of what is followed. The events before one
// that fails are.
func (f *Follower) apply(events []revocation.Event) error {
	frames := make([]Frame, 0, len(events))
	var failed error
	for _, e := range events {
		frame, err := encode(e)
		if err == nil {
			err = f.replica.Apply(e)
		}
		if err != nil {
			failed = err
			break
		}
		frames = append(frames, frame)
	}
	f.metrics.events.Add(float64(len(frames)))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ring.add(frames)
	f.announce()
	return failed
}

// Changed returns a channel that is closed when the replica has changed. Take it
// before looking, so that nothing is missed.
func (f *Follower) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// announce needs f.mu.
func (f *Follower) announce() {
	close(f.changed)
	f.changed = make(chan struct{})
}
