package replica

import (
	"slices"

	"github.com/rescindhq/rescind/api/revocation"
)

// waiter is somebody who waits for a state to come to a position.
type waiter struct {
	revocation.Position
	here chan struct{} // closed when it has
}

// comesTo returns a channel that is closed once everything up to p is part of the state, which may be
// never: p may be of an epoch that is over. Who waits no longer calls stop.
func (s *State) comesTo(p revocation.Position) (here <-chan struct{}, stop func()) {
	w := waiter{p, make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if has(s.At(), p) {
		close(w.here)
		return w.here, func() {}
	}
	s.waiters = append(s.waiters, w)
	return w.here, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.waiters = slices.DeleteFunc(s.waiters, func(other waiter) bool { return other.here == w.here })
	}
}

// move makes p the position of the state, which has everything up to it, and tells who waits for that. It
// needs s.mu.
func (s *State) move(p revocation.Position) {
	s.at.Store(&p)
	s.settle()
	if len(s.waiters) == 0 {
		return
	}
	s.waiters = slices.DeleteFunc(s.waiters, func(w waiter) bool {
		if !has(p, w.Position) {
			return false
		}
		close(w.here)
		return true
	})
}

// has reports whether what is at the position at has everything up to p.
func has(at, p revocation.Position) bool { return at.Epoch == p.Epoch && at.Seq >= p.Seq }
