// Package canary finds out how long a revocation takes to reach each gateway, by what the gateway does: a
// token is issued, accepted, revoked, and tried until it is refused. It hides how gateways are called, how
// their answers are read, and which result is alarming.
//
// # A round
//
// One token is issued for all gateways that have a canary URL. Each is called until it accepts the token, 5 s
// at most: it may have to learn of the canary's API or of a signing key first. Then the token is revoked, once,
// and all that accepted it are called again and again until they refuse it.
//
// A 2xx says that the token is accepted, 401 and 403 that it is refused: WSO2's gateways answer the former for
// what is revoked, and nothing but the revocation has happened since it was accepted. Anything else, a redirect
// or a 503 or no answer within 2 s, says nothing, and the gateway is asked again.
//
// # What is measured
//
// The time is from when this process knew of the revocation's commit to when it had the first refusal. Between
// two calls are 5 ms at first, half as much again each time, up to 250 ms: so a time is too long by a round trip
// to the gateway, and by up to half of itself, or 250 ms if that is less.
//
// Past the limit a gateway is alarming, at once. It is called further, so that its true time is known, until ten
// times the limit, or shortly before the token ends by itself: a token that is over is refused by everybody, and
// that is no answer. What it says meanwhile does not end the alarm; the next round does.
package canary

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
)

// The outcomes of [fleet.CanaryResult]. All but Refused are alarming.
const (
	// Refused: the token was refused within the limit after its revocation.
	Refused = "refused"
	// StillAccepted: it was not. With RefusedMS it was refused later.
	StillAccepted = "still_accepted"
	// NotAccepted: it was refused before it was revoked.
	NotAccepted = "not_accepted"
	// Unreachable: the gateway said neither.
	Unreachable = "unreachable"
)

// Token is one that was issued for the canary API alone.
type Token struct {
	// Compact is the token itself, a secret.
	Compact string
	// Iss and ID are its iss and jti, Expires its exp.
	Iss, ID string
	Expires time.Time
}

// Issuer issues and revokes tokens of the canary application.
type Issuer interface {
	// Issue returns a token that lives for a few minutes, longer than two minutes and the limit.
	Issue(ctx context.Context) (Token, error)
	// Revoke returns when the revocation is committed.
	Revoke(ctx context.Context, t Token) (revocation.Position, error)
}

// Fleet is [fleet.Fleet].
type Fleet interface {
	Refresh(ctx context.Context) error
	Gateways() []fleet.Gateway
	RecordCanary(ctx context.Context, id string, r fleet.CanaryResult) error
}

// Lead waits until this process may run the canary, and returns a context that ends when it may no longer.
// End gives the right up.
type Lead func(ctx context.Context) (leading context.Context, end func(), err error)

// Config tunes the canary.
type Config struct {
	// Every is the time from one round to the next. 10 s to 24 h. A round that takes longer is followed by
	// the next at once.
	Every time.Duration
	// Limit is how long a gateway may take to refuse before that is alarming. 100 ms to 1 min.
	Limit time.Duration
	// AllowHTTP lets canaries be called over plain HTTP elsewhere than on loopback. Who listens on the way
	// can call the canary API with the token for some seconds.
	AllowHTTP bool
	// Client sends the requests. Redirects are not followed and cookies not kept, whatever it says. Default:
	// [NewClient] with the system's roots.
	Client *http.Client
}

func (cfg Config) check() error {
	var errs []error
	if cfg.Every < 10*time.Second || cfg.Every > 24*time.Hour {
		errs = append(errs, fmt.Errorf("interval %s: must be 10s to 24h", cfg.Every))
	}
	if cfg.Limit < 100*time.Millisecond || cfg.Limit > time.Minute {
		errs = append(errs, fmt.Errorf("limit %s: must be 100ms to 1m", cfg.Limit))
	}
	return errors.Join(errs...)
}

