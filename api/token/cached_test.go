package token

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// source is where keys are loaded from.
type source struct {
	t     *testing.T
	delay time.Duration // of each load

	mu    sync.Mutex
	kids  []string
	err   error
	loads int
	block chan struct{} // loads wait for it, if there is one
}

func (s *source) load(ctx context.Context) (*StaticKeySet, error) {
	s.mu.Lock()
	s.loads++
	kids, err, block := s.kids, s.err, s.block // as they were when the load began
	s.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err := sleep(ctx, s.delay); err != nil {
		return nil, err
	}
	if err != nil {
		return nil, err
	}
	set := &StaticKeySet{byID: map[string]Key{}}
	for _, kid := range kids {
		set.byID[kid] = Key{id: kid, public: &rsaTestKey().PublicKey}
		set.all = append(set.all, set.byID[kid])
	}
	return set, nil
}

func (s *source) serve(kids ...string) { s.set(nil, kids...) }

func (s *source) fail() { s.set(errors.New("connection refused")) }

func (s *source) set(err error, kids ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kids, s.err = kids, err
}

// expectLoads checks how many loads there were since the last call.
func (s *source) expectLoads(want int) {
	s.t.Helper()
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.loads != want {
		s.t.Errorf("%d loads, want %d", s.loads, want)
	}
	s.loads = 0
}

// bubble runs a test in virtual time: time passes at once while all wait.
func bubble(t *testing.T, cfg CacheConfig, test func(t *testing.T, s *source, keys *CachedKeySet)) {
	t.Helper()
	rsaTestKey() // not in virtual time
	synctest.Test(t, func(t *testing.T) {
		s := &source{t: t, delay: 100 * time.Millisecond}
		test(t, s, NewCachedKeySet(cfg, s.load))
		synctest.Wait()
	})
}

func expect(t *testing.T, keys KeySet, kid string, want error) {
	t.Helper()
	if _, err := keys.Key(t.Context(), kid, "RS256"); !errors.Is(err, want) {
		t.Errorf("key %q: %v, want %v", kid, err, want)
	}
}

func TestCachedKeyNeedsNoLoad(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.serve("a")
		s.expectLoads(0)
		for range 1000 {
			expect(t, keys, "a", nil)
		}
		s.expectLoads(1)
	})
}

func TestUnknownKeyIsProvenByALaterLoad(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.serve("a")
		expect(t, keys, "b", ErrUnknownKey) // the first load began after the call
		s.expectLoads(1)
		expect(t, keys, "b", ErrUnknownKey) // and this one, for a kid that it lacked
		s.expectLoads(1)
		for i := range 1000 { // what was loaded before a call proves nothing about it
			expect(t, keys, fmt.Sprint("b", i), ErrKeysUnavailable)
		}
		expect(t, keys, "a", nil)
		s.expectLoads(0)
		time.Sleep(30*time.Second - 200*time.Millisecond)
		expect(t, keys, "b", ErrKeysUnavailable)
		time.Sleep(200 * time.Millisecond)
		expect(t, keys, "b", ErrUnknownKey)
		s.expectLoads(1)
	})
}

func TestNewKeyIsFound(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.serve("a")
		expect(t, keys, "a", nil)
		s.serve("a", "b")
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { expect(t, keys, "b", nil) })
		}
		wg.Wait()
		s.expectLoads(2)
	})
}

// A load that was running when a verification began may find its key, but that
// it lacks the key proves nothing.
func TestRunningLoadProvesNothing(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.serve("a")
		expect(t, keys, "a", nil)
		s.serve("a", "b")
		var wg sync.WaitGroup
		wg.Go(func() { expect(t, keys, "x", ErrUnknownKey) }) // begins the load
		time.Sleep(50 * time.Millisecond)                     // half of it
		s.serve("a", "b", "c")
		wg.Go(func() { expect(t, keys, "b", nil) })
		wg.Go(func() { expect(t, keys, "c", ErrKeysUnavailable) })
		wg.Wait()
		s.expectLoads(2)
	})
}

func TestUnavailableKeysProveNothing(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.fail()
		var wg sync.WaitGroup
		for i := range 50 {
			wg.Go(func() { expect(t, keys, fmt.Sprint(i), ErrKeysUnavailable) })
		}
		wg.Wait()
		expect(t, keys, "a", ErrKeysUnavailable)
		s.expectLoads(1)
		s.serve("a")
		time.Sleep(retryInterval)
		expect(t, keys, "a", nil)
		expect(t, keys, "b", ErrUnknownKey)
		s.expectLoads(2)
		s.fail()
		time.Sleep(30 * time.Second)
		expect(t, keys, "b", ErrKeysUnavailable)
		expect(t, keys, "a", nil)
		s.expectLoads(1)
	})
}

