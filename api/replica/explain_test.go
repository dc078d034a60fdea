package replica

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// mustExplain sees that an explanation says just what an authorizer has said, and holds to what all
// explanations hold to. It panics, so that whoever asks needs no testing.T.
func mustExplain(s *State, by authorizer, t *token.Token, req Request, want Authorization) Explanation {
	n := narrator{by: &by, state: s, token: t, req: req, now: frozen}
	e := n.explain()
	if wrong := flaws(s, &n, e); wrong != "" || !reflect.DeepEqual(e.Authorization, want) {
		panic(fmt.Sprintf("%+v, mode %s: %s\nAuthorize: %+v\nExplain: %+v", req, by.mode, wrong, want, e))
	}
	return e
}

// flaws is what is wrong with an explanation, whatever it is about.
func flaws(s *State, n *narrator, e Explanation) string {
	a := e.Authorization
	failed := -1
	for i, c := range e.Checks {
		switch {
		case c.Name != CheckNames[i]:
			return "checks are not in their order"
		case c.Result == Failed && failed >= 0:
			return "two checks failed"
		case c.Result == Failed && (!slices.Contains(checks[i].reasons, a.Reason) || c.Facts["reason"] != a.Reason):
			return c.Name + " failed for another reason"
		case (c.Result == NotReached) != (failed >= 0 && c.Result != Failed):
			return c.Name + " is " + string(c.Result)
		case (c.Result == NotReached) != (c.Detail == ""):
			return c.Name + " has the detail " + c.Detail
		case c.Detail != "" && (!strings.HasSuffix(c.Detail, ".") || strings.Contains(c.Detail, "%!")):
			return "no sentence: " + c.Detail
		}
		if c.Result == Failed {
			failed = i
		}
	}
	switch {
	case len(e.Checks) != len(CheckNames):
		return "checks are missing"
	case a.Authorized != (failed < 0):
		return "authorized, and a check failed, or the other way round"
	case a.Authorized != (e.Next == ""):
		return "next is " + e.Next
	case e.HTTPStatus != a.Code.HTTPStatus():
		return "status"
	}
	text, err := json.Marshal(e.Checks)
	if err != nil {
		return err.Error()
	}
	if n.token != nil && (bytes.Contains(text, []byte(n.token.Signature)) || bytes.Contains(text, []byte(n.token.SigningInput))) {
		return "it repeats the token"
	}
	other := ""
	s.View(func(v *View) {
		tell := func(m *catalog.Meta) {
			if m.Tenant.Domain != n.tenant() && bytes.Contains(text, []byte(m.UUID)) {
				other = "it tells of another tenant's " + m.UUID
			}
		}
		for _, x := range v.APIs() {
			tell(x.Base())
			if x.Tenant.Domain != n.tenant() && (a.API == nil || a.API.Context != x.Context) && x.Context != n.req.Path &&
				bytes.Contains(text, []byte(`"context":"`+x.Context+`"`)) && len(v.APIsByContext(x.Context, x.Version)) == 1 {
				other = "it tells of another tenant's " + x.Context
			}
		}
		for _, x := range v.Applications() {
			tell(x.Base())
		}
		for _, x := range v.Subscriptions() {
			tell(x.Base())
		}
	})
	return other
}

func check(e Explanation, name string) Check {
	return e.Checks[slices.Index(CheckNames, name)]
}

