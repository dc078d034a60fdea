package sts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/pgtest"
)

var (
	t1 = revocation.Tenant{ID: 1, Domain: "t1"}
	t2 = revocation.Tenant{ID: 2, Domain: "t2"}
)

// post asks for a token at path.
func post(t testing.TB, s *Server, path string) answer {
	t.Helper()
	return do(s, httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, nil))
}

// isNoIssuer reports whether a is what is answered where there is no issuer.
func isNoIssuer(a answer, form bool) bool {
	if a.status != 404 || a.header.Get("Cache-Control") != "no-store" {
		return false
	}
	if form {
		return a.body == `{"error":"invalid_request","error_description":"There is no issuer at this address."}`+"\n"
	}
	return a.header.Get("Content-Type") == "application/problem+json" && strings.Contains(a.body, `"type":"about:blank"`)
}

func TestTenants(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	state := stateOf(t, iss, "c")
	disabled := resident(3, t2, iss+"/t/t2")
	disabled.Enabled = false
	external := resident(4, revocation.Tenant{ID: 3, Domain: "t3"}, iss+"/t/t3")
	external.Resident = false
	state.content = append(state.content, resident(2, t1, iss+"/t/t1"), disabled, external)
	state.content = append(state.content, registered(2, iss+"/t/t1", "c")...)
	state.content = append(state.content, registered(3, iss+"/t/t2", "c")...)
	state.load(t)
	newIssuer(t, pool, t1, iss+"/t/t1")
	newIssuer(t, pool, t2, iss+"/t/t2")
	s := start(t, pool, Config{State: state})
	if n := count(t, pool, `SELECT count(*) FROM rescind.signing_keys`); n != 1 {
		t.Errorf("%d keys at the start, want that of the super tenant", n)
	}

	verifier, err := token.NewVerifier(s.Issuer(resident(1, revocation.SuperTenant, iss)), s.Issuer(resident(2, t1, iss+"/t/t1")))
	if err != nil {
		t.Fatal(err)
	}
	kids := make(map[string]bool)
	for _, at := range []string{"", "/t/t1"} {
		s.forms = asking(iss+at, "c")
		var response tokenResponse
		got := post(t, s, at+tokenPath)
		got.decode(t, &response)
		minted, err := verifier.Verify(t.Context(), response.AccessToken)
		if err != nil {
			t.Fatalf("%s: %v of %+v", at, err, got)
		}
		if minted.Issuer != iss+at || len(minted.Audience) != 1 || minted.Audience[0] != iss+at {
			t.Errorf("%s: token is %+v", at, minted)
		}
		kids[minted.KeyID] = true
		keys := get(t, s, at+jwksPath, nil)
		if keys.status != 200 || !strings.Contains(keys.body, minted.KeyID) || strings.Count(keys.body, `"kid"`) != 1 {
			t.Errorf("%s: the key set is %+v, want %s alone", at, keys, minted.KeyID)
		}
	}
	if len(kids) != 2 {
		t.Errorf("tokens are signed with keys %v, want each issuer's own", kids)
	}
	if issuer, _ := verifier.Issuer(iss + "/t/t1"); issuer.Tenant != t1 || issuer.MaxLifetime != time.Hour {
		t.Errorf("the issuer of t1 is %+v", issuer)
	}

	s.forms = asking(iss, "c")
	if got := post(t, s, "/t/t1"+tokenPath); got.status != 400 || !strings.Contains(got.body, "unauthorized_client") {
		t.Errorf("a client of another issuer is answered %+v", got)
	}
	s.forms = asking(iss+"/t/t2", "c")
	if got := post(t, s, "/t/t2"+tokenPath); got.status != 400 || !strings.Contains(got.body, "unauthorized_client") {
		t.Errorf("a disabled issuer answers %+v", got)
	}
	if got := get(t, s, "/t/t2"+jwksPath, nil); got.status != 200 {
		t.Errorf("the key set of a disabled issuer is answered %d, want 200", got.status)
	}

	for _, nobody := range []string{"/t/t3", "/t/t9", "/t/carbon.super", "/t/", "/t/T1", "/t/t1%2F", "/t/" + strings.Repeat("x", 201)} {
		for _, path := range []string{jwksPath, openIDPath} {
			if got := get(t, s, nobody+path, nil); !isNoIssuer(got, false) {
				t.Errorf("%s is answered %+v", nobody+path, got)
			}
		}
		if got := get(t, s, metadataPath+nobody, nil); got.status != 404 {
			t.Errorf("C071: %s is answered %+v", metadataPath+nobody, got)
		}
		if got := post(t, s, nobody+tokenPath); !isNoIssuer(got, true) {
			t.Errorf("%s is answered %+v", nobody+tokenPath, got)
		}
	}
	for domain, want := range map[string]bool{"t1": true, "t2": true, "t3": false, "t9": false, "carbon.super": false, "": false} {
		err := s.CheckTenant(t.Context(), domain)
		if refused, ok := errors.AsType[*authn.OAuthError](err); want != (err == nil) || !want && (!ok || refused.Status != 404) {
			t.Errorf("CheckTenant(%q) = %v, want it known: %t, or 404", domain, err, want)
		}
	}
	state.err = errors.New("the database is away")
	if refused, ok := errors.AsType[*authn.OAuthError](s.CheckTenant(t.Context(), "t9")); !ok || refused.Status != 503 || !errors.Is(refused, state.err) {
		t.Errorf("with a state that may be old, CheckTenant of an unknown tenant is %v, want 503", refused)
	}
	if err := s.CheckTenant(t.Context(), "t1"); err != nil {
		t.Errorf("with a state that may be old, CheckTenant of a known tenant: %v", err)
	}
	if got := get(t, s, "/t/t9"+jwksPath, nil); got.status != 503 || got.header.Get("Retry-After") != "5" {
		t.Errorf("with a state that may be old, an unknown tenant is answered %+v, want 503", got)
	}
	if got := get(t, s, "/t/t1"+jwksPath, nil); got.status != 200 {
		t.Errorf("with a state that may be old, a known tenant is answered %d, want 200", got.status)
	}
}

