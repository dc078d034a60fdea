package explain

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/revoke"
)

var update = flag.Bool("update", false, "rewrite the golden files")

var pizza = &API{Context: "/pizza", Version: "1.0.0"}

func called(method, path string) *API {
	return &API{Context: "/pizza/1.0.0", Version: "1.0.0", Method: method, Path: path}
}

// TestExplain goes through what may become of a token, on the real service.
func TestExplain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.revoke(revoke.Order{JTI: "dead", Reason: "stolen"})
	w.revoke(revoke.Order{JTI: "over"})
	many := w.revoke(revoke.Order{SID: "s-dead"})
	w.revoke(revoke.Order{JTI: "many"})
	w.revoke(revoke.Order{Sub: "u-dead"})
	w.revoke(revoke.Order{Iss: idp, ClientID: "ext-1"})
	w.revoke(revoke.Order{Iss: idp, Token: "opaque-dead"})
	noJTI := access(iss, claims{"jti": nil})
	w.revoke(revoke.Order{Token: noJTI})
	w.revoke(revoke.Order{Tenant: "acme.com"})
	now := time.Now().Unix()
	later := claims{"jti": "later", "azp": "acme-1", "iat": now + 25, "exp": now + 600}

	for name, tt := range map[string]struct {
		q       Question
		verdict string
		code    replica.Code
		failed  string // the check
		kind    revocation.Kind
		others  int    // further revocations
		says    string // in the summary
		next    string
	}{
		"good":                  {q: Question{Token: access(iss, nil)}, verdict: Accepted},
		"with spaces around it": {q: Question{Token: " " + access(iss, nil) + "\n"}, verdict: Accepted},
		"good for the API":      {q: Question{Token: access(iss, nil), API: pizza}, verdict: Accepted},
		"good for the operation": {
			q: Question{Token: access(iss, nil), API: called("GET", "/pizza/1.0.0/menu?page=2")}, verdict: Accepted,
		},
		"claims": {q: Question{Claims: claims{}.json(iss), API: pizza}, verdict: Accepted},
		"revoked": {
			q: Question{Token: access(iss, claims{"jti": "dead"})}, verdict: Refused, code: replica.CodeInvalidCredentials,
			failed: checkRevoked, kind: revocation.KindToken, says: "This one token was revoked at ", next: "Get a new token",
		},
		"says who and why": {
			q: Question{Token: access(iss, claims{"jti": "dead"})}, verdict: Refused, code: replica.CodeInvalidCredentials,
			failed: checkRevoked, kind: revocation.KindToken, says: " by account:root (stolen), seq ",
		},
		"claims of a revoked one": {
			q: Question{Claims: claims{"jti": "dead"}.json(iss), API: pizza}, verdict: Refused, code: replica.CodeInvalidCredentials,
			failed: checkRevoked, kind: revocation.KindToken,
		},
		"revoked by several": {
			q: Question{Token: access(iss, claims{"jti": "many", "sid": "s-dead", "sub": "u-dead"})}, verdict: Refused,
			code: replica.CodeInvalidCredentials, failed: checkRevoked, kind: revocation.KindToken, others: 2,
		},
		"revoked with its session": {
			q:       Question{Token: access(iss, claims{"sid": "s-dead"})},
			verdict: Refused, code: replica.CodeInvalidCredentials, failed: checkRevoked, kind: revocation.KindSession, next: "log in again",
		},
		"revoked with its subject": {
			q:       Question{Token: access(iss, claims{"sub": "u-dead"})},
			verdict: Refused, code: replica.CodeInvalidCredentials, failed: checkRevoked, kind: revocation.KindSubject, next: "issued up to",
		},
		"revoked without a jti": {
			q: Question{Token: noJTI}, verdict: Refused, code: replica.CodeInvalidCredentials, failed: checkRevoked, kind: revocation.KindToken,
		},
		"a consumer key in a claim of its own": {
			q:       Question{Token: access(idp, claims{"appkey": "ext-1", "azp": "other"})},
			verdict: Refused, code: replica.CodeInvalidCredentials, failed: checkRevoked, kind: revocation.KindClient, next: "issued up to",
		},
		"revoked with its tenant": {
			q:       Question{Token: access(acmeIss, claims{"azp": "acme-1"})},
			verdict: Refused, code: replica.CodeInvalidCredentials, failed: checkRevoked, kind: revocation.KindTenant,
		},
		"issued after that": {q: Question{Token: access(acmeIss, later)}, verdict: Accepted},
		"expired": {
			q: Question{Token: access(iss, claims{"iat": now - 600, "exp": now - 60}), API: pizza}, verdict: Refused,
			code: replica.CodeInvalidCredentials, failed: "expiry", next: "Get a new token.",
		},
		"expired, asked about as of before": {
			q:       Question{Token: access(iss, claims{"iat": now - 600, "exp": now - 60}), At: time.Unix(now-100, 0)},
			verdict: Accepted, says: "catalog, are as they are now",
		},
		"expired and revoked": {
			q: Question{Token: access(iss, claims{"jti": "over", "iat": now - 600, "exp": now - 60})}, verdict: Refused,
			code: replica.CodeInvalidCredentials, kind: revocation.KindToken, says: "Besides, this one token was revoked at ",
		},
		"revoked later than asked about": {
			q:       Question{Token: access(iss, claims{"jti": "dead", "iat": now - 300}), At: time.Unix(now-100, 0)},
			verdict: Refused, code: replica.CodeInvalidCredentials, failed: checkRevoked, kind: revocation.KindToken, says: "only after the time",
		},
		"expired, for an operation that is open": {
			q:       Question{Token: access(iss, claims{"iat": now - 600, "exp": now - 60}), API: called("GET", "/pizza/1.0.0/open")},
			verdict: Accepted, says: "has expired",
		},
		"expired, for an operation that is not there": {
			q:       Question{Token: access(iss, claims{"iat": now - 600, "exp": now - 60}), API: called("GET", "/pizza/1.0.0/none")},
			verdict: Refused, code: replica.CodeForbidden, failed: "operation", says: "has expired",
		},
		"forged, for an operation that is open": {
			q: Question{Token: mint(forger(), iss, nil), API: called("GET", "/pizza/1.0.0/open")}, verdict: Accepted,
		},
		"lives too long": {
			q: Question{Token: access(iss, claims{"exp": now + 7200})}, verdict: Refused, code: replica.CodeInvalidCredentials,
		},
		"forged": {
			q: Question{Token: mint(forger(), iss, claims{"jti": "dead"})}, verdict: Refused, code: replica.CodeInvalidCredentials, failed: "signature", next: "altered on the way",
		},
		"malformed": {q: Question{Token: "Zm9y.Z2Vk.IQIQ"}, verdict: Refused, code: replica.CodeInvalidCredentials},
		"of nobody": {
			q: Question{Token: access(nobody, nil)}, verdict: Refused, code: replica.CodeInvalidCredentials, failed: "issuer_trusted", next: "key managers",
		},
		"claims of nobody": {
			q: Question{Claims: claims{}.json(nobody)}, verdict: Refused, code: replica.CodeInvalidCredentials, failed: "issuer_trusted", next: "key managers",
		},
		"keys that cannot be had": {q: Question{Token: access(awayIDP, nil)}, verdict: CannotTell, next: "jwks_uri"},
		"opaque, revoked": {
			q: Question{Token: "opaque-dead"}, verdict: Refused, code: replica.CodeInvalidCredentials, failed: checkRevoked, kind: revocation.KindToken,
		},
		"opaque": {q: Question{Token: "opaque-alive"}, verdict: CannotTell, next: "introspection"},
		"no subscription": {
			q:       Question{Token: access(iss, nil), API: &API{Context: "/pasta/1.0.0", Version: "1.0.0"}},
			verdict: Refused, code: replica.CodeForbidden, failed: "subscription", next: "ubscribe",
		},
		"no such API": {
			q:       Question{Token: access(iss, nil), API: &API{Context: "/piza", Version: "1.0.0"}},
			verdict: Refused, code: replica.CodeForbidden, failed: "api",
		},
		"no such operation": {
			q: Question{Token: access(iss, nil), API: called("POST", "/pizza/1.0.0/menu")}, verdict: Refused, code: replica.CodeForbidden, failed: "operation",
		},
		"another tenant's API": {
			q:       Question{Token: access(iss, nil), API: &API{Context: "/t/acme.com/anvil", Version: "1.0.0"}},
			verdict: Refused, code: replica.CodeForbidden, failed: "api_tenant",
		},
	} {
		a := w.ask(admin, tt.q)
		failed := firstFailed(a.Checks)
		var kind revocation.Kind
		if a.Revocation != nil {
			kind = a.Revocation.Kind
		}
		if a.Verdict != tt.verdict || a.Code != int(tt.code) || kind != tt.kind ||
			tt.failed != "" && (failed == nil || failed.Name != tt.failed) || tt.verdict == Accepted && failed != nil ||
			!strings.Contains(a.Summary, tt.says) || !strings.Contains(a.Next, tt.next) {
			t.Errorf("%s:\n%s", name, a.Text())
			continue
		}
		if tt.others > 0 {
			if others, ok := failed.Facts["others"].([]Revocation); !ok || len(others) != tt.others || others[0].ID != many.ID {
				t.Errorf("%s: others %v", name, failed.Facts)
			}
		}
		if r := a.Revocation; r != nil {
			if r.Actor != "account:root" || r.Seq == 0 || r.RevokedAt.IsZero() || r.ID == "" {
				t.Errorf("%s: %+v", name, r)
			}
		}
	}
}

