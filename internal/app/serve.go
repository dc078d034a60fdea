// Package app makes one process of the parts: it reads settings, wires ledger,
// relay, sinks, token service and listeners, and owns the order in which they
// start and stop. Apart from the commands it is the only place that sees both a
// sink and the ledger.
package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/canary"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/process"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/sink"
)

// Addresses are where the process listens.
type Addresses struct {
	HTTP, Ops string
}

// The names of the sinks: their cursors and locks go by them.
const (
	sinkAMQP       = "amqp"
	sinkAMQPWSO2   = "amqp-wso2"
	sinkAMQPLegacy = "amqp-wso2-legacy"
	sinkEtcd       = "etcd"
)

// lagWarning is how long an event may wait for a sink before /readyz warns.
const lagWarning = 10 * time.Second

// Serve runs the service until ctx ends and stops it in good order: what was
// accepted is committed and answered. It calls ready once it takes requests. It
// returns an error if it cannot start, or if going on would be wrong.
func Serve(ctx context.Context, cfg Config, log *slog.Logger, ready func(Addresses)) error {
	tuning, stopTuning := context.WithCancel(ctx)
	defer stopTuning()
	go tuneGC(tuning)
	reg := obs.NewRegistry()
	pool, err := openPool(ctx, cfg.Database)
	if err != nil {
		return err
	}
	defer pool.Close()
	if err := checkSchema(ctx, pool, log); err != nil {
		return err
	}
	ledgers, err := newLedger(cfg, pool, reg, log)
	if err != nil {
		return err
	}
	state, err := follow.New(follow.Config{History: history}, stateSource{ledgers}, reg, log)
	if err != nil {
		return err
	}
	sinks, etcd, err := newSinks(cfg, ledgers, state, log)
	if err != nil {
		return err
	}
	if _, err := ledgers.Start(ctx, published(ctx, etcd, log)); err != nil {
		return err
	}
	// Before the first request: every event is for every sink.
	names := make([]string, len(sinks))
	for i, s := range sinks {
		names[i] = s.Name
	}
	if err := ledgers.EnsureCursors(ctx, names); err != nil {
		return err
	}
	warnOfStrangers(ctx, ledgers, names, log)
	if cfg.HTTP.BehindTLSProxy && len(cfg.HTTP.TrustedProxies) == 0 {
		log.Warn("all callers seem to come from the proxy's address, so one who guesses secrets slows down all: " +
			"name the proxy in RESCIND_TRUSTED_PROXIES")
	}
	feeds, err := relay.New(relay.Config{Source: cfg.Issuer}, relayLog{ledgers}, sinks, reg, log)
	if err != nil {
		return err
	}
	public, err := newPublic(ctx, cfg, pool, ledgers, state, reg, log)
	if err != nil {
		return err
	}

	ops, err := listen(cfg.OpsListen, "RESCIND_OPS_LISTEN")
	if err != nil {
		return err
	}
	defer ops.Close()
	listener, err := listen(cfg.HTTP.Listen, "RESCIND_LISTEN")
	if err != nil {
		return err
	}
	defer listener.Close()
	server, publicListener, err := newServer(cfg, public.handler, listener, reg, log)
	if err != nil {
		return err
	}
	readiness := &obs.Readiness{Checks: append(readinessChecks(pool, feeds, state, etcd), fleetChecks(cfg, public.fleet)...)}
	opsServer := &http.Server{
		Handler: obs.Handler(cfg.Obs, reg, readiness), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(log.With("component", "ops").Handler(), slog.LevelWarn),
	}
	grace := cfg.ShutdownGrace
	parts := []process.Part{
		{Name: "operators' listener", Grace: grace, Run: func(ctx context.Context) error { return process.ServeHTTP(ctx, opsServer, ops, time.Second, log) }},
		{Name: "ledger", Grace: cfg.CommitTimeout + grace, Run: ledgers.Run},
		{Name: "replica", Grace: grace, Run: state.Run},
		{Name: "issuers", Grace: grace, Run: func(ctx context.Context) error { return public.issuers.run(ctx, state) }},
		{Name: "callers", Grace: grace, Run: public.forget},
		{Name: "catalog", Grace: grace, Run: public.announce},
		{Name: "fleet", Grace: grace, Run: public.fleet.Run},
		{Name: "relay", Grace: grace, Run: feeds.Run},
		{Name: "listener", Grace: 2 * grace, Run: func(ctx context.Context) error {
			stopDrain := context.AfterFunc(ctx, func() {
				readiness.Drain()
				public.drain()
			})
			defer stopDrain()
			return process.ServeHTTP(ctx, server, publicListener, grace, log)
		}},
	}
	if public.canary != nil {
		parts = append(parts, process.Part{Name: "canary", Grace: grace, Run: public.canary.Run})
	}
	at := Addresses{HTTP: listener.Addr().String(), Ops: ops.Addr().String()}
	log.Info("takes requests", "address", at.HTTP, "ops", at.Ops, "sinks", names)
	if ready != nil {
		ready(at)
	}
	if err := process.Run(ctx, parts); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

// warnOfStrangers names sinks that the log keeps its events for and that this process
// does not feed.
func warnOfStrangers(ctx context.Context, l *ledger.Ledger, own []string, log *slog.Logger) {
	cursors, err := l.Cursors(ctx)
	if err != nil {
		return // the next use of the database tells
	}
	for name, seq := range cursors {
		if !slices.Contains(own, name) {
			log.Warn("the log keeps everything since for a sink that this process does not feed; "+
				"if no process does, the owner of the schema can delete it from rescind.sink_cursors", "sink", name, "seq", seq)
		}
	}
}

func listen(address, setting string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen as %s says: %w; free the port or choose another", setting, err)
	}
	return l, nil
}

