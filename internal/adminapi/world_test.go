package adminapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/rest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	iss      = "https://km.example.com"
	password = "correct horse battery staple"
)

// acme is a tenant beside carbon.super.
var acme = revocation.Tenant{ID: 7, Domain: "acme.com"}

// accounts are those that a world knows, by name.
var accounts = map[string]authn.Account{
	"admin":        {Tenant: revocation.SuperTenant, Role: rest.Admin},
	"super-admin":  {Tenant: revocation.SuperTenant, Role: rest.TenantAdmin},
	"acme-admin":   {Tenant: acme, Role: rest.TenantAdmin},
	"wide-admin":   {Tenant: acme, Role: rest.TenantAdmin, ExtraTenants: []string{"*"}},
	"auditor":      {Tenant: revocation.SuperTenant, Role: rest.Auditor},
	"acme-auditor": {Tenant: acme, Role: rest.Auditor},
	"wide-auditor": {Tenant: acme, Role: rest.Auditor, ExtraTenants: []string{"*"}},
	"two-auditor":  {Tenant: revocation.SuperTenant, Role: rest.Auditor, ExtraTenants: []string{"acme.com"}},
	"two-admin":    {Tenant: revocation.SuperTenant, Role: rest.TenantAdmin, ExtraTenants: []string{"acme.com"}},
	"gateway":      {Tenant: revocation.SuperTenant, Role: rest.Gateway, ExtraTenants: []string{"*"}},
	"two-gateway":  {Tenant: revocation.SuperTenant, Role: rest.Gateway, ExtraTenants: []string{"acme.com"}},
	"acme-gateway": {Tenant: acme, Role: rest.Gateway},
	"own-gateway":  {Tenant: revocation.SuperTenant, Role: rest.Gateway},
	"notifier":     {Tenant: revocation.SuperTenant, Role: rest.Notifier},
}

// world is the API over a catalog of its own, in which there are two tenants and the
// issuer of carbon.super.
type world struct {
	t      *testing.T
	pool   *pgxpool.Pool
	authn  *authn.Authenticator
	fresh  *state
	deps   Deps
	router *chi.Mux
	server *httptest.Server

	mu   sync.Mutex
	made map[string]bool // accounts
}

func newWorld(t *testing.T) *world {
	t.Helper()
	pool, log := pgtest.New(t), slog.New(slog.DiscardHandler)
	key, err := authn.NewMasterKey(bytes.Repeat([]byte("k"), 32))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, pool: pool, router: chi.NewRouter(), made: make(map[string]bool)}
	if w.authn, err = authn.New(authn.Config{}, pool, []authn.MasterKey{key}, prometheus.NewRegistry(), log); err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ledger.Config{Source: iss}, pool, prometheus.NewRegistry(), log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w.fresh = &state{pool: pool, replica: replica.NewState(replica.StateConfig{})}
	entities := store.New(store.Config{}, pool, l, w.authn, log)
	_, err = entities.EnsureKeyManager(t.Context(), catalog.KeyManager{
		Meta: catalog.Meta{Tenant: revocation.SuperTenant}, Name: "Resident Key Manager", Type: "default", Enabled: true, Resident: true,
		Iss: iss, MaxTokenLifetime: 3600, TokenType: "DIRECT",
	})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = entities.Apply(t.Context(), store.Caller{Actor: ledger.Actor{Name: "system"}}, []store.Change{
		{Op: store.Create, Entity: &catalog.Tenant{Meta: catalog.Meta{ID: acme.ID, Tenant: acme}, DisplayName: "ACME"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.deps = Deps{
		Catalog: entities, State: w.fresh, Audit: l, Accounts: w.authn,
		Idempotency: rest.NewIdempotencyStore(pool, []authn.MasterKey{key}),
	}
	api, err := New(w.deps)
	if err != nil {
		t.Fatal(err)
	}
	w.router.Use(middleware.GetHead)
	w.router.NotFound(rest.Handler(func(http.ResponseWriter, *http.Request) error { return rest.Status(http.StatusNotFound, "") }).ServeHTTP)
	api.Routes(w.router)
	w.server = httptest.NewServer(w.router)
	t.Cleanup(w.server.Close)
	return w
}

// state is a replica of the catalog that is read whole whenever it is to be fresh.
type state struct {
	pool    *pgxpool.Pool
	replica *replica.State

	mu  sync.Mutex
	err error // of Fresh
}

func (s *state) Replica() *replica.State { return s.replica }

func (s *state) Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || maxAge != 0 {
		return revocation.Position{}, errors.Join(s.err, ctx.Err())
	}
	at := s.replica.At()
	at.Epoch, at.Seq = "00000000-0000-4000-8000-000000000000", at.Seq+1
	return at, s.replica.Load(at, func(l *replica.Loader) error {
		return pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
			for e, err := range store.ReadAll(ctx, tx) {
				if err != nil {
					return err
				}
				l.Entity(e)
			}
			return nil
		})
	})
}

// account makes the account when it is first used: a password takes a while to hash.
func (w *world) account(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if name == "" || w.made[name] {
		return
	}
	acc, ok := accounts[name]
	if !ok {
		w.t.Fatalf("there is no account %q", name)
	}
	acc.Username = name
	if err := w.authn.PutAccount(w.t.Context(), acc, password); err != nil {
		w.t.Fatal(err)
	}
	w.made[name] = true
}

