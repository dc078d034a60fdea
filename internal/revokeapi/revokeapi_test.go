package revokeapi

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
)

// kinds are an order of each kind.
var kinds = []string{
	`"jti":"at-1"`, `"iss":"https://idp.example","token":"opaque-1"`, `"client_id":"key-1"`, `"sub":"u-1009"`,
	`"iss":"https://idp.example","sid":"s-1"`, `"tenant":"acme.com"`, `"kid":"k"`,
}

func TestOrders(t *testing.T) {
	t.Parallel()
	r := &transcript{world: newWorld(t)}
	if err := r.ledger.SetRemembering(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	const living, over = "4f4fa3c0-1c8e-4c5b-9d55-0a1e5f0b7c11", "4f4fa3c0-1c8e-4c5b-9d55-0a1e5f0b7c12"
	_, err := r.pool.Exec(t.Context(), `INSERT INTO rescind.issued_tokens (jti, key_manager_id, client_id, subject, exp)
		SELECT jti::uuid, k.id, 'key-1', 'key-1', floor(extract(epoch FROM clock_timestamp()))::bigint + n
		FROM (VALUES ($1, 600), ($2, -130)) AS t (jti, n), rescind.key_managers k WHERE k.iss = $3`, living, over, iss)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range slices.Concat(kinds, []string{`"jti":"` + living + `"`, `"jti":"` + over + `"`}) {
		r.do("admin", "POST", path, `{`+k+`,"dry_run":true}`)
	}
	if n := r.revocations(); n != 0 {
		t.Errorf("%d revocations were only looked at", n)
	}
	for _, k := range kinds {
		r.do("admin", "POST", path, `{`+k+`,"reason":"stolen"}`)
	}
	r.do("admin", "POST", path, `{"jti":"`+living+`"}`)
	r.do("admin", "POST", path, `{"jti":"`+over+`"}`)
	r.do("admin", "POST", path, `{"kind":"token","jti":"at-1","reason":"another"}`)
	r.do("admin", "POST", path, `{"token":"`+access(iss, "at-2")+`"}`)
	r.do("acme-admin", "POST", path, `{"token":"`+access(acmeIss, "")+`"}`)
	r.do("acme-admin", "POST", path, `{"items":[{"jti":"at-3"},{"jti":"at-3"},{"kind":"client","client_id":"acme-1","reason":"left"}]}`)
	r.do("acme-admin", "POST", path, `{"items":[{"jti":"at-3"},{"client_id":"nobody"}],"dry_run":true}`)
	r.golden("orders")
}

func TestRefused(t *testing.T) {
	t.Parallel()
	r := &transcript{world: newWorld(t)}
	for _, body := range []string{
		`{}`,
		`{"kind":"token"}`,
		`{"kind":"client","sub":"u"}`,
		`{"jti":"a","client_id":"b"}`,
		`{"iss":"https://nope","jti":"a"}`,
		`{"jti":"a\u0000"}`,
		`{"jti":"a","reason":"` + strings.Repeat("x", 256) + `"}`,
		`{"jti":"a","dryrun":true}`,
		`{"jti":"a","JTI":"b"}`,
		`{"token":"a.b.c"}`,
		`{"token":"` + access(idp, "a") + `"}`,
		`{"sub":"key-1"}`,
		`{"items":[]}`,
		`{"items":[{"jti":"a"}],"jti":"b"}`,
		`{"items":[{"jti":"a","dry_run":true}]}`,
		`{"items":[{"jti":"a"},{},{"iss":"https://nope","jti":"a"},{"kind":"client","kid":"k"}]}`,
		`{"items":[` + strings.Repeat(`{},`, 10000) + `{}]}`,
		`[]`,
	} {
		for _, dry := range []string{"", `"dry_run":true,`} {
			if dry != "" && !strings.HasPrefix(body, `{"`) {
				continue
			}
			a := r.world.do("admin", "POST", path, strings.Replace(body, "{", "{"+dry, 1))
			if dry == "" {
				if len(body) > 100 {
					body = body[:40] + "…"
				}
				fmt.Fprintf(&r.out, "%s\n--> %d %s\n%s\n\n", body, a.status, a.header.Get("Content-Type"), a.body)
			} else if a.status < 400 {
				t.Errorf("%s: %d", body, a.status)
			}
		}
	}
	r.do("admin", "POST", path+"?dry_run=true", `{"jti":"a"}`)
	r.do("acme-admin", "POST", path, `{"tenant":"carbon.super"}`)
	r.golden("refused")
	if n := r.revocations(); n != 0 {
		t.Errorf("%d revocations", n)
	}
}

func TestRoles(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const unknown = path + "/0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3"
	for who, want := range map[string][3]int{ // POST, list, one
		"": {401, 401, 401}, "nobody": {401, 401, 401}, "gateway": {403, 403, 403}, "notifier": {403, 403, 403},
		"auditor": {403, 200, 404}, "super-admin": {202, 200, 404}, "acme-admin": {202, 200, 404}, "admin": {202, 200, 404},
	} {
		got := [3]int{
			w.do(who, "POST", path, `{"jti":"a"}`).status, w.do(who, "GET", path, "").status, w.do(who, "GET", unknown, "").status,
		}
		if got != want {
			t.Errorf("%s: %v, want %v", who, got, want)
		}
		if head := w.do(who, "HEAD", unknown, "").status; head != want[2] {
			t.Errorf("%s: HEAD %d", who, head)
		}
	}
}

func TestFinal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var made struct{ ID string }
	a := w.must(202, "admin", "POST", path, `{"jti":"a"}`)
	a.into(t, &made)
	one := path + "/" + made.ID
	if a.header.Get("Location") != one {
		t.Errorf("Location %q", a.header.Get("Location"))
	}
	for _, method := range []string{"DELETE", "PUT", "PATCH", "POST", "OPTIONS"} {
		for _, who := range []string{"admin", "acme-admin", ""} {
			a := w.do(who, method, one, "")
			if a.status != 405 || a.header.Get("Allow") != "GET, HEAD" || !strings.Contains(a.body, "/problems/revocation-final") ||
				a.header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("%s: %d %v %s", method, a.status, a.header, a.body)
			}
		}
	}
	w.must(200, "admin", "GET", one, "")
	w.must(200, "admin", "HEAD", one, "")
}

