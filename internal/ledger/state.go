package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
)

// Another holder is told of a revocation until trim_revocations may remove it, long
// after it is over: its clock may be behind the database's.
const (
	storedColumns = `r.id::text, r.tenant_id, t.domain, r.kind, r.iss, r.ident, r.digest, r.exp, r.not_after,
		r.client_id, r.signature, r.reason, r.revoked_at`
	liveSQL = `r.exp + 720 > extract(epoch FROM clock_timestamp())`

	pageSQL = `
SELECT ` + storedColumns + ` FROM rescind.revocations r JOIN rescind.tenants t ON t.id = r.tenant_id
WHERE r.id > $1::uuid AND ` + liveSQL + ` ORDER BY r.id LIMIT $2`

	lookupSQL = `
SELECT ` + storedColumns + `
FROM unnest($1::text[], $2::text[], $3::text[], $4::boolean[]) AS k (iss, ident, kind, digest)
JOIN rescind.revocations r ON r.iss = k.iss COLLATE "C" AND r.ident = k.ident COLLATE "C" AND r.kind = k.kind COLLATE "C" AND r.digest = k.digest
JOIN rescind.tenants t ON t.id = r.tenant_id
WHERE ` + liveSQL
)

// zeroUUID is below all others.
const zeroUUID = "00000000-0000-0000-0000-000000000000"

func scanStored(row pgx.CollectableRow) (directory.Stored, error) {
	var s directory.Stored
	err := row.Scan(storedFields(&s)...)
	return s, err
}

// storedFields are where storedColumns go.
func storedFields(s *directory.Stored) []any {
	return []any{&s.ID, &s.Tenant.ID, &s.Tenant.Domain, &s.Target.Kind, &s.Target.Iss, &s.Target.ID, &s.Target.Digest,
		&s.Exp, &s.NotAfter, &s.ClientID, &s.Signature, &s.Reason, &s.At}
}

// Page returns up to limit revocations that are live, or were until lately, by ascending id, from the first after
// the id after; "" begins.
func (l *Ledger) Page(ctx context.Context, after string, limit int) ([]directory.Stored, error) {
	if after == "" {
		after = zeroUUID
	}
	rows, err := l.pool.Query(ctx, pageSQL, after, limit)
	if err != nil {
		return nil, fmt.Errorf("read revocations after %s: %w", after, err)
	}
	page, err := pgx.CollectRows(rows, scanStored)
	if err != nil {
		return nil, fmt.Errorf("read revocations after %s: %w", after, err)
	}
	return page, nil
}

// Lookup returns those of targets whose revocations are live, or were until lately, in any order.
func (l *Ledger) Lookup(ctx context.Context, targets []revocation.Target) ([]directory.Stored, error) {
	rows, err := l.pool.Query(ctx, lookupSQL, targetColumns(targets)...)
	if err != nil {
		return nil, fmt.Errorf("look up %d targets: %w", len(targets), err)
	}
	found, err := pgx.CollectRows(rows, scanStored)
	if err != nil {
		return nil, fmt.Errorf("look up %d targets: %w", len(targets), err)
	}
	return found, nil
}

// targetColumns are the iss, ident, kind and digest of targets, each an array.
func targetColumns(targets []revocation.Target) []any {
	n := len(targets)
	iss, idents, kinds, digests := make([]string, n), make([]string, n), make([]string, n), make([]bool, n)
	for i, t := range targets {
		iss[i], idents[i], kinds[i], digests[i] = t.Iss, t.ID, string(t.Kind), t.Digest
	}
	return []any{iss, idents, kinds, digests}
}

