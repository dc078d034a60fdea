package catalog_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
)

// issuers are the residents' iss by the tenant's domain.
func (w *world) issuers() map[string]string {
	w.Helper()
	issuers := make(map[string]string)
	for _, e := range w.all() {
		if k, ok := e.(*catalog.KeyManager); ok && k.Resident {
			issuers[k.Tenant.Domain] = k.Iss
		}
	}
	return issuers
}

// A tenant has an issuer from the start, and none that others could take for another's.
func TestTenantIssuers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if err := w.EnsureIssuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	head := w.head()
	w.apply(create(&catalog.Tenant{Meta: in("a.example")}), create(&catalog.Tenant{Meta: in("b.example")}))
	want := []string{"tenant.created a.example", "tenant.created b.example"}
	want = append(want, "key_manager.created Resident Key Manager", "key_manager.created Resident Key Manager")
	if diff := cmp.Diff(want, w.told(head)[:4]); diff != "" {
		t.Errorf("told (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]string{
		"carbon.super": ownIss, "a.example": ownIss + "/t/a.example", "b.example": ownIss + "/t/b.example",
	}, w.issuers()); diff != "" {
		t.Errorf("issuers (-want +got):\n%s", diff)
	}
	list, err := w.List(t.Context(), admin, catalog.NounKeyManager, store.Filter{Tenant: "a.example"}, 0, 2)
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	made := list[0].(*catalog.KeyManager)
	resident := &catalog.KeyManager{Meta: made.Meta, Name: "Resident Key Manager", Type: "default", TokenType: "DIRECT",
		Resident: true, Enabled: true, Iss: ownIss + "/t/a.example", MaxTokenLifetime: 3600}
	wantIs(w, resident, made)

	// Each makes keys of its own unless told otherwise.
	for domain, iss := range w.issuers() {
		app := w.apply(create(with(application("app"), func(a *catalog.Application) { a.Meta = in(domain) })))[0]
		key, _, err := w.CreateKey(t.Context(), admin, store.NewKey{
			Mapping: catalog.KeyMapping{Application: ref(app), KeyType: catalog.Production}, Client: &authn.Registration{},
		})
		if err != nil || key.Iss != iss || key.KeyManager != "Resident Key Manager" || key.Tenant.Domain != domain {
			t.Errorf("key of %s: %+v, %v", domain, key, err)
		}
	}

	w.apply(create(with(keyManager("km"), func(k *catalog.KeyManager) { k.Iss = "https://elsewhere.example/t/c.example" })))
	for _, tt := range []struct {
		name, issuer, domain, want, says string
	}{
		{"as long as can be", "https://" + strings.Repeat("i", 243), "a", "", ""},
		{"too long", "https://" + strings.Repeat("i", 243), "ab", "invalid #/tenant/domain", "at most 1:"},
		{"no place at all", "https://" + strings.Repeat("i", 247), "a", "invalid #/tenant/domain", "must be at most 0"},
		{"the super tenant's, for a URL", ownIss, ".", "invalid #/tenant/domain", "neither . nor .."},
		{"the same again", ownIss, "a.example", "exists #/tenant/domain", "a tenant of this domain already"},
		{"an external one's", "https://elsewhere.example", "c.example", "exists #/tenant/domain", "https://elsewhere.example/t/c.example"},
	} {
		other := store.New(store.Config{Issuer: tt.issuer, MaxTokenLifetime: time.Hour}, w.pool, w.ledger, w.clients, discard)
		state := w.all()
		_, _, err := other.Apply(t.Context(), admin, []store.Change{create(&catalog.Tenant{Meta: in(tt.domain)})})
		if why(err) != tt.want || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %q (%v), want %q with %q", tt.name, why(err), err, tt.want, tt.says)
		}
		if diff := cmp.Diff(state, w.all()); (diff == "") != (err != nil) {
			t.Errorf("%s: %v, and changed:\n%s", tt.name, err, diff)
		}
	}
}

