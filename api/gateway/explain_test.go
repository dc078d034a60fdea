package gateway

import (
	"bytes"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// flaws is what is wrong with an explanation of a decision, whatever it is about.
func flaws(d Decision, e replica.Explanation, compact string) string {
	a, failed := e.Authorization, ""
	if a.Authorized != d.Allowed || a.Code != d.Code || a.Reason != d.Reason || a.Outcome != d.Outcome || d.Status != 0 && e.HTTPStatus != d.Status {
		return "it says something else than Decide"
	}
	if len(e.Checks) != len(CheckNames) {
		return "checks are missing"
	}
	for i, c := range e.Checks {
		switch {
		case c.Name != CheckNames[i]:
			return "checks are not in their order"
		case c.Result == replica.Failed && failed != "":
			return "two checks failed"
		case c.Result == replica.Failed && c.Facts["reason"] != d.Reason:
			return c.Name + " failed for another reason"
		case (c.Result == replica.NotReached) != (failed != ""):
			if c.Result != replica.Failed {
				return c.Name + " is " + string(c.Result)
			}
		case (c.Result == replica.NotReached) != (c.Detail == ""):
			return c.Name + " has the detail " + c.Detail
		case strings.Contains(c.Detail, "%!"):
			return c.Detail
		}
		if c.Result == replica.Failed {
			failed = c.Name
		}
	}
	text, err := json.Marshal(e.Checks)
	switch {
	case err != nil:
		return err.Error()
	case (failed == "") != d.Allowed, (e.Next == "") != d.Allowed:
		return "allowed, and " + failed + " failed, or the other way round"
	case bytes.Contains(text, []byte("null")):
		return "null in " + string(text)
	}
	for _, part := range strings.Split(compact, ".") {
		if len(part) > 20 && bytes.Contains(text, []byte(part)) {
			return "it repeats the token"
		}
	}
	return ""
}

func failedOf(checks []replica.Check) string {
	for _, c := range checks {
		if c.Result == replica.Failed {
			return c.Name
		}
	}
	return ""
}

// tokensOf are what may be wrong with a token, and the check that says so.
func tokensOf() map[string]struct{ compact, failed string } {
	now := time.Now().Unix()
	return map[string]struct{ compact, failed string }{
		"good":             {t1(), ""},
		"opaque":           {"2YotnFZFEjr1zCsicMWpAA", "form"},
		"cut short":        {t1()[:100], "form"},
		"stranger":         {mint(ecKey, nil, with{"iss": "https://nobody.example.com"}), "issuer_trusted"},
		"algorithm":        {mint(ecKey, with{"kid": "rsa-1"}, nil), "algorithm"},
		"unknown key":      {mint(ecKey, with{"kid": "ec-9"}, nil), "keys"},
		"forged":           {mint(otherKey, nil, nil), "signature"},
		"claims":           {mint(ecKey, nil, with{"sub": 7}), "claim_types"},
		"type":             {mint(ecKey, with{"typ": "JWT"}, nil), "type"},
		"no expiry":        {mint(ecKey, nil, with{"exp": nil}), "expiry"},
		"expired":          {mint(ecKey, nil, with{"iat": now - 700, "exp": now - 100}), "expiry"},
		"nbf ahead":        {mint(ecKey, nil, with{"nbf": now + 100}), "not_before"},
		"nbf ahead, iat":   {mint(ecKey, nil, with{"nbf": now + 100, "iat": now + 100}), "not_before"},
		"nbf ahead, no it": {mint(ecKey, nil, with{"nbf": now + 100, "iat": nil}), "not_before"},
		"iat ahead":        {mint(ecKey, nil, with{"iat": now + 100}), "issue_time"},
		"no iat":           {mint(ecKey, nil, with{"iat": nil}), "issue_time"},
		"lifetime":         {mint(ecKey, nil, with{"exp": now + 7200}), "lifetime"},
		"audience":         {mint(ecKey, nil, with{"aud": "https://other.example.com"}), "audience"},
		"no audience":      {mint(ecKey, nil, with{"aud": nil}), "audience"},
		"no mapping":       {mint(ecKey, nil, with{"client_id": "nobody"}), "key_mapping"},
		"not one":          {"", "form"},
	}
}

// Explain says what Decide says, of every kind of token and request, and names the check.
func TestExplain(t *testing.T) {
	t.Parallel()
	s := newService()
	w := start(t, s, replica.Config{}, Config{})
	reached := make(map[string]bool)
	ask := func(name string, w *world, r Request, compact string) replica.Explanation {
		t.Helper()
		d, e := w.Decide(t.Context(), r), w.Explain(t.Context(), r)
		if wrong := flaws(d, e, compact); wrong != "" {
			t.Errorf("%s, %s %s: %s\nDecide: %+v\nExplain: %+v", name, r.Method, r.Target, wrong, d, e)
		}
		reached[failedOf(e.Checks)] = true
		return e
	}
	for name, tt := range tokensOf() {
		field := []string{"Bearer " + tt.compact}
		for _, r := range []Request{
			{"GET", "/shop/1.0.0/orders", field}, {"POST", "/shop/1.0.0/orders", field}, {"GET", "/shop/1.0.0/menu", field},
			{"GET", "/nowhere", field}, {"GET", "/shop/1.0.0/none", field}, {"CONNECT", "/shop/1.0.0/orders", field}, {"GET", "/a/../b", field},
			{"GET", "/shop/1.0.0/orders", append(field, field...)}, {"GET", "/shop/1.0.0/orders", nil}, {"GET", "/shop/1.0.0/menu", nil},
		} {
			e := ask(name, w, r, tt.compact)
			if r.Target == "/shop/1.0.0/orders" && r.Method == "GET" && len(r.Authorization) == 1 {
				if got := failedOf(e.Checks); got != tt.failed {
					t.Errorf("%s: %q failed (%s), want %q", name, got, e.Authorization.Reason, tt.failed)
				}
			}
		}
	}

	s.revoke(t, revocation.KindToken, iss, "at-1", 0)
	e := ask("revoked", w, Request{"GET", "/shop/1.0.0/orders", []string{"Bearer " + t1()}}, t1())
	if c := e.Checks[slices.Index(CheckNames, "revocation")]; c.Result != replica.Failed || c.Facts["identifier"] != "at-1" || c.Facts["kind"] != "token" {
		t.Errorf("a revoked token: %+v", c)
	}

	// Where nothing is known, closed and open.
	for _, empty := range []replica.OnStale{replica.Deny, replica.Serve} {
		down := newService()
		down.down = true
		w := start(t, down, replica.Config{Empty: empty}, Config{})
		for name, tt := range tokensOf() {
			ask("nothing known, "+name, w, Request{"GET", "/shop/1.0.0/orders", []string{"Bearer " + tt.compact}}, tt.compact)
		}
		ask("nothing known, no token", w, Request{"GET", "/shop/1.0.0/orders", nil}, "")
	}
	for _, name := range []string{"path", "api", "operation", "credentials", "freshness", "scope"} {
		if !reached[name] {
			t.Errorf("nothing failed at %q", name)
		}
	}
}

// A question without a method is about an API as a whole; one with claims believes them.
func TestExplainOtherQuestions(t *testing.T) {
	t.Parallel()
	w := start(t, newService(), replica.Config{}, Config{})
	e := w.Explain(t.Context(), Request{Target: "/shop/1.0.0", Authorization: []string{"Bearer " + t1()}})
	if !e.Authorization.Authorized || e.Checks[slices.Index(CheckNames, "operation")].Result != replica.NotLooked {
		t.Errorf("an API as a whole: %+v", e)
	}
	for _, tt := range []struct {
		name   string
		claims string
		failed string
	}{
		{"good", claimsOf(nil), ""},
		{"no claims", "", "form"},
		{"no object", "[]", "form"},
		{"stranger", claimsOf(with{"iss": "https://nobody.example.com"}), "issuer_trusted"},
		{"stranger with more that is wrong", claimsOf(with{"iss": "https://nobody.example.com", "sub": 7}), "issuer_trusted"},
		{"claims", claimsOf(with{"sub": 7}), "claim_types"},
		{"ID token", claimsOf(with{"exp": time.Now().Unix() - 400}), "expiry"},
		{"audience", claimsOf(with{"aud": "x"}), "audience"},
		{"no mapping", claimsOf(with{"client_id": "nobody"}), "key_mapping"},
	} {
		e := w.ExplainClaims(t.Context(), json.RawMessage(tt.claims), Request{Method: "GET", Target: "/shop/1.0.0/orders"})
		if got := failedOf(e.Checks); got != tt.failed || e.Authorization.Authorized != (got == "") {
			t.Errorf("%s: %q failed, want %q: %+v", tt.name, got, tt.failed, e.Checks)
		}
		if c := e.Checks[slices.Index(CheckNames, "signature")]; c.Result == replica.Passed || c.Result == replica.Failed {
			t.Errorf("%s: the signature of claims is %s", tt.name, c.Result)
		}
	}
	if e := w.ExplainClaims(t.Context(), nil, Request{Method: "GET", Target: "/shop/1.0.0/orders"}); failedOf(e.Checks) != "form" {
		t.Errorf("no claims: %+v", e)
	}
}

// No issuer is asked, and it is told whether one would be.
func TestExplainIntrospection(t *testing.T) {
	t.Parallel()
	s := newService()
	s.silent = true
	stale := replica.Config{Staleness: replica.Staleness{Then: replica.Introspect}}
	request := Request{"GET", "/shop/1.0.0/orders", []string{"Bearer " + t1()}}
	for _, tt := range []struct {
		name   string
		asking *Introspection
		result replica.CheckResult
	}{
		{"somebody", &Introspection{URL: "http://127.0.0.1:1/none", ClientID: "a", ClientSecret: "b"}, replica.NotLooked},
		{"nobody", nil, replica.Failed},
		{"nobody for this issuer", &Introspection{URL: "http://127.0.0.1:1/none", ClientID: "a", ClientSecret: "b", Issuers: []string{otherIss}}, replica.Failed},
	} {
		w := start(t, s, stale, Config{Introspection: tt.asking})
		e := w.Explain(t.Context(), request)
		if c := e.Checks[len(e.Checks)-1]; c.Result != tt.result || e.Authorization.Authorized != (tt.result != replica.Failed) {
			t.Errorf("%s: %+v, %+v", tt.name, c, e.Authorization)
		}
		if tt.result == replica.Failed {
			if wrong := flaws(w.Decide(t.Context(), request), e, ""); wrong != "" {
				t.Errorf("%s: %s", tt.name, wrong)
			}
		}
		w.stop()
	}
}

// ExplainToken names the same checks with a verifier alone.
func TestExplainToken(t *testing.T) {
	t.Parallel()
	issuers := configured()
	for i := range issuers {
		issuers[i].MaxLifetime = time.Hour
	}
	v := must(token.NewVerifier(issuers...))
	a := token.Acceptance{Leeway: 30 * time.Second, Audiences: []string{audience}}
	for name, tt := range tokensOf() {
		got, checks := ExplainToken(t.Context(), v, tt.compact, a, time.Now())
		_, err := v.Accept(t.Context(), tt.compact, a, time.Now())
		want := tt.failed
		if want == "key_mapping" {
			want = ""
		}
		if failed := failedOf(checks); failed != want || (got == nil) != (err != nil) || (err != nil) != (failed != "") {
			t.Errorf("%s: %q failed, want %q; Accept: %v", name, failed, want, err)
		}
		for i, c := range checks {
			if c.Name != TokenCheckNames[i] || c.Result == replica.Failed && c.Facts["reason"] != token.Reason(err) {
				t.Errorf("%s: %+v, and Accept says %v", name, c, err)
			}
		}
	}
	_, checks := ExplainToken(t.Context(), must(token.NewVerifier(token.Issuer{Iss: iss, Keys: noKeys{}})), t1(), a, time.Now())
	if failedOf(checks) != "keys" || checks[slices.Index(TokenCheckNames, "keys")].Facts["reason"] != "keys_unavailable" {
		t.Errorf("no keys: %+v", checks)
	}
	got, checks := ExplainToken(t.Context(), v, t1(), token.Acceptance{}, time.Now())
	if got == nil || checks[len(checks)-1].Result != replica.NotLooked {
		t.Errorf("without audiences: %+v", checks)
	}
	now := time.Unix(2_000_000_000, 0)
	_, checks = ExplainToken(t.Context(), v, mint(ecKey, nil, with{"iat": now.Unix() - 700, "exp": now.Unix() - 100}), a, now)
	want := replica.Check{
		Name: "expiry", Result: replica.Failed, Detail: "The token has expired at 2033-05-18T03:31:40Z, 1m40s ago; the leeway is 30s.",
		Facts: map[string]any{"reason": "expired", "exp": now.Unix() - 100, "leeway_seconds": int64(30), "expired_seconds": int64(100)},
	}
	if diff := cmp.Diff(want, checks[slices.Index(TokenCheckNames, "expiry")]); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestExplainDocumented(t *testing.T) {
	t.Parallel()
	rest := string(must(os.ReadFile("../explain.md")))
	for _, name := range CheckNames {
		_, after, ok := strings.Cut(rest, "| `"+name+"` |")
		if !ok {
			t.Fatalf("api/explain.md has no row for %q after those before it", name)
		}
		rest = after
	}
	for _, reason := range Reasons {
		if !strings.HasSuffix(Next(reason), ".") {
			t.Errorf("what to do for %q is %q", reason, Next(reason))
		}
	}
	for _, reason := range slices.Concat(token.Reasons, token.RefusedReasons) {
		i := 0
		for _, c := range tokenChecks {
			if slices.Contains(c.reasons, reason) {
				i++
			}
		}
		if i == 0 {
			t.Errorf("no check fails for %q", reason)
		}
	}
}
