package wso2test

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// State is what Choreo Connect's adapter has in memory.
type State struct {
	Applications         map[string]Application       // by UUID
	KeyMappings          map[string]KeyMapping        // by "<consumer key>:<key manager>"
	Subscriptions        map[int32]Subscription       // by id
	ApplicationPolicies  map[int32]Policy             // by id
	SubscriptionPolicies map[int32]SubscriptionPolicy // by id
	// KeyManagers are by name in lower case: tenants are not told apart.
	KeyManagers map[string]KeyManager
	// Deployed are the gateway labels of each API, by its UUID.
	Deployed map[string][]string
	// RevokedTokens have their end in Unix milliseconds. Nothing is ever removed.
	RevokedTokens map[string]int64
}

// Application is what both events and snapshots tell about one, as are the other entities.
type Application struct {
	UUID         string `json:"uuid"`
	ID           int32  `json:"id"`
	Name         string `json:"name"`
	SubName      string `json:"subName"`
	Policy       string `json:"policy"`
	TokenType    string `json:"tokenType"`
	TenantDomain string `json:"tenanDomain"`
}

// KeyMapping is a consumer key of an application.
type KeyMapping struct {
	ApplicationID   int32  `json:"applicationId"`
	ApplicationUUID string `json:"applicationUUID"`
	ConsumerKey     string `json:"consumerKey"`
	KeyType         string `json:"keyType"`
	KeyManager      string `json:"keyManager"`
	TenantDomain    string `json:"tenanDomain"`
}

// Subscription is an application's subscription to an API.
type Subscription struct {
	SubscriptionID    int32  `json:"subscriptionId"`
	SubscriptionUUID  string `json:"subscriptionUUID"`
	PolicyID          string `json:"policyId"`
	APIID             int32  `json:"apiId"`
	APIUUID           string `json:"apiUUID"`
	AppID             int32  `json:"appId"`
	AppUUID           string `json:"applicationUUID"`
	SubscriptionState string `json:"subscriptionState"`
	TenantDomain      string `json:"tenanDomain"`
}

// Policy is an application policy.
type Policy struct {
	ID        int32  `json:"id"`
	Name      string `json:"name"`
	QuotaType string `json:"quotaType"`
}

// SubscriptionPolicy is a subscription policy.
type SubscriptionPolicy struct {
	Policy
	GraphQLMaxComplexity int32  `json:"graphQLMaxComplexity"`
	GraphQLMaxDepth      int32  `json:"graphQLMaxDepth"`
	RateLimitCount       int32  `json:"rateLimitCount"`
	RateLimitTimeUnit    string `json:"rateLimitTimeUnit"`
	StopOnQuotaReach     bool   `json:"stopOnQuotaReach"`
}

// KeyManager is a trusted issuer; what there is to verify its tokens is in Configuration.
type KeyManager struct {
	Name          string         `json:"name"`
	Type          string         `json:"type"`
	Enabled       bool           `json:"enabled"`
	TenantDomain  string         `json:"tenantDomain"`
	Configuration map[string]any `json:"configuration"`
}

// NewState is that of an adapter that has loaded empty lists.
func NewState() State {
	return State{
		Applications: map[string]Application{}, KeyMappings: map[string]KeyMapping{}, Subscriptions: map[int32]Subscription{},
		ApplicationPolicies: map[int32]Policy{}, SubscriptionPolicies: map[int32]SubscriptionPolicy{},
		KeyManagers: map[string]KeyManager{}, Deployed: map[string][]string{}, RevokedTokens: map[string]int64{},
	}
}

// Load adds the answer to GET /internal/data/v1/<resource>: applications, subscriptions,
// application-key-mappings, application-policies, subscription-policies, keymanagers or
// revokedjwt, the last in its bare form. An error means that the adapter would not
// have loaded it.
func (s State) Load(resource string, body []byte) error {
	var err error
	switch resource {
	case "applications":
		err = load(body, s.Applications, func(a Application) string { return a.UUID })
	case "application-key-mappings":
		err = load(body, s.KeyMappings, KeyMapping.key)
	case "subscriptions":
		err = load(body, s.Subscriptions, func(sub Subscription) int32 { return sub.SubscriptionID })
	case "application-policies":
		err = load(body, s.ApplicationPolicies, func(p Policy) int32 { return p.ID })
	case "subscription-policies":
		err = load(body, s.SubscriptionPolicies, func(p SubscriptionPolicy) int32 { return p.ID })
	case "keymanagers":
		var list []KeyManager
		err = json.Unmarshal(body, &list)
		for _, k := range list {
			s.KeyManagers[strings.ToLower(k.Name)] = k
		}
	case "revokedjwt":
		var list []struct {
			Signature string `json:"jwt_signature"`
			Expiry    int64  `json:"expiry_time"`
		}
		err = json.Unmarshal(body, &list)
		for _, t := range list {
			s.RevokedTokens[t.Signature] = t.Expiry
		}
	default:
		err = fmt.Errorf("there is no such resource")
	}
	if err != nil {
		return fmt.Errorf("load %s: %w", resource, err)
	}
	return nil
}

func (k KeyMapping) key() string { return k.ConsumerKey + ":" + k.KeyManager }

func load[K comparable, V any](body []byte, into map[K]V, key func(V) K) error {
	var answer struct {
		List []V `json:"list"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return err
	}
	if answer.List == nil {
		return fmt.Errorf("there is no list")
	}
	for _, v := range answer.List {
		if _, twice := into[key(v)]; twice {
			return fmt.Errorf("%v is there twice", key(v))
		}
		into[key(v)] = v
	}
	return nil
}

func (s State) clone() State {
	s.Applications, s.KeyMappings, s.Subscriptions = maps.Clone(s.Applications), maps.Clone(s.KeyMappings), maps.Clone(s.Subscriptions)
	s.ApplicationPolicies, s.SubscriptionPolicies = maps.Clone(s.ApplicationPolicies), maps.Clone(s.SubscriptionPolicies)
	s.KeyManagers, s.RevokedTokens, s.Deployed = maps.Clone(s.KeyManagers), maps.Clone(s.RevokedTokens), maps.Clone(s.Deployed)
	for uuid, labels := range s.Deployed {
		s.Deployed[uuid] = slices.Clone(labels)
	}
	return s
}

// String dumps s as JSON.
func (s State) String() string {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err.Error()
	}
	return string(b)
}
