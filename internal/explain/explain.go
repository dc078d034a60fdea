// Package explain says why a token is refused, for those who have to help: the checks in order, the facts
// behind the first that fails, whether a gateway knew, and what to do.
//
// # Invariants
//
// Neither an answer nor an error repeats a token or a part of one.
//
// A caller that is bound to a tenant learns nothing of others: a token of an issuer that it does not see is
// not verified, and is answered as one of an issuer that nobody has heard of. So are claims. A gateway that
// does not serve its tenant is not there.
//
// # Decisions
//
// The checks are those that gateways make, by the same code ([gateway.ExplainToken], [replica.Explainer]).
//
// Of a token that is not genuine only its form and its issuer are told: what its claims name would be facts
// for whoever made it up.
//
// The times of a token are looked at as of the time that is asked about. What is revoked, and the catalog, are
// as they are now, since their past is not kept; the answer says so.
package explain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Caller is who asks: one that is bound to a tenant is told of that tenant's tokens only.
type Caller struct {
	// Tenant is a domain, empty for one who sees all.
	Tenant string
	// Others are domains that a bound caller sees besides.
	Others []string
}

// Verdicts of an [Answer].
const (
	Accepted   = "accepted"
	Refused    = "refused"
	CannotTell = "cannot_tell"
)

// Answer is the explanation.
type Answer struct {
	// Verdict is [Accepted], [Refused] or [CannotTell].
	Verdict string `json:"verdict"`
	// Summary is the answer in a sentence or two.
	Summary string `json:"summary"`
	// Code, HTTPStatus and Message are what WSO2's gateways answer with; zero if Verdict is not Refused.
	Code       int    `json:"code,omitempty"`
	HTTPStatus int    `json:"http_status,omitempty"`
	Message    string `json:"message,omitempty"`
	// Checks are in the order in which gateways make them.
	Checks []replica.Check `json:"checks"`
	// Revocation is what ended the token, nil if nothing did. It is there for every genuine token that is
	// revoked, whichever check failed first. Of several it is the one that a gateway finds first among those
	// that there were at the time asked about.
	Revocation *Revocation `json:"revocation,omitempty"`
	// Gateway says what the gateway knew, nil if none was asked about.
	Gateway *GatewayKnew `json:"gateway,omitempty"`
	// Next is what to do, in a sentence or two; empty if there is nothing to be done.
	Next string `json:"next,omitempty"`
	// Position is the state that was looked at.
	Position revocation.Position `json:"position"`
}

// Revocation is what is known of one. A renewed one is told by the act that ended the token, which is not always
// the first or the last.
type Revocation struct {
	ID         string          `json:"id"`
	Kind       revocation.Kind `json:"kind"`
	Identifier string          `json:"identifier"`
	Iss        string          `json:"iss,omitempty"`
	Tenant     string          `json:"tenant"`
	// RevokedAt is when the act was, by the database's clock. Zero: the revocation was renewed since it was made,
	// and the log does not have any more which act it was; then its actor and seq are not known either.
	RevokedAt time.Time `json:"revoked_at,omitzero"`
	// NotAfter and Exp are as in [revocation.Revocation], Unix seconds, after the last act.
	NotAfter int64          `json:"not_after,omitempty"`
	Exp      int64          `json:"exp"`
	Actor    string         `json:"actor,omitempty"` // from the audit; empty if that is gone
	Reason   string         `json:"reason,omitempty"`
	Seq      revocation.Seq `json:"seq,omitempty"` // 0: the log has removed the event

	act *ledger.Act // nil if the log does not have it
}

// Ledger reads revocations and the audit. [ledger.Ledger] is one.
type Ledger interface {
	List(ctx context.Context, f ledger.ListFilter, after string, limit int) ([]ledger.Listed, error)
	ActOn(ctx context.Context, id string, iat int64) (ledger.Act, bool, error)
	AuditPage(ctx context.Context, f ledger.AuditFilter, before int64, limit int) ([]ledger.AuditRecord, error)
}

