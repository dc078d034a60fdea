// Package eventhub hides what WSO2's gateways call their event hub over HTTP: the
// snapshots below /internal/data/v1, the endpoint that key managers push
// revocations to, and a read-only image of an etcd of version 2 below /v2/keys, each
// in WSO2's words and with its mistakes in spelling (WSO2 contract, sections 7 to 9).
//
// # Invariants
//
// An answer stands at one position of the log, no older than the log's head was when
// its request came.
//
// An account that may read gets no 4xx for a read of what a gateway asks for, whatever
// the parameters: many gateways take a 4xx for the end of their start. What cannot be
// understood, or is of another tenant, is an empty list of the catalog.
//
// # Decisions
//
// Paths are taken apart here and not by the router: some gateways join URLs with two
// slashes and follow no redirect.
//
// Requests that have to wait do so before they are refused: some gateways take the
// first answer of any status as their last, and run without revocations after a 503.
//
// Lists of revocations are encoded once for all who wait for them at the same time, see
// blobs; a thousand gateways of a fleet start at once. Slow readers hold places and not
// turns to encode, of which there are few, and when memory is short they are the ones
// that have to come again. No account takes more than a quarter of anything.
//
// A request that names no tenant gets the catalog of its account's own tenant, and
// revocations of all tenants that the account sees, as does one for revocations of a tenant
// that it does not see: gateways ask once for these, and a revocation that is not needed
// does no harm.
//
// Encoded lists are shared. A list stays good while it has the same entities with the
// same timestamps, however many revocations are added to the log meanwhile.
package eventhub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

// Config tunes the event hub. The zero value is ready for production.
type Config struct {
	// MaxInFlight is how many requests of gateways are here at a time, waiting ones too, a
	// quarter of them of one account at most; past it the answer is 503. Each costs some
	// tens of KiB. Notifications have as many places again as a quarter of these. Default
	// 4096, 1 to 100000.
	MaxInFlight int
	// MaxReaders is how many are sent lists of revocations at a time, a quarter of them of
	// one account at most; others wait. Default 1024, 1 to 100000.
	MaxReaders int
	// MaxEncodings is how many answers are encoded at a time, each of which takes a CPU;
	// others wait. Default 4, 1 to 1000.
	MaxEncodings int
	// Wait is how long a request waits for its turn before it is 503, each of the two times
	// that it may have to. Default 20s, 1s to 5m.
	Wait time.Duration
	// SendBytes bounds the encoded lists of revocations in memory, and again the answers
	// about the catalog that are being sent; past it the answer is 503. Lists of
	// revocations take up to 1.25 MiB for each position of the log that one is read of, and
	// more as long as there is room. Default 512 MiB, at least 8 MiB.
	SendBytes int
	// CacheBytes bounds the encoded lists of the catalog that are kept. Default 256 MiB, at
	// least 1 MiB.
	CacheBytes int
	// Timeout bounds the wait for the newest state, and for one notification's commit.
	// Default 10s, 1s to 25s.
	Timeout time.Duration
	// ClockSkew is how far ahead of our clock a notified revocation's time may be, as it is
	// in the ledger. Default 2s, 0 to 60s; negative for none.
	ClockSkew time.Duration
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
	duration := func(name string, p *time.Duration, d, low, high time.Duration) {
		if *p == 0 {
			*p = d
		}
		if *p < low || *p > high {
			errs = append(errs, fmt.Errorf("%s is %s, must be %s to %s", name, *p, low, high))
		}
	}
	number("MaxInFlight", &c.MaxInFlight, 4096, 1, 100000)
	number("MaxReaders", &c.MaxReaders, 1024, 1, 100000)
	number("MaxEncodings", &c.MaxEncodings, 4, 1, 1000)
	number("SendBytes", &c.SendBytes, 512<<20, 8<<20, 1<<40)
	number("CacheBytes", &c.CacheBytes, 256<<20, 1<<20, 1<<40)
	duration("Wait", &c.Wait, 20*time.Second, time.Second, 5*time.Minute)
	duration("Timeout", &c.Timeout, 10*time.Second, time.Second, 25*time.Second)
	if c.ClockSkew < 0 {
		c.ClockSkew = 0
	} else {
		duration("ClockSkew", &c.ClockSkew, 2*time.Second, 0, time.Minute)
	}
	if err := errors.Join(errs...); err != nil {
		return c, fmt.Errorf("configure event hub: %w", err)
	}
	return c, nil
}

