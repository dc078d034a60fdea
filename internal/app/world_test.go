package app_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	amqp "github.com/rabbitmq/amqp091-go"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/stacktest"
)

const (
	ourISS = "https://km.example.com"
	// idpISS is an issuer whose private keys the tests have.
	idpISS = "https://idp.example.com"

	masterKey = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

	clientID, clientSecret = "app-1", "Secret-1.0123456789abcdef0123456789abcdef"
)

// world is the servers that one test's services use, and its tenants' clients.
type world struct {
	t           testing.TB
	db          pgtest.Database
	amqpURL     string
	gatewayAMQP string
	etcd        []string
	prefix      string
	iss         string // our own issuer
	issuers     string // the trusted issuers file
	seeded      sync.Once
}

// newWorld is one on the servers that all tests share.
func newWorld(t testing.TB) *world {
	t.Helper()
	v := stacktest.NewVhost(t)
	w := &world{
		t: t, db: pgtest.Create(t), amqpURL: v.AMQPURL, gatewayAMQP: v.GatewayAMQPURL,
		etcd: stacktest.Shared(t).EtcdEndpoints, prefix: stacktest.EtcdPrefix(t), iss: ourISS,
	}
	w.issuers = w.writeIssuers(map[string]any{"jwks_file": writeJSON(t, "jwks.json", idp().public)})
	return w
}

// on lets w use the servers of a test's own stack in place of the shared ones.
func (w *world) on(s *stacktest.Stack) *world {
	w.t.Helper()
	at := s.Endpoints()
	if at.DatabaseURL != "" {
		w.db = pgtest.CreateOn(w.t, at.DatabaseURL)
	}
	if at.AMQPURL != "" {
		w.amqpURL, w.gatewayAMQP = at.AMQPURL, at.GatewayAMQPURL
	}
	if len(at.EtcdEndpoints) > 0 {
		w.etcd = at.EtcdEndpoints
	}
	return w
}

func (w *world) writeIssuers(keys map[string]any) string {
	issuer := map[string]any{
		"iss": idpISS, "name": "IdP", "tenant": "carbon.super", "max_token_lifetime": 7200,
		"algorithms": []string{"RS256", "ES256"}, "allow_typ": []string{"JWT"},
	}
	maps.Copy(issuer, keys)
	return writeJSON(w.t, "issuers.json", []any{issuer})
}

func writeJSON(t testing.TB, name string, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// environ are the settings of a service; later ones outrank.
func (w *world) environ(extra ...string) []string {
	settings := map[string]string{
		"RESCIND_DATABASE_URL": w.db.ServiceURL, "RESCIND_MIGRATE_DATABASE_URL": w.db.OwnerURL,
		"RESCIND_AMQP_URL": w.amqpURL, "RESCIND_ETCD_ENDPOINTS": strings.Join(w.etcd, ","), "RESCIND_ETCD_PREFIX": w.prefix,
		"RESCIND_MASTER_KEY": masterKey, "RESCIND_ISSUER": w.iss, "RESCIND_TRUSTED_ISSUERS_FILE": w.issuers,
		"RESCIND_LISTEN": "127.0.0.1:0", "RESCIND_OPS_LISTEN": "127.0.0.1:0", "RESCIND_DATABASE_MAX_CONNS": "8",
	}
	for _, kv := range extra {
		name, value, _ := strings.Cut(kv, "=")
		settings[name] = value
	}
	var env []string
	for name, value := range settings {
		env = append(env, name+"="+value)
	}
	return env
}

// service is a running service, in this process or in one of its own.
type service struct {
	t         testing.TB
	base, ops string
	logs      *logBuffer
	stop      func() error // in good order; returns how it ended
	done      <-chan struct{}
	process   *os.Process // nil in this process
}

// logBuffer keeps what a service logs.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (w *world) config(extra ...string) app.Config {
	w.t.Helper()
	cfg, err := app.ParseConfig(app.Input{Environ: w.environ(extra...)})
	if err != nil {
		w.t.Fatal(err)
	}
	return cfg
}

