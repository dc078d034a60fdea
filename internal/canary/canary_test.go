package canary

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	diff "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
)

const secret = "eyJhbGciOiJFUzI1NiJ9.c2VjcmV0.c2lnbmF0dXJl"

// world is a fleet, an issuer and gateways within one process, on a clock of their own.
type world struct {
	testing.TB
	canary *Canary
	reg    *prometheus.Registry
	logged bytes.Buffer

	lifetime             time.Duration
	issueErr, revokeErr  error
	leads, leadEnds      int
	lose                 context.CancelCauseFunc
	refreshed            int
	mu                   sync.Mutex // of what follows, and of leads and what ends them
	issued, revoked      int
	expires              time.Time
	revokedAt            time.Time // zero while the last token is good
	gateways             []fleet.Gateway
	behave               map[string]behaviour // by host
	inFlight, mostFlying int
	results              map[string][]result
	recordErr            error
}

// behaviour answers a call: since is the time from the revocation, negative before it.
type behaviour func(ctx context.Context, since time.Duration) (status int, err error)

// result is what was recorded, at which time after the revocation, or after the token was issued.
type result struct {
	outcome string
	at      time.Duration
	refused time.Duration
}

func newWorld(t testing.TB, cfg Config) *world {
	t.Helper()
	w := &world{TB: t, reg: prometheus.NewRegistry(), lifetime: 5 * time.Minute, behave: make(map[string]behaviour), results: make(map[string][]result)}
	cfg.Every, cfg.Limit = cmp.Or(cfg.Every, time.Minute), cmp.Or(cfg.Limit, 5*time.Second)
	cfg.Client = &http.Client{Transport: w}
	log := slog.New(slog.NewJSONHandler(&w.logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
	c, err := New(cfg, w, w, w.lead, w.reg, log)
	if err != nil {
		t.Fatal(err)
	}
	w.canary = c
	return w
}

// add adds a gateway of which nothing is known yet.
func (w *world) add(id string, b behaviour) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.behave[id+".example.com"] = b
	w.gateways = append(w.gateways, fleet.Gateway{ID: id, CanaryURL: "https://" + id + ".example.com/rescind-canary/v1/"})
}

// run runs the canary for d, then until it has stopped.
func (w *world) run(d time.Duration) {
	w.Helper()
	ctx, cancel := context.WithCancel(w.Context())
	done := make(chan error, 1)
	go func() { done <- w.canary.Run(ctx) }()
	time.Sleep(d)
	synctest.Wait()
	cancel()
	if err := <-done; err != nil {
		w.Errorf("Run: %v", err)
	}
	if strings.Contains(w.logged.String(), secret) {
		w.Errorf("the token is in the log:\n%s", w.logged.String())
	}
}

// round runs one round, and what comes after it.
func (w *world) round() {
	w.Helper()
	var watching sync.WaitGroup
	if _, err := w.canary.round(w.Context(), &watching); err != nil {
		w.Fatal(err)
	}
	watching.Wait()
}

func (w *world) lead(ctx context.Context) (context.Context, func(), error) {
	leading, lose := context.WithCancelCause(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leads++
	w.lose = lose
	return leading, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.leadEnds++
		lose(nil)
	}, nil
}

func (w *world) Issue(context.Context) (Token, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.issueErr != nil {
		return Token{}, w.issueErr
	}
	w.issued++
	w.revokedAt, w.expires = time.Time{}, time.Now().Add(w.lifetime)
	return Token{Compact: secret, Iss: "https://km.example.com", ID: fmt.Sprintf("jti-%d", w.issued), Expires: w.expires}, nil
}

func (w *world) Revoke(_ context.Context, t Token) (revocation.Position, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.revokeErr != nil {
		return revocation.Position{}, w.revokeErr
	}
	if want := fmt.Sprintf("jti-%d", w.issued); t.ID != want {
		w.Errorf("revoked is %s, want %s", t.ID, want)
	}
	w.revoked++
	w.revokedAt = time.Now()
	return revocation.Position{Epoch: "e", Seq: revocation.Seq(w.revoked)}, nil
}

func (w *world) Refresh(context.Context) error { w.refreshed++; return nil }

func (w *world) Gateways() []fleet.Gateway {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.gateways)
}