func TestOldKeys(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.serve("a")
		expect(t, keys, "a", nil)
		s.expectLoads(1)

		s.serve("b")
		time.Sleep(6 * time.Minute)
		expect(t, keys, "a", nil) // nobody waits for the load that this begins
		s.expectLoads(1)
		time.Sleep(time.Second)
		expect(t, keys, "a", ErrUnknownKey)
		s.expectLoads(1)

		s.serve("c")
		time.Sleep(11 * time.Minute)
		expect(t, keys, "b", ErrUnknownKey) // too old to be used without a try
		expect(t, keys, "c", nil)
		s.expectLoads(1)

		s.fail()
		time.Sleep(11 * time.Minute)
		expect(t, keys, "c", nil)
		s.expectLoads(1)
		for range 10 { // in no hurry, and nobody waits for loads that fail
			time.Sleep(retryInterval + s.delay) // from the end of a load
			start := time.Now()
			expect(t, keys, "c", nil)
			expect(t, keys, "c", nil)
			if waited := time.Since(start); waited > 0 {
				t.Errorf("waited %s for a load that fails", waited)
			}
		}
		s.expectLoads(10)

		time.Sleep(24*time.Hour - 23*time.Minute)
		expect(t, keys, "c", nil)
		time.Sleep(time.Hour)
		expect(t, keys, "c", ErrKeysUnavailable)
		s.expectLoads(2)
		s.serve("c")
		time.Sleep(retryInterval)
		expect(t, keys, "c", nil)
	})
}

func TestPatienceProvesAtABoundedRate(t *testing.T) {
	t.Parallel()
	cfg := CacheConfig{Refetch: 50 * time.Millisecond, Patience: time.Second}
	bubble(t, cfg, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.delay = time.Millisecond
		s.serve("a")
		expect(t, keys, "a", nil)
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				for j := range 20 {
					expect(t, keys, fmt.Sprintf("%d-%d", i, j), ErrUnknownKey)
				}
			})
		}
		start := time.Now()
		wg.Wait()
		loads := int(time.Since(start)/(50*time.Millisecond)) + 1
		s.expectLoads(1 + loads)
		if loads > 25 {
			t.Errorf("%d loads for 20 rounds of 100, want about 20", loads)
		}
	})
}

func TestLoadTimesOut(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.block = make(chan struct{})
		start := time.Now()
		_, err := keys.Key(t.Context(), "a", "RS256")
		if !errors.Is(err, ErrKeysUnavailable) || !strings.Contains(err.Error(), "not done within 5s") {
			t.Errorf("Key = %v, want %v with its cause", err, ErrKeysUnavailable)
		}
		if waited := time.Since(start); waited != 5*time.Second {
			t.Errorf("waited %s, want 5s", waited)
		}
	})
}

// While a server hangs, what anybody can invent takes no more than so many places, and the next load
// is as far off as after any other; keys that are held are used all the while.
func TestWaitersAreBounded(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.block = make(chan struct{}) // until the load times out
		crowd := func(kid string) (waited, turnedAway int) {
			t.Helper()
			var wg sync.WaitGroup
			var mu sync.Mutex
			for range 3 * maxWaiting {
				wg.Go(func() {
					start := time.Now()
					expect(t, keys, kid, ErrKeysUnavailable)
					mu.Lock()
					defer mu.Unlock()
					if time.Since(start) == 0 {
						turnedAway++
					} else {
						waited++
					}
				})
			}
			wg.Wait()
			return waited, turnedAway
		}
		if waited, away := crowd("a"); waited != maxWaiting || away != 2*maxWaiting {
			t.Errorf("without keys %d waited and %d were turned away", waited, away)
		}
		time.Sleep(retryInterval - time.Millisecond)
		if waited, _ := crowd("a"); waited != 0 {
			t.Errorf("%d waited for a load sooner than %s after one that took as long", waited, retryInterval)
		}
		s.expectLoads(1)
		s.serve("a")
		block := s.block
		s.block = nil
		time.Sleep(time.Millisecond)
		expect(t, keys, "a", nil)
		s.expectLoads(1)

		time.Sleep(time.Minute) // the next load for an unknown kid is due
		s.block = block
		var wg sync.WaitGroup
		wg.Go(func() {
			if waited, away := crowd("invented"); waited != maxWaiting || away != 2*maxWaiting {
				t.Errorf("for an unknown kid %d waited and %d were turned away", waited, away)
			}
		})
		synctest.Wait()
		start := time.Now()
		expect(t, keys, "a", nil)
		if waited := time.Since(start); waited != 0 {
			t.Errorf("a key that is held took %s", waited)
		}
		wg.Wait()
		s.expectLoads(1)
	})
}

