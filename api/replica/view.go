package replica

import (
	"slices"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// View is the state at one position, for the length of a function. The lists it
// returns are the caller's, sorted by ID; the entities in them are shared and must not
// be changed. A lookup that finds nothing returns nil.
type View struct {
	at      revocation.Position
	loads   uint64
	content *content
}

// At is the position of the state.
func (v *View) At() revocation.Position { return v.at }

// Loads is how many snapshots the state has loaded. Between two of them the lists of
// one position are the same, in the same order.
func (v *View) Loads() uint64 { return v.loads }

// Revocations are those that were there at this position, also after View's end. It
// panics without [StateConfig.Records]: there is no list that could be taken for an empty one.
func (v *View) Revocations() Revocations {
	if v.content.archive == nil {
		panic("replica: Revocations of a state without StateConfig.Records")
	}
	return v.content.archive.list()
}

// Wide is how many revocations of kinds other than token there are. It counts them.
func (v *View) Wide() int {
	n := 0
	v.content.marks.each(func(_ string, s *set) {
		switch s.class {
		case uuids, jtis, digests:
		default:
			s.each(func(entry) { n++ })
		}
	})
	return n
}

// Tenants returns all.
func (v *View) Tenants() []*catalog.Tenant { return slices.Clone(v.content.shelves.tenants.sorted) }

// KeyManagers returns all.
func (v *View) KeyManagers() []*catalog.KeyManager {
	return slices.Clone(v.content.shelves.keyManagers.sorted)
}

// Policies returns all, of every kind.
func (v *View) Policies() []*catalog.Policy { return slices.Clone(v.content.shelves.policies.sorted) }

// Scopes returns all.
func (v *View) Scopes() []*catalog.Scope { return slices.Clone(v.content.shelves.scopes.sorted) }

// APIs returns all.
func (v *View) APIs() []*catalog.API { return slices.Clone(v.content.shelves.apis.sorted) }

// Applications returns all.
func (v *View) Applications() []*catalog.Application {
	return slices.Clone(v.content.shelves.applications.sorted)
}

// KeyMappings returns all.
func (v *View) KeyMappings() []*catalog.KeyMapping {
	return slices.Clone(v.content.shelves.keyMappings.sorted)
}

// Subscriptions returns all.
func (v *View) Subscriptions() []*catalog.Subscription {
	return slices.Clone(v.content.shelves.subscriptions.sorted)
}

// Tenant finds a tenant by its domain.
func (v *View) Tenant(domain string) *catalog.Tenant { return v.content.shelves.tenantByDomain[domain] }

// API finds an API by its UUID.
func (v *View) API(uuid string) *catalog.API { return v.content.shelves.apis.byUUID[uuid] }

// APIByID finds an API by its id.
func (v *View) APIByID(id int32) *catalog.API { return v.content.shelves.apis.byID(id) }

// APIsByContext finds those of all tenants.
func (v *View) APIsByContext(context, version string) []*catalog.API {
	return listOf(v.content.shelves.apisByContext[apiPath{context, version}])
}

// Application finds an application by its UUID.
func (v *View) Application(uuid string) *catalog.Application {
	return v.content.shelves.applications.byUUID[uuid]
}

// ApplicationByID finds an application by its id.
func (v *View) ApplicationByID(id int32) *catalog.Application {
	return v.content.shelves.applications.byID(id)
}

// KeyMappingsOf finds the mappings of a consumer key: one for each issuer that has it.
func (v *View) KeyMappingsOf(consumerKey string) []*catalog.KeyMapping {
	return listOf(v.content.shelves.mappingsByKey[consumerKey])
}

// keyMapping finds the mapping of a consumer key of an issuer.
func (v *View) keyMapping(consumerKey, iss string) *catalog.KeyMapping {
	for _, k := range v.content.shelves.mappingsByKey[consumerKey] {
		if k.Iss == iss {
			return k
		}
	}
	return nil
}

// Subscription finds the one of an application to an API, by their UUIDs.
func (v *View) Subscription(applicationUUID, apiUUID string) *catalog.Subscription {
	return v.content.shelves.subscriptionOf[pair{applicationUUID, apiUUID}]
}

// SubscriptionsOf returns those of an application, by its UUID.
func (v *View) SubscriptionsOf(applicationUUID string) []*catalog.Subscription {
	return listOf(v.content.shelves.subscriptionsOf[applicationUUID])
}

// Policy finds a policy of a tenant by kind and name.
func (v *View) Policy(tenantID int32, kind, name string) *catalog.Policy {
	return v.content.shelves.policyByName[policyName{tenantID, kind, name}]
}

// apiPolicy finds the policy of an API as a whole, if it has one.
func (v *View) apiPolicy(a *catalog.API) *catalog.Policy {
	if a.Policy == "" {
		return nil
	}
	return v.Policy(a.Tenant.ID, catalog.PolicyAPI, a.Policy)
}

// Scope finds a scope of a tenant by its name.
func (v *View) Scope(tenantID int32, name string) *catalog.Scope {
	return v.content.shelves.scopeByName[scopeName{tenantID, name}]
}

// KeyManager finds a key manager by its issuer.
func (v *View) KeyManager(iss string) *catalog.KeyManager {
	return v.content.shelves.keyManagerByIss[iss]
}
