package app_test

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
)

// The clients that get tokens are of our own issuer; those of the revocation cases are of one
// whose private keys the tests have.
var ownClients = []authn.Registration{
	{
		ID: "own one", Secret: "s3cr:t+/=%", Scopes: []string{"read", "write", "introspect"}, DefaultScopes: []string{"read", "write"},
		Audience: []string{"https://api.example.com"},
	},
	{ID: "own-spa", AuthMethod: "none"},
	{ID: "asker", Secret: "Secret-5", Scopes: []string{"read", "introspect"}, Audience: []string{ourISS}, ResourceAudiences: []string{"https://api.example.com"}},
	{ID: "other-rs", Secret: "Secret-6", ResourceAudiences: []string{"https://other.example.com"}},
}

// jwtClient proves itself with the ES256 key of the tests.
func jwtClient(t *testing.T) authn.Registration {
	t.Helper()
	jwks, err := json.Marshal(map[string]any{"keys": idp().public.Keys[1:]})
	if err != nil {
		t.Fatal(err)
	}
	return authn.Registration{ID: "jwt-1", AuthMethod: "private_key_jwt", JWKS: string(jwks), Scopes: []string{"read"}, DefaultScopes: []string{"read"}}
}

func assertion(changes ...map[string]any) string {
	now := time.Now().Unix()
	c := map[string]any{"iss": "jwt-1", "sub": "jwt-1", "aud": ourISS, "jti": rand.Text(), "iat": now, "exp": now + 60}
	for _, change := range changes {
		for name, value := range change {
			c[name] = value
		}
	}
	return mint("ES256", map[string]any{"typ": "JWT"}, c)
}

// call is a request and what must come of it, for endpoints that answer with more than a
// status. What of it is empty is not looked at.
type call struct {
	method string // POST unless set
	target string
	header []string
	body   string

	status  int
	want    []string // response headers; with nothing after the colon, there is none
	code    string   // the error of an OAuth error object
	problem string   // the end of the problem's type
	exactly string   // the whole body
	check   func(t *testing.T, res *http.Response, body string)
	// checkAsked gets the bodies of request and response.
	checkAsked func(t *testing.T, asked, answered string)
}

type callCase struct {
	id    string
	calls []call
}

func (c call) run(t *testing.T, base string, words words) (*http.Response, string) {
	t.Helper()
	step := conformanceStep{method: c.method, target: c.target, header: c.header, body: c.body}
	res, body := step.send(t, base, words)
	if res.StatusCode != c.status {
		t.Fatalf("%s %s: status %d, want %d: %s", res.Request.Method, res.Request.URL.Path, res.StatusCode, c.status, body)
	}
	for _, line := range c.want {
		name, value, _ := strings.Cut(line, ":")
		if got := res.Header.Get(name); got != strings.TrimPrefix(value, " ") {
			t.Errorf("%s: %q, want %q", name, got, value)
		}
	}
	var object map[string]any
	if c.code != "" || c.problem != "" {
		if err := json.Unmarshal([]byte(body), &object); err != nil {
			t.Fatalf("no JSON object: %s", body)
		}
	}
	if c.code != "" {
		for name := range object {
			if name != "error" && name != "error_description" {
				t.Errorf("the error object has %s", name)
			}
		}
		if object["error"] != c.code || !strings.HasPrefix(res.Header.Get("Content-Type"), "application/json") {
			t.Errorf("%s: %s, want error %s", res.Header.Get("Content-Type"), body, c.code)
		}
	}
	if c.problem != "" {
		if kind, _ := object["type"].(string); res.Header.Get("Content-Type") != "application/problem+json" || object["status"] != float64(c.status) ||
			kind != c.problem && !strings.HasSuffix(kind, "/"+c.problem) {
			t.Errorf("%s: %s, want problem %s", res.Header.Get("Content-Type"), body, c.problem)
		}
	}
	if c.exactly != "" && body != c.exactly {
		t.Errorf("body %s, want %s", body, c.exactly)
	}
	if c.check != nil {
		c.check(t, res, body)
	}
	if c.checkAsked != nil {
		c.checkAsked(t, words.fill(c.body), body)
	}
	return res, body
}

const (
	noStore   = "Cache-Control: no-store"
	challenge = `WWW-Authenticate: Basic realm="oauth2", charset="UTF-8"`
	inactive  = `{"active":false}`
)

