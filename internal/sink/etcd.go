package sink

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
)

// EtcdConfig says where the etcd directory is, and tunes its writer. Endpoints
// and Source are required; all else is ready for production at its zero value.
type EtcdConfig struct {
	// Endpoints are the client URLs of one cluster's members.
	Endpoints []string
	// TLS, with the client certificate if any, needs https endpoints.
	TLS *tls.Config
	// Username and Password are those of an etcd user; both or neither.
	Username, Password string
	// Prefix precedes every key: empty, or "/" and more without a "/" at the end.
	// What lies below it in the directory's folders belongs to this service alone,
	// which removes what it does not know.
	Prefix string
	// Source is the issuer of the super tenant.
	Source string
	// RequestTimeout bounds each request to etcd. Default 5s, at least 100ms.
	RequestTimeout time.Duration
	// MaxTxnOps is the cluster's --max-txn-ops, 2 to 512: more operations make
	// fewer transactions, and 512 of the longest entries still fit into etcd's
	// default request size. Default 128, as etcd's.
	MaxTxnOps int
	// KeysPerLease caps the keys of one lease, 1 to 10000. Puts slow down with the
	// keys that are already on their lease, and etcd revokes at most about 1,000
	// leases a second. Default 1000.
	KeysPerLease int
	// ReconcileEvery is the pause between two comparisons of the directory with
	// the database; each reads both as a whole. Default 5m, at least 100ms.
	ReconcileEvery time.Duration
}

func (c EtcdConfig) withDefaults() EtcdConfig {
	setDefault := func(d *time.Duration, to time.Duration) {
		if *d == 0 {
			*d = to
		}
	}
	setDefault(&c.RequestTimeout, 5*time.Second)
	setDefault(&c.ReconcileEvery, 5*time.Minute)
	if c.MaxTxnOps == 0 {
		c.MaxTxnOps = 128
	}
	if c.KeysPerLease == 0 {
		c.KeysPerLease = 1000
	}
	return c
}

func (c EtcdConfig) check() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf("etcd: "+format, args...)) }
	if len(c.Endpoints) == 0 {
		wrong("no endpoints: name at least one, such as https://etcd-1:2379")
	}
	for i, ep := range c.Endpoints {
		// The value is not repeated: it may hold a password that does not belong there.
		if !strings.Contains(ep, "://") {
			ep = "bare://" + ep
		}
		u, err := url.Parse(ep)
		switch {
		case err != nil || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "":
			wrong("endpoint %d is not of the form https://host:port (user and password have settings of their own)", i+1)
		case u.Scheme == "http" && c.TLS != nil:
			wrong("endpoint %d is http, but TLS is configured: use https", i+1)
		case u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "bare":
			wrong("endpoint %d is %s, must be https or http", i+1, u.Scheme)
		}
	}
	if (c.Username == "") != (c.Password == "") {
		wrong("user name and password belong together: set both or neither")
	}
	if c.Prefix != "" && (!strings.HasPrefix(c.Prefix, "/") || strings.HasSuffix(c.Prefix, "/")) {
		wrong("prefix %q must be empty, or begin with / and not end with it", c.Prefix)
	}
	if c.Source == "" {
		wrong("no source: set the issuer of the super tenant")
	}
	between := func(name string, n, low, high int) {
		if n < low || n > high {
			wrong("%s is %d, must be %d to %d", name, n, low, high)
		}
	}
	between("operations in a transaction", c.MaxTxnOps, 2, 512)
	between("keys on a lease", c.KeysPerLease, 1, 10000)
	atLeast := func(name string, d time.Duration) {
		if d < 100*time.Millisecond {
			wrong("%s is %s, must be at least 100ms", name, d)
		}
	}
	atLeast("request timeout", c.RequestTimeout)
	atLeast("pause between reconciliations", c.ReconcileEvery)
	return errors.Join(errs...)
}

// State is the log and the state that the directory is a copy of.
type State interface {
	// Head is the position of the last committed event.
	Head(ctx context.Context) (revocation.Position, error)
	// Oldest is the lowest seq that the log still has, the head's successor if none.
	Oldest(ctx context.Context) (revocation.Seq, error)
	// Page returns up to limit live revocations whose ID follows after, in the order
	// of their IDs. A page shorter than limit is the last.
	Page(ctx context.Context, after string, limit int) ([]directory.Stored, error)
	// Lookup returns the revocations of targets, in any order. Those that are over
	// may be missing.
	Lookup(ctx context.Context, targets []revocation.Target) ([]directory.Stored, error)
	// Import stores revocations that only the directory has. ID and Tenant are
	// empty. One that is there already, with the same or a later end, stays.
	Import(ctx context.Context, rs []revocation.Revocation) error
}

