package ledger

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/revocation"
)

// Request asks for one revocation.
type Request struct {
	Target revocation.Target
	// Tenant owns the target's issuer.
	Tenant revocation.Tenant
	// Exp is when the last matching token ends by itself, in Unix seconds.
	Exp int64
	// Lifetime is how long a token of the issuer lives at the most, in seconds, for kinds that
	// have a time: the revocation ends at Exp or this long after its time, whichever is later,
	// but at most [revocation.MaxExpiryAhead] ahead. Only the database knows the time, which it
	// takes as it stores the revocation. 0 leaves it at Exp.
	Lifetime int64
	// ClientID and Signature are as in [revocation.Revocation].
	ClientID, Signature string
	// Reason is for people.
	Reason string
	// Action names the request in the audit, for example "revoke_token".
	Action string
	Actor  Actor
	// Traceparent continues the caller's trace. May be empty.
	Traceparent string
	// NotAfter is the latest iat, in Unix seconds, of tokens that are dead, for kinds
	// that have a time. 0 takes the database's clock, which is right unless the
	// revocation was made elsewhere.
	NotAfter int64
}

// MaxStampAhead is how many seconds ahead of the clock of whoever makes a revocation tokens
// may be stamped that it is about, beside the clock skew: other clocks are ahead, and our own
// issuers stamp a token past the revocations that there are.
const MaxStampAhead = 180

// Actor is who asked, for the audit.
type Actor struct {
	// Name is "client:<consumer key>", "account:<user name>" or "system".
	Name string
	// RequestID is the id that the caller was answered with.
	RequestID string
	// Remote is the caller's address.
	Remote string
}

// Result says where a revocation stands in the log.
type Result struct {
	// ID is the revocation's, a UUID. Where Added is false only [Ledger.RevokeAll] sets it.
	ID string
	// Seq is a place in the log at which the revocation is there.
	Seq revocation.Seq
	// Added is false when an earlier revocation of the same target covers this one.
	Added bool
}

// Revoke returns nil once the revocation and its event are committed. If ctx ends
// first the revocation is committed all the same. Errors: [revocation.InvalidError],
// [ErrBusy], [ErrUnavailable], ctx's.
func (l *Ledger) Revoke(ctx context.Context, r Request) (Result, error) {
	if err := r.Target.Validate(); err != nil {
		return Result{}, err
	}
	it := &item{Request: r, done: make(chan outcome, 1)}
	if err := l.queue.add(it); err != nil {
		l.metrics.refused.Inc()
		return Result{}, err
	}
	select {
	case out := <-it.done:
		return out.result, out.err
	case <-ctx.Done():
		return Result{}, context.Cause(ctx)
	}
}

type item struct {
	Request
	done chan outcome // buffered: no caller can hold up the rest
}

type outcome struct {
	result Result
	err    error
}

// queue is bounded and hands out what has come since the last batch.
type queue[T any] struct {
	filled chan struct{}

	mu     sync.Mutex
	items  []T
	size   int
	closed bool
}

func newQueue[T any](size int) *queue[T] {
	return &queue[T]{filled: make(chan struct{}, 1), size: size}
}

func (q *queue[T]) add(it T) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return fmt.Errorf("%w: the service is stopping", ErrUnavailable)
	}
	if len(q.items) >= q.size {
		return ErrBusy
	}
	q.items = append(q.items, it)
	if len(q.items) == 1 {
		q.signal()
	}
	return nil
}

func (q *queue[T]) signal() {
	select {
	case q.filled <- struct{}{}:
	default:
	}
}

// take returns at most n items, none when there are none now.
func (q *queue[T]) take(n int) []T {
	q.mu.Lock()
	defer q.mu.Unlock()
	n = min(n, len(q.items))
	batch := slices.Clone(q.items[:n])
	rest := copy(q.items, q.items[n:])
	clear(q.items[rest:])
	q.items = q.items[:rest]
	if rest > 0 {
		q.signal()
	}
	return batch
}

func (q *queue[T]) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.items)
}

func (q *queue[T]) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
}

