package sink

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime/pprof"
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

// patient is the time limits of tests in which something else must end a wait.
func patient(u string) AMQPBroker {
	return AMQPBroker{URL: u, ConfirmTimeout: time.Minute, DialTimeout: time.Minute}
}

func passwordOf(t testing.TB, raw string) string {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	password, ok := u.User.Password()
	if !ok {
		t.Fatal("the URL has no password")
	}
	return password
}

// proxied is raw with a proxy in the place of its host.
func proxied(t *testing.T, raw string) (string, *relaytest.Proxy) {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	proxy := relaytest.NewProxy(t, u.Host)
	u.Host = proxy.Addr()
	return u.String(), proxy
}

func dialChannel(t testing.TB, u string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(u)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func declareEvents(t testing.TB, ch *amqp.Channel) {
	t.Helper()
	if err := ch.ExchangeDeclare("rescind.events", "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
}

// consume binds a queue of its own, on a connection of its own.
func consume(t testing.TB, u, exchange string, keys ...string) <-chan amqp.Delivery {
	t.Helper()
	ch := dialChannel(t, u)
	if exchange == "rescind.events" {
		declareEvents(t, ch)
	}
	q, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		if err := ch.QueueBind(q.Name, key, exchange, false, nil); err != nil {
			t.Fatal(err)
		}
	}
	deliveries, err := ch.Consume(q.Name, "", true, true, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return deliveries
}

func receive(ctx context.Context, deliveries <-chan amqp.Delivery) (amqp.Delivery, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("no message within 30s"))
	defer cancel()
	select {
	case d, ok := <-deliveries:
		if !ok {
			return d, errors.New("the consumer's channel is closed")
		}
		return d, nil
	case <-ctx.Done():
		return amqp.Delivery{}, context.Cause(ctx)
	}
}

func mustReceive(t *testing.T, deliveries <-chan amqp.Delivery) amqp.Delivery {
	t.Helper()
	d, err := receive(t.Context(), deliveries)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// seqOf is the seq that a message's id names.
func seqOf(d amqp.Delivery) (revocation.Seq, error) {
	seq, ok := strings.CutPrefix(d.MessageId, string(relaytest.Epoch)+":")
	if !ok {
		return 0, fmt.Errorf("message id is %q", d.MessageId)
	}
	n, err := strconv.ParseInt(seq, 10, 64)
	return revocation.Seq(n), err
}

func nextSeq(deliveries <-chan amqp.Delivery) func(context.Context) (revocation.Seq, error) {
	return func(ctx context.Context) (revocation.Seq, error) {
		d, err := receive(ctx, deliveries)
		if err != nil {
			return 0, err
		}
		return seqOf(d)
	}
}

func TestAMQP(t *testing.T) {
	t.Parallel()
	relaytest.Sink(t, func(t *testing.T) relaytest.Far {
		vhost := stacktest.NewVhost(t)
		u, proxy := proxied(t, vhost.AMQPURL)
		s, err := NewAMQP(AMQPConfig{AMQPBroker: patient(u)})
		if err != nil {
			t.Fatal(err)
		}
		return relaytest.Far{
			Sink: s, Proxy: proxy, Next: nextSeq(consume(t, vhost.AMQPURL, "rescind.events", "revocation.#")),
			Secrets: []string{passwordOf(t, u), u},
		}
	})
}

// openedAMQP is a sink that stands at cursor and is closed, without leaks, with the test.
func openedAMQP(t *testing.T, cfg AMQPConfig, cursor revocation.Seq) *AMQP {
	t.Helper()
	relaytest.NoLeaks(t)
	s, err := NewAMQP(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	mustOpen(t, s, cursor)
	return s
}

func mustOpen(t *testing.T, s relay.Opener, cursor revocation.Seq) {
	t.Helper()
	at, err := s.Open(t.Context(), revocation.Position{Epoch: relaytest.Epoch, Seq: cursor})
	if err != nil || at != cursor {
		t.Fatalf("open at %d: stands at %d, error %v", cursor, at, err)
	}
}

func mustDeliver(t *testing.T, s relay.Sink, events ...revocation.Event) {
	t.Helper()
	if err := s.Deliver(t.Context(), events); err != nil {
		t.Fatalf("deliver: %v", err)
	}
}

// message is what a consumer can see of a message, but for the body.
type message struct {
	Exchange, RoutingKey, ContentType, ContentEncoding, MessageID, Type, AppID, Expiration, ReplyTo, UserID string
	DeliveryMode, Priority                                                                                  uint8
	Timestamp                                                                                               time.Time
	Headers                                                                                                 amqp.Table
}

func seen(d amqp.Delivery) message {
	return message{
		Exchange: d.Exchange, RoutingKey: d.RoutingKey, ContentType: d.ContentType, ContentEncoding: d.ContentEncoding,
		MessageID: d.MessageId, Type: d.Type, AppID: d.AppId, Expiration: d.Expiration, ReplyTo: d.ReplyTo, UserID: d.UserId,
		DeliveryMode: d.DeliveryMode, Priority: d.Priority, Timestamp: d.Timestamp.UTC(), Headers: d.Headers,
	}
}

func TestAMQPMessage(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	events := relaytest.Events(88213, 2)
	events[0].Time = time.Date(2026, 11, 20, 18, 49, 58, 214e6, time.UTC)
	events[1].Time = events[0].Time
	events[1].Traceparent = ""
	events[1].Tenant = revocation.Tenant{ID: 7, Domain: "a.b-c.example"}
	events[1].Data = []byte(`{"tenant":{"id":7,"domain":"a.b-c.example"}}`)
	events[1].Type, events[1].Subject = "application.created", ""

	deliveries := consume(t, vhost.AMQPURL, "rescind.events", "revocation.token.carbon_super", "application.created.a_b-c_example")
	s := openedAMQP(t, AMQPConfig{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}}, 88212)
	mustDeliver(t, s, events...)

	const id = string(relaytest.Epoch) + ":88213"
	got := mustReceive(t, deliveries)
	body, err := revocation.ParseEvent(got.Body)
	if err != nil {
		t.Fatal(err)
	}
	want := message{
		Exchange: "rescind.events", RoutingKey: "revocation.token.carbon_super",
		ContentType: "application/cloudevents+json; charset=utf-8", MessageID: id,
		Type: "io.github.rescindhq.revocation.token.v1", AppID: "rescind", DeliveryMode: 2,
		Timestamp: time.Date(2026, 11, 20, 18, 49, 58, 0, time.UTC), // AMQP counts seconds
		Headers: amqp.Table{
			"cloudEvents_specversion": "1.0",
			"cloudEvents_id":          id,
			"cloudEvents_source":      "https://km.example.com",
			"cloudEvents_type":        "io.github.rescindhq.revocation.token.v1",
			"cloudEvents_time":        "2026-11-20T18:49:58.214Z",
			"cloudEvents_subject":     events[0].Subject,
			"traceparent":             body.Traceparent,
		},
	}
	if diff := cmp.Diff(want, seen(got)); diff != "" {
		t.Errorf("message (-want +got):\n%s", diff)
	}
	if body.Traceparent == events[0].Traceparent || body.Traceparent[:36] != events[0].Traceparent[:36] {
		t.Errorf("traceparent is %s, want another parent id in the trace of %s", body.Traceparent, events[0].Traceparent)
	}
	body.Traceparent = events[0].Traceparent
	if diff := cmp.Diff(events[0], body); diff != "" {
		t.Errorf("body (-want +got):\n%s", diff)
	}

	got = mustReceive(t, deliveries)
	if _, ok := got.Headers["traceparent"]; ok || got.Headers["cloudEvents_subject"] != nil || len(got.Headers) != 5 {
		t.Errorf("headers of an event without trace and subject are %v", got.Headers)
	}
	if got.RoutingKey != "application.created.a_b-c_example" {
		t.Errorf("routing key is %s", got.RoutingKey)
	}
}

func TestAMQPBeat(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	deliveries := consume(t, vhost.AMQPURL, "rescind.events", "heartbeat")
	s := openedAMQP(t, AMQPConfig{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}}, 41)
	beat := revocation.Heartbeat{
		Epoch: relaytest.Epoch, ID: string(relaytest.Epoch) + ":hb:0193a2f4-7c11-4d02-9b1e-5f6a70c1d2e3",
		Source: "https://km.example.com", Time: time.Date(2026, 11, 20, 18, 49, 58, 214e6, time.UTC), Head: 44,
	}
	elsewhere := beat
	elsewhere.Epoch = "00000000-0000-4000-8000-000000000000"
	elsewhere.ID = string(elsewhere.Epoch) + ":hb:0193a2f4-7c11-4d02-9b1e-5f6a70c1d2e3"
	steps := []struct {
		name          string
		deliver       int
		beat          revocation.Heartbeat
		head, through revocation.Seq
	}{
		{"nothing delivered yet", 0, beat, 44, 41},
		{"behind the head", 2, beat, 44, 43},
		{"past the head that was read", 5, beat, 48, 48},
		{"another epoch", 0, elsewhere, 44, 0},
	}
	next := revocation.Seq(42)
	for _, step := range steps {
		mustDeliver(t, s, relaytest.Events(next, step.deliver)...)
		next += revocation.Seq(step.deliver)
		if err := s.Beat(t.Context(), step.beat); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		d := mustReceive(t, deliveries)
		got, err := revocation.ParseHeartbeat(d.Body)
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		want := step.beat
		want.Head, want.Through = step.head, step.through
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, diff)
		}
		wantMessage := message{
			Exchange: "rescind.events", RoutingKey: "heartbeat", ContentType: revocation.ContentType, MessageID: want.ID,
			Type: "io.github.rescindhq.heartbeat.v1", AppID: "rescind", DeliveryMode: 2, Timestamp: want.Time.Truncate(time.Second),
			Headers: amqp.Table{
				"cloudEvents_specversion": "1.0", "cloudEvents_id": want.ID, "cloudEvents_source": "https://km.example.com",
				"cloudEvents_type": "io.github.rescindhq.heartbeat.v1", "cloudEvents_time": "2026-11-20T18:49:58.214Z",
			},
		}
		if diff := cmp.Diff(wantMessage, seen(d)); diff != "" {
			t.Errorf("%s: message (-want +got):\n%s", step.name, diff)
		}
	}
}

