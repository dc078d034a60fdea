package catalog

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
)

type scopes struct{ plain }

const readScopesSQL = `
SELECT e.id, e.uuid::text, t.id, t.domain, e.ts, e.name, e.display_name, e.description, e.roles
FROM rescind.scopes e
JOIN rescind.tenants t ON t.id = e.tenant_id`

const insertScopesSQL = `
INSERT INTO rescind.scopes (id, uuid, tenant_id, ts, name, display_name, description, roles)
SELECT r.id, r.uuid, (r.tenant ->> 'id')::integer, r.timestamp, r.name, coalesce(r.display_name, ''), coalesce(r.description, ''),
    coalesce(r.roles, '{}')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, uuid uuid, tenant jsonb, timestamp bigint, name text,
    display_name text, description text, roles text[])
ON CONFLICT DO NOTHING
RETURNING uuid::text`

const updateScopesSQL = `
UPDATE rescind.scopes e
SET ts = r.timestamp, display_name = coalesce(r.display_name, ''), description = coalesce(r.description, ''),
    roles = coalesce(r.roles, '{}')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, timestamp bigint, display_name text, description text, roles text[])
WHERE e.id = r.id`

func (scopes) sql() statements {
	return statements{"rescind.scopes", "rescind.scopes_id_seq", readScopesSQL, insertScopesSQL, updateScopesSQL}
}

func (scopes) scan(row pgx.CollectableRow) (catalog.Entity, error) {
	var s catalog.Scope
	err := row.Scan(&s.ID, &s.UUID, &s.Tenant.ID, &s.Tenant.Domain, &s.Timestamp, &s.Name, &s.DisplayName, &s.Description, &s.Roles)
	s.Roles = list(s.Roles)
	return &s, err
}

func (scopes) complete(e catalog.Entity) {
	s := e.(*catalog.Scope)
	s.Roles = list(s.Roles)
}

func (scopes) unique(e catalog.Entity) []place {
	s := e.(*catalog.Scope)
	return []place{{`e.tenant_id = $2 AND e.name = $3`, []any{s.Tenant.ID, s.Name}, taken("#/name", "the tenant has a scope of this name already")}}
}

func (scopes) keep(_ *batch, cur, want catalog.Entity) *Conflict {
	return fixed(member{"name", want.(*catalog.Scope).Name == cur.(*catalog.Scope).Name})
}

const scopesInUseSQL = `
SELECT s.id, CASE WHEN EXISTS (
    SELECT FROM rescind.apis x WHERE x.tenant_id = s.tenant_id
        AND x.operations @> jsonb_build_array(jsonb_build_object('scopes', jsonb_build_array(s.name)))) THEN 'APIs' END
FROM rescind.scopes s WHERE s.id = ANY($1)`

func (scopes) release(ctx context.Context, b *batch, run []*step) error {
	return b.refuseUsed(ctx, scopesInUseSQL, run, "operations of %s ask for this scope: take it from them first")
}
