package sink

import (
	"cmp"
	"context"
	"hash/fnv"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
)

const amqpAppID = "rescind"

// AMQPConfig is for [NewAMQP]. All but the broker's URL may stay zero.
type AMQPConfig struct {
	AMQPBroker
	// Name tells sinks apart: it is part of the connection's name at the broker.
	// Default "amqp".
	Name string
	// Exchange is a durable topic exchange; it is declared. Default "rescind.events".
	Exchange string
}

// AMQP publishes every event to a topic exchange of RabbitMQ, as a structured
// CloudEvent, and heartbeats between them.
type AMQP struct {
	publisher *amqpPublisher
	name      string
	at        revocation.Position // everything up to it was published
	headers   amqp.Table          // of the message that is being sent
}

var (
	_ relay.Opener = (*AMQP)(nil)
	_ relay.Beater = (*AMQP)(nil)
	_ relay.Closer = (*AMQP)(nil)
)

// NewAMQP checks cfg. It does not connect.
func NewAMQP(cfg AMQPConfig) (*AMQP, error) {
	name, exchange := cmp.Or(cfg.Name, "amqp"), cmp.Or(cfg.Exchange, "rescind.events")
	declare := func(ch *amqp.Channel) error {
		return ch.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil)
	}
	publisher, err := newAMQPPublisher(name, exchange, cfg.AMQPBroker, declare)
	if err != nil {
		return nil, err
	}
	return &AMQP{publisher: publisher, name: name, headers: amqp.Table{}}, nil
}

// Open implements [relay.Opener]. Delivery goes on after cursor.
func (s *AMQP) Open(ctx context.Context, cursor revocation.Position) (revocation.Seq, error) {
	s.at = cursor
	return cursor.Seq, s.publisher.open(ctx)
}

// Deliver implements [relay.Sink].
func (s *AMQP) Deliver(ctx context.Context, events []revocation.Event) error {
	err := s.publisher.publish(ctx, func(send amqpSend) error {
		for _, e := range events {
			e.Traceparent = continueTrace(e.Traceparent, publicationID(s.name, e.Position))
			body, err := e.MarshalJSON()
			if err != nil {
				return relay.Permanent(err)
			}
			if err := send(e.RoutingKey(), s.message(e.String(), e.CloudType(), e, body)); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && len(events) > 0 {
		s.at = events[len(events)-1].Position
	}
	return err
}

// Beat implements [relay.Beater]: it publishes h with what this sink has published.
func (s *AMQP) Beat(ctx context.Context, h revocation.Heartbeat) error {
	h.Through = 0
	if h.Epoch == s.at.Epoch {
		h.Through = s.at.Seq
		h.Head = max(h.Head, h.Through) // events that were committed after the head was read
	}
	return s.publisher.publish(ctx, func(send amqpSend) error {
		body, err := h.MarshalJSON()
		if err != nil {
			return relay.Permanent(err)
		}
		attributes := revocation.Event{Source: h.Source, Time: h.Time}
		return send(revocation.HeartbeatRoutingKey, s.message(h.ID, h.CloudType(), attributes, body))
	})
}

// Close implements [relay.Closer].
func (s *AMQP) Close() { s.publisher.close() }

// message maps a CloudEvent in structured mode, with the other attributes of e,
// to AMQP 0-9-1. Readers trust the body; headers are copies for routing. They are
// those of s, good until the next message.
func (s *AMQP) message(id, typ string, e revocation.Event, body []byte) amqp.Publishing {
	h := s.headers
	clear(h)
	h["cloudEvents_specversion"] = "1.0"
	h["cloudEvents_id"] = id
	h["cloudEvents_source"] = e.Source
	h["cloudEvents_type"] = typ
	h["cloudEvents_time"] = e.TimeString()
	if e.Subject != "" {
		h["cloudEvents_subject"] = e.Subject
	}
	if e.Traceparent != "" {
		h["traceparent"] = e.Traceparent
	}
	return amqp.Publishing{
		Headers: h, ContentType: revocation.ContentType, DeliveryMode: amqp.Persistent, MessageId: id,
		Timestamp: e.Time, Type: typ, AppId: amqpAppID, Body: body,
	}
}

// publicationID is the parent id of what sink publishes at p: the same when it is
// published again.
func publicationID(sink string, p revocation.Position) uint64 {
	h := fnv.New64a()
	h.Write([]byte(sink + " " + p.String()))
	return h.Sum64()
}
