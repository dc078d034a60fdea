package fleet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

const (
	minute = 60 // seconds; cutoffs are whole ones
	// spread is over how many seconds of a minute gateways are asked for digests.
	spread = 50
	// digestFor is how long a gateway may take to begin with one.
	digestFor = time.Minute
	// A digest is compared if its cutoff is not longer ago, or further ahead, than this.
	comparedBefore = 4 * minute
	comparedAhead  = 2 * minute
	// keepDigests is how many cutoffs the log's digests are kept for: all of those.
	keepDigests = (comparedBefore+comparedAhead)/minute + 1
	// digestsApart is how long the log's state is not read again for digests, whatever gateways ask for.
	digestsApart = 2 * time.Second
	// digestsOld are made again when it is no longer known what happened since.
	digestsOld = 10 * time.Second
	// notYetFor is how long a digest waits for the log's state to come to its position.
	notYetFor    = 10 * time.Second
	loadAgain    = 5 * time.Minute
	loadsAtATime = 10
	loadTakes    = time.Minute
	loadFor      = 30 * time.Second
)

// comparing is what the comparisons of one gateway go by.
type comparing struct {
	cutoff  int64          // of the digest that it was asked for last
	digest  replica.Digest // the last one that came
	came    time.Time
	due     bool // it is still to be compared
	differs int  // in a row
	loading time.Time
}

// digests are [replica.Digests].
type digests interface {
	At(p revocation.Position, scope replica.DigestScope) (replica.Digest, error)
}

// askedFor are the cutoffs that a gateway was asked for by this process, the last ones. What it was not
// asked for it may not have the log read for.
type askedFor struct {
	cutoffs [keepDigests]int64
	next    int
}

func (a *askedFor) add(cutoff int64) {
	if !slices.Contains(a.cutoffs[:], cutoff) {
		a.cutoffs[a.next] = cutoff
		a.next = (a.next + 1) % len(a.cutoffs)
	}
}

// comparable reports whether d is compared when it comes now: so that nobody is without a verdict for one
// that is not, only such a one is an answer.
func (g *gateway) comparable(d *replica.Digest, now time.Time) bool {
	off := d.Cutoff - now.Unix()
	return -comparedBefore <= off && off <= comparedAhead && slices.Contains(g.asked.cutoffs[:], d.Cutoff)
}

// wish asks for a digest in place of the one that was asked for before. It needs f.mu.
func (g *gateway) wish(w digestWish, now time.Time) {
	if d := g.report.Digest; d != nil && g.comparable(d, now) && w.metBy(d) {
		return
	}
	w.told = time.Time{}
	g.digest = w
	g.wake()
}

// metBy reports whether d is an answer. One with a later cutoff is: it was asked for later.
func (w *digestWish) metBy(d *replica.Digest) bool {
	return d.Cutoff >= w.Cutoff && (w.After.Epoch == "" || applied(d.Position, w.After))
}

// covers reports whether a digest that is wanted will do for r too.
func (w *digestWish) covers(r replica.DigestRequest) bool {
	return r.Cutoff < w.Cutoff || r.Cutoff == w.Cutoff && (r.After.Epoch == "" || applied(w.After, r.After))
}

// load asks for a snapshot to be loaded. It needs f.mu.
func (g *gateway) load(name string, now time.Time) {
	g.loads.name, g.loads.until, g.loads.told = name, now.Add(loadFor), false
	g.wake()
}

// compareNext looks at the digest of a report that was taken. It needs f.mu.
func (f *Fleet) compareNext(g *gateway, now time.Time) {
	d := g.report.Digest
	if now.Before(f.wanted.until) && g.wanted != f.wanted.DigestRequest { // it has come after it was asked for
		g.wanted = f.wanted.DigestRequest
		g.wish(f.wanted, now)
	}
	if d == nil || !g.comparable(d, now) {
		return
	}
	if g.digest.metBy(d) {
		g.digest.until = time.Time{}
	}
	if f.state == nil || *d == g.compared.digest {
		return
	}
	if !g.compared.due {
		f.queue = append(f.queue, g)
	}
	g.compared.digest, g.compared.came, g.compared.due = *d, now, true
	kick(f.kicks.compare)
}

