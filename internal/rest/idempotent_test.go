package rest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
)

func masterKey(t testing.TB, seed string) authn.MasterKey {
	t.Helper()
	key, err := authn.NewMasterKey([]byte(strings.Repeat(seed, 32)))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func exec(t testing.TB, pool *pgxpool.Pool, sql string, args ...any) int64 {
	t.Helper()
	tag, err := pool.Exec(t.Context(), sql, args...)
	if err != nil {
		t.Fatal(err)
	}
	return tag.RowsAffected()
}

// server counts what it does.
type server struct {
	http.Handler
	runs atomic.Int64
}

func newServer(store IdempotencyStore, h Handler) *server {
	s := &server{}
	all := accounts{"root": testAccounts["root"], "other": {Username: "other", Tenant: revocation.SuperTenant, Role: Admin}}
	s.Handler = Require(all, nil, Admin)(Idempotent(store)(Handler(func(w http.ResponseWriter, r *http.Request) error {
		s.runs.Add(1)
		return h(w, r)
	})))
	return s
}

type sent struct {
	user, method, target, key, body string
}

func (s *server) send(t testing.TB, m sent) *exchange {
	t.Helper()
	x := newExchange()
	s.ServeHTTP(wrapped(x), m.request(t))
	return x
}

func (m sent) request(t testing.TB) *http.Request {
	if m.method == "" {
		m.method = "POST"
	}
	if m.target == "" {
		m.target = "/v1/revocations"
	}
	if m.user == "" {
		m.user = "root"
	}
	r := request(t, m.method, m.target, m.body)
	if m.key != "" {
		r.Header.Set("Idempotency-Key", m.key)
	}
	r.SetBasicAuth(m.user, "")
	return r
}

// create answers with what it was sent, and how often it was called.
func create() Handler {
	var n atomic.Int64
	return func(w http.ResponseWriter, r *http.Request) error {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		w.Header().Set("ETag", `"7"`)
		w.Header().Set("Location", "/v1/things/1")
		w.Header().Set("X-Other", "not kept")
		return JSON(w, http.StatusCreated, fmt.Sprintf("%d: %s", n.Add(1), body))
	}
}

func TestIdempotent(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	s := newServer(NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "a")}), create())
	first := s.send(t, sent{key: `"8c1f"`, body: "hush"})
	if first.Code != 201 || first.Body.String() != `"1: hush"` || first.Header().Get("Idempotency-Replayed") != "" || first.Header().Get("X-Other") == "" {
		t.Fatalf("%d %v %s", first.Code, first.Header(), first.Body)
	}
	// Another process has the same table.
	again := newServer(NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "n"), masterKey(t, "a")}), create())
	for _, key := range []string{`"8c1f"`, `8c1f`} { // C110
		got := again.send(t, sent{key: key, body: "hush"})
		want := http.Header{
			"Content-Type": {"application/json"}, "Etag": {`"7"`}, "Location": {"/v1/things/1"}, "Cache-Control": {"no-store"}, "Idempotency-Replayed": {"true"},
		}
		if diff := cmp.Diff(want, got.Header()); got.Code != 201 || got.Body.String() != first.Body.String() || diff != "" {
			t.Errorf("%s: %d %s, header (-want +got):\n%s", key, got.Code, got.Body, diff)
		}
	}
	if again.runs.Load() != 0 {
		t.Error("it was done again")
	}
	for name, m := range map[string]sent{
		"other body":  {key: `"8c1f"`, body: "other"}, // C111
		"other query": {key: `"8c1f"`, body: "hush", target: "/v1/revocations?dry_run=true"},
	} {
		got := s.send(t, m)
		if got.Code != 422 || !strings.Contains(got.Body.String(), "/idempotency-key-reused") {
			t.Errorf("%s: %d %s", name, got.Code, got.Body)
		}
	}
	runs := s.runs.Load()
	for name, m := range map[string]sent{
		"other key":    {key: `"8c1g"`, body: "hush"},
		"other caller": {key: `"8c1f"`, body: "hush", user: "other"},
		"other path":   {key: `"8c1f"`, body: "hush", target: "/v1/applications"},
		"odd path":     {key: `"8c1f"`, body: "hush", target: "/v1/a%00%FF"},
		"no key":       {body: "hush"},
		"no key again": {body: "hush"},
		"other method": {key: `"8c1f"`, body: "hush", method: "PUT"},
		"PUT again":    {key: `"8c1f"`, body: "hush", method: "PUT"},
	} {
		if got := s.send(t, m); got.Code != 201 || got.Header().Get("Idempotency-Replayed") != "" {
			t.Errorf("%s: %d %v %s", name, got.Code, got.Header(), got.Body)
		}
	}
	if n := s.runs.Load() - runs; n != 8 {
		t.Errorf("%d of 8 were done", n)
	}
	for _, key := range []string{`""`, `"`, `"a`, `"é"`, `a b`, `"a\b"`, `a,b`, `"a";p=1`, `"` + strings.Repeat("a", 256) + `"`, strings.Repeat("a", 256), "a\tb"} {
		if got := s.send(t, sent{key: key}); got.Code != 400 {
			t.Errorf("key %q: %d %s", key, got.Code, got.Body)
		}
	}
	two := sent{key: "a"}.request(t)
	two.Header.Add("Idempotency-Key", "b")
	x := newExchange()
	s.ServeHTTP(x, two)
	if x.Code != 400 {
		t.Errorf("two keys: %d", x.Code)
	}
	if got := s.send(t, sent{key: `"` + strings.Repeat("a", 255) + `"`}); got.Code != 201 {
		t.Errorf("the longest key: %d %s", got.Code, got.Body)
	}
	if got := s.send(t, sent{key: `a`, target: "/" + strings.Repeat("a", 3000)}); got.Code != 414 {
		t.Errorf("a long path: %d %s", got.Code, got.Body)
	}
	if got := s.send(t, sent{key: `big`, body: strings.Repeat("a", MaxBody+1)}); got.Code != 413 {
		t.Errorf("a large body: %d %s", got.Code, got.Body)
	}
	if n := exec(t, pool, `SELECT FROM rescind.idempotency WHERE position('hush'::bytea IN body) > 0 OR position('hush'::bytea IN fingerprint) > 0`); n != 0 {
		t.Errorf("%d answers are in the clear", n)
	}
}

