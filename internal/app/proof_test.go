package app_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/replica/amqpfeed"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
)

// gatewayProgram builds the gateway once for all tests of this process.
var gatewayProgram = sync.OnceValues(func() (path string, err error) {
	service, err := program()
	if err != nil {
		return "", err
	}
	path = filepath.Join(filepath.Dir(service), "rescind-gateway")
	out, err := exec.Command("go", "build", "-o", path, "github.com/rescindhq/rescind/cmd/rescind-gateway").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build rescind-gateway: %w\n%s", err, out)
	}
	return path, nil
})

// gatewayProcess is a gateway in a process of its own: a reverse proxy before an upstream that answers 200.
type gatewayProcess struct {
	t     testing.TB
	id    string
	proxy string // its URL
	cmd   *exec.Cmd
	done  chan struct{}
	log   *logBuffer
}

// gatewayOf starts a gateway that knows a service by base. It is killed with the test.
func (w *world) gatewayOf(id, username, base, folder string) *gatewayProcess {
	w.t.Helper()
	path, err := gatewayProgram()
	if err != nil {
		w.t.Fatal(err)
	}
	upstream := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	w.t.Cleanup(upstream.Close)
	listen, dir := fixedAddress(w.t), w.t.TempDir()
	for name, text := range map[string]string{"password": accountPassword, "gateway.yaml": fmt.Sprintf(`
id: %q
labels: {site: proof}
service: {url: %q, username: %q, password_file: password}
folder: %q
audiences: [https://api.example.com]
staleness: {max: 1h, then: serve}
issuers: [{iss: %q, jwks_file: %q, max_token_lifetime: 7200}]
proxy: {listen: %q, upstreams: [{context: "/rescind-canary/v1", url: %q}, {context: "/proof/1.0.0", url: %q}]}
ops: {listen: "127.0.0.1:0"}
`, id, base, username, folder, idpISS, writeJSON(w.t, "jwks.json", idp().public), listen, upstream.URL, upstream.URL)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	g := &gatewayProcess{t: w.t, id: id, proxy: "http://" + listen, done: make(chan struct{}), log: &logBuffer{}}
	g.cmd = exec.Command(path, "--config", filepath.Join(dir, "gateway.yaml"))
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stderr, err := g.cmd.StderrPipe()
	if err == nil {
		err = g.cmd.Start()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			g.log.Write(append(lines.Bytes(), '\n')) //nolint:errcheck // in memory
		}
		_ = g.cmd.Wait() // most are killed
		close(g.done)
	}()
	w.t.Cleanup(func() {
		g.kill()
		if w.t.Failed() {
			w.t.Logf("log of gateway %s:\n%s", id, tail(g.log.String(), 2000))
		}
	})
	return g
}

func (g *gatewayProcess) signal(s syscall.Signal) {
	g.t.Helper()
	if err := g.cmd.Process.Signal(s); err != nil {
		g.t.Errorf("signal %v to gateway %s: %v", s, g.id, err)
	}
}

func (g *gatewayProcess) kill() {
	_ = g.cmd.Process.Kill() // it may have ended
	<-g.done
}

// ask is what the gateway answers to a call of the demo API with a token.
func (g *gatewayProcess) ask(client *http.Client, token string) int {
	a, err := send(client, http.MethodGet, g.proxy+"/proof/1.0.0/x", http.Header{"Authorization": {"Bearer " + token}}, "")
	if err != nil {
		return 0
	}
	return a.status
}

// shown is a gateway as /v1/gateways shows it.
type shown struct {
	ID         string            `json:"id"`
	Account    string            `json:"account"`
	Labels     map[string]string `json:"labels"`
	Standing   string            `json:"standing"`
	Epoch      revocation.Epoch  `json:"epoch"`
	Seq        revocation.Seq    `json:"seq"`
	Behind     *int64            `json:"behind"`
	Entities   int               `json:"entities"`
	Feeds      []replica.FeedStatus
	ReportedAt time.Time `json:"reported_at"`
	Digest     struct {
		Verdict, Detail string
	} `json:"digest"`
	Canary *struct {
		Outcome   string  `json:"outcome"`
		RefusedMS float64 `json:"refused_ms"`
		Detail    string  `json:"detail"`
	} `json:"canary"`
}

