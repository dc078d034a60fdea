// Package amqpfeed follows the events on RabbitMQ for a replica. It hides the connection, the
// queue and its bindings, and how it is noticed that the broker dropped something.
//
// # Decisions
//
// The queue is exclusive and named by the server: it ends with the connection, and the broker keeps
// nothing for a gateway that is away, which fetches what it missed from its source. The name
// also suits the permissions that README.md gives to gateways.
//
// The queue is bounded, so that a gateway that stands still does not fill the broker. When it
// is full the oldest messages are dropped; refusing the new ones instead would make the broker
// refuse them to the service, and so hold up every gateway. A reader of all events notices a loss by
// the next one's seq. One of some tenants' could not, so before it passes on a heartbeat the feed
// makes sure that the queue was never full, see session.whole, or else gives the session up. A
// policy of the broker that bounds queues further, or lets messages expire, would defeat that.
//
// Messages are acknowledged, many at a time: without that the client library would take in
// whatever comes, and the queue's bound would be none.
//
// A message that cannot be read ends the session: it may be a revocation. What it was comes from
// the source then, or the source says why it cannot be read either.
package amqpfeed

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// Config says where events are. URL is needed.
type Config struct {
	// URL is amqps://user:password@host:5671/vhost, or amqp:// without TLS, with reserved
	// characters percent-encoded. It is a secret. The user needs to read only: see README.md.
	URL string
	// TLS is for amqps. Default: the system's authorities.
	TLS *tls.Config
	// Exchange is where the events are; the service makes it. Default "rescind.events".
	Exchange string
	// Tenants are the domains of those whose events are wanted. Default: all. They should be those
	// that the replica's source has: events of others are passed over, and what is missing the source
	// is asked for every few seconds.
	Tenants []string
}

const (
	// readyLimit bounds connecting, logging in and subscribing.
	readyLimit = 10 * time.Second
	// goodbyeLimit bounds the closing handshake. Nothing depends on it.
	goodbyeLimit = time.Second
	// shortString is the longest name that the protocol can carry, in bytes.
	shortString = 255
)

// Feed is a [replica.Feed]. Make one with [New]. It holds nothing between two calls of
// Follow, so that several can run at once.
type Feed struct {
	url      string
	address  string // host:port, for messages
	tls      *tls.Config
	exchange string
	keys     []string // what the queue is bound with
	tenants  []string // whose events these keys are for; nil: all

	// silence is how long nothing may come: a few of the service's heartbeats, which are a
	// second apart.
	silence time.Duration
	// limit is how many messages may wait at the broker, at about 1 kB each.
	limit int
	// prefetch is how many may be on their way to us and not acknowledged.
	prefetch int
}

var _ replica.Feed = (*Feed)(nil)

// New checks cfg. It does not connect.
func New(cfg Config) (*Feed, error) {
	f := &Feed{
		url: cfg.URL, tls: cfg.TLS, exchange: cmp.Or(cfg.Exchange, "rescind.events"), keys: []string{"#"},
		silence: 5 * time.Second, limit: 1 << 15, prefetch: 512,
	}
	var errs []error
	uri, err := amqp.ParseURI(cfg.URL)
	if err != nil { // its text may have the password in it
		errs = append(errs, errors.New("URL is not of the form amqps://user:password@host:port/vhost or amqp://…; "+
			"reserved characters in user, password and vhost must be percent-encoded"))
	} else if cfg.TLS != nil && uri.Scheme != "amqps" {
		errs = append(errs, errors.New("TLS is set, but the URL's scheme is amqp: use amqps"))
	}
	f.address = net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port))
	if len(f.exchange) > shortString {
		errs = append(errs, fmt.Errorf("exchange has %d bytes, must have at most %d", len(f.exchange), shortString))
	}
	if len(cfg.Tenants) > 0 {
		f.keys, f.tenants = []string{revocation.HeartbeatRoutingKey}, slices.Clone(cfg.Tenants)
	}
	for _, domain := range cfg.Tenants {
		if domain == "" || len(domain) > 200 || strings.Trim(domain, "abcdefghijklmnopqrstuvwxyz0123456789.-") != "" {
			errs = append(errs, fmt.Errorf("tenant %q must be a domain of 1 to 200 characters a-z 0-9 . -", domain))
		}
		anything := revocation.Event{Type: "*.*", Tenant: revocation.Tenant{Domain: domain}}
		f.keys = append(f.keys, anything.RoutingKey())
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configure AMQP feed: %w", err)
	}
	return f, nil
}

