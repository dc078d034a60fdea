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
	name, key, isKey := strings.Cut(strings.TrimPrefix(keyOf(r), "/"), "/")
	d, ok := directories[name]
	if ok && !isKey {
		return h.revoked(w, r, name, func(e *encoder, n needed) { e.directory(n, name, d) })
	}
	h.untimed(w)
	if _, err := h.fresh(r.Context()); err != nil {
		return err
	}
	n := h.needed(h.revocationsOf(r))
	setIndex(w, n.at)
	var e encoder
	switch {
	case name == "":
		e.root(n)
	case !ok:
		return problem(http.StatusNotFound, "Key not found")
	default:
		wait, cancel := h.patience(r)
		defer cancel()
		done, err := h.encoding(wait)
		if err != nil {
			return err
		}
		found := e.key(n, name, key, d)
		done()
		if !found {
			return problem(http.StatusNotFound, "Key not found")
		}
	}
	return h.send(w, r, &body{bytes: e.buf}, nil)
}

func setIndex(w http.ResponseWriter, at revocation.Position) {
	w.Header().Set(etcdIndex, strconv.FormatInt(int64(at.Seq), 10))
}

func (e *encoder) root(n needed) {
	e.buf = append(e.buf, `{"action":"get","node":{"key":"/","dir":true,"nodes":[`...)
	for i, name := range directoryNames {
		first := i == 0
		e.comma(&first)
		e.buf = append(e.buf, `{"key":"/`+name+`","dir":true`...)
		e.index(n)
	}
	e.buf = append(e.buf, ']')
	e.index(n)
	e.buf = append(e.buf, '}')
}

func (e *encoder) directory(n needed, name string, d directory) {
	e.buf = append(e.buf, `{"action":"get","node":{"key":"/`+name+`","dir":true,"nodes":[`...)
	first := true
	n.of(d.kind, func(rec replica.Record) bool {
		if rec.Target.Digest {
			return true
		}
		e.comma(&first)
		e.node(n, name, d, rec)
		return e.next()
	})
	e.buf = append(e.buf, ']')
	e.index(n)
	e.buf = append(e.buf, '}')
}

// key appends the one of a key, as it is in a path, that ends last: it may be of several
// issuers.
func (e *encoder) key(n needed, name, key string, d directory) bool {
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
	e.buf = append(e.buf, `{"action":"get","node":`...)
	e.node(n, name, d, found)
	e.buf = append(e.buf, '}')
	return true
}

// node appends a key. What is left of it is counted up to where the last gateway refuses
// the token by itself, and rounded up: never 0, which etcd takes for "for ever".
func (e *encoder) node(n needed, name string, d directory, rec replica.Record) {
	end := rec.Exp + maxLeeway
	e.buf = append(e.buf, `{"key":"/`...)
	e.buf = append(e.buf, name...)
	e.buf = append(e.buf, '/')
	e.buf = appendSegment(e.buf, rec.Target.ID)
	e.buf = append(e.buf, `","value":"`...)
	e.buf = append(e.buf, d.value(rec)...)
	e.buf = append(e.buf, `","expiration":"`...)
	e.buf = time.Unix(end, 0).UTC().AppendFormat(e.buf, time.RFC3339)
	e.buf = append(e.buf, `","ttl":`...)
	e.buf = strconv.AppendInt(e.buf, end-n.now, 10)
	e.index(n)
}

// index ends a node.
func (e *encoder) index(n needed) {
	e.buf = append(e.buf, `,"modifiedIndex":`...)
	e.buf = strconv.AppendInt(e.buf, int64(n.at.Seq), 10)
	e.buf = append(e.buf, `,"createdIndex":`...)
	e.buf = strconv.AppendInt(e.buf, int64(n.at.Seq), 10)
	e.buf = append(e.buf, '}')
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
