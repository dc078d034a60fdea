package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/stacktest"
)

const (
	testIssuer = "https://km.example.com"
	testEpoch  = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
)

// lines is a writer whose lines a test can wait for.
type lines struct {
	mu      sync.Mutex
	all     bytes.Buffer
	changed chan struct{}
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	return l.all.Write(b)
}

func (l *lines) await(ctx context.Context, t *testing.T, part string) {
	t.Helper()
	for {
		l.mu.Lock()
		found := strings.Contains(l.all.String(), part)
		if !found && l.changed == nil {
			l.changed = make(chan struct{})
		}
		changed := l.changed
		l.mu.Unlock()
		if found {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("%q never came: %s", part, &l.all)
		}
	}
}

func TestTail(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	vhost, prefix := stacktest.NewVhost(t), stacktest.EtcdPrefix(t)
	endpoints := stacktest.Shared(t).EtcdEndpoints

	var stdout, stderr lines
	done := make(chan int, 1)
	go func() {
		done <- run(ctx, []string{
			"tail", "--amqp-url", vhost.GatewayAMQPURL, "--etcd-endpoints", strings.Join(endpoints, ","), "--etcd-prefix", prefix,
			"--json", "--heartbeats", "--count", "4",
		}, &stdout, &stderr)
	}()
	// It waits for an exchange that is not there yet.
	stderr.await(ctx, t, "Trying again in")
	conn, err := amqp.Dial(vhost.AMQPURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	channel, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if err := channel.ExchangeDeclare("rescind.events", "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	stderr.await(ctx, t, "Listening to RabbitMQ.")
	stderr.await(ctx, t, "Listening to etcd.")

	etcd, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { etcd.Close() })
	event := testEvent(t)
	publish := func(key string, body any) {
		t.Helper()
		b, ok := body.([]byte)
		if !ok {
			if b, err = json.Marshal(body); err != nil {
				t.Fatal(err)
			}
		}
		if err := channel.PublishWithContext(ctx, "rescind.events", key, false, false, amqp.Publishing{Body: b}); err != nil {
			t.Fatal(err)
		}
	}
	publish("nonsense", []byte("{}"))
	publish(event.RoutingKey(), event)
	stdout.await(ctx, t, `"revocation.token"`)
	publish(revocation.HeartbeatRoutingKey, revocation.Heartbeat{
		Epoch: testEpoch, ID: testEpoch + ":hb:1", Source: testIssuer, Time: time.Now(), Head: 8, Through: 7,
	})
	stdout.await(ctx, t, `"heartbeat"`)
	entry := directory.Entry{Target: revocation.Target{Kind: revocation.KindToken, Iss: testIssuer, ID: "at-1"}, Exp: 1795201400, Seq: 7, At: event.Time}
	put := func(key, value string) {
		t.Helper()
		if _, err := etcd.Put(ctx, key, value); err != nil {
			t.Fatal(err)
		}
	}
	put(directory.StreamKey(prefix), `{"epoch":"x","seq":1}`)
	put(prefix+"/jti/at-2", "not an entry")
	put(directory.Key(prefix, testIssuer, entry.Target), entry.Value())
	stdout.await(ctx, t, `"via":"etcd"`)
	// Another issuer's entry lies elsewhere.
	entry.Target.Iss = "https://idp.example.com"
	put(directory.Key(prefix, testIssuer, entry.Target), entry.Value())
	if code := <-done; code != exitOK {
		t.Fatalf("status %d: %s", code, &stderr.all)
	}

	var got []sighting
	for dec := json.NewDecoder(&stdout.all); ; {
		var s sighting
		if err := dec.Decode(&s); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if s.Type != "heartbeat" && s.AgeMS < 1 || s.At.IsZero() {
			t.Errorf("the age of %+v is not that of an event committed before it was sent", s)
		}
		s.AgeMS, s.At = 0, time.Time{}
		got = append(got, s)
	}
	inEtcd := sighting{Via: "etcd", Seq: 7, Type: "revocation.token", Subject: "at-1", Exp: 1795201400, Key: prefix + "/jti/at-1"}
	others := inEtcd
	others.Key = directory.Key(prefix, testIssuer, entry.Target)
	want := []sighting{
		{Via: "amqp", Epoch: testEpoch, Seq: 7, Type: "revocation.token", Subject: "at-1", Tenant: "carbon.super", Exp: 1795201400},
		{Via: "amqp", Epoch: testEpoch, Type: "heartbeat", Head: 8, Through: 7},
		inEtcd, others,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(stderr.all.String(), "a message that is no event of ours") {
		t.Errorf("nonsense went by in silence: %s", &stderr.all)
	}
}

func testEvent(t *testing.T) revocation.Event {
	t.Helper()
	e, err := revocation.NewEvent(revocation.Revocation{
		ID:     "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3",
		Target: revocation.Target{Kind: revocation.KindToken, Iss: testIssuer, ID: "at-1"},
		Tenant: revocation.SuperTenant, Exp: 1795201400, Reason: "client",
	})
	if err != nil {
		t.Fatal(err)
	}
	e.Position = revocation.Position{Epoch: testEpoch, Seq: 7}
	e.Source, e.Time = testIssuer, time.Now().Add(-time.Second)
	return e
}

func TestTailWithoutServers(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dev := writeFile(t, "dev.json", `{"gateway_amqp_url":"amqp://gateway:hunter2@127.0.0.1:1/","etcd_endpoints":["http://127.0.0.1:1"]}`)
	var stderr lines
	done := make(chan int, 1)
	go func() { done <- run(ctx, []string{"tail", "--dev-json", dev}, io.Discard, &stderr) }()
	stderr.await(ctx, t, "RabbitMQ: dial tcp 127.0.0.1:1")
	stderr.await(ctx, t, "etcd: ")
	cancel()
	if code := <-done; code != exitOK {
		t.Errorf("status %d", code)
	}
	if strings.Contains(stderr.all.String(), "hunter2") {
		t.Errorf("the password is shown: %s", &stderr.all)
	}
}

func TestSightingForPeople(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 21, 11, 2, 3, 412e6, time.UTC)
	for want, s := range map[string]sighting{
		"11:02:03.412  amqp       3.2 ms  seq 12       revocation.token at-1\n":         {Via: "amqp", At: at, AgeMS: 3.24, Seq: 12, Type: "revocation.token", Subject: "at-1"},
		"11:02:03.412  etcd      14.0 ms  seq 12       revocation.token /p/jti/at-1\n":  {Via: "etcd", At: at, AgeMS: 14, Seq: 12, Type: "revocation.token", Subject: "at-1", Key: "/p/jti/at-1"},
		"11:02:03.412  amqp       0.5 ms  head 9, through 8\n":                          {Via: "amqp", At: at, AgeMS: 0.5, Type: "heartbeat", Head: 9, Through: 8},
		"11:02:03.412  etcd                  removed  /jti/a\uFFFD[2J\n":                {Via: "etcd", At: at, Type: "removed", Key: "/jti/a\x1b[2J"},
		fmt.Sprintf("11:02:03.412  amqp       1.0 ms  seq %-8d revocation.key k\n", 10): {Via: "amqp", At: at, AgeMS: 1, Seq: 10, Type: "revocation.key", Subject: "k"},
	} {
		var b bytes.Buffer
		if err := s.write(&b, false); err != nil || b.String() != want {
			t.Errorf("got %q, want %q, error %v", &b, want, err)
		}
	}
}
