package adminapi

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/go-chi/chi/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
)

// The UUIDs of what the tests make.
const (
	tenantUUID      = "10000000-0000-4000-8000-000000000001"
	keyManagerUUID  = "20000000-0000-4000-8000-000000000001"
	subPolicyUUID   = "30000000-0000-4000-8000-000000000001"
	appPolicyUUID   = "30000000-0000-4000-8000-000000000002"
	apiPolicyUUID   = "30000000-0000-4000-8000-000000000003"
	scopeUUID       = "40000000-0000-4000-8000-000000000001"
	apiUUID         = "50000000-0000-4000-8000-000000000001"
	applicationUUID = "60000000-0000-4000-8000-000000000001"
	keyUUID         = "70000000-0000-4000-8000-000000000001"
	subUUID         = "80000000-0000-4000-8000-000000000001"
)

const keysOfApplication = "/v1/applications/" + applicationUUID + "/keys"

// life is that of one entity.
type life struct {
	who, path, uuid string
	id              int
	create          string
	// replace and least are bodies of PUT: one with other values, one with no more than must be there.
	replace, least string
}

// lives are one entity of each collection, each after those that it refers to.
var lives = []life{
	{
		"admin", "/v1/tenants", tenantUUID, 1001,
		`{"id":1001,"uuid":"` + tenantUUID + `","tenant":{"domain":"globex.com"},"display_name":"Globex"}`,
		`{"display_name":"Globex & Söhne"}`, `{}`,
	}, {
		"admin", "/v1/key-managers", keyManagerUUID, 2001,
		`{"tenant":{"domain":"acme.com"},"id":2001,"uuid":"` + keyManagerUUID + `","name":"idp","iss":"https://idp.acme.com","max_token_lifetime":600,
		  "jwks_uri":"https://idp.acme.com/jwks","properties":{"a":[1,{"b":"c"}]}}`,
		`{"name":"idp","iss":"https://idp.acme.com","max_token_lifetime":900,"jwks_uri":"https://idp.acme.com/keys","type":"KeyCloak","enabled":false,
		  "display_name":"IdP","description":"theirs","algorithms":["RS256"],"allow_typ":["JWT"],"consumer_key_claim":"client_id",
		  "scopes_claim":"scp","claim_mappings":[{"remote":"given_name","local":"first"}],"token_type":"BOTH"}`,
		`{"name":"idp","iss":"https://idp.acme.com","max_token_lifetime":900}`,
	}, {
		"acme-admin", "/v1/policies/subscription", subPolicyUUID, 3001,
		`{"id":3001,"uuid":"` + subPolicyUUID + `","name":"Gold","quota":5000,"unit_time":1,"time_unit":"min"}`,
		`{"kind":"subscription","name":"Gold","display_name":"Gold","description":"plenty","quota_type":"bandwidthVolume","quota":9000,"unit_time":1,
		  "time_unit":"hour","rate_limit_count":5,"rate_limit_time_unit":"sec","stop_on_quota_reach":true,"graphql_max_depth":3,"graphql_max_complexity":4}`,
		`{"name":"Gold"}`,
	}, {
		"acme-admin", "/v1/policies/application", appPolicyUUID, 3002,
		`{"id":3002,"uuid":"` + appPolicyUUID + `","kind":"application","name":"10PerMin","quota":10,"unit_time":1,"time_unit":"min"}`,
		`{"name":"10PerMin","quota":11,"unit_time":2,"time_unit":"hour"}`, `{"name":"10PerMin"}`,
	}, {
		"acme-admin", "/v1/policies/api", apiPolicyUUID, 3003,
		`{"id":3003,"uuid":"` + apiPolicyUUID + `","name":"Slow"}`,
		`{"name":"Slow","level":"resourceLevel"}`, `{"name":"Slow"}`,
	}, {
		"acme-admin", "/v1/scopes", scopeUUID, 4001,
		`{"id":4001,"uuid":"` + scopeUUID + `","name":"order","display_name":"Order","description":"a pizza","roles":["eater","cook"]}`,
		`{"name":"order","roles":["cook"]}`, `{"name":"order"}`,
	}, {
		"acme-admin", "/v1/apis", apiUUID, 5001,
		`{"id":5001,"uuid":"` + apiUUID + `","name":"Pizza","version":"1.0.0","context":"/pizza/1.0.0","provider":"admin","status":"PUBLISHED",
		  "security_scheme":["oauth2"],"gateway_labels":["eu"],
		  "operations":[{"target":"/menu","verb":"GET"},{"target":"/order","verb":"POST","auth_type":"Application","policy":"Slow","scopes":["order"]}]}`,
		`{"name":"Pizza","version":"1.0.0","context":"/pizza/1","provider":"cook","type":"SOAP","status":"DEPRECATED","default_version":true,
		  "policy":"Slow","gateway_labels":["us"]}`,
		`{"name":"Pizza","version":"1.0.0","context":"/pizza/1","provider":"cook"}`,
	}, {
		"acme-admin", "/v1/applications", applicationUUID, 6001,
		`{"id":6001,"uuid":"` + applicationUUID + `","name":"Shop","owner":"alice","policy":"10PerMin"}`,
		`{"tenant":{"domain":"acme.com"},"id":6001,"uuid":"` + applicationUUID + `","name":"Shop 2","owner":"alice","token_type":"OAUTH",
		  "groups":["sales"],"attributes":{"cost center":"42"}}`,
		`{"name":"Shop 2","owner":"alice"}`,
	}, {
		"acme-admin", keysOfApplication, keyUUID, 7001,
		`{"id":7001,"uuid":"` + keyUUID + `","key_type":"SANDBOX","key_manager":"idp","consumer_key":"shop-1","generate":false}`,
		"", "",
	}, {
		"acme-admin", "/v1/subscriptions", subUUID, 8001,
		`{"id":8001,"uuid":"` + subUUID + `","application":{"uuid":"` + applicationUUID + `"},"api":{"id":5001},"policy":"Gold"}`,
		`{"application":{"id":6001},"api":{"uuid":"` + apiUUID + `"},"state":"BLOCKED"}`,
		`{}`,
	},
}

