package app_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
)

// through puts a proxy before the server of a URL, and returns the URL through it.
func through(t *testing.T, rawURL string) (string, *relaytest.Proxy) {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	p := relaytest.NewProxy(t, u.Host)
	u.Host = p.Addr()
	return u.String(), p
}

// revokeMany revokes n tokens and returns their ids; every answer must be 200.
func (s *service) revokeMany(client *http.Client, prefix string, n int) []string {
	s.t.Helper()
	var ids []string
	for i := range n {
		id := fmt.Sprintf("%s-%d", prefix, i)
		s.mustRevoke(client, accessToken(id))
		ids = append(ids, id)
	}
	return ids
}

func TestConformanceRabbitMQAway(t *testing.T) {
	t.Parallel()
	own := stacktest.Own(t, stacktest.RabbitMQ)
	w := newWorld(t).on(own)
	direct := w.amqpURL
	var proxy *relaytest.Proxy
	w.amqpURL, proxy = through(t, direct)
	s := w.serve()
	client, etcd := newHTTPClient(t), w.etcdClient()
	events := w.consume(direct, "rescind.events", "#")
	want := s.revokeMany(client, "before", 10)
	await(t, "the first events", func() bool { return hasAll(events.seen(), want) })

	own.Stop(stacktest.RabbitMQ)
	t.Run("C032", func(t *testing.T) {
		away := s.revokeMany(client, "away", 100)
		await(t, "etcd while RabbitMQ is away", func() bool { return hasAll(w.inEtcd(etcd), away) })
		t.Run("C109", func(t *testing.T) {
			await(t, "the warning", func() bool { status, code := s.readyz(client); return status == "warn" && code == http.StatusOK })
		})
		own.Start(stacktest.RabbitMQ)
		want = append(want, away...)
		await(t, "the events of the time away", func() bool { return hasAll(events.seen(), want) })
	})

	// All queues and exchanges are gone. The consumer comes back before the service.
	proxy.Refuse()
	wiped := s.revokeMany(client, "wiped", 50)
	own.Wipe(stacktest.RabbitMQ)
	own.Start(stacktest.RabbitMQ)
	again := w.consume(direct, "rescind.events", "#.carbon_super")
	proxy.Heal()
	await(t, "the events after the wipe", func() bool { return hasAll(again.seen(), wiped) })

	// The exchange is deleted under the service's hands, and it makes it anew.
	deleteExchange(t, direct, "rescind.events")
	late := s.revokeMany(client, "late", 1)
	await(t, "the exchange", func() bool { return exchangeExists(direct, "rescind.events") })
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), late) })
	await(t, "readiness", func() bool { status, _ := s.readyz(client); return status == "pass" })
	w.checkLog(append(append(want, wiped...), late...))
}

func withChannel(rawURL string, f func(*amqp.Channel) error) error {
	conn, err := amqp.Dial(rawURL)
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	return f(ch)
}

func deleteExchange(t *testing.T, rawURL, name string) {
	t.Helper()
	if err := withChannel(rawURL, func(ch *amqp.Channel) error { return ch.ExchangeDelete(name, false, false) }); err != nil {
		t.Fatal(err)
	}
}

func exchangeExists(rawURL, name string) bool {
	return withChannel(rawURL, func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(name, "topic", true, false, false, false, nil)
	}) == nil
}

func TestConformanceEtcdAway(t *testing.T) {
	t.Parallel()
	own := stacktest.Own(t, stacktest.Etcd)
	w := newWorld(t).on(own)
	w.prefix = ""
	s := w.serve("RESCIND_ETCD_RECONCILE_INTERVAL=1s")
	client, etcd := newHTTPClient(t), w.etcdClient()
	events := w.consume(w.amqpURL, "rescind.events", "#")
	want := s.revokeMany(client, "before", 10)
	await(t, "the first keys", func() bool { return hasAll(w.inEtcd(etcd), want) })

	own.Stop(stacktest.Etcd)
	t.Run("C033", func(t *testing.T) {
		away := s.revokeMany(client, "away", 100)
		await(t, "RabbitMQ while etcd is away", func() bool { return hasAll(events.seen(), away) })
		await(t, "the warning", func() bool { status, code := s.readyz(client); return status == "warn" && code == http.StatusOK })
		own.Start(stacktest.Etcd)
		want = append(want, away...)
		await(t, "the keys of the time away", func() bool { return hasAll(w.inEtcd(etcd), want) })
	})

	own.Wipe(stacktest.Etcd)
	own.Start(stacktest.Etcd)
	await(t, "the directory after the wipe", func() bool { return hasAll(w.inEtcd(etcd), want) })

	// By hand: one key deleted, one made up, one with an earlier end.
	target := func(id string) string {
		return directory.Key("", ourISS, revocation.Target{Kind: revocation.KindToken, Iss: idpISS, ID: id})
	}
	edited := target("away-5")
	before, err := etcd.Get(t.Context(), edited)
	if err != nil || len(before.Kvs) != 1 {
		t.Fatalf("%v, %v", before, err)
	}
	_, err1 := etcd.Delete(t.Context(), target("away-3"))
	_, err2 := etcd.Put(t.Context(), target("made-up"), string(before.Kvs[0].Value))
	_, err3 := etcd.Put(t.Context(), edited, strings.Replace(string(before.Kvs[0].Value), `"exp":1`, `"exp":0`, 1))
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	await(t, "the directory to be right again", func() bool {
		got := w.inEtcd(etcd)
		resp, err := etcd.Get(t.Context(), edited)
		return err == nil && len(resp.Kvs) == 1 && string(resp.Kvs[0].Value) != "" && resp.Kvs[0].Lease != 0 &&
			hasAll(got, want) && !got["made-up"] && sameEnd(resp.Kvs[0].Value, before.Kvs[0].Value)
	})
	w.checkLog(want)
}

