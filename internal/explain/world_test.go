package explain

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/revoke"
)

const (
	iss     = "https://km.example.com"
	acmeIss = iss + "/t/acme.com"
	idp     = "https://idp.example" // carbon.super's, with consumer keys in the claim appkey
	awayIDP = "https://away.example"
	nobody  = "https://nobody.example"
)

var (
	acme  = revocation.Tenant{ID: 7, Domain: "acme.com"}
	admin = Caller{}
)

// source is the log as a follower sees it.
type source struct{ *ledger.Ledger }

func (s source) Load(ctx context.Context, at func(revocation.Position), revoked func(replica.Record), entity func(catalog.Entity)) error {
	return s.View(ctx, func(ctx context.Context, tx pgx.Tx, p revocation.Position, _ func(func(directory.Stored)) error) error {
		at(p)
		for e, err := range store.ReadAll(ctx, tx) {
			if err != nil {
				return err
			}
			entity(e)
		}
		return nil
	})
}

// gate holds up who waits for the newest state, while it is closed.
type gate struct {
	State
	entered chan struct{} // nil while open
	open    chan struct{}
}

func (g *gate) Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error) {
	if g.entered != nil {
		g.entered <- struct{}{}
		<-g.open
	}
	return g.State.Fresh(ctx, maxAge)
}

// gateways are a fleet of which everything is known.
type gateways struct {
	known         map[string]fleet.Gateway
	before, after *fleet.Sighting
	err           error
	barriers      []revocation.Position
	meanwhile     func() // what happens while somebody waits
}

func (f *gateways) Refresh(context.Context) error { return f.err }

func (f *gateways) Wait(_ context.Context, b fleet.Barrier) (r fleet.BarrierResult, err error) {
	f.barriers = append(f.barriers, b.Position)
	for _, g := range f.known {
		if b.Select(&g) {
			r.Gateways = append(r.Gateways, fleet.Confirmation{Gateway: g})
		}
	}
	if len(r.Gateways) != 1 {
		return r, fmt.Errorf("%d gateways are waited for", len(r.Gateways))
	}
	if f.meanwhile != nil {
		f.meanwhile()
	}
	return r, f.err
}

func (f *gateways) Gateway(id string) (fleet.Gateway, bool) {
	g, ok := f.known[id]
	return g, ok
}

func (f *gateways) When(string, time.Time) (before, after fleet.Sighting, okBefore, okAfter bool) {
	if f.before != nil {
		before, okBefore = *f.before, true
	}
	if f.after != nil {
		after, okAfter = *f.after, true
	}
	return before, after, okBefore, okAfter
}

// counting counts what it is asked to verify.
type counting struct {
	*token.Verifier
	mu sync.Mutex
	n  int
}

func (c *counting) Verify(ctx context.Context, compact string) (*token.Token, error) {
	c.mu.Lock()
	c.n++
	c.mu.Unlock()
	return c.Verifier.Verify(ctx, compact)
}

// world is an explainer of a service: two tenants with an issuer each and two external ones, an application and
// an API that it is subscribed to in each tenant, and one that it is not.
type world struct {
	*Explainer
	t        testing.TB
	pool     *pgxpool.Pool
	owner    *pgxpool.Pool
	ledger   *ledger.Ledger
	revoker  *revoke.Revoker
	gate     *gate
	fleet    *gateways
	verifier *counting
}

