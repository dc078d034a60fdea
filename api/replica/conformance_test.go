package replica

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"maps"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// The decisions of a gateway that are about revocations: a token is verified, then compared
// with what is revoked, as a gateway does both.

const (
	frozen   = 1795209000 // the clock of all cases
	otherIss = "https://b.example.com"
)

// testGateway decides about tokens that it mints.
type testGateway struct {
	verifier *token.Verifier
	signer   jose.Signer
}

func newTestGateway(t *testing.T) testGateway {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "key-1"}}})
	must(t, err)
	keys, err := token.ParseKeySet(set)
	must(t, err)
	var g testGateway
	g.verifier, err = token.NewVerifier(
		token.Issuer{Iss: iss, Keys: keys, Tenant: revocation.SuperTenant},
		token.Issuer{Iss: otherIss, Keys: keys, Tenant: acme},
	)
	must(t, err)
	// Without a kid, which the revocation of the key must not need.
	g.signer, err = jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, (&jose.SignerOptions{}).WithType("at+jwt"))
	must(t, err)
	return g
}

// refused reports what r refuses a token with these claims for. Others are those of T1.
func (g testGateway) refused(t *testing.T, r *State, changes map[string]any) (revocation.Kind, bool) {
	t.Helper()
	claims := map[string]any{
		"iss": iss, "sub": "alice", "client_id": "app one", "aud": "https://api.example.com", "jti": "at-1", "sid": "s-1",
		"iat": frozen - 60, "exp": frozen + 600,
	}
	maps.Copy(claims, changes)
	maps.DeleteFunc(claims, func(_ string, value any) bool { return value == nil })
	payload, err := json.Marshal(claims)
	must(t, err)
	jws, err := g.signer.Sign(payload)
	must(t, err)
	compact, err := jws.CompactSerialize()
	must(t, err)
	got, err := g.verifier.Accept(t.Context(), compact, token.Acceptance{Leeway: 30 * time.Second}, time.Unix(frozen, 0))
	must(t, err)
	issuer, _ := g.verifier.Issuer(got.Issuer)
	return r.Check(TokenOf(got, issuer.Tenant.Domain), frozen)
}

// holding is a replica in which nothing but this is revoked.
func holding(t *testing.T, target revocation.Target, notAfter int64) *State {
	t.Helper()
	rec := Record{Target: target, Tenant: revocation.SuperTenant, Exp: frozen + 3600}
	if target.Kind.HasTime() {
		rec.NotAfter = notAfter
	}
	r := NewState(StateConfig{})
	load(t, r, revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) { l.Revocation(rec) })
	return r
}

func TestConformance(t *testing.T) {
	t.Parallel()
	g := newTestGateway(t)

	t.Run("C131", func(t *testing.T) {
		t.Parallel()
		for kind, ids := range map[revocation.Kind]struct{ matching, unrelated string }{
			revocation.KindToken:   {"at-1", "at-2"},
			revocation.KindSession: {"s-1", "s-2"},
			revocation.KindClient:  {"app one", "app-2"},
			revocation.KindSubject: {"alice", "bob"},
			revocation.KindTenant:  {"carbon.super", acme.Domain},
			revocation.KindKey:     {"key-1", "key-2"},
		} {
			target := revocation.Target{Kind: kind, Iss: iss, ID: ids.matching}
			if kind == revocation.KindTenant {
				target.Iss = ""
			}
			r := holding(t, target, frozen)
			if got, dead := g.refused(t, r, nil); !dead || got != kind {
				t.Errorf("under a revocation of its %s: refused for %q, %t", kind, got, dead)
			}
			r.View(func(v *View) {
				if wide := v.Wide(); (wide == 1) != (kind != revocation.KindToken) {
					t.Errorf("%d of kind %s are wide", wide, kind)
				}
			})
			target.ID = ids.unrelated
			if got, dead := g.refused(t, holding(t, target, frozen), nil); dead {
				t.Errorf("under the revocation of another %s: refused for %q", kind, got)
			}
			if kind != revocation.KindTenant {
				target.Iss, target.ID = otherIss, ids.matching
				if got, dead := g.refused(t, holding(t, target, frozen), nil); dead {
					t.Errorf("under the revocation of another issuer's %s: refused for %q", kind, got)
				}
			}
		}
		for _, claim := range []string{"azp", "client_id", "consumerKey"} {
			target := revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "app one"}
			claims := map[string]any{"client_id": nil}
			claims[claim] = "app one"
			if _, dead := g.refused(t, holding(t, target, frozen), claims); !dead {
				t.Errorf("under a revocation of its client, which it names in %s: accepted", claim)
			}
		}
	})

	t.Run("C132", func(t *testing.T) {
		t.Parallel()
		const at = frozen - 100
		r := holding(t, revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "alice"}, at)
		for _, tt := range []struct {
			iat  json.Number
			dead bool
		}{{"1795208899", true}, {"1795208900", true}, {"1795208900.9", true}, {"1795208901", false}} {
			if _, dead := g.refused(t, r, map[string]any{"iat": tt.iat}); dead != tt.dead {
				t.Errorf("iat %s, revoked up to %d: refused %t, want %t", tt.iat, at, dead, tt.dead)
			}
		}
	})

	t.Run("C136", func(t *testing.T) {
		t.Parallel()
		r := holding(t, revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "at-1"}, 0)
		if _, dead := g.refused(t, r, nil); !dead {
			t.Error("T1 is accepted")
		}
		if kind, dead := g.refused(t, r, map[string]any{"iss": otherIss}); dead {
			t.Errorf("the same jti of another issuer is refused for its %s", kind)
		}
	})
}

func TestTokenOfWithoutJTI(t *testing.T) {
	t.Parallel()
	jwt := &token.Token{Issuer: iss, SigningInput: "e30.e30", Signature: "eA"}
	r := holding(t, revocation.DigestTarget(iss, "e30.e30"), 0)
	if kind, dead := r.Check(TokenOf(jwt, acme.Domain), frozen); kind != revocation.KindToken || !dead {
		t.Errorf("a revoked token without jti: %q, %t", kind, dead)
	}
	named := *jwt
	named.ID = "at-1"
	if got := TokenOf(&named, acme.Domain); got.Digest != "" {
		t.Errorf("a token with a jti has the digest %s", got.Digest)
	}
}
