package sts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/pgtest"
)

type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) decode(t testing.TB, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), into); err != nil {
		t.Fatalf("body is %q: %v", a.body, err)
	}
}

func do(s *Server, r *http.Request) answer {
	router := chi.NewRouter()
	s.Routes(router)
	w := httptest.NewRecorder()
	router.ServeHTTP(w, r)
	return answer{w.Code, w.Header(), w.Body.String()}
}

func get(t testing.TB, s *Server, path string, header map[string]string) answer {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil)
	for name, value := range header {
		r.Header.Set(name, value)
	}
	return do(s, r)
}

// The clients of the conformance cases.
const (
	basicAppOne = "Basic YXBwK29uZTpzM2NyJTNBdCUyQiUyRiUzRCUyNQ=="
	basicApp2   = "Basic YXBwLTI6U2VjcmV0LTI="
	basicFar    = "Basic ZmFyOlNlY3JldC1mYXI="
	basicBlock  = "Basic YmxvY2tlZDpTZWNyZXQtYmxvY2tlZA=="
)

// conformance is a server before real clients.
func conformance(t *testing.T) *Server {
	t.Helper()
	pool := pgtest.New(t)
	key := masterKey(t, "a")
	clients, err := authn.New(authn.Config{}, pool, []authn.MasterKey{key}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, pool, Config{State: stateOf(t, iss, "app one", "app-2", "spa-1", "blocked"), Algorithm: "RS256"}, key)
	s.forms = clients
	const (
		far        = "https://far.example"
		newMapping = `
WITH app AS (INSERT INTO rescind.applications (tenant_id, owner, name) VALUES (-1234, 'admin', $2) RETURNING id)
INSERT INTO rescind.key_mappings (application_id, key_manager_id, consumer_key, key_type)
SELECT app.id, k.id, $2, 'PRODUCTION' FROM app, rescind.key_managers k WHERE k.iss = $1
RETURNING id`
	)
	for _, c := range []struct {
		iss string
		authn.Registration
	}{
		{iss, authn.Registration{ID: "app one", Secret: "s3cr:t+/=%", Scopes: []string{"read", "write"}, DefaultScopes: []string{"read", "write"},
			Audience: []string{"https://api.example.com", "https://other.example.com/v1"}}},
		{iss, authn.Registration{ID: "app-2", AuthMethod: "client_secret_post", Secret: "Secret-2", TokenLifetime: 60}},
		{iss, authn.Registration{ID: "spa-1", AuthMethod: "none"}},
		{iss, authn.Registration{ID: "blocked", Secret: "Secret-blocked"}},
		{far, authn.Registration{ID: "far", Secret: "Secret-far"}},
	} {
		exec(t, pool, newManagerSQL, -1234, c.iss, false) // ours is there
		err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			var mapping int32
			if err := tx.QueryRow(t.Context(), newMapping, c.iss, c.ID).Scan(&mapping); err != nil {
				return err
			}
			_, err := clients.StoreClient(t.Context(), tx, mapping, c.Registration)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func TestTokenEndpoint(t *testing.T) {
	t.Parallel()
	s := conformance(t)
	const (
		api   = "https://api.example.com"
		other = "https://other.example.com/v1"
		grant = "grant_type=client_credentials"
	)
	resource := func(uri string) string { return "&resource=" + url.QueryEscape(uri) }
	for _, tt := range []struct {
		name, authorization, body string
		status                    int
		code                      string // of the error
		scope                     string
		audience                  []string
		lifetime                  int64
	}{
		{"C048", basicAppOne, grant + "&scope=read", 200, "", "read", []string{api, other}, 900},
		{"C049", basicAppOne, grant, 200, "", "read write", []string{api, other}, 900},
		{"C050", basicAppOne, grant + "&scope=admin", 400, "invalid_scope", "", nil, 0},
		{"C050 one of two", basicAppOne, grant + "&scope=read+admin", 400, "invalid_scope", "", nil, 0},
		{"C050 other case", basicAppOne, grant + "&scope=Read", 400, "invalid_scope", "", nil, 0},
		{"C050 tab", basicAppOne, grant + "&scope=read%09write", 400, "invalid_scope", "", nil, 0},
		{"C050 nothing but space", basicAppOne, grant + "&scope=+", 400, "invalid_scope", "", nil, 0},
		{"C051", basicAppOne, "grant_type=password&username=a&password=b", 400, "unsupported_grant_type", "", nil, 0},
		{"C051 token exchange", basicAppOne, "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Atoken-exchange", 400, "unsupported_grant_type", "", nil, 0},
		{"C052", basicAppOne, "scope=read", 400, "invalid_request", "", nil, 0},
		{"C052 empty", basicAppOne, "grant_type=&scope=read", 400, "invalid_request", "", nil, 0},
		{"C053", "", grant + "&client_id=spa-1", 400, "unauthorized_client", "", nil, 0},
		{"C054", basicAppOne, grant + "&scope=read&scope=write", 400, "invalid_request", "", nil, 0},
		{"C060", basicAppOne, grant + resource("https://nope.example"), 400, "invalid_target", "", nil, 0},
		{"C060 relative", basicAppOne, grant + resource("api"), 400, "invalid_target", "", nil, 0},
		{"C060 fragment", basicAppOne, grant + resource(api+"#x"), 400, "invalid_target", "", nil, 0},
		{"C060 one of two", basicAppOne, grant + resource(api) + resource("https://nope.example"), 400, "invalid_target", "", nil, 0},
		{"one resource", basicAppOne, grant + resource(other), 200, "", "read write", []string{other}, 900},
		{"two resources", basicAppOne, grant + resource(other) + resource(api), 200, "", "read write", []string{other, api}, 900},
		{"empty resource", basicAppOne, grant + "&resource=", 200, "", "read write", []string{api, other}, 900},
		{"scope twice", basicAppOne, grant + "&scope=write+read++write", 200, "", "write read", []string{api, other}, 900},
		{"no scope, no audience, its own lifetime", basicApp2, grant, 200, "", "", []string{iss}, 60},
		{"issued elsewhere", basicFar, grant, 400, "unauthorized_client", "", nil, 0},
		{"blocked", basicBlock, grant, 400, "unauthorized_client", "", nil, 0},
		{"wrong secret", "Basic YXBwLTI6d3Jvbmc=", grant, 401, "invalid_client", "", nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, tokenPath, strings.NewReader(tt.body))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			if tt.authorization != "" {
				r.Header.Set("Authorization", tt.authorization)
			}
			before := time.Now().Unix()
			got := do(s, r)
			if got.status != tt.status || got.header.Get("Cache-Control") != "no-store" || got.header.Get("Pragma") != "no-cache" ||
				!strings.HasPrefix(got.header.Get("Content-Type"), "application/json") {
				t.Fatalf("answer is %d %v %s, want %d, not cached, JSON", got.status, got.header, got.body, tt.status)
			}
			var members map[string]any
			got.decode(t, &members)
			if tt.code != "" {
				if members["error"] != tt.code || members["error_description"] == nil || len(members) != 2 {
					t.Errorf("body is %v, want error %s with a description", members, tt.code)
				}
				return
			}
			access, _ := members["access_token"].(string)
			delete(members, "access_token")
			want := map[string]any{"token_type": "Bearer", "expires_in": float64(tt.lifetime)}
			if tt.scope != "" {
				want["scope"] = tt.scope
			}
			if diff := cmp.Diff(want, members); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
			checkClaims(t, s, access, before, tt.scope, tt.audience, tt.lifetime)
		})
	}
}