// populate makes what lives have.
func (w *world) populate() {
	w.t.Helper()
	for _, l := range lives {
		w.must(http.StatusCreated, l.who, "POST", l.path, l.create)
	}
}

func TestLife(t *testing.T) {
	t.Parallel()
	w := &transcript{world: newWorld(t)}
	begin := len(w.events(0))
	expect := func(a response, status int) response {
		t.Helper()
		if a.status != status {
			t.Fatalf("status %d, want %d: %s", a.status, status, a.body)
		}
		if status != http.StatusNotFound && a.header.Get("Cache-Control") != "no-store" {
			t.Errorf("Cache-Control is %q", a.header.Get("Cache-Control"))
		}
		return a
	}
	tags := make(map[string]string)
	for _, l := range lives {
		one := l.path + "/" + l.uuid
		made := expect(w.do(l.who, "POST", l.path, l.create), 201)
		if at := made.header.Get("Location"); at != one {
			t.Errorf("Location is %q, want %q", at, one)
		}
		for _, path := range []string{one, l.path + "/" + strconv.Itoa(l.id)} {
			got := w.must(200, l.who, "GET", path, "")
			if got.body != made.body || got.etag() != made.etag() {
				t.Errorf("GET %s: %s %s, want what was made: %s %s", path, got.etag(), got.body, made.etag(), made.body)
			}
		}
		for _, known := range []string{made.etag(), "W/" + made.etag(), `"1", ` + made.etag(), "*"} {
			if a := w.must(304, l.who, "GET", one, "", "If-None-Match", known); a.body != "" || a.etag() != made.etag() {
				t.Errorf("304 with %q and ETag %s", a.body, a.etag())
			}
		}
		w.must(200, l.who, "GET", one, "", "If-None-Match", `"1"`)
		if a := w.must(200, l.who, "HEAD", one, ""); a.body != "" || a.etag() != made.etag() {
			t.Errorf("HEAD with %q and ETag %s", a.body, a.etag())
		}
		var page struct{ Items []json.RawMessage }
		w.must(200, l.who, "GET", l.path, "").into(t, &page)
		if !slices.ContainsFunc(page.Items, func(item json.RawMessage) bool { return string(item) == made.body }) {
			t.Errorf("GET %s has not %s", l.path, made.body)
		}
		tags[one] = made.etag()
	}
	for _, l := range lives {
		one := l.path + "/" + l.uuid
		for _, body := range []string{l.replace, l.least} {
			if body == "" {
				if a := w.must(405, l.who, "PUT", one, `{}`); !strings.Contains(strings.Join(a.header.Values("Allow"), ","), "DELETE") {
					t.Errorf("Allow is %q", a.header.Values("Allow"))
				}
				continue
			}
			before := tags[one]
			a := expect(w.do(l.who, "PUT", one, body, "If-Match", before), 200)
			if got := w.must(200, l.who, "GET", one, ""); got.body != a.body || got.etag() != a.etag() || a.etag() == before {
				t.Errorf("GET %s: %s %s, want what was answered: %s %s", one, got.etag(), got.body, a.etag(), a.body)
			}
			tags[one] = a.etag()
			w.must(412, l.who, "PUT", one, body, "If-Match", before)
			w.must(412, l.who, "DELETE", one, "", "If-Match", before)
		}
		w.must(405, l.who, "PATCH", one, `{}`, "If-Match", tags[one])
		w.must(428, l.who, "DELETE", one, "")
	}
	for _, l := range slices.Backward(lives) {
		one := l.path + "/" + l.uuid
		match := tags[one]
		w.age()
		if l.path == "/v1/subscriptions" {
			match = "*"
		}
		if a := expect(w.do(l.who, "DELETE", one, "", "If-Match", match), 204); a.body != "" {
			t.Errorf("204 with %q", a.body)
		}
		if l.path != keysOfApplication { // whose application goes after it
			w.must(404, l.who, "GET", one, "")
			w.must(404, l.who, "DELETE", one, "", "If-Match", match)
		}
	}
	for _, event := range w.events(begin) {
		fmt.Fprintln(&w.out, event)
	}
	w.golden("life")
}

