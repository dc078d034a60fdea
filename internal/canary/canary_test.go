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

// The probe and the control.
const (
	secret = "eyJhbGciOiJFUzI1NiJ9.c2VjcmV0.c2lnbmF0dXJl"
	other  = "eyJhbGciOiJFUzI1NiJ9.b3RoZXI.c2lnbmF0dXJl"
)

// control is what the context of a call with the control has.
type control struct{}

// toAll is 401 for the control too, which is else accepted where the probe is refused after its revocation.
const toAll = 1401

// world is a fleet, an issuer and gateways within one process, on a clock of their own.
type world struct {
	testing.TB
	canary *Canary
	reg    *prometheus.Registry
	logged bytes.Buffer

	lifetime             time.Duration
	issueErr, revokeErr  error
	issueFails           int // 0: the probe's, 1: the control's
	leads, leadEnds      int
	lose                 context.CancelCauseFunc
	refreshed            int
	mu                   sync.Mutex // of what follows, and of leads and what ends them
	issued, issuedNow    int        // in all, and in this round
	revoked              []string
	open                 map[string]bool
	expires              time.Time
	revokedAt            time.Time // zero while the last token is good
	gateways             []fleet.Gateway
	behave               map[string]behaviour // by host
	inFlight, mostFlying int
	results              map[string][]outcome
	recording            int
	records              int
	stuck                chan struct{} // the database, until it is closed
	recordErr            error
}

// behaviour answers a call: since is the time from the revocation, negative before it.
type behaviour func(ctx context.Context, since time.Duration) (status int, err error)

// outcome is what was recorded, at which time after the revocation, or after the token was issued.
type outcome struct {
	outcome string
	at      time.Duration
	refused time.Duration
}

func newWorld(t testing.TB, cfg Config) *world {
	t.Helper()
	w := &world{TB: t, reg: prometheus.NewRegistry(), lifetime: 5 * time.Minute, behave: make(map[string]behaviour),
		results: make(map[string][]outcome), open: make(map[string]bool)}
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
	if w.revokeErr == nil && len(w.open) != 0 {
		w.Errorf("after the end tokens are good still: %v", w.open)
	}
	w.checkSecrets()
}

func (w *world) checkSecrets() {
	w.Helper()
	if strings.Contains(w.logged.String(), secret) || strings.Contains(w.logged.String(), other) {
		w.Errorf("a token is in the log:\n%s", w.logged.String())
	}
}

// round runs one round, and what comes after it.
func (w *world) round() {
	w.Helper()
	if err := w.try(); err != nil {
		w.Fatal(err)
	}
}

// try is round, which may fail.
func (w *world) try() error {
	w.Helper()
	ctx, cancel := context.WithCancel(w.Context())
	var watching, keeping sync.WaitGroup
	keeping.Go(func() { w.canary.keep(ctx) })
	_, err := w.canary.round(ctx, &watching)
	watching.Wait()
	time.Sleep(2 * gatherTime)
	cancel()
	keeping.Wait()
	if w.revokeErr == nil && len(w.open) != 0 {
		w.Errorf("after the round tokens are good still: %v", w.open)
	}
	w.checkSecrets()
	return err
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
	if w.issueErr != nil && w.issuedNow == w.issueFails {
		return Token{}, w.issueErr
	}
	w.issued++
	w.issuedNow++
	compact := other
	if w.issuedNow == 1 {
		compact = secret
		w.revokedAt, w.expires = time.Time{}, time.Now().Add(w.lifetime)
	}
	t := Token{Compact: compact, Iss: "https://km.example.com", ID: fmt.Sprintf("jti-%d", w.issued), Expires: w.expires}
	w.open[t.ID] = true
	return t, nil
}

func (w *world) Revoke(ctx context.Context, t Token) (revocation.Position, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return revocation.Position{}, ctx.Err()
	case w.revokeErr != nil:
		return revocation.Position{}, w.revokeErr
	case !w.open[t.ID]:
		w.Errorf("revoked is %s, which is not good", t.ID)
	}
	delete(w.open, t.ID)
	w.revoked = append(w.revoked, t.ID)
	if t.Compact == secret {
		w.revokedAt = time.Now()
	}
	return revocation.Position{Epoch: "e", Seq: revocation.Seq(len(w.revoked))}, nil
}

