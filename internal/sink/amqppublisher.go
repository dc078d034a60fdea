package sink

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// amqpHeartbeat is how often each side of an idle connection shows that it
	// lives; a side that is silent for longer than that is given up.
	amqpHeartbeat = 10 * time.Second
	// amqpGoodbye bounds the closing handshake. Nothing depends on it.
	amqpGoodbye = time.Second
	// amqpShortString is the longest name that the protocol can carry, in bytes.
	amqpShortString = 255
)

// AMQPBroker is how a sink reaches RabbitMQ. All but URL may stay zero.
type AMQPBroker struct {
	// URL is amqp://user:password@host:port/vhost, or amqps:// for TLS, with
	// reserved characters percent-encoded. It is a secret.
	URL string
	// TLS is for amqps URLs; without it the system's authorities are trusted.
	TLS *tls.Config
	// Window caps the messages that wait for their confirm. More keeps a distant
	// broker busier, and repeats more after a lost connection. Default 1024, 1 to
	// 65536.
	Window int
	// ConfirmTimeout is how long the broker may confirm nothing while messages
	// wait. Less finds a stuck broker sooner; a busy one must not seem stuck.
	// Default 30s, at least 1s.
	ConfirmTimeout time.Duration
	// DialTimeout bounds Open: connect, log in, declare. Default 5s, at least 100ms.
	DialTimeout time.Duration
}

// amqpPublisher publishes to one exchange, over one connection at a time, and
// waits for the broker's confirms. Its methods are called from one goroutine at
// a time.
type amqpPublisher struct {
	sink     string
	exchange string
	broker   AMQPBroker
	address  string // host:port, for messages
	// declare makes or checks the exchange on a new channel.
	declare func(*amqp.Channel) error

	link    *amqpLink                    // nil unless open
	pending []*amqp.DeferredConfirmation // a ring of Window places
}

// newAMQPPublisher checks broker and fills its defaults.
func newAMQPPublisher(sink, exchange string, broker AMQPBroker, declare func(*amqp.Channel) error) (*amqpPublisher, error) {
	var errs []error
	if exchange == "" || len(exchange) > amqpShortString {
		errs = append(errs, fmt.Errorf("exchange has %d bytes, must have 1 to %d", len(exchange), amqpShortString))
	}
	uri, err := amqp.ParseURI(broker.URL)
	if err != nil { // its text may have the password in it
		errs = append(errs, errors.New("URL is not of the form amqp://user:password@host:port/vhost or amqps://…; "+
			"reserved characters in user, password and vhost must be percent-encoded"))
	} else if broker.TLS != nil && uri.Scheme != "amqps" {
		errs = append(errs, errors.New("TLS is set, but the URL's scheme is amqp: use amqps"))
	}
	if broker.Window == 0 {
		broker.Window = 1024
	}
	if broker.Window < 1 || broker.Window > 65536 {
		errs = append(errs, fmt.Errorf("window is %d, must be 1 to 65536", broker.Window))
	}
	if broker.ConfirmTimeout == 0 {
		broker.ConfirmTimeout = 30 * time.Second
	}
	if broker.ConfirmTimeout < time.Second {
		errs = append(errs, fmt.Errorf("confirm timeout is %s, must be at least 1s", broker.ConfirmTimeout))
	}
	if broker.DialTimeout == 0 {
		broker.DialTimeout = 5 * time.Second
	}
	if broker.DialTimeout < 100*time.Millisecond {
		errs = append(errs, fmt.Errorf("dial timeout is %s, must be at least 100ms", broker.DialTimeout))
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("sink %s: %w", sink, errors.Join(errs...))
	}
	return &amqpPublisher{
		sink: sink, exchange: exchange, broker: broker, declare: declare,
		address: net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port)),
		pending: make([]*amqp.DeferredConfirmation, broker.Window),
	}, nil
}

