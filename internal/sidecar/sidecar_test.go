package sidecar

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/tlsfile"
)

var update = flag.Bool("update", false, "write the golden files")

// runConfig has a listener of each kind, on free ports.
func runConfig(upstream string) Config {
	cfg := Config{
		Auth: &Listener{Listen: "127.0.0.1:0"}, Envoy: &Listener{Listen: "127.0.0.1:0"}, OpsListen: "127.0.0.1:0",
		Staleness: replica.Staleness{Max: 300 * time.Second}, MaxInFlight: 100, ShutdownGrace: time.Minute,
	}
	proxy := proxyConfig(upstream)
	proxy.Listen = "127.0.0.1:0"
	cfg.Proxy = &proxy
	return cfg
}

// runOf runs e, and returns where it listens, and how it is stopped and how it ended.
func runOf(t testing.TB, cfg Config, e engine) (at Addresses, stop func(), ended <-chan error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	listening, done := make(chan Addresses, 1), make(chan error, 1)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		done <- run(ctx, cfg, e, quiet, func(a Addresses) { listening <- a })
	}()
	t.Cleanup(func() { cancel(); <-finished })
	select {
	case at = <-listening:
	case err := <-done:
		t.Fatalf("it ended: %v", err)
	}
	return at, cancel, done
}

