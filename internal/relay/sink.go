package relay

import (
	"context"
	"errors"
	"fmt"

	"github.com/rescindhq/rescind/api/revocation"
)

// A Sink is one place that events go. It is all that a place must have; [Opener],
// [Beater] and [Closer] are for those that need more. The relay calls the methods of
// all four from one goroutine at a time, and only in the process that leads the sink.
//
// A sink has no retry, no backoff and no cursor of its own: it does one thing once,
// and says whether it was done. Its errors are logged and shown to operators, so they
// name the place and the cause and have no secret in them. Whether a sink keeps to
// all this is shown by relaytest.Sink.
type Sink interface {
	// Deliver returns nil only when the far side has every event safe; what was written
	// and not confirmed is not. Events come in order, without a gap after what
	// [Opener.Open] returned or after the last delivery that succeeded. They are shared,
	// and must not be changed.
	//
	// After any error the relay waits, calls Open, and delivers again all that followed
	// the last success and perhaps some before it, in other portions. So events come at
	// least once: the far side tells a repeat by the event's [revocation.Position], or is
	// such that a repeat changes nothing. An error wrapped by [Permanent] stops the
	// sink instead. An event that a far side has no use for is left out, one that cannot
	// be understood is a permanent error: skipping it could spare a revoked token.
	//
	// When ctx ends Deliver returns soon, with an error, whatever the far side does. It
	// has no other limit of time than its own, and needs one: a far side that never
	// answers is an error.
	Deliver(ctx context.Context, events []revocation.Event) error
}

// An Opener is a sink that must look at the far side before it can deliver.
type Opener interface {
	// Open is called when this process has become the sink's leader and again
	// after any error, without a Close between. Cursor is where the log believes the
	// sink stands: at or before what the far side has. Open returns the seq after which
	// delivery goes on: the cursor's, or another one if the far side knows better.
	// [ErrRestored] is for a far side that is ahead of the log. What Open starts must
	// outlive ctx, and end in Close.
	Open(ctx context.Context, cursor revocation.Position) (revocation.Seq, error)
}

// A Beater is a sink that passes on heartbeats, or uses them to look after itself.
type Beater interface {
	// Beat is called about once a second, between deliveries. An error is taken as one
	// of Deliver, so a sink that finds its connection lost is opened again although there
	// is nothing to deliver.
	Beat(ctx context.Context, h revocation.Heartbeat) error
}

// A Closer is a sink that holds connections or runs something beside its deliveries.
type Closer interface {
	// Close is called when this process no longer leads the sink, before another
	// may: when it returns, the sink sends nothing any more. It is called also if Open
	// was not, or failed, and returns within seconds. A later Open must work.
	Close()
}

// ErrRestored reports that the far side has events of this epoch that the log
// does not have: the database was restored to an older state. Publishing on
// would give two events one seq, so the process must stop.
var ErrRestored = errors.New("the database is older than what was already published from it: it was restored; " +
	"stop all processes and run: rescind epoch new")

type permanentError struct{ err error }

func (e permanentError) Error() string { return e.err.Error() }
func (e permanentError) Unwrap() error { return e.err }

// Permanent marks err as one that trying again cannot mend. The relay stops the
// sink, says so, and skips nothing.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return permanentError{fmt.Errorf("needs an operator: %w", err)}
}
