package replica

import (
	"github.com/rescindhq/rescind/api/revocation"
)

// history is what the last events have changed, for digests of positions that are not the state's.
type history struct {
	ring    []change // that of seq at seq % len
	last    revocation.Seq
	n       revocation.Seq // how many there are, up to last
	domains interned[string]
	next    change // of the event that is applied
}

// change is what was before an event, and what is after it, as in counted.
type change struct {
	before, after     total
	ended, ends       int64
	beforeOf, afterOf uint32 // domains
}

func newHistory(events int) *history { return &history{ring: make([]change, events)} }

// note adds to what the event changes that is applied: one thing, which may be told as its end and its
// beginning.
func (h *history) note(before, after counted) {
	if before.end != 0 {
		h.next.before, h.next.ended, h.next.beforeOf = before.hash, before.end, h.domains.number(before.domain)
	}
	if after.end != 0 {
		h.next.after, h.next.ends, h.next.afterOf = after.hash, after.end, h.domains.number(after.domain)
	}
}

// append keeps what was noted as what the event at seq has changed. Up to ahead that says too little:
// what events there change may have been held before.
func (h *history) append(seq, ahead revocation.Seq) {
	switch {
	case seq <= ahead:
		h.n = 0
	case seq != h.last+1:
		h.n = 1
	default:
		h.n = min(h.n+1, revocation.Seq(len(h.ring)))
	}
	h.ring[seq%revocation.Seq(len(h.ring))] = h.next
	h.last, h.next = seq, change{}
}

func (h *history) forget() {
	h.last, h.n, h.next, h.domains = 0, 0, change{}, interned[string]{}
}

// copy copies what the events after a seq have changed, and returns how many these are.
func (h *history) copy(to []change, after, through revocation.Seq) (n int, ok bool) {
	if after < h.last-h.n || through > h.last {
		return 0, false
	}
	for n < len(to) && after < through {
		after++
		to[n] = h.ring[after%revocation.Seq(len(h.ring))]
		n++
	}
	return n, true
}

// rollStep is how many changes are copied at a time, with State.mu held for reading.
const rollStep = 256

// roll brings sum from the position of d to p, by what has changed of tenants that are seen.
func (s *State) roll(d *Digests, p revocation.Position, sees func(domain string) bool, sum *tally) error {
	var changes [rollStep]change
	var seen []bool // by number of domain
	from, to := min(d.at.Seq, p.Seq), max(d.at.Seq, p.Seq)
	for first := true; first || from < to; first = false {
		n, domains, err := s.changes(d, p, changes[:], from, to)
		if err != nil {
			return err
		}
		for _, domain := range domains[len(seen):] {
			seen = append(seen, sees(domain))
		}
		for i := range changes[:n] {
			c := &changes[i]
			if p.Seq < d.at.Seq {
				c.before, c.ended, c.beforeOf, c.after, c.ends, c.afterOf = c.after, c.ends, c.afterOf, c.before, c.ended, c.beforeOf
			}
			if c.ended != 0 && seen[c.beforeOf] {
				sum.sub(c.before, c.ended, d.cutoff)
			}
			if c.ends != 0 && seen[c.afterOf] {
				sum.add(c.after, c.ends, d.cutoff)
			}
		}
		from += revocation.Seq(n)
	}
	return nil
}

// changes copies some of what the events after from have changed, up to to, unless d cannot be brought
// to p any more, or yet.
func (s *State) changes(d *Digests, p revocation.Position, into []change, from, to revocation.Seq) (n int, domains []string, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch {
	case s.breaks != d.breaks, s.forgotten > d.cutoff:
		return 0, nil, ErrForgotten
	case p.Seq > s.At().Seq:
		return 0, nil, ErrNotYet
	case from == to:
		return 0, nil, nil
	case s.content.observer == nil || s.content.observer.history == nil:
		return 0, nil, ErrForgotten
	}
	h := s.content.observer.history
	n, ok := h.copy(into, from, to)
	if !ok {
		return 0, nil, ErrForgotten
	}
	return n, h.domains.values, nil
}
