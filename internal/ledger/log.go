package ledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/revocation"
)

// Head reads the position of the last committed event from the database.
func (l *Ledger) Head(ctx context.Context) (revocation.Position, error) {
	var p revocation.Position
	seen := l.lastSeen()
	if err := l.pool.QueryRow(ctx, headSQL).Scan(&p.Epoch, &p.Seq); err != nil {
		return p, fmt.Errorf("read log head: %w", err)
	}
	if err := notBehind(p, seen); err != nil {
		l.restored(err)
		return p, err
	}
	l.saw(p)
	return p, nil
}

const afterSQL = `
SELECT h.epoch::text, l.seq, l.previous, l.type, l.subject, l.at, l.tenant_id, l.tenant, l.traceparent, l.data
FROM rescind.log_head h, rescind.log l
WHERE l.seq > $1 ORDER BY l.seq LIMIT $2`

// After returns up to limit events that follow seq, in order and without a gap;
// none when the log ends at seq. It returns [ErrSeqGone] if retention has removed
// the next one.
func (l *Ledger) After(ctx context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error) {
	if events := l.tail.after(seq, limit); len(events) > 0 {
		return events, nil
	}
	rows, err := l.pool.Query(ctx, afterSQL, int64(seq), limit)
	if err != nil {
		return nil, fmt.Errorf("read log after %d: %w", seq, err)
	}
	events, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (revocation.Event, error) {
		e := revocation.Event{Source: l.cfg.Source}
		err := row.Scan(&e.Epoch, &e.Seq, &e.Previous, &e.Type, &e.Subject, &e.Time,
			&e.Tenant.ID, &e.Tenant.Domain, &e.Traceparent, (*[]byte)(&e.Data))
		return e, err
	})
	if err != nil {
		return nil, fmt.Errorf("read log after %d: %w", seq, err)
	}
	for i, e := range events {
		if want := seq + revocation.Seq(i) + 1; e.Seq != want {
			return nil, fmt.Errorf("read log after %d: %w: the oldest left is %d", seq, ErrSeqGone, e.Seq)
		}
	}
	return events, nil
}

// tail holds the newest events, as far as this process committed them without
// another one in between.
type tail struct {
	mu     sync.Mutex
	events []revocation.Event
	bytes  int // of the events' data
}

// tailSize events, or tailBytes of their data, are what a sink may fall behind before
// it reads from the database.
const (
	tailSize  = 4096
	tailBytes = 8 << 20
)

// add is called with the events of one commit, not always in the order of commits.
func (t *tail) add(events []revocation.Event) {
	if len(events) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(t.events); n > 0 {
		last, first := t.events[n-1].Position, events[0].Position
		switch {
		case first.Epoch == last.Epoch && first.Seq <= last.Seq:
			return
		case first.Epoch != last.Epoch || first.Seq > last.Seq+1:
			t.events, t.bytes = nil, 0
		}
	}
	t.events = append(t.events, events...)
	for _, e := range events {
		t.bytes += len(e.Data)
	}
	if len(t.events) <= 2*tailSize && t.bytes <= 2*tailBytes {
		return
	}
	from, kept := len(t.events), 0
	for from > 0 && len(t.events)-from < tailSize && kept+len(t.events[from-1].Data) <= tailBytes {
		from--
		kept += len(t.events[from].Data)
	}
	t.events, t.bytes = slices.Clone(t.events[from:]), kept // readers have parts of the old one
}

// forget drops what is of another epoch than the one that the log is in now.
func (t *tail) forget(now revocation.Epoch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.events) > 0 && t.events[0].Epoch != now {
		t.events, t.bytes = nil, 0
	}
}

func (t *tail) after(seq revocation.Seq, limit int) []revocation.Event {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.events) == 0 {
		return nil
	}
	from := int(seq + 1 - t.events[0].Seq)
	if from < 0 || from >= len(t.events) {
		return nil
	}
	return slices.Clip(t.events[from:min(from+limit, len(t.events))])
}

// Oldest returns the lowest seq that the log still has, the head's successor if none.
func (l *Ledger) Oldest(ctx context.Context) (revocation.Seq, error) {
	var seq revocation.Seq
	err := l.pool.QueryRow(ctx,
		`SELECT coalesce((SELECT min(seq) FROM rescind.log), (SELECT seq + 1 FROM rescind.log_head))`).Scan(&seq)
	if err != nil {
		return 0, fmt.Errorf("read oldest event: %w", err)
	}
	return seq, nil
}

