package catalog

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// FieldError is what is wrong with one member. Neither text repeats the value.
type FieldError struct {
	// Pointer is a JSON pointer in fragment form, for example "#/operations/0/verb".
	Pointer string `json:"pointer"`
	Detail  string `json:"detail"`
}

// Invalid is everything that is wrong with a value from outside. It is safe to show
// to the caller.
type Invalid []FieldError

// Error lists all members that are wrong.
func (e Invalid) Error() string {
	parts := make([]string, len(e))
	for i, f := range e {
		parts[i] = f.Pointer + ": " + f.Detail
	}
	return strings.Join(parts, "; ")
}

// The longest texts, in bytes, and the largest lists.
const (
	maxText        = 255
	maxDescription = 1024
	maxList        = 100
	maxAttributes  = 64
)

// checker collects what is wrong.
type checker struct{ found Invalid }

func (c *checker) err() error {
	if len(c.found) == 0 {
		return nil
	}
	return c.found
}

func (c *checker) add(pointer, format string, args ...any) {
	c.found = append(c.found, FieldError{Pointer: "#/" + pointer, Detail: fmt.Sprintf(format, args...)})
}

func (c *checker) text(pointer, s string) {
	if s == "" {
		c.add(pointer, "must not be empty")
		return
	}
	c.optional(pointer, s, maxText)
}

func (c *checker) optional(pointer, s string, limit int) {
	switch {
	case len(s) > limit:
		c.add(pointer, "has %d bytes, must be at most %d", len(s), limit)
	case !utf8.ValidString(s):
		c.add(pointer, "must be UTF-8")
	case strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || 0x7f <= r && r < 0xa0 }):
		c.add(pointer, "must have no control characters")
	}
}

func (c *checker) oneOf(pointer, s string, allowed ...string) {
	if !slices.Contains(allowed, s) {
		c.add(pointer, "must be one of %s", strings.Join(allowed, ", "))
	}
}

func (c *checker) texts(pointer string, list []string) {
	if len(list) > maxList {
		c.add(pointer, "has %d items, must be at most %d", len(list), maxList)
		return
	}
	for i, s := range list {
		c.text(fmt.Sprintf("%s/%d", pointer, i), s)
		if slices.Contains(list[:i], s) {
			c.add(fmt.Sprintf("%s/%d", pointer, i), "is there twice")
		}
	}
}

func (c *checker) number(pointer string, n, low, high int64) {
	if n < low || n > high {
		c.add(pointer, "must be %d to %d", low, high)
	}
}

// ValidDomain reports whether s can be the domain of a tenant.
func ValidDomain(s string) bool { return domain.MatchString(s) }

var (
	domain  = regexp.MustCompile(`^[a-z0-9.-]{1,200}$`)
	context = regexp.MustCompile(`^(/[A-Za-z0-9._~!$&'()*+,;=:@%{}-]+)+$`)
	label   = regexp.MustCompile(`^[^|]+$`)
	verb    = regexp.MustCompile(`^[A-Z]{1,32}$`)
)

func isUUID(s string) bool {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return false
	}
	digits := strings.ReplaceAll(s, "-", "")
	return len(digits) == 32 && strings.Trim(digits, "0123456789abcdef") == ""
}

// Validate implements [Entity]. A tenant's domain is a matter of Meta, see [ValidDomain].
func (t *Tenant) Validate() error {
	var c checker
	c.optional("display_name", t.DisplayName, maxText)
	return c.err()
}

