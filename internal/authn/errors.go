package authn

import (
	"context"
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The codes of RFC 6749 section 5.2, RFC 7009 section 2.2.1, and two of RFC 6749
// section 4.1.2.1 for what is not the caller's fault.
const (
	InvalidRequest         = "invalid_request"
	InvalidClient          = "invalid_client"
	InvalidGrant           = "invalid_grant"
	UnsupportedTokenType   = "unsupported_token_type"
	TemporarilyUnavailable = "temporarily_unavailable"
	ServerError            = "server_error"
)

// OAuthError is an answer of an OAuth form endpoint that is not success.
type OAuthError struct {
	Status int
	Code   string
	// Description is for people. It never repeats input, and has only the
	// characters of RFC 6749 section 5.2: printable ASCII without quote and backslash.
	Description string
	// RetryAfter is sent in whole seconds, rounded up; 0 sends none.
	RetryAfter time.Duration
	// Cause is for the log and never sent. May be nil.
	Cause error
}

func (e *OAuthError) Error() string {
	s := e.Code + ": " + e.Description
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

func (e *OAuthError) Unwrap() error { return e.Cause }

// Unavailable is a 503 that invites the caller to try again later. An assertion that came with
// the request may be used up.
func Unavailable(retryAfter time.Duration, cause error) *OAuthError {
	return &OAuthError{
		Status: http.StatusServiceUnavailable, Code: TemporarilyUnavailable,
		Description: "This cannot be done now. Sending the request again is safe, with a new client assertion if it has one.",
		RetryAfter:  retryAfter, Cause: cause,
	}
}

// TooMany is a 429.
func TooMany(description string, retryAfter time.Duration) *OAuthError {
	return &OAuthError{
		Status: http.StatusTooManyRequests, Code: TemporarilyUnavailable,
		Description: description, RetryAfter: max(retryAfter, time.Second),
	}
}

// storageRetry is what callers are asked to wait when the database is away.
const storageRetry = 5 * time.Second

// A Recorder is an [http.ResponseWriter] that keeps what the log line of its
// request needs.
type Recorder interface {
	// RecordClient is called with the client id once it is proved.
	RecordClient(id string)
	// RecordError is called with the error that is being answered.
	RecordError(err error)
}

// WriteError answers err as RFC 6749 section 5.2 demands: an [OAuthError] as it
// is, the end of a context as 503, and what it does not know as a bare 500.
func WriteError(w http.ResponseWriter, err error) {
	if rec, ok := w.(Recorder); ok {
		rec.RecordError(err)
	}
	e, ok := errors.AsType[*OAuthError](err)
	switch {
	case ok:
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		e = Unavailable(storageRetry, err)
	default:
		e = &OAuthError{Status: http.StatusInternalServerError, Code: ServerError, Description: "Something went wrong on our side."}
	}
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Type", "application/json")
	if e.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(e.RetryAfter.Seconds()))))
	}
	switch e.Status {
	case http.StatusUnauthorized:
		h.Set("WWW-Authenticate", `Basic realm="oauth2", charset="UTF-8"`)
	case http.StatusMethodNotAllowed:
		h.Set("Allow", http.MethodPost)
	case http.StatusUnsupportedMediaType:
		h.Set("Accept-Encoding", "identity")
	case http.StatusRequestEntityTooLarge:
		h.Set("Connection", "close") // the rest of the body is not read
	}
	body := `{"error":"` + e.Code + `"`
	if isPlain(e.Description) {
		body += `,"error_description":"` + e.Description + `"`
	}
	body += "}\n"
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(e.Status)
	_, _ = w.Write([]byte(body)) // a caller that is gone does not read it
}

// isPlain reports whether s is an error_description that RFC 6749 section 5.2 allows.
func isPlain(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return r < 0x20 || r > 0x7e || r == '"' || r == '\\'
	}) < 0
}