func sameEnd(a, b []byte) bool {
	cut := func(v []byte) string { _, s, _ := strings.Cut(string(v), `"exp":`); return s[:10] }
	return cut(a) == cut(b)
}

func TestConformancePostgresAway(t *testing.T) {
	t.Parallel()
	own := stacktest.Own(t, stacktest.Postgres)
	w := newWorld(t).on(own)
	s := w.serve()
	client, etcd := newHTTPClient(t), w.etcdClient()
	want := s.revokeMany(client, "before", 5)
	for round, end := range []func(stacktest.Server){own.Stop, own.Kill} {
		id := fmt.Sprintf("away-%d", round)
		token := accessToken(id)
		end(stacktest.Postgres)
		t.Run("C031", func(t *testing.T) {
			for range 3 {
				a, err := s.revoke(client, token)
				if err != nil || a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") != "5" || a.oauthError() != "temporarily_unavailable" {
					t.Errorf("while Postgres is away: %+v, %v", a, err)
				}
			}
			t.Run("C109", func(t *testing.T) {
				if status, code := s.readyz(client); status != "fail" || code != http.StatusServiceUnavailable {
					t.Errorf("readyz says %s with %d", status, code)
				}
			})
			t.Run("C108", func(t *testing.T) {
				if a, err := send(client, http.MethodGet, s.ops+"/healthz", nil, ""); err != nil || a.status != http.StatusOK || !strings.Contains(a.body, `"pass"`) {
					t.Errorf("healthz: %+v, %v", a, err)
				}
			})
			own.Start(stacktest.Postgres)
			await(t, "a revocation after the restart", func() bool {
				a, err := s.revoke(client, token)
				return err == nil && a.status == http.StatusOK
			})
		})
		want = append(append(want, id), s.revokeMany(client, "after-"+id, 3)...)
	}
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), want) })
	await(t, "readiness", func() bool { status, _ := s.readyz(client); return status == "pass" })
	w.checkLog(want)
}

// Connections to Postgres are cut in the middle of batches, under load.
func TestPostgresConnectionsCut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	direct := w.db
	var proxy *relaytest.Proxy
	w.db.ServiceURL, proxy = through(t, direct.ServiceURL)
	s := w.serve()
	l := startLoad(s, 16, "cut")
	for round := range 10 {
		l.awaitMore(t, 50)
		proxy.CutAfter(500 + 997*round)
		await(t, "a refusal", func() bool { return l.refusals() > round })
		proxy.Heal()
	}
	l.awaitMore(t, 50)
	acknowledged := l.stop()
	w.db = direct
	etcd := w.etcdClient()
	w.checkLog(acknowledged)
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), acknowledged) })
	if unexpected := l.unexpected(); len(unexpected) > 0 {
		t.Errorf("answers that are neither 200 nor a right 503: %q", unexpected)
	}
}

func TestRestoredFromBackup(t *testing.T) {
	t.Parallel()
	own := stacktest.Own(t, stacktest.Postgres)
	w := newWorld(t).on(own)
	s, err := w.tryServe()
	if err != nil {
		t.Fatal(err)
	}
	client, etcd := newHTTPClient(t), w.etcdClient()
	events := w.consume(w.amqpURL, "rescind.events", "#")
	old := s.revokeMany(client, "old", 5)
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), old) })
	own.Backup(stacktest.Postgres)
	await(t, "the service to be well after the backup", func() bool { status, _ := s.readyz(client); return status == "pass" })
	lost := s.revokeMany(client, "lost", 5)
	all := append(old, lost...)
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), all) })
	await(t, "RabbitMQ", func() bool { return hasAll(events.seen(), all) })

	// A service that runs notices, stops, and says what to do.
	own.Restore(stacktest.Postgres)
	select {
	case <-s.done:
	case <-time.After(60 * time.Second):
		t.Fatal("the service goes on after the restore")
	}
	isRestored := func(err error) bool {
		return (errors.Is(err, ledger.ErrRestored) || errors.Is(err, relay.ErrRestored)) && strings.Contains(err.Error(), "rescind epoch new")
	}
	if err := s.stop(); !isRestored(err) {
		t.Errorf("the running service ended with: %v", err)
	}
	// So does one that starts.
	if _, err := w.tryServe(); !isRestored(err) {
		t.Fatalf("start after the restore: %v", err)
	}
	report, err := app.NewEpoch(t.Context(), w.config(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if report.After.Seq-report.Before.Seq != 5 {
		t.Errorf("%+v, want 5 events put back", report)
	}
	s = w.serve()
	fresh := s.revokeMany(client, "fresh", 3)
	all = append(all, fresh...)
	w.checkLog(all)
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), all) })
	await(t, "the new epoch's events on RabbitMQ", func() bool { return hasAll(eventsOf(events, report.After.Epoch), append(lost, fresh...)) })
	await(t, "the stream key of the new epoch", func() bool {
		resp, err := etcd.Get(t.Context(), directory.StreamKey(w.prefix))
		return err == nil && len(resp.Kvs) == 1 && strings.Contains(string(resp.Kvs[0].Value), string(report.After.Epoch))
	})
}

