// Package httpapi hides how HTTP reaches the service: routes, limits, request ids
// and traces, errors as RFC 6749 or RFC 9457 demand them, a log line and metrics
// for each request, and the revocation endpoint of RFC 7009.
//
// # Decisions
//
// HTTP/1.1 only. A connection then carries one request at a time, so that the
// bound on connections bounds what slow senders can hold; a machine client that
// keeps its connections gains little from HTTP/2.
//
// Past the bound on connections, the one that has been idle for longest is closed
// for the new one. A bound that stops accepting would hand the service to whoever
// opens that many connections and says nothing.
//
// A form is read before its request takes a place among those in flight: slow
// senders hold connections, and never the places of those whose request is here.
//
// Requests that last, such as event streams and snapshots, take no such place: they
// would keep revocations out. Their packages have bounds of their own.
//
// "Unknown token, nothing to do" is said only where it is proven; what cannot be
// found out now is a 503. See [Verifier].
package httpapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/internal/authn"
)

// Config tunes the listener. The zero value is ready for production.
type Config struct {
	// MaxInFlight is how many requests are worked on at a time; past it the answer
	// is 503. More waits longer in the ledger's queue. Default 1024, 1 to 100000.
	MaxInFlight int
	// MaxConnections is how many connections are open at a time, each about 20 KiB
	// of memory when idle. Default 4096, 1 to 1000000.
	MaxConnections int
	// Timeout bounds one revocation, from its last byte to the answer. Default 10s,
	// 1s to 25s; shorter than a commit can take makes needless 503s.
	Timeout time.Duration
	// UnverifiedPerSecond is how often one client may revoke what cannot be
	// verified: a bare jti, or an opaque token. For this process. Default 100, 1 to
	// 100000.
	UnverifiedPerSecond int
	// IssuerPath is the path of our issuer's URL, empty for most: the endpoints that
	// its metadata names lie below it.
	IssuerPath string
}

func (c Config) withDefaults() (Config, error) {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	number := func(name string, p *int, n, high int) {
		if *p == 0 {
			*p = n
		}
		check(1 <= *p && *p <= high, "%s is %d, must be 1 to %d", name, *p, high)
	}
	number("MaxInFlight", &c.MaxInFlight, 1024, 100000)
	number("MaxConnections", &c.MaxConnections, 4096, 1000000)
	number("UnverifiedPerSecond", &c.UnverifiedPerSecond, 100, 100000)
	if c.Timeout == 0 {
		c.Timeout = 10 * time.Second
	}
	check(time.Second <= c.Timeout && c.Timeout <= 25*time.Second, "Timeout is %s, must be 1s to 25s", c.Timeout)
	if err := errors.Join(errs...); err != nil {
		return c, fmt.Errorf("configure HTTP: %w", err)
	}
	return c, nil
}

// Deps are the parts of the service that requests reach.
type Deps struct {
	Clients  Clients
	Verifier Verifier
	Ledger   Ledger
	// Introspection is the endpoint of RFC 7662.
	Introspection http.Handler
	// Tenant returns nil if there is an issuer of the tenant of this domain, else what to answer.
	Tenant func(ctx context.Context, domain string) error
	// Routes add the routes of other packages.
	Routes []func(chi.Router)
	// Remote is the address that a request comes from.
	Remote     func(*http.Request) netip.Addr
	Registerer prometheus.Registerer
	Log        *slog.Logger
}

// formPaths are the endpoints whose errors are always OAuth error objects.
var formPaths = map[string]bool{
	"/revoke": true, "/oauth2/revoke": true, "/oauth2/token": true, "/oauth2/introspect": true,
}

// isForm tells them by their path, with the issuer's before it or without: both are served.
func (a *api) isForm(path string) bool {
	return isForm(path) || isForm(strings.TrimPrefix(path, a.cfg.IssuerPath))
}

func isForm(path string) bool {
	if below, ok := strings.CutPrefix(path, "/t/"); ok {
		_, path, _ = strings.Cut(below, "/")
		path = "/" + path
	}
	return formPaths[path]
}

// tenantPath is before the endpoints of a tenant's issuer.
const tenantPath = "/t/{tenant}"

type api struct {
	cfg     Config
	router  *chi.Mux
	remote  func(*http.Request) netip.Addr
	log     *slog.Logger
	metrics *metrics
	slots   chan struct{} // one for each request in flight
}

// New returns the handler of everything that clients and gateways reach.
func New(cfg Config, deps Deps) (http.Handler, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	a := &api{
		cfg:    cfg,
		router: chi.NewRouter(),
		remote: deps.Remote,
		log:    deps.Log.With("component", "httpapi"),
		slots:  make(chan struct{}, cfg.MaxInFlight),
	}
	a.metrics = newMetrics(deps.Registerer, a.slots)
	a.router.Use(a.observe, a.admit, middleware.GetHead)
	a.router.NotFound(a.notFound)
	a.router.MethodNotAllowed(a.methodNotAllowed)
	// Every method: these endpoints refuse in their own form.
	revoke := newRevoker(cfg, deps)
	a.router.Handle("/revoke", revoke)
	prefixes := []string{""}
	if cfg.IssuerPath != "" {
		prefixes = append(prefixes, cfg.IssuerPath)
	}
	for _, prefix := range prefixes {
		a.router.Handle(prefix+"/oauth2/revoke", revoke)
		a.router.Handle(prefix+"/oauth2/introspect", deps.Introspection)
		a.router.Handle(prefix+tenantPath+"/oauth2/revoke", ofTenant(deps.Tenant, revoke))
		a.router.Handle(prefix+tenantPath+"/oauth2/introspect", ofTenant(deps.Tenant, deps.Introspection))
	}
	for _, add := range deps.Routes {
		add(a.router)
	}
	return a.router, a.metrics.prepare(a.router, a.isForm)
}

// ofTenant serves what is below the issuer of a tenant, for tenants that there are.
func ofTenant(check func(ctx context.Context, domain string) error, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := check(r.Context(), chi.URLParam(r, "tenant")); err != nil {
			w.Header().Set("Cache-Control", "no-store")
			authn.WriteError(w, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// lasting are the paths below which requests may take long. What answers them bounds
// them by itself.
var lasting = []string{"/v1/events", "/v1/snapshots/", "/v1/gateways/", "/v1/barrier", "/internal/", "/v2/"}

func isLasting(path string) bool {
	path = "/" + strings.TrimLeft(path, "/")
	return slices.ContainsFunc(lasting, func(prefix string) bool { return strings.HasPrefix(path, prefix) })
}

// admit bounds the requests in flight.
func (a *api) admit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a.isForm(r.URL.Path) {
			readAhead(r)
		}
		if received, ok := r.Context().Value(receivedKey{}).(func()); ok {
			received()
		}
		if isLasting(r.URL.Path) {
			next.ServeHTTP(w, r)
			return
		}
		select {
		case a.slots <- struct{}{}:
			defer func() { <-a.slots }()
			next.ServeHTTP(w, r)
		default:
			a.fail(w, r, authn.Unavailable(overloadRetry, errOverload))
		}
	})
}

// overloadRetry is what callers are asked to wait when too many requests are
// here already.
const overloadRetry = time.Second

var errOverload = errors.New("too many requests are in flight")
