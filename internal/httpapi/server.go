package httpapi

import (
	"container/list"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// NewServer returns a server for handler with bounds on what slow or many peers
// can hold. Its caller listens, serves, and shuts it down.
func NewServer(cfg Config, handler http.Handler, reg prometheus.Registerer, log *slog.Logger) (*http.Server, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	log = log.With("component", "httpapi")
	c := newConnections(cfg.MaxConnections, reg)
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      15*time.Second + cfg.Timeout + 5*time.Second, // begins when the header is read
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    32 << 10,
		Protocols:         protocols,
		ConnState:         c.changed,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, receivedKey{}, func() { c.received(conn) })
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug), // what peers do wrong
	}, nil
}

// connections bounds the open connections of a server.
type connections struct {
	limit  int
	closed prometheus.Counter

	mu   sync.Mutex
	open map[net.Conn]*list.Element // nil while a request is being worked on
	idle *list.List                 // of net.Conn, the one that has waited for longest in front
}

func newConnections(limit int, reg prometheus.Registerer) *connections {
	c := &connections{
		limit: limit, open: make(map[net.Conn]*list.Element), idle: list.New(),
		closed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rescind_http_connections_closed_total",
			Help: "Idle connections that were closed to make room for new ones.",
		}),
	}
	reg.MustRegister(c.closed, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rescind_http_connections",
		Help: "Open connections.",
	}, func() float64 {
		c.mu.Lock()
		defer c.mu.Unlock()
		return float64(len(c.open))
	}))
	return c
}

// receivedKey is the context key of a function to call once a request is here.
type receivedKey struct{}

// changed is the server's ConnState. A connection counts as idle until a request has
// come whole: slow senders go first. If all others are at work the new one itself is
// closed.
func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.open[conn]; e != nil {
		c.idle.Remove(e)
	}
	switch state {
	case http.StateNew, http.StateIdle:
		c.open[conn] = c.idle.PushBack(conn)
		if len(c.open) > c.limit {
			oldest := c.idle.Front().Value.(net.Conn)
			c.forget(oldest)
			c.closed.Inc()
			hangUp(oldest)
		}
	case http.StateActive:
		if _, ok := c.open[conn]; ok { // else it was hung up on
			c.open[conn] = c.idle.PushBack(conn)
		}
	default:
		c.forget(conn)
	}
}

// received says that conn's request is here and will be worked on.
func (c *connections) received(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.open[conn]; e != nil {
		c.idle.Remove(e)
		c.open[conn] = nil
	}
}

func (c *connections) forget(conn net.Conn) {
	if e := c.open[conn]; e != nil {
		c.idle.Remove(e)
	}
	delete(c.open, conn)
}

// hangUp closes conn without TLS's goodbye, which may wait for the peer.
func hangUp(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	_ = conn.Close() // whatever it says, it is gone
}
