// Package etcdfeed reads and watches the directory of revocations in etcd for a replica. It
// hides revisions, compaction and how the directory is rebuilt. The keys and values are those of
// package directory.
//
// # Decisions
//
// A load reads everything at one revision, page by page. If etcd compacts that revision meanwhile, it
// fails and is tried again.
//
// A watch begins at a revision from before the load, so it misses nothing. It is filtered: keys go
// when their lease ends, which tells nothing. Etcd's client keeps a watch up over lost
// connections and goes on at the next revision; that this revision is one of the same history, and
// not of an etcd that lost its data and was filled again, is known by the versions of the
// directory's marks, which count their writes. When a build of the directory begins or has been missed,
// the watch ends.
//
// A heartbeat counts only if it was seen to be written. What lay there before says how far
// the log reached at a time that may be long ago, and a replica that knows no other would take the
// difference for that of two clocks.
//
// The directory does not name tenants, so beside a source of some tenants this feed tells of what is none of
// theirs: it takes room, and refuses tokens that would be refused anyway; digests leave it out.
//
// A reader that knew the wrong issuer would take the super tenant's entries for somebody else's, and
// one with the wrong prefix may find another service's directory: both would let revoked tokens
// through in good faith. So a directory whose heartbeat names another issuer is refused, and where an
// entry names its issuer, it is believed.
package etcdfeed

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// Config says where the directory is. Endpoints and Issuer are needed.
type Config struct {
	// Endpoints are the members of the cluster, for example https://etcd-1:2379.
	Endpoints []string
	// TLS is for https. Default: the system's authorities.
	TLS *tls.Config
	// Username and Password are for where etcd asks for them. The user must be allowed to read
	// all keys that begin with Prefix and "/".
	Username, Password string
	// Prefix is what every key begins with (RESCIND_ETCD_PREFIX). Default: none.
	Prefix string
	// Issuer is the issuer of the super tenant (RESCIND_ISSUER).
	Issuer string
}

func (c Config) check() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(c.Endpoints) == 0 {
		wrong("no endpoints: name at least one, such as https://etcd-1:2379")
	}
	for i, endpoint := range c.Endpoints {
		// The value is not repeated: it may hold a password that does not belong there.
		if !strings.Contains(endpoint, "://") {
			endpoint = "bare://" + endpoint
		}
		u, err := url.Parse(endpoint)
		switch {
		case err != nil || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "":
			wrong("endpoint %d is not of the form https://host:port (user and password have fields of their own)", i+1)
		case u.Scheme == "http" && c.TLS != nil:
			wrong("endpoint %d is http, but TLS is set: use https", i+1)
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
	if c.Issuer == "" {
		wrong("no issuer: set that of the super tenant, as the service's RESCIND_ISSUER does")
	}
	return errors.Join(errs...)
}

const (
	// dialTimeout bounds each attempt to connect.
	dialTimeout = 5 * time.Second
	// requestTimeout bounds each request.
	requestTimeout = 10 * time.Second
)

// Etcd is a [replica.Source] of revocations only, and a [replica.Feed], which may stand beside
// another source. Make one with [New], and Close it. Load and Follow may run at the same time.
type Etcd struct {
	cfg     Config
	folders []string
	foreign atomic.Uint64

	dialing chan struct{} // held while client is made
	client  atomic.Pointer[clientv3.Client]

	// page is how many entries are read at once: for each read etcd counts all that are left of
	// the folder, and all of a page is in memory.
	page int64
	// silence is how long the watch may tell nothing. Heartbeats are a second apart, but a cluster
	// may be without a leader for a few seconds, and beginning anew may cost a load.
	silence time.Duration
}

var (
	_ replica.Source = (*Etcd)(nil)
	_ replica.Feed   = (*Etcd)(nil)
)

// New checks cfg. It does not connect.
func New(cfg Config) (*Etcd, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("configure etcd feed: %w", err)
	}
	return &Etcd{
		cfg: cfg, folders: directory.Folders(cfg.Prefix), dialing: make(chan struct{}, 1), page: 10_000, silence: 10 * time.Second,
	}, nil
}

