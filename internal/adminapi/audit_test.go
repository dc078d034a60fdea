package adminapi

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/replica"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

// audit reads a list of the audit, page by page.
func (w *world) audit(who, path string) (items []auditItem) {
	w.t.Helper()
	for path != "" {
		a := w.get(who, path)
		if a.status != http.StatusOK {
			w.t.Fatalf("GET %s as %s: status %d: %s", path, who, a.status, a.body)
		}
		var page struct{ Items []auditItem }
		a.into(w.t, &page)
		items = append(items, page.Items...)
		path, _, _ = strings.Cut(strings.TrimPrefix(a.header.Get("Link"), "<"), `>; rel="next"`)
	}
	return items
}

func TestAudit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.populate()
	w.must(http.StatusNoContent, "admin", "DELETE", "/v1/tenants/"+tenantUUID, "", "If-Match", "*")

	// C099: everything once, the newest first, however it is cut into pages.
	var ids []string
	rows, err := w.pool.Query(t.Context(), `SELECT a.id::text FROM rescind.audit a ORDER BY a.id DESC`)
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	if err := rows.Err(); err != nil || len(ids) < 10 {
		t.Fatalf("%d records, %v", len(ids), err)
	}
	for _, path := range []string{"/v1/audit", "/v1/audit?limit=3", "/v1/audit?limit=1000"} {
		var got []string
		for _, item := range w.audit("admin", path) {
			got = append(got, item.ID)
		}
		if diff := cmp.Diff(ids, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
	}

	// What a record looks like.
	a := w.must(http.StatusOK, "admin", "GET", "/v1/audit?entity_id="+applicationUUID, "")
	var page struct{ Items []map[string]any }
	a.into(t, &page)
	if len(page.Items) != 1 {
		t.Fatalf("%s", a.body)
	}
	item := page.Items[0]
	id, at := item["id"], item["at"]
	if _, err := time.Parse("2006-01-02T15:04:05.000Z", at.(string)); err != nil || !slices.Contains(ids, id.(string)) {
		t.Errorf("id %v, at %v", id, at)
	}
	want := map[string]any{
		"id": id, "at": at, "tenant": map[string]any{"id": 7.0, "domain": "acme.com"}, "actor": "account:acme-admin",
		"action": "create_application", "entity_id": applicationUUID, "subject": "Shop",
	}
	if diff := cmp.Diff(want, item); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// Filters.
	since := url.QueryEscape(at.(string))
	for query, want := range map[string][]string{
		"action=create_application":                                    {"create_application"},
		"actor=account:acme-admin&action=create_scope&tenant=acme.com": {"create_scope"},
		"actor=account:acme-admin&action=create_scope&subject=none":    nil,
		"subject=shop-1&iss=https://idp.acme.com":                      {"create_key_mapping"},
		"subject=Shop&request_id=none":                                 nil,
		"tenant=carbon.super&action=create_application":                nil,
		"entity_id=" + applicationUUID + "&from=" + since:              {"create_application"},
		"entity_id=" + applicationUUID + "&to=" + since:                nil,
		"entity_id=" + keyManagerUUID + "&from=" + since:               nil,
		"entity_id=" + keyManagerUUID + "&to=" + since:                 {"create_key_manager"},
		"from=2000-01-01T00:00:00Z&to=2000-01-01T00:00:00.001Z":        nil,
	} {
		var got []string
		for _, item := range w.audit("admin", "/v1/audit?"+query) {
			got = append(got, item.Action)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", query, got, want)
		}
	}

	// Who sees which tenants. globex.com is gone.
	for _, tt := range []struct{ who, query, want string }{
		{"admin", "", " acme.com carbon.super"},
		{"wide-auditor", "", " acme.com carbon.super"},
		{"admin", "?tenant=acme.com", "acme.com"},
		{"admin", "?tenant=globex.com", ""},
		{"super-admin", "", "carbon.super"},
		{"super-admin", "?tenant=acme.com", ""},
		{"two-admin", "?tenant=acme.com", ""},
		{"acme-admin", "?tenant=acme.com", "acme.com"},
		{"wide-admin", "", "acme.com"},
		{"acme-auditor", "", "acme.com"},
		{"two-auditor", "", "carbon.super"},
		{"two-auditor", "?tenant=acme.com", "acme.com"},
	} {
		var domains []string
		for _, item := range w.audit(tt.who, "/v1/audit"+tt.query) {
			domains = append(domains, item.Tenant.Domain)
			if item.Tenant.ID == 0 {
				t.Errorf("%s sees a record of no tenant: %+v", tt.who, item)
			}
		}
		slices.Sort(domains)
		if got := strings.Join(slices.Compact(domains), " "); got != tt.want {
			t.Errorf("%s sees %q of %q, want %q", tt.who, tt.query, got, tt.want)
		}
	}
}

