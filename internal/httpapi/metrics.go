package httpapi

import (
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"
)

// unmatched is the route of requests that match none.
const unmatched = "unmatched"

type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer, slots chan struct{}) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_http_requests_total",
			Help: "Requests by route, method and status.",
		}, []string{"route", "method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "rescind_http_request_seconds",
			Help:    "Time from a request's header to the end of its answer. Routes whose answers last, such as streams, have none.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"route"}),
	}
	inFlight := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "rescind_http_requests_in_flight",
		Help: "Requests that are being worked on, but for those that last, such as streams and snapshots.",
	}, func() float64 { return float64(len(slots)) })
	reg.MustRegister(m.requests, m.seconds, inFlight)
	return m
}

// formCodes are the statuses that a form endpoint can answer a POST with.
var formCodes = []int{200, 400, 401, 413, 415, 429, 500, 503}

// prepare makes every route's metrics, so that rates begin at zero.
func (m *metrics) prepare(router chi.Routes, isForm func(path string) bool) error {
	add := func(route, method string, codes ...int) {
		if !isLasting(route) {
			m.seconds.WithLabelValues(route)
		}
		for _, code := range codes {
			m.requests.WithLabelValues(route, method, strconv.Itoa(code))
		}
	}
	add(unmatched, http.MethodGet, http.StatusNotFound)
	return chi.Walk(router, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		switch {
		case !isForm(route):
			add(route, method, 200, 500, 503)
		case method == http.MethodPost:
			add(route, method, formCodes...)
		}
		return nil
	})
}

func (m *metrics) observe(route, method string, status int, took time.Duration) {
	if route == "" {
		route = unmatched
	}
	m.requests.WithLabelValues(route, method, strconv.Itoa(status)).Inc()
	if !isLasting(route) { // an hour of a stream would be most of every average
		m.seconds.WithLabelValues(route).Observe(took.Seconds())
	}
}

// The results of a revocation request.
const (
	resultRevoked     = "revoked"
	resultRepeated    = "repeated"
	resultNothing     = "nothing" // 200, and nothing written: see the reasons
	resultForeign     = "foreign_token"
	resultUnsupported = "unsupported"
	resultRefused     = "refused" // before the token was looked at
	resultThrottled   = "throttled"
	resultUnavailable = "unavailable"
	resultFailed      = "failed"
)

// Reasons for a 200 that wrote nothing, beside those of package token.
const (
	reasonExpired = "expired"
	reasonUnknown = "unknown" // no JWT, and the client may not revoke anything else
)

type revokeMetrics struct {
	results *prometheus.CounterVec
	nothing *prometheus.CounterVec
}

func newRevokeMetrics(reg prometheus.Registerer, reasons []string) *revokeMetrics {
	m := &revokeMetrics{
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_revoke_total",
			Help: "Revocation requests by what became of them. A foreign_token means that a client has another's token.",
		}, []string{"result"}),
		nothing: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_revoke_nothing_total",
			Help: "Revocation requests answered 200 for which nothing was written, by reason.",
		}, []string{"reason"}),
	}
	for _, result := range []string{
		resultRevoked, resultRepeated, resultNothing, resultForeign, resultUnsupported, resultRefused,
		resultThrottled, resultUnavailable, resultFailed,
	} {
		m.results.WithLabelValues(result)
	}
	for _, reason := range slices.Concat(reasons, []string{reasonExpired, reasonUnknown}) {
		m.nothing.WithLabelValues(reason)
	}
	reg.MustRegister(m.results, m.nothing)
	return m
}