// The facts behind each refusal.
func TestExplain(t *testing.T) {
	t.Parallel()
	m, w := newMint(t), newWorld()
	w.add(home, &catalog.API{Name: "Pizza", Version: "2.0.0", Context: "/pizza/2.0.0", Status: catalog.APIPublished})
	w.add(home, &catalog.API{Name: "Pizza", Version: "3.0.0", Context: "/pizza/3.0.0", Status: catalog.APIRetired})
	w.add(home, &catalog.API{Name: "lost", Version: "1", Context: "/t/lost", Status: catalog.APIPublished})
	w.add(otherTenant, &catalog.API{Name: "Pizza", Version: "9", Context: "/t/other.example/pizza/9", Status: catalog.APIPublished})
	w.add(otherTenant, &catalog.API{Name: "Stolen", Version: "9", Context: "/pizza/0.9", Status: catalog.APIPublished})
	lone := w.add(home, &catalog.Application{Name: "Lone", Owner: "bob", Policy: "Unlimited"})
	w.add(home, &catalog.KeyMapping{Application: lone, ConsumerKey: "lone-key", KeyType: catalog.Production, Iss: iss})
	revoked := func(kind revocation.Kind, iss, id string) Record {
		rec := Record{Target: revocation.Target{Kind: kind, Iss: iss, ID: id}, Tenant: home, Exp: frozen + 3600}
		if kind.HasTime() {
			rec.NotAfter = frozen
		}
		return rec
	}
	s := w.state(t)
	type row struct {
		name    string
		state   *State
		by      Explainer
		token   *token.Token
		request string
		failed  string
		facts   string // JSON, "" for those of no failed check
	}
	get := func(path string) string { return "GET " + path }
	const menu = "GET /pizza/1.0.0/menu"
	selfless := m.token(t, selfContained("/state/unblocked"))
	malformed := m.token(t, selfContained("/state/unblocked"), claims{"tierInfo": claims{"Silver": 1}})
	for _, tt := range []row{
		{"all is well", s, Explainer{}, m.token(t), menu, "", ""},
		{"path", s, Explainer{}, m.token(t), get("/a/../b"), "path", `{"reason":"path","path":"/a/../b","method":"GET"}`},
		{"another version", s, Explainer{}, m.token(t), get("/pizza/3.0.0/menu"), "api", `{"reason":"no_api","path":"/pizza/3.0.0/menu","nearest":[
			{"context":"/pizza/3.0.0","version":"3.0.0","name":"Pizza","note":"which is RETIRED"},
			{"context":"/pizza/1.0.0","version":"1.0.0","name":"Pizza"},{"context":"/pizza/2.0.0","version":"2.0.0","name":"Pizza"}]}`},
		{"a letter wrong", s, Explainer{}, m.token(t), get("/unsubscribe"), "api", `{"reason":"no_api","path":"/unsubscribe","nearest":[
			{"context":"/unsubscribed","version":"1","name":"unsubscribed"}]}`},
		{"not a context of the tenant", s, Explainer{}, m.token(t), get("/t/lost"), "api", `{"reason":"no_api","path":"/t/lost","nearest":[
			{"context":"/t/lost","version":"1","name":"lost","note":"which is not there, since its context is not one of its tenant's"}]}`},
		{"another environment", s, Explainer{Environments: []string{"us"}}, m.token(t), get("/eu"), "api", `{"reason":"no_api","path":"/eu","nearest":[
			{"context":"/eu","version":"1","name":"eu","note":"which is not deployed to the gateway's environments"}]}`},
		{"no API, no token", s, Explainer{}, nil, get("/pizza/3.0.0/menu"), "api", `{"reason":"no_api","path":"/pizza/3.0.0/menu"}`},
		{"no API, a token of no tenant", s, Explainer{}, m.token(t, claims{"iss": strangerKM}), get("/pizza/3"), "api", `{"reason":"no_api","path":"/pizza/3"}`},
		{"the other tenant's", s, Explainer{}, m.token(t, claims{"iss": otherKM}), get("/t/other.example/pizza/8"), "api",
			`{"reason":"no_api","path":"/t/other.example/pizza/8","nearest":[{"context":"/t/other.example/pizza/9","version":"9","name":"Pizza"},
			{"context":"/pizza/0.9","version":"9","name":"Stolen","note":"which is not there, since its context is not one of its tenant's"}]}`},
		{"method", s, Explainer{}, m.token(t), "PUT /pizza/1.0.0/order", "operation", `{"reason":"no_operation","method":"PUT","path":"/order","methods":["POST"]}`},
		{"target", s, Explainer{}, m.token(t), get("/pizza/1.0.0/menus"), "operation", `{"reason":"no_operation","method":"GET","path":"/menus","operations_total":8,
			"operations":["GET /menu","POST /order","GET /user","GET /both","GET /odd","GET /public","GET /order/{id}","GET /application"]}`},
		{"target of another tenant's", s, Explainer{}, m.token(t, claims{"iss": otherKM}), get("/pizza/1.0.0/menus"), "operation",
			`{"reason":"no_operation","method":"GET","path":"/menus"}`},
		{"no token", s, Explainer{}, nil, menu, "credentials", `{"reason":"no_credentials"}`},
		{"issuer", s, Explainer{}, m.token(t, claims{"iss": strangerKM}), menu, "issuer", `{"reason":"issuer","iss":"https://stranger.example.com","known":false}`},
		{"disabled", s, Explainer{}, m.token(t, claims{"iss": disabledKM}), menu, "issuer",
			`{"reason":"issuer","iss":"https://disabled.example.com","known":true,"enabled":false,"key_manager":"off","tenant":"carbon.super"}`},
		{"jti", w.state(t, revoked(revocation.KindToken, iss, "at-1")), Explainer{}, m.token(t), menu, "revocation",
			`{"reason":"revoked","kind":"token","claim":"jti","identifier":"at-1","exp":EXP}`},
		{"client", w.state(t, revoked(revocation.KindClient, renamingKM, "cid-key")), Explainer{},
			m.token(t, claims{"iss": renamingKM, "azp": "azp-key", "cid": "cid-key"}), menu, "revocation",
			`{"reason":"revoked","kind":"client","claim":"client_id","identifier":"cid-key","exp":EXP,"not_after":NOW,"iat":IAT}`},
		{"tenant", w.state(t, revoked(revocation.KindTenant, "", home.Domain)), Explainer{}, m.token(t), menu, "revocation",
			`{"reason":"revoked","kind":"tenant","claim":"tenant","identifier":"carbon.super","exp":EXP,"not_after":NOW,"iat":IAT}`},
		{"nothing known", NewState(StateConfig{}), Explainer{}, m.token(t), menu, "freshness", `{"reason":"stale"}`},
		{"revocations only", revocationsOnly(t), Explainer{}, m.token(t), menu, "catalog", `{"reason":"no_catalog","claims":"claims-first"}`},
		{"claims", s, Explainer{}, m.token(t, claims{"aut": 1}), menu, "claims", `{"reason":"malformed_claims","error":"a claim of the token has the wrong type: aut is not a string"}`},
		{"token type", s, Explainer{}, m.token(t), get("/pizza/1.0.0/application"), "token_type",
			`{"reason":"token_type","user_type":"APPLICATION_USER","authentication":"Application"}`},
		{"another tenant's API", s, Explainer{}, m.token(t), get("/t/other.example/theirs"), "api_tenant",
			`{"reason":"no_subscription","token_tenant":"carbon.super","other_tenant":true,"context":"/t/other.example/theirs"}`},
		{"carried", s, Explainer{}, m.token(t, claims{"subscribedAPIs": []any{}}), menu, "token_subscriptions",
			`{"reason":"malformed_claims","error":"a claim of the token has the wrong type: subscribedAPIs without application"}`},
		{"carried tier", s, Explainer{}, malformed, get("/state/unblocked"), "policy",
			`{"reason":"malformed_claims","policy":"Silver","error":"a claim of the token has the wrong type: Silver is not an object"}`},
		{"key", s, Explainer{}, m.token(t, claims{"azp": "cid-key"}), menu, "key_mapping",
			`{"reason":"no_key_mapping","consumer_key":"cid-key","iss":"https://km.example.com","other_issuers":["https://renaming.example.com"]}`},
		{"application", s, Explainer{}, m.token(t, claims{"azp": "orphan-key"}), menu, "application",
			`{"reason":"no_application","uuid":"ORPHAN"}`},
		{"another version is subscribed", s, Explainer{}, m.token(t), get("/pizza/2.0.0"), "subscription",
			`{"reason":"no_subscription","application":"Mobile","application_uuid":"MOBILE","context":"/pizza/2.0.0","version":"2.0.0",
			"other_versions":[{"context":"/pizza/1.0.0","version":"1.0.0","name":"Pizza"}],"subscriptions_total":21}`},
		{"no subscription at all", s, Explainer{}, m.token(t, claims{"azp": "lone-key"}), get("/unsubscribed"), "subscription",
			`{"reason":"no_subscription","application":"Lone","application_uuid":"LONE","context":"/unsubscribed","version":"1","subscriptions_total":0}`},
		{"carries another", s, Explainer{}, selfless, get("/unsubscribed"), "subscription",
			`{"reason":"no_subscription","context":"/unsubscribed","version":"1","subscriptions":[{"context":"/state/unblocked","version":"1","name":"state/unblocked"}],"subscriptions_total":1}`},
		{"carries another, claims only", s, Explainer{Claims: ClaimsOnly}, selfless, get("/unsubscribed"), "subscription",
			`{"reason":"no_subscription","path":"/unsubscribed","subscriptions":[{"context":"/state/unblocked","version":"1","name":"state/unblocked"}],"subscriptions_total":1}`},
		{"policy", s, Explainer{}, m.token(t), get("/no-tier"), "policy",
			`{"reason":"no_policy","application":"Unlimited","subscription":"Missing","missing":[{"kind":"subscription","name":"Missing"}]}`},
		{"state", s, Explainer{}, m.token(t), get("/state/on_hold"), "subscription_state",
			`{"reason":"subscription_inactive","state":"ON_HOLD","key_type":"PRODUCTION","application":"Mobile","application_uuid":"MOBILE","application_status":"active"}`},
		{"application is blocked", s, Explainer{}, m.token(t, claims{"azp": "blocked-key"}), menu, "subscription_state",
			`{"reason":"subscription_blocked","state":"BLOCKED","key_type":"PRODUCTION","application":"Blocked","application_uuid":"BLOCKED-UUID","application_status":"blocked"}`},
		{"scope", s, Explainer{}, m.token(t), get("/pizza/1.0.0/order/7"), "scope", `{"reason":"scope","needed":["order:read"],"present":["read","order:write"]}`},
		{"the API as a whole", s, Explainer{AnyOperation: true}, m.token(t), " /pizza/1.0.0", "", ""},
		{"the API as a whole, without a subscription", s, Explainer{AnyOperation: true}, m.token(t, claims{"azp": "lone-key"}), " /pizza/1.0.0", "subscription",
			`{"reason":"no_subscription","application":"Lone","application_uuid":"LONE","context":"/pizza/1.0.0","version":"1.0.0","subscriptions_total":0}`},
	} {
		method, path, _ := strings.Cut(tt.request, " ")
		e := tt.by.Explain(tt.state, tt.token, Request{Method: method, Path: path}, frozen)
		failed, got := "", map[string]any(nil)
		for _, c := range e.Checks {
			if c.Result == Failed {
				failed = c.Name
				b, err := json.Marshal(c.Facts)
				must(t, err)
				must(t, json.Unmarshal(b, &got))
			}
		}
		if failed != tt.failed {
			t.Errorf("%s: %q failed (%s), want %q", tt.name, failed, e.Authorization.Reason, tt.failed)
			continue
		}
		if failed == "" {
			continue
		}
		text := strings.NewReplacer("ORPHAN", uuidOf(9999), "EXP", fmt.Sprint(frozen+3600), "NOW", fmt.Sprint(frozen), "IAT", fmt.Sprint(frozen-60), `"MOBILE"`, uuidNamed(w, "Mobile"),
			`"LONE"`, uuidNamed(w, "Lone"), `"BLOCKED-UUID"`, uuidNamed(w, "Blocked")).Replace(tt.facts)
		var want map[string]any
		if err := json.Unmarshal([]byte(text), &want); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}

	e := Explainer{AnyOperation: true}.Explain(s, m.token(t), Request{Path: "/pizza/1.0.0"}, frozen)
	for _, name := range []string{"operation", "token_type", "scope", "freshness"} {
		if c := check(e, name); c.Result != NotLooked {
			t.Errorf("%s is looked at, of an API as a whole: %+v", name, c)
		}
	}
	e = Explainer{}.Explain(s, m.token(t), Request{Method: "GET", Path: "/pizza/1.0.0/public"}, frozen)
	for _, name := range CheckNames[slices.Index(CheckNames, "credentials"):] {
		if c := check(e, name); c.Result != NotLooked {
			t.Errorf("%s is looked at where no token is needed: %+v", name, c)
		}
	}
	e = Explainer{}.Explain(w.state(t, revoked(revocation.KindToken, iss, "at-1")), m.token(t), Request{Method: "GET", Path: "/pizza/1.0.0/menu"}, frozen)
	if got, want := check(e, "revocation").Detail, `The token's jti "at-1" was revoked: kind token; the entry is kept until `+stamp(frozen+3600)+`.`; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}

