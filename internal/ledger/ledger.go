// Package ledger hides how a revocation becomes durable: batches, transactions,
// how seqs are made, retention, who may feed a sink, and how the tokens that were
// remembered are revoked one by one. It owns the tables revocations, log, log_head,
// tenant_heads, sink_cursors, audit, issued_tokens, issued_since and endings.
//
// # Invariants
//
// A state row and its event commit in one transaction. That transaction takes
// the row of log_head last, so seqs follow commit order and have no gaps with
// any number of processes, and it holds that row no longer than a commit.
//
// # Decisions
//
// Group commit without a timer: while one transaction is in flight the next
// batch fills. An idle service adds no latency, a busy one needs fewer commits.
//
// Entries are sorted by their unique key before the statement: two batches with
// the same targets would else deadlock.
//
// Only a quarter of the connections is for changes of other state at a time: they may
// wait for each other's rows, and revocations must not wait for them.
//
// The events that this process committed last are kept in memory: sinks that keep
// up cost the database no reads.
//
// A batch is safe to send twice, since a target that is stored already adds no
// event. So a lost connection is retried once without asking whether the commit
// went through.
//
// A token is remembered before its issuer looks at the state for the last time. Remembering
// holds an advisory lock in share mode until its commit, and a transaction that revokes a
// client, a subject or a tenant takes that lock alone, after its rows and before the head,
// and holds it until its own commit. So each token is either remembered and committed
// before, and then the ending that this transaction adds covers it by its number, or it is
// committed after, and then its issuer sees the revocation. That nothing is remembered can
// be known only under the lock, since a token may be on its way: such transactions always
// take it, in the round trip that takes the head, and others send no statement for it.
//
// A remembered token is its issuer's, whatever has become of its client: an identifier may be
// given again, and with another tenant.
//
// Only what a process of before schema 3 revokes by a time adds no ending. So where processes
// are replaced one by one, remembered tokens are told one by one once none of before is left;
// until then gateways that know no revocation of more than one token may accept some of those
// that it ended.
//
// A repeat that finds its tokens remembered is an error: it writes nothing, so that its commit
// waits for no standby, and the row may not be locked, which would be a write. Their issuer
// begins anew with others.
//
// An ending goes by the order of remembering, as no iat is kept: of two tokens of one
// second, one that was stamped ahead because of another revocation ends with it. A token
// that outlives what the revocation says is the end of its last token is none of its own,
// whatever its number.
//
// The tokens of an ending become revocations of kind token in chunks, each in a
// transaction that also forgets them, so a crash repeats nothing and loses nothing. The
// endings take turns: one of a million tokens does not hold up one of a single token, and one
// that fails again and again is passed over. The audit has one record when an ending is
// through: who ended the tokens, and why, is in the record of the revocation, and a hundred
// thousand copies of it would hide the rest.
package ledger

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/rescindhq/rescind/api/revocation"
)

// ErrBusy is returned when too many wait already. Nothing was stored.
var ErrBusy = errors.New("too many revocations or changes are waiting to be committed")

// ErrUnavailable is returned when a commit failed or its outcome is not known.
// Sending the same revocation again is safe.
var ErrUnavailable = errors.New("the revocation could not be committed")

// ErrSeqGone is returned by [Ledger.After] for events that retention has removed.
var ErrSeqGone = errors.New("the log no longer has these events")

// ErrRestored means that the log's head went back within one epoch: the database
// was restored to an older state while this process ran.
var ErrRestored = errors.New("the log's head went back: the database was restored to an older state; " +
	"stop all processes and run: rescind epoch new")

