package ledger

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/stacktest"
)

const iss = "https://km.example.com"

var leap = time.Now().Add(time.Hour).Unix()

// open returns a ledger on pool that has started and does not run yet.
func open(t testing.TB, pool *pgxpool.Pool, cfg Config) *Ledger {
	t.Helper()
	cfg.Source = iss
	l, err := New(cfg, pool, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return l
}

// run runs l until stop is called, at the latest when the test ends.
func run(t testing.TB, l *Ledger) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func request(jti string) Request {
	return Request{
		Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: jti}, Tenant: revocation.SuperTenant, Exp: leap,
		ClientID: "app-1", Reason: "client", Action: "revoke_token", Actor: Actor{Name: "client:app-1", RequestID: "r-1", Remote: "127.0.0.1"},
	}
}

func mustRevoke(t testing.TB, l *Ledger, r Request) Result {
	t.Helper()
	result, err := l.Revoke(t.Context(), r)
	if err != nil {
		t.Fatalf("Revoke %s: %v", r.Target.ID, err)
	}
	return result
}

func allEvents(t testing.TB, l *Ledger) []revocation.Event {
	t.Helper()
	events, err := l.After(t.Context(), 0, 1_000_000)
	if err != nil {
		t.Fatal(err)
	}
	return events
}

func subjects(events []revocation.Event) []string {
	var s []string
	for _, e := range events {
		s = append(s, e.Subject)
	}
	return s
}