const (
	// maxRound is how many gateways are tried in a round, so that they all have been called before the token
	// ends even if none answers. Of more, those that were not tried for longest are next.
	maxRound = 1000
	// maxAccepting are called at a time before the revocation. Afterwards all are: one that hangs must not
	// make another seem slow.
	maxAccepting = 64
	// acceptTime is how long a gateway may take to accept the token.
	acceptTime = 5 * time.Second
	// lateFactor times the limit is how long a gateway is called that still accepts the token.
	lateFactor = 10
	// expiryMargin is how long before its end a token is no longer looked at: a gateway's clock may be ahead.
	expiryMargin = 30 * time.Second
	// recordTime bounds the keeping of a result.
	recordTime = 5 * time.Second
	// soon is within which time the first round begins.
	soon = 5 * time.Second
)

// Canary runs rounds. Make one with [New].
type Canary struct {
	cfg     Config
	issuer  Issuer
	fleet   Fleet
	lead    Lead
	client  *http.Client
	metrics *metrics
	log     *slog.Logger

	mu sync.Mutex
	// last is the last outcome of each gateway that this process tried while it has led.
	last map[string]string
	// late are called still, since a round before.
	late map[string]bool
}

// New returns a canary.
func New(cfg Config, issuer Issuer, f Fleet, lead Lead, reg prometheus.Registerer, log *slog.Logger) (*Canary, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("configure canary: %w", err)
	}
	client := cfg.Client
	if client == nil {
		client = NewClient(nil)
	}
	return &Canary{
		cfg: cfg, issuer: issuer, fleet: f, lead: lead, client: strict(client), metrics: newMetrics(reg), log: log.With("component", "canary"),
		last: make(map[string]string), late: make(map[string]bool),
	}, nil
}

// Run runs rounds while this process leads, until ctx ends.
func (c *Canary) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		leading, end, err := c.lead(ctx)
		if err != nil {
			if ctx.Err() == nil {
				c.log.Warn("the canary cannot be led, it is tried again", "error", err)
			}
		} else {
			c.rounds(leading)
			if ctx.Err() == nil {
				c.log.Warn("the canary is no longer led by this process", "error", context.Cause(leading))
			}
			end()
		}
		pause(ctx, time.Second+rand.N(time.Second))
	}
	return nil
}

// rounds runs rounds until ctx ends. Then nothing of them goes on, and what this process knew is dropped:
// another one knows it now.
func (c *Canary) rounds(ctx context.Context) {
	var watching sync.WaitGroup
	defer func() {
		watching.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		clear(c.last)
		clear(c.late)
		c.metrics.reset()
	}()
	for wait := rand.N(soon); pause(ctx, wait); {
		begin := time.Now()
		switch tried, err := c.round(ctx, &watching); {
		case ctx.Err() != nil:
			return
		case err != nil:
			c.metrics.rounds.WithLabelValues("failed").Inc()
			c.log.Warn("a round of the canary failed, so nothing is known of the gateways; the next one is tried in time", "error", err)
		case tried > 0:
			c.metrics.rounds.WithLabelValues("done").Inc()
		}
		wait = c.cfg.Every - time.Since(begin)
	}
}

// round tries all gateways that are due. It returns when each was found to have refused the token, or is
// alarming; those that are called further are among watching.
func (c *Canary) round(ctx context.Context, watching *sync.WaitGroup) (tried int, err error) {
	if err := c.fleet.Refresh(ctx); err != nil {
		return 0, fmt.Errorf("look for gateways: %w", err)
	}
	due := c.due()
	if len(due) == 0 {
		return 0, nil
	}
	token, err := c.issuer.Issue(ctx)
	if err != nil {
		return 0, fmt.Errorf("issue the canary's token: %w", err)
	}
	accepted := c.accept(ctx, due, token)
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if len(accepted) == 0 {
		return len(due), nil
	}
	if left := time.Until(token.Expires) - expiryMargin; left < c.cfg.Limit {
		return 0, fmt.Errorf("the canary's token lives for %s more, which is too short for the limit of %s", left+expiryMargin, c.cfg.Limit)
	}
	at, err := c.issuer.Revoke(ctx, token)
	if err != nil {
		return 0, fmt.Errorf("revoke the canary's token: %w", err)
	}
	committed := time.Now()
	c.log.Debug("the canary's token is revoked", "jti", token.ID, "seq", at.Seq, "gateways", len(accepted))
	var judged sync.WaitGroup
	for _, g := range accepted {
		judged.Add(1)
		c.setLate(g.ID, true)
		watching.Go(func() {
			defer c.setLate(g.ID, false)
			c.watch(ctx, g, token, committed, sync.OnceFunc(judged.Done))
		})
	}
	judged.Wait()
	return len(due), nil
}