// response is an answer that has come whole.
type response struct {
	status int
	header http.Header
	body   string
}

func (a response) etag() string { return a.header.Get("ETag") }

// into decodes the answer's body.
func (a response) into(t *testing.T, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), v); err != nil {
		t.Fatalf("body %q: %v", a.body, err)
	}
}

// do sends a request as who, with pairs of names and values as its header.
func (w *world) do(who, method, path, body string, header ...string) response {
	w.t.Helper()
	w.account(who)
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.server.URL+path, strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	if who != "" {
		r.SetBasicAuth(who, password)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	res, err := w.server.Client().Do(r)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return response{res.StatusCode, res.Header, string(b)}
}

// one is who sends every request.
type one authn.Account

func (a one) Account(*http.Request) (authn.Account, error) { return authn.Account(a), nil }

// get reads as who without a password, which takes a while to hash.
func (w *world) get(who, path string) response {
	w.t.Helper()
	acc, ok := accounts[who]
	if !ok {
		w.t.Fatalf("there is no account %q", who)
	}
	deps := w.deps
	deps.Accounts = one(acc)
	api, err := New(deps)
	if err != nil {
		w.t.Fatal(err)
	}
	router, rec := chi.NewRouter(), httptest.NewRecorder()
	api.Routes(router)
	router.ServeHTTP(rec, httptest.NewRequestWithContext(w.t.Context(), "GET", path, nil))
	return response{rec.Code, rec.Header(), rec.Body.String()}
}

// must is do, and a fatal error if the answer has another status.
func (w *world) must(status int, who, method, path, body string, header ...string) response {
	w.t.Helper()
	a := w.do(who, method, path, body, header...)
	if a.status != status {
		w.t.Fatalf("%s %s as %s: status %d, want %d: %s", method, path, who, a.status, status, a.body)
	}
	return a
}

// state is everything that a change can leave behind, but answers that are kept.
func (w *world) state() string {
	w.t.Helper()
	var out strings.Builder
	for _, table := range []string{
		"tenants", "key_managers", "policies", "scopes", "apis", "applications", "key_mappings", "subscriptions",
		"clients", "client_secrets", "revocations", "log", "log_head", "audit",
	} {
		rows, err := w.pool.Query(w.t.Context(), `SELECT x::text FROM rescind.`+table+` x ORDER BY 1`)
		if err != nil {
			w.t.Fatal(err)
		}
		all, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			w.t.Fatal(err)
		}
		for _, row := range all {
			fmt.Fprintf(&out, "%s %s\n", table, row)
		}
	}
	return out.String()
}

// events are the types and subjects of the log after the first n events.
func (w *world) events(n int) []string {
	w.t.Helper()
	rows, err := w.pool.Query(w.t.Context(), `SELECT type || ' ' || subject FROM rescind.log ORDER BY seq OFFSET $1`, n)
	if err != nil {
		w.t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

// age makes the revocations so far a minute older: one that is repeated within a second
// adds no event.
func (w *world) age() {
	w.t.Helper()
	if _, err := w.pool.Exec(w.t.Context(), `UPDATE rescind.revocations SET exp = exp - 60, not_after = not_after - 60`); err != nil {
		w.t.Fatal(err)
	}
}

// transcript is what was sent and answered, without what differs from run to run.
type transcript struct {
	*world
	out strings.Builder
}

var shownHeaders = []string{"Location", "ETag", "Allow", "Accept", "Accept-Encoding", "WWW-Authenticate", "Idempotency-Replayed"}

func (r *transcript) do(who, method, path, body string, header ...string) response {
	r.t.Helper()
	a := r.world.do(who, method, path, body, header...)
	fmt.Fprintf(&r.out, "%s %s (%s)\n", method, path, who)
	for i := 0; i < len(header); i += 2 {
		fmt.Fprintf(&r.out, "%s: %s\n", header[i], header[i+1])
	}
	if body != "" {
		if len(body) > 1000 {
			body = fmt.Sprintf("%s… (%d bytes)", body[:40], len(body))
		}
		fmt.Fprintf(&r.out, "%s\n", body)
	}
	fmt.Fprintf(&r.out, "--> %d %s\n", a.status, a.header.Get("Content-Type"))
	for _, name := range shownHeaders {
		if value := a.header.Get(name); value != "" {
			fmt.Fprintf(&r.out, "%s: %s\n", name, value)
		}
	}
	if a.body != "" {
		var b bytes.Buffer
		if err := json.Indent(&b, []byte(a.body), "", "  "); err != nil {
			r.t.Errorf("%s %s: body %q: %v", method, path, a.body, err)
		}
		fmt.Fprintf(&r.out, "%s\n", b.String())
	}
	r.out.WriteString("\n")
	return a
}

var (
	milliseconds = regexp.MustCompile(`"?\b1[0-9]{12}\b"?`)
	secret       = regexp.MustCompile(`"consumer_secret": "[^"]*"`)
)

func (r *transcript) golden(name string) {
	r.t.Helper()
	got := milliseconds.ReplaceAllString(r.out.String(), "<ms>")
	got = secret.ReplaceAllString(got, `"consumer_secret": "<secret>"`)
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			r.t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		r.t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}
