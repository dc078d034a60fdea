package ledger

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/pgtest"
)

const (
	otherIss    = iss + "/t/a.example"
	externalIss = "https://idp.example.org"
)

var otherTenant = revocation.Tenant{ID: 1, Domain: "a.example"}

// keyManagers is a database with two tenants that have an issuer of their own, and an
// external one. Each has two clients: c1 and c2 are of iss, o1 and o2 of otherIss, e1 and e2
// of externalIss.
func keyManagers(t testing.TB) *pgxpool.Pool {
	t.Helper()
	pool := pgtest.New(t)
	_, err := pool.Exec(t.Context(), `
		WITH t AS (INSERT INTO rescind.tenants (id, domain) VALUES (1, 'a.example')),
		k AS (
			INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime) VALUES
				(-1234, 'Resident Key Manager', true, '`+iss+`', 3600),
				(1, 'Resident Key Manager', true, '`+otherIss+`', 3600),
				(1, 'external', false, '`+externalIss+`', 3600)
			RETURNING id, iss
		), a AS (
			INSERT INTO rescind.applications (tenant_id, name, owner) VALUES (-1234, 'app', 'admin') RETURNING id
		), m AS (
			INSERT INTO rescind.key_mappings (application_id, key_manager_id, consumer_key, key_type)
			SELECT a.id, k.id, CASE k.iss WHEN '`+iss+`' THEN 'c' WHEN '`+otherIss+`' THEN 'o' ELSE 'e' END || n, 'PRODUCTION'
			FROM a, k, generate_series(1, 2) AS n
			RETURNING id, consumer_key
		)
		INSERT INTO rescind.clients (client_id, key_mapping_id, auth_method) SELECT consumer_key, id, 'client_secret_basic' FROM m`)
	if err != nil {
		t.Fatal(err)
	}
	return pool
}

// issued is a token of the client's issuer: that of otherTenant for o1 and o2.
func issued(client, subject string) Issued {
	t := Issued{JTI: uuid.NewString(), Iss: iss, ClientID: client, Subject: subject, Exp: leap}
	if strings.HasPrefix(client, "o") {
		t.Iss = otherIss
	}
	return t
}

func remember(t *testing.T, l *Ledger, tokens ...Issued) {
	t.Helper()
	var items []*issuedItem
	for _, token := range tokens {
		items = append(items, &issuedItem{Issued: token})
	}
	if err := l.remember(t.Context(), items); err != nil {
		t.Fatal(err)
	}
}

// ending is a request of a kind that has a time.
func ending(kind revocation.Kind, iss, id string) Request {
	r := Request{
		Target: revocation.Target{Kind: kind, Iss: iss, ID: id}, Tenant: revocation.SuperTenant, Exp: leap + 100,
		Reason: "stolen", Action: "revoke_" + string(kind), Actor: Actor{Name: "account:admin"},
	}
	if iss == otherIss || iss == externalIss || id == otherTenant.Domain {
		r.Tenant = otherTenant
	}
	return r
}

