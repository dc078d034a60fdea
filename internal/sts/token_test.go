package sts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/claims"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// payload is what a token that was handed out has, by an implementation that is not ours.
func payload(t testing.TB, a answer) (header jose.Header, claims map[string]any) {
	t.Helper()
	var response tokenResponse
	a.decode(t, &response)
	jws, err := jose.ParseSignedCompact(response.AccessToken, []jose.SignatureAlgorithm{jose.RS256, jose.ES256})
	if err != nil {
		t.Fatalf("%v of %+v", err, a)
	}
	if err := json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &claims); err != nil {
		t.Fatal(err)
	}
	return jws.Signatures[0].Protected, claims
}

func TestGrantsAndTypes(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.New(t), Config{})
	forms := asking(iss, "c")
	for _, tt := range []struct {
		grants []string
		typ    string
		want   string // typ, empty if refused
	}{
		{[]string{clientCredentials}, "at+jwt", "at+jwt"},
		{[]string{"x", clientCredentials}, "JWT", "JWT"},
		{[]string{clientCredentials}, "", "at+jwt"},
		{nil, "at+jwt", ""},
		{[]string{"refresh_token"}, "at+jwt", ""},
	} {
		forms.client.GrantTypes, forms.client.TokenTyp = tt.grants, tt.typ
		s.forms = forms
		got := post(t, s, tokenPath)
		if tt.want == "" {
			if got.status != 400 || !strings.Contains(got.body, `"unauthorized_client"`) {
				t.Errorf("C053: of grant types %q the answer is %+v, want unauthorized_client", tt.grants, got)
			}
			continue
		}
		if header, _ := payload(t, got); header.ExtraHeaders[jose.HeaderType] != tt.want || header.KeyID == "" {
			t.Errorf("header is %+v, want typ %s", header, tt.want)
		}
	}
}

