package revokeapi

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
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
	"slices"
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
	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/revoke"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	iss     = "https://km.example.com"
	acmeIss = iss + "/t/acme.com"
	idp     = "https://idp.example" // carbon.super's
)

var acme = revocation.Tenant{ID: 7, Domain: "acme.com"}

// accounts lets people in by their name alone.
type accounts map[string]authn.Account

var people = accounts{
	"admin":        {Tenant: revocation.SuperTenant, Role: rest.Admin},
	"super-admin":  {Tenant: revocation.SuperTenant, Role: rest.TenantAdmin},
	"acme-admin":   {Tenant: acme, Role: rest.TenantAdmin},
	"wide-admin":   {Tenant: acme, Role: rest.TenantAdmin, ExtraTenants: []string{"*"}},
	"auditor":      {Tenant: revocation.SuperTenant, Role: rest.Auditor},
	"acme-auditor": {Tenant: acme, Role: rest.Auditor},
	"two-auditor":  {Tenant: revocation.SuperTenant, Role: rest.Auditor, ExtraTenants: []string{"acme.com"}},
	"wide-auditor": {Tenant: acme, Role: rest.Auditor, ExtraTenants: []string{"*"}},
	"gateway":      {Tenant: revocation.SuperTenant, Role: rest.Gateway, ExtraTenants: []string{"*"}},
	"notifier":     {Tenant: revocation.SuperTenant, Role: rest.Notifier},
}

func (a accounts) Account(r *http.Request) (authn.Account, error) {
	name, _, _ := r.BasicAuth()
	account, ok := a[name]
	account.Username = name
	if !ok {
		return authn.Account{}, &authn.OAuthError{Status: http.StatusUnauthorized, Description: "The user name or the password is wrong."}
	}
	return account, nil
}

// source is the log as a follower sees it.
type source struct{ *ledger.Ledger }

func (s source) Load(ctx context.Context, at func(revocation.Position), revoked func(replica.Record), entity func(catalog.Entity)) error {
	return s.View(ctx, func(ctx context.Context, tx pgx.Tx, p revocation.Position, _ func(func(directory.Stored)) error) error {
		at(p)
		for e, err := range store.ReadAll(ctx, tx) {
			if err != nil {
				return err
			}
			entity(e)
		}
		return nil
	})
}

// gate holds up who revokes, while it is closed.
type gate struct {
	Revoker
	entered chan struct{} // nil while open
	open    chan struct{}
}

func (g *gate) Revoke(ctx context.Context, by revoke.Caller, orders []revoke.Order) ([]revoke.Outcome, error) {
	if g.entered != nil {
		g.entered <- struct{}{}
		<-g.open
	}
	return g.Revoker.Revoke(ctx, by, orders)
}

// gateways is a fleet in which nothing happens by itself.
type gateways struct {
	mu      sync.Mutex
	all     []fleet.Gateway
	changed chan struct{}
	away    error         // of the database
	held    chan struct{} // gets a value when somebody waits
	asked   []revocation.Position
}

// change changes all gateways, and wakes who waits.
func (f *gateways) change(with func(*fleet.Gateway)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.all {
		with(&f.all[i])
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *gateways) Refresh(context.Context) error { return f.away }

func (f *gateways) Gateways() []fleet.Gateway {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.all)
}

