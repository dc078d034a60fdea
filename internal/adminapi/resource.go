package adminapi

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/rest"
)

// resource is how the entities of a noun are read and changed.
type resource struct {
	noun    catalog.Noun
	path    string // pattern of the collection
	id      string // URL parameter that names one of it
	writers []string
	makers  []string // who may create and delete; nil: the writers
	filters []string // parameters of the list
	// revokes are the methods that can end what a consumer key may do: they take
	// revoke_tokens.
	revokes []string
	// body is an empty body, with the defaults that the catalog does not know.
	body func(place) body
	// create and place are for collections within something else.
	create func(*API, http.ResponseWriter, *http.Request) error
	place  func(*API, http.ResponseWriter, *http.Request) (place, error)
}

// place is the collection that a request is about.
type place struct {
	path   string // of the URL
	filter store.Filter
	// holds reports whether an entity of the noun is of the collection. Nil: all are.
	holds func(catalog.Entity) bool
}

const (
	applicationsPath = "/v1/applications"
	keysPath         = applicationsPath + "/{id}/keys"
	policiesPath     = "/v1/policies"
)

var resources = []*resource{
	{
		noun: catalog.NounTenant, path: "/v1/tenants", writers: admins, filters: []string{paramName},
		body: func(place) body { return &tenantBody{} },
	},
	{
		noun: catalog.NounKeyManager, path: "/v1/key-managers", writers: writers, makers: admins, filters: []string{paramTenant, paramName},
		body: func(place) body { return &keyManagerBody{Enabled: true} },
	},
	{
		noun: catalog.NounPolicy, path: policiesPath + "/{kind}", writers: writers, filters: []string{paramTenant, paramName},
		body:  func(p place) body { return &policyBody{Kind: p.filter.Kind} },
		place: policiesOf,
	},
	{
		noun: catalog.NounScope, path: "/v1/scopes", writers: writers, filters: []string{paramTenant, paramName},
		body: func(place) body { return &scopeBody{} },
	},
	{
		noun: catalog.NounAPI, path: "/v1/apis", writers: writers, filters: []string{paramTenant, paramName},
		body: func(place) body { return &apiBody{} },
	},
	{
		noun: catalog.NounApplication, path: applicationsPath, writers: writers, filters: []string{paramTenant, paramName},
		revokes: []string{http.MethodDelete},
		body:    func(place) body { return &applicationBody{} },
	},
	keys,
	{
		noun: catalog.NounSubscription, path: "/v1/subscriptions", writers: writers,
		filters: []string{paramTenant, paramApplication, paramAPI},
		revokes: []string{http.MethodPut, http.MethodDelete}, // PUT may block
		body:    func(place) body { return &subscriptionBody{} },
	},
}

var keys = &resource{
	noun: catalog.NounKeyMapping, path: keysPath, id: "key", writers: writers, filters: []string{paramConsumerKey},
	revokes: []string{http.MethodDelete},
	create:  (*API).createKey, place: (*API).keysOf,
}

func policiesOf(_ *API, _ http.ResponseWriter, r *http.Request) (place, error) {
	kind := chi.URLParam(r, "kind")
	switch kind {
	case catalog.PolicySubscription, catalog.PolicyApplication, catalog.PolicyAPI:
		return place{
			path: policiesPath + "/" + kind, filter: store.Filter{Kind: kind},
			holds: func(e catalog.Entity) bool { return e.(*catalog.Policy).Kind == kind },
		}, nil
	}
	return place{}, rest.Status(http.StatusNotFound, "The kinds of policies are subscription, application and api.")
}

