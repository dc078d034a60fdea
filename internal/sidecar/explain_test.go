package sidecar

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/obs"
)

func (*fake) Explain(context.Context, gateway.Request) replica.Explanation {
	return replica.Explanation{}
}

func (*fake) ExplainClaims(context.Context, json.RawMessage, gateway.Request) replica.Explanation {
	return replica.Explanation{}
}

func (*benchEngine) Explain(context.Context, gateway.Request) replica.Explanation {
	return replica.Explanation{}
}

func (*benchEngine) ExplainClaims(context.Context, json.RawMessage, gateway.Request) replica.Explanation {
	return replica.Explanation{}
}

// explaining is an engine that answers by a function, and keeps what it was asked.
type explaining struct {
	fake
	answer replica.Explanation
	wait   chan struct{} // nil: it answers at once
	begun  chan struct{}

	request gateway.Request
	claims  json.RawMessage
}

func (e *explaining) Explain(ctx context.Context, r gateway.Request) replica.Explanation {
	return e.ExplainClaims(ctx, nil, r)
}

func (e *explaining) ExplainClaims(_ context.Context, claims json.RawMessage, r gateway.Request) replica.Explanation {
	if e.wait != nil {
		e.begun <- struct{}{}
		<-e.wait
		return e.answer
	}
	e.request, e.claims = r, claims
	return e.answer
}

func opsOf(e engine) http.Handler {
	return opsHandler(prometheus.NewRegistry(), &obs.Readiness{}, e)
}

func post(h http.Handler, contentType, accept, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/explain", strings.NewReader(body))
	r.Header.Set("Content-Type", contentType)
	if accept != "" {
		r.Header.Set("Accept", accept)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

const secret = "eyJhbGciOiJFUzI1NiJ9.c2VjcmV0LXBheWxvYWQ.c2VjcmV0LXNpZ25hdHVyZQ"

func revokedAnswer() replica.Explanation {
	return replica.Explanation{
		Authorization: replica.Authorization{Code: replica.CodeInvalidCredentials, Reason: "revoked"}, HTTPStatus: 401,
		Checks: []replica.Check{
			{Name: "path", Result: replica.Passed, Detail: `The path "/a" means the same to everyone who reads it.`},
			{Name: "freshness", Result: replica.NotLooked, Detail: "Not here."},
			{Name: "revocation", Result: replica.Failed, Detail: "The token's jti \"x\x1b[2J\" was revoked.", Facts: map[string]any{"reason": "revoked", "exp": 7}},
			{Name: "scope", Result: replica.NotReached},
		},
		Next: "Get a new token.",
	}
}

// What is asked of the gateway, and what is answered.
func TestExplain(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, body string
		want       gateway.Request
		claims     string
	}{
		{"request", `{"token":"` + secret + `","method":"GET","path":"/a?b=c"}`,
			gateway.Request{Method: "GET", Target: "/a?b=c", Authorization: []string{"Bearer " + secret}}, ""},
		{"as it was copied", `{"token":" bearer  ` + secret + `\n","path":"/a"}`, gateway.Request{Target: "/a", Authorization: []string{"Bearer " + secret}}, ""},
		{"nobody", `{"method":"GET","path":"/a"}`, gateway.Request{Method: "GET", Target: "/a"}, ""},
		{"API", `{"token":"x","api":{"context":"/a/1","version":"1"}}`, gateway.Request{Target: "/a/1", Authorization: []string{"Bearer x"}}, ""},
		{"claims", `{"claims":{"iss":"a"},"method":"GET","path":"/a"}`, gateway.Request{Method: "GET", Target: "/a"}, `{"iss":"a"}`},
		{"null claims", `{"claims":null,"method":"GET","path":"/a"}`, gateway.Request{Method: "GET", Target: "/a"}, ""},
	} {
		e := &explaining{answer: revokedAnswer()}
		w := post(opsOf(e), "application/json; charset=utf-8", "", tt.body)
		if diff := cmp.Diff(tt.want, e.request); diff != "" || string(e.claims) != tt.claims || w.Code != http.StatusOK {
			t.Errorf("%s: %d, claims %s (-want +got):\n%s", tt.name, w.Code, e.claims, diff)
		}
		if w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s: %v", tt.name, w.Header())
		}
	}

	for file, accept := range map[string]string{"explain.json.golden": "application/json, text/plain", "explain.txt.golden": "text/plain"} {
		e := &explaining{answer: revokedAnswer()}
		got := post(opsOf(e), "application/json", accept, `{"token":"`+secret+`","method":"GET","path":"/a"}`).Body.Bytes()
		golden(t, file, got)
		if strings.Contains(string(got), "c2VjcmV0") || strings.Contains(string(got), "\x1b") {
			t.Errorf("%s has the token, or moves a terminal's cursor", file)
		}
	}

	e := &explaining{answer: replica.Explanation{Authorization: replica.Authorization{Authorized: true, API: pizza}, HTTPStatus: 200}}
	w := post(opsOf(e), "application/json", "text/plain", `{"token":"x","api":{"context":"/pizzashack/1.0.0","version":"2.0.0"}}`)
	if !strings.HasPrefix(w.Body.String(), "ACCEPTED\n") || !strings.Contains(w.Body.String(), "with version 1.0.0, not the one that was asked about") {
		t.Errorf("another version: %s", w.Body)
	}
}