// Config tunes the ledger. The zero value is ready for production.
type Config struct {
	// MaxBatch caps the revocations in one commit, but for those of a bulk. More means fewer commits under
	// load, and one slow commit delays more callers. Default 500, 1 to 5000.
	MaxBatch int
	// QueueSize caps the revocations that wait for a commit; past it Revoke returns
	// ErrBusy. Default 10000, at least MaxBatch.
	QueueSize int
	// CommitTimeout bounds one commit, also during shutdown. Default 5s, at least 100ms.
	CommitTimeout time.Duration
	// ClockSkew is added to the database's clock when a revocation that has a time
	// is made. Default 2s, 0 to 60s; negative for none.
	ClockSkew time.Duration
	// LogRetention is how long events stay. Default 72h, at least 1m. An event
	// stays longer while a sink still needs it.
	LogRetention time.Duration
	// TrimEvery is the time between two clean-ups. Default 1m.
	TrimEvery time.Duration
	// Source is the CloudEvents source of events: the issuer of the super tenant.
	Source string
}

func (c Config) withDefaults() (Config, error) {
	set := func(p *time.Duration, d time.Duration) {
		if *p == 0 {
			*p = d
		}
	}
	set(&c.CommitTimeout, 5*time.Second)
	set(&c.ClockSkew, 2*time.Second)
	set(&c.LogRetention, 72*time.Hour)
	set(&c.TrimEvery, time.Minute)
	if c.MaxBatch == 0 {
		c.MaxBatch = 500
	}
	if c.QueueSize == 0 {
		c.QueueSize = 10000
	}
	c.ClockSkew = max(c.ClockSkew, 0)
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(1 <= c.MaxBatch && c.MaxBatch <= 5000, "MaxBatch is %d, must be 1 to 5000", c.MaxBatch)
	check(c.QueueSize >= c.MaxBatch, "QueueSize is %d, must be at least MaxBatch, %d", c.QueueSize, c.MaxBatch)
	check(c.CommitTimeout >= 100*time.Millisecond, "CommitTimeout is %s, must be at least 100ms", c.CommitTimeout)
	check(c.ClockSkew <= time.Minute, "ClockSkew is %s, must be at most 1m", c.ClockSkew)
	check(c.LogRetention >= time.Minute, "LogRetention is %s, must be at least 1m", c.LogRetention)
	check(c.Source != "", "Source is empty, must be the issuer of the super tenant")
	return c, errors.Join(errs...)
}

// Session sets what every connection of the service's pool must have. The pool
// given to [New] must have been made with it.
func Session(cfg *pgxpool.Config) {
	p := cfg.ConnConfig.RuntimeParams
	p["synchronous_commit"] = "on" // whatever the server's default: an answer promises durability
	p["statement_timeout"] = "0"   // contexts bound everything; this would end a commit's wait for its standby with success
	p["lock_timeout"] = "5s"
	p["idle_in_transaction_session_timeout"] = "15s"
	p["jit"] = "off" // compiling takes up to a second, while the head may be locked, and saves a few milliseconds
	keepAlive(cfg.ConnConfig)
	onNotice := cfg.ConnConfig.OnNotice
	cfg.ConnConfig.OnNotice = func(c *pgconn.PgConn, n *pgconn.Notice) {
		if n.SeverityUnlocalized == "WARNING" {
			c.CustomData()[lastWarning] = n.Message
		}
		if onNotice != nil {
			onNotice(c, n)
		}
	}
	p["search_path"] = "pg_catalog"
	p["timezone"] = "UTC"
	if _, ok := p["application_name"]; !ok {
		p["application_name"] = "rescind"
	}
}

// lastWarning is where a connection keeps the last warning of the server. A commit whose
// wait for a synchronous standby was cut short is reported as done, with a warning.
const lastWarning = "rescind.warning"

// keepAlive makes both sides find out within about ten seconds that the other has
// gone without a word: it may hold the head's lock.
func keepAlive(cfg *pgx.ConnConfig) {
	p := cfg.RuntimeParams
	p["tcp_keepalives_idle"], p["tcp_keepalives_interval"], p["tcp_keepalives_count"] = "5", "2", "3"
	p["tcp_user_timeout"] = "10000"
	dialer := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3,
	}}
	cfg.DialFunc = dialer.DialContext
}

