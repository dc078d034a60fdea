package sink

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
	"github.com/rescindhq/rescind/internal/wso2test"
)

func TestAMQPWSO2(t *testing.T) {
	t.Parallel()
	relaytest.Sink(t, func(t *testing.T) relaytest.Far {
		vhost := stacktest.NewVhost(t)
		u, proxy := proxied(t, vhost.AMQPURL)
		s, err := NewAMQPWSO2(AMQPWSO2Config{AMQPBroker: patient(u)})
		if err != nil {
			t.Fatal(err)
		}
		return relaytest.Far{
			Sink: s, Proxy: proxy, Next: nextSeq(consume(t, vhost.AMQPURL, "amq.topic", "tokenRevocation")),
			Secrets: []string{passwordOf(t, u), u},
		}
	})
}

func openedAMQPWSO2(t *testing.T, cfg AMQPWSO2Config) *AMQPWSO2 {
	t.Helper()
	relaytest.NoLeaks(t)
	s, err := NewAMQPWSO2(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	mustOpen(t, s, 0)
	return s
}

// wire is what is on the wire of every message in WSO2's words.
func wire(key, contentType, id string) message {
	return message{
		Exchange: "amq.topic", RoutingKey: key, ContentType: contentType, MessageID: string(relaytest.Epoch) + ":" + id, DeliveryMode: 2,
	}
}

func changeEvents(t *testing.T, first revocation.Seq, changes ...catalog.Change) []revocation.Event {
	t.Helper()
	events := make([]revocation.Event, 0, len(changes))
	for i, c := range changes {
		e, err := catalog.NewEvent(c)
		if err != nil {
			t.Fatal(err)
		}
		e.Position = revocation.Position{Epoch: relaytest.Epoch, Seq: first + revocation.Seq(i)}
		events = append(events, e)
	}
	return events
}

func metaOf(n int, timestamp int64) catalog.Meta {
	return catalog.Meta{ID: int32(n), UUID: fmt.Sprintf("a1a2b3c4-0000-4000-8000-%012d", n), Tenant: revocation.SuperTenant, Timestamp: timestamp}
}

func TestAMQPWSO2Wire(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	deliveries := consume(t, vhost.AMQPURL, "amq.topic", "#")
	s := openedAMQPWSO2(t, AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}, RoutingKey: "revoked"})
	mustDeliver(t, s, relaytest.Events(1, 1)...)
	mustDeliver(t, s, changeEvents(t, 2,
		catalog.Change{Verb: catalog.Created, Entity: &catalog.Application{Meta: metaOf(1, 1)}},
		catalog.Change{Verb: catalog.Created, Entity: &catalog.Tenant{Meta: metaOf(2, 1)}},
		catalog.Change{Verb: catalog.LifecycleChanged, Entity: &catalog.API{Meta: metaOf(3, 1)}},
		catalog.Change{Verb: catalog.Created, Entity: &catalog.KeyManager{Meta: metaOf(4, 1)}},
	)...)
	for _, want := range []message{
		wire("revoked", "text/plain", "1"),
		wire("notification", "text/plain", "2"),
		wire("notification", "text/plain", "4"),
		wire("notification", "text/plain", "4#2"),
		wire("keymanager", "text/plain", "5"),
		wire("keyManager", "text/plain", "5#2"),
	} {
		got := mustReceive(t, deliveries)
		if diff := cmp.Diff(want, seen(got)); diff != "" {
			t.Errorf("message (-want +got):\n%s", diff)
		}
		if m, err := wso2test.DecodeJMS(got); err != nil || !json.Valid([]byte(m.Text)) {
			t.Errorf("as a gateway in Java sees it: %+v, %v", m, err)
		}
	}
}