func eventsOf(c *consumer, epoch revocation.Epoch) map[string]bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	got := make(map[string]bool)
	for _, e := range c.events {
		if e.Epoch == epoch {
			got[e.Subject] = true
		}
	}
	return got
}

// A leader that does not know that it is none cannot write to the directory.
func TestStaleLeaderCannotWrite(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := w.serve("RESCIND_ETCD_RECONCILE_INTERVAL=1s")
	client, etcd := newHTTPClient(t), w.etcdClient()
	want := s.revokeMany(client, "a", 3)
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), want) })
	// Somebody else writes the stream key: what this leader knows of it is stale.
	stream := directory.StreamKey(w.prefix)
	before, err := etcd.Get(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Put(t.Context(), stream, string(before.Kvs[0].Value)); err != nil {
		t.Fatal(err)
	}
	stale := clientv3.Compare(clientv3.ModRevision(stream), "=", before.Kvs[0].ModRevision)
	resp, err := etcd.Txn(t.Context()).If(stale).Commit()
	if err != nil || resp.Succeeded {
		t.Fatalf("the guard holds for a stale revision: %v, %v", resp, err)
	}
	want = append(want, s.revokeMany(client, "b", 3)...)
	await(t, "etcd", func() bool { return hasAll(w.inEtcd(etcd), want) })
	if !strings.Contains(s.logs.String(), `"sink is down`) {
		t.Error("the leader did not notice that its guard had failed")
	}
}

func TestGatewayCannotPublish(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.serve()
	await(t, "the exchange", func() bool { return exchangeExists(w.amqpURL, "rescind.events") })
	for _, exchange := range []string{"rescind.events", "amq.topic"} {
		err := withChannel(w.gatewayAMQP, func(ch *amqp.Channel) error {
			closed := ch.NotifyClose(make(chan *amqp.Error, 1))
			if err := ch.PublishWithContext(t.Context(), exchange, "tokenRevocation", false, false, amqp.Publishing{Body: []byte("{}")}); err != nil {
				return err
			}
			select {
			case err := <-closed:
				return err
			case <-time.After(30 * time.Second):
				return nil
			}
		})
		refused, ok := errors.AsType[*amqp.Error](err)
		if !ok || refused.Code != amqp.AccessRefused {
			t.Errorf("the gateway's user publishes to %s: %v, want access refused", exchange, err)
		}
	}
}

// load revokes new tokens from several connections until it is stopped.
type load struct {
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu           sync.Mutex
	acknowledged []string
	refused      int
	wrong        []string
	lost         int // requests without an answer
}

// startLoad sends to one service; [load.others] adds more.
func startLoad(s *service, callers int, prefix string) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel}
	s.t.Cleanup(func() { cancel(); l.running.Wait() })
	l.send(ctx, s, callers, prefix)
	return l
}

func (l *load) send(ctx context.Context, s *service, callers int, prefix string) {
	client := newHTTPClient(s.t)
	for c := range callers {
		l.running.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				id := fmt.Sprintf("%s-%d-%d", prefix, c, i)
				a, err := s.revoke(client, accessToken(id))
				l.record(id, a, err)
				if err != nil || a.status != http.StatusOK {
					select { // as a client that heeds Retry-After, only quicker
					case <-time.After(20 * time.Millisecond):
					case <-ctx.Done():
					}
				}
			}
		})
	}
}

func (l *load) record(id string, a answer, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		l.lost++
	case a.status == http.StatusOK:
		l.acknowledged = append(l.acknowledged, id)
	case a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") != "" && a.oauthError() == "temporarily_unavailable":
		l.refused++
	default:
		l.wrong = append(l.wrong, fmt.Sprintf("%d %s", a.status, a.body))
	}
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.acknowledged)
}

func (l *load) refusals() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.refused
}

func (l *load) unexpected() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.wrong
}

// awaitMore waits for n more answers of 200.
func (l *load) awaitMore(t testing.TB, n int) {
	t.Helper()
	want := l.count() + n
	await(t, fmt.Sprintf("%d more revocations", n), func() bool { return l.count() >= want })
}

// stop ends the load and returns the ids of the tokens whose callers saw 200.
func (l *load) stop() []string {
	l.cancel()
	l.running.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acknowledged
}