func TestRevokeIsInLogAndState(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	run(t, l)
	r := request("at-1")
	r.Traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	if got := mustRevoke(t, l, r); got.Seq != 1 || !got.Added || uuid.Validate(got.ID) != nil {
		t.Errorf("first time: %+v", got)
	}
	if got := mustRevoke(t, l, r); got != (Result{Seq: 1}) {
		t.Errorf("repeat: %+v", got)
	}
	mustRevoke(t, l, request("at-2"))

	events := allEvents(t, l)
	if diff := cmp.Diff([]string{"at-1", "at-2"}, subjects(events)); diff != "" {
		t.Fatal(diff)
	}
	e := events[0]
	if e.Seq != 1 || e.Previous != 0 || e.Type != "revocation.token" || e.Source != iss || e.Traceparent != r.Traceparent {
		t.Errorf("event %+v", e)
	}
	if events[1].Previous != 1 {
		t.Errorf("second event's previous is %d, want 1", events[1].Previous)
	}
	rev, err := e.Revocation()
	if err != nil {
		t.Fatal(err)
	}
	known, ok, err := l.Known(t.Context(), r.Target)
	if err != nil || !ok {
		t.Fatalf("Known: %t, %v", ok, err)
	}
	if diff := cmp.Diff(known, rev); diff != "" {
		t.Errorf("event and state differ: %s", diff)
	}
	want := revocation.Revocation{ID: rev.ID, Target: r.Target, Tenant: r.Tenant, Exp: leap, ClientID: "app-1", Reason: "client"}
	if diff := cmp.Diff(want, rev); diff != "" {
		t.Error(diff)
	}
	var audited int
	err = pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.audit
		WHERE action = 'revoke_token' AND actor = 'client:app-1' AND request_id = 'r-1' AND entity_id = $1::text::uuid`, rev.ID).Scan(&audited)
	if err != nil || audited != 1 {
		t.Errorf("%d audit rows, %v; want 1", audited, err)
	}
}

func TestLaterEndExtends(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	run(t, l)
	for _, add := range []int64{10, 0, 30, 20} {
		r := request("at-1")
		r.Exp += add
		mustRevoke(t, l, r)
	}
	var ends []int64
	ids := make(map[string]bool)
	for _, e := range allEvents(t, l) {
		rev, err := e.Revocation()
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, rev.Exp-leap)
		ids[rev.ID] = true
	}
	if diff := cmp.Diff([]int64{10, 30}, ends); diff != "" {
		t.Error(diff)
	}
	if len(ids) != 1 {
		t.Errorf("one target has %d ids", len(ids))
	}
}

func TestKindsWithTime(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{ClockSkew: 7 * time.Second})
	run(t, l)
	for _, kind := range revocation.Kinds {
		r := request("x")
		r.Target.Kind = kind
		if kind == revocation.KindTenant {
			r.Target.Iss, r.Target.ID = "", revocation.SuperTenant.Domain
		}
		before := time.Now().Unix()
		mustRevoke(t, l, r)
		rev, ok, err := l.Known(t.Context(), r.Target)
		if err != nil || !ok {
			t.Fatalf("%s: known %t, %v", kind, ok, err)
		}
		if timed := rev.NotAfter >= before+7 && rev.NotAfter <= time.Now().Unix()+7; timed != kind.HasTime() {
			t.Errorf("%s: not_after is %d, now %d", kind, rev.NotAfter, time.Now().Unix())
		}
	}
}

// The end of a revocation that has a time goes by the time that it got, whatever the caller's
// clock says.
func TestEndGoesByTheTime(t *testing.T) {
	t.Parallel()
	const skew, far = 60, int64(revocation.MaxExpiryAhead / time.Second)
	l := open(t, pgtest.New(t), Config{ClockSkew: skew * time.Second})
	for _, tt := range []struct {
		name  string
		kind  revocation.Kind
		batch []Request                // of this target
		want  func(n, now int64) int64 // from not_after and the clock
	}{
		{"no end of its own", revocation.KindClient, []Request{{Lifetime: 3600}}, func(n, _ int64) int64 { return n + 3600 }},
		{"an earlier one", revocation.KindSubject, []Request{{Lifetime: 3600, Exp: leap + skew - 5}}, func(n, _ int64) int64 { return n + 3600 }},
		{"a later one", revocation.KindClient, []Request{{Lifetime: 3600, Exp: leap + 500}}, func(_, _ int64) int64 { return leap + 500 }},
		{"a time of its own", revocation.KindClient, []Request{{Lifetime: 3600, NotAfter: 5000}}, func(_, _ int64) int64 { return 8600 }},
		{"no lifetime", revocation.KindClient, []Request{{Exp: leap - 1000}}, func(_, _ int64) int64 { return leap - 1000 }},
		{"the longest of two", revocation.KindSubject, []Request{{Lifetime: 3600}, {Lifetime: 7200}}, func(n, _ int64) int64 { return n + 7200 }},
		{"too far ahead", revocation.KindClient, []Request{{Lifetime: far}}, func(_, now int64) int64 { return now + far }},
		{"no time", revocation.KindSession, []Request{{Lifetime: 3600, Exp: leap - 1000}}, func(_, _ int64) int64 { return leap - 1000 }},
	} {
		for i := range tt.batch {
			tt.batch[i].Target = revocation.Target{Kind: tt.kind, Iss: iss, ID: tt.name}
			tt.batch[i].Tenant = revocation.SuperTenant
		}
		var before, after int64
		const clock = `SELECT floor(extract(epoch FROM clock_timestamp()))::bigint`
		if err := l.pool.QueryRow(t.Context(), clock).Scan(&before); err != nil {
			t.Fatal(err)
		}
		if _, err := l.commit(t.Context(), tt.batch); err != nil {
			t.Fatal(err)
		}
		if err := l.pool.QueryRow(t.Context(), clock).Scan(&after); err != nil {
			t.Fatal(err)
		}
		events := allEvents(t, l)
		rev, err := events[len(events)-1].Revocation()
		if err != nil {
			t.Fatal(err)
		}
		if low, high := tt.want(rev.NotAfter, before), tt.want(rev.NotAfter, after); rev.Exp < low || rev.Exp > high {
			t.Errorf("%s: not_after %d and exp %d, want exp %d to %d", tt.name, rev.NotAfter, rev.Exp, low, high)
		}
	}
}

// Whatever else a batch asks about a target, a request for now kills what was issued
// until now.
func TestNowOutranksAnEarlierTime(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{ClockSkew: -1})
	past, future := time.Now().Unix()-1000, time.Now().Unix()+1000
	for name, tt := range map[string]struct {
		notAfter []int64
		want     int64 // 0 is now
	}{
		"only now":         {[]int64{0, 0}, 0},
		"now, then past":   {[]int64{0, past}, 0},
		"past, then now":   {[]int64{past, 0}, 0},
		"past alone":       {[]int64{past, past - 1}, past},
		"now and ahead":    {[]int64{0, future, past}, future},
		"ahead, then past": {[]int64{future, past}, future},
	} {
		var batch []Request
		for _, notAfter := range tt.notAfter {
			r := request(name)
			r.Target.Kind, r.NotAfter = revocation.KindClient, notAfter
			batch = append(batch, r)
		}
		before := time.Now().Unix()
		if _, err := l.commit(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
		rev, _, err := l.Known(t.Context(), batch[0].Target)
		if err != nil {
			t.Fatal(err)
		}
		low, high := tt.want, tt.want
		if tt.want == 0 {
			low, high = before, time.Now().Unix()
		}
		if rev.NotAfter < low || rev.NotAfter > high {
			t.Errorf("%s: not_after is %d, want %d to %d", name, rev.NotAfter, low, high)
		}
	}
}

// Several processes, the same targets from all: one event each, no gap, and each
// tenant's events are chained.
func TestSeqsWithSeveralProcesses(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	if _, err := pool.Exec(t.Context(), `INSERT INTO rescind.tenants (id, domain) VALUES (1, 'a.example'), (2, 'b.example')`); err != nil {
		t.Fatal(err)
	}
	tenants := []revocation.Tenant{revocation.SuperTenant, {ID: 1, Domain: "a.example"}, {ID: 2, Domain: "b.example"}}
	const processes, callers, each = 3, 8, 40
	var wg sync.WaitGroup
	for p := range processes {
		l := open(t, pgtest.Pool(t, pool.Config().ConnString()), Config{MaxBatch: 16})
		run(t, l)
		for c := range callers {
			wg.Go(func() {
				for i := range each {
					n := i
					if (p+c)%2 == 0 {
						n = each - 1 - i
					}
					r := request(fmt.Sprintf("jti-%d-%d", c, n))
					r.Tenant = tenants[n%len(tenants)]
					if _, err := l.Revoke(t.Context(), r); err != nil {
						t.Errorf("process %d: %v", p, err)
					}
				}
			})
		}
	}
	wg.Wait()
	l := open(t, pool, Config{})
	events := allEvents(t, l)
	if len(events) != callers*each {
		t.Errorf("%d events for %d targets", len(events), callers*each)
	}
	last := make(map[string]revocation.Seq)
	for i, e := range events {
		if e.Seq != revocation.Seq(i+1) {
			t.Fatalf("event %d has seq %d", i, e.Seq)
		}
		if e.Previous != last[e.Tenant.Domain] {
			t.Errorf("event %d of %s: previous is %d, want %d", e.Seq, e.Tenant.Domain, e.Previous, last[e.Tenant.Domain])
		}
		last[e.Tenant.Domain] = e.Seq
	}
}

// Batches that touch the same rows in opposite order, straight against the commit.
func TestOppositeOrderDoesNotDeadlock(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	var wg sync.WaitGroup
	for round := range 20 {
		var up, down []Request
		for i := range 50 {
			r := request(fmt.Sprintf("%d-%d", round, i))
			up = append(up, r)
			r.Exp++
			down = append([]Request{r}, down...)
		}
		for _, batch := range [][]Request{up, down} {
			wg.Go(func() {
				if _, err := l.commit(t.Context(), batch); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	var deadlocks int
	if err := pool.QueryRow(t.Context(), `SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()`).Scan(&deadlocks); err != nil {
		t.Fatal(err)
	}
	if deadlocks != 0 {
		t.Errorf("%d deadlocks", deadlocks)
	}
	var short int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.revocations WHERE exp <> $1`, leap+1).Scan(&short); err != nil || short != 0 {
		t.Errorf("%d of the rows do not have the later end, %v", short, err)
	}
}