// routes are those of the collection and of each entity in it.
func (res *resource) routes() []Route {
	type serve = func(*API, http.ResponseWriter, *http.Request) error
	bind := func(f func(*resource, *API, http.ResponseWriter, *http.Request) error) serve {
		return func(a *API, w http.ResponseWriter, r *http.Request) error { return f(res, a, w, r) }
	}
	create := bind((*resource).post)
	if res.create != nil {
		create = res.create
	}
	makers := res.makers
	if makers == nil {
		makers = res.writers
	}
	one := res.path + "/{" + res.param() + "}"
	routes := []Route{
		{http.MethodGet, res.path, readers, bind((*resource).list)},
		{http.MethodPost, res.path, makers, create},
		{http.MethodGet, one, readers, bind((*resource).get)},
		{http.MethodDelete, one, makers, bind((*resource).delete)},
	}
	if res.body != nil {
		routes = append(routes, Route{http.MethodPut, one, res.writers, bind((*resource).put)})
	}
	return routes
}

func (res *resource) param() string {
	if res.id != "" {
		return res.id
	}
	return "id"
}

func (res *resource) placeOf(a *API, w http.ResponseWriter, r *http.Request) (place, error) {
	if res.place == nil {
		return place{path: res.path}, nil
	}
	return res.place(a, w, r)
}

// find reads the entity that r names.
func (res *resource) find(a *API, w http.ResponseWriter, r *http.Request) (place, catalog.Entity, error) {
	p, err := res.placeOf(a, w, r)
	if err != nil {
		return p, nil, err
	}
	e, err := a.deps.Catalog.Get(r.Context(), caller(w, r), res.noun, chi.URLParam(r, res.param()))
	if err == nil && p.holds != nil && !p.holds(e) {
		err = store.ErrNotFound
	}
	return p, e, err
}

func (res *resource) list(a *API, w http.ResponseWriter, r *http.Request) error {
	p, err := res.placeOf(a, w, r)
	if err != nil {
		return err
	}
	query := r.URL.Query()
	list := url.Values{}
	for _, name := range res.filters {
		if value := query.Get(name); value != "" {
			list.Set(name, value)
		}
	}
	name := p.path + "?" + list.Encode()
	q, err := rest.PageQuery(r, name, res.filters...)
	if err != nil {
		return err
	}
	if err := narrow(&p.filter, list); err != nil {
		return err
	}
	after := int64(0)
	if q.After != "" {
		if after, err = strconv.ParseInt(q.After, 10, 32); err != nil {
			return badParameter("cursor", "must be the next_cursor of a page of this list")
		}
	}
	entities, err := a.deps.Catalog.List(r.Context(), caller(w, r), res.noun, p.filter, int32(after), q.Limit+1)
	if err != nil {
		return err
	}
	next := ""
	if len(entities) > q.Limit {
		entities = entities[:q.Limit]
		next = strconv.Itoa(int(entities[q.Limit-1].Base().ID))
	}
	return rest.WritePage(w, r, name, entities, next)
}

func (res *resource) get(a *API, w http.ResponseWriter, r *http.Request) error {
	if err := onlyParameters(r); err != nil {
		return err
	}
	_, e, err := res.find(a, w, r)
	if err != nil {
		return err
	}
	tag := rest.Tag(e.Base().Timestamp)
	if rest.NoneMatch(r, tag) {
		w.Header().Set("ETag", tag)
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return answer(w, http.StatusOK, e.Base(), e)
}

func (res *resource) post(a *API, w http.ResponseWriter, r *http.Request) error {
	if err := onlyParameters(r); err != nil {
		return err
	}
	p, err := res.placeOf(a, w, r)
	if err != nil {
		return err
	}
	b := res.body(p)
	e, err := decode(w, r, p, b)
	if err != nil {
		return err
	}
	m := b.base().meta()
	if res.noun != catalog.NounTenant {
		if err := settle(res.noun, &m.Tenant, rest.AccountOf(r.Context()).Tenant, caller(w, r)); err != nil {
			return err
		}
	}
	*e.Base() = m
	e, err = a.apply(w, r, store.Change{Op: store.Create, Entity: e})
	if err != nil {
		return err
	}
	return created(w, p, e.Base(), e)
}

func (res *resource) put(a *API, w http.ResponseWriter, r *http.Request) error {
	keepTokens, err := res.keepTokens(r)
	if err != nil {
		return err
	}
	version, err := rest.IfMatch(r)
	if err != nil {
		return err
	}
	p, current, err := res.find(a, w, r)
	if err != nil {
		return err
	}
	b := res.body(p)
	e, err := decode(w, r, p, b)
	if err != nil {
		return err
	}
	m := b.base().meta()
	if m.UUID != "" && m.UUID != current.Base().UUID {
		return &store.Conflict{Slug: "immutable", Detail: "the uuid is another one than the path's: leave it out", Pointer: "#/uuid"}
	}
	m.UUID = current.Base().UUID
	*e.Base() = m
	e, err = a.apply(w, r, store.Change{Op: store.Update, Entity: e, IfTimestamp: version, KeepTokens: keepTokens})
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, e.Base(), e)
}

