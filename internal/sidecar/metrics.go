package sidecar

import (
	"context"
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
)

// overloaded is the reason of decisions that nobody had time for; it is beside [gateway.Reasons].
const overloaded = "overloaded"

// What becomes of a request to the reverse proxy.
const (
	proxied     = "proxied"     // the upstream has answered
	refused     = "refused"     // by a decision
	tooMany     = overloaded    // past Proxy.MaxInFlight
	noUpstream  = "no_upstream" // the configuration has none for the API
	unreachable = "unreachable" // or the upstream gave up in the middle
	timedOut    = "timeout"
	clientGone  = "client_gone" // before there was an answer
)

var proxyResults = []string{proxied, refused, tooMany, noUpstream, unreachable, timedOut, clientGone}

// introspectionResults are by the reason of a decision for which an issuer was to be asked.
var introspectionResults = map[string]string{
	"": "active", "introspection_inactive": "inactive", "introspection_failed": "failed", "introspection_overload": overloaded,
}

// metrics are what operators see. All series are there from the start. The numbers of what is under way are also
// what limits are held against.
type metrics struct {
	allowed  prometheus.Counter
	refused  map[string]prometheus.Counter // by reason
	other    prometheus.Counter            // of reasons that are not known
	took     prometheus.Histogram
	inFlight atomic.Int64

	malformed    prometheus.Counter
	introspected map[string]prometheus.Counter // by reason of a refusal, "" for those that are active

	proxied            map[string]prometheus.Counter // by result
	proxying           atomic.Int64
	connections        atomic.Int64
	connectionsRefused prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, e engine) *metrics {
	decisions := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rescind_gateway_decisions_total",
		Help: "Decisions, and by which check requests were refused.",
	}, []string{"result", "reason"})
	answers := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rescind_gateway_proxy_requests_total",
		Help: "Requests to the reverse proxy by what became of them.",
	}, []string{"result"})
	introspections := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rescind_gateway_introspections_total",
		Help: "Tokens that an issuer was to be asked about, because too little was known.",
	}, []string{"result"})
	m := &metrics{
		allowed: decisions.WithLabelValues("allowed", ""),
		refused: make(map[string]prometheus.Counter),
		other:   decisions.WithLabelValues("refused", "other"),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "rescind_gateway_decision_seconds",
			Help:    "Time to decide. Past a few milliseconds somebody was asked: for keys, or about a token.",
			Buckets: []float64{2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 0.25, 1, 5},
		}),
		malformed:    prometheus.NewCounter(prometheus.CounterOpts{Name: "rescind_gateway_auth_malformed_total", Help: "Questions to /auth that a proxy asked wrongly."}),
		introspected: make(map[string]prometheus.Counter),
		proxied:      make(map[string]prometheus.Counter),
		connectionsRefused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "rescind_gateway_proxy_connections_refused_total", Help: "Connections to the reverse proxy that were closed because there were too many.",
		}),
	}
	for _, reason := range append([]string{overloaded}, gateway.Reasons...) {
		if reason != "" {
			m.refused[reason] = decisions.WithLabelValues("refused", reason)
		}
	}
	for reason, result := range introspectionResults {
		m.introspected[reason] = introspections.WithLabelValues(result)
	}
	for _, result := range proxyResults {
		m.proxied[result] = answers.WithLabelValues(result)
	}
	reg.MustRegister(decisions, introspections, answers, m.took, m.malformed, m.connectionsRefused, &replicaCollector{e},
		gaugeOf(&m.inFlight, "decisions_in_flight", "Decisions under way."),
		gaugeOf(&m.proxying, "proxy_requests_in_flight", "Requests that the reverse proxy works on, with open streams."),
		gaugeOf(&m.connections, "proxy_connections", "Open connections to the reverse proxy."))
	return m
}

func gaugeOf(n *atomic.Int64, name, help string) prometheus.GaugeFunc {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "rescind_gateway_" + name, Help: help}, func() float64 { return float64(n.Load()) })
}

func (m *metrics) decided(d gateway.Decision, took time.Duration) {
	m.took.Observe(took.Seconds())
	if d.Outcome == replica.Ask {
		if c, ok := m.introspected[d.Reason]; ok {
			c.Inc()
		}
	}
	if d.Allowed {
		m.allowed.Inc()
	} else if c, ok := m.refused[d.Reason]; ok {
		c.Inc()
	} else {
		m.other.Inc()
	}
}

