package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	amqp "github.com/rabbitmq/amqp091-go"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

const benchUsage = `Bench measures a running rescind-dev, with load generator and servers on this machine.

	rescind bench [flags]

It revokes real tokens of the demo client, and makes a tenant that stays: use a data
folder that you can throw away.

`

var benchSinks = []string{"amqp", "amqp-wso2", "etcd"}

type bench struct {
	devJSON            string
	connections        int
	requests           int
	sustain            time.Duration
	propagation        time.Duration
	rate               int
	live               int
	starts, startsLive int
	readers            int
	applications       int
	distinct           int // clients of /revoke
	gatewayCount       int
	only               []string // numbers of measurements; empty for all
	out                io.Writer
	progress           io.Writer

	dev       devStack
	issuer    string
	pool      *pgxpool.Pool
	base      float64 // of baseline A, a second
	withSinks float64 // of /revoke with all sinks on
	table     [][3]string
	items     map[string]int // of each snapshot
}

func runBench(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	b := bench{out: stdout, progress: stderr}
	flags := flag.NewFlagSet("rescind bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { fmt.Fprint(stderr, benchUsage); flags.PrintDefaults() }
	flags.StringVar(&b.devJSON, "dev-json", defaultDevJSON, "the `file` that rescind-dev writes when it is ready")
	flags.IntVar(&b.connections, "connections", 64, "HTTP connections of the load")
	flags.IntVar(&b.requests, "requests", 40000, "requests of each load with sinks stopped and on")
	flags.DurationVar(&b.sustain, "sustain", 30*time.Second, "length of the sustained load; 0 leaves it out")
	flags.DurationVar(&b.propagation, "propagation", 20*time.Second, "length of the propagation run; 0 leaves it out")
	flags.IntVar(&b.rate, "rate", 200, "revocations a second of the propagation run")
	flags.IntVar(&b.live, "live", 1_000_000, "live revocations of the memory, start-up and snapshot measurements; 0 leaves them out")
	flags.IntVar(&b.starts, "cold-starts", 1000, "gateways that fetch a snapshot at once; 0 leaves it out")
	flags.IntVar(&b.startsLive, "cold-start-live", 100_000, "live revocations of that snapshot")
	flags.IntVar(&b.readers, "readers", 1000, "readers of /v1/events while events arrive; 0 leaves it out")
	flags.IntVar(&b.applications, "applications", 10_000, "applications that are applied, with ten subscriptions each; 0 leaves it out")
	flags.IntVar(&b.distinct, "clients", 10_000, "clients that take turns at /revoke, against one; 0 leaves it out")
	flags.IntVar(&b.gatewayCount, "gateways", 1000, "gateways that report; 0 leaves it out. Each takes two connections: see RESCIND_MAX_CONNECTIONS of rescind-dev")
	only := flags.String("only", "", "the measurements to make, for example 6,7; by default all")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0 || b.connections < 1 || b.requests < b.connections || b.rate < 1:
		flags.Usage()
		return 2
	}
	if *only != "" {
		b.only = strings.Split(*only, ",")
	}
	if err := b.run(ctx); err != nil {
		fmt.Fprintf(stderr, "rescind bench: %v\n", err)
		return 1
	}
	return 0
}

