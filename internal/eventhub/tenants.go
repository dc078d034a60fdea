package eventhub

import (
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
)

// selection is the tenants that an answer is about.
type selection struct {
	all     bool
	domains []string // when not all; sorted
}

func (s selection) has(domain string) bool { return s.all || slices.Contains(s.domains, domain) }

// String tells selections apart: no domain has a comma or a star.
func (s selection) String() string {
	if s.all {
		return "*"
	}
	return strings.Join(s.domains, ",")
}

// seenBy are all tenants that an account sees.
func seenBy(a authn.Account) selection {
	if a.SeesAll() {
		return selection{all: true}
	}
	domains := append([]string{a.Tenant.Domain}, a.ExtraTenants...)
	slices.Sort(domains)
	return selection{domains: slices.Compact(domains)}
}

// allTenants is what gateways write for all tenants in place of a domain.
const allTenants = "ALL"

// query is what a request asks for. A parameter without a value counts as absent, as
// it does for WSO2.
type query struct {
	tenants selection
	values  url.Values
	// broken: some of it cannot be read, and so matches nothing.
	broken bool
}

// query reads r. unnamed are the tenants where r names none.
func (h *Hub) query(r *http.Request, unnamed func(authn.Account) selection) query {
	values, err := url.ParseQuery(r.URL.RawQuery)
	q := query{values: values, broken: err != nil}
	account := rest.AccountOf(r.Context())
	named := values.Get("organizationId")
	for _, header := range []string{"x-wso2-tenant", "xWSO2Tenant"} {
		if value := strings.TrimSpace(r.Header.Get(header)); value != "" {
			named = value
		}
	}
	switch {
	case named == "":
		q.tenants = unnamed(account)
	case strings.EqualFold(named, allTenants):
		q.tenants = seenBy(account)
	case account.Sees(strings.ToLower(named)):
		q.tenants = selection{domains: []string{strings.ToLower(named)}}
	default:
		h.metrics.foreign.Inc()
		h.log.Debug("a gateway asks for a tenant that its account does not see", "account", account.Username)
	}
	return q
}

// own is the account's own tenant.
func own(a authn.Account) selection { return selection{domains: []string{a.Tenant.Domain}} }

// has reports whether the parameter is there.
func (q *query) has(name string) bool { return q.values.Get(name) != "" }

// text reports whether value is what the parameter asks for, if it is there.
func (q *query) text(name, value string) bool { return !q.has(name) || q.values.Get(name) == value }

// number reports whether value is what the parameter asks for, if it is there.
func (q *query) number(name string, value int32) bool {
	if !q.has(name) {
		return true
	}
	n, err := strconv.ParseInt(q.values.Get(name), 10, 32)
	return err == nil && int32(n) == value
}

// id is the parameter as an id, 0 if it is none.
func (q *query) id(name string) int32 {
	n, err := strconv.ParseInt(q.values.Get(name), 10, 32)
	if err != nil {
		return 0
	}
	return int32(n)
}
