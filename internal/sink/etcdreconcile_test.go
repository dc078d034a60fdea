package sink

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
)

// reconciling makes the sinks of et compare often, and counts the pages of the
// state that they read.
func (et *etcdTest) reconciling() (pages *atomic.Int64) {
	pages = new(atomic.Int64)
	et.cfg.ReconcileEvery = 100 * time.Millisecond
	et.log.onPage = func() { pages.Add(1) }
	return pages
}

func (et *etcdTest) awaitPages(pages *atomic.Int64, more int64) {
	et.Helper()
	want := pages.Load() + more
	et.await("the reconciler does not go on", func() bool { return pages.Load() >= want },
		func() string { return fmt.Sprintf("%d pages, want %d", pages.Load(), want) })
}

func TestEtcdReconcile(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	pages := et.reconciling()
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 1200)...))
	et.deliver(e, et.log.revoke(oneOfEach()...))
	et.wantRight()

	// edited puts the entry of a token back with a change and a sound lease.
	sound := et.lease(2 * time.Hour)
	n := 0
	edited := func(change func(*directory.Entry)) clientv3.Op {
		n++
		row := et.log.rows[tokens(n, 1)[0].Target]
		entry := directory.Entry{Target: row.Target, Exp: row.Exp, NotAfter: row.NotAfter, Seq: row.seq, At: row.At}
		change(&entry)
		return clientv3.OpPut(et.key(row.Target), entry.Value(), clientv3.WithLease(sound))
	}
	valued := func(target revocation.Target, value string) clientv3.Op {
		return clientv3.OpPut(et.key(target), value, clientv3.WithLease(sound))
	}
	each := oneOfEach()
	extra := revocation.Target{Kind: revocation.KindSubject, Iss: etcdTestOther, ID: "not revoked"}
	leased := func(ttl time.Duration) clientv3.Op {
		op := edited(func(*directory.Entry) {})
		return clientv3.OpPut(string(op.KeyBytes()), string(op.ValueBytes()), clientv3.WithLease(et.lease(ttl)))
	}
	unleased := edited(func(*directory.Entry) {})
	ops := []clientv3.Op{
		clientv3.OpDelete(et.key(tokens(500, 1)[0].Target)),
		clientv3.OpDelete(et.key(tokens(1100, 1)[0].Target)),
		edited(func(e *directory.Entry) { e.Exp -= 600 }),
		edited(func(e *directory.Entry) { e.Exp += 600 }),
		edited(func(e *directory.Entry) { e.NotAfter = 1 }),
		edited(func(e *directory.Entry) { e.Seq = 0 }),
		edited(func(e *directory.Entry) { e.Seq = 1 << 40 }),
		edited(func(e *directory.Entry) { e.Target.Iss = etcdTestOther }),
		valued(each[1].Target, "{}"),
		valued(each[7].Target, `{"iss":"`+etcdTestSource+`","exp":9999999999,"seq":1,"at":1}`),
		valued(each[12].Target, ""),
		clientv3.OpPut(string(unleased.KeyBytes()), string(unleased.ValueBytes())),
		leased(time.Minute),
		leased(time.Hour),
		valued(extra, directory.Entry{Target: extra, Exp: time.Now().Unix() + 60, Seq: 1}.Value()),
		clientv3.OpPut(et.cfg.Prefix+"/users/not%20ours", "x"),
		clientv3.OpPut(et.cfg.Prefix+"/jti/", "x"),
		clientv3.OpPut(et.cfg.Prefix+"/issuers/abc/def/ghi", "x"),
		clientv3.OpPut(et.cfg.Prefix+"/digests/xyz", directory.Entry{Exp: 1 << 40, Seq: 1}.Value()),
		clientv3.OpPut(et.cfg.Prefix+"/other/a", "not ours"),
		clientv3.OpPut(et.cfg.Prefix+"/rescind/notes", "not ours"),
	}
	for i := range 300 {
		ops = append(ops, clientv3.OpPut(fmt.Sprintf("%s/sessions/added-%d", et.cfg.Prefix, i), "{}"))
	}
	if err := et.beat(e); err != nil {
		t.Fatal(err)
	}
	et.hand(ops...)
	et.awaitRight()
	for _, key := range []string{"/other/a", "/rescind/notes", "/rescind/heartbeat"} {
		if et.revisionOf(et.cfg.Prefix+key) == 0 {
			t.Errorf("%s was removed, although it is in no folder of ours", key)
		}
	}
	if !strings.Contains(et.logged.String(), "repaired the etcd directory") {
		t.Errorf("the repair was not logged:\n%s", et.logged)
	}
	et.deliver(e, et.log.revoke(tokens(5000, 3)...))
	et.wantRight()
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 1216})

	// What is right is left alone.
	et.awaitPages(pages, 4)
	untouched := et.revisions()
	et.awaitPages(pages, 4)
	for key, rev := range et.revisions() {
		if untouched[key] != rev {
			t.Errorf("%s was written although it was right", key)
		}
	}
}

