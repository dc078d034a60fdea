package httpapi

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rescindhq/rescind/internal/authn"
)

// The cases of the revocation endpoint. They know the service by HTTP and by
// what it has recorded, and nothing of this package.

// conformanceIssuer is the issuer of the cases' tokens and of their clients' keys.
const conformanceIssuer = "https://km.example.com"

// conformanceClients are to be registered for one application each.
var conformanceClients = []authn.Registration{
	{ID: "app one", Secret: "s3cr:t+/=%", Scopes: []string{"read", "write"}},
	{ID: "app-2", Secret: "Secret-2", AuthMethod: "client_secret_post"},
	{ID: "gw-1", Secret: "plainSecret_42"},
	{ID: "spa-1", AuthMethod: "none"},
	{ID: "app-quota", Secret: "Secret-3", RevokeQuota: 100},
	{ID: "app-jti", Secret: "Secret-4", RevokeByJTI: true},
}

// conformanceStand is a service that the cases run against.
type conformanceStand struct {
	url    string
	minter *minter
	// recorded are the identifiers (jti or digest) of all revocations, one for each
	// event, and the actions in the audit.
	recorded func(t *testing.T) (revoked, audited []string)
}

// conformanceStep is a request and what must come of it. In body and header,
// {T1} stands for that token, minted for the case, and {T1.jti} for its jti.
type conformanceStep struct {
	method string // POST unless set
	target string // /oauth2/revoke unless set
	header []string
	body   string
	repeat int // further times before it, each answered 200

	status  int
	code    string   // the error of the OAuth error object
	want    []string // further response headers
	lacks   string   // not in the response body
	adds    string   // the identifier that is revoked, else nothing is
	audited string   // an action that the audit has one more of
}

type conformanceCase struct {
	id    string
	steps []conformanceStep
}

const (
	basicOne = "Authorization: Basic YXBwK29uZTpzM2NyJTNBdCUyQiUyRiUzRCUyNQ=="
	basicTwo = "Authorization: Basic YXBwLTI6U2VjcmV0LTI="
	formType = "Content-Type: application/x-www-form-urlencoded"
)

func basicOf(id, secret string) string {
	return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(url.QueryEscape(id)+":"+url.QueryEscape(secret)))
}

