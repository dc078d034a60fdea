package manifest

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
)

// document is the form of one document. The types below are that of its members: they
// are read and written by the same tags.
type document struct {
	Tenants      list[tenantForm]      `yaml:"tenants,omitempty"`
	Tenant       string                `yaml:"tenant,omitempty"`
	KeyManagers  list[keyManagerForm]  `yaml:"key_managers,omitempty"`
	Policies     *policiesForm         `yaml:"policies,omitempty"`
	Scopes       list[scopeForm]       `yaml:"scopes,omitempty"`
	APIs         list[apiForm]         `yaml:"apis,omitempty"`
	Applications list[applicationForm] `yaml:"applications,omitempty"`
	at           Place
}

func (d *document) setPlace(p Place) { d.at = p }
func (d *document) setDefaults()     { d.Tenant = revocation.SuperTenant.Domain }
func (d *document) check() error {
	if !catalog.ValidDomain(d.Tenant) {
		return catalog.Invalid{{Pointer: "#/tenant", Detail: "must be a domain: 1 to 200 of a-z 0-9 . -"}}
	}
	return nil
}

// list is nil where there is none: an empty one says that there is nothing.
type list[T any] []T

// IsZero makes omitempty keep an empty list.
func (l list[T]) IsZero() bool { return l == nil }

// identity may be given, and is else made, or what it is already.
type identity struct {
	ID   int32  `yaml:"id,omitempty"`
	UUID string `yaml:"uuid,omitempty"`
	at   Place
}

func (i *identity) setPlace(p Place) { i.at = p }

// with adds what is wrong with i to what is wrong with an entity.
func (i *identity) with(err error) error {
	found, _ := err.(catalog.Invalid)
	if i.ID < 0 {
		found = append(found, catalog.FieldError{Pointer: "#/id", Detail: "must be at least 1"})
	}
	if id, err := uuid.Parse(i.UUID); i.UUID != "" && (err != nil || id.String() != i.UUID) {
		found = append(found, catalog.FieldError{Pointer: "#/uuid", Detail: "must be a UUID in lower case, such as 01234567-89ab-cdef-0123-456789abcdef"})
	}
	if len(found) == 0 {
		return nil
	}
	return found
}

type tenantForm struct {
	Domain      string `yaml:"domain"`
	identity    `yaml:",inline"`
	DisplayName string `yaml:"display_name,omitempty"`
}

func (f *tenantForm) entity() *catalog.Tenant { return &catalog.Tenant{DisplayName: f.DisplayName} }

func (f *tenantForm) check() error {
	found, _ := f.entity().Validate().(catalog.Invalid)
	if !catalog.ValidDomain(f.Domain) {
		found = append(found, catalog.FieldError{Pointer: "#/domain", Detail: "must be 1 to 200 of a-z 0-9 . -"})
	}
	// Only a tenant's id may be negative.
	positive := identity{UUID: f.UUID}
	return positive.with(found)
}

func tenantOf(t *catalog.Tenant) tenantForm {
	return tenantForm{Domain: t.Tenant.Domain, identity: identityOf(t), DisplayName: t.DisplayName}
}

func identityOf(e catalog.Entity) identity {
	return identity{ID: e.Base().ID, UUID: e.Base().UUID}
}

type keyManagerForm struct {
	Name     string `yaml:"name"`
	identity `yaml:",inline"`
	// Resident names our own, of which the service knows all but what is for people and
	// for gateways.
	Resident         bool               `yaml:"resident,omitempty"`
	DisplayName      string             `yaml:"display_name,omitempty"`
	Description      string             `yaml:"description,omitempty"`
	Type             string             `yaml:"type,omitempty"`
	Enabled          bool               `yaml:"enabled"`
	Iss              string             `yaml:"iss,omitempty"`
	MaxTokenLifetime int32              `yaml:"max_token_lifetime,omitempty"`
	JWKSURI          string             `yaml:"jwks_uri,omitempty"`
	Algorithms       []string           `yaml:"algorithms,omitempty"`
	AllowTyp         []string           `yaml:"allow_typ,omitempty"`
	ConsumerKeyClaim string             `yaml:"consumer_key_claim,omitempty"`
	ScopesClaim      string             `yaml:"scopes_claim,omitempty"`
	ClaimMappings    []claimMappingForm `yaml:"claim_mappings,omitempty"`
	TokenType        string             `yaml:"token_type,omitempty"`
	Properties       map[string]any     `yaml:"properties,omitempty"`
}

