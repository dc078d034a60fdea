package wso2

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/wso2test"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	iss   = "https://km.example.com"
	exp   = 1760003600
)

// now is in the middle of a second: 1,740 s and a half before exp.
var now = time.Unix(exp-1740, 5e8)

func event(t testing.TB, seq revocation.Seq, change func(*revocation.Revocation)) revocation.Event {
	t.Helper()
	r := revocation.Revocation{
		ID:       "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3",
		Target:   revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "at-7f3c2a91d0"},
		Tenant:   revocation.SuperTenant,
		Exp:      exp,
		ClientID: "app-2",
		Reason:   "client",
	}
	change(&r)
	e, err := revocation.NewEvent(r)
	if err != nil {
		t.Fatal(err)
	}
	e.Position = revocation.Position{Epoch: epoch, Seq: seq}
	return e
}

func changeEvent(t testing.TB, seq revocation.Seq, c catalog.Change) revocation.Event {
	t.Helper()
	e, err := catalog.NewEvent(c)
	if err != nil {
		t.Fatal(err)
	}
	e.Position = revocation.Position{Epoch: epoch, Seq: seq}
	return e
}

// example is an event and what it is called in testdata.
type example struct {
	name  string
	event revocation.Event
}

// revocationExamples are revocations that gateways are told about.
func revocationExamples(t testing.TB) (list []example) {
	for i, r := range []struct {
		name   string
		change func(*revocation.Revocation)
	}{
		{"jti", func(*revocation.Revocation) {}},
		{"no-jti", func(r *revocation.Revocation) {
			r.Target = revocation.DigestTarget(iss, "header.claims")
			r.Signature = "MEUCIQDx-kZ_3n2Bq9"
		}},
		{"jti-beats-signature", func(r *revocation.Revocation) { r.Signature = "MEUCIQDx-kZ_3n2Bq9" }},
		{"other-tenant", func(r *revocation.Revocation) { r.Tenant = revocation.Tenant{ID: 7, Domain: "org.example"} }},
		{"odd-jti", func(r *revocation.Revocation) { r.Target.ID = `<a&b> "q" \ é ` + "\u2028" }},
		{"last-second", func(r *revocation.Revocation) { r.Exp = now.Unix() + 1 }},
		{"client", func(r *revocation.Revocation) {
			r.Target = revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "Jx3k9aAbCq"}
			r.NotAfter = 1760000000
		}},
		{"subject", func(r *revocation.Revocation) {
			r.Target = revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "5c1f6b0e-7a52-4f0e-9a57-2d9f3c0e8a11"}
			r.NotAfter = 1760000000
		}},
	} {
		list = append(list, example{r.name, event(t, revocation.Seq(88213+i), r.change)})
	}
	return list
}

