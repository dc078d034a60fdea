package replica

import (
	"cmp"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// CleanPath returns the path of a request target in origin form, as it is on the wire up to the
// first ?, and whether it means the same to everyone who reads it. It does if it begins with /
// and
//
//   - no segment is empty, "." or "..", however they are spelt; but one / at the end is allowed,
//   - it has only the characters that RFC 3986 allows in a path, and no ; (which begins
//     parameters for some and is a character like others for the rest),
//   - nothing is percent-encoded that delimits parts of a URL (/ ? # ; \ and % itself), no
//     control character, no letter, digit, - . _ or ~, and what is encoded is UTF-8.
//
// Whoever authorises must refuse others: what is authorised would not be what is forwarded. What
// stays encoded (spaces, é, @ …) is compared by what it stands for, in letters of exact case.
func CleanPath(target string) (path string, ok bool) {
	path, _, _ = strings.Cut(target, "?")
	if !strings.HasPrefix(path, "/") || strings.Contains(path, "//") {
		return "", false
	}
	encoded := false
	for i := 0; i < len(path); i++ {
		c := path[i]
		switch {
		case c == '.' && path[i-1] == '/' && isDots(path[i:]):
			return "", false
		case pathBytes[c] != 0:
		case c == '%' && len(path)-i > 2:
			high, low := hexDigit(path[i+1]), hexDigit(path[i+2])
			if high|low == notHex || !mayBeEncoded(high<<4|low) {
				return "", false
			}
			encoded = true
			i += 2
		default:
			return "", false
		}
	}
	if encoded && !isText(unescaped(path)) {
		return "", false
	}
	return path, true
}

// isDots reports whether s begins with a segment . or .. and so ends.
func isDots(s string) bool {
	segment, _, _ := strings.Cut(s, "/")
	return segment == "." || segment == ".."
}

// pathBytes are those that stand for themselves in a clean path: 1 for unreserved ones, which
// are never encoded, 2 for others.
var pathBytes = func() (table [256]uint8) {
	for c := range table {
		switch {
		case '0' <= c && c <= '9', 'A' <= c && c <= 'Z', 'a' <= c && c <= 'z', strings.IndexByte("-._~", byte(c)) >= 0:
			table[c] = 1
		case strings.IndexByte("/!$&'()*+,=:@", byte(c)) >= 0:
			table[c] = 2
		}
	}
	return table
}()

// mayBeEncoded is about a byte. Those of more than ASCII are looked at as runes later.
func mayBeEncoded(c byte) bool {
	return c >= ' ' && c != 0x7f && pathBytes[c] != 1 && strings.IndexByte(`/?#;\%`, c) < 0
}

// isText reports whether s is UTF-8 without control characters.
func isText(s string) bool { return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl) }

// hexDigit is notHex for what is none.
func hexDigit(c byte) byte {
	if 'A' <= c && c <= 'F' {
		c += 'a' - 'A'
	}
	return hexValue[c]
}

// unescaped decodes a path or a part of one. In a clean path no delimiter is encoded, so its segments
// are the same before and after. What cannot be decoded, or would have other segments, stays as it
// is: it is from the catalog, and no clean path is equal to it.
func unescaped(path string) string {
	if strings.IndexByte(path, '%') < 0 {
		return path
	}
	decoded, err := url.PathUnescape(path)
	if err != nil || strings.Count(decoded, "/") != strings.Count(path, "/") {
		return path
	}
	return decoded
}

// beneath reports whether a plain path begins with prefix in whole segments, and what follows.
func beneath(path, prefix string) (rest string, ok bool) {
	rest, ok = strings.CutPrefix(path, prefix)
	return rest, ok && (rest == "" || rest[0] == '/')
}

// tenantPath is what the contexts of all tenants but the super tenant begin with, before their domain.
const tenantPath = "/t"

// fits reports whether a plain context is one of a tenant's where several are served, see
// [Config.Tenant]. Tenants choose their contexts themselves, so each has paths of its own.
func fits(context, domain string) bool {
	rest, below := beneath(context, tenantPath)
	if domain == revocation.SuperTenant.Domain {
		return !below
	}
	if !below || rest == "" {
		return false
	}
	_, below = beneath(rest[1:], domain)
	return below
}

// place is an API at its context.
type place struct {
	api  *catalog.API
	fits bool // as the function

	compile sync.Once // when first needed: most who keep a catalog never do
	targets map[string]*node
}

// place adds or removes an API.
func (s *shelves) place(a *catalog.API, add bool) {
	context := unescaped(a.Context)
	if add {
		s.places[context] = append(s.places[context], &place{api: a, fits: fits(context, a.Tenant.Domain)})
		s.longestContext = max(s.longestContext, len(context))
		return
	}
	left := slices.DeleteFunc(s.places[context], func(p *place) bool { return p.api == a })
	if len(left) == 0 {
		delete(s.places, context)
		return
	}
	s.places[context] = left
}

// placeOf finds what a plain path is for: the API with the longest context that the path begins
// with, in whole segments, among those that are there where only this tenant is served (empty: any
// at a context of its own), and are served in environments; rest is what follows. Of two of
// a tenant whose contexts are the same once decoded, the older one counts.
//
// The path alone decides, and not whose the token is: so whoever passes the request on by its path
// passes it to the API that was looked at.
func (s *shelves) placeOf(path, only string, environments []string) (found *place, rest string) {
	for end := len(path); end > 0; end = strings.LastIndexByte(path[:end], '/') {
		if end > s.longestContext {
			end = s.longestContext + 1 // paths may be long, and have many segments
			continue
		}
		for _, p := range s.places[path[:end]] {
			if p.of(only) && p.served(environments) && (found == nil || order(p.api, found.api) < 0) {
				found = p
			}
		}
		if found != nil {
			return found, path[end:]
		}
	}
	return nil, ""
}

