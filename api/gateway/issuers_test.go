package gateway

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

const ownKeys = "/oauth2/jwks"

// until waits for what another goroutine does.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatalf("%s: it did not come to be", what)
		}
	}
}

// The rest of C129, and that keys are fetched before they are needed.
func TestUnknownKeys(t *testing.T) {
	t.Parallel()
	k := newKeyServer(t)
	k.serve(ownKeys, public("ec-1", ecKey.Public()))
	w := start(t, newService().fetched(k), replica.Config{}, Config{URL: k.URL})
	until(t, "keys are fetched though no request needs them", w.Ready)
	w.accepted(t, "T1", t1())
	if n := k.count(ownKeys); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
	for i := range 100 {
		w.refused(t, "an unknown kid", header(with{"kid": fmt.Sprint("unknown-", i)}))
	}
	if n := k.count(ownKeys); n != 2 {
		t.Errorf("%d fetches after 100 kids that are unknown, want 2", n)
	}
	w.accepted(t, "T1 afterwards", t1())
}

func TestKeyRollover(t *testing.T) {
	t.Parallel()
	k := newKeyServer(t)
	k.serve(ownKeys, public("ec-1", ecKey.Public()))
	w := start(t, newService().fetched(k), replica.Config{}, Config{URL: k.URL})
	w.accepted(t, "the old key", t1())
	next := mint(otherKey, with{"kid": "ec-9"}, nil)
	k.serve(ownKeys, public("ec-1", ecKey.Public()), public("ec-9", otherKey.Public()))
	w.accepted(t, "the new key", next)
	w.accepted(t, "the old key beside it", t1())
}

