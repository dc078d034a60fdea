package obs

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/http/pprof"
	"regexp"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Status is how well a dependency does.
type Status string

// The statuses, in the words of the expired draft-inadarei-api-health-check.
const (
	Pass Status = "pass"
	Warn Status = "warn" // someone should look; requests are served
	Fail Status = "fail" // send requests elsewhere
)

// Check looks at one dependency.
type Check struct {
	// Name is the member of "checks" in the answer.
	Name string
	// Vital makes a Run that does not return in time a failure rather than a warning.
	Vital bool
	// Run is called for every probe, from several goroutines at once, and is
	// given two seconds. Its detail is shown to strangers: no host name, no
	// credential. Detail may be empty.
	Run func(ctx context.Context) (status Status, detail string)
}

// Readiness is what /readyz answers from. It must not be copied.
type Readiness struct {
	// Checks have distinct names and stay as they are once [Handler] has them.
	Checks []Check

	draining atomic.Bool
}

// Drain makes /readyz fail from now on, so that load balancers look elsewhere
// before the listener closes.
func (r *Readiness) Drain() { r.draining.Store(true) }

// checkTimeout is below the time-outs that orchestrators give their probes.
const checkTimeout = 2 * time.Second

type result struct {
	Status Status `json:"status"`
	Detail string `json:"detail,omitempty"`
}

type report struct {
	Status Status            `json:"status"`
	Checks map[string]result `json:"checks"`
}

func (r *Readiness) report(ctx context.Context) report {
	out := report{Status: Pass, Checks: make(map[string]result, len(r.Checks)+1)}
	if r.draining.Load() {
		out.Status = Fail
		out.Checks["draining"] = result{Fail, "the process is stopping"}
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	results := make([]chan result, len(r.Checks))
	for i, c := range r.Checks {
		results[i] = make(chan result, 1) // buffered: a late check finds no reader
		go func() {
			status, detail := c.Run(ctx)
			results[i] <- result{status, detail}
		}()
	}
	for i, c := range r.Checks {
		res := await(ctx, results[i], c.Vital)
		out.Checks[c.Name] = res
		if res.Status == Fail || res.Status == Warn && out.Status == Pass {
			out.Status = res.Status
		}
	}
	return out
}

// await prefers what a check said to the time-out that made it say so.
func await(ctx context.Context, done <-chan result, vital bool) result {
	select {
	case res := <-done:
		return res
	case <-ctx.Done():
	}
	// A check that heeds ctx answers a moment after it ended, in its own words.
	patience := time.NewTimer(50 * time.Millisecond)
	defer patience.Stop()
	select {
	case res := <-done:
		return res
	case <-patience.C:
	}
	if vital {
		return result{Fail, "no answer in time"}
	}
	return result{Warn, "no answer in time"}
}

// Handler serves the operators' listener: /healthz (this process runs), /readyz
// (it may take requests: 200 for pass and warn, 503 for fail; ?verbose=1 adds
// each check's detail), /metrics, and /debug/pprof/ if cfg asks for it.
func Handler(cfg Config, reg *prometheus.Registry, ready *Readiness) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		write(w, report{Status: Pass, Checks: map[string]result{}})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		rep := ready.report(r.Context())
		if r.URL.Query().Get("verbose") != "1" {
			for name, res := range rep.Checks {
				rep.Checks[name] = result{Status: res.Status}
			}
		}
		write(w, rep)
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		Registry:      reg,                      // counts its own errors
		ErrorHandling: promhttp.ContinueOnError, // one broken collector must not blind us to the rest
	}))
	if cfg.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("POST /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := r.Header.Get("X-Request-Id")
		if !requestID.MatchString(id) {
			id = rand.Text()
		}
		w.Header().Set("X-Request-Id", id)
		w.Header().Set("Cache-Control", "no-store")
		mux.ServeHTTP(w, r)
	})
}

var requestID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func write(w http.ResponseWriter, rep report) {
	w.Header().Set("Content-Type", "application/json")
	if rep.Status == Fail {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(rep) // the probe has gone away: nobody is left to tell
}
