package sidecar

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v4"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/internal/yamlfile"
)

// maxFileBytes are the most of a file.
const maxFileBytes = 1 << 20

var limits = yamlfile.Limits{Bytes: maxFileBytes, Depth: 16, Marks: 1 << 18, Mistakes: yamlfile.MaxTold, Single: true}

// reader takes a configuration file apart, and collects what is wrong with it.
type reader struct {
	file   string // its name, for people
	folder string // what relative names of files are relative to
	getenv func(string) string
	source *yamlfile.File // from root on
}

// err has all that was found, in the order of the file.
func (r *reader) err() error {
	found := r.source.Mistakes()
	for i := range found {
		found[i].Text += "."
	}
	return found.Err()
}

// root parses the file. It is nil if there is nothing to take apart.
func (r *reader) root(text []byte) *section {
	r.source = yamlfile.New(r.file, limits)
	var root *yaml.Node
	for n := range r.source.Documents(text) {
		root = n
	}
	switch {
	case r.source.Count() > 0:
		return nil
	case root == nil || yamlfile.IsNull(root):
		r.source.Wrong(nil, "the file is empty: see rescind-gateway --help for an example")
		return nil
	}
	return r.section(root, "")
}

// section is a mapping of the file. Its members are taken one by one; what is left over at its end is
// not known. One that is no mapping has no members, and does not complain that it lacks any.
type section struct {
	r       *reader
	path    string // "" is the whole file
	node    *yaml.Node
	mute    bool     // node is no mapping, which was told
	order   []string // names of members as they stand in the file
	keys    map[string]*yaml.Node
	values  map[string]*yaml.Node
	known   []string        // names that were asked for
	secrets []string        // names under which a secret could be looked for, in vain
	bad     map[string]bool // names of members with mistakes
}

// section returns a mute one if n is no mapping.
func (r *reader) section(n *yaml.Node, path string) *section {
	s := &section{r: r, path: path, node: n, keys: map[string]*yaml.Node{}, values: map[string]*yaml.Node{}, bad: map[string]bool{}}
	if n.Kind != yaml.MappingNode {
		s.mute = true
		if yamlfile.IsNull(n) {
			r.source.Wrong(n, "%s has no value: it must be a mapping of members. Give some, write {} for the defaults, or leave it out", path)
		} else {
			r.source.Wrong(n, "%s is %s: it must be a mapping of members", cmp.Or(path, "the file"), yamlfile.KindName(n.Kind))
		}
		return s
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		first, twice := s.keys[key.Value]
		switch {
		case key.Kind != yaml.ScalarNode:
			r.source.Wrong(key, "the name of a member is %s: it must be text", yamlfile.KindName(key.Kind))
		case twice:
			r.source.Wrong(key, "%s is given twice, first in line %d. Leave one", s.name(yamlfile.Shorten(key.Value)), first.Line)
		default:
			s.keys[key.Value], s.values[key.Value] = key, n.Content[i+1]
			s.order = append(s.order, key.Value)
		}
	}
	return s
}

// name is how people are told of a member.
func (s *section) name(member string) string {
	if s.path == "" {
		return member
	}
	return s.path + "." + member
}

// take returns the value of a member, nil if it is not there.
func (s *section) take(member string) *yaml.Node {
	s.known = append(s.known, member)
	return s.values[member]
}

func (s *section) given(member string) bool { return s.values[member] != nil }

// wrong tells of a mistake of a member, or of the section, if it has no such member.
func (s *section) wrong(member, format string, args ...any) {
	s.bad[member] = true
	if !s.mute {
		s.r.source.Wrong(cmp.Or(s.values[member], s.node), "%s "+format, append([]any{s.name(member)}, args...)...)
	}
}

