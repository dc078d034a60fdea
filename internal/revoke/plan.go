package revoke

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/ledger"
)

// plan is an order that can be carried out.
type plan struct {
	target revocation.Target
	tenant revocation.Tenant
	exp    int64
	// guessed: exp is only when the last token has ended at the latest, so one that is stored stays.
	guessed bool
	// lifetime is how long tokens of the issuer live at the most, in seconds.
	lifetime int32
	// remembered: it may be known when the token of this jti ends.
	remembered bool
	expired    bool
	// external: the issuer is not our own.
	external bool
	// clientID is the consumer key that a token was issued to, if known. signature is as in
	// [revocation.Revocation].
	clientID, signature string
}

// planner knows what a caller sees.
type planner struct {
	*Revoker
	now     time.Time
	issuers map[string]*catalog.KeyManager // by iss
	tenants map[string]revocation.Tenant   // by domain
	own     *catalog.KeyManager            // of the caller's tenant; nil if it has none
	bound   bool                           // to a tenant
	keys    int                            // orders about signing keys so far
}

// maxFound is how many wrong orders are told.
const maxFound = 10

// plan returns the plans of orders, in their order.
func (r *Revoker) plan(ctx context.Context, by Caller, orders []Order) (*planner, []plan, error) {
	if len(orders) < 1 || len(orders) > ledger.MaxBulk {
		return nil, nil, catalog.Invalid{{Pointer: "#", Detail: fmt.Sprintf("must be 1 to %d", ledger.MaxBulk)}}
	}
	if _, err := r.state.Fresh(ctx, 0); err != nil {
		return nil, nil, unavailable("wait for the newest state", err)
	}
	p := r.newPlanner(by)
	var found catalog.Invalid
	plans := make([]plan, len(orders))
	for i := 0; i < len(orders) && len(found) < maxFound; i++ {
		var err error
		plans[i], err = p.planOrder(ctx, orders[i])
		wrong, isWrong := errors.AsType[*wrongOrder](err)
		switch {
		case isWrong:
			found = append(found, wrong.at(i))
		case err != nil:
			return nil, nil, err
		}
	}
	if len(found) > 0 {
		return nil, nil, found
	}
	if err := p.recall(ctx, plans); err != nil {
		return nil, nil, err
	}
	stored, err := p.stored(ctx, plans, func(plan plan) bool { return plan.guessed })
	if err != nil {
		return nil, nil, err
	}
	for i := range plans {
		if s, ok := stored[plans[i].target]; ok && plans[i].guessed {
			plans[i].exp = s.Exp
		}
	}
	return p, plans, nil
}

func (r *Revoker) newPlanner(by Caller) *planner {
	p := &planner{
		Revoker: r, now: time.Now(), bound: by.Tenant != "",
		issuers: make(map[string]*catalog.KeyManager), tenants: make(map[string]revocation.Tenant),
	}
	home := by.Tenant
	if home == "" {
		home = revocation.SuperTenant.Domain
	}
	r.state.Replica().View(func(v *replica.View) {
		for _, t := range v.Tenants() {
			if by.Tenant == "" || t.Tenant.Domain == by.Tenant {
				p.tenants[t.Tenant.Domain] = t.Tenant
			}
		}
		for _, k := range v.KeyManagers() {
			if by.Tenant == "" || k.Tenant.Domain == by.Tenant {
				p.issuers[k.Iss] = k
			}
			if k.Resident && k.Tenant.Domain == home {
				p.own = k
			}
		}
	})
	return p
}

// stored are the live revocations of the targets of those plans that are wanted and not expired.
func (p *planner) stored(ctx context.Context, plans []plan, wanted func(plan) bool) (map[revocation.Target]revocation.Revocation, error) {
	var targets []revocation.Target
	seen := make(map[revocation.Target]bool)
	for _, plan := range plans {
		if !plan.expired && wanted(plan) && !seen[plan.target] {
			seen[plan.target] = true
			targets = append(targets, plan.target)
		}
	}
	if len(targets) == 0 {
		return nil, nil
	}
	found, err := p.ledger.Lookup(ctx, targets)
	if err != nil {
		return nil, unavailable("look up what is revoked", err)
	}
	live := make(map[revocation.Target]revocation.Revocation, len(found))
	for _, s := range found {
		if !isOver(s.Exp, p.now) {
			live[s.Target] = s.Revocation
		}
	}
	return live, nil
}

