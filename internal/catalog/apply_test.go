package catalog_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
)

// Each noun is created, read, changed in all that may change, left as it is, and deleted.
func TestLife(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	app := made[*catalog.Application](w, create(application("holder")))
	pizza := made[*catalog.API](w, create(api("holder")))
	w.apply(create(&catalog.KeyManager{Name: "IdP", Iss: externalIss, MaxTokenLifetime: 60}),
		create(&catalog.Policy{Kind: catalog.PolicyApplication, Name: "Gold"}),
		create(&catalog.Policy{Kind: catalog.PolicyAPI, Name: "Gold"}),
		create(&catalog.Policy{Kind: catalog.PolicySubscription, Name: "Gold"}),
		create(&catalog.Scope{Name: "order"}))

	for _, tt := range []struct {
		given, complete, change catalog.Entity // change is nil where nothing ever changes
		subject                 string
		events                  []string
	}{
		{
			given:    &catalog.Tenant{Meta: in("a.example")},
			complete: &catalog.Tenant{},
			change:   &catalog.Tenant{DisplayName: "A"},
			subject:  "a.example",
			events: []string{
				"tenant.created", "key_manager.created Resident Key Manager", "policy.created subscription/Unlimited", "policy.created application/Unlimited", "policy.created api/Unlimited", "tenant.updated",
				"policy.deleted subscription/Unlimited", "policy.deleted application/Unlimited", "policy.deleted api/Unlimited",
				"key_manager.deleted Resident Key Manager", "tenant.deleted",
			},
		},
		{
			given:    &catalog.KeyManager{Name: "KM", Iss: "https://km.example", MaxTokenLifetime: 60, Properties: map[string]any{"b": 1.50, "a": []any{}}},
			complete: &catalog.KeyManager{Name: "KM", Iss: "https://km.example", MaxTokenLifetime: 60, Properties: map[string]any{"b": 1.5, "a": []any{}}, Type: "default", TokenType: "DIRECT"},
			change: &catalog.KeyManager{
				Name: "KM", DisplayName: "d", Description: "e", Type: "KeyCloak", Enabled: true, Iss: "https://km.example", MaxTokenLifetime: 61,
				JWKSURI: "http://127.0.0.1/jwks", Algorithms: []string{"ES256"}, AllowTyp: []string{"JWT"}, ConsumerKeyClaim: "cid", ScopesClaim: "scp",
				ClaimMappings: []catalog.ClaimMapping{{Remote: "r", Local: "l"}}, TokenType: "BOTH", Properties: map[string]any{"big": 1e21},
			},
			subject: "KM",
			events:  []string{"key_manager.created", "key_manager.updated", "key_manager.deleted"},
		},
		{
			given:    &catalog.Policy{Kind: catalog.PolicySubscription, Name: "Silver"},
			complete: &catalog.Policy{Kind: catalog.PolicySubscription, Name: "Silver", QuotaType: "requestCount"},
			change: &catalog.Policy{
				Kind: catalog.PolicySubscription, Name: "Silver", DisplayName: "d", Description: "e", QuotaType: "bandwidthVolume", Quota: 1 << 53, UnitTime: 2, TimeUnit: "min",
				RateLimitCount: 3, RateLimitTimeUnit: "sec", StopOnQuotaReach: true, GraphQLMaxDepth: 4, GraphQLMaxComplexity: 5,
			},
			subject: "subscription/Silver",
			events:  []string{"policy.created", "policy.updated", "policy.deleted"},
		},
		{
			given:    &catalog.Policy{Kind: catalog.PolicyAPI, Name: "Silver"},
			complete: &catalog.Policy{Kind: catalog.PolicyAPI, Name: "Silver", QuotaType: "requestCount", Level: "apiLevel"},
			change:   &catalog.Policy{Kind: catalog.PolicyAPI, Name: "Silver", QuotaType: "eventCount", Level: "resourceLevel"},
			subject:  "api/Silver",
			events:   []string{"policy.created", "policy.updated", "policy.deleted"},
		},
		{
			given:    &catalog.Scope{Name: "read", Roles: []string{}},
			complete: &catalog.Scope{Name: "read"},
			change:   &catalog.Scope{Name: "read", DisplayName: "d", Description: "e", Roles: []string{"Internal/subscriber", "admin"}},
			subject:  "read",
			events:   []string{"scope.created", "scope.updated", "scope.deleted"},
		},
		{
			given: &catalog.API{Name: "P", Version: "1", Context: "/p/1", Provider: "admin", GatewayLabels: []string{"Default", "b"},
				Operations: []catalog.Operation{{Target: "/*", Verb: "GET"}}},
			complete: &catalog.API{Name: "P", Version: "1", Context: "/p/1", Provider: "admin", Type: "HTTP", Status: catalog.APICreated,
				GatewayLabels: []string{"Default", "b"}, Operations: []catalog.Operation{{Target: "/*", Verb: "GET", AuthType: "Any", Policy: "Unlimited"}}},
			change: &catalog.API{Name: "P", Version: "1", Context: "/p/one", Provider: "other", Type: "WS", Status: catalog.APIPublished, DefaultVersion: true,
				Policy: "Gold", SecurityScheme: []string{"oauth2"}, GatewayLabels: []string{"c", "b"},
				Operations: []catalog.Operation{{Target: "/x", Verb: "POST", AuthType: "None", Policy: "Gold", Scopes: []string{"order"}}}},
			subject: "P:1",
			events:  []string{"api.created", "api.deployed", "api.lifecycle_changed", "api.undeployed", "api.deployed", "api.undeployed", "api.deleted"},
		},
		{
			given:    &catalog.Application{Name: "A", Owner: "o"},
			complete: &catalog.Application{Name: "A", Owner: "o", Policy: "Unlimited", TokenType: "JWT"},
			change:   &catalog.Application{Name: "B", Owner: "o", Policy: "Gold", TokenType: "OAUTH", Groups: []string{"g"}, Attributes: map[string]string{"k": "v"}},
			events:   []string{"application.created A", "application.updated B", "application.deleted B"},
		},
		{
			given:    &catalog.Application{Name: "S", Owner: "o", SelfContained: true},
			complete: &catalog.Application{Name: "S", Owner: "o", Policy: "Unlimited", TokenType: "JWT", SelfContained: true},
			change:   &catalog.Application{Name: "S", Owner: "o", Policy: "Unlimited", TokenType: "JWT"},
			subject:  "S",
			events:   []string{"application.created", "application.updated", "application.deleted"},
		},
		{
			given:    &catalog.Application{Name: "T", Owner: "o"},
			complete: &catalog.Application{Name: "T", Owner: "o", Policy: "Unlimited", TokenType: "JWT"},
			change:   &catalog.Application{Name: "T", Owner: "o", Policy: "Unlimited", TokenType: "JWT", SelfContained: true},
			subject:  "T",
			events:   []string{"application.created", "application.updated", "application.deleted"},
		},
		{
			given:    &catalog.KeyMapping{Application: catalog.Ref{ID: app.ID}, ConsumerKey: "ck", KeyType: catalog.Sandbox, KeyManager: "IdP", Generated: true},
			complete: &catalog.KeyMapping{Application: ref(app), ConsumerKey: "ck", KeyType: catalog.Sandbox, KeyManager: "IdP", Iss: externalIss},
			subject:  "ck",
			events:   []string{"key_mapping.created", "key_mapping.deleted", "revocation.client"},
		},
		{
			given:    &catalog.Subscription{Application: catalog.Ref{UUID: app.UUID}, API: catalog.Ref{ID: pizza.ID}},
			complete: &catalog.Subscription{Application: ref(app), API: ref(pizza), Policy: "Unlimited", State: catalog.Unblocked},
			change:   &catalog.Subscription{Policy: "Gold", State: catalog.TierUpdatePending},
			events:   []string{"subscription.created", "subscription.updated", "subscription.deleted"},
		},
	} {
		n := tt.given.Noun()
		t.Run(string(n)+" "+tt.subject, func(t *testing.T) {
			w := *w
			w.TB = t
			before, begin := time.Now().Add(-time.Minute).UnixMilli(), w.head()
			first := w.apply(create(tt.given))[0]
			m := *first.Base()
			if m.ID <= 0 || uuid.Validate(m.UUID) != nil || m.Tenant.Domain == "" || m.Timestamp < before {
				t.Errorf("made with %+v", m)
			}
			*tt.complete.Base() = m
			wantIs(&w, tt.complete, first)
			if tt.given.Base().ID != 0 {
				t.Error("Apply changed what it was given")
			}
			last := first
			if tt.change != nil {
				tt.change.Base().UUID = m.UUID
				last = w.apply(update(tt.change))[0]
				if last.Base().Timestamp <= m.Timestamp {
					t.Errorf("timestamp %d after %d", last.Base().Timestamp, m.Timestamp)
				}
				*tt.change.Base() = *last.Base()
				if s, ok := tt.change.(*catalog.Subscription); ok {
					s.Application, s.API = ref(app), ref(pizza)
				}
				wantIs(&w, tt.change, last)
			}
			head := w.head()
			same := w.apply(update(last))[0]
			if diff := cmp.Diff(last, same); diff != "" || w.head() != head {
				t.Errorf("an update that changes nothing did:\n%s", diff)
			}
			gone := w.apply(remove(last))[0]
			if gone.Base().Timestamp <= last.Base().Timestamp {
				t.Errorf("deleted at %d after %d", gone.Base().Timestamp, last.Base().Timestamp)
			}
			gone.Base().Timestamp = last.Base().Timestamp
			if diff := cmp.Diff(last, gone); diff != "" {
				t.Errorf("what was deleted is not what was there last:\n%s", diff)
			}
			if _, err := w.Get(t.Context(), admin, n, m.UUID); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("Get of what was deleted: %v", err)
			}
			var want, got []string
			for _, e := range tt.events {
				if !strings.Contains(e, " ") {
					e += " " + tt.subject
					if n == catalog.NounSubscription {
						e += m.UUID
					}
				}
				want = append(want, e)
			}
			got = w.told(begin)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
			for _, e := range w.events(begin) {
				if e.Traceparent != admin.Traceparent || e.Source != ownIss {
					t.Errorf("event %s has traceparent %q and source %q", e.Type, e.Traceparent, e.Source)
				}
			}
			audited := w.count(`SELECT count(DISTINCT action) FROM rescind.audit WHERE entity_id = $1::uuid AND actor = 'account:admin'
				AND request_id = 'r-1' AND action IN ($2, $3, $4)`, m.UUID, "create_"+string(n), "update_"+string(n), "delete_"+string(n))
			if want := 3; audited != want && (tt.change != nil || audited != 2) {
				t.Errorf("%d kinds of audit records", audited)
			}
		})
	}
}

