package app_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/replica/amqpfeed"
	"github.com/rescindhq/rescind/api/replica/etcdfeed"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/sidecar"
	"github.com/rescindhq/rescind/internal/stacktest"
)

// paths are the ways to a service and its servers that a gateway takes.
type paths struct{ base, amqp, etcd string }

// member is a replica of a fleet, with what it has said so far.
type member struct {
	t    testing.TB
	name string
	way  paths
	make func(paths) (*replica.Replica, []func() error) // and what to close after it

	replica atomic.Pointer[replica.Replica]
	log     *logBuffer
	end     func()
	said    []bool // of the fleet's ids: it said "revoked"
}

// start runs the replica until m.end.
func (m *member) start() {
	m.t.Helper()
	r, closers := m.make(m.way)
	m.replica.Store(r)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	m.end = sync.OnceFunc(func() {
		cancel()
		err := <-done
		for _, c := range closers {
			err = errors.Join(err, c())
		}
		if err != nil {
			m.t.Errorf("%s: %v", m.name, err)
		}
	})
}

func tokenWithID(jti string) replica.Token {
	return replica.Token{Iss: idpISS, Tenant: revocation.SuperTenant.Domain, JTI: jti, ClientID: clientID}
}

// look checks all ids, and that nothing which was ever revoked is valid again.
func (m *member) look(ids []string) (revoked int) {
	m.t.Helper()
	return m.lookAt(ids, 0, len(ids))
}

// lookAt is look at the ids from one on, up to another.
func (m *member) lookAt(ids []string, from, to int) (revoked int) {
	m.t.Helper()
	r := m.replica.Load()
	for len(m.said) < len(ids) {
		m.said = append(m.said, false)
	}
	for i, id := range ids[from:to] {
		i += from
		switch d := r.Check(tokenWithID(id)); {
		case d.Outcome == replica.Revoked:
			m.said[i] = true
			revoked++
		case m.said[i]:
			m.t.Errorf("%s: a token that it knew as revoked is %v again", m.name, d.Outcome)
		}
	}
	return revoked
}

