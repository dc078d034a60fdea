package catalog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Get reads an entity by UUID, or by id in decimal. Errors: [ErrNotFound].
func (s *Store) Get(ctx context.Context, by Caller, n catalog.Noun, id string) (catalog.Entity, error) {
	k := kindOf(n)
	if k == nil {
		return nil, notFound(n, id)
	}
	clause, arg := ` WHERE e.uuid = $1::uuid`, any(id)
	if !isUUID(id) {
		number, err := strconv.ParseInt(id, 10, 32)
		if err != nil {
			return nil, notFound(n, "of this id")
		}
		clause, arg = ` WHERE e.id = $1`, int32(number)
	}
	rows, err := s.pool.Query(ctx, k.sql().read+clause, arg)
	if err != nil {
		return nil, fmt.Errorf("read %s %s: %w", n, id, err)
	}
	e, err := pgx.CollectExactlyOneRow(rows, k.scan)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, notFound(n, id)
	case err != nil:
		return nil, fmt.Errorf("read %s %s: %w", n, id, err)
	case !by.sees(e) && !slices.Contains(by.AlsoReads, e.Base().Tenant.Domain):
		return nil, notFound(n, id)
	}
	return e, nil
}

// Filter narrows a list. Empty members do not.
type Filter struct {
	Tenant string // domain
	// Name is a tenant's domain. Key mappings and subscriptions have none.
	Name string
	// Kind is of policies.
	Kind string
	// Application and API are UUIDs: the application of key mappings, both of subscriptions.
	Application, API string
	// ConsumerKey is of key mappings.
	ConsumerKey string
}

// The parts of a list's condition, each with an index that it can use. The %d are places
// of arguments: the filter's value, and for ofMappings also after and limit.
const (
	ofTenant     = `e.tenant_id = (SELECT id FROM rescind.tenants WHERE domain = $%d)`
	isTenant     = `e.domain = $%d`
	ofMappings   = `e.id IN (SELECT m.id FROM rescind.key_managers o CROSS JOIN LATERAL (SELECT id FROM rescind.key_mappings WHERE key_manager_id = o.id AND id > $1 ORDER BY id LIMIT $2) m WHERE o.tenant_id = (SELECT id FROM rescind.tenants WHERE domain = $%d))`
	inTenant     = `t.domain = $%d`
	hasName      = `e.name = $%d`
	hasKind      = `e.kind = $%d`
	ofOne        = `e.application_id = (SELECT id FROM rescind.applications WHERE uuid = $%d::uuid)`
	toAPI        = `e.api_id = (SELECT id FROM rescind.apis WHERE uuid = $%d::uuid)`
	hasKey       = `e.consumer_key = $%d`
	afterSQL     = ` WHERE e.id > $1`
	orderedSQL   = ` ORDER BY e.id LIMIT $2`
	noSuchFilter = "the list of %s cannot be narrowed by it"
)

// List reads up to limit entities by ascending id, after the id after (0 begins). Those of
// tenants begin below 0. Without a tenant in the filter, it is of all, or of the caller's own: what
// else it reads, it names. It returns a [catalog.Invalid] for a filter that the noun does not have.
func (s *Store) List(ctx context.Context, by Caller, n catalog.Noun, f Filter, after int32, limit int) ([]catalog.Entity, error) {
	if n == catalog.NounTenant {
		set(&f.Tenant, f.Name)
	}
	if by.Tenant != "" {
		set(&f.Tenant, by.Tenant)
		if f.Tenant != by.Tenant && !slices.Contains(by.AlsoReads, f.Tenant) {
			return nil, nil
		}
	}
	if n == catalog.NounTenant && after == 0 {
		after = math.MinInt32
	}
	k := kindOf(n)
	if k == nil {
		return nil, fmt.Errorf("list %s: there is no such noun", n)
	}
	clause, args := afterSQL, []any{after, limit}
	for _, part := range f.parts(n) {
		switch {
		case part.value == "":
			continue
		case part.condition == "":
			return nil, catalog.Invalid{{Pointer: "#/" + part.name, Detail: fmt.Sprintf(noSuchFilter, n)}}
		case part.uuid && !isUUID(part.value):
			return nil, nil
		}
		args = append(args, part.value)
		clause += ` AND ` + fmt.Sprintf(part.condition, len(args))
	}
	rows, err := s.pool.Query(ctx, k.sql().read+clause+orderedSQL, args...)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", n, err)
	}
	entities, err := pgx.CollectRows(rows, k.scan)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", n, err)
	}
	return entities, nil
}

type filterPart struct {
	name, value, condition string
	uuid                   bool
}