func (f *gateways) Wait(ctx context.Context, b fleet.Barrier) (fleet.BarrierResult, error) {
	f.mu.Lock()
	f.asked = append(f.asked, b.Position)
	f.mu.Unlock()
	for began := true; ; began = false {
		f.mu.Lock()
		changed := f.changed
		f.mu.Unlock()
		r := fleet.BarrierResult{Reached: true, Took: 12345 * time.Microsecond}
		for _, g := range f.Gateways() {
			if !b.Select(&g) {
				continue
			}
			c := fleet.Confirmation{Gateway: g, Applied: g.Standing == fleet.Live && g.Applied(b.Position)}
			if c.Applied && !began {
				c.After = 1234567 * time.Nanosecond
			}
			r.Reached = r.Reached && (c.Applied || g.Standing == fleet.Lost)
			r.Gateways = append(r.Gateways, c)
		}
		if r.Reached || ctx.Err() != nil || f.away != nil {
			return r, f.away
		}
		f.held <- struct{}{}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// world is the API over a service of its own: two tenants with an issuer each and an external
// one, two applications of carbon.super and one of acme.com.
type world struct {
	t      testing.TB
	pool   *pgxpool.Pool
	ledger *ledger.Ledger
	gate   *gate
	fleet  *gateways
	api    *API
	server *httptest.Server
}

func newWorld(t testing.TB) *world {
	t.Helper()
	log, reg := slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	w := &world{t: t, pool: pgtest.New(t)}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	w.ledger, err = ledger.New(ledger.Config{Source: iss}, w.pool, reg, log)
	must(err)
	_, err = w.ledger.Start(t.Context(), nil)
	must(err)
	key, err := authn.NewMasterKey(bytes.Repeat([]byte("k"), 32))
	must(err)
	clients, err := authn.New(authn.Config{}, w.pool, []authn.MasterKey{key}, reg, log)
	must(err)
	entities := store.New(store.Config{Issuer: iss, MaxTokenLifetime: time.Hour}, w.pool, w.ledger, clients, log)
	must(entities.EnsureIssuers(t.Context()))
	system := store.Caller{Actor: ledger.Actor{Name: "system"}}
	app := func(id int32, name string, tenant revocation.Tenant) store.Change {
		return store.Change{Op: store.Create, Entity: &catalog.Application{
			Meta: catalog.Meta{ID: id, UUID: fmt.Sprintf("00000000-0000-4000-8000-%012d", id), Tenant: tenant}, Name: name, Owner: "o",
		}}
	}
	super := revocation.SuperTenant
	_, _, err = entities.Apply(t.Context(), system, []store.Change{
		{Op: store.Create, Entity: &catalog.Tenant{Meta: catalog.Meta{ID: acme.ID, Tenant: acme}}},
		{Op: store.Create, Entity: &catalog.KeyManager{Meta: catalog.Meta{Tenant: super}, Name: "idp", Iss: idp, Enabled: true, MaxTokenLifetime: 7200}},
		app(1, "shop", super), app(2, "till", super), app(3, "acme", acme),
	})
	must(err)
	for _, k := range []struct {
		app int32
		key string
		km  string // empty: ours
	}{{1, "key-1", ""}, {2, "key-2", ""}, {1, "ext-1", "idp"}, {3, "acme-1", ""}} {
		made := store.NewKey{Mapping: catalog.KeyMapping{
			Meta: catalog.Meta{Tenant: super}, Application: catalog.Ref{ID: k.app}, ConsumerKey: k.key, KeyType: catalog.Production, KeyManager: k.km,
		}}
		if k.app == 3 {
			made.Mapping.Tenant = acme
		}
		if k.km == "" {
			made.Client = &authn.Registration{AuthMethod: "none"}
		}
		_, _, err := entities.CreateKey(t.Context(), system, made)
		must(err)
	}

	state, err := follow.New(follow.Config{}, source{w.ledger}, reg, log)
	must(err)
	must(state.Load(t.Context()))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- state.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})

	keys, err := token.ParseKeySet(fmt.Appendf(nil, `{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"k","alg":"EdDSA","x":%q}]}`,
		base64.RawURLEncoding.EncodeToString(signer.Public().(ed25519.PublicKey))))
	must(err)
	verifier, err := token.NewVerifier(token.Issuer{Iss: iss, Keys: keys}, token.Issuer{Iss: acmeIss, Keys: keys}, token.Issuer{Iss: idp, Keys: away{}})
	must(err)
	w.gate = &gate{Revoker: revoke.New(revoke.Config{ClockSkew: 2 * time.Second}, w.ledger, state, verifier)}
	w.fleet = &gateways{changed: make(chan struct{}), held: make(chan struct{}, 100)}
	w.api, err = New(Deps{
		Revoker: w.gate, Ledger: w.ledger, Fleet: w.fleet, Accounts: people, Idempotency: rest.NewIdempotencyStore(w.pool, []authn.MasterKey{key}),
	})
	must(err)
	router := chi.NewRouter()
	router.Use(middleware.GetHead)
	w.api.Routes(router)
	w.server = httptest.NewServer(router)
	w.server.Client().Transport.(*http.Transport).ExpectContinueTimeout = time.Minute
	t.Cleanup(w.server.Close)
	return w
}

// away is a key set that cannot be had.
type away struct{}

func (away) Key(context.Context, string, string) (token.Key, error) {
	return token.Key{}, errors.New("no route to host")
}

var signer = ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))

// access makes an access token that lives for ten minutes.
func access(iss, jti string) string { return ending(iss, jti, 600) }

