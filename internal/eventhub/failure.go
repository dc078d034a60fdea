package eventhub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

// What callers are asked to wait: when too much is here already, and when the
// database is away.
const (
	overloadRetry = time.Second
	storageRetry  = 5 * time.Second
)

const notNow = "This cannot be answered now. Sending the same request again is safe."

func unavailable(retryAfter time.Duration, cause error) error {
	return &rest.Problem{Status: http.StatusServiceUnavailable, Detail: notNow, RetryAfter: retryAfter, Cause: cause}
}

func problem(status int, format string, args ...any) error {
	return rest.Status(status, fmt.Sprintf(format, args...))
}

// failure is an error as a caller sees it, before it is put into the words of one of
// the APIs.
type failure struct {
	status int
	detail string
}

// fail records err for the log, sets what headers it needs, and returns what it is.
func fail(w http.ResponseWriter, err error) failure {
	record(w, err)
	f, retry := failureOf(err)
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Del("Content-Encoding")
	if retry > 0 {
		header.Set("Retry-After", strconv.Itoa(int(math.Ceil(retry.Seconds()))))
	}
	return f
}

func failureOf(err error) (failure, time.Duration) {
	p, isProblem := errors.AsType[*rest.Problem](err)
	denied, isDenied := errors.AsType[*authn.OAuthError](err)
	invalid, isInvalid := errors.AsType[*revocation.InvalidError](err)
	later := func(retry time.Duration) (failure, time.Duration) {
		return failure{http.StatusServiceUnavailable, notNow}, retry
	}
	switch {
	case isProblem && p.Status != http.StatusTooManyRequests:
		return failure{p.Status, p.Detail}, p.RetryAfter
	case isProblem:
		return later(p.RetryAfter)
	case isDenied && denied.Status == http.StatusUnauthorized:
		return failure{denied.Status, denied.Description}, 0
	case isDenied:
		// Throttled callers too: a gateway that is told 429 may never ask again.
		return later(max(denied.RetryAfter, overloadRetry))
	case isInvalid:
		return failure{http.StatusBadRequest, invalid.Detail}, 0
	case errors.Is(err, ledger.ErrBusy):
		return later(overloadRetry)
	case errors.Is(err, errBusy), errors.Is(err, ledger.ErrUnavailable), errors.Is(err, follow.ErrStale), errors.Is(err, errTimeout),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return later(storageRetry)
	}
	return failure{http.StatusInternalServerError, "Something went wrong on our side."}, 0
}

// record gives err to the log line of the request.
func record(w http.ResponseWriter, err error) {
	for {
		if rec, ok := w.(authn.Recorder); ok {
			rec.RecordError(err)
			return
		}
		inner, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return
		}
		w = inner.Unwrap()
	}
}

// failData answers err as WSO2's REST APIs do.
func failData(w http.ResponseWriter, _ *http.Request, err error) {
	f := fail(w, err)
	writeError(w, f.status, struct {
		Code        int      `json:"code"`
		Message     string   `json:"message"`
		Description string   `json:"description"`
		MoreInfo    string   `json:"moreInfo"`
		Error       []string `json:"error"`
	}{f.status, http.StatusText(f.status), f.detail, "", []string{}})
}

// failNotify answers err as WSO2's endpoint for notifications does.
func failNotify(w http.ResponseWriter, _ *http.Request, err error) {
	f := fail(w, err)
	writeError(w, f.status, struct{ Message string }{f.detail})
}

// The codes of etcd's errors in version 2 of its API.
const (
	etcdKeyNotFound  = 100
	etcdReadOnly     = 107
	etcdUnauthorized = 110
	etcdInternal     = 300
)

var etcdMessages = map[int]string{
	etcdKeyNotFound:  "Key not found",
	etcdReadOnly:     "Root is read only",
	etcdUnauthorized: "The request requires user authentication",
	etcdInternal:     "Raft Internal Error",
}

// failKeys answers err as etcd does.
func failKeys(w http.ResponseWriter, r *http.Request, err error) {
	f := fail(w, err)
	code, cause := etcdInternal, f.detail
	switch f.status {
	case http.StatusNotFound:
		code, cause = etcdKeyNotFound, keyOf(r)
	case http.StatusMethodNotAllowed:
		code, cause = etcdReadOnly, keyOf(r)
	case http.StatusUnauthorized, http.StatusForbidden:
		code = etcdUnauthorized
	}
	index, _ := strconv.ParseInt(w.Header().Get(etcdIndex), 10, 64) // 0 where there is none
	writeError(w, f.status, struct {
		ErrorCode int    `json:"errorCode"`
		Message   string `json:"message"`
		Cause     string `json:"cause"`
		Index     int64  `json:"index"`
	}{code, etcdMessages[code], cause, index})
}

func writeError(w http.ResponseWriter, status int, body any) {
	b, err := json.Marshal(body)
	if err != nil {
		panic(err) // it has texts and numbers only
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = newPaced(w).Write(b) // a caller that is gone does not read it
}

// notAllowed is for a method that r's path does not have.
func notAllowed(w http.ResponseWriter, r *http.Request, allowed []string) error {
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	return problem(http.StatusMethodNotAllowed, "The path has no method %s.", methodName(r.Method))
}

// methodName keeps what a caller made up out of answers.
func methodName(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return method
	}
	return "of that name"
}