// sized are facts that say what was asked, too, and moments are the seconds in which it was.
var (
	sized   = regexp.MustCompile(`"sha256":"[0-9a-f]{64}"|"bytes":[0-9]+`)
	moments = regexp.MustCompile(`\b20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]+)?Z|\b1[0-9]{9}\b`)
)

// TestTenantsAreApart: what others have is answered as what nobody has.
func TestTenantsAreApart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.revoke(revoke.Order{JTI: "dead"})
	w.revoke(revoke.Order{Iss: idp, Token: "opaque-dead"})
	w.fleet.known["gw"] = fleet.Gateway{ID: "gw", Tenant: revocation.SuperTenant.Domain, Standing: fleet.Live}
	bound := Caller{Tenant: acme.Domain}
	dead := claims{"jti": "dead"}
	for name, pair := range map[string][2]Question{
		"token":                         {{Token: access(iss, dead), API: pizza}, {Token: access(nobody, dead), API: pizza}},
		"forged":                        {{Token: mint(forger(), iss, dead)}, {Token: access(nobody, dead)}},
		"forged, for an open operation": {{Token: mint(forger(), iss, nil), API: called("GET", "/pizza/1.0.0/open")}, {Token: access(nobody, nil), API: called("GET", "/pizza/1.0.0/open")}},
		"keys are away":                 {{Token: access(awayIDP, nil)}, {Token: access(nobody, nil)}},
		"claims":                        {{Claims: dead.json(iss), API: pizza}, {Claims: dead.json(nobody), API: pizza}},
		"opaque":                        {{Token: "opaque-dead"}, {Token: "opaque-none"}},
		"gateway":                       {{Token: access(acmeIss, claims{"azp": "acme-1"}), Gateway: "gw"}, {Token: access(acmeIss, claims{"azp": "acme-1"}), Gateway: "gx"}},
		"API":                           {{Token: access(acmeIss, claims{"azp": "acme-1"}), API: pizza}, {Token: access(acmeIss, claims{"azp": "acme-1"}), API: &API{Context: "/pizzo", Version: "1.0.0"}}},
	} {
		verified := w.verifier.n
		var answers [2]string
		for n, q := range pair {
			q.At = time.Now()
			a := w.ask(bound, q)
			b, err := json.Marshal(a)
			if err != nil {
				t.Fatal(err)
			}
			text := string(b)
			// What differs is what was asked.
			for _, known := range []string{iss, awayIDP, nobody} {
				text = strings.ReplaceAll(text, `"`+known+`\"`, `"ISS\"`)
				text = strings.ReplaceAll(text, `"`+known+`"`, `"ISS"`)
				text = strings.ReplaceAll(text, known, "ISS")
			}
			text = strings.NewReplacer("/pizzo", "/pizza", `"gx"`, `"gw"`, q.At.UTC().Format("2006-01-02T15:04:05.000Z"), "AT").Replace(text)
			if a.Gateway != nil {
				text = strings.ReplaceAll(text, a.Gateway.At.Format(time.RFC3339Nano), "AT")
			}
			answers[n] = moments.ReplaceAllString(sized.ReplaceAllString(text, ""), "AT")
		}
		if diff := cmp.Diff(answers[1], answers[0]); diff != "" {
			t.Errorf("%s (-of nobody +of others):\n%s", name, diff)
		}
		if name == "token" || name == "forged" || name == "keys are away" || name == "claims" {
			if w.verifier.n != verified {
				t.Errorf("%s: verified", name)
			}
		}
	}
	if a := w.ask(Caller{Tenant: acme.Domain, Others: []string{"carbon.super"}}, Question{Token: access(iss, dead), Gateway: "gw"}); a.Revocation == nil || a.Gateway.Standing != fleet.Live {
		t.Errorf("an auditor of both:\n%s", a.Text())
	}
	if a := w.ask(bound, Question{Token: access(acmeIss, claims{"azp": "acme-1"}), API: &API{Context: "/t/acme.com/anvil", Version: "1.0.0"}}); a.Verdict != Accepted {
		t.Errorf("its own:\n%s", a.Text())
	}
}

