package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/migrations"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func connectTo(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func execSQL(t *testing.T, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

func TestMigrate(t *testing.T) {
	t.Parallel()
	url := pgtest.CreateEmpty(t)
	d := Database{MigrateURL: Secret(url)}
	conn := connectTo(t, url)
	state := func(want SchemaState) {
		t.Helper()
		got, err := ReadSchema(t.Context(), d)
		if err != nil || got != want {
			t.Fatalf("schema is %+v, error %v, want %+v", got, err, want)
		}
	}
	check := func(want string) string {
		t.Helper()
		var log bytes.Buffer
		err := checkSchema(t.Context(), conn, slog.New(slog.NewTextHandler(&log, nil)))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Fatalf("checkSchema: %v, want %q", err, want)
		}
		return log.String()
	}

	state(SchemaState{})
	check(fmt.Sprintf("the schema is at version 0, and this program needs %d. Run: rescind migrate up", migrations.Latest))

	// Several at once: one works, all succeed.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := Migrate(t.Context(), d, discard()); err != nil {
				t.Errorf("migrate at once with others: %v", err)
			}
		})
	}
	wg.Wait()
	state(SchemaState{Version: migrations.Latest})
	check("")

	// The service sees the version too.
	execSQL(t, conn, `SET ROLE rescind_service`)
	check("")
	execSQL(t, conn, `RESET ROLE`)

	if err := MigrateDown(t.Context(), d, migrations.Latest+1, discard()); err == nil || !strings.Contains(err.Error(), "it must be 1 to") {
		t.Errorf("too far down: %v", err)
	}
	if err := MigrateDown(t.Context(), d, migrations.Latest, discard()); err != nil {
		t.Fatalf("down: %v", err)
	}
	state(SchemaState{})
	if err := Migrate(t.Context(), d, discard()); err != nil {
		t.Fatalf("up again: %v", err)
	}
	state(SchemaState{Version: migrations.Latest})

	// A newer schema is served and left alone.
	execSQL(t, conn, `UPDATE public.`+migrations.Table+` SET version = version + 1`)
	if log := check(""); !strings.Contains(log, "the schema is newer than this program") {
		t.Errorf("no warning: %q", log)
	}
	if err := Migrate(t.Context(), d, discard()); err != nil {
		t.Errorf("migrate up on a newer schema: %v", err)
	}
	if err := MigrateDown(t.Context(), d, 1, discard()); err == nil || !strings.Contains(err.Error(), "use the newer program") {
		t.Errorf("migrate down on a newer schema: %v", err)
	}
	state(SchemaState{Version: migrations.Latest + 1})
}

func TestMigrateFails(t *testing.T) {
	t.Parallel()
	url := pgtest.CreateEmpty(t)
	d := Database{MigrateURL: Secret(url)}
	conn := connectTo(t, url)
	execSQL(t, conn, `CREATE SCHEMA rescind`) // in the way

	for range 2 { // it can be run again
		err := Migrate(t.Context(), d, discard())
		if err == nil || !strings.Contains(err.Error(), `schema "rescind" already exists`) || !strings.Contains(err.Error(), "run it again") {
			t.Fatalf("error %v, want Postgres' and that it can be run again", err)
		}
		if strings.Contains(err.Error(), "CREATE TABLE") {
			t.Errorf("the error repeats the migration: %v", err)
		}
	}
	if state, err := ReadSchema(t.Context(), d); err != nil || state != (SchemaState{}) {
		t.Errorf("schema is %+v, error %v, want none", state, err)
	}
	execSQL(t, conn, `DROP SCHEMA rescind`)
	if err := Migrate(t.Context(), d, discard()); err != nil {
		t.Fatal(err)
	}
}

// migratingSQL finds the process that waits for a lock with a migration.
const migratingSQL = `SELECT coalesce(max(pid), 0) FROM pg_stat_activity
	WHERE wait_event_type = 'Lock' AND query LIKE '%LOCK TABLE rescind.%' AND pid <> pg_backend_pid() AND datname = current_database()`