func (w *world) Refresh(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refreshed++
	w.issuedNow = 0
	return nil
}

func (w *world) Gateways() []fleet.Gateway {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.gateways)
}

func (w *world) Gateway(id string) (fleet.Gateway, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if i := slices.IndexFunc(w.gateways, func(g fleet.Gateway) bool { return g.ID == id }); i >= 0 {
		return w.gateways[i], true
	}
	return fleet.Gateway{}, false
}

func (w *world) RecordCanaries(ctx context.Context, results map[string]fleet.CanaryResult) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.recording++; w.recording > 1 {
		w.Error("two statements at a time")
	}
	defer func() { w.recording-- }()
	if stuck := w.stuck; stuck != nil {
		w.mu.Unlock()
		select {
		case <-stuck:
		case <-ctx.Done():
		}
		w.mu.Lock()
	}
	if err := cmp.Or(ctx.Err(), w.recordErr); err != nil {
		return err
	}
	w.records++
	for i := range w.gateways {
		g := &w.gateways[i]
		r, ok := results[g.ID]
		if !ok {
			continue
		}
		if strings.Contains(r.Detail, secret) || strings.Contains(r.Detail, other) {
			w.Errorf("a token is in the detail %q", r.Detail)
		}
		if (r.Detail == "") != (r.Outcome == Refused) {
			w.Errorf("%s: outcome %s with detail %q", g.ID, r.Outcome, r.Detail)
		}
		since := w.revokedAt
		if since.IsZero() || !r.At.After(since) && r.Outcome != Refused { // it was never accepted
			since = w.expires.Add(-w.lifetime)
		}
		w.results[g.ID] = append(w.results[g.ID], outcome{r.Outcome, r.At.Sub(since), time.Duration(r.RefusedMS * float64(time.Millisecond))})
		g.Canary = &r
	}
	return nil
}