// revisions are those of all keys of the directory.
func (et *etcdTest) revisions() map[string]int64 {
	et.Helper()
	resp, err := et.client.Get(et.Context(), et.cfg.Prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		et.Fatal(err)
	}
	revisions := make(map[string]int64)
	for _, kv := range resp.Kvs {
		revisions[string(kv.Key)] = kv.ModRevision
	}
	return revisions
}

func TestEtcdReconcileAtOpen(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 1500)...))
	e.Close()
	et.hand(clientv3.OpDelete(et.cfg.Prefix+"/jti/token-0001", clientv3.WithPrefix()))
	et.open(e) // with five minutes to the second comparison
	et.awaitRight()
}

// Revocations whose events are on their way are neither put early nor removed.
func TestEtcdReconcileUnderLoad(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	pages := et.reconciling()
	e := et.opened()
	for i := range 150 {
		events := et.log.revoke(tokens(20*i, 20)...)
		if i%30 == 0 {
			et.awaitPages(pages, 1)
		}
		for len(events) > 0 {
			et.deliver(e, events[:5])
			events = events[5:]
		}
	}
	et.awaitPages(pages, 8) // at least one whole comparison
	et.wantRight()
	for _, folder := range directory.Folders(et.cfg.Prefix) {
		resp, err := et.client.Get(t.Context(), folder, clientv3.WithPrefix())
		if err != nil {
			t.Fatal(err)
		}
		for _, kv := range resp.Kvs {
			entry, err := directory.Parse(et.cfg.Prefix, et.cfg.Source, string(kv.Key), kv.Value)
			if err != nil {
				t.Fatal(err)
			}
			if want := et.log.rows[entry.Target].seq; entry.Seq != want {
				t.Errorf("%s has seq %d, want %d of its event: it was put early", kv.Key, entry.Seq, want)
			}
		}
	}
	if strings.Contains(et.logged.String(), "repaired") {
		t.Errorf("there was nothing to repair:\n%s", et.logged)
	}
}

// A log that was restored lacks what the directory has; that is no reason to remove it.
func TestEtcdReconcileRestored(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		at   func(*fakeLog) *func() // which question is the first that finds it restored
	}{
		{name: "while the state is compared", at: func(l *fakeLog) *func() { return &l.onPage }},
		{name: "while the directory is compared", at: func(l *fakeLog) *func() { return &l.onLookup }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			et := newEtcdTest(t)
			e := et.opened()
			et.deliver(e, et.log.revoke(tokens(0, 1500)...))
			*tt.at(et.log) = sync.OnceFunc(func() { et.log.restore(700, etcdTestEpoch) })
			et.open(e) // with a comparison at once
			var err error
			et.await("the restored log is not noticed", func() bool {
				err = e.Deliver(t.Context(), nil)
				return err != nil
			}, func() string { return "" })
			if !errors.Is(err, relay.ErrRestored) {
				t.Errorf("err is %v, want %v", err, relay.ErrRestored)
			}
			if problems := et.problems(); len(problems) != 800 {
				t.Errorf("%d entries are only in the directory, want 800", len(problems))
			}
			et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 1500})
		})
	}
}

func TestEtcdReconcileOvertaken(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	et.reconciling()
	old := et.opened()
	et.deliver(old, et.log.revoke(tokens(0, 50)...))
	young := et.opened()
	et.hand(clientv3.OpDelete(et.key(tokens(7, 1)[0].Target)))
	et.awaitRight()
	if err := et.beat(young); err != nil {
		t.Errorf("the leader's heartbeat: %v", err)
	}
	if err := et.beat(old); err == nil {
		t.Error("the overtaken leader goes on")
	}
}

// Over is over: entries that no lease removes go, without an alarm.
func TestEtcdReconcileRemovesWhatIsOver(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	et.reconciling()
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 5)...))
	now := time.Now().Unix()
	put := func(n int, exp int64, opts ...clientv3.OpOption) string {
		entry := directory.Entry{Target: tokens(n, 1)[0].Target, Exp: exp, Seq: 1}
		et.hand(clientv3.OpPut(et.key(entry.Target), entry.Value(), opts...))
		return et.key(entry.Target)
	}
	unleased := put(900, now-200)
	late := put(901, now-600, clientv3.WithLease(et.lease(time.Hour)))
	soon := put(902, now-130, clientv3.WithLease(et.lease(time.Minute)))
	et.await("what is over is still there", func() bool { return et.revisionOf(unleased) == 0 && et.revisionOf(late) == 0 },
		func() string { return strings.Join(et.problems(), "\n") })
	if et.revisionOf(soon) == 0 {
		t.Error("an entry was removed that its lease is about to end")
	}
	if strings.Contains(et.logged.String(), "repaired") {
		t.Errorf("it was logged as a repair:\n%s", et.logged)
	}
}

func TestEtcdReconcileGoesOnAfterFailure(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	et.reconciling()
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 20)...))
	failures := errors.New("the database is away")
	et.log.fail.Store(&failures)
	et.hand(clientv3.OpDelete(et.key(tokens(3, 1)[0].Target)))
	et.await("the failure is not logged", func() bool { return strings.Contains(et.logged.String(), "the database is away") },
		func() string { return "" })
	et.deliver(e, et.log.revoke(tokens(20, 5)...)) // which needs no database
	et.log.fail.Store(nil)
	et.awaitRight()
}