// Close ends the connection. Load and Follow must have returned.
func (e *Etcd) Close() error {
	c := e.client.Swap(nil)
	if c == nil {
		return nil
	}
	if err := c.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("close etcd client: %w", err)
	}
	return nil
}

// Foreign is how many keys were passed over so far because they are no entries, although they lie
// where entries do. The service removes such keys; if there are always new ones, somebody else
// writes to the directory.
func (e *Etcd) Foreign() uint64 { return e.foreign.Load() }

// connect returns the client, and makes it if there is none. With a user name that needs an answer
// of the cluster.
func (e *Etcd) connect(ctx context.Context) (*clientv3.Client, error) {
	select {
	case e.dialing <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-e.dialing }()
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
		DialTimeout:          dialTimeout,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		MaxUnaryRetries:      3,            // they are all reads; also when the token is no longer good
		Logger:               zap.NewNop(), // what matters comes back as an error
		DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{
				// gRPC would wait for up to two minutes, also when etcd has long been back.
				Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
				MinConnectTimeout: dialTimeout,
			}),
			grpc.WithChainUnaryInterceptor(failFast),
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

// failFast makes a request fail at once, with the reason, while there is no connection. The
// client's own way is to wait, and then to say only that it did.
func failFast(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(ctx, method, req, reply, cc, append(opts, grpc.WaitForReady(false))...)
}

// bounded gives one request its time, and says in its error which one failed and how.
func bounded[T any](ctx context.Context, what string, request func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, requestTimeout, fmt.Errorf("no answer within %s", requestTimeout))
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

// The reasons for which a directory cannot be used, for now.
var (
	errBuilding = errors.New("the etcd directory is not ready: the service is building it")
	errHistory  = errors.New("the etcd directory was built anew, or etcd has lost data")
)

// marks are what the directory says of itself, at one revision.
type marks struct {
	revision     int64
	stream, beat mark
	at           revocation.Position // where the directory stands
	heartbeat    directory.Heartbeat // of the same epoch
}

// mark tells one state of a key from every other.
type mark struct{ created, version int64 }

// follows notes the state of the mark's key that kv is, and reports whether it comes right
// after the last one.
func (m *mark) follows(kv *mvccpb.KeyValue) bool {
	last := *m
	*m = mark{kv.CreateRevision, kv.Version}
	return m.created == last.created && m.version == last.version+1
}

// marks reads them at a revision, or now if that is 0.
func (e *Etcd) marks(ctx context.Context, client *clientv3.Client, revision int64) (marks, error) {
	get := func(key string) clientv3.Op { return clientv3.OpGet(key, clientv3.WithRev(revision)) }
	resp, err := bounded(ctx, "read where the etcd directory stands", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return client.Txn(ctx).Then(get(directory.StreamKey(e.cfg.Prefix)), get(directory.HeartbeatKey(e.cfg.Prefix))).Commit()
	})
	if err != nil {
		return marks{}, err
	}
	m := marks{revision: revision}
	if revision == 0 {
		m.revision = resp.Header.Revision
	}
	stream, beat := resp.Responses[0].GetResponseRange().Kvs, resp.Responses[1].GetResponseRange().Kvs
	if len(stream) == 0 {
		return m, errBuilding
	}
	if len(beat) == 0 {
		return m, errors.New("the etcd directory has no heartbeat yet: the service has only just begun, or is older than this program")
	}
	m.stream, m.beat = mark{stream[0].CreateRevision, stream[0].Version}, mark{beat[0].CreateRevision, beat[0].Version}
	if m.at, err = directory.ParseStream(stream[0].Value); err != nil {
		return m, err
	}
	if m.heartbeat, err = directory.ParseHeartbeat(beat[0].Value); err != nil {
		return m, err
	}
	if m.heartbeat.Epoch != m.at.Epoch {
		return m, errors.New("the etcd directory has no heartbeat of its epoch yet")
	}
	return m, e.ours(m.heartbeat)
}

