package replica

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// at is a moment, d after the beginning by both clocks.
func at(d time.Duration) instant {
	return instant{wall: time.Unix(begin, 0).UnixNano()}.add(d)
}

func position(seq revocation.Seq) revocation.Position {
	return revocation.Position{Epoch: epoch, Seq: seq}
}

func TestAge(t *testing.T) {
	t.Parallel()
	const s = time.Second
	foreign := revocation.Position{Epoch: newEpoch, Seq: 1}
	for name, tt := range map[string]struct {
		do   func(a *age)
		now  instant
		want time.Duration
	}{
		"nothing is known": {func(a *age) {}, at(5 * s), Never},
		"at the head":      {func(a *age) { a.saw(position(7), position(7), at(3*s)) }, at(5 * s), 2 * s},
		"past the head":    {func(a *age) { a.saw(position(7), position(9), at(3*s)) }, at(5 * s), 2 * s},
		"behind the head":  {func(a *age) { a.saw(position(7), position(6), at(3*s)) }, at(5 * s), Never},
		"behind, as of before": {func(a *age) {
			a.saw(position(6), position(6), at(1*s))
			a.saw(position(7), position(6), at(3*s))
		}, at(5 * s), 4 * s},
		"the head is reached": {func(a *age) {
			a.saw(position(7), position(6), at(3*s))
			a.reached(position(7))
		}, at(5 * s), 2 * s},
		"of the heads that are reached the last one counts": {func(a *age) {
			a.saw(position(7), position(1), at(1*s))
			a.saw(position(8), position(1), at(2*s))
			a.saw(position(9), position(1), at(3*s))
			a.reached(position(8))
		}, at(5 * s), 3 * s},
		"reached with the next heartbeat": {func(a *age) {
			a.saw(position(7), position(1), at(1*s))
			a.saw(position(9), position(7), at(3*s))
		}, at(5 * s), 4 * s},
		"told out of order": {func(a *age) {
			a.saw(position(9), position(1), at(3*s))
			a.saw(position(8), position(1), at(2*s))
			a.saw(position(9), position(1), at(1*s))
			a.reached(position(9))
			a.saw(position(9), position(9), at(2*s))
		}, at(5 * s), 2 * s},
		"the same head later": {func(a *age) {
			a.saw(position(9), position(1), at(1*s))
			a.saw(position(9), position(1), at(2*s))
			a.reached(position(9))
		}, at(5 * s), 3 * s},
		"a lower head later": {func(a *age) { // two processes that do not know the same
			a.saw(position(9), position(1), at(1*s))
			a.saw(position(8), position(1), at(2*s))
			a.reached(position(8))
		}, at(5 * s), 3 * s},
		"another epoch's head": {func(a *age) {
			a.saw(foreign, position(9), at(3*s))
			a.reached(position(9))
		}, at(5 * s), Never},
		"heads of the epoch before": {func(a *age) {
			a.saw(position(1), position(0), at(3*s))
			a.saw(revocation.Position{Epoch: newEpoch, Seq: 5}, foreign, at(4*s))
			a.reached(revocation.Position{Epoch: newEpoch, Seq: 4})
		}, at(5 * s), Never},
		"a head of before, under load": {func(a *age) { // what is told lags behind other feeds
			for i := range 100 {
				a.reached(position(revocation.Seq(10 * i)))
				a.saw(position(revocation.Seq(10*i-5)), position(revocation.Seq(10*i+1)), at(time.Duration(5*i)*s))
			}
		}, at(496 * s), 1 * s},
		"a head of before, told late": {func(a *age) {
			a.saw(position(6), position(6), at(50*s))
			a.reached(position(7))
			a.saw(position(6), position(7), at(55*s))
			a.saw(position(6), position(7), at(54*s))
		}, at(60 * s), 5 * s},
		"the log has gone back": {func(a *age) {
			for i := range 20 {
				a.saw(position(9), position(9), at(time.Duration(i)*s))
			}
			for i := range 60 { // and grows
				a.saw(position(revocation.Seq(2+i/10)), position(9), at(time.Duration(20+i)*s))
			}
		}, at(80 * s), 61 * s},
		"the log has gone back, and past the state again": {func(a *age) {
			a.saw(position(9), position(9), at(1*s))
			a.saw(position(2), position(9), at(40*s))
			a.saw(position(10), position(9), at(60*s))
			a.reached(position(10))
			a.saw(position(10), position(10), at(70*s))
			a.saw(position(9), position(10), at(71*s))
		}, at(80 * s), 9 * s},
		"from disk":                        {func(a *age) { a.restored(time.Unix(begin-60, 0), at(0)) }, at(5 * s), 65 * s},
		"from disk, never fresh":           {func(a *age) { a.restored(time.Time{}, at(0)) }, at(5 * s), Never},
		"from disk, the clock was set":     {func(a *age) { a.restored(time.Unix(begin+60, 0), at(0)) }, at(5 * s), Never},
		"from disk, the clock was stepped": {func(a *age) { a.restored(time.Unix(begin+2, 0), at(0)) }, at(5 * s), 5 * s},
		"from disk, then told": {func(a *age) {
			a.restored(time.Unix(begin-60, 0), at(0))
			a.saw(position(7), position(7), at(4*s))
		}, at(5 * s), 1 * s},
		"the clock is set back":    {func(a *age) { a.saw(position(7), position(7), at(3*s)) }, instant{int64(5 * s), at(-3600 * s).wall}, 2 * s},
		"the machine is suspended": {func(a *age) { a.saw(position(7), position(7), at(3*s)) }, instant{int64(5 * s), at(3600 * s).wall}, 3597 * s},
	} {
		var a age
		tt.do(&a)
		if got := a.of(tt.now); got != tt.want {
			t.Errorf("%s: %s old, want %s", name, got, tt.want)
		}
	}
}

