package sidecar

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
)

const challenge = `Bearer realm="api", error="invalid_token"`

// What is asked about is what the proxy says, and of it nothing that can be read in two ways.
func TestForwardAuthAsks(t *testing.T) {
	t.Parallel()
	const (
		method = "X-Forwarded-Method: GET\r\n"
		uri    = "X-Forwarded-Uri: /pizzashack/1.0.0/menu?a=b%20c&d\r\n"
		bearer = "Authorization: Bearer abc\r\n"
	)
	get := gateway.Request{Method: "GET", Target: "/pizzashack/1.0.0/menu?a=b%20c&d", Authorization: []string{"Bearer abc"}}
	with := func(change func(*gateway.Request)) *gateway.Request {
		r := get
		change(&r)
		return &r
	}
	for _, tt := range []struct {
		name, line, header string
		want               *gateway.Request // nil: it is not asked, and the answer is 400
	}{
		{"GET", "GET /auth", method + uri + bearer, &get},
		{"HEAD", "HEAD /auth", method + uri + bearer, &get},
		{"POST", "POST /auth", "Content-Length: 3\r\n" + method + uri + bearer, &get},
		{"any method", "PROPFIND /auth", method + uri + bearer, &get},
		{"a query of its own", "GET /auth?X-Forwarded-Uri=/a", method + uri + bearer, &get},
		{"for nginx", "GET /auth/nginx", method + uri + bearer, &get},
		{"names in lower case", "GET /auth", strings.ToLower(method[:18]) + method[18:] + "x-forwarded-uri" + uri[15:] + "authorization" + bearer[13:], &get},
		{"no token", "GET /auth", method + uri, with(func(r *gateway.Request) { r.Authorization = nil })},
		{"two tokens", "GET /auth", method + uri + bearer + "Authorization: Basic x\r\n", with(func(r *gateway.Request) { r.Authorization = []string{"Bearer abc", "Basic x"} })},
		{"an empty token", "GET /auth", method + uri + "Authorization:\r\n", with(func(r *gateway.Request) { r.Authorization = []string{""} })},
		{"another method", "GET /auth", "X-Forwarded-Method: M-SEARCH\r\n" + uri + bearer, with(func(r *gateway.Request) { r.Method = "M-SEARCH" })},
		{"a path that is for the gateway to judge", "GET /auth", method + "X-Forwarded-Uri: /a/../b//c%00\r\n" + bearer, with(func(r *gateway.Request) { r.Target = "/a/../b//c%00" })},
		{"two readings with a comma", "GET /auth", method + "X-Forwarded-Uri: /a, /b\r\n" + bearer, with(func(r *gateway.Request) { r.Target = "/a, /b" })},

		{"names that are none", "GET /auth", "X_Forwarded_Method: GET\r\nX_Forwarded_Uri: /a\r\n" + bearer, nil},
		{"other proxies' names", "GET /auth", "X-Original-Method: GET\r\nX-Original-Uri: /a\r\n" + bearer, nil},
		{"nothing", "GET /auth", "", nil},
		{"no method", "GET /auth", uri + bearer, nil},
		{"no target", "GET /auth", method + bearer, nil},
		{"two methods", "GET /auth", method + "X-Forwarded-Method: POST\r\n" + uri + bearer, nil},
		{"two targets", "GET /auth", method + uri + uri + bearer, nil},
		{"two targets in two cases", "GET /auth", method + uri + "x-forwarded-uri: /a\r\n" + bearer, nil},
		{"joined methods", "GET /auth", "X-Forwarded-Method: GET, POST\r\n" + uri + bearer, nil},
		{"an empty method", "GET /auth", "X-Forwarded-Method:\r\n" + uri + bearer, nil},
		{"a method with a space", "GET /auth", "X-Forwarded-Method: GET /\r\n" + uri + bearer, nil},
		{"a long method", "GET /auth", "X-Forwarded-Method: " + strings.Repeat("G", 65) + "\r\n" + uri + bearer, nil},
		{"an empty target", "GET /auth", method + "X-Forwarded-Uri:\r\n" + bearer, nil},
		{"a target with its host", "GET /auth", method + "X-Forwarded-Uri: http://api/a\r\n" + bearer, nil},
		{"a target without path", "GET /auth", method + "X-Forwarded-Uri: *\r\n" + bearer, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := &fake{decide: func(gateway.Request) gateway.Decision { return allowed(pizza) }}
			c, m := countedOf(e)
			request := tt.line + " HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n" + tt.header + "\r\n"
			if strings.Contains(tt.header, "Content-Length") {
				request += "abc"
			}
			resp, body := exchange(t, serve(t, newForwardAuth(c, m, quiet)), request)
			want, status := []gateway.Request(nil), http.StatusBadRequest
			if tt.want != nil {
				want, status = []gateway.Request{*tt.want}, http.StatusOK
			} else if !strings.Contains(body, "The proxy in front of this gateway is configured wrongly: ") {
				t.Errorf("nobody is told what is wrong: %s", body)
			}
			if diff := cmp.Diff(want, e.questions()); diff != "" || resp.StatusCode != status {
				t.Errorf("status %d, want %d\n%s", resp.StatusCode, status, diff)
			}
			if got := resp.Header.Get("Cache-Control"); got != "no-store" {
				t.Errorf("Cache-Control: %s", got)
			}
		})
	}
}

