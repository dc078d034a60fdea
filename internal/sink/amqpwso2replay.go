package sink

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/wso2"
)

const (
	// replayQueue bounds the revocations that wait to be published once more. The
	// oldest give way: they are what the sweep has the most time to repair.
	replayQueue = 4096
	// replayTick is what a sweep gathers for one delivery where there is no spacing to
	// keep: waking up for each message would cost more than the messages.
	replayTick = 10 * time.Millisecond
	// replayMinWait and replayMaxWait are between two tries to reach the broker.
	replayMinWait = time.Second
	replayMaxWait = 30 * time.Second
)

// wso2Replay is the lane beside the ordered one. It publishes revocations of tokens a
// second time, apart from each other, and all live ones in slow sweeps. Only these:
// of the revocations, Choreo Connect needs no others and each message may cost it the
// one before.
//
// Nothing depends on it. What it cannot publish is tried until the lane ends, and what
// does not fit into its queue is left to the sweep.
type wso2Replay struct {
	key     string
	spacing time.Duration // 0: no second message
	every   time.Duration // 0: no sweeps
	live    func(context.Context) iter.Seq2[revocation.Revocation, error]
	log     *slog.Logger
	// publish returns nil when the broker has all messages. It is called by whoever has
	// the turn.
	publish func(context.Context, []amqp.Publishing) error
	hangUp  func() // after the last publish

	queue   chan revocation.Event
	dropped atomic.Int64 // since the queue was last empty
	// turn holds the time of the last message while nobody publishes. Who waits for it
	// gets it in the order of asking, so that neither lane starves the other.
	turn chan time.Time

	stop    context.CancelFunc // nil unless running
	running sync.WaitGroup
}