func TestRefusedItemFailsAlone(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	bad := request("bad")
	bad.Tenant = revocation.Tenant{ID: 4711, Domain: "nobody.example"} // there is no such tenant
	batch := []*item{}
	for _, r := range []Request{request("a"), bad, request("b"), request("a")} {
		batch = append(batch, &item{Request: r, done: make(chan outcome, 1)})
	}
	l.commitBatch(t.Context(), batch)
	for i, it := range batch {
		out := <-it.done
		if (out.err != nil) != (i == 1) {
			t.Errorf("item %d: %v", i, out.err)
		}
		if i == 1 && !errors.Is(out.err, ErrUnavailable) {
			t.Errorf("the refused item's error is %v", out.err)
		}
	}
	if diff := cmp.Diff([]string{"a", "b"}, subjects(allEvents(t, l))); diff != "" {
		t.Error(diff)
	}
}

func TestQueueIsBoundedAndDrained(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{MaxBatch: 4, QueueSize: 6})
	// A caller that has gone away undoes nothing.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 6 {
		if _, err := l.Revoke(gone, request(fmt.Sprint(i))); !errors.Is(err, context.Canceled) {
			t.Fatalf("caller %d: %v", i, err)
		}
	}
	if _, err := l.Revoke(t.Context(), request("too many")); !errors.Is(err, ErrBusy) {
		t.Fatalf("full queue: %v, want ErrBusy", err)
	}
	run(t, l)()
	if got := len(allEvents(t, l)); got != 6 {
		t.Errorf("%d events after the stop, want 6", got)
	}
	if _, err := l.Revoke(t.Context(), request("late")); !errors.Is(err, ErrUnavailable) {
		t.Errorf("after the stop: %v, want ErrUnavailable", err)
	}
}

