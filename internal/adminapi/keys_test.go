package adminapi

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
)

// proves reports whether the service knows a client by this secret.
func (w *world) proves(id, secret string) bool {
	w.t.Helper()
	form := url.Values{"client_id": {id}, "client_secret": {secret}}
	r := httptest.NewRequestWithContext(w.t.Context(), "POST", "/oauth2/token", strings.NewReader(form.Encode()))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	_, _, err := w.authn.Form(httptest.NewRecorder(), r)
	return err == nil
}

func TestGeneratedKeys(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const who = "super-admin"
	var app catalog.Application
	w.must(201, who, "POST", "/v1/applications", `{"name":"Shop","owner":"alice"}`).into(t, &app)
	path := "/v1/applications/" + app.UUID + "/keys"
	type key struct {
		catalog.KeyMapping
		ConsumerSecret string `json:"consumer_secret"`
	}
	const settings = `"auth_method":"client_secret_post","scopes":["read","write"],"default_scopes":["read"],"audience":["https://api.example.com"],` +
		`"token_lifetime":60,"revoke_by_jti":true,"revoke_quota":5`

	var one, two, public key
	made := w.must(201, who, "POST", path, `{`+settings+`}`)
	made.into(t, &one)
	want := catalog.KeyMapping{
		Meta: one.Meta, Application: catalog.Ref{ID: app.ID, UUID: app.UUID}, ConsumerKey: one.ConsumerKey, KeyType: "PRODUCTION",
		KeyManager: "Resident Key Manager", Iss: iss, Generated: true,
	}
	if diff := cmp.Diff(want, one.KeyMapping); diff != "" || one.ConsumerKey == "" || len(one.ConsumerSecret) < 43 {
		t.Errorf("%s (-want +got):\n%s", made.body, diff)
	}
	if made.header.Get("Cache-Control") != "no-store" || made.header.Get("Location") != path+"/"+one.UUID || made.etag() == "" {
		t.Errorf("header %v", made.header)
	}
	w.must(201, who, "POST", path, `{"id":71,"uuid":"`+keyUUID+`","key_type":"SANDBOX","key_manager":"Resident Key Manager",
		"consumer_key":"mine","consumer_secret":"from before","auth_method":"client_secret_post"}`).into(t, &two)
	if two.ID != 71 || two.UUID != keyUUID || two.ConsumerKey != "mine" || two.ConsumerSecret != "from before" || two.KeyType != "SANDBOX" {
		t.Errorf("%+v is not what was given", two)
	}
	made = w.must(201, who, "POST", path, `{"consumer_key":"public","auth_method":"none"}`)
	made.into(t, &public)
	if strings.Contains(made.body, "consumer_secret") || !public.Generated {
		t.Errorf("a public client: %s", made.body)
	}
	if !w.proves(one.ConsumerKey, one.ConsumerSecret) || !w.proves("mine", "from before") || w.proves("mine", one.ConsumerSecret) {
		t.Error("the secrets are not those of the clients")
	}

	// Afterwards no secret is to be had.
	for _, at := range []string{path, path + "/" + one.UUID, path + "/71"} {
		if a := w.must(200, who, "GET", at, ""); strings.Contains(a.body, "secret") || strings.Contains(a.body, "from before") {
			t.Errorf("GET %s: %s", at, a.body)
		}
	}
	if state := w.state(); strings.Contains(state, one.ConsumerSecret) || strings.Contains(state, "from before") {
		t.Error("a secret is stored in the clear")
	}

	// Rotation: the two newest are valid, unless the previous one is ended.
	begin := len(w.events(0))
	rotate := func(body string) string {
		t.Helper()
		var rotated map[string]string
		a := w.must(200, who, "POST", path+"/"+one.UUID+"/rotate", body)
		a.into(t, &rotated)
		if len(rotated) != 2 || rotated["consumer_key"] != one.ConsumerKey || a.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%v %s", a.header, a.body)
		}
		return rotated["consumer_secret"]
	}
	valid := func(secrets ...string) []bool {
		t.Helper()
		var all []bool
		for _, s := range secrets {
			all = append(all, w.proves(one.ConsumerKey, s))
		}
		return all
	}
	second := rotate("")
	third := rotate(`{"consumer_secret":"the third"}`)
	if got := valid(one.ConsumerSecret, second, third); third != "the third" || !slices.Equal(got, []bool{false, true, true}) {
		t.Errorf("after two rotations the three secrets are valid: %v", got)
	}
	if got := w.events(begin); len(got) != 0 {
		t.Errorf("a rotation that ends nothing has events %q", got)
	}
	fourth := rotate(`{"end_previous":true,"revoke_tokens":false}`)
	if got := valid(second, third, fourth); !slices.Equal(got, []bool{false, false, true}) || len(w.events(begin)) != 0 {
		t.Errorf("after the previous was ended they are valid: %v", got)
	}
	fifth := rotate(`{"end_previous":true}`)
	if got := w.events(begin); !slices.Equal(got, []string{"revocation.client " + one.ConsumerKey}) || !slices.Equal(valid(fourth, fifth), []bool{false, true}) {
		t.Errorf("events %q", got)
	}
	checkProblem(t, w.do(who, "POST", path+"/"+public.UUID+"/rotate", ""), 400, "invalid-request")
	checkProblem(t, w.do(who, "POST", path+"/"+one.UUID+"/rotate", `{"consumer_secret":"`+strings.Repeat("x", 1025)+`"}`), 400, "invalid-request")
	w.must(200, who, "POST", path+"/"+two.UUID+"/rotate", "", "If-Match", `"`+fmt.Sprint(two.Timestamp)+`"`)

	// Deletion ends the key, and by default its tokens.
	var doomed key
	w.must(201, who, "POST", path, `{}`).into(t, &doomed)
	begin = len(w.events(0))
	w.must(204, who, "DELETE", path+"/"+doomed.UUID, "", "If-Match", "*")
	w.must(404, who, "DELETE", path+"/mine", "", "If-Match", "*") // a consumer key is no id
	w.must(204, who, "DELETE", path+"/71?revoke_tokens=false", "", "If-Match", `"`+fmt.Sprint(two.Timestamp)+`"`)
	if w.proves(doomed.ConsumerKey, doomed.ConsumerSecret) || w.proves("mine", "from before") {
		t.Error("a deleted key proves something")
	}
	wantEvents := []string{"key_mapping.deleted " + doomed.ConsumerKey, "revocation.client " + doomed.ConsumerKey, "key_mapping.deleted mine"}
	if got := w.events(begin); !slices.Equal(got, wantEvents) {
		t.Errorf("events %q, want %q", got, wantEvents)
	}
}