var (
	org  = revocation.Tenant{ID: math.MaxInt32, Domain: "org.example"}
	meta = func(id int32, n int) catalog.Meta {
		return catalog.Meta{
			ID: id, UUID: fmt.Sprintf("a1a2b3c4-0000-4000-8000-%012d", n), Tenant: revocation.SuperTenant, Timestamp: 1760000000000 + int64(n),
		}
	}
	api = catalog.API{
		Meta: meta(12, 12), Name: "PizzaShack", Version: "1.0.0", Context: "/pizza/1.0.0", Provider: "admin", Type: "HTTP",
		Status: catalog.APIPublished, DefaultVersion: true, Policy: "Gold", SecurityScheme: []string{"oauth2"},
		GatewayLabels: []string{"Default", "eu"}, Operations: []catalog.Operation{{Target: "/menu", Verb: "GET", AuthType: "Any"}},
	}
	application = catalog.Application{
		Meta: meta(7, 7), Name: "Pizza <App> & Co", Owner: "alice", Policy: "50PerMin", TokenType: "JWT", Groups: []string{"sales", "ops"},
		Attributes: map[string]string{"team": "Zürich", "cost": "4711"},
	}
	keyMapping = catalog.KeyMapping{
		Meta: meta(19, 19), Application: catalog.Ref{ID: 7, UUID: application.UUID}, ConsumerKey: "Jx3k9aAbCq", KeyType: catalog.Sandbox,
		KeyManager: "Resident Key Manager", Iss: iss, Generated: true,
	}
	subscription = catalog.Subscription{
		Meta: meta(31, 31), Application: catalog.Ref{ID: 7, UUID: application.UUID}, API: catalog.Ref{ID: 12, UUID: api.UUID},
		Policy: "Gold", State: catalog.Unblocked,
	}
	subscriptionPolicy = catalog.Policy{
		Meta: meta(41, 41), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount", Quota: 5000, UnitTime: 1, TimeUnit: "min",
		RateLimitCount: 100, RateLimitTimeUnit: "sec", StopOnQuotaReach: true, GraphQLMaxDepth: 5, GraphQLMaxComplexity: 50,
	}
	applicationPolicy = catalog.Policy{Meta: meta(42, 42), Kind: catalog.PolicyApplication, Name: "50PerMin", QuotaType: "requestCount"}
	apiPolicy         = catalog.Policy{Meta: meta(43, 43), Kind: catalog.PolicyAPI, Name: "Gold", QuotaType: "bandwidthVolume", Level: "apiLevel"}
	scope             = catalog.Scope{Meta: meta(51, 51), Name: "pizza:order", DisplayName: "Order", Description: "Orders", Roles: []string{"staff"}}
	keyManager1       = catalog.KeyManager{
		Meta: meta(61, 61), Name: "OurSTS", Type: "default", Enabled: true, Iss: "https://idp.example.com", MaxTokenLifetime: 3600,
		JWKSURI: "https://idp.example.com/jwks", ConsumerKeyClaim: "client_id", ScopesClaim: "scp", TokenType: "DIRECT",
		ClaimMappings: []catalog.ClaimMapping{{Remote: "sub", Local: "user"}},
		Properties: map[string]any{
			"issuer": "https://evil.example.com", "Self_Validate_JWT": false, "claim_mappings": nil, "token_endpoint": nil,
			"grant_types": []any{"client_credentials", nil, map[string]any{"none": nil, "some": []any{nil}}}, "enable_token_hash": false, "VALIDITY_PERIOD": "3600",
		},
	}
	resident = catalog.KeyManager{
		Meta: meta(1, 1), Name: "Resident Key Manager", Type: "default", Enabled: true, Resident: true, Iss: iss + "/t/org.example",
		MaxTokenLifetime: 3600, TokenType: "DIRECT",
	}
)

// with is a copy of v that f changed.
func with[T any](v T, f func(*T)) *T {
	f(&v)
	return &v
}

// changeExamples are one of each message about the catalog that there is, in full and
// with as little in it as there can be.
func changeExamples(t testing.TB) (list []example) {
	add := func(name string, c catalog.Change) {
		list = append(list, example{name, changeEvent(t, revocation.Seq(100+len(list)), c)})
	}
	for _, verb := range []catalog.Verb{catalog.Created, catalog.Updated, catalog.Deleted} {
		for _, e := range []catalog.Entity{
			&api, &application, &keyMapping, &subscription, &subscriptionPolicy, &applicationPolicy, &apiPolicy, &scope, &keyManager1,
		} {
			if verb == catalog.Updated && e.Noun() == catalog.NounKeyMapping {
				continue // nothing of it changes
			}
			name := string(e.Noun())
			if p, ok := e.(*catalog.Policy); ok {
				name = p.Kind + "-policy"
			}
			add(name+"-"+string(verb), catalog.Change{Verb: verb, Entity: e})
		}
	}
	add("api-lifecycle", catalog.Change{Verb: catalog.LifecycleChanged, Entity: with(api, func(a *catalog.API) { a.Status = catalog.APIRetired })})
	add("api-deployed", catalog.Change{Verb: catalog.Deployed, Entity: &api, Labels: []string{"eu"}})
	add("api-undeployed", catalog.Change{Verb: catalog.Undeployed, Entity: &api, Labels: []string{"Default", "eu"}})
	add("api-deployed-nowhere", catalog.Change{Verb: catalog.Deployed, Entity: &api})
	add("subscription-of-blocked-application", catalog.Change{Verb: catalog.Updated,
		Entity: with(subscription, func(s *catalog.Subscription) { s.ApplicationBlocked = true })})
	add("resident-key-manager", catalog.Change{Verb: catalog.Created, Entity: &resident})
	add("key-manager-without-keys", catalog.Change{Verb: catalog.Created,
		Entity: &catalog.KeyManager{Meta: meta(62, 62), Name: "x", Type: "Auth0", Iss: "https://x.example.com", TokenType: "BOTH",
			Properties: map[string]any{"certificate_type": "PEM", "certificate_value": "LS0t"}}})
	bare := catalog.Meta{ID: math.MaxInt32, UUID: "ffffffff-ffff-4fff-bfff-ffffffffffff", Tenant: org, Timestamp: 1<<53 - 1}
	for _, e := range []catalog.Entity{
		&catalog.API{Meta: bare}, &catalog.Application{Meta: bare}, &catalog.KeyMapping{Meta: bare}, &catalog.Subscription{Meta: bare},
		&catalog.Policy{Meta: bare, Kind: catalog.PolicySubscription}, &catalog.Policy{Meta: bare, Kind: catalog.PolicyAPI},
		&catalog.Scope{Meta: bare}, &catalog.KeyManager{Meta: bare},
	} {
		name := string(e.Noun())
		if p, ok := e.(*catalog.Policy); ok {
			name = p.Kind + "-policy"
		}
		add(name+"-bare", catalog.Change{Verb: catalog.Updated, Entity: e})
	}
	add("api-retired-updated", catalog.Change{Verb: catalog.Updated, Entity: with(api, func(a *catalog.API) { a.Status = catalog.APIRetired })})
	add("subscription-on-hold", catalog.Change{Verb: catalog.Updated,
		Entity: with(subscription, func(s *catalog.Subscription) { s.State = catalog.OnHold })})
	return list
}

