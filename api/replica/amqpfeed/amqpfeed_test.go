package amqpfeed

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
)

const (
	iss   = "https://km.example.com"
	epoch = relaytest.Epoch

	// limit bounds every wait of these tests.
	limit = 30 * time.Second
)

// broker is a vhost of one test's own, and who publishes there what the service would.
type broker struct {
	*testing.T
	publisher *amqp.Channel
	url       string // of a gateway's user
}

func newBroker(t *testing.T) *broker {
	t.Helper()
	v := stacktest.NewVhost(t)
	b := &broker{T: t, url: v.GatewayAMQPURL}
	b.connect(v.AMQPURL)
	b.declare("rescind.events")
	return b
}

func (b *broker) connect(adminURL string) {
	b.Helper()
	conn, err := amqp.Dial(adminURL)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	if b.publisher, err = conn.Channel(); err != nil {
		b.Fatal(err)
	}
}

func (b *broker) declare(exchange string) {
	b.Helper()
	if err := b.publisher.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		b.Fatal(err)
	}
}

func (b *broker) send(key string, body []byte) {
	b.Helper()
	message := amqp.Publishing{ContentType: revocation.ContentType, DeliveryMode: amqp.Persistent, Body: body}
	if err := b.publisher.PublishWithContext(b.Context(), "rescind.events", key, false, false, message); err != nil {
		b.Fatal(err)
	}
}

func (b *broker) events(events ...revocation.Event) {
	b.Helper()
	for _, e := range events {
		body, err := e.MarshalJSON()
		if err != nil {
			b.Fatal(err)
		}
		b.send(e.RoutingKey(), body)
	}
}

func (b *broker) beat(head, through revocation.Seq) {
	b.Helper()
	body, err := heartbeat(head, through).MarshalJSON()
	if err != nil {
		b.Fatal(err)
	}
	b.send(revocation.HeartbeatRoutingKey, body)
}

func heartbeat(head, through revocation.Seq) revocation.Heartbeat {
	return revocation.Heartbeat{
		Epoch: epoch, ID: string(epoch) + ":hb:1", Source: iss, Time: time.UnixMilli(1795256400123).UTC(), Head: head, Through: through,
	}
}

// proxied is the broker's URL by way of p.
func (b *broker) proxied() (at string, p *relaytest.Proxy) {
	b.Helper()
	u, err := url.Parse(b.url)
	if err != nil {
		b.Fatal(err)
	}
	p = relaytest.NewProxy(b.T, u.Host)
	u.Host = p.Addr()
	return u.String(), p
}

// receiver writes down what it is told.
type receiver struct {
	told      chan string
	connected func(context.Context) error
	event     func(revocation.Event) error
}

func newReceiver() *receiver {
	return &receiver{
		told:      make(chan string, 100_000),
		connected: func(context.Context) error { return nil },
		event:     func(revocation.Event) error { return nil },
	}
}

func (r *receiver) Connected(ctx context.Context) error {
	r.told <- "connected"
	return r.connected(ctx)
}

func (r *receiver) Event(_ context.Context, e revocation.Event) error {
	r.told <- fmt.Sprintf("event %d of %s", e.Seq, e.Tenant.Domain)
	return r.event(e)
}

func (r *receiver) Revoked(rec replica.Record, at revocation.Position) {
	r.told <- fmt.Sprintf("revoked %v at %s", rec, at)
}

func (r *receiver) Heartbeat(_ context.Context, b replica.Beat) error {
	text := fmt.Sprintf("heartbeat %d/%d %s", b.Seq, b.Head, b.Time.Format(time.RFC3339Nano))
	if b.Tenants != nil {
		text += fmt.Sprint(" of ", b.Tenants)
	}
	r.told <- text
	return nil
}

func beatText(through, head revocation.Seq) string {
	return fmt.Sprintf("heartbeat %d/%d 2026-11-21T10:20:00.123Z", through, head)
}

