package sts

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
)

const clientCredentials = "client_credentials"

// storageRetry is what callers are asked to wait when keys cannot be read, and
// queueRetry when too many others wait for a signature.
const (
	storageRetry = 5 * time.Second
	queueRetry   = time.Second
)

func refusal(code, description string) *authn.OAuthError {
	return &authn.OAuthError{Status: http.StatusBadRequest, Code: code, Description: description}
}

// The errors of RFC 6749 section 5.2 and RFC 8707 section 2.
var (
	errNoGrantType = refusal(authn.InvalidRequest, "The parameter grant_type is missing.")
	errGrantType   = refusal("unsupported_grant_type", "Only the grant type client_credentials is supported.")
	errPublic      = refusal("unauthorized_client", "A public client cannot use this grant type.")
	errForeign     = refusal("unauthorized_client", "The tokens of this client are issued elsewhere.")
	errBlocked     = refusal("unauthorized_client", "The application is blocked.")
	errScope       = refusal("invalid_scope", "A scope is malformed or not one of the client.")
	errTarget      = refusal("invalid_target", "A resource is malformed or not one of the client.")

	// errUnknown is of a client that was removed since it was let in.
	errUnknown = &authn.OAuthError{Status: http.StatusUnauthorized, Code: authn.InvalidClient, Description: "The client is unknown."}

	errQueueFull = errors.New("too many tokens wait to be signed")
	errAllDead   = fmt.Errorf("revocations reach more than %d s ahead", maxAhead)
)

// maxAhead is how many seconds after the present one a token may be stamped. The database's
// clock may be ahead of ours, and a revocation reaches up to a minute ahead of that.
const maxAhead = 180

// tokenResponse has the members of RFC 6749 section 5.1. This grant has no
// refresh token.
type tokenResponse struct {
	AccessToken string `json:"access_token"`
	TokenType   string `json:"token_type"`
	ExpiresIn   int64  `json:"expires_in"`
	Scope       string `json:"scope,omitempty"`
}

func (s *Server) serveToken(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Pragma", "no-cache") // beside Cache-Control: RFC 6749 section 5.1
	response, err := s.grant(w, r)
	if err != nil {
		authn.WriteError(w, err)
		return
	}
	body, err := json.Marshal(response)
	if err != nil {
		authn.WriteError(w, fmt.Errorf("encode token response: %w", err))
		return
	}
	w.Header().Set("Content-Type", jsonType)
	_, _ = w.Write(body) // a caller that is gone does not read it
}

func (s *Server) grant(w http.ResponseWriter, r *http.Request) (tokenResponse, error) {
	// resource may be there several times: RFC 8707 section 2.
	client, form, err := s.forms.Form(w, r, "grant_type", "scope")
	if err != nil {
		return tokenResponse{}, err
	}
	switch grantType := form.Get("grant_type"); {
	case grantType == "":
		return tokenResponse{}, errNoGrantType
	case grantType != clientCredentials:
		return tokenResponse{}, errGrantType
	case client.Public:
		return tokenResponse{}, errPublic
	case client.Issuer != s.cfg.Issuer:
		return tokenResponse{}, errForeign
	}
	scopes, err := scopesOf(client, form.Get("scope"))
	if err != nil {
		return tokenResponse{}, err
	}
	audience, err := s.audienceOf(client, form["resource"])
	if err != nil {
		return tokenResponse{}, err
	}
	lifetime := s.cfg.TokenLifetime
	if client.TokenLifetime > 0 {
		lifetime = min(client.TokenLifetime, MaxTokenLifetime)
	}
	claims := claims{
		Issuer: s.cfg.Issuer, Audience: audience, Subject: client.ID, ClientID: client.ID, AuthorizedParty: client.ID,
		EntityID: client.ID, ID: newUUID(), Scope: strings.Join(scopes, " "),
	}
	if claims.IssuedAt, err = s.issueTime(r.Context(), claims); err != nil {
		return tokenResponse{}, err
	}
	claims.Expiry = claims.IssuedAt + int64(lifetime/time.Second)
	access, err := s.sign(r.Context(), claims)
	if err != nil {
		return tokenResponse{}, err
	}
	return tokenResponse{
		AccessToken: access, TokenType: "Bearer", ExpiresIn: claims.Expiry - claims.IssuedAt, Scope: claims.Scope,
	}, nil
}