// tick does each second what is due for each gateway.
func (f *Fleet) tick(ctx context.Context) {
	for pause(ctx, time.Second) {
		now := time.Now()
		live, lost, diverged, moved := 0, 0, 0, false
		f.mu.Lock()
		for _, g := range f.gateways {
			if g.source != here {
				if f.longSilent(g, now) {
					lost++
				}
				continue
			}
			if g.comparison.Verdict == Diverged {
				diverged++
			}
			if f.standing(g, now) == Lost {
				lost++
				moved = moved || now.Sub(f.expiry(g)) < 3*time.Second
				continue
			}
			live++
			f.askDigest(g, now)
		}
		f.reports = live
		if moved {
			f.announce()
		}
		f.mu.Unlock()
		f.metrics.live.Set(float64(live))
		f.metrics.lost.Set(float64(lost))
		f.metrics.diverged.Set(float64(diverged))
		if moved {
			kick(f.kicks.refresh)
		}
	}
}

// refreshLost finds out whether a gateway that fell silent reports to another process now.
func (f *Fleet) refreshLost(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-f.kicks.refresh:
		case <-ctx.Done():
			return
		}
		if err := f.Refresh(ctx); err != nil && ctx.Err() == nil {
			f.log.Warn("cannot ask other processes for gateways that fell silent", "error", err)
		}
		pause(ctx, 2*time.Second)
	}
}

// askDigest asks for the digest of this minute when its second has come, and again for one that was asked
// for and did not come. It needs f.mu.
func (f *Fleet) askDigest(g *gateway, now time.Time) {
	if d := &g.digest; now.Before(d.until) {
		if !d.told.IsZero() && now.Sub(d.told) > digestAgain {
			d.told = time.Time{}
			g.wake()
		}
		return
	}
	cutoff := now.Unix() / minute * minute
	if f.state == nil || g.compared.cutoff >= cutoff || now.Unix()-cutoff < int64(g.slot%spread) {
		return
	}
	g.compared.cutoff = cutoff
	// At an earlier position than this state's a gateway may hold more than it knows of, from the snapshot
	// that it has loaded, see [replica.State.Digest].
	g.wish(digestWish{DigestRequest: replica.DigestRequest{Cutoff: cutoff, After: f.state.At()}, until: now.Add(digestFor)}, now)
}

// compare compares the digests that come.
func (f *Fleet) compare(ctx context.Context) {
	if f.state == nil {
		return
	}
	var later []*gateway
	var made logDigests
	for ctx.Err() == nil {
		timer := time.NewTimer(100 * time.Millisecond)
		wake := timer.C
		if len(later) == 0 {
			wake = nil
		}
		select {
		case <-f.kicks.compare:
		case <-wake:
		case <-ctx.Done():
		}
		timer.Stop()
		f.mu.Lock()
		todo := append(later, f.queue...)
		f.queue, later = nil, nil
		f.mu.Unlock()
		for _, g := range todo {
			if ctx.Err() == nil && !f.compareOne(ctx, g, &made) {
				later = append(later, g)
			}
		}
	}
}

// logDigests are the log's digests that were made.
type logDigests struct {
	byCutoff map[int64]madeDigests
	last     time.Time // when some were last begun
}

type madeDigests struct {
	digests
	at time.Time
}

var errNotNow = errors.New("digests were made a moment ago")

// of returns those of a cutoff, which it makes if they are not there. Its error is errNotNow if it would do
// so too soon after others.
func (l *logDigests) of(ctx context.Context, f *Fleet, cutoff int64) (madeDigests, error) {
	if d, ok := l.byCutoff[cutoff]; ok {
		return d, nil
	}
	now := time.Now()
	if now.Sub(l.last) < digestsApart {
		return madeDigests{}, errNotNow
	}
	l.last = now
	d, err := f.makeDigests(ctx, cutoff)
	if err != nil {
		return madeDigests{}, fmt.Errorf("make the log's digests: %w", err)
	}
	if l.byCutoff == nil {
		l.byCutoff = make(map[int64]madeDigests)
	}
	if len(l.byCutoff) >= keepDigests {
		delete(l.byCutoff, slices.Min(slices.Collect(maps.Keys(l.byCutoff))))
	}
	made := madeDigests{d, now}
	l.byCutoff[cutoff] = made
	return made, nil
}

