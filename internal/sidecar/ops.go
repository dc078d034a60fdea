package sidecar

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/internal/obs"
)

// readinessChecks are for /readyz. Traffic is to go elsewhere only while this gateway cannot decide: what is
// stale, or has lost a feed, is told, and the configuration says what is done then.
func readinessChecks(e engine, maxAge time.Duration) []obs.Check {
	return []obs.Check{
		{Name: "gateway", Vital: true, Run: func(context.Context) (obs.Status, string) {
			if !e.Ready() {
				return obs.Fail, "what is revoked, or the keys of every issuer, are not known yet: requests are refused"
			}
			return obs.Pass, ""
		}},
		{Name: "replica", Run: func(context.Context) (obs.Status, string) {
			s := e.Status()
			switch {
			case s.Age == replica.Never:
				return obs.Warn, "nothing is known yet"
			case s.Age > maxAge/2:
				return obs.Warn, fmt.Sprintf("at seq %d, and that is %s old; staleness.max is %s", s.Seq, s.Age.Round(time.Second), maxAge)
			case s.Error != "":
				return obs.Warn, fmt.Sprintf("at seq %d, and something is wrong with the source or the folder: /status and the log tell what", s.Seq)
			}
			return obs.Pass, fmt.Sprintf("at seq %d", s.Seq)
		}},
		{Name: "feeds", Run: func(context.Context) (obs.Status, string) {
			var away []string
			for _, f := range e.Status().Feeds {
				if !f.Connected {
					away = append(away, f.Name)
				}
			}
			if len(away) > 0 {
				return obs.Warn, "not connected: " + strings.Join(away, ", ")
			}
			return obs.Pass, ""
		}},
	}
}

// opsHandler serves the operators' listener: what [obs.Handler] does, /status, and /explain.
func opsHandler(reg *prometheus.Registry, readiness *obs.Readiness, e engine) http.Handler {
	rest, explain := obs.Handler(obs.Config{}, reg, readiness), explainHandler(e)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/explain" {
			explain.ServeHTTP(w, r)
			return
		}
		if r.URL.Path != "/status" || r.Method != http.MethodGet && r.Method != http.MethodHead {
			rest.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(e.Status()) // whoever asked has gone away
	})
}
