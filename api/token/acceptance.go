package token

import "time"

// Acceptance says which genuine tokens a receiver accepts as access tokens, besides those that
// are revoked. The zero value is strict.
type Acceptance struct {
	// Leeway is added to exp, and nbf and iat may be ahead of now by it. Up to
	// [revocation.MaxLeeway].
	Leeway time.Duration
	// Audiences are the identifiers of the receiver, one of which aud must have. None: aud is
	// not looked at.
	Audiences []string
}

// Check returns nil if a receiver accepts t, which issuer signed, at now. Else its error says
// why, is [ErrRefused], and repeats no part of the token: the wrong typ, no exp or one that is
// over, nbf or iat ahead, no iat, a longer life than the issuer's tokens have, another audience.
func (a Acceptance) Check(t *Token, issuer Issuer, now time.Time) error { panic("skeleton") }
