package ledger

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// scopeEvent is an event as the catalog has them.
func scopeEvent(name string) revocation.Event {
	return revocation.Event{
		Type: "scope.created", Subject: name, Tenant: revocation.SuperTenant,
		Data: fmt.Appendf(nil, `{"name":%q,"tenant":{"id":-1234,"domain":"carbon.super"}}`, name),
	}
}

func insertScope(ctx context.Context, tx *Tx, name string) error {
	id := uuid.NewString()
	if _, err := tx.Exec(ctx, `INSERT INTO rescind.scopes (uuid, tenant_id, name) VALUES ($1, -1234, $2)`, id, name); err != nil {
		return err
	}
	tx.Append(scopeEvent(name), id)
	tx.Audit(AuditEntry{Tenant: revocation.SuperTenant, Action: "create_scope", EntityID: id, Subject: name, Actor: Actor{Name: "account:admin"}})
	return nil
}

func count(t *testing.T, l *Ledger, sql string) (n int) {
	t.Helper()
	if err := l.pool.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestChangeCommitsStateEventsAndRevocations(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	run(t, l)
	client := request("")
	client.Target = revocation.Target{Kind: revocation.KindClient, Iss: client.Target.Iss, ID: "app-1"}
	at, err := l.Change(t.Context(), func(ctx context.Context, tx *Tx) error {
		tx.Revoke(client, client)
		if err := insertScope(ctx, tx, "read"); err != nil {
			return err
		}
		return insertScope(ctx, tx, "write")
	})
	if err != nil {
		t.Fatal(err)
	}
	events := allEvents(t, l)
	if diff := cmp.Diff([]string{"read", "write", "app-1"}, subjects(events)); diff != "" {
		t.Fatalf("subjects (-want +got):\n%s", diff)
	}
	last := events[2]
	if last.Position != at || last.Previous != 2 || last.Source == "" || last.Time.IsZero() {
		t.Errorf("last event is %+v, want position %s after 2", last, at)
	}
	fromDatabase := open2(t, l.pool)
	stored, err := fromDatabase.After(t.Context(), 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(stored, events); diff != "" {
		t.Errorf("the log and what this process remembers differ:\n%s", diff)
	}
	if n := count(t, l, `SELECT count(*) FROM rescind.audit`); n != 3 {
		t.Errorf("%d audit records, want 3", n)
	}
}

func TestChangeThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	mine := errors.New("mine")
	tooMany := func(_ context.Context, tx *Tx) error {
		for i := range MaxChanges + 1 {
			tx.Append(scopeEvent(fmt.Sprint(i)), uuid.NewString())
		}
		return nil
	}
	for name, f := range map[string]func(context.Context, *Tx) error{
		"own error": func(ctx context.Context, tx *Tx) error { return errors.Join(insertScope(ctx, tx, "a"), mine) },
		"too many":  tooMany,
		"bad target": func(ctx context.Context, tx *Tx) error {
			tx.Revoke(Request{Target: revocation.Target{Kind: revocation.KindClient, Iss: "i"}})
			return insertScope(ctx, tx, "a")
		},
		"broken statement": func(ctx context.Context, tx *Tx) error {
			_, err := tx.Exec(ctx, `SELECT 1/0`)
			return err
		},
	} {
		_, err := l.Change(t.Context(), f)
		if err == nil || errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: error is %v", name, err)
		}
		if name == "own error" && !errors.Is(err, mine) {
			t.Errorf("%s: error is %v, want it as it was", name, err)
		}
	}
	if n := count(t, l, `SELECT (SELECT count(*) FROM rescind.scopes) + (SELECT count(*) FROM rescind.log) + (SELECT count(*) FROM rescind.audit)`); n != 0 {
		t.Errorf("%d rows are left", n)
	}
	if got := l.pool.Stat().NewConnsCount(); got > 2 {
		t.Errorf("%d connections were opened: a refused change must not cost one", got)
	}
}

