package sts

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/internal/authn"
)

const (
	tokenPath      = "/oauth2/token"
	revokePath     = "/oauth2/revoke"
	introspectPath = "/oauth2/introspect"
	jwksPath       = "/oauth2/jwks"
	metadataPath   = "/.well-known/oauth-authorization-server"
	openIDPath     = "/.well-known/openid-configuration"

	jsonType   = "application/json"
	jwkSetType = "application/jwk-set+json"
)

// document is something public that is cached by others.
type document struct {
	mediaType, etag string
	body            []byte
}

func newDocument(mediaType string, body []byte) document {
	sum := sha256.Sum256(append([]byte(mediaType+"\n"), body...))
	return document{mediaType, `"` + base64.RawURLEncoding.EncodeToString(sum[:16]) + `"`, body}
}

// serve answers GET and HEAD, conditional ones too.
func (d document) serve(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Type", d.mediaType)
	h.Set("Cache-Control", "public, max-age="+strconv.Itoa(int(keySetMaxAge.Seconds())))
	h.Set("ETag", d.etag)
	h.Set("Access-Control-Allow-Origin", "*") // there is nothing secret in it
	h.Set("X-Content-Type-Options", "nosniff")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(d.body))
}

// metadata has the members of RFC 8414 section 2. There is no authorization
// endpoint, so there are no response types: an array must not be empty.
type metadata struct {
	Issuer                  string   `json:"issuer"`
	TokenEndpoint           string   `json:"token_endpoint"`
	JWKSURI                 string   `json:"jwks_uri"`
	RevocationEndpoint      string   `json:"revocation_endpoint"`
	IntrospectionEndpoint   string   `json:"introspection_endpoint"`
	GrantTypes              []string `json:"grant_types_supported"`
	Scopes                  []string `json:"scopes_supported"`
	TokenMethods            []string `json:"token_endpoint_auth_methods_supported"`
	TokenAlgorithms         []string `json:"token_endpoint_auth_signing_alg_values_supported"`
	RevocationMethods       []string `json:"revocation_endpoint_auth_methods_supported"`
	RevocationAlgorithms    []string `json:"revocation_endpoint_auth_signing_alg_values_supported"`
	IntrospectionMethods    []string `json:"introspection_endpoint_auth_methods_supported"`
	IntrospectionAlgorithms []string `json:"introspection_endpoint_auth_signing_alg_values_supported"`
	ServiceDocumentation    string   `json:"service_documentation"`
}

// openIDMetadata adds members of OpenID Connect Discovery 1.0 section 3. We issue no id tokens;
// but libraries that know only this document take the first for the algorithms of the key set,
// and some refuse a document without the second.
type openIDMetadata struct {
	metadata
	IDTokenAlgorithms []string `json:"id_token_signing_alg_values_supported"`
	SubjectTypes      []string `json:"subject_types_supported"`
}

// maxScopes is how many scopes the metadata names. It need not name all: RFC 8414 section 2.
const maxScopes = 200

// introspectScope is what a bearer token needs at the introspection endpoint.
const introspectScope = "introspect"

// describe makes the metadata of an issuer whose tenant has these scopes, and the document of
// OpenID Connect Discovery.
func describe(iss string, scopes []string) (oauth, openID document, err error) {
	scopes = slices.Sorted(slices.Values(scopes))
	scopes = append(scopes[:min(len(scopes), maxScopes-1)], introspectScope)
	slices.Sort(scopes)
	methods := []string{"client_secret_basic", "client_secret_post", "private_key_jwt"}
	m := metadata{
		Issuer:                  iss,
		TokenEndpoint:           iss + tokenPath,
		JWKSURI:                 iss + jwksPath,
		RevocationEndpoint:      iss + revokePath,
		IntrospectionEndpoint:   iss + introspectPath,
		GrantTypes:              []string{clientCredentials},
		Scopes:                  slices.Compact(scopes),
		TokenMethods:            methods,
		TokenAlgorithms:         authn.AssertionAlgorithms,
		RevocationMethods:       append(methods, "none"), // public clients may revoke
		RevocationAlgorithms:    authn.AssertionAlgorithms,
		IntrospectionMethods:    methods,
		IntrospectionAlgorithms: authn.AssertionAlgorithms,
		ServiceDocumentation:    "https://github.com/rescindhq/rescind",
	}
	oauthBody, err := json.Marshal(m)
	if err != nil {
		return oauth, openID, fmt.Errorf("encode metadata: %w", err)
	}
	openIDBody, err := json.Marshal(openIDMetadata{m, algorithms, []string{"public"}})
	if err != nil {
		return oauth, openID, fmt.Errorf("encode metadata: %w", err)
	}
	return newDocument(jsonType, oauthBody), newDocument(jsonType, openIDBody), nil
}

// metadataAge is how long metadata may be behind the catalog. Others keep it for minutes.
const metadataAge = time.Second

// describedAt is an issuer's metadata at a time, and what it was made of. It is not changed
// after it was made.
type describedAt struct {
	at            time.Time
	scopes        []string
	oauth, openID document
}

// described is the metadata of is, as the catalog is now or was a moment ago.
func (s *Server) described(is *issuer, km *catalog.KeyManager) (*describedAt, error) {
	last, now := is.metadata.Load(), s.now()
	if last != nil && now.Sub(last.at) < metadataAge {
		return last, nil
	}
	d := &describedAt{at: now}
	var scopes []*catalog.Scope
	s.cfg.State.Replica().View(func(v *replica.View) { scopes = v.Scopes() })
	for _, scope := range scopes {
		if scope.Tenant.ID == km.Tenant.ID {
			d.scopes = append(d.scopes, scope.Name)
		}
	}
	if last != nil && slices.Equal(d.scopes, last.scopes) {
		d.oauth, d.openID = last.oauth, last.openID
	} else {
		var err error
		if d.oauth, d.openID, err = describe(is.iss, d.scopes); err != nil {
			return nil, err
		}
	}
	is.metadata.Store(d)
	return d, nil
}

func (s *Server) serveMetadata(w http.ResponseWriter, r *http.Request, is *issuer, km *catalog.KeyManager) error {
	d, err := s.described(is, km)
	if err == nil {
		d.oauth.serve(w, r)
	}
	return err
}

func (s *Server) serveOpenID(w http.ResponseWriter, r *http.Request, is *issuer, km *catalog.KeyManager) error {
	d, err := s.described(is, km)
	if err == nil {
		d.openID.serve(w, r)
	}
	return err
}

func (s *Server) serveKeys(w http.ResponseWriter, r *http.Request, is *issuer, _ *catalog.KeyManager) error {
	keys, err := is.current(r.Context())
	if err != nil {
		return err
	}
	w.Header().Add("Vary", "Accept")
	for _, d := range keys.documents[1:] {
		if accepts(r.Header["Accept"], d.mediaType) {
			d.serve(w, r)
			return nil
		}
	}
	keys.documents[0].serve(w, r)
	return nil
}

// accepts reports whether the caller names the media type itself; a wildcard is
// no wish for it.
func accepts(accept []string, mediaType string) bool {
	for _, item := range strings.Split(strings.Join(accept, ","), ",") {
		t, params, err := mime.ParseMediaType(item)
		if err != nil || t != mediaType {
			continue
		}
		if q, err := strconv.ParseFloat(params["q"], 64); params["q"] == "" || err == nil && q > 0 {
			return true
		}
	}
	return false
}
