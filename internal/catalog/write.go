package catalog

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

// create makes the entities wanted in run.
func (b *batch) create(ctx context.Context, k kind, run []*step) error {
	for _, st := range run {
		if err := b.settle(st); err != nil {
			return err
		}
	}
	if err := k.refer(ctx, b, run); err != nil {
		return b.failed("look up references", err)
	}
	if err := b.identify(ctx, k, run); err != nil {
		return b.failed("make ids", err)
	}
	told := make([][]revocation.Event, len(run))
	for i, st := range run {
		var err error
		if told[i], err = tell(st); err != nil {
			return err
		}
	}
	if err := b.insert(ctx, k, run, told); err != nil {
		return b.failed("insert", err)
	}
	for i, st := range run {
		b.say(st, told[i])
	}
	if _, ok := k.(tenants); ok {
		return tenants{}.created(ctx, b, run)
	}
	return nil
}

// insert makes the rows of run. Other transactions may make rows at the same time, and ids
// that were given may be in the way of those that the sequence makes.
func (b *batch) insert(ctx context.Context, k kind, run []*step, told [][]revocation.Event) error {
	index := make(map[*step]int, len(run))
	for i, st := range run {
		index[st] = i
	}
	left := run
	for range 5 {
		rows, err := b.tx.Query(ctx, k.sql().insert, asRows(left))
		if err != nil {
			return err
		}
		made, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		if len(made) == len(left) {
			return nil
		}
		// A UUID that is there twice in run was inserted once.
		there := make(map[string]bool, len(made))
		for _, uuid := range made {
			there[uuid] = true
		}
		var missing []*step
		for _, st := range left {
			if uuid := st.want.Base().UUID; there[uuid] {
				delete(there, uuid)
			} else {
				missing = append(missing, st)
			}
		}
		left = missing
		if err := b.inTheWay(ctx, k, left[0]); err != nil {
			return err
		}
		var again []*step
		for _, st := range left {
			if !st.madeID {
				continue
			}
			st.want.Base().ID = 0
			if st.want.Noun() == catalog.NounTenant {
				st.want.Base().Tenant.ID = 0
			}
			again = append(again, st)
		}
		if err := b.identify(ctx, k, again); err != nil {
			return err
		}
		for _, st := range again {
			if told[index[st]], err = tell(st); err != nil {
				return err
			}
		}
	}
	return left[0].fail(taken("#", "something else has its place"))
}

// inTheWay returns who has the place of a row that could not be inserted, nil if
// it is only the id that was made for it.
func (b *batch) inTheWay(ctx context.Context, k kind, st *step) error {
	m := st.want.Base()
	const nobody = "00000000-0000-0000-0000-000000000000"
	places := k.unique(st.want)
	places = append(places, place{`e.uuid = $2::uuid`, []any{m.UUID}, taken("#/uuid", "something else has this UUID")})
	if !st.madeID {
		places = append(places, place{`e.id = $2`, []any{m.ID}, taken("#/id", "something else has this id")})
	}
	for _, p := range places {
		var found bool
		if err := b.tx.QueryRow(ctx, p.query(k), append([]any{nobody}, p.args...)...).Scan(&found); err != nil {
			return err
		}
		if found {
			return st.fail(p.conflict)
		}
	}
	return nil
}

// highIDs are left alone when the sequence is moved, or few would be left to make.
const highIDs = 2_000_000_000

const (
	givenIDsLockSQL = `SELECT pg_advisory_xact_lock(hashtextextended('rescind.catalog ' || $1, 0))`
	// %s is the sequence, the table.
	moveSequenceSQL = `SELECT setval('%[1]s', $1) FROM %[1]s WHERE last_value < $1`
	makeIDsSQL      = `
SELECT n.id
FROM (SELECT nextval('%[1]s')::integer AS id FROM generate_series(1, $1)) AS n
WHERE NOT EXISTS (SELECT FROM %[2]s e WHERE e.id = n.id)`
)