func (res *resource) delete(a *API, w http.ResponseWriter, r *http.Request) error {
	keepTokens, err := res.keepTokens(r)
	if err != nil {
		return err
	}
	version, err := rest.IfMatch(r)
	if err != nil {
		return err
	}
	_, e, err := res.find(a, w, r)
	if err != nil {
		return err
	}
	if _, err := a.apply(w, r, store.Change{Op: store.Delete, Entity: e, IfTimestamp: version, KeepTokens: keepTokens}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *API) apply(w http.ResponseWriter, r *http.Request, c store.Change) (catalog.Entity, error) {
	entities, _, err := a.deps.Catalog.Apply(r.Context(), caller(w, r), []store.Change{c})
	if err != nil {
		return nil, ofKeepTokens(err)
	}
	return entities[0], nil
}

// ofKeepTokens says of the parameter what err says of a member revoke_tokens, which no body of
// a PUT or DELETE has.
func ofKeepTokens(err error) error {
	if invalid, ok := errors.AsType[catalog.Invalid](err); ok && len(invalid) == 1 && invalid[0].Pointer == "#/"+paramRevokeTokens {
		return badParameter(paramRevokeTokens, invalid[0].Detail)
	}
	return err
}

// decode reads r's body into b and returns it as an entity.
func decode(w http.ResponseWriter, r *http.Request, p place, b body) (catalog.Entity, error) {
	if err := rest.Decode(w, r, b); err != nil {
		return nil, err
	}
	e := b.entity()
	if p.holds != nil && !p.holds(e) {
		return nil, catalog.Invalid{{Pointer: "#/kind", Detail: "must be the kind that the path names, or left out"}}
	}
	return e, nil
}

// settle gives a new entity the tenant of its maker, unless t names one that c may see.
func settle(n catalog.Noun, t *revocation.Tenant, own revocation.Tenant, c store.Caller) error {
	switch {
	case *t == revocation.Tenant{} && n == catalog.NounSubscription: // it has its application's
	case *t == revocation.Tenant{}:
		*t = own
	case c.Tenant == "":
	case t.ID != 0 && t.ID != own.ID, t.Domain != "" && t.Domain != own.Domain:
		return catalog.Invalid{{Pointer: "#/tenant", Detail: "there is no such tenant"}} // as for one that is not there
	}
	return nil
}

// created is the answer for an entity that was made in p; v is what is shown of it.
func created(w http.ResponseWriter, p place, m *catalog.Meta, v any) error {
	w.Header().Set("Location", p.path+"/"+m.UUID)
	return answer(w, http.StatusCreated, m, v)
}

func answer(w http.ResponseWriter, status int, m *catalog.Meta, v any) error {
	w.Header().Set("ETag", rest.Tag(m.Timestamp))
	return rest.JSON(w, status, v)
}

// keepTokens reads the parameter revoke_tokens, where r's method takes it.
func (res *resource) keepTokens(r *http.Request) (bool, error) {
	if !slices.Contains(res.revokes, r.Method) {
		return false, onlyParameters(r)
	}
	if err := onlyParameters(r, paramRevokeTokens); err != nil {
		return false, err
	}
	switch r.URL.Query().Get(paramRevokeTokens) {
	case "", "true":
		return false, nil
	case "false":
		return true, nil
	}
	return false, badParameter(paramRevokeTokens, "must be true or false")
}
