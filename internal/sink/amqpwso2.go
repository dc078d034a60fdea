package sink

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"strconv"
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
	// RoutingKey is the topic of token revocations. Default "tokenRevocation". The
	// other topics are fixed in the gateways.
	RoutingKey string

	// MinSpacing, 1ms to 1s, has the revocation of each token published once more, with
	// at least this between two such messages: Choreo Connect loses some of those that
	// come at once. More is safer and, after a burst, later; 20ms to 50ms is typical.
	// 0 is off. The second message may be left out: only the sweep makes sure.
	MinSpacing time.Duration
	// SweepEvery, 1s to 24h, has the revocations of all live tokens published again and
	// again, evenly, once in this time: for gateways that were cut off, or have lost
	// some. A sweep takes longer if MinSpacing leaves no other way. 0 is off.
	SweepEvery time.Duration
	// Live yields the revocations in force, for sweeps; those of other kinds than
	// tokens, and those that have ended, are ignored. It is called twice for each sweep
	// and the second time read slowly, over SweepEvery. When its context ends it
	// yields an error, or nothing more.
	Live func(context.Context) iter.Seq2[revocation.Revocation, error]
	// Log hears what is wrong beside the ordered lane. Default: nobody.
	Log *slog.Logger
}

// AMQPWSO2 publishes what WSO2's gateways understand of the events, in their words
// and in order. What MinSpacing and SweepEvery ask for goes over a connection of its
// own and delays nothing here.
type AMQPWSO2 struct {
	publisher *amqpPublisher
	keys      map[string]string // by topic
	replay    *wso2Replay       // nil if there is nothing for it to do
}

var (
	_ relay.Opener = (*AMQPWSO2)(nil)
	_ relay.Beater = (*AMQPWSO2)(nil)
	_ relay.Closer = (*AMQPWSO2)(nil)
)

// NewAMQPWSO2 checks cfg. It does not connect.
func NewAMQPWSO2(cfg AMQPWSO2Config) (*AMQPWSO2, error) {
	name := cmp.Or(cfg.Name, "amqp-wso2")
	keys := map[string]string{
		wso2.TopicTokenRevocation: cmp.Or(cfg.RoutingKey, wso2.TopicTokenRevocation),
		wso2.TopicNotification:    wso2.TopicNotification,
		wso2.TopicKeyManagerGo:    wso2.TopicKeyManagerGo,
		wso2.TopicKeyManagerJava:  wso2.TopicKeyManagerJava,
	}
	publisher, err := newWSO2Publisher(name, cfg.Exchange, cfg.AMQPBroker, keys)
	var errs []error
	if cfg.MinSpacing != 0 && (cfg.MinSpacing < time.Millisecond || cfg.MinSpacing > time.Second) {
		errs = append(errs, fmt.Errorf("sink %s: minimum spacing is %s, must be 0 or 1ms to 1s", name, cfg.MinSpacing))
	}
	if cfg.SweepEvery != 0 && (cfg.SweepEvery < time.Second || cfg.SweepEvery > 24*time.Hour) {
		errs = append(errs, fmt.Errorf("sink %s: time of a sweep is %s, must be 0 or 1s to 24h", name, cfg.SweepEvery))
	}
	if cfg.SweepEvery != 0 && cfg.Live == nil {
		errs = append(errs, fmt.Errorf("sink %s: there is nothing to sweep: Live is not set", name))
	}
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, err
	}
	s := &AMQPWSO2{publisher: publisher, keys: keys}
	if cfg.MinSpacing != 0 || cfg.SweepEvery != 0 {
		beside, err := newWSO2Publisher(name+"-replay", cfg.Exchange, cfg.AMQPBroker, keys)
		if err != nil {
			return nil, err
		}
		log := cfg.Log
		if log == nil {
			log = slog.New(slog.DiscardHandler)
		}
		s.replay = newWSO2Replay(cfg, keys[wso2.TopicTokenRevocation], beside, log.With("component", "sink", "sink", name))
	}
	return s, nil
}

// newWSO2Publisher is a publisher to an exchange that the gateways have declared.
func newWSO2Publisher(name, exchange string, broker AMQPBroker, keys map[string]string) (*amqpPublisher, error) {
	exchange = cmp.Or(exchange, "amq.topic")
	check := func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(exchange, amqp.ExchangeTopic, true, false, false, false, nil)
	}
	publisher, err := newAMQPPublisher(name, exchange, broker, check)
	for _, key := range slices.Sorted(maps.Values(keys)) {
		if len(key) > amqpShortString {
			err = errors.Join(err, fmt.Errorf("sink %s: routing key has %d bytes, must have 1 to %d", name, len(key), amqpShortString))
		}
	}
	return publisher, err
}

// Open implements [relay.Opener]. Delivery goes on after cursor.
func (s *AMQPWSO2) Open(ctx context.Context, cursor revocation.Position) (revocation.Seq, error) {
	if err := s.publisher.open(ctx); err != nil {
		return 0, err
	}
	if s.replay != nil {
		s.replay.start(ctx)
	}
	return cursor.Seq, nil
}

// Deliver implements [relay.Sink].
func (s *AMQPWSO2) Deliver(ctx context.Context, events []revocation.Event) error {
	if err := publishWSO2(ctx, s.publisher, events, wso2.Messages, wso2.ContentType, s.keys); err != nil {
		return err
	}
	if s.replay != nil {
		s.replay.add(events)
	}
	return nil
}

// publishWSO2 publishes what say tells gateways about events. Topics that have no key
// are left out.
func publishWSO2(ctx context.Context, publisher *amqpPublisher, events []revocation.Event,
	say func(revocation.Event, time.Time) ([]wso2.Message, error), contentType string, keys map[string]string) error {
	now := time.Now()
	return publisher.publish(ctx, func(send amqpSend) error {
		for _, e := range events {
			messages, err := say(e, now)
			if err != nil {
				return relay.Permanent(err)
			}
			for i, m := range messages {
				key := keys[m.Topic]
				if key == "" {
					continue
				}
				id := e.String()
				if i > 0 {
					id += "#" + strconv.Itoa(i+1)
				}
				if err := send(key, wso2Publishing(contentType, id, m.Body)); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// wso2Publishing has no headers and no timestamp: the gateways in Java take the first
// for instructions, and the second for milliseconds.
func wso2Publishing(contentType, id string, body []byte) amqp.Publishing {
	return amqp.Publishing{ContentType: contentType, DeliveryMode: amqp.Persistent, MessageId: id, Body: body}
}

// Beat implements [relay.Beater]. WSO2 has no word for a heartbeat: it only notices
// a connection that was lost while there was nothing to deliver.
func (s *AMQPWSO2) Beat(context.Context, revocation.Heartbeat) error { return s.publisher.check() }

// Close implements [relay.Closer].
func (s *AMQPWSO2) Close() {
	if s.replay != nil {
		s.replay.close()
	}
	s.publisher.close()
}
