package verify_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/replica/etcdfeed"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/stacktest"
	"github.com/rescindhq/rescind/internal/verify"
)

const (
	iss = "https://km.example.com"
	// patient is for what has to answer: a test that waits so long has failed.
	patient = 30 * time.Second
)

var otherTenant = revocation.Tenant{ID: 7, Domain: "b.example"}

// world is a log in Postgres, and this process's state of it.
type world struct {
	*testing.T
	ledger *ledger.Ledger
	state  *replica.State
	exp    int64

	mu sync.Mutex // of those who apply events
}

func newWorld(t *testing.T) *world {
	t.Helper()
	pool := pgtest.New(t)
	if _, err := pool.Exec(t.Context(), `INSERT INTO rescind.tenants (id, domain) VALUES ($1, $2)`, otherTenant.ID, otherTenant.Domain); err != nil {
		t.Fatal(err)
	}
	l, err := ledger.New(ledger.Config{Source: iss}, pool, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, ledger: l, exp: time.Now().Add(24 * time.Hour).Unix()}
	w.revoke(revocation.SuperTenant, "a", "b", "c")
	w.revoke(otherTenant, "d", "e")
	w.state = w.load(replica.StateConfig{Records: true, History: 100}, func(*replica.Loader, *replica.Record) bool { return true })
	return w
}

func (w *world) revoke(tenant revocation.Tenant, jtis ...string) {
	w.Helper()
	var requests []ledger.Request
	for _, jti := range jtis {
		requests = append(requests, ledger.Request{
			Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: jti}, Tenant: tenant, Exp: w.exp, Action: "revoke_token", Actor: ledger.Actor{Name: "system"},
		})
	}
	if _, err := w.ledger.RevokeAll(w.Context(), requests); err != nil {
		w.Fatal(err)
	}
}

