package fleet

import (
	"cmp"
	"hash/fnv"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// source says where the last report of a gateway was heard.
type source int

const (
	stored    source = iota // nowhere yet, it is the database's
	here                    // in this process
	elsewhere               // in another one
)

// gateway is what this process knows of one. It belongs to the Fleet's mutex.
type gateway struct {
	id         string
	account    string
	tenant     string
	sees       []string
	firstSeen  time.Time
	known      time.Time // when this process came to know that it exists
	report     replica.Report
	reportedAt time.Time
	source     source
	from       string // the process that it was heard in elsewhere
	lease      time.Duration
	conflict   time.Time
	comparison Comparison
	canaryURL  string
	canary     *CanaryResult
	sightings  sightings
	slot       uint32 // spreads over time what is done for all of them

	// What follows is about those that report here.
	held    *held
	written time.Time // when the database last heard of it, zero: not yet
	confirm struct {  // the last confirmation that it was asked for
		revocation.Position
		at time.Time
	}
	digest digestWish
	wanted replica.DigestRequest // the last one of all gateways that it was part of
	loads  struct {              // the last load that it was asked for
		name  string
		until time.Time
		told  bool
	}
	compared comparing
	asked    askedFor
}

// digestWish is a digest that somebody wants.
type digestWish struct {
	replica.DigestRequest
	until time.Time // zero: nobody does
	told  time.Time // when the gateway was asked, zero: not yet
}

// held is a report whose answer waits.
type held struct {
	wake chan struct{}
}

func newGateway(id string) *gateway {
	h := fnv.New32a()
	h.Write([]byte(id))
	return &gateway{id: id, known: time.Now(), slot: h.Sum32()}
}

// wake makes a held report look for something to answer. It needs f.mu.
func (g *gateway) wake() {
	if g.held != nil {
		kick(g.held.wake)
	}
}

// add and remove need f.mu.
func (f *Fleet) add(g *gateway) {
	f.gateways[g.id] = g
	f.owned[g.account]++
}

func (f *Fleet) remove(g *gateway) {
	if f.gateways[g.id] != g {
		return
	}
	delete(f.gateways, g.id)
	if f.owned[g.account]--; f.owned[g.account] == 0 {
		delete(f.owned, g.account)
	}
	g.wake()
	for w := range f.barriers {
		w.drop(g.id)
	}
	f.announce()
}

// every is how often a gateway reports to this process. It needs f.mu.
func (f *Fleet) every() time.Duration {
	return max(f.cfg.ReportEvery, time.Duration(f.reports)*time.Second/maxReports)
}

// maxReports a second are what a process takes of all gateways that are not asked for anything.
const maxReports = 1000

// leaseNow needs f.mu.
func (f *Fleet) leaseNow() time.Duration { return max(f.cfg.Lease, 3*f.every()) }

// expiry is when a gateway that does not report is lost. It needs f.mu.
func (f *Fleet) expiry(g *gateway) time.Time {
	from, base := g.reportedAt, f.base()
	if base.After(from) {
		from = base
	}
	return from.Add(f.leaseOf(g))
}

func (f *Fleet) leaseOf(g *gateway) time.Duration { return max(g.lease, f.cfg.Lease) }

// confirms reports whether what is known of g may confirm anything. What keeps a silent gateway live is
// what this process cannot know; it is no word of the gateway's. It needs f.mu.
func (f *Fleet) confirms(g *gateway, now time.Time) bool {
	return g.source != stored && now.Sub(g.reportedAt) <= f.leaseOf(g)
}

// base is the last time up to which silence says nothing: since then there was somebody to report to,
// whom this process has heard. It needs f.mu.
func (f *Fleet) base() time.Time {
	var base time.Time
	if !f.cfg.Observe {
		base = f.since
	}
	for _, p := range f.talk.peers {
		if p.asked > 0 && (base.IsZero() || p.since.Before(base)) {
			base = p.since
		}
	}
	for _, p := range f.talk.peers {
		if p.asked < f.talk.lastAsked && p.seen.After(base) {
			base = p.seen
		}
	}
	return base
}

func (f *Fleet) standing(g *gateway, now time.Time) Standing {
	if now.After(f.expiry(g)) {
		return Lost
	}
	return Live
}

const (
	conflictLately = 10 * time.Minute
	equalLately    = 5 * time.Minute
)

// lists are lists of tenants that many gateways have, so that each is kept once.
type lists map[string][]string

// maxLists bounds what is kept of lists that no gateway has any more.
const maxLists = 256

// shared returns a list that is equal to this one, and was. It needs f.mu.
func (l lists) shared(list, last []string) []string {
	if len(list) == 0 {
		return nil
	}
	if slices.Equal(list, last) {
		return last
	}
	key := strings.Join(list, "\x00") // is in no domain
	if known, ok := l[key]; ok {
		return known
	}
	if len(l) >= maxLists {
		clear(l) // it fills again
	}
	l[key] = list
	return list
}

// view needs f.mu.
func (f *Fleet) view(g *gateway, now time.Time) Gateway {
	v := Gateway{
		ID: g.id, Account: g.account, Tenant: g.tenant, Sees: g.sees,
		Report: g.report, ReportedAt: g.reportedAt, Stored: !f.confirms(g, now), FirstSeen: g.firstSeen,
		Standing: f.standing(g, now), Conflict: g.conflict, Comparison: g.comparison,
		CanaryURL: g.canaryURL, Canary: g.canary,
	}
	if now.Sub(v.Conflict) > conflictLately {
		v.Conflict = time.Time{}
	}
	// One that had diverged has, until it is compared again; one that was equal may not be so any more.
	if v.Comparison.Verdict == "" || v.Comparison.Verdict == Equal && now.Sub(v.Comparison.Time) > equalLately {
		v.Comparison.Verdict = Unknown
	}
	return v
}

// Gateways returns all, sorted by ID, as known in this process, see [Fleet.Refresh]: without it those that
// report to other processes appear to be silent. What is behind pointers, slices and maps is shared and
// must not be changed.
func (f *Fleet) Gateways() []Gateway {
	return f.those(func(*gateway) bool { return true })
}

// Here returns those that reported to this process last, sorted by ID, also as [Fleet.Gateways] does, and those that
// have reported to no process for minutes. Of these it knows without asking anyone.
func (f *Fleet) Here() []Gateway {
	now := time.Now()
	return f.those(func(g *gateway) bool { return g.source == here || f.longSilent(g, now) })
}

// longSilent reports whether the database would know of a later report of g by now, if there were one. It needs f.mu.
func (f *Fleet) longSilent(g *gateway, now time.Time) bool {
	return now.Sub(g.reportedAt) > max(longSilence, 2*f.leaseOf(g))
}

// longSilence is more than what it takes until a report is written down, and read by other processes.
const longSilence = 3 * time.Minute

func (f *Fleet) those(which func(*gateway) bool) []Gateway {
	now := time.Now()
	f.mu.Lock()
	all := make([]Gateway, 0, len(f.gateways))
	for _, g := range f.gateways {
		if which(g) {
			all = append(all, f.view(g, now))
		}
	}
	f.mu.Unlock()
	slices.SortFunc(all, func(a, b Gateway) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// Gateway returns one.
func (f *Fleet) Gateway(id string) (Gateway, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g, ok := f.gateways[id]
	if !ok {
		return Gateway{}, false
	}
	return f.view(g, time.Now()), true
}

// When says at which times around at a gateway was known to stand where: the last report before at, or at
// it, and the first one after. Either may be unknown: ok is false. It goes by what this process has heard
// in the last quarter of an hour or so: of what is older, and of gateways that report to other processes,
// less is known.
func (f *Fleet) When(id string, at time.Time) (before, after Sighting, okBefore, okAfter bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g, ok := f.gateways[id]
	if !ok {
		return
	}
	i, _ := slices.BinarySearchFunc(g.sightings, at, func(s Sighting, at time.Time) int {
		if s.At.After(at) {
			return 1
		}
		return -1
	})
	if i > 0 {
		before, okBefore = g.sightings[i-1], true
	}
	if i < len(g.sightings) {
		after, okAfter = g.sightings[i], true
	}
	return
}

// Sighting is where a gateway stood by a report.
type Sighting struct {
	At time.Time
	revocation.Position
}

// sightings are in the order of time.
type sightings []Sighting

const (
	maxSightings  = 64
	keepSightings = 15 * time.Minute
)

// add keeps a new one. Of those that say the same in a row the first and the last are enough; of the rest
// those are dropped that leave the least gap for how long ago they are, so that the present is known
// well, and what is longer ago less and less so.
func (s *sightings) add(n Sighting) {
	l := *s
	if k := len(l); k > 0 && n.At.Before(l[k-1].At) {
		return
	}
	if k := len(l); k > 1 && l[k-1].Position == n.Position && l[k-2].Position == n.Position {
		l[k-1].At = n.At
		return
	}
	for len(l) > 1 && n.At.Sub(l[1].At) > keepSightings { // the first is still good for a time before it
		l = slices.Delete(l, 0, 1)
	}
	if len(l) == maxSightings {
		least, drop := 0.0, 0
		for i := 1; i < len(l)-1; i++ {
			gap := float64(l[i+1].At.Sub(l[i-1].At)) / float64(1+n.At.Sub(l[i].At))
			if drop == 0 || gap < least {
				least, drop = gap, i
			}
		}
		l = slices.Delete(l, drop, drop+1)
	}
	*s = append(l, n)
}
