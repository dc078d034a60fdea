package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

const (
	metricRSS       = "process_resident_memory_bytes"
	metricCPU       = "process_cpu_seconds_total"
	metricHeadReads = `rescind_follow_head_reads_total{result="ok"}`
)

// fill adds live revocations until there are n, and lets the sinks have them.
func (b *bench) fill(ctx context.Context, n int) (load, time.Duration, error) {
	l, err := b.ledger()
	if err != nil {
		return load{}, 0, err
	}
	runCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	ran := make(chan error, 1)
	go func() { ran <- l.Run(runCtx) }()
	defer func() { stop(); <-ran }()
	have, err := b.liveCount(ctx)
	if err != nil {
		return load{}, 0, err
	}
	missing := max(0, n-have)
	fmt.Fprintf(b.progress, "adding %d revocations to the %d that are there\n", missing, have)
	exp := time.Now().Add(time.Hour).Unix()
	filled, err := b.inParallel(4000, missing, func(int) (func(int) error, error) {
		return func(int) error {
			_, err := l.Revoke(ctx, ledger.Request{
				Target: revocation.Target{Kind: revocation.KindToken, Iss: b.issuer, ID: uuid.NewString()},
				Tenant: revocation.SuperTenant, Exp: exp, ClientID: b.dev.ClientID, Reason: "client", Action: "revoke_token",
				Actor: ledger.Actor{Name: "client:" + b.dev.ClientID},
			})
			return err
		}, nil
	})
	if err != nil {
		return filled, 0, err
	}
	drained, err := b.caughtUp(ctx)
	return filled, drained, err
}

func (b *bench) liveCount(ctx context.Context) (n int, err error) {
	err = b.pool.QueryRow(ctx, `SELECT count(*) FROM rescind.revocations WHERE exp + 120 > extract(epoch FROM now())`).Scan(&n)
	return n, err
}

// get is one download over a connection of its own, read and not decoded.
type get struct {
	first, last time.Duration
	bytes       int64 // of the body, as sent
}

// download sends GET path with the gateway's account and reads the answer to its end.
func (b *bench) download(base, path, coding string, body io.Writer) (get, error) {
	u, err := url.Parse(base)
	if err != nil {
		return get{}, err
	}
	start := time.Now()
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		return get{}, err
	}
	defer c.Close()
	if err := c.SetDeadline(start.Add(2 * time.Minute)); err != nil {
		return get{}, err
	}
	req := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Basic %s\r\nAccept-Encoding: %s\r\nConnection: close\r\n\r\n",
		path, u.Host, base64.StdEncoding.EncodeToString([]byte(b.dev.GatewayUser+":"+b.dev.GatewayPassword)), coding)
	if _, err := io.WriteString(c, req); err != nil {
		return get{}, err
	}
	r := bufio.NewReaderSize(c, 64<<10)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return get{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return get{}, fmt.Errorf("GET %s: %s: %s", path, resp.Status, text)
	}
	if _, err := r.Peek(1); err != nil {
		return get{}, err
	}
	g := get{first: time.Since(start)}
	g.bytes, err = io.CopyBuffer(struct{ io.Writer }{body}, struct{ io.Reader }{resp.Body}, make([]byte, 64<<10))
	g.last = time.Since(start)
	return g, err
}

