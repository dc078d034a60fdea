package authn

import (
	"encoding/base64"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// MaxFormBytes bounds the body of a form endpoint.
const MaxFormBytes = 64 << 10

const formType = "application/x-www-form-urlencoded"

func badRequest(status int, description string) *OAuthError {
	return &OAuthError{Status: status, Code: InvalidRequest, Description: description}
}

var (
	errMethod     = badRequest(http.StatusMethodNotAllowed, "Only POST is allowed here.")
	errTooLarge   = badRequest(http.StatusRequestEntityTooLarge, "The body is larger than 65536 bytes.")
	errBody       = badRequest(http.StatusBadRequest, "The body could not be read.")
	errEncoded    = badRequest(http.StatusUnsupportedMediaType, "The body must have no content coding.")
	errMediaType  = badRequest(http.StatusBadRequest, "The body must be application/x-www-form-urlencoded.")
	errForm       = badRequest(http.StatusBadRequest, "The body is not a well-formed form in UTF-8.")
	errRepeated   = badRequest(http.StatusBadRequest, "A parameter is there more than once.")
	errMechanisms = badRequest(http.StatusBadRequest, "The client authenticates in more than one way.")
	errOtherID    = badRequest(http.StatusBadRequest, "The client_id is not that of the authenticated client.")
	errURI        = badRequest(http.StatusBadRequest, "Credentials must not be in the request URI.")

	errClient    = &OAuthError{Status: http.StatusUnauthorized, Code: InvalidClient, Description: "The client could not be authenticated."}
	errThrottled = TooMany("Authentication failed too often. Wait before trying again.", throttledRetry)
)

// credentialParams are known to every form endpoint.
var credentialParams = []string{"client_id", "client_secret", "client_assertion", "client_assertion_type"}

// Form reads the form that r posts and finds out which client sent it, in this
// order: method, size of the body, media type, form syntax with repeated and
// conflicting parameters, failures of r's address, client authentication. The
// first that is wrong decides.
//
// Known are the names of the endpoint's own parameters that may be there only
// once. In the result they have one value, or none when it was empty. Others are
// as they came.
//
// Form forbids caching of whatever answer follows. Its error is an [OAuthError]
// or that of r's context, for [WriteError].
func (a *Authenticator) Form(w http.ResponseWriter, r *http.Request, known ...string) (Client, url.Values, error) {
	cred, form, err := readRequest(w, r, known)
	if err != nil {
		return Client{}, nil, err
	}
	if cred.mechanism == bearerToken {
		cred = credentials{mechanism: unreadable} // not a way for clients to say who they are
	}
	client, err := a.authenticate(w, r, cred)
	if err != nil {
		return Client{}, nil, err
	}
	return client, form, nil
}

// readRequest is all of [Authenticator.Form] that needs no knowledge of clients.
func readRequest(w http.ResponseWriter, r *http.Request, known []string) (credentials, url.Values, error) {
	w.Header().Set("Cache-Control", "no-store")
	form, err := readForm(w, r, known)
	if err != nil {
		return credentials{}, nil, err
	}
	cred, err := credentialsOf(r, form)
	return cred, form, err
}

func readForm(w http.ResponseWriter, r *http.Request, known []string) (url.Values, error) {
	if r.Method != http.MethodPost {
		return nil, errMethod
	}
	if r.ContentLength > MaxFormBytes {
		return nil, errTooLarge
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxFormBytes))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, errTooLarge
	}
	if err != nil {
		return nil, errBody
	}
	for _, coding := range r.Header["Content-Encoding"] {
		if coding != "" && !strings.EqualFold(coding, "identity") {
			return nil, errEncoded
		}
	}
	if types := r.Header["Content-Type"]; len(types) != 1 || !isFormType(types[0]) {
		return nil, errMediaType
	}
	form, err := parseForm(string(body))
	if err != nil {
		return nil, err
	}
	for _, names := range [][]string{known, credentialParams} {
		for _, name := range names {
			values, ok := form[name]
			if !ok {
				continue
			}
			// A parameter without a value counts as absent: RFC 6749 section 3.2.
			values = slices.DeleteFunc(values, func(v string) bool { return v == "" })
			switch len(values) {
			case 0:
				delete(form, name)
			case 1:
				form[name] = values
			default:
				return nil, errRepeated
			}
		}
	}
	return form, nil
}

