package catalog_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
)

// A row that a process which does not lock the tenant is about to commit has the id or the place.
func TestQuickerThanUs(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.apply(create(&catalog.Scope{Name: "first"}))[0]
	for _, tt := range []struct{ insert, want string }{
		{`INSERT INTO rescind.scopes (id, tenant_id, name) VALUES ($1, -1234, 'theirs')`, ""},
		{`INSERT INTO rescind.scopes (id, tenant_id, name) VALUES ($1 + 100000, -1234, 'ours')`, "exists #/name"},
	} {
		tx, err := w.pool.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), tt.insert, first.Base().ID+1); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, _, err := w.Apply(t.Context(), admin, []store.Change{create(&catalog.Scope{Name: "ours"})})
			done <- err
		}()
		w.waitFor(`SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT INTO rescind.scopes%' AND datname = current_database()`)
		if err := tx.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := <-done; why(err) != tt.want {
			t.Errorf("%q (%v), want %q", why(err), err, tt.want)
		}
		if _, err := w.pool.Exec(t.Context(), `DELETE FROM rescind.scopes WHERE name = 'ours'`); err != nil {
			t.Fatal(err)
		}
	}
}

// A key that goes elsewhere while its secret is being rotated keeps its secret.
func TestRotationOfWhatIsGone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if _, err := w.EnsureKeyManager(t.Context(), catalog.KeyManager{Iss: ownIss, Resident: true, Enabled: true, MaxTokenLifetime: 3600}); err != nil {
		t.Fatal(err)
	}
	app := made[*catalog.Application](w, create(application("app")))
	key, _, err := w.CreateKey(t.Context(), admin, store.NewKey{Mapping: *mapping(app, "", "", catalog.Production), Client: &authn.Registration{}})
	if err != nil {
		t.Fatal(err)
	}
	const secretsSQL = `SELECT count(*) FROM rescind.client_secrets`
	before := w.count(secretsSQL)
	tx, err := w.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT FROM rescind.tenants WHERE id = -1234 FOR NO KEY UPDATE`); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, _, err := w.RotateKey(t.Context(), admin, key.UUID, 0, authn.Rotation{EndPrevious: true}, true)
		done <- err
	}()
	w.waitFor(`SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%FROM rescind.tenants t%' AND datname = current_database()`)
	// As when it is deleted, and made again by another application.
	if _, err := tx.Exec(t.Context(), `UPDATE rescind.key_mappings SET uuid = gen_random_uuid()`); err != nil {
		t.Fatal(err)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; why(err) != "not found" {
		t.Errorf("%v, want that it is not found", err)
	}
	if n := w.count(secretsSQL); n != before {
		t.Errorf("%d secrets after %d", n, before)
	}
}

// waitFor returns once sql counts something.
func (w *world) waitFor(sql string) {
	w.Helper()
	ctx := within(w, 20*time.Second)
	for w.count(sql) == 0 {
		if ctx.Err() != nil {
			w.Fatalf("never true: %s", sql)
		}
	}
}

// Of those who change one version, one wins.
func TestOneWins(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	worlds := []*world{w, newWorldOn(t, w.pool)}
	cur := made[*catalog.Scope](w, create(&catalog.Scope{Name: "s"}))
	for round := range 10 {
		var wg sync.WaitGroup
		errs := make([]error, 6)
		for i := range errs {
			wg.Go(func() {
				want := with(cur, func(s *catalog.Scope) { s.DisplayName = fmt.Sprint(round, "-", i) })
				_, _, errs[i] = worlds[i%2].Apply(t.Context(), admin, []store.Change{{Op: store.Update, Entity: want, IfTimestamp: cur.Timestamp}})
			})
		}
		wg.Wait()
		winner := -1
		for i, err := range errs {
			switch {
			case err == nil && winner < 0:
				winner = i
			case !errors.Is(err, store.ErrStale):
				t.Errorf("caller %d: %v, the winner is %d", i, err, winner)
			}
		}
		now, err := w.Get(t.Context(), admin, catalog.NounScope, cur.UUID)
		if err != nil {
			t.Fatal(err)
		}
		if next := now.(*catalog.Scope); winner < 0 || next.DisplayName != fmt.Sprint(round, "-", winner) || next.Timestamp <= cur.Timestamp {
			t.Fatalf("winner %d, %+v after %+v", winner, next, cur)
		} else {
			cur = next
		}
	}
}

