package sink

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/stacktest"
)

const (
	etcdTestSource = "https://km.example.com"
	etcdTestOther  = "https://login.example.org/realms/a"
	etcdTestEpoch  = revocation.Epoch("3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10")
	etcdTestEpoch2 = revocation.Epoch("5e1f4a90-0c3b-4a77-8f0e-2b9d8c7a6e51")

	// etcdTestLimit bounds every wait of these tests.
	etcdTestLimit = 30 * time.Second
)

// fakeLog is a State in memory, and the log that goes with it.
type fakeLog struct {
	mu     sync.Mutex
	epoch  revocation.Epoch
	events []revocation.Event
	rows   map[revocation.Target]fakeRow
	byID   []revocation.Target // also those that are no longer in rows
	oldest revocation.Seq
	// onPage, if set, is called before each page is read.
	onPage   func()
	onLookup func() // the same for what is looked up
	imported []revocation.Target
	fail     atomic.Pointer[error] // of reading pages
}

type fakeRow struct {
	directory.Stored
	seq revocation.Seq
}

func newFakeLog() *fakeLog {
	return &fakeLog{epoch: etcdTestEpoch, rows: make(map[revocation.Target]fakeRow), oldest: 1}
}

// revoke commits rs and returns their events.
func (l *fakeLog) revoke(rs ...revocation.Revocation) []revocation.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := time.Now()
	before := len(l.events)
	for _, r := range rs {
		seq := revocation.Seq(len(l.events)) + 1
		row, ok := l.rows[r.Target]
		if !ok {
			r.ID = fakeID(len(l.byID))
			l.byID = append(l.byID, r.Target)
			r.Tenant = revocation.SuperTenant
			if r.Target.Kind == revocation.KindTenant {
				r.Tenant = revocation.Tenant{ID: 7, Domain: r.Target.ID}
			}
			row.Stored = directory.Stored{Revocation: r, At: at}
		}
		row.Exp, row.NotAfter, row.seq = max(row.Exp, r.Exp), max(row.NotAfter, r.NotAfter), seq
		l.rows[r.Target] = row
		e, err := revocation.NewEvent(row.Revocation)
		if err != nil {
			panic(err) // all its parts can be encoded
		}
		e.Position, e.Previous, e.Source, e.Time = revocation.Position{Epoch: l.epoch, Seq: seq}, seq-1, etcdTestSource, at
		l.events = append(l.events, e)
	}
	return slices.Clone(l.events[before:])
}

// after returns all events after seq.
func (l *fakeLog) after(seq revocation.Seq) []revocation.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.events[seq:])
}

// restore takes the log back to seq.
func (l *fakeLog) restore(seq revocation.Seq, epoch revocation.Epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.events, l.epoch = l.events[:seq], epoch
	maps.DeleteFunc(l.rows, func(_ revocation.Target, r fakeRow) bool { return r.seq > seq })
}

func (l *fakeLog) Head(context.Context) (revocation.Position, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return revocation.Position{Epoch: l.epoch, Seq: revocation.Seq(len(l.events))}, nil
}

func (l *fakeLog) Oldest(context.Context) (revocation.Seq, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.oldest, nil
}