// issueTime is the iat of a token with the other claims of c, which its client may have
// now: the first second at which no revocation ends it. See the package's comment.
func (s *Server) issueTime(ctx context.Context, c claims) (iat int64, err error) {
	now := s.now().Unix() // before the state is looked at
	if _, err := s.cfg.State.Fresh(ctx, 0); err != nil {
		return 0, authn.Unavailable(storageRetry, err)
	}
	state := s.cfg.State.Replica()
	state.View(func(v *replica.View) {
		mappings := v.KeyMappingsOf(c.ClientID)
		i := slices.IndexFunc(mappings, func(m *catalog.KeyMapping) bool { return m.Iss == c.Issuer })
		var application *catalog.Application
		if i >= 0 {
			application = v.Application(mappings[i].Application.UUID)
		}
		switch {
		case application == nil:
			err = errUnknown
			return
		case application.Blocked:
			err = errBlocked
			return
		}
		t := replica.Token{
			Iss: c.Issuer, Tenant: revocation.SuperTenant.Domain, ClientID: c.ClientID, Sub: c.Subject,
		}
		for t.IssuedAt = now; t.IssuedAt <= now+maxAhead; t.IssuedAt++ {
			if _, dead := state.Check(t, now); !dead {
				iat = t.IssuedAt
				return
			}
		}
		err = authn.Unavailable(storageRetry, errAllDead)
	})
	return iat, err
}

// scopesOf is what of the client's scopes is granted: all of those asked for, or
// its default.
func scopesOf(client authn.Client, asked string) ([]string, error) {
	if asked == "" {
		return client.DefaultScopes, nil
	}
	var scopes []string
	for scope := range strings.SplitSeq(asked, " ") {
		if scope == "" || slices.Contains(scopes, scope) {
			continue
		}
		if !slices.Contains(client.Scopes, scope) { // malformed ones are nobody's
			return nil, errScope
		}
		scopes = append(scopes, scope)
	}
	if len(scopes) == 0 {
		return nil, errScope
	}
	return scopes, nil
}

// audienceOf is what of the client's audience the token is for: all of the
// resources asked for, or all that it has.
func (s *Server) audienceOf(client authn.Client, resources []string) (audience, error) {
	var asked audience
	for _, resource := range resources {
		if resource == "" || slices.Contains(asked, resource) { // without a value it counts as absent
			continue
		}
		u, err := url.Parse(resource)
		if err != nil || !u.IsAbs() || strings.Contains(resource, "#") || !slices.Contains(client.Audience, resource) {
			return nil, errTarget
		}
		asked = append(asked, resource)
	}
	switch {
	case len(asked) > 0:
		return asked, nil
	case len(client.Audience) > 0:
		return client.Audience, nil
	}
	return audience{s.cfg.Issuer}, nil
}

// claims are those of RFC 9068 section 2.2, and azp and entity_id: WSO2's gateways know
// the client by them, and end tokens in bulk by them together with iat.
type claims struct {
	Issuer          string   `json:"iss"`
	Expiry          int64    `json:"exp"`
	Audience        audience `json:"aud"`
	Subject         string   `json:"sub"`
	ClientID        string   `json:"client_id"`
	AuthorizedParty string   `json:"azp"`
	EntityID        string   `json:"entity_id"`
	IssuedAt        int64    `json:"iat"`
	ID              string   `json:"jti"`
	Scope           string   `json:"scope,omitempty"`
}

// audience is a string in JSON when there is only one: not all readers know
// arrays.
type audience []string

func (a audience) MarshalJSON() ([]byte, error) {
	if len(a) == 1 {
		return json.Marshal(a[0])
	}
	return json.Marshal([]string(a))
}

// sign makes a JWT of claims when it is this caller's turn.
func (s *Server) sign(ctx context.Context, claims claims) (string, error) {
	select {
	case s.queue <- struct{}{}:
		defer func() { <-s.queue }()
	default:
		return "", authn.Unavailable(queueRetry, errQueueFull)
	}
	keys, err := s.currentKeys(ctx)
	if err != nil {
		return "", authn.Unavailable(storageRetry, err)
	}
	key, err := keys.signer(s.cfg.Algorithm)
	if err != nil {
		return "", authn.Unavailable(storageRetry, err)
	}
	select {
	case s.signing <- struct{}{}:
		defer func() { <-s.signing }()
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", fmt.Errorf("encode claims: %w", err)
	}
	signed, err := key.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign with key %s: %w", key.kid, err)
	}
	return signed.CompactSerialize()
}

// newUUID is a version-4 UUID: 122 random bits.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