// However far a state is behind, little is kept of that, and its age falls in steps when it catches up.
func TestAgeOfBacklog(t *testing.T) {
	t.Parallel()
	var a age
	const beats = 10_000
	for i := range beats {
		a.saw(position(revocation.Seq(10*i)), position(-1), at(time.Duration(i)*time.Second))
		if len(a.waiting) > maxWaiting {
			t.Fatalf("%d sightings are kept", len(a.waiting))
		}
	}
	now := at(beats * time.Second)
	last := Never
	for seq := revocation.Seq(0); seq < 10*beats; seq += 10 {
		a.reached(position(seq))
		exact := time.Duration(beats)*time.Second - time.Duration(seq/10)*time.Second
		got := a.of(now)
		if got < exact {
			t.Fatalf("at %d: %s old, but it is %s", seq, got, exact)
		}
		if got > last || got != Never && got > exact+beats*time.Second/16 {
			t.Fatalf("at %d: %s old, after %s, and it is %s", seq, got, last, exact)
		}
		last = got
	}
	if last != time.Second || len(a.waiting) != 0 {
		t.Errorf("at the head: %s old, %d sightings", last, len(a.waiting))
	}
}

// Whatever is told in whatever order: a state never looks fresher than it is.
func TestAgeNeverTooYoung(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 5))
	for range 200 {
		var a age
		var heads []time.Duration // when each seq was added
		now, state := time.Duration(0), 0
		for range 300 {
			now += time.Duration(random.IntN(2000)) * time.Millisecond
			switch random.IntN(3) {
			case 0:
				heads = append(heads, now)
			case 1:
				state = min(len(heads), state+random.IntN(3))
				a.reached(position(revocation.Seq(state)))
			case 2: // a heartbeat of before, from one who knows more or less of the log
				when := time.Duration(random.Int64N(int64(now) + 1))
				head := 0
				for head < len(heads) && heads[head] <= when {
					head++
				}
				a.saw(position(revocation.Seq(head)), position(revocation.Seq(state)), at(when))
			}
			oldest := time.Duration(0) // what the state lacks since
			if state < len(heads) {
				oldest = now - heads[state]
			}
			if got := a.of(at(now)); got < oldest {
				t.Fatalf("%s old, though it lacks what came %s ago", got, oldest)
			}
		}
	}
}