func (w *world) RecordCanary(_ context.Context, id string, r fleet.CanaryResult) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if strings.Contains(r.Detail, secret) {
		w.Errorf("the token is in the detail %q", r.Detail)
	}
	if (r.Detail == "") != (r.Outcome == Refused) {
		w.Errorf("%s: outcome %s with detail %q", id, r.Outcome, r.Detail)
	}
	since := w.revokedAt
	if since.IsZero() {
		since = w.expires.Add(-w.lifetime)
	}
	w.results[id] = append(w.results[id], result{r.Outcome, r.At.Sub(since), time.Duration(r.RefusedMS * float64(time.Millisecond))})
	for i := range w.gateways {
		if w.gateways[i].ID == id {
			w.gateways[i].Canary = &r
			return w.recordErr
		}
	}
	return fleet.ErrNotFound
}

// RoundTrip is the way to the gateways.
func (w *world) RoundTrip(r *http.Request) (*http.Response, error) {
	if got := r.Header.Get("Authorization"); got != "Bearer "+secret {
		w.Errorf("Authorization is %q", got)
	}
	w.mu.Lock()
	since := -time.Hour
	if !w.revokedAt.IsZero() {
		since = time.Since(w.revokedAt)
	}
	b := w.behave[r.URL.Host]
	if w.inFlight++; since < 0 {
		w.mostFlying = max(w.mostFlying, w.inFlight)
	}
	w.mu.Unlock()
	status, err := b(r.Context(), since)
	w.mu.Lock()
	w.inFlight--
	w.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: status, Body: http.NoBody, Request: r, Header: http.Header{"Location": {"https://elsewhere.example.com/"}}}, nil
}

// refuses accepts until after the revocation, and says so with status then.
func refuses(after time.Duration, status int) behaviour {
	return func(_ context.Context, since time.Duration) (int, error) {
		if since >= after {
			return status, nil
		}
		return 204, nil
	}
}

func always(status int) behaviour {
	return func(context.Context, time.Duration) (int, error) { return status, nil }
}

func hangs(ctx context.Context, _ time.Duration) (int, error) {
	<-ctx.Done()
	return 0, ctx.Err()
}

// then is before until the revocation, and after from then on.
func then(before, after behaviour) behaviour {
	return func(ctx context.Context, since time.Duration) (int, error) {
		if since < 0 {
			return before(ctx, since)
		}
		return after(ctx, since)
	}
}

func TestVerdicts(t *testing.T) {
	t.Parallel()
	const tick = maxSpacing
	for name, tt := range map[string]struct {
		behave behaviour
		want   []result // times may be up to a spacing later
		slow   time.Duration
	}{
		"at once":       {refuses(0, 401), []result{{Refused, 0, 0}}, 0},
		"soon":          {refuses(40*time.Millisecond, 401), []result{{Refused, 40 * time.Millisecond, 40 * time.Millisecond}}, 25 * time.Millisecond},
		"403":           {refuses(time.Second, 403), []result{{Refused, time.Second, time.Second}}, tick},
		"just in time":  {refuses(4700*time.Millisecond, 401), []result{{Refused, 4700 * time.Millisecond, 4700 * time.Millisecond}}, tick},
		"late":          {refuses(7*time.Second, 401), []result{{StillAccepted, 5 * time.Second, 0}, {StillAccepted, 7 * time.Second, 7 * time.Second}}, tick},
		"never":         {always(200), []result{{StillAccepted, 5 * time.Second, 0}, {StillAccepted, 50 * time.Second, 0}}, 0},
		"never known":   {always(401), []result{{NotAccepted, 5 * time.Second, 0}}, 0},
		"never allowed": {always(403), []result{{NotAccepted, 5 * time.Second, 0}}, 0},
		"never there":   {always(503), []result{{Unreachable, 5 * time.Second, 0}}, 0},
		"redirects":     {always(302), []result{{Unreachable, 5 * time.Second, 0}}, 0},
		"hangs":         {hangs, []result{{Unreachable, 5 * time.Second, 0}}, 0},
		"breaks": {func(context.Context, time.Duration) (int, error) { return 0, errors.New("connection refused") },
			[]result{{Unreachable, 5 * time.Second, 0}}, 0},
		"paused": {then(always(200), hangs), []result{{Unreachable, 5 * time.Second, 0}, {Unreachable, 50 * time.Second, 0}}, 0},
		"paused after it accepted": {then(always(200), func(ctx context.Context, since time.Duration) (int, error) {
			if since < 4*time.Second {
				return 200, nil
			}
			return hangs(ctx, since)
		}), []result{{StillAccepted, 5 * time.Second, 0}, {Unreachable, 7 * time.Second, 0}, {Unreachable, 50 * time.Second, 0}}, tick},
		"away for some time": {then(always(200), func(_ context.Context, since time.Duration) (int, error) {
			if since < 3*time.Second {
				return 502, nil
			}
			return 401, nil
		}), []result{{Refused, 3 * time.Second, 3 * time.Second}}, tick},
		"away, then late": {then(always(200), func(_ context.Context, since time.Duration) (int, error) {
			switch {
			case since < 6*time.Second:
				return 502, nil
			case since < 8*time.Second:
				return 200, nil
			}
			return 401, nil
		}), []result{{Unreachable, 5 * time.Second, 0}, {StillAccepted, 6 * time.Second, 0}, {StillAccepted, 8 * time.Second, 8 * time.Second}}, tick},
		"accepts now and then": {then(always(200), func(_ context.Context, since time.Duration) (int, error) {
			if since.Milliseconds()/1000%2 == 0 {
				return 503, nil
			}
			return 200, nil
		}), []result{{Unreachable, 5 * time.Second, 0}, {StillAccepted, 5 * time.Second, 0}, {StillAccepted, 50 * time.Second, 0}}, tick},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				w.add("g", tt.behave)
				w.round()
				got := w.results["g"]
				if len(got) != len(tt.want) {
					t.Fatalf("recorded is %v, want %v", got, tt.want)
				}
				for i, r := range got {
					want := tt.want[i]
					if r.outcome != want.outcome || r.at < want.at || r.at > want.at+tt.slow || r.refused < want.refused || r.refused > want.refused+tt.slow {
						t.Errorf("recorded is %v, want %v, at most %s later", r, want, tt.slow)
					}
				}
			})
		})
	}
}

