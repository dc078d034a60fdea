package sidecar

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/gateway"
)

// proxy stands before upstreams: it decides about every request, and sends it on to the upstream of the
// API that it is for.
type proxy struct {
	cfg       Proxy
	checker   checker
	m         *metrics
	log       *slog.Logger
	upstreams map[apiKey]*url.URL
	contexts  []contextURL // of those that are named by context
	fallback  *url.URL     // nil if there is none
	reverse   *httputil.ReverseProxy

	handlers sync.WaitGroup

	mu     sync.Mutex
	warned map[string]time.Time // about APIs without an upstream, by what they are called
}

// apiKey names an API: by its context, or by name:version.
type apiKey struct{ tenant, context, api string }

type contextURL struct {
	context string
	url     *url.URL
}

func newProxy(cfg Proxy, c checker, m *metrics, log *slog.Logger) (*proxy, error) {
	p := &proxy{cfg: cfg, checker: c, m: m, log: log.With("component", "proxy"), upstreams: make(map[apiKey]*url.URL), warned: make(map[string]time.Time)}
	for _, u := range cfg.Upstreams {
		target, err := url.Parse(u.URL)
		if err != nil {
			return nil, fmt.Errorf("use upstream %s%s: %w", u.Context, u.API, err)
		}
		p.upstreams[apiKey{u.Tenant, u.Context, u.API}] = target
		if u.Context != "" {
			p.contexts = append(p.contexts, contextURL{u.Context, target})
		}
	}
	if cfg.Default != "" {
		target, err := url.Parse(cfg.Default)
		if err != nil {
			return nil, fmt.Errorf("use the default upstream: %w", err)
		}
		p.fallback = target
	}
	tlsConfig, err := cfg.UpstreamTLS.Client()
	if err != nil {
		return nil, fmt.Errorf("read the authorities of upstreams in %s: %w", cfg.UpstreamTLS.CA, err)
	}
	p.reverse = &httputil.ReverseProxy{
		Rewrite: p.rewrite,
		Transport: &http.Transport{ // HTTP/1.1 only, and no proxy of the environment
			DialContext:            (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
			TLSClientConfig:        tlsConfig,
			TLSHandshakeTimeout:    5 * time.Second,
			ResponseHeaderTimeout:  cfg.UpstreamTimeout,
			ExpectContinueTimeout:  time.Second,
			IdleConnTimeout:        time.Minute,
			MaxIdleConns:           1024,
			MaxIdleConnsPerHost:    256,
			MaxResponseHeaderBytes: 256 << 10,
			DisableCompression:     true, // bodies are sent on as they are
		},
		ModifyResponse: p.answered,
		ErrorHandler:   p.failed,
		BufferPool:     &buffers{},
		ErrorLog:       slog.NewLogLogger(p.log.Handler(), slog.LevelDebug), // answers that broke off
	}
	return p, nil
}

// routeKey is the context key of a request's route.
type routeKey struct{}

// route is where a request goes, and why it may.
type route struct {
	target   *url.URL
	decision gateway.Decision
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.handlers.Add(1)
	defer p.handlers.Done()
	patience := patience{http.NewResponseController(w), p.cfg.IdleTimeout}
	ctx, cut := context.WithCancel(r.Context())
	defer cut()
	w = patientWriter{w, patience, ctx, cut}
	if r.Body != nil && r.Body != http.NoBody {
		patience.read(true)
		body := &patientReader{ReadCloser: r.Body, patience: patience}
		defer body.end()
		r.Body = body
	}
	defer p.m.proxying.Add(-1)
	if p.m.proxying.Add(1) > int64(p.cfg.MaxInFlight) {
		p.m.proxied[tooMany].Inc()
		w.Header().Set("Retry-After", "5")
		writeProblem(w, http.StatusServiceUnavailable, "Service Unavailable", "There are too many requests at a time")
		return
	}
	d := p.checker.Decide(r.Context(), gateway.Request{Method: r.Method, Target: r.RequestURI, Authorization: r.Header["Authorization"]})
	if !d.Allowed {
		p.m.proxied[refused].Inc()
		d.WriteError(w)
		return
	}
	target := p.upstream(d, r.RequestURI)
	if target == nil {
		p.m.proxied[noUpstream].Inc()
		p.warn(d)
		writeCode(w, http.StatusServiceUnavailable, codeNoEndpoint, "Runtime Error", "The API has no upstream here")
		return
	}
	// A switch to h2c would take the connection out of our hands.
	if up := r.Header["Upgrade"]; len(up) != 1 || !strings.EqualFold(up[0], "websocket") {
		delete(r.Header, "Upgrade")
	}
	p.reverse.ServeHTTP(w, r.WithContext(context.WithValue(ctx, routeKey{}, route{target, d})))
}

// wait returns once no request is under way, with open WebSockets, or after some time. It reports whether none is.
func (p *proxy) wait(most time.Duration) bool {
	done := make(chan struct{})
	go func() { p.handlers.Wait(); close(done) }()
	late := time.NewTimer(most)
	defer late.Stop()
	select {
	case <-done:
		return true
	case <-late.C:
		return false
	}
}

// upstream is nil if there is none for what was decided about.
func (p *proxy) upstream(d gateway.Decision, target string) *url.URL {
	switch {
	case d.API != nil:
		tenant := d.API.Tenant.Domain
		return cmp.Or(p.upstreams[apiKey{tenant: tenant, context: d.API.Context}],
			p.upstreams[apiKey{tenant: tenant, api: d.API.Name + ":" + d.API.Version}], p.fallback)
	case d.Info.APIName != "":
		// The token alone has said what it is for. What else the path may be for was not asked.
		return cmp.Or(p.upstreams[apiKey{tenant: d.Info.SubscriberTenantDomain, api: d.Info.APIName + ":" + d.Info.APIVersion}], p.fallback)
	}
	// Nothing is known, and the operator wants it served.
	var best contextURL
	path, _, _ := strings.Cut(target, "?")
	for _, c := range p.contexts {
		rest, within := strings.CutPrefix(path, c.context)
		if within && (rest == "" || rest[0] == '/') && len(c.context) > len(best.context) {
			best = c
		}
	}
	return cmp.Or(best.url, p.fallback)
}

// maxWarned is how many APIs without an upstream are remembered.
const maxWarned = 1000

// warn names an API without an upstream, once in a minute each.
func (p *proxy) warn(d gateway.Decision) {
	name, context, tenant := d.Info.APIName+":"+d.Info.APIVersion, "", d.Info.SubscriberTenantDomain
	if d.API != nil {
		name, context, tenant = d.API.Name+":"+d.API.Version, d.API.Context, d.API.Tenant.Domain
	}
	p.mu.Lock()
	due := time.Since(p.warned[tenant+" "+name]) > time.Minute
	if due {
		if len(p.warned) >= maxWarned { // names may come from tokens
			clear(p.warned)
		}
		p.warned[tenant+" "+name] = time.Now()
	}
	p.mu.Unlock()
	if due {
		p.log.Error("an API has no upstream, and requests for it are answered 503: add it to proxy.upstreams, or set proxy.default",
			"tenant", tenant, "api", name, "context", context)
	}
}

// rewrite makes the request for the upstream. It comes after the fields are gone that Connection names, so
// that a client can take away none of ours.
func (p *proxy) rewrite(r *httputil.ProxyRequest) {
	route, _ := r.In.Context().Value(routeKey{}).(route)
	// Opaque is sent as it is: URL.Path would be encoded anew, and ReverseProxy has left out of the
	// query what it cannot read.
	path, query, hasQuery := strings.Cut(r.In.RequestURI, "?")
	r.Out.URL = &url.URL{Scheme: route.target.Scheme, Host: route.target.Host, Opaque: path, RawQuery: query, ForceQuery: hasQuery && query == ""}
	r.Out.Host = ""
	r.Out.Trailer = nil // fields that nobody has looked at
	removeSpoofs(r.Out.Header)
	route.decision.SetIdentity(r.Out.Header)
	if p.cfg.BehindTLSProxy {
		r.Out.Header["X-Forwarded-For"] = r.In.Header["X-Forwarded-For"] // and the proxy itself after it
	}
	r.SetXForwarded()
	if p.cfg.BehindTLSProxy {
		r.Out.Header.Set("X-Forwarded-Proto", "https")
	}
	if !p.cfg.ForwardAuthorization {
		r.Out.Header.Del("Authorization")
	}
}

// removeSpoofs removes what only a proxy may say, and that by which some upstreams take a request for another
// one than was decided about. What only a gateway may say, [gateway.Decision.SetIdentity] removes.
func removeSpoofs(h http.Header) {
	for name := range h {
		if name == "" || name[0] != 'X' && name[0] != 'x' {
			continue // as nearly all
		}
		plain := strings.ToLower(likeDash.Replace(name))
		if strings.HasPrefix(plain, "x-forwarded-") || overrides[plain] {
			delete(h, name)
		}
	}
}

// likeDash are what is the same as - for many upstreams.
var likeDash = strings.NewReplacer("_", "-", ".", "-")

// overrides begin with x, in lower case.
var overrides = map[string]bool{
	"x-http-method-override": true, "x-http-method": true, "x-method-override": true,
	"x-original-url": true, "x-original-uri": true, "x-original-host": true, "x-original-method": true,
	"x-rewrite-url": true, "x-real-ip": true,
}

// WSO2's codes of what goes wrong behind a gateway.
const (
	codeUnreachable = "101503"
	codeTimeout     = "101504"
	codeNoEndpoint  = "303001"
)

// answered is called for every answer, before it is sent on.
func (p *proxy) answered(r *http.Response) error {
	if r.StatusCode == http.StatusSwitchingProtocols && !strings.EqualFold(r.Header.Get("Upgrade"), r.Request.Header.Get("Upgrade")) {
		return errors.New("it switches to a protocol that nobody asked for")
	}
	p.m.proxied[proxied].Inc()
	return nil
}

// failed answers for an upstream that did not.
func (p *proxy) failed(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil { // also if the client did not send what it said it would
		p.m.proxied[clientGone].Inc()
		panic(http.ErrAbortHandler) // nobody would read an answer
	}
	log := p.log.With("upstream", r.URL.Host)
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		p.m.proxied[timedOut].Inc()
		log.Warn("an upstream does not answer in time", "error", err)
		writeCode(w, http.StatusGatewayTimeout, codeTimeout, "Runtime Error", "The upstream does not answer in time")
		return
	}
	p.m.proxied[unreachable].Inc()
	log.Warn("an upstream cannot be used", "error", err)
	writeCode(w, http.StatusBadGateway, codeUnreachable, "Runtime Error", "The upstream cannot be reached")
}