// moveSequence has it make ids above highest only.
func moveSequence(ctx context.Context, tx pgx.Tx, sequence string, highest int32) error {
	// Two who move it at once could move it back.
	if _, err := tx.Exec(ctx, givenIDsLockSQL, sequence); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, fmt.Sprintf(moveSequenceSQL, sequence), int64(highest))
	return err
}

// Reserve keeps ids up to highest from being made for entities of a noun, for a caller who
// will give them: what comes with a tenant could else take them. Errors are those of the ledger.
func (s *Store) Reserve(ctx context.Context, n catalog.Noun, highest int32) error {
	if highest <= 0 || highest >= highIDs {
		return nil
	}
	_, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
		return moveSequence(ctx, tx, kindOf(n).sql().sequence, highest)
	})
	if err != nil {
		return fmt.Errorf("reserve ids up to %d: %w", highest, err)
	}
	return nil
}

// identify gives the entities of run that lack them an ID, a UUID and their Timestamp.
func (b *batch) identify(ctx context.Context, k kind, run []*step) error {
	var highest int32
	var without []*step
	for _, st := range run {
		m := st.want.Base()
		if t, ok := st.want.(*catalog.Tenant); ok {
			t.ID = cmp.Or(t.ID, t.Meta.Tenant.ID)
		}
		set(&m.UUID, uuid.NewString())
		m.Timestamp = b.timestamp(0)
		if st.madeID = m.ID == 0 || st.madeID; m.ID == 0 {
			without = append(without, st)
		} else if m.ID < highIDs {
			highest = max(highest, m.ID)
		}
	}
	sequence, table := k.sql().sequence, k.sql().table
	if highest > 0 {
		if err := moveSequence(ctx, b.tx, sequence, highest); err != nil {
			return err
		}
	}
	for len(without) > 0 {
		rows, err := b.tx.Query(ctx, fmt.Sprintf(makeIDsSQL, sequence, table), len(without))
		if err != nil {
			return err
		}
		made, err := pgx.CollectRows(rows, pgx.RowTo[int32])
		if err != nil {
			return err
		}
		for i, id := range made {
			without[i].want.Base().ID = id
		}
		without = without[len(made):]
	}
	for _, st := range run {
		if t, ok := st.want.(*catalog.Tenant); ok {
			t.Meta.Tenant.ID = t.ID
		}
	}
	return nil
}

// timestamp is the time of a change of an entity whose last one was at previous.
func (b *batch) timestamp(previous int64) int64 { return max(b.tx.Now.UnixMilli(), previous+1) }

// load reads and locks the entities that run is about.
func (b *batch) load(ctx context.Context, k kind, run []*step, lock string) error {
	uuids := make([]string, len(run))
	for i, st := range run {
		uuids[i] = st.uuid
	}
	entities, err := b.fetch(ctx, k, ` WHERE e.uuid = ANY($1::uuid[]) ORDER BY e.id `+lock, uuids)
	if err != nil {
		return err
	}
	byUUID := make(map[string]catalog.Entity, len(entities))
	for _, e := range entities {
		byUUID[e.Base().UUID] = e
	}
	for _, st := range run {
		e, ok := byUUID[st.uuid]
		switch {
		case !ok || !b.by.sees(e):
			return st.fail(notFound(st.noun, st.uuid))
		case st.ifTimestamp != 0 && st.ifTimestamp != e.Base().Timestamp:
			return st.fail(fmt.Errorf("%s %s: %w", st.noun, st.uuid, ErrStale))
		}
		st.cur = e
	}
	return nil
}

func (c Caller) sees(e catalog.Entity) bool {
	return c.Tenant == "" || c.Tenant == e.Base().Tenant.Domain
}

func (b *batch) fetch(ctx context.Context, k kind, clause string, args ...any) ([]catalog.Entity, error) {
	rows, err := b.tx.Query(ctx, k.sql().read+clause, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, k.scan)
}