type claimMappingForm struct {
	Remote string `yaml:"remote"`
	Local  string `yaml:"local"`
}

func (f *keyManagerForm) setDefaults() {
	f.Type, f.Enabled, f.TokenType = "default", true, "DIRECT"
}

func (f *keyManagerForm) entity() *catalog.KeyManager {
	k := &catalog.KeyManager{
		Name: f.Name, DisplayName: f.DisplayName, Description: f.Description, Type: f.Type, Enabled: f.Enabled, Iss: f.Iss,
		MaxTokenLifetime: f.MaxTokenLifetime, JWKSURI: f.JWKSURI, Algorithms: f.Algorithms, AllowTyp: f.AllowTyp,
		ConsumerKeyClaim: f.ConsumerKeyClaim, ScopesClaim: f.ScopesClaim, TokenType: f.TokenType, Properties: f.Properties,
		Resident: f.Resident,
	}
	for _, m := range f.ClaimMappings {
		k.ClaimMappings = append(k.ClaimMappings, catalog.ClaimMapping(m))
	}
	return k
}

func (f *keyManagerForm) check() error {
	if !f.Resident {
		return f.with(f.entity().Validate())
	}
	var found catalog.Invalid
	if f.Name == "" {
		found = append(found, catalog.FieldError{Pointer: "#/name", Detail: "must not be empty"})
	}
	if own := f.ofResident(&catalog.KeyManager{Name: f.Name, Type: "default", Resident: true, TokenType: "DIRECT"}); !same(own, f.entity()) {
		found = append(found, catalog.FieldError{
			Pointer: "#/resident", Detail: "is true: of a key manager of our own only enabled, display_name, description and properties can be said",
		})
	}
	return f.with(found)
}

// ofResident is k, which is our own, as f says.
func (f *keyManagerForm) ofResident(k *catalog.KeyManager) *catalog.KeyManager {
	c := *k
	c.Enabled, c.DisplayName, c.Description, c.Properties = f.Enabled, f.DisplayName, f.Description, f.Properties
	return &c
}

func keyManagerOf(k *catalog.KeyManager) keyManagerForm {
	if k.Resident { // each tenant has one of its own, in every database
		return keyManagerForm{
			Name: k.Name, Resident: true, DisplayName: k.DisplayName, Description: k.Description, Enabled: k.Enabled, Properties: k.Properties,
		}
	}
	f := keyManagerForm{
		Name: k.Name, identity: identityOf(k), DisplayName: k.DisplayName, Description: k.Description, Type: k.Type, Enabled: k.Enabled,
		Iss: k.Iss, MaxTokenLifetime: k.MaxTokenLifetime, JWKSURI: k.JWKSURI, Algorithms: k.Algorithms, AllowTyp: k.AllowTyp,
		ConsumerKeyClaim: k.ConsumerKeyClaim, ScopesClaim: k.ScopesClaim, TokenType: k.TokenType, Properties: k.Properties,
	}
	for _, m := range k.ClaimMappings {
		f.ClaimMappings = append(f.ClaimMappings, claimMappingForm(m))
	}
	return f
}

type policiesForm struct {
	Subscription list[policyForm] `yaml:"subscription,omitempty"`
	Application  list[policyForm] `yaml:"application,omitempty"`
	API          list[policyForm] `yaml:"api,omitempty"`
}

func (f *policiesForm) setDefaults() {}

// of is the list of a kind.
func (f *policiesForm) of(kind string) *list[policyForm] {
	switch kind {
	case catalog.PolicySubscription:
		return &f.Subscription
	case catalog.PolicyApplication:
		return &f.Application
	}
	return &f.API
}

var policyKinds = []string{catalog.PolicySubscription, catalog.PolicyApplication, catalog.PolicyAPI}

// check looks at each policy here, because only here is its kind known.
func (f *policiesForm) check() error {
	var found catalog.Invalid
	for _, kind := range policyKinds {
		policies := *f.of(kind)
		for i := range policies {
			wrong, _ := policies[i].with(policies[i].entity(kind).Validate()).(catalog.Invalid)
			for _, w := range wrong {
				w.Pointer = fmt.Sprintf("#/%s/%d/%s", kind, i, strings.TrimPrefix(w.Pointer, "#/"))
				found = append(found, w)
			}
		}
	}
	if len(found) == 0 {
		return nil
	}
	return found
}