// ours returns an error if the heartbeat is of another service.
func (e *Etcd) ours(h directory.Heartbeat) error {
	if h.Source == e.cfg.Issuer {
		return nil
	}
	return fmt.Errorf("the etcd directory below %q is that of issuer %q, not of %q: prefix and issuer must be the service's "+
		"RESCIND_ETCD_PREFIX and RESCIND_ISSUER", e.cfg.Prefix, h.Source, e.cfg.Issuer)
}

// entry reads an entry. Where it names another issuer than its place does, the service's issuer was
// changed a moment ago, and it has not moved yet.
func (e *Etcd) entry(kv *mvccpb.KeyValue) (directory.Entry, bool) {
	key := string(kv.Key)
	if entry, err := directory.Parse(e.cfg.Prefix, e.cfg.Issuer, key, kv.Value); err == nil {
		return entry, true
	}
	var named struct {
		Iss string `json:"iss"`
	}
	_ = json.Unmarshal(kv.Value, &named) // Parse finds what is wrong
	for _, source := range []string{named.Iss, ""} {
		if entry, err := directory.Parse(e.cfg.Prefix, source, key, kv.Value); err == nil {
			return entry, true
		}
	}
	for _, folder := range e.folders {
		if strings.HasPrefix(key, folder) {
			e.foreign.Add(1)
		}
	}
	return directory.Entry{}, false
}

func record(entry directory.Entry) replica.Record {
	return replica.Record{Target: entry.Target, Exp: entry.Exp, NotAfter: entry.NotAfter}
}

// Load implements [replica.Source]: the state is that of the directory at one revision, with
// revocations only. It fails while the directory is being built.
func (e *Etcd) Load(ctx context.Context, s *replica.State) error {
	client, err := e.connect(ctx)
	if err != nil {
		return err
	}
	m, err := e.marks(ctx, client, 0)
	if err != nil {
		return err
	}
	return s.Load(m.at, func(l *replica.Loader) error {
		l.RevocationsOnly()
		for _, folder := range e.folders {
			if err := e.loadFolder(ctx, client, folder, m.revision, l); err != nil {
				return err
			}
		}
		// A revision is a number. That it was the same one all the time, its marks tell.
		again, err := e.marks(ctx, client, m.revision)
		if err == nil && again != m {
			err = errHistory
		}
		return err
	})
}

func (e *Etcd) loadFolder(ctx context.Context, client *clientv3.Client, folder string, revision int64, l *replica.Loader) error {
	for from, more := folder, true; more; {
		resp, err := bounded(ctx, "read the etcd directory", func(ctx context.Context) (*clientv3.GetResponse, error) {
			return client.Get(ctx, from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(folder)), clientv3.WithLimit(e.page), clientv3.WithRev(revision))
		})
		if err != nil {
			return err
		}
		for _, kv := range resp.Kvs {
			if entry, ok := e.entry(kv); ok {
				l.Revocation(record(entry))
			}
		}
		if more = resp.More; more {
			if len(resp.Kvs) == 0 {
				return errors.New("read the etcd directory: an empty page that is not the last")
			}
			from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
		}
	}
	return nil
}

// Events implements [replica.Source]. The directory has no events: its error is [replica.ErrGone].
func (e *Etcd) Events(context.Context, revocation.Position) (replica.Page, error) {
	return replica.Page{}, replica.ErrGone
}

// Name implements [replica.Feed]. It is "etcd".
func (e *Etcd) Name() string { return "etcd" }

