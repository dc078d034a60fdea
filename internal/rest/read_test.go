package rest

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIfMatch(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		header []string
		ts     int64
		status int
	}{
		{nil, 0, 428},
		{[]string{"*"}, 0, 0},
		{[]string{" * "}, 0, 0},
		{[]string{Tag(1795209000123)}, 1795209000123, 0},
		{[]string{`"5", "7" , "6"`}, 7, 0},
		{[]string{`"5"`, `"7"`}, 7, 0},
		{[]string{`"a,b",,"7"`}, 7, 0},
		{[]string{`W/"9", "7"`}, 7, 0},
		{[]string{`W/"7"`}, 0, 412},
		{[]string{`w/"7"`}, 0, 412},
		{[]string{`"0"`}, 0, 412},
		{[]string{`"-7"`}, 0, 412},
		{[]string{`"07"`}, 0, 412},
		{[]string{`"7 "`}, 0, 412},
		{[]string{`"e7.1842.gz"`}, 0, 412},
		{[]string{`"99999999999999999999"`}, 0, 412},
		{[]string{`7`}, 0, 412},
		{[]string{`"7`}, 0, 412},
		{[]string{`"7" "8"`}, 0, 412},
		{[]string{`"7", *`}, 0, 412},
		{[]string{``}, 0, 412},
	} {
		r := request(t, "PUT", "/", "")
		r.Header["If-Match"] = tt.header
		ts, err := IfMatch(r)
		p, _ := errors.AsType[*Problem](err)
		if ts != tt.ts || (err != nil) != (tt.status != 0) || p != nil && (p.Status != tt.status || p.Slug != "" || p.Detail == "") {
			t.Errorf("%q: %d, %v, want %d, status %d", tt.header, ts, err, tt.ts, tt.status)
		}
	}
}

func TestNoneMatch(t *testing.T) {
	t.Parallel()
	const etag = `"e7.1842.gz"`
	for _, tt := range []struct {
		header []string
		etag   string
		want   bool
	}{
		{nil, etag, false},
		{[]string{etag}, etag, true},
		{[]string{"W/" + etag}, etag, true},
		{[]string{etag}, "W/" + etag, true},
		{[]string{"*"}, etag, true},
		{[]string{`"x", W/` + etag}, etag, true},
		{[]string{`"x"`, etag}, etag, true},
		{[]string{`"a,b",` + etag}, etag, true},
		{[]string{`"x"`}, etag, false},
		{[]string{"e7.1842.gz"}, etag, false},
		{[]string{`"e7.1842"`}, etag, false},
		{[]string{etag + ` "x"`}, etag, false},
	} {
		r := request(t, "GET", "/", "")
		r.Header["If-None-Match"] = tt.header
		if got := NoneMatch(r, tt.etag); got != tt.want {
			t.Errorf("%q has %s: %t, want %t", tt.header, tt.etag, got, tt.want)
		}
	}
}

func FuzzEntityTags(f *testing.F) {
	for _, s := range []string{`"7"`, `W/"7", "a,b"`, "*", `"`, "W/", `,,"a"`, "\"\xff\"", `"a" "b"`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		r := httptest.NewRequest("PUT", "/", nil)
		r.Header["If-Match"], r.Header["If-None-Match"] = []string{header}, []string{header}
		ts, err := IfMatch(r)
		if err == nil && ts != 0 && (!strings.Contains(header, Tag(ts)) || !NoneMatch(r, Tag(ts))) {
			t.Errorf("%q demands %d", header, ts)
		}
		if err == nil && ts == 0 && strings.Trim(header, " \t") != "*" {
			t.Errorf("%q matches all", header)
		}
	})
}

func TestNegotiate(t *testing.T) {
	t.Parallel()
	const none = Coding("none")
	for header, want := range map[string]Coding{
		"":                              Identity,
		"gzip":                          Gzip,
		"zstd":                          Zstd,
		"GZIP":                          Gzip,
		"x-gzip":                        Gzip,
		"gzip, zstd":                    Zstd,
		"gzip, deflate, br, zstd":       Zstd,
		"gzip;q=0.5, zstd":              Zstd, // C103
		"gzip, zstd;q=0.999":            Gzip,
		"gzip ; q=1.000 ,\tzstd ;Q=0.9": Gzip,
		"br":                            Identity,
		"br, identity;q=0":              none, // C102
		"identity;q=0":                  none,
		"*;q=0":                         none,
		"*;q=0, gzip;q=0.1":             Gzip,
		"*;q=0, identity;q=0.001":       Identity,
		"*":                             Zstd,
		"*, zstd;q=0":                   Gzip,
		"*;q=0.5, gzip;q=0.6":           Gzip,
		"gzip;q=0.001":                  Gzip,
		"gzip;q=0":                      Identity,
		"gzip;q=0.0, zstd;q=0.000":      Identity,
		"identity, gzip;q=0.5":          Identity,
		"identity;q=0.5, gzip;q=0.5":    Gzip,
		"gzip;q=2":                      Identity,
		"gzip;q=0.1234":                 Identity,
		"gzip;q":                        Identity,
		"gzip;level=9":                  Identity,
		"gzip zstd":                     Identity,
		"gzip,,zstd":                    Zstd,
		"identity;q=0, gz(ip":           Identity,
	} {
		r := request(t, "GET", "/", "", "Accept-Encoding", header)
		got, ok := Negotiate(r)
		if !ok {
			got = none
		}
		if got != want {
			t.Errorf("%q: %q, want %q", header, got, want)
		}
	}
	if got, ok := Negotiate(request(t, "GET", "/", "")); got != Identity || !ok {
		t.Errorf("without the field: %q, %t", got, ok)
	}
	if got, ok := Negotiate(request(t, "GET", "/", "", "Accept-Encoding", "gzip;q=0.1", "Accept-Encoding", "zstd")); got != Zstd || !ok {
		t.Errorf("in two fields: %q, %t", got, ok)
	}
}

