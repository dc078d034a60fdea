package manifest

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
)

// State is the catalog of some tenants at one moment.
type State struct {
	tenants map[string]*tenantState // by domain
	// clients are those of all tenants, by id.
	clients map[string]authn.Registration
}

// tenantState is what a tenant has, by the same keys as in desiredTenant.
type tenantState struct {
	tenant        *catalog.Tenant
	resident      *catalog.KeyManager // nil if there is none yet
	keyManagers   map[string]*catalog.KeyManager
	policies      map[string]*catalog.Policy
	scopes        map[string]*catalog.Scope
	apis          map[string]*catalog.API
	applications  map[string]*applicationState
	applicationOf map[string]*applicationState   // by UUID
	keys          map[string]*catalog.KeyMapping // by keyOf
}

type applicationState struct {
	*catalog.Application
	keys          []*catalog.KeyMapping
	subscriptions map[string]*catalog.Subscription // by the API's UUID
}

func newTenantState(t *catalog.Tenant) *tenantState {
	return &tenantState{
		tenant: t, keyManagers: make(map[string]*catalog.KeyManager), policies: make(map[string]*catalog.Policy),
		scopes: make(map[string]*catalog.Scope), apis: make(map[string]*catalog.API),
		applications: make(map[string]*applicationState), applicationOf: make(map[string]*applicationState),
		keys: make(map[string]*catalog.KeyMapping),
	}
}

// keyOf is what consumer keys are told apart by.
func keyOf(iss, consumerKey string) string { return iss + "\x00" + consumerKey }

// ReadState reads the catalog of the tenants with these domains, or of all with nil.
// A domain that there is no tenant of is left out.
func ReadState(ctx context.Context, pool *pgxpool.Pool, domains []string) (*State, error) {
	s := &State{tenants: make(map[string]*tenantState), clients: make(map[string]authn.Registration)}
	opts := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	err := pgx.BeginTxFunc(ctx, pool, opts, func(tx pgx.Tx) error {
		canary := make(map[string]bool) // applications, by UUID: they are the service's, and no file describes them
		for e, err := range store.ReadAll(ctx, tx) {
			if err != nil {
				return err
			}
			isCanary := store.IsCanary(e)
			switch e := e.(type) {
			case *catalog.Application:
				if isCanary {
					canary[e.UUID] = true
				}
			case *catalog.KeyMapping:
				isCanary = canary[e.Application.UUID]
			case *catalog.Subscription:
				isCanary = canary[e.Application.UUID]
			}
			if isCanary {
				continue
			}
			domain := e.Base().Tenant.Domain
			if domains != nil && !slices.Contains(domains, domain) {
				continue
			}
			if err := s.add(domain, e); err != nil {
				return err
			}
		}
		for r, err := range authn.ReadRegistrations(ctx, tx) {
			if err != nil {
				return err
			}
			s.clients[r.ID] = r
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the catalog: %w", err)
	}
	return s, nil
}

// Tenants are the domains of the tenants that it has, sorted.
func (s *State) Tenants() []string { return slices.Sorted(maps.Keys(s.tenants)) }

// add takes entities after those that they refer to.
func (s *State) add(domain string, e catalog.Entity) error {
	if t, ok := e.(*catalog.Tenant); ok {
		s.tenants[domain] = newTenantState(t)
		return nil
	}
	t := s.tenants[domain]
	if t == nil {
		return fmt.Errorf("%s %s comes before its tenant", e.Noun(), e.Base().UUID)
	}
	switch e := e.(type) {
	case *catalog.KeyManager:
		t.keyManagers[e.Name] = e
		if e.Resident {
			t.resident = e
		}
	case *catalog.Policy:
		t.policies[e.Kind+"/"+e.Name] = e
	case *catalog.Scope:
		t.scopes[e.Name] = e
	case *catalog.API:
		key := e.Name + ":" + e.Version
		if other := t.apis[key]; other != nil {
			return fmt.Errorf("the APIs %s and %s are both %q in files: rename one", other.UUID, e.UUID, key)
		}
		t.apis[key] = e
	case *catalog.Application:
		a := &applicationState{Application: e, subscriptions: make(map[string]*catalog.Subscription)}
		t.applications[applicationKey(e.Owner, e.Name)] = a
		t.applicationOf[e.UUID] = a
	case *catalog.KeyMapping:
		t.keys[keyOf(e.Iss, e.ConsumerKey)] = e
		if a := t.applicationOf[e.Application.UUID]; a != nil {
			a.keys = append(a.keys, e)
		}
	case *catalog.Subscription:
		if a := t.applicationOf[e.Application.UUID]; a != nil {
			a.subscriptions[e.API.UUID] = e
		}
	}
	return nil
}

// same reports whether files that say a and b say the same.
func same(a, b catalog.Entity) bool { return reflect.DeepEqual(stated(a), stated(b)) }

// stated is a copy of e with what files can say about it, in one form only.
func stated(e catalog.Entity) catalog.Entity {
	switch e := e.(type) {
	case *catalog.Tenant:
		return &catalog.Tenant{DisplayName: e.DisplayName}
	case *catalog.KeyManager:
		c := *e
		c.Meta = catalog.Meta{}
		c.Algorithms, c.AllowTyp, c.ClaimMappings = orNil(c.Algorithms), orNil(c.AllowTyp), orNil(c.ClaimMappings)
		c.ConsumerKeyClaim, c.ScopesClaim = or(c.ConsumerKeyClaim, "azp"), or(c.ScopesClaim, "scope")
		c.Properties = nil
		if len(e.Properties) > 0 { // numbers may be of several types
			b, err := json.Marshal(e.Properties)
			if err != nil || json.Unmarshal(b, &c.Properties) != nil {
				c.Properties = e.Properties
			}
		}
		return &c
	case *catalog.Policy:
		c := *e
		c.Meta = catalog.Meta{}
		return &c
	case *catalog.Scope:
		c := *e
		c.Meta, c.Roles = catalog.Meta{}, orNil(c.Roles)
		return &c
	case *catalog.API:
		c := *e
		c.Meta, c.SecurityScheme, c.GatewayLabels = catalog.Meta{}, orNil(c.SecurityScheme), orNil(c.GatewayLabels)
		c.Operations = slices.Clone(orNil(c.Operations))
		for i := range c.Operations {
			o := &c.Operations[i]
			o.Policy, o.Scopes = or(o.Policy, unlimited), orNil(o.Scopes)
		}
		return &c
	case *catalog.Application:
		c := *e
		c.Meta, c.Groups, c.Blocked = catalog.Meta{}, orNil(c.Groups), false
		if len(c.Attributes) == 0 {
			c.Attributes = nil
		}
		return &c
	case *catalog.KeyMapping:
		return &catalog.KeyMapping{ConsumerKey: e.ConsumerKey, KeyType: e.KeyType}
	case *catalog.Subscription:
		return &catalog.Subscription{Policy: e.Policy, State: e.State}
	}
	return e
}

func orNil[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return s
}

func or(s, def string) string {
	if s == "" {
		return def
	}
	return s
}
