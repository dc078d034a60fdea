package httpapi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Clients finds out who calls, and whose client a token was issued to.
// [authn.Authenticator] is one.
type Clients interface {
	Form(w http.ResponseWriter, r *http.Request, known ...string) (authn.Client, url.Values, error)
	Owner(ctx context.Context, iss, consumerKey string) (applicationID int32, ok bool, err error)
}

// Verifier tells genuine tokens from others. [token.Verifier] is one.
type Verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// Ledger makes revocations durable. [ledger.Ledger] is one.
type Ledger interface {
	Revoke(ctx context.Context, r ledger.Request) (ledger.Result, error)
	Audit(ctx context.Context, e ledger.AuditEntry) error
	Known(ctx context.Context, target revocation.Target) (revocation.Revocation, bool, error)
	IssuedToken(ctx context.Context, jti string) (ledger.Issued, bool, error)
}

// The actions that the audit knows revocation requests by.
const (
	actionToken   = "revoke_token"
	actionByJTI   = "revoke_by_jti"
	actionOpaque  = "revoke_opaque"
	actionForeign = "foreign_token"
)

// reasonClient is the reason of a revocation that the token's own client asked for.
const reasonClient = "client"

// revoker is the revocation endpoint of RFC 7009.
type revoker struct {
	cfg        Config
	clients    Clients
	verifier   Verifier
	ledger     Ledger
	metrics    *revokeMetrics
	requests   *quota // those of clients that have one
	unverified *quota
	foreigns   *quota // records of others' tokens
}

func newRevoker(cfg Config, deps Deps) *revoker {
	reasons := slices.DeleteFunc(slices.Clone(token.Reasons), func(reason string) bool {
		return reason == token.Reason(token.ErrKeysUnavailable) || reason == token.Reason(token.ErrClaims)
	})
	return &revoker{
		cfg: cfg, clients: deps.Clients, verifier: deps.Verifier, ledger: deps.Ledger,
		metrics:  newRevokeMetrics(deps.Registerer, reasons),
		requests: newQuota(), unverified: newQuota(), foreigns: newQuota(),
	}
}

var errTimeout = fmt.Errorf("the revocation took too long: %w", context.DeadlineExceeded)

func (v *revoker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeoutCause(r.Context(), v.cfg.Timeout, errTimeout)
	defer cancel()
	result, err := v.revoke(w, r.WithContext(ctx))
	v.metrics.results.WithLabelValues(result).Inc()
	if err != nil {
		authn.WriteError(w, err)
		return
	}
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusOK)
}

func (v *revoker) revoke(w http.ResponseWriter, r *http.Request) (result string, err error) {
	client, form, err := v.clients.Form(w, r, "token", "token_type_hint")
	if err != nil {
		return resultOf(err), err
	}
	q := &request{revoker: v, client: client, exchange: exchangeOf(r.Context())}
	if result, err = q.serve(r.Context(), strings.Trim(form.Get("token"), " \t\r\n")); result == "" {
		result = resultOf(err)
	}
	return result, err
}

