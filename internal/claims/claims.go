// Package claims hides what a self-contained token carries: what a WSO2 gateway would else
// look up, so that it can validate the token offline (WSO2 contract, section 10.3).
//
// # Decisions
//
// A token carries what a gateway would find at the time that it is made. What changes later
// is for later tokens; what takes something from the application revokes the token.
//
// No member is null and none is left out but consumerKey: gateways assert the types of some,
// and take a list that is not there for no check at all. Microgateway 3.0 takes an empty list
// for that too: who issues tokens gives out none without a subscription.
package claims

import (
	"cmp"
	"slices"
	"strings"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
)

// SelfContained are the claims, as they are named and typed in a token.
type SelfContained struct {
	Application Application `json:"application"`
	// TierInfo has the subscription tiers of SubscribedAPIs, by name.
	TierInfo map[string]Tier `json:"tierInfo"`
	// KeyType is PRODUCTION or SANDBOX.
	KeyType string `json:"keytype"`
	// SubscribedAPIs are in the order of their names, then versions.
	SubscribedAPIs []SubscribedAPI `json:"subscribedAPIs"`
	ConsumerKey    string          `json:"consumerKey,omitempty"`
}

// Application is the claim of that name.
type Application struct {
	ID    int32  `json:"id"`
	UUID  string `json:"uuid"`
	Name  string `json:"name"`
	Tier  string `json:"tier"` // an application policy
	Owner string `json:"owner"`
	// TierQuotaType is the policy's, for example requestCount.
	TierQuotaType string `json:"tierQuotaType"`
}

// Tier is a subscription policy in tierInfo.
type Tier struct {
	StopOnQuotaReach bool `json:"stopOnQuotaReach"`
	// SpikeArrestLimit is the most requests in a SpikeArrestUnit, sec or min; 0 and "" are no limit.
	SpikeArrestLimit int32  `json:"spikeArrestLimit"`
	SpikeArrestUnit  string `json:"spikeArrestUnit"`
	TierQuotaType    string `json:"tierQuotaType"`
	// A GraphQL limit of 0 is none.
	GraphQLMaxDepth      int32 `json:"graphQLMaxDepth"`
	GraphQLMaxComplexity int32 `json:"graphQLMaxComplexity"`
}

// SubscribedAPI is an API that the application may call with the key.
type SubscribedAPI struct {
	Name string `json:"name"`
	// Context includes the version, as gateways match it.
	Context                string `json:"context"`
	Version                string `json:"version"`
	Publisher              string `json:"publisher"`
	SubscriptionTier       string `json:"subscriptionTier"`
	SubscriberTenantDomain string `json:"subscriberTenantDomain"`
}

// Of returns the claims of an application for keys of a type, PRODUCTION or SANDBOX: of the
// subscriptions, those that let such keys through to an API that gateways serve. A blocked
// application has none. consumerKey may be empty.
//
// The log tells a change before the revocation that it entails. So a token whose iat is chosen
// later than the revocations that v has carries nothing that one of their changes took away.
func Of(v *replica.View, app *catalog.Application, keyType, consumerKey string) SelfContained {
	c := SelfContained{
		Application: Application{
			ID: app.ID, UUID: app.UUID, Name: app.Name, Tier: app.Policy, Owner: app.Owner,
			TierQuotaType: policy(v, app.Tenant.ID, catalog.PolicyApplication, app.Policy).QuotaType,
		},
		TierInfo: make(map[string]Tier), KeyType: keyType, SubscribedAPIs: make([]SubscribedAPI, 0), ConsumerKey: consumerKey,
	}
	if app.Blocked {
		return c // its subscriptions say so too, each a moment later
	}
	for _, s := range v.SubscriptionsOf(app.UUID) {
		api := v.API(s.API.UUID)
		if api == nil || !served(api) || !catalog.LetsThrough(s.Effective(), keyType) {
			continue
		}
		c.SubscribedAPIs = append(c.SubscribedAPIs, SubscribedAPI{
			Name: api.Name, Context: api.Context, Version: api.Version, Publisher: api.Provider,
			SubscriptionTier: s.Policy, SubscriberTenantDomain: app.Tenant.Domain,
		})
		p := policy(v, s.Tenant.ID, catalog.PolicySubscription, s.Policy)
		c.TierInfo[s.Policy] = Tier{
			StopOnQuotaReach: p.StopOnQuotaReach, SpikeArrestLimit: p.RateLimitCount, SpikeArrestUnit: p.RateLimitTimeUnit,
			TierQuotaType: p.QuotaType, GraphQLMaxDepth: p.GraphQLMaxDepth, GraphQLMaxComplexity: p.GraphQLMaxComplexity,
		}
	}
	slices.SortFunc(c.SubscribedAPIs, func(a, b SubscribedAPI) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Version, b.Version))
	})
	return c
}

// policy never returns nil: that what refers to a policy is there without it is for the
// length of an event at most.
func policy(v *replica.View, tenantID int32, kind, name string) *catalog.Policy {
	if p := v.Policy(tenantID, kind, name); p != nil {
		return p
	}
	return &catalog.Policy{QuotaType: "requestCount"}
}

// served reports whether gateways pass requests for an API on. One that looks the API up
// refuses those of a blocked one itself, and has none that is not deployed yet or any more; one
// that is offline only has the claims.
func served(a *catalog.API) bool {
	return a.Status != catalog.APICreated && a.Status != catalog.APIBlocked && a.Status != catalog.APIRetired
}