func examples(t testing.TB) []example {
	return slices.Concat(revocationExamples(t), changeExamples(t))
}

func mustMessages(t testing.TB, e revocation.Event) []Message {
	t.Helper()
	messages, err := Messages(e, now)
	if err != nil {
		t.Fatal(err)
	}
	return messages
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// payload is the payloadData of a message, with its numbers as they are written.
func payload(t testing.TB, m Message) map[string]any {
	t.Helper()
	body := object(t, m.Body)
	inner, ok := body["event"].(map[string]any)
	if !ok || len(body) != 1 || len(inner) != 1 {
		t.Fatalf("the envelope of %s is not that of WSO2", m.Body)
	}
	return inner["payloadData"].(map[string]any)
}

func object(t testing.TB, b []byte) map[string]any {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var m map[string]any
	if err := dec.Decode(&m); err != nil {
		t.Fatalf("decode %s: %v", b, err)
	}
	return m
}

func unbase64(t testing.TB, v any) []byte {
	t.Helper()
	s, ok := v.(string)
	b, err := base64.StdEncoding.DecodeString(s)
	if err != nil || !ok || len(b) == 0 {
		t.Fatalf("%v is not base64 of something: %v", v, err)
	}
	return b
}

// packed are the members of payloads that hold an object as base64.
func packed(p map[string]any) (member string, ok bool) {
	switch {
	case p["event"] != nil:
		return "event", true
	case p["value"] != nil:
		return "value", true
	case p["type"] == NotifyClient || p["type"] == NotifySubject:
		return "revokedToken", true
	}
	return "", false
}

func TestMessages(t *testing.T) {
	t.Parallel()
	for _, x := range examples(t) {
		var b bytes.Buffer
		for _, m := range mustMessages(t, x.event) {
			fmt.Fprintf(&b, "%s\n%s\n", m.Topic, m.Body)
			p := payload(t, m)
			if member, ok := packed(p); ok {
				fmt.Fprintf(&b, "  %s: %s\n", member, unbase64(t, p[member]))
			}
		}
		golden(t, x.name, b.Bytes())
	}
}

// The examples of the contract, section 3.2.
func TestBulkRevocationsOfTheContract(t *testing.T) {
	t.Parallel()
	want := map[string]string{
		"client":  "eyJjb25zdW1lcl9rZXkiOiJKeDNrOWFBYkNxIiwicmV2b2NhdGlvblRpbWUiOiIxNzYwMDAwMDAwMDAwIn0=",
		"subject": "eyJlbnRpdHlJZCI6IjVjMWY2YjBlLTdhNTItNGYwZS05YTU3LTJkOWYzYzBlOGExMSIsImVudGl0eVR5cGUiOiJVU0VSX0lEIiwicmV2b2NhdGlvblRpbWUiOiIxNzYwMDAwMDAwMDAwIn0=",
	}
	for _, x := range revocationExamples(t) {
		if want[x.name] == "" {
			continue
		}
		got := unbase64(t, payload(t, mustMessages(t, x.event)[0])["revokedToken"])
		// The contract's moment is a second's first millisecond, ours its last.
		got = bytes.ReplaceAll(got, []byte("1760000000999"), []byte("1760000000000"))
		if diff := cmp.Diff(want[x.name], base64.StdEncoding.EncodeToString(got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", x.name, diff)
		}
		delete(want, x.name)
	}
	if len(want) > 0 {
		t.Errorf("no examples of %v", want)
	}
}

func TestNoMessages(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		change func(*revocation.Revocation)
	}{
		{"expires now", func(r *revocation.Revocation) { r.Exp = now.Unix() }},
		{"expired long ago", func(r *revocation.Revocation) { r.Exp = 1 }},
		{"opaque", func(r *revocation.Revocation) { r.Target = revocation.DigestTarget(iss, "opaque-token") }},
		{"client that has ended", func(r *revocation.Revocation) {
			r.Target.Kind, r.NotAfter, r.Exp = revocation.KindClient, exp, now.Unix()
		}},
		{"subject that has ended", func(r *revocation.Revocation) {
			r.Target.Kind, r.NotAfter, r.Exp = revocation.KindSubject, exp, now.Unix()
		}},
		{"session", func(r *revocation.Revocation) { r.Target.Kind = revocation.KindSession }},
		{"tenant", func(r *revocation.Revocation) {
			r.Target, r.NotAfter = revocation.Target{Kind: revocation.KindTenant, ID: "carbon.super"}, exp
		}},
		{"key", func(r *revocation.Revocation) { r.Target.Kind = revocation.KindKey }},
	}
	none := func(name string, e revocation.Event) {
		t.Helper()
		if got, err := Messages(e, now); got != nil || err != nil {
			t.Errorf("%s: got %v, %v, want no messages and no error", name, got, err)
		}
		if got, err := MapMessages(e, now); got != nil || err != nil {
			t.Errorf("%s: got maps %v, %v, want no messages and no error", name, got, err)
		}
	}
	for _, tt := range tests {
		none(tt.name, event(t, 1, tt.change))
		e := event(t, 1, tt.change)
		r, err := e.Revocation()
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := Replay(r, now); ok {
			t.Errorf("%s: got the replay %s, want none", tt.name, got.Body)
		}
	}
	none("tenant created", changeEvent(t, 1, catalog.Change{Verb: catalog.Created, Entity: &catalog.Tenant{Meta: meta(7, 7)}}))
	none("something of a later version", revocation.Event{Type: "weather.changed", Data: json.RawMessage(`{}`)})
}

func TestUnreadableEvents(t *testing.T) {
	t.Parallel()
	token, app := event(t, 1, func(*revocation.Revocation) {}), changeEvent(t, 1, catalog.Change{Verb: catalog.Created, Entity: &application})
	for name, x := range map[string]struct {
		event revocation.Event
		data  string
	}{
		"no object":          {token, `7`},
		"no target":          {token, `{"kind":"token"}`},
		"two kinds":          {token, `{"kind":"key","iss":"i","kid":"k"}`},
		"entity, no object":  {app, `7`},
		"entity without id":  {app, `{"uuid":"` + application.UUID + `","tenant":{"domain":"carbon.super"}}`},
		"entity's wide id":   {app, `{"id":2147483648}`},
		"entity, not its id": {app, `{"id":"7"}`},
	} {
		x.event.Data = json.RawMessage(x.data)
		if got, err := Messages(x.event, now); err == nil || !strings.Contains(err.Error(), x.event.String()) {
			t.Errorf("%s: got %v, %v, want an error that names the event", name, got, err)
		}
		if got, err := MapMessages(x.event, now); err == nil {
			t.Errorf("%s: got maps %v, want an error", name, got)
		}
	}
}

func TestReplay(t *testing.T) {
	t.Parallel()
	ids := map[string]bool{}
	for _, x := range revocationExamples(t) {
		r, err := x.event.Revocation()
		if err != nil {
			t.Fatal(err)
		}
		got, ok := Replay(r, now)
		if ok != (r.Target.Kind == revocation.KindToken) {
			t.Errorf("%s: replayed is %t", x.name, ok)
		}
		if !ok {
			continue
		}
		want := mustMessages(t, x.event)[0]
		p, first := payload(t, got), payload(t, want)
		id := p["eventId"].(string)
		ids[r.Target.ID+id] = true
		if id == first["eventId"] || len(id) != 36 {
			t.Errorf("%s: the replay's eventId is %s", x.name, id)
		}
		p["eventId"] = first["eventId"]
		if diff := cmp.Diff(first, p); diff != "" || got.Topic != want.Topic {
			t.Errorf("%s: the replay on %s differs (-first +replay):\n%s", x.name, got.Topic, diff)
		}
		r.ID, r.Reason, r.ClientID = "", "", "" // a snapshot need not have them
		if again, ok := Replay(r, now); !ok || !bytes.Equal(again.Body, got.Body) {
			t.Errorf("%s: the replay is another one the second time: %s", x.name, again.Body)
		}
	}
	if len(ids) != 3 { // at-7f3c2a91d0 four times, the odd one, the digest
		t.Errorf("%d ids for 3 tokens", len(ids))
	}
}

// What each gateway decodes a message into. A gateway in Go drops, or gets stuck at, a
// message with another type in it; one in Java throws.
const (
	text    = "text"
	num32   = "32-bit integer"
	num64   = "64-bit integer"
	yesNo   = "boolean"
	texts   = "list of text"
	nums    = "list of integers"
	strMap  = "map of text to text"
	inside  = "base64 of an object"
	seconds = "text with a number"
)

var (
	demandCommon = map[string]string{"eventId": text, "timeStamp": num64, "type": text, "tenantId": num32, "tenantDomain": text}
	demandApp    = map[string]string{"uuid": text, "applicationId": num32, "applicationName": text, "tokenType": text,
		"applicationPolicy": text, "groupId": text, "attributes": strMap, "subscriber": text}
	demandKey = map[string]string{"applicationId": num32, "applicationUUID": text, "consumerKey": text, "keyType": text, "keyManager": text}
	demandSub = map[string]string{"subscriptionId": num32, "subscriptionUUID": text, "apiId": num32, "apiUUID": text, "applicationId": num32,
		"applicationUUID": text, "policyId": text, "subscriptionState": text}
	demandAPI = map[string]string{"apiName": text, "apiId": num32, "uuid": text, "apiVersion": text, "apiContext": text, "apiProvider": text,
		"apiType": text, "apiStatus": text}
	demandDeploy = map[string]string{"apiId": num32, "uuid": text, "name": text, "version": text, "provider": text, "apiType": text,
		"context": text, "gatewayLabels": texts, "associatedApis": texts}
	demandPolicy = map[string]map[string]string{
		"APPLICATION": {"policyId": num32, "policyName": text, "quotaType": text, "policyType": text},
		"API": {"policyId": num32, "policyName": text, "quotaType": text, "policyType": text, "addedConditionGroupIds": nums,
			"deletedConditionGroupIds": nums},
		"SUBSCRIPTION": {"policyId": num32, "policyName": text, "quotaType": text, "policyType": text, "rateLimitCount": num32,
			"rateLimitTimeUnit": text, "stopOnQuotaReach": yesNo, "graphQLMaxDepth": num32, "graphQLMaxComplexity": num32, "subscriberCount": num32},
	}
	demandScope = map[string]string{"name": text, "displayName": text, "description": text, "roles": texts}

	// demandEvent is by event type; policies have their own.
	demandEvent = map[string]map[string]string{
		"APPLICATION_CREATE": demandApp, "APPLICATION_UPDATE": demandApp, "APPLICATION_DELETE": demandApp,
		"APPLICATION_REGISTRATION_CREATE": demandKey, "REMOVE_APPLICATION_KEYMAPPING": demandKey,
		"SUBSCRIPTIONS_CREATE": demandSub, "SUBSCRIPTIONS_UPDATE": demandSub, "SUBSCRIPTIONS_DELETE": demandSub,
		"API_CREATE": demandAPI, "API_UPDATE": demandAPI, "API_DELETE": demandAPI, "API_LIFECYCLE_CHANGE": demandAPI,
		"DEPLOY_API_IN_GATEWAY": demandDeploy, "REMOVE_API_FROM_GATEWAY": demandDeploy,
		"POLICY_CREATE": nil, "POLICY_UPDATE": nil, "POLICY_DELETE": nil,
		"SCOPE_CREATE": demandScope, "SCOPE_UPDATE": demandScope, "SCOPE_DELETE": demandScope,
	}
	demandTopic = map[string]map[string]string{
		TopicTokenRevocation: {"eventId": text, "revokedToken": text, "ttl": seconds, "expiryTime": num64, "type": text, "tenantId": num32},
		TopicNotification:    {"eventType": text, "timestamp": num64, "event": inside},
		TopicKeyManagerGo: {"event_type": text, "action": text, "name": text, "type": text, "enabled": yesNo, "value": inside,
			"tenantDomain": text, "organization": text, "tokenType": text},
	}
	demandBulk = map[string]map[string]string{
		NotifyClient:  {"consumer_key": text, "revocationTime": seconds},
		NotifySubject: {"entityId": text, "entityType": text, "revocationTime": seconds},
	}
)

// meets reports what is wrong with m: each demand is there with its type, and nothing else.
func meets(m map[string]any, demands ...map[string]string) (wrong []string) {
	known := map[string]bool{}
	for _, d := range demands {
		for name, kind := range d {
			known[name] = true
			if v, ok := m[name]; !ok || !isOf(v, kind) {
				wrong = append(wrong, fmt.Sprintf("%s is %v, want %s", name, v, kind))
			}
		}
	}
	for name := range m {
		if !known[name] {
			wrong = append(wrong, name+" is not in the contract")
		}
	}
	return wrong
}

func isOf(v any, kind string) bool {
	number, isNumber := v.(json.Number)
	n, err := number.Int64()
	s, isText := v.(string)
	list, isList := v.([]any)
	object, isObject := v.(map[string]any)
	switch kind {
	case text:
		return isText
	case seconds:
		n, err := json.Number(s).Int64()
		return isText && err == nil && n > 0
	case num32:
		return isNumber && err == nil && n >= math.MinInt32 && n <= math.MaxInt32
	case num64:
		return isNumber && err == nil
	case yesNo:
		_, ok := v.(bool)
		return ok
	case texts, nums:
		want := map[string]string{texts: text, nums: num32}[kind]
		return isList && !slices.ContainsFunc(list, func(v any) bool { return !isOf(v, want) })
	case strMap:
		for _, v := range object {
			if !isOf(v, text) {
				return false
			}
		}
		return isObject
	case inside:
		b, err := base64.StdEncoding.DecodeString(s)
		return isText && err == nil && len(b) > 0 && b[0] == '{'
	}
	return false
}

func hasNull(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case []any:
		return slices.ContainsFunc(v, hasNull)
	case map[string]any:
		for _, inner := range v {
			if hasNull(inner) {
				return true
			}
		}
	}
	return false
}