type item struct {
	ID       string            `json:"id"`
	Kind     revocation.Kind   `json:"kind"`
	Iss      string            `json:"iss"`
	JTI      string            `json:"jti"`
	ClientID string            `json:"client_id"`
	Tenant   revocation.Tenant `json:"tenant"`
	Added    bool              `json:"added"`
}

type items struct {
	Items      []item `json:"items"`
	NextCursor string `json:"next_cursor"`
}

// all follows the pages of a list.
func (w *world) all(who, query string) (all []item) {
	w.t.Helper()
	for next := ""; ; {
		var page items
		w.must(200, who, "GET", path+"?limit=5&"+query+next, "").into(w.t, &page)
		all = append(all, page.Items...)
		if page.NextCursor == "" {
			return all
		}
		next = "&cursor=" + page.NextCursor
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	r := &transcript{world: newWorld(t)}
	for _, k := range kinds {
		r.must(202, "admin", "POST", path, `{`+k+`,"reason":"stolen"}`)
	}
	r.must(202, "admin", "POST", path, `{"token":"`+access(iss, "at-2")+`"}`)
	r.must(202, "admin", "POST", path, `{"iss":"https://idp.example","jti":"at-1"}`)
	all := r.all("admin", "")
	if len(all) != 9 || !slices.IsSortedFunc(all, func(a, b item) int { return strings.Compare(a.ID, b.ID) }) {
		t.Errorf("%+v", all)
	}
	for query, want := range map[string]int{
		"kind=token": 4, "kind=tenant": 1, "iss=" + idp: 3, "iss=" + idp + "&kind=token": 2, "iss=https://nope": 0,
		"tenant=acme.com": 1, "tenant=carbon.super": 8, "tenant=nope.example": 0,
		"jti=at-1": 2, "jti=at-1&iss=" + iss: 1, "jti=at": 0, "client_id=key-1": 1, "client_id=u-1009": 0, "sub=u-1009": 1,
		"sid=s-1": 1, "kid=k": 1, "kind=key&kid=k": 1, "kind=token&jti=at-1&tenant=acme.com": 0, "jti=": 9,
	} {
		if got := r.all("admin", query); len(got) != want {
			t.Errorf("%s: %+v, want %d", query, got, want)
		}
	}
	for _, query := range []string{
		"jti=a&sub=b", "kind=client&jti=a", "kind=Token", "tenant=NO", "jti=%00", "jti=%ff", "sub=" + strings.Repeat("x", 256), "nope=1",
		"jti=a&jti=b", "limit=0", "limit=1001", "cursor=x", "%zz",
	} {
		if a := r.world.do("admin", "GET", path+"?"+query, ""); a.status != 400 || !strings.Contains(a.body, "/problems/invalid-parameter") {
			t.Errorf("%s: %d %s", query, a.status, a.body)
		}
	}
	for _, id := range []string{"x", strings.ToUpper(all[0].ID), strings.ReplaceAll(all[0].ID, "-", ""), uuid.NewString()} {
		r.must(404, "admin", "GET", path+"/"+id, "")
	}
	r.do("admin", "GET", path+"?limit=3", "")
	r.do("auditor", "GET", path+"?iss="+iss+"&jti=at-2", "")
	r.do("admin", "GET", path+"/"+all[0].ID, "")
	r.do("admin", "GET", path+"/"+all[0].ID+"?x=1", "")
	r.do("acme-admin", "GET", path+"/"+all[0].ID, "")
	r.golden("read")
}

// A bound account neither ends nor sees anything of another tenant, whatever it asks for.
func TestTenantsAreApart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	mine := map[string][]string{
		"acme.com":     {`"jti":"a"`, `"client_id":"acme-1"`, `"sub":"u"`, `"sid":"s"`, `"tenant":"acme.com"`, `"kid":"k"`},
		"carbon.super": {`"jti":"a"`, `"client_id":"key-1"`, `"sub":"u"`, `"sid":"s"`, `"tenant":"carbon.super"`, `"kid":"k"`, `"iss":"` + idp + `","token":"t"`},
	}
	admins := map[string]string{"acme.com": "acme-admin", "carbon.super": "super-admin"}
	for domain, orders := range mine {
		for _, o := range orders {
			w.must(202, admins[domain], "POST", path, `{`+o+`}`)
		}
	}
	everything := w.all("admin", "")
	if len(everything) != 13 {
		t.Fatalf("%+v", everything)
	}
	for who, domains := range map[string]map[string]bool{ // which domains it sees; true: in lists without naming them
		"acme-admin": {"acme.com": true}, "super-admin": {"carbon.super": true}, "wide-admin": {"acme.com": true},
		"acme-auditor": {"acme.com": true}, "auditor": {"carbon.super": true}, "two-auditor": {"carbon.super": true, "acme.com": false},
		"wide-auditor": {"acme.com": true, "carbon.super": true}, "admin": {"acme.com": true, "carbon.super": true},
	} {
		for _, query := range []string{"", "kind=token", "kind=client", "kind=subject", "kind=session", "kind=tenant", "kind=key",
			"iss=" + iss, "iss=" + acmeIss, "iss=" + idp, "jti=a", "sub=u", "sid=s", "kid=k", "client_id=key-1", "client_id=acme-1"} {
			want := slices.DeleteFunc(w.all("admin", query), func(i item) bool { return !domains[i.Tenant.Domain] })
			if got := w.all(who, query); !slices.Equal(got, want) {
				t.Errorf("%s, %s: %+v, want %+v", who, query, got, want)
			}
		}
		for domain := range mine {
			want := 0
			if _, sees := domains[domain]; sees {
				want = len(mine[domain])
			}
			if got := w.all(who, "tenant="+domain); len(got) != want {
				t.Errorf("%s, tenant %s: %+v", who, domain, got)
			}
		}
		for _, i := range everything {
			want := 404
			if _, sees := domains[i.Tenant.Domain]; sees {
				want = 200
			}
			if a := w.do(who, "GET", path+"/"+i.ID, ""); a.status != want {
				t.Errorf("%s, %+v: %d", who, i, a.status)
			}
		}
	}
	for _, who := range []string{"acme-admin", "wide-admin"} {
		for _, o := range []string{
			`"iss":"` + iss + `","jti":"b"`, `"iss":"` + idp + `","token":"b"`, `"token":"` + access(iss, "b") + `"`, `"token":"` + access(idp, "b") + `"`,
			`"iss":"` + iss + `","client_id":"b"`, `"iss":"` + iss + `","sub":"b"`, `"iss":"` + iss + `","sid":"b"`,
			`"tenant":"carbon.super"`, `"iss":"` + iss + `","kid":"b"`,
		} {
			for _, dry := range []string{"true", "false"} {
				a := w.do(who, "POST", path, `{"dry_run":`+dry+`,`+o+`}`)
				if a.status != 400 || strings.Contains(a.body, "carbon") || strings.Contains(a.body, "example") {
					t.Errorf("%s, %s: %d %s", who, o, a.status, a.body)
				}
			}
		}
	}
	if n := w.revocations(); n != len(everything) {
		t.Errorf("%d revocations", n)
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	t.Run("C104", func(t *testing.T) {
		for _, coding := range []string{"br", "gzip"} {
			a := w.do("admin", "POST", path, `{"jti":"a"}`, "Content-Encoding", coding)
			if a.status != 415 || a.header.Get("Accept-Encoding") != "identity" || !strings.Contains(a.body, `"about:blank"`) || w.revocations() != 0 {
				t.Errorf("%d %v %s", a.status, a.header, a.body)
			}
		}
	})
	const key = "Idempotency-Key"
	body := `{"client_id":"key-1","reason":"left"}` // its repeat would move the time
	t.Run("C110", func(t *testing.T) {
		first := w.must(202, "admin", "POST", path, body, key, `"8c1f"`)
		before, err := w.ledger.Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		second := w.must(202, "admin", "POST", path, body, key, `"8c1f"`)
		if second.body != first.body || second.header.Get("Idempotency-Replayed") != "true" || first.header.Get("Idempotency-Replayed") != "" ||
			second.header.Get("Location") != first.header.Get("Location") || second.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%v %s, first %v %s", second.header, second.body, first.header, first.body)
		}
		if after, err := w.ledger.Head(t.Context()); err != nil || after != before || w.revocations() != 1 {
			t.Errorf("head %v after %v, %v, %d revocations", after, before, err, w.revocations())
		}
	})
	t.Run("C111", func(t *testing.T) {
		a := w.do("admin", "POST", path, `{"client_id":"key-2"}`, key, `"8c1f"`)
		if a.status != 422 || !strings.Contains(a.body, "/problems/idempotency-key-reused") || w.revocations() != 1 {
			t.Errorf("%d %s", a.status, a.body)
		}
	})
	t.Run("C112", func(t *testing.T) {
		w.gate.entered, w.gate.open = make(chan struct{}), make(chan struct{})
		first := make(chan response, 1)
		go func() {
			a, _ := w.send("admin", "POST", path, strings.NewReader(`{"jti":"slow"}`), key, `"slow"`)
			first <- a
		}()
		<-w.gate.entered
		a := w.do("admin", "POST", path, `{"jti":"slow"}`, key, `"slow"`)
		close(w.gate.open)
		if a.status != 409 || !strings.Contains(a.body, "/problems/idempotency-in-progress") {
			t.Errorf("%d %s", a.status, a.body)
		}
		if a := <-first; a.status != 202 {
			t.Errorf("the first: %d %s", a.status, a.body)
		}
	})
}