// tryServe runs a service in this process until it takes requests or has failed.
func (w *world) tryServe(extra ...string) (*service, error) {
	w.t.Helper()
	cfg := w.config(extra...)
	s := &service{t: w.t, logs: &logBuffer{}}
	log := slog.New(slog.NewJSONHandler(s.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan app.Addresses, 1), make(chan struct{})
	var ended error
	go func() {
		defer close(done)
		ended = app.Serve(ctx, cfg, log, func(a app.Addresses) { ready <- a })
	}()
	s.done = done
	s.stop = func() error {
		cancel()
		<-done
		return ended
	}
	select {
	case a := <-ready:
		s.base, s.ops = "http://"+a.HTTP, "http://"+a.Ops
	case <-done:
		cancel()
		return nil, ended
	}
	w.seed()
	return s, nil
}

// serve is tryServe for a service that works, and ends in good order with the test.
func (w *world) serve(extra ...string) *service {
	w.t.Helper()
	s, err := w.tryServe(extra...)
	if err != nil {
		w.t.Fatalf("serve: %v", err)
	}
	w.t.Cleanup(func() {
		if err := s.stop(); err != nil {
			w.t.Errorf("stop: %v", err)
		}
		if w.t.Failed() {
			w.t.Logf("log of the service:\n%s", tail(s.logs.String(), 4000))
		}
	})
	return s
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// programDir is where program has built, empty if nobody needed it.
var programDir string

// program builds the rescind command once for all tests of this process.
var program = sync.OnceValues(func() (path string, err error) {
	if programDir, err = os.MkdirTemp("", "rescind-test"); err != nil {
		return "", err
	}
	path = filepath.Join(programDir, "rescind")
	out, err := exec.Command("go", "build", "-o", path, "github.com/rescindhq/rescind/cmd/rescind").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build rescind: %w\n%s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if programDir != "" {
		os.RemoveAll(programDir)
	}
	os.Exit(code)
}

// spawn runs a service in a process of its own, which is killed with the test.
func (w *world) spawn(extra ...string) *service {
	w.t.Helper()
	path, err := program()
	if err != nil {
		w.t.Fatal(err)
	}
	cmd := exec.Command(path, "serve")
	cmd.Env = append(w.environ(extra...), "RESCIND_LOG_FORMAT=json")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is for the test
	stderr, err := cmd.StderrPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	done := make(chan struct{})
	s := &service{t: w.t, logs: &logBuffer{}, process: cmd.Process, done: done}
	var ended error
	ready := make(chan [2]string, 1)
	go func() {
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			s.logs.Write(append(lines.Bytes(), '\n')) //nolint:errcheck // in memory
			var line struct{ Msg, Address, Ops string }
			if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "takes requests" {
				ready <- [2]string{line.Address, line.Ops}
			}
		}
		ended = cmd.Wait()
		close(done)
	}()
	s.stop = func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		<-done
		return ended
	}
	w.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
		if w.t.Failed() {
			w.t.Logf("log of process %d:\n%s", cmd.Process.Pid, tail(s.logs.String(), 4000))
		}
	})
	select {
	case at := <-ready:
		s.base, s.ops = "http://"+at[0], "http://"+at[1]
	case <-done:
		w.t.Fatalf("the service has ended: %v\n%s", ended, s.logs)
	case <-time.After(60 * time.Second):
		w.t.Fatalf("the service takes no requests\n%s", s.logs)
	}
	w.seed()
	return s
}

// kill ends a service of its own process as a crash would.
func (s *service) kill() {
	s.t.Helper()
	if err := s.process.Kill(); err != nil {
		s.t.Error(err)
	}
	<-s.done
}

// seed registers the fixed client; other tests add theirs with [world.client].
func (w *world) seed() {
	w.t.Helper()
	w.seeded.Do(func() {
		w.client(idpISS, authn.Registration{ID: clientID, Secret: clientSecret, RevokeByJTI: true})
		w.client(w.iss, authn.Registration{
			ID: "own-1", Secret: clientSecret, Scopes: []string{"read", "write"}, DefaultScopes: []string{"read"},
			Audience: []string{"https://api.example.com"}, RevokeByJTI: true,
		})
	})
}

func (w *world) pool() *pgxpool.Pool {
	w.t.Helper()
	return pgtest.Pool(w.t, w.db.ServiceURL)
}

