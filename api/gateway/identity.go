package gateway

import (
	"context"
	"net/http"
	"slices"
	"strings"
)

// IdentityHeaders are the names of the header fields that [Decision.SetIdentity] may set, all of which
// whoever passes requests on must remove from them first. For many backends a name with _ in the place of -
// is the same one (as CGI and WSGI have it), for some also one with a dot: remove all names that
// [IsIdentityHeader] reports, as SetIdentity does.
var IdentityHeaders = []string{
	headerIssuer, headerSubject, headerClientID, headerTokenID, headerScope, headerTenant,
	headerApplication, headerApplicationID, headerKeyType, headerTier, headerAPI,
}

const (
	headerIssuer        = "X-Rescind-Issuer"
	headerSubject       = "X-Rescind-Subject"
	headerClientID      = "X-Rescind-Client-Id"
	headerTokenID       = "X-Rescind-Token-Id"
	headerScope         = "X-Rescind-Scope"
	headerTenant        = "X-Rescind-Tenant"
	headerApplication   = "X-Rescind-Application"
	headerApplicationID = "X-Rescind-Application-Id"
	headerKeyType       = "X-Rescind-Key-Type"
	headerTier          = "X-Rescind-Subscription-Tier"
	headerAPI           = "X-Rescind-Api"
)

// identityPrefix is what all of them begin with, as ours tells names apart.
const identityPrefix = "x-rescind-"

// IsIdentityHeader reports whether a backend could take a header field of this name for one of ours, those of later
// versions among them: whether it begins with X-Rescind-, with letters in any case, and _ or . for -.
func IsIdentityHeader(name string) bool {
	if len(name) < len(identityPrefix) {
		return false
	}
	for i := range len(identityPrefix) {
		c := name[i]
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case c == '_', c == '.':
			c = '-'
		}
		if c != identityPrefix[i] {
			return false
		}
	}
	return true
}

// SetIdentity tells a backend who calls: it removes every field that could be taken for one of
// [IdentityHeaders], however it is spelt, and sets those that are known. It also removes their names from the
// field Connection, by which a client could have a proxy behind us drop them.
//
// In values, % and what is no visible ASCII is percent-encoded. X-Rescind-Scope has scopes with spaces
// between them, X-Rescind-Api is name:version with a colon in either encoded too.
func (d Decision) SetIdentity(h http.Header) {
	for name := range h {
		if IsIdentityHeader(name) {
			delete(h, name)
		}
	}
	cleanConnection(h)
	set := func(name, value string) {
		if value != "" {
			h[name] = []string{value}
		}
	}
	if !d.Allowed {
		return
	}
	i := &d.Info
	if i.APIName != "" {
		set(headerAPI, encoded(i.APIName, ":")+":"+encoded(i.APIVersion, ":"))
	}
	if d.Token == nil {
		return
	}
	set(headerIssuer, encoded(d.Token.Issuer, ""))
	set(headerSubject, encoded(d.Token.Subject, ""))
	set(headerClientID, encoded(i.ConsumerKey, ""))
	set(headerTokenID, encoded(d.Token.ID, ""))
	scopes := make([]string, len(i.Scopes))
	for n, scope := range i.Scopes {
		scopes[n] = encoded(scope, "")
	}
	set(headerScope, strings.Join(scopes, " "))
	set(headerTenant, encoded(d.tenant, ""))
	set(headerApplication, encoded(i.ApplicationName, ""))
	set(headerApplicationID, encoded(i.ApplicationUUID, ""))
	set(headerKeyType, encoded(i.Type, ""))
	set(headerTier, encoded(i.Tier, ""))
}

// cleanConnection removes names of ours from the field Connection.
func cleanConnection(h http.Header) {
	values := h["Connection"]
	if !slices.ContainsFunc(values, func(v string) bool { return strings.Contains(strings.ToLower(v), "rescind") }) {
		return
	}
	var options []string
	for _, value := range values {
		for option := range strings.SplitSeq(value, ",") {
			if option = strings.Trim(option, " \t"); option != "" && !IsIdentityHeader(option) {
				options = append(options, option)
			}
		}
	}
	if len(options) == 0 {
		delete(h, "Connection")
		return
	}
	h["Connection"] = []string{strings.Join(options, ", ")}
}

// encoded is s as a field's value: %, what is no visible ASCII, and further bytes as %XX.
func encoded(s, further string) string {
	plain := func(c byte) bool {
		return c > ' ' && c < 0x7f && c != '%' && strings.IndexByte(further, c) < 0
	}
	n := 0
	for i := range len(s) {
		if !plain(s[i]) {
			n++
		}
	}
	if n == 0 {
		return s
	}
	const digits = "0123456789ABCDEF"
	b := make([]byte, 0, len(s)+2*n)
	for i := range len(s) {
		if c := s[i]; plain(c) {
			b = append(b, c)
		} else {
			b = append(b, '%', digits[c>>4], digits[c&15])
		}
	}
	return string(b)
}

// Handler is a middleware: it answers what is not allowed, and passes on the rest with the identity
// headers set, and without the trailers of the request, which some read as headers. See [FromContext].
//
// It decides about the request as it is on the wire, so it must stand before whatever changes
// paths. Requests to proxies (CONNECT, and targets that are whole URLs) are refused.
func (g *Gateway) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d := g.Decide(r.Context(), Request{Method: r.Method, Target: r.RequestURI, Authorization: r.Header["Authorization"]})
		if !d.Allowed {
			d.WriteError(w)
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), contextKey{}, &d))
		r.Header = r.Header.Clone() // a handler does not change what it is given
		d.SetIdentity(r.Header)
		r.Trailer = nil
		next.ServeHTTP(w, r)
	})
}

// contextKey is of the *Decision by which a request was passed on.
type contextKey struct{}

// FromContext is the decision by which [Gateway.Handler] passed a request on.
func FromContext(ctx context.Context) (Decision, bool) {
	if d, ok := ctx.Value(contextKey{}).(*Decision); ok {
		return *d, true
	}
	return Decision{}, false
}
