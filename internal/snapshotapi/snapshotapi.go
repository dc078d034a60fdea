// Package snapshotapi serves what gateways start from and follow: whole snapshots of
// the revocations and the catalog, and the events after them, as answers to polls and
// as a stream. It hides how any number of readers share the same bytes, and how those
// that are slow hold up nobody.
//
// # Invariants
//
// A snapshot is whole and of one position, and what it lacks of the log is at most two
// seconds old. An answer with events says up to which position everything for its
// reader is in it, or was before: through.
//
// Readers cost the database nothing: everything comes from the service's replica.
//
// # Decisions
//
// A snapshot is encoded and compressed once for all who ask for the same, and is sent
// while it is made. It is made no faster than the fastest of its readers takes it, and
// bytes that none of them needs any more are given back, so that one of 150 MB and a
// slow reader holds a few. See cache.
//
// Those who see the same tenants share one stream, whose events are put together for
// 20 ms into batches of bytes that each of them writes with a single call. See live. An
// answer of this kind ends with its connection (no chunks), which spares two of three
// writes; a stream has no end that could be missed.
//
// A stream that falls too far behind the fastest is dropped, and comes back with
// Last-Event-ID. To wait for it would delay the others or take memory without bound.
package snapshotapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/rest"
)

// Config tunes what readers can hold. The zero value is ready for production.
type Config struct {
	// MaxReaders is how many snapshots are being sent at a time; past it the answer is
	// 503. Default 4096, 1 to 1000000.
	MaxReaders int
	// MaxStreams is how many streams are open and polls wait at a time; past it the
	// answer is 503. Default 10000, 1 to 1000000.
	MaxStreams int
	// MaxCachedBytes bounds the snapshots in memory, those included that are being sent.
	// Past it those that nobody reads are dropped, and then new ones refused: 503.
	// Default 512 MiB, at least 1 MiB.
	MaxCachedBytes int
	// MaxBehind is how many bytes a stream may be behind the fastest before it is
	// dropped. So many are held at most for those who see the same tenants. The system
	// takes some MiB for a reader that takes nothing, and which so seems fast for a while:
	// with less than that, others are dropped in its place. Default 16 MiB, at least 1 MiB.
	MaxBehind int
}

func (c Config) withDefaults() (Config, error) {
	var errs []error
	number := func(name string, p *int, n, low, high int) {
		if *p == 0 {
			*p = n
		}
		if *p < low || *p > high {
			errs = append(errs, fmt.Errorf("%s is %d, must be %d to %d", name, *p, low, high))
		}
	}
	number("MaxReaders", &c.MaxReaders, 4096, 1, 1000000)
	number("MaxStreams", &c.MaxStreams, 10000, 1, 1000000)
	number("MaxCachedBytes", &c.MaxCachedBytes, 512<<20, 1<<20, 1<<40)
	number("MaxBehind", &c.MaxBehind, 16<<20, 1<<20, 1<<40)
	if err := errors.Join(errs...); err != nil {
		return c, fmt.Errorf("configure snapshots and events: %w", err)
	}
	return c, nil
}

// Follower is the service's replica and the newest of its events. [follow.Follower] is one.
type Follower interface {
	Replica() *replica.Replica
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Changed() <-chan struct{}
	Frames(ctx context.Context, after revocation.Position, limit int) ([]follow.Frame, error)
}

// Deps are the parts of the service that requests reach.
type Deps struct {
	Follower   Follower
	Accounts   rest.Accounts
	Registerer prometheus.Registerer
	Log        *slog.Logger
}

// API serves snapshots and events. Make one with [New].
type API struct {
	follower Follower
	accounts rest.Accounts
	metrics  *metrics
	cache    *cache
	hub      *hub
	readers  slots
	streams  slots
	// closing is closed by Close.
	closing   chan struct{}
	closeOnce sync.Once
	// Constants but in tests.
	sendTimeout, streamFor time.Duration
}

// New checks cfg. The follower must have been loaded before the first request.
func New(cfg Config, deps Deps) (*API, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	a := &API{
		follower: deps.Follower, accounts: deps.Accounts,
		readers: make(slots, cfg.MaxReaders), streams: make(slots, cfg.MaxStreams), closing: make(chan struct{}),
		sendTimeout: sendTimeout, streamFor: streamFor,
	}
	a.metrics = newMetrics(deps.Registerer, a)
	a.cache = newCache(deps.Follower, cfg.MaxCachedBytes, a.metrics, deps.Log.With("component", "snapshotapi"))
	a.hub = newHub(deps.Follower, cfg.MaxBehind)
	return a, nil
}

// Routes adds /v1/snapshots/{kind} and /v1/events to r, which stands at the root of the
// host. A HEAD must be routed like a GET.
func (a *API) Routes(r chi.Router) {
	r.Group(func(r chi.Router) {
		r.Use(rest.Require(a.accounts, nil, rest.Gateway, rest.Admin, rest.TenantAdmin, rest.Auditor))
		r.Method(http.MethodGet, "/v1/snapshots/{kind}", rest.Handler(a.snapshot))
		r.Method(http.MethodGet, "/v1/events", rest.Handler(a.events))
	})
}

