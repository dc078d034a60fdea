package gateway

import (
	"bytes"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

var update = flag.Bool("update", false, "write the golden files")

// Every header field that a backend could take for one of ours is gone, and ours arrive.
func TestHostileHeaders(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newService(), replica.Config{}, Config{})
		want := http.Header{
			"X-Rescind-Issuer": {iss}, "X-Rescind-Subject": {"alice"}, "X-Rescind-Client-Id": {"app%20one"}, "X-Rescind-Token-Id": {"at-1"},
			"X-Rescind-Scope": {"read write"}, "X-Rescind-Tenant": {"carbon.super"}, "X-Rescind-Application": {"Till%20%E2%84%961"},
			"X-Rescind-Application-Id": {uuidOf(40)}, "X-Rescind-Key-Type": {"PRODUCTION"}, "X-Rescind-Subscription-Tier": {"Gold"},
			"X-Rescind-Api": {"Shop:1.0.0"}, "X-Other": {"kept"},
		}
		spoofs := []string{"X-Other: kept"}
		for _, name := range append(slices.Clone(IdentityHeaders), "X-Rescind-Role", "X-Rescind-") {
			for _, spelt := range []string{
				name, strings.ToLower(name), strings.ToUpper(name), strings.ReplaceAll(name, "-", "_"), strings.ReplaceAll(name, "-", "."),
				strings.Replace(name, "-", "_", 1), strings.ToLower(strings.Replace(name, "Rescind-", "Rescind_", 1)),
			} {
				spoofs = append(spoofs, spelt+": admin")
			}
		}
		check := func(name string, got answer, want http.Header) {
			t.Helper()
			if got.behind == nil {
				t.Fatalf("%s: %d %s", name, got.status, got.body)
			}
			passed := got.behind.Header.Clone()
			for _, name := range []string{"Authorization", "Connection", "Accept"} {
				passed.Del(name)
			}
			if diff := cmp.Diff(want, passed); diff != "" {
				t.Errorf("%s: (-want +got)\n%s", name, diff)
			}
		}
		check("spoofs", w.get(t, append(spoofs, bearing(t1()))...), want)

		anonymous := http.Header{"X-Rescind-Api": {"Shop:1.0.0"}, "X-Other": {"kept"}}
		menu := func(fields ...string) answer {
			return w.send(t, "GET /shop/1.0.0/menu HTTP/1.1\nHost: a\n"+strings.Join(append(spoofs, fields...), "\n")+"\n\n")
		}
		check("where nobody is asked", menu(), anonymous)
		check("where nobody is asked, with a token that is not looked at", menu(bearing(t1())), anonymous)
		check("where nobody is asked, with a bad token", menu(bearing("x")), anonymous)
		check("where nobody is asked, with two credentials", menu(bearing("x"), bearing("y")), anonymous)

		// By Connection, a client could make a proxy behind us drop what we say.
		for sent, want := range map[string]string{
			"close, X-Rescind-Subject":                       "close",
			"X-Rescind-Subject,x_rescind_scope":              "",
			"Keep-Alive, x-rescind-api\nConnection: Upgrade": "Keep-Alive, Upgrade",
			"close\nConnection: X-RESCIND-TENANT ,":          "close",
		} {
			got := w.send(t, "GET /shop/1.0.0/orders HTTP/1.1\nHost: a\n"+bearing(t1())+"\nConnection: "+sent+"\n\n")
			if passed := strings.Join(got.behind.Header["Connection"], "; "); passed != want {
				t.Errorf("Connection: %q is passed on as %q, want %q", sent, passed, want)
			}
		}

		// Trailers arrive after the headers were looked at.
		got := w.send(t, "POST /shop/1.0.0/orders HTTP/1.1\nHost: a\nTransfer-Encoding: chunked\nTrailer: X-Other\n"+
			bearing(claim(with{"scope": "admin"}))+"\n\n1\nx\n0\nX-Other: 1\nX-Rescind-Subject: admin\n\n")
		if got.behind == nil || len(got.behind.Trailer) > 0 {
			t.Errorf("with a trailer: %d, passed on with %v", got.status, got.behind.Trailer)
		}
	})
}

