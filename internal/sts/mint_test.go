package sts

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
)

func order(client string) Order {
	return Order{Tenant: revocation.SuperTenant.Domain, ClientID: client, Lifetime: 5 * time.Minute}
}

// A minted token is one of the token endpoint, but for what the registration of its client says.
func TestMint(t *testing.T) {
	t.Parallel()
	memory := &fakeMemory{}
	s := start(t, pgtest.New(t), Config{Memory: memory, TokenLifetime: 5 * time.Minute})
	now := time.Now().Truncate(time.Second)
	s.now = func() time.Time { return now }
	got, err := s.Mint(t.Context(), order("c"))
	if err != nil {
		t.Fatal(err)
	}
	verified, err := verify(t, s, got.Compact)
	if err != nil {
		t.Fatal(err)
	}
	if verified.Type != typAccessToken || verified.ID != got.ID || got.Iss != iss || !got.Expiry.Equal(now.Add(5*time.Minute)) {
		t.Errorf("minted is %+v, verified %+v", got, verified)
	}
	claimsOf := func(compact string) map[string]any {
		body := `{"access_token":"` + compact + `"}`
		_, claims := payload(t, answer{body: body})
		return claims
	}
	minted, granted := claimsOf(got.Compact), map[string]any(nil)
	_, granted = payload(t, post(t, s, tokenPath))
	delete(granted, "jti")
	withoutID := claimsOf(got.Compact)
	delete(withoutID, "jti")
	if d := cmp.Diff(granted, withoutID); d != "" {
		t.Errorf("claims (-token endpoint +minted):\n%s", d)
	}
	want := ledger.Issued{JTI: minted["jti"].(string), Iss: iss, ClientID: "c", Subject: "c", Exp: got.Expiry.Unix()}
	if d := cmp.Diff(want, memory.remembered[0]); d != "" {
		t.Errorf("remembered (-want +got):\n%s", d)
	}

	o := order("c")
	o.Audience = []string{"https://gateway.example.com"}
	got, err = s.Mint(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if aud := claimsOf(got.Compact)["aud"]; aud != "https://gateway.example.com" {
		t.Errorf("aud is %v", aud)
	}
}

func TestMintSelfContained(t *testing.T) {
	t.Parallel()
	state := stateOf(t, iss, "c")
	manyAPIs(t, state, 1)
	s := start(t, pgtest.New(t), Config{State: state})
	got, err := s.Mint(t.Context(), order("c"))
	if err != nil {
		t.Fatal(err)
	}
	_, claims := payload(t, answer{body: `{"access_token":"` + got.Compact + `"}`})
	if apis, ok := claims["subscribedAPIs"].([]any); !ok || len(apis) != 1 {
		t.Errorf("claims are %v", claims)
	}
	manyAPIs(t, state, 0)
	state.content = state.content[:3]
	state.load(t)
	if _, err := s.Mint(t.Context(), order("c")); !errors.Is(err, errNoAPI) {
		t.Errorf("without a subscription: %v, want %v", err, errNoAPI)
	}
}

// The rules of the token endpoint hold.
func TestMintRefuses(t *testing.T) {
	t.Parallel()
	const far = maxAhead + 60
	state := stateOf(t, iss, "c", "blocked", "dead")
	now := time.Now().Truncate(time.Second)
	for client, ahead := range map[string]int64{"c": 2, "dead": far} {
		state.revoked = append(state.revoked, replica.Record{
			Target: revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: client}, Tenant: revocation.SuperTenant,
			Exp: now.Unix() + 3600, NotAfter: now.Unix() + ahead,
		})
	}
	state.load(t)
	s := start(t, pgtest.New(t), Config{State: state})
	s.now = func() time.Time { return now }

	got, err := s.Mint(t.Context(), order("c"))
	if err != nil {
		t.Fatal(err)
	}
	if want := now.Add(3*time.Second + 5*time.Minute); !got.Expiry.Equal(want) {
		t.Errorf("after a revocation up to 2 s ahead exp is %s, want %s: iat must be past it", got.Expiry, want)
	}
	for name, tt := range map[string]struct {
		order Order
		want  error
	}{
		"blocked": {order("blocked"), errBlocked},
		"unknown": {order("nobody"), errUnknown},
		"dead":    {order("dead"), errAllDead},
	} {
		_, err := s.Mint(t.Context(), tt.order)
		if oauth, ok := errors.AsType[*authn.OAuthError](err); !ok || oauth.Status == http.StatusInternalServerError || !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
	other := order("c")
	other.Tenant = "nowhere.example"
	if _, err := s.Mint(t.Context(), other); err == nil || !strings.Contains(err.Error(), `"nowhere.example" has no issuer`) {
		t.Errorf("of another tenant: %v", err)
	}
	state.err = context.DeadlineExceeded
	if oauth, ok := errors.AsType[*authn.OAuthError](func() error { _, err := s.Mint(t.Context(), order("c")); return err }()); !ok || oauth.Status != 503 {
		t.Errorf("without a fresh state: %v", oauth)
	}
	state.err = nil
	for i := range s.cfg.MaxQueue {
		select {
		case s.queue <- struct{}{}:
		default:
			t.Fatalf("no place %d", i)
		}
	}
	if _, err := s.Mint(t.Context(), order("c")); !errors.Is(err, errQueueFull) {
		t.Errorf("without a place: %v, want %v", err, errQueueFull)
	}
}

func TestMintLifetime(t *testing.T) {
	t.Parallel()
	state := stateOf(t, iss, "c")
	s := start(t, pgtest.New(t), Config{State: state})
	now := time.Now().Truncate(time.Second)
	s.now = func() time.Time { return now }
	for _, tt := range []struct {
		asked   time.Duration
		longest int32 // of the key manager
		want    time.Duration
	}{
		{5 * time.Minute, 3600, 5 * time.Minute}, {5 * time.Minute, 0, 5 * time.Minute}, {5 * time.Minute, 120, 2 * time.Minute},
		{time.Second, 3600, time.Second}, {2 * time.Hour, 7200, MaxTokenLifetime}, {0, 3600, 0}, {time.Millisecond, 3600, 0}, {1500 * time.Millisecond, 3600, 0},
	} {
		km := *state.content[0].(*catalog.KeyManager)
		km.MaxTokenLifetime = tt.longest
		state.content[0] = &km
		state.load(t)
		o := order("c")
		o.Lifetime = tt.asked
		got, err := s.Mint(t.Context(), o)
		if tt.want == 0 {
			if err == nil {
				t.Errorf("a token for %s is made", tt.asked)
			}
			continue
		}
		if err != nil || got.Expiry.Sub(now) != tt.want {
			t.Errorf("a token for %s of an issuer with %d s: %v, lives for %s, want %s", tt.asked, tt.longest, err, got.Expiry.Sub(now), tt.want)
		}
	}
}