func TestInvalidTarget(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	for _, id := range []string{"", "a\x00b", "\xff", string(make([]byte, 256))} {
		_, err := l.Revoke(t.Context(), request(id))
		if _, ok := errors.AsType[*revocation.InvalidError](err); !ok {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestTrimLogKeepsWhatIsNeeded(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	run(t, l)
	if err := l.EnsureCursors(t.Context(), []string{"a", "b"}); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		mustRevoke(t, l, request(fmt.Sprint(i)))
	}
	trim := func(age time.Duration, rows int) (removed int) {
		t.Helper()
		if err := pool.QueryRow(t.Context(), `SELECT rescind.trim_log($1, $2)`, age, rows).Scan(&removed); err != nil {
			t.Fatal(err)
		}
		return removed
	}
	if n := trim(0, 100); n != 0 {
		t.Errorf("removed %d events that no sink has had", n)
	}
	for sink, seq := range map[string]revocation.Seq{"a": 4, "b": 8} {
		lead, err := l.Lead(t.Context(), sink)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(lead.Save(seq), lead.Save(seq-1)); err != nil {
			t.Fatal(err)
		}
		lead.Release()
	}
	cursors, err := l.Cursors(t.Context())
	if diff := cmp.Diff(map[string]revocation.Seq{"a": 4, "b": 8}, cursors); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	if n := trim(time.Hour, 100); n != 0 {
		t.Errorf("removed %d young events", n)
	}
	if n := trim(0, 3); n != 3 {
		t.Errorf("removed %d events, want the 3 allowed at once", n)
	}
	if n := trim(0, 100); n != 1 {
		t.Errorf("removed %d events, want the one left before the slower cursor", n)
	}
	if oldest, err := l.Oldest(t.Context()); oldest != 5 || err != nil {
		t.Errorf("oldest is %d, %v; want 5", oldest, err)
	}
	l = open(t, pool, Config{}) // one that committed none of them
	if _, err := l.After(t.Context(), 3, 10); !errors.Is(err, ErrSeqGone) {
		t.Errorf("After a removed event: %v, want ErrSeqGone", err)
	}
	if events, err := l.After(t.Context(), 4, 2); err != nil || len(events) != 2 || events[0].Seq != 5 {
		t.Errorf("After 4: %v, %v", events, err)
	}
}

func TestTrimRevocationsIsNeverEarly(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	now := time.Now().Unix()
	for name, exp := range map[string]int64{"live": now + 60, "within leeway": now - 100, "within a snapshot period": now - 600, "over": now - 730} {
		r := request(name)
		r.Exp = exp
		if _, err := l.commit(t.Context(), []Request{r}); err != nil {
			t.Fatal(err)
		}
	}
	var removed int
	if err := pool.QueryRow(t.Context(), `SELECT rescind.trim_revocations(10)`).Scan(&removed); err != nil {
		t.Fatal(err)
	}
	rows, err := pool.Query(t.Context(), `SELECT ident FROM rescind.revocations ORDER BY exp`)
	if err != nil {
		t.Fatal(err)
	}
	left, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if diff := cmp.Diff([]string{"within a snapshot period", "within leeway", "live"}, left); err != nil || diff != "" || removed != 1 {
		t.Errorf("removed %d, %v %s", removed, err, diff)
	}
	page, err := l.Page(t.Context(), "", 10)
	if err != nil || len(page) != 3 {
		t.Errorf("%d entries for others, %v; want all that are left, 3", len(page), err)
	}
	for name, want := range map[string]bool{"live": true, "within leeway": true, "within a snapshot period": false} {
		if _, known, err := l.Known(t.Context(), request(name).Target); known != want || err != nil {
			t.Errorf("%s: known %t, %v", name, known, err)
		}
	}
}

func TestPageWalksAll(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	var all []Request
	for i := range 25 {
		all = append(all, request(fmt.Sprintf("%02d", i)))
	}
	if _, err := l.commit(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	got := make(map[string]bool)
	for after := ""; ; {
		page, err := l.Page(t.Context(), after, 10)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		for _, s := range page {
			got[s.Target.ID] = true
		}
		after = page[len(page)-1].ID
	}
	if len(got) != 25 {
		t.Errorf("%d entries, want 25", len(got))
	}
	found, err := l.Lookup(t.Context(), []revocation.Target{all[3].Target, request("none").Target, all[7].Target})
	if err != nil || len(found) != 2 {
		t.Errorf("found %d, %v; want 2", len(found), err)
	}
}

func TestLeadIsOneAtATime(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	first, err := l.Lead(t.Context(), "etcd")
	if err != nil {
		t.Fatal(err)
	}
	if other, err := l.Lead(t.Context(), "amqp"); err != nil {
		t.Fatal(err)
	} else {
		other.Release()
	}
	second := make(chan *Lead, 1)
	go func() {
		lead, err := l.Lead(t.Context(), "etcd")
		if err != nil {
			t.Error(err)
		}
		second <- lead
	}()
	await(t, func() bool { // the second has asked, in vain
		var asked int
		err := pool.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
			AND application_name = 'rescind sink etcd' AND query LIKE '%pg_try_advisory_lock%' AND state = 'idle' AND backend_xmin IS NULL`).Scan(&asked)
		return err == nil && asked == 1
	})
	select {
	case <-second:
		t.Fatal("two leaders")
	default:
	}
	// The first leader's connection dies without its doing.
	var pid uint32 = first.conn.PgConn().PID()
	if _, err := pool.Exec(t.Context(), `SELECT pg_terminate_backend($1)`, pid); err != nil {
		t.Fatal(err)
	}
	lead := <-second
	<-first.Context().Done()
	if err := first.Save(1); err == nil {
		t.Error("a leader that lost its lock saved a cursor")
	}
	first.Release()
	lead.Release()
}

func await(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("the awaited did not happen")
		}
	}
}

func TestStartTellsRestoreFromFailover(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	if _, err := l.commit(t.Context(), []Request{request("a"), request("b")}); err != nil {
		t.Fatal(err)
	}
	head, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	at := func(seq revocation.Seq) *revocation.Position {
		return &revocation.Position{Epoch: head.Epoch, Seq: seq}
	}
	start := func(published *revocation.Position) error {
		_, err := open2(t, pool).Start(t.Context(), published)
		return err
	}
	if err := errors.Join(start(nil), start(at(1)), start(at(2)), start(&revocation.Position{Epoch: "other", Seq: 9})); err != nil {
		t.Errorf("nothing changed: %v", err)
	}
	if err := start(at(3)); !errors.Is(err, ErrRestored) {
		t.Errorf("etcd is ahead: %v, want ErrRestored", err)
	}
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.log_head SET timeline_id = timeline_id - 1`); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*revocation.Position{nil, {Epoch: "other", Seq: 1}} {
		if err := start(p); !errors.Is(err, ErrIdentity) {
			t.Errorf("timeline changed, etcd says %v: %v, want ErrIdentity", p, err)
		}
	}
	if err := start(at(3)); !errors.Is(err, ErrRestored) {
		t.Errorf("timeline changed and etcd is ahead: %v, want ErrRestored", err)
	}
	if err := start(at(1)); !errors.Is(err, ErrIdentity) {
		t.Errorf("timeline changed and etcd is behind: %v, want ErrIdentity", err)
	}
	if err := errors.Join(start(at(2)), start(nil)); err != nil {
		t.Errorf("a fail-over that lost nothing: %v", err)
	}
}

// A process that lives through a fail-over knows that the log lost nothing.
func TestFailoverWhileRunning(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	run(t, l)
	mustRevoke(t, l, request("a"))
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.log_head SET timeline_id = timeline_id - 1`); err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { // it listens; now it loses its connections, as in a fail-over
		tag, err := pool.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND application_name = 'rescind listen'`)
		return err == nil && tag.RowsAffected() == 1
	})
	await(t, func() bool {
		_, err := open2(t, pool).Start(t.Context(), nil)
		return err == nil
	})
}

func open2(t *testing.T, pool *pgxpool.Pool) *Ledger {
	t.Helper()
	l, err := New(Config{Source: iss}, pool, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLogThatGoesBackStopsTheProcess(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	done := make(chan error, 1)
	go func() { done <- l.Run(t.Context()) }()
	for i := range 3 {
		mustRevoke(t, l, request(fmt.Sprint(i)))
	}
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.log_head SET seq = 1`); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Revoke(t.Context(), request("x")); !errors.Is(err, ErrUnavailable) || !errors.Is(err, ErrRestored) {
		t.Errorf("Revoke: %v, want ErrUnavailable and ErrRestored", err)
	}
	if err := <-done; !errors.Is(err, ErrRestored) {
		t.Errorf("Run: %v, want ErrRestored", err)
	}
	// No other process starts on it, though nothing else tells that it was restored.
	if _, err := open2(t, pool).Start(t.Context(), nil); !errors.Is(err, ErrRestored) {
		t.Errorf("Start: %v, want ErrRestored", err)
	}
	if err := l.EnsureCursors(t.Context(), []string{"amqp"}); err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.sink_cursors SET seq = 3`); err != nil { // saved before it was noticed
		t.Fatal(err)
	}
	if _, err := open2(t, pool).NewEpoch(t.Context(), nil, nothingLost); err != nil {
		t.Fatal(err)
	}
	next := open(t, pool, Config{})
	if cursors, err := next.Cursors(t.Context()); err != nil || cursors["amqp"] != 1 {
		t.Errorf("cursors %v, %v in the new epoch; its head is 1", cursors, err)
	}
}

func nothingLost(context.Context, revocation.Seq) ([]revocation.Revocation, error) { return nil, nil }

// A new epoch whose import fails half way lets no process start, and is finished by
// another call, which is given the same bound.
func TestNewEpochIsFinished(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	if _, err := pool.Exec(t.Context(), `INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime)
		VALUES (-1234, 'Resident Key Manager', true, $1, 3600)`, iss); err != nil {
		t.Fatal(err)
	}
	if _, err := l.commit(t.Context(), []Request{request("kept")}); err != nil {
		t.Fatal(err)
	}
	var lost []revocation.Revocation
	for i := range importChunk + 1 {
		lost = append(lost, revocation.Revocation{Target: request(fmt.Sprint("lost-", i)).Target, Exp: leap})
	}
	var bounds []revocation.Seq
	give := func(_ context.Context, above revocation.Seq) ([]revocation.Revocation, error) {
		bounds = append(bounds, above)
		return lost, nil
	}
	good := lost[importChunk].Exp
	lost[importChunk].Exp = -1 // which the table is made to refuse
	owner, err := pgx.Connect(t.Context(), ownerOf(t, pool))
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close(t.Context())
	if _, err := owner.Exec(t.Context(), `ALTER TABLE rescind.revocations ADD CONSTRAINT test CHECK (exp > 0)`); err != nil {
		t.Fatal(err)
	}
	if _, err := l.NewEpoch(t.Context(), nil, give); err == nil {
		t.Fatal("the import succeeded")
	}
	if _, err := open2(t, pool).Start(t.Context(), nil); !errors.Is(err, ErrRestored) {
		t.Errorf("Start in the middle: %v, want ErrRestored", err)
	}
	lost[importChunk].Exp = good
	if _, err := l.NewEpoch(t.Context(), nil, give); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]revocation.Seq{1, 1}, bounds); diff != "" {
		t.Errorf("bounds: %s", diff)
	}
	if _, err := open2(t, pool).Start(t.Context(), nil); err != nil {
		t.Errorf("Start after it: %v", err)
	}
	if n := len(allEvents(t, open(t, pool, Config{}))); n != len(lost)+1 {
		t.Errorf("%d events, want %d", n, len(lost)+1)
	}
}