// coldStarts lets many gateways fetch the native snapshot at once.
func (b *bench) coldStarts(ctx context.Context) error {
	if b.starts == 0 {
		return nil
	}
	if _, _, err := b.fill(ctx, b.startsLive); err != nil {
		return err
	}
	live, err := b.liveCount(ctx)
	if err != nil {
		return err
	}
	const path = "/v1/snapshots/revocations"
	one, err := b.download(b.dev.BaseURL, path, "zstd", io.Discard)
	if err != nil {
		return err
	}
	before, err := b.scrape(ctx)
	if err != nil {
		return err
	}
	idle, err := b.transactions(ctx, func() error { return nil })
	if err != nil {
		return err
	}
	peak := b.watchMetric(ctx, metricRSS)
	var took time.Duration
	var l load
	var total atomic.Int64
	reads, err := b.transactions(ctx, func() (err error) {
		start := time.Now()
		l, err = b.startCold(path, &total)
		took = time.Since(start)
		return err
	})
	top := peak()
	if err != nil {
		return err
	}
	after, err := b.scrape(ctx)
	if err != nil {
		return err
	}
	baseline, err := loopbackCopy(b.starts, one.bytes)
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("(6) %d cold starts at once, %d revocations, zstd", b.starts, live), fmt.Sprintf("%.2f s = %.2f x copying the bytes over loopback", took.Seconds(), took.Seconds()/baseline.Seconds()),
		fmt.Sprintf("%d MB in all, p50 %s, p99 %s; service %.0f MiB before, %.0f MiB at most; %.0f reads of the log's head; "+
			"%d transactions in Postgres in that time and %s, %d in as long without cold starts",
			total.Load()/1e6, ms(l.at(0.5)), ms(l.at(0.99)), before[metricRSS]/(1<<20), top/(1<<20), after[metricHeadReads]-before[metricHeadReads],
			reads, settle, idle))
	return nil
}

// settle is how long Postgres may take to count a transaction.
const settle = 2 * time.Second

// transactions counts those in the database while f runs and settle afterwards.
func (b *bench) transactions(ctx context.Context, f func() error) (int, error) {
	const sql = `SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()`
	var before, after int
	if err := b.pool.QueryRow(ctx, sql).Scan(&before); err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	time.Sleep(settle)
	err := b.pool.QueryRow(ctx, sql).Scan(&after)
	return after - before, err
}

// startCold has all gateways fetch path.
func (b *bench) startCold(path string, total *atomic.Int64) (load, error) {
	return b.inParallel(b.starts, b.starts, func(int) (func(int) error, error) {
		return func(int) error {
			g, err := b.download(b.dev.BaseURL, path, "zstd", io.Discard)
			total.Add(g.bytes)
			return err
		}, nil
	})
}

// loopbackCopy is how long n connections at once take to read size bytes each from a
// server that does nothing else.
func loopbackCopy(n int, size int64) (time.Duration, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	block := make([]byte, 256<<10)
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for left := size; left > 0; {
					n, err := c.Write(block[:min(left, int64(len(block)))])
					if err != nil {
						return
					}
					left -= int64(n)
				}
			}()
		}
	}()
	start := time.Now()
	errs := make(chan error, n)
	for range n {
		go func() {
			c, err := net.Dial("tcp", listener.Addr().String())
			if err == nil {
				_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 64<<10))
				_ = c.Close()
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			return 0, err
		}
	}
	return time.Since(start), nil
}

// watchMetric scrapes a metric four times a second and returns its greatest value.
func (b *bench) watchMetric(ctx context.Context, name string) (stop func() float64) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan float64)
	go func() {
		top := 0.0
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			if values, err := b.scrape(ctx); err == nil {
				top = max(top, values[name])
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				done <- top
				return
			}
		}
	}()
	return func() float64 { cancel(); return <-done }
}

// sampled is how many of the readers of a stream look at what they read: the load
// generator shares the machine with what it measures.
const sampled = 20

