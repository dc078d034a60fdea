package sink

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
	"github.com/rescindhq/rescind/internal/wso2test"
)

func TestAMQPLegacy(t *testing.T) {
	t.Parallel()
	relaytest.Sink(t, func(t *testing.T) relaytest.Far {
		vhost := stacktest.NewVhost(t)
		u, proxy := proxied(t, vhost.AMQPURL)
		s, err := NewAMQPLegacy(AMQPLegacyConfig{AMQPBroker: patient(u)})
		if err != nil {
			t.Fatal(err)
		}
		return relaytest.Far{
			Sink: s, Proxy: proxy, Next: nextSeq(consume(t, vhost.AMQPURL, "amq.topic", "jwtRevocation")),
			Secrets: []string{passwordOf(t, u), u},
		}
	})
}

func TestAMQPLegacyWire(t *testing.T) {
	t.Parallel()
	events := append(relaytest.Events(1, 1), changeEvents(t, 2,
		catalog.Change{Verb: catalog.Created, Entity: &catalog.Application{Meta: metaOf(1, 7), Name: "App"}},
		catalog.Change{Verb: catalog.LifecycleChanged, Entity: &catalog.API{Meta: metaOf(3, 8)}},
		catalog.Change{Verb: catalog.Created, Entity: &catalog.KeyManager{Meta: metaOf(4, 9), Name: "KM", Enabled: true}},
	)...)
	events = append(events, relaytest.Events(5, 1)...)
	first, last := wire("old.revoked", "jms/map-message", "1"), wire("old.revoked", "jms/map-message", "5")
	tests := []struct {
		name                string
		notification, third string
		want                []message
	}{
		{"all", "old.notification", "old.km", []message{
			first,
			wire("old.notification", "jms/map-message", "2"),
			wire("old.notification", "jms/map-message", "3"),
			wire("old.notification", "jms/map-message", "3#2"),
			wire("old.km", "jms/map-message", "4"),
			last,
		}},
		{"revocations only", "", "", []message{first, last}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			vhost := stacktest.NewVhost(t)
			deliveries := consume(t, vhost.AMQPURL, "amq.topic", "#")
			relaytest.NoLeaks(t)
			s, err := NewAMQPLegacy(AMQPLegacyConfig{
				AMQPBroker: AMQPBroker{URL: vhost.AMQPURL}, RoutingKey: "old.revoked", NotificationKey: tt.notification, KeyManagerKey: tt.third,
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.Close)
			mustOpen(t, s, 0)
			mustDeliver(t, s, events...)
			for _, want := range tt.want {
				got := mustReceive(t, deliveries)
				if diff := cmp.Diff(want, seen(got)); diff != "" {
					t.Errorf("message (-want +got):\n%s", diff)
				}
				m, err := wso2test.DecodeJMS(got)
				if err != nil {
					t.Fatal(err)
				}
				kinds := map[string]any{}
				switch want.RoutingKey {
				case "old.revoked":
					kinds = map[string]any{"ttl": "", "revokedToken": "", "expiryTime": int64(0), "type": "", "tenantId": int32(0)}
				case "old.notification":
					kinds = map[string]any{"eventType": "", "timestamp": int64(0), "event": ""}
				case "old.km":
					kinds = map[string]any{"event_type": "", "name": "", "tenantDomain": "", "action": "", "type": "", "enabled": false, "value": ""}
				}
				for name := range m.Map { // keep the type only
					switch m.Map[name].(type) {
					case string:
						m.Map[name] = ""
					case int64:
						m.Map[name] = int64(0)
					case int32:
						m.Map[name] = int32(0)
					case bool:
						m.Map[name] = false
					}
				}
				if diff := cmp.Diff(kinds, m.Map); diff != "" {
					t.Errorf("map on %s (-want +got):\n%s", want.RoutingKey, diff)
				}
			}
		})
	}
}

func TestNewAMQPLegacyChecks(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 256)
	_, err := NewAMQPLegacy(AMQPLegacyConfig{RoutingKey: long, NotificationKey: long, KeyManagerKey: long})
	for _, want := range []string{"sink amqp-wso2-legacy", "routing key has 256 bytes", "URL is not"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one that says %q", err, want)
		}
	}
	if _, err := NewAMQPLegacy(AMQPLegacyConfig{AMQPBroker: AMQPBroker{URL: "amqp://u:p@h/"}}); err != nil {
		t.Errorf("a URL alone: %v", err)
	}
}
