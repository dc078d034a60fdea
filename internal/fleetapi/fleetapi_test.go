package fleetapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-chi/chi/v5"
	gocmp "github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/rest"
)

const (
	onePathOf   = "/v1/gateways/"
	barrierPath = "/v1/barrier"
	sound       = `{"instance":"` + instance + `","started":1700000000000,"epoch":"` + string(epoch) + `","seq":7,"age_ms":-1,"ready":true}`
)

func TestNew(t *testing.T) {
	t.Parallel()
	_, err := New(Config{MaxWaiting: -1}, Deps{})
	if err == nil || strings.Count(err.Error(), "missing") != 5 || !strings.Contains(err.Error(), "MaxWaiting is -1") {
		t.Errorf("%v", err)
	}
}

func TestRoles(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{}, some()...)
	w.fleet.answer.NextMS = 1
	for who, want := range map[string][6]int{ // POST status, list, one, POST barrier, PUT canary, DELETE
		"": {401, 401, 401, 401, 401, 401}, "nobody": {401, 401, 401, 401, 401, 401},
		"gateway": {200, 403, 403, 403, 403, 403}, "notifier": {403, 403, 403, 403, 403, 403},
		"acme-auditor": {403, 200, 200, 403, 403, 403}, "two-auditor": {403, 200, 200, 403, 403, 403},
		"acme-admin": {403, 200, 200, 200, 403, 403}, "super-admin": {403, 200, 200, 200, 403, 204}, "admin": {403, 200, 200, 200, 200, 204},
	} {
		one := onePathOf + "wide-1"
		got := [6]int{
			w.do(who, "POST", onePathOf+"new/status", sound).status, w.do(who, "GET", path, "").status, w.do(who, "GET", one, "").status,
			w.do(who, "POST", barrierPath, `{"seq":1}`).status, w.do(who, "PUT", one+"/canary", `{"url":""}`).status, w.do(who, "DELETE", one, "").status,
		}
		if got != want {
			t.Errorf("%s: %v, want %v", who, got, want)
		}
		w.fleet.change("wide-1", func(g *fleet.Gateway) { *g = some()[0] })
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	r := &transcript{world: newWorld(t, Config{}, some()...)}
	r.do("admin", "GET", path+"?limit=2", "")
	r.do("acme-admin", "GET", path, "")
	r.do("admin", "GET", onePathOf+"wide-1", "")
	r.do("acme-admin", "GET", onePathOf+"wide-1", "")
	r.do("acme-admin", "GET", onePathOf+"other-1", "")
	r.do("admin", "GET", onePathOf+"wide-1?x=1", "")
	r.do("admin", "GET", path+"?label=a:b&label=c:d", "")
	r.do("admin", "GET", path+"?standing=dead", "")
	r.do("admin", "GET", path+"?verdict=fine", "")
	r.golden("read")
	r.must(200, "admin", "HEAD", onePathOf+"wide-1", "")
}

// ids follows the pages of a list.
func (w *world) ids(who, query string) (ids []string) {
	w.t.Helper()
	for next := ""; ; {
		var page struct {
			Items      []struct{ ID string } `json:"items"`
			NextCursor string                `json:"next_cursor"`
		}
		w.must(200, who, "GET", path+"?limit=2&"+query+next, "").into(w.t, &page)
		for _, i := range page.Items {
			ids = append(ids, i.ID)
		}
		if page.NextCursor == "" {
			return ids
		}
		next = "&cursor=" + page.NextCursor
	}
}

func TestFilters(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{}, some()...)
	for query, want := range map[string]string{
		"":                         "acme-1 acme-2 only-1 other-1 wide-1 without-1",
		"standing=lost":            "acme-2",
		"standing=live":            "acme-1 only-1 other-1 wide-1 without-1",
		"verdict=equal":            "acme-1",
		"verdict=diverged":         "wide-1",
		"verdict=unknown":          "acme-2 only-1 other-1 without-1",
		"label=zone:b":             "acme-1",
		"label=zone":               "",
		"account=acme-gateway":     "acme-1 acme-2",
		"account=nobody":           "",
		"standing=live&label=a:b":  "",
		"label=zone:b&account=x":   "",
		"label=zone:secret-zone":   "only-1 other-1 wide-1 without-1",
		"verdict=diverged&label=":  "wide-1",
		"standing=&account=&label": "acme-1 acme-2 only-1 other-1 wide-1 without-1",
	} {
		if got := strings.Join(w.ids("admin", query), " "); got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
	w.fleet.away = &pgconn.ConnectError{}
	for _, target := range []string{path, onePathOf + "wide-1"} {
		if a := w.must(503, "admin", "GET", target, ""); a.header.Get("Retry-After") == "" {
			t.Errorf("%s: %v", target, a.header)
		}
	}
}

