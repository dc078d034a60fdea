package authn

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestForm(t *testing.T) {
	t.Parallel()
	tooLong := "token=" + strings.Repeat("x", MaxFormBytes-5)
	tests := []struct {
		name   string
		r      *http.Request
		status int
		code   string
		client string
	}{
		{"basic", postForm("token=t", "Authorization", basicOne), 200, "", "app one"},
		{"scheme in lower case", postForm("token=t", "Authorization", "basic YXBwLTI6U2VjcmV0LTI="), 200, "", "app-2"},
		{"two spaces behind the scheme", postForm("token=t", "Authorization", "Basic  YXBwLTI6U2VjcmV0LTI="), 200, "", "app-2"},
		{"basic for a client that may use the body", postForm("token=t", "Authorization", basicTwo), 200, "", "app-2"},
		{"body", postForm("token=t&client_id=app-2&client_secret=Secret-2"), 200, "", "app-2"},
		{"body not registered", postForm("client_id=app+one&client_secret=s3cr%3At%2B%2F%3D%25"), 401, InvalidClient, ""},
		{"public", postForm("client_id=spa-1"), 200, "", "spa-1"},
		{"public with an empty secret", postForm("client_id=spa-1&client_secret="), 200, "", "spa-1"},
		{"public with a secret", postForm("client_id=spa-1&client_secret=x"), 401, InvalidClient, ""},
		{"public by basic", postForm("", "Authorization", basicOf("spa-1:")), 401, InvalidClient, ""},
		{"public by a secret it once had", postForm("", "Authorization", basicOf("spa-2:left-over")), 401, InvalidClient, ""},
		{"confidential without its secret", postForm("client_id=app-2"), 401, InvalidClient, ""},
		{"unknown public", postForm("client_id=nobody"), 401, InvalidClient, ""},
		{"unknown", postForm("", "Authorization", basicOf("nobody:x")), 401, InvalidClient, ""},
		{"wrong", postForm("", "Authorization", basicWrong), 401, InvalidClient, ""},
		{"secret without an id", postForm("client_secret=Secret-2"), 401, InvalidClient, ""},
		{"nothing", postForm("token=t"), 401, InvalidClient, ""},
		{"not form-encoded", postForm("", "Authorization", "Basic YXBwIG9uZTpzM2NyOnQrLz0l"), 401, InvalidClient, ""},
		{"no colon", postForm("", "Authorization", "Basic bm9zZXBhcmF0b3I="), 401, InvalidClient, ""},
		{"no base64", postForm("", "Authorization", "Basic ####"), 401, InvalidClient, ""},
		{"NUL in the id", postForm("", "Authorization", basicOf("app-2%00:Secret-2")), 401, InvalidClient, ""},
		{"not UTF-8", postForm("", "Authorization", basicOf("app-2%FF:Secret-2")), 401, InvalidClient, ""},
		{"long id", postForm("", "Authorization", basicOf(strings.Repeat("a", 256)+":x")), 401, InvalidClient, ""},
		{"bearer", postForm("", "Authorization", "Bearer x"), 401, InvalidClient, ""},
		{"empty header", postForm("", "Authorization", ""), 401, InvalidClient, ""},
		{"bearer with an id", postForm("client_id=spa-1", "Authorization", "Bearer x"), 401, InvalidClient, ""},
		{"assertion", postForm("client_assertion=e30.e30.x&client_assertion_type=jwt"), 401, InvalidClient, ""},

		{"same id in the body", postForm("client_id=app-2", "Authorization", basicTwo), 200, "", "app-2"},
		{"another id in the body", postForm("client_id=spa-1", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"another id, and wrong", postForm("client_id=spa-1", "Authorization", basicWrong), 400, InvalidRequest, ""},
		{"basic and body", postForm("client_id=app-2&client_secret=Secret-2", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"basic and assertion", postForm("client_assertion=a", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"body and assertion", postForm("client_id=app-2&client_secret=Secret-2&client_assertion=a"), 400, InvalidRequest, ""},
		{"two headers", postForm("", "Authorization", basicOne, "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"in the URI", at("/revoke?client_id=app-2&client_secret=Secret-2", postForm("token=t")), 400, InvalidRequest, ""},
		{"in a damaged URI", at("/revoke?a;client%5Fsecret=Secret-2", postForm("token=t", "Authorization", basicTwo)), 400, InvalidRequest, ""},
		{"a token in the URI is not looked at", at("/revoke?token=t", postForm("", "Authorization", basicTwo)), 200, "", "app-2"},

		{"charset", typed("application/x-www-form-urlencoded; charset=UTF-8", postForm("", "Authorization", basicTwo)), 200, "", "app-2"},
		{"broken media parameter", typed("application/x-www-form-urlencoded; charset", postForm("", "Authorization", basicTwo)), 200, "", "app-2"},
		{"JSON", typed("application/json", postForm(`{"token":"t"}`, "Authorization", basicTwo)), 400, InvalidRequest, ""},
		{"no type", typed("", postForm("", "Authorization", basicTwo)), 400, InvalidRequest, ""},
		{"two types", postForm("", "Content-Type", formType, "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"gzip", postForm("", "Content-Encoding", "gzip", "Authorization", basicTwo), 415, InvalidRequest, ""},
		{"identity", postForm("", "Content-Encoding", "identity", "Authorization", basicTwo), 200, "", "app-2"},

		{"repeated", postForm("token=a&token=a", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"repeated, once empty", postForm("token=&token=a", "Authorization", basicTwo), 200, "", "app-2"},
		{"unknown repeated", postForm("foo=1&foo=2", "Authorization", basicTwo), 200, "", "app-2"},
		{"repeated id", postForm("client_id=app-2&client_id=app-2", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"semicolon", postForm("token=a;x=1", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"broken percent", postForm("token=%zz", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"NUL", postForm("token=%00", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"NUL in a name", postForm("%00=a", "Authorization", basicTwo), 400, InvalidRequest, ""},
		{"parameter not UTF-8", postForm("token=%FF", "Authorization", basicTwo), 400, InvalidRequest, ""},

		{"GET", httptest.NewRequest(http.MethodGet, "/revoke", nil), 405, InvalidRequest, ""},
		{"at the limit", postForm(tooLong[:MaxFormBytes], "Authorization", basicTwo), 200, "", "app-2"},
		{"above the limit", postForm(tooLong, "Authorization", basicTwo), 413, InvalidRequest, ""},
		{"above the limit, of unknown length", chunked(postForm(tooLong, "Authorization", basicTwo)), 413, InvalidRequest, ""},

		{"size before media type", typed("application/json", chunked(postForm(tooLong))), 413, InvalidRequest, ""},
		{"media type before syntax", typed("application/json", postForm("token=%zz")), 400, InvalidRequest, ""},
		{"syntax before authentication", postForm("token=%zz", "Authorization", basicWrong), 400, InvalidRequest, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w, client := newMemory(t, Config{}).answer(tt.r)
			if w.Code != tt.status || client.ID != tt.client {
				t.Fatalf("status %d, client %q, want %d, %q; body %s", w.Code, client.ID, tt.status, tt.client, w.Body)
			}
			if got := w.Header().Get("Cache-Control"); got != "no-store" {
				t.Errorf("Cache-Control %q", got)
			}
			if tt.status != 200 {
				checkError(t, w, tt.code)
			}
		})
	}
}

func basicOf(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }

func at(target string, r *http.Request) *http.Request {
	u, err := url.Parse(target)
	if err != nil {
		panic(err)
	}
	r.URL = u
	return r
}

func typed(contentType string, r *http.Request) *http.Request {
	r.Header.Del("Content-Type")
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	return r
}

func chunked(r *http.Request) *http.Request {
	r.ContentLength = -1
	return r
}

// checkError checks everything that holds for all errors.
func checkError(t *testing.T, w *httptest.ResponseRecorder, code string) {
	t.Helper()
	h := w.Header()
	for name, want := range map[string]string{
		"Cache-Control": "no-store", "Content-Type": "application/json",
		"Www-Authenticate": only(w.Code == 401, `Basic realm="oauth2", charset="UTF-8"`),
		"Allow":            only(w.Code == 405, "POST"),
		"Accept-Encoding":  only(w.Code == 415, "identity"),
	} {
		if got := h.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if (w.Code == 429 || w.Code == 503) != (h.Get("Retry-After") != "") {
		t.Errorf("status %d with Retry-After %q", w.Code, h.Get("Retry-After"))
	}
	var body map[string]string
	dec := json.NewDecoder(w.Body)
	if err := dec.Decode(&body); err != nil {
		t.Fatalf("the body is no JSON object of strings: %v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		t.Error("the body goes on behind its object")
	}
	if code != "" && body["error"] != code {
		t.Errorf("error %q, want %q", body["error"], code)
	}
	for name, value := range body {
		if name != "error" && name != "error_description" || value == "" {
			t.Errorf("member %q: %q", name, value)
		}
		if !isPlain(value) {
			t.Errorf("%s has characters that RFC 6749 section 5.2 forbids: %q", name, value)
		}
	}
}

func only(when bool, s string) string {
	if when {
		return s
	}
	return ""
}

func TestFormValues(t *testing.T) {
	t.Parallel()
	m := newMemory(t, Config{})
	_, form, err := m.Form(httptest.NewRecorder(), postForm("token=+t%2B&token_type_hint=&foo=1&foo=2&Token=x", "Authorization", basicTwo), "token", "token_type_hint")
	want := url.Values{"token": {" t+"}, "foo": {"1", "2"}, "Token": {"x"}}
	if diff := cmp.Diff(want, form); err != nil || diff != "" {
		t.Errorf("err %v, form (-want +got):\n%s", err, diff)
	}
}

// An unreadable body is the caller's fault, whatever the reason.
func TestFormBodyBreaksOff(t *testing.T) {
	t.Parallel()
	r := postForm("", "Authorization", basicTwo)
	r.Body, r.ContentLength = io.NopCloser(io.MultiReader(strings.NewReader("token="), brokenReader{})), -1
	w, _ := newMemory(t, Config{}).answer(r)
	if w.Code != 400 {
		t.Errorf("status %d, want 400", w.Code)
	}
	checkError(t, w, InvalidRequest)
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func FuzzForm(f *testing.F) {
	f.Add("POST", "", formType, basicOne, "token=t")
	f.Add("POST", "", formType, "Basic YXBwIG9uZTpzM2NyOnQrLz0l", "token=t") // C034
	f.Add("POST", "", formType, "Basic bm9zZXBhcmF0b3I=", "token=t")         // C035
	f.Add("POST", "", formType, basicOne, "token=t;x=1")                     // C041
	f.Add("POST", "", formType, basicOne, "token=%zz")                       // C041
	f.Add("POST", "", formType, "bearer a.b-_~+/==", "token=t&client_id=")
	f.Add("POST", "", formType, "Bearer \"", "client_assertion=e30.eyJpc3MiOiJcIiJ9.&client_assertion_type="+url.QueryEscape(assertionType))
	f.Add("POST", "client_secret=x", "application/json", "Bearer x", "token=t&token=t")
	f.Add("GET", "a=%zz;b", formType+"; charset=\"", "Basic \"\\\x7f", "client_id=\"%5C%C3%A9&client_secret=\\\"")
	f.Fuzz(func(t *testing.T, method, query, contentType, authorization, body string) {
		m := newMemory(t, Config{})
		r := postForm(body, "Authorization", authorization)
		r.Method, r.URL.RawQuery = method, query
		r.Header.Set("Content-Type", contentType)
		w, client := m.answer(r)
		if client.ID != "" {
			if _, ok := m.rows[client.ID]; !ok || w.Code != 200 {
				t.Fatalf("client %q let in with status %d", client.ID, w.Code)
			}
			return
		}
		if w.Code < 400 || w.Code >= 500 {
			t.Fatalf("status %d", w.Code)
		}
		checkError(t, w, "")

		r.Body = io.NopCloser(strings.NewReader(body))
		switch w, client, bearer := m.answerOrBearer(r); {
		case client.ID != "":
			t.Fatalf("client %q let in only where a Bearer token is taken too", client.ID)
		case (bearer != "") != (w.Code == 200), bearer != "" && !strings.EqualFold(authorization[:6], "bearer"):
			t.Fatalf("status %d with bearer %q", w.Code, bearer)
		case bearer == "":
			checkError(t, w, "")
		}
	})
}

func FuzzParseBasic(f *testing.F) {
	for _, s := range []string{basicOne, basicTwo, "Basic YXBwIG9uZTpzM2NyOnQrLz0l", "Basic bm9zZXBhcmF0b3I=", "Basic YTpiYw==", "Basic YTpiYx==", "BASIC  OnI=", "Basic"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, header string) {
		id, secret, ok := parseBasic(header)
		if !ok {
			if id != "" || secret != "" {
				t.Errorf("refused, and yet %q, %q", id, secret)
			}
			return
		}
		if !utf8.ValidString(id+secret) || strings.Contains(id+secret, "\x00") {
			t.Fatalf("%q and %q are not text", id, secret)
		}
		again, secretAgain, ok := parseBasic(basicOf(url.QueryEscape(id) + ":" + url.QueryEscape(secret)))
		if !ok || again != id || secretAgain != secret {
			t.Errorf("%q, %q became %q, %q, %t", id, secret, again, secretAgain, ok)
		}
	})
}

func FuzzParseForm(f *testing.F) {
	for _, s := range []string{"", "token=t", "token=T1;x=1", "token=%zz", "a=1&a=2", "a;b", "%zz", "%00", "%FF=%FF", "=", "&&", "a=%2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, body string) {
		form, err := parseForm(body)
		if err != nil {
			if err != errForm {
				t.Errorf("error %v, want the one that repeats no input", err)
			}
			return
		}
		again, err := parseForm(form.Encode())
		if diff := cmp.Diff(form, again); err != nil || diff != "" {
			t.Errorf("err %v, encoded and parsed again (-first +second):\n%s", err, diff)
		}
		for name, values := range form {
			if !isText(name) || !isText(strings.Join(values, "")) {
				t.Errorf("%q=%q is not text", name, values)
			}
		}
	})
}

func TestWriteError(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name       string
		err        error
		status     int
		code       string
		retryAfter string
	}{
		{"as it is", badRequest(400, "No."), 400, InvalidRequest, ""},
		{"rounded up", Unavailable(1500000000, errDown), 503, TemporarilyUnavailable, "2"},
		{"at least a second", TooMany("Slower.", 1), 429, TemporarilyUnavailable, "1"},
		{"description that may not be sent", badRequest(400, `a "quote"`), 400, InvalidRequest, ""},
		{"unknown", errDown, 500, ServerError, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := httptest.NewRecorder()
			WriteError(w, tt.err)
			if w.Code != tt.status || w.Header().Get("Retry-After") != tt.retryAfter {
				t.Errorf("status %d, Retry-After %q, want %d, %q", w.Code, w.Header().Get("Retry-After"), tt.status, tt.retryAfter)
			}
			if body := w.Body.String(); strings.Contains(body, "database") || strings.Contains(body, "quote") {
				t.Errorf("the body tells too much: %s", body)
			}
			checkError(t, w, tt.code)
		})
	}
}
