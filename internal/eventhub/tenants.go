package eventhub

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
)

// selection is the tenants that an answer is about.
type selection struct {
	all     bool
	domains []string // when not all; sorted
}

func (s selection) has(domain string) bool { return s.all || slices.Contains(s.domains, domain) }

// String tells selections apart.
func (s selection) String() string {
	if s.all {
		return "all"
	}
	return fmt.Sprintf("%q", s.domains)
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

// allTenants is what gateways write, in whatever case, for all tenants in place of a domain.
const allTenants = "all"

// query is what a request asks for. A parameter without a value counts as absent, as
// it does for WSO2.
type query struct {
	tenants selection
	values  url.Values
	// broken: some of it cannot be read, and so matches nothing.
	broken bool
}

// query reads r. It is about the account's own tenant where r names none, and about none
// where it names one that the account does not see.
func (h *Hub) query(r *http.Request) query {
	values, err := url.ParseQuery(r.URL.RawQuery)
	q := query{values: values, broken: err != nil}
	account := rest.AccountOf(r.Context())
	switch named := tenantOf(r, values); {
	case named == "":
		q.tenants = only(account.Tenant.Domain)
	case named == allTenants:
		q.tenants = seenBy(account)
	case catalog.ValidDomain(named) && account.Sees(named):
		q.tenants = only(named)
	default:
		h.foreign(account)
	}
	return q
}

// revocationsOf is whose revocations r is about: those of one tenant only if there is such
// a tenant and the account sees it. To be told of none would let tokens live.
func (h *Hub) revocationsOf(r *http.Request) selection {
	values, _ := url.ParseQuery(r.URL.RawQuery) // what can be read of it
	account := rest.AccountOf(r.Context())
	named := tenantOf(r, values)
	if named == "" || named == allTenants {
		return seenBy(account)
	}
	exists := false
	h.state.Replica().View(func(v *replica.View) { exists = v.Tenant(named) != nil })
	if !exists || !account.Sees(named) {
		h.foreign(account)
		return seenBy(account)
	}
	return only(named)
}

func (h *Hub) foreign(account authn.Account) {
	h.metrics.foreign.Inc()
	h.log.Debug("a gateway asks for a tenant that its account does not see", "account", account.Username)
}

// tenantOf is the domain that r names, in lower case, or allTenants, or empty.
func tenantOf(r *http.Request, values url.Values) string {
	named := values.Get("organizationId")
	for _, header := range []string{"x-wso2-tenant", "xWSO2Tenant"} {
		if value := strings.TrimSpace(r.Header.Get(header)); value != "" {
			named = value
		}
	}
	return strings.ToLower(named)
}

func only(domain string) selection { return selection{domains: []string{domain}} }

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