// TestKnew: what reports from around a time say.
func TestKnew(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.revoke(revoke.Order{JTI: "dead"})
	head, err := w.ledger.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dead, good := Question{Token: access(iss, claims{"jti": "dead"})}, Question{Token: access(iss, nil)}
	revokedAt := w.ask(admin, dead).Revocation.RevokedAt
	at := revokedAt.Add(time.Microsecond) // of the questions that have a time; that is over
	sight := func(offset time.Duration, back revocation.Seq) *fleet.Sighting {
		return &fleet.Sighting{At: at.Add(offset), Position: revocation.Position{Epoch: head.Epoch, Seq: head.Seq - back}}
	}
	other := sight(-1, 0)
	other.Epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	then := func(q Question) Question { q.At = at; return q }
	live := fleet.Gateway{ID: "gw", Standing: fleet.Live}
	lost := fleet.Gateway{ID: "gw", Standing: fleet.Lost, ReportedAt: at}
	apart := fleet.Gateway{ID: "gw", Standing: fleet.Live, Comparison: fleet.Comparison{Verdict: fleet.Diverged, Time: at}}
	for name, tt := range map[string]struct {
		q             Question
		gateway       fleet.Gateway
		before, after *fleet.Sighting
		knew          string
		says, next    string
		confirms      *fleet.Sighting // once it is asked
	}{
		"had it":                  {then(dead), live, sight(-1, 0), nil, knewYes, "had applied the revocation", "", nil},
		"had it at that moment":   {then(dead), live, sight(0, 0), nil, knewYes, "", "", nil},
		"had it not":              {then(dead), live, sight(-1, 2), sight(1, 1), knewNo, "had not applied", "check its feeds", nil},
		"had it not, later":       {then(dead), live, nil, sight(1, 1), knewNo, "which came next", "rescind gateways", nil},
		"between two reports":     {then(dead), live, sight(-1, 1), sight(1, 0), knewUnknown, "not known of the time between", "", nil},
		"no reports":              {then(dead), live, nil, nil, knewUnknown, "No reports from around that time", "", nil},
		"another epoch":           {then(dead), live, other, nil, knewUnknown, "No reports", "", nil},
		"before the revocation":   {Question{Token: dead.Token, At: at.Add(-time.Second)}, live, sight(-1, 0), nil, knewNo, "was made later", "", nil},
		"now":                     {dead, live, sight(0, 0), nil, knewYes, "", "", nil},
		"not yet now":             {dead, live, sight(0, 1), nil, knewNo, "", "check its feeds", nil},
		"lost":                    {dead, lost, sight(0, 1), nil, knewUnknown, "is lost", "runs and reaches", nil},
		"lost, and had it":        {dead, lost, sight(0, 0), nil, knewYes, "is lost", "", nil},
		"diverged":                {dead, apart, sight(0, 0), nil, knewUnknown, "may lack what it reports", "rescind verify", nil},
		"nothing revoked":         {good, live, sight(0, 0), nil, knewYes, "had applied the state", "", nil},
		"nothing revoked, behind": {good, live, sight(time.Hour, 3), nil, knewNo, "had applied seq", "had not applied it", nil},
		"nothing revoked, then":   {then(good), live, sight(-1, 3), sight(1, 2), knewUnknown, "The log is at seq", "", nil},
		"nothing revoked, later":  {q: good, gateway: live, before: sight(-1, 3), confirms: sight(0, 0), knew: knewYes, says: "had applied the state"},
		"an old report":           {q: dead, gateway: live, before: sight(-time.Second, 1), knew: knewUnknown, says: "has not reported since"},
		"confirms when asked":     {q: dead, gateway: live, before: sight(-time.Second, 1), confirms: sight(0, 0), knew: knewYes, says: "had applied the revocation"},
		"tells when asked":        {q: dead, gateway: live, before: sight(-time.Second, 2), confirms: sight(0, 1), knew: knewNo, says: "had not applied the revocation"},
	} {
		tt.q.Gateway = "gw"
		w.fleet.known["gw"], w.fleet.before, w.fleet.after = tt.gateway, tt.before, tt.after
		w.fleet.barriers, w.fleet.meanwhile = nil, func() {
			if tt.confirms != nil {
				w.fleet.before = tt.confirms
			}
		}
		k := w.ask(admin, tt.q)
		if g := k.Gateway; g == nil || g.Knew != tt.knew || g.Standing != tt.gateway.Standing || !strings.Contains(g.Detail, tt.says) || !strings.Contains(k.Next, tt.next) {
			t.Errorf("%s:\n%s", name, k.Text())
		}
		var barriers []revocation.Position
		if tt.q.At.IsZero() && tt.gateway.Standing == fleet.Live {
			barriers = append(barriers, head)
		}
		if diff := cmp.Diff(barriers, w.fleet.barriers); diff != "" {
			t.Errorf("%s, waited for (-want +got):\n%s", name, diff)
		}
	}

	had := live
	had.Report.Position = head
	w.fleet.known["gw"], w.fleet.before, w.fleet.barriers = had, sight(0, 0), nil
	dead.Gateway = "gw"
	if a := w.ask(admin, dead); a.Gateway.Knew != knewYes || w.fleet.barriers != nil {
		t.Errorf("one that has said so already is waited for:\n%s", a.Text())
	}

	w.fleet.err = errors.New("away")
	if _, err := w.Explain(t.Context(), admin, Question{Token: "opaque-none", Gateway: "gw"}); !errors.Is(err, ledger.ErrUnavailable) {
		t.Errorf("a fleet that cannot be asked: %v", err)
	}
	w.deps.Fleet = nil
	if a := w.ask(admin, Question{Token: "opaque-none", Gateway: "gw"}); a.Gateway.Knew != knewUnknown {
		t.Errorf("without a fleet:\n%s", a.Text())
	}
}

