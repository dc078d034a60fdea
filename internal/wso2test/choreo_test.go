package wso2test

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/internal/stacktest"
)

func envelope(payload string) string { return `{"event":{"payloadData":` + payload + `}}` }

func notification(eventType, event string) string {
	return envelope(fmt.Sprintf(`{"eventType":%q,"timestamp":1,"event":%q}`, eventType, base64.StdEncoding.EncodeToString([]byte(event))))
}

func keyManager(action, name, value string) string {
	return envelope(fmt.Sprintf(`{"event_type":"key_manager_configuration","action":%q,"name":%q,"type":"default","enabled":true,"value":%q,"tenantDomain":"t"}`,
		action, name, base64.StdEncoding.EncodeToString([]byte(value))))
}

func application(eventType string, timestamp int, id string) string {
	return notification(eventType, fmt.Sprintf(
		`{"timeStamp":%d,"type":%q,"tenantId":-1234,"tenantDomain":"t","uuid":"u","applicationId":%s,"attributes":{}}`, timestamp, eventType, id))
}

// What the adapter drops, leaves unacked or dies of is told by its troubles: a test
// that looks for none can fail.
func TestChoreoConnectTroubles(t *testing.T) {
	t.Parallel()
	const token = `{"revokedToken":"at-1","ttl":"1","expiryTime":7,"type":"JWT","tenantId":1}`
	mark := application("APPLICATION_CREATE", 5, "1")
	marked := func(s *State) { s.Applications["u"] = Application{UUID: "u", ID: 1, TenantDomain: "t"} }
	tests := []struct {
		name, topic string
		bodies      []string
		want        []string // parts of the troubles
		state       func(*State)
	}{
		{"token", "tokenRevocation", []string{envelope(token)}, nil, func(s *State) { s.RevokedTokens["at-1"] = 7 }},
		{"ttl is a number", "tokenRevocation", []string{envelope(strings.Replace(token, `"1"`, `1`, 1)), envelope(token)},
			[]string{"unacked: the message: json: cannot unmarshal number into Go struct field .event.payloadData.ttl"}, func(s *State) { s.RevokedTokens["at-1"] = 7 }},
		{"tenant is text", "tokenRevocation", []string{envelope(strings.Replace(token, `:1}`, `:"1"}`, 1))}, []string{"unacked: the message"}, nil},
		{"wide id", "notification", []string{application("APPLICATION_CREATE", 1, "2147483648")}, []string{"dropped: APPLICATION_CREATE"}, nil},
		{"id is a fraction", "notification", []string{application("APPLICATION_CREATE", 1, "1.0")}, []string{"dropped: APPLICATION_CREATE"}, nil},
		{"id is text", "notification", []string{application("APPLICATION_CREATE", 1, `"1"`)}, []string{"dropped: APPLICATION_CREATE"}, nil},
		{"no base64", "notification", []string{envelope(`{"eventType":"APPLICATION_CREATE","timestamp":1,"event":"?"}`)}, []string{"unacked: the event"}, nil},
		{"older", "notification", []string{application("APPLICATION_CREATE", 5, "1"), application("APPLICATION_UPDATE", 5, "1"),
			application("APPLICATION_DELETE", 4, "1")}, []string{"dropped: APPLICATION_DELETE: a newer"},
			marked},
		{"type inside is another", "notification", []string{notification("APPLICATION_CREATE", `{"type":"APPLICATION_DELETE","uuid":"x"}`), mark}, nil, marked},
		{"scope", "notification", []string{notification("SCOPE_CREATE", `7`), mark}, nil, marked},
		{"policy of subscriptions deleted", "notification", []string{
			notification("POLICY_CREATE", `{"type":"POLICY_CREATE","policyId":1,"policyType":"SUBSCRIPTION","policyName":"Gold"}`),
			notification("POLICY_DELETE", `{"type":"POLICY_DELETE","policyId":1,"policyType":"SUBSCRIPTION","policyName":"Gold"}`),
		}, nil, func(s *State) { s.SubscriptionPolicies[1] = SubscriptionPolicy{Policy: Policy{ID: 1, Name: "Gold"}} }},
		{"key managers of one name", "keymanager", []string{keyManager("add", "KM", `{"a":1}`), keyManager("update", "km", `{"b":true}`)}, nil,
			func(s *State) {
				s.KeyManagers["km"] = KeyManager{Name: "km", Type: "default", Enabled: true, TenantDomain: "t", Configuration: map[string]any{"b": true}}
			}},
		{"key manager without a value", "keymanager", []string{keyManager("delete", "KM", ""), keyManager("add", "KM", `{}`)}, []string{"reader ended: the value"}, nil},
		{"subscription blocked on throttleData", "throttleData", []string{envelope(`{"blockingCondition":"SUBSCRIPTION"}`)}, []string{"reader ended: the message: it blocks"}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			vhost := stacktest.NewVhost(t)
			c := NewChoreoConnect(t, vhost.GatewayAMQPURL)
			ch := publisher(t, vhost.AMQPURL)
			for _, body := range tt.bodies {
				publish(t, ch, tt.topic, body)
			}
			want := NewState()
			if tt.state != nil {
				tt.state(&want)
			}
			c.Await("the effect of the messages", func(got State) bool { return cmp.Equal(want, got) && len(c.troubles) == len(tt.want) })
			for i, part := range tt.want {
				if got := c.Troubles()[i]; !strings.Contains(got, part) {
					t.Errorf("trouble is %q, want one about %q", got, part)
				}
			}
		})
	}
}