// What is authorised is what is on the wire, or it is refused.
func TestWire(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newService(), replica.Config{}, Config{})
		good := bearing(t1())
		for _, tt := range []struct {
			name, request, fields string
			status                int
			challenge, code       string
		}{
			{"plain", "GET /shop/1.0.0/orders", good, 200, "", ""},
			{"with a query that looks like a path", "GET /shop/1.0.0/orders?to=/../%2e%2e//", good, 200, "", ""},
			{"dots", "GET /shop/1.0.0/menu/../orders", good, 400, "", "900900"},
			{"dots out of where anybody may go", "GET /shop/1.0.0/menu/%2e%2e/orders", "", 400, "", "900900"},
			{"an encoded slash", "GET /shop/1.0.0%2forders", good, 400, "", "900900"},
			{"a NUL", "GET /shop/1.0.0/orders%00", good, 400, "", "900900"},
			{"two slashes", "GET /shop//1.0.0/orders", good, 400, "", "900900"},
			{"parameters", "GET /shop/1.0.0/menu;/orders", good, 400, "", "900900"},
			{"an absolute URL", "GET http://a/shop/1.0.0/orders", good, 400, "", "900900"},
			{"an absolute URL of elsewhere", "GET http://evil.example/shop/1.0.0/menu", "", 400, "", "900900"},
			{"CONNECT", "CONNECT a:443", good, 400, "", "900900"},
			{"CONNECT of a path", "CONNECT /shop/1.0.0/orders", good, 400, "", "900900"},
			{"all of the server", "GET *", good, 400, "", "900900"},
			{"another method", "DELETE /shop/1.0.0/orders", good, 403, "", "900908"},
			{"no such API", "GET /shop/2.0.0/orders", good, 403, "", "900908"},
			{"no such API, with a bad token", "GET /shop/2.0.0/orders", bearing("x"), 403, "", "900908"},

			{"the scheme in another case", "GET /shop/1.0.0/orders", "authorization: bEARER   " + t1(), 200, "", ""},
			{"no credentials", "GET /shop/1.0.0/orders", "", 401, bareChallenge, "900902"},
			{"empty credentials", "GET /shop/1.0.0/orders", "Authorization: ", 401, bareChallenge, "900902"},
			{"another scheme", "GET /shop/1.0.0/orders", "Authorization: Basic YTpi", 401, bareChallenge, "900902"},
			{"a scheme that begins alike", "GET /shop/1.0.0/orders", "Authorization: Bearerx " + t1(), 401, bareChallenge, "900902"},
			{"a token without its scheme", "GET /shop/1.0.0/orders", "Authorization: " + t1(), 401, bareChallenge, "900902"},
			{"the scheme alone", "GET /shop/1.0.0/orders", "Authorization: Bearer", 401, invalidChallenge, "900901"},
			{"a tab", "GET /shop/1.0.0/orders", "Authorization: Bearer \t" + t1(), 401, invalidChallenge, "900901"},
			{"two fields", "GET /shop/1.0.0/orders", good + "\n" + good, 401, invalidChallenge, "900901"},
			{"two fields of two schemes", "GET /shop/1.0.0/orders", "Authorization: Basic YTpi\n" + good, 401, invalidChallenge, "900901"},
			{"two in a field", "GET /shop/1.0.0/orders", good + ", Bearer " + t1(), 401, invalidChallenge, "900901"},
			{"in the query", "GET /shop/1.0.0/orders?access_token=" + t1(), "", 401, bareChallenge, "900902"},
			{"in the body", "GET /shop/1.0.0/orders", "Content-Type: application/x-www-form-urlencoded\nContent-Length: 14\n\naccess_token=x", 401, bareChallenge, "900902"},
		} {
			end := "\n\n"
			if strings.Contains(tt.fields, "\n\n") {
				end = ""
			}
			if tt.fields != "" {
				tt.fields = "\n" + tt.fields
			}
			got := w.send(t, tt.request+" HTTP/1.1\nHost: a\nConnection: close"+tt.fields+end)
			if got.status != tt.status || got.header.Get("WWW-Authenticate") != tt.challenge || (got.behind != nil) != (tt.status == 200) ||
				tt.code != "" && !strings.HasPrefix(got.body, `{"code":"`+tt.code+`"`) {
				t.Errorf("%s: %d %s %s, want %d %q %s", tt.name, got.status, got.header, got.body, tt.status, tt.challenge, tt.code)
			}
		}
	})
}

