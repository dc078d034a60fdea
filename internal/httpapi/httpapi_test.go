package httpapi

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/internal/authn"
)

func (s *stand) do(method, target string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

func example(r chi.Router) {
	r.Get("/v1/things", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "things") })
	r.Put("/v1/things", func(http.ResponseWriter, *http.Request) {})
	r.Post("/oauth2/token", func(w http.ResponseWriter, _ *http.Request) {
		authn.WriteError(w, authn.Unavailable(time.Second, errors.New("cause of it")))
	})
	r.Get("/panic", func(http.ResponseWriter, *http.Request) { panic("a bug") })
	r.Post("/oauth2/introspect", func(http.ResponseWriter, *http.Request) { panic("a bug") })
	r.Get("/half", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "half an answer")
		_ = http.NewResponseController(w).Flush()
		panic("a bug")
	})
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

func checkProblem(t *testing.T, w *httptest.ResponseRecorder, status int) {
	t.Helper()
	if w.Code != status || w.Header().Get("Content-Type") != "application/problem+json" || w.Header().Get("Cache-Control") != "no-store" {
		t.Errorf("status %d, header %v, want %d and a problem", w.Code, w.Header(), status)
	}
	var p struct {
		Type, Title, Instance string
		Status                int
	}
	if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil {
		t.Fatalf("%v: %s", err, w.Body)
	}
	want := p
	want.Type, want.Title, want.Status = "about:blank", http.StatusText(status), status
	if id := w.Header().Get("X-Request-Id"); uuidForm.MatchString(id) {
		want.Instance = "urn:uuid:" + id
	}
	if p != want {
		t.Errorf("problem %+v, want %+v", p, want)
	}
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	s := newStand(t, Config{}, Deps{Routes: routes(example)})
	if w := s.do("GET", "/v1/things"); w.Code != 200 || w.Body.String() != "things" {
		t.Errorf("GET: %d %s", w.Code, w.Body)
	}
	if w := s.do("HEAD", "/v1/things"); w.Code != 200 {
		t.Errorf("HEAD: %d", w.Code)
	}
	for _, target := range []string{"/", "/v1/nope", "/revoke/", "/oauth2/revoke/x", "/.%2e/revoke"} {
		checkProblem(t, s.do("GET", target, "Accept", "application/json"), 404)
	}
	w := s.do("DELETE", "/v1/things")
	checkProblem(t, w, 405)
	if allow := w.Header().Get("Allow"); allow != "GET, HEAD, PUT" {
		t.Errorf("Allow %q", allow)
	}
	checkProblem(t, s.do("BREW", "/v1/things"), 405)
	for _, method := range []string{"GET", "HEAD", "OPTIONS", "PUT", "BREW"} {
		for _, target := range []string{"/revoke", "/oauth2/revoke", "/oauth2/token"} {
			if method != "BREW" && target != "/oauth2/token" {
				continue // Form's to refuse
			}
			w := s.do(method, target)
			if w.Code != 405 || w.Header().Get("Allow") != "POST" || w.Header().Get("Content-Type") != "application/json" {
				t.Errorf("%s %s: %d %v", method, target, w.Code, w.Header())
			}
		}
	}
}