// serve calls commit with batches of at most n until ctx ends, then closes the queue and
// has it commit what is left.
func (q *queue[T]) serve(ctx context.Context, n int, commit func(context.Context, []T)) {
	for ctx.Err() == nil {
		select {
		case <-q.filled:
			if batch := q.take(n); len(batch) > 0 {
				commit(ctx, batch)
			}
		case <-ctx.Done():
		}
	}
	q.close()
	for batch := q.take(n); len(batch) > 0; batch = q.take(n) {
		commit(ctx, batch)
	}
}

// outlive bounds a commit. It outlives shutdown: cancelling it would leave its callers
// unsure.
func (l *Ledger) outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(context.WithoutCancel(ctx), l.cfg.CommitTimeout,
		fmt.Errorf("no commit within %s", l.cfg.CommitTimeout))
}

func (l *Ledger) commitBatch(ctx context.Context, batch []*item) {
	ctx, cancel := l.outlive(ctx)
	defer cancel()
	requests := make([]Request, len(batch))
	for i, it := range batch {
		requests[i] = it.Request
	}
	results, err := l.commit(ctx, requests)
	if isItemFault(err) && len(batch) > 1 {
		// One item that the database refuses must not fail the others.
		for _, it := range batch {
			r, err := l.commit(ctx, []Request{it.Request})
			it.answer(r, 0, l.asUnavailable(err))
		}
		return
	}
	err = l.asUnavailable(err)
	for i, it := range batch {
		it.answer(results, i, err)
	}
}

func (it *item) answer(results []Result, i int, err error) {
	if err != nil {
		it.done <- outcome{err: err}
		return
	}
	it.done <- outcome{result: results[i]}
}

func (l *Ledger) asUnavailable(err error) error {
	if err == nil {
		return nil
	}
	l.metrics.failed.Inc()
	l.log.Warn("commit failed", "error", err)
	if errors.Is(err, ErrRestored) {
		l.restored(err)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// isItemFault reports whether the database works and refused the data.
func isItemFault(err error) bool {
	pgErr, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return false
	}
	switch pgErr.Code[:2] {
	case "22", "23": // data exception, integrity constraint violation
		return true
	}
	return false
}

// commit stores requests in one transaction and returns their results in order.
func (l *Ledger) commit(ctx context.Context, requests []Request) ([]Result, error) {
	entries, of := merge(requests)
	start := time.Now()
	results, _, err := l.store(ctx, entries, of, false)
	if err != nil {
		return nil, err
	}
	l.metrics.batch.Observe(float64(len(requests)))
	l.metrics.commit.Observe(time.Since(start).Seconds())
	return results, nil
}

// store is [Ledger.transact], which it tries again where that can help. doubt says that
// it may be committed although it failed. Results are those of the requests whose entries
// of tells.
func (l *Ledger) store(ctx context.Context, entries []entry, of []int, identify bool) (results []Result, doubt bool, err error) {
	var done transacted
	err = l.retry(ctx, func() error {
		done, err = l.transact(ctx, entries, identify)
		doubt = doubt || done.doubt
		if _, warned := errors.AsType[warnedError](err); err == nil || warned {
			l.committed(done.head, done.written)
		}
		return err
	})
	if err != nil {
		return nil, doubt, err
	}
	results = make([]Result, len(of))
	for i, e := range of {
		results[i] = Result{ID: entries[e].id, Seq: cmp.Or(entries[e].seq, done.head.Seq), Added: entries[e].added}
	}
	return results, false, nil
}

// committed tells all who wait that w is in the log, which ends at head.
func (l *Ledger) committed(head revocation.Position, w written) {
	l.tail.add(w.events)
	l.saw(head)
	l.grown.send()
	if len(w.endings.kinds) > 0 {
		select {
		case l.ended <- struct{}{}:
		default:
		}
	}
}

// retry calls f, a transaction that may be sent twice, until it succeeds or trying again
// cannot help.
func (l *Ledger) retry(ctx context.Context, f func() error) error {
	for attempt := 0; ; attempt++ {
		err := f()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil && mayRetry(err, attempt) {
			l.metrics.retried.Inc()
			if pause(ctx, time.Duration(attempt)*(5+rand.N[time.Duration](15))*time.Millisecond) {
				continue
			}
		}
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, ErrRestored) {
			err = fmt.Errorf("%w (%w)", cause, err)
		}
		return err
	}
}