// A catalog's life as an unmodified Choreo Connect has it in memory.
func TestAMQPWSO2ToChoreoConnect(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	s := openedAMQPWSO2(t, AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}})
	cc := wso2test.NewChoreoConnect(t, vhost.GatewayAMQPURL)
	policy := &catalog.Policy{Meta: metaOf(1, 10), Kind: catalog.PolicyApplication, Name: "10PerMin", QuotaType: "requestCount"}
	tier := &catalog.Policy{Meta: metaOf(2, 10), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount",
		RateLimitCount: 5, RateLimitTimeUnit: "sec"}
	api := &catalog.API{Meta: metaOf(3, 10), Name: "Pizza", Version: "1", Context: "/pizza/1", GatewayLabels: []string{"Default"}}
	km := &catalog.KeyManager{Meta: metaOf(4, 10), Name: "Resident Key Manager", Type: "default", Enabled: true, Resident: true,
		Iss: "https://km.example.com", TokenType: "DIRECT"}
	app := &catalog.Application{Meta: metaOf(5, 10), Name: "App", Owner: "alice", Policy: "10PerMin", TokenType: "JWT"}
	key := &catalog.KeyMapping{Meta: metaOf(6, 10), Application: catalog.Ref{ID: 5, UUID: app.UUID}, ConsumerKey: "ck-1",
		KeyType: catalog.Production, KeyManager: km.Name, Iss: km.Iss}
	sub := &catalog.Subscription{Meta: metaOf(7, 10), Application: key.Application, API: catalog.Ref{ID: 3, UUID: api.UUID}, Policy: "Gold",
		State: catalog.Unblocked}
	seq := revocation.Seq(1)
	publish := func(changes ...catalog.Change) {
		t.Helper()
		mustDeliver(t, s, changeEvents(t, seq, changes...)...)
		seq += revocation.Seq(len(changes))
	}
	// The message with this mark is the last one: what was on the other topics may be later.
	settle := func() wso2test.State {
		t.Helper()
		marks := relaytest.Events(seq, 1)
		r, err := marks[0].Revocation()
		if err != nil {
			t.Fatal(err)
		}
		mustDeliver(t, s, marks...)
		seq++
		cc.Await("the mark", func(s wso2test.State) bool { return s.RevokedTokens[r.Target.ID] == r.Exp*1000 })
		return cc.State()
	}

	publish(
		catalog.Change{Verb: catalog.Created, Entity: km}, catalog.Change{Verb: catalog.Created, Entity: policy},
		catalog.Change{Verb: catalog.Created, Entity: tier}, catalog.Change{Verb: catalog.Created, Entity: api},
		catalog.Change{Verb: catalog.Deployed, Entity: api, Labels: api.GatewayLabels}, catalog.Change{Verb: catalog.Created, Entity: app},
		catalog.Change{Verb: catalog.Created, Entity: key}, catalog.Change{Verb: catalog.Created, Entity: sub},
	)
	cc.Await("the subscription and the key manager", func(s wso2test.State) bool { return len(s.Subscriptions) == 1 && len(s.KeyManagers) == 1 })
	want := wso2test.NewState()
	want.KeyManagers["resident key manager"] = wso2test.KeyManager{Name: "Resident Key Manager", Type: "default", Enabled: true,
		TenantDomain: "carbon.super", Configuration: map[string]any{
			"self_validate_jwt": true, "issuer": "https://km.example.com", "certificate_type": "JWKS",
			"certificate_value": "https://km.example.com/oauth2/jwks", "consumer_key_claim": "azp", "scopes_claim": "scope", "claim_mappings": []any{},
		}}
	want.ApplicationPolicies[1] = wso2test.Policy{ID: 1, Name: "10PerMin", QuotaType: "requestCount"}
	want.SubscriptionPolicies[2] = wso2test.SubscriptionPolicy{Policy: wso2test.Policy{ID: 2, Name: "Gold", QuotaType: "requestCount"},
		RateLimitCount: 5, RateLimitTimeUnit: "sec"}
	want.Deployed[api.UUID] = []string{"Default"}
	want.Applications[app.UUID] = wso2test.Application{UUID: app.UUID, ID: 5, Name: "App", SubName: "alice", Policy: "10PerMin", TokenType: "JWT",
		TenantDomain: "carbon.super"}
	want.KeyMappings["ck-1:Resident Key Manager"] = wso2test.KeyMapping{ApplicationID: 5, ApplicationUUID: app.UUID, ConsumerKey: "ck-1",
		KeyType: "PRODUCTION", KeyManager: "Resident Key Manager", TenantDomain: "carbon.super"}
	wantSub := wso2test.Subscription{SubscriptionID: 7, SubscriptionUUID: sub.UUID, PolicyID: "Gold", APIID: 3, APIUUID: api.UUID, AppID: 5,
		AppUUID: app.UUID, SubscriptionState: "UNBLOCKED", TenantDomain: "carbon.super"}
	want.Subscriptions[7] = wantSub
	if diff := cmp.Diff(want, cc.State()); diff != "" {
		t.Errorf("after all was created (-want +got):\n%s", diff)
	}

	blocked := *sub
	blocked.Timestamp, blocked.ApplicationBlocked = 11, true
	publish(catalog.Change{Verb: catalog.Updated, Entity: &blocked}, catalog.Change{Verb: catalog.Created, Entity: sub}) // one old, again
	cc.Await("the blocked subscription", func(s wso2test.State) bool { return s.Subscriptions[7].SubscriptionState == "BLOCKED" })
	unblocked := *sub
	unblocked.Timestamp = 12
	publish(catalog.Change{Verb: catalog.Updated, Entity: &unblocked})
	cc.Await("the unblocked subscription", func(s wso2test.State) bool { return s.Subscriptions[7] == wantSub })
	if got := cc.Troubles(); len(got) != 1 || !strings.Contains(got[0], "newer") {
		t.Errorf("troubles are %q, want the old subscription dropped", got)
	}

	cc.Disconnect()
	publish(catalog.Change{Verb: catalog.Deleted, Entity: key}) // lost
	cc.Reconnect()
	publish(
		catalog.Change{Verb: catalog.Deleted, Entity: &unblocked}, catalog.Change{Verb: catalog.Deleted, Entity: app},
		catalog.Change{Verb: catalog.Undeployed, Entity: api, Labels: api.GatewayLabels}, catalog.Change{Verb: catalog.Deleted, Entity: api},
		catalog.Change{Verb: catalog.Deleted, Entity: policy}, catalog.Change{Verb: catalog.Deleted, Entity: km},
	)
	cc.Await("the deletions", func(s wso2test.State) bool { return len(s.ApplicationPolicies) == 0 && len(s.KeyManagers) == 0 })
	got := settle()
	if len(got.RevokedTokens) != 1 {
		t.Errorf("revoked tokens are %v", got.RevokedTokens)
	}
	clear(got.RevokedTokens)
	end := wso2test.NewState()
	end.KeyMappings, end.SubscriptionPolicies = want.KeyMappings, want.SubscriptionPolicies
	if diff := cmp.Diff(end, got); diff != "" {
		t.Errorf("at the end (-want +got):\n%s", diff)
	}
	if got := cc.Troubles(); len(got) != 1 {
		t.Errorf("troubles are %q", got)
	}
}

