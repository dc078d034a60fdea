package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
)

// Op is what a step does.
type Op string

// The ops. Block and unblock are of applications.
const (
	Create  Op = "create"
	Update  Op = "update"
	Block   Op = "block"
	Unblock Op = "unblock"
	Delete  Op = "delete"
)

// Ops are all ops.
var Ops = []Op{Create, Update, Block, Unblock, Delete}

// Step is one change of a plan.
type Step struct {
	Op     Op
	Noun   catalog.Noun
	Tenant string // domain
	// Name is what people know the entity by: "PizzaShackAPI:1.0.0".
	Name string
	// At is where a file says so. Deletes have none.
	At Place
	// Diff is what an update changes.
	Diff []Difference

	entity catalog.Entity
	// version is the timestamp that the plan saw, 0 of what there was not.
	version int64
	// builtIn: the entity comes to be with its tenant, which this plan makes.
	builtIn bool
	// weight is the most events that it makes.
	weight int
	// client is of a key that gets one, for this application. Without a secret it gets a
	// new one.
	client      *authn.Registration
	application *catalog.Application
}

// String is what is changed, for people.
func (s *Step) String() string { return title(s.Noun, s.Name) + " of tenant " + s.Tenant }

// Difference is a member that changes. Old and New are JSON; nil is no value.
type Difference struct {
	Member   string
	Old, New json.RawMessage
}

// Plan is what makes a catalog what files say, in order. It is for the state that it
// was made from.
type Plan struct {
	Steps []Step
	// Secrets is how many of its keys get a secret that is made.
	Secrets int
}

// Counts are the numbers of steps by noun and op.
func (p *Plan) Counts() map[catalog.Noun]map[Op]int {
	counts := make(map[catalog.Noun]map[Op]int)
	for i := range p.Steps {
		s := &p.Steps[i]
		if counts[s.Noun] == nil {
			counts[s.Noun] = make(map[Op]int)
		}
		counts[s.Noun][s.Op]++
	}
	return counts
}

// Deletes is how many steps delete something.
func (p *Plan) Deletes() int {
	n := 0
	for i := range p.Steps {
		if p.Steps[i].Op == Delete {
			n++
		}
	}
	return n
}

// planner makes a plan. It works through the nouns in the order of their references, so
// what something refers to is known, with its UUID, before it.
type planner struct {
	prune bool
	state *State
	found Mistakes
	// The steps, in the order in which they are made. Blocking changes subscriptions too,
	// which the plan saw as they were before.
	puts, deletes map[catalog.Noun][]Step
	blocks        []Step
	secrets       int
	// clients are where the files list keys that get one, of all tenants.
	clients map[string]Place
}

// NewPlan compares what files say with the state of their tenants. With prune it
// deletes what their lists do not have. Its error is [Mistakes].
func NewPlan(want *Desired, have *State, prune bool) (*Plan, error) {
	p := planner{
		prune: prune, state: have,
		puts: make(map[catalog.Noun][]Step), deletes: make(map[catalog.Noun][]Step), clients: make(map[string]Place),
	}
	for _, domain := range want.Tenants() {
		if t := p.tenant(want.tenants[domain]); t != nil {
			t.plan()
		}
	}
	if err := p.found.Err(); err != nil {
		return nil, err
	}
	plan := &Plan{Secrets: p.secrets}
	for _, n := range catalog.Nouns {
		plan.Steps = append(plan.Steps, p.puts[n]...)
	}
	for _, n := range slices.Backward(catalog.Nouns) {
		plan.Steps = append(plan.Steps, p.deletes[n]...)
	}
	plan.Steps = append(plan.Steps, p.blocks...)
	return plan, nil
}

// tenantPlanner plans one tenant.
type tenantPlanner struct {
	*planner
	want *desiredTenant
	have *tenantState
	ref  revocation.Tenant
	// isNew: the tenant is made by the plan.
	isNew bool

	// What there will be, by key: everything that is listed, or not pruned.
	keyManagers map[string]*catalog.KeyManager
	policies    map[string]bool
	scopes      map[string]bool
	apis        map[string]*catalog.API
	pruned      map[string]bool // by title
	// apiKeys are the keys of the APIs that there are, by UUID.
	apiKeys map[string]string
	// keys are where the files list consumer keys.
	keys map[string]Place
}

