package rest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
)

// Whatever text a problem is given, it is the document that RFC 9457 wants, and the text
// is nowhere else.
func FuzzProblem(f *testing.F) {
	const id = "6f9619ff-8b86-d011-b42d-00c04fc964ff"
	f.Add(404, "", "", "", "", "", id, int64(0))
	f.Add(400, "invalid-request", "The request is not valid.", "See errors.", "#/name", "must not be empty", strings.ToUpper(id), int64(0))
	f.Add(503, "a\"b\\c\nd", "\xff\xfe", "</script>\u2028\x00\x7f", "#/\xed\xa0\x80", "\r\nSet-Cookie: a=b", "\r\nX: y", int64(1500))
	f.Add(401, "é", "\ufffd", strings.Repeat("x", 5000), "#", "😀", id+" ", int64(-1))
	f.Add(429, "", "", "", "", "", "6f9619ff08b86-d011-b42d-00c04fc964ff", int64(1))
	f.Fuzz(func(t *testing.T, status int, slug, title, detail, pointer, text, requestID string, retry int64) {
		if status < 200 || status > 599 { // net/http writes no others
			status = 500
		}
		p := &Problem{
			Slug: slug, Title: title, Status: status, Detail: detail, Errors: []catalog.FieldError{{Pointer: pointer, Detail: text}},
			Members: map[string]any{"seq": 7, "text": text}, RetryAfter: time.Duration(retry) * time.Millisecond, Cause: fmt.Errorf("cause %s", text),
		}
		answer := func(p *Problem) *exchange {
			x := newExchange()
			x.id = requestID
			Handler(func(http.ResponseWriter, *http.Request) error { return p }).ServeHTTP(x, nil)
			return x
		}
		x := answer(p)
		body := x.Body.Bytes()
		if x.Code != status || !utf8.Valid(body) {
			t.Fatalf("status %d, want %d: %q", x.Code, status, body)
		}

		// encoding/json has one character for what is not Unicode.
		seen := func(s string) string { return string([]rune(s)) }
		want := map[string]any{
			"type": "about:blank", "title": http.StatusText(status), "status": float64(status), "seq": 7.0, "text": seen(text),
			"errors": []any{map[string]any{"pointer": seen(pointer), "detail": seen(text)}},
		}
		if slug != "" {
			want["type"], want["title"] = seen(typeBase+slug), seen(title)
		}
		if detail != "" {
			want["detail"] = seen(detail)
		}
		if isUUID(requestID) {
			want["instance"] = "urn:uuid:" + strings.ToLower(requestID)
		}
		var got map[string]any
		if err := json.Unmarshal(body, &got); err != nil {
			t.Fatalf("%v: %q", err, body)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}

		header := x.Header().Clone()
		if n := header.Get("Content-Length"); n != strconv.Itoa(len(body)) {
			t.Errorf("Content-Length %s for %d bytes", n, len(body))
		}
		bare := answer(&Problem{Status: status, RetryAfter: p.RetryAfter}).Header()
		header.Del("Content-Length")
		bare.Del("Content-Length")
		if diff := cmp.Diff(bare, header); diff != "" {
			t.Errorf("the text is in the header (-without +with):\n%s", diff)
		}
		if after := header.Get("Retry-After"); after != "" {
			if n, err := strconv.Atoi(after); err != nil || n < 1 {
				t.Errorf("Retry-After %q", after)
			}
		} else if p.RetryAfter > 0 {
			t.Error("no Retry-After")
		}
	})
}
