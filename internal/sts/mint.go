package sts

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Order says which token [Server.Mint] is to make.
type Order struct {
	// Tenant is the domain of the tenant whose issuer it is, ClientID the consumer key that it is for.
	Tenant, ClientID string
	// Audience is whom it is for, whatever the client's registration says. Empty: the issuer itself.
	Audience []string
	// Lifetime is in whole seconds, at least one. It is shortened to [MaxTokenLifetime], and to the longest
	// that the tenant's key manager says.
	Lifetime time.Duration
}

// Minted is a token that was made.
type Minted struct {
	// Compact is the token itself, a secret.
	Compact string
	// Iss, ID and Expiry are its iss, jti and exp.
	Iss, ID string
	Expiry  time.Time
}

// Mint makes a token for this process itself. The client proves nothing, and needs nothing to prove itself
// with: a consumer key that was mapped and not generated gets its tokens here alone. All else is as at the
// token endpoint: the application must not be blocked, no revocation ends the token, and it is remembered
// if tokens are. It has no scopes.
//
// Errors: an [authn.OAuthError] where the client may have no token, or none can be made now.
func (s *Server) Mint(ctx context.Context, o Order) (Minted, error) {
	if o.Lifetime < time.Second || o.Lifetime%time.Second != 0 {
		return Minted{}, fmt.Errorf("mint token: lifetime %s: must be whole seconds, at least one", o.Lifetime)
	}
	is, km, err := s.find(ctx, o.Tenant)
	if errors.Is(err, errNoTenant) {
		return Minted{}, fmt.Errorf("mint token: tenant %q has no issuer here", o.Tenant)
	}
	if err != nil {
		return Minted{}, fmt.Errorf("mint token: %w", oauthError(err))
	}
	lifetime := min(o.Lifetime, MaxTokenLifetime)
	if longest := time.Duration(km.MaxTokenLifetime) * time.Second; longest > 0 {
		lifetime = min(lifetime, longest)
	}
	c := tokenClaims{
		Issuer: is.iss, Audience: o.Audience, Subject: o.ClientID, ClientID: o.ClientID, AuthorizedParty: o.ClientID,
		EntityID: o.ClientID, GrantClass: "APPLICATION",
	}
	if len(c.Audience) == 0 {
		c.Audience = audience{is.iss}
	}
	compact, err := s.issue(ctx, is, &c, km.Tenant.Domain, typAccessToken, lifetime)
	if err != nil {
		return Minted{}, fmt.Errorf("mint token of client %s: %w", o.ClientID, err)
	}
	return Minted{Compact: compact, Iss: is.iss, ID: c.ID, Expiry: time.Unix(c.Expiry, 0)}, nil
}
