package revoke_test

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/revoke"
)

const (
	ours     = "https://km.example.com"
	idp      = "https://idp.example" // carbon.super's
	acmeOurs = ours + "/t/acme.com"
	acmeIDP  = "https://idp.acme.com"
	awayIDP  = "https://away.acme.com" // acme's too, and its keys cannot be had

	skew = 2 * time.Second

	superKnown = "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3" // the jti of a token that is remembered
	superOver  = "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e4" // that of one that has expired
	acmeKnown  = "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e5"
)

var (
	super = revocation.SuperTenant
	acme  = revocation.Tenant{ID: 7, Domain: "acme.com"}

	admin      = revoke.Caller{Actor: ledger.Actor{Name: "account:root", RequestID: "r-1", Remote: "192.0.2.1"}}
	acmeAdmin  = revoke.Caller{Actor: ledger.Actor{Name: "account:acme"}, Tenant: acme.Domain}
	superAdmin = revoke.Caller{Actor: ledger.Actor{Name: "account:super"}, Tenant: super.Domain}
	nobody     = revoke.Caller{Actor: ledger.Actor{Name: "account:none"}, Tenant: "none.example"}
)

// lifetimes are the longest of each issuer's tokens, in seconds.
var lifetimes = map[string]int32{ours: 3600, idp: 7200, acmeOurs: 3600, acmeIDP: 86400, awayIDP: 60}

// world is a Revoker with a log of its own, and a catalog that is in memory alone.
type world struct {
	*revoke.Revoker
	testing.TB
	pool   *pgxpool.Pool
	state  *state
	memory *memory
}

// state is the replica, which is fed when it has to be fresh.
type state struct {
	ledger  *ledger.Ledger
	replica *replica.State
	err     error
}

func (s *state) Replica() *replica.State { return s.replica }

func (s *state) Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error) {
	if s.err != nil || maxAge != 0 {
		return revocation.Position{}, s.err
	}
	events, err := s.ledger.After(ctx, s.replica.At().Seq, 100000)
	for _, e := range events {
		if err := s.replica.Apply(e); err != nil {
			return revocation.Position{}, err
		}
	}
	return s.replica.At(), err
}

// memory is a ledger that remembers these tokens.
type memory struct {
	*ledger.Ledger
	issued         map[string]ledger.Issued
	living         map[revocation.Target]int64
	asked, counted atomic.Int64
	// Where entered is not nil, whoever counts says so, and waits until open is closed.
	entered, open chan struct{}
}

var since = time.Date(2026, 11, 20, 0, 0, 0, 0, time.UTC)

func (m *memory) IssuedTokens(_ context.Context, jtis []string) (map[string]ledger.Issued, error) {
	m.asked.Add(1)
	found := make(map[string]ledger.Issued)
	for _, jti := range jtis {
		if t, ok := m.issued[jti]; ok {
			found[jti] = t
		}
	}
	return found, nil
}

func (m *memory) Living(_ context.Context, target revocation.Target, _ revocation.Tenant) (ledger.Living, error) {
	m.counted.Add(1)
	if m.entered != nil {
		m.entered <- struct{}{}
		<-m.open
	}
	return ledger.Living{Tokens: m.living[target], Since: since}, nil
}

// away is a key set that cannot be had.
type away struct{}

