package gateway

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/rescindhq/rescind/api/replica"
)

// retryAfter is what callers are asked to wait, in seconds, where trying again may help.
const retryAfter = "5"

// challenges are those of RFC 6750 section 3.
type challenges struct{ bare, invalidToken, insufficientScope string }

func newChallenges(realm string) challenges {
	bare := `Bearer realm="` + realm + `"`
	return challenges{bare, bare + `, error="invalid_token"`, bare + `, error="insufficient_scope"`}
}

// of is the challenge of a refusal, empty where no other token would help.
func (c challenges) of(a replica.Authorization) string {
	switch {
	case a.Code == replica.CodeMissingCredentials:
		return c.bare
	case a.Code.HTTPStatus() == http.StatusUnauthorized:
		return c.invalidToken
	case a.Code != replica.CodeScope:
		return ""
	case len(a.Scopes) == 0 || !slices.ContainsFunc(a.Scopes, isScopeToken):
		return c.insufficientScope
	}
	scopes := slices.DeleteFunc(slices.Clone(a.Scopes), func(s string) bool { return !isScopeToken(s) })
	return c.insufficientScope + `, scope="` + strings.Join(scopes, " ") + `"`
}

// isScopeToken reports whether s is a scope-token of RFC 6749 section 3.3. Others cannot be in a challenge.
func isScopeToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' })
}

// descriptions are for people. There is one for each code: the cause is nobody's business.
var descriptions = map[replica.Code]string{
	replica.CodeGeneral:             "The gateway cannot decide about the request now. Try again later",
	replica.CodeInvalidCredentials:  "Make sure you have provided the correct security credentials",
	replica.CodeMissingCredentials:  "Make sure your API invocation has the header 'Authorization: Bearer ACCESS_TOKEN'",
	replica.CodeWrongTokenType:      "The resource is for tokens of another kind",
	replica.CodeSubscriptionBlocked: "The subscription of the application to the API is blocked",
	replica.CodeForbidden:           "The resource is not there, or the application has no subscription to the API",
	replica.CodeNotActive:           "The subscription of the application to the API is not active",
	replica.CodeScope:               "The access token has none of the scopes that permit the operation",
	replica.CodeKeyManagerDown:      "The access token cannot be verified now. Try again later",
	replica.CodeAPIBlocked:          "The API has been blocked temporarily. Try again later",
}

// Body is the JSON that WSO2's gateways answer with when a request is not allowed.
func (d Decision) Body() []byte {
	description := descriptions[d.Code]
	if d.Status == http.StatusBadRequest {
		description = "The target of the request cannot be read in one way only"
	}
	body, err := json.Marshal(struct {
		Code        string `json:"code"`
		Message     string `json:"message"`
		Description string `json:"description"`
	}{strconv.Itoa(int(d.Code)), d.Code.Message(), description})
	if err != nil {
		panic(err) // three strings
	}
	return body
}

// WriteError answers a request that is not allowed: Status, Challenge and [Decision.Body], and
// Retry-After with 503.
func (d Decision) WriteError(w http.ResponseWriter) {
	h := w.Header()
	if d.Challenge != "" {
		h.Set("WWW-Authenticate", d.Challenge)
	}
	if d.Status == http.StatusServiceUnavailable {
		h.Set("Retry-After", retryAfter)
	}
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(d.Status)
	_, _ = w.Write(d.Body()) // whoever asked has gone away
}
