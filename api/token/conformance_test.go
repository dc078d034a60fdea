package token

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The decisions of a gateway that are about the token alone, and with them the list of RFC 8725.
// C131 and C132, about revocations, and the rest of C136 are in package replica.

const (
	frozen   = 1795209000 // the clock of all cases
	leewayOf = 30 * time.Second
	otherIss = "https://b.example.com"
	jwtIss   = "https://legacy.example.com" // has the typ exception
	audience = "https://api.example.com"
)

// gatewayCase is a token and the error that it must be refused with, nil if it is accepted.
type gatewayCase struct {
	name, compact string
	want          error
}

// gateway is what decides about the tokens of the cases.
type gateway struct {
	verifier   *Verifier
	acceptance Acceptance
}

func newGateway(t testing.TB) gateway {
	t.Helper()
	return gateway{
		verifier: verifier(t,
			Issuer{
				Iss: iss, MaxLifetime: time.Hour,
				Keys: keySet(t, public("rsa-1", "RS256", &rsaTestKey().PublicKey), public("ec-1", "ES256", &ecTestKey().PublicKey)),
			},
			Issuer{Iss: otherIss, MaxLifetime: time.Hour, Keys: keySet(t, public("rsa-2", "RS256", &otherRSAKey().PublicKey))},
			Issuer{
				Iss: jwtIss, MaxLifetime: time.Hour, AllowTypes: []string{"JWT"},
				Keys: keySet(t, public("rsa-1", "RS256", &rsaTestKey().PublicKey)),
			},
		),
		acceptance: Acceptance{Leeway: leewayOf, Audiences: []string{audience}},
	}
}

func (g gateway) check(t *testing.T, tt gatewayCase) {
	t.Helper()
	got, err := g.verifier.Accept(t.Context(), tt.compact, g.acceptance, time.Unix(frozen, 0))
	if !errors.Is(err, tt.want) || (tt.want == nil) != (err == nil) || (got == nil) != (err != nil) {
		t.Errorf("%s: Accept = %v, %v, want %v", tt.name, got, err, tt.want)
	}
	if err != nil && Reason(err) == "" {
		t.Errorf("%s: error %v has no reason", tt.name, err)
	}
}

// with is a change of T1: members of its claims, absent if nil.
type with map[string]any

// claimsOf are those of T1, changed.
func claimsOf(changes with) string {
	claims := with{
		"iss": iss, "sub": "app one", "client_id": "app one", "aud": audience, "jti": "at-1", "scope": "read write",
		"iat": frozen - 60, "exp": frozen + 600,
	}
	maps.Copy(claims, changes)
	maps.DeleteFunc(claims, func(_ string, value any) bool { return value == nil })
	return string(must(json.Marshal(claims)))
}

// mint makes T1, changed. The members of header replace those of T1's.
func mint(t testing.TB, alg string, header, claims with) string {
	t.Helper()
	h := with{"typ": "at+jwt"}
	var key any
	switch alg {
	case "RS256":
		h["kid"], key = "rsa-1", rsaTestKey()
	case "ES256":
		h["kid"], key = "ec-1", ecTestKey()
	}
	maps.Copy(h, header)
	maps.DeleteFunc(h, func(_ string, value any) bool { return value == nil })
	return sign(t, alg, key, h, claimsOf(claims))
}

// unsigned makes T1 with this header and signature.
func unsigned(header with, signature func(input string) []byte) string {
	input := base64.RawURLEncoding.EncodeToString(must(json.Marshal(header))) + "." +
		base64.RawURLEncoding.EncodeToString([]byte(claimsOf(nil)))
	return input + "." + base64.RawURLEncoding.EncodeToString(signature(input))
}