// What takes much room takes less, and comes again as it was.
func TestAnswersAreCompressed(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	store := NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "a")})
	for _, body := range []string{"", "x", gzipMagic, gzipMagic + "x", strings.Repeat("a", packFrom-1), strings.Repeat("token ", 100_000)} {
		exec(t, pool, `DELETE FROM rescind.idempotency`)
		if e, err := store.Begin(t.Context(), "c", "POST", "/p", "k", [32]byte{}); !e.Begun || err != nil {
			t.Fatalf("%+v, %v", e, err)
		}
		if err := store.Finish(t.Context(), "c", "POST", "/p", "k", 200, http.Header{}, []byte(body)); err != nil {
			t.Fatal(err)
		}
		if e, err := store.Begin(t.Context(), "c", "POST", "/p", "k", [32]byte{}); string(e.Body) != body || err != nil {
			t.Errorf("%d bytes came again as %d, %v", len(body), len(e.Body), err)
		}
		if n := exec(t, pool, `SELECT FROM rescind.idempotency WHERE octet_length(body) > 5000`); n != 0 {
			t.Errorf("%d bytes take more than 5000", len(body))
		}
	}
}

// One caller cannot fill the database, and others do not notice.
func TestIdempotentWhenFull(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	store := NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "a")})
	s := newServer(store, create())
	first := s.send(t, sent{key: "k", body: "b"})
	fill := func(bytes int64) {
		exec(t, pool, `INSERT INTO rescind.idempotency (caller, method, path, key, fingerprint, status, body)
			SELECT 'account:root', 'POST', '/p', gen_random_uuid()::text, decode(repeat('00', 32), 'hex'), 200, decode(repeat('00', $1), 'hex')`, bytes)
	}
	for range 3 {
		fill(maxKept / 4)
	}
	if got := s.send(t, sent{key: "l"}); got.Code != 201 {
		t.Errorf("before the bound: %d %s", got.Code, got.Body)
	}
	fill(maxKept / 4)
	recount := func() { store.kept["account:root"] = usage{} }
	recount()
	for range 2 {
		got := s.send(t, sent{key: "m"})
		if got.Code != 429 || got.Header().Get("Retry-After") != "3600" || !strings.Contains(got.Body.String(), "/problems/too-many-answers") {
			t.Errorf("%d %v %s", got.Code, got.Header(), got.Body)
		}
	}
	for name, tt := range map[string]struct {
		sent
		status int
		done   bool
	}{
		"again":        {sent{key: "k", body: "b"}, 201, false},
		"another body": {sent{key: "k", body: "c"}, 422, false},
		"without key":  {sent{}, 201, true},
		"other caller": {sent{key: "m", user: "other"}, 201, true},
	} {
		runs := s.runs.Load()
		got := s.send(t, tt.sent)
		if got.Code != tt.status || (s.runs.Load() > runs) != tt.done {
			t.Errorf("%s: %d %s, done %d times", name, got.Code, got.Body, s.runs.Load()-runs)
		}
		if name == "again" && got.Body.String() != first.Body.String() {
			t.Errorf("%s: %s after %s", name, got.Body, first.Body)
		}
	}
	exec(t, pool, `UPDATE rescind.idempotency SET begun_at = begun_at - interval '25 h' WHERE caller = 'account:root'`)
	if got := s.send(t, sent{key: "k", body: "b"}); got.Code != 429 {
		t.Errorf("an answer that is over: %d %s", got.Code, got.Body)
	}
	recount()
	if got := s.send(t, sent{key: "k", body: "c"}); got.Code != 201 {
		t.Errorf("a day later: %d %s", got.Code, got.Body)
	}
}

