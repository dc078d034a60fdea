package adminapi

import (
	"context"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/claims"
	"github.com/rescindhq/rescind/internal/rest"
)

// claims answers with what a self-contained token of the application carries, for a token
// issuer of somebody else's, whether our own tokens of it are self-contained or not.
func (a *API) claims(w http.ResponseWriter, r *http.Request) error {
	if err := onlyParameters(r, paramKeyType, paramConsumerKey); err != nil {
		return err
	}
	query := r.URL.Query()
	q := claimsQuery{application: chi.URLParam(r, "id"), keyType: query.Get(paramKeyType), consumerKey: query.Get(paramConsumerKey)}
	if q.keyType != "" && q.keyType != catalog.Production && q.keyType != catalog.Sandbox {
		return badParameter(paramKeyType, "must be PRODUCTION or SANDBOX")
	}
	if !isName(q.consumerKey) {
		return badParameter(paramConsumerKey, mustBeName)
	}
	if err := a.fresh(r.Context()); err != nil {
		return err
	}
	var found claims.SelfContained
	var err error
	by := caller(w, r)
	a.deps.State.Replica().View(func(v *replica.View) { found, err = q.in(v, by) })
	if err != nil {
		return err
	}
	return rest.JSON(w, http.StatusOK, found)
}

// fresh waits until the replica has all that was committed before.
func (a *API) fresh(ctx context.Context) error {
	if _, err := a.deps.State.Fresh(ctx, 0); err != nil {
		p := rest.Status(http.StatusServiceUnavailable, "Whether this is the newest state cannot be told now.")
		p.RetryAfter, p.Cause = time.Second, err
		return p
	}
	return nil
}

// claimsQuery asks for the claims of an application, which is named by its UUID or id.
type claimsQuery struct{ application, keyType, consumerKey string }

// in answers q as far as by may know.
func (q claimsQuery) in(v *replica.View, by store.Caller) (claims.SelfContained, error) {
	app := v.Application(q.application)
	if id, err := strconv.ParseInt(q.application, 10, 32); err == nil {
		app = v.ApplicationByID(int32(id))
	}
	if app == nil || by.Tenant != "" && by.Tenant != app.Tenant.Domain && !slices.Contains(by.AlsoReads, app.Tenant.Domain) {
		return claims.SelfContained{}, store.ErrNotFound
	}
	if q.consumerKey == "" {
		if q.keyType == "" {
			q.keyType = catalog.Production
		}
		return claims.Of(v, app, q.keyType, ""), nil
	}
	// Several key managers may have given the application the same key.
	err := error(store.ErrNotFound)
	for _, m := range v.KeyMappingsOf(q.consumerKey) {
		switch {
		case m.Application.UUID != app.UUID:
		case q.keyType == "" || q.keyType == m.KeyType:
			return claims.Of(v, app, m.KeyType, m.ConsumerKey), nil
		default:
			err = badParameter(paramKeyType, "must be that of the consumer key, or left out")
		}
	}
	return claims.SelfContained{}, err
}
