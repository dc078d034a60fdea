package replica

import (
	"context"
	"log/slog"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// Config is what [New] makes a replica of. Source alone is enough.
type Config struct {
	// Source is where snapshots, and events that no feed delivered, come from.
	Source Source
	// Feeds tell what happens, side by side. None: Source, if it is a [Feed] too.
	Feeds []Feed
	// Folder is where the state is kept for a start without Source, in files of its own.
	// It is made if it is not there. No two replicas may share one. Empty: nowhere.
	Folder string

	// Staleness is what is done with what is not revoked as far as is known, past an age.
	// The zero value is {300 s, Deny}.
	Staleness Staleness
	// Routes have another Staleness than that, by the longest Path that a request's path
	// begins with, whole segments each.
	Routes []Route
	// Empty says what is done while nothing at all is known: after a first start without
	// Source. Deny (the default) or Serve.
	Empty OnStale

	// Claims says whether Authorize believes what self-contained tokens carry. Default ClaimsFirst.
	Claims ClaimsMode
	// Environments are the gateway environments (labels) of this gateway: APIs that are deployed
	// to none of them are not there. Empty: all are.
	Environments []string

	// Logger is told when feeds break and heal, snapshots are loaded, and the folder cannot
	// be used. Default: nobody.
	Logger *slog.Logger
}

// Staleness says what is done past an age.
type Staleness struct {
	// Max is the age of what is known past which Then is done. 1 s to 24 h. Default 300 s.
	Max time.Duration
	// Then is done with what is not revoked as far as is known. What is revoked is
	// refused at any age.
	Then OnStale
}

// Route is a part of the paths that has a staleness of its own.
type Route struct {
	// Path is what paths begin with, for example "/payments".
	Path string
	Staleness
}

// OnStale says what becomes of a request when too little is known. Its text is "deny",
// "serve" or "introspect".
type OnStale uint8

const (
	Deny       OnStale = iota // refuse it
	Serve                     // let it through
	Introspect                // ask the issuer (RFC 7662)
)

// Replica is a [State] that is kept up to date. Make one with [New]. Its methods may be
// called from any goroutine.
type Replica struct{ state *State }

// New checks cfg and reads what cfg.Folder has, so that the replica that it returns can be
// asked at once if there is something. It connects to nothing.
func New(cfg Config) (*Replica, error) { panic("skeleton") }

// Run keeps the replica up to date until ctx ends, then returns nil. It is called once. What
// fails is tried again, with growing waits of 5 s at most; it is logged and told by Status.
func (r *Replica) Run(ctx context.Context) error { panic("skeleton") }

// State is what is known. Only Run changes it.
func (r *Replica) State() *State { return r.state }

// Outcome is what [Replica.Check] says.
type Outcome uint8

const (
	// Refused: too little is known to accept the token.
	Refused Outcome = iota
	// Revoked: a revocation matches it.
	Revoked
	// Valid: none does, and enough is known to say so, or the operator wants it served.
	Valid
	// Ask: none does as far as is known, and its issuer is to be asked.
	Ask
)

// Decision is what is known of a token.
type Decision struct {
	Outcome Outcome
	// Kind is of the revocation, if Outcome is Revoked.
	Kind revocation.Kind
	// Age is how old what is known is: everything that was committed longer ago is in it.
	// [Never] while nothing is known.
	Age time.Duration
}

// Never is the age of nothing.
const Never = time.Duration(1<<63 - 1)

// Check says whether t is revoked now, and past Config.Staleness what is to be done. It takes no
// lock, allocates nothing and asks nobody. That t is genuine and has not expired is for the
// caller to make sure of, see package token.
func (r *Replica) Check(t Token) Decision { panic("skeleton") }

// CheckWith is Check with another staleness, such as [Replica.StalenessOf] a path.
func (r *Replica) CheckWith(t Token, s Staleness) Decision { panic("skeleton") }

// StalenessOf is the staleness of requests for a path.
func (r *Replica) StalenessOf(path string) Staleness { panic("skeleton") }

// Age is that of [Decision].
func (r *Replica) Age() time.Duration { panic("skeleton") }

// Ready reports whether what a gateway needs is known: a state was loaded from the source or
// from the folder, or Config.Empty is Serve; and what was loaded is not so stale that everything
// would be refused.
func (r *Replica) Ready() bool { panic("skeleton") }

// Status is for operators. It has no secret.
func (r *Replica) Status() Status { panic("skeleton") }

// Status is how a replica does.
type Status struct {
	revocation.Position
	// Age is that of [Decision], in nanoseconds.
	Age   time.Duration `json:"age"`
	Ready bool          `json:"ready"`
	// From is where the state came from: "" (nothing yet), "folder" or "source".
	From string `json:"from"`
	// RevocationsOnly: Authorize cannot look at the catalog.
	RevocationsOnly bool `json:"revocations_only"`
	// Tenants are those that the state is about. None: all.
	Tenants []string `json:"tenants,omitempty"`
	// Revocations and Entities count what is held.
	Revocations int `json:"revocations"`
	Entities    int `json:"entities"`
	// Snapshots counts those that were loaded, Deltas the times that missed events were
	// fetched, since the start.
	Snapshots uint64       `json:"snapshots"`
	Deltas    uint64       `json:"deltas"`
	Feeds     []FeedStatus `json:"feeds"`
	// Error is the last thing that went wrong with the source or the folder, empty when it
	// is over.
	Error string `json:"error,omitempty"`
}

// FeedStatus is how a feed does.
type FeedStatus struct {
	Name      string `json:"name"`
	Connected bool   `json:"connected"`
	// Heard is when something last came, in Unix milliseconds. 0: never.
	Heard int64 `json:"heard"`
	// Events counts what came since the start.
	Events uint64 `json:"events"`
	Error  string `json:"error,omitempty"`
}