var uuid4 = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// checkClaims checks a token of RFC 9068 section 2 by an implementation that is not ours.
func checkClaims(t *testing.T, s *Server, access string, before int64, scope string, wantAudience []string, lifetime int64) {
	t.Helper()
	verified, err := verify(t, s, access)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := jose.ParseSignedCompact(access, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		t.Fatal(err)
	}
	header := jws.Signatures[0].Protected
	if header.KeyID == "" || header.ExtraHeaders[jose.HeaderType] != "at+jwt" {
		t.Errorf("header is %+v, want a kid and typ at+jwt", header)
	}
	var claims map[string]any
	if err := json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &claims); err != nil {
		t.Fatal(err)
	}
	iat, _ := claims["iat"].(float64)
	if iat < float64(before) || iat > float64(time.Now().Unix()) {
		t.Errorf("iat is %v, want now", claims["iat"])
	}
	if jti, _ := claims["jti"].(string); !uuid4.MatchString(jti) {
		t.Errorf("jti is %v, want a UUID of version 4", claims["jti"])
	}
	sub, _ := claims["sub"].(string)
	want := map[string]any{
		"iss": iss, "sub": sub, "client_id": sub, "azp": sub, "entity_id": sub, "aut": "APPLICATION", "iat": iat, "exp": iat + float64(lifetime), "jti": claims["jti"],
		"aud": any(wantAudience[0]),
	}
	if len(wantAudience) > 1 {
		want["aud"] = []any{wantAudience[0], wantAudience[1]}
	}
	if scope != "" {
		want["scope"] = scope
	}
	if diff := cmp.Diff(want, claims); diff != "" {
		t.Errorf("claims (-want +got):\n%s", diff)
	}
	if sub == "" || verified.ClientID != sub {
		t.Errorf("sub is %q, want the client id", sub)
	}
}

