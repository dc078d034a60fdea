// Package verify compares what Postgres has, what etcd has, and what each gateway has, at the same places
// of the log.
//
// # Decisions
//
// Nobody is stopped for it. Each of them says what it has at a position of its own, and the log's state is
// taken back, or waited for, to that position.
//
// An answer has to be one to this question, and not what was true when somebody asked a minute ago. What
// tells them apart is the cutoff, the minute from which revocations count: it is one that no gateway has
// answered yet, a little ahead of the clock. What ends before it does not count for anybody.
//
// A first difference may be a race that nobody has thought of, so whoever differs is asked again, with a
// later cutoff. Only who differs both times has diverged.
package verify

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
)

// Log is the state in Postgres: a follower that was loaded from it by this process, with history, and that
// is run. [follow.Follower] is one.
type Log interface {
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.State
}

// Directory is etcd's. Load reads all of it at one moment into a state of revocations only. It is nil where
// the log is fed to none.
type Directory interface {
	Load(ctx context.Context, s *replica.State) error
}

// Fleet is [fleet.Fleet].
type Fleet interface {
	Refresh(ctx context.Context) error
	Gateways() []fleet.Gateway
	AskDigests(ctx context.Context, r replica.DigestRequest) error
	AskLoad(ctx context.Context, ids []string) error
	Changed() <-chan struct{}
}

// Options are for [Run].
type Options struct {
	// Now is the time by the database's clock, by which the service's processes go too. Default: by this
	// machine's.
	Now time.Time
	// Timeout is how long gateways and etcd have to answer. Default 15 s.
	Timeout time.Duration
	// Tell asks gateways that have diverged to load a snapshot, up to 20 of them.
	Tell bool
}

// Report is what came of it.
type Report struct {
	// Postgres is the log's digest, of all tenants.
	Postgres  replica.Digest
	Directory *Member // nil: there is none
	Gateways  []Member
}

// Equal reports whether all of it is. What was not compared, because it is lost or did not answer, is not
// known to be.
func (r Report) Equal() bool {
	differs := func(m Member) bool { return m.Verdict != fleet.Equal }
	return !slices.ContainsFunc(r.Gateways, differs) && (r.Directory == nil || !differs(*r.Directory))
}

// Member is etcd, or a gateway.
type Member struct {
	ID       string         // of a gateway
	Standing fleet.Standing // of a gateway
	Verdict  fleet.Verdict
	// Digest is the member's, Want what the log says it had to be. Both are zero if it was not compared.
	Digest, Want replica.Digest
	// Detail says in a sentence how they differ, or why they were not compared.
	Detail string
	// Told: it was asked to load a snapshot.
	Told bool
}

const (
	defaultTimeout = 15 * time.Second
	// pause is how long it takes at most until something is looked at again.
	pause = 250 * time.Millisecond
	// askAgain is after how long a question is repeated: the fleet forgets it after a while.
	askAgain = 10 * time.Second
	minute   = int64(60)
	// tellAtOnce is how many gateways are told to load a snapshot: more of them do so together only if what is wrong
	// is not theirs. The service tells others by and by.
	tellAtOnce = 20
	// ahead is how many minutes ahead of the clock a cutoff may be. What ends until then is not compared.
	ahead = 10
)

// Run compares. Its error is one of Postgres, or that of ctx; what concerns etcd and gateways is in the
// report.
func Run(ctx context.Context, log Log, directory Directory, f Fleet, o Options) (Report, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	o.Timeout = cmp.Or(o.Timeout, defaultTimeout)
	if err := f.Refresh(ctx); err != nil {
		return Report{}, fmt.Errorf("read what is known of the gateways: %w", err)
	}
	head, err := log.Fresh(ctx, 0)
	if err != nil {
		return Report{}, fmt.Errorf("read the log's head: %w", err)
	}
	first := unanswered(f.Gateways(), o.Now)
	c := &comparison{log: log, fleet: f, after: head, first: first, digests: make(map[int64]*replica.Digests)}

	limited, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	if err := c.ask(limited, first); err != nil {
		return Report{}, err
	}
	var report Report
	if report.Postgres, err = c.want(ctx, head, first, replica.DigestScope{}); err != nil {
		return Report{}, fmt.Errorf("digest what Postgres has at %s: %w", head, err)
	}
	var beside sync.WaitGroup
	if directory != nil {
		beside.Go(func() {
			m := c.directory(limited, directory)
			report.Directory = &m
		})
	}
	report.Gateways, err = c.gateways(limited)
	beside.Wait()
	if err := cmp.Or(context.Cause(ctx), err); err != nil {
		return Report{}, err
	}
	if o.Tell {
		return report, c.tell(ctx, report.Gateways)
	}
	return report, nil
}

