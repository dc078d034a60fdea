package replica

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

func TestCleanPath(t *testing.T) {
	t.Parallel()
	for target, want := range map[string]string{
		"/":                            "/",
		"/?":                           "/",
		"/pizza/1.0.0/menu":            "/pizza/1.0.0/menu",
		"/pizza/1.0.0/menu/?a=b?c/../": "/pizza/1.0.0/menu/",
		"/a?//../%2F":                  "/a",
		"/.../.a/a./..b/a..":           "/.../.a/a./..b/a..",
		"/-._~!$&'()*+,=:@09azAZ":      "/-._~!$&'()*+,=:@09azAZ",
		"/users/alice%40example.com":   "/users/alice%40example.com",
		"/a%20b/caf%C3%A9/caf%c3%a9":   "/a%20b/caf%C3%A9/caf%c3%a9",
		"/%7Bid%7D%5b%5D%22%3C%3e%7c":  "/%7Bid%7D%5b%5D%22%3C%3e%7c",
		"/%21%24%26%27%28%2A%2B%2C%3D": "/%21%24%26%27%28%2A%2B%2C%3D",
		"/%F0%9F%8D%95":                "/%F0%9F%8D%95",
	} {
		got, ok := CleanPath(target)
		if got != want || !ok {
			t.Errorf("CleanPath(%q) = %q, %t, want %q", target, got, ok, want)
		}
	}
	for _, target := range []string{
		"", "?", "*", "menu", "http://h/menu", "?/menu", // not in origin form
		"//", "//host/menu", "/a//b", "/a//", "//?a", // empty segments
		"/.", "/..", "/./a", "/../a", "/a/.", "/a/..", "/a/./b", "/a/../b", "/a/..?b", "/./", "/../", // dots
		"/%2e", "/%2E%2E/a", "/.%2e/a", "/a/%2e./b", "/a%2eb", // and their spellings
		"/a%2Fb", "/a%2fb", "/%2f", "/a%5Cb", "/a%5cb", `/a\b`, "/a%00", "/a%3Bb", "/a%3bb", "/a%3Fb", "/a%23b", // delimiters
		"/a;b", "/a;b=c/d", "/;", "/..;/a", "/a#b", "/a#", // as they are
		"/%252e%252e/a", "/a%25b", "/a%2525", // twice
		"/%41", "/%7a", "/%30", "/%2D", "/%5f", "/%7E", // needless
		"/%", "/%2", "/a%", "/a%4", "/%zz", "/%2x", "/%x0", "/% 41", "/%u0041", "/%%32%65", // not hexadecimal
		"/a b", "/a\tb", "/a\r\nb", "/a\x00", "/\x7f", "/caf\u00e9", "/\xff", "/a\u2215b", // raw
		`/"`, "/<a>", "/a|b", "/a^b", "/a`b", "/{id}", "/a[0]", // not in a path
		"/a%0Ab", "/a%0d", "/a%1f", "/a%7F", "/a%C2%85", // control characters
		"/%C0%AF", "/%c0%ae", "/%E0%80%AF", "/%FF", "/%C3", "/%C3a", "/%ED%A0%80", "/%F4%90%80%80", // not UTF-8
	} {
		if got, ok := CleanPath(target); ok {
			t.Errorf("CleanPath(%q) = %q, want it refused", target, got)
		}
	}
}