// Whoever is bound to a tenant sees the gateways that serve it, and of those of others nothing about how
// they are run, whatever it asks for.
func TestTenantsAreApart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{}, some()...)
	const everything = "acme-1 acme-2 only-1 other-1 wide-1 without-1"
	for who, want := range map[string]string{
		"acme-admin": "acme-1 acme-2 only-1 wide-1", "wide-admin": "acme-1 acme-2 only-1 wide-1", "acme-auditor": "acme-1 acme-2 only-1 wide-1",
		"super-admin": "only-1 other-1 wide-1 without-1", "two-auditor": everything, "wide-auditor": everything, "admin": everything,
	} {
		if got := strings.Join(w.ids(who, ""), " "); got != want {
			t.Errorf("%s: %s, want %s", who, got, want)
		}
		for id := range strings.FieldsSeq(everything) {
			status := 404
			if slices.Contains(strings.Fields(want), id) {
				status = 200
			}
			a := w.must(status, who, "GET", onePathOf+id, "")
			if strings.HasPrefix(who, "acme") || who == "wide-admin" {
				if strings.Contains(a.body, "secret") || strings.Contains(a.body, "4711") || strings.Contains(a.body, "carbon") {
					t.Errorf("%s sees of %s: %s", who, id, a.body)
				}
			}
		}
	}
	for _, query := range []string{"label=zone:secret-zone", "account=secret-account"} {
		if got := w.ids("acme-admin", query); len(got) > 0 {
			t.Errorf("%s finds %v", query, got)
		}
	}
	for body, want := range map[string]string{
		`{"seq":1}`: "acme-2 acme-1 only-1 wide-1",
		`{"seq":1,"selector":{"tenant":"acme.com"}}`:                                       "acme-2 acme-1 only-1 wide-1",
		`{"seq":1,"selector":{"labels":{"zone":"secret-zone"}}}`:                           "",
		`{"seq":1,"selector":{"labels":{"zone":"b"}}}`:                                     "acme-1",
		`{"seq":1,"selector":{"gateways":["wide-1"]}}`:                                     "wide-1",
		`{"seq":1,"selector":{"gateways":["other-1"]}}`:                                    "400",
		`{"seq":1,"selector":{"gateways":["without-1"]}}`:                                  "400",
		`{"seq":1,"selector":{"tenant":"carbon.super"}}`:                                   "400",
		`{"seq":1,"selector":{"tenant":"other.example"}}`:                                  "400",
		`{"seq":1,"selector":{"gateways":["wide-1"],"labels":{"zone":"secret-zone"}}}`:     "400",
		`{"seq":1,"selector":{"gateways":["acme-1"],"labels":{"zone":"b","tier":"edge"}}}`: "acme-1",
	} {
		a := w.do("acme-admin", "POST", barrierPath, body)
		if strings.Contains(a.body, "secret") {
			t.Errorf("%s: %s", body, a.body)
		}
		got := fmt.Sprint(a.status)
		if a.status == 200 {
			got = strings.Join(named(t, a), " ")
		}
		if got != want {
			t.Errorf("%s: %s, want %s", body, got, want)
		}
	}
	// A gateway of another tenant's account is not the tenant's to forget, though it serves it.
	w.must(403, "acme-admin", "DELETE", onePathOf+"wide-1", "")
	w.must(404, "acme-admin", "DELETE", onePathOf+"other-1", "")
	w.must(204, "acme-admin", "DELETE", onePathOf+"acme-1", "")
	w.must(404, "acme-admin", "DELETE", onePathOf+"acme-1", "")
	if len(w.audit.all) != 1 || w.audit.all[0].Subject != "acme-1" || w.audit.all[0].Action != "forget_gateway" ||
		w.audit.all[0].Tenant != acme || w.audit.all[0].Actor.Name != "account:acme-admin" {
		t.Errorf("%+v", w.audit.all)
	}
}

