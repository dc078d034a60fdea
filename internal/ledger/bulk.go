package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// MaxBulk is how many revocations [Ledger.RevokeAll] takes: they hold the log's head for about
// a tenth of a second.
const MaxBulk = 10000

// bulkTimeout bounds the transaction of a bulk, which takes about a second.
const bulkTimeout = 20 * time.Second

// RevokeAll commits all of requests, up to [MaxBulk], in one transaction, or none. Results are
// in the order of requests, each with its ID. In a process one such transaction of more than
// [Config.MaxBatch] revocations runs at a time and few wait for it; of smaller ones a few run,
// and many wait. It does not need [Ledger.Run]. Errors: [revocation.InvalidError],
// [ErrBusy], [ErrUnavailable], with [ErrDoubt] where the commit was sent, ctx's. Where the
// database refuses one of requests, its error comes as it is.
func (l *Ledger) RevokeAll(ctx context.Context, requests []Request) ([]Result, error) {
	if len(requests) > MaxBulk {
		return nil, &revocation.InvalidError{Detail: fmt.Sprintf("%d revocations at once, must be at most %d", len(requests), MaxBulk)}
	}
	for i, r := range requests {
		if err := r.Target.Validate(); err != nil {
			return nil, fmt.Errorf("revocation %d: %w", i, err)
		}
	}
	if len(requests) == 0 {
		return nil, nil
	}
	turnstile := l.smalls
	if len(requests) > l.cfg.MaxBatch {
		turnstile = l.bulks
	}
	if err := turnstile.enter(ctx); err != nil {
		if errors.Is(err, ErrBusy) {
			l.metrics.refused.Add(float64(len(requests)))
		}
		return nil, err
	}
	defer turnstile.leave()
	bounded, cancel := context.WithTimeoutCause(ctx, bulkTimeout, fmt.Errorf("no commit within %s", bulkTimeout))
	defer cancel()
	entries, of := merge(requests)
	results, doubt, err := l.store(bounded, entries, of, true)
	switch {
	case err == nil:
		return results, nil
	case doubt:
		return nil, l.asUnavailable(fmt.Errorf("%w: %w", ErrDoubt, err))
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case isItemFault(err):
		return nil, err
	}
	return nil, l.asUnavailable(err)
}