func getBody(t testing.TB, url string) (status int, body string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

var aged = replica.Status{
	ID: "gw-1", Report: &replica.ReportStatus{At: 1790000000000, Taken: 3, Failed: 1},
	Position: revocation.Position{Epoch: "0198c5b2-0000-7000-8000-000000000001", Seq: 42}, Age: 1500 * time.Millisecond, Ready: true, From: "source",
	Revocations: 7, Entities: 9, Snapshots: 1, Deltas: 2,
	Feeds: []replica.FeedStatus{{Name: "sse", Connected: true, Events: 5}, {Name: "amqp", Error: "dial mq.internal: refused"}},
}

// What operators see, whoever decides.
func TestOps(t *testing.T) {
	t.Parallel()
	e := &fake{decide: clean, ready: true, status: aged}
	at, _, _ := runOf(t, runConfig("http://127.0.0.1:1"), e)
	ops := "http://" + at.Ops

	if status, body := getBody(t, ops+"/healthz"); status != 200 || !strings.Contains(body, `"pass"`) {
		t.Errorf("/healthz: %d %s", status, body)
	}
	status, body := getBody(t, ops+"/readyz?verbose=1")
	if want := `{"status":"warn","checks":{"feeds":{"status":"warn","detail":"not connected: amqp"},"gateway":{"status":"pass"},"replica":{"status":"pass","detail":"at seq 42"}}}` + "\n"; status != 200 || body != want {
		t.Errorf("/readyz: %d %s", status, body)
	}
	var got replica.Status
	status, body = getBody(t, ops+"/status")
	if err := json.Unmarshal([]byte(body), &got); err != nil || status != 200 {
		t.Errorf("/status: %d %s", status, body)
	}
	if diff := cmp.Diff(aged, got); diff != "" {
		t.Errorf("/status: %s", diff)
	}
	for _, path := range []string{"/debug/pprof/", "/auth", "/"} {
		if status, _ := getBody(t, ops+path); status != 404 {
			t.Errorf("%s: %d", path, status)
		}
	}
	resp, err := http.Post(ops+"/status", "text/plain", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 404 {
		t.Errorf("POST /status: %d", resp.StatusCode)
	}
}

func TestReadiness(t *testing.T) {
	t.Parallel()
	with := func(change func(*replica.Status)) replica.Status {
		s := aged
		s.Feeds = slices.Clone(aged.Feeds[:1])
		change(&s)
		return s
	}
	for _, tt := range []struct {
		name   string
		ready  bool
		status replica.Status
		code   int
		want   obs.Status
	}{
		{"all is well", true, with(func(*replica.Status) {}), 200, obs.Pass},
		{"not ready", false, with(func(*replica.Status) {}), 503, obs.Fail},
		{"nothing is known, and it is served", true, with(func(s *replica.Status) { s.Age = replica.Never }), 200, obs.Warn},
		{"old", true, with(func(s *replica.Status) { s.Age = 151 * time.Second }), 200, obs.Warn},
		{"not old", true, with(func(s *replica.Status) { s.Age = 149 * time.Second }), 200, obs.Pass},
		{"trouble", true, with(func(s *replica.Status) { s.Error = "write /var/lib: no space" }), 200, obs.Warn},
		{"a feed is away", true, with(func(s *replica.Status) { s.Feeds[0].Connected = false }), 200, obs.Warn},
	} {
		at, _, _ := runOf(t, runConfig("http://127.0.0.1:1"), &fake{decide: clean, ready: tt.ready, status: tt.status})
		var got struct {
			Status obs.Status `json:"status"`
			Checks map[string]struct {
				Detail string `json:"detail"`
			} `json:"checks"`
		}
		code, body := getBody(t, "http://"+at.Ops+"/readyz?verbose=1")
		if err := json.Unmarshal([]byte(body), &got); err != nil || code != tt.code || got.Status != tt.want {
			t.Errorf("%s: %d %s", tt.name, code, body)
		}
		if strings.Contains(body, "/var/lib") {
			t.Errorf("%s: strangers are told %s", tt.name, body)
		}
	}
}

// Every series is there from the start, by its name; the golden file is for whoever writes alerts.
func TestMetrics(t *testing.T) {
	t.Parallel()
	e := &fake{ready: true, status: aged}
	at, _, _ := runOf(t, runConfig("http://127.0.0.1:1"), e)
	series := func() (names []string, values map[string]string) {
		_, body := getBody(t, "http://"+at.Ops+"/metrics")
		values = make(map[string]string)
		for line := range strings.Lines(body) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			if !strings.HasPrefix(name, "rescind_gateway_") {
				continue
			}
			values[name] = value
			if !strings.Contains(name, "_bucket{") && !strings.Contains(name, "{reason=") {
				names = append(names, name)
			}
		}
		return names, values
	}
	names, values := series()
	golden := filepath.Join("testdata", "metrics.golden")
	got := strings.Join(names, "\n") + "\n"
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("run the test with -update if this is meant:\n%s", diff)
	}
	for _, reason := range slices.Concat(gateway.Reasons, []string{overloaded, "other"}) {
		if got := values[`rescind_gateway_decisions_total{reason="`+reason+`",result="refused"}`]; got != "0" {
			t.Errorf("refusals for the reason %s are %q, want 0", reason, got)
		}
	}
	before := len(values)
	for name, want := range map[string]string{
		"rescind_gateway_replica_age_seconds": "1.5", "rescind_gateway_replica_seq": "42", "rescind_gateway_replica_revocations": "7",
		`rescind_gateway_feed_connected{feed="sse"}`: "1", `rescind_gateway_feed_connected{feed="amqp"}`: "0", `rescind_gateway_feed_events_total{feed="sse"}`: "5",
		"rescind_gateway_ready": "1", "rescind_gateway_replica_snapshots_total": "1", "rescind_gateway_replica_deltas_total": "2",
	} {
		if values[name] != want {
			t.Errorf("%s is %q, want %s", name, values[name], want)
		}
	}

	// Whatever is decided makes no other series.
	ask := func(d gateway.Decision) {
		t.Helper()
		e.decide = func(gateway.Request) gateway.Decision { return d }
		exchange(t, at.Auth, "GET /auth HTTP/1.1\r\nHost: g\r\nConnection: close\r\nX-Forwarded-Method: GET\r\nX-Forwarded-Uri: /a\r\n\r\n")
	}
	asked := func(reason string) gateway.Decision {
		d := refusedWith(503, replica.CodeGeneral, "")
		d.Reason, d.Outcome = reason, replica.Ask
		return d
	}
	ask(allowed(pizza))
	ask(refusedWith(401, replica.CodeInvalidCredentials, challenge))
	ask(refusedWith(401, replica.CodeInvalidCredentials, challenge))
	unknown := refusedWith(403, replica.CodeForbidden, "")
	unknown.Reason = "https://evil.example.com/?token=x"
	ask(unknown)
	active := allowed(pizza)
	active.Outcome = replica.Ask
	ask(active)
	ask(asked("introspection_failed"))
	exchange(t, at.Auth, "GET /auth HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n")
	after, values := series()
	if diff := cmp.Diff(names, after); diff != "" || len(values) != before {
		t.Errorf("%d series became %d\n%s", before, len(values), diff)
	}
	for name, want := range map[string]string{
		`rescind_gateway_decisions_total{reason="",result="allowed"}`: "2", `rescind_gateway_decisions_total{reason="revoked",result="refused"}`: "2",
		`rescind_gateway_decisions_total{reason="other",result="refused"}`: "1", "rescind_gateway_decision_seconds_count": "6",
		`rescind_gateway_introspections_total{result="active"}`: "1", `rescind_gateway_introspections_total{result="failed"}`: "1",
		`rescind_gateway_decisions_total{reason="introspection_failed",result="refused"}`: "1",
		"rescind_gateway_decisions_in_flight":                                             "0", "rescind_gateway_auth_malformed_total": "1",
	} {
		if values[name] != want {
			t.Errorf("%s is %q, want %s", name, values[name], want)
		}
	}
}