// resultOf is the result of a request that ended before its token was understood.
func resultOf(err error) string {
	e, ok := errors.AsType[*authn.OAuthError](err)
	switch {
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

// request is a revocation request whose client is known.
type request struct {
	*revoker
	client   authn.Client
	exchange *exchange
}

var (
	errNoToken = &authn.OAuthError{Status: http.StatusBadRequest, Code: authn.InvalidRequest, Description: "The parameter token is missing."}
	errForeign = &authn.OAuthError{Status: http.StatusBadRequest, Code: authn.InvalidGrant, Description: "The token was issued to another client."}

	errQuota      = authn.TooMany("The client has used up its quota of requests.", quotaWindow)
	errUnverified = authn.TooMany("The client revokes too many tokens that cannot be verified.", quotaWindow)
)

// jweDots are in an encrypted token, which is opaque to all but its issuer.
const jweDots = 4

// serve returns an empty result for an error that says enough.
func (q *request) serve(ctx context.Context, tok string) (result string, err error) {
	if limit := q.client.RevokeQuota; limit > 0 && !q.requests.take(q.client.ID, limit) {
		return "", errQuota
	}
	switch {
	case tok == "":
		return "", errNoToken
	case token.LooksLikeJWT(tok) && !(q.client.RevokeOpaque && strings.Count(tok, ".") == jweDots):
		return q.serveJWT(ctx, tok)
	case q.client.Public: // it has proved nothing, and neither has the token
	case q.client.RevokeByJTI:
		target := revocation.Target{Kind: revocation.KindToken, Iss: q.client.Issuer, ID: tok}
		return q.serveUnverified(ctx, target, actionByJTI)
	case q.client.RevokeOpaque:
		return q.serveUnverified(ctx, revocation.DigestTarget(q.client.Issuer, tok), actionOpaque)
	}
	return q.nothing(reasonUnknown), nil
}

func (q *request) serveJWT(ctx context.Context, compact string) (string, error) {
	t, err := q.verifier.Verify(ctx, compact)
	switch {
	case errors.Is(err, token.ErrClaims): // its issuer did sign it
		return unsupported("A claim of the token has the wrong type.")
	case errors.Is(err, token.ErrInvalid):
		return q.nothing(token.Reason(err)), nil
	case errors.Is(err, token.ErrKeysUnavailable):
		return "", authn.Unavailable(storageRetry, err)
	case err != nil:
		return "", err
	}
	target := revocation.Target{Kind: revocation.KindToken, Iss: t.Issuer, ID: t.ID}
	signature := ""
	if t.ID == "" {
		target, signature = revocation.DigestTarget(t.Issuer, t.SigningInput), t.Signature
	}
	now := time.Now()
	issuer, _ := q.verifier.Issuer(t.Issuer)
	switch {
	case !issuer.IsAccessToken(t):
		return unsupported("Only access tokens can be revoked.")
	case !t.HasExpiry:
		return unsupported("A token that never expires cannot be revoked.")
	case t.Expiry > now.Add(revocation.MaxExpiryAhead).Unix():
		return unsupported("The token expires too far ahead.")
	case target.Validate() != nil:
		return unsupported("The issuer or the jti of the token is too long or not plain text.")
	case isOver(t.Expiry, now):
		return q.nothing(reasonExpired), nil
	}
	own, err := q.owns(ctx, t.Issuer, t.ClientID)
	if err != nil {
		return "", err
	}
	if !own {
		return q.foreign(ctx, target, t.ClientID)
	}
	return q.record(ctx, ledger.Request{
		Target: target, Exp: t.Expiry, ClientID: t.ClientID, Signature: signature, Action: actionToken,
	})
}

// serveUnverified ends a token that nobody here can read, on the word of a client
// that is permitted to. Nothing says when it expires: at the latest when the
// longest token that its issuer can have issued by now does.
func (q *request) serveUnverified(ctx context.Context, target revocation.Target, action string) (string, error) {
	if !q.unverified.take(q.client.ID, q.cfg.UnverifiedPerSecond) {
		return "", errUnverified
	}
	if target.Validate() != nil {
		return q.nothing(reasonUnknown), nil
	}
	known, ok, err := q.ledger.Known(ctx, target)
	if err != nil {
		return "", ledgerError(err)
	}
	now := time.Now()
	exp, holder := now.Add(q.client.MaxTokenLifetime).Unix()+1+ledger.MaxStampAhead, ""
	if ok {
		// A token that was revoked before was issued before: its end stays as it is,
		// or each repeat would add an event.
		exp, holder = known.Exp, known.ClientID
	} else if !target.Digest {
		issued, remembered, err := q.issued(ctx, target)
		if err != nil {
			return "", err
		}
		if remembered {
			exp, holder = issued.Exp, issued.ClientID
		}
	}
	if holder != "" {
		own, err := q.owns(ctx, target.Iss, holder)
		if err != nil {
			return "", err
		}
		if !own {
			return q.foreign(ctx, target, holder)
		}
	}
	if isOver(exp, now) {
		return q.nothing(reasonExpired), nil
	}
	return q.record(ctx, ledger.Request{Target: target, Exp: exp, ClientID: cmp.Or(holder, q.client.ID), Action: action})
}

// issued is what is remembered of the token that target names.
func (q *request) issued(ctx context.Context, target revocation.Target) (t ledger.Issued, ok bool, err error) {
	t, ok, err = q.ledger.IssuedToken(ctx, target.ID)
	if err != nil {
		return t, false, ledgerError(err)
	}
	return t, ok && t.Iss == target.Iss, nil
}

// owns reports whether a token of iss that was issued to consumerKey is the
// client's: its own, or one of its application.
func (q *request) owns(ctx context.Context, iss, consumerKey string) (bool, error) {
	if iss == q.client.Issuer && consumerKey == q.client.ID {
		return true, nil
	}
	if q.client.Public {
		return false, nil // it has not proved that it belongs to the application
	}
	application, ok, err := q.clients.Owner(ctx, iss, consumerKey)
	return ok && application == q.client.ApplicationID, err
}

// foreignsPerSecond bounds what a client that replays somebody's token can add to
// the audit.
const foreignsPerSecond = 10

// foreign refuses a genuine token of another client, and puts on record that
// this one has it: it may be stolen.
func (q *request) foreign(ctx context.Context, target revocation.Target, consumerKey string) (string, error) {
	reason := ""
	if owner := (revocation.Target{Kind: revocation.KindClient, Iss: target.Iss, ID: consumerKey}); owner.Validate() == nil {
		reason = "issued to " + consumerKey
	}
	if !q.foreigns.take(q.client.ID, foreignsPerSecond) {
		return resultForeign, errForeign // counted, and on record often enough
	}
	err := q.ledger.Audit(ctx, ledger.AuditEntry{
		Tenant: q.client.Tenant, Action: actionForeign, Iss: target.Iss, Subject: target.ID, Reason: reason, Actor: q.actor(),
	})
	if err != nil {
		return "", ledgerError(err)
	}
	return resultForeign, errForeign
}

func (q *request) record(ctx context.Context, r ledger.Request) (string, error) {
	// Issuers of one application are of one tenant.
	r.Tenant, r.Reason, r.Actor, r.Traceparent = q.client.Tenant, reasonClient, q.actor(), q.exchange.traceparent
	result, err := q.ledger.Revoke(ctx, r)
	switch {
	case err != nil:
		return "", ledgerError(err)
	case result.Added:
		return resultRevoked, nil
	}
	return resultRepeated, nil
}

func (q *request) actor() ledger.Actor {
	return ledger.Actor{Name: "client:" + q.client.ID, RequestID: q.exchange.id, Remote: q.exchange.remote}
}

func (q *request) nothing(reason string) string {
	q.metrics.nothing.WithLabelValues(reason).Inc()
	return resultNothing
}

func unsupported(description string) (string, error) {
	return resultUnsupported, &authn.OAuthError{Status: http.StatusBadRequest, Code: authn.UnsupportedTokenType, Description: description}
}

// isOver reports whether no gateway accepts a token with this exp any more.
func isOver(exp int64, now time.Time) bool {
	return now.Unix() >= exp+int64(revocation.MaxLeeway/time.Second)
}

// storageRetry is what callers are asked to wait when the database, or an
// issuer's key set, is away.
const storageRetry = 5 * time.Second

func ledgerError(err error) error {
	switch {
	case errors.Is(err, ledger.ErrBusy):
		return authn.Unavailable(overloadRetry, err)
	case errors.Is(err, ledger.ErrUnavailable):
		return authn.Unavailable(storageRetry, err)
	}
	return err
}
