package snapshotapi

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Why a reader was dropped.
const (
	droppedStalled = "stalled" // it took nothing for some time
	droppedBehind  = "behind"  // too far behind the fastest
)

type metrics struct {
	builds        map[string]prometheus.Counter // by kind
	buildSeconds  prometheus.Observer
	snapshotBytes prometheus.Counter
	eventBytes    prometheus.Counter
	snapshotDrop  prometheus.Counter
	streamDrop    map[string]prometheus.Counter // by reason
	cached        prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer, a *API) *metrics {
	f := promauto.With(reg)
	counter := func(name, help string) prometheus.Counter {
		return f.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	taken := func(name, help string, s *slots) {
		f.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(s.count()) })
	}
	taken("rescind_snapshot_readers", "Snapshots that are being sent.", &a.readers)
	taken("rescind_events_readers", "Streams that are open and polls that wait.", &a.streams)
	m := &metrics{
		builds: make(map[string]prometheus.Counter), streamDrop: make(map[string]prometheus.Counter),
		buildSeconds: f.NewHistogram(prometheus.HistogramOpts{
			Name:    "rescind_snapshot_build_seconds",
			Help:    "From the first to the last byte of a snapshot that was made, waiting for its fastest reader included.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 9),
		}),
		snapshotBytes: counter("rescind_snapshot_sent_bytes_total", "Bytes of snapshots that readers took."),
		eventBytes:    counter("rescind_events_sent_bytes_total", "Bytes that readers of streams took."),
		snapshotDrop:  counter("rescind_snapshot_dropped_total", "Readers of snapshots that were dropped because they took nothing, or too little."),
		cached:        f.NewGauge(prometheus.GaugeOpts{Name: "rescind_snapshot_cached_bytes", Help: "Bytes of snapshots in memory."}),
	}
	builds := f.NewCounterVec(prometheus.CounterOpts{
		Name: "rescind_snapshot_builds_total", Help: "Snapshots that were made. All who ask for the same share one.",
	}, []string{"kind"})
	for name := range kinds {
		m.builds[name] = builds.WithLabelValues(name)
	}
	drops := f.NewCounterVec(prometheus.CounterOpts{
		Name: "rescind_events_dropped_total",
		Help: "Streams that were ended: stalled ones took nothing, those behind were too slow. They come back and go on.",
	}, []string{"reason"})
	for _, reason := range []string{droppedStalled, droppedBehind} {
		m.streamDrop[reason] = drops.WithLabelValues(reason)
	}
	return m
}
