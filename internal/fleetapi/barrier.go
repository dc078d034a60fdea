package fleetapi

import (
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/rest"
)

const (
	defaultTimeout = 5 * time.Second
	maxTimeout     = 60 * time.Second
	// refreshTime is what it takes to ask other processes, at most.
	refreshTime = 5 * time.Second
	// maxNames is how many gateways a selector names.
	maxNames = 1000
)

// order is what a caller wants to wait for.
type order struct {
	Epoch revocation.Epoch `json:"epoch"`
	// Seq is nil for the head.
	Seq      *revocation.Seq `json:"seq"`
	Timeout  string          `json:"timeout"`
	Selector selector        `json:"selector"`
}

// selector says which gateways count: those for which all of it is true.
type selector struct {
	// Gateways are ids. None: all.
	Gateways []string          `json:"gateways"`
	Labels   map[string]string `json:"labels"`
	// Tenant is the domain of one that they serve.
	Tenant string `json:"tenant"`
}

// barrier answers POST /v1/barrier.
func (a *API) barrier(w http.ResponseWriter, r *http.Request) error {
	if r.URL.RawQuery != "" {
		return rest.InvalidParameter("There are no parameters here.")
	}
	var o order
	if err := rest.Decode(w, r, &o); err != nil {
		return err
	}
	timeout := defaultTimeout
	if o.Timeout != "" {
		d, err := time.ParseDuration(o.Timeout)
		if err != nil || d <= 0 || d > maxTimeout {
			return catalog.Invalid{{Pointer: "#/timeout", Detail: "must be a time above 0s, up to 60s, for example 5s"}}
		}
		timeout = d
	}
	leave, ok := a.waiting.take(rest.AccountOf(r.Context()).Username)
	if !ok {
		return &rest.Problem{
			Status: http.StatusServiceUnavailable, RetryAfter: busyRetry,
			Detail: "Too many barriers wait, of this account or of all. Sending the same request again is safe.",
		}
	}
	defer leave()
	extend(w, 2*freshTimeout+refreshTime+timeout+sendTime)

	at, head, err := a.place(r, &o)
	if err != nil {
		return err
	}
	selects, err := a.selects(r, &o.Selector)
	if err != nil {
		return err
	}
	ctx, cancel := a.open(r.Context(), timeout)
	defer cancel()
	result, err := a.deps.Fleet.Wait(ctx, fleet.Barrier{Position: at, Select: selects})
	if err != nil {
		return fmt.Errorf("wait for the fleet at %s: %w", at, err)
	}
	return rest.JSON(w, http.StatusOK, showResult(&result, at, head))
}

// place is the position to wait for, and the log's head.
func (a *API) place(r *http.Request, o *order) (at, head revocation.Position, err error) {
	if head, err = a.head(r.Context(), headAge); err != nil {
		return at, head, err
	}
	if o.Seq == nil || *o.Seq > head.Seq || o.Epoch != "" && o.Epoch != head.Epoch { // it may be that new
		if head, err = a.head(r.Context(), 0); err != nil {
			return at, head, err
		}
	}
	switch at = head; {
	case o.Epoch != "" && o.Epoch != head.Epoch:
		return at, head, &rest.Problem{
			Slug: "epoch-changed", Title: "The log is of another epoch.", Status: http.StatusConflict,
			Detail: "The log was restored, or this is the epoch of another one: no gateway that follows this log can come to that place. " +
				"Read what is to be waited for again.",
			Members: map[string]any{"epoch": head.Epoch, "seq": head.Seq},
		}
	case o.Seq == nil:
	case *o.Seq < 0:
		return at, head, catalog.Invalid{{Pointer: "#/seq", Detail: "must not be negative"}}
	case *o.Seq > head.Seq:
		return at, head, catalog.Invalid{{Pointer: "#/seq", Detail: fmt.Sprintf("is past the end of the log, which is at %d", head.Seq)}}
	default:
		at.Seq = *o.Seq
	}
	return at, head, nil
}

// selects is s as the fleet takes it, for the caller. A gateway that is named must be one that counts:
// whoever waits for it must not be told that all have applied because it was left out.
func (a *API) selects(r *http.Request, s *selector) (func(*fleet.Gateway) bool, error) {
	v := viewerOf(r)
	switch {
	case s.Tenant != "" && !catalog.ValidDomain(s.Tenant):
		return nil, catalog.Invalid{{Pointer: "#/selector/tenant", Detail: "must be a domain"}}
	case s.Tenant != "" && v != nil && !slices.Contains(v, s.Tenant):
		return nil, catalog.Invalid{{Pointer: "#/selector/tenant", Detail: "is not one that the account sees"}}
	case len(s.Gateways) > maxNames:
		return nil, catalog.Invalid{{Pointer: "#/selector/gateways", Detail: fmt.Sprintf("must be at most %d", maxNames)}}
	}
	counts := func(g *fleet.Gateway) bool {
		if !v.isServed(g) || s.Tenant != "" && !g.Serves(s.Tenant) || len(s.Labels) > 0 && !v.owns(g) {
			return false
		}
		for name, value := range s.Labels {
			if has, ok := g.Report.Labels[name]; !ok || has != value {
				return false
			}
		}
		return true
	}
	if len(s.Gateways) == 0 {
		return counts, nil
	}
	if err := a.deps.Fleet.Refresh(r.Context()); err != nil {
		return nil, fmt.Errorf("refresh fleet: %w", err)
	}
	named := make(map[string]bool, len(s.Gateways))
	var wrong catalog.Invalid
	for i, id := range s.Gateways {
		named[id] = true
		if g, ok := a.deps.Fleet.Gateway(id); (!ok || !counts(&g)) && len(wrong) < 10 {
			wrong = append(wrong, catalog.FieldError{
				Pointer: fmt.Sprintf("#/selector/gateways/%d", i), Detail: "is no gateway, or not one that serves the tenant and has the labels",
			})
		}
	}
	if len(wrong) > 0 {
		return nil, wrong
	}
	return func(g *fleet.Gateway) bool { return named[g.ID] && counts(g) }, nil
}

// result is a [fleet.BarrierResult].
type result struct {
	Reached  bool             `json:"reached"`
	Epoch    revocation.Epoch `json:"epoch"`
	Seq      revocation.Seq   `json:"seq"`
	Head     revocation.Seq   `json:"head"`
	TookMS   float64          `json:"took_ms"`
	Live     int              `json:"live"`
	Lost     int              `json:"lost"`
	Applied  int              `json:"applied"`
	Gateways []standing       `json:"gateways"`
}

func showResult(b *fleet.BarrierResult, at, head revocation.Position) result {
	byUrgency(b.Gateways)
	shown := result{
		Reached: b.Reached, Epoch: at.Epoch, Seq: at.Seq, Head: head.Seq, TookMS: milliseconds(b.Took),
		Gateways: make([]standing, 0, min(len(b.Gateways), maxShown)),
	}
	for i := range b.Gateways {
		c := &b.Gateways[i]
		if c.Standing == fleet.Lost {
			shown.Lost++
		} else {
			shown.Live++
		}
		if c.Applied {
			shown.Applied++
		}
		if i < maxShown {
			shown.Gateways = append(shown.Gateways, showStanding(c, head))
		}
	}
	return shown
}