// openPool does not connect yet.
func openPool(ctx context.Context, db Database) (*pgxpool.Pool, error) {
	cfg, err := pgxpool.ParseConfig(string(db.URL))
	if err != nil {
		return nil, errors.New("RESCIND_DATABASE_URL cannot be read as a connection string")
	}
	cfg.MaxConns = int32(db.MaxConns)
	cfg.ConnConfig.ConnectTimeout = 5 * time.Second
	ledger.Session(cfg)
	if err := db.secure(cfg.ConnConfig); err != nil {
		return nil, err
	}
	return pgxpool.NewWithConfig(ctx, cfg)
}

func newLedger(cfg Config, pool *pgxpool.Pool, reg prometheus.Registerer, log *slog.Logger) (*ledger.Ledger, error) {
	return ledger.New(ledger.Config{
		MaxBatch: cfg.MaxBatch, QueueSize: cfg.QueueSize, CommitTimeout: cfg.CommitTimeout, ClockSkew: orNone(cfg.ClockSkew),
		LogRetention: cfg.LogRetention, Source: cfg.Issuer,
	}, pool, reg, log)
}

// newSinks makes the sinks that cfg names; etcd is also returned by itself, nil if
// it is not among them.
func newSinks(cfg Config, l *ledger.Ledger, state *follow.Follower, log *slog.Logger) (named []relay.Named, etcd *sink.Etcd, err error) {
	amqpTLS, err := cfg.AMQP.TLS.Client()
	if err != nil {
		return nil, nil, fmt.Errorf("read the TLS files of RabbitMQ: %w", err)
	}
	broker := sink.AMQPBroker{URL: string(cfg.AMQP.URL), TLS: amqpTLS, Window: cfg.AMQP.Window}
	for _, name := range cfg.Sinks {
		var s relay.Sink
		switch name {
		case sinkAMQP:
			s, err = sink.NewAMQP(sink.AMQPConfig{AMQPBroker: broker, Name: name, Exchange: cfg.AMQP.Exchange})
		case sinkAMQPWSO2:
			s, err = sink.NewAMQPWSO2(sink.AMQPWSO2Config{
				AMQPBroker: broker, Name: name, Exchange: cfg.AMQP.WSO2Exchange, RoutingKey: cfg.AMQP.WSO2RoutingKey,
				MinSpacing: cfg.AMQP.WSO2MinSpacing, SweepEvery: cfg.AMQP.WSO2Sweep, Live: liveTokens(state), Log: log,
			})
		case sinkAMQPLegacy:
			s, err = sink.NewAMQPLegacy(sink.AMQPLegacyConfig{
				AMQPBroker: broker, Name: name, Exchange: cfg.AMQP.WSO2Exchange, RoutingKey: cfg.AMQP.WSO2LegacyRoutingKey,
				NotificationKey: cfg.AMQP.WSO2LegacyNotificationKey, KeyManagerKey: cfg.AMQP.WSO2LegacyKeyManagerKey,
			})
		case sinkEtcd:
			etcd, err = newEtcd(cfg, l, log)
			s = etcd
		default:
			err = fmt.Errorf("there is no sink %q", name)
		}
		if err != nil {
			return nil, nil, err
		}
		named = append(named, relay.Named{Name: name, Sink: s})
	}
	for _, hook := range cfg.Webhooks {
		s, err := newWebhook(hook)
		if err != nil {
			return nil, nil, err
		}
		named = append(named, relay.Named{Name: hook.sink(), Sink: s})
	}
	return named, etcd, nil
}