func read[T any](t testing.TB, a answer) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(a.body), &v); err != nil {
		t.Fatalf("%v: %s", err, a.body)
	}
	return v
}

// fleet is what /v1/gateways says, by id.
func (p *person) fleet() map[string]shown {
	p.t.Helper()
	all := make(map[string]shown)
	for _, g := range read[struct{ Items []shown }](p.t, p.must(http.StatusOK, http.MethodGet, "/v1/gateways?limit=1000", "")).Items {
		all[g.ID] = g
	}
	return all
}

// barrier is the answer of /v1/barrier, and the member convergence of others.
type barrier struct {
	Reached  bool
	Live     int
	Lost     int
	Gateways []struct {
		ID       string
		Standing string
		Applied  *bool
		Seq      revocation.Seq
		AfterMS  float64 `json:"after_ms"`
	}
}

// missing are the live gateways that have not applied it, and lost those that are lost.
func (b barrier) missing() (missing, lost []string) {
	for _, g := range b.Gateways {
		switch {
		case g.Standing == "lost":
			lost = append(lost, g.ID)
		case g.Applied == nil || !*g.Applied:
			missing = append(missing, g.ID)
		}
	}
	slices.Sort(missing)
	slices.Sort(lost)
	return missing, lost
}

func (p *person) wait(seq revocation.Seq, timeout string, gateways ...string) barrier {
	p.t.Helper()
	body, err := json.Marshal(map[string]any{"seq": seq, "timeout": timeout, "selector": map[string]any{"gateways": gateways}})
	if err != nil {
		p.t.Fatal(err)
	}
	return read[barrier](p.t, p.must(http.StatusOK, http.MethodPost, "/v1/barrier", string(body)))
}

// revokeAndWait revokes a token by its id and waits for the fleet.
func (p *person) revokeAndWait(timeout string) (id, jti string, b barrier) {
	p.t.Helper()
	jti = uuid.NewString()
	body := fmt.Sprintf(`{"kind":"token","iss":%q,"jti":%q,"reason":"proof"}`, idpISS, jti)
	a := read[struct {
		ID          string
		Convergence barrier
	}](p.t, p.must(http.StatusAccepted, http.MethodPost, "/v1/revocations?wait="+timeout, body))
	return a.ID, jti, a.Convergence
}

// run runs the rescind command on the world, and returns its standard output and exit status.
func (w *world) run(stdin string, args ...string) (stdout string, status int) {
	w.t.Helper()
	path, err := program()
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(w.environ(), "RESCIND_LOG_LEVEL=error")
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); cmd.ProcessState == nil {
		w.t.Fatal(err)
	}
	if status = cmd.ProcessState.ExitCode(); status > 1 {
		w.t.Fatalf("rescind %s: exit status %d\n%s%s", strings.Join(args, " "), status, out.String(), errs.String())
	}
	return out.String() + errs.String(), status
}

