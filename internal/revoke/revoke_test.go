package revoke_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/revoke"
)

const day = 24 * time.Hour

func seconds(d time.Duration) int64 { return int64(d / time.Second) }

func TestRevoke(t *testing.T) {
	t.Parallel()
	target := func(kind revocation.Kind, iss, id string) revocation.Target {
		return revocation.Target{Kind: kind, Iss: iss, ID: id}
	}
	noJTI := access(ours, claims{"jti": nil})
	w := newWorld(t)
	var seq revocation.Seq
	const margin = 2 + ledger.MaxStampAhead // of the skew, and clocks that are ahead of ours
	for _, tt := range []struct {
		name   string
		by     revoke.Caller
		order  revoke.Order
		target revocation.Target
		tenant revocation.Tenant
		exp    int64 // from now, at least
		slack  int64 // and at most so much more
		client string
	}{
		{"jti", admin, revoke.Order{JTI: "at-9"}, target("token", ours, "at-9"), super, 3600 + margin, 1, ""},
		{"jti of the caller's issuer", acmeAdmin, revoke.Order{JTI: "at-9"}, target("token", acmeOurs, "at-9"), acme, 3600 + margin, 1, ""},
		{"jti of an external issuer", admin, revoke.Order{Iss: acmeIDP, JTI: "at-9"}, target("token", acmeIDP, "at-9"), acme, 86400 + margin, 1, ""},
		{"jti that is remembered", admin, revoke.Order{JTI: superKnown}, target("token", ours, superKnown), super, 490, 10, "key-1"},
		{"its jti in capitals is another", admin, revoke.Order{JTI: strings.ToUpper(superKnown)}, target("token", ours, strings.ToUpper(superKnown)), super, 3600 + margin, 1, ""},
		{"jti that another issuer's token had", admin, revoke.Order{Iss: acmeOurs, JTI: superKnown}, target("token", acmeOurs, superKnown), acme, 3600 + margin, 1, ""},
		{"jti of theirs that we remember by chance", admin, revoke.Order{Iss: idp, JTI: superKnown}, target("token", idp, superKnown), super, 7200 + margin, 1, ""},

		{"JWT", admin, revoke.Order{Kind: "token", Token: access(ours, claims{"jti": "j1"})}, target("token", ours, "j1"), super, 590, 10, "key-1"},
		{"JWT with its iss", admin, revoke.Order{Iss: ours, Token: access(ours, claims{"jti": "j2"})}, target("token", ours, "j2"), super, 590, 10, "key-1"},
		{"JWT and a line end", admin, revoke.Order{Token: access(ours, claims{"jti": "j3", "azp": nil}) + "\r\n"}, target("token", ours, "j3"), super, 590, 10, ""},
		{"JWT of another tenant", admin, revoke.Order{Token: access(acmeIDP, claims{"jti": "j4", "azp": "x"})}, target("token", acmeIDP, "j4"), acme, 590, 10, "x"},
		{"JWT of the caller's", acmeAdmin, revoke.Order{Token: access(acmeIDP, claims{"jti": "j5", "azp": "x"})}, target("token", acmeIDP, "j5"), acme, 590, 10, "x"},
		{"JWT with typ JWT", admin, revoke.Order{Token: mint(signer, "JWT", idp, claims{"jti": "j6"})}, target("token", idp, "j6"), super, 590, 10, "key-1"},
		{"JWT that has just expired", admin, revoke.Order{Token: access(ours, claims{"jti": "j7", "exp": time.Now().Unix() - 60})}, target("token", ours, "j7"), super, -70, 10, "key-1"},
		{"JWT without jti", admin, revoke.Order{Token: noJTI}, revocation.DigestTarget(ours, noJTI[:strings.LastIndex(noJTI, ".")]), super, 590, 10, "key-1"},
		{"JWT of a client that cannot be named", admin, revoke.Order{Token: access(ours, claims{"jti": "j8", "azp": "a\nb"})}, target("token", ours, "j8"), super, 590, 10, ""},
		{"opaque token", admin, revoke.Order{Iss: idp, Token: " opaque \n"}, revocation.DigestTarget(idp, "opaque"), super, 7200 + margin, 1, ""},
		{"encrypted token", acmeAdmin, revoke.Order{Iss: acmeIDP, Token: "eyJ.a.b.c.d"}, revocation.DigestTarget(acmeIDP, "eyJ.a.b.c.d"), acme, 86400 + margin, 1, ""},

		{"client", admin, revoke.Order{Kind: "client", ClientID: "key-1"}, target("client", ours, "key-1"), super, 3600 + margin, 1, ""},
		{"client that is not known", acmeAdmin, revoke.Order{Iss: acmeIDP, ClientID: "gone"}, target("client", acmeIDP, "gone"), acme, 86400 + margin, 1, ""},
		{"subject", admin, revoke.Order{Sub: "u-1009"}, target("subject", ours, "u-1009"), super, 3600 + margin, 1, ""},
		{"subject named as another issuer's client", admin, revoke.Order{Iss: idp, Sub: "key-1"}, target("subject", idp, "key-1"), super, 7200 + margin, 1, ""},
		{"session", admin, revoke.Order{Iss: idp, SID: "s-1"}, target("session", idp, "s-1"), super, 7200 + margin, 1, ""},
		{"tenant", admin, revoke.Order{Tenant: "acme.com"}, target("tenant", "", "acme.com"), acme, 86400 + margin, 1, ""},
		{"own tenant", superAdmin, revoke.Order{Kind: "tenant", Tenant: "carbon.super"}, target("tenant", "", "carbon.super"), super, 7200 + margin, 1, ""},
		{"key", admin, revoke.Order{KID: "k"}, target("key", ours, "k"), super, seconds(revocation.MaxExpiryAhead-day) - 10, 10, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			start := time.Now().Unix()
			tt.order.Reason = "stolen"
			got := w.one(tt.by, tt.order)
			end := time.Now().Unix()
			if got.Target != tt.target || got.Tenant != tt.tenant || !got.Added || got.Expired || got.ID == "" || got.Seq != seq+1 {
				t.Errorf("%+v", got)
			}
			seq = got.Seq
			if got.Exp < start+tt.exp || got.Exp > end+tt.exp+tt.slack {
				t.Errorf("ends in %d s, want %d to %d", got.Exp-end, tt.exp, tt.exp+tt.slack)
			}
			stored, err := w.memory.Lookup(t.Context(), []revocation.Target{tt.target})
			if err != nil || len(stored) != 1 {
				t.Fatalf("%v, %v", stored, err)
			}
			s := stored[0]
			if s.ID != got.ID || s.Tenant != tt.tenant || s.Exp != got.Exp || s.NotAfter != got.NotAfter || s.ClientID != tt.client || s.Reason != "stolen" {
				t.Errorf("stored %+v of %+v", s, got)
			}
			if timed := tt.target.Kind.HasTime(); timed != (got.NotAfter >= start+seconds(skew) && got.NotAfter <= end+seconds(skew)) {
				t.Errorf("not after %d, now %d", got.NotAfter, end)
			} else if timed && got.NotAfter+int64(longest(tt.target)) > got.Exp {
				t.Errorf("a token of the revocation's time outlives it by %d s", got.NotAfter+int64(longest(tt.target))-got.Exp)
			}
			var actor, action string
			err = w.pool.QueryRow(t.Context(), `SELECT actor, action FROM rescind.audit WHERE entity_id = $1::uuid AND reason = 'stolen'`, got.ID).Scan(&actor, &action)
			if err != nil || actor != tt.by.Actor.Name || action != "revoke_"+string(tt.target.Kind) {
				t.Errorf("audit: %s %s, %v", actor, action, err)
			}
		})
	}
}

