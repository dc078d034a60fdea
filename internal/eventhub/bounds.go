package eventhub

import (
	"errors"
	"sync"
)

// errBusy is of requests that were refused because too much goes on, most of them after
// they had waited.
var errBusy = errors.New("too much is being answered")

// shares bounds what each account has at a time, so that none keeps out the others.
type shares struct {
	each int

	mu        sync.Mutex
	byAccount map[string]chan struct{}
}

// newShares gives each account a quarter of all.
func newShares(all int) *shares {
	return &shares{each: max(1, all/4), byAccount: make(map[string]chan struct{})}
}

// of has a place for each thing that the account may have.
func (s *shares) of(account string) chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.byAccount[account]
	if c == nil {
		c = make(chan struct{}, s.each)
		s.byAccount[account] = c
	}
	return c
}

// body is an answer as a whole, which any number of readers can share.
type body struct {
	bytes []byte

	// For sending, and guarded by its lock.
	readers int
	account string // whose first reader it was
}

// sending bounds the bytes of bodies that have readers, each counted once. An account's
// share is a quarter of them.
type sending struct {
	limit int

	mu        sync.Mutex
	bytes     int
	byAccount map[string]int
}

func newSending(limit int) *sending {
	return &sending{limit: limit, byAccount: make(map[string]int)}
}

// begin adds a reader of b, or reports that there is no room. A body that is larger than
// the bound has to be alone.
func (s *sending) begin(account string, b *body) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.readers == 0 {
		n, mine := len(b.bytes), s.byAccount[account]
		if s.bytes > 0 && s.bytes+n > s.limit || mine > 0 && mine+n > s.limit/4 {
			return false
		}
		b.account = account
		s.bytes += n
		s.byAccount[account] += n
	}
	b.readers++
	return true
}

func (s *sending) end(b *body) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.readers--; b.readers > 0 {
		return
	}
	s.bytes -= len(b.bytes)
	if s.byAccount[b.account] -= len(b.bytes); s.byAccount[b.account] == 0 {
		delete(s.byAccount, b.account)
	}
}

func (s *sending) held() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}