// newMember makes a replica with a way of its own: over HTTP alone, or with another feed beside it,
// or over etcd alone. Folder may be empty.
func (w *world) newMember(name, username, feed, folder string, p paths) *member {
	w.t.Helper()
	m := &member{t: w.t, name: name, way: p, log: &logBuffer{}}
	m.make = func(p paths) (*replica.Replica, []func() error) {
		cfg := replica.Config{
			Folder: folder, Staleness: replica.Staleness{Max: time.Minute, Then: replica.Serve}, Empty: replica.Serve,
			Logger: slog.New(slog.NewTextHandler(m.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		}
		var closers []func() error
		var feeds []replica.Feed
		if feed != "etcd-only" {
			source, err := replica.NewHTTP(replica.HTTPConfig{URL: p.base, Username: username, Password: accountPassword})
			if err != nil {
				w.t.Fatal(err)
			}
			cfg.Source, feeds = source, append(feeds, source)
		}
		switch feed {
		case "amqp":
			f, err := amqpfeed.New(amqpfeed.Config{URL: p.amqp})
			if err != nil {
				w.t.Fatal(err)
			}
			feeds = append(feeds, f)
		case "etcd", "etcd-only":
			e, err := etcdfeed.New(etcdfeed.Config{Endpoints: []string{p.etcd}, Prefix: w.prefix, Issuer: w.iss})
			if err != nil {
				w.t.Fatal(err)
			}
			closers = append(closers, e.Close)
			if feeds = append(feeds, e); cfg.Source == nil {
				cfg.Source, cfg.Claims = e, replica.ClaimsOnly
			}
		}
		cfg.Feeds = feeds
		r, err := replica.New(cfg)
		if err != nil {
			w.t.Fatalf("%s: %v", name, err)
		}
		return r, closers
	}
	m.start()
	w.t.Cleanup(func() { m.end() })
	return m
}

// revokeIDs revokes n new tokens of idpISS by their ids, and returns these.
func (p *person) revokeIDs(n int) []string {
	p.t.Helper()
	ids, body := orderIDs(n)
	p.must(http.StatusAccepted, http.MethodPost, "/v1/revocations", body)
	return ids
}

func orderIDs(n int) (ids []string, body string) {
	items := make([]map[string]string, n)
	for i := range items {
		ids = append(ids, uuid.NewString())
		items[i] = map[string]string{"kind": "token", "iss": idpISS, "jti": ids[i]}
	}
	b, err := json.Marshal(map[string]any{"items": items})
	if err != nil {
		panic(err)
	}
	return ids, string(b)
}

// head is the last seq of the log.
func (w *world) head() (head revocation.Seq) {
	w.t.Helper()
	if err := w.pool().QueryRow(w.t.Context(), `SELECT seq FROM rescind.log_head`).Scan(&head); err != nil {
		w.t.Fatal(err)
	}
	return head
}

// gatewayAccount makes an account for replicas, which sees all tenants.
func (w *world) gatewayAccount() (username string) {
	w.account(authn.Account{Username: "replica", Role: rest.Gateway, ExtraTenants: []string{"*"}}, accountPassword)
	return "replica"
}

// Whatever way a replica takes, what is revoked reaches it, and nothing else does.
func TestReplicasFollow(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve()
	admin := w.person(s, rest.Admin)
	w.tenant("acme.example")
	w.account(authn.Account{Username: "acme", Role: rest.Gateway, Tenant: revocation.Tenant{Domain: "acme.example"}}, accountPassword)
	before := admin.revokeIDs(20)
	direct := paths{s.base, w.gatewayAMQP, w.etcd[0]}
	everyone := w.gatewayAccount()
	var members []*member
	for _, feed := range []string{"", "amqp", "etcd", "etcd-only"} {
		members = append(members, w.newMember("replica with "+feed, everyone, feed, t.TempDir(), direct))
	}
	acme := w.newMember("replica of acme", "acme", "", t.TempDir(), direct)
	for _, m := range members {
		await(t, m.name+" has what was before", func() bool { return m.look(before) == len(before) })
	}
	after := admin.revokeIDs(20)
	admin.must(http.StatusAccepted, http.MethodPost, "/v1/revocations", `{"kind":"tenant","tenant":"acme.example"}`)
	acmeToken := replica.Token{Iss: ourISS + "/t/acme.example", Tenant: "acme.example", JTI: "x", IssuedAt: time.Now().Unix() - 60}
	head := w.head()
	for _, m := range append(members, acme) {
		await(t, m.name+" has the tenant's revocation", func() bool {
			return m.replica.Load().Check(acmeToken).Kind == revocation.KindTenant
		})
		await(t, m.name+" knows that it has everything", func() bool {
			st := m.replica.Load().Status()
			return st.Ready && st.Seq == head && st.Age < time.Minute
		})
		if st := m.replica.Load().Status(); st.Error != "" {
			t.Errorf("%s: %+v", m.name, st)
		}
	}
	for _, m := range members {
		if got := m.look(slices.Concat(before, after)); got != 40 {
			t.Errorf("%s knows %d of 40", m.name, got)
		}
	}
	if got := acme.look(slices.Concat(before, after)); got != 0 {
		t.Errorf("the replica of a tenant has %d revocations of another one's", got)
	}

	// All of it is on disk: a replica that reaches nobody has it.
	for _, m := range members {
		m.end()
		m.way = paths{"http://127.0.0.1:1", "amqp://127.0.0.1:1/", "http://127.0.0.1:1"}
		m.start()
		if got := m.look(slices.Concat(before, after)); got != 40 {
			t.Errorf("%s, started again without anybody, knows %d of 40", m.name, got)
		}
	}
}

// toxic is a proxy before an address, and what can be done to it.
type toxic struct {
	t     testing.TB
	proxy *toxiproxy.Proxy
}

func newToxics(testing.TB) *toxiproxy.ApiServer {
	return toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
}

func before(t testing.TB, server *toxiproxy.ApiServer, name, address string) *toxic {
	t.Helper()
	p := toxiproxy.NewProxy(server, name, "127.0.0.1:0", address)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return &toxic{t, p}
}

// add makes a toxic act on what comes from the server.
func (x *toxic) add(kind string, attributes map[string]any) {
	x.t.Helper()
	b, err := json.Marshal(map[string]any{"name": kind, "type": kind, "stream": "downstream", "toxicity": 1, "attributes": attributes})
	if err == nil {
		_, err = x.proxy.Toxics.AddToxicJson(bytes.NewReader(b))
	}
	if err != nil {
		x.t.Errorf("toxic %s: %v", kind, err)
	}
}

// cut ends all connections, and lets new ones through.
func (x *toxic) cut() {
	x.t.Helper()
	x.proxy.Stop()
	if err := x.proxy.Start(); err != nil {
		x.t.Errorf("proxy %s: %v", x.proxy.Name, err)
	}
}

// at is rawURL with the proxy in place of its host.
func (x *toxic) at(rawURL string) string {
	x.t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		x.t.Fatal(err)
	}
	u.Host = x.proxy.Listen
	return u.String()
}

func hostOf(t testing.TB, rawURL string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	return u.Host
}

// fixedAddress is one on which a service can be started again.
func fixedAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// sidecarOf runs a gateway that is asked over HTTP, with more in its configuration, and returns its URL. It ends
// with the test, or before that by stop.
func (w *world) sidecarOf(name, username, base, more string) (at string, stop func()) {
	w.t.Helper()
	dir := w.t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "password"), []byte(accountPassword), 0o600); err != nil {
		w.t.Fatal(err)
	}
	cfg, err := sidecar.ParseConfig(strings.NewReader(fmt.Sprintf(`
service: {url: %q, username: %q, password_file: password}
audiences: [https://api.example.com]
staleness: {max: 1h, then: serve}
issuers: [{iss: %q, jwks_file: %q, max_token_lifetime: 7200}]
auth: {listen: "127.0.0.1:0"}
ops: {listen: "127.0.0.1:0"}
%s
`, base, username, idpISS, writeJSON(w.t, "jwks.json", idp().public), more)), dir)
	if err != nil {
		w.t.Fatalf("%s: %v", name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	listening, done := make(chan sidecar.Addresses, 1), make(chan error, 1)
	go func() {
		done <- sidecar.Run(ctx, cfg, slog.New(slog.DiscardHandler), func(a sidecar.Addresses) { listening <- a })
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("%s: %v", name, err)
		}
	})
	w.t.Cleanup(stop)
	select {
	case a := <-listening:
		return "http://" + a.Auth + "/auth", stop
	case err := <-done:
		done <- nil
		w.t.Fatalf("%s: %v", name, err)
		return "", nil
	}
}

