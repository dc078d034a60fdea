package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// A process that lives and does not answer keeps gateways from being lost; it does not make what they said
// long ago a confirmation, and is not waited for each time.
func TestProcessThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	f, _ := start(t, pool, Config{ReportEvery: 100 * time.Millisecond, Lease: 400 * time.Millisecond}, nil)
	n := newNode(t, "edge", gw1, at(100))
	if err := n.once(f); err != nil {
		t.Fatal(err)
	}
	beat := func() {
		// Of the future, so that one heartbeat does for the test.
		_, err := pool.Exec(t.Context(), `
			INSERT INTO rescind.fleet_processes (id, since, seen) VALUES ($1, now() - interval '1 day', now() + interval '1 hour')`, uuid.NewString())
		if err != nil {
			t.Fatal(err)
		}
	}
	beat()
	if err := f.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, f, "it is silent for its lease", func() bool { g, _ := f.Gateway("edge"); return g.Stored })
	g, _ := f.Gateway("edge")
	if g.Standing != Live || g.Applied(at(90)) {
		t.Errorf("it is %s, applied %t: want live, for it may report elsewhere, and nothing confirmed", g.Standing, g.Applied(at(90)))
	}
	r, err := f.Wait(within(t, 300*time.Millisecond), Barrier{Position: at(90)})
	if err != nil || r.Reached {
		t.Errorf("reached %t, %v by one that is silent", r.Reached, err)
	}
	if diff := cmp.Diff([]string{"edge live false"}, brief(r)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	// It was waited for once, so that these are within a limit that waiting would not be.
	ctx := within(t, 8*answerWithin)
	for range 20 {
		if err := f.Refresh(ctx); err != nil {
			t.Fatal(err)
		}
	}
	n.run(f)
	if r, err := f.Wait(ctx, Barrier{Position: at(90)}); err != nil || !r.Reached {
		t.Errorf("when it reports again: reached %t, %v", r.Reached, err)
	}
	if all := f.Here(); len(all) != 1 || all[0].ID != "edge" {
		t.Errorf("here are %+v", all)
	}
}

// The id of a gateway that has left is still its account's, and an earlier process that leaves takes nothing
// from a later one that reports to another process of the service.
func TestLeavingKeepsTheID(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	a, _ := start(t, pool, Config{}, nil)
	b, _ := start(t, pool, Config{}, nil)
	c, _ := start(t, pool, Config{Observe: true}, nil)
	leave := func(f *Fleet, n *node) {
		t.Helper()
		r := n.report()
		r.Leaving = true
		if _, err := f.Report(t.Context(), n.by, n.id, r, true); err != nil {
			t.Fatal(err)
		}
	}
	n := newNode(t, "edge", gw1, at(5))
	if err := n.once(a); err != nil {
		t.Fatal(err)
	}
	leave(b, n) // through another process
	await(t, a, "it is gone", func() bool { _, ok := a.Gateway("edge"); return !ok })
	for _, f := range []*Fleet{a, b} {
		if err := newNode(t, "edge", gw2, at(1000)).once(f); !errors.Is(err, ErrOwned) {
			t.Errorf("another account with the id of one that left: got %v, want ErrOwned", err)
		}
	}

	old := newNode(t, "edge", gw1, at(5))
	if err := old.once(a); err != nil {
		t.Fatal(err)
	}
	next := newNode(t, "edge", gw1, at(3))
	next.base.Started = old.base.Started + 1000
	if err := b.sync(t.Context(), nil, true); err != nil {
		t.Fatal(err)
	}
	next.run(b)
	leave(a, old)
	for _, f := range []*Fleet{a, b, c} {
		await(t, f, "the later one is known", func() bool {
			_ = f.Refresh(t.Context())
			g, ok := f.Gateway("edge")
			return ok && g.Report.Instance == next.base.Instance
		})
	}
	r, err := b.Wait(within(t, 300*time.Millisecond), Barrier{Position: at(4)})
	if diff := cmp.Diff([]string{"edge live false"}, brief(r)); err != nil || r.Reached || diff != "" {
		t.Errorf("reached %t, %v (-want +got)\n%s", r.Reached, err, diff)
	}
	await(t, b, "the database knows of the later one", func() bool {
		var there bool
		err := pool.QueryRow(t.Context(), `
			SELECT left_at IS NULL AND report->>'instance' = $1 FROM rescind.gateways WHERE id = 'edge'`, next.base.Instance).Scan(&there)
		return err == nil && there
	})
}

