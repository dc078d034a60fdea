package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// verifier tells genuine tokens from others. [token.Verifier] is one.
type verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// ExplainToken says what the checks of a token itself find: its form, issuer, signature, type, times and
// audience, in the order in which a gateway makes them. T is nil if one failed. With acceptance.Audiences
// empty the audience is not looked at. It returns [token.ErrKeysUnavailable] as a failed check, not as an error.
func ExplainToken(ctx context.Context, v verifier, compact string, acceptance token.Acceptance, now time.Time) (t *token.Token, checks []replica.Check) {
	t, err := v.Verify(ctx, compact)
	return judged(v, compact, nil, t, err, acceptance, now)
}

// ExplainClaims is [ExplainToken] of a token that is not at hand, whose claims, a JSON object, are believed:
// what takes its header or signature is not looked at.
func ExplainClaims(v verifier, claims json.RawMessage, acceptance token.Acceptance, now time.Time) (t *token.Token, checks []replica.Check) {
	if claims == nil {
		claims = json.RawMessage{}
	}
	t, err := believe(v, claims)
	return judged(v, "", claims, t, err, acceptance, now)
}

// judged is what becomes of a token that was verified, or was not with an error.
func judged(v verifier, compact string, claims json.RawMessage, t *token.Token, err error, acceptance token.Acceptance, now time.Time) (*token.Token, []replica.Check) {
	if err == nil {
		issuer, _ := v.Issuer(t.Issuer)
		err = acceptance.Check(t, issuer, now)
	}
	checks := narrate(v, compact, claims, t, err, acceptance, now)
	if err != nil {
		return nil, checks
	}
	return t, checks
}

// believe is Verify of claims that nobody has signed.
func believe(v verifier, claims json.RawMessage) (*token.Token, error) {
	t, err := token.OfClaims(claims)
	if err != nil && !errors.Is(err, token.ErrClaims) {
		return nil, err
	}
	if _, ok := v.Issuer(t.Issuer); !ok {
		return nil, token.ErrUntrustedIssuer
	}
	if err != nil {
		return nil, err
	}
	return t, nil
}

// tokenChecks are in the order in which [token.Verifier.Accept] makes them, with the reasons that each is refused
// for.
var tokenChecks = []struct {
	name    string
	reasons []string
	said    func(*tokenNarrator) (detail string, f facts)
	signed  bool // it takes more than claims
}{
	{"form", []string{"malformed"}, (*tokenNarrator).form, false},
	{"issuer_trusted", []string{"untrusted_issuer", reasonStale}, (*tokenNarrator).issuerTrusted, false},
	{"algorithm", []string{"algorithm"}, (*tokenNarrator).algorithm, true},
	{"keys", []string{"unknown_key", "keys_unavailable"}, (*tokenNarrator).keys, true},
	{"signature", []string{"signature"}, (*tokenNarrator).signature, true},
	{"claim_types", []string{"claims"}, (*tokenNarrator).claimTypes, false},
	{"type", []string{"type"}, (*tokenNarrator).typ, false},
	{"expiry", []string{"no_expiry", "expired"}, (*tokenNarrator).expiry, false},
	{"not_before", []string{"not_yet_valid"}, (*tokenNarrator).notBefore, false},
	{"issue_time", []string{"no_issue_time", "not_yet_valid"}, (*tokenNarrator).issueTime, false},
	{"lifetime", []string{"lifetime"}, (*tokenNarrator).lifetime, false},
	{"audience", []string{"audience"}, (*tokenNarrator).audience, false},
}

// afterCredentials and atTheEnd are where the checks of the token, and that of introspection, are among the
// replica's: a request with a token that is no good fares as one without, so what needs none comes first.
const (
	afterCredentials = "credentials"
	introspectionAt  = "introspection"
)

// TokenCheckNames are the names of the checks of [ExplainToken], and CheckNames of [Gateway.Explain], in their
// order.
var TokenCheckNames, CheckNames = func() (ofToken, all []string) {
	for _, c := range tokenChecks {
		ofToken = append(ofToken, c.name)
	}
	at := slices.Index(replica.CheckNames, afterCredentials) + 1
	return ofToken, append(slices.Insert(slices.Clone(replica.CheckNames), at, ofToken...), introspectionAt)
}()

type facts = map[string]any

