package manifest

import (
	"fmt"
	"maps"
	"math"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/yamlfile"
)

// decoder makes values of one file's nodes, and collects what is wrong with them.
type decoder struct {
	*yamlfile.File
	fields map[reflect.Type]map[string][]int
}

// A value that is decoded may have these.
type (
	// placed is told where it stands.
	placed interface{ setPlace(Place) }
	// defaulted begins with its defaults.
	defaulted interface{ setDefaults() }
	// checked returns a [catalog.Invalid] if it cannot be used.
	checked interface{ check() error }
)

// decode sets v to what n says. What names it in what is reported.
func (d *decoder) decode(n *yaml.Node, v reflect.Value, what string) {
	if yamlfile.IsNull(n) {
		d.Wrong(n, "%s has no value: give one, or leave it out%s", what, emptyList(v))
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.decode(n, v.Elem(), what)
	case reflect.Struct:
		d.structure(n, v, what)
	case reflect.Slice:
		if !d.is(n, yaml.SequenceNode, what) {
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, item := range n.Content {
			if d.Full() {
				return
			}
			d.decode(item, v.Index(i), "an item of "+what)
		}
	case reflect.Map:
		d.mapping(n, v, what)
	case reflect.Interface:
		if free := d.free(n, what); free != nil {
			v.Set(reflect.ValueOf(free))
		}
	default:
		d.scalar(n, v, what)
	}
}

func emptyList(v reflect.Value) string {
	if v.Kind() == reflect.Slice {
		return ", or write [] for an empty list"
	}
	return ""
}

func (d *decoder) is(n *yaml.Node, kind yaml.Kind, what string) bool {
	if n.Kind != kind {
		d.Wrong(n, "%s is %s, must be %s", what, yamlfile.KindName(n.Kind), yamlfile.KindName(kind))
		return false
	}
	return true
}

// members yields the members of a mapping, each name once.
func (d *decoder) members(n *yaml.Node, yield func(name string, key, value *yaml.Node)) {
	first := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content) && !d.Full(); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			d.Wrong(key, "the name of a member is %s, must be text", yamlfile.KindName(key.Kind))
			continue
		}
		if line, twice := first[key.Value]; twice {
			d.Wrong(key, "%s is given twice, first in line %d: leave one", quote(key.Value), line)
			continue
		}
		first[key.Value] = key.Line
		yield(key.Value, key, value)
	}
}

func (d *decoder) structure(n *yaml.Node, v reflect.Value, what string) {
	if !d.is(n, yaml.MappingNode, what) {
		return
	}
	before := d.Count()
	self := v.Addr().Interface()
	if s, ok := self.(defaulted); ok {
		s.setDefaults()
	}
	if s, ok := self.(placed); ok {
		s.setPlace(d.Place(n))
	}
	fields := d.fieldsOf(v.Type())
	d.members(n, func(name string, key, value *yaml.Node) {
		index, known := fields[name]
		switch {
		case known:
			d.decode(value, v.FieldByIndex(index), name)
		case name == "<<":
			d.Wrong(key, "a merge key (<<) has no place in these files: write out what it merges")
		default:
			d.Wrong(key, "%s is not known here: correct it to one of %s", quote(name), strings.Join(slices.Sorted(maps.Keys(fields)), ", "))
		}
	})
	if c, ok := self.(checked); ok && d.Count() == before {
		d.invalid(n, c.check())
	}
}

// invalid reports err, of a value that n stands for, at the members that it is about.
func (d *decoder) invalid(n *yaml.Node, err error) {
	invalid, _ := err.(catalog.Invalid)
	for _, f := range invalid {
		at := n
		path := strings.Split(strings.TrimPrefix(strings.TrimPrefix(f.Pointer, "#"), "/"), "/")
		for _, step := range path {
			if at = child(at, step); at == nil {
				at = n
				break
			}
		}
		d.Wrong(at, "%s", strings.TrimPrefix(strings.Join(path, ".")+" "+f.Detail, " "))
	}
}

// child is the member or item of n that a step of a JSON pointer names, nil if none.
func child(n *yaml.Node, step string) *yaml.Node {
	switch n.Kind {
	case yaml.SequenceNode:
		if i, err := strconv.Atoi(step); err == nil && i >= 0 && i < len(n.Content) {
			return n.Content[i]
		}
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				return n.Content[i+1]
			}
		}
	}
	return nil
}