// wrongOrder says which member of an order is wrong; an empty one is the order as a whole. It
// repeats no value.
type wrongOrder struct{ member, detail string }

func (w *wrongOrder) Error() string { return w.member + ": " + w.detail }

func (w *wrongOrder) at(n int) catalog.FieldError {
	pointer := "#/" + strconv.Itoa(n)
	if w.member != "" {
		pointer += "/" + w.member
	}
	return catalog.FieldError{Pointer: pointer, Detail: w.detail}
}

func wrong(member, detail string) error { return &wrongOrder{member, detail} }

// identifier names what is to be ended.
type identifier struct {
	member string
	value  string
	kind   revocation.Kind
}

func (o Order) identifiers() []identifier {
	return slices.DeleteFunc([]identifier{
		{"jti", o.JTI, revocation.KindToken}, {"token", o.Token, revocation.KindToken}, {"client_id", o.ClientID, revocation.KindClient},
		{"sub", o.Sub, revocation.KindSubject}, {"sid", o.SID, revocation.KindSession},
		{"tenant", o.Tenant, revocation.KindTenant}, {"kid", o.KID, revocation.KindKey},
	}, func(id identifier) bool { return id.value == "" })
}

const identifierNames = "jti, token, client_id, sub, sid, tenant and kid"

// planOrder returns a [wrongOrder] for what the caller can correct.
func (p *planner) planOrder(ctx context.Context, o Order) (plan, error) {
	if o.Kind != "" && !slices.Contains(revocation.Kinds, o.Kind) {
		return plan{}, wrong("kind", "must be token, client, subject, session, tenant or key")
	}
	ids := o.identifiers()
	switch {
	case len(ids) == 0:
		return plan{}, wrong("", "must have one of "+identifierNames)
	case len(ids) > 1:
		return plan{}, wrong(ids[1].member, "is there beside "+ids[0].member+": only one of "+identifierNames+" may be")
	}
	id := ids[0]
	if o.Kind != "" && o.Kind != id.kind {
		return plan{}, wrong("kind", "is not what "+id.member+" is for: must be "+string(id.kind)+", or left out")
	}
	if fault := faultOf(o.Reason); fault != "" {
		return plan{}, wrong("reason", fault)
	}
	if id.member == "token" {
		return p.planToken(ctx, o.Iss, strings.Trim(o.Token, " \t\r\n"))
	}
	if fault := faultOf(id.value); fault != "" {
		return plan{}, wrong(id.member, fault)
	}
	if id.kind == revocation.KindTenant {
		return p.planTenant(o)
	}
	k, err := p.issuer(o.Iss)
	if err != nil {
		return plan{}, err
	}
	made := plan{
		target: revocation.Target{Kind: id.kind, Iss: k.Iss, ID: id.value}, tenant: k.Tenant,
		exp: p.horizon(k.MaxTokenLifetime), lifetime: k.MaxTokenLifetime, external: !k.Resident,
	}
	switch id.kind {
	case revocation.KindToken:
		made.guessed, made.remembered = true, k.Resident
	case revocation.KindKey:
		// It is never believed again. The day is for clocks that are behind ours.
		made.exp, made.guessed = p.now.Add(revocation.MaxExpiryAhead-24*time.Hour).Unix(), true
		err = p.checkKey(ctx, k, o.KID)
	case revocation.KindSubject:
		// The tokens of its users do not bear it as their sub (GTR-08).
		if p.mapping(k.Iss, o.Sub) != nil {
			err = wrong("sub", "is a client: end its tokens with kind client")
		}
	}
	return made, err
}

// faultOf says what text must be; it is empty for what can be stored and published.
func faultOf(s string) string {
	switch {
	case len(s) > MaxReason: // of identifiers too
		return fmt.Sprintf("must be at most %d bytes", MaxReason)
	case !utf8.ValidString(s), strings.ContainsFunc(s, unicode.IsControl):
		return "must be UTF-8 without control characters"
	}
	return ""
}