// narrate tells of a token that was accepted or, with an error, was not. Claims are there in place of compact if
// they are believed.
func narrate(v verifier, compact string, claims json.RawMessage, t *token.Token, err error, acceptance token.Acceptance, now time.Time) []replica.Check {
	n := tokenNarrator{compact: compact, believed: claims != nil, err: err, acceptance: acceptance, at: now.Unix()}
	n.leeway = int64(min(max(acceptance.Leeway, 0), revocation.MaxLeeway) / time.Second)
	n.t = t
	if n.t == nil { // what it says of itself, for those who look for why that is not believed
		if n.believed {
			n.t, _ = token.OfClaims(claims)
		} else {
			n.t, _ = token.Claimed(compact)
		}
	}
	if n.t != nil {
		n.issuer, n.trusted = v.Issuer(n.t.Issuer)
	}
	failed := len(tokenChecks)
	if err != nil {
		failed = n.failed()
	}
	checks := make([]replica.Check, len(tokenChecks))
	for i, c := range tokenChecks {
		checks[i] = replica.Check{Name: c.name, Result: replica.NotReached}
		if i > failed {
			continue
		}
		if n.believed && (c.signed || c.name == "type") {
			checks[i].Result, checks[i].Detail = replica.NotLooked, "The claims are believed: there is no token whose header or signature could be looked at."
			continue
		}
		checks[i].Result = replica.Passed
		checks[i].Detail, checks[i].Facts = c.said(&n)
		if i == failed {
			checks[i].Result = replica.Failed
			checks[i].Facts = withReason(checks[i].Facts, token.Reason(err))
		}
	}
	if len(acceptance.Audiences) == 0 && failed == len(tokenChecks) {
		checks[len(checks)-1].Result = replica.NotLooked
	}
	return checks
}

func withReason(f facts, reason string) facts {
	f = maps.Clone(f)
	if f == nil {
		f = make(facts)
	}
	f["reason"] = reason
	return f
}

// tokenNarrator tells what was found of a token.
type tokenNarrator struct {
	compact    string
	believed   bool
	err        error
	acceptance token.Acceptance
	at, leeway int64

	t       *token.Token // nil: it is malformed
	issuer  token.Issuer
	trusted bool // issuer is that of t
}

// failed is the index of the check that the error is of.
func (n *tokenNarrator) failed() int {
	reason := cmp.Or(token.Reason(n.err), "keys_unavailable")
	name := ""
	if errors.Is(n.err, token.ErrNotYetValid) {
		// Whether nbf or iat is ahead shows if there were another iat.
		c := *n.t
		c.IssuedAt = 1
		name = "issue_time"
		if errors.Is(n.acceptance.Check(&c, n.issuer, time.Unix(n.at, 0)), token.ErrNotYetValid) {
			name = "not_before"
		}
	}
	for i, c := range tokenChecks {
		if slices.Contains(c.reasons, reason) && (name == "" || c.name == name) {
			return i
		}
	}
	panic("gateway: no check for the reason " + reason) // a test goes through all of them
}

func (n *tokenNarrator) form() (string, facts) {
	switch {
	case n.t != nil && n.believed:
		return "The claims are a JSON object with each name once.", nil
	case n.t != nil:
		return fmt.Sprintf("The token is a JWT: alg %q, kid %q, typ %q.", n.t.Alg, n.t.KeyID, n.t.Type),
			facts{"alg": n.t.Alg, "kid": n.t.KeyID, "typ": n.t.Type, "bytes": len(n.compact)}
	}
	f := facts{"error": n.err.Error(), "bytes": len(n.compact)}
	if !n.believed && !token.LooksLikeJWT(n.compact) {
		f["opaque"] = true
		return "It is no JWT; it may be an opaque token, which a gateway cannot judge.", f
	}
	return fmt.Sprintf("It cannot be read: %v.", n.err), f
}

func (n *tokenNarrator) issuerTrusted() (string, facts) {
	f := facts{"iss": n.t.Issuer}
	if !n.trusted {
		return fmt.Sprintf("Nobody who is trusted here has the issuer %q: no key manager that is enabled and can be used, and none that was configured.", n.t.Issuer), f
	}
	if n.issuer.Tenant.Domain != "" {
		f["tenant"] = n.issuer.Tenant.Domain
	}
	return fmt.Sprintf("The issuer %q is trusted.", n.t.Issuer), f
}