// together tells of a mistake of several members, unless one of them is known to be wrong by itself.
// The first is where it is told.
func (s *section) together(broken bool, text string, members ...string) {
	if broken && !s.mute && !slices.ContainsFunc(members, func(m string) bool { return s.bad[m] }) {
		s.r.source.Wrong(cmp.Or(s.values[members[0]], s.node), "%s", text)
	}
}

// end tells of members that nobody took.
func (s *section) end() {
	for _, name := range s.order {
		key := s.keys[name]
		switch {
		case slices.Contains(s.known, name):
		case slices.Contains(s.secrets, name):
			s.r.source.Wrong(key, "%s stands here in the open: a secret is never in this file. Give %s_file or %s_env, and change the secret, which others may have read", s.name(name), name, name)
		default:
			s.r.source.Wrong(key, "%s is not known. Correct it to one of %s", s.name(yamlfile.Shorten(name)), strings.Join(slices.Sorted(slices.Values(s.known)), ", "))
		}
	}
}

// value is a kind of single value, bound to what it fills.
type value struct {
	rule string             // completes "it must be …"
	set  func(string) error // errRule if the rule says all there is to say
	text bool               // what YAML takes for a number or a truth is a mistake
}

var errRule = errors.New("breaks its rule")

func ruleIf(broken bool) error {
	if broken {
		return errRule
	}
	return nil
}

// optional reads a member that may be left out; def is what it is then, for people.
func (s *section) optional(member string, v value, def string) {
	if n := s.take(member); n != nil {
		remedy := "Change it, or leave it out"
		if def != "" {
			remedy += " for " + def
		}
		s.read(n, member, v, remedy)
	}
}

// required reads a member that must be there.
func (s *section) required(member string, v value) {
	if n := s.take(member); n != nil {
		s.read(n, member, v, "Change it")
	} else {
		s.wrong(member, "is not set: it must be %s. Set it", v.rule)
	}
}

// read sets v to what n says, which belongs to a member or is an item of it.
func (s *section) read(n *yaml.Node, member string, v value, remedy string) {
	at := func(format string, args ...any) {
		s.bad[member] = true
		s.r.source.Wrong(n, "%s %s: it must be %s. %s", s.name(member), fmt.Sprintf(format, args...), v.rule, remedy)
	}
	switch {
	case n.Kind != yaml.ScalarNode:
		at("is %s", yamlfile.KindName(n.Kind))
	case yamlfile.IsNull(n):
		at("has no value")
	case v.text && n.ShortTag() != "!!str":
		remedy += ". Or put it in quotes"
		at("is %s, which YAML does not take for text", shown(n.Value))
	default:
		if err := v.set(n.Value); errors.Is(err, errRule) {
			at("is %s", shown(n.Value))
		} else if err != nil {
			at("is %s (%v)", shown(n.Value), err)
		}
	}
}

// items returns those of a member that is a list.
func (s *section) items(member, of string) []*yaml.Node {
	n := s.take(member)
	switch {
	case n == nil:
		return nil
	case n.Kind != yaml.SequenceNode && yamlfile.IsNull(n):
		s.wrong(member, "has no value: it must be a list of %s. Give one, or leave it out", of)
	case n.Kind != yaml.SequenceNode:
		s.wrong(member, "is %s: it must be a list of %s", yamlfile.KindName(n.Kind), of)
	}
	if n.Kind != yaml.SequenceNode {
		return nil
	}
	return n.Content
}

// list reads a list of single values; item is bound to whatever takes the next one.
func (s *section) list(member string, item value) {
	for _, n := range s.items(member, item.rule) {
		s.read(n, member, item, "Change it")
	}
}

// sub reads a member that is a mapping. It is nil if the member is not there.
func (s *section) sub(member string) *section {
	n := s.take(member)
	if n == nil {
		return nil
	}
	return s.part(member, s.name(member), n)
}

// subs reads a list of mappings.
func (s *section) subs(member string) (all []*section) {
	for i, n := range s.items(member, "mappings") {
		all = append(all, s.part(member, fmt.Sprintf("%s[%d]", s.name(member), i), n))
	}
	return all
}

