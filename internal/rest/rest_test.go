package rest

import (
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

// exchange is what the server's ResponseWriter does for handlers.
type exchange struct {
	*httptest.ResponseRecorder
	id     string
	client string
	err    error
}

func newExchange() *exchange {
	return &exchange{ResponseRecorder: httptest.NewRecorder(), id: "6F9619FF-8b86-d011-b42d-00c04fc964ff"}
}

func (x *exchange) RequestID() string { return x.id }
func (x *exchange) Traceparent() string {
	return "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
}
func (x *exchange) RemoteAddr() string     { return "192.0.2.1" }
func (x *exchange) RecordClient(id string) { x.client = id }
func (x *exchange) RecordError(err error)  { x.err = err }

type wrapper struct{ http.ResponseWriter }

func (w wrapper) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// wrapped is x as handlers behind other middleware see it.
func wrapped(x *exchange) http.ResponseWriter { return wrapper{wrapper{x}} }

func request(t testing.TB, method, target, body string, header ...string) *http.Request {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, target, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	return r
}

// accounts lets people in by their name alone.
type accounts map[string]authn.Account

var testAccounts = accounts{
	"root": {Username: "root", Tenant: revocation.SuperTenant, Role: Admin},
	"gw":   {Username: "gw", Tenant: revocation.SuperTenant, Role: Gateway},
}

func (a accounts) Account(r *http.Request) (authn.Account, error) {
	name, _, _ := r.BasicAuth()
	account, ok := a[name]
	if !ok {
		return authn.Account{}, &authn.OAuthError{Status: 401, Code: authn.InvalidClient, Description: "The user name or the password is wrong."}
	}
	return account, nil
}

func TestRequire(t *testing.T) {
	t.Parallel()
	var seen authn.Account
	h := Require(testAccounts, nil, Admin, Auditor)(Handler(func(w http.ResponseWriter, r *http.Request) error {
		seen = AccountOf(r.Context())
		actor, x := ActorOf(w, r), ExchangeOf(w)
		if actor.Name != "account:root" || actor.RequestID != x.RequestID() || actor.Remote != "192.0.2.1" || x.Traceparent() == "" {
			t.Errorf("actor %+v", actor)
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	}))
	for _, tt := range []struct {
		user      string
		status    int
		challenge string
		client    string
	}{
		{"root", 204, "", "root"},
		{"gw", 403, "", "gw"},
		{"nobody", 401, `Basic realm="rescind", charset="UTF-8"`, ""},
	} {
		seen = authn.Account{}
		x, r := newExchange(), request(t, "GET", "/v1/x", "")
		r.SetBasicAuth(tt.user, "")
		h.ServeHTTP(wrapped(x), r)
		if x.Code != tt.status || x.Header().Get("WWW-Authenticate") != tt.challenge || x.client != tt.client {
			t.Errorf("%s: status %d, challenge %q, client %q", tt.user, x.Code, x.Header().Get("WWW-Authenticate"), x.client)
		}
		if (seen.Username != "") != (tt.status == 204) || (x.err != nil) != (tt.status != 204) {
			t.Errorf("%s: handler saw %q, log has %v", tt.user, seen.Username, x.err)
		}
	}

	x := newExchange()
	own := func(w http.ResponseWriter, _ *http.Request, err error) { w.WriteHeader(http.StatusTeapot) }
	Require(testAccounts, own, Admin)(h).ServeHTTP(x, request(t, "GET", "/v1/x", ""))
	if x.Code != http.StatusTeapot || x.Header().Get("WWW-Authenticate") == "" {
		t.Errorf("status %d, header %v, want the caller's own refusal, with a challenge", x.Code, x.Header())
	}
}

func TestExchangeOfNobody(t *testing.T) {
	t.Parallel()
	if x := ExchangeOf(wrapper{httptest.NewRecorder()}); x.RequestID()+x.Traceparent()+x.RemoteAddr() != "" {
		t.Errorf("%+v", x)
	}
}
