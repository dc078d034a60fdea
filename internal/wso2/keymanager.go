package wso2

import (
	"cmp"

	"github.com/rescindhq/rescind/api/catalog"
)

// residentJWKS is where our own token service publishes the key set of an issuer.
const residentJWKS = "/oauth2/jwks"

// keyManager is the payload of the topics of key managers (WSO2 contract, section 5).
// It has no tenantId: gateways disagree about its type.
type keyManager struct {
	EventType    string `json:"event_type"`
	Action       string `json:"action"`
	Name         string `json:"name"`
	Type         string `json:"type"`
	Enabled      bool   `json:"enabled"`
	Value        []byte `json:"value"` // a JSON object; what a gateway in Go cannot read as one ends its listener for ever
	TenantDomain string `json:"tenantDomain"`
	Organization string `json:"organization"`
	TokenType    string `json:"tokenType"`
}

func sayKeyManager(verb catalog.Verb, k *catalog.KeyManager) ([]told, error) {
	m := keyManager{
		EventType: "key_manager_configuration", Name: k.Name, Type: k.Type, Enabled: k.Enabled, Value: []byte("{}"),
		TenantDomain: k.Tenant.Domain, Organization: k.Tenant.Domain, TokenType: k.TokenType,
	}
	switch verb {
	case catalog.Created:
		m.Action = "add"
	case catalog.Deleted:
		m.Action = "delete"
	default:
		m.Action = "update"
	}
	if verb != catalog.Deleted {
		var err error
		if m.Value, err = marshal(KeyManagerProperties(k)); err != nil {
			return nil, err
		}
	}
	return []told{{TopicKeyManagerGo, m}, {TopicKeyManagerJava, m}}, nil
}

func (m keyManager) entries() []entry {
	return []entry{
		{"event_type", m.EventType},
		{"name", m.Name},
		{"tenantDomain", m.TenantDomain},
		{"action", m.Action},
		{"type", m.Type},
		{"enabled", m.Enabled},
		{"value", base64Of(m.Value)},
	}
}

// claimMapping has WSO2's names.
type claimMapping struct {
	RemoteClaim string `json:"remoteClaim"`
	LocalClaim  string `json:"localClaim"`
}

// KeyManagerProperties are what WSO2 calls the additional properties, or the
// configuration, of a key manager (WSO2 contract, section 5): those that we have a
// word for, and [catalog.KeyManager.Properties], without those that are reserved: rows of
// before may have them. A key manager without a JWKS has no certificate. The values have the
// JSON types that gateways assert; none is null, at any depth.
func KeyManagerProperties(k *catalog.KeyManager) map[string]any {
	mappings := make([]claimMapping, len(k.ClaimMappings))
	for i, m := range k.ClaimMappings {
		mappings[i] = claimMapping{RemoteClaim: m.Remote, LocalClaim: m.Local}
	}
	all := map[string]any{
		"self_validate_jwt":  true,
		"issuer":             k.Iss,
		"consumer_key_claim": cmp.Or(k.ConsumerKeyClaim, "azp"),
		"scopes_claim":       cmp.Or(k.ScopesClaim, "scope"),
		"claim_mappings":     mappings,
	}
	jwks := k.JWKSURI
	if jwks == "" && k.Resident {
		jwks = k.Iss + residentJWKS
	}
	if jwks != "" {
		all["certificate_type"], all["certificate_value"] = "JWKS", jwks
	}
	for name, value := range k.Properties {
		if value != nil && !catalog.IsReservedProperty(name) {
			all[name] = withoutNull(value)
		}
	}
	return all
}

// withoutNull is v, of JSON, without the members and items that are null. It leaves v
// as it is.
func withoutNull(v any) any {
	switch v := v.(type) {
	case map[string]any:
		kept := make(map[string]any, len(v))
		for name, value := range v {
			if value != nil {
				kept[name] = withoutNull(value)
			}
		}
		return kept
	case []any:
		kept := make([]any, 0, len(v))
		for _, value := range v {
			if value != nil {
				kept = append(kept, withoutNull(value))
			}
		}
		return kept
	}
	return v
}
