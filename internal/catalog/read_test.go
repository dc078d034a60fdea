package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
)

func TestList(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(create(&catalog.Tenant{Meta: in("a.example")}), create(keyManager("km")),
		create(with(keyManager("km2"), func(k *catalog.KeyManager) { k.Name, k.Meta = "km", in("a.example") })))
	apps := w.apply(create(application("one")), create(application("two")), create(with(application("one"), func(a *catalog.Application) { a.Meta = in("a.example") })))
	apis := w.apply(create(api("x")), create(api("y")), create(with(api("x"), func(a *catalog.API) { a.Meta = in("a.example") })))
	keys := w.apply(create(mapping(apps[0], "km", "k1", catalog.Production)), create(mapping(apps[2], "km", "k1", catalog.Production)),
		create(mapping(apps[1], "km", "k2", catalog.Production)), create(mapping(apps[0], "km", "k3", catalog.Production)))
	subs := w.apply(create(subscription(apps[0], apis[0])), create(subscription(apps[0], apis[1])), create(subscription(apps[1], apis[0])), create(subscription(apps[2], apis[2])))
	scope := w.apply(create(&catalog.Scope{Name: "s"}))[0]
	id := func(e catalog.Entity) string { return e.Base().UUID }
	own := store.Caller{Tenant: "a.example"}

	for _, tt := range []struct {
		name   string
		by     store.Caller
		noun   catalog.Noun
		filter store.Filter
		want   []catalog.Entity
	}{
		{"all", admin, catalog.NounApplication, store.Filter{}, apps},
		{"a tenant's", admin, catalog.NounApplication, store.Filter{Tenant: "carbon.super"}, apps[:2]},
		{"no tenant's", admin, catalog.NounApplication, store.Filter{Tenant: "b.example"}, nil},
		{"its own", own, catalog.NounApplication, store.Filter{}, apps[2:]},
		{"its own, named", own, catalog.NounApplication, store.Filter{Tenant: "a.example"}, apps[2:]},
		{"another's", own, catalog.NounApplication, store.Filter{Tenant: "carbon.super"}, nil},
		{"by name", admin, catalog.NounAPI, store.Filter{Name: "x"}, []catalog.Entity{apis[0], apis[2]}},
		{"by name and tenant", admin, catalog.NounAPI, store.Filter{Name: "x", Tenant: "a.example"}, apis[2:]},
		{"a scope", admin, catalog.NounScope, store.Filter{Name: "s"}, []catalog.Entity{scope}},
		{"keys of a tenant", admin, catalog.NounKeyMapping, store.Filter{Tenant: "carbon.super"}, []catalog.Entity{keys[0], keys[2], keys[3]}},
		{"keys of its own", own, catalog.NounKeyMapping, store.Filter{}, keys[1:2]},
		{"keys of an application", admin, catalog.NounKeyMapping, store.Filter{Application: id(apps[0])}, []catalog.Entity{keys[0], keys[3]}},
		{"a key", admin, catalog.NounKeyMapping, store.Filter{ConsumerKey: "k1"}, keys[:2]},
		{"a key of a tenant", own, catalog.NounKeyMapping, store.Filter{ConsumerKey: "k1"}, keys[1:2]},
		{"a key of an application", admin, catalog.NounKeyMapping, store.Filter{ConsumerKey: "k1", Application: id(apps[0])}, keys[:1]},
		{"subscriptions of an application", admin, catalog.NounSubscription, store.Filter{Application: id(apps[0])}, subs[:2]},
		{"subscriptions to an API", admin, catalog.NounSubscription, store.Filter{API: id(apis[0])}, []catalog.Entity{subs[0], subs[2]}},
		{"one subscription", admin, catalog.NounSubscription, store.Filter{API: id(apis[0]), Application: id(apps[1])}, subs[2:3]},
		{"subscriptions of its own", own, catalog.NounSubscription, store.Filter{}, subs[3:]},
		{"what is no UUID", admin, catalog.NounSubscription, store.Filter{API: "x"}, nil},
		{"what is nobody's", admin, catalog.NounSubscription, store.Filter{API: uuid.NewString()}, nil},
	} {
		got, err := w.List(t.Context(), tt.by, tt.noun, tt.filter, 0, 100)
		if diff := cmp.Diff(tt.want, got, cmpopts.EquateEmpty()); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", tt.name, err, diff)
		}
		var pages []catalog.Entity
		for after := int32(0); ; after = pages[len(pages)-1].Base().ID {
			page, err := w.List(t.Context(), tt.by, tt.noun, tt.filter, after, 2)
			if err != nil {
				t.Fatal(err)
			}
			if pages = append(pages, page...); len(page) < 2 {
				break
			}
		}
		if diff := cmp.Diff(tt.want, pages, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s, in pages (-want +got):\n%s", tt.name, diff)
		}
	}
	tenants, err := w.List(t.Context(), admin, catalog.NounTenant, store.Filter{}, 0, 1)
	if err != nil || len(tenants) != 1 || tenants[0].Base().ID != -1234 {
		t.Errorf("tenants begin with %v, %v", tenants, err)
	}
	if policies, err := w.List(t.Context(), admin, catalog.NounPolicy, store.Filter{Tenant: "a.example", Kind: "api"}, 0, 9); err != nil || len(policies) != 1 {
		t.Errorf("API policies %v, %v", policies, err)
	}
	if _, err := w.List(t.Context(), admin, catalog.NounSubscription, store.Filter{Name: "x"}, 0, 9); why(err) != "invalid #/name" {
		t.Errorf("a filter that is none: %v", err)
	}
	for _, id := range []string{"", "x", "99999999999", "0", uuid.NewString(), strings.ToUpper(id(apps[0]))} {
		if _, err := w.Get(t.Context(), admin, catalog.NounApplication, id); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("Get %q: %v", id, err)
		}
	}
}

