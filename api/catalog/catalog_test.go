package catalog_test

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

var update = flag.Bool("update", false, "write the golden files")

func meta(id int32) catalog.Meta {
	return catalog.Meta{ID: id, UUID: fmt.Sprintf("7b1e6f8e-0d0f-4a51-8c0b-%012d", id), Tenant: revocation.SuperTenant, Timestamp: 1795200598214}
}

func ref(id int32) catalog.Ref { return catalog.Ref{ID: id, UUID: meta(id).UUID} }

// changes have every member once, by the golden file that they are in.
var changes = map[string]catalog.Change{
	"tenant": {Verb: catalog.Created, Entity: &catalog.Tenant{
		Meta:        catalog.Meta{ID: 7, UUID: meta(7).UUID, Tenant: revocation.Tenant{ID: 7, Domain: "a.example"}, Timestamp: 1795200598214},
		DisplayName: "A <&> B",
	}},
	"key_manager": {Verb: catalog.Updated, Entity: &catalog.KeyManager{
		Meta: meta(1), Name: "IdP", DisplayName: "Identity", Description: "Ours for people.", Type: "KeyCloak", Enabled: true, Iss: "https://idp.example.com",
		MaxTokenLifetime: 7200, JWKSURI: "https://idp.example.com/jwks", Algorithms: []string{"RS256", "ES256"}, AllowTyp: []string{"JWT"},
		ConsumerKeyClaim: "client_id", ScopesClaim: "scp", ClaimMappings: []catalog.ClaimMapping{{Remote: "email", Local: "mail"}},
		TokenType: "BOTH", Properties: map[string]any{"b": []any{1.5, "c", true}, "a": map[string]any{"x": "y"}},
	}},
	"key_manager-least": {Verb: catalog.Created, Entity: &catalog.KeyManager{
		Meta: meta(2), Name: "Resident Key Manager", Type: "default", Resident: true, Iss: "https://km.example.com", MaxTokenLifetime: 3600, TokenType: "DIRECT",
	}},
	"policy-subscription": {Verb: catalog.Created, Entity: &catalog.Policy{
		Meta: meta(1), Kind: catalog.PolicySubscription, Name: "Gold", DisplayName: "Gold tier", Description: "For those who pay.", QuotaType: "requestCount",
		Quota: 5000, UnitTime: 1, TimeUnit: "min", RateLimitCount: 10, RateLimitTimeUnit: "sec", StopOnQuotaReach: true, GraphQLMaxDepth: 5, GraphQLMaxComplexity: 100,
	}},
	"policy-application": {Verb: catalog.Deleted, Entity: &catalog.Policy{Meta: meta(2), Kind: catalog.PolicyApplication, Name: "Unlimited", QuotaType: "requestCount"}},
	"policy-api":         {Verb: catalog.Created, Entity: &catalog.Policy{Meta: meta(3), Kind: catalog.PolicyAPI, Name: "Unlimited", QuotaType: "bandwidthVolume", Level: "resourceLevel"}},
	"scope":              {Verb: catalog.Created, Entity: &catalog.Scope{Meta: meta(1), Name: "order_pizza", DisplayName: "Order", Description: "Order a pizza.", Roles: []string{"admin", "Internal/subscriber"}}},
	"api":                {Verb: catalog.LifecycleChanged, Entity: pizza()},
	"api-deployed":       {Verb: catalog.Deployed, Entity: pizza(), Labels: []string{"Default"}},
	"api-undeployed":     {Verb: catalog.Undeployed, Entity: pizza(), Labels: []string{"old", "older"}},
	"application": {Verb: catalog.Updated, Entity: &catalog.Application{
		Meta: meta(7), Name: "PizzaShackApp", Owner: "admin", Policy: "Unlimited", TokenType: "JWT", Groups: []string{"shack"}, Attributes: map[string]string{"b": "2", "a": "1"}, Blocked: true,
	}},
	"application-self-contained": {Verb: catalog.Created, Entity: &catalog.Application{
		Meta: meta(8), Name: "Offline", Owner: "admin", Policy: "Unlimited", TokenType: "JWT", SelfContained: true,
	}},
	"key_mapping": {Verb: catalog.Created, Entity: &catalog.KeyMapping{
		Meta: meta(9), Application: ref(7), ConsumerKey: "wU62DjlyDBnq87GlBwplfqvmAbAa", KeyType: catalog.Production, KeyManager: "Resident Key Manager", Iss: "https://km.example.com", Generated: true,
	}},
	"subscription": {Verb: catalog.Created, Entity: &catalog.Subscription{Meta: meta(31), Application: ref(7), API: ref(12), Policy: "Gold", State: catalog.Unblocked, ApplicationBlocked: true}},
}