func TestHandler(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newService(), replica.Config{}, Config{})
		got := w.get(t, bearing(t1()))
		own := httptest.NewRequest("GET", "/shop/1.0.0/orders", nil)
		own.Header = http.Header{"Authorization": {"Bearer " + t1()}, "X-Rescind-Subject": {"spoof"}}
		before := own.Header.Clone()
		w.server.Handler.ServeHTTP(httptest.NewRecorder(), own)
		if diff := cmp.Diff(before, own.Header); diff != "" {
			t.Errorf("the handler has changed the request that it was given: (-want +got)\n%s", diff)
		}
		d, ok := FromContext(got.behind.Context())
		if !ok || !d.Allowed || d.Token.Subject != "alice" || d.API.Name != "Shop" || d.Outcome != replica.Valid {
			t.Errorf("FromContext = %+v, %t", d, ok)
		}
		if _, ok := FromContext(t.Context()); ok {
			t.Error("there is a decision in another context")
		}
	})
}

// The answers of all codes, as they go out.
func TestAnswers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newService()
		w := start(t, s, replica.Config{}, Config{Realm: "shop"})
		subscription, api := *s.entities[uuidOf(50)].(*catalog.Subscription), *s.entities[uuidOf(30)].(*catalog.API)
		in := func(state string) {
			subscription.State = state
			s.change(t, catalog.Updated, &subscription)
		}
		var out bytes.Buffer
		show := func(name, request string, fields ...string) {
			got := w.send(t, request+" HTTP/1.1\nHost: a\n"+strings.Join(append(fields, "\n"), "\n"))
			fmt.Fprintf(&out, "# %s\n%d\n", name, got.status)
			got.header.Del("Date")
			if err := got.header.Write(&out); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&out, "\n%s\n\n", got.body)
		}
		const get = "GET /shop/1.0.0/orders"
		show("a path with two readings", get+"//", bearing(t1()))
		show("no credentials", get)
		show("expired", get, bearing(claim(with{"iat": time.Now().Unix() - 900, "exp": time.Now().Unix() - 600})))
		show("no scope", "POST /shop/1.0.0/orders", bearing(t1()))
		show("no such API", "GET /nowhere", bearing(t1()))
		in(catalog.Blocked)
		show("a blocked subscription", get, bearing(t1()))
		in(catalog.OnHold)
		show("a subscription on hold", get, bearing(t1()))
		in(catalog.Unblocked)
		api.Operations = []catalog.Operation{{Target: "/orders", Verb: "GET", AuthType: "Application"}}
		s.change(t, catalog.Updated, &api)
		show("a token of a user", get, bearing(t1()))
		api.Operations = []catalog.Operation{{Target: "/orders", Verb: "GET", Scopes: []string{`a"b`, "größe", "c"}}}
		s.change(t, catalog.Updated, &api)
		show("scopes that are none", get, bearing(t1()))
		api.Status = catalog.APIBlocked
		s.change(t, catalog.LifecycleChanged, &api)
		show("a blocked API", get, bearing(t1()))
		s.change(t, catalog.Created, manager(14, "https://new.example"))
		api.Status = catalog.APIPublished
		s.change(t, catalog.LifecycleChanged, &api)
		show("no keys", get, bearing(claim(with{"iss": "https://new.example"})))
		api.Operations = nil
		s.change(t, catalog.Updated, &api)
		s.mu.Lock()
		s.down = true
		s.mu.Unlock()
		time.Sleep(10 * time.Minute)
		show("too little is known", get, bearing(t1()))

		path := filepath.Join("testdata", "answers.golden")
		if *update {
			if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want := must(os.ReadFile(path))
		if diff := cmp.Diff(string(want), out.String()); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	})
}

