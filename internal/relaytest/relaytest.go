// Package relaytest hides how a sink is shown to keep what the relay needs of
// it: a small relay that drives the sink, a network that misbehaves, and the
// rules for what must have reached the far side afterwards.
package relaytest

import (
	"context"
	"fmt"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
)

// Epoch is that of [Events].
const Epoch revocation.Epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"

const (
	// limit bounds each wait for what must come.
	limit = 30 * time.Second
	// soon bounds what must end with its context. It is less than clients' own
	// limits for a silent peer, which would end it as well.
	soon = 10 * time.Second
)

// Far is a sink and the far side that it feeds, both of one test's own and empty.
type Far struct {
	// Sink reaches the far side through Proxy and in no other way. Its time
	// limits are a minute or longer.
	Sink  relay.Sink
	Proxy *Proxy
	// Next waits for the next event to reach the far side, in the order in which
	// they get there, repeats included. It does not use Proxy.
	Next func(context.Context) (revocation.Seq, error)
	// Commit, if set, is told of events that are now in the log, before they are
	// delivered.
	Commit func([]revocation.Event)
	// Secrets must not be in any error.
	Secrets []string
}

var start = time.Now().Truncate(time.Second)

// Events are n revocations of one token each, from seq first on, whose tokens
// live for another hour. A seq's event is always the same.
func Events(first revocation.Seq, n int) []revocation.Event {
	events := make([]revocation.Event, 0, n)
	for seq := first; seq < first+revocation.Seq(n); seq++ {
		e, err := revocation.NewEvent(revocation.Revocation{
			ID:       fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012x", seq),
			Target:   revocation.Target{Kind: revocation.KindToken, Iss: "https://km.example.com", ID: fmt.Sprintf("at-%016x", seq)},
			Tenant:   revocation.SuperTenant,
			Exp:      start.Add(time.Hour).Unix(),
			ClientID: "app-2",
			Reason:   "client",
		})
		if err != nil {
			panic(err) // the literal above cannot be encoded
		}
		e.Position = revocation.Position{Epoch: Epoch, Seq: seq}
		e.Previous = seq - 1
		e.Source = "https://km.example.com"
		e.Time = start
		e.Traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
		events = append(events, e)
	}
	return events
}

// Sink runs the suite. Each test in it opens a far side of its own.
func Sink(t *testing.T, open func(t *testing.T) Far) {
	tests := []struct {
		name string
		run  func(*drive)
	}{
		{"order", testOrder},
		{"nothing", testNothing},
		{"repeat", testRepeat},
		{"close", testClose},
		{"cut", testCut},
		{"cut while idle", testCutIdle},
		{"heal", testHeal},
		{"cancel deliver", testCancelDeliver},
		{"cancel open", testCancelOpen},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			far := open(t)
			NoLeaks(t)
			d := &drive{t: t, far: far, ctx: t.Context()}
			defer d.close()
			tt.run(d)
		})
	}
}

func testOrder(d *drive) {
	d.open()
	for _, n := range []int{1, 1, 2, 500, 1, 2000, 3} {
		if err := d.deliver(n); err != nil {
			d.t.Fatalf("deliver %d events: %v", n, err)
		}
	}
	d.wantExactly(1, d.at)
}

func testNothing(d *drive) {
	d.open()
	if err := d.far.Sink.Deliver(d.ctx, nil); err != nil {
		d.t.Fatalf("deliver no events: %v", err)
	}
	d.catchUp(3)
	d.wantExactly(1, 3)
}

// testRepeat is a process that dies after a delivery and before it has noted it.
func testRepeat(d *drive) {
	d.catchUp(100)
	d.want(100)
	d.close()
	d.cursor = 40
	d.open()
	d.catchUp(150)
	d.want(150)
}

func testClose(d *drive) {
	d.close()
	d.catchUp(5)
	d.close()
	d.close()
	d.catchUp(10)
	d.wantExactly(1, 10)
}

func testCut(d *drive) {
	d.catchUp(10)
	last := revocation.Seq(10)
	for _, bytes := range []int{1, 700, 5_000, 40_000} {
		d.far.Proxy.CutAfter(bytes)
		last += 1000
		if err := d.deliver(1000); err == nil {
			d.t.Fatalf("deliver with the network cut after %d bytes: no error", bytes)
		}
		d.far.Proxy.Heal()
		d.catchUp(last)
		d.want(last)
	}
}

func testCutIdle(d *drive) {
	for last := revocation.Seq(1); last <= 5; last++ {
		d.catchUp(last)
		d.want(last)
		d.far.Proxy.Cut()
	}
}

func testHeal(d *drive) {
	d.catchUp(1)
	d.far.Proxy.Refuse()
	for range 3 {
		ctx, cancel := context.WithTimeout(d.ctx, time.Second)
		err := d.tryOpen(ctx)
		if err == nil {
			err = d.tryDeliver(ctx, 1)
		}
		cancel()
		if err == nil {
			d.t.Fatal("delivered while the far side refuses connections")
		}
	}
	d.far.Proxy.Heal()
	d.catchUp(20)
	d.want(20)
}

func testCancelDeliver(d *drive) {
	d.catchUp(1)
	held := d.far.Proxy.Stall()
	d.cancelled(held, func(ctx context.Context) error { return d.tryDeliver(ctx, 1000) })
	d.far.Proxy.Heal()
	d.catchUp(1500)
	d.want(1500)
}

func testCancelOpen(d *drive) {
	if _, ok := d.far.Sink.(relay.Opener); !ok {
		return // such a sink has nothing that could hang
	}
	held := d.far.Proxy.Stall()
	d.cancelled(held, d.tryOpen)
	d.far.Proxy.Heal()
	d.catchUp(10)
	d.want(10)
}

