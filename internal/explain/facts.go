package explain

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/ledger"
)

// checkRevoked is the name of the check that is about revocations.
const checkRevoked = "revocation"

// explain says what a gateway makes of t, which is nil for a request without a token.
func (i *inquiry) explain(t *token.Token, domain string) replica.Explanation {
	var by replica.Explainer
	if served := i.gateway.Report.Tenants; i.hasGateway && len(served) == 1 {
		by.Tenant = served[0]
	}
	if i.q.API == nil {
		return i.explainToken(by, t, domain)
	}
	req := replica.Request{Method: i.q.API.Method, Path: i.q.API.Path, Tenant: domain}
	if req.Method == "" {
		by.AnyOperation, req.Path = true, i.context()
	}
	if clean, ok := replica.CleanPath(req.Path); ok {
		req.Path = clean
	}
	ex := by.Explain(i.state, t, req, i.at.Unix())
	if a := ex.Authorization.API; a != nil && !i.by.sees(a.Tenant.Domain) {
		// As where the token's tenant has a gateway of its own, there is no such API.
		by.Tenant = domain
		ex = by.Explain(i.state, t, req, i.at.Unix())
	}
	return ex
}

// ofTokens are the checks that are made whatever a token is presented for.
var ofTokens = []string{"issuer", checkRevoked, "freshness", "claims", "token_subscriptions"}

// explainToken says what a gateway makes of a token whatever it is presented for: what one that goes by claims
// alone does first. A check that fails later is not among those.
func (i *inquiry) explainToken(by replica.Explainer, t *token.Token, domain string) replica.Explanation {
	by.Claims, by.AnyOperation = replica.ClaimsOnly, true
	ex := by.Explain(i.state, t, replica.Request{Path: "/", Tenant: domain}, i.at.Unix())
	ex.Checks = slices.DeleteFunc(ex.Checks, func(c replica.Check) bool {
		return !slices.Contains(ofTokens, c.Name) || c.Result == replica.NotLooked
	})
	if firstFailed(ex.Checks) == nil {
		ex.Authorization.Authorized, ex.Authorization.Code, ex.Next = true, 0, ""
	}
	return ex
}

// context is that of the API that is asked about, as the catalog has it: with the version, unless the caller
// sees one without.
func (i *inquiry) context() (found string) {
	i.state.View(func(v *replica.View) {
		for _, found = range i.q.API.contexts() {
			if slices.ContainsFunc(v.APIsByContext(found, i.q.API.Version), func(a *catalog.API) bool { return i.by.sees(a.Tenant.Domain) }) {
				return
			}
		}
	})
	return found
}

// revoked finds out what ends t, whether or not it is accepted besides.
func (i *inquiry) revoked(ctx context.Context, t *token.Token, domain string) error {
	var found []Revocation
	for _, target := range i.targets(t, domain) {
		f := ledger.ListFilter{Kind: target.Kind, ID: target.ID}
		if target.Iss != "" {
			f.Iss = []string{target.Iss}
		}
		// A jti can look like a digest, so there may be one of each.
		list, err := i.deps.Ledger.List(ctx, f, "", 2)
		if err != nil {
			return err
		}
		for _, l := range list {
			if l.Target != target || l.Target.Kind.HasTime() && l.NotAfter < t.IssuedAt {
				continue
			}
			r, err := i.describe(ctx, l, t.IssuedAt)
			if err != nil {
				return err
			}
			found = append(found, r)
		}
	}
	return i.found(ctx, found)
}

// found answers that the revocations of list, in the order in which a gateway looks for them, end the token.
func (i *inquiry) found(ctx context.Context, list []Revocation) error {
	if len(list) == 0 {
		return nil
	}
	n := 0
	if !i.q.At.IsZero() {
		n = slices.IndexFunc(list, func(r Revocation) bool { return !r.RevokedAt.IsZero() && !r.RevokedAt.After(i.at) })
		if n < 0 { // of one whose time is not known it cannot be said that it was later
			n = max(0, slices.IndexFunc(list, func(r Revocation) bool { return r.RevokedAt.IsZero() }))
		}
	}
	r := list[n]
	i.others = slices.Delete(list, n, n+1)
	i.answer.Revocation = &r
	return i.audited(ctx, &r)
}

