package catalog_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
)

// What a change ends is told before it, for the keys that it is about and no others.
func TestRevocations(t *testing.T) {
	t.Parallel()
	const prod, sand = "revocation.client prod", "revocation.client sand"
	state := func(s string) func(*world, []catalog.Entity) error {
		return func(w *world, e []catalog.Entity) error {
			_, _, err := w.Apply(w.Context(), admin, []store.Change{update(with(e[3].(*catalog.Subscription), func(c *catalog.Subscription) { c.State = s }))})
			return err
		}
	}
	both := func(fs ...func(*world, []catalog.Entity) error) func(*world, []catalog.Entity) error {
		return func(w *world, e []catalog.Entity) error {
			for _, f := range fs {
				if err := f(w, e); err != nil {
					return err
				}
			}
			return nil
		}
	}
	change := func(c func(e []catalog.Entity) store.Change) func(*world, []catalog.Entity) error {
		return func(w *world, e []catalog.Entity) error {
			_, _, err := w.Apply(w.Context(), admin, []store.Change{c(e)})
			return err
		}
	}
	block := func(blocked, keep bool) func(*world, []catalog.Entity) error {
		return func(w *world, e []catalog.Entity) error {
			_, err := w.Block(w.Context(), admin, e[0].Base().UUID, 0, blocked, keep)
			return err
		}
	}
	keep := func(c store.Change) store.Change { c.KeepTokens = true; return c }
	w := newWorld(t)
	w.apply(create(keyManager("km")))
	pizza := made[*catalog.API](w, create(api("pizza")))
	bystander := made[*catalog.Application](w, create(application("bystander")))
	w.apply(create(mapping(bystander, "km", "other", catalog.Production)), create(subscription(bystander, pizza)))
	for _, tt := range []struct {
		name string
		do   func(*world, []catalog.Entity) error
		want []string
	}{
		{"subscription blocked", state(catalog.Blocked), []string{"subscription.updated", prod, sand}},
		{"subscription on hold", state(catalog.OnHold), []string{"subscription.updated", prod, sand}},
		{"subscription rejected", state(catalog.Rejected), []string{"subscription.updated", prod, sand}},
		{"subscription blocked for production", state(catalog.ProdOnlyBlocked), []string{"subscription.updated", prod}},
		{"and then for all", both(state(catalog.ProdOnlyBlocked), state(catalog.Blocked)), []string{"subscription.updated", prod, "subscription.updated", sand}},
		{"still let through", state(catalog.TierUpdatePending), []string{"subscription.updated"}},
		{"blocked, and let through again", both(state(catalog.Blocked), state(catalog.Unblocked)), []string{"subscription.updated", prod, sand, "subscription.updated"}},
		{"subscription deleted", change(func(e []catalog.Entity) store.Change { return remove(e[3]) }), []string{"subscription.deleted", prod, sand}},
		{"subscription deleted, tokens kept", change(func(e []catalog.Entity) store.Change { return keep(remove(e[3])) }), []string{"subscription.deleted"}},
		{"key deleted", change(func(e []catalog.Entity) store.Change { return remove(e[2]) }), []string{"key_mapping.deleted sand", sand}},
		{"key deleted, tokens kept", change(func(e []catalog.Entity) store.Change { return keep(remove(e[2])) }), []string{"key_mapping.deleted sand"}},
		{"application deleted", change(func(e []catalog.Entity) store.Change { return remove(e[0]) }),
			[]string{"subscription.deleted", "key_mapping.deleted prod", "key_mapping.deleted sand", "application.deleted app", prod, sand}},
		{"application deleted, tokens kept", change(func(e []catalog.Entity) store.Change { return keep(remove(e[0])) }),
			[]string{"subscription.deleted", "key_mapping.deleted prod", "key_mapping.deleted sand", "application.deleted app"}},
		{"application blocked", block(true, false), []string{"application.updated app", "subscription.updated", prod, sand}},
		{"application blocked, tokens kept", block(true, true), []string{"application.updated app", "subscription.updated"}},
		{"application blocked twice", both(block(true, true), block(true, false)),
			[]string{"application.updated app", "subscription.updated", "revocation.client prod", "revocation.client sand"}},
		{"application unblocked", both(block(true, true), block(false, false)),
			[]string{"application.updated app", "subscription.updated", "application.updated app", "subscription.updated"}},
		{"blocked already by its application", both(block(true, true), state(catalog.Blocked)),
			[]string{"application.updated app", "subscription.updated", "subscription.updated", prod, sand}},
		{"blocked for production, by its application for all", both(block(true, true), state(catalog.ProdOnlyBlocked)),
			[]string{"application.updated app", "subscription.updated", "subscription.updated", prod}},
		{"changed while its application is blocked", both(block(true, true), state(catalog.TierUpdatePending)),
			[]string{"application.updated app", "subscription.updated", "subscription.updated"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := *w
			w.TB = t
			suffix := " of " + tt.name
			app := made[*catalog.Application](&w, create(application("app"+suffix)))
			e := append([]catalog.Entity{app}, w.apply(create(mapping(app, "km", "prod"+suffix, catalog.Production)),
				create(mapping(app, "km", "sand"+suffix, catalog.Sandbox)), create(subscription(app, pizza)))...)
			head, now := w.head(), time.Now().Unix()
			if err := tt.do(&w, e); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, s := range w.told(head) {
				got = append(got, strings.TrimSuffix(strings.TrimSuffix(s, suffix), " "+e[3].Base().UUID))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("events (-want +got):\n%s", diff)
			}
			for _, event := range w.events(head) {
				if r, err := event.Revocation(); err == nil && (r.Exp != r.NotAfter+3600 || r.Target.Iss != "https://km.example" || r.NotAfter < now || r.Reason == "") {
					t.Errorf("revocation %+v", r)
				}
			}
		})
	}
}