// amqpLink is a connection with a channel in confirm mode.
type amqpLink struct {
	socket  *amqpSocket
	conn    *amqp.Connection
	channel *amqp.Channel
	closed  chan *amqp.Error // why the channel closed
	blocked atomic.Bool      // the broker takes no messages: it is short of memory or disk

	once    sync.Once
	aborted chan struct{}
	cause   error // why, once aborted is closed
}

// abort ends every call on l that is in progress, also a write to a broker that
// reads nothing: the library has no other way to interrupt that.
func (l *amqpLink) abort(cause error) {
	l.once.Do(func() {
		l.cause = cause
		close(l.aborted)
		l.socket.Close()
	})
}

// open connects anew and gets the channel ready.
func (p *amqpPublisher) open(ctx context.Context) error {
	p.close()
	ctx, cancel := context.WithTimeoutCause(ctx, p.broker.DialTimeout,
		fmt.Errorf("not ready within %s", p.broker.DialTimeout))
	defer cancel()
	l := &amqpLink{closed: make(chan *amqp.Error, 1), aborted: make(chan struct{})}
	stop := func() bool { return true }
	connect := func(network, addr string) (net.Conn, error) {
		raw, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		l.socket = &amqpSocket{Conn: raw}
		stop = context.AfterFunc(ctx, func() { l.abort(context.Cause(ctx)) })
		return l.socket, nil
	}
	err := p.handshake(l, connect)
	if err == nil && stop() {
		p.link = l
		return nil
	}
	if l.socket != nil {
		l.abort(err)
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx) // what a closed socket says explains nothing
	}
	return fmt.Errorf("open exchange %s at %s: %w", p.exchange, p.address, err)
}

func (p *amqpPublisher) handshake(l *amqpLink, connect func(network, addr string) (net.Conn, error)) error {
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName("rescind " + p.sink)
	var err error
	l.conn, err = amqp.DialConfig(p.broker.URL, amqp.Config{
		Heartbeat: amqpHeartbeat, TLSClientConfig: p.broker.TLS.Clone(), Properties: properties, Dial: connect,
	})
	if err != nil {
		return err
	}
	blocked := l.conn.NotifyBlocked(make(chan amqp.Blocking, 1))
	go func() {
		for b := range blocked { // until the connection closes
			l.blocked.Store(b.Active)
		}
	}()
	if l.channel, err = l.conn.Channel(); err != nil {
		return err
	}
	l.channel.NotifyClose(l.closed)
	if err := p.declare(l.channel); err != nil {
		return err
	}
	return l.channel.Confirm(false)
}

// close says goodbye to the broker. What waits for a confirm is given up.
func (p *amqpPublisher) close() {
	l := p.link
	if l == nil {
		return
	}
	p.link = nil
	select {
	case <-l.aborted:
		return
	default:
	}
	bound := time.AfterFunc(amqpGoodbye, func() { l.abort(nil) })
	defer bound.Stop()
	_ = l.conn.Close() // nothing that matters was left to be said
	l.abort(nil)
}

// amqpSend sends m with routing key key. It does not keep m.
type amqpSend func(key string, m amqp.Publishing) error

// publish calls fill with a function that sends one message, and returns nil
// when all that were sent are confirmed. After an error the link is gone.
func (p *amqpPublisher) publish(ctx context.Context, fill func(amqpSend) error) error {
	l := p.link
	if l == nil {
		return fmt.Errorf("publish to exchange %s at %s: not open", p.exchange, p.address)
	}
	stop := context.AfterFunc(ctx, func() { l.abort(context.Cause(ctx)) })
	defer stop()
	b := &amqpBatch{publisher: p, link: l}
	b.stall = time.AfterFunc(p.broker.ConfirmTimeout, func() { l.abort(l.stalled(p.broker.ConfirmTimeout)) })
	defer b.stall.Stop()

	err := fill(b.send)
	if err == nil {
		err = b.wait(b.sent)
	}
	_ = l.socket.pass() // also when there was nothing to wait for
	if err != nil {
		p.close()
		return fmt.Errorf("publish to exchange %s at %s: %w", p.exchange, p.address, err)
	}
	return nil
}