// State is what is known of the log. [follow.Follower] is one.
type State interface {
	// Fresh waits until the replica has everything up to a head that was read at most
	// maxAge before the call, or after it with 0, and returns that head.
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.State
}

// Ledger makes revocations durable. [ledger.Ledger] is one.
type Ledger interface {
	Revoke(ctx context.Context, r ledger.Request) (ledger.Result, error)
}

// Deps are the parts of the service that requests reach.
type Deps struct {
	// State's replica keeps records, see [replica.StateConfig].
	State    State
	Accounts rest.Accounts
	Ledger   Ledger
	// Idempotency remembers the notifications that were carried out.
	Idempotency rest.IdempotencyStore
	Registerer  prometheus.Registerer
	Log         *slog.Logger
}

// Hub answers gateways and those who notify. Its methods may be called from any
// goroutine.
type Hub struct {
	cfg     Config
	state   State
	ledger  Ledger
	seen    rest.IdempotencyStore
	log     *slog.Logger
	metrics *metrics

	slots, notifiers chan struct{} // one for each request in flight
	slotShares       *shares
	readers          chan struct{} // one for each that is sent a list of revocations
	readerShares     *shares
	encodings        chan struct{} // one for each answer that is being encoded
	lists            *lists
	blobs            *blobs
	sending          *sending
	remember         chan struct{} // one for each use of seen

	data, notify, keys http.Handler
}

// New returns an event hub.
func New(cfg Config, deps Deps) (*Hub, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	h := &Hub{
		cfg:       cfg,
		state:     deps.State,
		ledger:    deps.Ledger,
		seen:      deps.Idempotency,
		log:       deps.Log.With("component", "eventhub"),
		slots:     make(chan struct{}, cfg.MaxInFlight),
		notifiers: make(chan struct{}, max(1, cfg.MaxInFlight/4)), slotShares: newShares(cfg.MaxInFlight),
		readers: make(chan struct{}, cfg.MaxReaders), readerShares: newShares(cfg.MaxReaders),
		encodings: make(chan struct{}, cfg.MaxEncodings),
		remember:  make(chan struct{}, maxRemembering),
	}
	h.metrics = newMetrics(deps.Registerer)
	h.lists = newLists(cfg.CacheBytes, h.encoding, h.metrics)
	h.blobs = newBlobs(cfg.SendBytes, h.encodings, h.metrics)
	h.sending = newSending(cfg.SendBytes)
	h.metrics.watch(deps.Registerer, h)
	readers := []string{rest.Gateway, rest.Admin, rest.TenantAdmin, rest.Auditor}
	notifiers := []string{rest.Notifier, rest.Admin, rest.TenantAdmin}
	h.data = rest.Require(deps.Accounts, failData, readers...)(handler{h, h.shared(h.serveData), failData})
	h.keys = rest.Require(deps.Accounts, failKeys, readers...)(handler{h, h.shared(h.serveKeys), failKeys})
	h.notify = rest.Require(deps.Accounts, failData, notifiers...)(handler{h, h.serveNotify, failNotify})
	return h, nil
}

// handler answers a request, or returns an error for fail before it has written.
type handler struct {
	hub   *Hub
	serve func(w http.ResponseWriter, r *http.Request) error
	fail  func(w http.ResponseWriter, r *http.Request, err error)
}

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	err := h.serve(w, r)
	if errors.Is(err, errBusy) {
		h.hub.metrics.refused.Inc()
	}
	if err != nil {
		h.fail(w, r, err)
	}
}

