// Package obs hides how the process shows itself to its operators: the form of
// its log, the registry of its metrics, and the listener that answers probes
// and scrapes.
//
// # Decisions
//
// Nothing here asks who calls, so the listener stands on loopback unless an
// operator moves it, and its answers hold nothing that a stranger must not read.
package obs

import (
	"io"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Config tunes what operators see. The zero value is ready for production.
type Config struct {
	// Level is the least severe level that is logged. Default info.
	Level slog.Level
	// Text makes log lines for people rather than JSON.
	Text bool
	// Pprof serves /debug/pprof/. Profiles show memory, so secrets too, to
	// whoever reaches the listener. Default off.
	Pprof bool
}

// NewLogger is the logger of the process, writing to w.
func NewLogger(cfg Config, w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.Level}
	if cfg.Text {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

// NewRegistry is a registry with the metrics of the Go runtime, the process and
// the build.
func NewRegistry() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector(),
	)
	return reg
}
