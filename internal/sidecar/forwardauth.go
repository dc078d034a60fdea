package sidecar

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rescindhq/rescind/api/gateway"
	"github.com/rescindhq/rescind/api/replica"
)

// The paths of forward-auth.
const (
	// authPath answers what the client is to be told: 200 with the identity headers, or the status,
	// header and body of the refusal. For Caddy, Traefik, HAProxy, and whoever passes on all of that.
	authPath = "/auth"
	// nginxPath answers in the words that nginx's auth_request understands, which turns every other status
	// into 500 and drops bodies: 200 as authPath, 401 for a 401, and 403 for all else. What the client is
	// to be told is in the header fields below, beside WWW-Authenticate and Retry-After.
	nginxPath = "/auth/nginx"

	statusHeader = "X-Rescind-Status" // of nginxPath: the status
	bodyHeader   = "X-Rescind-Body"   // of nginxPath: the body, which is JSON in one line of ASCII
)

// What proxies say the client has sent. No other field of a question is looked at but Authorization.
const (
	methodHeader = "X-Forwarded-Method"
	uriHeader    = "X-Forwarded-Uri"
)

// forwardAuth answers proxies that ask before they pass a request on.
type forwardAuth struct {
	checker checker
	m       *metrics
	log     *slog.Logger
	warned  atomic.Int64 // when, in Unix seconds
}

func newForwardAuth(c checker, m *metrics, log *slog.Logger) *forwardAuth {
	return &forwardAuth{checker: c, m: m, log: log.With("component", "auth")}
}

func (f *forwardAuth) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != authPath && r.URL.Path != nginxPath {
		writeProblem(w, http.StatusNotFound, "Not Found", "Requests are asked about at "+authPath+" and "+nginxPath)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	question, err := asked(r.Header)
	if err != nil {
		f.m.malformed.Inc()
		f.warn(err)
		f.refuse(w, r, func(w http.ResponseWriter) {
			writeProblem(w, http.StatusBadRequest, "Bad Request", "The proxy in front of this gateway is configured wrongly: "+err.Error())
		})
		return
	}
	d := f.checker.Decide(r.Context(), question)
	if d.Allowed {
		d.SetIdentity(w.Header())
		w.WriteHeader(http.StatusOK)
		return
	}
	f.refuse(w, r, d.WriteError)
}

// refuse answers with what write writes, in the words that the path stands for.
func (f *forwardAuth) refuse(w http.ResponseWriter, r *http.Request, write func(http.ResponseWriter)) {
	if r.URL.Path != nginxPath {
		write(w)
		return
	}
	answer := refusal{header: w.Header()}
	write(&answer)
	h := w.Header()
	for _, name := range []string{"Content-Type", "Content-Length"} {
		h.Del(name)
	}
	h.Set(statusHeader, strconv.Itoa(answer.status))
	h.Set(bodyHeader, oneLine(answer.body))
	if answer.status != http.StatusUnauthorized {
		answer.status = http.StatusForbidden
	}
	w.WriteHeader(answer.status)
}

// warn tells the operator once a minute: clients have no part in it, and every request is refused.
func (f *forwardAuth) warn(err error) {
	now := time.Now().Unix()
	if last := f.warned.Load(); now-last >= 60 && f.warned.CompareAndSwap(last, now) {
		f.log.Warn("the proxy asks wrongly, and its requests are refused; see api/examples/gateway for how it is configured", "error", err)
	}
}

// asked is what a proxy asks about. Both fields must be there once: of two, one may be the client's.
func asked(h http.Header) (gateway.Request, error) {
	method, err := single(h, methodHeader)
	if err != nil {
		return gateway.Request{}, err
	}
	target, err := single(h, uriHeader)
	if err != nil {
		return gateway.Request{}, err
	}
	switch {
	case !isMethod(method):
		return gateway.Request{}, fmt.Errorf("%s must be an HTTP method", methodHeader)
	case !strings.HasPrefix(target, "/"):
		return gateway.Request{}, fmt.Errorf("%s must be the path and query of the request, as it was sent", uriHeader)
	}
	return gateway.Request{Method: method, Target: target, Authorization: h["Authorization"]}, nil
}

func single(h http.Header, name string) (string, error) {
	switch values := h[name]; len(values) {
	case 0:
		return "", fmt.Errorf("it must send %s", name)
	case 1:
		return values[0], nil
	default:
		return "", fmt.Errorf("it must send %s once, in place of what the client has sent", name)
	}
}

// isMethod takes only what nobody reads as two: some proxies join fields with commas.
func isMethod(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}

// writeProblem answers in the form of WSO2's gateways with what is no decision.
func writeProblem(w http.ResponseWriter, status int, message, description string) {
	writeCode(w, status, strconv.Itoa(int(replica.CodeGeneral)), message, description)
}

func writeCode(w http.ResponseWriter, status int, code, message, description string) {
	body, err := json.Marshal(struct {
		Code        string `json:"code"`
		Message     string `json:"message"`
		Description string `json:"description"`
	}{code, message, description})
	if err != nil {
		panic(err) // three strings
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(body) // whoever asked has gone away
}

// oneLine makes JSON fit for a header field: what is not ASCII is escaped, and there are no line ends in it.
func oneLine(body []byte) string {
	var b strings.Builder
	for _, r := range string(body) {
		switch {
		case r < ' ' || r == 0x7f: // only between tokens
			b.WriteByte(' ')
		case r < 0x7f:
			b.WriteByte(byte(r))
		case r > 0xffff:
			r -= 0x10000
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}
