package gateway

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

const (
	iss      = "https://km.example.com"  // the super tenant's own
	otherIss = "https://b.example.com"   // external, of the super tenant too
	jwtIss   = "https://idp.example.com" // external, and has the typ exception
	acmeIss  = iss + "/t/acme.example"   // of the service's own, of another tenant
	audience = "https://api.example.com" //
	client   = "app one"                 // has key mappings with all of them
	epoch    = "0b8ff9b7-4a4d-4a8e-9c53-4d7f7e0c52c5"
)

var acme = revocation.Tenant{ID: 7, Domain: "acme.example"}

// The keys of the tests. Making an RSA key takes long.
var (
	rsaKey   = sync.OnceValue(func() *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, 2048)) })
	ecKey    = newKey()
	otherKey = newKey()
)

func newKey() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func public(kid string, key any) jose.JSONWebKey {
	return jose.JSONWebKey{Key: key, KeyID: kid, Use: "sig"}
}

func jwks(keys ...jose.JSONWebKey) []byte { return must(json.Marshal(jose.JSONWebKeySet{Keys: keys})) }

func keySet(keys ...jose.JSONWebKey) *token.StaticKeySet {
	return must(token.ParseKeySet(jwks(keys...)))
}

// with is a change: members, absent if nil.
type with map[string]any

// claimsOf are those of T1, changed.
func claimsOf(changes with) string {
	now := time.Now().Unix()
	claims := with{
		"iss": iss, "sub": "alice", "client_id": client, "aud": audience, "jti": "at-1", "sid": "s-1", "scope": "read write",
		"iat": now - 60, "exp": now + 600,
	}
	maps.Copy(claims, changes)
	maps.DeleteFunc(claims, func(_ string, value any) bool { return value == nil })
	return string(must(json.Marshal(claims)))
}

// mint makes T1 with ES256, changed. The members of header replace those of T1's.
func mint(key any, header, claims with) string {
	h := with{"typ": "at+jwt", "kid": "ec-1"}
	alg := jose.ES256
	if _, ok := key.(*rsa.PrivateKey); ok {
		alg, h["kid"] = jose.RS256, "rsa-1"
	}
	maps.Copy(h, header)
	maps.DeleteFunc(h, func(_ string, value any) bool { return value == nil })
	opts := &jose.SignerOptions{}
	for name, value := range h {
		opts.WithHeader(jose.HeaderKey(name), value)
	}
	signer := must(jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts))
	return must(must(signer.Sign([]byte(claimsOf(claims)))).CompactSerialize())
}

func t1() string { return mint(ecKey, nil, nil) }

// service is the log of a service, in memory: a source and a feed of a real replica.
type service struct {
	mu       sync.Mutex
	entities map[string]catalog.Entity // by UUID
	records  []replica.Record
	events   []revocation.Event
	silent   bool // it tells nobody how far the log reaches, so what is known of it is of no age
	down     bool

	connected chan struct{} // has one when the replica has caught up
	told      chan told
}

type told struct {
	event revocation.Event
	done  chan error
}

func newService() *service {
	s := &service{entities: make(map[string]catalog.Entity), connected: make(chan struct{}, 1), told: make(chan told)}
	for _, e := range catalogOf() {
		s.entities[e.Base().UUID] = e
	}
	return s
}

var errDown = errors.New("the service is down")

func (s *service) Load(_ context.Context, state *replica.State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return errDown
	}
	return state.Load(revocation.Position{Epoch: epoch, Seq: s.head()}, func(l *replica.Loader) error {
		for _, e := range s.entities {
			l.Entity(e)
		}
		for _, rec := range s.records {
			l.Revocation(rec)
		}
		return nil
	})
}

func (s *service) head() revocation.Seq { return revocation.Seq(len(s.events) + 1) }

func (s *service) Events(_ context.Context, after revocation.Position) (replica.Page, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.down:
		return replica.Page{}, errDown
	case after.Epoch != epoch || after.Seq < 1:
		return replica.Page{}, replica.ErrGone
	}
	p := replica.Page{Events: s.events[after.Seq-1:], Through: s.head(), Head: s.head()}
	if s.silent {
		p.Head = 0
	}
	return p, nil
}

func (s *service) Name() string { return "test" }

