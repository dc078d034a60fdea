package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/rescindhq/rescind/api/revocation"
)

const iss = "https://km.example.com"

// The keys of the tests; making an RSA key takes long.
var (
	rsaTestKey   = sync.OnceValue(func() *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, 2048)) })
	otherRSAKey  = sync.OnceValue(func() *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, 2048)) })
	ecTestKey    = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) })
	ec384TestKey = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)) })
	edTestKey    = sync.OnceValue(func() ed25519.PrivateKey {
		_, private, err := ed25519.GenerateKey(rand.Reader)
		return must(private, err)
	})
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// sign makes a token with an implementation that is not ours.
func sign(t testing.TB, alg string, key any, header map[string]any, payload string) string {
	t.Helper()
	opts := &jose.SignerOptions{}
	for name, value := range header {
		opts.WithHeader(jose.HeaderKey(name), value)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(alg), Key: key}, opts)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign([]byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	compact, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return compact
}

// raw makes a token of any header and payload, signed with RS256 whatever the
// header says.
func raw(t testing.TB, header, payload string) string {
	t.Helper()
	input := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(payload))
	sum := sha256.Sum256([]byte(input))
	signature, err := rsa.SignPKCS1v15(nil, rsaTestKey(), crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return input + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// jwks is the document of these keys, written by an implementation that is not ours.
func jwks(t testing.TB, keys ...jose.JSONWebKey) []byte {
	t.Helper()
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func keySet(t testing.TB, keys ...jose.JSONWebKey) *StaticKeySet {
	t.Helper()
	set, err := ParseKeySet(jwks(t, keys...))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func public(kid, alg string, key any) jose.JSONWebKey {
	return jose.JSONWebKey{Key: key, KeyID: kid, Algorithm: alg, Use: "sig"}
}

func verifier(t testing.TB, issuers ...Issuer) *Verifier {
	t.Helper()
	v, err := NewVerifier(issuers...)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVerify(t *testing.T) {
	t.Parallel()
	v := verifier(t, Issuer{Iss: iss, Keys: keySet(t, public("k1", "RS256", &rsaTestKey().PublicKey))})
	const payload = `{"iss":"https://km.example.com","jti":"at-1","sub":"alice","sid":"s-1","azp":"app one",
		"client_id":"other","exp":1795209600.9,"iat":1795209000,"nbf":1.795209e9,"aud":["https://a.example","https://b.example"],
		"scope":"read write","realm_access":{"roles":["x","y"]},"nothing":null}`
	compact := sign(t, "RS256", rsaTestKey(), map[string]any{"kid": "k1", "typ": "application/AT+JWT", "jku": "https://evil.example"}, payload)
	got, err := v.Verify(t.Context(), compact)
	if err != nil {
		t.Fatal(err)
	}
	last := strings.LastIndexByte(compact, '.')
	want := &Token{
		Alg: "RS256", KeyID: "k1", Type: "at+jwt", Issuer: iss, ID: "at-1", Subject: "alice", Session: "s-1",
		ClientID: "app one", HasExpiry: true, Expiry: 1795209600, IssuedAt: 1795209000, NotBefore: 1795209000,
		Audience: []string{"https://a.example", "https://b.example"}, AudienceList: true, Scope: "read write",
		SigningInput: compact[:last], Signature: compact[last+1:],
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Token{})); diff != "" {
		t.Errorf("token (-want +got):\n%s", diff)
	}
	for claim, want := range map[string]bool{"realm_access": true, "jti": true, "JTI": false, "nothing": false, "roles": false} {
		if got.Has(claim) != want {
			t.Errorf("Has(%q) = %t, want %t", claim, !want, want)
		}
	}
}

func TestVerifyAlgorithms(t *testing.T) {
	t.Parallel()
	all := []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA", "Ed25519"}
	for _, tt := range []struct {
		alg, header string
		private     any
		public      any
	}{
		{"RS256", "", rsaTestKey(), &rsaTestKey().PublicKey},
		{"RS384", "", rsaTestKey(), &rsaTestKey().PublicKey},
		{"RS512", "", rsaTestKey(), &rsaTestKey().PublicKey},
		{"PS256", "", rsaTestKey(), &rsaTestKey().PublicKey},
		{"PS384", "", rsaTestKey(), &rsaTestKey().PublicKey},
		{"PS512", "", rsaTestKey(), &rsaTestKey().PublicKey},
		{"ES256", "", ecTestKey(), &ecTestKey().PublicKey},
		{"ES384", "", ec384TestKey(), &ec384TestKey().PublicKey},
		{"EdDSA", "", edTestKey(), edTestKey().Public()},
	} {
		t.Run(tt.alg, func(t *testing.T) {
			t.Parallel()
			compact := sign(t, tt.alg, tt.private, map[string]any{"kid": "k"}, `{"iss":"`+iss+`"}`)
			for _, keyAlg := range []string{"", tt.alg} {
				v := verifier(t, Issuer{Iss: iss, Keys: keySet(t, public("k", keyAlg, tt.public)), Algorithms: all})
				if _, err := v.Verify(t.Context(), compact); err != nil {
					t.Errorf("key for %q: %v", keyAlg, err)
				}
				if _, err := v.Verify(t.Context(), damaged(compact)); !errors.Is(err, ErrSignature) {
					t.Errorf("key for %q, damaged signature: %v, want %v", keyAlg, err, ErrSignature)
				}
			}
			for _, keyAlg := range all {
				if sameAlgorithm(keyAlg) == sameAlgorithm(tt.alg) {
					continue
				}
				set, err := ParseKeySet(jwks(t, public("k", keyAlg, tt.public)))
				if err != nil {
					continue // the key cannot be for that algorithm
				}
				v := verifier(t, Issuer{Iss: iss, Keys: set, Algorithms: all})
				if _, err := v.Verify(t.Context(), compact); !errors.Is(err, ErrAlgorithm) {
					t.Errorf("key for %s: %v, want %v", keyAlg, err, ErrAlgorithm)
				}
			}
			others := []string{}
			for _, alg := range all {
				if sameAlgorithm(alg) != sameAlgorithm(tt.alg) {
					others = append(others, alg)
				}
			}
			v := verifier(t, Issuer{Iss: iss, Keys: keySet(t, public("k", "", tt.public)), Algorithms: others})
			if _, err := v.Verify(t.Context(), compact); !errors.Is(err, ErrAlgorithm) {
				t.Errorf("issuer not for it: %v, want %v", err, ErrAlgorithm)
			}
		})
	}
}

// damaged changes the middle of the signature, where every bit counts.
func damaged(compact string) string {
	i := (strings.LastIndexByte(compact, '.') + len(compact)) / 2
	c := byte('A')
	if compact[i] == c {
		c = 'B'
	}
	return compact[:i] + string(c) + compact[i+1:]
}

func TestEd25519IsEdDSA(t *testing.T) {
	t.Parallel()
	header := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"Ed25519","kid":"k"}`))
	input := header + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"`+iss+`"}`))
	full := input + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(edTestKey(), []byte(input)))
	old := sign(t, "EdDSA", edTestKey(), map[string]any{"kid": "k"}, `{"iss":"`+iss+`"}`)
	for _, keyAlg := range []string{"", "EdDSA", "Ed25519"} {
		for _, allowed := range []string{"EdDSA", "Ed25519"} {
			v := verifier(t, Issuer{
				Iss: iss, Keys: keySet(t, public("k", keyAlg, edTestKey().Public())), Algorithms: []string{allowed},
			})
			for _, compact := range []string{full, old} {
				if _, err := v.Verify(t.Context(), compact); err != nil {
					t.Errorf("key for %q, issuer for %s: %v", keyAlg, allowed, err)
				}
			}
		}
	}
}