func TestTokenEndpointTakesPostOnly(t *testing.T) {
	t.Parallel()
	s := conformance(t)
	for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPut, http.MethodOptions} {
		got := do(s, httptest.NewRequestWithContext(t.Context(), method, tokenPath, nil))
		if got.status != 405 || got.header.Get("Allow") != "POST" || got.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s is answered %d %v", method, got.status, got.header)
		}
	}
}

// A token bears the first second that no revocation reaches, if its client may have one.
func TestTokensOfRevokedClients(t *testing.T) {
	t.Parallel()
	now := time.Now().Truncate(time.Second)
	s := start(t, pgtest.New(t), Config{})
	s.now = func() time.Time { return now.Add(300 * time.Millisecond) }
	const own = revocation.KindClient
	rev := func(kind revocation.Kind, id string, ahead int64) replica.Record {
		r := replica.Record{
			Target: revocation.Target{Kind: kind, Iss: iss, ID: id}, Tenant: revocation.SuperTenant,
			Exp: now.Unix() + 3600, NotAfter: now.Unix() + ahead,
		}
		if kind == revocation.KindTenant {
			r.Target.Iss = ""
		}
		return r
	}
	for name, tt := range map[string]struct {
		revoked []replica.Record
		want    int64 // after now; negative: refused
	}{
		"nothing":                 {nil, 0},
		"long ago":                {[]replica.Record{rev(own, "c", -1)}, 0},
		"in this second":          {[]replica.Record{rev(own, "c", 0)}, 1},
		"with clock skew":         {[]replica.Record{rev(own, "c", 2)}, 3},
		"as a subject":            {[]replica.Record{rev(revocation.KindSubject, "c", 60)}, 61},
		"with its tenant":         {[]replica.Record{rev(revocation.KindTenant, "carbon.super", 5), rev(own, "c", 2)}, 6},
		"others":                  {[]replica.Record{rev(own, "d", 9), rev(revocation.KindTenant, "other", 9)}, 0},
		"as far ahead as can be":  {[]replica.Record{rev(own, "c", maxAhead-1)}, maxAhead},
		"further than it goes on": {[]replica.Record{rev(own, "c", maxAhead)}, -1},
	} {
		state := stateOf(t, iss, "c")
		state.revoked = tt.revoked
		state.load(t)
		s.cfg.State = state
		got := do(s, httptest.NewRequestWithContext(t.Context(), http.MethodPost, tokenPath, nil))
		if tt.want < 0 {
			if got.status != 503 || got.header.Get("Retry-After") == "" || !strings.Contains(got.body, "temporarily_unavailable") {
				t.Errorf("%s: answer is %+v, want 503 with Retry-After", name, got)
			}
			continue
		}
		var response tokenResponse
		got.decode(t, &response)
		minted, err := verify(t, s, response.AccessToken)
		if err != nil {
			t.Errorf("%s: %v of answer %+v", name, err, got)
			continue
		}
		if iat := minted.IssuedAt - now.Unix(); iat != tt.want || minted.Expiry-minted.IssuedAt != 900 || response.ExpiresIn != 900 {
			t.Errorf("%s: iat is %d s ahead, exp %d s after it, want %d and 900", name, iat, minted.Expiry-minted.IssuedAt, tt.want)
		}
		if state.maxAge != 0 {
			t.Errorf("%s: a state of %s ago will do, which may lack what the client has just done", name, state.maxAge)
		}
	}
}

