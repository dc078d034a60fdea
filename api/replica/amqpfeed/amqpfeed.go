// Package amqpfeed follows the events on RabbitMQ for a replica. It hides the connection, the
// queue and its bindings.
package amqpfeed

import (
	"context"
	"crypto/tls"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// Config says where events are. URL is needed.
type Config struct {
	// URL is amqps://user:password@host:5671/vhost. The user needs to read only: see README.md.
	URL string
	// TLS is for amqps. Default: the system's authorities.
	TLS *tls.Config
	// Exchange is where the events are. Default "rescind.events".
	Exchange string
	// Tenants are the domains of those whose events are wanted. Default: all. They must be those
	// that the replica's source has.
	Tenants []string
}

// Feed is a [replica.Feed]. Make one with [New].
type Feed struct{}

var _ replica.Feed = (*Feed)(nil)

// New checks cfg. It does not connect.
func New(cfg Config) (*Feed, error) { panic("skeleton") }

// Name implements [replica.Feed]. It is "amqp".
func (f *Feed) Name() string { return "amqp" }

// Follow implements [replica.Feed].
func (f *Feed) Follow(ctx context.Context, at func() revocation.Position, to replica.Receiver) error {
	panic("skeleton")
}
