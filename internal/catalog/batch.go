package catalog

import (
	"context"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

// batch is one try at a transaction.
type batch struct {
	cfg Config
	by  Caller
	tx  *ledger.Tx
	// system may do what callers cannot.
	system bool

	tenants map[string]revocation.Tenant // locked, by domain
	revoked map[revocation.Target]bool
	events  int
	forget  []consumer // what others may remember of them is old
}

func (s *Store) newBatch(by Caller, tx *ledger.Tx) *batch {
	return &batch{cfg: s.cfg, by: by, tx: tx, tenants: make(map[string]revocation.Tenant), revoked: make(map[revocation.Target]bool)}
}

// steps are asked as this try may change them.
func (b *batch) steps(asked []*step) []*step {
	steps := make([]*step, len(asked))
	for i, st := range asked {
		c := *st
		if c.want != nil {
			c.want = copyOf(c.want)
		}
		steps[i] = &c
	}
	return steps
}

func (b *batch) apply(ctx context.Context, steps []*step) error {
	var w wanted
	for _, st := range steps {
		w.add(st)
	}
	if err := b.lock(ctx, w); err != nil {
		return err
	}
	for run := range runs(steps) {
		k := kindOf(run[0].noun)
		var err error
		switch run[0].op {
		case Create:
			err = b.create(ctx, k, run)
		case Update:
			err = b.update(ctx, k, run)
		case Delete:
			err = b.delete(ctx, k, run)
		}
		if err != nil {
			return err
		}
	}
	if b.size() > maxEvents {
		return tooMany
	}
	return nil
}

func (b *batch) size() int { return b.events + len(b.revoked) }

// runs yields consecutive steps of one noun and op that are about different entities.
func runs(steps []*step) func(yield func([]*step) bool) {
	return func(yield func([]*step) bool) {
		for len(steps) > 0 {
			n, seen := 0, make(map[string]bool)
			for n < len(steps) && steps[n].op == steps[0].op && steps[n].noun == steps[0].noun && (steps[n].uuid == "" || !seen[steps[n].uuid]) {
				seen[steps[n].uuid] = true
				n++
			}
			if !yield(steps[:n]) {
				return
			}
			steps = steps[n:]
		}
	}
}

// wanted is what the tenants that a batch locks are known by.
type wanted struct {
	domains []string
	ids     []int32
	uuids   [8][]string // of entities, by the place of their noun in catalog.Nouns
	of      refs        // applications that something is created for, in no named tenant
}

func (w *wanted) add(st *step) {
	if st.op != Create {
		noun := slices.Index(catalog.Nouns, st.noun)
		w.uuids[noun] = append(w.uuids[noun], st.uuid)
		return
	}
	switch t := st.want.Base().Tenant; {
	case st.noun == catalog.NounTenant:
		return
	case t.Domain != "":
		w.domains = append(w.domains, t.Domain)
		return
	case t.ID != 0:
		w.ids = append(w.ids, t.ID)
		return
	}
	switch e := st.want.(type) {
	case *catalog.KeyMapping:
		w.of.add(e.Application)
	case *catalog.Subscription:
		w.of.add(e.Application)
	default:
		w.domains = append(w.domains, revocation.SuperTenant.Domain)
	}
}

// NO KEY: rows that refer to the tenant, such as revocations, are inserted meanwhile.
const lockSQL = `
SELECT t.id, t.domain
FROM rescind.tenants t
WHERE t.id IN (
    SELECT id FROM rescind.tenants WHERE domain = ANY($1) OR id = ANY($2::integer[])
    UNION SELECT tenant_id FROM rescind.applications WHERE uuid = ANY($3::uuid[])
    UNION SELECT tenant_id FROM rescind.applications WHERE id = ANY($4::integer[])
    UNION SELECT id FROM rescind.tenants WHERE uuid = ANY($5::uuid[])
    UNION SELECT tenant_id FROM rescind.key_managers WHERE uuid = ANY($6::uuid[])
    UNION SELECT tenant_id FROM rescind.policies WHERE uuid = ANY($7::uuid[])
    UNION SELECT tenant_id FROM rescind.scopes WHERE uuid = ANY($8::uuid[])
    UNION SELECT tenant_id FROM rescind.apis WHERE uuid = ANY($9::uuid[])
    UNION SELECT tenant_id FROM rescind.applications WHERE uuid = ANY($10::uuid[])
    UNION SELECT a.tenant_id FROM rescind.key_mappings m JOIN rescind.applications a ON a.id = m.application_id WHERE m.uuid = ANY($11::uuid[])
    UNION SELECT tenant_id FROM rescind.subscriptions WHERE uuid = ANY($12::uuid[]))
ORDER BY t.id
FOR NO KEY UPDATE OF t`

// lock locks the tenants that w is about, of those that the caller sees.
func (b *batch) lock(ctx context.Context, w wanted) error {
	if b.by.Tenant != "" {
		w = wanted{domains: []string{b.by.Tenant}}
	}
	w.of.compact()
	slices.Sort(w.domains)
	slices.Sort(w.ids)
	args := []any{slices.Compact(w.domains), slices.Compact(w.ids), w.of.uuids, w.of.ids}
	for _, uuids := range w.uuids {
		args = append(args, uuids)
	}
	rows, err := b.tx.Query(ctx, lockSQL, args...)
	if err != nil {
		return fmt.Errorf("lock tenants: %w", err)
	}
	var t revocation.Tenant
	if _, err = pgx.ForEachRow(rows, []any{&t.ID, &t.Domain}, func() error { b.tenants[t.Domain] = t; return nil }); err != nil {
		return fmt.Errorf("lock tenants: %w", err)
	}
	return nil
}

// settle finds the tenant of a new entity. One that comes with its application has none yet.
func (b *batch) settle(st *step) error {
	m := st.want.Base()
	given := m.Tenant
	switch {
	case st.want.Noun() == catalog.NounTenant:
		return nil
	case given == (revocation.Tenant{}) && b.by.Tenant != "":
		given.Domain = b.by.Tenant
	case given == (revocation.Tenant{}):
		switch st.want.(type) {
		case *catalog.KeyMapping, *catalog.Subscription:
			return nil
		}
		given = revocation.SuperTenant
	}
	for _, t := range b.tenants {
		if (given.Domain == "" || given.Domain == t.Domain) && (given.ID == 0 || given.ID == t.ID) {
			m.Tenant = t
			return nil
		}
	}
	if b.by.Tenant != "" {
		return st.fail(notFound(catalog.NounTenant, "of the entity"))
	}
	return st.fail(catalog.Invalid{{Pointer: "#/tenant", Detail: "there is no such tenant"}})
}
