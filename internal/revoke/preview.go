package revoke

import (
	"context"
	"fmt"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Preview says what Revoke would do, and changes nothing. Errors are those of Revoke; more
// than [MaxCounted] targets whose tokens would be counted are a [catalog.Invalid] too.
func (r *Revoker) Preview(ctx context.Context, by Caller, orders []Order) ([]Effect, error) {
	if err := r.turns.enter(ctx); err != nil {
		return nil, err
	}
	defer r.turns.leave()
	p, plans, err := r.plan(ctx, by, orders)
	if err != nil {
		return nil, err
	}
	stored, err := p.stored(ctx, plans, func(plan) bool { return true })
	if err != nil {
		return nil, err
	}
	living, err := p.living(ctx, plans)
	if err != nil {
		return nil, err
	}
	effects := make([]Effect, len(plans))
	for i, plan := range plans {
		before, revoked := stored[plan.target]
		effects[i] = Effect{
			Target: plan.target, Tenant: plan.tenant, Exp: plan.exp, Expired: plan.expired,
			Living: living[plan.target], Revoked: revoked && !plan.expired,
		}
		if plan.target.Kind.HasTime() {
			effects[i].NotAfter = max(p.now.Unix()+p.skew, before.NotAfter)
		}
	}
	r.state.Replica().View(func(v *replica.View) { hit(v, plans, effects) })
	return effects, nil
}

// living counts the tokens of targets that have a time, if we issue them. One after the other:
// each may read a million rows, and commits need the database.
func (p *planner) living(ctx context.Context, plans []plan) (map[revocation.Target]ledger.Living, error) {
	counts := make(map[revocation.Target]ledger.Living)
	var asked []plan
	for _, plan := range plans {
		if _, twice := counts[plan.target]; plan.target.Kind.HasTime() && !plan.external && !twice {
			counts[plan.target] = ledger.Living{}
			asked = append(asked, plan)
		}
	}
	if len(asked) > MaxCounted {
		return nil, catalog.Invalid{{Pointer: "#", Detail: fmt.Sprintf(
			"names %d clients, subjects and tenants whose tokens would be counted: look at up to %d at a time", len(asked), MaxCounted)}}
	}
	for _, plan := range asked {
		living, err := p.ledger.Living(ctx, plan.target, plan.tenant)
		if err != nil {
			return nil, fmt.Errorf("preview a revocation: %w", err)
		}
		counts[plan.target] = living
	}
	return counts, nil
}

// place is where the clients are that an order for many hits: those of an issuer, or with an
// empty one those of a tenant.
type place struct {
	iss    string
	tenant int32
}

func placeOf(plan plan) (p place, ok bool) {
	switch plan.target.Kind {
	case revocation.KindKey:
		return place{iss: plan.target.Iss}, true
	case revocation.KindTenant:
		return place{tenant: plan.tenant.ID}, true
	}
	return place{}, false
}

// group are those whom an order hits. Its methods take nil for nobody.
type group struct {
	applications []*catalog.Application // up to MaxEffects
	clients      []string               // up to MaxEffects
	clientCount  int
	seen         map[int32]bool // applications, by id
}

func newGroup() *group { return &group{seen: make(map[int32]bool)} }

// addMapping adds a client and its application.
func (g *group) addMapping(v *replica.View, m *catalog.KeyMapping) {
	if g == nil || m == nil {
		return
	}
	g.addClient(m.ConsumerKey)
	app := v.ApplicationByID(m.Application.ID)
	if app == nil || g.seen[app.ID] {
		return
	}
	g.seen[app.ID] = true
	if len(g.applications) < MaxEffects {
		g.applications = append(g.applications, app)
	}
}

func (g *group) addClient(id string) {
	g.clientCount++
	if len(g.clients) < MaxEffects {
		g.clients = append(g.clients, id)
	}
}

// hit tells effects whom they hit.
func hit(v *replica.View, plans []plan, effects []Effect) {
	groups := make(map[place]*group)
	for _, plan := range plans {
		if p, ok := placeOf(plan); ok {
			groups[p] = newGroup()
		}
	}
	if len(groups) > 0 {
		// One pass for all of them: there may be as many as orders.
		for _, m := range v.KeyMappings() {
			groups[place{iss: m.Iss}].addMapping(v, m)
			if k := v.KeyManager(m.Iss); k != nil {
				groups[place{tenant: k.Tenant.ID}].addMapping(v, m)
			}
		}
	}
	applications, clients := MaxNamed, MaxNamed // that may still be named
	for i, plan := range plans {
		g := newGroup()
		switch p, many := placeOf(plan); {
		case plan.expired:
		case many:
			g = groups[p]
		case plan.target.Kind == revocation.KindClient:
			g.addMapping(v, mappingIn(v, plan.target.Iss, plan.target.ID))
		case plan.clientID != "":
			if m := mappingIn(v, plan.target.Iss, plan.clientID); m != nil {
				g.addMapping(v, m)
			} else {
				g.addClient(plan.clientID) // an issuer of others has clients that have no mapping
			}
		}
		e := &effects[i]
		e.ApplicationCount, e.ClientCount = len(g.seen), g.clientCount
		e.Applications = g.applications[:min(len(g.applications), applications)]
		e.Clients = g.clients[:min(len(g.clients), clients)]
		applications -= len(e.Applications)
		clients -= len(e.Clients)
	}
}