// stream lets many readers follow the events while revocations arrive at a fixed rate.
func (b *bench) stream(ctx context.Context) error {
	if b.readers == 0 {
		return nil
	}
	const rate = 500
	tokens, err := b.tokens(int(b.propagation.Seconds() * rate))
	if err != nil {
		return err
	}
	sent := make(map[string]time.Time, len(tokens))
	var mu sync.Mutex
	var delays []time.Duration
	var received atomic.Int64
	record := func(jti string) {
		now := time.Now()
		mu.Lock()
		defer mu.Unlock()
		if at, ok := sent[jti]; ok {
			delays = append(delays, now.Sub(at))
		}
	}
	sctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	ready := make(chan error, b.readers)
	for i := range b.readers {
		wg.Go(func() {
			if err := b.readStream(sctx, i < sampled, ready, &received, record); err != nil && sctx.Err() == nil {
				fmt.Fprintf(b.progress, "a reader has ended: %v\n", err)
			}
		})
	}
	for range b.readers {
		if err := <-ready; err != nil {
			return fmt.Errorf("follow /v1/events: %w", err)
		}
	}
	conns := make(chan *conn, b.connections)
	for range cap(conns) {
		c, err := b.dial()
		if err != nil {
			return err
		}
		conns <- c
	}
	before, err := b.scrape(ctx)
	if err != nil {
		return err
	}
	start := time.Now()
	var posts sync.WaitGroup
	var failed atomic.Pointer[error]
	for i, t := range tokens {
		due := start.Add(time.Duration(i) * time.Second / rate)
		select {
		case <-time.After(time.Until(due)):
		case <-ctx.Done():
			return ctx.Err()
		}
		c := <-conns
		posts.Go(func() {
			mu.Lock()
			sent[t.jti] = due // a sender that is late does not hide it
			mu.Unlock()
			if err := c.revoke(t.compact); err != nil {
				failed.Store(&err)
			}
			conns <- c
		})
	}
	posts.Wait()
	took := time.Since(start)
	after, err := b.scrape(ctx)
	if err != nil {
		return err
	}
	if err := failed.Load(); err != nil {
		return *err
	}
	want := len(tokens) * min(sampled, b.readers)
	deadline := time.Now().Add(10 * time.Second)
	for {
		mu.Lock()
		have := len(delays)
		mu.Unlock()
		if have >= want || time.Now().After(deadline) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	stop()
	wg.Wait()
	slices.Sort(delays)
	l := load{latencies: delays}
	b.row(fmt.Sprintf("(7) %.0f events/s to %d SSE readers", float64(len(tokens))/took.Seconds(), b.readers), "p99 "+ms(l.at(0.99)),
		fmt.Sprintf("p50 %s, p99.9 %s from when the request was due, %d of %d arrivals at %d sampled readers; %.0f MB/s in all; service %.2f cores",
			ms(l.at(0.5)), ms(l.at(0.999)), len(delays), want, min(sampled, b.readers), float64(received.Load())/1e6/took.Seconds(),
			(after[metricCPU]-before[metricCPU])/took.Seconds()))
	if len(delays) < want {
		return fmt.Errorf("only %d of %d events reached the readers of the stream", len(delays), want)
	}
	return nil
}

// readStream reports to ready once the stream has begun, then reads until ctx ends.
func (b *bench) readStream(ctx context.Context, parse bool, ready chan<- error, received *atomic.Int64, record func(jti string)) error {
	u, err := url.Parse(b.dev.BaseURL)
	if err != nil {
		ready <- err
		return err
	}
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		ready <- err
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	_, err = fmt.Fprintf(c, "GET /v1/events HTTP/1.1\r\nHost: %s\r\nAccept: text/event-stream\r\nAuthorization: Basic %s\r\n\r\n",
		u.Host, base64.StdEncoding.EncodeToString([]byte(b.dev.GatewayUser+":"+b.dev.GatewayPassword)))
	if err != nil {
		ready <- err
		return err
	}
	r := bufio.NewReaderSize(c, 16<<10)
	status, err := r.ReadString('\n')
	if err == nil && !strings.Contains(status, " 200 ") {
		err = errors.New(strings.TrimSpace(status))
	}
	for err == nil { // the first heartbeat says that it is live
		var line string
		if line, err = r.ReadString('\n'); strings.HasPrefix(line, "event: heartbeat") {
			break
		}
	}
	ready <- err
	if err != nil {
		return err
	}
	if !parse {
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, make([]byte, 16<<10))
		received.Add(n)
		return err
	}
	for {
		line, err := r.ReadSlice('\n')
		received.Add(int64(len(line)))
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
		if _, after, ok := bytes.Cut(line, []byte(`"jti":"`)); ok && bytes.HasPrefix(line, []byte("data:")) {
			jti, _, _ := bytes.Cut(after, []byte(`"`))
			record(string(jti))
		}
	}
}