// buffers is a pool of what bodies are copied through.
type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if p, ok := b.pool.Get().(*[]byte); ok {
		return *p
	}
	return make([]byte, 32<<10)
}

func (b *buffers) Put(buf []byte) { b.pool.Put(&buf) }

// patience moves a connection's deadlines before bytes are waited for, so that only a client that has stopped is
// cut off, however long a body is.
type patience struct {
	rc   *http.ResponseController
	idle time.Duration
}

// write waits patiently until bytes are taken. What cannot be set is of a connection that is gone, and the
// next use of it tells.
func (p patience) write() { _ = p.rc.SetWriteDeadline(time.Now().Add(p.idle)) }

// read waits patiently for bytes from now on, or for ever.
func (p patience) read(patiently bool) {
	var until time.Time
	if patiently {
		until = time.Now().Add(p.idle)
	}
	_ = p.rc.SetReadDeadline(until)
}

// patientWriter is for answers.
type patientWriter struct {
	http.ResponseWriter
	patience patience
	ctx      context.Context // of the request
	cut      context.CancelFunc
}

func (w patientWriter) WriteHeader(status int) {
	w.patience.write()
	w.ResponseWriter.WriteHeader(status)
}

func (w patientWriter) Write(b []byte) (int, error) {
	w.patience.write()
	return w.ResponseWriter.Write(b)
}

