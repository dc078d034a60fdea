package stacktest_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/internal/stacktest"
)

func TestSharedServersAnswer(t *testing.T) {
	t.Parallel()
	at := stacktest.Shared(t)
	conn, err := pgx.Connect(t.Context(), at.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	var superuser bool
	if err := conn.QueryRow(t.Context(), "SELECT rolsuper FROM pg_roles WHERE rolname = current_user").Scan(&superuser); err != nil {
		t.Fatal(err)
	}
	if !superuser {
		t.Error("the database user cannot make databases and roles for tests")
	}
	if status := etcdHealth(t, at); status != http.StatusOK {
		t.Errorf("etcd answers %d", status)
	}
	resp, err := http.Get(at.ManagementURL + "/api/whoami")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("RabbitMQ's management API answers %s", resp.Status)
	}
}

// etcdHealth is a status, or 0 if there is no answer.
func etcdHealth(t *testing.T, at stacktest.Endpoints) int {
	t.Helper()
	resp, err := http.Get(at.EtcdEndpoints[0] + "/health")
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestEtcdPrefixesDiffer(t *testing.T) {
	t.Parallel()
	if a, b := stacktest.EtcdPrefix(t), stacktest.EtcdPrefix(t); strings.HasPrefix(a, b) || strings.HasPrefix(b, a) {
		t.Errorf("two tests have prefixes %s and %s", a, b)
	}
}

func open(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func TestVhostIsOfOneTest(t *testing.T) {
	t.Parallel()
	a, b := open(t, stacktest.NewVhost(t).AMQPURL), open(t, stacktest.NewVhost(t).AMQPURL)
	if _, err := a.QueueDeclare("mine", false, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	_, err := b.QueueDeclarePassive("mine", false, false, false, false, nil)
	if e, ok := errors.AsType[*amqp.Error](err); !ok || e.Code != amqp.NotFound {
		t.Errorf("another vhost's queue: %v, want not found", err)
	}
}

// TestGatewayConsumes does what a WSO2 gateway does: it declares amq.topic before it binds a queue of its own to it.
func TestGatewayConsumes(t *testing.T) {
	t.Parallel()
	v := stacktest.NewVhost(t)
	admin, gateway := open(t, v.AMQPURL), open(t, v.GatewayAMQPURL)
	if err := admin.ExchangeDeclare("rescind.events", "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := gateway.ExchangeDeclare("amq.topic", "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	q, err := gateway.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, exchange := range []string{"amq.topic", "rescind.events"} {
		if err := gateway.QueueBind(q.Name, "#", exchange, false, nil); err != nil {
			t.Fatal(err)
		}
		if err := admin.PublishWithContext(t.Context(), exchange, "key", false, false, amqp.Publishing{Body: []byte(exchange)}); err != nil {
			t.Fatal(err)
		}
	}
	messages, err := gateway.ConsumeWithContext(t.Context(), q.Name, "", true, true, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"amq.topic", "rescind.events"} {
		select {
		case m := <-messages:
			if string(m.Body) != want {
				t.Errorf("message %q, want %q", m.Body, want)
			}
		case <-t.Context().Done():
			t.Fatal("no message")
		}
	}
}

func TestGatewayCannotPublish(t *testing.T) {
	t.Parallel()
	v := stacktest.NewVhost(t)
	if err := open(t, v.AMQPURL).ExchangeDeclare("rescind.events", "topic", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	publish := func(exchange string) func(*amqp.Channel) error {
		return func(ch *amqp.Channel) error {
			return ch.PublishWithContext(t.Context(), exchange, "key", false, false, amqp.Publishing{})
		}
	}
	tests := []struct {
		name string
		try  func(*amqp.Channel) error
	}{
		{name: "to amq.topic", try: publish("amq.topic")},
		{name: "to rescind.events", try: publish("rescind.events")},
		{name: "to a queue of another", try: publish("")},
		{name: "through a binding", try: func(ch *amqp.Channel) error {
			return ch.ExchangeBind("rescind.events", "#", "amq.topic", false, nil)
		}},
		{name: "to an exchange of its own", try: func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare("mine", "topic", false, true, false, false, nil)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ch := open(t, v.GatewayAMQPURL)
			closed := ch.NotifyClose(make(chan *amqp.Error, 1))
			if err := tt.try(ch); err != nil {
				if e, ok := errors.AsType[*amqp.Error](err); !ok || e.Code != amqp.AccessRefused {
					t.Errorf("error %v, want access refused", err)
				}
				return
			}
			select {
			case err := <-closed: // a refused message is not answered: the channel is closed
				if err == nil || err.Code != amqp.AccessRefused {
					t.Errorf("channel closed with %v, want access refused", err)
				}
			case <-t.Context().Done():
				t.Fatal("the broker accepts it")
			}
		})
	}
}

func TestOwnServersCanBeStoppedAndWiped(t *testing.T) {
	t.Parallel()
	s := stacktest.Own(t, stacktest.Etcd)
	at := s.Endpoints()
	if at.DatabaseURL != "" || at.AMQPURL != "" {
		t.Errorf("servers that were not asked for: %+v", at)
	}
	const yes, no = true, false
	etcdPut(t, at)
	s.Stop(stacktest.Etcd)
	if status := etcdHealth(t, at); status != 0 {
		t.Errorf("stopped, it answers %d", status)
	}
	s.Start(stacktest.Etcd)
	if got := etcdHas(t, at); got != yes {
		t.Error("started again, it has lost its data")
	}
	s.Kill(stacktest.Etcd)
	if status := etcdHealth(t, at); status != 0 {
		t.Errorf("killed, it answers %d", status)
	}
	s.Start(stacktest.Etcd)
	if got := etcdHas(t, at); got != yes {
		t.Error("started after a crash, it has lost its data")
	}
	s.Wipe(stacktest.Etcd)
	s.Start(stacktest.Etcd)
	if got := etcdHas(t, at); got != no {
		t.Error("wiped, it still has data")
	}
	s.Backup(stacktest.Etcd)
	etcdPut(t, at)
	s.Restore(stacktest.Etcd)
	if got := etcdHas(t, at); got != no {
		t.Error("restored, it has what was written after the backup")
	}
}

func etcdPut(t *testing.T, at stacktest.Endpoints) {
	t.Helper()
	etcdCall(t, at, "put")
}

func etcdHas(t *testing.T, at stacktest.Endpoints) bool {
	t.Helper()
	return strings.Contains(etcdCall(t, at, "range"), `"count":"1"`)
}

func etcdCall(t *testing.T, at stacktest.Endpoints, method string) string {
	t.Helper()
	body := `{"key":"` + base64.StdEncoding.EncodeToString([]byte("key")) + `"}`
	resp, err := http.Post(at.EtcdEndpoints[0]+"/v3/kv/"+method, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("etcd %s: %s %s %v", method, resp.Status, answer, err)
	}
	return string(answer)
}

// child is another test process.
type child struct {
	cmd       *exec.Cmd
	input     io.Closer
	endpoints stacktest.Endpoints
}

// startChildren starts n processes at once, and returns when each of them has a stack.
func startChildren(t *testing.T, n int, mode, cache string) []child {
	t.Helper()
	goCache, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	children := make([]child, n)
	outputs := make([]io.Reader, n)
	for i := range children {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childMode+"="+mode, "XDG_CACHE_HOME="+cache, "GOCACHE="+strings.TrimSpace(string(goCache)))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		input, err1 := cmd.StdinPipe()
		output, err2 := cmd.StdoutPipe()
		if err := errors.Join(err1, err2, cmd.Start()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			input.Close()
			_ = cmd.Wait()
			if t.Failed() {
				t.Logf("a child says: %s", &stderr)
			}
		})
		children[i], outputs[i] = child{cmd: cmd, input: input}, output
	}
	for i := range children {
		if err := json.NewDecoder(outputs[i]).Decode(&children[i].endpoints); err != nil {
			t.Fatalf("child %d: %v", i, err)
		}
	}
	return children
}

func awaitCondition(t *testing.T, what string, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-ctx.Done():
			t.Fatalf("not after a minute: %s", what)
		case <-poll.C:
		}
	}
}

func isGone(t *testing.T, pattern string) func() bool {
	return func() bool {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		return len(found) == 0
	}
}

func TestOwnServersEndWithAKilledTest(t *testing.T) {
	t.Parallel()
	cache := t.TempDir()
	c := startChildren(t, 1, "own", cache)[0]
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitCondition(t, "etcd has ended", func() bool { return etcdHealth(t, c.endpoints) == 0 })
	awaitCondition(t, "its data is deleted", isGone(t, filepath.Join(cache, "rescind-test", "*", "own-*", "*")))
}
