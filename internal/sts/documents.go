package sts

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	tokenPath    = "/oauth2/token"
	revokePath   = "/oauth2/revoke"
	jwksPath     = "/oauth2/jwks"
	metadataPath = "/.well-known/oauth-authorization-server"

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
	Issuer                string   `json:"issuer"`
	TokenEndpoint         string   `json:"token_endpoint"`
	JWKSURI               string   `json:"jwks_uri"`
	RevocationEndpoint    string   `json:"revocation_endpoint"`
	GrantTypes            []string `json:"grant_types_supported"`
	TokenAuthMethods      []string `json:"token_endpoint_auth_methods_supported"`
	RevocationAuthMethods []string `json:"revocation_endpoint_auth_methods_supported"`
}

func newMetadata(issuer string) (document, error) {
	withSecret := []string{"client_secret_basic", "client_secret_post"}
	body, err := json.Marshal(metadata{
		Issuer:                issuer,
		TokenEndpoint:         issuer + tokenPath,
		JWKSURI:               issuer + jwksPath,
		RevocationEndpoint:    issuer + revokePath,
		GrantTypes:            []string{clientCredentials},
		TokenAuthMethods:      withSecret,
		RevocationAuthMethods: append(withSecret, "none"),
	})
	if err != nil {
		return document{}, fmt.Errorf("encode metadata: %w", err)
	}
	return newDocument(jsonType, body), nil
}

func (s *Server) serveMetadata(w http.ResponseWriter, r *http.Request) { s.metadata.serve(w, r) }

func (s *Server) serveKeys(w http.ResponseWriter, r *http.Request) {
	keys, err := s.currentKeys(r.Context())
	if err != nil {
		s.log.Warn("the key set cannot be served", "error", err)
		writeUnavailable(w)
		return
	}
	w.Header().Add("Vary", "Accept")
	for _, d := range keys.documents[1:] {
		if accepts(r.Header["Accept"], d.mediaType) {
			d.serve(w, r)
			return
		}
	}
	keys.documents[0].serve(w, r)
}

// writeUnavailable answers in the form of RFC 9457: a key set is no OAuth endpoint.
func writeUnavailable(w http.ResponseWriter) {
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	h.Set("Retry-After", strconv.Itoa(int(storageRetry/time.Second)))
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = io.WriteString(w, `{"type":"about:blank","title":"Service Unavailable","status":503}`) // a caller that is gone does not read it
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