// due are the gateways to try now. It forgets those that are gone.
func (c *Canary) due() (due []fleet.Gateway) {
	gateways := c.fleet.Gateways()
	c.mu.Lock()
	defer c.mu.Unlock()
	there := make(map[string]bool)
	for _, g := range gateways {
		if g.CanaryURL == "" {
			continue
		}
		there[g.ID] = true
		if !c.late[g.ID] {
			due = append(due, g)
		}
	}
	for id := range c.last {
		if !there[id] {
			delete(c.last, id)
			c.metrics.forget(id)
		}
	}
	c.countAlarming()
	if len(due) > maxRound {
		tried := func(g fleet.Gateway) (at time.Time) {
			if g.Canary != nil {
				at = g.Canary.At
			}
			return at
		}
		slices.SortStableFunc(due, func(a, b fleet.Gateway) int { return tried(a).Compare(tried(b)) })
		due = due[:maxRound]
	}
	return due
}

func (c *Canary) setLate(id string, late bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if late {
		c.late[id] = true
	} else {
		delete(c.late, id)
	}
}

// accept returns the gateways that accept the token, and records what became of the others.
func (c *Canary) accept(ctx context.Context, due []fleet.Gateway, token Token) (accepted []fleet.Gateway) {
	accepts := make([]bool, len(due))
	places := make(chan struct{}, maxAccepting)
	var calls sync.WaitGroup
	for i, g := range due {
		calls.Go(func() {
			select {
			case places <- struct{}{}:
				defer func() { <-places }()
			case <-ctx.Done():
				return
			}
			accepts[i] = c.accepts(ctx, g, token)
		})
	}
	calls.Wait()
	for i, g := range due {
		if accepts[i] {
			accepted = append(accepted, g)
		}
	}
	return accepted
}

// accepts calls a gateway until it accepts the token.
func (c *Canary) accepts(ctx context.Context, g fleet.Gateway, token Token) bool {
	if err := c.cfg.CheckURL(g.CanaryURL); err != nil {
		c.record(ctx, g.ID, fleet.CanaryResult{Outcome: Unreachable, Detail: "cannot be called: " + err.Error()})
		return false
	}
	var p pace
	end := time.Now().Add(acceptTime)
	for last := unasked; ; {
		left := time.Until(end)
		if left <= 0 {
			outcome := Unreachable
			if last.kind == refusing {
				outcome = NotAccepted
			}
			c.record(ctx, g.ID, fleet.CanaryResult{Outcome: outcome,
				Detail: fmt.Sprintf("did not accept a new token within %s: %s", acceptTime, last.detail)})
			return false
		}
		a := c.call(ctx, g.CanaryURL, token.Compact, min(requestTime, left))
		switch {
		case ctx.Err() != nil:
			return false
		case a.kind == accepting:
			return true
		case !a.cut:
			last = a
		}
		pause(ctx, min(p.next(), time.Until(end)))
	}
}