// manyAPIs adds n subscriptions to the first application of state, whose tokens are self-contained.
func manyAPIs(t testing.TB, state *fakeState, n int) {
	t.Helper()
	application := *state.content[1].(*catalog.Application)
	application.SelfContained, application.Policy = true, "Gold"
	state.content[1] = &application
	for i := range n {
		api := &catalog.API{Meta: meta(i+1, "api"), Name: fmt.Sprintf("API%d", i), Version: "1.0", Context: fmt.Sprintf("/api%d/1.0", i), Provider: "admin"}
		state.content = append(state.content, api, &catalog.Subscription{
			Meta: meta(i+1, "subscription"), Application: catalog.Ref{ID: application.ID, UUID: application.UUID}, API: catalog.Ref{ID: api.ID, UUID: api.UUID},
			Policy: "Gold", State: catalog.Unblocked,
		})
	}
	state.content = append(state.content, &catalog.Policy{Meta: meta(1, "policy"), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount"})
	state.load(t)
}

func TestSelfContained(t *testing.T) {
	t.Parallel()
	state := stateOf(t, iss, "c", "plain")
	manyAPIs(t, state, 3)
	s := start(t, pgtest.New(t), Config{State: state})
	got := post(t, s, tokenPath)
	var response tokenResponse
	got.decode(t, &response)
	if _, err := verify(t, s, response.AccessToken); err != nil { // it refuses members that are there twice
		t.Fatal(err)
	}
	_, minted := payload(t, got)
	want := map[string]any{
		"iss": iss, "sub": "c", "client_id": "c", "azp": "c", "entity_id": "c", "aud": iss, "aut": "APPLICATION",
		"iat": minted["iat"], "exp": minted["exp"], "jti": minted["jti"],
	}
	state.replica.View(func(v *replica.View) {
		carried := claims.Of(v, v.ApplicationByID(1), catalog.Production, "c")
		if len(carried.SubscribedAPIs) != 3 || carried.ConsumerKey != "c" {
			t.Fatalf("claims are %+v", carried)
		}
		body, err := json.Marshal(carried)
		if err != nil {
			t.Fatal(err)
		}
		answer{body: string(body)}.decode(t, &want)
	})
	if diff := cmp.Diff(want, minted); diff != "" {
		t.Errorf("claims (-want +got):\n%s", diff)
	}
	s.forms = asking(iss, "plain")
	if _, minted := payload(t, post(t, s, tokenPath)); len(minted) != 10 || minted["application"] != nil || minted["consumerKey"] != nil {
		t.Errorf("claims of another application are %v", minted)
	}
}

// Microgateway 3.0 takes a token without subscriptions for one that opens every API.
func TestSelfContainedWithoutSubscriptions(t *testing.T) {
	t.Parallel()
	state := stateOf(t, iss, "c")
	manyAPIs(t, state, 0)
	memory := &fakeMemory{}
	s := start(t, pgtest.New(t), Config{State: state, Memory: memory})
	const want = `{"error":"unauthorized_client","error_description":"The application has no subscription that this key may use."}` + "\n"
	if got := post(t, s, tokenPath); got.status != 400 || got.body != want {
		t.Errorf("without subscriptions the answer is %+v, want 400 %s", got, want)
	}
	manyAPIs(t, state, 1)
	subscription := *state.content[len(state.content)-2].(*catalog.Subscription)
	subscription.State = catalog.ProdOnlyBlocked
	state.content[len(state.content)-2] = &subscription
	state.load(t)
	if got := post(t, s, tokenPath); got.status != 400 || got.body != want {
		t.Errorf("with one that is not for this key the answer is %+v, want 400 %s", got, want)
	}
	if len(memory.remembered) != 0 {
		t.Errorf("remembered are %+v", memory.remembered)
	}
}

func TestTokensThatAreTooLarge(t *testing.T) {
	t.Parallel()
	state := stateOf(t, iss, "c", "plain")
	manyAPIs(t, state, 300)
	s := start(t, pgtest.New(t), Config{State: state})
	got := post(t, s, tokenPath)
	if want := `{"error":"invalid_request","error_description":"The application has too many subscriptions for a self-contained token."}` + "\n"; got.status != 400 || got.body != want {
		t.Errorf("answer is %+v, want 400 %s", got, want)
	}
	forms := asking(iss, "plain")
	for i := range 1000 {
		forms.client.DefaultScopes = append(forms.client.DefaultScopes, fmt.Sprintf("scope-%08d", i))
	}
	s.forms = forms
	if got := post(t, s, tokenPath); got.status != 400 || !strings.Contains(got.body, "fewer scopes") {
		t.Errorf("answer is %+v, want 400", got)
	}

	// The largest that is issued is one that verifiers read.
	ask := func(scope int) (got answer, response tokenResponse) {
		forms.client.DefaultScopes = []string{strings.Repeat("x", scope)}
		s.forms = forms
		if got = post(t, s, tokenPath); got.status == 200 {
			got.decode(t, &response)
		}
		return got, response
	}
	_, small := ask(1)
	largest := 0
	for n := (maxTokenBytes-len(small.AccessToken))*3/4 - 4; ; n++ {
		got, response := ask(n)
		if got.status != 200 {
			break
		}
		if _, err := verify(t, s, response.AccessToken); err != nil {
			t.Fatalf("a token of %d bytes is issued: %v", len(response.AccessToken), err)
		}
		largest = len(response.AccessToken)
	}
	if largest < maxTokenBytes-4 {
		t.Errorf("the largest token has %d bytes, want up to %d", largest, maxTokenBytes)
	}
}

// fakeMemory remembers what it is told, after it has done what a test wants.
type fakeMemory struct {
	remembered []ledger.Issued
	before     func(ledger.Issued)
	err        error
}

func (m *fakeMemory) Remember(_ context.Context, t ledger.Issued) error {
	if m.before != nil {
		m.before(t)
	}
	m.remembered = append(m.remembered, t)
	return m.err
}

// A revocation that is committed before a token is remembered does not reach it by its jti, so
// it must not reach it at all.
func TestRememberedTokens(t *testing.T) {
	t.Parallel()
	now := time.Now().Truncate(time.Second)
	s := start(t, pgtest.New(t), Config{})
	s.now = func() time.Time { return now }
	client := func(ahead int64) replica.Record {
		return replica.Record{
			Target: revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "c"}, Tenant: revocation.SuperTenant,
			Exp: now.Unix() + 3600, NotAfter: now.Unix() + ahead,
		}
	}
	for name, tt := range map[string]struct {
		// revoked is what others have committed by the time when token n is remembered.
		revoked func(n int, token ledger.Issued) []replica.Record
		err     error
		tokens  int   // that are remembered
		iat     int64 // of the last one, ahead of now
		wait    string
	}{
		"nothing": {nil, nil, 1, 0, ""},
		"its client": {func(int, ledger.Issued) []replica.Record {
			return []replica.Record{client(2)}
		}, nil, 2, 3, ""},
		"twice": {func(n int, _ ledger.Issued) []replica.Record {
			return []replica.Record{client(int64(min(n, 1)*10 + 2))}
		}, nil, 3, 13, ""},
		"itself": {func(n int, token ledger.Issued) []replica.Record {
			if n > 0 {
				return nil
			}
			return []replica.Record{{
				Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: token.JTI}, Tenant: revocation.SuperTenant, Exp: token.Exp,
			}}
		}, nil, 2, 0, ""},
		"again and again": {func(n int, _ ledger.Issued) []replica.Record {
			return []replica.Record{client(int64(n+1) * 10)}
		}, nil, maxTries, 0, "5"},
		"not remembered":    {nil, ledger.ErrUnavailable, 1, 0, "5"},
		"nobody has time":   {nil, ledger.ErrBusy, 1, 0, "1"},
		"the caller leaves": {nil, context.Canceled, 1, 0, "5"},
	} {
		state, memory := stateOf(t, iss, "c"), &fakeMemory{err: tt.err}
		memory.before = func(token ledger.Issued) {
			if got := state.fresh.Load(); got != int64(2*len(memory.remembered)+1) {
				t.Errorf("%s: token %d is remembered after %d looks at the state", name, len(memory.remembered), got)
			}
			if tt.revoked != nil {
				state.revoked = append(state.revoked, tt.revoked(len(memory.remembered), token)...)
				state.load(t)
			}
		}
		s.cfg.State, s.cfg.Memory = state, memory
		got := post(t, s, tokenPath)
		jtis := make(map[string]bool)
		for _, token := range memory.remembered {
			jtis[token.JTI] = true
		}
		if len(memory.remembered) != tt.tokens || len(jtis) != tt.tokens {
			t.Errorf("%s: remembered are %+v, want %d", name, memory.remembered, tt.tokens)
		}
		if tt.wait != "" {
			if got.status != 503 || got.header.Get("Retry-After") != tt.wait {
				t.Errorf("%s: answer is %+v, want 503 and to wait %s s", name, got, tt.wait)
			}
			continue
		}
		_, minted := payload(t, got)
		want := ledger.Issued{JTI: minted["jti"].(string), Iss: iss, ClientID: "c", Subject: "c", Exp: int64(minted["exp"].(float64))}
		if diff := cmp.Diff(want, memory.remembered[tt.tokens-1]); diff != "" {
			t.Errorf("%s: remembered is not what was handed out:\n%s", name, diff)
		}
		if iat := int64(minted["iat"].(float64)) - now.Unix(); iat != tt.iat {
			t.Errorf("%s: iat is %d s ahead, want %d", name, iat, tt.iat)
		}
	}
}