// longest is the longest lifetime of the tokens of a target.
func longest(target revocation.Target) int32 {
	if target.Kind == revocation.KindTenant {
		return map[string]int32{"acme.com": lifetimes[acmeIDP], "carbon.super": lifetimes[idp]}[target.ID]
	}
	return lifetimes[target.Iss]
}

// Errors point at what is wrong, and no tenant learns of another's.
func TestRevokeInvalid(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const (
		unseen     = "#/0/iss: is not the issuer of a key manager that you see"
		notGenuine = "#/0/token: is no genuine token of a key manager that you see"
		noTenant   = "#/0/tenant: is not a tenant that you see"
		ids        = "jti, token, client_id, sub, sid, tenant and kid"
		otherwise  = ": end the tokens of its client, or its key"
	)
	long := strings.Repeat("x", 256)
	now := time.Now().Unix()
	for _, tt := range []struct {
		name  string
		by    revoke.Caller
		order revoke.Order
		want  string
	}{
		{"nothing", admin, revoke.Order{}, "#/0: must have one of " + ids},
		{"only a kind", admin, revoke.Order{Kind: "token"}, "#/0: must have one of " + ids},
		{"an unknown kind", admin, revoke.Order{Kind: "Token", JTI: "a"}, "#/0/kind: must be token, client, subject, session, tenant or key"},
		{"another kind", admin, revoke.Order{Kind: "client", Sub: "a"}, "#/0/kind: is not what sub is for: must be subject, or left out"},
		{"two identifiers", admin, revoke.Order{JTI: "a", Token: "b"}, "#/0/token: is there beside jti: only one of " + ids + " may be"},
		{"two of others", admin, revoke.Order{Kind: "client", ClientID: "a", KID: "b"}, "#/0/kid: is there beside client_id: only one of " + ids + " may be"},
		{"a long identifier", admin, revoke.Order{ClientID: long}, "#/0/client_id: must be at most 255 bytes"},
		{"a line end", admin, revoke.Order{Sub: "a\n"}, "#/0/sub: must be UTF-8 without control characters"},
		{"not UTF-8", admin, revoke.Order{KID: "\xff"}, "#/0/kid: must be UTF-8 without control characters"},
		{"a long reason", admin, revoke.Order{JTI: "a", Reason: long}, "#/0/reason: must be at most 255 bytes"},
		{"a control in the reason", admin, revoke.Order{JTI: "a", Reason: "\x85"}, "#/0/reason: must be UTF-8 without control characters"},
		{"an unknown issuer", admin, revoke.Order{Iss: "https://nope", JTI: "a"}, unseen},
		{"no issuer", nobody, revoke.Order{JTI: "a"}, "#/0/iss: must be there: the tenant has no issuer of our own"},

		{"an empty token", admin, revoke.Order{Token: " \n"}, "#/0/token: must not be empty"},
		{"an opaque token", admin, revoke.Order{Token: "opaque"}, "#/0/token: is no JWT: an opaque token is of an external key manager, which iss must name"},
		{"an opaque token of ours", admin, revoke.Order{Iss: ours, Token: "opaque"}, "#/0/token: is no JWT: an opaque token is of an external key manager, which iss must name"},
		{"an opaque token of nobody", admin, revoke.Order{Iss: "https://nope", Token: "opaque"}, unseen},
		{"an encrypted token of ours", admin, revoke.Order{Iss: ours, Token: "eyJ.a.b.c.d"}, notGenuine},
		{"no JWT", admin, revoke.Order{Token: "a.b.c"}, notGenuine},
		{"forged", admin, revoke.Order{Token: mint(forger, "at+jwt", ours, nil)}, notGenuine},
		{"of nobody", admin, revoke.Order{Token: access("https://nope", nil)}, notGenuine},
		{"of no issuer", admin, revoke.Order{Token: access("", nil)}, notGenuine},
		{"with another iss", admin, revoke.Order{Iss: idp, Token: access(ours, nil)}, "#/0/iss: is not the token's: leave it out, a JWT names its own"},
		{"with an unknown iss", admin, revoke.Order{Iss: "https://nope", Token: access(ours, nil)}, unseen},
		{"an ID token", admin, revoke.Order{Token: mint(signer, "JWT", ours, claims{"at_hash": "x"})}, "#/0/token: is no access token"},
		{"a SET", admin, revoke.Order{Token: mint(signer, "secevent+jwt", ours, nil)}, "#/0/token: is no access token"},
		{"without end", admin, revoke.Order{Token: access(ours, claims{"exp": nil})}, "#/0/token: never expires" + otherwise},
		{"far ahead", admin, revoke.Order{Token: access(ours, claims{"exp": now + seconds(revocation.MaxExpiryAhead) + 60})}, "#/0/token: expires too far ahead" + otherwise},
		{"a claim of another type", admin, revoke.Order{Token: access(ours, claims{"jti": 7})}, "#/0/token: has a claim of the wrong type" + otherwise},
		{"a long jti", admin, revoke.Order{Token: access(ours, claims{"jti": long})}, "#/0/token: has a jti that is too long or no plain text" + otherwise},

		{"a subject that is a client", admin, revoke.Order{Sub: "key-1"}, "#/0/sub: is a client: end its tokens with kind client"},
		{"a tenant with an issuer", admin, revoke.Order{Iss: ours, Tenant: "carbon.super"}, "#/0/iss: must be left out: all issuers of the tenant are meant"},
		{"no tenant", admin, revoke.Order{Tenant: "nope.example"}, noTenant},

		// What exists elsewhere is refused in the words for what does not exist at all.
		{"another's tenant", acmeAdmin, revoke.Order{Tenant: "carbon.super"}, noTenant},
		{"another's jti", acmeAdmin, revoke.Order{Iss: ours, JTI: superKnown}, unseen},
		{"another's client", acmeAdmin, revoke.Order{Iss: ours, ClientID: "key-1"}, unseen},
		{"another's subject", acmeAdmin, revoke.Order{Iss: ours, Sub: "key-1"}, unseen},
		{"another's session", acmeAdmin, revoke.Order{Iss: idp, SID: "s"}, unseen},
		{"another's key", acmeAdmin, revoke.Order{Iss: ours, KID: "k"}, unseen},
		{"unknown key of ours", admin, revoke.Order{KID: "k-1"}, "#/0/kid: is not a signing key of this issuer that is in use"},
		{"unknown key of an external issuer", acmeAdmin, revoke.Order{Iss: acmeIDP, KID: "k-1"}, "#/0/kid: is not in the issuer's key set: only those who see all tenants may revoke it"},
		{"another's opaque token", acmeAdmin, revoke.Order{Iss: idp, Token: "opaque"}, unseen},
		{"another's token", acmeAdmin, revoke.Order{Token: access(ours, nil)}, notGenuine},
		{"another's token that is forged", acmeAdmin, revoke.Order{Token: mint(forger, "at+jwt", ours, nil)}, notGenuine},
		{"another's ID token", acmeAdmin, revoke.Order{Token: mint(signer, "JWT", ours, claims{"at_hash": "x"})}, notGenuine},
		{"another's token with a wrong claim", acmeAdmin, revoke.Order{Token: access(ours, claims{"jti": 7})}, notGenuine},
		{"another's token whose keys are away", superAdmin, revoke.Order{Token: access(awayIDP, nil)}, notGenuine},
		{"another's token that has expired", acmeAdmin, revoke.Order{Token: access(ours, claims{"exp": now - 900})}, notGenuine},
	} {
		for name, do := range w.both() {
			err := do(tt.by, []revoke.Order{tt.order})
			invalid, ok := errors.AsType[catalog.Invalid](err)
			if !ok || invalid.Error() != tt.want {
				t.Errorf("%s, %s: %v, want %s", tt.name, name, err, tt.want)
			}
		}
	}
	if n := w.events(); n != 0 {
		t.Errorf("%d events", n)
	}
}