// A tenant that another process has just made is found, and many that nobody made cost little.
func TestTenantsThatAreNotKnownYet(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	newIssuer(t, pool, t1, iss+"/t/t1")
	state := stateOf(t, iss, "c")
	s := start(t, pool, Config{State: state})
	state.arrives = func() {
		if len(state.content) < 4 {
			state.content = append(state.content, resident(2, t1, iss+"/t/t1"))
			state.load(t)
		}
	}
	if got := get(t, s, "/t/t1"+jwksPath, nil); got.status != 200 || state.fresh.Load() != 1 {
		t.Errorf("a new tenant is answered %d after %d looks, want 200 after one", got.status, state.fresh.Load())
	}
	if got := get(t, s, "/t/t1"+jwksPath, nil); got.status != 200 || state.fresh.Load() != 1 {
		t.Errorf("a known tenant is answered %d after %d looks, want 200 after the one", got.status, state.fresh.Load())
	}

	begin := time.Now()
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			for j := range 5 {
				if s.CheckTenant(t.Context(), fmt.Sprintf("nobody-%d-%d", i, j)) == nil {
					t.Error("a tenant that nobody made is found")
				}
			}
		})
	}
	wg.Wait()
	n, most := state.fresh.Load()-1, int64(time.Since(begin)/lookEvery)+1
	if n < 5 || n > most {
		t.Errorf("200 invented tenants cost %d looks, want 5 to %d", n, most)
	}
	if len(s.issuers) != 2 {
		t.Errorf("%d issuers are kept, want 2", len(s.issuers))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := s.find(ctx, "nobody"); !errors.Is(err, context.Canceled) {
		t.Errorf("of a caller that went away: %v", err)
	}
}

func TestIssuersOfTenantsThatAreGone(t *testing.T) {
	t.Parallel()
	state := stateOf(t, iss, "c")
	s := start(t, pgtest.New(t), Config{State: state})
	const generations, tenants = 10, 20
	for g := range generations {
		state.content = state.content[:3]
		for i := range tenants {
			domain := fmt.Sprintf("t%d-%d", g, i)
			state.content = append(state.content, resident(10+g*tenants+i, revocation.Tenant{ID: int32(10 + i), Domain: domain}, iss+"/t/"+domain))
		}
		state.load(t)
		state.replica.View(func(v *replica.View) {
			for _, km := range v.KeyManagers() { // as verifiers are made
				s.Issuer(km)
			}
		})
		if err := s.CheckTenant(t.Context(), fmt.Sprintf("t%d-0", g)); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.issuers); n > 4*tenants {
		t.Errorf("%d issuers are kept, of %d tenants", n, tenants)
	}
}