// Validate implements [Entity].
func (a *API) Validate() error {
	var c checker
	c.text("name", a.Name)
	c.text("version", a.Version)
	c.text("context", a.Context)
	if a.Context != "" && !context.MatchString(a.Context) {
		c.add("context", "must be a path such as /pizza/1.0.0")
	}
	c.text("provider", a.Provider)
	c.oneOf("type", a.Type, "HTTP", "WS", "GRAPHQL", "SOAP", "SOAPTOREST", "SSE", "WEBSUB", "WEBHOOK", "ASYNC", "GRPC")
	c.oneOf("status", a.Status, APICreated, APIPrototyped, APIPublished, APIBlocked, APIDeprecated, APIRetired)
	c.optional("policy", a.Policy, maxText)
	c.texts("security_scheme", a.SecurityScheme)
	c.texts("gateway_labels", a.GatewayLabels)
	for i, s := range a.GatewayLabels {
		if s != "" && !label.MatchString(s) {
			c.add(fmt.Sprintf("gateway_labels/%d", i), "must have no |")
		}
	}
	if len(a.Operations) > 1000 {
		c.add("operations", "has %d items, must be at most 1000", len(a.Operations))
		return c.err()
	}
	for i, op := range a.Operations {
		at := func(member string) string { return fmt.Sprintf("operations/%d/%s", i, member) }
		c.text(at("target"), op.Target)
		if op.Target != "" && op.Target[0] != '/' && a.Type != "GRAPHQL" && a.Type != "GRPC" && a.Type != "WS" && a.Type != "ASYNC" {
			c.add(at("target"), "must begin with /")
		}
		if !verb.MatchString(op.Verb) {
			c.add(at("verb"), "must be capital letters, for example GET")
		}
		c.oneOf(at("auth_type"), op.AuthType, "Any", "None", "Application", "Application_User", "Application & Application User")
		c.optional(at("policy"), op.Policy, maxText)
		c.texts(at("scopes"), op.Scopes)
		if slices.ContainsFunc(a.Operations[:i], func(o Operation) bool { return o.Target == op.Target && o.Verb == op.Verb }) {
			c.add(fmt.Sprintf("operations/%d", i), "is there twice")
		}
	}
	return c.err()
}

// Validate implements [Entity].
func (a *Application) Validate() error {
	var c checker
	c.text("name", a.Name)
	c.text("owner", a.Owner)
	c.text("policy", a.Policy)
	c.oneOf("token_type", a.TokenType, "JWT", "OAUTH")
	if a.SelfContained && a.TokenType == "OAUTH" {
		c.add("self_contained", "must be false where token_type is OAUTH: only a JWT carries claims")
	}
	c.texts("groups", a.Groups)
	if len(a.Attributes) > maxAttributes {
		c.add("attributes", "has %d members, must be at most %d", len(a.Attributes), maxAttributes)
		return c.err()
	}
	for _, name := range slices.Sorted(maps.Keys(a.Attributes)) {
		at := "attributes/" + escape(name)
		c.text(at, name)
		c.optional(at, a.Attributes[name], maxDescription)
	}
	return c.err()
}

// escape is RFC 6901's, of a name that may be long and strange.
func escape(name string) string {
	if len(name) > maxText || !utf8.ValidString(name) {
		return "*"
	}
	return url.PathEscape(strings.NewReplacer("~", "~0", "/", "~1").Replace(name))
}

// Validate implements [Entity].
func (k *KeyMapping) Validate() error {
	var c checker
	c.text("consumer_key", k.ConsumerKey)
	c.oneOf("key_type", k.KeyType, Production, Sandbox)
	c.text("key_manager", k.KeyManager)
	return c.err()
}

// Validate implements [Entity].
func (s *Subscription) Validate() error {
	var c checker
	c.text("policy", s.Policy)
	c.oneOf("state", s.State, Unblocked, Blocked, ProdOnlyBlocked, OnHold, Rejected, TierUpdatePending)
	return c.err()
}