func TestWhatDecodersDemand(t *testing.T) {
	t.Parallel()
	types := map[string]bool{}
	for _, x := range examples(t) {
		for _, m := range mustMessages(t, x.event) {
			topic := m.Topic
			if topic == TopicKeyManagerJava {
				topic = TopicKeyManagerGo
			}
			p := payload(t, m)
			wrong := meets(p, demandTopic[topic])
			if hasNull(p) {
				wrong = append(wrong, "there is a null")
			}
			member, ok := packed(p)
			var inner map[string]any
			if ok {
				if inner = object(t, unbase64(t, p[member])); hasNull(inner) {
					wrong = append(wrong, "there is a null inside")
				}
			}
			switch {
			case topic == TopicTokenRevocation && ok:
				wrong = append(wrong, meets(inner, demandBulk[p["type"].(string)])...)
				if p["expiryTime"] != json.Number("0") {
					wrong = append(wrong, "the expiryTime of more than one token is not 0")
				}
			case topic == TopicNotification:
				eventType := p["eventType"].(string)
				types[eventType] = true
				demand, known := demandEvent[eventType]
				if !known {
					wrong = append(wrong, "there is no event type "+eventType)
				}
				if policyType, ok := inner["policyType"].(string); ok {
					demand = demandPolicy[policyType]
				}
				wrong = append(wrong, meets(inner, demandCommon, demand)...)
				if inner["type"] != p["eventType"] {
					wrong = append(wrong, fmt.Sprintf("the type inside is %v", inner["type"]))
				}
				if inner["timeStamp"] != p["timestamp"] {
					wrong = append(wrong, "the two timestamps differ")
				}
			}
			for _, w := range wrong {
				t.Errorf("%s on %s: %s", x.name, m.Topic, w)
			}
		}
	}
	for eventType := range demandEvent {
		if !types[eventType] {
			t.Errorf("there is no example of %s", eventType)
		}
	}
}

