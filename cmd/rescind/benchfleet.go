package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// fleet lets many gateways follow the events, then report, and says what their reports cost the service, and how
// long a revocation takes to be confirmed by all of them.
func (b *bench) fleet(ctx context.Context) error {
	const measured, barriers = 20 * time.Second, 50
	if b.gatewayCount == 0 {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel(nil)
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 2 * b.gatewayCount, IdleConnTimeout: time.Minute, ReadBufferSize: 2 << 10, WriteBufferSize: 2 << 10}}
	gateways := make([]*simulated, b.gatewayCount)
	var heard, sent atomic.Int64 // bytes of events and heartbeats, and reports
	start := make(chan struct{})
	following := make(chan struct{}, b.gatewayCount)
	for i := range gateways {
		g := &simulated{b: b, client: client, id: fmt.Sprintf("bench-%d", i), instance: uuid.NewString(), moved: make(chan struct{}), heard: &heard, sent: &sent}
		gateways[i] = g
		running.Go(func() {
			if err := g.follow(ctx, following); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("gateway %s: %w", g.id, err))
			}
		})
		running.Go(func() {
			select {
			case <-start:
			case <-ctx.Done():
				return
			}
			if err := g.report(ctx); ctx.Err() == nil {
				cancel(fmt.Errorf("report of gateway %s: %w", g.id, err))
			}
		})
	}
	for range gateways {
		select {
		case <-following:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	idle, err := b.cores(ctx, measured)
	if err != nil {
		return err
	}
	close(start)
	live := 0
	for live < len(gateways) {
		head, err := b.head(ctx)
		if err != nil {
			return err
		}
		var at struct {
			Reached bool
			Live    int
		}
		if err := b.admin(ctx, http.MethodPost, "/v1/barrier", map[string]any{"seq": head, "timeout": "10s"}, http.StatusOK, &at); err != nil {
			return err
		}
		if at.Reached {
			live = at.Live
		}
	}
	heard.Store(0)
	sent.Store(0)
	reporting, err := b.cores(ctx, measured)
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("(15) reports of %d gateways", len(gateways)), fmt.Sprintf("%.1f %% of a core", 100*(reporting-idle)),
		fmt.Sprintf("%.0f reports/s; the service took %.3f cores for their streams alone, %.3f with the reports; heartbeats %.0f KB/s in all",
			float64(sent.Load())/measured.Seconds(), idle, reporting, float64(heard.Load())/1e3/measured.Seconds()))
	var took []time.Duration
	for range barriers {
		var answer struct {
			Convergence struct {
				Reached bool
				TookMS  float64 `json:"took_ms"`
				Live    int
			}
		}
		began := time.Now()
		order := map[string]any{"kind": revocation.KindToken, "iss": b.issuer, "jti": uuid.NewString()}
		if err := b.admin(ctx, http.MethodPost, "/v1/revocations?wait=30s", order, http.StatusAccepted, &answer); err != nil {
			return err
		}
		if !answer.Convergence.Reached || answer.Convergence.Live < len(gateways) {
			return fmt.Errorf("a revocation was confirmed by less than %d gateways: %+v", len(gateways), answer.Convergence)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	l := load{latencies: took}
	b.row(fmt.Sprintf("(15) revoked and confirmed by %d gateways", len(gateways)), fmt.Sprintf("p50 %s, max %s", ms(l.at(0.5)), ms(l.at(1))), "from the request to its answer, with ?wait")
	return context.Cause(ctx)
}

// cores is how many cores the service takes for a while.
func (b *bench) cores(ctx context.Context, d time.Duration) (float64, error) {
	before, err := b.scrape(ctx)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	after, err := b.scrape(ctx)
	if err != nil {
		return 0, err
	}
	return (after[metricCPU] - before[metricCPU]) / time.Since(began).Seconds(), nil
}

func (b *bench) head(ctx context.Context) (head revocation.Seq, err error) {
	err = b.pool.QueryRow(ctx, `SELECT seq FROM rescind.log_head`).Scan(&head)
	return head, err
}

// admin sends a request of the demo's admin and reads the answer.
func (b *bench) admin(ctx context.Context, method, path string, body any, status int, to any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, b.dev.BaseURL+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.SetBasicAuth(b.dev.AdminUser, b.dev.AdminPassword)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if text, err = io.ReadAll(resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != status {
		return fmt.Errorf("%s %s: %s: %.300s", method, path, resp.Status, text)
	}
	return json.Unmarshal(text, to)
}

// simulated is as much of a gateway as the service sees of one.
type simulated struct {
	b            *bench
	client       *http.Client
	id, instance string
	heard, sent  *atomic.Int64

	mu    sync.Mutex
	at    revocation.Position
	moved chan struct{} // closed and replaced when at has changed
}

func (g *simulated) request(ctx context.Context, method, path string, body io.Reader) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, method, g.b.dev.BaseURL+path, body)
	if err == nil {
		req.SetBasicAuth(g.b.dev.GatewayUser, g.b.dev.GatewayPassword)
	}
	return req, err
}

// follow reads the stream of events and keeps where it stands.
func (g *simulated) follow(ctx context.Context, following chan<- struct{}) error {
	req, err := g.request(ctx, http.MethodGet, "/v1/events", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "text/event-stream")
	resp, err := g.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 2<<10), 64<<10)
	for first := true; lines.Scan(); {
		g.heard.Add(int64(len(lines.Bytes()) + 1))
		id, ok := strings.CutPrefix(lines.Text(), "id:")
		if !ok {
			continue
		}
		epoch, text, _ := strings.Cut(strings.TrimSpace(id), ":")
		seq, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("event id %q: %w", id, err)
		}
		g.mu.Lock()
		g.at = revocation.Position{Epoch: revocation.Epoch(epoch), Seq: revocation.Seq(seq)}
		close(g.moved)
		g.moved = make(chan struct{})
		g.mu.Unlock()
		if first {
			first = false
			following <- struct{}{}
		}
	}
	return lines.Err()
}

