package obs_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/internal/obs"
)

func TestNewLogger(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		cfg  obs.Config
		want string
	}{
		{"zero value", obs.Config{}, `"level":"INFO","msg":"sink caught up","sink":"etcd"}` + "\n"},
		{"text", obs.Config{Text: true}, ` level=INFO msg="sink caught up" sink=etcd` + "\n"},
		{"warnings only", obs.Config{Level: slog.LevelWarn}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var b bytes.Buffer
			log := obs.NewLogger(tt.cfg, &b)
			log.Debug("batch", "size", 3)
			log.Info("sink caught up", "sink", "etcd")
			got := b.String()
			if len(tt.want) == 0 && got != "" || !strings.HasSuffix(got, tt.want) || strings.Count(got, "\n") > 1 {
				t.Errorf("got %q, want one line that ends %q", got, tt.want)
			}
		})
	}
}

func check(name string, status obs.Status, detail string) obs.Check {
	return obs.Check{Name: name, Run: func(context.Context) (obs.Status, string) { return status, detail }}
}

func TestReadyz(t *testing.T) {
	t.Parallel()
	postgres := check("postgres", obs.Pass, "2 of 16 connections busy")
	tests := []struct {
		name   string
		target string
		checks []obs.Check
		drain  bool
		status int
		body   string
	}{
		{"nothing to check", "/readyz", nil, false, 200, `{"status":"pass","checks":{}}`},
		{"all pass", "/readyz", []obs.Check{postgres, check("sink-etcd", obs.Pass, "")}, false, 200,
			`{"status":"pass","checks":{"postgres":{"status":"pass"},"sink-etcd":{"status":"pass"}}}`},
		{"a warning serves on", "/readyz", []obs.Check{postgres, check("sink-etcd", obs.Warn, "down")}, false, 200,
			`{"status":"warn","checks":{"postgres":{"status":"pass"},"sink-etcd":{"status":"warn"}}}`},
		{"a failure outranks a warning", "/readyz", []obs.Check{check("postgres", obs.Fail, "down"), check("sink-etcd", obs.Warn, "down")}, false, 503,
			`{"status":"fail","checks":{"postgres":{"status":"fail"},"sink-etcd":{"status":"warn"}}}`},
		{"verbose", "/readyz?verbose=1", []obs.Check{postgres, check("sink-etcd", obs.Warn, "41 events behind")}, false, 200,
			`{"status":"warn","checks":{"postgres":{"status":"pass","detail":"2 of 16 connections busy"},"sink-etcd":{"status":"warn","detail":"41 events behind"}}}`},
		{"draining", "/readyz?verbose=1", []obs.Check{postgres}, true, 503,
			`{"status":"fail","checks":{"draining":{"status":"fail","detail":"the process is stopping"},"postgres":{"status":"pass","detail":"2 of 16 connections busy"}}}`},
		{"alive whatever the checks say", "/healthz", []obs.Check{check("postgres", obs.Fail, "down")}, true, 200,
			`{"status":"pass","checks":{}}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ready := &obs.Readiness{Checks: tt.checks}
			if tt.drain {
				ready.Drain()
			}
			w := httptest.NewRecorder()
			obs.Handler(obs.Config{}, obs.NewRegistry(), ready).ServeHTTP(w, httptest.NewRequest(http.MethodGet, tt.target, nil))
			if w.Code != tt.status || w.Body.String() != tt.body+"\n" {
				t.Errorf("got %d %s, want %d %s", w.Code, w.Body, tt.status, tt.body)
			}
			if got := w.Header().Get("Content-Type"); got != "application/json" {
				t.Errorf("Content-Type %q", got)
			}
		})
	}
}

// Checks run side by side, are told when their time is over, and cannot hold up
// the answer when they do not listen.
func TestReadyzIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		heeds := func(ctx context.Context) (obs.Status, string) {
			<-ctx.Done()
			return obs.Warn, "unreachable"
		}
		release := make(chan struct{})
		ignores := func(context.Context) (obs.Status, string) {
			<-release
			return obs.Pass, ""
		}
		ready := &obs.Readiness{Checks: []obs.Check{
			{Name: "heeds", Vital: true, Run: heeds},
			{Name: "heeds-too", Run: heeds},
			{Name: "ignores", Run: ignores},
			{Name: "ignores-vital", Vital: true, Run: ignores},
		}}
		began := time.Now()
		w := httptest.NewRecorder()
		obs.Handler(obs.Config{}, obs.NewRegistry(), ready).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz?verbose=1", nil))
		// The clock is the bubble's: it moves only while everybody waits.
		if took := time.Since(began); took < 2*time.Second || took > 2200*time.Millisecond {
			t.Errorf("answered after %s", took)
		}
		close(release)
		var got map[string]any
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		want := map[string]any{"status": "fail", "checks": map[string]any{
			"heeds":         map[string]any{"status": "warn", "detail": "unreachable"},
			"heeds-too":     map[string]any{"status": "warn", "detail": "unreachable"},
			"ignores":       map[string]any{"status": "warn", "detail": "no answer in time"},
			"ignores-vital": map[string]any{"status": "fail", "detail": "no answer in time"},
		}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

func TestHandler(t *testing.T) {
	t.Parallel()
	plain := obs.Handler(obs.Config{}, obs.NewRegistry(), &obs.Readiness{})
	profiled := obs.Handler(obs.Config{Pprof: true}, obs.NewRegistry(), &obs.Readiness{})
	tests := []struct {
		name    string
		handler http.Handler
		method  string
		target  string
		status  int
		allow   string
		body    string // a part of it
	}{
		{"memory", plain, "GET", "/metrics", 200, "", "\nprocess_resident_memory_bytes "},
		{"runtime", plain, "GET", "/metrics", 200, "", "\ngo_goroutines "},
		{"build", plain, "GET", "/metrics", 200, "", "\ngo_build_info{"},
		{"head", plain, "HEAD", "/readyz", 200, "", ""},
		{"post", plain, "POST", "/readyz", 405, "GET, HEAD", ""},
		{"no such page", plain, "GET", "/", 404, "", ""},
		{"profiles are off", plain, "GET", "/debug/pprof/", 404, "", ""},
		{"profiles are on", profiled, "GET", "/debug/pprof/", 200, "", "goroutine"},
		{"one profile", profiled, "GET", "/debug/pprof/goroutine?debug=1", 200, "", "goroutine profile"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := httptest.NewRecorder()
			tt.handler.ServeHTTP(w, httptest.NewRequest(tt.method, tt.target, nil))
			if w.Code != tt.status || w.Header().Get("Allow") != tt.allow {
				t.Errorf("got %d, Allow %q, want %d, %q", w.Code, w.Header().Get("Allow"), tt.status, tt.allow)
			}
			if !strings.Contains(w.Body.String(), tt.body) {
				t.Errorf("%q is not in the body", tt.body)
			}
			if got := w.Header().Get("Cache-Control"); got != "no-store" {
				t.Errorf("Cache-Control %q", got)
			}
		})
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	h := obs.Handler(obs.Config{}, obs.NewRegistry(), &obs.Readiness{})
	for _, tt := range []struct {
		given string
		keep  bool
	}{
		{"probe-7.a_B", true},
		{strings.Repeat("a", 64), true},
		{strings.Repeat("a", 65), false},
		{"a b", false},
		{"a\nb", false},
		{"", false},
	} {
		r := httptest.NewRequest(http.MethodGet, "/healthz", nil)
		r.Header.Set("X-Request-Id", tt.given)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		got := w.Header().Get("X-Request-Id")
		if got == "" || (got == tt.given) != tt.keep {
			t.Errorf("given %q, answered %q", tt.given, got)
		}
	}
}

// One broken collector leaves the others readable.
func TestMetricsOutliveABrokenCollector(t *testing.T) {
	t.Parallel()
	reg := obs.NewRegistry()
	desc := prometheus.NewDesc("rescind_test_broken", "Never has a value.", nil, nil)
	reg.MustRegister(brokenCollector{desc})
	w := httptest.NewRecorder()
	obs.Handler(obs.Config{}, reg, &obs.Readiness{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != 200 || !strings.Contains(w.Body.String(), "\nprocess_resident_memory_bytes ") {
		t.Errorf("got %d, without the other metrics", w.Code)
	}
}

type brokenCollector struct{ desc *prometheus.Desc }

func (c brokenCollector) Describe(ch chan<- *prometheus.Desc) { ch <- c.desc }
func (c brokenCollector) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.NewInvalidMetric(c.desc, context.DeadlineExceeded)
}
