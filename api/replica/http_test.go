package replica

import (
	"cmp"
	"compress/gzip"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

const secret = "pa55-w0rd"

// pipes is a network in memory, in which time can pass at once.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case p.conns <- there:
		return here, nil
	case <-p.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// web is a service over HTTP. Unless hostile answers, it does what the real one does.
type web struct {
	*service
	client *http.Client

	mu       sync.Mutex
	hostile  func(w http.ResponseWriter, r *http.Request) bool
	reported func(w http.ResponseWriter, r *http.Request) // nil: it is a service that knows of no reports
	requests []*http.Request
	serving  sync.WaitGroup
	over     bool // nothing is served any more
}

// newWeb serves a service, in a bubble of synctest, until the test ends.
func newWeb(t *testing.T, s *service) *web {
	network := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	transport := newTransport()
	transport.Proxy, transport.DialContext = nil, network.dial
	web := &web{service: s, client: &http.Client{Transport: transport}}
	server := &http.Server{Handler: web, ErrorLog: log.New(io.Discard, "", 0)}
	var done sync.WaitGroup
	done.Go(func() { _ = server.Serve(network) })
	t.Cleanup(func() {
		server.Close()
		transport.CloseIdleConnections()
		done.Wait()
		web.mu.Lock()
		web.over = true
		web.mu.Unlock()
		web.serving.Wait()
	})
	return web
}

func (web *web) set(hostile func(w http.ResponseWriter, r *http.Request) bool) {
	web.mu.Lock()
	defer web.mu.Unlock()
	web.hostile = hostile
}

// seen are the requests since the last call.
func (web *web) seen() []*http.Request {
	web.mu.Lock()
	defer web.mu.Unlock()
	all := web.requests
	web.requests = nil
	return all
}

func (web *web) source(t *testing.T, tenant string) *HTTP {
	t.Helper()
	h, err := NewHTTP(HTTPConfig{URL: "http://localhost/base/", Username: "gw", Password: secret, Tenant: tenant, Client: web.client})
	must(t, err)
	return h
}

func problem(w http.ResponseWriter, status int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"type":"about:blank","title":%q,"status":%d,"detail":%q}`, http.StatusText(status), status, detail)
}

func (web *web) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	web.mu.Lock()
	if r.Method != http.MethodPost {
		web.requests = append(web.requests, r)
	}
	if web.over {
		web.mu.Unlock()
		return
	}
	web.serving.Add(1)
	defer web.serving.Done()
	hostile, reported := web.hostile, web.reported
	web.mu.Unlock()
	user, password, _ := r.BasicAuth()
	switch {
	case r.Method == http.MethodPost && reported != nil:
		reported(w, r)
	case r.Method == http.MethodPost:
		problem(w, http.StatusNotFound, "")
	case hostile != nil && hostile(w, r):
	case user != "gw" || password != secret:
		problem(w, http.StatusUnauthorized, "")
	case r.URL.Path == "/base/v1/snapshots/all" && r.Header.Get("Accept") == SnapshotType:
		web.snapshot(w, r, func(b []byte) { _, _ = w.Write(b) })
	case r.URL.Path == "/base/v1/events" && r.Header.Get("Accept") == "text/event-stream":
		web.stream(w, r)
	case r.URL.Path == "/base/v1/events" && r.Header.Get("Accept") == "application/json":
		web.page(w, r)
	default:
		problem(w, http.StatusNotFound, "")
	}
}

// snapshot sends the state in pieces, through send.
func (web *web) snapshot(w http.ResponseWriter, r *http.Request, send func(b []byte)) {
	web.service.mu.Lock()
	n := len(web.log)
	m, header := web.stateAt(n), SnapshotHeader{
		Position: revocation.Position{Epoch: web.epoch, Seq: revocation.Seq(n)}, Kind: "all", Tenants: web.tenants,
	}
	web.service.mu.Unlock()
	w.Header().Set("Content-Type", SnapshotType)
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		defer z.Close()
		send = func(b []byte) { _, _ = z.Write(b) }
	}
	e := NewSnapshotEncoder(header)
	send(e.AppendHeader(nil))
	for _, rec := range m.revoked {
		send(e.AppendRevocation(nil, rec))
	}
	for _, entity := range m.entities {
		b, err := e.AppendEntity(nil, entity)
		must(web.t, err)
		send(b)
	}
	send(e.AppendEnd(nil))
}

func after(s string) (p revocation.Position) {
	epoch, seq, _ := strings.Cut(s, ":")
	p.Epoch = revocation.Epoch(epoch)
	_, _ = fmt.Sscan(seq, &p.Seq)
	return p
}

func (web *web) page(w http.ResponseWriter, r *http.Request) {
	p, err := web.Events(r.Context(), after(r.URL.Query().Get("after")))
	if errors.Is(err, ErrGone) {
		problem(w, http.StatusGone, "The events after this position are gone.")
		return
	}
	body := map[string]any{"epoch": web.head().Epoch, "through": p.Through, "events": p.Events}
	if p.Events == nil {
		body["events"] = []int{}
	}
	if p.Head >= p.Through {
		body["head"] = p.Head
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_ = json.NewEncoder(w).Encode(body)
}

func (web *web) stream(w http.ResponseWriter, r *http.Request) {
	flusher := http.NewResponseController(w)
	send := func(format string, args ...any) {
		fmt.Fprintf(w, format, args...)
		_ = flusher.Flush()
	}
	w.Header().Set("Content-Type", "text/event-stream")
	send("retry: 3000\n\n")
	heartbeat := func(at revocation.Position) {
		send("id: %s\nevent: heartbeat\ndata: {\"epoch\":%q,\"head\":%d,\"through\":%d,\"time\":%q}\n\n",
			at, at.Epoch, web.head().Seq, at.Seq, time.Now().UTC().Format("2006-01-02T15:04:05.000Z07:00"))
	}
	at := web.head()
	if id := r.Header.Get("Last-Event-ID"); id != "" {
		at = after(id)
	} else {
		heartbeat(at)
	}
	beat := time.NewTicker(5 * time.Second)
	defer beat.Stop()
	for {
		web.service.mu.Lock()
		gone := at.Epoch != web.epoch || at.Seq < web.gone
		if gone {
			at = revocation.Position{Epoch: web.epoch, Seq: revocation.Seq(len(web.log))}
		}
		events, grown := append([]revocation.Event(nil), web.log[at.Seq:]...), web.grown
		web.service.mu.Unlock()
		if gone {
			send("id: %s\nevent: reset\ndata: {\"epoch\":%q,\"seq\":%d}\n\n", at, at.Epoch, at.Seq)
		}
		for _, e := range events {
			if at = e.Position; web.sees(e.Tenant.Domain) {
				b, err := e.MarshalJSON()
				must(web.t, err)
				send("id: %s\nevent: %s\ndata: %s\n\n", e.Position, e.Type, b)
			}
		}
		select {
		case <-grown:
		case <-beat.C:
			heartbeat(at)
		case <-r.Context().Done():
			return
		}
	}
}

func TestHTTP(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		for i := range 50 {
			s.revoke(fmt.Sprint("before-", i))
		}
		s.change("created", application(1, "before"))
		web := newWeb(t, s)
		r, stop := start(t, Config{Source: web.source(t, "")})
		within(t, time.Second, "it is loaded", s.reachedBy(r))
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		s.equal(t, r)
		for i := range 50 {
			jti := fmt.Sprint("after-", i)
			s.revoke(jti)
			synctest.Wait()
			if r.Check(tokenOf(jti)).Outcome != Revoked {
				t.Fatalf("%s is not revoked", jti)
			}
		}
		time.Sleep(time.Hour)
		s.equal(t, r)
		if got := r.Status(); got.Age > 6*time.Second || got.Snapshots != 1 || got.Deltas != 0 || got.Feeds[0].Name != "sse" || got.Feeds[0].Events != 50 || got.Error != "" {
			t.Errorf("%+v", got.Feeds)
		}
		all := web.seen()
		if len(all) > 8 {
			t.Errorf("%d requests", len(all))
		}
		for _, req := range all {
			if strings.Contains(req.URL.String(), secret) || req.URL.Query().Has("tenant") {
				t.Errorf("asked for %s", req.URL)
			}
		}
		stop()
	})
}

// What a connection does not bring is there with the next one.
func TestStreamReconnects(t *testing.T) {
	for _, tenant := range []string{"", acme.Domain} {
		t.Run("tenant "+tenant, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				if tenant != "" {
					s.tenants = []string{tenant}
				}
				s.revoke("before")
				web := newWeb(t, s)
				n := 0
				var mu sync.Mutex
				web.set(func(w http.ResponseWriter, r *http.Request) bool {
					if r.Header.Get("Accept") != "text/event-stream" {
						return false
					}
					mu.Lock()
					n++
					cut := time.Duration(n) * 3 * time.Second
					mu.Unlock()
					ctx, cancel := context.WithTimeout(r.Context(), cut)
					defer cancel()
					web.stream(w, r.WithContext(ctx))
					panic(http.ErrAbortHandler) // in the middle of it
				})
				r, _ := start(t, Config{Source: web.source(t, tenant)})
				within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
				for i := range 60 {
					s.revoke(fmt.Sprint("ours-", i))
					s.revoke(fmt.Sprint("others-", i), other)
					s.change("updated", application(1, fmt.Sprint(i)))
					time.Sleep(time.Second)
					if r.Check(tokenOf(fmt.Sprint("ours-", i))).Outcome != Revoked && r.connected(nil) {
						t.Errorf("ours-%d is not revoked", i)
					}
				}
				within(t, 15*time.Second, "it is at the head", s.reachedBy(r))
				s.equal(t, r)
				if got := r.Status(); tenant == "" && got.Snapshots != 1 || (len(got.Tenants) == 1) != (tenant != "") {
					t.Errorf("%d snapshots, tenants %q", got.Snapshots, got.Tenants)
				}
				resumed := 0
				for _, req := range web.seen() {
					if req.URL.Query().Get("tenant") != tenant {
						t.Errorf("asked for %s", req.URL)
					}
					if req.Header.Get("Last-Event-ID") != "" {
						resumed++
					}
				}
				if resumed < 4 {
					t.Errorf("%d streams went on where one had ended", resumed)
				}
			})
		})
	}
}

// A stream that cannot go on says so, and what is missing is loaded.
func TestReset(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("kept")
		web := newWeb(t, s)
		r, _ := start(t, Config{Source: web.source(t, "")})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		s.revoke("lost")
		within(t, time.Second, "it is told", s.reachedBy(r))
		s.restore(1, newEpoch) // under the open stream
		within(t, time.Second, "the new epoch is there", s.reachedBy(r))
		s.revoke("new")
		within(t, time.Second, "it goes on", s.reachedBy(r))
		s.equal(t, r)
		if r.Check(tokenOf("lost")).Outcome != Revoked {
			t.Error("what was revoked here is not any more")
		}
		// Retention passes while nobody is connected.
		web.set(func(w http.ResponseWriter, r *http.Request) bool { panic(http.ErrAbortHandler) })
		s.set(func() {}) // wakes the stream
		time.Sleep(20 * time.Second)
		for i := range 20 {
			s.revoke(fmt.Sprint("missed-", i))
		}
		s.set(func() { s.gone = 20 })
		web.set(nil)
		within(t, 20*time.Second, "it is at the head", s.reachedBy(r))
		s.equal(t, r)
	})
}

// Whatever the other side does: it is told, without the password, it is not tried without a pause,
// and when it is over all is well.
func TestHostileServer(t *testing.T) {
	of := func(accept string, f http.HandlerFunc) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if accept != "" && r.Header.Get("Accept") != accept {
				return false
			}
			f(w, r)
			return true
		}
	}
	body := func(media, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", media)
			_, _ = io.WriteString(w, text)
			_ = http.NewResponseController(w).Flush()
		}
	}
	hang := func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
	then := func(first, second http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			first(w, r)
			second(w, r)
		}
	}
	abort := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	const stream, json = "text/event-stream", "application/json"
	endless := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", r.Header.Get("Accept"))
			for {
				if _, err := io.WriteString(w, text); err != nil {
					return
				}
			}
		}
	}
	for name, tt := range map[string]struct {
		accept string // of the requests that get the answer
		answer http.HandlerFunc
		want   string // in the error
		most   int    // requests in a minute
	}{
		"503": {"", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "2")
			problem(w, 503, "Too many are being served.")
		}, "status 503: Service Unavailable Too many are being served.", 75},
		"500 of a proxy":                     {"", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<h1>oops</h1>", 500) }, "status 500", 90},
		"a problem that repeats the request": {"", func(w http.ResponseWriter, r *http.Request) { problem(w, 500, "of "+r.Header.Get("Authorization")) }, "status 500", 90},
		"another account":                    {"", func(w http.ResponseWriter, _ *http.Request) { problem(w, 401, "") }, "check Username and Password", 30},
		"another role":                       {"", func(w http.ResponseWriter, _ *http.Request) { problem(w, 403, "") }, "role gateway", 30},
		"elsewhere":                          {"", func(w http.ResponseWriter, _ *http.Request) { http.NotFound(w, nil) }, "check URL", 90},
		"a redirect": {"", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://evil.example/", http.StatusTemporaryRedirect)
		}, "redirects are not followed", 90},
		"nobody":                     {"", abort, "EOF", 90},
		"hangs":                      {"", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "nothing came for long", 10},
		"an older service":           {SnapshotType, body(json, "{}"), "older than this gateway", 90},
		"half a snapshot":            {SnapshotType, then(body(SnapshotType, "\x89RSNAP\r\n"), abort), "read snapshot", 90},
		"a short snapshot":           {SnapshotType, body(SnapshotType, "\x89RSNAP\r\n"), "read snapshot", 90},
		"a snapshot that stops":      {SnapshotType, then(body(SnapshotType, "\x89RSNAP\r\n"), hang), "nothing came for long", 20},
		"another snapshot":           {SnapshotType, body(SnapshotType, strings.Repeat("x", 1<<20)), "read snapshot", 90},
		"a stream that ends":         {stream, body(stream, "retry: 1\n\n"), "has ended the stream", 90},
		"a stream that stops":        {stream, then(body(stream, "retry: 1\n\n"), hang), "nothing came for long", 40},
		"a stream of lines":          {stream, endless(strings.Repeat(":\n", 1000)), "longer than", 90},
		"a stream of a line":         {stream, endless(strings.Repeat("data", 1000)), "longer than", 90},
		"a stream of no events":      {stream, body(stream, "data: {}\n\n"), "read event", 90},
		"a stream of bad heartbeats": {stream, body(stream, "event: heartbeat\ndata: {}\n\n"), "read heartbeat", 90},
		"a stream of bad resets":     {stream, body(stream, "event: reset\ndata: {}\n\n"), "read reset", 90},
		"no stream":                  {stream, body("text/html", "<h1>log in</h1>"), `the answer is "text/html"`, 90},
		"no page":                    {json, body(json, `{"epoch"`), "read answer", 90},
		"a page of another order":    {json, body(json, `{"epoch":"`+string(epoch)+`","head":1,"through":7,"events":[]}`), "read answer", 90},
		"a page without end":         {json, endless(`{"events":[` + strings.Repeat(" ", 1000)), "the answer is longer than", 90},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				s.revoke("one")
				web := newWeb(t, s)
				web.set(of(tt.accept, tt.answer))
				h := web.source(t, "")
				h.maxPage = 64 << 10
				r, _ := start(t, Config{Source: h})
				told, last := "", ""
				for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
					got := r.Status()
					if now := got.Error + "\n" + got.Feeds[0].Error + "\n"; now != last {
						told, last = told+now, now
					}
				}
				if !strings.Contains(told, tt.want) {
					t.Errorf("told %q, want %q", told[:min(len(told), 500)], tt.want)
				}
				if strings.Contains(told, secret) || strings.Contains(told, "Basic") || strings.Contains(told, "evil") {
					t.Errorf("told %q", told)
				}
				if all := web.seen(); len(all) > tt.most || len(all) < 2 {
					t.Errorf("%d requests in a minute, want 2 to %d", len(all), tt.most)
				}
				web.set(nil)
				s.revoke("two")
				within(t, 25*time.Second, "all is well", func() bool {
					return s.reachedBy(r)() && r.connected(nil) && r.Status().Error == "" && r.Age() < 10*time.Second
				})
				s.equal(t, r)
			})
		})
	}
}

// A snapshot may take as long as it will, if it comes; but nobody waits for a trickle.
func TestSlowSnapshot(t *testing.T) {
	for name, tt := range map[string]struct {
		piece int // bytes every ten seconds
		least time.Duration
		most  time.Duration
		err   error
	}{
		"it comes":        {leastRate * 11, 10 * time.Minute, time.Hour, nil},
		"it comes slowly": {leastRate * 5, slowFor, 90 * time.Second, errSlow},
		"it trickles":     {100, slowFor, slowFor + 11*time.Second, errSlow},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				web := newWeb(t, s)
				b := newBlocks(1, 0).header("all", 0)
				for len(b.b) < 60*tt.piece {
					b.block(optional|0x70, strings.Repeat("x", min(tt.piece, 60_000)))
				}
				all := b.end(0, 0)
				web.set(func(w http.ResponseWriter, r *http.Request) bool {
					w.Header().Set("Content-Type", SnapshotType)
					for piece := range slices.Chunk(all, tt.piece) {
						if _, err := w.Write(piece); err != nil {
							return true
						}
						_ = http.NewResponseController(w).Flush()
						time.Sleep(10 * time.Second)
					}
					return true
				})
				state, began := NewState(StateConfig{}), time.Now()
				err := web.source(t, "").Load(t.Context(), state)
				if took := time.Since(began); !errors.Is(err, tt.err) || took < tt.least || took > tt.most || (state.At() == position(7)) != (err == nil) {
					t.Errorf("at %s after %s: %v", state.At(), took, err)
				}
			})
		})
	}
}

// A log that was restored without a new epoch is told of, and followed nevertheless.
func TestAhead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		for i := range 5 {
			s.revoke(fmt.Sprint(i))
		}
		web := newWeb(t, s)
		h := web.source(t, "")
		web.set(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Accept") == "application/json" {
				if after(r.URL.Query().Get("after")).Seq <= 3 {
					return false
				}
				w.Header().Set("Content-Type", "application/problem+json")
				w.WriteHeader(http.StatusBadRequest)
				fmt.Fprint(w, `{"title":"A parameter is not valid.","status":400,"detail":"The parameter after is past the end of the log."}`)
				return true
			}
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprintf(w, "id: %s:3\nevent: reset\ndata: {\"epoch\":%[1]q,\"seq\":3}\n\n", epoch)
			e, err := s.log[3].MarshalJSON()
			must(t, err)
			fmt.Fprintf(w, "id: %s\nevent: %s\ndata: %s\n\n", s.log[3].Position, s.log[3].Type, e)
			return true
		})
		if _, err := h.Events(t.Context(), position(3)); err != nil {
			t.Errorf("at the end: %v", err)
		}
		if _, err := h.Events(t.Context(), position(5)); !errors.Is(err, ErrAhead) || errors.Is(err, ErrGone) || !strings.Contains(err.Error(), "rescind epoch new") {
			t.Errorf("past the end: %v", err)
		}
		// The stream goes on, lest a revocation there be missed; it is asked again what was before
		// unless Connected has found out.
		for from, want := range map[revocation.Position]int{
			position(5): 2, position(3): 1, position(2): 2, {Epoch: newEpoch, Seq: 5}: 2,
		} {
			var to hears
			err := h.Follow(t.Context(), func() revocation.Position { return from }, &to)
			if to.connects != want || len(to.events) != 1 || !strings.Contains(err.Error(), "has ended the stream") {
				t.Errorf("from %s: %d times connected, %d events, %v", from, to.connects, len(to.events), err)
			}
		}
		var to hears
		_ = h.Follow(t.Context(), func() revocation.Position { return position(revocation.Seq(1 + 4*min(to.connects, 1))) }, &to)
		if to.connects != 1 {
			t.Errorf("%d times connected, though nothing was missing", to.connects)
		}
		web.set(func(w http.ResponseWriter, r *http.Request) bool {
			problem(w, http.StatusBadRequest, "The parameter limit must be a number.")
			return true
		})
		if _, err := h.Events(t.Context(), position(5)); err == nil || errors.Is(err, ErrAhead) {
			t.Errorf("another mistake: %v", err)
		}
	})
}

// hears is a Receiver that notes what it is told.
type hears struct {
	Receiver
	connects int
	events   []revocation.Event
}

func (h *hears) Connected(context.Context) error { h.connects++; return nil }

func (h *hears) Event(_ context.Context, e revocation.Event) error {
	h.events = append(h.events, e)
	return nil
}

func TestEventsOverHTTP(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("one")
		web := newWeb(t, s)
		h := web.source(t, "")
		event := func(seq revocation.Seq) string {
			e := s.log[0]
			e.Seq = seq
			b, err := e.MarshalJSON()
			must(t, err)
			return string(b)
		}
		for body, want := range map[string]string{
			`{"epoch":"%s","head":3,"through":2,"events":[` + event(1) + `,` + event(2) + `]}`: "",
			`{"epoch":"%s","through":2,"events":[]}`:                                           "",
			`{"epoch":"%s","head":3,"through":3,"events":[` + event(2) + `,` + event(1) + `]}`: "is not in order after 2",
			`{"epoch":"%s","head":3,"through":1,"events":[` + event(2) + `]}`:                  "is not in order after 0",
			`{"epoch":"%s","head":3,"through":3,"events":[{}]}`:                                "gone",
			`{"epoch":"` + string(newEpoch) + `","head":3,"through":3,"events":[]}%.0s`:        "gone",
		} {
			web.set(func(w http.ResponseWriter, _ *http.Request) bool {
				w.Header().Set("Content-Type", "application/json")
				fmt.Fprintf(w, body, epoch)
				return true
			})
			page, err := h.Events(t.Context(), position(0))
			switch {
			case want == "" && (err != nil || page.Through != 2 || len(page.Events) > 0 != (page.Head == 3) || len(page.Events) == 0 && page.Head != -1):
				t.Errorf("%s: %+v, %v", body, page, err)
			case want != "" && (err == nil || !strings.Contains(err.Error(), want) || errors.Is(err, ErrGone) != (want == "gone")):
				t.Errorf("%s: %v, want %q", body, err, want)
			}
		}
		web.set(nil)
		if _, err := h.Events(t.Context(), revocation.Position{Epoch: newEpoch, Seq: 1}); !errors.Is(err, ErrGone) {
			t.Errorf("another epoch: %v", err)
		}
	})
}

func TestHTTPConfig(t *testing.T) {
	t.Parallel()
	good := HTTPConfig{URL: "https://rescind.example.com", Username: "gw", Password: secret}
	for name, tt := range map[string]struct {
		change func(c *HTTPConfig)
		want   []string
	}{
		"as it should be":  {func(c *HTTPConfig) {}, nil},
		"below a path":     {func(c *HTTPConfig) { c.URL += "/rescind/" }, nil},
		"loopback":         {func(c *HTTPConfig) { c.URL = "http://[::1]:9763" }, nil},
		"allowed":          {func(c *HTTPConfig) { c.URL, c.AllowHTTP = "http://rescind", true }, nil},
		"plain":            {func(c *HTTPConfig) { c.URL = "http://rescind.example.com" }, []string{"URL is http://rescind.example.com", "use https"}},
		"a password in it": {func(c *HTTPConfig) { c.URL = "https://gw:" + secret + "@rescind.example.com" }, []string{"set Username and Password"}},
		"no URL":           {func(c *HTTPConfig) { c.URL = secret }, []string{"URL must be"}},
		"bad URL":          {func(c *HTTPConfig) { c.URL = "https://" + secret + " " }, []string{"URL must be"}},
		"a query":          {func(c *HTTPConfig) { c.URL += "?x=1" }, []string{"URL has a query"}},
		"everything": {func(c *HTTPConfig) {
			*c = HTTPConfig{URL: "ftp://x", Username: "a:b", Password: secret + "\n", Tenant: "A B", Client: &http.Client{Timeout: time.Second}}
		}, []string{"configure replica over HTTP: ", "URL must be", "Username has", "Password has a control character", `Tenant is "A B"`, "Client has a Timeout of 1s"}},
		"authorities": {func(c *HTTPConfig) { c.RootCAs = x509.NewCertPool() }, nil},
		"authorities and a client": {func(c *HTTPConfig) { c.RootCAs, c.Client = x509.NewCertPool(), new(http.Client) },
			[]string{"Client and RootCAs are both set"}},
		"nothing": {func(c *HTTPConfig) { *c = HTTPConfig{} }, []string{"URL must be", "Username is empty", "Password is empty"}},
	} {
		cfg := good
		tt.change(&cfg)
		h, err := NewHTTP(cfg)
		if tt.want == nil {
			if err != nil || strings.Contains(cmp.Or(h.String(), secret), secret) || strings.Contains(fmt.Sprintf("%v %+v", h, h), secret) {
				t.Errorf("%s: %v, %v", name, h, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s was accepted", name)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), secret) {
				t.Errorf("%s: %v, want %q", name, err, want)
			}
		}
	}
}

// The password goes to nobody else, whatever the client would do.
func TestRedirect(t *testing.T) {
	t.Parallel()
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("it was followed") }))
	defer elsewhere.Close()
	server := httptest.NewServer(http.RedirectHandler(elsewhere.URL, http.StatusTemporaryRedirect))
	defer server.Close()
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return nil }}
	h, err := NewHTTP(HTTPConfig{URL: server.URL, Username: "gw", Password: secret, Client: client})
	must(t, err)
	if err := h.Load(t.Context(), NewState(StateConfig{})); err == nil || !strings.Contains(err.Error(), "redirects are not followed") {
		t.Error(err)
	}
}

// A private authority is believed if it is given, and not otherwise.
func TestRootCAs(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", SnapshotType)
		_, _ = w.Write(newBlocks(1, 0).header("all", 0).end(0, 0))
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	for _, given := range []*x509.CertPool{roots, x509.NewCertPool(), nil} {
		h, err := NewHTTP(HTTPConfig{URL: server.URL, Username: "gw", Password: secret, RootCAs: given})
		must(t, err)
		s := NewState(StateConfig{})
		err = h.Load(t.Context(), s)
		unknown := new(x509.UnknownAuthorityError)
		if (given == roots) != (err == nil) || err != nil && !errors.As(err, unknown) || (s.At() == position(7)) != (given == roots) {
			t.Errorf("at %s: %v", s.At(), err)
		}
		h.client.CloseIdleConnections()
	}
}
