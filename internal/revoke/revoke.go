// Package revoke hides how an admin's wish to end tokens becomes revocations: which issuer,
// which tenant, how long an entry must last, and what it would hit.
package revoke

import (
	"context"
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
	// Reason is for people, up to 255 bytes. It is published.
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
	// [MaxEffects] of each; the numbers count all.
	Applications                  []*catalog.Application
	Clients                       []string
	ApplicationCount, ClientCount int
	// Living is about remembered tokens, for kinds that have a time. For others it is zero.
	Living ledger.Living
	// Revoked: the target is revoked already, and the order would change nothing but for a
	// later time or end.
	Revoked bool
}

// MaxEffects is how many applications and clients an [Effect] names.
const MaxEffects = 100

// MaxReason is the longest reason, in bytes.
const MaxReason = 255

// Ledger is [ledger.Ledger].
type Ledger interface {
	RevokeAll(ctx context.Context, requests []ledger.Request) ([]ledger.Result, error)
	Lookup(ctx context.Context, targets []revocation.Target) ([]directory.Stored, error)
	IssuedToken(ctx context.Context, jti string) (ledger.Issued, bool, error)
	Living(ctx context.Context, target revocation.Target, tenant revocation.Tenant) (ledger.Living, error)
}

// State is the state of the log in this process. [follow.Follower] is one.
type State interface {
	// Fresh waits until the replica has everything up to a head of the log that was read
	// at most maxAge before the call, or after it with 0.
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.Replica
}

// Verifier tells genuine tokens from others. [token.Verifier] is one.
type Verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// Revoker carries out orders. Its methods may be called from any goroutine.
type Revoker struct{}

// Config is for [New].
type Config struct {
	// ClockSkew is that of the ledger: what is added to a revocation's time.
	ClockSkew time.Duration
}

// New returns a Revoker.
func New(cfg Config, l Ledger, state State, v Verifier) *Revoker { panic("skeleton") }

// Revoke carries out all of orders, 1 to [ledger.MaxBulk], in one transaction, or none. Its
// error is a [catalog.Invalid] whose pointers are "#/<n>/<member>", with the JSON names of the
// members (kind, iss, jti, token, client_id, sub, sid, tenant, kid, reason), or one of
// [ledger.Ledger.RevokeAll], or [token.ErrKeysUnavailable].
func (r *Revoker) Revoke(ctx context.Context, by Caller, orders []Order) ([]Outcome, error) {
	panic("skeleton")
}

// Preview says what Revoke would do, and changes nothing. Errors are those of Revoke.
func (r *Revoker) Preview(ctx context.Context, by Caller, orders []Order) ([]Effect, error) {
	panic("skeleton")
}