func (p *planner) tenant(want *desiredTenant) *tenantPlanner {
	t := &tenantPlanner{
		planner: p, want: want, have: p.state.tenants[want.domain],
		keyManagers: make(map[string]*catalog.KeyManager), policies: make(map[string]bool), scopes: make(map[string]bool),
		apis: make(map[string]*catalog.API), pruned: make(map[string]bool),
		apiKeys: make(map[string]string), keys: make(map[string]Place),
	}
	if t.have == nil && want.made == nil {
		p.found.Add(want.at, "there is no tenant %s: correct its domain, or make it with an item of a list of tenants", want.domain)
		return nil
	}
	t.ref = revocation.Tenant{Domain: want.domain}
	if t.have == nil {
		e := want.made.entity()
		t.isNew, t.have = true, newTenantState(e)
		t.ref.ID = want.made.ID
		own := keyManagerForm{Name: resident, Resident: true}
		own.setDefaults()
		t.have.resident = own.entity()
		t.have.keyManagers[resident] = t.have.resident
		for _, kind := range policyKinds {
			f := policyForm{Name: unlimited}
			f.setDefaults()
			t.have.policies[kind+"/"+unlimited] = f.entity(kind)
		}
		t.put(catalog.NounTenant, want.domain, &want.made.identity, e, nil)
		return t
	}
	t.ref = t.have.tenant.Tenant
	if want.made != nil {
		t.put(catalog.NounTenant, want.domain, &want.made.identity, want.made.entity(), t.have.tenant)
	}
	return t
}

// put plans that the entity with this key becomes want. Current is what it is, nil if
// there is none. Afterwards want has its identity.
func (t *tenantPlanner) put(n catalog.Noun, key string, given *identity, want, current catalog.Entity) {
	step := Step{Op: Create, Noun: n, Tenant: t.want.domain, Name: strings.ReplaceAll(key, "\x00", "/"), At: given.at, entity: want, weight: 1}
	m := want.Base()
	*m = catalog.Meta{ID: given.ID, UUID: given.UUID, Tenant: t.ref}
	switch {
	case current == nil:
		if m.UUID == "" {
			m.UUID = uuid.NewString()
		}
	default:
		c := current.Base()
		if given.ID != 0 && c.ID != 0 && given.ID != c.ID {
			t.found.Add(given.at, "%s has the id %d, not %d: ids never change", title(n, key), c.ID, given.ID)
		}
		if given.UUID != "" && c.UUID != "" && given.UUID != c.UUID {
			t.found.Add(given.at, "%s has the uuid %s, not %s: UUIDs never change", title(n, key), c.UUID, given.UUID)
		}
		m.ID, m.UUID = c.ID, c.UUID
		if same(want, current) {
			return
		}
		step.Op, step.version, step.Diff = Update, c.Timestamp, difference(want, current)
		step.builtIn = t.isNew && c.UUID == ""
	}
	switch n {
	case catalog.NounTenant:
		step.weight = 2 + len(policyKinds) // with its key manager
	case catalog.NounAPI:
		step.weight = 3 // with deployed and undeployed
	}
	t.puts[n] = append(t.puts[n], step)
}

// difference has the members of two entities that are not the same.
func difference(want, current catalog.Entity) []Difference {
	old, now := members(stated(current)), members(stated(want))
	names := maps.Clone(old)
	maps.Copy(names, now)
	var diff []Difference
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if string(old[name]) != string(now[name]) {
			diff = append(diff, Difference{name, old[name], now[name]})
		}
	}
	return diff
}

func members(e catalog.Entity) map[string]json.RawMessage {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // people read it
	var m map[string]json.RawMessage
	if err := errors.Join(enc.Encode(e), json.Unmarshal(b.Bytes(), &m)); err != nil {
		panic(err) // what validates can be encoded
	}
	return m
}

// delete plans to delete what the files do not have.
func (t *tenantPlanner) delete(n catalog.Noun, key string, current catalog.Entity, weight int) {
	t.pruned[title(n, key)] = true
	t.deletes[n] = append(t.deletes[n], Step{
		Op: Delete, Noun: n, Tenant: t.want.domain, Name: strings.ReplaceAll(key, "\x00", "/"),
		entity: current, version: current.Base().Timestamp, weight: weight,
	})
}

// prunes reports whether the files' list of this name is all there is to be.
func (t *tenantPlanner) prunes(list string) bool { return t.prune && t.want.given[list] }