func (b *bench) run(ctx context.Context) error {
	var err error
	if b.dev, err = readDevStack(b.devJSON); err != nil {
		return err
	}
	cfg, err := pgxpool.ParseConfig(b.dev.DatabaseURL)
	if err != nil {
		return err
	}
	cfg.MaxConns = 32
	ledger.Session(cfg)
	if b.pool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		return err
	}
	defer b.pool.Close()
	err = b.pool.QueryRow(ctx, `SELECT iss FROM rescind.key_managers WHERE tenant_id = $1 AND resident`, revocation.SuperTenant.ID).Scan(&b.issuer)
	if err != nil {
		return fmt.Errorf("find the issuer: %w", err)
	}
	for _, step := range []struct {
		numbers string
		run     func(context.Context) error
	}{
		{"6", b.coldStarts}, {"7", b.stream}, {"1", b.baseline}, {"2", b.revoke}, {"4", b.propagate}, {"3", b.sustained},
		{"14", b.gateways}, {"15", b.fleet}, {"11", b.minting}, {"12", b.introspect}, {"13", b.revokeByMany}, {"5", b.memory}, {"8", b.catalog}, {"9", b.startUp},
	} {
		if len(b.only) > 0 && !slices.Contains(b.only, step.numbers) {
			continue
		}
		if err := step.run(ctx); err != nil {
			return err
		}
	}
	fmt.Fprintf(b.out, "%d CPUs, %s, Postgres, RabbitMQ, etcd, service and load generator on one machine\n", runtime.NumCPU(), runtime.Version())
	w := tabwriter.NewWriter(b.out, 0, 0, 2, ' ', 0)
	for _, row := range b.table {
		fmt.Fprintf(w, "%s\t%s\t%s\n", row[0], row[1], row[2])
	}
	return w.Flush()
}

func (b *bench) row(what, result, detail string) {
	b.table = append(b.table, [3]string{what, result, detail})
	fmt.Fprintf(b.progress, "%s: %s %s\n", what, result, detail)
}

// load is what one run of requests measured.
type load struct {
	rate      float64
	latencies []time.Duration // sorted
}

func (l load) at(q float64) time.Duration {
	if len(l.latencies) == 0 {
		return 0
	}
	return l.latencies[min(len(l.latencies)-1, int(q*float64(len(l.latencies))))]
}

func (l load) String() string {
	return fmt.Sprintf("p50 %s, p99 %s, p99.9 %s", ms(l.at(0.5)), ms(l.at(0.99)), ms(l.at(0.999)))
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000) }

// baseline is what one would write first: a transaction for each revocation, with
// an outbox row, from 32 connections.
func (b *bench) baseline(ctx context.Context) error {
	_, err := b.pool.Exec(ctx, `
		CREATE SCHEMA IF NOT EXISTS rescind_bench;
		CREATE TABLE IF NOT EXISTS rescind_bench.revocations (id uuid PRIMARY KEY, iss text NOT NULL, jti text NOT NULL,
			exp bigint NOT NULL, revoked_at timestamptz NOT NULL, UNIQUE (iss, jti));
		CREATE TABLE IF NOT EXISTS rescind_bench.outbox (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, data text NOT NULL);
		TRUNCATE rescind_bench.revocations, rescind_bench.outbox`)
	if err != nil {
		return fmt.Errorf("make the baseline's tables: %w", err)
	}
	defer b.pool.Exec(context.WithoutCancel(ctx), `DROP SCHEMA rescind_bench CASCADE`) //nolint:errcheck // scratch
	data := strings.Repeat("x", 400)
	exp := time.Now().Add(time.Hour).Unix()
	one := func() error {
		return pgx.BeginFunc(ctx, b.pool, func(tx pgx.Tx) error {
			jti := uuid.NewString()
			if _, err := tx.Exec(ctx, `INSERT INTO rescind_bench.revocations VALUES ($1, $2, $3, $4, now())`, jti, "https://km.example.com", jti, exp); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `INSERT INTO rescind_bench.outbox (data) VALUES ($1)`, data)
			return err
		})
	}
	l, err := b.inParallel(32, b.requests, func(int) (func(int) error, error) { return func(int) error { return one() }, nil })
	if err != nil {
		return err
	}
	b.base = l.rate
	b.row("(1) baseline A, 32 connections", fmt.Sprintf("%.0f/s", l.rate), l.String())
	return nil
}