// check returns an error, and drops the link, if it was lost since it was used.
func (p *amqpPublisher) check() error {
	if p.link != nil && !p.link.channel.IsClosed() {
		return nil
	}
	err := errors.New("not open")
	if p.link != nil {
		err = p.link.explain(amqp.ErrClosed)
		p.close()
	}
	return fmt.Errorf("look after exchange %s at %s: %w", p.exchange, p.address, err)
}

// amqpBatch is the messages of one call of publish.
type amqpBatch struct {
	publisher       *amqpPublisher
	link            *amqpLink
	stall           *time.Timer // aborts link unless put off
	sent, confirmed int
}

func (b *amqpBatch) place(n int) **amqp.DeferredConfirmation {
	return &b.publisher.pending[n%len(b.publisher.pending)]
}

func (b *amqpBatch) send(key string, m amqp.Publishing) error {
	if err := b.wait(b.sent - len(b.publisher.pending) + 1); err != nil {
		return err
	}
	b.link.socket.gather()
	d, err := b.link.channel.PublishWithDeferredConfirm(b.publisher.exchange, key, false, false, m)
	if err != nil {
		return b.link.explain(err)
	}
	*b.place(b.sent) = d
	b.sent++
	return nil
}

// wait returns nil once n messages are confirmed.
func (b *amqpBatch) wait(n int) error {
	for {
		if err := b.reap(); err != nil {
			return err
		}
		if b.confirmed >= min(n, b.sent) {
			return nil
		}
		if err := b.link.socket.pass(); err != nil {
			return b.link.explain(err)
		}
		select {
		case <-(*b.place(b.confirmed)).Done():
		case <-b.link.aborted: // also when the caller's context ends
			return b.link.cause
		}
	}
}

// reap counts the confirms that are there.
func (b *amqpBatch) reap() error {
	for ; b.confirmed < b.sent; b.confirmed++ {
		d := *b.place(b.confirmed)
		select {
		case <-d.Done():
		default:
			return nil
		}
		if !d.Acked() {
			return b.link.explain(errNack)
		}
		b.stall.Reset(b.publisher.broker.ConfirmTimeout)
	}
	return nil
}

var errNack = errors.New("the broker refused a message: a queue that is bound to the exchange is full or fails")

// explain finds the reason behind err, which a call on l returned.
func (l *amqpLink) explain(err error) error {
	select {
	case <-l.aborted:
		return l.cause
	default:
	}
	if !l.channel.IsClosed() {
		return err
	}
	select {
	case reason := <-l.closed: // sent before the messages that wait are given up
		if reason != nil {
			return reason
		}
	case <-l.aborted:
		return l.cause
	}
	return err
}

func (l *amqpLink) stalled(limit time.Duration) error {
	if l.blocked.Load() {
		return fmt.Errorf("no confirm within %s: the broker takes no messages while it is short of memory or disk", limit)
	}
	return fmt.Errorf("no confirm within %s", limit)
}

// amqpSocket can gather what is written to it. The library writes to the socket
// once for each message, which costs a fast broker more than the message does.
// It must not gather while nobody publishes: heartbeats go this way too.
type amqpSocket struct {
	net.Conn

	mu        sync.Mutex
	gathering bool
	buf       []byte
}

// amqpGathered is how much is gathered before it is written all the same, in bytes.
const amqpGathered = 32 << 10

func (s *amqpSocket) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.gathering {
		return s.Conn.Write(b)
	}
	s.buf = append(s.buf, b...)
	if len(s.buf) < amqpGathered {
		return len(b), nil
	}
	return len(b), s.flush()
}

// gather keeps what is written from now on until pass is called, or it is much.
func (s *amqpSocket) gather() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gathering = true
}

// pass lets through what was gathered and what is written from now on.
func (s *amqpSocket) pass() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gathering = false
	return s.flush()
}

// flush needs s.mu.
func (s *amqpSocket) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	_, err := s.Conn.Write(s.buf)
	s.buf = s.buf[:0]
	return err
}