// A gateway learns of the canary's API, and of a key, when it does.
func TestAcceptsInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		start := time.Now()
		w.add("g", func(_ context.Context, since time.Duration) (int, error) {
			if time.Since(start) < 4*time.Second || since >= 0 {
				return 401, nil
			}
			return 200, nil
		})
		w.round()
		if want := []result{{Refused, 0, 0}}; !slices.Equal(w.results["g"], want) {
			t.Errorf("recorded is %v, want %v", w.results["g"], want)
		}
	})
}

// That the token is over refuses it everywhere, and says nothing of the revocation.
func TestExpiryIsNoRefusal(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{Limit: 20 * time.Second})
		w.lifetime = time.Minute
		w.add("g", func(context.Context, time.Duration) (int, error) {
			if time.Now().Add(20 * time.Second).After(w.expires) { // its clock is ahead
				return 401, nil
			}
			return 200, nil
		})
		w.round()
		want := []result{{StillAccepted, 20 * time.Second, 0}, {StillAccepted, 30 * time.Second, 0}}
		if !slices.Equal(w.results["g"], want) {
			t.Errorf("recorded is %v, want %v", w.results["g"], want)
		}

		w.lifetime, w.results = 49*time.Second, map[string][]result{}
		var watching sync.WaitGroup
		if _, err := w.canary.round(t.Context(), &watching); err == nil || w.revoked != 1 || len(w.results) != 0 {
			t.Errorf("with a token that is shorter than the limit: %v, and recorded is %v", err, w.results)
		}
	})
}

// Those that hang change nothing of what is measured of others, and there is one revocation for all.
func TestManyGateways(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{Limit: time.Second})
		for i := range 150 {
			w.add(fmt.Sprintf("dead-%03d", i), hangs)
			w.add(fmt.Sprintf("paused-%03d", i), then(always(200), hangs))
			w.add(fmt.Sprintf("well-%03d", i), refuses(100*time.Millisecond, 401))
		}
		w.gateways = append(w.gateways, fleet.Gateway{ID: "without"})
		w.round()
		if w.issued != 1 || w.revoked != 1 {
			t.Errorf("%d tokens were issued and %d revoked", w.issued, w.revoked)
		}
		if w.mostFlying != maxAccepting {
			t.Errorf("%d are called at a time before the revocation, want %d", w.mostFlying, maxAccepting)
		}
		if len(w.results) != 450 {
			t.Errorf("there are results of %d gateways", len(w.results))
		}
		for id, got := range w.results {
			switch {
			case strings.HasPrefix(id, "well"):
				if len(got) != 1 || got[0].outcome != Refused || got[0].refused > 200*time.Millisecond {
					t.Errorf("%s: %v", id, got)
				}
			case got[0].outcome != Unreachable, strings.HasPrefix(id, "paused") && got[0].at != time.Second:
				t.Errorf("%s: %v", id, got)
			}
		}
		if n := testutil.ToFloat64(w.canary.metrics.alarming); n != 300 {
			t.Errorf("%v are alarming, want 300", n)
		}
	})
}