func (s *service) Follow(ctx context.Context, _ func() revocation.Position, to replica.Receiver) error {
	if err := to.Connected(ctx); err != nil {
		return err
	}
	select {
	case s.connected <- struct{}{}:
	default:
	}
	for {
		select {
		case t := <-s.told:
			err := to.Event(ctx, t.event)
			t.done <- err
			if err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// tell makes something happen, and returns when the replica has applied it.
func (s *service) tell(t testing.TB, e revocation.Event) {
	t.Helper()
	s.mu.Lock()
	e.Position = revocation.Position{Epoch: epoch, Seq: s.head() + 1}
	e.Source, e.Time, e.Previous = iss, time.Now(), e.Seq-1
	s.events = append(s.events, e)
	s.mu.Unlock()
	done := make(chan error, 1)
	select {
	case s.told <- told{e, done}:
	case <-t.Context().Done():
		t.Fatal("nobody follows the log")
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func (s *service) change(t testing.TB, verb catalog.Verb, e catalog.Entity) {
	t.Helper()
	e.Base().Timestamp++
	s.tell(t, must(catalog.NewEvent(catalog.Change{Verb: verb, Entity: e})))
}

func (s *service) revoke(t testing.TB, kind revocation.Kind, iss, id string, notAfter int64) {
	t.Helper()
	rec := revocation.Revocation{
		ID: uuidOf(900), Target: revocation.Target{Kind: kind, Iss: iss, ID: id}, Tenant: revocation.SuperTenant,
		Exp: time.Now().Unix() + 3600, Reason: "test",
	}
	if kind.HasTime() {
		rec.NotAfter = notAfter
	}
	if id == acme.Domain {
		rec.Tenant = acme
	}
	s.tell(t, must(revocation.NewEvent(rec)))
}

func uuidOf(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }

func meta(n int) catalog.Meta {
	return catalog.Meta{ID: int32(n), UUID: uuidOf(n), Tenant: revocation.SuperTenant, Timestamp: 1}
}

func manager(n int, iss string) *catalog.KeyManager {
	return &catalog.KeyManager{
		Meta: meta(n), Name: fmt.Sprint("km", n), Type: "default", Enabled: true, Iss: iss, MaxTokenLifetime: 3600, TokenType: "DIRECT",
	}
}

// catalogOf is the catalog of the tests: an API of the super tenant, to which an application is
// subscribed that has the same consumer key at three issuers.
func catalogOf() []catalog.Entity {
	own, other, idp := manager(10, iss), manager(11, otherIss), manager(12, jwtIss)
	own.Resident = true
	other.JWKSURI = "https://b.example.com/jwks"
	idp.JWKSURI, idp.AllowTyp = "https://idp.example.com/jwks", []string{"JWT"}
	super := &catalog.Tenant{Meta: meta(1)}
	super.ID = revocation.SuperTenant.ID
	app := catalog.Ref{ID: 40, UUID: uuidOf(40)}
	list := []catalog.Entity{
		super, own, other, idp,
		&catalog.Policy{Meta: meta(20), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount"},
		&catalog.Policy{Meta: meta(21), Kind: catalog.PolicyApplication, Name: "Large", QuotaType: "requestCount"},
		&catalog.API{
			Meta: meta(30), Name: "Shop", Version: "1.0.0", Context: "/shop/1.0.0", Provider: "admin", Type: "HTTP", Status: catalog.APIPublished,
			Operations: []catalog.Operation{
				{Target: "/orders", Verb: "GET", AuthType: "Any"},
				{Target: "/orders", Verb: "POST", AuthType: "Any", Scopes: []string{"order", "admin"}},
				{Target: "/menu", Verb: "GET", AuthType: "None"},
			},
		},
		&catalog.Application{Meta: meta(40), Name: "Till №1", Owner: "bob", Policy: "Large", TokenType: "JWT"},
		&catalog.Subscription{
			Meta: meta(50), Application: app, API: catalog.Ref{ID: 30, UUID: uuidOf(30)}, Policy: "Gold", State: catalog.Unblocked,
		},
	}
	for n, m := range []*catalog.KeyManager{own, other, idp} {
		list = append(list, &catalog.KeyMapping{
			Meta: meta(60 + n), Application: app, ConsumerKey: client, KeyType: catalog.Production, KeyManager: m.Name, Iss: m.Iss,
		})
	}
	return list
}

// fetched changes key managers so that their keys are fetched from k.
func (s *service) fetched(k *keyServer) *service {
	for n, path := range map[int]string{11: "/b/jwks", 12: "/idp/jwks"} {
		m := s.manager(n)
		m.JWKSURI = k.URL + path
		s.entities[m.UUID] = m
	}
	return s
}

func (s *service) manager(n int) *catalog.KeyManager {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := *s.entities[uuidOf(n)].(*catalog.KeyManager)
	return &m
}

// configured are issuers whose keys the gateway was given.
func configured() []token.Issuer {
	return []token.Issuer{
		{Iss: iss, Keys: keySet(public("ec-1", ecKey.Public()), public("rsa-1", rsaKey().Public()))},
		{Iss: otherIss, Keys: keySet(public("ec-2", otherKey.Public()))},
		{Iss: jwtIss, Keys: keySet(public("ec-1", ecKey.Public())), AllowTypes: []string{"JWT"}},
	}
}

// journal is what was logged. Fetches end, and tell how, when they like.
type journal struct {
	mu sync.Mutex
	b  strings.Builder
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.String()
}

// world is a gateway with a service and something behind it.
type world struct {
	*Gateway
	service *service
	server  *http.Server
	conns   pipes
	behind  atomic.Pointer[http.Request] // the last request that was passed on
	stop    func()                       // ends Run
}

// start runs a gateway until the test ends, and returns when it knows what the service does.
func start(t testing.TB, s *service, rc replica.Config, gc Config) *world {
	t.Helper()
	if rc.Source == nil {
		rc.Source = s
	}
	w := &world{service: s, conns: pipes{make(chan net.Conn), make(chan struct{})}}
	gc.Replica = must(replica.New(rc))
	if len(gc.Audiences) == 0 {
		gc.Audiences = []string{audience}
	}
	if gc.URL == "" && gc.Issuers == nil {
		gc.Issuers = configured()
	}
	w.Gateway = must(New(gc))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	w.server = &http.Server{Handler: w.Handler(http.HandlerFunc(w.backend))}
	go func() { _ = w.server.Serve(w.conns) }()
	w.stop = sync.OnceFunc(func() {
		_ = w.server.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	t.Cleanup(w.stop)
	if !s.down {
		<-s.connected
		w.issuers.refresh() // which Run would do within a second
	}
	return w
}

func (w *world) backend(rw http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	w.behind.Store(r)
	_, _ = io.WriteString(rw, "passed on")
}

// pipes is a listener in memory, which a bubble of synctest can wait for.
type pipes struct {
	conns chan net.Conn
	ended chan struct{}
}

func (p pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}

func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p pipes) Close() error {
	close(p.ended)
	return nil
}

// answer is what came back, and what was passed on, nil if nothing was.
type answer struct {
	status int
	header http.Header
	body   string
	behind *http.Request
}

// send sends a request just as it is written here, with \n for CRLF.
func (w *world) send(t testing.TB, request string) answer {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	w.conns.conns <- far
	w.behind.Store(nil)
	go func() { _, _ = io.WriteString(near, strings.ReplaceAll(request, "\n", "\r\n")) }() // the end of the connection ends it
	resp, err := http.ReadResponse(bufio.NewReader(near), nil)
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	body := must(io.ReadAll(resp.Body))
	return answer{resp.StatusCode, resp.Header, string(body), w.behind.Load()}
}

// get asks for what needs any token with these header fields.
func (w *world) get(t testing.TB, fields ...string) answer {
	t.Helper()
	return w.send(t, "GET /shop/1.0.0/orders HTTP/1.1\nHost: a\nConnection: close\n"+strings.Join(append(fields, "\n"), "\n"))
}

func bearing(compact string) string { return "Authorization: Bearer " + compact }

const (
	bareChallenge    = `Bearer realm="api"`
	invalidChallenge = `Bearer realm="api", error="invalid_token"`
	invalidBody      = `{"code":"900901","message":"Invalid Credentials","description":"Make sure you have provided the correct security credentials"}`
)

// accepted and refused check what became of T1 or another token.
func (w *world) accepted(t testing.TB, name, compact string) {
	t.Helper()
	if got := w.get(t, bearing(compact)); got.status != 200 || got.behind == nil {
		t.Errorf("%s: %d %s %s, want it accepted", name, got.status, got.header, got.body)
	}
}

func (w *world) refused(t testing.TB, name, compact string) {
	t.Helper()
	got := w.get(t, bearing(compact))
	if got.status != 401 || got.header.Get("WWW-Authenticate") != invalidChallenge || got.body != invalidBody || got.behind != nil {
		t.Errorf("%s: %d %s %s, want the refusal that all have", name, got.status, got.header, got.body)
	}
}

// keyServer serves key sets by path, and counts requests.
type keyServer struct {
	*httptest.Server
	mu       sync.Mutex
	sets     map[string][]byte
	requests map[string]int
}

func newKeyServer(t testing.TB) *keyServer {
	k := &keyServer{sets: make(map[string][]byte), requests: make(map[string]int)}
	k.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.mu.Lock()
		k.requests[r.URL.Path]++
		set := k.sets[r.URL.Path]
		k.mu.Unlock()
		if set == nil {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(set)
	}))
	t.Cleanup(k.Close)
	return k
}

func (k *keyServer) serve(path string, keys ...jose.JSONWebKey) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sets[path] = jwks(keys...)
}

func (k *keyServer) count(path string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.requests[path]
}