// A table of demands that everything meets would prove nothing.
func TestDemandsCanFail(t *testing.T) {
	t.Parallel()
	for kind, bad := range map[string][]any{
		text:    {json.Number("1"), true, nil},
		seconds: {json.Number("1"), "x", "0", "-1", ""},
		num32:   {json.Number("2147483648"), json.Number("1.0"), "1", nil},
		num64:   {json.Number("9223372036854775808"), json.Number("1e3"), "1"},
		yesNo:   {"true", json.Number("1")},
		texts:   {[]any{json.Number("1")}, nil, "x"},
		nums:    {[]any{"1"}, nil},
		strMap:  {map[string]any{"a": json.Number("1")}, nil, []any{}},
		inside:  {"", "e30", "W10=", nil},
	} {
		for _, v := range bad {
			if isOf(v, kind) {
				t.Errorf("%v passes as %s", v, kind)
			}
		}
	}
	if got := meets(map[string]any{"b": "x"}, map[string]string{"a": text}); len(got) != 2 {
		t.Errorf("got %q, want one that is missing and one too many", got)
	}
}

// The order within an event: a gateway in Java reads an API again at API_UPDATE and
// removes it at the change to RETIRED.
func TestTwoMessagesOfOneEvent(t *testing.T) {
	t.Parallel()
	e := changeEvent(t, 88213, catalog.Change{Verb: catalog.LifecycleChanged, Entity: &api})
	var got []string
	for _, m := range mustMessages(t, e) {
		p := payload(t, m)
		inner := object(t, unbase64(t, p["event"]))
		got = append(got, p["eventType"].(string)+" "+inner["eventId"].(string))
	}
	// The ids are from an independent implementation (Python's uuid.uuid5).
	want := []string{"API_UPDATE 3359ecb0-c565-5564-9fbf-10d9cb74b523", "API_LIFECYCLE_CHANGE 2608274a-8325-58bb-83ba-83119702912e"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("messages (-want +got):\n%s", diff)
	}
}

