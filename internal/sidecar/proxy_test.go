package sidecar

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// proxyConfig is for tests; all APIs go to one upstream.
func proxyConfig(upstream string) Proxy {
	return Proxy{
		Default: upstream, ForwardAuthorization: true, UpstreamTimeout: time.Minute, IdleTimeout: time.Minute, MaxInFlight: 100, MaxConnections: 100,
	}
}

// startProxyOf serves a proxy of e, and returns its address.
func startProxyOf(t testing.TB, cfg Proxy, e engine) (p *proxy, address string) {
	t.Helper()
	c, m := countedOf(e)
	p, err := newProxy(cfg, c, m, quiet)
	if err != nil {
		t.Fatal(err)
	}
	return p, serve(t, p)
}

// upstreamOf serves h, and returns its URL.
func upstreamOf(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// wire is a transport that keeps the request as it would be sent, and answers 200.
type wire struct{ sent []byte }

func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	var b bytes.Buffer
	if err := r.Write(&b); err != nil {
		return nil, err
	}
	w.sent = b.Bytes()
	return &http.Response{StatusCode: 200, Header: http.Header{}, Body: http.NoBody, Request: r}, nil
}

// forwarded sends a request, as it is written, through a proxy in memory. It returns what the upstream gets and what was
// decided about; sent is nil if nothing is sent on, and err if it is no request.
func forwarded(t testing.TB, cfg Proxy, decide func(gateway.Request) gateway.Decision, request string) (sent *http.Request, line string, asked []gateway.Request, err error) {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(request)))
	if err != nil {
		return nil, "", nil, err
	}
	r.RemoteAddr = "192.0.2.1:1234"
	e := &fake{decide: decide}
	c, m := countedOf(e)
	p, err := newProxy(cfg, c, m, quiet)
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{}
	p.reverse.Transport = w
	p.ServeHTTP(httptest.NewRecorder(), r)
	if w.sent == nil {
		return nil, "", e.questions(), nil
	}
	line, _, _ = strings.Cut(string(w.sent), "\r\n")
	if sent, err = http.ReadRequest(bufio.NewReader(bytes.NewReader(w.sent))); err != nil {
		t.Fatalf("%q is sent on as %q, which is no request: %v", request, w.sent, err)
	}
	return sent, line, e.questions(), nil
}

// What is authorised is what is forwarded, byte by byte, or nothing is.
func TestProxyForwardsAsItIs(t *testing.T) {
	t.Parallel()
	cfg := proxyConfig("http://upstream")
	for _, target := range []string{
		"/", "/pizzashack/1.0.0/menu", "/a?", "/a??", "/a?b", "/a?b=c&d=%20+%2B", "/a?b;c", "/a?b=%zz", "/a?a=1&a=2;b=3&%", "/a?b=c?d/../e", "/a?é",
		"/a%20b", "/a/", "/%C3%A9", "/%c3%a9", "/a!$&'()*+,=:@b", "/~a-b.c_d", "/a%40b", "/a%3Ab",
	} {
		sent, line, asked, err := forwarded(t, cfg, clean, "GET "+target+" HTTP/1.1\r\nHost: api\r\n\r\n")
		if err != nil || sent == nil || line != "GET "+target+" HTTP/1.1" || len(asked) != 1 || asked[0].Target != target {
			t.Errorf("%s: %q, asked %+v, %v", target, line, asked, err)
		}
	}
	for _, target := range []string{
		"/a/../b", "/a/./b", "/a/%2e%2e/b", "/a/.%2E/b", "//a", "/a//b", "/a%2Fb", "/a%2fb", "/a%5Cb", `/a\b`, "/a%00", "/a;b", "/a#b", "/a\x80", "/é",
		"/%zz", "/a%", "/a%3Fb", "/a%23b", "/a%2561", "/%61", "http://api/a", "http://evil/a", "*", "a", "/a%0d%0aX:%20y", "/a|b", "/a\"b", "/a<b>",
	} {
		for _, method := range []string{"GET", "POST", "OPTIONS"} {
			sent, line, asked, err := forwarded(t, cfg, clean, method+" "+target+" HTTP/1.1\r\nHost: api\r\n\r\n")
			if sent != nil {
				t.Errorf("%s %s is sent on as %q, asked %+v, %v", method, target, line, asked, err)
			}
		}
	}
	if sent, line, _, _ := forwarded(t, cfg, clean, "CONNECT api:443 HTTP/1.1\r\nHost: api:443\r\n\r\n"); sent != nil {
		t.Errorf("CONNECT is sent on as %q", line)
	}
}

