package ledger

import (
	"context"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/revocation"
)

// lockClass is the first half of the advisory locks' keys; the second is the sink's name.
const lockClass = 0x52736364

func lockKey(sink string) int32 { return int32(crc32.ChecksumIEEE([]byte(sink))) }

// A lead's session is used every pingEvery. The server ends it, and with it the
// lock, when it has heard nothing for idleTimeout, whatever has become of the
// process or its host. Together with tryEvery this bounds how long a sink is without
// a leader.
const (
	pingEvery   = time.Second
	pingTimeout = 3 * time.Second
	idleTimeout = "10s"
	tryEvery    = time.Second
)

// connect opens a connection of its own that must not pass a transaction pooler:
// locks and LISTEN belong to it.
func (l *Ledger) connect(ctx context.Context, name string) (*pgx.Conn, error) {
	cfg := l.pool.Config().ConnConfig.Copy()
	cfg.RuntimeParams["application_name"] = name
	keepAlive(cfg)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return pgx.ConnectConfig(ctx, cfg)
}

func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx) // it is of no use either way
}

// Lead is the right to feed one sink, held by one process at a time. It lasts as
// long as the database connection that it was got on.
type Lead struct {
	sink   string
	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{}

	mu   sync.Mutex
	conn *pgx.Conn
}

// Lead waits until this process may feed sink.
func (l *Ledger) Lead(ctx context.Context, sink string) (*Lead, error) {
	conn, err := l.connect(ctx, "rescind sink "+sink)
	if err != nil {
		return nil, fmt.Errorf("connect to lead sink %s: %w", sink, err)
	}
	// Cursors may be lost in a crash: what they cover is then delivered again.
	_, err = conn.Exec(ctx, `SELECT set_config('synchronous_commit', 'off', false), set_config('idle_session_timeout', $1, false)`, idleTimeout)
	// Asking again and again, because a statement that waits for the lock would keep
	// vacuum from all that dies meanwhile in the database.
	for held := false; err == nil && !held; {
		if err = conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1, $2)`, lockClass, lockKey(sink)).Scan(&held); err == nil && !held {
			if !pause(ctx, tryEvery+rand.N(tryEvery/2)) {
				err = ctx.Err()
			}
		}
	}
	if err != nil {
		closeConn(conn)
		return nil, fmt.Errorf("lock sink %s: %w", sink, err)
	}
	ld := &Lead{sink: sink, conn: conn, done: make(chan struct{})}
	ld.ctx, ld.cancel = context.WithCancelCause(ctx)
	go ld.watch()
	return ld, nil
}

// Context ends when the right is lost; then deliveries must stop.
func (ld *Lead) Context() context.Context { return ld.ctx }

// watch asks each second whether this very session still has the lock.
func (ld *Lead) watch() {
	defer close(ld.done)
	for pause(ld.ctx, pingEvery) {
		var held bool
		err := ld.query(func(ctx context.Context) error {
			return ld.conn.QueryRow(ctx, `
				SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid()
					AND classid = $1::bigint::oid AND objid = $2::bigint::oid)`,
				int64(lockClass), int64(uint32(lockKey(ld.sink)))).Scan(&held)
		})
		switch {
		case err != nil:
			ld.cancel(fmt.Errorf("lost the lock of sink %s: %w", ld.sink, err))
		case !held:
			ld.cancel(fmt.Errorf("lost the lock of sink %s: another session answers: "+
				"connect to Postgres without a transaction pooler", ld.sink))
		}
	}
}

func (ld *Lead) query(f func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ld.ctx, pingTimeout, fmt.Errorf("no answer within %s", pingTimeout))
	defer cancel()
	ld.mu.Lock()
	defer ld.mu.Unlock()
	if err := f(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return fmt.Errorf("%w (%w)", cause, err)
		}
		return err
	}
	return nil
}

// Cursor reads where the sink stands.
func (ld *Lead) Cursor() (revocation.Position, error) {
	var p revocation.Position
	err := ld.query(func(ctx context.Context) error {
		return ld.conn.QueryRow(ctx, `
			SELECT h.epoch::text, c.seq FROM rescind.log_head h, rescind.sink_cursors c WHERE c.sink = $1`, ld.sink).
			Scan(&p.Epoch, &p.Seq)
	})
	if err != nil {
		return p, fmt.Errorf("read cursor of sink %s: %w", ld.sink, err)
	}
	return p, nil
}

// Save moves the sink's cursor forward to seq, never back.
func (ld *Lead) Save(seq revocation.Seq) error {
	err := ld.query(func(ctx context.Context) error {
		_, err := ld.conn.Exec(ctx, `
			UPDATE rescind.sink_cursors SET seq = $2, updated_at = clock_timestamp() WHERE sink = $1 AND seq < $2`,
			ld.sink, int64(seq))
		return err
	})
	if err != nil {
		return fmt.Errorf("save cursor of sink %s at %d: %w", ld.sink, seq, err)
	}
	return nil
}

// Release gives the right to another process.
func (ld *Lead) Release() {
	ld.cancel(context.Canceled)
	<-ld.done
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	// A closed session gives up its lock too, only not before its process has ended.
	_, _ = ld.conn.Exec(ctx, `SELECT pg_advisory_unlock($1, $2)`, lockClass, lockKey(ld.sink))
	closeConn(ld.conn)
}