// shared is serve for requests of accounts that have their share of all.
func (h *Hub) shared(serve func(http.ResponseWriter, *http.Request) error) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		share := h.slotShares.of(rest.AccountOf(r.Context()).Username)
		select {
		case share <- struct{}{}:
			defer func() { <-share }()
		default:
			return unavailable(overloadRetry, errBusy)
		}
		return serve(w, r)
	}
}

// What is served lies below these.
const (
	dataBase = "/internal/data/v1"
	keysBase = "/v2/keys"
)

const notifyName = "notify"

// Routes adds the event hub's routes. The patterns with a wildcard are for what is
// not there, and for paths with more slashes than they need.
func (h *Hub) Routes(r chi.Router) {
	for name, methods := range resources {
		for method := range methods {
			r.Method(method, dataBase+"/"+name, h)
		}
	}
	r.Method(http.MethodPost, dataBase+"/"+notifyName, h)
	r.Method(http.MethodGet, keysBase, h)
	r.Method(http.MethodGet, keysBase+"/{dir}", h)
	r.Method(http.MethodGet, keysBase+"/{dir}/{key}", h)
	for _, pattern := range []string{"/internal/*", "/v2/*", "//*"} {
		r.Handle(pattern, h)
	}
}

// ServeHTTP answers a request for any path.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := single(r.URL.EscapedPath())
	serve, fail, slots := http.Handler(nil), failData, h.slots
	switch name, isData := below(path, dataBase); {
	case isData && name == notifyName:
		serve, slots = h.notify, h.notifiers
	case isData:
		serve = h.data
	default:
		if _, ok := below(path, keysBase); !ok {
			rest.Write(w, r, rest.Status(http.StatusNotFound, ""))
			return
		}
		serve, fail = h.keys, failKeys
	}
	if methodOf(r) == http.MethodGet && r.ContentLength != 0 {
		// Nobody sends one, and to wait for it would hold the connection.
		w.Header().Set("Connection", "close")
		fail(w, r, problem(http.StatusBadRequest, "A %s has no body here.", r.Method))
		return
	}
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
	default:
		h.metrics.refused.Inc()
		fail(w, r, unavailable(overloadRetry, errBusy))
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	serve.ServeHTTP(w, r)
}

// single returns path with one slash where it has several, and none at its end.
func single(path string) string {
	if strings.Contains(path, "//") {
		var b strings.Builder
		for i := range len(path) {
			if path[i] != '/' || i == 0 || path[i-1] != '/' {
				b.WriteByte(path[i])
			}
		}
		path = b.String()
	}
	return strings.TrimSuffix(path, "/")
}

// below returns what follows base and a slash in path.
func below(path, base string) (rest string, ok bool) {
	rest, ok = strings.CutPrefix(path, base)
	if !ok || rest != "" && rest[0] != '/' {
		return "", false
	}
	return strings.TrimPrefix(rest, "/"), true
}

// methodOf is r's, with GET for HEAD.
func methodOf(r *http.Request) string {
	if r.Method == http.MethodHead {
		return http.MethodGet
	}
	return r.Method
}

// fresh waits for the newest state. What it returns was the log's head after the
// request came.
func (h *Hub) fresh(ctx context.Context) (revocation.Position, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, h.cfg.Timeout, errTimeout)
	defer cancel()
	return h.state.Fresh(ctx, 0)
}

var errTimeout = errors.New("it took too long to find out what is the newest state")

// patience bounds how long r waits for its turn.
func (h *Hub) patience(r *http.Request) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(r.Context(), h.cfg.Wait, errBusy)
}

// encoding waits for a turn to encode an answer, which done ends.
func (h *Hub) encoding(ctx context.Context) (done func(), err error) {
	select {
	case h.encodings <- struct{}{}:
		return func() { <-h.encodings }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// untimed keeps the context of a request that is here whole from ending with the server's
// time for reading it: the answer may take longer. While it is sent, see paced.
func (h *Hub) untimed(w http.ResponseWriter) {
	deadline := time.Now().Add(2*h.cfg.Wait + h.cfg.Timeout + readTime)
	_ = http.NewResponseController(w).SetReadDeadline(deadline) // a recorder in a test has none
}
