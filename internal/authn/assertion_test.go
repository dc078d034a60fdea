package authn

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/token"
)

// The keys of the tests; making an RSA key takes long.
var (
	ecTestKey  = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) })
	ecOtherKey = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) })
	rsaTestKey = sync.OnceValue(func() *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, 2048)) })
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func publicKey(kid, alg string, key any) jose.JSONWebKey {
	return jose.JSONWebKey{Key: key, KeyID: kid, Algorithm: alg, Use: "sig"}
}

// jwksOf is the document of these keys, written by an implementation that is not ours.
func jwksOf(keys ...jose.JSONWebKey) string {
	return string(must(json.Marshal(jose.JSONWebKeySet{Keys: keys})))
}

type object map[string]any

// with returns a copy of o with members of another one; nil removes one.
func (o object) with(other object) object {
	o = maps.Clone(o)
	for name, value := range other {
		if o[name] = value; value == nil {
			delete(o, name)
		}
	}
	return o
}

// sign makes a JWT with an implementation that is not ours.
func sign(alg string, key any, header, claims object) string {
	opts := &jose.SignerOptions{}
	for name, value := range header {
		opts.WithHeader(jose.HeaderKey(name), value)
	}
	signer := must(jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: key}, opts))
	return must(must(signer.Sign(must(json.Marshal(claims)))).CompactSerialize())
}

const memoryIssuer = "https://km.example.com"

// addKeys makes a client with private_key_jwt.
func (m *memory) addKeys(id, iss, jwks string) {
	m.rows[id] = &clientRow{client: Client{ID: id, Issuer: iss}, method: methodKey, keys: must(newAssertionVerifier(id, jwks))}
}

// claimsOf are those of a good assertion, made now.
func claimsOf(id string) object {
	now := time.Now().Unix()
	return object{"iss": id, "sub": id, "aud": memoryIssuer, "jti": rand.Text(), "iat": now, "exp": now + 60}
}

func assertionForm(jwt string) string {
	return url.Values{"client_assertion": {jwt}, "client_assertion_type": {assertionType}}.Encode()
}

func (m *memory) assert(jwt string) (*httptest.ResponseRecorder, Client) {
	return m.answer(postForm(assertionForm(jwt)))
}