// FuzzProxyTarget looks for requests that are sent on as others than were decided about.
func FuzzProxyTarget(f *testing.F) {
	f.Add("GET", "/a?b#c", "X-Rescind-Subject: mallory\r\n")
	f.Add("POST", "/a/%2e%2e/b", "Connection: X-Rescind-Subject, Authorization\r\nTransfer-Encoding: chunked\r\n")
	f.Add("GET", "http://a/b", "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n")
	f.Add("get", "/a", "x_rescind_subject: mallory\r\nX-Http-Method-Override: DELETE\r\n")
	cfg := proxyConfig("http://upstream")
	f.Fuzz(func(t *testing.T, method, target, header string) {
		sent, line, asked, err := forwarded(t, cfg, clean, method+" "+target+" HTTP/1.1\r\nHost: api\r\n"+header+"\r\n")
		if err != nil || sent == nil {
			return
		}
		if len(asked) != 1 || line != asked[0].Method+" "+asked[0].Target+" HTTP/1.1" {
			t.Fatalf("sent %q, asked %+v", line, asked)
		}
		checkIdentity(t, sent.Header)
	})
}

// checkIdentity fails if h says that somebody other than alice calls.
func checkIdentity(t testing.TB, h http.Header) {
	t.Helper()
	for name, values := range h {
		plain := strings.ToLower(strings.NewReplacer("_", "-", ".", "-").Replace(name))
		if strings.HasPrefix(plain, "x-rescind-") && !slices.Contains(gateway.IdentityHeaders, name) || strings.Contains(strings.Join(values, ""), "mallory") && strings.HasPrefix(plain, "x-rescind-") {
			t.Fatalf("%s: %q", name, values)
		}
	}
	if got := h.Values("X-Rescind-Subject"); !slices.Equal(got, []string{"alice"}) {
		t.Fatalf("X-Rescind-Subject is %q", got)
	}
}