func conformanceCases() []conformanceCase {
	header := func(lines ...string) []string { return lines }
	one := header(basicOne)
	ok := func(header []string, body, adds string) conformanceStep {
		return conformanceStep{header: header, body: body, status: 200, adds: adds}
	}
	bad := func(status int, code string, header []string, body string) conformanceStep {
		return conformanceStep{header: header, body: body, status: status, code: code}
	}
	foreign := func(header []string, body string) conformanceStep {
		return conformanceStep{header: header, body: body, status: 400, code: "invalid_grant", audited: "foreign_token"}
	}
	return []conformanceCase{
		{"C001", []conformanceStep{ok(one, "token={T1}", "{T1.jti}")}},
		{"C002", []conformanceStep{ok(one, "token={T1}", "{T1.jti}"), ok(one, "token={T1}", "")}},
		{"C003", []conformanceStep{ok(one, "token=opaque-unknown-123", "")}},
		{"C004", []conformanceStep{ok(one, "token={TX}", "")}},
		{"C005", []conformanceStep{ok(one, "token={TF}", "")}},
		{"C006", []conformanceStep{ok(one, "token={TN}", "")}},
		{"C007", []conformanceStep{ok(one, "token={T1}&token_type_hint=refresh_token", "{T1.jti}")}},
		{"C008", []conformanceStep{ok(one, "token={T1}&token_type_hint=saml2", "{T1.jti}")}},
		{"C009", []conformanceStep{ok(one, "token={T1}&token_type_hint=", "{T1.jti}")}},
		{"C010", []conformanceStep{bad(400, "invalid_request", one, "token_type_hint=access_token")}},
		{"C011", []conformanceStep{bad(400, "invalid_request", one, "token=")}},
		{"C012", []conformanceStep{bad(400, "invalid_request", one, "token={T1}&token={T1}")}},
		{"C013", []conformanceStep{bad(400, "invalid_request", one, "token={T1}&token_type_hint=a&token_type_hint=b")}},
		{"C014", []conformanceStep{foreign(one, "token={T2}")}},
		{"C015", []conformanceStep{bad(401, "invalid_client", header("Authorization: Basic Z3ctMTp3cm9uZw=="), "token={T1}")}},
		{"C016", []conformanceStep{bad(401, "invalid_client", nil, "token={T1}")}},
		{"C017", []conformanceStep{ok(nil, "token={T2}&client_id=app-2&client_secret=Secret-2", "{T2.jti}")}},
		{"C018", []conformanceStep{bad(401, "invalid_client", nil, "token={T1}&client_id=app+one&client_secret=s3cr%3At%2B%2F%3D%25")}},
		{"C019", []conformanceStep{bad(400, "invalid_request", header(basicTwo), "token={T2}&client_id=app-2&client_secret=Secret-2")}},
		{"C020", []conformanceStep{{
			target: "/oauth2/revoke?client_id=app-2&client_secret=Secret-2", body: "token={T2}", status: 400, code: "invalid_request",
		}}},
		{"C021", []conformanceStep{{target: "/oauth2/revoke?token={T1}", header: one, status: 400, code: "invalid_request"}}},
		{"C022", []conformanceStep{bad(400, "invalid_request", header(basicOne, "Content-Type: application/json"), `{"token":"{T1}"}`)}},
		{"C023", []conformanceStep{bad(400, "invalid_request", header(basicOne, "Content-Type:"), "token={T1}")}},
		{"C024", []conformanceStep{ok(header(basicOne, formType+"; charset=UTF-8"), "token={T1}", "{T1.jti}")}},
		{"C025", []conformanceStep{{method: "GET", header: one, status: 405, code: "invalid_request", want: header("Allow: POST")}}},
		{"C026", []conformanceStep{{
			method: "GET", target: "/oauth2/revoke?token={T1}&callback=pkg.cb", status: 405, code: "invalid_request",
			want: header("Allow: POST"), lacks: "pkg.cb(",
		}}},
		{"C027", []conformanceStep{ok(nil, "token={T3}&client_id=spa-1", "{T3.jti}")}},
		{"C028", []conformanceStep{foreign(nil, "token={T1}&client_id=spa-1")}},
		{"C029", []conformanceStep{bad(401, "invalid_client", nil, "token={T3}&client_id=spa-1&client_secret=x")}},
		{"C030", []conformanceStep{
			bad(400, "unsupported_token_type", one, "token={TS}"), bad(400, "unsupported_token_type", one, "token={TE}"),
		}},
		{"C034", []conformanceStep{bad(401, "invalid_client", header("Authorization: Basic YXBwIG9uZTpzM2NyOnQrLz0l"), "token={T1}")}},
		{"C035", []conformanceStep{bad(401, "invalid_client", header("Authorization: Basic bm9zZXBhcmF0b3I="), "token={T1}")}},
		{"C036", []conformanceStep{ok(header("authorization: basic YXBwLTI6U2VjcmV0LTI="), "token={T2}", "{T2.jti}")}},
		{"C037", []conformanceStep{bad(401, "invalid_client", header("Authorization: Bearer {T1}"), "token={T1}")}},
		{"C038", []conformanceStep{ok(header(basicTwo), "token={T2}&client_id=app-2", "{T2.jti}")}},
		{"C039", []conformanceStep{bad(400, "invalid_request", header(basicTwo), "token={T2}&client_id=spa-1")}},
		{"C040", []conformanceStep{bad(413, "invalid_request", one, "token="+strings.Repeat("x", 65537-len("token=")))}},
		{"C041", []conformanceStep{
			bad(400, "invalid_request", one, "token={T1};x=1"), bad(400, "invalid_request", one, "token=%zz"),
		}},
		{"C044", []conformanceStep{bad(400, "invalid_request", header(basicOne, basicTwo), "token={T1}")}},
		{"C045", []conformanceStep{{
			header: header(basicOf("app-quota", "Secret-3")), body: "token=x", repeat: 100,
			status: 429, code: "temporarily_unavailable", want: header("Retry-After: 1"),
		}}},
		{"C046", []conformanceStep{ok(one, "token={T1}&foo=1&foo=2", "{T1.jti}")}},
		{"C047", []conformanceStep{bad(400, "invalid_request", one, "Token={T1}")}},
		{"C137", []conformanceStep{ok(one, "token={TJ}", "{TJ.digest}"), ok(one, "token={TJ.twin}", "")}},
		{"C138", []conformanceStep{
			ok(one, "token={T1.jti}", ""),
			{header: header(basicOf("app-jti", "Secret-4")), body: "token={T1.jti}", status: 200, adds: "{T1.jti}", audited: "revoke_by_jti"},
		}},
	}
}

