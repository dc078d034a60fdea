package snapshotapi

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/follow"
)

const (
	epoch  revocation.Epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	epoch2 revocation.Epoch = "9f1c2d3e-5d0e-4a2f-9a61-6c1f0a7f9d10"
	iss                     = "https://km.example.com"
)

var pizza = revocation.Tenant{ID: 7, Domain: "pizza.example"}

// fakeFollower is a log in memory and its replica.
type fakeFollower struct {
	t       testing.TB
	replica *replica.State

	mu      sync.Mutex
	epoch   revocation.Epoch
	frames  []follow.Frame // of the epoch, from the first seq on
	gone    revocation.Seq // events up to it are no longer there
	changed chan struct{}
	stale   error // what Fresh and Frames fail with
	held    bool  // there are no frames to be had yet
}

func newFakeFollower(t testing.TB) *fakeFollower {
	f := &fakeFollower{t: t, replica: replica.NewState(replica.StateConfig{Records: true}), epoch: epoch, changed: make(chan struct{})}
	f.load(revocation.Position{Epoch: epoch}, nil)
	return f
}

func (f *fakeFollower) load(at revocation.Position, fill func(*replica.Loader)) {
	f.t.Helper()
	err := f.replica.Load(at, func(l *replica.Loader) error {
		if fill != nil {
			fill(l)
		}
		return nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
}

// restart begins a new epoch after seq.
func (f *fakeFollower) restart(at revocation.Position) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.load(at, nil)
	f.epoch, f.gone = at.Epoch, at.Seq
	f.frames = make([]follow.Frame, at.Seq)
	close(f.changed)
	f.changed = make(chan struct{})
}

// revoke adds the revocation of a token, with padding bytes of reason.
func (f *fakeFollower) revoke(tenant revocation.Tenant, padding int) revocation.Position {
	f.t.Helper()
	f.mu.Lock()
	n := len(f.frames) + 1
	f.mu.Unlock()
	e, err := revocation.NewEvent(revocation.Revocation{
		ID: fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012x", n), Tenant: tenant, Exp: time.Now().Add(time.Hour).Unix(),
		Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: fmt.Sprintf("at-%d", n)},
		Reason: string(bytes.Repeat([]byte{'x'}, padding)),
	})
	if err != nil {
		f.t.Fatal(err)
	}
	return f.append(e)
}