// issuer finds the key manager of iss, or the caller's own.
func (p *planner) issuer(iss string) (*catalog.KeyManager, error) {
	k := p.issuers[iss]
	switch {
	case iss == "" && p.own == nil:
		return nil, wrong("iss", "must be there: the tenant has no issuer of our own")
	case iss == "":
		return p.own, nil
	case k == nil:
		return nil, wrong("iss", "is not the issuer of a key manager that you see")
	}
	return k, nil
}

// horizon is when the last token has ended that an issuer, whose tokens live up to lifetime
// seconds, can have issued up to the time of a revocation that is made now.
func (p *planner) horizon(lifetime int32) int64 {
	const begun = 1 // of a second
	return min(p.now.Unix()+begun+p.skew+ledger.MaxStampAhead+int64(lifetime), p.now.Add(revocation.MaxExpiryAhead).Unix())
}

// maxKeys is how many orders of a request may be about signing keys: each is looked for in a
// key set.
const maxKeys = 100

// checkKey refuses a kid that the issuer's key set does not have: its revocation would last for
// ten years. What was withdrawn already is known by its revocation. Only who sees all tenants
// may revoke a key that an external issuer publishes no more.
func (p *planner) checkKey(ctx context.Context, k *catalog.KeyManager, kid string) error {
	if p.keys++; p.keys > maxKeys {
		return wrong("kid", fmt.Sprintf("is one of too many: at most %d keys at once", maxKeys))
	}
	issuer, ok := p.verifier.Issuer(k.Iss)
	algorithms := issuer.Algorithms
	if len(algorithms) == 0 {
		algorithms = token.DefaultAlgorithms
	}
	err := error(token.ErrUnknownKey)
	for i := 0; ok && i < len(algorithms) && errors.Is(err, token.ErrUnknownKey); i++ {
		_, err = issuer.Keys.Key(ctx, kid, algorithms[i])
	}
	switch {
	case err == nil, errors.Is(err, token.ErrAlgorithm), !k.Resident && !p.bound:
		return nil
	case errors.Is(err, token.ErrUnknownKey):
	case errors.Is(err, token.ErrKeysUnavailable):
		return err
	default:
		return fmt.Errorf("%w: %w", token.ErrKeysUnavailable, err)
	}
	target := revocation.Target{Kind: revocation.KindKey, Iss: k.Iss, ID: kid}
	known, err := p.stored(ctx, []plan{{target: target}}, func(plan) bool { return true })
	switch {
	case err != nil:
		return err
	case len(known) > 0:
		return nil
	case k.Resident:
		return wrong("kid", "is not a signing key of this issuer that is in use")
	}
	return wrong("kid", "is not in the issuer's key set: only those who see all tenants may revoke it")
}

// isOver reports whether no gateway accepts a token with this exp any more.
func isOver(exp int64, now time.Time) bool {
	return now.Unix() >= exp+int64(revocation.MaxLeeway/time.Second)
}

func (p *planner) planTenant(o Order) (plan, error) {
	tenant, ok := p.tenants[o.Tenant]
	switch {
	case o.Iss != "":
		return plan{}, wrong("iss", "must be left out: all issuers of the tenant are meant")
	case !ok:
		return plan{}, wrong("tenant", "is not a tenant that you see")
	}
	lifetime := int32(0)
	for _, k := range p.issuers {
		if k.Tenant.ID == tenant.ID {
			lifetime = max(lifetime, k.MaxTokenLifetime)
		}
	}
	return plan{
		target: revocation.Target{Kind: revocation.KindTenant, ID: tenant.Domain}, tenant: tenant,
		exp: p.horizon(lifetime), lifetime: lifetime,
	}, nil
}

// recall completes plans with what is remembered of their tokens.
func (p *planner) recall(ctx context.Context, plans []plan) error {
	var jtis []string
	for _, plan := range plans {
		if plan.remembered {
			jtis = append(jtis, plan.target.ID)
		}
	}
	if len(jtis) == 0 {
		return nil
	}
	tokens, err := p.ledger.IssuedTokens(ctx, jtis)
	if err != nil {
		return fmt.Errorf("plan revocations: %w", err)
	}
	for i := range plans {
		made := &plans[i]
		issued, ok := tokens[made.target.ID]
		// All our issuers' tokens are remembered together, and a tenant must not learn of another's.
		if !made.remembered || !ok || issued.Iss != made.target.Iss {
			continue
		}
		made.exp, made.guessed, made.clientID = issued.Exp, false, issued.ClientID
		made.expired = isOver(issued.Exp, p.now)
	}
	return nil
}

