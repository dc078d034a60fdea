package replica

import (
	"cmp"
	"slices"

	"github.com/rescindhq/rescind/api/catalog"
)

// entity is what a shelf holds: pointers.
type entity interface {
	comparable
	catalog.Entity
}

// shelf is all entities of a noun. Its lists are kept in order, so that a reader only
// copies them.
type shelf[E entity] struct {
	byUUID map[string]E
	sorted []E
}

func order[E entity](a, b E) int {
	x, y := a.Base(), b.Base()
	return cmp.Or(cmp.Compare(x.ID, y.ID), cmp.Compare(x.UUID, y.UUID))
}

// change puts e in the place of the one that has its UUID, or takes that away, and returns it, nil if
// there was none. index is told of both.
func (s *shelf[E]) change(e E, deleted, loading bool, index func(e E, add bool)) (was catalog.Entity) {
	uuid := e.Base().UUID
	old, known := s.byUUID[uuid]
	if known {
		was = old
		index(old, false)
		delete(s.byUUID, uuid)
	}
	if !deleted {
		index(e, true)
		s.byUUID[uuid] = e
	}
	if loading {
		return was // sorted once, at the end
	}
	if known {
		i, _ := slices.BinarySearchFunc(s.sorted, old, order)
		if !deleted && order(old, e) == 0 {
			s.sorted[i] = e
			return was
		}
		s.sorted = slices.Delete(s.sorted, i, i+1)
	}
	if !deleted {
		i, _ := slices.BinarySearchFunc(s.sorted, e, order)
		s.sorted = slices.Insert(s.sorted, i, e)
	}
	return was
}

func (s *shelf[E]) sort() {
	s.sorted = make([]E, 0, len(s.byUUID))
	for _, e := range s.byUUID {
		s.sorted = append(s.sorted, e)
	}
	slices.SortFunc(s.sorted, order)
}

// byID returns the zero E if there is none.
func (s *shelf[E]) byID(id int32) (e E) {
	i, found := slices.BinarySearchFunc(s.sorted, id, func(e E, id int32) int { return cmp.Compare(e.Base().ID, id) })
	if found {
		e = s.sorted[i]
	}
	return e
}

// one is an index in which a key has one entity.
func one[K comparable, E entity](m map[K]E, k K, e E, add bool) {
	if add {
		m[k] = e
	} else if m[k] == e {
		delete(m, k)
	}
}

// many is an index in which a key has any number, in no order.
func many[K comparable, E entity](m map[K][]E, k K, e E, add bool) {
	all := m[k]
	if add {
		m[k] = append(all, e)
		return
	}
	last := len(all) - 1
	if last < 1 {
		delete(m, k)
		return
	}
	all[slices.Index(all, e)] = all[last]
	clear(all[last:])
	m[k] = all[:last]
}

func listOf[E entity](all []E) []E {
	all = slices.Clone(all)
	slices.SortFunc(all, order)
	return all
}

// shelves is the catalog.
type shelves struct {
	loading bool // until sort

	tenants       shelf[*catalog.Tenant]
	keyManagers   shelf[*catalog.KeyManager]
	policies      shelf[*catalog.Policy]
	scopes        shelf[*catalog.Scope]
	apis          shelf[*catalog.API]
	applications  shelf[*catalog.Application]
	keyMappings   shelf[*catalog.KeyMapping]
	subscriptions shelf[*catalog.Subscription]

	tenantByDomain  map[string]*catalog.Tenant
	keyManagerByIss map[string]*catalog.KeyManager
	policyByName    map[policyName]*catalog.Policy
	scopeByName     map[scopeName]*catalog.Scope
	apisByContext   map[apiPath][]*catalog.API
	mappingsByKey   map[string][]*catalog.KeyMapping
	subscriptionOf  map[pair]*catalog.Subscription
	subscriptionsOf map[string][]*catalog.Subscription // by the application's UUID
	places          map[string][]*place                // by the plain context
	longestContext  int                                // in bytes, of those there were
}