// Every route for every kind of account: the table that the router is made from is true.
func TestAccess(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.populate()
	routes := make(map[string]bool)
	for _, route := range Access() {
		routes[route.Method+" "+route.Pattern] = true
	}
	walked := make(map[string]bool)
	err := chi.Walk(w.router, func(method, pattern string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		walked[method+" "+pattern] = true
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(routes, walked); diff != "" {
		t.Errorf("the router has other routes than Access says:\n%s", diff)
	}
	if len(routes) != len(Access()) {
		t.Errorf("%d routes are in Access, and %d different ones", len(Access()), len(routes))
	}

	// A path for each pattern, of something that acme.com has. carbon.super has none of it.
	paths := map[string]string{}
	bodies := map[string]string{}
	for _, l := range lives {
		collection := strings.Replace(l.path, "/policies/subscription", "/policies/{kind}", 1)
		item := collection + "/{id}"
		if l.path == keysOfApplication {
			collection = keysPath
			item = collection + "/{key}"
		}
		if strings.Contains(l.path, "/policies/") && l.uuid != subPolicyUUID {
			continue
		}
		uuid := l.uuid
		paths[collection], paths[item] = l.path, l.path+"/"+uuid
		bodies["POST "+collection], bodies["PUT "+item] = l.create, l.replace
	}
	application := "/v1/applications/" + applicationUUID
	paths[applicationsPath+"/{id}/block"] = application + "/block"
	paths[applicationsPath+"/{id}/unblock"] = application + "/unblock"
	paths[keysPath+"/{key}/rotate"] = keysOfApplication + "/" + keyUUID + "/rotate"
	paths[applicationsPath+"/{id}/claims"] = application + "/claims"
	paths[auditPath] = auditPath

	before := w.state()
	for _, route := range Access() {
		path, ok := paths[route.Pattern]
		if !ok {
			t.Errorf("there is no path for %s", route.Pattern)
			continue
		}
		body := bodies[route.Method+" "+route.Pattern]
		try := func(who string, want ...int) response {
			t.Helper()
			a := w.do(who, route.Method, path, body, "If-Match", "*")
			if !slices.Contains(want, a.status) {
				t.Errorf("%s %s as %q: status %d, want %v: %s", route.Method, path, who, a.status, want, a.body)
			}
			if a.status >= 400 && a.header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("%s %s as %q: %s", route.Method, path, who, a.header.Get("Content-Type"))
			}
			return a
		}
		if a := try("", 401); a.header.Get("WWW-Authenticate") == "" {
			t.Errorf("%s %s: 401 without a challenge", route.Method, path)
		}
		if slices.Contains(route.Roles, "gateway") {
			try("gateway", 200)
		} else {
			try("gateway", 403)
		}
		try("notifier", 403)
		read := route.Method == http.MethodGet
		for _, who := range []string{"auditor", "acme-auditor", "wide-auditor"} {
			if !read {
				try(who, 403)
			}
		}
		if strings.HasPrefix(route.Pattern, "/v1/tenants") && !read {
			try("super-admin", 403)
			try("acme-admin", 403)
			try("wide-admin", 403)
			continue
		}
		if strings.HasPrefix(route.Pattern, "/v1/key-managers") && (route.Method == http.MethodPost || route.Method == http.MethodDelete) {
			try("super-admin", 403)
			try("acme-admin", 403)
			try("wide-admin", 403)
			continue
		}
		switch {
		case read && !strings.Contains(strings.TrimPrefix(route.Pattern, "/v1/policies/{kind}"), "{"): // a list of everything
			for _, who := range []string{"super-admin", "auditor"} {
				if a := try(who, 200); strings.Contains(a.body, "acme.com") || strings.Contains(a.body, "globex.com") {
					t.Errorf("GET %s as %s has another tenant: %s", path, who, a.body)
				}
				if strings.HasPrefix(path, "/v1/tenants") {
					continue
				}
				if a := w.must(200, who, "GET", path+"?tenant=acme.com", ""); a.body != `{"items":[]}` {
					t.Errorf("GET %s?tenant=acme.com as %s: %s", path, who, a.body)
				}
			}
		case route.Method == http.MethodPost && !strings.Contains(strings.TrimPrefix(route.Pattern, "/v1/policies/{kind}"), "{"):
			body = strings.Replace(body, "{", `{"tenant":{"domain":"acme.com"},`, 1)
			try("super-admin", 400, 404)
		default: // the walk is over what acme.com has
			try("super-admin", 404)
			if read {
				try("auditor", 404)
			}
		}
		if read {
			try("acme-auditor", 200, 404)
			try("wide-auditor", 200)
			try("admin", 200)
			try("acme-admin", 200, 404)
		}
	}
	if diff := cmp.Diff(before, w.state()); diff != "" {
		t.Errorf("a request that was refused has changed something:\n%s", diff)
	}
}

func TestAdminOfAllTenantsReadsButAdministersOne(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	made := w.must(201, "super-admin", "POST", "/v1/scopes", `{"name":"read"}`)
	at := made.header.Get("Location")
	w.must(404, "wide-admin", "GET", at, "")
	w.must(404, "wide-admin", "DELETE", at, "", "If-Match", made.etag())
	w.must(204, "admin", "DELETE", at, "", "If-Match", made.etag())
	// An admin names the tenant; its own is the default.
	var scope catalog.Scope
	w.must(201, "admin", "POST", "/v1/scopes", `{"name":"a","tenant":{"id":7}}`).into(t, &scope)
	if scope.Tenant != acme {
		t.Errorf("tenant %v, want %v", scope.Tenant, acme)
	}
	w.must(201, "admin", "POST", "/v1/scopes", `{"name":"a"}`).into(t, &scope)
	if scope.Tenant.ID != -1234 {
		t.Errorf("tenant %v, want the account's own", scope.Tenant)
	}
	// A subscription has its application's.
	w.must(201, "acme-admin", "POST", "/v1/apis", `{"id":1,"name":"Pizza","version":"1","context":"/pizza/1","provider":"a"}`)
	w.must(201, "acme-admin", "POST", "/v1/applications", `{"id":1,"name":"Shop","owner":"alice"}`)
	var sub catalog.Subscription
	w.must(201, "admin", "POST", "/v1/subscriptions", `{"application":{"id":1},"api":{"id":1}}`).into(t, &sub)
	if sub.Tenant != acme {
		t.Errorf("tenant %v, want %v", sub.Tenant, acme)
	}
}

// An auditor reads the tenants that it was given, and no others; an admin administers its own.
func TestExtraTenants(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.populate()
	w.must(201, "admin", "POST", "/v1/scopes", `{"id":4002,"name":"theirs","tenant":{"domain":"globex.com"}}`)
	for _, l := range lives {
		one := l.path + "/" + l.uuid
		if l.path == "/v1/tenants" { // globex.com
			w.must(404, "two-auditor", "GET", one, "")
			continue
		}
		w.must(200, "two-auditor", "GET", one, "")
		w.must(404, "two-admin", "GET", one, "")
		list := l.path
		if list != keysOfApplication {
			if a := w.must(200, "two-auditor", "GET", list, ""); strings.Contains(a.body, l.uuid) {
				t.Errorf("GET %s has another tenant: %s", list, a.body)
			}
			list += "?tenant=acme.com"
			if a := w.must(200, "two-admin", "GET", list, ""); a.body != `{"items":[]}` {
				t.Errorf("GET %s as an admin of another tenant: %s", list, a.body)
			}
		}
		if a := w.must(200, "two-auditor", "GET", list, ""); !strings.Contains(a.body, l.uuid) {
			t.Errorf("GET %s has not %s: %s", list, l.uuid, a.body)
		}
	}
	for path, want := range map[string]int{"/v1/tenants?name=acme.com": 1, "/v1/tenants?name=globex.com": 0, "/v1/tenants": 1, "/v1/scopes?tenant=globex.com": 0} {
		var page struct{ Items []json.RawMessage }
		if w.must(200, "two-auditor", "GET", path, "").into(t, &page); len(page.Items) != want {
			t.Errorf("GET %s: %d items, want %d", path, len(page.Items), want)
		}
	}
	w.must(404, "two-auditor", "GET", "/v1/scopes/4002", "")
}

// A tenant's admin decides what is done with an issuer's tokens, not which are believed.
func TestKeyManagerOfATenantAdmin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.populate()
	const at = "/v1/key-managers/2001"
	body := func(member string) string {
		return `{"name":"idp","iss":"https://idp.acme.com","max_token_lifetime":600,"enabled":false,"token_type":"BOTH",
			"jwks_uri":"https://idp.acme.com/jwks",` + member + `}`
	}
	before := w.state()
	for _, tt := range []struct{ who, body, pointer, detail string }{
		{"acme-admin", strings.Replace(body(`"properties":{"a":[1,{"b":"c"}]}`), "//idp.acme.com/jwks", "//10.0.0.1/jwks", 1), "#/jwks_uri", "those who see all tenants"},
		{"acme-admin", body(`"properties":{"introspection_endpoint":"https://10.0.0.1/"}`), "#/properties", "those who see all tenants"},
		{"admin", body(`"properties":{"certificate_value":"LS0t"}`), "#/properties/certificate_value", "must be left out"},
	} {
		a := w.must(400, tt.who, "PUT", at, tt.body, "If-Match", "*")
		if !strings.Contains(a.body, `"`+tt.pointer+`"`) || !strings.Contains(a.body, tt.detail) {
			t.Errorf("%s: %s", tt.pointer, a.body)
		}
	}
	if diff := cmp.Diff(before, w.state()); diff != "" {
		t.Errorf("it has changed something:\n%s", diff)
	}
	w.must(200, "acme-admin", "PUT", at, body(`"properties":{"a":[1,{"b":"c"}]}`), "If-Match", "*")
}