// An ECDSA signature (r, s) has a twin (r, n-s): both verify, so neither the
// token nor its third segment is an identity. The signing input is.
func TestECDSATwinHasOneIdentity(t *testing.T) {
	t.Parallel()
	v := verifier(t, Issuer{Iss: iss, Keys: keySet(t, public("k", "", &ecTestKey().PublicKey))})
	compact := sign(t, "ES256", ecTestKey(), map[string]any{"kid": "k"}, `{"iss":"`+iss+`","exp":1}`)
	first, err := v.Verify(t.Context(), compact)
	if err != nil {
		t.Fatal(err)
	}
	signature := must(base64.RawURLEncoding.DecodeString(first.Signature))
	s := new(big.Int).SetBytes(signature[32:])
	s.Sub(elliptic.P256().Params().N, s).FillBytes(signature[32:])
	twin, err := v.Verify(t.Context(), first.SigningInput+"."+base64.RawURLEncoding.EncodeToString(signature))
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{
		"a zero between r and s": slices.Concat(signature[:32], []byte{0}, signature[32:]),
		"short":                  signature[:63],
	} {
		_, err := v.Verify(t.Context(), first.SigningInput+"."+base64.RawURLEncoding.EncodeToString(bad))
		if !errors.Is(err, ErrSignature) {
			t.Errorf("signature with %s: %v, want %v", name, err, ErrSignature)
		}
	}
	if twin.Signature == first.Signature || twin.SigningInput != first.SigningInput {
		t.Errorf("twin has signature %s and input %s, want another and the same as %+v", twin.Signature, twin.SigningInput, first)
	}
}

