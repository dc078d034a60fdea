package gateway

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/token"
)

// Request is a request that a gateway has got.
type Request struct {
	// Method is the HTTP method. CONNECT is refused.
	Method string
	// Target is the request target in origin form as it is on the wire: path and query.
	Target string
	// Authorization are the values of the header field of that name, one for each field.
	Authorization []string
}

// Decision is what becomes of a request. What it points to is shared, and not to be changed.
type Decision struct {
	// Allowed: it is to be passed on.
	Allowed bool
	// Status is what to answer when it is not: 400, 401, 403 or 503.
	Status int
	// Challenge is for WWW-Authenticate, empty if there is none to send.
	Challenge string
	// Reason is the check that failed, one of [Reasons], for metrics and logs; empty if none did.
	// Callers are not told which one it was.
	Reason string
	// Token is nil if there is none that is genuine and that is accepted here and now, and
	// where anybody may call.
	Token *token.Token
	// Authorization is what the replica says, as far as it was asked. Its Code is set whenever
	// the request is not allowed.
	replica.Authorization

	tenant string // the domain of the tenant of Token's issuer
}

// Reasons are the values of [Decision.Reason], sorted, without the empty one: those of packages
// token and replica, and the gateway's own.
var Reasons = slices.Compact(slices.Sorted(slices.Values(slices.Concat(token.Reasons, token.RefusedReasons, replica.Reasons, []string{
	reasonPath, reasonNoCredentials, reasonSeveral, reasonStale, reasonInactive, reasonNoAnswer, reasonOverload,
}))))

const (
	reasonPath          = "path"
	reasonNoCredentials = "no_credentials"
	reasonSeveral       = "several_credentials"
	reasonStale         = "stale"

	// Of introspection: the issuer says no, does not say, or is asked too much already.
	reasonInactive = "introspection_inactive"
	reasonNoAnswer = "introspection_failed"
	reasonOverload = "introspection_overload"
)

// Decide says what becomes of a request. It waits for nobody unless the keys of an issuer are not
// here yet, a token names a key that is not known, or an issuer is to be asked.
func (g *Gateway) Decide(ctx context.Context, r Request) Decision { return g.decide(ctx, r, nil) }

// decide is Decide, and what [Gateway.Explain] goes by, which gives x.
func (g *Gateway) decide(ctx context.Context, r Request, x *explaining) Decision {
	path, ok := replica.CleanPath(r.Target)
	if !ok || r.Method == http.MethodConnect {
		d := g.refuse(replica.CodeGeneral, reasonPath)
		d.Status = http.StatusBadRequest
		return d
	}
	req := replica.Request{Method: r.Method, Path: path}
	compact, reason := bearer(r.Authorization)
	switch {
	case x.believes(), reason == "":
	case reason == reasonNoCredentials:
		return g.anonymous(req, replica.CodeMissingCredentials, reason, x)
	default:
		return g.anonymous(req, replica.CodeInvalidCredentials, reason, x)
	}
	t, issuer, err := g.accept(ctx, compact, x)
	if err != nil {
		code, reason := g.unproven(compact, err)
		return g.anonymous(req, code, reason, x)
	}
	req.Tenant = issuer.Tenant.Domain

	a := g.authorize(t, req, x)
	if a.Authorized && a.Outcome == replica.Ask {
		if reason := g.introspect(ctx, compact, t, x); reason != "" {
			code := replica.CodeGeneral
			if reason == reasonInactive {
				code = replica.CodeInvalidCredentials
			}
			a.Authorized, a.Info.Authorized = false, false
			a.Code, a.Reason, a.Info.ValidationStatus = code, reason, code
			return g.decided(t, issuer, a)
		}
		if x != nil {
			return g.decided(t, issuer, a)
		}
		// The answer may have taken long enough for the token to end, or to be revoked.
		if err := g.acceptance.Check(t, issuer, time.Now()); err != nil {
			return g.refuse(replica.CodeInvalidCredentials, token.Reason(err))
		}
		a = g.replica.Authorize(t, req)
	}
	return g.decided(t, issuer, a)
}

