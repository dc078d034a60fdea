package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
)

// ListFilter selects revocations. What is empty selects all.
type ListFilter struct {
	// Tenants are domains.
	Tenants []string
	Kind    revocation.Kind
	// Iss are issuers: the revocations of tenants, which name none, are then left out.
	Iss []string
	// ID is the identifier of [revocation.Target]. Without Kind and Iss it is looked for among
	// all kinds and issuers that are registered.
	ID string
}

// Listed is a revocation as it is stored.
type Listed struct {
	directory.Stored
	// Seq is the place in the log of the last event about it, 0 if retention has removed that.
	Seq revocation.Seq
}

const (
	listedSQL = `
SELECT ` + storedColumns + `, coalesce((SELECT max(l.seq) FROM rescind.log l WHERE l.entity_id = r.id), 0)
FROM rescind.revocations r JOIN rescind.tenants t ON t.id = r.tenant_id
WHERE ` + liveSQL

	listSQL = listedSQL + `
	AND r.id > @after::text::uuid
	AND (@tenants::text[] IS NULL OR t.domain = ANY (@tenants))
	AND (@kind::text IS NULL OR r.kind = @kind)
	AND `
	listByIssSQL = listSQL + `(@iss::text[] IS NULL OR r.iss = ANY (@iss)) ORDER BY r.id LIMIT @limit`
	// The index of targets begins with the issuer.
	listByIDSQL = listSQL + `r.ident = @ident
	AND r.iss = ANY (coalesce(@iss::text[], ARRAY(SELECT k.iss FROM rescind.key_managers k UNION ALL SELECT '')))
ORDER BY r.id LIMIT @limit`

	getSQL = listedSQL + ` AND r.id = $1::text::uuid`
)

func scanListed(row pgx.CollectableRow) (Listed, error) {
	var s Listed
	err := row.Scan(append(storedFields(&s.Stored), &s.Seq)...)
	return s, err
}

// List returns up to limit revocations that are live, or were until lately, by ascending id,
// from the first after the id after; "" begins. A filter by anything but ID that matches
// little reads much, and ctx should bound it.
func (l *Ledger) List(ctx context.Context, f ListFilter, after string, limit int) ([]Listed, error) {
	if after == "" {
		after = zeroUUID
	}
	sql := listByIssSQL
	if f.ID != "" {
		sql = listByIDSQL
	}
	rows, err := l.pool.Query(ctx, sql, pgx.NamedArgs{
		"after": after, "tenants": orNull(f.Tenants), "kind": notEmpty(string(f.Kind)), "iss": orNull(f.Iss), "ident": f.ID, "limit": limit,
	})
	if err != nil {
		return nil, fmt.Errorf("list revocations after %s: %w", after, err)
	}
	page, err := pgx.CollectRows(rows, scanListed)
	if err != nil {
		return nil, fmt.Errorf("list revocations after %s: %w", after, err)
	}
	return page, nil
}

// Get returns the revocation with this id, a UUID, and false if there is none, or none any more.
func (l *Ledger) Get(ctx context.Context, id string) (Listed, bool, error) {
	u, err := uuid.Parse(id)
	if err != nil {
		return Listed{}, false, nil // nothing has such an id
	}
	rows, err := l.pool.Query(ctx, getSQL, u.String())
	if err != nil {
		return Listed{}, false, fmt.Errorf("read revocation %s: %w", id, err)
	}
	found, err := pgx.CollectExactlyOneRow(rows, scanListed)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return Listed{}, false, nil
	case err != nil:
		return Listed{}, false, fmt.Errorf("read revocation %s: %w", id, err)
	}
	return found, true, nil
}

// AuditFilter selects records of the audit. What is empty selects all.
type AuditFilter struct {
	// Tenants are domains. Records of a tenant that was removed are found without only.
	Tenants                     []string
	Actor, Action, Subject, Iss string
	EntityID, RequestID         string
	// From and To bound the time: From <= at < To.
	From, To time.Time
}

// AuditRecord is a record as it is stored.
type AuditRecord struct {
	ID int64
	At time.Time
	// AuditEntry is what was recorded. Its Tenant has no Domain when the tenant was removed.
	AuditEntry
}

const auditPageSQL = `
SELECT a.id, a.at, a.tenant_id, coalesce(t.domain, ''), a.action, coalesce(a.entity_id::text, ''), a.iss, a.subject, a.reason,
	a.actor, a.request_id, a.remote
FROM rescind.audit a LEFT JOIN rescind.tenants t ON t.id = a.tenant_id
WHERE (@before::bigint IS NULL OR a.id < @before)
	AND (@tenants::text[] IS NULL OR a.tenant_id = ANY (ARRAY(SELECT d.id FROM rescind.tenants d WHERE d.domain = ANY (@tenants))))
	AND (@actor::text IS NULL OR a.actor = @actor)
	AND (@action::text IS NULL OR a.action = @action)
	AND (@subject::text IS NULL OR a.subject = @subject)
	AND (@iss::text IS NULL OR a.iss = @iss)
	AND (@entity::text IS NULL OR a.entity_id = @entity::text::uuid)
	AND (@request::text IS NULL OR a.request_id = @request)
	AND (@from::timestamptz IS NULL OR a.at >= @from)
	AND (@to::timestamptz IS NULL OR a.at < @to)
ORDER BY a.id DESC LIMIT @limit`

// AuditPage returns up to limit records, the newest first, from the first before the record
// with the id before; 0 begins. Nothing but the time has an index: a filter that matches
// little reads much, and ctx should bound it.
func (l *Ledger) AuditPage(ctx context.Context, f AuditFilter, before int64, limit int) ([]AuditRecord, error) {
	if f.EntityID != "" {
		u, err := uuid.Parse(f.EntityID)
		if err != nil {
			return nil, nil // nothing has such an id
		}
		f.EntityID = u.String()
	}
	rows, err := l.pool.Query(ctx, auditPageSQL, pgx.NamedArgs{
		"before": notEmpty(before), "tenants": orNull(f.Tenants), "actor": notEmpty(f.Actor), "action": notEmpty(f.Action),
		"subject": notEmpty(f.Subject), "iss": notEmpty(f.Iss), "entity": notEmpty(f.EntityID), "request": notEmpty(f.RequestID),
		"from": notEmpty(f.From), "to": notEmpty(f.To), "limit": limit,
	})
	if err != nil {
		return nil, fmt.Errorf("read the audit: %w", err)
	}
	page, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (AuditRecord, error) {
		var r AuditRecord
		err := row.Scan(&r.ID, &r.At, &r.Tenant.ID, &r.Tenant.Domain, &r.Action, &r.EntityID, &r.Iss, &r.Subject, &r.Reason,
			&r.Actor.Name, &r.Actor.RequestID, &r.Actor.Remote)
		return r, err
	})
	if err != nil {
		return nil, fmt.Errorf("read the audit: %w", err)
	}
	return page, nil
}

// notEmpty is the parameter of a filter: NULL for the zero value, which selects all.
func notEmpty[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

// orNull is notEmpty for lists.
func orNull(list []string) []string {
	if len(list) == 0 {
		return nil
	}
	return list
}

// Seen is the furthest head that this process knows to be committed: nothing that it has
// answered for is after it.
func (l *Ledger) Seen() revocation.Position { return l.lastSeen() }