// scope is an entity of the catalog, in a version.
func scope(timestamp int64) *catalog.Scope {
	return &catalog.Scope{Meta: catalog.Meta{ID: 1, UUID: "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Tenant: revocation.SuperTenant, Timestamp: timestamp}, Name: "s"}
}

// load makes a state of what Postgres has, with one entity, as keep changes it.
func (w *world) load(cfg replica.StateConfig, keep func(*replica.Loader, *replica.Record) bool) *replica.State {
	w.Helper()
	s := replica.NewState(cfg)
	err := w.ledger.View(w.Context(), func(_ context.Context, _ pgx.Tx, at revocation.Position, each func(func(directory.Stored)) error) error {
		return s.Load(at, func(l *replica.Loader) error {
			if keep(l, nil) {
				l.Entity(scope(1))
			}
			return each(func(s directory.Stored) {
				rec := replica.Record{Target: s.Target, Tenant: s.Tenant, Exp: s.Exp, NotAfter: s.NotAfter, Signature: s.Signature}
				if keep(l, &rec) {
					l.Revocation(rec)
				}
			})
		})
	})
	if err != nil {
		w.Fatal(err)
	}
	return s
}

// apply makes up to n events part of a state.
func (w *world) apply(s *replica.State, n int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	events, err := w.ledger.After(w.Context(), s.At().Seq, n)
	for _, e := range events {
		if err == nil {
			err = s.Apply(e)
		}
	}
	return err
}

// Fresh implements [verify.Log].
func (w *world) Fresh(context.Context, time.Duration) (revocation.Position, error) {
	err := w.apply(w.state, 1000)
	return w.state.At(), err
}

func (w *world) Replica() *replica.State { return w.state }

// gateways is a fleet, each gateway of which answers at once with what its state is.
type gateways struct {
	w       *world
	mu      sync.Mutex
	all     []fleet.Gateway
	states  map[string]*replica.State
	told    map[string]func(asked int, d *replica.Digest) bool // changes the answer, false: there is none
	asked   []replica.DigestRequest
	loads   []string
	changed chan struct{}
	asking  func() // called before the first question is answered
}

func newGateways(w *world) *gateways {
	return &gateways{
		w: w, states: make(map[string]*replica.State), told: make(map[string]func(int, *replica.Digest) bool),
		changed: make(chan struct{}), asking: func() {},
	}
}

// add adds a live gateway that sees all.
func (f *gateways) add(id string, s *replica.State) *fleet.Gateway {
	f.all = append(f.all, fleet.Gateway{
		ID: id, Tenant: revocation.SuperTenant.Domain, Sees: []string{"*"}, Standing: fleet.Live, ReportedAt: time.Now(),
		Report: replica.Report{Position: s.At()},
	})
	f.states[id] = s
	return &f.all[len(f.all)-1]
}

func (f *gateways) Refresh(context.Context) error { return nil }

func (f *gateways) Gateways() []fleet.Gateway {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.SortedFunc(slices.Values(f.all), func(a, b fleet.Gateway) int { return strings.Compare(a.ID, b.ID) })
}

func (f *gateways) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

func (f *gateways) AskDigests(ctx context.Context, r replica.DigestRequest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, r)
	if len(f.asked) == 1 {
		f.asking()
	}
	for i := range f.all {
		g := &f.all[i]
		if g.Standing == fleet.Lost {
			continue
		}
		d, err := f.states[g.ID].Digest(ctx, r.Cutoff, r.After)
		if err != nil {
			return err
		}
		if change := f.told[g.ID]; change == nil || change(len(f.asked), &d) {
			g.Report.Digest, g.Report.Position = &d, d.Position
		}
	}
	close(f.changed)
	f.changed = make(chan struct{})
	return nil
}

func (f *gateways) AskLoad(_ context.Context, ids []string) error {
	f.loads = append(f.loads, ids...)
	return nil
}

func everything(*replica.Loader, *replica.Record) bool { return true }

// without is for load.
func without(jti string) func(*replica.Loader, *replica.Record) bool {
	return func(_ *replica.Loader, rec *replica.Record) bool { return rec == nil || rec.Target.ID != jti }
}

func TestGatewaysAreCompared(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	f := newGateways(w)
	head := w.state.At()
	f.add("equal", w.load(replica.StateConfig{}, everything))
	f.add("equal-partly", w.load(replica.StateConfig{}, func(l *replica.Loader, rec *replica.Record) bool {
		l.RevocationsOnly()
		return rec != nil
	})).Report.RevocationsOnly = true
	bound := f.add("equal-tenant", w.load(replica.StateConfig{}, func(l *replica.Loader, rec *replica.Record) bool {
		l.Tenants([]string{otherTenant.Domain})
		return rec != nil && rec.Tenant == otherTenant
	}))
	bound.Tenant, bound.Sees, bound.Report.Tenants = otherTenant.Domain, nil, []string{otherTenant.Domain}
	f.add("equal-the-second-time", w.load(replica.StateConfig{}, everything))
	f.told["equal-the-second-time"] = func(asked int, d *replica.Digest) bool {
		d.Count += max(0, 2-asked)
		return true
	}

	f.add("diverged-lacks", w.load(replica.StateConfig{}, without("d")))
	f.add("diverged-more", w.load(replica.StateConfig{}, func(l *replica.Loader, rec *replica.Record) bool {
		l.Revocation(replica.Record{Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "x"}, Tenant: otherTenant, Exp: w.exp})
		return true
	}))
	f.add("diverged-other-end", w.load(replica.StateConfig{}, func(_ *replica.Loader, rec *replica.Record) bool {
		if rec != nil && rec.Target.ID == "a" {
			rec.Exp--
		}
		return true
	}))
	f.add("diverged-version", w.load(replica.StateConfig{}, func(l *replica.Loader, rec *replica.Record) bool {
		if rec == nil {
			l.Entity(scope(2))
		}
		return rec != nil
	}))

	// What these have told is no answer, although it would be right, or wrong.
	now := time.Now()
	minute := now.Truncate(time.Minute)
	silent := func(int, *replica.Digest) bool { return false }
	old, err := w.load(replica.StateConfig{}, everything).Digest(t.Context(), minute.Unix(), head)
	if err != nil {
		t.Fatal(err)
	}
	f.add("silent", w.load(replica.StateConfig{}, without("a"))).Report.Digest = &old
	f.told["silent"] = silent
	f.add("silent-nothing-counts", w.load(replica.StateConfig{}, without("a"))).Report.Digest = &replica.Digest{Position: head, Cutoff: minute.Add(100 * time.Hour).Unix()}
	f.told["silent-nothing-counts"] = silent
	f.add("differed-once", w.load(replica.StateConfig{}, without("a")))
	f.told["differed-once"] = func(asked int, _ *replica.Digest) bool { return asked == 1 }
	f.add("ahead", w.load(replica.StateConfig{}, everything))
	f.told["ahead"] = func(_ int, d *replica.Digest) bool { d.Seq += 1000; return true }
	f.add("lost", w.load(replica.StateConfig{}, without("a"))).Standing = fleet.Lost

	report, err := verify.Run(t.Context(), w, nil, f, verify.Options{Now: now, Timeout: time.Second, Tell: true})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]struct {
		verdict fleet.Verdict
		detail  string // a part of it
	}{
		"equal":                 {fleet.Equal, ""},
		"equal-partly":          {fleet.Equal, ""},
		"equal-tenant":          {fleet.Equal, ""},
		"equal-the-second-time": {fleet.Equal, ""},
		"diverged-lacks":        {fleet.Diverged, "has 4 of the log's 5 revocations"},
		"diverged-more":         {fleet.Diverged, "has 6 revocations, and the log 5"},
		"diverged-other-end":    {fleet.Diverged, "has 5 revocations as the log does, but not the same"},
		"diverged-version":      {fleet.Diverged, "has 1 entities as the log does, but not the same versions"},
		"silent":                {fleet.Unknown, "did not answer in time"},
		"silent-nothing-counts": {fleet.Unknown, "did not answer in time"},
		"differed-once":         {fleet.Unknown, "differed once, and could not be compared a second time: has 4 of the log's 5"},
		"ahead":                 {fleet.Unknown, "which Postgres has not come to"},
		"lost":                  {fleet.Unknown, "is lost: it has not reported since"},
	}
	var diverged []string
	for _, m := range report.Gateways {
		w, ok := want[m.ID]
		if !ok || m.Verdict != w.verdict || !strings.Contains(m.Detail, w.detail) || w.detail == "" && m.Detail != "" {
			t.Errorf("%s: %s, %q; want %s, %q", m.ID, m.Verdict, m.Detail, w.verdict, w.detail)
		}
		if m.Verdict == fleet.Diverged {
			diverged = append(diverged, m.ID)
		}
		if m.Told != (m.Verdict == fleet.Diverged) {
			t.Errorf("%s: told %t", m.ID, m.Told)
		}
		if m.Verdict == fleet.Equal && m.Digest != m.Want {
			t.Errorf("%s is equal with other digests: %+v", m.ID, m)
		}
		delete(want, m.ID)
	}
	if len(want) > 0 {
		t.Errorf("nothing is said of %v", want)
	}
	if diff := cmp.Diff(diverged, f.loads); diff != "" {
		t.Errorf("asked to load (-diverged +asked):\n%s", diff)
	}
	first := minute.Add(time.Minute).Unix()
	if diff := cmp.Diff([]replica.DigestRequest{{Cutoff: first, After: head}, {Cutoff: first + 60, After: head}}, f.asked); diff != "" {
		t.Errorf("questions (-want +got):\n%s", diff)
	}
	if p := report.Postgres; p.Position != head || p.Count != 5 || p.Entities != 1 || report.Equal() {
		t.Errorf("%t, Postgres is %+v", report.Equal(), p)
	}
}