// Validate implements [Entity].
func (p *Policy) Validate() error {
	var c checker
	c.oneOf("kind", p.Kind, PolicySubscription, PolicyApplication, PolicyAPI)
	c.text("name", p.Name)
	c.optional("display_name", p.DisplayName, maxText)
	c.optional("description", p.Description, maxDescription)
	c.oneOf("quota_type", p.QuotaType, "requestCount", "bandwidthVolume", "eventCount", "aiApiQuota")
	c.number("quota", p.Quota, 0, 1<<53)
	if p.Quota > 0 {
		c.number("unit_time", int64(p.UnitTime), 1, 1<<31-1)
		c.oneOf("time_unit", p.TimeUnit, "min", "hour", "day", "month", "year")
	} else if p.UnitTime != 0 || p.TimeUnit != "" {
		c.add("quota", "must be at least 1 where there is a unit_time or a time_unit")
	}
	if p.Kind == PolicySubscription {
		c.number("rate_limit_count", int64(p.RateLimitCount), 0, 1<<31-1)
		if p.RateLimitCount > 0 {
			c.oneOf("rate_limit_time_unit", p.RateLimitTimeUnit, "sec", "min")
		} else if p.RateLimitTimeUnit != "" {
			c.add("rate_limit_count", "must be at least 1 where there is a rate_limit_time_unit")
		}
		c.number("graphql_max_depth", int64(p.GraphQLMaxDepth), 0, 1<<31-1)
		c.number("graphql_max_complexity", int64(p.GraphQLMaxComplexity), 0, 1<<31-1)
	} else if p.RateLimitCount != 0 || p.RateLimitTimeUnit != "" || p.StopOnQuotaReach || p.GraphQLMaxDepth != 0 || p.GraphQLMaxComplexity != 0 {
		c.add("kind", "must be subscription for a policy with a rate limit, stop_on_quota_reach or a GraphQL limit")
	}
	if p.Kind == PolicyAPI {
		c.oneOf("level", p.Level, "apiLevel", "resourceLevel")
	} else if p.Level != "" {
		c.add("level", "is for policies of kind api")
	}
	return c.err()
}

// Validate implements [Entity].
func (s *Scope) Validate() error {
	var c checker
	c.text("name", s.Name)
	if strings.ContainsFunc(s.Name, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
		c.add("name", `must be printable ASCII without space, " and \ (RFC 6749, section 3.3)`)
	}
	c.optional("display_name", s.DisplayName, maxText)
	c.optional("description", s.Description, maxDescription)
	c.texts("roles", s.Roles)
	return c.err()
}

// maxPropertiesBytes bounds what WSO2's gateways are passed on.
const maxPropertiesBytes = 16 << 10

