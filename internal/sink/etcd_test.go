package sink

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/relaytest"
)

func TestEtcdConfig(t *testing.T) {
	t.Parallel()
	good := EtcdConfig{Endpoints: []string{"http://127.0.0.1:2379"}, Source: etcdTestSource}
	tests := []struct {
		name   string
		change func(*EtcdConfig)
		want   []string
	}{
		{name: "good", change: func(*EtcdConfig) {}},
		{name: "bare address", change: func(c *EtcdConfig) { c.Endpoints = []string{"etcd-1:2379", "[::1]:2379"} }},
		{name: "TLS", change: func(c *EtcdConfig) { c.Endpoints, c.TLS = []string{"https://etcd-1:2379"}, &tls.Config{} }},
		{
			name: "all at once",
			change: func(c *EtcdConfig) {
				*c = EtcdConfig{
					Username: "u", Prefix: "a/", MaxTxnOps: 1, KeysPerLease: -1, RequestTimeout: 1, ReconcileEvery: -1,
				}
			},
			want: []string{
				"no endpoints", "user name and password", `prefix "a/"`, "no source", "operations in a transaction is 1",
				"keys on a lease is -1", "request timeout is 1ns", "pause between reconciliations is -1ns",
			},
		},
		{
			name: "endpoints",
			change: func(c *EtcdConfig) {
				c.TLS = &tls.Config{}
				c.Endpoints = []string{"https://user:hunter2@etcd-1:2379", "http://etcd-2:2379", "ftp://etcd-3", "://hunter2", "https://etcd-4:2379/hunter2"}
			},
			want: []string{"endpoint 1 is not of the form", "endpoint 2 is http, but TLS", "endpoint 3 is ftp", "endpoint 4 is not", "endpoint 5 is not"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			cfg := good
			tt.change(&cfg)
			_, err := NewEtcd(cfg, newFakeLog(), slog.New(slog.DiscardHandler))
			if len(tt.want) == 0 {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error does not mention %q: %v", want, err)
				}
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error shows the password: %v", err)
			}
		})
	}
}

func TestEtcdSuite(t *testing.T) {
	t.Parallel()
	relaytest.Sink(t, func(t *testing.T) relaytest.Far {
		et := newEtcdTest(t)
		proxy := relaytest.NewProxy(t, strings.TrimPrefix(et.cfg.Endpoints[0], "http://"))
		et.cfg.Endpoints, et.cfg.RequestTimeout = []string{"http://" + proxy.Addr()}, time.Minute
		et.log.epoch = relaytest.Epoch
		var queue []revocation.Seq
		watch := et.client.Watch(t.Context(), et.cfg.Prefix+"/jti/", clientv3.WithPrefix(), clientv3.WithFilterDelete())
		next := func(ctx context.Context) (revocation.Seq, error) {
			for len(queue) == 0 {
				select {
				case resp := <-watch:
					for _, ev := range resp.Events {
						e, err := directory.Parse(et.cfg.Prefix, et.cfg.Source, string(ev.Kv.Key), ev.Kv.Value)
						if err != nil {
							return 0, err
						}
						queue = append(queue, e.Seq)
					}
				case <-ctx.Done():
					return 0, ctx.Err()
				}
			}
			seq := queue[0]
			queue = queue[1:]
			return seq, nil
		}
		commit := func(events []revocation.Event) {
			for _, e := range events {
				if int(e.Seq) <= len(et.log.after(0)) {
					continue
				}
				r, err := e.Revocation()
				if err != nil {
					t.Fatal(err)
				}
				et.log.revoke(r)
			}
		}
		e, err := NewEtcd(et.cfg, et.log, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return relaytest.Far{Sink: e, Proxy: proxy, Next: next, Commit: commit}
	})
}

func TestEtcdDeliver(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	et.deliver(e, et.log.revoke(oneOfEach()...))
	et.deliver(e, et.log.revoke(tokens(0, 1)...))
	et.deliver(e, et.log.revoke(tokens(1, 500)...))
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 514})
	et.wantRight()

	resp, err := et.client.Get(t.Context(), et.cfg.Prefix+"/jti/token-000007")
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("read the key of a token: %v, %v", resp, err)
	}
	events := et.log.after(14 + 6)
	row := et.log.rows[tokens(7, 1)[0].Target]
	want := fmt.Sprintf(`{"iss":%q,"exp":%d,"seq":21,"at":%d}`, etcdTestSource, row.Exp, events[0].Time.UnixMilli())
	if got := string(resp.Kvs[0].Value); got != want {
		t.Errorf("value is %s, want %s", got, want)
	}
}

