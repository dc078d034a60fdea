package app_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.yaml.in/yaml/v3"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/wso2"
)

const (
	openAPIFile  = "../../api/openapi.yaml"
	asyncAPIFile = "../../api/asyncapi.yaml"
)

func readOpenAPI(t *testing.T) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromFile(openAPIFile)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func init() {
	openapi3filter.RegisterBodyDecoder("application/x-ndjson", func(body io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		b, err := io.ReadAll(body)
		return string(b), err
	})
	openapi3filter.RegisterBodyDecoder(replica.SnapshotType, func(body io.Reader, _ http.Header, _ *openapi3.SchemaRef, _ openapi3filter.EncodingFn) (any, error) {
		_, err := replica.NewState(replica.StateConfig{}).ReadSnapshot(body)
		return "read", err
	})
}

func TestOpenAPI(t *testing.T) {
	t.Parallel()
	doc := readOpenAPI(t)
	if err := doc.Validate(t.Context(), openapi3.EnableExamplesValidation()); err != nil {
		t.Error(err)
	}
	var operations []string
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			operations = append(operations, method+" "+path)
			for status, response := range op.Responses.Map() {
				if response.Value.Headers["X-Request-Id"] == nil {
					t.Errorf("%s %s %s has no X-Request-Id", method, path, status)
				}
			}
		}
	}
	if len(operations) < 80 {
		t.Errorf("only %d operations: %q", len(operations), operations)
	}
}

// The running service answers as openapi.yaml says.
func TestServiceKeepsOpenAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	client := newHTTPClient(t)
	doc := readOpenAPI(t)
	own, idp := form(basic("own-1", clientSecret)), form(basic(clientID, clientSecret))
	with := func(h http.Header, name, value string) http.Header {
		h = h.Clone()
		h.Set(name, value)
		return h
	}
	none := http.Header{}
	etag := func(path string) http.Header {
		a, err := send(client, http.MethodGet, s.base+path, nil, "")
		if err != nil {
			t.Fatal(err)
		}
		return http.Header{"If-None-Match": a.header["Etag"]}
	}
	const (
		keys     = "/oauth2/jwks"
		metadata = "/.well-known/oauth-authorization-server"
	)
	k := &keeper{t: t, doc: doc, s: s, client: client, visited: make(map[string]bool)}
	for _, tt := range []struct {
		method, path string
		header       http.Header
		body         string
		status       int
	}{
		{"POST", "/oauth2/revoke", idp, "token=" + accessToken("at-1"), 200},
		{"POST", "/revoke", idp, "token=" + accessToken("at-2"), 200},
		{"POST", "/revoke", idp, "token=e30.e30.c2ln", 200},
		{"POST", "/revoke", own, "token=" + accessToken("at-3"), 400},
		{"POST", "/revoke", idp, "", 400},
		{"POST", "/revoke", idp, "token=a&token=b", 400},
		{"POST", "/revoke", with(idp, "Content-Type", "application/json"), "{}", 400},
		{"POST", "/revoke", form(basic(clientID, "wrong")), "token=a", 401},
		{"POST", "/revoke", idp, "token=" + strings.Repeat("a", 65536), 413},
		{"POST", "/revoke", with(idp, "Content-Encoding", "gzip"), "token=a", 415},
		{"POST", "/oauth2/token", own, "grant_type=client_credentials", 200},
		{"POST", "/oauth2/token", own, "grant_type=client_credentials&scope=read+write&resource=https://api.example.com", 200},
		{"POST", "/oauth2/token", own, "grant_type=password", 400},
		{"POST", "/oauth2/token", own, "grant_type=client_credentials&scope=admin", 400},
		{"POST", "/oauth2/token", own, "grant_type=client_credentials&resource=https://nope.example", 400},
		{"POST", "/oauth2/token", idp, "grant_type=client_credentials", 400},
		{"POST", "/oauth2/token", form(""), "grant_type=client_credentials", 401},
		{"GET", keys, with(none, "X-Request-Id", "mine-1"), "", 200},
		{"GET", keys, with(none, "Accept", "application/jwk-set+json"), "", 200},
		{"GET", keys, etag(keys), "", 304},
		{"GET", metadata, none, "", 200},
		{"GET", metadata, etag(metadata), "", 304},
		{"GET", "/healthz", none, "", 200},
		{"GET", "/readyz", none, "", 200},
		{"GET", "/readyz?verbose=1", none, "", 200},
		{"GET", "/metrics", none, "", 200},
	} {
		path, _, _ := strings.Cut(tt.path, "?")
		a := k.visit(tt.method, path, tt.path, tt.header, tt.body, tt.status)
		if want := tt.header.Get("X-Request-Id"); want != "" && a.header.Get("X-Request-Id") != want {
			t.Errorf("%s %s: request id %q, want %q", tt.method, tt.path, a.header.Get("X-Request-Id"), want)
		}
	}
	k.visitCatalog(w.person(s, rest.Admin), w.person(s, rest.Auditor))
	k.visitReads(w.person(s, rest.Gateway), w.person(s, rest.Notifier))
	k.visitTenant(w)
	k.visitRevocations(w)
	k.visitFleet(w)

	routes := s.routes(client)
	for path, item := range doc.Paths.Map() {
		for method, operation := range item.Operations() {
			if !k.visited[operation.OperationID] {
				t.Errorf("%s %s was not tried", method, path)
			}
			if item.Servers == nil && !slices.Contains(routes[path], method) {
				t.Errorf("%s %s is no route of the service", method, path)
			}
		}
	}
	for route, methods := range routes {
		if strings.Contains(route, "*") || route == "unmatched" {
			continue // what catches paths that are written otherwise, or are not there
		}
		for _, method := range methods {
			if method == http.MethodHead {
				continue // as said for all of them
			}
			if route == "/v1/revocations/{id}" && method != http.MethodGet && method != http.MethodDelete {
				continue // refused as DELETE is
			}
			if item := doc.Paths.Find(route); item == nil || item.GetOperation(method) == nil {
				t.Errorf("%s %s is a route and not in openapi.yaml", method, route)
			}
		}
	}
}