func pizza() *catalog.API {
	return &catalog.API{
		Meta: meta(12), Name: "PizzaShackAPI", Version: "1.0.0", Context: "/pizza/1.0.0", Provider: "admin", Type: "HTTP", Status: catalog.APIPublished, DefaultVersion: true,
		Policy: "Unlimited", SecurityScheme: []string{"oauth2"}, GatewayLabels: []string{"Default"},
		Operations: []catalog.Operation{{Target: "/menu", Verb: "GET", AuthType: "Any", Policy: "Unlimited", Scopes: []string{"order_pizza"}}, {Target: "/order/{id}", Verb: "POST", AuthType: "None"}},
	}
}

// What is told stays told: a change of a golden file is a change of the contract.
func TestEvents(t *testing.T) {
	t.Parallel()
	var nouns []catalog.Noun
	for name, c := range changes {
		t.Run(name, func(t *testing.T) {
			e, err := catalog.NewEvent(c)
			if err != nil {
				t.Fatal(err)
			}
			if want := string(c.Entity.Noun()) + "." + string(c.Verb); e.Type != want || e.Tenant != c.Entity.Base().Tenant || e.Subject == "" || !catalog.IsChange(e.Type) {
				t.Errorf("event of type %q, subject %q, tenant %v", e.Type, e.Subject, e.Tenant)
			}
			text := []byte(e.Type + " " + e.Subject + "\n")
			text = append(append(text, e.Data...), '\n')
			path := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(path, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(text)); diff != "" {
				t.Errorf("(-golden +got):\n%s", diff)
			}
			back, err := catalog.ParseChange(e)
			if diff := cmp.Diff(c, back); err != nil || diff != "" {
				t.Errorf("read again: %v\n%s", err, diff)
			}
			if err := c.Entity.Validate(); err != nil {
				t.Errorf("not valid: %v", err)
			}
		})
		nouns = append(nouns, c.Entity.Noun())
	}
	for _, n := range catalog.Nouns {
		if !slices.Contains(nouns, n) {
			t.Errorf("no event of a %s", n)
		}
		if e := catalog.New(n); e == nil || e.Noun() != n {
			t.Errorf("New(%s) is %T", n, e)
		}
	}
	for _, typ := range []string{"revocation.token", "api", "", "pizza.created", ".created"} {
		if catalog.IsChange(typ) {
			t.Errorf("%q is no change of the catalog", typ)
		}
	}
}

func TestParseChangeRefuses(t *testing.T) {
	t.Parallel()
	const whole = `"id":1,"uuid":"7b1e6f8e-0d0f-4a51-8c0b-000000000001","tenant":{"id":-1234,"domain":"carbon.super"}`
	for _, tt := range []struct{ typ, data, pointer string }{
		{"pizza.created", `{` + whole + `}`, "#"},
		{"scope.created", ``, "#"},
		{"scope.created", `null`, "#"},
		{"scope.created", `[]`, "#"},
		{"scope.created", `{` + whole + `,"name":1}`, "#"},
		{"scope.created", `{"uuid":"7b1e6f8e-0d0f-4a51-8c0b-000000000001","tenant":{"id":1,"domain":"a"}}`, "#"},
		{"scope.created", strings.Replace(`{`+whole+`}`, "7b1e", "7B1E", 1), "#"},
		{"scope.created", strings.Replace(`{`+whole+`}`, "-0d0f", "0d0f-", 1), "#"},
		{"scope.created", strings.Replace(`{`+whole+`}`, "carbon.super", "", 1), "#"},
		{"scope.created", strings.Replace(`{`+whole+`}`, `"id":1`, `"id":4294967296`, 1), "#"},
		{"api.deployed", `{` + whole + `,"labels":"Default"}`, "#/labels"},
	} {
		c, err := catalog.ParseChange(revocation.Event{Type: tt.typ, Data: []byte(tt.data)})
		invalid, ok := errors.AsType[catalog.Invalid](err)
		if !ok || len(invalid) != 1 || invalid[0].Pointer != tt.pointer || c.Entity != nil {
			t.Errorf("%s %s: %v, %v", tt.typ, tt.data, c, err)
		}
	}
	c, err := catalog.ParseChange(revocation.Event{Type: "scope.painted", Data: []byte(`{` + whole + `,"colour":"red"}`)})
	if err != nil || c.Verb != "painted" || c.Entity.Base().ID != 1 {
		t.Errorf("what is not known yet: %v, %v", c, err)
	}
}

