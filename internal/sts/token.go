package sts

import (
	"cmp"
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
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/claims"
	"github.com/rescindhq/rescind/internal/ledger"
)

const clientCredentials = "client_credentials"

// The values of typ: that of RFC 9068, and that of clients whose gateways know no other.
const (
	typAccessToken = "at+jwt"
	typJWT         = "JWT"
)

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
	errNotGranted  = refusal("unauthorized_client", "The client may not use this grant type.")
	errForeign     = refusal("unauthorized_client", "The tokens of this client are issued elsewhere.")
	errDisabled    = refusal("unauthorized_client", "The issuer is disabled.")
	errBlocked     = refusal("unauthorized_client", "The application is blocked.")
	errNoAPI       = refusal("unauthorized_client", "The application has no subscription that this key may use.")
	errScope       = refusal("invalid_scope", "A scope is malformed or not one of the client.")
	errTarget      = refusal("invalid_target", "A resource is malformed or not one of the client.")

	// Gateways, and our own verifiers, refuse larger tokens.
	errSubscriptions = refusal(authn.InvalidRequest, "The application has too many subscriptions for a self-contained token.")
	errLarge         = refusal(authn.InvalidRequest, "The token would be too large: ask for fewer scopes or resources.")

	errNoIssuerHere = &authn.OAuthError{Status: http.StatusNotFound, Code: authn.InvalidRequest, Description: "There is no issuer at this address."}

	// errUnknown is of a client that was removed since it was let in.
	errUnknown = &authn.OAuthError{Status: http.StatusUnauthorized, Code: authn.InvalidClient, Description: "The client is unknown."}

	errQueueFull = errors.New("too many tokens wait to be signed")
	errAllDead   = fmt.Errorf("revocations reach more than %d s ahead", maxAhead)
	errKilled    = fmt.Errorf("revocations ended %d tokens, or their keys, while they were made", maxTries)
	errOldKeys   = fmt.Errorf("the signing keys could not be read for more than %s", maxRingAge)
)

// maxAhead is how many seconds after the present one a token may be stamped. The database's
// clock may be ahead of ours, and a revocation reaches up to a minute ahead of that.
const maxAhead = ledger.MaxStampAhead

// maxTries is how often a token is begun anew because of what was revoked meanwhile.
const maxTries = 5

// maxTokenBytes is the size of the largest token that verifiers read.
const maxTokenBytes = 16 << 10

// tokenResponse has the members of RFC 6749 section 5.1. This grant has no
// refresh token.
type tokenResponse struct {
	AccessToken string `json:"access_token"`
	TokenType   string `json:"token_type"`
	ExpiresIn   int64  `json:"expires_in"`
	Scope       string `json:"scope,omitempty"`
}

func (s *Server) serveToken(domain func(*http.Request) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("Pragma", "no-cache") // beside it: RFC 6749 section 5.1
		is, km, err := s.find(r.Context(), domain(r))
		if err != nil {
			authn.WriteError(w, oauthError(err))
			return
		}
		response, err := s.grant(w, r, is, km.Tenant.Domain)
		if err != nil {
			authn.WriteError(w, err)
			return
		}
		body, err := json.Marshal(response)
		if err != nil {
			authn.WriteError(w, fmt.Errorf("encode token response: %w", err))
			return
		}
		h.Set("Content-Type", jsonType)
		_, _ = w.Write(body) // a caller that is gone does not read it
	}
}