// unanswered is the first whole minute after now that no gateway has made a digest for.
func unanswered(gateways []fleet.Gateway, now time.Time) int64 {
	first := (now.Unix()/minute + 1) * minute
	last := first + (ahead-1)*minute // one more for those that are asked again
	for _, g := range gateways {
		if d := g.Report.Digest; d != nil && d.Cutoff >= first && d.Cutoff < last {
			first = d.Cutoff + minute
		}
	}
	return first
}

// comparison is one under way.
type comparison struct {
	log     Log
	fleet   Fleet
	after   revocation.Position // what is compared is not from before
	first   int64               // the cutoff that was asked for first
	asked   int64               // the last one, at askedAt
	askedAt time.Time

	mu      sync.Mutex
	digests map[int64]*replica.Digests // the log's, by cutoff
}

// ask asks all gateways.
func (c *comparison) ask(ctx context.Context, cutoff int64) error {
	c.asked, c.askedAt = cutoff, time.Now()
	if err := c.fleet.AskDigests(ctx, replica.DigestRequest{Cutoff: cutoff, After: c.after}); err != nil {
		return fmt.Errorf("ask the gateways for digests: %w", err)
	}
	return nil
}

// want is the digest that the log's state of this scope has at p. Errors: [replica.ErrNotYet],
// [replica.ErrForgotten], that of ctx.
func (c *comparison) want(ctx context.Context, p revocation.Position, cutoff int64, scope replica.DigestScope) (replica.Digest, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for again := false; ; again = true {
		d := c.digests[cutoff]
		if d == nil {
			var err error
			if d, err = c.log.Replica().Digests(ctx, cutoff); err != nil {
				return replica.Digest{}, err
			}
			c.digests[cutoff] = d
		}
		want, err := d.At(p, scope)
		if !errors.Is(err, replica.ErrForgotten) || again {
			return want, err
		}
		delete(c.digests, cutoff) // the state may have been loaded again since
	}
}

// compare makes d part of m. With final a difference is one for good. It reports whether m's verdict is.
func (c *comparison) compare(ctx context.Context, m *Member, d replica.Digest, scope replica.DigestScope, final bool) (settled bool) {
	want, err := c.want(ctx, d.Position, d.Cutoff, scope)
	switch {
	case errors.Is(err, replica.ErrNotYet):
		// With the head at hand only a log that was restored to an older state stays behind.
		m.Detail = fmt.Sprintf("is at seq %d, which Postgres has not come to: if it stays so, the database was restored, see rescind epoch --help", d.Seq)
		return false
	case errors.Is(err, replica.ErrForgotten):
		m.Detail = fmt.Sprintf("is at seq %d, which is too long ago to be compared, or of another epoch", d.Seq)
		return false
	case err != nil:
		return false // out of time
	}
	m.Digest, m.Want = d, want
	switch {
	case d == want:
		m.Verdict, m.Detail = fleet.Equal, ""
		return true
	case final:
		m.Verdict, m.Detail = fleet.Diverged, difference(d, want)
		return true
	}
	m.Detail = "differed once, and could not be compared a second time: " + difference(d, want)
	return false
}

// difference says how got differs from want.
func difference(got, want replica.Digest) string {
	var parts []string
	switch {
	case got.Count != want.Count:
		parts = append(parts, fmt.Sprintf("has %d of the log's %d revocations", got.Count, want.Count))
		if got.Count > want.Count {
			parts[0] = fmt.Sprintf("has %d revocations, and the log %d", got.Count, want.Count)
		}
	case got.Revocations != want.Revocations:
		parts = append(parts, fmt.Sprintf("has %d revocations as the log does, but not the same", got.Count))
	}
	switch {
	case got.Entities != want.Entities:
		parts = append(parts, fmt.Sprintf("has %d entities, and the log %d", got.Entities, want.Entities))
	case got.Catalog != want.Catalog:
		parts = append(parts, fmt.Sprintf("has %d entities as the log does, but not the same versions", got.Entities))
	}
	return strings.Join(parts, "; ")
}

// candidate is a gateway that is being compared.
type candidate struct {
	Member
	settled bool
	differs int64 // the cutoff of the first digest that differed, 0: none has
}