func isFormType(s string) bool {
	if s == formType {
		return true
	}
	t, _, err := mime.ParseMediaType(s)
	return t == formType && (err == nil || errors.Is(err, mime.ErrInvalidMediaParameter))
}

func parseForm(body string) (url.Values, error) {
	form, err := url.ParseQuery(body)
	if err != nil {
		return nil, errForm // its text has the input
	}
	for name, values := range form {
		if !isText(name) || slices.ContainsFunc(values, func(v string) bool { return !isText(v) }) {
			return nil, errForm
		}
	}
	return form, nil
}

// isText reports whether s is what a parameter may be, by RFC 6749 appendix B,
// and what Postgres can store.
func isText(s string) bool {
	return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0
}

// mechanism is how a client says who it is.
type mechanism int

const (
	nothing     mechanism = iota
	basic                 // the Authorization field
	post                  // client_id and client_secret in the body
	assertion             // client_assertion, a JWT
	none                  // client_id alone: a public client
	bearerToken           // the Authorization field, with a token
	unreadable            // credentials that no client can have, or of a kind that is not supported
)

type credentials struct {
	mechanism
	id     string
	secret string // or the assertion, or the token
}

func credentialsOf(r *http.Request, form url.Values) (credentials, error) {
	if hasCredentials(r.URL.RawQuery) {
		return credentials{}, errURI
	}
	header := r.Header["Authorization"]
	id, secret := form.Get("client_id"), form.Get("client_secret")
	asserts := form.Has("client_assertion") || form.Has("client_assertion_type")

	ways := len(header)
	if secret != "" {
		ways++
	}
	if asserts {
		ways++
	}
	switch {
	case ways > 1:
		return credentials{}, errMechanisms
	case len(header) == 1:
		if t, ok := parseBearer(header[0]); ok {
			return credentials{mechanism: bearerToken, id: id, secret: t}, nil
		}
		user, password, ok := parseBasic(header[0])
		if !ok {
			return credentials{mechanism: unreadable}, nil
		}
		if id != "" && id != user {
			return credentials{}, errOtherID
		}
		return credentials{basic, user, password}, nil
	case asserts:
		jwt := form.Get("client_assertion")
		client, ok := assertedClient(jwt)
		switch {
		case !ok || form.Get("client_assertion_type") != assertionType:
			return credentials{mechanism: unreadable}, nil
		case id != "" && id != client:
			return credentials{}, errOtherID
		}
		return credentials{assertion, client, jwt}, nil
	case secret != "" && id == "":
		return credentials{mechanism: unreadable}, nil
	case secret != "":
		return credentials{post, id, secret}, nil
	case id != "":
		return credentials{mechanism: none, id: id}, nil
	}
	return credentials{}, nil
}

// hasCredentials looks for credentials in a query string, however damaged it is:
// what is there has been seen by proxies and their logs.
func hasCredentials(query string) bool {
	for part := range strings.FieldsFuncSeq(query, func(r rune) bool { return r == '&' || r == ';' }) {
		name, _, _ := strings.Cut(part, "=")
		if decoded, err := url.QueryUnescape(name); err == nil {
			name = decoded
		}
		if slices.Contains(credentialParams, name) {
			return true
		}
	}
	return false
}

// parseBasic reads the credentials of RFC 7617 as RFC 6749 section 2.3.1 wants
// them: each half form-encoded. What does not decode is not taken as it stands.
func parseBasic(header string) (id, secret string, ok bool) {
	id, secret, ok = splitBasic(header)
	if !ok {
		return "", "", false
	}
	id, err := url.QueryUnescape(id)
	if err != nil || !isText(id) {
		return "", "", false
	}
	secret, err = url.QueryUnescape(secret)
	if err != nil || !isText(secret) {
		return "", "", false
	}
	return id, secret, true
}

var strictBase64 = base64.StdEncoding.Strict()

func splitBasic(header string) (user, password string, ok bool) {
	scheme, rest, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Basic") {
		return "", "", false
	}
	b, err := strictBase64.DecodeString(strings.TrimLeft(rest, " "))
	if err != nil {
		return "", "", false
	}
	return strings.Cut(string(b), ":")
}