// Of more than fit into a round, those that were not tried for longest are next.
func TestMoreThanARound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		for i := range maxRound + 100 {
			w.add(fmt.Sprintf("g-%04d", i), refuses(0, 401))
		}
		for _, want := range []int{1000, 1100} {
			w.round()
			time.Sleep(time.Minute)
			if len(w.results) != want {
				t.Errorf("%d gateways were tried, want %d", len(w.results), want)
			}
		}
		// Those that were tried in both rounds would be next to wait.
		w.results = make(map[string][]result)
		w.round()
		for i := 900; i < maxRound; i++ {
			if id := fmt.Sprintf("g-%04d", i); len(w.results[id]) != 1 {
				t.Errorf("%s, which was tried in the first round alone, is not tried in the third", id)
			}
		}
	})
}

// A gateway that is called further does not hold up the others, and its alarm does not get old meanwhile.
func TestRoundsGoOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{Every: 10 * time.Second})
		w.add("bad", always(200))
		w.add("good", refuses(10*time.Millisecond, 401))
		w.run(44 * time.Second) // the first begins within 5 s
		if n := len(w.results["good"]); n < 4 {
			t.Errorf("the good one was tried %d times in 44 s, want every 10 s", n)
		}
		bad := w.results["bad"]
		if len(bad) < 4 {
			t.Errorf("the bad one has results %v, want one every 10 s", bad)
		}
		for _, r := range bad {
			if r.outcome != StillAccepted {
				t.Errorf("the bad one is %v", r)
			}
		}
		if w.leads != 1 || w.leadEnds != 1 {
			t.Errorf("it was led %d times, and given up %d times", w.leads, w.leadEnds)
		}
	})
}

func TestLeadershipLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{Limit: time.Second})
		w.add("g", always(200))
		begun := make(chan struct{})
		w.add("h", then(always(200), func(ctx context.Context, since time.Duration) (int, error) {
			close(begun)
			return hangs(ctx, since)
		}))
		go func() {
			<-begun
			time.Sleep(500 * time.Millisecond)
			w.mu.Lock()
			defer w.mu.Unlock()
			w.gateways = w.gateways[:1]
			w.lose(errors.New("another session answers"))
		}()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.canary.Run(ctx) }()
		<-begun
		time.Sleep(600 * time.Millisecond)
		w.mu.Lock()
		if len(w.results) != 0 || w.leadEnds != 1 {
			t.Errorf("after the loss results are %v, and the lead was given up %d times", w.results, w.leadEnds)
		}
		w.mu.Unlock()
		time.Sleep(30 * time.Second)
		w.mu.Lock()
		if w.leads != 2 || len(w.results["g"]) == 0 || len(w.results["h"]) != 0 {
			t.Errorf("it was led %d times, results are %v", w.leads, w.results)
		}
		w.mu.Unlock()
		if n := testutil.ToFloat64(w.canary.metrics.accepts.WithLabelValues("g")); n != 1 {
			t.Errorf("accepts is %v", n)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := testutil.CollectAndCount(w.canary.metrics.accepts); n != 0 || testutil.ToFloat64(w.canary.metrics.alarming) != 0 {
			t.Errorf("who does not lead shows %d gateways", n)
		}
	})
}

