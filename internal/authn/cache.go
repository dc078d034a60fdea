package authn

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

const (
	// retryAfterFailure is how long a row that could not be read again is used
	// without another try: else each request would wait for a database that is away.
	retryAfterFailure = time.Second
	// maxBatch is how many rows one question to the database is about.
	maxBatch = 100
)

// cache remembers rows of the database by key, absent ones too, bounded, with
// one read of a key at a time.
//
// Whoever asks the database asks for all who wait for their turn to ask it, and for rows in
// use that will have to be read again soon: these ride along. So many callers
// cost few questions, however many they are, and nearly none of them waits.
type cache[K comparable, V any] struct {
	// read returns the rows of keys. For what it leaves out, the zero V stands.
	read                         func(ctx context.Context, keys []K) (map[K]V, error)
	freshness, maxStale, timeout time.Duration
	size                         int
	slots                        chan struct{} // one for each read at a time; shared by all caches
	metrics                      *metrics

	mu      sync.Mutex
	entries *simplelru.LRU[K, entry[V]]
	flights map[K]*flight[K, V]
	waiting []*flight[K, V] // those that no read has taken, oldest first
	due     []K             // rows that may ride along, oldest first
}

type entry[V any] struct {
	value V
	read  time.Time // when the read began
	retry time.Time // not before then
	due   bool      // the key is in cache.due
}

type flight[K comparable, V any] struct {
	key   K
	done  chan struct{}
	value V
	err   error
}

func newCache[K comparable, V any](cfg Config, slots chan struct{}, m *metrics, read func(context.Context, []K) (map[K]V, error)) *cache[K, V] {
	entries, err := simplelru.NewLRU[K, entry[V]](cfg.CacheSize, nil)
	if err != nil {
		panic(err) // the size was checked
	}
	return &cache[K, V]{
		read: read, freshness: cfg.Freshness, maxStale: cfg.MaxStale, timeout: cfg.LookupTimeout, size: cfg.CacheSize,
		slots: slots, metrics: m, entries: entries, flights: make(map[K]*flight[K, V]),
	}
}

// get returns the row of key, at most as old as [Config.Freshness], and whether it had
// to wait for it. If the row cannot be read, one up to maxStale old will do.
func (c *cache[K, V]) get(ctx context.Context, key K) (value V, waited bool, err error) {
	return c.lookUp(ctx, key, c.freshness, true)
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
		if !e.due && now.Sub(e.read) > c.freshness/2 && len(c.due) < c.size {
			e.due = true
			c.entries.Add(key, e)
			c.due = append(c.due, key)
		}
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
		f = c.newFlight(key)
		c.waiting = append(c.waiting, f)
		go c.fly(context.WithoutCancel(ctx), f) // for all who wait, so nobody's ctx ends it
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

func (c *cache[K, V]) newFlight(key K) *flight[K, V] {
	f := &flight[K, V]{key: key, done: make(chan struct{})}
	c.flights[key] = f
	return f
}

// fly sees to it that f ends: by a read of its own, or by that of another flight
// which takes it along. The oldest one reads first, so nobody waits for longer than
// the timeout.
func (c *cache[K, V]) fly(ctx context.Context, f *flight[K, V]) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	select {
	case <-f.done:
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
		if batch := c.take(f); batch != nil {
			keys := make([]K, len(batch))
			for i, f := range batch {
				keys[i] = f.key
			}
			began := time.Now()
			rows, err := c.read(ctx, keys)
			c.land(batch, rows, began, err)
		}
	case <-ctx.Done():
		if c.withdraw(f) {
			c.land([]*flight[K, V]{f}, nil, time.Time{}, context.Cause(ctx))
		}
	}
}

// withdraw keeps f from being taken. It is false when f was taken already.
func (c *cache[K, V]) withdraw(f *flight[K, V]) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.removeWaiting(f)
}

func (c *cache[K, V]) removeWaiting(f *flight[K, V]) bool {
	i := slices.Index(c.waiting, f)
	if i < 0 {
		return false
	}
	c.waiting = slices.Delete(c.waiting, i, i+1)
	return true
}

// take returns the flights that f's read is for: f, those that wait, those that are due.
// It returns nil when f was taken already.
func (c *cache[K, V]) take(f *flight[K, V]) []*flight[K, V] {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.removeWaiting(f) {
		return nil
	}
	n := min(len(c.waiting), maxBatch-1)
	batch := append([]*flight[K, V]{f}, c.waiting[:n]...)
	c.waiting = slices.Delete(c.waiting, 0, n)
	for len(batch) < maxBatch && len(c.due) > 0 {
		key := c.due[0]
		c.due = c.due[1:]
		if e, ok := c.entries.Peek(key); ok && e.due && c.flights[key] == nil {
			batch = append(batch, c.newFlight(key))
		}
	}
	return batch
}

// land ends the flights of a batch.
func (c *cache[K, V]) land(batch []*flight[K, V], rows map[K]V, began time.Time, err error) {
	result := lookupRead
	if err != nil {
		result = lookupFailed
	}
	c.metrics.lookups.WithLabelValues(result).Inc()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range batch {
		f.value, f.err = rows[f.key], err
		if c.flights[f.key] == f { // not forgotten meanwhile
			delete(c.flights, f.key)
			if err == nil {
				c.entries.Add(f.key, entry[V]{value: f.value, read: began})
			} else if e, ok := c.entries.Peek(f.key); ok {
				e.retry, e.due = time.Now().Add(retryAfterFailure), false
				c.entries.Add(f.key, e)
			}
		}
		close(f.done)
	}
}

// forget makes the next get ask the database. It is called after a change of the
// row was committed.
func (c *cache[K, V]) forget(key K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries.Remove(key)
	delete(c.flights, key) // it may have read the row before the change
}