// named are the ids in a barrier's answer.
func named(t testing.TB, a response) (ids []string) {
	t.Helper()
	var r result
	a.into(t, &r)
	for _, g := range r.Gateways {
		ids = append(ids, g.ID)
	}
	return ids
}

func TestCanary(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{}, some()...)
	target := onePathOf + "acme-1/canary"
	var shown struct{ Canary *canary }
	w.must(200, "admin", "PUT", target, `{"url":"https://gw.example/canary"}`).into(t, &shown)
	if shown.Canary == nil || shown.Canary.URL != "https://gw.example/canary" {
		t.Errorf("%+v", shown.Canary)
	}
	shown.Canary = nil
	w.must(200, "admin", "PUT", target, `{"url":""}`).into(t, &shown)
	if shown.Canary != nil {
		t.Errorf("%+v", shown.Canary)
	}
	for body, want := range map[string]string{`{"url":"http://gw.example"}`: "must be https", `{}`: "must be there", `{"URL":""}`: "is not known here"} {
		if a := w.must(400, "admin", "PUT", target, body); !strings.Contains(a.body, want) || !strings.Contains(a.body, "invalid-request") {
			t.Errorf("%s: %s", body, a.body)
		}
	}
	w.must(404, "admin", "PUT", onePathOf+"nobody/canary", `{"url":""}`)
	w.fleet.failure = fleet.ErrNotFound // it was forgotten at this moment
	w.must(404, "admin", "PUT", target, `{"url":""}`)
	if len(w.audit.all) != 3 || w.audit.all[0].Action != "set_gateway_canary" {
		t.Errorf("%+v", w.audit.all)
	}
}

func TestBarrier(t *testing.T) {
	t.Parallel()
	r := &transcript{world: newWorld(t, Config{}, some()...)}
	r.do("admin", "POST", barrierPath, `{"seq":95}`)
	r.do("admin", "POST", barrierPath, `{"timeout":"1ms"}`)
	r.do("admin", "POST", barrierPath, `{"epoch":"`+string(epoch)+`","seq":100,"timeout":"1ms","selector":{"gateways":["wide-1","acme-2"],"tenant":"acme.com"}}`)
	for _, body := range []string{
		`{"seq":101}`,
		`{"seq":-1}`,
		`{"epoch":"` + string(oldEpoch) + `","seq":1}`,
		`{"seq":1,"timeout":"61s"}`,
		`{"seq":1,"timeout":"0s"}`,
		`{"seq":1,"timeout":5}`,
		`{"seq":1,"wait":"5s"}`,
		`{"seq":1,"selector":{"gateways":["acme-1","nobody","wide-1","nothing"]}}`,
		`{"seq":1,"selector":{"tenant":"NO"}}`,
	} {
		r.do("admin", "POST", barrierPath, body)
	}
	r.do("admin", "POST", barrierPath+"?wait=1s", `{"seq":1}`)
	r.golden("barrier")
}

// A barrier is answered when the last gateway that counts has applied it.
func TestBarrierIsReached(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{}, some()...)
	answer := w.later("admin", "POST", barrierPath, `{"seq":100,"timeout":"60s"}`)
	<-w.fleet.held
	w.fleet.change("acme-1", func(g *fleet.Gateway) { g.Report.Seq = 101 })
	<-w.fleet.held
	w.fleet.change("wide-1", func(g *fleet.Gateway) { g.Report.Seq = 100 })
	a := <-answer
	var got result
	a.into(t, &got)
	if a.status != 200 || !got.Reached || got.Live != 5 || got.Lost != 1 || got.Applied != 5 || got.Gateways[0].ID != "acme-2" || got.Gateways[0].AfterMS != nil {
		t.Errorf("%d %s", a.status, a.body)
	}
	for _, g := range got.Gateways[1:] {
		if !g.Applied || g.Behind == nil || *g.Behind != 0 || g.AfterMS == nil || *g.AfterMS != 1.234 {
			t.Errorf("%+v", g)
		}
	}
}