// Tokens that say themselves what they are good for end with what they are good for.
func TestSelfContained(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.populate()
	const (
		application = "/v1/applications/" + applicationUUID
		who         = "acme-admin"
	)
	selfContained := func(body string) bool {
		t.Helper()
		var app catalog.Application
		w.must(200, who, "PUT", application, body, "If-Match", "*")
		w.must(200, who, "GET", application, "").into(t, &app)
		return app.SelfContained
	}
	if selfContained(`{"name":"Shop","owner":"alice"}`) || !selfContained(`{"name":"Shop","owner":"alice","self_contained":true}`) {
		t.Error("an application's self_contained is not what it was given")
	}
	before := w.state()
	for _, at := range []string{application, keysOfApplication + "/" + keyUUID, "/v1/subscriptions/" + subUUID} {
		a := w.do(who, "DELETE", at+"?revoke_tokens=false", "", "If-Match", "*")
		checkProblem(t, a, 400, "invalid-parameter")
		if !strings.Contains(a.body, "revoke_tokens must be true") || strings.Contains(a.body, "#/") {
			t.Errorf("DELETE %s: %s", at, a.body)
		}
	}
	checkProblem(t, w.do(who, "PUT", "/v1/subscriptions/"+subUUID+"?revoke_tokens=false", `{"state":"BLOCKED"}`, "If-Match", "*"), 400, "invalid-parameter")
	a := w.do(who, "POST", application+"/block", `{"revoke_tokens":false}`)
	checkProblem(t, a, 400, "invalid-request")
	if !strings.Contains(a.body, `"#/revoke_tokens"`) {
		t.Errorf("%s", a.body)
	}
	if diff := cmp.Diff(before, w.state()); diff != "" {
		t.Errorf("what was refused has changed something:\n%s", diff)
	}
	if selfContained(`{"name":"Shop","owner":"alice"}`) {
		t.Error("what is left out has no default")
	}
	w.must(204, who, "DELETE", application+"?revoke_tokens=false", "", "If-Match", "*")
}