func jti(i int) string { return fmt.Sprintf("at-%036d", i) }

// bulk is n orders of tokens of some 200 bytes, and last.
func bulk(n int, last string) string {
	var b strings.Builder
	b.WriteString(`{"items":[`)
	for i := range n {
		fmt.Fprintf(&b, `{"kind":"token","iss":%q,"jti":%q,"reason":"left the company, ticket %060d"},`, iss, jti(i), i)
	}
	return b.String() + last + `]}`
}

func TestTenThousand(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	body := bulk(ledger.MaxBulk-1, `{"jti":"a","iss":"https://nope"}`)
	if len(body) <= rest.MaxBody {
		t.Fatalf("%d bytes are no large body", len(body))
	}
	a := w.do("admin", "POST", path, body)
	if a.status != 400 || !strings.Contains(a.body, `"#/items/9999/iss"`) || w.revocations() != 0 {
		t.Fatalf("%d %.300s, %d revocations", a.status, a.body, w.revocations())
	}
	body = bulk(ledger.MaxBulk-1, `{"client_id":"key-1"}`)
	a = w.must(202, "admin", "POST", path, body, "Idempotency-Key", "many")
	var made items
	a.into(t, &made)
	if len(made.Items) != ledger.MaxBulk || w.revocations() != ledger.MaxBulk {
		t.Fatalf("%d items, %d revocations", len(made.Items), w.revocations())
	}
	for i, m := range made.Items[:len(made.Items)-1] {
		if !m.Added || m.ID == "" || m.JTI != jti(i) {
			t.Fatalf("%d: %+v", i, m)
		}
	}
	if again := w.must(202, "admin", "POST", path, body, "Idempotency-Key", "many"); again.body != a.body || again.header.Get("Idempotency-Replayed") != "true" {
		t.Error("the answer did not come again")
	}
	var kept int
	if err := w.pool.QueryRow(t.Context(), `SELECT max(octet_length(body)) FROM rescind.idempotency`).Scan(&kept); err != nil || kept > len(a.body)/5 {
		t.Errorf("%d bytes are kept of %d, %v", kept, len(a.body), err)
	}
	w.must(413, "admin", "POST", path, strings.Repeat(" ", maxBody)+"{}")
}