// both are Revoke and Preview.
func (w *world) both() map[string]func(revoke.Caller, []revoke.Order) error {
	return map[string]func(revoke.Caller, []revoke.Order) error{
		"Revoke":  func(by revoke.Caller, o []revoke.Order) error { _, err := w.Revoke(w.Context(), by, o); return err },
		"Preview": func(by revoke.Caller, o []revoke.Order) error { _, err := w.Preview(w.Context(), by, o); return err },
	}
}

func TestRevokeErrors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for name, do := range w.both() {
		for _, n := range []int{0, ledger.MaxBulk + 1} {
			if err := do(admin, make([]revoke.Order, n)); err == nil || err.Error() != "#: must be 1 to 10000" {
				t.Errorf("%s of %d: %v", name, n, err)
			}
		}
		if err := do(acmeAdmin, []revoke.Order{{JTI: "a"}, {Token: access(awayIDP, nil)}}); !errors.Is(err, token.ErrKeysUnavailable) {
			t.Errorf("%s, keys away: %v", name, err)
		}
		orders := make([]revoke.Order, 30)
		for i := range orders {
			if i%2 == 0 {
				orders[i].JTI = "a"
			}
		}
		err := do(admin, orders)
		invalid, ok := errors.AsType[catalog.Invalid](err)
		if !ok || len(invalid) != 10 || invalid[0].Pointer != "#/1" || invalid[9].Pointer != "#/19" {
			t.Errorf("%s, many wrong: %v", name, err)
		}
	}
	w.state.err = errors.New("no head")
	for name, do := range w.both() {
		if err := do(admin, []revoke.Order{{JTI: "a"}}); !errors.Is(err, ledger.ErrUnavailable) || !errors.Is(err, w.state.err) {
			t.Errorf("%s, stale: %v", name, err)
		}
	}
	if n := w.events(); n != 0 {
		t.Errorf("%d events", n)
	}
}