func (t *tenantPlanner) plan() {
	for key, a := range t.have.apis {
		t.apiKeys[a.UUID] = key
	}
	t.planKeyManagers()
	t.planPolicies()
	t.planScopes()
	t.planAPIs()
	t.planApplications()
}

func (t *tenantPlanner) planKeyManagers() {
	for _, name := range t.want.order[catalog.NounKeyManager] {
		f, current := t.want.keyManagers[name], t.have.keyManagers[name]
		want := f.entity()
		switch {
		case f.Resident && t.have.resident != nil && current != t.have.resident:
			t.found.Add(f.at, "the resident key manager of tenant %s is %s, not %s: correct the name", t.want.domain, t.have.resident.Name, name)
			continue
		case f.Resident && (current == nil || !current.Resident):
			t.found.Add(f.at, "there is no resident key manager %s: the service makes it when it first starts; start it, or take this away", name)
			continue
		case f.Resident:
			want = f.ofResident(current)
		case current != nil && current.Resident:
			t.found.Add(f.at, "the key manager %s is the resident one: give it resident: true, and take away what the service knows", name)
			continue
		case current != nil && current.Iss != want.Iss:
			t.found.Add(f.at, "the key manager %s has the iss %q, which never changes: give the new issuer another name", name, current.Iss)
		case current != nil && current.MaxTokenLifetime > want.MaxTokenLifetime:
			t.found.Add(f.at, "the key manager %s has max_token_lifetime %d, which may only rise: tokens of before live that long", name, current.MaxTokenLifetime)
		}
		t.put(catalog.NounKeyManager, name, &f.identity, want, orNone(current))
		t.keyManagers[name] = want
	}
	for name, current := range inOrder(t.have.keyManagers) {
		if t.want.keyManagers[name] != nil {
			continue
		}
		if t.prunes(string(catalog.NounKeyManager)) && !current.Resident {
			t.delete(catalog.NounKeyManager, name, current, 1)
			continue
		}
		t.keyManagers[name] = current
	}
}

func (t *tenantPlanner) planPolicies() {
	for _, key := range t.want.order[catalog.NounPolicy] {
		f := t.want.policies[key]
		kind, _, _ := strings.Cut(key, "/")
		t.put(catalog.NounPolicy, key, &f.identity, f.entity(kind), orNone(t.have.policies[key]))
		t.policies[key] = true
	}
	for key, current := range inOrder(t.have.policies) {
		if t.want.policies[key] == nil && t.prunes(policyList(current.Kind)) && current.Name != unlimited {
			t.delete(catalog.NounPolicy, key, current, 1)
			continue
		}
		t.policies[key] = true
	}
}

func (t *tenantPlanner) planScopes() {
	for _, name := range t.want.order[catalog.NounScope] {
		f := t.want.scopes[name]
		t.put(catalog.NounScope, name, &f.identity, f.entity(), orNone(t.have.scopes[name]))
		t.scopes[name] = true
	}
	for name, current := range inOrder(t.have.scopes) {
		if t.want.scopes[name] == nil && t.prunes(string(catalog.NounScope)) {
			t.delete(catalog.NounScope, name, current, 1)
			continue
		}
		t.scopes[name] = true
	}
}

func (t *tenantPlanner) planAPIs() {
	contexts := make(map[string]string)
	for _, key := range t.want.order[catalog.NounAPI] {
		f := t.want.apis[key]
		want := f.entity()
		t.put(catalog.NounAPI, key, &f.identity, want, orNone(t.have.apis[key]))
		t.apis[key] = want
		if other, taken := contexts[want.Context]; taken {
			t.found.Add(f.at, "API %s has the context %s of API %s: give it another", key, want.Context, other)
		}
		contexts[want.Context] = key
		t.checkAPI(key, want, f.at)
	}
	for key, current := range inOrder(t.have.apis) {
		if t.want.apis[key] != nil {
			continue
		}
		other, taken := contexts[current.Context]
		if t.prunes(string(catalog.NounAPI)) {
			if taken {
				t.found.Add(t.want.apis[other].at, "API %s has the context %s of API %s, which is pruned last: prune first, then make it", other, current.Context, key)
			}
			t.delete(catalog.NounAPI, key, current, 2)
			continue
		}
		if taken {
			t.found.Add(t.want.apis[other].at, "API %s has the context %s of API %s, which is there: give it another", other, current.Context, key)
		}
		t.apis[key] = current
		t.checkAPI(key, current, Place{})
	}
}

