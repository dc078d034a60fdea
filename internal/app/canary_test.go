package app

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/canary"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/sts"
)

const canaryISS = "https://km.example.com"

// canaryParts are what the canary's issuer is made of, on a database of their own.
type canaryParts struct {
	ledger   *ledger.Ledger
	entities *store.Store
	state    *follow.Follower
	own      *sts.Server
}

func newCanaryParts(t *testing.T) canaryParts {
	t.Helper()
	pool, reg, log := pgtest.New(t), prometheus.NewRegistry(), slog.New(slog.DiscardHandler)
	cfg := Config{Issuer: canaryISS, CommitTimeout: 5 * time.Second, LogRetention: time.Hour, MaxBatch: 100, QueueSize: 1000}
	var p canaryParts
	var err error
	must := func() {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	p.ledger, err = newLedger(cfg, pool, reg, log)
	must()
	_, err = p.ledger.Start(t.Context(), nil)
	must()
	key, err := authn.NewMasterKey([]byte(strings.Repeat("k", 32)))
	must()
	callers, err := authn.New(authn.Config{Issuer: canaryISS}, pool, []authn.MasterKey{key}, reg, log)
	must()
	p.entities = store.New(catalogConfig(cfg), pool, p.ledger, callers, log)
	err = p.entities.EnsureIssuers(t.Context())
	must()
	err = p.entities.Announce(t.Context())
	must()
	p.state, err = follow.New(follow.Config{}, stateSource{p.ledger}, reg, log)
	must()
	err = p.state.Load(t.Context())
	must()
	p.own, err = sts.New(t.Context(), sts.Config{Issuer: canaryISS, State: p.state, Memory: p.ledger, Algorithm: "ES256"}, pool, []authn.MasterKey{key}, callers, log)
	must()

	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- p.ledger.Run(ctx) }()
	go func() { done <- p.state.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, <-done); err != nil {
			t.Error(err)
		}
	})
	return p
}