// of reports whether the API is there where only this tenant is served.
func (p *place) of(only string) bool {
	if only == "" {
		return p.fits
	}
	return p.api.Tenant.Domain == only
}

// served reports whether gateways of these environments have the API. They have one that is
// blocked, and say so.
func (p *place) served(environments []string) bool {
	if p.api.Status == catalog.APICreated || p.api.Status == catalog.APIRetired {
		return false
	}
	return len(environments) == 0 || slices.ContainsFunc(p.api.GatewayLabels, func(label string) bool {
		return slices.Contains(environments, label)
	})
}

// operation finds the one for a method on what follows the context. It is nil if the API has none,
// and then anything is there. HEAD, which answers what GET does without the body, is GET where
// no operation is for HEAD.
func (p *place) operation(method, rest string) (op *catalog.Operation, ok bool) {
	if len(p.api.Operations) == 0 {
		return nil, true
	}
	p.compile.Do(func() {
		p.targets = make(map[string]*node)
		for i := range p.api.Operations {
			op := &p.api.Operations[i]
			if p.targets[op.Verb] == nil {
				p.targets[op.Verb] = new(node)
			}
			p.targets[op.Verb].add(op)
		}
	})
	rest, slash := strings.CutSuffix(strings.TrimPrefix(rest, "/"), "/")
	op, known := p.targets[method].find(rest, slash)
	if !known && method == http.MethodHead {
		op, _ = p.targets[http.MethodGet].find(rest, slash)
	}
	return op, op != nil
}

// node is where the targets of operations part, segment by segment: first those with a text, then
// those with {variables}, then what ends in *.
type node struct {
	texts    map[string]*node
	patterns []pattern // those with the longer texts first
	variable *node
	end      [2]*catalog.Operation // of a target that ends here; 1: in a slash
	all      *catalog.Operation    // of one that ends in /* here
}

// pattern is a segment of texts and variables, such as {name}.json: the texts around the variables.
type pattern struct {
	texts []string
	next  *node
}

// add adds an operation. Of two for the same, such as /{a} and /{b}, the first one counts.
func (n *node) add(op *catalog.Operation) {
	target := strings.TrimPrefix(op.Target, "/")
	slash := 0
	for more := target != ""; more; {
		var segment string
		segment, target, more = strings.Cut(target, "/")
		switch {
		case segment == "" && !more:
			slash = 1
		case segment == "*" && !more:
			n.all = cmp.Or(n.all, op)
			return
		default:
			n = n.next(segment)
		}
	}
	n.end[slash] = cmp.Or(n.end[slash], op)
}

// next returns the node after a segment of a target, which it makes if it is not there.
func (n *node) next(segment string) *node {
	texts := split(segment)
	switch {
	case len(texts) == 1:
		if n.texts == nil {
			n.texts = make(map[string]*node)
		}
		if n.texts[texts[0]] == nil {
			n.texts[texts[0]] = new(node)
		}
		return n.texts[texts[0]]
	case len(texts) == 2 && texts[0] == "" && texts[1] == "":
		if n.variable == nil {
			n.variable = new(node)
		}
		return n.variable
	}
	for _, p := range n.patterns {
		if slices.Equal(p.texts, texts) {
			return p.next
		}
	}
	p := pattern{texts, new(node)}
	n.patterns = append(n.patterns, p)
	slices.SortStableFunc(n.patterns, func(a, b pattern) int {
		return len(strings.Join(b.texts, "")) - len(strings.Join(a.texts, ""))
	})
	return p.next
}

// split returns the plain texts of a segment of a target around its variables.
func split(segment string) (texts []string) {
	if segment == "*" { // before other segments
		return []string{"", ""}
	}
	for {
		text, variable, ok := strings.Cut(segment, "{")
		_, after, closed := strings.Cut(variable, "}")
		if !ok || !closed {
			return append(texts, unescaped(segment))
		}
		texts, segment = append(texts, unescaped(text)), after
	}
}

// find returns the operation for what of a plain path is left below n, without the slashes at
// its ends; slash says whether there was one behind it. Known is true also if it is known that
// there is none: one that is for /menu says nothing of /menu/, and neither does a /* beside
// it then, because many upstreams take both for the same.
func (n *node) find(path string, slash bool) (op *catalog.Operation, known bool) {
	if n == nil {
		return nil, false
	}
	if path == "" {
		end := n.end[0]
		if slash {
			end = n.end[1]
		}
		if n.end != [2]*catalog.Operation{} {
			return end, true
		}
		return n.all, n.all != nil
	}
	segment, rest, _ := strings.Cut(path, "/")
	if op, known := n.texts[segment].find(rest, slash); known {
		return op, true
	}
	for _, p := range n.patterns {
		if p.matches(segment) {
			if op, known := p.next.find(rest, slash); known {
				return op, true
			}
		}
	}
	if op, known := n.variable.find(rest, slash); known {
		return op, true
	}
	return n.all, n.all != nil
}

// matches reports whether segment has the texts in their order, and something for each variable.
func (p pattern) matches(segment string) bool {
	last := len(p.texts) - 1
	segment, ok := strings.CutPrefix(segment, p.texts[0])
	if !ok {
		return false
	}
	for _, text := range p.texts[1:last] {
		if segment == "" {
			return false
		}
		i := strings.Index(segment[1:], text)
		if i < 0 {
			return false
		}
		segment = segment[1+i+len(text):]
	}
	return len(segment) > len(p.texts[last]) && strings.HasSuffix(segment, p.texts[last])
}
