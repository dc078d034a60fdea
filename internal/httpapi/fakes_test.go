package httpapi

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// fakeLedger keeps what it is given.
type fakeLedger struct {
	mu       sync.Mutex
	err      error // of every call
	wait     bool  // until the caller's context ends
	known    map[revocation.Target]revocation.Revocation
	requests []ledger.Request // that added something
	repeats  []ledger.Request
	audits   []ledger.AuditEntry
	issued   map[string]ledger.Issued // by jti
}

func (l *fakeLedger) IssuedToken(_ context.Context, jti string) (ledger.Issued, bool, error) {
	t, ok := l.issued[jti]
	return t, ok, l.err
}

func (l *fakeLedger) Revoke(ctx context.Context, r ledger.Request) (ledger.Result, error) {
	if l.wait {
		<-ctx.Done()
		return ledger.Result{}, context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return ledger.Result{}, l.err
	}
	if known, ok := l.known[r.Target]; ok && known.Exp >= r.Exp {
		l.repeats = append(l.repeats, r)
		return ledger.Result{}, nil
	}
	if l.known == nil {
		l.known = make(map[revocation.Target]revocation.Revocation)
	}
	l.known[r.Target] = revocation.Revocation{Target: r.Target, Exp: r.Exp, ClientID: r.ClientID}
	l.requests = append(l.requests, r)
	return ledger.Result{Seq: revocation.Seq(len(l.requests)), Added: true}, nil
}

func (l *fakeLedger) Audit(_ context.Context, e ledger.AuditEntry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.audits = append(l.audits, e)
	}
	return l.err
}

func (l *fakeLedger) Known(_ context.Context, target revocation.Target) (revocation.Revocation, bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	known, ok := l.known[target]
	return known, ok, l.err
}

// fakeClients lets everybody in as one client, unless it has an error.
type fakeClients struct {
	client authn.Client
	err    error
	owners map[string]int32 // by "<iss> <consumer key>"
}

func (c *fakeClients) Form(w http.ResponseWriter, r *http.Request, _ ...string) (authn.Client, url.Values, error) {
	w.Header().Set("Cache-Control", "no-store")
	if err := r.ParseForm(); err != nil {
		return authn.Client{}, nil, err
	}
	return c.client, r.PostForm, c.err
}

func (c *fakeClients) Owner(_ context.Context, iss, consumerKey string) (int32, bool, error) {
	app, ok := c.owners[iss+" "+consumerKey]
	return app, ok, c.err
}

// fakeVerifier has one answer.
type fakeVerifier struct {
	token  *token.Token
	err    error
	issuer token.Issuer
	calls  int
}

func (v *fakeVerifier) Verify(context.Context, string) (*token.Token, error) {
	v.calls++
	return v.token, v.err
}

func (v *fakeVerifier) Issuer(string) (token.Issuer, bool) { return v.issuer, true }

// syncBuffer is a log that several goroutines write.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// stand is a handler with its log and metrics.
type stand struct {
	http.Handler
	log *syncBuffer
	reg *prometheus.Registry
}

func newStand(t testing.TB, cfg Config, deps Deps) *stand {
	t.Helper()
	s := &stand{log: &syncBuffer{}, reg: prometheus.NewRegistry()}
	deps.Registerer, deps.Log = s.reg, slog.New(slog.NewJSONHandler(s.log, nil))
	if deps.Remote == nil {
		deps.Remote = func(r *http.Request) netip.Addr { return netip.MustParseAddrPort(r.RemoteAddr).Addr() }
	}
	if deps.Ledger == nil {
		deps.Ledger = &fakeLedger{}
	}
	if deps.Clients == nil {
		deps.Clients = &fakeClients{}
	}
	if deps.Introspection == nil {
		deps.Introspection = http.NotFoundHandler()
	}
	if deps.Tenant == nil {
		deps.Tenant = func(context.Context, string) error { return nil }
	}
	h, err := New(cfg, deps)
	if err != nil {
		t.Fatal(err)
	}
	s.Handler = h
	return s
}

// serve runs the handler in a server of ours on loopback and returns its address.
func (s *stand) serve(t testing.TB, cfg Config) string {
	t.Helper()
	srv, err := NewServer(cfg, s, s.reg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(l); err != http.ErrServerClosed {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return l.Addr().String()
}

// metric is the value of one sample, by its name and labels as they are scraped.
func (s *stand) metric(t testing.TB, name string, labels ...string) float64 {
	t.Helper()
	families, err := s.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			var got []string
			for _, l := range m.GetLabel() {
				got = append(got, l.GetValue())
			}
			if strings.Join(got, " ") != strings.Join(labels, " ") {
				continue
			}
			switch {
			case m.Counter != nil:
				return m.GetCounter().GetValue()
			case m.Gauge != nil:
				return m.GetGauge().GetValue()
			}
			return float64(m.GetHistogram().GetSampleCount())
		}
	}
	t.Fatalf("there is no %s of %q", name, labels)
	return 0
}

func routes(add ...func(chi.Router)) []func(chi.Router) { return add }