// State is the service's replica. [follow.Follower] is one.
type State interface {
	// Fresh waits until the replica has everything up to a head of the log that was read
	// at most maxAge before the call, or after it with 0.
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.State
}

// Verifier tells genuine tokens from others. [token.Verifier] is one.
type Verifier interface {
	Verify(ctx context.Context, compact string) (*token.Token, error)
	Issuer(iss string) (token.Issuer, bool)
}

// Fleet is [fleet.Fleet].
type Fleet interface {
	Refresh(ctx context.Context) error
	Wait(ctx context.Context, b fleet.Barrier) (fleet.BarrierResult, error)
	Gateway(id string) (fleet.Gateway, bool)
	When(id string, at time.Time) (before, after fleet.Sighting, okBefore, okAfter bool)
}

// Deps are what an explainer asks. Fleet may be nil: then nothing is known of gateways.
type Deps struct {
	Ledger   Ledger
	State    State
	Verifier Verifier
	Fleet    Fleet
	// Leeway is for clocks, as gateways have it by default: 30 s.
	Leeway time.Duration
}

// Explainer explains. Its methods may be called from any goroutine.
type Explainer struct {
	deps     Deps
	stranger *token.Verifier // trusts nobody
	now      func() time.Time
}

// New returns an explainer. Its error names what is missing.
func New(deps Deps) (*Explainer, error) {
	var errs []error
	if deps.Ledger == nil {
		errs = append(errs, errors.New("a ledger is missing"))
	}
	if deps.State == nil {
		errs = append(errs, errors.New("a state is missing"))
	}
	if deps.Verifier == nil {
		errs = append(errs, errors.New("a verifier is missing"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	stranger, err := token.NewVerifier()
	if err != nil {
		return nil, fmt.Errorf("make a verifier that trusts nobody: %w", err)
	}
	return &Explainer{deps: deps, stranger: stranger, now: time.Now}, nil
}

// Explain answers q. Its error is a [catalog.Invalid] with pointers into the question, or
// [ledger.ErrUnavailable] where the newest state cannot be had, or one of the database, or ctx's.
func (e *Explainer) Explain(ctx context.Context, by Caller, q Question) (Answer, error) {
	now := e.now()
	if err := q.validate(now); err != nil {
		return Answer{}, err
	}
	if _, err := e.deps.State.Fresh(ctx, 0); err != nil {
		return Answer{}, fmt.Errorf("%w: wait for the newest state: %w", ledger.ErrUnavailable, err)
	}
	state := e.deps.State.Replica()
	i := &inquiry{
		Explainer: e, by: by, q: q, state: state, now: now, at: q.At,
		answer: Answer{Position: state.At(), Checks: []replica.Check{}},
	}
	if i.at.IsZero() {
		i.at = now
	}
	if err := i.findGateway(ctx); err != nil {
		return Answer{}, err
	}
	var err error
	if compact := strings.Trim(q.Token, " \t\r\n"); q.Token == "" {
		err = i.claims(ctx)
	} else if isJWT(compact) {
		err = i.jwt(ctx, compact)
	} else {
		err = i.opaque(ctx, compact)
	}
	if err != nil {
		return Answer{}, err
	}
	i.tellRevocation()
	if err := i.gatewayKnew(ctx); err != nil {
		return Answer{}, err
	}
	i.conclude()
	return i.answer, nil
}

// jweDots are in an encrypted token, which is opaque to all but its issuer.
const jweDots = 4

func isJWT(s string) bool { return token.LooksLikeJWT(s) && strings.Count(s, ".") != jweDots }

// inquiry is a question that is being answered.
type inquiry struct {
	*Explainer
	by      Caller
	q       Question
	state   *replica.State
	now, at time.Time
	answer  Answer

	gateway    fleet.Gateway
	hasGateway bool
	asked      time.Time // reports that are later say whether the gateway knew

	besides string       // what is wrong with the token, where that is not why a request is refused
	others  []Revocation // further ones
	next    []string
}

// keeper keeps what a verifier has found to be genuine, also where it is not accepted.
type keeper struct {
	Verifier
	genuine *token.Token
}

func (k *keeper) Verify(ctx context.Context, compact string) (t *token.Token, err error) {
	k.genuine, err = k.Verifier.Verify(ctx, compact)
	return k.genuine, err
}

// jwt answers about a JWT.
func (i *inquiry) jwt(ctx context.Context, compact string) error {
	iss, _ := token.ClaimedIssuer(compact)
	v := i.verifierOf(iss)
	kept := &keeper{Verifier: v}
	t, checks := gateway.ExplainToken(ctx, kept, compact, i.acceptance(), i.at)
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return i.judge(ctx, v, iss, t, kept.genuine, checks)
}

// claims answers about claims that are believed.
func (i *inquiry) claims(ctx context.Context) error {
	members, _ := rawClaims(i.q.Claims)
	var iss string
	if err := json.Unmarshal(members["iss"], &iss); err != nil {
		return fmt.Errorf("read claims: %w", err) // they were validated
	}
	v := i.verifierOf(iss)
	t, checks := gateway.ExplainClaims(v, i.q.Claims, i.acceptance(), i.at)
	genuine, err := token.OfClaims(i.q.Claims)
	if _, trusted := v.Issuer(iss); !trusted || err != nil {
		genuine = nil // what is wrong is among checks
	}
	return i.judge(ctx, v, iss, t, genuine, checks)
}

// verifierOf is what tells whether a token that claims an issuer is genuine: for one that the caller does not see, a
// verifier that trusts nobody.
func (i *inquiry) verifierOf(iss string) Verifier {
	if k := i.keyManager(iss); i.by.Tenant != "" && (k == nil || !i.by.sees(k.Tenant.Domain)) {
		return i.stranger
	}
	return i.deps.Verifier
}

func (i *inquiry) acceptance() token.Acceptance { return token.Acceptance{Leeway: i.deps.Leeway} }

// judge answers about a token that passed checks, unless t is nil. Genuine is the token also where it is not
// accepted, nil where nobody knows whose it is.
func (i *inquiry) judge(ctx context.Context, v Verifier, iss string, t, genuine *token.Token, checks []replica.Check) error {
	if genuine == nil {
		i.notAccepted(checks, i.by.Tenant == "", "")
		return nil
	}
	domain := tenantOf(i.keyManager(iss), v, iss)
	if err := i.revoked(ctx, genuine, domain); err != nil {
		return err
	}
	if t == nil {
		i.notAccepted(checks, true, domain)
		return nil
	}
	ex := i.explain(t, domain)
	i.answer.Checks = placed(ex.Checks, checks)
	if ex.Authorization.Authorized {
		i.accept()
		return nil
	}
	i.refuse(ex.Authorization.Code)
	i.advise(ex.Next)
	return nil
}

// tenantOf is the domain of the tenant that an issuer belongs to.
func tenantOf(manager *catalog.KeyManager, v Verifier, iss string) string {
	if manager != nil {
		return manager.Tenant.Domain
	}
	issuer, _ := v.Issuer(iss)
	return issuer.Tenant.Domain
}

func (i *inquiry) keyManager(iss string) (found *catalog.KeyManager) {
	i.state.View(func(v *replica.View) { found = v.KeyManager(iss) })
	return found
}

func (c Caller) sees(domain string) bool {
	return c.Tenant == "" || c.Tenant == domain || slices.Contains(c.Others, domain)
}

// checkCredentials is the name of the check after which a gateway looks at the token.
const checkCredentials = "credentials"

// placed are the checks of a request with those of its token among them.
func placed(ofRequest, ofToken []replica.Check) []replica.Check {
	at := slices.IndexFunc(ofRequest, func(c replica.Check) bool { return c.Name == checkCredentials })
	return slices.Insert(ofRequest, at+1, ofToken...)
}

// notAccepted answers about a token that failed one of checks. A request with it fares as one without: what may be
// had without one, or is not there, is so with this one too. That is said only if the request may be looked at.
func (i *inquiry) notAccepted(checks []replica.Check, look bool, domain string) {
	failed := firstFailed(checks)
	i.answer.Checks = checks
	i.refuse(replica.CodeInvalidCredentials)
	if look && i.q.API != nil {
		ex := i.explain(nil, domain)
		n := slices.IndexFunc(ex.Checks, func(c replica.Check) bool { return c.Name == checkCredentials })
		credentials := &ex.Checks[n]
		if a := ex.Authorization; a.Authorized || a.Code != replica.CodeMissingCredentials {
			i.besides = failed.Detail
			unlooked := slices.Clone(checks)
			for n, c := range checks {
				unlooked[n] = replica.Check{Name: c.Name, Result: credentials.Result, Detail: credentials.Detail}
			}
			i.answer.Checks = placed(ex.Checks, unlooked)
			if a.Authorized {
				i.accept()
				return
			}
			i.refuse(a.Code)
			i.advise(ex.Next)
			return
		}
		*credentials = replica.Check{Name: checkCredentials, Result: replica.Passed, Detail: "There is a token."}
		i.answer.Checks = placed(ex.Checks, checks)
	}
	reason, _ := failed.Facts["reason"].(string)
	if reason == token.Reason(token.ErrKeysUnavailable) {
		i.answer.Verdict, i.answer.Code, i.answer.HTTPStatus, i.answer.Message = CannotTell, 0, 0, ""
	}
	i.advise(gateway.Next(reason))
}

func (i *inquiry) accept() {
	i.answer.Verdict = Accepted
	i.answer.Code, i.answer.HTTPStatus, i.answer.Message = 0, 0, ""
}

func (i *inquiry) refuse(code replica.Code) {
	i.answer.Verdict = Refused
	i.answer.Code, i.answer.HTTPStatus, i.answer.Message = int(code), code.HTTPStatus(), code.Message()
}

// advise adds to what is to be done.
func (i *inquiry) advise(sentence string) {
	if sentence != "" {
		i.next = append(i.next, sentence)
	}
}

// conclude says it all in a sentence or two.
func (i *inquiry) conclude() {
	a := &i.answer
	var said []string
	failed := firstFailed(a.Checks)
	switch a.Verdict {
	case Accepted:
		what := "The token is good, and is not revoked"
		if i.q.API != nil {
			what = "A gateway with this state lets the request through"
		}
		said = append(said, what+".")
	case Refused:
		if failed != nil {
			said = append(said, "Refused by the check "+failed.Name+": "+failed.Detail)
		} else {
			said = append(said, "Refused: "+a.Message+".")
		}
	default:
		if failed != nil {
			said = append(said, "This cannot be told: "+failed.Detail)
		} else {
			said = append(said, "This cannot be told: the token is opaque, only its issuer knows whether it is active.")
		}
	}
	if i.besides != "" {
		said = append(said, "With another request the token would be refused: "+i.besides)
	}
	if r := a.Revocation; r != nil {
		words := r.words()
		if failed != nil && failed.Name == checkRevoked {
			words = strings.ToUpper(words[:1]) + words[1:]
		} else {
			words = "Besides, " + words
		}
		said = append(said, words+".")
		if !i.q.At.IsZero() && r.RevokedAt.After(i.at) {
			said = append(said, "It was revoked only after the time that is asked about, so that is not why it was refused then.")
		}
	}
	if !i.q.At.IsZero() {
		said = append(said, "The times of the token are looked at as of "+when(i.at)+"; what is revoked, and the catalog, are as they are now.")
	}
	a.Summary = strings.Join(said, " ")
	a.Next = strings.Join(i.next, " ")
}

func firstFailed(checks []replica.Check) *replica.Check {
	for n := range checks {
		if checks[n].Result == replica.Failed {
			return &checks[n]
		}
	}
	return nil
}

// when is a time as people read it.
func when(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

// rawClaims are the members of claims by their exact names.
func rawClaims(claims json.RawMessage) (members map[string]json.RawMessage, ok bool) {
	err := json.Unmarshal(claims, &members)
	return members, err == nil && members != nil
}
