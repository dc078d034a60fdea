package explain

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/revoke"
)

// accounts lets people in by their name alone.
type accounts map[string]authn.Account

var people = accounts{
	"admin":        {Tenant: revocation.SuperTenant, Role: rest.Admin},
	"acme-admin":   {Tenant: acme, Role: rest.TenantAdmin},
	"wide-admin":   {Tenant: acme, Role: rest.TenantAdmin, ExtraTenants: []string{"*"}},
	"acme-auditor": {Tenant: acme, Role: rest.Auditor},
	"two-auditor":  {Tenant: acme, Role: rest.Auditor, ExtraTenants: []string{"carbon.super"}},
	"wide-auditor": {Tenant: acme, Role: rest.Auditor, ExtraTenants: []string{"*"}},
	"gateway":      {Tenant: revocation.SuperTenant, Role: rest.Gateway, ExtraTenants: []string{"*"}},
	"notifier":     {Tenant: revocation.SuperTenant, Role: rest.Notifier},
}

func (a accounts) Account(r *http.Request) (authn.Account, error) {
	name, _, _ := r.BasicAuth()
	account, ok := a[name]
	account.Username = name
	if !ok {
		return authn.Account{}, &authn.OAuthError{Status: http.StatusUnauthorized, Description: "The user name or the password is wrong."}
	}
	return account, nil
}

// serve returns a function that posts as who, with pairs of names and values as its header.
func (w *world) serve() func(who, target, body string, header ...string) (*http.Response, string) {
	router := chi.NewRouter()
	NewEndpoint(w.Explainer, people).Routes(router)
	return func(who, target, body string, header ...string) (*http.Response, string) {
		r := httptest.NewRequestWithContext(w.t.Context(), http.MethodPost, target, strings.NewReader(body))
		r.SetBasicAuth(who, "")
		r.Header.Set("Content-Type", "application/json")
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		rec := httptest.NewRecorder()
		router.ServeHTTP(rec, r)
		res := rec.Result()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			w.t.Fatal(err)
		}
		if got := res.Header.Get("Cache-Control"); got != "no-store" {
			w.t.Errorf("%d %s: Cache-Control %q", res.StatusCode, b, got)
		}
		return res, string(b)
	}
}

func TestHTTP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.revoke(revoke.Order{JTI: "dead"})
	post := w.serve()
	dead := access(iss, claims{"jti": "dead"})
	body := `{"token":"` + dead + `"}`
	const told, untold = `"revocation":`, `"verdict":"refused"`
	for _, tt := range []struct {
		who, target, body string
		header            []string
		status            int
		has, lacks        string
	}{
		{who: "admin", body: body, status: 200, has: told},
		{who: "wide-auditor", body: body, status: 200, has: told},
		{who: "two-auditor", body: body, status: 200, has: told},
		{who: "acme-auditor", body: body, status: 200, has: untold, lacks: told},
		{who: "acme-admin", body: body, status: 200, has: untold, lacks: told},
		{who: "wide-admin", body: body, status: 200, has: untold, lacks: told},
		{who: "gateway", body: body, status: 403},
		{who: "notifier", body: body, status: 403},
		{who: "nobody", body: body, status: 401},
		{who: "admin", target: "?token=" + dead, body: body, status: 400},
		{who: "admin", body: `{"token":"` + dead + `","claims":{}}`, status: 400, has: "#/claims"},
		{who: "admin", body: `{"token":"` + dead + `","x":1}`, status: 400, has: "#/x"},
		{who: "admin", body: `{"token":["` + dead + `"]}`, status: 400, has: "#/token"},
		{who: "admin", body: `{"token":"` + dead + `","at":"` + dead + `"}`, status: 400, has: "#/at"},
		{who: "admin", body: `{"claims":{"iss":"i","iat":1,"iat":1,"exp":2}}`, status: 400, has: "#/claims/iat"},
		{who: "admin", body: `{"token":"` + dead + strings.Repeat("x", maxBody) + `"}`, status: 413},
		{who: "admin", body: body, header: []string{"Content-Type", "text/plain"}, status: 415},
		{who: "admin", body: body, header: []string{"Accept", "text/plain"}, status: 200, has: "REFUSED  900901"},
	} {
		res, got := post(tt.who, path+tt.target, tt.body, tt.header...)
		if res.StatusCode != tt.status || !strings.Contains(got, tt.has) || tt.lacks != "" && strings.Contains(got, tt.lacks) {
			t.Errorf("as %s with %v: %d %s", tt.who, tt.header, res.StatusCode, got)
		}
		silent(t, dead, got)
	}
}

func TestAccept(t *testing.T) {
	t.Parallel()
	for accept, want := range map[string]bool{
		"": false, "*/*": false, "application/json": false, "text/*": false, "text/plain": true, "text/plain;charset=utf-8, */*": true,
		"text/plain, application/json": false, "text/plain, application/json;q=0.5": true, "text/plain;q=0.5, application/json;q=0.6": false,
		"text/plain;q=0": false, "text/plain;q=x": false, ";": false,
	} {
		r := &http.Request{Header: http.Header{"Accept": {accept}}}
		if got := wantsText(r); got != want {
			t.Errorf("%q: %t, want %t", accept, got, want)
		}
	}
}

// TestFewAtATime: who finds all places taken is sent away, and not kept waiting.
func TestFewAtATime(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	post := w.serve()
	w.gate.entered, w.gate.open = make(chan struct{}), make(chan struct{})
	var inside sync.WaitGroup
	for range maxAnswers {
		inside.Go(func() {
			if res, got := post("admin", path, `{"token":"opaque"}`); res.StatusCode != http.StatusOK {
				t.Errorf("one that has a place: %d %s", res.StatusCode, got)
			}
		})
		<-w.gate.entered
	}
	for _, who := range []string{"admin", "acme-admin"} {
		if res, got := post(who, path, `{"token":"opaque"}`); res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Retry-After") != "2" {
			t.Errorf("one more, %s: %d %v %s", who, res.StatusCode, res.Header, got)
		}
	}
	close(w.gate.open)
	inside.Wait()
	w.gate.entered = nil
	if res, got := post("admin", path, `{"token":"opaque"}`); res.StatusCode != http.StatusOK {
		t.Errorf("once there is a place again: %d %s", res.StatusCode, got)
	}
}

// TestPlaces: tenants do not keep each other, nor the operators, from asking.
func TestPlaces(t *testing.T) {
	t.Parallel()
	p := places{tenants: make(map[string]struct{})}
	take := func(tenant string, want bool) {
		t.Helper()
		if got := p.take(tenant); got != want {
			t.Errorf("a place for %q: %t, want %t", tenant, got, want)
		}
	}
	take("a", true)
	take("a", false) // it has one
	take("b", true)
	take("c", false) // the others are not for tenants
	take("", true)
	take("", true)
	take("", false)
	p.leave("a")
	take("c", true)
	p.leave("")
	take("a", false)
	take("", true)
	for _, tenant := range []string{"b", "c", "", ""} {
		p.leave(tenant)
	}
	for range maxAnswers {
		take("", true)
	}
	take("a", false)
}