func TestEtcdDeliverAgain(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	events := et.log.revoke(tokens(0, 300)...)
	et.deliver(e, events[:200])
	before := et.revisionOf(directory.StreamKey(et.cfg.Prefix))
	et.deliver(e, events[:200])
	if after := et.revisionOf(directory.StreamKey(et.cfg.Prefix)); after != before {
		t.Errorf("events that were there were written again: revision %d, was %d", after, before)
	}
	et.deliver(e, events[100:])
	et.wantStream(events[299].Position)
	et.wantRight()
}

func TestEtcdOneTargetTwiceInABatch(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	rs := tokens(0, 130)
	longer := rs[3]
	longer.Exp += 4000
	rs = append(rs[:5], append([]revocation.Revocation{longer, longer}, rs[5:]...)...)
	farAway := rs[0] // lands in another transaction
	farAway.Exp += 5000
	et.deliver(e, et.log.revoke(append(rs, farAway)...))
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 133})
	et.wantRight()

	// Whatever the order, the later end stays.
	events := et.log.revoke(tokens(200, 2)...)
	events[1].Type, events[1].Data = events[0].Type, []byte(strings.Replace(string(events[0].Data), `"exp":`, `"exp":1`, 1))
	long, err := events[1].Revocation()
	if err != nil {
		t.Fatal(err)
	}
	events[0].Data, events[1].Data = events[1].Data, events[0].Data
	et.deliver(e, events)
	resp, err := et.client.Get(t.Context(), et.key(long.Target))
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("read the key: %v, %v", resp, err)
	}
	got, err := directory.Parse(et.cfg.Prefix, et.cfg.Source, string(resp.Kvs[0].Key), resp.Kvs[0].Value)
	if err != nil || got.Exp != long.Exp || got.Seq != events[1].Seq {
		t.Errorf("entry is %+v, %v, want exp %d and seq %d", got, err, long.Exp, events[1].Seq)
	}
}

func TestEtcdSkipsWhatIsOver(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	rs := tokens(0, 10)
	for i := range rs {
		rs[i].Exp = time.Now().Unix() - 121
	}
	rs[4].Exp = time.Now().Unix() - 60 // over, but a gateway with some leeway takes it
	et.deliver(e, et.log.revoke(rs...))
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 10})
	et.wantRight()
	if et.revisionOf(et.key(rs[4].Target)) == 0 {
		t.Error("a token that some gateways still take is not in the directory")
	}
	et.deliver(e, et.log.revoke(rs[0])) // a batch without any put
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 11})
}

func TestEtcdPassesOverOtherEvents(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	events := et.log.revoke(tokens(0, 3)...)
	events[1].Type, events[1].Data = "application.updated", []byte(`{}`)
	delete(et.log.rows, tokens(1, 1)[0].Target)
	et.deliver(e, events)
	et.wantStream(events[2].Position)
	et.wantRight()
}

func TestEtcdRefusesEvents(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name      string
		change    func([]revocation.Event) []revocation.Event
		permanent bool
	}{
		{name: "gap at the start", change: func(es []revocation.Event) []revocation.Event { return es[1:] }},
		{name: "gap inside", change: func(es []revocation.Event) []revocation.Event { return slices.Delete(es, 1, 2) }},
		{name: "another epoch", change: func(es []revocation.Event) []revocation.Event {
			es[2].Epoch = etcdTestEpoch2
			return es
		}},
		{name: "unknown kind", permanent: true, change: func(es []revocation.Event) []revocation.Event {
			es[2].Type = "revocation.galaxy"
			return es
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			et := newEtcdTest(t)
			e := et.opened()
			events := et.log.revoke(tokens(0, 3)...)
			err := e.Deliver(t.Context(), tt.change(slices.Clone(events)))
			if err == nil {
				t.Fatal("no error")
			}
			if permanent := strings.HasPrefix(err.Error(), relay.Permanent(errors.New("")).Error()); permanent != tt.permanent {
				t.Errorf("permanent is %t, want %t: %v", permanent, tt.permanent, err)
			}
			if err := e.Deliver(t.Context(), events); err == nil {
				t.Error("delivered after an error without Open")
			}
			et.wantStream(revocation.Position{Epoch: etcdTestEpoch})
			if seq := et.open(e); seq != 0 {
				t.Errorf("Open returns %d, want 0", seq)
			}
			et.deliver(e, events)
			et.wantRight()
		})
	}
}

