package app_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/sts"
)

const apiAudience = "https://api.example.com"

// stsClient gets tokens of our own issuer, and asks about them.
type stsClient struct {
	s      *service
	client *http.Client
	auth   string
}

func (w *world) stsClient(s *service, id string) stsClient {
	w.t.Helper()
	w.client(w.iss, authn.Registration{
		ID: id, Secret: clientSecret, Scopes: []string{"read"}, DefaultScopes: []string{"read"}, Audience: []string{apiAudience},
	})
	return stsClient{s, newHTTPClient(w.t), basic(id, clientSecret)}
}

func (c stsClient) token() (string, error) {
	a, err := send(c.client, "POST", c.s.base+"/oauth2/token", form(c.auth), "grant_type=client_credentials")
	if err != nil {
		return "", err
	}
	var response struct {
		AccessToken string `json:"access_token"`
	}
	if a.status != 200 || json.Unmarshal([]byte(a.body), &response) != nil {
		return "", fmt.Errorf("token: %d %s", a.status, a.body)
	}
	return response.AccessToken, nil
}

func (c stsClient) active(token string) (bool, error) {
	a, err := send(c.client, "POST", c.s.base+"/oauth2/introspect", form(c.auth), "token="+token)
	if err != nil {
		return false, err
	}
	var response struct{ Active bool }
	if a.status != 200 || json.Unmarshal([]byte(a.body), &response) != nil {
		return false, fmt.Errorf("introspect: %d %s", a.status, a.body)
	}
	return response.Active, nil
}

func (c stsClient) mustToken() string {
	c.s.t.Helper()
	token, err := c.token()
	if err != nil {
		c.s.t.Fatal(err)
	}
	return token
}

func (c stsClient) mustBe(active bool, token string) {
	c.s.t.Helper()
	if got, err := c.active(token); err != nil || got != active {
		c.s.t.Errorf("active: %t, %v; want %t", got, err, active)
	}
}

// part of a JWT as JSON: 0 is the header, 1 the claims.
func part(token string, n int) map[string]any {
	var m map[string]any
	b, err := b64.DecodeString(strings.Split(token, ".")[n])
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		panic(err)
	}
	return m
}

// Whatever the metadata names is there, at the root and below a tenant.
func TestMetadataIsTrue(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve("RESCIND_SIGNING_ALGORITHM=ES256")
	w.tenant("pizza.example")
	client := newHTTPClient(t)
	for _, path := range []string{
		"/.well-known/oauth-authorization-server", "/.well-known/openid-configuration",
		"/.well-known/oauth-authorization-server/t/pizza.example", "/t/pizza.example/.well-known/openid-configuration",
	} {
		a, err := send(client, "GET", s.base+path, nil, "")
		var metadata map[string]any
		if err != nil || a.status != 200 || json.Unmarshal([]byte(a.body), &metadata) != nil {
			t.Fatalf("%s: %+v, %v", path, a, err)
		}
		called := 0
		for name, value := range metadata {
			at, ok := value.(string)
			if !ok || name == "issuer" || name == "service_documentation" {
				continue
			}
			at, ok = strings.CutPrefix(at, ourISS)
			if !ok {
				t.Errorf("%s: %s is %v, not below the issuer", path, name, value)
			}
			method, want := "POST", http.StatusUnauthorized
			if name == "jwks_uri" {
				method, want = "GET", http.StatusOK
			}
			if a, err := send(client, method, s.base+at, form(""), ""); err != nil || a.status != want {
				t.Errorf("%s: %s %s: %d, %v; want %d", path, method, at, a.status, err, want)
			}
			called++
		}
		if called != 4 {
			t.Errorf("%s names %d endpoints, want 4", path, called)
		}
	}
}