func publisher(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.Confirm(false); err != nil {
		t.Fatal(err)
	}
	return ch
}

func publish(t *testing.T, ch *amqp.Channel, topic, body string) {
	t.Helper()
	d, err := ch.PublishWithDeferredConfirm("amq.topic", topic, false, false, amqp.Publishing{ContentType: "text/plain", Body: []byte(body)})
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := d.WaitContext(t.Context()); !ok || err != nil {
		t.Fatalf("publish: %t, %v", ok, err)
	}
}

func TestLoad(t *testing.T) {
	t.Parallel()
	s := NewState()
	for resource, body := range map[string]string{
		"applications":             `{"count":1,"list":[{"uuid":"u","id":1,"name":"App","subName":"alice","policy":"Gold","tokenType":"JWT","attributes":{},"groupIds":[],"tenanDomain":"t"}]}`,
		"application-key-mappings": `{"list":[{"applicationId":1,"applicationUUID":"u","consumerKey":"ck","keyType":"SANDBOX","keyManager":"KM"}]}`,
		"subscriptions":            `{"list":[{"subscriptionId":3,"subscriptionUUID":"s","policyId":"Gold","apiId":2,"apiUUID":"a","appId":1,"applicationUUID":"u","subscriptionState":"BLOCKED"}]}`,
		"application-policies":     `{"list":[{"id":4,"tenantId":-1234,"name":"Gold","quotaType":"requestCount"}]}`,
		"subscription-policies":    `{"list":[{"id":5,"name":"Gold","quotaType":"requestCount","rateLimitCount":7}]}`,
		"keymanagers":              `[{"name":"KM","type":"default","enabled":true,"tenantDomain":"t","configuration":{"issuer":"i"}}]`,
		"revokedjwt":               `[{"jwt_signature":"at-1","expiry_time":7}]`,
	} {
		if err := s.Load(resource, []byte(body)); err != nil {
			t.Error(err)
		}
	}
	want := NewState()
	want.Applications["u"] = Application{UUID: "u", ID: 1, Name: "App", SubName: "alice", Policy: "Gold", TokenType: "JWT", TenantDomain: "t"}
	want.KeyMappings["ck:KM"] = KeyMapping{ApplicationID: 1, ApplicationUUID: "u", ConsumerKey: "ck", KeyType: "SANDBOX", KeyManager: "KM"}
	want.Subscriptions[3] = Subscription{SubscriptionID: 3, SubscriptionUUID: "s", PolicyID: "Gold", APIID: 2, APIUUID: "a", AppID: 1, AppUUID: "u",
		SubscriptionState: "BLOCKED"}
	want.ApplicationPolicies[4] = Policy{ID: 4, Name: "Gold", QuotaType: "requestCount"}
	want.SubscriptionPolicies[5] = SubscriptionPolicy{Policy: Policy{ID: 5, Name: "Gold", QuotaType: "requestCount"}, RateLimitCount: 7}
	want.KeyManagers["km"] = KeyManager{Name: "KM", Type: "default", Enabled: true, TenantDomain: "t", Configuration: map[string]any{"issuer": "i"}}
	want.RevokedTokens["at-1"] = 7
	if diff := cmp.Diff(want, s); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
	for resource, body := range map[string]string{
		"applications":  `[]`,
		"subscriptions": `{"count":0}`,
		"revokedjwt":    `{"revokedJWTList":[]}`,
		"apis":          `{"list":[]}`,
		"keymanagers":   `{"list":[]}`,
	} {
		if err := NewState().Load(resource, []byte(body)); err == nil {
			t.Errorf("%s is loaded from %s", resource, body)
		}
	}
}