func newWSO2Replay(cfg AMQPWSO2Config, key string, publisher *amqpPublisher, log *slog.Logger) *wso2Replay {
	r := &wso2Replay{
		key: key, spacing: cfg.MinSpacing, every: cfg.SweepEvery, live: cfg.Live, log: log,
		hangUp: publisher.close, queue: make(chan revocation.Event, replayQueue), turn: make(chan time.Time, 1),
	}
	r.turn <- time.Time{}
	r.publish = func(ctx context.Context, messages []amqp.Publishing) error {
		if publisher.link == nil {
			if err := publisher.open(ctx); err != nil {
				return err
			}
		}
		return publisher.publish(ctx, func(send amqpSend) error {
			for _, m := range messages {
				if err := send(key, m); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return r
}

// start starts the lane unless it runs. It outlives ctx: a sink is opened again after
// each error, and a sweep that always began anew would never get to its end.
func (r *wso2Replay) start(ctx context.Context) {
	if r.stop != nil {
		return
	}
	ctx, r.stop = context.WithCancel(context.WithoutCancel(ctx))
	if r.spacing > 0 {
		r.running.Go(func() { r.repeat(ctx) })
	}
	if r.every > 0 {
		r.running.Go(func() { r.sweep(ctx) })
	}
}

// close ends the lane and forgets what waits: the next leader knows nothing of it
// either.
func (r *wso2Replay) close() {
	if r.stop == nil {
		return
	}
	r.stop()
	r.stop = nil
	r.running.Wait()
	r.hangUp()
	for len(r.queue) > 0 {
		<-r.queue
	}
	r.dropped.Store(0)
}

// add has the revocations among events published once more. It never waits.
func (r *wso2Replay) add(events []revocation.Event) {
	if r.spacing == 0 {
		return
	}
	for _, e := range events {
		if e.Type != "revocation."+string(revocation.KindToken) {
			continue
		}
		for added := false; !added; {
			select {
			case r.queue <- e:
				added = true
				continue
			default:
			}
			select {
			case <-r.queue:
				if r.dropped.Add(1) == 1 {
					r.log.Warn("revocations come faster than they can be published a second time; "+
						"some are left to the sweep, if there is one", "queued", replayQueue, "spacing", r.spacing)
				}
			default: // the lane took one meanwhile
			}
		}
	}
}

// repeat publishes what is in the queue.
func (r *wso2Replay) repeat(ctx context.Context) {
	for {
		select {
		case e := <-r.queue:
			r.send(ctx, func(now time.Time) []amqp.Publishing {
				messages, err := wso2.Messages(e, now)
				if err != nil || len(messages) == 0 {
					return nil // it has ended meanwhile; an error would have stopped the ordered lane
				}
				return []amqp.Publishing{wso2Publishing(wso2.ContentType, e.String(), messages[0].Body)}
			})
		case <-ctx.Done():
			return
		}
		if len(r.queue) == 0 {
			if n := r.dropped.Swap(0); n > 0 {
				r.log.Info("revocations are published a second time again", "left_to_the_sweep", n)
			}
		}
	}
}

// sweep publishes all live revocations again and again.
func (r *wso2Replay) sweep(ctx context.Context) {
	for ctx.Err() == nil {
		begun := time.Now()
		n, err := r.sweepOnce(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			r.log.Warn("a sweep ended early; the next one begins soon", "published", n, "error", err)
			replayPause(ctx, min(r.every, replayMaxWait))
		default:
			r.log.Debug("sweep ended", "published", n, "took", time.Since(begun))
			replayPause(ctx, r.every-time.Since(begun))
		}
	}
}

func (r *wso2Replay) sweepOnce(ctx context.Context) (published int, err error) {
	n, err := r.count(ctx)
	if err != nil || n == 0 {
		return 0, err
	}
	pace, size := r.pace(n)
	next := time.Now()
	batch := make([]revocation.Revocation, 0, size)
	flush := func() bool {
		if !replayPause(ctx, time.Until(next)) {
			return false
		}
		r.send(ctx, func(now time.Time) (messages []amqp.Publishing) {
			for _, rev := range batch {
				if m, ok := wso2.Replay(rev, now); ok {
					messages = append(messages, wso2Publishing(wso2.ContentType, "", m.Body))
				}
			}
			return messages
		})
		published += len(batch)
		next = next.Add(time.Duration(len(batch)) * pace)
		if now := time.Now(); now.Sub(next) > time.Second {
			next = now // after an outage there is nothing to be made good in haste
		}
		batch = batch[:0]
		return ctx.Err() == nil
	}
	for rev, err := range r.live(ctx) {
		if err != nil {
			return published, fmt.Errorf("list live revocations: %w", err)
		}
		if !replays(rev, time.Now()) {
			continue
		}
		if batch = append(batch, rev); len(batch) == size && !flush() {
			return published, context.Cause(ctx)
		}
	}
	if len(batch) > 0 {
		flush()
	}
	return published, context.Cause(ctx)
}

// pace is the time from one revocation to the next in a sweep of n, and how many are
// sent together.
func (r *wso2Replay) pace(n int) (pace time.Duration, size int) {
	pace = max(r.every/time.Duration(n), 1)
	if r.spacing == 0 {
		return pace, int(max(1, min(replayTick/pace, 1000)))
	}
	if pace < r.spacing {
		pace = r.spacing
		r.log.Warn("a sweep takes longer than it should: there are too many live revocations for the spacing",
			"revocations", n, "spacing", r.spacing, "takes", time.Duration(n)*pace)
	}
	return pace, 1
}

func (r *wso2Replay) count(ctx context.Context) (n int, err error) {
	now := time.Now()
	for rev, err := range r.live(ctx) {
		if err != nil {
			return 0, fmt.Errorf("count live revocations: %w", err)
		}
		if replays(rev, now) {
			n++
		}
	}
	return n, context.Cause(ctx)
}

// replays reports whether there is a message about r, without making it.
func replays(r revocation.Revocation, now time.Time) bool {
	return r.Target.Kind == revocation.KindToken && r.Exp > now.Unix() && (!r.Target.Digest || r.Signature != "")
}

// send publishes what build returns, not sooner than the spacing after what was sent
// before it, and tries until the broker has it or ctx ends. Build is asked at each try:
// seconds pass, and tokens expire.
func (r *wso2Replay) send(ctx context.Context, build func(now time.Time) []amqp.Publishing) {
	var last time.Time
	select {
	case last = <-r.turn:
	case <-ctx.Done():
		return
	}
	defer func() { r.turn <- last }()
	if !replayPause(ctx, time.Until(last.Add(r.spacing))) {
		return
	}
	for wait := replayMinWait; ; wait = min(2*wait, replayMaxWait) {
		messages := build(time.Now())
		if len(messages) == 0 {
			return
		}
		err := r.publish(ctx, messages)
		last = time.Now()
		if err == nil || ctx.Err() != nil {
			return
		}
		r.log.Warn("revocations are not published a second time; it is tried until it succeeds", "retry_in", wait, "error", err)
		if !replayPause(ctx, wait) {
			return
		}
	}
}

// replayPause waits for d, and reports whether ctx is alive then.
func replayPause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
