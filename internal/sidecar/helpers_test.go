package sidecar

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

var loopbacks = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}

// fake is an engine of which a test says what it decides.
type fake struct {
	decide func(gateway.Request) gateway.Decision
	ready  bool
	status replica.Status
	// onRun is called when Run begins, onStop before it returns; both may be nil.
	onRun, onStop func()
	fails         error // what Run returns, at once

	mu    sync.Mutex
	asked []gateway.Request
}

func (f *fake) Decide(_ context.Context, r gateway.Request) gateway.Decision {
	f.mu.Lock()
	f.asked = append(f.asked, r)
	f.mu.Unlock()
	return f.decide(r)
}

func (f *fake) Ready() bool            { return f.ready }
func (f *fake) Status() replica.Status { return f.status }
func (f *fake) Keys() gateway.Status   { return gateway.Status{Issuers: 2, WithKeys: 1} }

func (f *fake) Run(ctx context.Context) error {
	if f.onRun != nil {
		f.onRun()
	}
	if f.fails != nil {
		return f.fails
	}
	<-ctx.Done()
	if f.onStop != nil {
		f.onStop()
	}
	return nil
}

// questions are what was asked since the last call.
func (f *fake) questions() []gateway.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	asked := f.asked
	f.asked = nil
	return asked
}

var pizza = &catalog.API{
	Meta: catalog.Meta{Tenant: revocation.SuperTenant}, Name: "PizzaShackAPI", Version: "1.0.0", Context: "/pizzashack/1.0.0",
}

// allowed is a decision for alice and the API.
func allowed(api *catalog.API) gateway.Decision {
	return gateway.Decision{
		Allowed: true, Token: &token.Token{Issuer: "https://km.example.com", Subject: "alice", ID: "t1"},
		Authorization: replica.Authorization{Authorized: true, API: api, Info: replica.Info{Authorized: true, APIName: api.Name, APIVersion: api.Version}},
	}
}

func refusedWith(status int, code replica.Code, challenge string) gateway.Decision {
	return gateway.Decision{Status: status, Challenge: challenge, Reason: "revoked", Authorization: replica.Authorization{Code: code}}
}

// clean decides as a gateway would of requests without any more mistakes: yes if the path is clean.
func clean(r gateway.Request) gateway.Decision {
	if _, ok := replica.CleanPath(r.Target); !ok {
		return refusedWith(400, replica.CodeForbidden, "")
	}
	return allowed(pizza)
}

var quiet = slog.New(slog.DiscardHandler)

// lockedBuffer is a log of several goroutines.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// countedOf is e with metrics that nobody reads.
func countedOf(e engine) (*counted, *metrics) {
	m := newMetrics(prometheus.NewRegistry(), e)
	return newCounted(e, 1000, m), m
}

// serve serves h as Run does, and returns its address.
func serve(t testing.TB, h http.Handler) string {
	t.Helper()
	s := httptest.NewUnstartedServer(nil)
	s.Config = newServer(h, quiet)
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// exchange sends a request just as it is written, and returns the answer with its body.
func exchange(t testing.TB, address, request string) (*http.Response, string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	method, _, _ := strings.Cut(request, " ")
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// benchEngine always decides the same.
type benchEngine struct{ decision gateway.Decision }

func (e *benchEngine) Decide(context.Context, gateway.Request) gateway.Decision { return e.decision }
func (e *benchEngine) Ready() bool                                              { return true }
func (e *benchEngine) Status() replica.Status                                   { return replica.Status{} }
func (e *benchEngine) Keys() gateway.Status                                     { return gateway.Status{} }
func (e *benchEngine) Run(ctx context.Context) error                            { <-ctx.Done(); return nil }