// Follow implements [replica.Feed]. It tells what is revoked, and heartbeats, which it tells also
// when the directory has come further.
func (e *Etcd) Follow(ctx context.Context, _ func() revocation.Position, to replica.Receiver) error {
	client, err := e.connect(ctx)
	if err != nil {
		return err
	}
	m, err := e.marks(ctx, client, 0)
	if err != nil {
		return err
	}
	watching, end := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer end()
	s := &session{Etcd: e, marks: m, to: to, updates: client.Watch(watching, e.cfg.Prefix+"/",
		clientv3.WithPrefix(), clientv3.WithRev(m.revision+1), clientv3.WithCreatedNotify(), clientv3.WithFilterDelete())}
	if err := s.begin(ctx); err != nil {
		return err
	}
	if err := to.Connected(ctx); err != nil {
		return err
	}
	return s.follow(ctx)
}

// session is a watch, and what the directory has said of itself up to where the watch has come.
type session struct {
	*Etcd
	marks
	to      replica.Receiver
	updates clientv3.WatchChan
	live    bool // a heartbeat was seen to be written
}

// begin waits until the watch stands. Whoever may not watch learns it here, before it has loaded
// everything in vain.
func (s *session) begin(ctx context.Context) error {
	limit := time.NewTimer(requestTimeout)
	defer limit.Stop()
	r, err := s.next(ctx, limit.C)
	if err == nil && !r.Created {
		err = errors.New("watch the etcd directory: the watch was not confirmed first")
	}
	return err
}

func (s *session) follow(ctx context.Context) error {
	silence := time.NewTimer(s.silence)
	defer silence.Stop()
	for {
		r, err := s.next(ctx, silence.C)
		if err == nil {
			err = s.take(ctx, r)
		}
		if err != nil {
			return err
		}
		if len(r.Events) > 0 {
			silence.Reset(s.silence) // what to does with an update takes the time that it needs
		}
	}
}

// next waits for an update.
func (s *session) next(ctx context.Context, limit <-chan time.Time) (clientv3.WatchResponse, error) {
	select {
	case r, ok := <-s.updates:
		switch {
		case ctx.Err() != nil:
			return r, context.Cause(ctx)
		case !ok:
			return r, errors.New("watch the etcd directory: the watch has ended")
		case r.Err() != nil:
			return r, fmt.Errorf("watch the etcd directory: %w", r.Err())
		}
		return r, nil
	case <-limit:
		return clientv3.WatchResponse{}, errors.New("watch the etcd directory: nothing came for too long, not even a heartbeat: " +
			"etcd has no leader, or the service is down or does not reach it")
	case <-ctx.Done():
		return clientv3.WatchResponse{}, context.Cause(ctx)
	}
}

// take tells what has changed. An update has all changes of one revision, or of several. Entries are
// told at once, and where the directory stands once all are told.
func (s *session) take(ctx context.Context, r clientv3.WatchResponse) error {
	news := false
	for _, event := range r.Events {
		switch kv := event.Kv; string(kv.Key) {
		case directory.RebuildKey(s.cfg.Prefix):
			return errBuilding
		case directory.StreamKey(s.cfg.Prefix):
			at, err := directory.ParseStream(kv.Value)
			if err != nil {
				return err
			}
			if !s.stream.follows(kv) || at.Epoch != s.at.Epoch || at.Seq < s.at.Seq {
				return errHistory
			}
			s.at, news = at, true
		case directory.HeartbeatKey(s.cfg.Prefix):
			h, err := directory.ParseHeartbeat(kv.Value)
			if err != nil {
				return err
			}
			if !s.beat.follows(kv) || h.Epoch != s.at.Epoch {
				return errHistory
			}
			if err := s.ours(h); err != nil {
				return err
			}
			s.heartbeat, s.live, news = h, true, true
		default:
			if entry, ok := s.entry(kv); ok {
				s.to.Revoked(record(entry), revocation.Position{Epoch: s.at.Epoch, Seq: entry.Seq})
			}
		}
	}
	if !news || !s.live {
		return nil
	}
	return s.to.Heartbeat(ctx, replica.Beat{
		Position: s.at, Head: max(s.heartbeat.Head, s.at.Seq), Time: s.heartbeat.Time, RevocationsOnly: true,
	})
}
