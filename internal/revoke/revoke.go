// Package revoke hides how an admin's wish to end tokens becomes revocations: which issuer,
// which tenant, how long an entry must last, and what it would hit.
//
// # Decisions
//
// What another tenant has does not exist for a caller that is bound to one: an issuer that it
// does not see is refused in the words for one that is not there, and a token of such an issuer
// is not even verified, because the time that takes, or keys that cannot be had, would tell.
//
// An end that nothing tells is guessed long: an entry that is kept for a minute too many does
// no harm, one that is dropped a second too early lets a dead token through.
//
// A guess never moves an end that is stored: the token of a jti that was revoked before was
// issued before. So a repeat adds no event.
//
// To look into many orders, or to count what they would end, takes the processor and the
// database for long: a few do so at a time. A few orders that are to be carried out never wait
// for those, because somebody is using a stolen token.
package revoke

import (
	"context"
	"fmt"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Order is what is to be ended. Of the identifiers exactly one is there, that of Kind.
type Order struct {
	// Kind may be empty: the identifier tells it.
	Kind revocation.Kind
	// Iss is the issuer; empty is our own of the caller's tenant. A JWT names its own, and
	// a tenant has none.
	Iss string
	// JTI, or Token, a JWT or an opaque token of an external issuer, is for KindToken. A
	// token is neither stored nor published nor repeated in an error.
	JTI, Token string
	ClientID   string // KindClient
	Sub        string // KindSubject
	SID        string // KindSession
	Tenant     string // KindTenant, a domain
	KID        string // KindKey
	// Reason is for people, up to [MaxReason] bytes. It is published.
	Reason string
}

// Caller is on whose behalf tokens are ended.
type Caller struct {
	Actor       ledger.Actor
	Traceparent string
	// Tenant binds the caller to the domain of a tenant: what others have does not exist for
	// it. Empty: it sees all.
	Tenant string
}

// Outcome is what became of an order.
type Outcome struct {
	ledger.Result
	Target revocation.Target
	Tenant revocation.Tenant
	// Exp is when the last token that the order is about has ended by itself, Unix seconds.
	Exp int64
	// NotAfter is the latest iat of tokens that are dead, Unix seconds; 0 for kinds without a
	// time, and where it could not be read after the commit.
	NotAfter int64
	// Expired: the token has ended already, nothing was stored, and Result is zero.
	Expired bool
}

// Effect is what an order would end.
type Effect struct {
	Target revocation.Target
	Tenant revocation.Tenant
	Exp    int64
	// Expired is as in [Outcome].
	Expired bool
	// NotAfter is the latest iat of tokens that would be dead, Unix seconds, by our clock; 0
	// for kinds without a time.
	NotAfter int64
	// Applications and Clients are those that would be hit, as far as they are known, up to
	// [MaxEffects] of each, and [MaxNamed] in all effects of a preview; the numbers count all.
	// A client that is not known may have tokens all the same: it may have been deleted, or
	// have no mapping here. Whose tokens a subject or a session has is not known.
	Applications                  []*catalog.Application
	Clients                       []string
	ApplicationCount, ClientCount int
	// Living is about remembered tokens, for kinds that have a time. For others, and for
	// external issuers, it is zero.
	Living ledger.Living
	// Revoked: the target is revoked already, and the order would change nothing but for a
	// later time or end.
	Revoked bool
}

const (
	// MaxEffects is how many applications and clients an [Effect] names.
	MaxEffects = 100
	// MaxNamed is how many applications, and how many clients, all effects of a preview name.
	MaxNamed = 10 * MaxEffects
	// MaxCounted is how many clients, subjects and tenants of our issuers a preview may name.
	MaxCounted = 100
)

// MaxReason is the longest reason, in bytes.
const MaxReason = 255

// Ledger is [ledger.Ledger].
type Ledger interface {
	RevokeAll(ctx context.Context, requests []ledger.Request) ([]ledger.Result, error)
	Lookup(ctx context.Context, targets []revocation.Target) ([]directory.Stored, error)
	IssuedTokens(ctx context.Context, jtis []string) (map[string]ledger.Issued, error)
	Living(ctx context.Context, target revocation.Target, tenant revocation.Tenant) (ledger.Living, error)
}

// State is the state of the log in this process. [follow.Follower] is one.
type State interface {
	// Fresh waits until the replica has everything up to a head of the log that was read
	// at most maxAge before the call, or after it with 0.
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.State
}

// Verifier tells genuine tokens from others. [token.Verifier] is one.
type Verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// Revoker carries out orders. Its methods may be called from any goroutine.
type Revoker struct {
	skew     int64 // seconds
	ledger   Ledger
	state    State
	verifier Verifier
	turns    turns
}

// Config is for [New].
type Config struct {
	// ClockSkew is that of the ledger: what is added to a revocation's time. 0 or less is none.
	ClockSkew time.Duration
}

// New returns a Revoker.
func New(cfg Config, l Ledger, state State, v Verifier) *Revoker {
	return &Revoker{
		skew: max(0, int64(cfg.ClockSkew/time.Second)), ledger: l, state: state, verifier: v, turns: turns{inside: make(chan struct{}, maxHeavy)},
	}
}

// Revoke carries out all of orders, 1 to [ledger.MaxBulk], in one transaction, or none. Its
// error is a [catalog.Invalid] whose pointers are "#/<n>/<member>", with the JSON names of the
// members (kind, iss, jti, token, client_id, sub, sid, tenant, kid, reason), or "#/<n>" for an
// order as a whole, of the first ten orders that are wrong, or one of
// [ledger.Ledger.RevokeAll], or [token.ErrKeysUnavailable]. [ledger.ErrBusy] is also returned
// when too many large requests wait to be looked into.
func (r *Revoker) Revoke(ctx context.Context, by Caller, orders []Order) ([]Outcome, error) {
	p, plans, err := r.planInTurn(ctx, by, orders)
	if err != nil {
		return nil, err
	}
	outcomes := make([]Outcome, len(plans))
	requests := make([]ledger.Request, 0, len(plans))
	of := make([]int, 0, len(plans))
	for i, plan := range plans {
		outcomes[i] = Outcome{Target: plan.target, Tenant: plan.tenant, Exp: plan.exp, Expired: plan.expired}
		if plan.expired {
			continue
		}
		of = append(of, i)
		requests = append(requests, ledger.Request{
			Target: plan.target, Tenant: plan.tenant, Exp: plan.exp, Lifetime: int64(plan.lifetime), ClientID: plan.clientID, Signature: plan.signature,
			Reason: orders[i].Reason, Action: "revoke_" + string(plan.target.Kind), Actor: by.Actor, Traceparent: by.Traceparent,
		})
	}
	if len(requests) == 0 {
		return outcomes, nil
	}
	results, err := r.ledger.RevokeAll(ctx, requests)
	if err != nil {
		return nil, err
	}
	for i, n := range of {
		outcomes[n].Result = results[i]
	}
	// Only the database's clock knows the time, and hence the end. It was committed, so that
	// it cannot be read is no failure any more.
	if stored, err := p.stored(ctx, plans, func(plan plan) bool { return plan.target.Kind.HasTime() }); err == nil {
		for i := range outcomes {
			if s, ok := stored[outcomes[i].Target]; ok {
				outcomes[i].NotAfter, outcomes[i].Exp = s.NotAfter, s.Exp
			}
		}
	}
	return outcomes, nil
}

// unavailable is err as the ledger's callers know it: nothing was stored.
func unavailable(doing string, err error) error {
	return fmt.Errorf("%w: %s: %w", ledger.ErrUnavailable, doing, err)
}
