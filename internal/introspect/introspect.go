// Package introspect hides the introspection endpoint of RFC 7662: who may ask about which
// token, and what of it they are told.
//
// # Invariants
//
// A token is active only if a gateway would accept it now, and if the caller has something to
// do with it: a client with its own tokens and those of its application, a resource server
// with those for its audiences that were issued in its tenant. Of all others nothing is told,
// not even why: the answer is the same {"active":false}.
//
// An answer has every revocation that this process has answered for before it was asked.
//
// # Decisions
//
// What cannot be found out now, because an issuer's keys or the newest state cannot be had, is
// 503 and not "inactive". That would be safe for the moment, but it is the word by which
// callers throw a token away and send its user back to the start, for the length of a network
// fault. Whoever asks can then still refuse the request at hand.
//
// A token is verified only if it claims an issuer whose tokens the caller may be told about,
// and a Bearer only if it claims an issuer of our own: nobody reaches the key set of another
// tenant's issuer, and nobody without credentials one that has to be fetched. A JWT under a
// known key of such an issuer costs the check of its signature, which is nearly all of the
// work, whether it then turns out forged, expired, revoked or for others: the time that an
// answer takes says no more than the answer.
package introspect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
)

// Config is for [New]. The zero value is ready for production.
type Config struct {
	// Leeway is what is added to a token's exp, and its nbf and iat may be ahead of our clock.
	// Default 30 s, up to [revocation.MaxLeeway]; negative for none.
	Leeway time.Duration
	// Timeout bounds one answer, from the last byte of its request; after it, it is 503.
	// Default 10 s, 1 s to 25 s.
	Timeout time.Duration
}

// Callers finds out who asks. [authn.Authenticator] does.
type Callers interface {
	FormOrBearer(w http.ResponseWriter, r *http.Request, known ...string) (client authn.Client, bearer string, form url.Values, err error)
	Client(ctx context.Context, id string) (authn.Client, bool, error)
	// BearerFailed is called when the Bearer token of r was refused.
	BearerFailed(r *http.Request)
}

// Verifier tells genuine tokens from others. [token.Verifier] is one.
type Verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// State is the state of the log in this process. [follow.Follower] is one.
type State interface {
	Replica() *replica.State
	// Reach waits until the replica is at p of its epoch, or past it.
	Reach(ctx context.Context, p revocation.Position) error
}

// Deps are the parts of the service that requests reach. All are required.
type Deps struct {
	Callers  Callers
	Verifier Verifier
	State    State
	// Seen is the last position that this process has answered for: see [ledger.Ledger.Seen].
	Seen       func() revocation.Position
	Registerer prometheus.Registerer
}

// Endpoint is the introspection endpoint.
type Endpoint struct {
	acceptance token.Acceptance
	timeout    time.Duration
	callers    Callers
	verifier   Verifier
	state      State
	seen       func() revocation.Position
	now        func() time.Time
	results    *prometheus.CounterVec
}

// New returns the endpoint. Its error names what is missing or out of its range.
func New(cfg Config, deps Deps) (*Endpoint, error) {
	if cfg.Leeway == 0 {
		cfg.Leeway = 30 * time.Second
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	var errs []error
	if cfg.Timeout < time.Second || cfg.Timeout > 25*time.Second {
		errs = append(errs, fmt.Errorf("timeout of %s: must be 1s to 25s", cfg.Timeout))
	}
	if cfg.Leeway > revocation.MaxLeeway {
		errs = append(errs, fmt.Errorf("leeway of %s: must be at most %s", cfg.Leeway, revocation.MaxLeeway))
	}
	for _, d := range []struct {
		name    string
		missing bool
	}{
		{"Callers", deps.Callers == nil}, {"Verifier", deps.Verifier == nil}, {"State", deps.State == nil},
		{"Seen", deps.Seen == nil}, {"Registerer", deps.Registerer == nil},
	} {
		if d.missing {
			errs = append(errs, fmt.Errorf("%s is not given", d.name))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configure introspection: %w", err)
	}
	return &Endpoint{
		acceptance: token.Acceptance{Leeway: cfg.Leeway},
		timeout:    cfg.Timeout,
		callers:    deps.Callers,
		verifier:   deps.Verifier,
		state:      deps.State,
		seen:       deps.Seen,
		now:        time.Now,
		results:    newResults(deps.Registerer),
	}, nil
}

// The results of a request.
const (
	resultActive      = "active"
	resultInactive    = "inactive"
	resultRefused     = "refused" // before the token was looked at
	resultThrottled   = "throttled"
	resultUnavailable = "unavailable"
	resultFailed      = "failed"
)

func newResults(reg prometheus.Registerer) *prometheus.CounterVec {
	results := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "rescind_introspections_total",
		Help: "Introspection requests by what they were answered. An inactive token may be one that is not for the caller.",
	}, []string{"result"})
	for _, result := range []string{
		resultActive, resultInactive, resultRefused, resultThrottled, resultUnavailable, resultFailed,
	} {
		results.WithLabelValues(result)
	}
	reg.MustRegister(results)
	return results
}

