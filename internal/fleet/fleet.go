// Package fleet knows the gateways that follow the log: which there are, what each has applied as of
// which report, and whether its state is the log's. It hides how reports come to be known in all
// processes, what is kept of them, and how gateways are asked.
//
// # Invariants
//
// A gateway is never said to have applied what it did not report, within its lease, to a process that
// lives: what the database remembers of it is shown, and so is what is older, and confirms nothing.
//
// A gateway is lost only when it could have reported for as long as its lease and did not: not because
// this process has just started, and not because another one, which it may report to, does not answer.
//
// An id is reported by one account, until it is forgotten; and by one process of that account's, the one
// that started last, while that one is live. One that was lost for a day is forgotten, one that left in
// good order after a week, one that has a canary after 30 days; the longest lost one earlier if a new one
// needs its place.
//
// # Decisions
//
// A report touches memory alone, but for the first of an id. The caller's goroutine waits with the
// answer; there is none for a gateway, and nothing that a report does grows with their number.
//
// While nobody asks, processes exchange nothing but heartbeats. A question is a notification; each
// process answers it by writing what it knows into its row, and writes again, as often as it pays, while
// the question is repeated. Notifications may be lost: a question is repeated as long as somebody waits
// for the answer, and who waits also looks by himself. Times of other processes are ages by the
// database's clock.
//
// The database has reports about every half a minute, in batches: they are for those who want to know
// of a gateway that is gone, not for confirming.
//
// A comparison with a gateway's digest is made by the process that it reports to. One that differs may
// be due to chance, so it takes two in a row, of different minutes.
package fleet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// Config tunes a fleet. The zero value is ready for production.
type Config struct {
	// ReportEvery is how often a gateway reports when nothing asks it. Default 2 s, 100 ms to 1 min.
	// With very many gateways it gets longer by itself, and Lease with it, see [Fleet.Report].
	ReportEvery time.Duration
	// Lease is how long a gateway may be silent before it is lost. Default 10 s, at least 3 times
	// ReportEvery.
	Lease time.Duration
	// MaxHeld is how many reports wait for something to be asked at a time; past it they are answered at
	// once. Default 4096.
	MaxHeld int
	// MaxGateways is how many ids there may be, half of them of one account. Default 20000: at 1 KiB or so
	// of each, 8 KiB at most and what tenants it names, they are what a process can tell another one in a
	// second. Those that left do not count; so many of them are remembered besides. Processes that take
	// first reports at the same time may go past it by as many.
	MaxGateways int
	// Observe: this process takes no reports, as a command.
	Observe bool
}

// State is the state of the log in this process, with history. [replica.State] is one.
type State interface {
	At() revocation.Position
	Digests(ctx context.Context, cutoff int64) (*replica.Digests, error)
}

// Standing says how a gateway stands.
type Standing string

const (
	Live Standing = "live" // has reported within its lease
	Lost Standing = "lost" // has not, and did not say that it would stop
)

// Verdict is what came of comparing a gateway's digest with the log's.
type Verdict string

const (
	Unknown  Verdict = "unknown"  // not compared yet, or not lately
	Equal    Verdict = "equal"    // it is the log's state at that position
	Diverged Verdict = "diverged" // twice in a row it was not
)

// Comparison is the last one of a gateway.
type Comparison struct {
	Verdict Verdict `json:"verdict"`
	// At is the position whose states were compared, Time when.
	At   revocation.Position `json:"at,omitzero"`
	Time time.Time           `json:"time,omitzero"`
	// Detail says in a sentence how they differ.
	Detail string `json:"detail,omitempty"`
}

// Gateway is what is known of one.
type Gateway struct {
	ID string
	// Account is who reports it, Tenant the domain of that account's tenant. Sees is of the account:
	// domains besides, "*" is all.
	Account string
	Tenant  string
	Sees    []string
	// Report is the last one, of ReportedAt by this process's clock.
	Report     replica.Report
	ReportedAt time.Time
	// Stored: the report confirms nothing. It was read from the database, and no process that lives has
	// heard of the gateway since, so that it may be up to a minute older than the truth; or it is older
	// than the gateway's lease.
	Stored    bool
	FirstSeen time.Time
	Standing  Standing
	// Conflict is when another process last reported with the same id; zero: not within ten minutes.
	Conflict   time.Time
	Comparison Comparison
	// CanaryURL is where its canary is called, empty if it has none. Canary is the last result.
	CanaryURL string
	Canary    *CanaryResult
}

// Serves reports whether requests for a tenant's APIs may come to the gateway.
func (g *Gateway) Serves(domain string) bool {
	return (domain == g.Tenant || slices.Contains(g.Sees, domain) || slices.Contains(g.Sees, allTenants)) &&
		(len(g.Report.Tenants) == 0 || slices.Contains(g.Report.Tenants, domain))
}

const allTenants = "*"

// Applied reports whether the last report says that everything up to p was applied. One that is only
// stored or was silent for its lease does not: the gateway may have come back with less.
func (g *Gateway) Applied(p revocation.Position) bool {
	return !g.Stored && applied(g.Report.Position, p)
}

func applied(at, p revocation.Position) bool { return at.Epoch == p.Epoch && at.Seq >= p.Seq }

// CanaryResult is what came of calling a gateway with a token that was then revoked.
type CanaryResult struct {
	// Outcome is "refused" (all is well), "still_accepted" (past the limit), "not_accepted" (the token was
	// refused before it was revoked) or "unreachable".
	Outcome string    `json:"outcome"`
	At      time.Time `json:"at"`
	// RefusedMS is the time from the commit of the revocation to the first refusal.
	RefusedMS float64 `json:"refused_ms,omitempty"`
	// Detail is for people, without secrets.
	Detail string `json:"detail,omitempty"`
}

