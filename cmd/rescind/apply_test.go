package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/internal/pgtest"
)

// commandWorld is a migrated database, and the flags that lead a command to it.
type commandWorld struct {
	t        *testing.T
	database string
	flags    []string
}

func newCommandWorld(t *testing.T) commandWorld {
	t.Helper()
	database := pgtest.Create(t).ServiceURL
	return commandWorld{t, database, []string{
		"--database-url-file", writeFile(t, "url", database),
		"--master-key-file", writeFile(t, "key", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="),
		"--issuer", "https://km.example.com", "--log-level", "error",
	}}
}

// run is a command with the database's flags after its words.
func (w commandWorld) run(words string, flags ...string) (code int, stdout, stderr string) {
	w.t.Helper()
	var out, errs bytes.Buffer
	args := append(append(strings.Fields(words), w.flags...), flags...)
	code = run(w.t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

// expect fails the test unless the command ends so.
func (w commandWorld) expect(code int, stdout, stderr, words string, flags ...string) string {
	w.t.Helper()
	gotCode, gotOut, gotErr := w.run(words, flags...)
	if gotCode != code || !strings.Contains(gotOut, stdout) || !strings.Contains(gotErr, stderr) || stderr == "" && gotErr != "" {
		w.t.Fatalf("%s %q: status %d, want %d\nstdout: %s\nstderr: %s", words, flags, gotCode, code, gotOut, gotErr)
	}
	return gotOut
}

const scopesFile = `scopes:
  - {name: read, display_name: "Read <it>"}
  - {name: write}
`

func TestApplyCommand(t *testing.T) {
	t.Parallel()
	w := newCommandWorld(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "scopes.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(scopesFile)
	w.expect(2, "", "say which files", "apply")
	w.expect(2, "", "takes no argument", "apply", "-f", dir, "more")
	w.expect(1, "", "no such file", "apply", "-f", filepath.Join(dir, "none"))

	const plan = `+ create scope read of tenant carbon.super  (%s:2:5)
+ create scope write of tenant carbon.super  (%s:3:5)
scope         2 to create
`
	want := strings.ReplaceAll(plan, "%s", path)
	for range 2 { // the first has changed nothing
		if diff := cmp.Diff(want, w.expect(0, "", "", "apply", "-f", path, "--dry-run")); diff != "" {
			t.Error(diff)
		}
	}
	w.expect(0, "scope         2 to create\nMade 2 changes.\n", "", "apply", "-f", dir)
	w.expect(0, "Nothing to change", "", "apply", "-f", dir)

	write("scopes: [{name: read, display_name: Read}]\n")
	w.expect(0, "    display_name: \"Read <it>\" -> \"Read\"\n", "", "apply", "-f", path, "--dry-run", "--prune")
	w.expect(1, "", "1 thing would be deleted, and there is nobody to ask: nothing was changed; give --yes", "apply", "-f", path, "--prune")
	var result resultJSON
	if err := json.Unmarshal([]byte(w.expect(0, "", "", "apply", "-f", path, "--prune", "--dry-run", "--json")), &result); err != nil {
		t.Fatal(err)
	}
	wantJSON := resultJSON{
		DryRun: true, Planned: 2, Counts: result.Counts,
		Changes: []changeJSON{
			{"update", "scope", "carbon.super", "read", path + ":1:10", []differenceJSON{{"display_name", json.RawMessage(`"Read <it>"`), json.RawMessage(`"Read"`)}}},
			{"delete", "scope", "carbon.super", "write", "", nil},
		},
	}
	if diff := cmp.Diff(wantJSON, result); diff != "" || result.Counts["scope"]["delete"] != 1 {
		t.Error(diff)
	}
	w.expect(0, `"made": 2`, "", "apply", "-f", path, "--prune", "--yes", "--json")
	w.expect(0, "Nothing to change", "", "apply", "-f", path, "--prune")

	write("scopes: [{nmae: x}]\napis: 1\n")
	w.expect(1, "", path+":1:11: \"nmae\" is not known here", "apply", "-f", path)
	w.expect(1, "", "rescind apply: 2 mistakes to correct in the files; nothing was changed", "apply", "-f", path)
	write("applications: [{name: A, owner: o, policy: Tin}]\n")
	w.expect(1, "", path+":1:16: application o/A needs the policy application/Tin", "apply", "-f", path)
}

func TestApplyKeepsSecrets(t *testing.T) {
	t.Parallel()
	w := newCommandWorld(t)
	path := writeFile(t, "a.yaml", `
key_managers: [{name: idp, iss: https://idp, max_token_lifetime: 60}]
applications: [{name: A, owner: o, keys: [{consumer_key: c, key_manager: idp, client: {}}]}]
`)
	w.expect(0, "A secret is made for 1 key", "", "apply", "-f", path, "--dry-run")
	w.expect(1, "", "give --secrets-out FILE", "apply", "-f", path)
	open := writeFile(t, "open", "")
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	w.expect(1, "", "others can read", "apply", "-f", path, "--secrets-out", open)
	out := filepath.Join(t.TempDir(), "secrets")
	w.expect(0, "Made 3 changes.", "", "apply", "-f", path, "--secrets-out", out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	var line struct {
		Tenant, Application, Secret string
		ConsumerKey                 string `json:"consumer_key"`
	}
	if err := json.Unmarshal(b, &line); err != nil || line.Application != "A" || line.ConsumerKey != "c" || len(line.Secret) < 52 {
		t.Errorf("%v: %s", err, b)
	}
	if info, err := os.Stat(out); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
}

func TestProgress(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		terminal bool
		want     string
	}{
		{false, "60 of 100 changes made, 10 a second\n"},
		{true, "\r\x1b[K10 of 100 changes made, 10 a second\r\x1b[K60 of 100 changes made, 10 a second\n"},
	} {
		synctest.Test(t, func(t *testing.T) {
			var out bytes.Buffer
			p := progress{w: &out, total: 100, terminal: tt.terminal, began: time.Now()}
			time.Sleep(time.Second)
			p.show(10)
			p.show(11) // too soon
			time.Sleep(5 * time.Second)
			p.show(60)
			p.end()
			if out.String() != tt.want {
				t.Errorf("got %q, want %q", &out, tt.want)
			}
		})
	}
}

func TestExportCommand(t *testing.T) {
	t.Parallel()
	from, to := newCommandWorld(t), newCommandWorld(t)
	path := writeFile(t, "a.yaml", scopesFile+"tenants: [{domain: b.example}]\n---\ntenant: b.example\nscopes: [{name: other}]\n")
	from.expect(0, "", "", "apply", "-f", path)
	all := from.expect(0, "# Written by rescind export.", "", "export")
	if one := from.expect(0, "name: other", "", "export", "--tenant", "b.example"); strings.Contains(one, "carbon.super") {
		t.Errorf("another tenant is there: %s", one)
	}
	from.expect(1, "", "there is no tenant c.example", "export", "--tenant", "c.example", "--tenant", "b.example")
	out := filepath.Join(t.TempDir(), "all.yaml")
	from.expect(0, "", "", "export", "-o", out)
	b, err := os.ReadFile(out)
	if err != nil || string(b) != all {
		t.Fatalf("%v\n%s", err, cmp.Diff(all, string(b)))
	}
	to.expect(0, "", "", "apply", "-f", out, "--prune")
	if diff := cmp.Diff(all, to.expect(0, "", "", "export")); diff != "" {
		t.Error(diff)
	}
	from.expect(1, "", "no such file", "export", "-o", filepath.Join(t.TempDir(), "none", "x"))
	if left, err := os.ReadDir(filepath.Dir(out)); err != nil || len(left) != 1 {
		t.Errorf("%v %v", left, err)
	}
}

func TestAccountCommand(t *testing.T) {
	t.Parallel()
	w := newCommandWorld(t)
	password := writeFile(t, "password", "correct horse\n")
	w.expect(2, "", "say what to do: put NAME, list or delete NAME", "account")
	w.expect(2, "", `"add" is none of`, "account add x")
	w.expect(2, "", "put takes the name of one account", "account put")
	w.expect(1, "", "a new account needs a role", "account put gw", "--password-file", password)
	w.expect(2, "", "it must be array or object", "account put gw", "--role", "gateway", "--revoked-jwt-form", "map")
	w.expect(1, "", "password", "account put gw", "--role", "gateway") // a new one needs it
	w.expect(1, "", "role", "account put gw", "--role", "king", "--password-file", password)
	w.expect(1, "", "read the password: open", "account put gw", "--role", "gateway", "--password-file", "/no/such")

	w.expect(0, "", "", "account put gw", "--role", "gateway", "--password-file", password)
	w.expect(0, "", "", "account put boss", "--role", "admin", "--password-file", password)
	w.expect(0, "", "", "account put gw", "--role", "gateway", "--extra-tenants", "b.example,*", "--revoked-jwt-form", "object")
	w.expect(0, "", "", "account put gw", "--password-file", password) // all else stays
	want := `NAME  ROLE     TENANT        EXTRA TENANTS  REVOKED JWT FORM
boss  admin    carbon.super                 array
gw    gateway  carbon.super  b.example,*    object
`
	if diff := cmp.Diff(want, w.expect(0, "", "", "account list")); diff != "" {
		t.Error(diff)
	}
	var listed []accountJSON
	if err := json.Unmarshal([]byte(w.expect(0, "", "", "account list", "--json")), &listed); err != nil || len(listed) != 2 ||
		listed[1].RevokedJWTForm != "object" {
		t.Errorf("%v: %+v", err, listed)
	}
	w.expect(0, "", "", "account delete gw")
	w.expect(1, "", "it does not exist", "account delete gw")

	rows, err := pgtest.Pool(t, w.database).Query(t.Context(), `SELECT action || ' ' || subject || ' ' || split_part(actor, ':', 1) || ' ' || tenant_id FROM rescind.audit ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	audited, err := pgx.CollectRows(rows, pgx.RowTo[string])
	wantAudited := []string{
		"put_account gw operator -1234", "put_account boss operator -1234", "put_account gw operator -1234", "put_account gw operator -1234",
		"delete_account gw operator -1234",
	}
	if diff := cmp.Diff(wantAudited, audited); err != nil || diff != "" {
		t.Errorf("%v, audit (-want +got):\n%s", err, diff)
	}
}
