package revokeapi

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/revoke"
)

const (
	// paramWait is how long to wait for gateways.
	paramWait = "wait"
	maxWait   = 60 * time.Second
	// maxKeyWait is that of a request with an Idempotency-Key, which with its work must be shorter than
	// the minute after which [rest.Idempotent] takes it for abandoned.
	maxKeyWait = 30 * time.Second
	// maxWaiting is how many small requests wait at a time, of one tenant half as many.
	maxWaiting = 64
	// maxShown is how many gateways are named, those first that have not applied it.
	maxShown = 1000
)

// waitOf is r's parameter of this name, 0 without.
func waitOf(r *http.Request) (time.Duration, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return 0, rest.InvalidParameter("The query string is not well-formed.")
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		switch {
		case name != paramWait:
			return 0, rest.InvalidParameter("A parameter is not known here. There is wait; dry_run is a member of the body.")
		case len(query[name]) > 1:
			return 0, badParameter(paramWait, "is there more than once")
		}
	}
	if !query.Has(paramWait) {
		return 0, nil
	}
	d, err := time.ParseDuration(query.Get(paramWait))
	switch {
	case err != nil || d <= 0 || d > maxWait:
		return 0, badParameter(paramWait, "must be a time above 0s, up to 60s, for example 5s")
	case d > maxKeyWait && r.Header.Get("Idempotency-Key") != "":
		return 0, badParameter(paramWait, "must be at most 30s with an Idempotency-Key")
	}
	return d, nil
}

// convergence says which gateways have applied what was revoked.
type convergence struct {
	// Reached: every live gateway that serves the tenants has.
	Reached  bool       `json:"reached"`
	TookMS   float64    `json:"took_ms"`
	Live     int        `json:"live"`
	Lost     int        `json:"lost"`
	Gateways []standing `json:"gateways"`
	// Detail is why it was not waited for.
	Detail string `json:"detail,omitempty"`
}

// standing is what a gateway has of a revocation.
type standing struct {
	ID       string         `json:"id"`
	Standing fleet.Standing `json:"standing"`
	// Applied is null where that cannot be told.
	Applied *bool            `json:"applied"`
	Epoch   revocation.Epoch `json:"epoch"`
	Seq     revocation.Seq   `json:"seq"`
	// AfterMS is how long after it was waited for it was known to be applied, 0 if it was before.
	AfterMS    *float64 `json:"after_ms,omitempty"`
	ReportedAt string   `json:"reported_at"`
	// Stored: the report is only what the database remembers, and may be a minute older than the truth.
	Stored bool `json:"stored,omitempty"`
}

func showStanding(g *fleet.Gateway, applied *bool) standing {
	return standing{
		ID: g.ID, Standing: g.Standing, Applied: applied, Epoch: g.Report.Epoch, Seq: g.Report.Seq, ReportedAt: showTime(g.ReportedAt), Stored: g.Stored,
	}
}

// inform sorts those first that have not applied it, or may not have, and returns as many as are named.
func inform(all []standing) []standing {
	rank := func(s *standing) int {
		switch {
		case s.Applied != nil && *s.Applied:
			return 2
		case s.Standing == fleet.Lost:
			return 1
		}
		return 0
	}
	slices.SortStableFunc(all, func(a, b standing) int { return rank(&a) - rank(&b) })
	return slices.Clip(all[:min(len(all), maxShown)])
}

// converge waits until the gateways have applied outcomes, which are durable. It is nil if there is
// nothing to apply.
func (a *API) converge(w http.ResponseWriter, r *http.Request, outcomes []revoke.Outcome, within time.Duration) *convergence {
	at, domains := revocation.Position{Epoch: a.deps.Ledger.Seen().Epoch}, make(map[string]bool)
	for i := range outcomes {
		if o := &outcomes[i]; !o.Expired {
			at.Seq = max(at.Seq, o.Seq)
			domains[o.Tenant.Domain] = true
		}
	}
	if len(domains) == 0 {
		return nil
	}
	serves := func(g *fleet.Gateway) bool {
		for domain := range domains {
			if g.Serves(domain) {
				return true
			}
		}
		return false
	}
	if !wait(r) {
		return a.unwaited(at, serves, "Too many requests wait already. It is done; POST /v1/barrier waits for it, as soon as there is room.")
	}
	ctx, cancel := context.WithTimeout(r.Context(), within)
	defer cancel()
	defer context.AfterFunc(a.closing, cancel)()
	result, err := a.deps.Fleet.Wait(ctx, fleet.Barrier{Position: at, Select: serves})
	if err != nil {
		if rec, ok := w.(authn.Recorder); ok {
			rec.RecordError(fmt.Errorf("wait for the fleet at %s: %w", at, err))
		}
		return a.unwaited(at, serves, "The gateways could not be asked. It is done; GET /v1/revocations/{id} and POST /v1/barrier tell later who has applied it.")
	}
	shown := &convergence{Reached: result.Reached, TookMS: milliseconds(result.Took), Gateways: []standing{}}
	for i := range result.Gateways {
		c := &result.Gateways[i]
		s := showStanding(&c.Gateway, &c.Applied)
		if c.Applied {
			after := milliseconds(c.After)
			s.AfterMS = &after
		}
		shown.add(s)
	}
	shown.Gateways = inform(shown.Gateways)
	return shown
}