func TestFewBarriersWait(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{MaxWaiting: 2}, some()...)
	const body = `{"seq":100,"timeout":"60s"}`
	first := w.later("admin", "POST", barrierPath, body)
	<-w.fleet.held
	if a := w.must(503, "admin", "POST", barrierPath, body); a.header.Get("Retry-After") != "2" {
		t.Errorf("%v", a.header)
	}
	second := w.later("acme-admin", "POST", barrierPath, body)
	<-w.fleet.held
	w.must(503, "super-admin", "POST", barrierPath, body)
	w.api.Close()
	for _, c := range []<-chan response{first, second} {
		var got result
		a := <-c
		if a.into(t, &got); a.status != 200 || got.Reached {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	var got result // at once
	if w.must(200, "admin", "POST", barrierPath, body).into(t, &got); got.Reached {
		t.Errorf("%+v", got)
	}
	w.api.Close()
}

// A fleet of very many is told in a bounded answer, those first that matter.
func TestManyGateways(t *testing.T) {
	t.Parallel()
	var all []fleet.Gateway
	for i := range 3000 {
		g := some()[0]
		g.ID, g.Report.Seq = fmt.Sprintf("gw-%04d", i), revocation.Seq(100-i/2990)
		all = append(all, g)
	}
	w := newWorld(t, Config{}, all...)
	var got result
	w.must(200, "admin", "POST", barrierPath, `{"seq":100,"timeout":"1ms"}`).into(t, &got)
	if got.Reached || got.Live != 3000 || got.Applied != 2990 || len(got.Gateways) != maxShown || got.Gateways[9].ID != "gw-2999" || got.Gateways[10].ID != "gw-0000" {
		t.Errorf("%+v", got.Gateways[:11])
	}
}

func TestReports(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{})
	w.fleet.answer = replica.Instructions{
		Confirm: revocation.Position{Epoch: epoch, Seq: 9}, Digest: &replica.DigestRequest{Cutoff: 60}, Load: "x", NextMS: 5,
	}
	full := `{"instance":"` + instance + `","started":1,"labels":{"zone":"a","empty":""},"version":"v","epoch":"` + string(epoch) + `","seq":7,"age_ms":3,"ready":true,
		"tenants":["acme.com"],"revocations_only":true,"revocations":1,"entities":2,"snapshots":3,"deltas":4,
		"feeds":[{"name":"amqp","connected":false,"heard":5,"events":6,"error":"a b"}],"error":"é",
		"digest":{"epoch":"` + string(epoch) + `","seq":6,"cutoff":120,"revocations":"` + strings.Repeat("0f", 16) + `","count":1,"catalog":"` + strings.Repeat("00", 16) + `","entities":2},
		"leaving":true,"new":{"member":[1]}}`
	a := w.must(200, "gateway", "POST", onePathOf+"gw/status", full)
	if a.header.Get("Cache-Control") != "no-store" || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("%v", a.header)
	}
	var told replica.Instructions
	a.into(t, &told)
	if diff := gocmp.Diff(w.fleet.answer, told); diff != "" {
		t.Error(diff)
	}
	sum := replica.Sum{}
	for i := range sum {
		sum[i] = 0x0f
	}
	want := replica.Report{
		Instance: instance, Started: 1, Labels: map[string]string{"zone": "a", "empty": ""}, Version: "v", Position: revocation.Position{Epoch: epoch, Seq: 7},
		AgeMS: 3, Ready: true, Tenants: []string{"acme.com"}, RevocationsOnly: true, Revocations: 1, Entities: 2, Snapshots: 3, Deltas: 4,
		Feeds: []replica.FeedStatus{{Name: "amqp", Heard: 5, Events: 6, Error: "a b"}}, Error: "é",
		Digest:  &replica.Digest{Position: revocation.Position{Epoch: epoch, Seq: 6}, Cutoff: 120, Revocations: sum, Count: 1, Entities: 2},
		Leaving: true,
	}
	if diff := gocmp.Diff([]replica.Report{want}, w.fleet.reports); diff != "" {
		t.Error(diff)
	}
}

func TestReportsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{})
	w.fleet.answer.NextMS = 1
	const target = onePathOf + "gw/status"
	with := func(members string) string { return strings.TrimSuffix(sound, "}") + "," + members + "}" }
	for body, want := range map[string]string{
		`{`:                               "malformed at byte 1",
		`[]`:                              "must not be of JSON type array",
		with(`"seq":"1"`):                 `"#/seq","detail":"must not be of JSON type string"`,
		with(`"seq":1e30`):                `"#/seq","detail":"must not be of JSON type number"`,
		with(`"feeds":[{"connected":1}]`): "#/feeds/connected",
		with(`"digest":{"revocations":"secret"}`): "has not the form",
	} {
		a := w.must(400, "gateway", "POST", target, body)
		if !strings.Contains(a.body, want) || !strings.Contains(a.body, "/problems/invalid-request") || strings.Contains(a.body, "secret") {
			t.Errorf("%.60s: %s, want %s", body, a.body, want)
		}
	}
	w.must(400, "gateway", "POST", target+"?hold=false", sound)
	w.must(413, "gateway", "POST", target, strings.Repeat(" ", maxReport)+sound)
	w.must(415, "gateway", "POST", target, sound, "Content-Encoding", "gzip")
	w.must(415, "gateway", "POST", target, sound, "Content-Type", "text/plain")
	if n := len(w.fleet.reports); n != 0 {
		t.Errorf("%d reports were taken", n)
	}
	for _, tt := range []struct {
		err    error
		status int
		want   string
	}{
		{fleet.ErrID, 400, "/problems/invalid-request"}, {fmt.Errorf("%w: seq is -1", fleet.ErrReport), 400, "seq is -1."},
		{fleet.ErrOwned, 403, "/problems/gateway-owned"}, {fleet.ErrInstance, 409, "/problems/gateway-instance"},
		{fleet.ErrTooMany, 503, "/problems/too-many-gateways"}, {&pgconn.ConnectError{}, 503, "about:blank"}, {errors.New("secret"), 500, "about:blank"},
	} {
		w.fleet.failure = fmt.Errorf("gateway gw: %w", tt.err)
		a := w.must(tt.status, "gateway", "POST", target, sound)
		if !strings.Contains(a.body, tt.want) || strings.Contains(a.body, "secret") || (a.header.Get("Retry-After") != "") != (tt.status == 503) {
			t.Errorf("%v: %v %s", tt.err, a.header, a.body)
		}
	}
}

// An answer is held, ends with its caller, and with the service: then gateways come again one by one.
func TestReportsAreHeld(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		_, err := w.send(ctx, "gateway", "POST", onePathOf+"gone/status", sound)
		gone <- err
	}()
	<-w.fleet.held
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	var answers []<-chan response
	for i := range 20 {
		answers = append(answers, w.later("gateway", "POST", fmt.Sprintf("%sgw-%d/status", onePathOf, i), sound))
	}
	for range answers {
		<-w.fleet.held
	}
	w.api.Close()
	next := make(map[int64]bool)
	for _, c := range answers {
		a := <-c
		var told replica.Instructions
		if a.into(t, &told); a.status != 200 || told.NextMS < 0 || told.NextMS >= spread.Milliseconds() {
			t.Errorf("%d %s", a.status, a.body)
		}
		next[told.NextMS] = true
	}
	if len(next) < 2 {
		t.Errorf("all come again in the same millisecond: %v", next)
	}
	before := len(w.fleet.reports)
	w.must(200, "gateway", "POST", onePathOf+"gw/status", sound) // not held, and taken
	if n := len(w.fleet.reports); n != before+1 {
		t.Errorf("%d reports, %d before", n, before)
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

// What waits is not cut off by the server's deadlines.
func TestDeadlines(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Config{}, some()...)
	w.fleet.answer.NextMS = 1
	router := chi.NewRouter()
	w.api.Routes(router)
	for _, tt := range []struct {
		who, target, body string
		want              time.Duration
	}{
		{"gateway", onePathOf + "gw/status", sound, 110 * time.Second},
		{"admin", barrierPath, `{"seq":1}`, 40 * time.Second},
		{"admin", barrierPath, `{"seq":1,"timeout":"60s"}`, 95 * time.Second},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, tt.target, strings.NewReader(tt.body))
		r.SetBasicAuth(tt.who, "")
		r.Header.Set("Content-Type", "application/json")
		d := &deadlines{ResponseRecorder: httptest.NewRecorder()}
		router.ServeHTTP(d, r)
		if want := []time.Duration{tt.want}; d.Code != 200 || !slices.Equal(d.read, want) || !slices.Equal(d.write, want) {
			t.Errorf("%s %s: %d, read %v, write %v", tt.target, tt.body, d.Code, d.read, d.write)
		}
	}
}

