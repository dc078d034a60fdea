package catalog

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
)

type policies struct{ plain }

const readPoliciesSQL = `
SELECT e.id, e.uuid::text, t.id, t.domain, e.ts, e.kind, e.name, e.display_name, e.description,
       e.quota_type, e.quota, e.unit_time, e.time_unit, e.rate_limit_count, e.rate_limit_time_unit,
       e.stop_on_quota_reach, e.graphql_max_depth, e.graphql_max_complexity, e.level
FROM rescind.policies e
JOIN rescind.tenants t ON t.id = e.tenant_id`

const insertPoliciesSQL = `
INSERT INTO rescind.policies (id, uuid, tenant_id, ts, kind, name, display_name, description,
    quota_type, quota, unit_time, time_unit, rate_limit_count, rate_limit_time_unit,
    stop_on_quota_reach, graphql_max_depth, graphql_max_complexity, level)
SELECT r.id, r.uuid, (r.tenant ->> 'id')::integer, r.timestamp, r.kind, r.name, coalesce(r.display_name, ''), coalesce(r.description, ''),
    r.quota_type, coalesce(r.quota, 0), coalesce(r.unit_time, 0), coalesce(r.time_unit, ''),
    coalesce(r.rate_limit_count, 0), coalesce(r.rate_limit_time_unit, ''), coalesce(r.stop_on_quota_reach, false),
    coalesce(r.graphql_max_depth, 0), coalesce(r.graphql_max_complexity, 0), coalesce(r.level, '')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, uuid uuid, tenant jsonb, timestamp bigint, kind text, name text,
    display_name text, description text, quota_type text, quota bigint, unit_time integer, time_unit text,
    rate_limit_count integer, rate_limit_time_unit text, stop_on_quota_reach boolean,
    graphql_max_depth integer, graphql_max_complexity integer, level text)
ON CONFLICT DO NOTHING
RETURNING uuid::text`

const updatePoliciesSQL = `
UPDATE rescind.policies e
SET ts = r.timestamp, display_name = coalesce(r.display_name, ''), description = coalesce(r.description, ''),
    quota_type = r.quota_type, quota = coalesce(r.quota, 0), unit_time = coalesce(r.unit_time, 0), time_unit = coalesce(r.time_unit, ''),
    rate_limit_count = coalesce(r.rate_limit_count, 0), rate_limit_time_unit = coalesce(r.rate_limit_time_unit, ''),
    stop_on_quota_reach = coalesce(r.stop_on_quota_reach, false), graphql_max_depth = coalesce(r.graphql_max_depth, 0),
    graphql_max_complexity = coalesce(r.graphql_max_complexity, 0), level = coalesce(r.level, '')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, timestamp bigint,
    display_name text, description text, quota_type text, quota bigint, unit_time integer, time_unit text,
    rate_limit_count integer, rate_limit_time_unit text, stop_on_quota_reach boolean,
    graphql_max_depth integer, graphql_max_complexity integer, level text)
WHERE e.id = r.id`

func (policies) sql() statements {
	return statements{"rescind.policies", "rescind.policies_id_seq", readPoliciesSQL, insertPoliciesSQL, updatePoliciesSQL}
}

func (policies) scan(row pgx.CollectableRow) (catalog.Entity, error) {
	var p catalog.Policy
	err := row.Scan(&p.ID, &p.UUID, &p.Tenant.ID, &p.Tenant.Domain, &p.Timestamp, &p.Kind, &p.Name, &p.DisplayName, &p.Description,
		&p.QuotaType, &p.Quota, &p.UnitTime, &p.TimeUnit, &p.RateLimitCount, &p.RateLimitTimeUnit,
		&p.StopOnQuotaReach, &p.GraphQLMaxDepth, &p.GraphQLMaxComplexity, &p.Level)
	return &p, err
}

func (policies) complete(e catalog.Entity) {
	p := e.(*catalog.Policy)
	set(&p.QuotaType, "requestCount")
	if p.Kind == catalog.PolicyAPI {
		set(&p.Level, "apiLevel")
	}
}

