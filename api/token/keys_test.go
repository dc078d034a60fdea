package token

import (
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"unsafe"

	"github.com/go-jose/go-jose/v4"
)

func modulus(bits int) string {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return base64.RawURLEncoding.EncodeToString(n.SetBit(n, 0, 1).Bytes())
}

func TestParseKeySetLeavesOut(t *testing.T) {
	t.Parallel()
	good := string(jwks(t, public("good", "", &rsaTestKey().PublicKey)))
	good = strings.TrimSuffix(strings.TrimPrefix(good, `{"keys":[`), `]}`)
	ec := string(must(public("bad", "", &ecTestKey().PublicKey).MarshalJSON()))
	point := must(ecTestKey().PublicKey.Bytes())
	point[64] ^= 1
	offCurve := `{"kty":"EC","crv":"P-256","kid":"bad","x":"` + base64.RawURLEncoding.EncodeToString(point[1:33]) +
		`","y":"` + base64.RawURLEncoding.EncodeToString(point[33:]) + `"}`
	private := string(must(jose.JSONWebKey{Key: ecTestKey(), KeyID: "bad"}.MarshalJSON()))
	for name, bad := range map[string]string{
		"symmetric":                 `{"kty":"oct","kid":"bad","k":"AAAA"}`,
		"symmetric without its key": `{"kty":"oct","kid":"bad"}`,
		"private":                   private,
		"RSA of 1024 bits":          `{"kty":"RSA","kid":"bad","e":"AQAB","n":"` + modulus(1024) + `"}`,
		"RSA of 2047 bits":          `{"kty":"RSA","kid":"bad","e":"AQAB","n":"` + modulus(2047) + `"}`,
		"RSA of 16384 bits":         `{"kty":"RSA","kid":"bad","e":"AQAB","n":"` + modulus(16384) + `"}`,
		"RSA with e = 1":            `{"kty":"RSA","kid":"bad","e":"AQ","n":"` + modulus(2048) + `"}`,
		"RSA with even e":           `{"kty":"RSA","kid":"bad","e":"BA","n":"` + modulus(2048) + `"}`,
		"RSA with a huge e":         `{"kty":"RSA","kid":"bad","e":"AQAAAAAAAAAB","n":"` + modulus(2048) + `"}`,
		"RSA without n":             `{"kty":"RSA","kid":"bad","e":"AQAB"}`,
		"RSA with padded n":         `{"kty":"RSA","kid":"bad","e":"AQAB","n":"` + modulus(2048) + `=="}`,
		"for encryption":            strings.Replace(ec, `"use":"sig"`, `"use":"enc"`, 1),
		"key_ops without verify":    strings.Replace(ec, `"use":"sig"`, `"key_ops":["encrypt"]`, 1),
		"alg for encryption":        `{"kty":"RSA","kid":"bad","alg":"RSA-OAEP","e":"AQAB","n":"` + modulus(2048) + `"}`,
		"alg of another kind":       strings.Replace(ec, `"use"`, `"alg":"RS256","use"`, 1),
		"alg of another curve":      strings.Replace(ec, `"use"`, `"alg":"ES384","use"`, 1),
		"unknown kty":               `{"kty":"AKP","kid":"bad"}`,
		"unknown curve":             strings.Replace(ec, "P-256", "secp256k1", 1),
		"not on its curve":          offCurve,
		"short coordinate":          strings.Replace(ec, `"y":"`, `"y":"AA","z":"`, 1),
		"Ed448":                     `{"kty":"OKP","crv":"Ed448","kid":"bad","x":"AAAA"}`,
		"X25519":                    `{"kty":"OKP","crv":"X25519","kid":"bad","x":"AAAA"}`,
		"short Ed25519":             `{"kty":"OKP","crv":"Ed25519","kid":"bad","x":"AAAA"}`,
		"kid too long":              strings.Replace(ec, `"bad"`, `"`+strings.Repeat("k", 257)+`"`, 1),
		"kid is a number":           strings.Replace(ec, `"bad"`, `1`, 1),
		"not an object":             `7`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			set, err := ParseKeySet([]byte(`{"keys":[` + bad + `,` + good + `]}`))
			if err != nil {
				t.Fatalf("one bad key spoils the set: %v", err)
			}
			if len(set.all) != 1 || len(set.refused) != 1 {
				t.Errorf("%d keys used, refused %q, want 1 and 1", len(set.all), set.refused)
			}
			if _, err := set.Key(t.Context(), "good", "RS256"); err != nil {
				t.Errorf("the good key: %v", err)
			}
			if _, err := set.Key(t.Context(), "bad", "ES256"); !errors.Is(err, ErrUnknownKey) {
				t.Errorf("the bad key: %v, want %v", err, ErrUnknownKey)
			}
			if set, err := ParseKeySet([]byte(`{"keys":[` + bad + `]}`)); err == nil {
				t.Errorf("a set of it alone is %v, want an error", set)
			}
		})
	}
}

