// Package sidecar is the gateway for those that embed nothing: it answers forward-auth over HTTP and
// Envoy's ext_authz over gRPC, or stands before upstreams as a reverse proxy. It hides how each of
// them asks, and how the process is configured and watched.
//
// # Decisions
//
// Every request is decided about by itself, and no answer may be kept by whoever asked.
//
// What is decided about is the method and the target as they came, and just these are what the reverse
// proxy sends on, byte by byte. It sends on no header field by which some upstreams take a request for
// another one, such as X-HTTP-Method-Override, and switches to no protocol but WebSocket: over
// an h2c connection a client could ask for what nobody decided about.
//
// A decision is about the beginning of a request. An upload, a stream of events or a WebSocket that has
// begun goes on when its token is revoked.
//
// Whoever proxies for us (nginx, Caddy, Traefik, HAProxy, Envoy) runs beside us. So these listeners have
// no TLS and stay on loopback, unless the operator takes on more.
package sidecar

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/replica/amqpfeed"
	"github.com/rescindhq/rescind/api/replica/etcdfeed"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/process"
	"github.com/rescindhq/rescind/internal/tlsfile"
)

// checker decides about requests. It is a [gateway.Gateway].
type checker interface {
	Decide(ctx context.Context, r gateway.Request) gateway.Decision
	Ready() bool
}

// engine is what a process is built around: a gateway and its replica.
type engine interface {
	checker
	explainer
	// Run is called once, and ends with ctx.
	Run(ctx context.Context) error
	Status() replica.Status
	// Keys counts issuers.
	Keys() gateway.Status
}

// Addresses are where a running gateway listens; empty what is not configured.
type Addresses struct{ Auth, Envoy, Proxy, Ops string }

// Run runs the gateway until ctx ends; then it finishes what it has begun. Listening is called once it
// listens, which it does before anything is known: until then it refuses, or does what Config.Empty says.
func Run(ctx context.Context, cfg Config, log *slog.Logger, listening func(Addresses)) error {
	e, err := newEngine(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer e.close()
	return run(ctx, cfg, e, log, listening)
}

// live is the engine of a process.
type live struct {
	*gateway.Gateway
	replica *replica.Replica
	etcd    *etcdfeed.Etcd // nil if there is none
}

func (l *live) Status() replica.Status { return l.replica.Status() }
func (l *live) Keys() gateway.Status   { return l.Gateway.Status() }

// close gives up what newEngine has opened, once Run has returned.
func (l *live) close() {
	if l.replica != nil {
		_ = l.replica.Close() // it has only its folder to give up
	}
	if l.etcd != nil {
		_ = l.etcd.Close() // nothing that it could say matters any more
	}
}

func newEngine(ctx context.Context, cfg Config, log *slog.Logger) (_ *live, err error) {
	l := &live{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	rc := replica.Config{
		ID: cfg.ID, Labels: cfg.Labels, Version: version(), NoReports: cfg.Service == nil,
		Folder: cfg.Folder, Staleness: cfg.Staleness, Routes: cfg.Routes, Empty: cfg.Empty,
		Tenant: cfg.Tenant, Claims: cfg.Claims, Environments: cfg.Environments, Logger: log,
	}
	gc := gateway.Config{
		Networks: cfg.KeyNetworks, Folder: cfg.Folder, Audiences: cfg.Audiences, AnyAudience: cfg.AnyAudience,
		Leeway: orNone(cfg.Leeway), Realm: cfg.Realm, Logger: log,
	}
	if s := cfg.Service; s != nil {
		client, err := newClient(s.TLS)
		if err != nil {
			return nil, err
		}
		service, err := replica.NewHTTP(replica.HTTPConfig{
			URL: s.URL, AllowHTTP: s.AllowHTTP, Username: s.Username, Password: string(s.Password), Tenant: cfg.Tenant, Client: client,
		})
		if err != nil {
			return nil, err
		}
		rc.Source, rc.Feeds = service, append(rc.Feeds, service)
		gc.URL, gc.AllowHTTP = s.URL, s.AllowHTTP
		authorities, err := s.TLS.Client()
		if err != nil {
			return nil, fmt.Errorf("read the authorities in %s: %w", s.TLS.CA, err)
		}
		if authorities != nil {
			gc.RootCAs = authorities.RootCAs
		}
	}
	if a := cfg.AMQP; a != nil {
		tlsConfig, err := a.TLS.Client()
		if err != nil {
			return nil, fmt.Errorf("read the TLS files of RabbitMQ: %w", err)
		}
		ac := amqpfeed.Config{URL: string(a.URL), TLS: tlsConfig, Exchange: a.Exchange}
		if cfg.Tenant != "" {
			ac.Tenants = []string{cfg.Tenant}
		}
		feed, err := amqpfeed.New(ac)
		if err != nil {
			return nil, err
		}
		rc.Feeds = append(rc.Feeds, feed)
	}
	if e := cfg.Etcd; e != nil {
		tlsConfig, err := e.TLS.Client()
		if err != nil {
			return nil, fmt.Errorf("read the TLS files of etcd: %w", err)
		}
		l.etcd, err = etcdfeed.New(etcdfeed.Config{
			Endpoints: e.Endpoints, TLS: tlsConfig, Username: e.Username, Password: string(e.Password), Prefix: e.Prefix, Issuer: e.Issuer,
		})
		if err != nil {
			return nil, err
		}
		rc.Feeds = append(rc.Feeds, l.etcd)
		if rc.Source == nil {
			rc.Source = l.etcd
		}
	}
	if i := cfg.Introspection; i != nil {
		client, err := newClient(i.TLS)
		if err != nil {
			return nil, err
		}
		gc.Introspection = &gateway.Introspection{
			URL: i.URL, ClientID: i.ClientID, ClientSecret: string(i.ClientSecret), Client: client,
			Issuers: i.Issuers, Timeout: i.Timeout, MaxConcurrent: i.MaxConcurrent,
		}
	}
	if l.replica, err = replica.New(rc); err != nil {
		return nil, err
	}
	gc.Replica = l.replica
	for _, i := range cfg.Issuers {
		issuer, err := newIssuer(ctx, cfg, i, log)
		if err != nil {
			return nil, err
		}
		gc.Issuers = append(gc.Issuers, issuer)
	}
	if l.Gateway, err = gateway.New(gc); err != nil {
		return nil, err
	}
	return l, nil
}

// version is that of this program.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return "rescind-gateway " + info.Main.Version
	}
	return "rescind-gateway"
}