// Both paths say the same, each in its words.
func TestForwardAuthAnswers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		decision gateway.Decision
		nginx    int
	}{
		{"allowed", allowed(pizza), 200},
		{"allowed without a token", gateway.Decision{Allowed: true}, 200},
		{"revoked", refusedWith(401, replica.CodeInvalidCredentials, challenge), 401},
		{"no credentials", refusedWith(401, replica.CodeMissingCredentials, `Bearer realm="api"`), 401},
		{"no scope", refusedWith(403, replica.CodeScope, `Bearer realm="api", error="insufficient_scope", scope="a b"`), 403},
		{"no subscription", refusedWith(403, replica.CodeForbidden, ""), 403},
		{"ambiguous", refusedWith(400, replica.CodeForbidden, ""), 403},
		{"not ready", refusedWith(503, replica.CodeGeneral, ""), 403},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := &fake{decide: func(gateway.Request) gateway.Decision { return tt.decision }}
			c, m := countedOf(e)
			auth := newForwardAuth(c, m, quiet)
			answer := func(path string) *httptest.ResponseRecorder {
				r := httptest.NewRequest("GET", path, nil)
				r.Header = http.Header{"X-Forwarded-Method": {"GET"}, "X-Forwarded-Uri": {"/a"}, "X-Rescind-Subject": {"mallory"}, "X-Rescind-Scope": {"all"}}
				w := httptest.NewRecorder()
				auth.ServeHTTP(w, r)
				return w
			}
			want := httptest.NewRecorder()
			want.Header().Set("Cache-Control", "no-store")
			if tt.decision.Allowed {
				tt.decision.SetIdentity(want.Header())
			} else {
				tt.decision.WriteError(want)
			}
			plain := answer("/auth")
			if diff := cmp.Diff(want.Header(), plain.Header()); diff != "" || plain.Code != want.Code || plain.Body.String() != want.Body.String() {
				t.Errorf("status %d, want %d; body %s, want %s\n%s", plain.Code, want.Code, plain.Body, want.Body, diff)
			}

			nginx := answer("/auth/nginx")
			if nginx.Code != tt.nginx || nginx.Body.Len() != 0 {
				t.Errorf("for nginx: status %d, want %d, with %q", nginx.Code, tt.nginx, nginx.Body)
			}
			header := want.Header().Clone()
			if !tt.decision.Allowed {
				header.Del("Content-Type")
				header.Set("X-Rescind-Status", map[int]string{400: "400", 401: "401", 403: "403", 503: "503"}[want.Code])
				header.Set("X-Rescind-Body", want.Body.String())
			}
			if diff := cmp.Diff(header, nginx.Header()); diff != "" {
				t.Errorf("for nginx:\n%s", diff)
			}
		})
	}
}

