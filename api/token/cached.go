package token

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// CacheConfig tunes a [CachedKeySet]. The zero value suits keys that another
// organisation serves.
type CacheConfig struct {
	// Refresh is the age at which keys are loaded anew, when they are next used.
	// Keys that their issuer withdrew are trusted about as long. Default 5 min; at
	// least Timeout, for else keys could be old before their load has ended.
	Refresh time.Duration
	// MaxAge is the age up to which keys are used while they cannot be loaded.
	// Default 24 h.
	MaxAge time.Duration
	// Refetch is the shortest time between two loads for the sake of kids that
	// are not known, so that invented ones put no load on whoever serves the
	// keys. Default 30 s.
	Refetch time.Duration
	// Patience is how long a verification waits until such a load is due; past
	// that it is told at once that the keys are unavailable. With it any number
	// wait for a load, without it a bounded one does: it is for those who bound
	// their callers, and need the proof. Default 0.
	Patience time.Duration
	// Timeout bounds one load. Default 5 s.
	Timeout time.Duration
	// Logger is told of keys that are not used, and when loading begins to fail
	// and works again. Default: nobody.
	Logger *slog.Logger
}

const (
	// retryInterval is the shortest time from the end of a load to one that only tries
	// for newer keys, or for any.
	retryInterval = 5 * time.Second
	// maxWaiting are who wait for a load at a time. Past it they are told at once that the
	// keys are unavailable: who waits holds a place elsewhere, anybody can invent what must
	// wait, and a server can be made to hang.
	maxWaiting = 64
)

var errCrowded = fmt.Errorf("%w: %d wait for them already", ErrKeysUnavailable, maxWaiting)

// CachedKeySet keeps an issuer's keys in memory and loads them anew when they
// are old, or when a kid is asked for that they lack. There is never more than
// one load at a time; those who need it wait for it together, 64 of them at most
// unless there is a Patience, and each only as long as its context lets it.
//
// A kid that is held takes no lock while the keys are young, and no waiting while
// their source is away.
type CachedKeySet struct {
	cfg  CacheConfig
	load func(context.Context) (*StaticKeySet, error)
	// loaded is called after a load that worked, once others can use its keys. Nil: nothing is.
	loaded func()
	file   *keyFile                 // nil: keys are not kept
	held   atomic.Pointer[heldKeys] // of the last load that worked; before, what was kept, or nil

	waiting atomic.Int32 // who wait for a load

	mu          sync.Mutex
	begun       uint64    // loads begun so far
	lastEnd     time.Time // of a load
	lastRefetch time.Time // when the last load for an unknown kid began
	running     *loading  // nil when none is
	failing     bool      // the last load failed
}

// heldKeys are what load number brought, which began at that time. Number 0 stands for what an
// earlier process kept: it is used without a wait for anything newer, at a start when there may
// be nothing to be had, and proves nothing.
type heldKeys struct {
	keys   *StaticKeySet
	number uint64
	at     time.Time
}

// loading is a load in progress. err is set before done is closed.
type loading struct {
	number uint64
	done   chan struct{}
	err    error
}

// NewCachedKeySet makes a key set of what load returns. Load is called in a
// goroutine of its own with a context that ends after cfg.Timeout; nothing is
// loaded before it is needed.
func NewCachedKeySet(cfg CacheConfig, load func(context.Context) (*StaticKeySet, error)) *CachedKeySet {
	for _, d := range []struct {
		value  *time.Duration
		preset time.Duration
	}{
		{&cfg.Refresh, 5 * time.Minute}, {&cfg.MaxAge, 24 * time.Hour},
		{&cfg.Refetch, 30 * time.Second}, {&cfg.Timeout, 5 * time.Second},
	} {
		if *d.value <= 0 {
			*d.value = d.preset
		}
	}
	cfg.Refresh = max(cfg.Refresh, cfg.Timeout)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &CachedKeySet{cfg: cfg, load: load}
}

// Key implements [KeySet].
func (s *CachedKeySet) Key(ctx context.Context, kid, alg string) (Key, error) {
	if h := s.held.Load(); h != nil && time.Since(h.at) < s.cfg.Refresh {
		if key, err := h.keys.Key(ctx, kid, alg); !errors.Is(err, ErrUnknownKey) {
			return key, err
		}
	}
	s.mu.Lock()
	seen := s.begun // whatever a later load lacks is proven to be unknown
	s.mu.Unlock()
	h, err := s.current(ctx)
	for err == nil {
		key, keyErr := h.keys.Key(ctx, kid, alg)
		if h.number > seen || !errors.Is(keyErr, ErrUnknownKey) {
			return key, keyErr
		}
		h, err = s.refetched(ctx, seen)
	}
	return Key{}, err
}

// renewed is Key from keys whose load began after the call. It is throttled as the
// search for an unknown kid is.
func (s *CachedKeySet) renewed(ctx context.Context, kid, alg string) (Key, error) {
	s.mu.Lock()
	seen := s.begun
	s.mu.Unlock()
	for {
		h, err := s.refetched(ctx, seen)
		if err != nil {
			return Key{}, err
		}
		if h.number > seen {
			return h.keys.Key(ctx, kid, alg)
		}
	}
}

