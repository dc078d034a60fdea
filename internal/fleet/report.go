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
	if !validID(id) {
		return replica.Instructions{}, ErrID
	}
	now := time.Now()
	if err := check(&r, now); err != nil {
		return replica.Instructions{}, fmt.Errorf("%w: %w", ErrReport, err)
	}
	g, err := f.claimed(ctx, by, id, &r)
	if g == nil {
		return replica.Instructions{}, err
	}
	if r.Leaving {
		return replica.Instructions{}, f.leave(ctx, g, &r)
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

// claimed returns the gateway, if by may report for it. A nil error with no gateway means that one leaves
// that is not known.
func (f *Fleet) claimed(ctx context.Context, by authn.Account, id string, r *replica.Report) (*gateway, error) {
	f.mu.Lock()
	g := f.gateways[id]
	full := len(f.gateways) >= f.cfg.MaxGateways || f.owned[by.Username] >= (f.cfg.MaxGateways+1)/2
	f.mu.Unlock()
	switch {
	case g != nil && g.account != by.Username: // neither is changed
		return nil, ErrOwned
	case g != nil || r.Leaving:
		return g, nil
	case full:
		return nil, ErrTooMany
	}
	g, err := f.claim(ctx, by, id, r)
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
		g.held, g.comparison, g.compared, g.digest = nil, Comparison{}, comparing{}, digestWish{}
	}
	if g.source != here {
		g.source = here
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
	before := g.report.Position
	g.report, g.reportedAt = *r, at
	if r.Epoch == before.Epoch {
		g.report.Epoch = before.Epoch // one string for all
	}
	g.sightings.add(Sighting{At: at, Position: g.report.Position})
	for w := range f.barriers {
		w.observe(f, g, at)
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
		in.Digest, urgent = &replica.DigestRequest{Cutoff: d.Cutoff, After: d.After}, true
	}
	if l := &g.loads; now.Before(l.until) {
		in.Load, urgent = l.name, urgent || !l.told
		l.told = true
	}
	return in, urgent, again
}

// leave removes g, if it is r's process that is known.
func (f *Fleet) leave(ctx context.Context, g *gateway, r *replica.Report) error {
	current := func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.gateways[g.id] == g && g.report.Instance == r.Instance
	}
	if !current() {
		return nil
	}
	if err := f.storeLeft(ctx, g); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if g.report.Instance != r.Instance { // another one has come meanwhile
		g.written = time.Time{}
		return nil
	}
	f.remove(g)
	return nil
}

const (
	maxID      = 128
	maxLabels  = 16
	maxFeeds   = 16
	maxTenants = 10_000
	maxError   = 1 << 10
)

func validID(id string) bool {
	if id == "" || len(id) > maxID {
		return false
	}
	for i := range len(id) {
		switch c := id[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && (c == '.' || c == '_' || c == '-'):
		default:
			return false
		}
	}
	return true
}

// aheadMax is how far a gateway's clock may be ahead of the service's.
const aheadMax = 24 * time.Hour

// check says what is wrong with a report, in the words of its JSON, and shortens the errors in it.
func check(r *replica.Report, now time.Time) error {
	ahead := now.Add(aheadMax).UnixMilli()
	switch {
	case !canonical(r.Instance):
		return errors.New("instance must be a UUID in its canonical form")
	case r.Started <= 0 || r.Started > ahead:
		return fmt.Errorf("started is %d, must be Unix milliseconds, not more than a day ahead of the service's clock", r.Started)
	case len(r.Labels) > maxLabels:
		return fmt.Errorf("there are %d labels, at most %d may be", len(r.Labels), maxLabels)
	case !text(r.Version, 0, 128):
		return errors.New("version must be at most 128 bytes of UTF-8 without control characters")
	case r.AgeMS < -1:
		return fmt.Errorf("age_ms is %d, must be -1 or more", r.AgeMS)
	case r.Revocations < 0 || r.Entities < 0:
		return errors.New("revocations and entities must not be negative")
	case len(r.Tenants) > maxTenants:
		return fmt.Errorf("there are %d tenants, at most %d may be", len(r.Tenants), maxTenants)
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
	for _, d := range r.Tenants {
		if !text(d, 1, 200) {
			return errors.New("a tenant's domain must be 1 to 200 bytes of UTF-8 without control characters")
		}
	}
	for i := range r.Feeds {
		feed := &r.Feeds[i]
		if !text(feed.Name, 1, 128) {
			return errors.New("a feed's name must be 1 to 128 bytes of UTF-8 without control characters")
		}
		if feed.Heard < 0 || feed.Heard > ahead {
			return fmt.Errorf("heard is %d, must be Unix milliseconds, not more than a day ahead of the service's clock", feed.Heard)
		}
		feed.Error = short(feed.Error)
	}
	r.Error = short(r.Error)
	if d := r.Digest; d != nil {
		if err := checkPosition(d.Position); err != nil {
			return fmt.Errorf("digest: %w", err)
		}
		if d.Cutoff < 0 || d.Cutoff%60 != 0 || d.Count < 0 || d.Entities < 0 {
			return errors.New("digest: cutoff must be Unix seconds of a whole minute, count and entities must not be negative")
		}
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

// short makes an error one line of bounded length, for it is shown to people and kept as JSON.
func short(s string) string {
	if len(s) <= maxError && text(s, 0, maxError) {
		return s
	}
	s = strings.Map(func(c rune) rune {
		if control(c) {
			return ' '
		}
		return c
	}, strings.ToValidUTF8(s[:min(len(s), maxError)], ""))
	return s
}
