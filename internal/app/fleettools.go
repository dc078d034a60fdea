package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica/etcdfeed"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/canary"
	"github.com/rescindhq/rescind/internal/explain"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/revoke"
	"github.com/rescindhq/rescind/internal/verify"
)

// watch is the fleet as a command sees it, which takes no reports itself.
type watch struct {
	*fleet.Fleet
	stop func()
}

// newWatch returns once the command hears of what changes.
func newWatch(ctx context.Context, cfg Config, pool *pgxpool.Pool, log *slog.Logger) (*watch, error) {
	f, err := fleet.New(fleet.Config{Lease: cfg.GatewayLease, Observe: true}, pool, nil, prometheus.NewRegistry(), log)
	if err != nil {
		return nil, err
	}
	if err := f.Load(ctx); err != nil {
		return nil, err
	}
	w := &watch{f, inBackground(ctx, f.Run, log)}
	if err := f.Refresh(ctx); err != nil { // the answers show that it listens
		w.close()
		return nil, err
	}
	return w, nil
}

func (w *watch) close() { w.stop() }

// inBackground runs a part of a command until stop, which waits for its end, is called.
func inBackground(ctx context.Context, run func(context.Context) error, log *slog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := run(ctx); err != nil && ctx.Err() == nil {
			log.Warn("a part of the command has ended, what is shown may be old", "error", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// Watch looks at the fleet from now on, for [Revoker.Wait]. It is called before what is to be waited for is
// revoked: so nothing is lost of the time that gateways take.
func (r *Revoker) Watch(ctx context.Context, cfg Config, log *slog.Logger) (err error) {
	r.watch, err = newWatch(ctx, cfg, r.tools.Pool, log)
	return err
}

// Convergence says who has applied what was revoked.
type Convergence struct {
	fleet.BarrierResult
	// Served: a service process has answered. Without one no gateway can say anything.
	Served bool
	// LostMeanwhile are the ids of those that were live when the wait began, and are lost now.
	LostMeanwhile []string
}

// Wait waits until each live gateway that serves the tenant of what was revoked has applied it, or until
// ctx ends; that is no error.
func (r *Revoker) Wait(ctx context.Context, o *revoke.Outcome) (Convergence, error) {
	serves := func(g *fleet.Gateway) bool { return g.Serves(o.Tenant.Domain) }
	live := make(map[string]bool)
	for _, g := range r.watch.Gateways() {
		live[g.ID] = g.Standing == fleet.Live
	}
	served := r.watch.Served() // a short wait may end before there is an answer
	result, err := r.watch.Wait(ctx, fleet.Barrier{
		Position: revocation.Position{Epoch: r.tools.ledger.Seen().Epoch, Seq: o.Seq}, Select: serves,
	})
	if err != nil {
		return Convergence{}, err
	}
	c := Convergence{BarrierResult: result, Served: served || r.watch.Served()}
	for i := range result.Gateways {
		if g := &result.Gateways[i]; g.Standing == fleet.Lost && live[g.ID] {
			c.LostMeanwhile = append(c.LostMeanwhile, g.ID)
		}
	}
	return c, nil
}

// logTools are what a command looks at the log with. Such a command needs no master key, and works on a
// database that was restored too: it writes nothing that would be lost.
type logTools struct {
	pool   *pgxpool.Pool
	ledger *ledger.Ledger
	watch  *watch
}

func openLog(ctx context.Context, cfg Config, log *slog.Logger) (_ *logTools, err error) {
	cfg.Database.MaxConns = commandConns
	pool, err := openPool(ctx, cfg.Database)
	if err != nil {
		return nil, err
	}
	t := &logTools{pool: pool}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	if err = checkSchema(ctx, pool, log); err != nil {
		return nil, err
	}
	if t.ledger, err = newLedger(cfg, pool, prometheus.NewRegistry(), log); err != nil {
		return nil, err
	}
	if t.watch, err = newWatch(ctx, cfg, pool, log); err != nil {
		return nil, err
	}
	return t, nil
}

// Close ends all connections.
func (t *logTools) Close() {
	if t.watch != nil {
		t.watch.close()
	}
	t.pool.Close()
}

// FleetTools show the gateways to a command, and change what is kept of them, without a running service.
type FleetTools struct{ *logTools }

// OpenFleet connects to the database, which must have the current schema. The tools are to be closed.
func OpenFleet(ctx context.Context, cfg Config, log *slog.Logger) (*FleetTools, error) {
	t, err := openLog(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	return &FleetTools{t}, nil
}

// Served reports whether a service process has answered. Without one what is known of gateways is what the database
// remembers.
func (t *FleetTools) Served() bool { return t.watch.Served() }

// Gateways returns all, sorted by ID, and the log's head, read after them.
func (t *FleetTools) Gateways(ctx context.Context) ([]fleet.Gateway, revocation.Position, error) {
	all := t.watch.Gateways()
	head, err := t.ledger.Head(ctx)
	return all, head, err
}

// Forget is [fleet.Fleet.Forget] by the operator, and recorded in the audit.
func (t *FleetTools) Forget(ctx context.Context, id string) error {
	if err := t.watch.Forget(ctx, id); err != nil {
		return err
	}
	return t.record(ctx, "forget_gateway", id)
}

// SetCanary is [fleet.Fleet.SetCanary] by the operator, and recorded in the audit. It checks the URL.
func (t *FleetTools) SetCanary(ctx context.Context, id, url string) error {
	if url != "" {
		if err := canary.CheckURL(url); err != nil {
			return err
		}
	}
	if err := t.watch.SetCanary(ctx, id, url); err != nil {
		return err
	}
	return t.record(ctx, "set_gateway_canary", id)
}

func (t *FleetTools) record(ctx context.Context, action, id string) error {
	err := t.ledger.Audit(ctx, ledger.AuditEntry{Tenant: revocation.SuperTenant, Action: action, Subject: id, Actor: Operator()})
	if err != nil {
		return fmt.Errorf("it is done, and could not be recorded: %w", err)
	}
	return nil
}

// Verifier compares etcd and gateways with the log for a command, without a running service.
type Verifier struct {
	tools     *logTools
	state     *follow.Follower
	stop      func()
	directory *etcdfeed.Etcd // nil if the log is fed to none
}

// OpenVerifier is [OpenFleet] for comparing. It reads the whole state, which takes a second for about a
// million revocations. Where the log is fed to etcd, cfg must lead to it. The Verifier is to be closed.
func OpenVerifier(ctx context.Context, cfg Config, log *slog.Logger) (_ *Verifier, err error) {
	tools, err := openLog(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	v := &Verifier{tools: tools}
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	cursors, err := tools.ledger.Cursors(ctx)
	if err != nil {
		return nil, err
	}
	if _, fed := cursors[sinkEtcd]; fed {
		if v.directory, err = newDirectory(cfg); err != nil {
			return nil, err
		}
	}
	if v.state, v.stop, err = followLog(ctx, tools, log); err != nil {
		return nil, err
	}
	return v, nil
}

// followLog loads the state, and keeps it up to date until stop is called.
func followLog(ctx context.Context, tools *logTools, log *slog.Logger) (_ *follow.Follower, stop func(), err error) {
	state, err := follow.New(follow.Config{History: history}, stateSource{tools.ledger}, prometheus.NewRegistry(), log)
	if err != nil {
		return nil, nil, err
	}
	if err := state.Load(ctx); err != nil {
		return nil, nil, err
	}
	return state, inBackground(ctx, state.Run, log), nil
}

func newDirectory(cfg Config) (*etcdfeed.Etcd, error) {
	if len(cfg.Etcd.Endpoints) == 0 {
		return nil, errors.New("the log is fed to etcd, which is to be compared: give RESCIND_ETCD_ENDPOINTS as the service has it; " +
			"if etcd is no sink any more, the owner of the schema can delete it from rescind.sink_cursors")
	}
	etcdTLS, err := cfg.Etcd.TLS.Client()
	if err != nil {
		return nil, fmt.Errorf("read the TLS files of etcd: %w", err)
	}
	return etcdfeed.New(etcdfeed.Config{
		Endpoints: cfg.Etcd.Endpoints, TLS: etcdTLS, Username: cfg.Etcd.Username, Password: string(cfg.Etcd.Password),
		Prefix: cfg.Etcd.Prefix, Issuer: cfg.Issuer,
	})
}

// Verify is [verify.Run] by the database's clock.
func (v *Verifier) Verify(ctx context.Context, o verify.Options) (verify.Report, error) {
	if err := v.tools.pool.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&o.Now); err != nil {
		return verify.Report{}, fmt.Errorf("read the database's clock: %w", err)
	}
	if v.directory == nil {
		return verify.Run(ctx, v.state, nil, v.tools.watch, o) // a nil *Etcd would be a directory
	}
	return verify.Run(ctx, v.state, v.directory, v.tools.watch, o)
}

// Served reports whether a service process has answered. Without one no gateway can be asked.
func (v *Verifier) Served() bool { return v.tools.watch.Served() }

// Close ends all connections.
func (v *Verifier) Close() {
	if v.stop != nil {
		v.stop()
	}
	if v.directory != nil {
		_ = v.directory.Close() // it has written nothing
	}
	v.tools.Close()
}

// Explainer says for a command why tokens are refused, without a running service.
type Explainer struct {
	tools *logTools
	stop  func()
	*explain.Explainer
}

// OpenExplainer is [OpenFleet] for explaining. It reads the whole state, which takes a second for about a
// million revocations. The Explainer is to be closed.
func OpenExplainer(ctx context.Context, cfg Config, log *slog.Logger) (_ *Explainer, err error) {
	tools, err := openLog(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	e := &Explainer{tools: tools}
	defer func() {
		if err != nil {
			e.Close()
		}
	}()
	var state *follow.Follower
	if state, e.stop, err = followLog(ctx, tools, log); err != nil {
		return nil, err
	}
	verifier, err := newCommandIssuers(ctx, cfg, tools.pool, state, log)
	if err != nil {
		return nil, err
	}
	e.Explainer, err = explain.New(explain.Deps{
		Ledger: tools.ledger, State: state, Verifier: verifier, Fleet: tools.watch, Leeway: cfg.Leeway,
	})
	return e, err
}

// Explain is [explain.Explainer.Explain] for the operator, who sees all tenants.
func (e *Explainer) Explain(ctx context.Context, q explain.Question) (explain.Answer, error) {
	return e.Explainer.Explain(ctx, explain.Caller{}, q)
}

// Close ends all connections.
func (e *Explainer) Close() {
	if e.stop != nil {
		e.stop()
	}
	e.tools.Close()
}