func (r *receiver) want(t testing.TB, want ...string) {
	t.Helper()
	var got []string
	end := time.After(limit)
	for len(got) < len(want) {
		select {
		case s := <-r.told:
			got = append(got, s)
		case <-end:
			t.Fatalf("after %s told %q, want %q", limit, got, want)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("told (-want +got):\n%s", diff)
	}
}

func newFeed(t testing.TB, cfg Config) *Feed {
	t.Helper()
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f.silence = limit
	return f
}

func nowhere() revocation.Position { return revocation.Position{} }

// following is a call of Follow.
type following struct {
	testing.TB
	end  context.CancelFunc
	done chan error
}

func follow(t testing.TB, f *Feed, to replica.Receiver) *following {
	ctx, end := context.WithCancel(t.Context())
	c := &following{TB: t, end: end, done: make(chan error, 1)}
	go func() { c.done <- f.Follow(ctx, nowhere, to) }()
	t.Cleanup(end)
	return c
}

func (c *following) ended() error {
	c.Helper()
	select {
	case err := <-c.done:
		if err == nil {
			c.Fatal("Follow ended without an error")
		}
		return err
	case <-time.After(limit):
		c.Fatalf("Follow has not ended after %s", limit)
		return nil
	}
}

func (c *following) wantEnd(want string) {
	c.Helper()
	if err := c.ended(); !strings.Contains(err.Error(), want) {
		c.Errorf("Follow: %v, want a word about %q", err, want)
	}
}

// stop ends the call as its caller would.
func (c *following) stop() {
	c.Helper()
	c.end()
	if err := c.ended(); !errors.Is(err, context.Canceled) {
		c.Errorf("Follow: %v, want %v", err, context.Canceled)
	}
}

func seqs(first, n int) []string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("event %d of carbon.super", first+i))
	}
	return all
}

func TestNew(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 256)
	tests := []struct {
		name string
		cfg  Config
		want []string
	}{
		{name: "least", cfg: Config{URL: "amqp://u:hunter2@broker"}},
		{name: "all", cfg: Config{URL: "amqps://u:hunter2@broker:1/v", TLS: &tls.Config{}, Exchange: "e", Tenants: []string{"a-1.example", "b"}}},
		{name: "nothing", want: []string{"URL is not of the form"}},
		{name: "no URL of ours", cfg: Config{URL: "https://u:hunter2@broker"}, want: []string{"URL is not of the form"}},
		{name: "URL in pieces", cfg: Config{URL: "amqp://u:hunter2%@broker/%"}, want: []string{"URL is not of the form"}},
		{
			name: "all at once",
			cfg:  Config{URL: "amqp://u:hunter2@broker", TLS: &tls.Config{}, Exchange: long, Tenants: []string{"ok", "*", "", "#.a", "A", long}},
			want: []string{"use amqps", "exchange has 256 bytes", `tenant "*"`, `tenant ""`, `tenant "#.a"`, `tenant "A"`, `tenant "aaa`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := New(tt.cfg)
			if len(tt.want) == 0 {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error does not mention %q: %v", want, err)
				}
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error shows the password: %v", err)
			}
		})
	}
}

// From the beginning of Connected on nothing is missed, and all comes in order.
func TestFollow(t *testing.T) {
	t.Parallel()
	b := newBroker(t)
	events := relaytest.Events(1, 3000)
	state := replica.NewState(replica.StateConfig{})
	r := newReceiver()
	r.connected = func(context.Context) error {
		b.events(events[:1000]...) // the snapshot below has some of them
		return state.Load(revocation.Position{Epoch: epoch, Seq: 600}, func(*replica.Loader) error { return nil })
	}
	r.event = state.Apply
	c := follow(t, newFeed(t, Config{URL: b.url}), r)
	r.want(t, append([]string{"connected"}, seqs(1, 1000)...)...)
	b.events(events[1000:2000]...)
	b.beat(2001, 2000)
	b.events(events[1990:]...)
	b.beat(3000, 3000)
	r.want(t, append(append(seqs(1001, 1000), beatText(2000, 2001)), append(seqs(1991, 1010), beatText(3000, 3000))...)...)
	if want := events[2999].Position; state.At() != want {
		t.Errorf("the state is at %s, want %s", state.At(), want)
	}
	now := time.Now().Unix()
	for _, seq := range []int{601, 1000, 1001, 3000} {
		if _, revoked := state.Check(replica.Token{Iss: iss, JTI: fmt.Sprintf("at-%016x", seq)}, now); !revoked {
			t.Errorf("the token of event %d is not revoked", seq)
		}
	}
	c.stop()

	// The queue ends with the session: nothing of before comes again.
	b.events(events[:1]...)
	r.connected = func(context.Context) error { b.events(events[2999]); return nil }
	c = follow(t, newFeed(t, Config{URL: b.url}), r)
	r.want(t, "connected", "event 3000 of carbon.super")
	c.stop()
}