// What a client is registered with beside its secret.
func TestRegistrations(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const who = "super-admin"
	var app catalog.Application
	w.must(201, who, "POST", "/v1/applications", `{"name":"Shop","owner":"alice"}`).into(t, &app)
	const set = `{"keys": [{"kid": "k1", "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig",` +
		` "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}`
	for _, tt := range []struct{ key, settings, want string }{
		{"least", ``, `["client_secret_basic",null,["client_credentials"],"at+jwt",[]]`},
		{"null", `,"jwks":null,"grant_types":null,"resource_audiences":null`, `["client_secret_basic",null,["client_credentials"],"at+jwt",[]]`},
		{"jwt", `,"auth_method":"private_key_jwt","token_typ":"JWT","jwks":` + set, `["private_key_jwt",` + set + `,["client_credentials"],"JWT",[]]`},
		{"gw-1", `,"grant_types":[],"resource_audiences":["https://api.example.com"]`,
			`["client_secret_basic",null,[],"at+jwt",["https://api.example.com"]]`},
	} {
		made := w.must(201, who, "POST", "/v1/applications/"+app.UUID+"/keys", `{"consumer_key":"`+tt.key+`"`+tt.settings+`}`)
		if has := strings.Contains(made.body, "consumer_secret"); has == (tt.key == "jwt") {
			t.Errorf("%s: %s", tt.key, made.body)
		}
		var same bool
		var got string
		err := w.pool.QueryRow(t.Context(), `
SELECT r.is = $2::jsonb, r.is::text
FROM rescind.clients c CROSS JOIN LATERAL (
    SELECT jsonb_build_array(c.auth_method, c.jwks, c.grant_types, c.token_typ, c.resource_audiences) AS is) r
WHERE c.client_id = $1`, tt.key, tt.want).Scan(&same, &got)
		if err != nil || !same {
			t.Errorf("%s is registered with %s, want %s: %v", tt.key, got, tt.want, err)
		}
	}
}

