package app_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// The service is killed again and again under load; whoever saw 200 can rely on it.
func TestKilledUnderLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var events *consumer
	var acknowledged []string
	for round := range 20 {
		s := w.spawn()
		if events == nil {
			events = w.consume(w.amqpURL, "rescind.events", "#")
		}
		l := startLoad(s, 8, fmt.Sprintf("k%d", round))
		l.awaitMore(t, 10+round*5)
		s.kill()
		acknowledged = append(acknowledged, l.stop()...)
		if wrong := l.unexpected(); len(wrong) > 0 {
			t.Errorf("round %d: %q", round, wrong)
		}
	}
	w.spawn()
	w.arrives(acknowledged, events)
}

// arrives waits until every revocation of ids is everywhere, and checks the log.
func (w *world) arrives(ids []string, events *consumer) {
	w.t.Helper()
	etcd := w.etcdClient()
	n := w.checkLog(ids)
	await(w.t, "all keys in etcd", func() bool { return hasAll(w.inEtcd(etcd), ids) })
	await(w.t, "all events on RabbitMQ", func() bool { return hasAll(events.seen(), ids) })
	await(w.t, "every event of the log on RabbitMQ", func() bool { return len(events.seen()) >= n })
}

func TestThreeProcessesOneKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var services []*service
	var loads []*load
	for i := range 3 {
		s := w.spawn()
		services = append(services, s)
		loads = append(loads, startLoad(s, 4, fmt.Sprintf("p%d", i)))
	}
	events := w.consume(w.amqpURL, "rescind.events", "#")
	for _, l := range loads {
		l.awaitMore(t, 100)
	}
	// The first one to start feeds all sinks.
	services[0].kill()
	killed := time.Now()
	cursors := func() (lowest, head revocation.Seq) {
		err := w.pool().QueryRow(t.Context(), `SELECT min(c.seq), max(h.seq) FROM rescind.sink_cursors c, rescind.log_head h`).Scan(&lowest, &head)
		if err != nil {
			t.Fatal(err)
		}
		return lowest, head
	}
	_, headThen := cursors()
	await(t, "the hand-over of all sinks", func() bool { lowest, _ := cursors(); return lowest > headThen })
	t.Logf("the hand-over took %s", time.Since(killed))
	for _, l := range loads[1:] {
		l.awaitMore(t, 100)
	}
	var acknowledged []string
	for i, l := range loads {
		acknowledged = append(acknowledged, l.stop()...)
		if wrong := l.unexpected(); len(wrong) > 0 {
			t.Errorf("process %d: %q", i, wrong)
		}
	}
	// Events before the consumer bound its queue are not on it.
	etcd := w.etcdClient()
	w.checkLog(acknowledged)
	await(t, "all keys in etcd", func() bool { return hasAll(w.inEtcd(etcd), acknowledged) })
	events.seen()
	for _, s := range services[1:] {
		if err := s.stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	}
}

// A leader that does not run, and whose host answers for it all the same, is replaced,
// and does no harm when it runs again.
func TestFrozenLeaderIsReplaced(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	leader := w.spawn()
	client, etcd := newHTTPClient(t), w.etcdClient()
	want := leader.revokeMany(client, "before", 5)
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), want) })
	events := w.consume(w.amqpURL, "rescind.events", "#")
	other := w.spawn()
	if err := leader.process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	frozen := time.Now()
	late := other.revokeMany(client, "frozen", 20)
	await(t, "the events on RabbitMQ", func() bool { return hasAll(events.seen(), late) })
	await(t, "the keys in etcd", func() bool { return hasAll(w.inEtcd(etcd), late) })
	t.Logf("the hand-over took %s", time.Since(frozen))
	if err := leader.process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	await(t, "the old leader to notice", func() bool { return strings.Count(leader.logs.String(), "no longer feeds the sink") == 3 })
	late = append(late, leader.revokeMany(client, "after", 20)...)
	want = append(want, late...)
	w.checkLog(want)
	await(t, "all keys in etcd", func() bool { return hasAll(w.inEtcd(etcd), want) })
	await(t, "the events on RabbitMQ", func() bool { return hasAll(events.seen(), late) })
}

// A service that is told to stop answers what it has accepted, and everything that
// it has answered is in the log.
func TestStopsInGoodOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.spawn()
	events := w.consume(w.amqpURL, "rescind.events", "#")
	l := startLoad(s, 16, "stop")
	l.awaitMore(t, 200)
	if err := s.stop(); err != nil {
		t.Errorf("stop: %v", err)
	}
	acknowledged := l.stop()
	logged := w.checkLog(acknowledged)
	if logged != len(acknowledged) {
		t.Errorf("the log has %d events, %d were answered with 200", logged, len(acknowledged))
	}
	if wrong := l.unexpected(); len(wrong) > 0 {
		t.Errorf("%q", wrong)
	}
	w.spawn()
	w.arrives(acknowledged, events)
}
