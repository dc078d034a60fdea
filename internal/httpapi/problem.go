package httpapi

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/internal/authn"
)

// problem is an error of RFC 9457.
type problem struct {
	Type     string `json:"type"`
	Title    string `json:"title"`
	Status   int    `json:"status"`
	Instance string `json:"instance,omitempty"`
}

// writeProblem answers with a problem that says no more than its status.
func writeProblem(w http.ResponseWriter, r *http.Request, status int) {
	p := problem{Type: "about:blank", Title: http.StatusText(status), Status: status}
	if id := exchangeOf(r.Context()).id; isUUID(id) {
		p.Instance = "urn:uuid:" + strings.ToLower(id)
	}
	body, err := json.Marshal(p)
	if err != nil {
		panic(err) // strings and a number
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // a caller that is gone does not read it
}

// isUUID is for request ids, which a caller may choose.
func isUUID(s string) bool {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return false
	}
	digits := strings.ReplaceAll(s, "-", "")
	return len(digits) == 32 && strings.Trim(digits, "0123456789abcdefABCDEF") == ""
}

func (a *api) notFound(w http.ResponseWriter, r *http.Request) {
	writeProblem(w, r, http.StatusNotFound)
}

func (a *api) methodNotAllowed(w http.ResponseWriter, r *http.Request) {
	if a.isForm(r.URL.Path) {
		authn.WriteError(w, &authn.OAuthError{
			Status: http.StatusMethodNotAllowed, Code: authn.InvalidRequest, Description: "Only POST is allowed here.",
		})
		return
	}
	var allowed []string
	for _, m := range methods {
		if a.router.Match(chi.NewRouteContext(), m, r.URL.Path) || m == http.MethodHead && len(allowed) > 0 && allowed[0] == http.MethodGet {
			allowed = append(allowed, m)
		}
	}
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	writeProblem(w, r, http.StatusMethodNotAllowed)
}