// A repeat of what has no time adds nothing, however much later; of what has, it moves it on.
func TestRepeat(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, tt := range []struct {
		order revoke.Order
		adds  bool
	}{
		{revoke.Order{JTI: "at-9"}, false},
		{revoke.Order{JTI: superKnown}, false},
		{revoke.Order{Iss: idp, Token: "opaque"}, false},
		{revoke.Order{KID: "k"}, false},
		{revoke.Order{Token: access(ours, nil)}, false},
		{revoke.Order{SID: "s-1"}, true},
		{revoke.Order{ClientID: "key-1"}, true},
		{revoke.Order{Sub: "u-1"}, true},
		{revoke.Order{Tenant: "acme.com"}, true},
	} {
		first := w.one(admin, tt.order)
		if tt.order.JTI != superKnown && tt.order.Token == "" || tt.order.Iss != "" {
			w.age()
			first.Exp -= 60
		}
		effect, err := w.Preview(t.Context(), admin, []revoke.Order{tt.order})
		if err != nil || !effect[0].Revoked {
			t.Errorf("%+v: %+v, %v", tt.order, effect, err)
		}
		again := w.one(admin, tt.order)
		if again.ID != first.ID || again.Added != tt.adds || (again.Exp > first.Exp) != tt.adds || again.Seq == 0 {
			t.Errorf("%+v: %+v after %+v", tt.order, again, first)
		}
	}
}