func (t *tenantPlanner) checkAPI(key string, a *catalog.API, at Place) {
	who := title(catalog.NounAPI, key)
	if a.Policy != "" {
		t.refers(who, at, catalog.NounPolicy, catalog.PolicyAPI+"/"+a.Policy)
	}
	for _, o := range a.Operations {
		if o.Policy != "" {
			t.refers(who, at, catalog.NounPolicy, catalog.PolicyAPI+"/"+o.Policy)
		}
		for _, s := range o.Scopes {
			t.refers(who, at, catalog.NounScope, s)
		}
	}
}

// refers checks that what who refers to will be there. At is unknown where no file
// lists who: then it can only be that pruning takes away what it needs.
func (t *tenantPlanner) refers(who string, at Place, n catalog.Noun, key string) {
	what := title(n, key)
	if at != (Place{}) {
		if n == catalog.NounPolicy && !t.policies[key] || n == catalog.NounScope && !t.scopes[key] {
			t.found.Add(at, "%s needs the %s, which tenant %s does not have: list it, or correct the name", who, what, t.want.domain)
		}
		return
	}
	if t.pruned[what] {
		t.found.Add(t.want.at, "pruning would delete the %s, which %s needs, and the files do not list that: list one of them", what, who)
	}
}

func (t *tenantPlanner) planApplications() {
	taken := make(map[*applicationState]bool)
	for _, key := range t.want.order[catalog.NounApplication] {
		f := t.want.applications[key]
		current := t.have.applications[key]
		if byUUID := t.have.applicationOf[f.UUID]; current == nil && byUUID != nil && byUUID.Owner == f.Owner {
			current = byUUID // it gets another name
		}
		if current != nil && taken[current] {
			t.found.Add(f.at, "application %s has the uuid of another one in the files: correct it", f.title())
			continue
		}
		taken[current] = true
		t.application(key, f, current)
	}
	pruneAll := t.prunes(string(catalog.NounApplication))
	for key, current := range inOrder(t.have.applications) {
		if taken[current] {
			continue
		}
		if !pruneAll {
			t.stays(key, current, current.keys, maps.Values(current.subscriptions))
			continue
		}
		// The catalog deletes what it has with it.
		t.delete(catalog.NounApplication, key, current.Application, 1+2*len(current.keys)+len(current.subscriptions))
	}
}

func (t *tenantPlanner) deleteSubscription(key string, of *applicationState, s *catalog.Subscription) {
	t.delete(catalog.NounSubscription, subscriptionKey(key, t.apiKeys[s.API.UUID]), s, 1+len(of.keys))
}

func subscriptionKey(application, api string) string { return application + " to " + api }

// stays checks what an application has that no file lists, and that is not pruned.
func (t *tenantPlanner) stays(key string, a *applicationState, keys []*catalog.KeyMapping, subscriptions iter.Seq[*catalog.Subscription]) {
	if len(t.pruned) == 0 {
		return
	}
	who := title(catalog.NounApplication, key)
	t.refers(who, Place{}, catalog.NounPolicy, catalog.PolicyApplication+"/"+a.Policy)
	for _, k := range keys {
		t.refers(title(catalog.NounKeyMapping, k.ConsumerKey), Place{}, catalog.NounKeyManager, k.KeyManager)
	}
	for s := range subscriptions {
		api := t.apiKeys[s.API.UUID]
		what := title(catalog.NounSubscription, subscriptionKey(key, api))
		t.refers(what, Place{}, catalog.NounAPI, api)
		t.refers(what, Place{}, catalog.NounPolicy, catalog.PolicySubscription+"/"+s.Policy)
	}
}

func (t *tenantPlanner) application(key string, f *applicationForm, current *applicationState) {
	want := f.entity()
	var was catalog.Entity
	if current != nil {
		was, want.Blocked = current.Application, current.Blocked
	} else {
		want.Blocked = f.Blocked != nil && *f.Blocked
		current = &applicationState{Application: want}
	}
	t.put(catalog.NounApplication, key, &f.identity, want, was)
	t.refers(title(catalog.NounApplication, key), f.at, catalog.NounPolicy, catalog.PolicyApplication+"/"+f.Policy)
	if f.Blocked != nil && *f.Blocked != want.Blocked {
		step := Step{
			Op: Unblock, Noun: catalog.NounApplication, Tenant: t.want.domain, Name: f.title(), At: f.at,
			entity: want, version: current.Timestamp, weight: 1,
		}
		if *f.Blocked {
			step.Op = Block
		}
		t.blocks = append(t.blocks, step)
	}
	keys := t.planKeys(key, f, want, current)
	subscriptions := t.planSubscriptions(key, f, want, current)
	if was != nil {
		t.stays(key, current, keys, slices.Values(subscriptions))
	}
}