// Name implements [replica.Feed]. It is "amqp".
func (f *Feed) Name() string { return "amqp" }

// Follow implements [replica.Feed].
func (f *Feed) Follow(ctx context.Context, _ func() revocation.Position, to replica.Receiver) error {
	s, err := f.open(ctx)
	if err != nil {
		return fmt.Errorf("subscribe to exchange %s at %s: %w", f.exchange, f.address, err)
	}
	defer s.close()
	if err := to.Connected(ctx); err != nil {
		return err
	}
	return s.follow(ctx, to)
}

// session is a connection with a queue that has everything from its beginning on.
type session struct {
	*Feed
	socket   net.Conn
	conn     *amqp.Connection
	channel  *amqp.Channel
	queue    string
	messages <-chan amqp.Delivery
	closed   chan *amqp.Error // why the channel closed
	unbind   func() bool      // parts the socket from the context of follow

	handled int    // messages since the queue was last seen to be whole
	unacked uint64 // the last message that was not acknowledged; 0: none
}

// open connects and subscribes.
func (f *Feed) open(ctx context.Context) (*session, error) {
	s := &session{Feed: f, closed: make(chan *amqp.Error, 1), unbind: func() bool { return true }}
	ready, cancel := context.WithTimeoutCause(ctx, readyLimit, fmt.Errorf("not ready within %s", readyLimit))
	defer cancel()
	stop := func() bool { return true }
	connect := func(network, addr string) (net.Conn, error) {
		socket, err := new(net.Dialer).DialContext(ready, network, addr)
		if err != nil {
			return nil, err
		}
		s.socket = socket
		// The library has no other way to interrupt its calls.
		stop = context.AfterFunc(ready, func() { socket.Close() })
		return socket, nil
	}
	err := s.subscribe(connect)
	if err == nil && stop() {
		s.unbind = context.AfterFunc(ctx, func() { s.socket.Close() })
		return s, nil
	}
	if s.socket != nil {
		s.socket.Close()
	}
	if ready.Err() != nil {
		err = context.Cause(ready) // what a closed socket says explains nothing
	}
	return nil, err
}

func (s *session) subscribe(connect func(network, addr string) (net.Conn, error)) error {
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName("rescind replica")
	var err error
	s.conn, err = amqp.DialConfig(s.url, amqp.Config{TLSClientConfig: s.tls.Clone(), Properties: properties, Dial: connect})
	if err != nil {
		return err
	}
	if s.channel, err = s.conn.Channel(); err != nil {
		return err
	}
	s.channel.NotifyClose(s.closed)
	err = s.channel.ExchangeDeclarePassive(s.exchange, amqp.ExchangeTopic, true, false, false, false, nil)
	if e, ok := errors.AsType[*amqp.Error](err); ok && e.Code == amqp.NotFound {
		return fmt.Errorf("there is no such exchange: the service makes it when its sink amqp is first up (%w)", err)
	}
	if err != nil {
		return err
	}
	q, err := s.channel.QueueDeclare("", false, true, true, false, amqp.Table{
		amqp.QueueTypeArg: amqp.QueueTypeClassic, amqp.QueueMaxLenArg: s.limit, amqp.QueueOverflowArg: amqp.QueueOverflowDropHead,
	})
	if err != nil {
		return err
	}
	s.queue = q.Name
	for _, key := range s.keys {
		if err := s.channel.QueueBind(s.queue, key, s.exchange, false, nil); err != nil {
			return err
		}
	}
	if err := s.channel.Qos(s.prefetch, 0, false); err != nil {
		return err
	}
	s.messages, err = s.channel.Consume(s.queue, "", false, true, false, false, nil)
	return err
}

