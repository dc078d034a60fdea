package ledger

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
)

// MaxChanges is how many events one [Ledger.Change] may append, so that it holds the
// log's head for a few milliseconds.
const MaxChanges = 500

// ErrDoubt means that a change's commit was sent, and that its outcome is not known or
// that a fail-over may still undo it. It is an [ErrUnavailable] too.
var ErrDoubt = errors.New("it may have been made all the same: look before it is made again")

// Tx is a transaction in which state that this package does not own changes together
// with the log. It must not be used after the function that was given it returns.
type Tx struct {
	pgx.Tx
	// Now is the database's clock when the transaction began. It is read anew on each try.
	Now time.Time

	written   written
	requests  []Request
	unaudited bool // requests have no records in the audit
	source    string
}

// Append adds e, of which the log sets Position, Previous, Source and Time, after
// those that were added before. entityID is the UUID of what it is about.
func (tx *Tx) Append(e revocation.Event, entityID string) {
	e.Source = tx.source
	tx.written.add(e, entityID)
}

// Revoke adds revocations, which come after the events of [Tx.Append] in the log: whoever
// knows that a client's tokens are dead also knows what it has lost, and issues no new ones
// that say otherwise.
func (tx *Tx) Revoke(r ...Request) { tx.requests = append(tx.requests, r...) }

// Audit adds a record. Revocations have theirs already.
func (tx *Tx) Audit(e AuditEntry) { tx.written.audit.add(e) }

// Change runs f in a transaction and commits what f changed together with the events
// that it appended, at most [MaxChanges] with those of its revocations. It returns the
// log's head: with events, the position of the last of them.
//
// f may be run again after a deadlock or a serialization failure. Nothing is left of a
// change that fails, but for those with [ErrDoubt]. An error of f is returned as it is,
// unless the database went away or refuses for a while: then [ErrUnavailable], with
// [ErrDoubt] when the commit had been sent. Few changes run at a time and few more wait
// for their turn, a short time: past that it returns [ErrBusy], and f was not run. So f
// must not call Change.
func (l *Ledger) Change(ctx context.Context, f func(ctx context.Context, tx *Tx) error) (revocation.Position, error) {
	if err := l.changes.enter(ctx); err != nil {
		return revocation.Position{}, err
	}
	defer l.changes.leave()
	for attempt := 0; ; attempt++ {
		head, err := l.change(ctx, f)
		pgErr, ok := errors.AsType[*pgconn.PgError](err)
		if !ok || pgErr.Code != pgCodeSerialization && pgErr.Code != pgCodeDeadlock || attempt == 5 {
			return head, err
		}
		l.metrics.retried.Inc()
		if !pause(ctx, time.Duration(attempt)*(5+rand.N[time.Duration](15))*time.Millisecond) {
			return head, err
		}
	}
}

func (l *Ledger) change(ctx context.Context, f func(ctx context.Context, tx *Tx) error) (head revocation.Position, err error) {
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		return head, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	defer conn.Release()
	inner, err := conn.Begin(ctx)
	if err != nil {
		return head, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	tx := &Tx{Tx: inner, source: l.cfg.Source}
	sent := false
	if err = tx.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&tx.Now); err == nil {
		if err = f(ctx, tx); err == nil {
			head, sent, err = l.finishChange(ctx, conn, tx)
		}
	}
	if _, warned := errors.AsType[warnedError](err); err == nil || warned {
		l.committed(head, tx.written)
	}
	if err != nil {
		gone, doubt := conn.Conn().IsClosed(), sent && inDoubt(ctx, conn, err)
		if !gone && conn.Conn().PgConn().TxStatus() != txIdle {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			_ = inner.Rollback(undo) // a connection whose transaction is open is closed by Release
		}
		switch {
		case errors.Is(err, ErrRestored):
			l.restored(err)
			return head, fmt.Errorf("%w: %w", ErrUnavailable, err)
		case doubt:
			return head, fmt.Errorf("%w: %w: %w", ErrUnavailable, ErrDoubt, err)
		case gone || mayComeBack(err):
			return head, fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return head, err
	}
	return head, nil
}

// txIdle is [pgconn.PgConn.TxStatus] outside a transaction: after a COMMIT, whatever
// became of it. A ROLLBACK then earns a warning.
const txIdle = 'I'

// mayComeBack reports whether the server refused because of its own state.
func mayComeBack(err error) bool {
	pgErr, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return false
	}
	switch pgErr.Code[:2] {
	case "08", "25", "53", "55", "57": // connection, read-only, resources, lock timeout, shutting down
		return true
	}
	return false
}

func (l *Ledger) finishChange(ctx context.Context, conn *pgxpool.Conn, tx *Tx) (head revocation.Position, sent bool, err error) {
	if len(tx.requests) > 0 {
		for _, r := range tx.requests {
			if err := r.Target.Validate(); err != nil {
				return head, false, err
			}
		}
		entries, _ := merge(tx.requests)
		rows, err := l.upsert(ctx, conn, &pgx.Batch{}, entries)
		if err != nil {
			return head, false, err
		}
		audit := tx.written.audit
		if err := l.write(&tx.written, entries, rows); err != nil {
			return head, false, err
		}
		if tx.unaudited {
			tx.written.audit = audit
		}
	}
	n := len(tx.written.events)
	if n > MaxChanges {
		return head, false, fmt.Errorf("a change of the log with %d events, must be at most %d", n, MaxChanges)
	}
	// Past this point the change may be made whatever is heard of it.
	if n > 0 {
		head, err = l.finish(ctx, conn, &tx.written)
		return head, true, err
	}
	var b pgx.Batch
	tx.written.audit.queue(&b)
	b.Queue(headSQL).QueryRow(func(row pgx.Row) error { return row.Scan(&head.Epoch, &head.Seq) })
	return head, true, sendCommit(ctx, conn, &b)
}

const allSQL = `
SELECT ` + storedColumns + `
FROM rescind.revocations r JOIN rescind.tenants t ON t.id = r.tenant_id
WHERE ` + liveSQL

// View calls f with a read-only transaction that sees all state as it was at one
// position of the log, and revoked, which reads the revocations that are live or were
// until lately. f must be quick: while it runs, vacuum removes nothing in the database.
func (l *Ledger) View(ctx context.Context, f func(ctx context.Context, tx pgx.Tx, at revocation.Position,
	revoked func(func(directory.Stored)) error) error) error {
	opts := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
	return pgx.BeginTxFunc(ctx, l.pool, opts, func(tx pgx.Tx) error {
		var at revocation.Position
		if err := tx.QueryRow(ctx, headSQL).Scan(&at.Epoch, &at.Seq); err != nil {
			return fmt.Errorf("read log head: %w", err)
		}
		return f(ctx, tx, at, func(yield func(directory.Stored)) error {
			rows, err := tx.Query(ctx, allSQL)
			if err != nil {
				return fmt.Errorf("read revocations: %w", err)
			}
			defer rows.Close()
			for rows.Next() {
				s, err := scanStored(rows)
				if err != nil {
					return fmt.Errorf("read revocations: %w", err)
				}
				yield(s)
			}
			if err := rows.Err(); err != nil {
				return fmt.Errorf("read revocations: %w", err)
			}
			return nil
		})
	})
}