// ownerOf is the superuser's URL of the pool's database.
func ownerOf(t *testing.T, pool *pgxpool.Pool) string {
	t.Helper()
	u, err := url.Parse(stacktest.Shared(t).DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/" + pool.Config().ConnConfig.Database
	return u.String()
}

func TestNewEpoch(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	run(t, l)
	mustRevoke(t, l, request("a"))
	before, err := l.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	lead, err := l.Lead(t.Context(), "amqp")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.NewEpoch(t.Context(), []string{"amqp", "etcd"}, nothingLost); err == nil {
		t.Error("a new epoch while a process feeds a sink")
	}
	lead.Release()
	after, err := l.NewEpoch(t.Context(), []string{"amqp", "etcd"}, nothingLost)
	if err != nil || after.Epoch == before.Epoch || after.Seq != before.Seq {
		t.Fatalf("%v, %v after %v", after, err, before)
	}
	mustRevoke(t, l, request("b"))
	if e := allEvents(t, l)[1]; e.Position != (revocation.Position{Epoch: after.Epoch, Seq: 2}) {
		t.Errorf("event of the new epoch stands at %v", e.Position)
	}
}

func TestImport(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	if _, err := pool.Exec(t.Context(), `INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime)
		VALUES (-1234, 'Resident Key Manager', true, $1, 3600)`, iss); err != nil {
		t.Fatal(err)
	}
	rs := []revocation.Revocation{
		{Target: request("a").Target, Exp: leap},
		{Target: revocation.Target{Kind: revocation.KindToken, Iss: "https://unknown.example", ID: "a"}, Exp: leap},
		{Target: revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "u-1"}, Exp: leap, NotAfter: 1234},
	}
	for range 2 {
		if err := l.Import(t.Context(), rs); err != nil {
			t.Fatal(err)
		}
	}
	events := allEvents(t, l)
	if diff := cmp.Diff([]string{"a", "u-1"}, subjects(events)); diff != "" {
		t.Fatal(diff)
	}
	rev, err := events[1].Revocation()
	if err != nil || rev.NotAfter != 1234 || rev.Tenant != revocation.SuperTenant {
		t.Errorf("imported %+v, %v", rev, err)
	}
}