func (g *simulated) position() (revocation.Position, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.at, g.moved
}

// report reports as a replica does, until something fails.
func (g *simulated) report(ctx context.Context) error {
	for {
		at, _ := g.position()
		body, err := json.Marshal(replica.Report{
			Instance: g.instance, Started: 1, Labels: map[string]string{"site": "bench"}, Version: "bench", Position: at, AgeMS: 500, Ready: true,
			Revocations: 1000, Entities: 100, Feeds: []replica.FeedStatus{{Name: "sse", Connected: true}},
		})
		if err != nil {
			return err
		}
		req, err := g.request(ctx, http.MethodPost, "/v1/gateways/"+g.id+"/status", bytes.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/json")
		text, err := g.post(req)
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			select { // as replicas do, since all of these begin at once
			case <-time.After(time.Second + rand.N(2*time.Second)):
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		g.sent.Add(1)
		var asked replica.Instructions
		if err := json.Unmarshal(text, &asked); err != nil {
			return err
		}
		if err := g.obey(ctx, asked); err != nil {
			return err
		}
	}
}

// post sends a report and returns its answer.
func (g *simulated) post(req *http.Request) ([]byte, error) {
	resp, err := g.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %.300s", resp.Status, text)
	}
	return text, err
}

// obey waits until the next report is due.
func (g *simulated) obey(ctx context.Context, asked replica.Instructions) error {
	if asked.Confirm.Epoch == "" {
		select {
		case <-time.After(time.Duration(asked.NextMS) * time.Millisecond):
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	late := time.NewTimer(2 * time.Second)
	defer late.Stop()
	for {
		at, moved := g.position()
		if at.Epoch != asked.Confirm.Epoch || at.Seq >= asked.Confirm.Seq {
			return nil
		}
		select {
		case <-moved:
		case <-late.C:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