// update makes the entities of run as they are wanted.
func (b *batch) update(ctx context.Context, k kind, run []*step) error {
	if err := b.load(ctx, k, run, `FOR NO KEY UPDATE OF e`); err != nil {
		return b.failed("read", err)
	}
	for _, st := range run {
		cur, want := st.cur.Base(), st.want.Base()
		conflict := fixed(
			member{"id", want.ID == 0 || want.ID == cur.ID},
			member{"tenant", (want.Tenant.ID == 0 || want.Tenant.ID == cur.Tenant.ID) && (want.Tenant.Domain == "" || want.Tenant.Domain == cur.Tenant.Domain)},
		)
		*want = *cur
		if conflict = cmp.Or(conflict, k.keep(b, st.cur, st.want)); conflict != nil {
			return st.fail(conflict)
		}
	}
	if err := k.refer(ctx, b, run); err != nil {
		return b.failed("look up references", err)
	}
	return b.put(ctx, k, run)
}

// put writes the wants of run that differ from what is there.
func (b *batch) put(ctx context.Context, k kind, run []*step) error {
	var changed []*step
	for _, st := range run {
		was, err := encode(st.cur)
		if err != nil {
			return st.fail(err)
		}
		is, err := encode(st.want)
		if err != nil {
			return st.fail(err)
		}
		if !bytes.Equal(was, is) {
			changed = append(changed, st)
		}
	}
	if len(changed) == 0 {
		return nil
	}
	if err := k.updated(ctx, b, changed); err != nil {
		return b.failed("revoke", err)
	}
	told := make([][]revocation.Event, len(changed))
	for i, st := range changed {
		st.want.Base().Timestamp = b.timestamp(st.cur.Base().Timestamp)
		var err error
		if told[i], err = tell(st); err != nil {
			return err
		}
	}
	if err := b.write(ctx, k, changed); err != nil {
		return b.failed("update", err)
	}
	for i, st := range changed {
		b.say(st, told[i])
	}
	return nil
}

// write updates the rows of run together, but for those that move to another place: they
// go one after the other, since one may move to where another has just been.
func (b *batch) write(ctx context.Context, k kind, run []*step) error {
	var q pgx.Batch
	var together []*step
	flush := func() {
		if len(together) > 0 {
			q.Queue(k.sql().update, asRows(together))
		}
		together = nil
	}
	for _, st := range run {
		places := k.unique(st.want)
		if !reflect.DeepEqual(k.unique(st.cur), places) {
			flush()
			for _, p := range places {
				args := append([]any{st.want.Base().UUID}, p.args...)
				q.Queue(p.query(k), args...).QueryRow(func(row pgx.Row) error {
					var found bool
					if err := row.Scan(&found); err != nil || !found {
						return err
					}
					return st.fail(p.conflict)
				})
			}
			q.Queue(k.sql().update, asRows([]*step{st}))
			continue
		}
		together = append(together, st)
	}
	flush()
	return b.send(ctx, &q)
}

func (b *batch) send(ctx context.Context, q *pgx.Batch) error { return b.tx.SendBatch(ctx, q).Close() }

// delete deletes the entities of run.
func (b *batch) delete(ctx context.Context, k kind, run []*step) error {
	if err := b.load(ctx, k, run, `FOR UPDATE OF e`); err != nil {
		return b.failed("read", err)
	}
	if err := k.release(ctx, b, run); err != nil {
		return b.failed("look for what depends on it", err)
	}
	return b.remove(ctx, k, run)
}

// remove deletes rows that were read and locked.
func (b *batch) remove(ctx context.Context, k kind, run []*step) error {
	if len(run) == 0 {
		return nil
	}
	told := make([][]revocation.Event, len(run))
	for i, st := range run {
		m := st.cur.Base()
		m.Timestamp = b.timestamp(m.Timestamp)
		var err error
		if told[i], err = tell(st); err != nil {
			return err
		}
	}
	if _, err := b.tx.Exec(ctx, `DELETE FROM `+k.sql().table+` WHERE id = ANY($1)`, ids(run)); err != nil {
		return b.failed("delete", err)
	}
	for i, st := range run {
		b.say(st, told[i])
	}
	return nil
}

