package catalog

import (
	"bytes"
	"context"
	"fmt"
	"reflect"
	"slices"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
)

// kind is what the nouns differ in. Entities that its methods are given are of its noun.
type kind interface {
	sql() statements
	// scan reads one row of statements.read. Lists and maps without a member are nil.
	scan(row pgx.CollectableRow) (catalog.Entity, error)
	// complete gives e, a copy of what a caller wants, its defaults and the one form that
	// equal entities have. It shares no list or map with the caller's afterwards.
	complete(e catalog.Entity)
	// unique are the places that no other entity may have beside e.
	unique(e catalog.Entity) []place
	// keep takes over from cur what callers cannot set, and returns what else want
	// changes although it never changes.
	keep(b *batch, cur, want catalog.Entity) *Conflict
	// refer looks up what the entities wanted in run refer to, and completes their references.
	refer(ctx context.Context, b *batch, run []*step) error
	// updated revokes what the updates of run end. It is called before they are written.
	updated(ctx context.Context, b *batch, run []*step) error
	// release revokes what the deletion of run ends, and deletes what goes with it. It returns a
	// conflict for what is still in use.
	release(ctx context.Context, b *batch, run []*step) error
}

// statements are a noun's. The table is e in read, its tenant t. insert and update take the
// entities as a JSON array, in the form of their events; insert returns the UUIDs of those for
// which there was place. update is empty where nothing ever changes.
type statements struct {
	table, sequence, read, insert, update string
}

// place is something that only one entity can have: where finds who has it, with
// args from $2 on.
type place struct {
	where    string
	args     []any
	conflict *Conflict
}

func (p place) query(k kind) string {
	return `SELECT EXISTS (SELECT FROM ` + k.sql().table + ` e WHERE e.uuid <> $1::uuid AND ` + p.where + `)`
}

func taken(pointer, detail string) *Conflict {
	return &Conflict{Slug: "exists", Detail: detail, Pointer: pointer}
}

// plain is for kinds that refer to nothing, and are referred to by nothing.
type plain struct{}

func (plain) refer(context.Context, *batch, []*step) error   { return nil }
func (plain) updated(context.Context, *batch, []*step) error { return nil }

func kindOf(n catalog.Noun) kind {
	switch n {
	case catalog.NounTenant:
		return tenants{}
	case catalog.NounKeyManager:
		return keyManagers{}
	case catalog.NounPolicy:
		return policies{}
	case catalog.NounScope:
		return scopes{}
	case catalog.NounAPI:
		return apis{}
	case catalog.NounApplication:
		return applications{}
	case catalog.NounKeyMapping:
		return keyMappings{}
	case catalog.NounSubscription:
		return subscriptions{}
	}
	return nil
}

// copyOf is a copy of e that shares its lists and maps.
func copyOf(e catalog.Entity) catalog.Entity {
	c := reflect.New(reflect.TypeOf(e).Elem())
	c.Elem().Set(reflect.ValueOf(e).Elem())
	return c.Interface().(catalog.Entity)
}

func encode(e catalog.Entity) ([]byte, error) {
	event, err := catalog.NewEvent(catalog.Change{Verb: catalog.Updated, Entity: e})
	return event.Data, err
}

// asRows is what insert and update take.
func asRows(run []*step) []byte {
	rows := make([][]byte, len(run))
	for i, st := range run {
		rows[i] = st.row
	}
	return slices.Concat([]byte("["), bytes.Join(rows, []byte(",")), []byte("]"))
}

// fixed returns a conflict for the first member that is not the same.
func fixed(members ...member) *Conflict {
	for _, m := range members {
		if !m.same {
			return &Conflict{
				Slug: "immutable", Pointer: "#/" + m.name,
				Detail: fmt.Sprintf("%s never changes: leave it as it is, or delete this and create another", m.name),
			}
		}
	}
	return nil
}

type member struct {
	name string
	same bool
}

// names reports whether given, of which either member may be left out, is ref.
func names(given, ref catalog.Ref) bool {
	return (given.ID == 0 || given.ID == ref.ID) && (given.UUID == "" || given.UUID == ref.UUID)
}

// isUUID reports whether s is a UUID in its canonical form.
func isUUID(s string) bool {
	u, err := uuid.Parse(s)
	return err == nil && u.String() == s
}

// list is a copy of s, nil if it is empty.
func list[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return slices.Clone(s)
}

func set(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

// unlimited is the policy, of each kind, that every tenant has from the start.
const unlimited = "Unlimited"
