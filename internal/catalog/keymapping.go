package catalog

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

type keyMappings struct{ plain }

// A key was made by us if its client is with us.
const readKeyMappingsSQL = `
SELECT e.id, e.uuid::text, t.id, t.domain, e.ts, a.id, a.uuid::text, e.consumer_key, e.key_type, k.name, k.iss,
       c.client_id IS NOT NULL
FROM rescind.key_mappings e
JOIN rescind.applications a ON a.id = e.application_id
JOIN rescind.key_managers k ON k.id = e.key_manager_id
JOIN rescind.tenants t ON t.id = k.tenant_id
LEFT JOIN rescind.clients c ON c.key_mapping_id = e.id`

const insertKeyMappingsSQL = `
INSERT INTO rescind.key_mappings (id, uuid, ts, application_id, key_manager_id, consumer_key, key_type)
SELECT r.id, r.uuid, r.timestamp, (r.application ->> 'id')::integer, k.id, r.consumer_key, r.key_type
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, uuid uuid, timestamp bigint, application jsonb, consumer_key text,
    key_type text, iss text)
JOIN rescind.key_managers k ON k.iss = r.iss COLLATE "C"
ON CONFLICT DO NOTHING
RETURNING uuid::text`

func (keyMappings) sql() statements {
	return statements{"rescind.key_mappings", "rescind.key_mappings_id_seq", readKeyMappingsSQL, insertKeyMappingsSQL, ""}
}

func (keyMappings) scan(row pgx.CollectableRow) (catalog.Entity, error) {
	var m catalog.KeyMapping
	err := row.Scan(&m.ID, &m.UUID, &m.Tenant.ID, &m.Tenant.Domain, &m.Timestamp, &m.Application.ID, &m.Application.UUID,
		&m.ConsumerKey, &m.KeyType, &m.KeyManager, &m.Iss, &m.Generated)
	return &m, err
}

func (keyMappings) complete(e catalog.Entity) { e.(*catalog.KeyMapping).Generated = false }

func (keyMappings) unique(e catalog.Entity) []place {
	m := e.(*catalog.KeyMapping)
	return []place{{`e.consumer_key = $2 AND e.key_manager_id = (SELECT id FROM rescind.key_managers WHERE iss = $3)`,
		[]any{m.ConsumerKey, m.Iss}, taken("#/consumer_key", "the key manager has this consumer key already")}}
}

func (keyMappings) keep(_ *batch, cur, want catalog.Entity) *Conflict {
	c, w := cur.(*catalog.KeyMapping), want.(*catalog.KeyMapping)
	conflict := fixed(
		member{"application", names(w.Application, c.Application)},
		member{"consumer_key", w.ConsumerKey == c.ConsumerKey},
		member{"key_type", w.KeyType == c.KeyType},
		member{"key_manager", w.KeyManager == c.KeyManager},
		member{"iss", w.Iss == "" || w.Iss == c.Iss},
	)
	*w = *c
	return conflict
}

// maxKeys is how many consumer keys an application may have: the first transaction that
// blocks or deletes it revokes the tokens of all.
const maxKeys = 100

const keyManagersSQL = `
SELECT k.tenant_id, k.name, k.iss
FROM unnest($1::integer[], $2::text[]) AS n (tenant_id, name)
JOIN rescind.key_managers k ON k.tenant_id = n.tenant_id AND k.name = n.name`

