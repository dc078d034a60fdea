package explain

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
)

// GatewayKnew says whether a gateway knew of the revocation, or of the whole state, at a time.
type GatewayKnew struct {
	ID       string         `json:"id"`
	Standing fleet.Standing `json:"standing,omitempty"`
	// Knew is "yes", "no" or "unknown". A gateway whose state was found to differ from the log's may lack
	// what it reports: of that "yes" is never said.
	Knew   string    `json:"knew"`
	At     time.Time `json:"at"`
	Detail string    `json:"detail"`
}

const (
	knewYes     = "yes"
	knewNo      = "no"
	knewUnknown = "unknown"
)

// findGateway finds the gateway that is asked about, if the caller may know of it.
func (i *inquiry) findGateway(ctx context.Context) error {
	if i.q.Gateway == "" || i.deps.Fleet == nil {
		return nil
	}
	if err := i.deps.Fleet.Refresh(ctx); err != nil {
		return fmt.Errorf("%w: ask for the gateways: %w", ledger.ErrUnavailable, err)
	}
	g, ok := i.deps.Fleet.Gateway(i.q.Gateway)
	if !ok || i.by.Tenant != "" && !g.Serves(i.by.Tenant) && !slices.ContainsFunc(i.by.Others, g.Serves) {
		return nil
	}
	i.gateway, i.hasGateway = g, true
	return nil
}

// gatewayKnew answers for the gateway that is asked about. Its error is that of findGateway.
func (i *inquiry) gatewayKnew(ctx context.Context) error {
	if i.q.Gateway == "" {
		return nil
	}
	k := &GatewayKnew{ID: i.q.Gateway, Knew: knewUnknown, At: i.at.UTC().Truncate(time.Millisecond)}
	i.answer.Gateway = k
	switch {
	case i.deps.Fleet == nil:
		k.Detail = "Nothing is known of gateways here."
		return nil
	case !i.hasGateway:
		k.Detail = "There is no such gateway."
		i.advise("See rescind gateways for those that there are.")
		return nil
	}
	if err := i.awaitGateway(ctx); err != nil {
		return err
	}
	k.At = i.at.UTC().Truncate(time.Millisecond)
	k.Standing = i.gateway.Standing
	var said []string
	k.Knew, said = i.compare()
	g := &i.gateway
	if g.Standing == fleet.Lost {
		said = append(said, fmt.Sprintf("The gateway is lost: it has not reported since %s.", when(g.ReportedAt)))
	}
	if g.Comparison.Verdict == fleet.Diverged {
		said = append(said, fmt.Sprintf("Its state differs from the log's, as of %s: it may lack what it reports to have applied.", when(g.Comparison.Time)))
		if k.Knew == knewYes {
			k.Knew = knewUnknown
		}
	}
	if g.Report.RevocationsOnly {
		said = append(said, "It holds revocations only, and validates subscriptions by what tokens carry, if at all.")
	}
	k.Detail = strings.Join(said, " ")
	switch {
	case g.Comparison.Verdict == fleet.Diverged:
		i.advise("See rescind verify: gateway " + g.ID + " has diverged and was told to load a snapshot.")
	case g.Standing == fleet.Lost:
		i.advise("See whether gateway " + g.ID + " runs and reaches this service.")
	case k.Knew == knewNo:
		i.advise("Gateway " + g.ID + " had not applied it: see rescind gateways; if it stays behind, check its feeds.")
	}
	return nil
}

// awaitTime is how long a gateway has to say that it has applied a revocation.
const awaitTime = time.Second

// awaitGateway asks a live gateway that is asked about as of now: its last report may be older than what it is about.
func (i *inquiry) awaitGateway(ctx context.Context) error {
	want, _ := i.wanted()
	if !i.q.At.IsZero() || i.gateway.Standing != fleet.Live || want.Seq == 0 {
		return nil
	}
	i.asked = i.now
	if r := i.answer.Revocation; r != nil {
		i.asked = r.RevokedAt
	}
	if !i.gateway.Applied(want) {
		id := i.gateway.ID
		bounded, cancel := context.WithTimeout(ctx, awaitTime)
		defer cancel()
		_, err := i.deps.Fleet.Wait(bounded, fleet.Barrier{Position: want, Select: func(g *fleet.Gateway) bool { return g.ID == id }})
		if err != nil {
			return fmt.Errorf("%w: ask gateway %s: %w", ledger.ErrUnavailable, id, err)
		}
		if g, ok := i.deps.Fleet.Gateway(id); ok { // it may have left meanwhile
			i.gateway = g
		}
	}
	i.at = i.Explainer.now()
	return nil
}

// wanted is what the gateway is to have applied: the revocation, or without one the whole state. Its Seq is 0 if
// that is not known any more.
func (i *inquiry) wanted() (p revocation.Position, what string) {
	p, what = i.answer.Position, fmt.Sprintf("the state of seq %d", i.answer.Position.Seq)
	if r := i.answer.Revocation; r != nil {
		p.Seq, what = r.Seq, fmt.Sprintf("the revocation, seq %d", r.Seq)
	}
	return p, what
}

// compare says whether the gateway had applied the revocation, or without one the whole state, by its reports
// from before and after.
func (i *inquiry) compare() (knew string, said []string) {
	before, after, okBefore, okAfter := i.deps.Fleet.When(i.gateway.ID, i.at)
	want, what := i.wanted()
	r, now := i.answer.Revocation, i.q.At.IsZero()
	if r != nil {
		switch {
		case !now && r.RevokedAt.After(i.at):
			return knewNo, []string{fmt.Sprintf("The revocation was made later, at %s.", when(r.RevokedAt))}
		case r.Seq == 0:
			return knewUnknown, append(reports(before, after, okBefore, okAfter),
				"The log has removed the event of the revocation, so its seq is not known.")
		}
	}
	okBefore, okAfter = okBefore && before.Epoch == want.Epoch, okAfter && after.Epoch == want.Epoch
	said = reports(before, after, okBefore, okAfter)
	// A report that is older than what it is about says nothing of it.
	last := now && i.gateway.Standing == fleet.Live && before.At.After(i.asked)
	switch {
	case okBefore && before.Seq >= want.Seq:
		return knewYes, append([]string{"It had applied " + what + "."}, said...)
	case r == nil && !now:
		return knewUnknown, append(said, fmt.Sprintf("The log is at seq %d now.", want.Seq))
	case okAfter && after.Seq < want.Seq, okBefore && before.Seq < want.Seq && (last || before.At.Equal(i.at)):
		return knewNo, append([]string{"It had not applied " + what + "."}, said...)
	case !okBefore && !okAfter:
		return knewUnknown, append(said, "So whether it had applied "+what+", cannot be told.")
	}
	if now && i.gateway.Standing == fleet.Live {
		return knewUnknown, append(said, "It has not reported since, so whether it has applied "+what+", is not known yet: ask again in some seconds.")
	}
	return knewUnknown, append(said, "Whether it had applied "+what+", is not known of the time between.")
}

// reports say what is known of where a gateway stood.
func reports(before, after fleet.Sighting, okBefore, okAfter bool) (said []string) {
	if okBefore {
		said = append(said, fmt.Sprintf("By its report of %s it had applied seq %d.", when(before.At), before.Seq))
	}
	if okAfter {
		said = append(said, fmt.Sprintf("By its report of %s, which came next, it had applied seq %d.", when(after.At), after.Seq))
	}
	if said == nil {
		said = append(said, "No reports from around that time are known.")
	}
	return said
}
