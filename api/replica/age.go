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
//
// A head below what the state has is normal for one that was read a little before the state came
// so far. But if the state had come there long before, the log has gone back: it was restored, in
// the same epoch, and what it has now is not what the state has. Such a head says nothing.
type age struct {
	fresh atomic.Pointer[instant] // nil: that is not known

	mu      sync.Mutex
	at      revocation.Position // where the state stands
	since   int64               // latest when it was found there
	latest  int64               // the last moment of a sighting so far, by the clock that only runs
	epoch   revocation.Epoch    // of waiting
	waiting []sighting          // each later than the one before, and with a greater head
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

// maxLag is how long after the state has come to a position heads below it are believed: they
// come from processes whose clocks, or whose knowledge of the log, differ by less.
const maxLag = silence

// saw is told that the log reached to head at a moment, of a state that has come to reached.
func (a *age) saw(head, reached revocation.Position, at instant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stands(reached)
	a.latest = max(a.latest, at.mono)
	if head.Epoch != reached.Epoch {
		return // that is another log
	}
	if a.epoch != head.Epoch {
		a.epoch, a.waiting = head.Epoch, nil
	}
	a.settle(reached.Seq)
	switch {
	case head.Seq < reached.Seq && at.mono-a.since > int64(maxLag):
		return // the log has gone back
	case head.Seq <= reached.Seq:
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
	a.stands(at)
	if at.Epoch == a.epoch {
		a.settle(at.Seq)
	}
}

// stands notes since when the state is where it is, in steps of the sightings. After long without
// any that is too early, and one head below may be passed over that need not be: the next will do.
// It needs a.mu.
func (a *age) stands(at revocation.Position) {
	if a.at != at {
		a.at, a.since = at, a.latest
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
	// headAge is how old the head of a page is at most when the page is asked for.
	headAge = 2 * time.Second
	// maxSkew is the most that clocks are taken to differ by. More than that, and tokens
	// would not be accepted either.
	maxSkew = revocation.MaxLeeway
	// measureFor is the time whose fastest heartbeat is the measure, and that before it too.
	measureFor = time.Minute
)

// delays tells how late the heartbeats of a feed are. The service's clock and the one here differ
// by what is not known, so the fastest heartbeat of the last one to two minutes serves as measure:
// it was not late. A delay that is the same for so long is a clock: one was set, or differs from that
// of the process that told before.
//
// The minutes go on with heartbeats only. When a feed has hung, what then comes at once is measured by
// what came before.
type delays struct {
	began int64 // when least[0] did, by the clock that only runs
	known int   // how many of least are
	least [2]int64
}

// moment is when, at the earliest, what told says was so, which came now.
//
// What has no time may have waited to be read for as long as the feed may hang without being
// given up.
func (d *delays) moment(told time.Time, now instant) instant {
	if told.IsZero() {
		return now.add(-silence)
	}
	differs := now.mono - told.UnixNano() // the clock here less the service's
	if d.known == 0 || now.mono-d.began >= int64(measureFor) {
		d.began, d.known = now.mono, min(d.known+1, len(d.least))
		d.least = [2]int64{differs, d.least[0]}
	}
	d.least[0] = min(d.least[0], differs)
	least := slices.Min(d.least[:d.known])
	// All of them may be late, by what cannot be the clocks' fault.
	late := max(differs-least, now.wall-told.UnixNano()-int64(maxSkew))
	return now.add(-time.Duration(late))
}
