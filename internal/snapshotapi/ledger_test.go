package snapshotapi_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/snapshotapi"
)

// source is a ledger as a follower sees it.
type source struct {
	*ledger.Ledger
	heads, reads atomic.Int64
}

func (s *source) Load(ctx context.Context, at func(revocation.Position), revoked func(replica.Record), _ func(catalog.Entity)) error {
	return s.View(ctx, func(_ context.Context, _ pgx.Tx, p revocation.Position, each func(func(directory.Stored)) error) error {
		at(p)
		return each(func(s directory.Stored) {
			revoked(replica.Record{Target: s.Target, Tenant: s.Tenant, Exp: s.Exp, NotAfter: s.NotAfter, Signature: s.Signature})
		})
	})
}

func (s *source) Head(ctx context.Context) (revocation.Position, error) {
	s.heads.Add(1)
	return s.Ledger.Head(ctx)
}

func (s *source) After(ctx context.Context, seq revocation.Seq, limit int) ([]revocation.Event, error) {
	s.reads.Add(1)
	events, err := s.Ledger.After(ctx, seq, limit)
	if errors.Is(err, ledger.ErrSeqGone) {
		return nil, fmt.Errorf("%w: %w", follow.ErrGone, err)
	}
	return events, err
}

type anybody struct{}

func (anybody) Account(*http.Request) (authn.Account, error) {
	return authn.Account{Username: "gateway", Role: "gateway", Tenant: revocation.SuperTenant, ExtraTenants: []string{"*"}}, nil
}

// world is the API on a real log.
type world struct {
	t      *testing.T
	ledger *ledger.Ledger
	source *source
	url    string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	l, err := ledger.New(ledger.Config{Source: iss}, pgtest.New(t), prometheus.NewRegistry(), log)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, ledger: l, source: &source{Ledger: l}}
	w.run(l.Run)
	w.revoke("before")
	f, err := follow.New(follow.Config{}, w.source, prometheus.NewRegistry(), log)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Load(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.run(f.Run)
	a, err := snapshotapi.New(snapshotapi.Config{}, snapshotapi.Deps{Follower: f, Accounts: anybody{}, Registerer: prometheus.NewRegistry(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	r := chi.NewRouter()
	a.Routes(r)
	server := httptest.NewServer(r)
	t.Cleanup(func() {
		a.Close()
		server.CloseClientConnections()
		server.Close()
	})
	w.url = server.URL
	return w
}

func (w *world) run(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Run: %v", err)
		}
	})
}

const iss = "https://km.example.com"

func (w *world) revoke(jti string) revocation.Target {
	w.t.Helper()
	target := revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: jti}
	_, err := w.ledger.Revoke(w.t.Context(), ledger.Request{
		Target: target, Tenant: revocation.SuperTenant, Exp: time.Now().Add(time.Hour).Unix(), Reason: "client",
		Action: "revoke_token", Actor: ledger.Actor{Name: "system"},
	})
	if err != nil {
		w.t.Fatalf("revoke %s: %v", jti, err)
	}
	return target
}

func (w *world) get(path string, header ...string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, w.url+path, nil)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err == nil && resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		return nil, fmt.Errorf("GET %s: %s: %s", path, resp.Status, b)
	}
	return resp, err
}

func (w *world) getJSON(path string, v any) {
	w.t.Helper()
	resp, err := w.get(path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		w.t.Fatal(err)
	}
}

type listed struct {
	revocation.Position
	Items []struct {
		Kind     revocation.Kind
		Iss, JTI string
	}
}

// A gateway that takes a snapshot and then follows has everything, by polls and by a
// stream, and what is answered 200 is in the next snapshot within two seconds.
func TestSnapshotAndEventsOfALog(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var first listed
	w.getJSON("/v1/snapshots/revocations", &first)
	if len(first.Items) != 1 || first.Items[0].JTI != "before" || first.Seq != 1 {
		t.Fatalf("first snapshot is %+v", first)
	}
	resp, err := w.get("/v1/events?after="+first.String(), "Accept", "text/event-stream")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	const n = 200
	var writers sync.WaitGroup
	for i := range n {
		writers.Go(func() { w.revoke(fmt.Sprint("at-", i)) })
	}
	want := map[string]bool{"before": true}
	for i := range n {
		want[fmt.Sprint("at-", i)] = true
	}

	streamed, polled := map[string]bool{"before": true}, map[string]bool{"before": true}
	for seq := first.Seq; seq < first.Seq+n && lines.Scan(); {
		if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok && !strings.Contains(data, `"head":`) {
			e, err := revocation.ParseEvent([]byte(data))
			if err != nil || e.Seq != seq+1 {
				t.Fatalf("after %d: %s, %v", seq, data, err)
			}
			streamed[e.Subject] = true
			seq++
		}
	}
	writers.Wait()
	for at := first.Position; at.Seq < first.Seq+n; {
		var answer struct {
			Through revocation.Seq
			Events  []json.RawMessage
		}
		w.getJSON("/v1/events?wait=10s&limit=70&after="+at.String(), &answer)
		for _, raw := range answer.Events {
			e, err := revocation.ParseEvent(raw)
			if err != nil || e.Seq != at.Seq+1 {
				t.Fatalf("after %s: %s, %v", at, raw, err)
			}
			polled[e.Subject] = true
			at = e.Position
		}
		if at.Seq != answer.Through {
			t.Fatalf("events up to %d, through is %d", at.Seq, answer.Through)
		}
	}
	old := time.Now().Add(2 * time.Second)
	var last listed
	for asked := time.Now(); last.Seq < first.Seq+n && asked.Before(old); {
		asked = time.Now()
		w.getJSON("/v1/snapshots/revocations", &last)
	}
	inSnapshot := map[string]bool{}
	for _, item := range last.Items {
		inSnapshot[item.JTI] = true
	}
	for name, got := range map[string]map[string]bool{"streamed": streamed, "polled": polled, "in the last snapshot": inSnapshot} {
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// Any number of readers cost the database no more than none.
func TestReadersCostTheDatabaseNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	start, heads, reads := time.Now(), w.source.heads.Load(), w.source.reads.Load()
	at := w.ledgerHead()
	var readers sync.WaitGroup
	for i := range 300 {
		readers.Go(func() {
			path, accept := "/v1/snapshots/all", "application/json"
			switch i % 3 {
			case 1:
				path = "/v1/events?after=" + at.Position.String()
			case 2:
				path, accept = "/v1/events", "text/event-stream"
			}
			resp, err := w.get(path, "Accept", accept)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if _, err := resp.Body.Read(make([]byte, 100)); err != nil && err != io.EOF {
				t.Error(err)
			}
		})
	}
	readers.Wait()
	// The follower reads the head once a second by itself, and as it begins.
	allowed := int64(time.Since(start)/time.Second) + 5
	if got := w.source.heads.Load() - heads; got > allowed {
		t.Errorf("the head was read %d times, want %d at most", got, allowed)
	}
	if got := w.source.reads.Load() - reads; got > allowed {
		t.Errorf("events were read %d times, want %d at most", got, allowed)
	}
}

func (w *world) ledgerHead() listed {
	w.t.Helper()
	var at listed
	w.getJSON("/v1/snapshots/revocations", &at)
	return at
}