// Grown returns a channel that is closed when the log has grown, as soon as this
// process knows. Take it before [Ledger.After], so that nothing is missed.
func (l *Ledger) Grown() <-chan struct{} { return l.grown.next() }

// listen passes on the notifications of other processes. Losing it loses no event:
// readers also look by themselves.
func (l *Ledger) listen(ctx context.Context) error {
	for ctx.Err() == nil {
		err := l.listenOnce(ctx)
		if ctx.Err() != nil {
			break
		}
		l.log.Warn("lost the notifications of other processes, polling until they are back", "error", err)
		pause(ctx, time.Second)
	}
	return nil
}

func (l *Ledger) listenOnce(ctx context.Context) error {
	conn, err := l.connect(ctx, "rescind listen")
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, `LISTEN rescind_log`); err != nil {
		return err
	}
	if err := l.keepIdentity(ctx); err != nil {
		return err
	}
	l.grown.send()
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		if n.Payload != l.instance { // own commits have been told
			l.grown.send()
		}
	}
}

// EnsureCursors gives each sink that has no cursor one at the log's head, so that
// every event from now on is for it.
func (l *Ledger) EnsureCursors(ctx context.Context, sinks []string) error {
	_, err := l.pool.Exec(ctx, `
		INSERT INTO rescind.sink_cursors (sink, seq) SELECT s, h.seq FROM unnest($1::text[]) AS s, rescind.log_head h
		ON CONFLICT (sink) DO NOTHING`, sinks)
	if err != nil {
		return fmt.Errorf("make cursors of sinks %q: %w", sinks, err)
	}
	return nil
}

// Cursors returns how far each sink has come, as of its last save.
func (l *Ledger) Cursors(ctx context.Context) (map[string]revocation.Seq, error) {
	rows, err := l.pool.Query(ctx, `SELECT sink, seq FROM rescind.sink_cursors`)
	if err != nil {
		return nil, fmt.Errorf("read cursors: %w", err)
	}
	cursors := make(map[string]revocation.Seq)
	var sink string
	var seq revocation.Seq
	_, err = pgx.ForEachRow(rows, []any{&sink, &seq}, func() error { cursors[sink] = seq; return nil })
	if err != nil {
		return nil, fmt.Errorf("read cursors: %w", err)
	}
	return cursors, nil
}

// trim removes what is over, in small steps so that nobody waits for them.
func (l *Ledger) trim(ctx context.Context) error {
	for pause(ctx, l.cfg.TrimEvery) {
		err := errors.Join(
			l.trimAll(ctx, l.metrics.trimmed.WithLabelValues("log"), `SELECT rescind.trim_log($1, $2)`, l.cfg.LogRetention, trimChunk),
			l.trimAll(ctx, l.metrics.trimmed.WithLabelValues("revocations"), `SELECT rescind.trim_revocations($1)`, trimChunk),
			l.trimAll(ctx, l.metrics.trimmed.WithLabelValues("issued_tokens"), `SELECT rescind.trim_issued_tokens($1)`, trimChunk),
			l.trimAll(ctx, l.metrics.trimmed.WithLabelValues("client_assertions"), `SELECT rescind.trim_client_assertions($1)`, trimChunk),
		)
		if err != nil && ctx.Err() == nil {
			l.log.Warn("clean-up failed, it is tried again", "error", err, "in", l.cfg.TrimEvery)
		}
	}
	return nil
}

// trimChunk rows take a few milliseconds to remove.
const trimChunk = 1000

const trimTimeout = 10 * time.Second

func (l *Ledger) trimAll(ctx context.Context, count interface{ Add(float64) }, sql string, args ...any) error {
	for {
		var n int
		tctx, cancel := context.WithTimeout(ctx, trimTimeout)
		err := l.pool.QueryRow(tctx, sql, args...).Scan(&n)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", sql, err)
		}
		count.Add(float64(n))
		if n < trimChunk || !pause(ctx, 20*time.Millisecond) {
			return nil
		}
	}
}
