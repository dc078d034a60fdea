package replica

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// instant is a moment by both clocks, in nanoseconds: the one that only runs, since some moment
// in this process, and the one on the wall, since 1970.
type instant struct{ mono, wall int64 }

func (i instant) add(d time.Duration) instant {
	return instant{i.mono + int64(d), i.wall + int64(d)}
}

// since is the time from before to i. The clock that only runs stands still while the machine is
// suspended, and the one on the wall may be set back: the one that says more is right, or errs
// on the safe side.
func (i instant) since(before instant) time.Duration {
	return max(0, time.Duration(i.mono-before.mono), time.Duration(i.wall-before.wall))
}

// age tells how old a state is: it is fresh as of a moment if it has everything that was in
// the log at that moment.
//
// That is known from sightings: at some moment the log reached to its seq head. Once the state
// has reached it too, it is fresh as of that moment. Sightings that it has not reached wait.
type age struct {
	fresh atomic.Pointer[instant] // nil: that is not known

	mu      sync.Mutex
	epoch   revocation.Epoch // of waiting
	waiting []sighting       // each later than the one before, and with a greater head
}

type sighting struct {
	head revocation.Seq
	at   instant
}

// maxWaiting bounds the sightings that a state far behind has not reached. Past it half of them are
// forgotten: its age then falls in larger steps.
const maxWaiting = 64

// of is how old the state is at now, [Never] if that is not known. It takes no lock.
func (a *age) of(now instant) time.Duration {
	fresh := a.fresh.Load()
	if fresh == nil {
		return Never
	}
	return now.since(*fresh)
}

// asOf is the time by the wall's clock as of which the state is fresh, zero if it is not known.
func (a *age) asOf() time.Time {
	fresh := a.fresh.Load()
	if fresh == nil {
		return time.Time{}
	}
	return time.Unix(0, fresh.wall)
}

// clockSlack is how far ahead of the clock a time on disk may be. Clocks are corrected by as much
// at any time.
const clockSlack = 5 * time.Second

// restored is told as of when, by the wall's clock, a state from disk was fresh. If that is yet to
// come the clock was set back, and nobody knows how old the state is.
func (a *age) restored(fresh time.Time, now instant) {
	since := time.Duration(now.wall - fresh.UnixNano())
	if fresh.IsZero() || since < -clockSlack {
		return
	}
	a.freshen(now.add(-max(0, since)))
}

// saw is told that the log reached to head at a moment, of a state that has come to reached.
func (a *age) saw(head, reached revocation.Position, at instant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if head.Epoch != reached.Epoch {
		return // that is another log
	}
	if a.epoch != head.Epoch {
		a.epoch, a.waiting = head.Epoch, nil
	}
	a.settle(reached.Seq)
	if head.Seq <= reached.Seq {
		a.freshen(at)
		return
	}
	i, _ := slices.BinarySearchFunc(a.waiting, head.Seq, func(s sighting, head revocation.Seq) int { return cmp.Compare(s.head, head) })
	if i > 0 && a.waiting[i-1].at.mono >= at.mono {
		return // it says less than that one
	}
	end := i
	for end < len(a.waiting) && a.waiting[end].at.mono <= at.mono {
		end++ // says less than this one
	}
	if end == i && i < len(a.waiting) && a.waiting[i].head == head.Seq {
		return
	}
	a.waiting = slices.Replace(a.waiting, i, end, sighting{head.Seq, at})
	if len(a.waiting) > maxWaiting {
		a.thin()
	}
}

// thin forgets sightings between others that are not far apart. It needs a.mu.
func (a *age) thin() {
	last := len(a.waiting) - 1
	far := (a.waiting[last].at.mono - a.waiting[0].at.mono) / (maxWaiting / 4)
	kept := a.waiting[:1]
	for i := 1; i <= last; i++ {
		if i == last || a.waiting[i+1].at.mono-kept[len(kept)-1].at.mono > far {
			kept = append(kept, a.waiting[i])
		}
	}
	a.waiting = kept
}

// reached is told how far the state has come.
func (a *age) reached(at revocation.Position) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if at.Epoch == a.epoch {
		a.settle(at.Seq)
	}
}

// settle needs a.mu.
func (a *age) settle(reached revocation.Seq) {
	n := 0
	for n < len(a.waiting) && a.waiting[n].head <= reached {
		n++
	}
	if n > 0 {
		a.freshen(a.waiting[n-1].at)
		a.waiting = slices.Delete(a.waiting, 0, n)
	}
}

// freshen notes that the state is fresh as of a moment, if that was not known of a later one.
func (a *age) freshen(at instant) {
	for {
		fresh := a.fresh.Load()
		if fresh != nil && fresh.mono >= at.mono {
			return
		}
		if a.fresh.CompareAndSwap(fresh, &at) {
			return
		}
	}
}

const (
	// headAge is how old the head in a heartbeat or a page is at most, when it is not told.
	headAge = 2 * time.Second
	// maxSkew is the most that clocks are taken to differ by. More than that, and tokens
	// would not be accepted either.
	maxSkew = revocation.MaxLeeway
	// drift is by how much two clocks may differ in speed, 1 in driftOne.
	driftOne = 5000
)

// delays tells how late the heartbeats of a feed are. The service's clock and the one here differ
// by what is not known, so what is known of the fastest heartbeat serves as measure: it was not
// late. As clocks differ in speed too, that fades slowly.
type delays struct {
	known bool
	least int64 // the clock here less the service's, when a heartbeat came
	noted int64 // when that was, by the clock that only runs
}

// moment is when, at the earliest, what told says was so, which came now.
func (d *delays) moment(told time.Time, now instant) instant {
	if told.IsZero() {
		return now.add(-headAge)
	}
	differs := now.mono - told.UnixNano()
	if d.known {
		d.least += (now.mono - d.noted) / driftOne
	}
	if !d.known || differs < d.least {
		d.known, d.least = true, differs
	}
	d.noted = now.mono
	// The first one may have been late already, by what cannot be the clocks' fault.
	late := max(differs-d.least, now.wall-told.UnixNano()-int64(maxSkew))
	return now.add(-time.Duration(late))
}