func TestExpired(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	over := access(ours, claims{"exp": time.Now().Unix() - 121})
	orders := []revoke.Order{{JTI: superOver}, {JTI: "at-9"}, {Token: over}}
	effects, err := w.Preview(t.Context(), admin, orders)
	if err != nil {
		t.Fatal(err)
	}
	outcomes, err := w.Revoke(t.Context(), admin, orders)
	if err != nil {
		t.Fatal(err)
	}
	for i, o := range outcomes {
		want := i != 1
		if o.Expired != want || o.Added == want || (o.Result == ledger.Result{}) != want || effects[i].Expired != want || o.Target != effects[i].Target {
			t.Errorf("%d: %+v, %+v", i, o, effects[i])
		}
		if want && effects[i].ClientCount != 0 {
			t.Errorf("%d hits %v", i, effects[i].Clients)
		}
	}
	only, err := w.Revoke(t.Context(), admin, orders[2:])
	if err != nil || !only[0].Expired || w.events() != 1 {
		t.Errorf("%+v, %v, %d events", only, err, w.events())
	}
}

func TestManyAreOneTransaction(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	orders := make([]revoke.Order, 300)
	for i := range orders {
		orders[i] = revoke.Order{JTI: fmt.Sprintf("at-%d", i/3)} // each three times
	}
	wrong := append(orders[:len(orders):len(orders)], revoke.Order{JTI: "a", Iss: "https://nope"})
	if _, err := w.Revoke(t.Context(), admin, wrong); err == nil || w.events() != 0 {
		t.Fatalf("%v, %d events", err, w.events())
	}
	outcomes, err := w.Revoke(t.Context(), admin, orders)
	if err != nil || w.events() != 100 {
		t.Fatalf("%v, %d events", err, w.events())
	}
	for i, o := range outcomes {
		if o.Target.ID != orders[i].JTI || o.ID != outcomes[i/3*3].ID || !o.Added {
			t.Fatalf("%d: %+v", i, o)
		}
	}
	if n := w.memory.asked.Load(); n != 1 { // once all orders are known to be right
		t.Errorf("asked %d times what is remembered", n)
	}
	var commits int
	if err := w.pool.QueryRow(t.Context(), `SELECT count(DISTINCT xmin::text) FROM rescind.revocations`).Scan(&commits); err != nil || commits != 1 {
		t.Errorf("%d transactions, %v", commits, err)
	}
}