// catalog applies a large catalog while revocations go on.
func (b *bench) catalog(ctx context.Context) error {
	if b.applications == 0 {
		return nil
	}
	dir, err := os.MkdirTemp("", "rescind-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "catalog.yaml")
	subscriptions, err := writeCatalog(file, b.applications)
	if err != nil {
		return err
	}
	const rate = 500
	tokens, err := b.tokens(rate * 40)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	apply := exec.CommandContext(ctx, self, "apply", "-f", file, "--quiet")
	apply.Env = append(os.Environ(), b.serviceEnviron()...)
	var output bytes.Buffer
	apply.Stdout, apply.Stderr = &output, &output
	start := time.Now()
	if err := apply.Start(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- apply.Wait() }()
	var l load
	var mu sync.Mutex
	var posts sync.WaitGroup
	conns := make(chan *conn, 64)
	for range cap(conns) {
		c, err := b.dial()
		if err != nil {
			return err
		}
		conns <- c
	}
	var failed error
	var took time.Duration
	for i := 0; took == 0; i++ {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("rescind apply: %w\n%s", err, &output)
			}
			took = time.Since(start)
		case <-time.After(time.Until(start.Add(time.Duration(i) * time.Second / rate))):
			c, due := <-conns, time.Now()
			token := tokens[i%len(tokens)].compact
			posts.Go(func() {
				err := c.revoke(token)
				mu.Lock()
				defer mu.Unlock()
				if l.latencies = append(l.latencies, time.Since(due)); err != nil {
					failed = err
				}
				conns <- c
			})
		}
	}
	posts.Wait()
	if failed != nil {
		return failed
	}
	slices.Sort(l.latencies)
	drained, err := b.caughtUp(ctx)
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("(8) apply %d applications, %d subscriptions", b.applications, subscriptions), fmt.Sprintf("%.1f s", took.Seconds()),
		fmt.Sprintf("beside %.0f revocations/s: %s; all delivered %s later", float64(len(l.latencies))/took.Seconds(), l, drained.Round(time.Second)))
	return nil
}

// writeCatalog writes n applications with ten subscriptions each.
func writeCatalog(file string, n int) (subscriptions int, err error) {
	const apis, each = 100, 10
	var w bytes.Buffer
	w.WriteString("key_managers:\n  - name: bench-idp\n    iss: https://idp.bench.example\n    max_token_lifetime: 3600\n    jwks_uri: https://idp.bench.example/jwks\n    enabled: true\n")
	w.WriteString("apis:\n")
	for i := range apis {
		fmt.Fprintf(&w, "  - {name: bench-%03d, version: 1.0.0, context: /bench-%03d/1.0.0, provider: bench, status: PUBLISHED}\n", i, i)
	}
	w.WriteString("applications:\n")
	for i := range n {
		fmt.Fprintf(&w, "  - name: bench-%05d\n    owner: bench\n    keys: [{consumer_key: bench-key-%05d, key_type: PRODUCTION, key_manager: bench-idp}]\n    subscriptions:\n", i, i)
		for j := range each {
			fmt.Fprintf(&w, "      - {api: \"bench-%03d:1.0.0\", policy: Unlimited}\n", (i+j*7)%apis)
		}
	}
	return n * each, os.WriteFile(file, w.Bytes(), 0o600)
}

// serviceEnviron is what another process of the service needs.
func (b *bench) serviceEnviron() []string {
	return []string{
		"RESCIND_DATABASE_URL=" + b.dev.DatabaseURL, "RESCIND_MASTER_KEY=" + b.dev.MasterKey, "RESCIND_ISSUER=" + b.issuer,
		"RESCIND_ETCD_ENDPOINTS=" + strings.Join(b.dev.EtcdEndpoints, ","), "RESCIND_SINKS=none", "RESCIND_LISTEN=127.0.0.1:0", "RESCIND_OPS_LISTEN=127.0.0.1:0", "RESCIND_LOG_FORMAT=json",
	}
}