// FuzzCleanPath: a path that is clean is the same however it is read.
func FuzzCleanPath(f *testing.F) {
	for _, s := range []string{
		"/", "/a?b", "/pizza/1.0.0/menu/", "/a%20b/caf%C3%A9", "/..;/a", "/%2e%2e/", "/a%2Fb", "/%252e", "//a", "/a/./b", "/a%40b:c@", `/a\..\b`, "/%c0%ae", "/a#b",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		got, ok := CleanPath(target)
		if !ok {
			if got != "" {
				t.Fatalf("CleanPath(%q) = %q, false", target, got)
			}
			return
		}
		if before, _, _ := strings.Cut(target, "?"); got != before {
			t.Fatalf("CleanPath(%q) = %q", target, got)
		}
		if again, ok := CleanPath(got); again != got || !ok {
			t.Fatalf("%q is clean once only: %q, %t", got, again, ok)
		}
		whole := unescaped(got)
		segments := strings.Split(got, "/")
		for i, s := range segments {
			var err error
			if segments[i], err = url.PathUnescape(s); err != nil {
				t.Fatalf("segment %q of %q: %v", s, got, err)
			}
		}
		if !slices.Equal(segments, strings.Split(whole, "/")) {
			t.Fatalf("segments %q of %q, of the whole %q", segments, got, strings.Split(whole, "/"))
		}
		if strings.TrimSuffix(path.Clean(whole), "/") != strings.TrimSuffix(whole, "/") || strings.Contains(whole, "//") {
			t.Fatalf("%q is the path %q for others", whole, path.Clean(whole))
		}
		if strings.ContainsAny(whole, "\\%;?#\x00\r\n") {
			t.Fatalf("%q has a delimiter: %q", got, whole)
		}
		u, err := url.ParseRequestURI(got)
		if err != nil || u.Path != whole || u.Host != "" || u.RawQuery != "" || u.EscapedPath() != got {
			t.Fatalf("net/url reads %q as %+v, %v", got, u, err)
		}
	})
}

func operations(targets ...string) []catalog.Operation {
	var list []catalog.Operation
	for _, s := range targets {
		verb, target, _ := strings.Cut(s, " ")
		list = append(list, catalog.Operation{Verb: verb, Target: target})
	}
	return list
}