// A tenant goes with its issuer and the keys of that, unless somebody's tokens are from it.
func TestTenantsEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tenant := w.apply(create(&catalog.Tenant{Meta: in("a.example")}))[0]
	resident := w.apply(update(with(w.find(catalog.NounKeyManager, "Resident Key Manager").(*catalog.KeyManager),
		func(k *catalog.KeyManager) { k.Enabled = false })))[0]
	sign := func(kid string, by catalog.Entity) {
		t.Helper()
		if _, err := w.pool.Exec(t.Context(), `INSERT INTO rescind.signing_keys (kid, key_manager_id, alg, public_jwk, private_sealed, master_key_id)
			VALUES ($1, $2, 'ES256', '{}', '', 'm')`, kid, by.Base().ID); err != nil {
			t.Fatal(err)
		}
	}
	sign("k1", resident)
	sign("k2", resident)
	try := func(name string, want string) {
		t.Helper()
		state, head := w.all(), w.head()
		_, _, err := w.Apply(t.Context(), admin, []store.Change{remove(tenant)})
		if why(err) != "in-use" || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want that %s are in the way", name, err, want)
		}
		if diff := cmp.Diff(state, w.all()); diff != "" || w.head() != head || w.count(`SELECT count(*) FROM rescind.signing_keys`) != 2 {
			t.Errorf("%s: something changed:\n%s", name, diff)
		}
	}
	external := w.apply(create(with(keyManager("km"), func(k *catalog.KeyManager) { k.Meta = in("a.example") })))[0]
	try("an external key manager", "key managers")
	w.apply(remove(external))
	// A row of the version before the catalog: its application is another tenant's.
	app := w.apply(create(application("app")))[0]
	if _, err := w.pool.Exec(t.Context(), `INSERT INTO rescind.key_mappings (application_id, key_manager_id, consumer_key, key_type)
		VALUES ($1, $2, 'ck', 'PRODUCTION')`, app.Base().ID, resident.Base().ID); err != nil {
		t.Fatal(err)
	}
	try("a consumer key", "consumer keys")
	if _, err := w.pool.Exec(t.Context(), `DELETE FROM rescind.key_mappings`); err != nil {
		t.Fatal(err)
	}
	if _, err := w.pool.Exec(t.Context(), `INSERT INTO rescind.revocations (id, tenant_id, kind, iss, ident, digest, exp, revoked_at)
		SELECT gen_random_uuid(), $1, 'key', 'x', n::text, false, 2079000000 + n, now() FROM generate_series(1, 2) AS n`, tenant.Base().ID); err != nil {
		t.Fatal(err)
	}
	try("a withdrawn key", "revocations, which cannot be deleted: wait until they are over, at about 2035-11-18T12:13Z (a withdrawn")
	if _, err := w.pool.Exec(t.Context(), `UPDATE rescind.revocations SET tenant_id = $1`, revocation.SuperTenant.ID); err != nil {
		t.Fatal(err)
	}

	other := w.apply(create(&catalog.Tenant{Meta: in("b.example")}))[0]
	theirs, err := w.List(t.Context(), admin, catalog.NounKeyManager, store.Filter{Tenant: "b.example"}, 0, 2)
	if err != nil || len(theirs) != 1 {
		t.Fatal(theirs, err)
	}
	sign("k3", theirs[0])
	w.apply(remove(tenant))
	if n := w.count(`SELECT count(*) FROM rescind.signing_keys`); n != 1 {
		t.Errorf("%d signing keys are left, want the other tenant's", n)
	}
	if n := w.count(`SELECT count(*) FROM rescind.audit WHERE action = 'delete_key_manager' AND iss = $1 AND reason = 'tenant deleted'`, ownIss+"/t/a.example"); n != 1 {
		t.Errorf("%d audit records of the issuer's end", n)
	}
	again := w.apply(create(&catalog.Tenant{Meta: in("a.example")}))[0]
	if diff := cmp.Diff(map[string]string{"a.example": ownIss + "/t/a.example", "b.example": ownIss + "/t/b.example"}, w.issuers()); diff != "" {
		t.Errorf("issuers of %v, %v (-want +got):\n%s", again.Base().Tenant, other.Base().Tenant, diff)
	}
}