// The revocation of a client reaches gateways in Java, and does no harm to one in Go.
func TestAMQPWSO2BulkRevocation(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	deliveries := consume(t, vhost.AMQPURL, "amq.topic", "tokenRevocation")
	s := openedAMQPWSO2(t, AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}})
	cc := wso2test.NewChoreoConnect(t, vhost.GatewayAMQPURL)
	events := relaytest.Events(1, 2)
	e, err := revocation.NewEvent(revocation.Revocation{
		Target: revocation.Target{Kind: revocation.KindClient, Iss: "https://km.example.com", ID: "ck-1"}, Tenant: revocation.SuperTenant,
		NotAfter: time.Now().Unix(), Exp: time.Now().Unix() + 3600,
	})
	if err != nil {
		t.Fatal(err)
	}
	events[0].Type, events[0].Data = e.Type, e.Data
	mustDeliver(t, s, events...)
	var body struct {
		Event struct {
			PayloadData struct {
				RevokedToken []byte `json:"revokedToken"` // base64
				Type         string `json:"type"`
			} `json:"payloadData"`
		} `json:"event"`
	}
	if err := json.Unmarshal(mustReceive(t, deliveries).Body, &body); err != nil {
		t.Fatal(err)
	}
	var inner map[string]string // a number in it would be a ClassCastException
	if err := json.Unmarshal(body.Event.PayloadData.RevokedToken, &inner); err != nil || inner["consumer_key"] != "ck-1" {
		t.Errorf("inside of the %s is %v, %v", body.Event.PayloadData.Type, inner, err)
	}
	cc.Await("both", func(s wso2test.State) bool { return len(s.RevokedTokens) == 2 })
	if got := cc.Troubles(); len(got) > 0 {
		t.Errorf("troubles are %q", got)
	}
}

func TestAMQPWSO2LeavesOutWhatGatewaysDoNotKnow(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	next := nextSeq(consume(t, vhost.AMQPURL, "amq.topic", "#"))
	s := openedAMQPWSO2(t, AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}})
	events := relaytest.Events(1, 5)
	for i, change := range map[int]func(*revocation.Revocation){
		0: func(r *revocation.Revocation) { r.Exp = 1 },
		2: func(r *revocation.Revocation) { r.Target.Kind = revocation.KindSession },
		3: func(r *revocation.Revocation) { r.Target = revocation.DigestTarget(r.Target.Iss, "opaque") },
	} {
		r, err := events[i].Revocation()
		if err != nil {
			t.Fatal(err)
		}
		change(&r)
		e, err := revocation.NewEvent(r)
		if err != nil {
			t.Fatal(err)
		}
		events[i].Type, events[i].Data = e.Type, e.Data
	}
	mustDeliver(t, s, events[0]) // nothing to send is no error
	mustDeliver(t, s, events...)
	for _, want := range []revocation.Seq{2, 5} {
		if got, err := next(t.Context()); got != want || err != nil {
			t.Fatalf("got %d, %v, want %d", got, err, want)
		}
	}
}

