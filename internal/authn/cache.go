package authn

import (
	"context"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// retryAfterFailure is how long a row that could not be read again is used
// without another try: else each request would wait for a database that is away.
const retryAfterFailure = time.Second

// cache remembers rows of the database by key, absent ones too, bounded, with
// one read of a key at a time.
type cache[K comparable, V any] struct {
	read              func(context.Context, K) (V, error)
	maxStale, timeout time.Duration
	slots             chan struct{} // one for each read at a time; shared by all caches
	metrics           *metrics

	mu      sync.Mutex
	entries *simplelru.LRU[K, entry[V]]
	flights map[K]*flight[V]
}

type entry[V any] struct {
	value V
	read  time.Time // when the read began
	retry time.Time // not before then
}

type flight[V any] struct {
	done  chan struct{}
	value V
	err   error
}

func newCache[K comparable, V any](cfg Config, slots chan struct{}, m *metrics, read func(context.Context, K) (V, error)) *cache[K, V] {
	entries, err := simplelru.NewLRU[K, entry[V]](cfg.CacheSize, nil)
	if err != nil {
		panic(err) // the size was checked
	}
	return &cache[K, V]{
		read: read, maxStale: cfg.MaxStale, timeout: cfg.LookupTimeout, slots: slots, metrics: m,
		entries: entries, flights: make(map[K]*flight[V]),
	}
}

// get returns the row of key, at most maxAge old, and whether it had to wait for
// it. If the row cannot be read, one up to maxStale old will do.
func (c *cache[K, V]) get(ctx context.Context, key K, maxAge time.Duration) (value V, waited bool, err error) {
	return c.lookUp(ctx, key, maxAge, true)
}

// recheck returns the row of key, at most recheckAge old.
func (c *cache[K, V]) recheck(ctx context.Context, key K) (V, error) {
	value, _, err := c.lookUp(ctx, key, recheckAge, false)
	return value, err
}

func (c *cache[K, V]) lookUp(ctx context.Context, key K, maxAge time.Duration, staleWillDo bool) (value V, waited bool, err error) {
	now := time.Now()
	c.mu.Lock()
	e, ok := c.entries.Get(key)
	if ok && now.Sub(e.read) <= maxAge {
		c.mu.Unlock()
		return e.value, false, nil
	}
	stale := staleWillDo && ok && now.Sub(e.read) <= c.maxStale
	if stale && now.Before(e.retry) {
		c.mu.Unlock()
		c.metrics.lookups.WithLabelValues(lookupStale).Inc()
		return e.value, false, nil
	}
	f := c.flights[key]
	if f == nil {
		f = &flight[V]{done: make(chan struct{})}
		c.flights[key] = f
		go c.fly(context.WithoutCancel(ctx), key, f) // for all who wait, so nobody's ctx ends it
	}
	c.mu.Unlock()

	select {
	case <-f.done:
	case <-ctx.Done():
		return value, true, context.Cause(ctx)
	}
	if f.err != nil && stale {
		c.metrics.lookups.WithLabelValues(lookupStale).Inc()
		return e.value, true, nil
	}
	return f.value, true, f.err
}

func (c *cache[K, V]) fly(ctx context.Context, key K, f *flight[V]) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var began time.Time
	select {
	case c.slots <- struct{}{}:
		began = time.Now()
		f.value, f.err = c.read(ctx, key)
		<-c.slots
	case <-ctx.Done():
		f.err = context.Cause(ctx)
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flights[key] == f { // not forgotten meanwhile
		delete(c.flights, key)
		if f.err == nil {
			c.entries.Add(key, entry[V]{value: f.value, read: began})
		} else if e, ok := c.entries.Get(key); ok {
			e.retry = time.Now().Add(retryAfterFailure)
			c.entries.Add(key, e)
		}
	}
	if f.err == nil {
		c.metrics.lookups.WithLabelValues(lookupRead).Inc()
	} else {
		c.metrics.lookups.WithLabelValues(lookupFailed).Inc()
	}
	close(f.done)
}

// forget makes the next get ask the database. It is called after a change of the
// row was committed.
func (c *cache[K, V]) forget(key K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries.Remove(key)
	delete(c.flights, key) // it may have read the row before the change
}
