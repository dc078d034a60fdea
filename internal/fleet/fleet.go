// Package fleet knows the gateways that follow the log: which there are, what each has applied as of
// which report, and whether its state is the log's. It hides how reports come to be known in all
// processes, what is kept of them, and how gateways are asked.
package fleet

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
)

// Config tunes a fleet. The zero value is ready for production.
type Config struct {
	// ReportEvery is how often a gateway reports when nothing asks it. Default 2 s, 100 ms to 1 min.
	// With very many gateways it gets longer by itself, see [Fleet.Report].
	ReportEvery time.Duration
	// Lease is how long a gateway may be silent before it is lost. Default 10 s, at least 3 times
	// ReportEvery.
	Lease time.Duration
	// MaxHeld is how many reports wait for something to be asked at a time; past it they are answered at
	// once. Default 4096.
	MaxHeld int
	// MaxGateways is how many ids there may be. Default 50000.
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
	// Report is the last one, of ReportedAt by this process's clock. After a restart of the service it
	// may be up to a minute older than the truth.
	Report     replica.Report
	ReportedAt time.Time
	FirstSeen  time.Time
	Standing   Standing
	// Conflict is when another process last reported with the same id; zero: never lately.
	Conflict   time.Time
	Comparison Comparison
	// CanaryURL is where its canary is called, empty if it has none. Canary is the last result.
	CanaryURL string
	Canary    *CanaryResult
}

// Serves reports whether requests for a tenant's APIs may come to the gateway.
func (g *Gateway) Serves(domain string) bool { panic("skeleton") }

// Applied reports whether the last report says that everything up to p was applied.
func (g *Gateway) Applied(p revocation.Position) bool {
	return g.Report.Epoch == p.Epoch && g.Report.Seq >= p.Seq
}

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
	ErrOwned    = errors.New("this gateway id belongs to another account")
	ErrInstance = errors.New("another process, started later, reports with this gateway id")
	ErrTooMany  = errors.New("there are too many gateways")
	ErrNotFound = errors.New("there is no such gateway")
	ErrID       = errors.New("a gateway id must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or a digit")
)

// Fleet is all gateways. Its methods may be called from any goroutine.
type Fleet struct{}

// New returns a fleet that knows nothing yet. State is nil in a process that compares nothing.
func New(cfg Config, pool *pgxpool.Pool, state State, reg prometheus.Registerer, log *slog.Logger) (*Fleet, error) {
	panic("skeleton")
}

// Load reads what the database knows. It must have returned nil before anything else is called.
func (f *Fleet) Load(ctx context.Context) error { panic("skeleton") }

// Run exchanges with other processes and does what is due, until ctx ends.
func (f *Fleet) Run(ctx context.Context) error { panic("skeleton") }

// Report takes a report, and returns when there is something to ask, or the next one is due. Hold is
// false for a caller that cannot wait. Errors: [ErrID], [ErrOwned], [ErrInstance], [ErrTooMany], that of
// ctx, or one of the database.
func (f *Fleet) Report(ctx context.Context, by authn.Account, id string, r replica.Report, hold bool) (replica.Instructions, error) {
	panic("skeleton")
}

// Refresh asks all processes for what they know now, and waits for it a second at most.
func (f *Fleet) Refresh(ctx context.Context) error { panic("skeleton") }

// Gateways returns all, sorted by ID, as known in this process, see [Fleet.Refresh].
func (f *Fleet) Gateways() []Gateway { panic("skeleton") }

// Gateway returns one.
func (f *Fleet) Gateway(id string) (Gateway, bool) { panic("skeleton") }

// When says at which times around at a gateway was known to stand where: the last report before at, or at
// it, and the first one after. Either may be unknown: ok is false.
func (f *Fleet) When(id string, at time.Time) (before, after Sighting, okBefore, okAfter bool) {
	panic("skeleton")
}

// Sighting is where a gateway stood by a report.
type Sighting struct {
	At time.Time
	revocation.Position
}

// Forget removes a gateway that is gone for good. One that reports again is there again, and belongs to
// whoever reports it. [ErrNotFound].
func (f *Fleet) Forget(ctx context.Context, id string) error { panic("skeleton") }

// SetCanary sets where the canary of a gateway is called, empty for nowhere. [ErrNotFound].
func (f *Fleet) SetCanary(ctx context.Context, id, url string) error { panic("skeleton") }

// RecordCanary keeps the last result of a gateway. [ErrNotFound].
func (f *Fleet) RecordCanary(ctx context.Context, id string, r CanaryResult) error { panic("skeleton") }

// Load asks gateways to load a snapshot.
func (f *Fleet) AskLoad(ctx context.Context, ids []string) error { panic("skeleton") }

// AskDigests asks all gateways for digests with this cutoff at positions not before after. They are in
// Gateway.Report.Digest when they come; see [Fleet.Changed].
func (f *Fleet) AskDigests(ctx context.Context, r replica.DigestRequest) error { panic("skeleton") }

// Changed returns a channel that is closed when something is known anew. While an asking method or
// [Fleet.Barrier] was called within the last seconds that is so for reports in other processes too.
func (f *Fleet) Changed() <-chan struct{} { panic("skeleton") }

// Barrier is what to wait for.
type Barrier struct {
	revocation.Position
	// Select says which gateways count; nil: all do.
	Select func(*Gateway) bool
}

// BarrierResult says who has applied a position.
type BarrierResult struct {
	// Reached: every live gateway that counts has.
	Reached  bool
	Gateways []Confirmation // sorted by ID; those that count
	Took     time.Duration
}

// Confirmation is a gateway at a barrier.
type Confirmation struct {
	Gateway
	// Applied: it is live and has. What is lost never has.
	Applied bool
	// After is how long after the barrier began that was known, 0 if it was before.
	After time.Duration
}

// Wait waits until every live gateway that counts has applied b's position, those included that report
// for the first time meanwhile, or until ctx ends; that is no error. Its error is one of the database.
func (f *Fleet) Wait(ctx context.Context, b Barrier) (BarrierResult, error) { panic("skeleton") }
