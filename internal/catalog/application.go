package catalog

import (
	"context"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

type applications struct{}

const readApplicationsSQL = `
SELECT e.id, e.uuid::text, t.id, t.domain, e.ts, e.name, e.owner, e.policy, e.token_type, e.groups, e.attributes,
       e.self_contained, e.blocked
FROM rescind.applications e
JOIN rescind.tenants t ON t.id = e.tenant_id`

const insertApplicationsSQL = `
INSERT INTO rescind.applications (id, uuid, tenant_id, ts, name, owner, policy, token_type, groups, attributes,
    self_contained, blocked)
SELECT r.id, r.uuid, (r.tenant ->> 'id')::integer, r.timestamp, r.name, r.owner, r.policy, r.token_type,
    coalesce(r.groups, '{}'), coalesce(r.attributes, '{}'), coalesce(r.self_contained, false), r.blocked
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, uuid uuid, tenant jsonb, timestamp bigint, name text, owner text,
    policy text, token_type text, groups text[], attributes jsonb, self_contained boolean, blocked boolean)
ON CONFLICT DO NOTHING
RETURNING uuid::text`

const updateApplicationsSQL = `
UPDATE rescind.applications e
SET ts = r.timestamp, name = r.name, policy = r.policy, token_type = r.token_type,
    groups = coalesce(r.groups, '{}'), attributes = coalesce(r.attributes, '{}'),
    self_contained = coalesce(r.self_contained, false), blocked = r.blocked
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, timestamp bigint, name text,
    policy text, token_type text, groups text[], attributes jsonb, self_contained boolean, blocked boolean)
WHERE e.id = r.id`

func (applications) sql() statements {
	return statements{"rescind.applications", "rescind.applications_id_seq", readApplicationsSQL, insertApplicationsSQL, updateApplicationsSQL}
}

func (applications) scan(row pgx.CollectableRow) (catalog.Entity, error) {
	var a catalog.Application
	err := row.Scan(&a.ID, &a.UUID, &a.Tenant.ID, &a.Tenant.Domain, &a.Timestamp, &a.Name, &a.Owner, &a.Policy, &a.TokenType,
		&a.Groups, &a.Attributes, &a.SelfContained, &a.Blocked)
	a.Groups = list(a.Groups)
	if len(a.Attributes) == 0 {
		a.Attributes = nil
	}
	return &a, err
}

func (applications) complete(e catalog.Entity) {
	a := e.(*catalog.Application)
	set(&a.Policy, unlimited)
	set(&a.TokenType, "JWT")
	a.Groups = list(a.Groups)
	if a.Attributes = maps.Clone(a.Attributes); len(a.Attributes) == 0 {
		a.Attributes = nil
	}
}

func (applications) unique(e catalog.Entity) []place {
	a := e.(*catalog.Application)
	return []place{{`e.tenant_id = $2 AND e.owner = $3 AND e.name = $4`, []any{a.Tenant.ID, a.Owner, a.Name},
		taken("#/name", "the owner has an application of this name already")}}
}

func (applications) keep(_ *batch, cur, want catalog.Entity) *Conflict {
	c, w := cur.(*catalog.Application), want.(*catalog.Application)
	w.Blocked = c.Blocked
	return fixed(member{"owner", w.Owner == c.Owner})
}

func (applications) refer(ctx context.Context, b *batch, run []*step) error {
	found := newNamed()
	policy := func(st *step) policyName {
		a := st.want.(*catalog.Application)
		return policyName{a.Tenant.ID, catalog.PolicyApplication, a.Policy}
	}
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
			return st.fail(catalog.Invalid{noPolicy("#/policy", catalog.PolicyApplication)})
		}
	}
	return nil
}