// A gateway starts with everything down if it has its folder. Without, it is closed, or open, as is configured.
func TestGatewayStartsAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s, err := w.tryServe()
	if err != nil {
		t.Fatal(err)
	}
	admin := w.person(s, rest.Admin)
	admin.subscribe("/chaos/1.0.0", clientID)
	username, client := w.gatewayAccount(), newHTTPClient(t)
	folder := fmt.Sprintf("folder: %q", t.TempDir())
	answers := func(gateway, token string, want int) func() bool {
		return func() bool { status, err := ask(client, gateway, token); return err == nil && status == want }
	}
	live, revoked := accessToken("live"), accessToken("revoked")
	g, stop := w.sidecarOf("the first", username, s.base, folder)
	await(t, "the token is let through", answers(g, revoked, http.StatusOK))
	s.mustRevoke(client, revoked)
	await(t, "the token is refused", answers(g, revoked, http.StatusUnauthorized))
	stop()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}

	again, stop := w.sidecarOf("with its folder", username, s.base, folder)
	defer stop()
	closed, _ := w.sidecarOf("without a folder", username, s.base, "")
	open, _ := w.sidecarOf("without a folder, open", username, s.base, "empty: serve")
	for _, tt := range []struct {
		name, gateway, token string
		want                 int
	}{
		{"a live token with the folder", again, live, http.StatusOK},
		{"a revoked token with the folder", again, revoked, http.StatusUnauthorized},
		{"a live token without", closed, live, http.StatusServiceUnavailable},
		{"a live token without, open", open, live, http.StatusOK},
		{"a forged token without, open", open, live[:len(live)-8] + "AAAAAAAA", http.StatusUnauthorized},
	} {
		if status, err := ask(client, tt.gateway, tt.token); err != nil || status != tt.want {
			t.Errorf("%s: %d, %v; want %d", tt.name, status, err, tt.want)
		}
	}
}

// subscribe makes an API and lets the application of a client call it.
func (p *person) subscribe(context, consumerKey string) {
	p.t.Helper()
	api, _ := p.made("/v1/apis", fmt.Sprintf(`{"name":%q,"version":"1.0.0","context":%q,"provider":"admin","type":"HTTP","status":"PUBLISHED"}`,
		strings.Trim(strings.ReplaceAll(context, "/", "-"), "-"), context))
	var list struct {
		Items []struct{ UUID, Name string } `json:"items"`
	}
	if err := json.Unmarshal([]byte(p.must(http.StatusOK, http.MethodGet, "/v1/applications?limit=1000", "").body), &list); err != nil {
		p.t.Fatal(err)
	}
	for _, application := range list.Items {
		if application.Name == consumerKey {
			p.made("/v1/subscriptions", fmt.Sprintf(`{"application":{"uuid":%q},"api":{"uuid":%q},"policy":"Unlimited"}`, application.UUID, api["uuid"]))
			return
		}
	}
	p.t.Fatalf("there is no application named %s", consumerKey)
}