// Whatever a bound caller asks for, in any words, tokens of others live on, and none of what
// it is told is about them.
func TestTenantsAreApart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	now := time.Now().Unix()
	others := []replica.Token{}
	for _, iss := range []string{ours, idp} {
		for _, id := range []string{"at-1", superKnown, "key-1", "twin"} {
			others = append(others, replica.Token{
				Iss: iss, Tenant: super.Domain, JTI: id, ClientID: id, Sub: id, SID: id, KID: id, IssuedAt: now,
				Digest: revocation.DigestTarget(iss, id).ID,
			})
		}
	}
	var orders []revoke.Order
	for _, iss := range []string{"", ours, idp, acmeOurs, acmeIDP} {
		for _, id := range []string{"at-1", superKnown, "key-1", "twin", "carbon.super", "acme.com", access(ours, nil), access(idp, nil)} {
			orders = append(orders, revoke.Order{Iss: iss, JTI: id}, revoke.Order{Iss: iss, Token: id}, revoke.Order{Iss: iss, ClientID: id},
				revoke.Order{Iss: iss, Sub: id}, revoke.Order{Iss: iss, SID: id}, revoke.Order{Iss: iss, Tenant: id}, revoke.Order{Iss: iss, KID: id})
		}
	}
	done := 0
	for _, o := range orders {
		effects, previewErr := w.Preview(t.Context(), acmeAdmin, []revoke.Order{o})
		outcomes, err := w.Revoke(t.Context(), acmeAdmin, []revoke.Order{o})
		if (err == nil) != (previewErr == nil) {
			t.Errorf("%+v: %v, preview %v", o, err, previewErr)
		}
		if err != nil {
			if _, ok := errors.AsType[catalog.Invalid](err); !ok {
				t.Errorf("%+v: %v", o, err)
			}
			continue
		}
		done++
		if outcomes[0].Tenant != acme || effects[0].Tenant != acme {
			t.Errorf("%+v: %+v, %+v", o, outcomes, effects)
		}
		for _, app := range effects[0].Applications {
			if app.Tenant != acme {
				t.Errorf("%+v hits application %s", o, app.Name)
			}
		}
		stored, err := w.memory.Lookup(t.Context(), []revocation.Target{outcomes[0].Target})
		if err != nil || len(stored) != 1 || stored[0].ClientID == "key-1" {
			t.Errorf("%+v: %+v, %v", o, stored, err)
		}
	}
	if done < 50 {
		t.Errorf("only %d orders were carried out", done)
	}
	for _, token := range others {
		if kind, dead := w.revoked(token); dead {
			t.Errorf("%+v is dead by kind %s", token, kind)
		}
	}
	if _, dead := w.revoked(replica.Token{Iss: acmeOurs, Tenant: acme.Domain, ClientID: "acme-1", IssuedAt: now}); !dead {
		t.Error("its own lives")
	}
}

