package introspect

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
)

const (
	frozen                    = 1795209000
	epoch    revocation.Epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	ourIss                    = "https://km.example.com"
	acmeIss                   = "https://km.example.com/t/acme.example"
	extIss                    = "https://idp.example.com" // external, of the super tenant, with the typ exception
	offIss                    = "https://off.example.com" // its key manager is disabled
	lostIss                   = "https://lost.example.com"
	awayIss                   = "https://away.example.com"              // its keys cannot be had
	darkIss                   = "https://km.example.com/t/dark.example" // nor can these, of an issuer of our own
	audience                  = "https://api.example.com"
)

var acme = revocation.Tenant{ID: 1, Domain: "acme.example"}

// clients are as in the contract's fixtures: app-1b is of the same application as app one.
var clients = map[string]authn.Client{
	"app one": {ID: "app one", ApplicationID: 1, Tenant: revocation.SuperTenant, Issuer: ourIss},
	"app-1b":  {ID: "app-1b", ApplicationID: 1, Tenant: revocation.SuperTenant, Issuer: extIss},
	"app-2":   {ID: "app-2", ApplicationID: 2, Tenant: revocation.SuperTenant, Issuer: ourIss},
	"gw-1": {
		ID: "gw-1", ApplicationID: 3, Tenant: revocation.SuperTenant, Issuer: ourIss,
		ResourceAudiences: []string{"https://none.example.com", audience},
	},
	"gw-2": {
		ID: "gw-2", ApplicationID: 4, Tenant: revocation.SuperTenant, Issuer: ourIss,
		ResourceAudiences: []string{"https://other.example.com"},
	},
	"gw-acme": {ID: "gw-acme", ApplicationID: 5, Tenant: acme, Issuer: acmeIss, ResourceAudiences: []string{audience}},
	"spa-1":   {ID: "spa-1", ApplicationID: 6, Tenant: revocation.SuperTenant, Issuer: ourIss, Public: true},
}

// fakeCallers believes the user name of Basic credentials.
type fakeCallers struct {
	err       error // of every call
	clientErr error // of Client
	failed    *int  // counts Bearer tokens that were refused, unless nil
}

var errUnauthenticated = &authn.OAuthError{Status: http.StatusUnauthorized, Code: authn.InvalidClient}

func (c fakeCallers) FormOrBearer(_ http.ResponseWriter, r *http.Request, known ...string) (authn.Client, string, url.Values, error) {
	if c.err != nil {
		return authn.Client{}, "", nil, c.err
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return authn.Client{}, "", nil, err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil {
		return authn.Client{}, "", nil, err
	}
	if bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return authn.Client{}, bearer, form, nil
	}
	user, _, _ := r.BasicAuth()
	client, ok := clients[user]
	if !ok {
		return authn.Client{}, "", nil, errUnauthenticated
	}
	return client, "", form, nil
}

func (c fakeCallers) Client(_ context.Context, id string) (authn.Client, bool, error) {
	client, ok := clients[id]
	return client, ok, c.clientErr
}

func (c fakeCallers) BearerFailed(*http.Request) {
	if c.failed != nil {
		*c.failed++
	}
}

// fakeState is a replica that gets to the end of a log when it is told to reach it.
type fakeState struct {
	replica *replica.State
	log     []revocation.Event
	err     error
	stuck   bool // it is never reached
}

func (s *fakeState) Replica() *replica.State { return s.replica }

func (s *fakeState) Reach(ctx context.Context, p revocation.Position) error {
	if s.stuck {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	for _, e := range s.log {
		if e.Epoch == p.Epoch && e.Seq <= p.Seq {
			if err := s.replica.Apply(e); err != nil {
				return err
			}
		}
	}
	return s.err
}

func (s *fakeState) seen() revocation.Position {
	return revocation.Position{Epoch: epoch, Seq: revocation.Seq(len(s.log))}
}

// revoke adds an event, which the replica does not have yet.
func (s *fakeState) revoke(t testing.TB, target revocation.Target) {
	t.Helper()
	rev := revocation.Revocation{
		ID: "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Target: target, Tenant: revocation.SuperTenant, Exp: frozen + 3600, Reason: "client",
	}
	if target.Kind.HasTime() {
		rev.NotAfter = frozen
	}
	e, err := revocation.NewEvent(rev)
	if err != nil {
		t.Fatal(err)
	}
	e.Position = revocation.Position{Epoch: epoch, Seq: revocation.Seq(len(s.log) + 1)}
	e.Source, e.Time = ourIss, time.Unix(frozen, 0)
	s.log = append(s.log, e)
}

// The keys of all issuers, and one that none of them has.
var (
	ecKey  = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) })
	badKey = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) })
	rsaKey = sync.OnceValue(func() *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, 2048)) })
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

