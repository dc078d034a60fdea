package sidecar

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v4"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/devstack"
)

// proxies run the configurations that users copy, as they are but for addresses.
var proxies = []struct {
	name string
	// command writes into dir what the program needs, for a listener, a gateway and a backend at these addresses.
	command func(t testing.TB, dir, listen, gateway, backend string) *exec.Cmd
	away    int // the status while the gateway does not answer
}{
	{name: "nginx", command: nginx, away: http.StatusServiceUnavailable},
	{name: "caddy", command: caddy, away: http.StatusBadGateway},
}

// nginx runs nginx.conf in the level http, as the packages do with what is in conf.d.
func nginx(t testing.TB, dir, listen, gateway, backend string) *exec.Cmd {
	t.Helper()
	example(t, "nginx.conf", filepath.Join(dir, "rescind.conf"),
		"server 127.0.0.1:8081;", "server "+gateway+";",
		"server 127.0.0.1:9000;", "server "+backend+";",
		"listen 8080;", "listen "+listen+";")
	config := `daemon off;
pid nginx.pid;
events {}
http {
	access_log off;
	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	include rescind.conf;
}
`
	if os.Geteuid() == 0 {
		config = "user root;\n" + config // or its workers could not enter the folder
	}
	writeFile(t, filepath.Join(dir, "nginx.conf"), config)
	return exec.Command(program(t, "nginx"), "-p", dir, "-c", "nginx.conf", "-e", "stderr")
}

func caddy(t testing.TB, dir, listen, gateway, backend string) *exec.Cmd {
	t.Helper()
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "Caddyfile"), "{\n\tadmin off\n}\nimport rescind\n") // the port of its API is the same for all
	example(t, "Caddyfile", filepath.Join(dir, "rescind"),
		"forward_auth 127.0.0.1:8081", "forward_auth "+gateway,
		"reverse_proxy 127.0.0.1:9000", "reverse_proxy "+backend,
		"\n:8080 {", "\n:"+port+" {\n\tbind "+host)
	cmd := exec.Command(program(t, "caddy"), "run", "--config", "Caddyfile", "--adapter", "caddyfile")
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
	return cmd
}

// example writes a file of api/examples/gateway to path, with pairs of a text that must be there once and what is put in its place.
func example(t testing.TB, name, path string, pairs ...string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../api/examples/gateway", name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for pair := range slices.Chunk(pairs, 2) {
		if n := strings.Count(text, pair[0]); n != 1 {
			t.Fatalf("%s has %q %d times, want once", name, pair[0], n)
		}
		text = strings.Replace(text, pair[0], pair[1], 1)
	}
	writeFile(t, path, text)
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// program is the path of a proxy's program. What is not there is installed, for all tests of this process at once.
func program(t testing.TB, name string) string {
	t.Helper()
	if err := installProxies(); err != nil {
		t.Fatal(err)
	}
	path, ok := findProgram(name)
	if !ok {
		t.Fatalf("the package %s has brought no program of that name", name)
	}
	return path
}