// Ledger records revocations and reads the log. Its methods may be called from
// any goroutine.
type Ledger struct {
	cfg      Config
	pool     *pgxpool.Pool
	log      *slog.Logger
	instance string // tells our own notifications from those of others
	metrics  *metrics
	queue    *queue[*item]
	issued   *queue[*issuedItem]
	changes  *turnstile
	bulks    *turnstile
	smalls   *turnstile
	ended    chan struct{} // has one when an ending may have been added
	grown    broadcast
	tail     tail

	mu   sync.Mutex
	seen revocation.Position // the furthest head that this process knows to be committed

	fatal chan error
}

// New returns a ledger on pool, which must log in as a member of rescind_service.
// [Ledger.Run] must run for [Ledger.Revoke] and [Ledger.Remember] to finish.
func New(cfg Config, pool *pgxpool.Pool, reg prometheus.Registerer, log *slog.Logger) (*Ledger, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("configure ledger: %w", err)
	}
	l := &Ledger{
		cfg:      cfg,
		pool:     pool,
		log:      log.With("component", "ledger"),
		instance: uuid.NewString(),
		queue:    newQueue[*item](cfg.QueueSize),
		issued:   newQueue[*issuedItem](cfg.QueueSize),
		changes:  newTurnstile("changes", max(1, int(pool.Config().MaxConns)/4), maxChangesWaiting, changeWait),
		bulks:    newTurnstile("bulk revocations", 1, maxBulksWaiting, bulkWait),
		smalls:   newTurnstile("lists of revocations", smallsInside, maxSmallsWaiting, bulkWait),
		ended:    make(chan struct{}, 1),
		fatal:    make(chan error, 1),
	}
	l.metrics = newMetrics(reg, l)
	return l, nil
}

// Run commits what [Ledger.Revoke] and [Ledger.Remember] are given until ctx ends, then
// commits what was accepted, and returns nil. Beside it removes what is over, and revokes
// remembered tokens one by one. It returns [ErrRestored] when the log went back.
func (l *Ledger) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.listen(gctx) })
	g.Go(func() error { return l.trim(gctx) })
	g.Go(func() error { l.queue.serve(gctx, l.cfg.MaxBatch, l.commitBatch); return nil })
	g.Go(func() error { l.issued.serve(gctx, l.cfg.MaxBatch, l.rememberBatch); return nil })
	g.Go(func() error { l.expand(gctx); return nil })
	g.Go(func() error {
		select {
		case <-gctx.Done():
			return nil
		case err := <-l.fatal:
			return err
		}
	})
	return g.Wait()
}

// saw records that p is committed.
func (l *Ledger) saw(p revocation.Position) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.Epoch != l.seen.Epoch {
		l.tail.forget(p.Epoch)
	}
	if p.Epoch != l.seen.Epoch || p.Seq > l.seen.Seq {
		l.seen = p
	}
}

// notBehind returns ErrRestored if head, read or locked after seen was, is before it.
func notBehind(head, seen revocation.Position) error {
	if head.Epoch == seen.Epoch && head.Seq < seen.Seq {
		return fmt.Errorf("head is %d, was %d: %w", head.Seq, seen.Seq, ErrRestored)
	}
	return nil
}

func (l *Ledger) lastSeen() revocation.Position {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seen
}

// restored ends Run with err, which says that the log went back, and marks the log,
// so that no process starts on it before it has a new epoch.
func (l *Ledger) restored(err error) {
	l.tail.forget(noEpoch)
	select {
	case l.fatal <- err:
	default:
		return // it was done before
	}
	ctx, cancel := context.WithTimeout(context.Background(), l.cfg.CommitTimeout)
	defer cancel()
	if _, markErr := l.pool.Exec(ctx, `UPDATE rescind.log_head SET restored = true WHERE epoch = $1::uuid`, string(l.lastSeen().Epoch)); markErr != nil {
		l.log.Error("the restored log could not be marked; run rescind epoch new before any process is started", "error", markErr)
	}
}

// A broadcast wakes all who wait for the next one.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

func (b *broadcast) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}