func (l *fakeLog) Page(ctx context.Context, after string, limit int) ([]directory.Stored, error) {
	if l.onPage != nil {
		l.onPage()
	}
	if err := l.fail.Load(); err != nil {
		return nil, *err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.live(after, limit), ctx.Err()
}

// live needs l.mu.
func (l *fakeLog) live(after string, limit int) []directory.Stored {
	var live []directory.Stored
	first := sort.Search(len(l.byID), func(i int) bool { return fakeID(i) > after })
	for i, target := range l.byID[first:] {
		r, ok := l.rows[target]
		if ok && r.ID == fakeID(first+i) && !etcdDead(r.Exp, time.Now()) {
			live = append(live, r.Stored)
		}
		if len(live) == limit {
			break
		}
	}
	return live
}

func fakeID(n int) string { return fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012x", n) }

func (l *fakeLog) Lookup(ctx context.Context, targets []revocation.Target) ([]directory.Stored, error) {
	if l.onLookup != nil {
		l.onLookup()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []directory.Stored
	for _, target := range targets {
		if r, ok := l.rows[target]; ok && !etcdDead(r.Exp, time.Now()) {
			found = append(found, r.Stored)
		}
	}
	return found, ctx.Err()
}

func (l *fakeLog) Import(ctx context.Context, rs []revocation.Revocation) error {
	l.revoke(rs...)
	for _, r := range rs {
		l.imported = append(l.imported, r.Target)
	}
	return ctx.Err()
}

// etcdTest is a directory of one test's own.
type etcdTest struct {
	testing.TB
	cfg    EtcdConfig
	client *clientv3.Client // not the sink's
	log    *fakeLog
	logged *syncBuffer // what the sinks log
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newEtcdTest(t testing.TB) *etcdTest {
	t.Helper()
	return newEtcdTestAt(t, stacktest.Shared(t).EtcdEndpoints)
}

func newEtcdTestAt(t testing.TB, endpoints []string) *etcdTest {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	prefix := stacktest.EtcdPrefix(t)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), etcdTestLimit)
		defer cancel()
		_, _ = client.Delete(ctx, prefix, clientv3.WithPrefix()) // spares the others' memory, if it is still there
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return &etcdTest{
		TB: t, client: client, log: newFakeLog(), logged: new(syncBuffer),
		cfg: EtcdConfig{Endpoints: endpoints, Prefix: prefix, Source: etcdTestSource, RequestTimeout: 20 * time.Second},
	}
}

func (et *etcdTest) sink() *Etcd {
	et.Helper()
	e, err := NewEtcd(et.cfg, et.log, slog.New(slog.NewTextHandler(et.logged, nil)))
	if err != nil {
		et.Fatal(err)
	}
	et.Cleanup(e.Close)
	return e
}

// opened returns a sink that stands at the head of an empty log, or wherever the
// directory does.
func (et *etcdTest) opened() *Etcd {
	et.Helper()
	e := et.sink()
	et.open(e)
	return e
}

func (et *etcdTest) open(e *Etcd) revocation.Seq {
	et.Helper()
	seq, err := e.Open(et.Context(), revocation.Position{Epoch: et.log.epoch})
	if err != nil {
		et.Fatalf("open: %v", err)
	}
	return seq
}

func (et *etcdTest) deliver(e *Etcd, events []revocation.Event) {
	et.Helper()
	if err := e.Deliver(et.Context(), events); err != nil {
		et.Fatalf("deliver: %v", err)
	}
}

func (et *etcdTest) key(target revocation.Target) string {
	return directory.Key(et.cfg.Prefix, et.cfg.Source, target)
}

func (et *etcdTest) hand(ops ...clientv3.Op) {
	et.Helper()
	for _, op := range ops {
		if _, err := et.client.Do(et.Context(), op); err != nil {
			et.Fatalf("change the directory by hand: %v", err)
		}
	}
}

func (et *etcdTest) lease(ttl time.Duration) clientv3.LeaseID {
	et.Helper()
	resp, err := et.client.Grant(et.Context(), int64(ttl/time.Second))
	if err != nil {
		et.Fatal(err)
	}
	return resp.ID
}

// revisionOf is when key was last written, 0 if it is absent.
func (et *etcdTest) revisionOf(key string) int64 {
	et.Helper()
	resp, err := et.client.Get(et.Context(), key)
	if err != nil {
		et.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return 0
	}
	return resp.Kvs[0].ModRevision
}

// stream is what the stream key says; zero if it is absent.
func (et *etcdTest) stream() revocation.Position {
	et.Helper()
	resp, err := et.client.Get(et.Context(), directory.StreamKey(et.cfg.Prefix))
	if err != nil {
		et.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return revocation.Position{}
	}
	p, err := directory.ParseStream(resp.Kvs[0].Value)
	if err != nil {
		et.Fatal(err)
	}
	return p
}

// problems are the differences between the directory and what the state has.
func (et *etcdTest) problems() []string {
	et.Helper()
	et.log.mu.Lock()
	live := et.log.live("", math.MaxInt)
	rows, head := maps.Clone(et.log.rows), revocation.Seq(len(et.log.events))
	et.log.mu.Unlock()
	missing := make(map[string]fakeRow)
	for _, s := range live {
		missing[et.key(s.Target)] = rows[s.Target]
	}
	var problems []string
	report := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	leases := make(map[int64]int64)
	for _, folder := range directory.Folders(et.cfg.Prefix) {
		resp, err := et.client.Get(et.Context(), folder, clientv3.WithPrefix())
		if err != nil {
			et.Fatal(err)
		}
		for _, kv := range resp.Kvs {
			row, ok := missing[string(kv.Key)]
			if !ok {
				report("%s has no place in the directory: %s", kv.Key, kv.Value)
				continue
			}
			delete(missing, string(kv.Key))
			e, err := directory.Parse(et.cfg.Prefix, et.cfg.Source, string(kv.Key), kv.Value)
			if err != nil {
				report("%s cannot be read: %s", kv.Key, kv.Value)
				continue
			}
			if e.Target != row.Target || e.Exp != row.Exp || e.NotAfter != row.NotAfter {
				report("%s is %s, want exp %d, not_after %d of %+v", kv.Key, kv.Value, row.Exp, row.NotAfter, row.Target)
			}
			if e.Seq < row.seq || e.Seq > head {
				report("%s has seq %d, want from %d to %d", kv.Key, e.Seq, row.seq, head)
			}
			if _, ok := leases[kv.Lease]; !ok && kv.Lease != 0 {
				ttl, err := et.client.TimeToLive(et.Context(), clientv3.LeaseID(kv.Lease))
				if err != nil {
					et.Fatal(err)
				}
				leases[kv.Lease] = ttl.TTL
			}
			left := row.Exp + 120 - time.Now().Unix()
			if ttl := leases[kv.Lease]; ttl < left || ttl > left+2*etcdBucket {
				report("%s has a lease of %d s, want %d and little more", kv.Key, ttl, left)
			}
		}
	}
	for key := range missing {
		report("%s is missing", key)
	}
	return problems
}

// wantRight wants the directory to say what the state does.
func (et *etcdTest) wantRight() {
	et.Helper()
	if problems := et.problems(); len(problems) > 0 {
		et.Fatalf("the directory is wrong:\n%s", strings.Join(problems[:min(20, len(problems))], "\n"))
	}
}

// awaitRight waits until the directory says what the state does.
func (et *etcdTest) awaitRight() {
	et.Helper()
	var problems []string
	et.await("the directory is wrong", func() bool {
		problems = et.problems()
		return len(problems) == 0
	}, func() string { return strings.Join(problems[:min(20, len(problems))], "\n") })
}

func (et *etcdTest) await(what string, done func() bool, detail func() string) {
	et.Helper()
	limit := time.After(etcdTestLimit)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-limit:
			et.Fatalf("after %s: %s\n%s\nlog:\n%s", etcdTestLimit, what, detail(), et.logged)
		}
	}
}