// golden compares with a file, which -update writes.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-golden +got):\n%s", name, diff)
	}
}

// A question that is none is told what it must be, without a word of what is in it.
func TestExplainRefusesQuestions(t *testing.T) {
	t.Parallel()
	h := opsOf(&explaining{answer: revokedAnswer()})
	for _, tt := range []struct {
		name, kind, body string
		status           int
	}{
		{"empty", "application/json", "", 400},
		{"no object", "application/json", `["` + secret + `"]`, 400},
		{"unknown member", "application/json", `{"tokens":"` + secret + `","path":"/a"}`, 400},
		{"two objects", "application/json", `{"token":"` + secret + `","path":"/a"}{}`, 400},
		{"token and claims", "application/json", `{"token":"` + secret + `","claims":{},"path":"/a"}`, 400},
		{"no path", "application/json", `{"token":"` + secret + `"}`, 400},
		{"path and API", "application/json", `{"token":"` + secret + `","path":"/a","api":{"context":"/a","version":"1"}}`, 400},
		{"API without a version", "application/json", `{"token":"` + secret + `","api":{"context":"/a"}}`, 400},
		{"form", "application/x-www-form-urlencoded", "token=" + secret, 415},
		{"text", "text/plain", `{"token":"` + secret + `","path":"/a"}`, 415},
		{"no type", "", `{"token":"` + secret + `","path":"/a"}`, 415},
		{"large", "application/json", `{"token":"` + strings.Repeat(secret, 1+maxQuestionBytes/len(secret)) + `","path":"/a"}`, 413},
	} {
		if w := post(h, tt.kind, "", tt.body); w.Code != tt.status || strings.Contains(w.Body.String(), "c2VjcmV0") {
			t.Errorf("%s: %d %s, want %d", tt.name, w.Code, w.Body, tt.status)
		}
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/explain", nil))
	if w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != http.MethodPost {
		t.Errorf("GET: %d %v", w.Code, w.Header())
	}
}

// A few are explained at a time.
func TestExplainLimit(t *testing.T) {
	t.Parallel()
	e := &explaining{wait: make(chan struct{}), begun: make(chan struct{})}
	h := opsOf(e)
	done := make(chan int)
	for range maxExplaining {
		go func() { done <- post(h, "application/json", "", `{"path":"/a"}`).Code }()
		<-e.begun
	}
	if w := post(h, "application/json", "", `{"path":"/a"}`); w.Code != http.StatusServiceUnavailable {
		t.Errorf("one too many: %d", w.Code)
	}
	close(e.wait)
	for range maxExplaining {
		if code := <-done; code != http.StatusOK {
			t.Errorf("one that was not: %d", code)
		}
	}
}

// Through a real gateway: the claims of a token, and what is near what does not exist.
func TestExplainByGateway(t *testing.T) {
	t.Parallel()
	r, err := replica.New(replica.Config{Source: oneAPI{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := (oneAPI{}).Load(t.Context(), r.State()); err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{Replica: r, URL: "https://rescind.example.com", AnyAudience: true})
	if err != nil {
		t.Fatal(err)
	}
	w := post(opsOf(&live{Gateway: g, replica: r}), "application/json", "", `{"claims":{"iss":"https://nobody.example.com"},"path":"/pizzashack/1.0.0/menu","method":"GET"}`)
	var got explained
	d := json.NewDecoder(bytes.NewReader(w.Body.Bytes()))
	d.DisallowUnknownFields()
	if err := d.Decode(&got); err != nil {
		t.Fatal(err)
	}
	if got.Verdict != "refused" || got.HTTPStatus != 401 || got.Code != 900901 || got.Reason != "untrusted_issuer" || len(got.Checks) != len(gateway.CheckNames) ||
		!strings.HasPrefix(got.Summary, "Refused by the check issuer_trusted: ") || got.Next == "" {
		t.Errorf("%+v", got)
	}
}

// oneAPI is a source with one API.
type oneAPI struct{}

func (oneAPI) Load(_ context.Context, s *replica.State) error {
	return s.Load(revocation.Position{Epoch: "0b8ff9b7-4a4d-4a8e-9c53-4d7f7e0c52c5", Seq: 1}, func(l *replica.Loader) error {
		a := *pizza
		a.ID, a.UUID, a.Status = 1, "00000000-0000-4000-8000-000000000001", catalog.APIPublished
		l.Entity(&a)
		return nil
	})
}

func (oneAPI) Events(context.Context, revocation.Position) (replica.Page, error) {
	return replica.Page{}, io.EOF
}