type policyForm struct {
	Name                 string `yaml:"name"`
	identity             `yaml:",inline"`
	DisplayName          string `yaml:"display_name,omitempty"`
	Description          string `yaml:"description,omitempty"`
	QuotaType            string `yaml:"quota_type,omitempty"`
	Quota                int64  `yaml:"quota,omitempty"`
	UnitTime             int32  `yaml:"unit_time,omitempty"`
	TimeUnit             string `yaml:"time_unit,omitempty"`
	RateLimitCount       int32  `yaml:"rate_limit_count,omitempty"`
	RateLimitTimeUnit    string `yaml:"rate_limit_time_unit,omitempty"`
	StopOnQuotaReach     bool   `yaml:"stop_on_quota_reach,omitempty"`
	GraphQLMaxDepth      int32  `yaml:"graphql_max_depth,omitempty"`
	GraphQLMaxComplexity int32  `yaml:"graphql_max_complexity,omitempty"`
	Level                string `yaml:"level,omitempty"`
}

func (f *policyForm) setDefaults() { f.QuotaType = "requestCount" }

func (f *policyForm) entity(kind string) *catalog.Policy {
	p := &catalog.Policy{
		Kind: kind, Name: f.Name, DisplayName: f.DisplayName, Description: f.Description,
		QuotaType: f.QuotaType, Quota: f.Quota, UnitTime: f.UnitTime, TimeUnit: f.TimeUnit,
		RateLimitCount: f.RateLimitCount, RateLimitTimeUnit: f.RateLimitTimeUnit, StopOnQuotaReach: f.StopOnQuotaReach,
		GraphQLMaxDepth: f.GraphQLMaxDepth, GraphQLMaxComplexity: f.GraphQLMaxComplexity, Level: f.Level,
	}
	if kind == catalog.PolicyAPI && p.Level == "" {
		p.Level = "apiLevel"
	}
	return p
}

func policyOf(p *catalog.Policy) policyForm {
	f := policyForm{
		Name: p.Name, identity: identityOf(p), DisplayName: p.DisplayName, Description: p.Description,
		QuotaType: p.QuotaType, Quota: p.Quota, UnitTime: p.UnitTime, TimeUnit: p.TimeUnit,
		RateLimitCount: p.RateLimitCount, RateLimitTimeUnit: p.RateLimitTimeUnit, StopOnQuotaReach: p.StopOnQuotaReach,
		GraphQLMaxDepth: p.GraphQLMaxDepth, GraphQLMaxComplexity: p.GraphQLMaxComplexity, Level: p.Level,
	}
	if p.Name == unlimited {
		f.identity = identity{} // each database has its own
	}
	return f
}

// What every tenant has from the start: a policy of every kind, and a key manager of our own.
const (
	unlimited = "Unlimited"
	resident  = "Resident Key Manager"
)

type scopeForm struct {
	Name        string `yaml:"name"`
	identity    `yaml:",inline"`
	DisplayName string   `yaml:"display_name,omitempty"`
	Description string   `yaml:"description,omitempty"`
	Roles       []string `yaml:"roles,omitempty"`
}

func (f *scopeForm) entity() *catalog.Scope {
	return &catalog.Scope{Name: f.Name, DisplayName: f.DisplayName, Description: f.Description, Roles: f.Roles}
}

func (f *scopeForm) check() error { return f.with(f.entity().Validate()) }

func scopeOf(s *catalog.Scope) scopeForm {
	return scopeForm{Name: s.Name, identity: identityOf(s), DisplayName: s.DisplayName, Description: s.Description, Roles: s.Roles}
}

type apiForm struct {
	Name           string `yaml:"name"`
	Version        string `yaml:"version"`
	identity       `yaml:",inline"`
	Context        string          `yaml:"context"`
	Provider       string          `yaml:"provider"`
	Type           string          `yaml:"type,omitempty"`
	Status         string          `yaml:"status,omitempty"`
	DefaultVersion bool            `yaml:"default_version,omitempty"`
	Policy         string          `yaml:"policy,omitempty"`
	SecurityScheme []string        `yaml:"security_scheme,omitempty"`
	GatewayLabels  []string        `yaml:"gateway_labels,omitempty"`
	Operations     []operationForm `yaml:"operations,omitempty"`
}

type operationForm struct {
	Target   string   `yaml:"target"`
	Verb     string   `yaml:"verb"`
	AuthType string   `yaml:"auth_type,omitempty"`
	Policy   string   `yaml:"policy,omitempty"`
	Scopes   []string `yaml:"scopes,omitempty"`
}

