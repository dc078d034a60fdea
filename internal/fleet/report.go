package fleet

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
)

// What is asked for is asked again when it did not come, for an answer may be lost. A gateway that is
// asked to confirm answers within two seconds anyhow; one that answers at once that it has not applied
// it must not be asked in a circle.
const (
	confirmAgain = time.Second
	digestAgain  = 20 * time.Second
)

// Report takes a report, and returns when there is something to ask, or the next one is due: after
// Config.ReportEvery, or longer, so that all gateways that report to this process send at most 1,000
// reports a second; the lease is then at least three times as long. Hold is false for a caller that
// cannot wait; then, and when too many wait, Instructions.NextMS says when the next one is due.
//
// The one who leaves is removed, unless another process reports with the same id. Errors: [ErrID],
// [ErrReport], [ErrOwned], [ErrInstance], [ErrTooMany], that of ctx, or one of the database.
func (f *Fleet) Report(ctx context.Context, by authn.Account, id string, r replica.Report, hold bool) (replica.Instructions, error) {
	in, err := f.report(ctx, by, id, r, hold)
	if ctx.Err() == nil || !errors.Is(err, ctx.Err()) {
		f.metrics.reported(err)
	}
	return in, err
}

func (f *Fleet) report(ctx context.Context, by authn.Account, id string, r replica.Report, hold bool) (replica.Instructions, error) {
	if f.cfg.Observe {
		return replica.Instructions{}, errors.New("take a report: this process only observes")
	}
	if !replica.ValidID(id) {
		return replica.Instructions{}, ErrID
	}
	now := time.Now()
	if err := check(&r, now); err != nil {
		return replica.Instructions{}, fmt.Errorf("%w: %w", ErrReport, err)
	}
	if r.Leaving {
		return replica.Instructions{}, f.leave(ctx, by, id, &r)
	}
	if err := f.untilKnown(ctx); err != nil {
		return replica.Instructions{}, err
	}
	g, err := f.claimed(ctx, by, id, &r)
	if err != nil {
		return replica.Instructions{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock() // given back while it waits
	g, err = f.take(g, by, &r, now)
	if err != nil {
		return replica.Instructions{}, err
	}
	if hold && f.held < f.cfg.MaxHeld && !f.ended {
		return f.hold(ctx, g, now)
	}
	in, _, _ := f.instructions(g, now)
	in.NextMS = f.every().Milliseconds()
	return in, nil
}

// untilKnown waits until the others know whom to ask for gateways that report here, which is soon after the
// start; or they do without, as they did before.
func (f *Fleet) untilKnown(ctx context.Context) error {
	select {
	case <-f.known:
		return nil
	default:
	}
	t := time.NewTimer(answerWithin)
	defer t.Stop()
	select {
	case <-f.known:
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// claimed returns the gateway, if by may report for it.
func (f *Fleet) claimed(ctx context.Context, by authn.Account, id string, r *replica.Report) (*gateway, error) {
	f.mu.Lock()
	g := f.gateways[id]
	victim, full := "", false
	if g == nil {
		victim, full = f.full(by.Username)
	}
	f.mu.Unlock()
	switch {
	case g != nil && g.account != by.Username: // neither is changed
		return nil, ErrOwned
	case g != nil:
		return g, nil
	case full && victim == "":
		return nil, ErrTooMany
	}
	g, err := f.claim(ctx, by, id, victim, r)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if known := f.gateways[id]; known != nil {
		g = known
	} else {
		f.add(g)
	}
	if g.account != by.Username {
		return nil, ErrOwned
	}
	return g, nil
}

// full reports whether there is no place for another gateway of an account, and which one gives its own up,
// empty if none does: the longest lost one without a canary. It needs f.mu.
func (f *Fleet) full(account string) (victim string, full bool) {
	most := f.perAccount()
	owns := f.owned[account] >= most
	if !owns && len(f.gateways) < f.cfg.MaxGateways {
		return "", false
	}
	now, oldest := time.Now(), time.Time{}
	for _, g := range f.gateways {
		if owns && g.account != account || g.canaryURL != "" || now.Sub(g.reportedAt) < evictAfter || f.standing(g, now) == Live {
			continue
		}
		if victim == "" || g.reportedAt.Before(oldest) {
			victim, oldest = g.id, g.reportedAt
		}
	}
	return victim, true
}

// perAccount is how many gateways one account may have.
func (f *Fleet) perAccount() int { return (f.cfg.MaxGateways + 1) / 2 }

// take makes r what is known of g, and returns what g is now. It needs f.mu.
func (f *Fleet) take(g *gateway, by authn.Account, r *replica.Report, now time.Time) (*gateway, error) {
	switch known := f.gateways[g.id]; {
	case known == nil: // forgotten at this moment, so it is there again
		g = newGateway(g.id)
		g.account, g.firstSeen = by.Username, now
		f.add(g)
	case known.account != by.Username:
		return nil, ErrOwned
	default:
		g = known
	}
	if r.Instance != g.report.Instance {
		if later(&g.report, r) && f.standing(g, now) == Live {
			g.conflict = now
			f.announce()
			return nil, ErrInstance
		}
		g.wake() // an older one's report
		g.held, g.comparison, g.compared, g.digest, g.asked = nil, Comparison{}, comparing{}, digestWish{}, askedFor{}
		g.written = time.Time{} // the one before may say that it leaves
	}
	if g.source != here {
		g.source, g.from = here, ""
		f.reports++
		f.talk.urgent = true
		kick(f.kicks.tell)
	}
	g.tenant, g.sees = by.Tenant.Domain, seesOf(by)
	f.heard(g, r, now)
	g.lease = f.leaseNow()
	f.compareNext(g, now)
	f.tellSoon(g, r)
	return g, nil
}

var seesAll = []string{allTenants}

// heard is about a report of this process or of another one. It needs f.mu.
func (f *Fleet) heard(g *gateway, r *replica.Report, at time.Time) {
	before, tenants := g.report.Position, f.lists.shared(r.Tenants, g.report.Tenants)
	g.report, g.reportedAt = *r, at
	g.report.Tenants = tenants
	if r.Epoch == before.Epoch {
		g.report.Epoch = before.Epoch // one string for all
	}
	g.sightings.add(Sighting{At: at, Position: g.report.Position})
	if len(f.barriers) > 0 {
		now := time.Now() // one of another process may be old
		for w := range f.barriers {
			w.observe(f, g, now)
		}
	}
	f.announce()
}

// later reports whether a is of a process that started later than b's.
func later(a, b *replica.Report) bool {
	return a.Started > b.Started || a.Started == b.Started && a.Instance > b.Instance
}

// hold waits until there is something to answer. It needs f.mu, which it gives back meanwhile. A newer
// report of the same gateway ends it: its sender has given up.
func (f *Fleet) hold(ctx context.Context, g *gateway, now time.Time) (replica.Instructions, error) {
	in, urgent, again := f.instructions(g, now)
	if urgent {
		return in, nil
	}
	h := &held{wake: make(chan struct{}, 1)}
	g.wake()
	g.held = h
	instance, due := g.report.Instance, now.Add(f.every())
	f.held++
	defer func() {
		f.held--
		if g.held == h {
			g.held = nil
		}
	}()
	t := time.NewTimer(wait(now, due, again))
	defer t.Stop()
	for {
		f.mu.Unlock()
		var err error
		select {
		case <-h.wake:
		case <-t.C:
		case <-ctx.Done():
			err = ctx.Err()
		}
		f.mu.Lock()
		now := time.Now()
		switch {
		case err != nil:
			return replica.Instructions{}, err
		case g.report.Instance != instance && g.held != h:
			return replica.Instructions{}, ErrInstance
		case g.held != h || f.gateways[g.id] != g:
			return replica.Instructions{}, nil
		}
		in, urgent, again := f.instructions(g, now)
		if urgent || f.ended || !now.Before(due) {
			return in, nil
		}
		t.Reset(wait(now, due, again))
	}
}

func wait(now, due, again time.Time) time.Duration {
	if !again.IsZero() && again.Before(due) {
		due = again
	}
	return due.Sub(now)
}

// instructions are what g is asked for now, and whether that is worth an answer at once. Again is when
// something will be, zero if nothing. What is urgent, or answered anyhow, counts as asked. It needs f.mu.
func (f *Fleet) instructions(g *gateway, now time.Time) (in replica.Instructions, urgent bool, again time.Time) {
	if p, ok := f.talk.unconfirmed(g.report.Position, now); ok {
		ready := g.confirm.at.Add(confirmAgain)
		if p != g.confirm.Position {
			ready = g.confirm.at.Add(f.every() / 40) // or a stream of barriers would be one of reports
		}
		if now.Before(ready) {
			again = ready
		} else {
			g.confirm.Position, g.confirm.at = p, now
			in.Confirm, urgent = p, true
		}
	}
	if d := &g.digest; now.Before(d.until) && d.told.IsZero() {
		d.told = now
		g.asked.add(d.Cutoff)
		in.Digest, urgent = &replica.DigestRequest{Cutoff: d.Cutoff, After: d.After}, true
	}
	if l := &g.loads; now.Before(l.until) {
		in.Load, urgent = l.name, urgent || !l.told
		l.told = true
	}
	return in, urgent, again
}

// leave removes a gateway, unless a later process reports with its id, also to another process of the
// service.
func (f *Fleet) leave(ctx context.Context, by authn.Account, id string, r *replica.Report) error {
	f.mu.Lock()
	g := f.gateways[id]
	owned := g != nil && g.account != by.Username
	replaced := g != nil && g.report.Instance != r.Instance && later(&g.report, r)
	f.mu.Unlock()
	switch {
	case owned:
		return ErrOwned
	case replaced:
		return nil
	}
	left, err := f.storeLeft(ctx, by.Username, id, r)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left(id, r)
	if !left { // the database knows of a later one
		f.rowsChanged([]string{id})
	}
	return nil
}

// left removes a gateway whose last report was r, unless a later process is known to report with its id. It
// needs f.mu.
func (f *Fleet) left(id string, r *replica.Report) {
	switch g := f.gateways[id]; {
	case g == nil:
	case g.source == stored || g.report.Instance == r.Instance || !later(&g.report, r):
		f.remove(g) // an earlier one that still reports is there again with its next report
	case g.source == here: // the database is to know of it
		g.written = time.Time{}
	}
}

const (
	maxLabels  = 16
	maxFeeds   = 16
	maxTenants = 500
	// maxTenantBytes and maxTenants are what a replica names; past them it leaves the list out.
	maxTenantBytes = 24 << 10
	maxError       = 1 << 10
	// maxKept is what is kept of a report, but for its tenants.
	maxKept = 8 << 10
)

// cutoffAhead is how far the cutoff of a digest may be ahead of the service's clock: it is the service that
// chose it.
const cutoffAhead = 12 * minute

// check says what is wrong with a report, in the words of its JSON. It shortens the errors in it, and takes
// times that are more than a day ahead of the service's clock for one that is the same for all such: a
// gateway whose clock is wrong is to be seen.
func check(r *replica.Report, now time.Time) error {
	ahead := now.Truncate(24 * time.Hour).Add(48 * time.Hour).UnixMilli()
	switch {
	case !canonical(r.Instance):
		return errors.New("instance must be a UUID in its canonical form")
	case r.Started <= 0:
		return fmt.Errorf("started is %d, must be Unix milliseconds", r.Started)
	case len(r.Labels) > maxLabels:
		return fmt.Errorf("there are %d labels, at most %d may be", len(r.Labels), maxLabels)
	case !text(r.Version, 0, 128):
		return errors.New("version must be at most 128 bytes of UTF-8 without control characters")
	case r.AgeMS < -1:
		return fmt.Errorf("age_ms is %d, must be -1 or more", r.AgeMS)
	case r.Revocations < 0 || r.Entities < 0:
		return errors.New("revocations and entities must not be negative")
	case len(r.Feeds) > maxFeeds:
		return fmt.Errorf("there are %d feeds, at most %d may be", len(r.Feeds), maxFeeds)
	}
	if err := checkPosition(r.Position); err != nil {
		return err
	}
	for k, v := range r.Labels {
		if !text(k, 1, 63) || !text(v, 0, 255) {
			return errors.New("a label's name must be 1 to 63 bytes, its value at most 255, of UTF-8 without control characters")
		}
	}
	if err := checkTenants(r.Tenants); err != nil {
		return err
	}
	for _, d := range r.Tenants {
		if !text(d, 1, 200) {
			return errors.New("a tenant's domain must be 1 to 200 bytes of UTF-8 without control characters")
		}
	}
	r.Started = min(r.Started, ahead)
	kept := len(r.Version)
	for k, v := range r.Labels {
		kept += len(k) + len(v)
	}
	for i := range r.Feeds {
		kept += len(r.Feeds[i].Name)
	}
	r.Error = short(r.Error, maxError)
	kept += len(r.Error)
	for i := range r.Feeds {
		feed := &r.Feeds[i]
		if !text(feed.Name, 1, 128) {
			return errors.New("a feed's name must be 1 to 128 bytes of UTF-8 without control characters")
		}
		if feed.Heard < 0 {
			return fmt.Errorf("heard is %d, must be Unix milliseconds", feed.Heard)
		}
		feed.Heard = min(feed.Heard, ahead)
		feed.Error = short(feed.Error, min(maxError, max(0, maxKept-kept)/len(r.Feeds)))
	}
	if d := r.Digest; d != nil {
		if err := checkPosition(d.Position); err != nil {
			return fmt.Errorf("digest: %w", err)
		}
		if d.Cutoff < 0 || d.Cutoff%60 != 0 || d.Count < 0 || d.Entities < 0 {
			return errors.New("digest: cutoff must be Unix seconds of a whole minute, count and entities must not be negative")
		}
		if d.Cutoff > now.Unix()+cutoffAhead {
			return fmt.Errorf("digest: cutoff is %d, must not be more than 12 minutes ahead of the service's clock", d.Cutoff)
		}
	}
	return nil
}

func checkTenants(domains []string) error {
	size := 0
	for _, d := range domains {
		size += len(d)
	}
	if len(domains) > maxTenants || size > maxTenantBytes {
		return fmt.Errorf("there are %d tenants of %d bytes, at most %d of %d may be; the list is left out if there are more",
			len(domains), size, maxTenants, maxTenantBytes)
	}
	return nil
}

func checkPosition(p revocation.Position) error {
	switch {
	case p.Seq < 0:
		return fmt.Errorf("seq is %d, must not be negative", p.Seq)
	case p.Epoch == "" && p.Seq != 0:
		return errors.New("seq needs an epoch")
	case p.Epoch != "" && !canonical(string(p.Epoch)):
		return errors.New("epoch must be a UUID in its canonical form, or empty")
	}
	return nil
}

// canonical is about a UUID of lower-case hexadecimal digits.
func canonical(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		if 'A' <= s[i] && s[i] <= 'F' {
			return false
		}
	}
	return uuid.Validate(s) == nil
}

// text is about UTF-8 of least to most bytes without control characters.
func text(s string, least, most int) bool {
	return len(s) >= least && len(s) <= most && utf8.ValidString(s) && strings.IndexFunc(s, control) < 0
}

func control(c rune) bool { return c < 0x20 || 0x7f <= c && c < 0xa0 }

// short makes an error one line of so many bytes at most, for it is shown to people and kept as JSON. What
// it returns keeps no longer one in memory.
func short(s string, most int) string {
	if len(s) <= most && text(s, 0, most) {
		return s
	}
	s = strings.Map(func(c rune) rune {
		if control(c) {
			return ' '
		}
		return c
	}, strings.ToValidUTF8(s[:min(len(s), most)], ""))
	return strings.Clone(s)
}