func TestProxyHeaders(t *testing.T) {
	t.Parallel()
	base := map[string]string{
		"Host": "upstream", "X-Forwarded-For": "192.0.2.1", "X-Forwarded-Host": "api.example.com", "X-Forwarded-Proto": "http",
		"X-Rescind-Subject": "alice", "X-Rescind-Issuer": "https://km.example.com", "X-Rescind-Token-Id": "t1", "X-Rescind-Api": "PizzaShackAPI:1.0.0",
	}
	with := func(pairs ...string) map[string]string {
		m := maps.Clone(base)
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		return m
	}
	for _, tt := range []struct {
		name, header string
		change       func(*Proxy)
		want         map[string]string
	}{
		{"nothing", "", nil, base},
		{"what is the client's", "Accept: a\r\nCookie: b=c\r\nUser-Agent: d\r\n", nil, with("Accept", "a", "Cookie", "b=c", "User-Agent", "d")},
		{"a token", "Authorization: Bearer abc\r\n", nil, with("Authorization", "Bearer abc")},
		{"a token that stays here", "Authorization: Bearer abc\r\n", func(p *Proxy) { p.ForwardAuthorization = false }, base},
		{"one for proxies", "Proxy-Authorization: Basic abc\r\n", nil, base},
		{"identity", "X-Rescind-Subject: mallory\r\nX-Rescind-Scope: all\r\nX-Rescind-New: x\r\n", nil, base},
		{"identity in other spellings", "x-rescind-subject: mallory\r\nX_Rescind_Subject: mallory\r\nX-Rescind_Subject: mallory\r\nx.rescind.subject: mallory\r\n", nil, base},
		{"identity to be dropped on the way", "Connection: close, X-Rescind-Subject\r\nX-Rescind-Subject: mallory\r\n", nil, base},
		{"a field to be dropped on the way", "Connection: X-Mine\r\nX-Mine: x\r\nKeep-Alive: 5\r\nTE: gzip\r\n", nil, base},
		{"overrides", "X-HTTP-Method-Override: DELETE\r\nX-HTTP-Method: DELETE\r\nX-Method-Override: DELETE\r\nX_HTTP_METHOD_OVERRIDE: DELETE\r\n" +
			"X-Original-URL: /admin\r\nX-Original-Uri: /admin\r\nX-Rewrite-URL: /admin\r\nX-Forwarded-Uri: /admin\r\nX-Forwarded-Method: DELETE\r\nX-Forwarded-Prefix: /x\r\n", nil, base},
		{"another caller", "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Host: evil\r\nX-Forwarded-Proto: https\r\nForwarded: for=10.0.0.1\r\nX-Real-IP: 10.0.0.1\r\nX_Forwarded_For: 10.0.0.1\r\n", nil, base},
		{"the caller of a proxy before us", "X-Forwarded-For: 198.51.100.7\r\nX-Forwarded-Host: evil\r\nX-Forwarded-Proto: http\r\n", func(p *Proxy) { p.BehindTLSProxy = true },
			with("X-Forwarded-For", "198.51.100.7, 192.0.2.1", "X-Forwarded-Proto", "https")},
		{"h2c", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n", nil, base},
		{"h2c beside WebSocket", "Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n", nil, base},
		{"h2c in one field with WebSocket", "Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n", nil, base},
		{"WebSocket", "Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: x\r\n", nil, with("Connection", "Upgrade", "Upgrade", "WebSocket", "Sec-Websocket-Key", "x")},
		{"a trailer", "Transfer-Encoding: chunked\r\nTrailer: X-Rescind-Subject\r\n", nil, with("Transfer-Encoding", "chunked")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			cfg := proxyConfig("http://upstream")
			if tt.change != nil {
				tt.change(&cfg)
			}
			request := "POST /a HTTP/1.1\r\nHost: api.example.com\r\n" + tt.header + "\r\n"
			if strings.Contains(tt.header, "chunked") {
				request += "1\r\na\r\n0\r\nX-Rescind-Subject: mallory\r\n\r\n"
			}
			sent, _, _, err := forwarded(t, cfg, clean, request)
			if err != nil || sent == nil {
				t.Fatalf("not sent on: %v", err)
			}
			if _, err := io.Copy(io.Discard, sent.Body); err != nil {
				t.Fatal(err)
			}
			got := map[string]string{"Host": sent.Host}
			for name, values := range sent.Header {
				got[name] = strings.Join(values, " | ")
			}
			if len(sent.TransferEncoding) > 0 {
				got["Transfer-Encoding"] = strings.Join(sent.TransferEncoding, " | ")
			}
			if len(sent.Trailer) > 0 {
				got["Trailer"] = fmt.Sprint(sent.Trailer)
			}
			delete(got, "Content-Length")
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestProxyUpstreams(t *testing.T) {
	t.Parallel()
	super := revocation.SuperTenant.Domain
	c, m := countedOf(&fake{})
	make := func(fallback string) *proxy {
		p, err := newProxy(Proxy{Default: fallback, Upstreams: []Upstream{
			{Tenant: super, Context: "/pizzashack/1.0.0", URL: "http://context"},
			{Tenant: super, API: "Orders:v1:2", URL: "http://named"},
			{Tenant: "b.example", Context: "/pizzashack/1.0.0", URL: "http://other"},
			{Tenant: super, Context: "/pizzashack/1.0.0/deep", URL: "http://deep"},
		}}, c, m, quiet)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	with, without := make("http://default"), make("")
	api := func(tenant, context, name, version string) gateway.Decision {
		return gateway.Decision{Authorization: replica.Authorization{API: &catalog.API{
			Meta: catalog.Meta{Tenant: revocation.Tenant{Domain: tenant}}, Context: context, Name: name, Version: version,
		}}}
	}
	claimed := func(tenant, name, version string) gateway.Decision {
		return gateway.Decision{Authorization: replica.Authorization{Info: replica.Info{APIName: name, APIVersion: version, SubscriberTenantDomain: tenant}}}
	}
	for _, tt := range []struct {
		name   string
		d      gateway.Decision
		target string
		want   string // empty: there is none but the default
	}{
		{"by context", api(super, "/pizzashack/1.0.0", "P", "1"), "/pizzashack/1.0.0/menu", "http://context"},
		{"by context, whatever the path is", api(super, "/pizzashack/1.0.0", "P", "1"), "/pizzashack/1.0.0/deep/x", "http://context"},
		{"by name", api(super, "/orders", "Orders", "v1:2"), "/orders", "http://named"},
		{"of a tenant", api("b.example", "/pizzashack/1.0.0", "P", "1"), "/pizzashack/1.0.0", "http://other"},
		{"of a tenant that has none", api("c.example", "/pizzashack/1.0.0", "P", "1"), "/pizzashack/1.0.0", ""},
		{"by another's name", api("b.example", "/orders", "Orders", "v1:2"), "/orders", ""},
		{"of another version", api(super, "/orders", "Orders", "v1"), "/orders", ""},
		{"by what a token says", claimed(super, "Orders", "v1:2"), "/pizzashack/1.0.0/x", "http://named"},
		{"by what a token of another tenant says", claimed("b.example", "Orders", "v1:2"), "/orders", ""},
		{"by what a token says of an API that is not here", claimed(super, "Nothing", "1"), "/pizzashack/1.0.0/x", ""},
		{"by the path, if nothing is known", gateway.Decision{}, "/pizzashack/1.0.0?x", "http://context"},
		{"by the longest path", gateway.Decision{}, "/pizzashack/1.0.0/deep/x", "http://deep"},
		{"not by half a segment", gateway.Decision{}, "/pizzashack/1.0.0x", ""},
		{"not by the query", gateway.Decision{}, "/?/pizzashack/1.0.0", ""},
	} {
		text := func(u *url.URL) string {
			if u == nil {
				return ""
			}
			return u.String()
		}
		fallback := tt.want
		if fallback == "" {
			fallback = "http://default"
		}
		if got, got2 := text(without.upstream(tt.d, tt.target)), text(with.upstream(tt.d, tt.target)); got != tt.want || got2 != fallback {
			t.Errorf("%s: %q, and with a default %q", tt.name, got, got2)
		}
	}
}

// What goes wrong is told in WSO2's form, and says nothing of what is inside.
func TestProxyErrors(t *testing.T) {
	t.Parallel()
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for _, tt := range []struct {
		name   string
		config Proxy
		decide func(gateway.Request) gateway.Decision
		status int
		body   string
		result string
		retry  string
	}{
		{"a refusal", proxyConfig("http://upstream"), func(gateway.Request) gateway.Decision {
			return refusedWith(401, replica.CodeInvalidCredentials, challenge)
		},
			401, string(refusedWith(401, replica.CodeInvalidCredentials, challenge).Body()), refused, ""},
		{"no upstream", proxyConfig(""), clean, 503, `{"code":"303001","message":"Runtime Error","description":"The API has no upstream here"}`, noUpstream, ""},
		{"nobody listens", proxyConfig("http://" + closed.Addr().String()), clean,
			502, `{"code":"101503","message":"Runtime Error","description":"The upstream cannot be reached"}`, unreachable, ""},
		{"it hangs up", proxyConfig(upstreamOf(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })), clean,
			502, `{"code":"101503","message":"Runtime Error","description":"The upstream cannot be reached"}`, unreachable, ""},
		{"it is slow", func() Proxy {
			cfg := proxyConfig(upstreamOf(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
			cfg.UpstreamTimeout = 20 * time.Millisecond
			return cfg
		}(), clean, 504, `{"code":"101504","message":"Runtime Error","description":"The upstream does not answer in time"}`, timedOut, ""},
		{"it switches to what nobody wanted", proxyConfig(upstreamOf(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "h2c")
			w.WriteHeader(http.StatusSwitchingProtocols)
		})), clean, 502, `{"code":"101503","message":"Runtime Error","description":"The upstream cannot be reached"}`, unreachable, ""},
		{"too many", func() Proxy { cfg := proxyConfig("http://upstream"); cfg.MaxInFlight = 0; return cfg }(), clean,
			503, `{"code":"900900","message":"Service Unavailable","description":"There are too many requests at a time"}`, tooMany, "5"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, address := startProxyOf(t, tt.config, &fake{decide: tt.decide})
			resp, body := exchange(t, address, "GET /pizzashack/1.0.0 HTTP/1.1\r\nHost: api\r\nConnection: close\r\n\r\n")
			if resp.StatusCode != tt.status || body != tt.body || resp.Header.Get("Retry-After") != tt.retry || resp.Header.Get("Content-Type") != "application/json" {
				t.Errorf("%d %v %s", resp.StatusCode, resp.Header, body)
			}
			for _, result := range proxyResults {
				want := 0.0
				if result == tt.result {
					want = 1
				}
				if got := testutil.ToFloat64(p.m.proxied[result]); got != want {
					t.Errorf("%v requests are counted as %s, want %v", got, result, want)
				}
			}
		})
	}
}

// An answer that breaks off is not taken for a whole one.
func TestProxyBrokenAnswer(t *testing.T) {
	t.Parallel()
	for name, header := range map[string]string{"a length": "Content-Length: 20", "chunks": "Transfer-Encoding: chunked"} {
		upstream := upstreamOf(t, func(w http.ResponseWriter, r *http.Request) {
			conn, brw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			fmt.Fprintf(brw, "HTTP/1.1 200 OK\r\n%s\r\n\r\n5\r\nabcde\r\n", header)
			brw.Flush()
		})
		_, address := startProxyOf(t, proxyConfig(upstream), &fake{decide: clean})
		resp, err := http.Get("http://" + address + "/a")
		if err != nil {
			continue // before there was anything to read
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil {
			t.Errorf("%s: %q is taken for the whole", name, body)
		}
	}
}

// Events come through as they happen.
func TestProxyStreams(t *testing.T) {
	t.Parallel()
	more := make(chan struct{})
	upstream := upstreamOf(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, "data: 1\n\n")
		_ = http.NewResponseController(w).Flush()
		<-more
		_, _ = io.WriteString(w, "data: 2\n\n")
	})
	_, address := startProxyOf(t, proxyConfig(upstream), &fake{decide: clean})
	resp, err := http.Get("http://" + address + "/events")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	first := make([]byte, 9)
	if _, err := io.ReadFull(resp.Body, first); err != nil || string(first) != "data: 1\n\n" {
		t.Fatalf("%q, %v", first, err)
	}
	close(more)
	if rest, err := io.ReadAll(resp.Body); err != nil || string(rest) != "data: 2\n\n" {
		t.Errorf("%q, %v", rest, err)
	}
}

// echoUpgrade switches to WebSocket, and then says what it hears.
func echoUpgrade(w http.ResponseWriter, r *http.Request) { upgradeTo(w, r, nil) }

// upgradeTo switches to WebSocket, and then copies what it hears to a place, nil for back.
func upgradeTo(w http.ResponseWriter, r *http.Request, to io.Writer) {
	if r.Header.Get("Upgrade") != "websocket" {
		http.Error(w, "no WebSocket", http.StatusUpgradeRequired)
		return
	}
	conn, brw := switched(w, r)
	defer conn.Close()
	if to == nil {
		to = conn
	}
	_, _ = io.Copy(to, brw)
}

// switched has switched to WebSocket.
func switched(w http.ResponseWriter, r *http.Request) (net.Conn, *bufio.ReadWriter) {
	conn, brw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(brw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Caller: %s\r\n\r\n", r.Header.Get("X-Rescind-Subject"))
	brw.Flush()
	return conn, brw
}

// upgrade makes a WebSocket through the proxy at an address.
func upgrade(t testing.TB, address string) (net.Conn, *bufio.Reader) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, upgradeOn(t, conn)
}

func upgradeOn(t testing.TB, conn net.Conn) *bufio.Reader {
	t.Helper()
	fmt.Fprint(conn, "GET /chat HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Rescind-Subject: mallory\r\n\r\n")
	from := bufio.NewReader(conn)
	resp, err := http.ReadResponse(from, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("X-Caller") != "alice" {
		t.Fatalf("%v, %v", resp, err)
	}
	return from
}

// says sends a line through a WebSocket, and waits until it is back.
func says(t testing.TB, conn net.Conn, from *bufio.Reader, line string) {
	t.Helper()
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := from.ReadString('\n'); err != nil || got != line+"\n" {
		t.Fatalf("%q came back, %v", got, err)
	}
}

// pipes is a listener in memory, so that time can be virtual.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: loopbacks[0], Port: 1} }

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.conns <- theirs:
		return ours, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

// inMemory runs f with a proxy before an upstream, all in memory, and with virtual time.
func inMemory(t *testing.T, upstream http.HandlerFunc, f func(t *testing.T, p *proxy, conn net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		c, m := countedOf(&fake{decide: clean})
		p, err := newProxy(proxyConfig("http://upstream"), c, m, quiet)
		if err != nil {
			t.Fatal(err)
		}
		behind, front := newPipes(), newPipes()
		transport := p.reverse.Transport.(*http.Transport)
		transport.DialContext = behind.dial
		servers := []*http.Server{newServer(p, quiet), {Handler: upstream}}
		var wg sync.WaitGroup
		for i, l := range []*pipes{front, behind} {
			wg.Go(func() { _ = servers[i].Serve(l) })
		}
		conn, err := front.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			conn.Close()
			p.wait(time.Hour)
			for _, s := range servers {
				_ = s.Close()
			}
			transport.CloseIdleConnections()
			wg.Wait()
		})
		f(t, p, conn)
	})
}

