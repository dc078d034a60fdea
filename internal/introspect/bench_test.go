package introspect

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
)

// BenchmarkIntrospect stands beside what cannot be avoided, the check of a signature. What it
// leaves out is HTTP and the authentication of the caller.
func BenchmarkIntrospect(b *testing.B) {
	w := newWorld(b, fakeCallers{}, jose.JSONWebKey{Key: rsaKey().Public(), KeyID: "rsa-1", Algorithm: "RS256", Use: "sig"})
	header := with{"kid": "rsa-1"}
	for _, alg := range []struct {
		name    string
		compact string
		verify  func(sum, signature []byte) bool
	}{
		{"RS256", sign(b, jose.RS256, rsaKey(), header, nil), func(sum, signature []byte) bool {
			return rsa.VerifyPKCS1v15(&rsaKey().PublicKey, crypto.SHA256, sum, signature) == nil
		}},
		{"ES256", mint(b, nil), func(sum, signature []byte) bool {
			r, s := new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])
			return ecdsa.Verify(&ecKey().PublicKey, sum, r, s)
		}},
	} {
		b.Run(alg.name+"/signature", func(b *testing.B) {
			dot := strings.LastIndexByte(alg.compact, '.')
			signature := must(base64.RawURLEncoding.DecodeString(alg.compact[dot+1:]))
			b.ReportAllocs()
			for b.Loop() {
				sum := sha256.Sum256([]byte(alg.compact[:dot]))
				if !alg.verify(sum[:], signature) {
					b.Fatal("the signature is not good")
				}
			}
		})
		b.Run(alg.name+"/introspect", func(b *testing.B) {
			r := httptest.NewRequest(http.MethodPost, "/oauth2/introspect", nil)
			r.SetBasicAuth("gw-1", "secret")
			body := strings.NewReader("token=" + alg.compact)
			r.Body = io.NopCloser(body)
			answer := &discard{header: http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				body.Reset("token=" + alg.compact)
				w.ServeHTTP(answer, r)
			}
			if !strings.HasPrefix(answer.last, `{"active":true`) {
				b.Fatal(answer.last)
			}
		})
	}
}

// discard is a ResponseWriter that keeps the last body only.
type discard struct {
	header http.Header
	last   string
}

func (d *discard) Header() http.Header { return d.header }
func (d *discard) WriteHeader(int)     {}
func (d *discard) Write(b []byte) (int, error) {
	d.last = string(b)
	return len(b), nil
}
