package explain

import (
	"context"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/rescindhq/rescind/internal/rest"
)

const (
	path = "/v1/explain"
	// maxBody bounds the body of a question, in bytes.
	maxBody = 64 << 10
	// maxAnswers is how many questions are answered at a time, by a process: each reads the database some
	// times, and may wait for gateways. Of callers who are bound to a tenant it is maxBound, one for each tenant:
	// so no tenant keeps others, and all together do not keep the operators, from asking.
	maxAnswers = 4
	maxBound   = maxAnswers / 2
	// busyRetry is what others are asked to wait.
	busyRetry = 2 * time.Second
	// timeout bounds one answer.
	timeout = 10 * time.Second

	plainText = "text/plain"
)

var errTimeout = fmt.Errorf("the explanation took too long: %w", context.DeadlineExceeded)

// Endpoint serves /v1/explain.
type Endpoint struct {
	explainer *Explainer
	accounts  rest.Accounts
	places    places
}

// NewEndpoint returns the endpoint of e.
func NewEndpoint(e *Explainer, accounts rest.Accounts) *Endpoint {
	return &Endpoint{explainer: e, accounts: accounts, places: places{tenants: make(map[string]struct{})}}
}

// Routes adds POST /v1/explain to r, which stands at the root of the host.
func (e *Endpoint) Routes(r chi.Router) {
	readers := rest.Require(e.accounts, nil, rest.Admin, rest.TenantAdmin, rest.Auditor)
	r.With(readers).Method(http.MethodPost, path, rest.Handler(e.post))
}

func (e *Endpoint) post(w http.ResponseWriter, r *http.Request) error {
	if r.URL.RawQuery != "" {
		return rest.InvalidParameter("There are no parameters here: the question is the body.")
	}
	var q Question
	if err := rest.Decode(w, rest.LimitBody(r, maxBody), &q); err != nil {
		return err
	}
	by := callerOf(r)
	if !e.places.take(by.Tenant) {
		return &rest.Problem{
			Status: http.StatusServiceUnavailable, RetryAfter: busyRetry,
			Detail: "Other questions are being answered. Sending the same request again is safe.",
		}
	}
	defer e.places.leave(by.Tenant)
	ctx, cancel := context.WithTimeoutCause(r.Context(), timeout, errTimeout)
	defer cancel()
	answer, err := e.explainer.Explain(ctx, by, q)
	if err != nil {
		return err
	}
	w.Header().Add("Vary", "Accept")
	if !wantsText(r) {
		return rest.JSON(w, http.StatusOK, answer)
	}
	text := answer.Text()
	h := w.Header()
	h.Set("Content-Type", plainText+"; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(len(text)))
	h.Set("Cache-Control", "no-store")
	_, _ = io.WriteString(w, text) // a caller that is gone does not read it
	return nil
}

// places are those who are being answered.
type places struct {
	mu      sync.Mutex
	taken   int
	tenants map[string]struct{} // of those who are bound to one
}

// take takes a place for a caller who is bound to tenant, which is empty for one who is not, and returns false if
// there is none. It is followed by leave.
func (p *places) take(tenant string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken >= maxAnswers {
		return false
	}
	if tenant != "" {
		if _, there := p.tenants[tenant]; there || len(p.tenants) >= maxBound {
			return false
		}
		p.tenants[tenant] = struct{}{}
	}
	p.taken++
	return true
}

func (p *places) leave(tenant string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken--
	delete(p.tenants, tenant)
}

// callerOf is who sent r: an account sees what it sees of revocations.
func callerOf(r *http.Request) Caller {
	account := rest.AccountOf(r.Context())
	switch {
	case account.SeesAll() && account.Role != rest.TenantAdmin: // what else that may read, its role ends with its tenant
		return Caller{}
	case account.Role == rest.Auditor:
		return Caller{Tenant: account.Tenant.Domain, Others: account.ExtraTenants}
	}
	return Caller{Tenant: account.Tenant.Domain}
}

// wantsText reports whether r names text/plain, and likes it better than JSON (RFC 9110, section 12.5.1). What is
// not named in full is JSON.
func wantsText(r *http.Request) bool {
	var text, structured float64
	for accepted := range strings.SplitSeq(strings.Join(r.Header["Accept"], ","), ",") {
		kind, parameters, err := mime.ParseMediaType(accepted)
		if err != nil {
			continue
		}
		quality := 1.0
		if q, ok := parameters["q"]; ok {
			if quality, err = strconv.ParseFloat(q, 64); err != nil {
				continue
			}
		}
		switch kind {
		case plainText:
			text = max(text, quality)
		case "application/json":
			structured = max(structured, quality)
		}
	}
	return text > structured
}