// mayRetry allows a few tries after a serialization failure or deadlock, and one
// after anything that smells of a lost connection. One too after a commit that the
// server warned of: the repeat locks the rows, so its own commit is after the first in
// what a standby gets, and waits for the standby again.
func mayRetry(err error, attempt int) bool {
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch pgErr.Code {
		case pgCodeSerialization, pgCodeDeadlock:
			return attempt < 5
		}
		return pgErr.Code[:2] == "57" && attempt < 1 // terminated by an operator, shutting down
	}
	return !errors.Is(err, ErrRestored) && attempt < 1
}

const (
	pgCodeSerialization = "40001"
	pgCodeDeadlock      = "40P01"
)

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// entry is what a batch asks about one target.
type entry struct {
	Request
	now   bool // tokens up to the database's clock are dead, and those up to NotAfter
	id    string
	seq   revocation.Seq
	added bool
}

// merge makes one entry of requests with an equal target, sorted by the unique
// key of the table, and tells for each request which entry is its own.
func merge(requests []Request) (entries []entry, of []int) {
	order := make([]int, len(requests))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		return compareTargets(requests[a].Target, requests[b].Target)
	})
	of = make([]int, len(requests))
	for _, i := range order {
		r := requests[i]
		if n := len(entries); n > 0 && entries[n-1].Target == r.Target {
			e := &entries[n-1]
			e.Exp, e.Lifetime, e.NotAfter = max(e.Exp, r.Exp), max(e.Lifetime, r.Lifetime), max(e.NotAfter, r.NotAfter)
			e.now = e.now || r.NotAfter == 0
		} else {
			entries = append(entries, entry{Request: r, now: r.NotAfter == 0})
		}
		of[i] = len(entries) - 1
	}
	return entries, of
}

func compareTargets(a, b revocation.Target) int {
	d := 0
	if a.Digest != b.Digest {
		d = -1
		if a.Digest {
			d = 1
		}
	}
	return cmp.Or(strings.Compare(a.Iss, b.Iss), strings.Compare(a.ID, b.ID), strings.Compare(string(a.Kind), string(b.Kind)), d)
}

// An ended or shorter repeat changes nothing and returns no row.
const upsertSQL = `
INSERT INTO rescind.revocations AS r
    (id, tenant_id, kind, iss, ident, digest, exp, not_after, client_id, signature, reason, revoked_at)
SELECT e.id, e.tenant_id, e.kind, e.iss, e.ident, e.digest,
    CASE WHEN e.timed AND e.lifetime > 0
        THEN greatest(e.exp, least(e.until + e.lifetime, floor(extract(epoch FROM clock_timestamp()))::bigint + $17)) ELSE e.exp END,
    e.until, e.client_id, e.signature, e.reason, clock_timestamp()
FROM (
    SELECT e.*, CASE WHEN NOT e.timed THEN 0 WHEN NOT e.now THEN e.not_after
        ELSE greatest(e.not_after, floor(extract(epoch FROM clock_timestamp()))::bigint + $14) END AS until
    FROM unnest($1::uuid[], $2::integer[], $3::text[], $4::text[], $5::text[], $6::boolean[], $7::bigint[], $8::boolean[],
        $9::text[], $10::text[], $11::text[], $12::integer[], $13::bigint[], $15::boolean[], $16::bigint[])
        AS e (id, tenant_id, kind, iss, ident, digest, exp, timed, client_id, signature, reason, n, not_after, now, lifetime)
    ORDER BY e.n OFFSET 0) AS e
ON CONFLICT (iss, ident, kind, digest) DO UPDATE
    SET exp = greatest(r.exp, excluded.exp), not_after = greatest(r.not_after, excluded.not_after)
    WHERE r.exp < excluded.exp OR r.not_after < excluded.not_after
RETURNING r.id::text, r.kind, r.iss, r.ident, r.digest, r.exp, r.not_after, r.client_id, r.signature, r.reason`