func TestEtcdNotOpen(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.sink()
	if err := e.Deliver(t.Context(), et.log.revoke(tokens(0, 1)...)); err == nil {
		t.Error("delivered without Open")
	}
	if err := e.Beat(t.Context(), revocation.Heartbeat{Epoch: etcdTestEpoch}); err == nil {
		t.Error("beat without Open")
	}
	et.open(e)
	e.Close()
	if err := e.Deliver(t.Context(), et.log.after(0)); err == nil {
		t.Error("delivered after Close")
	}
	et.open(e)
	et.wantRight()
}

func (et *etcdTest) beat(e *Etcd) error {
	head, _ := et.log.Head(et.Context())
	return e.Beat(et.Context(), revocation.Heartbeat{Epoch: head.Epoch, Head: head.Seq, Time: time.Now()})
}

func (et *etcdTest) wantHeartbeat(want directory.Heartbeat) {
	et.Helper()
	resp, err := et.client.Get(et.Context(), directory.HeartbeatKey(et.cfg.Prefix))
	if err != nil || len(resp.Kvs) != 1 {
		et.Fatalf("read the heartbeat: %v, %v", resp, err)
	}
	got, err := directory.ParseHeartbeat(resp.Kvs[0].Value)
	if err != nil {
		et.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		et.Fatalf("heartbeat (-want +got):\n%s", diff)
	}
}

func TestEtcdBeat(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 5)...))
	at := time.UnixMilli(1795256400123).UTC()
	want := directory.Heartbeat{Epoch: etcdTestEpoch, Head: 9, Through: 5, Source: etcdTestSource, Time: at}
	beat := func(e *Etcd, epoch revocation.Epoch, head revocation.Seq) error {
		return e.Beat(t.Context(), revocation.Heartbeat{Epoch: epoch, Head: head, Source: "ignored", Time: at})
	}
	// The log has four events that were not delivered yet.
	et.log.revoke(tokens(5, 4)...)
	if err := beat(e, etcdTestEpoch, 9); err != nil {
		t.Fatal(err)
	}
	et.wantHeartbeat(want)
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 5})
	// A head from before the last delivery, and one of an epoch that is over: the one of
	// now is told, which was reached no earlier than at the time that is told with it.
	et.log.revoke(tokens(9, 1)...)
	want.Head = 10
	for _, stale := range []revocation.Epoch{etcdTestEpoch, etcdTestEpoch2} {
		if err := beat(e, stale, 4); err != nil {
			t.Fatal(err)
		}
		et.wantHeartbeat(want)
	}
	// Whoever is no longer the writer tells nothing.
	young := et.opened()
	if err := beat(e, etcdTestEpoch, 99); !errors.Is(err, errEtcdOvertaken) {
		t.Errorf("the old leader's heartbeat: %v, want %v", err, errEtcdOvertaken)
	}
	et.wantHeartbeat(want)
	// It is where everyone finds it after a build and a comparison.
	et.hand(clientv3.OpDelete(directory.StreamKey(et.cfg.Prefix)))
	et.open(young)
	et.wantHeartbeat(want)
	want.Through = 10
	if err := beat(young, etcdTestEpoch, 10); err != nil {
		t.Fatal(err)
	}
	et.wantHeartbeat(want)
}