func TestAssertion(t *testing.T) {
	t.Parallel()
	const own = memoryIssuer + "/t/acme.example"
	legacy := &Config{Issuer: memoryIssuer, LegacyAssertionAudience: true}
	tests := []struct {
		name string
		// What is changed of a good one. In claims, an int is from now.
		header, claims object
		cfg            *Config
		want           int
	}{
		{"C055", nil, nil, nil, 200},
		{"C057: the token endpoint", nil, object{"aud": memoryIssuer + "/oauth2/token"}, nil, 401},
		{"C057: the token endpoint, by the switch", nil, object{"aud": memoryIssuer + "/oauth2/token"}, legacy, 200},
		{"that of the tenant, by the switch", nil, object{"aud": own + "/oauth2/token"}, legacy, 200},
		{"another endpoint, by the switch", nil, object{"aud": memoryIssuer + "/oauth2/revoke"}, legacy, 401},
		{"the issuer, with the switch", nil, nil, legacy, 200},
		{"an issuer that ends like an endpoint", nil, object{"aud": "https://a/oauth2/token"},
			&Config{Issuer: "https://a/oauth2/token", LegacyAssertionAudience: true}, 200},
		{"C058: two audiences", nil, object{"aud": []string{memoryIssuer, "https://other.example"}}, nil, 401},
		{"C058: an array of one", nil, object{"aud": []string{memoryIssuer}}, nil, 401},
		{"the issuer of its tenant", nil, object{"aud": own}, nil, 200},
		{"the issuer of another tenant", nil, object{"aud": memoryIssuer + "/t/other"}, nil, 401},
		{"an issuer with a slash", nil, object{"aud": memoryIssuer + "/"}, nil, 401},
		{"an empty aud", nil, object{"aud": ""}, nil, 401},
		{"an empty aud where no issuer is configured", nil, object{"aud": ""}, &Config{}, 401},
		{"no aud", nil, object{"aud": nil}, nil, 401},

		{"its sub is another", nil, object{"sub": "jwt-2"}, nil, 401},
		{"no sub", nil, object{"sub": nil}, nil, 401},
		{"no iss", nil, object{"iss": nil}, nil, 401},
		{"iss is no string", nil, object{"iss": []string{"jwt-1"}}, nil, 401},
		{"of an unknown client", nil, object{"iss": "nobody", "sub": "nobody"}, nil, 401},
		{"of a client with a secret", nil, object{"iss": "app-2", "sub": "app-2"}, nil, 401},
		{"of a public client", nil, object{"iss": "spa-1", "sub": "spa-1"}, nil, 401},
		{"with a claim like iss", nil, object{"ISS": "app-2"}, nil, 200},

		{"exp just over", nil, object{"exp": -30}, nil, 401},
		{"exp over within the leeway", nil, object{"exp": -29}, nil, 200},
		{"exp as far ahead as may be", nil, object{"exp": 330}, nil, 200},
		{"exp too far ahead", nil, object{"exp": 331}, nil, 401},
		{"no exp", nil, object{"exp": nil}, nil, 401},
		{"exp is null", nil, object{"exp": json.RawMessage("null")}, nil, 401},
		{"exp is a string", nil, object{"exp": "60"}, nil, 401},
		{"iat ahead within the leeway", nil, object{"iat": 30}, nil, 200},
		{"iat ahead", nil, object{"iat": 31}, nil, 401},
		{"no iat", nil, object{"iat": nil}, nil, 200},
		{"nbf ahead within the leeway", nil, object{"nbf": 30}, nil, 200},
		{"nbf ahead", nil, object{"nbf": 31}, nil, 401},
		{"no jti", nil, object{"jti": nil}, nil, 401},
		{"an empty jti", nil, object{"jti": ""}, nil, 401},
		{"a jti of 255 bytes", nil, object{"jti": strings.Repeat("j", 255)}, nil, 200},
		{"a jti of 256 bytes", nil, object{"jti": strings.Repeat("j", 256)}, nil, 401},
		{"larger than a JWT may be", nil, object{"x": strings.Repeat("x", 16<<10)}, nil, 401},

		{"typ JWT", object{"typ": "JWT"}, nil, nil, 200},
		{"typ for this", object{"typ": "client-authentication+jwt"}, nil, nil, 200},
		{"typ for this, in full", object{"typ": "application/client-authentication+JWT"}, nil, nil, 200},
		{"an access token", object{"typ": "at+jwt"}, nil, nil, 401},
		{"a security event", object{"typ": "secevent+jwt"}, nil, nil, 401},
		{"a kid", object{"kid": "ec"}, nil, nil, 200},
		{"a kid that the client lacks", object{"kid": "other"}, nil, nil, 401},
		{"an extension that is critical", object{"crit": []string{"x"}, "x": 1}, nil, nil, 401},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				cfg := Config{Issuer: memoryIssuer}
				if tt.cfg != nil {
					cfg = *tt.cfg
				}
				m := newMemory(t, cfg)
				m.addKeys("jwt-1", own, jwksOf(publicKey("ec", "", ecTestKey().Public())))
				claims := claimsOf("jwt-1").with(tt.claims)
				for name, value := range claims {
					if n, ok := value.(int); ok {
						claims[name] = time.Now().Unix() + int64(n)
					}
				}
				w, client := m.assert(sign("ES256", ecTestKey(), tt.header, claims))
				if w.Code != tt.want {
					t.Fatalf("status %d, want %d; body %s", w.Code, tt.want, w.Body)
				}
				if tt.want == 200 {
					if client.ID != "jwt-1" {
						t.Errorf("client %q", client.ID)
					}
					return
				}
				if n := len(m.used); n != 0 {
					t.Errorf("%d assertions are used up, want none of what is refused", n)
				}
				secret, _ := m.answer(postForm("", "Authorization", basicWrong))
				if w.Body.String() != secret.Body.String() {
					t.Errorf("body %s, want that for a wrong secret: %s", w.Body, secret.Body)
				}
				checkError(t, w, InvalidClient)
			})
		})
	}
}