const headSQL = `SELECT epoch::text, seq FROM rescind.log_head`

// raiseSQL locks the head until the transaction ends.
const raiseSQL = `UPDATE rescind.log_head SET seq = seq + $1 RETURNING epoch::text, seq`

// appendSQL runs under the head's lock, in a statement of its own so that it sees
// what the last holder of the lock wrote. Its parts see the tenants' heads as
// they were before it. A head that was, in epoch $8, below $9 yields a NULL seq,
// which the table refuses: the log went back. Without LIMIT a server that has no statistics
// of log_head yet takes it for a thousand rows.
const appendSQL = `
WITH head AS (
    SELECT CASE WHEN epoch <> $8::uuid OR seq - cardinality($1::integer[]) >= $9 THEN seq - cardinality($1::integer[]) END AS base
    FROM rescind.log_head LIMIT 1
), e AS (
    SELECT head.base + n AS seq, n, tenant_id, tenant, entity_id, type, subject, traceparent, data
    FROM head, unnest($1::integer[], $2::text[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[])
        WITH ORDINALITY AS e (tenant_id, tenant, entity_id, type, subject, traceparent, data, n)
), heads AS (
    INSERT INTO rescind.tenant_heads AS h (tenant_id, seq)
    SELECT tenant_id, max(seq) FROM e GROUP BY tenant_id
    ON CONFLICT (tenant_id) DO UPDATE SET seq = excluded.seq
)
INSERT INTO rescind.log (seq, previous, tenant_id, tenant, entity_id, type, subject, at, traceparent, data)
SELECT e.seq, coalesce(lag(e.seq) OVER (PARTITION BY e.tenant_id ORDER BY e.n), h.seq, 0),
    e.tenant_id, e.tenant, e.entity_id, e.type, e.subject, now.at, e.traceparent, e.data
FROM e LEFT JOIN rescind.tenant_heads h USING (tenant_id), (SELECT clock_timestamp() AS at OFFSET 0) AS now
RETURNING seq, previous, at`

const notifySQL = `SELECT pg_notify('rescind_log', $1)`

// transacted is what became of a transaction.
type transacted struct {
	head    revocation.Position
	written written
	doubt   bool // it failed and may be committed, or a standby may lack it
}

// transact writes entries in one transaction of two round trips, so that the head
// stays locked for no longer than the server needs. It sets id, seq and added of
// entries that it stored, and with identify the id of the others too, for one round trip
// more. It returns the head and the new events, which are committed too when the
// error is a [warnedError].
func (l *Ledger) transact(ctx context.Context, entries []entry, identify bool) (done transacted, err error) {
	for i := range entries {
		entries[i].id, entries[i].seq, entries[i].added = "", 0, false
	}
	conn, err := l.pool.Acquire(ctx)
	if err != nil {
		return done, err
	}
	defer conn.Release() // ends the connection if the transaction is still open
	var b pgx.Batch
	b.Queue("BEGIN")
	stored, err := l.upsert(ctx, conn, &b, entries)
	if err != nil {
		return done, err
	}
	if identify && len(stored) < len(entries) {
		if err := identifyCovered(ctx, conn, entries); err != nil {
			return done, err
		}
	}
	if err := l.write(&done.written, entries, stored); err != nil {
		return done, err
	}
	if len(stored) == 0 {
		var b pgx.Batch
		b.Queue(headSQL).QueryRow(func(row pgx.Row) error { return row.Scan(&done.head.Epoch, &done.head.Seq) })
		err = sendCommit(ctx, conn, &b)
	} else {
		done.head, err = l.finish(ctx, conn, &done.written)
	}
	if err != nil {
		done.doubt = inDoubt(ctx, conn, err)
		return done, err
	}
	base := done.head.Seq - revocation.Seq(len(stored))
	for i, s := range stored {
		e := &entries[s.entry]
		e.id, e.seq, e.added = s.ID, base+revocation.Seq(i)+1, true
	}
	return done, nil
}