// Issuers of other tenants have their keys below the service's URL, whatever iss says of the
// host; those that are not the service's own have them where the catalog says, if that is allowed.
func TestWhereKeysAre(t *testing.T) {
	t.Parallel()
	k := newKeyServer(t)
	k.serve("/t/acme.example"+ownKeys, public("ec-1", ecKey.Public()))
	k.serve("/b/jwks", public("ec-2", otherKey.Public()))
	s := newService().fetched(k)
	own := manager(13, acmeIss)
	own.Resident, own.Tenant = true, acme
	s.entities[own.UUID] = own
	foreign := mint(otherKey, with{"kid": "ec-2"}, with{"iss": otherIss})

	w := start(t, s, replica.Config{}, Config{URL: k.URL, Networks: loopback})
	if got := w.get(t, bearing(claim(with{"iss": acmeIss}))); got.status != 403 || !strings.Contains(got.body, "900908") {
		t.Errorf("a token of another tenant's issuer: %d %s, want it genuine, and of no use for this API", got.status, got.body)
	}
	w.accepted(t, "an external issuer", foreign)

	var log journal
	w = start(t, s, replica.Config{}, Config{URL: k.URL, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	unavailable(t, w, "an external issuer inside, which is not allowed", foreign)
	w.stop()
	if !strings.Contains(log.String(), "must be https; http is for networks that are allowed by name") {
		t.Errorf("logged %s", &log)
	}
}

func unavailable(t *testing.T, w *world, name, compact string) {
	t.Helper()
	got := w.get(t, bearing(compact))
	if got.status != 503 || got.header.Get("Retry-After") == "" || got.header.Get("WWW-Authenticate") != "" || !strings.Contains(got.body, "900912") {
		t.Errorf("%s: %d %s %s, want 503, 900912, and to come again", name, got.status, got.header, got.body)
	}
}

func TestKeysOf(t *testing.T) {
	t.Parallel()
	networks := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	for _, tt := range []struct {
		name      string
		cfg       Config
		change    func(*catalog.KeyManager)
		url, err  string
		connectTo []netip.Prefix
	}{
		{"own", Config{URL: "https://km.internal:9443/"}, func(m *catalog.KeyManager) { m.Resident = true },
			"https://km.internal:9443/oauth2/jwks", "", everywhere},
		{"own, the URL has a path", Config{URL: "https://gw/rescind"}, func(m *catalog.KeyManager) { m.Resident = true },
			"https://gw/rescind/oauth2/jwks", "", everywhere},
		{"own, of another tenant", Config{URL: "https://km.internal"}, func(m *catalog.KeyManager) {
			m.Resident, m.Tenant, m.Iss = true, acme, "https://public/sts/t/acme.example"
		}, "https://km.internal/t/acme.example/oauth2/jwks", "", everywhere},
		{"own, with an iss of another tenant", Config{URL: "https://km.internal"}, func(m *catalog.KeyManager) {
			m.Resident, m.Tenant, m.Iss = true, acme, iss+"/t/other"
		}, "", "does not end in /t/acme.example", nil},
		{"own, on loopback", Config{URL: "http://localhost:9443"}, func(m *catalog.KeyManager) { m.Resident = true },
			"http://localhost:9443/oauth2/jwks", "", loopback},
		{"own, without TLS", Config{URL: "http://km.internal", AllowHTTP: true}, func(m *catalog.KeyManager) { m.Resident = true },
			"http://km.internal/oauth2/jwks", "", everywhere},
		{"own, without a URL", Config{}, func(m *catalog.KeyManager) { m.Resident = true }, "", "not told the service's URL", nil},
		{"own, with a jwks_uri", Config{URL: "https://km.internal"}, func(m *catalog.KeyManager) {
			m.Resident, m.JWKSURI = true, "https://evil.example/jwks"
		}, "https://km.internal/oauth2/jwks", "", everywhere},
		{"external", Config{URL: "https://km.internal", Networks: networks}, func(m *catalog.KeyManager) { m.JWKSURI = "https://idp/jwks" },
			"https://idp/jwks", "", networks},
		{"external, without a jwks_uri", Config{URL: "https://km.internal"}, func(*catalog.KeyManager) {}, "", "no jwks_uri", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := manager(10, iss)
			tt.change(m)
			got, err := (&issuers{cfg: tt.cfg, log: slog.New(slog.DiscardHandler)}).keysOf(m)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("keysOf = %v, want an error about %q", err, tt.err)
				}
				return
			}
			if err != nil || got.URL != tt.url || !slices.Equal(got.AllowedNetworks, tt.connectTo) {
				t.Errorf("keysOf = %s, %v, %v; want %s, %v", got.URL, got.AllowedNetworks, err, tt.url, tt.connectTo)
			}
		})
	}
}

