package ledger

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	batch, commit            prometheus.Histogram
	refused, failed, retried prometheus.Counter
	expanded                 prometheus.Counter
	trimmed                  *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, l *Ledger) *metrics {
	f := promauto.With(reg)
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rescind_log_head_seq",
		Help: "The last seq of the log that this process knows to be committed.",
	}, func() float64 { return float64(l.lastSeen().Seq) })
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rescind_ledger_queue_items",
		Help: "Revocations that wait for a commit.",
	}, func() float64 { return float64(l.queue.len()) })
	f.NewGauge(prometheus.GaugeOpts{
		Name: "rescind_ledger_queue_capacity_items",
		Help: "Revocations that may wait for a commit; past it they are refused.",
	}).Set(float64(l.cfg.QueueSize))
	m := &metrics{
		batch: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "rescind_ledger_batch_items",
			Help:    "Requests in one commit.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 13),
		}),
		commit: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "rescind_ledger_commit_seconds",
			Help:    "Time that a batch's transaction took.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14),
		}),
		refused: f.NewCounter(prometheus.CounterOpts{
			Name: "rescind_ledger_refused_total",
			Help: "Revocations refused because too many waited or the service was stopping.",
		}),
		failed: f.NewCounter(prometheus.CounterOpts{
			Name: "rescind_ledger_failed_commits_total",
			Help: "Batches, or single requests of a batch, that could not be committed.",
		}),
		retried: f.NewCounter(prometheus.CounterOpts{
			Name: "rescind_ledger_retried_commits_total",
			Help: "Transactions tried again after a deadlock or a lost connection.",
		}),
		expanded: f.NewCounter(prometheus.CounterOpts{
			Name: "rescind_ledger_expanded_total",
			Help: "Remembered tokens revoked one by one after a revocation of more than one token.",
		}),
		trimmed: f.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_ledger_trimmed_rows_total",
			Help: "Rows removed because they are over.",
		}, []string{"table"}),
	}
	m.trimmed.WithLabelValues("log")
	m.trimmed.WithLabelValues("revocations")
	m.trimmed.WithLabelValues("issued_tokens")
	return m
}