func FuzzParseChange(f *testing.F) {
	for name, c := range changes {
		b, err := os.ReadFile(filepath.Join("testdata", name+".golden"))
		if err != nil {
			f.Fatal(err)
		}
		_, data, _ := strings.Cut(string(b), "\n")
		f.Add(string(c.Entity.Noun())+"."+string(c.Verb), []byte(data))
	}
	f.Fuzz(func(t *testing.T, typ string, data []byte) {
		c, err := catalog.ParseChange(revocation.Event{Type: typ, Data: data})
		if err != nil {
			return
		}
		again, err := catalog.NewEvent(c)
		if err != nil {
			return // too large
		}
		back, err := catalog.ParseChange(again)
		if err != nil {
			t.Fatalf("%s: %v", again.Data, err)
		}
		third, err := catalog.NewEvent(back)
		if err != nil || string(third.Data) != string(again.Data) || third.Type != again.Type {
			t.Fatalf("%s %s became %s %s, %v", again.Type, again.Data, third.Type, third.Data, err)
		}
		if err := c.Entity.Validate(); err != nil && err.Error() == "" {
			t.Fatal("invalid for no reason")
		}
	})
}

// An event fits into what every intermediary forwards, labels included.
func TestEventsAreBounded(t *testing.T) {
	t.Parallel()
	large := pizza()
	long := strings.Repeat("x", 250)
	for i := range 100 {
		large.GatewayLabels = append(large.GatewayLabels, fmt.Sprint(long, i))
	}
	for range 2 {
		e, err := catalog.NewEvent(catalog.Change{Verb: catalog.Created, Entity: large})
		if err != nil {
			break
		}
		if _, err := json.Marshal(e); err != nil {
			t.Errorf("%d bytes of data: %v", len(e.Data), err)
		}
		large.Operations = append(large.Operations, make([]catalog.Operation, 500)...)
	}
	_, err := catalog.NewEvent(catalog.Change{Verb: catalog.Deployed, Entity: large, Labels: large.GatewayLabels})
	if invalid, ok := errors.AsType[catalog.Invalid](err); !ok || invalid[0].Pointer != "#" {
		t.Errorf("%v, want that it is too large", err)
	}
	small := pizza()
	small.GatewayLabels = large.GatewayLabels
	if _, err := catalog.NewEvent(catalog.Change{Verb: catalog.Updated, Entity: small}); err != nil {
		t.Errorf("without labels it fits: %v", err)
	}
	if _, err := catalog.NewEvent(catalog.Change{Verb: catalog.Deployed, Entity: small, Labels: small.GatewayLabels}); err == nil {
		t.Error("with as many labels it does not")
	}
	if _, err := catalog.NewEvent(catalog.Change{Verb: catalog.Created, Entity: &catalog.KeyManager{Properties: map[string]any{"f": func() {}}}}); err == nil {
		t.Error("a function is no JSON")
	}
}

func TestEffective(t *testing.T) {
	t.Parallel()
	s := catalog.Subscription{State: catalog.OnHold}
	if got := s.Effective(); got != catalog.OnHold {
		t.Error(got)
	}
	s.ApplicationBlocked = true
	if got := s.Effective(); got != catalog.Blocked {
		t.Error(got)
	}
}

func TestLetsThrough(t *testing.T) {
	t.Parallel()
	for state, want := range map[string][2]bool{ // production, sandbox
		catalog.Unblocked: {true, true}, catalog.TierUpdatePending: {true, true}, "SOME_OTHER": {true, true}, catalog.ProdOnlyBlocked: {false, true},
		catalog.Blocked: {false, false}, catalog.OnHold: {false, false}, catalog.Rejected: {false, false},
	} {
		if got := [2]bool{catalog.LetsThrough(state, catalog.Production), catalog.LetsThrough(state, catalog.Sandbox)}; got != want {
			t.Errorf("%s: %v, want %v", state, got, want)
		}
	}
}

