package ledger

import (
	"context"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// Issued is a token of an issuer of our own.
type Issued struct {
	// JTI is a canonical UUID.
	JTI string
	// ClientID and Subject are the token's client_id and sub, Exp its exp in Unix seconds.
	ClientID, Subject string
	Exp               int64
}

// Remember returns nil once t is remembered durably. It must be called, and return, before
// the state is looked at that says that t may be issued: see package sts. Errors: [ErrBusy],
// [ErrUnavailable], ctx's.
func (l *Ledger) Remember(ctx context.Context, t Issued) error { panic("skeleton") }

// SetRemembering is called when a process starts: on says whether it remembers all tokens that
// it issues. The first with on begins the time of [Living.Since], one without ends it.
func (l *Ledger) SetRemembering(ctx context.Context, on bool) error { panic("skeleton") }

// IssuedToken returns what is remembered of the token with this jti, and false if nothing is.
// A jti that is no UUID is never remembered.
func (l *Ledger) IssuedToken(ctx context.Context, jti string) (Issued, bool, error) {
	panic("skeleton")
}

// Living says how many remembered tokens a revocation would end now.
type Living struct {
	Tokens int64
	// Since is when remembering began: tokens issued before are not counted. Zero: tokens
	// are not remembered, and Tokens says nothing.
	Since time.Time
}

// Living counts the remembered tokens that have not expired and that a revocation of target,
// of a kind that has a time, would end. tenant owns the target's issuer.
func (l *Ledger) Living(ctx context.Context, target revocation.Target, tenant revocation.Tenant) (Living, error) {
	panic("skeleton")
}