func TestAMQPRefusesAnEventThatCannotBeSent(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	s := openedAMQP(t, AMQPConfig{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}}, 0)
	events := relaytest.Events(1, 3)
	events[1].Subject = strings.Repeat("x", 64<<10)
	err := s.Deliver(t.Context(), events)
	if want := relay.Permanent(errors.New("")).Error(); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error is %v, want one that says %q", err, want)
	}
}

func TestAMQPErrors(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		prepare func(t *testing.T, admin *amqp.Channel, cfg *AMQPConfig)
		// open and deliver are parts of the expected error.
		open, deliver string
	}{
		{
			name: "exchange of another kind",
			prepare: func(t *testing.T, admin *amqp.Channel, cfg *AMQPConfig) {
				if err := admin.ExchangeDeclare("rescind.events", "fanout", true, false, false, false, nil); err != nil {
					t.Fatal(err)
				}
			},
			open: "PRECONDITION_FAILED",
		},
		{
			name: "wrong password",
			prepare: func(t *testing.T, _ *amqp.Channel, cfg *AMQPConfig) {
				cfg.URL = strings.Replace(cfg.URL, passwordOf(t, cfg.URL), "not-the-password", 1)
			},
			open: "username or password not allowed",
		},
		{
			name: "unknown vhost",
			prepare: func(t *testing.T, _ *amqp.Channel, cfg *AMQPConfig) {
				cfg.URL += "-unknown"
			},
			open: "vhost",
		},
		{
			name: "nobody listens",
			prepare: func(t *testing.T, _ *amqp.Channel, cfg *AMQPConfig) {
				ln, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				cfg.URL = "amqp://rescind:" + passwordOf(t, cfg.URL) + "@" + ln.Addr().String()
				ln.Close()
			},
			open: "connection refused",
		},
		{
			name: "silent broker",
			prepare: func(t *testing.T, _ *amqp.Channel, cfg *AMQPConfig) {
				var proxy *relaytest.Proxy
				cfg.URL, proxy = proxied(t, cfg.URL)
				proxy.Stall()
				cfg.DialTimeout = 100 * time.Millisecond
			},
			open: "not ready within 100ms",
		},
		{
			name: "full queue",
			prepare: func(t *testing.T, admin *amqp.Channel, cfg *AMQPConfig) {
				declareEvents(t, admin)
				full := amqp.Table{"x-max-length": 1, "x-overflow": "reject-publish"}
				q, err := admin.QueueDeclare("", false, true, true, false, full)
				if err != nil {
					t.Fatal(err)
				}
				if err := admin.QueueBind(q.Name, "#", "rescind.events", false, nil); err != nil {
					t.Fatal(err)
				}
			},
			deliver: "the broker refused a message",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			vhost := stacktest.NewVhost(t)
			cfg := AMQPConfig{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}}
			tt.prepare(t, dialChannel(t, vhost.AMQPURL), &cfg)
			relaytest.NoLeaks(t)
			s, err := NewAMQP(cfg)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.Close)
			check := func(err error, want string) {
				t.Helper()
				if want == "" {
					if err != nil {
						t.Fatal(err)
					}
					return
				}
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Fatalf("error is %v, want one that says %q", err, want)
				}
				if strings.Contains(err.Error(), passwordOf(t, cfg.URL)) {
					t.Errorf("the error tells the password: %v", err)
				}
			}
			_, err = s.Open(t.Context(), revocation.Position{Epoch: relaytest.Epoch})
			check(err, tt.open)
			if tt.open == "" {
				check(s.Deliver(t.Context(), relaytest.Events(1, 50)), tt.deliver)
			}
			if err := s.Deliver(t.Context(), relaytest.Events(1, 1)); err == nil || !strings.Contains(err.Error(), "not open") {
				t.Errorf("delivery after an error: %v, want one that says that the sink is not open", err)
			}
		})
	}
}