// owner runs a statement as the owner of the schema.
func (w *world) owner(sql string) {
	w.t.Helper()
	if _, err := pgtest.Pool(w.t, w.db.OwnerURL).Exec(w.t.Context(), sql); err != nil {
		w.t.Fatal(err)
	}
}

// catalog is the catalog as the commands change it.
func (w *world) catalog() *app.CatalogTools {
	w.t.Helper()
	c, err := app.OpenCatalog(context.Background(), w.config(), slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// tenant makes a tenant, which gets an issuer of its own.
func (w *world) tenant(domain string) {
	w.t.Helper()
	c := w.catalog()
	defer c.Close()
	_, _, err := c.Catalog.Apply(w.t.Context(), bySystem, []store.Change{{
		Op: store.Create, Entity: &catalog.Tenant{Meta: catalog.Meta{Tenant: revocation.Tenant{Domain: domain}}},
	}})
	if err != nil {
		w.t.Fatal(err)
	}
}

var bySystem = store.Caller{Actor: ledger.Actor{Name: "system"}}

// client registers a client of the issuer iss with an application of its own.
func (w *world) client(iss string, r authn.Registration) {
	w.t.Helper()
	c := w.catalog()
	defer c.Close()
	managers, err := c.Catalog.List(w.t.Context(), bySystem, catalog.NounKeyManager, store.Filter{}, 0, 100)
	if err != nil {
		w.t.Fatal(err)
	}
	i := slices.IndexFunc(managers, func(e catalog.Entity) bool { return e.(*catalog.KeyManager).Iss == iss })
	if i < 0 {
		w.t.Fatalf("there is no key manager with issuer %s", iss)
	}
	m := managers[i].(*catalog.KeyManager)
	made, _, err := c.Catalog.Apply(w.t.Context(), bySystem, []store.Change{{
		Op: store.Create, Entity: &catalog.Application{Meta: catalog.Meta{Tenant: m.Tenant}, Name: r.ID, Owner: "admin"},
	}})
	if err != nil {
		w.t.Fatal(err)
	}
	_, _, err = c.Catalog.CreateKey(w.t.Context(), bySystem, store.NewKey{Client: &r, Mapping: catalog.KeyMapping{
		Application: catalog.Ref{UUID: made[0].Base().UUID}, ConsumerKey: r.ID, KeyType: catalog.Production, KeyManager: m.Name,
	}})
	if err != nil {
		w.t.Fatal(err)
	}
}

// account makes an account of carbon.super unless it names another tenant.
func (w *world) account(a authn.Account, password string) {
	w.t.Helper()
	c := w.catalog()
	defer c.Close()
	if a.Tenant.Domain == "" {
		a.Tenant = revocation.SuperTenant
	}
	if err := c.Accounts.PutAccount(w.t.Context(), a, password); err != nil {
		w.t.Fatal(err)
	}
}

// idpKeys sign the tokens of idpISS.
type idpKeys struct {
	rsa    *rsa.PrivateKey
	ec     *ecdsa.PrivateKey
	public jose.JSONWebKeySet
}

var idp = sync.OnceValue(func() idpKeys {
	var k idpKeys
	var err error
	if k.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		panic(err)
	}
	if k.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		panic(err)
	}
	k.public.Keys = []jose.JSONWebKey{
		{Key: k.rsa.Public(), KeyID: "rsa-1", Algorithm: "RS256", Use: "sig"},
		{Key: k.ec.Public(), KeyID: "ec-1", Algorithm: "ES256", Use: "sig"},
	}
	return k
})

// claims are those of a live access token of the fixed client; changes outrank, nil
// takes one away.
func claims(jti string, changes ...map[string]any) map[string]any {
	now := time.Now().Unix()
	c := map[string]any{
		"iss": idpISS, "sub": clientID, "azp": clientID, "client_id": clientID, "aud": "https://api.example.com",
		"iat": now, "exp": now + 600, "jti": jti,
	}
	for _, change := range changes {
		for name, value := range change {
			if c[name] = value; value == nil {
				delete(c, name)
			}
		}
	}
	return c
}