func (n *tokenNarrator) algorithm() (string, facts) {
	f := facts{"alg": n.t.Alg, "allowed": n.issuer.Algorithms}
	if errors.Is(n.err, token.ErrAlgorithm) {
		return fmt.Sprintf("The token's alg %q is not one that its issuer may use (%s), or not one that its key %q is for.",
			n.t.Alg, strings.Join(n.issuer.Algorithms, ", "), n.t.KeyID), f
	}
	return fmt.Sprintf("The token's alg %q is one that its issuer may use, and that its key is for.", n.t.Alg), f
}

func (n *tokenNarrator) keys() (string, facts) {
	f := facts{"kid": n.t.KeyID}
	switch reason := token.Reason(n.err); {
	case reason == "unknown_key":
		f["error"] = n.err.Error()
		return fmt.Sprintf("The issuer's key set has no key %q: %v.", n.t.KeyID, n.err), f
	case reason == "keys_unavailable", reason == "" && n.err != nil:
		f["error"] = n.err.Error()
		return fmt.Sprintf("The issuer's keys cannot be had now, so nothing is known of the token: %v.", n.err), f
	}
	return fmt.Sprintf("The issuer has the key %q.", n.t.KeyID), f
}

func (n *tokenNarrator) signature() (string, facts) {
	if errors.Is(n.err, token.ErrSignature) {
		return fmt.Sprintf("The key %q did not make the token's signature: it was altered, or another key with that kid has signed it.", n.t.KeyID), facts{"kid": n.t.KeyID}
	}
	return "The signature is of that key.", nil
}

func (n *tokenNarrator) claimTypes() (string, facts) {
	if errors.Is(n.err, token.ErrClaims) {
		return fmt.Sprintf("A claim is of a type that it must not have: %v.", n.err), facts{"error": n.err.Error()}
	}
	return fmt.Sprintf("The claims are of their types: jti %q, sub %q, client %q.", n.t.ID, n.t.Subject, n.t.ClientID),
		facts{"jti": n.t.ID, "sub": n.t.Subject, "client_id": n.t.ClientID}
}

func (n *tokenNarrator) typ() (string, facts) {
	f := facts{"typ": n.t.Type, "allowed": append([]string{"at+jwt"}, n.issuer.AllowTypes...)}
	if errors.Is(n.err, token.ErrType) {
		return fmt.Sprintf("The token's typ %q is not one of its issuer's access tokens (%s), or it has claims of an ID token.",
			n.t.Type, strings.Join(f["allowed"].([]string), ", ")), f
	}
	return fmt.Sprintf("The token's typ %q is one of its issuer's access tokens.", n.t.Type), f
}

// stamp is a time for people.
func stamp(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }

func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }

func (n *tokenNarrator) expiry() (string, facts) {
	if !n.t.HasExpiry {
		return "The token has no exp.", nil
	}
	f := facts{"exp": n.t.Expiry, "leeway_seconds": n.leeway}
	if errors.Is(n.err, token.ErrExpired) {
		f["expired_seconds"] = n.at - n.t.Expiry
		return fmt.Sprintf("The token has expired at %s, %s ago; the leeway is %s.", stamp(n.t.Expiry), seconds(n.at-n.t.Expiry), seconds(n.leeway)), f
	}
	return fmt.Sprintf("The token expires at %s.", stamp(n.t.Expiry)), f
}

func (n *tokenNarrator) notBefore() (string, facts) {
	if n.t.NotBefore == 0 {
		return "The token has no nbf.", nil
	}
	f := facts{"nbf": n.t.NotBefore, "leeway_seconds": n.leeway}
	return fmt.Sprintf("The token's nbf is %s, and it is %s here; the leeway is %s.", stamp(n.t.NotBefore), stamp(n.at), seconds(n.leeway)), f
}

func (n *tokenNarrator) issueTime() (string, facts) {
	if n.t.IssuedAt == 0 {
		return "The token has no iat.", nil
	}
	f := facts{"iat": n.t.IssuedAt, "leeway_seconds": n.leeway}
	return fmt.Sprintf("The token was issued at %s, and it is %s here; the leeway is %s.", stamp(n.t.IssuedAt), stamp(n.at), seconds(n.leeway)), f
}

