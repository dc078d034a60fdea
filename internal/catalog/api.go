package catalog

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
)

type apis struct{ plain }

const readAPIsSQL = `
SELECT e.id, e.uuid::text, t.id, t.domain, e.ts, e.name, e.version, e.context, e.provider, e.type, e.status,
       e.default_version, e.policy, e.security_scheme, e.gateway_labels, e.operations
FROM rescind.apis e
JOIN rescind.tenants t ON t.id = e.tenant_id`

const insertAPIsSQL = `
INSERT INTO rescind.apis (id, uuid, tenant_id, ts, name, version, context, provider, type, status,
    default_version, policy, security_scheme, gateway_labels, operations)
SELECT r.id, r.uuid, (r.tenant ->> 'id')::integer, r.timestamp, r.name, r.version, r.context, r.provider, r.type, r.status,
    r.default_version, coalesce(r.policy, ''), coalesce(r.security_scheme, '{}'), coalesce(r.gateway_labels, '{}'),
    coalesce(r.operations, '[]')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, uuid uuid, tenant jsonb, timestamp bigint, name text, version text,
    context text, provider text, type text, status text, default_version boolean, policy text,
    security_scheme text[], gateway_labels text[], operations jsonb)
ON CONFLICT DO NOTHING
RETURNING uuid::text`

const updateAPIsSQL = `
UPDATE rescind.apis e
SET ts = r.timestamp, context = r.context, provider = r.provider, type = r.type, status = r.status,
    default_version = r.default_version, policy = coalesce(r.policy, ''), security_scheme = coalesce(r.security_scheme, '{}'),
    gateway_labels = coalesce(r.gateway_labels, '{}'), operations = coalesce(r.operations, '[]')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, timestamp bigint,
    context text, provider text, type text, status text, default_version boolean, policy text,
    security_scheme text[], gateway_labels text[], operations jsonb)
WHERE e.id = r.id`

func (apis) sql() statements {
	return statements{"rescind.apis", "rescind.apis_id_seq", readAPIsSQL, insertAPIsSQL, updateAPIsSQL}
}

func (apis) scan(row pgx.CollectableRow) (catalog.Entity, error) {
	var a catalog.API
	err := row.Scan(&a.ID, &a.UUID, &a.Tenant.ID, &a.Tenant.Domain, &a.Timestamp, &a.Name, &a.Version, &a.Context, &a.Provider, &a.Type,
		&a.Status, &a.DefaultVersion, &a.Policy, &a.SecurityScheme, &a.GatewayLabels, &a.Operations)
	a.SecurityScheme, a.GatewayLabels, a.Operations = list(a.SecurityScheme), list(a.GatewayLabels), list(a.Operations)
	return &a, err
}

func (apis) complete(e catalog.Entity) {
	a := e.(*catalog.API)
	set(&a.Type, "HTTP")
	set(&a.Status, catalog.APICreated)
	a.SecurityScheme, a.GatewayLabels, a.Operations = list(a.SecurityScheme), list(a.GatewayLabels), list(a.Operations)
	for i := range a.Operations {
		op := &a.Operations[i]
		set(&op.AuthType, "Any")
		set(&op.Policy, unlimited)
		op.Scopes = list(op.Scopes)
	}
}

func (apis) unique(e catalog.Entity) []place {
	a := e.(*catalog.API)
	return []place{
		{`e.tenant_id = $2 AND e.name = $3 AND e.version = $4`, []any{a.Tenant.ID, a.Name, a.Version},
			taken("#/name", "the tenant has an API of this name and version already")},
		{`e.tenant_id = $2 AND e.context = $3`, []any{a.Tenant.ID, a.Context},
			taken("#/context", "another API of the tenant has this context")},
	}
}

func (apis) keep(_ *batch, cur, want catalog.Entity) *Conflict {
	c, w := cur.(*catalog.API), want.(*catalog.API)
	return fixed(member{"name", w.Name == c.Name}, member{"version", w.Version == c.Version})
}

func (apis) refer(ctx context.Context, b *batch, run []*step) error {
	found := newNamed()
	for _, st := range run {
		a := st.want.(*catalog.API)
		if a.Policy != "" {
			found.policies[policyName{a.Tenant.ID, catalog.PolicyAPI, a.Policy}] = false
		}
		for _, op := range a.Operations {
			found.policies[policyName{a.Tenant.ID, catalog.PolicyAPI, op.Policy}] = false
			for _, scope := range op.Scopes {
				found.scopes[scopeName{a.Tenant.ID, scope}] = false
			}
		}
	}
	var q pgx.Batch
	found.queue(&q)
	if err := b.send(ctx, &q); err != nil {
		return err
	}
	for _, st := range run {
		a := st.want.(*catalog.API)
		var wrong catalog.Invalid
		if a.Policy != "" && !found.policies[policyName{a.Tenant.ID, catalog.PolicyAPI, a.Policy}] {
			wrong = append(wrong, noPolicy("#/policy", catalog.PolicyAPI))
		}
		for i, op := range a.Operations {
			if !found.policies[policyName{a.Tenant.ID, catalog.PolicyAPI, op.Policy}] {
				wrong = append(wrong, noPolicy(fmt.Sprintf("#/operations/%d/policy", i), catalog.PolicyAPI))
			}
			for j, scope := range op.Scopes {
				if !found.scopes[scopeName{a.Tenant.ID, scope}] {
					wrong = append(wrong, catalog.FieldError{
						Pointer: fmt.Sprintf("#/operations/%d/scopes/%d", i, j), Detail: "there is no scope of this name in the tenant",
					})
				}
			}
		}
		if len(wrong) > 0 {
			return st.fail(wrong)
		}
	}
	return nil
}

const apisInUseSQL = `
SELECT a.id, CASE WHEN EXISTS (SELECT FROM rescind.subscriptions x WHERE x.api_id = a.id) THEN 'applications' END
FROM rescind.apis a WHERE a.id = ANY($1)`

func (apis) release(ctx context.Context, b *batch, run []*step) error {
	return b.refuseUsed(ctx, apisInUseSQL, run, "%s are subscribed to this API: delete their subscriptions first")
}

// changesOf is how a change of an API is told. cur is nil where it is created, want
// where it is deleted, and then cur has the time of that.
func changesOf(cur, want *catalog.API) []catalog.Change {
	switch {
	case cur == nil:
		return deployed([]catalog.Change{{Verb: catalog.Created, Entity: want}}, catalog.Deployed, want, want.GatewayLabels)
	case want == nil:
		return append(deployed(nil, catalog.Undeployed, cur, cur.GatewayLabels), catalog.Change{Verb: catalog.Deleted, Entity: cur})
	}
	verb := catalog.Updated
	if cur.Status != want.Status {
		verb = catalog.LifecycleChanged
	}
	changes := []catalog.Change{{Verb: verb, Entity: want}}
	changes = deployed(changes, catalog.Undeployed, want, without(cur.GatewayLabels, want.GatewayLabels))
	return deployed(changes, catalog.Deployed, want, without(want.GatewayLabels, cur.GatewayLabels))
}

func deployed(changes []catalog.Change, verb catalog.Verb, a *catalog.API, labels []string) []catalog.Change {
	if len(labels) == 0 {
		return changes
	}
	return append(changes, catalog.Change{Verb: verb, Entity: a, Labels: labels})
}

func without(labels, others []string) []string {
	return slices.DeleteFunc(slices.Clone(labels), func(l string) bool { return slices.Contains(others, l) })
}
