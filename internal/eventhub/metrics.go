package eventhub

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"
)

// Where a list of the catalog came from.
const (
	listShared  = "shared"
	listEncoded = "encoded"
)

// What became of a notification.
const (
	notifiedRevoked  = "revoked"
	notifiedNothing  = "nothing" // what it is about has ended, or was revoked before
	notifiedRepeated = "repeated"
	notifiedRefused  = "refused"
	notifiedFailed   = "failed"
)

// notifiedUnknown is the type of a notification that has none that is known.
const notifiedUnknown = "unknown"

type metrics struct {
	refused, foreign, dropped prometheus.Counter
	lists, revoked            *prometheus.CounterVec
	notified                  *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "rescind_eventhub_" + name, Help: help})
	}
	m := &metrics{
		refused: counter("refused_total", "Requests of WSO2's gateways that were refused because too many are here, or waited in vain."),
		foreign: counter("foreign_tenant_total", "Requests for a tenant that the account does not see, which were answered with nothing of it."),
		dropped: counter("dropped_total", "Answers that ended early because their reader had gone or took nothing."),
		lists: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_eventhub_lists_total",
			Help: "Whole lists of the catalog that were sent, by whether they had to be encoded.",
		}, []string{"result"}),
		revoked: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_eventhub_revocation_lists_total",
			Help: "Lists of revocations that were sent, by whether they had to be encoded.",
		}, []string{"result"}),
		notified: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_eventhub_notifications_total",
			Help: "Notifications of WSO2's key managers, by type and by what became of them.",
		}, []string{"type", "result"}),
	}
	for _, result := range []string{listShared, listEncoded} {
		m.lists.WithLabelValues(result)
		m.revoked.WithLabelValues(result)
	}
	for _, typ := range slices.Concat(notificationTypes, []string{notifiedUnknown}) {
		for _, result := range []string{notifiedRevoked, notifiedNothing, notifiedRepeated, notifiedRefused, notifiedFailed} {
			m.notified.WithLabelValues(typ, result)
		}
	}
	reg.MustRegister(m.refused, m.foreign, m.dropped, m.lists, m.revoked, m.notified)
	return m
}

// watch adds what is measured when it is asked for.
func (*metrics) watch(reg prometheus.Registerer, h *Hub) {
	gauge := func(name, help string, value func() int) prometheus.GaugeFunc {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "rescind_eventhub_" + name, Help: help},
			func() float64 { return float64(value()) })
	}
	reg.MustRegister(
		gauge("requests_in_flight", "Requests of WSO2's gateways and key managers that are being worked on or wait.", func() int { return len(h.slots) + len(h.notifiers) }),
		gauge("streams", "Lists of revocations that are being sent to WSO2's gateways.", func() int { return len(h.readers) }),
		gauge("cache_bytes", "Bytes of encoded lists of the catalog that are kept.", h.lists.held),
		gauge("sending_bytes", "Bytes of answers about the catalog that are being sent.", h.sending.held),
		gauge("revocation_bytes", "Bytes of encoded lists of revocations.", h.blobs.held),
	)
}