// compareOne reports whether it is done with the gateway's last digest. It is not while the log's state
// is not at its position, or has no digests yet.
func (f *Fleet) compareOne(ctx context.Context, g *gateway, made *logDigests) bool {
	f.mu.Lock()
	d, came, due := g.compared.digest, g.compared.came, g.compared.due && f.gateways[g.id] == g
	v := Gateway{Tenant: g.tenant, Sees: g.sees, Report: g.report}
	f.mu.Unlock()
	if !due { // it is another process's by now, or gone
		return true
	}
	log, err := made.of(ctx, f, d.Cutoff)
	if errors.Is(err, errNotNow) {
		return false
	}
	if err != nil {
		f.mu.Lock()
		g.compared.due = false
		f.mu.Unlock()
		if ctx.Err() == nil {
			f.log.Warn("cannot compare a gateway with the log, it is asked again in the next minute", "gateway", g.id, "error", err)
		}
		return true
	}
	want, err := log.At(d.Position, v.DigestScope())
	now := time.Now()
	switch {
	case errors.Is(err, replica.ErrNotYet) && now.Sub(came) < notYetFor:
		return false
	case errors.Is(err, replica.ErrForgotten) && now.Sub(log.at) > digestsOld && d.Epoch == f.state.At().Epoch:
		// Too much has happened since, or a snapshot was loaded; the position itself may be known well.
		delete(made.byCutoff, d.Cutoff)
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if g.compared.digest != d { // another one has come
		return false
	}
	g.compared.due = false
	c := Comparison{Verdict: Unknown, At: d.Position, Time: now}
	switch {
	case err != nil:
		c.Detail = fmt.Sprintf("They could not be compared at %s: %s.", d.Position, err)
		if g.comparison.Verdict == Diverged { // nothing shows that it no longer is
			return true
		}
	case d.Revocations == want.Revocations && d.Catalog == want.Catalog:
		c.Verdict, g.compared.differs = Equal, 0
	default:
		g.compared.differs++
		c.Detail = difference(d, want)
		switch {
		case g.compared.differs == 1 && g.comparison.Verdict != Diverged:
			c.Verdict, c.Detail = g.comparison.Verdict, c.Detail+" It is compared again, for one difference may be due to chance."
			// Another cutoff, or the digest that is known already would be an answer; and one that is compared.
			again := min(d.Cutoff, now.Unix()+comparedAhead-minute) + minute
			again -= again % minute
			g.wish(digestWish{
				DigestRequest: replica.DigestRequest{Cutoff: again, After: f.state.At()}, until: now.Add(digestFor),
			}, now)
		default:
			c.Verdict = Diverged
			f.diverged(g, now)
			f.log.Warn("a gateway's state is not the log's", "gateway", g.id, "at", d.Position.String(), "detail", c.Detail)
		}
	}
	g.comparison = c
	f.talk.some, f.talk.urgent = true, true
	kick(f.kicks.tell)
	f.announce()
	return true
}

// diverged asks g to load a snapshot, unless it was lately, or too many do. It needs f.mu.
func (f *Fleet) diverged(g *gateway, now time.Time) {
	if !g.compared.loading.IsZero() && now.Sub(g.compared.loading) < loadAgain {
		return
	}
	f.loading = slices.DeleteFunc(f.loading, func(at time.Time) bool { return now.Sub(at) > loadTakes })
	if len(f.loading) >= loadsAtATime {
		return
	}
	f.loading = append(f.loading, now)
	g.compared.loading = now
	g.load(uuid.NewString(), now)
}

// DigestScope is what the gateway holds of the log, for comparing: the tenants that it names. One that
// names none holds all, whatever its account sees, as one that follows etcd does; but for one whose account
// sees more than it can name, for that leaves the list out.
func (g *Gateway) DigestScope() replica.DigestScope {
	s := replica.DigestScope{RevocationsOnly: g.Report.RevocationsOnly}
	if len(g.Report.Tenants) > 0 {
		named := make(map[string]bool, len(g.Report.Tenants))
		for _, d := range g.Report.Tenants {
			named[d] = true
		}
		s.Sees = func(domain string) bool { return named[domain] }
		return s
	}
	if !slices.Contains(g.Sees, allTenants) && checkTenants(append([]string{g.Tenant}, g.Sees...)) != nil {
		v := *g
		s.Sees = v.Serves
	}
	return s
}

// difference says in a sentence how what a gateway has differs from what it had to have.
func difference(has, want replica.Digest) string {
	var parts []string
	part := func(what string, has, want int, equal bool) {
		switch {
		case equal:
		case has == want:
			parts = append(parts, fmt.Sprintf("%d %s, as many as the log has but not the same", has, what))
		case has > want:
			parts = append(parts, fmt.Sprintf("%d %s where the log has %d; what is too much stays until it ends", has, what, want))
		default:
			parts = append(parts, fmt.Sprintf("%d %s where the log has %d", has, what, want))
		}
	}
	part("revocations", has.Count, want.Count, has.Revocations == want.Revocations)
	part("entities of the catalog", has.Entities, want.Entities, has.Catalog == want.Catalog)
	return fmt.Sprintf("At %s it holds %s.", has.Position, strings.Join(parts, ", and "))
}
