package adminapi

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

const auditPath = "/v1/audit"

// auditFilters are the parameters of the audit, beside those of pages.
var auditFilters = []string{
	paramTenant, paramActor, paramAction, paramSubject, paramIss, paramEntityID, paramRequestID, paramFrom, paramTo,
}

const (
	// auditTimeout bounds a read of the audit, which may be of all of it.
	auditTimeout = 10 * time.Second
	// maxAudits is how many such reads the database has to bear from a process. Others wait up to
	// auditWait for their turn.
	maxAudits = 2
	auditWait = time.Second
	// auditRetry is when one that had no turn is asked to come again.
	auditRetry = 5 * time.Second
)

var errAuditTimeout = errors.New("the audit was read for " + auditTimeout.String())

// auditItem is a record as it is shown.
type auditItem struct {
	ID        string            `json:"id"` // decimal; more digits than a number in JavaScript holds
	At        string            `json:"at"`
	Tenant    revocation.Tenant `json:"tenant"` // without a domain if it is gone
	Actor     string            `json:"actor"`
	Action    string            `json:"action"`
	EntityID  string            `json:"entity_id,omitempty"`
	Iss       string            `json:"iss,omitempty"`
	Subject   string            `json:"subject,omitempty"`
	Reason    string            `json:"reason,omitempty"`
	RequestID string            `json:"request_id,omitempty"`
	Remote    string            `json:"remote,omitempty"`
}

// audit lists who did what to what, the newest first.
func (a *API) audit(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	list := url.Values{}
	for _, name := range auditFilters {
		if value := query.Get(name); value != "" {
			list.Set(name, value)
		}
	}
	name := auditPath + "?" + list.Encode()
	q, err := rest.PageQuery(r, name, auditFilters...)
	if err != nil {
		return err
	}
	filter, err := auditFilter(list)
	if err != nil {
		return err
	}
	before := int64(0)
	if q.After != "" {
		if before, err = strconv.ParseInt(q.After, 10, 64); err != nil || before < 1 {
			return badParameter("cursor", "must be the next_cursor of a page of this list")
		}
	}
	if by := caller(w, r); by.Tenant != "" {
		switch own := list.Get(paramTenant); {
		case own == "":
			filter.Tenants = []string{by.Tenant}
		case own != by.Tenant && !slices.Contains(by.AlsoReads, own):
			return rest.WritePage(w, r, name, nil, "") // as for a tenant that is not there
		}
	}
	records, err := a.readAudit(r.Context(), filter, before, q.Limit+1)
	if err != nil {
		return err
	}
	next := ""
	if len(records) > q.Limit {
		records = records[:q.Limit]
		next = strconv.FormatInt(records[q.Limit-1].ID, 10)
	}
	items := make([]auditItem, len(records))
	for i, rec := range records {
		items[i] = auditItem{
			ID: strconv.FormatInt(rec.ID, 10), At: rec.At.UTC().Format("2006-01-02T15:04:05.000Z07:00"), Tenant: rec.Tenant,
			Actor: rec.Actor.Name, Action: rec.Action, EntityID: rec.EntityID, Iss: rec.Iss, Subject: rec.Subject,
			Reason: rec.Reason, RequestID: rec.Actor.RequestID, Remote: rec.Actor.Remote,
		}
	}
	return rest.WritePage(w, r, name, items, next)
}

// readAudit says what to do where the records are too many to be looked through, or others look
// through them.
func (a *API) readAudit(ctx context.Context, f ledger.AuditFilter, before int64, limit int) ([]ledger.AuditRecord, error) {
	select {
	case a.audits <- struct{}{}:
		defer func() { <-a.audits }()
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(auditWait):
		return nil, &rest.Problem{
			Status: http.StatusServiceUnavailable, RetryAfter: auditRetry,
			Detail: "Others are looking through the audit, which is much work. Sending the same request again is safe.",
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, auditTimeout, errAuditTimeout)
	defer cancel()
	records, err := a.deps.Audit.AuditPage(ctx, f, before, limit)
	if err != nil && errors.Is(context.Cause(ctx), errAuditTimeout) {
		// No Retry-After: the same request would take as long again.
		p := rest.Status(http.StatusServiceUnavailable, "There are too many records to look through in "+auditTimeout.String()+
			". Narrow the time with from and to.")
		p.Cause = err
		return nil, p
	}
	return records, err
}

// auditFilter is what query says, in which nothing is empty.
func auditFilter(query url.Values) (f ledger.AuditFilter, err error) {
	texts := map[string]*string{
		paramActor: &f.Actor, paramAction: &f.Action, paramSubject: &f.Subject, paramIss: &f.Iss, paramRequestID: &f.RequestID,
	}
	times := map[string]*time.Time{paramFrom: &f.From, paramTo: &f.To}
	for _, name := range auditFilters {
		value, ok, must := query.Get(name), true, ""
		if value == "" {
			continue
		}
		switch {
		case texts[name] != nil:
			*texts[name], ok, must = value, isName(value), mustBeName
		case times[name] != nil:
			at, err := time.Parse(time.RFC3339, value)
			*times[name], ok, must = at, err == nil, "must be a time such as 2026-11-20T21:10:00Z, with + as %2B"
		case name == paramTenant:
			f.Tenants, ok, must = []string{value}, catalog.ValidDomain(value), "must be a domain"
		case name == paramEntityID:
			f.EntityID, ok, must = value, uuid.MatchString(value), "must be a UUID"
		}
		if !ok {
			return f, badParameter(name, must)
		}
	}
	if !f.From.IsZero() && !f.To.IsZero() && !f.From.Before(f.To) {
		return f, badParameter(paramTo, "must be later than from")
	}
	return f, nil
}