func TestTokensNeedTheState(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.New(t), Config{})
	ask := func(id string, state *fakeState) answer {
		s.forms = asking(iss, id)
		s.cfg.State = state
		return do(s, httptest.NewRequestWithContext(t.Context(), http.MethodPost, tokenPath, nil))
	}
	stale := stateOf(t, iss, "c")
	stale.err = errors.New("the database is away")
	elsewhere := stateOf(t, iss)
	elsewhere.content = append(elsewhere.content, registered(1, "https://far.example", "c")...)
	elsewhere.load(t)
	for name, tt := range map[string]struct {
		answer
		status int
		code   string
	}{
		"stale":                    {ask("c", stale), 503, "temporarily_unavailable"},
		"removed":                  {ask("c", stateOf(t, iss)), 401, "invalid_client"},
		"mapped at another issuer": {ask("c", elsewhere), 401, "invalid_client"},
		"blocked":                  {ask("blocked", stateOf(t, iss, "c", "blocked")), 400, "unauthorized_client"},
		"beside a blocked one":     {ask("c", stateOf(t, iss, "c", "blocked")), 200, ""},
	} {
		if tt.answer.status != tt.status || !strings.Contains(tt.body, tt.code) || (tt.status == 503) != (tt.header.Get("Retry-After") != "") {
			t.Errorf("%s: answer is %+v, want %d %s", name, tt.answer, tt.status, tt.code)
		}
	}
}

func TestTooManySignatures(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.New(t), Config{MaxQueue: 2})
	request := func(ctx context.Context) answer {
		return do(s, httptest.NewRequestWithContext(ctx, http.MethodPost, tokenPath, nil))
	}
	if got := request(t.Context()); got.status != 200 {
		t.Fatalf("answer is %+v, want 200", got)
	}

	s.queue <- struct{}{}
	s.queue <- struct{}{}
	got := request(t.Context())
	if got.status != 503 || got.header.Get("Retry-After") != "1" || !strings.Contains(got.body, "temporarily_unavailable") {
		t.Errorf("with a full queue the answer is %+v, want 503 with Retry-After", got)
	}
	<-s.queue
	for range cap(s.signing) {
		s.signing <- struct{}{}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got := request(ctx); got.status != 503 {
		t.Errorf("of a caller that went away the answer is %+v, want 503", got)
	}
	<-s.signing
	if got := request(t.Context()); got.status != 200 {
		t.Errorf("with a place free the answer is %+v, want 200", got)
	}
}

func TestNoKeyToSignWith(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	s := start(t, pool, Config{})
	exec(t, pool, `UPDATE rescind.signing_keys SET master_key_id = 'another'`)
	s.own().ring.Store(&ring{}) // nothing is open
	if err := s.own().reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := do(s, httptest.NewRequestWithContext(t.Context(), http.MethodPost, tokenPath, nil))
	if got.status != 503 || got.header.Get("Retry-After") != "5" || strings.Contains(got.body, "sealed") {
		t.Errorf("answer is %+v, want a 503 that does not say why", got)
	}
	if keys := get(t, s, jwksPath, nil); keys.status != 200 {
		t.Errorf("the key set is answered %d, want 200", keys.status)
	}
}