// The reasons that metrics know are those that there are.
func TestIntrospectionReasons(t *testing.T) {
	t.Parallel()
	for reason := range introspectionResults {
		if reason != "" && !slices.Contains(gateway.Reasons, reason) {
			t.Errorf("%q is no reason", reason)
		}
	}
	for _, reason := range gateway.Reasons {
		if _, ok := introspectionResults[reason]; strings.HasPrefix(reason, "introspection_") && !ok {
			t.Errorf("%q has no result", reason)
		}
	}
	if slices.Contains(gateway.Reasons, overloaded) {
		t.Errorf("%q is a reason of the gateway too", overloaded)
	}
}

// Past the limit decisions are refused as a gateway refuses, and nobody is asked.
func TestTooManyDecisions(t *testing.T) {
	t.Parallel()
	begun, end := make(chan struct{}), make(chan struct{})
	e := &fake{decide: func(gateway.Request) gateway.Decision { begun <- struct{}{}; <-end; return allowed(pizza) }}
	_, m := countedOf(e)
	c := newCounted(e, 2, m)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if d := c.Decide(t.Context(), gateway.Request{}); !d.Allowed {
				t.Errorf("one of two: %+v", d)
			}
		})
		<-begun
	}
	if d := c.Decide(t.Context(), gateway.Request{}); d.Allowed || d.Status != 503 || d.Reason != overloaded || !json.Valid(d.Body()) || len(e.questions()) != 2 {
		t.Errorf("the third of two: %+v", d)
	}
	close(end)
	wg.Wait()
	go func() { <-begun }()
	if d := c.Decide(t.Context(), gateway.Request{}); !d.Allowed {
		t.Errorf("the next one: %+v", d)
	}
}

