package authn

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func prefixes(texts ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, s := range texts {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func (m *memory) status(authorization string) int {
	w, _ := m.answer(postForm("token=t", "Authorization", authorization))
	return w.Code
}

func TestClientIsReadOnceInItsFreshness(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{Freshness: 10 * time.Second})
		m.gate = make(chan struct{})
		var group sync.WaitGroup
		for range 50 {
			group.Go(func() {
				if code := m.status(basicOne); code != 200 {
					t.Errorf("status %d", code)
				}
			})
		}
		synctest.Wait()
		close(m.gate)
		group.Wait()
		time.Sleep(9 * time.Second)
		m.status(basicOne)
		if n := m.reads.Load(); n != 1 {
			t.Errorf("%d reads, want 1", n)
		}
		delete(m.rows, "app one")
		time.Sleep(2 * time.Second)
		if code := m.status(basicOne); code != 401 {
			t.Errorf("status %d after the client was removed, want 401", code)
		}
	})
}

func TestNewSecretWorksAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{})
		if code := m.status(basicTwo); code != 200 {
			t.Fatalf("status %d", code)
		}
		time.Sleep(recheckAge + 1)
		m.add("app-2", methodPost, "Secret-2", "new")
		if code := m.status(basicOf("app-2:new")); code != 200 {
			t.Errorf("status %d with the new secret, want 200", code)
		}
	})
}

func TestDatabaseAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{MaxStale: time.Minute})
		if code := m.status(basicOne); code != 200 {
			t.Fatalf("status %d", code)
		}
		m.down.Store(true)
		time.Sleep(30 * time.Second)
		for range 10 {
			if code := m.status(basicOne); code != 200 {
				t.Errorf("status %d for a client that was seen, want 200", code)
			}
		}
		if n := m.reads.Load(); n != 2 {
			t.Errorf("%d reads, want 2: one that worked, and one try", n)
		}
		if code := m.status(basicTwo); code != 503 {
			t.Errorf("status %d for a client that was not seen, want 503", code)
		}
		if code := m.status(basicOf("app+one:x")); code != 503 {
			t.Errorf("status %d for a wrong secret that may be new, want 503", code)
		}
		time.Sleep(31 * time.Second)
		if code := m.status(basicOne); code != 503 {
			t.Errorf("status %d after MaxStale, want 503", code)
		}
		m.down.Store(false)
		if code := m.status(basicOne); code != 200 {
			t.Errorf("status %d when the database is back, want 200", code)
		}
	})
}

func TestSlowDatabase(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{LookupTimeout: time.Second, MaxLookups: 1})
		m.clients.read = func(ctx context.Context, _ []string) (map[string]*clientRow, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		var group sync.WaitGroup
		for range 20 { // one place for all of them
			for _, id := range []string{"a", "b", "c"} {
				group.Go(func() {
					if code := m.status(basicOf(id + ":x")); code != 503 {
						t.Errorf("status %d, want 503", code)
					}
				})
			}
		}
		group.Wait()
		if took := time.Since(start); took != time.Second {
			t.Errorf("answered after %s, want LookupTimeout", took)
		}
	})
}

// A caller that goes away does not take the row from those who wait with it.
func TestCallerGoesAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{})
		m.gate = make(chan struct{})
		ctx, leave := context.WithCancel(t.Context())
		gone, stays := make(chan error, 1), make(chan error, 1)
		go func() {
			_, _, err := m.clients.get(ctx, "app one")
			gone <- err
		}()
		synctest.Wait()
		go func() {
			_, _, err := m.clients.get(t.Context(), "app one")
			stays <- err
		}()
		synctest.Wait()
		leave()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("the one who left got %v, want its context's error", err)
		}
		m.gate <- struct{}{}
		if err := <-stays; err != nil {
			t.Errorf("the one who stayed got %v", err)
		}
	})
}

// A read that began before a change must not be remembered after it.
func TestForgetDuringRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{})
		m.gate = make(chan struct{}, 1)
		var group sync.WaitGroup
		group.Go(func() { _ = m.status(basicOne) })
		synctest.Wait()
		m.clients.forget("app one")
		m.gate <- struct{}{}
		group.Wait()
		close(m.gate)
		_ = m.status(basicOne)
		if n := m.reads.Load(); n != 2 {
			t.Errorf("%d reads, want 2", n)
		}
	})
}