func TestConformance(t *testing.T) {
	t.Parallel()
	g := newGateway(t)
	for _, tt := range []struct {
		id    string
		cases func(t *testing.T, alg string) []gatewayCase
	}{
		{"C116", func(t *testing.T, alg string) []gatewayCase {
			return []gatewayCase{
				{"T1", mint(t, alg, nil, nil), nil},
				{"application/at+jwt", mint(t, alg, with{"typ": "application/at+jwt"}, nil), nil},
				{"AT+JWT", mint(t, alg, with{"typ": "AT+JWT"}, nil), nil},
			}
		}},
		{"C117", func(t *testing.T, alg string) []gatewayCase {
			cases := []gatewayCase{
				{"JWT", mint(t, alg, with{"typ": "JWT"}, nil), ErrType},
				{"absent", mint(t, alg, with{"typ": nil}, nil), ErrType},
				{"secevent+jwt", mint(t, alg, with{"typ": "secevent+jwt"}, nil), ErrType},
				{"token-introspection+jwt", mint(t, alg, with{"typ": "token-introspection+jwt"}, nil), ErrType},
			}
			if alg != "RS256" {
				return cases
			}
			excepted := with{"iss": jwtIss}
			return append(cases,
				gatewayCase{"JWT, excepted", mint(t, alg, with{"typ": "JWT"}, excepted), nil},
				gatewayCase{"application/jwt, excepted", mint(t, alg, with{"typ": "application/jwt"}, excepted), nil},
				gatewayCase{"absent, excepted", mint(t, alg, with{"typ": nil}, excepted), nil},
				gatewayCase{"an ID token, excepted", mint(t, alg, with{"typ": "JWT"}, with{"iss": jwtIss, "at_hash": "x"}), ErrType},
				gatewayCase{"secevent+jwt, excepted", mint(t, alg, with{"typ": "secevent+jwt"}, excepted), ErrType},
				gatewayCase{"token-introspection+jwt, excepted", mint(t, alg, with{"typ": "token-introspection+jwt"}, excepted), ErrType},
			)
		}},
		{"C118", func(t *testing.T, _ string) []gatewayCase {
			var cases []gatewayCase
			for _, alg := range []string{"none", "None", "nOnE"} {
				compact := unsigned(with{"typ": "at+jwt", "alg": alg}, func(string) []byte { return nil })
				cases = append(cases, gatewayCase{alg, compact, ErrAlgorithm})
			}
			return cases
		}},
		{"C119", func(t *testing.T, _ string) []gatewayCase {
			public := &rsaTestKey().PublicKey
			pkix := must(x509.MarshalPKIXPublicKey(public))
			var cases []gatewayCase
			for name, secret := range map[string][]byte{
				"PEM":         pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pkix}),
				"DER":         pkix,
				"PKCS #1 PEM": pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(public)}),
				"PKCS #1 DER": x509.MarshalPKCS1PublicKey(public),
			} {
				mac := func(input string) []byte {
					h := hmac.New(sha256.New, secret)
					h.Write([]byte(input))
					return h.Sum(nil)
				}
				cases = append(cases,
					gatewayCase{name, unsigned(with{"typ": "at+jwt", "alg": "HS256", "kid": "rsa-1"}, mac), ErrAlgorithm},
					gatewayCase{name + ", said to be RS256", unsigned(with{"typ": "at+jwt", "alg": "RS256", "kid": "rsa-1"}, mac), ErrSignature})
			}
			return cases
		}},
		{"C120", func(t *testing.T, alg string) []gatewayCase {
			cases := []gatewayCase{
				{"TF", sign(t, "RS256", otherRSAKey(), with{"typ": "at+jwt", "kid": "rsa-1"}, claimsOf(nil)), ErrSignature},
				{"RS256 over an ES256 key's kid", mint(t, "RS256", with{"kid": "ec-1"}, nil), ErrAlgorithm},
				{"ES256 over an RS256 key's kid", mint(t, "ES256", with{"kid": "rsa-1"}, nil), ErrAlgorithm},
			}
			compact := mint(t, alg, nil, nil)
			dot := strings.LastIndexByte(compact, '.')
			signature := must(base64.RawURLEncoding.DecodeString(compact[dot+1:]))
			for i := range signature {
				signature[i] ^= 1 << (i % 8)
				cases = append(cases, gatewayCase{
					fmt.Sprint("one bit of byte ", i), compact[:dot+1] + base64.RawURLEncoding.EncodeToString(signature), ErrSignature,
				})
				signature[i] ^= 1 << (i % 8)
			}
			return cases
		}},
		{"C121", func(t *testing.T, alg string) []gatewayCase {
			compact := mint(t, alg, nil, nil)
			parts := strings.Split(compact, ".")
			cases := []gatewayCase{
				{"padding", compact + "=", ErrMalformed},
				{"padding of the header", parts[0] + "=." + parts[1] + "." + parts[2], ErrMalformed},
				{"four segments", compact + "." + parts[2], ErrMalformed},
				{"17 KiB", mint(t, alg, nil, with{"x": strings.Repeat("x", 12<<10)}), ErrMalformed},
			}
			for i, part := range parts {
				cut := strings.Clone(part[:4]) + "\r\n" + part[4:]
				segments := append([]string(nil), parts...)
				segments[i] = cut
				cases = append(cases, gatewayCase{fmt.Sprint("CR LF inside segment ", i+1), strings.Join(segments, "."), ErrMalformed})
			}
			return cases
		}},
		{"C122", func(t *testing.T, alg string) []gatewayCase {
			return []gatewayCase{
				{"crit", mint(t, alg, with{"crit": []string{"x"}, "x": 1}, nil), ErrMalformed},
				{"b64 is false", mint(t, alg, with{"b64": false}, nil), ErrMalformed},
			}
		}},
		{"C123", func(t *testing.T, alg string) []gatewayCase {
			foreign := func(kid string) string {
				return sign(t, "RS256", otherRSAKey(), with{"typ": "at+jwt", "kid": kid}, claimsOf(nil))
			}
			return []gatewayCase{
				{"signed by B, iss of A", foreign("rsa-2"), ErrUnknownKey},
				{"signed by B, iss and kid of A", foreign("rsa-1"), ErrSignature},
				{"untrusted issuer", mint(t, alg, nil, with{"iss": "https://evil.example"}), ErrUntrustedIssuer},
				{"ISS with a slash", mint(t, alg, nil, with{"iss": iss + "/"}), ErrUntrustedIssuer},
				{"no iss", mint(t, alg, nil, with{"iss": nil}), ErrUntrustedIssuer},
			}
		}},
		{"C124", func(t *testing.T, alg string) []gatewayCase {
			return []gatewayCase{
				{"other API", mint(t, alg, nil, with{"aud": "https://other.example.com"}), ErrAudience},
				{"absent", mint(t, alg, nil, with{"aud": nil}), ErrAudience},
				{"empty", mint(t, alg, nil, with{"aud": []string{}}), ErrAudience},
				{"ours in another case", mint(t, alg, nil, with{"aud": strings.ToUpper(audience)}), ErrAudience},
				{"array with ours", mint(t, alg, nil, with{"aud": []string{"https://other.example.com", audience}}), nil},
			}
		}},
		{"C125", func(t *testing.T, alg string) []gatewayCase {
			return []gatewayCase{{"exp = now - L + 1", mint(t, alg, nil, with{"iat": frozen - 900, "exp": frozen - 30 + 1}), nil}}
		}},
		{"C126", func(t *testing.T, alg string) []gatewayCase {
			return []gatewayCase{
				{"exp = now - L", mint(t, alg, nil, with{"iat": frozen - 900, "exp": frozen - 30}), ErrExpired},
				{"exp absent", mint(t, alg, nil, with{"exp": nil}), ErrNoExpiry},
				{"exp is null", mint(t, alg, nil, with{"exp": json.RawMessage("null")}), ErrNoExpiry},
				{"exp is a string", mint(t, alg, nil, with{"exp": fmt.Sprint(frozen + 600)}), ErrClaims},
			}
		}},
		{"C127", func(t *testing.T, alg string) []gatewayCase {
			return []gatewayCase{
				{"nbf = now + L", mint(t, alg, nil, with{"nbf": frozen + 30}), nil},
				{"nbf = now + L + 1", mint(t, alg, nil, with{"nbf": frozen + 31}), ErrNotYetValid},
			}
		}},
		{"C128", func(t *testing.T, alg string) []gatewayCase {
			return []gatewayCase{
				{"iat = now + L", mint(t, alg, nil, with{"iat": frozen + 30}), nil},
				{"iat = now + L + 1", mint(t, alg, nil, with{"iat": frozen + 31}), ErrNotYetValid},
				{"iat absent", mint(t, alg, nil, with{"iat": nil}), ErrNoIssueTime},
				{"iat is 0", mint(t, alg, nil, with{"iat": 0}), ErrNoIssueTime},
			}
		}},
		{"C129", func(t *testing.T, alg string) []gatewayCase {
			kid := func(kid string) string { return mint(t, alg, with{"kid": kid}, nil) }
			return []gatewayCase{
				{"SQL", kid("' OR 1=1--"), ErrUnknownKey},
				{"path", kid("../../etc"), ErrUnknownKey},
				{"300 bytes", kid(strings.Repeat("k", 300)), ErrMalformed},
			}
		}},
		{"C130", func(t *testing.T, _ string) []gatewayCase {
			var requests atomic.Int32
			server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { requests.Add(1) }))
			t.Cleanup(func() {
				server.Close()
				if n := requests.Load(); n != 0 {
					t.Errorf("%d requests to addresses that tokens name", n)
				}
			})
			var cases []gatewayCase
			for name, value := range map[string]any{
				"jwk": public("rsa-1", "RS256", &otherRSAKey().PublicKey), "jku": server.URL, "x5u": server.URL,
				"x5c": []string{base64.StdEncoding.EncodeToString(x509.MarshalPKCS1PublicKey(&otherRSAKey().PublicKey))},
			} {
				forged := sign(t, "RS256", otherRSAKey(), with{"typ": "at+jwt", "kid": "rsa-1", name: value}, claimsOf(nil))
				unknown := sign(t, "RS256", otherRSAKey(), with{"typ": "at+jwt", "kid": "attacker", name: value}, claimsOf(nil))
				cases = append(cases, gatewayCase{name, forged, ErrSignature}, gatewayCase{name + ", kid of its own", unknown, ErrUnknownKey})
			}
			return cases
		}},
		{"C136", func(t *testing.T, alg string) []gatewayCase {
			other := sign(t, "RS256", otherRSAKey(), with{"typ": "at+jwt", "kid": "rsa-2"}, claimsOf(with{"iss": otherIss}))
			return []gatewayCase{{"T1", mint(t, alg, nil, nil), nil}, {"same jti of another issuer", other, nil}}
		}},
	} {
		t.Run(tt.id, func(t *testing.T) {
			t.Parallel()
			for _, alg := range []string{"RS256", "ES256"} {
				for _, c := range tt.cases(t, alg) {
					c.name = alg + ": " + c.name
					g.check(t, c)
				}
			}
			if tt.id == "C129" {
				unknownKidsTakeOneFetch(t)
			}
		})
	}
}