// An exchange that somebody deletes is back after the error that this causes.
func TestAMQPExchangeDeleted(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	admin := dialChannel(t, vhost.AMQPURL)
	s := openedAMQP(t, AMQPConfig{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}}, 0)
	if err := admin.ExchangeDelete("rescind.events", false, false); err != nil {
		t.Fatal(err)
	}
	events := relaytest.Events(1, 2000)
	if err := s.Deliver(t.Context(), events); err == nil || !strings.Contains(err.Error(), "NOT_FOUND") {
		t.Fatalf("error is %v, want one that says NOT_FOUND", err)
	}
	mustOpen(t, s, 0)
	next := nextSeq(consume(t, vhost.AMQPURL, "rescind.events", "#"))
	mustDeliver(t, s, events...)
	for want := revocation.Seq(1); want <= 2000; want++ {
		if got, err := next(t.Context()); got != want || err != nil {
			t.Fatalf("got %d, %v, want %d", got, err, want)
		}
	}
}

// What is confirmed survives a crash of the broker, in a queue that does.
func TestAMQPBrokerKilledAndWiped(t *testing.T) {
	t.Parallel()
	stack := stacktest.Own(t, stacktest.RabbitMQ)
	u := stack.Endpoints().AMQPURL
	s, err := NewAMQP(AMQPConfig{AMQPBroker: AMQPBroker{URL: u}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	mustOpen(t, s, 0)
	legacy, err := NewAMQPWSO2(AMQPWSO2Config{AMQPBroker: AMQPBroker{URL: u}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(legacy.Close)
	mustOpen(t, legacy, 0)

	ch := dialChannel(t, u)
	if _, err := ch.QueueDeclare("kept", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := ch.QueueBind("kept", "#", "rescind.events", false, nil); err != nil {
		t.Fatal(err)
	}
	mustDeliver(t, s, relaytest.Events(1, 300)...)
	stack.Kill(stacktest.RabbitMQ)
	for _, down := range []relay.Sink{s, legacy} {
		if err := down.Deliver(t.Context(), relaytest.Events(301, 1)); err == nil {
			t.Fatal("delivered to a broker that does not run")
		}
	}
	stack.Start(stacktest.RabbitMQ)
	kept, err := dialChannel(t, u).Consume("kept", "", true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	next := nextSeq(kept)
	for want := revocation.Seq(1); want <= 300; want++ {
		if got, err := next(t.Context()); got != want || err != nil {
			t.Fatalf("after the crash: got %d, %v, want %d", got, err, want)
		}
	}

	mustOpen(t, s, 300)
	mustOpen(t, legacy, 300)
	stack.Wipe(stacktest.RabbitMQ)
	stack.Start(stacktest.RabbitMQ)
	for _, cut := range []relay.Sink{s, legacy} {
		if err := cut.Deliver(t.Context(), relaytest.Events(301, 1)); err == nil {
			t.Fatal("delivered over a connection that the broker cannot know")
		}
	}
	mustOpen(t, s, 300)
	mustOpen(t, legacy, 300)
	if err := dialChannel(t, u).ExchangeDeclarePassive("rescind.events", "topic", true, false, false, false, nil); err != nil {
		t.Fatalf("the exchange is not declared again: %v", err)
	}
	for s, next := range map[relay.Sink]func(context.Context) (revocation.Seq, error){
		s:      nextSeq(consume(t, u, "rescind.events", "#")),
		legacy: nextSeq(consume(t, u, "amq.topic", "tokenRevocation")),
	} {
		mustDeliver(t, s, relaytest.Events(301, 1)...)
		if got, err := next(t.Context()); got != 301 || err != nil {
			t.Errorf("after the wipe: got %d, %v, want 301", got, err)
		}
	}
}

// A broker that reads nothing fills the socket, and then a write hangs that the
// library cannot interrupt.
func TestAMQPHangingWrite(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		limit  time.Duration
		cancel bool
		want   string
	}{
		{"context ends", time.Minute, true, context.Canceled.Error()},
		{"confirm timeout", time.Second, false, "no confirm within 1s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			vhost := stacktest.NewVhost(t)
			u, proxy := proxied(t, vhost.AMQPURL)
			s := openedAMQP(t, AMQPConfig{AMQPBroker: AMQPBroker{URL: u, Window: 65536, ConfirmTimeout: tt.limit}}, 0)
			proxy.Stall()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result := make(chan error, 1)
			go func() { result <- s.Deliver(ctx, relaytest.Events(1, 30_000)) }()
			if tt.cancel {
				awaitHangingWrite(t)
				cancel()
			}
			select {
			case err := <-result:
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error is %v, want one that says %q", err, tt.want)
				}
			case <-time.After(30 * time.Second):
				t.Fatal("still running")
			}
			proxy.Heal()
			mustOpen(t, s, 0)
			mustDeliver(t, s, relaytest.Events(1, 1)...)
		})
	}
}

// awaitHangingWrite waits until a goroutine of the test waits in a write to a socket.
func awaitHangingWrite(t *testing.T) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		var b strings.Builder
		if err := pprof.Lookup("goroutine").WriteTo(&b, 1); err != nil {
			t.Fatal(err)
		}
		for stack := range strings.SplitSeq(b.String(), "\n\n") {
			if strings.Contains(stack, t.Name()) && strings.Contains(stack, "amqpSocket).Write") && strings.Contains(stack, "waitWrite") {
				return
			}
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("nothing hangs")
		}
	}
}

// terminateTLS is the address of a proxy that speaks TLS in front of target, and
// the authority that its certificate is from.
func terminateTLS(t *testing.T, target string) (addr string, authority *x509.CertPool) {
	t.Helper()
	https := httptest.NewTLSServer(http.NotFoundHandler()) // for its certificate
	t.Cleanup(https.Close)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: https.TLS.Certificates})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				near.Close()
				continue
			}
			go func() { io.Copy(far, near); far.Close() }()
			go func() { io.Copy(near, far); near.Close() }()
		}
	}()
	authority = x509.NewCertPool()
	authority.AddCert(https.Certificate())
	return ln.Addr().String(), authority
}

