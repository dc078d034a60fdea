package fleetapi

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

// The parameters of the list, beside those of pages.
const (
	paramStanding = "standing"
	paramVerdict  = "verdict"
	paramLabel    = "label"
	paramAccount  = "account"
)

// headAge is how old a head may be by which it is told how far gateways are behind.
const headAge = time.Second

// list answers GET /v1/gateways.
func (a *API) list(w http.ResponseWriter, r *http.Request) error {
	query, used := r.URL.Query(), url.Values{}
	filters := []string{paramStanding, paramVerdict, paramLabel, paramAccount}
	for _, name := range filters {
		if value := query.Get(name); value != "" {
			used.Set(name, value)
		}
	}
	name := path + "?" + used.Encode()
	page, err := rest.PageQuery(r, name, filters...)
	if err != nil {
		return err
	}
	v := viewerOf(r)
	wanted, err := v.filter(used)
	if err != nil {
		return err
	}
	if err := a.deps.Fleet.Refresh(r.Context()); err != nil {
		return fmt.Errorf("refresh fleet: %w", err)
	}
	head, err := a.head(r.Context(), headAge)
	if err != nil {
		return err
	}
	now, items, next := time.Now(), []view{}, ""
	all := a.deps.Fleet.Gateways()
	for i := range all {
		g := &all[i]
		if g.ID <= page.After || !wanted(g) {
			continue
		}
		if len(items) == page.Limit {
			next = items[page.Limit-1].ID
			break
		}
		items = append(items, v.show(g, head, now))
	}
	return rest.WritePage(w, r, name, items, next)
}

// filter returns which gateways v sees and query is about. What is kept from v is not found by it.
func (v viewer) filter(query url.Values) (func(*fleet.Gateway) bool, error) {
	standing, verdict := fleet.Standing(query.Get(paramStanding)), fleet.Verdict(query.Get(paramVerdict))
	label, account := query.Get(paramLabel), query.Get(paramAccount)
	switch standing {
	case "", fleet.Live, fleet.Lost:
	default:
		return nil, rest.InvalidParameter("The parameter standing must be live or lost.")
	}
	switch verdict {
	case "", fleet.Unknown, fleet.Equal, fleet.Diverged:
	default:
		return nil, rest.InvalidParameter("The parameter verdict must be unknown, equal or diverged.")
	}
	labelled := func(g *fleet.Gateway) bool {
		for name, value := range g.Report.Labels {
			if name+":"+value == label {
				return true
			}
		}
		return false
	}
	return func(g *fleet.Gateway) bool {
		return v.sees(g) &&
			(standing == "" || g.Standing == standing) &&
			(verdict == "" || cmp.Or(g.Comparison.Verdict, fleet.Unknown) == verdict) &&
			(label == "" || v.owns(g) && labelled(g)) &&
			(account == "" || v.owns(g) && g.Account == account)
	}, nil
}

// find returns the gateway of r's path as it is known everywhere, if the caller sees it.
func (a *API) find(r *http.Request) (*fleet.Gateway, error) {
	if r.URL.RawQuery != "" {
		return nil, rest.InvalidParameter("There are no parameters here.")
	}
	if err := a.deps.Fleet.Refresh(r.Context()); err != nil {
		return nil, fmt.Errorf("refresh fleet: %w", err)
	}
	g, ok := a.deps.Fleet.Gateway(chi.URLParam(r, "id"))
	if !ok || !viewerOf(r).sees(&g) {
		return nil, notFound()
	}
	return &g, nil
}

// get answers GET /v1/gateways/{id}.
func (a *API) get(w http.ResponseWriter, r *http.Request) error {
	g, err := a.find(r)
	if err != nil {
		return err
	}
	return a.answer(w, r, g)
}

// answer is g in full.
func (a *API) answer(w http.ResponseWriter, r *http.Request, g *fleet.Gateway) error {
	head, err := a.head(r.Context(), headAge)
	if err != nil {
		return err
	}
	v := viewerOf(r)
	shown := v.show(g, head, time.Now())
	if v.owns(g) {
		shown.Digest.Reported = g.Report.Digest
	}
	return rest.JSON(w, http.StatusOK, shown)
}

// forget answers DELETE /v1/gateways/{id}.
func (a *API) forget(w http.ResponseWriter, r *http.Request) error {
	g, err := a.find(r)
	if err != nil {
		return err
	}
	if !viewerOf(r).owns(g) {
		return rest.Status(http.StatusForbidden, "The gateway belongs to an account of another tenant, or of none: only an admin can forget it.")
	}
	if err := a.audit(w, r, "forget_gateway", g.ID); err != nil {
		return err
	}
	if err := a.deps.Fleet.Forget(r.Context(), g.ID); err != nil {
		return changeError("forget gateway", err)
	}
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// setCanary answers PUT /v1/gateways/{id}/canary.
func (a *API) setCanary(w http.ResponseWriter, r *http.Request) error {
	var body struct {
		URL *string `json:"url"`
	}
	if err := rest.Decode(w, r, &body); err != nil {
		return err
	}
	if body.URL == nil {
		return catalog.Invalid{{Pointer: "#/url", Detail: "must be there; empty, the canary is not called"}}
	}
	if *body.URL != "" {
		if err := a.deps.CheckCanaryURL(*body.URL); err != nil {
			return catalog.Invalid{{Pointer: "#/url", Detail: err.Error()}}
		}
	}
	g, err := a.find(r)
	if err != nil {
		return err
	}
	if err := a.audit(w, r, "set_gateway_canary", g.ID); err != nil {
		return err
	}
	if err := a.deps.Fleet.SetCanary(r.Context(), g.ID, *body.URL); err != nil {
		return changeError("set canary", err)
	}
	if now, ok := a.deps.Fleet.Gateway(g.ID); ok {
		g = &now
	}
	return a.answer(w, r, g)
}

// audit records what is about to be done to a gateway: nothing is done that was not recorded.
func (a *API) audit(w http.ResponseWriter, r *http.Request, action, id string) error {
	return a.deps.Audit.Audit(r.Context(), ledger.AuditEntry{
		Tenant: rest.AccountOf(r.Context()).Tenant, Action: action, Subject: id, Actor: rest.ActorOf(w, r),
	})
}

// changeError is what a caller sees of err.
func changeError(doing string, err error) error {
	if errors.Is(err, fleet.ErrNotFound) {
		return notFound()
	}
	return fmt.Errorf("%s: %w", doing, err)
}