// endless is an audit that is never looked through, even by several at once.
type endless struct{}

func (endless) AuditPage(ctx context.Context, _ ledger.AuditFilter, _ int64, _ int) ([]ledger.AuditRecord, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// asked is an endless audit that says what it was last asked for.
type asked struct {
	endless
	filter ledger.AuditFilter
}

func (a *asked) AuditPage(ctx context.Context, f ledger.AuditFilter, before int64, limit int) ([]ledger.AuditRecord, error) {
	a.filter = f
	return a.endless.AuditPage(ctx, f, before, limit)
}

// Few look through the audit at once. Who does not get a turn soon is told when to come again.
func TestFewReadTheAudit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		api, err := New(Deps{
			Catalog: new(store.Store), State: &state{replica: replica.NewState(replica.StateConfig{})}, Audit: endless{},
			Accounts: one{Role: rest.Admin}, Idempotency: new(rest.Answers),
		})
		if err != nil {
			t.Fatal(err)
		}
		router := chi.NewRouter()
		api.Routes(router)
		read := func(ctx context.Context) (took time.Duration, rec *httptest.ResponseRecorder) {
			began := time.Now()
			rec = httptest.NewRecorder()
			router.ServeHTTP(rec, httptest.NewRequestWithContext(ctx, "GET", "/v1/audit", nil))
			return time.Since(began), rec
		}
		first, leave := context.WithCancel(t.Context())
		go read(first)
		go read(t.Context())
		synctest.Wait()
		took, rec := read(t.Context())
		if took != auditWait || rec.Code != 503 || rec.Header().Get("Retry-After") != "5" || !strings.Contains(rec.Body.String(), "Others") {
			t.Errorf("%d after %s, Retry-After %q: %s", rec.Code, took, rec.Header().Get("Retry-After"), rec.Body)
		}
		time.AfterFunc(auditWait/2, leave)
		took, rec = read(t.Context())
		if took != auditWait/2+auditTimeout || rec.Header().Get("Retry-After") != "" || !strings.Contains(rec.Body.String(), "from and to") {
			t.Errorf("%d after %s, want that it had its turn: %s", rec.Code, took, rec.Body)
		}
		gone, leave := context.WithTimeout(t.Context(), auditWait/2)
		defer leave()
		go read(t.Context())
		go read(t.Context())
		synctest.Wait()
		if took, rec = read(gone); took != auditWait/2 || strings.Contains(rec.Body.String(), "Others") {
			t.Errorf("%d after %s, want that it went away: %s", rec.Code, took, rec.Body)
		}
		if took, _ = read(t.Context()); took != auditWait {
			t.Errorf("who went away has left a turn: %s", took)
		}
	})
}

func TestAuditIsNotReadForEver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		audit := &asked{}
		api, err := New(Deps{
			Catalog: new(store.Store), State: &state{replica: replica.NewState(replica.StateConfig{})}, Audit: audit,
			Accounts: one{Role: rest.Admin}, Idempotency: new(rest.Answers),
		})
		if err != nil {
			t.Fatal(err)
		}
		router := chi.NewRouter()
		api.Routes(router)
		began := time.Now()
		rec := httptest.NewRecorder()
		router.ServeHTTP(rec, httptest.NewRequestWithContext(t.Context(), "GET", "/v1/audit?to=2026-11-20T22:10:00.5%2B01:00", nil))
		var p struct {
			Status int
			Detail string
		}
		if err := json.Unmarshal(rec.Body.Bytes(), &p); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took != auditTimeout || rec.Code != 503 || p.Status != 503 || !strings.Contains(p.Detail, "from and to") {
			t.Errorf("%d after %s: %s", rec.Code, took, rec.Body)
		}
		if want := time.Date(2026, 11, 20, 21, 10, 0, 5e8, time.UTC); !audit.filter.To.Equal(want) || audit.filter.Tenants != nil {
			t.Errorf("asked for %+v", audit.filter)
		}
		// Who goes away earlier gets no advice.
		ctx, leave := context.WithCancel(t.Context())
		leave()
		rec = httptest.NewRecorder()
		router.ServeHTTP(rec, httptest.NewRequestWithContext(ctx, "GET", "/v1/audit", nil))
		if rec.Code != 503 || strings.Contains(rec.Body.String(), "from and to") {
			t.Errorf("%d %s", rec.Code, rec.Body)
		}
	})
}
