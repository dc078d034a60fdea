package fleet

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	live, lost, diverged prometheus.Gauge
	reports              map[string]prometheus.Counter // by outcome
	barriers             prometheus.Histogram
}

// outcomes are those of a report, by the error that it is answered with. What is none of them failed.
var outcomes = []struct {
	err  error
	name string
}{
	{nil, "taken"}, {ErrReport, "invalid"}, {ErrID, "invalid"}, {ErrOwned, "owned"}, {ErrInstance, "instance"}, {ErrTooMany, "too_many"},
}

const outcomeFailed = "failed"

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	gateways := f.NewGaugeVec(prometheus.GaugeOpts{
		Name: "rescind_gateways",
		Help: "Gateways that reported to this process last: live ones, and those that are silent and did not say that they stop.",
	}, []string{"standing"})
	reports := f.NewCounterVec(prometheus.CounterOpts{
		Name: "rescind_gateway_reports_total", Help: "Reports of gateways, by what came of them.",
	}, []string{"outcome"})
	m := &metrics{
		live: gateways.WithLabelValues(string(Live)),
		lost: gateways.WithLabelValues(string(Lost)),
		diverged: f.NewGauge(prometheus.GaugeOpts{
			Name: "rescind_gateways_diverged",
			Help: "Gateways that reported to this process last and whose state is not the log's.",
		}),
		reports: map[string]prometheus.Counter{outcomeFailed: reports.WithLabelValues(outcomeFailed)},
		barriers: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "rescind_barrier_duration_seconds",
			Help:    "How long barriers waited, those included that were given up.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
		}),
	}
	for _, o := range outcomes {
		m.reports[o.name] = reports.WithLabelValues(o.name)
	}
	return m
}

func (m *metrics) reported(err error) {
	name := outcomeFailed
	for _, o := range outcomes {
		if errors.Is(err, o.err) {
			name = o.name
			break
		}
	}
	m.reports[name].Inc()
}