// Each thing that can be wrong with a gateway is named as what it is, by the fleet's view, the barrier, verify, the
// canary and explain, with two service processes of which each hears of some gateways alone.
func TestFleetIsKnown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	settings := []string{"RESCIND_CANARY_INTERVAL=10s", "RESCIND_CANARY_LIMIT=1s", "RESCIND_CANARY_AUDIENCE=https://api.example.com"}
	one, two := w.spawn(settings...), w.spawn(settings...)
	admin := w.person(one, rest.Admin)
	admin.subscribe("/proof/1.0.0", clientID)
	username := w.gatewayAccount()
	toxics := newToxics(t)
	line := before(t, toxics, "line", strings.TrimPrefix(two.base, "http://"))
	folder := func(name string) string { return filepath.Join(t.TempDir(), name) }

	steady := w.gatewayOf("steady", username, one.base, folder("steady"))
	paused := w.gatewayOf("paused", username, two.base, folder("paused"))
	deaf := w.gatewayOf("deaf", username, "http://"+line.proxy.Listen, folder("deaf"))
	leaver := w.gatewayOf("leaver", username, one.base, folder("leaver"))
	all := []*gatewayProcess{steady, paused, deaf, leaver}
	client := newHTTPClient(t)
	for _, g := range all {
		await(t, g.id+" lets a token through", func() bool { return g.ask(client, accessToken("live-"+g.id)) == http.StatusOK })
	}
	await(t, "all have reported", func() bool { return len(admin.fleet()) == len(all) })
	for _, g := range all {
		admin.must(http.StatusOK, http.MethodPut, "/v1/gateways/"+g.id+"/canary", fmt.Sprintf(`{"url":%q}`, g.proxy+"/rescind-canary/v1/ping"))
	}

	t.Log("all is well")
	id, jti, b := admin.revokeAndWait("10s")
	if missing, lost := b.missing(); !b.Reached || len(missing)+len(lost) > 0 || len(b.Gateways) != len(all) {
		t.Errorf("after a revocation: %+v", b)
	}
	for _, g := range all {
		if status := g.ask(client, accessToken(jti)); status != http.StatusUnauthorized {
			t.Errorf("%s has confirmed the revocation, and answers %d", g.id, status)
		}
	}
	for name, g := range admin.fleet() {
		if g.Standing != "live" || g.Account != username || g.Labels["site"] != "proof" || g.Epoch == "" {
			t.Errorf("%s: %+v", name, g)
		}
	}
	stored := admin.must(http.StatusOK, http.MethodGet, "/v1/revocations/"+id, "")
	for _, g := range all {
		if !strings.Contains(stored.body, `"`+g.id+`"`) {
			t.Errorf("the revocation does not name %s: %s", g.id, stored.body)
		}
	}
	if out, status := w.run("", "verify"); status != 0 {
		t.Errorf("verify: exit status %d\n%s", status, out)
	}
	await(t, "all canaries are well", func() bool {
		for _, g := range admin.fleet() {
			if g.Canary == nil || g.Canary.Outcome != "refused" {
				return false
			}
		}
		return true
	})

	t.Log("another account reports with a gateway's id")
	w.account(authn.Account{Username: "thief", Role: rest.Gateway, ExtraTenants: []string{"*"}}, accountPassword)
	thief := *admin
	thief.auth = basic("thief", accountPassword)
	report := func(id string) answer {
		body, err := json.Marshal(replica.Report{Instance: uuid.NewString(), Started: time.Now().UnixMilli(), Ready: true,
			Position: revocation.Position{Epoch: admin.fleet()["steady"].Epoch, Seq: 1 << 40}})
		if err != nil {
			t.Fatal(err)
		}
		return thief.do(http.MethodPost, "/v1/gateways/"+id+"/status", string(body))
	}
	if a := report("steady"); a.status != http.StatusForbidden || !strings.Contains(a.body, "another account") {
		t.Errorf("a report for another's gateway: %d %s", a.status, a.body)
	}
	if g := admin.fleet()["steady"]; g.Account != username || g.Seq >= 1<<40 {
		t.Errorf("after it steady is %+v", g)
	}

	t.Log("one lies still, one hears nothing, one goes away during a barrier")
	before := admin.fleet()
	paused.signal(syscall.SIGSTOP)
	line.add("timeout", map[string]any{"timeout": 0}) // nothing comes any more, nor does the connection end
	line.cut()                                        // those that there were too
	waited := make(chan barrier, 1)
	var lateID, late string
	go func() {
		var b barrier
		lateID, late, b = admin.revokeAndWait("3s")
		waited <- b
	}()
	leaver.kill()
	b = <-waited
	missing, lost := b.missing()
	if want := []string{"deaf", "leaver", "paused"}; b.Reached || !slices.Equal(slices.Sorted(slices.Values(append(missing, lost...))), want) {
		t.Errorf("not confirmed by %q and lost %q, want %q\n%+v", missing, lost, want, b)
	}
	if got := before["paused"].Seq; got >= w.head() {
		t.Errorf("paused had %d before, and the log is at %d", got, w.head())
	}
	if out, status := w.run("", "revoke", "--iss", idpISS, "--jti", uuid.NewString(), "--wait", "1s"); status != 1 ||
		!strings.Contains(out, "paused") || !strings.Contains(out, "deaf") {
		t.Errorf("rescind revoke --wait: exit status %d\n%s", status, out)
	}
	if status := deaf.ask(client, accessToken(late)); status != http.StatusOK {
		t.Errorf("deaf, which cannot have heard of it, answers %d for a revoked token", status)
	}
	explained := func(gateway string) string {
		body, err := json.Marshal(map[string]any{"token": accessToken(late), "api": map[string]string{"context": "/proof/1.0.0", "version": "1.0.0"}, "gateway": gateway})
		if err != nil {
			t.Fatal(err)
		}
		a := admin.must(http.StatusOK, http.MethodPost, "/v1/explain", string(body))
		if strings.Contains(a.body, accessToken(late)) {
			t.Error("explain repeats the token")
		}
		e := read[struct {
			Verdict    string
			Revocation struct {
				ID, Reason, Actor string
				Seq               revocation.Seq
			}
			Gateway struct{ Knew string }
		}](t, a)
		if e.Verdict != "refused" || e.Revocation.ID != lateID || e.Revocation.Reason != "proof" || e.Revocation.Actor != "account:admin" || e.Revocation.Seq == 0 {
			t.Errorf("explain: %s", a.body)
		}
		return e.Gateway.Knew
	}
	if knew := explained("steady"); knew != "yes" {
		t.Errorf("steady knew of the revocation: %s", knew)
	}
	if knew := explained("deaf"); knew == "yes" {
		t.Errorf("deaf knew of the revocation: %s", knew)
	}
	await(t, "those that are silent are lost", func() bool {
		all := admin.fleet()
		return all["paused"].Standing == "lost" && all["deaf"].Standing == "lost" && all["leaver"].Standing == "lost" && all["steady"].Standing == "live"
	})
	_, _, b = admin.revokeAndWait("10s")
	if missing, lost := b.missing(); !b.Reached || len(missing) > 0 || !slices.Equal(lost, []string{"deaf", "leaver", "paused"}) {
		t.Errorf("with three that are lost: not confirmed by %q, lost %q, %+v", missing, lost, b)
	}
	await(t, "the canaries give the alarm", func() bool {
		all := admin.fleet()
		return all["deaf"].Canary.Outcome == "still_accepted" && all["paused"].Canary.Outcome == "unreachable" &&
			all["leaver"].Canary.Outcome == "unreachable" && all["steady"].Canary.Outcome == "refused"
	})
	if a, err := send(client, http.MethodGet, one.ops+"/readyz?verbose=1", nil, ""); err != nil || a.status != http.StatusOK || !strings.Contains(a.body, "deaf") {
		t.Errorf("/readyz: %d %s %v", a.status, a.body, err)
	}
	if out, status := w.run("", "verify", "--timeout", "2s"); status != 1 || !strings.Contains(out, "paused") || !strings.Contains(out, "lost") {
		t.Errorf("verify: exit status %d\n%s", status, out)
	}

	t.Log("they come back")
	paused.signal(syscall.SIGCONT)
	if err := line.proxy.Toxics.RemoveToxic(context.Background(), "timeout"); err != nil {
		t.Fatal(err)
	}
	line.cut()
	admin.must(http.StatusNoContent, http.MethodDelete, "/v1/gateways/leaver", "")
	await(t, "those that came back have everything", func() bool {
		b := admin.wait(w.head(), "1s")
		missing, lost := b.missing()
		return b.Reached && len(missing)+len(lost) == 0 && len(b.Gateways) == 3
	})
	if knew := explained("deaf"); knew != "yes" {
		t.Errorf("deaf has come back, and knew of the revocation: %s", knew)
	}
	if out, status := w.run("", "verify"); status != 0 {
		t.Errorf("verify: exit status %d\n%s", status, out)
	}
	t.Log("one stops in good order")
	steady.signal(syscall.SIGTERM)
	<-steady.done
	if _, there := admin.fleet()["steady"]; there {
		t.Errorf("a gateway that has said that it stops is there still")
	}
}