func (away) Key(context.Context, string, string) (token.Key, error) {
	return token.Key{}, token.ErrKeysUnavailable
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{TB: t, pool: pgtest.New(t)}
	_, err := w.pool.Exec(t.Context(), `INSERT INTO rescind.tenants (id, domain) VALUES ($1, $2)`, acme.ID, acme.Domain)
	if err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ledger.Config{Source: ours, ClockSkew: skew}, w.pool, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	head, err := l.Start(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Unix()
	w.memory = &memory{Ledger: l, issued: map[string]ledger.Issued{
		superKnown: {JTI: superKnown, Iss: ours, ClientID: "key-1", Exp: now + 500},
		superOver:  {JTI: superOver, Iss: ours, ClientID: "key-1", Exp: now - 500},
		acmeKnown:  {JTI: acmeKnown, Iss: acmeOurs, ClientID: "acme-1", Exp: now + 500},
	}, living: make(map[revocation.Target]int64)}
	w.state = &state{ledger: l, replica: replica.NewState(replica.StateConfig{})}
	if err := w.state.replica.Load(head, fill); err != nil {
		t.Fatal(err)
	}
	var issuers []token.Issuer
	for iss := range lifetimes {
		issuer := token.Issuer{Iss: iss, Keys: keySet(t)}
		if iss == awayIDP {
			issuer.Keys = away{}
		}
		issuers = append(issuers, issuer)
	}
	verifier, err := token.NewVerifier(issuers...)
	if err != nil {
		t.Fatal(err)
	}
	w.Revoker = revoke.New(revoke.Config{ClockSkew: skew}, w.memory, w.state, verifier)
	return w
}

// fill adds the catalog.
func fill(l *replica.Loader) error {
	id := int32(0)
	meta := func(t revocation.Tenant) catalog.Meta {
		id++
		return catalog.Meta{ID: id, UUID: fmt.Sprintf("00000000-0000-4000-8000-%012d", id), Tenant: t, Timestamp: 1}
	}
	for _, t := range []revocation.Tenant{super, acme} {
		m := meta(t)
		m.ID = t.ID
		l.Entity(&catalog.Tenant{Meta: m})
	}
	for _, k := range []struct {
		iss    string
		tenant revocation.Tenant
	}{{ours, super}, {idp, super}, {acmeOurs, acme}, {acmeIDP, acme}, {awayIDP, acme}} {
		l.Entity(&catalog.KeyManager{
			Meta: meta(k.tenant), Name: k.iss, Iss: k.iss, Enabled: true, MaxTokenLifetime: lifetimes[k.iss],
			Resident: k.iss == ours || k.iss == acmeOurs,
		})
	}
	for _, a := range []struct {
		name   string
		tenant revocation.Tenant
		keys   map[string]string // iss by consumer key
	}{
		{"shop", super, map[string]string{"key-1": ours, "ext-1": idp}},
		{"till", super, map[string]string{"key-2": ours, "twin": ours}},
		{"idle", super, nil},
		{"acme", acme, map[string]string{"acme-1": acmeOurs, "twin": acmeIDP}},
	} {
		app := &catalog.Application{Meta: meta(a.tenant), Name: a.name}
		l.Entity(app)
		for key, iss := range a.keys {
			l.Entity(&catalog.KeyMapping{
				Meta: meta(a.tenant), Application: catalog.Ref{ID: app.ID, UUID: app.UUID}, ConsumerKey: key, Iss: iss, KeyManager: iss,
			})
		}
	}
	return nil
}

// revoked is what a caller finds dead.
func (w *world) revoked(t replica.Token) (revocation.Kind, bool) {
	w.Helper()
	if _, err := w.state.Fresh(w.Context(), 0); err != nil {
		w.Fatal(err)
	}
	return w.state.replica.Check(t, time.Now().Unix())
}

// events is how many there are.
func (w *world) events() (n int) {
	w.Helper()
	if err := w.pool.QueryRow(w.Context(), `SELECT count(*) FROM rescind.log`).Scan(&n); err != nil {
		w.Fatal(err)
	}
	return n
}

// age makes all revocations a minute older, so that time has passed for a repeat.
func (w *world) age() {
	w.Helper()
	if _, err := w.pool.Exec(w.Context(), `UPDATE rescind.revocations SET exp = exp - 60, not_after = greatest(not_after - 60, 0)`); err != nil {
		w.Fatal(err)
	}
}

// one carries out an order.
func (w *world) one(by revoke.Caller, o revoke.Order) revoke.Outcome {
	w.Helper()
	outcomes, err := w.Revoke(w.Context(), by, []revoke.Order{o})
	if err != nil {
		w.Fatal(err)
	}
	return outcomes[0]
}

var (
	signer    = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	forger    = ed25519.NewKeyFromSeed([]byte("another seed of thirty-two bytes"))
	segmented = base64.RawURLEncoding
)

func keySet(t testing.TB) token.KeySet {
	t.Helper()
	set, err := token.ParseKeySet(fmt.Appendf(nil, `{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"k","alg":"EdDSA","x":%q}]}`,
		segmented.EncodeToString(signer.Public().(ed25519.PublicKey))))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

type claims map[string]any

// mint makes a token: an access token that lives for ten minutes, but for what c says.
func mint(key ed25519.PrivateKey, typ, iss string, c claims) string {
	all := claims{"iss": iss, "jti": "at-1", "azp": "key-1", "iat": time.Now().Unix(), "exp": time.Now().Unix() + 600}
	for name, value := range c {
		all[name] = value
		if value == nil {
			delete(all, name)
		}
	}
	header, _ := json.Marshal(map[string]string{"alg": "EdDSA", "kid": "k", "typ": typ})
	payload, _ := json.Marshal(all)
	input := segmented.EncodeToString(header) + "." + segmented.EncodeToString(payload)
	return input + "." + segmented.EncodeToString(ed25519.Sign(key, []byte(input)))
}

func access(iss string, c claims) string { return mint(signer, "at+jwt", iss, c) }
