package rest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/pgtest"
)

type inner struct {
	Verb string `json:"verb"`
	N    int32  `json:"n"`
}

type Base struct {
	ID     int64             `json:"id"`
	Tenant revocation.Tenant `json:"tenant"`
}

type sample struct {
	Base
	Name     string            `json:"name"`
	Flag     bool              `json:"flag"`
	Keep     *bool             `json:"keep,omitempty"`
	Ref      *inner            `json:"ref"`
	List     []inner           `json:"list"`
	Texts    []string          `json:"texts"`
	Map      map[string]string `json:"map"`
	Any      map[string]any    `json:"any"`
	Raw      json.RawMessage   `json:"raw"`
	At       time.Time         `json:"at"`
	Bytes    []byte            `json:"bytes"`
	Small    uint8             `json:"small"`
	Real     float32           `json:"real"`
	Hidden   string            `json:"-"`
	Untagged string
}

func TestDecode(t *testing.T) {
	t.Parallel()
	yes := true
	full := sample{
		Base: Base{7, revocation.SuperTenant}, Name: "a", Flag: true, Keep: &yes, Ref: &inner{"GET", 1}, List: []inner{{"PUT", -2}},
		Texts: []string{"\u00e9\U0001f600"}, Map: map[string]string{"k": "v"}, Any: map[string]any{"x": []any{1.5, nil, true}},
		Raw: json.RawMessage(`{"a":[1]}`), At: time.Unix(0, 0).UTC(), Bytes: []byte("x"), Small: 255, Real: 0.5, Untagged: "u",
	}
	encoded, err := json.Marshal(full)
	if err != nil {
		t.Fatal(err)
	}
	deep := func(n int) string {
		return `{"any":{"x":` + strings.Repeat("[", n) + strings.Repeat("]", n) + `}}`
	}
	for _, tt := range []struct {
		name, body string
		want       string // "pointer: detail" of each error, or the whole value in Go syntax
	}{
		{"full", string(encoded), ""},
		{"empty object", " {} ", ""},
		{"nulls for what may be absent", `{"keep":null,"ref":null,"list":null,"map":null,"any":{"x":null}}`, ""},
		{"at the depth", deep(30), ""},
		{"surrogate pair", `{"name":"\ud83d\ude00 \\ud83d"}`, ""},
		{"escaped name", `{"\u006eame":"x"}`, ""},

		{"unknown", `{"nam":"x"}`, "#/nam: is not known here"},
		{"other case", `{"Name":"x"}`, "#/Name: is not known here"},
		{"other case, and right", `{"name":"x","NAME":"y"}`, "#/NAME: is not known here"},
		{"hidden", `{"Hidden":"x"}`, "#/Hidden: is not known here"},
		{"embedded struct", `{"Base":{}}`, "#/Base: is not known here"},
		{"unknown below", `{"list":[{"verb":"a"},{"a/b~c d%":1}]}`, "#/list/1/a~1b~0c%20d%25: is not known here"},
		{"long name", `{"` + strings.Repeat("x", 256) + `":1}`, "#/*: is not known here"},
		{"repeated", `{"name":"x","name":"x"}`, "#/name: is there twice"},
		{"repeated by escape", `{"name":"x","n\u0061me":1}`, "#/name: is there twice"},
		{"repeated in a map", `{"map":{"a":"b","a":"b"}}`, "#/map/a: is there twice"},
		{"repeated in any", `{"any":{"x":[{"a":1,"a":2}]}}`, "#/any/x/0/a: is there twice"},
		{"repeated in raw", `{"raw":{"a":1,"a":2}}`, "#/raw/a: is there twice"},
		{"number for text", `{"name":1}`, "#/name: must be a string"},
		{"null for text", `{"name":null}`, "#/name: must be a string"},
		{"null for a number", `{"id":null}`, "#/id: must be a whole number of at most 64 bits"},
		{"object for text", `{"name":{"a":1}}`, "#/name: must be a string"},
		{"array for text", `{"name":["a"]}`, "#/name: must be a string"},
		{"text for an object", `{"ref":"x"}`, "#/ref: must be an object"},
		{"array for an object", `{"tenant":[]}`, "#/tenant: must be an object"},
		{"object for an array", `{"list":{}}`, "#/list: must be an array"},
		{"text for a flag", `{"flag":"true"}`, "#/flag: must be true or false"},
		{"fraction", `{"id":1.0}`, "#/id: must be a whole number of at most 64 bits"},
		{"too great", `{"list":[{"n":2147483648}]}`, "#/list/0/n: must be a whole number of at most 32 bits"},
		{"negative", `{"small":-1}`, "#/small: must be a whole number of at most 8 bits, not negative"},
		{"text for a number", `{"real":"1"}`, "#/real: must be a number that 32 bits of floating point hold"},
		{"beyond all numbers", `{"any":{"x":1e400}}`, "#/any/x: must be a number that 64 bits of floating point hold"},
		{"no time", `{"at":"yesterday"}`, "#/at: has not the form that is wanted here"},
		{"no base64", `{"bytes":"%"}`, "#/bytes: has not the form that is wanted here"},
		{"several", `{"name":1,"x":1,"id":"1"}`, "#/name: must be a string; #/x: is not known here; #/id: must be a whole number of at most 64 bits"},
		{"too deep", deep(31), "#/any/x" + strings.Repeat("/0", 30) + ": must not be more than 32 deep"},
		{"much too deep", deep(20000), "#: must be one JSON object, and is malformed at byte 10011"},
		{"trailing", `{} {}`, "#: must be one JSON object, and is malformed at byte 4"},
		{"cut off", `{"name":"x"`, "#: must be one JSON object, and is malformed at byte 11"},
		{"comma", `{"name":"x",}`, "#: must be one JSON object, and is malformed at byte 13"},
		{"nothing", ``, "#: must be one JSON object, and is malformed at byte 0"},
		{"byte order mark", "\ufeff{}", "#: must be one JSON object, and is malformed at byte 1"},
		{"an array", `[{}]`, "#: must be an object"},
		{"null", `null`, "#: must be an object"},
		{"not UTF-8", "{\"name\":\"\xff\"}", "#: must be UTF-8"},
		{"half a pair", `{"name":"\ud83d"}`, "#: must have no half of a surrogate pair"},
		{"the other half", `{"name":"\\\udE00"}`, "#: must have no half of a surrogate pair"},
		{"as many objects as may be", `{"list":[` + strings.Repeat(`{},`, 9999) + `{}]}`, ""},
		{"too many objects", `{"list":[` + strings.Repeat(`{},`, 10000) + `{"n":"x"}]}`, "#/list: must have at most 10000 items"},
		{"two first halves", `{"name":"\ud83d\ud83d"}`, "#: must have no half of a surrogate pair"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var got sample
			err := Decode(httptest.NewRecorder(), request(t, "POST", "/", tt.body, "Content-Type", "application/json"), &got)
			if tt.want == "" {
				var want sample
				if err := json.Unmarshal([]byte(tt.body), &want); err != nil {
					t.Fatal(err)
				}
				if err != nil || !reflect.DeepEqual(got, want) { // what is so deep takes cmp.Diff hours
					t.Errorf("%v, %+v, want %+v", err, got, want)
				}
				return
			}
			p, ok := errors.AsType[*Problem](err)
			if !ok || p.Status != 400 || p.Slug != "invalid-request" || p.Detail == "" {
				t.Fatalf("%v, want a problem", err)
			}
			if diff := cmp.Diff(tt.want, catalog.Invalid(p.Errors).Error()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// The answer to a body is of bounded size, however much is wrong with it.
func TestDecodeIsBounded(t *testing.T) {
	t.Parallel()
	name := strings.Repeat("/", 255)
	nested := func(n int, inside string) string {
		return strings.Repeat(`{"`+name+`":`, n) + inside + strings.Repeat("}", n)
	}
	for _, body := range []string{
		`{"any":` + nested(100, "1") + "}",
		`{"any":` + nested(20, "{"+strings.Repeat(`"a":1,`, 1000)+`"a":1}`) + "}",
		`{` + strings.Repeat(`"a":1,`, 1000) + `"a":1}`,
	} {
		x := newExchange()
		Handler(func(w http.ResponseWriter, r *http.Request) error {
			return Decode(w, r, new(sample))
		}).ServeHTTP(x, request(t, "POST", "/", body, "Content-Type", "application/json"))
		if x.Code != 400 || x.Body.Len() > 16<<10 {
			t.Errorf("status %d, %d bytes", x.Code, x.Body.Len())
		}
	}
}

func TestDecodeMedia(t *testing.T) {
	t.Parallel()
	json := []string{"Content-Type", "application/json"}
	for _, tt := range []struct {
		name   string
		body   io.Reader
		length int64
		header []string
		status int
		add    string // header of the answer
	}{
		{"charset", strings.NewReader("{}"), 2, []string{"Content-Type", "application/json; charset=utf-8"}, 200, ""},
		{"capitals", strings.NewReader("{}"), 2, []string{"Content-Type", "Application/JSON"}, 200, ""},
		{"identity", strings.NewReader("{}"), 2, append(json, "Content-Encoding", "identity"), 200, ""},
		{"no type", strings.NewReader("{}"), 2, nil, 415, "Accept: application/json"},
		{"two types", strings.NewReader("{}"), 2, append(json, json...), 415, "Accept: application/json"},
		{"text", strings.NewReader("{}"), 2, []string{"Content-Type", "text/json"}, 415, "Accept: application/json"},
		{"C104", strings.NewReader("{}"), 2, append(json, "Content-Encoding", "br"), 415, "Accept-Encoding: identity"},
		{"gzip after identity", strings.NewReader("{}"), 2, append(json, "Content-Encoding", "identity", "Content-Encoding", "gzip"), 415, "Accept-Encoding: identity"},
		{"largest", strings.NewReader(`{}` + strings.Repeat(" ", MaxBody-2)), -1, json, 200, ""},
		{"too large", strings.NewReader(`{}` + strings.Repeat(" ", MaxBody-1)), -1, json, 413, "Connection: close"},
		{"too large by its own word", brokenReader{}, MaxBody + 1, json, 413, "Connection: close"},
		{"broken off", brokenReader{}, -1, json, 400, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := request(t, "POST", "/", "", tt.header...)
			r.Body, r.ContentLength = io.NopCloser(tt.body), tt.length
			x := newExchange()
			Handler(func(w http.ResponseWriter, r *http.Request) error { return Decode(w, r, new(sample)) }).ServeHTTP(x, r)
			if x.Code != tt.status {
				t.Errorf("status %d, want %d: %s", x.Code, tt.status, x.Body)
			}
			if name, value, ok := strings.Cut(tt.add, ": "); ok && x.Header().Get(name) != value {
				t.Errorf("%s is %q, want %q", name, x.Header().Get(name), value)
			}
			if tt.status != 200 && tt.status != 400 && !strings.Contains(x.Body.String(), `"about:blank"`) {
				t.Errorf("body %s", x.Body)
			}
		})
	}
}

// A request may have a bound of its own, which counts for what is read before Decode too.
func TestLimitBody(t *testing.T) {
	t.Parallel()
	repeats := NewIdempotencyStore(pgtest.New(t), []authn.MasterKey{masterKey(t, "a")})
	decode := Idempotent(repeats)(Handler(func(w http.ResponseWriter, r *http.Request) error { return Decode(w, r, new(sample)) }))
	handler := Require(testAccounts, nil, Admin)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		decode.ServeHTTP(w, LimitBody(r, 2*MaxBody))
	}))
	for _, key := range []string{"", "k"} {
		for size, want := range map[int]int{2 * MaxBody: 200, 2*MaxBody + 1: 413} {
			r := sent{key: key, body: "{}" + strings.Repeat(" ", size-2)}.request(t)
			r.Header.Set("Content-Type", "application/json")
			x := newExchange()
			handler.ServeHTTP(wrapped(x), r)
			if x.Code != want || want == 413 && !strings.Contains(x.Body.String(), "2097152 bytes") {
				t.Errorf("key %q, %d bytes: status %d, want %d: %s", key, size, x.Code, want, x.Body)
			}
		}
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func TestJSON(t *testing.T) {
	t.Parallel()
	w := httptest.NewRecorder()
	if err := JSON(w, 201, map[string]string{"a": "<é>"}); err != nil {
		t.Fatal(err)
	}
	if w.Code != 201 || w.Body.String() != `{"a":"<é>"}` || w.Header().Get("Content-Type") != "application/json" ||
		w.Header().Get("Cache-Control") != "no-store" || w.Header().Get("Content-Length") != fmt.Sprint(w.Body.Len()) {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
	w = httptest.NewRecorder()
	w.Header().Set("Cache-Control", "private, no-cache")
	if err := JSON(w, 200, 1); err != nil || w.Header().Get("Cache-Control") != "private, no-cache" {
		t.Errorf("%v %v", err, w.Header())
	}
	w = httptest.NewRecorder()
	if err := JSON(w, 200, func() {}); err == nil || w.Flushed || len(w.Header()) > 0 {
		t.Errorf("%v, header %v, want an error before anything is written", err, w.Header())
	}
}

// What is accepted is what encoding/json reads, and means the same in every reader.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"name":"x","list":[{"verb":"a","n":1}],"any":{"a":[1,{"b":null}]},"keep":false,"at":"2026-01-01T00:00:00Z"}`,
		`{"name":"x","Name":"y"}`, `{"a":1,"a":2}`, `[1]`, `{"name":"\ud800"}`, `{"raw":[[[[[]]]]],"bytes":"eA=="}`, `{"ref":null,"x":{`, "{\"\xff\":1}",
		`{"any":{"x":1e999}}`, `{"real":3.5e38,"small":256,"id":-0}`, `{"map":{"":""}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest("POST", "/", bytes.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		var got sample
		err := Decode(httptest.NewRecorder(), r, &got)
		if err != nil {
			p, ok := errors.AsType[*Problem](err)
			if !ok || p.Status != 400 || p.Cause != nil {
				t.Fatalf("%v, cause %v", err, errors.Unwrap(err))
			}
			for _, e := range p.Errors {
				if !strings.HasPrefix(e.Pointer, "#") || e.Detail == "" || len(e.Pointer) > 2*maxPointerBytes+3*maxNameBytes {
					t.Errorf("%+v", e)
				}
			}
			return
		}
		dec := json.NewDecoder(bytes.NewReader(body))
		dec.DisallowUnknownFields()
		var want sample
		if err := dec.Decode(&want); err != nil {
			t.Fatalf("encoding/json: %v", err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
		again, err := json.Marshal(got)
		if err != nil {
			return // a time out of range
		}
		r = httptest.NewRequest("POST", "/", bytes.NewReader(again))
		r.Header.Set("Content-Type", "application/json")
		if err := Decode(httptest.NewRecorder(), r, new(sample)); err != nil {
			t.Errorf("%s, written again: %v", again, err)
		}
	})
}

// Many items cost no more than their number.
func TestDecodeManyItems(t *testing.T) {
	t.Parallel()
	for _, body := range []string{
		`{"texts":["` + strings.Repeat(`","`, MaxBody/12) + `"]}`,
		`{"any":{"x":[` + strings.Repeat(`1,`, MaxBody/8) + `1]}}`,
	} {
		if err := Decode(httptest.NewRecorder(), request(t, "POST", "/", body, "Content-Type", "application/json"), new(sample)); err != nil {
			t.Error(err)
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	api := catalog.API{Name: "a", Operations: make([]catalog.Operation, 100)}
	body, err := json.Marshal(api)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("strict", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			r := httptest.NewRequest("POST", "/", bytes.NewReader(body))
			r.Header.Set("Content-Type", "application/json")
			if err := Decode(httptest.NewRecorder(), r, new(catalog.API)); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("baseline/encoding", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := json.Unmarshal(body, new(catalog.API)); err != nil {
				b.Fatal(err)
			}
		}
	})
}