// drive is a relay of one sink, without its backoff.
type drive struct {
	t      *testing.T
	far    Far
	ctx    context.Context
	cursor revocation.Seq // what the log has noted
	opened bool
	at     revocation.Seq // what the sink stands at
	got    []revocation.Seq
}

func (d *drive) tryOpen(ctx context.Context) error {
	d.opened, d.at = false, d.cursor
	if o, ok := d.far.Sink.(relay.Opener); ok {
		at, err := o.Open(ctx, revocation.Position{Epoch: Epoch, Seq: d.cursor})
		if err != nil {
			return d.checked(err)
		}
		d.at = at
	}
	d.opened = true
	return nil
}

func (d *drive) tryDeliver(ctx context.Context, n int) error {
	events := Events(d.at+1, n)
	if d.far.Commit != nil {
		d.far.Commit(events)
	}
	if err := d.far.Sink.Deliver(ctx, events); err != nil {
		d.opened = false
		return d.checked(err)
	}
	d.at += revocation.Seq(n)
	d.cursor = d.at
	return nil
}

func (d *drive) open() {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.ctx, limit)
	defer cancel()
	if err := d.tryOpen(ctx); err != nil {
		d.t.Fatalf("open: %v", err)
	}
}

func (d *drive) deliver(n int) error {
	ctx, cancel := context.WithTimeout(d.ctx, limit)
	defer cancel()
	return d.tryDeliver(ctx, n)
}

// catchUp goes on, over errors, until the sink stands at last.
func (d *drive) catchUp(last revocation.Seq) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.ctx, limit)
	defer cancel()
	var err error
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for ; ctx.Err() == nil; <-retry.C {
		if !d.opened {
			if err = d.tryOpen(ctx); err != nil {
				continue
			}
		}
		if d.at < last {
			if err = d.tryDeliver(ctx, int(last-d.at)); err != nil {
				continue
			}
		}
		return
	}
	d.t.Fatalf("the sink does not get to %d, it stands at %d; last error: %v", last, d.at, err)
}

// cancelled runs f, ends its context once bytes of it are held, and wants it to
// return an error.
func (d *drive) cancelled(held <-chan struct{}, f func(context.Context) error) {
	d.t.Helper()
	ctx, cancel := context.WithCancel(d.ctx)
	defer cancel()
	result := make(chan error, 1)
	go func() { result <- f(ctx) }()
	select {
	case <-held:
	case err := <-result:
		d.t.Fatalf("returned before anything was sent: %v", err)
	case <-time.After(limit):
		d.t.Fatal("nothing was sent")
	}
	cancel()
	select {
	case err := <-result:
		if err == nil {
			d.t.Fatal("no error although nothing can have arrived")
		}
	case <-time.After(soon):
		d.t.Fatal("still running after its context ended")
	}
}

func (d *drive) close() {
	if c, ok := d.far.Sink.(relay.Closer); ok {
		c.Close()
	}
	d.opened = false
}

// checked fails the test if err tells a secret.
func (d *drive) checked(err error) error {
	d.t.Helper()
	for _, secret := range d.far.Secrets {
		if strings.Contains(err.Error(), secret) {
			d.t.Errorf("an error tells a secret: %v", err)
		}
	}
	return err
}

// receive reads what reached the far side until last is there.
func (d *drive) receive(last revocation.Seq) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.ctx, limit)
	defer cancel()
	for {
		seq, err := d.far.Next(ctx)
		if err != nil {
			d.t.Fatalf("await %d at the far side after %d events: %v", last, len(d.got), err)
		}
		d.got = append(d.got, seq)
		if seq == last {
			return
		}
	}
}

// want wants 1 to last to have reached the far side, each for the first time in
// order: nothing is missing, and what is repeated was there before.
func (d *drive) want(last revocation.Seq) {
	d.t.Helper()
	d.receive(last)
	var seen revocation.Seq
	for i, seq := range d.got {
		if seq > seen+1 {
			d.t.Fatalf("event %d at the far side is seq %d, although %d was not there", i, seq, seen+1)
		}
		seen = max(seen, seq)
	}
}

// wantExactly wants first to last in order and nothing else.
func (d *drive) wantExactly(first, last revocation.Seq) {
	d.t.Helper()
	d.receive(last)
	var want []revocation.Seq
	for seq := first; seq <= last; seq++ {
		want = append(want, seq)
	}
	if diff := cmp.Diff(want, d.got); diff != "" {
		d.t.Fatalf("seqs at the far side (-want +got):\n%s", diff)
	}
}

// NoLeaks fails t if goroutines are left, after its other cleanups, that were
// started from the goroutine that calls NoLeaks, by it or by one of those.
func NoLeaks(t *testing.T) {
	const key = "relaytest"
	pprof.SetGoroutineLabels(pprof.WithLabels(context.Background(), pprof.Labels(key, t.Name())))
	t.Cleanup(func() {
		pprof.SetGoroutineLabels(context.Background())
		mark := fmt.Sprintf("%q:%q", key, t.Name())
		bound := time.After(limit)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			var b strings.Builder
			if err := pprof.Lookup("goroutine").WriteTo(&b, 1); err != nil {
				t.Fatal(err)
			}
			var left []string
			for stack := range strings.SplitSeq(b.String(), "\n\n") {
				if strings.Contains(stack, mark) {
					left = append(left, stack)
				}
			}
			if len(left) == 0 {
				return
			}
			select {
			case <-tick.C:
			case <-bound:
				t.Fatalf("goroutines are left:\n%s", strings.Join(left, "\n\n"))
			}
		}
	})
}