// orNone is d as fields take it whose zero value is a default.
func orNone(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// newIssuer is called once the folder is there.
func newIssuer(ctx context.Context, cfg Config, i Issuer, log *slog.Logger) (token.Issuer, error) {
	issuer := token.Issuer{
		Iss: i.Iss, Tenant: revocation.Tenant{Domain: i.Tenant}, Algorithms: i.Algorithms, AllowTypes: i.AllowTyp, MaxLifetime: i.MaxTokenLifetime,
	}
	if i.Tenant == revocation.SuperTenant.Domain {
		issuer.Tenant = revocation.SuperTenant
	}
	log = log.With("issuer", i.Iss)
	var err error
	if i.JWKSFile != "" {
		issuer.Keys, err = token.NewFileKeySet(ctx, i.JWKSFile, log)
	} else {
		rc := token.RemoteConfig{URL: i.JWKSURI, AllowedNetworks: cfg.KeyNetworks, Cache: token.CacheConfig{Logger: log}}
		if cfg.Folder != "" {
			sum := sha256.Sum256([]byte(i.Iss))
			rc.File = filepath.Join(cfg.Folder, "configured-"+hex.EncodeToString(sum[:8])+".keys")
		}
		issuer.Keys, err = token.NewRemoteKeySet(rc)
	}
	if err != nil {
		return token.Issuer{}, fmt.Errorf("use the keys of issuer %q: %w", i.Iss, err)
	}
	return issuer, nil
}

// newClient is nil, which stands for the default, without an authority of its own. It has no timeout for
// answers, which may be streams: who asks has one.
func newClient(files tlsfile.Files) (*http.Client, error) {
	tlsConfig, err := files.Client()
	if err != nil {
		return nil, fmt.Errorf("read the authorities in %s: %w", files.CA, err)
	}
	if tlsConfig == nil {
		return nil, nil
	}
	// As the replica's own: a peer that is gone is noticed also while it holds its answer.
	alive := net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 5 * time.Second, Count: 3}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: 10 * time.Second, KeepAliveConfig: alive}).DialContext,
			TLSClientConfig:        tlsConfig,
			TLSHandshakeTimeout:    10 * time.Second,
			IdleConnTimeout:        90 * time.Second,
			MaxIdleConnsPerHost:    64,
			MaxResponseHeaderBytes: 64 << 10,
			Protocols:              onlyHTTP1(),
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// run runs e and its listeners.
func run(ctx context.Context, cfg Config, e engine, log *slog.Logger, listening func(Addresses)) error {
	reg := obs.NewRegistry()
	m := newMetrics(reg, e)
	c := newCounted(e, cfg.MaxInFlight, m)
	readiness := &obs.Readiness{Checks: readinessChecks(e, cfg.Staleness.Max)}
	grace := cfg.ShutdownGrace

	var (
		at     Addresses
		opened []net.Listener
		fronts []func(context.Context) error
	)
	defer func() {
		for _, l := range opened {
			l.Close() // again, where a server had it
		}
	}()
	open := func(name, address string, to *string) (net.Listener, error) {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listen as %s.listen says: %w; free the port or choose another", name, err)
		}
		*to = l.Addr().String()
		opened = append(opened, l)
		return l, nil
	}
	front := func(name string, serve func(context.Context) error) {
		fronts = append(fronts, func(ctx context.Context) error {
			if err := serve(ctx); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}

	ops, err := open("ops", cfg.OpsListen, &at.Ops)
	if err != nil {
		return err
	}
	if cfg.Auth != nil {
		l, err := open("auth", cfg.Auth.Listen, &at.Auth)
		if err != nil {
			return err
		}
		server := newAuthServer(newForwardAuth(c, m, log), cfg.decisionTime(), log.With("component", "auth"))
		front("forward-auth", func(ctx context.Context) error { return process.ServeHTTP(ctx, server, l, grace, log) })
	}
	if cfg.Envoy != nil {
		l, err := open("envoy", cfg.Envoy.Listen, &at.Envoy)
		if err != nil {
			return err
		}
		server := newEnvoyServer(c, cfg.decisionTime(), log.With("component", "envoy"))
		front("Envoy's authorization", func(ctx context.Context) error { return serveGRPC(ctx, server, l, grace) })
	}
	if p := cfg.Proxy; p != nil {
		l, err := open("proxy", p.Listen, &at.Proxy)
		if err != nil {
			return err
		}
		handler, err := newProxy(*p, c, m, log)
		if err != nil {
			return err
		}
		l = limitConnections(l, p.MaxConnections, m)
		if p.TLS.Cert != "" {
			tlsConfig, err := p.TLS.Server(log)
			if err != nil {
				return err
			}
			tlsConfig.NextProtos = []string{"http/1.1"}
			l = tls.NewListener(l, tlsConfig)
		}
		server := newServer(handler, log.With("component", "proxy"))
		front("reverse proxy", func(ctx context.Context) error { return serveProxy(ctx, server, handler, l, grace, log) })
	}
	opsServer := newServer(opsHandler(reg, readiness, e), log.With("component", "ops"))
	opsServer.ReadTimeout, opsServer.WriteTimeout = 10*time.Second, 30*time.Second

	parts := []process.Part{
		{Name: "operators' listener", Grace: grace, Run: func(ctx context.Context) error { return process.ServeHTTP(ctx, opsServer, ops, time.Second, log) }},
		{Name: "gateway", Grace: grace, Run: e.Run},
		{Name: "listeners", Grace: 2 * grace, Run: func(ctx context.Context) error {
			defer context.AfterFunc(ctx, readiness.Drain)()
			all, ctx := errgroup.WithContext(ctx)
			for _, serve := range fronts {
				all.Go(func() error { return serve(ctx) })
			}
			return all.Wait()
		}},
	}
	log.Info("takes requests", "auth", at.Auth, "envoy", at.Envoy, "proxy", at.Proxy, "ops", at.Ops)
	if listening != nil {
		listening(at)
	}
	if err := process.Run(ctx, parts); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

// newAuthServer is for questions, which have no bodies, and take up to some time to decide: the deadline for writing,
// which counts from when a question was read, leaves an answer its time after that.
func newAuthServer(handler http.Handler, decision time.Duration, log *slog.Logger) *http.Server {
	server := newServer(handler, log)
	server.ReadTimeout, server.WriteTimeout = 10*time.Second, decision+10*time.Second
	return server
}

// newServer is one for HTTP/1.1, with bounds on what slow peers can hold.
func newServer(handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           tellPanics(handler, log),
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    64 << 10,
		Protocols:         onlyHTTP1(),
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // what peers do wrong
	}
}

// tellPanics tells of what net/http would tell between the lines about peers. A request that finds a mistake of
// ours ends as it does there: cut off, so that half an answer is not taken for a whole one.
func tellPanics(next http.Handler, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			caught := recover()
			if caught == nil {
				return
			}
			if caught != http.ErrAbortHandler {
				tellPanic(log, caught)
			}
			panic(http.ErrAbortHandler)
		}()
		next.ServeHTTP(w, r)
	})
}