// targets are those whose revocation ends t, in the order in which a gateway looks for them.
func (i *inquiry) targets(t *token.Token, domain string) []revocation.Target {
	c := replica.TokenOf(t, domain)
	of := func(kind revocation.Kind, id string) revocation.Target {
		return revocation.Target{Kind: kind, Iss: c.Iss, ID: id}
	}
	all := []revocation.Target{of(revocation.KindKey, c.KID), of(revocation.KindToken, c.JTI)}
	if t.ID == "" && t.SigningInput != "" {
		all = append(all, revocation.DigestTarget(c.Iss, t.SigningInput))
	}
	all = append(all, of(revocation.KindSession, c.SID), of(revocation.KindClient, c.ClientID))
	// The consumer key may be in a claim of the key manager's own, which the checks know.
	key := i.explainToken(replica.Explainer{}, t, domain).Authorization.Info.ConsumerKey
	all = append(all, of(revocation.KindSubject, c.Sub), revocation.Target{Kind: revocation.KindTenant, ID: domain})
	if key != c.ClientID {
		all = append(all, of(revocation.KindClient, key))
	}
	return slices.DeleteFunc(all, func(t revocation.Target) bool { return t.ID == "" })
}

// describe says what is known of l, and of the act of it that ended tokens issued at iat. What is stored has the time
// and the reason of the first act, the end and the seq of the last.
func (i *inquiry) describe(ctx context.Context, l ledger.Listed, iat int64) (Revocation, error) {
	r := Revocation{
		ID: l.ID, Kind: l.Target.Kind, Identifier: l.Target.ID, Iss: l.Target.Iss, Tenant: l.Tenant.Domain,
		RevokedAt: l.At, NotAfter: l.NotAfter, Exp: l.Exp, Reason: l.Reason,
	}
	if !r.Kind.HasTime() {
		iat = 0
	}
	act, ok, err := i.deps.Ledger.ActOn(ctx, l.ID, iat)
	switch {
	case err != nil:
		return Revocation{}, err
	case ok:
		r.act, r.Seq = &act, act.Seq
		if !act.First {
			r.RevokedAt, r.Reason = act.At, ""
		}
	case iat > l.At.Unix():
		r.RevokedAt, r.Reason = time.Time{}, ""
	}
	r.RevokedAt = r.RevokedAt.UTC().Truncate(time.Millisecond)
	return r, nil
}

const (
	// The audit has an index by time alone.
	auditNear = time.Minute
	auditTime = 2 * time.Second
	// auditPage is more than a revocation is renewed in that time.
	auditPage = 100
)

// audited completes r with what the audit has of its act: by whom it was, and why if it was not the first. It is
// empty if the audit does not have it, or cannot be looked through quickly.
func (i *inquiry) audited(ctx context.Context, r *Revocation) error {
	if r.RevokedAt.IsZero() {
		return nil
	}
	f := ledger.AuditFilter{EntityID: r.ID, From: r.RevokedAt, To: r.RevokedAt.Add(auditNear)}
	if r.act != nil { // the record was written just before the event
		f.From, f.To = r.act.At.Add(-auditNear), r.act.At.Add(time.Microsecond)
	}
	bounded, cancel := context.WithTimeout(ctx, auditTime)
	defer cancel()
	records, err := i.deps.Ledger.AuditPage(bounded, f, 0, auditPage)
	switch {
	case err != nil && bounded.Err() != nil && ctx.Err() == nil:
		return nil
	case err != nil || len(records) == 0:
		return err
	}
	record := records[len(records)-1]
	if r.act != nil {
		record = records[0]
		if !r.act.First {
			r.Reason = record.Reason
		}
	}
	r.Actor = record.Actor.Name
	return nil
}