func TestTenants(t *testing.T) {
	t.Parallel()
	b := newBroker(t)
	r := newReceiver()
	r.connected = func(context.Context) error {
		events := relaytest.Events(1, 6)
		for i, domain := range []string{"a.example", "b.example", "carbon.super", "example", "a.example.org", "a.example"} {
			data := strings.Replace(string(events[i].Data), "carbon.super", domain, 1)
			events[i].Tenant.Domain, events[i].Data = domain, []byte(data)
		}
		events[5].Type = "key_mapping.deleted"
		b.events(events...)
		b.beat(6, 6)
		return nil
	}
	c := follow(t, newFeed(t, Config{URL: b.url, Tenants: []string{"a.example", "carbon.super"}}), r)
	r.want(t, "connected", "event 1 of a.example", "event 3 of carbon.super", "event 6 of a.example", beatText(6, 6)+" of [a.example carbon.super]")
	c.stop()
}

// What the receiver does not take ends the session, with its error.
func TestReceiverFails(t *testing.T) {
	t.Parallel()
	b := newBroker(t)
	gone := errors.New("the source is away")
	r := newReceiver()
	r.connected = func(context.Context) error { b.events(relaytest.Events(1, 2)...); return nil }
	r.event = func(revocation.Event) error { return gone }
	if err := follow(t, newFeed(t, Config{URL: b.url}), r).ended(); !errors.Is(err, gone) {
		t.Errorf("Follow: %v, want %v", err, gone)
	}
	r.want(t, "connected", "event 1 of carbon.super")
	r.connected = func(context.Context) error { return gone }
	if err := follow(t, newFeed(t, Config{URL: b.url}), r).ended(); !errors.Is(err, gone) {
		t.Errorf("Follow: %v, want %v", err, gone)
	}
}

func TestUnreadable(t *testing.T) {
	t.Parallel()
	b := newBroker(t)
	good, err := relaytest.Events(2, 1)[0].MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct{ name, key, body string }{
		{"no event", "revocation.token.carbon_super", `{"event":{"payloadData":{}}}`},
		{"garbage", "anything", "\x00\x01"},
		{"no heartbeat", revocation.HeartbeatRoutingKey, string(good)},
	} {
		r := newReceiver()
		r.connected = func(context.Context) error {
			b.events(relaytest.Events(1, 1)...)
			b.send(m.key, []byte(m.body))
			b.send("revocation.token.carbon_super", good)
			return nil
		}
		if err := follow(t, newFeed(t, Config{URL: b.url}), r).ended(); !errors.As(err, new(*revocation.InvalidError)) {
			t.Errorf("%s: Follow: %v, want that it cannot be read", m.name, err)
		}
		r.want(t, "connected", "event 1 of carbon.super")
		if len(r.told) > 0 {
			t.Errorf("%s: what came after it was told", m.name)
		}
	}
}

// A queue that may have been full is not taken for a whole one, however much of what it lost was
// before a heartbeat.
func TestOverflow(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		n    int
		lost bool
	}{
		{"room for all", 90, false},
		{"full", 101, true},
		{"long past", 1000, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBroker(t)
			f := newFeed(t, Config{URL: b.url})
			f.limit, f.prefetch = 100, 8
			r := newReceiver()
			s, err := f.open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			b.events(relaytest.Events(1, tt.n)...)
			b.beat(9999, 9999)
			// Once the broker has answered a later request of the publisher, the queue has it all.
			if _, err := b.publisher.QueueDeclare("", false, true, true, false, nil); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- s.follow(t.Context(), r) }()
			if !tt.lost {
				r.want(t, append(seqs(1, tt.n), beatText(9999, 9999))...)
				return
			}
			select {
			case err := <-done:
				if !strings.Contains(err.Error(), "dropped") {
					t.Errorf("follow: %v, want that messages may have been dropped", err)
				}
			case <-time.After(limit):
				t.Fatal("the session goes on")
			}
			for len(r.told) > 0 {
				if told := <-r.told; strings.HasPrefix(told, "heartbeat") {
					t.Errorf("told %q", told)
				}
			}
		})
	}
}

// Many events between two heartbeats are no overflow.
func TestBusy(t *testing.T) {
	t.Parallel()
	b := newBroker(t)
	f := newFeed(t, Config{URL: b.url})
	f.limit, f.prefetch = 400, 8
	r := newReceiver()
	c := follow(t, f, r)
	r.want(t, "connected")
	for first := 1; first < 1000; first += 100 {
		b.events(relaytest.Events(revocation.Seq(first), 100)...)
		r.want(t, seqs(first, 100)...)
	}
	b.beat(1000, 1000)
	r.want(t, beatText(1000, 1000))
	c.stop()
}