// wantIs compares an entity with what was returned, what is read, and what was told last.
func wantIs(w *world, want, got catalog.Entity) {
	w.Helper()
	read, err := w.Get(w.Context(), admin, want.Noun(), want.Base().UUID)
	if err != nil {
		w.Fatal(err)
	}
	state := w.fold(map[string]catalog.Entity{}, 0)
	for from, e := range map[string]catalog.Entity{
		"returned": got, "read": read, "told": state[string(want.Noun())+" "+want.Base().UUID],
		"read whole": w.all()[string(want.Noun())+" "+want.Base().UUID],
	} {
		if diff := cmp.Diff(want, e); diff != "" {
			w.Errorf("%s (-want +got):\n%s", from, diff)
		}
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if _, err := w.EnsureKeyManager(t.Context(), catalog.KeyManager{Iss: ownIss, Resident: true, Enabled: true, MaxTokenLifetime: 3600}); err != nil {
		t.Fatal(err)
	}
	resident, err := w.List(t.Context(), admin, catalog.NounKeyManager, store.Filter{}, 0, 10)
	if err != nil || len(resident) != 1 {
		t.Fatal(resident, err)
	}
	tenantA := made[*catalog.Tenant](w, create(&catalog.Tenant{Meta: in("a.example")}))
	km := made[*catalog.KeyManager](w, create(keyManager("km")))
	gold := made[*catalog.Policy](w, create(&catalog.Policy{Kind: catalog.PolicySubscription, Name: "Gold"}))
	order := made[*catalog.Scope](w, create(&catalog.Scope{Name: "order"}))
	app := made[*catalog.Application](w, create(application("app")))
	other := made[*catalog.Application](w, create(application("other")))
	pizza := api("pizza")
	pizza.Operations[0].Scopes = []string{"order"}
	pizza = made[*catalog.API](w, create(pizza))
	pasta := made[*catalog.API](w, create(api("pasta")))
	key := made[*catalog.KeyMapping](w, create(mapping(app, "km", "ck", catalog.Production)))
	sub := subscription(app, pizza)
	sub.Policy = "Gold"
	sub = made[*catalog.Subscription](w, create(sub))
	foreign := application("foreign")
	foreign.Meta = in("a.example")
	foreign = made[*catalog.Application](w, create(foreign))
	foreignAPI := api("foreign")
	foreignAPI.Meta = in("a.example")
	foreignAPI = made[*catalog.API](w, create(foreignAPI))
	bare := made[*catalog.Tenant](w, create(&catalog.Tenant{Meta: in("b.example")}))
	if _, err := w.pool.Exec(t.Context(), `INSERT INTO rescind.accounts (username, tenant_id, role, password_hash) VALUES ('g', $1, 'gateway', 'x')`, bare.ID); err != nil {
		t.Fatal(err)
	}
	find := func(kind, domain string) catalog.Entity {
		found, err := w.List(t.Context(), admin, catalog.NounPolicy, store.Filter{Tenant: domain, Kind: kind, Name: "Unlimited"}, 0, 2)
		if err != nil || len(found) != 1 {
			t.Fatal(found, err)
		}
		return found[0]
	}
	carbon := "carbon.super"

	for _, tt := range []struct {
		name   string
		change store.Change
		want   string
	}{
		{"nothing", store.Change{Op: store.Create}, "invalid #"},
		{"an unknown op", store.Change{Op: "upsert", Entity: app}, "invalid #"},
		{"an entity that is not valid", create(&catalog.Scope{Name: "a b"}), "invalid #/name"},
		{"a UUID in capitals", create(&catalog.Scope{Meta: catalog.Meta{UUID: "0193A2F4-7C11-7D02-9B1E-5F6A70C1D2E3"}, Name: "s"}), "invalid #/uuid"},
		{"an id below 0", create(&catalog.Scope{Meta: catalog.Meta{ID: -1}, Name: "s"}), "invalid #/id"},
		{"an unknown tenant", create(&catalog.Scope{Meta: in("x.example"), Name: "s"}), "invalid #/tenant"},
		{"a tenant of two names", create(&catalog.Scope{Meta: catalog.Meta{Tenant: revocation.Tenant{ID: -1234, Domain: "a.example"}}, Name: "s"}), "invalid #/tenant"},
		{"a tenant without a domain", create(&catalog.Tenant{}), "invalid #/tenant/domain"},
		{"a tenant whose issuer would be another's", create(&catalog.Tenant{Meta: in("..")}), "invalid #/tenant/domain"},
		{"self-contained tokens that carry nothing", create(&catalog.Application{Name: "x", Owner: "o", TokenType: "OAUTH", SelfContained: true}), "invalid #/self_contained"},
		{"a resident key manager", create(&catalog.KeyManager{Name: "r", Iss: "https://r", MaxTokenLifetime: 1, Resident: true}), "invalid #/resident"},
		{"keys over plain HTTP", create(&catalog.KeyManager{Name: "r", Iss: "https://r", MaxTokenLifetime: 1, JWKSURI: "http://10.0.0.1/"}), "invalid #/jwks_uri"},
		{"an application without its policy", create(&catalog.Application{Name: "x", Owner: "o", Policy: "Gold"}), "invalid #/policy"},
		{"an API without its policies and scopes", create(&catalog.API{Name: "x", Version: "1", Context: "/x", Provider: "p", Policy: "Gold",
			Operations: []catalog.Operation{{Target: "/", Verb: "GET", Policy: "None", Scopes: []string{"order", "eat"}}}}),
			"invalid #/operations/0/policy #/operations/0/scopes/1 #/policy"},
		{"a subscription without its policy", create(&catalog.Subscription{Application: ref(other), API: ref(pizza), Policy: "None"}), "invalid #/policy"},
		{"a subscription to nothing", create(&catalog.Subscription{Application: ref(other), API: catalog.Ref{UUID: uuid.NewString()}}), "invalid #/api"},
		{"a subscription without an API", create(&catalog.Subscription{Application: ref(other)}), "invalid #/api"},
		{"a subscription of nobody", create(&catalog.Subscription{Application: catalog.Ref{ID: 1 << 30}, API: ref(pizza)}), "invalid #/application"},
		{"a subscription of two applications", create(&catalog.Subscription{Application: catalog.Ref{ID: app.ID, UUID: other.UUID}, API: ref(pizza)}), "invalid #/application"},
		{"a malformed reference", create(&catalog.Subscription{Application: catalog.Ref{UUID: "x"}, API: ref(pizza)}), "invalid #/application/uuid"},
		{"another tenant's API", create(subscription(other, foreignAPI)), "invalid #/api"},
		{"another tenant's application", create(&catalog.Subscription{Meta: in(carbon), Application: ref(foreign), API: ref(pizza)}), "invalid #/application"},
		{"an unknown key manager", create(mapping(app, "none", "x", catalog.Sandbox)), "invalid #/key_manager"},
		{"another tenant's key manager", create(mapping(foreign, "km", "x", catalog.Sandbox)), "invalid #/key_manager"},
		{"the wrong issuer", create(&catalog.KeyMapping{Application: ref(app), KeyManager: "km", Iss: ownIss, ConsumerKey: "x", KeyType: catalog.Sandbox}), "invalid #/iss"},

		{"a domain twice", create(&catalog.Tenant{Meta: in("a.example")}), "exists #/tenant/domain"},
		{"a tenant's id twice", create(&catalog.Tenant{Meta: catalog.Meta{ID: -1234, Tenant: revocation.Tenant{Domain: "c.example"}}}), "exists #/id"},
		{"a key manager's name twice", create(&catalog.KeyManager{Name: "km", Iss: "https://x", MaxTokenLifetime: 1}), "exists #/name"},
		{"an issuer below ours", create(with(keyManager("x"), func(k *catalog.KeyManager) { k.Iss = ownIss + "/t1" })), "exists #/iss"},
		{"ours with a slash", create(with(keyManager("x"), func(k *catalog.KeyManager) { k.Iss = ownIss + "/" })), "exists #/iss"},
		{"ours", create(with(keyManager("x"), func(k *catalog.KeyManager) { k.Iss = ownIss })), "exists #/iss"},
		{"keys at a URL with a query", create(with(keyManager("x"), func(k *catalog.KeyManager) { k.JWKSURI += "?key=s3cret" })), "invalid #/jwks_uri"},
		{"an issuer twice", create(&catalog.KeyManager{Meta: in("a.example"), Name: "x", Iss: km.Iss, MaxTokenLifetime: 1}), "exists #/iss"},
		{"a policy twice", create(&catalog.Policy{Kind: catalog.PolicySubscription, Name: "Gold"}), "exists #/name"},
		{"a scope twice", create(&catalog.Scope{Name: "order"}), "exists #/name"},
		{"an API twice", create(api("pizza")), "exists #/name"},
		{"a context twice", create(&catalog.API{Name: "x", Version: "1", Context: pizza.Context, Provider: "p"}), "exists #/context"},
		{"a context that another has", update(with(pasta, func(a *catalog.API) { a.Context = pizza.Context })), "exists #/context"},
		{"an application twice", create(application("app")), "exists #/name"},
		{"a name that another has", update(with(other, func(a *catalog.Application) { a.Name = "app" })), "exists #/name"},
		{"a consumer key twice", create(mapping(other, "km", "ck", catalog.Sandbox)), "exists #/consumer_key"},
		{"a subscription twice", create(subscription(app, pizza)), "exists #/api"},
		{"a UUID twice", create(&catalog.Scope{Meta: catalog.Meta{UUID: order.UUID}, Name: "s"}), "exists #/uuid"},
		{"an id twice", create(&catalog.Scope{Meta: catalog.Meta{ID: order.ID}, Name: "s"}), "exists #/id"},

		{"an id that changes", update(with(order, func(s *catalog.Scope) { s.ID++ })), "immutable #/id"},
		{"a tenant that changes", update(with(order, func(s *catalog.Scope) { s.Meta = in("a.example"); s.UUID = order.UUID })), "immutable #/tenant"},
		{"a domain that changes", update(with(tenantA, func(e *catalog.Tenant) { e.Meta.Tenant.Domain = "z.example" })), "immutable #/tenant"},
		{"an API's name", update(with(pasta, func(a *catalog.API) { a.Name = "x" })), "immutable #/name"},
		{"an API's version", update(with(pasta, func(a *catalog.API) { a.Version = "2" })), "immutable #/version"},
		{"a policy's name", update(with(gold, func(p *catalog.Policy) { p.Name = "x" })), "immutable #/name"},
		{"a policy's kind", update(with(gold, func(p *catalog.Policy) { p.Kind = catalog.PolicyApplication })), "immutable #/kind"},
		{"a scope's name", update(with(order, func(s *catalog.Scope) { s.Name = "x" })), "immutable #/name"},
		{"a key manager's name", update(with(km, func(k *catalog.KeyManager) { k.Name = "x" })), "immutable #/name"},
		{"an issuer that changes", update(with(km, func(k *catalog.KeyManager) { k.Iss = "https://x" })), "immutable #/iss"},
		{"a lower lifetime", update(with(km, func(k *catalog.KeyManager) { k.MaxTokenLifetime-- })), "immutable #/max_token_lifetime"},
		{"our own issuer's lifetime", update(with(resident[0].(*catalog.KeyManager), func(k *catalog.KeyManager) { k.MaxTokenLifetime++ })), "immutable #/max_token_lifetime"},
		{"an owner", update(with(app, func(a *catalog.Application) { a.Owner = "x" })), "immutable #/owner"},
		{"a consumer key", update(with(key, func(k *catalog.KeyMapping) { k.ConsumerKey = "x" })), "immutable #/consumer_key"},
		{"a key's application", update(with(key, func(k *catalog.KeyMapping) { k.Application = ref(other) })), "immutable #/application"},
		{"a subscription's application", update(with(sub, func(s *catalog.Subscription) { s.Application = ref(other) })), "immutable #/application"},
		{"a subscription's API", update(with(sub, func(s *catalog.Subscription) { s.API = ref(pasta) })), "immutable #/api"},

		{"a policy of an application", remove(find(catalog.PolicyApplication, carbon)), "in-use"},
		{"a policy of a subscription", remove(gold), "in-use"},
		{"a policy of operations", remove(find(catalog.PolicyAPI, carbon)), "in-use"},
		{"a scope of operations", remove(order), "in-use"},
		{"an API with subscriptions", remove(pizza), "in-use"},
		{"a key manager with keys", remove(km), "in-use"},
		{"our own issuer", remove(resident[0]), "in-use"},
		{"a tenant with something in it", remove(tenantA), "in-use"},
		{"a tenant with accounts", remove(bare), "in-use"},
		{"the super tenant", remove(&catalog.Tenant{Meta: catalog.Meta{UUID: superUUID(w)}}), "in-use"},

		{"no such entity", update(with(order, func(s *catalog.Scope) { s.UUID = uuid.NewString() })), "not found"},
		{"no UUID", remove(&catalog.Scope{}), "not found"},
		{"a version that is over", store.Change{Op: store.Update, Entity: order, IfTimestamp: 1}, "stale"},
		{"a deletion of one", store.Change{Op: store.Delete, Entity: order, IfTimestamp: 1}, "stale"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			state, head := w.all(), w.head()
			entities, _, err := w.Apply(t.Context(), admin, []store.Change{tt.change})
			if got := why(err); got != tt.want || entities != nil {
				t.Errorf("%q (%v), want %q", got, err, tt.want)
			}
			if failed, ok := errors.AsType[*store.Failed](err); !ok || failed.Index != 0 {
				t.Errorf("%T does not say which change", err)
			}
			if diff := cmp.Diff(state, w.all()); diff != "" || w.head() != head {
				t.Errorf("something changed:\n%s", diff)
			}
		})
	}
}