// keeper compares what a service answers with what openapi.yaml says.
type keeper struct {
	t       *testing.T
	doc     *openapi3.T
	s       *service
	client  *http.Client
	visited map[string]bool
}

// visit sends a request to path, which template of the document stands for.
func (k *keeper) visit(method, template, path string, header http.Header, body string, status int) answer {
	k.t.Helper()
	item := k.doc.Paths.Value(template)
	if item == nil || item.GetOperation(method) == nil {
		k.t.Fatalf("%s %s is not in openapi.yaml", method, template)
	}
	base := k.s.base
	if item.Servers != nil {
		base = k.s.ops
	}
	a, err := send(k.client, method, base+path, header, body)
	if err != nil || a.status != status {
		k.t.Errorf("%s %s: status %d, want %d, error %v: %s", method, path, a.status, status, err, a.body)
		return a
	}
	operation := item.GetOperation(method)
	k.visited[operation.OperationID] = true
	request, err := http.NewRequest(method, base+path, nil)
	if err != nil {
		k.t.Fatal(err)
	}
	err = openapi3filter.ValidateResponse(k.t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{
			Request: request, Route: &routers.Route{Spec: k.doc, Path: template, PathItem: item, Method: method, Operation: operation},
		},
		Status: a.status, Header: a.header, Body: io.NopCloser(strings.NewReader(a.body)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true},
	})
	if err != nil {
		k.t.Errorf("%s %s with %d: %v\n%s", method, path, status, err, a.body)
	}
	return a
}