func uuidNamed(w *world, name string) string {
	for _, e := range w.entities {
		if a, ok := e.(*catalog.Application); ok && a.Name == name {
			return `"` + a.UUID + `"`
		}
	}
	panic(name)
}

// A replica tells of its age, and of what it is set to past that of the path.
func TestExplainFreshness(t *testing.T) {
	t.Parallel()
	m := newMint(t)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		tok := m.token(t)
		r, err := New(Config{
			Source: sourceOf(w), Staleness: Staleness{Max: time.Minute}, Routes: []Route{{Path: "/eu", Staleness: Staleness{Max: time.Hour, Then: Introspect}}},
		})
		must(t, err)
		at := func(path string) Explanation {
			t.Helper()
			req := Request{Method: "GET", Path: path}
			e := r.Explain(tok, req)
			a := r.Authorize(tok, req)
			if a.Authorized != e.Authorization.Authorized || a.Reason != e.Authorization.Reason || a.Age != e.Authorization.Age {
				t.Errorf("%s: Authorize says %q, Explain %q", path, a.Reason, e.Authorization.Reason)
			}
			return e
		}
		if c := check(at("/eu"), "freshness"); c.Result != Failed || c.Facts["then"] != "deny" {
			t.Errorf("nothing known: %+v", c)
		}
		must(t, r.cfg.Source.Load(t.Context(), r.state))
		r.rescope()
		r.age.freshen(r.now())
		time.Sleep(3 * time.Second)
		c := check(at("/pizza/1.0.0/menu"), "freshness")
		if diff := cmp.Diff(map[string]any{"age_seconds": int64(3), "max_seconds": int64(60), "then": "deny"}, c.Facts); diff != "" || c.Result != Passed {
			t.Errorf("%s (-want +got):\n%s", c.Result, diff)
		}
		time.Sleep(time.Minute)
		c = check(at("/pizza/1.0.0/menu"), "freshness")
		if c.Result != Failed || c.Facts["age_seconds"] != int64(63) {
			t.Errorf("stale: %+v", c)
		}
		time.Sleep(time.Hour)
		if c = check(at("/eu"), "freshness"); c.Result != Passed || c.Facts["then"] != "introspect" || r.Explain(tok, Request{Path: "/eu"}).Authorization.Outcome != Ask {
			t.Errorf("the issuer is to be asked: %+v", c)
		}
	})
}