// inParallel calls a function of each of n workers, total times in all.
func (b *bench) inParallel(n, total int, worker func(int) (func(int) error, error)) (load, error) {
	var (
		next  atomic.Int64
		mu    sync.Mutex
		l     load
		errs  []error
		wg    sync.WaitGroup
		calls = make([]func(int) error, n)
	)
	for i := range calls {
		var err error
		if calls[i], err = worker(i); err != nil {
			return l, err
		}
	}
	start := time.Now()
	for _, call := range calls {
		wg.Go(func() {
			var mine []time.Duration
			var err error
			for err == nil {
				i := int(next.Add(1)) - 1
				if i >= total {
					break
				}
				sent := time.Now()
				err = call(i)
				mine = append(mine, time.Since(sent))
			}
			mu.Lock()
			defer mu.Unlock()
			l.latencies = append(l.latencies, mine...)
			errs = append(errs, err)
		})
	}
	wg.Wait()
	l.rate = float64(len(l.latencies)) / time.Since(start).Seconds()
	slices.Sort(l.latencies)
	return l, errors.Join(errs...)
}

// revoke loads /revoke with the sinks stopped, then with all of them on.
func (b *bench) revoke(ctx context.Context) error {
	release, err := b.stopSinks(ctx)
	if err != nil {
		return fmt.Errorf("stop the sinks: %w", err)
	}
	l, err := b.loadRevoke(b.requests)
	release()
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("(2) /revoke, %d connections, sinks stopped", b.connections),
		fmt.Sprintf("%.0f/s = %.2f x A", l.rate, l.rate/b.base), l.String())
	if _, err := b.caughtUp(ctx); err != nil {
		return err
	}
	if l, err = b.loadRevoke(b.requests); err != nil {
		return err
	}
	b.withSinks = l.rate
	b.row(fmt.Sprintf("(2) /revoke, %d connections, sinks on", b.connections),
		fmt.Sprintf("%.0f/s = %.2f x A", l.rate, l.rate/b.base), l.String())
	_, err = b.caughtUp(ctx)
	return err
}

// stopSinks takes the sinks' locks from the service, as another process would, until release.
func (b *bench) stopSinks(ctx context.Context) (release func(), err error) {
	l, err := b.ledger()
	if err != nil {
		return nil, err
	}
	var leads []*ledger.Lead
	release = func() {
		for _, lead := range leads {
			lead.Release()
		}
	}
	for _, sink := range benchSinks {
		got := make(chan error, 1)
		go func() {
			lead, err := l.Lead(ctx, sink)
			if err == nil {
				leads = append(leads, lead)
			}
			got <- err
		}()
		for waiting := true; waiting; {
			// Whoever holds the lock before us loses its connection.
			_, err := b.pool.Exec(ctx, `
				SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid
				WHERE a.application_name = $1 AND a.datname = current_database() AND l.locktype = 'advisory' AND l.granted
					AND a.usename <> current_user`, "rescind sink "+sink)
			if err != nil {
				release()
				return nil, err
			}
			select {
			case err = <-got:
				waiting = false
			case <-time.After(50 * time.Millisecond):
			}
			if err != nil {
				release()
				return nil, err
			}
		}
	}
	return release, nil
}

func (b *bench) ledger() (*ledger.Ledger, error) {
	return ledger.New(ledger.Config{Source: b.issuer, MaxBatch: 2000, QueueSize: 10000}, b.pool, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
}

// loadRevoke revokes n new tokens from all connections, as fast as they are answered.
func (b *bench) loadRevoke(n int) (load, error) {
	return b.loadRevokeOf(n, b.demoClient)
}

// loadRevokeOf is loadRevoke by the clients with these Authorization values.
func (b *bench) loadRevokeOf(n int, auth func(i int) string) (load, error) {
	tokens, err := b.tokensOf(n, auth)
	if err != nil {
		return load{}, err
	}
	return b.inParallel(b.connections, n, func(int) (func(int) error, error) {
		c, err := b.dial()
		if err != nil {
			return nil, err
		}
		return func(i int) error {
			c.auth = auth(i)
			return c.revoke(tokens[i].compact)
		}, nil
	})
}

func (b *bench) demoClient(int) string { return basic(b.dev.ClientID, b.dev.ClientSecret) }

// conn is one HTTP/1.1 connection of the load. A generator that shares two cores
// with what it measures must cost little.
type conn struct {
	net  net.Conn
	read *bufio.Reader
	host string
	auth string // of the next request
	buf  []byte
}

func (b *bench) dial() (*conn, error) {
	u, err := url.Parse(b.dev.BaseURL)
	if err != nil {
		return nil, err
	}
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		return nil, err
	}
	return &conn{net: c, read: bufio.NewReader(c), host: u.Host, auth: b.demoClient(0)}, nil
}

