package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/migrations"
)

const (
	usageMigrate = "rescind migrate up | down N | status | version | force V  [flags]"
	aboutMigrate = `Changes the database's schema, as the role that owns it, or shows its version.

  up       applies what is missing; several at once take turns
  down N   takes back the last N migrations, and deletes what only they hold
  status   shows each migration, and whether it is applied
  version  shows the schema's version alone
  force V  says that the schema is at version V and clean, and runs nothing:
           after a failed migration was mended by hand

Run up before the program is updated: old code runs on the new schema, new code
does not start on the old one.`
)

func runMigrate(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind migrate", usageMigrate, aboutMigrate, stdout, stderr)
	yes := inv.flags.Bool("yes", false, "Take migrations back without asking.")
	cfg, code, ok := inv.settings(app.ForMigrate, args)
	if !ok {
		return code
	}
	verb, n, err := migrateWords(inv.words)
	if err != nil {
		return inv.misused("%v", err)
	}
	log := obs.NewLogger(cfg.Obs, stderr)
	db := cfg.Database
	switch verb {
	case "up":
		err = app.Migrate(ctx, db, log)
	case "down":
		question := fmt.Sprintf("This takes back %d of the schema's migrations and deletes the data that only they hold.", n)
		if !*yes && !confirm(question, os.Stdin, stderr) {
			return inv.failed(fmt.Errorf("not confirmed, nothing was changed"))
		}
		err = app.MigrateDown(ctx, db, n, log)
	case "force":
		err = app.ForceSchema(ctx, db, n, log)
	case "status", "version":
		var state app.SchemaState
		if state, err = app.ReadSchema(ctx, db); err == nil {
			printSchema(stdout, verb, state)
		}
	}
	if err != nil {
		return inv.failed(err)
	}
	return exitOK
}

// migrateWords checks the words of a migrate command. N is the number that down
// and force take.
func migrateWords(words []string) (verb string, n int, err error) {
	if len(words) == 0 {
		return "", 0, fmt.Errorf("say what to do: up, down N, status, version or force V")
	}
	verb, words = words[0], words[1:]
	switch verb {
	case "up", "status", "version":
		if len(words) != 0 {
			return "", 0, fmt.Errorf("%s takes no argument, not %q", verb, words[0])
		}
	case "down", "force":
		low := map[string]int{"down": 1, "force": 0}[verb]
		if len(words) == 1 {
			n, err = strconv.Atoi(words[0])
		}
		if len(words) != 1 || err != nil || n < low {
			return "", 0, fmt.Errorf("%s takes one whole number, at least %d", verb, low)
		}
	default:
		return "", 0, fmt.Errorf("%q is none of up, down N, status, version and force V", verb)
	}
	return verb, n, nil
}

func printSchema(w io.Writer, verb string, state app.SchemaState) {
	dirty := ""
	if state.Dirty {
		dirty = " (dirty)"
	}
	if verb == "version" {
		fmt.Fprintf(w, "%d%s\n", state.Version, dirty)
		return
	}
	fmt.Fprintf(w, "schema version %d%s, this program needs %d\n", state.Version, dirty, migrations.Latest)
	for version := 1; version <= migrations.Latest; version++ {
		word := "missing"
		if version <= state.Version {
			word = "applied"
		}
		fmt.Fprintf(w, "%6d  %s\n", version, word)
	}
}