// tenant adds a tenant to the state.
func (f *fakeFollower) tenant(tenants ...revocation.Tenant) {
	f.t.Helper()
	f.load(f.replica.At(), func(l *replica.Loader) {
		f.replica.View(func(v *replica.View) {
			for _, t := range v.Tenants() {
				l.Entity(t)
			}
		})
		for _, t := range tenants {
			l.Entity(&catalog.Tenant{Meta: catalog.Meta{ID: t.ID, UUID: fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012d", t.ID), Tenant: t}})
		}
	})
}

func (f *fakeFollower) change(c catalog.Change) revocation.Position {
	f.t.Helper()
	e, err := catalog.NewEvent(c)
	if err != nil {
		f.t.Fatal(err)
	}
	return f.append(e)
}

func (f *fakeFollower) append(e revocation.Event) revocation.Position {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	e.Position = revocation.Position{Epoch: f.epoch, Seq: revocation.Seq(len(f.frames) + 1)}
	e.Source, e.Time = iss, time.Now().UTC().Truncate(time.Millisecond)
	if err := f.replica.Apply(e); err != nil {
		f.t.Fatal(err)
	}
	body, err := e.MarshalJSON()
	if err != nil {
		f.t.Fatal(err)
	}
	f.frames = append(f.frames, follow.Frame{
		Position: e.Position, Tenant: e.Tenant.Domain, JSON: body,
		SSE: fmt.Appendf(nil, "id: %s\nevent: %s\ndata: %s\n\n", e.Position, e.Type, body),
	})
	close(f.changed)
	f.changed = make(chan struct{})
	return e.Position
}

func (f *fakeFollower) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeFollower) Replica() *replica.State { return f.replica }

func (f *fakeFollower) Fresh(ctx context.Context, _ time.Duration) (revocation.Position, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.replica.At(), f.stale
}

func (f *fakeFollower) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *fakeFollower) Frames(ctx context.Context, after revocation.Position, limit int) ([]follow.Frame, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	head := f.replica.At()
	switch {
	case f.stale != nil:
		return nil, f.stale
	case after.Epoch != head.Epoch || after.Seq < f.gone:
		return nil, follow.ErrGone
	case after.Seq > head.Seq:
		return nil, follow.ErrAhead
	case f.held:
		return nil, nil
	}
	return f.frames[after.Seq:min(int(after.Seq)+limit, len(f.frames))], ctx.Err()
}

// size is of what a test makes: much if it may take long, as RESCIND_HEAVY says, else some.
func size(some, much int) int {
	if os.Getenv("RESCIND_HEAVY") != "" {
		return much
	}
	return some
}

// fakeAccounts knows accounts by their user name.
type fakeAccounts map[string]authn.Account

func (f fakeAccounts) Account(r *http.Request) (authn.Account, error) {
	user, _, _ := r.BasicAuth()
	a, ok := f[user]
	if !ok {
		return a, &authn.OAuthError{Status: http.StatusUnauthorized, Code: authn.InvalidClient, Description: "The user name or the password is wrong."}
	}
	a.Username = user
	return a, nil
}

var accounts = fakeAccounts{
	"gateway":     {Tenant: revocation.SuperTenant, Role: "gateway"},
	"gateway-all": {Tenant: revocation.SuperTenant, Role: "gateway", ExtraTenants: []string{"*"}},
	"gateway-two": {Tenant: pizza, Role: "gateway", ExtraTenants: []string{"carbon.super"}},
	"pizza-admin": {Tenant: pizza, Role: "tenant_admin"},
	"auditor":     {Tenant: pizza, Role: "auditor"},
	"admin":       {Tenant: revocation.SuperTenant, Role: "admin"},
	"notifier":    {Tenant: revocation.SuperTenant, Role: "notifier"},
}

// served is an API on a real listener.
type served struct {
	t        testing.TB
	api      *API
	follower *fakeFollower
	url      string
	registry *prometheus.Registry
}

func serve(t testing.TB, cfg Config, change ...func(*API)) *served {
	t.Helper()
	f := newFakeFollower(t)
	s := serveFollower(t, cfg, f, change...)
	s.follower = f
	return s
}

func serveFollower(t testing.TB, cfg Config, f Follower, change ...func(*API)) *served {
	t.Helper()
	reg := prometheus.NewRegistry()
	a, err := New(cfg, Deps{Follower: f, Accounts: accounts, Registerer: reg, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(a)
	}
	r := chi.NewRouter()
	r.Use(middleware.GetHead)
	a.Routes(r)
	server := httptest.NewUnstartedServer(r)
	server.Config.ReadTimeout, server.Config.WriteTimeout = 15*time.Second, 30*time.Second
	server.Start()
	t.Cleanup(func() {
		a.Close()
		server.CloseClientConnections()
		server.Close()
	})
	return &served{t: t, api: a, url: server.URL, registry: reg}
}

// request is a GET by the account "admin", changed by header, in pairs; "user" names another
// account.
func (s *served) request(path string, header ...string) *http.Request {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, s.url+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	user := "admin"
	for i := 0; i < len(header); i += 2 {
		if header[i] == "user" {
			user = header[i+1]
			continue
		}
		req.Header.Set(header[i], header[i+1])
	}
	req.SetBasicAuth(user, "pw")
	return req
}

// do sends a request without the client's own wish for gzip.
func (s *served) do(req *http.Request) *http.Response {
	s.t.Helper()
	resp, err := plainClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { resp.Body.Close() })
	return resp
}

var plainClient = &http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 10}}

// metric is the sum of a metric over its labels.
func (s *served) metric(name string) float64 {
	s.t.Helper()
	families, err := s.registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			sum := 0.0
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
			return sum
		}
	}
	s.t.Fatalf("there is no metric %s", name)
	return 0
}

// await waits for what must become true.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	bound := time.After(20 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-bound:
			t.Fatalf("not within 20s: %s", what)
		}
	}
}