// runConformance runs the cases one after another. Each has tokens of its own,
// so that their order is of no importance.
func runConformance(t *testing.T, s conformanceStand) {
	for _, c := range conformanceCases() {
		t.Run(c.id, func(t *testing.T) {
			words := s.minter.words(t)
			for i, step := range c.steps {
				for range step.repeat {
					if res, _ := step.send(t, s.url, words); res.StatusCode != http.StatusOK {
						t.Fatalf("step %d: status %d before the last repetition", i+1, res.StatusCode)
					}
				}
				revoked, audited := s.recorded(t)
				res, body := step.send(t, s.url, words)
				step.check(t, res, body)
				revokedNow, auditedNow := s.recorded(t)
				added := revokedNow[len(revoked):]
				if want := words.fill(step.adds); want == "" && len(added) > 0 || want != "" && !slices.Equal(added, []string{want}) {
					t.Errorf("step %d: revoked %q, want %q", i+1, added, want)
				}
				if action := step.audited; action != "" && count(auditedNow, action) != count(audited, action)+1 {
					t.Errorf("step %d: the audit has %q, want one more %s", i+1, auditedNow[len(audited):], action)
				}
			}
		})
	}
}

func count(all []string, s string) int {
	n := 0
	for _, other := range all {
		if other == s {
			n++
		}
	}
	return n
}

var conformanceHTTP = &http.Client{Timeout: 30 * time.Second}

func (step conformanceStep) send(t *testing.T, base string, words words) (*http.Response, string) {
	t.Helper()
	method, target := step.method, step.target
	if method == "" {
		method = http.MethodPost
	}
	if target == "" {
		target = "/oauth2/revoke"
	}
	var body io.Reader
	if method == http.MethodPost {
		body = strings.NewReader(words.fill(step.body))
	}
	req, err := http.NewRequestWithContext(t.Context(), method, base+words.fill(target), body)
	if err != nil {
		t.Fatal(err)
	}
	name, value, _ := strings.Cut(formType, ": ")
	req.Header.Set(name, value)
	for _, line := range step.header {
		name, value, _ := strings.Cut(words.fill(line), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case value == "":
			req.Header.Del(name)
		case name == "Authorization":
			req.Header.Add(name, value)
		default:
			req.Header[name] = []string{value} // in the case it is written in
		}
	}
	res, err := conformanceHTTP.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(b)
}

func (step conformanceStep) check(t *testing.T, res *http.Response, body string) {
	t.Helper()
	if res.StatusCode != step.status {
		t.Fatalf("status %d, want %d: %s", res.StatusCode, step.status, body)
	}
	want := append([]string{"Cache-Control: no-store"}, step.want...)
	switch step.status {
	case http.StatusOK:
		want = append(want, "Content-Length: 0", "Content-Type: ", "WWW-Authenticate: ")
	case http.StatusUnauthorized:
		want = append(want, `WWW-Authenticate: Basic realm="oauth2", charset="UTF-8"`)
	default:
		want = append(want, "WWW-Authenticate: ")
	}
	for _, line := range want {
		name, value, _ := strings.Cut(line, ": ")
		if got := res.Header.Get(name); got != value {
			t.Errorf("%s: %q, want %q", name, got, value)
		}
	}
	if res.Header.Get("X-Request-Id") == "" {
		t.Error("no X-Request-Id")
	}
	if step.lacks != "" && strings.Contains(body, step.lacks) {
		t.Errorf("the body has %q: %s", step.lacks, body)
	}
	if step.code == "" {
		if body != "" {
			t.Errorf("body %q, want none", body)
		}
		return
	}
	if mediaType, _, _ := strings.Cut(res.Header.Get("Content-Type"), ";"); mediaType != "application/json" {
		t.Errorf("Content-Type %q", mediaType)
	}
	var object map[string]string
	if err := json.Unmarshal([]byte(body), &object); err != nil {
		t.Fatalf("no JSON object of strings: %s", body)
	}
	if object["error"] != step.code {
		t.Errorf("error %q, want %q", object["error"], step.code)
	}
	delete(object, "error")
	delete(object, "error_description")
	if len(object) > 0 {
		t.Errorf("the error object has more: %v", object)
	}
}

// words are what stands in braces in a case.
type words struct{ *strings.Replacer }

func (w words) fill(s string) string { return w.Replace(s) }

// minter makes tokens of conformanceIssuer.
type minter struct {
	rs, forger *rsa.PrivateKey
	es         *ecdsa.PrivateKey

	mu   sync.Mutex
	made []string
}

const (
	rsKid = "rs-1"
	esKid = "es-1"
)