func TestAMQPWSO2RefusesAnEventThatCannotBeRead(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	s := openedAMQPWSO2(t, AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}})
	events := relaytest.Events(1, 1)
	events[0].Data = json.RawMessage(`{}`)
	err := s.Deliver(t.Context(), events)
	if err == nil || !strings.Contains(err.Error(), "needs an operator") {
		t.Errorf("error is %v, want a permanent one", err)
	}
}

// A gateway's user can read and cannot forge: neither by hand nor with a sink.
func TestGatewayCannotPublish(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	declareEvents(t, dialChannel(t, vhost.AMQPURL))
	for _, exchange := range []string{"rescind.events", "amq.topic"} {
		ch := dialChannel(t, vhost.GatewayAMQPURL)
		closed := ch.NotifyClose(make(chan *amqp.Error, 1))
		if err := ch.Publish(exchange, "tokenRevocation", false, false, amqp.Publishing{Body: []byte("{}")}); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-closed:
			if err == nil || err.Code != amqp.AccessRefused {
				t.Errorf("publish to %s as a gateway: %v, want 403", exchange, err)
			}
		case <-t.Context().Done():
			t.Errorf("publish to %s as a gateway is not refused", exchange)
		}
	}

	s := openedAMQPWSO2(t, AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: vhost.GatewayAMQPURL}})
	err := s.Deliver(t.Context(), relaytest.Events(1, 3000))
	if err == nil || !strings.Contains(err.Error(), "ACCESS_REFUSED") {
		t.Errorf("deliver as a gateway: %v, want ACCESS_REFUSED", err)
	}
	events, err := NewAMQP(AMQPConfig{AMQPBroker: AMQPBroker{URL: vhost.GatewayAMQPURL}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := events.Open(t.Context(), revocation.Position{}); err == nil || !strings.Contains(err.Error(), "ACCESS_REFUSED") {
		t.Errorf("declare rescind.events as a gateway: %v, want ACCESS_REFUSED", err)
	}
}

// The exchange of the gateways is never declared: one that is missing stays so.
func TestAMQPWSO2DoesNotDeclare(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	s, err := NewAMQPWSO2(AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}, Exchange: "amq.topic2"})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, err := s.Open(t.Context(), revocation.Position{})
		if err == nil || !strings.Contains(err.Error(), "NOT_FOUND") {
			t.Fatalf("open: %v, want NOT_FOUND", err)
		}
	}
}

func TestNewAMQPWSO2Checks(t *testing.T) {
	t.Parallel()
	_, err := NewAMQPWSO2(AMQPWSO2Config{RoutingKey: strings.Repeat("x", 256), MinSpacing: 1, SweepEvery: time.Millisecond})
	for _, want := range []string{"sink amqp-wso2", "routing key has 256 bytes", "URL is not", "minimum spacing is 1ns", "sweep is 1ms", "Live is not set"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one that says %q", err, want)
		}
	}
}

var _ relay.Sink = (*AMQPWSO2)(nil)

// A broker that is gone shows at the next heartbeat, though there is nothing to deliver.
func TestAMQPWSO2NoticesALostBroker(t *testing.T) {
	t.Parallel()
	u, proxy := proxied(t, stacktest.NewVhost(t).AMQPURL)
	s := openedAMQPWSO2(t, AMQPWSO2Config{AMQPBroker: patient(u)})
	if err := s.Beat(t.Context(), revocation.Heartbeat{}); err != nil {
		t.Fatalf("a heartbeat while all is well: %v", err)
	}
	proxy.Cut()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for s.Beat(t.Context(), revocation.Heartbeat{}) == nil {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("the lost connection goes unnoticed")
		}
	}
	if err := s.Beat(t.Context(), revocation.Heartbeat{}); err == nil {
		t.Error("a heartbeat without a connection succeeds")
	}
	mustOpen(t, s, 0)
	if err := s.Beat(t.Context(), revocation.Heartbeat{}); err != nil {
		t.Errorf("a heartbeat after the sink was opened again: %v", err)
	}
}
