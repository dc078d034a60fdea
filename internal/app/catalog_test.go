package app_test

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/wso2test"
)

// person calls a service with an account.
type person struct {
	t      testing.TB
	client *http.Client
	base   string
	auth   string
}

const accountPassword = "a-password"

// person makes an account of role and is it.
func (w *world) person(s *service, role string, more ...func(*authn.Account)) *person {
	w.t.Helper()
	a := authn.Account{Username: role, Role: role, Tenant: revocation.SuperTenant}
	for _, change := range more {
		change(&a)
	}
	w.account(a, accountPassword)
	raw := base64.StdEncoding.EncodeToString([]byte(a.Username + ":" + accountPassword))
	return &person{w.t, newHTTPClient(w.t), s.base, "Basic " + raw}
}

func (p *person) do(method, path, body string, header ...string) answer {
	p.t.Helper()
	h := http.Header{}
	if p.auth != "" {
		h.Set("Authorization", p.auth)
	}
	if body != "" {
		h.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	a, err := send(p.client, method, p.base+path, h, body)
	if err != nil {
		p.t.Fatal(err)
	}
	return a
}

func (p *person) must(status int, method, path, body string, header ...string) answer {
	p.t.Helper()
	a := p.do(method, path, body, header...)
	if a.status != status {
		p.t.Fatalf("%s %s: %d, want %d: %s", method, path, a.status, status, a.body)
	}
	return a
}

// made creates an entity and returns it with its path.
func (p *person) made(collection, body string) (entity map[string]any, path string) {
	p.t.Helper()
	a := p.must(http.StatusCreated, http.MethodPost, collection, body)
	if err := json.Unmarshal([]byte(a.body), &entity); err != nil {
		p.t.Fatal(err)
	}
	uuid, _ := entity["uuid"].(string)
	return entity, collection + "/" + uuid
}

// change reads what is at path, changes it and puts it back.
func (p *person) change(path string, members map[string]any) {
	p.t.Helper()
	a := p.must(http.StatusOK, http.MethodGet, path, "")
	var entity map[string]any
	if err := json.Unmarshal([]byte(a.body), &entity); err != nil {
		p.t.Fatal(err)
	}
	for _, made := range []string{"timestamp", "tenant", "id", "uuid", "blocked", "application_blocked", "resident"} {
		delete(entity, made)
	}
	maps.Copy(entity, members)
	body, err := json.Marshal(entity)
	if err != nil {
		p.t.Fatal(err)
	}
	p.must(http.StatusOK, http.MethodPut, path, string(body), "If-Match", a.header.Get("Etag"))
}

func (p *person) remove(path, query string) {
	p.t.Helper()
	a := p.must(http.StatusOK, http.MethodGet, path, "")
	p.must(http.StatusNoContent, http.MethodDelete, path+query, "", "If-Match", a.header.Get("Etag"))
}

// An application that an admin makes is seen everywhere, with the same facts.
func TestChangeReachesEverybody(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	admin, gateway := w.person(s, rest.Admin), w.person(s, rest.Gateway)
	own := w.consume(w.amqpURL, "rescind.events", "application.#")
	gatewayAMQP := wso2test.NewChoreoConnect(t, w.gatewayAMQP)
	stream := gateway.stream(t, "/v1/events", "")
	created, _ := admin.made("/v1/applications", `{"name":"Tea","owner":"alice","attributes":{"plan":"green"}}`)
	uuid := created["uuid"].(string)

	await(t, "the event on rescind.events", func() bool { return own.seen()["Tea"] })
	event := own.events[0]
	change, err := catalog.ParseChange(event)
	if err != nil {
		t.Fatal(err)
	}
	var fromEvent map[string]any
	if err := json.Unmarshal(event.Data, &fromEvent); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(created, fromEvent); diff != "" || change.Verb != catalog.Created {
		t.Errorf("event %s (-answer +event):\n%s", event.Type, diff)
	}
	frame := stream.next(func(f frame) bool { return f.event == "application.created" })
	if frame.id != event.String() {
		t.Errorf("the stream's event has id %s, want %s", frame.id, event)
	}
	streamed, err := revocation.ParseEvent([]byte(frame.data))
	if err != nil {
		t.Fatal(err)
	}
	streamed.Traceparent, event.Traceparent = "", "" // each publisher continues the trace by itself
	if diff := cmp.Diff(event, streamed); diff != "" {
		t.Errorf("the stream's event differs:\n%s", diff)
	}
	gatewayAMQP.Await("the application", func(st wso2test.State) bool { return st.Applications[uuid].Name == "Tea" })
	listed := wso2test.NewState()
	if err := listed.Load("applications", []byte(gateway.must(200, "GET", "/internal/data/v1/applications", "").body)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(listed.Applications[uuid], gatewayAMQP.State().Applications[uuid]); diff != "" {
		t.Errorf("WSO2's list and message differ (-list +message):\n%s", diff)
	}
	if got := listed.Applications[uuid]; got.ID != int32(created["id"].(float64)) || got.SubName != "alice" {
		t.Errorf("WSO2's list has %+v", got)
	}
}

// frame is a server-sent event.
type frame struct{ id, event, data string }

type stream struct {
	t     testing.TB
	lines *bufio.Scanner
}

// stream follows path from the event after lastID, or from now.
func (p *person) stream(t testing.TB, path, lastID string) *stream {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.base+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", p.auth)
	req.Header.Set("Accept", "text/event-stream")
	if lastID != "" {
		req.Header.Set("Last-Event-ID", lastID)
	}
	resp, err := p.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("GET %s: %d: %s", path, resp.StatusCode, b)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	return &stream{t, lines}
}

// next skips to a frame that is wanted.
func (s *stream) next(want func(frame) bool) frame {
	s.t.Helper()
	var f frame
	for s.lines.Scan() {
		name, value, _ := strings.Cut(s.lines.Text(), ": ")
		switch name {
		case "id":
			f.id = value
		case "event":
			f.event = value
		case "data":
			f.data = value
		case "":
			if want(f) {
				return f
			}
			f = frame{}
		}
	}
	s.t.Fatalf("the stream has ended: %v", s.lines.Err())
	return f
}

// An adapter of Choreo Connect that follows the events through a catalog's whole life
// ends with what one that starts now is told.
func TestChoreoConnectFollowsTheCatalog(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	admin, gateway := w.person(s, rest.Admin), w.person(s, rest.Gateway)
	load := func(into func(resource string, body []byte) error) {
		t.Helper()
		for _, resource := range []string{
			"subscriptions", "applications", "application-key-mappings", "application-policies", "subscription-policies", "keymanagers",
		} {
			if err := into(resource, []byte(gateway.must(200, "GET", "/internal/data/v1/"+resource, "").body)); err != nil {
				t.Fatal(err)
			}
		}
	}
	adapter := wso2test.NewChoreoConnect(t, w.gatewayAMQP)
	load(adapter.Load)
	level := func(what string) {
		t.Helper()
		fresh := wso2test.NewState()
		load(fresh.Load)
		var diff string
		adapter.Await(what, func(st wso2test.State) bool {
			st.RevokedTokens, st.Deployed = nil, nil
			fresh.RevokedTokens, fresh.Deployed = nil, nil
			diff = cmp.Diff(fresh, st)
			return diff == ""
		})
	}

	admin.must(201, "POST", "/v1/policies/subscription", `{"name":"Gold","quota":5000,"unit_time":1,"time_unit":"min","rate_limit_count":50,"rate_limit_time_unit":"sec","stop_on_quota_reach":true}`)
	_, silver := admin.made("/v1/policies/application", `{"name":"Silver","quota":100,"unit_time":1,"time_unit":"hour"}`)
	admin.made("/v1/key-managers", `{"name":"Elsewhere","iss":"https://elsewhere.example.com","jwks_uri":"https://elsewhere.example.com/jwks","max_token_lifetime":3600,"enabled":true}`)
	api, apiPath := admin.made("/v1/apis", `{"name":"Pizza","version":"1.0.0","context":"/pizza/1.0.0","provider":"admin","status":"PUBLISHED","gateway_labels":["Default"]}`)
	application, applicationPath := admin.made("/v1/applications", `{"name":"Shop","owner":"alice","policy":"Silver"}`)
	key := admin.must(201, "POST", applicationPath+"/keys", `{"key_type":"PRODUCTION"}`)
	admin.must(201, "POST", applicationPath+"/keys", `{"key_type":"SANDBOX","key_manager":"Elsewhere","consumer_key":"mapped-key","generate":false}`)
	_, subscriptionPath := admin.made("/v1/subscriptions", fmt.Sprintf(`{"application":{"uuid":%q},"api":{"uuid":%q},"policy":"Gold"}`, application["uuid"], api["uuid"]))
	level("what was created")

	admin.change(silver, map[string]any{"quota": 200})
	admin.change(applicationPath, map[string]any{"name": "Shop 2", "policy": "Unlimited"})
	admin.change(subscriptionPath, map[string]any{"state": "BLOCKED"})
	level("what was updated")
	admin.change(subscriptionPath, map[string]any{"state": "UNBLOCKED"})
	admin.must(200, "POST", applicationPath+"/block", "")
	level("the block")
	admin.must(200, "POST", applicationPath+"/unblock", "")
	level("the end of the block")

	adapter.Disconnect()
	adapter.Reconnect()
	_, second := admin.made("/v1/applications", `{"name":"Tea","owner":"bob"}`)
	level("what came after the reconnect")
	// Nobody tells an adapter what it missed: it starts again.
	adapter.Disconnect()
	_, third := admin.made("/v1/applications", `{"name":"Meanwhile","owner":"bob"}`)
	adapter = wso2test.NewChoreoConnect(t, w.gatewayAMQP)
	load(adapter.Load)
	level("what was missed")

	deleting := time.Now().Unix()
	admin.remove(subscriptionPath, "")
	admin.change(apiPath, map[string]any{"status": "RETIRED"})
	admin.remove(apiPath, "")
	admin.remove(applicationPath, "")
	admin.remove(second, "?revoke_tokens=false")
	admin.remove(third, "")
	admin.remove(silver, "")
	level("what was deleted")
	if troubles := adapter.Troubles(); len(troubles) > 0 {
		t.Errorf("the adapter could not take: %q", troubles)
	}
	var shown struct {
		ConsumerKey string `json:"consumer_key"`
	}
	if err := json.Unmarshal([]byte(key.body), &shown); err != nil || shown.ConsumerKey == "" {
		t.Fatalf("the key is %s", key.body)
	}
	var notAfter int64
	err := w.pool().QueryRow(t.Context(), `SELECT not_after FROM rescind.revocations WHERE kind = 'client' AND ident = $1`, shown.ConsumerKey).Scan(&notAfter)
	if err != nil || notAfter < deleting {
		t.Errorf("tokens of the deleted application that were issued up to %d are revoked, %v; want up to %d", notAfter, err, deleting)
	}
}

// items are the entities of a snapshot of everything, by kind and UUID, and its revocations.
type items map[string]map[string]any

func (p *person) snapshot() (revocation.Position, items) {
	p.t.Helper()
	a := p.must(200, http.MethodGet, "/v1/snapshots/all", "")
	var whole map[string]any
	if err := json.Unmarshal([]byte(a.body), &whole); err != nil {
		p.t.Fatal(err)
	}
	at := revocation.Position{Epoch: revocation.Epoch(whole["epoch"].(string)), Seq: revocation.Seq(whole["seq"].(float64))}
	found := make(items)
	for kind, list := range whole {
		entries, ok := list.([]any)
		if !ok {
			continue
		}
		found[kind] = make(map[string]any)
		for _, e := range entries {
			entry := e.(map[string]any)
			id, ok := entry["uuid"].(string)
			if !ok {
				id = fmt.Sprint(entry["kind"], entry["iss"], entry["jti"], entry["client_id"], entry["digest"])
			}
			found[kind][id] = e
		}
	}
	return at, found
}

// The state at seq N, read over HTTP, is what the events 1 to N lead to.
func TestSnapshotIsTheFoldOfTheEvents(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	w := newWorld(t)
	s := w.serve()
	admin, gateway := w.person(s, rest.Admin), w.person(s, rest.Gateway, func(a *authn.Account) { a.ExtraTenants = []string{"*"} })
	client := newHTTPClient(t)
	var applications, apis, subscriptions []string
	pick := func(list []string) string { return list[random.IntN(len(list))] }
	id := func(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }
	admin.must(201, "POST", "/v1/tenants", `{"tenant":{"domain":"a.example"}}`)
	start, _ := gateway.snapshot()
	for i := range 80 {
		switch n := random.IntN(10); {
		case n < 2 || len(applications) == 0:
			_, path := admin.made("/v1/applications", fmt.Sprintf(`{"name":"app %d","owner":"o","tenant":{"domain":%q}}`, i, []string{"carbon.super", "a.example"}[random.IntN(2)]))
			applications = append(applications, path)
		case n < 3 || len(apis) == 0:
			_, path := admin.made("/v1/apis", fmt.Sprintf(`{"name":"api","version":"%d","context":"/api/%d","provider":"p","gateway_labels":["A"]}`, i, i))
			apis = append(apis, path)
		case n < 5:
			a := admin.do("POST", "/v1/subscriptions", fmt.Sprintf(`{"application":{"uuid":%q},"api":{"uuid":%q}}`, id(pick(applications)), id(pick(apis))))
			if a.status == 201 {
				subscriptions = append(subscriptions, a.header.Get("Location"))
			}
		case n < 6 && len(subscriptions) > 0:
			admin.change(pick(subscriptions), map[string]any{"state": []string{"BLOCKED", "UNBLOCKED", "ON_HOLD"}[random.IntN(3)]})
		case n < 7:
			admin.must(200, "POST", pick(applications)+[]string{"/block", "/unblock"}[random.IntN(2)], "")
		case n < 8 && len(subscriptions) > 0:
			j := random.IntN(len(subscriptions))
			admin.remove(subscriptions[j], "")
			subscriptions = slices.Delete(subscriptions, j, j+1)
		default:
			s.mustRevoke(client, accessToken(fmt.Sprintf("fold-%d", i)))
		}
	}
	var at revocation.Position
	var want items
	last := revocation.Seq(w.allEvents())
	await(t, "a snapshot with the whole history", func() bool { // one may be 2 s old
		at, want = gateway.snapshot()
		return at.Seq >= last
	})

	folded := replica.NewState(replica.StateConfig{Records: true})
	if err := folded.Load(revocation.Position{Epoch: at.Epoch}, func(*replica.Loader) error { return nil }); err != nil {
		t.Fatal(err)
	}
	for folded.At().Seq < at.Seq {
		a := gateway.must(200, "GET", fmt.Sprintf("/v1/events?after=%s&limit=37", folded.At()), "")
		var page struct {
			Through revocation.Seq
			Events  []json.RawMessage
		}
		if err := json.Unmarshal([]byte(a.body), &page); err != nil {
			t.Fatal(err)
		}
		for _, raw := range page.Events {
			e, err := revocation.ParseEvent(raw)
			if err != nil {
				t.Fatal(err)
			}
			if e.Seq > at.Seq {
				break
			}
			if err := folded.Apply(e); err != nil {
				t.Fatalf("apply %s: %v", e.Position, err)
			}
		}
	}
	got := make(items)
	add := func(kind string, e catalog.Entity) {
		b, err := json.Marshal(e)
		var v any
		if err == nil {
			err = json.Unmarshal(b, &v)
		}
		if err != nil {
			t.Fatal(err)
		}
		if got[kind] == nil {
			got[kind] = make(map[string]any)
		}
		got[kind][e.Base().UUID] = v
	}
	folded.View(func(v *replica.View) {
		for _, e := range v.KeyManagers() {
			add("key_managers", e)
		}
		for _, e := range v.Policies() {
			add("policies", e)
		}
		for _, e := range v.APIs() {
			add("apis", e)
		}
		for _, e := range v.Applications() {
			add("applications", e)
		}
		for _, e := range v.KeyMappings() {
			add("key_mappings", e)
		}
		for _, e := range v.Subscriptions() {
			add("subscriptions", e)
		}
		if n := v.Revocations().Len(); n != len(want["revocations"]) {
			t.Errorf("%d revocations in the fold, %d in the snapshot", n, len(want["revocations"]))
		}
	})
	for kind := range want {
		if kind == "revocations" || kind == "tenants" { // carbon.super is there without an event
			continue
		}
		if diff := cmp.Diff(want[kind], got[kind]); diff != "" && len(want[kind])+len(got[kind]) > 0 {
			t.Errorf("%s at %s (-snapshot +fold):\n%s", kind, at, diff)
		}
	}
	if len(want["subscriptions"])+len(want["applications"]) == 0 || at.Seq <= start.Seq {
		t.Error("the history is empty")
	}
}

// routes are those that the running service has, by its own metrics.
func (s *service) routes(client *http.Client) map[string][]string {
	s.t.Helper()
	a, err := send(client, http.MethodGet, s.ops+"/metrics", nil, "")
	if err != nil {
		s.t.Fatal(err)
	}
	routes := make(map[string][]string)
	for line := range strings.Lines(a.body) {
		labels, ok := strings.CutPrefix(line, "rescind_http_requests_total{")
		if !ok {
			continue
		}
		var method, route string
		for label := range strings.SplitSeq(labels[:strings.LastIndex(labels, "} ")], ",") {
			name, value, _ := strings.Cut(label, "=")
			switch name {
			case "method":
				method = strings.Trim(value, `"`)
			case "route":
				route = strings.Trim(value, `"`)
			}
		}
		if !slices.Contains(routes[route], method) {
			routes[route] = append(routes[route], method)
		}
	}
	return routes
}

// Every route below /v1, /internal and /v2 asks who calls, and gives each role what is its own.
func TestEveryRouteAsksWhoCalls(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	admin := w.person(s, rest.Admin)
	admin.must(201, "POST", "/v1/tenants", `{"tenant":{"domain":"other.example"}}`)
	other := func(a *authn.Account) { a.Username, a.Tenant.Domain = "other-"+a.Role, "other.example" }
	people := map[string]*person{
		"nobody": {t, newHTTPClient(t), s.base, ""}, "gateway": w.person(s, rest.Gateway), "notifier": w.person(s, rest.Notifier),
		"auditor": w.person(s, rest.Auditor), "stranger": w.person(s, rest.TenantAdmin, other),
	}
	_, applicationPath := admin.made("/v1/applications", `{"name":"Mine","owner":"alice"}`)
	uuid := applicationPath[strings.LastIndexByte(applicationPath, '/')+1:]
	before := w.allEvents()
	tried := 0
	for route, methods := range s.routes(newHTTPClient(t)) {
		if !strings.HasPrefix(route, "/v1/") {
			continue
		}
		path := strings.NewReplacer("{kind}", "api", "{keyID}", uuid, "{id}", uuid, "/*", "/x").Replace(route)
		for _, method := range methods {
			tried++
			isRead := method == http.MethodGet || method == http.MethodHead
			reads := strings.HasPrefix(route, "/v1/snapshots") || strings.HasPrefix(route, "/v1/events") || strings.HasSuffix(route, "/claims")
			body := ""
			if !isRead {
				body = "{}"
			}
			for name, p := range people {
				status := p.do(method, path, body, "If-Match", "*").status
				ok := status >= 400 // may be any refusal of what was asked
				switch {
				case route == "/v1/revocations/{id}" && !isRead: // what nobody can do needs no name
					ok = status == http.StatusMethodNotAllowed
				case name == "gateway" && strings.HasSuffix(route, "/status"), name == "auditor" && route == "/v1/explain":
					ok = status == http.StatusBadRequest // the question is wrong
				case name == "stranger" && route == "/v1/barrier":
					ok = status == http.StatusOK // for the gateways that serve its tenant
				case name == "nobody":
					ok = status == http.StatusUnauthorized
				case name == "notifier", name == "gateway" && !reads, name == "auditor" && !isRead:
					ok = status == http.StatusForbidden
				case name == "gateway", name == "auditor", isRead:
					ok = status != http.StatusUnauthorized && status != http.StatusForbidden && status < 500
				}
				if !ok {
					t.Errorf("%s %s by %s: %d", method, path, name, status)
				}
				if name == "stranger" && strings.Contains(path, uuid) && status < 400 {
					t.Errorf("%s %s by another tenant's admin: %d", method, path, status)
				}
			}
		}
	}
	if tried < 30 {
		t.Errorf("only %d routes were tried", tried)
	}
	if n := w.allEvents(); n != before {
		t.Errorf("%d events were added", n-before)
	}
	for _, path := range []string{"/internal/data/v1/subscriptions", "/internal/data/v1//revokedjwt", "/v2/keys/jti"} {
		for name, want := range map[string]int{"nobody": 401, "notifier": 403, "gateway": 200} {
			if got := people[name].do("GET", path, "").status; got != want {
				t.Errorf("GET %s by %s: %d, want %d", path, name, got, want)
			}
		}
	}
}

// allEvents is the log's length.
func (w *world) allEvents() (n int) {
	w.t.Helper()
	if err := w.pool().QueryRow(w.t.Context(), `SELECT seq FROM rescind.log_head`).Scan(&n); err != nil {
		w.t.Fatal(err)
	}
	return n
}

// An issuer that is registered over HTTP is trusted at once, by every process.
func TestKeyManagersAreTrustedAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.serve()
	second := w.serve("RESCIND_KEY_SET_NETWORKS=127.0.0.0/8")
	admin := w.person(first, rest.Admin)
	keys := serveKeys(t)
	const iss = "https://late.example.com"
	late := mint("ES256", nil, claims("late-1", map[string]any{"iss": iss}))
	client := newHTTPClient(t)
	if a, err := second.revoke(client, late); err != nil || a.status != 200 {
		t.Fatalf("a token of an unknown issuer: %+v, %v", a, err)
	}
	if n := w.events(); n != 0 {
		t.Fatalf("%d revocations before the issuer is known", n)
	}
	admin.made("/v1/key-managers", fmt.Sprintf(`{"name":"Late","iss":%q,"jwks_uri":%q,"max_token_lifetime":7200,"enabled":true}`, iss, keys))
	w.client(iss, authn.Registration{ID: "late-client", Secret: clientSecret})
	mine := mint("ES256", nil, claims("late-2", map[string]any{"iss": iss, "azp": "late-client", "client_id": "late-client", "sub": "late-client"}))
	a, err := send(client, http.MethodPost, second.base+"/revoke", form(basic("late-client", clientSecret)), "token="+mine)
	if err != nil || a.status != 200 {
		t.Fatalf("a token of the new issuer: %+v, %v", a, err)
	}
	if n := w.events(); n != 1 {
		t.Errorf("%d revocations, want 1", n)
	}
}

// serveKeys serves the key set of the tests' issuer and returns its URL.
func serveKeys(t *testing.T) string {
	t.Helper()
	b, err := json.Marshal(idp().public)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/jwk-set+json")
		_, _ = w.Write(b)
	}))
	t.Cleanup(server.Close)
	return server.URL
}
