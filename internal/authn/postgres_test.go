package authn

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
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
	return pool, newApplication(t, pool, "PizzaShack")
}

func newApplication(t testing.TB, pool *pgxpool.Pool, name string) (id int32) {
	t.Helper()
	const sql = `INSERT INTO rescind.applications (tenant_id, owner, name) VALUES (-1234, 'admin', $1) RETURNING id`
	if err := pool.QueryRow(t.Context(), sql, name).Scan(&id); err != nil {
		t.Fatal(err)
	}
	return id
}

// newMapping maps a consumer key as the catalog does.
func newMapping(t testing.TB, pool *pgxpool.Pool, app int32, iss, consumerKey string) (id int32) {
	t.Helper()
	const sql = `
INSERT INTO rescind.key_mappings (application_id, key_manager_id, consumer_key, key_type)
SELECT $1, id, $3, 'PRODUCTION' FROM rescind.key_managers WHERE iss = $2
RETURNING id`
	if err := pool.QueryRow(t.Context(), sql, app, iss, consumerKey).Scan(&id); err != nil {
		t.Fatal(err)
	}
	return id
}

func (a *Authenticator) store(ctx context.Context, mapping int32, r Registration) (cred Credentials, err error) {
	err = pgx.BeginFunc(ctx, a.pool, func(tx pgx.Tx) error {
		cred, err = a.StoreClient(ctx, tx, mapping, r)
		return err
	})
	return cred, err
}

func (a *Authenticator) rotate(ctx context.Context, id string, r Rotation) (secret string, err error) {
	err = pgx.BeginFunc(ctx, a.pool, func(tx pgx.Tx) error {
		secret, err = a.RotateClient(ctx, tx, id, r)
		return err
	})
	a.Forget(issOwn, id)
	return secret, err
}

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

