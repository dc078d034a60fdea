// Package catalog holds the words for what gateways validate subscriptions with:
// tenants, APIs, applications, key mappings, subscriptions, policies, scopes and key
// managers, and the events that say how they change. It hides how these look in an
// event's data, which is also how they look over HTTP.
//
// # Decisions
//
// An entity is always told whole. Whoever follows the events replaces what it has by
// what an event says, whatever the verb, and forgets it after "deleted".
//
// Names that others refer to an entity by never change: a tenant's domain, an API's
// name and version, a policy's kind and name, a scope's name, a key manager's name and
// issuer, a consumer key. So an event about one entity never makes what was said
// about another one wrong.
package catalog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/rescindhq/rescind/api/revocation"
)

// Noun says what an entity is. It is the first part of its events' type.
type Noun string

// The nouns.
const (
	NounTenant       Noun = "tenant"
	NounKeyManager   Noun = "key_manager"
	NounPolicy       Noun = "policy"
	NounScope        Noun = "scope"
	NounAPI          Noun = "api"
	NounApplication  Noun = "application"
	NounKeyMapping   Noun = "key_mapping"
	NounSubscription Noun = "subscription"
)

// Nouns are all nouns, each after those that its entities refer to.
var Nouns = []Noun{
	NounTenant, NounKeyManager, NounPolicy, NounScope, NounAPI, NounApplication, NounKeyMapping, NounSubscription,
}

// Verb says what became of an entity. It is the second part of its events' type.
type Verb string

// The verbs. All but Deleted leave the entity as the event's data says.
const (
	Created Verb = "created"
	Updated Verb = "updated"
	Deleted Verb = "deleted"
	// LifecycleChanged is an update that changed an API's Status, or that and more.
	LifecycleChanged Verb = "lifecycle_changed"
	// Deployed and Undeployed say for which of an API's gateway labels it is served
	// from now on, or no longer: [Change.Labels]. They follow the event of the change
	// that they are part of; before a Deleted, Undeployed comes first.
	Deployed   Verb = "deployed"
	Undeployed Verb = "undeployed"
)

// Meta is what every entity has.
type Meta struct {
	// ID is positive and unique among the entities of a noun, over all tenants. A
	// tenant's may be negative. Never used again after a delete, unless given.
	ID int32 `json:"id"`
	// UUID is canonical, and unique among the entities of a noun.
	UUID string `json:"uuid"`
	// Tenant owns the entity, for ever.
	Tenant revocation.Tenant `json:"tenant"`
	// Timestamp is when the entity last changed, in Unix milliseconds; each change
	// of one entity has a greater one, deletion included.
	Timestamp int64 `json:"timestamp"`
}

// Base returns m, so that an [Entity]'s Meta can be reached.
func (m *Meta) Base() *Meta { return m }

// An Entity is one of the pointers to this package's entities. What a reader of
// events or snapshots gets is shared: it is not to be changed.
type Entity interface {
	Noun() Noun
	Base() *Meta
	// Validate returns an [Invalid] unless the entity can be stored and published.
	// It does not look at Meta, nor at what the entity refers to.
	Validate() error
	// subject is the name that people know the entity by.
	subject() string
}

// Ref names another entity of the same tenant. Both members are always set in what
// is read; in what is written one is enough.
type Ref struct {
	ID   int32  `json:"id,omitempty"`
	UUID string `json:"uuid,omitempty"`
}

// Tenant is an organisation. Its ID and domain are in Meta.Tenant too.
type Tenant struct {
	Meta
	// DisplayName is for people. May be empty.
	DisplayName string `json:"display_name,omitempty"`
}

// Lifecycle states of an API.
const (
	APICreated    = "CREATED"
	APIPrototyped = "PROTOTYPED"
	APIPublished  = "PUBLISHED"
	APIBlocked    = "BLOCKED"
	APIDeprecated = "DEPRECATED"
	APIRetired    = "RETIRED"
)

// API is one version of an API. Its Name and Version never change.
type API struct {
	Meta
	Name    string `json:"name"`
	Version string `json:"version"`
	// Context is the path that requests begin with, version included, for example
	// "/pizza/1.0.0". Unique among those of a tenant.
	Context  string `json:"context"`
	Provider string `json:"provider"`
	// Type is HTTP, WS, GRAPHQL, SOAP, SOAPTOREST, SSE, WEBSUB, WEBHOOK, ASYNC or GRPC.
	Type string `json:"type"`
	// Status is the lifecycle state.
	Status string `json:"status"`
	// DefaultVersion: requests without a version go here.
	DefaultVersion bool `json:"default_version"`
	// Policy names an API policy. Empty: each operation has its own, or none.
	Policy string `json:"policy,omitempty"`
	// SecurityScheme is what requests may prove themselves with, for example "oauth2".
	SecurityScheme []string `json:"security_scheme,omitempty"`
	// GatewayLabels are the gateway environments that serve it.
	GatewayLabels []string    `json:"gateway_labels,omitempty"`
	Operations    []Operation `json:"operations,omitempty"`
}

