package catalog

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
)

type subscriptions struct{}

const readSubscriptionsSQL = `
SELECT e.id, e.uuid::text, t.id, t.domain, e.ts, a.id, a.uuid::text, p.id, p.uuid::text, e.policy, e.state, e.application_blocked
FROM rescind.subscriptions e
JOIN rescind.applications a ON a.id = e.application_id
JOIN rescind.apis p ON p.id = e.api_id
JOIN rescind.tenants t ON t.id = e.tenant_id`

const insertSubscriptionsSQL = `
INSERT INTO rescind.subscriptions (id, uuid, tenant_id, ts, application_id, api_id, policy, state, application_blocked)
SELECT r.id, r.uuid, (r.tenant ->> 'id')::integer, r.timestamp, (r.application ->> 'id')::integer, (r.api ->> 'id')::integer,
    r.policy, r.state, r.application_blocked
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, uuid uuid, tenant jsonb, timestamp bigint, application jsonb, api jsonb,
    policy text, state text, application_blocked boolean)
ON CONFLICT DO NOTHING
RETURNING uuid::text`

const updateSubscriptionsSQL = `
UPDATE rescind.subscriptions e
SET ts = r.timestamp, policy = r.policy, state = r.state, application_blocked = r.application_blocked
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, timestamp bigint, policy text, state text, application_blocked boolean)
WHERE e.id = r.id`

func (subscriptions) sql() statements {
	return statements{"rescind.subscriptions", "rescind.subscriptions_id_seq", readSubscriptionsSQL, insertSubscriptionsSQL, updateSubscriptionsSQL}
}

func (subscriptions) scan(row pgx.CollectableRow) (catalog.Entity, error) {
	var s catalog.Subscription
	err := row.Scan(&s.ID, &s.UUID, &s.Tenant.ID, &s.Tenant.Domain, &s.Timestamp, &s.Application.ID, &s.Application.UUID,
		&s.API.ID, &s.API.UUID, &s.Policy, &s.State, &s.ApplicationBlocked)
	return &s, err
}

func (subscriptions) complete(e catalog.Entity) {
	s := e.(*catalog.Subscription)
	set(&s.Policy, unlimited)
	set(&s.State, catalog.Unblocked)
}

func (subscriptions) unique(e catalog.Entity) []place {
	s := e.(*catalog.Subscription)
	return []place{{`e.application_id = $2 AND e.api_id = $3`, []any{s.Application.ID, s.API.ID},
		taken("#/api", "the application is subscribed to this API already")}}
}

func (subscriptions) keep(_ *batch, cur, want catalog.Entity) *Conflict {
	c, w := cur.(*catalog.Subscription), want.(*catalog.Subscription)
	conflict := fixed(member{"application", names(w.Application, c.Application)}, member{"api", names(w.API, c.API)})
	w.Application, w.API, w.ApplicationBlocked = c.Application, c.API, c.ApplicationBlocked
	return conflict
}

func (subscriptions) refer(ctx context.Context, b *batch, run []*step) error {
	if run[0].op == Create {
		if err := referSubscriptions(ctx, b, run); err != nil {
			return err
		}
	}
	policy := func(st *step) policyName {
		s := st.want.(*catalog.Subscription)
		return policyName{s.Tenant.ID, catalog.PolicySubscription, s.Policy}
	}
	found := newNamed()
	for _, st := range run {
		found.policies[policy(st)] = false
	}
	var q pgx.Batch
	found.queue(&q)
	if err := b.send(ctx, &q); err != nil {
		return err
	}
	for _, st := range run {
		if !found.policies[policy(st)] {
			return st.fail(catalog.Invalid{noPolicy("#/policy", catalog.PolicySubscription)})
		}
	}
	return nil
}

// referSubscriptions looks up the two that new subscriptions join.
func referSubscriptions(ctx context.Context, b *batch, run []*step) error {
	var applicationRefs, apiRefs refs
	for _, st := range run {
		s := st.want.(*catalog.Subscription)
		applicationRefs.add(s.Application)
		apiRefs.add(s.API)
	}
	var q pgx.Batch
	applications := applicationRefs.queueApplications(&q, false)
	apis := apiRefs.queueAPIs(&q)
	if err := b.send(ctx, &q); err != nil {
		return err
	}
	for _, st := range run {
		s := st.want.(*catalog.Subscription)
		application, ok := applications.get(s.Application)
		if err := b.within(st, s.Application, application, ok); err != nil {
			return err
		}
		api, ok := apis.get(s.API)
		if !ok || api.tenant != s.Tenant.ID || !names(s.API, api.Ref) {
			return st.fail(catalog.Invalid{{Pointer: "#/api", Detail: "there is no such API in the tenant"}})
		}
		s.Application, s.API, s.ApplicationBlocked = application.Ref, api.Ref, application.blocked
	}
	return nil
}

func (subscriptions) updated(ctx context.Context, b *batch, run []*step) error {
	return endSubscriptions(ctx, b, run, "subscription blocked")
}

func (subscriptions) release(ctx context.Context, b *batch, run []*step) error {
	return endSubscriptions(ctx, b, run, "subscription deleted")
}

// endSubscriptions revokes the keys that run no longer lets through. A deletion ends all:
// a token may be from before it was blocked, and have been kept. So may those of a blocked
// application, which ends nothing by itself here: only State counts.
func endSubscriptions(ctx context.Context, b *batch, run []*step, reason string) error {
	ends := func(st *step, keyType string) bool {
		return st.op == Delete || lets(st.cur, keyType) && !lets(st.want, keyType)
	}
	var of []int32
	for _, st := range run {
		if ends(st, catalog.Production) || ends(st, catalog.Sandbox) {
			of = append(of, st.cur.(*catalog.Subscription).Application.ID)
		}
	}
	if len(of) == 0 {
		return nil
	}
	keys, err := b.keysOf(ctx, of)
	if err != nil {
		return err
	}
	for _, st := range run {
		s := st.cur.(*catalog.Subscription)
		for _, k := range keys[s.Application.ID] {
			if !ends(st, k.keyType) {
				continue
			}
			if err := b.endTokens(st, k, s.Tenant, reason); err != nil {
				return err
			}
		}
	}
	return nil
}

// lets reports whether a subscription's own state lets requests with keys of a type through.
func lets(e catalog.Entity, keyType string) bool {
	return catalog.LetsThrough(e.(*catalog.Subscription).State, keyType)
}
