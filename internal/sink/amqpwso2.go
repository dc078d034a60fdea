package sink

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/wso2"
)

// AMQPWSO2Config is for [NewAMQPWSO2]. All but the broker's URL may stay zero.
type AMQPWSO2Config struct {
	AMQPBroker
	// Name tells sinks apart: it is part of the connection's name at the broker.
	// Default "amqp-wso2".
	Name string
	// Exchange must exist. It is never declared: the gateways declare it with the
	// flags that they know, and other flags would lock them out. Default
	// "amq.topic", which every vhost has.
	Exchange string
	// RoutingKey is the topic of token revocations. Default "tokenRevocation".
	RoutingKey string
}

// AMQPWSO2 publishes what WSO2's gateways understand of the events, in their
// words.
type AMQPWSO2 struct {
	publisher *amqpPublisher
	key       string
}

var (
	_ relay.Opener = (*AMQPWSO2)(nil)
	_ relay.Beater = (*AMQPWSO2)(nil)
	_ relay.Closer = (*AMQPWSO2)(nil)
)

// NewAMQPWSO2 checks cfg. It does not connect.
func NewAMQPWSO2(cfg AMQPWSO2Config) (*AMQPWSO2, error) {
	name, exchange := cmp.Or(cfg.Name, "amqp-wso2"), cmp.Or(cfg.Exchange, "amq.topic")
	key := cmp.Or(cfg.RoutingKey, "tokenRevocation")
	check := func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(exchange, amqp.ExchangeTopic, true, false, false, false, nil)
	}
	publisher, err := newAMQPPublisher(name, exchange, cfg.AMQPBroker, check)
	if len(key) > amqpShortString {
		err = errors.Join(err, fmt.Errorf("sink %s: routing key has %d bytes, must have 1 to %d", name, len(key), amqpShortString))
	}
	if err != nil {
		return nil, err
	}
	return &AMQPWSO2{publisher: publisher, key: key}, nil
}

// Open implements [relay.Opener]. Delivery goes on after cursor.
func (s *AMQPWSO2) Open(ctx context.Context, cursor revocation.Position) (revocation.Seq, error) {
	return cursor.Seq, s.publisher.open(ctx)
}

// Deliver implements [relay.Sink].
func (s *AMQPWSO2) Deliver(ctx context.Context, events []revocation.Event) error {
	now := time.Now()
	return s.publisher.publish(ctx, func(send amqpSend) error {
		for _, e := range events {
			body, err := wso2.TokenRevocation(e, now)
			if err != nil {
				return relay.Permanent(err)
			}
			if body == nil {
				continue
			}
			// The gateways in Java take the timestamp for milliseconds, and headers for
			// instructions: there are none.
			err = send(s.key, amqp.Publishing{
				ContentType: wso2.ContentType, DeliveryMode: amqp.Persistent, MessageId: e.String(), Body: body,
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Beat implements [relay.Beater]. WSO2 has no word for a heartbeat: it only notices
// a connection that was lost while there was nothing to deliver.
func (s *AMQPWSO2) Beat(context.Context, revocation.Heartbeat) error { return s.publisher.check() }

// Close implements [relay.Closer].
func (s *AMQPWSO2) Close() { s.publisher.close() }
