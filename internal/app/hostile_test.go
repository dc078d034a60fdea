package app_test

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rescindhq/rescind/internal/authn"
)

// floodSize is how many there are of each bad request.
func floodSize() int {
	if os.Getenv("RESCIND_HEAVY") != "" {
		return 10_000
	}
	return 1_000
}

// A flood of everything that is wrong gets exactly the contract's answers, writes
// nothing, and leaves the service as it was.
func TestFloodOfBadRequests(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.spawn()
	w.client(idpISS, authn.Registration{ID: "other", Secret: "other-secret"})
	client := newHTTPClient(t)
	auth := form(basic(clientID, clientSecret))
	live := mint("RS256", nil, claims("victim"))
	s.mustRevoke(client, accessToken("warm-up"))
	head, _, _ := strings.Cut(live, ".")
	payload := strings.Split(live, ".")[1]
	with := func(h http.Header, name, value string) http.Header {
		h = h.Clone()
		h.Set(name, value)
		return h
	}
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"at+jwt"}`))
	floods := []struct {
		name    string
		header  http.Header
		body    string
		status  int
		code    string
		mayStop bool // 429 once throttled
	}{
		{name: "malformed form", header: auth, body: "token=%zz", status: 400, code: "invalid_request"},
		{name: "body over the limit", header: auth, body: "token=" + strings.Repeat("x", 64<<10), status: 413, code: "invalid_request"},
		{name: "repeated parameter", header: auth, body: "token=a&token=b", status: 400, code: "invalid_request"},
		{name: "wrong media type", header: with(auth, "Content-Type", "application/json"), body: `{"token":"a"}`, status: 400, code: "invalid_request"},
		{name: "forged with somebody's jti", header: auth, body: "token=" + head + "." + payload + "." + strings.Repeat("A", 342), status: 200},
		{name: "alg none", header: auth, body: "token=" + none + "." + payload + ".", status: 200},
		{name: "expired", header: auth, body: "token=" + mint("RS256", nil, claims("old", map[string]any{"exp": time.Now().Unix() - 3600})), status: 200},
		{name: "another client's", header: form(basic("other", "other-secret")), body: "token=" + live, status: 400, code: "invalid_grant"},
		{name: "wrong secret", header: form(basic(clientID, "wrong")), body: "token=" + live, status: 401, code: "invalid_client", mayStop: true},
	}
	memory := func() float64 { return s.metric(client, "process_resident_memory_bytes") }
	events := w.events()
	before := memory()
	for _, f := range floods {
		var throttled, wrong atomic.Int64
		var example atomic.Value
		var next atomic.Int64
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for next.Add(1) <= int64(floodSize()) {
					a, err := send(client, http.MethodPost, s.base+"/revoke", f.header, f.body)
					switch {
					case f.mayStop && err == nil && a.status == http.StatusTooManyRequests && a.header.Get("Retry-After") != "":
						throttled.Add(1)
					case err != nil || a.status != f.status || a.oauthError() != f.code:
						wrong.Add(1)
						example.Store(fmt.Sprintf("%+v, %v", a, err))
					}
				}
			})
		}
		wg.Wait()
		if wrong.Load() > 0 {
			t.Errorf("%s: %d of %d answers are wrong, such as %v", f.name, wrong.Load(), floodSize(), example.Load())
		}
		if f.mayStop && throttled.Load() == 0 {
			t.Errorf("%s: never throttled", f.name)
		}
	}
	if now := w.events(); now != events {
		t.Errorf("%d events were written", now-events)
	}
	// Flat: what a flood holds while it is answered, not something for each request.
	if after := memory(); after > before+64<<20 {
		t.Errorf("memory went from %.0f to %.0f MiB", before/(1<<20), after/(1<<20))
	}
	// The owner behind another address is not locked out. Here there is but one address: it waits its turn.
	await(t, "the throttle to let the owner in again", func() bool {
		a, err := s.revoke(client, live)
		return err == nil && a.status == http.StatusOK
	})
	if now := w.events(); now != events+1 {
		t.Errorf("%d events after the real revocation, want 1", now-events)
	}
}

// metric reads one value from the operators' listener.
func (s *service) metric(client *http.Client, name string) float64 {
	s.t.Helper()
	a, err := send(client, http.MethodGet, s.ops+"/metrics", nil, "")
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(a.body) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				s.t.Fatal(err)
			}
			return v
		}
	}
	s.t.Fatalf("there is no metric %s", name)
	return 0
}

// keyServer is an issuer's key endpoint that can be down.
type keyServer struct {
	*httptest.Server
	down  atomic.Bool
	calls atomic.Int64
}

func newKeyServer(t *testing.T) *keyServer {
	k := &keyServer{}
	body, err := json.Marshal(idp().public)
	if err != nil {
		t.Fatal(err)
	}
	k.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		k.calls.Add(1)
		if k.down.Load() {
			http.Error(rw, "down", http.StatusInternalServerError)
			return
		}
		_, _ = rw.Write(body) // the client sees it if not
	}))
	t.Cleanup(k.Close)
	return k
}

// While an issuer's keys cannot be had its tokens are refused with 503, never
// waved through with 200.
func TestKeysOfIssuerUnavailable(t *testing.T) {
	t.Parallel()
	keys := newKeyServer(t)
	keys.down.Store(true)
	w := newWorld(t)
	w.issuers = w.writeIssuers(map[string]any{"jwks_url": keys.URL, "allow_private_addresses": true})
	s := w.serve()
	client := newHTTPClient(t)
	token := accessToken("t-1")
	unavailable := func(token string) {
		t.Helper()
		a, err := s.revoke(client, token)
		if err != nil || a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" || a.oauthError() != "temporarily_unavailable" {
			t.Errorf("%+v, %v; want 503", a, err)
		}
	}
	unavailable(token)
	keys.down.Store(false)
	await(t, "the revocation once the keys are there", func() bool {
		a, err := s.revoke(client, token)
		return err == nil && a.status == http.StatusOK
	})
	w.checkLog([]string{"t-1"})
	// Keys that are known go on working.
	keys.down.Store(true)
	s.mustRevoke(client, accessToken("t-2"))
	unavailable(mint("ES256", map[string]any{"kid": "new-key"}, claims("t-3")))
	keys.down.Store(false)

	// A flood of invented kids causes hardly a fetch, and no 200.
	before := keys.calls.Load()
	for i := range 200 {
		a, err := s.revoke(client, mint("ES256", map[string]any{"kid": fmt.Sprintf("made-up-%d", i)}, claims("t-4")))
		if err != nil || a.status != http.StatusServiceUnavailable && (a.status != http.StatusOK || keys.calls.Load() == before) {
			t.Fatalf("made-up kid %d: %+v, %v", i, a, err)
		}
	}
	if n := keys.calls.Load() - before; n > 3 {
		t.Errorf("200 made-up kids caused %d fetches", n)
	}
	s.mustRevoke(client, accessToken("t-5"))
	w.checkLog([]string{"t-1", "t-2", "t-5"})
	if n := w.events(); n != 3 {
		t.Errorf("%d events, want 3", n)
	}
}

// Slow and silent peers are cut off, and bother nobody.
func TestSlowAndIdleConnections(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	address := strings.TrimPrefix(s.base, "http://")
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	for range 1000 {
		dial()
	}
	slow := dial()
	cut := make(chan time.Duration, 1)
	go func() {
		// One byte a second for as long as it is let.
		started := time.Now()
		request := "POST /revoke HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 1000\r\n\r\n" + strings.Repeat("t", 1000)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for i := range request {
			if _, err := slow.Write([]byte{request[i]}); err != nil {
				break
			}
			<-tick.C
		}
		cut <- time.Since(started)
	}()
	gone := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, bufio.NewReader(slow))
		gone <- err
	}()
	client := newHTTPClient(t)
	ids := s.revokeMany(client, "others", 100)
	select {
	case <-gone: // whatever the end looks like
	case <-time.After(30 * time.Second):
		t.Error("a client that sends a byte a second is not cut off")
	}
	slow.Close()
	<-cut
	w.checkLog(ids)
}