// What a gateway sends of itself neither has the log read nor keeps it from being asked.
func TestDigestsThatNobodyAskedFor(t *testing.T) {
	t.Parallel()
	state := &fakeState{at: at(100), made: make(map[int64]int)}
	f, err := New(Config{ReportEvery: 100 * time.Millisecond}, pgtest.New(t), state, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var made atomic.Int64
	f.makeDigests = func(_ context.Context, cutoff int64) (digests, error) {
		made.Add(1)
		return fakeDigests{state, cutoff}, nil
	}
	run(t, f)
	n := newNode(t, "edge", gw1, at(100))
	cutoff := time.Now().Unix() / 60 * 60
	for i := range 50 {
		n.last = &replica.Digest{Position: at(100), Cutoff: cutoff + 60*int64(i%14-3), Count: i}
		if err := n.once(f); err != nil && !errors.Is(err, ErrReport) {
			t.Fatal(err)
		}
	}
	f.mu.Lock()
	if g := f.gateways["edge"]; g.asked == (askedFor{}) && g.compared.digest != (replica.Digest{}) { // its second may have come
		t.Errorf("the digest %v is compared", g.compared.digest)
	}
	f.mu.Unlock()
	n.digest = func(r replica.DigestRequest) *replica.Digest { d := honest(at(100), r.Cutoff, true); return &d }
	n.run(f)
	if err := f.AskDigests(t.Context(), replica.DigestRequest{Cutoff: cutoff}); err != nil {
		t.Fatal(err)
	}
	await(t, f, "its verdict", func() bool { g, _ := f.Gateway("edge"); return g.Comparison.Verdict == Equal })
	if k := made.Load(); k > 2 { // its own minute's may be another one
		t.Errorf("the log was read %d times", k)
	}
}

// Digests are made again when the log no longer knows what has happened since, but never often.
func TestLogDigests(t *testing.T) {
	t.Parallel()
	state := &fakeState{at: at(100)}
	f, err := New(Config{}, nil, state, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	made := 0
	f.makeDigests = func(_ context.Context, cutoff int64) (digests, error) {
		made++
		return fakeDigests{state, cutoff}, nil
	}
	var l logDigests
	for i := range int64(10) {
		l.last = time.Time{}
		if _, err := l.of(t.Context(), f, 60*i); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := l.byCutoff[60*2]; ok || len(l.byCutoff) != keepDigests {
		t.Errorf("%d cutoffs are kept, want the %d last ones", len(l.byCutoff), keepDigests)
	}
	if _, err := l.of(t.Context(), f, 60*9); err != nil || made != 10 {
		t.Errorf("known ones: %v, made %d times", err, made)
	}
	if _, err := l.of(t.Context(), f, 60*10); !errors.Is(err, errNotNow) {
		t.Errorf("others at once: got %v, want errNotNow", err)
	}

	g := newGateway("edge")
	f.add(g)
	forgetful := func(age time.Duration) {
		l = logDigests{byCutoff: map[int64]madeDigests{60: {fakeDigests{&fakeState{}, 60}, time.Now().Add(-age)}}, last: time.Now()}
		g.compared.digest, g.compared.came, g.compared.due = honest(at(7), 60, true), time.Now(), true
	}
	forgetful(time.Minute)
	if f.compareOne(t.Context(), g, &l) || len(l.byCutoff) != 0 {
		t.Error("old digests that the log has forgotten are not made again")
	}
	forgetful(time.Second)
	if !f.compareOne(t.Context(), g, &l) || len(l.byCutoff) != 1 {
		t.Error("new digests that the log has forgotten are made again")
	}
}

func TestDigestQuestionsDoNotAlternate(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	f, _ := start(t, pool, Config{ReportEvery: 100 * time.Millisecond}, nil)
	one, _ := start(t, pool, Config{Observe: true}, nil)
	two, _ := start(t, pool, Config{Observe: true}, nil)
	n := newNode(t, "edge", gw1, at(100))
	n.run(f) // it makes no digest
	cutoff := time.Now().Unix() / 60 * 60
	ask := func(o *Fleet, cutoff int64) {
		t.Helper()
		if err := o.AskDigests(t.Context(), replica.DigestRequest{Cutoff: cutoff, After: at(90)}); err != nil {
			t.Fatal(err)
		}
	}
	ask(one, cutoff)
	asked := func(k int) func() bool {
		return func() bool { n.mu.Lock(); defer n.mu.Unlock(); return len(n.requests) >= k }
	}
	await(t, f, "the first question", asked(1))
	ask(one, cutoff+60)
	await(t, f, "the second question", asked(2))
	ask(two, cutoff)
	one.mu.Lock()
	if k := len(one.talk.questions); k != 1 {
		t.Errorf("%d questions are open, want that of the last call", k)
	}
	one.mu.Unlock()
	f.mu.Lock()
	told := f.talk.version
	f.mu.Unlock()
	await(t, f, "the questions are repeated", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.talk.version > told+2 })
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.requests) != 2 {
		t.Errorf("it was asked %d times, want 2: %v", len(n.requests), n.requests)
	}
}

// When there is no place left, the longest lost one gives up its own, but for those with a canary.
func TestFullFleet(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	_, err := pool.Exec(t.Context(), `
		INSERT INTO rescind.gateways (id, account, tenant, last_seen, report, canary_url) VALUES
			('canary', 'gw1', 'carbon.super', now() - interval '5 h', '{}', 'https://edge/canary'),
			('longest', 'gw1', 'carbon.super', now() - interval '4 h', '{}', ''),
			('other', 'gw2', 'b.example', now() - interval '5 h', '{}', ''),
			('unreadable', 'gw1', 'carbon.super', now() - interval '3 h', '{"seq": "x", "instance": 5}', '')`)
	if err != nil {
		t.Fatal(err)
	}
	f, _ := start(t, pool, Config{MaxGateways: 6, ReportEvery: 100 * time.Millisecond, Lease: 300 * time.Millisecond}, nil)
	if g, ok := f.Gateway("unreadable"); !ok || !g.Stored {
		t.Errorf("one whose report cannot be read is %+v", g)
	}
	if err := newNode(t, "early", gw1, at(1)).once(f); !errors.Is(err, ErrTooMany) {
		t.Errorf("before any is lost: got %v, want ErrTooMany", err)
	}
	await(t, f, "they are lost", func() bool { g, _ := f.Gateway("longest"); return g.Standing == Lost })
	for i := range 2 {
		if err := newNode(t, fmt.Sprintf("new-%d", i), gw1, at(1)).once(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := newNode(t, "new-2", gw1, at(1)).once(f); !errors.Is(err, ErrTooMany) {
		t.Errorf("with no lost one left: got %v, want ErrTooMany", err)
	}
	var got []string
	for _, g := range f.Gateways() {
		got = append(got, g.ID)
	}
	if diff := cmp.Diff([]string{"canary", "new-0", "new-1", "other"}, got); diff != "" {
		t.Errorf("gateways (-want +got)\n%s", diff)
	}
}

// Gateways name the same tenants mostly: lists are kept, and told, once.
func TestListsAreShared(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	f, _ := start(t, pool, Config{}, nil)
	watcher, _ := start(t, pool, Config{Observe: true}, nil)
	for i := range 20 {
		n := newNode(t, fmt.Sprintf("edge-%02d", i), gw1, at(5))
		n.base.Tenants = []string{"carbon.super", fmt.Sprintf("t%d.example", i%2)}
		if err := n.once(f); err != nil {
			t.Fatal(err)
		}
	}
	f.mu.Lock()
	body := f.body(time.Now())
	f.mu.Unlock()
	if len(body.Lists) != 2 || len(body.Gateways) != 20 {
		t.Errorf("%d lists of %d gateways are told, want 2 of 20", len(body.Lists), len(body.Gateways))
	}
	// What cannot be read of one process keeps nothing of another one from being read.
	_, err := pool.Exec(t.Context(), `
		INSERT INTO rescind.fleet_processes (id, asked, version, gateways) VALUES ($1, 1 << 40, 1, 'nonsense')`, uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	if err := watcher.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	all := watcher.Gateways()
	if len(all) != 20 {
		t.Fatalf("%d gateways are known", len(all))
	}
	for i, g := range all {
		if diff := cmp.Diff([]string{"carbon.super", fmt.Sprintf("t%d.example", i%2)}, g.Report.Tenants); diff != "" || g.Stored {
			t.Errorf("%s, stored %t: tenants (-want +got)\n%s", g.ID, g.Stored, diff)
		}
		if i > 1 && &g.Report.Tenants[0] != &all[i-2].Report.Tenants[0] {
			t.Errorf("%s has a list of its own", g.ID)
		}
	}
}

// A process that has read an old row knows from the next one that a gateway has left.
func TestOldRowIsPutRight(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	f, _ := start(t, pool, Config{}, nil)
	n := newNode(t, "edge", gw1, at(5))
	if err := n.once(f); err != nil {
		t.Fatal(err)
	}
	first, _ := start(t, pool, Config{Observe: true}, nil)
	if err := first.Refresh(t.Context()); err != nil { // which has the row written
		t.Fatal(err)
	}
	var old []byte
	if err := pool.QueryRow(t.Context(), `SELECT gateways FROM rescind.fleet_processes WHERE id = $1`, f.self).Scan(&old); err != nil {
		t.Fatal(err)
	}
	n.base.Leaving = true
	if err := n.once(f); err != nil {
		t.Fatal(err)
	}
	watcher, err := New(Config{Observe: true}, pool, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler)) // which is not run
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.fleet_processes SET gateways = $2, version = 0 WHERE id = $1`, f.self, old); err != nil {
		t.Fatal(err)
	}
	if err := watcher.readRows(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if len(watcher.Gateways()) != 1 {
		t.Fatal("the old row was not read")
	}
	// One that is new here is looked up, for the row may be from before it was forgotten.
	if _, looked := watcher.rows.ids["edge"]; !looked {
		t.Error("the gateway is taken from an old row, and not looked up")
	}
	clear(watcher.rows.ids)
	if err := first.Refresh(t.Context()); err != nil { // again
		t.Fatal(err)
	}
	if err := watcher.readRows(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	changed := slices.Collect(maps.Keys(watcher.rows.ids))
	if err := watcher.readChanged(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := watcher.Gateways(); !slices.Equal(changed, []string{"edge"}) || len(left) != 0 {
		t.Errorf("read again: %q, left: %+v", changed, left)
	}
}

// A later row of the same process is later, even if its way through another clock makes it look earlier.
func TestRowsComeInOrder(t *testing.T) {
	t.Parallel()
	f, err := New(Config{}, nil, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for _, tt := range []struct {
		from string
		at   time.Time
		seq  revocation.Seq
		want revocation.Seq
	}{{"a", now, 5, 5}, {"a", now.Add(-50 * time.Millisecond), 6, 6}, {"b", now.Add(-time.Second), 4, 6}, {"b", now, 7, 7}} {
		f.merge(&told{ID: "edge", Account: "gw1", Report: replica.Report{Instance: "i", Position: at(tt.seq)}}, tt.from, tt.at)
		if g, _ := f.Gateway("edge"); g.Report.Seq != tt.want {
			t.Errorf("after %s said %d: at %d, want %d", tt.from, tt.seq, g.Report.Seq, tt.want)
		}
	}
}

func TestUnpack(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "x", `{"gateways":[{"id":"a","list":1}]}`, `{"lists":[["a"]],"gateways":[{"id":"a","list":-1}]}`} {
		if _, err := unpack(encoder.EncodeAll([]byte(text), nil)); err == nil {
			t.Errorf("%q is understood", text)
		}
	}
}

func TestDigestScope(t *testing.T) {
	t.Parallel()
	many := make([]string, 501)
	for i := range many {
		many[i] = fmt.Sprintf("t%d.example", i)
	}
	for _, tt := range []struct {
		name    string
		g       Gateway
		all     bool
		a, b, t bool // sees a.example, b.example, t7.example
	}{
		{name: "names none", g: Gateway{Tenant: "a.example"}, all: true},
		{name: "names one", g: Gateway{Tenant: "a.example", Sees: []string{"b.example"}, Report: replica.Report{Tenants: []string{"a.example"}}}, a: true},
		{name: "sees all and names one", g: Gateway{Tenant: "a.example", Sees: seesAll, Report: replica.Report{Tenants: []string{"b.example"}}}, b: true},
		{name: "more than it can name", g: Gateway{Tenant: "a.example", Sees: many}, a: true, t: true},
	} {
		s := tt.g.DigestScope()
		if (s.Sees == nil) != tt.all {
			t.Errorf("%s: sees all: %t, want %t", tt.name, s.Sees == nil, tt.all)
		}
		if s.Sees != nil && (s.Sees("a.example") != tt.a || s.Sees("b.example") != tt.b || s.Sees("t7.example") != tt.t) {
			t.Errorf("%s: sees a %t, b %t, t7 %t", tt.name, s.Sees("a.example"), s.Sees("b.example"), s.Sees("t7.example"))
		}
	}
}

// First reports of one account, however many, leave room for those of others.
func TestClaimsInTurn(t *testing.T) {
	t.Parallel()
	f, _ := start(t, pgtest.New(t), Config{}, nil)
	in, out := make(chan struct{}), make(chan struct{})
	results := make(chan error, 3)
	for range 3 {
		go func() {
			results <- f.inTurn(t.Context(), "gw1", func(context.Context) error { in <- struct{}{}; <-out; return nil })
		}()
	}
	<-in
	select {
	case <-in:
		t.Error("two of one account at a time")
	default:
	}
	other := authn.Account{Username: "gw3", Role: "gateway", Tenant: gw2.Tenant}
	if err := newNode(t, "edge", other, at(1)).once(f); err != nil {
		t.Errorf("another account: %v", err)
	}
	out <- struct{}{}
	for range 2 {
		<-in
		out <- struct{}{}
	}
	for range 3 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.claiming) != 0 {
		t.Errorf("%d turns are kept", len(f.claiming))
	}
}