// While the log goes on each gateway is compared where it is; and what is asked again is asked with a
// cutoff that is new.
func TestTheLogGoesOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	f := newGateways(w)
	for _, id := range []string{"quick", "slow"} {
		f.add(id, w.load(replica.StateConfig{}, everything))
	}
	f.add("wrong", w.load(replica.StateConfig{}, without("b")))
	f.asking = func() {
		w.revoke(otherTenant, "f", "g", "h", "i")
		for id, n := range map[string]int{"quick": 4, "slow": 1, "wrong": 2} {
			if err := w.apply(f.states[id], n); err != nil {
				t.Error(err)
			}
		}
		if err := w.apply(w.state, 3); err != nil { // quick is ahead of it
			t.Error(err)
		}
		go func() {
			if err := w.apply(w.state, 10); err != nil {
				t.Error(err)
			}
		}()
	}
	now := time.Now()
	report, err := verify.Run(t.Context(), w, nil, f, verify.Options{Now: now, Timeout: patient})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range report.Gateways {
		got = append(got, fmt.Sprint(m.ID, " ", m.Verdict))
	}
	if diff := cmp.Diff([]string{"quick equal", "slow equal", "wrong diverged"}, got); diff != "" {
		t.Errorf("%s\n%+v", diff, report.Gateways)
	}
	if quick, slow := report.Gateways[0].Digest, report.Gateways[1].Digest; quick.Seq-slow.Seq != 3 || quick.Count-slow.Count != 3 {
		t.Errorf("compared at %+v and %+v", quick, slow)
	}

	for _, s := range f.states {
		if err := w.apply(s, 10); err != nil {
			t.Fatal(err)
		}
	}
	var cutoffs []int64
	for _, r := range f.asked {
		cutoffs = append(cutoffs, r.Cutoff)
	}
	if _, err := verify.Run(t.Context(), w, nil, f, verify.Options{Now: now, Timeout: patient}); err != nil {
		t.Fatal(err)
	}
	for _, r := range f.asked[len(cutoffs):] {
		if slices.Contains(cutoffs, r.Cutoff) {
			t.Errorf("the cutoff %d is asked for twice: an answer may be an old one", r.Cutoff)
		}
	}
	if len(f.loads) > 0 {
		t.Errorf("%q were asked to load a snapshot", f.loads)
	}
}

