package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/pgtest"
)

const epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"

var (
	gw1 = authn.Account{Username: "gw1", Role: "gateway", Tenant: revocation.Tenant{Domain: "carbon.super"}, ExtraTenants: []string{"a.example"}}
	gw2 = authn.Account{Username: "gw2", Role: "gateway", Tenant: revocation.Tenant{Domain: "b.example"}}
)

func at(seq revocation.Seq) revocation.Position { return revocation.Position{Epoch: epoch, Seq: seq} }

// start returns a fleet that runs until stop is called, at the latest when the test ends.
func start(t testing.TB, pool *pgxpool.Pool, cfg Config, state State) (f *Fleet, stop func()) {
	t.Helper()
	f, err := New(cfg, pool, state, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return f, run(t, f)
}

func run(t testing.TB, f *Fleet) (stop func()) {
	t.Helper()
	if err := f.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// node is a gateway that reports to whichever fleet it is told.
type node struct {
	t    testing.TB
	id   string
	by   authn.Account
	base replica.Report

	mu       sync.Mutex
	at       revocation.Position
	follows  bool // reaches at once what it is asked to confirm
	digest   func(replica.DigestRequest) *replica.Digest
	last     *replica.Digest
	confirms int
	loads    []string
	requests []replica.DigestRequest
	moved    chan struct{}
	err      error
}

func newNode(t testing.TB, id string, by authn.Account, p revocation.Position) *node {
	return &node{t: t, id: id, by: by, at: p, moved: make(chan struct{}, 1), base: replica.Report{
		Instance: uuid.NewString(), Started: time.Now().UnixMilli(), Version: "test", AgeMS: 5, Ready: true,
	}}
}

func (n *node) report() replica.Report {
	n.mu.Lock()
	defer n.mu.Unlock()
	r := n.base
	r.Position, r.Digest = n.at, n.last
	return r
}

func (n *node) move(p revocation.Position) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.at = p
	kick(n.moved)
}

// once reports without waiting for the next time.
func (n *node) once(f *Fleet) error {
	_, err := f.Report(n.t.Context(), n.by, n.id, n.report(), false)
	return err
}

// run reports to f until stop is called, or a report fails.
func (n *node) run(f *Fleet) (stop func()) {
	n.t.Helper()
	in, err := f.Report(n.t.Context(), n.by, n.id, n.report(), false)
	if err != nil {
		n.t.Fatalf("report of %s: %v", n.id, err)
	}
	in.NextMS = 0
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n.obey(ctx, in); ctx.Err() == nil; {
			in, err := f.Report(ctx, n.by, n.id, n.report(), true)
			if err != nil {
				n.mu.Lock()
				n.err = err
				n.mu.Unlock()
				return
			}
			n.obey(ctx, in)
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	n.t.Cleanup(stop)
	return stop
}

func (n *node) obey(ctx context.Context, in replica.Instructions) {
	n.mu.Lock()
	if in.Load != "" && (len(n.loads) == 0 || n.loads[len(n.loads)-1] != in.Load) {
		n.loads = append(n.loads, in.Load)
	}
	if in.Digest != nil {
		n.requests = append(n.requests, *in.Digest)
		if n.digest != nil {
			n.last = n.digest(*in.Digest)
		}
	}
	wait := false
	if in.Confirm.Epoch != "" {
		n.confirms++
		if n.follows {
			n.at = in.Confirm
		}
		wait = !applied(n.at, in.Confirm)
	}
	n.mu.Unlock()
	if wait {
		select {
		case <-n.moved:
		case <-time.After(300 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	if in.NextMS > 0 {
		pause(ctx, time.Duration(in.NextMS)*time.Millisecond)
	}
}

// await waits until ok is true of what f knows.
func await(t testing.TB, f *Fleet, what string, ok func() bool) {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		changed := f.Changed()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-time.After(100 * time.Millisecond): // not all that is waited for is announced
		case <-limit:
			t.Fatalf("waited 20 s for this: %s", what)
		}
	}
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// brief is who has what of a barrier, in one line each.
func brief(r BarrierResult) []string {
	var all []string
	for _, c := range r.Gateways {
		all = append(all, fmt.Sprintf("%s %s %t", c.ID, c.Standing, c.Applied))
	}
	return all
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	_, err := New(Config{ReportEvery: time.Millisecond, Lease: time.Microsecond, MaxHeld: -1}, nil, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	for _, want := range []string{"ReportEvery is 1ms", "Lease 1µs", "MaxHeld is -1"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to name %q", err, want)
		}
	}
}

func TestReportsAreChecked(t *testing.T) {
	t.Parallel()
	f, _ := start(t, pgtest.New(t), Config{}, nil)
	long := strings.Repeat("é", 700)
	tests := []struct {
		name   string
		change func(*replica.Report)
		want   string // in the error, empty: none
	}{
		{"good", func(r *replica.Report) {}, ""},
		{"nothing known", func(r *replica.Report) { r.Position, r.AgeMS = revocation.Position{}, -1 }, ""},
		{"instance", func(r *replica.Report) { r.Instance = "me" }, "instance"},
		{"started", func(r *replica.Report) { r.Started = 0 }, "started"},
		{"seq", func(r *replica.Report) { r.Seq = -1 }, "seq is -1"},
		{"seq without epoch", func(r *replica.Report) { r.Epoch = "" }, "epoch"},
		{"epoch", func(r *replica.Report) { r.Epoch = revocation.Epoch(strings.ToUpper(epoch)) }, "epoch"},
		{"age", func(r *replica.Report) { r.AgeMS = -2 }, "age_ms"},
		{"version", func(r *replica.Report) { r.Version = "\xff" }, "version"},
		{"labels", func(r *replica.Report) {
			r.Labels = map[string]string{}
			for i := range 17 {
				r.Labels[fmt.Sprint(i)] = ""
			}
		}, "17 labels"},
		{"label", func(r *replica.Report) { r.Labels = map[string]string{"a": "\x00"} }, "label"},
		{"tenants", func(r *replica.Report) { r.Tenants = make([]string, 501) }, "501 tenants"},
		{"long tenants", func(r *replica.Report) { r.Tenants = slices.Repeat([]string{strings.Repeat("a", 200)}, 123) }, "24600 bytes"},
		{"feeds", func(r *replica.Report) { r.Feeds = make([]replica.FeedStatus, 17) }, "17 feeds"},
		{"heard", func(r *replica.Report) { r.Feeds = []replica.FeedStatus{{Name: "sse", Heard: -1}} }, "heard"},
		{"digest", func(r *replica.Report) { r.Digest = &replica.Digest{Cutoff: 61} }, "digest"},
		{"digest ahead", func(r *replica.Report) { r.Digest = &replica.Digest{Cutoff: time.Now().Unix()/60*60 + 15*60} }, "cutoff"},
		{"wrong clock", func(r *replica.Report) {
			r.Started = time.Now().Add(1000 * time.Hour).UnixMilli()
			r.Feeds = []replica.FeedStatus{{Name: "sse", Heard: r.Started}}
		}, ""},
		{"much", func(r *replica.Report) {
			r.Labels = map[string]string{}
			for i := range 16 {
				r.Labels[fmt.Sprint(i)] = strings.Repeat("x", 255)
				r.Feeds = append(r.Feeds, replica.FeedStatus{Name: "sse", Error: long})
			}
		}, ""},
		{"long errors", func(r *replica.Report) {
			r.Error, r.Feeds = "x\x00"+long, []replica.FeedStatus{{Name: "sse", Error: long}}
		}, ""},
	}
	for _, tt := range tests {
		n := newNode(t, "checked", gw1, at(3))
		r := n.report()
		tt.change(&r)
		_, err := f.Report(t.Context(), gw1, strings.ReplaceAll(tt.name, " ", "-"), r, false)
		if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, ErrReport) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
	g, ok := f.Gateway("long-errors")
	if !ok || len(g.Report.Error) != 1024 || strings.ContainsRune(g.Report.Error, 0) || len(g.Report.Feeds[0].Error) != 1024 {
		t.Errorf("errors of %d and %d bytes are kept, want 1024 without control characters", len(g.Report.Error), len(g.Report.Feeds[0].Error))
	}
	g, _ = f.Gateway("much")
	size := 0
	for i, feed := range g.Report.Feeds {
		size += len(feed.Error) + len(g.Report.Labels[fmt.Sprint(i)])
	}
	if size > maxKept || size < maxKept/2 {
		t.Errorf("%d bytes are kept of labels and errors, want at most %d", size, maxKept)
	}
	// Of two whose clocks are wrong one is believed, always the same.
	g, _ = f.Gateway("wrong-clock")
	if soon := time.Now().Add(49 * time.Hour).UnixMilli(); g.Report.Started > soon || g.Report.Feeds[0].Heard > soon {
		t.Errorf("started %d, heard %d: want times not much ahead", g.Report.Started, g.Report.Feeds[0].Heard)
	}
	for _, id := range []string{"", "-a", ".a", "a/b", "ä", strings.Repeat("a", 129)} {
		if err := newNode(t, id, gw1, at(1)).once(f); !errors.Is(err, ErrID) {
			t.Errorf("id %q: got %v, want ErrID", id, err)
		}
	}
}

func TestOwnersAndInstances(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	a, _ := start(t, pool, Config{MaxGateways: 4, ReportEvery: 100 * time.Millisecond, Lease: time.Second}, nil)
	b, _ := start(t, pool, Config{MaxGateways: 4, ReportEvery: 100 * time.Millisecond, Lease: time.Second}, nil)
	mine := newNode(t, "edge-1", gw1, at(5))
	if err := mine.once(a); err != nil {
		t.Fatal(err)
	}
	for i, f := range []*Fleet{a, b, b} {
		if err := newNode(t, "edge-1", gw2, at(9)).once(f); !errors.Is(err, ErrOwned) {
			t.Errorf("report %d for another's id: got %v, want ErrOwned", i, err)
		}
	}
	if g, _ := a.Gateway("edge-1"); g.Report.Seq != 5 || g.Account != "gw1" || !g.Serves("a.example") || g.Serves("b.example") {
		t.Errorf("it is %+v after another's reports", g)
	}
	if err := newNode(t, "edge-2", gw1, at(5)).once(a); err != nil {
		t.Fatal(err)
	}
	if err := newNode(t, "edge-3", gw1, at(5)).once(a); !errors.Is(err, ErrTooMany) {
		t.Errorf("a third gateway of an account that may have half of four: got %v, want ErrTooMany", err)
	}

	twin := newNode(t, "edge-1", gw1, at(7))
	twin.base.Started = mine.base.Started + 1
	if err := twin.once(a); err != nil {
		t.Fatalf("the later one: %v", err)
	}
	if g, _ := a.Gateway("edge-1"); !g.Conflict.IsZero() {
		t.Error("a restart is taken for a conflict")
	}
	if err := mine.once(a); !errors.Is(err, ErrInstance) {
		t.Errorf("the earlier one: got %v, want ErrInstance", err)
	}
	if g, _ := a.Gateway("edge-1"); g.Conflict.IsZero() || g.Report.Seq != 7 {
		t.Errorf("conflict at %v, seq %d: want one, and 7", g.Conflict, g.Report.Seq)
	}
	// A process that leaves takes nothing from one that has followed it.
	bye := mine.report()
	bye.Leaving = true
	if _, err := a.Report(t.Context(), gw1, "edge-1", bye, true); err != nil {
		t.Fatal(err)
	}
	if _, ok := a.Gateway("edge-1"); !ok {
		t.Error("the earlier one's leaving removes the later one")
	}
	// When the later one is silent, its clock may have been wrong.
	await(t, a, "the later one is lost", func() bool { g, _ := a.Gateway("edge-1"); return g.Standing == Lost })
	if err := mine.once(a); err != nil {
		t.Errorf("after the later one was lost: %v", err)
	}
}

func TestLeaveAndForget(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	a, _ := start(t, pool, Config{}, nil)
	b, _ := start(t, pool, Config{}, nil)
	rows := func() (n int) {
		if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.gateways WHERE left_at IS NULL`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	plain, canary := newNode(t, "plain", gw1, at(5)), newNode(t, "with-canary", gw1, at(5))
	plain.run(a)
	stop := canary.run(a)
	if err := b.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.SetCanary(t.Context(), "with-canary", "https://edge/canary"); err != nil {
		t.Fatal(err)
	}
	want := &CanaryResult{Outcome: "refused", At: time.Now().UTC().Truncate(time.Millisecond), RefusedMS: 12}
	if err := b.RecordCanaries(t.Context(), map[string]CanaryResult{"with-canary": *want, "plain": *want, "no": *want}); err != nil {
		t.Fatal(err)
	}
	await(t, a, "what another process has set is known", func() bool {
		g, _ := a.Gateway("with-canary")
		return g.CanaryURL == "https://edge/canary" && cmp.Equal(g.Canary, want)
	})
	if g, _ := b.Gateway("plain"); g.Canary != nil {
		t.Errorf("one without a canary has the result %+v", g.Canary)
	}
	stop()
	bye := canary.report()
	bye.Leaving = true
	if _, err := a.Report(t.Context(), gw1, "with-canary", bye, true); err != nil {
		t.Fatal(err)
	}
	gone := func() bool { _, ok := b.Gateway("with-canary"); return !ok }
	await(t, b, "one that left is gone in the other process", gone)
	if n := rows(); n != 1 {
		t.Errorf("%d rows are left, want 1", n)
	}
	canary.base.Instance = uuid.NewString()
	if err := newNode(t, "with-canary", gw2, at(1)).once(a); !errors.Is(err, ErrOwned) {
		t.Errorf("the id of one that left and has a canary: got %v, want ErrOwned", err)
	}
	if err := canary.once(b); err != nil {
		t.Fatal(err)
	}
	if g, _ := b.Gateway("with-canary"); g.CanaryURL == "" {
		t.Error("its canary is not there when it is back")
	}

	// Forgotten by a process that it does not report to, it is there again with its next report, and if
	// it does not report, anyone may have the id.
	if err := b.Forget(t.Context(), "plain"); err != nil {
		t.Fatal(err)
	}
	await(t, a, "it is there again", func() bool { _, ok := a.Gateway("plain"); return ok && rows() == 2 })
	if err := b.Forget(t.Context(), "with-canary"); err != nil {
		t.Fatal(err)
	}
	if err := newNode(t, "with-canary", gw2, at(1)).once(b); err != nil {
		t.Errorf("a forgotten id: %v", err)
	}
	for _, err := range []error{b.Forget(t.Context(), "no"), b.SetCanary(t.Context(), "no", "")} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v, want ErrNotFound", err)
		}
	}
}

func TestBarrierAcrossProcesses(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	cfg := Config{ReportEvery: time.Minute, Lease: 3 * time.Minute} // whoever is heard of was asked
	a, _ := start(t, pool, cfg, nil)
	b, _ := start(t, pool, cfg, nil)
	watcher, _ := start(t, pool, Config{Observe: true, ReportEvery: cfg.ReportEvery, Lease: cfg.Lease}, nil)
	one, two, slow := newNode(t, "g1", gw1, at(5)), newNode(t, "g2", gw2, at(5)), newNode(t, "g3", gw2, at(5))
	one.follows, two.follows = true, true
	one.run(a)
	two.run(b)
	slow.run(b)
	for name, f := range map[string]*Fleet{"where one reports": a, "observer": watcher} {
		r, err := f.Wait(within(t, 30*time.Second), Barrier{Position: at(8), Select: func(g *Gateway) bool { return g.ID != "g3" }})
		if err != nil || !r.Reached {
			t.Fatalf("%s: reached %t, %v: %v", name, r.Reached, err, brief(r))
		}
		if diff := cmp.Diff([]string{"g1 live true", "g2 live true"}, brief(r)); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
	}
	r, err := a.Wait(within(t, 700*time.Millisecond), Barrier{Position: at(8)})
	if err != nil || r.Reached {
		t.Fatalf("reached %t with one that has not applied it, %v", r.Reached, err)
	}
	if diff := cmp.Diff([]string{"g1 live true", "g2 live true", "g3 live false"}, brief(r)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if slow.mu.Lock(); slow.confirms > 10 {
		t.Errorf("one that has not applied it was asked %d times", slow.confirms)
	}
	slow.mu.Unlock()

	// One that comes meanwhile counts.
	done := make(chan BarrierResult, 1)
	ctx := within(t, 30*time.Second)
	go func() {
		r, err := watcher.Wait(ctx, Barrier{Position: at(9)})
		if err != nil {
			t.Error(err)
		}
		done <- r
	}()
	await(t, b, "the gateway is asked", func() bool { slow.mu.Lock(); defer slow.mu.Unlock(); return slow.confirms > 0 })
	late := newNode(t, "g4", gw1, at(2))
	late.run(a)
	slow.move(at(9))
	await(t, watcher, "the late one is known", func() bool { _, ok := watcher.Gateway("g4"); return ok })
	late.move(at(9))
	r = <-done
	if diff := cmp.Diff([]string{"g1 live true", "g2 live true", "g3 live true", "g4 live true"}, brief(r)); diff != "" || !r.Reached {
		t.Errorf("reached %t (-want +got)\n%s", r.Reached, diff)
	}
	if c := r.Gateways[3]; c.After <= 0 || c.After > r.Took {
		t.Errorf("g4 was known after %s of %s", c.After, r.Took)
	}
	if _, err := watcher.Report(t.Context(), gw1, "g9", late.report(), false); err == nil {
		t.Error("an observer takes a report")
	}
	var n int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.fleet_processes`).Scan(&n); err != nil || n != 2 {
		t.Errorf("%d processes have rows, want 2 (%v)", n, err)
	}
}

func TestLostDuringBarrier(t *testing.T) {
	t.Parallel()
	f, _ := start(t, pgtest.New(t), Config{ReportEvery: 100 * time.Millisecond, Lease: time.Second}, nil)
	good, bad := newNode(t, "good", gw1, at(5)), newNode(t, "paused", gw1, at(5))
	good.follows = true
	good.run(f)
	if err := bad.once(f); err != nil {
		t.Fatal(err)
	}
	r, err := f.Wait(within(t, 20*time.Second), Barrier{Position: at(6)})
	if err != nil || !r.Reached {
		t.Fatalf("reached %t, %v", r.Reached, err)
	}
	if diff := cmp.Diff([]string{"good live true", "paused lost false"}, brief(r)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	// It had applied it before it fell silent, and is not confirmed for that.
	r, err = f.Wait(within(t, 20*time.Second), Barrier{Position: at(5)})
	if diff := cmp.Diff([]string{"good live true", "paused lost false"}, brief(r)); diff != "" || err != nil {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
}

func TestRestart(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	cfg := Config{ReportEvery: 500 * time.Millisecond, Lease: 2 * time.Second}
	f, stop := start(t, pool, cfg, nil)
	n := newNode(t, "edge", gw1, at(5))
	if err := n.once(f); err != nil {
		t.Fatal(err)
	}
	n.move(at(7))
	if err := n.once(f); err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.gateways SET last_seen = last_seen - interval '1 hour'`); err != nil {
		t.Fatal(err)
	}
	f, _ = start(t, pool, cfg, nil)
	g, ok := f.Gateway("edge")
	if !ok || g.Report.Seq != 7 || !g.Stored || g.Standing != Live || g.Applied(at(7)) || g.Account != "gw1" {
		t.Errorf("after the restart it is %+v, want the last report, live for as long as its lease, and not confirmed", g)
	}
	done := make(chan BarrierResult, 1)
	go func() {
		r, err := f.Wait(t.Context(), Barrier{Position: at(7)})
		if err != nil {
			t.Error(err)
		}
		done <- r
	}()
	await(t, f, "the barrier waits", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.barriers) == 1 })
	if err := n.once(f); err != nil {
		t.Fatal(err)
	}
	if r := <-done; !r.Reached || !r.Gateways[0].Applied {
		t.Errorf("reached %t, %v", r.Reached, brief(r))
	}
	watcher, _ := start(t, pool, Config{Observe: true}, nil)
	if err := watcher.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if g, _ := watcher.Gateway("edge"); g.Stored || g.Standing != Live {
		t.Errorf("an observer sees %+v", g)
	}
}

func TestListensAgain(t *testing.T) {
	t.Parallel()
	db := pgtest.Create(t)
	pool := pgtest.Pool(t, db.ServiceURL)
	a, _ := start(t, pool, Config{ReportEvery: time.Minute, Lease: 3 * time.Minute}, nil)
	b, _ := start(t, pool, Config{ReportEvery: time.Minute, Lease: 3 * time.Minute}, nil)
	n := newNode(t, "edge", gw1, at(5))
	n.follows = true
	n.run(b)
	if r, err := a.Wait(within(t, 30*time.Second), Barrier{Position: at(6)}); err != nil || !r.Reached {
		t.Fatalf("reached %t, %v", r.Reached, err)
	}
	owner := pgtest.Pool(t, db.OwnerURL)
	var killed int
	err := owner.QueryRow(t.Context(), `SELECT count(*) FROM (
		SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'rescind fleet') AS x`).Scan(&killed)
	if err != nil || killed != 2 {
		t.Fatalf("killed %d connections, %v", killed, err)
	}
	r, err := a.Wait(within(t, 20*time.Second), Barrier{Position: at(7)})
	if err != nil || !r.Reached {
		t.Fatalf("after LISTEN was lost: reached %t, %v: %v", r.Reached, err, brief(r))
	}
	if diff := cmp.Diff([]string{"edge live true"}, brief(r)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestMoves(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	a, _ := start(t, pool, Config{}, nil)
	b, _ := start(t, pool, Config{}, nil)
	n := newNode(t, "edge", gw1, at(5))
	for i, f := range []*Fleet{a, b, a} {
		n.move(at(revocation.Seq(6 + i)))
		if err := n.once(f); err != nil {
			t.Fatal(err)
		}
		for _, asker := range []*Fleet{a, b} {
			if err := asker.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			all := asker.Gateways()
			if len(all) != 1 || all[0].Report.Seq != revocation.Seq(6+i) || all[0].Standing != Live {
				t.Fatalf("after report %d: %+v", i, all)
			}
		}
	}
}

// A process that died without a word is not waited for, and its gateways are not lost before they could
// have come back.
func TestDeadProcess(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	f, _ := start(t, pool, Config{}, nil)
	_, err := pool.Exec(t.Context(), `
		INSERT INTO rescind.gateways (id, account, tenant, last_seen, report) VALUES ('edge', 'gw1', 'carbon.super', now() - interval '20 s', '{}')`)
	if err != nil {
		t.Fatal(err)
	}
	watcher, _ := start(t, pool, Config{Observe: true}, nil)
	await(t, f, "its row", func() bool {
		var n int
		return pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.fleet_processes`).Scan(&n) == nil && n == 1
	})
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.fleet_processes SET since = now() - interval '1 day'`); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		seen string
		want Standing
	}{{"1 s", Live}, {"16 s", Lost}} {
		_, err := pool.Exec(t.Context(), `
			INSERT INTO rescind.fleet_processes (id, since, seen) VALUES ('00000000-0000-0000-0000-000000000001', now() - interval '1 day', now() - $1::text::interval)
			ON CONFLICT (id) DO UPDATE SET seen = excluded.seen`, tt.seen)
		if err != nil {
			t.Fatal(err)
		}
		if err := watcher.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		if g, _ := watcher.Gateway("edge"); g.Standing != tt.want {
			t.Errorf("with a process last seen %s ago the gateway is %s, want %s", tt.seen, g.Standing, tt.want)
		}
	}
}

func TestForgotten(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	f, err := New(Config{}, pool, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ages := []string{"23 h", "25 h", "6 days", "8 days", "29 days", "31 days"}
	for _, tt := range []struct{ what, canary, left string }{
		{"lost", "", "NULL"}, {"lost with canary", "https://edge/canary", "NULL"},
		{"left", "", "now() - a::interval"}, {"left with canary", "https://edge/canary", "now() - a::interval"},
	} {
		_, err := pool.Exec(t.Context(), `
			INSERT INTO rescind.gateways (id, account, tenant, last_seen, left_at, report, canary_url)
			SELECT $1 || ' ' || a, 'gw1', 'carbon.super', now() - a::interval, `+tt.left+`, '{}', $2 FROM unnest($3::text[]) AS a`, tt.what, tt.canary, ages)
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := f.sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	rows, err := pool.Query(t.Context(), `SELECT id FROM rescind.gateways ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for i, what := range []string{"left", "left with canary", "lost", "lost with canary"} {
		for _, age := range ages[:[]int{3, 5, 1, 5}[i]] {
			want = append(want, what+" "+age)
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, kept); diff != "" {
		t.Errorf("after the sweep (-want +got)\n%s", diff)
	}
	if n := len(f.Gateways()); n != 6 {
		t.Errorf("%d gateways are shown, want those 6 that have not left", n)
	}
}

func TestHeldReports(t *testing.T) {
	t.Parallel()
	f, _ := start(t, pgtest.New(t), Config{ReportEvery: time.Minute, Lease: 3 * time.Minute, MaxHeld: 1}, nil)
	one, two := newNode(t, "one", gw1, at(5)), newNode(t, "two", gw2, at(5))
	type answer struct {
		in  replica.Instructions
		err error
	}
	hold := func() chan answer {
		c := make(chan answer, 1)
		go func() {
			in, err := f.Report(t.Context(), gw1, "one", one.report(), true)
			c <- answer{in, err}
		}()
		await(t, f, "a report is held", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.held == 1 })
		return c
	}
	first := hold()
	in, err := f.Report(t.Context(), gw2, "two", two.report(), true)
	if err != nil || in.NextMS != time.Minute.Milliseconds() {
		t.Errorf("past MaxHeld: got %+v, %v, want an answer at once", in, err)
	}
	if err := f.AskLoad(t.Context(), []string{"one", "nobody"}); err != nil {
		t.Fatal(err)
	}
	if a := <-first; a.in.Load == "" || a.err != nil {
		t.Errorf("got %+v, want a load", a)
	}
	second := hold()
	twin := newNode(t, "one", gw1, at(5))
	twin.base.Started = one.base.Started + 1
	if err := twin.once(f); err != nil {
		t.Fatal(err)
	}
	if a := <-second; !errors.Is(a.err, ErrInstance) {
		t.Errorf("the held report of an earlier process: got %+v, want ErrInstance", a)
	}
}

func TestReportsGetRarer(t *testing.T) {
	t.Parallel()
	f, err := New(Config{}, nil, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		gateways     int
		every, lease time.Duration
	}{{0, 2 * time.Second, 10 * time.Second}, {2000, 2 * time.Second, 10 * time.Second}, {10_000, 10 * time.Second, 30 * time.Second}} {
		f.reports = tt.gateways
		if f.every() != tt.every || f.leaseNow() != tt.lease {
			t.Errorf("%d gateways: every %s, lease %s, want %s and %s", tt.gateways, f.every(), f.leaseNow(), tt.every, tt.lease)
		}
	}
}

func TestSightings(t *testing.T) {
	t.Parallel()
	var s sightings
	began := time.Unix(1_800_000_000, 0)
	for i := range 3600 { // two hours, a report each two seconds, another position each
		s.add(Sighting{began.Add(time.Duration(i) * 2 * time.Second), at(revocation.Seq(i))})
		if len(s) > maxSightings {
			t.Fatalf("%d sightings are kept", len(s))
		}
	}
	now := s[len(s)-1].At
	if back := now.Sub(s[0].At); back < keepSightings {
		t.Errorf("they go back %s, want %s", back, keepSightings)
	}
	for i := 1; i < len(s); i++ {
		gap, ago := s[i].At.Sub(s[i-1].At), now.Sub(s[i].At)
		if gap > 2*time.Second+ago/4 {
			t.Errorf("a gap of %s that ended %s ago", gap, ago)
		}
	}
	quiet := sightings{}
	for i := range 3600 {
		quiet.add(Sighting{began.Add(time.Duration(i) * time.Second), at(1 + revocation.Seq(i/3000))})
	}
	if len(quiet) != 4 {
		t.Errorf("%d sightings of two positions, want the first and the last of each", len(quiet))
	}
	f, err := New(Config{}, nil, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	g := newGateway("g")
	g.sightings = quiet
	f.add(g)
	before, after, ok1, ok2 := f.When("g", began.Add(2999*time.Second+time.Millisecond))
	if !ok1 || !ok2 || before.Seq != 1 || after.Seq != 2 {
		t.Errorf("got %v %t, %v %t", before, ok1, after, ok2)
	}
	if before, _, ok, _ := f.When("g", began); !ok || !before.At.Equal(began) {
		t.Errorf("a report at that time: got %v %t", before, ok)
	}
	if _, _, ok, _ := f.When("g", began.Add(-time.Second)); ok {
		t.Error("something is known before the first report")
	}
	if _, _, _, ok := f.When("g", began.Add(time.Hour)); ok {
		t.Error("something is known after the last report")
	}
}