func resultOf(t *token.Token, err error) string {
	e, ok := errors.AsType[*authn.OAuthError](err)
	switch {
	case err == nil && t != nil:
		return resultActive
	case err == nil:
		return resultInactive
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return resultUnavailable
	case !ok:
		return resultFailed
	case e.Status == http.StatusServiceUnavailable:
		return resultUnavailable
	case e.Status == http.StatusTooManyRequests:
		return resultThrottled
	}
	return resultRefused
}

var errTimeout = fmt.Errorf("the introspection took too long: %w", context.DeadlineExceeded)

// ServeHTTP answers a request of any method.
func (e *Endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	ctx, cancel := context.WithTimeoutCause(r.Context(), e.timeout, errTimeout)
	defer cancel()
	t, err := e.introspect(w, r.WithContext(ctx))
	e.results.WithLabelValues(resultOf(t, err)).Inc()
	if err != nil {
		writeError(w, err)
		return
	}
	body := encode(t)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	_, _ = w.Write(body) // a caller that is gone does not read it
}

// scope is what a Bearer token must have that stands for its client here.
const scope = "introspect"

// The codes of RFC 6750 section 3.1.
const (
	invalidToken      = "invalid_token"
	insufficientScope = "insufficient_scope"
)

// challenges are those of RFC 6750 section 3, by code.
var challenges = map[string]string{
	invalidToken:      `Bearer realm="oauth2", error="invalid_token"`,
	insufficientScope: `Bearer realm="oauth2", error="insufficient_scope", scope="` + scope + `"`,
}

var (
	errPublic  = &authn.OAuthError{Status: http.StatusUnauthorized, Code: authn.InvalidClient, Description: "A public client cannot ask about tokens."}
	errNoToken = &authn.OAuthError{Status: http.StatusBadRequest, Code: authn.InvalidRequest, Description: "The parameter token is missing."}
	// One for all causes.
	errBearer = &authn.OAuthError{Status: http.StatusUnauthorized, Code: invalidToken, Description: "The Bearer token is not accepted."}
	errScope  = &authn.OAuthError{Status: http.StatusForbidden, Code: insufficientScope, Description: "The Bearer token lacks the scope introspect."}
)

// storageRetry is what callers are asked to wait when keys or the newest state cannot be had.
const storageRetry = 5 * time.Second

// introspect returns the token that r asks about if it is active, else nil.
func (e *Endpoint) introspect(w http.ResponseWriter, r *http.Request) (*token.Token, error) {
	ctx := r.Context()
	// The hint says where to look first, and there is one place to look.
	client, bearer, form, err := e.callers.FormOrBearer(w, r, "token", "token_type_hint")
	if err != nil {
		return nil, err
	}
	if bearer != "" {
		client, err = e.clientOf(ctx, bearer)
		if err == errBearer {
			e.callers.BearerFailed(r)
		}
		if err != nil {
			return nil, err
		}
		if rec, ok := w.(authn.Recorder); ok {
			rec.RecordClient(client.ID)
		}
	}
	compact := form.Get("token")
	switch {
	case client.Public: // it has proved nothing
		return nil, errPublic
	case compact == "":
		return nil, errNoToken
	}
	// A token of another tenant's issuer is not for the caller, whatever it says.
	t, err := e.living(ctx, compact, func(k *catalog.KeyManager) bool { return k.Tenant.ID == client.Tenant.ID })
	if err != nil || t == nil || !e.concerns(client, t) {
		return nil, err
	}
	return t, nil
}

// clientOf returns the client that a Bearer token lets ask.
func (e *Endpoint) clientOf(ctx context.Context, bearer string) (authn.Client, error) {
	t, err := e.living(ctx, bearer, func(k *catalog.KeyManager) bool { return k.Resident })
	switch {
	case err != nil:
		return authn.Client{}, err
	case t == nil || !slices.Contains(t.Audience, t.Issuer):
		return authn.Client{}, errBearer
	}
	client, ok, err := e.callers.Client(ctx, t.ClientID)
	switch {
	case err != nil:
		return authn.Client{}, err
	case !ok || client.Issuer != t.Issuer || client.Public:
		return authn.Client{}, errBearer
	case !slices.Contains(strings.Split(t.Scope, " "), scope):
		return authn.Client{}, errScope
	}
	return client, nil
}

