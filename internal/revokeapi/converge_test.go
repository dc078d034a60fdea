package revokeapi

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/rest"
)

const oldEpoch = revocation.Epoch("4f4fa3c0-1c8e-4c5b-9d55-0a1e5f0b7c11")

// enlist makes gateways that have everything: one of all tenants, one of carbon.super and one of acme.com,
// and lost and stored ones of acme.com. What the caller's tenant must not see of them is named secret.
func (w *world) enlist() {
	at := w.ledger.Seen()
	of := func(id, tenant string, sees ...string) fleet.Gateway {
		return fleet.Gateway{
			ID: id, Account: "secret-account", Tenant: tenant, Sees: sees, Standing: fleet.Live, ReportedAt: time.Now(),
			Report: replica.Report{Position: at, Labels: map[string]string{"zone": "secret"}, Version: "secret", Error: "secret"},
		}
	}
	lost, stored := of("lost", "acme.com"), of("stored", "acme.com")
	lost.Standing, lost.Report.Epoch = fleet.Lost, oldEpoch
	stored.Stored = true
	w.fleet.all = []fleet.Gateway{of("acme", "acme.com"), of("all", "carbon.super", "*"), lost, stored, of("super", "carbon.super")}
}

// apply makes all gateways apply everything but those that do not live.
func (w *world) apply() {
	at := w.ledger.Seen()
	w.fleet.change(func(g *fleet.Gateway) {
		if g.Standing == fleet.Live {
			g.Report.Position, g.Stored = at, false
		}
	})
}

// later sends a request, and returns its answer when it comes.
func (w *world) later(who, path, body string, header ...string) <-chan response {
	c := make(chan response, 1)
	go func() {
		a, err := w.send(who, "POST", path, strings.NewReader(body), header...)
		if err != nil {
			w.t.Error(err)
		}
		c <- a
	}()
	return c
}

type converged struct {
	ID          string
	Seq         revocation.Seq
	Items       []item
	Convergence *convergence
	Sinks       []sunk
	Gateways    []standing
}

// shown is what all is in words: the names of those that have applied it, with a ? of those of which
// nobody knows, and with a ! of those that have not.
func shown(all []standing) string {
	var words []string
	for _, s := range all {
		word := s.ID
		if s.Applied == nil {
			word += "?"
		} else if !*s.Applied {
			word += "!"
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

func TestWait(t *testing.T) {
	t.Parallel()
	r := &transcript{world: newWorld(t)}
	r.enlist()
	answer := r.later("acme-admin", path+"?wait=60s", `{"jti":"a"}`)
	<-r.fleet.held
	r.apply()
	a := <-answer
	var got converged
	a.into(t, &got)
	c := got.Convergence
	if a.status != 202 || a.header.Get("Location") != path+"/"+got.ID || !c.Reached || c.Live != 3 || c.Lost != 1 || c.Detail != "" ||
		shown(c.Gateways) != "lost! acme all stored" || *c.Gateways[1].AfterMS != 1.234 {
		t.Errorf("%d %s", a.status, a.body)
	}
	if want := (revocation.Position{Epoch: r.ledger.Seen().Epoch, Seq: got.Seq}); !slices.Equal(r.fleet.asked, []revocation.Position{want}) {
		t.Errorf("%v, want %v", r.fleet.asked, want)
	}
	// Without gateways there is nobody to wait for.
	all := r.fleet.all
	r.fleet.all = nil
	if a := r.must(202, "acme-admin", "POST", path+"?wait=60s", `{"jti":"a"}`); !strings.Contains(a.body, `"reached":true,"took_ms":12.345,"live":0,"lost":0,"gateways":[]}`) {
		t.Errorf("%s", a.body)
	}
	r.fleet.all = all
	// A repeat waits for what there was, and finds it applied.
	r.do("acme-admin", "POST", path+"?wait=60s", `{"jti":"a"}`)
	// Of many, the last counts, and the gateways of all their tenants.
	r.do("admin", "POST", path+"?wait=1ms", `{"items":[{"jti":"a"},{"iss":"`+acmeIss+`","jti":"b"},{"jti":"a"}]}`)
	r.fleet.away = errors.New("secret: no route to host")
	r.do("acme-admin", "POST", path+"?wait=60s", `{"jti":"c"}`)
	r.fleet.away = nil
	r.api.waitingSmall = newPlaces(1, 1) // the last one, which is not a tenant's
	r.do("acme-admin", "POST", path+"?wait=60s", `{"jti":"d"}`)
	r.golden("wait")
	if strings.Contains(r.out.String(), "secret") {
		t.Error("the transcript has a secret")
	}
}

func TestWaitRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enlist()
	for query, want := range map[string]string{
		"?wait=": "60s", "?wait=0s": "60s", "?wait=-1s": "60s", "?wait=61s": "60s", "?wait=5": "60s",
		"?wait=1s&wait=1s": "more than once", "?wait=1s&x=1": "not known", "?%zz": "not well-formed",
	} {
		if a := w.must(400, "admin", "POST", path+query, `{"jti":"a"}`); !strings.Contains(a.body, want) || !strings.Contains(a.body, "/problems/invalid-parameter") {
			t.Errorf("%s: %s", query, a.body)
		}
	}
	w.must(400, "admin", "POST", path+"?wait=1s", `{"jti":"a","dry_run":true}`)
	w.must(400, "admin", "POST", path+"?wait=31s", `{"jti":"a"}`, "Idempotency-Key", "k")
	if n := w.revocations(); n != 0 {
		t.Errorf("%d revocations", n)
	}
	var got converged
	w.apply()
	if w.must(202, "admin", "POST", path+"?wait=1s", `{"token":"`+ending(iss, "over", -300)+`"}`).into(t, &got); got.Convergence != nil || len(w.fleet.asked) != 0 {
		t.Errorf("it was waited for what has ended: %+v", got)
	}
}

// The answer that is kept has what was known at the first time.
func TestWaitWithKey(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enlist()
	target, key := path+"?wait=30s", []string{"Idempotency-Key", "k"}
	answer := w.later("admin", target, `{"jti":"a"}`, key...)
	<-w.fleet.held
	w.must(409, "admin", "POST", target, `{"jti":"a"}`, key...)
	w.apply()
	first := <-answer
	second := w.must(202, "admin", "POST", target, `{"jti":"a"}`, key...)
	if first.status != 202 || second.body != first.body || second.header.Get("Idempotency-Replayed") != "true" || len(w.fleet.asked) != 1 {
		t.Errorf("%s, first %d %s", second.body, first.status, first.body)
	}
	w.must(422, "admin", "POST", path+"?wait=29s", `{"jti":"a"}`, key...) // another request
}

// Who waits holds no place of those who work, and is answered when the service stops.
func TestWaitingTakesNoPlace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enlist()
	var answers []<-chan response
	for i, padding := range []int{0, smallBody, rest.MaxBody} {
		body := strings.Repeat(" ", padding) + `{"jti":"` + jti(i) + `"}`
		answers = append(answers, w.later("acme-admin", path+"?wait=60s", body))
		<-w.fleet.held
		w.must(202, "acme-admin", "POST", path, body)
		if padding == 0 {
			continue
		}
		// As many of them wait as are worked on, which bounds what is held in memory.
		var got converged
		if w.must(202, "acme-admin", "POST", path+"?wait=60s", body).into(t, &got); got.Convergence.Detail == "" || got.Convergence.Reached {
			t.Errorf("%+v", got.Convergence)
		}
	}
	w.api.Close()
	for _, c := range answers {
		var got converged
		a := <-c
		if a.into(t, &got); a.status != 202 || got.Convergence.Reached || got.Convergence.Detail != "" {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	for _, p := range []*places{w.api.medium, w.api.large, w.api.waitingSmall, w.api.waitingMedium, w.api.waitingLarge} {
		if p.all != 0 || len(p.taken) != 0 {
			t.Errorf("%+v are still taken", p.taken)
		}
	}
	w.must(202, "acme-admin", "POST", path+"?wait=60s", `{"jti":"at once"}`)
}

// A caller that goes away ends the wait, not what it has ordered.
func TestWaiterGoesAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enlist()
	ctx, cancel := context.WithCancel(t.Context())
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, path+"?wait=60s", strings.NewReader(`{"jti":"a"}`))
	r.SetBasicAuth("admin", "")
	r.Header.Set("Content-Type", "application/json")
	d := &deadlines{ResponseRecorder: httptest.NewRecorder()}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.server.Config.Handler.ServeHTTP(d, r)
	}()
	<-w.fleet.held
	cancel()
	<-done
	want := []time.Duration{100 * time.Second}
	if w.revocations() != 1 || !slices.Equal(d.read, want) || !slices.Equal(d.write, want) {
		t.Errorf("%d revocations, read %v, write %v", w.revocations(), d.read, d.write)
	}
}