// Tenants of the version before get their issuers once, however many processes see to it.
func TestEnsureIssuers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := w.pool.Exec(t.Context(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec(`INSERT INTO rescind.tenants (domain, ts) SELECT 't' || n, 1 FROM generate_series(1, 510) n`)
	exec(`INSERT INTO rescind.tenants (id, domain, ts) VALUES (-2000, 'below.super', 1)`)
	exec(`INSERT INTO rescind.tenants (domain) VALUES ('late')`)
	exec(`INSERT INTO rescind.tenants (domain, ts) VALUES ('..', 1)`)
	external := func(domain, name, iss string) {
		t.Helper()
		exec(`INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime, ts)
			SELECT id, $2, false, $3, 60, 1 FROM rescind.tenants WHERE domain = $1`, domain, name, iss)
	}
	external("t1", "theirs", ownIss+"/t/t2") // t1 still gets its own
	external("t3", "Resident Key Manager", externalIss)
	external("t4", "theirs", ownIss+"/t/t4")
	exec(`INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime, ts)
		SELECT id, 'ours', true, 'https://old.example', 60, 1 FROM rescind.tenants WHERE domain = 't5'`)
	exec(`INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime, ts, enabled, display_name)
		SELECT id, 'ours', true, $1, 60, 1, false, 'd' FROM rescind.tenants WHERE domain = 't6'`, ownIss+"/t/t6")

	var log bytes.Buffer
	warned := store.New(config, w.pool, w.ledger, w.clients, slog.New(slog.NewTextHandler(&log, nil)))
	var wg sync.WaitGroup
	for _, process := range []*store.Store{warned, newWorldOn(t, w.pool).Store, newWorldOn(t, w.pool).Store} {
		wg.Go(func() {
			if err := process.EnsureIssuers(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	want := map[string]string{"carbon.super": ownIss, "below.super": ownIss + "/t/below.super"}
	for n := range 510 {
		domain := fmt.Sprint("t", n+1)
		want[domain] = ownIss + "/t/" + domain
	}
	delete(want, "t2")
	delete(want, "t3")
	delete(want, "t4")
	want["t5"] = "https://old.example"
	if diff := cmp.Diff(want, w.issuers()); diff != "" {
		t.Errorf("issuers (-want +got):\n%s", diff)
	}
	told := w.told(0)
	if n := len(want) - 1; len(told) != n || told[0] != "key_manager.created Resident Key Manager" || w.events(0)[0].Tenant.ID != -1234 {
		t.Errorf("%d events, the first %s, want %d, the super tenant's first", len(told), told[0], n)
	}
	if n := w.count(`SELECT count(*) FROM rescind.key_managers WHERE iss = $1 AND NOT enabled AND name = 'ours' AND display_name = 'd'
		AND max_token_lifetime = 3600`, ownIss+"/t/t6"); n != 1 {
		t.Error("an issuer that was there did not only get its lifetime")
	}

	// Those that stay without are told of once, and cost nobody else his start.
	head := w.head()
	if err := warned.EnsureIssuers(t.Context()); err != nil || w.head() != head {
		t.Errorf("%v, told %q", err, w.told(head))
	}
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 5 {
		t.Errorf("%d lines:\n%s", len(lines), log.String())
	}
	for _, part := range []string{"tenant=t2 ", "tenant=t3 ", "tenant=t4 ", "tenant=t5 ", "tenant=.. "} {
		if strings.Count(log.String(), part) != 1 {
			t.Errorf("%q is not there once:\n%s", part, log.String())
		}
	}

	// When all is there, the log is not asked.
	exec(`DELETE FROM rescind.key_managers WHERE NOT resident OR iss = 'https://old.example'`)
	exec(`DELETE FROM rescind.tenants WHERE domain = '..'`)
	if err := w.Announce(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.EnsureIssuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := w.issuers(); len(got) != 513 || got["late"] != ownIss+"/t/late" || got["t5"] != ownIss+"/t/t5" {
		t.Errorf("%d issuers, want one of each tenant", len(got))
	}
	away := store.New(config, w.pool, refusing{}, w.clients, discard)
	if err := away.EnsureIssuers(t.Context()); err != nil {
		t.Errorf("nothing to do: %v", err)
	}
	longer := store.New(store.Config{Issuer: ownIss, MaxTokenLifetime: 2 * time.Hour}, w.pool, w.ledger, w.clients, discard)
	if err := longer.EnsureIssuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := w.count(`SELECT count(*) FROM rescind.key_managers WHERE max_token_lifetime <> 7200`); n != 0 {
		t.Errorf("%d issuers kept a lower lifetime", n)
	}
	if err := w.EnsureIssuers(t.Context()); err != nil || w.count(`SELECT count(*) FROM rescind.key_managers WHERE max_token_lifetime <> 7200`) != 0 {
		t.Errorf("%v, or a process with the old lifetime lowered it", err)
	}
}

// A process with another issuer than the database belongs to changes nothing.
func TestEnsureIssuersOfAnotherDatabase(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if err := w.EnsureIssuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.apply(create(&catalog.Tenant{Meta: in("a.example")}), create(keyManager("km")))
	if _, err := w.pool.Exec(t.Context(), `INSERT INTO rescind.tenants (id, domain, ts) VALUES (-2000, 'below.super', 1)`); err != nil {
		t.Fatal(err)
	}
	state := w.all()
	for _, tt := range []struct{ issuer, want, says string }{
		{"https://other.example", "exists #/iss", `belongs to issuer "` + ownIss + `"`},
		{"https://km.example", "immutable #/resident", "an external issuer"},
	} {
		other := store.New(store.Config{Issuer: tt.issuer, MaxTokenLifetime: time.Hour}, w.pool, w.ledger, w.clients, discard)
		if err := other.EnsureIssuers(t.Context()); why(err) != tt.want || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want %s", tt.issuer, err, tt.says)
		}
	}
	if diff := cmp.Diff(state, w.all()); diff != "" {
		t.Errorf("something changed:\n%s", diff)
	}
	none := store.New(store.Config{}, w.pool, refusing{}, w.clients, discard)
	if err := none.EnsureIssuers(t.Context()); err != nil {
		t.Errorf("without an issuer: %v", err)
	}
}