// How assertions come, beside what they say.
func TestAssertionInForm(t *testing.T) {
	t.Parallel()
	m := newMemory(t, Config{Issuer: memoryIssuer})
	m.addKeys("jwt-1", memoryIssuer, jwksOf(publicKey("ec", "", ecTestKey().Public()), publicKey("rsa", "PS256", rsaTestKey().Public())))
	good := func() string { return sign("ES256", ecTestKey(), object{"kid": "ec"}, claimsOf("jwt-1")) }
	form := func(jwt, kind, more string) *http.Request {
		return postForm(url.Values{"client_assertion": {jwt}, "client_assertion_type": {kind}}.Encode() + more)
	}
	hmac := sign("HS256", []byte(strings.Repeat("k", 32)), nil, claimsOf("jwt-1"))
	_, unsigned, _ := strings.Cut(good(), ".")
	unsigned = base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + unsigned[:strings.IndexByte(unsigned, '.')+1]
	other := publicKey("ec", "", ecOtherKey().Public())
	brings := object{"jwk": other, "jku": "https://evil.example/keys", "x5u": "https://evil.example/cert"}
	tests := []struct {
		name string
		r    *http.Request
		want int
	}{
		{"C055", form(good(), assertionType, ""), 200},
		{"its client_id", form(good(), assertionType, "&client_id=jwt-1"), 200},
		{"another client_id", form(good(), assertionType, "&client_id=app-2"), 400},
		{"an empty client_id", form(good(), assertionType, "&client_id="), 200},
		{"C059: another type", form(good(), "urn:ietf:params:oauth:client-assertion-type:saml2-bearer", ""), 401},
		{"no type", form(good(), "", ""), 401},
		{"a type alone", form("", assertionType, ""), 401},
		{"a type and a client_id", form("", assertionType, "&client_id=spa-1"), 401},
		{"twice", form(good(), assertionType, "&client_assertion=x"), 400},
		{"with a secret", form(good(), assertionType, "&client_id=jwt-1&client_secret=x"), 400},
		{"in the URI", at("/oauth2/token?client_assertion=x", form(good(), assertionType, "")), 400},
		{"RSA", form(sign("PS256", rsaTestKey(), object{"kid": "rsa"}, claimsOf("jwt-1")), assertionType, ""), 200},
		{"no kid, one key of this kind", form(sign("PS256", rsaTestKey(), nil, claimsOf("jwt-1")), assertionType, ""), 200},
		{"an algorithm that its key is not for", form(sign("RS256", rsaTestKey(), object{"kid": "rsa"}, claimsOf("jwt-1")), assertionType, ""), 401},
		{"a secret's algorithm", form(hmac, assertionType, ""), 401},
		{"no signature", form(unsigned, assertionType, ""), 401},
		{"another key", form(sign("ES256", ecOtherKey(), object{"kid": "ec"}, claimsOf("jwt-1")), assertionType, ""), 401},
		{"a key of its own", form(sign("ES256", ecOtherKey(), brings.with(object{"kid": "ec"}), claimsOf("jwt-1")), assertionType, ""), 401},
		{"a key of its own, not used", form(sign("ES256", ecTestKey(), brings, claimsOf("jwt-1")), assertionType, ""), 200},
		{"cut short", form(good()[:60], assertionType, ""), 401},
		{"no JWT", form("x", assertionType, ""), 401},
		{"no claims", form("e30.e30.", assertionType, ""), 401},
		{"its id alone", postForm("client_id=jwt-1"), 401},
		{"its id with a secret", postForm("client_id=jwt-1&client_secret=x"), 401},
		{"its id by basic", postForm("", "Authorization", basicOf("jwt-1:")), 401},
	}
	for i, tt := range tests {
		tt.r.RemoteAddr = fmt.Sprintf("192.0.2.%d:1", i+1)
		if w, client := m.answer(tt.r); w.Code != tt.want || tt.want == 200 && client.ID != "jwt-1" {
			t.Errorf("%s: status %d, client %q, want %d", tt.name, w.Code, client.ID, tt.want)
		} else if tt.want != 200 {
			checkError(t, w, "")
		}
	}
}

func TestAssertionCountsOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{Issuer: memoryIssuer, MaxStale: time.Minute, CallerFailures: 3})
		for _, id := range []string{"jwt-1", "jwt-2"} {
			m.addKeys(id, memoryIssuer, jwksOf(publicKey("", "", ecTestKey().Public())))
		}
		check := func(what, jwt string, want int) {
			t.Helper()
			if w, _ := m.assert(jwt); w.Code != want {
				t.Errorf("%s: status %d, want %d", what, w.Code, want)
			}
		}
		a := func(id string, change object) string {
			return sign("ES256", ecTestKey(), nil, claimsOf(id).with(change))
		}
		a1 := a("jwt-1", nil)
		check("C055", a1, 200)
		check("C056", a1, 401)
		check("another one with its jti", a("jwt-1", object{"jti": "x", "exp": time.Now().Unix() + 50}), 200)
		check("that jti of another client", a("jwt-2", object{"jti": "x", "exp": time.Now().Unix() + 50}), 200)
		for range 5 {
			check("a repeat, which is no guess", a1, 401)
		}
		check("a good one after that", a("jwt-1", nil), 200)
		forged := sign("ES256", ecOtherKey(), nil, claimsOf("jwt-1"))
		for range 3 {
			check("a guess", forged, 401)
		}
		check("a guess too many", forged, 429)
		check("a good one, of who failed too often", a("jwt-1", nil), 429)
		time.Sleep(time.Second)
		check("a good one, a second later", a("jwt-1", nil), 200)

		m.down.Store(true)
		away := a("jwt-2", nil)
		check("a good one without the database", away, 503)
		m.down.Store(false)
		check("the same once it is back", away, 200)
	})
}

// A key that was registered elsewhere works at once; one that was removed, for as long as a
// secret would.
func TestNewKeyWorksAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{Issuer: memoryIssuer})
		status := func(key *ecdsa.PrivateKey) int {
			w, _ := m.assert(sign("ES256", key, nil, claimsOf("jwt-1")))
			return w.Code
		}
		m.addKeys("jwt-1", memoryIssuer, jwksOf(publicKey("", "", ecTestKey().Public())))
		if code := status(ecTestKey()); code != 200 {
			t.Fatalf("status %d", code)
		}
		time.Sleep(recheckAge + 1)
		m.addKeys("jwt-1", memoryIssuer, jwksOf(publicKey("", "", ecOtherKey().Public())))
		if code := status(ecOtherKey()); code != 200 {
			t.Errorf("status %d with the new key, want 200", code)
		}
		if code := status(ecTestKey()); code != 401 {
			t.Errorf("status %d with the old key once the new row is read, want 401", code)
		}
		if n := m.reads.Load(); n != 2 {
			t.Errorf("%d reads, want 2", n)
		}
	})
}

// countingKeys counts the signatures that are verified with the decoys.
type countingKeys struct {
	token.KeySet
	n int
}

func (k *countingKeys) Key(ctx context.Context, kid, alg string) (token.Key, error) {
	key, err := k.KeySet.Key(ctx, kid, alg)
	if err == nil {
		k.n++
	}
	return key, err
}