// The errors of [Fleet.Report] and the others. Each is for people.
var (
	// ErrReport is wrapped with what is wrong.
	ErrReport   = errors.New("the report is not valid")
	ErrOwned    = errors.New("this gateway id belongs to another account")
	ErrInstance = errors.New("another process, started later, reports with this gateway id")
	ErrTooMany  = errors.New("there are too many gateways")
	ErrNotFound = errors.New("there is no such gateway")
	ErrID       = errors.New("a gateway id must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or a digit")
)

// Fleet is all gateways. Its methods may be called from any goroutine.
type Fleet struct {
	cfg     Config
	pool    *pgxpool.Pool
	state   State
	log     *slog.Logger
	metrics *metrics
	self    string        // a UUID, of this process
	claims  chan struct{} // a value for each first or last report that the database is told of
	kicks   kicks
	known   chan struct{} // closed when the other processes know of this one

	changing chan struct{} // has one while rows are read that have changed

	mu       sync.Mutex
	gateways map[string]*gateway
	owned    map[string]int   // by account
	claiming map[string]*turn // by account
	lists    lists
	since    time.Time // when this process could first be reported to
	reports  int       // gateways that report to this process
	held     int
	ended    bool
	changed  chan struct{} // nil: nobody waits
	barriers map[*waiting]struct{}
	wanted   digestWish // of all gateways
	digests  *question  // that of this process, nil: none
	talk     talk
	rows     changedRows
	queue    []*gateway  // whose digests are to be compared
	loading  []time.Time // when gateways were told to load a snapshot

	// makeDigests is that of state, but for tests.
	makeDigests func(ctx context.Context, cutoff int64) (digests, error)
}

// kicks wake what runs in the background. Each holds one value.
type kicks struct {
	converse, tell, compare, refresh, rows chan struct{}
}

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (c Config) withDefaults() (Config, error) {
	c.ReportEvery = cmp.Or(c.ReportEvery, 2*time.Second)
	c.Lease = cmp.Or(c.Lease, max(10*time.Second, 3*c.ReportEvery))
	c.MaxHeld = cmp.Or(c.MaxHeld, 4096)
	c.MaxGateways = cmp.Or(c.MaxGateways, 20000)
	var errs []error
	if c.ReportEvery < 100*time.Millisecond || c.ReportEvery > time.Minute {
		errs = append(errs, fmt.Errorf("ReportEvery is %s, must be 100ms to 1m", c.ReportEvery))
	}
	if c.Lease < 3*c.ReportEvery {
		errs = append(errs, fmt.Errorf("ReportEvery is %s and Lease %s, must be at least 3 times as long", c.ReportEvery, c.Lease))
	}
	if c.MaxHeld < 0 {
		errs = append(errs, fmt.Errorf("MaxHeld is %d, must not be negative", c.MaxHeld))
	}
	if c.MaxGateways < 0 {
		errs = append(errs, fmt.Errorf("MaxGateways is %d, must not be negative", c.MaxGateways))
	}
	return c, errors.Join(errs...)
}

// New returns a fleet that knows nothing yet. State is nil in a process that compares nothing.
func New(cfg Config, pool *pgxpool.Pool, state State, reg prometheus.Registerer, log *slog.Logger) (*Fleet, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("configure fleet: %w", err)
	}
	one := func() chan struct{} { return make(chan struct{}, 1) }
	return &Fleet{
		cfg: cfg, pool: pool, state: state, metrics: newMetrics(reg),
		log:         log.With("component", "fleet"),
		self:        uuid.NewString(),
		claims:      make(chan struct{}, maxClaims),
		kicks:       kicks{one(), one(), one(), one(), one()},
		changing:    one(),
		known:       make(chan struct{}),
		gateways:    make(map[string]*gateway),
		owned:       make(map[string]int),
		claiming:    make(map[string]*turn),
		lists:       make(lists),
		barriers:    make(map[*waiting]struct{}),
		talk:        newTalk(),
		makeDigests: func(ctx context.Context, cutoff int64) (digests, error) { return state.Digests(ctx, cutoff) },
	}, nil
}

// Load reads what the database knows. It must have returned nil before anything else is called.
func (f *Fleet) Load(ctx context.Context) error {
	if err := f.sync(ctx, nil, true); err != nil {
		return fmt.Errorf("load the gateways: %w", err)
	}
	f.mu.Lock()
	f.since = time.Now()
	f.mu.Unlock()
	return nil
}

// Run exchanges with other processes and does what is due, until ctx ends; then it writes down what it
// knows and returns nil. It is called once. While it does not run, other processes are not heard, and do
// not know of this one.
func (f *Fleet) Run(ctx context.Context) error {
	f.mu.Lock()
	f.since = time.Now() // gateways may have waited for it
	f.mu.Unlock()
	g, gctx := errgroup.WithContext(ctx)
	for _, part := range []func(context.Context){f.listen, f.converse, f.refreshLost, f.syncRows} {
		g.Go(func() error { part(gctx); return nil })
	}
	if !f.cfg.Observe {
		for _, part := range []func(context.Context){f.tell, f.tick, f.keep, f.compare} {
			g.Go(func() error { part(gctx); return nil })
		}
	}
	err := g.Wait()
	f.end(context.WithoutCancel(ctx))
	return err
}

// Changed returns a channel that is closed when something is known anew. While an asking method or
// [Fleet.Wait] was called within the last seconds that is so for reports in other processes too. Take it
// before looking, so that nothing is missed.
func (f *Fleet) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed == nil {
		f.changed = make(chan struct{})
	}
	return f.changed
}

// announce needs f.mu.
func (f *Fleet) announce() {
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