func TestPanic(t *testing.T) {
	t.Parallel()
	s := newStand(t, Config{}, Deps{Routes: routes(example)})
	checkProblem(t, s.do("GET", "/panic"), 500)
	if w := s.do("POST", "/oauth2/introspect"); w.Code != 500 || !strings.Contains(w.Body.String(), `"server_error"`) || strings.Contains(w.Body.String(), "bug") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if logged := s.log.String(); !strings.Contains(logged, "a bug") || !strings.Contains(logged, "httpapi_test.go") || !strings.Contains(logged, `"status":500`) {
		t.Errorf("the log lacks the panic, where it was or its request: %s", logged)
	}
	if n := s.metric(t, "rescind_http_requests_total", "500", "GET", "/panic"); n != 1 {
		t.Errorf("%v counted, want 1", n)
	}
	if n := s.metric(t, "rescind_http_requests_in_flight"); n != 0 {
		t.Errorf("%v in flight after all, want 0", n)
	}
	res, err := http.Get("http://" + s.serve(t, Config{}) + "/half")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, err := io.ReadAll(res.Body); err == nil {
		t.Errorf("half an answer passes for a whole one: %s", b)
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	s := newStand(t, Config{}, Deps{})
	for given, kept := range map[string]bool{
		"a.B-c_9": true, strings.Repeat("x", 64): true, "01234567-89ab-4def-8123-456789abcdef": true,
		"": false, strings.Repeat("x", 65): false, "a b": false, "a\"b": false, "ä": false, "a\nb": false,
	} {
		w := s.do("GET", "/", "X-Request-Id", given)
		got := w.Header().Get("X-Request-Id")
		if kept && got != given || !kept && !uuidForm.MatchString(got) {
			t.Errorf("%q became %q", given, got)
		}
		checkProblem(t, w, 404)
	}
	if a, b := s.do("GET", "/").Header().Get("X-Request-Id"), s.do("GET", "/").Header().Get("X-Request-Id"); a == b {
		t.Error("two requests have one id")
	}
}

func TestTrace(t *testing.T) {
	t.Parallel()
	const trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	tests := []struct {
		name  string
		given []string
		flags string // empty: a new trace
	}{
		{"sampled", []string{"00-" + trace + "-" + parent + "-01"}, "01"},
		{"not sampled", []string{"00-" + trace + "-" + parent + "-00"}, "00"},
		{"other flags", []string{"00-" + trace + "-" + parent + "-fe"}, "00"},
		{"later version", []string{"cc-" + trace + "-" + parent + "-01"}, "01"},
		{"later version with more", []string{"cc-" + trace + "-" + parent + "-01-what"}, "01"},
		{"later version run on", []string{"cc-" + trace + "-" + parent + "-01what"}, ""},
		{"none", nil, ""},
		{"empty", []string{""}, ""},
		{"two", []string{"00-" + trace + "-" + parent + "-01", "00-" + trace + "-" + parent + "-01"}, ""},
		{"zero trace", []string{"00-" + strings.Repeat("0", 32) + "-" + parent + "-01"}, ""},
		{"zero parent", []string{"00-" + trace + "-" + strings.Repeat("0", 16) + "-01"}, ""},
		{"upper case", []string{"00-" + strings.ToUpper(trace) + "-" + parent + "-01"}, ""},
		{"version ff", []string{"ff-" + trace + "-" + parent + "-01"}, ""},
		{"version 00 with more", []string{"00-" + trace + "-" + parent + "-01-x"}, ""},
		{"short", []string{"00-" + trace + "-" + parent + "-0"}, ""},
		{"no dashes", []string{"00_" + trace + "_" + parent + "_01"}, ""},
	}
	for _, tt := range tests {
		got := continueTrace(http.Header{"Traceparent": tt.given})
		gotTrace, sampled := parseTraceparent(got)
		switch {
		case gotTrace == "" || strings.Contains(got, parent):
			t.Errorf("%s: %s is no traceparent of ours", tt.name, got)
		case tt.flags == "" && (gotTrace == trace || sampled):
			t.Errorf("%s: %s goes on in what is not to be continued", tt.name, got)
		case tt.flags != "" && (gotTrace != trace || got[53:] != tt.flags):
			t.Errorf("%s: %s, want the trace continued with flags %s", tt.name, got, tt.flags)
		}
	}
}

func FuzzTrace(f *testing.F) {
	f.Add("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	f.Add("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x")
	f.Fuzz(func(t *testing.T, s string) {
		if trace, _ := parseTraceparent(continueTrace(http.Header{"Traceparent": {s}})); trace == "" {
			t.Errorf("%q made a traceparent that is none", s)
		}
	})
}

func TestLogLine(t *testing.T) {
	t.Parallel()
	s := newStand(t, Config{}, Deps{Routes: routes(example)})
	line := func(w *httptest.ResponseRecorder) map[string]any {
		t.Helper()
		all := strings.Split(strings.TrimSpace(s.log.String()), "\n")
		var got map[string]any
		if err := json.Unmarshal([]byte(all[len(all)-1]), &got); err != nil {
			t.Fatal(err)
		}
		if got["request_id"] != w.Header().Get("X-Request-Id") || got["remote"] != "192.0.2.1" || got["component"] != "httpapi" || len(got["trace_id"].(string)) != 32 {
			t.Errorf("log line %v", got)
		}
		return got
	}
	got := line(s.do("GET", "/v1/things?token=secret"))
	if got["route"] != "/v1/things" || got["method"] != "GET" || got["status"] != 200.0 || got["bytes"] != 6.0 || got["level"] != "INFO" {
		t.Errorf("log line %v", got)
	}
	got = line(s.do("POST", "/oauth2/token"))
	if got["level"] != "WARN" || !strings.Contains(fmt.Sprint(got["error"]), "cause of it") {
		t.Errorf("log line %v", got)
	}
	got = line(s.do("STRANGE", "/nowhere/secret"))
	if got["route"] != "" || got["method"] != "other" {
		t.Errorf("log line %v", got)
	}
	if strings.Contains(s.log.String(), "secret") {
		t.Errorf("the log has a query or a path: %s", s.log)
	}
}

func TestMetricsAreThereFromTheStart(t *testing.T) {
	t.Parallel()
	s := newStand(t, Config{}, Deps{Routes: routes(example, func(r chi.Router) {
		r.Get("/v1/events", func(http.ResponseWriter, *http.Request) {})
	})})
	for _, labels := range [][]string{
		{"200", "POST", "/revoke"}, {"401", "POST", "/oauth2/revoke"}, {"503", "POST", "/oauth2/token"},
		{"200", "GET", "/v1/things"}, {"404", "GET", "unmatched"},
	} {
		if n := s.metric(t, "rescind_http_requests_total", labels...); n != 0 {
			t.Errorf("%q is %v, want 0", labels, n)
		}
	}
	for _, reason := range []string{"malformed", "untrusted_issuer", "algorithm", "unknown_key", "signature", "expired", "unknown"} {
		if n := s.metric(t, "rescind_revoke_nothing_total", reason); n != 0 {
			t.Errorf("%s is %v, want 0", reason, n)
		}
	}
	s.do("GET", "/v1/things")
	s.do("WEIRD", "/x")
	if n := s.metric(t, "rescind_http_request_seconds", "/v1/things"); n != 1 {
		t.Errorf("%v observed, want 1", n)
	}
	// What lasts is counted, and how long it took would only blur what the others take.
	s.do("GET", "/v1/events")
	if n := s.metric(t, "rescind_http_requests_total", "200", "GET", "/v1/events"); n != 1 {
		t.Errorf("%v requests that last, want 1", n)
	}
	families, err := s.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if strings.Contains(f.String(), "/v1/events") != (f.GetName() == "rescind_http_requests_total") {
			t.Errorf("%s: %s", f.GetName(), f)
		}
	}
	if n := s.metric(t, "rescind_http_requests_total", "405", "other", "unmatched"); n != 1 {
		t.Errorf("%v unmatched, want 1", n)
	}
}

// slowly is a form's body of which only the first byte has come.
type slowly struct{ rest chan struct{} }

func (s *slowly) Read(p []byte) (int, error) { <-s.rest; return 0, io.EOF }

func TestInFlight(t *testing.T) {
	t.Parallel()
	const limit = 3
	busy, finish := make(chan struct{}, limit), make(chan struct{})
	s := newStand(t, Config{MaxInFlight: limit}, Deps{Routes: routes(example, func(r chi.Router) {
		r.Get("/wait", func(http.ResponseWriter, *http.Request) { busy <- struct{}{}; <-finish })
	})})

	// Those who send slowly do not count.
	var group sync.WaitGroup
	slow := &slowly{rest: make(chan struct{})}
	for range 2 * limit {
		group.Go(func() {
			r := httptest.NewRequest("POST", "/revoke", slow)
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			s.ServeHTTP(httptest.NewRecorder(), r)
		})
	}
	for range limit {
		group.Go(func() {
			if w := s.do("GET", "/wait"); w.Code != 200 {
				t.Errorf("status %d within the limit", w.Code)
			}
		})
	}
	for range limit {
		select {
		case <-busy:
		case <-time.After(hang):
			t.Fatal("the places are not all to be had")
		}
	}
	w := s.do("GET", "/v1/things")
	checkProblem(t, w, 503)
	if w.Header().Get("Retry-After") != "1" {
		t.Errorf("header %v", w.Header())
	}
	if w := s.post("token=x"); w.Code != 503 || w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Body.String(), "temporarily_unavailable") {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
	if n := s.metric(t, "rescind_http_requests_total", "503", "POST", "/revoke"); n != 1 {
		t.Errorf("%v refused, want 1", n)
	}
	close(finish)
	close(slow.rest)
	group.Wait()
	if w := s.do("GET", "/v1/things"); w.Code != 200 {
		t.Errorf("status %d afterwards", w.Code)
	}
}

func TestReadAhead(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, authn.MaxFormBytes - 1, authn.MaxFormBytes, authn.MaxFormBytes + 1, 3 * authn.MaxFormBytes} {
		for _, known := range []bool{true, false} {
			want := strings.Repeat("x", n)
			r := httptest.NewRequest("POST", "/revoke", strings.NewReader(want))
			if !known {
				r.ContentLength = -1
			}
			readAhead(r)
			got, err := io.ReadAll(r.Body)
			if err != nil || string(got) != want {
				t.Errorf("%d bytes became %d, %v", n, len(got), err)
			}
		}
	}
	r := httptest.NewRequest("POST", "/revoke", io.MultiReader(strings.NewReader("token="), brokenReader{io.ErrUnexpectedEOF}))
	readAhead(r)
	if got, err := io.ReadAll(r.Body); err != io.ErrUnexpectedEOF || string(got) != "token=" {
		t.Errorf("%q, %v, want what came and the error", got, err)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	_, err := New(Config{MaxInFlight: -1, Timeout: time.Hour}, Deps{Log: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
	for _, name := range []string{"MaxInFlight", "Timeout"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v: want every mistake, also %s", err, name)
		}
	}
}

// hang is after how long a test that waits in vain gives up.
const hang = 30 * time.Second

// dial opens a connection and leaves it.
func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(hang)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// get asks for /v1/things on conn and keeps it open.
func get(t *testing.T, conn net.Conn) {
	t.Helper()
	_, err := io.WriteString(conn, "GET /v1/things HTTP/1.1\r\nHost: x\r\n\r\n")
	if err == nil {
		var res *http.Response
		if res, err = http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
			_, err = io.Copy(io.Discard, res.Body)
		}
	}
	if err != nil {
		t.Errorf("a request on its own connection failed: %v", err)
	}
}

// A thousand connections that say nothing, half a word, or a request but for its end,
// keep nobody out.
func TestConnections(t *testing.T) {
	t.Parallel()
	const limit = 10
	s := newStand(t, Config{}, Deps{Routes: routes(example)})
	addr := s.serve(t, Config{MaxConnections: limit})
	first := dial(t, addr)
	get(t, first)
	for i := range 1000 {
		const request = "POST /revoke HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 65536\r\n\r\ntok"
		length := []int{0, len("POST /revoke HTTP/1.1\r\nHos"), len(request)}[i%3]
		_, _ = io.WriteString(dial(t, addr), request[:length]) // it may be closed already
	}
	get(t, dial(t, addr))
	if _, err := first.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection that was idle for longest reads %v, want that it is closed", err)
	}
	if n := s.metric(t, "rescind_http_connections"); n > limit {
		t.Errorf("%v connections are open, want at most %d", n, limit)
	}
	if n := s.metric(t, "rescind_http_connections_closed_total"); n != 1002-limit {
		t.Errorf("%v were closed, want %d", n, 1002-limit)
	}
}