// Whoever is first, nothing refers to a policy that is gone, and batches in opposite
// orders all come to an end.
func TestRaces(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	worlds := []*world{w, newWorldOn(t, w.pool)}
	w.apply(create(&catalog.Tenant{Meta: in("a.example")}))
	for round := range 8 {
		gold := made[*catalog.Policy](w, create(&catalog.Policy{Kind: catalog.PolicyApplication, Name: "Gold"}))
		scopes := w.apply(create(&catalog.Scope{Name: fmt.Sprint("x", round)}), create(&catalog.Scope{Meta: in("a.example"), Name: fmt.Sprint("y", round)}))
		var wg sync.WaitGroup
		var created, deleted error
		app := with(application(fmt.Sprint("app", round)), func(a *catalog.Application) { a.Policy = "Gold" })
		wg.Go(func() { _, _, created = worlds[0].Apply(t.Context(), admin, []store.Change{create(app)}) })
		wg.Go(func() { _, _, deleted = worlds[1].Apply(t.Context(), admin, []store.Change{remove(gold)}) })
		for i := range 4 {
			wg.Go(func() {
				order := []store.Change{}
				for _, s := range scopes {
					order = append(order, update(with(s.(*catalog.Scope), func(s *catalog.Scope) { s.Description = fmt.Sprint(i) })))
				}
				if i%2 == 0 {
					slices.Reverse(order)
				}
				if _, _, err := worlds[i/2].Apply(t.Context(), admin, order); err != nil {
					t.Errorf("batch %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		if (created == nil) == (deleted == nil) || created != nil && why(created) != "invalid #/policy" || deleted != nil && why(deleted) != "in-use" {
			t.Errorf("created: %v, deleted: %v", created, deleted)
		}
		if created == nil {
			w.apply(remove(w.find(catalog.NounApplication, app.Name)), remove(gold))
		}
	}
	if n := w.count(`SELECT count(*) FROM rescind.applications a WHERE NOT EXISTS (
		SELECT FROM rescind.policies p WHERE p.tenant_id = a.tenant_id AND p.kind = 'application' AND p.name = a.policy)`); n != 0 {
		t.Errorf("%d applications have no policy", n)
	}
}

func (w *world) find(n catalog.Noun, name string) catalog.Entity {
	w.Helper()
	list, err := w.List(w.Context(), admin, n, store.Filter{Name: name}, 0, 2)
	if err != nil || len(list) != 1 {
		w.Fatal(list, err)
	}
	return list[0]
}

// Whatever is done, the events make of the state before them the state after them.
func TestFoldedLogIsState(t *testing.T) {
	t.Parallel()
	for seed := range uint64(3) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			state := w.all()
			h := &history{rand.New(rand.NewPCG(seed, 7)), w}
			if err := w.Announce(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := w.EnsureIssuers(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.apply(create(&catalog.Tenant{Meta: in("t0.example")}))
			for _, tenant := range []string{"carbon.super", "t0.example"} {
				w.apply(create(&catalog.Scope{Meta: in(tenant), Name: "s0"}),
					create(&catalog.Policy{Meta: in(tenant), Kind: catalog.PolicyAPI, Name: "p0"}),
					create(&catalog.Policy{Meta: in(tenant), Kind: catalog.PolicyApplication, Name: "p0"}),
					create(&catalog.Policy{Meta: in(tenant), Kind: catalog.PolicySubscription, Name: "p0"}),
					create(with(application("a"), func(a *catalog.Application) { a.Meta = in(tenant) })))
			}
			made, refused := 0, 0
			for range 150 {
				var err error
				if app := h.pick(catalog.NounApplication); app != nil && h.IntN(6) == 0 {
					_, err = w.Block(t.Context(), admin, app.Base().UUID, 0, h.IntN(2) == 0, h.IntN(2) == 0)
				} else {
					changes := make([]store.Change, 1+h.IntN(3))
					for i := range changes {
						changes[i] = h.change()
					}
					_, _, err = w.Apply(t.Context(), admin, changes)
				}
				if err == nil {
					made++
				} else if refused++; strings.HasPrefix(why(err), "error") {
					t.Fatal(err)
				}
			}
			if made < 30 || refused < 10 {
				t.Errorf("%d made and %d refused: the histories are no good", made, refused)
			}
			if diff := cmp.Diff(w.fold(state, 0), w.all(), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("folded (-) and read (+):\n%s", diff)
			}
			if n := w.count(`SELECT count(*) FROM rescind.subscriptions s JOIN rescind.applications a ON a.id = s.application_id WHERE a.blocked <> s.application_blocked`); n != 0 {
				t.Errorf("%d subscriptions differ from their application", n)
			}
			if n := w.count(`SELECT count(*) FROM rescind.tenants t WHERE NOT EXISTS (SELECT FROM rescind.key_managers k WHERE k.tenant_id = t.id AND k.resident)`); n != 0 {
				t.Errorf("%d tenants have no issuer", n)
			}
		})
	}
}

// history makes changes of a small world, many of which meet.
type history struct {
	*rand.Rand
	w *world
}

// pick returns something that is there, nil if nothing is.
func (h *history) pick(n catalog.Noun) catalog.Entity {
	h.w.Helper()
	list, err := h.w.List(h.w.Context(), admin, n, store.Filter{}, 0, 1000)
	if err != nil {
		h.w.Fatal(err)
	}
	if len(list) == 0 {
		return nil
	}
	return list[h.IntN(len(list))]
}

func (h *history) name(prefix string, n int) string { return fmt.Sprint(prefix, h.IntN(n)) }

func (h *history) one(s ...string) string { return s[h.IntN(len(s))] }

func (h *history) change() store.Change {
	n := catalog.Nouns[h.IntN(len(catalog.Nouns))]
	if h.IntN(3) > 0 {
		n = []catalog.Noun{catalog.NounAPI, catalog.NounApplication, catalog.NounKeyMapping, catalog.NounSubscription}[h.IntN(4)]
	}
	old := h.pick(n)
	c := store.Change{Op: store.Create, Entity: h.entity(n), KeepTokens: h.IntN(4) == 0}
	switch r := h.IntN(10); {
	case old == nil || r < 5:
	case r < 8:
		c.Op = store.Update
		c.Entity.Base().UUID, c.Entity.Base().Tenant = old.Base().UUID, revocation.Tenant{}
		switch e := c.Entity.(type) { // names stay
		case *catalog.API:
			e.Name, e.Version = old.(*catalog.API).Name, old.(*catalog.API).Version
		case *catalog.Policy:
			e.Kind, e.Name = old.(*catalog.Policy).Kind, old.(*catalog.Policy).Name
		case *catalog.Scope:
			e.Name = old.(*catalog.Scope).Name
		case *catalog.Subscription:
			e.Application, e.API = catalog.Ref{}, catalog.Ref{}
		case *catalog.KeyManager:
			e.Name, e.Iss, e.MaxTokenLifetime = old.(*catalog.KeyManager).Name, old.(*catalog.KeyManager).Iss, old.(*catalog.KeyManager).MaxTokenLifetime
		}
	default:
		c.Op, c.Entity = store.Delete, old
	}
	return c
}

func (h *history) entity(n catalog.Noun) catalog.Entity {
	refTo := func(n catalog.Noun) catalog.Ref {
		if e := h.pick(n); e != nil {
			return ref(e)
		}
		return catalog.Ref{ID: 1}
	}
	m := in(h.one("carbon.super", "carbon.super", "t0.example"))
	policy := h.one("Unlimited", "Unlimited", "Unlimited", "p0", "p0", "p1")
	switch n {
	case catalog.NounTenant:
		return &catalog.Tenant{Meta: in(h.name("t", 3) + ".example"), DisplayName: h.name("d", 3)}
	case catalog.NounKeyManager:
		name := h.name("km", 3)
		return &catalog.KeyManager{Meta: m, Name: name, Iss: "https://" + name, MaxTokenLifetime: 60, Enabled: h.IntN(2) == 0}
	case catalog.NounPolicy:
		return &catalog.Policy{Meta: m, Kind: h.one("subscription", "application", "api"), Name: h.name("p", 2), Description: h.name("d", 3)}
	case catalog.NounScope:
		return &catalog.Scope{Meta: m, Name: h.name("s", 2), Roles: []string{h.name("r", 3)}}
	case catalog.NounAPI:
		a := api(h.name("api", 12))
		a.Meta, a.Policy, a.Status, a.Context = m, h.one("", policy), h.one(catalog.APIPublished, catalog.APIBlocked), h.name("/c", 20)
		a.Operations[0].Scopes = [][]string{nil, {"s0"}}[h.IntN(2)]
		a.GatewayLabels = [][]string{nil, {"Default"}, {"Default", "b"}, {"b"}}[h.IntN(4)]
		return a
	case catalog.NounApplication:
		a := application(h.name("app", 20))
		a.Meta, a.Policy, a.Attributes, a.SelfContained = m, policy, map[string]string{"a": h.name("v", 3)}, h.IntN(4) == 0
		return a
	case catalog.NounKeyMapping:
		return &catalog.KeyMapping{Application: refTo(catalog.NounApplication), KeyManager: h.one("km0", "km1", "km2", "Resident Key Manager"), ConsumerKey: h.name("k", 30), KeyType: h.one(catalog.Production, catalog.Sandbox)}
	}
	return &catalog.Subscription{Application: refTo(catalog.NounApplication), API: refTo(catalog.NounAPI), Policy: policy,
		State: h.one(catalog.Unblocked, catalog.Unblocked, catalog.Blocked, catalog.ProdOnlyBlocked)}
}

// A batch of subscriptions is what loading a catalog is made of: 500 take well under 0.1 s.
func BenchmarkSubscribe500(b *testing.B) {
	w := newWorld(b)
	var apps, apis []store.Change
	for i := range 500 {
		apps = append(apps, create(application(fmt.Sprint("app", i))))
		apis = append(apis, create(api(fmt.Sprint("api", i))))
	}
	holders, offers := w.apply(apps...), w.apply(apis...)
	n := 0
	for b.Loop() {
		var subs []store.Change
		for i := range 500 {
			subs = append(subs, create(subscription(holders[(i+n)%500], offers[i])))
		}
		n++
		w.apply(subs...)
	}
}