func (n *tokenNarrator) lifetime() (string, facts) {
	lives := n.t.Expiry - n.t.IssuedAt
	f := facts{"lifetime_seconds": lives}
	if n.issuer.MaxLifetime == 0 {
		return fmt.Sprintf("The token lives for %s, and its issuer has no limit.", seconds(lives)), f
	}
	f["max_seconds"] = int64(n.issuer.MaxLifetime / time.Second)
	return fmt.Sprintf("The token lives for %s, and those of its issuer may live for %s.", seconds(lives), n.issuer.MaxLifetime), f
}

func (n *tokenNarrator) audience() (string, facts) {
	if len(n.acceptance.Audiences) == 0 {
		return "The audience is not looked at here.", facts{"has": list(n.t.Audience)}
	}
	return fmt.Sprintf("The token is for %q, and must be for one of %q.", n.t.Audience, n.acceptance.Audiences),
		facts{"has": list(n.t.Audience), "wanted": n.acceptance.Audiences}
}

// list is never null in JSON.
func list(texts []string) []string { return append([]string{}, texts...) }

// explaining is a decision that is explained. Nil is one that is not.
type explaining struct {
	claims   json.RawMessage // believed in place of a token; nil: there are none
	ofToken  []replica.Check // nil: no token was looked at
	answer   *replica.Explanation
	wouldAsk bool // introspection
}

// believes reports whether claims take the place of a token.
func (x *explaining) believes() bool { return x != nil && x.claims != nil }

// saw is told what became of the token.
func (x *explaining) saw(v verifier, compact string, t *token.Token, err error, acceptance token.Acceptance, now time.Time) {
	if x != nil {
		x.ofToken = narrate(v, compact, x.claims, t, err, acceptance, now)
	}
}

func (g *Gateway) authorize(t *token.Token, req replica.Request, x *explaining) replica.Authorization {
	if x == nil {
		return g.replica.Authorize(t, req)
	}
	e := g.replica.Explain(t, req)
	x.answer = &e
	return e.Authorization
}

// introspect asks about a token that is let through otherwise; who explains asks nobody.
func (g *Gateway) introspect(ctx context.Context, compact string, t *token.Token, x *explaining) (reason string) {
	switch {
	case x == nil:
		return g.introspection.ask(ctx, compact, t)
	case !g.introspection.canAsk(t):
		return reasonNoAnswer
	}
	x.wouldAsk = true
	return ""
}

// Explain is [Gateway.Decide] with its reasons: for operators, not for those who call APIs. A request without a
// Method asks about the API at Target as a whole. No issuer is asked about the token: where one would be, the
// explanation supposes that it says "active". Keys that are not here may be fetched, as for a request.
func (g *Gateway) Explain(ctx context.Context, r Request) replica.Explanation {
	return g.explain(ctx, r, &explaining{})
}

// ExplainClaims is [Gateway.Explain] of a token that is not at hand, whose claims, a JSON object, are believed.
// r.Authorization is not looked at.
func (g *Gateway) ExplainClaims(ctx context.Context, claims json.RawMessage, r Request) replica.Explanation {
	if claims == nil {
		claims = json.RawMessage{}
	}
	return g.explain(ctx, r, &explaining{claims: claims})
}

func (g *Gateway) explain(ctx context.Context, r Request, x *explaining) replica.Explanation {
	d := g.decide(ctx, r, x)
	e := replica.Explanation{Authorization: d.Authorization, HTTPStatus: d.Status, Next: Next(d.Reason)}
	if d.Allowed {
		e.HTTPStatus = d.Code.HTTPStatus()
	}
	if x.answer == nil { // the path alone was looked at
		for _, name := range CheckNames {
			e.Checks = append(e.Checks, replica.Check{Name: name, Result: replica.NotReached})
		}
		e.Checks[0] = replica.Check{
			Name: CheckNames[0], Result: replica.Failed, Facts: facts{"reason": d.Reason, "method": r.Method},
			Detail: "The request is for a proxy (CONNECT), or its target can be read in more than one way, or is no path.",
		}
		return e
	}
	e.Checks = x.answer.Checks
	at := slices.IndexFunc(e.Checks, func(c replica.Check) bool { return c.Name == afterCredentials })
	e.Checks = slices.Insert(e.Checks, at+1, x.placed(&e.Checks[at], d)...)
	return withIntrospection(e, x)
}

