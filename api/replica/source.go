package replica

import (
	"context"
	"errors"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// Source is where a replica's state comes from. [HTTP] is one, package etcdfeed has another.
// Its methods are called by one goroutine at a time, and must return once ctx has ended. Their errors are
// logged, and reported to the service, which shows them to people: they must have no secret, no password in
// a URL either.
type Source interface {
	// Load replaces the state by a snapshot, with one call of [State.Load] or
	// [State.ReadSnapshot].
	Load(ctx context.Context, s *State) error
	// Events returns events that follow a position. Its error is [ErrGone] if they are not to
	// be had: then a snapshot is loaded. A source that has snapshots only always returns that;
	// what it loads must be of the moment when it was asked.
	Events(ctx context.Context, after revocation.Position) (Page, error)
}

// Page is events that follow a position, in order.
type Page struct {
	Events []revocation.Event
	// Through: everything for this reader up to it is in Events, or was before.
	Through revocation.Seq
	// Head is how far the log reached less than two seconds before the page was asked for,
	// or later. Less than Through, such as -1: not known.
	Head revocation.Seq
}

// ErrGone is returned by [Source.Events] when the log no longer has the events after a
// position, or is of another epoch.
var ErrGone = errors.New("the events after this position are gone")

// Feed tells what happens. [HTTP] is one (server-sent events), the packages amqpfeed and
// etcdfeed have others.
type Feed interface {
	// Name is for status and logs: "sse", "amqp", "etcd".
	Name() string
	// Follow connects and tells to, from one goroutine, what happens, until ctx ends or the
	// connection is lost; then its error says why. The replica calls it again. At is where
	// the replica stands, for feeds that can begin there.
	//
	// Its error is logged, and reported to the service, which shows it to people: it must have no secret,
	// no password in a URL either.
	//
	// Follow calls Connected once it can miss nothing any more, and nothing else before.
	// A connection that is silent for three heartbeats is lost.
	Follow(ctx context.Context, at func() revocation.Position, to Receiver) error
}

// Receiver is what a [Feed] tells. Whatever it is told twice, or late, changes nothing. Its
// methods may take as long as the source does.
type Receiver interface {
	// Connected returns when the replica has what was before, which it fetches from its
	// source. If nothing is known yet and the source cannot be reached either, that is an error,
	// which Follow must return. If something is known, the feed is of use without the source: what is
	// revoked holds as soon as it is told, and what is missing is fetched later.
	//
	// A feed that finds out that it has missed something, or may have, calls it again.
	Connected(ctx context.Context) error
	// Event applies an event of the log. If some are missing before it, they are fetched.
	// Its error means that the feed must begin anew; Follow must return it.
	Event(ctx context.Context, e revocation.Event) error
	// Revoked makes rec hold at once; at is of its event, or of a later one. For feeds that
	// do not have the log's events.
	Revoked(rec Record, at revocation.Position)
	// Heartbeat says how far the feed has come. Follow must return its error.
	Heartbeat(ctx context.Context, b Beat) error
}

// Beat says how far a feed has come, and how far the log reaches.
type Beat struct {
	// Position: everything that this feed has for this reader, up to it, was told.
	revocation.Position
	// Head is the last seq of the log, at least Seq.
	Head revocation.Seq
	// Time is when Head was read, by the service's clock. Zero: not told; then it was less
	// than two seconds before it came.
	Time time.Time
	// RevocationsOnly: the feed has nothing else of the log, see [Receiver.Revoked], so
	// Position says nothing about the catalog.
	RevocationsOnly bool
	// Tenants are the domains of those whose events the feed has, if that is not for the service to
	// choose. Position says nothing about others. Nil: everything that this reader sees.
	Tenants []string
}