// Etcd keeps the directory of live revocations in etcd. It is a [relay.Sink],
// with all that a sink can have; [Etcd.Check] may be called at any time, from
// any goroutine.
//
// # Decisions
//
// Alone among the sinks it asks the database, to build the directory and to mend
// it; what it delivers comes from the events alone.
//
// One process writes at a time. Each of its transactions compares the revision
// at which it last wrote the stream key, and [Etcd.Open] writes that key anew, so
// a leader that does not know that it is none can change nothing, nor can a
// request that was given up and arrives late. While a build runs
// [directory.RebuildKey] takes the stream key's part.
//
// The stream key says what the directory has, not the cursor in the database:
// it is written in the same transactions as the entries.
//
// An entry's seq may be later than its event's, never earlier: after a restore of
// the database, entries above its head are imported from here, and importing one
// too many does no harm.
type Etcd struct {
	cfg   EtcdConfig
	state State
	log   *slog.Logger

	dialing etcdGate // held while client is made
	client  atomic.Pointer[clientv3.Client]

	// writing is held by a delivery, a heartbeat, a build or one step of the
	// reconciler. It guards term and lost.
	writing etcdGate
	term    *etcdTerm // nil: Open must come first
	lost    error     // why term is nil

	halt func() // ends the reconciler and waits for it; only Open and Close use it
}

var errEtcdNotOpen = errors.New("the etcd sink is not open")

// NewEtcd makes the sink; connections are made when they are needed.
func NewEtcd(cfg EtcdConfig, state State, log *slog.Logger) (*Etcd, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	return &Etcd{
		cfg: cfg, state: state, log: log.With("component", "etcd"),
		dialing: make(etcdGate, 1), writing: make(etcdGate, 1), lost: errEtcdNotOpen, halt: func() {},
	}, nil
}

// etcdGate is a mutex whose waiting ends with a context.
type etcdGate chan struct{}

func (g etcdGate) lock(ctx context.Context) error {
	select {
	case g <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (g etcdGate) unlock() { <-g }

// connect returns the client, and makes it if there is none. With a user name
// that needs an answer of the cluster, which is why it does not happen earlier.
func (e *Etcd) connect(ctx context.Context) (*clientv3.Client, error) {
	if err := e.dialing.lock(ctx); err != nil {
		return nil, fmt.Errorf("connect to etcd: %w", err)
	}
	defer e.dialing.unlock()
	if c := e.client.Load(); c != nil {
		return c, nil
	}
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	unbind := context.AfterFunc(ctx, end)
	c, err := clientv3.New(clientv3.Config{
		Context:              life,
		Endpoints:            e.cfg.Endpoints,
		TLS:                  e.cfg.TLS,
		Username:             e.cfg.Username,
		Password:             e.cfg.Password,
		DialTimeout:          e.cfg.RequestTimeout,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		MaxUnaryRetries:      3,            // reads, and whatever needs a new token; the relay does the rest
		Logger:               zap.NewNop(), // what matters comes back as an error
		DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{
				// gRPC would wait for up to two minutes, also when etcd has long been back.
				Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
				MinConnectTimeout: e.cfg.RequestTimeout,
			}),
			grpc.WithChainUnaryInterceptor(etcdFailFast),
		},
	})
	if !unbind() && err == nil {
		err = errors.Join(context.Cause(ctx), c.Close())
	}
	if err != nil {
		end()
		return nil, fmt.Errorf("connect to etcd: %w", err)
	}
	e.client.Store(c)
	return c, nil
}

// etcdFailFast makes a request fail at once, with the reason, while there is no
// connection. The client's own way is to wait, and then to say only that it did.
func etcdFailFast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, cc, append(opts, grpc.WaitForReady(false))...)
}

// etcdCall bounds one request, and says in its error which one failed and how.
func etcdCall[T any](ctx context.Context, limit time.Duration, what string, request func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %s", limit))
	defer cancel()
	resp, err := request(ctx)
	if err == nil {
		return resp, nil
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w (%w)", cause, err)
	}
	return resp, fmt.Errorf("%s: %w", what, err)
}