// decided is what the replica says of a request with a token that is accepted.
func (g *Gateway) decided(t *token.Token, issuer token.Issuer, a replica.Authorization) Decision {
	d := Decision{Allowed: a.Authorized, Reason: a.Reason, Token: t, Authorization: a, tenant: issuer.Tenant.Domain}
	if a.Authorized && a.Outcome == replica.Refused {
		// Nobody is asked who he is, so nobody has looked at whether the token is revoked.
		d.Token, d.tenant = nil, ""
	}
	if !d.Allowed {
		d.Status, d.Challenge = a.Code.HTTPStatus(), g.challenges.of(a)
	}
	return d
}

// anonymous decides about a request that comes with no token, or with none that is any good.
// Code and reason are for what needs one.
func (g *Gateway) anonymous(req replica.Request, code replica.Code, reason string, x *explaining) Decision {
	a := g.authorize(nil, req, x)
	if a.Code == replica.CodeMissingCredentials {
		a.Code, a.Reason, a.Info.ValidationStatus = code, reason, code
	}
	return g.decided(nil, token.Issuer{}, a)
}

// refuse is the decision about a request that the replica is not asked about.
func (g *Gateway) refuse(code replica.Code, reason string) Decision {
	a := replica.Authorization{Code: code, Reason: reason}
	a.Info.ValidationStatus = code
	return g.decided(nil, token.Issuer{}, a)
}

// accept is [token.Verifier.Accept] at the time when the keys are there.
func (g *Gateway) accept(ctx context.Context, compact string, x *explaining) (*token.Token, token.Issuer, error) {
	t, trusted, err := g.verify(ctx, compact, x)
	now := time.Now()
	var issuer token.Issuer
	if err == nil {
		issuer, _ = trusted.Issuer(t.Issuer)
		err = g.acceptance.Check(t, issuer, now)
	}
	x.saw(trusted, compact, t, err, g.acceptance, now)
	if err != nil {
		return nil, token.Issuer{}, err
	}
	return t, issuer, nil
}

// verify is [token.Verifier.Verify], by those who are trusted now.
func (g *Gateway) verify(ctx context.Context, compact string, x *explaining) (*token.Token, *trust, error) {
	trusted := g.issuers.trusted.Load()
	if x.believes() {
		t, err := believe(trusted, x.claims)
		return t, trusted, err
	}
	t, err := trusted.Verify(ctx, compact)
	if errors.Is(err, token.ErrUntrustedIssuer) {
		// It may have come a moment ago.
		if iss, ok := token.ClaimedIssuer(compact); ok && g.issuers.behind(trusted, iss) {
			g.issuers.refresh()
			trusted = g.issuers.trusted.Load()
			t, err = trusted.Verify(ctx, compact)
		}
	}
	return t, trusted, err
}

// unproven says why a token was not accepted.
func (g *Gateway) unproven(compact string, err error) (replica.Code, string) {
	switch {
	case errors.Is(err, token.ErrUntrustedIssuer) && g.replica.State().At().Epoch == "":
		return replica.CodeGeneral, reasonStale // nobody knows yet who is trusted
	case errors.Is(err, token.ErrKeysUnavailable):
		iss, _ := token.ClaimedIssuer(compact)
		if issuer, ok := g.issuers.trusted.Load().Issuer(iss); !ok || !held(issuer.Keys) {
			return replica.CodeKeyManagerDown, token.Reason(err)
		}
	}
	return replica.CodeInvalidCredentials, token.Reason(err)
}

// bearer returns the token in header fields Authorization (RFC 6750 section 2.1), or the reason
// why there is none. Credentials of another scheme are none for us; but there must be one field
// alone, for whoever is behind may read another one.
func bearer(fields []string) (compact, reason string) {
	switch {
	case len(fields) > 1:
		return "", reasonSeveral
	case len(fields) == 0:
		return "", reasonNoCredentials
	}
	scheme, rest, _ := strings.Cut(fields[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return "", reasonNoCredentials
	}
	return strings.TrimLeft(rest, " "), "" // what is no token, the verifier finds malformed
}