func TestOperation(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		operations string
		want       map[string]string // request: target; "": none
	}{
		{"GET /menu, POST /menu, GET /order/{id}, DELETE /order/{id}, GET /order/last", map[string]string{
			"GET /menu": "GET /menu", "POST /menu": "POST /menu", "PUT /menu": "", "get /menu": "", "OPTIONS /menu": "", "GET /Menu": "",
			"HEAD /menu": "GET /menu", "HEAD /order/7": "GET /order/{id}", "HEAD /none": "",
			"GET /menu/": "", "GET ": "", "GET /": "", "GET /menu/a": "", "GET /men": "", "GET /menu2": "",
			"GET /order/7": "GET /order/{id}", "GET /order/last": "GET /order/last", "DELETE /order/last": "DELETE /order/{id}",
			"GET /order": "", "GET /order/": "", "GET /order/7/": "", "GET /order/last/": "", "GET /order/7/a": "", "GET /order/%20": "GET /order/{id}",
		}},
		// All is beside what is more special, but not for what many upstreams take for that.
		{"GET /*, GET /menu, HEAD /menu, GET /slash/, POST /menu", map[string]string{
			"GET ": "GET /*", "GET /": "GET /*", "GET /a": "GET /*", "GET /a/b/": "GET /*", "GET /menu/a": "GET /*",
			"GET /menu": "GET /menu", "GET /menu/": "", "HEAD /menu": "HEAD /menu", "HEAD /menu/": "", "HEAD /a": "GET /*",
			"GET /slash/": "GET /slash/", "GET /slash": "", "GET /slash/a": "GET /*", "POST /a": "",
		}},
		{"GET /, GET /a/*, GET /{x}/b, GET /{x}/*, GET /a/{y}/c", map[string]string{
			"GET ": "GET /", "GET /": "GET /", "GET /a": "GET /a/*", "GET /a/": "GET /a/*", "GET /a/b": "GET /a/*", "GET /a/b/c": "GET /a/{y}/c",
			"GET /a/b/d": "GET /a/*", "GET /z/b": "GET /{x}/b", "GET /z/b/c": "GET /{x}/*", "GET /z": "GET /{x}/*", "GET /ab": "GET /{x}/*",
		}},
		{"GET /files/{name}.json, GET /files/{name}, GET /files/{a}-{b}.tar.gz, GET /files/index.json, GET /v{major}.{minor}/*, GET /m/{a}-{b}-{c}", map[string]string{
			"GET /m/x-y-z": "GET /m/{a}-{b}-{c}", "GET /m/x--y--z": "GET /m/{a}-{b}-{c}", "GET /m/x-": "", "GET /m/x-y-": "", "GET /m/x--z": "", "GET /m/-": "",
			"GET /files/index.json": "GET /files/index.json", "GET /files/a.json": "GET /files/{name}.json", "GET /files/.json": "GET /files/{name}",
			"GET /files/a.jsonx": "GET /files/{name}", "GET /files/a-b.tar.gz": "GET /files/{a}-{b}.tar.gz", "GET /files/-b.tar.gz": "GET /files/{name}",
			"GET /files/a-.tar.gz": "GET /files/{name}", "GET /v1.2/x": "GET /v{major}.{minor}/*", "GET /v1./x": "", "GET /v.2/x": "", "GET /v12/x": "",
		}},
		// What stands for the same is the same.
		{"GET /a b/caf\u00e9, GET /x%40y, GET /at@, GET /a%2Fb, GET /bad%zz, GET /{a, GET /*/mid, GET /two//segments", map[string]string{
			"GET /a%20b/caf%C3%A9": "GET /a b/caf\u00e9", "GET /a%20b/caf%c3%a9": "GET /a b/caf\u00e9", "GET /x@y": "GET /x%40y", "GET /x%40y": "GET /x%40y",
			"GET /at%40": "GET /at@", "GET /at@": "GET /at@", "GET /a/b": "", "GET /%7Ba": "GET /{a", "GET /z/mid": "GET /*/mid", "GET /z/y/mid": "",
			"GET /two/segments": "",
		}},
		// Other kinds of API.
		{"QUERY hero, SUBSCRIBE /room/{id}, GET *", map[string]string{
			"QUERY /hero": "QUERY hero", "QUERY /": "", "SUBSCRIBE /room/1": "SUBSCRIBE /room/{id}", "GET /room/1": "GET *", "POST /hero": "",
		}},
		// Of two for the same, the first.
		{"GET /{a}, GET /{b}, POST /*, POST *, GET /-{a}, GET /-{b}", map[string]string{"GET /x": "GET /{a}", "POST /x": "POST /*", "GET /-x": "GET /-{a}"}},
	} {
		list := strings.Split(tt.operations, ", ")
		p := &place{api: &catalog.API{Operations: operations(list...)}}
		for request, want := range tt.want {
			method, rest, _ := strings.Cut(request, " ")
			if rest != "" {
				if _, ok := CleanPath(rest); !ok {
					t.Fatalf("%q is not clean", rest)
				}
			}
			op, ok := p.operation(method, unescaped(rest))
			got := ""
			if op != nil {
				got = op.Verb + " " + op.Target
			}
			if got != want || ok != (want != "") {
				t.Errorf("of %q: %s is for %q, %t, want %q", tt.operations, request, got, ok, want)
			}
		}
	}
	if op, ok := (&place{api: new(catalog.API)}).operation("BREW", "/anything/"); op != nil || !ok {
		t.Errorf("an API without operations: %v, %t", op, ok)
	}
}