// Known returns the live revocation of target, if there is one.
func (l *Ledger) Known(ctx context.Context, target revocation.Target) (revocation.Revocation, bool, error) {
	found, err := l.Lookup(ctx, []revocation.Target{target})
	if err != nil {
		return revocation.Revocation{}, false, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if len(found) == 0 || time.Now().After(time.Unix(found[0].Exp, 0).Add(revocation.MaxLeeway)) {
		return revocation.Revocation{}, false, nil
	}
	return found[0].Revocation, true, nil
}

// importChunk keeps the head's lock short.
const importChunk = 500

// Import stores revocations that another copy of the state has and the log may
// lack, with events of their own. It ignores ID and Tenant and finds the tenant by
// the issuer; revocations of issuers that are not registered are left out and
// logged. A revocation that is stored already changes nothing.
func (l *Ledger) Import(ctx context.Context, rs []revocation.Revocation) error {
	tenants, err := l.tenants(ctx)
	if err != nil {
		return err
	}
	var requests []Request
	unknown := 0
	for _, r := range rs {
		tenant, ok := tenants.byIssuer[r.Target.Iss]
		if r.Target.Kind == revocation.KindTenant {
			tenant, ok = tenants.byDomain[r.Target.ID]
		}
		if !ok || r.Target.Validate() != nil {
			unknown++
			continue
		}
		requests = append(requests, Request{
			Target: r.Target, Tenant: tenant, Exp: r.Exp, NotAfter: r.NotAfter, ClientID: r.ClientID, Signature: r.Signature,
			Reason: "imported", Action: "import", Actor: Actor{Name: "system"},
		})
	}
	if unknown > 0 {
		l.log.Warn("left out revocations of issuers that are not registered", "count", unknown)
	}
	for len(requests) > 0 {
		n := min(importChunk, len(requests))
		if _, err := l.commit(ctx, requests[:n]); err != nil {
			return fmt.Errorf("import %d revocations: %w", n, err)
		}
		requests = requests[n:]
	}
	return nil
}

type tenantIndex struct {
	byIssuer, byDomain map[string]revocation.Tenant
}

func (l *Ledger) tenants(ctx context.Context) (tenantIndex, error) {
	ix := tenantIndex{make(map[string]revocation.Tenant), make(map[string]revocation.Tenant)}
	rows, err := l.pool.Query(ctx, `
		SELECT t.id, t.domain, k.iss FROM rescind.tenants t LEFT JOIN rescind.key_managers k ON k.tenant_id = t.id`)
	if err != nil {
		return ix, fmt.Errorf("read issuers: %w", err)
	}
	var t revocation.Tenant
	var iss *string
	_, err = pgx.ForEachRow(rows, []any{&t.ID, &t.Domain, &iss}, func() error {
		ix.byDomain[t.Domain] = t
		if iss != nil {
			ix.byIssuer[*iss] = t
		}
		return nil
	})
	if err != nil {
		return ix, fmt.Errorf("read issuers: %w", err)
	}
	return ix, nil
}

// ErrIdentity means that the database is not the one that the epoch was last seen
// on, and that nothing at hand proves that it lost no event.
var ErrIdentity = errors.New("the database server or its timeline has changed while no process ran, by a fail-over or a restore, " +
	"and etcd does not stand at the log's end, which would tell; make etcd reachable and start again, or run: rescind epoch new")

// identitySQL reads the server's identity and the timeline that it writes to.
const identitySQL = `
SELECT (SELECT system_identifier FROM pg_control_system()), ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer`

const storeIdentitySQL = `
UPDATE rescind.log_head SET epoch = $1::uuid, system_identifier = $2, timeline_id = $3, restored = false
RETURNING epoch::text, seq`

// Start compares the database with what was last seen of it, and with published,
// the position that etcd says was published (nil if that is not known). It makes
// the first epoch of a new database. It returns [ErrRestored] if the log lacks
// events that were published, [ErrIdentity] if that cannot be told.
func (l *Ledger) Start(ctx context.Context, published *revocation.Position) (revocation.Position, error) {
	var head revocation.Position
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		var epoch *string
		var system, storedSystem *int64
		var timeline, storedTimeline *int32
		var restored bool
		err := tx.QueryRow(ctx, `SELECT epoch::text, seq, system_identifier, timeline_id, restored FROM rescind.log_head FOR UPDATE`).
			Scan(&epoch, &head.Seq, &storedSystem, &storedTimeline, &restored)
		if err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, identitySQL).Scan(&system, &timeline); err != nil {
			return err
		}
		if epoch == nil {
			return tx.QueryRow(ctx, storeIdentitySQL, uuid.NewString(), system, timeline).Scan(&head.Epoch, &head.Seq)
		}
		head.Epoch = revocation.Epoch(*epoch)
		same := storedSystem != nil && *storedSystem == *system && storedTimeline != nil && *storedTimeline == *timeline
		comparable := published != nil && published.Epoch == head.Epoch
		switch {
		case restored:
			return fmt.Errorf("a process saw the log go back: %w", ErrRestored)
		case comparable && published.Seq > head.Seq:
			return fmt.Errorf("the log ends at %d, etcd stands at %d: %w", head.Seq, published.Seq, ErrRestored)
		case same:
			return nil
		case !comparable || published.Seq < head.Seq:
			return ErrIdentity // another sink may have been further than etcd, and further than the log is now
		}
		l.log.Warn("the database server or its timeline has changed, and the log lost nothing", "head", head.Seq)
		return tx.QueryRow(ctx, storeIdentitySQL, head.Epoch, system, timeline).Scan(&head.Epoch, &head.Seq)
	})
	if err != nil {
		return head, fmt.Errorf("check the log's identity: %w", err)
	}
	l.saw(head)
	return head, nil
}