// opaque answers about a token that only its issuer can read.
func (i *inquiry) opaque(ctx context.Context, tok string) error {
	target := revocation.DigestTarget("", tok) // of any issuer
	f := ledger.ListFilter{Kind: revocation.KindToken, ID: target.ID}
	if i.by.Tenant != "" {
		f.Tenants = append([]string{i.by.Tenant}, i.by.Others...)
	}
	list, err := i.deps.Ledger.List(ctx, f, "", 10)
	if err != nil {
		return err
	}
	form := replica.Check{
		Name: "form", Result: replica.NotLooked,
		Detail: "The token is no JWT. Only its issuer knows whose it is, and until when.",
	}
	revoked := replica.Check{
		Name: checkRevoked, Result: replica.Passed, Detail: "No revocation of a token with this SHA-256 is known.",
		Facts: map[string]any{"sha256": target.ID},
	}
	var found []Revocation
	for _, l := range list {
		if !l.Target.Digest {
			continue
		}
		r, err := i.describe(ctx, l, 0)
		if err != nil {
			return err
		}
		found = append(found, r)
	}
	if err := i.found(ctx, found); err != nil {
		return err
	}
	i.others = nil // they are of other issuers, one of which is the token's
	i.answer.Verdict = CannotTell
	if i.answer.Revocation != nil {
		revoked.Result, revoked.Detail = replica.Failed, "A token with this SHA-256 was revoked."
		i.refuse(replica.CodeInvalidCredentials)
	}
	i.answer.Checks = append(i.answer.Checks, form, revoked)
	if i.answer.Revocation == nil {
		i.advise("Ask the issuer of the token, by introspection (RFC 7662).")
	}
	return nil
}

// words say in half a sentence with what the token was revoked, when, by whom, why and where in the log.
func (r *Revocation) words() string {
	var b strings.Builder
	switch r.Kind {
	case revocation.KindToken:
		b.WriteString("this one token was revoked")
	case revocation.KindTenant:
		b.WriteString("it was revoked with all of its tenant")
	case revocation.KindKey:
		b.WriteString("it was revoked with its signing key")
	default:
		fmt.Fprintf(&b, "it was revoked with its %s", r.Kind)
	}
	if r.RevokedAt.IsZero() {
		b.WriteString("; that was renewed since it was first done, and the log does not have any more which time ended this token")
		return b.String()
	}
	fmt.Fprintf(&b, " at %s", when(r.RevokedAt))
	if r.Actor != "" {
		fmt.Fprintf(&b, " by %s", r.Actor)
	}
	if r.Reason != "" {
		fmt.Fprintf(&b, " (%s)", r.Reason)
	}
	if r.Seq != 0 {
		fmt.Fprintf(&b, ", seq %d", r.Seq)
	}
	return b.String()
}

// remedy is what the holder of such a token can do.
func (r *Revocation) remedy() string {
	until := when(time.Unix(r.NotAfter, 0))
	switch r.Kind {
	case revocation.KindToken:
		return "Get a new token: this one is dead for good."
	case revocation.KindSession:
		return "Have the user log in again: all tokens of the session are dead."
	case revocation.KindKey:
		return "Get a new token under another key: this one is never believed again."
	case revocation.KindClient:
		return "Get a new token: those of the client that were issued up to " + until + " are dead."
	case revocation.KindSubject:
		return "Get a new token: those of the subject that were issued up to " + until + " are dead."
	}
	return "Get a new token: those of the tenant that were issued up to " + until + " are dead."
}

// tellRevocation completes the check with the facts, and says what to do.
func (i *inquiry) tellRevocation() {
	r := i.answer.Revocation
	if r == nil || i.answer.Verdict != Refused {
		return
	}
	// It says more than what the checks know to do.
	if i.besides == "" {
		i.next = []string{r.remedy()}
	}
	failed := firstFailed(i.answer.Checks)
	if failed == nil || failed.Name != checkRevoked || len(i.others) == 0 {
		return
	}
	failed.Facts = maps.Clone(failed.Facts)
	if failed.Facts == nil {
		failed.Facts = make(map[string]any)
	}
	failed.Facts["others"] = i.others
	for n := range i.others {
		failed.Detail = strings.TrimSuffix(failed.Detail, ".") + "; besides, " + i.others[n].words() + "."
	}
}