func TestEtcdStaleLeader(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	old, young := et.opened(), et.sink()
	et.deliver(old, et.log.revoke(tokens(0, 10)...))
	if seq := et.open(young); seq != 10 {
		t.Errorf("the new leader goes on after %d, want 10", seq)
	}
	events := et.log.revoke(tokens(10, 10)...)
	if err := old.Deliver(t.Context(), events); !errors.Is(err, errEtcdOvertaken) {
		t.Errorf("the old leader's delivery: %v, want %v", err, errEtcdOvertaken)
	}
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 10})
	if err := et.beat(young); err != nil {
		t.Errorf("the new leader's heartbeat: %v", err)
	}
	et.deliver(young, events)
	et.wantRight()

	// It may become the leader again.
	if seq := et.open(old); seq != 20 {
		t.Errorf("the old leader goes on after %d, want 20", seq)
	}
	et.deliver(old, et.log.revoke(tokens(20, 10)...))
	if err := et.beat(young); !errors.Is(err, errEtcdOvertaken) {
		t.Errorf("the overtaken leader's heartbeat: %v, want %v", err, errEtcdOvertaken)
	}
	et.wantRight()
}

// A write arrives when another process has become the leader, and has not written yet.
func TestEtcdLateWrite(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	proxy := relaytest.NewProxy(t, strings.TrimPrefix(et.cfg.Endpoints[0], "http://"))
	direct := et.cfg.Endpoints
	et.cfg.Endpoints = []string{"http://" + proxy.Addr()}
	old := et.opened()
	et.cfg.Endpoints = direct
	events := et.log.revoke(tokens(0, 1)...)
	et.deliver(old, events)

	late := et.log.revoke(tokens(1, 2)...)
	held := proxy.Stall()
	result := make(chan error, 1)
	go func() { result <- old.Deliver(t.Context(), late) }()
	<-held
	young := et.opened()
	proxy.Heal()
	if err := <-result; !errors.Is(err, errEtcdOvertaken) {
		t.Errorf("the late write: %v, want %v", err, errEtcdOvertaken)
	}
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 1})
	et.deliver(young, late)
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 3})
	et.wantRight()
}

func TestEtcdFirstBuild(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	et.log.revoke(tokens(0, 2500)...)
	et.log.revoke(oneOfEach()...)
	over := tokens(9000, 1)[0]
	over.Exp = time.Now().Unix() - 1000
	et.log.revoke(over)
	et.hand(
		clientv3.OpPut(et.key(tokens(9001, 1)[0].Target), directory.Entry{Target: tokens(9001, 1)[0].Target, Exp: 1 << 40, Seq: 1}.Value()),
		clientv3.OpPut(et.cfg.Prefix+"/users/somebody else's", "x"),
		clientv3.OpPut(et.cfg.Prefix+"/users", "not ours"),
		clientv3.OpPut(et.cfg.Prefix+"/other/a", "not ours"),
	)
	e := et.opened()
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 2514})
	et.wantRight()
	for _, key := range []string{"/users", "/other/a"} {
		if et.revisionOf(et.cfg.Prefix+key) == 0 {
			t.Errorf("%s was removed, although it is in no folder of ours", key)
		}
	}
	et.deliver(e, et.log.revoke(tokens(3000, 5)...))
	et.wantRight()
}

// What is revoked while a build runs is not lost, and nothing that was delivered
// meanwhile is taken for foreign.
func TestEtcdBuildUnderLoad(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	et.log.revoke(tokens(0, 2500)...)
	page := 0
	et.log.onPage = func() {
		page++
		extended := tokens(page, 1)[0]
		extended.Exp += int64(page) * 1000
		et.log.revoke(append(tokens(10000*page, 200), extended)...)
	}
	e := et.sink()
	seq := et.open(e)
	et.log.onPage = nil
	if seq != 2500 {
		t.Errorf("the build stands at %d, want 2500, the head when it began", seq)
	}
	et.deliver(e, et.log.after(seq))
	et.wantRight()
}

func TestEtcdBuildInterrupted(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	et.log.revoke(tokens(0, 3500)...)
	e := et.sink()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pages := 0
	et.log.onPage = func() {
		if pages++; pages == 3 {
			cancel()
		}
	}
	if _, err := e.Open(ctx, revocation.Position{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted build: %v, want %v", err, context.Canceled)
	}
	et.log.onPage = nil
	et.wantStream(revocation.Position{})
	if len(et.problems()) == 0 {
		t.Fatal("the build was not interrupted")
	}
	// Half of it is there, with some that is revoked no more.
	gone := tokens(5, 1)[0].Target
	delete(et.log.rows, gone)
	et.open(et.sink())
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 3500})
	et.wantRight()
}