// The catalog is followed: also by the request that comes right after a change.
func TestIssuersChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log journal
		s := newService()
		w := start(t, s, replica.Config{}, Config{
			Issuers: append(configured(),
				token.Issuer{Iss: acmeIss, Keys: keySet(public("ec-1", ecKey.Public())), MaxLifetime: time.Hour},
				token.Issuer{Iss: "https://alone.example", Keys: keySet(public("ec-1", ecKey.Public()))}),
			Logger: slog.New(slog.NewTextHandler(&log, nil)),
		})
		aSecond := func() {
			time.Sleep(refreshEvery)
			synctest.Wait()
		}
		trusted := func(iss string) (token.Issuer, bool) { return w.issuers.trusted.Load().Issuer(iss) }

		km := s.manager(10)
		km.Enabled = false
		s.change(t, catalog.Updated, km)
		w.refused(t, "T1, its key manager is disabled", t1())
		aSecond()
		if _, ok := trusted(iss); ok {
			t.Error("a disabled key manager is trusted, since its keys are configured")
		}
		km.Enabled = true
		s.change(t, catalog.Updated, km)
		w.accepted(t, "T1, its key manager is enabled again", t1())

		added := manager(14, "https://new.example")
		s.change(t, catalog.Created, added)
		unavailable(t, w, "a token of an issuer that is new, and whose keys nobody knows", claim(with{"iss": added.Iss}))
		s.change(t, catalog.Deleted, added)
		aSecond()
		if _, ok := trusted(added.Iss); ok {
			t.Error("a deleted key manager is trusted after a second")
		}
		w.refused(t, "a token of an issuer that is gone", claim(with{"iss": added.Iss}))

		// What the catalog says of a configured issuer counts, but for the longer lifetime.
		if issuer, _ := trusted(acmeIss); issuer.Tenant.Domain != "" || issuer.MaxLifetime != time.Hour {
			t.Errorf("a configured issuer that is not in the catalog: %+v", issuer)
		}
		if issuer, _ := trusted("https://alone.example"); issuer.MaxLifetime != time.Hour {
			t.Errorf("an issuer that nobody has given a lifetime: %+v", issuer)
		}
		own := manager(13, acmeIss)
		own.Resident, own.Tenant, own.MaxTokenLifetime = true, acme, 7200
		s.change(t, catalog.Created, own)
		aSecond()
		if issuer, _ := trusted(acmeIss); issuer.Tenant != acme || issuer.MaxLifetime != time.Hour {
			t.Errorf("a configured issuer with a shorter lifetime: %+v", issuer)
		}
		own.MaxTokenLifetime = 60
		s.change(t, catalog.Updated, own)
		aSecond()
		if issuer, _ := trusted(acmeIss); issuer.MaxLifetime != time.Minute {
			t.Errorf("a configured issuer with a longer lifetime: %+v", issuer)
		}
		if issuer, _ := trusted(jwtIss); issuer.MaxLifetime != time.Hour || issuer.Tenant != revocation.SuperTenant {
			t.Errorf("a configured issuer without a lifetime: %+v", issuer)
		}

		broken := manager(15, "https://broken.example")
		broken.Algorithms = []string{"HS256"}
		for range 3 {
			s.change(t, catalog.Updated, broken)
			aSecond()
		}
		w.accepted(t, "T1 beside a key manager that cannot be used", t1())
		w.stop()
		if n := strings.Count(log.String(), "cannot be used as it is"); n != 1 {
			t.Errorf("%d lines about a key manager that cannot be used, want 1:\n%s", n, &log)
		}
	})
}

// Whatever the catalog has, the gateway goes on: what cannot be used is told of once, looked at once
// and never taken for more than it says.
func TestOddKeyManagers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log journal
		s := newService()
		lasting, twin, broken := s.manager(11), manager(16, iss), manager(15, "https://broken.example")
		lasting.MaxTokenLifetime = 0
		broken.Algorithms = []string{"HS256"}
		for _, m := range []*catalog.KeyManager{lasting, twin, broken} {
			s.entities[m.UUID] = m
		}
		w := start(t, s, replica.Config{}, Config{Issuers: configured()[:1], URL: "https://192.0.2.1", Logger: slog.New(slog.NewTextHandler(&log, nil))})
		w.accepted(t, "T1, of which two say that it is theirs", t1())
		trusted := w.issuers.trusted.Load()
		if issuer, ok := trusted.Issuer(otherIss); !ok || issuer.MaxLifetime != ownLifetime {
			t.Errorf("without a lifetime: %+v, want one of %s", issuer, ownLifetime)
		}
		for _, iss := range []string{iss, otherIss, broken.Iss, "https://nobody.example"} {
			if w.issuers.behind(trusted, iss) {
				t.Errorf("each token that names %s is a reason to look at all key managers", iss)
			}
		}
		for range 3 { // each is another look
			s.change(t, catalog.Updated, s.manager(12))
			w.issuers.refresh()
		}
		var chosen *catalog.KeyManager
		w.issuers.state.View(func(v *replica.View) { chosen = v.KeyManager(iss) })
		s.change(t, catalog.Deleted, s.entities[chosen.UUID])
		w.refused(t, "T1, of a key manager that is gone", t1())
		w.issuers.refresh()
		if _, ok := w.issuers.trusted.Load().Issuer(iss); ok {
			t.Error("the twin of a key manager that is gone is trusted, which the replica does not know by its iss")
		}
		w.stop()
		for text, want := range map[string]int{
			"several key managers have one iss": 2, "has no longest lifetime": 1, "cannot be used as it is": 1, // the first also of none that counts
		} {
			if n := strings.Count(log.String(), text); n != want {
				t.Errorf("%d lines with %q, want %d:\n%s", n, text, want, &log)
			}
		}
	})
}