// close says goodbye to the broker, which deletes the queue.
func (s *session) close() {
	s.unbind()
	bound := time.AfterFunc(goodbyeLimit, func() { s.socket.Close() })
	defer bound.Stop()
	_ = s.conn.Close() // nothing that matters was left to be said
	s.socket.Close()
}

// follow tells to what comes, until it ends.
func (s *session) follow(ctx context.Context, to replica.Receiver) error {
	silence := time.NewTimer(s.silence)
	defer silence.Stop()
	for {
		silence.Reset(s.silence) // what to does with a message takes the time that it needs
		select {
		case m, ok := <-s.messages:
			if !ok {
				return s.lost(ctx, nil)
			}
			if err := s.handle(ctx, m, to); err != nil {
				return err
			}
		case <-silence.C:
			return fmt.Errorf("follow exchange %s at %s: nothing came for %s, not even a heartbeat: "+
				"the service is down, or does not reach this broker", s.exchange, s.address, s.silence)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *session) handle(ctx context.Context, m amqp.Delivery, to replica.Receiver) error {
	s.handled++
	s.unacked = m.DeliveryTag
	if m.RoutingKey != revocation.HeartbeatRoutingKey {
		e, err := revocation.ParseEvent(m.Body)
		if err != nil {
			return s.unreadable(m, err)
		}
		if err := to.Event(ctx, e); err != nil {
			return err
		}
		switch {
		case s.handled >= s.limit/4:
			return s.whole(ctx)
		case s.handled%(s.prefetch/4) == 0:
			return s.acknowledge(ctx)
		}
		return nil
	}
	h, err := revocation.ParseHeartbeat(m.Body)
	if err != nil {
		return s.unreadable(m, err)
	}
	if err := s.whole(ctx); err != nil {
		return err
	}
	return to.Heartbeat(ctx, replica.Beat{
		Position: revocation.Position{Epoch: h.Epoch, Seq: h.Through}, Head: h.Head, Time: h.Time, Tenants: s.tenants,
	})
}

func (s *session) unreadable(m amqp.Delivery, err error) error {
	return fmt.Errorf("follow exchange %s at %s: read a message with routing key %q: %w", s.exchange, s.address, m.RoutingKey, err)
}

func (s *session) acknowledge(ctx context.Context) error {
	if s.unacked == 0 {
		return nil
	}
	if err := s.channel.Ack(s.unacked, true); err != nil {
		return s.lost(ctx, err)
	}
	s.unacked = 0
	return nil
}

// whole returns an error unless it is certain that the queue dropped nothing since it was last
// called. Messages leave the queue towards us only: if it was full at any moment, those that have
// left it since and those that wait now are at least as many as it can hold. Of those that have
// left it some, up to prefetch, may not have reached us.
func (s *session) whole(ctx context.Context) error {
	if err := s.acknowledge(ctx); err != nil {
		return err
	}
	q, err := s.channel.QueueDeclarePassive(s.queue, false, true, true, false, nil)
	if err != nil {
		return s.lost(ctx, err)
	}
	if q.Messages+s.handled+s.prefetch >= s.limit {
		return fmt.Errorf("follow exchange %s at %s: %d messages wait and more may have been dropped, "+
			"because events come faster than they are applied", s.exchange, s.address, q.Messages)
	}
	s.handled = 0
	return nil
}

// lost finds out why the broker sends nothing more. Err is what a call on the channel returned, if
// that noticed it.
func (s *session) lost(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if s.channel.IsClosed() {
		// The reason is there before the channel is closed to us, unless there is none.
		select {
		case reason := <-s.closed:
			if reason != nil {
				err = reason
			}
		default:
		}
	}
	if err == nil {
		err = errors.New("the broker has ended the subscription: its queue was deleted")
	}
	return fmt.Errorf("follow exchange %s at %s: %w", s.exchange, s.address, err)
}
