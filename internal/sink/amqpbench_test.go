package sink

import (
	"fmt"
	"testing"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
)

// BenchmarkAMQP has a message per operation. With batch=1 each waits for its
// confirm, which is the baseline, and the time per operation is the latency.
func BenchmarkAMQP(b *testing.B) {
	for _, bench := range []struct {
		name, exchange, key string
		open                func(AMQPBroker) (relay.Sink, error)
	}{
		{"amqp", "rescind.events", "revocation.#", func(broker AMQPBroker) (relay.Sink, error) {
			return NewAMQP(AMQPConfig{AMQPBroker: broker})
		}},
		{"amqp-wso2", "amq.topic", "tokenRevocation", func(broker AMQPBroker) (relay.Sink, error) {
			return NewAMQPWSO2(AMQPWSO2Config{AMQPBroker: broker})
		}},
	} {
		for _, consumers := range []int{0, 1} {
			for _, batch := range []int{1, 500, 5000} {
				b.Run(fmt.Sprintf("%s/consumers=%d/batch=%d", bench.name, consumers, batch), func(b *testing.B) {
					vhost := stacktest.NewVhost(b)
					for range consumers {
						deliveries := consume(b, vhost.AMQPURL, bench.exchange, bench.key)
						go func() {
							for range deliveries {
							}
						}()
					}
					s, err := bench.open(AMQPBroker{URL: vhost.AMQPURL})
					if err != nil {
						b.Fatal(err)
					}
					defer s.(relay.Closer).Close()
					if _, err := s.(relay.Opener).Open(b.Context(), revocation.Position{}); err != nil {
						b.Fatal(err)
					}
					events := relaytest.Events(1, batch)
					b.ReportAllocs()
					b.ResetTimer()
					for left := b.N; left > 0; left -= batch {
						if err := s.Deliver(b.Context(), events[:min(left, batch)]); err != nil {
							b.Fatal(err)
						}
					}
					b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
				})
			}
		}
	}
}