func (f *apiForm) setDefaults()       { f.Type, f.Status = "HTTP", catalog.APIPublished }
func (f *operationForm) setDefaults() { f.AuthType, f.Policy = "Any", unlimited }

func (f *apiForm) entity() *catalog.API {
	a := &catalog.API{
		Name: f.Name, Version: f.Version, Context: f.Context, Provider: f.Provider, Type: f.Type, Status: f.Status,
		DefaultVersion: f.DefaultVersion, Policy: f.Policy, SecurityScheme: f.SecurityScheme, GatewayLabels: f.GatewayLabels,
	}
	for _, o := range f.Operations {
		a.Operations = append(a.Operations, catalog.Operation(o))
	}
	return a
}

func (f *apiForm) check() error {
	found, _ := f.with(f.entity().Validate()).(catalog.Invalid)
	if strings.Contains(f.Version, ":") {
		found = append(found, catalog.FieldError{Pointer: "#/version", Detail: `must have no colon: subscriptions name an API by "name:version"`})
	}
	if len(found) == 0 {
		return nil
	}
	return found
}

func apiOf(a *catalog.API) apiForm {
	f := apiForm{
		Name: a.Name, Version: a.Version, identity: identityOf(a), Context: a.Context, Provider: a.Provider, Type: a.Type, Status: a.Status,
		DefaultVersion: a.DefaultVersion, Policy: a.Policy, SecurityScheme: a.SecurityScheme, GatewayLabels: a.GatewayLabels,
	}
	for _, o := range a.Operations {
		f.Operations = append(f.Operations, operationForm(o))
	}
	return f
}

type applicationForm struct {
	Name          string `yaml:"name"`
	Owner         string `yaml:"owner"`
	identity      `yaml:",inline"`
	Policy        string            `yaml:"policy,omitempty"`
	TokenType     string            `yaml:"token_type,omitempty"`
	Groups        []string          `yaml:"groups,omitempty"`
	Attributes    map[string]string `yaml:"attributes,omitempty"`
	SelfContained bool              `yaml:"self_contained,omitempty"`
	// Blocked is nil where it stays as it is.
	Blocked       *bool                  `yaml:"blocked,omitempty"`
	Keys          list[keyForm]          `yaml:"keys,omitempty"`
	Subscriptions list[subscriptionForm] `yaml:"subscriptions,omitempty"`
}

func (f *applicationForm) setDefaults() { f.Policy, f.TokenType = unlimited, "JWT" }

func (f *applicationForm) entity() *catalog.Application {
	return &catalog.Application{
		Name: f.Name, Owner: f.Owner, Policy: f.Policy, TokenType: f.TokenType, Groups: f.Groups, Attributes: f.Attributes,
		SelfContained: f.SelfContained,
	}
}

func (f *applicationForm) check() error { return f.with(f.entity().Validate()) }

func applicationOf(a *catalog.Application) applicationForm {
	return applicationForm{
		Name: a.Name, Owner: a.Owner, identity: identityOf(a), Policy: a.Policy, TokenType: a.TokenType, Groups: a.Groups,
		Attributes: a.Attributes, SelfContained: a.SelfContained, Blocked: &a.Blocked, Keys: list[keyForm]{}, Subscriptions: list[subscriptionForm]{},
	}
}

type keyForm struct {
	ConsumerKey string `yaml:"consumer_key"`
	identity    `yaml:",inline"`
	KeyType     string `yaml:"key_type,omitempty"`
	// KeyManager is empty for the tenant's own.
	KeyManager string `yaml:"key_manager,omitempty"`
	// Client is nil for a key that something else gives out.
	Client *clientForm `yaml:"client,omitempty"`
}

func (f *keyForm) setDefaults() { f.KeyType = catalog.Production }

func (f *keyForm) entity() *catalog.KeyMapping {
	return &catalog.KeyMapping{ConsumerKey: f.ConsumerKey, KeyType: f.KeyType, KeyManager: f.KeyManager, Generated: f.Client != nil}
}

func (f *keyForm) check() error {
	k := f.entity()
	if k.KeyManager == "" {
		k.KeyManager = "the tenant's own"
	}
	return f.with(k.Validate())
}