func TestPreview(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	client := revocation.Target{Kind: revocation.KindClient, Iss: ours, ID: "key-1"}
	w.memory.living[client] = 5
	w.memory.living[revocation.Target{Kind: revocation.KindTenant, ID: "carbon.super"}] = 9
	for _, tt := range []struct {
		order         revoke.Order
		apps, clients string // each sorted by id
		living        int64  // -1: not known
	}{
		{revoke.Order{ClientID: "key-1"}, "shop", "key-1", 5},
		{revoke.Order{ClientID: "gone"}, "", "", 0},
		{revoke.Order{ClientID: "ext-1"}, "", "", 0},
		{revoke.Order{Iss: idp, ClientID: "ext-1"}, "shop", "ext-1", -1},
		{revoke.Order{Sub: "u-1"}, "", "", 0},
		{revoke.Order{SID: "s-1"}, "", "", -1},
		{revoke.Order{Tenant: "carbon.super"}, "shop till", "ext-1 key-1 key-2 twin", 9},
		{revoke.Order{KID: "k"}, "shop till", "key-1 key-2 twin", -1},
		{revoke.Order{Iss: acmeIDP, KID: "k"}, "acme", "twin", -1},
		{revoke.Order{Iss: awayIDP, KID: "k"}, "", "", -1},
		{revoke.Order{JTI: "at-9"}, "", "", -1},
		{revoke.Order{JTI: superKnown}, "shop", "key-1", -1},
		{revoke.Order{Token: access(ours, nil)}, "shop", "key-1", -1},
		{revoke.Order{Token: access(idp, claims{"azp": "elsewhere"})}, "", "elsewhere", -1},
	} {
		effects, err := w.Preview(t.Context(), admin, []revoke.Order{tt.order})
		if err != nil {
			t.Fatal(err)
		}
		e := effects[0]
		apps := make(map[string]bool)
		for _, app := range e.Applications {
			apps[app.Name] = true
		}
		clients := make(map[string]bool)
		for _, c := range e.Clients {
			clients[c] = true
		}
		if diff := cmp.Diff(setOf(tt.apps), apps); diff != "" || e.ApplicationCount != len(apps) {
			t.Errorf("%+v: %d applications %s", tt.order, e.ApplicationCount, diff)
		}
		if diff := cmp.Diff(setOf(tt.clients), clients); diff != "" || e.ClientCount != len(clients) {
			t.Errorf("%+v: %d clients %s", tt.order, e.ClientCount, diff)
		}
		want := ledger.Living{}
		if tt.living >= 0 {
			want = ledger.Living{Tokens: tt.living, Since: since}
		}
		if e.Living != want || e.Revoked {
			t.Errorf("%+v: living %+v, revoked %t", tt.order, e.Living, e.Revoked)
		}
		if now := time.Now().Unix(); e.Target.Kind.HasTime() != (e.NotAfter >= now-5 && e.NotAfter <= now+seconds(skew)) || e.Exp < now {
			t.Errorf("%+v: not after %d, exp %d", tt.order, e.NotAfter, e.Exp)
		}
	}
	if n := w.events(); n != 0 {
		t.Errorf("%d events", n)
	}
}

func setOf(names string) map[string]bool {
	set := make(map[string]bool)
	for _, name := range strings.Fields(names) {
		set[name] = true
	}
	return set
}