// A crash between import and the end of the build must not lose the epoch.
func TestEtcdBuildInterruptedThenRestored(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	et.log.revoke(tokens(0, 1500)...)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	et.log.onPage = cancel
	if _, err := et.sink().Open(ctx, revocation.Position{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted build: %v, want %v", err, context.Canceled)
	}
	et.log.onPage = nil
	et.log.restore(1000, etcdTestEpoch)
	if _, err := et.sink().Open(t.Context(), revocation.Position{}); !errors.Is(err, relay.ErrRestored) {
		t.Errorf("open on a restored log: %v, want %v", err, relay.ErrRestored)
	}
}

// Of two builders at once, the one that began later wins.
func TestEtcdTwoBuilders(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	et.log.revoke(tokens(0, 2500)...)
	old, young := et.sink(), et.sink()
	building, goOn := make(chan struct{}), make(chan struct{})
	result := make(chan error, 1)
	pages := 0
	et.log.onPage = func() { // of the old builder
		if pages++; pages != 2 {
			return
		}
		et.log.onPage = func() { // of the young one, which begins now
			et.log.onPage = nil
			close(building)
			<-goOn
		}
		go func() {
			_, err := young.Open(t.Context(), revocation.Position{})
			result <- err
		}()
		<-building
	}
	if _, err := old.Open(t.Context(), revocation.Position{}); !errors.Is(err, errEtcdOvertaken) {
		t.Errorf("the first builder: %v, want %v", err, errEtcdOvertaken)
	}
	et.wantStream(revocation.Position{})
	close(goOn)
	if err := <-result; err != nil {
		t.Fatalf("the second builder: %v", err)
	}
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 2500})
	et.wantRight()
	events := et.log.revoke(tokens(5000, 1)...)
	if err := old.Deliver(t.Context(), events); err == nil {
		t.Error("the first builder can deliver")
	}
	et.deliver(young, events)
	et.wantRight()
}

func TestEtcdStreamKeyRemoved(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 10)...))
	if err := et.beat(e); err != nil {
		t.Fatalf("beat: %v", err)
	}
	et.hand(clientv3.OpDelete(et.cfg.Prefix, clientv3.WithPrefix()))
	if err := et.beat(e); !errors.Is(err, errEtcdOvertaken) {
		t.Errorf("beat without a stream key: %v, want %v", err, errEtcdOvertaken)
	}
	et.open(e)
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 10})
	et.wantRight()
}

func TestEtcdStreamKeyEdited(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 10)...))
	et.hand(clientv3.OpPut(directory.StreamKey(et.cfg.Prefix), "seven"), clientv3.OpDelete(et.key(tokens(3, 1)[0].Target)))
	if err := e.Deliver(t.Context(), et.log.revoke(tokens(10, 1)...)); !errors.Is(err, errEtcdOvertaken) {
		t.Errorf("deliver past an edited stream key: %v, want %v", err, errEtcdOvertaken)
	}
	et.deliver(e, et.log.after(et.open(e)))
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 11})
	et.wantRight()
}

func TestEtcdRebuildKeyLeft(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 10)...))
	et.hand(clientv3.OpPut(directory.RebuildKey(et.cfg.Prefix), "?"), clientv3.OpDelete(et.key(tokens(3, 1)[0].Target)))
	et.open(e)
	et.wantRight()
	if et.revisionOf(directory.RebuildKey(et.cfg.Prefix)) != 0 {
		t.Error("the rebuild key is still there after a build")
	}
}

func TestEtcdLogNoLongerReachesBack(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 10)...))
	e.Close()
	et.log.revoke(tokens(10, 10)...)
	et.log.oldest = 11
	if seq := et.open(e); seq != 10 {
		t.Errorf("with the next event retained Open returns %d, want 10", seq)
	}
	et.log.oldest = 12
	if seq := et.open(e); seq != 20 {
		t.Errorf("with the next event gone Open returns %d, want 20, after a build", seq)
	}
	et.wantRight()
}

