// Package explain says why a token is refused, for those who have to help: the checks in order, the facts
// behind the first that fails, whether a gateway knew, and what to do.
package explain

import (
	"context"
	"encoding/json"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Question is what somebody wants to know.
type Question struct {
	// Token is a JWT, or an opaque token; or Claims are the claims of one that is not at hand, which are
	// believed. Exactly one is there.
	Token  string          `json:"token"`
	Claims json.RawMessage `json:"claims"`
	// API is what it was presented for; nil: only the token is looked at.
	API *API `json:"api"`
	// Gateway is the id of the one that refused it, empty if that is not known. At is when that was,
	// zero: now.
	Gateway string    `json:"gateway"`
	At      time.Time `json:"at,omitzero"`
}

// API names an API, and maybe what of it was called.
type API struct {
	Context string `json:"context"`
	Version string `json:"version"`
	// Method and Path of the request. Path is the whole path, which begins with the context. Empty: no
	// operation is looked at.
	Method string `json:"method"`
	Path   string `json:"path"`
}

// Caller is who asks: one that is bound to a tenant is told of that tenant's tokens only.
type Caller struct {
	// Tenant is a domain, empty for one who sees all.
	Tenant string
}

// Answer is the explanation.
type Answer struct {
	// Verdict is "accepted", "refused", or "cannot_tell".
	Verdict string `json:"verdict"`
	// Summary is the answer in a sentence.
	Summary string `json:"summary"`
	// Code, HTTPStatus and Message are what WSO2's gateways answer with.
	Code       int             `json:"code,omitempty"`
	HTTPStatus int             `json:"http_status,omitempty"`
	Checks     []replica.Check `json:"checks"`
	// Revocation is what ended the token, nil if nothing did.
	Revocation *Revocation `json:"revocation,omitempty"`
	// Gateway says what the gateway knew, nil if none was asked about.
	Gateway *GatewayKnew `json:"gateway,omitempty"`
	// Next is what to do, in a sentence.
	Next string `json:"next,omitempty"`
	// Position is the state that was looked at.
	Position revocation.Position `json:"position"`
}

// Revocation is what is known of one.
type Revocation struct {
	ID         string          `json:"id"`
	Kind       revocation.Kind `json:"kind"`
	Identifier string          `json:"identifier"`
	Iss        string          `json:"iss,omitempty"`
	Tenant     string          `json:"tenant"`
	RevokedAt  time.Time       `json:"revoked_at"`
	NotAfter   int64           `json:"not_after,omitempty"`
	Exp        int64           `json:"exp"`
	Actor      string          `json:"actor,omitempty"` // by whom, from the audit; empty if that is gone
	Reason     string          `json:"reason,omitempty"`
	Seq        revocation.Seq  `json:"seq,omitempty"` // 0: the log has removed the event
}

// GatewayKnew says whether a gateway knew of the revocation, or of the whole state, at a time.
type GatewayKnew struct {
	ID       string         `json:"id"`
	Standing fleet.Standing `json:"standing,omitempty"`
	// Knew is "yes", "no" or "unknown".
	Knew   string    `json:"knew"`
	At     time.Time `json:"at"`
	Detail string    `json:"detail"`
}

// Ledger reads revocations and the audit. [ledger.Ledger] is one.
type Ledger interface {
	List(ctx context.Context, f ledger.ListFilter, after string, limit int) ([]ledger.Listed, error)
	AuditPage(ctx context.Context, f ledger.AuditFilter, before int64, limit int) ([]ledger.AuditRecord, error)
}

// State is the service's replica. [follow.Follower] is one.
type State interface {
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.State
}

// Verifier tells genuine tokens from others. [token.Verifier] is one.
type Verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// Fleet is [fleet.Fleet].
type Fleet interface {
	Refresh(ctx context.Context) error
	Gateway(id string) (fleet.Gateway, bool)
	When(id string, at time.Time) (before, after fleet.Sighting, okBefore, okAfter bool)
}

// Deps are what an explainer asks. Fleet may be nil: then nothing is known of gateways.
type Deps struct {
	Ledger   Ledger
	State    State
	Verifier Verifier
	Fleet    Fleet
	// Leeway is for clocks, as gateways have it by default: 30 s.
	Leeway time.Duration
}

// Explainer explains. Its methods may be called from any goroutine.
type Explainer struct{}

// New returns an explainer.
func New(deps Deps) (*Explainer, error) { panic("skeleton") }

// Explain answers q. Its error is a [catalog.Invalid] with pointers into the question, ErrNotSeen, or one of
// the database.
func (e *Explainer) Explain(ctx context.Context, by Caller, q Question) (Answer, error) {
	panic("skeleton")
}

// Text is the answer for people, lines of at most about 100 columns.
func (a Answer) Text() string { panic("skeleton") }
