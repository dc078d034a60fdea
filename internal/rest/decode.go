package rest

import (
	"bytes"
	"context"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/rescindhq/rescind/api/catalog"
)

// MaxBody bounds request bodies, in bytes, where [LimitBody] does not.
const MaxBody = 1 << 20

type bodyLimitKey struct{}

// LimitBody returns r with a bound of its own, in bytes, for what [Idempotent] and [Decode]
// read of its body. A body takes several times its size in memory: who allows more than
// [MaxBody] sees to it that few such requests are read at a time.
func LimitBody(r *http.Request, limit int64) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), bodyLimitKey{}, limit))
}

const jsonType = "application/json"

// JSON answers with v. An ETag, if any, is set before, as is Cache-Control if the answer
// may be stored.
func JSON(w http.ResponseWriter, status int, v any) error {
	body, err := marshal(v)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	h := w.Header()
	h.Set("Content-Type", jsonType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if h.Get("Cache-Control") == "" {
		h.Set("Cache-Control", "no-store")
	}
	w.WriteHeader(status)
	_, _ = w.Write(body) // a caller that is gone does not read it
	return nil
}

// Decode reads a JSON body into v, which points to a struct: one object,
// application/json, no content coding (415), at most [MaxBody] or what [LimitBody] set (413),
// no unknown or repeated members, no other types, at most 32 deep, at most 10,000 objects in an
// array: an empty one takes two bytes, and a hundred times that in memory. A null is the absence of an object,
// an array or of what v has a pointer for, and not of text and numbers. Its error is a
// [Problem] that points at what is wrong, at up to 10 places.
func Decode(w http.ResponseWriter, r *http.Request, v any) error {
	for _, coding := range r.Header["Content-Encoding"] {
		if coding != "" && !strings.EqualFold(coding, "identity") {
			w.Header().Set("Accept-Encoding", "identity")
			return Status(http.StatusUnsupportedMediaType, "The body must have no content coding.")
		}
	}
	if types := r.Header["Content-Type"]; len(types) != 1 || !isJSON(types[0]) {
		w.Header().Set("Accept", jsonType)
		return Status(http.StatusUnsupportedMediaType, "The body must be "+jsonType+".")
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	if found := inspect(body, reflect.TypeOf(v).Elem()); len(found) > 0 {
		return InvalidRequest(seeErrors, found...)
	}
	if err := json.Unmarshal(body, v); err != nil {
		p := InvalidRequest("The body is not as it must be.")
		p.Cause = err
		return p
	}
	return nil
}

func isJSON(s string) bool {
	t, _, err := mime.ParseMediaType(s)
	return t == jsonType && (err == nil || errors.Is(err, mime.ErrInvalidMediaParameter))
}

func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	limit := int64(MaxBody)
	if own, ok := r.Context().Value(bodyLimitKey{}).(int64); ok {
		limit = own
	}
	tooLarge := func() error {
		w.Header().Set("Connection", "close") // the rest of the body is not read
		return Status(http.StatusRequestEntityTooLarge, fmt.Sprintf("The body is larger than %d bytes.", limit))
	}
	if r.ContentLength > limit {
		return nil, tooLarge()
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, tooLarge()
	}
	if err != nil {
		p := Status(http.StatusBadRequest, "The body could not be read.")
		p.Cause = err
		return nil, p
	}
	return body, nil
}

// The bounds of what is reported, and of what is read.
const (
	maxDepth        = 32
	maxObjects      = 10000 // in an array
	maxFound        = 10
	maxPointerBytes = 512
	maxNameBytes    = 255
)

const space = " \t\r\n" // of JSON

// inspect returns what is wrong with body as the JSON of a t.
func inspect(body []byte, t reflect.Type) catalog.Invalid {
	whole := func(format string, args ...any) catalog.Invalid {
		return catalog.Invalid{{Pointer: "#", Detail: fmt.Sprintf(format, args...)}}
	}
	switch err := json.Unmarshal(body, new(json.RawMessage)); { // only looks whether it is JSON, as a whole
	case !utf8.Valid(body):
		return whole("must be UTF-8")
	case err != nil:
		at := len(body)
		if e, ok := errors.AsType[*json.SyntaxError](err); ok {
			at = int(e.Offset)
		}
		return whole("must be one JSON object, and is malformed at byte %d", at)
	case bytes.TrimLeft(body, space)[0] != '{':
		return whole("must be an object")
	case hasLoneSurrogate(body):
		return whole("must have no half of a surrogate pair")
	}
	i := inspector{body: body, dec: json.NewDecoder(bytes.NewReader(body))}
	i.dec.UseNumber()
	i.value(t)
	return i.found
}

// hasLoneSurrogate finds \u escapes in JSON that are no character: encoding/json makes
// U+FFFD of them all, so different names would become one.
func hasLoneSurrogate(body []byte) bool {
	escaped := func(i int) rune {
		if len(body) < i+6 || body[i] != '\\' || body[i+1] != 'u' {
			return 0
		}
		n, err := strconv.ParseUint(string(body[i+2:i+6]), 16, 16)
		if err != nil {
			return 0
		}
		return rune(n)
	}
	for i := 0; i < len(body); i++ {
		if body[i] != '\\' {
			continue
		}
		if r := escaped(i); utf16.IsSurrogate(r) {
			if utf16.DecodeRune(r, escaped(i+6)) == utf8.RuneError {
				return true
			}
			i += 6
		}
		i++ // what is escaped is no backslash of its own
	}
	return false
}

// inspector walks over JSON that is well-formed, beside the type that it is for.
type inspector struct {
	body  []byte
	dec   *json.Decoder
	path  []string // of names and indices, to where it is
	found catalog.Invalid
	over  bool // nothing more is looked at
}

func (i *inspector) add(format string, args ...any) {
	i.found = append(i.found, catalog.FieldError{Pointer: i.pointer(), Detail: fmt.Sprintf(format, args...)})
	i.over = i.over || len(i.found) == maxFound
}

var escapePointer = strings.NewReplacer("~", "~0", "/", "~1")

// pointer is a JSON pointer in fragment form (RFC 6901, section 6). It is of bounded
// length, so it may end above what it is about.
func (i *inspector) pointer() string {
	p := "#"
	for _, name := range i.path {
		if len(p) > maxPointerBytes {
			break
		}
		if len(name) <= maxNameBytes {
			p += "/" + url.PathEscape(escapePointer.Replace(name))
		} else {
			p += "/*"
		}
	}
	return p
}

func (i *inspector) token() json.Token {
	t, err := i.dec.Token()
	if err != nil {
		panic(err) // the body is well-formed
	}
	return t
}

// rest is the body from the next value on.
func (i *inspector) rest() []byte {
	return bytes.TrimLeft(i.body[i.dec.InputOffset():], space+":,")
}

var (
	unmarshaler     = reflect.TypeFor[json.Unmarshaler]()
	textUnmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// readsItself reports whether a value of type t is read by a method of its own, or is
// bytes.
func readsItself(t reflect.Type) bool {
	p := reflect.PointerTo(t)
	return p.Implements(unmarshaler) || p.Implements(textUnmarshaler) || t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Uint8
}

// value inspects the next value. A nil t takes any.
func (i *inspector) value(t reflect.Type) {
	for t != nil && t.Kind() == reflect.Pointer {
		if i.rest()[0] == 'n' {
			i.token() // null
			return
		}
		t = t.Elem()
	}
	if t != nil && readsItself(t) {
		rest := i.rest()
		i.value(nil)
		raw := rest[:len(rest)-len(i.body)+int(i.dec.InputOffset())]
		if !i.over && json.Unmarshal(raw, reflect.New(t).Interface()) != nil {
			i.add("has not the form that is wanted here")
		}
		return
	}
	switch token := i.token(); token {
	case json.Delim('{'), json.Delim('['):
		switch {
		case len(i.path) == maxDepth:
			i.add("must not be more than %d deep", maxDepth)
			i.over = true
		case token == json.Delim('{'):
			i.object(t)
		default:
			i.array(t)
		}
	default:
		i.scalar(t, token)
	}
}

// below inspects the next value as the one that name or index leads to.
func (i *inspector) below(name string, t reflect.Type, wrong string) {
	i.path = append(i.path, name)
	if wrong != "" {
		i.add("%s", wrong)
	}
	if !i.over {
		i.value(t)
	}
	i.path = i.path[:len(i.path)-1]
}

func (i *inspector) object(t reflect.Type) {
	member := func(string) (reflect.Type, bool) { return nil, true }
	switch {
	case t == nil || t.Kind() == reflect.Interface:
	case t.Kind() == reflect.Struct:
		fields := fieldsOf(t)
		member = func(name string) (reflect.Type, bool) { f, ok := fields[name]; return f, ok }
	case t.Kind() == reflect.Map && t.Key().Kind() == reflect.String:
		member = func(string) (reflect.Type, bool) { return t.Elem(), true }
	default:
		i.add("must be %s", nameOf(t))
	}
	seen := make(map[string]bool)
	for !i.over && i.dec.More() {
		name := i.token().(string)
		switch of, known := member(name); {
		case seen[name]:
			i.below(name, nil, "is there twice")
		case !known:
			i.below(name, nil, "is not known here")
		default:
			i.below(name, of, "")
		}
		seen[name] = true
	}
	if !i.over {
		i.token() // its end
	}
}

func (i *inspector) array(t reflect.Type) {
	var of reflect.Type
	switch {
	case t == nil || t.Kind() == reflect.Interface:
	case t.Kind() == reflect.Slice:
		of = t.Elem()
	default:
		i.add("must be %s", nameOf(t))
	}
	for n := 0; !i.over && i.dec.More(); n++ {
		if n == maxObjects && of != nil && of.Kind() == reflect.Struct {
			i.add("must have at most %d items", maxObjects)
			i.over = true
			break
		}
		i.below(strconv.Itoa(n), of, "")
	}
	if !i.over {
		i.token()
	}
}

func (i *inspector) scalar(t reflect.Type, token json.Token) {
	number, isNumber := token.(json.Number)
	if isNumber && (t == nil || t.Kind() == reflect.Interface) {
		t = reflect.TypeFor[float64]()
	}
	if t == nil {
		return
	}
	ok, err := false, error(nil)
	switch t.Kind() {
	case reflect.Interface:
		ok = true
	case reflect.Map, reflect.Slice:
		ok = token == nil
	case reflect.String:
		_, ok = token.(string)
	case reflect.Bool:
		_, ok = token.(bool)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		_, err = strconv.ParseInt(string(number), 10, t.Bits())
		ok = isNumber && err == nil
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		_, err = strconv.ParseUint(string(number), 10, t.Bits())
		ok = isNumber && err == nil
	case reflect.Float32, reflect.Float64:
		_, err = strconv.ParseFloat(string(number), t.Bits())
		ok = isNumber && err == nil
	}
	if !ok {
		i.add("must be %s", nameOf(t))
	}
}

// nameOf is what the JSON of a t is.
func nameOf(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return "an object"
	case reflect.Slice:
		return "an array"
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return fmt.Sprintf("a whole number of at most %d bits", t.Bits())
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return fmt.Sprintf("a whole number of at most %d bits, not negative", t.Bits())
	case reflect.Float32, reflect.Float64:
		return fmt.Sprintf("a number that %d bits of floating point hold", t.Bits())
	}
	panic("JSON cannot be decoded into " + t.String())
}

var fieldCache sync.Map // of map[string]reflect.Type by reflect.Type

// fieldsOf returns the members that encoding/json gives a struct. Of two that have one
// name the outer one counts.
func fieldsOf(t reflect.Type) map[string]reflect.Type {
	if known, ok := fieldCache.Load(t); ok {
		return known.(map[string]reflect.Type)
	}
	fields := make(map[string]reflect.Type)
	var embedded []reflect.Type
	for f := range t.Fields() {
		tag := f.Tag.Get("json")
		name, _, _ := strings.Cut(tag, ",")
		switch {
		case tag == "-":
		case f.Anonymous && name == "" && f.Type.Kind() == reflect.Struct:
			embedded = append(embedded, f.Type)
		case !f.IsExported():
		case name == "":
			fields[f.Name] = f.Type
		default:
			fields[name] = f.Type
		}
	}
	for _, e := range embedded {
		for name, of := range fieldsOf(e) {
			if _, ok := fields[name]; !ok {
				fields[name] = of
			}
		}
	}
	fieldCache.Store(t, fields)
	return fields
}
