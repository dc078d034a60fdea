package sts

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// ledgerState is the state of a real log.
type ledgerState struct {
	ledger  *ledger.Ledger
	replica *replica.State
	mu      sync.Mutex
}

func (s *ledgerState) Fresh(ctx context.Context, _ time.Duration) (revocation.Position, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	head, err := s.ledger.Head(ctx)
	if err != nil {
		return head, err
	}
	events, err := s.ledger.After(ctx, s.replica.At().Seq, 1000)
	for _, e := range events {
		if err == nil {
			err = s.replica.Apply(e)
		}
	}
	return head, err
}

func (s *ledgerState) Replica() *replica.State { return s.replica }

// gateway verifies tokens with a copy of the key set that it keeps for as long as it may, and
// never asks for another because of a kid that it does not know.
type gateway struct {
	keys    *token.StaticKeySet
	fetched time.Duration // on the load's clock
}

// rotationLoad asks for tokens and gives them to gateways, while keys are changed.
type rotationLoad struct {
	*testing.T
	s     *Server
	state *ledgerState
	keys  *Keys

	clock     time.Duration // that has passed for keys and gateways
	withdrawn atomic.Value  // the kid of the last key that was withdrawn, once its rotation has returned
	mu        sync.RWMutex  // of what follows
	gateways  []gateway
	issued    []issuedToken
}

type issuedToken struct {
	compact, kid string
	at           time.Duration
}

// fetch is the key set as it is served now.
func (l *rotationLoad) fetch() *token.StaticKeySet {
	l.Helper()
	set, err := token.ParseKeySet([]byte(get(l, l.s, jwksPath, nil).body))
	if err != nil {
		l.Fatal(err)
	}
	return set
}

func (l *rotationLoad) verify(keys *token.StaticKeySet, compact string) (*token.Token, error) {
	v, err := token.NewVerifier(token.Issuer{Iss: iss, Keys: keys})
	if err != nil {
		l.Fatal(err)
	}
	return v.Verify(l.Context(), compact)
}

// during runs change under load. Every token that is handed out meanwhile must be good at every
// gateway, at once unless its key had to be used before gateways could know it.
func (l *rotationLoad) during(change func(), atOnce bool) {
	l.Helper()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 4 {
				l.ask(atOnce)
			}
		})
	}
	change()
	wg.Wait()
	for range 2 {
		l.ask(atOnce)
	}
}

func (l *rotationLoad) ask(atOnce bool) {
	withdrawn, _ := l.withdrawn.Load().(string)
	w := httptest.NewRecorder()
	l.s.serveToken(func(*http.Request) string { return revocation.SuperTenant.Domain })(w,
		httptest.NewRequestWithContext(l.Context(), http.MethodPost, tokenPath, nil))
	var response tokenResponse
	if w.Code != 200 {
		l.Errorf("a token is refused: %d %s", w.Code, w.Body)
		return
	}
	answer{body: w.Body.String()}.decode(l, &response)
	l.mu.RLock()
	gateways := append([]gateway(nil), l.gateways...)
	l.mu.RUnlock()
	if !atOnce {
		gateways = []gateway{{keys: l.fetch()}}
	}
	for _, g := range gateways {
		minted, err := l.verify(g.keys, response.AccessToken)
		if err != nil && !atOnce && errors.Is(err, token.ErrUnknownKey) {
			continue // withdrawn since
		}
		if err != nil {
			l.Errorf("after %s a gateway that fetched the keys at %s refuses a new token: %v", l.clock, g.fetched, err)
			return
		}
		if minted.KeyID == withdrawn {
			l.Errorf("a token is handed out under key %s, which was withdrawn before", withdrawn)
		}
		l.mu.Lock()
		l.issued = append(l.issued, issuedToken{response.AccessToken, minted.KeyID, l.clock})
		l.mu.Unlock()
		atOnce = true
	}
}

// pass lets time pass in steps, under load. Gateways fetch the keys when their copies are too old.
func (l *rotationLoad) pass(d time.Duration) {
	l.Helper()
	const step = keySetMaxAge / 2
	for end := l.clock + d; l.clock < end; {
		next := min(step, end-l.clock)
		l.during(func() { later(l, l.s.store.pool, next) }, true)
		l.clock += next
		if err := l.s.own().reload(l.Context()); err != nil {
			l.Fatal(err)
		}
		l.mu.Lock()
		for i := range l.gateways {
			if l.clock-l.gateways[i].fetched >= keySetMaxAge {
				l.gateways[i] = gateway{l.fetch(), l.clock}
			}
		}
		l.mu.Unlock()
		l.check("")
	}
}