// members fails unless the object has the members of want with these values; nil is any value.
// None of lacks may be there.
func members(want map[string]any, lacks ...string) func(*testing.T, *http.Response, string) {
	return func(t *testing.T, _ *http.Response, body string) {
		t.Helper()
		var got map[string]any
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatalf("no JSON object: %s", body)
		}
		for name, value := range want {
			if is, ok := got[name]; !ok || value != nil && !cmp.Equal(is, value) {
				t.Errorf("%s is %v, want %v: %s", name, is, value, body)
			}
		}
		for _, name := range lacks {
			if _, ok := got[name]; ok {
				t.Errorf("there is %s: %s", name, body)
			}
		}
	}
}

// tokenClaims returns header and claims of the access token in a token response.
func tokenClaims(t *testing.T, body string) (header, claims map[string]any) {
	t.Helper()
	var response struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal([]byte(body), &response); err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(response.AccessToken, ".")
	if len(parts) != 3 {
		t.Fatalf("no JWT: %s", body)
	}
	for i, to := range []*map[string]any{&header, &claims} {
		b, err := b64.DecodeString(parts[i])
		if err == nil {
			err = json.Unmarshal(b, to)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

func tokenCases() []callCase {
	one := []string{basicHeader("own one", "s3cr:t+/=%")}
	const target = "/oauth2/token"
	bad := func(code, body string) []call {
		return []call{{target: target, header: one, body: body, status: 400, code: code, want: []string{noStore, "Pragma: no-cache", "WWW-Authenticate:"}}}
	}
	asserted := func(assertion, kind string) string {
		return "grant_type=client_credentials&client_assertion_type=" + url.QueryEscape(kind) + "&client_assertion=" + assertion
	}
	const bearer = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	ok := call{target: target, header: one, status: 200, want: []string{noStore, "Pragma: no-cache", "Content-Type: application/json"}}
	refused := call{target: target, status: 401, code: "invalid_client", want: []string{noStore, challenge}}
	with := func(c call, body string, check func(*testing.T, *http.Response, string)) call {
		c.body, c.check = body, check
		return c
	}
	anonymous := func(c call) call { c.header = nil; return c }
	a1 := assertion()
	return []callCase{
		{"C048", []call{with(ok, "grant_type=client_credentials&scope=read", func(t *testing.T, res *http.Response, body string) {
			members(map[string]any{"access_token": nil, "token_type": "Bearer", "expires_in": 900.0, "scope": "read"}, "refresh_token")(t, res, body)
			header, claims := tokenClaims(t, body)
			jti, _ := claims["jti"].(string)
			if header["typ"] != "at+jwt" || header["alg"] != "RS256" || header["kid"] == "" || len(jti) != 36 || jti[14] != '4' {
				t.Errorf("header %v, jti %q", header, jti)
			}
			want := map[string]any{
				"iss": ourISS, "sub": "own one", "client_id": "own one", "azp": "own one", "entity_id": "own one", "aut": "APPLICATION",
				"aud": "https://api.example.com", "scope": "read", "jti": jti, "iat": claims["iat"], "exp": claims["iat"].(float64) + 900,
			}
			if diff := cmp.Diff(want, claims); diff != "" {
				t.Errorf("claims (-want +got):\n%s", diff)
			}
		})}},
		{"C049", []call{with(ok, "grant_type=client_credentials", members(map[string]any{"scope": "read write"}))}},
		{"C050", bad("invalid_scope", "grant_type=client_credentials&scope=admin")},
		{"C051", bad("unsupported_grant_type", "grant_type=password&username=a&password=b")},
		{"C052", bad("invalid_request", "scope=read")},
		{"C053", []call{{target: target, body: "grant_type=client_credentials&client_id=own-spa", status: 400, code: "unauthorized_client", want: []string{noStore}}}},
		{"C054", bad("invalid_request", "grant_type=client_credentials&scope=read&scope=write")},
		{"C055", []call{with(anonymous(ok), asserted(assertion(), bearer), func(t *testing.T, _ *http.Response, body string) {
			if _, claims := tokenClaims(t, body); claims["client_id"] != "jwt-1" {
				t.Errorf("a token of %v", claims["client_id"])
			}
		})}},
		{"C056", []call{with(anonymous(ok), asserted(a1, bearer), nil), with(refused, asserted(a1, bearer), nil)}},
		{"C057", []call{with(refused, asserted(assertion(map[string]any{"aud": ourISS + target}), bearer), nil)}},
		{"C058", []call{with(refused, asserted(assertion(map[string]any{"aud": []string{ourISS, "https://other.example"}}), bearer), nil)}},
		{"C059", []call{with(refused, asserted(assertion(), "urn:ietf:params:oauth:client-assertion-type:saml2-bearer"), nil)}},
		{"C060", bad("invalid_target", "grant_type=client_credentials&resource=https%3A%2F%2Fnope.example")},
	}
}

func introspectionCases() []callCase {
	const target = "/oauth2/introspect"
	by := func(id, secret string) []string { return []string{basicHeader(id, secret)} }
	gateway := by("gw-1", "plainSecret_42")
	ask := func(header []string, body, exactly string) call {
		return call{target: target, header: header, body: body, status: 200, exactly: exactly,
			want: []string{noStore, "Content-Type: application/json", "WWW-Authenticate:"}}
	}
	active := func(header []string, body, client string) call {
		c := ask(header, body, "")
		c.checkAsked = func(t *testing.T, asked, answered string) {
			_, token, _ := strings.Cut(asked, "token=")
			want := part(token, 1) // with the token's values, but for azp
			delete(want, "azp")
			want["active"], want["token_type"] = true, "Bearer"
			var got map[string]any
			if err := json.Unmarshal([]byte(answered), &got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" || got["iss"] != idpISS || got["client_id"] != client || got["jti"] == nil || got["exp"] == nil {
				t.Errorf("answer (-want +got):\n%s", diff)
			}
		}
		return c
	}
	return []callCase{
		{"C061", []call{active(gateway, "token={T1}", "app one")}},
		{"C062", []call{
			{target: "/oauth2/revoke", header: []string{basicOne}, body: "token={T1}", status: 200},
			ask(gateway, "token={T1}", inactive),
		}},
		{"C063", []call{
			ask(gateway, "token=zzz", inactive), ask(gateway, "token={TX}", inactive),
			ask(gateway, "token={TF}", inactive), ask(gateway, "token={TN}", inactive),
		}},
		{"C064", []call{ask(by("other-rs", "Secret-6"), "token={T1}", inactive)}},
		{"C065", []call{
			{target: target, body: "token={T1}", status: 401, code: "invalid_client", want: []string{noStore, challenge}},
			{target: target, header: []string{"Authorization: Bearer {TX}"}, body: "token={T1}", status: 401, code: "invalid_token",
				want: []string{noStore}, check: func(t *testing.T, res *http.Response, _ string) {
					if got := res.Header.Get("WWW-Authenticate"); !strings.HasPrefix(got, "Bearer ") || !strings.Contains(got, `error="invalid_token"`) {
						t.Errorf("WWW-Authenticate: %s", got)
					}
				}},
		}},
		{"C066", []call{ask([]string{basicTwo}, "token={T1}", inactive), active([]string{basicTwo}, "token={T2}", "app-2")}},
		{"C068", []call{{method: "GET", target: target + "?token={T1}", header: gateway, status: 405, code: "invalid_request", want: []string{"Allow: POST"}}}},
		{"C069", []call{{target: target, header: gateway, status: 400, code: "invalid_request", want: []string{noStore}}}},
	}
}

const (
	metadataPath = "/.well-known/oauth-authorization-server"
	publicCache  = "Cache-Control: public, max-age=300"
)

func documentCases() []callCase {
	noEmptyArray := func(t *testing.T, iss, body string) {
		t.Helper()
		var got map[string]any
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatal(err)
		}
		for name, value := range got {
			if list, ok := value.([]any); ok && len(list) == 0 {
				t.Errorf("%s is empty", name)
			}
			if s, ok := value.(string); ok && name != "service_documentation" && !strings.HasPrefix(s, iss) {
				t.Errorf("%s is %s, not below %s", name, s, iss)
			}
		}
	}
	get := func(target string, status int, want ...string) call {
		return call{method: "GET", target: target, status: status, want: want}
	}
	metadata := func(path, iss string) call {
		c := get(path, 200, publicCache, "Content-Type: application/json")
		c.check = func(t *testing.T, res *http.Response, body string) {
			t.Helper()
			if res.Header.Get("ETag") == "" || strings.HasPrefix(res.Header.Get("ETag"), "W/") {
				t.Error("no strong ETag")
			}
			methods := []any{"client_secret_basic", "client_secret_post", "private_key_jwt"}
			members(map[string]any{
				"issuer": iss, "token_endpoint": iss + "/oauth2/token", "jwks_uri": iss + "/oauth2/jwks",
				"revocation_endpoint": iss + "/oauth2/revoke", "introspection_endpoint": iss + "/oauth2/introspect",
				"grant_types_supported": []any{"client_credentials"}, "scopes_supported": nil,
				"token_endpoint_auth_methods_supported": methods, "introspection_endpoint_auth_methods_supported": methods,
				"revocation_endpoint_auth_methods_supported":            append(slices.Clone(methods), "none"),
				"token_endpoint_auth_signing_alg_values_supported":      nil,
				"revocation_endpoint_auth_signing_alg_values_supported": nil, "introspection_endpoint_auth_signing_alg_values_supported": nil,
				"service_documentation": nil,
			}, "response_types_supported")(t, res, body)
			noEmptyArray(t, iss, body)
		}
		return c
	}
	keys := get("/oauth2/jwks", 200, publicCache, "Content-Type: application/json")
	keys.check = func(t *testing.T, res *http.Response, body string) {
		t.Helper()
		var set struct{ Keys []map[string]any }
		if err := json.Unmarshal([]byte(body), &set); err != nil || len(set.Keys) == 0 || res.Header.Get("ETag") == "" {
			t.Fatalf("%v: %s", err, body)
		}
		for _, key := range set.Keys {
			for _, name := range []string{"kid", "kty", "use", "alg"} {
				if key[name] == nil {
					t.Errorf("a key lacks %s", name)
				}
			}
			for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "k"} {
				if key[name] != nil {
					t.Errorf("a key has %s", name)
				}
			}
		}
	}
	notFound := get("/.well-known/nothing", 404)
	notFound.problem = "about:blank"
	nope := get("/v1/nope", 404)
	nope.header, nope.problem, nope.check = []string{"Accept: application/json"}, "about:blank", members(map[string]any{"title": "Not Found"})
	return []callCase{
		{"C070", []call{metadata(metadataPath, ourISS)}},
		{"C071", []call{metadata(metadataPath+"/t/t1", ourISS+"/t/t1"), get(metadataPath+"/t/t9", 404)}},
		{"C072", []call{keys}},
		{"C075", []call{notFound}},
		{"C114", []call{nope}},
	}
}

// conformKeyManager is the part of [TestConformance] about the token endpoint, introspection,
// documents and the management of revocations.
func conformKeyManager(t *testing.T, w *world, s *service) {
	for _, r := range append(ownClients, jwtClient(t)) {
		w.client(ourISS, r)
	}
	admin := w.person(s, rest.Admin)
	admin.must(201, "POST", "/v1/tenants", `{"tenant":{"domain":"t1"}}`)
	for _, c := range slices.Concat(tokenCases(), introspectionCases(), documentCases()) {
		t.Run(c.id, func(t *testing.T) {
			words := newWords(t)
			for _, call := range c.calls {
				call.run(t, s.base, words)
			}
		})
	}
	t.Run("C073", func(t *testing.T) {
		words := newWords(t)
		first, _ := call{method: "GET", target: "/oauth2/jwks", status: 200}.run(t, s.base, words)
		etag := first.Header.Get("ETag")
		call{
			method: "GET", target: "/oauth2/jwks", header: []string{`If-None-Match: W/"x", ` + etag}, status: 304,
			want: []string{"ETag: " + etag, publicCache},
		}.run(t, s.base, words)
	})

	// A snapshot is always whole (HTTP-09), so it has no limit, as C097 gives it one; and it varies
	// with Accept too, for there are two forms.
	t.Run("C097", func(t *testing.T) {
		a := admin.must(200, "GET", "/v1/snapshots/subscriptions", "")
		for name, want := range map[string]string{"Cache-Control": "private, no-cache", "Vary": "Accept-Encoding, Accept", "Accept-Ranges": "none"} {
			if got := a.header.Get(name); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
		var snapshot struct{ Epoch, Seq, Subscriptions, Items any }
		if err := json.Unmarshal([]byte(a.body), &snapshot); err != nil || snapshot.Epoch == nil || snapshot.Seq == nil || !strings.HasPrefix(a.header.Get("ETag"), `"`) {
			t.Errorf("%v: %s", err, a.body)
		}
	})
	t.Run("C098", func(t *testing.T) {
		a := admin.must(200, "GET", "/v1/snapshots/subscriptions", "")
		b := admin.must(304, "GET", "/v1/snapshots/subscriptions", "", "If-None-Match", a.header.Get("ETag"))
		if b.header.Get("ETag") != a.header.Get("ETag") || b.header.Get("Vary") != a.header.Get("Vary") || b.body != "" {
			t.Errorf("%+v", b)
		}
	})
	// HTTP-13 names the one coding that there is; the case's other two are not accepted.
	t.Run("C104", func(t *testing.T) {
		a := admin.must(415, "POST", "/v1/revocations", `{"kind":"client","client_id":"x"}`, "Content-Encoding", "br")
		if got := a.header.Get("Accept-Encoding"); got != "identity" || !strings.Contains(a.body, `"about:blank"`) {
			t.Errorf("Accept-Encoding %q: %s", got, a.body)
		}
	})
	t.Run("C109", func(t *testing.T) { // all up; the others are in the tests that take servers away
		await(t, "readiness", func() bool {
			status, code := s.readyz(admin.client)
			return status == "pass" && code == 200
		})
	})
	conformIdempotency(t, w, admin)
	t.Run("C115", func(t *testing.T) {
		_, path := admin.made("/v1/applications", `{"name":"C115","owner":"admin"}`)
		before := admin.must(200, "GET", path, "")
		const body = `{"name":"C115","owner":"admin","groups":["changed"]}`
		for status, header := range map[int][]string{428: nil, 412: {"If-Match", `"1"`}} {
			a := admin.must(status, "PUT", path, body, header...)
			if !strings.Contains(a.body, `"about:blank"`) {
				t.Errorf("%d: %s", status, a.body)
			}
		}
		if after := admin.must(200, "GET", path, ""); after.body != before.body {
			t.Errorf("it was changed: %s", after.body)
		}
	})
}

func conformIdempotency(t *testing.T, w *world, admin *person) {
	const path = "/v1/revocations"
	order := func(client string) string { return fmt.Sprintf(`{"kind":"client","client_id":%q}`, client) }
	t.Run("C110", func(t *testing.T) {
		before := w.events()
		first := admin.must(202, "POST", path, order("c110"), "Idempotency-Key", `"8c1f"`)
		second := admin.must(202, "POST", path, order("c110"), "Idempotency-Key", `"8c1f"`)
		if first.body != second.body || first.header.Get("Idempotency-Replayed") != "" || second.header.Get("Idempotency-Replayed") != "true" {
			t.Errorf("first %+v, second %+v", first, second)
		}
		if added := w.events() - before; added != 1 {
			t.Errorf("%d events, want 1", added)
		}
	})
	t.Run("C111", func(t *testing.T) {
		admin.must(202, "POST", path, order("c111"), "Idempotency-Key", `"c111"`)
		a := admin.must(422, "POST", path, order("other"), "Idempotency-Key", `"c111"`)
		if !strings.Contains(a.body, `/idempotency-key-reused"`) {
			t.Error(a.body)
		}
	})
	t.Run("C112", func(t *testing.T) {
		// The first one cannot commit while somebody else holds the log's head.
		conn, err := pgx.Connect(t.Context(), w.db.OwnerURL)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		tx, err := conn.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), `SELECT FROM rescind.log_head FOR UPDATE`); err != nil {
			t.Fatal(err)
		}
		first := make(chan answer, 1)
		header := http.Header{"Authorization": {admin.auth}, "Content-Type": {"application/json"}, "Idempotency-Key": {`"c112"`}}
		go func() {
			a, err := send(admin.client, "POST", admin.base+path, header, order("c112"))
			if err != nil {
				t.Error(err)
			}
			first <- a
		}()
		await(t, "the first request", func() bool {
			var running bool
			err := w.pool().QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM rescind.idempotency WHERE key = 'c112')`).Scan(&running)
			return err == nil && running
		})
		a := admin.must(409, "POST", path, order("c112"), "Idempotency-Key", `"c112"`)
		if !strings.Contains(a.body, `/idempotency-in-progress"`) {
			t.Error(a.body)
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a := <-first; a.status != 202 {
			t.Errorf("the first: %+v", a)
		}
	})
}
