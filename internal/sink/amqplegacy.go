package sink

import (
	"cmp"
	"context"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/wso2"
)

// AMQPLegacyConfig is for [NewAMQPLegacy]. All but the broker's URL may stay zero.
type AMQPLegacyConfig struct {
	AMQPBroker
	// Name tells sinks apart: it is part of the connection's name at the broker.
	// Default "amqp-wso2-legacy".
	Name string
	// Exchange must exist, see [AMQPWSO2Config.Exchange]. Default "amq.topic".
	Exchange string
	// RoutingKey is the topic of token revocations: what the gateways have as
	// jmsConnectionTopic. Default "jwtRevocation", which is that of API Microgateway 3.0.
	// No newer gateway may listen to it, nor to the other two.
	RoutingKey string
	// NotificationKey and KeyManagerKey are the topics of changes of the catalog and of
	// key managers. Empty: these are not published.
	NotificationKey, KeyManagerKey string
}

// AMQPLegacy publishes what WSO2's gateways of the era of JMS maps understand of the
// events: API Manager 3.2, API Microgateway 3.0 and 3.1.
type AMQPLegacy struct {
	publisher *amqpPublisher
	keys      map[string]string // by topic
}

var (
	_ relay.Opener = (*AMQPLegacy)(nil)
	_ relay.Beater = (*AMQPLegacy)(nil)
	_ relay.Closer = (*AMQPLegacy)(nil)
)

// NewAMQPLegacy checks cfg. It does not connect.
func NewAMQPLegacy(cfg AMQPLegacyConfig) (*AMQPLegacy, error) {
	keys := map[string]string{
		wso2.TopicTokenRevocation: cmp.Or(cfg.RoutingKey, "jwtRevocation"),
		wso2.TopicNotification:    cfg.NotificationKey,
		wso2.TopicKeyManagerJava:  cfg.KeyManagerKey,
	}
	publisher, err := newWSO2Publisher(cmp.Or(cfg.Name, "amqp-wso2-legacy"), cfg.Exchange, cfg.AMQPBroker, keys)
	if err != nil {
		return nil, err
	}
	return &AMQPLegacy{publisher: publisher, keys: keys}, nil
}

// Open implements [relay.Opener]. Delivery goes on after cursor.
func (s *AMQPLegacy) Open(ctx context.Context, cursor revocation.Position) (revocation.Seq, error) {
	return cursor.Seq, s.publisher.open(ctx)
}

// Deliver implements [relay.Sink].
func (s *AMQPLegacy) Deliver(ctx context.Context, events []revocation.Event) error {
	return publishWSO2(ctx, s.publisher, events, wso2.MapMessages, wso2.MapContentType, s.keys)
}

// Beat implements [relay.Beater], as [AMQPWSO2.Beat] does.
func (s *AMQPLegacy) Beat(context.Context, revocation.Heartbeat) error { return s.publisher.check() }

// Close implements [relay.Closer].
func (s *AMQPLegacy) Close() { s.publisher.close() }
