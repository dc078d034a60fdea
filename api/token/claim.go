package token

import (
	"encoding/json"
	"fmt"
	"strconv"
)

// Claim returns a claim, exactly so named, as its issuer wrote it: valid JSON, in which no object
// has two members of one name. It is false where [Token.Has] is. What it returns is the caller's.
func (t *Token) Claim(name string) (json.RawMessage, bool) {
	value, ok := lookup(t.claims, name)
	if !ok {
		return nil, false
	}
	return json.RawMessage(value), true
}

// Object is a JSON object in a token. As with claims, names are exact, and what is null counts as
// absent. The zero value has no members. The errors of its methods are [ErrClaims].
type Object struct{ members []member }

// Claims returns the object that the claims are members of.
func (t *Token) Claims() Object { return Object{t.claims} }

// Has reports whether the object has a member, and it is not null.
func (o Object) Has(name string) bool {
	_, ok := lookup(o.members, name)
	return ok
}

// Text returns a member that is a string; empty if there is none.
func (o Object) Text(name string) (string, error) {
	s, err := text(o.members, name)
	if err != nil {
		return "", fmt.Errorf("%w: %s is not a string", ErrClaims, name)
	}
	return s, nil
}

// Texts returns a member that is one string or an array of strings; nil if there is none.
func (o Object) Texts(name string) ([]string, error) {
	list, err := texts(o.members, name)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is neither a string nor several", ErrClaims, name)
	}
	return list, nil
}

// Int32 returns a member that is a whole number; 0 if there is none.
func (o Object) Int32(name string) (int32, error) {
	value, ok := lookup(o.members, name)
	if !ok {
		return 0, nil
	}
	n, err := strconv.ParseInt(value, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%w: %s is not a whole number of 32 bits", ErrClaims, name)
	}
	return int32(n), nil
}

// Bool returns a member that is true or false; false if there is none.
func (o Object) Bool(name string) (bool, error) {
	switch value, ok := lookup(o.members, name); {
	case !ok, value == "false":
		return false, nil
	case value == "true":
		return true, nil
	}
	return false, fmt.Errorf("%w: %s is neither true nor false", ErrClaims, name)
}

// Object returns a member that is an object; one without members if there is none.
func (o Object) Object(name string) (Object, error) {
	value, ok := lookup(o.members, name)
	if !ok {
		return Object{}, nil
	}
	inner, err := objectOf(value)
	if err != nil {
		return Object{}, fmt.Errorf("%w: %s is not an object", ErrClaims, name)
	}
	return inner, nil
}

// Objects returns a member that is an array of objects; nil if there is none.
func (o Object) Objects(name string) ([]Object, error) {
	value, ok := lookup(o.members, name)
	if !ok {
		return nil, nil
	}
	values, err := elements(value)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is not an array", ErrClaims, name)
	}
	list := make([]Object, len(values))
	for i, value := range values {
		if list[i], err = objectOf(value); err != nil {
			return nil, fmt.Errorf("%w: %s is not an array of objects", ErrClaims, name)
		}
	}
	return list, nil
}

// objectOf reads a value that is known to be valid, as parseObject has checked it.
func objectOf(value string) (Object, error) {
	if value[0] != '{' {
		return Object{}, errType
	}
	w := walker{s: value}
	members, err := w.object(2) // deeper than the claims: room is made as it is needed
	return Object{members}, err
}