// A change and revocations of the same targets in the other order deadlock at worst for
// a moment, and seqs have no gap.
func TestChangesBesideRevocations(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	a, b := open(t, pool, Config{}), open(t, pool, Config{})
	run(t, a)
	run(t, b)
	var wg sync.WaitGroup
	for w, l := range []*Ledger{a, b} {
		wg.Go(func() {
			for i := range 40 {
				_, err := l.Change(t.Context(), func(ctx context.Context, tx *Tx) error {
					tx.Revoke(request(fmt.Sprintf("shared-%d", 39-i)))
					return insertScope(ctx, tx, fmt.Sprintf("s-%d-%d", w, i))
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			for i := range 40 {
				mustRevoke(t, l, request(fmt.Sprintf("shared-%d", i)))
			}
		})
	}
	wg.Wait()
	events := allEvents(t, a)
	if len(events) != 120 {
		t.Errorf("%d events, want 120", len(events))
	}
	for i, e := range events {
		if e.Seq != revocation.Seq(i+1) || e.Previous != revocation.Seq(i) {
			t.Fatalf("event %d has seq %d and previous %d", i+1, e.Seq, e.Previous)
		}
	}
}

// Changes that wait for a row, however many, leave connections to revocations.
func TestChangesLeaveRoomForRevocations(t *testing.T) {
	t.Parallel()
	cfg := pgtest.New(t).Config()
	cfg.MaxConns = 8
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	l := open(t, pool, Config{CommitTimeout: time.Second})
	stop := run(t, l)
	defer stop() // before the pool is closed
	if _, err := pool.Exec(t.Context(), `INSERT INTO rescind.scopes (uuid, tenant_id, name) VALUES ($1, -1234, 'a')`, uuid.NewString()); err != nil {
		t.Fatal(err)
	}
	var owner, watcher *pgx.Conn
	for _, c := range []**pgx.Conn{&owner, &watcher} {
		if *c, err = pgx.Connect(t.Context(), ownerOf(t, pool)); err != nil {
			t.Fatal(err)
		}
		defer (*c).Close(context.Background())
	}
	if _, err := owner.Exec(t.Context(), `BEGIN; SELECT FROM rescind.scopes WHERE name = 'a' FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, err := l.Change(t.Context(), func(ctx context.Context, tx *Tx) error {
				_, err := tx.Exec(ctx, `UPDATE rescind.scopes SET ts = ts + 1 WHERE name = 'a'`)
				return err
			})
			if err != nil && !errors.Is(err, ErrBusy) {
				t.Errorf("Change: %v", err)
			}
		})
	}
	await(t, func() bool {
		var n int
		err := watcher.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()`).Scan(&n)
		return err == nil && n >= 2
	})
	mustRevoke(t, l, request("meanwhile"))
	if _, err := owner.Exec(t.Context(), `COMMIT`); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
}

func TestTurnstile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		turns := newTurnstile("changes", 2, maxChangesWaiting, changeWait)
		for range 2 {
			if err := turns.enter(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("gone")
		ended := make(chan error, maxChangesWaiting)
		for range maxChangesWaiting {
			go func() { ended <- turns.enter(ctx) }()
		}
		synctest.Wait()
		if err := turns.enter(ctx); !errors.Is(err, ErrBusy) {
			t.Errorf("one too many: %v, want ErrBusy", err)
		}
		turns.leave()
		if err := <-ended; err != nil {
			t.Errorf("the next: %v", err)
		}
		cancel(gone)
		for range maxChangesWaiting - 1 {
			if err := <-ended; !errors.Is(err, gone) {
				t.Errorf("one that went away: %v", err)
			}
		}
		began := time.Now()
		if err := turns.enter(t.Context()); !errors.Is(err, ErrBusy) || time.Since(began) != changeWait {
			t.Errorf("after %s: %v, want ErrBusy after %s", time.Since(began), err, changeWait)
		}
		turns.leave()
		turns.leave()
		if err := turns.enter(t.Context()); err != nil {
			t.Errorf("with nobody in: %v", err)
		}
	})
}

func TestViewIsOnePosition(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	run(t, l)
	for i := range 3 {
		mustRevoke(t, l, request(fmt.Sprintf("before-%d", i)))
	}
	var seen []string
	err := l.View(t.Context(), func(ctx context.Context, tx pgx.Tx, at revocation.Position, revoked func(func(directory.Stored)) error) error {
		mustRevoke(t, l, request("meanwhile"))
		if at.Seq != 3 || at.Epoch == "" {
			t.Errorf("the view is at %s", at)
		}
		return revoked(func(s directory.Stored) { seen = append(seen, s.Target.ID) })
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(seen)
	if diff := cmp.Diff([]string{"before-0", "before-1", "before-2"}, seen); diff != "" {
		t.Errorf("revocations (-want +got):\n%s", diff)
	}
	err = l.View(t.Context(), func(ctx context.Context, tx pgx.Tx, _ revocation.Position, _ func(func(directory.Stored)) error) error {
		_, err := tx.Exec(ctx, `UPDATE rescind.scopes SET ts = 1`)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("a write in a view: %v", err)
	}
}