func TestDecodeJMS(t *testing.T) {
	t.Parallel()
	good := amqp.Delivery{Exchange: "amq.topic", ContentType: "text/plain", Body: []byte("{}")}
	if m, err := DecodeJMS(good); err != nil || m.Text != "{}" || m.Map != nil {
		t.Errorf("got %+v, %v", m, err)
	}
	for name, change := range map[string]func(*amqp.Delivery){
		"JSON":          func(d *amqp.Delivery) { d.ContentType = "application/json" },
		"parameter":     func(d *amqp.Delivery) { d.ContentType = "text/plain; charset=utf-8" },
		"no type":       func(d *amqp.Delivery) { d.ContentType = "" },
		"exchange":      func(d *amqp.Delivery) { d.Exchange = "rescind.events" },
		"encoding":      func(d *amqp.Delivery) { d.ContentEncoding = "gzip" },
		"headers":       func(d *amqp.Delivery) { d.Headers = amqp.Table{"JMS_QPID_DESTTYPE": int32(1)} },
		"timestamp":     func(d *amqp.Delivery) { d.Timestamp = time.Unix(1, 0) },
		"not UTF-8":     func(d *amqp.Delivery) { d.Body = []byte{0xff} },
		"text as a map": func(d *amqp.Delivery) { d.ContentType = "jms/map-message" },
	} {
		d := good
		change(&d)
		if m, err := DecodeJMS(d); err == nil {
			t.Errorf("%s: got %+v, want an error", name, m)
		}
	}
}

// One of each type of the table, by hand.
func TestDecodeMap(t *testing.T) {
	t.Parallel()
	body := "\x00\x00\x00\x0c" +
		"a\x00\x01\x01" + "b\x00\x02\xff" + "c\x00\x03\x00\x00\x00\x02hi" + "d\x00\x03\xff\xff\xff\xff" + "e\x00\x04\xff\xfe" + "f\x00\x05\x00A" +
		"g\x00\x06\x80\x00\x00\x00" + "h\x00\x07\x00\x00\x00\x00\x00\x00\x00\x01" + "i\x00\x08\x3f\x80\x00\x00" +
		"j\x00\x09\x3f\xf0\x00\x00\x00\x00\x00\x00" + "k\x00\x0atext\x00" + "l\x00\x0b"
	want := map[string]any{
		"a": true, "b": byte(255), "c": []byte("hi"), "d": nil, "e": int16(-2), "f": uint16('A'), "g": int32(-2147483648), "h": int64(1),
		"i": float32(1), "j": float64(1), "k": "text", "l": nil,
	}
	got, err := DecodeMap([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("map (-want +got):\n%s", diff)
	}
	for name, bad := range map[string]string{
		"nothing": "", "short count": "\x00\x00\x00", "negative count": "\xff\xff\xff\xff", "type 12": "\x00\x00\x00\x01a\x00\x0c",
		"more bytes": "\x00\x00\x00\x00x", "no end of a name": "\x00\x00\x00\x01abc", "long bytes": "\x00\x00\x00\x01a\x00\x03\x7f\xff\xff\xff",
		"name twice": "\x00\x00\x00\x02a\x00\x0ba\x00\x0b",
	} {
		if got, err := DecodeMap([]byte(bad)); err == nil {
			t.Errorf("%s: got %v, want an error", name, got)
		}
	}
}
