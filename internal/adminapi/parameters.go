package adminapi

import (
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/rescindhq/rescind/api/catalog"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/rest"
)

// The parameters of queries, beside those of pages.
const (
	paramTenant       = "tenant"
	paramName         = "name"
	paramApplication  = "application"
	paramAPI          = "api"
	paramConsumerKey  = "consumer_key"
	paramRevokeTokens = "revoke_tokens"
	paramKeyType      = "key_type"
	paramActor        = "actor"
	paramAction       = "action"
	paramSubject      = "subject"
	paramIss          = "iss"
	paramEntityID     = "entity_id"
	paramRequestID    = "request_id"
	paramFrom         = "from"
	paramTo           = "to"
)

// maxText is the longest name that anything has, in bytes.
const maxText = 255

var uuid = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// narrow sets what query says in f.
func narrow(f *store.Filter, query url.Values) error {
	for _, name := range slices.Sorted(maps.Keys(query)) {
		value, ok, must := query.Get(name), true, ""
		switch name {
		case paramTenant:
			f.Tenant, ok, must = value, catalog.ValidDomain(value), "must be a domain"
		case paramName:
			f.Name, ok, must = value, isName(value), mustBeName
		case paramConsumerKey:
			f.ConsumerKey, ok, must = value, isName(value), mustBeName
		case paramApplication:
			f.Application, ok, must = value, uuid.MatchString(value), "must be a UUID"
		case paramAPI:
			f.API, ok, must = value, uuid.MatchString(value), "must be a UUID"
		}
		if !ok {
			return badParameter(name, must)
		}
	}
	return nil
}

const mustBeName = "must be UTF-8 of at most 255 bytes without control characters"

func isName(s string) bool {
	return len(s) <= maxText && utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// onlyParameters returns a problem unless r's query has each of known at most once, and
// nothing else.
func onlyParameters(r *http.Request, known ...string) error {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return rest.InvalidParameter("The query string is not well-formed.")
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		switch {
		case slices.Contains(known, name) && len(query[name]) == 1:
		case slices.Contains(known, name):
			return rest.InvalidParameter("The parameter " + name + " is there more than once.")
		case len(known) == 0:
			return rest.InvalidParameter("There are no parameters here.")
		default:
			return rest.InvalidParameter("A parameter is not known here. There is " + strings.Join(known, ", ") + ".")
		}
	}
	return nil
}

// badParameter says what the value of a parameter must be.
func badParameter(name, must string) error {
	return rest.InvalidParameter("The parameter " + name + " " + must + ".")
}