// A body is a report, or a problem says what is wrong.
func FuzzReadReport(f *testing.F) {
	for _, s := range []string{
		sound, `{}`, `null`, `{"feeds":[null]}`, `{"labels":{"a":null}}`, `{"digest":null}`, "{\"error\":\"\xff\"}", `{"digest":{"revocations":"x"}}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, body string) {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		report, err := readReport(httptest.NewRecorder(), r)
		if err != nil {
			if p, ok := errors.AsType[*rest.Problem](err); !ok || p.Status/100 != 4 {
				t.Errorf("%v", err)
			}
			return
		}
		if !utf8.ValidString(report.Error) || !json.Valid([]byte(body)) {
			t.Errorf("%q", report.Error)
		}
	})
}

// Over HTTP and with a real fleet: a barrier asks a gateway whose report is held, which confirms.
func TestFleet(t *testing.T) {
	t.Parallel()
	f, err := fleet.New(fleet.Config{}, pgtest.New(t), nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	w := newWorld(t, Config{})
	w.api.deps.Fleet = f
	report := func(seq int, more string) string {
		return fmt.Sprintf(`{"instance":%q,"started":1700000000000,"epoch":%q,"seq":%d,"age_ms":1,"ready":true,"labels":{"zone":"a"}%s}`, instance, epoch, seq, more)
	}
	const target = onePathOf + "gw-1/status"
	held := make(chan response, 1)
	go func() {
		var told replica.Instructions
		for told.Confirm.Seq == 0 { // till it is asked for something
			a, err := w.send(t.Context(), "gateway", "POST", target, report(50, ""))
			if err != nil || a.status != 200 {
				t.Errorf("%v, %d %s", err, a.status, a.body)
				break
			}
			told = replica.Instructions{}
			a.into(t, &told)
		}
		if told.Confirm != (revocation.Position{Epoch: epoch, Seq: 99}) {
			t.Errorf("it is asked for %+v", told)
		}
		a, err := w.send(t.Context(), "gateway", "POST", target, report(99, ""))
		if err != nil {
			t.Error(err)
		}
		held <- a
	}()
	for changed := f.Changed(); ; changed = f.Changed() {
		if _, ok := f.Gateway("gw-1"); ok {
			break
		}
		<-changed
	}
	var got result
	a := w.must(200, "acme-admin", "POST", barrierPath, `{"seq":99,"timeout":"60s","selector":{"gateways":["gw-1"]}}`)
	if a.into(t, &got); !got.Reached || got.Live != 1 || got.Gateways[0].ID != "gw-1" || got.Gateways[0].Seq != 99 || *got.Gateways[0].AfterMS <= 0 {
		t.Errorf("%s", a.body)
	}
	w.api.Close()
	<-held
	if a := w.must(403, "gateway-2", "POST", target, report(1, "")); !strings.Contains(a.body, "/problems/gateway-owned") {
		t.Errorf("%s", a.body)
	}
	for body, want := range map[string]string{report(-1, ""): "seq is -1", report(1, `,"version":"\u0000"`): "version must be"} {
		if a := w.must(400, "gateway", "POST", target, body); !strings.Contains(a.body, "The report cannot be used: "+want) {
			t.Errorf("%s", a.body)
		}
	}
	w.must(400, "gateway", "POST", onePathOf+"-/status", report(1, ""))
	if a := w.must(200, "admin", "GET", onePathOf+"gw-1", ""); !strings.Contains(a.body, `"standing":"live"`) || !strings.Contains(a.body, `"seq":99,"behind":1,`) {
		t.Errorf("%s", a.body)
	}
	w.must(200, "admin", "PUT", onePathOf+"gw-1/canary", `{"url":"https://gw-1.example/canary"}`)
	w.must(204, "admin", "DELETE", onePathOf+"gw-1", "")
	w.must(404, "admin", "GET", onePathOf+"gw-1", "")
}

func BenchmarkReport(b *testing.B) {
	w := newWorld(b, Config{})
	w.fleet.answer.NextMS = 1
	router := chi.NewRouter()
	w.api.Routes(router)
	body := strings.TrimSuffix(sound, "}") + `,"labels":{"zone":"a"},"feeds":[{"name":"amqp","connected":true,"heard":1,"events":2}],"version":"1.2.3"}`
	b.ReportAllocs()
	for b.Loop() {
		w.fleet.reports = w.fleet.reports[:0]
		r := httptest.NewRequest(http.MethodPost, onePathOf+"gw/status", strings.NewReader(body))
		r.SetBasicAuth("gateway", "")
		r.Header.Set("Content-Type", "application/json")
		d := httptest.NewRecorder()
		if router.ServeHTTP(d, r); d.Code != 200 {
			b.Fatal(d.Body)
		}
	}
}
