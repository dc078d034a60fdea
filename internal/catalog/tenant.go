package catalog

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

type tenants struct{ plain }

const readTenantsSQL = `
SELECT e.id, e.uuid::text, t.id, t.domain, e.ts, e.display_name
FROM rescind.tenants e
JOIN rescind.tenants t ON t.id = e.id`

const insertTenantsSQL = `
INSERT INTO rescind.tenants (id, uuid, domain, ts, display_name)
SELECT r.id, r.uuid, r.tenant ->> 'domain', r.timestamp, coalesce(r.display_name, '')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, uuid uuid, tenant jsonb, timestamp bigint, display_name text)
ON CONFLICT DO NOTHING
RETURNING uuid::text`

const updateTenantsSQL = `
UPDATE rescind.tenants e
SET ts = r.timestamp, display_name = coalesce(r.display_name, '')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, timestamp bigint, display_name text)
WHERE e.id = r.id`

func (tenants) sql() statements {
	return statements{"rescind.tenants", "rescind.tenants_id", readTenantsSQL, insertTenantsSQL, updateTenantsSQL}
}

func (tenants) scan(row pgx.CollectableRow) (catalog.Entity, error) {
	var t catalog.Tenant
	err := row.Scan(&t.ID, &t.UUID, &t.Meta.Tenant.ID, &t.Meta.Tenant.Domain, &t.Timestamp, &t.DisplayName)
	return &t, err
}

func (tenants) complete(catalog.Entity) {}

func (tenants) unique(e catalog.Entity) []place {
	return []place{{`e.domain = $2`, []any{e.Base().Tenant.Domain}, taken("#/tenant/domain", "there is a tenant of this domain already")}}
}

func (tenants) keep(*batch, catalog.Entity, catalog.Entity) *Conflict { return nil }

// created gives each tenant the policies that defaults name.
func (tenants) created(ctx context.Context, b *batch, run []*step) error {
	var made []*step
	for _, st := range run {
		tenant := st.want.Base().Tenant
		b.tenants[tenant.Domain] = tenant
		for _, kind := range []string{catalog.PolicySubscription, catalog.PolicyApplication, catalog.PolicyAPI} {
			p := &catalog.Policy{Meta: catalog.Meta{Tenant: tenant}, Kind: kind, Name: unlimited}
			policies{}.complete(p)
			made = append(made, &step{index: st.index, op: Create, want: p, reason: "tenant created"})
		}
	}
	return b.create(ctx, policies{}, made)
}

// What is of a tenant, in the order in which it should go. Its policies are deleted with it
// if they are the ones that it was made with.
const tenantsInUseSQL = `
SELECT t.id, CASE
    WHEN EXISTS (SELECT FROM rescind.applications x WHERE x.tenant_id = t.id) THEN 'applications'
    WHEN EXISTS (SELECT FROM rescind.apis x WHERE x.tenant_id = t.id) THEN 'APIs'
    WHEN EXISTS (SELECT FROM rescind.scopes x WHERE x.tenant_id = t.id) THEN 'scopes'
    WHEN EXISTS (SELECT FROM rescind.policies x WHERE x.tenant_id = t.id AND x.name <> 'Unlimited') THEN 'policies'
    WHEN EXISTS (SELECT FROM rescind.key_managers x WHERE x.tenant_id = t.id) THEN 'key managers'
    WHEN EXISTS (SELECT FROM rescind.accounts x WHERE x.tenant_id = t.id) THEN 'accounts'
    WHEN EXISTS (SELECT FROM rescind.revocations x WHERE x.tenant_id = t.id) THEN 'revocations that gateways still need'
    END
FROM rescind.tenants t WHERE t.id = ANY($1)`

const unlimitedSQL = ` WHERE e.tenant_id = ANY($1) AND e.name = 'Unlimited' ORDER BY e.id FOR UPDATE OF e`

func (tenants) release(ctx context.Context, b *batch, run []*step) error {
	for _, st := range run {
		if st.cur.Base().ID == revocation.SuperTenant.ID {
			return st.fail(&Conflict{Slug: "in-use", Detail: "carbon.super is there always: it cannot be deleted"})
		}
	}
	if err := b.refuseUsed(ctx, tenantsInUseSQL, run, "the tenant still has %s: delete them first, or wait until they end"); err != nil {
		return err
	}
	own, err := b.fetch(ctx, policies{}, unlimitedSQL, ids(run))
	if err != nil {
		return err
	}
	index := make(map[int32]int)
	for _, st := range run {
		index[st.cur.Base().ID] = st.index
	}
	gone := make([]*step, len(own))
	for i, p := range own {
		gone[i] = &step{index: index[p.Base().Tenant.ID], op: Delete, cur: p, reason: "tenant deleted"}
	}
	return b.remove(ctx, policies{}, gone)
}