// RoundTrip is the way to the gateways.
func (w *world) RoundTrip(r *http.Request) (*http.Response, error) {
	got := r.Header.Get("Authorization")
	if got != "Bearer "+secret && got != "Bearer "+other {
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
	ctx := r.Context()
	if got == "Bearer "+other {
		ctx = context.WithValue(ctx, control{}, true)
	}
	status, err := b(ctx, since)
	w.mu.Lock()
	w.inFlight--
	w.mu.Unlock()
	if err != nil {
		return nil, err
	}
	switch {
	case status == toAll:
		status = 401
	case status == 401 && since >= 0 && got == "Bearer "+other:
		status = 200
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

// toControl answers the control, and b the probe.
func toControl(answer, b behaviour) behaviour {
	return func(ctx context.Context, since time.Duration) (int, error) {
		if ctx.Value(control{}) != nil {
			return answer(ctx, since)
		}
		return b(ctx, since)
	}
}

func TestVerdicts(t *testing.T) {
	t.Parallel()
	const tick = maxSpacing
	slowly := func(ctx context.Context, since time.Duration) (int, error) {
		if since >= 0 {
			time.Sleep(1500 * time.Millisecond)
		}
		return 200, ctx.Err()
	}
	for name, tt := range map[string]struct {
		behave behaviour
		want   []outcome // times may be up to a spacing later
		slow   time.Duration
	}{
		"at once":             {refuses(0, 401), []outcome{{Refused, 0, 0}}, 0},
		"soon":                {refuses(40*time.Millisecond, 401), []outcome{{Refused, 40 * time.Millisecond, 40 * time.Millisecond}}, 25 * time.Millisecond},
		"403":                 {refuses(time.Second, 403), []outcome{{Unreachable, 5 * time.Second, 0}, {Unreachable, 50 * time.Second, 0}}, 0},
		"to all":              {refuses(time.Second, toAll), []outcome{{NotAccepted, 5 * time.Second, 0}, {NotAccepted, 50 * time.Second, 0}}, 0},
		"control never known": {toControl(always(401), always(200)), []outcome{{NotAccepted, 5 * time.Second, 0}}, 0},
		"control forbidden": {toControl(then(always(200), always(403)), refuses(0, 401)),
			[]outcome{{NotAccepted, 5 * time.Second, 0}, {NotAccepted, 50 * time.Second, 0}}, 0},
		"control breaks": {toControl(then(always(200), always(503)), refuses(0, 401)),
			[]outcome{{Unreachable, 5 * time.Second, 0}, {Unreachable, 50 * time.Second, 0}}, 0},
		"control slow, in time": {toControl(slowly, refuses(4700*time.Millisecond, 401)),
			[]outcome{{Refused, 4700*time.Millisecond + 1500*time.Millisecond, 4700 * time.Millisecond}}, tick},
		"to all for some time": {then(always(200), func(_ context.Context, since time.Duration) (int, error) {
			if since < 2*time.Second {
				return toAll, nil
			}
			return 401, nil
		}), []outcome{{Refused, 2 * time.Second, 2 * time.Second}}, tick},
		"to all, then accepts": {then(always(200), func(_ context.Context, since time.Duration) (int, error) {
			if since < 6*time.Second {
				return toAll, nil
			}
			return 200, nil
		}), []outcome{{NotAccepted, 5 * time.Second, 0}, {StillAccepted, 6 * time.Second, 0}, {StillAccepted, 50 * time.Second, 0}}, tick},
		"just in time":  {refuses(4700*time.Millisecond, 401), []outcome{{Refused, 4700 * time.Millisecond, 4700 * time.Millisecond}}, tick},
		"late":          {refuses(7*time.Second, 401), []outcome{{StillAccepted, 5 * time.Second, 0}, {StillAccepted, 7 * time.Second, 7 * time.Second}}, tick},
		"never":         {always(200), []outcome{{StillAccepted, 5 * time.Second, 0}, {StillAccepted, 50 * time.Second, 0}}, 0},
		"never known":   {always(401), []outcome{{NotAccepted, 5 * time.Second, 0}}, 0},
		"never allowed": {always(403), []outcome{{NotAccepted, 5 * time.Second, 0}}, 0},
		"never there":   {always(503), []outcome{{Unreachable, 5 * time.Second, 0}}, 0},
		"redirects":     {always(302), []outcome{{Unreachable, 5 * time.Second, 0}}, 0},
		"hangs":         {hangs, []outcome{{Unreachable, 5 * time.Second, 0}}, 0},
		"breaks": {func(context.Context, time.Duration) (int, error) { return 0, errors.New("connection refused") },
			[]outcome{{Unreachable, 5 * time.Second, 0}}, 0},
		"paused": {then(always(200), hangs), []outcome{{Unreachable, 5 * time.Second, 0}, {Unreachable, 50 * time.Second, 0}}, 0},
		"paused after it accepted": {then(always(200), func(ctx context.Context, since time.Duration) (int, error) {
			if since < 4*time.Second {
				return 200, nil
			}
			return hangs(ctx, since)
		}), []outcome{{StillAccepted, 5 * time.Second, 0}, {Unreachable, 7 * time.Second, 0}, {Unreachable, 50 * time.Second, 0}}, tick},
		"away for some time": {then(always(200), func(_ context.Context, since time.Duration) (int, error) {
			if since < 3*time.Second {
				return 502, nil
			}
			return 401, nil
		}), []outcome{{Refused, 3 * time.Second, 3 * time.Second}}, tick},
		"away, then late": {then(always(200), func(_ context.Context, since time.Duration) (int, error) {
			switch {
			case since < 6*time.Second:
				return 502, nil
			case since < 8*time.Second:
				return 200, nil
			}
			return 401, nil
		}), []outcome{{Unreachable, 5 * time.Second, 0}, {StillAccepted, 6 * time.Second, 0}, {StillAccepted, 8 * time.Second, 8 * time.Second}}, tick},
		"accepts now and then": {then(always(200), func(_ context.Context, since time.Duration) (int, error) {
			if since.Milliseconds()/1000%2 == 0 {
				return 503, nil
			}
			return 200, nil
		}), []outcome{{Unreachable, 5 * time.Second, 0}, {StillAccepted, 5 * time.Second, 0}, {StillAccepted, 50 * time.Second, 0}}, tick},
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
		if want := []outcome{{Refused, 0, 0}}; !slices.Equal(w.results["g"], want) {
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
				return toAll, nil
			}
			return 200, nil
		})
		w.round()
		want := []outcome{{StillAccepted, 20 * time.Second, 0}, {StillAccepted, 30 * time.Second, 0}}
		if !slices.Equal(w.results["g"], want) {
			t.Errorf("recorded is %v, want %v", w.results["g"], want)
		}

		w.lifetime, w.results = 49*time.Second, map[string][]outcome{}
		if err := w.try(); err == nil || len(w.results) != 0 {
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
		if w.issued != 2 || !slices.Equal(w.revoked, []string{"jti-1", "jti-2"}) {
			t.Errorf("%d tokens were issued, and revoked %q", w.issued, w.revoked)
		}
		if w.records > 40 {
			t.Errorf("450 gateways took %d statements", w.records)
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
		w.results = make(map[string][]outcome)
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
		w.issueFails = 1
		w.run(16 * time.Second)
		if w.issued == 0 || w.issued != len(w.revoked) {
			t.Errorf("in rounds without a control %d tokens were issued, and %d revoked", w.issued, len(w.revoked))
		}
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
		clear(w.open) // they end by themselves
		w.revokeErr, w.recordErr = nil, errors.New("no connection")
		go func() {
			time.Sleep(16 * time.Second)
			w.mu.Lock()
			defer w.mu.Unlock()
			w.recordErr = nil
		}()
		w.run(18 * time.Second)
		if n := testutil.ToFloat64(w.canary.metrics.rounds.WithLabelValues("done")); n < 2 || strings.Count(w.logged.String(), "no connection") != 1 {
			t.Errorf("%v rounds are done, and the log is\n%s", n, w.logged.String())
		}
		if got := w.results["g"]; len(got) == 0 {
			t.Error("what could not be recorded was not recorded later")
		}
	})
}

// A database that does not answer holds up no measuring, and gets what there is then at once.
func TestSlowDatabase(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		w.stuck = make(chan struct{})
		for i := range 100 {
			w.add(fmt.Sprintf("late-%d", i), refuses(7*time.Second, 401))
			w.add(fmt.Sprintf("well-%d", i), refuses(time.Duration(i)*time.Millisecond, 401))
		}
		go func() {
			time.Sleep(30 * time.Second)
			w.mu.Lock()
			defer w.mu.Unlock()
			close(w.stuck)
			w.stuck = nil
		}()
		ctx, cancel := context.WithCancel(t.Context())
		var watching, keeping sync.WaitGroup
		keeping.Go(func() { w.canary.keep(ctx) })
		begin := time.Now()
		if _, err := w.canary.round(ctx, &watching); err != nil || time.Since(begin) > 6*time.Second {
			t.Errorf("the round took %s: %v", time.Since(begin), err)
		}
		watching.Wait()
		if took := time.Since(begin); took > 8*time.Second {
			t.Errorf("the watching took %s", took)
		}
		time.Sleep(time.Minute)
		cancel()
		keeping.Wait()
		if len(w.results) != 200 || w.records > 3 {
			t.Errorf("there are results of %d gateways in %d statements", len(w.results), w.records)
		}
		for id, got := range w.results {
			if last := got[len(got)-1]; strings.HasPrefix(id, "late") && (last.outcome != StillAccepted || last.refused < 7*time.Second || last.refused > 7250*time.Millisecond) {
				t.Errorf("%s: %v", id, got)
			}
		}
	})
}

