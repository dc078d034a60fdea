package revokeapi

import (
	"context"
	"net/http"
	"sync"

	"github.com/rescindhq/rescind/internal/rest"
)

// places are few. Whoever is in one may be slow, so a tenant takes only so many, mostly one, and the
// last is for those who are bound to none, each of whom takes only so many too.
type places struct {
	most, each int

	mu    sync.Mutex
	all   int
	taken map[string]int // by whom
}

func newPlaces(most, each int) *places {
	return &places{most: most, each: each, taken: make(map[string]int)}
}

// enter takes a place for r, which [rest.Require] has let through, until leave is called. It
// does not wait.
func (p *places) enter(r *http.Request) (leave func(), ok bool) {
	who, most := "tenant:"+tenantsOf(r).home, p.most-1
	if tenantsOf(r).home == "" {
		who, most = "account:"+rest.AccountOf(r.Context()).Username, p.most
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken[who] >= p.each || p.all >= most {
		return nil, false
	}
	p.all++
	p.taken[who]++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.all--
		if p.taken[who]--; p.taken[who] == 0 {
			delete(p.taken, who)
		}
	}, true
}

// seat is the place of one request.
type seat struct {
	leave   func()
	waiting *places // where it may wait for gateways
}

type seatKey struct{}

func (s *seat) with(r *http.Request) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), seatKey{}, s))
}

// wait exchanges the place of a request that is worked on for one of those that wait, if there is one.
func wait(r *http.Request) (ok bool) {
	s := r.Context().Value(seatKey{}).(*seat)
	leave, ok := s.waiting.enter(r)
	if ok {
		s.leave()
		s.leave = leave
	}
	return ok
}
