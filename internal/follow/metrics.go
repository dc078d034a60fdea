package follow

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/rescindhq/rescind/api/replica"
)

type metrics struct {
	events, reloads, oldReads prometheus.Counter
	headReads                 *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, r *replica.State) *metrics {
	f := promauto.With(reg)
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rescind_follow_seq",
		Help: "The last event in this process's replica.",
	}, func() float64 { return float64(r.At().Seq) })
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rescind_follow_wide_revocations",
		Help: "Revocations in this process's replica that may end more than one token.",
	}, func() (n float64) {
		r.View(func(v *replica.View) { n = float64(v.Wide()) })
		return n
	})
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		events:   counter("rescind_follow_events_total", "Events that were applied to the replica."),
		reloads:  counter("rescind_follow_reloads_total", "Times that the replica could not go on by events and was loaded again."),
		oldReads: counter("rescind_follow_old_reads_total", "Reads of events from the database for those who were too far behind to be served from memory."),
		headReads: f.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_follow_head_reads_total",
			Help: "Reads of the log's head from the database.",
		}, []string{"result"}),
	}
	m.headReads.WithLabelValues("ok")
	m.headReads.WithLabelValues("failed")
	return m
}

func (m *metrics) readHead(err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	m.headReads.WithLabelValues(result).Inc()
}