// keys are the tools that a command has.
func (w *world) keys() *app.KeyTools {
	w.t.Helper()
	k, err := app.OpenKeys(w.t.Context(), w.config(), slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(k.Close)
	return k
}

// Keys are rotated, retired and withdrawn while two processes issue tokens. Nobody is refused
// who should not be, and nothing is accepted that is dead.
func TestKeyRotationUnderLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const es256 = "RESCIND_SIGNING_ALGORITHM=ES256"
	services := []*service{w.serve(es256), w.serve(es256)}
	clients := []stsClient{w.stsClient(services[0], "load")}
	clients = append(clients, stsClient{services[1], newHTTPClient(t), clients[0].auth})
	keys := w.keys()

	// Each token that was handed out, and whether withdrawing had returned before it was asked for.
	type issued struct {
		token string
		after bool
	}
	var mu sync.Mutex
	var all []issued
	signed := make(map[string]int) // tokens by kid
	var withdrawn, stop atomic.Bool
	var load sync.WaitGroup
	for i := range 4 {
		c := clients[i%2]
		load.Go(func() {
			for !stop.Load() {
				after := withdrawn.Load()
				token, err := c.token()
				if err != nil {
					t.Error(err)
					return
				}
				kid := part(token, 0)["kid"].(string)
				mu.Lock()
				all = append(all, issued{token, after})
				signed[kid]++
				mu.Unlock()
				// Only withdrawing its key kills a token; else it is good wherever it is shown.
				if active, err := clients[(i+1)%2].active(token); err != nil || !active && !revoking(w, kid) {
					t.Errorf("a new token: active %t, %v", active, err)
				}
			}
		})
	}
	defer load.Wait()
	defer stop.Store(true)
	count := func(kid string) int {
		mu.Lock()
		defer mu.Unlock()
		return signed[kid]
	}

	listed, err := keys.List(t.Context(), "")
	if err != nil || len(listed) != 1 || listed[0].State != sts.KeyActive {
		t.Fatalf("%+v, %v", listed, err)
	}
	first := listed[0].KID
	await(t, "tokens of the first key", func() bool { return count(first) > 20 })

	changed, err := keys.Rotate(t.Context(), sts.Rotation{})
	if err != nil || changed[0].State != sts.KeyNext {
		t.Fatalf("%+v, %v", changed, err)
	}
	second := changed[0].KID
	if !strings.Contains(services[1].jwks(), second) {
		await(t, "the next key in the key set", func() bool { return strings.Contains(services[1].jwks(), second) })
	}
	if n := count(second); n > 0 {
		t.Errorf("%d tokens of a key before its time", n)
	}
	// Ten minutes pass.
	w.owner(`UPDATE rescind.signing_keys SET use_from = use_from - interval '11 min', retired_at = retired_at - interval '11 min'`)
	await(t, "tokens of the second key", func() bool { return count(second) > 20 })
	for _, s := range services {
		if !strings.Contains(s.jwks(), first) {
			t.Error("the key set lacks a key whose tokens live")
		}
	}

	changed, err = keys.Rotate(t.Context(), sts.Rotation{Compromised: second, Reason: "laptop stolen"})
	if err != nil || changed[0].State != sts.KeyActive {
		t.Fatalf("%+v, %v", changed, err)
	}
	withdrawn.Store(true)
	third := changed[0].KID
	await(t, "tokens of the third key", func() bool { return count(third) > 20 })
	stop.Store(true)
	load.Wait()
	for _, i := range all {
		kid := part(i.token, 0)["kid"].(string)
		if i.after && kid == second {
			t.Error("a token was signed with a withdrawn key")
		}
	}
	// A sample of each key's, at both processes, which know of the withdrawal once they issue.
	for _, c := range clients {
		c.mustToken()
		for kid, want := range map[string]bool{first: true, second: false, third: true} {
			n := 0
			for _, i := range all {
				if part(i.token, 0)["kid"] == kid && n < 10 {
					n++
					c.mustBe(want, i.token)
				}
			}
		}
		if strings.Contains(c.s.jwks(), second) {
			await(t, "the key set without the withdrawn key", func() bool { return !strings.Contains(c.s.jwks(), second) })
		}
	}
}

// revoking reports whether a key revocation of kid is in the log.
func revoking(w *world, kid string) bool {
	var is bool
	err := w.pool().QueryRow(w.t.Context(), `SELECT EXISTS (SELECT FROM rescind.revocations WHERE kind = 'key' AND ident = $1)`, kid).Scan(&is)
	return err == nil && is
}

func (s *service) jwks() string {
	s.t.Helper()
	a, err := send(http.DefaultClient, "GET", s.base+"/oauth2/jwks", nil, "")
	if err != nil || a.status != 200 {
		s.t.Fatalf("jwks: %+v, %v", a, err)
	}
	return a.body
}