// Whoever reads for too long makes a migration fail, and nothing else.
func TestMigrateBesideReaders(t *testing.T) {
	t.Parallel()
	url := pgtest.CreateEmpty(t)
	d := Database{MigrateURL: Secret(url)}
	reader, other := connectTo(t, url), connectTo(t, url)
	if err := Migrate(t.Context(), d, discard()); err != nil {
		t.Fatal(err)
	}
	if err := MigrateDown(t.Context(), d, migrations.Latest-1, discard()); err != nil {
		t.Fatal(err)
	}
	begin := func() chan error {
		t.Helper()
		execSQL(t, reader, `BEGIN`)
		execSQL(t, reader, `SELECT FROM rescind.tenants`)
		failed := make(chan error, 1)
		go func() { failed <- Migrate(t.Context(), d, discard()) }()
		return failed
	}

	failed := begin()
	if err := <-failed; codeOf(err) != "55P03" || !strings.Contains(err.Error(), "nothing of version 2 was kept: run it again") {
		t.Errorf("error %v, want that of the lock's time-out", err)
	}
	if state, err := ReadSchema(t.Context(), d); err != nil || state != (SchemaState{Version: 1}) {
		t.Errorf("schema is %+v, error %v, want version 1", state, err)
	}
	execSQL(t, reader, `COMMIT`)

	// Nobody knows what became of it when the connection is lost.
	failed = begin()
	pid := 0
	for pid == 0 {
		if err := other.QueryRow(t.Context(), migratingSQL).Scan(&pid); err != nil {
			t.Fatal(err)
		}
	}
	execSQL(t, reader, `SELECT FROM rescind.tenant_heads`) // comes after tenants, so there is no deadlock
	execSQL(t, other, `SELECT pg_terminate_backend($1)`, pid)
	if err := <-failed; err == nil || !strings.Contains(err.Error(), "rescind migrate force V") {
		t.Errorf("error %v, want the command that mends it", err)
	}
	execSQL(t, reader, `COMMIT`)
	if err := Migrate(t.Context(), d, discard()); err == nil || !strings.HasPrefix(err.Error(), "the schema is dirty") {
		t.Errorf("again: %v", err)
	}
	if err := checkSchema(t.Context(), reader, discard()); err == nil || !strings.HasPrefix(err.Error(), "the schema is dirty") {
		t.Errorf("checkSchema: %v", err)
	}
	for _, version := range []int{-1, migrations.Latest + 1} {
		if err := ForceSchema(t.Context(), d, version, discard()); err == nil {
			t.Errorf("version %d was forced", version)
		}
	}
	if err := ForceSchema(t.Context(), d, 1, discard()); err != nil {
		t.Fatal(err)
	}
	if err := Migrate(t.Context(), d, discard()); err != nil {
		t.Fatal(err)
	}
}

// Nobody waits for ever for a process that holds the schema's lock.
func TestMigrateHeedsItsContext(t *testing.T) {
	t.Parallel()
	url := pgtest.CreateEmpty(t)
	conn := connectTo(t, url)
	execSQL(t, conn, lockSQL)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Migrate(ctx, Database{MigrateURL: Secret(url)}, discard()) }()
	for waiting := false; !waiting; {
		const sql = `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`
		if err := conn.QueryRow(t.Context(), sql).Scan(&waiting); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestMigrateWithoutDatabase(t *testing.T) {
	t.Parallel()
	err := Migrate(t.Context(), Database{MigrateURL: "postgres://rescind:hunter2@127.0.0.1:1/rescind"}, discard())
	if err == nil || !strings.Contains(err.Error(), "connect to Postgres") || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("error %v", err)
	}
	if err := Migrate(t.Context(), Database{MigrateURL: "postgres://rescind:hunter2@h:port/rescind"}, discard()); err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("error %v", err)
	}
}

func TestLatestIsTheNewestMigration(t *testing.T) {
	t.Parallel()
	up, down := 0, 0
	entries, err := migrations.FS.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".up.sql") {
			up++
		}
		if strings.HasSuffix(e.Name(), ".down.sql") {
			down++
		}
	}
	if up != migrations.Latest || down != up {
		t.Errorf("%d migrations up, %d down, and Latest is %d", up, down, migrations.Latest)
	}
}