// mustCreate makes a client with a key mapping of its own.
func mustCreate(t testing.TB, a *Authenticator, app int32, iss string, r Registration) Credentials {
	t.Helper()
	if r.ID == "" {
		r.ID = rand.Text()
	}
	cred, err := a.store(t.Context(), newMapping(t, a.pool, app, iss, r.ID), r)
	if err != nil {
		t.Fatal(err)
	}
	a.Forget(iss, r.ID)
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
		ID: "app one", AuthMethod: "client_secret_post", Secret: "s3cret",
		Scopes: []string{"read", "write"}, DefaultScopes: []string{"read"}, Audience: []string{"https://api.example.com"},
		TokenLifetime: 60, RevokeOpaque: true, RevokeQuota: 100,
		GrantTypes: []string{}, TokenTyp: "JWT", ResourceAudiences: []string{"https://api.example.com"},
	}
	mustCreate(t, a, app, issExternal, full)
	cred := mustCreate(t, a, app, issOwn, Registration{RevokeByJTI: true})
	mustCreate(t, a, app, issOwn, Registration{ID: "opaque", Secret: "x", RevokeOpaque: true})

	tests := []struct {
		id, secret string
		want       Client
	}{
		{"app one", "s3cret", Client{
			ID: "app one", ApplicationID: app, Tenant: revocation.SuperTenant, Issuer: issExternal, MaxTokenLifetime: 2 * time.Hour,
			Scopes: full.Scopes, DefaultScopes: full.DefaultScopes, Audience: full.Audience,
			TokenLifetime: time.Minute, RevokeOpaque: true, RevokeQuota: 100,
			GrantTypes: []string{}, TokenTyp: "JWT", ResourceAudiences: []string{"https://api.example.com"},
		}},
		{cred.ID, cred.Secret, Client{
			ID: cred.ID, ApplicationID: app, Tenant: revocation.SuperTenant, Issuer: issOwn, MaxTokenLifetime: time.Hour,
			Scopes: []string{}, DefaultScopes: []string{}, Audience: []string{}, RevokeByJTI: true,
			GrantTypes: []string{"client_credentials"}, TokenTyp: "at+jwt", ResourceAudiences: []string{},
		}},
		{"opaque", "x", Client{ // our own issuer has no tokens that we cannot read
			ID: "opaque", ApplicationID: app, Tenant: revocation.SuperTenant, Issuer: issOwn, MaxTokenLifetime: time.Hour,
			Scopes: []string{}, DefaultScopes: []string{}, Audience: []string{},
			GrantTypes: []string{"client_credentials"}, TokenTyp: "at+jwt", ResourceAudiences: []string{},
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

func TestStoreClientIsIdempotent(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a, b := newOn(t, pool), newOn(t, pool)
	mapping := newMapping(t, pool, app, issOwn, "c")
	registration := Registration{Secret: "given"}
	var group sync.WaitGroup
	for _, process := range []*Authenticator{a, b} {
		for range 3 {
			group.Go(func() {
				if cred, err := process.store(t.Context(), mapping, registration); err != nil || cred != (Credentials{"c", "given"}) {
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
	if cred, err := a.store(t.Context(), mapping, registration); err != nil || cred != (Credentials{ID: "c"}) {
		t.Errorf("%v, %v, want no new secret for a client that is there", cred, err)
	}
	if _, status := a.try("c", "given"); status != 200 {
		t.Errorf("status %d", status)
	}
}

// What is stored in a transaction that is rolled back was never there.
func TestStoreClientIsOfItsTransaction(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	mapping := newMapping(t, pool, app, issOwn, "c")
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.StoreClient(t.Context(), tx, mapping, Registration{Secret: "s"}); err != nil {
		t.Fatal(err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, status := a.try("c", "s"); status != 401 {
		t.Errorf("status %d, want 401", status)
	}
}

func TestStoreClientRefuses(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	mustCreate(t, a, app, issOwn, Registration{ID: "c"})
	mustCreate(t, a, app, issOwn, Registration{ID: "public", AuthMethod: "none"})
	if err := a.PutAccount(t.Context(), Account{Username: "u", Tenant: revocation.SuperTenant, Role: "admin"}, "pw"); err != nil {
		t.Fatal(err)
	}
	_, rotatePublic := a.rotate(t.Context(), "public", Rotation{})
	_, rotateNobody := a.rotate(t.Context(), "nobody", Rotation{})
	mustCreate(t, a, app, issOwn, Registration{ID: "keys", AuthMethod: "private_key_jwt", JWKS: jwksOf(publicKey("", "", ecTestKey().Public()))})
	_, rotateKeys := a.rotate(t.Context(), "keys", Rotation{})
	_, rotateKeysToSecret := a.rotate(t.Context(), "keys", Rotation{Secret: "s", JWKS: jwksOf(publicKey("", "", ecOtherKey().Public()))})
	_, rotateToPrivate := a.rotate(t.Context(), "keys", Rotation{JWKS: jwksOf(publicKey("", "", ecOtherKey()))})
	_, rotateToKeys := a.rotate(t.Context(), "c", Rotation{JWKS: jwksOf(publicKey("", "", ecOtherKey().Public()))})
	_, rotatePublicToKeys := a.rotate(t.Context(), "public", Rotation{JWKS: jwksOf(publicKey("", "", ecOtherKey().Public()))})
	_, rotateLong := a.rotate(t.Context(), "c", Rotation{Secret: strings.Repeat("s", 1025)})
	_, rotateBytes := a.rotate(t.Context(), "c", Rotation{Secret: "\xff"})
	second := newApplication(t, pool, "second")
	create := func(app int32, iss, key string, r Registration) error {
		_, err := a.store(t.Context(), newMapping(t, pool, app, iss, key), r)
		return err
	}
	free := newMapping(t, pool, app, issOwn, "d")
	refuse := func(r Registration) error { _, err := a.store(t.Context(), free, r); return err }
	var keysMapping int32
	if err := pool.QueryRow(t.Context(), `SELECT key_mapping_id FROM rescind.clients WHERE client_id = 'keys'`).Scan(&keysMapping); err != nil {
		t.Fatal(err)
	}
	_, secretForKeys := a.store(t.Context(), keysMapping, Registration{Secret: "s"})
	_, noMapping := a.store(t.Context(), -1, Registration{ID: "d"})
	const scopes, audience = "#/scopes/0", "#/audience/0"
	for name, tt := range map[string]struct {
		err     error
		want    error
		pointer string // of a [catalog.Invalid]
	}{
		"another application's client": {create(second, issExternal, "c", Registration{}), ErrExists, ""},
		"no such mapping":              {noMapping, ErrNotFound, ""},
		"an account's name":            {create(app, issOwn, "u", Registration{}), ErrExists, ""},
		"another id than its mapping":  {refuse(Registration{ID: "D"}), nil, ""},
		"an id with a line end":        {create(app, issOwn, "a\nb", Registration{}), nil, ""},
		"an unknown method":            {refuse(Registration{AuthMethod: "jwt"}), nil, "#/auth_method"},
		"a public client's secret":     {refuse(Registration{Secret: "s", AuthMethod: "none"}), nil, "#/secret"},
		"a long secret":                {refuse(Registration{Secret: strings.Repeat("s", 1025)}), nil, "#/secret"},
		"by jti and opaque":            {refuse(Registration{RevokeByJTI: true, RevokeOpaque: true}), nil, "#/revoke_opaque"},
		"public by jti":                {refuse(Registration{AuthMethod: "none", RevokeByJTI: true}), nil, "#/revoke_by_jti"},
		"public opaque":                {refuse(Registration{AuthMethod: "none", RevokeOpaque: true}), nil, "#/revoke_opaque"},
		"a scope with a space":         {refuse(Registration{Scopes: []string{"a b"}}), nil, scopes},
		"a scope with a quote":         {refuse(Registration{Scopes: []string{`a"`}}), nil, scopes},
		"an empty scope":               {refuse(Registration{Scopes: []string{""}}), nil, scopes},
		"a default scope of nobody":    {refuse(Registration{Scopes: []string{"a"}, DefaultScopes: []string{"b"}}), nil, "#/default_scopes/0"},
		"many scopes":                  {refuse(Registration{Scopes: strings.Split(strings.Repeat("a,", 101), ",")}), nil, "#/scopes"},
		"an audience with NUL":         {refuse(Registration{Audience: []string{"\x00"}}), nil, audience},
		"a long audience":              {refuse(Registration{Audience: []string{strings.Repeat("a", 256)}}), nil, audience},
		"a grant that nobody has":      {refuse(Registration{GrantTypes: []string{"client_credentials", "password"}}), nil, "#/grant_types/1"},
		"an unknown typ":               {refuse(Registration{TokenTyp: "jwt"}), nil, "#/token_typ"},
		"a resource with a line end":   {refuse(Registration{ResourceAudiences: []string{"a", "\n"}}), nil, "#/resource_audiences/1"},
		"keys for a secret's client":   {refuse(Registration{JWKS: jwksOf(publicKey("", "", ecTestKey().Public()))}), nil, "#/jwks"},
		"a secret beside keys":         {refuse(Registration{AuthMethod: "private_key_jwt", JWKS: jwksOf(publicKey("", "", ecTestKey().Public())), Secret: "s"}), nil, "#/secret"},
		"no keys":                      {refuse(Registration{AuthMethod: "private_key_jwt"}), nil, "#/jwks"},
		"a secret for one with keys":   {secretForKeys, nil, "#/secret"},
		"rotation to no keys":          {rotateKeys, nil, "#/jwks"},
		"rotation of keys to a secret": {rotateKeysToSecret, nil, "#/secret"},
		"rotation to a private key":    {rotateToPrivate, nil, "#/jwks"},
		"rotation of a secret to keys": {rotateToKeys, nil, "#/jwks"},
		"rotation of nothing to keys":  {rotatePublicToKeys, nil, "#"},
		"a long life":                  {refuse(Registration{TokenLifetime: 3601}), nil, "#/token_lifetime"},
		"a negative quota":             {refuse(Registration{RevokeQuota: -1}), nil, "#/revoke_quota"},
		"rotation for a public client": {rotatePublic, nil, "#"},
		"rotation for nobody":          {rotateNobody, ErrNotFound, ""},
		"rotation to a long secret":    {rotateLong, nil, "#/secret"},
		"rotation to bytes":            {rotateBytes, nil, "#/secret"},
	} {
		if tt.err == nil || tt.want != nil && !errors.Is(tt.err, tt.want) {
			t.Errorf("%s: %v, want %v", name, tt.err, tt.want)
		}
		if invalid, _ := errors.AsType[catalog.Invalid](tt.err); tt.pointer != "" && (len(invalid) == 0 || invalid[0].Pointer != tt.pointer) {
			t.Errorf("%s: %v, want it to point at %s", name, tt.err, tt.pointer)
		}
		if strings.Contains(fmt.Sprint(tt.err), "SQLSTATE") {
			t.Errorf("%s: left to the database: %v", name, tt.err)
		}
	}
	var left int
	if err := pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.clients WHERE client_id NOT IN ('c', 'public', 'keys')`).Scan(&left); err != nil || left != 0 {
		t.Errorf("%d clients, %v, are left of what was refused", left, err)
	}
}

func TestClientKeysAreRefused(t *testing.T) {
	t.Parallel()
	ec := publicKey("ec", "", ecTestKey().Public())
	withKid := func(kid string, key jose.JSONWebKey) jose.JSONWebKey { key.KeyID = kid; return key }
	many := make([]jose.JSONWebKey, 11)
	for i := range many {
		many[i] = withKid(fmt.Sprint(i), ec)
	}
	member := func(name, value string) string { // of an EC key
		return strings.Replace(jwksOf(ec), `{"use"`, fmt.Sprintf(`{%q:%s,"use"`, name, value), 1)
	}
	for name, tt := range map[string]struct{ jwks, want string }{
		"one key":                        {jwksOf(withKid("", ec)), ""},
		"ten keys":                       {jwksOf(many[:10]...), ""},
		"two kinds":                      {jwksOf(ec, publicKey("rsa", "PS256", rsaTestKey().Public())), ""},
		"members that nobody knows":      {member("note", `{"a":[1.5,null,"\\u0000"]}`), ""},
		"no JSON":                        {`{"keys":[`, "JSON object"},
		"an array":                       {`[]`, "JSON object"},
		"no keys":                        {`{"KEYS":[]}`, `"keys"`},
		"keys that are none":             {`{"keys":[7]}`, "key 1 is not"},
		"an empty set":                   {`{"keys":[]}`, "1 to 10"},
		"eleven keys":                    {jwksOf(many...), "has 11 keys"},
		"a private key":                  {jwksOf(ec, publicKey("p", "", ecOtherKey())), "key 2 is private or symmetric"},
		"a symmetric key":                {`{"keys":[{"kty":"oct","k":"AAAA"}]}`, "private or symmetric"},
		"an algorithm that is not taken": {jwksOf(publicKey("", "RS512", rsaTestKey().Public())), "key 1 cannot verify"},
		"a curve that is not taken":      {jwksOf(publicKey("", "", must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)).Public())), "P-256"},
		"an RSA key that is short":       {`{"keys":[{"kty":"RSA","e":"AQAB","n":"` + strings.Repeat("_", 170) + `"}]}`, "2048"},
		"a key for encryption":           {strings.Replace(jwksOf(ec), `"sig"`, `"enc"`, 1), "cannot verify"},
		"two keys and one name":          {jwksOf(ec, withKid("", ec)), "key 2 has no kid"},
		"two of one name":                {jwksOf(ec, ec), `"ec" is there twice`},
		"a member that is there twice":   {member("use", `"sig"`), "cannot verify"},
		"a set that is there twice":      {strings.Replace(jwksOf(ec), `{"keys"`, `{"keys":[],"keys"`, 1), "each name once"},
		"a NUL":                          {member("note", `"\u0000"`), "cannot be stored"},
		"a number of the infinite":       {member("note", `1e999`), "cannot be stored"},
		"much":                           {member("note", `"`+strings.Repeat("x", 32<<10)+`"`), "32768"},
	} {
		err := Registration{AuthMethod: "private_key_jwt", JWKS: tt.jwks}.Validate()
		invalid, _ := errors.AsType[catalog.Invalid](err)
		if tt.want == "" && err != nil || tt.want != "" && (len(invalid) != 1 || invalid[0].Pointer != "#/jwks" || !strings.Contains(invalid[0].Detail, tt.want)) {
			t.Errorf("%s: %v, want %q at #/jwks", name, err, tt.want)
		}
		if private := ecOtherKey(); strings.Contains(fmt.Sprint(err), base64.RawURLEncoding.EncodeToString(must(private.Bytes()))) {
			t.Errorf("%s: the error has the private key", name)
		}
	}
}

// What is read back is what was registered, in one form however it was written.
func TestReadRegistrations(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	key := `"crv":"P-256","kty":"EC","x":"%s","y":"%s"`
	point := must(ecTestKey().PublicKey.Bytes())
	key = fmt.Sprintf(key, base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:]))
	want := []Registration{
		{ID: "a", AuthMethod: "private_key_jwt", JWKS: `{"keys":[{` + key + `}],"x":{"a":100,"b":"\u003c"}}`,
			Scopes: []string{"s"}, DefaultScopes: []string{}, Audience: []string{}, TokenLifetime: 5,
			GrantTypes: []string{}, TokenTyp: "JWT", ResourceAudiences: []string{"r"}, RevokeQuota: 1},
		{ID: "b", AuthMethod: "client_secret_basic", Scopes: []string{}, DefaultScopes: []string{}, Audience: []string{},
			GrantTypes: []string{"client_credentials"}, TokenTyp: "at+jwt", ResourceAudiences: []string{}},
	}
	given := want[0]
	given.JWKS = `{ "x":{"b":"<", "a":1e2}, "keys":[ {` + key + `} ] }`
	if cred := mustCreate(t, a, app, issOwn, given); cred != (Credentials{ID: "a"}) {
		t.Errorf("%+v for a client with keys, want no secret", cred)
	}
	mustCreate(t, a, app, issOwn, Registration{ID: "b"})
	var got []Registration
	err := pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
		for r, err := range ReadRegistrations(t.Context(), tx) {
			if err != nil {
				return err
			}
			got = append(got, r)
		}
		return nil
	})
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// One assertion that is sent to all processes at once counts once.
func TestAssertionCountsOnceInAllProcesses(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	processes := make([]*Authenticator, 3)
	for i := range processes {
		processes[i] = newOn(t, pool)
		processes[i].cfg.Issuer = issOwn
	}
	mustCreate(t, processes[0], app, issOwn, Registration{ID: "c", AuthMethod: "private_key_jwt", JWKS: jwksOf(publicKey("", "", ecTestKey().Public()))})
	claims := claimsOf("c").with(object{"aud": issOwn, "jti": strings.Repeat("\u00e9", 127)})
	jwt := sign("ES256", ecTestKey(), nil, claims)
	statuses := make(chan int, 9)
	var group sync.WaitGroup
	for i := range cap(statuses) {
		group.Go(func() {
			w := httptest.NewRecorder()
			if _, _, err := processes[i%3].Form(w, postForm(assertionForm(jwt))); err != nil {
				WriteError(w, err)
			}
			statuses <- w.Code
		})
	}
	group.Wait()
	close(statuses)
	count := map[int]int{}
	for status := range statuses {
		count[status]++
	}
	if count[200] != 1 || count[401] != 8 {
		t.Errorf("statuses %v, want 200 once", count)
	}

	pool.Close()
	w := httptest.NewRecorder()
	if _, _, err := processes[0].Form(w, postForm(assertionForm(sign("ES256", ecTestKey(), nil, claims.with(object{"jti": "2"}))))); err != nil {
		WriteError(w, err)
	}
	if w.Code != 503 {
		t.Errorf("status %d without the database, want 503", w.Code)
	}
}

// Assertions that wait for each other are used up together, and each is told its own.
func TestAssertionsAreUsedUpTogether(t *testing.T) {
	t.Parallel()
	pool, _ := newDatabase(t)
	a, other := newOn(t, pool), newOn(t, pool)
	now := time.Now().Unix()
	at := func(id string, jti byte, until int64) once { return once{id, [32]byte{jti}, until} }
	if fresh, err := other.useUp(t.Context(), new(at("c", 1, now+60))); err != nil || !fresh {
		t.Fatalf("the first: %t, %v", fresh, err)
	}
	// What is over by the database's clock is forgotten by it, so it never counts.
	batch := []once{
		at("c", 2, now+60), at("c", 1, now+60), at("d", 1, now+60), at("c", 2, now+60), at("c", 1, now+90), at("c", 3, now-60), at("c", 3, now+60),
		at("\u00e9", 4, now+60),
	}
	want := []bool{true, false, true, false, false, false, true, true}

	waiting := make([]*use, len(batch))
	for i, o := range batch {
		waiting[i] = &use{once: o, done: make(chan struct{})}
		if alone := a.uses.join(waiting[i]); alone != (i == 0) {
			t.Errorf("the assertion %d is alone: %t", i, alone)
		}
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if fresh, err := a.useUp(gone, new(at("c", 5, now+60))); fresh || !errors.Is(err, context.Canceled) {
		t.Errorf("by one who is gone: %t, %v", fresh, err)
	}
	begun := pool.Stat().AcquireCount()
	a.useUpWaiting()
	got := make([]bool, len(batch))
	for i, u := range waiting {
		<-u.done
		if got[i] = u.fresh; u.err != nil {
			t.Error(u.err)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fresh (-want +got):\n%s", diff)
	}
	if n := pool.Stat().AcquireCount() - begun; n != 1 {
		t.Errorf("%d questions to the database, want 1", n)
	}
	if fresh, err := a.useUp(t.Context(), new(at("c", 5, now+60))); err != nil || !fresh {
		t.Errorf("what was withdrawn: %t, %v", fresh, err)
	}
}

// Volleys of assertions, some of them twice and in any order, end with one use of each, and
// take no more than a connection of each process.
func TestAssertionsOfManyProcesses(t *testing.T) {
	t.Parallel()
	pool, _ := newDatabase(t)
	processes := []*Authenticator{newOn(t, pool), newOn(t, pool)}
	until := time.Now().Unix() + 60
	var fresh atomic.Int64
	var group sync.WaitGroup
	for i := range 400 {
		group.Go(func() {
			n := i / 2
			if i%2 == 1 {
				n = 199 - n
			}
			ok, err := processes[i%2].useUp(t.Context(), &once{"c", [32]byte{byte(n)}, until})
			if err != nil {
				t.Error(err)
			}
			if ok {
				fresh.Add(1)
			}
		})
	}
	group.Wait()
	if n := fresh.Load(); n != 200 {
		t.Errorf("%d of 200 assertions counted, want each once", n)
	}
	if n := pool.Stat().TotalConns(); n > 2 {
		t.Errorf("%d connections, want one of each process at most", n)
	}
}

// The keys that are given take the place of those before, which end unless they are among them.
func TestRotateKeys(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	here, there := newOn(t, pool), newOn(t, pool)
	here.cfg.Issuer, there.cfg.Issuer = issOwn, issOwn
	before, after := publicKey("1", "", ecTestKey().Public()), publicKey("2", "", ecOtherKey().Public())
	mustCreate(t, here, app, issOwn, Registration{ID: "c", AuthMethod: "private_key_jwt", JWKS: jwksOf(before)})
	check := func(what string, a *Authenticator, kid string, key any, want int) {
		t.Helper()
		w := httptest.NewRecorder()
		jwt := sign("ES256", key, object{"kid": kid}, claimsOf("c").with(object{"aud": issOwn}))
		if _, _, err := a.Form(w, postForm(assertionForm(jwt))); err != nil {
			WriteError(w, err)
		}
		if w.Code != want {
			t.Errorf("%s: status %d, want %d", what, w.Code, want)
		}
	}
	rotate := func(keys ...jose.JSONWebKey) {
		t.Helper()
		if secret, err := here.rotate(t.Context(), "c", Rotation{JWKS: jwksOf(keys...)}); err != nil || secret != "" {
			t.Fatalf("%q, %v", secret, err)
		}
	}
	check("the first key", here, "1", ecTestKey(), 200)
	rotate(after, before)
	check("the old one, beside the new", here, "1", ecTestKey(), 200)
	check("the new one", here, "2", ecOtherKey(), 200)
	check("the new one elsewhere", there, "2", ecOtherKey(), 200)
	rotate(after)
	check("the old one", here, "1", ecTestKey(), 401)
	check("the new one alone", here, "2", ecOtherKey(), 200)
	var stored string
	if err := pool.QueryRow(t.Context(), `SELECT jwks::text FROM rescind.clients WHERE client_id = 'c'`).Scan(&stored); err != nil {
		t.Fatal(err)
	}
	if got, err := canonicalJSON(stored); err != nil || got != must(canonicalJSON(jwksOf(after))) {
		t.Errorf("stored are %s, %v", stored, err)
	}
}

// A row that is of no use keeps nobody else out who is read with it.
func TestUnusableKeysAreTheirClientsAlone(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	mustCreate(t, a, app, issOwn, Registration{ID: "c", AuthMethod: "private_key_jwt", JWKS: jwksOf(publicKey("", "", ecTestKey().Public()))})
	mustCreate(t, a, app, issOwn, Registration{ID: "d", Secret: "s"})
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.clients SET jwks = '{}' WHERE client_id = 'c'`); err != nil {
		t.Fatal(err)
	}
	rows, err := a.readClients(t.Context(), []string{"c", "d", "e", "d"})
	if err != nil || len(rows) != 3 || rows["c"].keys != nil || rows["d"].client.ID != "d" || rows["e"] != noClient {
		t.Errorf("%v, %v", rows, err)
	}
}

func TestRotation(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	here, there := newOn(t, pool), newOn(t, pool)
	first := mustCreate(t, here, app, issOwn, Registration{ID: "c"}).Secret
	second, err := here.rotate(t.Context(), "c", Rotation{})
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
	third, err := here.rotate(t.Context(), "c", Rotation{Secret: "given third"})
	if err != nil || third != "given third" {
		t.Fatalf("%q, %v", third, err)
	}
	check := func(when string, want map[string]int) {
		t.Helper()
		for secret, want := range want {
			if _, status := here.try("c", secret); status != want {
				t.Errorf("%s: status %d, want %d", when, status, want)
			}
		}
	}
	check("after the second rotation", map[string]int{first: 401, second: 200, "given+third": 200})
	fourth, err := here.rotate(t.Context(), "c", Rotation{EndPrevious: true})
	if err != nil {
		t.Fatal(err)
	}
	check("after one that ends the others", map[string]int{second: 401, "given+third": 401, fourth: 200})
	if _, err := here.rotate(t.Context(), "c", Rotation{Secret: "fifth"}); err != nil {
		t.Fatal(err)
	}
	if _, err := here.rotate(t.Context(), "c", Rotation{Secret: fourth, EndPrevious: true}); err != nil {
		t.Fatal(err)
	}
	check("after one to a secret that is there", map[string]int{fourth: 200, "fifth": 401})
	if _, err := pool.Exec(t.Context(), `UPDATE rescind.client_secrets SET expires_at = now()`); err != nil {
		t.Fatal(err)
	}
	if _, status := newOn(t, pool).try("c", fourth); status != 401 {
		t.Errorf("status %d with an expired secret, want 401", status)
	}
}

func TestMasterKeyRotation(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	old, current := testKey(t, "o"), testKey(t, "n")
	secret := mustCreate(t, newOn(t, pool, old), app, issOwn, Registration{ID: "c"}).Secret
	both := newOn(t, pool, current, old)
	if _, status := both.try("c", secret); status != 200 {
		t.Errorf("status %d with both keys, want 200", status)
	}
	newer, err := both.rotate(t.Context(), "c", Rotation{})
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
	mustCreate(t, a, app, issExternal, Registration{ID: "c"})
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
	mustCreate(t, a, app, issExternal, Registration{ID: "new"})
	if _, ok, err := a.Owner(t.Context(), issExternal, "new"); !ok || err != nil {
		t.Errorf("a key mapping that was made here is not seen: %v", err)
	}
}

func TestPostgresAway(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	seen := mustCreate(t, a, app, issOwn, Registration{ID: "seen"}).Secret
	unseen := mustCreate(t, a, app, issOwn, Registration{ID: "unseen"}).Secret
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
	admin := Account{Username: "admin", Tenant: revocation.SuperTenant, Role: "admin", ExtraTenants: []string{}}
	if err := a.PutAccount(t.Context(), admin, "pä:ss%41"); err != nil {
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
	if err := a.PutAccount(t.Context(), admin, "new"); err != nil {
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

func TestPutAccount(t *testing.T) {
	t.Parallel()
	pool, app := newDatabase(t)
	a := newOn(t, pool)
	mustCreate(t, a, app, issOwn, Registration{ID: "c"})
	other := revocation.Tenant{ID: 7, Domain: "other"}
	put := func(acc Account, password string) error { return a.PutAccount(t.Context(), acc, password) }
	remove := func(username string) error {
		defer a.ForgetAccount(username)
		return pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			_, err := a.DeleteAccount(t.Context(), tx, username)
			return err
		})
	}
	log := func(password string) (Account, error) { return a.Account(accountRequest("gw", password)) }

	gateway := Account{Username: "gw", Tenant: other, Role: "gateway", ExtraTenants: []string{"a.example", "carbon.super"}, RevokedJWTObject: true}
	if err := put(Account{Username: "gw", Tenant: revocation.Tenant{Domain: "other"}, Role: "gateway"}, "pw"); err != nil {
		t.Fatal(err)
	}
	if _, err := log("pw"); err != nil {
		t.Fatal(err)
	}
	if err := put(gateway, ""); err != nil {
		t.Fatal(err)
	}
	if got, err := log("pw"); err != nil || !cmp.Equal(got, gateway) {
		t.Errorf("%+v, %v, want %+v by the password of before", got, err, gateway)
	}
	store := func(c AccountChange) (acc Account, err error) {
		defer a.ForgetAccount(c.Username)
		err = pgx.BeginFunc(t.Context(), pool, func(tx pgx.Tx) error {
			acc, err = a.StoreAccount(t.Context(), tx, c)
			return err
		})
		return acc, err
	}
	if got, err := store(AccountChange{Username: "gw", Password: "pw2"}); err != nil || !cmp.Equal(got, gateway) {
		t.Errorf("%+v, %v, want all of %+v but the password as it was", got, err, gateway)
	}
	if got, err := log("pw2"); err != nil || !cmp.Equal(got, gateway) {
		t.Errorf("%+v, %v, want %+v by the new password", got, err, gateway)
	}
	wantNew := Account{Username: "new", Tenant: revocation.SuperTenant, Role: "notifier", ExtraTenants: []string{}}
	if got, err := store(AccountChange{Username: "new", Role: "notifier", Password: "pw"}); err != nil || !cmp.Equal(got, wantNew) {
		t.Errorf("%+v, %v, want %+v", got, err, wantNew)
	}
	if err := remove("new"); err != nil {
		t.Error(err)
	}
	_, noRole := store(AccountChange{Username: "new", Password: "pw"})
	auditor := Account{Username: "aud", Tenant: revocation.SuperTenant, Role: "auditor", ExtraTenants: []string{"*"}}
	if err := put(auditor, "pw"); err != nil {
		t.Fatal(err)
	}
	all, err := a.Accounts(t.Context())
	if diff := cmp.Diff([]Account{auditor, gateway}, all); err != nil || diff != "" {
		t.Errorf("%v, accounts (-want +got):\n%s", err, diff)
	}

	with := func(change func(*Account)) Account { acc := gateway; change(&acc); return acc }
	for name, tt := range map[string]struct {
		err  error
		want error
		text string
	}{
		"a client's name":      {put(with(func(a *Account) { a.Username = "c" }), "pw"), ErrExists, "c"},
		"another role":         {put(with(func(a *Account) { a.Role = "admin" }), "pw"), ErrExists, "gw"},
		"another tenant":       {put(with(func(a *Account) { a.Tenant = revocation.SuperTenant }), "pw"), ErrExists, "gw"},
		"no such tenant":       {put(with(func(a *Account) { a.Tenant.Domain = "b.example" }), "pw"), ErrNotFound, "b.example"},
		"a tenant of no name":  {put(with(func(a *Account) { a.Tenant.Domain = "B" }), "pw"), nil, "carbon.super"},
		"an extra tenant":      {put(with(func(a *Account) { a.ExtraTenants = []string{"B"} }), "pw"), nil, `"B"`},
		"an unknown role":      {put(with(func(a *Account) { a.Role = "king" }), "pw"), nil, "tenant_admin"},
		"a colon in a name":    {put(with(func(a *Account) { a.Username = "a:b" }), "pw"), nil, "colon"},
		"a long name":          {put(with(func(a *Account) { a.Username = strings.Repeat("a", 256) }), "pw"), nil, "255"},
		"a long password":      {put(gateway, strings.Repeat("a", 1025)), nil, "1024"},
		"new, and no password": {put(with(func(a *Account) { a.Username = "new" }), ""), nil, "password"},
		"new, and no role":     {noRole, nil, "a role"},
		"nobody to delete":     {remove("nobody"), ErrNotFound, "nobody"},
	} {
		if tt.err == nil || tt.want != nil && !errors.Is(tt.err, tt.want) || !strings.Contains(fmt.Sprint(tt.err), tt.text) || strings.Contains(fmt.Sprint(tt.err), "SQLSTATE") {
			t.Errorf("%s: %v, want %v that says %q", name, tt.err, tt.want, tt.text)
		}
	}

	if err := remove("gw"); err != nil {
		t.Fatal(err)
	}
	if _, err := log("pw"); err == nil {
		t.Error("a deleted account is let in")
	}
	if left, err := a.Accounts(t.Context()); err != nil || len(left) != 1 {
		t.Errorf("%v, %v, want one account left", left, err)
	}
}

func TestAccountSees(t *testing.T) {
	t.Parallel()
	own := revocation.Tenant{ID: 7, Domain: "own"}
	for _, tt := range []struct {
		account          Account
		own, extra, rest bool
	}{
		{Account{Tenant: own, Role: "gateway"}, true, false, false},
		{Account{Tenant: own, Role: "tenant_admin", ExtraTenants: []string{"extra"}}, true, true, false},
		{Account{Tenant: own, Role: "auditor", ExtraTenants: []string{"extra", "*"}}, true, true, true},
		{Account{Tenant: own, Role: "admin"}, true, true, true},
	} {
		a := tt.account
		if a.Sees("own") != tt.own || a.Sees("extra") != tt.extra || a.Sees("third") != tt.rest || a.SeesAll() != tt.rest {
			t.Errorf("%+v sees %t, %t, %t, all %t", a, a.Sees("own"), a.Sees("extra"), a.Sees("third"), a.SeesAll())
		}
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
	cred := mustCreate(b, a, app, issOwn, Registration{})
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

// A fleet whose gateways share an account, and start at once, costs one hash.
func TestFleetStartsAtOnce(t *testing.T) {
	t.Parallel()
	a := newOn(t, pgtest.New(t))
	account := Account{Username: "fleet", Role: "gateway", Tenant: revocation.SuperTenant}
	if err := a.PutAccount(t.Context(), account, "a-password"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var refused atomic.Int64
	for range 500 {
		wg.Go(func() {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
			r.SetBasicAuth("fleet", "a-password")
			if _, err := a.Account(r); err != nil {
				refused.Add(1)
			}
		})
	}
	wg.Wait()
	if n := refused.Load(); n != 0 {
		t.Errorf("%d of 500 were refused", n)
	}
}

// BenchmarkDistinctClients compares many clients, of which each request looks one up with
// its key mapping, with a single one. Rows are read again each second: ten times as
// often as by default.
func BenchmarkDistinctClients(b *testing.B) {
	for _, clients := range []int{1, 10000} {
		b.Run(fmt.Sprint(clients), func(b *testing.B) {
			pool, app := newDatabase(b)
			a, err := New(Config{Freshness: time.Second}, pool, []MasterKey{testKey(b, "k")}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
			if err != nil {
				b.Fatal(err)
			}
			_, err = pool.Exec(b.Context(), `
WITH mapping AS (
    INSERT INTO rescind.key_mappings (application_id, key_manager_id, consumer_key, key_type)
    SELECT $1, k.id, 'client-' || n, 'PRODUCTION' FROM rescind.key_managers k, generate_series(0, $3::int - 1) n WHERE k.iss = $2
    RETURNING id, consumer_key
)
INSERT INTO rescind.clients (client_id, key_mapping_id, auth_method) SELECT consumer_key, id, 'none' FROM mapping`, app, issOwn, clients)
			if err == nil {
				_, err = pool.Exec(b.Context(), `ANALYZE rescind.clients, rescind.key_mappings`)
			}
			if err != nil {
				b.Fatal(err)
			}
			var next atomic.Int64
			var questions atomic.Int64
			read := a.clients.read
			a.clients.read = func(ctx context.Context, ids []string) (map[string]*clientRow, error) {
				questions.Add(1)
				return read(ctx, ids)
			}
			defer func() { b.ReportMetric(float64(questions.Load())/float64(b.N), "questions/op") }()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					id := fmt.Sprint("client-", next.Add(7919)%int64(clients))
					if _, _, err := a.Form(httptest.NewRecorder(), postForm("client_id="+id)); err != nil {
						b.Error(err)
						return
					}
					if _, ok, err := a.Owner(b.Context(), issOwn, id); err != nil || !ok {
						b.Errorf("%t, %v", ok, err)
						return
					}
				}
			})
		})
	}
}