// Every code that the replica refuses with has words of its own, and every reason is known.
func TestReasonsAndDescriptions(t *testing.T) {
	t.Parallel()
	for _, reason := range slices.Concat(token.Reasons, token.RefusedReasons, replica.Reasons) {
		if !slices.Contains(Reasons, reason) {
			t.Errorf("%q is not among the reasons", reason)
		}
	}
	if slices.Contains(Reasons, "") || !slices.IsSorted(Reasons) || len(slices.Compact(slices.Clone(Reasons))) != len(Reasons) {
		t.Errorf("Reasons = %q", Reasons)
	}
	seen := make(map[string]bool)
	for code, description := range descriptions {
		if description == "" || seen[description] || code.HTTPStatus() < 400 {
			t.Errorf("%d: %q with status %d", code, description, code.HTTPStatus())
		}
		seen[description] = true
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	_, err := New(Config{})
	for _, want := range []string{"Replica", "Audiences", "URL and Issuers"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New(Config{}) = %v, want something about %s", err, want)
		}
	}
	r := must(replica.New(replica.Config{Source: newService()}))
	sound := Config{Replica: r, URL: "https://rescind.example.com", AnyAudience: true}
	if _, err := New(sound); err != nil {
		t.Fatal(err)
	}
	asked := Introspection{URL: "https://rescind.example.com/oauth2/introspect", ClientID: "gateway", ClientSecret: "hush"}
	for want, change := range map[string]func(*Config){
		"Audiences and AnyAudience":      func(c *Config) { c.Audiences = []string{"a"} },
		"Audiences has an empty one":     func(c *Config) { c.AnyAudience, c.Audiences = false, []string{"a", ""} },
		"http is for loopback":           func(c *Config) { c.URL = "http://rescind.example.com" },
		"must be a URL":                  func(c *Config) { c.URL = "rescind.example.com" },
		"no user, query":                 func(c *Config) { c.URL = "https://a:hush@rescind.example.com" },
		"must have no user, query and f": func(c *Config) { c.URL = "https://rescind.example.com?key=hush" },
		"Leeway is 2m1s":                 func(c *Config) { c.Leeway = 121 * time.Second },
		"Leeway is 1.5s":                 func(c *Config) { c.Leeway = 1500 * time.Millisecond },
		"Realm":                          func(c *Config) { c.Realm = `a"b` },
		"Issuers: issuer":                func(c *Config) { c.Issuers = []token.Issuer{{Iss: "x"}} },
		"Networks":                       func(c *Config) { c.Networks = make([]netip.Prefix, 1) },
		"Introspection: URL":             func(c *Config) { i := asked; i.URL = "http://rescind.example.com"; c.Introspection = &i },
		"ClientID and ClientSecret":      func(c *Config) { i := asked; i.ClientID = ""; c.Introspection = &i },
		"Timeout is -1s":                 func(c *Config) { i := asked; i.Timeout = -time.Second; c.Introspection = &i },
		"MaxConcurrent is -1":            func(c *Config) { i := asked; i.MaxConcurrent = -1; c.Introspection = &i },
		"make folder":                    func(c *Config) { c.Folder = "handler_test.go" },
	} {
		cfg := sound
		change(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hush") {
			t.Errorf("New = %v, want an error about %q, without the password", err, want)
		}
	}
	for _, url := range []string{"http://127.0.0.1:9443", "http://[::1]:9443", "http://localhost/x"} {
		cfg := sound
		cfg.URL = url
		if _, err := New(cfg); err != nil {
			t.Errorf("%s: %v", url, err)
		}
	}
}

// WriteError answers also what others decide, such as that there are too many requests.
func TestWriteErrorOfOthers(t *testing.T) {
	t.Parallel()
	w := httptest.NewRecorder()
	Decision{Status: 503, Authorization: replica.Authorization{Code: replica.CodeGeneral}}.WriteError(w)
	if w.Code != 503 || w.Header().Get("Retry-After") != "5" || w.Header().Get("Cache-Control") != "no-store" || !strings.Contains(w.Body.String(), `"900900"`) {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
}

// FuzzIdentity checks that nothing that a client says of itself gets through, and that values come
// back as they were.
func FuzzIdentity(f *testing.F) {
	f.Add("X-Rescind-Subject", "alice", "close, X-Rescind-Scope")
	f.Add("x_rescind.subject", "%41\x00é\r\nX: y", "X_RESCIND_,")
	f.Add("X-Rescin", " ", "rescind")
	f.Fuzz(func(t *testing.T, name, value, connection string) {
		h := http.Header{name: {"spoof"}, "Connection": {connection}}
		d := Decision{Allowed: true, Token: &token.Token{Subject: value}, tenant: revocation.SuperTenant.Domain}
		d.SetIdentity(h)
		for got, values := range h {
			plain := strings.ToLower(strings.NewReplacer("_", "-", ".", "-").Replace(got))
			if strings.HasPrefix(plain, "x-rescind-") && (values[0] == "spoof" && value != "spoof" || !slices.Contains(IdentityHeaders, got)) {
				t.Fatalf("%q gets through with %q", got, values)
			}
		}
		for _, option := range strings.Split(strings.Join(h["Connection"], ","), ",") {
			plain := strings.ToLower(strings.NewReplacer("_", "-", ".", "-").Replace(strings.Trim(option, " \t")))
			if strings.HasPrefix(plain, "x-rescind-") {
				t.Fatalf("Connection keeps %q", option)
			}
		}
		got := h.Get("X-Rescind-Subject")
		if strings.ContainsFunc(got, func(r rune) bool { return r <= ' ' || r > '~' }) {
			t.Fatalf("%q is %q: not a value", value, got)
		}
		if back, err := url.PathUnescape(got); err != nil || back != value {
			t.Fatalf("%q is %q, which means %q, %v", value, got, back, err)
		}
	})
}