func TestKeySet(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.New(t), Config{Algorithm: "RS256"})
	got := get(t, s, jwksPath, nil)
	etag := got.header.Get("ETag")
	for name, want := range map[string]string{
		"Content-Type": "application/json", "Cache-Control": "public, max-age=300", "Access-Control-Allow-Origin": "*", "Vary": "Accept",
	} {
		if got.header.Get(name) != want {
			t.Errorf("%s is %q, want %q", name, got.header.Get(name), want)
		}
	}
	if got.status != 200 || !regexp.MustCompile(`^"[^"]+"$`).MatchString(etag) {
		t.Errorf("C072: status %d, ETag %q, want 200 and a strong one", got.status, etag)
	}
	var set struct{ Keys []map[string]any }
	got.decode(t, &set)
	if len(set.Keys) != 1 {
		t.Fatalf("C072: keys are %v, want one", set.Keys)
	}
	key := set.Keys[0]
	if diff := cmp.Diff(map[string]any{
		"kty": "RSA", "use": "sig", "alg": "RS256", "e": "AQAB", "kid": signing(t, s), "n": key["n"],
	}, key); diff != "" {
		t.Errorf("C072: key (-want +got):\n%s", diff)
	}

	asked := get(t, s, jwksPath, map[string]string{"Accept": "text/html;q=0.5, application/jwk-set+json"})
	if asked.header.Get("Content-Type") != "application/jwk-set+json" || asked.body != got.body || asked.header.Get("ETag") == etag {
		t.Errorf("as application/jwk-set+json: %+v", asked)
	}
	for _, accept := range []string{"*/*", "application/*", "application/json", "application/jwk-set+json;q=0", "application/jwk-set+json; q=0.000, */*", "\x00;;"} {
		if other := get(t, s, jwksPath, map[string]string{"Accept": accept}); other.header.Get("Content-Type") != "application/json" {
			t.Errorf("Accept %q: Content-Type is %q", accept, other.header.Get("Content-Type"))
		}
	}

	head := do(s, httptest.NewRequestWithContext(t.Context(), http.MethodHead, jwksPath, nil))
	if head.status != 200 || head.body != "" || head.header.Get("ETag") != etag || head.header.Get("Content-Length") == "" {
		t.Errorf("HEAD: %+v", head)
	}
	for condition, want := range map[string]int{
		etag: 304, "W/" + etag: 304, `W/"x", ` + etag: 304, `"a,b",W/` + etag: 304, "*": 304, `"x"`: 200, strings.Trim(etag, `"`): 200,
	} {
		got := get(t, s, jwksPath, map[string]string{"If-None-Match": condition})
		if got.status != want {
			t.Errorf("C073: If-None-Match %s: status %d, want %d", condition, got.status, want)
		}
		if want == 304 && (got.body != "" || got.header.Get("ETag") != etag || got.header.Get("Cache-Control") == "" || got.header.Get("Access-Control-Allow-Origin") != "*") {
			t.Errorf("C073: 304 is %+v", got)
		}
	}
}

// wantMetadata is that of an issuer whose tenant has these scopes.
func wantMetadata(iss string, scopes ...any) map[string]any {
	methods := []any{"client_secret_basic", "client_secret_post", "private_key_jwt"}
	algs := []any{"RS256", "PS256", "ES256", "Ed25519", "EdDSA"}
	return map[string]any{
		"issuer":                                iss,
		"token_endpoint":                        iss + "/oauth2/token",
		"jwks_uri":                              iss + "/oauth2/jwks",
		"revocation_endpoint":                   iss + "/oauth2/revoke",
		"introspection_endpoint":                iss + "/oauth2/introspect",
		"grant_types_supported":                 []any{"client_credentials"},
		"scopes_supported":                      scopes,
		"token_endpoint_auth_methods_supported": methods,
		"token_endpoint_auth_signing_alg_values_supported":         algs,
		"revocation_endpoint_auth_methods_supported":               append(slices.Clone(methods), "none"),
		"revocation_endpoint_auth_signing_alg_values_supported":    algs,
		"introspection_endpoint_auth_methods_supported":            methods,
		"introspection_endpoint_auth_signing_alg_values_supported": algs,
		"service_documentation":                                    "https://github.com/rescindhq/rescind",
	}
}

