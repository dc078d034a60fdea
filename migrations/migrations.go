// Package migrations holds the database schema as golang-migrate files. It hides
// nothing else: what a table means is known by the package that owns it.
package migrations

import "embed"

// FS has the files <version>_<name>.up.sql and .down.sql.
//
//go:embed *.sql
var FS embed.FS

// Latest is the version of the newest migration; the service runs on no older one.
const Latest = 4

// Table is where golang-migrate keeps the version, in schema public so that it
// outlives the schema it describes.
const Table = "rescind_schema_migrations"