// mapping is a map[string]string or a map[string]any.
func (d *decoder) mapping(n *yaml.Node, v reflect.Value, what string) {
	if !d.is(n, yaml.MappingNode, what) {
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	d.members(n, func(name string, key, value *yaml.Node) {
		if name == "<<" && key.ShortTag() == "!!merge" {
			d.Wrong(key, "a merge key (<<) has no place in these files: write out what it merges")
			return
		}
		item := reflect.New(v.Type().Elem()).Elem()
		if item.Kind() != reflect.Interface || value.ShortTag() != "!!null" { // but for JSON's null
			d.decode(value, item, what+"."+yamlfile.Shorten(name))
		}
		v.SetMapIndex(reflect.ValueOf(name), item)
	})
}

// free makes what JSON would make of n. Numbers are float64.
func (d *decoder) free(n *yaml.Node, what string) any {
	switch n.Kind {
	case yaml.SequenceNode:
		list := make([]any, 0, len(n.Content))
		for _, item := range n.Content {
			list = append(list, d.free(item, what))
		}
		return list
	case yaml.MappingNode:
		var m map[string]any
		d.mapping(n, reflect.ValueOf(&m).Elem(), what)
		return m
	}
	switch n.ShortTag() {
	case "!!null":
		return nil
	case "!!bool":
		var b bool
		d.scalar(n, reflect.ValueOf(&b).Elem(), what)
		return b
	case "!!int", "!!float":
		f, err := strconv.ParseFloat(n.Value, 64)
		if err != nil || math.IsInf(f, 0) || math.IsNaN(f) || !jsonNumber.MatchString(n.Value) {
			d.Wrong(n, "%s is %s, must be a number as in JSON, or text in quotes", what, quote(n.Value))
			return nil
		}
		return f
	}
	var s string
	d.scalar(n, reflect.ValueOf(&s).Elem(), what)
	return s
}

var (
	wholeNumber = regexp.MustCompile(`^-?(0|[1-9][0-9]{0,18})$`)
	jsonNumber  = regexp.MustCompile(`^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?$`)
)

var tagNames = map[string]string{
	"!!str": "text", "!!int": "a number", "!!float": "a number", "!!bool": "true or false", "!!timestamp": "a time",
}

func (d *decoder) scalar(n *yaml.Node, v reflect.Value, what string) {
	if !d.is(n, yaml.ScalarNode, what) {
		return
	}
	is := tagNames[n.ShortTag()]
	switch v.Kind() {
	case reflect.String:
		if n.ShortTag() != "!!str" {
			d.Wrong(n, "%s is %s, must be text: put it in quotes", what, is)
			return
		}
		v.SetString(n.Value)
	case reflect.Bool:
		if n.Value != "true" && n.Value != "false" || n.ShortTag() != "!!bool" {
			d.Wrong(n, "%s is %s, must be true or false, without quotes", what, quote(n.Value))
			return
		}
		v.SetBool(n.Value == "true")
	case reflect.Int, reflect.Int32, reflect.Int64:
		i, err := strconv.ParseInt(n.Value, 10, v.Type().Bits())
		if n.ShortTag() != "!!int" || !wholeNumber.MatchString(n.Value) {
			d.Wrong(n, "%s is %s, must be a whole number in decimal digits, without quotes", what, quote(n.Value))
			return
		}
		if err != nil {
			d.Wrong(n, "%s is %s, which is too large", what, quote(n.Value))
			return
		}
		v.SetInt(i)
	default:
		panic(fmt.Sprintf("manifest: no form for %s", v.Type()))
	}
}

// fieldsOf has the members of a struct by the names in its tags, also those of structs
// that are inline in it.
func (d *decoder) fieldsOf(t reflect.Type) map[string][]int {
	if f, ok := d.fields[t]; ok {
		return f
	}
	f := make(map[string][]int)
	for _, field := range reflect.VisibleFields(t) {
		name, _, _ := strings.Cut(field.Tag.Get("yaml"), ",")
		if field.IsExported() && !field.Anonymous && name != "" {
			f[name] = field.Index
		}
	}
	d.fields[t] = f
	return f
}

// quote is s, which may be long and strange, for a message.
func quote(s string) string { return strconv.Quote(yamlfile.Shorten(s)) }
