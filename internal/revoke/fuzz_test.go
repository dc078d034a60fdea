package revoke

import (
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"testing"

	"github.com/rescindhq/rescind/api/token"
)

// A token that the verifier takes for an issuer's is never taken for another's before, or it
// could not be ended.
func FuzzClaimedIssuer(f *testing.F) {
	for _, s := range []string{
		`{"iss":"https://a"}`, `{"ISS":"https://b","iss":"https://a"}`, `{"iss":"https:\/\/a","exp":1e400}`, `{"\u0069ss":"https://a"}`,
		`{"iss":"https://b","iss":"https://a"}`, `{"iss":["https://a"]}`, `{"iss":null}`, `[]`, `{}`, ` {"iss" : "https://a"} `, "{\"iss\":\"https://a\",\"\xff\":1}", `{"iss":"https://a"}{}`,
	} {
		f.Add([]byte(s))
	}
	encode := base64.RawURLEncoding.EncodeToString
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	keys, err := token.ParseKeySet(fmt.Appendf(nil, `{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"k","alg":"EdDSA","x":%q}]}`,
		encode(key.Public().(ed25519.PublicKey))))
	if err != nil {
		f.Fatal(err)
	}
	verifier, err := token.NewVerifier(token.Issuer{Iss: "https://a", Keys: keys})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		input := encode([]byte(`{"alg":"EdDSA","kid":"k"}`)) + "." + encode(payload)
		compact := input + "." + encode(ed25519.Sign(key, []byte(input)))
		claimed := claimedIssuer(compact)
		if got, err := verifier.Verify(t.Context(), compact); err == nil && claimed != got.Issuer {
			t.Errorf("%q is claimed, and it is %q", claimed, got.Issuer)
		}
		_ = claimedIssuer(string(payload)) // whatever it is
	})
}