// A tenant that is deleted and made again has nothing of the one before.
func TestTenantMadeAgain(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	newIssuer(t, pool, t1, iss+"/t/t1")
	state := stateOf(t, iss, "c")
	state.content = append(state.content, resident(2, t1, iss+"/t/t1"))
	state.load(t)
	s := start(t, pool, Config{State: state})
	before := get(t, s, "/t/t1"+jwksPath, nil)
	exec(t, pool, `DELETE FROM rescind.signing_keys s USING rescind.key_managers k WHERE k.id = s.key_manager_id AND k.iss = $1`, iss+"/t/t1")
	if again := get(t, s, "/t/t1"+jwksPath, nil); again.body != before.body {
		t.Error("the keys are read again at once: the test shows nothing")
	}
	super := s.own()
	state.content[len(state.content)-1] = resident(3, t1, iss+"/t/t1")
	state.load(t)
	after := get(t, s, "/t/t1"+jwksPath, nil)
	if after.status != 200 || after.body == before.body || strings.Count(after.body, `"kid"`) != 1 {
		t.Errorf("the key set is %+v, before it was %s", after, before.body)
	}
	if again := get(t, s, "/t/t1"+jwksPath, nil); again.body != after.body || s.own() != super {
		t.Error("what did not change is begun anew")
	}
}

// A Verifier makes no keys, and needs no master key.
func TestVerifier(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	newIssuer(t, pool, t1, iss+"/t/t1")
	compact := mint(t, start(t, pool, Config{}))
	v := NewVerifier(pool, slog.New(slog.DiscardHandler))
	verifier, err := token.NewVerifier(v.Issuer(resident(1, revocation.SuperTenant, iss)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verifier.Verify(t.Context(), compact); err != nil {
		t.Error(err)
	}
	keys := v.Issuer(resident(2, t1, iss+"/t/t1")).Keys
	for range 3 {
		if _, err := keys.Key(t.Context(), "k", "ES256"); !errors.Is(err, token.ErrUnknownKey) {
			t.Errorf("of an issuer without keys: %v, want %v", err, token.ErrUnknownKey)
		}
	}
	if n := count(t, pool, `SELECT count(*) FROM rescind.signing_keys`); n != 1 {
		t.Errorf("%d signing keys, want the one that was there", n)
	}
	pool.Close()
	if _, err := v.Issuer(resident(1, revocation.SuperTenant, iss)).Keys.Key(t.Context(), "k", "ES256"); !errors.Is(err, token.ErrKeysUnavailable) {
		t.Errorf("without the database: %v, want %v", err, token.ErrKeysUnavailable)
	}
}

// Whoever asks first for a tenant's key set has its first key made, once, by all processes.
func TestFirstKeyOfATenant(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	state := stateOf(t, iss, "c")
	state.content = append(state.content, resident(2, t1, iss+"/t/t1"), resident(3, t2, iss+"/t/t2"))
	state.load(t)
	newIssuer(t, pool, t1, iss+"/t/t1")
	newIssuer(t, pool, t2, iss+"/t/t2")
	servers := []*Server{start(t, pool, Config{State: state}), start(t, pool, Config{State: state})}
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			if got := get(t, servers[i%2], fmt.Sprintf("/t/t%d%s", i%3%2+1, jwksPath), nil); got.status != 200 {
				t.Errorf("answer is %+v", got)
			}
		})
	}
	wg.Wait()
	if n := count(t, pool, `SELECT count(*) FROM rescind.signing_keys WHERE use_from <= now()`); n != 3 {
		t.Errorf("%d keys, want one for each issuer", n)
	}

	// One key is made at a time, whoever asks.
	s := servers[0]
	s.making <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.ensureKey(ctx, iss+"/t/t9"); !errors.Is(err, context.Canceled) {
		t.Errorf("while a key is being made: %v, want to wait", err)
	}
}
