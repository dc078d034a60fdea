package token

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
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

// The tokens and keys of RFC 7515 appendix A.2 and A.3, signed with RS256 and ES256.
const (
	rfcPayload = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
	rfcRS256   = "eyJhbGciOiJSUzI1NiJ9." + rfcPayload
	rfcES256   = "eyJhbGciOiJFUzI1NiJ9." + rfcPayload
	rfcKeys    = `{"keys":[{"kty":"RSA","e":"AQAB","n":"ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp` +
		`-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5` +
		`rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9ia` +
		`GNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"},{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",` +
		`"y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}`
)

// FuzzVerify checks that nothing verifies but what was signed. Its tokens were signed by
// others, with keys that are the same in all the processes of a fuzz test.
func FuzzVerify(f *testing.F) {
	keys, err := ParseKeySet([]byte(rfcKeys))
	if err != nil {
		f.Fatal(err)
	}
	v := verifier(f, Issuer{Iss: "joe", Keys: keys})
	for _, compact := range []string{
		rfcRS256 + ".cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUA" +
			"r7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12" +
			"jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw",
		rfcES256 + ".DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
	} {
		if _, err := v.Verify(f.Context(), compact); err != nil {
			f.Fatal(err)
		}
		f.Add(compact)
	}
	f.Add(rfcRS256 + ".")
	f.Add("eyJhbGciOiJub25lIn0." + rfcPayload + ".")
	f.Fuzz(func(t *testing.T, compact string) {
		got, err := v.Verify(t.Context(), compact)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("error %v is not %v", err, ErrInvalid)
			}
			return
		}
		if got.SigningInput != rfcRS256 && got.SigningInput != rfcES256 {
			t.Fatalf("forged: %s", compact)
		}
		if got.SigningInput+"."+got.Signature != compact || got.Issuer != "joe" || got.Expiry != 1300819380 {
			t.Fatalf("%s was read as %+v", compact, got)
		}
	})
}

// FuzzClaimedIssuer checks that a token which the verifier takes for an issuer's is never taken
// for another's before: who asks that first must neither let it live nor believe it.
func FuzzClaimedIssuer(f *testing.F) {
	for _, s := range []string{
		`{"iss":"https://a"}`, `{"ISS":"https://b","iss":"https://a"}`, `{"iss":"https:\/\/a","exp":1e400}`, `{"\u0069ss":"https://a"}`,
		`{"iss":"https://b","iss":"https://a"}`, `{"iss":["https://a"]}`, `{"iss":null}`, `[]`, `{}`, ` {"iss" : "https://a"} `,
		"{\"iss\":\"https://a\",\"\xff\":1}", `{"iss":"https://a"}{}`, `{"iss":"https://a","sub":7}`, `{"iss":"https://b"}`, `{"iss":""}`,
	} {
		f.Add([]byte(s))
	}
	encode := base64.RawURLEncoding.EncodeToString
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)) // the same in all the processes
	keys, err := ParseKeySet(fmt.Appendf(nil, `{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"k","alg":"EdDSA","x":%q}]}`,
		encode(key.Public().(ed25519.PublicKey))))
	if err != nil {
		f.Fatal(err)
	}
	v := verifier(f, Issuer{Iss: "https://a", Keys: keys})
	f.Fuzz(func(t *testing.T, payload []byte) {
		input := encode([]byte(`{"alg":"EdDSA","kid":"k"}`)) + "." + encode(payload)
		compact := input + "." + encode(ed25519.Sign(key, []byte(input)))
		claimed, ok := ClaimedIssuer(compact)
		_, err := v.Verify(t.Context(), compact)
		switch {
		case err == nil || errors.Is(err, ErrClaims):
			if claimed != "https://a" || !ok {
				t.Fatalf("%q, %t is claimed by a token of https://a", claimed, ok)
			}
		case errors.Is(err, ErrMalformed):
			if claimed != "" || ok {
				t.Fatalf("%q, %t is claimed by what is malformed", claimed, ok)
			}
		case !errors.Is(err, ErrUntrustedIssuer):
			t.Fatal(err)
		case claimed == "https://a" || ok != (claimed != ""):
			t.Fatalf("%q, %t is claimed by a token of somebody else", claimed, ok)
		}
		if claimed, ok := ClaimedIssuer(string(payload)); ok != (claimed != "") { // whatever it is
			t.Fatalf("%q, %t", claimed, ok)
		}
	})
}

