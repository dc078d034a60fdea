package authn

import (
	"context"
	"net/http"
	"net/url"
)

// FormOrBearer is [Authenticator.Form] for an endpoint that takes a Bearer token in place of
// the client's own credentials: one that is sent is returned as it is, unverified, and client
// is empty then. A Bearer token and credentials of a client together are 400.
func (a *Authenticator) FormOrBearer(w http.ResponseWriter, r *http.Request, known ...string) (client Client, bearer string, form url.Values, err error) {
	panic("skeleton")
}

// Client returns the client with this id, and false if there is none. It proves nothing about
// the caller. Its error is an [OAuthError] or that of ctx.
func (a *Authenticator) Client(ctx context.Context, id string) (Client, bool, error) {
	panic("skeleton")
}
