package httpapi

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// testIssuer is the issuer of tokens and of their clients' keys.
const testIssuer = "https://km.example.com"

// live is a genuine token of the client that fakes let in.
func live() *token.Token {
	return &token.Token{
		Alg: "RS256", KeyID: "k", Type: "at+jwt", Issuer: testIssuer, ID: "jti-1", ClientID: "app-1",
		HasExpiry: true, Expiry: time.Now().Unix() + 600, SigningInput: "e30.e30", Signature: "c2ln",
	}
}

func appOne() authn.Client {
	return authn.Client{
		ID: "app-1", ApplicationID: 1, Tenant: revocation.SuperTenant, Issuer: testIssuer, MaxTokenLifetime: time.Hour,
	}
}

// revoke posts tok, "a.b.c" unless set, to a stand of these parts.
func revoke(t *testing.T, client authn.Client, v *fakeVerifier, l *fakeLedger, tok string) (*httptest.ResponseRecorder, *stand) {
	t.Helper()
	s := newStand(t, Config{}, Deps{Ledger: l, Verifier: v, Clients: &fakeClients{client: client, owners: map[string]int32{
		testIssuer + " app-1": 1, testIssuer + " same": 1, testIssuer + " other": 2, "https://idp.example.org app-1": 1,
	}}})
	return s.post("token=" + url.QueryEscape(tok)), s
}