// The keys of a client that proves itself with keys, given once more.
func TestRotateJWKS(t *testing.T) {
	t.Parallel()
	w := &transcript{world: newWorld(t)}
	w.populate()
	const (
		who  = "acme-admin"
		jwt  = keysOfApplication + "/73000000-0000-4000-8000-000000000001"
		post = keysOfApplication + "/73000000-0000-4000-8000-000000000002"
		one  = `{"kid":"k1","kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}`
		two  = `{"kid":"k2","kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
	)
	for at, client := range map[string]string{
		jwt:  `"consumer_key":"jwt","auth_method":"private_key_jwt","jwks":{"keys":[` + one + `]}`,
		post: `"consumer_key":"post"`,
	} {
		w.must(201, who, "POST", keysOfApplication, `{"uuid":"`+at[strings.LastIndexByte(at, '/')+1:]+`","key_manager":"idp",`+client+`}`)
	}
	stored := func() (set string) {
		t.Helper()
		if err := w.pool.QueryRow(t.Context(), `SELECT jwks::text FROM rescind.clients WHERE client_id = 'jwt'`).Scan(&set); err != nil {
			t.Fatal(err)
		}
		return set
	}
	before, begin := w.state(), len(w.events(0))
	refused := func(at, body string) {
		t.Helper()
		if a := w.do(who, "POST", at+"/rotate", body); a.status != 400 {
			t.Errorf("%s: status %d, want 400", body, a.status)
		}
	}
	refused(jwt, "")
	refused(jwt, `{"jwks":null,"end_previous":true}`)
	refused(jwt, `{"consumer_secret":"s","jwks":{"keys":[`+two+`]}}`)
	refused(jwt, `{"jwks":{"keys":[`+one+`,{"kty":"oct","k":"eHh4"}]}}`)
	refused(jwt, `{"jwks":{}}`)
	refused(jwt, `{"jwks":[`+one+`]}`)
	refused(post, `{"jwks":{"keys":[`+one+`]}}`)
	if diff := cmp.Diff(before, w.state()); diff != "" {
		t.Errorf("what was refused has changed something:\n%s", diff)
	}
	rotate := func(body string, events int, kids ...string) {
		t.Helper()
		a := w.do(who, "POST", jwt+"/rotate", body)
		if got := w.events(begin); a.status != 200 || len(got) != events || events == 1 && got[0] != "revocation.client jwt" {
			t.Errorf("%s: status %d, events %q, want %d", body, a.status, got, events)
		}
		begin += events
		var set struct{ Keys []struct{ KID string } }
		if err := json.Unmarshal([]byte(stored()), &set); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, k := range set.Keys {
			got = append(got, k.KID)
		}
		if !slices.Equal(got, kids) {
			t.Errorf("%s: the keys are %q, want %q", body, got, kids)
		}
	}
	rotate(`{"jwks":{"keys":[`+one+`,`+two+`]}}`, 0, "k1", "k2")
	rotate(`{"jwks":{"keys":[`+two+`]},"end_previous":true,"revoke_tokens":false}`, 0, "k2")
	rotate(`{"jwks":{"keys":[`+one+`]},"end_previous":true}`, 1, "k1")
	w.golden("rotatejwks")
}

func TestTooManyKeys(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.populate()
	_, err := w.pool.Exec(t.Context(), `
INSERT INTO rescind.key_mappings (ts, application_id, key_manager_id, consumer_key, key_type)
SELECT ts, application_id, key_manager_id, 'shop ' || n, key_type
FROM rescind.key_mappings, generate_series(2, 100) n`)
	if err != nil {
		t.Fatal(err)
	}
	before := w.state()
	a := w.do("acme-admin", "POST", keysOfApplication, `{"generate":false,"key_manager":"idp","consumer_key":"one more"}`)
	checkProblem(t, a, 409, "too-many")
	if !strings.Contains(a.body, "delete one first") || before != w.state() {
		t.Errorf("%s, or something has changed", a.body)
	}
}

// What ends what a consumer key may do revokes its tokens, unless told not to.
func TestBlock(t *testing.T) {
	t.Parallel()
	w := &transcript{world: newWorld(t)}
	w.populate()
	const (
		application = "/v1/applications/" + applicationUUID
		sub         = "/v1/subscriptions/" + subUUID
		who         = "acme-admin"
	)
	begin := len(w.events(0))
	step := func(status int, method, path, body string, header ...string) response {
		t.Helper()
		w.age()
		a := w.do(who, method, path, body, header...)
		if a.status != status {
			t.Fatalf("%s %s: status %d, want %d: %s", method, path, a.status, status, a.body)
		}
		for _, event := range w.events(begin) {
			fmt.Fprintf(&w.out, "event %s\n", event)
			begin++
		}
		w.out.WriteString("\n")
		return a
	}
	step(200, "POST", application+"/block", "")
	step(200, "GET", sub, "")
	blocked := step(200, "PUT", application, `{"name":"Shop","owner":"alice"}`, "If-Match", "*")
	free := step(200, "POST", application+"/unblock", "", "If-Match", blocked.etag())
	step(200, "GET", sub, "")
	step(200, "POST", application+"/block", `{"revoke_tokens":false}`, "If-Match", free.etag())
	step(200, "POST", "/v1/applications/6001/unblock", `{}`)
	step(200, "PUT", sub+"?revoke_tokens=false", `{"state":"BLOCKED"}`, "If-Match", "*")
	step(200, "PUT", sub, `{"state":"UNBLOCKED"}`, "If-Match", "*")
	step(200, "PUT", sub+"?revoke_tokens=true", `{"state":"ON_HOLD"}`, "If-Match", "*")
	step(http.StatusNoContent, "DELETE", sub+"?revoke_tokens=false", "", "If-Match", "*")
	step(http.StatusCreated, "POST", "/v1/subscriptions", `{"id":8002,"uuid":"`+subUUID+`","application":{"id":6001},"api":{"id":5001}}`)
	step(http.StatusNoContent, "DELETE", application+"?revoke_tokens=false", "", "If-Match", "*")
	step(http.StatusCreated, "POST", lives[7].path, lives[7].create)
	step(http.StatusCreated, "POST", lives[8].path, lives[8].create)
	step(http.StatusNoContent, "DELETE", application, "", "If-Match", "*")
	w.golden("block")
}
