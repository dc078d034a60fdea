package adminapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/authn"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/rest"
)

// application reads the application that r's path names.
func (a *API) application(w http.ResponseWriter, r *http.Request) (*catalog.Application, error) {
	e, err := a.deps.Catalog.Get(r.Context(), caller(w, r), catalog.NounApplication, chi.URLParam(r, "id"))
	if err != nil {
		return nil, err
	}
	return e.(*catalog.Application), nil
}

func (a *API) block(w http.ResponseWriter, r *http.Request) error {
	body := struct {
		RevokeTokens bool `json:"revoke_tokens"`
	}{RevokeTokens: true}
	if err := optional(w, r, &body); err != nil {
		return err
	}
	return a.setBlocked(w, r, true, !body.RevokeTokens)
}

func (a *API) unblock(w http.ResponseWriter, r *http.Request) error {
	if err := optional(w, r, &struct{}{}); err != nil {
		return err
	}
	return a.setBlocked(w, r, false, true)
}

func (a *API) setBlocked(w http.ResponseWriter, r *http.Request, blocked, keepTokens bool) error {
	version, err := anyVersion(r)
	if err != nil {
		return err
	}
	app, err := a.application(w, r)
	if err != nil {
		return err
	}
	app, err = a.deps.Catalog.Block(r.Context(), caller(w, r), app.UUID, version, blocked, keepTokens)
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, app.Base(), app)
}

// optional is [rest.Decode] for a body that may be left out, of a request without parameters.
func optional(w http.ResponseWriter, r *http.Request, v any) error {
	if err := onlyParameters(r); err != nil || r.ContentLength == 0 {
		return err
	}
	return rest.Decode(w, r, v)
}

// anyVersion is [rest.IfMatch] for a request that may go without.
func anyVersion(r *http.Request) (int64, error) {
	if len(r.Header["If-Match"]) == 0 {
		return 0, nil
	}
	return rest.IfMatch(r)
}

// keysOf is the place of the application's keys.
func (a *API) keysOf(w http.ResponseWriter, r *http.Request) (place, error) {
	app, err := a.application(w, r)
	if err != nil {
		return place{}, err
	}
	return place{
		path: applicationsPath + "/" + app.UUID + "/keys", filter: store.Filter{Tenant: app.Tenant.Domain, Application: app.UUID},
		holds: func(e catalog.Entity) bool { return e.(*catalog.KeyMapping).Application.ID == app.ID },
	}, nil
}

// keyBody asks for a consumer key.
type keyBody struct {
	ID          int32  `json:"id"`
	UUID        string `json:"uuid"`
	KeyType     string `json:"key_type"`
	KeyManager  string `json:"key_manager"`
	ConsumerKey string `json:"consumer_key"`
	// Generate: the key becomes a client of ours. Else it is one of an external key manager.
	Generate       bool   `json:"generate"`
	ConsumerSecret string `json:"consumer_secret"`

	clientBody
}

// clientBody is what a generated key is registered with.
type clientBody struct {
	AuthMethod string `json:"auth_method"`
	// JWKS is an object of which only the keys of private_key_jwt know the members.
	JWKS          map[string]json.RawMessage `json:"jwks"`
	Scopes        []string                   `json:"scopes"`
	DefaultScopes []string                   `json:"default_scopes"`
	Audience      []string                   `json:"audience"`
	TokenLifetime int                        `json:"token_lifetime"`
	// GrantTypes is nil for the default: an empty list gives up all.
	GrantTypes        []string `json:"grant_types"`
	TokenTyp          string   `json:"token_typ"`
	ResourceAudiences []string `json:"resource_audiences"`
	RevokeByJTI       bool     `json:"revoke_by_jti"`
	RevokeOpaque      bool     `json:"revoke_opaque"`
	RevokeQuota       int      `json:"revoke_quota"`
}

// registration is b for a key with this secret, which may be empty.
func (b *clientBody) registration(secret string) (*authn.Registration, error) {
	r := &authn.Registration{
		AuthMethod: b.AuthMethod, Secret: secret,
		Scopes: b.Scopes, DefaultScopes: b.DefaultScopes, Audience: b.Audience, TokenLifetime: b.TokenLifetime,
		GrantTypes: b.GrantTypes, TokenTyp: b.TokenTyp, ResourceAudiences: b.ResourceAudiences,
		RevokeByJTI: b.RevokeByJTI, RevokeOpaque: b.RevokeOpaque, RevokeQuota: b.RevokeQuota,
	}
	var err error
	r.JWKS, err = keySet(b.JWKS)
	return r, err
}

// keySet is the document of a member jwks, empty when it is left out.
func keySet(jwks map[string]json.RawMessage) (string, error) {
	if jwks == nil {
		return "", nil
	}
	set, err := json.Marshal(jwks)
	if err != nil {
		return "", fmt.Errorf("encode jwks: %w", err)
	}
	return string(set), nil
}