// TestGatewayOfATenant: a gateway that serves one tenant refuses the tokens of others.
func TestGatewayOfATenant(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.fleet.known["gw"] = fleet.Gateway{ID: "gw", Standing: fleet.Live, Report: replica.Report{Tenants: []string{acme.Domain}}}
	if a := w.ask(admin, Question{Token: access(iss, nil), Gateway: "gw"}); a.Verdict != Refused || firstFailed(a.Checks).Name != "issuer" {
		t.Errorf("another tenant's:\n%s", a.Text())
	}
	if a := w.ask(admin, Question{Token: access(acmeIss, claims{"azp": "acme-1"}), Gateway: "gw"}); a.Verdict != Accepted {
		t.Errorf("its tenant's:\n%s", a.Text())
	}
}

func TestQuestions(t *testing.T) {
	t.Parallel()
	now := time.Unix(1795209000, 0)
	secret := "eyJhbGciOiJFUzI1NiJ9.secret.signature"
	for name, tt := range map[string]struct {
		q    Question
		want []string // pointers
	}{
		"nothing":           {Question{}, []string{"#"}},
		"null":              {Question{Claims: json.RawMessage("null")}, []string{"#"}},
		"both":              {Question{Token: secret, Claims: json.RawMessage(`{}`)}, []string{"#/claims"}},
		"token":             {Question{Token: secret}, nil},
		"long token":        {Question{Token: secret + strings.Repeat("x", maxToken)}, []string{"#/token"}},
		"spaces":            {Question{Token: " \n"}, []string{"#/token"}},
		"claims":            {Question{Claims: json.RawMessage(`{"iss":"i","iat":1,"exp":2.5}`)}, nil},
		"no claims":         {Question{Claims: json.RawMessage(`{"ISS":"i","iat":null,"exp":"2"}`)}, []string{"#/claims/iss", "#/claims/iat", "#/claims/exp"}},
		"claims of a list":  {Question{Claims: json.RawMessage(`["` + secret + `"]`)}, []string{"#/claims"}},
		"long claims":       {Question{Claims: json.RawMessage(`"` + strings.Repeat("x", MaxClaims) + `"`)}, []string{"#/claims"}},
		"API":               {Question{Token: secret, API: &API{Context: "/p", Version: "1"}}, nil},
		"half an API":       {Question{Token: secret, API: &API{Context: "/p"}}, []string{"#/api/version"}},
		"other half":        {Question{Token: secret, API: &API{Version: "1"}}, []string{"#/api/context"}},
		"odd context":       {Question{Token: secret, API: &API{Context: "p", Version: "\x00"}}, []string{"#/api/context", "#/api/version"}},
		"no path":           {Question{Token: secret, API: &API{Context: "/p", Version: "1", Method: "GET"}}, []string{"#/api/path"}},
		"no method":         {Question{Token: secret, API: &API{Context: "/p", Version: "1", Path: "/p/1"}}, []string{"#/api/method"}},
		"path":              {Question{Token: secret, API: &API{Context: "/p", Version: "1", Method: "GET", Path: "/p/1/x?access_token=" + secret}}, nil},
		"elsewhere":         {Question{Token: secret, API: &API{Context: "/p", Version: "1", Method: "G T", Path: "/pp/1/x"}}, []string{"#/api/method", "#/api/path"}},
		"gateway":           {Question{Token: secret, Gateway: "gw-1.a_b"}, nil},
		"odd gateway":       {Question{Token: secret, Gateway: "-gw"}, []string{"#/gateway"}},
		"future":            {Question{Token: secret, At: now.Add(1)}, []string{"#/at"}},
		"now":               {Question{Token: secret, At: now}, nil},
		"30 days ago":       {Question{Token: secret, At: now.Add(-MaxAgo)}, nil},
		"more than 30 days": {Question{Token: secret, At: now.Add(-MaxAgo - 1)}, []string{"#/at"}},
	} {
		err := tt.q.validate(now)
		invalid, _ := errors.AsType[catalog.Invalid](err)
		var got []string
		for _, e := range invalid {
			got = append(got, e.Pointer)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if err != nil {
			silent(t, secret, err.Error())
		}
	}
}

func TestContexts(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		api  API
		want []string
	}{
		{API{Context: "/pizza", Version: "1.0.0"}, []string{"/pizza", "/pizza/1.0.0"}},
		{API{Context: "/pizza/", Version: "1.0.0"}, []string{"/pizza/", "/pizza/1.0.0"}},
		{API{Context: "/pizza/1.0.0", Version: "1.0.0"}, []string{"/pizza/1.0.0"}},
	} {
		if got := tt.api.contexts(); !slices.Equal(got, tt.want) {
			t.Errorf("%+v: %q, want %q", tt.api, got, tt.want)
		}
	}
}