func (keyMappings) refer(ctx context.Context, b *batch, run []*step) error {
	if run[0].op == Update {
		return nil // nothing changes
	}
	var q pgx.Batch
	var wanted refs
	for _, st := range run {
		wanted.add(st.want.(*catalog.KeyMapping).Application)
	}
	applications := wanted.queueApplications(&q, true)
	if err := b.send(ctx, &q); err != nil {
		return err
	}
	added := make(map[int32]int)
	var tenants []int32
	var managers []string
	for _, st := range run {
		m := st.want.(*catalog.KeyMapping)
		a, ok := applications.get(m.Application)
		if err := b.within(st, m.Application, a, ok); err != nil {
			return err
		}
		m.Application = a.Ref
		if added[a.ID]++; a.keys+added[a.ID] > maxKeys {
			return st.fail(&Conflict{Slug: "limit", Pointer: "#/application",
				Detail: fmt.Sprintf("the application has %d consumer keys, which is the most that there can be: delete one first", maxKeys)})
		}
		tenants, managers = append(tenants, m.Tenant.ID), append(managers, m.KeyManager)
	}
	type name struct {
		tenant int32
		name   string
	}
	issuers := make(map[name]string)
	rows, err := b.tx.Query(ctx, keyManagersSQL, tenants, managers)
	if err != nil {
		return err
	}
	var n name
	var iss string
	if _, err := pgx.ForEachRow(rows, []any{&n.tenant, &n.name, &iss}, func() error { issuers[n] = iss; return nil }); err != nil {
		return err
	}
	for _, st := range run {
		m := st.want.(*catalog.KeyMapping)
		iss, ok := issuers[name{m.Tenant.ID, m.KeyManager}]
		switch {
		case !ok:
			return st.fail(catalog.Invalid{{Pointer: "#/key_manager", Detail: "there is no key manager of this name in the tenant"}})
		case m.Iss != "" && m.Iss != iss:
			return st.fail(catalog.Invalid{{Pointer: "#/iss", Detail: "is not the issuer of the key manager"}})
		}
		m.Iss = iss
		target := revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: m.ConsumerKey}
		if err := target.Validate(); err != nil {
			return st.fail(catalog.Invalid{{Pointer: "#/consumer_key", Detail: err.Error()}})
		}
	}
	return nil
}

// within checks the application that st's entity is of, and gives the entity its tenant if it named none.
func (b *batch) within(st *step, given catalog.Ref, a applicationRow, ok bool) error {
	m := st.want.Base()
	if ok && m.Tenant == (revocation.Tenant{}) {
		m.Tenant = a.tenant
	}
	if !ok || m.Tenant != a.tenant || !names(given, a.Ref) {
		return st.fail(catalog.Invalid{{Pointer: "#/application", Detail: "there is no such application in the tenant"}})
	}
	return nil
}

func (keyMappings) release(ctx context.Context, b *batch, run []*step) error {
	var of []int32
	for _, st := range run {
		m := st.cur.(*catalog.KeyMapping)
		of = append(of, m.Application.ID)
		b.forget = append(b.forget, consumer{m.Iss, m.ConsumerKey})
	}
	keys, err := b.keysOf(ctx, of)
	if err != nil {
		return err
	}
	for _, st := range run {
		m := st.cur.(*catalog.KeyMapping)
		for _, k := range keys[m.Application.ID] {
			if k.consumer != (consumer{m.Iss, m.ConsumerKey}) {
				continue
			}
			if err := b.endTokens(st, k, m.Tenant, reasonOr(st, "consumer key deleted")); err != nil {
				return err
			}
		}
	}
	return nil
}

// endTokens revokes the tokens of k, which st ends, unless st keeps them. Those that a gateway
// judges by what they carry would go on for as long as they live, and st would have no effect.
func (b *batch) endTokens(st *step, k key, tenant revocation.Tenant, reason string) error {
	switch {
	case !st.keepTokens:
		b.revoke(k, tenant, reason)
	case k.selfContained:
		return st.fail(catalog.Invalid{{Pointer: "#/revoke_tokens", Detail: "must be true: the application's tokens are self-contained, " +
			"and gateways let them through until they end or are revoked"}})
	}
	return nil
}

func reasonOr(st *step, reason string) string {
	if st.reason != "" {
		return st.reason
	}
	return reason
}

// consumer is a client as its tokens name it.
type consumer struct{ iss, key string }

// key is a consumer key that tokens are made for.
type key struct {
	consumer
	keyType       string
	lifetime      int32 // of its tokens at the most, in seconds
	selfContained bool  // its application is
}

const keysOfSQL = `
SELECT m.application_id, k.iss, m.consumer_key, m.key_type, k.max_token_lifetime, a.self_contained
FROM rescind.key_mappings m
JOIN rescind.key_managers k ON k.id = m.key_manager_id
JOIN rescind.applications a ON a.id = m.application_id
WHERE m.application_id = ANY($1)
ORDER BY m.id`

// keysOf returns the consumer keys of applications.
func (b *batch) keysOf(ctx context.Context, applications []int32) (map[int32][]key, error) {
	rows, err := b.tx.Query(ctx, keysOfSQL, applications)
	if err != nil {
		return nil, err
	}
	keys := make(map[int32][]key)
	var of int32
	var k key
	_, err = pgx.ForEachRow(rows, []any{&of, &k.iss, &k.key, &k.keyType, &k.lifetime, &k.selfContained}, func() error {
		keys[of] = append(keys[of], k)
		return nil
	})
	return keys, err
}