// planKeys returns those that are there, not listed and not pruned.
func (t *tenantPlanner) planKeys(key string, f *applicationForm, application *catalog.Application, current *applicationState) (left []*catalog.KeyMapping) {
	listed := make(map[string]bool, len(f.Keys))
	for i := range f.Keys {
		k := &f.Keys[i]
		manager := t.have.resident
		if k.KeyManager != "" {
			manager = t.keyManagers[k.KeyManager]
		}
		switch {
		case manager == nil && k.KeyManager == "":
			t.found.Add(k.at, "key %s names no key manager, and tenant %s has none of its own: name one, or start the service, which makes it",
				quote(k.ConsumerKey), t.want.domain)
			continue
		case manager == nil:
			t.found.Add(k.at, "key %s needs the key manager %s, which tenant %s does not have: list it, or correct the name",
				quote(k.ConsumerKey), k.KeyManager, t.want.domain)
			continue
		}
		id := keyOf(manager.Iss, k.ConsumerKey)
		listed[id] = true
		if first, twice := t.keys[id]; twice {
			t.found.Add(k.at, "key %s of %s is listed twice, first at %s: leave one", quote(k.ConsumerKey), manager.Name, first)
			continue
		}
		t.keys[id] = k.at
		t.key(k, manager, application, t.have.keys[id])
	}
	for _, k := range current.keys {
		switch {
		case listed[keyOf(k.Iss, k.ConsumerKey)]:
		case t.prune && f.Keys != nil:
			t.delete(catalog.NounKeyMapping, k.ConsumerKey, k, 2)
		default:
			left = append(left, k)
		}
	}
	return left
}

// key plans a consumer key. Nothing of one that is there ever changes.
func (t *tenantPlanner) key(f *keyForm, manager *catalog.KeyManager, application *catalog.Application, current *catalog.KeyMapping) {
	name := quote(f.ConsumerKey)
	if current == nil {
		t.newKey(f, manager, application)
		return
	}
	if current.Application.UUID != application.UUID {
		t.found.Add(f.at, "key %s is another application's: take it there out of the files and prune first", name)
		return
	}
	if current.KeyType != f.KeyType {
		t.found.Add(f.at, "key %s is of type %s, which never changes: correct key_type, or make another key", name, current.KeyType)
	}
	if f.Client != nil {
		registered, ok := t.state.clients[current.ConsumerKey]
		if !ok || !current.Generated {
			t.found.Add(f.at, "key %s is mapped, it gets no client any more: take client away, or make another key", name)
		} else if !sameClient(registered, f.Client.registration()) {
			t.found.Add(f.at, "key %s is registered with other settings, which never change: correct client, take it away, or make another key", name)
		}
	}
	want := f.entity()
	want.Generated = current.Generated
	t.put(catalog.NounKeyMapping, f.ConsumerKey, &f.identity, want, current)
}

func (t *tenantPlanner) newKey(f *keyForm, manager *catalog.KeyManager, application *catalog.Application) {
	want := f.entity()
	want.Application, want.KeyManager, want.Iss = refTo(application), manager.Name, manager.Iss
	if manager.Resident && f.Client == nil {
		t.found.Add(f.at, "key %s of %s is not there: a key of our own is made with a client member, if need be client: {}", quote(f.ConsumerKey), manager.Name)
		return
	}
	t.put(catalog.NounKeyMapping, f.ConsumerKey, &f.identity, want, nil)
	if f.Client == nil {
		return
	}
	t.checkClient(f)
	step := &t.puts[catalog.NounKeyMapping][len(t.puts[catalog.NounKeyMapping])-1]
	r := f.Client.registration()
	step.client, step.application = &r, application
	switch {
	case f.Client.SecretEnv != "":
		if r.Secret = os.Getenv(f.Client.SecretEnv); r.Secret == "" {
			t.found.Add(f.at, "key %s has its secret in the variable %s, which is not set: set it", quote(f.ConsumerKey), quote(f.Client.SecretEnv))
		}
	case f.Client.SecretFile != "":
		var err error
		if r.Secret, err = readSecret(f.at, f.Client.SecretFile); err != nil {
			t.found.Add(f.at, "the secret of key %s: %v", quote(f.ConsumerKey), err)
		}
	case hasSecret(r.AuthMethod):
		t.secrets++
	}
	if err := r.Validate(); r.Secret != "" && err != nil {
		t.found.Add(f.at, "the secret of key %s: %v", quote(f.ConsumerKey), err)
	}
}