// unknownKidsTakeOneFetch is the part of C129 that is about who serves the keys.
func unknownKidsTakeOneFetch(t *testing.T) {
	var tokens []string
	for i := range 100 {
		tokens = append(tokens, mint(t, "RS256", with{"kid": fmt.Sprint("unknown-", i)}, nil))
	}
	known := mint(t, "RS256", nil, nil)
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.serve("rsa-1")
		g := gateway{verifier(t, Issuer{Iss: iss, Keys: keys}), Acceptance{Leeway: leewayOf, Audiences: []string{audience}}}
		g.check(t, gatewayCase{"before", known, nil})
		s.expectLoads(1)
		for _, compact := range tokens {
			_, err := g.verifier.Accept(t.Context(), compact, g.acceptance, time.Unix(frozen, 0))
			if !errors.Is(err, ErrUnknownKey) && !errors.Is(err, ErrKeysUnavailable) {
				t.Errorf("unknown kid: %v, want it refused", err)
			}
			time.Sleep(99 * time.Millisecond)
		}
		synctest.Wait()
		s.expectLoads(1)
		g.check(t, gatewayCase{"after", known, nil})
		s.expectLoads(0)
	})
}

// Every kind of JWT that we issue or take has its own typ, and only one of them is accepted
// as an access token, whatever exception its issuer has.
func TestKindsOfJWT(t *testing.T) {
	t.Parallel()
	g := newGateway(t)
	kinds := []string{"at+jwt", "secevent+jwt", "statuslist+jwt", "token-introspection+jwt", "client-authentication+jwt"}
	for _, issuer := range []string{iss, jwtIss} {
		for _, kind := range kinds {
			for _, typ := range []string{kind, "application/" + kind, strings.ToUpper(kind)} {
				want := ErrType
				if kind == "at+jwt" {
					want = nil
				}
				g.check(t, gatewayCase{issuer + " " + typ, mint(t, "RS256", with{"typ": typ}, with{"iss": issuer}), want})
			}
		}
	}
}