// What is refused for want of a place, of a key or of room leaves nothing that is remembered.
func TestRefusedTokensAreNotRemembered(t *testing.T) {
	t.Parallel()
	memory := &fakeMemory{}
	s := start(t, pgtest.New(t), Config{Memory: memory, MaxQueue: 1})
	for name, tt := range map[string]struct {
		refuse, end func()
		status      int
		wait        string
	}{
		"no place": {func() { s.queue <- struct{}{} }, func() { <-s.queue }, 503, "1"},
		"no key": {func() {
			old := *s.own().ring.Load()
			old.at = time.Now().Add(-maxRingAge - time.Second)
			s.own().ring.Store(&old)
		}, func() { signing(t, s) }, 503, "5"},
		"no room": {func() {
			forms := asking(iss, "c")
			forms.client.DefaultScopes = []string{strings.Repeat("x", maxTokenBytes)}
			s.forms = forms
		}, func() { s.forms = asking(iss, "c") }, 400, ""},
	} {
		tt.refuse()
		if got := post(t, s, tokenPath); got.status != tt.status || got.header.Get("Retry-After") != tt.wait || len(memory.remembered) != 0 {
			t.Errorf("%s: answer is %+v, and remembered are %+v, want %d", name, got, memory.remembered, tt.status)
		}
		tt.end()
		if got := post(t, s, tokenPath); got.status != 200 || len(memory.remembered) != 1 {
			t.Errorf("%s: afterwards the answer is %+v, and remembered are %+v", name, got, memory.remembered)
		}
		memory.remembered = nil
	}
}