func newEtcd(cfg Config, state *ledger.Ledger, log *slog.Logger) (*sink.Etcd, error) {
	etcdTLS, err := cfg.Etcd.TLS.Client()
	if err != nil {
		return nil, fmt.Errorf("read the TLS files of etcd: %w", err)
	}
	return sink.NewEtcd(sink.EtcdConfig{
		Endpoints: cfg.Etcd.Endpoints, TLS: etcdTLS, Username: cfg.Etcd.Username, Password: string(cfg.Etcd.Password),
		Prefix: cfg.Etcd.Prefix, Source: cfg.Issuer, ReconcileEvery: cfg.Etcd.ReconcileInterval,
	}, state, log)
}

// published asks etcd how far the log was once published, nil if that is not known.
func published(ctx context.Context, etcd *sink.Etcd, log *slog.Logger) *revocation.Position {
	if etcd == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	p, err := etcd.Stream(ctx)
	if err != nil {
		log.Warn("etcd cannot be asked how far the log was published", "error", err)
		return nil
	}
	if p.Epoch == "" {
		return nil
	}
	return &p
}

// relayLog is the ledger as the relay sees it.
type relayLog struct{ *ledger.Ledger }

func (l relayLog) Lead(ctx context.Context, sink string) (relay.Lead, error) {
	return l.Ledger.Lead(ctx, sink)
}

// replicaPatience is how far behind the replica may be before /readyz warns: snapshots
// are refused by then.
const replicaPatience = 5 * time.Second

func readinessChecks(pool *pgxpool.Pool, feeds *relay.Relay, state *follow.Follower, etcd *sink.Etcd) []obs.Check {
	checks := []obs.Check{{Name: "postgres", Vital: true, Run: func(ctx context.Context) (obs.Status, string) {
		if err := pool.Ping(ctx); err != nil {
			return obs.Fail, "does not answer: revocations are refused with 503"
		}
		return obs.Pass, ""
	}}, {Name: "replica", Run: func(ctx context.Context) (obs.Status, string) {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if _, err := state.Fresh(ctx, replicaPatience); err != nil {
			return obs.Warn, fmt.Sprintf("at seq %d, and not known to be at the log's head: snapshots are refused with 503", state.Replica().At().Seq)
		}
		return obs.Pass, ""
	}}}
	for i, s := range feeds.Status() {
		checks = append(checks, obs.Check{Name: "sink " + s.Name, Run: func(context.Context) (obs.Status, string) {
			return sinkStatus(feeds.Status()[i])
		}})
	}
	if etcd != nil {
		checks = append(checks, obs.Check{Name: "etcd", Run: func(ctx context.Context) (obs.Status, string) {
			if err := etcd.Check(ctx); err != nil {
				return obs.Warn, err.Error() // names no host
			}
			return obs.Pass, ""
		}})
	}
	return checks
}

