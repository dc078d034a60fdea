package eventhub

import (
	"cmp"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/internal/wso2"
)

// resources are what lies below dataBase, by path and method, but for the
// notifications. WSO2 contract, section 7.2; names that nobody reads from us answer the
// least that is valid.
var resources = map[string]map[string]func(*Hub, http.ResponseWriter, *http.Request) error{
	"subscriptions":            listed("subscriptions", subscriptions, "apiId", "appId", "apiUUID", "applicationUUID"),
	"applications":             listed("applications", applications, "appId"),
	"application-key-mappings": listed("application-key-mappings", keyMappings, "consumerKey", "keymanager"),
	"apis":                     listed("apis", apis, gatewayLabel, "context", "version", "apiId"),
	"application-policies":     listed("application-policies", applicationPolicies, policyName),
	"subscription-policies":    listed("subscription-policies", subscriptionPolicies, policyName),
	"api-policies":             listed("api-policies", apiPolicies, policyName),
	"scopes":                   listed("scopes", scopes, "scopeKey"),
	"keymanagers":              listed("keymanagers", keyManagers),
	"revokedjwt":               get((*Hub).revokedJWT),

	// Which applications are blocked is in the states of their subscriptions.
	"block":        get(constant(http.StatusOK, `{"api":[],"application":[],"user":[],"subscription":[],"custom":[],"ip":[]}`)),
	"keyTemplates": get(constant(http.StatusOK, `[]`)),

	"runtime-artifacts":        get((*Hub).artifacts),
	"retrieve-api-artifacts":   {http.MethodPost: constant(http.StatusNoContent, "")},
	"apis/deployed-revisions":  {http.MethodPatch: constant(http.StatusOK, "")},
	"apis/undeployed-revision": {http.MethodPost: constant(http.StatusOK, "")},
	"llm-providers":            get(constant(http.StatusOK, `{"llmProviders":[]}`)),
	"ga-config":                get(constant(http.StatusOK, `{"enabled":false}`)),
	"healthz":                  get(constant(http.StatusOK, `{}`)),
	"global-policies":          get(nothing),
	"runtime-metadata":         get(nothing),
	"gateway-policy-artifacts": get(nothing),
	"synapse-attributes":       get(nothing),
	"webhooks-subscriptions":   get(nothing),
	"api-logging-configs":      get(nothing),
	"endpoint-certificates":    get(nothing),
	"correlation-configs":      get(nothing),
	"llm-provider-configs":     get(nothing),
	"api-keys":                 get(nothing),
}

// The filters with a meaning beyond their name.
const (
	gatewayLabel = "gatewayLabel"
	policyName   = "policyName"
)

func (h *Hub) serveData(w http.ResponseWriter, r *http.Request) error {
	name, _ := below(single(r.URL.EscapedPath()), dataBase)
	methods, ok := resources[name]
	if !ok {
		return problem(http.StatusNotFound, "There is no such resource.")
	}
	serve, ok := methods[methodOf(r)]
	if !ok {
		var allowed []string
		for method := range methods {
			allowed = append(allowed, method)
		}
		return notAllowed(w, r, allowed)
	}
	return serve(h, w, r)
}

func get(serve func(*Hub, http.ResponseWriter, *http.Request) error) map[string]func(*Hub, http.ResponseWriter, *http.Request) error {
	return map[string]func(*Hub, http.ResponseWriter, *http.Request) error{http.MethodGet: serve}
}

func constant(status int, content string) func(*Hub, http.ResponseWriter, *http.Request) error {
	return func(h *Hub, w http.ResponseWriter, r *http.Request) error {
		if content == "" {
			w.WriteHeader(status)
			return nil
		}
		return h.send(w, r, &body{bytes: []byte(content)}, nil)
	}
}

var nothing = constant(http.StatusOK, `{"count":0,"list":[]}`)