func TestEtcdEpochDiffers(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	rs := append(tokens(0, 1500), oneOfEach()...)
	nearlyOver := tokens(9000, 1)[0]
	nearlyOver.Exp = time.Now().Unix() - 60
	et.deliver(e, et.log.revoke(append(rs, nearlyOver)...))
	longer := rs[2]
	longer.Exp += 1000
	short := et.log.rows[longer.Target]
	et.deliver(e, et.log.revoke(longer))
	e.Close()

	et.log.restore(400, etcdTestEpoch2)
	et.log.rows[longer.Target] = short
	seq := et.open(e)
	if diff := cmp.Diff(1500-400+13+1+1, len(et.log.imported)); diff != "" {
		t.Errorf("imported revocations (-want +got):\n%s", diff)
	}
	if got := et.log.rows[longer.Target].Exp; got != longer.Exp {
		t.Errorf("the end of an extended revocation is %d, want %d", got, longer.Exp)
	}
	et.deliver(e, et.log.after(seq))
	head, _ := et.log.Head(t.Context())
	et.wantStream(head)
	et.wantRight()
}

func TestEtcdRestored(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 10)...))
	if err := e.Beat(t.Context(), revocation.Heartbeat{Epoch: etcdTestEpoch, Head: 9}); err != nil {
		t.Errorf("beat with a head from before the last delivery: %v", err)
	}
	et.log.restore(7, etcdTestEpoch)
	err := e.Beat(t.Context(), revocation.Heartbeat{Epoch: etcdTestEpoch, Head: 7})
	if !errors.Is(err, relay.ErrRestored) {
		t.Errorf("beat on a restored log: %v, want %v", err, relay.ErrRestored)
	}
	_, err = e.Open(t.Context(), revocation.Position{Epoch: etcdTestEpoch, Seq: 7})
	if !errors.Is(err, relay.ErrRestored) || !strings.Contains(err.Error(), "10") || !strings.Contains(err.Error(), "7") {
		t.Errorf("open on a restored log: %v, want %v with both numbers", err, relay.ErrRestored)
	}
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 10})
	if problems := et.problems(); len(problems) != 3 {
		t.Errorf("problems are %q, want the three entries that only the directory has", problems)
	}
}

func TestEtcdLive(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.opened()
	over := tokens(9000, 1)[0]
	over.Exp = time.Now().Unix() - 150
	want := oneOfEach()
	et.deliver(e, et.log.revoke(append(append(tokens(0, 2300), over), want...)...))
	et.hand(clientv3.OpPut(et.key(over.Target), directory.Entry{Target: over.Target, Exp: over.Exp, Seq: 2301}.Value()))
	et.hand(clientv3.OpPut(et.cfg.Prefix+"/users/x", "foreign"))

	reader := et.sink() // not open
	at, err := reader.Stream(t.Context())
	if err != nil || at != (revocation.Position{Epoch: etcdTestEpoch, Seq: 2314}) {
		t.Errorf("Stream = %v, %v", at, err)
	}
	read := func(above revocation.Seq) []revocation.Revocation {
		t.Helper()
		var got []revocation.Revocation
		for r, err := range reader.Live(t.Context(), above) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, r)
		}
		return got
	}
	for i := range want {
		want[i].Signature = "" // the directory does not have it
	}
	byTarget := func(rs []revocation.Revocation) map[revocation.Target]revocation.Revocation {
		m := make(map[revocation.Target]revocation.Revocation)
		for _, r := range rs {
			m[r.Target] = r
		}
		return m
	}
	if diff := cmp.Diff(byTarget(want), byTarget(read(2301))); diff != "" {
		t.Errorf("live above 2301 (-want +got):\n%s", diff)
	}
	if got := len(read(0)); got != 2313 {
		t.Errorf("%d are live, want 2313", got)
	}
	for range reader.Live(t.Context(), 0) {
		break // must not hang or panic
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range reader.Live(ctx, 0) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("err is %v, want %v", err, context.Canceled)
		}
	}
}

func TestEtcdOpenMany(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	e := et.sink()
	relaytest.NoLeaks(t)
	for i := range 10 {
		et.deliver(e, append(et.log.after(et.open(e)), et.log.revoke(tokens(i, 1)...)...))
		if i%2 == 0 {
			e.Close()
		}
	}
	e.Close()
	et.wantRight()
}
