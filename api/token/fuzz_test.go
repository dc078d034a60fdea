package token

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzParse checks that what is accepted is what encoding/json reads too, where
// the two may agree.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		raw(f, `{"alg":"RS256","kid":"k1","typ":"at+jwt"}`, `{"iss":"https://km.example.com","jti":"a","exp":1,"aud":["x"]}`),
		raw(f, `{"alg":"RS256"}`, `{"jti":"a","JTI":"b","\u006ati":"c","x":[{"a":1,"a":2}]}`),
		raw(f, ` { "alg" : "none" } `, `{"iss":"\ud83d\ude00\ud800","exp":-1.5e300}`),
		"e30.e30.", "..", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, compact string) {
		token, signature, claimsErr, err := parse(compact)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("error %v is not %v", err, ErrMalformed)
			}
			return
		}
		if claimsErr != nil && !errors.Is(claimsErr, ErrClaims) {
			t.Fatalf("error %v is not %v", claimsErr, ErrClaims)
		}
		if token.SigningInput+"."+token.Signature != compact ||
			base64.RawURLEncoding.EncodeToString(signature) != token.Signature {
			t.Fatal("the token has another spelling")
		}
		payload, err := base64.RawURLEncoding.DecodeString(strings.Split(compact, ".")[1])
		if err != nil {
			t.Fatal(err)
		}
		var claims map[string]json.RawMessage
		if err := json.Unmarshal(payload, &claims); err != nil {
			t.Fatalf("encoding/json refuses the payload: %v", err)
		}
		if len(claims) != len(token.claims) {
			t.Fatalf("%d claims, encoding/json reads %d", len(token.claims), len(claims))
		}
		for _, m := range token.claims {
			if string(claims[m.name]) != m.value {
				t.Fatalf("claim %q is %s, encoding/json reads %s", m.name, m.value, claims[m.name])
			}
		}
		if claimsErr != nil {
			return
		}
		for name, got := range map[string]string{"iss": token.Issuer, "jti": token.ID, "sub": token.Subject, "sid": token.Session} {
			var want string
			if value, ok := claims[name]; ok && json.Unmarshal(value, &want) != nil {
				t.Fatalf("encoding/json refuses %s of type string", name)
			}
			if got != want || !utf8.ValidString(got) {
				t.Fatalf("%s is %q, encoding/json reads %q", name, got, want)
			}
		}
		if token.Expiry < 0 || token.Expiry > maxNumeric || token.HasExpiry != token.Has("exp") {
			t.Fatalf("exp is %d, there: %t", token.Expiry, token.HasExpiry)
		}
	})
}

// FuzzParseKeySet checks that every key that is used can be used.
func FuzzParseKeySet(f *testing.F) {
	f.Add(jwks(f, public("a", "RS256", &rsaTestKey().PublicKey), public("b", "", &ecTestKey().PublicKey),
		public("", "EdDSA", edTestKey().Public())))
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AAAA"},{"kty":"EC","crv":"P-256","x":"AA","y":"AA"},7]}`))
	f.Fuzz(func(t *testing.T, document []byte) {
		set, err := ParseKeySet(document)
		if err != nil {
			return
		}
		for _, key := range set.all {
			usable := false
			for alg := range schemes {
				if key.suits(alg) {
					usable = true
					if key.verify(alg, "e30.e30", make([]byte, 64)) {
						t.Fatalf("key %q takes an empty signature for %s", key.id, alg)
					}
				}
			}
			if !usable {
				t.Fatalf("key %q suits no algorithm", key.id)
			}
		}
	})
}
