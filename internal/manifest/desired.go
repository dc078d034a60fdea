package manifest

import (
	"maps"
	"slices"
	"strings"

	"github.com/rescindhq/rescind/api/catalog"
)

// Desired is what files say, each thing once. It is not changed by what it is given to.
type Desired struct {
	tenants map[string]*desiredTenant // by domain
}

// desiredTenant is what is said about a tenant.
type desiredTenant struct {
	domain string
	at     Place
	// made is the item of a list of tenants, nil if it is in none.
	made *tenantForm
	// given are the nouns that there is a list of; of policies "policy/<kind>".
	given        map[string]bool
	keyManagers  map[string]*keyManagerForm // by name
	policies     map[string]*policyForm     // by kind/name
	scopes       map[string]*scopeForm      // by name
	apis         map[string]*apiForm        // by name:version
	applications map[string]*applicationForm
	// order has the keys of each noun in the order of the files.
	order map[catalog.Noun][]string
}

func newDesired() *Desired { return &Desired{tenants: make(map[string]*desiredTenant)} }

// Tenants are the domains that the files name, sorted.
func (w *Desired) Tenants() []string { return slices.Sorted(maps.Keys(w.tenants)) }

func (w *Desired) tenant(domain string, at Place) *desiredTenant {
	t := w.tenants[domain]
	if t == nil {
		t = &desiredTenant{
			domain: domain, at: at, given: make(map[string]bool),
			keyManagers: make(map[string]*keyManagerForm), policies: make(map[string]*policyForm), scopes: make(map[string]*scopeForm),
			apis: make(map[string]*apiForm), applications: make(map[string]*applicationForm), order: make(map[catalog.Noun][]string),
		}
		w.tenants[domain] = t
	}
	return t
}

// add adds what doc says, which it keeps, and reports what is there already.
func (w *Desired) add(doc *document, found *Mistakes) {
	for i := range doc.Tenants {
		f := &doc.Tenants[i]
		t := w.tenant(f.Domain, f.at)
		if t.made != nil {
			found.Add(f.at, "tenant %q is listed twice, first at %s: leave one", f.Domain, t.made.at)
			continue
		}
		t.made = f
	}
	lists := map[string]bool{
		string(catalog.NounKeyManager): doc.KeyManagers != nil, string(catalog.NounScope): doc.Scopes != nil,
		string(catalog.NounAPI): doc.APIs != nil, string(catalog.NounApplication): doc.Applications != nil,
	}
	if doc.Policies != nil {
		for _, kind := range policyKinds {
			lists[policyList(kind)] = *doc.Policies.of(kind) != nil
		}
	}
	if !slices.Contains(slices.Collect(maps.Values(lists)), true) {
		return // it names no tenant, carbon.super either
	}
	t := w.tenant(doc.Tenant, doc.at)
	for name, given := range lists {
		if given {
			t.given[name] = true
		}
	}
	for i := range doc.KeyManagers {
		f := &doc.KeyManagers[i]
		enter(t, t.keyManagers, catalog.NounKeyManager, f.Name, f, found)
	}
	if doc.Policies != nil {
		for _, kind := range policyKinds {
			policies := *doc.Policies.of(kind)
			for i := range policies {
				f := &policies[i]
				enter(t, t.policies, catalog.NounPolicy, kind+"/"+f.Name, f, found)
			}
		}
	}
	for i := range doc.Scopes {
		f := &doc.Scopes[i]
		enter(t, t.scopes, catalog.NounScope, f.Name, f, found)
	}
	for i := range doc.APIs {
		f := &doc.APIs[i]
		enter(t, t.apis, catalog.NounAPI, f.Name+":"+f.Version, f, found)
	}
	for i := range doc.Applications {
		f := &doc.Applications[i]
		enter(t, t.applications, catalog.NounApplication, applicationKey(f.Owner, f.Name), f, found)
		f.twice(found)
	}
}

func policyList(kind string) string { return string(catalog.NounPolicy) + "/" + kind }

// applicationKey is what applications are told apart by in a tenant.
func applicationKey(owner, name string) string { return owner + "\x00" + name }

// twice reports what an application lists more than once.
func (f *applicationForm) twice(found *Mistakes) {
	subscribed := make(map[string]Place, len(f.Subscriptions))
	for i := range f.Subscriptions {
		s := &f.Subscriptions[i]
		if first, twice := subscribed[s.API]; twice {
			found.Add(s.at, "application %s subscribes to %s twice, first at %s: leave one", f.title(), quote(s.API), first)
		}
		subscribed[s.API] = s.at
	}
}

func (f *applicationForm) title() string { return f.Owner + "/" + f.Name }

func (i *identity) place() Place { return i.at }

func enter[F interface{ place() Place }](t *desiredTenant, into map[string]F, n catalog.Noun, key string, f F, found *Mistakes) {
	if first, twice := into[key]; twice {
		found.Add(f.place(), "%s is listed twice in tenant %s, first at %s: leave one", title(n, key), t.domain, first.place())
		return
	}
	into[key] = f
	t.order[n] = append(t.order[n], key)
}

// title is how people call the entity of a noun that has this key.
func title(n catalog.Noun, key string) string {
	word := strings.ReplaceAll(string(n), "_", " ")
	if n == catalog.NounAPI {
		word = "API"
	}
	return word + " " + strings.ReplaceAll(key, "\x00", "/")
}
