package authn

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func (m *memory) answerOrBearer(r *http.Request) (w *httptest.ResponseRecorder, client Client, bearer string) {
	w = httptest.NewRecorder()
	client, bearer, _, err := m.FormOrBearer(w, r, "token")
	if err != nil {
		WriteError(w, err)
	}
	return w, client, bearer
}

func TestFormOrBearer(t *testing.T) {
	t.Parallel()
	const b64token = "az09AZ-._~+/=="
	tests := []struct {
		name           string
		r              *http.Request
		status         int
		client, bearer string
	}{
		{"bearer", postForm("token=t", "Authorization", "Bearer "+b64token), 200, "", b64token},
		{"scheme in lower case", postForm("token=t", "Authorization", "bearer a.b.c"), 200, "", "a.b.c"},
		{"two spaces behind the scheme", postForm("", "Authorization", "BEARER  x"), 200, "", "x"},
		{"no token", postForm("", "Authorization", "Bearer"), 200, "", "*"},
		{"an empty token", postForm("", "Authorization", "Bearer "), 200, "", "*"},
		{"two tokens", postForm("", "Authorization", "Bearer a b"), 200, "", "*"},
		{"padding alone", postForm("", "Authorization", "Bearer =="), 200, "", "*"},
		{"padding inside", postForm("", "Authorization", "Bearer a=b"), 200, "", "*"},
		{"not ASCII", postForm("", "Authorization", "Bearer ä"), 200, "", "*"},
		{"with an empty id", postForm("client_id=", "Authorization", "Bearer x"), 200, "", "x"},

		{"with a client_id", postForm("client_id=app-2", "Authorization", "Bearer x"), 400, "", ""},
		{"without a token, with a client_id", postForm("client_id=app-2", "Authorization", "Bearer"), 400, "", ""},
		{"with a secret", postForm("client_id=app-2&client_secret=Secret-2", "Authorization", "Bearer x"), 400, "", ""},
		{"with an assertion", postForm("client_assertion=x", "Authorization", "Bearer x"), 400, "", ""},
		{"with a type of assertions", postForm("client_assertion_type=x", "Authorization", "Bearer x"), 400, "", ""},
		{"two headers", postForm("", "Authorization", "Bearer x", "Authorization", basicTwo), 400, "", ""},
		{"two tokens in headers", postForm("", "Authorization", "Bearer x", "Authorization", "Bearer x"), 400, "", ""},
		{"with credentials in the URI", at("/x?client_id=a", postForm("", "Authorization", "Bearer x")), 400, "", ""},
		{"repeated parameter", postForm("token=a&token=b", "Authorization", "Bearer x"), 400, "", ""},
		{"GET", httptest.NewRequest(http.MethodGet, "/x", nil), 405, "", ""},

		{"basic", postForm("token=t", "Authorization", basicTwo), 200, "app-2", ""},
		{"body", postForm("client_id=app-2&client_secret=Secret-2"), 200, "app-2", ""},
		{"public", postForm("client_id=spa-1"), 200, "spa-1", ""},
		{"C065: nothing", postForm("token=t"), 401, "", ""},
		{"wrong", postForm("", "Authorization", basicWrong), 401, "", ""},
		{"another scheme", postForm("", "Authorization", "Bearers x"), 401, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w, client, bearer := newMemory(t, Config{}).answerOrBearer(tt.r)
			if w.Code != tt.status || client.ID != tt.client || bearer != tt.bearer {
				t.Fatalf("status %d, client %q, bearer %q, want %d, %q, %q", w.Code, client.ID, bearer, tt.status, tt.client, tt.bearer)
			}
			if got := w.Header().Get("Cache-Control"); got != "no-store" {
				t.Errorf("Cache-Control %q", got)
			}
			if tt.status != 200 {
				checkError(t, w, "")
			}
		})
	}
}

// Bearer tokens that were refused count for their address, and wait when it has used up its
// failures.
func TestThrottleOfBearers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{AddressFailures: 3, TrustedProxies: prefixes("192.0.2.0/24")})
		send := func(from, authorization string) int {
			r := postForm("", "Authorization", authorization, "X-Forwarded-For", from)
			w, _, bearer := m.answerOrBearer(r)
			if w.Code == 200 && bearer == "bad" {
				m.BearerFailed(r)
			}
			if w.Code != 200 {
				checkError(t, w, "")
			}
			return w.Code
		}
		check := func(what, from, authorization string, want int) {
			t.Helper()
			if got := send(from, authorization); got != want {
				t.Errorf("%s: status %d, want %d", what, got, want)
			}
		}
		const thief, elsewhere = "198.51.100.7", "198.51.100.8"
		check("who has proved itself there", thief, basicOne, 200)
		for range 10 {
			check("a good one", thief, "Bearer good", 200)
		}
		check("a guess at a secret", thief, basicWrong, 401)
		check("a bad one", thief, "Bearer bad", 200)
		check("another", thief, "Bearer bad", 200)
		check("one too many", thief, "Bearer bad", 429)
		check("a good one then", thief, "Bearer good", 429)
		check("a client of its own", thief, basicTwo, 429)
		check("who has proved itself there, then", thief, basicOne, 200)
		check("a good one from elsewhere", elsewhere, "Bearer good", 200)
		time.Sleep(time.Second)
		check("a second later", thief, "Bearer bad", 200)
		check("another a second later", thief, "Bearer good", 429)
	})
}

func TestClientByID(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{})
		check := func(id string, want bool) {
			t.Helper()
			if c, ok, err := m.Client(t.Context(), id); err != nil || ok != want || ok && c.ID != id {
				t.Errorf("%q: %q, %t, %v, want %t", id, c.ID, ok, err, want)
			}
		}
		for id, want := range map[string]bool{
			"app one": true, "spa-1": true, "new": false, "": false, "app-2\x00": false, "\xff": false, strings.Repeat("a", 256): false,
		} {
			check(id, want)
		}
		time.Sleep(recheckAge + 1)
		m.add("new", methodBasic, "x")
		check("new", true)
		m.down.Store(true)
		if _, _, err := m.Client(t.Context(), "app-2"); err == nil {
			t.Error("who is not in memory was found without the database")
		}
	})
}
