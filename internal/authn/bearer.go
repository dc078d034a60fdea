package authn

import (
	"context"
	"net/http"
	"net/url"
	"strings"
)

// badBearer stands for a Bearer token that is not in the syntax of RFC 6750 section 2.1. It
// is not either.
const badBearer = "*"

// FormOrBearer is [Authenticator.Form] for an endpoint that takes a Bearer token in place of
// the client's own credentials. One that is sent is returned unverified, and client is empty
// then; else bearer is empty. For what is no token by its syntax, bearer is "*", which is
// nobody's token either: the endpoint answers both alike. A Bearer token with a client_id or
// credentials of a client is 400.
//
// A Bearer token is 429 from an address that has used up its failures. The endpoint counts those
// of Bearer tokens with [Authenticator.BearerFailed].
func (a *Authenticator) FormOrBearer(w http.ResponseWriter, r *http.Request, known ...string) (client Client, bearer string, form url.Values, err error) {
	cred, form, err := readRequest(w, r, known)
	if err != nil {
		return Client{}, "", nil, err
	}
	if cred.mechanism == bearerToken {
		if cred.id != "" {
			return Client{}, "", nil, errMechanisms
		}
		if a.throttle.addressThrottled(bucket(a.Remote(r))) {
			a.count(errThrottled)
			return Client{}, "", nil, errThrottled
		}
		return Client{}, cred.secret, form, nil
	}
	if client, err = a.authenticate(w, r, cred); err != nil {
		return Client{}, "", nil, err
	}
	return client, "", form, nil
}

// BearerFailed counts the Bearer token of r as a failure of r's address. It is called for one
// that was refused, but not for a genuine one that lacks a scope.
func (a *Authenticator) BearerFailed(r *http.Request) {
	a.throttle.addressFailed(bucket(a.Remote(r)))
	a.count(errClient)
}

// parseBearer reads the Authorization field of RFC 6750 section 2.1. It is false for another
// scheme.
func parseBearer(header string) (token string, ok bool) {
	scheme, rest, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return "", false
	}
	token = strings.Trim(rest, " ")
	body := strings.TrimRight(token, "=")
	if body == "" || strings.Trim(body, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/") != "" {
		return badBearer, true
	}
	return token, true
}

// Client returns the client with this id, and false if there is none. It proves nothing about
// the caller. Its error is an [OAuthError] or that of ctx.
func (a *Authenticator) Client(ctx context.Context, id string) (Client, bool, error) {
	if len(id) > maxIDBytes || !isText(id) {
		return Client{}, false, nil
	}
	row, _, err := a.clients.get(ctx, id)
	if err == nil && row == noClient {
		row, err = a.clients.recheck(ctx, id)
	}
	if err != nil {
		return Client{}, false, lookupError(ctx, err)
	}
	return row.client, row != noClient, nil
}