// Few large requests are read at a time, one of a tenant, and small ones go on.
func TestFewLargeRequests(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	// A body is sent once the server reads it.
	expect := []string{"Expect", "100-continue"}
	body, in := io.Pipe()
	first := make(chan response, 1)
	go func() {
		a, _ := w.send("super-admin", "POST", path, body, expect...) // of a length that nobody knows
		first <- a
	}()
	if _, err := io.WriteString(in, "{"); err != nil {
		t.Fatal(err)
	}
	medium, large := strings.Repeat(" ", smallBody)+"{}", strings.Repeat(" ", rest.MaxBody)+"{}"
	if a := w.must(503, "super-admin", "POST", path, large, expect...); a.header.Get("Retry-After") != "2" {
		t.Errorf("%v %s", a.header, a.body)
	}
	w.must(400, "super-admin", "POST", path, medium, expect...)
	w.must(202, "super-admin", "POST", path, `{"jti":"a"}`)
	for _, who := range []string{"acme-admin", "admin"} {
		w.must(400, who, "POST", path, large, expect...)
	}
	if _, err := io.WriteString(in, `"jti":"b"}`); err != nil {
		t.Fatal(err)
	}
	in.Close()
	if a := <-first; a.status != 202 {
		t.Errorf("%d %s", a.status, a.body)
	}
	w.must(400, "super-admin", "POST", path, large)
}