func ids(run []*step) []int32 {
	ids := make([]int32, len(run))
	for i, st := range run {
		ids[i] = st.cur.Base().ID
	}
	return ids
}

// refuseUsed returns a conflict for the first of run that sql, which yields an id and who
// refers to that row, finds in use. detail has a %s for who.
func (b *batch) refuseUsed(ctx context.Context, sql string, run []*step, detail string) error {
	rows, err := b.tx.Query(ctx, sql, ids(run))
	if err != nil {
		return err
	}
	used := make(map[int32]string)
	var id int32
	var who *string
	_, err = pgx.ForEachRow(rows, []any{&id, &who}, func() error {
		if who != nil {
			used[id] = *who
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, st := range run {
		if who, ok := used[st.cur.Base().ID]; ok {
			return st.fail(&Conflict{Slug: "in-use", Detail: fmt.Sprintf(detail, who)})
		}
	}
	return nil
}

// tell returns the events of st's change, and makes its row.
func tell(st *step) ([]revocation.Event, error) {
	verbs := map[Op]catalog.Verb{Create: catalog.Created, Update: catalog.Updated, Delete: catalog.Deleted}
	changes := []catalog.Change{{Verb: verbs[st.op], Entity: st.result()}}
	if _, ok := st.result().(*catalog.API); ok {
		cur, _ := st.cur.(*catalog.API)
		want, _ := st.want.(*catalog.API)
		changes = changesOf(cur, want)
	}
	events := make([]revocation.Event, len(changes))
	for i, c := range changes {
		var err error
		if events[i], err = catalog.NewEvent(c); err != nil {
			return nil, st.fail(err)
		}
	}
	st.row = events[0].Data
	return events, nil
}

// say adds the events and the audit record of st's change.
func (b *batch) say(st *step, events []revocation.Event) {
	e := st.result()
	m := e.Base()
	for _, event := range events {
		event.Traceparent = b.by.Traceparent
		b.tx.Append(event, m.UUID)
	}
	b.events += len(events)
	entry := ledger.AuditEntry{
		Tenant: m.Tenant, Action: string(st.op) + "_" + string(e.Noun()), EntityID: m.UUID,
		Subject: events[0].Subject, Reason: st.reason, Actor: b.by.Actor,
	}
	switch e := e.(type) {
	case *catalog.KeyManager:
		entry.Iss = e.Iss
	case *catalog.KeyMapping:
		entry.Iss = e.Iss
	}
	b.tx.Audit(entry)
}

// revoke ends the tokens of a consumer key so far.
func (b *batch) revoke(k key, tenant revocation.Tenant, reason string) {
	target := revocation.Target{Kind: revocation.KindClient, Iss: k.iss, ID: k.key}
	b.revoked[target] = true
	b.tx.Revoke(ledger.Request{
		Target: target, Tenant: tenant, Lifetime: int64(k.lifetime),
		Reason: reason, Action: "revoke_client", Actor: b.by.Actor, Traceparent: b.by.Traceparent,
	})
}

// failed says what was being done when the database refused. What a caller can act on
// stays as it is.
func (b *batch) failed(doing string, err error) error {
	if _, ok := errors.AsType[*Failed](err); ok {
		return err
	}
	if _, ok := errors.AsType[*Conflict](err); ok {
		return err
	}
	if _, ok := errors.AsType[catalog.Invalid](err); ok {
		return err
	}
	// Only an older version of the service, which does not lock the tenant, can have been quicker.
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch pgErr.Code {
		case "23505": // unique_violation
			return &Conflict{Slug: "exists", Detail: "something else was given its place meanwhile: look again"}
		case "23503": // foreign_key_violation
			return &Conflict{Slug: "in-use", Detail: "something refers to it since a moment ago: look again"}
		}
	}
	return fmt.Errorf("%s: %w", doing, err)
}
