package wso2

import (
	"encoding/json"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
)

const commonMembers = `"eventId":"e-1","timeStamp":1760000000000,"tenantId":-1234,"tenantDomain":"carbon.super","properties":{},`

func notified(typ string, change func(*Notification)) Notification {
	n := Notification{EventID: "e-1", Type: typ, TenantID: -1234, TenantDomain: "carbon.super"}
	change(&n)
	return n
}

func TestParseNotification(t *testing.T) {
	t.Parallel()
	token := NotifiedToken{EventID: "e-1", Token: "at-1", TokenType: "JWT", ConsumerKey: "ck-1", ExpiryMillis: 1760003600000}
	tests := []struct {
		name, body string
		want       Notification
	}{
		{"token", `{` + commonMembers + `"type":"token_revocation","accessToken":"at-1","expiryTime":1760003600000,"user":"alice","consumerKey":"ck-1","tokenType":"JWT"}`,
			notified(NotifyToken, func(n *Notification) { n.Tokens = []NotifiedToken{token} })},
		{"unlimited token", `{` + commonMembers + `"type":"token_revocation","accessToken":"at-1","expiryTime":9223372036854775807}`,
			notified(NotifyToken, func(n *Notification) {
				n.Tokens = []NotifiedToken{{EventID: "e-1", Token: "at-1", ExpiryMillis: Unlimited}}
			})},
		{"token of unknown end", `{` + commonMembers + `"type":"token_revocation","accessToken":"at-1","consumerKey":null}`,
			notified(NotifyToken, func(n *Notification) {
				n.Tokens = []NotifiedToken{{EventID: "e-1", Token: "at-1", ExpiryMillis: math.MaxInt64}}
			})},
		{"token of negative end", `{` + commonMembers + `"type":"token_revocation","accessToken":"at-1","expiryTime":-1}`,
			notified(NotifyToken, func(n *Notification) {
				n.Tokens = []NotifiedToken{{EventID: "e-1", Token: "at-1", ExpiryMillis: math.MaxInt64}}
			})},
		{"token that ended long ago", `{` + commonMembers + `"type":"token_revocation","accessToken":"at-1","expiryTime":1}`,
			notified(NotifyToken, func(n *Notification) { n.Tokens = []NotifiedToken{{EventID: "e-1", Token: "at-1", ExpiryMillis: 1}} })},
		{"little", `{"type":"token_revocation","accessToken":"at-1"}`,
			Notification{Type: NotifyToken, Tokens: []NotifiedToken{{Token: "at-1", ExpiryMillis: Unlimited}}}},
		{"client", `{` + commonMembers + `"type":"consumer_app_revocation_event","consumerKey":"ck-1","revocationTime":1760000000123}`,
			notified(NotifyClient, func(n *Notification) { n.ConsumerKey, n.RevocationTimeMillis = "ck-1", 1760000000123 })},
		{"user", `{` + commonMembers + `"type":"subject_entity_revocation_event","entityId":"u-1","entityType":"USER_ID","revocationTime":1760000000123}`,
			notified(NotifySubject, func(n *Notification) {
				n.EntityID, n.EntityType, n.RevocationTimeMillis = "u-1", EntityUser, 1760000000123
			})},
		{"client as an entity", `{` + commonMembers + `"type":"subject_entity_revocation_event","entityId":"ck-1","entityType":"CLIENT_ID","revocationTime":1}`,
			notified(NotifySubject, func(n *Notification) { n.EntityID, n.EntityType, n.RevocationTimeMillis = "ck-1", EntityClient, 1 })},
		{"batch", `{` + commonMembers + `"type":"token_revocation_batch","consumerKey":"ck-0","tokenRevocationEventList":[` +
			`{"eventId":"e-1","accessToken":"at-1","expiryTime":1760003600000,"consumerKey":"ck-1","tokenType":"JWT"},` +
			`{"eventId":"e-3","accessToken":"at-2","expiryTime":9223372036854775807,"type":"token_revocation"}]}`,
			notified(NotifyBatch, func(n *Notification) {
				n.ConsumerKey = "ck-0"
				n.Tokens = []NotifiedToken{token, {EventID: "e-3", Token: "at-2", ConsumerKey: "ck-0", ExpiryMillis: Unlimited}}
			})},
		{"empty batch", `{` + commonMembers + `"type":"token_revocation_batch","consumerKey":"ck-0","tokenRevocationEventList":[]}`,
			notified(NotifyBatch, func(n *Notification) { n.ConsumerKey = "ck-0" })},
		{"unknown members", `{"type":"token_revocation","accessToken":"at-1","properties":7,"user":[],"more":{"type":7}}`,
			Notification{Type: NotifyToken, Tokens: []NotifiedToken{{Token: "at-1", ExpiryMillis: Unlimited}}}},
		{"type that another one's name is in", `{"type":"token_revocation","accessToken":"at-1","user":"consumer_app_revocation_event"}`,
			Notification{Type: NotifyToken, Tokens: []NotifiedToken{{Token: "at-1", ExpiryMillis: Unlimited}}}},

		{"no type, token", `{"accessToken":"at-1","x":"token_revocation"}`,
			Notification{Type: NotifyToken, Tokens: []NotifiedToken{{Token: "at-1", ExpiryMillis: Unlimited}}}},
		{"no type, client", `{"x":"token_revocation consumer_app_revocation_event subject_entity_revocation_event","consumerKey":"ck-1","revocationTime":1}`,
			Notification{Type: NotifyClient, ConsumerKey: "ck-1", RevocationTimeMillis: 1}},
		{"no type, subject", `{"x":"token_revocation subject_entity_revocation_event","entityId":"u","entityType":"USER_ID","revocationTime":1}`,
			Notification{Type: NotifySubject, EntityID: "u", EntityType: EntityUser, RevocationTimeMillis: 1}},
		{"no type, batch", `{"type":null,"x":"token_revocation_batch","tokenRevocationEventList":[{"accessToken":"at-1"}]}`,
			Notification{Type: NotifyBatch, Tokens: []NotifiedToken{{Token: "at-1", ExpiryMillis: Unlimited}}}},
	}
	for _, tt := range tests {
		got, err := ParseNotification([]byte(tt.body))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestParseNotificationRefuses(t *testing.T) {
	t.Parallel()
	const secret = "hunter2-secret"
	tests := []struct{ body, want string }{
		{``, "not a JSON object"},
		{`null`, "has no type"},
		{`[]`, "not a JSON object"},
		{`"` + secret + `"`, "not a JSON object"},
		{`{} {}`, "not a JSON object"},
		{`{}`, "has no type"},
		{`{"type":"weather_event","accessToken":"` + secret + `"}`, "type is not token_revocation"},
		{`{"type":7}`, "type is not text"},
		{`{"type":"token_revocation"}`, "without accessToken"},
		{`{"type":"token_revocation","accessToken":7}`, "accessToken is not text"},
		{`{"type":"token_revocation","accessToken":"` + secret + `","expiryTime":"` + secret + `"}`, "expiryTime is not an integer"},
		{`{"type":"token_revocation","accessToken":"a","expiryTime":1.5}`, "expiryTime is not an integer"},
		{`{"type":"token_revocation","accessToken":"a","expiryTime":9223372036854775808}`, "expiryTime is not an integer"},
		{`{"type":"token_revocation","accessToken":"a","tenantId":"-1234"}`, "tenantId is not an integer of 32 bits"},
		{`{"type":"token_revocation","accessToken":"a","tenantId":2147483648}`, "tenantId is not an integer of 32 bits"},
		{`{"type":"token_revocation","accessToken":"a","tenantDomain":{}}`, "tenantDomain is not text"},
		{`{"type":"token_revocation","accessToken":"a","eventId":1}`, "eventId is not text"},
		{`{"type":"consumer_app_revocation_event","revocationTime":1}`, "no consumerKey"},
		{`{"type":"consumer_app_revocation_event","consumerKey":"c"}`, "no revocationTime"},
		{`{"type":"consumer_app_revocation_event","consumerKey":"c","revocationTime":"1760000000000"}`, "revocationTime is not an integer"},
		{`{"type":"consumer_app_revocation_event","consumerKey":"c","revocationTime":-1}`, "not positive"},
		{`{"type":"subject_entity_revocation_event","entityType":"USER_ID","revocationTime":1}`, "no entityId"},
		{`{"type":"subject_entity_revocation_event","entityId":"u","revocationTime":1}`, "neither USER_ID nor CLIENT_ID"},
		{`{"type":"subject_entity_revocation_event","entityId":"u","entityType":"user_id","revocationTime":1}`, "neither USER_ID nor CLIENT_ID"},
		{`{"type":"subject_entity_revocation_event","entityId":"u","entityType":"USER_ID"}`, "no revocationTime"},
		{`{"type":"token_revocation_batch","consumerKey":"c"}`, "no tokenRevocationEventList"},
		{`{"type":"token_revocation_batch","tokenRevocationEventList":[{"accessToken":"a"},{}]}`, "without accessToken"},
		{`{"type":"token_revocation_batch","tokenRevocationEventList":[null]}`, "without accessToken"},
		{`{"type":"token_revocation_batch","tokenRevocationEventList":["` + secret + `"]}`, "tokenRevocationEventList is not of the expected type"},
		{`{"type":"token_revocation_batch","tokenRevocationEventList":[{"accessToken":1}]}`, "accessToken is not text"},
		{strings.Repeat(`{"a":`, 20_000), "not a JSON object"},
	}
	for _, tt := range tests {
		got, err := ParseNotification([]byte(tt.body))
		detail, ok := errors.AsType[*revocation.InvalidError](err)
		if !ok || !strings.Contains(detail.Detail, tt.want) {
			t.Errorf("%.100s: got %+v, %v, want an InvalidError that says %q", tt.body, got, err, tt.want)
			continue
		}
		if strings.Contains(detail.Detail, secret) {
			t.Errorf("%.100s: the error repeats a value: %v", tt.body, err)
		}
	}
}

// Whatever is read can be acted on, and means the same when it is told again.
func FuzzParseNotification(f *testing.F) {
	for _, seed := range []string{
		`{"type":"token_revocation","accessToken":"at-1","expiryTime":9223372036854775807,"tenantId":-1234}`,
		`{"type":"token_revocation_batch","consumerKey":"c","tokenRevocationEventList":[{"accessToken":"a","eventId":"e"}]}`,
		`{"type":"consumer_app_revocation_event","consumerKey":"c","revocationTime":1}`,
		`{"type":"subject_entity_revocation_event","entityId":"u","entityType":"USER_ID","revocationTime":1}`,
		`{"x":"token_revocation"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		n, err := ParseNotification(body)
		if err != nil {
			if _, ok := errors.AsType[*revocation.InvalidError](err); !ok {
				t.Fatalf("the error is %T: %v", err, err)
			}
			if !cmp.Equal(Notification{}, n) {
				t.Fatalf("there is an error, and %+v", n)
			}
			return
		}
		bulk := n.Type == NotifyClient || n.Type == NotifySubject
		switch {
		case !slices.Contains([]string{NotifyToken, NotifyBatch, NotifyClient, NotifySubject}, n.Type),
			n.Type == NotifyToken && len(n.Tokens) != 1,
			bulk != (n.RevocationTimeMillis > 0),
			bulk && n.ConsumerKey+n.EntityID == "",
			slices.ContainsFunc(n.Tokens, func(t NotifiedToken) bool { return t.Token == "" || t.ExpiryMillis <= 0 }):
			t.Fatalf("%+v cannot be acted on", n)
		}
		again := map[string]any{
			"type": n.Type, "eventId": n.EventID, "tenantId": n.TenantID, "tenantDomain": n.TenantDomain, "consumerKey": n.ConsumerKey,
			"entityId": n.EntityID, "entityType": n.EntityType, "revocationTime": n.RevocationTimeMillis,
		}
		list := []map[string]any{}
		for _, t := range n.Tokens {
			list = append(list, map[string]any{
				"eventId": t.EventID, "accessToken": t.Token, "tokenType": t.TokenType, "consumerKey": t.ConsumerKey, "expiryTime": t.ExpiryMillis,
			})
		}
		if n.Type == NotifyToken {
			for k, v := range list[0] {
				again[k] = v
			}
		} else {
			again["tokenRevocationEventList"] = list
		}
		b, err := json.Marshal(again)
		if err != nil {
			t.Fatal(err)
		}
		if same, err := ParseNotification(b); err != nil || !cmp.Equal(n, same) {
			t.Fatalf("%s is read as %+v, %v, want %+v", b, same, err, n)
		}
	})
}