func (c *conn) revoke(token string) error {
	_, err := c.post("/revoke", "token="+token)
	return err
}

// post sends a form and returns the body of the answer, which must be 200.
func (c *conn) post(path, form string) ([]byte, error) {
	status, body, err := c.send(path, form)
	if err == nil && !strings.HasPrefix(status, "200") {
		err = fmt.Errorf("POST %s: %s: %s", path, status, body)
	}
	return body, err
}

// send sends a form and returns the answer.
func (c *conn) send(path, form string) (status string, body []byte, err error) {
	c.buf = fmt.Appendf(c.buf[:0], "POST %s HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n\r\n%s",
		path, c.host, c.auth, len(form), form)
	if _, err := c.net.Write(c.buf); err != nil {
		return "", nil, err
	}
	length := 0
	for first := true; ; first = false {
		line, err := c.read.ReadSlice('\n')
		if err != nil {
			return "", nil, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if first {
			status = strings.TrimPrefix(string(line), "HTTP/1.1 ")
		}
		if len(line) == 0 {
			break
		}
		if v, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			if length, err = strconv.Atoi(string(v)); err != nil {
				return "", nil, err
			}
		}
	}
	body = make([]byte, length)
	_, err = io.ReadFull(c.read, body)
	return status, body, err
}

// scrape reads the operators' listener.
func (b *bench) scrape(ctx context.Context) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.dev.OpsURL+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	values := make(map[string]float64)
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseFloat(value, 64); ok && err == nil {
			values[name] = v
		}
	}
	return values, lines.Err()
}

// lag returns how many events each sink has still to get.
func (b *bench) lag(ctx context.Context) (map[string]int64, error) {
	rows, err := b.pool.Query(ctx, `SELECT c.sink, h.seq - c.seq FROM rescind.sink_cursors c, rescind.log_head h WHERE c.sink = ANY ($1)`, benchSinks)
	if err != nil {
		return nil, err
	}
	lag := make(map[string]int64)
	var sink string
	var n int64
	_, err = pgx.ForEachRow(rows, []any{&sink, &n}, func() error { lag[sink] = n; return nil })
	return lag, err
}

func lagString(lag map[string]int64) string {
	var parts []string
	for _, sink := range benchSinks {
		parts = append(parts, fmt.Sprintf("%s %d", sink, lag[sink]))
	}
	return strings.Join(parts, ", ")
}

// caughtUp waits until every sink has every event.
func (b *bench) caughtUp(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	start := time.Now()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		lag, err := b.lag(ctx)
		if err != nil {
			return 0, err
		}
		behind := int64(0)
		for _, n := range lag {
			behind += n
		}
		if behind == 0 && len(lag) == len(benchSinks) {
			return time.Since(start), nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, fmt.Errorf("the sinks did not catch up, events behind: %s", lagString(lag))
		}
	}
}