// unwaited is what this process knows already, and why it is no more.
func (a *API) unwaited(at revocation.Position, serves func(*fleet.Gateway) bool, why string) *convergence {
	shown := &convergence{Detail: why, Gateways: []standing{}}
	all := a.deps.Fleet.Gateways()
	for i := range all {
		if g := &all[i]; serves(g) {
			applied := g.Standing == fleet.Live && g.Applied(at)
			shown.add(showStanding(g, &applied))
		}
	}
	shown.Gateways = inform(shown.Gateways)
	return shown
}

func (c *convergence) add(s standing) {
	if s.Standing == fleet.Lost {
		c.Lost++
	} else {
		c.Live++
	}
	c.Gateways = append(c.Gateways, s)
}

// answerConverged is [answer], with a convergence beside.
func answerConverged(w http.ResponseWriter, many bool, outcomes []revoke.Outcome, c *convergence) error {
	if !many {
		return rest.JSON(w, http.StatusAccepted, struct {
			outcome
			Convergence *convergence `json:"convergence,omitempty"`
		}{showOutcome(outcomes[0]), c})
	}
	items := make([]outcome, len(outcomes))
	for i, o := range outcomes {
		items[i] = showOutcome(o)
	}
	return rest.JSON(w, http.StatusAccepted, struct {
		Items       []outcome    `json:"items"`
		Convergence *convergence `json:"convergence,omitempty"`
	}{items, c})
}

// sunk is how far a sink has come with a revocation.
type sunk struct {
	Name string `json:"name"`
	// Seq is the sink's, as it was last saved.
	Seq     revocation.Seq `json:"seq"`
	Applied *bool          `json:"applied"` // as in standing
}

// answerOne is one revocation, and who has applied it.
func (a *API) answerOne(w http.ResponseWriter, r *http.Request, l ledger.Listed) error {
	ctx := r.Context()
	// What retention has removed was before the oldest event that there still is. Who has come there has
	// applied it. Of others that cannot be told: it may have been long before.
	at, exact := l.Seq, l.Seq > 0
	if !exact {
		oldest, err := a.deps.Ledger.Oldest(ctx)
		if err != nil {
			return err
		}
		at = oldest - 1
	}
	verdict := func(has bool) *bool {
		if !has && !exact {
			return nil
		}
		return &has
	}
	cursors, err := a.deps.Ledger.Cursors(ctx)
	if err != nil {
		return err
	}
	sinks := make([]sunk, 0, len(cursors))
	for _, name := range slices.Sorted(maps.Keys(cursors)) {
		sinks = append(sinks, sunk{name, cursors[name], verdict(cursors[name] >= at)})
	}
	if err := a.deps.Fleet.Refresh(ctx); err != nil {
		return fmt.Errorf("refresh fleet: %w", err)
	}
	position := revocation.Position{Epoch: a.deps.Ledger.Seen().Epoch, Seq: at}
	gateways, all := []standing{}, a.deps.Fleet.Gateways()
	for i := range all {
		if g := &all[i]; g.Serves(l.Tenant.Domain) {
			applied := verdict(g.Applied(position))
			switch {
			case g.Standing == fleet.Lost: // it confirms nothing, whatever it once said
				applied = new(bool)
			case g.Stored: // nor does this, but it may confirm at any moment
				applied = nil
			}
			gateways = append(gateways, showStanding(g, applied))
		}
	}
	return rest.JSON(w, http.StatusOK, struct {
		listed
		Sinks    []sunk     `json:"sinks"`
		Gateways []standing `json:"gateways"`
	}{showListed(l), sinks, inform(gateways)})
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