// placed are the checks of the token after that of credentials, which it corrects: to the replica, a token that
// is no good is none.
func (x *explaining) placed(credentials *replica.Check, d Decision) []replica.Check {
	checks := x.ofToken
	result, detail := replica.NotReached, ""
	switch {
	case credentials.Result == replica.Passed:
		return checks
	case credentials.Result == replica.NotLooked:
		result, detail = replica.NotLooked, credentials.Detail
	case credentials.Result == replica.Failed && checks != nil:
		credentials.Result, credentials.Detail, credentials.Facts = replica.Passed, "There is a token.", nil
		for i := range checks {
			if checks[i].Result == replica.Failed {
				checks[i].Facts["reason"] = d.Reason
			}
		}
		return checks
	case credentials.Result == replica.Failed:
		credentials.Facts = facts{"reason": d.Reason}
		credentials.Detail = "The request has no header field Authorization with a Bearer token, and one is needed here."
		if d.Reason == reasonSeveral {
			credentials.Detail = "The request has several header fields Authorization, and whoever is behind may read another one."
		}
	}
	checks = make([]replica.Check, len(tokenChecks))
	for i, c := range tokenChecks {
		checks[i] = replica.Check{Name: c.name, Result: result, Detail: detail}
	}
	return checks
}

// withIntrospection adds the last check, of introspection.
func withIntrospection(e replica.Explanation, x *explaining) replica.Explanation {
	c := replica.Check{Name: introspectionAt, Result: replica.NotLooked, Detail: "Nobody needs to be asked about the token."}
	switch {
	case x.wouldAsk:
		c.Detail = "What is known is too old, so the token's issuer would be asked; that was not done, and this explanation supposes that it says \"active\"."
	case e.Authorization.Reason == reasonNoAnswer:
		c.Result, c.Facts = replica.Failed, facts{"reason": reasonNoAnswer}
		c.Detail = "What is known is too old, and nobody can be asked about tokens of this issuer."
	case !e.Authorization.Authorized:
		c.Result, c.Detail = replica.NotReached, ""
	}
	e.Checks = append(e.Checks, c)
	return e
}

// next are what this package and package token refuse for.
var next = map[string]string{
	"malformed":        "Send the access token as the issuer gave it, whole, as a JWT; an opaque token cannot be judged by a gateway.",
	"untrusted_issuer": "Compare the token's iss with the key managers of the tenant, letter by letter; add or enable the one that is missing.",
	"algorithm":        "Have the issuer sign with an algorithm that its key manager allows, or allow it there.",
	"unknown_key":      "See whether the issuer's key set (jwks_uri) has the token's kid: a key that was removed ends its tokens; get a new token.",
	"signature":        "Get a new token: this one was altered on the way, or is from another installation with the same issuer and kid.",
	"claims":           "Correct what the issuer puts into its tokens: the check names the claim.",
	"keys_unavailable": "See whether the gateway can fetch the issuer's key set (jwks_uri); its log tells why it cannot. The token may be good: do not throw it away.",
	"type":             "Send an access token, no ID token; or allow the typ that the issuer writes in its key manager (allow_typ).",
	"no_expiry":        "Have the issuer put exp into its access tokens.",
	"expired":          "Get a new token. If it should not have expired yet, compare the clocks of issuer and gateway.",
	"not_yet_valid":    "Compare the clocks of issuer and gateway: they differ by more than the leeway.",
	"no_issue_time":    "Have the issuer put iat into its access tokens.",
	"lifetime":         "Have the issuer's tokens end sooner, or raise max_token_lifetime of its key manager.",
	"audience":         "Get a token for this gateway's audience, or add the token's to the gateway's audiences.",

	reasonSeveral:  "Send one header field Authorization.",
	reasonInactive: "Get a new token: its issuer says that it is not active.",
	reasonNoAnswer: "See why what the gateway knows is old (/status), and whether introspection is configured for the issuer and answers.",
	reasonOverload: "See why what the gateway knows is old (/status): every request asks the issuer meanwhile, which is more than it is set to.",
}

// Next says what to do about a refusal for a reason, one of [Reasons]: a sentence for people, empty for others.
func Next(reason string) string { return cmp.Or(next[reason], replica.Next(reason)) }