// Of a gateway that is not to be called there any more, nothing more is said.
func TestNoLongerWanted(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(w *world){
		"changed":   func(w *world) { w.gateways[0].CanaryURL, w.gateways[0].Canary = "https://g.example.com/new", nil },
		"removed":   func(w *world) { w.gateways[0].CanaryURL, w.gateways[0].Canary = "", nil },
		"forgotten": func(w *world) { w.gateways = nil },
	} {
		for when, after := range map[string]time.Duration{"before the limit": 2 * time.Second, "after it": 20 * time.Second} {
			t.Run(name+" "+when, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, Config{})
					calls := 0
					w.add("g", func(context.Context, time.Duration) (int, error) { calls++; return 200, nil })
					done := make(chan struct{})
					go func() {
						defer close(done)
						w.round()
					}()
					time.Sleep(after)
					w.mu.Lock()
					w.results = make(map[string][]outcome)
					change(w)
					w.mu.Unlock()
					w.canary.due()
					before := calls
					<-done
					if time.Now().After(w.expires.Add(after+maxSpacing+2*gatherTime-w.lifetime)) || calls > before+1 {
						t.Errorf("it was called %d times more", calls-before)
					}
					if len(w.results) != 0 || len(w.canary.last) != 0 || len(w.canary.unkept) != 0 {
						t.Errorf("recorded is %v, known is %v", w.results, w.canary.last)
					}
					if n := testutil.CollectAndCount(w.canary.metrics.accepts); n != 0 || testutil.ToFloat64(w.canary.metrics.alarming) != 0 {
						t.Errorf("the metrics have %d gateways", n)
					}
				})
			})
		}
	}
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
# HELP rescind_canary_alarming Gateways whose last canary is alarming: not refused in time, refused without being revoked, or not answered.
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
# HELP rescind_canary_alarming Gateways whose last canary is alarming: not refused in time, refused without being revoked, or not answered.
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
	add("b-1", url, Unreachable, 0)
	add("b", url, NotAccepted, 0)
	add("well", url, Refused, 0)
	add("old", url, StillAccepted, 1000*time.Hour)
	add("no more", "", StillAccepted, 0)
	gateways = append(gateways, fleet.Gateway{ID: "new", CanaryURL: url})
	want := []string{"b (not_accepted)", "b-1 (unreachable)", "old (still_accepted)", "z (still_accepted)"}
	if d := diff.Diff(want, Alarms(gateways)); d != "" {
		t.Error(d)
	}
	if got := Alarms(nil); got != nil {
		t.Errorf("of no gateways: %q", got)
	}
}