func TestPlaces(t *testing.T) {
	t.Parallel()
	p := newPlaces(3, 1)
	enter := func(who string, role string, tenant revocation.Tenant) (leave func(), ok bool) {
		t.Helper()
		r := httptest.NewRequestWithContext(t.Context(), "POST", path, nil)
		r.SetBasicAuth(who, "")
		one := accounts{who: {Tenant: tenant, Role: role}}
		rest.Require(one, nil, rest.Admin, rest.TenantAdmin)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			leave, ok = p.enter(r)
		})).ServeHTTP(httptest.NewRecorder(), r)
		return leave, ok
	}
	other := revocation.Tenant{ID: 8, Domain: "other.example"}
	var leave []func()
	for _, step := range []struct {
		who, role string
		tenant    revocation.Tenant
		ok        bool
	}{
		{"a", rest.TenantAdmin, acme, true},
		{"b", rest.TenantAdmin, acme, false},
		{"acme.com", rest.Admin, revocation.SuperTenant, true},
		{"acme.com", rest.Admin, revocation.SuperTenant, false},
		{"c", rest.TenantAdmin, other, false}, // the last one
		{"d", rest.Admin, revocation.SuperTenant, true},
		{"e", rest.Admin, revocation.SuperTenant, false},
	} {
		out, ok := enter(step.who, step.role, step.tenant)
		if ok != step.ok {
			t.Errorf("%+v: %t", step, ok)
		}
		if ok {
			leave = append(leave, out)
		}
	}
	for _, out := range leave {
		out()
	}
	if _, ok := enter("c", rest.TenantAdmin, other); !ok {
		t.Error("no place is free after all have left")
	}
}