// updated revokes the tokens that were self-contained where later ones are not: what ends
// something afterwards would not know of them.
func (applications) updated(ctx context.Context, b *batch, run []*step) error {
	var of []int32
	for _, st := range run {
		if cur := st.cur.(*catalog.Application); cur.SelfContained && !st.want.(*catalog.Application).SelfContained {
			of = append(of, cur.ID)
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
		m := st.cur.Base()
		for _, k := range keys[m.ID] {
			if err := b.endTokens(st, k, m.Tenant, "no longer self-contained"); err != nil {
				return err
			}
		}
	}
	return nil
}

const (
	subscriptionsOfSQL = ` WHERE e.application_id = ANY($1) ORDER BY e.id LIMIT $2 FOR UPDATE OF e`
	keyMappingsOfSQL   = ` WHERE e.application_id = ANY($1) ORDER BY e.id LIMIT $2 FOR UPDATE OF e`
)

// release deletes what the applications hold: their subscriptions, then their keys.
func (applications) release(ctx context.Context, b *batch, run []*step) error {
	of := make(map[int32]*step, len(run))
	for _, st := range run {
		of[st.cur.Base().ID] = st
	}
	held, err := b.fetch(ctx, subscriptions{}, subscriptionsOfSQL, ids(run), maxEvents+1)
	if err != nil {
		return err
	}
	mappings, err := b.fetch(ctx, keyMappings{}, keyMappingsOfSQL, ids(run), maxEvents+1)
	if err != nil {
		return err
	}
	if b.events+len(run)+len(held)+len(mappings) > maxEvents {
		return tooMany
	}
	gone := func(e catalog.Entity, application catalog.Ref) *step {
		st := of[application.ID]
		return &step{index: st.index, op: Delete, cur: e, keepTokens: st.keepTokens, reason: applicationDeleted}
	}
	var ended []*step
	for _, e := range held {
		ended = append(ended, gone(e, e.(*catalog.Subscription).Application))
	}
	// The revocations of the keys end what these let through.
	if err := b.remove(ctx, subscriptions{}, ended); err != nil {
		return err
	}
	ended = nil
	for _, e := range mappings {
		ended = append(ended, gone(e, e.(*catalog.KeyMapping).Application))
	}
	if err := (keyMappings{}).release(ctx, b, ended); err != nil {
		return err
	}
	return b.remove(ctx, keyMappings{}, ended)
}

const applicationDeleted = "application deleted"

// applicationRow is what others need to know of an application.
type applicationRow struct {
	catalog.Ref
	tenant  revocation.Tenant
	blocked bool
	keys    int
}

const applicationsSQL = `
SELECT a.id, a.uuid::text, t.id, t.domain, a.blocked,
    CASE WHEN $3 THEN (SELECT count(*) FROM rescind.key_mappings m WHERE m.application_id = a.id) ELSE 0 END
FROM (
    SELECT id FROM rescind.applications WHERE uuid = ANY($1::uuid[])
    UNION SELECT unnest($2::integer[])) AS n
JOIN rescind.applications a ON a.id = n.id
JOIN rescind.tenants t ON t.id = a.tenant_id`

const referredAPIsSQL = `
SELECT a.id, a.uuid::text, a.tenant_id
FROM (
    SELECT id FROM rescind.apis WHERE uuid = ANY($1::uuid[])
    UNION SELECT unnest($2::integer[])) AS n
JOIN rescind.apis a ON a.id = n.id`

// refs are references that are looked up together.
type refs struct {
	uuids []string
	ids   []int32
}

// compact leaves each once: many subscriptions are of one application.
func (r *refs) compact() {
	slices.Sort(r.uuids)
	slices.Sort(r.ids)
	r.uuids, r.ids = slices.Compact(r.uuids), slices.Compact(r.ids)
}

func (r *refs) add(ref catalog.Ref) {
	if ref.UUID != "" {
		r.uuids = append(r.uuids, ref.UUID)
	} else {
		r.ids = append(r.ids, ref.ID)
	}
}

// found are the rows that refs lead to.
type found[T any] struct {
	byUUID map[string]T
	byID   map[int32]T
}

func newFound[T any]() found[T] { return found[T]{make(map[string]T), make(map[int32]T)} }

func (f found[T]) add(ref catalog.Ref, row T) { f.byUUID[ref.UUID], f.byID[ref.ID] = row, row }

func (f found[T]) get(ref catalog.Ref) (T, bool) {
	if ref.UUID != "" {
		row, ok := f.byUUID[ref.UUID]
		return row, ok
	}
	row, ok := f.byID[ref.ID]
	return row, ok
}

// queueApplications asks for the applications that r names; keys counts their keys.
func (r *refs) queueApplications(q *pgx.Batch, keys bool) found[applicationRow] {
	r.compact()
	rows := newFound[applicationRow]()
	q.Queue(applicationsSQL, r.uuids, r.ids, keys).Query(func(cursor pgx.Rows) error {
		var a applicationRow
		_, err := pgx.ForEachRow(cursor, []any{&a.ID, &a.UUID, &a.tenant.ID, &a.tenant.Domain, &a.blocked, &a.keys}, func() error {
			rows.add(a.Ref, a)
			return nil
		})
		return err
	})
	return rows
}

type apiRow struct {
	catalog.Ref
	tenant int32
}

func (r *refs) queueAPIs(q *pgx.Batch) found[apiRow] {
	r.compact()
	rows := newFound[apiRow]()
	q.Queue(referredAPIsSQL, r.uuids, r.ids).Query(func(cursor pgx.Rows) error {
		var a apiRow
		_, err := pgx.ForEachRow(cursor, []any{&a.ID, &a.UUID, &a.tenant}, func() error { rows.add(a.Ref, a); return nil })
		return err
	})
	return rows
}