// A gateway of one tenant has nothing to do with the issuers of others.
func TestIssuersOfOneTenant(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newService()
		own := manager(13, acmeIss)
		own.Tenant = acme
		s.entities[own.UUID] = own
		given := append(configured(), token.Issuer{Iss: acmeIss, Keys: keySet(public("ec-1", ecKey.Public()))})
		for tenant, want := range map[string]int{"": 4, revocation.SuperTenant.Domain: 3, acme.Domain: 1} {
			w := start(t, s, replica.Config{Tenant: tenant}, Config{Issuers: given})
			if got := w.Status(); got != (Status{Issuers: want, WithKeys: want}) {
				t.Errorf("%q: %+v, want %d", tenant, got, want)
			}
			d := w.decide(t, t1())
			if want := tenant != acme.Domain; d.Allowed != want {
				t.Errorf("T1 where %q is served: %d %s", tenant, d.Status, d.Reason)
			}
			if d := w.decide(t, claim(with{"iss": acmeIss})); d.Allowed || tenant == revocation.SuperTenant.Domain && d.Reason != "untrusted_issuer" {
				t.Errorf("a token of another tenant where %q is served: %d %s", tenant, d.Status, d.Reason)
			}
			w.stop()
		}
	})
}

func TestStatus(t *testing.T) {
	t.Parallel()
	k := newKeyServer(t)
	k.serve("/b/jwks", public("ec-2", otherKey.Public()))
	w := start(t, newService().fetched(k), replica.Config{}, Config{URL: k.URL, Networks: loopback, Issuers: configured()[2:]})
	w.accepted(t, "an issuer with keys", mint(otherKey, with{"kid": "ec-2"}, with{"iss": otherIss}))
	if got := w.Status(); got != (Status{Issuers: 3, WithKeys: 2}) {
		t.Errorf("%+v, want three issuers, one of them without keys", got)
	}
}

// Key files of what is trusted no longer are removed, those of earlier processes too; and what is made
// anew never begins with them.
func TestKeyFiles(t *testing.T) {
	t.Parallel()
	k := newKeyServer(t)
	k.serve(ownKeys, public("ec-1", ecKey.Public()))
	k.serve("/b/jwks", public("ec-2", otherKey.Public()))
	k.serve("/idp/jwks", public("ec-1", ecKey.Public()))
	folder := t.TempDir()
	for _, name := range []string{"keys-00112233445566778899aabbccddeeff", "keys-00112233445566778899aabbccddeeff.damaged", "keys-of-mine", "state-1"} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := newService().fetched(k)
	other := s.manager(11)
	w := start(t, s, replica.Config{}, Config{URL: k.URL, Networks: loopback, Folder: folder})
	files := func(m *catalog.KeyManager) string { return fileOf(m, m.JWKSURI) }
	own := fileOf(s.manager(10), k.URL+ownKeys)
	has := func(what string, names ...string) {
		t.Helper()
		names = append(names, "keys-of-mine", "state-1")
		slices.Sort(names)
		until(t, what, func() bool {
			var got []string
			for _, f := range must(os.ReadDir(folder)) {
				got = append(got, f.Name())
			}
			return slices.Equal(got, names)
		})
	}
	idp := files(s.manager(12))
	has("what nobody uses is removed", own, idp, files(other))
	compact := mint(otherKey, with{"kid": "ec-2"}, with{"iss": otherIss})
	w.accepted(t, "the other issuer", compact)

	s.change(t, catalog.Deleted, other)
	has("the file of what is gone is removed", own, idp)
	// The server has no keys any more: with any from before the token would be accepted.
	k.mu.Lock()
	delete(k.sets, "/b/jwks")
	k.mu.Unlock()
	anew := *other
	anew.UUID = uuidOf(17)
	s.change(t, catalog.Created, &anew)
	unavailable(t, w, "the issuer made anew", compact)
	if files(&anew) == files(other) {
		t.Error("two key managers share a file")
	}
	k.serve("/c/jwks", public("ec-2", otherKey.Public()))
	moved := anew
	moved.JWKSURI = k.URL + "/c/jwks"
	s.change(t, catalog.Updated, &moved)
	has("it has a file of its own at another URL", own, idp, files(&moved))
	w.accepted(t, "the issuer at another URL", compact)
	disabled := moved
	disabled.Enabled = false
	s.change(t, catalog.Updated, &disabled)
	has("the file of what is disabled is removed", own, idp)
}