// At its end the process says that it goes, finishes what it has begun, and only then stops what decides.
func TestRunStops(t *testing.T) {
	t.Parallel()
	begun, end := make(chan struct{}), make(chan struct{})
	upstream := upstreamOf(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/chat" {
			echoUpgrade(w, r)
			return
		}
		close(begun)
		<-end
		_, _ = io.WriteString(w, "whole")
	})
	stopped := make(chan struct{})
	e := &fake{decide: clean, ready: true, status: aged, onStop: func() { close(stopped) }}
	at, stop, ended := runOf(t, runConfig(upstream), e)

	answer := make(chan string)
	go func() {
		resp, err := http.Get("http://" + at.Proxy + "/slow")
		if err != nil {
			answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		answer <- fmt.Sprintf("%d %s %v", resp.StatusCode, b, err)
	}()
	<-begun
	conn, from := upgrade(t, at.Proxy)
	says(t, conn, from, "before")

	stop()
	ops := "http://" + at.Ops
	for { // it says so while the request is at work
		if status, _ := getBody(t, ops+"/readyz"); status == 503 {
			break
		}
	}
	for _, address := range []string{at.Proxy, at.Auth, at.Envoy} {
		for {
			c, err := net.Dial("tcp", address)
			if err != nil {
				break
			}
			c.Close()
		}
	}
	select {
	case <-stopped:
		t.Error("it decides no more while a request is at work")
	case err := <-ended:
		t.Errorf("it ended while a request is at work: %v", err)
	default:
	}
	close(end)
	if got := <-answer; got != "200 whole <nil>" {
		t.Error(got)
	}
	says(t, conn, from, "when others are over") // it has its time too
	select {
	case <-stopped:
		t.Error("it decides no more while a WebSocket is open")
	default:
	}
	conn.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	<-stopped
	if _, err := net.Dial("tcp", at.Ops); err == nil {
		t.Error("the operators' listener is still there")
	}
}

// A request that does not end is cut off.
func TestRunStopsInTime(t *testing.T) {
	t.Parallel()
	begun := make(chan struct{})
	upstream := upstreamOf(t, func(_ http.ResponseWriter, r *http.Request) { close(begun); <-r.Context().Done() })
	cfg := runConfig(upstream)
	cfg.ShutdownGrace = 50 * time.Millisecond
	at, stop, ended := runOf(t, cfg, &fake{decide: clean})
	failed := make(chan error)
	go func() {
		resp, err := http.Get("http://" + at.Proxy + "/slow")
		if err == nil {
			resp.Body.Close()
		}
		failed <- err
	}()
	<-begun
	stop()
	if err := <-failed; err == nil {
		t.Error("it was answered")
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestRunEnds(t *testing.T) {
	t.Parallel()
	broken := errors.New("the folder is gone")
	_, _, ended := runOf(t, runConfig("http://127.0.0.1:1"), &fake{decide: clean, fails: broken})
	if err := <-ended; !errors.Is(err, broken) || err.Error() != "gateway: the folder is gone" {
		t.Errorf("%v", err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	cfg := runConfig("http://127.0.0.1:1")
	cfg.Auth.Listen = taken.Addr().String()
	err = run(t.Context(), cfg, &fake{}, quiet, nil)
	if err == nil || !regexp.MustCompile(`^listen as auth.listen says: .*address already in use; free the port or choose another$`).MatchString(err.Error()) {
		t.Errorf("%v", err)
	}
}

func TestRunWithTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	files := tlsfile.Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	cert, key := makePair(t)
	writeFile(t, files.Cert, cert)
	writeFile(t, files.Key, key)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(cert))
	cfg := runConfig(upstreamOf(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Header.Get("X-Forwarded-Proto")) }))
	cfg.Proxy.TLS = files
	at, _, _ := runOf(t, cfg, &fake{decide: clean})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	resp, err := client.Get("https://" + at.Proxy + "/a")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "https" || resp.ProtoMajor != 1 {
		t.Errorf("%s %q, %v", resp.Proto, body, err)
	}
}

// A mistake of ours is told to the operator, and what only looks like one is not.
func TestPanicsAreTold(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		panics any
		told   bool
	}{{"a mistake", "index out of range", true}, {"an answer to be cut off", http.ErrAbortHandler, false}} {
		var logs lockedBuffer
		server := httptest.NewUnstartedServer(nil)
		server.Config = newServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "half of ")
			_ = http.NewResponseController(w).Flush()
			panic(tt.panics)
		}), slog.New(slog.NewTextHandler(&logs, nil)))
		server.Start()
		resp, err := http.Get(server.URL)
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			resp.Body.Close()
		}
		if err == nil {
			t.Errorf("%s: half an answer is taken for the whole", tt.name)
		}
		server.Close()
		if got := logs.String(); strings.Contains(got, `level=ERROR msg="a request made the gateway panic; please report this" panic="index out of range" stack=`) != tt.told || !tt.told && got != "" {
			t.Errorf("%s: the log is %q", tt.name, got)
		}
	}
}