// part is the section at n, which is a member or an item of it.
func (s *section) part(member, path string, n *yaml.Node) *section {
	sub := s.r.section(n, path)
	if sub.mute {
		s.bad[member] = true
	}
	return sub
}

// secret reads what <member>_file or <member>_env leads to; must says that one is needed.
func (s *section) secret(member, rule string, must bool, check func(string) error) (secret Secret) {
	fileName, envName := member+"_file", member+"_env"
	s.secrets = append(s.secrets, member)
	file, env := "", ""
	s.optional(fileName, textValue(&file, "the name of a file that holds "+rule), "")
	s.optional(envName, textValue(&env, "the name of a variable of the environment that holds "+rule), "")
	from, text := fileName, ""
	switch {
	case s.bad[fileName] || s.bad[envName]:
		return ""
	case file != "" && env != "":
		s.wrong(fileName, "and %s are both set: one is enough. Leave one out", s.name(envName))
		return ""
	case file != "":
		b, err := os.ReadFile(s.r.within(file))
		// Editors and echo end a file with a newline that is not part of it.
		text = strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
		if err == nil && text == "" {
			err = errors.New("it is empty")
		}
		if err != nil {
			s.wrong(fileName, "is %s, which cannot be read: %v. Name a file that holds %s", shown(file), reason(err), rule)
			return ""
		}
	case env != "":
		from = envName
		if text = s.r.getenv(env); text == "" {
			s.wrong(envName, "is %s, and this variable is not set: it must hold %s. Set it", shown(env), rule)
			return ""
		}
	case must && !s.given(member): // else what is wrong is told at the end
		s.wrong(fileName, "is not set, nor is %s: one must lead to %s. Set one of them", s.name(envName), rule)
		return ""
	}
	if text != "" && check != nil {
		if err := check(text); err != nil {
			s.wrong(from, "leads to what cannot be used (not shown): it must hold %s%s. Change it", rule, inBrackets(err))
		}
	}
	return Secret(text)
}

func inBrackets(err error) string {
	if errors.Is(err, errRule) {
		return ""
	}
	return " (" + err.Error() + ")"
}

// reason is err without the name of the file that it repeats.
func reason(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}

// within is the path of a file that is named in this one.
func (r *reader) within(name string) string {
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(r.folder, name)
}

// file reads the name of a file, which the caller looks into.
func (s *section) file(member, holds string) string {
	name := ""
	s.optional(member, textValue(&name, "the name of a file of "+holds), "")
	return s.r.within(name)
}

// shown is text as it may appear in a message: not for ever, and without the credentials of a URL.
func shown(text string) string {
	if i := strings.LastIndexByte(text, '@'); i >= 0 {
		scheme, _, isURL := strings.Cut(text[:i], "://")
		if isURL {
			text = scheme + "://" + hidden + text[i:]
		} else {
			text = hidden + text[i:]
		}
	}
	return strconv.Quote(yamlfile.Shorten(text))
}

// labels reads a mapping of names to text.
func (s *section) labels(member string) map[string]string {
	sub := s.sub(member)
	if sub == nil {
		return nil
	}
	labels := make(map[string]string, len(sub.order))
	for _, name := range sub.order {
		text := ""
		sub.required(name, value{rule: "text of at most 255 bytes without control characters, under a name of 1 to 63 of A-Z a-z 0-9 . _ / -", text: true, set: func(s string) error {
			text = s
			return ruleIf(replica.ValidLabels(map[string]string{name: s}) != nil)
		}})
		labels[name] = text
	}
	if len(sub.bad) == 0 {
		if err := replica.ValidLabels(labels); err != nil {
			s.wrong(member, "cannot be used: %v. Take some away", err)
		}
	}
	return labels
}

