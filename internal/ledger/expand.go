package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/revocation"
)

// endingColumns are revocations that may end remembered tokens.
type endingColumns struct {
	kinds, iss, idents, reasons, traceparents []string
	tenants                                   []int32
}

func (c *endingColumns) add(r Request) {
	c.kinds = append(c.kinds, string(r.Target.Kind))
	c.iss = append(c.iss, r.Target.Iss)
	c.idents = append(c.idents, r.Target.ID)
	c.reasons = append(c.reasons, r.Reason)
	c.traceparents = append(c.traceparents, r.Traceparent)
	c.tenants = append(c.tenants, r.Tenant.ID)
}

const (
	endingsLockSQL = `SELECT pg_advisory_xact_lock` + issuedLock

	// endingsSQL runs under the lock, in a statement of its own so that it sees what others
	// remembered before. It adds nothing where nothing is remembered that could match; what
	// does match is found out later, without the lock.
	endingsSQL = `
INSERT INTO rescind.endings (kind, iss, ident, tenant_id, last_n, reason, traceparent)
SELECT e.kind, e.iss, e.ident, e.tenant_id, e.last_n, e.reason, e.traceparent
FROM (
	SELECT e.*, CASE e.kind
		WHEN 'client' THEN (
			SELECT max(i.n) FROM rescind.issued_tokens i WHERE i.key_manager_id = e.issuer AND i.client_id = e.ident COLLATE "C")
		WHEN 'subject' THEN (
			SELECT max(i.n) FROM rescind.issued_tokens i WHERE i.key_manager_id = e.issuer AND i.subject = e.ident COLLATE "C")
		ELSE (SELECT max(i.n) FROM rescind.issued_tokens i WHERE i.key_manager_id = e.issuer)
		END AS last_n
	FROM (
		SELECT e.*, CASE e.kind
			WHEN 'tenant' THEN (SELECT k.id FROM rescind.key_managers k WHERE k.tenant_id = e.tenant_id AND k.resident)
			ELSE (SELECT k.id FROM rescind.key_managers k WHERE k.iss = e.iss COLLATE "C" AND k.resident)
			END AS issuer
		FROM unnest($1::text[], $2::text[], $3::text[], $4::integer[], $5::text[], $6::text[])
			AS e (kind, iss, ident, tenant_id, reason, traceparent)
		WHERE EXISTS (SELECT FROM rescind.issued_tokens)
		OFFSET 0) AS e
	WHERE e.issuer IS NOT NULL
	OFFSET 0) AS e
WHERE e.last_n IS NOT NULL`
)

// queue adds the statements that must come last before the head is taken: until the commit
// nothing can be remembered.
func (c *endingColumns) queue(b *pgx.Batch) {
	if len(c.kinds) == 0 {
		return
	}
	b.Queue(endingsLockSQL)
	b.Queue(endingsSQL, c.kinds, c.iss, c.idents, c.tenants, c.reasons, c.traceparents)
}

const (
	expandChunk   = 250                    // tokens revoked in one transaction, well below MaxChanges
	expandEndings = 50                     // taken from in one transaction
	expandEvery   = 5 * time.Second        // between two looks for endings that nobody tells of
	expandPause   = 200 * time.Millisecond // where another process is at it, or there is no turn
)

// expand revokes the remembered tokens of endings one by one. It looks after each commit of
// this process that may have added an ending, and now and then for what a process that is no
// more has left.
func (l *Ledger) expand(ctx context.Context) {
	for ctx.Err() == nil {
		if err := l.expandAll(ctx); err != nil && ctx.Err() == nil {
			l.log.Warn("remembered tokens could not be revoked one by one, it is tried again", "error", err, "in", expandEvery)
		}
		look := time.NewTimer(expandEvery)
		select {
		case <-l.ended:
		case <-look.C:
		case <-ctx.Done():
		}
		look.Stop()
	}
}

