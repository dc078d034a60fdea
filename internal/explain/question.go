package explain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rescindhq/rescind/api/catalog"
)

// Question is what somebody wants to know.
type Question struct {
	// Token is a JWT, or an opaque token, up to 16 KiB; or Claims are the claims of one that is not at hand,
	// an object with iss, iat and exp of up to [MaxClaims] bytes, which are believed. Exactly one is there.
	Token  string          `json:"token"`
	Claims json.RawMessage `json:"claims"`
	// API is what it was presented for; nil: only the token is looked at.
	API *API `json:"api"`
	// Gateway is the id of the one that refused it, empty if that is not known. At is when that was,
	// up to [MaxAgo] ago; zero: now.
	Gateway string    `json:"gateway"`
	At      time.Time `json:"at,omitzero"`
}

// API names an API, and maybe what of it was called.
type API struct {
	// Context is that of the API in the catalog, which ends with the version; it may be without it here.
	Context string `json:"context"`
	Version string `json:"version"`
	// Method and Path of the request. Path is the whole path, which begins with the context; a query is
	// cut off. Both empty: no operation is looked at.
	Method string `json:"method"`
	Path   string `json:"path"`
}

const (
	maxToken = 16 << 10
	// MaxClaims is the longest that claims are, in bytes: as many as fit in a token.
	MaxClaims = 11 << 10
	// MaxAgo is how long ago what is asked about may be.
	MaxAgo = 30 * 24 * time.Hour

	maxText   = 255
	maxPath   = 8 << 10
	maxMethod = 32
)

var (
	gatewayID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	method    = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z-]+$") // RFC 9110, section 5.6.2
)

// validate returns a [catalog.Invalid] that names all that is wrong, and repeats none of it.
func (q *Question) validate(now time.Time) error {
	if bytes.Equal(bytes.TrimSpace(q.Claims), []byte("null")) {
		q.Claims = nil
	}
	var found catalog.Invalid
	add := func(pointer, format string, args ...any) {
		found = append(found, catalog.FieldError{Pointer: pointer, Detail: fmt.Sprintf(format, args...)})
	}
	switch {
	case q.Token == "" && q.Claims == nil:
		add("#", "must have token or claims")
	case q.Token != "" && q.Claims != nil:
		add("#/claims", "is there beside token: leave out either")
	case len(q.Token) > maxToken:
		add("#/token", "must be at most %d bytes", maxToken)
	case q.Token != "" && strings.Trim(q.Token, " \t\r\n") == "":
		add("#/token", "must not be empty")
	case q.Token == "":
		validateClaims(q.Claims, add)
	}
	if q.API != nil {
		q.API.validate(add)
	}
	if q.Gateway != "" && !gatewayID.MatchString(q.Gateway) {
		add("#/gateway", "must be 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or a digit")
	}
	switch {
	case q.At.IsZero():
	case q.At.After(now):
		add("#/at", "must not be in the future")
	case q.At.Before(now.Add(-MaxAgo)):
		add("#/at", "must be at most %d days ago", MaxAgo/(24*time.Hour))
	}
	if len(found) > 0 {
		return found
	}
	return nil
}

func validateClaims(raw json.RawMessage, add func(pointer, format string, args ...any)) {
	if len(raw) > MaxClaims {
		add("#/claims", "must be at most %d bytes", MaxClaims)
		return
	}
	members, ok := rawClaims(raw)
	if !ok {
		add("#/claims", "must be an object")
		return
	}
	var iss string
	if json.Unmarshal(members["iss"], &iss) != nil || iss == "" {
		add("#/claims/iss", "must be there, a string that is not empty")
	}
	for _, name := range []string{"iat", "exp"} {
		var n *float64
		if json.Unmarshal(members[name], &n) != nil || n == nil {
			add("#/claims/"+name, "must be there, a number of Unix seconds")
		}
	}
}

func (a *API) validate(add func(pointer, format string, args ...any)) {
	text := func(pointer, s string, limit int) bool {
		switch {
		case len(s) > limit:
			add(pointer, "must be at most %d bytes", limit)
		case !utf8.ValidString(s), strings.ContainsFunc(s, unicode.IsControl):
			add(pointer, "must be UTF-8 without control characters")
		default:
			return true
		}
		return false
	}
	a.Path, _, _ = strings.Cut(a.Path, "?")
	switch {
	case a.Context == "":
		add("#/api/context", "must be there")
	case text("#/api/context", a.Context, maxText) && !strings.HasPrefix(a.Context, "/"):
		add("#/api/context", "must begin with /")
	}
	if a.Version == "" {
		add("#/api/version", "must be there")
	} else {
		text("#/api/version", a.Version, maxText)
	}
	switch {
	case a.Method == "" && a.Path == "":
	case a.Method == "":
		add("#/api/method", "must be there, for path is")
	case a.Path == "":
		add("#/api/path", "must be there, for method is")
	default:
		if len(a.Method) > maxMethod || !method.MatchString(a.Method) {
			add("#/api/method", "must be an HTTP method, such as GET")
		}
		if text("#/api/path", a.Path, maxPath) && !a.contains(a.Path) {
			add("#/api/path", "must be the whole path, which begins with the context and the version")
		}
	}
}

// contexts are those that the API can have in the catalog, the usual one last.
func (a *API) contexts() []string {
	if strings.HasSuffix(a.Context, "/"+a.Version) {
		return []string{a.Context}
	}
	return []string{a.Context, strings.TrimSuffix(a.Context, "/") + "/" + a.Version}
}

func (a *API) contains(path string) bool {
	for _, c := range a.contexts() {
		if rest, ok := strings.CutPrefix(path, c); ok && (rest == "" || rest[0] == '/') {
			return true
		}
	}
	return false
}
