package app_test

import (
	"context"
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/lestrrat-go/jwx/v3/jwk"
	"github.com/lestrrat-go/jwx/v3/jwt"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"

	"github.com/rescindhq/rescind/internal/authn"
)

// behindTLS is a client for whom the issuer's host is the service, as a TLS proxy makes it.
type behindTLS struct {
	base  string
	inner http.RoundTripper
}

func (b behindTLS) RoundTrip(r *http.Request) (*http.Response, error) {
	u, err := url.Parse(b.base)
	if err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	r.URL.Scheme, r.URL.Host = u.Scheme, u.Host
	return b.inner.RoundTrip(r)
}

// Libraries that are not ours get tokens, discover issuers and verify, for an issuer at the
// root and for a tenant's, with both algorithms.
func TestOtherLibraries(t *testing.T) {
	t.Parallel()
	for _, alg := range []string{"RS256", "ES256"} {
		t.Run(alg, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			s := w.serve("RESCIND_SIGNING_ALGORITHM=" + alg)
			w.tenant("pizza.example")
			httpClient := newHTTPClient(t)
			httpClient.Transport = behindTLS{s.base, httpClient.Transport}
			for _, iss := range []string{ourISS, ourISS + "/t/pizza.example"} {
				id := "client of " + iss // must be form-encoded in Basic
				w.client(iss, authn.Registration{
					ID: id, Secret: "s3cr:t+/=%", AuthMethod: "client_secret_post", Scopes: []string{"read"}, DefaultScopes: []string{"read"},
					Audience: []string{"https://api.example.com"},
				})
				ctx := oidc.ClientContext(context.WithValue(t.Context(), oauth2.HTTPClient, httpClient), httpClient)
				provider, err := oidc.NewProvider(ctx, iss)
				if err != nil {
					t.Fatalf("go-oidc discovers %s: %v", iss, err)
				}
				var discovered struct {
					JWKSURI string `json:"jwks_uri"`
				}
				if err := provider.Claims(&discovered); err != nil {
					t.Fatal(err)
				}
				for _, style := range []oauth2.AuthStyle{oauth2.AuthStyleInHeader, oauth2.AuthStyleInParams, oauth2.AuthStyleAutoDetect} {
					cfg := clientcredentials.Config{
						ClientID: id, ClientSecret: "s3cr:t+/=%", TokenURL: provider.Endpoint().TokenURL, Scopes: []string{"read"}, AuthStyle: style,
					}
					got, err := cfg.Token(ctx)
					if err != nil {
						t.Fatalf("x/oauth2 gets a token with style %d: %v", style, err)
					}
					if got.TokenType != "Bearer" || time.Until(got.Expiry) < 800*time.Second || got.Extra("scope") != "read" {
						t.Errorf("token %+v", got)
					}
					verified, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: "https://api.example.com"}).Verify(ctx, got.AccessToken)
					if err != nil || verified.Issuer != iss || verified.Subject != id {
						t.Errorf("go-oidc: %+v, %v", verified, err)
					}
					verifyWithJWX(ctx, t, httpClient, discovered.JWKSURI, iss, id, got.AccessToken)
				}
			}
		})
	}
}

func verifyWithJWX(ctx context.Context, t *testing.T, client *http.Client, jwksURI, iss, sub, compact string) {
	t.Helper()
	keys, err := jwk.Fetch(ctx, jwksURI, jwk.WithHTTPClient(client))
	if err != nil {
		t.Fatalf("jwx fetches %s: %v", jwksURI, err)
	}
	parsed, err := jwt.Parse([]byte(compact), jwt.WithKeySet(keys), jwt.WithIssuer(iss), jwt.WithAudience("https://api.example.com"))
	if err != nil {
		t.Fatalf("jwx: %v", err)
	}
	if got, ok := parsed.Subject(); !ok || got != sub {
		t.Errorf("jwx: subject %q, want %q", got, sub)
	}
}