// Held reports whether there are keys that [CachedKeySet.Key] would use now. It asks nobody,
// and begins no load.
func (s *CachedKeySet) Held() bool {
	h := s.held.Load()
	return h != nil && time.Since(h.at) < s.cfg.MaxAge
}

// Discard removes the file in which the keys are kept, see [RemoteConfig.File], and lets none be
// written again: for keys that are trusted no longer, so that no later start begins with them. The
// keys in memory stay. It waits for a disk that hangs.
func (s *CachedKeySet) Discard() {
	if s.file != nil {
		s.file.discard()
	}
}

// Current returns the keys as [CachedKeySet.Key] would use them, loading them
// first if there are none or if they are old. Its error is [ErrKeysUnavailable].
func (s *CachedKeySet) Current(ctx context.Context) (*StaticKeySet, error) {
	h, err := s.current(ctx)
	if err != nil {
		return nil, err
	}
	return h.keys, nil
}

// current returns keys that are not too old. Up to twice cfg.Refresh, and while
// loads fail, nobody waits for newer ones.
func (s *CachedKeySet) current(ctx context.Context) (*heldKeys, error) {
	for {
		h := s.held.Load()
		age := time.Duration(0)
		if h != nil {
			if age = time.Since(h.at); age < s.cfg.Refresh {
				return h, nil
			}
		}
		usable := h != nil && age < s.cfg.MaxAge

		s.mu.Lock()
		failing := s.failing
		l := s.running
		if l == nil && time.Since(s.lastEnd) >= min(retryInterval, s.cfg.Refetch) {
			l = s.begin()
		}
		s.mu.Unlock()

		switch {
		case usable && (l == nil || failing || h.number == 0 || age < 2*s.cfg.Refresh):
			return h, nil
		case l == nil:
			return nil, fmt.Errorf("%w: loading them has just failed", ErrKeysUnavailable)
		}
		if err := s.wait(ctx, l); err != nil && !usable {
			return nil, err
		} else if err != nil {
			return h, nil
		}
	}
}

// refetched returns what a load brought that was running, or else one that began
// just now for the sake of an unknown kid. A load that was among the first seen
// ones may fail: then it is the next one's turn.
func (s *CachedKeySet) refetched(ctx context.Context, seen uint64) (*heldKeys, error) {
	for {
		s.mu.Lock()
		l := s.running
		due := s.cfg.Refetch - time.Since(s.lastRefetch)
		if l == nil && due <= 0 {
			s.lastRefetch = time.Now()
			l = s.begin()
		}
		s.mu.Unlock()

		if l == nil {
			if due > s.cfg.Patience {
				return nil, fmt.Errorf("%w: it names a new one, and they were read %s ago",
					ErrKeysUnavailable, (s.cfg.Refetch - due).Round(time.Second))
			}
			if err := sleep(ctx, due); err != nil {
				return nil, err
			}
			continue
		}
		err := s.wait(ctx, l)
		if err == nil {
			return s.held.Load(), nil
		}
		if l.number > seen || err == errCrowded || ctx.Err() != nil {
			return nil, err
		}
	}
}

// begin starts a load. The caller holds s.mu, and no load is running.
func (s *CachedKeySet) begin() *loading {
	s.begun++
	at := time.Now()
	l := &loading{number: s.begun, done: make(chan struct{})}
	s.running = l
	go func() {
		// Others wait for it too, so it does not end with the request that began it.
		ctx, cancel := context.WithTimeoutCause(context.Background(), s.cfg.Timeout,
			fmt.Errorf("not done within %s", s.cfg.Timeout))
		defer cancel()
		keys, err := s.load(ctx)
		if ctx.Err() != nil { // an answer that was cut off may look like a whole one
			err = errors.Join(context.Cause(ctx), err)
		}
		s.finish(l, at, keys, err)
		if err == nil && s.loaded != nil {
			s.loaded()
		}
	}()
	return l
}

func (s *CachedKeySet) finish(l *loading, at time.Time, keys *StaticKeySet, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.held.Load()
	switch {
	case err != nil:
		// Its cause is not wrapped: nothing about loading proves a token invalid.
		l.err = fmt.Errorf("%w: %v", ErrKeysUnavailable, err)
		if !s.failing {
			s.cfg.Logger.Warn("signing keys cannot be loaded", "error", err, "held", last != nil)
		}
	default:
		if len(keys.refused) > 0 && (last == nil || !slices.Equal(last.keys.refused, keys.refused)) {
			s.cfg.Logger.Warn("some signing keys are not used", "keys", keys.refused)
		}
		if s.failing {
			s.cfg.Logger.Info("signing keys can be loaded again")
		}
		s.held.Store(&heldKeys{keys: keys, number: l.number, at: at})
	}
	s.failing = err != nil
	s.running = nil
	s.lastEnd = time.Now()
	close(l.done)
}

// wait returns how l ended, why ctx did, or errCrowded.
func (s *CachedKeySet) wait(ctx context.Context, l *loading) error {
	defer s.waiting.Add(-1)
	if s.waiting.Add(1) > maxWaiting && s.cfg.Patience <= 0 {
		return errCrowded
	}
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrKeysUnavailable, context.Cause(ctx))
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", ErrKeysUnavailable, context.Cause(ctx))
	}
}