func (s *stand) post(body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/revoke", strings.NewReader(body))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

func TestRevokeJWT(t *testing.T) {
	t.Parallel()
	change := func(f func(*token.Token)) *token.Token {
		tok := live()
		f(tok)
		return tok
	}
	year := int64(365 * 24 * 3600)
	tests := []struct {
		name   string
		token  *token.Token
		err    error
		status int
		result string
		target revocation.Target // zero: nothing is revoked
	}{
		{"own", live(), nil, 200, resultRevoked, revocation.Target{Kind: "token", Iss: testIssuer, ID: "jti-1"}},
		{"without jti", change(func(t *token.Token) { t.ID = "" }), nil, 200, resultRevoked, revocation.DigestTarget(testIssuer, "e30.e30")},
		{"no typ", change(func(t *token.Token) { t.Type = "" }), nil, 200, resultRevoked, revocation.Target{Kind: "token", Iss: testIssuer, ID: "jti-1"}},
		{"typ JWT", change(func(t *token.Token) { t.Type = "jwt" }), nil, 200, resultRevoked, revocation.Target{Kind: "token", Iss: testIssuer, ID: "jti-1"}},
		{"typ of its issuer", change(func(t *token.Token) { t.Type = "x-at" }), nil, 200, resultRevoked, revocation.Target{Kind: "token", Iss: testIssuer, ID: "jti-1"}},
		{"same application", change(func(t *token.Token) { t.ClientID = "same" }), nil, 200, resultRevoked, revocation.Target{Kind: "token", Iss: testIssuer, ID: "jti-1"}},
		{"same application, other issuer", change(func(t *token.Token) { t.Issuer = "https://idp.example.org" }), nil, 200, resultRevoked, revocation.Target{Kind: "token", Iss: "https://idp.example.org", ID: "jti-1"}},
		{"just expired", change(func(t *token.Token) { t.Expiry = time.Now().Unix() - 60 }), nil, 200, resultRevoked, revocation.Target{Kind: "token", Iss: testIssuer, ID: "jti-1"}},
		{"almost ten years", change(func(t *token.Token) { t.Expiry = time.Now().Unix() + 10*year - 60 }), nil, 200, resultRevoked, revocation.Target{Kind: "token", Iss: testIssuer, ID: "jti-1"}},

		{"expired", change(func(t *token.Token) { t.Expiry = time.Now().Unix() - 120 }), nil, 200, resultNothing, revocation.Target{}},
		{"malformed", nil, token.ErrMalformed, 200, resultNothing, revocation.Target{}},
		{"untrusted", nil, token.ErrUntrustedIssuer, 200, resultNothing, revocation.Target{}},
		{"algorithm", nil, fmt.Errorf("%w: none", token.ErrAlgorithm), 200, resultNothing, revocation.Target{}},
		{"unknown key", nil, token.ErrUnknownKey, 200, resultNothing, revocation.Target{}},
		{"signature", nil, token.ErrSignature, 200, resultNothing, revocation.Target{}},

		{"another client's", change(func(t *token.Token) { t.ClientID = "other" }), nil, 400, resultForeign, revocation.Target{}},
		{"nobody's", change(func(t *token.Token) { t.ClientID = "" }), nil, 400, resultForeign, revocation.Target{}},
		{"of the same id at another issuer", change(func(t *token.Token) { t.Issuer = "https://evil.example" }), nil, 400, resultForeign, revocation.Target{}},

		{"security event", change(func(t *token.Token) { t.Type = "secevent+jwt" }), nil, 400, resultUnsupported, revocation.Target{}},
		{"no exp", change(func(t *token.Token) { t.HasExpiry, t.Expiry = false, 0 }), nil, 400, resultUnsupported, revocation.Target{}},
		{"over ten years", change(func(t *token.Token) { t.Expiry = time.Now().Unix() + 10*year + 60 }), nil, 400, resultUnsupported, revocation.Target{}},
		{"far ahead", change(func(t *token.Token) { t.Expiry = 1 << 53 }), nil, 400, resultUnsupported, revocation.Target{}},
		{"long jti", change(func(t *token.Token) { t.ID = strings.Repeat("j", 256) }), nil, 400, resultUnsupported, revocation.Target{}},
		{"control character in jti", change(func(t *token.Token) { t.ID = "a\x00" }), nil, 400, resultUnsupported, revocation.Target{}},
		{"claims of a wrong type", nil, token.ErrClaims, 400, resultUnsupported, revocation.Target{}},

		{"keys away", nil, fmt.Errorf("%w: timeout", token.ErrKeysUnavailable), 503, resultUnavailable, revocation.Target{}},
		{"a bug", nil, errors.New("boom"), 500, resultFailed, revocation.Target{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := &fakeLedger{}
			w, s := revoke(t, appOne(), &fakeVerifier{token: tt.token, err: tt.err, issuer: token.Issuer{AllowTypes: []string{"application/X-AT"}}}, l, "a.b.c")
			if w.Code != tt.status {
				t.Fatalf("status %d, want %d: %s", w.Code, tt.status, w.Body)
			}
			if n := s.metric(t, "rescind_revoke_total", tt.result); n != 1 {
				t.Errorf("%v results %s, want 1", n, tt.result)
			}
			if tt.result == resultNothing {
				reason := token.Reason(tt.err)
				if tt.err == nil {
					reason = reasonExpired
				}
				if n := s.metric(t, "rescind_revoke_nothing_total", reason); n != 1 {
					t.Errorf("%v for reason %s, want 1", n, reason)
				}
			}
			if tt.target == (revocation.Target{}) {
				if len(l.requests) != 0 {
					t.Fatalf("revoked %+v", l.requests)
				}
			} else {
				want := ledger.Request{
					Target: tt.target, Tenant: revocation.SuperTenant, Exp: tt.token.Expiry, ClientID: tt.token.ClientID, Reason: "client",
					Action: "revoke_token", Actor: ledger.Actor{Name: "client:app-1", RequestID: w.Header().Get("X-Request-Id"), Remote: "192.0.2.1"},
				}
				if tt.target.Digest {
					want.Signature = "c2ln"
				}
				if len(l.requests) != 1 || len(l.requests[0].Traceparent) != 55 {
					t.Fatalf("requests %+v", l.requests)
				}
				want.Traceparent = l.requests[0].Traceparent
				if l.requests[0] != want {
					t.Errorf("got %+v\nwant %+v", l.requests[0], want)
				}
			}
			if foreign := tt.result == resultForeign; foreign != (len(l.audits) == 1) {
				t.Errorf("audit %+v", l.audits)
			}
		})
	}
}

func TestPublicClientSpeaksForItselfOnly(t *testing.T) {
	t.Parallel()
	client := appOne()
	client.Public = true
	tok := live()
	if w, _ := revoke(t, client, &fakeVerifier{token: tok}, &fakeLedger{}, "a.b.c"); w.Code != 200 {
		t.Errorf("its own token got %d, want 200", w.Code)
	}
	tok.ClientID = "same"
	if w, _ := revoke(t, client, &fakeVerifier{token: tok}, &fakeLedger{}, "a.b.c"); w.Code != 400 {
		t.Errorf("a token of its application got %d, want 400", w.Code)
	}
}

func TestForeignTokenIsOnRecord(t *testing.T) {
	t.Parallel()
	for clientID, reason := range map[string]string{"other": "issued to other", "a\x00b": "", strings.Repeat("c", 256): ""} {
		tok := live()
		tok.ClientID = clientID
		l := &fakeLedger{}
		w, s := revoke(t, appOne(), &fakeVerifier{token: tok}, l, "a.b.c")
		want := []ledger.AuditEntry{{
			Tenant: revocation.SuperTenant, Action: "foreign_token", Iss: testIssuer, Subject: "jti-1", Reason: reason,
			Actor: ledger.Actor{Name: "client:app-1", RequestID: w.Header().Get("X-Request-Id"), Remote: "192.0.2.1"},
		}}
		if diff := cmp.Diff(want, l.audits); diff != "" || w.Code != 400 {
			t.Errorf("status %d, audit (-want +got):\n%s", w.Code, diff)
		}
		if n := s.metric(t, "rescind_revoke_total", resultForeign); n != 1 {
			t.Errorf("%v counted, want 1", n)
		}
	}
}

func TestRevokeByJTI(t *testing.T) {
	t.Parallel()
	client := appOne()
	client.RevokeByJTI = true
	target := revocation.Target{Kind: revocation.KindToken, Iss: testIssuer, ID: "jti-1"}
	now := time.Now().Unix()
	knownFrom := func(clientID string, exp int64) *fakeLedger {
		return &fakeLedger{known: map[revocation.Target]revocation.Revocation{target: {Target: target, ClientID: clientID, Exp: exp}}}
	}
	issuedBy := func(iss, clientID string, exp int64) *fakeLedger {
		return &fakeLedger{issued: map[string]ledger.Issued{"jti-1": {JTI: "jti-1", Iss: iss, ClientID: clientID, Exp: exp}}}
	}
	issuedTo := func(clientID string, exp int64) *fakeLedger { return issuedBy(testIssuer, clientID, exp) }
	tests := []struct {
		name   string
		ledger *fakeLedger
		tok    string
		status int
		result string
	}{
		{"issued to it", issuedTo("app-1", now+3600), "jti-1", 200, resultRevoked},
		{"issued to another", issuedTo("other", now+3600), "jti-1", 400, resultForeign},
		{"issued to another, by another issuer", issuedBy("https://idp.example.org", "other", now+3600), "jti-1", 200, resultRevoked},
		{"issued, and over", issuedTo("app-1", now-120), "jti-1", 200, resultNothing},
		{"new", &fakeLedger{}, "jti-1", 200, resultRevoked},
		{"known as its own", knownFrom("app-1", now+60), "jti-1", 200, resultRepeated},
		{"known as its application's", knownFrom("same", now+60), "jti-1", 200, resultRepeated},
		{"known, nobody knows whose", knownFrom("", now+60), "jti-1", 200, resultRepeated},
		{"known as another's", knownFrom("other", now+60), "jti-1", 400, resultForeign},
		{"known and over", knownFrom("app-1", now-120), "jti-1", 200, resultNothing},
		{"cannot be a jti", &fakeLedger{}, strings.Repeat("j", 256), 200, resultNothing},
		{"storage away", &fakeLedger{err: ledger.ErrUnavailable}, "jti-1", 503, resultUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			v := &fakeVerifier{}
			w, s := revoke(t, client, v, tt.ledger, tt.tok)
			if w.Code != tt.status || s.metric(t, "rescind_revoke_total", tt.result) != 1 {
				t.Errorf("status %d, want %d and %s: %s", w.Code, tt.status, tt.result, w.Body)
			}
			if v.calls != 0 {
				t.Error("a jti was verified as a JWT")
			}
			switch tt.result {
			case resultRevoked:
				r := tt.ledger.requests[0]
				if r.Target != target || r.Exp < now+3600 || r.Exp > time.Now().Unix()+3601+ledger.MaxStampAhead || r.Action != "revoke_by_jti" || r.ClientID != "app-1" {
					t.Errorf("revoked %+v", r)
				}
			case resultRepeated:
				if r := tt.ledger.repeats[0]; r.Exp != now+60 {
					t.Errorf("the end became %d, want %d as before", r.Exp, now+60)
				}
			case resultForeign:
				if len(tt.ledger.audits) != 1 {
					t.Errorf("audit %+v", tt.ledger.audits)
				}
			}
		})
	}
	t.Run("never for what is meant as a JWT", func(t *testing.T) {
		t.Parallel()
		l := &fakeLedger{}
		for _, tok := range []string{"a.b.c", "eyJhbGciOiJub25lIn0.e30", ".."} {
			if w, _ := revoke(t, client, &fakeVerifier{err: token.ErrMalformed}, l, tok); w.Code != 200 || len(l.requests) != 0 {
				t.Errorf("%s: status %d, revoked %+v", tok, w.Code, l.requests)
			}
		}
	})
}