func TestAMQPOverTLS(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	u, err := url.Parse(vhost.AMQPURL)
	if err != nil {
		t.Fatal(err)
	}
	var authority *x509.CertPool
	u.Scheme = "amqps"
	u.Host, authority = terminateTLS(t, u.Host)

	next := nextSeq(consume(t, vhost.AMQPURL, "rescind.events", "#"))
	settings := &tls.Config{RootCAs: authority}
	s := openedAMQP(t, AMQPConfig{AMQPBroker: AMQPBroker{URL: u.String(), TLS: settings}}, 0)
	if settings.ServerName != "" {
		t.Error("the caller's TLS settings were changed")
	}
	mustDeliver(t, s, relaytest.Events(1, 2000)...)
	for want := revocation.Seq(1); want <= 2000; want++ {
		if got, err := next(t.Context()); got != want || err != nil {
			t.Fatalf("got %d, %v, want %d", got, err, want)
		}
	}

	strange, err := NewAMQP(AMQPConfig{AMQPBroker: AMQPBroker{URL: u.String(), TLS: &tls.Config{RootCAs: x509.NewCertPool()}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = strange.Open(t.Context(), revocation.Position{})
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); !ok {
		t.Errorf("open with another authority: error is %v, want an unknown authority", err)
	}
}

func TestAMQPConnectionName(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	openedAMQP(t, AMQPConfig{AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}, Name: "amqp-west"}, 0)
	uri, err := amqp.ParseURI(vhost.AMQPURL)
	if err != nil {
		t.Fatal(err)
	}
	// The management plugin learns of a connection some seconds after it is made.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if got := connections(t, stacktest.Shared(t).ManagementURL, uri.Vhost); strings.Contains(got, `"connection_name":"rescind amqp-west"`) {
			return
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("the broker does not know the connection by its name")
		}
	}
}