// sustained loads for a while and looks at how far the sinks fall behind.
func (b *bench) sustained(ctx context.Context) error {
	if b.sustain == 0 {
		return nil
	}
	tokens, err := b.tokens(int(b.sustain.Seconds() * b.withSinks * 1.5))
	if err != nil {
		return err
	}
	deadline := time.Now().Add(b.sustain)
	var done atomic.Int64
	var worst map[string]int64
	watching, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		worst = make(map[string]int64)
		for {
			select {
			case <-tick.C:
			case <-watching.Done():
				return
			}
			lag, err := b.lag(watching)
			if err != nil {
				continue
			}
			for sink, n := range lag {
				worst[sink] = max(worst[sink], n)
			}
		}
	}()
	l, err := b.inParallel(b.connections, len(tokens), func(int) (func(int) error, error) {
		c, err := b.dial()
		if err != nil {
			return nil, err
		}
		return func(i int) error {
			if time.Now().After(deadline) {
				return errEnough
			}
			defer done.Add(1)
			return c.revoke(tokens[i].compact)
		}, nil
	})
	elapsed := b.sustain - max(0, time.Until(deadline))
	stop()
	<-watched
	if err != nil && !isEnough(err) {
		return err
	}
	atEnd, err := b.lag(ctx)
	if err != nil {
		return err
	}
	drained, err := b.caughtUp(ctx)
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("(3) end to end, %s, three sinks", elapsed.Round(time.Second)),
		fmt.Sprintf("%.0f/s", float64(done.Load())/elapsed.Seconds()), l.String())
	b.row("    events behind at the end of the load", lagString(atEnd), fmt.Sprintf("all delivered %s later; worst seen: %s", drained.Round(time.Millisecond), lagString(worst)))
	return nil
}

var errEnough = errors.New("the time is over")

func isEnough(err error) bool {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return errors.Is(err, errEnough)
	}
	for _, e := range joined.Unwrap() {
		if !errors.Is(e, errEnough) {
			return false
		}
	}
	return true
}

