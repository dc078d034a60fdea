package devstack

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

func awaitCondition(t *testing.T, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-ctx.Done():
			t.Fatal("condition does not hold after a minute")
		case <-poll.C:
		}
	}
}

// dataDir is a folder that no system user can enter, nor the one it is in.
func dataDir(t *testing.T) string {
	t.Helper()
	private := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(private, 0o700); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(private, "data")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if err := Remove(ctx, dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	return dir
}

func start(t *testing.T, cfg Config) *Stack {
	t.Helper()
	s, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, s) })
	return s
}

func stop(t *testing.T, s *Stack) {
	t.Helper()
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
}

// leave writes something to each server, and find tells what of it is there.
func leave(t *testing.T, at Endpoints) {
	t.Helper()
	query(t, at, "CREATE TABLE left_here (word text)")
	channel(t, at.AMQPURL, func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclare("left here", true, false, false, false, nil)
		return err
	})
	etcdCall(t, at, "put", map[string]string{"key": encode("left here"), "value": encode("yes")})
}

func find(t *testing.T, at Endpoints) map[Server]bool {
	t.Helper()
	found := map[Server]bool{}
	found[Postgres] = query(t, at, "SELECT to_regclass('left_here') IS NOT NULL")
	err := channel(t, at.AMQPURL, func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclarePassive("left here", true, false, false, false, nil)
		return err
	})
	found[RabbitMQ] = err == nil
	found[Etcd] = strings.Contains(etcdCall(t, at, "range", map[string]string{"key": encode("left here")}), encode("yes"))
	return found
}

// query runs a statement, and returns its first value if that is a bool.
func query(t *testing.T, at Endpoints, sql string) bool {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), at.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	rows, err := conn.Query(t.Context(), sql)
	if err != nil {
		t.Fatal(err)
	}
	values, err := pgx.CollectRows(rows, pgx.RowTo[bool])
	if err != nil {
		t.Fatal(err)
	}
	return len(values) > 0 && values[0]
}

func channel(t *testing.T, url string, do func(*amqp.Channel) error) error {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return do(ch)
}

func encode(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func etcdCall(t *testing.T, at Endpoints, method string, body any) string {
	t.Helper()
	content, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(at.EtcdEndpoints[0]+"/v3/kv/"+method, "application/json", strings.NewReader(string(content)))
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

func TestZZWatch(t *testing.T) {
	s := start(t, Config{Dir: dataDir(t), Without: []Server{Postgres, RabbitMQ}})
	resp, err := http.Post(s.Endpoints().EtcdEndpoints[0]+"/v3/watch", "application/json", strings.NewReader(`{"create_request":{"key":"Zm9v"}}`))
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	n, err := resp.Body.Read(b)
	t.Logf("%s %v", b[:n], err)
	for _, f := range []func(Server) error{s.StopServer, s.KillServer} {
		began := time.Now()
		f(Etcd)
		t.Log(time.Since(began))
		s.StartServer(t.Context(), Etcd)
		resp, err := http.Post(s.Endpoints().EtcdEndpoints[0]+"/v3/watch", "application/json", strings.NewReader(`{"create_request":{"key":"Zm9v"}}`))
		if err != nil {
			t.Fatal(err)
		}
		n, err := resp.Body.Read(b)
		t.Logf("%s %v", b[:n], err)
	}
}
var _ = cmp.Diff
var _ = exec.Command
var _ = bufio.NewReader
var _ = syscall.Kill
var _ = fmt.Sprint
