package app_test

import (
	"bytes"
	"crypto/elliptic"
	"crypto/rand"
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
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/rescindhq/rescind/internal/authn"
)

// The cases of the revocation endpoint, on the real services; those of the others are in
// conformancekm_test.go. C031 to C033, C108 and C109 take a server away: they are in
// [TestConformancePostgresAway] and its neighbours. There is no CORS for C042 and C043.

// conformanceClients are to be registered for one application each.
var conformanceClients = []authn.Registration{
	{ID: "app one", Secret: "s3cr:t+/=%", Scopes: []string{"read", "write"}},
	{ID: "app-2", Secret: "Secret-2", AuthMethod: "client_secret_post"},
	{ID: "gw-1", Secret: "plainSecret_42", ResourceAudiences: []string{"https://api.example.com"}},
	{ID: "spa-1", AuthMethod: "none"},
	{ID: "app-quota", Secret: "Secret-3", RevokeQuota: 100},
	{ID: "app-jti", Secret: "Secret-4", RevokeByJTI: true},
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

func basicHeader(id, secret string) string { return "Authorization: " + basic(id, secret) }

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
			header: header(basicHeader("app-quota", "Secret-3")), body: "token=x", repeat: 100,
			status: 429, code: "temporarily_unavailable", want: header("Retry-After: 1"),
		}}},
		{"C046", []conformanceStep{ok(one, "token={T1}&foo=1&foo=2", "{T1.jti}")}},
		{"C047", []conformanceStep{bad(400, "invalid_request", one, "Token={T1}")}},
		{"C137", []conformanceStep{ok(one, "token={TJ}", "{TJ.digest}"), ok(one, "token={TJ.twin}", "")}},
		{"C138", []conformanceStep{
			ok(one, "token={T1.jti}", ""),
			{header: header(basicHeader("app-jti", "Secret-4")), body: "token={T1.jti}", status: 200, adds: "{T1.jti}", audited: "revoke_by_jti"},
		}},
	}
}

