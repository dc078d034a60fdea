package token

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"testing"
)

const benchPayload = `{"iss":"https://km.example.com","exp":1795209600,"aud":"https://api.example.com","sub":"JFEwXuMZ4y3v",` +
	`"client_id":"JFEwXuMZ4y3v","azp":"JFEwXuMZ4y3v","iat":1795209000,"jti":"8d3c1c7e-6a51-4a0d-9a7e-3f1e0c9d2b11","scope":"read write"}`

// BenchmarkVerifyRS256 stands beside what cannot be avoided: one RSA operation.
func BenchmarkVerifyRS256(b *testing.B) {
	compact := raw(b, `{"alg":"RS256","kid":"k1","typ":"at+jwt"}`, benchPayload)
	b.Run("bare", func(b *testing.B) {
		dot := strings.LastIndexByte(compact, '.')
		signature := must(base64.RawURLEncoding.DecodeString(compact[dot+1:]))
		sum := sha256.Sum256([]byte(compact[:dot]))
		for b.Loop() {
			if err := rsa.VerifyPKCS1v15(&rsaTestKey().PublicKey, crypto.SHA256, sum[:], signature); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("verify", func(b *testing.B) {
		v := verifier(b, Issuer{Iss: iss, Keys: keySet(b, public("k1", "RS256", &rsaTestKey().PublicKey))})
		b.ReportAllocs()
		for b.Loop() {
			if _, err := v.Verify(b.Context(), compact); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, _, _, err := parse(compact); err != nil {
				b.Fatal(err)
			}
		}
	})
}
