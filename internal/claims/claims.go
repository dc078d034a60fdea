// Package claims hides what a self-contained token carries: what a WSO2 gateway would else
// look up, so that it can validate the token offline (WSO2 contract, section 10.3).
package claims

import (
	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
)

// SelfContained are the claims, as they are named and typed in a token.
type SelfContained struct {
	Application    Application     `json:"application"`
	TierInfo       map[string]Tier `json:"tierInfo"`
	KeyType        string          `json:"keytype"`
	SubscribedAPIs []SubscribedAPI `json:"subscribedAPIs"`
	ConsumerKey    string          `json:"consumerKey,omitempty"`
}

// Application is the claim of that name.
type Application struct {
	ID            int32  `json:"id"`
	UUID          string `json:"uuid"`
	Name          string `json:"name"`
	Tier          string `json:"tier"`
	Owner         string `json:"owner"`
	TierQuotaType string `json:"tierQuotaType"`
}

// Tier is a subscription policy in tierInfo.
type Tier struct {
	StopOnQuotaReach     bool   `json:"stopOnQuotaReach"`
	SpikeArrestLimit     int32  `json:"spikeArrestLimit"`
	SpikeArrestUnit      string `json:"spikeArrestUnit"`
	TierQuotaType        string `json:"tierQuotaType"`
	GraphQLMaxDepth      int32  `json:"graphQLMaxDepth"`
	GraphQLMaxComplexity int32  `json:"graphQLMaxComplexity"`
}

// SubscribedAPI is an API that the application may call with the key.
type SubscribedAPI struct {
	Name                   string `json:"name"`
	Context                string `json:"context"`
	Version                string `json:"version"`
	Publisher              string `json:"publisher"`
	SubscriptionTier       string `json:"subscriptionTier"`
	SubscriberTenantDomain string `json:"subscriberTenantDomain"`
}

// Of returns the claims of an application for keys of a type, PRODUCTION or SANDBOX: of the
// subscriptions, those that let such keys through. consumerKey may be empty.
func Of(v *replica.View, app *catalog.Application, keyType, consumerKey string) SelfContained {
	panic("skeleton")
}