func TestPageQuery(t *testing.T) {
	t.Parallel()
	const list = "applications tenant=a.example"
	cursor := newCursor(list, "41")
	for _, tt := range []struct {
		query string
		want  Query // zero: refused
		says  string
	}{
		{"", Query{"", 200}, ""},
		{"limit=1", Query{"", 1}, ""},
		{"limit=1000&tenant=a.example&cursor=" + cursor, Query{"41", 1000}, ""},
		{"limit=1001", Query{}, "limit"}, // C100
		{"limit=0", Query{}, "limit"},
		{"limit=-1", Query{}, "limit"},
		{"limit=", Query{}, "limit"},
		{"limit=010", Query{}, "limit"},
		{"limit=1e2", Query{}, "limit"},
		{"limit=99999999999999999999", Query{}, "limit"},
		{"limit=1&limit=1", Query{}, "limit"},
		{"tenant=a&tenant=b", Query{}, "tenant"},
		{"cursor=garbage", Query{}, "cursor"}, // C100
		{"cursor=", Query{}, "cursor"},
		{"cursor=" + newCursor("subscriptions", "41"), Query{}, "cursor"}, // C100
		{"cursor=" + newCursor("applications", "41"), Query{}, "cursor"},
		{"cursor=" + cursor[:len(cursor)-1], Query{}, "cursor"},
		{"cursor=" + cursor + "%0A", Query{}, "cursor"},
		{"cursor=" + newCursor(list, ""), Query{}, "cursor"},
		{"Limit=1", Query{}, "not known"},
		{"offset=7", Query{}, "not known"},
		{"limit=%zz", Query{}, "well-formed"},
		{"limit=1;tenant=a", Query{}, "well-formed"},
	} {
		r := request(t, "GET", "/v1/applications", "")
		r.URL.RawQuery = tt.query
		got, err := PageQuery(r, list, "tenant")
		p, _ := errors.AsType[*Problem](err)
		if got != tt.want || (p == nil) != (tt.says == "") || p != nil && (p.Status != 400 || p.Slug != "invalid-parameter" || !strings.Contains(p.Detail, tt.says)) {
			t.Errorf("%s: %+v, %v, want %+v", tt.query, got, err, tt.want)
		}
	}
}

var nextLink = regexp.MustCompile(`^<([^>]*)>; rel="next"$`)

// Whoever follows the links sees every row once.
func TestPages(t *testing.T) {
	t.Parallel()
	const list = "numbers"
	h := Handler(func(w http.ResponseWriter, r *http.Request) error {
		q, err := PageQuery(r, list, "name")
		if err != nil {
			return err
		}
		after, _ := strconv.Atoi(q.After)
		var items []int
		for n := after + 1; n <= 7 && len(items) < q.Limit; n++ {
			items = append(items, n)
		}
		next := ""
		if n := len(items); n > 0 && items[n-1] < 7 {
			next = strconv.Itoa(items[n-1])
		}
		return WritePage(w, r, list, items, next)
	})
	var pages []string
	target := "/v1/numbers%2F?name=%C3%A9%26&limit=3"
	for target != "" && len(pages) < 10 {
		w := httptest.NewRecorder()
		r := request(t, "GET", target, "")
		h.ServeHTTP(w, r)
		if r.URL.Query().Get("name") != "é&" || r.URL.EscapedPath() != "/v1/numbers%2F" || w.Code != 200 {
			t.Fatalf("%s: %d %s", target, w.Code, w.Body)
		}
		body := w.Body.String()
		target = ""
		if link := nextLink.FindStringSubmatch(w.Header().Get("Link")); link != nil {
			target = link[1]
			u, err := url.Parse(target)
			if err != nil {
				t.Fatal(err)
			}
			body = strings.Replace(body, u.Query().Get("cursor"), "CURSOR", 1)
		}
		pages = append(pages, body)
	}
	want := []string{`{"items":[1,2,3],"next_cursor":"CURSOR"}`, `{"items":[4,5,6],"next_cursor":"CURSOR"}`, `{"items":[7]}`}
	if diff := cmp.Diff(want, pages); diff != "" {
		t.Errorf("pages (-want +got):\n%s", diff)
	}

	w := httptest.NewRecorder()
	if err := WritePage(w, request(t, "GET", "/", ""), list, []int(nil), ""); err != nil || w.Body.String() != `{"items":[]}` || w.Header().Get("Link") != "" {
		t.Errorf("%v, an empty list is %s", err, w.Body)
	}
}

func FuzzCursor(f *testing.F) {
	f.Add("list", "key", newCursor("list", "key"))
	f.Add("a", "", "AQAAAAAAAAAAeA")
	f.Fuzz(func(t *testing.T, list, key, cursor string) {
		got, ok := openCursor(newCursor(list, key), list)
		if ok != (key != "") || ok && got != key {
			t.Errorf("%q came back as %q, %t", key, got, ok)
		}
		if key, ok := openCursor(cursor, list); ok && newCursor(list, key) != cursor {
			t.Errorf("%q is a cursor for %q", cursor, key)
		}
		if _, ok := openCursor(newCursor(list+"x", key), list); ok {
			t.Error("a cursor of another list is taken")
		}
	})
}