func TestRemember(t *testing.T) {
	t.Parallel()
	l := open(t, keyManagers(t), Config{MaxBatch: 4, QueueSize: 6})
	if err := l.Remember(t.Context(), Issued{JTI: "AT-1"}); err == nil || errors.Is(err, ErrUnavailable) {
		t.Errorf("a jti that is no UUID: %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	var tokens []Issued
	for i := range 6 {
		tokens = append(tokens, issued("c1", fmt.Sprint(i)))
		if err := l.Remember(gone, tokens[i]); !errors.Is(err, context.Canceled) {
			t.Fatalf("token %d: %v", i, err)
		}
	}
	if err := l.Remember(t.Context(), issued("c1", "x")); !errors.Is(err, ErrBusy) {
		t.Errorf("full queue: %v, want ErrBusy", err)
	}
	run(t, l)()
	if err := l.Remember(t.Context(), issued("c1", "x")); !errors.Is(err, ErrUnavailable) {
		t.Errorf("after the stop: %v, want ErrUnavailable", err)
	}
	for _, token := range tokens {
		if got, ok, err := l.IssuedToken(t.Context(), token.JTI); !ok || err != nil || got != token {
			t.Errorf("remembered %+v, %t, %v; want %+v", got, ok, err, token)
		}
	}
	for _, jti := range []string{uuid.NewString(), "AT-1", "urn:uuid:" + tokens[0].JTI} {
		if got, ok, err := l.IssuedToken(t.Context(), jti); ok || err != nil {
			t.Errorf("%s: %+v, %v", jti, got, err)
		}
	}

	asked, known := []string{uuid.NewString(), "AT-1", "urn:uuid:" + tokens[0].JTI}, make(map[string]Issued)
	if got, err := l.IssuedTokens(t.Context(), asked); len(got) != 0 || err != nil {
		t.Errorf("%v: %+v, %v", asked, got, err)
	}
	for _, token := range tokens[1:] {
		asked, known[token.JTI] = append(asked, token.JTI, token.JTI), token
	}
	got, err := l.IssuedTokens(t.Context(), asked)
	if diff := cmp.Diff(known, got); diff != "" || err != nil {
		t.Errorf("of many: %v (-want +got):\n%s", err, diff)
	}
	if got, err := l.IssuedTokens(gone, asked); !errors.Is(err, ErrUnavailable) {
		t.Errorf("not to be had: %+v, %v", got, err)
	}

	// A token that the database refuses fails alone; one that comes twice is there once.
	bad, unknown, external := issued("c1", "\x00"), issued("c1", "a"), issued("c1", "a")
	unknown.Iss, external.Iss = iss+"/t/nobody.example", externalIss
	var batch []*issuedItem
	for _, token := range []Issued{issued("c1", "a"), bad, unknown, external, tokens[0]} {
		batch = append(batch, &issuedItem{Issued: token, done: make(chan error, 1)})
	}
	l.rememberBatch(t.Context(), batch)
	for i, it := range batch {
		if err := <-it.done; (err != nil) != (1 <= i && i <= 3) || errors.Is(err, ErrUnavailable) {
			t.Errorf("token %d: %v", i, err)
		}
	}
	if n := count(t, l, `SELECT count(*) FROM rescind.issued_tokens`); n != 7 {
		t.Errorf("%d tokens are remembered, want 7", n)
	}
}

func TestLiving(t *testing.T) {
	t.Parallel()
	l := open(t, keyManagers(t), Config{})
	over := issued("c1", "alice")
	over.Exp = time.Now().Unix() - 1
	revoked := issued("c1", "alice")
	remember(t, l, issued("c1", "alice"), issued("c1", "bob"), issued("c2", "alice"), issued("o1", "alice"), over, revoked)
	// Clients that are no more, one of which is another tenant's now.
	given := issued("o2", "alice")
	given.Iss = iss
	remember(t, l, issued("removed", "alice"), given)
	if _, err := l.commit(t.Context(), []Request{request(revoked.JTI)}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		kind    revocation.Kind
		iss, id string
		want    int64
	}{
		{revocation.KindClient, iss, "c1", 2},
		{revocation.KindClient, otherIss, "c1", 0},
		{revocation.KindClient, otherIss, "o1", 1},
		{revocation.KindClient, iss, "removed", 1},
		{revocation.KindClient, otherIss, "removed", 0},
		{revocation.KindClient, iss, "o2", 1},
		{revocation.KindClient, otherIss, "o2", 0},
		{revocation.KindClient, iss, "nobody", 0},
		{revocation.KindSubject, iss, "alice", 4},
		{revocation.KindSubject, otherIss, "alice", 1},
		{revocation.KindSubject, externalIss, "alice", 0},
		{revocation.KindSubject, iss, "bob", 1},
		{revocation.KindTenant, "", revocation.SuperTenant.Domain, 5},
		{revocation.KindTenant, "", otherTenant.Domain, 1},
	} {
		r := ending(tt.kind, tt.iss, tt.id)
		if got, err := l.Living(t.Context(), r.Target, r.Tenant); got != (Living{Tokens: tt.want}) || err != nil {
			t.Errorf("%+v: %+v, %v; want %d tokens", r.Target, got, err, tt.want)
		}
	}
	if _, err := l.Living(t.Context(), request("x").Target, revocation.SuperTenant); err == nil {
		t.Error("a token's revocation was counted")
	}

	since := func() time.Time {
		t.Helper()
		r := ending(revocation.KindClient, iss, "c1")
		living, err := l.Living(t.Context(), r.Target, r.Tenant)
		if err != nil {
			t.Fatal(err)
		}
		return living.Since
	}
	var seen []time.Time
	for _, on := range []bool{true, true, false, false, true} {
		if err := l.SetRemembering(t.Context(), on); err != nil {
			t.Fatal(err)
		}
		seen = append(seen, since())
	}
	if seen[0].IsZero() || seen[1] != seen[0] || !seen[2].IsZero() || !seen[3].IsZero() || !seen[4].After(seen[0]) {
		t.Errorf("since %v", seen)
	}
}

// waitsForLock reports whether a session waits for an advisory lock.
func waitsForLock(t *testing.T, l *Ledger) bool {
	t.Helper()
	return count(t, l, `SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
		WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted`) > 0
}

func endings(t *testing.T, l *Ledger) int {
	t.Helper()
	return count(t, l, `SELECT count(*) FROM rescind.endings`)
}

// A token whose transaction is under way when its client is revoked counts as issued before.
func TestTokenOnItsWayIsEnded(t *testing.T) {
	t.Parallel()
	l := open(t, keyManagers(t), Config{})
	tx, err := l.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	token := issued("c1", "c1")
	if _, err := tx.Exec(t.Context(), rememberLockSQL); err != nil {
		t.Fatal(err)
	}
	_, err = tx.Exec(t.Context(), rememberSQL, []string{token.JTI}, []string{token.Iss}, []string{token.ClientID}, []string{token.Subject}, []int64{token.Exp})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := l.RevokeAll(t.Context(), []Request{ending(revocation.KindClient, iss, "c1")})
		done <- err
	}()
	await(t, func() bool { return waitsForLock(t, l) })
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	run(t, l)
	await(t, func() bool {
		_, known, err := l.Known(t.Context(), request(token.JTI).Target)
		return known && err == nil
	})
}

// A token that is remembered while its client is revoked is not there before the revocation
// is: its issuer will see it.
func TestTokenIsRememberedAfterTheRevocation(t *testing.T) {
	t.Parallel()
	l := open(t, keyManagers(t), Config{})
	remember(t, l, issued("c1", "c1"))
	tx, err := l.pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if _, err := tx.Exec(t.Context(), `SELECT FROM rescind.log_head FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	client := ending(revocation.KindClient, iss, "c1")
	revoked, remembered := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := l.Change(t.Context(), func(_ context.Context, tx *Tx) error { tx.Revoke(client); return nil })
		revoked <- err
	}()
	await(t, func() bool { // it has the lock, and waits for the head
		return count(t, l, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
			AND wait_event_type = 'Lock' AND query LIKE '%log_head SET seq%'`) == 1
	})
	late := issued("c1", "c1")
	go func() {
		err := l.remember(t.Context(), []*issuedItem{{Issued: late}})
		if _, known, lookErr := l.Known(t.Context(), client.Target); !known || lookErr != nil {
			t.Errorf("the issuer does not see the revocation: %v", lookErr)
		}
		remembered <- err
	}()
	await(t, func() bool { return waitsForLock(t, l) })
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-revoked, <-remembered); err != nil {
		t.Fatal(err)
	}
	run(t, l)
	await(t, func() bool { return endings(t, l) == 0 })
	if _, ok, err := l.IssuedToken(t.Context(), late.JTI); !ok || err != nil {
		t.Errorf("the later token was ended: %v", err)
	}
	if n := count(t, l, `SELECT count(*) FROM rescind.revocations WHERE kind = 'token'`); n != 1 {
		t.Errorf("%d tokens were revoked, want 1", n)
	}
}