// inDoubt reports whether a transaction whose commit was sent on conn, and failed with
// err, may be committed all the same, or a fail-over may still undo it.
func inDoubt(ctx context.Context, conn *pgxpool.Conn, err error) bool {
	_, warned := errors.AsType[warnedError](err)
	return warned || conn.Conn().IsClosed() || ctx.Err() != nil
}

// coveredSQL runs in the transaction that tried to store the entries, and so has locked the
// rows that were there.
const coveredSQL = `
SELECT k.n, r.id::text
FROM unnest($1::text[], $2::text[], $3::text[], $4::boolean[]) WITH ORDINALITY AS k (iss, ident, kind, digest, n)
JOIN rescind.revocations r ON r.iss = k.iss COLLATE "C" AND r.ident = k.ident COLLATE "C" AND r.kind = k.kind COLLATE "C" AND r.digest = k.digest`

// identifyCovered sets the ids of entries, all of which have a row.
func identifyCovered(ctx context.Context, conn *pgxpool.Conn, entries []entry) error {
	targets := make([]revocation.Target, len(entries))
	for i, e := range entries {
		targets[i] = e.Target
	}
	rows, err := conn.Query(ctx, coveredSQL, targetColumns(targets)...)
	if err != nil {
		return err
	}
	var n int
	var id string
	_, err = pgx.ForEachRow(rows, []any{&n, &id}, func() error { entries[n-1].id = id; return nil })
	return err
}

// written is what a transaction adds to the log, to the audit and to the endings.
type written struct {
	events  []revocation.Event
	log     eventColumns
	audit   auditColumns
	endings endingColumns
}

func (w *written) add(e revocation.Event, entityID string) {
	w.events = append(w.events, e)
	w.log.add(e, entityID)
}

// write adds the events, audit entries and endings of the rows that were stored for entries.
func (l *Ledger) write(w *written, entries []entry, rows []stored) error {
	for _, s := range rows {
		e := &entries[s.entry]
		event, err := revocation.NewEvent(s.Revocation)
		if err != nil {
			return err
		}
		event.Source, event.Traceparent = l.cfg.Source, e.Traceparent
		w.add(event, s.ID)
		if e.Target.Kind.HasTime() {
			w.endings.add(e.Request)
		}
		w.audit.add(AuditEntry{
			Tenant: e.Tenant, Action: e.Action, EntityID: s.ID, Iss: e.Target.Iss, Subject: e.Target.ID, Reason: e.Reason, Actor: e.Actor,
		})
	}
	return nil
}

// finish writes w, of at least one event, and commits the transaction on conn, in one
// round trip. It returns the head after it, and completes w's events.
func (l *Ledger) finish(ctx context.Context, conn *pgxpool.Conn, w *written) (head revocation.Position, err error) {
	var b pgx.Batch
	n := revocation.Seq(len(w.events))
	seen := l.lastSeen()
	seenEpoch := cmp.Or(seen.Epoch, noEpoch)
	w.audit.queue(&b)
	w.endings.queue(&b)
	b.Queue(notifySQL, l.instance)
	b.Queue(raiseSQL, int64(n)).QueryRow(func(row pgx.Row) error { return row.Scan(&head.Epoch, &head.Seq) })
	w.log.queue(&b, seenEpoch, seen.Seq).Query(func(rows pgx.Rows) error {
		var seq, previous revocation.Seq
		var at time.Time
		_, err := pgx.ForEachRow(rows, []any{&seq, &previous, &at}, func() error {
			e := &w.events[seq-head.Seq+n-1]
			e.Position, e.Previous, e.Time = revocation.Position{Epoch: head.Epoch, Seq: seq}, previous, at
			return nil
		})
		return err
	})
	err = sendCommit(ctx, conn, &b)
	if behind := notBehind(revocation.Position{Epoch: head.Epoch, Seq: head.Seq - n}, seen); err != nil && behind != nil {
		err = behind
	}
	return head, err
}

