package fleetapi

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
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
	gocmp "github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	epoch    = revocation.Epoch("0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3")
	oldEpoch = revocation.Epoch("0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e4")
	instance = "4f4fa3c0-1c8e-4c5b-9d55-0a1e5f0b7c11"
)

var acme = revocation.Tenant{ID: 7, Domain: "acme.com"}

// accounts lets people in by their name alone.
type accounts map[string]authn.Account

var people = accounts{
	"admin":        {Tenant: revocation.SuperTenant, Role: rest.Admin},
	"super-admin":  {Tenant: revocation.SuperTenant, Role: rest.TenantAdmin},
	"acme-admin":   {Tenant: acme, Role: rest.TenantAdmin},
	"wide-admin":   {Tenant: acme, Role: rest.TenantAdmin, ExtraTenants: []string{"*"}},
	"acme-auditor": {Tenant: acme, Role: rest.Auditor},
	"two-auditor":  {Tenant: revocation.SuperTenant, Role: rest.Auditor, ExtraTenants: []string{"acme.com"}},
	"wide-auditor": {Tenant: acme, Role: rest.Auditor, ExtraTenants: []string{"*"}},
	"gateway":      {Tenant: revocation.SuperTenant, Role: rest.Gateway, ExtraTenants: []string{"*"}},
	"gateway-2":    {Tenant: acme, Role: rest.Gateway},
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

// gateways is a fleet of one process in which nothing happens by itself.
type gateways struct {
	mu      sync.Mutex
	all     map[string]fleet.Gateway
	changed chan struct{}
	away    error         // of the database
	held    chan struct{} // gets a value when a report is held, or a barrier waits
	answer  replica.Instructions
	failure error
	reports []replica.Report
}

func newGateways(all ...fleet.Gateway) *gateways {
	f := &gateways{all: make(map[string]fleet.Gateway), changed: make(chan struct{}), held: make(chan struct{}, 100)}
	for _, g := range all {
		f.all[g.ID] = g
	}
	return f
}

// change changes a gateway, and wakes who waits.
func (f *gateways) change(id string, with func(*fleet.Gateway)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g := f.all[id]
	with(&g)
	f.all[id] = g
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *gateways) Report(ctx context.Context, _ authn.Account, _ string, r replica.Report, hold bool) (replica.Instructions, error) {
	f.mu.Lock()
	f.reports = append(f.reports, r)
	f.mu.Unlock()
	switch {
	case f.failure != nil:
		return replica.Instructions{}, f.failure
	case hold && f.answer == replica.Instructions{}:
		f.held <- struct{}{}
		<-ctx.Done()
		return replica.Instructions{}, ctx.Err()
	}
	return f.answer, nil
}

func (f *gateways) Refresh(context.Context) error { return f.away }

func (f *gateways) Gateways() []fleet.Gateway {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.SortedFunc(maps.Values(f.all), func(a, b fleet.Gateway) int { return cmp.Compare(a.ID, b.ID) })
}

func (f *gateways) Gateway(id string) (fleet.Gateway, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g, ok := f.all[id]
	return g, ok
}

func (f *gateways) Forget(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.all, id)
	return f.failure
}

func (f *gateways) SetCanary(_ context.Context, id, url string) error {
	if f.failure == nil {
		f.change(id, func(g *fleet.Gateway) { g.CanaryURL = url })
	}
	return f.failure
}