// Tokens that carry what they are for know of no change: whatever ends them revokes them.
func TestSelfContainedTokensEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(create(keyManager("km")), create(&catalog.Policy{Kind: catalog.PolicySubscription, Name: "Gold"}))
	pizza := made[*catalog.API](w, create(api("pizza")))
	apply := func(w *world, c store.Change, keep bool) error {
		c.KeepTokens = keep
		_, _, err := w.Apply(w.Context(), admin, []store.Change{c})
		return err
	}
	set := func(w *world, e catalog.Entity, keep bool, change func(*catalog.Subscription)) error {
		return apply(w, update(with(e.(*catalog.Subscription), change)), keep)
	}
	const both, production, none = "prod sand", "prod", ""
	for _, tt := range []struct {
		name string
		do   func(w *world, app *catalog.Application, e []catalog.Entity, keep bool) error
		ends string // the keys whose tokens cannot be kept
	}{
		{"block", func(w *world, app *catalog.Application, _ []catalog.Entity, keep bool) error {
			_, err := w.Block(w.Context(), admin, app.UUID, 0, true, keep)
			return err
		}, both},
		{"unblock", func(w *world, app *catalog.Application, _ []catalog.Entity, keep bool) error {
			_, err := w.Block(w.Context(), admin, app.UUID, 0, false, keep)
			return err
		}, none},
		{"delete the application", func(w *world, app *catalog.Application, _ []catalog.Entity, keep bool) error {
			return apply(w, remove(app), keep)
		}, both},
		{"delete a key", func(w *world, _ *catalog.Application, e []catalog.Entity, keep bool) error {
			return apply(w, remove(e[0]), keep)
		}, production},
		{"delete the subscription", func(w *world, _ *catalog.Application, e []catalog.Entity, keep bool) error {
			return apply(w, remove(e[2]), keep)
		}, both},
		{"put it on hold", func(w *world, _ *catalog.Application, e []catalog.Entity, keep bool) error {
			return set(w, e[2], keep, func(s *catalog.Subscription) { s.State = catalog.OnHold })
		}, both},
		{"block it for production", func(w *world, _ *catalog.Application, e []catalog.Entity, keep bool) error {
			return set(w, e[2], keep, func(s *catalog.Subscription) { s.State = catalog.ProdOnlyBlocked })
		}, production},
		{"give it another tier", func(w *world, _ *catalog.Application, e []catalog.Entity, keep bool) error {
			return set(w, e[2], keep, func(s *catalog.Subscription) { s.Policy = "Gold" })
		}, none},
		{"self-contained no longer", func(w *world, app *catalog.Application, _ []catalog.Entity, keep bool) error {
			return apply(w, update(with(app, func(a *catalog.Application) { a.SelfContained = false })), keep)
		}, both},
		{"self-contained still", func(w *world, app *catalog.Application, _ []catalog.Entity, keep bool) error {
			return apply(w, update(with(app, func(a *catalog.Application) { a.Name += ", renamed" })), keep)
		}, none},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := *w
			w.TB = t
			suffix := " to " + tt.name
			app := made[*catalog.Application](&w, create(with(application("app"+suffix), func(a *catalog.Application) { a.SelfContained = true })))
			e := w.apply(create(mapping(app, "km", "prod"+suffix, catalog.Production)), create(mapping(app, "km", "sand"+suffix, catalog.Sandbox)),
				create(subscription(app, pizza)))
			if tt.ends != none {
				state, head := w.all(), w.head()
				if err := tt.do(&w, app, e, true); why(err) != "invalid #/revoke_tokens" {
					t.Errorf("%v, want that the tokens cannot be kept", err)
				}
				if diff := cmp.Diff(state, w.all()); diff != "" || w.head() != head {
					t.Errorf("something changed:\n%s", diff)
				}
			}
			head := w.head()
			if err := tt.do(&w, app, e, tt.ends == none); err != nil {
				t.Fatal(err)
			}
			var ended []string
			for _, s := range w.told(head) {
				if s, ok := strings.CutPrefix(s, "revocation.client "); ok {
					ended = append(ended, strings.TrimSuffix(s, suffix))
				}
			}
			if got := strings.Join(ended, " "); got != tt.ends {
				t.Errorf("revoked the tokens of %q, want %q", got, tt.ends)
			}
		})
	}
	lone := made[*catalog.Application](w, create(with(application("lone"), func(a *catalog.Application) { a.SelfContained = true })))
	if _, err := w.Block(t.Context(), admin, lone.UUID, 0, true, true); err != nil {
		t.Errorf("without a key there are no tokens to keep: %v", err)
	}
}

