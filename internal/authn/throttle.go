package authn

import (
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"
)

// failuresPerSecond is how fast an address that has used up its failures gets
// new ones. A guesser gets no more than this; who was merely wrong waits a second.
const failuresPerSecond = 1

// throttledRetry is how long a throttled caller is asked to wait.
const throttledRetry = time.Second / failuresPerSecond

// caller is who somebody at an address says to be.
type caller struct {
	account bool
	id      string
	from    netip.Addr // as returned by bucket
}

// throttle counts failures. Success costs nothing: who is right is never slowed
// down by how often.
type throttle struct {
	addressBurst, callerBurst int

	mu        sync.Mutex
	addresses *simplelru.LRU[netip.Addr, *rate.Limiter]
	callers   *simplelru.LRU[caller, *record]
}

type record struct {
	proved   bool          // has been right at this address
	failures *rate.Limiter // nil before the first
}

func newThrottle(cfg Config) *throttle {
	addresses, err := simplelru.NewLRU[netip.Addr, *rate.Limiter](cfg.MaxSources, nil)
	if err != nil {
		panic(err) // the size was checked
	}
	callers, err := simplelru.NewLRU[caller, *record](cfg.MaxSources, nil)
	if err != nil {
		panic(err)
	}
	return &throttle{
		addressBurst: cfg.AddressFailures, callerBurst: cfg.CallerFailures,
		addresses: addresses, callers: callers,
	}
}

// throttled reports whether c must wait before it may try.
func (t *throttle) throttled(c caller) bool {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	r, _ := t.callers.Get(c)
	if r != nil && r.failures != nil && r.failures.TokensAt(now) < 1 {
		return true
	}
	if r != nil && r.proved {
		return false
	}
	return t.usedUp(c.from, now)
}

// addressThrottled reports whether those at an address must wait who have not said who they are.
func (t *throttle) addressThrottled(from netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.usedUp(from, time.Now())
}

// usedUp reports whether an address has used up its failures. t must be locked.
func (t *throttle) usedUp(from netip.Addr, now time.Time) bool {
	failures, ok := t.addresses.Get(from)
	return ok && failures.TokensAt(now) < 1
}

// failed counts a failure of c. It reports whether others have used up what c
// may fail since it was not throttled: then c is told nothing else.
func (t *throttle) failed(c caller) (throttled bool) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.callers.Get(c)
	if !ok {
		r = &record{}
		t.callers.Add(c, r)
	}
	if r.failures == nil {
		r.failures = rate.NewLimiter(failuresPerSecond, t.callerBurst)
	}
	byCaller, byAddress := r.failures.AllowN(now, 1), t.allow(c.from, now)
	return !byCaller || !byAddress && !r.proved
}

// addressFailed counts a failure of those at an address who have not said who they are.
func (t *throttle) addressFailed(from netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.allow(from, time.Now())
}

// allow counts a failure at an address, and reports whether it had one left. t must be locked.
func (t *throttle) allow(from netip.Addr, now time.Time) bool {
	failures, ok := t.addresses.Get(from)
	if !ok {
		failures = rate.NewLimiter(failuresPerSecond, t.addressBurst)
		t.addresses.Add(from, failures)
	}
	return failures.AllowN(now, 1)
}

// succeeded records that c has proved itself.
func (t *throttle) succeeded(c caller) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r, ok := t.callers.Get(c); ok {
		r.proved = true
		return
	}
	t.callers.Add(c, &record{proved: true})
}