// sourceOf loads a world.
func sourceOf(w *world) Source { return worldSource{w} }

type worldSource struct{ *world }

func (w worldSource) Load(_ context.Context, s *State) error {
	return s.Load(revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) error {
		for _, e := range w.entities {
			l.Entity(e)
		}
		return nil
	})
}

func (worldSource) Events(context.Context, revocation.Position) (Page, error) { return Page{}, ErrGone }

// api/explain.md has every check, in order, and what to do is there for every reason.
func TestExplainDocumented(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../explain.md")
	must(t, err)
	rest := string(page)
	for _, name := range CheckNames {
		_, after, ok := strings.Cut(rest, "| `"+name+"` |")
		if !ok {
			t.Fatalf("api/explain.md has no row for %q after those before it", name)
		}
		rest = after
	}
	for _, reason := range Reasons {
		if Next(reason) == "" || !strings.HasSuffix(Next(reason), ".") {
			t.Errorf("what to do for %q is %q", reason, Next(reason))
		}
		if !slices.ContainsFunc(CheckNames, func(name string) bool {
			return slices.Contains(checks[slices.Index(CheckNames, name)].reasons, reason)
		}) {
			t.Errorf("no check fails for %q", reason)
		}
	}
}

func TestDistance(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "abc", 0}, {"Abc", "aBC", 0}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"/pizza/1", "/piza/2", 2}} {
		if got := distance(tt.a, tt.b); got != tt.want || distance(tt.b, tt.a) != got {
			t.Errorf("distance of %q and %q is %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}

// A path may come with a query that does not belong there, and has a token: it is not told.
func TestExplainTellsNoQuery(t *testing.T) {
	t.Parallel()
	m, w := newMint(t), newWorld()
	s := w.state(t)
	const hidden = "s3cret"
	for _, path := range []string{
		"/pizza/1.0.0/menu?access_token=" + hidden, "/pizza/1.0.0/menu#" + hidden, "/nowhere?" + hidden, "?" + hidden, "/pizza/1.0.0?x#" + hidden,
		"/pizza/1.0.0/nowhere?" + hidden,
	} {
		for _, mode := range []ClaimsMode{ClaimsFirst, CatalogFirst, ClaimsOnly} {
			for _, method := range []string{"", "GET", "PUT"} {
				for _, tok := range []*token.Token{nil, m.token(t), m.token(t, selfContained("/state/unblocked"))} {
					req := Request{Method: method, Path: path}
					e := Explainer{Claims: mode, AnyOperation: method == ""}.Explain(s, tok, req, frozen)
					text, err := json.Marshal(e.Checks)
					must(t, err)
					if bytes.Contains(text, []byte(hidden)) || strings.Contains(e.Next, hidden) {
						t.Errorf("%s %s, %s: %s", method, path, mode, text)
					}
				}
			}
		}
	}
}