// gateways compares all of them until each live one has a verdict, or ctx ends.
func (c *comparison) gateways(ctx context.Context) ([]Member, error) {
	candidates := make(map[string]*candidate)
	for {
		changed := c.fleet.Changed() // before the look, so that nothing is missed
		all := c.fleet.Gateways()
		open, again := false, false
		for _, g := range all {
			m := candidates[g.ID]
			if m == nil {
				m = &candidate{Member: Member{ID: g.ID, Verdict: fleet.Unknown}}
				candidates[g.ID] = m
			}
			m.Standing = g.Standing
			differed := c.look(ctx, m, &g)
			again = again || differed
			open = open || !m.settled && g.Standing == fleet.Live
		}
		if !open || ctx.Err() != nil {
			return members(all, candidates), nil
		}
		var err error
		switch {
		case again:
			err = c.ask(ctx, c.asked+minute)
		case time.Since(c.askedAt) > askAgain:
			err = c.ask(ctx, c.asked)
		}
		if err != nil && ctx.Err() == nil {
			return nil, err
		}
		tick := time.NewTimer(pause) // also for what has no sign, such as a lease that ends
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
		}
		tick.Stop()
	}
}

// look compares what g has told, if that is an answer. It reports whether g is to be asked again.
func (c *comparison) look(ctx context.Context, m *candidate, g *fleet.Gateway) (again bool) {
	d := g.Report.Digest
	// A later one than was asked for is an answer too: the service asks by itself. One far ahead leaves out too much.
	if m.settled || d == nil || d.Cutoff < c.first || d.Cutoff > c.first+ahead*minute || d.Cutoff <= m.differs ||
		d.Epoch != c.after.Epoch || d.Seq < c.after.Seq {
		return false
	}
	m.settled = c.compare(ctx, &m.Member, *d, g.DigestScope(), m.differs != 0)
	if m.settled || m.Digest != *d {
		return false
	}
	m.differs = d.Cutoff
	again = d.Cutoff >= c.asked                                     // else it has been asked already
	c.asked = max(c.asked, min(d.Cutoff, c.first+(ahead-1)*minute)) // the next question is not answered by what is known
	return again
}

// members are the results for those that are still there.
func members(all []fleet.Gateway, candidates map[string]*candidate) []Member {
	out := make([]Member, 0, len(all))
	for _, g := range all {
		m := candidates[g.ID]
		switch {
		case m.settled || m.Detail != "":
		case g.Standing == fleet.Lost:
			m.Detail = fmt.Sprintf("is lost: it has not reported since %s, and cannot be asked", g.ReportedAt.UTC().Format(time.RFC3339))
		case g.Report.Epoch == "":
			m.Detail = "has loaded nothing yet"
		default:
			m.Detail = fmt.Sprintf("did not answer in time; it was at seq %d", g.Report.Seq)
		}
		out = append(out, m.Member)
	}
	return out
}

// directory compares etcd's.
func (c *comparison) directory(ctx context.Context, d Directory) Member {
	m := Member{Verdict: fleet.Unknown}
	for differed := false; ; {
		s := replica.NewState(replica.StateConfig{})
		err := d.Load(ctx, s)
		var digest replica.Digest
		if err == nil {
			digest, err = s.Digest(ctx, c.first, s.At())
		}
		switch at := s.At(); {
		case ctx.Err() != nil && m.Detail != "":
			return m // what was found before says more than that there was no time left
		case err != nil:
			m.Detail = fmt.Sprintf("could not be read: %v", err)
		case at.Epoch != c.after.Epoch:
			m.Detail = "is of another epoch of the log: a service that feeds it puts that right when it starts"
		case at.Seq < c.after.Seq:
			m.Detail = fmt.Sprintf("is at seq %d, %d events behind: nothing feeds it, or not fast enough", at.Seq, c.after.Seq-at.Seq)
		default:
			if c.compare(ctx, &m, digest, replica.DigestScope{RevocationsOnly: true}, differed) {
				return m
			}
			differed = differed || m.Digest == digest
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return m
		}
	}
}

// tell asks those that have diverged to load a snapshot.
func (c *comparison) tell(ctx context.Context, gateways []Member) error {
	var ids []string
	for i := range gateways {
		if m := &gateways[i]; m.Verdict == fleet.Diverged && len(ids) < tellAtOnce {
			ids = append(ids, m.ID)
			m.Told = true
		}
	}
	if len(ids) == 0 {
		return nil
	}
	if err := c.fleet.AskLoad(ctx, ids); err != nil {
		return fmt.Errorf("ask %s to load a snapshot: %w", strings.Join(ids, ", "), err)
	}
	return nil
}
