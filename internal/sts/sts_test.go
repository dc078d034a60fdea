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

// keyManager makes a key manager as the catalog does, unless it is there.
func keyManager(t testing.TB, pool *pgxpool.Pool, name, iss string) (id int32) {
	t.Helper()
	exec(t, pool, `
INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime) VALUES (-1234, $1, false, $2, 3600)
ON CONFLICT (iss) DO NOTHING`, name, iss)
	if err := pool.QueryRow(t.Context(), `SELECT id FROM rescind.key_managers WHERE iss = $1`, iss).Scan(&id); err != nil {
		t.Fatal(err)
	}
	return id
}

// fakeState is a replica that is as fresh as a test says.
type fakeState struct {
	replica *replica.Replica
	err     error
	maxAge  time.Duration // that was asked for last
}

func (s *fakeState) Fresh(_ context.Context, maxAge time.Duration) (revocation.Position, error) {
	s.maxAge = maxAge
	return s.replica.At(), s.err
}

func (s *fakeState) Replica() *replica.Replica { return s.replica }

// stateOf has an application with a key mapping at iss for each client.
func stateOf(t testing.TB, iss string, clients ...string) *fakeState {
	t.Helper()
	s := &fakeState{replica: replica.New(replica.Config{}), maxAge: -1}
	err := s.replica.Load(revocation.Position{Epoch: "e", Seq: 1}, func(l *replica.Loader) error {
		for i, id := range clients {
			application := catalog.Application{Meta: meta(i, "application"), Name: id, Blocked: id == "blocked"}
			l.Entity(&application)
			l.Entity(&catalog.KeyMapping{
				Meta: meta(i, "mapping"), Iss: iss, ConsumerKey: id, KeyType: catalog.Production, Application: catalog.Ref{UUID: application.UUID},
			})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func meta(i int, noun string) catalog.Meta {
	return catalog.Meta{ID: int32(i + 1), UUID: fmt.Sprintf("%s-%d", noun, i), Tenant: revocation.SuperTenant}
}

func start(t testing.TB, pool *pgxpool.Pool, cfg Config, masterKeys ...authn.MasterKey) *Server {
	t.Helper()
	if cfg.Issuer == "" {
		cfg.Issuer = iss
	}
	cfg.KeyManagerID = keyManager(t, pool, "own", cfg.Issuer)
	if cfg.State == nil {
		cfg.State = stateOf(t, cfg.Issuer, "c")
	}
	if len(masterKeys) == 0 {
		masterKeys = []authn.MasterKey{masterKey(t, "a")}
	}
	s, err := New(t.Context(), cfg, pool, masterKeys, fakeForms{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// mint makes a token with the key that s would use.
func mint(t testing.TB, s *Server) string {
	t.Helper()
	now := time.Now().Unix()
	compact, err := s.sign(t.Context(), claims{
		Issuer: s.cfg.Issuer, Expiry: now + 900, IssuedAt: now, Audience: audience{"https://api.example.com"},
		Subject: "c", ClientID: "c", AuthorizedParty: "c", ID: newUUID(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

func verify(t testing.TB, s *Server, compact string) (*token.Token, error) {
	t.Helper()
	v, err := token.NewVerifier(s.Issuer())
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
	cfg := Config{Issuer: iss, KeyManagerID: keyManager(t, pool, "own", iss), State: stateOf(t, iss)}
	kids := make([]string, 6)
	var wg sync.WaitGroup
	for i := range kids {
		wg.Go(func() {
			s, err := New(t.Context(), cfg, pool, []authn.MasterKey{masterKey(t, "a")}, fakeForms{}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Error(err)
				return
			}
			kids[i] = s.ring.Load().signers[0].kid
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
	for _, want := range []string{right.ID(), wrong.ID(), "RESCIND_MASTER_KEY", iss, "UPDATE rescind.signing_keys SET retired_at"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not say %q: %v", want, err)
		}
	}
	start(t, pool, Config{}, wrong, right) // a new master key, and the old one to open what it sealed

	_, remedy, _ := strings.Cut(err.Error(), "retire the key with ")
	remedy, _, _ = strings.Cut(remedy, ":")
	exec(t, pool, remedy)
	s := start(t, pool, Config{}, wrong)
	if _, err := verify(t, s, compact); err != nil {
		t.Errorf("a token of the retired key: %v", err)
	}
	if got, err := verify(t, s, mint(t, s)); err != nil || got.KeyID == old.ring.Load().signers[0].kid {
		t.Errorf("a new token: %+v, %v, want one of a new key", got, err)
	}
}

func TestSealedKeyBelongsToItsRow(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	s := start(t, pool, Config{})
	var sealed []byte
	if err := pool.QueryRow(t.Context(), `SELECT private_sealed FROM rescind.signing_keys`).Scan(&sealed); err != nil {
		t.Fatal(err)
	}
	row := keyRow{KID: s.ring.Load().signers[0].kid, Sealed: sealed, MasterKeyID: s.store.masterKeys[0].ID()}
	if _, err := s.store.open(row); err != nil {
		t.Fatal(err)
	}
	damaged, moved := row, row
	damaged.Sealed = append([]byte(nil), sealed...)
	damaged.Sealed[40] ^= 1
	moved.KID = "another"
	for _, bad := range []keyRow{damaged, moved} {
		if _, err := s.store.open(bad); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("open = %v, want it refused as damaged", err)
		}
	}
	elsewhere := *s.store
	elsewhere.iss = "https://other.example"
	if _, err := elsewhere.open(row); err == nil {
		t.Error("the key opens for another issuer")
	}
}

func TestStoreRefusesForgedRows(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"another public key":               `UPDATE rescind.signing_keys SET public_jwk = jsonb_set(public_jwk, '{e}', '"Aw"')`,
		"a kid that is not its thumbprint": `UPDATE rescind.signing_keys SET kid = 'x'`,
		"no key":                           `UPDATE rescind.signing_keys SET public_jwk = '{}'`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pool := pgtest.New(t)
			s := start(t, pool, Config{})
			exec(t, pool, sql)
			if r, err := s.store.load(t.Context(), nil); err == nil {
				t.Errorf("load = %+v, want an error", r)
			}
		})
	}
}

// A further key is published first and used when everybody can know it.
func TestNewAlgorithm(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	old := start(t, pool, Config{})
	s := start(t, pool, Config{Algorithm: "ES256"})
	if got, err := verify(t, s, mint(t, s)); err != nil || got.Alg != "RS256" {
		t.Errorf("token at once: %+v, %v, want one of RS256", got, err)
	}
	if n := count(t, pool, `SELECT count(*) FROM rescind.signing_keys WHERE alg = 'ES256' AND use_from > now() + interval '9 min'`); n != 1 {
		t.Errorf("%d keys for later, want 1", n)
	}
	var set jose.JSONWebKeySet
	get(t, s, jwksPath, nil).decode(t, &set)
	if len(set.Keys) != 2 {
		t.Errorf("%d keys published, want 2", len(set.Keys))
	}

	exec(t, pool, `UPDATE rescind.signing_keys SET use_from = now() WHERE alg = 'ES256'`)
	s = start(t, pool, Config{Algorithm: "ES256"})
	compact := mint(t, s)
	if got, err := verify(t, s, compact); err != nil || got.Alg != "ES256" {
		t.Errorf("token later: %+v, %v, want one of ES256", got, err)
	}
	// The process that started before has not seen this key.
	if _, err := verify(t, old, compact); err != nil {
		t.Errorf("in another process: %v", err)
	}
}

func TestRetiredKey(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	s := start(t, pool, Config{})
	compact := mint(t, s)
	for _, tt := range []struct {
		retired string
		want    error
	}{{"1 minute", nil}, {"62 minutes", nil}, {"70 minutes", token.ErrUnknownKey}} {
		exec(t, pool, `UPDATE rescind.signing_keys SET retired_at = now() - $1::interval WHERE kid = $2`,
			tt.retired, s.ring.Load().signers[0].kid)
		later := start(t, pool, Config{})
		if _, err := verify(t, later, compact); !errors.Is(err, tt.want) {
			t.Errorf("retired %s ago: %v, want %v", tt.retired, err, tt.want)
		}
		if got, err := verify(t, later, mint(t, later)); err != nil || got.KeyID == s.ring.Load().signers[0].kid {
			t.Errorf("retired %s ago: new token %+v, %v, want one of another key", tt.retired, got, err)
		}
	}
}

// queryCounter counts how often the signing keys are read.
type queryCounter struct{ n atomic.Int64 }

func (c *queryCounter) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	if data.SQL == signingKeysSQL {
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
	keys := s.Issuer().Keys

	begin, before := time.Now(), counter.n.Load()
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			for j := range 4 {
				if _, err := keys.Key(t.Context(), fmt.Sprintf("%d-%d", i, j), "RS256"); !errors.Is(err, token.ErrUnknownKey) {
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
		for _, want := range []string{"issuer \"", "2h0m0s", "HS256", "-1", "key manager 0", "master key", "no state"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("issuer %q: error does not say %q: %v", issuer, want, err)
			}
		}
	}
	for _, issuer := range []string{"https://km.example.com", "http://127.0.0.1:8080", "https://km.example.com:8443/a/b.c"} {
		got, err := Config{Issuer: issuer, KeyManagerID: 7}.complete()
		want := Config{Issuer: issuer, KeyManagerID: 7, TokenLifetime: 15 * time.Minute, Algorithm: "RS256", MaxQueue: 128}
		if err != nil || !cmp.Equal(got, want) {
			t.Errorf("complete = %+v, %v, want %+v", got, err, want)
		}
	}
}
