package authn

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/pgtest"
)

const (
	issOwn      = "https://km.example.com"
	issExternal = "https://idp.example.org"
	issOther    = "https://km.example.com/t/other"
)

// newDatabase has the issuers of two tenants and an application of the first.
func newDatabase(t testing.TB) (*pgxpool.Pool, int32) {
	t.Helper()
	pool := pgtest.New(t)
	_, err := pool.Exec(t.Context(), `INSERT INTO rescind.tenants (id, domain) VALUES (7, 'other')`)
	if err == nil {
		_, err = pool.Exec(t.Context(), `
INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime)
VALUES (-1234, 'own', true, $1, 3600), (-1234, 'external', false, $2, 7200), (7, 'own', true, $3, 3600)`,
			issOwn, issExternal, issOther)
	}
	if err != nil {
		t.Fatal(err)
	}
	app, err := newOn(t, pool).CreateApplication(t.Context(), testApplication)
	if err != nil {
		t.Fatal(err)
	}
	return pool, app.ID
}

var testApplication = Application{TenantID: -1234, Owner: "admin", Name: "PizzaShack"}

// newOn is one process on pool.
func newOn(t testing.TB, pool *pgxpool.Pool, keys ...MasterKey) *Authenticator {
	t.Helper()
	if len(keys) == 0 {
		keys = []MasterKey{testKey(t, "k")}
	}
	a, err := New(Config{}, pool, keys, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func mustCreate(t testing.TB, a *Authenticator, r Registration) Credentials {
	t.Helper()
	cred, err := a.CreateClient(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return cred
}

func (a *Authenticator) try(id, secret string) (Client, int) {
	r := postForm("", "Authorization", basicOf(strings.ReplaceAll(id, " ", "+")+":"+secret))
	client, _, err := a.Form(httptest.NewRecorder(), r)
	if err != nil {
		w := httptest.NewRecorder()
		WriteError(w, err)
		return client, w.Code
	}
	return client, http.StatusOK
}

func TestClientIsWhatWasRegistered(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	full := Registration{
		ID: "app one", ApplicationID: app, Issuer: issExternal, KeyType: "SANDBOX", AuthMethod: "client_secret_post", Secret: "s3cret",
		Scopes: []string{"read", "write"}, DefaultScopes: []string{"read"}, Audience: []string{"https://api.example.com"},
		TokenLifetime: 60, RevokeOpaque: true, RevokeQuota: 100,
	}
	mustCreate(t, a, full)
	cred := mustCreate(t, a, Registration{ApplicationID: app, Issuer: issOwn, RevokeByJTI: true})
	mustCreate(t, a, Registration{ID: "opaque", Secret: "x", ApplicationID: app, Issuer: issOwn, RevokeOpaque: true})

	tests := []struct {
		id, secret string
		want       Client
	}{
		{"app one", "s3cret", Client{
			ID: "app one", ApplicationID: app, Tenant: revocation.SuperTenant, Issuer: issExternal, MaxTokenLifetime: 2 * time.Hour,
			Scopes: full.Scopes, DefaultScopes: full.DefaultScopes, Audience: full.Audience,
			TokenLifetime: time.Minute, RevokeOpaque: true, RevokeQuota: 100,
		}},
		{cred.ID, cred.Secret, Client{
			ID: cred.ID, ApplicationID: app, Tenant: revocation.SuperTenant, Issuer: issOwn, MaxTokenLifetime: time.Hour,
			Scopes: []string{}, DefaultScopes: []string{}, Audience: []string{}, RevokeByJTI: true,
		}},
		{"opaque", "x", Client{ // our own issuer has no tokens that we cannot read
			ID: "opaque", ApplicationID: app, Tenant: revocation.SuperTenant, Issuer: issOwn, MaxTokenLifetime: time.Hour,
			Scopes: []string{}, DefaultScopes: []string{}, Audience: []string{},
		}},
	}
	for _, tt := range tests {
		got, status := a.try(tt.id, tt.secret)
		if diff := cmp.Diff(tt.want, got); diff != "" || status != 200 {
			t.Errorf("%s: status %d (-want +got):\n%s", tt.id, status, diff)
		}
	}

	var clear bool
	err := pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM rescind.client_secrets s WHERE s::text LIKE '%s3cret%' OR position('s3cret'::bytea IN mac) > 0)`).Scan(&clear)
	if err != nil || clear {
		t.Errorf("a secret is stored in the clear: %t, %v", clear, err)
	}
}

func TestCreateIsIdempotent(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a, b := newOn(t, pool), newOn(t, pool)
	again, err := a.CreateApplication(t.Context(), testApplication)
	if err != nil || again.ID != app || again.UUID == "" {
		t.Errorf("%+v, %v, want the application that is there, %d", again, err, app)
	}
	const uuid = "01234567-89ab-4def-8123-456789abcdef"
	if named, err := a.CreateApplication(t.Context(), Application{UUID: uuid, TenantID: 7, Owner: "o", Name: "n"}); err != nil || named.UUID != uuid {
		t.Errorf("%+v, %v, want the UUID that was given", named, err)
	}

	registration := Registration{ID: "c", Secret: "given", ApplicationID: app, Issuer: issOwn}
	var group sync.WaitGroup
	for _, process := range []*Authenticator{a, b} {
		for range 3 {
			group.Go(func() {
				if cred, err := process.CreateClient(t.Context(), registration); err != nil || cred != (Credentials{"c", "given"}) {
					t.Errorf("%v, %v", cred, err)
				}
			})
		}
	}
	group.Wait()
	var secrets int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.client_secrets`).Scan(&secrets); err != nil || secrets != 1 {
		t.Errorf("%d secrets, %v, want 1", secrets, err)
	}
	registration.Secret = ""
	if cred, err := a.CreateClient(t.Context(), registration); err != nil || cred != (Credentials{ID: "c"}) {
		t.Errorf("%v, %v, want no new secret for a client that is there", cred, err)
	}
	if _, status := a.try("c", "given"); status != 200 {
		t.Errorf("status %d", status)
	}
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	mustCreate(t, a, Registration{ID: "c", ApplicationID: app, Issuer: issOwn})
	mustCreate(t, a, Registration{ID: "public", ApplicationID: app, Issuer: issOwn, AuthMethod: "none"})
	second, err := a.CreateApplication(t.Context(), Application{TenantID: -1234, Owner: "admin", Name: "second"})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.CreateAccount(t.Context(), Account{Username: "u", Tenant: revocation.SuperTenant, Role: "admin"}, "pw"); err != nil {
		t.Fatal(err)
	}
	_, rotatePublic := a.RotateSecret(t.Context(), "public", "")
	_, rotateNobody := a.RotateSecret(t.Context(), "nobody", "")
	create := func(r Registration) error { _, err := a.CreateClient(t.Context(), r); return err }
	account := func(name, role, password string) error {
		return a.CreateAccount(t.Context(), Account{Username: name, Tenant: revocation.SuperTenant, Role: role}, password)
	}
	for name, tt := range map[string]struct{ err, want error }{
		"another application's client":  {create(Registration{ID: "c", ApplicationID: second.ID, Issuer: issOwn}), ErrExists},
		"the same id at another issuer": {create(Registration{ID: "c", ApplicationID: app, Issuer: issExternal}), ErrExists},
		"another tenant's issuer":       {create(Registration{ID: "d", ApplicationID: app, Issuer: issOther}), ErrNotFound},
		"no such application":           {create(Registration{ID: "d", ApplicationID: -1, Issuer: issOwn}), ErrNotFound},
		"an account's name":             {create(Registration{ID: "u", ApplicationID: app, Issuer: issOwn}), ErrExists},
		"a client's name":               {account("c", "admin", "pw"), ErrExists},
		"another role":                  {account("u", "gateway", "pw"), ErrExists},
		"a colon in a name":             {account("a:b", "admin", "pw"), nil},
		"no password":                   {account("v", "admin", ""), nil},
		"an unknown role":               {account("v", "king", "pw"), nil},
		"an id with a line end":         {create(Registration{ID: "a\nb", ApplicationID: app, Issuer: issOwn}), nil},
		"a public client's secret":      {create(Registration{ID: "d", Secret: "s", AuthMethod: "none", ApplicationID: app, Issuer: issOwn}), nil},
		"a long secret":                 {create(Registration{ID: "d", Secret: strings.Repeat("s", 1025), ApplicationID: app, Issuer: issOwn}), nil},
		"by jti and opaque":             {create(Registration{ID: "d", RevokeByJTI: true, RevokeOpaque: true, ApplicationID: app, Issuer: issOwn}), nil},
		"rotation for a public client":  {rotatePublic, nil},
		"rotation for nobody":           {rotateNobody, ErrNotFound},
	} {
		if tt.err == nil || tt.want != nil && !errors.Is(tt.err, tt.want) {
			t.Errorf("%s: %v, want %v", name, tt.err, tt.want)
		}
	}
	var left int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.key_mappings WHERE consumer_key NOT IN ('c', 'public')`).Scan(&left); err != nil || left != 0 {
		t.Errorf("%d key mappings, %v, are left of what was refused", left, err)
	}
}

func TestRotation(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	here, there := newOn(t, pool), newOn(t, pool)
	first := mustCreate(t, here, Registration{ID: "c", ApplicationID: app, Issuer: issOwn}).Secret
	second, err := here.RotateSecret(t.Context(), "c", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{first, second} {
		for _, a := range []*Authenticator{here, there} {
			if _, status := a.try("c", secret); status != 200 {
				t.Errorf("status %d, want both secrets to work", status)
			}
		}
	}
	if third, err := here.RotateSecret(t.Context(), "c", "given third"); err != nil || third != "given third" {
		t.Fatalf("%q, %v", third, err)
	}
	for secret, want := range map[string]int{first: 401, second: 200, "given+third": 200} {
		if _, status := here.try("c", secret); status != want {
			t.Errorf("status %d after the second rotation, want %d", status, want)
		}
	}
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.client_secrets SET expires_at = now()`); err != nil {
		t.Fatal(err)
	}
	if _, status := newOn(t, pool).try("c", second); status != 401 {
		t.Errorf("status %d with an expired secret, want 401", status)
	}
}