func TestIsAccessToken(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name          string
		typ           any
		claim         string
		allow         []string
		kind, accepts bool
	}{
		{"at+jwt", "at+jwt", "", nil, true, true},
		{"at+jwt with the claims of an ID token", "at+jwt", "at_hash", nil, true, true},
		{"JWT", "JWT", "", nil, true, false},
		{"absent", nil, "", nil, true, false},
		{"JWT, allowed", "JWT", "", []string{"application/JWT"}, true, true},
		{"absent, allowed", nil, "", []string{"jwt"}, true, true},
		{"absent, another allowed", nil, "", []string{"x-at+jwt"}, true, false},
		{"other", "x-at+jwt", "", nil, false, false},
		{"other, allowed", "application/x-at+jwt", "", []string{"X-AT+JWT"}, true, true},
		{"ID token", "JWT", "c_hash", []string{"JWT"}, false, false},
		{"ID token of an allowed typ", "x-at+jwt", "s_hash", []string{"x-at+jwt"}, false, false},
		{"nonce", "JWT", "nonce", []string{"JWT"}, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			issuer := Issuer{Iss: iss, AllowTypes: tt.allow, Keys: keySet(t, public("", "", &ecTestKey().PublicKey))}
			changes := with{}
			if tt.claim != "" {
				changes[tt.claim] = "x"
			}
			got, err := verifier(t, issuer).Verify(t.Context(), mint(t, "ES256", with{"typ": tt.typ, "kid": nil}, changes))
			if err != nil {
				t.Fatal(err)
			}
			if kind := issuer.IsAccessToken(got); kind != tt.kind {
				t.Errorf("IsAccessToken = %t, want %t", kind, tt.kind)
			}
			err = Acceptance{}.Check(got, issuer, time.Unix(frozen, 0))
			if (err == nil) != tt.accepts || err != nil && !errors.Is(err, ErrType) {
				t.Errorf("Check = %v, want it accepted: %t", err, tt.accepts)
			}
		})
	}
}

