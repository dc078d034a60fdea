package catalog

import (
	"context"
	"fmt"
	"slices"

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

// refer refuses tenants that cannot have an issuer.
func (tenants) refer(ctx context.Context, b *batch, run []*step) error {
	if run[0].op != Create || b.cfg.Issuer == "" {
		return nil
	}
	var issuers []string
	for _, st := range run {
		tenant := st.want.Base().Tenant
		if wrong := b.cfg.noIssuer(tenant); wrong != "" {
			return st.fail(catalog.Invalid{{Pointer: "#/tenant/domain", Detail: wrong}})
		}
		issuers = append(issuers, b.cfg.issuerOf(tenant))
	}
	rows, err := b.tx.Query(ctx, takenIssuersSQL, issuers)
	if err != nil {
		return err
	}
	others, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for i, st := range run {
		if slices.Contains(others, issuers[i]) {
			return st.fail(taken("#/tenant/domain", fmt.Sprintf("its issuer would be %s, which an external key manager has: delete that first", issuers[i])))
		}
	}
	return nil
}

const takenIssuersSQL = `SELECT iss FROM rescind.key_managers WHERE iss = ANY($1) AND NOT resident`

// created gives each tenant its issuer and the policies that defaults name.
func (tenants) created(ctx context.Context, b *batch, run []*step) error {
	var issuers, made []*step
	for _, st := range run {
		tenant := st.want.Base().Tenant
		b.tenants[tenant.Domain] = tenant
		if b.cfg.Issuer != "" {
			issuers = append(issuers, &step{index: st.index, op: Create, want: b.cfg.resident(tenant), reason: "tenant created"})
		}
		for _, kind := range []string{catalog.PolicySubscription, catalog.PolicyApplication, catalog.PolicyAPI} {
			p := &catalog.Policy{Meta: catalog.Meta{Tenant: tenant}, Kind: kind, Name: unlimited}
			policies{}.complete(p)
			made = append(made, &step{index: st.index, op: Create, want: p, reason: "tenant created"})
		}
	}
	if len(issuers) > 0 {
		if err := b.create(ctx, keyManagers{}, issuers); err != nil {
			return err
		}
	}
	return b.create(ctx, policies{}, made)
}

// What is of a tenant, in the order in which it should go, and what to do about it. What the
// tenant was made with is deleted with it: its issuer, which only consumer keys can be in the way
// of, and its first policies. Revocations are removed 720 s after they end.
const tenantsInUseSQL = `
SELECT t.id, coalesce(CASE
    WHEN EXISTS (SELECT FROM rescind.applications x WHERE x.tenant_id = t.id) THEN 'applications'
    WHEN EXISTS (SELECT FROM rescind.apis x WHERE x.tenant_id = t.id) THEN 'APIs'
    WHEN EXISTS (SELECT FROM rescind.scopes x WHERE x.tenant_id = t.id) THEN 'scopes'
    WHEN EXISTS (SELECT FROM rescind.policies x WHERE x.tenant_id = t.id AND x.name <> 'Unlimited') THEN 'policies'
    WHEN EXISTS (SELECT FROM rescind.key_managers x WHERE x.tenant_id = t.id AND NOT x.resident) THEN 'key managers'
    WHEN EXISTS (SELECT FROM rescind.key_managers x JOIN rescind.key_mappings m ON m.key_manager_id = x.id
        WHERE x.tenant_id = t.id) THEN 'consumer keys'
    WHEN EXISTS (SELECT FROM rescind.accounts x WHERE x.tenant_id = t.id) THEN 'accounts'
    END || ': delete them first',
    (SELECT 'revocations, which cannot be deleted: wait until they are over, at about ' ||
            to_char(to_timestamp(max(x.exp) + 780) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI"Z"') ||
            ' (a withdrawn signing key keeps it for up to ten years)'
        FROM rescind.revocations x WHERE x.tenant_id = t.id))
FROM rescind.tenants t WHERE t.id = ANY($1)`

const (
	unlimitedSQL = ` WHERE e.tenant_id = ANY($1) AND e.name = 'Unlimited' ORDER BY e.id FOR UPDATE OF e`
	residentsSQL = ` WHERE e.tenant_id = ANY($1) AND e.resident ORDER BY e.id FOR UPDATE OF e`

	deleteSigningKeysSQL = `DELETE FROM rescind.signing_keys WHERE key_manager_id = ANY($1)`
)

func (tenants) release(ctx context.Context, b *batch, run []*step) error {
	for _, st := range run {
		if st.cur.Base().ID == revocation.SuperTenant.ID {
			return st.fail(&Conflict{Slug: "in-use", Detail: "carbon.super is there always: it cannot be deleted"})
		}
	}
	if err := b.refuseUsed(ctx, tenantsInUseSQL, run, "the tenant still has %s"); err != nil {
		return err
	}
	index := make(map[int32]int)
	for _, st := range run {
		index[st.cur.Base().ID] = st.index
	}
	own := func(k kind, clause string) (gone []*step, err error) {
		entities, err := b.fetch(ctx, k, clause, ids(run))
		for _, e := range entities {
			gone = append(gone, &step{index: index[e.Base().Tenant.ID], op: Delete, cur: e, reason: "tenant deleted"})
		}
		return gone, err
	}
	tiers, err := own(policies{}, unlimitedSQL)
	if err != nil {
		return err
	}
	if err := b.remove(ctx, policies{}, tiers); err != nil {
		return err
	}
	issuers, err := own(keyManagers{}, residentsSQL)
	if err != nil {
		return err
	}
	// No token comes back with a tenant that is made again, which has the same iss and other
	// keys. While tokens that were revoked could live, the tenant cannot go; those that were kept
	// when their consumer key was deleted end with the keys that signed them.
	if _, err := b.tx.Exec(ctx, deleteSigningKeysSQL, ids(issuers)); err != nil {
		return b.failed("delete signing keys", err)
	}
	return b.remove(ctx, keyManagers{}, issuers)
}
