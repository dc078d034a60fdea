package ledger

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/revocation"
)

// AuditEntry is who did what to what. It never holds a token or a secret.
type AuditEntry struct {
	Tenant revocation.Tenant
	// Action is a word such as "revoke_token" or "foreign_token".
	Action string
	// EntityID is the UUID of what changed. May be empty.
	EntityID string
	// Iss and Subject are the issuer and the jti, digest or name of what it is about.
	Iss, Subject string
	Reason       string
	Actor        Actor
}

const auditSQL = `
INSERT INTO rescind.audit (tenant_id, actor, action, entity_id, iss, subject, reason, request_id, remote)
SELECT tenant_id, actor, action, nullif(entity_id, '')::uuid, iss, subject, reason, request_id, remote
FROM unnest($1::integer[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[])
    AS a (tenant_id, actor, action, entity_id, iss, subject, reason, request_id, remote)`

// Audit records something that changed no state, in a transaction of its own.
func (l *Ledger) Audit(ctx context.Context, e AuditEntry) error {
	var c auditColumns
	c.add(e)
	var b pgx.Batch
	c.queue(&b)
	if err := l.pool.SendBatch(ctx, &b).Close(); err != nil {
		return fmt.Errorf("%w: record %s in the audit: %w", ErrUnavailable, e.Action, err)
	}
	return nil
}

type auditColumns struct {
	tenants                                                                 []int32
	actors, actions, entityIDs, iss, subjects, reasons, requestIDs, remotes []string
}

func (c *auditColumns) add(e AuditEntry) {
	c.tenants = append(c.tenants, e.Tenant.ID)
	c.actors = append(c.actors, e.Actor.Name)
	c.actions = append(c.actions, e.Action)
	c.entityIDs = append(c.entityIDs, e.EntityID)
	c.iss = append(c.iss, e.Iss)
	c.subjects = append(c.subjects, e.Subject)
	c.reasons = append(c.reasons, e.Reason)
	c.requestIDs = append(c.requestIDs, e.Actor.RequestID)
	c.remotes = append(c.remotes, e.Actor.Remote)
}

func (c *auditColumns) queue(b *pgx.Batch) {
	if len(c.actions) == 0 {
		return
	}
	b.Queue(auditSQL, c.tenants, c.actors, c.actions, c.entityIDs, c.iss, c.subjects, c.reasons, c.requestIDs, c.remotes)
}