// with is a copy of e that change has changed.
func with[T any](e *T, change func(*T)) *T {
	c := *e
	change(&c)
	return &c
}

func superUUID(w *world) string {
	w.Helper()
	e, err := w.Get(w.Context(), admin, catalog.NounTenant, "-1234")
	if err != nil {
		w.Fatal(err)
	}
	return e.Base().UUID
}

// A batch sees its own changes, and a mistake in it undoes all.
func TestBatch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	id := func() string { return uuid.NewString() }
	appID, apiID, subID := id(), id(), id()
	tenant := in("new.example")
	at := func(uuid string) catalog.Meta { m := tenant; m.UUID = uuid; return m }
	batch := []store.Change{
		create(&catalog.Tenant{Meta: tenant}),
		create(&catalog.Policy{Meta: tenant, Kind: catalog.PolicySubscription, Name: "Gold"}),
		create(&catalog.Scope{Meta: tenant, Name: "order"}),
		create(with(api("pizza"), func(a *catalog.API) { a.Meta, a.Operations[0].Scopes = at(apiID), []string{"order"} })),
		create(with(application("app"), func(a *catalog.Application) { a.Meta = at(appID) })),
		create(&catalog.Subscription{Meta: at(subID), Application: catalog.Ref{UUID: appID}, API: catalog.Ref{UUID: apiID}, Policy: "Gold"}),
		update(&catalog.Subscription{Meta: catalog.Meta{UUID: subID}, Policy: "Unlimited", State: catalog.OnHold}),
		update(&catalog.Subscription{Meta: catalog.Meta{UUID: subID}, Policy: "Unlimited", State: catalog.Unblocked}),
		remove(&catalog.Subscription{Meta: catalog.Meta{UUID: subID}}),
		create(&catalog.Subscription{Meta: at(subID), Application: catalog.Ref{UUID: appID}, API: catalog.Ref{UUID: apiID}}),
	}
	before := w.all()
	bad := append(slices.Clone(batch), remove(&catalog.API{Meta: catalog.Meta{UUID: apiID}}))
	if _, _, err := w.Apply(t.Context(), admin, bad); why(err) != "[10] in-use" {
		t.Errorf("%v, want that the last change fails", err)
	}
	if diff := cmp.Diff(before, w.all()); diff != "" || w.head() != 0 {
		t.Fatalf("a batch that failed changed something:\n%s", diff)
	}
	got := w.apply(batch...)
	var stamps []int64
	for _, e := range got[6:8] {
		stamps = append(stamps, e.Base().Timestamp)
	}
	if stamps[0] >= stamps[1] {
		t.Errorf("timestamps %v of two updates in one batch", stamps)
	}
	if got[8].Base().UUID != got[9].Base().UUID || got[8].Base().ID == got[9].Base().ID {
		t.Errorf("%+v and %+v, want another id for what was made again", got[8].Base(), got[9].Base())
	}
	if diff := cmp.Diff(w.fold(before, 0), w.all()); diff != "" {
		t.Errorf("folded (-) and read (+):\n%s", diff)
	}
}