// A WebSocket lives as long as something is said now and then, whoever says it.
func TestProxyWebSocket(t *testing.T) {
	t.Parallel()
	const pause, often = 50 * time.Second, 100
	lines := func(w http.ResponseWriter, r *http.Request) {
		conn, _ := switched(w, r)
		defer conn.Close()
		for range often {
			time.Sleep(pause)
			fmt.Fprintln(conn, "tick")
		}
		_, _ = io.Copy(io.Discard, conn)
	}
	silence := func(t *testing.T, p *proxy, from *bufio.Reader) {
		t.Helper()
		began := time.Now()
		if _, err := from.ReadByte(); err == nil {
			t.Error("something more is said")
		}
		if waited := time.Since(began); waited != time.Minute {
			t.Errorf("cut off after %s of silence, want a minute", waited)
		}
		if !p.wait(time.Second) || p.m.proxying.Load() != 0 {
			t.Error("it still counts")
		}
	}
	inMemory(t, echoUpgrade, func(t *testing.T, p *proxy, conn net.Conn) { // both
		from := upgradeOn(t, conn)
		for range often {
			says(t, conn, from, "one")
			time.Sleep(pause)
		}
		says(t, conn, from, "two")
		silence(t, p, from)
	})
	inMemory(t, lines, func(t *testing.T, p *proxy, conn net.Conn) { // the upstream
		from := upgradeOn(t, conn)
		for range often {
			if line, err := from.ReadString('\n'); err != nil || line != "tick\n" {
				t.Fatalf("%q, %v", line, err)
			}
		}
		silence(t, p, from)
	})
	inMemory(t, func(w http.ResponseWriter, r *http.Request) { upgradeTo(w, r, io.Discard) }, func(t *testing.T, p *proxy, conn net.Conn) { // the client
		from := upgradeOn(t, conn)
		for range often {
			fmt.Fprintln(conn, "tick")
			time.Sleep(pause)
		}
		fmt.Fprintln(conn, "tick")
		silence(t, p, from)
	})
}