func TestForwardAuthElsewhere(t *testing.T) {
	t.Parallel()
	e := &fake{decide: func(gateway.Request) gateway.Decision { return allowed(pizza) }}
	c, m := countedOf(e)
	address := serve(t, newForwardAuth(c, m, quiet))
	for _, target := range []string{"/", "/auth/", "//auth", "/auth/nginx/", "/AUTH", "/x/../auth", "*"} {
		resp, _ := exchange(t, address, "GET "+target+" HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nX-Forwarded-Method: GET\r\nX-Forwarded-Uri: /a\r\n\r\n")
		if resp.StatusCode < 400 || len(e.questions()) > 0 {
			t.Errorf("%s: %d", target, resp.StatusCode)
		}
	}
}

// A proxy that is configured wrongly is told so in the words that it understands, and what it is told of clients
// cannot end its header.
func TestForwardAuthOfNginxConfiguredWrongly(t *testing.T) {
	t.Parallel()
	e := &fake{}
	c, m := countedOf(e)
	w := httptest.NewRecorder()
	newForwardAuth(c, m, quiet).ServeHTTP(w, httptest.NewRequest("GET", "/auth/nginx", nil))
	want := `{"code":"900900","message":"Bad Request","description":"The proxy in front of this gateway is configured wrongly: it must send X-Forwarded-Method"}`
	if w.Code != 403 || w.Header().Get(statusHeader) != "400" || w.Header().Get(bodyHeader) != want {
		t.Errorf("%d %v", w.Code, w.Header())
	}
}

func FuzzOneLine(f *testing.F) {
	f.Add("{\"a\":\"é😀\u2028 \\u0000\"}\r\n\x7f")
	f.Fuzz(func(t *testing.T, text string) {
		if !utf8.ValidString(text) {
			return // json.Marshal writes no such text
		}
		body, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		line := oneLine(body)
		for i := range len(line) {
			if line[i] < ' ' || line[i] > '~' {
				t.Fatalf("%q in %q", line[i], line)
			}
		}
		var back string
		if err := json.Unmarshal([]byte(line), &back); err != nil || strings.ReplaceAll(back, "\x7f", " ") != strings.ReplaceAll(text, "\x7f", " ") {
			t.Fatalf("%q became %q: %v", text, back, err)
		}
	})
}

func FuzzAsked(f *testing.F) {
	f.Add("GET", "/a?b", "")
	f.Add("GET, POST", "http://a/", "/b")
	f.Fuzz(func(t *testing.T, method, target, second string) {
		h := http.Header{methodHeader: {method}, uriHeader: {target}}
		if second != "" {
			h.Add(uriHeader, second)
		}
		q, err := asked(h)
		if err == nil && (second != "" || q.Method != method || q.Target != target || !strings.HasPrefix(target, "/") || strings.ContainsAny(method, " ,\t\r\n") || method == "") {
			t.Fatalf("%q %q %q is asked as %+v", method, target, second, q)
		}
	})
}

func BenchmarkForwardAuth(b *testing.B) {
	d := allowed(pizza)
	e := &benchEngine{d}
	c, m := countedOf(e)
	auth := newForwardAuth(c, m, quiet)
	r := httptest.NewRequest("GET", "/auth", nil)
	r.Header = http.Header{"X-Forwarded-Method": {"GET"}, "X-Forwarded-Uri": {"/pizzashack/1.0.0/menu"}, "Authorization": {"Bearer abc"}}
	b.ReportAllocs()
	for b.Loop() {
		auth.ServeHTTP(&discard{header: http.Header{}}, r)
	}
}

// discard is an answer that nobody reads.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) WriteHeader(int)             {}
func (d *discard) Write(b []byte) (int, error) { return len(b), nil }