// What a process keeps counts at once.
func TestAnswersCountTheirOwn(t *testing.T) {
	t.Parallel()
	store := NewIdempotencyStore(pgtest.New(t), []authn.MasterKey{masterKey(t, "a")})
	begin := func() Earlier {
		t.Helper()
		e, err := store.Begin(t.Context(), "c", "POST", "/p", fmt.Sprint(len(store.kept), store.kept["c"].bytes), [32]byte{})
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	finish := func(body string) {
		t.Helper()
		if err := store.Finish(t.Context(), "c", "POST", "/p", "none", 200, http.Header{}, []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	finish("")
	if len(store.kept) != 0 {
		t.Error("an answer without a body is counted")
	}
	finish("x")
	if begin(); store.kept["c"].counted.IsZero() {
		t.Error("what is kept was not counted")
	}
	store.kept["c"] = usage{maxKept - 1, store.kept["c"].counted}
	if e := begin(); !e.Begun {
		t.Errorf("before the bound: %+v", e)
	}
	finish("x")
	if e := begin(); !e.Full {
		t.Errorf("past the bound: %+v", e)
	}
}

func TestDoNotKeep(t *testing.T) {
	t.Parallel()
	store := NewIdempotencyStore(pgtest.New(t), []authn.MasterKey{masterKey(t, "a")})
	s := newServer(store, func(w http.ResponseWriter, r *http.Request) error {
		DoNotKeep(wrapper{w})
		return JSON(w, 200, "seen")
	})
	for _, body := range []string{"a", "a", "b"} {
		if got := s.send(t, sent{key: "k", body: body}); got.Code != 200 || got.Header().Get("Idempotency-Replayed") != "" {
			t.Errorf("%s: %d %v %s", body, got.Code, got.Header(), got.Body)
		}
	}
	s.send(t, sent{})
	if runs := s.runs.Load(); runs != 4 {
		t.Errorf("done %d times, want 4", runs)
	}
}

func TestParseKey(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]string{`"a\"b\\c ;,"`: `a"b\c ;,`, "0e4-f/a:b": "0e4-f/a:b", `"~"`: "~"} {
		if got, ok := parseKey([]string{header}); got != want || !ok {
			t.Errorf("%s: %q, %t, want %q", header, got, ok, want)
		}
	}
}

// What may be answered otherwise the next time is not kept.
func TestIdempotentKeeps(t *testing.T) {
	t.Parallel()
	store := NewIdempotencyStore(pgtest.New(t), []authn.MasterKey{masterKey(t, "a")})
	for status, kept := range map[int]bool{
		0: true, 200: true, 204: true, 303: true, 400: true, 404: true, 409: true, 412: true,
		401: false, 403: false, 429: false, 500: false, 503: false,
	} {
		s := newServer(store, func(w http.ResponseWriter, r *http.Request) error {
			if status >= 300 {
				return Status(status, "")
			}
			if status != 0 {
				w.WriteHeader(status)
				w.WriteHeader(http.StatusTeapot) // only the first counts
			}
			return nil
		})
		for range 2 {
			got := s.send(t, sent{key: fmt.Sprint(status)})
			if want := max(status, 200); got.Code != want || (got.Body.Len() > 0) != (status >= 300) {
				t.Errorf("status %d %s, want %d", got.Code, got.Body, want)
			}
		}
		if runs := s.runs.Load(); (runs == 1) != kept {
			t.Errorf("%d: done %d times", status, runs)
		}
	}
}

func TestIdempotentWhileRunning(t *testing.T) {
	t.Parallel()
	store := NewIdempotencyStore(pgtest.New(t), []authn.MasterKey{masterKey(t, "a")})
	begun, goOn := make(chan struct{}), make(chan struct{})
	s := newServer(store, func(w http.ResponseWriter, r *http.Request) error {
		close(begun)
		<-goOn
		if err := http.NewResponseController(w).Flush(); err == nil {
			t.Error("an answer that is not kept yet is flushed")
		}
		return JSON(w, 202, "done")
	})
	var group sync.WaitGroup
	ctx, leave := context.WithCancel(t.Context())
	group.Go(func() {
		x := newExchange()
		s.ServeHTTP(x, sent{key: "k", body: "b"}.request(t).WithContext(ctx))
		if x.Code != 202 || x.err != nil {
			t.Errorf("%d %s, log has %v", x.Code, x.Body, x.err)
		}
	})
	<-begun
	if got := s.send(t, sent{key: "k", body: "b"}); got.Code != 409 || !strings.Contains(got.Body.String(), "/idempotency-in-progress") { // C112
		t.Errorf("%d %s", got.Code, got.Body)
	}
	if got := s.send(t, sent{key: "k", body: "c"}); got.Code != 422 {
		t.Errorf("%d %s", got.Code, got.Body)
	}
	leave() // the answer is kept for a caller that is gone
	close(goOn)
	group.Wait()
	if got := s.send(t, sent{key: "k", body: "b"}); got.Code != 202 || got.Body.String() != `"done"` {
		t.Errorf("%d %s", got.Code, got.Body)
	}
}

// What may have been done is not done again at once.
func TestIdempotentInDoubt(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	store := NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "a")})
	var outcome error = fmt.Errorf("%w: %w", ledger.ErrUnavailable, ledger.ErrDoubt)
	s := newServer(store, func(w http.ResponseWriter, r *http.Request) error {
		if outcome != nil {
			return outcome
		}
		return JSON(w, 201, "done")
	})
	if got := s.send(t, sent{key: "k"}); got.Code != 503 || !errors.Is(got.err, ledger.ErrDoubt) {
		t.Errorf("%d, log has %v", got.Code, got.err)
	}
	outcome = nil
	if got := s.send(t, sent{key: "k"}); got.Code != 409 || !strings.Contains(got.Body.String(), "/idempotency-in-progress") || s.runs.Load() != 1 {
		t.Errorf("at once: %d %s, done %d times", got.Code, got.Body, s.runs.Load())
	}
	exec(t, pool, `UPDATE rescind.idempotency SET begun_at = begun_at - interval '61 s'`)
	if got := s.send(t, sent{key: "k"}); got.Code != 201 || s.runs.Load() != 2 {
		t.Errorf("a minute later: %d %s, done %d times", got.Code, got.Body, s.runs.Load())
	}
	outcome = ledger.ErrUnavailable // nothing was done
	for range 2 {
		if got := s.send(t, sent{key: "l"}); got.Code != 503 {
			t.Errorf("%d %s", got.Code, got.Body)
		}
	}
}