// Keys that are old before their load has ended are not loaded again and again.
func TestRefreshIsNotShorterThanALoad(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{Refresh: time.Millisecond, Refetch: time.Nanosecond}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.serve("a")
		s.delay = 4 * time.Second
		start := time.Now()
		expect(t, keys, "a", nil)
		expect(t, keys, "a", nil)
		if waited := time.Since(start); waited != s.delay {
			t.Errorf("waited %s, want one load of %s", waited, s.delay)
		}
		s.expectLoads(1)
	})
}

// A caller that goes away neither waits on nor ends the load that others wait for.
func TestCallerGoesAway(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.serve("a")
		s.block = make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := keys.Key(ctx, "a", "RS256"); !errors.Is(err, ErrKeysUnavailable) || !errors.Is(err, context.Canceled) {
				t.Errorf("Key = %v, want %v for its context", err, ErrKeysUnavailable)
			}
		})
		synctest.Wait()
		wg.Go(func() { expect(t, keys, "a", nil) })
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(s.block)
		wg.Wait()
		s.expectLoads(1)
	})
}

// What a load says about a document is never taken for a word on a token.
func TestLoadErrorProvesNothing(t *testing.T) {
	t.Parallel()
	bubble(t, CacheConfig{}, func(t *testing.T, s *source, keys *CachedKeySet) {
		s.set(ErrMalformed)
		_, err := keys.Key(t.Context(), "a", "RS256")
		if !errors.Is(err, ErrKeysUnavailable) || errors.Is(err, ErrInvalid) {
			t.Errorf("Key = %v, want %v alone", err, ErrKeysUnavailable)
		}
		if got := Reason(err); got != "keys_unavailable" {
			t.Errorf("Reason = %q", got)
		}
	})
}

func TestLogsChangesOnly(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	bubble(t, CacheConfig{Logger: logger}, func(t *testing.T, s *source, keys *CachedKeySet) {
		for _, fail := range []bool{true, true, true, false, false, true, true, false} {
			if fail {
				s.fail()
			} else {
				s.serve("a")
			}
			time.Sleep(10 * time.Minute)
			_, _ = keys.Current(t.Context())
		}
	})
	if got := strings.Count(log.String(), "cannot be loaded"); got != 2 {
		t.Errorf("%d lines about failing, want 2:\n%s", got, &log)
	}
	if got := strings.Count(log.String(), "can be loaded again"); got != 2 {
		t.Errorf("%d lines about working again, want 2:\n%s", got, &log)
	}
}

// An issuer that names no kid has one key, which may have another in its place since
// it was loaded: its tokens are not taken for forged.
func TestRotationWithoutKid(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		current := keySet(t, public("a", "RS256", &rsaTestKey().PublicKey))
		keys := NewCachedKeySet(CacheConfig{}, func(context.Context) (*StaticKeySet, error) { return current, nil })
		v := verifier(t, Issuer{Iss: iss, Keys: keys})
		payload := fmt.Sprintf(`{"iss":%q}`, iss)
		if _, err := v.Verify(t.Context(), sign(t, "RS256", rsaTestKey(), nil, payload)); err != nil {
			t.Fatal(err)
		}
		current = keySet(t, public("b", "RS256", &otherRSAKey().PublicKey))
		rotated := sign(t, "RS256", otherRSAKey(), nil, payload)
		if _, err := v.Verify(t.Context(), rotated); err != nil {
			t.Errorf("signed with the new key: %v", err)
		}
		forged := sign(t, "RS256", rsaTestKey(), nil, payload)
		if _, err := v.Verify(t.Context(), forged); !errors.Is(err, ErrKeysUnavailable) {
			t.Errorf("signed with no key of the issuer, and keys were fetched just now: %v, want ErrKeysUnavailable", err)
		}
		time.Sleep(time.Minute)
		if _, err := v.Verify(t.Context(), forged); !errors.Is(err, ErrSignature) {
			t.Errorf("signed with no key of keys fetched since: %v, want ErrSignature", err)
		}
	})
}
