package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// looks is w for commands that only look at the log, which take no master key.
func (w commandWorld) looks() commandWorld {
	i := slices.Index(w.flags, "--master-key-file")
	w.flags = slices.Delete(slices.Clone(w.flags), i, i+2)
	return w
}

// fleetWorld is a service process as far as gateways go: they report to it.
type fleetWorld struct {
	commandWorld
	fleet  *fleet.Fleet
	ledger *ledger.Ledger
}

func newFleetWorld(t *testing.T, w commandWorld) *fleetWorld {
	t.Helper()
	pool, reg, log := pgtest.Pool(t, w.database), prometheus.NewRegistry(), slog.New(slog.DiscardHandler)
	l, err := ledger.New(ledger.Config{Source: "https://km.example.com"}, pool, reg, log)
	if err != nil {
		t.Fatal(err)
	}
	f, err := fleet.New(fleet.Config{}, pool, nil, reg, log)
	if err == nil {
		err = f.Load(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := f.Run(ctx); err != nil {
			t.Errorf("fleet: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
	return &fleetWorld{w, f, l}
}

// load makes a state of what Postgres has, without the token of this jti.
func (w *fleetWorld) load(without string) (*replica.State, error) {
	s := replica.NewState(replica.StateConfig{})
	err := w.ledger.View(w.t.Context(), func(ctx context.Context, tx pgx.Tx, at revocation.Position, each func(func(directory.Stored)) error) error {
		return s.Load(at, func(l *replica.Loader) error {
			for e, err := range store.ReadAll(ctx, tx) {
				if err != nil {
					return err
				}
				l.Entity(e)
			}
			return each(func(s directory.Stored) {
				if s.Target.ID != without {
					l.Revocation(replica.Record{Target: s.Target, Tenant: s.Tenant, Exp: s.Exp, NotAfter: s.NotAfter})
				}
			})
		})
	})
	return s, err
}

// gateway reports what it has until leave is called, or the test ends.
type gateway struct {
	w     *fleetWorld
	id    string
	deaf  bool   // it applies nothing
	lacks string // the jti of a token that it does not have, until it loads again
	stop  func()
}

// start returns once the gateway is known.
func (g gateway) start() *gateway {
	g.w.t.Helper()
	state, err := g.w.load(g.lacks)
	if err != nil {
		g.w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	report := replica.Report{Instance: uuid.NewString(), Started: time.Now().UnixMilli(), Labels: map[string]string{"site": g.id[:1]}, Version: "v1.2.3", Ready: true}
	tell := func(ctx context.Context, hold bool) (replica.Instructions, error) {
		report.Position = state.At()
		return g.w.fleet.Report(ctx, authn.Account{Username: "gw", Tenant: revocation.SuperTenant, Role: "gateway", ExtraTenants: []string{"*"}}, g.id, report, hold)
	}
	if _, err := tell(ctx, false); err != nil {
		g.w.t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			in, err := tell(ctx, true)
			if err == nil && in.Load != "" && g.lacks != "" {
				g.lacks = ""
				state, err = g.w.load("")
			}
			if err == nil && !g.deaf {
				var events []revocation.Event
				events, err = g.w.ledger.After(ctx, state.At().Seq, 1000)
				for _, e := range events {
					if err == nil {
						err = state.Apply(e)
					}
				}
			}
			if err == nil && in.Digest != nil && state.At().Seq >= in.Digest.After.Seq {
				var d replica.Digest
				d, err = state.Digest(ctx, in.Digest.Cutoff, in.Digest.After)
				report.Digest = &d
			}
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				g.w.t.Errorf("gateway %s: %v", g.id, err)
				return
			}
		}
	})
	g.stop = sync.OnceFunc(func() { cancel(); running.Wait() })
	g.w.t.Cleanup(g.stop)
	return &g
}

// leave stops in good order.
func (g *gateway) leave() {
	g.w.t.Helper()
	g.stop()
	all := g.w.fleet.Gateways()
	i := slices.IndexFunc(all, func(known fleet.Gateway) bool { return known.ID == g.id })
	report := all[i].Report
	report.Leaving = true
	if _, err := g.w.fleet.Report(g.w.t.Context(), authn.Account{Username: "gw", Tenant: revocation.SuperTenant, Role: "gateway", ExtraTenants: []string{"*"}}, g.id, report, false); err != nil {
		g.w.t.Fatal(err)
	}
}

func decode[T any](t *testing.T, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return v
}

// The commands that look at gateways, with gateways that report to a process of their own.
func TestFleetCommands(t *testing.T) {
	t.Parallel()
	w := newCommandWorld(t)
	w.ensureIssuers()
	look := w.looks()
	if out := look.expect(0, "No service process answers", "", "gateways"); strings.Count(out, "\n") != 2 {
		t.Error(out)
	}
	const unserved = "no service is running, or none answers: whether gateways have it cannot be told\n"
	if out := w.expect(1, "token  j0", unserved, "revoke", "--jti", "j0", "--wait", "5s"); strings.Contains(out, "GATEWAY") || strings.Contains(out, "No gateway") {
		t.Error(out)
	}
	world := newFleetWorld(t, w)
	if out := look.expect(0, "ID  STANDING", "", "gateways"); strings.Count(out, "\n") != 1 {
		t.Error(out)
	}
	if out := w.expect(0, "No gateway that serves carbon.super is known", "", "revoke", "--jti", "j0", "--wait", "5s"); strings.Contains(out, "GATEWAY") {
		t.Error(out)
	}
	gateway{w: world, id: "east"}.start()
	gateway{w: world, id: "west"}.start()

	t.Log("all apply what is revoked")
	out := w.expect(0, "token  j1", "", "revoke", "--jti", "j1", "--wait", "60s")
	if !strings.Contains(out, "\neast     live      after ") || !strings.Contains(out, " ms\nwest     live      after ") {
		t.Error(out)
	}
	r := decode[revokedJSON](t, w.expect(0, "", "", "revoke", "--jti", "j2", "--wait", "60s", "--json"))
	if c := r.Convergence; c == nil || !c.Reached || c.Live != 2 || c.Applied != 2 || c.Lost != 0 || len(c.Gateways) != 2 || c.Gateways[0].Seq < r.Seq || *c.Gateways[0].AfterMS <= 0 {
		t.Errorf("%+v, %+v", r, c)
	}
	if out := w.expect(0, "already revoked", "", "revoke", "--jti", "j2", "--wait", "60s"); strings.Count(out, "live") != 2 || strings.Contains(out, "not yet") {
		t.Error(out)
	}
	all := decode[fleetJSON](t, look.expect(0, "", "", "gateways", "--json", "--label", "site=w"))
	if len(all.Gateways) != 1 || all.Gateways[0].ID != "west" || all.Gateways[0].Standing != fleet.Live || all.Gateways[0].Behind == nil || *all.Gateways[0].Behind != 0 ||
		all.Gateways[0].Account != "gw" || all.Head != all.Gateways[0].Seq || all.Gateways[0].AgeMS == nil {
		t.Errorf("%+v", all)
	}
	look.expect(0, "east  live", "", "gateways")
	if out := look.expect(0, "ID  STANDING", "", "gateways", "--lost"); strings.Count(out, "\n") != 1 {
		t.Error(out)
	}
	v := decode[verifiedJSON](t, look.expect(0, "", "", "verify", "--json"))
	if !v.Equal || v.Etcd != nil || len(v.Gateways) != 2 || *v.Gateways[0].Digest != v.Postgres || v.Postgres.Count != 3 || v.Postgres.Entities == 0 {
		t.Errorf("%+v", v)
	}

	t.Log("one applies nothing")
	deaf := gateway{w: world, id: "deaf", deaf: true}.start()
	out = w.expect(1, "token  j3", "rescind revoke: the revocation is committed and will arrive; not confirmed by: deaf\n", "revoke", "--jti", "j3", "--wait", "2s")
	if !strings.Contains(out, "deaf     live      not yet: at seq ") || !strings.Contains(out, "east     live      after ") {
		t.Error(out)
	}
	look.expect(1, "did not answer in time", "not compared, although it reports: deaf.", "verify", "--timeout", "2s")
	deaf.leave()
	look.expect(0, "gateway west", "", "verify")

	t.Log("one lacks something")
	lacking := gateway{w: world, id: "lacking", lacks: "j1"}.start()
	if out := look.expect(1, "has 3 of the log's 4 revocations\n", "diverged: lacking.", "verify", "--tell=false"); !strings.Contains(out, "diverged") || strings.Count(out, "equal") != 2 {
		t.Error(out)
	}
	look.expect(1, "it was asked to load a snapshot", "diverged, and asked to load a snapshot: lacking.", "verify")
	look.expect(0, "gateway lacking", "", "verify")

	t.Log("what is kept of them is changed")
	const url = "https://gw.example.com/rescind-canary/v1/ping"
	look.expect(0, "", "", "gateways canary east "+url)
	if out := look.expect(0, "not called yet", "", "gateways"); strings.Count(out, "not called yet") != 1 {
		t.Error(out)
	}
	look.expect(0, "", "", "gateways canary east none")
	look.expect(1, "", "https", "gateways canary east http://gw.example.com/x")
	look.expect(1, "", "there is no such gateway with the id nobody: see rescind gateways", "gateways canary nobody "+url)
	look.expect(1, "", "there is no such gateway with the id nobody: see rescind gateways", "gateways forget nobody")
	lacking.stop()
	look.expect(0, "", "", "gateways forget lacking")
	if out := look.expect(0, "", "", "gateways"); strings.Contains(out, "lacking") {
		t.Error(out)
	}
	rows, err := pgtest.Pool(t, w.database).Query(t.Context(),
		`SELECT action || ' ' || subject FROM rescind.audit WHERE action LIKE '%gateway%' AND actor LIKE 'operator:%' ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if diff := cmp.Diff([]string{"set_gateway_canary east", "set_gateway_canary east", "forget_gateway lacking"}, got); err != nil || diff != "" {
		t.Errorf("%v, audit (-want +got):\n%s", err, diff)
	}
}

func TestFleetCommandsUsage(t *testing.T) {
	t.Parallel()
	w := newOfflineWorld(t)
	look := w.looks()
	for _, tt := range []struct {
		w      commandWorld
		words  string
		stderr string
		flags  []string
	}{
		{look, "gateways forget", "forget takes the id of one gateway", nil},
		{look, "gateways canary a", "canary takes the id of one gateway, and a URL or none", nil},
		{look, "gateways list", `"list" is neither forget ID nor canary ID URL|none`, nil},
		{look, "gateways", "it must be name=value", []string{"--label", "site"}},
		{look, "gateways forget a", "--lost is not for forget", []string{"--lost"}},
		{look, "verify", "takes no argument", []string{"more"}},
		{look, "verify", "--timeout is 1ms: it must be 1s to 5m", []string{"--timeout", "1ms"}},
		{w, "revoke", "--wait is 0s: it must be above 0s, up to 1m0s", []string{"--jti", "j", "--wait", "0s"}},
		{w, "revoke", "--wait is 1m1s: it must be above 0s, up to 1m0s", []string{"--jti", "j", "--wait", "61s"}},
		{w, "revoke", "--wait and --dry-run are both given", []string{"--jti", "j", "--wait", "1s", "--dry-run"}},
	} {
		code, stdout, stderr := tt.w.run(tt.words, tt.flags...)
		if code != exitUsage || stdout != "" || !strings.Contains(stderr, tt.stderr) {
			t.Errorf("%s %q: status %d\nstdout: %s\nstderr: %s", tt.words, tt.flags, code, stdout, stderr)
		}
	}
}

func TestPrintGateways(t *testing.T) {
	t.Parallel()
	head := revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: 90}
	all := []fleet.Gateway{{
		ID: "a", Account: "gw", Standing: fleet.Live, ReportedAt: at.Add(-1200 * time.Millisecond), CanaryURL: "https://a/x",
		Canary:     &fleet.CanaryResult{Outcome: "refused", RefusedMS: 12.3, At: at.Add(-3 * time.Minute)},
		Comparison: fleet.Comparison{Verdict: fleet.Equal},
		Report: replica.Report{Position: head, AgeMS: 340, Version: "v1\x1b[2J", Feeds: []replica.FeedStatus{
			{Name: "sse", Connected: true}, {Name: "amqp"},
		}},
	}, {
		ID: "b", Account: "gw", Standing: fleet.Lost, ReportedAt: at.Add(-72 * time.Hour), Conflict: at.Add(-time.Minute),
		Comparison: fleet.Comparison{Verdict: fleet.Diverged, Detail: "It has 1 of 2 revocations."},
		Report:     replica.Report{Position: revocation.Position{Epoch: head.Epoch, Seq: 80}, AgeMS: -1, Error: "no disk"},
	}, {
		ID: "c", Account: "gw", Standing: fleet.Live, ReportedAt: at, CanaryURL: "https://c/x",
		Report: replica.Report{Position: revocation.Position{Epoch: "5e1f4a90-0c3b-4a77-8f0e-2b9d8c7a6e51", Seq: 7}},
	}, {
		ID: "d", Account: "gw", Standing: fleet.Live, ReportedAt: at, Report: replica.Report{AgeMS: -1}, CanaryURL: "https://d/x",
		Canary: &fleet.CanaryResult{Outcome: "unreachable", At: at.Add(-2*time.Hour - 30*time.Second)},
	}, {
		ID: "e", Account: "gw", Standing: fleet.Lost, ReportedAt: at.Add(-2 * time.Hour), Report: replica.Report{Position: head, AgeMS: 90e3},
	}}
	print := func(served bool) string {
		t.Helper()
		var b bytes.Buffer
		if err := printGateways(&b, all, head, at, served, false); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	want := `ID  STANDING  SEQ  BEHIND         AGE      REPORTED    VERDICT   CANARY                       FEEDS                VERSION  ACCOUNT
a   live      90   0              340ms    1.2s ago    equal     refused after 12 ms, 3m ago  sse, amqp (cut off)  v1�[2J   gw
b   lost      80   10             -        3 days ago  diverged  -                            -                    -        gw
c   live      7    another epoch  0s       0s ago      unknown   not called yet               -                    -        gw
d   live      0    -              -        0s ago      unknown   unreachable, 2h0m30s ago     -                    -        gw
e   lost      90   0              2h1m30s  2h ago      unknown   -                            -                    -        gw
b is lost: it last reported 3 days ago, and confirms nothing. If it is gone for good: rescind gateways forget b
b has diverged from the log: It has 1 of 2 revocations. To compare it again: rescind verify
b is the id of two processes: the other one last reported 1m ago. Each needs an id of its own
b says: no disk
e is lost: it last reported 2h ago, and confirms nothing. If it is gone for good: rescind gateways forget e
`
	if diff := cmp.Diff(want, print(true)); diff != "" {
		t.Error(diff)
	}
	if got := print(false); !strings.Contains(got, "\nNo service process answers") || strings.Contains(got, "forget") || !strings.Contains(got, "b says: no disk") {
		t.Error(got)
	}
}
