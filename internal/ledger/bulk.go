package ledger

import "context"

// MaxBulk is how many revocations [Ledger.RevokeAll] takes: they hold the log's head for about
// a tenth of a second.
const MaxBulk = 10000

// RevokeAll commits all of requests, up to [MaxBulk], in one transaction, or none. Results are
// in the order of requests, each with its ID. One such transaction runs at a time in a process
// and few wait for it. It does not need [Ledger.Run]. Errors: [revocation.InvalidError],
// [ErrBusy], [ErrUnavailable], with [ErrDoubt] where the commit was sent, ctx's.
func (l *Ledger) RevokeAll(ctx context.Context, requests []Request) ([]Result, error) {
	panic("skeleton")
}