func TestMasterKeyRotation(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	old, current := testKey(t, "o"), testKey(t, "n")
	secret := mustCreate(t, newOn(t, pool, old), Registration{ID: "c", ApplicationID: app, Issuer: issOwn}).Secret
	both := newOn(t, pool, current, old)
	if _, status := both.try("c", secret); status != 200 {
		t.Errorf("status %d with both keys, want 200", status)
	}
	newer, err := both.RotateSecret(t.Context(), "c", "")
	if err != nil {
		t.Fatal(err)
	}
	var logged bytes.Buffer
	alone, err := New(Config{}, pool, []MasterKey{current}, prometheus.NewRegistry(), slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	for s, want := range map[string]int{secret: 401, newer: 200} {
		if _, status := alone.try("c", s); status != want {
			t.Errorf("status %d without the old key, want %d", status, want)
		}
	}
	if s := logged.String(); !strings.Contains(s, old.ID()) || strings.Contains(s, secret) {
		t.Errorf("the log must name the key that lacks and no secret: %s", s)
	}
	if s := fmt.Sprintf("%v %+v %#v %s %d %x", old, old, old, old, old, old); strings.Contains(s, "111") || strings.Contains(s, "6f6f") || strings.Contains(s, "ooo") {
		t.Errorf("printing a key shows it: %s", s)
	}
}

func TestOwner(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	mustCreate(t, a, Registration{ID: "c", ApplicationID: app, Issuer: issExternal})
	tests := []struct {
		iss, key string
		want     bool
	}{
		{issExternal, "c", true}, {issOwn, "c", false}, {issExternal, "C", false}, {issExternal, "", false},
		{"https://nobody.example", "c", false}, {issExternal, "c\x00", false}, {issExternal, "\xff", false},
		{issExternal, strings.Repeat("c", 256), false},
	}
	for _, tt := range tests {
		got, ok, err := a.Owner(t.Context(), tt.iss, tt.key)
		if err != nil || ok != tt.want || ok && got != app {
			t.Errorf("%q, %q: %d, %t, %v", tt.iss, tt.key, got, ok, err)
		}
	}
	if _, ok, err := newOn(t, pool).Owner(t.Context(), issExternal, "new"); ok || err != nil {
		t.Fatalf("%t, %v", ok, err)
	}
	mustCreate(t, a, Registration{ID: "new", ApplicationID: app, Issuer: issExternal})
	if _, ok, err := a.Owner(t.Context(), issExternal, "new"); !ok || err != nil {
		t.Errorf("a key mapping that was made here is not seen: %v", err)
	}
}

func TestPostgresAway(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	seen := mustCreate(t, a, Registration{ID: "seen", ApplicationID: app, Issuer: issOwn}).Secret
	unseen := mustCreate(t, a, Registration{ID: "unseen", ApplicationID: app, Issuer: issOwn}).Secret
	if _, status := a.try("seen", seen); status != 200 {
		t.Fatalf("status %d", status)
	}
	pool.Close()
	if _, status := a.try("seen", seen); status != 200 {
		t.Errorf("status %d for a client that was seen, want 200", status)
	}
	if _, status := a.try("unseen", unseen); status != 503 {
		t.Errorf("status %d for a client that was not seen, want 503", status)
	}
	if _, _, err := a.Owner(t.Context(), issOwn, "unseen"); err == nil {
		t.Error("whose a token is was answered without the database")
	}
	_, err := a.Account(accountRequest("u", "pw"))
	if e, ok := errors.AsType[*OAuthError](err); !ok || e.Status != 503 {
		t.Errorf("an account got %v, want 503", err)
	}
}

func accountRequest(user, password string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/v1/x", nil)
	r.SetBasicAuth(user, password)
	return r
}

func TestAccount(t *testing.T) {
	t.Parallel()
	pool, _ := newDatabase(t)
	a := newOn(t, pool)
	admin := Account{Username: "admin", Tenant: revocation.SuperTenant, Role: "admin"}
	if err := a.CreateAccount(t.Context(), admin, "pä:ss%41"); err != nil {
		t.Fatal(err)
	}
	status := func(r *http.Request) int {
		_, err := a.Account(r)
		if e, ok := errors.AsType[*OAuthError](err); ok {
			return e.Status
		} else if err != nil {
			t.Error(err)
		}
		return 200
	}
	got, err := a.Account(accountRequest("admin", "pä:ss%41"))
	if diff := cmp.Diff(admin, got); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	two := accountRequest("admin", "pä:ss%41")
	two.Header.Add("Authorization", two.Header.Get("Authorization"))
	for name, tt := range map[string]struct {
		r    *http.Request
		want int
	}{
		"again":            {accountRequest("admin", "pä:ss%41"), 200},
		"decoded":          {accountRequest("admin", "pä:ssA"), 401},
		"unknown":          {accountRequest("nobody", "pä:ss%41"), 401},
		"no password":      {accountRequest("admin", ""), 401},
		"no such account":  {accountRequest("nobody", ""), 401},
		"no credentials":   {httptest.NewRequest(http.MethodGet, "/", nil), 401},
		"two credentials":  {two, 401},
		"name with NUL":    {accountRequest("\x00", "x"), 401},
		"name of 256":      {accountRequest(strings.Repeat("a", 256), "x"), 401},
		"a client's creds": {postForm("", "Authorization", basicTwo), 401},
	} {
		if got := status(tt.r); got != tt.want {
			t.Errorf("%s: status %d, want %d", name, got, tt.want)
		}
	}

	// Right passwords are remembered together with what they matched.
	if err := a.CreateAccount(t.Context(), admin, "new"); err != nil {
		t.Fatal(err)
	}
	if got := status(accountRequest("admin", "new")); got != 200 {
		t.Errorf("the new password got %d, want 200", got)
	}
	if got := status(accountRequest("admin", "pä:ss%41")); got != 401 {
		t.Errorf("the old password got %d, want 401", got)
	}
	for range 20 {
		status(accountRequest("admin", "x"))
	}
	if got := status(accountRequest("admin", "x")); got != 429 {
		t.Errorf("status %d after many failures, want 429", got)
	}
}

func TestPHC(t *testing.T) {
	t.Parallel()
	p := newPHC("password")
	read, err := parsePHC(p.String())
	if err != nil || !bytes.Equal(read.hash("password"), p.sum) || bytes.Equal(read.hash("passwore"), p.sum) {
		t.Errorf("%v: the hash does not survive writing and reading", err)
	}
	// From the reference implementation's tests: argon2id, version 19.
	const reference = "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4"
	known, err := parsePHC(reference)
	if err != nil || !bytes.Equal(known.hash("password"), known.sum) || known.String() != reference {
		t.Errorf("%v: the reference hash does not match", err)
	}
	for _, s := range []string{
		"", "x", "$argon2i$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4",
		strings.Replace(reference, "v=19", "v=16", 1), strings.Replace(reference, "m=256", "m=99999999", 1),
		strings.Replace(reference, "t=2", "t=0", 1), strings.Replace(reference, "p=1", "p=0", 1), strings.Replace(reference, "c29tZXNhbHQ", "c2", 1),
		strings.Replace(reference, "m=256,t=2,p=1", "m=256", 1), reference + "$", strings.Replace(reference, "c29tZXNhbHQ", "!!!!", 1),
	} {
		if _, err := parsePHC(s); err == nil {
			t.Errorf("%q is taken for a hash", s)
		}
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	bad := Config{Freshness: time.Hour, MaxLookups: -1, TrustedProxies: prefixes("10.0.0.0/8")}
	_, err := New(bad, nil, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	for _, name := range []string{"Freshness", "MaxLookups", "master key"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v: want every mistake, also %s", err, name)
		}
	}
	if _, err := NewMasterKey(make([]byte, 31)); err == nil {
		t.Error("a short master key is taken")
	}
}

// BenchmarkForm compares a request of a client that is remembered with one that
// asks the database each time, as if there were no memory.
func BenchmarkForm(b *testing.B) {
	pool, app := newDatabase(b)
	a := newOn(b, pool)
	cred := mustCreate(b, a, Registration{ApplicationID: app, Issuer: issOwn})
	r := func() *http.Request {
		return postForm("token="+strings.Repeat("x", 800), "Authorization", basicOf(cred.ID+":"+cred.Secret))
	}
	for _, bb := range []struct {
		name   string
		before func()
	}{
		{"remembered", func() {}},
		{"baseline/query", func() { a.clients.forget(cred.ID) }},
	} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				bb.before()
				if _, _, err := a.Form(httptest.NewRecorder(), r(), "token", "token_type_hint"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("baseline/no authentication", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := readForm(httptest.NewRecorder(), r(), nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}