// TestText: golden answers, and nothing in them that orders a terminal about.
func TestText(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 20, 21, 10, 0, 123e6, time.UTC)
	for name, a := range map[string]Answer{
		"refused": {
			Verdict: Refused, Summary: "Refused by the check revocation: " + strings.Repeat("The token is revoked. ", 8),
			Code: 900901, HTTPStatus: 401, Message: "Invalid Credentials",
			Checks: []replica.Check{
				{Name: "form", Result: replica.Passed, Detail: "The token is a JWT."},
				{Name: "signature", Result: replica.NotLooked, Detail: "The claims are believed: there is no token whose header or signature could be looked at."},
				{Name: checkRevoked, Result: replica.Failed, Detail: strings.Repeat("A client of 40 letters was revoked with all of its tokens. ", 4), Facts: map[string]any{
					"reason": "revoked", "kind": "client", "others": []string{"a", "b"},
				}},
				{Name: "subscription", Result: replica.NotReached},
			},
			Revocation: &Revocation{
				ID: "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Kind: revocation.KindClient, Identifier: "key-1", Iss: iss, Tenant: "carbon.super",
				RevokedAt: at, NotAfter: at.Unix() + 2, Exp: at.Unix() + 3600, Actor: "account:root", Reason: "\x1b[31mstolen\x1b[0m\u202e", Seq: 815,
			},
			Gateway: &GatewayKnew{ID: "gw-1", Standing: fleet.Lost, Knew: knewUnknown, At: at, Detail: "No reports from around that time are known."},
			Next:    "Get a new token.", Position: revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: 820},
		},
		"accepted": {
			Verdict: Accepted, Summary: "The token is good, and is not revoked.", Checks: []replica.Check{{Name: "form", Result: replica.Passed, Detail: "The token is a JWT."}},
			Position: revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: 820},
		},
		"cannot_tell": {
			Verdict: CannotTell, Summary: "This cannot be told.",
			Revocation: &Revocation{ID: "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Kind: revocation.KindToken, Identifier: strings.Repeat("x", 120), RevokedAt: at, Exp: at.Unix()},
		},
	} {
		got := a.Text()
		for line := range strings.Lines(got) {
			if line = strings.TrimSuffix(line, "\n"); len([]rune(line)) > width && !strings.Contains(line, "xxx") || line != strings.TrimRight(line, " ") || line != printable(line) {
				t.Errorf("%s: line %q", name, line)
			}
		}
		path := filepath.Join("testdata", name+".golden")
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestRenewed: a token is explained by the act that ended it, not by what the revocation was when it was made, nor by
// what has become of it.
func TestRenewed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	now := time.Now().Unix()
	var acts []ledger.Result
	for n, by := range []string{"account:ann", "account:bob", "account:cat"} {
		done, err := w.ledger.RevokeAll(t.Context(), []ledger.Request{{
			Target: revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "key-1"}, Tenant: revocation.SuperTenant,
			Exp: now + 4000 + int64(n), NotAfter: now - 200 + int64(n)*100, Reason: "why " + by, Action: "revoke_client", Actor: ledger.Actor{Name: by},
		}})
		if err != nil {
			t.Fatal(err)
		}
		acts = append(acts, done...)
	}
	issued := func(ago int64) Question { return Question{Claims: claims{"iat": now - ago}.json(iss), Gateway: "gw"} }
	check := func(name string, ago int64, seq revocation.Seq, actor, reason string, timed bool) Answer {
		t.Helper()
		a := w.ask(admin, issued(ago))
		if r := a.Revocation; r == nil || r.Seq != seq || r.Actor != actor || r.Reason != reason || r.RevokedAt.IsZero() == timed || r.NotAfter != now {
			t.Errorf("%s, issued %d s ago: %+v\n%s", name, ago, r, a.Text())
		}
		return a
	}
	first := check("all there", 300, acts[0].Seq, "account:ann", "why account:ann", true).Revocation.RevokedAt
	check("all there", 200, acts[0].Seq, "account:ann", "why account:ann", true)
	check("all there", 150, acts[1].Seq, "account:bob", "why account:bob", true)
	if last := check("all there", 0, acts[2].Seq, "account:cat", "why account:cat", true).Revocation.RevokedAt; last.Before(first) {
		t.Errorf("the last act was at %s, the first at %s", last, first)
	}

	// The first act was long ago, and retention has removed the events of it and of the second.
	exec := func(pool *pgxpool.Pool, sql string, args ...any) {
		t.Helper()
		if _, err := pool.Exec(t.Context(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec(w.owner, `DELETE FROM rescind.log WHERE seq <= $1`, acts[1].Seq)
	exec(w.owner, `UPDATE rescind.revocations SET revoked_at = revoked_at - interval '250 s'`)
	w.fleet.known["gw"] = fleet.Gateway{ID: "gw", Standing: fleet.Live}
	check("gone", 300, 0, "", "why account:ann", true)
	a := check("gone", 150, 0, "", "", false)
	if !strings.Contains(a.Summary, "renewed since") || a.Gateway.Knew != knewUnknown || strings.Contains(a.Text(), "revoked at") {
		t.Errorf("%s", a.Text())
	}
}

// TestBefore: of several revocations those count that there were at the time asked about.
func TestBefore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.revoke(revoke.Order{JTI: "many"})
	w.revoke(revoke.Order{SID: "s"})
	if _, err := w.pool.Exec(t.Context(), `UPDATE rescind.revocations SET revoked_at = revoked_at - interval '10 s' WHERE kind = 'session'`); err != nil {
		t.Fatal(err)
	}
	q := Question{Token: access(iss, claims{"jti": "many", "sid": "s"})}
	const only = "revoked only after the time"
	for _, tt := range []struct {
		ago   time.Duration
		kind  revocation.Kind
		later bool
	}{
		{0, revocation.KindToken, false}, {5 * time.Second, revocation.KindSession, false}, {time.Minute, revocation.KindToken, true},
	} {
		q.At = time.Time{}
		if tt.ago > 0 {
			q.At = time.Now().Add(-tt.ago)
		}
		if a := w.ask(admin, q); a.Revocation == nil || a.Revocation.Kind != tt.kind || strings.Contains(a.Summary, only) != tt.later {
			t.Errorf("%s ago:\n%s", tt.ago, a.Text())
		}
	}
}

// auditor has an audit that takes too long to be looked through.
type auditor struct{ Ledger }

func (auditor) AuditPage(ctx context.Context, _ ledger.AuditFilter, _ int64, _ int) ([]ledger.AuditRecord, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestLargeAudit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		i := &inquiry{Explainer: &Explainer{deps: Deps{Ledger: auditor{}}}}
		r := Revocation{RevokedAt: time.Now()}
		if err := i.audited(t.Context(), &r); r.Actor != "" || err != nil {
			t.Errorf("by %q, %v", r.Actor, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := i.audited(ctx, &r); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that is gone: %v", err)
		}
	})
}

func TestNew(t *testing.T) {
	t.Parallel()
	_, err := New(Deps{})
	for _, missing := range []string{"ledger", "state", "verifier"} {
		if err == nil || !strings.Contains(err.Error(), missing) {
			t.Errorf("without a %s: %v", missing, err)
		}
	}
}