// Who talks through a WebSocket, and does not read, is cut off as well.
func TestProxyDeafWebSocket(t *testing.T) {
	t.Parallel()
	inMemory(t, echoUpgrade, func(t *testing.T, p *proxy, conn net.Conn) {
		upgradeOn(t, conn)
		for began := time.Now(); ; time.Sleep(10 * time.Second) {
			if _, err := fmt.Fprintln(conn, "tick"); err != nil {
				break
			}
			if time.Since(began) > 3*time.Minute {
				t.Fatal("it is still listened to")
			}
		}
		if !p.wait(time.Second) {
			t.Error("it still counts")
		}
	})
}

// At the end WebSockets have what the requests leave of the grace, and no more.
func TestServeProxy(t *testing.T) {
	t.Parallel()
	for _, leaves := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			c, m := countedOf(&fake{decide: clean})
			p, err := newProxy(proxyConfig("http://upstream"), c, m, quiet)
			if err != nil {
				t.Fatal(err)
			}
			behind, front := newPipes(), newPipes()
			transport := p.reverse.Transport.(*http.Transport)
			transport.DialContext = behind.dial
			upstream := &http.Server{Handler: http.HandlerFunc(echoUpgrade)}
			ctx, stop := context.WithCancel(t.Context())
			ended, upstreamEnded := make(chan error, 1), make(chan error, 1)
			go func() { upstreamEnded <- upstream.Serve(behind) }()
			go func() { ended <- serveProxy(ctx, newServer(p, quiet), p, front, 30*time.Second, quiet) }()
			conn, err := front.dial(t.Context(), "", "")
			if err != nil {
				t.Fatal(err)
			}
			from := upgradeOn(t, conn)
			stop()
			began, want := time.Now(), 30*time.Second
			time.Sleep(20 * time.Second)
			says(t, conn, from, "still here")
			if leaves {
				conn.Close()
				want = 20 * time.Second
			}
			if err := <-ended; err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took < want || took > want+time.Second {
				t.Errorf("it took %s to end, want %s", took, want)
			}
			if _, err := from.ReadByte(); err == nil {
				t.Error("a WebSocket outlives the process")
			}
			conn.Close()
			transport.CloseIdleConnections()
			_ = upstream.Close()
			<-upstreamEnded
		})
	}
}