// lossy is a source whose first snapshot lacks the event after it, as if somebody had removed by hand what that revoked.
type lossy struct {
	*replica.HTTP
	first []byte // a snapshot, in the binary form
	loads atomic.Int32
	later *held
}

func (l *lossy) Load(ctx context.Context, s *replica.State) error {
	if l.loads.Add(1) > 1 {
		return l.later.Load(ctx, s)
	}
	header, err := s.ReadSnapshot(bytes.NewReader(l.first))
	if err != nil {
		return err
	}
	next := header.Position
	next.Seq++
	return s.Apply(revocation.Event{Position: next, Previous: next.Seq - 1, Type: "proof.nothing", Tenant: revocation.SuperTenant, Time: time.Now()})
}

// held is a source, and a feed, that tell nothing until they are let go.
type held struct {
	*replica.HTTP
	free chan struct{}
}

func (h *held) wait(ctx context.Context) error {
	select {
	case <-h.free:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *held) Load(ctx context.Context, s *replica.State) error {
	if err := h.wait(ctx); err != nil {
		return err
	}
	return h.HTTP.Load(ctx, s)
}

func (h *held) Events(ctx context.Context, after revocation.Position) (replica.Page, error) {
	if err := h.wait(ctx); err != nil {
		return replica.Page{}, err
	}
	return h.HTTP.Events(ctx, after)
}

func (h *held) Follow(ctx context.Context, at func() revocation.Position, to replica.Receiver) error {
	if err := h.wait(ctx); err != nil {
		return err
	}
	return h.HTTP.Follow(ctx, at, to)
}

// A gateway that lacks an entry is found and mends itself, one that comes back with an old disk is known to be behind,
// and one whose feed is lost says so.
func TestDivergenceIsFound(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.spawn("RESCIND_ETCD_RECONCILE_INTERVAL=1h")
	admin := w.person(s, rest.Admin)
	username := w.gatewayAccount()
	client := newHTTPClient(t)
	service := func() *replica.HTTP {
		source, err := replica.NewHTTP(replica.HTTPConfig{URL: s.base, Username: username, Password: accountPassword})
		if err != nil {
			t.Fatal(err)
		}
		return source
	}
	start := func(cfg replica.Config) (r *replica.Replica, stop func()) {
		cfg.Staleness = replica.Staleness{Max: time.Hour, Then: replica.Serve}
		cfg.Reporter = service()
		log := &logBuffer{}
		cfg.Logger = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("log of %s:\n%s", cfg.ID, tail(log.String(), 3000))
			}
		})
		r, err := replica.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		stop = sync.OnceFunc(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(stop)
		return r, stop
	}

	t.Log("an entry is missing in a gateway")
	admin.revokeIDs(20)
	a, err := send(client, http.MethodGet, s.base+"/v1/snapshots/all", http.Header{"Authorization": {basic(username, accountPassword)}, "Accept": {replica.SnapshotType}}, "")
	if err != nil || a.status != http.StatusOK {
		t.Fatalf("snapshot: %v %d", err, a.status)
	}
	gone := admin.revokeIDs(1)[0]
	source := &lossy{HTTP: service(), first: []byte(a.body), later: &held{service(), make(chan struct{})}}
	r, _ := start(replica.Config{ID: "lacking", Source: source})
	await(t, "the gateway is at the log's head", func() bool { return r.Status().Seq == w.head() && r.Status().Age < 10*time.Second })
	if d := r.Check(tokenWithID(gone)); d.Outcome != replica.Valid {
		t.Fatalf("the gateway that lacks the revocation says %v", d.Outcome)
	}
	if b := admin.wait(w.head(), "5s", "lacking"); !b.Reached {
		t.Errorf("its position is the log's: %+v", b)
	}
	out, status := w.run("", "verify")
	if status != 1 || !strings.Contains(out, "lacking") || !strings.Contains(out, "diverged") {
		t.Errorf("verify: exit status %d\n%s", status, out)
	}
	await(t, "the fleet shows that it has diverged", func() bool { return admin.fleet()["lacking"].Digest.Verdict == "diverged" })
	close(source.later.free)
	await(t, "it has loaded a snapshot, because it was told", func() bool { return r.Check(tokenWithID(gone)).Outcome == replica.Revoked })
	if out, status := w.run("", "verify"); status != 0 {
		t.Errorf("verify: exit status %d\n%s", status, out)
	}

	t.Log("an entry is missing in etcd")
	etcd := w.etcdClient()
	keys, err := etcd.Get(t.Context(), w.prefix+"/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	removed := 0
	for _, kv := range keys.Kvs {
		if strings.HasSuffix(string(kv.Key), "/"+gone) {
			if _, err := etcd.Delete(t.Context(), string(kv.Key)); err != nil {
				t.Fatal(err)
			}
			removed++
		}
	}
	if removed != 1 {
		t.Fatalf("%d keys removed, want one", removed)
	}
	if out, status := w.run("", "verify"); status != 1 || !strings.Contains(out, "etcd") || !strings.Contains(out, "diverged") {
		t.Errorf("verify: exit status %d\n%s", status, out)
	}

	t.Log("a gateway comes back with an old disk")
	folder, old := filepath.Join(t.TempDir(), "now"), filepath.Join(t.TempDir(), "old")
	r, stop := start(replica.Config{ID: "restored", Source: service(), Folder: folder})
	await(t, "the gateway has everything", func() bool { return r.Status().Seq == w.head() && r.Ready() })
	stop()
	if err := os.CopyFS(old, os.DirFS(folder)); err != nil {
		t.Fatal(err)
	}
	r, stop = start(replica.Config{ID: "restored", Source: service(), Folder: folder})
	late := admin.revokeIDs(1)[0]
	if b := admin.wait(w.head(), "10s"); !b.Reached {
		t.Errorf("%+v", b)
	}
	stop()
	free := &held{service(), make(chan struct{})}
	r, _ = start(replica.Config{ID: "restored", Source: free, Folder: old})
	await(t, "it has reported again", func() bool { return admin.fleet()["restored"].Seq == r.Status().Seq && r.Status().Seq < w.head() })
	if missing, _ := admin.wait(w.head(), "100ms").missing(); !slices.Equal(missing, []string{"restored"}) {
		t.Errorf("the barrier waits for %q, want restored", missing)
	}
	if r.Check(tokenWithID(late)).Outcome == replica.Revoked {
		t.Error("the old disk knows what was revoked after it")
	}
	close(free.free)
	if b := admin.wait(w.head(), "30s"); !b.Reached {
		t.Errorf("it has caught up: %+v", b)
	}

	t.Log("a gateway loses its feed")
	broker := before(t, newToxics(t), "broker", hostOf(t, w.gatewayAMQP))
	feed, err := amqpfeed.New(amqpfeed.Config{URL: broker.at(w.gatewayAMQP)})
	if err != nil {
		t.Fatal(err)
	}
	start(replica.Config{ID: "feedless", Source: service(), Feeds: []replica.Feed{feed}})
	connected := func(is bool) func() bool {
		return func() bool {
			feeds := admin.fleet()["feedless"].Feeds
			return len(feeds) == 1 && feeds[0].Name == "amqp" && feeds[0].Connected == is
		}
	}
	await(t, "its feed is connected", connected(true))
	broker.proxy.Stop()
	await(t, "the fleet shows that its feed is lost", connected(false))
	admin.revokeIDs(1)
	if b := admin.wait(w.head(), "30s"); !b.Reached {
		t.Errorf("without its feed it asks the source: %+v", b)
	}
}