// mapping finds the consumer key of an issuer, nil if it is not known.
func (p *planner) mapping(iss, consumerKey string) (found *catalog.KeyMapping) {
	p.state.Replica().View(func(v *replica.View) { found = mappingIn(v, iss, consumerKey) })
	return found
}

func mappingIn(v *replica.View, iss, consumerKey string) *catalog.KeyMapping {
	for _, m := range v.KeyMappingsOf(consumerKey) {
		if m.Iss == iss {
			return m
		}
	}
	return nil
}

// jweDots are in an encrypted token, which is opaque to all but its issuer.
const jweDots = 4

// planToken is for a token that was handed in.
func (p *planner) planToken(ctx context.Context, iss, tok string) (plan, error) {
	if tok == "" {
		return plan{}, wrong("token", "must not be empty")
	}
	var named *catalog.KeyManager
	if iss != "" {
		var err error
		if named, err = p.issuer(iss); err != nil {
			return plan{}, err
		}
	}
	external := named != nil && !named.Resident
	switch {
	case token.LooksLikeJWT(tok) && !(external && strings.Count(tok, ".") == jweDots):
		return p.planJWT(ctx, iss, tok)
	case !external:
		return plan{}, wrong("token", "is no JWT: an opaque token is of an external key manager, which iss must name")
	}
	return plan{
		target: revocation.DigestTarget(named.Iss, tok), tenant: named.Tenant,
		exp: p.horizon(named.MaxTokenLifetime), guessed: true, external: true,
	}, nil
}

var errNotGenuine = wrong("token", "is no genuine token of a key manager that you see")

func (p *planner) planJWT(ctx context.Context, iss, compact string) (plan, error) {
	// An issuer that the caller does not see is none, whatever its keys would say.
	if claimed, ok := token.ClaimedIssuer(compact); !ok || p.issuers[claimed] == nil {
		return plan{}, errNotGenuine
	}
	t, err := p.verifier.Verify(ctx, compact)
	switch {
	case errors.Is(err, token.ErrClaims): // its issuer did sign it
		return plan{}, wrong("token", "has a claim of the wrong type: end the tokens of its client, or its key")
	case errors.Is(err, token.ErrInvalid):
		return plan{}, errNotGenuine
	case err != nil:
		return plan{}, fmt.Errorf("verify token: %w", err)
	}
	k := p.issuers[t.Issuer]
	issuer, trusted := p.verifier.Issuer(t.Issuer)
	made := plan{
		target: revocation.Target{Kind: revocation.KindToken, Iss: t.Issuer, ID: t.ID}, exp: t.Expiry, expired: isOver(t.Expiry, p.now),
	}
	if t.ID == "" {
		made.target, made.signature = revocation.DigestTarget(t.Issuer, t.SigningInput), t.Signature
	}
	switch {
	case k == nil, !trusted:
		return plan{}, errNotGenuine
	case iss != "" && iss != t.Issuer:
		return plan{}, wrong("iss", "is not the token's: leave it out, a JWT names its own")
	case !issuer.IsAccessToken(t):
		return plan{}, wrong("token", "is no access token")
	case !t.HasExpiry:
		return plan{}, wrong("token", "never expires: end the tokens of its client, or its key")
	case t.Expiry > p.now.Add(revocation.MaxExpiryAhead).Unix():
		return plan{}, wrong("token", "expires too far ahead: end the tokens of its client, or its key")
	case made.target.Validate() != nil:
		return plan{}, wrong("token", "has a jti that is too long or no plain text: end the tokens of its client, or its key")
	}
	made.tenant, made.external = k.Tenant, !k.Resident
	// What a client cannot be named with cannot be published either.
	if faultOf(t.ClientID) == "" {
		made.clientID = t.ClientID
	}
	return made, nil
}
