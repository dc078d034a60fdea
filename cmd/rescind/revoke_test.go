package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/revoke"
)

// newOfflineWorld leads commands to a database that is not there: they must see before that
// they are used wrongly.
func newOfflineWorld(t *testing.T) commandWorld {
	t.Helper()
	return commandWorld{t, "", []string{
		"--database-url-file", writeFile(t, "url", "postgres://nobody@127.0.0.1:1/none?connect_timeout=1"),
		"--master-key-file", writeFile(t, "key", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="),
		"--issuer", "https://km.example.com", "--log-level", "error",
	}}
}

// ensureIssuers makes the issuers of our own, as the service does when it starts.
func (w commandWorld) ensureIssuers() {
	w.t.Helper()
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	cfg, err := app.ParseConfig(app.Input{Use: app.ForApply, Flags: flags, Args: w.flags})
	if err != nil {
		w.t.Fatal(err)
	}
	tools, err := app.OpenCatalog(w.t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	defer tools.Close()
	if err := tools.Catalog.EnsureIssuers(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

func TestRevokeUsage(t *testing.T) {
	t.Parallel()
	w := newOfflineWorld(t)
	const jwt = "eyJhbGciOiJSUzI1NiJ9.eyJqdGkiOiJ4In0.c2ln"
	for _, tt := range []struct {
		code   int
		stderr string
		flags  []string
	}{
		{2, "say what is to end: --jti, --token, --client, --subject, --session, --tenant or --key", nil},
		{2, "takes no argument", []string{"--jti", "a", "more"}},
		{2, "--jti and --client are both given: exactly one of", []string{"--client", "c", "--jti", "a"}},
		{2, "--tenant has nothing in it", []string{"--tenant", ""}},
		{2, "--iss has nothing in it", []string{"--client", "c", "--iss", ""}},
		{2, "--token takes - for standard input, or a file that is there.", []string{"--token", jwt}},
		{1, "read the token: it is empty", []string{"--token", writeFile(t, "token", "\n")}},
		{1, "rescind revoke: ", []string{"--token", writeFile(t, "token", jwt)}}, // no database
		{1, "rescind revoke: ", []string{"--tenant", "carbon.super", "--yes"}},
	} {
		code, stdout, stderr := w.run("revoke", tt.flags...)
		if code != tt.code || stdout != "" || !strings.Contains(stderr, tt.stderr) || strings.Contains(stderr, jwt) {
			t.Errorf("%q: status %d, want %d\nstdout: %s\nstderr: %s", tt.flags, code, tt.code, stdout, stderr)
		}
	}
}

func TestFlagged(t *testing.T) {
	t.Parallel()
	err := flagged(fmt.Errorf("look at it: %w", catalog.Invalid{
		{Pointer: "#/0/iss", Detail: "must not be there"}, {Pointer: "#/0/client_id", Detail: "is empty"}, {Pointer: "#/0/sub", Detail: "is long"},
		{Pointer: "#/reason", Detail: "is longer"}, {Pointer: "#/0", Detail: "It is all wrong."},
	}))
	if diff := cmp.Diff("--iss: must not be there\n--client: is empty\n--subject: is long\n--reason: is longer\nIt is all wrong.", err.Error()); diff != "" {
		t.Error(diff)
	}
	if other := errors.New("another"); flagged(other) != other {
		t.Error("an error of another kind is changed")
	}
}

func TestConfirmEffect(t *testing.T) {
	t.Parallel()
	tenant := &revoke.Effect{Target: revocation.Target{Kind: revocation.KindTenant, ID: "b.example"}}
	key := &revoke.Effect{Target: revocation.Target{Kind: revocation.KindKey, Iss: "https://i", ID: "k1"}}
	for _, tt := range []struct {
		effect *revoke.Effect
		answer string
		want   bool
	}{
		{tenant, "b.example\n", true}, {tenant, "yes\n", false}, {tenant, "B.example\n", false}, {tenant, "", false},
		{key, "yes\n", true}, {key, "k1\n", false}, {key, "", false},
	} {
		if got := confirmEffect(tt.effect, strings.NewReader(tt.answer), io.Discard); got != tt.want {
			t.Errorf("%s, %q: %t", tt.effect.Target.Kind, tt.answer, got)
		}
	}
}

// at is 12:00 of a day.
var at = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

func clientEffect() *revoke.Effect {
	e := &revoke.Effect{
		Target: revocation.Target{Kind: revocation.KindClient, Iss: "https://km.example.com", ID: "c"}, Tenant: revocation.SuperTenant,
		Exp: at.Add(time.Hour).Unix(), NotAfter: at.Unix(), ApplicationCount: 1, ClientCount: 24,
		Applications: []*catalog.Application{{Meta: catalog.Meta{UUID: "01234567-89ab-cdef-0123-456789abcdef"}, Owner: "alice", Name: "Shop\x1b[2J"}},
		Living:       ledger.Living{Tokens: 3, Since: at.Add(-time.Hour)}, Revoked: true,
	}
	for i := range 23 {
		e.Clients = append(e.Clients, fmt.Sprintf("c%d", i))
	}
	return e
}

func TestPrintEffect(t *testing.T) {
	t.Parallel()
	forgetful := clientEffect()
	forgetful.Living, forgetful.Revoked = ledger.Living{}, false
	forgetful.Clients, forgetful.ClientCount = forgetful.Clients[:1], 1
	for _, tt := range []struct {
		name   string
		effect *revoke.Effect
		want   string
	}{
		{"many clients", clientEffect(), `Would end       all tokens of the client c
  issuer        https://km.example.com
  tenant        carbon.super
  issued up to  2026-07-01T12:00:00Z
  kept until    2026-07-01T13:00:00Z
  live tokens   3 known, of those issued since 2026-07-01T11:00:00Z
  applications  1
                alice/Shop�[2J
  clients       24
` + clientLines(20) + `                and 4 more
  but           it is revoked already: only a later time or end would change anything
`},
		{"nothing remembered", forgetful, `Would end       all tokens of the client c
  issuer        https://km.example.com
  tenant        carbon.super
  issued up to  2026-07-01T12:00:00Z
  kept until    2026-07-01T13:00:00Z
  live tokens   not remembered: set RESCIND_REMEMBER_TOKENS, for issuers of our own
  applications  1
                alice/Shop�[2J
  clients       1
                c0
`},
		{"key", &revoke.Effect{
			Target: revocation.Target{Kind: revocation.KindKey, Iss: "https://i", ID: "k"}, Tenant: revocation.Tenant{ID: 2, Domain: "b.example"},
			Exp: at.Unix(), ApplicationCount: 1, ClientCount: 0,
		}, `Would end       all tokens of the key k
  issuer        https://i
  tenant        b.example
  issued        at any time, also later
  kept until    2026-07-01T12:00:00Z
  applications  1
                and 1 more
  clients       0
`},
		{"ended", &revoke.Effect{Target: revocation.DigestTarget("https://i", "x"), Tenant: revocation.SuperTenant, Exp: at.Unix(), Expired: true},
			`Would end       the token with the SHA-256 2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881
  issuer        https://i
  tenant        carbon.super
  kept until    2026-07-01T12:00:00Z
  applications  0
  clients       0
  but           it has ended already: there is nothing to revoke
`},
	} {
		var b bytes.Buffer
		if err := printEffect(&b, tt.effect); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, b.String()); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}

func clientLines(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "                c%d\n", i)
	}
	return b.String()
}

func TestPrintOutcome(t *testing.T) {
	t.Parallel()
	e := clientEffect()
	e.Clients, e.ClientCount = nil, 0
	outcome := func(added, expired bool) *revoke.Outcome {
		o := &revoke.Outcome{Target: e.Target, Tenant: e.Tenant, NotAfter: e.NotAfter, Exp: e.Exp, Expired: expired}
		if !expired {
			o.Result = ledger.Result{ID: "01980000-0000-7000-8000-000000000000", Seq: 7, Added: added}
		}
		return o
	}
	const head = "KIND    IDENTIFIER  ISSUER                  TENANT        UNTIL                 ID                                    SEQ  NOTE\n"
	for _, tt := range []struct {
		outcome *revoke.Outcome
		want    string
	}{
		{outcome(true, false), head + "client  c           https://km.example.com  carbon.super  2026-07-01T13:00:00Z  01980000-0000-7000-8000-000000000000  7    \n"},
		{outcome(false, false), head + "client  c           https://km.example.com  carbon.super  2026-07-01T13:00:00Z  01980000-0000-7000-8000-000000000000  7    already revoked\n"},
		{outcome(false, true), "KIND    IDENTIFIER  ISSUER                  TENANT        UNTIL                 ID  SEQ  NOTE\n" +
			"client  c           https://km.example.com  carbon.super  2026-07-01T13:00:00Z  -   -    has ended already, nothing was revoked\n"},
	} {
		var b bytes.Buffer
		if err := printOutcome(&b, tt.outcome, e, nil, false); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, b.String()); diff != "" {
			t.Error(diff)
		}
	}
	var b bytes.Buffer
	if err := printOutcome(&b, outcome(true, false), e, nil, true); err != nil {
		t.Fatal(err)
	}
	want := `{
  "dry_run": false,
  "kind": "client",
  "iss": "https://km.example.com",
  "identifier": "c",
  "tenant": "carbon.super",
  "not_after": 1782907200,
  "exp": 1782910800,
  "id": "01980000-0000-7000-8000-000000000000",
  "seq": 7,
  "already_revoked": false,
  "expired": false,
  "effect": {
    "application_count": 1,
    "applications": [
      {
        "uuid": "01234567-89ab-cdef-0123-456789abcdef",
        "owner": "alice",
        "name": "Shop\u001b[2J"
      }
    ],
    "client_count": 0,
    "clients": [],
    "live_tokens": 3,
    "remembered_since": "2026-07-01T11:00:00Z"
  }
}
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestUnconverged(t *testing.T) {
	t.Parallel()
	gateway := func(id string, standing fleet.Standing, applied bool) fleet.Confirmation {
		return fleet.Confirmation{Gateway: fleet.Gateway{ID: id, Standing: standing}, Applied: applied}
	}
	done, slow, gone := gateway("done", fleet.Live, true), gateway("slow", fleet.Live, false), gateway("gone", fleet.Lost, false)
	type confirmations = []fleet.Confirmation
	for name, tt := range map[string]struct {
		gateways           confirmations
		unserved, unasked  bool
		lost               []string
		want               string // of the error, empty for none
		applied, live, out int
	}{
		"none":             {},
		"all":              {gateways: confirmations{done}, applied: 1, live: 1},
		"all but the lost": {gateways: confirmations{done, gone}, applied: 1, live: 1, out: 1},
		"not all":          {gateways: confirmations{done, slow}, applied: 1, live: 2, want: "not confirmed by: slow"},
		"lost meanwhile":   {gateways: confirmations{done, gone, slow}, lost: []string{"gone"}, applied: 1, live: 2, out: 1, want: "not confirmed by: gone (lost meanwhile), slow"},
		"all lost":         {gateways: confirmations{gone}, out: 1, want: "no gateway confirmed: all that are known are lost: gone"},
		"no service":       {gateways: confirmations{gone}, unserved: true, out: 1, want: "no service is running, or none answers: whether gateways have it cannot be told"},
		"nothing at all":   {unserved: true, want: "no service is running, or none answers: whether gateways have it cannot be told"},
		"too short":        {gateways: confirmations{done}, unasked: true, applied: 1, live: 1, want: "not all service processes have answered in time: whether all gateways have it cannot be told"},
	} {
		c := &app.Convergence{Served: !tt.unserved, LostMeanwhile: tt.lost}
		c.Gateways, c.Reached = tt.gateways, !tt.unasked && tt.applied == tt.live
		got := ""
		if err := unconverged(c); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
		if j := newConvergenceJSON(c); j.Reached != (tt.want == "") || j.Applied != tt.applied || j.Live != tt.live || j.Lost != tt.out {
			t.Errorf("%s: %+v", name, j)
		}
	}
}

func TestRevokeCommand(t *testing.T) {
	t.Parallel()
	w := newCommandWorld(t)
	w.ensureIssuers()
	w.expect(0, "", "", "apply", "--quiet", "--secrets-out", writeFile(t, "secrets", ""), "-f", writeFile(t, "a.yaml", `
tenants: [{domain: b.example}]
key_managers: [{name: idp, iss: https://idp, max_token_lifetime: 60}]
applications:
  - {name: Shop, owner: alice, keys: [{consumer_key: c1, key_manager: idp}, {consumer_key: c2, client: {}}]}
`))
	pool := pgtest.Pool(t, w.database)
	revoked := func(want ...string) {
		t.Helper()
		rows, err := pool.Query(t.Context(), `SELECT kind || ' ' || iss || ' ' || ident FROM rescind.revocations ORDER BY revoked_at, id`)
		if err != nil {
			t.Fatal(err)
		}
		got, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); err != nil || diff != "" {
			t.Errorf("%v, revoked (-want +got):\n%s", err, diff)
		}
	}
	result := func(stdout string) (r revokedJSON) {
		t.Helper()
		if err := json.Unmarshal([]byte(stdout), &r); err != nil {
			t.Fatalf("%v: %s", err, stdout)
		}
		return r
	}

	out := w.expect(0, "Would end       all tokens of the client c1\n  issuer        https://idp\n", "", "revoke", "--client", "c1", "--iss", "https://idp", "--dry-run")
	if !strings.Contains(out, "  applications  1\n                alice/Shop\n  clients       1\n                c1\n") ||
		!strings.Contains(out, "not remembered: set RESCIND_REMEMBER_TOKENS") {
		t.Error(out)
	}
	dry := result(w.expect(0, "", "", "revoke", "--client", "c1", "--iss", "https://idp", "--dry-run", "--json"))
	if !dry.DryRun || dry.ID != "" || dry.Effect == nil || dry.Effect.ApplicationCount != 1 || dry.AlreadyRevoked {
		t.Errorf("%+v", dry)
	}
	revoked()

	done := result(w.expect(0, "", "", "revoke", "--client", "c1", "--iss", "https://idp", "--reason", "gone", "--json"))
	if done.DryRun || done.ID == "" || done.Seq == 0 || done.AlreadyRevoked || done.Effect == nil || done.Identifier != "c1" || done.Tenant != "carbon.super" {
		t.Errorf("%+v", done)
	}
	w.expect(0, "client  c2", "Would end", "revoke", "--client", "c2") // a person is shown it even if not asked
	w.expect(0, "token  j1", "", "revoke", "--jti", "j1")
	w.expect(0, "already revoked", "", "revoke", "--jti", "j1")
	opaque := writeFile(t, "token", "an-opaque-token\n")
	w.expect(0, "token  "+revocation.DigestTarget("https://idp", "an-opaque-token").ID, "", "revoke", "--token", opaque, "--iss", "https://idp")
	w.expect(1, "", "--token: ", "revoke", "--token", writeFile(t, "token", "e30.e30.e30"))
	w.expect(1, "", "--iss: ", "revoke", "--client", "c1", "--iss", "https://nobody")
	w.expect(1, "", "--tenant: ", "revoke", "--tenant", "c.example", "--yes")

	for _, flags := range [][]string{{"--tenant", "b.example"}, {"--key", "k1", "--iss", "https://idp"}} {
		code, stdout, stderr := w.run("revoke", flags...)
		if code != 3 || stdout != "" || !strings.Contains(stderr, "Would end") || !strings.Contains(stderr, "there is nobody to ask: nothing was revoked; give --yes") {
			t.Errorf("%q: status %d\nstdout: %s\nstderr: %s", flags, code, stdout, stderr)
		}
	}
	revoked("client https://idp c1", "client https://km.example.com c2", "token https://km.example.com j1",
		"token https://idp "+revocation.DigestTarget("https://idp", "an-opaque-token").ID)
	w.expect(0, "tenant  b.example   all of the tenant  b.example", "Would end", "revoke", "--tenant", "b.example", "--yes")
	if r := result(w.expect(0, "", "", "revoke", "--key", "k1", "--iss", "https://idp", "--yes", "--json")); r.Kind != revocation.KindKey {
		t.Errorf("%+v", r)
	}

	var operators int
	err := pool.QueryRow(t.Context(), `SELECT count(*) FROM rescind.audit WHERE actor LIKE 'operator:%' AND action LIKE 'revoke%'`).Scan(&operators)
	if err != nil || operators < 6 {
		t.Errorf("%v, %d records of an operator in the audit", err, operators)
	}
}