func TestIdempotentPanic(t *testing.T) {
	t.Parallel()
	store := NewIdempotencyStore(pgtest.New(t), []authn.MasterKey{masterKey(t, "a")})
	s := newServer(store, func(w http.ResponseWriter, r *http.Request) error { panic("oh") })
	for range 2 {
		func() {
			defer func() {
				if recover() != "oh" {
					t.Error("the panic is swallowed")
				}
			}()
			s.send(t, sent{key: "k"})
		}()
	}
	if n := s.runs.Load(); n != 2 {
		t.Errorf("done %d times, want 2", n)
	}
}

func TestIdempotentWithoutItsTable(t *testing.T) {
	t.Parallel()
	db := pgtest.Create(t)
	pool := pgtest.Pool(t, db.OwnerURL)
	store := NewIdempotencyStore(pgtest.Pool(t, db.ServiceURL), []authn.MasterKey{masterKey(t, "a")})
	s := newServer(store, func(w http.ResponseWriter, r *http.Request) error {
		exec(t, pool, `ALTER TABLE rescind.idempotency RENAME TO gone`)
		return JSON(w, 201, "done")
	})
	if got := s.send(t, sent{key: "k"}); got.Code != 201 || got.err == nil {
		t.Errorf("%d, log has %v, want what was done, and a word in the log", got.Code, got.err)
	}
	if got := s.send(t, sent{key: "k"}); got.Code != 500 || got.err == nil || s.runs.Load() != 1 {
		t.Errorf("%d, log has %v, done %d times", got.Code, got.err, s.runs.Load())
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	store := NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "a")})
	one, two := [32]byte{1}, [32]byte{2}
	begin := func(key string, fingerprint [32]byte) Earlier {
		t.Helper()
		e, err := store.Begin(t.Context(), "c", "POST", "/p", key, fingerprint)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	finish := func(key string, status int, body string) {
		t.Helper()
		if err := store.Finish(t.Context(), "c", "POST", "/p", key, status, http.Header{"A": {"b"}}, []byte(body)); err != nil {
			t.Fatal(err)
		}
	}
	age := func(key, by string) {
		t.Helper()
		if exec(t, pool, `UPDATE rescind.idempotency SET begun_at = begun_at - $2::interval WHERE key = $1`, key, by) != 1 {
			t.Fatalf("no row for %s", key)
		}
	}
	check := func(what string, got, want Earlier) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	begun, running, mismatch := Earlier{Begun: true}, Earlier{Running: true}, Earlier{Mismatch: true}
	answered := func(body string) Earlier {
		return Earlier{Status: 201, Header: http.Header{"A": {"b"}}, Body: []byte(body)}
	}

	check("first", begin("k", one), begun)
	check("at once", begin("k", one), running)
	check("other at once", begin("k", two), mismatch)
	age("k", "59 s")
	check("a minute later, nearly", begin("k", one), running)
	age("k", "2 s")
	check("other, of one that died", begin("k", two), mismatch)
	check("after one that died", begin("k", one), begun)
	check("taken over", begin("k", one), running)
	finish("k", 201, "x")
	finish("k", 201, "late") // by the one that was taken for dead
	finish("k", 0, "")
	check("answered", begin("k", one), answered("x"))
	check("other", begin("k", two), mismatch)
	age("k", "23 h 58 min")
	check("a day later, nearly", begin("k", one), answered("x"))
	age("k", "2 min")
	check("a day later", begin("k", two), begun)
	finish("k", 0, "")
	check("given up", begin("k", one), begun)

	finish("k", 201, "")
	check("empty", begin("k", one), Earlier{Status: 201, Header: http.Header{"A": {"b"}}})
	begin("l", one)
	finish("l", 201, "y")
	exec(t, pool, `UPDATE rescind.idempotency SET body = (SELECT body FROM rescind.idempotency WHERE key = 'l') WHERE key = 'k'`)
	if e, err := store.Begin(t.Context(), "c", "POST", "/p", "k", one); err == nil {
		t.Errorf("%+v, want another row's body refused", e)
	}
	other := NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "b")})
	if e, err := other.Begin(t.Context(), "c", "POST", "/p", "l", one); err == nil {
		t.Errorf("%+v, want what another master key has sealed refused", e)
	}
}