func TestFailedRounds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{Every: 10 * time.Second})
		w.run(30 * time.Second)
		if w.issued != 0 || w.refreshed < 3 {
			t.Errorf("without a gateway %d tokens were issued in %d rounds", w.issued, w.refreshed)
		}
		w.add("g", refuses(0, 401))
		w.issueErr = errors.New("the application is blocked")
		w.run(16 * time.Second)
		w.issueErr, w.revokeErr = nil, errors.New("the database is away")
		w.run(16 * time.Second)
		failed := testutil.ToFloat64(w.canary.metrics.rounds.WithLabelValues("failed"))
		if len(w.results) != 0 || failed < 4 {
			t.Errorf("after %v failed rounds results are %v", failed, w.results)
		}
		for _, want := range []string{"the application is blocked", "the database is away"} {
			if !strings.Contains(w.logged.String(), want) {
				t.Errorf("the log does not say %q:\n%s", want, w.logged.String())
			}
		}
		w.revokeErr, w.recordErr = nil, errors.New("no connection")
		w.run(16 * time.Second)
		if n := testutil.ToFloat64(w.canary.metrics.rounds.WithLabelValues("done")); n < 2 || !strings.Contains(w.logged.String(), "no connection") {
			t.Errorf("%v rounds are done, and the log is\n%s", n, w.logged.String())
		}
	})
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{Limit: time.Second})
		w.add("late", refuses(2*time.Second, 401))
		w.add("bad", always(200))
		w.add("good", refuses(0, 401))
		w.add("away", always(500))
		w.round()
		const head = `
# HELP rescind_canary_accepts 1 while the gateway accepts a canary that was revoked longer ago than the limit.
# TYPE rescind_canary_accepts gauge
`
		want := head + `rescind_canary_accepts{gateway="away"} 0
rescind_canary_accepts{gateway="bad"} 1
rescind_canary_accepts{gateway="good"} 0
rescind_canary_accepts{gateway="late"} 0
# HELP rescind_canary_alarming Gateways whose last canary was not refused in time.
# TYPE rescind_canary_alarming gauge
rescind_canary_alarming 3
`
		if err := testutil.GatherAndCompare(w.reg, strings.NewReader(want), "rescind_canary_accepts", "rescind_canary_alarming"); err != nil {
			t.Error(err)
		}
		if n := testutil.CollectAndCount(w.canary.metrics.last); n != 2 {
			t.Errorf("%d gateways have a time, want 2", n)
		}

		w.gateways = slices.DeleteFunc(w.gateways, func(g fleet.Gateway) bool { return g.ID == "bad" || g.ID == "late" })
		w.gateways[1].CanaryURL = ""
		w.round()
		want = head + `rescind_canary_accepts{gateway="good"} 0
# HELP rescind_canary_alarming Gateways whose last canary was not refused in time.
# TYPE rescind_canary_alarming gauge
rescind_canary_alarming 0
`
		if err := testutil.GatherAndCompare(w.reg, strings.NewReader(want), "rescind_canary_accepts", "rescind_canary_alarming"); err != nil {
			t.Error(err)
		}
		if n := testutil.CollectAndCount(w.canary.metrics.last); n != 1 {
			t.Errorf("%d gateways have a time, want 1", n)
		}
	})
}

func TestConfig(t *testing.T) {
	t.Parallel()
	for _, cfg := range []Config{
		{Every: 9 * time.Second, Limit: time.Second}, {Every: 25 * time.Hour, Limit: time.Second},
		{Every: time.Minute, Limit: 99 * time.Millisecond}, {Every: time.Minute, Limit: 61 * time.Second}, {},
	} {
		if _, err := New(cfg, nil, nil, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("New takes %+v", cfg)
		}
	}
}

func TestAlarms(t *testing.T) {
	t.Parallel()
	now := time.Now()
	var gateways []fleet.Gateway
	add := func(id, url, outcome string, age time.Duration) {
		gateways = append(gateways, fleet.Gateway{ID: id, CanaryURL: url, Canary: &fleet.CanaryResult{Outcome: outcome, At: now.Add(-age)}})
	}
	const url = "https://g.example.com/"
	add("z", url, StillAccepted, time.Second)
	add("b", url, Unreachable, 3*time.Minute)
	add("a", url, NotAccepted, 0)
	add("well", url, Refused, 0)
	add("old", url, StillAccepted, 3*time.Minute+time.Second)
	add("no more", "", StillAccepted, 0)
	gateways = append(gateways, fleet.Gateway{ID: "new", CanaryURL: url})
	if d := diff.Diff([]string{"a", "b", "z"}, Alarms(gateways, time.Minute, now)); d != "" {
		t.Error(d)
	}
	if got := Alarms(nil, time.Minute, now); got != nil {
		t.Errorf("of no gateways: %q", got)
	}
}
