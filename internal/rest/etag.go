package rest

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
)

// Tag is the strong ETag of an entity whose timestamp is ts.
func Tag(ts int64) string { return `"` + strconv.FormatInt(ts, 10) + `"` }

// IfMatch returns the timestamp that r demands (RFC 9110, section 13.1.1), 0 for *. Of
// several it is the latest: an entity never goes back to one before. Its error is 428
// where there is no precondition, 412 where it can match no entity.
func IfMatch(r *http.Request) (ts int64, err error) {
	header := r.Header["If-Match"]
	if len(header) == 0 {
		return 0, Status(http.StatusPreconditionRequired, "If-Match must have the ETag of what is to be changed, as it was read.")
	}
	tags, star := parseTags(header)
	if star {
		return 0, nil
	}
	for _, t := range tags {
		n, err := strconv.ParseInt(strings.Trim(t.opaque, `"`), 10, 64)
		if err == nil && !t.weak && t.opaque == Tag(n) { // strong comparison
			ts = max(ts, n)
		}
	}
	if ts <= 0 {
		return 0, Status(http.StatusPreconditionFailed, "If-Match has no ETag that this could have. Read it, and send the ETag that comes with it.")
	}
	return ts, nil
}

// NoneMatch reports whether r already has what etag names (RFC 9110, section 13.1.2:
// weak comparison, lists, *).
func NoneMatch(r *http.Request, etag string) bool {
	tags, star := parseTags(r.Header["If-None-Match"])
	opaque := strings.TrimPrefix(etag, "W/")
	return star || slices.ContainsFunc(tags, func(t entityTag) bool { return t.opaque == opaque })
}

type entityTag struct {
	weak   bool
	opaque string // with its quotes
}

// parseTags reads RFC 9110's #entity-tag, in which a tag may have commas, or *. A list
// that is malformed has none.
func parseTags(header []string) (tags []entityTag, star bool) {
	rest := strings.Join(header, ",")
	if strings.Trim(rest, " \t") == "*" {
		return nil, true
	}
	for {
		if rest = strings.TrimLeft(rest, " \t,"); rest == "" {
			return tags, false
		}
		var t entityTag
		rest, t.weak = strings.CutPrefix(rest, "W/")
		if rest == "" || rest[0] != '"' {
			return nil, false
		}
		end := 1 + strings.IndexByte(rest[1:], '"')
		if end == 0 || strings.ContainsFunc(rest[:end], func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return nil, false
		}
		t.opaque, rest = rest[:end+1], strings.TrimLeft(rest[end+1:], " \t")
		if rest != "" && rest[0] != ',' {
			return nil, false
		}
		tags = append(tags, t)
	}
}
