package manifest

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"

	"go.yaml.in/yaml/v4"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// applicationsPerDocument keeps a document's syntax tree small for whoever reads it.
const applicationsPerDocument = 1000

const exportHead = `# Written by rescind export. Applied to an empty database it makes the same catalog, with
# the same ids. Keys that have a client get a new secret there: secrets are not exported.
`

// Export writes s so that applying it, pruning, makes s again: every list is there.
func Export(w io.Writer, s *State) error {
	if _, err := io.WriteString(w, exportHead); err != nil {
		return fmt.Errorf("write the catalog: %w", err)
	}
	return dump(w, s.documents())
}

// dump writes documents so that [parse] reads the same.
func dump(w io.Writer, docs []document) error {
	if len(docs) == 0 {
		return nil // the dumper would not know how to close
	}
	dumper, err := yaml.NewDumper(w, yaml.WithIndent(2), yaml.WithLineWidth(-1), yaml.WithFlowSimpleCollections(), yaml.WithQuotePreference(yaml.QuoteDouble))
	if err != nil {
		panic(err) // the options are constants
	}
	for i := range docs {
		if err := dumper.Dump(&docs[i]); err != nil {
			return fmt.Errorf("write the catalog: %w", err)
		}
	}
	if err := dumper.Close(); err != nil {
		return fmt.Errorf("write the catalog: %w", err)
	}
	return nil
}

// documents are s in the form of files.
func (s *State) documents() []document {
	tenants := byID(maps.Values(s.tenants), func(t *tenantState) catalog.Entity { return t.tenant })
	var made document
	var docs []document
	for _, t := range tenants {
		f := tenantOf(t.tenant)
		if f.Domain == revocation.SuperTenant.Domain {
			f.identity = identity{} // every database has it already
		}
		made.Tenants = append(made.Tenants, f)
		docs = append(docs, s.documentsOf(t)...)
	}
	return append([]document{made}, docs...)
}

func (s *State) documentsOf(t *tenantState) []document {
	domain := t.tenant.Tenant.Domain
	doc := document{
		Tenant: domain, KeyManagers: list[keyManagerForm]{}, Scopes: list[scopeForm]{}, APIs: list[apiForm]{},
		Policies: &policiesForm{Subscription: list[policyForm]{}, Application: list[policyForm]{}, API: list[policyForm]{}},
	}
	for _, k := range byID(maps.Values(t.keyManagers), entityOf) {
		doc.KeyManagers = append(doc.KeyManagers, keyManagerOf(k))
	}
	for _, p := range byID(maps.Values(t.policies), entityOf) {
		of := doc.Policies.of(p.Kind)
		*of = append(*of, policyOf(p))
	}
	for _, scope := range byID(maps.Values(t.scopes), entityOf) {
		doc.Scopes = append(doc.Scopes, scopeOf(scope))
	}
	apiKeys := make(map[string]string, len(t.apis))
	for _, a := range byID(maps.Values(t.apis), entityOf) {
		doc.APIs = append(doc.APIs, apiOf(a))
		apiKeys[a.UUID] = a.Name + ":" + a.Version
	}
	applications := byID(maps.Values(t.applications), func(a *applicationState) catalog.Entity { return a.Application })
	if len(applications) == 0 {
		doc.Applications = list[applicationForm]{}
	}
	docs := []document{doc}
	for chunk := range slices.Chunk(applications, applicationsPerDocument) {
		part := document{Tenant: domain}
		for _, a := range chunk {
			part.Applications = append(part.Applications, s.applicationOf(a, apiKeys))
		}
		docs = append(docs, part)
	}
	return docs
}

func (s *State) applicationOf(a *applicationState, apiKeys map[string]string) applicationForm {
	f := applicationOf(a.Application)
	for _, k := range byID(slices.Values(a.keys), entityOf) {
		kf := keyForm{ConsumerKey: k.ConsumerKey, identity: identityOf(k), KeyType: k.KeyType, KeyManager: k.KeyManager}
		if r, ok := s.clients[k.ConsumerKey]; ok && k.Generated {
			kf.Client = clientOf(r)
		}
		f.Keys = append(f.Keys, kf)
	}
	for _, sub := range byID(maps.Values(a.subscriptions), entityOf) {
		f.Subscriptions = append(f.Subscriptions, subscriptionForm{
			API: apiKeys[sub.API.UUID], identity: identityOf(sub), Policy: sub.Policy, State: sub.State,
		})
	}
	return f
}

func entityOf[E catalog.Entity](e E) catalog.Entity { return e }

// byID sorts what there is by its id, after what came with its tenant, whose id nobody chose.
func byID[T any](all func(func(T) bool), entity func(T) catalog.Entity) []T {
	return slices.SortedFunc(all, func(a, b T) int {
		x, y := entity(a), entity(b)
		return cmp.Or(cmp.Compare(chosen(x), chosen(y)), cmp.Compare(x.Base().ID, y.Base().ID))
	})
}

// chosen is 0 for what comes with its tenant, else 1.
func chosen(e catalog.Entity) int {
	switch e := e.(type) {
	case *catalog.KeyManager:
		if e.Resident {
			return 0
		}
	case *catalog.Policy:
		if e.Name == unlimited {
			return 0
		}
	}
	return 1
}
