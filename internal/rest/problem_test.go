package rest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

func TestWrite(t *testing.T) {
	t.Parallel()
	secret := errors.New("SELECT 1: hunter2")
	for _, tt := range []struct {
		name       string
		err        error
		status     int
		retryAfter string
	}{
		{"bare", Status(404, ""), 404, ""},
		{"detail", Status(412, "It has changed <meanwhile>."), 412, ""},
		{"typed", &Problem{
			Slug: "seq-gone", Title: "Take a new snapshot.", Status: 410, Members: map[string]any{"seq": 7, "epoch": "e"}, Cause: secret,
		}, 410, ""},
		{"wrapped", fmt.Errorf("do it: %w", Status(403, "")), 403, ""},
		{"fields", catalog.Invalid{{Pointer: "#/name", Detail: "must not be empty"}, {Pointer: "#/operations/0", Detail: "is there twice"}}, 400, ""},
		{"target", &revocation.InvalidError{Detail: "jti is empty"}, 400, ""},
		{"parameter", InvalidParameter("The parameter limit must be 1 to 1000."), 400, ""},
		{"account", &authn.OAuthError{Status: 401, Description: "The user name or the password is wrong."}, 401, ""},
		{"throttled", authn.TooMany("Authentication failed too often.", 1500*time.Millisecond), 429, "2"},
		{"busy", fmt.Errorf("revoke: %w", ledger.ErrBusy), 503, "1"},
		{"unavailable", fmt.Errorf("%w: %w", ledger.ErrUnavailable, secret), 503, "5"},
		{"doubt", fmt.Errorf("%w: %w: %w", ledger.ErrUnavailable, ledger.ErrDoubt, secret), 503, "5"},
		{"late", context.DeadlineExceeded, 503, "5"},
		{"unknown", secret, 500, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			x, r := newExchange(), request(t, "GET", "/v1/x", "", "Accept", "application/json")
			h := Handler(func(w http.ResponseWriter, _ *http.Request) error {
				for _, name := range []string{"ETag", "Content-Encoding", "Location", "Link", "Last-Modified"} {
					w.Header().Set(name, "of what was to be sent")
				}
				w.Header().Set("Cache-Control", "public")
				w.Header().Set("Vary", "Accept-Encoding")
				return tt.err
			})
			h.ServeHTTP(wrapped(x), r)
			if x.Code != tt.status || x.Header().Get("Retry-After") != tt.retryAfter {
				t.Errorf("status %d, Retry-After %q, want %d, %q", x.Code, x.Header().Get("Retry-After"), tt.status, tt.retryAfter)
			}
			if x.err == nil || x.err.Error() != tt.err.Error() {
				t.Errorf("the log has %v, want %v", x.err, tt.err)
			}
			if strings.Contains(x.Body.String(), "hunter2") || strings.Contains(x.Body.String(), "SELECT") {
				t.Errorf("the body tells the cause: %s", x.Body)
			}
			header := x.Header().Clone()
			header.Del("Retry-After")
			var lines strings.Builder
			if err := header.Write(&lines); err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name, strings.ReplaceAll(lines.String(), "\r\n", "\n")+"\n"+x.Body.String()+"\n")
		})
	}
}

// A request id that is no UUID is no URN.
func TestInstance(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"", "abc", "6f9619ff-8b86-d011-b42d-00c04fc964fg", "6f9619ff08b86-d011-b42d-00c04fc964ff"} {
		x := newExchange()
		x.id = id
		Write(x, nil, Status(404, ""))
		if strings.Contains(x.Body.String(), "instance") {
			t.Errorf("%q: %s", id, x.Body)
		}
	}
}

func TestProblemTellsTheLog(t *testing.T) {
	t.Parallel()
	p := InvalidRequest("No.", catalog.FieldError{Pointer: "#/a", Detail: "must be b"})
	p.Cause = io.EOF
	if got, want := p.Error(), "invalid-request: No.: #/a: must be b: EOF"; got != want || !errors.Is(p, io.EOF) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := Status(404, "").Error(); got != "Not Found" {
		t.Errorf("%q", got)
	}
}

func TestDatabaseAway(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		err  error
		want int
	}{
		"shutting down":   {&pgconn.PgError{Code: "57P01"}, 503},
		"no connections":  {&pgconn.PgError{Code: "53300"}, 503},
		"lock timeout":    {&pgconn.PgError{Code: "55P03"}, 503},
		"a constraint":    {&pgconn.PgError{Code: "23505"}, 500},
		"a short code":    {&pgconn.PgError{Code: ""}, 500},
		"not reached":     {&pgconn.ConnectError{Config: &pgconn.Config{}}, 503},
		"cut off":         {fmt.Errorf("read: %w", io.ErrUnexpectedEOF), 503},
		"network":         {&net.OpError{Op: "read", Err: errors.New("reset")}, 503},
		"caller has left": {context.Canceled, 503},
	} {
		if got := problemOf(fmt.Errorf("read applications: %w", tt.err)); got.Status != tt.want || (got.RetryAfter > 0) != (tt.want == 503) {
			t.Errorf("%s: %d, want %d", name, got.Status, tt.want)
		}
	}
}