// check looks whether tokens that may still be used are good at every gateway. Those of the
// withdrawn key must be dead.
func (l *rotationLoad) check(withdrawn string) {
	l.Helper()
	if _, err := l.state.Fresh(l.Context(), 0); err != nil {
		l.Fatal(err)
	}
	dead := 0
	sampled := make(map[issuedToken]bool) // one for each key and time is enough for the gateways
	for _, issued := range l.issued {
		if l.clock-issued.at > MaxTokenLifetime+revocation.MaxLeeway {
			continue
		}
		_, revoked := l.state.replica.Check(replica.Token{Iss: iss, Tenant: "carbon.super", ClientID: "c", Sub: "c", KID: issued.kid}, time.Now().Unix())
		if revoked != (issued.kid == withdrawn) {
			l.Errorf("after %s, a token of %s under key %s is revoked: %t; withdrawn was %q", l.clock, issued.at, issued.kid, revoked, withdrawn)
		}
		if revoked {
			dead++
			continue
		}
		like := issuedToken{kid: issued.kid, at: issued.at}
		if sampled[like] {
			continue
		}
		sampled[like] = true
		for _, g := range l.gateways {
			if _, err := l.verify(g.keys, issued.compact); err != nil {
				l.Errorf("after %s, a gateway refuses a token of %s: %v", l.clock, issued.at, err)
			}
		}
	}
	if withdrawn != "" && dead == 0 {
		l.Error("no token was issued under the withdrawn key: the test shows nothing")
	}
}

func (l *rotationLoad) rotate(r Rotation) (made KeyInfo) {
	l.Helper()
	r.Iss = iss
	changed, err := l.keys.Rotate(l.Context(), operator, r)
	if err != nil {
		l.Fatal(err)
	}
	return changed[0]
}

// Keys are rotated, retired and withdrawn under load: no token is refused that should not be,
// and none accepted that should be.
func TestRotationUnderLoad(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	state := &ledgerState{ledger: newLedger(t, pool), replica: replica.NewState(replica.StateConfig{})}
	head, err := state.ledger.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = state.replica.Load(head, func(l *replica.Loader) error {
		l.Entity(resident(1, revocation.SuperTenant, iss))
		for _, e := range registered(1, iss, "c") {
			l.Entity(e)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	l := &rotationLoad{T: t, s: start(t, pool, Config{State: state}), state: state, keys: newKeys(t, pool, masterKey(t, "a"))}
	for _, fetched := range []time.Duration{0, -keySetMaxAge / 3, -keySetMaxAge / 2} {
		l.gateways = append(l.gateways, gateway{l.fetch(), fetched})
	}

	var second, third, fourth KeyInfo
	l.during(func() { second = l.rotate(Rotation{}) }, true)
	l.pass(publishedBefore + keySetMaxAge/2)
	if got := signing(t, l.s); got != second.KID {
		t.Errorf("%s signs, want %s", got, second.KID)
	}
	l.pass(keySetMaxAge)

	l.during(func() { third = l.rotate(Rotation{}) }, true)
	l.pass(keySetMaxAge)
	l.during(func() {
		if _, err := l.keys.Retire(t.Context(), operator, third.KID, ""); err != nil {
			t.Error(err)
		}
	}, true)
	l.pass(publishedBefore)
	if got := signing(t, l.s); got != second.KID {
		t.Errorf("%s signs, want %s, whose successor was retired", got, second.KID)
	}

	l.during(func() {
		fourth = l.rotate(Rotation{Compromised: second.KID})
		l.withdrawn.Store(second.KID)
	}, false)
	if got := signing(t, l.s); got != fourth.KID {
		t.Errorf("%s signs, want %s", got, fourth.KID)
	}
	for i := range l.gateways {
		l.gateways[i] = gateway{l.fetch(), l.clock}
	}
	l.check(second.KID)
	for _, issued := range l.issued {
		if _, err := l.verify(l.gateways[0].keys, issued.compact); issued.kid == second.KID && !errors.Is(err, token.ErrUnknownKey) {
			t.Errorf("a gateway that has fetched the keys since accepts a token of the withdrawn one: %v", err)
		}
	}
}