// mint signs claims; ES256 is much cheaper than RS256.
func mint(alg string, header, claims map[string]any) string {
	h := map[string]any{"alg": alg, "typ": "at+jwt", "kid": map[string]string{"RS256": "rsa-1", "ES256": "ec-1"}[alg]}
	for name, value := range header {
		if h[name] = value; value == nil {
			delete(h, name)
		}
	}
	segment := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	input := segment(h) + "." + segment(claims)
	digest := sha256.Sum256([]byte(input))
	var signature []byte
	switch alg {
	case "RS256":
		var err error
		if signature, err = rsa.SignPKCS1v15(nil, idp().rsa, crypto.SHA256, digest[:]); err != nil {
			panic(err)
		}
	case "ES256":
		r, s, err := ecdsa.Sign(rand.Reader, idp().ec, digest[:])
		if err != nil {
			panic(err)
		}
		signature = make([]byte, 64)
		r.FillBytes(signature[:32])
		s.FillBytes(signature[32:])
	}
	return input + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func accessToken(jti string) string { return mint("ES256", nil, claims(jti)) }

// answer is what a test looks at of a response.
type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) oauthError() string {
	var e struct{ Error string }
	_ = json.Unmarshal([]byte(a.body), &e) // "" will not be what is wanted
	return e.Error
}

// newHTTPClient keeps as many connections as it uses.
func newHTTPClient(t testing.TB) *http.Client {
	transport := &http.Transport{MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

// send sends one request; an error means that there was no answer.
func send(client *http.Client, method, url string, header http.Header, body string) (answer, error) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	req.Header = header.Clone()
	if req.Header == nil {
		req.Header = http.Header{}
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(b)}, err
}

func basic(id, secret string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(url.QueryEscape(id)+":"+url.QueryEscape(secret)))
}

func form(authorization string) http.Header {
	h := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
	if authorization != "" {
		h.Set("Authorization", authorization)
	}
	return h
}

// revoke asks a service to revoke token for the fixed client.
func (s *service) revoke(client *http.Client, token string) (answer, error) {
	return send(client, http.MethodPost, s.base+"/revoke", form(basic(clientID, clientSecret)), "token="+token)
}

func (s *service) mustRevoke(client *http.Client, token string) {
	s.t.Helper()
	a, err := s.revoke(client, token)
	if err != nil || a.status != http.StatusOK {
		s.t.Fatalf("revoke: %+v, %v; want 200", a, err)
	}
}

// await returns when ok does, and fails when the test's patience is over.
func await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	patience := time.NewTimer(60 * time.Second)
	defer patience.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-patience.C:
			t.Fatalf("in vain awaited: %s", what)
		}
	}
}

// awaitProgress is await for what may take long where much is to be done: as long as how far it is changes.
func awaitProgress(t testing.TB, what string, ok func() bool, far func() any) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for last, since := far(), time.Now(); !ok(); <-tick.C {
		if now := far(); now != last {
			last, since = now, time.Now()
		} else if time.Since(since) > 60*time.Second {
			t.Fatalf("in vain awaited: %s, which stays at %v", what, last)
		}
	}
}

// consumer collects the events of rescind.events from a durable queue that outlives
// restarts of the broker.
type consumer struct {
	t   testing.TB
	all bool // bound to every event, so that none is missing

	mu       sync.Mutex
	events   []revocation.Event
	messages []amqp.Delivery
}

// consume binds a queue to key of exchange, and collects what comes until the test
// ends, reconnecting as often as it must.
func (w *world) consume(url, exchange, key string) *consumer {
	w.t.Helper()
	c := &consumer{t: w.t, all: key == "#"}
	const queue = "test"
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	bound := make(chan struct{})
	var once sync.Once
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			c.session(ctx, url, func(ch *amqp.Channel) (string, error) {
				if exchange != "amq.topic" {
					if err := ch.ExchangeDeclare(exchange, "topic", true, false, false, false, nil); err != nil {
						return "", err
					}
				}
				name := queue + " " + key
				if _, err := ch.QueueDeclare(name, true, false, false, false, nil); err != nil {
					return "", err
				}
				return name, ch.QueueBind(name, key, exchange, false, nil)
			}, func() { once.Do(func() { close(bound) }) })
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	w.t.Cleanup(func() { cancel(); <-done })
	select {
	case <-bound:
	case <-time.After(60 * time.Second):
		w.t.Fatal("the consumer could not bind its queue")
	}
	return c
}