func TestServiceCannotRewriteHistory(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	for _, sql := range []string{
		`UPDATE rescind.audit SET actor = 'x'`, `DELETE FROM rescind.audit`, `TRUNCATE rescind.audit`,
		`UPDATE rescind.log SET data = ''`, `DELETE FROM rescind.log`, `DELETE FROM rescind.revocations`,
	} {
		_, err := pool.Exec(t.Context(), sql)
		pgErr, ok := errors.AsType[*pgconn.PgError](err)
		if !ok || pgErr.Code != "42501" {
			t.Errorf("%s: %v, want insufficient_privilege", sql, err)
		}
	}
}

// The other processes' commits arrive by notification, without a poll.
func TestGrownAcrossProcesses(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	reader := open(t, pool, Config{})
	grown := reader.Grown()
	run(t, reader)
	<-grown // listening
	grown = reader.Grown()
	writer := open(t, pgtest.Pool(t, pool.Config().ConnString()), Config{})
	if _, err := writer.commit(t.Context(), []Request{request("a")}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-grown:
	case <-t.Context().Done():
		t.Fatal("not woken")
	}
}

// What a process has in memory is what the database has, also where others commit in between.
func TestTailIsTheLog(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	ledgers := []*Ledger{open(t, pool, Config{}), open(t, pool, Config{})}
	n := 0
	for _, who := range []int{0, 0, 1, 1, 0, 1, 0, 0} {
		batch := []Request{request(fmt.Sprint(n)), request(fmt.Sprint(n + 1)), request(fmt.Sprint(n))}
		if _, err := ledgers[who].commit(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
		n += 2
	}
	want := allEvents(t, open(t, pool, Config{}))
	if len(want) != n {
		t.Fatalf("%d events, want %d", len(want), n)
	}
	for i, l := range ledgers {
		for from := range n {
			got, err := l.After(t.Context(), revocation.Seq(from), 5)
			if err != nil || len(got) == 0 {
				t.Fatalf("ledger %d after %d: %d events, %v", i, from, len(got), err)
			}
			if diff := cmp.Diff(want[from:from+len(got)], got); diff != "" {
				t.Errorf("ledger %d after %d: %s", i, from, diff)
			}
		}
	}
	if in := len(ledgers[0].tail.after(revocation.Seq(n-4), 10)); in != 4 {
		t.Errorf("the last process to commit has %d of its last 4 events in memory", in)
	}
	ledgers[0].saw(revocation.Position{Epoch: "another", Seq: 1})
	if left := ledgers[0].tail.after(revocation.Seq(n-4), 10); len(left) != 0 {
		t.Errorf("%d events of an epoch that is over are left", len(left))
	}
}

func TestReadsUseIndexes(t *testing.T) {
	t.Parallel()
	const targetIndex = "revocations_iss_ident_kind_digest_key"
	pool := pgtest.New(t)
	for name, q := range map[string]struct {
		index string
		sql   string
		args  []any
	}{
		"after":  {"log_pkey", afterSQL, []any{5, 10}},
		"page":   {"revocations_pkey", pageSQL, []any{uuid.NewString(), 10}},
		"lookup": {targetIndex, lookupSQL, []any{[]string{iss}, []string{"a"}, []string{"token"}, []bool{false}}},
		"by id": {targetIndex, listByIDSQL, []any{pgx.NamedArgs{
			"after": zeroUUID, "tenants": []string{"a.example"}, "kind": nil, "iss": nil, "ident": "a", "limit": 10}}},
		"chunk of a tenant": {"issued_tokens_key_manager", chunkSQL(revocation.KindTenant), []any{pgx.NamedArgs{
			"tenant": -1234, "last": 100, "exp": leap, "limit": 10}}},
		"chunk of a subject": {"issued_tokens_subject", chunkSQL(revocation.KindSubject), []any{pgx.NamedArgs{
			"ident": "a", "iss": iss, "last": 100, "exp": leap, "limit": 10}}},
	} {
		tx, err := pool.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), `SET LOCAL enable_seqscan = off`); err != nil {
			t.Fatal(err)
		}
		rows, err := tx.Query(t.Context(), `EXPLAIN `+q.sql, append([]any{pgx.QueryExecModeExec}, q.args...)...)
		if err != nil {
			t.Fatal(name, err)
		}
		plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(name, err)
		}
		uses := false
		for _, line := range plan {
			uses = uses || strings.Contains(line, q.index)
		}
		if !uses {
			t.Errorf("%s does not use its index: %q", name, plan)
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRunStartsAndStops(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	for range 10 {
		run(t, open(t, pool, Config{}))()
	}
}