func (w patientWriter) FlushError() error {
	w.patience.write()
	return w.patience.rc.Flush()
}

// Unwrap lets others move deadlines.
func (w patientWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Hijack gives the connection to a WebSocket. It is closed when the request ends, and the request ends when nothing
// comes for a while, from the client or for it: either may be the only one that talks.
func (w patientWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buf, err := w.patience.rc.Hijack()
	if err != nil {
		return nil, nil, err
	}
	c := &patientConn{Conn: conn, idle: w.patience.idle, silence: time.AfterFunc(w.patience.idle, w.cut)}
	context.AfterFunc(w.ctx, func() {
		c.silence.Stop()
		_ = conn.Close() // it may be closed already
	})
	return c, buf, nil
}

// patientConn is the client's end of a WebSocket.
type patientConn struct {
	net.Conn
	idle    time.Duration
	silence *time.Timer // ends the request
}

func (c *patientConn) Read(to []byte) (int, error) {
	n, err := c.Conn.Read(to)
	if n > 0 {
		c.silence.Reset(c.idle)
	}
	return n, err
}

// Write has a deadline as well: a client that only talks, and does not read, is not silent.
func (c *patientConn) Write(b []byte) (int, error) {
	_ = c.Conn.SetWriteDeadline(time.Now().Add(c.idle)) // as in patience.write
	n, err := c.Conn.Write(b)
	if n > 0 {
		c.silence.Reset(c.idle)
	}
	return n, err
}

// CloseWrite tells the client that the upstream has said all. Where only the whole connection can be closed, it is.
func (c *patientConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// patientReader is for uploads. Until their end there is always a deadline, for the server reads what is left of
// them too, before it answers and after. At their end there must be none: then it waits for the client to
// hang up, as long as the upstream takes. A read may outlive the handler, and then moves no deadline: the
// connection has another request.
type patientReader struct {
	io.ReadCloser
	patience patience

	mu    sync.Mutex
	ended bool
}

func (b *patientReader) Read(to []byte) (int, error) {
	b.move(true)
	n, err := b.ReadCloser.Read(to)
	if err == io.EOF {
		b.move(false)
	}
	return n, err
}

func (b *patientReader) move(patiently bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.ended {
		b.patience.read(patiently)
	}
}

// end is called when the handler returns.
func (b *patientReader) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
}

// limitConnections closes connections past a number as they come.
func limitConnections(l net.Listener, most int, m *metrics) net.Listener {
	return &limitedListener{Listener: l, most: int64(most), m: m}
}

type limitedListener struct {
	net.Listener
	most int64
	m    *metrics
}

func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.m.connections.Add(1) <= l.most {
			return &limitedConn{Conn: conn, m: l.m}, nil
		}
		l.m.connections.Add(-1)
		l.m.connectionsRefused.Inc()
		_ = conn.Close() // whatever it says, it is gone
	}
}

type limitedConn struct {
	net.Conn
	m    *metrics
	once sync.Once
}

func (c *limitedConn) Close() error {
	c.once.Do(func() { c.m.connections.Add(-1) })
	return c.Conn.Close()
}
