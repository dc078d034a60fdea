package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// Problem is an error of RFC 9457 that a caller sees. It says nothing that the caller
// may not know.
type Problem struct {
	// Slug ends the type, https://rescindhq.github.io/problems/<slug>. Empty for
	// about:blank: the problem says no more than its status.
	Slug string
	// Title is the same for every problem of a type. Without a Slug it is that of the status.
	Title  string
	Status int
	Detail string
	// Errors are what is wrong with the body.
	Errors []catalog.FieldError
	// Members are added to the document, under names that RFC 9457 does not define.
	Members map[string]any
	// RetryAfter, in whole seconds, is for 429 and 503. 0 sends none.
	RetryAfter time.Duration
	// Cause is for the log. May be nil.
	Cause error
}

const typeBase = "https://rescindhq.github.io/problems/"

// Error is for the log.
func (p *Problem) Error() string {
	parts := []string{p.Slug}
	if p.Slug == "" {
		parts[0] = http.StatusText(p.Status)
	}
	if p.Detail != "" {
		parts = append(parts, p.Detail)
	}
	if len(p.Errors) > 0 {
		parts = append(parts, catalog.Invalid(p.Errors).Error())
	}
	if p.Cause != nil {
		parts = append(parts, p.Cause.Error())
	}
	return strings.Join(parts, ": ")
}

// Unwrap returns Cause.
func (p *Problem) Unwrap() error { return p.Cause }

// Status is the problem of type about:blank with a detail, which may be empty.
func Status(status int, detail string) *Problem { return &Problem{Status: status, Detail: detail} }

// InvalidRequest is a 400 for a body that cannot be used.
func InvalidRequest(detail string, errs ...catalog.FieldError) *Problem {
	return &Problem{
		Slug: "invalid-request", Title: "The request is not valid.", Status: http.StatusBadRequest, Detail: detail, Errors: errs,
	}
}

// InvalidParameter is a 400 for a query parameter that cannot be used. The detail names
// the parameter, and does not repeat its value.
func InvalidParameter(detail string) *Problem {
	return &Problem{
		Slug: "invalid-parameter", Title: "A parameter is not valid.", Status: http.StatusBadRequest, Detail: detail,
	}
}

// What callers are asked to wait when too much is under way, and when the database or
// what else is needed is away.
const (
	busyRetry    = time.Second
	storageRetry = 5 * time.Second
)

// Write answers with what err is: a [Problem] as it is, an [authn.OAuthError] by its
// status, description and wait, [catalog.Invalid] and [revocation.InvalidError] as 400
// invalid-request, [ledger.ErrBusy], [ledger.ErrUnavailable], a database that is away
// and an ended context as 503, anything else as a bare 500. It records err for the log.
// What was set in the header for another answer is taken back.
func Write(w http.ResponseWriter, _ *http.Request, err error) {
	if rec, ok := find[authn.Recorder](w); ok {
		rec.RecordError(err)
	}
	p := problemOf(err)
	body, err := p.encode(ExchangeOf(w).RequestID())
	if err != nil {
		panic(err) // Members are made by us
	}
	h := w.Header()
	for _, name := range []string{"Content-Encoding", "ETag", "Last-Modified", "Link", "Location"} {
		h.Del(name)
	}
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if p.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(p.RetryAfter.Seconds()))))
	}
	if p.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", challenge)
	}
	w.WriteHeader(p.Status)
	_, _ = w.Write(body) // a caller that is gone does not read it
}

// problemOf is the only place where an error becomes something a caller sees.
func problemOf(err error) *Problem {
	if p, ok := errors.AsType[*Problem](err); ok {
		return p
	}
	if e, ok := errors.AsType[*authn.OAuthError](err); ok {
		return &Problem{Status: e.Status, Detail: e.Description, RetryAfter: e.RetryAfter}
	}
	if e, ok := errors.AsType[catalog.Invalid](err); ok {
		return InvalidRequest(seeErrors, e...)
	}
	if e, ok := errors.AsType[*revocation.InvalidError](err); ok {
		return InvalidRequest("The request cannot be used: " + e.Detail + ".")
	}
	unavailable := func(detail string, wait time.Duration) *Problem {
		return &Problem{Status: http.StatusServiceUnavailable, Detail: detail, RetryAfter: wait}
	}
	switch {
	case errors.Is(err, ledger.ErrDoubt):
		return unavailable("It is not known whether this was done. Look before sending it again.", storageRetry)
	case errors.Is(err, ledger.ErrBusy):
		return unavailable("Too much is waiting to be done. Sending the same request again is safe.", busyRetry)
	case errors.Is(err, ledger.ErrUnavailable):
		return unavailable("This cannot be done now. Sending the same request again is safe.", storageRetry)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return unavailable("This was not done in time.", storageRetry)
	case isAway(err):
		return unavailable("This cannot be done now.", storageRetry)
	}
	return &Problem{Status: http.StatusInternalServerError}
}

const seeErrors = "The body is not as it must be: errors has what is wrong."

// isAway reports whether err is of a database that cannot be reached, or refuses
// because of its own state.
func isAway(err error) bool {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch e.Code[:min(2, len(e.Code))] {
		case "08", "25", "53", "55", "57": // connection, read-only, resources, lock timeout, shutting down
			return true
		}
		return false
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	_, isNet := errors.AsType[net.Error](err)
	return isNet || errors.Is(err, io.ErrUnexpectedEOF)
}

// encode is the document, its members in RFC 9457's order.
func (p *Problem) encode(requestID string) ([]byte, error) {
	document := struct {
		Type     string               `json:"type"`
		Title    string               `json:"title"`
		Status   int                  `json:"status"`
		Detail   string               `json:"detail,omitempty"`
		Instance string               `json:"instance,omitempty"`
		Errors   []catalog.FieldError `json:"errors,omitempty"`
	}{"about:blank", http.StatusText(p.Status), p.Status, p.Detail, "", p.Errors}
	if p.Slug != "" {
		document.Type, document.Title = typeBase+p.Slug, p.Title
	}
	if isUUID(requestID) {
		document.Instance = "urn:uuid:" + strings.ToLower(requestID)
	}
	body, err := marshal(document)
	if err != nil || len(p.Members) == 0 {
		return body, err
	}
	members, err := marshal(p.Members)
	if err != nil {
		return nil, fmt.Errorf("encode members of problem %q: %w", p.Slug, err)
	}
	return append(append(body[:len(body)-1], ','), members[1:]...), nil
}

// marshal leaves <, > and & as they are: nothing of ours is put into a page.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// isUUID is for request ids, which a caller may choose.
func isUUID(s string) bool {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return false
	}
	digits := strings.ReplaceAll(s, "-", "")
	return len(digits) == 32 && strings.Trim(digits, "0123456789abcdefABCDEF") == ""
}