// artifacts has none of what gateways deploy: Choreo Connect and the agents take 204
// for that, gateways in Java an error with these words.
func (h *Hub) artifacts(w http.ResponseWriter, r *http.Request) error {
	if r.URL.Query().Get("type") == "Envoy" {
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return problem(http.StatusNotFound, "No Api artifacts found")
}

// listed is a resource that lists entities of the catalog, taken from v by take.
func listed(name string, take func(v *replica.View, q *query) listing, filters ...string) map[string]func(*Hub, http.ResponseWriter, *http.Request) error {
	return get(func(h *Hub, w http.ResponseWriter, r *http.Request) error {
		h.untimed(w)
		q := h.query(r)
		if q.broken && len(filters) > 0 {
			q.tenants = selection{}
		}
		head, err := h.fresh(r.Context())
		if err != nil {
			return err
		}
		take := func() (l listing) {
			h.state.Replica().View(func(v *replica.View) {
				l = take(v, &q)
				l.at = v.At()
			})
			return l
		}
		wait, cancel := h.patience(r)
		defer cancel()
		// What gateways ask for when they start is kept; lookups of one entity are not.
		if !slices.ContainsFunc(filters, func(f string) bool { return f != gatewayLabel && q.has(f) }) {
			key := name + " " + q.tenants.String()
			if slices.Contains(filters, gatewayLabel) {
				key += " " + q.values.Get(gatewayLabel)
			}
			plain, packed, err := h.lists.get(wait, key, head, acceptsGzip(r), take)
			if err != nil {
				return err
			}
			return h.send(w, r, plain, packed)
		}
		done, err := h.encoding(wait)
		if err != nil {
			return err
		}
		found := take().encode(minPacked)
		done()
		return h.send(w, r, &body{bytes: found}, nil)
	})
}

// entities lists those of all that are of q's tenants and that match.
func entities[E catalog.Entity](q *query, all []E, match func(E) bool, row func(E) any) listing {
	found := all[:0]
	for _, e := range all {
		if q.tenants.has(e.Base().Tenant.Domain) && match(e) {
			found = append(found, e)
		}
	}
	l := listing{len: len(found), rows: func(add func(any)) {
		for _, e := range found {
			add(row(e))
		}
	}}
	s := newSum()
	for _, e := range found {
		s.add(e.Base())
	}
	l.sum = s.value()
	return l
}

// one is a list of e, if it is there.
func one[E comparable](e E) []E {
	var none E
	if e == none {
		return nil
	}
	return []E{e}
}

// owner is what many rows say about their tenant, in Choreo Connect's spelling.
type owner struct {
	TenantID     int32  `json:"tenanId"`
	TenantDomain string `json:"tenanDomain"`
	Timestamp    int64  `json:"timeStamp"`
}

func ownerOf(m *catalog.Meta) owner {
	return owner{m.Tenant.ID, m.Tenant.Domain, m.Timestamp}
}

// subscriptionRow has the UUIDs in the spellings of Choreo Connect and of the model
// that gateways in Java read snapshots with.
type subscriptionRow struct {
	ID                      int32  `json:"subscriptionId"`
	UUID                    string `json:"subscriptionUUID"`
	JavaUUID                string `json:"subscriptionUUId"`
	Policy                  string `json:"policyId"`
	APIID                   int32  `json:"apiId"`
	APIUUID                 string `json:"apiUUID"`
	JavaAPIUUID             string `json:"apiUUId"`
	ApplicationID           int32  `json:"appId"`
	ApplicationUUID         string `json:"applicationUUID"`
	JavaApplicationUUID     string `json:"appUUID"`
	State                   string `json:"subscriptionState"`
	APIName                 string `json:"apiName"`
	APIVersion              string `json:"apiVersion"`
	APIOrganization         string `json:"apiOrganization"`
	ApplicationOrganization string `json:"applicationOrganization"`
	owner
}

func subscriptions(v *replica.View, q *query) listing {
	var all []*catalog.Subscription
	if q.has("appId") || q.has("applicationUUID") {
		app := v.Application(q.values.Get("applicationUUID"))
		if app == nil {
			app = v.ApplicationByID(q.id("appId"))
		}
		if app != nil {
			all = v.SubscriptionsOf(app.UUID)
		}
	} else {
		all = v.Subscriptions()
	}
	// Names and versions of APIs never change, so the sum needs no API.
	var called []*catalog.API
	if len(all) < 100 {
		for _, s := range all {
			called = append(called, one(v.API(s.API.UUID))...)
		}
	} else {
		called = v.APIs()
	}
	byUUID := sync.OnceValue(func() map[string]*catalog.API {
		m := make(map[string]*catalog.API, len(called))
		for _, a := range called {
			m[a.UUID] = a
		}
		return m
	})
	return entities(q, all, func(s *catalog.Subscription) bool {
		return q.number("apiId", s.API.ID) && q.text("apiUUID", s.API.UUID) &&
			q.number("appId", s.Application.ID) && q.text("applicationUUID", s.Application.UUID)
	}, func(s *catalog.Subscription) any {
		row := subscriptionRow{
			ID: s.ID, UUID: s.UUID, JavaUUID: s.UUID, Policy: s.Policy,
			APIID: s.API.ID, APIUUID: s.API.UUID, JavaAPIUUID: s.API.UUID,
			ApplicationID: s.Application.ID, ApplicationUUID: s.Application.UUID, JavaApplicationUUID: s.Application.UUID,
			State: s.Effective(), APIOrganization: s.Tenant.Domain, ApplicationOrganization: s.Tenant.Domain,
			owner: ownerOf(&s.Meta),
		}
		if a := byUUID()[s.API.UUID]; a != nil {
			row.APIName, row.APIVersion = a.Name, a.Version
		}
		return row
	})
}

type applicationRow struct {
	UUID         string            `json:"uuid"`
	ID           int32             `json:"id"`
	Name         string            `json:"name"`
	Owner        string            `json:"subName"`
	Policy       string            `json:"policy"`
	TokenType    string            `json:"tokenType"`
	Attributes   map[string]string `json:"attributes"`
	Groups       []string          `json:"groupIds"` // empty: gateways differ in what they take for one
	Organization string            `json:"organization"`
	owner
}

func applications(v *replica.View, q *query) listing {
	all := one(v.ApplicationByID(q.id("appId")))
	if !q.has("appId") {
		all = v.Applications()
	}
	return entities(q, all, always, func(a *catalog.Application) any {
		row := applicationRow{
			UUID: a.UUID, ID: a.ID, Name: a.Name, Owner: a.Owner, Policy: a.Policy, TokenType: a.TokenType,
			Attributes: a.Attributes, Groups: []string{}, Organization: a.Tenant.Domain, owner: ownerOf(&a.Meta),
		}
		if row.Attributes == nil {
			row.Attributes = map[string]string{}
		}
		return row
	})
}

func always[E any](E) bool { return true }

type keyMappingRow struct {
	ApplicationID   int32  `json:"applicationId"`
	ApplicationUUID string `json:"applicationUUID"`
	ConsumerKey     string `json:"consumerKey"`
	KeyType         string `json:"keyType"`
	KeyManager      string `json:"keyManager"`
	owner
}

func keyMappings(v *replica.View, q *query) listing {
	var all []*catalog.KeyMapping
	if q.has("consumerKey") {
		all = v.KeyMappingsOf(q.values.Get("consumerKey"))
	} else {
		all = v.KeyMappings()
	}
	return entities(q, all, func(k *catalog.KeyMapping) bool {
		return q.text("keymanager", k.KeyManager)
	}, func(k *catalog.KeyMapping) any {
		return keyMappingRow{k.Application.ID, k.Application.UUID, k.ConsumerKey, k.KeyType, k.KeyManager, ownerOf(&k.Meta)}
	})
}

type apiRow struct {
	UUID           string       `json:"uuid"`
	ID             int32        `json:"apiId"`
	Name           string       `json:"name"`
	Version        string       `json:"version"`
	Provider       string       `json:"provider"`
	Context        string       `json:"context"`
	Policy         string       `json:"policy"`
	Type           string       `json:"apiType"`
	Status         string       `json:"status"`
	DefaultVersion bool         `json:"isDefaultVersion"`
	Organization   string       `json:"organization"`
	URLMappings    []urlMapping `json:"urlMappings"`
	owner
}

type urlMapping struct {
	Pattern  string   `json:"urlPattern"`
	Method   string   `json:"httpMethod"`
	AuthType string   `json:"authScheme"`
	Policy   string   `json:"throttlingPolicy"`
	Scopes   []string `json:"scopes"`
}

// unlimited is the policy of what has none.
const unlimited = "Unlimited"

func apis(v *replica.View, q *query) listing {
	var all []*catalog.API
	switch {
	case q.has("apiId"):
		if all = one(v.APIByID(q.id("apiId"))); all == nil {
			all = one(v.API(q.values.Get("apiId")))
		}
	case q.has("context") && q.has("version"):
		all = v.APIsByContext(q.values.Get("context"), q.values.Get("version"))
	default:
		all = v.APIs()
	}
	return entities(q, all, func(a *catalog.API) bool {
		// To a gateway in Java a RETIRED API is one that is not there.
		return a.Status != catalog.APIRetired && q.text("context", a.Context) && q.text("version", a.Version) &&
			(!q.has(gatewayLabel) || slices.Contains(a.GatewayLabels, q.values.Get(gatewayLabel)))
	}, func(a *catalog.API) any {
		row := apiRow{
			UUID: a.UUID, ID: a.ID, Name: a.Name, Version: a.Version, Provider: a.Provider, Context: a.Context, Policy: a.Policy,
			Type: a.Type, Status: a.Status, DefaultVersion: a.DefaultVersion, Organization: a.Tenant.Domain,
			URLMappings: make([]urlMapping, len(a.Operations)), owner: ownerOf(&a.Meta),
		}
		for i, op := range a.Operations {
			row.URLMappings[i] = urlMapping{op.Target, op.Verb, op.AuthType, cmp.Or(op.Policy, unlimited), orEmpty(op.Scopes)}
		}
		return row
	})
}

func orEmpty(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

// policyRow is what all kinds of policies have. Gateways in Java find one by its name
// and tenantId, which is spelt right here.
type policyRow struct {
	ID           int32  `json:"id"`
	TenantID     int32  `json:"tenantId"`
	TenantDomain string `json:"tenantDomain"`
	Name         string `json:"name"`
	QuotaType    string `json:"quotaType"`
}

type subscriptionPolicyRow struct {
	policyRow
	GraphQLMaxComplexity int32  `json:"graphQLMaxComplexity"`
	GraphQLMaxDepth      int32  `json:"graphQLMaxDepth"`
	RateLimitCount       int32  `json:"rateLimitCount"`
	RateLimitTimeUnit    string `json:"rateLimitTimeUnit"`
	StopOnQuotaReach     bool   `json:"stopOnQuotaReach"`
	DefaultLimit         limit  `json:"defaultLimit"`
}

type apiPolicyRow struct {
	policyRow
	Level           string   `json:"applicableLevel"`
	ConditionGroups []string `json:"conditionGroups"` // always empty
	DefaultLimit    limit    `json:"defaultLimit"`
}

// limit has one member beside the type of quota.
type limit struct {
	QuotaType string        `json:"quotaType"`
	Requests  *requestLimit `json:"requestCount,omitempty"`
	Bandwidth *dataLimit    `json:"bandwidth,omitempty"`
	Events    *eventLimit   `json:"eventCount,omitempty"`
	AIQuota   *requestLimit `json:"aiApiQuota,omitempty"`
}

type interval struct {
	TimeUnit string `json:"timeUnit"`
	UnitTime int32  `json:"unitTime"`
}

type requestLimit struct {
	interval
	Count int64 `json:"requestCount"`
}

type dataLimit struct {
	interval
	Amount int64  `json:"dataAmount"`
	Unit   string `json:"dataUnit"`
}

type eventLimit struct {
	interval
	Count int64 `json:"eventCount"`
}

// limitOf is the limit of p. Where there is none it is what WSO2 gives its Unlimited
// tier: the agents take an absent number for 0.
func limitOf(p *catalog.Policy) limit {
	quota, every := p.Quota, interval{p.TimeUnit, p.UnitTime}
	if quota == 0 {
		quota, every = math.MaxInt32, interval{"min", 1}
	}
	if p.Kind == catalog.PolicySubscription && (every.TimeUnit == "hour" || every.TimeUnit == "day") {
		every.TimeUnit += "s" // as WSO2 has it for this kind alone, and the agents know it
	}
	l := limit{QuotaType: p.QuotaType}
	switch p.QuotaType {
	case "bandwidthVolume":
		l.Bandwidth = &dataLimit{every, quota, "KB"}
	case "eventCount":
		l.Events = &eventLimit{every, quota}
	case "aiApiQuota":
		l.AIQuota = &requestLimit{every, quota}
	default:
		l.Requests = &requestLimit{every, quota}
	}
	return l
}

func policies(v *replica.View, q *query, kind string, row func(*catalog.Policy, policyRow) any) listing {
	return entities(q, v.Policies(), func(p *catalog.Policy) bool {
		return p.Kind == kind && q.text(policyName, p.Name)
	}, func(p *catalog.Policy) any {
		return row(p, policyRow{p.ID, p.Tenant.ID, p.Tenant.Domain, p.Name, p.QuotaType})
	})
}

func applicationPolicies(v *replica.View, q *query) listing {
	return policies(v, q, catalog.PolicyApplication, func(_ *catalog.Policy, row policyRow) any { return row })
}

func subscriptionPolicies(v *replica.View, q *query) listing {
	return policies(v, q, catalog.PolicySubscription, func(p *catalog.Policy, row policyRow) any {
		return subscriptionPolicyRow{
			row, p.GraphQLMaxComplexity, p.GraphQLMaxDepth, p.RateLimitCount, p.RateLimitTimeUnit, p.StopOnQuotaReach, limitOf(p),
		}
	})
}

func apiPolicies(v *replica.View, q *query) listing {
	return policies(v, q, catalog.PolicyAPI, func(p *catalog.Policy, row policyRow) any {
		return apiPolicyRow{row, p.Level, []string{}, limitOf(p)}
	})
}

type scopeRow struct {
	Name        string   `json:"name"`
	DisplayName string   `json:"displayName"`
	Description string   `json:"description"`
	Roles       []string `json:"roles"`
}

func scopes(v *replica.View, q *query) listing {
	return entities(q, v.Scopes(), func(s *catalog.Scope) bool {
		return q.text("scopeKey", s.Name)
	}, func(s *catalog.Scope) any {
		return scopeRow{s.Name, s.DisplayName, s.Description, orEmpty(s.Roles)}
	})
}

// keyManagerRow has what gateways before API Manager 4.1 and Choreo Connect read,
// tenantDomain and configuration, and what later ones do.
type keyManagerRow struct {
	UUID          string         `json:"uuid"`
	Name          string         `json:"name"`
	DisplayName   string         `json:"displayName"`
	Type          string         `json:"type"`
	Enabled       bool           `json:"enabled"`
	TenantDomain  string         `json:"tenantDomain"`
	Organization  string         `json:"organization"`
	TokenType     string         `json:"tokenType"`
	Configuration map[string]any `json:"configuration"`
	Properties    map[string]any `json:"additionalProperties"`
}

func keyManagers(v *replica.View, q *query) listing {
	l := entities(q, v.KeyManagers(), always, func(k *catalog.KeyManager) any {
		properties := wso2.KeyManagerProperties(k)
		return keyManagerRow{
			UUID: k.UUID, Name: k.Name, DisplayName: cmp.Or(strings.TrimSpace(k.DisplayName), k.Name), Type: k.Type, Enabled: k.Enabled,
			TenantDomain: k.Tenant.Domain, Organization: k.Tenant.Domain, TokenType: k.TokenType,
			Configuration: properties, Properties: properties,
		}
	})
	l.bare = true
	return l
}
