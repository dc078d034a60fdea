package manifest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
)

const (
	super = "carbon.super"
	iss   = "https://km.example.com"
)

// world is a database with what changes its catalog.
type world struct {
	t      testing.TB
	pool   *pgxpool.Pool
	ledger *ledger.Ledger
	store  *store.Store
}

// newWorld is one whose tenants, but for carbon.super, have no key manager of their own.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := newWorldOf(t, store.Config{})
	if _, err := w.store.EnsureKeyManager(t.Context(), catalog.KeyManager{
		Resident: true, Iss: iss, MaxTokenLifetime: 3600, Enabled: true,
	}); err != nil {
		t.Fatal(err)
	}
	return w
}

// newService is one with a key manager for each tenant.
func newService(t testing.TB) *world {
	t.Helper()
	w := newWorldOf(t, store.Config{Issuer: iss, MaxTokenLifetime: time.Hour})
	if err := w.store.EnsureIssuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

func newWorldOf(t testing.TB, cfg store.Config) *world {
	t.Helper()
	pool := pgtest.New(t)
	log := slog.New(slog.DiscardHandler)
	l, err := ledger.New(ledger.Config{Source: iss}, pool, prometheus.NewRegistry(), log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	key, err := authn.NewMasterKey([]byte(strings.Repeat("k", 32)))
	if err != nil {
		t.Fatal(err)
	}
	clients, err := authn.New(authn.Config{}, pool, []authn.MasterKey{key}, prometheus.NewRegistry(), log)
	if err != nil {
		t.Fatal(err)
	}
	return &world{t, pool, l, store.New(cfg, pool, l, clients, log)}
}

// file writes text, with lines from a Go literal's indentation, to a file of its own.
func file(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f.yaml")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "\t", "  ")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (w *world) plan(path string, prune bool) (*Plan, error) {
	w.t.Helper()
	want, err := Read(path)
	if err != nil {
		return nil, err
	}
	have, err := ReadState(w.t.Context(), w.pool, want.Tenants())
	if err != nil {
		w.t.Fatal(err)
	}
	return NewPlan(want, have, prune)
}

func (w *world) mustPlan(path string, prune bool) *Plan {
	w.t.Helper()
	p, err := w.plan(path, prune)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

// atOnce: a test has no service to spare.
var atOnce = Config{Actor: ledger.Actor{Name: "system"}, Share: 1}

func (w *world) apply(p *Plan) {
	w.t.Helper()
	cfg := atOnce
	cfg.Keep = func(Secret) error { return nil }
	if done, err := Apply(w.t.Context(), w.store, p, cfg); err != nil || done != len(p.Steps) {
		w.t.Fatalf("made %d of %d: %v", done, len(p.Steps), err)
	}
}

// applied applies a file, expects nothing to be left, and returns the steps.
func (w *world) applied(path string, prune bool) []string {
	w.t.Helper()
	p := w.mustPlan(path, prune)
	w.apply(p)
	if again := told(w.mustPlan(path, prune)); len(again) > 0 {
		w.t.Fatalf("applying it again would do: %v", again)
	}
	return told(p)
}

// told are the steps of a plan in short.
func told(p *Plan) []string {
	var out []string
	for i := range p.Steps {
		s := &p.Steps[i]
		text := fmt.Sprintf("%s %s", s.Op, title(s.Noun, s.Name))
		for _, d := range s.Diff {
			text += fmt.Sprintf(" %s:%s->%s", d.Member, d.Old, d.New)
		}
		if s.Tenant != super {
			text += " @" + s.Tenant
		}
		out = append(out, text)
	}
	return out
}

func (w *world) export() string {
	w.t.Helper()
	s, err := ReadState(w.t.Context(), w.pool, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	var b bytes.Buffer
	if err := Export(&b, s); err != nil {
		w.t.Fatal(err)
	}
	return b.String()
}

func (w *world) head() revocation.Seq {
	w.t.Helper()
	p, err := w.ledger.Head(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return p.Seq
}

// one is the entity of a name.
func one[E catalog.Entity](w *world, f store.Filter) E {
	w.t.Helper()
	var e E
	all, err := w.store.List(w.t.Context(), store.Caller{}, e.Noun(), f, 0, 2)
	if err != nil || len(all) != 1 {
		w.t.Fatalf("%s %+v: %d found, %v", e.Noun(), f, len(all), err)
	}
	return all[0].(E)
}

func TestExamples(t *testing.T) {
	t.Parallel()
	for path, secrets := range map[string]int{"pizzashack.yaml": 0, "gateway.yaml": 1, "tenants": 0, "": 1} {
		t.Run("examples/"+path, func(t *testing.T) {
			t.Parallel()
			w := newService(t)
			path := filepath.Join("../../api/examples/catalog", path)
			if plan := w.mustPlan(path, true); plan.Secrets != secrets {
				t.Errorf("%d secrets are made, want %d", plan.Secrets, secrets)
			}
			w.applied(path, true)
			switch filepath.Base(path) {
			case "gateway.yaml":
				if key := one[*catalog.KeyMapping](w, store.Filter{ConsumerKey: "pizzashack-gateway"}); !key.Generated {
					t.Errorf("%+v", key)
				}
				return
			case "tenants":
				closed := one[*catalog.Application](w, store.Filter{Name: "Closed"})
				if !closed.Blocked || closed.Tenant.Domain != "bakery.example" {
					t.Errorf("%+v", closed)
				}
				if key := one[*catalog.KeyMapping](w, store.Filter{ConsumerKey: "night-shift-timer"}); key.Iss != iss+"/t/bakery.example" {
					t.Errorf("%+v", key)
				}
				return
			}
			app := one[*catalog.Application](w, store.Filter{Name: "PizzaShackApp"})
			key := one[*catalog.KeyMapping](w, store.Filter{Application: app.UUID})
			sub := one[*catalog.Subscription](w, store.Filter{Application: app.UUID})
			api := one[*catalog.API](w, store.Filter{Name: "PizzaShackAPI"})
			got := []any{app.Owner, app.Policy, key.ConsumerKey, key.Iss, key.Generated, sub.API.UUID == api.UUID, sub.Policy, sub.State, api.Context, len(api.Operations)}
			want := []any{"admin", "50PerMin", "pizzashack-web", "https://idp.example.com", false, true, "Gold", "UNBLOCKED", "/pizzashack/1.0.0", 4}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A catalog's life in files. Every step is also planned again, which finds nothing.
func TestPlans(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const (
		managers = "key_managers: [{name: idp, iss: https://idp, max_token_lifetime: 60}]\n"
		api      = "apis: [{name: A, version: v1, context: /a, provider: p}, {name: B, version: v1, context: /b, provider: p}]\n"
	)
	for _, tt := range []struct {
		name, text string
		prune      bool
		want       []string
	}{
		{"nothing", "", true, nil},
		{"no list prunes nothing", "tenant: carbon.super\n", true, nil},
		{"made in the order of references", `
applications:
- name: X
	owner: o
	policy: Gold
	keys: [{consumer_key: c, key_manager: idp}]
	subscriptions: [{api: "A:v1", policy: Silver}, {api: "B:v1"}]
` + api + `
scopes: [{name: s}]
policies: {application: [{name: Gold}], subscription: [{name: Silver}]}
` + managers, false, []string{
			"create key manager idp", "create policy subscription/Silver", "create policy application/Gold", "create scope s",
			"create API A:v1", "create API B:v1", "create application o/X", "create key mapping c",
			"create subscription o/X to A:v1", "create subscription o/X to B:v1",
		}},
		{"what is left out takes its default", managers + "apis: [{name: A, version: v1, context: /a, provider: q, type: WS}]\n" + `
applications:
- {name: X, owner: o, attributes: {k: v}, subscriptions: [{api: "A:v1", state: BLOCKED}]}
`, false, []string{
			`update API A:v1 provider:"p"->"q" type:"HTTP"->"WS"`,
			`update application o/X attributes:->{"k":"v"} policy:"Gold"->"Unlimited"`,
			`update subscription o/X to A:v1 policy:"Silver"->"Unlimited" state:"UNBLOCKED"->"BLOCKED"`,
		}},
		{"a list that is there is all there is", "applications:\n- {name: X, owner: o, attributes: {k: v}, keys: [], subscriptions: [{api: \"B:v1\"}]}\n", true, []string{
			"delete subscription o/X to A:v1", "delete key mapping c",
		}},
		{"not without prune", "applications: []\n", false, nil},
		{"what a file does not say stays", "applications:\n- {name: X, owner: o, attributes: {k: v}}\n", true, nil},
		{"blocked", "applications:\n- {name: X, owner: o, blocked: true}\n", true, []string{`update application o/X attributes:{"k":"v"}->`, "block application o/X"}},
		{"stays blocked", "applications:\n- {name: X, owner: o}\n", true, nil},
		{"changed, unsubscribed and unblocked", "applications:\n- {name: X, owner: o, policy: Gold, blocked: false, subscriptions: []}\n", true, []string{
			`update application o/X policy:"Unlimited"->"Gold"`, "delete subscription o/X to B:v1", "unblock application o/X",
		}},
		{"a list of one kind of policies", "policies: {subscription: []}\n", true, []string{"delete policy subscription/Silver"}},
		{"subscribed again", "applications:\n- {name: X, owner: o, policy: Gold, keys: [{consumer_key: d, key_manager: idp}], subscriptions: [{api: \"A:v1\"}]}\n", true, []string{
			"create key mapping d", "create subscription o/X to A:v1",
		}},
		{"everything goes, last first", "key_managers: []\npolicies: {application: [], subscription: [], api: []}\nscopes: []\napis: []\napplications: []\n", true, []string{
			"delete application o/X", "delete API A:v1", "delete API B:v1", "delete scope s", "delete policy application/Gold", "delete key manager idp",
		}},
		{"a tenant", "tenants: [{domain: b.example}]\n---\ntenant: b.example\nscopes: [{name: s}]\n", true, []string{
			"create tenant b.example @b.example", "create scope s @b.example",
		}},
		{"a tenant's name", "tenants: [{domain: b.example, display_name: B}]\n", true, []string{`update tenant b.example display_name:->"B" @b.example`}},
		{"the policy that a new tenant has", "tenants: [{domain: c.example}]\n---\ntenant: c.example\n" +
			"policies: {api: [{name: Unlimited, description: As much as you like}], application: [{name: Unlimited}], subscription: []}\n", true, []string{
			"create tenant c.example @c.example", `update policy api/Unlimited description:->"As much as you like" @c.example`,
		}},
		{"the resident key manager", "key_managers: [{name: Resident Key Manager, resident: true, enabled: false, properties: {a: 1}}]\n", true, []string{
			`update key manager Resident Key Manager enabled:true->false properties:->{"a":1}`,
		}},
		{"two tenants", "tenants: [{domain: b.example, display_name: B}]\nscopes: [{name: s}]\n---\ntenant: b.example\nscopes: []\n", true, []string{
			"create scope s", "delete scope s @b.example",
		}},
	} {
		if diff := cmp.Diff(tt.want, w.applied(file(t, tt.text), tt.prune)); diff != "" {
			t.Fatalf("%s: %s", tt.name, diff)
		}
	}
}

// Deleting and blocking end the tokens of those who could call.
func TestPruningRevokes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	revoked := func(key string) (n int) {
		t.Helper()
		err := w.pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.revocations WHERE kind = 'client' AND ident = $1`, key).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	w.applied(file(t, `
key_managers: [{name: idp, iss: https://idp, max_token_lifetime: 60}]
applications:
- {name: X, owner: o, keys: [{consumer_key: x, key_manager: idp}]}
- {name: Y, owner: o, keys: [{consumer_key: y, key_manager: idp}]}
`), false)
	w.applied(file(t, "applications: [{name: X, owner: o, blocked: true}]\n"), true)
	if x, y := revoked("x"), revoked("y"); x != 1 || y != 1 {
		t.Errorf("%d revocations of x and %d of y, want one of each", x, y)
	}
}

// An application is found by its UUID under another name.
func TestRename(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const id = "0b0e9c52-4d0b-4a3e-9d52-0d6c0f2a7a11"
	w.applied(file(t, "applications: [{name: X, owner: o, uuid: "+id+"}]\n"), false)
	want := []string{`update application o/Y name:"X"->"Y"`}
	if diff := cmp.Diff(want, w.applied(file(t, "applications: [{name: Y, owner: o, uuid: "+id+"}]\n"), true)); diff != "" {
		t.Error(diff)
	}
}

// What cannot be is found before anything is changed.
func TestRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const uuidA = "0b0e9c52-4d0b-4a3e-9d52-0d6c0f2a7a11"
	w.applied(file(t, `
tenants: [{domain: a}]
---
key_managers: [{name: idp, iss: https://idp, max_token_lifetime: 60}]
policies: {application: [{name: Gold}], subscription: [{name: Silver}], api: [{name: Bronze}]}
scopes: [{name: s}]
apis:
- {name: A, version: v1, context: /a, provider: p, id: 70, uuid: `+uuidA+`}
- {name: B, version: v1, context: /b, provider: p, operations: [{target: /, verb: GET, policy: Bronze, scopes: [s]}]}
applications:
- name: X
	owner: o
	policy: Gold
	keys: [{consumer_key: c, key_manager: idp}, {consumer_key: g, client: {scopes: [read], secret_env: PATH}}]
	subscriptions: [{api: "A:v1", policy: Silver}]
- {name: Y, owner: o}
`), false)
	before := w.head()
	for _, tt := range []struct {
		name, text, want string
	}{
		{"no such tenant", "tenant: nowhere\nscopes: []\n", "1:1: there is no tenant nowhere: correct its domain, or make it with an item of a list of tenants"},
		{"another id", "apis: [{name: A, version: v1, context: /a, provider: p, id: 71}]\n", "1:8: API A:v1 has the id 70, not 71: ids never change"},
		{"another UUID", "applications: [{name: X, owner: o, uuid: " + uuidA + "}]\n", "not " + uuidA + ": UUIDs never change"},
		{"another issuer", "key_managers: [{name: idp, iss: https://other, max_token_lifetime: 60}]\n", `1:16: the key manager idp has the iss "https://idp", which never changes`},
		{"a lower lifetime", "key_managers: [{name: idp, iss: https://idp, max_token_lifetime: 59}]\n", "1:16: the key manager idp has max_token_lifetime 60, which may only rise"},
		{"the resident key manager as another's", "key_managers: [{name: Resident Key Manager, iss: https://x, max_token_lifetime: 60}]\n", "is the resident one: give it resident: true"},
		{"another's as the resident", "key_managers: [{name: idp, resident: true}]\n", "1:16: the resident key manager of tenant carbon.super is Resident Key Manager, not idp"},
		{"a resident one that is not there", "tenant: a\nkey_managers: [{name: Resident Key Manager, resident: true}]\n", "2:16: there is no resident key manager Resident Key Manager: the service makes it when it first starts"},
		{"another name of a resident one that will be", "tenants: [{domain: b}]\n---\ntenant: b\nkey_managers: [{name: own, resident: true}]\n", "4:16: the resident key manager of tenant b is Resident Key Manager, not own"},
		{"no such API policy", "apis: [{name: C, version: v1, context: /c, provider: p, policy: Tin}]\n", "1:8: API C:v1 needs the policy api/Tin, which tenant carbon.super does not have"},
		{"no such policy of an operation", "apis: [{name: C, version: v1, context: /c, provider: p, operations: [{target: /, verb: GET, policy: Tin}]}]\n", "needs the policy api/Tin"},
		{"no such scope", "apis: [{name: C, version: v1, context: /c, provider: p, operations: [{target: /, verb: GET, scopes: [t]}]}]\n", "API C:v1 needs the scope t"},
		{"a context that is taken", "apis: [{name: C, version: v1, context: /a, provider: p}]\n", "1:8: API C:v1 has the context /a of API A:v1, which is there"},
		{"two APIs of one context", "apis: [{name: C, version: v1, context: /c, provider: p}, {name: D, version: v1, context: /c, provider: p}]\n", "1:58: API D:v1 has the context /c of API C:v1: give it another"},
		{"no such application policy", "applications: [{name: Z, owner: o, policy: Tin}]\n", "1:16: application o/Z needs the policy application/Tin"},
		{"no such API", "applications: [{name: Z, owner: o, subscriptions: [{api: \"C:v1\"}]}]\n", "1:52: application o/Z subscribes to API \"C:v1\", which tenant carbon.super does not have"},
		{"no such subscription policy", "applications: [{name: Z, owner: o, subscriptions: [{api: \"A:v1\", policy: Gold}]}]\n", "1:52: subscription o/Z to A:v1 needs the policy subscription/Gold"},
		{"no such key manager", "applications: [{name: Z, owner: o, keys: [{consumer_key: z, key_manager: none}]}]\n", `1:43: key "z" needs the key manager none`},
		{"another's key", "applications: [{name: Y, owner: o, keys: [{consumer_key: c, key_manager: idp}]}]\n", `1:43: key "c" is another application's`},
		{"a key twice", "applications: [{name: Y, owner: o, keys: [{consumer_key: e, key_manager: idp}]}, {name: Z, owner: o, keys: [{consumer_key: e, key_manager: idp}]}]\n",
			`key "e" of idp is listed twice, first at`},
		{"another type of key", "applications: [{name: X, owner: o, keys: [{consumer_key: c, key_type: SANDBOX, key_manager: idp}]}]\n", `1:43: key "c" is of type PRODUCTION, which never changes`},
		{"a mapped key with a client", "applications: [{name: X, owner: o, keys: [{consumer_key: c, key_manager: idp, client: {}}]}]\n", `1:43: key "c" is mapped, it gets no client any more`},
		{"a client of another resource server", "applications: [{name: X, owner: o, keys: [{consumer_key: g, client: {scopes: [read], resource_audiences: [a]}}]}]\n", `1:43: key "g" is registered with other settings, which never change`},
		{"a client of other tokens", "applications: [{name: X, owner: o, keys: [{consumer_key: g, client: {scopes: [read], token_typ: JWT}}]}]\n", `1:43: key "g" is registered with other settings`},
		{"a client without grants", "applications: [{name: X, owner: o, keys: [{consumer_key: g, client: {scopes: [read], grant_types: []}}]}]\n", `1:43: key "g" is registered with other settings`},
		{"a client with a key", "applications: [{name: X, owner: o, keys: [{consumer_key: g, client: {scopes: [read], auth_method: private_key_jwt, jwks: " + keys + "}}]}]\n",
			`1:43: key "g" is registered with other settings`},
		{"a client with other settings", "applications: [{name: X, owner: o, keys: [{consumer_key: g, client: {scopes: [write]}}]}]\n", `1:43: key "g" is registered with other settings, which never change`},
		{"a key of our own that is not there", "applications: [{name: X, owner: o, keys: [{consumer_key: h}]}]\n", `1:43: key "h" of Resident Key Manager is not there: a key of our own is made with a client member`},
		{"no such secret", "applications: [{name: X, owner: o, keys: [{consumer_key: h, client: {secret_env: RESCIND_TEST_NONE}}]}]\n", `1:43: key "h" has its secret in the variable "RESCIND_TEST_NONE", which is not set`},
		{"no such file", "applications: [{name: X, owner: o, keys: [{consumer_key: h, client: {secret_file: none}}]}]\n", `1:43: the secret of key "h": open `},
		{"a tenant without its own key manager", "tenant: a\napplications: [{name: X, owner: o, keys: [{consumer_key: h, client: {}}]}]\n",
			`2:43: key "h" names no key manager, and tenant a has none of its own`},
		{"a client of another tenant", "tenants: [{domain: b}]\n---\ntenant: b\napplications: [{name: X, owner: o, keys: [{consumer_key: g, client: {}}]}]\n",
			`4:43: key "g" has the name of another key manager's client`},
		{"a client of two tenants", "tenants: [{domain: b}]\n---\ntenant: b\napplications: [{name: X, owner: o, keys: [{consumer_key: h, client: {}}]}]\n---\n" +
			"applications: [{name: X, owner: o, policy: Gold, keys: [{consumer_key: h, client: {}}]}]\n", `6:57: key "h" has the name of the client at `},
		{"a policy that is still needed", "policies: {application: [], subscription: [], api: []}\n", "pruning would delete the policy api/Bronze, which API B:v1 needs"},
		{"a key manager that is still needed", "key_managers: []\n", "pruning would delete the key manager idp, which key mapping c needs"},
		{"an API that is still needed", "apis: []\n", "pruning would delete the API A:v1, which subscription o/X to A:v1 needs"},
		{"a scope that is still needed", "scopes: []\n", "pruning would delete the scope s, which API B:v1 needs"},
		{"a key manager that is needed by what is left alone", "key_managers: []\napplications: [{name: X, owner: o}]\n", "pruning would delete the key manager idp, which key mapping c needs"},
		{"a context that is free too late", "apis: [{name: C, version: v1, context: /b, provider: p}, {name: A, version: v1, context: /a, provider: p}]\n", "API C:v1 has the context /b of API B:v1, which is pruned last"},
	} {
		_, err := w.plan(file(t, tt.text), strings.Contains(tt.want, "prun"))
		if _, ok := errors.AsType[Mistakes](err); !ok || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s:\n got %v\nwant …%s", tt.name, err, tt.want)
		}
	}
	if after := w.head(); after != before {
		t.Errorf("plans have moved the log from %d to %d", before, after)
	}
}

// What somebody else has changed since the plan is reported, and stays.
func TestConcurrentEdit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.applied(file(t, "scopes: [{name: a}, {name: b}, {name: c}]\n"), false)
	edit := func(name, text string) {
		t.Helper()
		s := *one[*catalog.Scope](w, store.Filter{Name: name})
		s.Description = text
		if _, _, err := w.store.Apply(t.Context(), store.Caller{}, []store.Change{{Op: store.Update, Entity: &s}}); err != nil {
			t.Fatal(err)
		}
	}
	path := file(t, "scopes:\n- {name: a, description: file}\n- {name: b, description: file}\n")
	plan := w.mustPlan(path, true)
	edit("b", "person")
	before := w.export()
	done, err := Apply(t.Context(), w.store, plan, atOnce)
	step, ok := errors.AsType[*StepError](err)
	if !ok || done != 0 || step.Step.Name != "b" || !errors.Is(err, store.ErrStale) ||
		!strings.Contains(err.Error(), "f.yaml:3:3: update scope b of tenant carbon.super: somebody else changed it after the plan was made; plan again") {
		t.Errorf("made %d: %v", done, err)
	}
	if diff := cmp.Diff(before, w.export()); diff != "" {
		t.Errorf("a part of the transaction was made: %s", diff)
	}
	w.applied(path, true)

	path = file(t, "scopes: [{name: a, description: again}]\n")
	plan = w.mustPlan(path, true)
	b := one[*catalog.Scope](w, store.Filter{Name: "b"})
	if _, _, err := w.store.Apply(t.Context(), store.Caller{}, []store.Change{{Op: store.Delete, Entity: b}}); err != nil {
		t.Fatal(err)
	}
	if _, err := Apply(t.Context(), w.store, plan, atOnce); !errors.Is(err, store.ErrNotFound) || !strings.Contains(err.Error(), "delete scope b") {
		t.Error(err)
	}
	w.applied(path, true)

	plan = w.mustPlan(file(t, "scopes: [{name: new}]\n"), false)
	w.applied(file(t, "scopes: [{name: new, description: first}]\n"), false)
	conflict, ok := errors.AsType[*store.Conflict](func() error { _, err := Apply(t.Context(), w.store, plan, atOnce); return err }())
	if !ok || conflict.Slug != "exists" {
		t.Errorf("%+v", conflict)
	}
}

// manyScopes need several transactions.
func manyScopes(n int) string {
	var b strings.Builder
	b.WriteString("scopes:\n")
	for i := range n {
		fmt.Fprintf(&b, "- name: s%04d\n", i)
	}
	return b.String()
}

func TestStoppedRunIsFinished(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	path := file(t, manyScopes(3*maxWeight))
	ctx, stop := context.WithCancel(t.Context())
	var seen []int
	cfg := atOnce
	cfg.Progress = func(done int) {
		if seen = append(seen, done); done == 2*maxWeight {
			stop()
		}
	}
	done, err := Apply(ctx, w.store, w.mustPlan(path, false), cfg)
	if !errors.Is(err, context.Canceled) || done != 2*maxWeight {
		t.Fatalf("made %d: %v", done, err)
	}
	if diff := cmp.Diff([]int{maxWeight, 2 * maxWeight}, seen); diff != "" {
		t.Error(diff)
	}
	if left := w.applied(path, false); len(left) != maxWeight {
		t.Errorf("%d steps were left, want %d", len(left), maxWeight)
	}
}

// A run is no faster than its share of the time.
func TestPause(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cfg := atOnce
	cfg.Share = 0.25
	var last time.Time
	var gaps []time.Duration
	cfg.Progress = func(int) {
		if !last.IsZero() {
			gaps = append(gaps, time.Since(last))
		}
		last = time.Now()
	}
	plan := w.mustPlan(file(t, manyScopes(2*maxWeight)), false)
	began := time.Now()
	if _, err := Apply(t.Context(), w.store, plan, cfg); err != nil {
		t.Fatal(err)
	}
	if first := time.Since(began) - gaps[0]; gaps[0] < 2*first && first > 2*quick {
		t.Errorf("the second transaction ended %s after the first, which took %s", gaps[0], first)
	}
}

// keys are the public ones of a client, in YAML, and as JSON in one form only.
const (
	keys     = `{keys: [{kty: EC, crv: P-256, x: f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU, y: x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0, kid: k1}]}`
	keysJSON = `{"keys":[{"crv":"P-256","kid":"k1","kty":"EC","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}`
)

// What a client is registered with beside its secret.
func TestClients(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	path := file(t, `
applications:
- name: X
	owner: o
	self_contained: true
	keys:
	- {consumer_key: least, client: {}}
	- {consumer_key: gw-1, client: {grant_types: [], resource_audiences: ["https://api.example.com"]}}
	- {consumer_key: jwt, client: {auth_method: private_key_jwt, token_typ: JWT, jwks: `+keys+`}}
`)
	if p := w.mustPlan(path, true); p.Secrets != 2 {
		t.Errorf("%d secrets are made, want one for each but the client with a key", p.Secrets)
	}
	w.applied(path, true)
	state, err := ReadState(t.Context(), w.pool, nil)
	if err != nil {
		t.Fatal(err)
	}
	type registration struct {
		method, jwks, typ string
		grants, audiences []string
	}
	got := make(map[string]registration)
	for id, r := range state.clients {
		got[id] = registration{r.AuthMethod, r.JWKS, r.TokenTyp, r.GrantTypes, r.ResourceAudiences}
	}
	want := map[string]registration{
		"least": {methodBasic, "", "at+jwt", []string{"client_credentials"}, []string{}},
		"gw-1":  {methodBasic, "", "at+jwt", []string{}, []string{"https://api.example.com"}},
		"jwt":   {methodKey, keysJSON, "JWT", []string{"client_credentials"}, []string{}},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(registration{})); diff != "" {
		t.Error(diff)
	}
	if app := one[*catalog.Application](w, store.Filter{Name: "X"}); !app.SelfContained {
		t.Errorf("%+v", app)
	}
	steps := w.applied(file(t, "applications: [{name: X, owner: o}]\n"), false)
	if diff := cmp.Diff([]string{"update application o/X self_contained:true->"}, steps); diff != "" {
		t.Error(diff)
	}
}

// A tenant, its applications and the keys of its own key manager are made in one go, and
// from there exported to an empty database.
// What comes with a new tenant takes no id that the files give to others.
func TestGivenIDsBesideNewTenants(t *testing.T) {
	t.Parallel()
	w := newService(t)
	w.applied(file(t, `
tenants: [{domain: a.example}]
---
tenant: carbon.super
key_managers: [{id: 2, name: idp, iss: https://idp, max_token_lifetime: 60}]
policies:
  subscription: [{id: 4, name: Gold}, {id: 5, name: Silver}, {id: 6, name: Bronze}]
`), true)
	if idp := one[*catalog.KeyManager](w, store.Filter{Tenant: "carbon.super", Name: "idp"}); idp.ID != 2 {
		t.Errorf("%+v", idp)
	}
}

func TestNewTenant(t *testing.T) {
	t.Parallel()
	w := newService(t)
	path := file(t, `
tenants: [{domain: a.example}, {domain: b.example}]
---
tenant: a.example
key_managers: [{name: Resident Key Manager, resident: true, description: Ours}, {name: idp, iss: https://idp, max_token_lifetime: 60}]
applications:
- name: X
	owner: o
	keys:
	- {consumer_key: a1, client: {auth_method: none}}
	- {consumer_key: a2, key_type: SANDBOX, key_manager: Resident Key Manager, client: {}}
	- {consumer_key: a3, key_manager: idp}
---
tenant: b.example
applications:
- {name: X, owner: o, keys: [{consumer_key: b1, client: {}}]}
`)
	want := []string{
		"create tenant a.example @a.example", "create tenant b.example @b.example",
		`update key manager Resident Key Manager description:->"Ours" @a.example`, "create key manager idp @a.example",
		"create application o/X @a.example", "create application o/X @b.example",
		"create key mapping a1 @a.example", "create key mapping a2 @a.example", "create key mapping a3 @a.example", "create key mapping b1 @b.example",
	}
	if diff := cmp.Diff(want, w.applied(path, true)); diff != "" {
		t.Error(diff)
	}
	state, err := ReadState(t.Context(), w.pool, nil)
	if err != nil {
		t.Fatal(err)
	}
	issuers := make(map[string]string)
	for _, tenant := range state.tenants {
		for _, k := range tenant.keys {
			issuers[k.ConsumerKey] = k.Iss
		}
	}
	if diff := cmp.Diff(map[string]string{"a1": iss + "/t/a.example", "a2": iss + "/t/a.example", "a3": "https://idp", "b1": iss + "/t/b.example"}, issuers); diff != "" {
		t.Error(diff)
	}
	own := state.tenants["a.example"].resident
	if own.Description != "Ours" || !own.Enabled || own.MaxTokenLifetime != 3600 || state.tenants["b.example"].resident == nil {
		t.Errorf("%+v", own)
	}
	// Pruning leaves it.
	w.applied(file(t, nothing(w)), true)
	if own := one[*catalog.KeyManager](w, store.Filter{Tenant: "a.example"}); !own.Resident {
		t.Errorf("%+v is left", own)
	}
	w.applied(path, true)

	export := w.export()
	path = file(t, "")
	if err := os.WriteFile(path, []byte(export), 0o600); err != nil {
		t.Fatal(err)
	}
	second := newService(t)
	second.applied(path, true)
	if diff := cmp.Diff(export, second.export()); diff != "" {
		t.Error(diff)
	}
}

func TestSecrets(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	path := file(t, `
applications:
- name: X
	owner: o
	keys:
	- {consumer_key: made, client: {scopes: [a, b], default_scopes: [a], token_lifetime: 60}}
	- {consumer_key: ours, key_type: SANDBOX, client: {auth_method: client_secret_post, secret_file: secret.txt, revoke_by_jti: true}}
	- {consumer_key: open, client: {auth_method: none}}
`)
	const given = "a secret that somebody chose"
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "secret.txt"), []byte(given+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	plan := w.mustPlan(path, true)
	if plan.Secrets != 1 {
		t.Errorf("%d secrets are made, want 1", plan.Secrets)
	}
	before := w.head()
	if _, err := Apply(t.Context(), w.store, plan, atOnce); err == nil || w.head() != before {
		t.Errorf("without a place for secrets: %v", err)
	}
	cfg := atOnce
	full := errors.New("disk full")
	cfg.Keep = func(Secret) error { return full }
	if done, err := Apply(t.Context(), w.store, plan, cfg); !errors.Is(err, full) || done != 1 {
		t.Errorf("made %d: %v", done, err)
	}
	var kept []Secret
	cfg.Keep = func(s Secret) error { kept = append(kept, s); return nil }
	if _, err := Apply(t.Context(), w.store, w.mustPlan(path, true), cfg); err != nil {
		t.Fatal(err)
	}
	if again := told(w.mustPlan(path, true)); len(again) > 0 {
		t.Errorf("applying it again would do: %v", again)
	}
	if len(kept) != 1 || len(kept[0].Secret) < 52 {
		t.Fatalf("%d secrets were kept", len(kept))
	}
	want := Secret{Tenant: super, Owner: "o", Application: "X", KeyManager: resident, ConsumerKey: "made", Secret: kept[0].Secret}
	if kept[0] != want {
		t.Errorf("kept %+v, want %+v", kept[0], want)
	}
	if text := w.export(); strings.Contains(text, given) || strings.Contains(text, want.Secret) || !strings.Contains(text, "consumer_key: made") {
		t.Errorf("the export is\n%s", text)
	}
}

// A random catalog, exported, makes the same one out of an empty database, ids and all.
func TestExportRoundTrip(t *testing.T) {
	t.Parallel()
	for range 3 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			first, second := newWorld(t), newWorld(t)
			text := randomCatalog(rand.New(rand.NewPCG(seed, 1)))
			first.applied(file(t, text), true)
			export := first.export()
			path := file(t, "")
			if err := os.WriteFile(path, []byte(export), 0o600); err != nil {
				t.Fatal(err)
			}
			if left := told(first.mustPlan(path, true)); len(left) > 0 {
				t.Errorf("the export is not what there is: %v", left)
			}
			second.applied(path, true)
			if diff := cmp.Diff(export, second.export()); diff != "" {
				t.Errorf("seed %d: %s\nof\n%s", seed, diff, text)
			}
			// And from there to nothing.
			second.applied(file(t, nothing(second)), true)
			if left := one[*catalog.KeyManager](second, store.Filter{}); !left.Resident {
				t.Errorf("%+v is left", left)
			}
		})
	}
}

// What the service makes for its canary is in no file, and stays.
func TestCanaryIsNotPruned(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	if err := w.store.EnsureIssuers(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := w.export()
	if err := w.store.EnsureCanary(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, w.export()); diff != "" {
		t.Errorf("exported with the canary: %s", diff)
	}
	if left := told(w.mustPlan(file(t, nothing(w)), true)); len(left) > 0 {
		t.Errorf("pruned: %q", left)
	}
}

// nothing has every list of every tenant, empty.
func nothing(w *world) string {
	s, err := ReadState(w.t.Context(), w.pool, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	var b strings.Builder
	for _, domain := range s.Tenants() {
		fmt.Fprintf(&b, "---\ntenant: %q\nkey_managers: []\npolicies: {api: [], application: [], subscription: []}\nscopes: []\napis: []\napplications: []\n", domain)
	}
	return b.String()
}

// randomCatalog has names that YAML finds hard, and a bit of everything.
func randomCatalog(r *rand.Rand) string {
	n := 0
	hard := []string{"1.0", "yes", "null", "~", "- a", "a: b", "#x", "'", "\"", "é€", "{x}", "*a", "&a", "!t", "%d", "@x", "`", "0x1F", "1e3", "2024-01-01", " x ", "x\u2028y", "<<", "|", ">", "😀"}
	name := func() string { n++; return fmt.Sprintf("%s%d%s", hard[r.IntN(len(hard))], n, hard[r.IntN(len(hard))]) }
	plain := func(prefix string) string { n++; return fmt.Sprintf("%s%d", prefix, n) }
	id := func() identity {
		if r.IntN(2) == 0 {
			return identity{}
		}
		n++
		var u uuid.UUID
		for i := range u {
			u[i] = byte(r.Uint32())
		}
		return identity{ID: int32(1000 + n), UUID: u.String()}
	}
	pick := func(s []string) string { return s[r.IntN(len(s))] }
	docs := []document{{Tenants: list[tenantForm]{{Domain: "b.example", identity: id(), DisplayName: name()}, {Domain: super, DisplayName: name()}}}}
	for _, domain := range []string{super, "b.example"} {
		doc := document{Tenant: domain, Policies: &policiesForm{}}
		managers := []string{}
		for range 1 + r.IntN(3) {
			k := keyManagerForm{Name: name(), identity: id(), Iss: "https://" + plain("idp"), MaxTokenLifetime: 1 + r.Int32N(9999)}
			k.setDefaults()
			k.Enabled, k.Description, k.Algorithms = r.IntN(2) == 0, name(), [][]string{nil, {"RS256", "EdDSA"}}[r.IntN(2)]
			k.ClaimMappings = [][]claimMappingForm{nil, {{name(), name()}}}[r.IntN(2)]
			k.Properties = []map[string]any{nil, {name(): name(), "n": 1.5, "big": 1e21, "list": []any{true, 0.5, map[string]any{"x": name()}}}}[r.IntN(2)]
			managers = append(managers, k.Name)
			doc.KeyManagers = append(doc.KeyManagers, k)
		}
		policies := map[string][]string{}
		for _, kind := range policyKinds {
			of := doc.Policies.of(kind)
			*of = list[policyForm]{}
			policies[kind] = []string{unlimited}
			for range r.IntN(4) {
				p := policyForm{Name: name(), identity: id(), DisplayName: name(), QuotaType: "bandwidthVolume", Quota: 1 + r.Int64N(1<<40), UnitTime: 1, TimeUnit: "day"}
				if kind == catalog.PolicyAPI {
					p.Level = "resourceLevel"
				}
				policies[kind] = append(policies[kind], p.Name)
				*of = append(*of, p)
			}
		}
		if r.IntN(2) == 0 {
			*doc.Policies.of(catalog.PolicyAPI) = append(*doc.Policies.of(catalog.PolicyAPI), policyForm{Name: unlimited, QuotaType: "requestCount", Description: name()})
		}
		scopes := []string{}
		doc.Scopes = list[scopeForm]{}
		for range r.IntN(4) {
			s := scopeForm{Name: plain("s:"), identity: id(), DisplayName: name(), Roles: [][]string{nil, {name(), name()}}[r.IntN(2)]}
			scopes = append(scopes, s.Name)
			doc.Scopes = append(doc.Scopes, s)
		}
		var apis []string
		for range 1 + r.IntN(5) {
			a := apiForm{Name: name(), Version: "1." + plain("0"), identity: id(), Context: "/" + plain("c"), Provider: name()}
			a.setDefaults()
			a.Status, a.GatewayLabels = catalog.APICreated, [][]string{nil, {"Default", plain("g")}}[r.IntN(2)]
			if r.IntN(2) == 0 {
				a.Policy = pick(policies[catalog.PolicyAPI])
			}
			for range r.IntN(3) {
				o := operationForm{Target: "/" + plain("t"), Verb: "GET", AuthType: "Any", Policy: pick(policies[catalog.PolicyAPI])}
				if len(scopes) > 0 {
					o.Scopes = []string{pick(scopes)}
				}
				a.Operations = append(a.Operations, o)
			}
			apis = append(apis, a.Name+":"+a.Version)
			doc.APIs = append(doc.APIs, a)
		}
		doc.Applications = list[applicationForm]{}
		for range r.IntN(6) {
			blocked, tokenType := r.IntN(2) == 0, pick([]string{"JWT", "OAUTH"})
			a := applicationForm{
				Name: name(), Owner: name(), identity: id(), Policy: pick(policies[catalog.PolicyApplication]), TokenType: tokenType,
				SelfContained: tokenType == "JWT", Groups: [][]string{nil, {name()}}[r.IntN(2)], Attributes: []map[string]string{nil, {name(): name(), "empty": ""}}[r.IntN(2)], Blocked: &blocked,
				Keys: list[keyForm]{}, Subscriptions: list[subscriptionForm]{},
			}
			for range r.IntN(3) {
				k := keyForm{ConsumerKey: name(), identity: id(), KeyType: []string{"PRODUCTION", "SANDBOX"}[r.IntN(2)], KeyManager: pick(managers)}
				if domain == super && r.IntN(2) == 0 {
					k.KeyManager = []string{"", resident}[r.IntN(2)]
					k.Client = &clientForm{
						AuthMethod: []string{"none", "client_secret_post"}[r.IntN(2)], Audience: []string{name()}, RevokeQuota: r.IntN(2) * 5,
						GrantTypes: []list[string]{nil, {}}[r.IntN(2)], TokenTyp: pick([]string{"at+jwt", "JWT"}), ResourceAudiences: [][]string{nil, {name()}}[r.IntN(2)],
					}
					if r.IntN(3) == 0 {
						k.Client.AuthMethod = methodKey
						if err := json.Unmarshal([]byte(keysJSON), &k.Client.JWKS); err != nil {
							panic(err)
						}
					}
				}
				a.Keys = append(a.Keys, k)
			}
			for _, api := range apis {
				if r.IntN(2) == 0 {
					a.Subscriptions = append(a.Subscriptions, subscriptionForm{
						API: api, identity: id(), Policy: pick(policies[catalog.PolicySubscription]), State: []string{"UNBLOCKED", "ON_HOLD"}[r.IntN(2)],
					})
				}
			}
			doc.Applications = append(doc.Applications, a)
		}
		docs = append(docs, doc)
	}
	var b bytes.Buffer
	if err := dump(&b, docs); err != nil {
		panic(err)
	}
	return b.String()
}

// large has every so manieth of this many applications, with so many subscriptions each.
func large(applications, each, every int) string {
	var b strings.Builder
	b.WriteString("key_managers: [{name: idp, iss: https://idp, max_token_lifetime: 60}]\npolicies: {subscription: [{name: Gold}]}\napis:\n")
	for i := range each {
		fmt.Fprintf(&b, "- {name: API%d, version: \"1.0.0\", context: /api%d/1.0.0, provider: admin}\n", i, i)
	}
	for i := 0; i < applications; i += every {
		if i%1000 == 0 {
			b.WriteString("---\napplications:\n")
		}
		fmt.Fprintf(&b, "- name: App%d\n  owner: admin\n  keys: [{consumer_key: key%d, key_manager: idp}]\n  subscriptions:\n", i, i)
		for j := range each {
			fmt.Fprintf(&b, "  - {api: \"API%d:1.0.0\", policy: Gold}\n", j)
		}
	}
	return b.String()
}

func TestLargeCatalog(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	path := file(t, large(2000, 5, 1))
	began := time.Now()
	steps := w.applied(path, true)
	t.Logf("%d changes in %s", len(steps), time.Since(began))
	if want := 2 + 5 + 2000*(1+1+5); len(steps) != want {
		t.Errorf("%d changes, want %d", len(steps), want)
	}
	// Every second application goes, with what it has.
	if steps = w.applied(file(t, large(2000, 5, 2)), true); len(steps) != 1000 {
		t.Errorf("%d changes, want 1000 deleted applications", len(steps))
	}
}

// BenchmarkApply is 10,000 applications with 100,000 subscriptions. Its share of the time
// is the default, so that it is what rescind apply takes.
func BenchmarkApply(b *testing.B) {
	path := file(b, large(10_000, 10, 1))
	for b.Loop() {
		w := newWorld(b)
		began := time.Now()
		want, err := Read(path)
		if err != nil {
			b.Fatal(err)
		}
		read := time.Now()
		have, err := ReadState(b.Context(), w.pool, want.Tenants())
		if err != nil {
			b.Fatal(err)
		}
		plan, err := NewPlan(want, have, true)
		if err != nil {
			b.Fatal(err)
		}
		planned := time.Now()
		if _, err := Apply(b.Context(), w.store, plan, Config{}); err != nil {
			b.Fatal(err)
		}
		made := time.Now()
		if left := w.mustPlan(path, true); len(left.Steps) > 0 {
			b.Fatalf("%d steps are left", len(left.Steps))
		}
		b.ReportMetric(read.Sub(began).Seconds(), "s/parse")
		b.ReportMetric(planned.Sub(read).Seconds(), "s/plan")
		b.ReportMetric(made.Sub(planned).Seconds(), "s/apply")
		b.ReportMetric(time.Since(made).Seconds(), "s/again")
		b.ReportMetric(float64(len(plan.Steps))/made.Sub(planned).Seconds(), "changes/s")
	}
}