// What can have no remembered token leaves no ending, through any way in.
func TestEndingsOnlyWhereTokensAre(t *testing.T) {
	t.Parallel()
	l := open(t, keyManagers(t), Config{})
	steps := []struct {
		name string
		all  []Request
		want int
	}{
		{"nothing is remembered", []Request{ending(revocation.KindClient, iss, "c1"), ending(revocation.KindTenant, "", "carbon.super")}, 0},
		{"another client, subject, issuer, tenant, kind", []Request{
			ending(revocation.KindClient, iss, "c2"), ending(revocation.KindSubject, iss, "c2"), ending(revocation.KindClient, externalIss, "c1"),
			ending(revocation.KindSubject, externalIss, "alice"), ending(revocation.KindSubject, otherIss, "alice"), ending(revocation.KindClient, otherIss, "c1"), ending(revocation.KindTenant, "", otherTenant.Domain), request(uuid.NewString()),
			ending(revocation.KindSession, iss, "c1"), ending(revocation.KindKey, iss, "c1"),
		}, 0},
		{"all three", []Request{
			ending(revocation.KindClient, iss, "c1"), ending(revocation.KindSubject, iss, "alice"), ending(revocation.KindTenant, "", "carbon.super"),
		}, 3},
	}
	for i, s := range steps {
		for j := range s.all {
			s.all[j].NotAfter = 1000 + int64(i) // later than what is stored
		}
		if _, err := l.RevokeAll(t.Context(), s.all); err != nil {
			t.Fatal(err)
		}
		if n := endings(t, l); n != s.want {
			t.Errorf("%s: %d endings, want %d", s.name, n, s.want)
		}
		if _, err := l.RevokeAll(t.Context(), s.all); err != nil { // changes nothing
			t.Fatal(err)
		}
		if n := endings(t, l); n != s.want {
			t.Errorf("%s: %d endings after a repeat, want %d", s.name, n, s.want)
		}
		if i == 0 {
			remember(t, l, issued("c1", "alice"))
		}
	}
}