// The table of bad input: each is a clear problem, and nothing has changed.
func TestBadInput(t *testing.T) {
	t.Parallel()
	w := &transcript{world: newWorld(t)}
	w.populate()
	// What carbon.super has, to be referred to from acme.com.
	w.must(201, "super-admin", "POST", "/v1/apis", `{"id":5999,"name":"Ours","version":"1","context":"/ours/1","provider":"admin"}`)
	w.must(201, "super-admin", "POST", "/v1/applications", `{"id":6999,"name":"Ours","owner":"bob"}`)
	w.must(201, "acme-admin", "POST", "/v1/applications", `{"id":6998,"name":"Other","owner":"alice"}`)
	const (
		application = "/v1/applications/" + applicationUUID
		who         = "acme-admin"
	)
	mega := strings.Repeat("x", 1<<20)
	stale := `"1"`
	scopes := w.must(200, who, "GET", "/v1/policies/subscription?limit=1", "")
	var page struct {
		NextCursor string `json:"next_cursor"`
	}
	scopes.into(t, &page)
	if page.NextCursor == "" {
		t.Fatal("one policy is a whole list")
	}
	cursor := url.QueryEscape(page.NextCursor)

	for _, tt := range []struct {
		name, method, path, body string
		status                   int
		header                   []string
	}{
		{"no body", "POST", "/v1/scopes", "", 415, nil},
		{"empty body", "POST", "/v1/scopes", " ", 400, nil},
		{"no JSON", "POST", "/v1/scopes", "name: read", 400, nil},
		{"an array", "POST", "/v1/scopes", `[{"name":"read"}]`, 400, nil},
		{"a form", "POST", "/v1/scopes", "name=read", 415, []string{"Content-Type", "application/x-www-form-urlencoded"}},
		{"C104 a content coding", "POST", "/v1/applications", "x", 415, []string{"Content-Encoding", "gzip"}},
		{"unknown members", "POST", "/v1/scopes", `{"name":"read","Name":"x","rolls":[]}`, 400, nil},
		{"a member twice", "POST", "/v1/scopes", `{"name":"read","name":"write"}`, 400, nil},
		{"what only the service sets", "POST", "/v1/applications", `{"name":"a","owner":"b","timestamp":1,"blocked":true}`, 400, nil},
		{"what only the service sets of a subscription", "POST", "/v1/subscriptions",
			`{"application":{"id":6998},"api":{"id":5001},"application_blocked":true}`, 400, nil},
		{"what only the service sets of a key manager", "POST", "/v1/key-managers",
			`{"name":"a","iss":"https://a.example","max_token_lifetime":60,"resident":true}`, 400, nil},
		{"what only the service sets of a key", "POST", keysOfApplication, `{"iss":"https://a.example","generated":true,"application":{"id":6998}}`, 400, nil},
		{"other types", "POST", "/v1/apis", `{"name":1,"version":["1"],"context":{},"provider":null,"default_version":"yes","operations":[{"target":true}]}`, 400, nil},
		{"an id that is no number", "POST", "/v1/scopes", `{"id":"12","name":"read"}`, 400, nil},
		{"an id that is too large", "POST", "/v1/scopes", `{"id":2147483648,"name":"read"}`, 400, nil},
		{"a negative id", "POST", "/v1/scopes", `{"id":-5,"name":"read"}`, 400, nil},
		{"a UUID that is none", "POST", "/v1/scopes", `{"uuid":"nope","name":"read"}`, 400, nil},
		{"members that must be there", "POST", "/v1/apis", `{}`, 400, nil},
		{"members with bad values", "POST", "/v1/policies/api", `{"name":"x","quota_type":"coins","quota":-1,"level":"floor","graphql_max_depth":1}`, 400, nil},
		{"control characters", "POST", "/v1/scopes", `{"name":"re\u0000ad","description":"a\u0007b"}`, 400, nil},
		{"a name of 1 MB", "POST", "/v1/applications", `{"owner":"alice","name":"` + mega[:1<<20-100] + `"}`, 400, nil},
		{"a body of more than 1 MB", "POST", "/v1/applications", `{"owner":"alice","name":"` + mega + `"}`, 413, nil},
		{"a name that is taken", "POST", "/v1/applications", `{"name":"Shop","owner":"alice"}`, 409, nil},
		{"an id that is taken", "POST", "/v1/scopes", `{"id":4001,"name":"read"}`, 409, nil},
		{"a UUID that is taken", "POST", "/v1/scopes", `{"uuid":"` + scopeUUID + `","name":"read"}`, 409, nil},
		{"a context that is taken", "POST", "/v1/apis", `{"name":"Pasta","version":"1","context":"/pizza/1.0.0","provider":"admin"}`, 409, nil},
		{"an issuer that another tenant has", "POST", "/v1/key-managers", `{"tenant":{"domain":"acme.com"},"name":"x","iss":"` + iss + `","max_token_lifetime":60}`, 409, nil},
		{"an issuer below our own", "POST", "/v1/key-managers", `{"name":"x","iss":"` + iss + `/t1","max_token_lifetime":60}`, 409, nil},
		{"properties that a gateway falls over", "POST", "/v1/key-managers",
			`{"name":"x","iss":"https://x.example","max_token_lifetime":60,"jwks_uri":"https://x.example/?k=1","properties":{"enable_token_hash":"no","a":[null]}}`, 400, nil},
		{"a subscription that is there", "POST", "/v1/subscriptions", `{"application":{"id":6001},"api":{"id":5001}}`, 409, nil},
		{"a subscription to nothing", "POST", "/v1/subscriptions", `{"application":{"id":6998},"api":{"id":99999}}`, 400, nil},
		{"a subscription of nothing", "POST", "/v1/subscriptions", `{}`, 400, nil},
		{"an API of another tenant", "POST", "/v1/subscriptions", `{"application":{"id":6998},"api":{"id":5999}}`, 400, nil},
		{"an application of another tenant", "POST", "/v1/subscriptions", `{"application":{"id":6999},"api":{"id":5001}}`, 400, nil},
		{"an application named twice", "POST", "/v1/subscriptions", `{"application":{"id":6001,"uuid":"` + apiUUID + `"},"api":{"id":5001}}`, 400, nil},
		{"a policy that is not there", "POST", "/v1/applications", `{"name":"a","owner":"b","policy":"Platinum"}`, 400, nil},
		{"a scope that is not there", "POST", "/v1/apis",
			`{"name":"a","version":"1","context":"/a/1","provider":"b","operations":[{"target":"/","verb":"GET","scopes":["nope"]}]}`, 400, nil},
		{"another tenant", "POST", "/v1/scopes", `{"name":"read","tenant":{"domain":"carbon.super"}}`, 400, nil},
		{"a tenant that is not there", "POST", "/v1/scopes", `{"name":"read","tenant":{"domain":"initech.com"}}`, 400, nil},
		{"a tenant with two names", "POST", "/v1/scopes", `{"name":"read","tenant":{"domain":"acme.com","id":-1234}}`, 400, nil},
		{"another kind than the path's", "POST", "/v1/policies/application", `{"kind":"api","name":"x"}`, 400, nil},
		{"a kind that there is not", "GET", "/v1/policies/custom", "", 404, nil},
		{"a policy of another kind", "GET", "/v1/policies/api/" + subPolicyUUID, "", 404, nil},
		{"C115 no If-Match", "PUT", application, `{"name":"Shop","owner":"alice"}`, 428, nil},
		{"C115 a stale If-Match", "PUT", application, `{"name":"Shop","owner":"alice"}`, 412, []string{"If-Match", stale}},
		{"a weak If-Match", "PUT", application, `{"name":"Shop","owner":"alice"}`, 412, []string{"If-Match", `W/"1"`}},
		{"an If-Match that is none", "DELETE", application, "", 412, []string{"If-Match", "yes"}},
		{"a stale If-Match on delete", "DELETE", application, "", 412, []string{"If-Match", stale}},
		{"a stale If-Match on block", "POST", application + "/block", "", 412, []string{"If-Match", stale}},
		{"a stale If-Match on rotate", "POST", keysOfApplication + "/7001/rotate", "", 412, []string{"If-Match", stale}},
		{"another id", "PUT", application, `{"id":6998,"name":"Shop","owner":"alice"}`, 409, []string{"If-Match", "*"}},
		{"another UUID", "PUT", application, `{"uuid":"` + apiUUID + `","name":"Shop","owner":"alice"}`, 409, []string{"If-Match", "*"}},
		{"another tenant on replace", "PUT", application, `{"tenant":{"domain":"carbon.super"},"name":"Shop","owner":"alice"}`, 409, []string{"If-Match", "*"}},
		{"what never changes", "PUT", "/v1/apis/" + apiUUID, `{"name":"Pasta","version":"1.0.0","context":"/pizza/1.0.0","provider":"admin"}`, 409, []string{"If-Match", "*"}},
		{"a lower lifetime", "PUT", "/v1/key-managers/2001", `{"name":"idp","iss":"https://idp.acme.com","max_token_lifetime":60}`, 409, []string{"If-Match", "*"}},
		{"a name that is taken on replace", "PUT", "/v1/applications/6998", `{"name":"Shop","owner":"alice"}`, 409, []string{"If-Match", "*"}},
		{"blocked by replace", "PUT", application, `{"name":"Shop","owner":"alice","blocked":true}`, 400, []string{"If-Match", "*"}},
		{"a policy in use by an application", "DELETE", "/v1/policies/application/" + appPolicyUUID, "", 409, []string{"If-Match", "*"}},
		{"a policy in use by a subscription", "DELETE", "/v1/policies/subscription/" + subPolicyUUID, "", 409, []string{"If-Match", "*"}},
		{"a policy in use by an API", "DELETE", "/v1/policies/api/" + apiPolicyUUID, "", 409, []string{"If-Match", "*"}},
		{"a scope in use", "DELETE", "/v1/scopes/" + scopeUUID, "", 409, []string{"If-Match", "*"}},
		{"an API in use", "DELETE", "/v1/apis/" + apiUUID, "", 409, []string{"If-Match", "*"}},
		{"a key manager in use", "DELETE", "/v1/key-managers/" + keyManagerUUID, "", 409, []string{"If-Match", "*"}},
		{"nothing of this UUID", "GET", "/v1/apis/" + applicationUUID, "", 404, nil},
		{"nothing of this id", "GET", "/v1/apis/6001", "", 404, nil},
		{"no id at all", "GET", "/v1/apis/a%00b%2Fc", "", 404, nil},
		{"an id beyond all", "GET", "/v1/apis/99999999999999999999", "", 404, nil},
		{"another tenant's", "GET", "/v1/apis/5999", "", 404, nil},
		{"the keys of another tenant's application", "GET", "/v1/applications/6999/keys", "", 404, nil},
		{"the key of another application", "GET", "/v1/applications/6998/keys/7001", "", 404, nil},
		{"rotate the key of another application", "POST", "/v1/applications/6998/keys/7001/rotate", "", 404, nil},
		{"rotate a mapped key", "POST", keysOfApplication + "/7001/rotate", "{}", 409, nil},
		{"a mapped key with a client", "POST", keysOfApplication,
			`{"generate":false,"key_manager":"idp","consumer_secret":"s","auth_method":"none","scopes":["a"],"default_scopes":["a"],"audience":["a"],
			  "token_lifetime":1,"revoke_by_jti":true,"revoke_opaque":true,"revoke_quota":1}`, 400, nil},
		{"a mapped key with more of a client", "POST", keysOfApplication,
			`{"generate":false,"key_manager":"idp","consumer_key":"x","jwks":{},"grant_types":[],"token_typ":"JWT","resource_audiences":["a"]}`, 400, nil},
		{"a consumer key that is taken", "POST", keysOfApplication, `{"generate":false,"key_manager":"idp","consumer_key":"shop-1"}`, 409, nil},
		{"a key of no key manager", "POST", keysOfApplication, `{"generate":false,"key_manager":"nope","consumer_key":"x"}`, 400, nil},
		{"a client with bad settings", "POST", keysOfApplication,
			`{"key_manager":"idp","key_type":"TEST","auth_method":"private_key_jwt","default_scopes":["b"],"token_lifetime":4000,"revoke_quota":-1}`, 400, nil},
		{"a client with keys that are none", "POST", keysOfApplication,
			`{"key_manager":"idp","auth_method":"private_key_jwt","consumer_secret":"s","jwks":{"keys":[{"kty":"oct","k":"eHh4"}]}}`, 400, nil},
		{"a client with keys that are no object", "POST", keysOfApplication, `{"key_manager":"idp","auth_method":"private_key_jwt","jwks":"eyJrZXlzIjpbXX0"}`, 400, nil},
		{"a client with keys that are said twice", "POST", keysOfApplication, `{"jwks":{"keys":[{"kty":"EC","kty":"RSA"}]}}`, 400, nil},
		{"a client with other tokens", "POST", keysOfApplication,
			`{"key_manager":"idp","grant_types":["password"],"token_typ":"at-jwt","resource_audiences":[""]}`, 400, nil},
		{"a secret that is too long", "POST", keysOfApplication, `{"key_manager":"idp","consumer_secret":"` + mega[:2000] + `"}`, 400, nil},
		{"block with unknown members", "POST", application + "/block", `{"revoke_token":false}`, 400, nil},
		{"unblock with members", "POST", application + "/unblock", `{"revoke_tokens":true}`, 400, nil},
		{"a parameter misspelt", "DELETE", application + "?revoke_token=false", "", 400, []string{"If-Match", "*"}},
		{"a parameter of another value", "DELETE", application + "?revoke_tokens=no", "", 400, []string{"If-Match", "*"}},
		{"a parameter twice", "DELETE", application + "?revoke_tokens=true&revoke_tokens=false", "", 400, []string{"If-Match", "*"}},
		{"a parameter where there is none", "PUT", application + "?dry_run=1", `{"name":"Shop","owner":"alice"}`, 400, []string{"If-Match", "*"}},
		{"a query that is none", "POST", "/v1/scopes?%zz", `{"name":"read"}`, 400, nil},
		{"C100 a cursor that is garbage", "GET", "/v1/applications?cursor=garbage", "", 400, nil},
		{"C100 a cursor of another list", "GET", "/v1/policies/application?cursor=" + cursor, "", 400, nil},
		{"C100 a cursor of another query", "GET", "/v1/policies/subscription?name=Gold&cursor=" + cursor, "", 400, nil},
		{"C100 a limit that is too large", "GET", "/v1/applications?limit=1001", "", 400, nil},
		{"a filter that there is not", "GET", "/v1/applications?owner=alice", "", 400, nil},
		{"a filter that is no UUID", "GET", "/v1/subscriptions?application=Shop", "", 400, nil},
		{"a filter with a NUL", "GET", "/v1/scopes?name=a%00", "", 400, nil},
		{"a filter that is no domain", "GET", "/v1/scopes?tenant=ACME", "", 400, nil},
		{"claims of another tenant's application", "GET", "/v1/applications/6999/claims", "", 404, nil},
		{"claims of nothing", "GET", "/v1/applications/" + apiUUID + "/claims", "", 404, nil},
		{"claims of a key type that there is not", "GET", application + "/claims?key_type=production", "", 400, nil},
		{"claims of a key that there is not", "GET", application + "/claims?consumer_key=shop-2", "", 404, nil},
		{"claims of another application's key", "GET", "/v1/applications/6998/claims?consumer_key=shop-1", "", 404, nil},
		{"claims of a key of another type", "GET", application + "/claims?consumer_key=shop-1&key_type=PRODUCTION", "", 400, nil},
		{"claims with a NUL", "GET", application + "/claims?consumer_key=%00", "", 400, nil},
		{"claims with another parameter", "GET", application + "/claims?keytype=SANDBOX", "", 400, nil},
		{"C100 audit with a cursor of another list", "GET", "/v1/audit?cursor=" + cursor, "", 400, nil},
		{"audit by what is no filter", "GET", "/v1/audit?reason=x", "", 400, nil},
		{"audit from when is no time", "GET", "/v1/audit?from=2026-11-20", "", 400, nil},
		{"audit of no time", "GET", "/v1/audit?from=2026-11-20T21:10:00Z&to=2026-11-20T22:10:00%2B01:00", "", 400, nil},
		{"audit of what is no UUID", "GET", "/v1/audit?entity_id=6001", "", 400, nil},
		{"audit with a control character", "GET", "/v1/audit?actor=%0a", "", 400, nil},
		{"an idempotency key that is none", "POST", "/v1/scopes", `{"name":"read"}`, 400, []string{"Idempotency-Key", `"`}},
		{"C114 an unknown path", "GET", "/v1/applications/6001/tokens", "", 404, []string{"Accept", "application/json"}},
	} {
		before := w.state()
		fmt.Fprintf(&w.out, "# %s\n", tt.name)
		by := who
		if strings.HasPrefix(tt.path, "/v1/key-managers") {
			by = "admin"
		}
		a := w.do(by, tt.method, tt.path, tt.body, tt.header...)
		if a.status != tt.status {
			t.Errorf("%s: status %d, want %d: %s", tt.name, a.status, tt.status, a.body)
		}
		if a.header.Get("Content-Type") != "application/problem+json" || a.header.Get("Cache-Control") != "no-store" || strings.Contains(a.body, "xxx") {
			t.Errorf("%s: %v %s", tt.name, a.header, a.body)
		}
		if diff := cmp.Diff(before, w.state()); diff != "" {
			t.Errorf("%s has changed something:\n%s", tt.name, diff)
		}
	}
	w.golden("badinput")
}