// A preview of many orders is of bounded size, and counts the same tokens once.
func TestPreviewIsBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	orders := make([]revoke.Order, 2000)
	for i := range orders {
		orders[i] = revoke.Order{Tenant: "carbon.super"}
		if i < 100 {
			orders[i] = revoke.Order{KID: "k"}
		}
	}
	effects, err := w.Preview(t.Context(), admin, orders)
	if err != nil {
		t.Fatal(err)
	}
	apps, clients := 0, 0
	for i, e := range effects {
		apps += len(e.Applications)
		clients += len(e.Clients)
		want := 4
		if i < 100 {
			want = 3
		}
		if e.ClientCount != want || e.ApplicationCount != 2 {
			t.Fatalf("%d: %d clients, %d applications", i, e.ClientCount, e.ApplicationCount)
		}
	}
	if apps != revoke.MaxNamed || clients != revoke.MaxNamed || w.memory.counted.Load() != 1 {
		t.Errorf("%d applications and %d clients are named, tokens counted %d times", apps, clients, w.memory.counted.Load())
	}
}

// A preview counts the tokens of a hundred targets, however often each is named.
func TestPreviewCountsFew(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	orders := []revoke.Order{{JTI: "at-9"}, {Iss: idp, ClientID: "theirs"}, {KID: "k"}, {SID: "s"}} // none of which is counted
	for i := range revoke.MaxCounted {
		orders = append(orders, revoke.Order{ClientID: fmt.Sprint(i)}, revoke.Order{ClientID: fmt.Sprint(i)})
	}
	if _, err := w.Preview(t.Context(), admin, orders); err != nil || w.memory.counted.Load() != revoke.MaxCounted {
		t.Errorf("%v, counted %d times", err, w.memory.counted.Load())
	}
	orders = append(orders, revoke.Order{Sub: "0"})
	_, err := w.Preview(t.Context(), admin, orders)
	if want := "#: names 101 clients, subjects and tenants whose tokens would be counted: look at up to 100 at a time"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if _, err := w.Revoke(t.Context(), admin, orders); err != nil || w.memory.counted.Load() != revoke.MaxCounted {
		t.Errorf("Revoke: %v, counted %d times", err, w.memory.counted.Load())
	}
}

// Few look into much at a time, few more wait, and a few orders never do.
func TestHeavyWorkWaits(t *testing.T) {
	t.Parallel()
	const inside, waiting, light = 2, 8, 100
	w := newWorld(t)
	w.memory.entered, w.memory.open = make(chan struct{}), make(chan struct{})
	many := make([]revoke.Order, light+1)
	for i := range many {
		many[i] = revoke.Order{JTI: fmt.Sprint("at-", i)}
	}
	done := make(chan error)
	preview := func() {
		_, err := w.Preview(t.Context(), admin, []revoke.Order{{ClientID: "key-1"}})
		done <- err
	}
	for range inside {
		go preview()
		<-w.memory.entered
	}
	gone, leave := context.WithCancel(t.Context())
	leave()
	if _, err := w.Preview(gone, admin, many[:1]); !errors.Is(err, context.Canceled) {
		t.Errorf("a preview in no time: %v", err)
	}
	if _, err := w.Revoke(gone, admin, many); !errors.Is(err, context.Canceled) {
		t.Errorf("many orders in no time: %v", err)
	}
	if _, err := w.Revoke(t.Context(), admin, many[:light]); err != nil {
		t.Errorf("a few orders: %v", err)
	}
	for range waiting + 1 {
		go preview()
	}
	if err := <-done; !errors.Is(err, ledger.ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
	go func() {
		for range waiting {
			<-w.memory.entered
		}
	}()
	close(w.memory.open)
	for range inside + waiting {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if _, err := w.Revoke(t.Context(), admin, many); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// An error never has the token in it.
func TestErrorsKeepTokens(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, tok := range []string{mint(forger, "at+jwt", ours, nil), access(ours, claims{"jti": 7}), access(awayIDP, nil), "opaque-secret", "eyJ.secret"} {
		_, err := w.Revoke(context.Background(), admin, []revoke.Order{{Token: tok}})
		if err == nil || strings.Contains(err.Error(), tok) || strings.Contains(err.Error(), tok[len(tok)/2:]) {
			t.Errorf("%v", err)
		}
	}
}