// A process that stops half way leaves the rest to the next one, and no token is told twice.
func TestExpandGoesOn(t *testing.T) {
	t.Parallel()
	pool := keyManagers(t)
	l := open(t, pool, Config{})
	var tokens []Issued
	for range 2*expandChunk + 10 {
		tokens = append(tokens, issued("c1", "alice"))
	}
	old, known, long := issued("c1", "alice"), issued("c1", "alice"), issued("c1", "alice")
	old.Exp = time.Now().Add(-revocation.MaxLeeway).Unix() - 5
	long.Exp = leap + 1000
	remember(t, l, tokens...)
	remember(t, l, old, known, long, issued("o1", "alice"))
	client := ending(revocation.KindClient, iss, "c1")
	client.Traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	if _, err := l.RevokeAll(t.Context(), []Request{request(known.JTI), client}); err != nil {
		t.Fatal(err)
	}
	after := issued("c1", "alice")
	remember(t, l, after)
	// A client that is removed with its revocation, as the catalog does it.
	removed := issued("c2", "bob")
	remember(t, l, removed)
	_, err := l.Change(t.Context(), func(ctx context.Context, tx *Tx) error {
		tx.Revoke(ending(revocation.KindClient, iss, "c2"))
		_, err := tx.Exec(ctx, `DELETE FROM rescind.key_mappings WHERE consumer_key = 'c2'`)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if done, err := l.expandSome(t.Context(), expandTurn{but: []int64{}, most: expandEndings}); !done.mine || err != nil {
		t.Fatalf("first chunk: %+v, %v", done, err)
	}
	if n := count(t, l, `SELECT count(*) FROM rescind.issued_tokens`); n != len(tokens)+6-expandChunk {
		t.Errorf("%d tokens are remembered after a chunk", n)
	}
	next := []*Ledger{open(t, pool, Config{}), open(t, pool, Config{})}
	for _, l := range next {
		run(t, l)
	}
	await(t, func() bool { return endings(t, l) == 0 })

	told := make(map[string]int)
	for _, e := range allEvents(t, open(t, pool, Config{}))[2:] { // after those of known and of its client
		rev, err := e.Revocation()
		if err != nil {
			t.Fatal(err)
		}
		if rev.Target.Kind != revocation.KindToken {
			continue
		}
		told[rev.Target.ID]++
		if rev.ClientID == "c1" {
			want := revocation.Revocation{
				ID: rev.ID, Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: rev.Target.ID}, Tenant: revocation.SuperTenant,
				Exp: leap, ClientID: "c1", Reason: "stolen",
			}
			if diff := cmp.Diff(want, rev); diff != "" || e.Traceparent != client.Traceparent {
				t.Errorf("event of traceparent %q: %s", e.Traceparent, diff)
			}
		}
	}
	want := map[string]int{removed.JTI: 1}
	for _, token := range tokens {
		want[token.JTI] = 1
	}
	if diff := cmp.Diff(want, told); diff != "" {
		t.Errorf("events of tokens (-want +got):\n%s", diff)
	}
	if n := count(t, l, `SELECT count(*) FROM rescind.issued_tokens`); n != 3 {
		t.Errorf("%d tokens are remembered, want 3: a longer one, one of another issuer, one issued after", n)
	}
	for name, want := range map[string]int{"expand": 2, "revoke_client": 2, "revoke_token": 1} {
		if n := count(t, l, `SELECT count(*) FROM rescind.audit WHERE action = '`+name+`'`); n != want {
			t.Errorf("%d audit records of %s, want %d", n, name, want)
		}
	}
	counted := 0.0
	for _, l := range append(next, l) {
		reg := prometheus.NewRegistry()
		reg.MustRegister(l.metrics.expanded)
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		counted += families[0].GetMetric()[0].GetCounter().GetValue()
	}
	if counted != float64(len(tokens)+2) { // known is one of them
		t.Errorf("counted %v tokens, want %d", counted, len(tokens)+2)
	}
}

// None waits for another that has more tokens, or that fails whenever it is tried.
func TestEndingsTakeTurns(t *testing.T) {
	t.Parallel()
	pool := keyManagers(t)
	l := open(t, pool, Config{})
	var tokens []Issued
	for range 2*expandChunk + 10 {
		tokens = append(tokens, issued("c1", "alice"))
	}
	broken := issued("o1", "bob")
	remember(t, l, append(tokens, issued("c2", "carol"), issued("o2", "dave"), broken)...)
	for _, r := range []Request{
		ending(revocation.KindClient, iss, "c1"), ending(revocation.KindSubject, otherIss, "bob"),
		ending(revocation.KindSubject, iss, "carol"), ending(revocation.KindSubject, otherIss, "dave"),
	} {
		if _, err := l.RevokeAll(t.Context(), []Request{r}); err != nil {
			t.Fatal(err)
		}
	}
	owner, err := pgx.Connect(t.Context(), ownerOf(t, pool))
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close(t.Context())
	if _, err := owner.Exec(t.Context(), `UPDATE rescind.endings SET tenant_id = 4711 WHERE ident = 'bob'`); err != nil { // there is no such tenant
		t.Fatal(err)
	}
	order := func() (left []string) {
		t.Helper()
		rows, _ := pool.Query(t.Context(), `SELECT ident FROM rescind.endings ORDER BY id`)
		left, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		return left
	}
	first, err := l.expandSome(t.Context(), expandTurn{but: []int64{}, most: expandEndings})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.expandSome(t.Context(), expandTurn{after: first.last, but: []int64{}, most: expandEndings}); err == nil {
		t.Error("the broken one did not fail")
	}
	second, err := l.expandSome(t.Context(), expandTurn{after: first.last + 1, but: []int64{}, most: 2})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"c1", "bob"}, order()); diff != "" || second.last != first.last+3 {
		t.Errorf("after the second turn, which ended with %d (-want +got):\n%s", second.last, diff)
	}
	if err := l.expandAll(t.Context()); err == nil || errors.Is(err, ErrUnavailable) {
		t.Errorf("with a broken one: %v", err)
	}
	if diff := cmp.Diff([]string{"bob"}, order()); diff != "" {
		t.Error(diff)
	}
	if n := count(t, l, `SELECT count(*) FROM rescind.revocations WHERE kind = 'token'`); n != len(tokens)+2 {
		t.Errorf("%d tokens were revoked, want %d", n, len(tokens)+2)
	}
	if _, err := owner.Exec(t.Context(), `UPDATE rescind.endings SET tenant_id = 1`); err != nil {
		t.Fatal(err)
	}
	if err := l.expandAll(t.Context()); err != nil || endings(t, l) != 0 {
		t.Errorf("when it is mended: %v", err)
	}
}