// textValue is any text but none, without control characters.
func textValue(p *string, rule string) value {
	return checkedValue(p, rule, func(string) bool { return true })
}

func checkedValue(p *string, rule string, good func(string) bool) value {
	return value{rule: rule, text: true, set: func(s string) error {
		*p = s
		return ruleIf(s == "" || strings.ContainsFunc(s, unicode.IsControl) || !good(s))
	}}
}

// each is for items of a list.
func each(p *[]string, rule string, good func(string) bool) value {
	return value{rule: rule, text: true, set: func(s string) error {
		var one string
		err := checkedValue(&one, rule, good).set(s)
		if err == nil && slices.Contains(*p, one) {
			return errors.New("it is there twice")
		}
		*p = append(*p, one)
		return err
	}}
}

func boolValue(p *bool) value {
	return value{rule: "true or false", set: func(s string) error {
		*p = s == "true"
		return ruleIf(s != "true" && s != "false")
	}}
}

func countValue(p *int, what string, low, high int) value {
	return value{rule: fmt.Sprintf("a number of %s, %d to %d", what, low, high), set: func(s string) error {
		n, err := strconv.Atoi(s)
		*p = n
		return ruleIf(err != nil || n < low || n > high)
	}}
}

func periodValue(p *time.Duration, low, high time.Duration) value {
	return value{rule: fmt.Sprintf("a duration with its unit, %s to %s", short(low), short(high)), set: func(s string) error {
		d, err := time.ParseDuration(s)
		*p = d
		return ruleIf(err != nil || d < low || d > high)
	}}
}

// secondsValue is a period of whole seconds.
func secondsValue(p *time.Duration, low, high time.Duration) value {
	v := periodValue(p, low, high)
	inRange := v.set
	v.rule += ", in whole seconds"
	v.set = func(s string) error { return errors.Join(inRange(s), ruleIf(*p%time.Second != 0)) }
	return v
}

// short is d without the "0s" that String adds to whole minutes and hours.
func short(d time.Duration) string {
	s := d.String()
	if d >= time.Minute {
		s = strings.TrimSuffix(s, "0s")
	}
	if d >= time.Hour {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// choiceValue is one of the words, which stand for what follows them.
func choiceValue[T any](p *T, words []string, meanings ...T) value {
	return value{rule: strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1], set: func(s string) error {
		i := slices.Index(words, s)
		if i >= 0 {
			*p = meanings[i]
		}
		return ruleIf(i < 0)
	}}
}

func addressValue(p *string) value {
	return checkedValue(p, "host:port, with port 0 for any that is free", func(s string) bool {
		_, port, err := net.SplitHostPort(s)
		_, notPort := strconv.ParseUint(port, 10, 16)
		return err == nil && notPort == nil
	})
}

// urlValue is an http or https URL; good looks at what else is asked of it.
func urlValue(p *string, rule string, good func(*url.URL) bool) value {
	return checkedValue(p, rule, func(s string) bool {
		u, err := url.Parse(s)
		return err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Hostname() != "" && u.User == nil &&
			u.Opaque == "" && u.Fragment == "" && good(u)
	})
}

func networksItem(p *[]netip.Prefix) value {
	return value{rule: "an address or a network such as 10.1.0.0/16, not everybody", text: true, set: func(s string) error {
		network, err := netip.ParsePrefix(s)
		if addr, notAddr := netip.ParseAddr(s); notAddr == nil {
			network, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		*p = append(*p, network.Masked())
		return ruleIf(err != nil || network.Bits() == 0)
	}}
}

// isLoopback takes a host with or without a port. A name other than localhost may resolve to anything.
func isLoopback(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = strings.Trim(hostport, "[]")
	}
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.Unmap().IsLoopback()
}

// isPlain reports whether a URL leads to others than this host without TLS.
func isPlain(raw string) bool {
	u, err := url.Parse(raw)
	return err == nil && u.Scheme == "http" && !isLoopback(u.Host)
}