func connections(t *testing.T, management, vhost string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, management+"/api/vhosts/"+url.PathEscape(vhost)+"/connections", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestNewAMQPChecks(t *testing.T) {
	t.Parallel()
	const password = "hunter2-secret"
	good := "amqp://rescind:" + password + "@127.0.0.1:5672/"
	tests := []struct {
		name string
		cfg  AMQPConfig
		want []string
	}{
		{"no URL", AMQPConfig{}, []string{"URL is not"}},
		{"scheme", AMQPConfig{AMQPBroker: AMQPBroker{URL: "http://rescind:" + password + "@h"}}, []string{"URL is not"}},
		{"reserved characters", AMQPConfig{AMQPBroker: AMQPBroker{URL: "amqp://rescind:" + password + "?/#@h:x"}}, []string{"percent-encoded"}},
		{"port", AMQPConfig{AMQPBroker: AMQPBroker{URL: "amqp://rescind:" + password + "@h:port/"}}, []string{"URL is not"}},
		{"TLS without amqps", AMQPConfig{AMQPBroker: AMQPBroker{URL: good, TLS: &tls.Config{}}}, []string{"use amqps"}},
		{"exchange", AMQPConfig{AMQPBroker: AMQPBroker{URL: good}, Exchange: strings.Repeat("x", 256)}, []string{"exchange has 256 bytes"}},
		{"all at once", AMQPConfig{Name: "west", AMQPBroker: AMQPBroker{
			URL: good, Window: 65537, ConfirmTimeout: time.Millisecond, DialTimeout: time.Millisecond,
		}}, []string{"sink west", "window is 65537", "confirm timeout is 1ms", "dial timeout is 1ms"}},
		{"negative window", AMQPConfig{AMQPBroker: AMQPBroker{URL: good, Window: -1}}, []string{"window is -1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := NewAMQP(tt.cfg)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error is %v, want one that says %q", err, want)
				}
			}
			if strings.Contains(err.Error(), password) {
				t.Errorf("the error tells the password: %v", err)
			}
		})
	}
	if _, err := NewAMQP(AMQPConfig{AMQPBroker: AMQPBroker{URL: good}}); err != nil {
		t.Errorf("a URL alone: %v", err)
	}
}
