package devstack

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

const oldestPostgres = 14

// programs are the servers' programs on this machine.
type programs struct {
	postgres map[int]string // by major version, the folder of postgres and initdb
	rabbitMQ string         // the script that starts a broker as whoever calls it
	epmd     string
}

// find looks for programs in PATH, then in the usual folders.
func find(ctx context.Context) programs {
	found := programs{postgres: map[int]string{}}
	path := filepath.SplitList(searchPath())
	for _, dir := range candidates(path, "/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin",
		"/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin") {
		if major := postgresMajor(ctx, dir); major > 0 && found.postgres[major] == "" {
			found.postgres[major] = dir
		}
	}
	for _, dir := range candidates(path, "/usr/lib/rabbitmq/bin", "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin",
		"/opt/homebrew/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin") {
		// Packages put another script of this name, or a link to one, into PATH: it runs the system's own broker, and
		// only as root. The real one has its helper beside it.
		script, err := filepath.EvalSymlinks(filepath.Join(dir, "rabbitmq-server"))
		if err == nil && filepath.Base(script) == "rabbitmq-server" && isProgram(script) && isFile(filepath.Join(filepath.Dir(script), "rabbitmq-env")) {
			found.rabbitMQ = script
			break
		}
	}
	for _, dir := range candidates(path, "/usr/lib/erlang/bin", "/usr/local/lib/erlang/bin") {
		if program := filepath.Join(dir, "epmd"); isProgram(program) {
			found.epmd = program
			break
		}
	}
	return found
}

// candidates are the folders of path, then those that match the patterns.
func candidates(path []string, patterns ...string) []string {
	dirs := slices.Clone(path)
	for _, p := range patterns {
		matches, _ := filepath.Glob(p) // the patterns are ours, and not malformed
		dirs = append(dirs, matches...)
	}
	return dirs
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func isProgram(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

var postgresVersion = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

// postgresMajor is the version of the server in dir, or 0 if there is none.
func postgresMajor(ctx context.Context, dir string) int {
	if !isProgram(filepath.Join(dir, "postgres")) || !isProgram(filepath.Join(dir, "initdb")) {
		return 0
	}
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version").Output()
	if err != nil {
		return 0
	}
	m := postgresVersion.FindSubmatch(out)
	if m == nil {
		return 0
	}
	major, _ := strconv.Atoi(string(m[1]))
	return major
}

// postgresFor is the folder of the server that can use data: the newest, unless data exists.
func (p programs) postgresFor(data string) (string, error) {
	major := slices.Max(slices.Collect(maps.Keys(p.postgres)))
	if b, err := os.ReadFile(filepath.Join(data, "PG_VERSION")); err == nil {
		if major, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
			return "", fmt.Errorf("read %s: %w", filepath.Join(data, "PG_VERSION"), err)
		}
	}
	dir, ok := p.postgres[major]
	if !ok {
		return "", fmt.Errorf("the data in %s is of PostgreSQL %d, which is not on this machine: install it, or begin with an empty data folder", data, major)
	}
	return dir, nil
}

// missing lists the wanted servers that cannot be started.
func (p programs) missing(wanted []Server) []Server {
	var missing []Server
	for _, s := range wanted {
		switch s {
		case Postgres:
			if len(p.postgres) == 0 || slices.Max(slices.Collect(maps.Keys(p.postgres))) < oldestPostgres {
				missing = append(missing, s)
			}
		case RabbitMQ:
			if p.rabbitMQ == "" || p.epmd == "" {
				missing = append(missing, s)
			}
		}
	}
	return missing
}