func TestValidDomain(t *testing.T) {
	t.Parallel()
	for domain, want := range map[string]bool{
		"a": true, "carbon.super": true, "a-b.0": true, strings.Repeat("a", 200): true,
		"": false, "A": false, "a_b": false, "ä": false, "a\n": false, strings.Repeat("a", 201): false,
	} {
		if catalog.ValidDomain(domain) != want {
			t.Errorf("%q: %t", domain, !want)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 256)
	many := make([]string, 101)
	for i := range many {
		many[i] = fmt.Sprint(i)
	}
	type apiChange = func(*catalog.API)
	of := func(change apiChange) catalog.Entity { a := pizza(); change(a); return a }
	app := func(change func(*catalog.Application)) catalog.Entity {
		a := &catalog.Application{Name: "a", Owner: "o", Policy: "p", TokenType: "JWT"}
		change(a)
		return a
	}
	policy := func(kind string, change func(*catalog.Policy)) catalog.Entity {
		p := &catalog.Policy{Kind: kind, Name: "p", QuotaType: "requestCount"}
		if kind == catalog.PolicyAPI {
			p.Level = "apiLevel"
		}
		change(p)
		return p
	}
	km := func(change func(*catalog.KeyManager)) catalog.Entity {
		k := &catalog.KeyManager{Name: "k", Type: "default", Iss: "https://k", MaxTokenLifetime: 1, TokenType: "DIRECT"}
		change(k)
		return k
	}
	attributes := func(n int) map[string]string {
		m := make(map[string]string)
		for i := range n {
			m[fmt.Sprint(i)] = "v"
		}
		return m
	}
	properties := func(p map[string]any) catalog.Entity {
		return km(func(k *catalog.KeyManager) { k.Properties = p })
	}
	for _, tt := range []struct {
		name   string
		entity catalog.Entity
		want   string // the members that are wrong
	}{
		{"keys at a URL", km(func(k *catalog.KeyManager) { k.JWKSURI = "https://k/jwks" }), ""},
		{"keys at a URL with a query", km(func(k *catalog.KeyManager) { k.JWKSURI = "https://k/jwks?apikey=x" }), "#/jwks_uri"},
		{"keys at a URL with an empty query", km(func(k *catalog.KeyManager) { k.JWKSURI = "https://k/jwks?" }), "#/jwks_uri"},
		{"properties as gateways assert them", properties(map[string]any{
			"validation_enable": true, "enable_oauth_app_creation": false, "grant_types": []string{"password"}, "ServerURL": "https://k",
			"VALIDITY_PERIOD": "3600", "other": []any{1, "x", map[string]any{}},
		}), ""},
		{"properties of other types", properties(map[string]any{
			"enable_oauth_app_creation": 1, "enable_map_oauth_consumer_apps": "", "enable_token_generation": []any{},
			"enable_token_hash": map[string]any{}, "enable_token_encryption": "false", "Validation_Enable": nil,
			"ServerURL": 1, "RevokeURL": true, "token_endpoint": []any{"x"}, "revoke_endpoint": nil, "token_format_string": []any{}, "VALIDITY_PERIOD": 3600,
		}), "#/properties/RevokeURL #/properties/ServerURL #/properties/VALIDITY_PERIOD #/properties/Validation_Enable " +
			"#/properties/enable_map_oauth_consumer_apps #/properties/enable_oauth_app_creation #/properties/enable_token_encryption " +
			"#/properties/enable_token_generation #/properties/enable_token_hash #/properties/revoke_endpoint " +
			"#/properties/token_endpoint #/properties/token_format_string"},
		{"grant types that are not all strings", properties(map[string]any{"grant_types": []any{"password", 1}}), "#/properties/grant_types"},
		{"grant types as one string", properties(map[string]any{"grant_types": "password"}), "#/properties/grant_types"},
		{"properties that say which tokens are believed", properties(map[string]any{
			"issuer": "x", "self_validate_jwt": true, "Certificate_Type": "PEM", "certificate_value": nil, "jwk\u017f_endpoint": "x",
			"CONSUMER_\u212aEY_CLAIM": "x", "scopes_claim": "x", "claim_mappings": []any{}, "issuers": "x",
		}), "#/properties/CONSUMER_%E2%84%AAEY_CLAIM #/properties/Certificate_Type #/properties/certificate_value #/properties/claim_mappings " +
			"#/properties/issuer #/properties/jwk%C5%BF_endpoint #/properties/scopes_claim #/properties/self_validate_jwt"},
		{"null at any depth", properties(map[string]any{"a": nil, "b": []any{1, map[string]any{"c/d": nil, "e": []any{nil}}}}),
			"#/properties/a #/properties/b/1/c~1d #/properties/b/1/e/0"},
		{"a tenant", &catalog.Tenant{DisplayName: "a\x00b"}, "#/display_name"},
		{"a tenant without a name", &catalog.Tenant{}, ""},
		{"nothing of an API", &catalog.API{}, "#/context #/name #/provider #/status #/type #/version"},
		{"a context", of(func(a *catalog.API) { a.Context = "pizza" }), "#/context"},
		{"a context with a space", of(func(a *catalog.API) { a.Context = "/a b" }), "#/context"},
		{"a context that ends in a slash", of(func(a *catalog.API) { a.Context = "/a/" }), "#/context"},
		{"a type", of(func(a *catalog.API) { a.Type = "http" }), "#/type"},
		{"a status", of(func(a *catalog.API) { a.Status = "DRAFT" }), "#/status"},
		{"a label with a bar", of(func(a *catalog.API) { a.GatewayLabels = []string{"a", "b|c"} }), "#/gateway_labels/1"},
		{"a label twice", of(func(a *catalog.API) { a.GatewayLabels = []string{"a", "a"} }), "#/gateway_labels/1"},
		{"no label", of(func(a *catalog.API) { a.GatewayLabels = []string{""} }), "#/gateway_labels/0"},
		{"many schemes", of(func(a *catalog.API) { a.SecurityScheme = many }), "#/security_scheme"},
		{"an operation", of(func(a *catalog.API) {
			a.Operations[1] = catalog.Operation{Target: "x", Verb: "get", AuthType: "any", Scopes: []string{long}}
		}),
			"#/operations/1/auth_type #/operations/1/scopes/0 #/operations/1/target #/operations/1/verb"},
		{"an operation twice", of(func(a *catalog.API) { a.Operations[1] = a.Operations[0] }), "#/operations/1"},
		{"a GraphQL operation", of(func(a *catalog.API) {
			a.Type, a.Operations[1].Target, a.Operations[1].Verb = "GRAPHQL", "order", "MUTATION"
		}), ""},
		{"many operations", of(func(a *catalog.API) { a.Operations = make([]catalog.Operation, 1001) }), "#/operations"},
		{"opaque tokens that carry claims", app(func(a *catalog.Application) { a.TokenType, a.SelfContained = "OAUTH", true }), "#/self_contained"},
		{"tokens that carry claims", app(func(a *catalog.Application) { a.SelfContained = true }), ""},
		{"nothing of an application", &catalog.Application{}, "#/name #/owner #/policy #/token_type"},
		{"a long name", app(func(a *catalog.Application) { a.Name = long }), "#/name"},
		{"a name that is no text", app(func(a *catalog.Application) { a.Name = "\xff" }), "#/name"},
		{"a name with a C1 control", app(func(a *catalog.Application) { a.Name = "a\u0085" }), "#/name"},
		{"the most attributes", app(func(a *catalog.Application) { a.Attributes = attributes(64) }), ""},
		{"many attributes", app(func(a *catalog.Application) { a.Attributes = attributes(65) }), "#/attributes"},
		{"an attribute", app(func(a *catalog.Application) { a.Attributes = map[string]string{"a/b~ä": "x\n", long: "", "": ""} }), "#/attributes/ #/attributes/* #/attributes/a~1b~0%C3%A4"},
		{"a group twice", app(func(a *catalog.Application) { a.Groups = []string{"g", "g"} }), "#/groups/1"},
		{"nothing of a key mapping", &catalog.KeyMapping{}, "#/consumer_key #/key_manager #/key_type"},
		{"nothing of a subscription", &catalog.Subscription{}, "#/policy #/state"},
		{"nothing of a policy", &catalog.Policy{}, "#/kind #/name #/quota_type"},
		{"a quota without time", policy("application", func(p *catalog.Policy) { p.Quota = 1 }), "#/time_unit #/unit_time"},
		{"time without a quota", policy("application", func(p *catalog.Policy) { p.UnitTime = 1 }), "#/quota"},
		{"a quota below 0", policy("application", func(p *catalog.Policy) { p.Quota = -1 }), "#/quota"},
		{"a quota that JSON rounds", policy("application", func(p *catalog.Policy) { p.Quota, p.UnitTime, p.TimeUnit = 1<<53+1, 1, "day" }), "#/quota"},
		{"a burst without its time", policy("subscription", func(p *catalog.Policy) { p.RateLimitCount = 1 }), "#/rate_limit_time_unit"},
		{"its time without a burst", policy("subscription", func(p *catalog.Policy) { p.RateLimitTimeUnit = "sec" }), "#/rate_limit_count"},
		{"GraphQL limits below 0", policy("subscription", func(p *catalog.Policy) { p.GraphQLMaxDepth, p.GraphQLMaxComplexity = -1, -1 }), "#/graphql_max_complexity #/graphql_max_depth"},
		{"what is for subscriptions", policy("application", func(p *catalog.Policy) { p.StopOnQuotaReach = true }), "#/kind"},
		{"a level elsewhere", policy("application", func(p *catalog.Policy) { p.Level = "apiLevel" }), "#/level"},
		{"no level", policy("api", func(p *catalog.Policy) { p.Level = "" }), "#/level"},
		{"no scope name", &catalog.Scope{}, "#/name"},
		{"a scope with a space", &catalog.Scope{Name: "a b"}, "#/name"},
		{"a scope with a quote", &catalog.Scope{Name: `a"`}, "#/name"},
		{"a scope that is not ASCII", &catalog.Scope{Name: "é"}, "#/name"},
		{"a scope", &catalog.Scope{Name: "urn:x:read!~", Roles: []string{"a b"}}, ""},
		{"nothing of a key manager", &catalog.KeyManager{}, "#/iss #/max_token_lifetime #/name #/token_type #/type"},
		{"a long lifetime", km(func(k *catalog.KeyManager) { k.MaxTokenLifetime = 315360001 }), "#/max_token_lifetime"},
		{"a URI without a host", km(func(k *catalog.KeyManager) { k.JWKSURI = "https:///jwks" }), "#/jwks_uri"},
		{"a URI of a file", km(func(k *catalog.KeyManager) { k.JWKSURI = "file:///etc/passwd" }), "#/jwks_uri"},
		{"a URI with a user", km(func(k *catalog.KeyManager) { k.JWKSURI = "https://a:b@k/jwks" }), "#/jwks_uri"},
		{"no URI at all", km(func(k *catalog.KeyManager) { k.JWKSURI = "https://%" }), "#/jwks_uri"},
		{"no algorithm", km(func(k *catalog.KeyManager) { k.Algorithms = []string{"RS256", "none"} }), "#/algorithms/1"},
		{"a shared key", km(func(k *catalog.KeyManager) { k.Algorithms = []string{"HS256"} }), "#/algorithms/0"},
		{"a mapping of nothing", km(func(k *catalog.KeyManager) { k.ClaimMappings = []catalog.ClaimMapping{{}} }), "#/claim_mappings/0/local #/claim_mappings/0/remote"},
		{"many mappings", km(func(k *catalog.KeyManager) { k.ClaimMappings = make([]catalog.ClaimMapping, 101) }), "#/claim_mappings"},
		{"large properties", km(func(k *catalog.KeyManager) { k.Properties = map[string]any{"a": strings.Repeat("x", 16<<10)} }), "#/properties"},
		{"properties that are no JSON", km(func(k *catalog.KeyManager) { k.Properties = map[string]any{"a": func() {}} }), "#/properties"},
		{"a NUL deep in them", km(func(k *catalog.KeyManager) { k.Properties = map[string]any{"a": []any{map[string]any{"b": "\x00"}}} }), "#/properties"},
		{"a NUL in a name of them", km(func(k *catalog.KeyManager) { k.Properties = map[string]any{"a\x00": 1} }), "#/properties"},
	} {
		err := tt.entity.Validate()
		invalid, _ := errors.AsType[catalog.Invalid](err)
		pointers := make(map[string]bool)
		for _, f := range invalid {
			pointers[f.Pointer] = true
			if f.Detail == "" || strings.Contains(err.Error(), long) {
				t.Errorf("%s: %v", tt.name, err)
			}
		}
		if got := strings.Join(slices.Sorted(maps.Keys(pointers)), " "); got != tt.want || (err == nil) != (tt.want == "") {
			t.Errorf("%s: %q (%v), want %q", tt.name, got, err, tt.want)
		}
	}
}