func newWorld(t testing.TB) *world {
	t.Helper()
	log, reg := slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	w := &world{t: t, fleet: &gateways{known: make(map[string]fleet.Gateway)}}
	db := pgtest.Create(t)
	pool := pgtest.Pool(t, db.ServiceURL)
	w.pool, w.owner = pool, pgtest.Pool(t, db.OwnerURL)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	w.ledger, err = ledger.New(ledger.Config{Source: iss, ClockSkew: 2 * time.Second}, pool, reg, log)
	must(err)
	_, err = w.ledger.Start(t.Context(), nil)
	must(err)
	key, err := authn.NewMasterKey(bytes.Repeat([]byte("k"), 32))
	must(err)
	clients, err := authn.New(authn.Config{}, pool, []authn.MasterKey{key}, reg, log)
	must(err)
	entities := store.New(store.Config{Issuer: iss, MaxTokenLifetime: time.Hour}, pool, w.ledger, clients, log)
	must(entities.EnsureIssuers(t.Context()))
	system := store.Caller{Actor: ledger.Actor{Name: "system"}}
	super := revocation.SuperTenant
	meta := func(id int32, tenant revocation.Tenant) catalog.Meta {
		return catalog.Meta{ID: id, UUID: fmt.Sprintf("00000000-0000-4000-8000-%012d", id), Tenant: tenant}
	}
	ref := func(id int32) catalog.Ref { return catalog.Ref{ID: id, UUID: meta(id, super).UUID} }
	api := func(id int32, tenant revocation.Tenant, name, context string) *catalog.API {
		return &catalog.API{
			Meta: meta(id, tenant), Name: name, Version: "1.0.0", Context: context, Provider: "admin", Type: "HTTP", Status: catalog.APIPublished,
			Operations: []catalog.Operation{{Target: "/menu", Verb: "GET", AuthType: "Any"}, {Target: "/open", Verb: "GET", AuthType: "None"}},
		}
	}
	for _, e := range []catalog.Entity{
		&catalog.Tenant{Meta: catalog.Meta{ID: acme.ID, Tenant: acme}},
		&catalog.KeyManager{Meta: catalog.Meta{Tenant: super}, Name: "idp", Iss: idp, Enabled: true, MaxTokenLifetime: 7200, ConsumerKeyClaim: "appkey"},
		&catalog.KeyManager{Meta: catalog.Meta{Tenant: super}, Name: "away", Iss: awayIDP, Enabled: true, MaxTokenLifetime: 7200},
		&catalog.Application{Meta: meta(1, super), Name: "shop", Owner: "ann"},
		&catalog.Application{Meta: meta(2, acme), Name: "acme", Owner: "bob"},
		api(11, super, "pizza", "/pizza/1.0.0"),
		api(12, super, "pasta", "/pasta/1.0.0"),
		api(13, acme, "anvil", "/t/acme.com/anvil/1.0.0"),
		&catalog.Subscription{Meta: meta(21, super), Application: ref(1), API: ref(11)},
		&catalog.Subscription{Meta: meta(22, acme), Application: ref(2), API: ref(13)},
	} {
		_, _, err := entities.Apply(t.Context(), system, []store.Change{{Op: store.Create, Entity: e}})
		must(err)
	}
	for _, k := range []struct {
		tenant revocation.Tenant
		app    int32
		key    string
		km     string // empty: ours
	}{{super, 1, "key-1", ""}, {super, 1, "ext-1", "idp"}, {acme, 2, "acme-1", ""}} {
		made := store.NewKey{Mapping: catalog.KeyMapping{
			Meta: catalog.Meta{Tenant: k.tenant}, Application: catalog.Ref{ID: k.app}, ConsumerKey: k.key, KeyType: catalog.Production, KeyManager: k.km,
		}}
		if k.km == "" {
			made.Client = &authn.Registration{AuthMethod: "none"}
		}
		_, _, err := entities.CreateKey(t.Context(), system, made)
		must(err)
	}

	state, err := follow.New(follow.Config{}, source{w.ledger}, reg, log)
	must(err)
	must(state.Load(t.Context()))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- state.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	w.gate = &gate{State: state}

	verifier, err := token.NewVerifier(
		token.Issuer{Iss: iss, Keys: keySet(t), Tenant: super, MaxLifetime: time.Hour}, token.Issuer{Iss: acmeIss, Keys: keySet(t), Tenant: acme},
		token.Issuer{Iss: idp, Keys: keySet(t), Tenant: super}, token.Issuer{Iss: awayIDP, Keys: away{}, Tenant: super},
	)
	must(err)
	w.verifier = &counting{Verifier: verifier}
	w.revoker = revoke.New(revoke.Config{ClockSkew: 2 * time.Second}, w.ledger, state, verifier)
	w.Explainer, err = New(Deps{Ledger: w.ledger, State: w.gate, Verifier: w.verifier, Fleet: w.fleet, Leeway: 30 * time.Second})
	must(err)
	return w
}

// away is a key set that cannot be had.
type away struct{}

func (away) Key(context.Context, string, string) (token.Key, error) {
	return token.Key{}, errors.New("no route to host")
}

var (
	newKey = func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			panic(err)
		}
		return key
	}
	signer = sync.OnceValue(newKey)
	forger = sync.OnceValue(newKey)

	segmented = base64.RawURLEncoding
)

func keySet(t testing.TB) token.KeySet {
	t.Helper()
	point, err := signer().PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	set, err := token.ParseKeySet(fmt.Appendf(nil, `{"keys":[{"kty":"EC","crv":"P-256","kid":"k","alg":"ES256","x":%q,"y":%q}]}`,
		segmented.EncodeToString(point[1:33]), segmented.EncodeToString(point[33:])))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

type claims map[string]any

// all are the claims of a token that lives for ten minutes, but for what c says.
func (c claims) all(iss string) claims {
	now := time.Now().Unix()
	all := claims{"iss": iss, "jti": "at-1", "azp": "key-1", "sub": "u-1", "iat": now, "exp": now + 600}
	for name, value := range c {
		all[name] = value
		if value == nil {
			delete(all, name)
		}
	}
	return all
}

func (c claims) json(iss string) json.RawMessage {
	b, err := json.Marshal(c.all(iss))
	if err != nil {
		panic(err)
	}
	return b
}

// mint makes an access token.
func mint(key *ecdsa.PrivateKey, iss string, c claims) string {
	input := segmented.EncodeToString([]byte(`{"alg":"ES256","kid":"k","typ":"at+jwt"}`)) + "." + segmented.EncodeToString(c.json(iss))
	hash := sha256.Sum256([]byte(input))
	r, s, err := ecdsa.Sign(rand.Reader, key, hash[:])
	if err != nil {
		panic(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return input + "." + segmented.EncodeToString(signature)
}

func access(iss string, c claims) string { return mint(signer(), iss, c) }

// revoke carries out an order as account root.
func (w *world) revoke(o revoke.Order) revoke.Outcome {
	w.t.Helper()
	by := revoke.Caller{Actor: ledger.Actor{Name: "account:root"}}
	outcomes, err := w.revoker.Revoke(w.t.Context(), by, []revoke.Order{o})
	if err != nil {
		w.t.Fatal(err)
	}
	return outcomes[0]
}

// ask is an answer, in which there is nothing of the token.
func (w *world) ask(by Caller, q Question) Answer {
	w.t.Helper()
	a, err := w.Explain(w.t.Context(), by, q)
	if err != nil {
		w.t.Fatal(err)
	}
	encoded, err := json.Marshal(a)
	if err != nil {
		w.t.Fatal(err)
	}
	silent(w.t, q.Token, string(encoded), a.Text(), strings.Join(strings.Fields(a.Text()), ""))
	return a
}

// silent checks that no text has a token, or one of its parts.
func silent(t testing.TB, tok string, texts ...string) {
	t.Helper()
	for n, part := range append(strings.Split(tok, "."), tok) {
		for _, text := range texts {
			if part != "" && strings.Contains(text, part) {
				t.Errorf("part %d of the token is in %s", n, text)
			}
		}
	}
}