func (policies) unique(e catalog.Entity) []place {
	p := e.(*catalog.Policy)
	return []place{{`e.tenant_id = $2 AND e.kind = $3 AND e.name = $4`, []any{p.Tenant.ID, p.Kind, p.Name},
		taken("#/name", "the tenant has a policy of this kind and name already")}}
}

func (policies) keep(_ *batch, cur, want catalog.Entity) *Conflict {
	c, w := cur.(*catalog.Policy), want.(*catalog.Policy)
	return fixed(member{"kind", w.Kind == c.Kind}, member{"name", w.Name == c.Name})
}

const policiesInUseSQL = `
SELECT p.id, CASE
    WHEN p.kind = 'application' AND EXISTS (
        SELECT FROM rescind.applications x WHERE x.tenant_id = p.tenant_id AND x.policy = p.name) THEN 'applications'
    WHEN p.kind = 'subscription' AND EXISTS (
        SELECT FROM rescind.subscriptions x WHERE x.tenant_id = p.tenant_id AND x.policy = p.name) THEN 'subscriptions'
    WHEN p.kind = 'api' AND EXISTS (
        SELECT FROM rescind.apis x WHERE x.tenant_id = p.tenant_id
            AND (x.policy = p.name OR x.operations @> jsonb_build_array(jsonb_build_object('policy', p.name)))) THEN 'APIs'
    END
FROM rescind.policies p WHERE p.id = ANY($1)`

func (policies) release(ctx context.Context, b *batch, run []*step) error {
	return b.refuseUsed(ctx, policiesInUseSQL, run, "%s have this policy: give them another one first")
}

const existingPoliciesSQL = `
SELECT p.tenant_id, p.kind, p.name
FROM unnest($1::integer[], $2::text[], $3::text[]) AS n (tenant_id, kind, name)
JOIN rescind.policies p ON p.tenant_id = n.tenant_id AND p.kind = n.kind AND p.name = n.name COLLATE "C"`

const existingScopesSQL = `
SELECT s.tenant_id, s.name
FROM unnest($1::integer[], $2::text[]) AS n (tenant_id, name)
JOIN rescind.scopes s ON s.tenant_id = n.tenant_id AND s.name = n.name COLLATE "C"`

// named are policies and scopes that something refers to by name.
type named struct {
	policies map[policyName]bool // true: it exists
	scopes   map[scopeName]bool
}

type policyName struct {
	tenant     int32
	kind, name string
}

type scopeName struct {
	tenant int32
	name   string
}

func newNamed() *named {
	return &named{make(map[policyName]bool), make(map[scopeName]bool)}
}

// queue asks which of n exist.
func (n *named) queue(q *pgx.Batch) {
	if len(n.policies) > 0 {
		var tenants []int32
		var kinds, names []string
		for p := range n.policies {
			tenants, kinds, names = append(tenants, p.tenant), append(kinds, p.kind), append(names, p.name)
		}
		q.Queue(existingPoliciesSQL, tenants, kinds, names).Query(func(rows pgx.Rows) error {
			var p policyName
			_, err := pgx.ForEachRow(rows, []any{&p.tenant, &p.kind, &p.name}, func() error { n.policies[p] = true; return nil })
			return err
		})
	}
	if len(n.scopes) > 0 {
		var tenants []int32
		var names []string
		for s := range n.scopes {
			tenants, names = append(tenants, s.tenant), append(names, s.name)
		}
		q.Queue(existingScopesSQL, tenants, names).Query(func(rows pgx.Rows) error {
			var s scopeName
			_, err := pgx.ForEachRow(rows, []any{&s.tenant, &s.name}, func() error { n.scopes[s] = true; return nil })
			return err
		})
	}
}

// noPolicy is what is wrong with a member that names a policy that does not exist.
func noPolicy(pointer, kind string) catalog.FieldError {
	return catalog.FieldError{Pointer: pointer, Detail: "there is no " + kind + " policy of this name in the tenant"}
}