func TestMetadata(t *testing.T) {
	t.Parallel()
	bakery := revocation.Tenant{ID: 1, Domain: "t1.example"}
	for _, path := range []string{"", "/km/a.b"} {
		t.Run(path, func(t *testing.T) {
			t.Parallel()
			super := iss + path
			pool := pgtest.New(t)
			newIssuer(t, pool, bakery, super+"/t/t1.example")
			state := stateOf(t, super)
			state.content = append(state.content, resident(2, bakery, super+"/t/t1.example"))
			scope := func(i int, tenant revocation.Tenant, name string) {
				state.content = append(state.content, &catalog.Scope{Meta: catalog.Meta{ID: int32(i), UUID: fmt.Sprint("scope-", i), Tenant: tenant}, Name: name})
			}
			scope(1, revocation.SuperTenant, "write")
			scope(2, revocation.SuperTenant, "a:read")
			scope(3, bakery, "introspect")
			state.load(t)
			s := start(t, pool, Config{Issuer: super, State: state})
			for _, tt := range []struct {
				iss, inserted, appended string
				scopes                  []any
			}{
				{super, "/.well-known/oauth-authorization-server" + path, path + "/.well-known/openid-configuration", []any{"a:read", "introspect", "write"}},
				{super, "/.well-known/oauth-authorization-server", "/.well-known/openid-configuration", []any{"a:read", "introspect", "write"}},
				{super + "/t/t1.example", "/.well-known/oauth-authorization-server" + path + "/t/t1.example",
					path + "/t/t1.example/.well-known/openid-configuration", []any{"introspect"}},
				{super + "/t/t1.example", "/.well-known/oauth-authorization-server/t/t1.example",
					"/t/t1.example/.well-known/openid-configuration", []any{"introspect"}},
			} {
				oauth := wantMetadata(tt.iss, tt.scopes...)
				openID := maps.Clone(oauth)
				openID["id_token_signing_alg_values_supported"] = []any{"RS256", "ES256"}
				openID["subject_types_supported"] = []any{"public"}
				for at, want := range map[string]map[string]any{tt.inserted: oauth, tt.appended: openID} {
					got := get(t, s, at, nil)
					if got.status != 200 || got.header.Get("Content-Type") != "application/json" || !strings.HasPrefix(got.header.Get("ETag"), `"`) ||
						got.header.Get("Cache-Control") != "public, max-age=300" || got.header.Get("Access-Control-Allow-Origin") != "*" {
						t.Fatalf("C070, C071: %s is answered %d %v", at, got.status, got.header)
					}
					var members map[string]any
					got.decode(t, &members)
					if diff := cmp.Diff(want, members); diff != "" {
						t.Errorf("C070, C071: %s (-want +got):\n%s", at, diff)
					}
					if again := get(t, s, at, map[string]string{"If-None-Match": got.header.Get("ETag")}); again.status != 304 {
						t.Errorf("%s: a conditional GET is answered %d, want 304", at, again.status)
					}
				}
				for _, cut := range []string{iss, super} {
					if at := strings.TrimPrefix(tt.iss, cut) + jwksPath; get(t, s, at, nil).status != 200 {
						t.Errorf("%s is not there", at)
					}
				}
			}

			before, made := get(t, s, metadataPath, nil), s.own().metadata.Load()
			ahead := metadataAge
			s.now = func() time.Time { return made.at.Add(ahead) }
			state.load(t) // something has happened
			if again := get(t, s, metadataPath, nil); again.body != before.body || &s.own().metadata.Load().oauth.body[0] != &made.oauth.body[0] {
				t.Error("metadata of the same scopes is made anew")
			}
			scope(4, revocation.SuperTenant, "later")
			state.load(t)
			if soon := get(t, s, metadataPath, nil); soon.body != before.body {
				t.Error("metadata is made anew within a second")
			}
			ahead += metadataAge
			after := get(t, s, metadataPath, nil)
			if !strings.Contains(after.body, `["a:read","introspect","later","write"]`) || after.header.Get("ETag") == before.header.Get("ETag") {
				t.Errorf("after a scope was added: ETag %s, %s", after.header.Get("ETag"), after.body)
			}
		})
	}
}

func TestMetadataOfManyScopes(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 199, 200, 1000} {
		var scopes []string
		for i := range n {
			scopes = append(scopes, fmt.Sprintf("scope-%04d", n-i))
		}
		oauth, _, err := describe(iss, scopes)
		if err != nil {
			t.Fatal(err)
		}
		var got metadata
		answer{body: string(oauth.body)}.decode(t, &got)
		if len(got.Scopes) != min(n+1, 200) || !slices.IsSorted(got.Scopes) || !slices.Contains(got.Scopes, "introspect") {
			t.Errorf("of %d scopes %d are named: %q", n, len(got.Scopes), got.Scopes)
		}
	}
}

func BenchmarkToken(b *testing.B) {
	for _, alg := range algorithms {
		b.Run(alg, func(b *testing.B) {
			s := start(b, pgtest.New(b), Config{Algorithm: alg})
			handler := s.serveToken(func(*http.Request) string { return revocation.SuperTenant.Domain })
			r := httptest.NewRequestWithContext(b.Context(), http.MethodPost, tokenPath, nil)
			for b.Loop() {
				w := httptest.NewRecorder()
				handler(w, r)
				if w.Code != 200 {
					b.Fatal(w.Body)
				}
			}
		})
	}
}
