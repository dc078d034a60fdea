package ledger

import (
	"context"
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/internal/pgtest"
)

const warnSQL = `DO $$ BEGIN RAISE WARNING 'something else'; END $$`

// session is a small pool whose connections have the service's settings and begin with a
// warning, as after an upgrade of the system's collations.
func session(t *testing.T) *pgxpool.Pool {
	t.Helper()
	cfg := pgtest.New(t).Config()
	Session(cfg)
	cfg.MaxConns = 2
	cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, warnSQL)
		return err
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// standbyWarnings has commits that insert into table warned of, until it is called.
func standbyWarnings(t *testing.T, pool *pgxpool.Pool, table string) (stop func()) {
	t.Helper()
	owner, err := pgx.Connect(t.Context(), ownerOf(t, pool))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { owner.Close(context.Background()) })
	_, err = owner.Exec(t.Context(), `
		CREATE FUNCTION rescind.warn() RETURNS trigger LANGUAGE plpgsql
			AS $$ BEGIN RAISE WARNING 'canceling wait for synchronous replication due to user request'; RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER warn AFTER INSERT ON `+table+` DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION rescind.warn()`)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if _, err := owner.Exec(t.Context(), `DROP TRIGGER warn ON `+table); err != nil {
			t.Fatal(err)
		}
	}
}

// The second try finds the tokens there, and its commit would wait for no standby.
func TestWarnedTokensAreNotRemembered(t *testing.T) {
	t.Parallel()
	pool := session(t)
	l := open(t, pool, Config{})
	owner, err := pgx.Connect(t.Context(), ownerOf(t, pool))
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close(t.Context())
	_, err = owner.Exec(t.Context(), `INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime)
		VALUES (-1234, 'Resident Key Manager', true, $1, 3600)`, iss)
	if err != nil {
		t.Fatal(err)
	}
	stop := standbyWarnings(t, pool, "rescind.issued_tokens")
	rememberOne := func(token Issued) error {
		it := &issuedItem{Issued: token, done: make(chan error, 1)}
		l.rememberBatch(t.Context(), []*issuedItem{it})
		return <-it.done
	}
	if err := rememberOne(issued("c1", "c1")); !errors.Is(err, ErrUnavailable) {
		t.Errorf("warned: %v, want ErrUnavailable", err)
	}
	stop()
	if err := rememberOne(issued("c1", "c1")); err != nil {
		t.Errorf("after it: %v", err)
	}
}

func TestWarningBeforeACommitIsNone(t *testing.T) {
	t.Parallel()
	l := open(t, session(t), Config{})
	run(t, l)
	for _, name := range []string{"a", "b"} {
		_, err := l.Change(t.Context(), func(ctx context.Context, tx *Tx) error {
			if _, err := tx.Exec(ctx, warnSQL); err != nil {
				return err
			}
			return insertScope(ctx, tx, name)
		})
		if err != nil {
			t.Errorf("Change: %v", err)
		}
		if got := mustRevoke(t, l, request(name)); !got.Added {
			t.Errorf("Revoke: %+v, which took two tries", got)
		}
	}
	_, err := l.Change(t.Context(), func(ctx context.Context, tx *Tx) error {
		_, err := tx.Exec(ctx, warnSQL)
		tx.Audit(AuditEntry{Action: "look"})
		return err
	})
	if err != nil {
		t.Errorf("Change without events: %v", err)
	}
}

// The server says of a commit that its standby may lack it: that is no success, but it
// is in the log.
func TestWarnedCommitIsNoSuccess(t *testing.T) {
	t.Parallel()
	pool := session(t)
	l := open(t, pool, Config{})
	stop := standbyWarnings(t, pool, "rescind.log")
	grown := l.Grown()
	at, err := l.Change(t.Context(), func(ctx context.Context, tx *Tx) error { return insertScope(ctx, tx, "a") })
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err, ErrDoubt) {
		t.Errorf("Change: %v, want ErrUnavailable and ErrDoubt", err)
	}
	if l.lastSeen() != at || at.Seq != 1 || len(l.tail.after(0, 10)) != 1 {
		t.Errorf("the process knows of %s and of %d events, want the one at %s", l.lastSeen(), len(l.tail.after(0, 10)), at)
	}
	select {
	case <-grown:
	default:
		t.Error("nobody is told that the log has grown")
	}

	// A repeat adds no event, and is no success until its own commit is.
	results, err := l.commit(t.Context(), []Request{request("b")})
	if err != nil || results[0] != (Result{Seq: 2}) || len(l.tail.after(0, 10)) != 2 {
		t.Errorf("commit: %+v, %v, and %d events are known; want success at 2 by the second try", results, err, len(l.tail.after(0, 10)))
	}
	if _, err := l.transact(t.Context(), []entry{{Request: request("c")}}, false); !errors.As(err, new(warnedError)) {
		t.Errorf("transact: %v, want the server's warning", err)
	}

	stop()
	if _, err := l.Change(t.Context(), func(ctx context.Context, tx *Tx) error { return insertScope(ctx, tx, "d") }); err != nil {
		t.Errorf("Change on the connection that was warned: %v", err)
	}
	if n := pool.Stat().NewConnsCount(); n > 2 {
		t.Errorf("%d connections were opened: a warning must not cost one", n)
	}
}