// An application's state reaches subscriptions that are made or changed while it is blocked.
func TestBlockedApplication(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	app := made[*catalog.Application](w, create(application("app")))
	apis := w.apply(create(api("a")), create(api("b")))
	before := w.apply(create(subscription(app, apis[0])))[0]
	blocked, err := w.Block(t.Context(), admin, fmt.Sprint(app.ID), app.Timestamp, true, false)
	if err != nil || !blocked.Blocked || blocked.Timestamp <= app.Timestamp {
		t.Fatalf("%+v, %v", blocked, err)
	}
	if _, err := w.Block(t.Context(), admin, app.UUID, app.Timestamp, false, false); !errors.Is(err, store.ErrStale) {
		t.Errorf("for an old version: %v", err)
	}
	after := w.apply(create(subscription(app, apis[1])), update(with(app, func(a *catalog.Application) { a.Name = "renamed" })),
		update(with(before.(*catalog.Subscription), func(s *catalog.Subscription) { s.State = catalog.TierUpdatePending })))
	effective := func() (states []string) {
		for _, e := range []catalog.Entity{before, after[0]} {
			now, err := w.Get(t.Context(), admin, catalog.NounSubscription, e.Base().UUID)
			if err != nil {
				t.Fatal(err)
			}
			states = append(states, now.(*catalog.Subscription).Effective())
		}
		return states
	}
	if !after[1].(*catalog.Application).Blocked {
		t.Error("an update unblocked the application")
	}
	if diff := cmp.Diff([]string{"BLOCKED", "BLOCKED"}, effective()); diff != "" {
		t.Error(diff)
	}
	if _, err := w.Block(t.Context(), admin, app.UUID, 0, false, false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"TIER_UPDATE_PENDING", "UNBLOCKED"}, effective()); diff != "" {
		t.Error(diff)
	}
}

// held makes an application with n subscriptions and a key.
func (w *world) held(n int) (app *catalog.Application) {
	w.Helper()
	w.apply(create(keyManager("km")))
	app = made[*catalog.Application](w, create(application("app")))
	w.apply(create(mapping(app, "km", "ck", catalog.Production)))
	for n > 0 {
		size := min(n, 500)
		var apis, subs []store.Change
		for i := range size {
			apis = append(apis, create(api(fmt.Sprintf("api-%d-%d", n, i))))
		}
		for _, a := range w.apply(apis...) {
			subs = append(subs, create(subscription(app, a)))
		}
		w.apply(subs...)
		n -= size
	}
	return app
}

