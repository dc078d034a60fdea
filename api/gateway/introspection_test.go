package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// stale is a service of which nobody knows how old what is known of it is, so that all is asked.
func stale() (*service, replica.Config) {
	s := newService()
	s.silent = true
	return s, replica.Config{Staleness: replica.Staleness{Then: replica.Introspect}}
}

// asking is a gateway that asks a server with this handler.
func asking(t *testing.T, handler http.HandlerFunc, change func(*Introspection)) (*world, *service) {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	i := &Introspection{URL: server.URL + "/oauth2/introspect", ClientID: "gate way", ClientSecret: "hu:sh%"}
	if change != nil {
		change(i)
	}
	s, rc := stale()
	return start(t, s, rc, Config{Introspection: i}), s
}

func (w *world) decide(t *testing.T, compact string) Decision {
	t.Helper()
	return w.Decide(t.Context(), Request{Method: "GET", Target: "/shop/1.0.0/orders", Authorization: []string{"Bearer " + compact}})
}

func TestIntrospection(t *testing.T) {
	t.Parallel()
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a redirect was followed") }))
	t.Cleanup(elsewhere.Close)
	says := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json;charset=UTF-8")
			_, _ = io.WriteString(w, body)
		}
	}
	whole := func(changes with) http.HandlerFunc {
		var claims with
		if err := json.Unmarshal([]byte(claimsOf(nil)), &claims); err != nil {
			t.Fatal(err)
		}
		claims["active"] = true
		for name, value := range changes {
			claims[name] = value
		}
		return says(string(must(json.Marshal(claims))))
	}
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		change  func(*Introspection)
		status  int
		reason  string
	}{
		{"active", whole(nil), nil, 200, ""},
		{"active and nothing else", says(`{"active":true}`), nil, 200, ""},
		{"active, with nulls", says(`{"active":true,"iss":null,"exp":null,"jti":null}`), nil, 200, ""},
		{"inactive", says(`{"active":false}`), nil, 401, reasonInactive},
		{"inactive, of another token", says(`{"active":false,"jti":"at-9"}`), nil, 401, reasonInactive},
		{"active of another issuer", whole(with{"iss": otherIss}), nil, 503, reasonNoAnswer},
		{"active of another token", whole(with{"jti": "at-9"}), nil, 503, reasonNoAnswer},
		{"active with a jti of another type", whole(with{"jti": 1}), nil, 503, reasonNoAnswer},
		{"active, though over", whole(with{"exp": time.Now().Unix() - 600}), nil, 503, reasonNoAnswer},
		{"active as a string", says(`{"active":"true"}`), nil, 503, reasonNoAnswer},
		{"active in capitals", says(`{"ACTIVE":true}`), nil, 503, reasonNoAnswer},
		{"nothing about it", says(`{}`), nil, 503, reasonNoAnswer},
		{"an array", says(`[true]`), nil, 503, reasonNoAnswer},
		{"more than one value", says(`{"active":true} {"active":true}`), nil, 503, reasonNoAnswer},
		{"too much", says(`{"active":true,"x":"` + strings.Repeat("x", 64<<10) + `"}`), nil, 503, reasonNoAnswer},
		{"a page", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			_, _ = io.WriteString(w, `{"active":true}`)
		}, nil, 503, reasonNoAnswer},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}, nil, 503, reasonNoAnswer},
		{"bad credentials", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }, nil, 503, reasonNoAnswer},
		{"an error that looks well", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(500)
			_, _ = io.WriteString(w, `{"active":true}`)
		}, nil, 503, reasonNoAnswer},
		{"never", func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body) // else the server does not see that its client is gone
			<-r.Context().Done()
		}, func(i *Introspection) { i.Timeout = 20 * time.Millisecond }, 503, reasonNoAnswer},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int32
			compact := t1()
			w, s := asking(t, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				id, secret, _ := r.BasicAuth()
				if r.Method != "POST" || r.URL.RawQuery != "" || id != "gate+way" || secret != "hu%3Ash%25" ||
					r.PostFormValue("token") != compact || r.PostFormValue("token_type_hint") != "access_token" {
					t.Errorf("asked %s %s as %q %q, with %q", r.Method, r.URL, id, secret, r.PostForm)
				}
				tt.handler(w, r)
			}, tt.change)
			if d := w.decide(t, compact); d.Allowed != (tt.status == 200) || !d.Allowed && d.Status != tt.status || d.Reason != tt.reason {
				t.Errorf("%d %s, want %d %s", d.Status, d.Reason, tt.status, tt.reason)
			}
			if n := asked.Load(); n != 1 {
				t.Errorf("asked %d times, want once: no answer is kept, and no question repeated", n)
			}
			switch tt.status {
			case 401:
				w.refused(t, "over HTTP", compact)
			case 503:
				if got := w.get(t, bearing(compact)); got.status != 503 || !strings.Contains(got.body, "900900") || got.header.Get("Retry-After") == "" {
					t.Errorf("over HTTP: %d %s %s", got.status, got.header, got.body)
				}
			}
			asked.Store(0)
			s.revoke(t, revocation.KindToken, iss, "at-1", 0)
			w.refused(t, "revoked", compact)
			if asked.Load() != 0 {
				t.Error("asked about a token that is known to be revoked")
			}
		})
	}
}