func TestAcceptanceBounds(t *testing.T) {
	t.Parallel()
	fresh := Token{Type: "at+jwt", HasExpiry: true, Expiry: frozen + 600, IssuedAt: frozen}
	ended := Token{Type: "at+jwt", HasExpiry: true, Expiry: frozen - 120, IssuedAt: frozen - 900}
	ahead := Token{Type: "at+jwt", HasExpiry: true, Expiry: 1 << 53, IssuedAt: frozen}
	for _, tt := range []struct {
		name       string
		acceptance Acceptance
		token      Token
		lifetime   time.Duration
		now        time.Time
		want       error
	}{
		{"no longer than the issuer's", Acceptance{}, fresh, 600 * time.Second, time.Unix(frozen, 0), nil},
		{"longer than the issuer's", Acceptance{}, fresh, 599 * time.Second, time.Unix(frozen, 0), ErrLifetime},
		{"leeway adds nothing to the lifetime", Acceptance{Leeway: time.Minute}, fresh, 599 * time.Second, time.Unix(frozen, 0), ErrLifetime},
		{"a lifetime of any length", Acceptance{}, ahead, 0, time.Unix(frozen, 0), nil},
		{"no leeway", Acceptance{}, fresh, 0, time.Unix(frozen+600, 0), ErrExpired},
		{"no leeway, the last moment", Acceptance{}, fresh, 0, time.Unix(frozen+599, 999999999), nil},
		{"negative leeway is none", Acceptance{Leeway: -time.Hour}, fresh, 0, time.Unix(frozen+599, 0), nil},
		{"the greatest leeway", Acceptance{Leeway: 120 * time.Second}, ended, 0, time.Unix(frozen-1, 0), nil},
		{"more leeway than revocations are kept for", Acceptance{Leeway: time.Hour}, ended, 0, time.Unix(frozen, 0), ErrExpired},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := tt.acceptance.Check(&tt.token, Issuer{Iss: iss, MaxLifetime: tt.lifetime}, tt.now)
			if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
				t.Errorf("Check = %v, want %v", err, tt.want)
			}
		})
	}
}

// Accept passes on what Verify says.
func TestAcceptProvesNothingWithoutKeys(t *testing.T) {
	t.Parallel()
	v := verifier(t, Issuer{Iss: iss, Keys: failingKeySet{context.DeadlineExceeded}})
	_, err := v.Accept(t.Context(), mint(t, "RS256", nil, nil), Acceptance{}, time.Unix(frozen, 0))
	if !errors.Is(err, ErrKeysUnavailable) || errors.Is(err, ErrInvalid) || errors.Is(err, ErrRefused) {
		t.Errorf("Accept = %v, want %v alone", err, ErrKeysUnavailable)
	}
}