// grant gives the client that sent r a token of is, the issuer of the tenant of this domain.
func (s *Server) grant(w http.ResponseWriter, r *http.Request, is *issuer, tenant string) (tokenResponse, error) {
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
	case !slices.Contains(client.GrantTypes, grantType):
		return tokenResponse{}, errNotGranted
	case client.Issuer != is.iss:
		return tokenResponse{}, errForeign
	}
	scopes, err := scopesOf(client, form.Get("scope"))
	if err != nil {
		return tokenResponse{}, err
	}
	audience, err := audienceOf(is.iss, client, form["resource"])
	if err != nil {
		return tokenResponse{}, err
	}
	lifetime := s.cfg.TokenLifetime
	if client.TokenLifetime > 0 {
		lifetime = min(client.TokenLifetime, MaxTokenLifetime)
	}
	c := tokenClaims{
		Issuer: is.iss, Audience: audience, Subject: client.ID, ClientID: client.ID, AuthorizedParty: client.ID,
		EntityID: client.ID, GrantClass: "APPLICATION", Scope: strings.Join(scopes, " "),
	}
	access, err := s.issue(r.Context(), is, &c, tenant, cmp.Or(client.TokenTyp, typAccessToken), lifetime)
	if err != nil {
		return tokenResponse{}, err
	}
	return tokenResponse{
		AccessToken: access, TokenType: "Bearer", ExpiresIn: c.Expiry - c.IssuedAt, Scope: c.Scope,
	}, nil
}

// issue makes a JWT of c with this typ, when there is a place for it. It sets what of c is new
// for each token. What is refused is not remembered. See the package's comment.
func (s *Server) issue(ctx context.Context, is *issuer, c *tokenClaims, tenant, typ string, lifetime time.Duration) (string, error) {
	select {
	case s.queue <- struct{}{}:
		defer func() { <-s.queue }()
	default:
		return "", authn.Unavailable(queueRetry, errQueueFull)
	}
	for range maxTries {
		c.ID = newUUID()
		if err := s.entitle(ctx, c, tenant); err != nil {
			return "", err
		}
		c.Expiry = c.IssuedAt + int64(lifetime/time.Second)
		access, kid, err := s.sign(ctx, is, c, typ)
		if err != nil {
			return "", err
		}
		if err := s.remember(ctx, c); err != nil {
			return "", err
		}
		t := c.replicaToken(tenant)
		t.KID = kid
		if _, dead := s.cfg.State.Replica().Check(t, s.now().Unix()); !dead {
			return access, nil
		}
	}
	return "", authn.Unavailable(storageRetry, errKilled)
}

// remember returns when the token is remembered and the state has all that was committed before.
func (s *Server) remember(ctx context.Context, c *tokenClaims) error {
	if s.cfg.Memory == nil {
		return nil
	}
	err := s.cfg.Memory.Remember(ctx, ledger.Issued{JTI: c.ID, Iss: c.Issuer, ClientID: c.ClientID, Subject: c.Subject, Exp: c.Expiry})
	switch {
	case errors.Is(err, ledger.ErrBusy):
		return authn.Unavailable(queueRetry, err)
	case err != nil:
		return authn.Unavailable(storageRetry, err)
	}
	if _, err := s.cfg.State.Fresh(ctx, 0); err != nil {
		return authn.Unavailable(storageRetry, err)
	}
	return nil
}