// deadlines notes those that a handler sets, by how much there is left.
type deadlines struct {
	*httptest.ResponseRecorder
	read, write []time.Duration
}

func (d *deadlines) SetReadDeadline(at time.Time) error {
	d.read = append(d.read, time.Until(at).Round(time.Second))
	return nil
}

func (d *deadlines) SetWriteDeadline(at time.Time) error {
	d.write = append(d.write, time.Until(at).Round(time.Second))
	return nil
}

// An order that takes long is still answered, and a place is not held by who sends nothing.
func TestDeadlines(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const work, body = 40 * time.Second, 30 * time.Second
	for name, tt := range map[string]struct {
		body        string
		read, write []time.Duration
	}{
		"small":  {`{"jti":"a"}`, []time.Duration{work}, []time.Duration{work}},
		"medium": {strings.Repeat(" ", smallBody) + `{"jti":"a"}`, []time.Duration{body, work}, []time.Duration{body + work, work}},
		"large":  {strings.Repeat(" ", rest.MaxBody) + `{"jti":"a"}`, []time.Duration{body, work}, []time.Duration{body + work, work}},
	} {
		r := httptest.NewRequestWithContext(t.Context(), "POST", path, strings.NewReader(tt.body))
		r.SetBasicAuth("admin", "")
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Idempotency-Key", name) // whose answer is held back
		d := &deadlines{ResponseRecorder: httptest.NewRecorder()}
		w.server.Config.Handler.ServeHTTP(d, r)
		if d.Code != 202 || !slices.Equal(d.read, tt.read) || !slices.Equal(d.write, tt.write) {
			t.Errorf("%s: %d, read %v, write %v", name, d.Code, d.read, d.write)
		}
	}
}

// A dry run is looked at again each time, and its key may carry out the order.
func TestDryRunIsNotKept(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for range 2 {
		if a := w.must(200, "admin", "POST", path, `{"client_id":"key-1","dry_run":true}`, "Idempotency-Key", "k"); a.header.Get("Idempotency-Replayed") != "" {
			t.Errorf("%v %s", a.header, a.body)
		}
	}
	w.must(202, "admin", "POST", path, `{"client_id":"key-1"}`, "Idempotency-Key", "k")
}

func TestNew(t *testing.T) {
	t.Parallel()
	_, err := New(Deps{})
	if err == nil || strings.Count(err.Error(), "missing") != 5 {
		t.Errorf("%v", err)
	}
}