// Validate implements [Entity].
func (k *KeyManager) Validate() error {
	var c checker
	c.text("name", k.Name)
	c.optional("display_name", k.DisplayName, maxText)
	c.optional("description", k.Description, maxDescription)
	c.text("type", k.Type)
	c.text("iss", k.Iss)
	c.number("max_token_lifetime", int64(k.MaxTokenLifetime), 1, 315360000)
	c.optional("jwks_uri", k.JWKSURI, maxDescription)
	switch u, err := url.Parse(k.JWKSURI); {
	case k.JWKSURI == "":
	case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.User != nil:
		c.add("jwks_uri", "must be a URL such as https://idp.example.com/jwks, without a user")
	case u.RawQuery != "" || u.ForceQuery:
		c.add("jwks_uri", "must have no query") // it may be a secret, and is published
	}
	c.texts("algorithms", k.Algorithms)
	for i, alg := range k.Algorithms {
		c.oneOf(fmt.Sprintf("algorithms/%d", i), alg, "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
	}
	c.texts("allow_typ", k.AllowTyp)
	c.optional("consumer_key_claim", k.ConsumerKeyClaim, maxText)
	c.optional("scopes_claim", k.ScopesClaim, maxText)
	if len(k.ClaimMappings) > maxList {
		c.add("claim_mappings", "has %d items, must be at most %d", len(k.ClaimMappings), maxList)
	} else {
		for i, m := range k.ClaimMappings {
			c.text(fmt.Sprintf("claim_mappings/%d/remote", i), m.Remote)
			c.text(fmt.Sprintf("claim_mappings/%d/local", i), m.Local)
		}
	}
	c.oneOf("token_type", k.TokenType, "DIRECT", "EXCHANGED", "BOTH")
	c.properties(k.Properties)
	return c.err()
}

func (c *checker) properties(given map[string]any) {
	var properties map[string]any
	b, err := json.Marshal(given)
	if err == nil {
		err = json.Unmarshal(b, &properties) // numbers and lists of one type each
	}
	switch {
	case err != nil || len(b) > maxPropertiesBytes:
		c.add("properties", "must be at most %d bytes as JSON", maxPropertiesBytes)
		return
	case hasNUL(properties):
		c.add("properties", "must have no NUL character") // the database cannot store one
		return
	}
	for _, name := range slices.Sorted(maps.Keys(properties)) {
		at, value := "properties/"+escape(name), properties[name]
		known, ok := gatewayTypes[folded(name)]
		switch {
		case IsReservedProperty(name):
			c.add(at, "must be left out: gateways are told what the key manager's own members say")
			continue
		case ok && known == aBool && !is[bool](value):
			c.add(at, "must be true or false")
			continue
		case ok && known == aText && !is[string](value):
			c.add(at, "must be a string")
			continue
		case ok && known == texts && !isTexts(value):
			c.add(at, "must be an array of strings")
			continue
		}
		c.noNull(at, value)
	}
}

// reserved are the properties by which WSO2's gateways know an issuer, and where they fetch its
// keys. Each says what a member of the key manager does, or nothing that a caller may choose.
var reserved = []string{
	"issuer", "self_validate_jwt", "certificate_type", "certificate_value", "jwks_endpoint",
	"consumer_key_claim", "scopes_claim", "claim_mappings",
}

// IsReservedProperty reports whether a gateway, which may read names without regard to their
// case, would take name for one of the properties that [KeyManager.Properties] cannot have:
// issuer, self_validate_jwt, certificate_type, certificate_value, jwks_endpoint,
// consumer_key_claim, scopes_claim and claim_mappings.
func IsReservedProperty(name string) bool { return slices.Contains(reserved, folded(name)) }

// folded is name as gateways in Go compare it, to which some letters outside ASCII are the same
// as one within.
func folded(name string) string { return strings.ToLower(strings.ToUpper(name)) }

// gatewayTypes are the JSON types that WSO2's gateways assert of properties, by their folded
// names: a value of another type ends the process of a gateway in Go.
var gatewayTypes = map[string]propertyType{
	"enable_oauth_app_creation":      aBool,
	"enable_map_oauth_consumer_apps": aBool,
	"enable_token_generation":        aBool,
	"enable_token_hash":              aBool,
	"enable_token_encryption":        aBool,
	"validation_enable":              aBool,
	"grant_types":                    texts,
	"serverurl":                      aText,
	"revokeurl":                      aText,
	"token_endpoint":                 aText,
	"revoke_endpoint":                aText,
	"token_format_string":            aText,
	"validity_period":                aText,
}

type propertyType int

const (
	aBool propertyType = iota
	aText
	texts
)

func is[T any](v any) bool { _, ok := v.(T); return ok }

func isTexts(v any) bool {
	list, ok := v.([]any)
	return ok && !slices.ContainsFunc(list, func(v any) bool { return !is[string](v) })
}

// noNull adds every null in v.
func (c *checker) noNull(at string, v any) {
	switch v := v.(type) {
	case nil:
		c.add(at, "must not be null")
	case []any:
		for i, item := range v {
			c.noNull(fmt.Sprintf("%s/%d", at, i), item)
		}
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			c.noNull(at+"/"+escape(name), v[name])
		}
	}
}

// hasNUL reports whether a name or a text in v, which JSON was decoded into, has a NUL.
func hasNUL(v any) bool {
	switch v := v.(type) {
	case string:
		return strings.ContainsRune(v, 0)
	case []any:
		return slices.ContainsFunc(v, hasNUL)
	case map[string]any:
		for name, value := range v {
			if hasNUL(name) || hasNUL(value) {
				return true
			}
		}
	}
	return false
}