// However long a decision takes, as long as it may, the proxy that asks gets its answer, and what is asked goes on.
func TestAuthServerIsPatient(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		most := Config{Introspection: &Introspection{Timeout: 10 * time.Second}}.decisionTime()
		_, m := countedOf(&fake{})
		handler := newForwardAuth(deciding{decide: func(ctx context.Context, _ gateway.Request) gateway.Decision {
			select {
			case <-ctx.Done():
				t.Error("what is asked is ended")
			case <-time.After(most):
			}
			return refusedWith(503, replica.CodeGeneral, "")
		}}, m, quiet)
		server := newAuthServer(handler, most, quiet)
		l := newPipes()
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		conn, err := l.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		from := bufio.NewReader(conn)
		for range 2 {
			time.Sleep(4 * time.Second) // a header may take that long
			fmt.Fprint(conn, "GET /auth HTTP/1.1\r\nHost: g\r\nX-Forwarded-Method: GET\r\nX-Forwarded-Uri: /a\r\n\r\n")
			resp, err := http.ReadResponse(from, nil)
			if err != nil || resp.StatusCode != 503 {
				t.Fatalf("%v, %v", resp, err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
		}
		conn.Close()
		_ = server.Close()
		<-served
	})
}

// What a configuration asks for is what is made, with everything there is, and with what is needed alone. Nothing is connected to.
func TestNewEngine(t *testing.T) {
	t.Parallel()
	dir := configFolder(t)
	for name, tt := range map[string]struct {
		text  string
		feeds []string
	}{
		"everything":  {everything, []string{"sse", "amqp", "etcd"}},
		"the service": {"service: {url: \"https://km\", username: u, password_env: PASSWORD}\nany_audience: true\nauth: {}\nleeway: 0s\n", []string{"sse"}},
		"etcd":        {"etcd: {endpoints: [\"https://e:2379\"], issuer: i}\nclaims: claims-only\nissuers: [{iss: i, jwks_file: jwks.json, max_token_lifetime: 1}]\nany_audience: true\nauth: {}\n", []string{"etcd"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg, err := parseText(tt.text, dir)
			if err != nil {
				t.Fatal(err)
			}
			e, err := newEngine(t.Context(), cfg, quiet)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(e.close)
			var feeds []string
			for _, f := range e.Status().Feeds {
				feeds = append(feeds, f.Name)
			}
			if diff := cmp.Diff(tt.feeds, feeds); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A gateway that has never known anything, and finds nobody, listens, says that it is not ready, refuses, and can be stopped.
func TestRunAlone(t *testing.T) {
	t.Parallel()
	cfg, err := parseText(fmt.Sprintf("service: {url: %q, username: u, password_env: PASSWORD}\nany_audience: true\nfolder: state\n"+
		"auth: {listen: \"127.0.0.1:0\"}\nops: {listen: \"127.0.0.1:0\"}\n", "http://127.0.0.1:1"), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	listening, done := make(chan Addresses, 1), make(chan error, 1)
	go func() { done <- Run(ctx, cfg, quiet, func(a Addresses) { listening <- a }) }()
	at := <-listening
	if status, body := getBody(t, "http://"+at.Ops+"/readyz"); status != 503 {
		t.Errorf("/readyz: %d %s", status, body)
	}
	for _, bearer := range []string{"", "Authorization: Bearer abc\r\n"} {
		resp, body := exchange(t, at.Auth, "GET /auth HTTP/1.1\r\nHost: g\r\nConnection: close\r\nX-Forwarded-Method: GET\r\nX-Forwarded-Uri: /a\r\n"+bearer+"\r\n")
		if resp.StatusCode < 400 || !json.Valid([]byte(body)) {
			t.Errorf("%d %s", resp.StatusCode, body)
		}
	}
	if at.Envoy != "" || at.Proxy != "" {
		t.Errorf("it listens where it was not told to: %+v", at)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