// expandAll goes round the endings until none is left but such as cannot be expanded, which it
// returns the last error of. None waits for another to be through, however many tokens that has.
func (l *Ledger) expandAll(ctx context.Context) (failure error) {
	var after int64
	failed := []int64{}
	most := expandEndings
	for {
		var waits bool
		err := l.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM rescind.endings e WHERE e.id <> ALL ($1::bigint[]))`, failed).Scan(&waits)
		if err != nil {
			return fmt.Errorf("look for endings: %w", err)
		}
		if !waits {
			return failure
		}
		began := time.Now()
		turn, err := l.expandSome(ctx, expandTurn{after: after, but: failed, most: most})
		// At least half of the time is left to others, most of it when revocations wait.
		rest := time.Since(began)
		switch {
		case errors.Is(err, ErrBusy), err == nil && !turn.mine:
			rest = expandPause
		case err == nil:
			after, most = turn.last, min(2*most, expandEndings)
			if l.queue.len() > 0 {
				rest *= 4
			}
		case errors.Is(err, ErrUnavailable), turn.last == 0:
			return err
		case most > 1:
			most = 1 // to find the one that fails
		default:
			after, failed, failure = turn.last, append(failed, turn.last), err
		}
		if !pause(ctx, rest) {
			return ctx.Err()
		}
	}
}

const (
	// The lock is given up at the end of the transaction, and whoever has it next sees what
	// the last one left.
	expandLockSQL = `SELECT pg_try_advisory_xact_lock(hashtextextended('rescind.ledger expand', 0))`

	// The next endings after one, and then the first ones. A revocation that is gone has been
	// over for long, and so have its tokens.
	turnSQL = `
SELECT e.id, e.kind, e.iss, e.ident, e.tenant_id, coalesce(t.domain, ''), e.last_n, e.reason, e.traceparent, coalesce(r.exp, 0)
FROM rescind.endings e
LEFT JOIN rescind.tenants t ON t.id = e.tenant_id
LEFT JOIN rescind.revocations r ON r.iss = e.iss AND r.ident = e.ident AND r.kind = e.kind AND NOT r.digest
WHERE e.id = ANY (ARRAY(
	SELECT e.id FROM rescind.endings e WHERE e.id <> ALL ($2::bigint[]) ORDER BY e.id <= $1, e.id LIMIT $3))
ORDER BY e.id <= $1, e.id`

	forgetSQL = `DELETE FROM rescind.issued_tokens WHERE jti = ANY ($1::uuid[])`
)

// chunkSQL are the next tokens of an ending up to its last number. One that ends after the
// last token of the revocation does is none of it.
func chunkSQL(kind revocation.Kind) string {
	return `SELECT i.jti::text, k.iss, i.client_id, i.exp FROM ` + endedBy(kind) + ` AND i.n <= @last AND i.exp <= @exp ORDER BY i.n LIMIT @limit`
}

// pending is an ending that is not through: the remembered tokens of target up to lastN, if they
// end by exp, are still to be revoked.
type pending struct {
	id, lastN, exp int64
	target         revocation.Target
	tenant         revocation.Tenant
	reason, trace  string
}

func scanPending(row pgx.CollectableRow) (e pending, err error) {
	err = row.Scan(&e.id, &e.target.Kind, &e.target.Iss, &e.target.ID, &e.tenant.ID, &e.tenant.Domain, &e.lastN, &e.reason, &e.trace, &e.exp)
	return e, err
}

// expandTurn asks for the up to most endings after one, but for some.
type expandTurn struct {
	after int64
	but   []int64
	most  int
}

// expanded is what became of a turn.
type expanded struct {
	mine bool  // false: another process is at it
	last int64 // the ending that was taken from last, 0 if none was
}

// expandSome revokes the next expandChunk tokens of the endings whose turn it is.
func (l *Ledger) expandSome(ctx context.Context, turn expandTurn) (done expanded, err error) {
	var revoked int
	_, err = l.Change(ctx, func(ctx context.Context, tx *Tx) error {
		done, revoked = expanded{}, 0
		tx.unaudited = true // for one record of each ending
		if err := tx.QueryRow(ctx, expandLockSQL).Scan(&done.mine); err != nil || !done.mine {
			return err
		}
		rows, _ := tx.Query(ctx, turnSQL, turn.after, turn.but, turn.most) // CollectRows has its error
		endings, err := pgx.CollectRows(rows, scanPending)
		if err != nil {
			return err
		}
		room := expandChunk
		for _, e := range endings {
			done.last = e.id
			requests, taken, err := e.take(ctx, tx, room)
			if err != nil {
				return err
			}
			tx.Revoke(requests...)
			revoked += len(requests)
			if room -= taken; room == 0 {
				break
			}
		}
		return nil
	})
	if err != nil {
		return done, fmt.Errorf("revoke remembered tokens of endings up to %d: %w", done.last, err)
	}
	l.metrics.expanded.Add(float64(revoked))
	return done, nil
}

// take takes up to room tokens of e out of what is remembered, and returns the revocations of
// those that have not expired. It removes e if there are fewer.
func (e pending) take(ctx context.Context, tx *Tx, room int) (requests []Request, taken int, err error) {
	rows, err := tx.Query(ctx, chunkSQL(e.target.Kind), pgx.NamedArgs{
		"ident": e.target.ID, "iss": e.target.Iss, "tenant": e.tenant.ID, "last": e.lastN, "exp": e.exp, "limit": room,
	})
	if err != nil {
		return nil, 0, err
	}
	r := Request{Tenant: e.tenant, Reason: e.reason, Action: "expand", Actor: Actor{Name: "system"}, Traceparent: e.trace}
	r.Target.Kind = revocation.KindToken
	over := tx.Now.Add(-revocation.MaxLeeway).Unix()
	var jtis []string
	_, err = pgx.ForEachRow(rows, []any{&r.Target.ID, &r.Target.Iss, &r.ClientID, &r.Exp}, func() error {
		jtis = append(jtis, r.Target.ID)
		if r.Exp >= over {
			requests = append(requests, r)
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	if len(jtis) > 0 {
		if _, err := tx.Exec(ctx, forgetSQL, jtis); err != nil {
			return nil, 0, err
		}
	}
	if len(jtis) == room {
		return requests, room, nil
	}
	tx.Audit(AuditEntry{Tenant: e.tenant, Action: r.Action, Iss: e.target.Iss, Subject: e.target.ID, Reason: e.reason, Actor: r.Actor})
	_, err = tx.Exec(ctx, `DELETE FROM rescind.endings WHERE id = $1`, e.id)
	return requests, len(jtis), err
}