// ending makes one that lives for so many seconds more.
func ending(iss, jti string, in int64) string {
	segment := func(v any) string {
		b, _ := json.Marshal(v)
		return base64.RawURLEncoding.EncodeToString(b)
	}
	claims := map[string]any{"iss": iss, "azp": "key-1", "iat": time.Now().Unix() - 600, "exp": time.Now().Unix() + in}
	if jti != "" {
		claims["jti"] = jti
	}
	input := segment(map[string]string{"alg": "EdDSA", "kid": "k", "typ": "at+jwt"}) + "." + segment(claims)
	return input + "." + base64.RawURLEncoding.EncodeToString(ed25519.Sign(signer, []byte(input)))
}

// response is an answer that has come whole.
type response struct {
	status int
	header http.Header
	body   string
}

// into decodes the answer's body.
func (a response) into(t testing.TB, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), v); err != nil {
		t.Fatalf("body %q: %v", a.body, err)
	}
}

// do sends a request as who, with pairs of names and values as its header.
func (w *world) do(who, method, path, body string, header ...string) response {
	w.t.Helper()
	a, err := w.send(who, method, path, strings.NewReader(body), header...)
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

func (w *world) send(who, method, path string, body io.Reader, header ...string) (response, error) {
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.server.URL+path, body)
	if err != nil {
		return response{}, err
	}
	if who != "" {
		r.SetBasicAuth(who, "")
	}
	if method == http.MethodPost {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	res, err := w.server.Client().Do(r)
	if err != nil {
		return response{}, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return response{res.StatusCode, res.Header, string(b)}, err
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

// revocations and events are how many there are.
func (w *world) revocations() (n int) {
	w.t.Helper()
	if err := w.pool.QueryRow(w.t.Context(), `SELECT count(*) FROM rescind.revocations`).Scan(&n); err != nil {
		w.t.Fatal(err)
	}
	return n
}

// transcript is what was sent and answered, without what differs from run to run.
type transcript struct {
	*world
	out strings.Builder
	ids []string
}

func (r *transcript) do(who, method, path, body string, header ...string) response {
	r.t.Helper()
	a := r.world.do(who, method, path, body, header...)
	fmt.Fprintf(&r.out, "%s %s (%s)\n", method, path, who)
	if body != "" {
		fmt.Fprintf(&r.out, "%s\n", body)
	}
	fmt.Fprintf(&r.out, "--> %d %s\n", a.status, a.header.Get("Content-Type"))
	for _, name := range []string{"Location", "Allow", "Link", "WWW-Authenticate", "Retry-After", "Accept-Encoding"} {
		if value := a.header.Get(name); value != "" {
			fmt.Fprintf(&r.out, "%s: %s\n", name, value)
		}
	}
	if got := a.header.Get("Cache-Control"); got != "no-store" {
		r.t.Errorf("%s %s: Cache-Control %q", method, path, got)
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
	madeID  = regexp.MustCompile(`\b[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\b`)
	seconds = regexp.MustCompile(`("exp"|"not_after"): [0-9]{10}\b`)
	instant = regexp.MustCompile(`"[0-9-]{10}T[0-9:]{8}\.[0-9]{3}Z"`)
	compact = regexp.MustCompile(`eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*`)
	digest  = regexp.MustCompile(`"digest": "[0-9a-f]{64}"`)
	cursor  = regexp.MustCompile(`\bA[A-Za-z0-9_-]{40,}`)
	place   = regexp.MustCompile(`"seq": [0-9]+`)
)

func (r *transcript) golden(name string) {
	r.t.Helper()
	got := madeID.ReplaceAllStringFunc(r.out.String(), func(id string) string {
		for i, known := range r.ids {
			if known == id {
				return fmt.Sprintf("<id %d>", i+1)
			}
		}
		r.ids = append(r.ids, id)
		return fmt.Sprintf("<id %d>", len(r.ids))
	})
	got = seconds.ReplaceAllString(got, "$1: <s>")
	got = instant.ReplaceAllString(got, `"<time>"`)
	got = compact.ReplaceAllString(got, "<jwt>")
	got = digest.ReplaceAllString(got, `"digest": "<sha256>"`)
	got = place.ReplaceAllString(got, `"seq": <n>`)
	got = strings.ReplaceAll(got, string(r.ledger.Seen().Epoch), "<epoch>")
	got = cursor.ReplaceAllString(got, "<cursor>")
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