// Places are free as soon as they are left, in whatever order a batch does it.
func TestMovingNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	made := w.apply(create(application("a")), create(application("b")), create(application("c")))
	to := func(i int, name string) store.Change {
		return update(with(made[i].(*catalog.Application), func(a *catalog.Application) { a.Name = name }))
	}
	w.apply(to(0, "d"), to(1, "a"), to(2, "b"))
	w.apply(to(0, "x"), to(1, "d"), to(0, "a"))
	if _, _, err := w.Apply(t.Context(), admin, []store.Change{to(1, "q"), to(2, "a"), to(0, "b")}); why(err) != "[1] exists #/name" {
		t.Errorf("%v, want that the second fails", err)
	}
	if _, _, err := w.Apply(t.Context(), admin, []store.Change{create(application("n")), create(application("n"))}); why(err) != "[1] exists #/name" {
		t.Errorf("%v, want that the second fails", err)
	}
	var names []string
	for _, e := range made {
		now, err := w.Get(t.Context(), admin, catalog.NounApplication, e.Base().UUID)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, now.(*catalog.Application).Name)
	}
	if diff := cmp.Diff([]string{"a", "d", "b"}, names); diff != "" {
		t.Error(diff)
	}
}

func TestGivenIDs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	scope := func(name string, id int32) store.Change {
		return create(&catalog.Scope{Meta: catalog.Meta{ID: id}, Name: name})
	}
	var got []int32
	for _, changes := range [][]store.Change{
		{scope("a", 0)},
		{scope("b", 3), scope("c", 0)}, // the sequence is moved past what is given
		{scope("d", 2)},                // and never back
		{scope("e", 0)},
		{scope("f", 2_000_000_001)}, // nor past nearly all there is
		{scope("g", 0), scope("h", 0)},
		{scope("i", 2_000_000_000), scope("j", 2_147_483_647)},
		{scope("k", 100), scope("l", 0)},
		{scope("m", 0), scope("n", 1_000)},
	} {
		for _, e := range w.apply(changes...) {
			got = append(got, e.Base().ID)
		}
	}
	want := []int32{1, 3, 4, 2, 5, 2_000_000_001, 6, 7, 2_000_000_000, 2_147_483_647, 100, 101, 1001, 1000}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ids (-want +got):\n%s", diff)
	}
	// Ids that another version gave away are tried no second time.
	if _, err := w.pool.Exec(t.Context(), `INSERT INTO rescind.scopes (id, tenant_id, name) SELECT n, -1234, 'taken' || n FROM generate_series(1002, 1010) n`); err != nil {
		t.Fatal(err)
	}
	if e := w.apply(scope("o", 0))[0]; e.Base().ID != 1011 {
		t.Errorf("id %d, want 1011", e.Base().ID)
	}
	tenants := w.apply(create(&catalog.Tenant{Meta: catalog.Meta{ID: -7, Tenant: revocation.Tenant{Domain: "neg.example"}}}),
		create(&catalog.Tenant{Meta: in("made.example")}))
	if tenants[0].Base().Tenant.ID != -7 || tenants[1].Base().ID != 1 || tenants[1].Base().Tenant.ID != 1 {
		t.Errorf("tenants %+v, %+v", tenants[0].Base(), tenants[1].Base())
	}
}

