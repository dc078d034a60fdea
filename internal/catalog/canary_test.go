package catalog_test

import (
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// canaryWorld is a catalog with issuers.
func canaryWorld(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	if err := w.EnsureIssuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) ensureCanary() {
	w.Helper()
	if err := w.EnsureCanary(w.Context()); err != nil {
		w.Fatal(err)
	}
}

// The canary's entities, by noun.
func (w *world) canary() map[catalog.Noun]catalog.Entity {
	w.Helper()
	found := make(map[catalog.Noun]catalog.Entity)
	for _, e := range w.all() {
		switch e := e.(type) {
		case *catalog.Application, *catalog.API, *catalog.Subscription, *catalog.KeyMapping:
			if found[e.Noun()] != nil {
				w.Errorf("there are two %ss", e.Noun())
			}
			found[e.Noun()] = e
		}
	}
	return found
}

func TestEnsureCanary(t *testing.T) {
	t.Parallel()
	w := canaryWorld(t)
	before, start := w.all(), w.head()
	w.ensureCanary()
	want := []string{
		"application.created rescind/rescind-canary", "api.created RescindCanary:v1", "subscription.created", "key_mapping.created rescind-canary",
	}
	told := w.told(start)
	if len(told) != len(want) {
		t.Fatalf("told is %q", told)
	}
	for i, e := range told {
		if !strings.Contains(e, strings.Fields(want[i])[0]) {
			t.Errorf("told is %q, want %q", e, want[i])
		}
	}
	if d := cmp.Diff(w.all(), w.fold(before, start)); d != "" {
		t.Errorf("the log says otherwise (-database +log):\n%s", d)
	}
	made := w.canary()
	app, api := made[catalog.NounApplication].(*catalog.Application), made[catalog.NounAPI].(*catalog.API)
	sub, key := made[catalog.NounSubscription].(*catalog.Subscription), made[catalog.NounKeyMapping].(*catalog.KeyMapping)
	if app.Name != "rescind-canary" || app.Owner != "rescind" || !app.SelfContained || app.Tenant != revocation.SuperTenant || app.Blocked {
		t.Errorf("the application is %+v", app)
	}
	wantAPI := &catalog.API{
		Meta: api.Meta, Name: "RescindCanary", Version: "v1", Context: "/rescind-canary/v1", Provider: "rescind", Type: "HTTP", Status: catalog.APIPublished,
		SecurityScheme: []string{"oauth2"}, Operations: []catalog.Operation{{Target: "/*", Verb: "GET", AuthType: "Any", Policy: "Unlimited"}},
	}
	if d := cmp.Diff(wantAPI, api); d != "" {
		t.Errorf("the API (-want +got):\n%s", d)
	}
	if sub.Application != ref(app) || sub.API != ref(api) || sub.Policy != "Unlimited" || sub.State != catalog.Unblocked {
		t.Errorf("the subscription is %+v", sub)
	}
	if key.Application != ref(app) || key.ConsumerKey != store.CanaryKey || key.Iss != ownIss || key.KeyType != catalog.Production || key.Generated {
		t.Errorf("the key is %+v", key)
	}
	if n := w.count(`SELECT count(*) FROM rescind.audit WHERE actor = 'canary' AND action LIKE 'create_%'`); n != 4 {
		t.Errorf("%d records in the audit, want 4", n)
	}
	if n := w.count(`SELECT count(*) FROM rescind.clients`); n != 0 {
		t.Errorf("%d clients, want none: nobody may ask for the canary's tokens", n)
	}

	head := w.head()
	w.ensureCanary()
	if w.head() != head {
		t.Errorf("a second time: %q", w.told(head))
	}
}

// What admins delete comes back, and what they change stays.
func TestEnsureCanaryRepairs(t *testing.T) {
	t.Parallel()
	w := canaryWorld(t)
	w.ensureCanary()
	whole := len(w.all())
	del := func(nouns ...catalog.Noun) func() {
		return func() {
			for _, n := range nouns {
				w.apply(remove(w.canary()[n]))
			}
		}
	}
	for name, damage := range map[string]func(){
		"key":          del(catalog.NounKeyMapping),
		"subscription": del(catalog.NounSubscription),
		"application":  del(catalog.NounApplication),
		"API":          del(catalog.NounSubscription, catalog.NounAPI),
		"everything": func() {
			del(catalog.NounApplication, catalog.NounAPI)()
			list, err := w.List(t.Context(), admin, catalog.NounPolicy, store.Filter{Tenant: revocation.SuperTenant.Domain}, 0, 10)
			if err != nil {
				t.Fatal(err)
			}
			if len(list) != 3 {
				t.Fatalf("there are %d policies", len(list))
			}
			for _, p := range list {
				w.apply(remove(p))
			}
		},
	} {
		damage()
		if n := len(w.all()); n >= whole {
			t.Fatalf("%s: nothing is gone", name)
		}
		w.ensureCanary()
		if n := len(w.all()); n != whole || len(w.canary()) != 4 {
			t.Errorf("%s: afterwards there are %d entities, want %d", name, n, whole)
		}
	}

	api := *w.canary()[catalog.NounAPI].(*catalog.API)
	api.Context, api.GatewayLabels = "/elsewhere/v1", []string{"Default"}
	w.apply(update(&api))
	if _, err := w.Block(t.Context(), admin, w.canary()[catalog.NounApplication].Base().UUID, 0, true, false); err != nil {
		t.Fatal(err)
	}
	before := w.all()
	w.ensureCanary()
	if d := cmp.Diff(before, w.all()); d != "" {
		t.Errorf("what was changed is changed again:\n%s", d)
	}
}

func TestEnsureCanaryConflicts(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		damage func(w *world)
		want   string
	}{
		"a subscription of another API": {func(w *world) {
			w.ensureCanary()
			app := w.canary()[catalog.NounApplication]
			w.apply(create(subscription(app, made[*catalog.API](w, create(api("pizza"))))))
		}, "exists"},
		"tokens that carry no APIs": {func(w *world) {
			w.ensureCanary()
			app := *w.canary()[catalog.NounApplication].(*catalog.Application)
			app.SelfContained = false
			w.apply(update(&app))
		}, "exists"},
		"a taken key": {func(w *world) {
			app := made[*catalog.Application](w, create(application("app")))
			_, _, err := w.CreateKey(t.Context(), admin, store.NewKey{
				Mapping: *mapping(app, "", store.CanaryKey, catalog.Production), Client: &authn.Registration{},
			})
			if err != nil {
				t.Fatal(err)
			}
		}, "exists #/consumer_key"},
		"a taken context": {func(w *world) {
			other := api("other")
			other.Context = "/rescind-canary/v1"
			w.apply(create(other))
		}, "exists #/context"},
		"no issuer": {func(w *world) {
			if _, err := w.pool.Exec(t.Context(), `DELETE FROM rescind.key_managers`); err != nil {
				t.Fatal(err)
			}
		}, "invalid #/key_manager"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := canaryWorld(t)
			tt.damage(w)
			before, head := w.all(), w.head()
			if err := w.EnsureCanary(t.Context()); why(err) != tt.want {
				t.Errorf("EnsureCanary: %v, want %q", err, tt.want)
			}
			if d := cmp.Diff(before, w.all()); d != "" || w.head() != head {
				t.Errorf("something was made:\n%s", d)
			}
		})
	}
}

func TestEnsureCanaryAtOnce(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	var processes []*world
	for range 4 {
		processes = append(processes, newWorldOn(t, pool))
	}
	w := processes[0]
	if err := w.EnsureIssuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	head := w.head()
	for range 3 {
		var all sync.WaitGroup
		for _, p := range processes {
			all.Go(func() {
				if err := p.EnsureCanary(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if told := w.told(head); len(told) != 4 {
			t.Errorf("told is %q, want four", told)
		}
		w.apply(remove(w.canary()[catalog.NounApplication]))
		w.apply(remove(w.canary()[catalog.NounAPI]))
		head = w.head()
	}
}