func TestWhoHasApplied(t *testing.T) {
	t.Parallel()
	r := &transcript{world: newWorld(t)}
	if err := r.ledger.EnsureCursors(t.Context(), []string{"amqp", "etcd"}); err != nil {
		t.Fatal(err)
	}
	r.enlist()
	var made converged
	r.must(202, "acme-admin", "POST", path, `{"jti":"a"}`).into(t, &made)
	one := path + "/" + made.ID
	if _, err := r.pool.Exec(t.Context(), `UPDATE rescind.sink_cursors SET seq = $1 WHERE sink = 'etcd'`, int64(made.Seq)); err != nil {
		t.Fatal(err)
	}
	r.fleet.change(func(g *fleet.Gateway) {
		if g.ID != "all" {
			g.Report.Seq = made.Seq
		}
	})
	r.do("acme-admin", "GET", one, "")
	r.golden("applied")
	sinks := func(all []sunk) (words string) {
		for _, s := range all {
			words += shown([]standing{{ID: s.Name, Applied: s.Applied}}) + " "
		}
		return words
	}
	see := func(who, wantSinks, wantGateways string) {
		t.Helper()
		var got converged
		a := r.must(200, who, "GET", one, "")
		a.into(t, &got)
		if sinks(got.Sinks) != wantSinks || shown(got.Gateways) != wantGateways || strings.Contains(a.body, "secret") {
			t.Errorf("%s: %q, %q: %s", who, sinks(got.Sinks), shown(got.Gateways), a.body)
		}
	}
	for _, who := range []string{"acme-admin", "acme-auditor", "wide-admin", "admin", "two-auditor"} {
		see(who, "amqp! etcd ", "all! stored? lost! acme")
	}
	// Once retention has removed the event nobody knows where it was, but before what is left.
	r.must(202, "acme-admin", "POST", path, `{"jti":"b"}`)
	for _, sql := range []string{
		`UPDATE rescind.sink_cursors SET seq = seq + 1 WHERE sink = 'amqp'`,
		`SELECT rescind.trim_log('0s', 1000)`,
		`UPDATE rescind.sink_cursors SET seq = seq - 1 WHERE sink = 'amqp'`, // as a restored log may have it
	} {
		if _, err := r.pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	see("admin", "amqp? etcd ", "all? stored? lost! acme")
	r.fleet.away = errors.New("no route to host")
	r.must(500, "admin", "GET", one, "")
}