func TestParseKeySetRefuses(t *testing.T) {
	t.Parallel()
	key := func(kid string) string { return string(must(public(kid, "", &ecTestKey().PublicKey).MarshalJSON())) }
	many := make([]string, 101)
	for i := range many {
		many[i] = key(fmt.Sprint("k", i))
	}
	for name, doc := range map[string]string{
		"nothing":            ``,
		"no object":          `[]`,
		"no keys":            `{}`,
		"keys in other case": `{"Keys":[` + key("a") + `]}`,
		"keys is an object":  `{"keys":` + key("a") + `}`,
		"keys is empty":      `{"keys":[]}`,
		"keys twice":         `{"keys":[` + key("a") + `],"keys":[` + key("b") + `]}`,
		"a member twice":     `{"keys":[` + strings.Replace(key("a"), `"use"`, `"crv":"P-384","use"`, 1) + `]}`,
		"a kid twice":        `{"keys":[` + key("a") + `,` + key("a") + `]}`,
		"101 keys":           `{"keys":[` + strings.Join(many, ",") + `]}`,
		"more than 1 MiB":    `{"keys":[` + key("a") + `],"x":"` + strings.Repeat("x", 1<<20) + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if set, err := ParseKeySet([]byte(doc)); err == nil {
				t.Errorf("ParseKeySet = %v, want an error", set)
			} else if errors.Is(err, ErrInvalid) {
				t.Errorf("error %v says that a token is invalid, and it is about keys", err)
			}
		})
	}
	if _, err := ParseKeySet([]byte(`{"keys":[` + strings.Join(many[:100], ",") + `]}`)); err != nil {
		t.Errorf("100 keys: %v", err)
	}
}

func TestKeyWithoutKid(t *testing.T) {
	t.Parallel()
	ec, rs := &ecTestKey().PublicKey, &rsaTestKey().PublicKey
	for _, tt := range []struct {
		name string
		keys []jose.JSONWebKey
		alg  string
		want error
	}{
		{"the only one", []jose.JSONWebKey{public("a", "", rs)}, "RS256", nil},
		{"the only one, without kid", []jose.JSONWebKey{public("", "", rs)}, "RS256", nil},
		{"the only one of its kind", []jose.JSONWebKey{public("a", "", rs), public("b", "", ec)}, "ES256", nil},
		{"the only one for it", []jose.JSONWebKey{public("a", "PS256", rs), public("b", "RS256", rs)}, "RS256", nil},
		{"one of two", []jose.JSONWebKey{public("a", "", rs), public("b", "", rs)}, "RS256", ErrUnknownKey},
		{"one of two without kid", []jose.JSONWebKey{public("", "", rs), public("", "", rs)}, "RS256", ErrUnknownKey},
		{"none", []jose.JSONWebKey{public("a", "", ec)}, "RS256", ErrUnknownKey},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if _, err := keySet(t, tt.keys...).Key(t.Context(), "", tt.alg); !errors.Is(err, tt.want) {
				t.Errorf("Key = %v, want %v", err, tt.want)
			}
		})
	}
	set := keySet(t, public("", "", rs))
	if _, err := set.Key(t.Context(), "a", "RS256"); !errors.Is(err, ErrUnknownKey) {
		t.Errorf("a kid finds the key that has none: %v", err)
	}
}

// Some issuers write a zero before the modulus, as a sign.
func TestLeadingZeroOfModulus(t *testing.T) {
	t.Parallel()
	n := base64.RawURLEncoding.EncodeToString(append([]byte{0}, rsaTestKey().N.Bytes()...))
	set, err := ParseKeySet([]byte(`{"keys":[{"kty":"RSA","e":"AQAB","n":"` + n + `"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	key, err := set.Key(t.Context(), "", "RS256")
	if err != nil || !rsaTestKey().PublicKey.Equal(key.public.(*rsa.PublicKey)) {
		t.Errorf("key = %v, %v", key, err)
	}
}

// A key lives on when its document, which may be large, is of no more use.
func TestKeyDoesNotKeepItsDocument(t *testing.T) {
	t.Parallel()
	document := `{"kid":"k1","alg":"EdDSA","kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
	key, err := parseKey(document)
	if err != nil || key.id != "k1" || key.alg != "EdDSA" {
		t.Fatalf("%+v, %v", key, err)
	}
	begin := uintptr(unsafe.Pointer(unsafe.StringData(document)))
	for _, s := range []string{key.id, key.alg} {
		if at := uintptr(unsafe.Pointer(unsafe.StringData(s))); begin <= at && at < begin+uintptr(len(document)) {
			t.Errorf("%q is a part of the document", s)
		}
	}
}
