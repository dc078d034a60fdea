package fleetapi

import (
	"cmp"
	"slices"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
)

// view is a gateway as a caller sees it. What is nil in it is another tenant's.
type view struct {
	ID       string         `json:"id"`
	Standing fleet.Standing `json:"standing"`
	// ReportedAt is by the service's clock. The rest is as of then, but for Behind.
	ReportedAt string `json:"reported_at"`
	ReportAge  int64  `json:"age_of_report_ms"`
	// Stored: the report is only what the database remembers, and may be a minute older than the truth.
	Stored bool             `json:"stored,omitempty"`
	Epoch  revocation.Epoch `json:"epoch"`
	Seq    revocation.Seq   `json:"seq"`
	// Behind is how many events the log has after the gateway's position, null if it is of another epoch.
	Behind *int64 `json:"behind"`
	// AgeMS is null if the gateway has never known that it was up to date.
	AgeMS  *int64     `json:"age_ms"`
	Ready  bool       `json:"ready"`
	Digest comparison `json:"digest"`
	*operators
}

// operators is what concerns only those who run the gateway.
type operators struct {
	Account         string               `json:"account"`
	Tenant          string               `json:"tenant"`
	Labels          map[string]string    `json:"labels,omitempty"`
	Version         string               `json:"version,omitempty"`
	FirstSeen       string               `json:"first_seen"`
	Started         string               `json:"started"`
	Tenants         []string             `json:"tenants,omitempty"`
	RevocationsOnly bool                 `json:"revocations_only"`
	Revocations     int                  `json:"revocations"`
	Entities        int                  `json:"entities"`
	Snapshots       uint64               `json:"snapshots"`
	Deltas          uint64               `json:"deltas"`
	Feeds           []replica.FeedStatus `json:"feeds"`
	Error           string               `json:"error,omitempty"`
	// Conflict is when another process last reported with the same id.
	Conflict string  `json:"conflict,omitempty"`
	Canary   *canary `json:"canary,omitempty"`
}

// comparison is a [fleet.Comparison].
type comparison struct {
	Verdict fleet.Verdict    `json:"verdict"`
	At      string           `json:"at,omitempty"`
	Epoch   revocation.Epoch `json:"epoch,omitempty"`
	Seq     revocation.Seq   `json:"seq,omitempty"`
	// Detail and Reported are for those who run the gateway, Reported for who asks for it alone.
	Detail   string          `json:"detail,omitempty"`
	Reported *replica.Digest `json:"reported,omitempty"`
}

// canary is where a gateway's is called, and a [fleet.CanaryResult].
type canary struct {
	URL       string  `json:"url"`
	Outcome   string  `json:"outcome,omitempty"`
	At        string  `json:"at,omitempty"`
	RefusedMS float64 `json:"refused_ms,omitempty"`
	Detail    string  `json:"detail,omitempty"`
}

// show is g as it is told to v. Head is the log's.
func (v viewer) show(g *fleet.Gateway, head revocation.Position, now time.Time) view {
	r, c := &g.Report, &g.Comparison
	shown := view{
		ID: g.ID, Standing: g.Standing, ReportedAt: showTime(g.ReportedAt), ReportAge: max(0, now.Sub(g.ReportedAt).Milliseconds()),
		Epoch: r.Epoch, Seq: r.Seq, Behind: behind(r.Position, head), Ready: r.Ready, Stored: g.Stored,
		Digest: comparison{Verdict: cmp.Or(c.Verdict, fleet.Unknown), At: showTime(c.Time), Epoch: c.At.Epoch, Seq: c.At.Seq},
	}
	if r.AgeMS >= 0 {
		shown.AgeMS = &r.AgeMS
	}
	if !v.owns(g) {
		return shown
	}
	shown.Digest.Detail = c.Detail
	shown.operators = &operators{
		Account: g.Account, Tenant: g.Tenant, Labels: r.Labels, Version: r.Version,
		FirstSeen: showTime(g.FirstSeen), Started: showTime(time.UnixMilli(r.Started)),
		Tenants: r.Tenants, RevocationsOnly: r.RevocationsOnly, Revocations: r.Revocations, Entities: r.Entities,
		Snapshots: r.Snapshots, Deltas: r.Deltas, Feeds: append([]replica.FeedStatus{}, r.Feeds...), Error: r.Error, Conflict: showTime(g.Conflict),
	}
	if g.CanaryURL != "" || g.Canary != nil {
		shown.Canary = &canary{URL: g.CanaryURL}
		if last := g.Canary; last != nil {
			*shown.Canary = canary{g.CanaryURL, last.Outcome, showTime(last.At), last.RefusedMS, last.Detail}
		}
	}
	return shown
}

// behind is how many events there are after at, nil where that cannot be said. What is ahead of a head
// that was read a moment ago is behind nothing.
func behind(at, head revocation.Position) *int64 {
	if at.Epoch != head.Epoch {
		return nil
	}
	n := int64(max(0, head.Seq-at.Seq))
	return &n
}

// standing is what a gateway has of a barrier's position.
type standing struct {
	ID       string           `json:"id"`
	Standing fleet.Standing   `json:"standing"`
	Applied  bool             `json:"applied"`
	Epoch    revocation.Epoch `json:"epoch"`
	Seq      revocation.Seq   `json:"seq"`
	Behind   *int64           `json:"behind"` // as in view
	Ready    bool             `json:"ready"`
	// AfterMS is how long after the barrier began it was known to be applied, 0 if it was before.
	AfterMS    *float64 `json:"after_ms,omitempty"`
	ReportedAt string   `json:"reported_at"`
	Stored     bool     `json:"stored,omitempty"` // as in view
}

func showStanding(c *fleet.Confirmation, head revocation.Position) standing {
	shown := standing{
		ID: c.ID, Standing: c.Standing, Applied: c.Applied, Epoch: c.Report.Epoch, Seq: c.Report.Seq, Behind: behind(c.Report.Position, head),
		Ready: c.Report.Ready, ReportedAt: showTime(c.ReportedAt), Stored: c.Stored,
	}
	if c.Applied {
		after := milliseconds(c.After)
		shown.AfterMS = &after
	}
	return shown
}

// maxShown is how many gateways a barrier's answer names, those first that matter most.
const maxShown = 1000

// byUrgency sorts those first that are waited for, then those that are lost; the rest of the order stays.
func byUrgency(all []fleet.Confirmation) {
	rank := func(c *fleet.Confirmation) int {
		switch {
		case c.Applied:
			return 2
		case c.Standing == fleet.Lost:
			return 1
		}
		return 0
	}
	slices.SortStableFunc(all, func(a, b fleet.Confirmation) int { return rank(&a) - rank(&b) })
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// showTime is RFC 3339 with milliseconds, empty for no time.
func showTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z")
}