// Whatever happened before, API Manager's gateway ends with what the last event says: it
// would keep a subscription that is put on hold, and read an API again that is RETIRED.
func TestJavaGatewayEndsAtTheNewestState(t *testing.T) {
	t.Parallel()
	states := []string{catalog.Unblocked, catalog.OnHold, catalog.Blocked, catalog.OnHold, catalog.OnHold, catalog.Unblocked}
	statuses := []string{catalog.APIPublished, catalog.APIRetired, catalog.APIRetired, catalog.APIPublished}
	listed := true // in the answer to GET /apis
	g := wso2test.NewJavaGateway(func(string) bool { return listed })
	seq := revocation.Seq(0)
	tell := func(verb catalog.Verb, e catalog.Entity) {
		seq++
		event := changeEvent(t, seq, catalog.Change{Verb: verb, Entity: e})
		for range 2 { // events come at least once
			for _, m := range mustMessages(t, event) {
				if err := g.Take(m.Topic, m.Body); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for i, state := range states {
		verb := catalog.Updated
		if i == 0 {
			verb = catalog.Created
		}
		tell(verb, with(subscription, func(s *catalog.Subscription) { s.State, s.Timestamp = state, int64(1000+i) }))
		if got := g.Subscriptions["7.12"]; got != state {
			t.Errorf("step %d: the subscription is %q, want %q", i, got, state)
		}
	}
	for i, status := range statuses {
		for _, verb := range []catalog.Verb{catalog.LifecycleChanged, catalog.Updated} {
			for _, listed = range []bool{true, status != catalog.APIRetired} {
				tell(verb, with(api, func(a *catalog.API) { a.Status = status }))
				if got, want := g.APIs[api.UUID], status != catalog.APIRetired; got != want {
					t.Errorf("step %d, %s: the API is there: %t, want %t", i, verb, got, want)
				}
			}
		}
	}
}

// The expected value is from an independent implementation (Python's uuid.uuid5).
func TestEventID(t *testing.T) {
	t.Parallel()
	got := EventID(revocation.Position{Epoch: epoch, Seq: 88213})
	if want := "3359ecb0-c565-5564-9fbf-10d9cb74b523"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestKeyManagerProperties(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		km   catalog.KeyManager
		want string
	}{
		{"external", keyManager1, `{"VALIDITY_PERIOD":"3600","certificate_type":"JWKS","certificate_value":"https://idp.example.com/jwks",` +
			`"claim_mappings":[{"remoteClaim":"sub","localClaim":"user"}],"consumer_key_claim":"client_id","enable_token_hash":false,` +
			`"grant_types":["client_credentials",{"some":[]}],"issuer":"https://idp.example.com","scopes_claim":"scp","self_validate_jwt":true}`},
		{"resident", resident, `{"certificate_type":"JWKS","certificate_value":"https://km.example.com/t/org.example/oauth2/jwks",` +
			`"claim_mappings":[],"consumer_key_claim":"azp","issuer":"https://km.example.com/t/org.example","scopes_claim":"scope",` +
			`"self_validate_jwt":true}`},
		{"keys by other means", catalog.KeyManager{Iss: "i", Properties: map[string]any{
			"certificate_type": "PEM", "Certificate_Value": "LS0t", "jwk\u017f_endpoint": "https://evil.example.com", "a": 1,
		}}, `{"a":1,"claim_mappings":[],"consumer_key_claim":"azp","issuer":"i","scopes_claim":"scope","self_validate_jwt":true}`},
	}
	for _, tt := range tests {
		got, err := marshal(KeyManagerProperties(&tt.km))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, string(got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
		// What is ours cannot be the caller's.
		km := tt.km
		km.Properties = nil
		for name := range KeyManagerProperties(&km) {
			if !catalog.IsReservedProperty(name) {
				t.Errorf("%s: property %s is not reserved", tt.name, name)
			}
		}
	}
	if _, ok := keyManager1.Properties["Self_Validate_JWT"]; !ok || len(keyManager1.Properties) != 7 || len(keyManager1.Properties["grant_types"].([]any)) != 3 {
		t.Error("the key manager was changed")
	}
}

func TestMapMessages(t *testing.T) {
	t.Parallel()
	for _, x := range examples(t) {
		maps, err := MapMessages(x.event, now)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		for _, m := range maps {
			fmt.Fprintf(&b, "%s\n%s", m.Topic, hex.Dump(m.Body))
		}
		golden(t, "map-"+x.name, b.Bytes())

		// A map says what the message in JSON says.
		var want []map[string]any
		for _, m := range mustMessages(t, x.event) {
			p := payload(t, m)
			switch {
			case m.Topic == TopicKeyManagerGo || p["type"] == NotifyClient || p["type"] == NotifySubject:
				continue
			case m.Topic == TopicTokenRevocation:
				delete(p, "eventId")
			case m.Topic == TopicKeyManagerJava:
				delete(p, "organization")
				delete(p, "tokenType")
			}
			want = append(want, p)
		}
		var got []map[string]any
		for _, m := range maps {
			decoded, err := wso2test.DecodeMap(m.Body)
			if err != nil {
				t.Fatalf("%s: %v", x.name, err)
			}
			for name, kind := range map[string]any{"tenantId": int32(0), "expiryTime": int64(0), "timestamp": int64(0)} {
				if v, ok := decoded[name]; ok {
					if fmt.Sprintf("%T", v) != fmt.Sprintf("%T", kind) {
						t.Errorf("%s: %s is of type %T, want %T", x.name, name, v, kind)
					}
					decoded[name] = json.Number(fmt.Sprint(v))
				}
			}
			got = append(got, decoded)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-JSON +map):\n%s", x.name, diff)
		}
	}
}

// The bytes are written by hand from the table of the contract, section 2.5.
func TestEncodeMapBytes(t *testing.T) {
	t.Parallel()
	got, err := encodeMap([]entry{{"s", "é"}, {"t", true}, {"f", false}, {"i", int32(-1234)}, {"l", int64(1)}})
	if err != nil {
		t.Fatal(err)
	}
	want := "00000005" + "7300" + "0a" + "c3a900" + "7400" + "01" + "01" + "6600" + "01" + "00" + "6900" + "06" + "fffffb2e" + "6c00" + "07" +
		"0000000000000001"
	if hex.EncodeToString(got) != want {
		t.Errorf("got %x, want %s", got, want)
	}
	for _, e := range []entry{{"a\x00b", "x"}, {"a", "x\x00"}} {
		if got, err := encodeMap([]entry{e}); err == nil {
			t.Errorf("a zero byte in a text: got %x, want an error", got)
		}
	}
}

func FuzzMapMessage(f *testing.F) {
	f.Add("revokedToken", "at-1", int64(1), int32(-1234), true)
	f.Add("", "", int64(math.MinInt64), int32(math.MinInt32), false)
	f.Fuzz(func(t *testing.T, key, s string, l int64, i int32, b bool) {
		entries := []entry{{key, s}, {key + "l", l}, {key + "i", i}, {key + "b", b}}
		body, err := encodeMap(entries)
		if strings.Contains(key+s, "\x00") {
			if err == nil {
				t.Fatal("no error for a zero byte")
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := wso2test.DecodeMap(body)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(map[string]any{key: s, key + "l": l, key + "i": i, key + "b": b}, got); diff != "" {
			t.Error(diff)
		}
		for n := range body { // no part of it is a map
			if got, err := wso2test.DecodeMap(body[:n]); err == nil {
				t.Errorf("the first %d of %d bytes are %v", n, len(body), got)
			}
		}
	})
}
