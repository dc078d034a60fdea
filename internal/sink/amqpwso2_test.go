package sink

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
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

// choreoConnect consumes as WSO2's Choreo Connect adapter does, with the
// permissions of a gateway.
func choreoConnect(t *testing.T, u string) <-chan amqp.Delivery {
	t.Helper()
	ch := dialChannel(t, u)
	if err := ch.ExchangeDeclare("amq.topic", "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	q, err := ch.QueueDeclare("", false, true, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.QueueBind(q.Name, "tokenRevocation", "amq.topic", false, nil); err != nil {
		t.Fatal(err)
	}
	deliveries, err := ch.Consume(q.Name, "jms-consumer-key", false, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return deliveries
}

// tokenRevocation has the types that the adapter decodes into.
type tokenRevocation struct {
	Event struct {
		PayloadData struct {
			EventID      string `json:"eventId"`
			RevokedToken string `json:"revokedToken"`
			TTL          string `json:"ttl"`
			ExpiryTime   int64  `json:"expiryTime"`
			Type         string `json:"type"`
			TenantID     int    `json:"tenantId"`
		} `json:"payloadData"`
	} `json:"event"`
}

func TestAMQPWSO2ToChoreoConnect(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	deliveries := choreoConnect(t, vhost.GatewayAMQPURL)
	s := openedAMQPWSO2(t, AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}})
	now := time.Now()
	e := relaytest.Events(88213, 1)[0]
	r, err := e.Revocation()
	if err != nil {
		t.Fatal(err)
	}
	mustDeliver(t, s, e)

	got := mustReceive(t, deliveries)
	want := message{
		Exchange: "amq.topic", RoutingKey: "tokenRevocation", ContentType: "text/plain",
		MessageID: string(relaytest.Epoch) + ":88213", DeliveryMode: 2,
	}
	if diff := cmp.Diff(want, seen(got)); diff != "" {
		t.Errorf("message (-want +got):\n%s", diff)
	}
	var body tokenRevocation
	dec := json.NewDecoder(bytes.NewReader(got.Body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&body); err != nil {
		t.Fatalf("decode %s: %v", got.Body, err)
	}
	data := body.Event.PayloadData
	ttl, err := strconv.ParseInt(data.TTL, 10, 64)
	if err != nil || ttl > r.Exp-now.Unix() || ttl < r.Exp-time.Now().Unix() {
		t.Errorf("ttl is %q, want the seconds until %d", data.TTL, r.Exp)
	}
	wantBody := tokenRevocation{}
	wantBody.Event.PayloadData = data
	wantBody.Event.PayloadData.EventID = "3359ecb0-c565-5564-9fbf-10d9cb74b523"
	wantBody.Event.PayloadData.RevokedToken = r.Target.ID
	wantBody.Event.PayloadData.ExpiryTime = r.Exp * 1000
	wantBody.Event.PayloadData.Type = "JWT"
	wantBody.Event.PayloadData.TenantID = -1234
	if diff := cmp.Diff(wantBody, body); diff != "" {
		t.Errorf("body (-want +got):\n%s", diff)
	}
	if err := got.Ack(false); err != nil {
		t.Errorf("ack: %v", err)
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
		2: func(r *revocation.Revocation) { r.Target.Kind = revocation.KindClient },
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
	_, err := NewAMQPWSO2(AMQPWSO2Config{RoutingKey: strings.Repeat("x", 256)})
	for _, want := range []string{"sink amqp-wso2", "routing key has 256 bytes", "URL is not"} {
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