// watch calls a gateway until it refuses the token, which was revoked at committed. It calls judged once the
// gateway has, or is alarming.
func (c *Canary) watch(ctx context.Context, g fleet.Gateway, token Token, committed time.Time, judged func()) {
	defer judged()
	limit, end := committed.Add(c.cfg.Limit), committed.Add(lateFactor*c.cfg.Limit)
	if over := token.Expires.Add(-expiryMargin); over.Before(end) {
		end = over
	}
	var (
		p         pace
		last      = unasked
		outcome   string // once the limit is past
		confirmed bool   // the token was accepted past the limit
		recorded  time.Time
	)
	record := func(r fleet.CanaryResult) {
		recorded = time.Now()
		c.record(ctx, g.ID, r)
	}
	for ctx.Err() == nil {
		now := time.Now()
		is := Unreachable
		if confirmed || last.kind == accepting {
			is = StillAccepted
		}
		switch past := now.Sub(committed).Round(time.Millisecond); {
		case now.Before(limit):
		case !now.Before(end):
			record(fleet.CanaryResult{Outcome: is, Detail: fmt.Sprintf("did not refuse the token within %s of its revocation, and was not called further: %s", past, last.detail)})
			return
		case outcome != is, now.Sub(recorded) >= c.cfg.Every:
			outcome = is
			record(fleet.CanaryResult{Outcome: is, Detail: fmt.Sprintf("has not refused the token %s after its revocation, the limit is %s: %s", past, c.cfg.Limit, last.detail)})
			judged()
			continue
		}
		until := limit
		if outcome != "" {
			until = end
		}
		a := c.call(ctx, g.CanaryURL, token.Compact, min(requestTime, until.Sub(now)))
		switch {
		case ctx.Err() != nil:
			return
		case a.kind == refusing:
			took := a.at.Sub(committed)
			c.metrics.seconds.Observe(took.Seconds())
			r := fleet.CanaryResult{Outcome: Refused, RefusedMS: float64(took.Microseconds()) / 1000}
			if outcome != "" || took > c.cfg.Limit {
				r.Outcome = cmp.Or(outcome, is)
				r.Detail = fmt.Sprintf("refused the token only %s after its revocation, the limit is %s", took.Round(time.Millisecond), c.cfg.Limit)
			}
			record(r)
			return
		case a.cut: // by the limit: it says nothing of what the gateway would have answered
		default:
			last = a
			confirmed = confirmed || outcome != "" && a.kind == accepting
		}
		pause(ctx, min(p.next(), time.Until(until)))
	}
}

// record keeps and shows a result, of now. One that cannot be kept is shown all the same.
func (c *Canary) record(ctx context.Context, id string, r fleet.CanaryResult) {
	if ctx.Err() != nil {
		return // it is no longer for this process to say
	}
	r.At = time.Now()
	c.mu.Lock()
	before := c.last[id]
	c.last[id] = r.Outcome
	c.metrics.result(id, r)
	c.countAlarming()
	c.mu.Unlock()
	switch {
	case alarming(r.Outcome) && r.Outcome != before:
		c.log.Warn("a gateway's canary is alarming", "gateway", id, "outcome", r.Outcome, "detail", r.Detail)
	case alarming(before) && !alarming(r.Outcome):
		c.log.Info("a gateway's canary is well again", "gateway", id, "refused_ms", r.RefusedMS)
	}
	ctx, cancel := context.WithTimeout(ctx, recordTime)
	defer cancel()
	switch err := c.fleet.RecordCanary(ctx, id, r); {
	case errors.Is(err, fleet.ErrNotFound): // the next round forgets it
	case err != nil && !errors.Is(err, context.Canceled):
		c.log.Warn("the result of a gateway's canary could not be kept", "gateway", id, "outcome", r.Outcome, "error", err)
	}
}

// countAlarming is called with c.mu held.
func (c *Canary) countAlarming() {
	n := 0
	for _, outcome := range c.last {
		if alarming(outcome) {
			n++
		}
	}
	c.metrics.alarming.Set(float64(n))
}

func alarming(outcome string) bool { return outcome != "" && outcome != Refused }

// staleAfter rounds without a result nothing is known of a gateway.
const staleAfter = 3

// Alarms are the ids of the gateways with a canary whose last result is alarming, sorted, as the fleet knows
// them. Results from longer before now than three times every, the time between two rounds, do not count.
func Alarms(gateways []fleet.Gateway, every time.Duration, now time.Time) []string {
	var ids []string
	for _, g := range gateways {
		if g.CanaryURL != "" && g.Canary != nil && alarming(g.Canary.Outcome) && now.Sub(g.Canary.At) <= staleAfter*every {
			ids = append(ids, g.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

// pace is how calls of one gateway follow each other.
type pace struct{ last time.Duration }

const (
	firstSpacing = 5 * time.Millisecond
	maxSpacing   = 250 * time.Millisecond
)

// next is the time before the next call.
func (p *pace) next() time.Duration {
	p.last = min(max(firstSpacing, p.last*3/2), maxSpacing)
	return p.last
}

// pause reports whether ctx still goes on after d.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