func TestVerifyRefuses(t *testing.T) {
	t.Parallel()
	other := "https://other.example"
	v := verifier(t,
		Issuer{Iss: iss, Keys: keySet(t, public("k1", "", &rsaTestKey().PublicKey))},
		Issuer{Iss: other, Keys: keySet(t, public("k2", "", &otherRSAKey().PublicKey))},
	)
	header, payload := `{"alg":"RS256","kid":"k1"}`, `{"iss":"`+iss+`","jti":"victim","exp":9}`
	good := raw(t, header, payload)
	input := good[:strings.LastIndexByte(good, '.')]
	if _, err := v.Verify(t.Context(), good); err != nil {
		t.Fatalf("the token that all others derive from: %v", err)
	}
	mac := func(key []byte, alg string) string {
		input := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"`+alg+`","kid":"k1"}`)) + "." +
			base64.RawURLEncoding.EncodeToString([]byte(payload))
		h := hmac.New(sha256.New, key)
		h.Write([]byte(input))
		return input + "." + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
	}
	unsigned := func(alg string) string {
		return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"`+alg+`"}`)) + "." +
			base64.RawURLEncoding.EncodeToString([]byte(payload)) + "."
	}
	ownKey := must(json.Marshal(public("k1", "RS256", &otherRSAKey().PublicKey)))
	long := raw(t, header, `{"iss":"`+iss+`","x":"`+strings.Repeat("x", 12<<10)+`"}`)
	otherPayload := base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"` + iss + `","jti":"other"}`))
	otherHeader := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256","kid":"k1","typ":"at+jwt"}`))
	parts := strings.Split(good, ".")

	for _, tt := range []struct {
		name, compact string
		want          error
	}{
		{"nothing", "", ErrMalformed},
		{"two segments", input, ErrMalformed},
		{"four segments", good + ".", ErrMalformed},
		{"five segments", "a.b.c.d.e", ErrMalformed},
		{"longer than 16 KiB", long, ErrMalformed},
		{"space at the end", good + " ", ErrMalformed},
		{"newline at the end", good + "\n", ErrMalformed},
		{"newline inside", good[:5] + "\n" + good[5:], ErrMalformed},
		{"carriage return inside", input + "\r" + good[len(input):], ErrMalformed},
		{"padding", good + "==", ErrMalformed},
		{"standard alphabet", input + "." + strings.Repeat("+/", 171), ErrMalformed},
		{"bits behind the end", tailBits(good), ErrMalformed},
		{"not UTF-8", raw(t, header, "{\"iss\":\"\xff\"}"), ErrMalformed},
		{"byte order mark", raw(t, header, "\ufeff"+payload), ErrMalformed},
		{"header is no object", raw(t, `["RS256"]`, payload), ErrMalformed},
		{"payload is no object", raw(t, header, `"x"`), ErrMalformed},
		{"payload is null", raw(t, header, `null`), ErrMalformed},
		{"payload has more behind it", raw(t, header, payload+"{}"), ErrMalformed},
		{"claim twice", raw(t, header, `{"iss":"`+iss+`","jti":"a","jti":"b"}`), ErrMalformed},
		{"claim twice, once escaped", raw(t, header, `{"iss":"`+iss+`","jti":"a","\u006ati":"b"}`), ErrMalformed},
		{"claim twice, deep down", raw(t, header, `{"iss":"`+iss+`","x":[{"y":{"a":1,"a":2}}]}`), ErrMalformed},
		{"header member twice", raw(t, `{"alg":"RS256","kid":"k1","kid":"k2"}`, payload), ErrMalformed},
		{"nested too deep", raw(t, header, `{"iss":"`+iss+`","x":`+strings.Repeat("[", 32)+strings.Repeat("]", 32)+`}`), ErrMalformed},
		{"half a surrogate pair in a name", raw(t, header, `{"iss":"`+iss+`","\ud800":1}`), ErrMalformed},
		{"no alg", raw(t, `{"kid":"k1"}`, payload), ErrMalformed},
		{"alg is a number", raw(t, `{"alg":256,"kid":"k1"}`, payload), ErrMalformed},
		{"kid is a number", raw(t, `{"alg":"RS256","kid":1}`, payload), ErrMalformed},
		{"kid too long", raw(t, `{"alg":"RS256","kid":"`+strings.Repeat("k", 257)+`"}`, payload), ErrMalformed},
		{"crit", raw(t, `{"alg":"RS256","kid":"k1","crit":["exp"],"exp":1}`, payload), ErrMalformed},
		{"crit b64", raw(t, `{"alg":"RS256","kid":"k1","crit":["b64"],"b64":false}`, payload), ErrMalformed},
		{"b64 without crit", raw(t, `{"alg":"RS256","kid":"k1","b64":false}`, payload), ErrMalformed},
		{"iss is a number", raw(t, header, `{"iss":1}`), ErrMalformed},

		{"no iss", raw(t, header, `{"jti":"victim"}`), ErrUntrustedIssuer},
		{"iss in other case", raw(t, header, `{"ISS":"`+iss+`"}`), ErrUntrustedIssuer},
		{"iss with a slash more", raw(t, header, `{"iss":"`+iss+`/"}`), ErrUntrustedIssuer},
		{"strange iss", raw(t, header, `{"iss":"https://evil.example"}`), ErrUntrustedIssuer},

		{"none", unsigned("none"), ErrAlgorithm},
		{"None", unsigned("None"), ErrAlgorithm},
		{"nOnE", unsigned("nOnE"), ErrAlgorithm},
		{"none with a signature", raw(t, `{"alg":"none","kid":"k1"}`, payload), ErrAlgorithm},
		{"rs256", raw(t, `{"alg":"rs256","kid":"k1"}`, payload), ErrAlgorithm},
		{"HMAC with the public key", mac(rsaTestKey().N.Bytes(), "HS256"), ErrAlgorithm},
		{"HMAC, said to be RS256", mac(rsaTestKey().N.Bytes(), "RS256"), ErrSignature},
		{"RSA1_5", raw(t, `{"alg":"RSA1_5","kid":"k1"}`, payload), ErrAlgorithm},
		{"key of another kind", raw(t, `{"alg":"ES256","kid":"k1"}`, payload), ErrAlgorithm},

		{"unknown kid", raw(t, `{"alg":"RS256","kid":"k9"}`, payload), ErrUnknownKey},
		{"kid in other case", raw(t, `{"alg":"RS256","kid":"K1"}`, payload), ErrUnknownKey},
		{"kid of another issuer", sign(t, "RS256", otherRSAKey(), map[string]any{"kid": "k2"}, payload), ErrUnknownKey},

		{"no signature", input + ".", ErrSignature},
		{"another key under the same kid", sign(t, "RS256", otherRSAKey(), map[string]any{"kid": "k1"}, payload), ErrSignature},
		{"its own key in the header", sign(t, "RS256", otherRSAKey(),
			map[string]any{"kid": "k1", "jwk": json.RawMessage(ownKey), "jku": "https://evil.example", "x5u": "https://evil.example"}, payload), ErrSignature},
		{"another payload", parts[0] + "." + otherPayload + "." + parts[2], ErrSignature},
		{"another header", otherHeader + "." + parts[1] + "." + parts[2], ErrSignature},
		{"PS256, signed as RS256", raw(t, `{"alg":"PS256","kid":"k1"}`, payload), ErrSignature},

		{"jti is a number", raw(t, header, `{"iss":"`+iss+`","jti":7}`), ErrClaims},
		{"jti is half a surrogate pair", raw(t, header, `{"iss":"`+iss+`","jti":"\ud83d"}`), ErrClaims},
		{"sub is an object", raw(t, header, `{"iss":"`+iss+`","sub":{}}`), ErrClaims},
		{"azp is an array", raw(t, header, `{"iss":"`+iss+`","azp":[]}`), ErrClaims},
		{"exp is a string", raw(t, header, `{"iss":"`+iss+`","exp":"1795209600"}`), ErrClaims},
		{"aud has a number", raw(t, header, `{"iss":"`+iss+`","aud":["a",1]}`), ErrClaims},
		{"scope is an object", raw(t, header, `{"iss":"`+iss+`","scope":{"a":1}}`), ErrClaims},
		{"forged, jti is a number", sign(t, "RS256", otherRSAKey(), map[string]any{"kid": "k1"}, `{"iss":"`+iss+`","jti":7}`), ErrSignature},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := v.Verify(t.Context(), tt.compact)
			if !errors.Is(err, tt.want) || got != nil {
				t.Fatalf("Verify = %v, %v, want %v", got, err, tt.want)
			}
			if !errors.Is(err, ErrInvalid) || errors.Is(err, ErrKeysUnavailable) {
				t.Errorf("%v must be %v and not %v", err, ErrInvalid, ErrKeysUnavailable)
			}
			for _, secret := range []string{"victim", iss, "evil", "k9"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("error repeats %q of the token: %v", secret, err)
				}
			}
		})
	}
}