// recorded returns the identifiers (jti or digest) of all revocations, one for each
// event, and the actions in the audit.
func recorded(t *testing.T, pool *pgxpool.Pool) (revoked, audited []string) {
	t.Helper()
	for _, q := range []struct {
		sql string
		out *[]string
	}{{`SELECT subject FROM rescind.log WHERE type LIKE 'revocation.%' ORDER BY seq`, &revoked}, {`SELECT action FROM rescind.audit ORDER BY id`, &audited}} {
		rows, err := pool.Query(t.Context(), q.sql)
		if err == nil {
			*q.out, err = pgx.CollectRows(rows, pgx.RowTo[string])
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return revoked, audited
}

// Each case has tokens of its own, so that their order is of no importance.
func TestConformance(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	for _, r := range conformanceClients {
		w.client(idpISS, r)
	}
	pool := w.pool()
	for _, c := range conformanceCases() {
		t.Run(c.id, func(t *testing.T) {
			words := newWords(t)
			for i, step := range c.steps {
				for range step.repeat {
					if res, _ := step.send(t, s.base, words); res.StatusCode != http.StatusOK {
						t.Fatalf("step %d: status %d before the last repetition", i+1, res.StatusCode)
					}
				}
				revoked, audited := recorded(t, pool)
				res, body := step.send(t, s.base, words)
				step.check(t, res, body)
				revokedNow, auditedNow := recorded(t, pool)
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

	conformKeyManager(t, w, s)

	t.Run("both paths", func(t *testing.T) {
		step := conformanceStep{target: "/revoke", header: []string{basicOne}, body: "token={T1}", status: 200}
		res, body := step.send(t, s.base, newWords(t))
		step.check(t, res, body)
	})

	// Whatever became of the token, a 200 looks the same.
	t.Run("headers of 200", func(t *testing.T) {
		words := newWords(t)
		var want http.Header
		for _, body := range []string{"token={T1}", "token={T1}", "token=opaque", "token={TX}", "token={TF}", "token={TN}", "token=a.b.c"} {
			res, _ := conformanceStep{header: []string{basicOne}, body: body}.send(t, s.base, words)
			for _, name := range []string{"X-Request-Id", "Date"} {
				if res.Header.Get(name) == "" {
					t.Errorf("no %s", name)
				}
				res.Header.Del(name)
			}
			if want == nil {
				want = res.Header
			}
			if diff := cmp.Diff(want, res.Header); diff != "" {
				t.Errorf("%s (-first +this):\n%s", body, diff)
			}
		}
	})

	t.Run("nothing secret in the log", func(t *testing.T) {
		logged := s.logs.String()
		if !strings.Contains(logged, `"client":"app one"`) {
			t.Error("the log does not name the client")
		}
		secrets := []string{"opaque-unknown-123", "pkg.cb", "eyJ"} // the last begins every JWT
		for _, r := range conformanceClients {
			if r.Secret != "" {
				secrets = append(secrets, r.Secret, url.QueryEscape(r.Secret))
			}
		}
		for _, secret := range secrets {
			if strings.Contains(logged, secret) {
				t.Errorf("the log has %q", secret)
			}
		}
	})

	// An unusable traceparent is not continued, a good one is.
	t.Run("C113", func(t *testing.T) {
		const good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
		for _, parent := range []string{
			good, "00-00000000000000000000000000000000-00f067aa0ba902b7-01", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
			"ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		} {
			words := newWords(t)
			step := conformanceStep{header: []string{basicOne, "traceparent: " + parent}, body: "token={T1}", status: 200}
			res, body := step.send(t, s.base, words)
			step.check(t, res, body)
			var stored string
			err := pool.QueryRow(t.Context(), `SELECT traceparent FROM rescind.log WHERE subject = $1`, words.fill("{T1.jti}")).Scan(&stored)
			if err != nil {
				t.Fatal(err)
			}
			continued := len(stored) == len(good) && stored[:35] == good[:35]
			if len(stored) != len(good) || continued != (parent == good) {
				t.Errorf("traceparent %s became %s", parent, stored)
			}
		}
	})
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

// newWords mints the tokens of one case.
func newWords(t *testing.T) words {
	t.Helper()
	of := func(client, jti string, changes ...map[string]any) map[string]any {
		changes = append([]map[string]any{{"sub": client, "azp": nil, "client_id": client}}, changes...)
		return claims(jti, changes...)
	}
	live := func(client, jti string) string { return mint("RS256", nil, of(client, jti)) }
	one, two, three := rand.Text(), rand.Text(), rand.Text()
	t1 := live("app one", one)
	_, payload, _ := strings.Cut(t1, ".")
	payload, _, _ = strings.Cut(payload, ".")
	forged := t1[:strings.LastIndexByte(t1, '.')+1] + b64.EncodeToString(bytes.Repeat([]byte{1}, 256))
	tj := mint("ES256", nil, of("app one", "", map[string]any{"jti": nil}))
	input := tj[:strings.LastIndexByte(tj, '.')]
	return words{strings.NewReplacer(
		"{T1}", t1, "{T1.jti}", one,
		"{T2}", live("app-2", two), "{T2.jti}", two,
		"{T3}", live("spa-1", three), "{T3.jti}", three,
		"{TX}", mint("RS256", nil, of("app one", rand.Text(), map[string]any{"exp": time.Now().Unix() - 3600})),
		"{TF}", forged,
		"{TN}", b64.EncodeToString([]byte(`{"alg":"none","typ":"at+jwt"}`))+"."+payload+".",
		"{TS}", mint("RS256", map[string]any{"typ": "secevent+jwt"}, map[string]any{
			"iss": idpISS, "iat": time.Now().Unix(), "jti": rand.Text(), "events": map[string]any{},
		}),
		"{TE}", mint("RS256", nil, of("app one", rand.Text(), map[string]any{"exp": nil})),
		"{TJ}", tj, "{TJ.digest}", fmt.Sprintf("%x", sha256.Sum256([]byte(input))), "{TJ.twin}", input+"."+twin(t, tj[len(input)+1:]),
	)}
}

var b64 = base64.RawURLEncoding

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

func TestOnlyAccessTokensAreRevoked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	client := newHTTPClient(t)
	for i, tt := range []struct {
		typ    any
		claim  string
		status int
	}{
		{nil, "x", 200}, {"JWT", "x", 200}, {"application/at+jwt", "x", 200}, {"AT+JWT", "nonce", 200},
		{nil, "nonce", 200}, {"JWT", "at_hash", 400}, {"JWT", "c_hash", 400}, {nil, "s_hash", 400},
		{"logout+jwt", "x", 400}, {"statuslist+jwt", "x", 400}, {"at", "x", 400},
	} {
		before := w.events()
		token := mint("ES256", map[string]any{"typ": tt.typ}, claims(fmt.Sprint(i), map[string]any{tt.claim: "v"}))
		a, err := s.revoke(client, token)
		if added := w.events() - before; err != nil || a.status != tt.status || (added == 1) != (tt.status == 200) {
			t.Errorf("typ %v with %s: %+v, %v and %d events; want %d", tt.typ, tt.claim, a, err, added, tt.status)
		}
	}
}