func TestSilence(t *testing.T) {
	t.Parallel()
	start := time.Now()
	at := func(minutes float64) time.Time { return start.Add(time.Duration(minutes * float64(time.Minute))) }
	gateway := func(minutes ...float64) (all []fleet.Gateway) {
		for _, m := range minutes {
			all = append(all, fleet.Gateway{CanaryURL: "https://g.example.com/", Canary: &fleet.CanaryResult{Outcome: Unreachable, At: at(m)}})
		}
		return all
	}
	untold := []fleet.Gateway{{CanaryURL: "https://g.example.com/"}}
	without := []fleet.Gateway{{Canary: &fleet.CanaryResult{Outcome: Refused, At: at(500)}}}
	s := NewSilence(time.Minute, start)
	for _, step := range []struct {
		gateways   []fleet.Gateway
		now, since float64
		silent     bool
	}{
		{gateway(-60), 10, 0, false}, {gateway(-60), 10.5, 0, true}, // it was silent when the process began
		{gateway(-60, 10.4), 11, 10.4, false}, {gateway(10.4), 20.5, 10.4, true},
		{untold, 20.5, 10.4, true}, {untold, 20.3, 10.4, false}, // the URL was changed
		{without, 100, 100, false}, {untold, 110, 100, false}, {untold, 111, 100, true}, // it was not asked for anything
		{gateway(115), 112, 112, false}, {gateway(115), 125.1, 115, true}, // a clock ahead
	} {
		if since, silent := s.Since(step.gateways, at(step.now)); silent != step.silent || !since.Equal(at(step.since)) {
			t.Errorf("at minute %v: %v since minute %v, want %v since %v", step.now, silent, since.Sub(start).Minutes(), step.silent, step.since)
		}
	}
	s = NewSilence(time.Hour, start)
	if _, silent := s.Since(untold, at(180)); silent {
		t.Error("with a round an hour it is silent after three")
	}
	if _, silent := s.Since(untold, at(181)); !silent {
		t.Error("with a round an hour it is not silent after more than three")
	}
}