func TestIntrospectionIsBounded(t *testing.T) {
	t.Parallel()
	began, release := make(chan struct{}), make(chan struct{})
	w, s := asking(t, func(w http.ResponseWriter, _ *http.Request) {
		began <- struct{}{}
		<-release
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"active":true}`)
	}, func(i *Introspection) { i.MaxConcurrent, i.Timeout = 1, time.Minute })
	first := make(chan Decision, 1)
	compact := t1()
	go func() { first <- w.decide(t, compact) }()
	<-began
	if d := w.decide(t, compact); d.Status != 503 || d.Reason != reasonOverload {
		t.Errorf("a second one at a time: %d %s", d.Status, d.Reason)
	}
	// What was revoked while the issuer thought about it is revoked.
	s.revoke(t, revocation.KindToken, iss, "at-1", 0)
	close(release)
	if d := <-first; d.Allowed || d.Status != 401 || d.Reason != "revoked" {
		t.Errorf("revoked during the question: %d %s", d.Status, d.Reason)
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestIntrospectionTakesTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log journal
		fail := true
		s, rc := stale()
		w := start(t, s, rc, Config{Logger: slog.New(slog.NewTextHandler(&log, nil)), Introspection: &Introspection{
			URL: "https://km.example.com/introspect", ClientID: "gateway", ClientSecret: "hush",
			Client: &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
				time.Sleep(time.Second)
				if fail {
					return nil, fmt.Errorf("no route to %s", r.URL)
				}
				return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"application/json"}},
					Body: io.NopCloser(strings.NewReader(`{"active":true}`))}, nil
			})},
		}})
		now := time.Now().Unix()
		ending := claim(with{"iat": now - 900, "exp": now - 30 + 4})
		for range 2 {
			if d := w.decide(t, ending); d.Reason != reasonNoAnswer {
				t.Errorf("nobody answers: %d %s", d.Status, d.Reason)
			}
		}
		fail = false
		if d := w.decide(t, ending); !d.Allowed {
			t.Errorf("a second before its end: %d %s", d.Status, d.Reason)
		}
		if d := w.decide(t, ending); d.Status != 401 || d.Reason != "expired" {
			t.Errorf("over by when the answer came: %d %s", d.Status, d.Reason)
		}
		fail = true
		gone, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if d := w.Decide(gone, Request{Method: "GET", Target: "/shop/1.0.0/orders", Authorization: []string{"Bearer " + t1()}}); d.Reason != reasonNoAnswer {
			t.Errorf("its caller is gone: %d %s", d.Status, d.Reason)
		}
		w.stop()
		if text := log.String(); strings.Count(text, "cannot be introspected") != 1 || strings.Count(text, "introspected again") != 1 ||
			strings.Contains(text, "hush") || strings.Contains(text, ending) {
			t.Errorf("logged %s", text)
		}
	})
}

// Tokens of an issuer are shown to nobody but whom the operator has named for it.
func TestIntrospectionOfOtherIssuers(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	w, _ := asking(t, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"active":true}`)
	}, func(i *Introspection) { i.Issuers = []string{jwtIss, iss} })
	if d := w.decide(t, mint(otherKey, with{"kid": "ec-2"}, with{"iss": otherIss})); d.Status != 503 || d.Reason != reasonNoAnswer || asked.Load() != 0 {
		t.Errorf("another issuer: %d %s, asked %d times, want 503 without a question", d.Status, d.Reason, asked.Load())
	}
	if d := w.decide(t, t1()); !d.Allowed || asked.Load() != 1 {
		t.Errorf("one of the issuers: %d %s, asked %d times", d.Status, d.Reason, asked.Load())
	}
}

func TestNobodyToAsk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, rc := stale()
		w := start(t, s, rc, Config{})
		if d := w.decide(t, t1()); d.Status != 503 || d.Reason != reasonNoAnswer {
			t.Errorf("%d %s, want 503 %s", d.Status, d.Reason, reasonNoAnswer)
		}
	})
}

// FuzzParseAnswer checks that only what says so plainly is active.
func FuzzParseAnswer(f *testing.F) {
	for _, seed := range []string{
		`{"active":true}`, `{"active":false}`, `{"active":true,"iss":"i","jti":"j","exp":1795209000}`, `{"active":true,"active":false}`,
		`{"Active":true}`, `{"active":true,"exp":1e400}`, `{"active":true,"x":1e400}`, `{"active":true,"exp":"1"}`, `{"active":true,"iss":["i"]}`, `null`, ``, "\xff",
	} {
		f.Add([]byte(seed))
	}
	about := &token.Token{Issuer: "i", ID: "j", Expiry: 1795209000}
	now := time.Unix(1795209000, 0)
	f.Fuzz(func(t *testing.T, body []byte) {
		active, err := parseAnswer(body, about, now)
		if !active {
			return
		}
		var answer map[string]any
		dec := json.NewDecoder(bytes.NewReader(body))
		dec.UseNumber() // a number too large for float64 is nobody's business in a member that is not known
		if invalid := dec.Decode(&answer); err != nil || invalid != nil || answer["active"] != true ||
			answer["iss"] != nil && answer["iss"] != "i" || answer["jti"] != nil && answer["jti"] != "j" {
			t.Fatalf("%q is active, %v", body, err)
		}
	})
}