// tailBits sets a bit of the last character that the signature does not use.
func tailBits(compact string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := len(compact) - 1
	return compact[:last] + string(alphabet[strings.IndexByte(alphabet, compact[last])|1])
}

func TestVerifyAccepts(t *testing.T) {
	t.Parallel()
	v := verifier(t, Issuer{Iss: iss, Keys: keySet(t, public("k1", "", &rsaTestKey().PublicKey))})
	for _, tt := range []struct{ name, header, payload string }{
		{"expired long ago, of no known typ", `{"alg":"RS256","kid":"k1","typ":"secevent+jwt"}`, `{"iss":"` + iss + `","exp":1}`},
		{"no kid, one key", `{"alg":"RS256"}`, `{"iss":"` + iss + `"}`},
		{"kid is null", `{"alg":"RS256","kid":null}`, `{"iss":"` + iss + `"}`},
		{"names in other case are other names", `{"alg":"RS256","ALG":"none","Crit":["x"]}`, `{"iss":"` + iss + `","ISS":"https://evil.example"}`},
		{"b64 is true", `{"alg":"RS256","b64":true}`, `{"iss":"` + iss + `"}`},
		{"escapes", `{"alg":"RS\u0032\u00356"}`, `{"iss":"https:\/\/km.example.com"}`},
		{"white space", " { \"alg\" :\t\"RS256\"\r\n}", "\n{ \"iss\" : \"" + iss + "\" , \"x\" : [ 1 , { } , [ ] ] }\n"},
		{"almost 16 KiB", `{"alg":"RS256"}`, `{"iss":"` + iss + `","x":"` + strings.Repeat("x", 11<<10+512) + `"}`},
		{"nested", `{"alg":"RS256"}`, `{"iss":"` + iss + `","x":` + strings.Repeat("[", 31) + strings.Repeat("]", 31) + `}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := v.Verify(t.Context(), raw(t, tt.header, tt.payload))
			if err != nil {
				t.Fatal(err)
			}
			if got.KeyID != "k1" { // or the revocation of k1 would spare tokens that do not name it
				t.Errorf("verified by key %q, want k1", got.KeyID)
			}
		})
	}
}

func TestClaims(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, claims string
		want         Token
	}{
		{"azp before client_id", `"client_id":"b","azp":"a","consumerKey":"c"`, Token{ClientID: "a"}},
		{"client_id before consumerKey", `"consumerKey":"c","client_id":"b"`, Token{ClientID: "b"}},
		{"consumerKey", `"consumerKey":"c"`, Token{ClientID: "c"}},
		{"empty azp counts as absent", `"azp":"","client_id":"b"`, Token{ClientID: "b"}},
		{"null counts as absent", `"azp":null,"client_id":"b","exp":null,"aud":null,"jti":null`, Token{ClientID: "b"}},
		{"other case is another claim", `"AZP":"a","Jti":"x","EXP":5`, Token{}},
		{"aud is a string", `"aud":"https://a.example"`, Token{Audience: []string{"https://a.example"}}},
		{"aud is an array of one", `"aud":["https://a.example"]`, Token{Audience: []string{"https://a.example"}, AudienceList: true}},
		{"aud is empty", `"aud":[]`, Token{Audience: []string{}, AudienceList: true}},
		{"scope is an array", `"scope":["read","write"]`, Token{Scope: "read write"}},
		{"exp is 0", `"exp":0`, Token{HasExpiry: true}},
		{"exp has a fraction", `"exp":1795209600.999999`, Token{HasExpiry: true, Expiry: 1795209600}},
		{"exp has an exponent", `"exp":17952096E2`, Token{HasExpiry: true, Expiry: 1795209600}},
		{"exp is the largest", `"exp":9007199254740992`, Token{HasExpiry: true, Expiry: 1 << 53}},
		{"escapes", `"jti":"a\"\\\/\n\u00e9\ud83d\ude00","su\u0062":"é"`, Token{ID: "a\"\\/\né😀", Subject: "é"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, _, claimsErr, err := parse(raw(t, `{"alg":"RS256"}`, `{"iss":"`+iss+`",`+tt.claims+`}`))
			if err != nil || claimsErr != nil {
				t.Fatal(err, claimsErr)
			}
			ignore := cmpopts.IgnoreFields(Token{}, "Alg", "Issuer", "SigningInput", "Signature", "claims")
			if diff := cmp.Diff(&tt.want, got, ignore); diff != "" {
				t.Errorf("claims (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNumericDateRefuses(t *testing.T) {
	t.Parallel()
	for _, value := range []string{
		`-1`, `-0`, `-0.5`, `"1"`, `true`, `{}`, `[1]`, `9007199254740994`, `1e16`, `1e400`, `99999999999999999999`, `18446744073709551615`,
	} {
		if n, ok := numericDate(value); ok {
			t.Errorf("numericDate(%s) = %d, want it refused", value, n)
		}
	}
}

func TestReason(t *testing.T) {
	t.Parallel()
	invalid := []error{ErrMalformed, ErrUntrustedIssuer, ErrAlgorithm, ErrUnknownKey, ErrSignature, ErrClaims}
	refused := []error{ErrType, ErrNoExpiry, ErrExpired, ErrNotYetValid, ErrNoIssueTime, ErrLifetime, ErrAudience}
	for _, tt := range []struct {
		of      error
		errs    []error
		reasons []string
	}{
		{ErrInvalid, invalid, Reasons[:len(Reasons)-1]},
		{nil, []error{ErrKeysUnavailable}, Reasons[len(Reasons)-1:]},
		{ErrRefused, refused, RefusedReasons},
	} {
		var got []string
		for _, err := range tt.errs {
			err = fmt.Errorf("more: %w", err)
			got = append(got, Reason(err))
			for _, kind := range []error{ErrInvalid, ErrRefused} {
				if errors.Is(err, kind) != (kind == tt.of) {
					t.Errorf("%q is %q: %t, want %t", err, kind, kind != tt.of, kind == tt.of)
				}
			}
		}
		if diff := cmp.Diff(tt.reasons, got); diff != "" {
			t.Errorf("reasons (-listed +of the errors):\n%s", diff)
		}
	}
	if got := Reason(context.Canceled); got != "" {
		t.Errorf("Reason of another error = %q, want none", got)
	}
}

func TestLooksLikeJWT(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]bool{
		"":                                     false,
		"9b2f7c1e-0000-4000-8000-000000000000": false,
		"opaque-unknown-123":                   false,
		"a.b":                                  false,
		"eyJrest":                              false,
		"a.b.c":                                true,
		"eyJhbGciOiJub25lIn0.e30.":             true,
		"eyJhbGciOiJub25lIn0.e30":              true,
		"eyJhbGciOiJub25lIn0.e30.x\n":          true,
		"eyJhbGciOiJSU0EifQ.a.b.c.d":           true,
	} {
		if got := LooksLikeJWT(s); got != want {
			t.Errorf("LooksLikeJWT(%q) = %t, want %t", s, got, want)
		}
	}
}

func TestNewVerifierReportsAll(t *testing.T) {
	t.Parallel()
	keys := keySet(t, public("k1", "", &rsaTestKey().PublicKey))
	_, err := NewVerifier(
		Issuer{Iss: "", Keys: keys},
		Issuer{Iss: "https://no-keys.example"},
		Issuer{Iss: "https://twice.example", Keys: keys},
		Issuer{Iss: "https://twice.example", Keys: keys},
		Issuer{Iss: "https://hmac.example", Keys: keys, Algorithms: []string{"HS256"}},
		Issuer{Iss: "https://none.example", Keys: keys, Algorithms: []string{"none"}},
	)
	if err == nil {
		t.Fatal("NewVerifier accepts what it must refuse")
	}
	for _, want := range []string{`issuer ""`, "no-keys", "twice", "HS256", "none.example"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not name %s: %v", want, err)
		}
	}
}

func TestVerifierIssuer(t *testing.T) {
	t.Parallel()
	keys := keySet(t, public("k1", "", &rsaTestKey().PublicKey))
	v := verifier(t, Issuer{Iss: iss, Keys: keys, Tenant: revocation.SuperTenant, AllowTypes: []string{"JWT"}})
	got, ok := v.Issuer(iss)
	if !ok || got.Tenant != revocation.SuperTenant || !cmp.Equal(got.AllowTypes, []string{"JWT"}) {
		t.Errorf("Issuer = %+v, %t", got, ok)
	}
	if _, ok := v.Issuer(iss + "/"); ok {
		t.Error("Issuer finds what is not configured")
	}
}

type failingKeySet struct{ err error }

func (s failingKeySet) Key(context.Context, string, string) (Key, error) { return Key{}, s.err }

// A key set may fail in ways that this package does not know; none of them
// proves a token invalid.
func TestForeignKeySetErrorProvesNothing(t *testing.T) {
	t.Parallel()
	v := verifier(t, Issuer{Iss: iss, Keys: failingKeySet{context.DeadlineExceeded}})
	_, err := v.Verify(t.Context(), raw(t, `{"alg":"RS256"}`, `{"iss":"`+iss+`"}`))
	if !errors.Is(err, ErrKeysUnavailable) || errors.Is(err, ErrInvalid) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Verify = %v, want %v with its cause", err, ErrKeysUnavailable)
	}
}