func (c *consumer) session(ctx context.Context, url string, declare func(*amqp.Channel) (string, error), bound func()) {
	conn, err := amqp.Dial(url)
	if err != nil {
		return
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	ch, err := conn.Channel()
	if err != nil {
		return
	}
	queue, err := declare(ch)
	if err != nil {
		return
	}
	messages, err := ch.Consume(queue, "", true, false, false, false, nil)
	if err != nil {
		return
	}
	bound()
	for m := range messages {
		e, err := revocation.ParseEvent(m.Body)
		c.mu.Lock()
		c.messages = append(c.messages, m)
		if err == nil {
			c.events = append(c.events, e)
		}
		c.mu.Unlock()
	}
}

// seen returns the subjects of the events so far, each once, after checking that
// seqs come in order but for repeats.
func (c *consumer) seen() map[string]bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	got := make(map[string]bool)
	var last revocation.Seq
	for _, e := range c.events {
		if c.all && e.Seq > last+1 && last > 0 {
			c.t.Errorf("event %d came after %d", e.Seq, last)
		}
		last = max(last, e.Seq)
		got[e.Subject] = true
	}
	return got
}

func (w *world) etcdClient() *clientv3.Client {
	w.t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: w.etcd, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { client.Close() })
	return client
}

// inEtcd returns the identifiers of the directory's entries.
func (w *world) inEtcd(client *clientv3.Client) map[string]bool {
	got := make(map[string]bool)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	resp, err := client.Get(ctx, w.prefix+"/", clientv3.WithPrefix())
	if err != nil {
		return got // the caller asks again
	}
	for _, kv := range resp.Kvs {
		if e, err := directory.Parse(w.prefix, ourISS, string(kv.Key), kv.Value); err == nil {
			got[e.Target.ID] = true
		}
	}
	return got
}

func hasAll(got map[string]bool, want []string) bool {
	return !slices.ContainsFunc(want, func(id string) bool { return !got[id] })
}

// checkLog fails unless the log has no gap and one revocation of each of want, and
// returns how many revocations it has.
func (w *world) checkLog(want []string) int {
	w.t.Helper()
	pool := w.pool()
	rows, err := pool.Query(w.t.Context(), `SELECT CASE WHEN type LIKE 'revocation.%' THEN subject ELSE '' END FROM rescind.log ORDER BY seq`)
	if err != nil {
		w.t.Fatal(err)
	}
	subjects, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		w.t.Fatal(err)
	}
	var head, first, last int
	if err := pool.QueryRow(w.t.Context(), `SELECT h.seq, coalesce(min(l.seq), 1), coalesce(max(l.seq), 0)
		FROM rescind.log_head h LEFT JOIN rescind.log l ON true GROUP BY h.seq`).Scan(&head, &first, &last); err != nil {
		w.t.Fatal(err)
	}
	if last != head || last-first+1 != len(subjects) {
		w.t.Errorf("the log has %d events from %d to %d, its head is %d", len(subjects), first, last, head)
	}
	count := make(map[string]int)
	for _, s := range subjects {
		count[s]++
	}
	for _, id := range want {
		if count[id] != 1 {
			w.t.Errorf("%s was answered 200 and has %d events", id, count[id])
		}
	}
	return len(subjects) - count[""]
}

// events counts the revocations in the log.
func (w *world) events() int {
	w.t.Helper()
	var n int
	conn, err := pgx.Connect(w.t.Context(), w.db.ServiceURL)
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close(w.t.Context())
	err = conn.QueryRow(w.t.Context(), `SELECT count(*) FROM rescind.log WHERE type LIKE 'revocation.%'`).Scan(&n)
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

// readyz returns what the operators' listener says of readiness.
func (s *service) readyz(client *http.Client) (status string, code int) {
	a, err := send(client, http.MethodGet, s.ops+"/readyz", nil, "")
	if err != nil {
		return err.Error(), 0
	}
	var body struct{ Status string }
	_ = json.Unmarshal([]byte(a.body), &body) // "" will not be what is wanted
	return body.Status, a.status
}
