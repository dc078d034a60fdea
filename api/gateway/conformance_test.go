package gateway

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// tokenCase is a token, and whether it is accepted.
type tokenCase struct {
	name, compact string
	accepted      bool
}

// hmacOf signs T1 with a secret, with this header.
func hmacOf(header with, secret []byte) string {
	input := base64.RawURLEncoding.EncodeToString(must(json.Marshal(header))) + "." +
		base64.RawURLEncoding.EncodeToString([]byte(claimsOf(nil)))
	h := hmac.New(sha256.New, secret)
	h.Write([]byte(input))
	return input + "." + base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

func unsigned(alg string) string {
	compact := hmacOf(with{"typ": "at+jwt", "alg": alg}, nil)
	return compact[:strings.LastIndexByte(compact, '.')+1]
}

// claim is T1 with other claims, header is T1 with another header.
func claim(changes with) string  { return mint(ecKey, nil, changes) }
func header(changes with) string { return mint(ecKey, changes, nil) }

// The decisions of a gateway about a token, over HTTP. All but the first are in packages token
// and replica too; here is that they are put together, in the right order, and answered alike. C133
// and C134 are about status lists, which are not there yet.
func TestConformance(t *testing.T) {
	t.Parallel()
	rsaKey() // not in virtual time
	const leeway = 30
	for _, tt := range []struct {
		id    string
		cases func(t *testing.T, now int64) []tokenCase
	}{
		{"C116", func(*testing.T, int64) []tokenCase {
			return []tokenCase{
				{"T1", t1(), true},
				{"T1 with RS256", mint(rsaKey(), nil, nil), true},
				{"application/at+jwt", header(with{"typ": "application/at+jwt"}), true},
				{"AT+JWT", header(with{"typ": "AT+JWT"}), true},
			}
		}},
		{"C117", func(*testing.T, int64) []tokenCase {
			excepted := with{"iss": jwtIss}
			return []tokenCase{
				{"JWT", header(with{"typ": "JWT"}), false},
				{"absent", header(with{"typ": nil}), false},
				{"secevent+jwt", header(with{"typ": "secevent+jwt"}), false},
				{"token-introspection+jwt", header(with{"typ": "token-introspection+jwt"}), false},
				{"JWT, excepted", mint(ecKey, with{"typ": "JWT"}, excepted), true},
				{"absent, excepted", mint(ecKey, with{"typ": nil}, excepted), true},
				{"secevent+jwt, excepted", mint(ecKey, with{"typ": "secevent+jwt"}, excepted), false},
			}
		}},
		{"C118", func(*testing.T, int64) []tokenCase {
			return []tokenCase{{"none", unsigned("none"), false}, {"None", unsigned("None"), false}, {"nOnE", unsigned("nOnE"), false}}
		}},
		{"C119", func(*testing.T, int64) []tokenCase {
			der := must(x509.MarshalPKIXPublicKey(rsaKey().Public()))
			var cases []tokenCase
			for name, secret := range map[string][]byte{"DER": der, "PEM": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})} {
				for _, alg := range []string{"HS256", "RS256"} {
					cases = append(cases, tokenCase{name + " " + alg, hmacOf(with{"typ": "at+jwt", "alg": alg, "kid": "rsa-1"}, secret), false})
				}
			}
			return cases
		}},
		{"C120", func(*testing.T, int64) []tokenCase {
			compact := t1()
			dot := strings.LastIndexByte(compact, '.')
			signature := must(base64.RawURLEncoding.DecodeString(compact[dot+1:]))
			signature[7] ^= 4
			return []tokenCase{
				{"TF", mint(otherKey, nil, nil), false},
				{"one flipped bit", compact[:dot+1] + base64.RawURLEncoding.EncodeToString(signature), false},
				{"RS256 over an ES256 key's kid", mint(rsaKey(), with{"kid": "ec-1"}, nil), false},
			}
		}},
		{"C121", func(*testing.T, int64) []tokenCase {
			return []tokenCase{
				{"padding", t1() + "=", false},
				{"four segments", t1() + ".AA", false},
				{"17 KiB", claim(with{"x": strings.Repeat("x", 12<<10)}), false},
				{"a space inside a segment", t1()[:9] + " " + t1()[9:], false},
				{"no JWT", "8d3c1c7e-6a51-4a0d-9a7e-3f1e0c9d2b11", false},
				{"nothing", "", false},
			}
		}},
		{"C122", func(*testing.T, int64) []tokenCase {
			return []tokenCase{
				{"crit", header(with{"crit": []string{"x"}, "x": 1}), false},
				{"b64 is false", header(with{"b64": false}), false},
			}
		}},
		{"C123", func(*testing.T, int64) []tokenCase {
			return []tokenCase{
				{"signed by B, iss of A", mint(otherKey, with{"kid": "ec-2"}, nil), false},
				{"untrusted issuer", claim(with{"iss": "https://evil.example"}), false},
				{"ISS with a slash", claim(with{"iss": iss + "/"}), false},
				{"no iss", claim(with{"iss": nil}), false},
			}
		}},
		{"C124", func(*testing.T, int64) []tokenCase {
			return []tokenCase{
				{"other API", claim(with{"aud": "https://other.example.com"}), false},
				{"absent", claim(with{"aud": nil}), false},
				{"array with ours", claim(with{"aud": []string{"https://other.example.com", audience}}), true},
			}
		}},
		{"C125", func(_ *testing.T, now int64) []tokenCase {
			return []tokenCase{{"exp = now - L + 1", claim(with{"iat": now - 900, "exp": now - leeway + 1}), true}}
		}},
		{"C126", func(_ *testing.T, now int64) []tokenCase {
			return []tokenCase{
				{"exp = now - L", claim(with{"iat": now - 900, "exp": now - leeway}), false},
				{"exp absent", claim(with{"exp": nil}), false},
				{"exp is a string", claim(with{"exp": fmt.Sprint(now + 600)}), false},
				{"exp - iat above the longest", claim(with{"exp": now - 60 + 3601}), false},
				{"exp - iat at the longest", claim(with{"exp": now - 60 + 3600}), true},
			}
		}},
		{"C127", func(_ *testing.T, now int64) []tokenCase {
			return []tokenCase{
				{"nbf = now + L", claim(with{"nbf": now + leeway}), true},
				{"nbf = now + L + 1", claim(with{"nbf": now + leeway + 1}), false},
			}
		}},
		{"C128", func(_ *testing.T, now int64) []tokenCase {
			return []tokenCase{
				{"iat = now + L", claim(with{"iat": now + leeway}), true},
				{"iat = now + L + 1", claim(with{"iat": now + leeway + 1}), false},
				{"iat absent", claim(with{"iat": nil}), false},
			}
		}},
		{"C129", func(*testing.T, int64) []tokenCase { // see also TestUnknownKeys
			return []tokenCase{
				{"SQL", header(with{"kid": "' OR 1=1--"}), false},
				{"path", header(with{"kid": "../../etc"}), false},
				{"300 bytes", header(with{"kid": strings.Repeat("k", 300)}), false},
			}
		}},
		{"C130", func(t *testing.T, _ int64) []tokenCase {
			var requests atomic.Int32
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { requests.Add(1) }))
			t.Cleanup(func() {
				_ = server.Listener.Close()
				if n := requests.Load(); n != 0 {
					t.Errorf("%d requests to addresses that tokens name", n)
				}
			})
			url := "http://" + server.Listener.Addr().String()
			var cases []tokenCase
			for name, value := range map[string]any{
				"jwk": public("ec-1", otherKey.Public()), "jku": url, "x5u": url,
				"x5c": []string{base64.StdEncoding.EncodeToString([]byte("x"))},
			} {
				cases = append(cases,
					tokenCase{name, mint(otherKey, with{name: value}, nil), false},
					tokenCase{name + ", kid of its own", mint(otherKey, with{name: value, "kid": "attacker"}, nil), false})
			}
			return cases
		}},
	} {
		t.Run(tt.id, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := start(t, newService(), replica.Config{}, Config{})
				for _, c := range tt.cases(t, time.Now().Unix()) {
					if c.accepted {
						w.accepted(t, c.name, c.compact)
					} else {
						w.refused(t, c.name, c.compact)
					}
				}
			})
		})
	}

	t.Run("C131", func(t *testing.T) {
		t.Parallel()
		for kind, ids := range map[revocation.Kind]struct{ matching, unrelated string }{
			revocation.KindToken:   {"at-1", "at-2"},
			revocation.KindSession: {"s-1", "s-2"},
			revocation.KindClient:  {client, "app two"},
			revocation.KindSubject: {"alice", "bob"},
			revocation.KindTenant:  {revocation.SuperTenant.Domain, acme.Domain},
			revocation.KindKey:     {"ec-1", "rsa-1"},
		} {
			synctest.Test(t, func(t *testing.T) {
				s := newService()
				w := start(t, s, replica.Config{}, Config{})
				of := iss
				if kind == revocation.KindTenant {
					of = ""
				}
				s.revoke(t, kind, of, ids.unrelated, time.Now().Unix())
				w.accepted(t, "under the revocation of another "+string(kind), t1())
				s.revoke(t, kind, of, ids.matching, time.Now().Unix())
				w.refused(t, "under the revocation of its "+string(kind), t1())
				// What is wrong with a token comes before what is revoked, and is told alike.
				w.refused(t, "forged too", mint(otherKey, nil, nil))
			})
		}
	})

	t.Run("C132", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			s := newService()
			w := start(t, s, replica.Config{}, Config{})
			at := time.Now().Unix() - 100
			s.revoke(t, revocation.KindSubject, iss, "alice", at)
			w.refused(t, "iat = T", claim(with{"iat": at}))
			w.refused(t, "iat = T + 0.9", claim(with{"iat": json.Number(fmt.Sprint(at, ".9"))}))
			w.accepted(t, "iat = T + 1", claim(with{"iat": at + 1}))
		})
	})

	t.Run("C135", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			w := start(t, newService(), replica.Config{}, Config{})
			got := w.get(t, "Accept: */*")
			if got.status != 401 || got.header.Get("WWW-Authenticate") != bareChallenge || got.behind != nil {
				t.Errorf("no credentials: %d %s %s", got.status, got.header, got.body)
			}
			post := func(scope string) answer {
				return w.send(t, "POST /shop/1.0.0/orders HTTP/1.1\nHost: a\nContent-Length: 0\n"+bearing(claim(with{"scope": scope}))+"\n\n")
			}
			got = post("read write")
			if want := `Bearer realm="api", error="insufficient_scope", scope="order admin"`; got.status != 403 || got.header.Get("WWW-Authenticate") != want {
				t.Errorf("a token without the scope: %d %s %s, want %s", got.status, got.header, got.body, want)
			}
			if got := post("read admin"); got.status != 200 {
				t.Errorf("a token with one of the scopes: %d %s", got.status, got.body)
			}
		})
	})

	t.Run("C136", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			s := newService()
			w := start(t, s, replica.Config{}, Config{})
			s.revoke(t, revocation.KindToken, iss, "at-1", 0)
			w.refused(t, "T1", t1())
			w.accepted(t, "the same jti of another issuer", mint(otherKey, with{"kid": "ec-2"}, with{"iss": otherIss}))
		})
	})
}