// counted is a checker that counts, and bounds how much is under way.
type counted struct {
	checker
	m     *metrics
	limit int64
}

func newCounted(c checker, limit int, m *metrics) *counted {
	return &counted{checker: c, m: m, limit: int64(limit)}
}

func (c *counted) Decide(ctx context.Context, r gateway.Request) gateway.Decision {
	began := time.Now()
	defer c.m.inFlight.Add(-1)
	var d gateway.Decision
	if c.m.inFlight.Add(1) > c.limit {
		d = gateway.Decision{Status: 503, Reason: overloaded, Authorization: replica.Authorization{Code: replica.CodeGeneral}}
	} else {
		d = c.checker.Decide(ctx, r)
	}
	c.m.decided(d, time.Since(began))
	return d
}

// replicaCollector asks a replica for its status at each scrape.
type replicaCollector struct{ engine engine }

func replicaDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("rescind_gateway_"+name, help, labels, nil)
}

var (
	readyDesc       = replicaDesc("ready", "1 if the gateway has what it needs to decide.")
	issuersDesc     = replicaDesc("issuers", "Issuers that are trusted.")
	withKeysDesc    = replicaDesc("issuers_with_keys", "Those of them whose keys are here.")
	ageDesc         = replicaDesc("replica_age_seconds", "How old what is known is: all that was committed longer ago is in it. +Inf while nothing is known.")
	seqDesc         = replicaDesc("replica_seq", "The last event that has been applied.")
	revocationsDesc = replicaDesc("replica_revocations", "Revocations that are held.")
	entitiesDesc    = replicaDesc("replica_entities", "Entities of the catalog that are held.")
	snapshotsDesc   = replicaDesc("replica_snapshots_total", "Snapshots that were loaded.")
	deltasDesc      = replicaDesc("replica_deltas_total", "Times that missed events were fetched.")
	troubleDesc     = replicaDesc("replica_trouble", "1 while something is wrong with the source or the folder: /status tells what.")
	connectedDesc   = replicaDesc("feed_connected", "1 if the feed is connected.", "feed")
	reportsDesc     = replicaDesc("reports_total", "Reports to the service by whether it took them.", "result")
	eventsDesc      = replicaDesc("feed_events_total", "Events that the feed has told.", "feed")
)

func (c *replicaCollector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{readyDesc, issuersDesc, withKeysDesc, ageDesc, seqDesc, revocationsDesc, entitiesDesc, snapshotsDesc, deltasDesc, troubleDesc, reportsDesc, connectedDesc, eventsDesc} {
		to <- d
	}
}

func (c *replicaCollector) Collect(to chan<- prometheus.Metric) {
	s := c.engine.Status()
	tell := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	age := s.Age.Seconds()
	if s.Age == replica.Never {
		age = math.Inf(1)
	}
	tell(readyDesc, prometheus.GaugeValue, oneIf(c.engine.Ready()))
	keys := c.engine.Keys()
	tell(issuersDesc, prometheus.GaugeValue, float64(keys.Issuers))
	tell(withKeysDesc, prometheus.GaugeValue, float64(keys.WithKeys))
	tell(ageDesc, prometheus.GaugeValue, age)
	tell(seqDesc, prometheus.GaugeValue, float64(s.Seq))
	tell(revocationsDesc, prometheus.GaugeValue, float64(s.Revocations))
	tell(entitiesDesc, prometheus.GaugeValue, float64(s.Entities))
	tell(snapshotsDesc, prometheus.CounterValue, float64(s.Snapshots))
	tell(deltasDesc, prometheus.CounterValue, float64(s.Deltas))
	tell(troubleDesc, prometheus.GaugeValue, oneIf(s.Error != ""))
	if s.Report != nil {
		tell(reportsDesc, prometheus.CounterValue, float64(s.Report.Taken), "taken")
		tell(reportsDesc, prometheus.CounterValue, float64(s.Report.Failed), "failed")
	}
	for _, f := range s.Feeds {
		tell(connectedDesc, prometheus.GaugeValue, oneIf(f.Connected), f.Name)
		tell(eventsDesc, prometheus.CounterValue, float64(f.Events), f.Name)
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
