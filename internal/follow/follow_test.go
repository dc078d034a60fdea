package follow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/relaytest"
)

const iss = "https://km.example.com"

var leap = time.Now().Add(time.Hour).Unix()

// source is a ledger as a follower sees it. What a test sets is set before it is used.
type source struct {
	*ledger.Ledger
	loads atomic.Int64
	// deaf: it hears of nothing that others write.
	deaf bool
}

func (s *source) Load(ctx context.Context, at func(revocation.Position), revoked func(replica.Record), _ func(catalog.Entity)) error {
	s.loads.Add(1)
	return s.View(ctx, func(_ context.Context, _ pgx.Tx, p revocation.Position, each func(func(directory.Stored)) error) error {
		at(p)
		return each(func(s directory.Stored) {
			revoked(replica.Record{Target: s.Target, Tenant: s.Tenant, Exp: s.Exp, NotAfter: s.NotAfter, Signature: s.Signature})
		})
	})
}

func (s *source) After(ctx context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error) {
	events, err := s.Ledger.After(ctx, seq, limit)
	if errors.Is(err, ledger.ErrSeqGone) {
		return nil, fmt.Errorf("%w: %w", follow.ErrGone, err)
	}
	return events, err
}

func (s *source) Grown() <-chan struct{} {
	if s.deaf {
		return nil
	}
	return s.Ledger.Grown()
}