// Who sends a body slowly is waited for as long as bytes come; who stops is cut off, and is not the upstream's fault.
func TestProxySlowClient(t *testing.T) {
	t.Parallel()
	var got chan string
	upstream := func(_ http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		time.Sleep(10 * time.Minute) // now nobody waits for the client
		got <- fmt.Sprintf("%s, whole %t", b, err == nil)
	}
	inMemory(t, upstream, func(t *testing.T, p *proxy, conn net.Conn) {
		got = make(chan string, 2)
		p.reverse.Transport.(*http.Transport).ResponseHeaderTimeout = time.Hour
		fmt.Fprint(conn, "POST /a HTTP/1.1\r\nHost: api\r\nContent-Length: 6\r\n\r\n")
		for range 6 {
			time.Sleep(50 * time.Second)
			fmt.Fprint(conn, "x")
		}
		from := bufio.NewReader(conn)
		if resp, err := http.ReadResponse(from, nil); err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
		if body := <-got; body != "xxxxxx, whole true" {
			t.Error(body)
		}
		// The connection is as good as new, and its next request no more patiently waited for.
		began := time.Now()
		fmt.Fprint(conn, "POST /a HTTP/1.1\r\nHost: api\r\nContent-Length: 6\r\n\r\nyy")
		if resp, err := http.ReadResponse(from, nil); err == nil {
			t.Errorf("answered with %d", resp.StatusCode)
		}
		if waited := time.Since(began); waited < time.Minute || waited > 3*time.Minute {
			t.Errorf("cut off after %s", waited)
		}
		if body := <-got; body != "yy, whole false" {
			t.Error(body)
		}
		if n := testutil.ToFloat64(p.m.proxied[clientGone]); n != 1 {
			t.Errorf("%v clients are counted as gone, want 1", n)
		}
	})
}