// With everything down there is what was kept, at once and before Run; a revocation too.
func TestStartFromFolder(t *testing.T) {
	t.Parallel()
	k := newKeyServer(t)
	k.serve(ownKeys, public("ec-1", ecKey.Public()))
	folder := t.TempDir()
	s := newService().fetched(k)
	w := start(t, s, replica.Config{Folder: folder}, Config{URL: k.URL, Folder: folder})
	w.accepted(t, "T1", t1())
	revoked := claim(with{"jti": "at-2"})
	s.revoke(t, revocation.KindToken, iss, "at-2", 0)
	until(t, "the keys are kept", func() bool {
		names, err := filepath.Glob(filepath.Join(folder, "keys-????????????????????????????????"))
		return err == nil && len(names) == 1
	})
	w.stop()
	k.Close()
	s.down = true

	r, err := replica.New(replica.Config{Source: s, Folder: folder})
	if err != nil {
		t.Fatal(err)
	}
	g, err := New(Config{Replica: r, URL: k.URL, Folder: folder, Audiences: []string{audience}})
	if err != nil {
		t.Fatal(err)
	}
	if !g.Ready() {
		t.Error("it is not ready")
	}
	decide := func(compact string) Decision {
		return g.Decide(t.Context(), Request{Method: "GET", Target: "/shop/1.0.0/orders?page=2", Authorization: []string{"Bearer " + compact}})
	}
	if d := decide(t1()); !d.Allowed || d.Info.ApplicationName != "Till №1" {
		t.Errorf("T1: %d %s", d.Status, d.Reason)
	}
	if d := decide(revoked); d.Allowed || d.Reason != "revoked" || d.Status != 401 {
		t.Errorf("a token that was revoked before the restart: %d %s", d.Status, d.Reason)
	}
	if d := decide(mint(otherKey, with{"kid": "ec-2"}, with{"iss": otherIss})); d.Status != 503 || d.Code != replica.CodeKeyManagerDown {
		t.Errorf("a token of an issuer whose keys were never here: %d %s", d.Status, d.Reason)
	}
}

// With everything down and nothing kept it is as the operator has chosen; no token is called
// invalid because nobody knows who is trusted.
func TestStartWithNothing(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		empty  replica.OnStale
		cfg    Config
		status int
		reason string
		ready  bool
	}{
		{"closed", replica.Deny, Config{URL: "https://192.0.2.1"}, 503, "stale", false},
		{"closed, with keys", replica.Deny, Config{Issuers: configured()}, 503, "stale", false},
		{"open, with keys", replica.Serve, Config{Issuers: configured()}, 200, "", true},
		{"open, without keys", replica.Serve, Config{URL: "https://192.0.2.1"}, 503, "stale", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s := newService()
				s.down = true
				w := start(t, s, replica.Config{Empty: tt.empty}, tt.cfg)
				got := w.get(t, bearing(t1()))
				d := w.Decide(t.Context(), Request{Method: "GET", Target: "/shop/1.0.0/orders", Authorization: []string{"Bearer " + t1()}})
				if got.status != tt.status || d.Reason != tt.reason || w.Ready() != tt.ready || (got.status == 503) != (got.header.Get("Retry-After") != "") {
					t.Errorf("%d %s, ready %t; want %d %s, %t", got.status, d.Reason, w.Ready(), tt.status, tt.reason, tt.ready)
				}
			})
		})
	}
}
