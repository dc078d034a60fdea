package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/golang-migrate/migrate/v4"
	"github.com/golang-migrate/migrate/v4/database"
	migratepgx "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/rescindhq/rescind/migrations"
)

const (
	// A migration that waits for a table's lock has every later query wait behind
	// it, /revoke too: rather give up and be run again.
	migrationLockTimeout = "5s"
	connectTimeout       = 10 * time.Second

	codeUndefinedTable        = "42P01"
	codeInsufficientPrivilege = "42501"
)

// SchemaState is what the database says of its schema.
type SchemaState struct {
	// Version is that of the last migration; 0 before the first.
	Version int
	// Dirty is set while a migration runs, and stays when it is not known what became of it.
	Dirty bool
}

// ReadSchema asks the database of d, as the owner of the schema.
func ReadSchema(ctx context.Context, d Database) (SchemaState, error) {
	cc, err := d.connConfig(d.MigrateURL)
	if err != nil {
		return SchemaState{}, err
	}
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return SchemaState{}, fmt.Errorf("connect to Postgres: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // what was asked has been answered
	return readSchema(ctx, conn)
}

type rowQuerier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

const readSchemaSQL = `SELECT version, dirty FROM public.` + migrations.Table

func readSchema(ctx context.Context, q rowQuerier) (SchemaState, error) {
	var s SchemaState
	err := q.QueryRow(ctx, readSchemaSQL).Scan(&s.Version, &s.Dirty)
	switch {
	case errors.Is(err, pgx.ErrNoRows), codeOf(err) == codeUndefinedTable:
		return SchemaState{}, nil
	case codeOf(err) == codeInsufficientPrivilege:
		return s, errors.New("the service's role may not read the schema's version: make it a member of rescind_service, and run: rescind migrate up")
	case err != nil:
		return s, fmt.Errorf("read the schema's version: %w", err)
	}
	s.Version = max(s.Version, 0) // golang-migrate's -1: dirty before the first
	return s, nil
}

// checkSchema refuses a schema that this process cannot work on. A newer one
// does: migrations go first, and keep what yesterday's code needs.
func checkSchema(ctx context.Context, q rowQuerier, log *slog.Logger) error {
	s, err := readSchema(ctx, q)
	switch {
	case err != nil:
		return err
	case s.Dirty:
		return dirtyError(s.Version)
	case s.Version < migrations.Latest:
		return fmt.Errorf("the schema is at version %d, and this program needs %d. Run: rescind migrate up (or start with --migrate)", s.Version, migrations.Latest)
	case s.Version > migrations.Latest:
		log.Warn("the schema is newer than this program", "schema", s.Version, "program", migrations.Latest)
	}
	return nil
}

// Migrate applies every migration that the database of d lacks. Of several
// processes that call it at once, one works and the others wait. A schema newer
// than this program stays as it is. When ctx ends, the migration at work is
// finished first. After one that Postgres refuses, the schema is as before it; only
// where the connection was lost meanwhile, it is left dirty.
func Migrate(ctx context.Context, d Database, log *slog.Logger) error {
	return withSchema(ctx, d, func(s *schema) error {
		before, err := s.state(ctx)
		if err != nil {
			return err
		}
		if !before.Dirty && before.Version > migrations.Latest {
			log.Warn("the schema is newer than this program", "schema", before.Version, "program", migrations.Latest)
			return nil
		}
		if err := s.m.Up(); err != nil && !errors.Is(err, migrate.ErrNoChange) {
			return s.takeBack(ctx, err)
		}
		if _, err := s.conn.Exec(ctx, grantSQL); err != nil {
			return fmt.Errorf("let the service read the schema's version: %w", err)
		}
		after, err := s.state(ctx)
		if err == nil && after != before {
			log.Info("schema migrated", "from", before.Version, "to", after.Version)
		}
		return err
	})
}

// grantSQL lets the service see the version. golang-migrate makes the table, so
// no migration can be sure that it is there.
const grantSQL = `GRANT SELECT ON public.` + migrations.Table + ` TO rescind_service`

// MigrateDown takes back the last steps migrations, and with them all data that
// only they have a place for.
func MigrateDown(ctx context.Context, d Database, steps int, log *slog.Logger) error {
	return withSchema(ctx, d, func(s *schema) error {
		before, err := s.state(ctx)
		switch {
		case err != nil:
			return err
		case before.Version > migrations.Latest:
			return fmt.Errorf("the schema is at version %d, and this program knows %d: use the newer program", before.Version, migrations.Latest)
		case steps < 1 || steps > before.Version:
			return fmt.Errorf("take back %d migrations: the schema is at version %d, so it must be 1 to %d", steps, before.Version, before.Version)
		}
		if err := s.m.Steps(-steps); err != nil {
			return err
		}
		after, err := s.state(ctx)
		if err == nil {
			log.Info("schema migrated", "from", before.Version, "to", after.Version)
		}
		return err
	})
}

// ForceSchema says that the schema is at version and clean, and runs nothing: for
// an operator who has mended by hand what a failed migration left.
func ForceSchema(ctx context.Context, d Database, version int, log *slog.Logger) error {
	if version < 0 || version > migrations.Latest {
		return fmt.Errorf("force version %d: it must be 0 to %d", version, migrations.Latest)
	}
	return withSchema(ctx, d, func(s *schema) error {
		log.Info("schema version forced", "to", version)
		if version == 0 {
			version = database.NilVersion
		}
		return s.m.Force(version)
	})
}

// schema is golang-migrate on one database, and a connection of our own that
// keeps every other process of ours from changing the schema.
type schema struct {
	m    *migrate.Migrate
	conn *pgx.Conn
}

func (s *schema) state(ctx context.Context) (SchemaState, error) { return readSchema(ctx, s.conn) }

// takeBack says that the schema is as it was before the migration up that failed with err,
// where that is certain: Postgres ran the file as one transaction, and said itself that it
// did not commit.
func (s *schema) takeBack(ctx context.Context, err error) error {
	pgErr, ok := errors.AsType[*pgconn.PgError](causeOf(err))
	if !ok || pgErr.SeverityUnlocalized != "ERROR" { // FATAL: the connection is gone
		return err
	}
	state, stateErr := s.state(ctx)
	if stateErr != nil || !state.Dirty {
		return errors.Join(err, stateErr)
	}
	before := state.Version - 1
	if before == 0 {
		before = database.NilVersion
	}
	if forceErr := s.m.Force(before); forceErr != nil {
		return errors.Join(err, forceErr)
	}
	return fmt.Errorf("%w; nothing of version %d was kept: run it again once the cause is gone", causeOf(err), state.Version)
}

// lockSQL is ours rather than golang-migrate's, which hears no context.
const lockSQL = `SELECT pg_advisory_lock(hashtext('public.` + migrations.Table + `'))`

// withSchema calls change, one process at a time, and says in our words what
// went wrong.
func withSchema(ctx context.Context, d Database, change func(*schema) error) error {
	cc, err := d.connConfig(d.MigrateURL)
	if err != nil {
		return err
	}
	conn, err := pgx.ConnectConfig(ctx, cc)
	if err != nil {
		return fmt.Errorf("connect to Postgres: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx)) //nolint:errcheck // gives back the lock
	if _, err := conn.Exec(ctx, lockSQL); err != nil {
		return fmt.Errorf("wait for the schema's lock: %w", err)
	}
	if err := migrateOn(ctx, cc, conn, change); err != nil {
		state, stateErr := readSchema(ctx, conn)
		if stateErr == nil && state.Dirty {
			return errors.Join(causeOf(err), dirtyError(state.Version))
		}
		return causeOf(err)
	}
	return ctx.Err() // golang-migrate stops between two migrations without an error
}

func migrateOn(ctx context.Context, cc *pgx.ConnConfig, conn *pgx.Conn, change func(*schema) error) error {
	src, err := iofs.New(migrations.FS, ".")
	if err != nil {
		return err
	}
	cc = cc.Copy()
	cc.RuntimeParams["lock_timeout"] = migrationLockTimeout
	db := stdlib.OpenDB(*cc)
	drv, err := migratepgx.WithInstance(db, &migratepgx.Config{MigrationsTable: migrations.Table, SchemaName: "public"})
	if err != nil {
		return errors.Join(err, db.Close())
	}
	m, err := migrate.NewWithInstance("iofs", src, "pgx5", drv)
	if err != nil {
		return errors.Join(err, drv.Close())
	}
	stop := context.AfterFunc(ctx, func() { m.GracefulStop <- true })
	defer stop()
	err = change(&schema{m: m, conn: conn})
	srcErr, drvErr := m.Close()
	return errors.Join(err, srcErr, drvErr)
}

// dirtyError cannot tell how much there is: a migration up is marked by the
// version it leads to, and so is one down.
func dirtyError(version int) error {
	return fmt.Errorf("the schema is dirty: a migration to version %d was begun and not finished. See what it left, "+
		"say which version the schema really has with: rescind migrate force V, then run: rescind migrate up", version)
}

// causeOf takes Postgres' error out of golang-migrate's, which has no Unwrap and
// repeats the whole file.
func causeOf(err error) error {
	dbErr, ok := errors.AsType[database.Error](err)
	if p, isPointer := errors.AsType[*database.Error](err); isPointer {
		dbErr, ok = *p, true
	}
	if _, dirty := errors.AsType[migrate.ErrDirty](err); dirty {
		return nil // dirtyError says it better
	}
	if ok && dbErr.OrigErr != nil {
		return fmt.Errorf("migrate the schema (line %d): %w", dbErr.Line, dbErr.OrigErr)
	}
	return err
}

func codeOf(err error) string {
	if pgErr, ok := errors.AsType[*pgconn.PgError](causeOf(err)); ok {
		return pgErr.Code
	}
	return ""
}

// connConfig is url, of this database, with a time-out and our TLS files.
func (d Database) connConfig(url Secret) (*pgx.ConnConfig, error) {
	cc, err := pgx.ParseConfig(string(url))
	if err != nil {
		return nil, errors.New("parse the database URL: it must be " + postgresURL) // pgx's words could show the password
	}
	if cc.ConnectTimeout == 0 {
		cc.ConnectTimeout = connectTimeout
	}
	return cc, d.secure(cc)
}