func (f *gateways) Wait(ctx context.Context, b fleet.Barrier) (fleet.BarrierResult, error) {
	for began := true; ; began = false {
		f.mu.Lock()
		changed := f.changed
		f.mu.Unlock()
		r := fleet.BarrierResult{Reached: true, Took: 12345 * time.Microsecond}
		for _, g := range f.Gateways() {
			if b.Select != nil && !b.Select(&g) {
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

// head is a log that others write.
type head struct{ at revocation.Position }

func (h head) Fresh(context.Context, time.Duration) (revocation.Position, error) {
	if h.at.Epoch == "" {
		return h.at, errors.New("nobody knows")
	}
	return h.at, nil
}

// records is an audit in memory.
type records struct {
	mu  sync.Mutex
	all []ledger.AuditEntry
}

func (r *records) Audit(_ context.Context, e ledger.AuditEntry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, e)
	return nil
}

// some are gateways of two tenants: one that serves all, one that serves acme.com alone though its account
// sees more, one of acme.com, and ones that are no business of acme.com's.
func some() []fleet.Gateway {
	now := time.Now()
	at := func(seq revocation.Seq) replica.Report {
		return replica.Report{
			Instance: instance, Started: 1700000000000, Position: revocation.Position{Epoch: epoch, Seq: seq}, AgeMS: 40, Ready: true,
			Labels: map[string]string{"zone": "secret-zone"}, Version: "secret-version", Revocations: 4711, Entities: 42, Snapshots: 1, Deltas: 2,
			Feeds: []replica.FeedStatus{{Name: "secret-feed", Connected: true, Heard: 1700000000001, Events: 3}}, Error: "secret-error",
		}
	}
	of := func(id, account, tenant string, r replica.Report, sees ...string) fleet.Gateway {
		return fleet.Gateway{
			ID: id, Account: account, Tenant: tenant, Sees: sees, Report: r, ReportedAt: now, FirstSeen: now.Add(-time.Hour), Standing: fleet.Live,
		}
	}
	wide := of("wide-1", "secret-account", "carbon.super", at(95), "*")
	wide.CanaryURL = "https://secret-url.example/canary"
	wide.Canary = &fleet.CanaryResult{Outcome: "refused", At: now, RefusedMS: 12.5, Detail: "secret-canary"}
	wide.Comparison = fleet.Comparison{
		Verdict: fleet.Diverged, At: revocation.Position{Epoch: epoch, Seq: 90}, Time: now, Detail: "secret-detail",
	}
	wide.Report.Digest = &replica.Digest{Position: wide.Comparison.At, Cutoff: 1700000040, Revocations: replica.Sum{1}, Count: 4711, Entities: 42}
	wide.Conflict = now
	only := of("only-1", "secret-account", "carbon.super", at(100), "*")
	only.Report.Tenants = []string{"acme.com"}
	mine := of("acme-1", "acme-gateway", "acme.com", at(100))
	mine.Report.Labels = map[string]string{"zone": "b", "tier": "edge"}
	mine.Report.Version, mine.Report.Error, mine.Report.Feeds, mine.Report.Revocations = "1.2.3", "", nil, 12
	mine.Comparison = fleet.Comparison{Verdict: fleet.Equal, At: revocation.Position{Epoch: epoch, Seq: 99}, Time: now}
	lost := of("acme-2", "acme-gateway", "acme.com", replica.Report{
		Instance: instance, Started: 1700000000000, Position: revocation.Position{Epoch: oldEpoch, Seq: 900}, AgeMS: -1,
	})
	lost.Standing, lost.Stored, lost.ReportedAt = fleet.Lost, true, now.Add(-time.Minute)
	other := of("other-1", "secret-account", "carbon.super", at(100))
	without := of("without-1", "secret-account", "carbon.super", at(100), "*")
	without.Report.Tenants = []string{"other.example"}
	return []fleet.Gateway{wide, only, mine, lost, other, without}
}

type world struct {
	t      testing.TB
	fleet  *gateways
	audit  *records
	api    *API
	server *httptest.Server
}

func newWorld(t testing.TB, cfg Config, all ...fleet.Gateway) *world {
	t.Helper()
	w := &world{t: t, fleet: newGateways(all...), audit: new(records)}
	var err error
	w.api, err = New(cfg, Deps{
		Fleet: w.fleet, State: head{revocation.Position{Epoch: epoch, Seq: 100}}, Accounts: people, Audit: w.audit,
		CheckCanaryURL: func(url string) error {
			if !strings.HasPrefix(url, "https://") {
				return errors.New("must be https")
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	router := chi.NewRouter()
	router.Use(middleware.GetHead)
	w.api.Routes(router)
	w.server = httptest.NewServer(router)
	t.Cleanup(w.server.Close)
	return w
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
	a, err := w.send(w.t.Context(), who, method, path, body, header...)
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

func (w *world) send(ctx context.Context, who, method, path, body string, header ...string) (response, error) {
	r, err := http.NewRequestWithContext(ctx, method, w.server.URL+path, strings.NewReader(body))
	if err != nil {
		return response{}, err
	}
	if who != "" {
		r.SetBasicAuth(who, "")
	}
	if body != "" {
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

// later sends a request, and returns its answer when it comes.
func (w *world) later(who, method, path, body string) <-chan response {
	c := make(chan response, 1)
	go func() {
		a, err := w.send(w.t.Context(), who, method, path, body)
		if err != nil {
			w.t.Error(err)
		}
		c <- a
	}()
	return c
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

// transcript is what was sent and answered, without what differs from run to run.
type transcript struct {
	*world
	out strings.Builder
}

func (r *transcript) do(who, method, path, body string) response {
	r.t.Helper()
	a := r.world.do(who, method, path, body)
	fmt.Fprintf(&r.out, "%s %s (%s)\n", method, path, who)
	if body != "" {
		fmt.Fprintf(&r.out, "%s\n", body)
	}
	fmt.Fprintf(&r.out, "--> %d %s\n", a.status, a.header.Get("Content-Type"))
	for _, name := range []string{"Link", "Retry-After", "Accept"} {
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
	instant = regexp.MustCompile(`"20(?:2[4-9]|[3-9][0-9])-[0-9-]{5}T[0-9:]{8}\.[0-9]{3}Z"`)
	age     = regexp.MustCompile(`"age_of_report_ms": [0-9]+`)
	after   = regexp.MustCompile(`"after_ms": [0-9.]+`)
	cursor  = regexp.MustCompile(`\bA[A-Za-z0-9_-]{14,}`)
)

func (r *transcript) golden(name string) {
	r.t.Helper()
	got := instant.ReplaceAllString(r.out.String(), `"<time>"`)
	got = age.ReplaceAllString(got, `"age_of_report_ms": <ms>`)
	got = after.ReplaceAllString(got, `"after_ms": <ms>`)
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
	if diff := gocmp.Diff(string(want), got); diff != "" {
		r.t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}