// Open makes this process the directory's writer and returns the seq at which
// the directory stands, having built it anew where needed. The cursor does not
// count: the directory knows better. Errors: [relay.ErrRestored].
func (e *Etcd) Open(ctx context.Context, _ revocation.Position) (revocation.Seq, error) {
	e.halt()
	if err := e.writing.lock(ctx); err != nil {
		return 0, err
	}
	defer e.writing.unlock()
	e.term, e.lost = nil, errEtcdNotOpen
	client, err := e.connect(ctx)
	if err != nil {
		return 0, err
	}
	t := &etcdTerm{Etcd: e, client: client, leases: newEtcdLeases(e.cfg.KeysPerLease)}
	built, err := t.begin(ctx)
	if err != nil {
		return 0, err
	}
	e.term = t
	e.startReconciler(ctx, t, built)
	return t.at.Seq, nil
}

// Deliver puts events into the directory. It knows those that are there already.
func (e *Etcd) Deliver(ctx context.Context, events []revocation.Event) error {
	return e.write(ctx, func(t *etcdTerm) error { return t.deliver(ctx, events) })
}

// Beat tells the directory's readers how far the log reaches and, in doing so, makes
// sure that the directory is still as this process left it, and that the log still has
// all that is in it.
func (e *Etcd) Beat(ctx context.Context, h revocation.Heartbeat) error {
	return e.write(ctx, func(t *etcdTerm) error { return t.beat(ctx, h) })
}

// write runs f as the directory's writer. After an error the next call is told
// to open the sink again.
func (e *Etcd) write(ctx context.Context, f func(*etcdTerm) error) error {
	if err := e.writing.lock(ctx); err != nil {
		return err
	}
	defer e.writing.unlock()
	if e.term == nil {
		return e.lost
	}
	if err := f(e.term); err != nil {
		e.term, e.lost = nil, err
		return err
	}
	return nil
}

// Close ends this process's time as the directory's writer, and the connection.
// A later call to another method connects again.
func (e *Etcd) Close() {
	e.halt()
	e.halt = func() {}
	_ = e.writing.lock(context.Background()) // nobody can hold it for long: the reconciler has ended
	e.term, e.lost = nil, errEtcdNotOpen
	e.writing.unlock()
	if c := e.client.Swap(nil); c != nil {
		_ = c.Close() // tells only that it is closed
	}
}

// etcdFull is the share of its quota at which the database of a member calls for
// attention: past the quota etcd refuses every write.
const etcdFull = 0.8

// Check returns an error, fit for every operator's eyes, if the cluster needs
// attention: members that do not answer, alarms, a database close to its quota.
func (e *Etcd) Check(ctx context.Context) error {
	client, err := e.connect(ctx)
	if err != nil {
		return errors.New("etcd does not answer, or refuses the user")
	}
	members := make(chan error, len(e.cfg.Endpoints))
	var silent atomic.Int32
	for _, ep := range e.cfg.Endpoints {
		go func() {
			s, err := etcdCall(ctx, e.cfg.RequestTimeout, "status", func(ctx context.Context) (*clientv3.StatusResponse, error) {
				return client.Status(ctx, ep)
			})
			if err != nil {
				silent.Add(1)
				members <- nil
				return
			}
			members <- etcdHealth(s)
		}()
	}
	var errs []error
	for range e.cfg.Endpoints {
		errs = append(errs, <-members)
	}
	if n := silent.Load(); n > 0 {
		errs = append(errs, fmt.Errorf("%d of %d etcd members do not answer", n, len(e.cfg.Endpoints)))
	}
	return errors.Join(errs...)
}

func etcdHealth(s *clientv3.StatusResponse) error {
	if len(s.Errors) > 0 {
		return fmt.Errorf("etcd member %x reports: %s", s.Header.MemberId, strings.Join(s.Errors, "; "))
	}
	if s.DbSizeQuota > 0 && float64(s.DbSize) > etcdFull*float64(s.DbSizeQuota) {
		return fmt.Errorf("etcd member %x uses %d MiB of its quota of %d MiB, and refuses writes when it is full: "+
			"turn on auto-compaction, defragment, or raise --quota-backend-bytes", s.Header.MemberId, s.DbSize>>20, s.DbSizeQuota>>20)
	}
	return nil
}

var (
	_ relay.Sink   = (*Etcd)(nil)
	_ relay.Opener = (*Etcd)(nil)
	_ relay.Beater = (*Etcd)(nil)
	_ relay.Closer = (*Etcd)(nil)
)
