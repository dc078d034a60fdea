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
		WHEN 'client' THEN (SELECT max(i.n) FROM rescind.issued_tokens i WHERE i.client_id = e.ident COLLATE "C")
		WHEN 'subject' THEN (SELECT max(i.n) FROM rescind.issued_tokens i WHERE i.subject = e.ident COLLATE "C")
		ELSE (
			SELECT max(i.n) FROM rescind.key_managers k
			JOIN rescind.key_mappings m ON m.key_manager_id = k.id
			JOIN rescind.clients c ON c.key_mapping_id = m.id,
			LATERAL (SELECT max(i.n) AS n FROM rescind.issued_tokens i WHERE i.client_id = c.client_id) AS i
			WHERE k.tenant_id = e.tenant_id AND k.resident)
		END AS last_n
	FROM unnest($1::text[], $2::text[], $3::text[], $4::integer[], $5::text[], $6::text[])
		AS e (kind, iss, ident, tenant_id, reason, traceparent)
	WHERE EXISTS (SELECT FROM rescind.issued_tokens)
		AND (e.kind = 'tenant' OR EXISTS (SELECT FROM rescind.key_managers k WHERE k.iss = e.iss COLLATE "C" AND k.resident))
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
	expandEndings = 50                     // looked at in one transaction
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

// expandAll returns nil when no ending is left.
func (l *Ledger) expandAll(ctx context.Context) error {
	for {
		var waits bool
		if err := l.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM rescind.endings)`).Scan(&waits); err != nil {
			return fmt.Errorf("look for endings: %w", err)
		}
		if !waits {
			return nil
		}
		began := time.Now()
		mine, err := l.expandSome(ctx)
		// At least half of the time is left to others, most of it when revocations wait.
		rest := time.Since(began)
		switch {
		case errors.Is(err, ErrBusy), err == nil && !mine:
			rest = expandPause
		case err != nil:
			return err
		case l.queue.len() > 0:
			rest *= 4
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

	// A revocation that is gone has been over for long, and so have its tokens.
	endingSQL = `
SELECT e.id, e.kind, e.iss, e.ident, e.tenant_id, coalesce(t.domain, ''), e.last_n, e.reason, e.traceparent, coalesce(r.exp, 0)
FROM rescind.endings e
LEFT JOIN rescind.tenants t ON t.id = e.tenant_id
LEFT JOIN rescind.revocations r ON r.iss = e.iss AND r.ident = e.ident AND r.kind = e.kind AND NOT r.digest
ORDER BY e.id LIMIT 1`

	forgetSQL = `DELETE FROM rescind.issued_tokens WHERE jti = ANY ($1::uuid[])`
)

// chunkSQL are the next tokens of an ending up to its last number. One that ends after the
// last token of the revocation does is none of it.
func chunkSQL(kind revocation.Kind) string {
	sql := `SELECT i.jti::text, i.iss, i.client_id, i.exp FROM ` + endedBy(kind) + ` WHERE i.n <= @last AND i.exp <= @exp`
	if kind != revocation.KindTenant { // there is no index in the order of a tenant's tokens
		sql += ` ORDER BY i.n`
	}
	return sql + ` LIMIT @limit`
}

// expandSome revokes the next tokens of the oldest endings. It returns false if another
// process is at it.
func (l *Ledger) expandSome(ctx context.Context) (mine bool, err error) {
	var revoked int
	_, err = l.Change(ctx, func(ctx context.Context, tx *Tx) error {
		mine, revoked = false, 0
		tx.unaudited = true // for one record of each ending
		if err := tx.QueryRow(ctx, expandLockSQL).Scan(&mine); err != nil || !mine {
			return err
		}
		room, ended := expandChunk, true
		for i := 0; i < expandEndings && ended; i++ {
			var requests []Request
			var taken int
			var err error
			if requests, taken, ended, err = takeOldest(ctx, tx, room); err != nil {
				return err
			}
			tx.Revoke(requests...)
			revoked += len(requests)
			room -= taken
		}
		return nil
	})
	if err != nil {
		return mine, fmt.Errorf("revoke remembered tokens: %w", err)
	}
	l.metrics.expanded.Add(float64(revoked))
	return mine, nil
}

// takeOldest takes up to room tokens of the oldest ending out of what is remembered, and
// returns the revocations of those that have not expired. It removes the ending, and returns
// true, if there are fewer.
func takeOldest(ctx context.Context, tx *Tx, room int) (requests []Request, taken int, ended bool, err error) {
	var id, lastN, exp int64
	var of revocation.Target
	r := Request{Action: "expand", Actor: Actor{Name: "system"}}
	err = tx.QueryRow(ctx, endingSQL).
		Scan(&id, &of.Kind, &of.Iss, &of.ID, &r.Tenant.ID, &r.Tenant.Domain, &lastN, &r.Reason, &r.Traceparent, &exp)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, 0, false, nil
	}
	if err != nil {
		return nil, 0, false, err
	}
	rows, err := tx.Query(ctx, chunkSQL(of.Kind), pgx.NamedArgs{
		"ident": of.ID, "iss": of.Iss, "tenant": r.Tenant.ID, "last": lastN, "exp": exp, "limit": room,
	})
	if err != nil {
		return nil, 0, false, err
	}
	over := tx.Now.Add(-revocation.MaxLeeway).Unix()
	var jtis []string
	r.Target.Kind = revocation.KindToken
	_, err = pgx.ForEachRow(rows, []any{&r.Target.ID, &r.Target.Iss, &r.ClientID, &r.Exp}, func() error {
		jtis = append(jtis, r.Target.ID)
		if r.Exp >= over {
			requests = append(requests, r)
		}
		return nil
	})
	if err != nil {
		return nil, 0, false, err
	}
	if len(jtis) > 0 {
		if _, err := tx.Exec(ctx, forgetSQL, jtis); err != nil {
			return nil, 0, false, err
		}
	}
	if len(jtis) == room {
		return requests, room, false, nil
	}
	tx.Audit(AuditEntry{Tenant: r.Tenant, Action: r.Action, Iss: of.Iss, Subject: of.ID, Reason: r.Reason, Actor: r.Actor})
	_, err = tx.Exec(ctx, `DELETE FROM rescind.endings WHERE id = $1`, id)
	return requests, len(jtis), true, err
}