type (
	policyName struct {
		tenantID   int32
		kind, name string
	}
	scopeName struct {
		tenantID int32
		name     string
	}
	apiPath struct{ context, version string }
	pair    struct{ applicationUUID, apiUUID string }
)

func newShelf[E entity]() shelf[E] { return shelf[E]{byUUID: make(map[string]E)} }

// newShelves returns empty ones, which must be sorted before they are read.
func newShelves() *shelves {
	return &shelves{
		loading:       true,
		tenants:       newShelf[*catalog.Tenant](),
		keyManagers:   newShelf[*catalog.KeyManager](),
		policies:      newShelf[*catalog.Policy](),
		scopes:        newShelf[*catalog.Scope](),
		apis:          newShelf[*catalog.API](),
		applications:  newShelf[*catalog.Application](),
		keyMappings:   newShelf[*catalog.KeyMapping](),
		subscriptions: newShelf[*catalog.Subscription](),

		tenantByDomain:  make(map[string]*catalog.Tenant),
		keyManagerByIss: make(map[string]*catalog.KeyManager),
		policyByName:    make(map[policyName]*catalog.Policy),
		scopeByName:     make(map[scopeName]*catalog.Scope),
		apisByContext:   make(map[apiPath][]*catalog.API),
		mappingsByKey:   make(map[string][]*catalog.KeyMapping),
		subscriptionOf:  make(map[pair]*catalog.Subscription),
		subscriptionsOf: make(map[string][]*catalog.Subscription),
		places:          make(map[string][]*place),
	}
}

func (s *shelves) sort() {
	s.loading = false
	s.tenants.sort()
	s.keyManagers.sort()
	s.policies.sort()
	s.scopes.sort()
	s.apis.sort()
	s.applications.sort()
	s.keyMappings.sort()
	s.subscriptions.sort()
}

// change puts e in the place of the one of its noun that has its UUID, or takes that away, and returns
// it, nil if there was none.
func (s *shelves) change(e catalog.Entity, deleted bool) (was catalog.Entity) {
	switch e := e.(type) {
	case *catalog.Tenant:
		return s.tenants.change(e, deleted, s.loading, func(e *catalog.Tenant, add bool) {
			one(s.tenantByDomain, e.Meta.Tenant.Domain, e, add)
		})
	case *catalog.KeyManager:
		return s.keyManagers.change(e, deleted, s.loading, func(e *catalog.KeyManager, add bool) {
			one(s.keyManagerByIss, e.Iss, e, add)
		})
	case *catalog.Policy:
		return s.policies.change(e, deleted, s.loading, func(e *catalog.Policy, add bool) {
			one(s.policyByName, policyName{e.Tenant.ID, e.Kind, e.Name}, e, add)
		})
	case *catalog.Scope:
		return s.scopes.change(e, deleted, s.loading, func(e *catalog.Scope, add bool) {
			one(s.scopeByName, scopeName{e.Tenant.ID, e.Name}, e, add)
		})
	case *catalog.API:
		return s.apis.change(e, deleted, s.loading, func(e *catalog.API, add bool) {
			many(s.apisByContext, apiPath{e.Context, e.Version}, e, add)
			s.place(e, add)
		})
	case *catalog.Application:
		return s.applications.change(e, deleted, s.loading, func(*catalog.Application, bool) {})
	case *catalog.KeyMapping:
		return s.keyMappings.change(e, deleted, s.loading, func(e *catalog.KeyMapping, add bool) {
			many(s.mappingsByKey, e.ConsumerKey, e, add)
		})
	case *catalog.Subscription:
		return s.subscriptions.change(e, deleted, s.loading, func(e *catalog.Subscription, add bool) {
			one(s.subscriptionOf, pair{e.Application.UUID, e.API.UUID}, e, add)
			many(s.subscriptionsOf, e.Application.UUID, e, add)
		})
	}
	return nil
}