func (f Filter) parts(n catalog.Noun) []filterPart {
	conditions := map[string]string{"tenant": ofTenant}
	switch n {
	case catalog.NounTenant:
		conditions = map[string]string{"tenant": isTenant, "name": isTenant}
	case catalog.NounPolicy:
		conditions["name"], conditions["kind"] = hasName, hasKind
	case catalog.NounKeyManager, catalog.NounScope, catalog.NounAPI, catalog.NounApplication:
		conditions["name"] = hasName
	case catalog.NounKeyMapping:
		conditions = map[string]string{"tenant": ofMappings, "application": ofOne, "consumer_key": hasKey}
		if f.Application != "" || f.ConsumerKey != "" {
			conditions["tenant"] = inTenant // what these find is few
		}
	case catalog.NounSubscription:
		conditions["application"], conditions["api"] = ofOne, toAPI
	}
	return []filterPart{
		{"tenant", f.Tenant, conditions["tenant"], false},
		{"name", f.Name, conditions["name"], false},
		{"kind", f.Kind, conditions["kind"], false},
		{"application", f.Application, conditions["application"], true},
		{"api", f.API, conditions["api"], true},
		{"consumer_key", f.ConsumerKey, conditions["consumer_key"], false},
	}
}

// ReadAll yields every entity as tx sees it, each after those that it refers to. After an
// error there are no more.
func ReadAll(ctx context.Context, tx pgx.Tx) iter.Seq2[catalog.Entity, error] {
	return func(yield func(catalog.Entity, error) bool) {
		for _, n := range catalog.Nouns {
			if !readAll(ctx, tx, n, yield) {
				return
			}
		}
	}
}

func readAll(ctx context.Context, tx pgx.Tx, n catalog.Noun, yield func(catalog.Entity, error) bool) bool {
	k := kindOf(n)
	fail := func(err error) bool {
		yield(nil, fmt.Errorf("read all of %s: %w", n, err))
		return false
	}
	rows, err := tx.Query(ctx, k.sql().read)
	if err != nil {
		return fail(err)
	}
	defer rows.Close()
	for rows.Next() {
		e, err := k.scan(rows)
		if err != nil {
			return fail(err)
		}
		if !yield(e, nil) {
			return false
		}
	}
	if err := rows.Err(); err != nil {
		return fail(err)
	}
	return true
}

const (
	announceLockSQL = `SELECT pg_advisory_xact_lock(hashtextextended('rescind.catalog announce', 0))`
	unannouncedSQL  = ` WHERE e.ts = 0 ORDER BY e.id LIMIT $1 FOR NO KEY UPDATE OF e`
	// %s is the table.
	announcedSQL = `UPDATE %s e SET ts = r.ts FROM unnest($1::integer[], $2::bigint[]) AS r (id, ts) WHERE e.id = r.id`
)

// announceChunk rows make at most two events each.
const announceChunk = maxEvents / 2

// anyUnannouncedSQL finds out whether there is something to announce.
func anyUnannouncedSQL() string {
	parts := make([]string, len(catalog.Nouns))
	for i, n := range catalog.Nouns {
		parts[i] = `EXISTS (SELECT FROM ` + kindOf(n).sql().table + ` WHERE ts = 0)`
	}
	return `SELECT ` + strings.Join(parts, ` OR `)
}

// Announce tells of the rows that have no event yet: those that a migration made, and
// those of processes of the version before, while there still are some. Any number of
// processes may do it at any time; when there is nothing to tell, it costs one small query.
func (s *Store) Announce(ctx context.Context) error {
	const doing = "announce what has no event: %w"
	var some bool
	if err := s.pool.QueryRow(ctx, anyUnannouncedSQL()).Scan(&some); err != nil {
		return fmt.Errorf(doing, err)
	}
	if !some {
		return nil
	}
	for _, n := range catalog.Nouns {
		for told := announceChunk; told == announceChunk; {
			_, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) (err error) {
				told, err = s.newBatch(Caller{}, tx).announce(ctx, kindOf(n))
				return err
			})
			if err != nil {
				return fmt.Errorf(doing, err)
			}
		}
	}
	return nil
}

// announce returns for how many rows it made events.
func (b *batch) announce(ctx context.Context, k kind) (int, error) {
	// One process at a time, so that none tells of what refers to a row before the row's event.
	if _, err := b.tx.Exec(ctx, announceLockSQL); err != nil {
		return 0, err
	}
	entities, err := b.fetch(ctx, k, unannouncedSQL, announceChunk)
	if err != nil || len(entities) == 0 {
		return 0, err
	}
	var ids []int32
	var times []int64
	for _, e := range entities {
		m := e.Base()
		m.Timestamp = b.timestamp(0)
		events, err := tell(&step{op: Create, want: e})
		if err != nil {
			return 0, fmt.Errorf("%s %s: %w", e.Noun(), m.UUID, err)
		}
		for _, event := range events {
			b.tx.Append(event, m.UUID)
		}
		ids, times = append(ids, m.ID), append(times, m.Timestamp)
	}
	_, err = b.tx.Exec(ctx, fmt.Sprintf(announcedSQL, k.sql().table), ids, times)
	return len(entities), err
}
