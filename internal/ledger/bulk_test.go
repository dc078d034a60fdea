package ledger

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// storedRowsSQL counts what revocations leave.
const storedRowsSQL = `SELECT (SELECT count(*) FROM rescind.revocations) + (SELECT count(*) FROM rescind.log)
	+ (SELECT count(*) FROM rescind.audit) + (SELECT count(*) FROM rescind.endings)`

func TestRevokeAllIsAllOrNothing(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	badTarget, badTenant := request("\n"), request("b")
	badTenant.Tenant = revocation.Tenant{ID: 4711, Domain: "nobody.example"}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	isInvalid := func(err error) bool { _, ok := errors.AsType[*revocation.InvalidError](err); return ok }
	isRefused := func(err error) bool {
		_, ok := errors.AsType[*pgconn.PgError](err)
		return ok && !errors.Is(err, ErrUnavailable)
	}
	for name, tt := range map[string]struct {
		ctx      context.Context
		requests []Request
		want     func(error) bool
	}{
		"bad target":            {t.Context(), []Request{request("a"), badTarget, request("c")}, isInvalid},
		"bad row":               {t.Context(), []Request{request("a"), badTenant, request("c")}, isRefused},
		"too many":              {t.Context(), make([]Request, MaxBulk+1), isInvalid},
		"a caller that is gone": {gone, []Request{request("a")}, func(err error) bool { return err == context.Canceled }},
	} {
		if _, err := l.RevokeAll(tt.ctx, tt.requests); err == nil || !tt.want(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := count(t, l, storedRowsSQL); n != 0 {
		t.Errorf("%d rows are left", n)
	}
	if results, err := l.RevokeAll(t.Context(), nil); len(results) != 0 || err != nil {
		t.Errorf("none: %v, %v", results, err)
	}
}

func TestRevokeAllOfMany(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	const known = 100
	var before, all []Request
	for i := range MaxBulk - 1 {
		r := request(fmt.Sprintf("jti-%05d", (i*7919)%MaxBulk)) // 7919 and MaxBulk have no common divisor
		if i%100 == 0 {
			r.Target.Kind = revocation.KindSubject
		}
		all = append(all, r)
		if i%100 == 1 {
			before = append(before, r)
		}
	}
	all = append(all, all[0]) // a repeat
	first, err := l.RevokeAll(t.Context(), before)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	results, err := l.RevokeAll(t.Context(), all)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d revocations took %s", len(all), time.Since(began))
	events := allEvents(t, l)
	if want := MaxBulk - 1; len(events) != want || len(first) != known {
		t.Fatalf("%d events, want %d", len(events), want)
	}
	ids := make(map[revocation.Seq]string)
	for i, e := range events {
		if e.Seq != revocation.Seq(i+1) || e.Previous != revocation.Seq(i) {
			t.Fatalf("event %d has seq %d and previous %d", i+1, e.Seq, e.Previous)
		}
		rev, err := e.Revocation()
		if err != nil {
			t.Fatal(err)
		}
		ids[e.Seq] = rev.Target.ID + rev.ID
	}
	for i, r := range results {
		switch {
		case i%100 == 1 && i < MaxBulk-1:
			if want := (Result{ID: first[i/100].ID, Seq: MaxBulk - 1}); r != want {
				t.Errorf("result %d of a target that was revoked before is %+v, want %+v", i, r, want)
			}
		case !r.Added || ids[r.Seq] != all[i].Target.ID+r.ID:
			t.Errorf("result %d is %+v, its event is about %s", i, r, ids[r.Seq])
		}
	}
	again, err := l.RevokeAll(t.Context(), all[1:100])
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range again {
		if want := (Result{ID: results[i+1].ID, Seq: MaxBulk - 1}); r != want {
			t.Errorf("result %d of a repeat is %+v, want %+v", i, r, want)
		}
	}
}

// Single revocations, as many as there may be when something was stolen, do not wait for a bulk.
func TestManyRevokeOne(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	if err := l.bulks.enter(t.Context()); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			results, err := l.RevokeAll(t.Context(), []Request{request(fmt.Sprint(i))})
			if err != nil || !results[0].Added {
				t.Errorf("revocation %d: %+v, %v", i, results, err)
			}
		})
	}
	wg.Wait()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	many := make([]Request, l.cfg.MaxBatch+1)
	for i := range many {
		many[i] = request(fmt.Sprint("many-", i))
	}
	if _, err := l.RevokeAll(gone, many); !errors.Is(err, context.Canceled) {
		t.Errorf("a bulk beside another: %v", err)
	}
}

// A commit whose connection breaks may have been made.
func TestRevokeAllInDoubt(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	l := open(t, pool, Config{})
	owner, err := pgx.Connect(t.Context(), ownerOf(t, pool))
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close(t.Context())
	_, err = owner.Exec(t.Context(), `
		CREATE FUNCTION rescind.die() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
			AS $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
		CREATE CONSTRAINT TRIGGER die AFTER INSERT ON rescind.log DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION rescind.die()`)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.RevokeAll(t.Context(), []Request{request("a")}); !errors.Is(err, ErrUnavailable) || !errors.Is(err, ErrDoubt) {
		t.Errorf("RevokeAll: %v, want ErrUnavailable and ErrDoubt", err)
	}
	if _, err := owner.Exec(t.Context(), `DROP TRIGGER die ON rescind.log`); err != nil {
		t.Fatal(err)
	}
	results, err := l.RevokeAll(t.Context(), []Request{request("a")})
	if err != nil || !results[0].Added {
		t.Errorf("after it: %+v, %v", results, err)
	}
}

// Bulks, group commits and changes of the same targets, and tokens that are remembered
// meanwhile, from two processes.
func TestBulksBesideOthers(t *testing.T) {
	t.Parallel()
	pool := keyManagers(t)
	var requests []Request
	for i := range 120 {
		r := request(fmt.Sprintf("shared-%d", i))
		if kind := revocation.Kinds[i%len(revocation.Kinds)]; kind != revocation.KindTenant {
			r.Target.Kind = kind
		}
		requests = append(requests, r)
	}
	shuffled := func(add int) []Request {
		var all []Request
		for _, i := range rand.Perm(len(requests)) {
			r := requests[i]
			r.Exp += int64(add)
			all = append(all, r)
		}
		return all
	}
	var wg sync.WaitGroup
	for range 2 {
		l := open(t, pool, Config{MaxBatch: 32})
		run(t, l)
		wg.Go(func() {
			for i := range 8 {
				if _, err := l.RevokeAll(t.Context(), shuffled(i)); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			for i := range 8 {
				_, err := l.Change(t.Context(), func(_ context.Context, tx *Tx) error {
					tx.Revoke(shuffled(i)...)
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
		for range 2 {
			wg.Go(func() {
				for _, r := range shuffled(4) {
					mustRevoke(t, l, r)
				}
			})
		}
		wg.Go(func() {
			for i := range 50 {
				token := Issued{JTI: uuid.NewString(), Iss: iss, ClientID: fmt.Sprintf("shared-%d", i), Subject: fmt.Sprintf("shared-%d", i+1), Exp: leap}
				if err := l.Remember(t.Context(), token); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	l := open(t, pool, Config{})
	for i, e := range allEvents(t, l) {
		if e.Seq != revocation.Seq(i+1) || e.Previous != revocation.Seq(i) {
			t.Fatalf("event %d has seq %d and previous %d", i+1, e.Seq, e.Previous)
		}
	}
	if n := count(t, l, `SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()`); n != 0 {
		t.Errorf("%d deadlocks", n)
	}
}
