package httpapi

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
)

// exchange is one request and its answer: the ResponseWriter that handlers get,
// and what is written about it in the log.
type exchange struct {
	http.ResponseWriter
	id          string
	traceparent string // ours, with a parent id of this request
	remote      string

	status int
	bytes  int64
	client string
	err    error
}

var (
	_ authn.Recorder = (*exchange)(nil)
	_ rest.Exchange  = (*exchange)(nil)
)

func (x *exchange) RecordClient(id string) { x.client = id }
func (x *exchange) RecordError(err error)  { x.err = err }

// RequestID, Traceparent and RemoteAddr implement [rest.Exchange].
func (x *exchange) RequestID() string   { return x.id }
func (x *exchange) Traceparent() string { return x.traceparent }
func (x *exchange) RemoteAddr() string  { return x.remote }

// Unwrap is for [http.ResponseController].
func (x *exchange) Unwrap() http.ResponseWriter { return x.ResponseWriter }

func (x *exchange) WriteHeader(status int) {
	if x.status == 0 && status >= 200 {
		x.status = status
	}
	x.ResponseWriter.WriteHeader(status)
}

func (x *exchange) Write(b []byte) (int, error) {
	if x.status == 0 {
		x.status = http.StatusOK
	}
	n, err := x.ResponseWriter.Write(b)
	x.bytes += int64(n)
	return n, err
}

type exchangeKey struct{}

// exchangeOf returns the exchange that observe has put into ctx.
func exchangeOf(ctx context.Context) *exchange {
	return ctx.Value(exchangeKey{}).(*exchange)
}

// observe is around everything else.
func (a *api) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		x := &exchange{ResponseWriter: w, id: requestID(r.Header), traceparent: continueTrace(r.Header)}
		if addr := a.remote(r); addr.IsValid() {
			x.remote = addr.String()
		}
		w.Header().Set("X-Request-Id", x.id)
		r = r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x))
		defer func() {
			caught := recover()
			if caught != nil && caught != http.ErrAbortHandler {
				a.log.Error("a request made the service panic; please report this",
					"panic", fmt.Sprint(caught), "request_id", x.id, "stack", string(debug.Stack()))
				if x.status == 0 {
					a.fail(x, r, fmt.Errorf("panic: %v", caught))
					caught = nil
				}
			}
			a.finish(x, r, time.Since(start))
			if caught != nil {
				panic(http.ErrAbortHandler) // half an answer must not look like a whole one
			}
		}()
		next.ServeHTTP(x, r)
	})
}

// gatewayReports is the route by which gateways say that all is as it was.
const gatewayReports = "/v1/gateways/{id}/status"

func (a *api) finish(x *exchange, r *http.Request, took time.Duration) {
	if x.status == 0 {
		x.status = http.StatusOK // what net/http sends for a handler that wrote nothing
	}
	route := chi.RouteContext(r.Context()).RoutePattern()
	if route == "" { // refused before it was routed, or there is no such route
		route = a.router.Find(chi.NewRouteContext(), r.Method, r.URL.Path)
	}
	method := methodLabel(r.Method)
	a.metrics.observe(route, method, x.status, took)

	level := slog.LevelInfo
	switch {
	case x.status < 300 && route == gatewayReports:
		level = slog.LevelDebug // each gateway, every two seconds
	case x.status == http.StatusServiceUnavailable:
		level = slog.LevelWarn // heals itself
	case x.status >= 500:
		level = slog.LevelError
	}
	if !a.log.Enabled(r.Context(), level) {
		return
	}
	attrs := make([]slog.Attr, 0, 10)
	attrs = append(attrs, slog.String("route", route), slog.String("method", method), slog.Int("status", x.status),
		slog.Int64("bytes", x.bytes), slog.Duration("duration", took), slog.String("request_id", x.id),
		slog.String("trace_id", traceID(x.traceparent)), slog.String("remote", x.remote))
	if x.client != "" {
		attrs = append(attrs, slog.String("client", x.client))
	}
	if x.err != nil {
		attrs = append(attrs, slog.String("error", x.err.Error()))
	}
	a.log.LogAttrs(r.Context(), level, "request", attrs...)
}

// fail answers for the whole service rather than for one endpoint.
func (a *api) fail(w http.ResponseWriter, r *http.Request, err error) {
	if a.isForm(r.URL.Path) {
		authn.WriteError(w, err)
		return
	}
	rest.Write(w, r, err)
}

// maxFirstRead is room for most forms with a token.
const maxFirstRead = 4 << 10

// readAhead reads r's form to its end, or to where it is too large, and puts it
// in place of what it has read. Errors come up again when that is read.
func readAhead(r *http.Request) {
	if r.ContentLength == 0 || r.ContentLength > authn.MaxFormBytes {
		return
	}
	var buf bytes.Buffer
	if r.ContentLength > 0 {
		buf.Grow(min(int(r.ContentLength), maxFirstRead) + bytes.MinRead) // a promise of bytes is none
	}
	_, err := buf.ReadFrom(io.LimitReader(r.Body, authn.MaxFormBytes+1))
	rest := io.Reader(r.Body)
	if err != nil {
		rest = brokenReader{err}
	}
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(&buf, rest), r.Body}
}

type brokenReader struct{ err error }

func (b brokenReader) Read([]byte) (int, error) { return 0, b.err }

// requestID is the caller's if it is harmless, else a new UUID.
func requestID(header http.Header) string {
	if given := header.Get("X-Request-Id"); isRequestID(given) {
		return given
	}
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func isRequestID(s string) bool {
	for _, c := range []byte(s) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-') {
			return false
		}
	}
	return s != "" && len(s) <= 64
}

var methods = []string{
	http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions,
}

// methodLabel keeps callers from making metrics.
func methodLabel(method string) string {
	for _, m := range methods {
		if m == method {
			return m
		}
	}
	return "other"
}