type world struct {
	*Endpoint
	state    *fakeState
	verifier *countingVerifier
	reg      *prometheus.Registry
}

// countingVerifier counts what it is asked to verify.
type countingVerifier struct {
	*token.Verifier
	n atomic.Int64
}

func (v *countingVerifier) Verify(ctx context.Context, compact string) (*token.Token, error) {
	v.n.Add(1)
	return v.Verifier.Verify(ctx, compact)
}

type noKeys struct{}

func (noKeys) Key(context.Context, string, string) (token.Key, error) {
	return token.Key{}, errors.New("connection refused")
}

func newWorld(t testing.TB, callers fakeCallers, more ...jose.JSONWebKey) *world {
	t.Helper()
	set := jose.JSONWebKeySet{Keys: append(more, jose.JSONWebKey{Key: ecKey().Public(), KeyID: "ec-1", Algorithm: "ES256", Use: "sig"})}
	keys, err := token.ParseKeySet(must(json.Marshal(set)))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{state: &fakeState{replica: replica.NewState(replica.StateConfig{})}, reg: prometheus.NewRegistry()}
	var issuers []token.Issuer
	at := revocation.Position{Epoch: epoch}
	err = w.state.replica.Load(at, func(l *replica.Loader) error {
		for i, k := range []catalog.KeyManager{
			{Iss: ourIss, Resident: true, Enabled: true},
			{Iss: acmeIss, Resident: true, Enabled: true, Meta: catalog.Meta{Tenant: acme}},
			{Iss: extIss, Enabled: true},
			{Iss: offIss},
			{Iss: awayIss, Enabled: true},
			{Iss: lostIss},
			{Iss: darkIss, Resident: true, Enabled: true, Meta: catalog.Meta{Tenant: revocation.Tenant{ID: 2, Domain: "dark.example"}}},
		} {
			if k.Tenant == (revocation.Tenant{}) {
				k.Tenant = revocation.SuperTenant
			}
			issuer := token.Issuer{Iss: k.Iss, Keys: keys, Tenant: k.Tenant, MaxLifetime: time.Hour}
			switch k.Iss {
			case extIss:
				issuer.AllowTypes = []string{"JWT"}
			case awayIss, darkIss:
				issuer.Keys = noKeys{}
			}
			issuers = append(issuers, issuer)
			if k.Iss != lostIss {
				k.ID, k.UUID = int32(i+1), fmt.Sprint("key-manager-", i+1)
				l.Entity(&k)
			}
		}
		for i, m := range []catalog.KeyMapping{
			{ConsumerKey: "app one", Iss: ourIss, Application: catalog.Ref{ID: 1}},
			{ConsumerKey: "app-1b", Iss: extIss, Application: catalog.Ref{ID: 1}},
			{ConsumerKey: "app-2", Iss: ourIss, Application: catalog.Ref{ID: 2}},
			{ConsumerKey: "app-2", Iss: extIss, Application: catalog.Ref{ID: 1}},
		} {
			m.ID, m.UUID, m.Tenant = int32(i+1), fmt.Sprint("mapping-", i+1), revocation.SuperTenant
			l.Entity(&m)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := token.NewVerifier(issuers...)
	if err != nil {
		t.Fatal(err)
	}
	w.verifier = &countingVerifier{Verifier: verifier}
	w.Endpoint, err = New(Config{}, Deps{
		Callers: callers, Verifier: w.verifier, State: w.state, Seen: w.state.seen, Registerer: w.reg,
	})
	if err != nil {
		t.Fatal(err)
	}
	w.now = func() time.Time { return time.Unix(frozen, 0) }
	return w
}

// with is a change of a header or of T1's claims; what is nil is absent.
type with map[string]any

// sign makes T1 with these changes.
func sign(t testing.TB, alg jose.SignatureAlgorithm, key any, header, changes with) string {
	t.Helper()
	claims := with{
		"iss": ourIss, "sub": "alice", "client_id": "app one", "aud": audience, "jti": "at-1", "scope": "read write", "sid": "s-1",
		"iat": frozen - 60, "exp": frozen + 600, "email": "alice@example.com", "username": "alice",
	}
	maps.Copy(claims, changes)
	absent := func(_ string, value any) bool { return value == nil }
	maps.DeleteFunc(claims, absent)
	opts := (&jose.SignerOptions{}).WithType("at+jwt").WithHeader("kid", "ec-1")
	for name, value := range header {
		opts.WithHeader(jose.HeaderKey(name), value)
	}
	maps.DeleteFunc(opts.ExtraHeaders, func(_ jose.HeaderKey, value any) bool { return value == nil })
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign(must(json.Marshal(claims)))
	if err != nil {
		t.Fatal(err)
	}
	return must(jws.CompactSerialize())
}

func mint(t testing.TB, changes with) string { return sign(t, jose.ES256, ecKey(), nil, changes) }

func basic(id string) string {
	r := http.Request{Header: http.Header{}}
	r.SetBasicAuth(id, "secret")
	return r.Header.Get("Authorization")
}

// ask posts a token.
func (w *world) ask(authorization, compact string) *http.Response {
	r := httptest.NewRequest(http.MethodPost, "/oauth2/introspect", strings.NewReader(url.Values{"token": {compact}}.Encode()))
	r.Header.Set("Authorization", authorization)
	recorder := httptest.NewRecorder()
	w.ServeHTTP(recorder, r)
	return recorder.Result()
}

func bodyOf(t testing.TB, res *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// count is how many requests had this result.
func (w *world) count(t testing.TB, result string) float64 {
	t.Helper()
	for _, family := range must(w.reg.Gather()) {
		for _, m := range family.GetMetric() {
			if m.GetLabel()[0].GetValue() == result {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no result %q", result)
	return 0
}

func TestActive(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fakeCallers{})
	const head, tail = `{"active":true,"iss":"https://km.example.com","sub":"alice",`,
		`"exp":1795209600,"iat":1795208940,"jti":"at-1","token_type":"Bearer"}`
	for _, tt := range []struct {
		name, caller, compact, want string
	}{
		{"its resource server", "gw-1", mint(t, nil), head + `"aud":"https://api.example.com","client_id":"app one","scope":"read write",` + tail},
		{"its client", "app one", mint(t, with{"aud": "https://far.example.com"}),
			head + `"aud":"https://far.example.com","client_id":"app one","scope":"read write",` + tail},
		{"a client of its application, of another issuer", "app-1b", mint(t, with{"aud": nil, "scope": nil}),
			head + `"client_id":"app one",` + tail},
		{"several audiences, fractions, nbf", "gw-1", mint(t, with{
			"aud": []string{"https://x.example", audience}, "exp": json.Number("1795209600.9"), "nbf": frozen + 30,
		}), head + `"aud":["https://x.example","https://api.example.com"],"client_id":"app one","scope":"read write",` +
			`"exp":1795209600,"iat":1795208940,"nbf":1795209030,"jti":"at-1","token_type":"Bearer"}`},
		{"an array of one, no jti, azp first", "gw-1", mint(t, with{"aud": []string{audience}, "jti": nil, "sub": nil, "azp": "app-2"}),
			`{"active":true,"iss":"https://km.example.com","aud":["https://api.example.com"],"client_id":"app-2","scope":"read write",` +
				`"exp":1795209600,"iat":1795208940,"token_type":"Bearer"}`},
		{"of another issuer in its tenant, typ JWT", "gw-1",
			sign(t, jose.ES256, ecKey(), with{"typ": "JWT"}, with{"iss": extIss, "scope": []string{"a", "b"}}),
			`{"active":true,"iss":"https://idp.example.com","sub":"alice","aud":"https://api.example.com","client_id":"app one","scope":"a b",` + tail},
		{"just before its end with leeway", "gw-1", mint(t, with{"exp": frozen - 29}),
			head + `"aud":"https://api.example.com","client_id":"app one","scope":"read write",` +
				`"exp":1795208971,"iat":1795208940,"jti":"at-1","token_type":"Bearer"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			res := w.ask(basic(tt.caller), tt.compact)
			if diff := cmp.Diff(tt.want, bodyOf(t, res)); diff != "" || res.StatusCode != http.StatusOK {
				t.Errorf("status %d, body (-want +got):\n%s", res.StatusCode, diff)
			}
			want := http.Header{"Cache-Control": {"no-store"}, "Content-Type": {"application/json"}, "Content-Length": {fmt.Sprint(len(tt.want))}}
			if diff := cmp.Diff(want, res.Header); diff != "" {
				t.Errorf("header (-want +got):\n%s", diff)
			}
		})
	}
}

func TestInactive(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fakeCallers{})
	good := mint(t, nil)
	revoked := func(target revocation.Target) *world {
		w := newWorld(t, fakeCallers{})
		w.state.revoke(t, target)
		return w
	}
	of := func(kind revocation.Kind, id string) revocation.Target {
		return revocation.Target{Kind: kind, Iss: ourIss, ID: id}
	}
	nameless := mint(t, with{"jti": nil})
	unsigned := "eyJhbGciOiJub25lIiwidHlwIjoiYXQrand0In0." + strings.Split(good, ".")[1] + "."
	for _, tt := range []struct {
		name            string
		w               *world
		caller, compact string
	}{
		{"no token at all", w, "gw-1", "zzz"},
		{"an encrypted one", w, "gw-1", "a.b.c.d.e"},
		{"forged", w, "gw-1", sign(t, jose.ES256, badKey(), nil, nil)},
		{"not signed", w, "gw-1", unsigned},
		{"of an unknown key", w, "gw-1", sign(t, jose.ES256, ecKey(), with{"kid": "ec-9"}, nil)},
		{"with a space behind it", w, "gw-1", good + " "},
		{"a claim of the wrong type", w, "gw-1", mint(t, with{"sub": 7})},
		{"of a stranger", w, "gw-1", mint(t, with{"iss": "https://evil.example"})},
		{"expired", w, "gw-1", mint(t, with{"exp": frozen - 30})},
		{"never expires", w, "gw-1", mint(t, with{"exp": nil})},
		{"not valid yet", w, "gw-1", mint(t, with{"nbf": frozen + 31})},
		{"issued in the future", w, "gw-1", mint(t, with{"iat": frozen + 31})},
		{"no iat", w, "gw-1", mint(t, with{"iat": nil})},
		{"lives too long", w, "gw-1", mint(t, with{"exp": frozen - 60 + 3601})},
		{"an event", w, "gw-1", sign(t, jose.ES256, ecKey(), with{"typ": "secevent+jwt"}, nil)},
		{"no typ", w, "gw-1", sign(t, jose.ES256, ecKey(), with{"typ": nil}, nil)},
		{"an ID token", w, "gw-1", sign(t, jose.ES256, ecKey(), with{"typ": "JWT"}, with{"iss": extIss, "at_hash": "x"})},
		{"of a disabled key manager", w, "gw-1", mint(t, with{"iss": offIss})},
		{"of a deleted key manager", w, "gw-1", mint(t, with{"iss": lostIss})},

		{"for another resource server", w, "gw-2", good},
		{"for nobody", w, "gw-1", mint(t, with{"aud": nil})},
		{"of another client", w, "app-2", good},
		{"of a client of that name elsewhere", w, "app one", mint(t, with{"iss": extIss, "aud": "https://far.example.com"})},
		{"of the same application by the name only", w, "app one", mint(t, with{"client_id": "app-2"})},
		{"of no client", w, "app one", mint(t, with{"client_id": nil})},
		{"for its audience, of another tenant", w, "gw-acme", good},
		{"for its audience, of another tenant's issuer", w, "gw-1", mint(t, with{"iss": acmeIss})},
		{"of another tenant's issuer, whose keys cannot be had", w, "gw-1", mint(t, with{"iss": darkIss})},

		{"revoked", revoked(of(revocation.KindToken, "at-1")), "gw-1", good},
		{"revoked, asked by its client", revoked(of(revocation.KindToken, "at-1")), "app one", good},
		{"revoked without jti", revoked(revocation.DigestTarget(ourIss, nameless[:strings.LastIndexByte(nameless, '.')])), "gw-1", nameless},
		{"session revoked", revoked(of(revocation.KindSession, "s-1")), "gw-1", good},
		{"client revoked", revoked(of(revocation.KindClient, "app one")), "gw-1", good},
		{"subject revoked", revoked(of(revocation.KindSubject, "alice")), "gw-1", good},
		{"key revoked", revoked(of(revocation.KindKey, "ec-1")), "gw-1", good},
		{"tenant revoked", revoked(revocation.Target{Kind: revocation.KindTenant, ID: "carbon.super"}), "gw-1", good},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			res := tt.w.ask(basic(tt.caller), tt.compact)
			want := http.Header{"Cache-Control": {"no-store"}, "Content-Type": {"application/json"}, "Content-Length": {"16"}}
			if body := bodyOf(t, res); res.StatusCode != http.StatusOK || body != `{"active":false}` {
				t.Errorf("answered %d %s", res.StatusCode, body)
			}
			if diff := cmp.Diff(want, res.Header); diff != "" {
				t.Errorf("header (-want +got):\n%s", diff)
			}
		})
	}
}

// A revocation of something else changes nothing, and one that is answered for is in the next
// answer, though its event was not applied yet.
func TestAnswersWithWhatWasAnsweredFor(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fakeCallers{})
	compact := mint(t, nil)
	active := func() bool { return strings.HasPrefix(bodyOf(t, w.ask(basic("gw-1"), compact)), `{"active":true`) }
	w.state.revoke(t, revocation.Target{Kind: revocation.KindToken, Iss: ourIss, ID: "at-2"})
	w.state.revoke(t, revocation.Target{Kind: revocation.KindToken, Iss: extIss, ID: "at-1"})
	if !active() {
		t.Error("inactive though others were revoked")
	}
	w.state.revoke(t, revocation.Target{Kind: revocation.KindToken, Iss: ourIss, ID: "at-1"})
	if active() {
		t.Error("active after the revocation was answered")
	}
	if a, i := w.count(t, resultActive), w.count(t, resultInactive); a != 1 || i != 1 {
		t.Errorf("counted %v active and %v inactive, want one of each", a, i)
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	const (
		challenge = `Bearer realm="oauth2", error="invalid_token"`
		basicOnly = `Basic realm="oauth2", charset="UTF-8"`
		noBearer  = `{"error":"invalid_token","error_description":"The Bearer token is not accepted."}` + "\n"
	)
	bearer := func(changes with) string {
		claims := with{"client_id": "gw-1", "sub": "gw-1", "aud": ourIss, "scope": "read introspect", "jti": "bt-1"}
		maps.Copy(claims, changes)
		return "Bearer " + mint(t, claims)
	}
	plain := newWorld(t, fakeCallers{})
	stale := newWorld(t, fakeCallers{})
	stale.state.err = errors.New("the log is further")
	ended := newWorld(t, fakeCallers{})
	ended.state.revoke(t, revocation.Target{Kind: revocation.KindToken, Iss: ourIss, ID: "bt-1"})
	good := mint(t, nil)
	for _, tt := range []struct {
		name          string
		w             *world
		authorization string
		compact       string
		status        int
		authenticate  string
		body          string
		result        string
	}{
		{"no credentials", plain, "", good, 401, basicOnly, `{"error":"invalid_client"}` + "\n", resultRefused},
		{"public client", plain, basic("spa-1"), good, 401, basicOnly,
			`{"error":"invalid_client","error_description":"A public client cannot ask about tokens."}` + "\n", resultRefused},
		{"no token", plain, basic("gw-1"), "", 400, "",
			`{"error":"invalid_request","error_description":"The parameter token is missing."}` + "\n", resultRefused},
		{"no token, and a stale replica", stale, basic("gw-1"), "", 400, "",
			`{"error":"invalid_request","error_description":"The parameter token is missing."}` + "\n", resultRefused},
		{"another method", newWorld(t, fakeCallers{err: &authn.OAuthError{Status: 405, Code: authn.InvalidRequest}}), basic("gw-1"), good,
			405, "", `{"error":"invalid_request"}` + "\n", resultRefused},
		{"throttled", newWorld(t, fakeCallers{err: authn.TooMany("Wait.", time.Second)}), basic("gw-1"), good, 429, "",
			`{"error":"temporarily_unavailable","error_description":"Wait."}` + "\n", resultThrottled},
		{"broken", newWorld(t, fakeCallers{err: errors.New("secret")}), basic("gw-1"), good, 500, "",
			`{"error":"server_error","error_description":"Something went wrong on our side."}` + "\n", resultFailed},

		{"stale replica", stale, basic("gw-1"), good, 503, "", "", resultUnavailable},
		{"stale replica, no JWT", stale, basic("gw-1"), "zzz", 503, "", "", resultUnavailable},
		{"no keys", plain, basic("gw-1"), mint(t, with{"iss": awayIss}), 503, "", "", resultUnavailable},

		{"expired Bearer", plain, bearer(with{"exp": frozen - 30}), good, 401, challenge, noBearer, resultRefused},
		{"expired Bearer, no token", plain, bearer(with{"exp": frozen - 30}), "", 401, challenge, noBearer, resultRefused},
		{"Bearer is no JWT", plain, "Bearer zzz", good, 401, challenge, noBearer, resultRefused},
		{"Bearer forged", plain, "Bearer " + sign(t, jose.ES256, badKey(), nil, nil), good, 401, challenge, noBearer, resultRefused},
		{"Bearer revoked", ended, bearer(nil), good, 401, challenge, noBearer, resultRefused},
		{"Bearer for others", plain, bearer(with{"aud": audience}), good, 401, challenge, noBearer, resultRefused},
		{"Bearer of an external issuer", plain, bearer(with{"iss": extIss, "aud": extIss, "client_id": "app-1b"}), good, 401, challenge, noBearer, resultRefused},
		{"Bearer for another issuer of ours", plain, bearer(with{"iss": acmeIss, "client_id": "gw-acme"}), good, 401, challenge, noBearer, resultRefused},
		{"Bearer of an unknown client", plain, bearer(with{"client_id": "gone"}), good, 401, challenge, noBearer, resultRefused},
		{"Bearer of another issuer's client", plain, bearer(with{"client_id": "app-1b"}), good, 401, challenge, noBearer, resultRefused},
		{"Bearer of a public client", plain, bearer(with{"client_id": "spa-1"}), good, 401, challenge, noBearer, resultRefused},
		{"Bearer without the scope", plain, bearer(with{"scope": "read xintrospect introspect2"}), good, 403,
			`Bearer realm="oauth2", error="insufficient_scope", scope="introspect"`,
			`{"error":"insufficient_scope","error_description":"The Bearer token lacks the scope introspect."}` + "\n", resultRefused},
		{"Bearer of an external issuer without keys", plain, bearer(with{"iss": awayIss}), good, 401, challenge, noBearer, resultRefused},
		{"Bearer without keys", plain, bearer(with{"iss": darkIss}), good, 503, "", "", resultUnavailable},
		{"Bearer, and no database", newWorld(t, fakeCallers{clientErr: authn.Unavailable(time.Second, nil)}), bearer(nil), good,
			503, "", "", resultUnavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := tt.w.count(t, tt.result)
			res := tt.w.ask(tt.authorization, tt.compact)
			if tt.status == http.StatusServiceUnavailable {
				tt.body = `{"error":"temporarily_unavailable","error_description":"This cannot be done now. Sending the request again is safe, with a new client assertion if it has one."}` + "\n"
				if res.Header.Get("Retry-After") == "" {
					t.Error("no Retry-After")
				}
			}
			if diff := cmp.Diff(tt.body, bodyOf(t, res)); diff != "" || res.StatusCode != tt.status {
				t.Errorf("status %d, want %d, body (-want +got):\n%s", res.StatusCode, tt.status, diff)
			}
			if got := strings.Join(res.Header["Www-Authenticate"], "\n"); got != tt.authenticate {
				t.Errorf("WWW-Authenticate %q, want %q", got, tt.authenticate)
			}
			if res.Header.Get("Cache-Control") != "no-store" || res.Header.Get("Content-Type") != "application/json" {
				t.Errorf("header %v, want JSON that is not stored", res.Header)
			}
			if got := tt.w.count(t, tt.result); got != before+1 {
				t.Errorf("%s counted %v times, want one more than %v", tt.result, got, before)
			}
		})
	}

	res := plain.ask(bearer(nil), good)
	if body := bodyOf(t, res); !strings.HasPrefix(body, `{"active":true`) {
		t.Errorf("with a Bearer token of its resource server: %d %s", res.StatusCode, body)
	}
	if body := bodyOf(t, plain.ask(bearer(with{"client_id": "gw-2"}), good)); body != `{"active":false}` {
		t.Errorf("with a Bearer token of another resource server: %s", body)
	}
}

// Who has proved nothing gets no further than the issuers of our own, and nobody to those of
// another tenant.
func TestVerifiesOnlyWhatMayConcernTheCaller(t *testing.T) {
	t.Parallel()
	bearer := func(iss string) string {
		return "Bearer " + mint(t, with{"iss": iss, "aud": iss, "client_id": "gw-1", "scope": "introspect"})
	}
	of := func(iss string) string { return mint(t, with{"iss": iss}) }
	for _, tt := range []struct {
		name, authorization, compact string
		status, verified, failed     int
	}{
		{"good", bearer(ourIss), of(ourIss), 200, 2, 0},
		{"an external issuer's Bearer", bearer(extIss), of(ourIss), 401, 0, 1},
		{"one without keys", bearer(awayIss), of(ourIss), 401, 0, 1},
		{"a disabled one", bearer(offIss), of(ourIss), 401, 0, 1},
		{"a deleted one", bearer(lostIss), of(ourIss), 401, 0, 1},
		{"a stranger's", bearer("https://evil.example"), of(ourIss), 401, 0, 1},
		{"no JWT", "Bearer *", of(ourIss), 401, 0, 1},
		{"a forged one", "Bearer " + sign(t, jose.ES256, badKey(), nil, nil), of(ourIss), 401, 1, 1},
		{"one of another issuer's client", bearer(acmeIss), of(ourIss), 401, 1, 1},
		{"one that cannot be verified now", bearer(darkIss), of(ourIss), 503, 1, 0},
		{"one without the scope", "Bearer " + mint(t, with{"aud": ourIss, "client_id": "gw-1"}), of(ourIss), 403, 1, 0},
		{"about an external issuer's token", basic("gw-1"), of(extIss), 200, 1, 0},
		{"about that of another tenant", basic("gw-1"), of(acmeIss), 200, 0, 0},
		{"about that of another tenant, without keys", basic("gw-1"), of(darkIss), 200, 0, 0},
		{"about that of a stranger", basic("gw-1"), of("https://evil.example"), 200, 0, 0},
		{"about that of a disabled issuer", basic("gw-1"), of(offIss), 200, 0, 0},
		{"wrong credentials", basic("gw-9"), of(ourIss), 401, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			failed := 0
			w := newWorld(t, fakeCallers{failed: &failed})
			res := w.ask(tt.authorization, tt.compact)
			if n := int(w.verifier.n.Load()); res.StatusCode != tt.status || n != tt.verified || failed != tt.failed {
				t.Errorf("status %d after %d verifications, with %d failures counted, want %d, %d, %d",
					res.StatusCode, n, failed, tt.status, tt.verified, tt.failed)
			}
		})
	}
}

func TestTimeout(t *testing.T) {
	t.Parallel()
	for _, authorization := range []string{basic("gw-1"), "Bearer " + mint(t, nil)} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, fakeCallers{})
			w.state.stuck = true
			begun := time.Now()
			res := w.ask(authorization, mint(t, nil))
			if took := time.Since(begun); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || took != 10*time.Second {
				t.Errorf("status %d after %s, want 503 after 10s", res.StatusCode, took)
			}
		})
	}
}

// recorder is the ResponseWriter of the service, as far as this package knows it.
type recorder struct {
	*httptest.ResponseRecorder
	client string
	err    error
}

func (r *recorder) RecordClient(id string) { r.client = id }
func (r *recorder) RecordError(err error)  { r.err = err }

func TestRecordsCallersAndErrors(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fakeCallers{})
	for _, tt := range []struct {
		name, scope, client string
		err                 error
	}{
		{"accepted", "introspect", "gw-1", nil},
		{"refused", "read", "", errScope},
	} {
		r := httptest.NewRequest(http.MethodPost, "/oauth2/introspect", strings.NewReader("token=zzz"))
		r.Header.Set("Authorization", "Bearer "+mint(t, with{"client_id": "gw-1", "aud": ourIss, "scope": tt.scope}))
		got := &recorder{ResponseRecorder: httptest.NewRecorder()}
		w.ServeHTTP(got, r)
		if got.client != tt.client || !errors.Is(got.err, tt.err) {
			t.Errorf("%s: recorded client %q and error %v, want %q and %v", tt.name, got.client, got.err, tt.client, tt.err)
		}
	}
}

func TestNewReportsAll(t *testing.T) {
	t.Parallel()
	_, err := New(Config{Leeway: time.Hour, Timeout: time.Minute}, Deps{})
	if err == nil {
		t.Fatal("New accepts what it must refuse")
	}
	for _, want := range []string{"leeway of 1h0m0s", "2m0s", "timeout of 1m0s", "Callers", "Verifier", "State", "Seen", "Registerer"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not name %s: %v", want, err)
		}
	}
}
