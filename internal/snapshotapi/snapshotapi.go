// Package snapshotapi serves what gateways start from and follow: whole snapshots of
// the revocations and the catalog, and the events after them, as answers to polls and
// as a stream. It hides how any number of readers share the same bytes, and how those
// that are slow hold up nobody.
//
// # Invariants
//
// A snapshot is whole and of one position, and lacks nothing that was in the log two
// seconds before it was asked for. An answer with events says up to which position
// everything for its reader is in it, or was before: through.
//
// Readers cost the database next to nothing: everything comes from the service's replica,
// but for the events of those who are far behind, which they share, and an account of those
// that stream, which is looked at again each minute.
//
// # Decisions
//
// A snapshot is encoded and compressed once for all who ask for the same, and is sent
// while it is made. It is made no faster than the fastest of its readers takes it, and
// bytes that none of them needs any more are given back, so that one of 150 MB and a
// slow reader holds a few. See cache. A tag is good with the process that made it: another
// has the revocations in another order, and sends a gateway that comes to it the whole.
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
	// MaxReaders is how many snapshots are being sent at a time, to one account half as
	// many; past it the answer is 503. Each takes a connection. Default 4096, 1 to 1000000.
	MaxReaders int
	// MaxStreams is how many streams are open and polls wait at a time, of one account half
	// as many; past it the answer is 503. Each takes a connection. Default 10000, 1 to
	// 1000000.
	MaxStreams int
	// MaxCachedBytes bounds the snapshots in memory, those included that are being sent,
	// and what making them takes. Past it those that nobody reads are dropped, then readers
	// that have taken longer than 30 s, and then new ones refused: 503. What is being sent
	// goes on chunk by chunk, so there may be a few chunks more. Default 512 MiB, at least 16 MiB.
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
	number("MaxCachedBytes", &c.MaxCachedBytes, 512<<20, 16<<20, 1<<40)
	number("MaxBehind", &c.MaxBehind, 16<<20, 1<<20, 1<<40)
	if err := errors.Join(errs...); err != nil {
		return c, fmt.Errorf("configure snapshots and events: %w", err)
	}
	return c, nil
}

// Follower is the service's replica and the newest of its events. [follow.Follower] is one.
type Follower interface {
	Replica() *replica.State
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
	// closing ends with Close.
	closing context.Context
	close   context.CancelFunc
	// Constants but in tests.
	sendTimeout, slowFor, streamFor, askEvery time.Duration
}

// New checks cfg. The follower must have been loaded before the first request.
func New(cfg Config, deps Deps) (*API, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	a := &API{
		follower: deps.Follower, accounts: deps.Accounts,
		readers: slots{max: cfg.MaxReaders, by: make(map[string]int)}, streams: slots{max: cfg.MaxStreams, by: make(map[string]int)},
		sendTimeout: sendTimeout, slowFor: slowFor, streamFor: streamFor, askEvery: askEvery,
	}
	a.closing, a.close = context.WithCancel(context.Background())
	a.metrics = newMetrics(deps.Registerer, a)
	a.cache = newCache(deps.Follower, cfg.MaxCachedBytes, a.metrics, deps.Log.With("component", "snapshotapi"))
	a.hub = newHub(deps.Follower, cfg.MaxBehind)
	return a, nil
}

// Routes adds /v1/snapshots/{kind} and /v1/events to r, which stands at the root of the
// host. A HEAD must be routed like a GET.
func (a *API) Routes(r chi.Router) {
	r.Group(func(r chi.Router) {
		r.Use(noBody, rest.Require(a.accounts, nil, roles...))
		r.Method(http.MethodGet, "/v1/snapshots/{kind}", rest.Handler(a.snapshot))
		r.Method(http.MethodGet, "/v1/events", rest.Handler(a.events))
	})
}

// roles are those that may read.
var roles = []string{rest.Gateway, rest.Admin, rest.TenantAdmin, rest.Auditor}