// Who does not send what is not even wanted is cut off as well.
func TestProxySlowRefusedClient(t *testing.T) {
	t.Parallel()
	inMemory(t, nil, func(t *testing.T, p *proxy, conn net.Conn) {
		fmt.Fprint(conn, "POST /a/../b HTTP/1.1\r\nHost: api\r\nContent-Length: 6\r\n\r\n")
		began := time.Now()
		_, _ = io.Copy(io.Discard, conn)
		if waited := time.Since(began); waited > 3*time.Minute {
			t.Errorf("cut off after %s", waited)
		}
	})
}

// Who does not even read that it was refused, or that there is nothing to read, is cut off.
func TestProxyShortAnswers(t *testing.T) {
	t.Parallel()
	nothing := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }
	for _, target := range []string{"/a/..", "/a"} {
		inMemory(t, nothing, func(t *testing.T, _ *proxy, conn net.Conn) {
			fmt.Fprint(conn, "GET "+target+" HTTP/1.1\r\nHost: api\r\n\r\n")
			time.Sleep(2 * time.Minute)
			if n, _ := io.Copy(io.Discard, conn); n > 0 {
				t.Errorf("%s: %d bytes came in the end", target, n)
			}
		})
	}
}

// deadlines is an answer that keeps the deadlines for reading that are set.
type deadlines struct {
	discard
	set []time.Time
}

func (d *deadlines) SetReadDeadline(t time.Time) error { d.set = append(d.set, t); return nil }

// A read that outlives its request has no part in the next one of the connection.
func TestPatientReaderEnds(t *testing.T) {
	t.Parallel()
	var d deadlines
	b := &patientReader{ReadCloser: io.NopCloser(strings.NewReader("ab")), patience: patience{http.NewResponseController(&d), time.Minute}}
	if _, err := b.Read(make([]byte, 1)); err != nil || len(d.set) != 1 || d.set[0].IsZero() {
		t.Fatalf("%v, %v", d.set, err)
	}
	b.end()
	if _, err := io.ReadAll(b); err != nil || len(d.set) != 1 {
		t.Errorf("%v, %v", d.set, err)
	}
}

