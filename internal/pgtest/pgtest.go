// Package pgtest gives each test a migrated Postgres database of its own. It hides
// the template that they are cloned from, one per state of the migrations.
package pgtest

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/golang-migrate/migrate/v4"
	migratepgx "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/rescindhq/rescind/internal/stacktest"
	"github.com/rescindhq/rescind/migrations"
)

const (
	serviceRole     = "rescind_app"
	servicePassword = "app" // on loopback, for a server that lives as long as the tests
	timeout         = 90 * time.Second
)

// Database is a database of one test.
type Database struct {
	// OwnerURL logs in as the role that owns the schema, ServiceURL as a member of
	// rescind_service.
	OwnerURL, ServiceURL string
}

// New returns a pool of connections, as the service, to a migrated database of the
// test's own on the shared server. The database is dropped after the test, and kept
// if the test failed.
func New(t testing.TB) *pgxpool.Pool {
	t.Helper()
	return Pool(t, Create(t).ServiceURL)
}

// Create is [New] for those who connect by themselves.
func Create(t testing.TB) Database {
	t.Helper()
	return CreateOn(t, stacktest.Shared(t).DatabaseURL)
}

// CreateOn is [Create] on the server that adminURL, of a superuser, leads to.
func CreateOn(t testing.TB, adminURL string) Database {
	t.Helper()
	db, err := create(adminURL)
	if err != nil {
		t.Fatalf("make a database for the test: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the test's database is kept while the server runs: %s", path(db.OwnerURL))
			return
		}
		// A server that a test has stopped needs no clean-up.
		_ = onServer(adminURL, func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, `DROP DATABASE IF EXISTS `+path(db.OwnerURL)+` WITH (FORCE)`)
			return err
		})
	})
	return db
}

// CreateEmpty returns the owner's URL of a new database without any migration.
func CreateEmpty(t testing.TB) string {
	t.Helper()
	adminURL := stacktest.Shared(t).DatabaseURL
	name := "e_" + strings.ToLower(rand.Text()[:12])
	err := onServer(adminURL, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `CREATE DATABASE `+name)
		return err
	})
	if err != nil {
		t.Fatalf("make an empty database for the test: %v", err)
	}
	t.Cleanup(func() {
		_ = onServer(adminURL, func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, `DROP DATABASE `+name+` WITH (FORCE)`)
			return err
		})
	})
	return withDatabase(adminURL, name)
}

// Pool connects to url until the test ends, with an empty search_path: a name
// without its schema fails.
func Pool(t testing.TB, url string) *pgxpool.Pool {
	t.Helper()
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	cfg.MaxConns = 8
	cfg.ConnConfig.RuntimeParams["search_path"] = "pg_catalog"
	pool, err := pgxpool.NewWithConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func create(adminURL string) (db Database, err error) {
	template, err := templateName()
	if err != nil {
		return db, err
	}
	name := "t_" + strings.ToLower(rand.Text()[:12])
	err = onServer(adminURL, func(ctx context.Context, conn *pgx.Conn) error {
		if err := ensureTemplate(ctx, conn, adminURL, template); err != nil {
			return err
		}
		_, err := conn.Exec(ctx, `CREATE DATABASE `+name+` TEMPLATE `+template)
		return err
	})
	if err != nil {
		return db, err
	}
	db.OwnerURL = withDatabase(adminURL, name)
	u, err := url.Parse(db.OwnerURL)
	if err != nil {
		return db, err
	}
	u.User = url.UserPassword(serviceRole, servicePassword)
	db.ServiceURL = u.String()
	return db, nil
}

// ensureTemplate makes the template unless it is there, one process at a time.
func ensureTemplate(ctx context.Context, conn *pgx.Conn, adminURL, template string) error {
	const exists = `SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1 AND datistemplate)`
	var there bool
	if err := conn.QueryRow(ctx, exists, template).Scan(&there); err != nil || there {
		return err
	}
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(hashtext('pgtest'))`); err != nil {
		return err
	}
	defer conn.Exec(ctx, `SELECT pg_advisory_unlock(hashtext('pgtest'))`) //nolint:errcheck // the session ends next
	if err := conn.QueryRow(ctx, exists, template).Scan(&there); err != nil || there {
		return err
	}
	for _, sql := range []string{
		`DROP DATABASE IF EXISTS ` + template,
		`CREATE DATABASE ` + template,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	if err := up(withDatabase(adminURL, template)); err != nil {
		return fmt.Errorf("migrate the template: %w", err)
	}
	if err := grantVersion(ctx, withDatabase(adminURL, template)); err != nil {
		return err
	}
	_, err := conn.Exec(ctx, `CREATE ROLE `+serviceRole+` LOGIN PASSWORD '`+servicePassword+`' IN ROLE rescind_service`)
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); err != nil && (!ok || pgErr.Code != "42710") { // duplicate_object
		return err
	}
	_, err = conn.Exec(ctx, `ALTER DATABASE `+template+` IS_TEMPLATE true`)
	return err
}

// grantVersion does what the migrate command does after the migrations.
func grantVersion(ctx context.Context, url string) error {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, `GRANT SELECT ON public.`+migrations.Table+` TO rescind_service`)
	return err
}

func up(url string) error {
	src, err := iofs.New(migrations.FS, ".")
	if err != nil {
		return err
	}
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return err
	}
	db := stdlib.OpenDB(*cfg)
	drv, err := migratepgx.WithInstance(db, &migratepgx.Config{MigrationsTable: migrations.Table})
	if err != nil {
		return cmp.Or(err, db.Close())
	}
	m, err := migrate.NewWithInstance("iofs", src, "pgx5", drv)
	if err != nil {
		return err
	}
	upErr := m.Up()
	srcErr, dbErr := m.Close()
	return cmp.Or(upErr, srcErr, dbErr)
}

func templateName() (string, error) {
	h := sha256.New()
	names, err := fs.Glob(migrations.FS, "*.sql")
	if err != nil {
		return "", err
	}
	for _, name := range names {
		b, err := migrations.FS.ReadFile(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s %d\n%s", name, len(b), b)
	}
	return "tpl_" + hex.EncodeToString(h.Sum(nil)[:8]), nil
}

func onServer(adminURL string, f func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, adminURL)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	return f(ctx, conn)
}

func withDatabase(rawURL, name string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		panic(err) // ours
	}
	u.Path = "/" + name
	return u.String()
}

func path(rawURL string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		return ""
	}
	return strings.TrimPrefix(u.Path, "/")
}