// Nobody has the tokens of an issuer that is removed.
func TestTokensOfNobody(t *testing.T) {
	t.Parallel()
	pool := keyManagers(t)
	l := open(t, pool, Config{})
	token := issued("o1", "alice")
	remember(t, l, token)
	tenant := ending(revocation.KindTenant, "", otherTenant.Domain)
	if _, err := l.RevokeAll(t.Context(), []Request{tenant}); err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{
		`DELETE FROM rescind.key_mappings WHERE consumer_key LIKE 'o%'`, `DELETE FROM rescind.key_managers WHERE iss = '` + otherIss + `'`,
	} {
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if living, err := l.Living(t.Context(), tenant.Target, tenant.Tenant); living.Tokens != 0 || err != nil {
		t.Errorf("living: %+v, %v", living, err)
	}
	if got, ok, err := l.IssuedToken(t.Context(), token.JTI); ok || err != nil {
		t.Errorf("remembered: %+v, %v", got, err)
	}
	if n := endings(t, l); n != 1 {
		t.Errorf("%d endings, want 1", n)
	}
	if err := l.expandAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := endings(t, l) + count(t, l, `SELECT count(*) FROM rescind.revocations WHERE kind = 'token'`); n != 0 {
		t.Errorf("%d endings and revoked tokens, want none", n)
	}
}

func TestTrimIssued(t *testing.T) {
	t.Parallel()
	l := open(t, keyManagers(t), Config{TrimEvery: 10 * time.Millisecond})
	over, within := issued("c1", "a"), issued("c1", "b")
	over.Exp, within.Exp = time.Now().Unix()-130, time.Now().Unix()-60
	remember(t, l, over, within)
	run(t, l)
	await(t, func() bool { _, ok, err := l.IssuedToken(t.Context(), over.JTI); return !ok && err == nil })
	if _, ok, err := l.IssuedToken(t.Context(), within.JTI); !ok || err != nil {
		t.Errorf("a token within the leeway is forgotten: %v", err)
	}
}

// Issuers that remember each token before they look at the state, beside revocations through
// every way in: in the end exactly those tokens that were handed out and that a revocation
// ends have a revocation of their own. Time is a counter here, so that a token's second is
// never in doubt; one that lives longer than a revocation's last token is later than it.
func TestEveryDeadTokenIsRevokedAlone(t *testing.T) {
	t.Parallel()
	pool := keyManagers(t)
	const lifetime = 3600
	var clock atomic.Int64
	clock.Store(time.Now().Unix())
	type handedOut struct {
		Issued
		iss, tenant string
		iat         int64
	}
	// deadUntil is the latest iat of this client and subject that a committed revocation ends.
	deadUntil := func(token handedOut) (until int64, err error) {
		err = pool.QueryRow(t.Context(), `
			SELECT coalesce(max(not_after), 0) FROM rescind.revocations
			WHERE kind = 'client' AND iss = $1 AND ident = $2 OR kind = 'subject' AND iss = $1 AND ident = $3 OR kind = 'tenant' AND ident = $4`,
			token.iss, token.ClientID, token.Subject, token.tenant).Scan(&until)
		return until, err
	}
	issue := func(l *Ledger) (handedOut, error) {
		token := handedOut{iss: iss, tenant: revocation.SuperTenant.Domain}
		token.ClientID, token.Subject = []string{"c1", "c2", "o1"}[rand.IntN(3)], []string{"alice", "bob"}[rand.IntN(2)]
		if token.ClientID == "o1" {
			token.iss, token.tenant = otherIss, otherTenant.Domain
		}
		for {
			until, err := deadUntil(token)
			if err != nil {
				return token, err
			}
			token.iat = max(clock.Load(), until+1)
			token.JTI, token.Iss, token.Exp = uuid.NewString(), token.iss, token.iat+lifetime
			if err := l.Remember(t.Context(), token.Issued); err != nil {
				return token, err
			}
			if until, err = deadUntil(token); err != nil || until < token.iat {
				return token, err
			}
		}
	}
	next := func() Request {
		r := []Request{
			ending(revocation.KindClient, iss, "c1"), ending(revocation.KindClient, iss, "c2"), ending(revocation.KindClient, otherIss, "o1"),
			ending(revocation.KindSubject, iss, "alice"), ending(revocation.KindSubject, otherIss, "bob"),
			ending(revocation.KindTenant, "", otherTenant.Domain), ending(revocation.KindTenant, "", revocation.SuperTenant.Domain),
		}[rand.IntN(7)]
		r.NotAfter = clock.Add(1)
		r.Exp = r.NotAfter + lifetime
		return r
	}

	ledgers := []*Ledger{open(t, pool, Config{}), open(t, pgtest.Pool(t, pool.Config().ConnString()), Config{})}
	for _, l := range ledgers {
		run(t, l)
	}
	var issuers, revokers sync.WaitGroup
	stop := make(chan struct{})
	var mu sync.Mutex
	var all []handedOut
	for i := range 8 {
		issuers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				token, err := issue(ledgers[i%2])
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				all = append(all, token)
				mu.Unlock()
			}
		})
	}
	const each = 12
	for _, l := range ledgers {
		revokers.Go(func() {
			for range each {
				mustRevoke(t, l, next())
			}
		})
		revokers.Go(func() {
			for range each {
				if _, err := l.RevokeAll(t.Context(), []Request{next(), next(), request(uuid.NewString())}); err != nil {
					t.Error(err)
				}
			}
		})
		revokers.Go(func() {
			for range each {
				_, err := l.Change(t.Context(), func(_ context.Context, tx *Tx) error { tx.Revoke(next()); return nil })
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	revokers.Wait()
	close(stop)
	issuers.Wait()
	await(t, func() bool { return endings(t, ledgers[0]) == 0 })

	dead := 0
	for _, token := range all {
		until, err := deadUntil(token)
		if err != nil {
			t.Fatal(err)
		}
		_, known, err := ledgers[0].Known(t.Context(), revocation.Target{Kind: revocation.KindToken, Iss: token.iss, ID: token.JTI})
		if err != nil {
			t.Fatal(err)
		}
		if ended := token.iat <= until; known != ended {
			t.Errorf("token of %s and %s with iat %d, ended up to %d: has its own revocation: %t", token.ClientID, token.Subject, token.iat, until, known)
		} else if ended {
			dead++
		}
	}
	if dead == 0 || dead == len(all) {
		t.Errorf("%d of %d tokens were ended: that proves nothing", dead, len(all))
	}
	t.Logf("%d of %d tokens were ended", dead, len(all))
}