func TestDelays(t *testing.T) {
	t.Parallel()
	const s = time.Second
	// Heartbeats that the service sent at a time, and that came at another.
	type beat struct{ sent, came time.Duration }
	// One a second: for ten minutes in time, then for so many seconds late.
	lateBy := func(late time.Duration, seconds int) (beats []beat) {
		for i := range 600 {
			beats = append(beats, beat{time.Duration(i) * s, time.Duration(i) * s})
		}
		for i := range seconds {
			came := time.Duration(600+i) * s
			beats = append(beats, beat{came - late, came})
		}
		return beats
	}
	for name, tt := range map[string]struct {
		skew  time.Duration // of the service's clock
		beats []beat
		want  time.Duration // how late the last one was
	}{
		"in time":                     {0, []beat{{1 * s, 1 * s}, {2 * s, 2 * s}}, 0},
		"late":                        {0, []beat{{1 * s, 1 * s}, {2 * s, 32 * s}}, 30 * s},
		"the service's clock is slow": {-70 * s, []beat{{1 * s, 1 * s}, {2 * s, 32 * s}}, 30 * s},
		"the service's clock is fast": {70 * s, []beat{{1 * s, 1 * s}, {2 * s, 32 * s}}, 30 * s},
		"the first was late":          {0, []beat{{1 * s, 41 * s}, {42 * s, 42 * s}, {43 * s, 73 * s}}, 30 * s},
		"the first was very late":     {0, []beat{{1 * s, 601 * s}}, 600*s - maxSkew},
		"all are very late":           {0, []beat{{1 * s, 601 * s}, {2 * s, 602 * s}, {3 * s, 603 * s}}, 600*s - maxSkew},
		"late for a minute":           {0, lateBy(30*s, 60), 30 * s},
		"late after a silence":        {0, []beat{{1 * s, 1 * s}, {30 * s, 30 * s}, {31 * s, 631 * s}, {32 * s, 631 * s}, {33 * s, 631 * s}}, 598 * s},
		"a burst":                     {0, []beat{{1 * s, 1 * s}, {100 * s, 100 * s}, {101 * s, 140 * s}, {102 * s, 140 * s}, {103 * s, 140 * s}}, 37 * s},
		"the service's clock is set back for two minutes": {0, lateBy(30*s, 121), 0},
		"the service's clock is set ahead":                {0, lateBy(-30*s, 1), 0},
		"a clock that nobody accepts":                     {-600 * s, []beat{{1 * s, 1 * s}}, 600*s - maxSkew},
	} {
		var d delays
		var got, now instant
		for _, b := range tt.beats {
			now = at(b.came)
			got = d.moment(time.Unix(0, at(b.sent+tt.skew).wall), now)
		}
		if late := now.since(got); late != tt.want {
			t.Errorf("%s: %s late, want %s", name, late, tt.want)
		}
	}
	var d delays
	if late := at(9 * s).since(d.moment(time.Time{}, at(9*s))); late != silence {
		t.Errorf("without a time: %s, want %s", late, silence)
	}
}

// The service's clock runs slower than this one, within what clocks do: that is no delay.
func TestDrift(t *testing.T) {
	t.Parallel()
	var d delays
	for came := time.Duration(0); came < 30*24*time.Hour; came += time.Minute {
		sent := came - came/10_000 // 100 ppm
		if sent < came-maxSkew {
			break // that is too much for any clock
		}
		if late := at(came).since(d.moment(time.Unix(0, at(sent).wall), at(came))); late > 20*time.Millisecond {
			t.Fatalf("after %s: %s late", came, late)
		}
	}
}