// Operation is a method on a path of an API.
type Operation struct {
	// Target is a path template, for example "/menu/{id}" or "/*".
	Target string `json:"target"`
	// Verb is an HTTP method, or SUBSCRIBE, PUBLISH, QUERY, MUTATION, SUBSCRIPTION.
	Verb string `json:"verb"`
	// AuthType is Any, None, Application, "Application & Application User" or Application_User.
	AuthType string `json:"auth_type"`
	// Policy names an API policy. Default Unlimited.
	Policy string `json:"policy,omitempty"`
	// Scopes are names of scopes, any one of which permits it.
	Scopes []string `json:"scopes,omitempty"`
}

// Application holds consumer keys and subscriptions.
type Application struct {
	Meta
	// Name is unique among those of an owner.
	Name string `json:"name"`
	// Owner is the user that subscribed, for ever.
	Owner string `json:"owner"`
	// Policy names an application policy.
	Policy string `json:"policy"`
	// TokenType is JWT or OAUTH.
	TokenType string `json:"token_type"`
	// Groups share the application with their members.
	Groups []string `json:"groups,omitempty"`
	// Attributes are for the backends and for people.
	Attributes map[string]string `json:"attributes,omitempty"`
	// SelfContained: the tokens of its generated keys carry what gateways would else look up,
	// so that they can be validated offline. Each carries it as it was when it was made: a
	// change of a name or a policy is for later tokens. What ends a subscription, a key, the
	// application or SelfContained itself always revokes the tokens. What closes an API does not:
	// one that is BLOCKED or RETIRED is not in later tokens, but a gateway that validates offline
	// knows no Status, and lets the tokens of before through until they end. To close it there at
	// once, block or delete its subscriptions, or revoke the clients.
	SelfContained bool `json:"self_contained,omitempty"`
	// Blocked: none of its subscriptions lets a request through. It is changed by
	// block and unblock only.
	Blocked bool `json:"blocked"`
}

// Kinds of consumer keys.
const (
	Production = "PRODUCTION"
	Sandbox    = "SANDBOX"
)

// KeyMapping says that a consumer key belongs to an application. Nothing of it ever
// changes. (Iss, ConsumerKey) is unique.
type KeyMapping struct {
	Meta
	Application Ref    `json:"application"`
	ConsumerKey string `json:"consumer_key"`
	// KeyType is PRODUCTION or SANDBOX.
	KeyType string `json:"key_type"`
	// KeyManager is the name, and Iss the issuer, of the key manager that the key is
	// registered with.
	KeyManager string `json:"key_manager"`
	Iss        string `json:"iss"`
	// Generated: the key was made by us, and its secrets are with us.
	Generated bool `json:"generated"`
}

// States of a subscription. [LetsThrough] says what each is for gateways.
const (
	Unblocked         = "UNBLOCKED"
	Blocked           = "BLOCKED"
	ProdOnlyBlocked   = "PROD_ONLY_BLOCKED"
	OnHold            = "ON_HOLD"
	Rejected          = "REJECTED"
	TierUpdatePending = "TIER_UPDATE_PENDING"
)

// Subscription lets an application call an API. At most one for each pair.
type Subscription struct {
	Meta
	Application Ref `json:"application"`
	API         Ref `json:"api"`
	// Policy names a subscription policy.
	Policy string `json:"policy"`
	// State is what it was set to.
	State string `json:"state"`
	// ApplicationBlocked: whatever State is, it counts as BLOCKED. See [Subscription.Effective].
	ApplicationBlocked bool `json:"application_blocked"`
}

// Effective is the state that gateways go by.
func (s *Subscription) Effective() string {
	if s.ApplicationBlocked {
		return Blocked
	}
	return s.State
}

// LetsThrough reports whether a gateway lets requests with keys of a type through where a
// subscription is in a state. A state that it does not know does not stop it.
func LetsThrough(state, keyType string) bool {
	switch state {
	case Blocked, OnHold, Rejected:
		return false
	case ProdOnlyBlocked:
		return keyType == Sandbox
	}
	return true
}

// Kinds of policies.
const (
	PolicySubscription = "subscription"
	PolicyApplication  = "application"
	PolicyAPI          = "api"
)