// C099: every row that is there throughout is seen exactly once, whatever else changes.
func TestPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const rows = 11
	for i := range rows {
		w.must(201, "super-admin", "POST", "/v1/applications", fmt.Sprintf(`{"name":"app %d","owner":"alice"}`, i))
	}
	w.must(201, "acme-admin", "POST", "/v1/applications", `{"name":"theirs","owner":"alice"}`)
	type page struct {
		Items      []catalog.Application
		NextCursor *string `json:"next_cursor"`
	}
	follow := func(who, path string, between func(page)) (names []string) {
		t.Helper()
		for path != "" {
			a := w.must(200, who, "GET", path, "")
			var p page
			a.into(t, &p)
			for _, app := range p.Items {
				names = append(names, app.Name)
			}
			link := a.header.Get("Link")
			if (link == "") != (p.NextCursor == nil) {
				t.Errorf("Link %q with cursor %v", link, p.NextCursor)
			}
			path, _, _ = strings.Cut(strings.TrimPrefix(link, "<"), `>; rel="next"`)
			if between != nil {
				between(p)
			}
		}
		return names
	}
	seen := make(map[string]int)
	for n, name := range follow("super-admin", "/v1/applications?limit=2", func(p page) {
		last := p.Items[len(p.Items)-1] // the row that the cursor stands at goes, and new ones come
		w.must(204, "super-admin", "DELETE", "/v1/applications/"+last.UUID, "", "If-Match", "*")
		w.must(201, "super-admin", "POST", "/v1/applications", `{"name":"new `+last.UUID+`","owner":"alice"}`)
		if len(p.Items) > 1 && strings.HasPrefix(p.Items[0].Name, "new") {
			w.must(204, "super-admin", "DELETE", "/v1/applications/"+p.Items[0].UUID, "", "If-Match", "*")
		}
	}) {
		if n > 4*rows {
			t.Fatal("the pages do not end")
		}
		seen[name]++
	}
	for i := range rows {
		if n := seen[fmt.Sprintf("app %d", i)]; n != 1 {
			t.Errorf("app %d was seen %d times", i, n)
		}
	}
	if seen["theirs"] != 0 {
		t.Error("another tenant's is in the list")
	}
	if names := follow("admin", "/v1/applications?limit=1000&tenant=acme.com", nil); !slices.Equal(names, []string{"theirs"}) {
		t.Errorf("acme.com has %q", names)
	}
	if names := follow("admin", "/v1/applications?name=theirs", nil); !slices.Equal(names, []string{"theirs"}) {
		t.Errorf("named theirs: %q", names)
	}
	// The tenants, whose first id is negative, one by one.
	var domains []string
	for path := "/v1/tenants?limit=1"; path != ""; {
		a := w.must(200, "admin", "GET", path, "")
		var p struct{ Items []catalog.Tenant }
		a.into(t, &p)
		domains = append(domains, p.Items[0].Meta.Tenant.Domain)
		path, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), `>; rel="next"`)
	}
	if !slices.Equal(domains, []string{"carbon.super", "acme.com"}) {
		t.Errorf("tenants %q", domains)
	}
}