func TestRevokeOpaque(t *testing.T) {
	t.Parallel()
	client := appOne()
	client.RevokeOpaque = true
	l := &fakeLedger{}
	const opaque = "gho_16C7e42F292c6912E7710c838347Ae178B4a"
	if w, _ := revoke(t, client, &fakeVerifier{}, l, opaque); w.Code != 200 {
		t.Fatalf("status %d", w.Code)
	}
	r := l.requests[0]
	if r.Target != revocation.DigestTarget(testIssuer, opaque) || r.Action != "revoke_opaque" || strings.Contains(fmt.Sprint(r), opaque) {
		t.Errorf("revoked %+v", r)
	}
}

func TestUnverifiedIsLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := appOne()
		client.RevokeByJTI = true
		s := newStand(t, Config{UnverifiedPerSecond: 5}, Deps{Verifier: &fakeVerifier{token: live()}, Clients: &fakeClients{client: client}})
		for i := range 5 {
			if w := s.post(fmt.Sprint("token=j", i)); w.Code != 200 {
				t.Fatalf("status %d", w.Code)
			}
		}
		if w := s.post("token=j"); w.Code != 429 || w.Header().Get("Retry-After") != "1" {
			t.Errorf("status %d, Retry-After %q, want 429 and 1", w.Code, w.Header().Get("Retry-After"))
		}
		if w := s.post("token=a.b.c"); w.Code != 200 {
			t.Errorf("a JWT got %d, want 200", w.Code)
		}
		time.Sleep(time.Second)
		if w := s.post("token=j"); w.Code != 200 {
			t.Errorf("status %d a second later, want 200", w.Code)
		}
	})
}