func TestConnectionsAtWorkAreNotClosed(t *testing.T) {
	t.Parallel()
	busy, finish := make(chan struct{}), make(chan struct{})
	s := newStand(t, Config{}, Deps{Routes: routes(example, func(r chi.Router) {
		r.Get("/wait", func(http.ResponseWriter, *http.Request) { busy <- struct{}{}; <-finish })
	})})
	addr := s.serve(t, Config{MaxConnections: 1})
	done := make(chan error)
	go func() {
		res, err := http.Get("http://" + addr + "/wait")
		if err == nil {
			err = res.Body.Close()
		}
		done <- err
	}()
	<-busy
	late := dial(t, addr)
	if _, err := late.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a connection above the limit reads %v, want that it is closed", err)
	}
	close(finish)
	if err := <-done; err != nil {
		t.Errorf("the request at work failed: %v", err)
	}
}

func TestServer(t *testing.T) {
	t.Parallel()
	s := newStand(t, Config{}, Deps{Routes: routes(example)})
	srv, err := NewServer(Config{}, s, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if srv.ReadHeaderTimeout == 0 || srv.ReadTimeout == 0 || srv.WriteTimeout <= srv.ReadTimeout || srv.IdleTimeout == 0 || srv.MaxHeaderBytes == 0 {
		t.Errorf("a bound is missing: %+v", srv)
	}
	certified := httptest.NewTLSServer(nil) // has a certificate, and a client that trusts it
	t.Cleanup(certified.Close)
	srv.TLSConfig = &tls.Config{Certificates: certified.TLS.Certificates}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	roots := certified.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	res, err := (&http.Client{Transport: transport}).Get("https://" + l.Addr().String() + "/v1/things")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.ProtoMajor != 1 {
		t.Errorf("HTTP/%d is spoken, want 1.1", res.ProtoMajor)
	}
}

func TestNoRemoteAddress(t *testing.T) {
	t.Parallel()
	s := newStand(t, Config{}, Deps{Remote: func(*http.Request) netip.Addr { return netip.Addr{} }})
	s.do("GET", "/")
	if !strings.Contains(s.log.String(), `"remote":""`) {
		t.Errorf("log: %s", s.log)
	}
}

// BenchmarkRevoke is all that a revocation costs outside the ledger and the
// check of the signature.
func BenchmarkRevoke(b *testing.B) {
	s := newStand(b, Config{}, Deps{
		Verifier: &fakeVerifier{token: live()}, Ledger: &fakeLedger{}, Clients: &fakeClients{client: appOne()},
	})
	b.ReportAllocs()
	for b.Loop() {
		if w := s.post("token=a.b.c"); w.Code != 200 {
			b.Fatal(w.Code)
		}
	}
}
