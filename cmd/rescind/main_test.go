package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/migrations"
)

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRun(t *testing.T) {
	t.Parallel()
	tests := []struct {
		args   string
		code   int
		stdout string // a part of it
		stderr string // a part of it
	}{
		{"", 2, "", "Usage: rescind COMMAND"},
		{"help", 0, "  migrate ", ""},
		{"--help", 0, "  serve ", ""},
		{"frobnicate", 2, "", `rescind has no command "frobnicate"`},

		{"serve --help", 0, "RESCIND_MAX_BATCH\n", ""},
		{"migrate --help", 0, "--yes\n", ""},
		{"migrate up -h", 0, "RESCIND_MIGRATE_DATABASE_URL ", ""},
		{"epoch --help", 0, "RESCIND_ETCD_ENDPOINTS\n", ""},
		{"tail --help", 0, "--heartbeats\n", ""},
		{"apply --help", 0, "--prune\n", ""},
		{"export --help", 0, "--tenant DOMAIN\n", ""},
		{"account --help", 0, "RESCIND_MASTER_KEY ", ""},
		{"revoke --help", 0, "3 not confirmed", ""},
		{"gateways --help", 0, "--label NAME=VALUE\n", ""},
		{"verify --help", 0, "RESCIND_ETCD_ENDPOINTS\n", ""},
		{"explain --help", 0, "RESCIND_TRUSTED_ISSUERS_FILE\n", ""},
		{"keys --help", 0, "--compromised KID\n", ""},
		{"version --help", 0, "Usage: rescind version", ""},

		{"version", 0, fmt.Sprintf("schema %d\n", migrations.Latest), ""},
		{"version 1", 2, "", "takes no argument"},
		{"serve --max-batch 0", 2, "", "--max-batch is \"0\": it must be a number of revocations, 1 to 5000"},
		{"serve --no-such", 2, "", "-no-such"},
		{"epoch --database-url-file /no/such", 2, "", "--database-url-file cannot be read"},
		{"tail --count -1", 2, "", "--count is -1"},
		{"tail extra", 2, "", "takes no argument"},
		{"tail --dev-json /no/dev.json", 1, "", "start rescind-dev in this folder"},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), strings.Fields(tt.args), &stdout, &stderr)
			if code != tt.code || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("status %d, want %d\nstdout: %s\nstderr: %s", code, tt.code, &stdout, &stderr)
			}
			if (code == 0) != (stderr.Len() == 0) {
				t.Errorf("status %d with stderr %q", code, &stderr)
			}
		})
	}
}

func TestMigrateWords(t *testing.T) {
	t.Parallel()
	type result struct {
		Verb string
		N    int
		OK   bool
	}
	for words, want := range map[string]result{
		"up":        {"up", 0, true},
		"status":    {"status", 0, true},
		"version":   {"version", 0, true},
		"down 2":    {"down", 2, true},
		"force 0":   {"force", 0, true},
		"":          {},
		"sideways":  {},
		"up 1":      {},
		"down":      {},
		"down 0":    {},
		"down all":  {},
		"down 1 2":  {},
		"force -1":  {},
		"force 1.0": {},
	} {
		verb, n, err := migrateWords(strings.Fields(words))
		if diff := cmp.Diff(want, result{verb, n, err == nil}); diff != "" {
			t.Errorf("%q: %v\n%s", words, err, diff)
		}
	}
}

// The commands of a schema's life, as an operator would give them.
func TestMigrateCommands(t *testing.T) {
	t.Parallel()
	url := writeFile(t, "url", pgtest.CreateEmpty(t))
	latest := migrations.Latest
	steps := []struct {
		args   string
		code   int
		stdout string // its beginning
		stderr string // a part of it
	}{
		{"migrate version", 0, "0\n", ""},
		{"migrate status", 0, fmt.Sprintf("schema version 0, this program needs %d\n     1  missing\n", latest), ""},
		{"migrate up", 0, "", fmt.Sprintf(`"to":%d`, latest)},
		{"migrate up --log-format text", 0, "", ""},
		{"migrate version", 0, fmt.Sprintf("%d\n", latest), ""},
		{"migrate status", 0, fmt.Sprintf("schema version %d, this program needs %d\n     1  applied\n", latest, latest), ""},
		{"migrate down 1", 1, "", "not confirmed, nothing was changed"},
		{fmt.Sprintf("migrate down %d --yes", latest+1), 1, "", "must be 1 to"},
		{fmt.Sprintf("migrate --yes down %d", latest), 0, "", `"to":0`},
		{fmt.Sprintf("migrate force %d", latest), 0, "", ""},
		{"migrate version", 0, fmt.Sprintf("%d\n", latest), ""},
		{fmt.Sprintf("migrate force %d", latest+1), 1, "", "must be 0 to"},
	}
	for _, s := range steps {
		var stdout, stderr bytes.Buffer
		args := append(strings.Fields(s.args), "--migrate-database-url-file", url)
		if code := run(t.Context(), reorder(args), &stdout, &stderr); code != s.code || !strings.HasPrefix(stdout.String(), s.stdout) || !strings.Contains(stderr.String(), s.stderr) {
			t.Fatalf("%s: status %d, want %d\nstdout: %s\nstderr: %s", s.args, code, s.code, &stdout, &stderr)
		}
	}
}

// reorder puts the database's flag, which is last, where flags are: after
// leading words, before trailing ones.
func reorder(args []string) []string {
	flag, args := args[len(args)-2:], args[:len(args)-2]
	for i, a := range args {
		if strings.HasPrefix(a, "-") {
			return append(append(append([]string(nil), args[:i]...), flag...), args[i:]...)
		}
	}
	return append(args, flag...)
}

func TestConfirm(t *testing.T) {
	t.Parallel()
	for answer, want := range map[string]bool{"yes\n": true, " yes \n": true, "yes": true, "y\n": false, "\n": false, "": false, "no\nyes\n": false} {
		if got := confirm("Sure?", strings.NewReader(answer), io.Discard); got != want {
			t.Errorf("%q: %t", answer, got)
		}
	}
}

// The binary that runs in production has etcd's client, and not its server.
func TestNoEtcdServer(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if !strings.Contains(string(out), "go.etcd.io/etcd/client/v3\n") {
		t.Fatalf("etcd's client is not among %d dependencies: the list is not what this test takes it for", len(deps))
	}
	for _, dep := range deps {
		if strings.HasPrefix(dep, "go.etcd.io/etcd/server") || strings.HasPrefix(dep, "go.etcd.io/raft") || strings.HasPrefix(dep, "go.etcd.io/bbolt") {
			t.Errorf("rescind links %s", dep)
		}
	}
}