// What refers comes after what it refers to, and whoever has enough may leave.
func TestReadAllInOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.held(3)
	err := pgx.BeginFunc(t.Context(), w.pool, func(tx pgx.Tx) error {
		seen := map[catalog.Noun]int{}
		last := 0
		for e, err := range store.ReadAll(t.Context(), tx) {
			if err != nil {
				return err
			}
			for i, n := range catalog.Nouns {
				if n == e.Noun() && i < last {
					t.Errorf("%s after %s", n, catalog.Nouns[last])
				} else if n == e.Noun() {
					last = i
				}
			}
			seen[e.Noun()]++
		}
		want := map[catalog.Noun]int{
			catalog.NounTenant: 1, catalog.NounKeyManager: 1, catalog.NounPolicy: 3, catalog.NounAPI: 3,
			catalog.NounApplication: 1, catalog.NounKeyMapping: 1, catalog.NounSubscription: 3,
		}
		if diff := cmp.Diff(want, seen); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		for range store.ReadAll(t.Context(), tx) {
			break
		}
		var n int
		return tx.QueryRow(t.Context(), `SELECT 1`).Scan(&n) // the connection is free again
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_ = pgx.BeginFunc(t.Context(), w.pool, func(tx pgx.Tx) error {
		cancel()
		n := 0
		for e, err := range store.ReadAll(ctx, tx) {
			if n++; err == nil || e != nil {
				t.Errorf("%v, %v of a context that has ended", e, err)
			}
		}
		if n != 1 {
			t.Errorf("%d errors, want 1", n)
		}
		return nil
	})
}

// Rows that another version of the service or a migration made are told once.
func TestAnnounce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if _, err := w.pool.Exec(t.Context(), `
		INSERT INTO rescind.applications (tenant_id, owner, name) SELECT -1234, 'admin', 'app' || n FROM generate_series(1, 620) n`); err != nil {
		t.Fatal(err)
	}
	if _, err := w.pool.Exec(t.Context(), `
		INSERT INTO rescind.apis (tenant_id, name, version, context, provider, type, status, gateway_labels)
		VALUES (-1234, 'a', '1', '/a', 'p', 'HTTP', 'PUBLISHED', '{Default}')`); err != nil {
		t.Fatal(err)
	}
	state := map[string]catalog.Entity{}
	for key, e := range w.all() {
		if e.Base().Timestamp != 0 {
			state[key] = e // carbon.super is there without being told
		}
	}
	var wg sync.WaitGroup
	for range 3 {
		process := newWorldOn(t, w.pool)
		wg.Go(func() {
			if err := process.Announce(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(w.events(0)); n != 3+620+2 {
		t.Errorf("%d events", n)
	}
	if first := w.told(0)[:5]; strings.Join(first, ",") != "policy.created subscription/Unlimited,policy.created application/Unlimited,policy.created api/Unlimited,api.created a:1,api.deployed a:1" {
		t.Errorf("begins with %q", first)
	}
	if diff := cmp.Diff(w.fold(state, 0), w.all()); diff != "" {
		t.Errorf("folded (-) and read (+):\n%s", diff)
	}

	// When there is nothing, the log is not asked; and a process of the version before may still make some.
	away := store.New(config, w.pool, refusing{}, w.clients, discard)
	if err := away.Announce(t.Context()); err != nil {
		t.Errorf("nothing to announce: %v", err)
	}
	if _, err := w.pool.Exec(t.Context(), `INSERT INTO rescind.applications (tenant_id, owner, name) VALUES (-1234, 'admin', 'late')`); err != nil {
		t.Fatal(err)
	}
	head := w.head()
	if err := w.Announce(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"application.created late"}, w.told(head)); diff != "" {
		t.Errorf("told (-want +got):\n%s", diff)
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if _, err := w.EnsureKeyManager(t.Context(), catalog.KeyManager{Iss: ownIss, Resident: true, Enabled: true, MaxTokenLifetime: 3600}); err != nil {
		t.Fatal(err)
	}
	w.apply(create(&catalog.Tenant{Meta: in("a.example")}), create(keyManager("km")))
	app := made[*catalog.Application](w, create(application("app")))
	status := func(id, secret string) int {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(""))
		r.SetBasicAuth(id, secret)
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if _, _, err := w.clients.Form(httptest.NewRecorder(), r); err != nil {
			return 401
		}
		return 200
	}

	head := w.head()
	made1, cred, err := w.CreateKey(t.Context(), admin, store.NewKey{
		Mapping: catalog.KeyMapping{Application: catalog.Ref{ID: app.ID}, KeyType: catalog.Production},
		Client:  &authn.Registration{ID: "ignored", Scopes: []string{"order"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if cred.ID != made1.ConsumerKey || cred.Secret == "" || !made1.Generated || made1.KeyManager != "Resident Key Manager" || made1.Iss != ownIss {
		t.Errorf("%+v, credentials for %s", made1, cred.ID)
	}
	wantIs(w, made1, made1)
	if got := w.told(head); len(got) != 1 || got[0] != "key_mapping.created "+cred.ID || strings.Contains(string(w.events(head)[0].Data), cred.Secret) {
		t.Errorf("told %q", got)
	}
	if status(cred.ID, cred.Secret) != 200 {
		t.Error("the new client is not let in")
	}

	head = w.head()
	for i, tt := range []struct {
		endPrevious, revoke bool
		given               string
		valid               []bool // the first secret, the one before, the new one
	}{
		{false, false, "", []bool{true, true, true}},
		{false, true, "moved", []bool{false, true, true}},
		{true, true, "", []bool{false, false, true}},
	} {
		before := cred.Secret
		if i > 0 {
			before = "moved"
		}
		m, rotated, err := w.RotateKey(t.Context(), admin, made1.UUID, made1.Timestamp, authn.Rotation{Secret: tt.given, EndPrevious: tt.endPrevious}, tt.revoke)
		if err != nil || m.UUID != made1.UUID || rotated.ID != cred.ID || tt.given != "" && rotated.Secret != tt.given {
			t.Fatal(m, err)
		}
		for j, secret := range []string{cred.Secret, before, rotated.Secret} {
			if i == 1 && j == 1 {
				continue
			}
			if got := status(cred.ID, secret) == 200; got != tt.valid[j] {
				t.Errorf("rotation %d: secret %d is valid: %t", i, j, got)
			}
		}
	}
	if got := w.told(head); len(got) == 0 || len(got) > 2 || got[0] != "revocation.client "+cred.ID {
		t.Errorf("rotations told %q", got)
	}
	if n := w.count(`SELECT count(*) FROM rescind.audit WHERE action = 'rotate_key' AND entity_id = $1::uuid AND iss = $2 AND subject = $3`, made1.UUID, ownIss, cred.ID); n != 3 {
		t.Errorf("%d audit records of 3 rotations", n)
	}

	// Whose tokens come from elsewhere may have a client for /revoke, or be mapped only.
	theirs, cred2, err := w.CreateKey(t.Context(), admin, store.NewKey{
		Mapping: catalog.KeyMapping{Application: ref(app), KeyType: catalog.Sandbox, KeyManager: "km", ConsumerKey: "theirs"}, Client: &authn.Registration{Secret: "s3cret"},
	})
	if err != nil || !theirs.Generated || cred2 != (authn.Credentials{ID: "theirs", Secret: "s3cret"}) || status("theirs", "s3cret") != 200 {
		t.Errorf("%+v, %v", theirs, err)
	}
	mapped, cred3, err := w.CreateKey(t.Context(), admin, store.NewKey{Mapping: *mapping(app, "km", "mapped", catalog.Sandbox)})
	if err != nil || mapped.Generated || cred3 != (authn.Credentials{ID: "mapped"}) {
		t.Errorf("%+v, %v", mapped, err)
	}
	lone := made[*catalog.Application](w, create(with(application("lone"), func(a *catalog.Application) { a.Meta = in("a.example") })))
	if _, err := w.pool.Exec(t.Context(), `DELETE FROM rescind.key_managers WHERE tenant_id = $1`, lone.Tenant.ID); err != nil {
		t.Fatal(err)
	}
	if err := w.clients.PutAccount(t.Context(), authn.Account{Username: "person", Tenant: revocation.SuperTenant, Role: "admin"}, "pw"); err != nil {
		t.Fatal(err)
	}
	client := &authn.Registration{}
	refused := func(name, want string, k store.NewKey) {
		t.Helper()
		state, head := w.all(), w.head()
		if _, _, err := w.CreateKey(t.Context(), admin, k); why(err) != want {
			t.Errorf("%s: %q (%v), want %q", name, why(err), err, want)
		}
		if diff := cmp.Diff(state, w.all()); diff != "" || w.head() != head {
			t.Errorf("%s changed:\n%s", name, diff)
		}
	}
	refused("no resident key manager", "invalid #/key_manager", store.NewKey{Mapping: *mapping(lone, "", "", catalog.Sandbox), Client: client})
	refused("nobody's", "invalid #/application", store.NewKey{Mapping: catalog.KeyMapping{Application: catalog.Ref{ID: 1 << 30}, KeyType: catalog.Sandbox}, Client: client})
	refused("malformed", "invalid #/application/uuid", store.NewKey{Mapping: catalog.KeyMapping{Application: catalog.Ref{UUID: "x"}, KeyType: catalog.Sandbox}, Client: client})
	refused("no type", "invalid #/key_type", store.NewKey{Mapping: *mapping(app, "", "", ""), Client: client})
	refused("mapped to our own issuer", "invalid #/key_manager", store.NewKey{Mapping: *mapping(app, "", "x", catalog.Sandbox)})
	refused("mapped without a key", "invalid #/consumer_key", store.NewKey{Mapping: *mapping(app, "km", "", catalog.Sandbox)})
	refused("a key that is there", "exists #/consumer_key", store.NewKey{Mapping: *mapping(app, "km", "mapped", catalog.Sandbox)})
	refused("another issuer's client", "exists #/consumer_key", store.NewKey{Mapping: *mapping(app, "", "theirs", catalog.Sandbox), Client: client})
	refused("a person's name", "exists #/consumer_key", store.NewKey{Mapping: *mapping(app, "", "person", catalog.Sandbox), Client: client})
	refused("a registration", "invalid #/auth_method", store.NewKey{Mapping: *mapping(app, "", "", catalog.Sandbox), Client: &authn.Registration{AuthMethod: "x"}})

	// Who proves itself with keys has others after a rotation, and no secret.
	const ecSet = `{"keys":[{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}`
	const edSet = `{"keys":[{"crv":"Ed25519","kty":"OKP","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}`
	keyed, _, err := w.CreateKey(t.Context(), admin, store.NewKey{
		Mapping: catalog.KeyMapping{Application: ref(app), KeyType: catalog.Sandbox, KeyManager: "km", ConsumerKey: "keyed"},
		Client:  &authn.Registration{AuthMethod: "private_key_jwt", JWKS: ecSet},
	})
	if err != nil {
		t.Fatal(err)
	}
	head = w.head()
	if _, _, err := w.RotateKey(t.Context(), admin, made1.UUID, 0, authn.Rotation{JWKS: edSet}, true); why(err) != "invalid #/jwks" || w.head() != head {
		t.Errorf("rotate a secret to keys: %v", err)
	}
	if m, rotated, err := w.RotateKey(t.Context(), admin, keyed.UUID, keyed.Timestamp, authn.Rotation{JWKS: edSet}, true); err != nil ||
		m.UUID != keyed.UUID || rotated != (authn.Credentials{ID: "keyed"}) {
		t.Errorf("rotate keys: %+v, %+v, %v", m, rotated, err)
	}
	if got := w.told(head); len(got) != 1 || got[0] != "revocation.client keyed" || !strings.Contains(string(w.events(head)[0].Data), "keys rotated") {
		t.Errorf("the rotation of keys told %q", got)
	}
	if n := w.count(`SELECT count(*) FROM rescind.clients c JOIN rescind.audit a ON a.subject = c.client_id AND a.action = 'rotate_key' AND a.entity_id = $1::uuid
WHERE c.client_id = 'keyed' AND c.jwks = $2::text::jsonb`, keyed.UUID, edSet); n != 1 {
		t.Errorf("%d clients have the new keys, with an audit record", n)
	}
	if _, _, err := w.RotateKey(t.Context(), admin, mapped.UUID, 0, authn.Rotation{}, false); why(err) != "immutable" {
		t.Errorf("rotate a mapped key: %v", err)
	}
	if _, _, err := w.RotateKey(t.Context(), admin, uuid.NewString(), 0, authn.Rotation{}, false); why(err) != "not found" {
		t.Errorf("rotate nothing: %v", err)
	}
	if _, _, err := w.RotateKey(t.Context(), admin, made1.UUID, made1.Timestamp-1, authn.Rotation{}, false); why(err) != "stale" {
		t.Errorf("rotate another version: %v", err)
	}

	w.apply(remove(theirs))
	if status("theirs", "s3cret") != 401 {
		t.Error("a client outlives its key")
	}
	w.apply(remove(app))
	if n := w.count(`SELECT count(*) FROM rescind.clients`); n != 0 {
		t.Errorf("%d clients outlive their application", n)
	}
}

func TestEnsureKeyManager(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(create(&catalog.Tenant{Meta: in("a.example")}), create(&catalog.Tenant{Meta: in("b.example")}))
	own := catalog.KeyManager{Iss: ownIss, Resident: true, Enabled: true, MaxTokenLifetime: 3600}
	first := catalog.KeyManager{Meta: in("a.example"), Iss: "https://idp.example", Name: "IdP", Enabled: true, MaxTokenLifetime: 3600,
		JWKSURI: "http://10.0.0.1/jwks", Algorithms: []string{"RS512"}, AllowTyp: []string{"x+jwt"}}
	ensure := func(k catalog.KeyManager) *catalog.KeyManager {
		t.Helper()
		got, err := w.EnsureKeyManager(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		wantIs(w, got, got)
		return got
	}
	resident, made := ensure(own), ensure(first)
	if resident.Name != "Resident Key Manager" || !resident.Resident || resident.Tenant != revocation.SuperTenant || made.Tenant.Domain != "a.example" || made.JWKSURI != first.JWKSURI {
		t.Errorf("%+v, %+v", resident, made)
	}
	head := w.head()
	ensure(own)
	ensure(first)
	if w.head() != head {
		t.Errorf("the second start told %q", w.told(head))
	}
	// What callers changed stays, and what the process is configured with comes back.
	w.apply(update(with(resident, func(k *catalog.KeyManager) { k.Enabled, k.DisplayName, k.Resident = false, "ours", false })),
		update(with(made, func(k *catalog.KeyManager) {
			k.Enabled, k.Description, k.JWKSURI = false, "d", "https://x.example/jwks"
		})))
	higher := first
	higher.Name, higher.MaxTokenLifetime = "other name", 7200
	if got := ensure(higher); got.Enabled || got.Description != "d" || got.JWKSURI != first.JWKSURI || got.Name != "IdP" || got.MaxTokenLifetime != 7200 {
		t.Errorf("%+v", got)
	}
	own.MaxTokenLifetime = 7200
	if got := ensure(own); got.Enabled || got.DisplayName != "ours" || !got.Resident || got.MaxTokenLifetime != 7200 {
		t.Errorf("%+v", got)
	}
	// Callers, and processes configured otherwise, keep nobody from starting.
	for _, lower := range []catalog.KeyManager{higher, own} {
		lower.MaxTokenLifetime = 60
		if got := ensure(lower); got.MaxTokenLifetime != 7200 {
			t.Errorf("lifetime %d after a lower one, want it as it was", got.MaxTokenLifetime)
		}
	}
	// What may be a secret is not published.
	secret := higher
	secret.JWKSURI = "https://idp.example/jwks?key=s3cret"
	if got := ensure(secret); got.JWKSURI != "" {
		t.Errorf("stored %s", got.JWKSURI)
	}
	same := first
	same.Meta, same.Iss = catalog.Meta{}, "https://super.example"
	ensure(same) // the same name in another tenant

	for _, tt := range []struct {
		name     string
		change   func(*catalog.KeyManager)
		conflict bool // the others are mistakes in the configuration itself
		want     []string
	}{
		{"another tenant", func(k *catalog.KeyManager) { k.Meta = in("b.example") }, true, []string{"a.example", "b.example"}},
		{"no such tenant", func(k *catalog.KeyManager) { k.Meta = in("c.example") }, false, []string{"no tenant", "c.example"}},
		{"a taken name", func(k *catalog.KeyManager) { k.Iss, k.Name = "https://new.example", "IdP" }, true, []string{"IdP", "https://idp.example", "another name"}},
		{"our own", func(k *catalog.KeyManager) { k.Iss, k.Meta = ownIss, catalog.Meta{} }, true, []string{"our own", "external"}},
		{"below our own", func(k *catalog.KeyManager) { k.Iss, k.Name = ownIss+"/idp", "new" }, true, []string{"below", "our own"}},
		{"becomes our own", func(k *catalog.KeyManager) { k.Resident = true }, true, []string{"our own", "external"}},
		{"a second of our own", func(k *catalog.KeyManager) {
			*k = catalog.KeyManager{Iss: "https://second.example", Resident: true, MaxTokenLifetime: 3600}
		}, true, []string{ownIss, "RESCIND_ISSUER"}},
		{"no iss", func(k *catalog.KeyManager) { k.Iss = "" }, false, []string{"iss is empty"}},
		{"no name, no lifetime", func(k *catalog.KeyManager) { k.Name, k.MaxTokenLifetime = "", 0 }, false, []string{"name", "lifetime 0 s"}},
		{"too long", func(k *catalog.KeyManager) { k.MaxTokenLifetime = 315360001 }, false, []string{"315360000"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			k := higher
			tt.change(&k)
			got, err := w.EnsureKeyManager(t.Context(), k)
			if err == nil || got != nil {
				t.Fatalf("EnsureKeyManager = %v, %v, want an error", got, err)
			}
			if _, ok := errors.AsType[*store.Conflict](err); ok != tt.conflict {
				t.Errorf("a conflict: %t (%v)", ok, err)
			}
			for _, want := range append(tt.want, k.Iss) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error does not say %q: %v", want, err)
				}
			}
		})
	}
}

// Who sees one tenant decides what is done with an issuer's tokens, not which are believed.
func TestKeyManagersOfOneTenant(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(create(&catalog.Tenant{Meta: in("a.example")}))
	own := store.Caller{Tenant: "a.example"}
	km := made[*catalog.KeyManager](w, create(with(keyManager("km"), func(k *catalog.KeyManager) {
		k.Meta, k.Properties = in("a.example"), map[string]any{"n": 1}
	})))
	head := w.head()
	for name, tt := range map[string]struct {
		change store.Change
		want   string
	}{
		"create":   {create(with(keyManager("x"), func(k *catalog.KeyManager) { k.Meta = in("a.example") })), "invalid #/iss"},
		"delete":   {remove(km), "invalid #/iss"},
		"lifetime": {update(with(km, func(k *catalog.KeyManager) { k.MaxTokenLifetime++ })), "invalid #/max_token_lifetime"},
		"keys":     {update(with(km, func(k *catalog.KeyManager) { k.JWKSURI = "https://10.0.0.1/" })), "invalid #/jwks_uri"},
		"no keys":  {update(with(km, func(k *catalog.KeyManager) { k.JWKSURI = "" })), "invalid #/jwks_uri"},
		"more": {update(with(km, func(k *catalog.KeyManager) {
			k.Type, k.Algorithms, k.AllowTyp, k.Properties = "KeyCloak", []string{"RS256"}, []string{"JWT"}, nil
		})), "invalid #/algorithms #/allow_typ #/properties #/type"},
		"whom gateways ask": {update(with(km, func(k *catalog.KeyManager) {
			k.Properties = map[string]any{"n": 1, "introspection_endpoint": "https://10.0.0.1/"}
		})), "invalid #/properties"},
		"whose keys gateways fetch": {update(with(km, func(k *catalog.KeyManager) {
			k.Properties = map[string]any{"n": 1, "certificate_value": "https://10.0.0.1/"}
		})), "invalid #/properties/certificate_value"},
	} {
		if _, _, err := w.Apply(t.Context(), own, []store.Change{tt.change}); why(err) != tt.want {
			t.Errorf("%s: %q (%v), want %q", name, why(err), err, tt.want)
		}
	}
	if w.head() != head {
		t.Errorf("told %q", w.told(head))
	}
	want := with(km, func(k *catalog.KeyManager) {
		k.DisplayName, k.Description, k.Enabled, k.TokenType, k.ConsumerKeyClaim, k.ScopesClaim = "d", "e", false, "BOTH", "cid", "scp"
		k.ClaimMappings = []catalog.ClaimMapping{{Remote: "r", Local: "l"}}
	})
	got, _, err := w.Apply(t.Context(), own, []store.Change{update(want)})
	if err != nil {
		t.Fatal(err)
	}
	want.Timestamp = got[0].Base().Timestamp
	wantIs(w, want, got[0])
}

func TestEnsuredAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			k := catalog.KeyManager{Iss: "https://idp.example", Name: "IdP", MaxTokenLifetime: int32(i+1) * 3600}
			if _, err := w.EnsureKeyManager(t.Context(), k); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := w.count(`SELECT count(*) FROM rescind.key_managers WHERE max_token_lifetime = 8 * 3600`); n != 1 {
		t.Errorf("%d issuers with the longest lifetime, want 1", n)
	}
}

// refusing is a log that has gone away.
type refusing struct{}

func (refusing) Change(context.Context, func(context.Context, *ledger.Tx) error) (revocation.Position, error) {
	return revocation.Position{}, fmt.Errorf("%w: it went away", ledger.ErrUnavailable)
}

func TestErrorsOfTheLog(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	app := made[*catalog.Application](w, create(application("app")))
	away := store.New(config, w.pool, refusing{}, w.clients, discard)
	_, _, created := away.Apply(t.Context(), admin, []store.Change{create(application("x"))})
	_, _, deleted := away.Apply(t.Context(), admin, []store.Change{remove(app)})
	_, blocked := away.Block(t.Context(), admin, app.UUID, 0, true, false)
	_, _, keyed := away.CreateKey(t.Context(), admin, store.NewKey{Mapping: *mapping(app, "km", "x", catalog.Sandbox)})
	_, ensured := away.EnsureKeyManager(t.Context(), *keyManager("x"))
	for name, err := range map[string]error{
		"Apply": created, "Apply of a deletion": deleted, "Block": blocked, "CreateKey": keyed, "EnsureKeyManager": ensured, "Announce": away.Announce(t.Context()),
	} {
		if !errors.Is(err, ledger.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
