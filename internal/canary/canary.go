// Package canary finds out how long a revocation takes to reach each gateway, by what the gateway does: a
// token is issued, accepted, revoked, and tried until it is refused. It hides how gateways are called, how
// their answers are read, how results are kept, and which result is alarming.
//
// # A round
//
// Two tokens are issued for all gateways that have a canary URL, the probe and the control. Each gateway is
// called until it accepts both, 5 s at most: it may have to learn of the canary's API or of a signing key first.
// Then the probe is revoked, once, and all that accepted it are called with it again and again until they refuse
// it. What is issued is revoked when the round is over, whatever way it ends.
//
// A 2xx says that a token is accepted, 401 that it is refused. A refusal of the probe counts if the gateway
// accepts the control right after it: one that has lost the signing key, or the canary's API, or refuses
// everybody, shows nothing of the revocation. Anything else, a 403 or a redirect or a 503 or no answer within
// 2 s, says nothing either, and the gateway is asked again.
//
// # What is measured
//
// The time is from when this process knew of the revocation's commit to when it had the first refusal. Between
// two calls are 5 ms at first, half as much again each time, up to 250 ms: so a time is too long by a round trip
// to the gateway, and by up to half of itself, or 250 ms if that is less.
//
// Past the limit a gateway is alarming, at once, or as soon as the control is answered. It is called further, so that its true time is known, until ten
// times the limit, or shortly before the token ends by itself: a token that is over is refused by everybody, and
// that is no answer. What it says meanwhile does not end the alarm; the next result does. A gateway whose URL
// was changed or removed, or that was forgotten, is no longer called, and nothing more is said of it.
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