func TestQuota(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQuota()
		for i := range 2000 {
			q.take(fmt.Sprint(i), 1)
		}
		for range 3 {
			if !q.take("a", 3) {
				t.Error("refused within the limit")
			}
		}
		if q.take("a", 3) || !q.take("b", 3) {
			t.Error("the limit must hold, and for each client alone")
		}
		time.Sleep(quotaWindow)
		if !q.take("a", 3) {
			t.Error("refused in the next window")
		}
		if n := len(q.windows); n != 1 {
			t.Errorf("%d windows are kept, want 1", n)
		}
	})
}

func TestLedgerAway(t *testing.T) {
	t.Parallel()
	foreign := live()
	foreign.ClientID = "other"
	for _, tt := range []struct {
		name       string
		err        error
		token      *token.Token
		status     int
		retryAfter string
	}{
		{"busy", ledger.ErrBusy, live(), 503, "1"},
		{"away", fmt.Errorf("%w: commit", ledger.ErrUnavailable), live(), 503, "5"},
		{"foreign token that cannot be put on record", ledger.ErrUnavailable, foreign, 503, "5"},
		{"a bug", errors.New("boom"), live(), 500, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w, _ := revoke(t, appOne(), &fakeVerifier{token: tt.token}, &fakeLedger{err: tt.err}, "a.b.c")
			if w.Code != tt.status || w.Header().Get("Retry-After") != tt.retryAfter || strings.Contains(w.Body.String(), "commit") {
				t.Errorf("status %d, Retry-After %q: %s", w.Code, w.Header().Get("Retry-After"), w.Body)
			}
		})
	}
}

func TestRevokeTimesOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		w, s := revoke(t, appOne(), &fakeVerifier{token: live()}, &fakeLedger{wait: true}, "a.b.c")
		if took := time.Since(start); w.Code != 503 || took != 10*time.Second {
			t.Errorf("status %d after %s, want 503 after 10s", w.Code, took)
		}
		if !strings.Contains(s.log.String(), "took too long") {
			t.Errorf("the log does not say why: %s", s.log)
		}
	})
}

// A token of a caller that is not authenticated is not looked at.
func TestNoTokenBeforeAuthentication(t *testing.T) {
	t.Parallel()
	v := &fakeVerifier{token: live()}
	s := newStand(t, Config{}, Deps{Verifier: v, Clients: &fakeClients{err: &authn.OAuthError{Status: 401, Code: authn.InvalidClient}}})
	if w := s.post("token=a.b.c"); w.Code != 401 || v.calls != 0 {
		t.Errorf("status %d, %d verifications, want 401 and none", w.Code, v.calls)
	}
	if n := s.metric(t, "rescind_revoke_total", resultRefused); n != 1 {
		t.Errorf("%v refused, want 1", n)
	}
}