func newMinter(t testing.TB) *minter {
	t.Helper()
	var m minter
	var err error
	for _, key := range []**rsa.PrivateKey{&m.rs, &m.forger} {
		if *key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			t.Fatal(err)
		}
	}
	if m.es, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	return &m
}

var b64 = base64.RawURLEncoding

// jwks is the issuer's key set.
func (m *minter) jwks(t testing.TB) []byte {
	t.Helper()
	point, err := m.es.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Appendf(nil, `{"keys":[{"kty":"RSA","use":"sig","alg":"RS256","kid":%q,"n":%q,"e":"AQAB"},`+
		`{"kty":"EC","use":"sig","alg":"ES256","crv":"P-256","kid":%q,"x":%q,"y":%q}]}`,
		rsKid, b64.EncodeToString(m.rs.N.Bytes()), esKid, b64.EncodeToString(point[1:33]), b64.EncodeToString(point[33:]))
}

type object = map[string]any

// sign makes a token with the claims, by RS256 and as at+jwt unless header says
// otherwise.
func (m *minter) sign(t testing.TB, key crypto.Signer, header, claims object) string {
	t.Helper()
	h := object{"alg": "RS256", "kid": rsKid, "typ": "at+jwt"}
	for name, value := range header {
		if h[name] = value; value == nil {
			delete(h, name)
		}
	}
	segment := func(o object) string {
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		return b64.EncodeToString(b)
	}
	input := segment(h) + "." + segment(claims)
	sum := sha256.Sum256([]byte(input))
	var signature []byte
	var err error
	switch key := key.(type) {
	case *rsa.PrivateKey:
		signature, err = rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
	case *ecdsa.PrivateKey:
		var r, s *big.Int
		r, s, err = ecdsa.Sign(rand.Reader, key, sum[:])
		if err == nil {
			signature = append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	tok := input + "." + b64.EncodeToString(signature)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.made = append(m.made, tok)
	return tok
}

// claims are those of a live access token of the client.
func claims(clientID, jti string) object {
	now := time.Now().Unix()
	return object{
		"iss": conformanceIssuer, "sub": clientID, "client_id": clientID, "aud": "https://api.example.com",
		"iat": now, "exp": now + 600, "jti": jti,
	}
}

func with(o object, name string, value any) object {
	o[name] = value
	if value == nil {
		delete(o, name)
	}
	return o
}

// words mints the tokens of one case.
func (m *minter) words(t *testing.T) words {
	t.Helper()
	one, two, three := rand.Text(), rand.Text(), rand.Text()
	t1 := m.sign(t, m.rs, nil, claims("app one", one))
	_, payload, _ := strings.Cut(t1, ".")
	payload, _, _ = strings.Cut(payload, ".")
	tj := m.sign(t, m.es, object{"alg": "ES256", "kid": esKid}, with(claims("app one", ""), "jti", nil))
	input := tj[:strings.LastIndexByte(tj, '.')]
	return words{strings.NewReplacer(
		"{T1}", t1, "{T1.jti}", one,
		"{T2}", m.sign(t, m.rs, nil, claims("app-2", two)), "{T2.jti}", two,
		"{T3}", m.sign(t, m.rs, nil, claims("spa-1", three)), "{T3.jti}", three,
		"{TX}", m.sign(t, m.rs, nil, with(claims("app one", rand.Text()), "exp", time.Now().Unix()-3600)),
		"{TF}", m.sign(t, m.forger, nil, claims("app one", one)),
		"{TN}", b64.EncodeToString([]byte(`{"alg":"none","typ":"at+jwt"}`))+"."+payload+".",
		"{TS}", m.sign(t, m.rs, object{"typ": "secevent+jwt"}, object{
			"iss": conformanceIssuer, "iat": time.Now().Unix(), "jti": rand.Text(), "events": object{},
		}),
		"{TE}", m.sign(t, m.rs, nil, with(claims("app one", rand.Text()), "exp", nil)),
		"{TJ}", tj, "{TJ.digest}", fmt.Sprintf("%x", sha256.Sum256([]byte(input))), "{TJ.twin}", input+"."+twin(t, tj[len(input)+1:]),
	)}
}

// twin is the other ES256 signature that is valid wherever this one is.
func twin(t *testing.T, signature string) string {
	t.Helper()
	b, err := b64.DecodeString(signature)
	if err != nil {
		t.Fatal(err)
	}
	s := new(big.Int).Sub(elliptic.P256().Params().N, new(big.Int).SetBytes(b[32:]))
	other := append(bytes.Clone(b[:32]), s.FillBytes(make([]byte, 32))...)
	return b64.EncodeToString(other)
}