// A revocation of a client reaches those who know only single tokens too: by the jti of each
// token that was remembered, on RabbitMQ, in etcd and in WSO2's list.
func TestBulkRevocationTokenByToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve("RESCIND_REMEMBER_TOKENS=1", "RESCIND_SIGNING_ALGORITHM=ES256")
	client, other := w.stsClient(s, "bulk"), w.stsClient(s, "other")
	admin, gateway := w.person(s, rest.Admin), w.person(s, rest.Gateway)
	events := w.consume(w.amqpURL, "amq.topic", "tokenRevocation")
	etcd := w.etcdClient()
	var old []string
	for range 3 {
		old = append(old, client.mustToken())
	}
	untouched := other.mustToken()
	var effect struct {
		LiveTokens *struct{ Count int } `json:"live_tokens"`
	}
	const order = `{"kind":"client","client_id":"bulk","reason":"lost"`
	a := admin.must(200, "POST", "/v1/revocations", order+`,"dry_run":true}`)
	if err := json.Unmarshal([]byte(a.body), &effect); err != nil || effect.LiveTokens == nil || effect.LiveTokens.Count != 3 {
		t.Errorf("dry run: %v: %s", err, a.body)
	}
	client.mustBe(true, old[0])
	admin.must(202, "POST", "/v1/revocations", order+`}`)
	young := client.mustToken() // right after it
	for _, token := range old {
		client.mustBe(false, token)
	}
	client.mustBe(true, young)
	other.mustBe(true, untouched)

	var want []string
	for _, token := range old {
		want = append(want, part(token, 1)["jti"].(string))
	}
	spared := []string{part(young, 1)["jti"].(string), part(untouched, 1)["jti"].(string)}
	await(t, "a message for each token and one for all", func() bool {
		told, bulk := told(t, events)
		for _, jti := range spared {
			if told[jti] {
				t.Fatal("a live token is told as revoked")
			}
		}
		return hasAll(told, want) && bulk["bulk"]
	})
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), append(want, "bulk")) })
	list := gateway.must(200, "GET", "/internal/data/v1/revokedjwt", "").body
	if slices.ContainsFunc(want, func(jti string) bool { return !strings.Contains(list, jti) }) || strings.Contains(list, spared[0]) {
		t.Errorf("WSO2's list: %s", list)
	}
}

// told are the tokens, and the consumer keys, that WSO2's gateways were told of.
func told(t *testing.T, c *consumer) (tokens, clients map[string]bool) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	tokens, clients = make(map[string]bool), make(map[string]bool)
	for _, m := range c.messages {
		var message struct {
			Event struct {
				PayloadData struct {
					Type         string `json:"type"`
					RevokedToken string `json:"revokedToken"`
				} `json:"payloadData"`
			} `json:"event"`
		}
		if err := json.Unmarshal(m.Body, &message); err != nil {
			t.Fatalf("%v: %s", err, m.Body)
		}
		switch data := message.Event.PayloadData; data.Type {
		case "JWT":
			tokens[data.RevokedToken] = true
		case "consumer_app_revocation_event":
			var inner map[string]any
			b, err := base64.StdEncoding.DecodeString(data.RevokedToken)
			if err == nil {
				err = json.Unmarshal(b, &inner)
			}
			if _, isText := inner["revocationTime"].(string); err != nil || !isText {
				t.Fatalf("%v: %s", err, b)
			}
			clients[inner["consumer_key"].(string)] = true
		}
	}
	return tokens, clients
}

// The old way in for clients that name the token endpoint, when it is allowed.
func TestLegacyAssertionAudience(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve("RESCIND_LEGACY_ASSERTION_AUDIENCE=1", "RESCIND_SIGNING_ALGORITHM=ES256")
	w.client(ourISS, jwtClient(t))
	for _, aud := range []string{ourISS, ourISS + "/oauth2/token"} {
		body := url.Values{
			"grant_type": {"client_credentials"}, "client_assertion": {assertion(map[string]any{"aud": aud})},
			"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
		}
		if a, err := send(newHTTPClient(t), "POST", s.base+"/oauth2/token", form(""), body.Encode()); err != nil || a.status != 200 {
			t.Errorf("aud %s: %+v, %v", aud, a, err)
		}
	}
}
