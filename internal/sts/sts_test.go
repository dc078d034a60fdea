package sts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/pgtest"
)

const iss = "https://km.example.com"

func masterKey(t testing.TB, seed string) authn.MasterKey {
	t.Helper()
	key, err := authn.NewMasterKey([]byte(strings.Repeat(seed, 32)))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// fakeForms lets one client in, whatever the request says.
type fakeForms struct {
	client authn.Client
	form   url.Values
}

func (f fakeForms) Form(http.ResponseWriter, *http.Request, ...string) (authn.Client, url.Values, error) {
	return f.client, f.form, nil
}

// asking lets in the client id of an issuer, which asks for a token.
func asking(iss, id string) fakeForms {
	return fakeForms{
		authn.Client{ID: id, Issuer: iss, GrantTypes: []string{clientCredentials}}, url.Values{"grant_type": {clientCredentials}},
	}
}

const newManagerSQL = `
INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime) VALUES ($1, $2, $3, $2, 3600)
ON CONFLICT (iss) DO NOTHING`

// newIssuer makes the issuer of our own of a tenant as the catalog does, unless it is there.
func newIssuer(t testing.TB, pool *pgxpool.Pool, tenant revocation.Tenant, iss string) {
	t.Helper()
	exec(t, pool, `INSERT INTO rescind.tenants (id, domain) VALUES ($1, $2) ON CONFLICT DO NOTHING`, tenant.ID, tenant.Domain)
	exec(t, pool, newManagerSQL, tenant.ID, iss, true)
}

// fakeState is a replica that is as fresh as a test says.
type fakeState struct {
	replica *replica.State
	err     error
	maxAge  time.Duration // that was asked for last
	fresh   atomic.Int64  // how often Fresh was called

	mu      sync.Mutex
	content []catalog.Entity
	revoked []replica.Record
	arrives func() // what a call of Fresh learns
}

func (s *fakeState) Fresh(_ context.Context, maxAge time.Duration) (revocation.Position, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh.Add(1)
	s.maxAge = maxAge
	if s.arrives != nil {
		s.arrives()
	}
	return s.replica.At(), s.err
}

func (s *fakeState) Replica() *replica.State { return s.replica }

// load makes the state what content and revoked are.
func (s *fakeState) load(t testing.TB) {
	t.Helper()
	at := revocation.Position{Epoch: "e", Seq: s.replica.At().Seq + 1}
	err := s.replica.Load(at, func(l *replica.Loader) error {
		for _, e := range s.content {
			l.Entity(e)
		}
		for _, r := range s.revoked {
			l.Revocation(r)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// stateOf has the super tenant's issuer, and an application with a key mapping at iss for each client.
func stateOf(t testing.TB, iss string, clients ...string) *fakeState {
	t.Helper()
	s := &fakeState{replica: replica.NewState(replica.StateConfig{}), maxAge: -1}
	s.content = append(s.content, resident(1, revocation.SuperTenant, iss))
	for i, id := range clients {
		s.content = append(s.content, registered(i+1, iss, id)...)
	}
	s.load(t)
	return s
}

// resident is a tenant's issuer of our own.
func resident(id int, tenant revocation.Tenant, iss string) *catalog.KeyManager {
	return &catalog.KeyManager{
		Meta: catalog.Meta{ID: int32(id), UUID: fmt.Sprintf("manager-%d", id), Tenant: tenant}, Resident: true, Enabled: true, Iss: iss,
	}
}

// registered is an application with one consumer key.
func registered(i int, iss, consumerKey string) []catalog.Entity {
	application := &catalog.Application{Meta: meta(i, "application"), Name: consumerKey, Blocked: consumerKey == "blocked"}
	return []catalog.Entity{application, &catalog.KeyMapping{
		Meta: meta(i, "mapping"), Iss: iss, ConsumerKey: consumerKey, KeyType: catalog.Production, Application: catalog.Ref{UUID: application.UUID},
	}}
}

func meta(i int, noun string) catalog.Meta {
	return catalog.Meta{ID: int32(i), UUID: fmt.Sprintf("%s-%d", noun, i), Tenant: revocation.SuperTenant}
}

// start signs with ES256 unless told otherwise: its keys are made at once.
func start(t testing.TB, pool *pgxpool.Pool, cfg Config, masterKeys ...authn.MasterKey) *Server {
	t.Helper()
	if cfg.Issuer == "" {
		cfg.Issuer = iss
	}
	if cfg.Algorithm == "" {
		cfg.Algorithm = "ES256"
	}
	newIssuer(t, pool, revocation.SuperTenant, cfg.Issuer)
	if cfg.State == nil {
		cfg.State = stateOf(t, cfg.Issuer, "c")
	}
	if len(masterKeys) == 0 {
		masterKeys = []authn.MasterKey{masterKey(t, "a")}
	}
	s, err := New(t.Context(), cfg, pool, masterKeys, asking(cfg.Issuer, "c"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// own is the super tenant's issuer.
func (s *Server) own() *issuer { return s.issuer(s.cfg.Issuer, "") }

// signing is the kid that s signs with now.
func signing(t testing.TB, s *Server) string {
	t.Helper()
	if err := s.own().reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	key, err := s.signer(t.Context(), s.own())
	if err != nil {
		t.Fatal(err)
	}
	return key.kid
}

// mint makes a token with the key that s would use.
func mint(t testing.TB, s *Server) string {
	t.Helper()
	now := time.Now().Unix()
	compact, _, err := s.sign(t.Context(), s.own(), &tokenClaims{
		Issuer: s.cfg.Issuer, Expiry: now + 900, IssuedAt: now, Audience: audience{"https://api.example.com"},
		Subject: "c", ClientID: "c", AuthorizedParty: "c", ID: newUUID(),
	}, typAccessToken)
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

func verify(t testing.TB, s *Server, compact string) (*token.Token, error) {
	t.Helper()
	v, err := token.NewVerifier(s.Issuer(resident(1, revocation.SuperTenant, s.cfg.Issuer)))
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), compact)
}

func exec(t testing.TB, pool *pgxpool.Pool, sql string, args ...any) {
	t.Helper()
	if _, err := pool.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

func count(t testing.TB, pool *pgxpool.Pool, sql string, args ...any) int {
	t.Helper()
	var n int
	if err := pool.QueryRow(t.Context(), sql, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestTokensSurviveRestart(t *testing.T) {
	t.Parallel()
	for _, alg := range []string{"RS256", "ES256"} {
		t.Run(alg, func(t *testing.T) {
			t.Parallel()
			pool := pgtest.New(t)
			compact := mint(t, start(t, pool, Config{Algorithm: alg}))
			s := start(t, pool, Config{Algorithm: alg})
			got, err := verify(t, s, compact)
			if err != nil {
				t.Fatal(err)
			}
			again, err := verify(t, s, mint(t, s))
			if err != nil {
				t.Fatal(err)
			}
			if got.Alg != alg || got.Type != "at+jwt" || got.KeyID != again.KeyID || len(got.KeyID) != 43 {
				t.Errorf("token has alg %s, typ %s, kid %s; after the restart kid %s", got.Alg, got.Type, got.KeyID, again.KeyID)
			}
		})
	}
}

func TestStartsAtOnceMakeOneKey(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	newIssuer(t, pool, revocation.SuperTenant, iss)
	cfg := Config{Issuer: iss, State: stateOf(t, iss), Algorithm: "ES256"}
	kids := make([]string, 6)
	var wg sync.WaitGroup
	for i := range kids {
		wg.Go(func() {
			s, err := New(t.Context(), cfg, pool, []authn.MasterKey{masterKey(t, "a")}, fakeForms{}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Error(err)
				return
			}
			kids[i] = s.own().ring.Load().signers[0].kid
		})
	}
	wg.Wait()
	for _, kid := range kids {
		if kid != kids[0] {
			t.Errorf("processes sign with keys %q, want one", kids)
			break
		}
	}
	if n := count(t, pool, `SELECT count(*) FROM rescind.signing_keys`); n != 1 {
		t.Errorf("%d signing keys, want 1", n)
	}
}

func TestStartNeedsItsIssuer(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	exec(t, pool, newManagerSQL, -1234, iss, false)
	_, err := New(t.Context(), Config{Issuer: iss, State: stateOf(t, iss), Algorithm: "ES256"}, pool, []authn.MasterKey{masterKey(t, "a")}, fakeForms{},
		slog.New(slog.DiscardHandler))
	if !errors.Is(err, ErrNoIssuer) || !strings.Contains(err.Error(), iss) {
		t.Errorf("New for an issuer that is somebody else's: %v, want %v with its name", err, ErrNoIssuer)
	}
}

func TestWrongMasterKey(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	right, wrong := masterKey(t, "a"), masterKey(t, "b")
	old := start(t, pool, Config{}, right)
	compact := mint(t, old)
	_, err := New(t.Context(), old.cfg, pool, []authn.MasterKey{wrong}, fakeForms{}, slog.New(slog.DiscardHandler))
	if err == nil {
		t.Fatal("New starts with a master key that does not open the signing key")
	}
	for _, want := range []string{right.ID(), wrong.ID(), "RESCIND_MASTER_KEY", iss, "rescind keys rotate --iss " + iss} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not say %q: %v", want, err)
		}
	}
	start(t, pool, Config{}, wrong, right) // a new master key, and the old one to open what it sealed

	// As the error says. Nobody can sign, so the new key does at once.
	changed, err := newKeys(t, pool, wrong).Rotate(t.Context(), operator, Rotation{Iss: iss})
	if err != nil {
		t.Fatal(err)
	}
	if len(changed) != 2 || changed[0].State != KeyActive || changed[0].Algorithm != "ES256" || changed[1].State != KeyRetired {
		t.Errorf("Rotate = %+v, want an active key and a retired one", changed)
	}
	s := start(t, pool, Config{}, wrong)
	if _, err := verify(t, s, compact); err != nil {
		t.Errorf("a token of the retired key: %v", err)
	}
	if got, err := verify(t, s, mint(t, s)); err != nil || got.KeyID != changed[0].KID {
		t.Errorf("a new token: %+v, %v, want one of the new key", got, err)
	}
}

func TestSealedKeyBelongsToItsRow(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	s := start(t, pool, Config{})
	rows, err := readKeys(t.Context(), pool, listKeysSQL, iss)
	if err != nil || len(rows) != 1 {
		t.Fatal(rows, err)
	}
	row := rows[0]
	if _, err := s.store.open(row); err != nil {
		t.Fatal(err)
	}
	damaged, moved, elsewhere := row, row, row
	damaged.Sealed = append([]byte(nil), row.Sealed...)
	damaged.Sealed[40] ^= 1
	moved.KID = "another"
	elsewhere.Iss = "https://other.example"
	for _, bad := range []keyRow{damaged, moved, elsewhere} {
		if _, err := s.store.open(bad); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("open = %v, want it refused as damaged", err)
		}
	}
}

func TestStoreRefusesForgedRows(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	s := start(t, pool, Config{})
	rows, err := readKeys(t.Context(), pool, listKeysSQL, iss)
	if err != nil {
		t.Fatal(err)
	}
	other, err := s.store.newKey(iss, "ES256")
	if err != nil {
		t.Fatal(err)
	}
	for name, forged := range map[string]keyRow{
		"another public key":               {KID: rows[0].KID, Public: other.Public},
		"a kid that is not its thumbprint": {KID: "x", Public: rows[0].Public},
		"no key":                           {KID: rows[0].KID, Public: "{}"},
	} {
		exec(t, pool, `UPDATE rescind.signing_keys SET kid = $1, public_jwk = $2::text::jsonb`, forged.KID, forged.Public)
		if r, err := s.store.load(t.Context(), iss, nil); err == nil {
			t.Errorf("%s: load = %+v, want an error", name, r)
		}
	}
}

// A further key is published first and used when everybody can know it.
func TestNewAlgorithm(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	old := start(t, pool, Config{})
	s := start(t, pool, Config{Algorithm: "RS256"})
	if got, err := verify(t, s, mint(t, s)); err != nil || got.Alg != "ES256" {
		t.Errorf("token at once: %+v, %v, want one of ES256", got, err)
	}
	if n := count(t, pool, `SELECT count(*) FROM rescind.signing_keys WHERE alg = 'RS256' AND use_from > now() + interval '9 min'`); n != 1 {
		t.Errorf("%d keys for later, want 1", n)
	}
	var set jose.JSONWebKeySet
	get(t, s, jwksPath, nil).decode(t, &set)
	if len(set.Keys) != 2 {
		t.Errorf("%d keys published, want 2", len(set.Keys))
	}

	exec(t, pool, `UPDATE rescind.signing_keys SET use_from = now() WHERE alg = 'RS256'`)
	s = start(t, pool, Config{Algorithm: "RS256"})
	compact := mint(t, s)
	if got, err := verify(t, s, compact); err != nil || got.Alg != "RS256" {
		t.Errorf("token later: %+v, %v, want one of RS256", got, err)
	}
	// The process that started before has not seen this key.
	if _, err := verify(t, old, compact); err != nil {
		t.Errorf("in another process: %v", err)
	}
}

// queryCounter counts how often the signing keys are read.
type queryCounter struct{ n atomic.Int64 }

func (c *queryCounter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if data.SQL == publishedSQL {
		c.n.Add(1)
	}
	return ctx
}

func (*queryCounter) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func TestUnknownKid(t *testing.T) {
	t.Parallel()
	cfg, err := pgxpool.ParseConfig(pgtest.Create(t).ServiceURL)
	if err != nil {
		t.Fatal(err)
	}
	counter := &queryCounter{}
	cfg.ConnConfig.Tracer = counter
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	s := start(t, pool, Config{})
	keys := s.Issuer(resident(1, revocation.SuperTenant, iss)).Keys

	begin, before := time.Now(), counter.n.Load()
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			for j := range 4 {
				if _, err := keys.Key(t.Context(), fmt.Sprintf("%d-%d", i, j), "ES256"); !errors.Is(err, token.ErrUnknownKey) {
					t.Errorf("Key = %v, want %v", err, token.ErrUnknownKey)
				}
			}
		})
	}
	wg.Wait()
	n, most := counter.n.Load()-before, int64(time.Since(begin)/(50*time.Millisecond))+1
	if n < 4 || n > most {
		t.Errorf("200 unknown kids in 4 rounds cost %d queries, want 4 to %d", n, most)
	}

	compact := mint(t, s)
	pool.Close()
	if _, err := keys.Key(t.Context(), "x", "RS256"); !errors.Is(err, token.ErrKeysUnavailable) || errors.Is(err, token.ErrInvalid) {
		t.Errorf("without the database: %v, want %v", err, token.ErrKeysUnavailable)
	}
	if _, err := verify(t, s, compact); err != nil {
		t.Errorf("a known key without the database: %v", err)
	}
}

func TestConfigReportsAll(t *testing.T) {
	t.Parallel()
	for _, issuer := range []string{
		"", "km.example.com", "ftp://km.example.com", "https://", "https://km.example.com/", "https://km.example.com/t//1",
		"https://km.example.com?x=1", "https://km.example.com#x", "https://u:hush@km.example.com", "https://km.example.com/{x}",
		"https://" + strings.Repeat("x", 250),
	} {
		_, err := New(t.Context(), Config{Issuer: issuer, TokenLifetime: 2 * time.Hour, Algorithm: "HS256", MaxQueue: -1},
			nil, nil, fakeForms{}, slog.New(slog.DiscardHandler))
		if err == nil {
			t.Fatalf("issuer %q: New accepts it", issuer)
		}
		for _, want := range []string{"issuer \"", "2h0m0s", "HS256", "-1", "master key", "no state"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("issuer %q: error does not say %q: %v", issuer, want, err)
			}
		}
	}
	for _, issuer := range []string{"https://km.example.com", "http://127.0.0.1:8080", "https://km.example.com:8443/a/b.c"} {
		got, err := Config{Issuer: issuer}.complete()
		want := Config{Issuer: issuer, TokenLifetime: 15 * time.Minute, Algorithm: "RS256", MaxQueue: 128}
		if err != nil || !cmp.Equal(got, want) {
			t.Errorf("complete = %+v, %v, want %+v", got, err, want)
		}
	}
}
