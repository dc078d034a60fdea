package revokeapi

import (
	"net/http"
	"sync"

	"github.com/rescindhq/rescind/internal/rest"
)

// places are few. Whoever is in one may be slow, so a tenant takes at most one, and the last is
// for those who are bound to none, each of whom takes at most one too.
type places struct {
	most int

	mu    sync.Mutex
	taken map[string]bool // by whom
}

func newPlaces(most int) *places { return &places{most: most, taken: make(map[string]bool)} }

// enter takes a place for r, which [rest.Require] has let through, until leave is called. It
// does not wait.
func (p *places) enter(r *http.Request) (leave func(), ok bool) {
	who, most := "tenant:"+tenantsOf(r).home, p.most-1
	if tenantsOf(r).home == "" {
		who, most = "account:"+rest.AccountOf(r.Context()).Username, p.most
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken[who] || len(p.taken) >= most {
		return nil, false
	}
	p.taken[who] = true
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.taken, who)
	}, true
}