func (et *etcdTest) wantStream(want revocation.Position) {
	et.Helper()
	if diff := cmp.Diff(want, et.stream()); diff != "" {
		et.Fatalf("stream key (-want +got):\n%s", diff)
	}
}

// tokens are n revocations of tokens that live for an hour, numbered from first.
func tokens(first, n int) []revocation.Revocation {
	rs := make([]revocation.Revocation, n)
	for i := range rs {
		rs[i] = revocation.Revocation{
			Target: revocation.Target{Kind: revocation.KindToken, Iss: etcdTestSource, ID: fmt.Sprintf("token-%06d", first+i)},
			Exp:    time.Now().Unix() + 3600,
		}
	}
	return rs
}

// oneOfEach has every kind, of both issuers.
func oneOfEach() []revocation.Revocation {
	exp := time.Now().Unix() + 600
	var rs []revocation.Revocation
	for _, iss := range []string{etcdTestSource, etcdTestOther} {
		rs = append(rs,
			revocation.Revocation{Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "one jti/of both"}, Exp: exp},
			revocation.Revocation{Target: revocation.DigestTarget(iss, "a.b"), Exp: exp, Signature: "c"},
			revocation.Revocation{Target: revocation.Target{Kind: revocation.KindSession, Iss: iss, ID: "s1"}, Exp: exp},
			revocation.Revocation{Target: revocation.Target{Kind: revocation.KindKey, Iss: iss, ID: "k1"}, Exp: exp},
			revocation.Revocation{Target: revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "c1"}, Exp: exp, NotAfter: exp - 600},
			revocation.Revocation{Target: revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "ü@x"}, Exp: exp, NotAfter: exp - 600},
		)
	}
	return append(rs, revocation.Revocation{
		Target: revocation.Target{Kind: revocation.KindTenant, ID: "acme.example"}, Exp: exp, NotAfter: exp - 600,
	})
}
