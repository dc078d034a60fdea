package wso2

import (
	"strings"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// notification is the payload of the topic of notifications (WSO2 contract, section
// 4.1). Its timestamp is spelt as gateways in Java read it; those in Go take either.
type notification struct {
	EventType string `json:"eventType"`
	Timestamp int64  `json:"timestamp"` // Unix milliseconds
	Event     []byte `json:"event"`     // one of the objects below
}

func (n notification) entries() []entry {
	return []entry{{"eventType", n.EventType}, {"timestamp", n.Timestamp}, {"event", base64Of(n.Event)}}
}

// common is what the object of every notification has, here with a capital S.
type common struct {
	EventID      string `json:"eventId"`
	TimeStamp    int64  `json:"timeStamp"` // Unix milliseconds; greater with each change of an entity
	Type         string `json:"type"`      // the eventType again: gateways in Go act on this one
	TenantID     int32  `json:"tenantId"`
	TenantDomain string `json:"tenantDomain"`
}

// The objects are those of section 4.3. None has a null: gateways in Java do not look
// before they use a list or a map. Numbers are 32 bits wide: gateways in Go drop an
// event with a wider one.

type applicationEvent struct {
	common
	UUID              string            `json:"uuid"`
	ApplicationID     int32             `json:"applicationId"`
	ApplicationName   string            `json:"applicationName"`
	TokenType         string            `json:"tokenType"`
	ApplicationPolicy string            `json:"applicationPolicy"`
	GroupID           string            `json:"groupId"`
	Attributes        map[string]string `json:"attributes"`
	Subscriber        string            `json:"subscriber"`
}

type keyMappingEvent struct {
	common
	ApplicationID   int32  `json:"applicationId"`
	ApplicationUUID string `json:"applicationUUID"`
	ConsumerKey     string `json:"consumerKey"`
	KeyType         string `json:"keyType"`
	KeyManager      string `json:"keyManager"`
}

type subscriptionEvent struct {
	common
	SubscriptionID    int32  `json:"subscriptionId"`
	SubscriptionUUID  string `json:"subscriptionUUID"`
	APIID             int32  `json:"apiId"`
	APIUUID           string `json:"apiUUID"`
	ApplicationID     int32  `json:"applicationId"`
	ApplicationUUID   string `json:"applicationUUID"`
	PolicyID          string `json:"policyId"` // the name
	SubscriptionState string `json:"subscriptionState"`
}

type apiEvent struct {
	common
	APIName     string `json:"apiName"`
	APIID       int32  `json:"apiId"`
	UUID        string `json:"uuid"`
	APIVersion  string `json:"apiVersion"`
	APIContext  string `json:"apiContext"`
	APIProvider string `json:"apiProvider"`
	APIType     string `json:"apiType"`
	APIStatus   string `json:"apiStatus"`
}

type deployEvent struct {
	common
	APIID          int32    `json:"apiId"`
	UUID           string   `json:"uuid"`
	Name           string   `json:"name"`
	Version        string   `json:"version"`
	Provider       string   `json:"provider"`
	APIType        string   `json:"apiType"`
	Context        string   `json:"context"`
	GatewayLabels  []string `json:"gatewayLabels"`
	AssociatedAPIs []string `json:"associatedApis"`
}

type policyEvent struct {
	common
	PolicyID   int32  `json:"policyId"`
	PolicyName string `json:"policyName"`
	QuotaType  string `json:"quotaType"`
	PolicyType string `json:"policyType"`
}

type subscriptionPolicyEvent struct {
	policyEvent
	RateLimitCount       int32  `json:"rateLimitCount"`
	RateLimitTimeUnit    string `json:"rateLimitTimeUnit"`
	StopOnQuotaReach     bool   `json:"stopOnQuotaReach"`
	GraphQLMaxDepth      int32  `json:"graphQLMaxDepth"`
	GraphQLMaxComplexity int32  `json:"graphQLMaxComplexity"`
	SubscriberCount      int32  `json:"subscriberCount"`
}

type apiPolicyEvent struct {
	policyEvent
	AddedConditionGroupIDs   []int32 `json:"addedConditionGroupIds"`
	DeletedConditionGroupIDs []int32 `json:"deletedConditionGroupIds"`
}

type scopeEvent struct {
	common
	Name        string   `json:"name"`
	DisplayName string   `json:"displayName"`
	Description string   `json:"description"`
	Roles       []string `json:"roles"`
}

// sayChange is what gateways are told about a change at position at of the log.
func sayChange(c catalog.Change, at revocation.Position) ([]told, error) {
	if k, ok := c.Entity.(*catalog.KeyManager); ok {
		return sayKeyManager(c.Verb, k)
	}
	var said []told
	for i, eventType := range eventTypes(c) {
		m := c.Entity.Base()
		id := EventID(at)
		if i > 0 {
			id = uuidOf(at.String() + "#2")
		}
		event, err := marshal(eventOf(c, common{
			EventID: id, TimeStamp: m.Timestamp, Type: eventType, TenantID: m.Tenant.ID, TenantDomain: m.Tenant.Domain,
		}))
		if err != nil {
			return nil, err
		}
		said = append(said, told{TopicNotification, notification{EventType: eventType, Timestamp: m.Timestamp, Event: event}})
	}
	return said, nil
}

// eventTypes are the types of the notifications about c, in order.
func eventTypes(c catalog.Change) []string {
	suffix := "_UPDATE"
	switch c.Verb {
	case catalog.Created:
		suffix = "_CREATE"
	case catalog.Deleted:
		suffix = "_DELETE"
	}
	switch c.Entity.Noun() {
	case catalog.NounApplication:
		return []string{"APPLICATION" + suffix}
	case catalog.NounKeyMapping:
		if c.Verb == catalog.Deleted {
			return []string{"REMOVE_APPLICATION_KEYMAPPING"}
		}
		return []string{"APPLICATION_REGISTRATION_CREATE"} // there is no update; this one replaces
	case catalog.NounSubscription:
		if s := c.Entity.(*catalog.Subscription); c.Verb == catalog.Updated && s.Effective() == catalog.OnHold {
			// A gateway in Java does not put on hold what it has.
			return []string{"SUBSCRIPTIONS_DELETE", "SUBSCRIPTIONS_UPDATE"}
		}
		return []string{"SUBSCRIPTIONS" + suffix}
	case catalog.NounPolicy:
		return []string{"POLICY" + suffix}
	case catalog.NounScope:
		return []string{"SCOPE" + suffix}
	case catalog.NounAPI:
		retired := c.Entity.(*catalog.API).Status == catalog.APIRetired
		switch {
		case c.Verb == catalog.Deployed:
			return []string{"DEPLOY_API_IN_GATEWAY"}
		case c.Verb == catalog.Undeployed:
			return []string{"REMOVE_API_FROM_GATEWAY"}
		case c.Verb == catalog.LifecycleChanged, c.Verb == catalog.Updated && retired:
			// A gateway in Java reads the API again at the first, and removes it at the
			// second if it is RETIRED: the other way round it would come back.
			return []string{"API_UPDATE", "API_LIFECYCLE_CHANGE"}
		}
		return []string{"API" + suffix}
	}
	return nil
}

// eventOf is the object of a notification about c.
func eventOf(c catalog.Change, common common) any {
	switch e := c.Entity.(type) {
	case *catalog.Application:
		attributes := e.Attributes
		if attributes == nil {
			attributes = map[string]string{}
		}
		return applicationEvent{
			common: common, UUID: e.UUID, ApplicationID: e.ID, ApplicationName: e.Name, TokenType: e.TokenType,
			ApplicationPolicy: e.Policy, GroupID: strings.Join(e.Groups, ","), Attributes: attributes, Subscriber: e.Owner,
		}
	case *catalog.KeyMapping:
		return keyMappingEvent{
			common: common, ApplicationID: e.Application.ID, ApplicationUUID: e.Application.UUID, ConsumerKey: e.ConsumerKey,
			KeyType: e.KeyType, KeyManager: e.KeyManager,
		}
	case *catalog.Subscription:
		return subscriptionEvent{
			common: common, SubscriptionID: e.ID, SubscriptionUUID: e.UUID, APIID: e.API.ID, APIUUID: e.API.UUID,
			ApplicationID: e.Application.ID, ApplicationUUID: e.Application.UUID, PolicyID: e.Policy, SubscriptionState: e.Effective(),
		}
	case *catalog.API:
		if c.Verb == catalog.Deployed || c.Verb == catalog.Undeployed {
			return deployEvent{
				common: common, APIID: e.ID, UUID: e.UUID, Name: e.Name, Version: e.Version, Provider: e.Provider, APIType: e.Type,
				Context: e.Context, GatewayLabels: orEmpty(c.Labels), AssociatedAPIs: []string{},
			}
		}
		return apiEvent{
			common: common, APIName: e.Name, APIID: e.ID, UUID: e.UUID, APIVersion: e.Version, APIContext: e.Context,
			APIProvider: e.Provider, APIType: e.Type, APIStatus: e.Status,
		}
	case *catalog.Policy:
		p := policyEvent{common: common, PolicyID: e.ID, PolicyName: e.Name, QuotaType: e.QuotaType, PolicyType: strings.ToUpper(e.Kind)}
		switch e.Kind {
		case catalog.PolicySubscription:
			return subscriptionPolicyEvent{
				policyEvent: p, RateLimitCount: e.RateLimitCount, RateLimitTimeUnit: e.RateLimitTimeUnit, StopOnQuotaReach: e.StopOnQuotaReach,
				GraphQLMaxDepth: e.GraphQLMaxDepth, GraphQLMaxComplexity: e.GraphQLMaxComplexity,
			}
		case catalog.PolicyAPI:
			return apiPolicyEvent{policyEvent: p, AddedConditionGroupIDs: []int32{}, DeletedConditionGroupIDs: []int32{}}
		}
		return p
	case *catalog.Scope:
		return scopeEvent{common: common, Name: e.Name, DisplayName: e.DisplayName, Description: e.Description, Roles: orEmpty(e.Roles)}
	}
	return nil
}

func orEmpty(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}