// Policy is a tier. Its Kind and Name never change and are unique together.
type Policy struct {
	Meta
	Kind string `json:"kind"`
	Name string `json:"name"`
	// DisplayName and Description are for people. May be empty.
	DisplayName string `json:"display_name,omitempty"`
	Description string `json:"description,omitempty"`
	// QuotaType is requestCount, bandwidthVolume, eventCount or aiApiQuota.
	QuotaType string `json:"quota_type"`
	// Quota is the number of requests, kilobytes or events in UnitTime TimeUnits; 0
	// is no limit. TimeUnit is min, hour, day, month or year; empty without a limit.
	Quota    int64  `json:"quota,omitempty"`
	UnitTime int32  `json:"unit_time,omitempty"`
	TimeUnit string `json:"time_unit,omitempty"`

	// Of subscription policies only. RateLimitCount is the burst limit in each
	// RateLimitTimeUnit (sec, min); 0 is none. A GraphQL limit of 0 is none.
	RateLimitCount       int32  `json:"rate_limit_count,omitempty"`
	RateLimitTimeUnit    string `json:"rate_limit_time_unit,omitempty"`
	StopOnQuotaReach     bool   `json:"stop_on_quota_reach,omitempty"`
	GraphQLMaxDepth      int32  `json:"graphql_max_depth,omitempty"`
	GraphQLMaxComplexity int32  `json:"graphql_max_complexity,omitempty"`

	// Level is of API policies only: apiLevel or resourceLevel.
	Level string `json:"level,omitempty"`
}

// Scope is a permission that operations may ask for. Its Name never changes and is
// unique in its tenant.
type Scope struct {
	Meta
	Name        string   `json:"name"`
	DisplayName string   `json:"display_name,omitempty"`
	Description string   `json:"description,omitempty"`
	Roles       []string `json:"roles,omitempty"`
}

// KeyManager is a trusted issuer of tokens: our own, or an external one known by its
// key set. Its Name, unique in its tenant, and Iss, unique everywhere, never change.
type KeyManager struct {
	Meta
	Name        string `json:"name"`
	DisplayName string `json:"display_name,omitempty"`
	Description string `json:"description,omitempty"`
	// Type is the connector type that WSO2's gateways know it by: default, WSO2-IS,
	// KeyCloak, …
	Type string `json:"type"`
	// Enabled: its tokens are accepted.
	Enabled bool `json:"enabled"`
	// Resident is an issuer of our own: each tenant has one, which comes and goes with it.
	// Callers cannot create or delete one, nor change more of it than DisplayName, Description,
	// Enabled and, if they see all tenants, Properties.
	Resident bool   `json:"resident"`
	Iss      string `json:"iss"`
	// MaxTokenLifetime is the longest from iat to exp of its tokens, in seconds, 1 to
	// 315360000: revocations of more than one token are kept that long. It may only rise.
	MaxTokenLifetime int32 `json:"max_token_lifetime"`
	// JWKSURI is where its key set is, https unless the host is loopback, without a query,
	// which could be a secret. Empty where the process is configured with its keys.
	JWKSURI string `json:"jwks_uri,omitempty"`
	// Algorithms are the JWS algorithms that its tokens may be signed with. Empty: RS256, PS256,
	// ES256 and EdDSA.
	Algorithms []string `json:"algorithms,omitempty"`
	// AllowTyp are values of typ that its tokens may have besides at+jwt, for example JWT.
	AllowTyp []string `json:"allow_typ,omitempty"`
	// ConsumerKeyClaim and ScopesClaim name claims. Defaults azp and scope.
	ConsumerKeyClaim string `json:"consumer_key_claim,omitempty"`
	ScopesClaim      string `json:"scopes_claim,omitempty"`
	// ClaimMappings rename claims of its tokens for the backends.
	ClaimMappings []ClaimMapping `json:"claim_mappings,omitempty"`
	// TokenType is DIRECT, EXCHANGED or BOTH.
	TokenType string `json:"token_type"`
	// Properties are passed on to WSO2's gateways as they are: those that their code knows have
	// the JSON type that it asserts, and none is null. They are no place for secrets. Which keys
	// and tokens are believed is not theirs to say: see [IsReservedProperty].
	Properties map[string]any `json:"properties,omitempty"`
}

// ClaimMapping renames Remote to Local.
type ClaimMapping struct {
	Remote string `json:"remote"`
	Local  string `json:"local"`
}

