package authn

import (
	"context"
	"errors"
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
		m.clients.read = func(ctx context.Context, _ string) (clientRow, error) {
			<-ctx.Done()
			return clientRow{}, ctx.Err()
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
			_, _, err := m.clients.get(ctx, "app one", time.Second)
			gone <- err
		}()
		synctest.Wait()
		go func() {
			_, _, err := m.clients.get(t.Context(), "app one", time.Second)
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