// clientForm is what a consumer key is registered with.
type clientForm struct {
	AuthMethod string `yaml:"auth_method,omitempty"`
	// JWKS is what its JSON would be.
	JWKS              map[string]any `yaml:"jwks,omitempty"`
	Scopes            []string       `yaml:"scopes,omitempty"`
	DefaultScopes     []string       `yaml:"default_scopes,omitempty"`
	Audience          []string       `yaml:"audience,omitempty"`
	TokenLifetime     int            `yaml:"token_lifetime,omitempty"`
	GrantTypes        list[string]   `yaml:"grant_types,omitempty"`
	TokenTyp          string         `yaml:"token_typ,omitempty"`
	ResourceAudiences []string       `yaml:"resource_audiences,omitempty"`
	RevokeByJTI       bool           `yaml:"revoke_by_jti,omitempty"`
	RevokeOpaque      bool           `yaml:"revoke_opaque,omitempty"`
	RevokeQuota       int            `yaml:"revoke_quota,omitempty"`
	// SecretEnv and SecretFile say where the secret of a client that is made is: a
	// variable of the environment, or a file, relative to the one that says so.
	SecretEnv  string `yaml:"secret_env,omitempty"`
	SecretFile string `yaml:"secret_file,omitempty"`
}

const (
	methodBasic = "client_secret_basic"
	methodKey   = "private_key_jwt"
	methodNone  = "none"

	accessTokenTyp = "at+jwt"
)

// hasSecret reports whether clients of a method have a secret.
func hasSecret(method string) bool { return method != methodKey && method != methodNone }

func (f *clientForm) setDefaults() {
	f.AuthMethod, f.GrantTypes, f.TokenTyp = methodBasic, list[string]{"client_credentials"}, accessTokenTyp
}

func (f *clientForm) registration() authn.Registration {
	r := authn.Registration{
		AuthMethod: f.AuthMethod, Scopes: f.Scopes, DefaultScopes: f.DefaultScopes, Audience: f.Audience,
		TokenLifetime: f.TokenLifetime, GrantTypes: f.GrantTypes, TokenTyp: f.TokenTyp, ResourceAudiences: f.ResourceAudiences,
		RevokeByJTI: f.RevokeByJTI, RevokeOpaque: f.RevokeOpaque, RevokeQuota: f.RevokeQuota,
	}
	if f.JWKS != nil {
		b, err := json.Marshal(f.JWKS) // in the form in which clients are registered with it
		if err != nil {
			panic(err) // what was decoded can be encoded
		}
		r.JWKS = string(b)
	}
	return r
}

func (f *clientForm) check() error {
	found, _ := f.registration().Validate().(catalog.Invalid)
	if f.SecretEnv != "" && f.SecretFile != "" {
		found = append(found, catalog.FieldError{Pointer: "#/secret_file", Detail: "and secret_env are both given: one is enough"})
	}
	if !hasSecret(f.AuthMethod) && (f.SecretEnv != "" || f.SecretFile != "") {
		found = append(found, catalog.FieldError{Pointer: "#/auth_method", Detail: "is " + f.AuthMethod + ": such a client has no secret"})
	}
	if len(found) == 0 {
		return nil
	}
	return found
}

func clientOf(r authn.Registration) *clientForm {
	f := &clientForm{
		AuthMethod: r.AuthMethod, Scopes: r.Scopes, DefaultScopes: r.DefaultScopes, Audience: r.Audience,
		TokenLifetime: r.TokenLifetime, GrantTypes: r.GrantTypes, TokenTyp: r.TokenTyp, ResourceAudiences: r.ResourceAudiences,
		RevokeByJTI: r.RevokeByJTI, RevokeOpaque: r.RevokeOpaque, RevokeQuota: r.RevokeQuota,
	}
	if r.JWKS != "" {
		if err := json.Unmarshal([]byte(r.JWKS), &f.JWKS); err != nil {
			panic(err) // it was valid when the client was made
		}
	}
	return f
}

type subscriptionForm struct {
	API      string `yaml:"api"` // name:version
	identity `yaml:",inline"`
	Policy   string `yaml:"policy,omitempty"`
	State    string `yaml:"state,omitempty"`
}

func (f *subscriptionForm) setDefaults() { f.Policy, f.State = unlimited, catalog.Unblocked }

func (f *subscriptionForm) entity() *catalog.Subscription {
	return &catalog.Subscription{Policy: f.Policy, State: f.State}
}

func (f *subscriptionForm) check() error {
	found, _ := f.with(f.entity().Validate()).(catalog.Invalid)
	if name, version, ok := cutLast(f.API, ":"); !ok || name == "" || version == "" {
		found = append(found, catalog.FieldError{Pointer: "#/api", Detail: `must name an API and its version, such as "PizzaShackAPI:1.0.0"`})
	}
	if len(found) == 0 {
		return nil
	}
	return found
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}