// startUp measures a second process of the service, then what its snapshots cost.
func (b *bench) startUp(ctx context.Context) error {
	if b.live == 0 {
		return nil
	}
	live, err := b.liveCount(ctx)
	if err != nil {
		return err
	}
	var entities int
	err = b.pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM rescind.applications) + (SELECT count(*) FROM rescind.subscriptions)`).Scan(&entities)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	service := exec.CommandContext(ctx, self, "serve")
	service.Env = append(os.Environ(), b.serviceEnviron()...)
	service.Cancel = func() error { return service.Process.Signal(os.Interrupt) }
	logs, err := service.StderrPipe()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := service.Start(); err != nil {
		return err
	}
	defer func() {
		_ = service.Process.Signal(os.Interrupt)
		_ = service.Wait()
	}()
	var at struct{ Msg, Address, Ops string }
	lines := bufio.NewScanner(logs)
	for at.Msg != "takes requests" {
		if !lines.Scan() {
			return errors.New("a second process of the service did not become ready")
		}
		_ = json.Unmarshal(lines.Bytes(), &at) // other lines are of no interest
	}
	took := time.Since(start)
	go func() { _, _ = io.Copy(io.Discard, logs) }()
	second := *b
	second.dev.OpsURL = "http://" + at.Ops
	values, err := second.scrape(ctx)
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("(9) ready with %d revocations, %d applications and subscriptions", live, entities),
		fmt.Sprintf("%.2f s", took.Seconds()), fmt.Sprintf("%.0f MiB", values[metricRSS]/(1<<20)))
	return second.snapshots(ctx, b, "http://"+at.Address)
}

// snapshots fetches each snapshot, plain and compressed, from a process that has sent none yet.
func (b *bench) snapshots(ctx context.Context, report *bench, base string) error {
	for _, s := range []struct{ path, item string }{
		{"/v1/snapshots/revocations", `"exp"`},
		{"/v1/snapshots/subscriptions", `"state"`},
		{"/v1/snapshots/applications", `"token_type"`},
		{"/v1/snapshots/key-mappings", `"consumer_key"`},
		{"/v1/snapshots/apis", `"context"`},
		{"/v1/snapshots/all", `"tenant"`},
		{"/internal/data/v1/revokedjwt", `"jwt_signature"`},
		{"/internal/data/v1/subscriptions", `"subscriptionState"`},
	} {
		for _, coding := range []string{"identity", "zstd"} {
			counted := &counter{word: []byte(s.item)}
			g, err := b.download(base, s.path, coding, counted)
			if err != nil {
				return err
			}
			if coding == "identity" && counted.n == 0 {
				return fmt.Errorf("GET %s has no items", s.path)
			}
			if coding == "zstd" && strings.HasPrefix(s.path, "/internal") {
				continue // has no zstd
			}
			baseline, err := loopbackCopy(1, g.bytes)
			if err != nil {
				return err
			}
			n := counted.n
			if coding == "zstd" {
				n = b.items[s.path]
			} else {
				if b.items == nil {
					b.items = make(map[string]int)
				}
				b.items[s.path] = n
			}
			report.row(fmt.Sprintf("(10) %s, %s", s.path, coding), fmt.Sprintf("%.0f ms", g.last.Seconds()*1000),
				fmt.Sprintf("first byte %.0f ms, %d entries, %.1f MB, %.1f bytes an entry; %.1f x copying the bytes over loopback",
					g.first.Seconds()*1000, n, float64(g.bytes)/1e6, float64(g.bytes)/float64(max(1, n)), g.last.Seconds()/baseline.Seconds()))
		}
	}
	values, err := b.scrape(ctx)
	if err != nil {
		return err
	}
	report.row("     memory of that process after all of them", fmt.Sprintf("%.0f MiB", values[metricRSS]/(1<<20)), "")
	return nil
}

// counter counts a word in what is written to it.
type counter struct {
	word []byte
	n    int
	tail []byte
}

func (c *counter) Write(p []byte) (int, error) {
	// A word that is cut in two lies in the end of one part and the begin of the next.
	c.tail = append(c.tail, p[:min(len(p), len(c.word)-1)]...)
	c.n += bytes.Count(c.tail, c.word) + bytes.Count(p, c.word)
	c.tail = append(c.tail[:0], p[max(0, len(p)-len(c.word)+1):]...)
	return len(p), nil
}