// propagate measures from sending a request to its event in a consumer's hands.
func (b *bench) propagate(ctx context.Context) error {
	if b.propagation == 0 {
		return nil
	}
	tokens, err := b.tokens(int(b.propagation.Seconds() * float64(b.rate)))
	if err != nil {
		return err
	}
	sent := make(map[string]time.Time, len(tokens))
	var mu sync.Mutex
	arrivals := func() (record func(jti string), wait func(context.Context) (load, error)) {
		var l load
		all := make(chan struct{})
		record = func(jti string) {
			now := time.Now()
			mu.Lock()
			defer mu.Unlock()
			if at, ok := sent[jti]; ok {
				if l.latencies = append(l.latencies, now.Sub(at)); len(l.latencies) == len(tokens) {
					close(all)
				}
			}
		}
		wait = func(ctx context.Context) (load, error) {
			select {
			case <-all:
			case <-ctx.Done():
				mu.Lock()
				defer mu.Unlock()
				return l, fmt.Errorf("only %d of %d events arrived", len(l.latencies), len(tokens))
			}
			slices.Sort(l.latencies)
			return l, nil
		}
		return record, wait
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	amqpRecord, amqpWait := arrivals()
	if err := b.consume(ctx, amqpRecord); err != nil {
		return fmt.Errorf("consume from RabbitMQ: %w", err)
	}
	etcdRecord, etcdWait := arrivals()
	if err := b.watch(ctx, etcdRecord); err != nil {
		return fmt.Errorf("watch etcd: %w", err)
	}
	conns := make(chan *conn, 16)
	for range cap(conns) {
		c, err := b.dial()
		if err != nil {
			return err
		}
		conns <- c
	}
	start := time.Now()
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	for i, t := range tokens {
		due := start.Add(time.Duration(i) * time.Second / time.Duration(b.rate))
		select {
		case <-time.After(time.Until(due)):
		case <-ctx.Done():
			return ctx.Err()
		}
		c := <-conns
		wg.Go(func() {
			mu.Lock()
			sent[t.jti] = time.Now()
			mu.Unlock()
			if err := c.revoke(t.compact); err != nil {
				failed.Store(&err)
			}
			conns <- c
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	wctx, wcancel := context.WithTimeout(ctx, 10*time.Second)
	defer wcancel()
	for _, far := range []struct {
		name string
		wait func(context.Context) (load, error)
	}{{"AMQP consumer", amqpWait}, {"etcd watcher", etcdWait}} {
		l, err := far.wait(wctx)
		if err != nil {
			return fmt.Errorf("%s: %w", far.name, err)
		}
		b.row(fmt.Sprintf("(4) request to %s, %d/s", far.name, b.rate), "p50 "+ms(l.at(0.5)),
			fmt.Sprintf("p99 %s, p99.9 %s", ms(l.at(0.99)), ms(l.at(0.999))))
	}
	return nil
}

func (b *bench) consume(ctx context.Context, record func(string)) error {
	broker, err := amqp.Dial(b.dev.AMQPURL)
	if err != nil {
		return errors.New("cannot log in with dev.json's amqp_url")
	}
	context.AfterFunc(ctx, func() { _ = broker.Close() })
	ch, err := broker.Channel()
	if err != nil {
		return err
	}
	q, err := ch.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		return err
	}
	if err := ch.QueueBind(q.Name, "revocation.#", "rescind.events", false, nil); err != nil {
		return err
	}
	messages, err := ch.Consume(q.Name, "", true, true, false, false, nil)
	if err != nil {
		return err
	}
	go func() {
		for m := range messages {
			if e, err := revocation.ParseEvent(m.Body); err == nil {
				record(e.Subject)
			}
		}
	}()
	return nil
}

func (b *bench) watch(ctx context.Context, record func(string)) error {
	client, err := clientv3.New(clientv3.Config{Endpoints: b.dev.EtcdEndpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = client.Close() })
	events := client.Watch(ctx, "/jti/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created, ok := <-events; !ok || created.Err() != nil {
		return cmp.Or(created.Err(), errors.New("the watch has ended"))
	}
	go func() {
		for answer := range events {
			for _, e := range answer.Events {
				record(strings.TrimPrefix(string(e.Kv.Key), "/jti/"))
			}
		}
	}()
	return nil
}

// memory fills the log up to so many live revocations, lets the sinks have them,
// and asks how much memory the service takes.
func (b *bench) memory(ctx context.Context) error {
	if b.live == 0 {
		return nil
	}
	before, err := b.scrape(ctx)
	if err != nil {
		return err
	}
	filled, drained, err := b.fill(ctx, b.live)
	if err != nil {
		return err
	}
	after, err := b.scrape(ctx)
	if err != nil {
		return err
	}
	b.row(fmt.Sprintf("(5) memory of the service, %d live revocations", b.live), fmt.Sprintf("%.0f MiB", after[metricRSS]/(1<<20)),
		fmt.Sprintf("%.0f MiB before; committed at %.0f/s, delivered %s later", before[metricRSS]/(1<<20), filled.rate, drained.Round(time.Second)))
	return nil
}

// benchToken is a token and its jti.
type benchToken struct{ compact, jti string }

// tokens gets n new tokens of the demo client from the service.
func (b *bench) tokens(n int) ([]benchToken, error) { return b.tokensOf(n, b.demoClient) }

// tokensOf is tokens by the clients with these Authorization values.
func (b *bench) tokensOf(n int, auth func(i int) string) ([]benchToken, error) {
	fmt.Fprintf(b.progress, "getting %d tokens ...", n)
	tokens := make([]benchToken, n)
	l, err := b.inParallel(32, n, func(int) (func(int) error, error) {
		c, err := b.dial()
		if err != nil {
			return nil, err
		}
		return func(i int) (err error) {
			c.auth = auth(i)
			tokens[i], err = c.token("/oauth2/token")
			return err
		}, nil
	})
	fmt.Fprintf(b.progress, " at %.0f/s\n", l.rate)
	return tokens, err
}

func (c *conn) token(path string) (benchToken, error) {
	body, err := c.post(path, "grant_type=client_credentials")
	if err != nil {
		return benchToken{}, err
	}
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return benchToken{}, fmt.Errorf("read the answer of the token endpoint: %w", err)
	}
	var claims struct {
		JTI string `json:"jti"`
	}
	if parts := strings.Split(answer.AccessToken, "."); len(parts) == 3 {
		payload, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err == nil {
			err = json.Unmarshal(payload, &claims)
		}
		if err != nil {
			return benchToken{}, fmt.Errorf("read the claims of a token: %w", err)
		}
	}
	return benchToken{answer.AccessToken, claims.JTI}, nil
}