// gateway is a replica that has what the database has now.
func (p canaryParts) gateway(t *testing.T, mode replica.ClaimsMode) *replica.Replica {
	t.Helper()
	r, err := replica.New(replica.Config{Source: noSource{}, Claims: mode, Staleness: replica.Staleness{Max: time.Hour, Then: replica.Serve}})
	if err != nil {
		t.Fatal(err)
	}
	var at revocation.Position
	var entities []catalog.Entity
	var records []replica.Record
	err = stateSource{p.ledger}.Load(t.Context(), func(position revocation.Position) { at = position },
		func(r replica.Record) { records = append(records, r) }, func(e catalog.Entity) { entities = append(entities, e) })
	if err != nil {
		t.Fatal(err)
	}
	err = r.State().Load(at, func(l *replica.Loader) error {
		for _, e := range entities {
			l.Entity(e)
		}
		for _, r := range records {
			l.Revocation(r)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// noSource is never asked.
type noSource struct{}

func (noSource) Load(context.Context, *replica.State) error { return errors.New("nothing to load") }
func (noSource) Events(context.Context, revocation.Position) (replica.Page, error) {
	return replica.Page{}, errors.New("nothing to read")
}

// What the canary's issuer makes is good for the canary's API alone, and dead once it is revoked.
func TestCanaryIssuer(t *testing.T) {
	t.Parallel()
	p := newCanaryParts(t)
	_, _, err := p.entities.Apply(t.Context(), store.Caller{Actor: ledger.Actor{Name: "account:admin"}}, []store.Change{
		{Op: store.Create, Entity: &catalog.API{Name: "Pizza", Version: "v1", Context: "/pizza/v1", Provider: "admin", Status: catalog.APIPublished,
			Operations: []catalog.Operation{{Target: "/*", Verb: "GET"}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	issuer := &canaryIssuer{entities: p.entities, own: p.own, ledger: p.ledger, audience: []string{"https://gateways.example.com"}}
	before := time.Now()
	issued, err := issuer.Issue(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if left := issued.Expires.Sub(before); left < canaryLifetime-2*time.Second || left > canaryLifetime+2*time.Second {
		t.Errorf("it lives for %s, want %s", left, canaryLifetime)
	}
	var km *catalog.KeyManager
	p.state.Replica().View(func(v *replica.View) { km = v.KeyManager(canaryISS) })
	verifier, err := token.NewVerifier(p.own.Issuer(km))
	if err != nil {
		t.Fatal(err)
	}
	verified, err := verifier.Verify(t.Context(), issued.Compact)
	if err != nil {
		t.Fatal(err)
	}
	if verified.ID != issued.ID || verified.ClientID != store.CanaryKey || !cmp.Equal([]string(verified.Audience), []string{"https://gateways.example.com"}) {
		t.Errorf("the token is %+v", verified)
	}

	modes := []replica.ClaimsMode{replica.ClaimsFirst, replica.CatalogFirst, replica.ClaimsOnly}
	for _, mode := range modes {
		g := p.gateway(t, mode)
		for path, want := range map[string]bool{
			"/rescind-canary/v1": true, "/rescind-canary/v1/": true, "/rescind-canary/v1/x/y": true,
			"/pizza/v1": false, "/pizza/v1/menu": false, "/": false, "/rescind-canary/v2": false, "/rescind-canary/v1x": false,
		} {
			if a := g.Authorize(verified, replica.Request{Method: "GET", Path: path}); a.Authorized != want {
				t.Errorf("claims %v: %s is authorized: %v (%s), want %v", mode, path, a.Authorized, a.Reason, want)
			}
		}
		if a := g.Authorize(verified, replica.Request{Method: "POST", Path: "/rescind-canary/v1/"}); a.Authorized && mode != replica.ClaimsOnly {
			t.Errorf("claims %v: a POST is authorized", mode)
		}
	}

	at, err := issuer.Revoke(t.Context(), issued)
	if err != nil {
		t.Fatal(err)
	}
	events, err := p.ledger.After(t.Context(), at.Seq-1, 1)
	if err != nil || len(events) != 1 || at.Epoch != events[0].Epoch {
		t.Fatalf("after %v: %v, %v", at, events, err)
	}
	r, err := events[0].Revocation()
	want := revocation.Target{Kind: revocation.KindToken, Iss: canaryISS, ID: issued.ID}
	if err != nil || r.Target != want || r.Exp != issued.Expires.Unix() || r.Reason != "canary" || r.Tenant != revocation.SuperTenant {
		t.Errorf("the revocation is %+v, %v", r, err)
	}
	for _, mode := range modes {
		if a := p.gateway(t, mode).Authorize(verified, replica.Request{Method: "GET", Path: "/rescind-canary/v1/"}); a.Authorized || a.Outcome != replica.Revoked {
			t.Errorf("claims %v: after its revocation it is authorized: %v (%v)", mode, a.Authorized, a.Outcome)
		}
	}

	// The next one is another, and good although the application was deleted meanwhile.
	app := p.canaryApplication(t)
	_, _, err = p.entities.Apply(t.Context(), store.Caller{Actor: ledger.Actor{Name: "account:admin"}}, []store.Change{{Op: store.Delete, Entity: app}})
	if err != nil {
		t.Fatal(err)
	}
	next, err := issuer.Issue(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if verified, err = verifier.Verify(t.Context(), next.Compact); err != nil || next.ID == issued.ID {
		t.Fatalf("the next is %v: %v", verified, err)
	}
	if a := p.gateway(t, replica.ClaimsFirst).Authorize(verified, replica.Request{Method: "GET", Path: "/rescind-canary/v1/"}); !a.Authorized {
		t.Errorf("the next one is refused: %s", a.Reason)
	}

	if _, err := p.entities.Block(t.Context(), store.Caller{}, p.canaryApplication(t).UUID, 0, true, false); err != nil {
		t.Fatal(err)
	}
	if _, err := issuer.Issue(t.Context()); err == nil || !strings.Contains(err.Error(), "blocked") {
		t.Errorf("of a blocked application: %v", err)
	}
}

func (p canaryParts) canaryApplication(t *testing.T) *catalog.Application {
	t.Helper()
	list, err := p.entities.List(t.Context(), store.Caller{}, catalog.NounApplication, store.Filter{Name: "rescind-canary"}, 0, 2)
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	return list[0].(*catalog.Application)
}

// One process leads, and when it ends another does.
func TestCanaryLead(t *testing.T) {
	t.Parallel()
	p := newCanaryParts(t)
	lead := leadCanary(p.ledger)
	first, end, err := lead(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		_, end, err := lead(t.Context())
		if err == nil {
			if first.Err() == nil {
				t.Error("two lead at a time")
			}
			end()
		}
		got <- err
	}()
	hurried, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, err := lead(hurried); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second leader: %v", err)
	}
	if first.Err() != nil {
		t.Fatal(context.Cause(first))
	}
	end()
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestNewCanary(t *testing.T) {
	t.Parallel()
	with := func(c Canary) (*canary.Canary, error) {
		return newCanary(Config{Canary: c}, nil, nil, nil, (*fleet.Fleet)(nil), prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	}
	if c, err := with(Canary{}); c != nil || err != nil {
		t.Errorf("off: %v, %v", c, err)
	}
	if c, err := with(Canary{Every: time.Minute, Limit: 5 * time.Second}); c == nil || err != nil {
		t.Errorf("on: %v, %v", c, err)
	}
	if _, err := with(Canary{Every: time.Second, Limit: time.Second}); err == nil {
		t.Error("an interval of 1s is taken")
	}
}