// secretOnce is what is said about a secret, in the one answer that has it.
type secretOnce struct {
	// ConsumerSecret is empty for a client that has none and for a key that is mapped.
	ConsumerSecret string `json:"consumer_secret,omitempty"`
}

func (a *API) createKey(w http.ResponseWriter, r *http.Request) error {
	if err := onlyParameters(r); err != nil {
		return err
	}
	app, err := a.application(w, r)
	if err != nil {
		return err
	}
	b := keyBody{KeyType: catalog.Production, Generate: true}
	if err := rest.Decode(w, r, &b); err != nil {
		return err
	}
	client, err := b.client()
	if err != nil {
		return err
	}
	mapping, credentials, err := a.deps.Catalog.CreateKey(r.Context(), caller(w, r), store.NewKey{
		Mapping: catalog.KeyMapping{
			Meta:        catalog.Meta{ID: b.ID, UUID: b.UUID, Tenant: app.Tenant},
			Application: catalog.Ref{ID: app.ID, UUID: app.UUID},
			ConsumerKey: b.ConsumerKey, KeyType: b.KeyType, KeyManager: b.KeyManager,
		},
		Client: client,
	})
	if err != nil {
		return ofSecret(err)
	}
	return created(w, place{path: applicationsPath + "/" + app.UUID + "/keys"}, mapping.Base(), struct {
		*catalog.KeyMapping
		secretOnce
	}{mapping, secretOnce{credentials.Secret}})
}

// client is what the key is registered with, nil for one that is mapped.
func (b *keyBody) client() (*authn.Registration, error) {
	if b.Generate {
		return b.registration(b.ConsumerSecret)
	}
	var found catalog.Invalid
	refuse := func(member string, given bool) {
		if given {
			found = append(found, catalog.FieldError{Pointer: "#/" + member, Detail: "is for a key that is generated"})
		}
	}
	if b.ConsumerKey == "" {
		found = append(found, catalog.FieldError{Pointer: "#/consumer_key", Detail: "must not be empty for a key that is not generated"})
	}
	refuse("consumer_secret", b.ConsumerSecret != "")
	refuse("auth_method", b.AuthMethod != "")
	refuse("jwks", b.JWKS != nil)
	refuse("scopes", len(b.Scopes) > 0)
	refuse("default_scopes", len(b.DefaultScopes) > 0)
	refuse("audience", len(b.Audience) > 0)
	refuse("token_lifetime", b.TokenLifetime != 0)
	refuse("grant_types", b.GrantTypes != nil)
	refuse("token_typ", b.TokenTyp != "")
	refuse("resource_audiences", len(b.ResourceAudiences) > 0)
	refuse("revoke_by_jti", b.RevokeByJTI)
	refuse("revoke_opaque", b.RevokeOpaque)
	refuse("revoke_quota", b.RevokeQuota != 0)
	if len(found) > 0 {
		return nil, found
	}
	return nil, nil
}

func (a *API) rotateKey(w http.ResponseWriter, r *http.Request) error {
	var b struct {
		ConsumerSecret string                     `json:"consumer_secret"`
		JWKS           map[string]json.RawMessage `json:"jwks"`
		EndPrevious    bool                       `json:"end_previous"`
		RevokeTokens   *bool                      `json:"revoke_tokens"`
	}
	if err := optional(w, r, &b); err != nil {
		return err
	}
	rotation := authn.Rotation{Secret: b.ConsumerSecret, EndPrevious: b.EndPrevious}
	var err error
	if rotation.JWKS, err = keySet(b.JWKS); err != nil {
		return err
	}
	version, err := anyVersion(r)
	if err != nil {
		return err
	}
	_, e, err := keys.find(a, w, r)
	if err != nil {
		return err
	}
	// Who ends at once what was good before believes that others have it.
	revoke := b.EndPrevious
	if b.RevokeTokens != nil {
		revoke = *b.RevokeTokens
	}
	mapping, credentials, err := a.deps.Catalog.RotateKey(r.Context(), caller(w, r), e.Base().UUID, version, rotation, revoke)
	if err != nil {
		return ofSecret(err)
	}
	return rest.JSON(w, http.StatusOK, struct {
		ConsumerKey string `json:"consumer_key"`
		secretOnce
	}{mapping.ConsumerKey, secretOnce{credentials.Secret}})
}

// ofSecret names a client's secret as bodies here do.
func ofSecret(err error) error {
	invalid, ok := errors.AsType[catalog.Invalid](err)
	if !ok {
		return err
	}
	invalid = slices.Clone(invalid)
	for i := range invalid {
		if at, ok := strings.CutPrefix(invalid[i].Pointer, "#/secret"); ok {
			invalid[i].Pointer = "#/consumer_secret" + at
		}
	}
	return invalid
}