// Who waits for a turn to ask is asked for by the first that gets it.
func TestLookupsShareAQuestion(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{MaxLookups: 1})
		m.gate = make(chan struct{})
		var group sync.WaitGroup
		ask := func(id string) {
			group.Go(func() {
				if row, _, err := m.clients.get(t.Context(), id); err != nil || (row == noClient) == (m.rows[id] != nil) {
					t.Errorf("%s: %v, %v", id, row, err)
				}
			})
		}
		ask("app one")
		synctest.Wait() // it asks
		for i := range 3*maxBatch - 2 {
			ask(fmt.Sprint("nobody ", i))
		}
		ask("app-2")
		ask("spa-1")
		synctest.Wait()
		close(m.gate)
		group.Wait()
		if n, of := m.queries.Load(), m.reads.Load(); n != 4 || of != 3*maxBatch+1 {
			t.Errorf("%d questions for %d rows, want 4 for %d", n, of, 3*maxBatch+1)
		}
	})
}

// Rows in use are read again on the way, before anybody has to wait for them, and never
// used for longer than their freshness.
func TestRowsInUseRideAlong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{Freshness: 10 * time.Second})
		use := func(authorization string) {
			t.Helper()
			if code := m.status(authorization); code != 200 {
				t.Errorf("status %d, want 200", code)
			}
		}
		check := func(when string, queries, reads int64) {
			t.Helper()
			if n, of := m.queries.Load(), m.reads.Load(); n != queries || of != reads {
				t.Errorf("%s: %d questions for %d rows, want %d for %d", when, n, of, queries, reads)
			}
		}
		idle := postForm("client_id=spa-1")
		m.answer(idle)
		use(basicOne)
		check("at first", 2, 2)
		time.Sleep(6 * time.Second)
		use(basicOne)
		use(basicOne)
		check("in its second half", 2, 2)
		use(basicTwo)
		check("when another is read", 3, 4)
		time.Sleep(6 * time.Second)
		use(basicOne)
		check("when it would have been too old", 3, 4)
		time.Sleep(5 * time.Second)
		delete(m.rows, "app one")
		if code := m.status(basicOne); code != 401 {
			t.Errorf("status %d for a client that was removed, want 401", code)
		}
	})
}

// A ride along that began before a change must not be remembered after it, and one that
// fails takes nothing away.
func TestRideAlong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{Freshness: 10 * time.Second})
		m.status(basicOne)
		m.status(basicTwo)
		time.Sleep(6 * time.Second)
		m.status(basicOne)
		m.status(basicTwo)
		m.down.Store(true)
		if code := m.status(basicOf("nobody:x")); code != 503 {
			t.Fatalf("status %d, want 503", code)
		}
		for _, authorization := range []string{basicOne, basicTwo} {
			if code := m.status(authorization); code != 200 {
				t.Errorf("status %d after a read that failed, want 200", code)
			}
		}
		m.down.Store(false)
		m.gate = make(chan struct{})
		var group sync.WaitGroup
		group.Go(func() { m.status(basicOf("nobody:x")) })
		synctest.Wait() // the others ride along
		m.clients.forget("app one")
		close(m.gate)
		group.Wait()
		before := m.reads.Load()
		time.Sleep(5 * time.Second)
		m.status(basicTwo)
		if n := m.reads.Load() - before; n != 0 {
			t.Errorf("%d reads of a row that rode along, want 0", n)
		}
		m.status(basicOne)
		if n := m.reads.Load() - before; n != 1 {
			t.Errorf("%d reads of a row that was forgotten meanwhile, want 1", n)
		}
	})
}

// One who waits for his turn waits for no longer than the timeout, and the one who has it
// takes nobody along who has left.
func TestWaitForATurnIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newMemory(t, Config{LookupTimeout: time.Second, MaxLookups: 1})
		m.clients.slots <- struct{}{}
		start := time.Now()
		if code := m.status(basicOne); code != 503 || time.Since(start) != time.Second {
			t.Errorf("status %d after %s, want 503 after LookupTimeout", code, time.Since(start))
		}
		<-m.clients.slots
		if code := m.status(basicTwo); code != 200 {
			t.Errorf("status %d, want 200", code)
		}
		if n := m.reads.Load(); n != 1 || len(m.clients.waiting) != 0 {
			t.Errorf("%d rows read, %d still waiting, want 1 and none", n, len(m.clients.waiting))
		}
	})
}

// Rows that are pushed out before they are read again leave no more behind than there are.
func TestDueIsBounded(t *testing.T) {
	t.Parallel()
	m := newMemory(t, Config{CacheSize: 100})
	c := m.clients
	for i := range 200 {
		id := fmt.Sprint("id", i)
		c.entries.Add(id, entry[*clientRow]{value: noClient, read: time.Now().Add(-c.freshness * 3 / 4)})
		for range 2 {
			if _, waited, err := c.get(t.Context(), id); waited || err != nil {
				t.Fatalf("%t, %v", waited, err)
			}
		}
		if n := len(c.due); n != min(i+1, 100) {
			t.Fatalf("%d are due after %d rows, want one each, and at most CacheSize", n, i+1)
		}
	}
	c.entries.Add("id5", entry[*clientRow]{value: noClient, read: time.Now()}) // is back, and new
	_, _, _ = c.get(t.Context(), "app-2")
	if n := m.reads.Load(); n != 1 || len(c.due) != 0 {
		t.Errorf("%d rows read and %d due, want none to ride along", n, len(c.due))
	}
}