// entitle sets iat and what a self-contained token carries, if the client may have a token now.
// iat is the first second at which no revocation ends it. See the package's comment.
func (s *Server) entitle(ctx context.Context, c *tokenClaims, tenant string) (err error) {
	now := s.now().Unix() // before the state is looked at
	if _, err := s.cfg.State.Fresh(ctx, 0); err != nil {
		return authn.Unavailable(storageRetry, err)
	}
	state := s.cfg.State.Replica()
	state.View(func(v *replica.View) {
		mappings := v.KeyMappingsOf(c.ClientID)
		i := slices.IndexFunc(mappings, func(m *catalog.KeyMapping) bool { return m.Iss == c.Issuer })
		var application *catalog.Application
		if i >= 0 {
			application = v.Application(mappings[i].Application.UUID)
		}
		km := residentOf(v, c.Issuer, tenant)
		switch {
		case application == nil, km == nil:
			err = errUnknown
			return
		case !km.Enabled:
			err = errDisabled
			return
		case application.Blocked:
			err = errBlocked
			return
		}
		c.SelfContained = nil // of the try before
		if application.SelfContained {
			carried := claims.Of(v, application, mappings[i].KeyType, c.ClientID)
			if len(carried.SubscribedAPIs) == 0 {
				err = errNoAPI
				return
			}
			c.SelfContained = &carried
		}
		t := c.replicaToken(tenant)
		for t.IssuedAt = now; t.IssuedAt <= now+maxAhead; t.IssuedAt++ {
			if _, dead := state.Check(t, now); !dead {
				c.IssuedAt = t.IssuedAt
				return
			}
		}
		err = authn.Unavailable(storageRetry, errAllDead)
	})
	return err
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
func audienceOf(iss string, client authn.Client, resources []string) (audience, error) {
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
	return audience{iss}, nil
}

// tokenClaims are those of RFC 9068 section 2.2, and what WSO2's gateways know: the client by azp,
// bulk revocations by entity_id, aut and iat.
type tokenClaims struct {
	Issuer          string   `json:"iss"`
	Expiry          int64    `json:"exp"`
	Audience        audience `json:"aud"`
	Subject         string   `json:"sub"`
	ClientID        string   `json:"client_id"`
	AuthorizedParty string   `json:"azp"`
	EntityID        string   `json:"entity_id"`
	GrantClass      string   `json:"aut"`
	IssuedAt        int64    `json:"iat"`
	ID              string   `json:"jti"`
	Scope           string   `json:"scope,omitempty"`

	*claims.SelfContained // its members; nil for applications whose tokens are not
}

// replicaToken is the token as revocations are compared with it, but for the key.
func (c *tokenClaims) replicaToken(tenant string) replica.Token {
	return replica.Token{
		Iss: c.Issuer, Tenant: tenant, JTI: c.ID, ClientID: c.ClientID, Sub: c.Subject, IssuedAt: c.IssuedAt,
	}
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

// sign makes a JWT of c, with this typ, when it is this caller's turn.
func (s *Server) sign(ctx context.Context, is *issuer, c *tokenClaims, typ string) (access, kid string, err error) {
	payload, err := json.Marshal(c)
	if err != nil {
		return "", "", fmt.Errorf("encode claims: %w", err)
	}
	key, err := s.signer(ctx, is) // may wait for a key to be made
	if err != nil {
		return "", "", authn.Unavailable(storageRetry, err)
	}
	access, err = s.signWith(ctx, key, typ, payload)
	switch {
	case err != nil:
		return "", "", err
	case len(access) <= maxTokenBytes:
		return access, key.kid, nil
	case c.SelfContained != nil:
		return "", "", errSubscriptions
	}
	return "", "", errLarge
}

func (s *Server) signWith(ctx context.Context, key signer, typ string, payload []byte) (string, error) {
	select {
	case s.signing <- struct{}{}:
		defer func() { <-s.signing }()
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	signer, ok := key.byTyp[typ]
	if !ok {
		return "", fmt.Errorf("sign with key %s: typ %q is not known", key.kid, typ)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("sign with key %s: %w", key.kid, err)
	}
	return signed.CompactSerialize()
}

// signer is what signs for is now. If the keys that this process has are all revoked, another
// process may have made one since they were read.
func (s *Server) signer(ctx context.Context, is *issuer) (signer, error) {
	keys, err := is.current(ctx)
	if err != nil {
		return signer{}, err
	}
	if time.Since(keys.at) > maxRingAge {
		return signer{}, errOldKeys
	}
	revoked := func(kid string) bool { return s.revokedKey(is.iss, kid) }
	if key, err := keys.signer(s.cfg.Algorithm, revoked); err == nil {
		return key, nil
	}
	if err := is.reload(ctx); err != nil {
		return signer{}, err
	}
	return is.ring.Load().signer(s.cfg.Algorithm, revoked)
}

// revokedKey reports whether this process knows that the tokens of a key of iss are dead.
func (s *Server) revokedKey(iss, kid string) bool {
	_, dead := s.cfg.State.Replica().Check(replica.Token{Iss: iss, KID: kid}, s.now().Unix())
	return dead
}

// newUUID is a version-4 UUID: 122 random bits.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
