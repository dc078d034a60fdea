package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
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
	ownIss      = "https://own.example"
	externalIss = "https://external.example"
)

var discard = slog.New(slog.DiscardHandler)

var config = store.Config{Issuer: ownIss, MaxTokenLifetime: time.Hour}

// world is a catalog with a log and clients, as one process has them.
type world struct {
	testing.TB
	*store.Store
	pool    *pgxpool.Pool
	ledger  *ledger.Ledger
	clients *authn.Authenticator
}

// admin sees all tenants.
var admin = store.Caller{
	Actor:       ledger.Actor{Name: "account:admin", RequestID: "r-1", Remote: "127.0.0.1"},
	Traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}

func newWorld(t testing.TB) *world {
	t.Helper()
	return newWorldOn(t, pgtest.New(t))
}

// newWorldOn is another process on the same database.
func newWorldOn(t testing.TB, pool *pgxpool.Pool) *world {
	t.Helper()
	l, err := ledger.New(ledger.Config{Source: ownIss}, pool, prometheus.NewRegistry(), discard)
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
	clients, err := authn.New(authn.Config{}, pool, []authn.MasterKey{key}, prometheus.NewRegistry(), discard)
	if err != nil {
		t.Fatal(err)
	}
	return &world{TB: t, Store: store.New(config, pool, l, clients, discard), pool: pool, ledger: l, clients: clients}
}

func create(e catalog.Entity) store.Change { return store.Change{Op: store.Create, Entity: e} }
func update(e catalog.Entity) store.Change { return store.Change{Op: store.Update, Entity: e} }
func remove(e catalog.Entity) store.Change { return store.Change{Op: store.Delete, Entity: e} }

func (w *world) apply(changes ...store.Change) []catalog.Entity {
	w.Helper()
	entities, _, err := w.Apply(w.Context(), admin, changes)
	if err != nil {
		w.Fatalf("Apply: %v", err)
	}
	return entities
}

// made applies one change.
func made[E catalog.Entity](w *world, c store.Change) E {
	w.Helper()
	return w.apply(c)[0].(E)
}

func in(domain string) catalog.Meta {
	return catalog.Meta{Tenant: revocation.Tenant{Domain: domain}}
}

func ref(e catalog.Entity) catalog.Ref { return catalog.Ref{ID: e.Base().ID, UUID: e.Base().UUID} }

// With other members than those that others refer to, so that each is read and written.
func api(name string) *catalog.API {
	return &catalog.API{
		Name: name, Version: "1.0.0", Context: "/" + name + "/1.0.0", Provider: "admin", Type: "HTTP", Status: catalog.APIPublished,
		SecurityScheme: []string{"oauth2"},
		Operations:     []catalog.Operation{{Target: "/*", Verb: "GET", AuthType: "Any", Policy: "Unlimited"}},
	}
}

func application(name string) *catalog.Application {
	return &catalog.Application{Name: name, Owner: "admin"}
}

func keyManager(name string) *catalog.KeyManager {
	return &catalog.KeyManager{Name: name, Iss: "https://" + name + ".example", MaxTokenLifetime: 3600, Enabled: true, JWKSURI: "https://" + name + ".example/jwks"}
}

func mapping(app catalog.Entity, manager, key, keyType string) *catalog.KeyMapping {
	return &catalog.KeyMapping{Application: ref(app), KeyManager: manager, ConsumerKey: key, KeyType: keyType}
}

func subscription(app, api catalog.Entity) *catalog.Subscription {
	return &catalog.Subscription{Application: ref(app), API: ref(api)}
}

// events are the log's after seq.
func (w *world) events(after revocation.Seq) []revocation.Event {
	w.Helper()
	var all []revocation.Event
	for {
		page, err := w.ledger.After(w.Context(), after, 1000)
		if err != nil {
			w.Fatal(err)
		}
		if all = append(all, page...); len(page) == 0 {
			return all
		}
		after = page[len(page)-1].Seq
	}
}

// told are the events after seq in words.
func (w *world) told(after revocation.Seq) []string {
	w.Helper()
	var told []string
	for _, e := range w.events(after) {
		told = append(told, e.Type+" "+e.Subject)
	}
	return told
}

func (w *world) head() revocation.Seq {
	w.Helper()
	p, err := w.ledger.Head(w.Context())
	if err != nil {
		w.Fatal(err)
	}
	return p.Seq
}

func (w *world) count(sql string, args ...any) (n int) {
	w.Helper()
	if err := w.pool.QueryRow(w.Context(), sql, args...).Scan(&n); err != nil {
		w.Fatal(err)
	}
	return n
}

// all is what ReadAll yields, by noun and UUID.
func (w *world) all() map[string]catalog.Entity {
	w.Helper()
	all := make(map[string]catalog.Entity)
	err := pgx.BeginFunc(w.Context(), w.pool, func(tx pgx.Tx) error {
		for e, err := range store.ReadAll(w.Context(), tx) {
			if err != nil {
				return err
			}
			all[string(e.Noun())+" "+e.Base().UUID] = e
		}
		return nil
	})
	if err != nil {
		w.Fatal(err)
	}
	return all
}

// fold is what the events after seq make of state.
func (w *world) fold(state map[string]catalog.Entity, after revocation.Seq) map[string]catalog.Entity {
	w.Helper()
	for _, e := range w.events(after) {
		if !catalog.IsChange(e.Type) {
			continue
		}
		c, err := catalog.ParseChange(e)
		if err != nil {
			w.Fatalf("event %d: %v", e.Seq, err)
		}
		key := string(c.Entity.Noun()) + " " + c.Entity.Base().UUID
		if before, ok := state[key]; ok && c.Verb != catalog.Deployed && c.Verb != catalog.Undeployed &&
			before.Base().Timestamp >= c.Entity.Base().Timestamp && c.Verb != catalog.Deleted {
			w.Errorf("event %d, %s %s: timestamp %d after %d", e.Seq, e.Type, e.Subject, c.Entity.Base().Timestamp, before.Base().Timestamp)
		}
		if state[key] = c.Entity; c.Verb == catalog.Deleted {
			delete(state, key)
		}
	}
	return state
}

// why is an error in words that tests compare: the slug or kind, and the members.
func why(err error) string {
	var s []string
	if failed, ok := errors.AsType[*store.Failed](err); ok && failed.Index != 0 {
		s = append(s, fmt.Sprintf("[%d]", failed.Index))
	}
	if c, ok := errors.AsType[*store.Conflict](err); ok {
		return strings.TrimSpace(strings.Join(append(s, c.Slug, c.Pointer), " "))
	}
	if invalid, ok := errors.AsType[catalog.Invalid](err); ok {
		for _, f := range invalid {
			s = append(s, f.Pointer)
		}
		slices.Sort(s)
		return "invalid " + strings.Join(s, " ")
	}
	switch {
	case err == nil:
		s = append(s, "")
	case errors.Is(err, store.ErrNotFound):
		s = append(s, "not found")
	case errors.Is(err, store.ErrStale):
		s = append(s, "stale")
	default:
		s = append(s, "error: "+err.Error())
	}
	return strings.Join(s, " ")
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