// ask asks a gateway about a request with a token.
func ask(client *http.Client, gateway, token string) (status int, err error) {
	a, err := send(client, http.MethodGet, gateway, http.Header{
		"Authorization": {"Bearer " + token}, "X-Forwarded-Method": {http.MethodGet}, "X-Forwarded-Uri": {"/chaos/1.0.0/x"},
	}, "")
	return a.status, err
}

// chaosFor is how long the fleet is tormented.
func chaosFor() time.Duration {
	if os.Getenv("RESCIND_HEAVY") == "1" {
		return time.Minute
	}
	return 8 * time.Second
}

// A fleet of 50 replicas and three gateways, under 500 revocations a second, with a broker
// that restarts, services that are killed, connections that are cut, readers that are slow, and replicas that
// are started again from their disks. None ever takes back a revocation that it had, and in the end
// all have the same state.
func TestFleetOutlivesChaos(t *testing.T) {
	t.Parallel()
	own := stacktest.Own(t, stacktest.RabbitMQ)
	w := newWorld(t).on(own)
	settings := func(address string) []string { return []string{"RESCIND_LISTEN=" + address} }
	addresses := []string{fixedAddress(t), fixedAddress(t)}
	services := make([]*service, len(addresses))
	for i, address := range addresses {
		services[i] = w.spawn(settings(address)...)
	}
	admin := w.person(services[0], rest.Admin)
	admin.subscribe("/chaos/1.0.0", clientID)
	username := w.gatewayAccount()

	server := newToxics(t)
	cut, slow := before(t, server, "cut", addresses[1]), before(t, server, "slow", addresses[0])
	broker, etcd := before(t, server, "broker", hostOf(t, w.gatewayAMQP)), before(t, server, "etcd", hostOf(t, w.etcd[0]))
	slow.add("latency", map[string]any{"latency": 200, "jitter": 150})
	slow.add("bandwidth", map[string]any{"rate": 200}) // KB/s
	direct := paths{"http://" + addresses[0], broker.at(w.gatewayAMQP), etcd.at(w.etcd[0])}
	ways := []struct {
		feed string
		base string
	}{{"", direct.base}, {"", "http://" + cut.proxy.Listen}, {"", "http://" + slow.proxy.Listen}, {"amqp", direct.base}, {"etcd", "http://" + cut.proxy.Listen}}
	const replicas = 50
	folders := t.TempDir()
	var members []*member
	for i := range replicas {
		way, folder := ways[i%len(ways)], ""
		if i%2 == 0 {
			folder = filepath.Join(folders, fmt.Sprint(i))
		}
		p := direct
		p.base = way.base
		if i >= replicas-3 {
			way.feed = "etcd-only"
		}
		members = append(members, w.newMember(fmt.Sprintf("replica %d (%s over %s)", i, way.feed, way.base), username, way.feed, folder, p))
	}
	var gateways []string
	for i, base := range []string{direct.base, "http://" + cut.proxy.Listen, "http://" + slow.proxy.Listen} {
		g, _ := w.sidecarOf(fmt.Sprintf("gateway %d", i), username, base, fmt.Sprintf("folder: %q", filepath.Join(folders, fmt.Sprint("gateway", i))))
		gateways = append(gateways, g)
	}
	client := newHTTPClient(t)
	for i, g := range gateways {
		live := accessToken("live")
		await(t, fmt.Sprintf("gateway %d lets a token through", i), func() bool { status, err := ask(client, g, live); return err == nil && status == http.StatusOK })
	}

	ctx, cancel := context.WithTimeout(t.Context(), chaosFor())
	defer cancel()
	var mu sync.Mutex
	var ids, tokens []string // that were answered
	snapshot := func() ([]string, []string) {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clip(ids), slices.Clip(tokens)
	}
	var work sync.WaitGroup
	// 50 at a time, ten times a second, each until it is answered, by whichever service is there.
	order := func(n int) {
		batch, body := orderIDs(50)
		for try := n; ; try++ {
			h := http.Header{"Authorization": {admin.auth}, "Content-Type": {"application/json"}, "Idempotency-Key": {batch[0]}}
			a, err := send(client, http.MethodPost, "http://"+addresses[try%len(addresses)]+"/v1/revocations", h, body)
			if err == nil && a.status == http.StatusAccepted {
				break
			}
			if err == nil && a.status < 500 && a.status != http.StatusConflict && a.status != http.StatusTooManyRequests {
				t.Errorf("revoke: %d %s", a.status, a.body)
				return
			}
			<-time.After(50 * time.Millisecond)
		}
		mu.Lock()
		defer mu.Unlock()
		ids = append(ids, batch...)
	}
	work.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		var orders sync.WaitGroup
		defer orders.Wait()
		for n := 0; ctx.Err() == nil; n++ {
			orders.Go(func() { order(n) })
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	})
	// Tokens by their clients, a few a second.
	work.Go(func() {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			token := accessToken(uuid.NewString())
			for try := 0; ; try++ {
				a, err := send(client, http.MethodPost, "http://"+addresses[try%len(addresses)]+"/revoke", form(basic(clientID, clientSecret)), url.Values{"token": {token}}.Encode())
				if err == nil && a.status == http.StatusOK {
					break
				}
				<-tick.C
			}
			mu.Lock()
			tokens = append(tokens, token)
			mu.Unlock()
			<-tick.C
		}
	})
	refused := make([]map[string]bool, len(gateways))
	askAll := func(tokens []string) (n int) {
		for i, g := range gateways {
			if refused[i] == nil {
				refused[i] = make(map[string]bool)
			}
			for _, token := range tokens {
				switch status, err := ask(client, g, token); {
				case err != nil:
					t.Errorf("gateway %d: %v", i, err)
				case status == http.StatusUnauthorized:
					refused[i][token] = true
					n++
				case refused[i][token]:
					t.Errorf("gateway %d answers %d for a token that it had refused", i, status)
				}
			}
		}
		return n
	}
	work.Go(func() {
		const part = 1000 // of all, in turn, and of the newest
		for from := 0; ctx.Err() == nil; from += part {
			ids, tokens := snapshot()
			if from >= len(ids) {
				from = 0
			}
			for _, m := range members {
				m.lookAt(ids, from, min(from+part, len(ids)))
				m.lookAt(ids, max(0, len(ids)-part), len(ids))
			}
			askAll(tokens[max(0, len(tokens)-50):])
		}
	})

	// The torments, one after the other, again and again.
	var counted struct{ brokers, services, cuts, replicas int }
	pause := func() bool {
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
		}
		return ctx.Err() == nil
	}
	for n := 0; pause(); n++ {
		cut.cut()
		counted.cuts++
		i := n % len(services)
		services[i].kill()
		services[i] = w.spawn(settings(addresses[i])...)
		counted.services++
		if !pause() {
			break
		}
		broker.cut()
		etcd.cut()
		if n%2 == 0 {
			own.Stop(stacktest.RabbitMQ)
			own.Start(stacktest.RabbitMQ)
			counted.brokers++
		}
		for _, k := range []int{2 * n % replicas, (2*n + 24) % replicas, replicas - 2} { // they have folders, and come to be of every way
			m := members[k]
			m.end()
			m.start()
			counted.replicas++
		}
	}
	work.Wait()
	allIDs, allTokens := snapshot()
	t.Logf("%d revocations by id and %d tokens in %s; %+v", len(allIDs), len(allTokens), chaosFor(), counted)

	head := w.head()
	for _, m := range members {
		hasAll := func() bool {
			st := m.replica.Load().Status()
			return st.Seq == head && st.Age < 30*time.Second && m.look(allIDs) == len(allIDs)
		}
		t.Cleanup(func() {
			if t.Failed() && !hasAll() {
				status, err := json.Marshal(m.replica.Load().Status())
				t.Logf("%s, with the log at %d, knows %d of %d: %s %v\n%s", m.name, head, m.look(allIDs), len(allIDs), status, err, tail(m.log.String(), 3000))
			}
		})
		awaitProgress(t, m.name+" has everything", hasAll, func() any { return m.replica.Load().Status().Seq })
	}
	for _, m := range members {
		st, first := m.replica.Load().Status(), members[0].replica.Load().Status()
		if st.Position != first.Position || st.Revocations != first.Revocations || !st.RevocationsOnly && st.Entities != first.Entities {
			t.Errorf("%s is at %+v, the first one at %+v", m.name, st, first)
		}
		if d := m.replica.Load().Check(tokenWithID(uuid.NewString())); d.Outcome != replica.Valid {
			t.Errorf("%s says %v of a token that nobody revoked", m.name, d.Outcome)
		}
	}
	await(t, "all gateways refuse all tokens", func() bool { return askAll(allTokens) == len(allTokens)*len(gateways) })
}