// sendCommit sends b and a COMMIT after it. Its error is a [warnedError] if that
// committed, and the server warned meanwhile. What it warned of before, as of the version
// of a collation when the connection was made, says nothing about this commit.
func sendCommit(ctx context.Context, conn *pgxpool.Conn, b *pgx.Batch) error {
	data := conn.Conn().PgConn().CustomData()
	delete(data, lastWarning)
	b.Queue("COMMIT")
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		return err
	}
	if text, ok := data[lastWarning].(string); ok {
		return warnedError(text)
	}
	return nil
}

// warnedError is the server's warning at a commit: it is done there, and a standby that
// it should have waited for may lack it.
type warnedError string

func (e warnedError) Error() string {
	return "the server committed with a warning, a standby may lack it: " + string(e)
}

// noEpoch is the epoch of no log.
const noEpoch revocation.Epoch = zeroUUID

// stored is a row that an entry changed.
type stored struct {
	revocation.Revocation
	entry int
}

// upsert begins the transaction and writes the state rows.
func (l *Ledger) upsert(ctx context.Context, conn *pgxpool.Conn, b *pgx.Batch, entries []entry) (changed []stored, err error) {
	n := len(entries)
	ids, tenants, kinds, iss := make([]string, n), make([]int32, n), make([]string, n), make([]string, n)
	idents, digests, exps, timed := make([]string, n), make([]bool, n), make([]int64, n), make([]bool, n)
	clients, signatures, reasons, order := make([]string, n), make([]string, n), make([]string, n), make([]int32, n)
	notAfter, now, lifetimes := make([]int64, n), make([]bool, n), make([]int64, n)
	byTarget := make(map[revocation.Target]int, n)
	for i, e := range entries {
		id, err := uuid.NewV7()
		if err != nil {
			return nil, fmt.Errorf("make revocation id: %w", err)
		}
		ids[i], tenants[i], kinds[i], iss[i] = id.String(), e.Tenant.ID, string(e.Target.Kind), e.Target.Iss
		idents[i], digests[i], exps[i], timed[i] = e.Target.ID, e.Target.Digest, e.Exp, e.Target.Kind.HasTime()
		clients[i], signatures[i], reasons[i], order[i] = e.ClientID, e.Signature, e.Reason, int32(i)
		notAfter[i], now[i], lifetimes[i] = e.NotAfter, e.now, e.Lifetime
		byTarget[e.Target] = i
	}
	b.Queue(upsertSQL, ids, tenants, kinds, iss, idents, digests, exps, timed,
		clients, signatures, reasons, order, notAfter, int64(l.cfg.ClockSkew/time.Second), now,
		lifetimes, int64(revocation.MaxExpiryAhead/time.Second)).Query(func(rows pgx.Rows) error {
		changed, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (stored, error) {
			var s stored
			t := &s.Target
			err := row.Scan(&s.ID, &t.Kind, &t.Iss, &t.ID, &t.Digest, &s.Exp, &s.NotAfter, &s.ClientID, &s.Signature, &s.Reason)
			s.entry = byTarget[*t]
			s.Tenant = entries[s.entry].Tenant
			return s, err
		})
		return err
	})
	err = conn.SendBatch(ctx, b).Close()
	return changed, err
}

type eventColumns struct {
	tenantIDs                                               []int32
	tenants, entityIDs, types, subjects, traceparents, data []string
}

func (c *eventColumns) add(e revocation.Event, entityID string) {
	c.tenantIDs = append(c.tenantIDs, e.Tenant.ID)
	c.tenants = append(c.tenants, e.Tenant.Domain)
	c.entityIDs = append(c.entityIDs, entityID)
	c.types = append(c.types, e.Type)
	c.subjects = append(c.subjects, e.Subject)
	c.traceparents = append(c.traceparents, e.Traceparent)
	c.data = append(c.data, string(e.Data))
}

func (c *eventColumns) queue(b *pgx.Batch, epoch revocation.Epoch, seen revocation.Seq) *pgx.QueuedQuery {
	return b.Queue(appendSQL, c.tenantIDs, c.tenants, c.entityIDs, c.types, c.subjects, c.traceparents, c.data, string(epoch), int64(seen))
}
