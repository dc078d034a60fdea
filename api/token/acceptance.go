package token

import (
	"errors"
	"slices"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// ErrRefused is what all errors of [Acceptance.Check] are: the token is genuine, and not to be
// accepted here and now. It is not [ErrInvalid].
var ErrRefused = errors.New("the token is not accepted")

// The ways in which a genuine token is refused; each is [ErrRefused] too.
var (
	// ErrType is for a typ that its issuer's access tokens do not have, and for ID tokens.
	ErrType error = &failure{ErrRefused, "type", "the token is no access token"}
	// ErrNoExpiry is for a token without exp.
	ErrNoExpiry error = &failure{ErrRefused, "no_expiry", "the token never expires"}
	// ErrExpired is for an exp that is over, leeway included.
	ErrExpired error = &failure{ErrRefused, "expired", "the token has expired"}
	// ErrNotYetValid is for an nbf or iat that is ahead by more than the leeway.
	ErrNotYetValid error = &failure{ErrRefused, "not_yet_valid", "the token is not valid yet"}
	// ErrNoIssueTime is for a token without iat, or with the iat 0: revocations of more than
	// one token could not be compared with it.
	ErrNoIssueTime error = &failure{ErrRefused, "no_issue_time", "the token does not say when it was issued"}
	// ErrLifetime is for a token that outlives [Issuer.MaxLifetime]: revocations of more than
	// one token could be forgotten before it.
	ErrLifetime error = &failure{ErrRefused, "lifetime", "the token lives longer than those of its issuer may"}
	// ErrAudience is for an aud that names no one of [Acceptance.Audiences].
	ErrAudience error = &failure{ErrRefused, "audience", "the token is for others"}
)

// Acceptance says which genuine tokens a receiver accepts as access tokens, besides those that
// are revoked. The zero value gives no leeway, and does not look at aud: a gateway sets Audiences.
type Acceptance struct {
	// Leeway is added to exp, and nbf and iat may be ahead of now by it. Whole seconds, 0 to
	// [revocation.MaxLeeway], past which revocations are forgotten; what is outside counts as
	// the nearest.
	Leeway time.Duration
	// Audiences are the identifiers of the receiver, one of which aud must have. None: aud is
	// not looked at.
	Audiences []string
}

// Check returns nil if a receiver accepts t, which issuer signed, at now. Else its error says
// why, is [ErrRefused], and repeats no part of the token.
func (a Acceptance) Check(t *Token, issuer Issuer, now time.Time) error {
	at := now.Unix()
	leeway := int64(min(max(a.Leeway, 0), revocation.MaxLeeway) / time.Second)
	switch {
	case !issuer.allows(t.Type) || !issuer.IsAccessToken(t):
		return ErrType
	case !t.HasExpiry:
		return ErrNoExpiry
	case at >= t.Expiry+leeway:
		return ErrExpired
	case t.NotBefore > at+leeway:
		return ErrNotYetValid
	case t.IssuedAt == 0:
		return ErrNoIssueTime
	case t.IssuedAt > at+leeway:
		return ErrNotYetValid
	case issuer.MaxLifetime > 0 && t.Expiry-t.IssuedAt > int64(issuer.MaxLifetime/time.Second):
		return ErrLifetime
	case len(a.Audiences) > 0 && !slices.ContainsFunc(t.Audience, func(aud string) bool {
		return slices.Contains(a.Audiences, aud)
	}):
		return ErrAudience
	}
	return nil
}
