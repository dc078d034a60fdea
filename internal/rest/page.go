package rest

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// The sizes of a page.
const (
	defaultLimit = 200
	maxLimit     = 1000
)

// Query is a list request: from where, how many.
type Query struct {
	// After is the last key of the page before; empty begins. It is as it was given to
	// [WritePage], unless the caller has taken pains to forge it.
	After string
	// Limit is 1 to 1000.
	Limit int
}

// PageQuery reads limit and cursor of r. list names the list with all its filters: a cursor
// of another one is 400 invalid-parameter, as are parameters that are not among known, or
// are there twice.
func PageQuery(r *http.Request, list string, known ...string) (Query, error) {
	q := Query{Limit: defaultLimit}
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return Query{}, InvalidParameter("The query string is not well-formed.")
	}
	known = append([]string{"cursor", "limit"}, known...)
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if !slices.Contains(known, name) {
			return Query{}, InvalidParameter("A parameter is not known here. There are " + strings.Join(known, ", ") + ".")
		}
		if len(values[name]) > 1 {
			return Query{}, InvalidParameter("The parameter " + name + " is there more than once.")
		}
	}
	if limit, ok := values["limit"]; ok {
		n, err := strconv.Atoi(limit[0])
		if err != nil || n < 1 || n > maxLimit || strconv.Itoa(n) != limit[0] {
			return Query{}, InvalidParameter("The parameter limit must be 1 to " + strconv.Itoa(maxLimit) + ".")
		}
		q.Limit = n
	}
	if c, ok := values["cursor"]; ok {
		if q.After, ok = openCursor(c[0], list); !ok {
			return Query{}, InvalidParameter("The parameter cursor must be the next_cursor of a page of this list, with the same filters.")
		}
	}
	return q, nil
}

// WritePage answers with {"items","next_cursor"} and the Link header. next is the
// last key of this page if there are more, else empty.
func WritePage(w http.ResponseWriter, r *http.Request, list string, items any, next string) error {
	var page struct {
		Items      json.RawMessage `json:"items"`
		NextCursor string          `json:"next_cursor,omitempty"`
	}
	encoded, err := marshal(items)
	if err != nil {
		return err
	}
	if page.Items = encoded; string(encoded) == "null" {
		page.Items = json.RawMessage("[]")
	}
	if next != "" {
		page.NextCursor = newCursor(list, next)
		query := r.URL.Query()
		query.Set("cursor", page.NextCursor)
		w.Header().Set("Link", "<"+r.URL.EscapedPath()+"?"+query.Encode()+`>; rel="next"`)
	}
	return JSON(w, http.StatusOK, page)
}

// A cursor is a version, a hash that binds key to list, and key.
const (
	cursorVersion   = 1
	cursorHashBytes = 8
)

var cursorBase64 = base64.RawURLEncoding.Strict()

func newCursor(list, key string) string {
	b := append([]byte{cursorVersion}, cursorHash(list, key)...)
	return cursorBase64.EncodeToString(append(b, key...))
}

func openCursor(s, list string) (key string, ok bool) {
	b, err := cursorBase64.DecodeString(s)
	if err != nil || len(b) <= 1+cursorHashBytes {
		return "", false
	}
	key = string(b[1+cursorHashBytes:])
	// Strict decoding lets line ends through; there is one cursor for a place.
	return key, newCursor(list, key) == s
}

func cursorHash(list, key string) []byte {
	sum := sha256.Sum256([]byte(strconv.Quote(list) + key))
	return sum[:cursorHashBytes]
}