// checkClient finds the client of another key manager, perhaps of another tenant, with the id
// that f's is to get: a client says nothing else of who it is.
func (t *tenantPlanner) checkClient(f *keyForm) {
	if _, taken := t.state.clients[f.ConsumerKey]; taken {
		t.found.Add(f.at, "key %s has the name of another key manager's client: give it another", quote(f.ConsumerKey))
	}
	if first, taken := t.clients[f.ConsumerKey]; taken {
		t.found.Add(f.at, "key %s has the name of the client at %s: give it another", quote(f.ConsumerKey), first)
		return
	}
	t.clients[f.ConsumerKey] = f.at
}

// readSecret reads a secret from a file, which at says relative to its own.
func readSecret(at Place, name string) (string, error) {
	if !filepath.IsAbs(name) {
		name = filepath.Join(filepath.Dir(at.File), name)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	// Editors and echo end a file with a newline that is not part of it.
	secret := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if secret == "" {
		return "", fmt.Errorf("%s is empty", name)
	}
	return secret, nil
}

func sameClient(a, b authn.Registration) bool {
	form := func(r authn.Registration) authn.Registration {
		r.ID, r.Secret = "", ""
		r.AuthMethod, r.TokenTyp = or(r.AuthMethod, methodBasic), or(r.TokenTyp, accessTokenTyp)
		r.Scopes, r.DefaultScopes, r.Audience = orNil(r.Scopes), orNil(r.DefaultScopes), orNil(r.Audience)
		r.GrantTypes, r.ResourceAudiences = orNil(r.GrantTypes), orNil(r.ResourceAudiences)
		return r
	}
	return reflect.DeepEqual(form(a), form(b))
}

// planSubscriptions returns those that are there, not listed and not pruned.
func (t *tenantPlanner) planSubscriptions(key string, f *applicationForm, application *catalog.Application, current *applicationState) (left []*catalog.Subscription) {
	listed := make(map[string]bool, len(f.Subscriptions))
	for i := range f.Subscriptions {
		s := &f.Subscriptions[i]
		api := t.apis[s.API]
		if api == nil {
			t.found.Add(s.at, "application %s subscribes to API %s, which tenant %s does not have: list it, or correct the name", f.title(), quote(s.API), t.want.domain)
			continue
		}
		name := subscriptionKey(key, s.API)
		t.refers(title(catalog.NounSubscription, name), s.at, catalog.NounPolicy, catalog.PolicySubscription+"/"+s.Policy)
		want := s.entity()
		want.Application, want.API = refTo(application), refTo(api)
		was := current.subscriptions[api.UUID]
		if was != nil {
			want.ApplicationBlocked = was.ApplicationBlocked
		}
		before := len(t.puts[catalog.NounSubscription])
		t.put(catalog.NounSubscription, name, &s.identity, want, orNone(was))
		if puts := t.puts[catalog.NounSubscription]; len(puts) > before && was != nil {
			puts[before].weight += len(current.keys) // its tokens may be revoked
		}
		listed[api.UUID] = true
	}
	for uuid, s := range inOrder(current.subscriptions) {
		switch {
		case listed[uuid]:
		case t.prune && f.Subscriptions != nil:
			t.deleteSubscription(key, current, s)
		default:
			left = append(left, s)
		}
	}
	return left
}

func refTo(e catalog.Entity) catalog.Ref { return catalog.Ref{ID: e.Base().ID, UUID: e.Base().UUID} }

// orNone keeps a nil pointer from becoming an entity.
func orNone[E interface {
	comparable
	catalog.Entity
}](e E) catalog.Entity {
	var none E
	if e == none {
		return nil
	}
	return e
}

// inOrder goes through a map by key, so that the same files and state make the same plan.
func inOrder[V any](m map[string]V) iter.Seq2[string, V] {
	return func(yield func(string, V) bool) {
		for _, key := range slices.Sorted(maps.Keys(m)) {
			if !yield(key, m[key]) {
				return
			}
		}
	}
}