// Of many requests at once with one key, in two processes, one is done.
func TestAnswersAtOnce(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	stores := []*Answers{
		NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "a")}), NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "a")}),
	}
	for round := range 5 {
		var begun atomic.Int64
		var group sync.WaitGroup
		for i := range 8 {
			group.Go(func() {
				e, err := stores[i%2].Begin(t.Context(), "c", "POST", "/p", fmt.Sprint(round), [32]byte{})
				if err != nil || e.Begun == e.Running {
					t.Errorf("%+v, %v", e, err)
				}
				if e.Begun {
					begun.Add(1)
				}
			})
		}
		group.Wait()
		if n := begun.Load(); n != 1 {
			t.Errorf("%d have begun, want 1", n)
		}
	}
}

func TestAnswersAreForgotten(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	exec(t, pool, `
INSERT INTO rescind.idempotency (caller, method, path, key, fingerprint, begun_at)
SELECT 'c', 'POST', '/p', n::text, decode(repeat('00', 32), 'hex'), clock_timestamp() - interval '1 h' * n FROM generate_series(1, 524) AS n`)
	store := NewIdempotencyStore(pool, []authn.MasterKey{masterKey(t, "a")})
	for n := range trimEvery + 1 {
		if _, err := store.Begin(t.Context(), "c", "POST", "/q", fmt.Sprint(n), [32]byte{}); err != nil {
			t.Fatal(err)
		}
		var left int64 = 524
		switch n {
		case 0, trimEvery - 1:
			left -= trimRows
		case trimEvery:
			left = 23
		default:
			continue
		}
		if got := exec(t, pool, `SELECT FROM rescind.idempotency WHERE path = '/p'`); got != left {
			t.Errorf("%d are left after %d requests, want %d", got, n+1, left)
		}
	}
}