// tellPanic is called where it was caught.
func tellPanic(log *slog.Logger, caught any) {
	log.Error("a request made the gateway panic; please report this", "panic", fmt.Sprint(caught), "stack", string(debug.Stack()))
}

func onlyHTTP1() *http.Protocols {
	p := &http.Protocols{}
	p.SetHTTP1(true)
	return p
}

// serveProxy is [process.ServeHTTP] for a proxy and its server. Connections that have become WebSockets, of which the
// server knows nothing any more, have what the requests leave of grace.
func serveProxy(ctx context.Context, server *http.Server, p *proxy, on net.Listener, grace time.Duration, log *slog.Logger) error {
	requests, cut := context.WithCancel(context.Background())
	defer cut()
	server.BaseContext = func(net.Listener) context.Context { return requests }
	served := make(chan error, 1)
	go func() { served <- process.ServeHTTP(ctx, server, on, grace, log) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	until := time.Now().Add(grace)
	err := <-served
	if !p.wait(time.Until(until)) {
		log.Warn("WebSockets and others that were not over in time are cut off", "grace", grace)
		cut()
		p.wait(grace / 2) // what is cut off ends at once
	}
	return err
}

// serveGRPC is [process.ServeHTTP] for gRPC.
func serveGRPC(ctx context.Context, server *grpc.Server, on net.Listener, grace time.Duration) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(on) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	late := time.AfterFunc(grace, server.Stop)
	defer late.Stop()
	server.GracefulStop()
	return nil
}
