package httpapi

import (
	"net/http"
	"strings"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
)

func (a *api) notFound(w http.ResponseWriter, r *http.Request) {
	rest.Write(w, r, rest.Status(http.StatusNotFound, ""))
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
	rest.Write(w, r, rest.Status(http.StatusMethodNotAllowed, ""))
}