// Close ends all streams in good order and answers all polls that wait. Streams that begin
// afterwards end at once. Snapshots that are being sent are not touched. It may be called
// more than once.
func (a *API) Close() {
	a.closeOnce.Do(func() {
		close(a.closing)
		a.hub.close()
		a.cache.close()
	})
}

// slots bound what goes on at a time.
type slots chan struct{}

// take returns a [rest.Problem] if all are taken.
func (s slots) take() error {
	select {
	case s <- struct{}{}:
		return nil
	default:
		p := rest.Status(http.StatusServiceUnavailable, "Too many are being served. Sending the same request again is safe.")
		p.RetryAfter = busyRetry
		return p
	}
}

func (s slots) release() { <-s }

// What callers are asked to wait when too many are here, and when it is not known whether
// the replica is up to date.
const (
	busyRetry  = 2 * time.Second
	staleRetry = time.Second
)

// headAge is how old a head may be that a snapshot or heartbeat goes by.
const headAge = time.Second

// freshTimeout is how long a caller waits for the head to be known.
const freshTimeout = 5 * time.Second

// fresh is the head, read a second ago at most. Its error is a [rest.Problem].
func (a *API) fresh(ctx context.Context) (revocation.Position, error) {
	ctx, cancel := context.WithTimeout(ctx, freshTimeout)
	defer cancel()
	head, err := a.follower.Fresh(ctx, headAge)
	if err != nil {
		return head, stale(err)
	}
	return head, nil
}

func stale(cause error) error {
	p := rest.Status(http.StatusServiceUnavailable, "Whether this is the newest state cannot be told now.")
	p.RetryAfter, p.Cause = staleRetry, cause
	return p
}

// scope is the tenants that an answer is about.
type scope struct {
	// key distinguishes scopes: "*", or the domains, sorted, with a space between.
	key string
	// domains is nil for all.
	domains []string
}

// has reports whether what belongs to the tenant of this domain is in the answer.
func (s scope) has(domain string) bool {
	return s.domains == nil || slices.Contains(s.domains, domain)
}

// scopeOf is what account sees, or of that the one tenant that it asks for.
func scopeOf(account authn.Account, tenant string) (scope, error) {
	switch {
	case tenant != "" && !catalog.ValidDomain(tenant):
		return scope{}, rest.InvalidParameter("The parameter tenant is not a tenant's domain.")
	case tenant != "" && !account.Sees(tenant):
		return scope{}, rest.Status(http.StatusForbidden, "The account does not see this tenant.")
	case tenant != "":
		return scope{key: tenant, domains: []string{tenant}}, nil
	case account.SeesAll():
		return scope{key: "*"}, nil
	}
	domains := slices.Clone(account.ExtraTenants)
	domains = append(domains, account.Tenant.Domain)
	slices.Sort(domains)
	domains = slices.Compact(domains)
	return scope{key: strings.Join(domains, " "), domains: domains}, nil
}

// maxLimit is the most that the parameter limit can be.
const maxLimit = 1000

// query is the parameters of a request, those that it may have.
type query struct {
	values url.Values
	scope  scope
	limit  int
}

// readQuery reads what all have: tenant and limit. A parameter that is not among known,
// or is there twice, is an error, since what it was to change would silently not happen.
func readQuery(r *http.Request, known ...string) (query, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return query{}, rest.InvalidParameter("The query string is not well-formed.")
	}
	known = append([]string{"tenant", "limit"}, known...)
	for name, all := range values {
		if !slices.Contains(known, name) {
			return query{}, rest.InvalidParameter("A parameter is not known here. There are " + strings.Join(known, ", ") + ".")
		}
		if len(all) > 1 {
			return query{}, rest.InvalidParameter("The parameter " + name + " is there more than once.")
		}
	}
	q := query{values: values, limit: maxLimit}
	if values.Has("limit") {
		n, err := strconv.Atoi(values.Get("limit"))
		if err != nil || n < 1 || n > maxLimit || strconv.Itoa(n) != values.Get("limit") {
			return query{}, rest.InvalidParameter("The parameter limit must be 1 to 1000.")
		}
		q.limit = n
	}
	if values.Has("tenant") && values.Get("tenant") == "" {
		return query{}, rest.InvalidParameter("The parameter tenant is empty.")
	}
	q.scope, err = scopeOf(rest.AccountOf(r.Context()), values.Get("tenant"))
	return q, err
}

// prefers reports whether an Accept field (RFC 9110, section 12.5.1) names mediaType, and
// does not want JSON more. What it does not name is not sent, since no caller gets a form that
// it may not know.
func prefers(r *http.Request, mediaType string) bool {
	wanted, json := 0.0, 0.0
	for item := range strings.SplitSeq(strings.Join(r.Header["Accept"], ","), ",") {
		name, params, _ := strings.Cut(item, ";")
		weight := 1.0
		for param := range strings.SplitSeq(params, ";") {
			if k, v, ok := strings.Cut(strings.TrimSpace(param), "="); ok && strings.EqualFold(k, "q") {
				if q, err := strconv.ParseFloat(v, 64); err == nil {
					weight = q
				}
			}
		}
		switch strings.ToLower(strings.TrimSpace(name)) {
		case mediaType:
			wanted = weight
		case "application/json":
			json = weight
		}
	}
	return wanted > 0 && wanted >= json
}