// living returns the token that compact is, if a gateway that it is for would accept it now and
// its issuer's key manager is eligible; else nil. Only such a token is verified.
func (e *Endpoint) living(ctx context.Context, compact string, eligible func(*catalog.KeyManager) bool) (*token.Token, error) {
	// First, so that whatever the token is, it takes the same time.
	if err := e.state.Reach(ctx, e.seen()); err != nil {
		return nil, authn.Unavailable(storageRetry, err)
	}
	claimed, ok := token.ClaimedIssuer(compact)
	if !ok {
		return nil, nil
	}
	state := e.state.Replica()
	var manager *catalog.KeyManager
	state.View(func(v *replica.View) { manager = v.KeyManager(claimed) })
	if manager == nil || !manager.Enabled || !eligible(manager) {
		return nil, nil
	}
	t, err := e.verifier.Verify(ctx, compact)
	switch {
	case errors.Is(err, token.ErrInvalid):
		return nil, nil
	case errors.Is(err, token.ErrKeysUnavailable):
		return nil, authn.Unavailable(storageRetry, err)
	case err != nil:
		return nil, err
	}
	issuer, _ := e.verifier.Issuer(t.Issuer)
	now := e.now()
	if e.acceptance.Check(t, issuer, now) != nil {
		return nil, nil
	}
	if _, revoked := state.Check(replica.TokenOf(t, manager.Tenant.Domain), now.Unix()); revoked {
		return nil, nil
	}
	return t, nil
}

// concerns reports whether a client is told about t, which is of its tenant.
func (e *Endpoint) concerns(client authn.Client, t *token.Token) bool {
	switch {
	case t.Issuer == client.Issuer && t.ClientID == client.ID:
		return true
	case slices.ContainsFunc(t.Audience, func(aud string) bool { return slices.Contains(client.ResourceAudiences, aud) }):
		return true
	}
	same := false
	e.state.Replica().View(func(v *replica.View) {
		same = slices.ContainsFunc(v.KeyMappingsOf(t.ClientID), func(m *catalog.KeyMapping) bool {
			return m.Iss == t.Issuer && m.Application.ID == client.ApplicationID
		})
	})
	return same
}

// answer has the members of an active token: nothing that is about a person but sub.
type answer struct {
	Active    bool   `json:"active"`
	Issuer    string `json:"iss"`
	Subject   string `json:"sub,omitempty"`
	Audience  any    `json:"aud,omitempty"` // a string or an array of them, as in the token
	ClientID  string `json:"client_id,omitempty"`
	Scope     string `json:"scope,omitempty"`
	Expiry    int64  `json:"exp"`
	IssuedAt  int64  `json:"iat"`
	NotBefore int64  `json:"nbf,omitempty"`
	ID        string `json:"jti,omitempty"`
	TokenType string `json:"token_type"`
}

var inactive = []byte(`{"active":false}`)

// encode is the answer about an active token, or nil for any other.
func encode(t *token.Token) []byte {
	if t == nil {
		return inactive
	}
	a := answer{
		Active: true, Issuer: t.Issuer, Subject: t.Subject, ClientID: t.ClientID, Scope: t.Scope,
		Expiry: t.Expiry, IssuedAt: t.IssuedAt, NotBefore: t.NotBefore, ID: t.ID, TokenType: "Bearer",
	}
	switch {
	case t.AudienceList:
		a.Audience = t.Audience
	case len(t.Audience) > 0:
		a.Audience = t.Audience[0]
	}
	b, err := json.Marshal(&a)
	if err != nil {
		panic(err) // there is nothing in it that JSON cannot say
	}
	return b
}

// writeError is [authn.WriteError] with the challenge of RFC 6750 where a Bearer token is the
// matter.
func writeError(w http.ResponseWriter, err error) {
	if e, ok := errors.AsType[*authn.OAuthError](err); ok && challenges[e.Code] != "" {
		if rec, ok := w.(authn.Recorder); ok {
			rec.RecordError(err)
		}
		w = challenger{w, challenges[e.Code]}
	}
	authn.WriteError(w, err)
}

// challenger has the last word on how the caller is to authenticate.
type challenger struct {
	http.ResponseWriter
	challenge string
}

func (c challenger) WriteHeader(status int) {
	c.Header().Set("WWW-Authenticate", c.challenge)
	c.ResponseWriter.WriteHeader(status)
}
