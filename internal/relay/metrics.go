package relay

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/rescindhq/rescind/api/revocation"
)

type metrics struct {
	seq, behind, lag, states *prometheus.GaugeVec
	retries, events          *prometheus.CounterVec
	propagation              *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return f.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, append([]string{"sink"}, labels...))
	}
	counter := func(name, help string) *prometheus.CounterVec {
		return f.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"sink"})
	}
	return &metrics{
		seq:     gauge("rescind_relay_seq", "The last event that is safe at the sink's far side."),
		behind:  gauge("rescind_relay_lag_events", "Events that wait for the sink."),
		lag:     gauge("rescind_relay_lag_seconds", "How long the oldest event that waits for the sink has waited."),
		states:  gauge("rescind_relay_state", "1 for what the sink does in this process, 0 for the rest.", "state"),
		retries: counter("rescind_relay_retries_total", "Tries that failed and were repeated."),
		events:  counter("rescind_relay_events_total", "Events that this process delivered, repeats included."),
		propagation: f.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "rescind_relay_propagation_seconds",
			Help:    "From an event's commit to the sink's confirmation.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
		}, []string{"sink"}),
	}
}

type sinkMetrics struct {
	seq, behind, lag prometheus.Gauge
	retries, events  prometheus.Counter
	propagation      prometheus.Observer
	states           map[State]prometheus.Gauge
}

func (m *metrics) of(sink string) sinkMetrics {
	s := sinkMetrics{
		seq: m.seq.WithLabelValues(sink), behind: m.behind.WithLabelValues(sink), lag: m.lag.WithLabelValues(sink),
		retries: m.retries.WithLabelValues(sink), events: m.events.WithLabelValues(sink),
		propagation: m.propagation.WithLabelValues(sink), states: make(map[State]prometheus.Gauge),
	}
	for _, state := range []State{Waiting, Running, Retrying, Stopped} {
		s.states[state] = m.states.WithLabelValues(sink, string(state))
	}
	return s
}

func (s sinkMetrics) state(now State) {
	for state, g := range s.states {
		if state == now {
			g.Set(1)
		} else {
			g.Set(0)
		}
	}
}

func (s sinkMetrics) position(seq, behind, lag float64) {
	s.seq.Set(seq)
	s.behind.Set(behind)
	s.lag.Set(lag)
}

func (s sinkMetrics) delivered(events []revocation.Event) {
	now := time.Now()
	for _, e := range events {
		s.propagation.Observe(max(0, now.Sub(e.Time).Seconds()))
	}
	s.events.Add(float64(len(events)))
}