// The tree finds what going through all targets would, each made a regular expression.
func TestOperationModel(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	pick := func(list ...string) string { return list[rng.IntN(len(list))] }
	// rank says how special a target is, by a digit for each segment.
	rank := func(target string) string {
		r := "0"
		for segment := range strings.SplitSeq(strings.Trim(target, "/"), "/") {
			switch segment {
			case "":
			case "aa{x}":
				r += "2"
			case "{x}b":
				r += "3"
			case "{x}":
				r += "4"
			case "*":
				r += "5"
			default:
				r += "1"
			}
		}
		return r
	}
	compiled := make(map[string]*regexp.Regexp)
	matches := func(target, rest string) bool {
		if target == "/" {
			return rest == "" || rest == "/"
		}
		if compiled[target] == nil {
			text, all := strings.CutSuffix(target, "/*")
			expr := strings.ReplaceAll(text, "{x}", "[^/]+")
			if all {
				expr += "(/.*)?"
			}
			compiled[target] = regexp.MustCompile("^" + expr + "$")
		}
		return compiled[target].MatchString(rest)
	}
	found := 0
	for range size(500, 2000) {
		var targets []string
		for range 1 + rng.IntN(8) {
			target := ""
			for range rng.IntN(4) {
				target += "/" + pick("a", "b", "ab", "{x}", "{x}b", "aa{x}")
			}
			target += pick("", "", "", "/", "/*")
			if target != "" && !slices.Contains(targets, target) {
				targets = append(targets, target)
			}
		}
		if len(targets) == 0 {
			continue
		}
		api := new(catalog.API)
		for _, target := range targets {
			api.Operations = append(api.Operations, catalog.Operation{Verb: "GET", Target: target})
		}
		p := &place{api: api}
		for range 10 {
			rest := ""
			for range rng.IntN(4) {
				rest += "/" + pick("a", "b", "ab", "c", "aab")
			}
			rest += pick("", "", "/")
			// The most special of those for the path or for its double with a slash more or less; if
			// that is for the double alone, there is none.
			double, slash := strings.CutSuffix(rest, "/")
			if !slash {
				double = rest + "/"
			}
			best := "9"
			for _, target := range targets {
				if matches(target, rest) || matches(target, double) {
					best = min(best, rank(target))
				}
			}
			i := slices.IndexFunc(targets, func(target string) bool { return rank(target) == best && matches(target, rest) })
			op, ok := p.operation("GET", rest)
			if ok != (i >= 0) || ok && op.Target != targets[i] {
				t.Fatalf("of %q: %q is for %+v, want number %d", targets, rest, op, i)
			}
			if ok {
				found++
			}
		}
	}
	if found < 500 {
		t.Errorf("only %d were found", found)
	}
}