func TestTenantAdminSeesItsTenantOnly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(create(&catalog.Tenant{Meta: in("a.example")}), create(&catalog.Tenant{Meta: in("b.example")}))
	own := store.Caller{Tenant: "a.example"}
	mine, _, err := w.Apply(t.Context(), own, []store.Change{
		create(application("mine")), create(api("mine")), create(&catalog.Scope{Name: "s"}),
		create(&catalog.Policy{Kind: catalog.PolicyAPI, Name: "p"}),
	})
	if err != nil || mine[0].Base().Tenant.Domain != "a.example" {
		t.Fatal(mine, err)
	}
	var theirs []catalog.Entity
	for _, e := range []catalog.Entity{application("theirs"), api("theirs"), keyManager("theirs"), &catalog.Scope{Name: "s"},
		&catalog.Policy{Kind: catalog.PolicyAPI, Name: "p"}} {
		*e.Base() = in("b.example")
		theirs = append(theirs, w.apply(create(e))[0])
	}
	theirs = append(theirs, w.apply(create(mapping(theirs[0], "theirs", "k", catalog.Production)), create(subscription(theirs[0], theirs[1])))...)
	state := w.all()
	try := func(name, want string, err error) {
		t.Helper()
		if why(err) != want {
			t.Errorf("%s: %q (%v), want %q", name, why(err), err, want)
		}
	}
	for _, e := range theirs {
		n := string(e.Noun())
		_, err := w.Get(t.Context(), own, e.Noun(), e.Base().UUID)
		try("get "+n, "not found", err)
		_, err = w.Get(t.Context(), own, e.Noun(), fmt.Sprint(e.Base().ID))
		try("get by id "+n, "not found", err)
		_, _, err = w.Apply(t.Context(), own, []store.Change{update(e)})
		try("update "+n, "not found", err)
		_, _, err = w.Apply(t.Context(), own, []store.Change{remove(e)})
		want := "not found"
		if e.Noun() == catalog.NounKeyManager {
			want = "invalid #/iss" // also of its own
		}
		try("delete "+n, want, err)
		for _, f := range []store.Filter{{}, {Tenant: "b.example"}} {
			list, err := w.List(t.Context(), own, e.Noun(), f, 0, 100)
			if err != nil || slices.ContainsFunc(list, func(e catalog.Entity) bool { return e.Base().Tenant.Domain != "a.example" }) {
				t.Errorf("list %s: %v, %v", n, list, err)
			}
		}
	}
	_, err = w.Block(t.Context(), own, theirs[0].Base().UUID, 0, true, false)
	try("block", "not found", err)
	_, _, err = w.RotateKey(t.Context(), own, theirs[5].Base().UUID, 0, authn.Rotation{}, false)
	try("rotate", "not found", err)
	_, _, err = w.CreateKey(t.Context(), own, store.NewKey{Mapping: *mapping(theirs[0], "theirs", "k2", catalog.Production)})
	try("key of theirs", "invalid #/application", err)
	_, _, err = w.Apply(t.Context(), own, []store.Change{create(subscription(mine[0], theirs[1]))})
	try("subscribe to theirs", "invalid #/api", err)
	_, _, err = w.Apply(t.Context(), own, []store.Change{create(subscription(theirs[0], mine[1]))})
	try("subscribe theirs", "invalid #/application", err)
	_, _, err = w.Apply(t.Context(), own, []store.Change{create(mapping(mine[0], "theirs", "k3", catalog.Production))})
	try("a key of their key manager", "invalid #/key_manager", err)
	for _, domain := range []string{"b.example", "carbon.super", "nobody.example"} {
		_, _, err = w.Apply(t.Context(), own, []store.Change{create(&catalog.Scope{Meta: in(domain), Name: "x"})})
		try("create in "+domain, "not found", err)
	}
	list, err := w.List(t.Context(), own, catalog.NounTenant, store.Filter{}, 0, 100)
	if err != nil || len(list) != 1 || list[0].Base().Tenant.Domain != "a.example" {
		t.Errorf("tenants %v, %v", list, err)
	}
	for _, c := range []store.Change{create(&catalog.Tenant{Meta: in("c.example")}), update(list[0]), remove(list[0])} {
		_, _, err = w.Apply(t.Context(), own, []store.Change{c})
		try("a tenant", "invalid #/tenant", err)
	}
	if diff := cmp.Diff(state, w.all()); diff != "" {
		t.Errorf("something changed:\n%s", diff)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(create(keyManager("km")))
	app := made[*catalog.Application](w, create(application("app")))
	var keys []store.Change
	for i := range 101 {
		keys = append(keys, create(mapping(app, "km", fmt.Sprint("k", i), catalog.Sandbox)))
	}
	if _, _, err := w.Apply(t.Context(), admin, keys); why(err) != "[100] limit #/application" {
		t.Errorf("%v, want too many keys", err)
	}
	w.apply(keys[:100]...)
	if _, _, err := w.Apply(t.Context(), admin, keys[100:]); why(err) != "limit #/application" {
		t.Errorf("%v, want too many keys", err)
	}
	var many []store.Change
	for i := range 501 {
		many = append(many, create(&catalog.Scope{Name: fmt.Sprint("s", i)}))
	}
	if _, _, err := w.Apply(t.Context(), admin, many); why(err) != "limit" {
		t.Errorf("%v, want too many changes", err)
	}
	w.apply(many[:500]...)
	var deployed []store.Change
	for i := range 251 {
		deployed = append(deployed, create(with(api(fmt.Sprint("a", i)), func(a *catalog.API) { a.GatewayLabels = []string{"Default"} })))
	}
	if _, _, err := w.Apply(t.Context(), admin, deployed); why(err) != "limit" {
		t.Errorf("%v, want too many events", err)
	}
	if entities, at, err := w.Apply(t.Context(), admin, nil); err != nil || len(entities) != 0 || at.Seq != w.head() {
		t.Errorf("no changes: %v, %v, %v", entities, at, err)
	}
}
