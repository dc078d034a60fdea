package adminapi

import (
	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// A body is what a caller may say about an entity. What is left out is zero, and the
// catalog puts its default there.
type body interface {
	base() *identity
	// entity is the body as an entity, without its Meta.
	entity() catalog.Entity
}

// identity is which entity a body is about. All of it may be left out, but a tenant's
// domain where a tenant is made.
type identity struct {
	ID     int32             `json:"id"`
	UUID   string            `json:"uuid"`
	Tenant revocation.Tenant `json:"tenant"`
}

func (i *identity) base() *identity { return i }

func (i *identity) meta() catalog.Meta {
	return catalog.Meta{ID: i.ID, UUID: i.UUID, Tenant: i.Tenant}
}

type tenantBody struct {
	identity
	DisplayName string `json:"display_name"`
}

func (b *tenantBody) entity() catalog.Entity { return &catalog.Tenant{DisplayName: b.DisplayName} }

type keyManagerBody struct {
	identity
	Name             string                 `json:"name"`
	DisplayName      string                 `json:"display_name"`
	Description      string                 `json:"description"`
	Type             string                 `json:"type"`
	Enabled          bool                   `json:"enabled"`
	Iss              string                 `json:"iss"`
	MaxTokenLifetime int32                  `json:"max_token_lifetime"`
	JWKSURI          string                 `json:"jwks_uri"`
	Algorithms       []string               `json:"algorithms"`
	AllowTyp         []string               `json:"allow_typ"`
	ConsumerKeyClaim string                 `json:"consumer_key_claim"`
	ScopesClaim      string                 `json:"scopes_claim"`
	ClaimMappings    []catalog.ClaimMapping `json:"claim_mappings"`
	TokenType        string                 `json:"token_type"`
	Properties       map[string]any         `json:"properties"`
}

func (b *keyManagerBody) entity() catalog.Entity {
	return &catalog.KeyManager{
		Name: b.Name, DisplayName: b.DisplayName, Description: b.Description, Type: b.Type, Enabled: b.Enabled, Iss: b.Iss,
		MaxTokenLifetime: b.MaxTokenLifetime, JWKSURI: b.JWKSURI, Algorithms: b.Algorithms, AllowTyp: b.AllowTyp,
		ConsumerKeyClaim: b.ConsumerKeyClaim, ScopesClaim: b.ScopesClaim, ClaimMappings: b.ClaimMappings,
		TokenType: b.TokenType, Properties: b.Properties,
	}
}

// policyBody has its kind from the path.
type policyBody struct {
	identity
	Kind                 string `json:"kind"`
	Name                 string `json:"name"`
	DisplayName          string `json:"display_name"`
	Description          string `json:"description"`
	QuotaType            string `json:"quota_type"`
	Quota                int64  `json:"quota"`
	UnitTime             int32  `json:"unit_time"`
	TimeUnit             string `json:"time_unit"`
	RateLimitCount       int32  `json:"rate_limit_count"`
	RateLimitTimeUnit    string `json:"rate_limit_time_unit"`
	StopOnQuotaReach     bool   `json:"stop_on_quota_reach"`
	GraphQLMaxDepth      int32  `json:"graphql_max_depth"`
	GraphQLMaxComplexity int32  `json:"graphql_max_complexity"`
	Level                string `json:"level"`
}

func (b *policyBody) entity() catalog.Entity {
	return &catalog.Policy{
		Kind: b.Kind, Name: b.Name, DisplayName: b.DisplayName, Description: b.Description,
		QuotaType: b.QuotaType, Quota: b.Quota, UnitTime: b.UnitTime, TimeUnit: b.TimeUnit,
		RateLimitCount: b.RateLimitCount, RateLimitTimeUnit: b.RateLimitTimeUnit, StopOnQuotaReach: b.StopOnQuotaReach,
		GraphQLMaxDepth: b.GraphQLMaxDepth, GraphQLMaxComplexity: b.GraphQLMaxComplexity, Level: b.Level,
	}
}

type scopeBody struct {
	identity
	Name        string   `json:"name"`
	DisplayName string   `json:"display_name"`
	Description string   `json:"description"`
	Roles       []string `json:"roles"`
}

func (b *scopeBody) entity() catalog.Entity {
	return &catalog.Scope{Name: b.Name, DisplayName: b.DisplayName, Description: b.Description, Roles: b.Roles}
}

type apiBody struct {
	identity
	Name           string              `json:"name"`
	Version        string              `json:"version"`
	Context        string              `json:"context"`
	Provider       string              `json:"provider"`
	Type           string              `json:"type"`
	Status         string              `json:"status"`
	DefaultVersion bool                `json:"default_version"`
	Policy         string              `json:"policy"`
	SecurityScheme []string            `json:"security_scheme"`
	GatewayLabels  []string            `json:"gateway_labels"`
	Operations     []catalog.Operation `json:"operations"`
}

func (b *apiBody) entity() catalog.Entity {
	return &catalog.API{
		Name: b.Name, Version: b.Version, Context: b.Context, Provider: b.Provider, Type: b.Type, Status: b.Status,
		DefaultVersion: b.DefaultVersion, Policy: b.Policy, SecurityScheme: b.SecurityScheme,
		GatewayLabels: b.GatewayLabels, Operations: b.Operations,
	}
}

type applicationBody struct {
	identity
	Name          string            `json:"name"`
	Owner         string            `json:"owner"`
	Policy        string            `json:"policy"`
	TokenType     string            `json:"token_type"`
	Groups        []string          `json:"groups"`
	Attributes    map[string]string `json:"attributes"`
	SelfContained bool              `json:"self_contained"`
}

func (b *applicationBody) entity() catalog.Entity {
	return &catalog.Application{
		Name: b.Name, Owner: b.Owner, Policy: b.Policy, TokenType: b.TokenType, Groups: b.Groups, Attributes: b.Attributes,
		SelfContained: b.SelfContained,
	}
}

type subscriptionBody struct {
	identity
	Application catalog.Ref `json:"application"`
	API         catalog.Ref `json:"api"`
	Policy      string      `json:"policy"`
	State       string      `json:"state"`
}

func (b *subscriptionBody) entity() catalog.Entity {
	return &catalog.Subscription{Application: b.Application, API: b.API, Policy: b.Policy, State: b.State}
}
