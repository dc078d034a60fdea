package token

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth bounds nested arrays and objects.
const maxDepth = 32

// member is one name and its value, the value still as JSON.
type member struct{ name, value string }

var errType = errors.New("the value has another type")

// parseObject splits a JSON object into its members, sorted by name. It refuses
// what is not UTF-8 and equal names at any depth. Its error is ErrMalformed.
func parseObject(b []byte) ([]member, error) {
	if !utf8.Valid(b) || !json.Valid(b) {
		return nil, fmt.Errorf("%w: a part is not JSON", ErrMalformed)
	}
	w := walker{s: string(b)}
	w.space()
	if w.s[w.i] != '{' {
		return nil, fmt.Errorf("%w: a part is not a JSON object", ErrMalformed)
	}
	return w.object(1)
}

// lookup finds a member by its exact name; one that is null counts as absent.
func lookup(members []member, name string) (value string, ok bool) {
	i, ok := slices.BinarySearchFunc(members, name, func(m member, name string) int {
		return strings.Compare(m.name, name)
	})
	if !ok || members[i].value == "null" {
		return "", false
	}
	return members[i].value, true
}

// text is a string member; empty when absent.
func text(members []member, name string) (string, error) {
	value, ok := lookup(members, name)
	if !ok {
		return "", nil
	}
	return stringOf(value)
}

// texts is a member that is one string or an array of them; nil when absent.
func texts(members []member, name string) ([]string, error) {
	value, ok := lookup(members, name)
	if !ok {
		return nil, nil
	}
	if value[0] != '[' {
		s, err := stringOf(value)
		return []string{s}, err
	}
	values, err := elements(value)
	if err != nil {
		return nil, err
	}
	for i, value := range values {
		if values[i], err = stringOf(value); err != nil {
			return nil, err
		}
	}
	return values, nil
}

// elements splits a JSON array that is known to be valid.
func elements(value string) ([]string, error) {
	if value[0] != '[' {
		return nil, errType
	}
	values := []string{}
	w := walker{s: value}
	err := w.list(']', func() error {
		start := w.i
		err := w.skip(1)
		values = append(values, value[start:w.i])
		return err
	})
	return values, err
}

func stringOf(value string) (string, error) {
	if value[0] != '"' {
		return "", errType
	}
	w := walker{s: value}
	return w.name()
}

// walker goes through a text that is known to be valid JSON: it needs to find
// where things end, not whether they are right.
type walker struct {
	s string
	i int
}

func (w *walker) space() {
	for w.i < len(w.s) && strings.IndexByte(" \t\r\n", w.s[w.i]) >= 0 {
		w.i++
	}
}

// list calls item at the start of each item of the array or object at w.i, and
// ends behind its closing bracket.
func (w *walker) list(closing byte, item func() error) error {
	w.i++
	for w.space(); w.s[w.i] != closing; w.space() {
		if err := item(); err != nil {
			return err
		}
		w.space()
		if w.s[w.i] == ',' {
			w.i++
		}
	}
	w.i++
	return nil
}

func (w *walker) object(depth int) ([]member, error) {
	var members []member
	if depth == 1 {
		members = make([]member, 0, 16)
	}
	err := w.list('}', func() error {
		name, err := w.name()
		if err != nil {
			return err
		}
		w.space()
		w.i++ // the colon
		w.space()
		start := w.i
		err = w.skip(depth)
		members = append(members, member{name, w.s[start:w.i]})
		return err
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(members, func(a, b member) int { return strings.Compare(a.name, b.name) })
	for i := 1; i < len(members); i++ {
		if members[i].name == members[i-1].name {
			return nil, fmt.Errorf("%w: a member of a JSON object is there twice", ErrMalformed)
		}
	}
	return members, nil
}

func (w *walker) skip(depth int) error {
	if depth == maxDepth && (w.s[w.i] == '{' || w.s[w.i] == '[') {
		return fmt.Errorf("%w: JSON nested deeper than %d", ErrMalformed, maxDepth)
	}
	switch w.s[w.i] {
	case '{':
		_, err := w.object(depth + 1)
		return err
	case '[':
		return w.list(']', func() error { return w.skip(depth + 1) })
	case '"':
		w.quoted()
	default:
		for w.i < len(w.s) && strings.IndexByte(" \t\r\n,]}", w.s[w.i]) < 0 {
			w.i++
		}
	}
	return nil
}

// quoted passes the string at w.i and returns what is between its quotes.
func (w *walker) quoted() (inner string, escaped bool) {
	w.i++
	start := w.i
	for ; w.s[w.i] != '"'; w.i++ {
		if w.s[w.i] == '\\' {
			escaped = true
			w.i++
		}
	}
	w.i++
	return w.s[start : w.i-1], escaped
}

// name passes the string at w.i and returns what it means.
func (w *walker) name() (string, error) {
	start := w.i
	inner, escaped := w.quoted()
	if !escaped {
		return inner, nil
	}
	if hasLoneSurrogate(inner) {
		return "", fmt.Errorf("%w: half a surrogate pair in a JSON string", ErrMalformed)
	}
	var s string
	if err := json.Unmarshal([]byte(w.s[start:w.i]), &s); err != nil {
		return "", fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return s, nil
}

// hasLoneSurrogate reports whether a JSON string has an escape that stands for no
// character. encoding/json would make U+FFFD of each, so that several strings
// would be one.
func hasLoneSurrogate(inner string) bool {
	for i := 0; i < len(inner); i++ {
		if inner[i] != '\\' {
			continue
		}
		i++
		if inner[i] != 'u' {
			continue
		}
		first := hex4(inner[i+1:])
		i += 4
		if !utf16.IsSurrogate(first) {
			continue
		}
		rest, ok := strings.CutPrefix(inner[i+1:], `\u`)
		if !ok || utf16.DecodeRune(first, hex4(rest)) == utf8.RuneError {
			return true
		}
		i += 6
	}
	return false
}

func hex4(s string) rune {
	n, _ := strconv.ParseUint(s[:4], 16, 16) // valid JSON has four digits here
	return rune(n)
}