func TestPlaceOf(t *testing.T) {
	t.Parallel()
	super, other := revocation.SuperTenant, revocation.Tenant{ID: 2, Domain: "other.example"}
	id := int32(0)
	api := func(tenant revocation.Tenant, context, status string, labels ...string) *catalog.API {
		id++
		return &catalog.API{
			Meta: catalog.Meta{ID: id, UUID: uuidOf(int(id)), Tenant: tenant}, Name: fmt.Sprint(id), Context: context, Version: "1", Status: status, GatewayLabels: labels,
		}
	}
	pizza := api(super, "/pizza/1", catalog.APIPublished, "eu", "us")
	extra := api(super, "/pizza/1/extra", catalog.APIRetired, "eu")
	hot := api(super, "/pizza/1/extra/hot", catalog.APIPublished, "us")
	otherHot := api(other, "/pizza/1/extra/hot", catalog.APIPublished, "us")
	shared := api(super, "/shared", catalog.APIDeprecated, "eu")
	otherShared := api(other, "/shared", catalog.APIBlocked, "eu", "us")
	otherOwn := api(other, "/t/other.example/shared", catalog.APIPublished, "eu")
	superOther := api(super, "/t/other.example/shared", catalog.APIPublished)
	strange := api(super, "/caf\u00e9@x/%7Bv%7D", catalog.APIPrototyped)
	again := api(super, "/caf%C3%A9%40x/%7bv%7d", catalog.APIPrototyped) // the same, and younger
	created := api(super, "/created", catalog.APICreated, "eu")
	slash := api(super, "/a%2Fb", catalog.APIPublished)
	all := []*catalog.API{pizza, extra, hot, otherHot, shared, otherShared, otherOwn, superOther, again, strange, created, slash}
	s := newShelves()
	for _, a := range all {
		s.change(a, false)
	}
	s.sort()
	check := func(path, only string, environments string, want *catalog.API, wantRest string) {
		t.Helper()
		var labels []string
		if environments != "" {
			labels = strings.Split(environments, ",")
		}
		var got *catalog.API
		p, rest := s.placeOf(unescaped(path), only, labels)
		if p != nil {
			got = p.api
		}
		if got != want || rest != wantRest {
			t.Errorf("%s where %q is served in %q: %+v, %q, want %+v, %q", path, only, environments, got, rest, want, wantRest)
		}
	}
	check("/pizza/1", "", "", pizza, "")
	check("/pizza/1/", "", "", pizza, "/")
	check("/pizza/1/menu/2", "", "", pizza, "/menu/2")
	check("/pizza/1/menu/2", super.Domain, "", pizza, "/menu/2")
	check("/pizza/1/menu/2", other.Domain, "", nil, "")
	check("/pizza/1/extra", "", "", pizza, "/extra") // retired
	check("/pizza/1/extra/hot", "", "", hot, "")
	check("/pizza/1/extra/hot", "", "eu", pizza, "/extra/hot")
	check("/pizza/1/extra/hot/x", other.Domain, "", otherHot, "/x")
	check("/pizza/1", "", "us", pizza, "")
	check("/pizza/1", "", "ap,us", pizza, "")
	check("/pizza/1", "", "ap", nil, "")
	check("/pizza/10", "", "", nil, "")
	check("/pizza", "", "", nil, "")
	check("/Pizza/1", "", "", nil, "")
	check("/", "", "", nil, "")
	check("/shared/x", "", "", shared, "/x")
	check("/shared/x", super.Domain, "", shared, "/x")
	check("/shared/x", other.Domain, "", otherShared, "/x")
	check("/shared/x", "third.example", "", nil, "")
	check("/shared/x", "", "us", nil, "")
	check("/t/other.example/shared", "", "", otherOwn, "")
	check("/t/other.example/shared", super.Domain, "", superOther, "")
	check("/caf%c3%a9%40x/%7Bv%7d/y", "", "", strange, "/y")
	check("/caf%C3%A9@x/%7Bv%7D", "", "", strange, "")
	check("/created", "", "", nil, "")
	check("/a/b", "", "", nil, "")
	check("/pizza/1/"+strings.Repeat("a/", 5000), "", "", pizza, "/"+strings.Repeat("a/", 5000))
	check("/"+strings.Repeat("a", 5000), "", "", nil, "")

	moved := *shared
	moved.Context = "/moved"
	s.change(&moved, false)
	check("/shared/x", "", "", nil, "")
	check("/moved", "", "", &moved, "")
	for _, a := range all {
		s.change(a, true)
	}
	if len(s.places) != 0 {
		t.Errorf("places that are left: %v", s.places)
	}
}

// A route is found by what the path stands for, as the API that it is for is.
func TestStalenessOfEncodedPaths(t *testing.T) {
	t.Parallel()
	strict := Staleness{time.Minute, Introspect}
	r, err := New(Config{Source: idle{}, Routes: []Route{{"/caf%C3%A9/", strict}, {"/a@b", strict}, {"/c%40d", strict}}})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{
		"/caf%C3%A9": true, "/caf%c3%a9": true, "/caf%c3%A9/x%20y": true, "/caf": false, "/caf%C3%A9s": false,
		"/a@b": true, "/a%40b/c": true, "/c@d": true, "/c%40d": true, "/A@b": false,
	} {
		if clean, ok := CleanPath(path); !ok || clean != path {
			t.Fatalf("%s is not clean", path)
		}
		if got := r.StalenessOf(path) == strict; got != want {
			t.Errorf("%s has the route's staleness: %t, want %t", path, got, want)
		}
	}
	_, err = New(Config{Source: idle{}, Tenant: "Acme.example", Routes: []Route{{Path: "/caf%C3%A9"}, {Path: "/caf%c3%a9/"}}})
	if err == nil || !strings.Contains(err.Error(), `Routes[1].Path is "/café", which another`) || !strings.Contains(err.Error(), `Tenant is "Acme.example"`) {
		t.Errorf("two routes that are one, and a tenant that can be none: %v", err)
	}
}

func BenchmarkCleanPath(b *testing.B) {
	for _, path := range []string{"/pizza/1.0.0/order/0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", "/pizza/1.0.0/caf%C3%A9"} {
		b.Run(path, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, ok := CleanPath(path); !ok {
					b.Fatal("refused")
				}
			}
		})
	}
}