// To refuse the assertion of an unknown client takes the same steps as to refuse one with a
// wrong signature: one verification for each look at the row.
func TestRefusedAssertionsTakeTheSameSteps(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		id, alg, kid string
		key          any
		decoys       int
	}{
		"wrong signature":  {"jwt-1", "ES256", "k", ecOtherKey(), 0},
		"unknown client":   {"nobody", "ES256", "k", ecOtherKey(), 2},
		"unknown key":      {"jwt-1", "ES256", "other", ecOtherKey(), 2},
		"no such key":      {"jwt-1", "RS256", "", rsaTestKey(), 2},
		"key for another":  {"jwt-1", "PS256", "k", rsaTestKey(), 2},
		"client by secret": {"app-2", "ES256", "", ecOtherKey(), 2},
		"public client":    {"spa-1", "RS256", "", rsaTestKey(), 2},
		"no allowed kind":  {"jwt-1", "RS512", "", rsaTestKey(), 0},
		"no such client":   {"nobody", "RS512", "", rsaTestKey(), 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := newMemory(t, Config{Issuer: memoryIssuer})
			decoy := &countingKeys{KeySet: m.decoy}
			m.decoy = decoy
			m.addKeys("jwt-1", memoryIssuer, jwksOf(publicKey("k", "", ecTestKey().Public())))
			_, _ = m.assert(sign(tt.alg, tt.key, object{"kid": tt.kid}, claimsOf(tt.id)))
			if w, _ := m.assert(sign(tt.alg, tt.key, object{"kid": tt.kid}, claimsOf(tt.id))); w.Code != 401 {
				t.Errorf("%s: status %d, want 401", name, w.Code)
			}
			if decoy.n != 2*tt.decoys || m.reads.Load() != 1 {
				t.Errorf("%s: %d verifications with decoys and %d reads for two assertions, want %d and 1", name, decoy.n, m.reads.Load(), 2*tt.decoys)
			}
		})
	}
}

// A throttled caller costs no signature.
func TestThrottledAssertionIsNotVerified(t *testing.T) {
	t.Parallel()
	m := newMemory(t, Config{Issuer: memoryIssuer, CallerFailures: 1})
	decoy := &countingKeys{KeySet: m.decoy}
	m.decoy = decoy
	jwt := sign("ES256", ecOtherKey(), nil, claimsOf("nobody"))
	codes := []int{}
	for range 3 {
		w, _ := m.assert(jwt)
		codes = append(codes, w.Code)
	}
	if diff := cmp.Diff([]int{401, 429, 429}, codes); diff != "" || decoy.n != 2 {
		t.Errorf("%d signatures were verified, want those of the first alone; statuses (-want +got):\n%s", decoy.n, diff)
	}
}

func FuzzAssertion(f *testing.F) {
	m := newMemory(f, Config{Issuer: memoryIssuer, AddressFailures: 100000, CallerFailures: 100000})
	m.addKeys("jwt-1", memoryIssuer, jwksOf(publicKey("", "", ecTestKey().Public())))
	good := sign("ES256", ecTestKey(), nil, claimsOf("jwt-1"))
	header, rest, _ := strings.Cut(good, ".")
	payload, signature, _ := strings.Cut(rest, ".")
	for _, jwt := range []string{
		good, header + "." + payload + ".", "e30." + payload + "." + signature, header + "." + payload + "." + signature + "=",
		sign("ES256", ecOtherKey(), object{"jwk": publicKey("", "", ecOtherKey().Public())}, claimsOf("jwt-1")),
		sign("HS256", []byte(strings.Repeat("k", 32)), nil, claimsOf("jwt-1")),
		base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + payload + ".",
		"." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"\"\u0000\ud800","iss":"jwt-1"}`)) + ".", "..", "",
	} {
		f.Add(jwt, assertionType, "")
	}
	f.Add(good, assertionType, "app-2")
	f.Add(good, "jwt\"\\\x7f", "jwt-1")
	f.Fuzz(func(t *testing.T, jwt, kind, id string) {
		clear(m.used)
		m.throttle = newThrottle(m.cfg)
		form := url.Values{"client_assertion": {jwt}, "client_assertion_type": {kind}, "client_id": {id}}
		w, client := m.answer(postForm(form.Encode()))
		if w.Code == 200 && client.ID == "spa-1" && jwt == "" && kind == "" {
			return // the public client's id alone
		}
		if w.Code == 200 {
			// Signatures of ECDSA have a second form, which only who has the first can make.
			if signed, _, _ := strings.Cut(good, "."+signature); client.ID != "jwt-1" || !strings.HasPrefix(jwt, signed+".") {
				t.Fatalf("client %q let in by what it did not sign", client.ID)
			}
			return
		}
		if w.Code != 400 && w.Code != 401 && w.Code != 413 {
			t.Fatalf("status %d", w.Code)
		}
		checkError(t, w, "")
	})
}