// fleetChecks are about gateways. None is vital: this process does what it can.
func fleetChecks(cfg Config, f *fleet.Fleet) []obs.Check {
	checks := []obs.Check{{Name: "gateways", Run: func(context.Context) (obs.Status, string) {
		var lost, diverged []string
		all := f.Here() // others warn of theirs
		for _, g := range all {
			if g.Standing == fleet.Lost {
				lost = append(lost, g.ID)
			}
			if g.Comparison.Verdict == fleet.Diverged {
				diverged = append(diverged, g.ID)
			}
		}
		switch {
		case len(diverged) > 0:
			return obs.Warn, "hold another state than the log's: " + some(diverged)
		case len(lost) > 0:
			return obs.Warn, "have not reported for longer than RESCIND_GATEWAY_LEASE: " + some(lost)
		}
		return obs.Pass, fmt.Sprintf("%d report to this process", len(all))
	}}}
	if cfg.Canary.Every > 0 {
		silence := canary.NewSilence(cfg.Canary.Every, time.Now())
		checks = append(checks, obs.Check{Name: "canary", Run: func(context.Context) (obs.Status, string) {
			var wrong []string
			all := f.Gateways()
			if alarms := canary.Alarms(all); len(alarms) > 0 {
				wrong = append(wrong, "gateways whose canary gives the alarm: "+some(alarms))
			}
			if since, silent := silence.Since(all, time.Now()); silent {
				wrong = append(wrong, "the canary has told nothing since "+since.UTC().Format(time.RFC3339)+": see the log of the process that runs it")
			}
			if len(wrong) > 0 {
				return obs.Warn, strings.Join(wrong, "; ")
			}
			return obs.Pass, "no gateway is known to accept a revoked token"
		}})
	}
	return checks
}

// some names up to ten.
func some(ids []string) string {
	const most = 10
	if more := len(ids) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:most], ", "), more)
	}
	return strings.Join(ids, ", ")
}

func sinkStatus(s relay.Status) (obs.Status, string) {
	detail := fmt.Sprintf("%s at seq %d, %d events behind", s.State, s.Seq, s.Behind)
	if s.State == relay.Retrying || s.State == relay.Stopped || s.Lag > lagWarning {
		return obs.Warn, fmt.Sprintf("%s, the oldest for %s", detail, s.Lag.Round(time.Second))
	}
	return obs.Pass, detail
}

// NewEpoch gives the log of a restored database a new identity and puts back the
// live revocations that only etcd still has.
func NewEpoch(ctx context.Context, cfg Config, log *slog.Logger) (EpochReport, error) {
	var report EpochReport
	pool, err := openPool(ctx, cfg.Database)
	if err != nil {
		return report, err
	}
	defer pool.Close()
	l, err := newLedger(cfg, pool, prometheus.NewRegistry(), log)
	if err != nil {
		return report, err
	}
	lost := func(context.Context, revocation.Seq) ([]revocation.Revocation, error) { return nil, nil }
	if slices.Contains(cfg.Sinks, sinkEtcd) {
		etcd, err := newEtcd(cfg, l, log)
		if err != nil {
			return report, err
		}
		defer etcd.Close()
		lost = func(ctx context.Context, above revocation.Seq) (live []revocation.Revocation, err error) {
			for r, err := range etcd.Live(ctx, above) {
				if err != nil {
					return nil, fmt.Errorf("read what etcd still has: %w", err)
				}
				live = append(live, r)
			}
			return live, nil
		}
	}
	cursors, err := l.Cursors(ctx)
	if err != nil {
		return report, err
	}
	if report.Before, err = l.NewEpoch(ctx, slices.Sorted(maps.Keys(cursors)), lost); err != nil {
		return report, err
	}
	if report.After, err = l.Head(ctx); err != nil {
		return report, err
	}
	return report, nil
}

// EpochReport says what [NewEpoch] did: the log stood at Before in its new epoch,
// and at After once what etcd still had was back.
type EpochReport struct {
	Before, After revocation.Position
}
