package eventhub

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// etcdIndex is the field with the index of the store: here the seq that the answer
// stands at.
const etcdIndex = "X-Etcd-Index"

// directory is what lies below a name in the image of etcd.
type directory struct {
	kind revocation.Kind
	// value is what a key has. Only that of jti is fixed by what WSO2's gateways read; the
	// others tell their time, in Unix milliseconds.
	value func(rec replica.Record) string
}

var directories = map[string]directory{
	"jti":           {revocation.KindToken, func(replica.Record) string { return "true" }},
	"consumer-keys": {revocation.KindClient, timeValue},
	"users":         {revocation.KindSubject, timeValue},
}

func timeValue(rec replica.Record) string { return strconv.FormatInt(revokedUntil(rec), 10) }

// directoryNames are those of directories, in the order of the root's listing.
var directoryNames = []string{"consumer-keys", "jti", "users"}

// keyOf is the path of r within the image.
func keyOf(r *http.Request) string {
	rest, _ := below(single(r.URL.EscapedPath()), keysBase)
	return "/" + rest
}

// serveKeys answers as etcd's API of version 2 does. The parameters of that are ignored.
func (h *Hub) serveKeys(w http.ResponseWriter, r *http.Request) error {
	if methodOf(r) != http.MethodGet {
		return notAllowed(w, r, []string{http.MethodGet, http.MethodHead})
	}
	s, done, err := h.stream(w, r)
	if err != nil {
		return err
	}
	defer done()
	n, err := h.needed(r)
	if err != nil {
		return err
	}
	w.Header().Set(etcdIndex, strconv.FormatInt(int64(n.at.Seq), 10))
	name, key, isKey := strings.Cut(strings.TrimPrefix(keyOf(r), "/"), "/")
	d, ok := directories[name]
	switch {
	case name == "":
		s.root(n)
	case !ok:
		return problem(http.StatusNotFound, "Key not found")
	case r.Method == http.MethodHead && !isKey:
		h.head(w)
		return nil
	case !isKey:
		s.directory(n, name, d)
	default:
		if ok := s.key(n, name, key, d); !ok {
			return problem(http.StatusNotFound, "Key not found")
		}
	}
	s.end()
	return nil
}

func (s *stream) root(n needed) {
	s.buf = append(s.buf, `{"action":"get","node":{"key":"/","dir":true,"nodes":[`...)
	for i, name := range directoryNames {
		first := i == 0
		s.comma(&first)
		s.buf = append(s.buf, `{"key":"/`+name+`","dir":true`...)
		s.index(n)
	}
	s.buf = append(s.buf, ']')
	s.index(n)
	s.buf = append(s.buf, '}')
}

func (s *stream) directory(n needed, name string, d directory) {
	s.buf = append(s.buf, `{"action":"get","node":{"key":"/`+name+`","dir":true,"nodes":[`...)
	first := true
	n.of(d.kind, func(rec replica.Record) bool {
		if rec.Target.Digest {
			return true
		}
		s.comma(&first)
		s.node(n, name, d, rec)
		return s.next()
	})
	s.buf = append(s.buf, ']')
	s.index(n)
	s.buf = append(s.buf, '}')
}

// key appends the one of a key, as it is in a path, that ends last: it may be of several
// issuers.
func (s *stream) key(n needed, name, key string, d directory) bool {
	id, err := url.PathUnescape(key)
	if err != nil || strings.Contains(key, "/") {
		return false
	}
	var found replica.Record
	n.of(d.kind, func(rec replica.Record) bool {
		if !rec.Target.Digest && rec.Target.ID == id && found.Exp < rec.Exp {
			found = rec
		}
		return true
	})
	if found.Exp == 0 {
		return false
	}
	s.buf = append(s.buf, `{"action":"get","node":`...)
	s.node(n, name, d, found)
	s.buf = append(s.buf, '}')
	return true
}

// node appends a key. What is left of it is counted up to where the last gateway refuses
// the token by itself, and rounded up: never 0, which etcd takes for "for ever".
func (s *stream) node(n needed, name string, d directory, rec replica.Record) {
	end := rec.Exp + maxLeeway
	s.buf = append(s.buf, `{"key":"/`...)
	s.buf = append(s.buf, name...)
	s.buf = append(s.buf, '/')
	s.buf = appendSegment(s.buf, rec.Target.ID)
	s.buf = append(s.buf, `","value":"`...)
	s.buf = append(s.buf, d.value(rec)...)
	s.buf = append(s.buf, `","expiration":"`...)
	s.buf = time.Unix(end, 0).UTC().AppendFormat(s.buf, time.RFC3339)
	s.buf = append(s.buf, `","ttl":`...)
	s.buf = strconv.AppendInt(s.buf, end-n.now, 10)
	s.index(n)
}

// index ends a node.
func (s *stream) index(n needed) {
	s.buf = append(s.buf, `,"modifiedIndex":`...)
	s.buf = strconv.AppendInt(s.buf, int64(n.at.Seq), 10)
	s.buf = append(s.buf, `,"createdIndex":`...)
	s.buf = strconv.AppendInt(s.buf, int64(n.at.Seq), 10)
	s.buf = append(s.buf, '}')
}

// appendSegment appends s percent-encoded outside A-Z a-z 0-9 - . _ ~, as the keys of
// our own etcd are.
func appendSegment(b []byte, s string) []byte {
	const hex = "0123456789ABCDEF"
	for i := range len(s) {
		c := s[i]
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_' || c == '~' {
			b = append(b, c)
		} else {
			b = append(b, '%', hex[c>>4], hex[c&15])
		}
	}
	return b
}