func TestSilence(t *testing.T) {
	t.Parallel()
	b := newBroker(t)
	f := newFeed(t, Config{URL: b.url})
	f.silence = 50 * time.Millisecond
	c := follow(t, f, newReceiver())
	c.wantEnd("nothing came for 50ms")
}

func TestLost(t *testing.T) {
	t.Parallel()
	t.Run("queue deleted", func(t *testing.T) {
		t.Parallel()
		b := newBroker(t)
		f := newFeed(t, Config{URL: b.url})
		s, err := f.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		if _, err := s.channel.QueueDelete(s.queue, false, false, false); err != nil {
			t.Fatal(err)
		}
		if err := s.follow(t.Context(), newReceiver()); err == nil || !strings.Contains(err.Error(), "queue was deleted") {
			t.Errorf("follow: %v, want that the queue was deleted", err)
		}
	})
	t.Run("channel closed", func(t *testing.T) {
		t.Parallel()
		b := newBroker(t)
		s, err := newFeed(t, Config{URL: b.url}).open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		// An acknowledgement of what was never delivered makes the broker close the channel.
		if err := s.channel.Ack(99, false); err != nil {
			t.Fatal(err)
		}
		if err := s.follow(t.Context(), newReceiver()); err == nil || !strings.Contains(err.Error(), "unknown delivery tag 99") {
			t.Errorf("follow: %v, want the broker's reason", err)
		}
	})
	t.Run("connection cut", func(t *testing.T) {
		t.Parallel()
		b := newBroker(t)
		at, proxy := b.proxied()
		r := newReceiver()
		c := follow(t, newFeed(t, Config{URL: at}), r)
		r.want(t, "connected")
		proxy.Cut()
		if err := c.ended(); strings.Contains(err.Error(), "nothing came") {
			t.Errorf("Follow: %v, want the reason", err)
		}
		// The next call finds the way again.
		c = follow(t, newFeed(t, Config{URL: at}), r)
		r.want(t, "connected")
		b.events(relaytest.Events(1, 1)...)
		r.want(t, seqs(1, 1)...)
		// Its context ends while the network is dead.
		proxy.Stall()
		c.stop()
	})
	t.Run("network dead at the start", func(t *testing.T) {
		t.Parallel()
		b := newBroker(t)
		at, proxy := b.proxied()
		held := proxy.Stall()
		r := newReceiver()
		c := follow(t, newFeed(t, Config{URL: at}), r)
		<-held
		c.stop()
		if len(r.told) > 0 {
			t.Errorf("told %q", <-r.told)
		}
	})
}

func TestRefused(t *testing.T) {
	t.Parallel()
	b := newBroker(t)
	u, err := url.Parse(b.url)
	if err != nil {
		t.Fatal(err)
	}
	_, proxy := b.proxied()
	proxy.Refuse()
	change := func(f func(*url.URL)) string {
		changed := *u
		f(&changed)
		return changed.String()
	}
	tests := []struct {
		name string
		cfg  Config
		want string
	}{
		{"no exchange", Config{URL: b.url, Exchange: "rescind.evens"}, "there is no such exchange"},
		{"not for gateways", Config{URL: b.url, Exchange: "amq.direct"}, "ACCESS_REFUSED"},
		{"wrong password", Config{URL: change(func(u *url.URL) { u.User = url.UserPassword("gateway", "hunter2") })}, "username or password"},
		{"no vhost", Config{URL: change(func(u *url.URL) { u.Path, u.RawPath = "/hunter", "" })}, "not found"},
		{"nobody there", Config{URL: change(func(u *url.URL) { u.Host = proxy.Addr() })}, "connection reset"},
		{"no TLS", Config{URL: change(func(u *url.URL) { u.Scheme = "amqps" })}, "tls"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newReceiver()
			err := follow(t, newFeed(t, tt.cfg), r).ended()
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Follow: %v, want a word about %q", err, tt.want)
			}
			password, _ := u.User.Password()
			for _, secret := range []string{"hunter2", password} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error has the password: %v", err)
				}
			}
			if len(r.told) > 0 {
				t.Errorf("told %q", <-r.told)
			}
		})
	}
}