var installProxies = sync.OnceValue(func() error {
	var missing []string
	for _, name := range []string{"nginx", "caddy"} {
		if _, ok := findProgram(name); !ok {
			missing = append(missing, name) // the packages have the same names, on Debian and Ubuntu
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return devstack.InstallPackages(context.Background(), os.Stderr, missing...)
})

func findProgram(name string) (path string, ok bool) {
	for _, name := range []string{name, "/usr/sbin/" + name} { // sbin is not in everybody's PATH
		if path, err := exec.LookPath(name); err == nil {
			return path, true
		}
	}
	return "", false
}

// untilParentEnds runs its arguments, and ends them when file 3 ends: with this process, however that ends.
const untilParentEnds = `"$@" 3<&- & pid=$!; { read -r _; kill $pid; } <&3 >/dev/null 2>&1 & exec 3<&-; wait $pid`

// startProxy starts a proxy and returns its address once it answers there.
func startProxy(t testing.TB, command func(t testing.TB, dir, listen, gateway, backend string) *exec.Cmd, gateway, backend string) string {
	t.Helper()
	for attempt := 1; ; attempt++ {
		dir := t.TempDir()
		// Proxies take no listener that is there already, so another process may get the port before them.
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listen := l.Addr().String()
		l.Close()
		output, err := os.Create(filepath.Join(dir, "output"))
		if err != nil {
			t.Fatal(err)
		}
		lifeline, ours, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd := command(t, dir, listen, gateway, backend)
		sh := exec.Command("sh", append([]string{"-c", untilParentEnds, "sh"}, cmd.Args...)...)
		sh.Dir, sh.Env, sh.Stdout, sh.Stderr, sh.ExtraFiles = dir, cmd.Env, output, output, []*os.File{lifeline}
		err = sh.Start()
		lifeline.Close()
		output.Close()
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		var result error
		go func() {
			result = sh.Wait()
			close(ended)
		}()
		said := func() string {
			b, _ := os.ReadFile(output.Name())
			return string(b)
		}
		t.Cleanup(func() {
			ours.Close()
			<-ended
			if t.Failed() {
				t.Logf("%s said:\n%s", cmd.Path, said())
			}
		})
		err = answers(t.Context(), listen, ended)
		if err == nil {
			return listen
		}
		if attempt == 5 || !strings.Contains(strings.ToLower(said()), "address already in use") {
			t.Fatalf("%s does not answer at %s: %v (%v)\n%s", cmd.Path, listen, err, result, said())
		}
	}
}

// answers waits until somebody listens at an address, or a process has ended.
func answers(ctx context.Context, address string, ended <-chan struct{}) error {
	return eventually(ctx, ended, func() bool {
		c, err := net.Dial("tcp", address)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// eventually waits until something is true, unless ended is closed before.
func eventually(ctx context.Context, ended <-chan struct{}, is func() bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("not within 30 s"))
	defer cancel()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for !is() {
		select {
		case <-ended:
			return errors.New("it has ended")
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-again.C:
		}
	}
	return nil
}

// backend keeps what reaches it, by the field X-Case.
type backend struct {
	address string
	mu      sync.Mutex
	seen    map[string]seen
}

// seen is a request as it came.
type seen struct {
	Method, Target string
	Header         http.Header
	Trailer        http.Header
	Body           string
}

// fromBackend is the status of all its answers, and of no other ones.
const fromBackend = http.StatusNonAuthoritativeInfo

func newBackend(t testing.TB) *backend {
	b := &backend{seen: map[string]seen{}}
	s := httptest.NewServer(b)
	t.Cleanup(s.Close)
	b.address = s.Listener.Addr().String()
	return b
}

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		body = []byte(err.Error())
	}
	b.mu.Lock()
	b.seen[r.Header.Get("X-Case")] = seen{r.Method, r.RequestURI, r.Header, r.Trailer, string(body)}
	b.mu.Unlock()
	w.WriteHeader(fromBackend)
}

func (b *backend) of(id string) (seen, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, ok := b.seen[id]
	return s, ok
}

// What the world's catalog has.
const (
	worldIssuer  = "https://issuer.example"
	worldGateway = "https://api.example.com"
	menuPath     = "/pizzashack/1.0.0/menu"   // GET, for everybody with a subscription
	ordersPath   = "/pizzashack/1.0.0/orders" // GET and POST, with the scope orders
	helloPath    = "/pizzashack/1.0.0/hello"  // GET, without a token too
	blockedPath  = "/old/1.0.0/menu"          // of an API that is blocked
)

// world is a gateway that knows a small catalog, and follows a log that is there for it alone.
type world struct {
	*live
	key    *ecdsa.PrivateKey
	tokens map[string]string // by what they are good for

	epoch  revocation.Epoch
	mu     sync.Mutex
	events []revocation.Event
	added  chan struct{}
}

func newWorld(t testing.TB) *world {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := token.ParseKeySet(fmt.Appendf(nil, `{"keys":[{"kty":"EC","crv":"P-256","kid":"k","alg":"ES256","use":"sig","x":%q,"y":%q}]}`,
		base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:])))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{key: key, epoch: "0b6e3ce4-6d2c-4a52-9a34-1d0f5a1c7a11", added: make(chan struct{}, 1)}
	log := slog.New(slog.DiscardHandler)
	r, err := replica.New(replica.Config{Source: w, Feeds: []replica.Feed{w}, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(gateway.Config{
		Replica: r, Audiences: []string{worldGateway}, Logger: log,
		Issuers: []token.Issuer{{Iss: worldIssuer, Tenant: revocation.SuperTenant, Keys: keys, Algorithms: []string{"ES256"}, MaxLifetime: time.Hour}},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.live = &live{Gateway: g, replica: r}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := w.Run(ctx); err != nil {
			t.Errorf("run the gateway: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	if err := eventually(t.Context(), ended, w.Ready); err != nil {
		t.Fatalf("the gateway is not ready: %v; %+v", err, w.Status())
	}
	w.tokens = map[string]string{
		"valid":    w.token(t, "1", "menu orders"),
		"unscoped": w.token(t, "2", "menu"),
		"revoked":  w.token(t, "3", "menu orders"),
	}
	w.revoke(t, "3")
	return w
}

// token makes a token of the subscribed application.
func (w *world) token(t testing.TB, jti, scope string) string {
	t.Helper()
	now := time.Now().Unix()
	claims, err := json.Marshal(map[string]any{
		"iss": worldIssuer, "sub": `Zoë "{x}", 1%`, "aud": worldGateway, "client_id": "pizza-key", "azp": "pizza-key",
		"jti": jti, "scope": scope, "iat": now, "exp": now + 900,
	})
	if err != nil {
		t.Fatal(err)
	}
	signed := base64.RawURLEncoding.EncodeToString([]byte(`{"typ":"at+jwt","alg":"ES256","kid":"k"}`)) + "." + base64.RawURLEncoding.EncodeToString(claims)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, w.key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// revoke returns once the gateway has heard of it.
func (w *world) revoke(t testing.TB, jti string) {
	t.Helper()
	now := time.Now()
	e, err := revocation.NewEvent(revocation.Revocation{
		ID: "01930000-0000-7000-8000-000000000001", Target: revocation.Target{Kind: revocation.KindToken, Iss: worldIssuer, ID: jti},
		Tenant: revocation.SuperTenant, Exp: now.Unix() + 900,
	})
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	e.Position, e.Previous, e.Source, e.Time = revocation.Position{Epoch: w.epoch, Seq: w.head() + 1}, w.head(), worldIssuer, now
	w.events = append(w.events, e)
	w.mu.Unlock()
	w.added <- struct{}{}
	if err := eventually(t.Context(), nil, func() bool { return w.replica.State().At() == e.Position }); err != nil {
		t.Fatalf("the gateway has not heard of seq %d: %v", e.Seq, err)
	}
}

// head is where the log ends. It needs w.mu.
func (w *world) head() revocation.Seq { return 1 + revocation.Seq(len(w.events)) }

// Load implements [replica.Source].
func (w *world) Load(_ context.Context, s *replica.State) error {
	meta := func(id int32) catalog.Meta {
		return catalog.Meta{ID: id, UUID: fmt.Sprintf("00000000-0000-4000-8000-%012d", id), Tenant: revocation.SuperTenant, Timestamp: 1}
	}
	ref := func(id int32) catalog.Ref { return catalog.Ref{ID: id, UUID: meta(id).UUID} }
	const every = "Any"
	return s.Load(revocation.Position{Epoch: w.epoch, Seq: 1}, func(l *replica.Loader) error {
		for _, e := range []catalog.Entity{
			&catalog.KeyManager{Meta: meta(10), Name: "Issuer", Type: "default", Enabled: true, Iss: worldIssuer, MaxTokenLifetime: 3600, TokenType: "DIRECT"},
			&catalog.Policy{Meta: meta(1), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount"},
			&catalog.Policy{Meta: meta(2), Kind: catalog.PolicyApplication, Name: "Unlimited", QuotaType: "requestCount"},
			&catalog.Policy{Meta: meta(3), Kind: catalog.PolicyAPI, Name: "Unlimited", QuotaType: "requestCount", Level: "apiLevel"},
			&catalog.API{
				Meta: meta(4), Name: "PizzaShack", Version: "1.0.0", Context: "/pizzashack/1.0.0", Provider: "admin", Type: "HTTP", Status: catalog.APIPublished,
				Operations: []catalog.Operation{
					{Target: "/menu", Verb: "GET", AuthType: every}, {Target: "/menu/*", Verb: "GET", AuthType: every},
					{Target: "/orders", Verb: "GET", AuthType: every, Scopes: []string{"orders"}},
					{Target: "/orders", Verb: "POST", AuthType: every, Scopes: []string{"orders"}},
					{Target: "/hello", Verb: "GET", AuthType: "None"},
				},
			},
			&catalog.API{Meta: meta(5), Name: "Old", Version: "1.0.0", Context: "/old/1.0.0", Provider: "admin", Type: "HTTP", Status: catalog.APIBlocked},
			&catalog.Application{Meta: meta(6), Name: "Pizza for Zoë", Owner: "zoe", Policy: "Unlimited", TokenType: "JWT"},
			&catalog.KeyMapping{Meta: meta(7), Application: ref(6), ConsumerKey: "pizza-key", KeyType: catalog.Production, KeyManager: "Resident", Iss: worldIssuer},
			&catalog.Subscription{Meta: meta(8), Application: ref(6), API: ref(4), Policy: "Gold", State: catalog.Unblocked},
			&catalog.Subscription{Meta: meta(9), Application: ref(6), API: ref(5), Policy: "Gold", State: catalog.Unblocked},
		} {
			l.Entity(e)
		}
		return nil
	})
}

// Events implements [replica.Source].
func (w *world) Events(_ context.Context, after revocation.Position) (replica.Page, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return replica.Page{Events: slices.Clone(w.events[after.Seq-1:]), Through: w.head(), Head: w.head()}, nil
}

// Name implements [replica.Feed].
func (w *world) Name() string { return "test" }

// Follow implements [replica.Feed].
func (w *world) Follow(ctx context.Context, at func() revocation.Position, to replica.Receiver) error {
	if err := to.Connected(ctx); err != nil {
		return err
	}
	beat := time.NewTicker(time.Second)
	defer beat.Stop()
	for {
		w.mu.Lock()
		events := slices.Clone(w.events[at().Seq-1:])
		w.mu.Unlock()
		for _, e := range events {
			if err := to.Event(ctx, e); err != nil {
				return err
			}
		}
		if err := to.Heartbeat(ctx, replica.Beat{Position: at(), Head: at().Seq, Time: time.Now()}); err != nil {
			return err
		}
		select {
		case <-w.added:
		case <-beat.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// identity are the fields of h that tell, or pretend to tell, who calls.
func identity(h http.Header) http.Header {
	of := http.Header{}
	for name, values := range h {
		if strings.Contains(strings.ToLower(name), "rescind") {
			of[name] = values
		}
	}
	return of
}

// identityOf is what a backend is to be told of a request.
func (w *world) identityOf(t testing.TB, target, bearer string) http.Header {
	t.Helper()
	r := gateway.Request{Method: "GET", Target: target}
	if bearer != "" {
		r.Authorization = []string{"Bearer " + w.tokens[bearer]}
	}
	d := w.Decide(t.Context(), r)
	if !d.Allowed {
		t.Fatalf("%s is refused: %s", target, d.Reason)
	}
	h := http.Header{}
	d.SetIdentity(h)
	return h
}

// raw is a request as it is on the wire: net/http would send no other path than a clean one.
type raw struct {
	method, target string // if empty, GET and menuPath
	bearer         string // the name of one of the world's tokens, if not empty
	header         []string
	body           string
	chunked        bool
	trailer        string // of a chunked body
}

// proxySetup is a proxy between a client and a backend, beside a gateway.
type proxySetup struct {
	*world
	backend *backend
	address string // of the proxy
	away    int
	gateway *http.Server

	asked       atomic.Int64 // questions that the gateway got
	bodies      atomic.Int64 // bytes of their bodies
	connections atomic.Int64 // on which they came
	last        int          // the last case
	passed      []string     // cases that were to reach the backend
}

func newProxySetup(t testing.TB, p int) *proxySetup {
	t.Helper()
	s := &proxySetup{world: newWorld(t), backend: newBackend(t), away: proxies[p].away}
	log := slog.New(slog.DiscardHandler)
	m := newMetrics(prometheus.NewRegistry(), s.live)
	auth := newForwardAuth(newCounted(s.live, 1000, m), m, log)
	s.gateway = newServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		s.bodies.Add(n)
		s.asked.Add(1)
		auth.ServeHTTP(w, r)
	}), log)
	s.gateway.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.connections.Add(1)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.gateway.Serve(l) }()
	t.Cleanup(func() {
		s.gateway.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	s.address = startProxy(t, proxies[p].command, l.Addr().String(), s.backend.address)
	return s
}

// send returns the answer to r, and its case.
func (s *proxySetup) send(t testing.TB, r raw) (resp *http.Response, body, id string) {
	t.Helper()
	s.last++
	id = strconv.Itoa(s.last)
	method := cmp.Or(r.method, "GET")
	var text bytes.Buffer
	fmt.Fprintf(&text, "%s %s HTTP/1.1\r\nHost: api.example.com\r\nX-Case: %s\r\n", method, cmp.Or(r.target, menuPath), id)
	if r.bearer != "" {
		fmt.Fprintf(&text, "Authorization: Bearer %s\r\n", s.tokens[r.bearer])
	}
	for _, line := range r.header {
		text.WriteString(line + "\r\n")
	}
	switch {
	case r.chunked:
		fmt.Fprintf(&text, "Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n%s\r\n", len(r.body), r.body, r.trailer)
	case r.body != "":
		fmt.Fprintf(&text, "Content-Length: %d\r\n\r\n%s", len(r.body), r.body)
	default:
		text.WriteString("\r\n")
	}
	c, err := net.Dial("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(text.Bytes()); err != nil {
		t.Fatal(err)
	}
	resp, err = http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%.100q: %v", text.String(), err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b), id
}

// passes sends what must reach the backend, and returns what did.
func (s *proxySetup) passes(t testing.TB, r raw) seen {
	t.Helper()
	resp, body, id := s.send(t, r)
	s.passed = append(s.passed, id)
	got, ok := s.backend.of(id)
	if !ok || resp.StatusCode != fromBackend {
		t.Fatalf("%.200v is answered %d %.200q, want the backend's answer", r, resp.StatusCode, body)
	}
	return got
}

// refused sends what must not reach the backend, and returns the answer.
func (s *proxySetup) refused(t testing.TB, r raw) (*http.Response, string) {
	t.Helper()
	resp, body, id := s.send(t, r)
	if got, ok := s.backend.of(id); ok || resp.StatusCode < 400 {
		t.Errorf("%.200v is answered %d, and the backend got %q: want a refusal", r, resp.StatusCode, got.Target)
	}
	return resp, body
}

func TestProxies(t *testing.T) {
	t.Parallel()
	for i, p := range proxies {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			s := newProxySetup(t, i)
			t.Run("Refusals", s.testRefusals)
			t.Run("Identity", s.testIdentity)
			t.Run("Targets", s.testTargets)
			t.Run("AmbiguousTargets", s.testAmbiguousTargets)
			t.Run("OtherRequests", s.testOtherRequests)
			t.Run("Bodies", s.testBodies)
			t.Run("Revoked", s.testRevoked)
			// A worker has a connection for each question that is under way at once, and these come one by one.
			if n := s.connections.Load(); s.asked.Load() < 100 || n > 4 {
				t.Errorf("%d questions came on %d connections, want many on a few", s.asked.Load(), n)
			}
			if n := s.bodies.Load(); n != 0 {
				t.Errorf("the gateway got %d bytes of the requests' bodies", n)
			}
			t.Run("GatewayAway", s.testGatewayAway)
			for id, got := range s.backend.seen {
				if !slices.Contains(s.passed, id) {
					t.Errorf("the backend got case %s: %+v", id, got)
				}
			}
		})
	}
}

// Clients get a refusal just as the gateway makes it.
func (s *proxySetup) testRefusals(t *testing.T) {
	type answer struct {
		Status                                      int
		Challenge                                   []string
		ContentType, CacheControl, RetryAfter, Body string
	}
	for name, r := range map[string]raw{
		"no token":          {},
		"another scheme":    {header: []string{"Authorization: Basic dTpw"}},
		"no JWT":            {header: []string{"Authorization: Bearer x"}},
		"revoked":           {bearer: "revoked"},
		"scope":             {bearer: "unscoped", target: ordersPath},
		"scope of POST":     {bearer: "unscoped", target: ordersPath, method: "POST", body: "{}"},
		"unknown API":       {bearer: "valid", target: "/nothing"},
		"unknown operation": {bearer: "valid", target: ordersPath, method: "PATCH"},
		"blocked API":       {bearer: "valid", target: blockedPath},
		"ambiguous":         {bearer: "valid", target: "/pizzashack//1.0.0/menu"},
		"HEAD":              {bearer: "revoked", method: "HEAD"},
		"two tokens in one": {header: []string{"Authorization: Bearer " + s.tokens["valid"] + ", Bearer " + s.tokens["valid"]}},
	} {
		question := gateway.Request{Method: cmp.Or(r.method, "GET"), Target: cmp.Or(r.target, menuPath)}
		if r.bearer != "" {
			question.Authorization = append(question.Authorization, "Bearer "+s.tokens[r.bearer])
		}
		for _, line := range r.header {
			_, value, _ := strings.Cut(line, ": ")
			question.Authorization = append(question.Authorization, value)
		}
		made := httptest.NewRecorder()
		s.Decide(t.Context(), question).WriteError(made)
		want := answer{
			made.Code, made.Header()["Www-Authenticate"],
			made.Header().Get("Content-Type"), made.Header().Get("Cache-Control"), made.Header().Get("Retry-After"), made.Body.String(),
		}
		if question.Method == "HEAD" {
			want.Body = ""
		}
		resp, body := s.refused(t, r)
		got := answer{
			resp.StatusCode, resp.Header["Www-Authenticate"],
			resp.Header.Get("Content-Type"), resp.Header.Get("Cache-Control"), resp.Header.Get("Retry-After"), body,
		}
		if diff := gocmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if wrong := identity(resp.Header); len(wrong) > 0 {
			t.Errorf("%s: the client is told %v", name, wrong)
		}
	}
	// Of two tokens, one would be checked and the other one used; nginx refuses them by itself.
	for _, pair := range [][2]string{{"valid", "valid"}, {"valid", "revoked"}, {"revoked", "valid"}} {
		s.refused(t, raw{bearer: pair[0], header: []string{"Authorization: Bearer " + s.tokens[pair[1]]}})
	}
	// The kinds of refusals, so that the comparison is not one of nothing with nothing.
	for _, tt := range []struct {
		r               raw
		status          int
		challenge, code string
	}{
		{raw{}, 401, `Bearer realm="api"`, "900902"},
		{raw{bearer: "revoked"}, 401, `Bearer realm="api", error="invalid_token"`, "900901"},
		{raw{bearer: "unscoped", target: ordersPath}, 403, `Bearer realm="api", error="insufficient_scope", scope="orders"`, "900910"},
		{raw{bearer: "valid", target: "/nothing"}, 403, "", "900908"},
		{raw{bearer: "valid", target: blockedPath}, 503, "", "700700"},
		{raw{bearer: "valid", target: "/pizzashack//1.0.0/menu"}, 400, "", ""},
	} {
		resp, body := s.refused(t, tt.r)
		var problem struct{ Code string }
		if err := json.Unmarshal([]byte(body), &problem); err != nil {
			t.Errorf("%+v is answered %q: %v", tt.r, body, err)
		}
		if challenge := resp.Header.Get("WWW-Authenticate"); resp.StatusCode != tt.status || challenge != tt.challenge || tt.code != "" && problem.Code != tt.code {
			t.Errorf("%+v is answered %d, %q, %s", tt.r, resp.StatusCode, challenge, body)
		}
	}
}

// Backends get just the identity headers of the request's own token.
func (s *proxySetup) testIdentity(t *testing.T) {
	want := s.identityOf(t, menuPath, "valid")
	for _, name := range gateway.IdentityHeaders {
		if want.Get(name) == "" {
			t.Fatalf("the gateway does not set %s, so this shows nothing", name)
		}
	}
	open := s.identityOf(t, helloPath, "")
	if open.Get("X-Rescind-Subject") != "" {
		t.Fatalf("somebody without a token is %v", open)
	}
	s.tokens["large"] = s.token(t, "5", strings.Repeat("a-scope-of-30-characters------ ", 360))
	large := s.identityOf(t, menuPath, "large")
	if got := identity(s.passes(t, raw{bearer: "large"}).Header); !gocmp.Equal(large, got) {
		t.Errorf("of a large token (-want +got):\n%s", gocmp.Diff(large, got))
	}
	for _, name := range gateway.IdentityHeaders {
		middle := strings.TrimPrefix(name, "X-Rescind-")
		under, dots := strings.ReplaceAll(name, "-", "_"), strings.ReplaceAll(name, "-", ".")
		for _, header := range [][]string{
			nil,
			{name + ": forged"},
			{strings.ToLower(name) + ": forged"},
			{strings.ToUpper(name) + ": forged"},
			{name + ":"},
			{name + ": forged", name + ": twice"},
			{name + ": forged", strings.ToLower(name) + ": twice"},
			{under + ": forged"},
			{strings.ToLower(under) + ": forged"},
			{"X_Rescind-" + middle + ": forged"},
			{"X-Rescind_" + middle + ": forged"},
			{"X-Rescind-" + strings.ReplaceAll(middle, "-", "_") + "_: forged"},
			{dots + ": forged"},
			{"X.Rescind-" + middle + ": forged"},
			{"Connection: " + name},
			{"Connection: close, " + strings.ToLower(name), name + ": forged"},
			{"Connection: keep-alive", "Connection: " + name},
			{"Connection: Upgrade, " + name, "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", name + ": forged"},
			{"Keep-Alive: " + name, "Proxy-Connection: " + name},
		} {
			if got := identity(s.passes(t, raw{bearer: "valid", header: header}).Header); !gocmp.Equal(want, got) {
				t.Errorf("%q (-want +got):\n%s", header, gocmp.Diff(want, got))
			}
			if got := identity(s.passes(t, raw{target: helloPath, header: header}).Header); !gocmp.Equal(open, got) {
				t.Errorf("%q without a token (-want +got):\n%s", header, gocmp.Diff(open, got))
			}
		}
	}
}

// What is authorised is what is forwarded, byte by byte.
func (s *proxySetup) testTargets(t *testing.T) {
	for _, target := range []string{
		menuPath, menuPath + "?", menuPath + "/a/", menuPath + "/a+b", menuPath + "/caf%C3%A9%20x", menuPath + "/caf%c3%a9", menuPath + "/a%40b",
		menuPath + "/a:b@c!$&'()*+,=~-._", menuPath + "/.a", menuPath + "/a..b", menuPath + "/...", menuPath + "/" + strings.Repeat("a", 4000),
		menuPath + "?a=%2F..%2f&b=%00+%20;c&&d=//../..//&e=%252e&f=http://x/?y", menuPath + "?a=/../" + ordersPath,
	} {
		if got := s.passes(t, raw{bearer: "valid", target: target}); got.Target != target || got.Method != "GET" {
			t.Errorf("the backend got %s %q, want GET %q", got.Method, got.Target, target)
		}
	}
	for _, host := range []string{"http://api.example.com", "http://other.example.com"} {
		if got := s.passes(t, raw{bearer: "valid", target: host + menuPath + "?a=b"}); got.Target != menuPath+"?a=b" {
			t.Errorf("with an absolute target, the backend got %q", got.Target)
		}
	}
}

// What does not mean the same to everyone never reaches a backend.
func (s *proxySetup) testAmbiguousTargets(t *testing.T) {
	for _, target := range []string{
		"/pizzashack/1.0.0/../1.0.0/menu", menuPath + "/..", menuPath + "/../orders", menuPath + "/.", "/./pizzashack/1.0.0/menu", "/..", "/../../pizzashack/1.0.0/menu",
		"/%2e%2e/pizzashack/1.0.0/menu", menuPath + "/%2E%2e/orders", menuPath + "/.%2e/orders", menuPath + "/%2e/orders", menuPath + "/..%2forders",
		menuPath + "/%252e%252e/orders", menuPath + "/%u002e%u002e/orders", menuPath + "/%c0%ae%c0%ae/orders", menuPath + "/%e0%80%ae/orders",
		menuPath + "%2Forders", menuPath + "%2forders", "%2Fpizzashack/1.0.0/menu", "/pizzashack%2F1.0.0/menu", menuPath + "/%c0%af", menuPath + "/%252f",
		menuPath + "%5corders", menuPath + "%5Corders", menuPath + `\orders`, menuPath + `/..\orders`, menuPath + "/%5c..%5corders",
		menuPath + "%00", menuPath + "/%00x", menuPath + "/a%0d%0ab", menuPath + "/a%09b", menuPath + "/%7f", menuPath + "/%C2%80",
		"//pizzashack/1.0.0/menu", "/pizzashack//1.0.0/menu", menuPath + "//", "//api.example.com" + menuPath, "///",
		menuPath + ";x=y", menuPath + "/;/orders", menuPath + "/..;/orders", menuPath + "/%3b/x", menuPath + "%3Fa=b", menuPath + "%23a",
		menuPath + "#a", menuPath + "/%", menuPath + "/%zz", menuPath + "/%2", menuPath + "/%ff", menuPath + "/\x80", menuPath + "/\x01",
		"/pizzashack/1.0.0/m%65nu", "/pizz%61shack/1.0.0/menu", "*", "pizzashack/1.0.0/menu", "?" + menuPath,
		"http://api.example.com/pizzashack/1.0.0/../1.0.0/menu", "http://api.example.com//pizzashack/1.0.0/menu",
	} {
		s.refused(t, raw{bearer: "valid", target: target})
	}
}

// otherRequest are fields by which some backends take a request for another one.
var otherRequest = []string{
	"X-Forwarded-Uri", "X-Forwarded-Method", "X-Original-Uri", "X-Original-Url", "X-Original-Method", "X-Rewrite-Url", "X-Forwarded-Prefix",
	"X-Http-Method-Override", "X-Http-Method", "X-Method-Override",
}

// otherSpellings are names that some backends take for this one.
func otherSpellings(name string) []string {
	return []string{
		strings.ReplaceAll(name, "-", "_"), strings.Replace(name, "-", "_", 1), strings.ReplaceAll(name, "-", "."), strings.Replace(name, "-", ".", 1),
	}
}

// No field makes the gateway, or the backend, take a request for another one.
func (s *proxySetup) testOtherRequests(t *testing.T) {
	for _, name := range otherRequest {
		value := menuPath
		if strings.Contains(name, "Method") {
			value = "GET"
		}
		headers := [][]string{
			{name + ": " + value}, {strings.ToLower(name) + ": " + value}, {name + ": " + value, name + ": /"},
			{"Connection: " + name}, {"Connection: close, " + name, name + ": " + value},
		}
		for _, spelling := range otherSpellings(name) {
			headers = append(headers, []string{spelling + ": " + value})
		}
		for _, header := range headers {
			s.refused(t, raw{bearer: "unscoped", target: ordersPath, header: header})
			s.refused(t, raw{bearer: "unscoped", method: "DELETE", header: header})
			got := s.passes(t, raw{bearer: "unscoped", header: header})
			for at := range got.Header {
				if slices.Contains(otherRequest, http.CanonicalHeaderKey(likeDash.Replace(at))) {
					t.Errorf("%q: the backend got %s", header, at)
				}
			}
		}
	}
	s.refused(t, raw{header: []string{"Connection: Authorization"}})
	s.refused(t, raw{bearer: "revoked", header: []string{"Connection: Authorization"}})

	// Over another protocol, a client could ask for what nobody has decided about.
	got := s.passes(t, raw{bearer: "valid", header: []string{"Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"}})
	if got.Header.Get("Upgrade") != "" {
		t.Errorf("the backend is asked to switch to %v", got.Header["Upgrade"])
	}
}

// No Traefik is at hand in tests, but the names of fields that it removes are.
func TestTraefikExample(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../api/examples/gateway/traefik.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		HTTP struct {
			Middlewares struct {
				Rescind struct {
					ForwardAuth struct {
						AuthResponseHeaders      []string `yaml:"authResponseHeaders"`
						AuthResponseHeadersRegex string   `yaml:"authResponseHeadersRegex"`
					} `yaml:"forwardAuth"`
				}
			}
		}
	}
	if err := yaml.Unmarshal(text, &config); err != nil {
		t.Fatal(err)
	}
	auth := config.HTTP.Middlewares.Rescind.ForwardAuth
	if diff := gocmp.Diff(gateway.IdentityHeaders, auth.AuthResponseHeaders); diff != "" {
		t.Errorf("what tells who calls (-want +got):\n%s", diff)
	}
	removed, err := regexp.Compile(auth.AuthResponseHeadersRegex)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Concat(gateway.IdentityHeaders, otherRequest) {
		for _, as := range append(otherSpellings(name), name) {
			if !removed.MatchString(http.CanonicalHeaderKey(as)) {
				t.Errorf("%s reaches the backend", as)
			}
		}
	}
	for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Http", "Accept", "Authorization"} {
		if removed.MatchString(name) {
			t.Errorf("%s does not reach the backend", name)
		}
	}
}

func (s *proxySetup) testBodies(t *testing.T) {
	random := make([]byte, 512<<10)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	for _, r := range []raw{{body: "{}"}, {body: string(random)}, {body: string(random), chunked: true}} {
		r.bearer, r.method, r.target = "valid", "POST", ordersPath
		if got := s.passes(t, r); got.Body != r.body || got.Method != "POST" {
			t.Errorf("the backend got %s and %d bytes, want POST and %d bytes", got.Method, len(got.Body), len(r.body))
		}
		r.bearer = "unscoped"
		s.refused(t, r)
	}
	got := s.passes(t, raw{
		bearer: "valid", method: "POST", target: ordersPath, header: []string{"Trailer: X-Rescind-Subject"},
		body: "{}", chunked: true, trailer: "X-Rescind-Subject: forged\r\n",
	})
	if value := got.Trailer.Get("X-Rescind-Subject"); value != "" { // Caddy announces it, and then sends none
		t.Errorf("the backend got a trailer with %q", value)
	}
}

func (s *proxySetup) testRevoked(t *testing.T) {
	s.tokens["live"] = s.token(t, "4", "menu")
	s.passes(t, raw{bearer: "live"})
	s.revoke(t, "4")
	if resp, _ := s.refused(t, raw{bearer: "live"}); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a revoked token is answered %d", resp.StatusCode)
	}
}

// Without the gateway, nobody gets through.
func (s *proxySetup) testGatewayAway(t *testing.T) {
	if err := s.gateway.Close(); err != nil {
		t.Fatal(err)
	}
	unable := httptest.NewRecorder()
	gateway.Decision{Status: http.StatusServiceUnavailable, Authorization: replica.Authorization{Code: replica.CodeGeneral}}.WriteError(unable)
	for _, r := range []raw{{}, {bearer: "valid"}, {target: helloPath}, {bearer: "valid", target: ordersPath, method: "POST", body: "{}"}} {
		resp, body := s.refused(t, r)
		if resp.StatusCode != s.away {
			t.Errorf("without the gateway, it is answered %d %q, want %d", resp.StatusCode, body, s.away)
		}
		if s.away == http.StatusServiceUnavailable && (body != unable.Body.String() || resp.Header.Get("Retry-After") != unable.Header().Get("Retry-After")) {
			t.Errorf("without the gateway, it is answered %q, %v, want as a gateway that is not ready: %q, %v", body, resp.Header, unable.Body, unable.Header())
		}
	}
}

// BenchmarkThroughNginx sends requests through nginx to a backend, with the gateway deciding about each and, in the same
// run, without: requests/s of both, and their ratio.
func BenchmarkThroughNginx(b *testing.B) {
	s := newProxySetup(b, 0)
	// The same nginx configuration, but that it asks nobody.
	plain := startProxy(b, func(t testing.TB, dir, listen, gateway, backend string) *exec.Cmd {
		cmd := nginx(t, dir, listen, gateway, backend)
		path := filepath.Join(dir, "rescind.conf")
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		without := strings.Replace(string(text), "auth_request /_rescind/auth;", "", 1)
		if without == string(text) {
			t.Fatal("nginx.conf has no auth_request")
		}
		writeFile(t, path, without)
		return cmd
	}, "127.0.0.1:1", s.backend.address)
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}}
	defer client.CloseIdleConnections()
	rate := func(address string) float64 {
		began := time.Now()
		b.SetParallelism(16)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				r, err := http.NewRequest("GET", "http://"+address+menuPath, nil)
				if err != nil {
					b.Error(err)
					return
				}
				r.Header.Set("Authorization", "Bearer "+s.tokens["valid"])
				resp, err := client.Do(r)
				if err != nil {
					b.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode != fromBackend {
					b.Errorf("status %d", resp.StatusCode)
					return
				}
			}
		})
		return float64(b.N) / time.Since(began).Seconds()
	}
	b.ResetTimer()
	without := rate(plain)
	with := rate(s.address)
	b.ReportMetric(without, "plain_req/s")
	b.ReportMetric(with, "checked_req/s")
	b.ReportMetric(with/without, "ratio")
	b.ReportMetric(0, "ns/op") // of two requests: it says nothing
}
