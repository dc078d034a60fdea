package revokeapi

import (
	"context"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

// The parameters of the list, beside those of pages and those of identifiers.
const (
	paramKind   = "kind"
	paramIss    = "iss"
	paramTenant = "tenant"
)

// identifiers are the parameters of which one may be there, each with its kind.
var identifiers = []struct {
	name string
	kind revocation.Kind
}{
	{"jti", revocation.KindToken}, {"client_id", revocation.KindClient}, {"sub", revocation.KindSubject},
	{"sid", revocation.KindSession}, {"kid", revocation.KindKey},
}

var filters = func() []string {
	names := []string{paramKind, paramIss, paramTenant}
	for _, id := range identifiers {
		names = append(names, id.name)
	}
	return names
}()

var canonical = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

func (a *API) list(w http.ResponseWriter, r *http.Request) error {
	query, used := r.URL.Query(), url.Values{}
	for _, name := range filters {
		if value := query.Get(name); value != "" {
			used.Set(name, value)
		}
	}
	name := path + "?" + used.Encode()
	page, err := rest.PageQuery(r, name, filters...)
	if err != nil {
		return err
	}
	if page.After != "" && !canonical.MatchString(page.After) {
		return badParameter("cursor", "must be the next_cursor of a page of this list")
	}
	f, err := filterOf(used)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(r.Context(), timeout, errTimeout)
	defer cancel()
	var found []ledger.Listed
	if tenantsOf(r).narrow(&f) {
		if found, err = a.deps.Ledger.List(ctx, f, page.After, page.Limit+1); err != nil {
			return err
		}
	}
	next := ""
	if len(found) > page.Limit {
		found = found[:page.Limit]
		next = found[page.Limit-1].ID
	}
	items := make([]listed, len(found))
	for i, l := range found {
		items[i] = showListed(l)
	}
	return rest.WritePage(w, r, name, items, next)
}

// filterOf is what query says.
func filterOf(query url.Values) (f ledger.ListFilter, err error) {
	for _, name := range filters {
		if value := query.Get(name); len(value) > maxText || !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
			return f, badParameter(name, "must be UTF-8 of at most 255 bytes without control characters")
		}
	}
	if f.Kind = revocation.Kind(query.Get(paramKind)); f.Kind != "" && !slices.Contains(revocation.Kinds, f.Kind) {
		return f, badParameter(paramKind, "must be token, client, subject, session, tenant or key")
	}
	if iss := query.Get(paramIss); iss != "" {
		f.Iss = []string{iss}
	}
	if domain := query.Get(paramTenant); domain != "" {
		if !catalog.ValidDomain(domain) {
			return f, badParameter(paramTenant, "must be a domain")
		}
		f.Tenants = []string{domain}
	}
	for _, id := range identifiers {
		value := query.Get(id.name)
		switch {
		case value == "":
			continue
		case f.ID != "":
			return f, badParameter(id.name, "is there beside another identifier: only one may be")
		case f.Kind != "" && f.Kind != id.kind:
			return f, badParameter(id.name, "is not for this kind: leave out "+paramKind)
		}
		f.Kind, f.ID = id.kind, value
	}
	return f, nil
}

// maxText is the longest that an identifier is, in bytes.
const maxText = 255

// narrow leaves in f only what t sees, and reports whether that may be anything.
func (t tenants) narrow(f *ledger.ListFilter) bool {
	if t.home == "" {
		return true
	}
	if len(f.Tenants) == 0 {
		f.Tenants = []string{t.home}
	}
	return t.sees(f.Tenants[0])
}

// badParameter says what the value of a parameter must be.
func badParameter(name, must string) error {
	return rest.InvalidParameter("The parameter " + name + " " + must + ".")
}

func (a *API) get(w http.ResponseWriter, r *http.Request) error {
	if r.URL.RawQuery != "" {
		return rest.InvalidParameter("There are no parameters here.")
	}
	if id := chi.URLParam(r, "id"); canonical.MatchString(id) {
		found, ok, err := a.deps.Ledger.Get(r.Context(), id)
		if err != nil {
			return err
		}
		if ok && tenantsOf(r).sees(found.Tenant.Domain) {
			return a.answerOne(w, r, found)
		}
	}
	return rest.Status(http.StatusNotFound, "There is no such revocation here, it has ended, or it is another tenant's.")
}