// The places to hash passwords are all taken, and clients get in.
func TestNoSlowHashInTheWayOfClients(t *testing.T) {
	t.Parallel()
	m := newMemory(t, Config{Issuer: memoryIssuer, LookupTimeout: 100 * time.Millisecond})
	m.addKeys("jwt-1", memoryIssuer, jwksOf(publicKey("", "", ecTestKey().Public())))
	for range cap(m.verified.slots) {
		m.verified.slots <- struct{}{}
	}
	jwt := assertionForm(sign("ES256", ecTestKey(), nil, claimsOf("jwt-1")))
	for name, r := range map[string]*http.Request{
		"basic": postForm("", "Authorization", basicOne), "post": postForm("client_id=app-2&client_secret=Secret-2"),
		"public": postForm("client_id=spa-1"), "assertion": postForm(jwt),
	} {
		if w, _ := m.answer(r); w.Code != 200 {
			t.Errorf("%s: status %d, want 200", name, w.Code)
		}
	}
	if w, _ := m.answer(postForm("", "Authorization", basicWrong)); w.Code != 401 {
		t.Errorf("status %d for a wrong secret, want 401", w.Code)
	}
}

// To refuse an unknown id takes the same steps as to refuse a wrong secret, so
// that time does not tell them apart.
func TestRefusalsTakeTheSameSteps(t *testing.T) {
	t.Parallel()
	type steps struct {
		reads    int64
		compares int
		body     string
	}
	count := func(authorization string) steps {
		var s steps
		synctest.Test(t, func(t *testing.T) {
			m := newMemory(t, Config{})
			m.add("two secrets", methodBasic, "a", "b")
			equal := m.secrets.equal
			m.secrets.equal = func(x, y []byte) int { s.compares++; return equal(x, y) }
			for range 3 { // unseen, remembered, and remembered for too long to refuse
				w, _ := m.answer(postForm("", "Authorization", authorization))
				if w.Code != 401 {
					t.Fatalf("status %d, want 401", w.Code)
				}
				s.body = w.Body.String()
				time.Sleep(recheckAge * 2 / 3)
			}
			s.reads = m.reads.Load()
		})
		return s
	}
	want := count(basicWrong)
	if want.compares < 6 || want.reads != 2 {
		t.Fatalf("%+v, want two reads and two comparisons a time", want)
	}
	for name, authorization := range map[string]string{
		"unknown id": basicOf("nobody:wrong"), "one of two secrets": basicOf("two secrets:wrong"),
		"public client": basicOf("spa-1:wrong"), "empty secret": basicOf("app-2:"), "much of it right": basicOf("app-2:Secret-3"),
	} {
		if got := count(authorization); got != want {
			t.Errorf("%s: %+v, want %+v as for a wrong secret", name, got, want)
		}
	}
}

func TestSecretHasher(t *testing.T) {
	t.Parallel()
	old, current := testKey(t, "o"), testKey(t, "n")
	h := newSecretHasher([]MasterKey{current, old})
	now := time.Now()
	stored := [maxSecrets]storedSecret{
		{usable: true, key: 1, mac: h.mac(1, "c", "first")},
		{usable: true, key: 0, mac: h.mac(0, "c", "second"), expires: now.Add(time.Second)},
	}
	tests := []struct {
		name, id, secret string
		at               time.Time
		want             bool
	}{
		{"under the old key", "c", "first", now, true},
		{"under the current key", "c", "second", now, true},
		{"expired", "c", "second", now.Add(time.Second), false},
		{"wrong", "c", "third", now, false},
		{"of another client", "d", "first", now, false},
		{"moved between id and secret", "c\x00first", "", now, false},
		{"empty", "c", "", now, false},
	}
	for _, tt := range tests {
		if got := h.matches(&stored, tt.id, tt.secret, tt.at); got != tt.want {
			t.Errorf("%s: %t, want %t", tt.name, got, tt.want)
		}
	}
	if h.matches(&[maxSecrets]storedSecret{}, "c", "", now) {
		t.Error("an empty secret matches where there is none")
	}
}

func TestGeneratedSecret(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	for range 100 {
		s := newSecret()
		if strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~") != "" || len(s) != 43 {
			t.Fatalf("%q is not 256 bits in characters that form-encoding leaves alone", s)
		}
		seen[s] = true
	}
	if len(seen) != 100 {
		t.Error("a secret came twice")
	}
}