// etcd is a directory as the service writes it.
type etcd struct {
	w      *world
	client *clientv3.Client
	prefix string
	feed   *etcdfeed.Etcd
}

func newEtcd(w *world) *etcd {
	w.Helper()
	endpoints := stacktest.Shared(w).EtcdEndpoints
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop(), DialTimeout: patient})
	if err != nil {
		w.Fatal(err)
	}
	e := &etcd{w: w, client: client, prefix: stacktest.EtcdPrefix(w)}
	if e.feed, err = etcdfeed.New(etcdfeed.Config{Endpoints: endpoints, Prefix: e.prefix, Issuer: iss}); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patient)
		defer cancel()
		_, _ = client.Delete(ctx, e.prefix, clientv3.WithPrefix())
		_ = e.feed.Close()
		_ = client.Close()
	})
	return e
}

func (e *etcd) key(jti string) string {
	return directory.Key(e.prefix, iss, revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: jti})
}

func (e *etcd) do(ops ...clientv3.Op) {
	ctx, cancel := context.WithTimeout(e.w.Context(), patient)
	defer cancel()
	if _, err := e.client.Txn(ctx).Then(ops...).Commit(); err != nil {
		e.w.Error(err)
	}
}

// write puts these entries, and that the directory stands at p.
func (e *etcd) write(p revocation.Position, jtis ...string) {
	ops := []clientv3.Op{
		clientv3.OpPut(directory.StreamKey(e.prefix), fmt.Sprintf(`{"epoch":%q,"seq":%d}`, p.Epoch, p.Seq)),
		clientv3.OpPut(directory.HeartbeatKey(e.prefix), directory.Heartbeat{Epoch: p.Epoch, Head: p.Seq, Through: p.Seq, Source: iss, Time: time.Now()}.Value()),
	}
	for _, jti := range jtis {
		entry := directory.Entry{Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: jti}, Exp: e.w.exp, Seq: p.Seq, At: time.Now()}
		ops = append(ops, clientv3.OpPut(e.key(jti), entry.Value()))
	}
	e.do(ops...)
}

func TestEtcdIsCompared(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := newEtcd(w)
	head := w.state.At()
	before := revocation.Position{Epoch: head.Epoch, Seq: head.Seq - 1}
	run := func(o verify.Options) verify.Report {
		t.Helper()
		report, err := verify.Run(t.Context(), w, e.feed, newGateways(w), o)
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	for _, step := range []struct {
		name    string
		change  func()
		verdict fleet.Verdict
		detail  string
	}{
		{"nothing there", func() {}, fleet.Unknown, "the service is building it"},
		{"behind", func() { e.write(before, "a", "b", "c", "d") }, fleet.Unknown, "1 events behind"},
		{"all there", func() { e.write(head, "e") }, fleet.Equal, ""},
		{"one deleted by hand", func() { e.do(clientv3.OpDelete(e.key("b"))) }, fleet.Diverged, "has 4 of the log's 5 revocations"},
		{"one put by hand", func() { e.write(head, "x") }, fleet.Diverged, "has 5 revocations as the log does, but not the same"},
		{"repaired", func() { e.write(head, "b"); e.do(clientv3.OpDelete(e.key("x"))) }, fleet.Equal, ""},
		{"another epoch", func() { e.write(revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: head.Seq}) }, fleet.Unknown, "another epoch"},
		{"ahead of Postgres", func() { e.write(revocation.Position{Epoch: head.Epoch, Seq: head.Seq + 5}) }, fleet.Unknown, "Postgres has not come to"},
	} {
		step.change()
		timeout := patient
		if step.verdict == fleet.Unknown {
			timeout = 600 * time.Millisecond
		}
		report := run(verify.Options{Timeout: timeout})
		if m := report.Directory; m == nil || m.Verdict != step.verdict || !strings.Contains(m.Detail, step.detail) || step.detail == "" && m.Detail != "" {
			t.Errorf("%s: %+v, want %s, %q", step.name, m, step.verdict, step.detail)
		}
		if report.Equal() != (step.verdict == fleet.Equal) {
			t.Errorf("%s: equal is %t", step.name, report.Equal())
		}
	}

	// It catches up while it is waited for.
	e.write(before)
	f := newGateways(w)
	f.asking = func() { go e.write(head) }
	report, err := verify.Run(t.Context(), w, e.feed, f, verify.Options{Timeout: patient})
	if err != nil || report.Directory.Verdict != fleet.Equal {
		t.Errorf("%v, %+v", err, report.Directory)
	}
}