// The outcomes of [fleet.CanaryResult]. All but Refused are alarming, also with RefusedMS: then the token was refused
// past the limit.
const (
	// Refused: the token was refused within the limit after its revocation.
	Refused = "refused"
	// StillAccepted: it was not.
	StillAccepted = "still_accepted"
	// NotAccepted: it was refused before it was revoked, or together with one that is not revoked.
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

// Issuer issues and revokes tokens of the canary application, two in each round.
type Issuer interface {
	// Issue returns a token that lives for a few minutes, longer than two minutes and the limit.
	Issue(ctx context.Context) (Token, error)
	// Revoke returns when the revocation is committed. It may be called again after an error.
	Revoke(ctx context.Context, t Token) (revocation.Position, error)
}

// Fleet is [fleet.Fleet].
type Fleet interface {
	Refresh(ctx context.Context) error
	Gateways() []fleet.Gateway
	Gateway(id string) (fleet.Gateway, bool)
	RecordCanaries(ctx context.Context, results map[string]fleet.CanaryResult) error
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
	// recordTime bounds the keeping of results, retryRecord is the time until those that were not kept are
	// tried again.
	recordTime, retryRecord = 5 * time.Second, time.Second
	// gatherTime is how long results wait for others, to be recorded together.
	gatherTime = 100 * time.Millisecond
	// revokeTime bounds the revoking of a token at the end of a round, also when this process ends.
	revokeTime = 3 * time.Second
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
	// last is the last result of each gateway that this process tried while it has led.
	last map[string]result
	// late are called still, since a round before.
	late map[string]bool
	// unkept results are to be recorded. More is given to unkept when there are some.
	unkept map[string]result
	more   chan struct{}
}

// result is what came of calling url.
type result struct {
	url string
	fleet.CanaryResult
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
		last: make(map[string]result), late: make(map[string]bool), unkept: make(map[string]result), more: make(chan struct{}, 1),
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
	var watching, keeping sync.WaitGroup
	keeping.Go(func() { c.keep(ctx) })
	defer func() {
		watching.Wait()
		keeping.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		clear(c.last)
		clear(c.late)
		clear(c.unkept)
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
	var (
		probe, control Token
		open           []Token        // are to be revoked
		using          sync.WaitGroup // those that are called still
	)
	defer func() {
		watching.Go(func() {
			using.Wait()
			c.revoke(ctx, open)
		})
	}()
	for _, token := range []*Token{&probe, &control} {
		if *token, err = c.issuer.Issue(ctx); err != nil {
			return 0, fmt.Errorf("issue the canary's token: %w", err)
		}
		open = append(open, *token)
	}
	accepted := c.accept(ctx, due, probe, control)
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if len(accepted) == 0 {
		return len(due), nil
	}
	over := probe.Expires
	if control.Expires.Before(over) {
		over = control.Expires
	}
	if left := time.Until(over) - expiryMargin; left < c.cfg.Limit {
		return 0, fmt.Errorf("the canary's token lives for %s more, which is too short for the limit of %s", left+expiryMargin, c.cfg.Limit)
	}
	at, err := c.issuer.Revoke(ctx, probe)
	if err != nil {
		return 0, fmt.Errorf("revoke the canary's token: %w", err)
	}
	w := watched{probe: probe, control: control, committed: time.Now(), over: over.Add(-expiryMargin)}
	open = []Token{control}
	c.log.Debug("the canary's token is revoked", "jti", probe.ID, "seq", at.Seq, "gateways", len(accepted))
	var judged sync.WaitGroup
	for _, g := range accepted {
		judged.Add(1)
		c.setLate(g.ID, true)
		using.Add(1)
		watching.Go(func() {
			defer using.Done()
			defer c.setLate(g.ID, false)
			c.watch(ctx, g, w, sync.OnceFunc(judged.Done))
		})
	}
	judged.Wait()
	return len(due), nil
}

// revoke revokes what a round leaves, as well as it can: these tokens end by themselves within minutes.
func (c *Canary) revoke(ctx context.Context, open []Token) {
	for _, token := range open {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTime)
		if _, err := c.issuer.Revoke(ctx, token); err != nil {
			c.log.Warn("a token of the canary could not be revoked after its round, it ends by itself", "jti", token.ID, "expires", token.Expires, "error", err)
		}
		cancel()
	}
}

// due are the gateways to try now. It forgets those that are gone.
func (c *Canary) due() (due []fleet.Gateway) {
	gateways := c.fleet.Gateways()
	c.mu.Lock()
	defer c.mu.Unlock()
	there := make(map[string]string)
	for _, g := range gateways {
		if g.CanaryURL == "" {
			continue
		}
		there[g.ID] = g.CanaryURL
		if !c.late[g.ID] {
			due = append(due, g)
		}
	}
	for id, last := range c.last {
		if there[id] != last.url {
			delete(c.last, id)
			c.metrics.forget(id)
		}
	}
	c.countAlarming()
	if len(due) > maxRound {
		tried := func(g fleet.Gateway) time.Time {
			at := c.last[g.ID].At // may not be recorded yet
			if g.Canary != nil && g.Canary.At.After(at) {
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

// accept returns the gateways that accept all the tokens, and records what became of the others.
func (c *Canary) accept(ctx context.Context, due []fleet.Gateway, tokens ...Token) (accepted []fleet.Gateway) {
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
			end := time.Now().Add(acceptTime)
			for _, token := range tokens {
				if !c.accepts(ctx, g, token, end) {
					return
				}
			}
			accepts[i] = true
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

// accepts calls a gateway until it accepts the token, or until end.
func (c *Canary) accepts(ctx context.Context, g fleet.Gateway, token Token, end time.Time) bool {
	if err := CheckURL(g.CanaryURL); err != nil {
		c.record(ctx, g, fleet.CanaryResult{Outcome: Unreachable, Detail: "cannot be called: " + err.Error()})
		return false
	}
	var p pace
	for last := unasked; ; {
		left := time.Until(end)
		if left <= 0 {
			outcome := Unreachable
			if last.kind == refusing || last.kind == forbidding {
				outcome = NotAccepted
			}
			c.record(ctx, g, fleet.CanaryResult{Outcome: outcome,
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

// watched is what gateways are watched for: that they refuse the probe, which was revoked at committed, and not
// the control. Over is when neither is to be looked at any more.
type watched struct {
	probe, control  Token
	committed, over time.Time
}

// ask calls a gateway with the probe, and if it is refused with the control, which has the time of a call
// whatever within is: that the probe was refused in time must not be lost.
func (c *Canary) ask(ctx context.Context, url string, w watched, within time.Duration) answer {
	a := c.call(ctx, url, w.probe.Compact, within)
	if a.kind != refusing {
		return a
	}
	switch control := c.call(ctx, url, w.control.Compact, requestTime); control.kind {
	case accepting:
	case refusing, forbidding:
		a.kind = refusingAll
		a.detail += ", but a control token that is not revoked is refused too: " + control.detail
	default:
		a.kind = silent
		a.detail += ", but a control token that is not revoked was not accepted: " + control.detail
	}
	return a
}

// watch calls a gateway until it refuses the probe. It calls judged once the gateway has, or is alarming, or
// is not to be called any more.
func (c *Canary) watch(ctx context.Context, g fleet.Gateway, w watched, judged func()) {
	defer judged()
	limit, end := w.committed.Add(c.cfg.Limit), w.committed.Add(lateFactor*c.cfg.Limit)
	if w.over.Before(end) {
		end = w.over
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
		c.record(ctx, g, r)
	}
	for ctx.Err() == nil {
		now := time.Now()
		past := now.Sub(w.committed).Round(time.Millisecond)
		if past > maxSpacing && !c.wanted(g.ID, g.CanaryURL) {
			return
		}
		is := Unreachable
		switch {
		case confirmed, last.kind == accepting:
			is = StillAccepted
		case last.kind == refusingAll:
			is = NotAccepted
		}
		switch {
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
		a := c.ask(ctx, g.CanaryURL, w, min(requestTime, until.Sub(now)))
		switch {
		case ctx.Err() != nil:
			return
		case a.kind == refusing:
			took := a.at.Sub(w.committed)
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

// wanted reports whether a gateway's canary is still to be called there.
func (c *Canary) wanted(id, url string) bool {
	g, ok := c.fleet.Gateway(id)
	return ok && g.CanaryURL == url
}

// record shows a result, of now, and leaves it to be kept: who measures does not wait for the database.
func (c *Canary) record(ctx context.Context, g fleet.Gateway, r fleet.CanaryResult) {
	r.At = time.Now()
	c.mu.Lock()
	// That it is wanted is asked with the lock held: else due could forget it in between, and it would be back.
	if ctx.Err() != nil || !c.wanted(g.ID, g.CanaryURL) {
		c.mu.Unlock()
		return
	}
	before := c.last[g.ID].Outcome
	c.last[g.ID] = result{g.CanaryURL, r}
	c.unkept[g.ID] = c.last[g.ID]
	c.metrics.result(g.ID, r)
	c.countAlarming()
	c.mu.Unlock()
	switch {
	case alarming(r.Outcome) && r.Outcome != before:
		c.log.Warn("a gateway's canary is alarming", "gateway", g.ID, "outcome", r.Outcome, "detail", r.Detail)
	case alarming(before) && !alarming(r.Outcome):
		c.log.Info("a gateway's canary is well again", "gateway", g.ID, "refused_ms", r.RefusedMS)
	}
	select {
	case c.more <- struct{}{}:
	default:
	}
}

// keep records results until ctx ends, together those that come together or while others are written.
func (c *Canary) keep(ctx context.Context) {
	for down := false; ; {
		select {
		case <-c.more:
		case <-ctx.Done():
			return
		}
		for pause(ctx, gatherTime) {
			c.mu.Lock()
			batch := c.unkept
			c.unkept = make(map[string]result)
			c.mu.Unlock()
			results := make(map[string]fleet.CanaryResult, len(batch))
			for id, r := range batch {
				if c.wanted(id, r.url) {
					results[id] = r.CanaryResult
				}
			}
			if len(results) == 0 {
				break
			}
			wctx, cancel := context.WithTimeout(ctx, recordTime)
			err := c.fleet.RecordCanaries(wctx, results)
			cancel()
			if err == nil {
				down = false
				continue
			}
			if !down && ctx.Err() == nil {
				c.log.Warn("the results of the canary cannot be kept, it is tried until they can", "gateways", len(results), "error", err)
			}
			down = true
			c.mu.Lock()
			for id, r := range batch {
				if _, newer := c.unkept[id]; !newer {
					c.unkept[id] = r
				}
			}
			c.mu.Unlock()
			if !pause(ctx, retryRecord) {
				return
			}
		}
	}
}

// countAlarming is called with c.mu held.
func (c *Canary) countAlarming() {
	n := 0
	for _, last := range c.last {
		if alarming(last.Outcome) {
			n++
		}
	}
	c.metrics.alarming.Set(float64(n))
}

func alarming(outcome string) bool { return outcome != "" && outcome != Refused }

// Alarms names the gateways with a canary whose last result is alarming, as the fleet knows them, each with its
// outcome, such as "gw-1 (still_accepted)", sorted. An alarm stays until another result is there, or no URL.
func Alarms(gateways []fleet.Gateway) []string {
	var alarms []string
	for _, g := range gateways {
		if g.CanaryURL != "" && g.Canary != nil && alarming(g.Canary.Outcome) {
			alarms = append(alarms, fmt.Sprintf("%s (%s)", g.ID, g.Canary.Outcome))
		}
	}
	slices.Sort(alarms)
	return alarms
}

const (
	// silentRounds without a result, and at least silentTime, are a canary that tells nothing.
	silentRounds = 3
	silentTime   = 10 * time.Minute
)

// Silence finds out that a canary which should tell something does not, in whichever process it runs. Its methods
// may be called concurrently.
type Silence struct {
	after time.Duration
	mu    sync.Mutex
	heard time.Time // when there was last a result, or nothing to tell
}

// NewSilence returns a Silence from now on, of a canary with a round every so long.
func NewSilence(every time.Duration, now time.Time) *Silence {
	return &Silence{after: max(silentRounds*every, silentTime), heard: now}
}

// Since returns when the canary last told something, if no gateway with a URL has had a result for longer than
// three rounds, and than 10 min. The time of a result is by another machine's clock, which should be within
// minutes of now's.
func (s *Silence) Since(gateways []fleet.Gateway, now time.Time) (heard time.Time, silent bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := false
	for _, g := range gateways {
		asked = asked || g.CanaryURL != ""
		if g.CanaryURL != "" && g.Canary != nil && g.Canary.At.After(s.heard) {
			s.heard = g.Canary.At
		}
	}
	if !asked || s.heard.After(now) {
		s.heard = now
	}
	return s.heard, now.Sub(s.heard) > s.after
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