// A key that is revoked while a token is made is not the token's.
func TestKeyRevokedWhileATokenIsMade(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	state, memory := stateOf(t, iss, "c"), &fakeMemory{}
	s := start(t, pool, Config{State: state, Memory: memory})
	first := signing(t, s)
	memory.before = func(ledger.Issued) {
		if len(memory.remembered) > 0 {
			return
		}
		revokeKey(t, pool, iss, first)
		state.revoked = append(state.revoked, replica.Record{
			Target: revocation.Target{Kind: revocation.KindKey, Iss: iss, ID: first}, Tenant: revocation.SuperTenant, Exp: time.Now().Add(keyRevocation).Unix(),
		})
		state.load(t)
	}
	if header, _ := payload(t, post(t, s, tokenPath)); header.KeyID == first || len(memory.remembered) != 2 {
		t.Errorf("the token is of key %s after %d were remembered, want a new key and 2", header.KeyID, len(memory.remembered))
	}
}

// No token is handed out under a key that is known to be revoked.
func TestRevokedSigningKey(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	state := stateOf(t, iss, "c")
	s := start(t, pool, Config{State: state})
	first := signing(t, s)
	revoke := func(kid string) {
		state.revoked = append(state.revoked, replica.Record{
			Target: revocation.Target{Kind: revocation.KindKey, Iss: iss, ID: kid}, Tenant: revocation.SuperTenant, Exp: time.Now().Add(keyRevocation).Unix(),
		})
		state.load(t)
	}
	// Another process makes a key, which this one has not read when it learns of the revocation.
	changed, err := newKeys(t, pool, masterKey(t, "a")).Rotate(t.Context(), operator, Rotation{Iss: iss, Compromised: first})
	if err != nil {
		t.Fatal(err)
	}
	revoke(first)
	if header, _ := payload(t, post(t, s, tokenPath)); header.KeyID != changed[0].KID {
		t.Errorf("the key is %s, want %s", header.KeyID, changed[0].KID)
	}

	// Revoked by itself: another is made.
	revokeKey(t, pool, iss, changed[0].KID)
	revoke(changed[0].KID)
	header, _ := payload(t, post(t, s, tokenPath))
	if header.KeyID == changed[0].KID {
		t.Error("the key is one that is revoked")
	}

	// The replica alone says that it is.
	revoke(header.KeyID)
	if got := post(t, s, tokenPath); got.status != 503 || got.header.Get("Retry-After") != "5" {
		t.Errorf("with all keys revoked the answer is %+v, want 503", got)
	}
	_, err = s.signer(t.Context(), s.own())
	if want := header.KeyID + " is revoked: run rescind keys rotate --iss " + iss; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("for the log: %v, want %q in it", err, want)
	}

	// A process that cannot read the keys for long does not go on with those it has.
	r := *s.own().ring.Load()
	r.at = time.Now().Add(-maxRingAge - time.Second)
	s.own().ring.Store(&r)
	if _, err := s.signer(t.Context(), s.own()); !errors.Is(err, errOldKeys) {
		t.Errorf("with old keys: %v, want %v", err, errOldKeys)
	}
}