// What is more than one transaction can tell is told in several.
func TestCascades(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	app := w.held(1100)
	tally := func(after revocation.Seq) map[string]int {
		tally := make(map[string]int)
		for _, e := range w.events(after) {
			tally[e.Type]++
		}
		return tally
	}
	head := w.head()
	if _, err := w.Block(t.Context(), admin, app.UUID, 0, true, false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]int{"revocation.client": 1, "application.updated": 1, "subscription.updated": 1100}, tally(head)); diff != "" {
		t.Errorf("block (-want +got):\n%s", diff)
	}
	// All of the first transaction, with the tokens.
	if first := w.told(head)[:ledger.MaxChanges]; first[0] != "application.updated app" || !slices.Contains(first, "revocation.client ck") {
		t.Errorf("block begins with %q", first)
	}
	if n := w.count(`SELECT count(*) FROM rescind.subscriptions WHERE application_blocked`); n != 1100 {
		t.Errorf("%d blocked", n)
	}

	// One that stopped after its first transaction.
	if _, err := w.pool.Exec(t.Context(), `UPDATE rescind.subscriptions SET application_blocked = false WHERE id % 2 = 0`); err != nil {
		t.Fatal(err)
	}
	// What was revoked within this second would not be told again.
	again := func() {
		t.Helper()
		if _, err := w.pool.Exec(t.Context(), `UPDATE rescind.revocations SET not_after = 1`); err != nil {
			t.Fatal(err)
		}
	}
	again()
	head = w.head()
	if _, err := w.Block(t.Context(), admin, app.UUID, 0, true, false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]int{"revocation.client": 1, "subscription.updated": 550}, tally(head)); diff != "" {
		t.Errorf("finish block (-want +got):\n%s", diff)
	}
	if _, err := w.Block(t.Context(), admin, app.UUID, 0, false, false); err != nil {
		t.Fatal(err)
	}

	again()
	head = w.head()
	two := []store.Change{remove(app), create(application("other"))}
	if _, _, err := w.Apply(t.Context(), admin, two); why(err) != "limit" || w.head() != head {
		t.Errorf("%v, want that it does not fit", err)
	}
	if _, _, err := w.Apply(t.Context(), admin, []store.Change{{Op: store.Delete, Entity: app, IfTimestamp: 1}}); !errors.Is(err, store.ErrStale) {
		t.Errorf("%v, want a stale version to be refused", err)
	}
	now, err := w.Get(t.Context(), admin, catalog.NounApplication, app.UUID)
	if err != nil {
		t.Fatal(err)
	}
	gone, at, err := w.Apply(t.Context(), admin, []store.Change{{Op: store.Delete, Entity: app, IfTimestamp: now.Base().Timestamp}})
	if err != nil || len(gone) != 1 || at.Seq != w.head() {
		t.Fatal(gone, at, err)
	}
	want := map[string]int{
		"revocation.client": 2, "application.updated": 1, "subscription.deleted": 1100, "key_mapping.deleted": 1, "application.deleted": 1,
	}
	got := tally(head)
	if got["revocation.client"] == 1 {
		got["revocation.client"] = 2 // the last transaction's was within the same second
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("delete (-want +got):\n%s", diff)
	}
	if first := w.told(head)[:ledger.MaxChanges]; first[0] != "application.updated app" || !slices.Contains(first, "revocation.client ck") {
		t.Errorf("delete begins with %q", first)
	}
	if n := w.count(`SELECT count(*) FROM rescind.applications`); n != 0 {
		t.Errorf("%d applications are left", n)
	}
}

// The tokens that a block kept are not kept by a deletion, however long it takes.
func TestDeletionOfWhatIsBlocked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	app := w.held(600)
	contained := made[*catalog.Application](w, update(with(app, func(a *catalog.Application) { a.SelfContained = true })))
	if _, _, err := w.Apply(t.Context(), admin, []store.Change{{Op: store.Delete, Entity: app, KeepTokens: true}}); why(err) != "invalid #/revoke_tokens" {
		t.Errorf("%v, want that self-contained tokens cannot be kept", err)
	}
	w.apply(update(with(contained, func(a *catalog.Application) { a.SelfContained = false })))
	// What was revoked within this second would not be told again.
	if _, err := w.pool.Exec(t.Context(), `UPDATE rescind.revocations SET not_after = 1`); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Block(t.Context(), admin, app.UUID, 0, true, true); err != nil {
		t.Fatal(err)
	}
	head := w.head()
	w.apply(remove(app))
	if first := w.told(head)[:ledger.MaxChanges]; !slices.Contains(first, "revocation.client ck") {
		t.Errorf("begins with %q", first)
	}
}
