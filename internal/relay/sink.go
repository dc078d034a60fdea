package relay

import (
	"context"
	"errors"
	"fmt"

	"github.com/rescindhq/rescind/api/revocation"
)

// A Sink is one place that events go. The relay calls its methods from one
// goroutine at a time, and only in the process that leads the sink.
type Sink interface {
	// Deliver returns nil only when the far side has every event safe. Events
	// come in order, without a gap after what [Opener.Open] returned, and may
	// come again after a crash. When ctx ends it returns soon, with an error.
	Deliver(ctx context.Context, events []revocation.Event) error
}

// An Opener is a sink that must look at the far side before it can deliver.
type Opener interface {
	// Open is called when this process has become the sink's leader and again
	// after any error. Cursor is where the log believes the sink stands. Open
	// returns the seq after which delivery goes on: the cursor's, or another
	// one if the far side knows better.
	Open(ctx context.Context, cursor revocation.Position) (revocation.Seq, error)
}

// A Beater is a sink that passes on heartbeats, or uses them to look after itself.
type Beater interface {
	// Beat is called about once a second, between deliveries.
	Beat(ctx context.Context, h revocation.Heartbeat) error
}

// A Closer is a sink that holds connections.
type Closer interface {
	// Close is called when this process no longer leads the sink, before another
	// may. A later Open must work.
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
