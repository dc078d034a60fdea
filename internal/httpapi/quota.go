package httpapi

import (
	"sync"
	"time"
)

// quota counts requests by client, in windows of one second that begin with a
// client's first request.
type quota struct {
	mu      sync.Mutex
	windows map[string]window
	swept   time.Time
}

type window struct {
	began time.Time
	n     int
}

const (
	quotaWindow = time.Second
	quotaSweep  = 1024 // windows at which those that are over are removed
)

func newQuota() *quota { return &quota{windows: make(map[string]window)} }

// take reports whether the client has fewer than limit requests in its window,
// and counts one if so.
func (q *quota) take(client string, limit int) bool {
	now := time.Now()
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.windows) >= quotaSweep && now.Sub(q.swept) >= quotaWindow {
		for client, w := range q.windows {
			if now.Sub(w.began) >= quotaWindow {
				delete(q.windows, client)
			}
		}
		q.swept = now
	}
	w := q.windows[client]
	if now.Sub(w.began) >= quotaWindow {
		w = window{began: now}
	}
	if w.n >= limit {
		return false
	}
	w.n++
	q.windows[client] = w
	return true
}