// Who does not read is cut off; who reads slowly is not.
func TestProxySlowReader(t *testing.T) {
	t.Parallel()
	const size = 64 << 10
	upstream := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(size)) // without it ReverseProxy waits for a mutex, and time stands still
		_, _ = w.Write(make([]byte, size))
	}
	inMemory(t, upstream, func(t *testing.T, p *proxy, conn net.Conn) {
		from := bufio.NewReaderSize(conn, 16)
		for range 2 {
			fmt.Fprint(conn, "GET /a HTTP/1.1\r\nHost: api\r\n\r\n")
			resp, err := http.ReadResponse(from, nil)
			if err != nil {
				t.Fatal(err)
			}
			n := 0
			for some := make([]byte, 8<<10); err == nil; n += len(some) {
				time.Sleep(10 * time.Second)
				_, err = io.ReadFull(resp.Body, some)
			}
			if err != io.EOF || n < size {
				t.Fatalf("after %d bytes: %v", n, err)
			}
			time.Sleep(30 * time.Second) // the connection is open for another request
		}
		fmt.Fprint(conn, "GET /a HTTP/1.1\r\nHost: api\r\n\r\n")
		time.Sleep(2 * time.Minute)
		if n, err := io.Copy(io.Discard, conn); n > size/2 {
			t.Errorf("%d bytes came in the end, %v", n, err)
		}
	})
}

// Past the limit requests are refused; when one has ended the next one gets through.
func TestProxyOverload(t *testing.T) {
	t.Parallel()
	begun, end := make(chan struct{}), make(chan struct{})
	cfg := proxyConfig(upstreamOf(t, func(http.ResponseWriter, *http.Request) { begun <- struct{}{}; <-end }))
	cfg.MaxInFlight = 2
	p, address := startProxyOf(t, cfg, &fake{decide: clean})
	done := make(chan int)
	get := func() {
		resp, err := http.Get("http://" + address + "/a")
		if err != nil {
			t.Error(err)
			done <- 0
			return
		}
		resp.Body.Close()
		done <- resp.StatusCode
	}
	for range 2 {
		go get()
		<-begun
	}
	go get()
	if status := <-done; status != 503 {
		t.Errorf("the third of two: %d", status)
	}
	close(end)
	for range 2 {
		if status := <-done; status != 200 {
			t.Errorf("one of two: %d", status)
		}
	}
	p.wait(time.Minute)
	go get()
	<-begun
	if status := <-done; status != 200 {
		t.Errorf("the next one: %d", status)
	}
}

// A client that goes away takes its request to the upstream along.
func TestProxyClientGone(t *testing.T) {
	t.Parallel()
	begun, gone := make(chan struct{}), make(chan struct{})
	p, address := startProxyOf(t, proxyConfig(upstreamOf(t, func(_ http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done()
		close(gone)
	})), &fake{decide: clean})
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+address+"/a", nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() { <-begun; cancel() }()
	if _, err := http.DefaultClient.Do(req); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	<-gone
	p.wait(time.Minute)
	if n := testutil.ToFloat64(p.m.proxied[clientGone]); n != 1 {
		t.Errorf("%v clients are counted as gone, want 1", n)
	}
}

func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, m := countedOf(&fake{})
	l := limitConnections(inner, 2, m)
	defer l.Close()
	accepted := make(chan net.Conn)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first := <-accepted
	dial()
	<-accepted
	third := dial()
	if _, err := third.Read(make([]byte, 1)); err == nil {
		t.Error("the third of two connections stays open")
	}
	first.Close()
	first.Close() // counts once
	dial()
	<-accepted
	fourth := dial()
	if _, err := fourth.Read(make([]byte, 1)); err == nil {
		t.Error("the third of two connections stays open, once one was closed")
	}
	if open, closed := m.connections.Load(), testutil.ToFloat64(m.connectionsRefused); open != 2 || closed != 2 {
		t.Errorf("%v open and %v refused, want 2 and 2", open, closed)
	}
}

// How much slower requests are through the proxy than through a plain one.
func BenchmarkProxy(b *testing.B) {
	upstream := upstreamOf(b, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
	target, err := url.Parse(upstream)
	if err != nil {
		b.Fatal(err)
	}
	plain := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target); r.SetXForwarded() },
		Transport: &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true}, BufferPool: &buffers{},
	}
	_, gatewayAt := startProxyOf(b, proxyConfig(upstream), &benchEngine{allowed(pizza)})
	for _, to := range []struct{ name, address string }{{"upstream", strings.TrimPrefix(upstream, "http://")}, {"plain", serve(b, plain)}, {"gateway", gatewayAt}} {
		b.Run(to.name, func(b *testing.B) {
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256}}
			b.ReportAllocs()
			b.SetParallelism(16)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					req, _ := http.NewRequest("GET", "http://"+to.address+"/pizzashack/1.0.0/menu", nil)
					req.Header.Set("Authorization", "Bearer abc")
					resp, err := client.Do(req)
					if err != nil {
						b.Error(err)
						return
					}
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			})
		})
	}
}