func TestFilters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.populate()
	w.must(201, "acme-admin", "POST", "/v1/applications", `{"id":6998,"name":"Other","owner":"alice"}`)
	w.must(201, "acme-admin", "POST", "/v1/subscriptions", `{"id":8998,"application":{"id":6998},"api":{"id":5001}}`)
	for path, want := range map[string][]int32{
		"/v1/subscriptions?application=" + applicationUUID:                     {8001},
		"/v1/subscriptions?api=" + apiUUID:                                     {8001, 8998},
		"/v1/subscriptions?api=" + applicationUUID:                             nil,
		"/v1/subscriptions?tenant=carbon.super":                                nil,
		"/v1/subscriptions?limit=1&application=" + applicationUUID:             {8001},
		"/v1/policies/api?name=Slow":                                           {3003},
		"/v1/policies/api?name=Gold":                                           nil,
		"/v1/policies/application?name=10PerMin&tenant=acme.com&limit=1":       {3002},
		keysOfApplication + "?consumer_key=shop-1":                             {7001},
		keysOfApplication + "?consumer_key=shop-2":                             nil,
		"/v1/applications/6998/keys":                                           nil,
		"/v1/applications?name=Shop":                                           {6001},
		"/v1/applications?name=shop":                                           nil,
		"/v1/apis?name=Pizza":                                                  {5001},
		"/v1/scopes?name=order":                                                {4001},
		"/v1/key-managers?name=idp":                                            {2001},
		"/v1/key-managers?name=" + url.QueryEscape("x' OR '1'='1"):             nil,
		"/v1/subscriptions?application=" + applicationUUID + "&api=" + apiUUID: {8001},
	} {
		var page struct{ Items []catalog.Meta }
		w.must(200, "acme-admin", "GET", path, "").into(t, &page)
		var got []int32
		for _, m := range page.Items {
			got = append(got, m.ID)
		}
		if !slices.Equal(got, want) || page.Items == nil {
			t.Errorf("GET %s: %v, want %v", path, got, want)
		}
	}
}