// keepIdentity stores the identity of the server after a fail-over that this process
// has lived through, and so knows to have lost nothing.
func (l *Ledger) keepIdentity(ctx context.Context) error {
	seen := l.lastSeen()
	head, err := l.Head(ctx)
	if err != nil || seen.Epoch != head.Epoch {
		return err
	}
	tag, err := l.pool.Exec(ctx, `
		UPDATE rescind.log_head h SET system_identifier = i.system_identifier, timeline_id = i.timeline_id
		FROM (`+identitySQL+`) AS i (system_identifier, timeline_id)
		WHERE h.epoch = $1::uuid AND (h.system_identifier, h.timeline_id) <> (i.system_identifier, i.timeline_id)`, string(head.Epoch))
	if err == nil && tag.RowsAffected() > 0 {
		l.log.Warn("the database server or its timeline has changed, and the log lost nothing", "head", head.Seq)
	}
	return err
}

// NewEpoch gives the log a new identity, so that every consumer starts again from
// a snapshot, and imports what lost returns: the live revocations above a seq of the
// old epoch that another copy of the state still has. It returns where the log stood
// before the import. Until it has succeeded no process can start, and it may be called
// again. No process may be serving; it returns an error naming a sink that one is
// feeding.
func (l *Ledger) NewEpoch(ctx context.Context, sinks []string,
	lost func(ctx context.Context, above revocation.Seq) ([]revocation.Revocation, error)) (revocation.Position, error) {
	var above revocation.Seq
	if err := l.pool.QueryRow(ctx, `SELECT coalesce(import_above, seq) FROM rescind.log_head`).Scan(&above); err != nil {
		return revocation.Position{}, fmt.Errorf("read log head: %w", err)
	}
	rs, err := lost(ctx, above)
	if err != nil {
		return revocation.Position{}, err
	}
	head, err := l.beginEpoch(ctx, sinks, above)
	if err != nil {
		return head, fmt.Errorf("make a new epoch: %w", err)
	}
	l.saw(head)
	if err := l.Import(ctx, rs); err != nil {
		return head, fmt.Errorf("the new epoch is not complete, run the command again: %w", err)
	}
	if _, err := l.pool.Exec(ctx, `UPDATE rescind.log_head SET restored = false, import_above = NULL`); err != nil {
		return head, fmt.Errorf("the new epoch is not complete, run the command again: %w", err)
	}
	return head, nil
}

func (l *Ledger) beginEpoch(ctx context.Context, sinks []string, above revocation.Seq) (revocation.Position, error) {
	var head revocation.Position
	err := pgx.BeginFunc(ctx, l.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '3s'`); err != nil {
			return err
		}
		for _, sink := range sinks {
			_, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock($1, $2)`, lockClass, lockKey(sink))
			if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok && pgErr.Code == "55P03" { // lock_not_available
				return fmt.Errorf("a service process is still feeding sink %s: stop all processes first", sink)
			}
			if err != nil {
				return err
			}
		}
		var system int64
		var timeline int32
		if err := tx.QueryRow(ctx, identitySQL).Scan(&system, &timeline); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, storeIdentitySQL, uuid.NewString(), system, timeline).Scan(&head.Epoch, &head.Seq); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE rescind.log_head SET restored = true, import_above = $1`, int64(above)); err != nil {
			return err
		}
		// A process may have saved a cursor from before the restore.
		_, err := tx.Exec(ctx, `UPDATE rescind.sink_cursors SET seq = least(seq, $1)`, int64(head.Seq))
		return err
	})
	return head, err
}