// Noun implements [Entity].
func (*Tenant) Noun() Noun       { return NounTenant }
func (*API) Noun() Noun          { return NounAPI }          // Noun implements [Entity].
func (*Application) Noun() Noun  { return NounApplication }  // Noun implements [Entity].
func (*KeyMapping) Noun() Noun   { return NounKeyMapping }   // Noun implements [Entity].
func (*Subscription) Noun() Noun { return NounSubscription } // Noun implements [Entity].
func (*Policy) Noun() Noun       { return NounPolicy }       // Noun implements [Entity].
func (*Scope) Noun() Noun        { return NounScope }        // Noun implements [Entity].
func (*KeyManager) Noun() Noun   { return NounKeyManager }   // Noun implements [Entity].

func (t *Tenant) subject() string       { return t.Meta.Tenant.Domain }
func (a *API) subject() string          { return a.Name + ":" + a.Version }
func (a *Application) subject() string  { return a.Name }
func (k *KeyMapping) subject() string   { return k.ConsumerKey }
func (s *Subscription) subject() string { return s.UUID }
func (p *Policy) subject() string       { return p.Kind + "/" + p.Name }
func (s *Scope) subject() string        { return s.Name }
func (k *KeyManager) subject() string   { return k.Name }

// New returns an empty entity of a noun, nil if there is no such noun.
func New(n Noun) Entity {
	switch n {
	case NounTenant:
		return new(Tenant)
	case NounKeyManager:
		return new(KeyManager)
	case NounPolicy:
		return new(Policy)
	case NounScope:
		return new(Scope)
	case NounAPI:
		return new(API)
	case NounApplication:
		return new(Application)
	case NounKeyMapping:
		return new(KeyMapping)
	case NounSubscription:
		return new(Subscription)
	}
	return nil
}

// Change is what an event says about an entity.
type Change struct {
	Verb   Verb
	Entity Entity
	// Labels are the gateway labels that a Deployed or Undeployed is about.
	Labels []string
}

// maxDataBytes leaves room for an event's other attributes within its 64 KiB.
const maxDataBytes = 48 << 10

// NewEvent is the event that c happened. The log sets the other members. It returns
// an [Invalid] for an entity that is too large to publish.
func NewEvent(c Change) (revocation.Event, error) {
	data, err := marshal(c.Entity)
	if err != nil {
		return revocation.Event{}, fmt.Errorf("encode %s %s: %w", c.Entity.Noun(), c.Entity.Base().UUID, err)
	}
	if len(c.Labels) > 0 {
		labels, err := marshal(c.Labels)
		if err != nil {
			return revocation.Event{}, err
		}
		data = append(data[:len(data)-1], `,"labels":`...)
		data = append(append(data, labels...), '}')
	}
	if len(data) > maxDataBytes {
		return revocation.Event{}, Invalid{{Pointer: "#", Detail: fmt.Sprintf("it is %d bytes as JSON, must be at most %d", len(data), maxDataBytes)}}
	}
	return revocation.Event{
		Type:    string(c.Entity.Noun()) + "." + string(c.Verb),
		Subject: c.Entity.subject(),
		Tenant:  c.Entity.Base().Tenant,
		Data:    data,
	}, nil
}

// IsChange reports whether an event of type typ is about an entity of the catalog.
func IsChange(typ string) bool {
	noun, _, ok := strings.Cut(typ, ".")
	return ok && New(Noun(noun)) != nil
}

// ParseChange reads the data of an event for which [IsChange] holds. Members that are
// not known are ignored; a verb that is not known is an update. Its error is an
// [Invalid].
func ParseChange(e revocation.Event) (Change, error) {
	noun, verb, _ := strings.Cut(e.Type, ".")
	entity := New(Noun(noun))
	if entity == nil {
		return Change{}, Invalid{{Pointer: "#", Detail: "the event is not about an entity of the catalog"}}
	}
	if err := json.Unmarshal(e.Data, entity); err != nil {
		return Change{}, Invalid{{Pointer: "#", Detail: "the event's data is not a JSON object of the expected form"}}
	}
	c := Change{Verb: Verb(verb), Entity: entity}
	if c.Verb == Deployed || c.Verb == Undeployed {
		var about struct {
			Labels []string `json:"labels"`
		}
		if err := json.Unmarshal(e.Data, &about); err != nil {
			return Change{}, Invalid{{Pointer: "#/labels", Detail: "the labels are not an array of strings"}}
		}
		c.Labels = about.Labels
	}
	m := entity.Base()
	if !isUUID(m.UUID) || m.Tenant.Domain == "" || m.ID == 0 {
		return Change{}, Invalid{{Pointer: "#", Detail: "the entity lacks its id, its uuid or its tenant"}}
	}
	return c, nil
}

func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
