package sts

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// KeyState says what a signing key is for at a time.
type KeyState string

// The states of a signing key, in their order.
const (
	KeyNext    KeyState = "next"    // published, not used yet
	KeyActive  KeyState = "active"  // signs new tokens
	KeyRetired KeyState = "retired" // signs no more, published until its last token has ended
	KeyEnded   KeyState = "ended"   // retired, and no longer published
	KeyRevoked KeyState = "revoked" // withdrawn: its tokens are dead
)

// KeyInfo is a signing key of an issuer of our own, without its secret.
type KeyInfo struct {
	KID, Algorithm string
	Iss            string
	Tenant         revocation.Tenant
	State          KeyState
	CreatedAt      time.Time
	// UseFrom is when it begins to sign.
	UseFrom time.Time
	// RetiredAt is when it stops; zero if it is not known.
	RetiredAt time.Time
	// PublishedUntil is when others need it no longer; zero while it is not retired.
	PublishedUntil time.Time
	RevokedAt      time.Time // zero if it was not withdrawn
}

// Errors of [Keys].
var (
	// ErrNoKey means that there is no such key.
	ErrNoKey = errors.New("there is no such signing key")
	// ErrNoIssuer means that the issuer is not one of our own.
	ErrNoIssuer = errors.New("it is no issuer of our own")
	// ErrLastKey means that an issuer would have no key left to sign with.
	ErrLastKey = errors.New("it is the only key that can sign now: rotate first")
)

// Changer is [ledger.Ledger].
type Changer interface {
	Change(ctx context.Context, f func(ctx context.Context, tx *ledger.Tx) error) (revocation.Position, error)
}

// Keys manages the signing keys of our own issuers. Running services see a change within
// seconds. Its methods may be called from any goroutine.
type Keys struct{}

// NewKeys returns a Keys. The first of masterKeys seals new keys.
func NewKeys(pool *pgxpool.Pool, ledger Changer, masterKeys []authn.MasterKey) *Keys {
	panic("skeleton")
}

// List returns the signing keys of all issuers, or of iss, by issuer and the newest first.
func (k *Keys) List(ctx context.Context, iss string) ([]KeyInfo, error) { panic("skeleton") }

// Rotation asks for a new signing key of Iss.
type Rotation struct {
	Iss string
	// Algorithm is RS256 or ES256; empty is that of the key in use.
	Algorithm string
	// Compromised withdraws the issuer's keys of this kid, or all that there are with "all":
	// they are published no longer, a revocation of each ends its tokens, and the new key is
	// used at once. Empty: the keys in use go on until others know the new one, and are
	// published until their last tokens have ended.
	Compromised string
	// Reason is for the audit and for the revocation.
	Reason string
}

// Rotate makes a new key, and retires or withdraws others, in one transaction with its audit
// records. It returns the keys that it made or changed, the new one first. Errors: [ErrNoIssuer],
// [ErrNoKey], those of the ledger.
func (k *Keys) Rotate(ctx context.Context, by ledger.Actor, r Rotation) ([]KeyInfo, error) {
	panic("skeleton")
}

// Retire stops a key from signing, now. Errors: [ErrNoKey], [ErrLastKey], those of the ledger.
func (k *Keys) Retire(ctx context.Context, by ledger.Actor, kid, reason string) (KeyInfo, error) {
	panic("skeleton")
}