// FuzzClaims checks that an object is taken apart as encoding/json does it, but for what
// that lets through: names that differ in case only are two, equal ones are an error.
func FuzzClaims(f *testing.F) {
	for _, s := range []string{
		`{"jti":"a","JTI":"b"}`, `{"jti":"a","\u006ati":"b"}`, ` {"a":[{"b":1,"b":2}],"c":{"d":null}} `,
		`{"exp":1.795209e9,"nbf":-0,"iat":9007199254740993}`, `{"aud":["x",["y"]],"sub":"\ud83d\ude00\"\\","sid":"\ud83d"}`,
		`{"":{},"a b":[],"a\u0000":true,"é":false}`, "{\"a\":\"\x7f\u2028\"}", "[]", "{}x", "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		members, err := parseObject(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("error %v is not %v", err, ErrMalformed)
			}
			if isSoundObject(b) {
				t.Fatalf("a sound object is refused: %v", err)
			}
			return
		}
		var want map[string]json.RawMessage
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatalf("encoding/json refuses it: %v", err)
		}
		got := map[string]json.RawMessage{}
		for _, m := range members {
			got[m.name] = json.RawMessage(m.value)
		}
		if len(members) != len(want) || !maps.EqualFunc(got, want, slices.Equal) {
			t.Fatalf("members %q, encoding/json reads %q", got, want)
		}
		for name, value := range want {
			for _, asked := range []string{name, strings.ToUpper(name), strings.ToLower(name)} {
				there, ok := want[asked]
				if found, has := lookup(members, asked); has != (ok && string(there) != "null") || has && found != string(there) {
					t.Fatalf("lookup of %q = %q, %t, encoding/json has %q, %t", asked, found, has, there, ok)
				}
			}
			s, err := text(members, name)
			var wantText string
			isText := value[0] == '"' && json.Unmarshal(value, &wantText) == nil
			if err == nil && s != wantText || err != nil && isText && !strings.ContainsRune(wantText, utf8.RuneError) {
				t.Fatalf("%q is the text %q, %v, encoding/json reads %q", name, s, err, wantText)
			}
			if n, ok := numericDate(string(value)); ok && (n < 0 || n > maxNumeric || value[0] == '-' || value[0] == '"') {
				t.Fatalf("%q is the time %d, and says %s", name, n, value)
			}
		}
	})
}

// isSoundObject reports whether b is UTF-8 and a JSON object with distinct names at every
// depth, by encoding/json. It is false for some whose names have a replaced character, which
// may have been two that differ.
func isSoundObject(b []byte) bool {
	if !utf8.Valid(b) || !json.Valid(b) {
		return false
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	type level struct {
		names map[string]bool // nil in an array
		value bool            // the next token of an object is a value
	}
	var levels []level
	for first := true; ; first = false {
		tok, err := d.Token()
		if err != nil {
			return err == io.EOF && !first
		}
		if first && tok != json.Delim('{') {
			return false
		}
		if n := len(levels); n > 0 && levels[n-1].names != nil {
			top := &levels[n-1]
			if name, ok := tok.(string); ok && !top.value {
				if top.names[name] || strings.ContainsRune(name, utf8.RuneError) {
					return false
				}
				top.names[name], top.value = true, true
				continue
			}
			top.value = false
		}
		switch tok {
		case json.Delim('{'):
			levels = append(levels, level{names: map[string]bool{}})
		case json.Delim('['):
			levels = append(levels, level{})
		case json.Delim('}'), json.Delim(']'):
			levels = levels[:len(levels)-1]
		}
		if len(levels) > maxDepth {
			return false
		}
	}
}

// FuzzParseKeyFile checks that what is read is what was written, and nothing else is.
func FuzzParseKeyFile(f *testing.F) {
	f.Add([]byte(`{"keys":[]}`), "https://km.example.com/jwks", int64(1795209000), []byte("rescind-keys 1 1795209000 x y\n{}"))
	f.Add([]byte("\n"), "", int64(-1), []byte("rescind-keys 1\n"))
	f.Fuzz(func(t *testing.T, body []byte, url string, seconds int64, other []byte) {
		urlSum := hexSum([]byte(url))
		d, gotURL, err := parseKeyFile(encodeKeyFile(keyDocument{time.Unix(seconds, 0), body}, urlSum))
		if err != nil || gotURL != urlSum || d.at.Unix() != seconds || !bytes.Equal(d.body, body) {
			t.Fatalf("parseKeyFile = %q, %d, %q, %v", gotURL, d.at.Unix(), d.body, err)
		}
		if d, urlSum, err := parseKeyFile(other); err == nil && !bytes.Equal(encodeKeyFile(d, urlSum), other) {
			t.Fatalf("a file that was not written is read: %q", other)
		}
	})
}
