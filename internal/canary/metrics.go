package canary

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/rescindhq/rescind/internal/fleet"
)

// metrics are those of the process that leads; the others have no gateways, and none is alarming to them.
type metrics struct {
	seconds       prometheus.Histogram
	rounds        *prometheus.CounterVec
	alarming      prometheus.Gauge
	last, accepts *prometheus.GaugeVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		seconds: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "rescind_canary_seconds",
			Help:    "From the commit of a canary's revocation to a gateway's first refusal.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}),
		rounds: f.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_canary_rounds_total", Help: "Rounds of the canary with at least one gateway; a failed one says nothing of the gateways.",
		}, []string{"result"}),
		alarming: f.NewGauge(prometheus.GaugeOpts{
			Name: "rescind_canary_alarming", Help: "Gateways whose last canary is alarming: not refused in time, refused without being revoked, or not answered.",
		}),
		last: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "rescind_canary_last_seconds", Help: "How long the gateway took when it last refused a revoked canary.",
		}, []string{"gateway"}),
		accepts: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "rescind_canary_accepts", Help: "1 while the gateway accepts a canary that was revoked longer ago than the limit.",
		}, []string{"gateway"}),
	}
}

func (m *metrics) result(id string, r fleet.CanaryResult) {
	accepts := 0.
	switch {
	case r.Outcome == Refused, r.RefusedMS > 0:
		m.seconds.Observe(r.RefusedMS / 1000)
		m.last.WithLabelValues(id).Set(r.RefusedMS / 1000)
	case r.Outcome == StillAccepted:
		accepts = 1
	}
	m.accepts.WithLabelValues(id).Set(accepts)
}

func (m *metrics) forget(id string) {
	m.last.DeleteLabelValues(id)
	m.accepts.DeleteLabelValues(id)
}

func (m *metrics) reset() {
	m.alarming.Set(0)
	m.last.Reset()
	m.accepts.Reset()
}
