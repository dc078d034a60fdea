package token

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// Issuer is a trusted issuer of tokens.
type Issuer struct {
	// Iss is compared with the token's iss byte for byte.
	Iss string
	// Tenant is whose issuer it is, and hence whose tokens these are.
	Tenant revocation.Tenant
	// Keys verify its tokens, and those of no other issuer.
	Keys KeySet
	// Algorithms are the alg values that it may use. Default [DefaultAlgorithms].
	// EdDSA and Ed25519 allow each other.
	Algorithms []string
	// AllowTypes are further typ values, in any case, that mark its access tokens
	// beside at+jwt. "JWT" stands for no typ at all too. The verifier does not look
	// at typ; see [Acceptance].
	AllowTypes []string
	// MaxLifetime is the longest time from iat to exp, in whole seconds; 0 is any.
	// The verifier does not look at either; see [Acceptance].
	MaxLifetime time.Duration
}

// idClaims are claims that only ID tokens have. Not nonce: some issuers put it into access
// tokens too.
var idClaims = []string{"at_hash", "c_hash", "s_hash"}

// IsAccessToken reports whether t, which i signed, is of the kind that receivers may accept.
// What is marked as an access token may have any claims. A typ of JWT, or none, marks nothing:
// then the claims of ID tokens tell them apart, whether or not i may leave the mark out. So
// it holds for all that any receiver accepts, and for more: who revokes a token goes by it.
func (i Issuer) IsAccessToken(t *Token) bool {
	switch {
	case t.Type == accessTokenType:
		return true
	case t.Type != "" && t.Type != "jwt" && !i.allows(t.Type):
		return false
	}
	return !slices.ContainsFunc(idClaims, t.Has)
}

// accessTokenType is the typ of RFC 9068.
const accessTokenType = "at+jwt"

// allows reports whether access tokens of i may have this typ, which is as in [Token].
func (i Issuer) allows(typ string) bool {
	if typ == accessTokenType {
		return true
	}
	if typ == "" {
		typ = "jwt"
	}
	return slices.ContainsFunc(i.AllowTypes, func(allowed string) bool { return mediaType(allowed) == typ })
}

// Verifier verifies tokens of a fixed set of issuers. It may be used
// concurrently.
type Verifier struct {
	issuers map[string]Issuer
}

// NewVerifier checks issuers; its error names all that is wrong with them.
func NewVerifier(issuers ...Issuer) (*Verifier, error) {
	v := &Verifier{issuers: make(map[string]Issuer, len(issuers))}
	var errs []error
	for _, issuer := range issuers {
		if issuer.Iss == "" || issuer.Keys == nil {
			errs = append(errs, fmt.Errorf("issuer %q: needs an iss and keys", issuer.Iss))
		}
		if _, twice := v.issuers[issuer.Iss]; twice {
			errs = append(errs, fmt.Errorf("issuer %q: is there twice", issuer.Iss))
		}
		if len(issuer.Algorithms) == 0 {
			issuer.Algorithms = DefaultAlgorithms
		}
		for _, alg := range issuer.Algorithms {
			if _, ok := schemes[alg]; !ok {
				errs = append(errs, fmt.Errorf("issuer %q: algorithm %q is not supported, use one of %q",
					issuer.Iss, alg, slices.Sorted(maps.Keys(schemes))))
			}
		}
		v.issuers[issuer.Iss] = issuer
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return v, nil
}

// Issuer returns the trusted issuer whose iss this is.
func (v *Verifier) Issuer(iss string) (Issuer, bool) {
	issuer, ok := v.issuers[iss]
	return issuer, ok
}

// Verify checks that compact is a JWT in compact form that a trusted issuer
// signed with one of its keys and algorithms. It does not look at typ, exp, nbf
// and aud. See [ErrInvalid] and [ErrKeysUnavailable] for its errors, none of
// which repeats a part of the token.
func (v *Verifier) Verify(ctx context.Context, compact string) (*Token, error) {
	t, signature, claimsErr, err := parse(compact)
	if err != nil {
		return nil, err
	}
	issuer, ok := v.issuers[t.Issuer]
	if !ok {
		return nil, ErrUntrustedIssuer
	}
	if !slices.ContainsFunc(issuer.Algorithms, func(alg string) bool {
		return sameAlgorithm(alg) == sameAlgorithm(t.Alg)
	}) {
		return nil, ErrAlgorithm
	}
	key, err := issuer.Keys.Key(ctx, t.KeyID, t.Alg)
	if err != nil && !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrKeysUnavailable) {
		err = fmt.Errorf("%w: %w", ErrKeysUnavailable, err) // what a key set of someone else's returns proves nothing
	}
	if err != nil {
		return nil, err
	}
	good := key.verify(t.Alg, t.SigningInput, signature)
	if cached, ok := issuer.Keys.(*CachedKeySet); ok && !good && t.KeyID == "" {
		// The one key there is may have another in its place by now.
		if key, err = cached.renewed(ctx, t.KeyID, t.Alg); err != nil {
			return nil, err
		}
		good = key.verify(t.Alg, t.SigningInput, signature)
	}
	if !good {
		return nil, ErrSignature
	}
	if claimsErr != nil {
		return nil, claimsErr
	}
	// A revoked key ends its tokens whether or not they name it.
	t.KeyID = key.id
	return t, nil
}

// Accept is what a receiver asks of a token: [Verifier.Verify], then [Acceptance.Check] at now.
// Its error is that of either. What is left to ask is whether the token is revoked.
func (v *Verifier) Accept(ctx context.Context, compact string, a Acceptance, now time.Time) (*Token, error) {
	t, err := v.Verify(ctx, compact)
	if err != nil {
		return nil, err
	}
	if err := a.Check(t, v.issuers[t.Issuer], now); err != nil {
		return nil, err
	}
	return t, nil
}
