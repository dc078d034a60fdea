package app

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// Go collects garbage when the heap has doubled. A service that holds little would
// spend a tenth of its time under load on that, and one that holds a million
// revocations would take twice the memory it needs. So garbage may be as much as
// minGarbage, or half of what is live, whichever is more.
const (
	minGarbage   = 64 << 20
	maxGCPercent = 400
	minGCPercent = 50
	tuneEvery    = 2 * time.Second
)

// tuneGC sets how often garbage is collected until ctx ends, unless the environment does.
func tuneGC(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	tick := time.NewTicker(tuneEvery)
	defer tick.Stop()
	for set := 0; ; {
		metrics.Read(live)
		percent := gcPercent(live[0].Value.Uint64())
		if percent != set {
			debug.SetGCPercent(percent)
			set = percent
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// gcPercent is GOGC for so many bytes of live heap, in steps that keep it from
// changing all the time.
func gcPercent(live uint64) int {
	if live == 0 {
		return maxGCPercent
	}
	percent := int(min(100*minGarbage/live, maxGCPercent))
	return max(percent/10*10, minGCPercent)
}