// noBody refuses what has a body, of which nobody knows when it would come: an answer that
// lasts has no end by which it would have to be here.
func noBody(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 { // -1 if it is not told
			w.Header().Set("Connection", "close")
			rest.Write(w, r, rest.InvalidRequest("This request must have no body."))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// Close ends all streams in good order and answers all polls that wait. Streams that begin
// afterwards end at once. Snapshots that are being sent are not touched. It may be called
// more than once.
func (a *API) Close() {
	a.close()
	a.hub.close()
	a.cache.close()
}

// slots bound what goes on at a time, and what one account has of it: half.
type slots struct {
	max int

	mu    sync.Mutex
	taken int
	by    map[string]int // accounts that have some
}

// take returns a [rest.Problem] if all are taken.
func (s *slots) take(account string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	detail := ""
	switch {
	case s.taken >= s.max:
		detail = "Too many are being served. Sending the same request again is safe."
	case s.by[account] >= (s.max+1)/2:
		detail = "Too many of this account are being served. Sending the same request again is safe."
	default:
		s.taken++
		s.by[account]++
		return nil
	}
	p := rest.Status(http.StatusServiceUnavailable, detail)
	p.RetryAfter = busyRetry
	return p
}

func (s *slots) release(account string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken--
	if s.by[account]--; s.by[account] == 0 {
		delete(s.by, account)
	}
}

func (s *slots) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken
}

// What callers are asked to wait when too many are here, and when it is not known whether
// the replica is up to date.
const (
	busyRetry  = 2 * time.Second
	staleRetry = time.Second
)

// headAge is how old a head may be that an answer goes by.
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

// scopeOf is what account sees, or of that the one tenant that it asks for. Its error is a
// [rest.Problem]. The replica is asked for a tenant that the account sees with all others:
// else it could make any number of scopes.
func (a *API) scopeOf(ctx context.Context, account authn.Account, tenant string) (scope, error) {
	switch {
	case tenant != "" && !catalog.ValidDomain(tenant):
		return scope{}, rest.InvalidParameter("The parameter tenant is not a tenant's domain.")
	case tenant != "" && !account.Sees(tenant):
		return scope{}, rest.Status(http.StatusForbidden, "The account does not see this tenant.")
	case tenant != "" && tenant != account.Tenant.Domain && !slices.Contains(account.ExtraTenants, tenant) && !a.knows(tenant):
		if _, err := a.follower.Fresh(ctx, 0); err != nil { // it may be that new
			return scope{}, stale(err)
		}
		if !a.knows(tenant) {
			return scope{}, rest.Status(http.StatusNotFound, "There is no such tenant.")
		}
		fallthrough
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

func (a *API) knows(domain string) (known bool) {
	a.follower.Replica().View(func(v *replica.View) { known = v.Tenant(domain) != nil })
	return known
}

// maxLimit is the most that the parameter limit can be.
const maxLimit = 1000

// query is the parameters of a request, those that it may have.
type query struct {
	values  url.Values
	account authn.Account
	tenant  string // that is asked for
	scope   scope
	limit   int
}

// readQuery reads what all have: tenant and limit. A parameter that is not among known,
// or is there twice, is an error, since what it was to change would silently not happen.
func (a *API) readQuery(r *http.Request, known ...string) (query, error) {
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
	q := query{values: values, account: rest.AccountOf(r.Context()), tenant: values.Get("tenant"), limit: maxLimit}
	if values.Has("limit") {
		n, err := strconv.Atoi(values.Get("limit"))
		if err != nil || n < 1 || n > maxLimit || strconv.Itoa(n) != values.Get("limit") {
			return query{}, rest.InvalidParameter("The parameter limit must be 1 to 1000.")
		}
		q.limit = n
	}
	if values.Has("tenant") && q.tenant == "" {
		return query{}, rest.InvalidParameter("The parameter tenant is empty.")
	}
	q.scope, err = a.scopeOf(r.Context(), q.account, q.tenant)
	return q, err
}

// prefers returns which of mediaTypes an Accept field (RFC 9110, section 12.5.1) wants most, of two
// the first; none if it names none, or wants JSON more. What it does not name is not sent, since no
// caller gets a form that it may not know.
func prefers(r *http.Request, mediaTypes ...string) (mediaType string) {
	wanted, json := make([]float64, len(mediaTypes)), 0.0
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
		name = strings.ToLower(strings.TrimSpace(name))
		if name == "application/json" {
			json = weight
		} else if i := slices.Index(mediaTypes, name); i >= 0 {
			wanted[i] = weight
		}
	}
	most := 0.0
	for i, weight := range wanted {
		if weight > most && weight >= json {
			mediaType, most = mediaTypes[i], weight
		}
	}
	return mediaType
}