// as is visit by a person, with further header fields.
func (k *keeper) as(p *person, method, template, path, body string, status int, more ...string) answer {
	k.t.Helper()
	h := http.Header{}
	if p != nil {
		h.Set("Authorization", p.auth)
	}
	if body != "" {
		h.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(more); i += 2 {
		h.Set(more[i], more[i+1])
	}
	return k.visit(method, template, path, h, body, status)
}

// visitTenant asks the issuer of a tenant, and introspection.
func (k *keeper) visitTenant(w *world) {
	k.t.Helper()
	const domain = "issuer.example"
	iss := ourISS + "/t/" + domain
	w.tenant(domain)
	w.client(iss, authn.Registration{
		ID: "tenant-1", Secret: clientSecret, Scopes: []string{"read", "introspect"}, DefaultScopes: []string{"read"}, Audience: []string{iss},
	})
	own := form(basic("tenant-1", clientSecret))
	get := func(template string, status int) {
		path := strings.Replace(template, "{tenant}", domain, 1)
		a := k.visit("GET", template, path, http.Header{}, "", status)
		k.visit("GET", template, path, http.Header{"If-None-Match": a.header["Etag"]}, "", 304)
	}
	get("/.well-known/openid-configuration", 200)
	get("/.well-known/oauth-authorization-server/t/{tenant}", 200)
	get("/t/{tenant}/.well-known/openid-configuration", 200)
	get("/t/{tenant}/oauth2/jwks", 200)
	post := func(what string, header http.Header, body string, status int) answer {
		return k.visit("POST", "/t/{tenant}/oauth2/"+what, "/t/"+domain+"/oauth2/"+what, header, body, status)
	}
	token := func(scope string) string {
		var response struct {
			AccessToken string `json:"access_token"`
		}
		_ = json.Unmarshal([]byte(post("token", own, "grant_type=client_credentials&scope="+scope, 200).body), &response) // the schema has been checked
		return response.AccessToken
	}
	plain, asking := token("read"), token("introspect")
	k.visit("POST", "/t/{tenant}/oauth2/token", "/t/nobody.example/oauth2/token", own, "grant_type=client_credentials", 404)
	post("introspect", own, "token="+plain, 200)
	k.visit("POST", "/oauth2/introspect", "/oauth2/introspect", own, "token="+plain, 200)
	k.visit("POST", "/oauth2/introspect", "/oauth2/introspect", own, "token=nothing", 200)
	k.visit("POST", "/oauth2/introspect", "/oauth2/introspect", own, "", 400)
	k.visit("POST", "/oauth2/introspect", "/oauth2/introspect", form(""), "token="+plain, 401)
	k.visit("POST", "/oauth2/introspect", "/oauth2/introspect", form("Bearer nothing"), "token="+plain, 401)
	k.visit("POST", "/oauth2/introspect", "/oauth2/introspect", form("Bearer "+asking), "token="+plain, 200)
	k.visit("POST", "/oauth2/introspect", "/oauth2/introspect", form("Bearer "+plain), "token="+asking, 403)
	post("revoke", own, "token="+plain, 200)
}

// visitRevocations ends tokens of every kind as an admin, and asks for what is wrong.
func (k *keeper) visitRevocations(w *world) {
	k.t.Helper()
	admin := &person{k.t, k.client, k.s.base, "Basic " + base64.StdEncoding.EncodeToString([]byte(rest.Admin+":"+accountPassword))}
	const path = "/v1/revocations"
	post := func(body string, status int) answer { return k.as(admin, "POST", path, path, body, status) }
	var made struct{ ID string }
	a := post(`{"kind":"client","client_id":"own-1","reason":"lost"}`, 202)
	if err := json.Unmarshal([]byte(a.body), &made); err != nil {
		k.t.Fatal(err)
	}
	post(`{"kind":"tenant","tenant":"issuer.example","dry_run":true}`, 200)
	post(`{"items":[{"jti":"at-9"},{"sub":"u-1"},{"sid":"s-1"},{"kid":"rsa-1","iss":"`+idpISS+`"},{"client_id":"own-1"},{"tenant":"issuer.example"},{"iss":"`+idpISS+`","token":"opaque"}]}`, 202)
	post(`{"items":[{"token":"`+accessToken("at-10")+`"}],"dry_run":true}`, 200)
	post(`{"kind":"client"}`, 400)
	post(`{"kind":"client","client_id":"own-1","sub":"u-1"}`, 400)
	k.as(nil, "POST", path, path, `{}`, 401)
	k.as(admin, "GET", path, path, "", 200)
	k.as(admin, "GET", path, path+"?kind=token&limit=1", "", 200)
	k.as(admin, "GET", path, path+"?kind=none", "", 400)
	k.as(admin, "GET", path+"/{id}", path+"/"+made.ID, "", 200)
	k.as(admin, "GET", path+"/{id}", path+"/00000000-0000-0000-0000-000000000000", "", 404)
	if a := k.as(admin, "DELETE", path+"/{id}", path+"/"+made.ID, "", 405); !strings.Contains(a.body, "/revocation-final") {
		k.t.Errorf("DELETE: %+v", a)
	}
	k.as(admin, "GET", "/v1/audit", "/v1/audit?limit=2", "", 200)
	k.as(admin, "GET", "/v1/audit", "/v1/audit?from=yesterday", "", 400)
	_, app := admin.made("/v1/applications", `{"name":"Claims","owner":"admin","self_contained":true}`)
	k.as(admin, "GET", "/v1/applications/{id}/claims", app+"/claims?key_type=SANDBOX", "", 200)
	k.as(admin, "GET", "/v1/applications/{id}/claims", app+"/claims?key_type=NONE", "", 400)
}

// visitFleet reports as a gateway, and asks for it as an admin.
func (k *keeper) visitFleet(w *world) {
	k.t.Helper()
	as := func(name string) *person {
		return &person{k.t, k.client, k.s.base, basic(name, accountPassword)}
	}
	admin, gateway := as(rest.Admin), as(rest.Gateway)
	w.account(authn.Account{Username: "gateway-2", Role: rest.Gateway}, accountPassword)
	const one, status, canary, all = "/v1/gateways/{id}", "/v1/gateways/{id}/status", "/v1/gateways/{id}/canary", "/v1/gateways"
	report := func(position string, started int) string {
		return fmt.Sprintf(`{"instance":%q,"started":%d,%s,"age_ms":1500,"ready":true,"revocations_only":false,"revocations":1,"entities":2,
			"labels":{"site":"contract"},"version":"1","feeds":[{"name":"sse","connected":true,"heard":0,"events":1}],"from_the_future":true}`, uuid.NewString(), started, position)
	}
	at := w.position()
	k.as(gateway, "POST", status, all+"/contract/status", report(at, 2), 200)
	k.as(gateway, "POST", status, all+"/contract/status", report(at, 1), 409)
	k.as(as("gateway-2"), "POST", status, all+"/contract/status", report(at, 3), 403)
	k.as(gateway, "POST", status, all+"/contract/status", `{"seq":"one"}`, 400)
	k.as(gateway, "POST", status, all+"/-contract/status", report(at, 2), 400)
	k.as(nil, "POST", status, all+"/contract/status", report(at, 2), 401)
	k.as(admin, "GET", all, all, "", 200)
	k.as(admin, "GET", all, all+"?standing=live&label=site:contract&limit=1", "", 200)
	k.as(admin, "GET", all, all+"?standing=asleep", "", 400)
	k.as(admin, "PUT", canary, all+"/contract/canary", `{"url":"https://gw.example.com/rescind-canary/v1/"}`, 200)
	k.as(admin, "PUT", canary, all+"/contract/canary", `{"url":"http://gw.example.com/"}`, 400)
	k.as(admin, "PUT", canary, all+"/none/canary", `{"url":""}`, 404)
	k.as(admin, "GET", one, all+"/contract", "", 200)
	k.as(admin, "GET", one, all+"/none", "", 404)
	k.as(admin, "POST", "/v1/barrier", "/v1/barrier", `{"timeout":"10ms"}`, 200)
	k.as(admin, "POST", "/v1/barrier", "/v1/barrier", `{"timeout":"2m"}`, 400)
	k.as(admin, "POST", "/v1/barrier", "/v1/barrier", `{"epoch":"00000000-0000-4000-8000-000000000000","seq":1}`, 409)
	a := k.as(admin, "POST", "/v1/revocations", "/v1/revocations?wait=10ms", `{"jti":"at-fleet"}`, 202)
	k.as(admin, "POST", "/v1/revocations", "/v1/revocations?wait=soon", `{"jti":"at-fleet"}`, 400)
	k.as(admin, "GET", "/v1/revocations/{id}", a.header.Get("Location"), "", 200)
	token := accessToken("at-10")
	k.as(admin, "POST", "/v1/explain", "/v1/explain", `{"token":"`+token+`","api":{"context":"/nothing/1","version":"1"},"gateway":"contract"}`, 200)
	k.as(admin, "POST", "/v1/explain", "/v1/explain", `{"token":"`+token+`"}`, 200, "Accept", "text/plain")
	k.as(admin, "POST", "/v1/explain", "/v1/explain", `{"claims":{"iss":"`+idpISS+`","sub":"u-1","iat":1,"exp":9999999999}}`, 200)
	k.as(admin, "POST", "/v1/explain", "/v1/explain", `{}`, 400)
	k.as(admin, "DELETE", one, all+"/contract", "", 204)
	k.as(admin, "DELETE", one, all+"/contract", "", 404)
}

// position is the members epoch and seq of where the log is.
func (w *world) position() string {
	w.t.Helper()
	var epoch string
	var seq int64
	if err := w.pool().QueryRow(w.t.Context(), `SELECT epoch, seq FROM rescind.log_head`).Scan(&epoch, &seq); err != nil {
		w.t.Fatal(err)
	}
	return fmt.Sprintf(`"epoch":%q,"seq":%d`, epoch, seq)
}

// visitCatalog leads one entity of each noun through its life, and asks for what is wrong.
func (k *keeper) visitCatalog(admin, auditor *person) {
	k.t.Helper()
	uuidOf := func(a answer) string {
		var e struct{ UUID string }
		_ = json.Unmarshal([]byte(a.body), &e) // the schema has been checked
		return e.UUID
	}
	made := func(template, collection, body string) (path string) {
		k.t.Helper()
		a := k.as(admin, "POST", template, collection, body, 201)
		k.as(admin, "POST", template, collection, body, 409)
		k.as(admin, "POST", template, collection, `{"colour":"red"}`, 400)
		k.as(auditor, "POST", template, collection, body, 403)
		k.as(auditor, "GET", template, collection+"?limit=1", "", 200)
		k.as(admin, "GET", template, collection+"?cursor=garbage", "", 400)
		return collection + "/" + uuidOf(a)
	}
	seen := func(template, path, body string) (etag string) {
		k.t.Helper()
		etag = k.as(admin, "GET", template, path, "", 200).header.Get("Etag")
		k.as(admin, "GET", template, path, "", 304, "If-None-Match", etag)
		k.as(nil, "GET", template, path, "", 401)
		if body == "" {
			return etag
		}
		k.as(admin, "PUT", template, path, body, 428)
		etag = k.as(admin, "PUT", template, path, body, 200, "If-Match", etag).header.Get("Etag")
		k.as(admin, "PUT", template, path, body, 412, "If-Match", `"1"`)
		k.as(admin, "PUT", template, path, body, 415, "If-Match", etag, "Content-Type", "text/plain")
		return etag
	}
	over := func(template, path string, status int) {
		k.t.Helper()
		k.as(admin, "DELETE", template, path, "", 428)
		etag := k.as(admin, "GET", template, path, "", 200).header.Get("Etag")
		k.as(admin, "DELETE", template, path, "", status, "If-Match", etag)
		if status == 204 {
			k.as(admin, "GET", template, path, "", 404)
		}
	}
	const tenants, managers, policies, scopes, apis, applications, subscriptions = "/v1/tenants", "/v1/key-managers", "/v1/policies/{kind}",
		"/v1/scopes", "/v1/apis", "/v1/applications", "/v1/subscriptions"
	tenant := made(tenants, tenants, `{"tenant":{"domain":"kept.example"}}`)
	seen(tenants+"/{id}", tenant, `{"display_name":"Kept"}`)
	manager := made(managers, managers, `{"name":"Kept","iss":"https://kept.example.com","jwks_uri":"https://kept.example.com/jwks","max_token_lifetime":60}`)
	seen(managers+"/{id}", manager, `{"name":"Kept","iss":"https://kept.example.com","max_token_lifetime":120,"enabled":true}`)
	policy := made(policies, "/v1/policies/subscription", `{"name":"Kept","quota":1,"unit_time":1,"time_unit":"min"}`)
	seen(policies+"/{id}", policy, `{"name":"Kept"}`)
	scope := made(scopes, scopes, `{"name":"kept"}`)
	seen(scopes+"/{id}", scope, `{"name":"kept","roles":["a"]}`)
	api := made(apis, apis, `{"name":"Kept","version":"1","context":"/kept/1","provider":"p","operations":[{"target":"/*","verb":"GET","scopes":["kept"]}]}`)
	seen(apis+"/{id}", api, `{"name":"Kept","version":"1","context":"/kept/1","provider":"p","status":"PUBLISHED","operations":[{"target":"/*","verb":"GET","scopes":["kept"]}]}`)
	application := made(applications, applications, `{"name":"Kept","owner":"o"}`)
	seen(applications+"/{id}", application, `{"name":"Kept","owner":"o","attributes":{"a":"b"}}`)
	id := func(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }
	subscription := made(subscriptions, subscriptions, fmt.Sprintf(`{"application":{"uuid":%q},"api":{"uuid":%q},"policy":"Kept"}`, id(application), id(api)))
	seen(subscriptions+"/{id}", subscription, fmt.Sprintf(`{"application":{"uuid":%q},"api":{"uuid":%q},"policy":"Kept","state":"ON_HOLD"}`, id(application), id(api)))

	keys := applications + "/{id}/keys"
	key := application + "/keys/" + uuidOf(k.as(admin, "POST", keys, application+"/keys", `{"key_type":"PRODUCTION"}`, 201, "Idempotency-Key", `"k"`))
	k.as(admin, "POST", keys, application+"/keys", `{"key_type":"SANDBOX"}`, 422, "Idempotency-Key", `"k"`)
	k.as(admin, "GET", keys, application+"/keys", "", 200)
	route := k.keyTemplate()
	seen(route, key, "")
	k.as(admin, "POST", route+"/rotate", key+"/rotate", `{"end_previous":true}`, 200)
	k.as(admin, "POST", route+"/rotate", key+"/rotate", `{"colour":"red"}`, 400)
	k.as(admin, "POST", applications+"/{id}/block", application+"/block", "", 200)
	k.as(admin, "POST", applications+"/{id}/unblock", application+"/unblock", "", 200)
	k.as(admin, "POST", applications+"/{id}/unblock", application+"/unblock", "", 412, "If-Match", `"1"`)
	over(policies+"/{id}", policy, 409)
	over(apis+"/{id}", api, 409)
	over(scopes+"/{id}", scope, 409)
	over(subscriptions+"/{id}", subscription, 204)
	over(route, key, 204)
	over(applications+"/{id}", application, 204)
	over(apis+"/{id}", api, 204)
	over(scopes+"/{id}", scope, 204)
	over(policies+"/{id}", policy, 204)
	over(managers+"/{id}", manager, 204)
	over(tenants+"/{id}", tenant, 204)
}

// keyTemplate is the path of one key, whatever its parameter is called.
func (k *keeper) keyTemplate() string {
	for path := range k.doc.Paths.Map() {
		if strings.HasPrefix(path, "/v1/applications/{id}/keys/{") && strings.Count(path, "/") == 5 {
			return path
		}
	}
	k.t.Fatal("there is no path of one key")
	return ""
}

// visitReads asks for all that gateways read, and notifies.
func (k *keeper) visitReads(gateway, notifier *person) {
	k.t.Helper()
	for path, item := range k.doc.Paths.Map() {
		if item.Get == nil || !strings.HasPrefix(path, "/internal/") && !strings.HasPrefix(path, "/v2/") {
			continue
		}
		actual, status := strings.NewReplacer("{dir}", "jti", "{key}", "at-1").Replace(path), 200
		if strings.HasSuffix(path, "/runtime-artifacts") {
			k.as(gateway, "GET", path, actual+"?type=Synapse", "", 404)
			actual, status = actual+"?type=Envoy", 204
		}
		k.as(gateway, "GET", path, actual, "", status)
		k.as(nil, "GET", path, actual, "", 401)
		k.as(notifier, "GET", path, actual, "", 403)
	}
	k.as(gateway, "GET", "/v2/keys/{dir}/{key}", "/v2/keys/jti/nobody", "", 404)
	const hub = "/internal/data/v1"
	k.as(gateway, "POST", hub+"/retrieve-api-artifacts", hub+"/retrieve-api-artifacts", `{"uuids":[]}`, 204)
	k.as(gateway, "PATCH", hub+"/apis/deployed-revisions", hub+"/apis/deployed-revisions", `[]`, 200)
	k.as(gateway, "POST", hub+"/apis/undeployed-revision", hub+"/apis/undeployed-revision", `{}`, 200)
	k.as(notifier, "POST", hub+"/notify", hub+"/notify", `{"eventId":"n-1","timeStamp":1,"type":"token_revocation","tenantId":-1234,"tenantDomain":"carbon.super",
		"accessToken":"notified-1","expiryTime":9223372036854775807,"user":"u","consumerKey":"c","tokenType":"JWT"}`, 200)
	k.as(notifier, "POST", hub+"/notify", hub+"/notify", `{"type":7}`, 400)
	k.as(gateway, "POST", hub+"/notify", hub+"/notify", `{}`, 403)

	const snapshots, events = "/v1/snapshots/{kind}", "/v1/events"
	var at revocation.Position
	for _, kind := range []string{"all", "revocations", "subscriptions", "applications", "key-mappings", "apis", "policies", "scopes", "key-managers", "tenants"} {
		a := k.as(gateway, "GET", snapshots, "/v1/snapshots/"+kind, "", 200)
		k.as(gateway, "GET", snapshots, "/v1/snapshots/"+kind, "", 304, "If-None-Match", a.header.Get("Etag"))
		if err := json.Unmarshal([]byte(a.body), &at); err != nil {
			k.t.Error(err)
		}
	}
	k.as(gateway, "GET", snapshots, "/v1/snapshots/all", "", 200, "Accept", "application/x-ndjson")
	k.as(gateway, "GET", snapshots, "/v1/snapshots/all", "", 200, "Accept", replica.SnapshotType)
	k.as(gateway, "GET", snapshots, "/v1/snapshots/all?tenant=elsewhere.example", "", 403)
	k.as(gateway, "GET", snapshots, "/v1/snapshots/all?colour=red", "", 400)
	k.as(gateway, "GET", snapshots, "/v1/snapshots/all", "", 406, "Accept-Encoding", "br, identity;q=0")
	k.as(nil, "GET", snapshots, "/v1/snapshots/all", "", 401)
	k.as(notifier, "GET", snapshots, "/v1/snapshots/all", "", 403)
	k.as(gateway, "GET", events, events+"?after="+at.String(), "", 200)
	k.as(gateway, "GET", events, events+"?after=garbage", "", 400)
	k.as(gateway, "GET", events, events+"?after=00000000-0000-4000-8000-000000000000:1", "", 410)
	k.as(gateway, "GET", events, events+fmt.Sprintf("?after=%s:%d", at.Epoch, at.Seq+1_000_000), "", 400)
}

type asyncAPI struct {
	AsyncAPI string `yaml:"asyncapi"`
	Channels map[string]struct {
		Address  string
		Messages map[string]reference
		Bindings struct {
			AMQP struct {
				Is       string
				Exchange struct {
					Name, Type string
					Durable    bool
				}
			} `yaml:"amqp"`
		}
	}
	Operations map[string]struct {
		Action  string
		Channel reference
	}
	Components struct {
		Messages map[string]struct {
			ContentType string `yaml:"contentType"`
			Headers     reference
			Payload     reference
			Examples    []struct{ Payload any }
		}
		Schemas map[string]any
	}
}

type reference struct {
	Ref string `yaml:"$ref"`
}

// What we publish is what asyncapi.yaml says: it is our contract with gateways.
func TestAsyncAPI(t *testing.T) {
	t.Parallel()
	var doc asyncAPI
	var tree any
	b, err := os.ReadFile(asyncAPIFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, into := range []any{&doc, &tree} {
		if err := yaml.Unmarshal(b, into); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.HasPrefix(doc.AsyncAPI, "3.0.") {
		t.Errorf("version %s", doc.AsyncAPI)
	}
	checkReferences(t, tree, tree)

	defaults, err := app.ParseConfig(app.Input{Environ: []string{
		"RESCIND_ISSUER=" + ourISS, "RESCIND_MASTER_KEY=" + masterKey, "RESCIND_DATABASE_URL=postgres://h/d", "RESCIND_SINKS=none",
	}})
	if err != nil {
		t.Fatal(err)
	}
	event := revocation.Event{Type: "revocation.{kind}", Tenant: revocation.Tenant{Domain: "{tenant}"}}
	for name, want := range map[string][3]string{
		"revocations":              {defaults.AMQP.Exchange, event.RoutingKey(), "revocation"},
		"catalogChanges":           {defaults.AMQP.Exchange, "{noun}.{verb}.{tenant}", "catalogChange"},
		"heartbeats":               {defaults.AMQP.Exchange, revocation.HeartbeatRoutingKey, "heartbeat"},
		"wso2TokenRevocations":     {defaults.AMQP.WSO2Exchange, defaults.AMQP.WSO2RoutingKey, "tokenRevocation"},
		"wso2Notifications":        {defaults.AMQP.WSO2Exchange, wso2.TopicNotification, "notification"},
		"wso2KeyManagers":          {defaults.AMQP.WSO2Exchange, wso2.TopicKeyManagerGo, "keyManager"},
		"wso2KeyManagersCamelCase": {defaults.AMQP.WSO2Exchange, wso2.TopicKeyManagerJava, "keyManager"},
	} {
		c := doc.Channels[name]
		got := [3]string{c.Bindings.AMQP.Exchange.Name, c.Address, strings.Join(slices.Collect(maps.Keys(c.Messages)), " ")}
		if diff := cmp.Diff(want, got); diff != "" || c.Bindings.AMQP.Exchange.Type != "topic" || !c.Bindings.AMQP.Exchange.Durable {
			t.Errorf("channel %s: %+v\n%s", name, c, diff)
		}
	}
	if len(doc.Channels) != 7 || len(doc.Operations) != 7 {
		t.Errorf("%d channels and %d operations", len(doc.Channels), len(doc.Operations))
	}

	contentTypes := map[string]string{
		"revocation": revocation.ContentType, "catalogChange": revocation.ContentType, "heartbeat": revocation.ContentType,
		"tokenRevocation": wso2.ContentType, "notification": wso2.ContentType, "keyManager": wso2.ContentType,
	}
	for name, message := range doc.Components.Messages {
		if message.ContentType != contentTypes[name] {
			t.Errorf("message %s: content type %q, want %q", name, message.ContentType, contentTypes[name])
		}
		schema := schemaOf(t, doc, message.Payload.Ref)
		for _, e := range message.Examples {
			conforms(t, schema, "the example of "+name, e.Payload)
		}
		for what, payload := range messagesByName(t)[name] {
			conforms(t, schema, what, payload)
		}
	}
	// A schema that takes everything would prove nothing.
	revoked := schemaOf(t, doc, "#/components/schemas/RevocationEvent")
	for _, change := range []func(event, data map[string]any){
		func(e, _ map[string]any) { e["sequence"] = "7" },
		func(e, _ map[string]any) { delete(e, "epoch") },
		func(_, d map[string]any) { delete(d, "jti") },
		func(_, d map[string]any) { d["kind"] = "subject" },
		func(_, d map[string]any) { d["exp"] = "1795201400" },
	} {
		e := asJSON(t, messagesByName(t)["revocation"]["an event of kind token"]).(map[string]any)
		change(e, e["data"].(map[string]any))
		if err := revoked.VisitJSON(e); err == nil {
			t.Errorf("the schema takes %v", e)
		}
	}
}

// What arrives from the broker is as asyncapi.yaml says, its properties and headers too.
func TestServiceKeepsAsyncAPI(t *testing.T) {
	t.Parallel()
	var doc asyncAPI
	b, err := os.ReadFile(asyncAPIFile)
	if err == nil {
		err = yaml.Unmarshal(b, &doc)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	s := w.serve()
	inboxes := map[string]*consumer{
		"revocation":      w.consume(w.amqpURL, "rescind.events", "revocation.#"),
		"heartbeat":       w.consume(w.amqpURL, "rescind.events", revocation.HeartbeatRoutingKey),
		"tokenRevocation": w.consume(w.amqpURL, "amq.topic", "tokenRevocation"),
		"catalogChange":   w.consume(w.amqpURL, "rescind.events", "scope.#"),
		"notification":    w.consume(w.amqpURL, "amq.topic", "notification"),
		"keyManager":      w.consume(w.amqpURL, "amq.topic", "keyManager"),
	}
	admin := w.person(s, rest.Admin)
	admin.made("/v1/scopes", `{"name":"order_pizza","roles":["webuser"]}`)
	admin.made("/v1/key-managers", `{"name":"Elsewhere","iss":"https://elsewhere.example.com","jwks_uri":"https://elsewhere.example.com/jwks","max_token_lifetime":3600,"enabled":true}`)
	s.mustRevoke(newHTTPClient(t), accessToken("at-1"))
	for name, inbox := range inboxes {
		var m amqp.Delivery
		await(t, "a message "+name, func() bool {
			inbox.mu.Lock()
			defer inbox.mu.Unlock()
			if len(inbox.messages) > 0 {
				m = inbox.messages[0]
			}
			return len(inbox.messages) > 0
		})
		message := doc.Components.Messages[name]
		conforms(t, schemaOf(t, doc, message.Payload.Ref), "the message "+name, m.Body)
		if m.ContentType != message.ContentType || m.DeliveryMode != amqp.Persistent || m.MessageId == "" {
			t.Errorf("%s: content type %q, delivery mode %d, id %q", name, m.ContentType, m.DeliveryMode, m.MessageId)
		}
		if message.Headers.Ref == "" {
			if len(m.Headers) != 0 || !m.Timestamp.IsZero() {
				t.Errorf("%s: headers %v and time %s, must have neither", name, m.Headers, m.Timestamp)
			}
			continue
		}
		conforms(t, schemaOf(t, doc, message.Headers.Ref), "the headers of "+name, m.Headers)
		if m.AppId != "rescind" || m.Type != m.Headers["cloudEvents_type"] || m.MessageId != m.Headers["cloudEvents_id"] || m.Timestamp.IsZero() {
			t.Errorf("%s: properties %+v", name, m)
		}
	}
}

// checkReferences finds references to what is not there.
func checkReferences(t *testing.T, root, node any) {
	t.Helper()
	switch n := node.(type) {
	case map[string]any:
		if ref, ok := n["$ref"].(string); ok {
			at := root
			for _, step := range strings.Split(strings.TrimPrefix(ref, "#/"), "/") {
				parent, _ := at.(map[string]any)
				at = parent[step]
			}
			if at == nil {
				t.Errorf("%s leads nowhere", ref)
			}
		}
		for _, child := range n {
			checkReferences(t, root, child)
		}
	case []any:
		for _, child := range n {
			checkReferences(t, root, child)
		}
	}
}

func schemaOf(t *testing.T, doc asyncAPI, ref string) *openapi3.Schema {
	t.Helper()
	b, err := json.Marshal(doc.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")])
	if err != nil {
		t.Fatal(err)
	}
	schema := openapi3.NewSchema()
	if err := schema.UnmarshalJSON(b); err != nil {
		t.Fatalf("schema %s: %v", ref, err)
	}
	if err := schema.Validate(t.Context()); err != nil {
		t.Fatalf("schema %s: %v", ref, err)
	}
	return schema
}

func conforms(t *testing.T, schema *openapi3.Schema, what string, payload any) {
	t.Helper()
	if err := schema.VisitJSON(asJSON(t, payload), openapi3.MultiErrors()); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// asJSON is payload as a reader of JSON has it.
func asJSON(t *testing.T, payload any) (v any) {
	t.Helper()
	b, isBytes := payload.([]byte)
	if !isBytes {
		var err error
		if b, err = json.Marshal(payload); err != nil {
			t.Fatal(err)
		}
	}
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// messagesByName is what our own code makes, by message and by what it is.
func messagesByName(t *testing.T) map[string]map[string]any {
	t.Helper()
	const (
		iss   = "https://km.example.com"
		epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	)
	now := time.Now()
	out := map[string]map[string]any{
		"revocation": {}, "heartbeat": {}, "tokenRevocation": {}, "catalogChange": {}, "notification": {}, "keyManager": {},
	}
	byTopic := map[string]string{
		wso2.TopicTokenRevocation: "tokenRevocation", wso2.TopicNotification: "notification",
		wso2.TopicKeyManagerGo: "keyManager", wso2.TopicKeyManagerJava: "keyManager",
	}
	event := func(name, what string, e revocation.Event) {
		e.Position, e.Previous, e.Source, e.Time = revocation.Position{Epoch: epoch, Seq: 12}, 9, iss, now
		e.Traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
		out[name]["an event of "+what] = e
		messages, err := wso2.Messages(e, now)
		if err != nil {
			t.Fatal(err)
		}
		for i, m := range messages {
			out[byTopic[m.Topic]][fmt.Sprintf("message %d of %s on %s", i, what, m.Topic)] = m.Body
		}
	}
	add := func(what string, r revocation.Revocation) {
		r.ID, r.Tenant, r.Exp = "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", revocation.SuperTenant, now.Unix()+900
		e, err := revocation.NewEvent(r)
		if err != nil {
			t.Fatal(err)
		}
		event("revocation", what, e)
	}
	for _, kind := range revocation.Kinds {
		r := revocation.Revocation{Target: revocation.Target{Kind: kind, Iss: iss, ID: "x-1"}}
		if kind == revocation.KindTenant {
			r.Target.Iss, r.Target.ID = "", revocation.SuperTenant.Domain
		}
		if kind.HasTime() {
			r.NotAfter = now.Unix()
		}
		add("kind "+string(kind), r)
	}
	add("a digest", revocation.Revocation{Target: revocation.DigestTarget(iss, "e30.e30"), Signature: "c2ln", ClientID: "app-2", Reason: "client"})
	for _, noun := range catalog.Nouns {
		for _, verb := range []catalog.Verb{catalog.Created, catalog.Updated, catalog.Deleted, catalog.LifecycleChanged, catalog.Deployed, catalog.Undeployed} {
			if noun != catalog.NounAPI && verb != catalog.Created && verb != catalog.Updated && verb != catalog.Deleted {
				continue
			}
			entity := catalog.New(noun)
			*entity.Base() = catalog.Meta{ID: 7, UUID: "a1a2b3c4-0000-4000-8000-000000000007", Tenant: revocation.SuperTenant, Timestamp: now.UnixMilli()}
			switch e := entity.(type) {
			case *catalog.Policy:
				e.Kind, e.Name, e.QuotaType = catalog.PolicySubscription, "Gold", "requestCount"
			case *catalog.KeyManager:
				e.Name, e.Type, e.TokenType, e.Iss = "Elsewhere", "default", "DIRECT", "https://idp.example.com"
			case *catalog.API:
				e.Name, e.Version = "Pizza", "1.0.0"
			case *catalog.Scope:
				e.Name = "order_pizza"
			case *catalog.Application:
				e.Name = "Shop"
			case *catalog.KeyMapping:
				e.ConsumerKey = "shop-key"
			}
			change := catalog.Change{Verb: verb, Entity: entity}
			if verb == catalog.Deployed || verb == catalog.Undeployed {
				change.Labels = []string{"Default"}
			}
			e, err := catalog.NewEvent(change)
			if err != nil {
				t.Fatal(err)
			}
			event("catalogChange", string(noun)+" "+string(verb), e)
		}
	}
	out["heartbeat"]["a heartbeat"] = revocation.Heartbeat{
		Epoch: epoch, ID: epoch + ":hb:6f1d1e0c-8f0e-4f63-8f3e-1f0c3a2b4d5e", Source: iss, Time: now, Head: 12, Through: 12,
	}
	return out
}