// run runs f until the test ends, or stop is called.
func run(t *testing.T, f func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// process is a ledger that runs, on a pool of its own.
func process(t *testing.T, url string) *source {
	t.Helper()
	l, err := ledger.New(ledger.Config{Source: iss}, pgtest.Pool(t, url), prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	run(t, l.Run)
	return &source{Ledger: l}
}

type following struct {
	*follow.Follower
	reg *prometheus.Registry
}

// loaded returns a follower of s that is loaded and does not run.
func loaded(t *testing.T, s *source, cfg follow.Config) following {
	t.Helper()
	reg := prometheus.NewRegistry()
	f, err := follow.New(cfg, s, reg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	return following{f, reg}
}

func (f following) run(t *testing.T) following {
	t.Helper()
	run(t, f.Run)
	return f
}

func (f following) metric(t *testing.T, name string) float64 {
	t.Helper()
	all, err := f.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.GetName() == name {
			return m.Metric[0].GetCounter().GetValue() + m.Metric[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}

func (f following) fresh(t *testing.T) revocation.Position {
	t.Helper()
	at, err := f.Fresh(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if now := f.Replica().At(); now.Seq < at.Seq {
		t.Fatalf("fresh at %s, and the replica is at %s", at, now)
	}
	return at
}

func (f following) frames(t *testing.T, after revocation.Position, limit int) []follow.Frame {
	t.Helper()
	frames, err := f.Frames(t.Context(), after, limit)
	if err != nil {
		t.Fatal(err)
	}
	for i, frame := range frames {
		if frame.Seq != after.Seq+revocation.Seq(i)+1 || frame.Epoch != after.Epoch {
			t.Fatalf("frame %d after %s is %s", i, after, frame.Position)
		}
	}
	if len(frames) > limit {
		t.Fatalf("%d frames, asked for %d", len(frames), limit)
	}
	return frames
}

// text is a frame that go-cmp need not compare byte by byte.
type text struct {
	At                revocation.Position
	Tenant, JSON, SSE string
}

// allFrames are those after position until the follower's end.
func (f following) allFrames(t *testing.T, after revocation.Position) (all []text) {
	t.Helper()
	for {
		frames := f.frames(t, after, 700)
		if len(frames) == 0 {
			return all
		}
		for _, frame := range frames {
			all = append(all, text{frame.Position, frame.Tenant, string(frame.JSON), string(frame.SSE)})
		}
		after = frames[len(frames)-1].Position
	}
}

func (f following) revoked(t *testing.T) map[revocation.Target]replica.Record {
	t.Helper()
	all := make(map[revocation.Target]replica.Record)
	f.Replica().View(func(v *replica.View) {
		for rec := range v.Revocations().All() {
			all[rec.Target] = rec
		}
	})
	return all
}

func (f following) apis() (all []*catalog.API) {
	f.Replica().View(func(v *replica.View) { all = v.APIs() })
	return all
}

func revoke(t *testing.T, s *source, jti string) revocation.Target {
	t.Helper()
	target := revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: jti}
	_, err := s.Revoke(t.Context(), ledger.Request{
		Target: target, Tenant: revocation.SuperTenant, Exp: leap, Reason: "client", Action: "revoke_token", Actor: ledger.Actor{Name: "system"},
	})
	if err != nil {
		t.Fatalf("revoke %s: %v", jti, err)
	}
	return target
}

// change appends n events about APIs, from number first on.
func change(t *testing.T, s *source, first, n int) revocation.Position {
	t.Helper()
	head, err := s.Change(t.Context(), func(_ context.Context, tx *ledger.Tx) error {
		for i := first; i < first+n; i++ {
			api := &catalog.API{
				Meta: catalog.Meta{ID: int32(i + 1), UUID: fmt.Sprintf("00000000-0000-4000-8000-%012x", i), Tenant: revocation.SuperTenant, Timestamp: 1},
				Name: fmt.Sprint("api-", i), Version: "1", Context: fmt.Sprint("/", i),
			}
			e, err := catalog.NewEvent(catalog.Change{Verb: catalog.Created, Entity: api})
			if err != nil {
				return err
			}
			tx.Append(e, api.UUID)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return head
}

func exec(t *testing.T, pool *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

// Two processes write, and each follows what both wrote.
func TestFollow(t *testing.T) {
	t.Parallel()
	db := pgtest.Create(t)
	relaytest.NoLeaks(t)
	a, b := process(t, db.ServiceURL), process(t, db.ServiceURL)
	before := revoke(t, a, "before")
	fa, fb := loaded(t, a, follow.Config{}).run(t), loaded(t, b, follow.Config{KeepBytes: 1 << 20}).run(t)
	begin := fa.Replica().At()
	var writers sync.WaitGroup
	for p, s := range []*source{a, b} {
		for w := range 4 {
			writers.Go(func() {
				for i := range 40 {
					revoke(t, s, fmt.Sprintf("%d-%d-%d", p, w, i))
				}
			})
		}
		writers.Go(func() {
			for i := range 2 {
				change(t, s, 1000*p+500*i, 500)
			}
		})
	}
	writers.Wait()
	head := fa.fresh(t)
	if other := fb.fresh(t); other != head || head.Seq != 1+2*(4*40+2*500) {
		t.Fatalf("the followers are at %s and %s", head, other)
	}
	if got := len(fa.revoked(t)); got != 2*4*40+1 {
		t.Errorf("%d revocations", got)
	}
	if _, ok := fa.Replica().Check(replica.Token{Iss: iss, JTI: before.ID}, time.Now().Unix()); !ok {
		t.Error("what was revoked before the start is not")
	}
	if diff := cmp.Diff(fa.revoked(t), fb.revoked(t)); diff != "" {
		t.Errorf("revocations differ: %s", diff)
	}
	if diff := cmp.Diff(fa.apis(), fb.apis()); diff != "" || len(fa.apis()) != 2000 {
		t.Errorf("%d APIs: %s", len(fa.apis()), diff)
	}

	// Whoever followed, from wherever it reads: the same bytes.
	want := fa.allFrames(t, begin)
	if fa.metric(t, "rescind_follow_old_reads_total") != 0 {
		t.Error("frames that were in memory were read from the database")
	}
	events, err := a.After(t.Context(), begin.Seq, 10_000)
	if err != nil || len(events) != len(want) {
		t.Fatalf("%d frames for %d events, %v", len(want), len(events), err)
	}
	for i, e := range events {
		data, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		frame := text{e.Position, e.Tenant.Domain, string(data), fmt.Sprintf("id: %s\nevent: %s\ndata: %s\n\n", e.Position, e.Type, data)}
		if diff := cmp.Diff(frame, want[i]); diff != "" {
			t.Fatal(diff)
		}
		if bytes.ContainsAny(data, "\r\n") {
			t.Fatalf("event %s has several lines", e.Position)
		}
	}
	if diff := cmp.Diff(want, fb.allFrames(t, begin)); diff != "" {
		t.Errorf("frames of the two differ: %s", diff)
	}
	if fb.metric(t, "rescind_follow_old_reads_total") == 0 {
		t.Error("2 MB of frames are said to be in a memory of 1 MB")
	}
	late := loaded(t, process(t, db.ServiceURL), follow.Config{})
	revoked := fa.revoked(t)
	if got := fa.metric(t, "rescind_follow_events_total"); got != float64(len(want)) || fa.metric(t, "rescind_follow_seq") != float64(head.Seq) {
		t.Errorf("%v events counted, want %d", got, len(want))
	}
	revoke(t, a, "more") // which it does not know, and must not tell
	if diff := cmp.Diff(want, late.allFrames(t, begin)); diff != "" {
		t.Errorf("frames of one that came late differ: %s", diff)
	}
	if diff := cmp.Diff(revoked, late.revoked(t)); diff != "" {
		t.Errorf("loading and following differ: %s", diff)
	}
	if a.loads.Load() != 1 || b.loads.Load() != 1 {
		t.Errorf("loaded %d and %d times", a.loads.Load(), b.loads.Load())
	}
}

// trim removes the events up to seq, as retention does.
func trim(t *testing.T, owner *pgxpool.Pool, seq revocation.Seq) {
	t.Helper()
	exec(t, owner, `DELETE FROM rescind.log WHERE seq <= $1`, int64(seq))
}

func TestFramesAtTheEnds(t *testing.T) {
	t.Parallel()
	db := pgtest.Create(t)
	relaytest.NoLeaks(t)
	owner := pgtest.Pool(t, db.OwnerURL)
	writer, deaf := process(t, db.ServiceURL), process(t, db.ServiceURL)
	deaf.deaf = true
	change(t, writer, 0, 20)
	f := loaded(t, deaf, follow.Config{PollEvery: 2 * time.Second}).run(t)
	at := f.Replica().At()
	after := func(seq revocation.Seq) revocation.Position { return revocation.Position{Epoch: at.Epoch, Seq: seq} }
	refused := func(after revocation.Position, want error) {
		t.Helper()
		if frames, err := f.Frames(t.Context(), after, 10); !errors.Is(err, want) {
			t.Errorf("after %s: %d frames, %v; want %v", after, len(frames), err, want)
		}
	}
	if frames := f.frames(t, at, 10); len(frames) != 0 {
		t.Errorf("%d frames after the last", len(frames))
	}
	refused(after(21), follow.ErrAhead)
	refused(after(-1), follow.ErrGone)
	refused(revocation.Position{Epoch: "00000000-0000-4000-8000-000000000000", Seq: 20}, follow.ErrGone)

	// Another process has written, and this one does not know: it finds out.
	last := change(t, writer, 20, 5)
	if frames := f.frames(t, last, 10); len(frames) != 0 || f.Replica().At() != last {
		t.Errorf("%d frames after %s, the replica is at %s", len(frames), last, f.Replica().At())
	}
	if frames := f.frames(t, after(20), 3); len(frames) != 3 {
		t.Errorf("%d frames, want 3", len(frames))
	}
	refused(after(26), follow.ErrAhead)

	// 1 to 10 are no longer there.
	trim(t, owner, 10)
	refused(after(9), follow.ErrGone)
	if frames := f.frames(t, after(10), 100); len(frames) != 15 { // some from before it began to follow
		t.Errorf("%d frames after 10", len(frames))
	}
	trim(t, owner, 20)
	refused(after(19), follow.ErrGone)
	trim(t, owner, 25)
	refused(after(19), follow.ErrGone)
	if frames := f.frames(t, after(20), 100); len(frames) != 5 {
		t.Errorf("%d frames after 20 are in memory", len(frames))
	}

	// A context that ends stops every wait.
	ctx, cancel := context.WithCancelCause(t.Context())
	left := errors.New("left")
	cancel(left)
	if _, err := f.Frames(ctx, after(100), 1); !errors.Is(err, left) {
		t.Errorf("Frames for one who left: %v", err)
	}
}

// What events cannot tell is loaded: the log was trimmed, or is another one.
func TestReload(t *testing.T) {
	t.Parallel()
	db := pgtest.Create(t)
	relaytest.NoLeaks(t)
	owner := pgtest.Pool(t, db.OwnerURL)
	writer := process(t, db.ServiceURL)
	revoke(t, writer, "one")
	for name, later := range map[string]int{"some of the log": 3, "all of the log": 0} {
		s := process(t, db.ServiceURL)
		f := loaded(t, s, follow.Config{})
		begin := f.Replica().At()
		revoke(t, writer, name)
		at, err := writer.Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		trim(t, owner, at.Seq)
		for i := range later {
			revoke(t, writer, fmt.Sprint(name, i))
		}
		f.run(t)
		f.fresh(t)
		if got := f.revoked(t); s.loads.Load() != 2 || f.metric(t, "rescind_follow_reloads_total") != 1 || len(got) != int(at.Seq)+later {
			t.Errorf("%s: loaded %d times, %d revocations", name, s.loads.Load(), len(got))
		}
		if _, err := f.Frames(t.Context(), begin, 10); !errors.Is(err, follow.ErrGone) {
			t.Errorf("%s: frames from before: %v", name, err)
		}
		revoke(t, writer, name+" and after")
		after := f.Replica().At()
		f.fresh(t)
		if frames := f.frames(t, after, 10); len(frames) > 1 || s.loads.Load() != 2 {
			t.Errorf("%s: %d frames, loaded %d times", name, len(frames), s.loads.Load())
		}
	}
}

func TestNewEpoch(t *testing.T) {
	t.Parallel()
	const next = "5f0c1a7e-0b52-4f0d-8f7b-2d8f5f9c6a11"
	db := pgtest.Create(t)
	relaytest.NoLeaks(t)
	owner := pgtest.Pool(t, db.OwnerURL)
	s := process(t, db.ServiceURL)
	lost, kept := revoke(t, s, "lost"), revoke(t, s, "kept")
	f := loaded(t, s, follow.Config{PollEvery: 10 * time.Millisecond}).run(t)
	was := f.fresh(t)
	// A backup without the first, and no event that would tell: only the head does.
	exec(t, owner, `WITH gone AS (DELETE FROM rescind.revocations WHERE ident = 'lost')
		UPDATE rescind.log_head SET epoch = $1::text::uuid`, next)
	for bound := time.After(30 * time.Second); ; {
		changed := f.Changed()
		if f.Replica().At().Epoch == next {
			break
		}
		select {
		case <-changed:
		case <-bound:
			t.Fatal("the new epoch is not noticed")
		}
	}
	if at := f.fresh(t); at != (revocation.Position{Epoch: next, Seq: was.Seq}) {
		t.Errorf("fresh at %s", at)
	}
	if _, err := f.Frames(t.Context(), was, 1); !errors.Is(err, follow.ErrGone) {
		t.Errorf("frames of the old epoch: %v", err)
	}
	added := revoke(t, s, "added")
	at := f.fresh(t)
	for _, target := range []revocation.Target{lost, kept, added} {
		if _, ok := f.revoked(t)[target]; !ok {
			t.Errorf("%s is not revoked any more", target.ID)
		}
	}
	if frames := f.frames(t, revocation.Position{Epoch: next, Seq: was.Seq}, 10); len(frames) != 1 || frames[0].Position != at {
		t.Errorf("%d frames on the new epoch", len(frames))
	}
}

// The connections to Postgres are cut: nobody is told that old state is new, and all is
// well as soon as they are back.
func TestPostgresAway(t *testing.T) {
	t.Parallel()
	db := pgtest.Create(t)
	relaytest.NoLeaks(t)
	u, err := url.Parse(db.ServiceURL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := relaytest.NewProxy(t, u.Host)
	u.Host = proxy.Addr()
	writer, s := process(t, db.ServiceURL), process(t, u.String())
	revoke(t, writer, "before")
	f := loaded(t, s, follow.Config{PollEvery: 100 * time.Millisecond}).run(t)
	begin := f.fresh(t)
	for round := range 3 {
		proxy.Refuse()
		target := revoke(t, writer, fmt.Sprint("away-", round))
		_, err := f.Fresh(t.Context(), 0)
		if !errors.Is(err, follow.ErrStale) || strings.TrimPrefix(err.Error(), follow.ErrStale.Error()) == "" {
			t.Errorf("Fresh while Postgres is away: %v", err)
		}
		if _, err := f.Frames(t.Context(), revocation.Position{Epoch: begin.Epoch, Seq: 100}, 1); !errors.Is(err, follow.ErrStale) {
			t.Errorf("Frames that wait while Postgres is away: %v", err)
		}
		if frames := f.frames(t, begin, 100); len(frames) != round {
			t.Errorf("%d frames from memory, want %d", len(frames), round)
		}
		proxy.Heal()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		for f.revoked(t)[target].Exp == 0 { // old connections may be found broken first
			if _, err := f.Fresh(ctx, 0); err != nil && !errors.Is(err, follow.ErrStale) {
				t.Fatal(err)
			}
		}
		cancel()
	}
	if frames := f.frames(t, begin, 100); len(frames) != 3 {
		t.Errorf("%d frames, want 3", len(frames))
	}
	if s.loads.Load() != 1 {
		t.Errorf("loaded %d times", s.loads.Load())
	}
}