// Of many who change the same version at once one does, and the others learn of it.
func TestConcurrentEdits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	made := w.must(201, "super-admin", "POST", "/v1/scopes", `{"name":"read"}`)
	at, events := made.header.Get("Location"), len(w.events(0))
	var group sync.WaitGroup
	var mu sync.Mutex
	statuses := make(map[int]int)
	for i := range 8 {
		group.Go(func() {
			a := w.do("super-admin", "PUT", at, fmt.Sprintf(`{"name":"read","description":"%d"}`, i), "If-Match", made.etag())
			mu.Lock()
			defer mu.Unlock()
			statuses[a.status]++
		})
	}
	group.Wait()
	if !maps.Equal(statuses, map[int]int{200: 1, 412: 7}) {
		t.Errorf("statuses %v, want one 200 and 412 for the others", statuses)
	}
	if got := w.events(events); !slices.Equal(got, []string{"scope.updated read"}) {
		t.Errorf("events %q", got)
	}
}

func TestIdempotency(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const (
		path = "/v1/applications"
		body = `{"name":"Shop","owner":"alice"}`
	)
	key := []string{"Idempotency-Key", `"8c1f"`}

	// C110
	first := w.must(201, "super-admin", "POST", path, body, key...)
	before := w.state()
	again := w.must(201, "super-admin", "POST", path, body, key...)
	if again.body != first.body || again.header.Get("Location") != first.header.Get("Location") || again.etag() != first.etag() ||
		again.header.Get("Idempotency-Replayed") != "true" || first.header.Get("Idempotency-Replayed") != "" {
		t.Errorf("again: %v %s, want %v %s", again.header, again.body, first.header, first.body)
	}
	// C111
	checkProblem(t, w.do("super-admin", "POST", path, `{"name":"Shop 2","owner":"alice"}`, key...), 422, "idempotency-key-reused")
	if diff := cmp.Diff(before, w.state()); diff != "" {
		t.Errorf("a repeat has changed something:\n%s", diff)
	}
	// The key is its caller's: another account's request is another one.
	w.must(201, "acme-admin", "POST", path, body, key...)

	// C112: the first waits for its tenant, which we hold.
	tx, err := w.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(t.Context()) //nolint:errcheck // after the commit it has nothing to do
	if _, err := tx.Exec(t.Context(), `SELECT FROM rescind.tenants WHERE id = -1234 FOR NO KEY UPDATE`); err != nil {
		t.Fatal(err)
	}
	const slow = `{"name":"Slow shop","owner":"alice"}`
	done := make(chan response)
	go func() { done <- w.do("super-admin", "POST", path, slow, "Idempotency-Key", `"slow"`) }()
	for waiting := false; !waiting; {
		err := w.pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM rescind.idempotency WHERE key = 'slow')`).Scan(&waiting)
		if err != nil {
			t.Fatal(err)
		}
	}
	checkProblem(t, w.do("super-admin", "POST", path, slow, "Idempotency-Key", `"slow"`), 409, "idempotency-in-progress")
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a := <-done; a.status != 201 {
		t.Errorf("status %d: %s", a.status, a.body)
	}
	w.must(201, "super-admin", "POST", path, slow, "Idempotency-Key", `"slow"`)

	// A generated secret comes again, and is not stored in the clear.
	var app catalog.Application
	first.into(t, &app)
	keys := path + "/" + app.UUID + "/keys"
	var one, two struct {
		ConsumerSecret string `json:"consumer_secret"`
	}
	w.must(201, "super-admin", "POST", keys, `{}`, key...).into(t, &one)
	w.must(201, "super-admin", "POST", keys, `{}`, key...).into(t, &two)
	if one.ConsumerSecret == "" || one != two {
		t.Error("the repeat has another secret, or none")
	}
	var clear bool
	err = w.pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM rescind.idempotency WHERE position($1::bytea IN body) > 0)`, []byte(one.ConsumerSecret)).Scan(&clear)
	if err != nil || clear {
		t.Errorf("the secret is stored in the clear: %t, %v", clear, err)
	}
}

// checkProblem checks a problem document of a type.
func checkProblem(t *testing.T, a response, status int, slug string) {
	t.Helper()
	var p struct {
		Type   string
		Status int
	}
	a.into(t, &p)
	if a.status != status || p.Status != status || p.Type != "https://rescindhq.github.io/problems/"+slug || a.header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("%d %s: %s, want %d %s", a.status, a.header.Get("Content-Type"), a.body, status, slug)
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	t.Parallel()
	_, err := New(Deps{})
	for _, part := range []string{"catalog", "replica", "audit", "accounts", "idempotency"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%v: want every mistake, also %s", err, part)
		}
	}
}
