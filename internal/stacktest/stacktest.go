// Package stacktest hides how tests come by real Postgres, RabbitMQ and etcd servers with nothing started beforehand.
//
// All test processes of a checkout share one stack: the first one builds and starts a detached process that runs it,
// each keeps a connection to that process for as long as it lives, and 10 seconds after the last one it ends and deletes
// its data. A test that stops, kills or wipes a server has a stack of its own.
//
// The servers run in a process of their own, and not in the test's, because many test processes use them at once, and
// because the tests of production packages must not link the etcd server.
package stacktest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Server names one of the servers of a stack.
type Server string

// The servers of a stack.
const (
	Postgres Server = "postgres"
	RabbitMQ Server = "rabbitmq"
	Etcd     Server = "etcd"
)

// Endpoints tell how to reach the servers of a stack. Those of a server that it does not have are empty.
type Endpoints struct {
	DatabaseURL    string   `json:"database_url"`     // of a superuser
	AMQPURL        string   `json:"amqp_url"`         // of an administrator, on the vhost "/"
	GatewayAMQPURL string   `json:"gateway_amqp_url"` // of a user who can consume, and cannot publish to an exchange
	EtcdEndpoints  []string `json:"etcd_endpoints"`
	ManagementURL  string   `json:"management_url"` // of RabbitMQ's HTTP API, with the administrator's credentials
}

const (
	startLimit  = 5 * time.Minute // it may have to install servers first
	listenLimit = 20 * time.Second
	linger      = 10 * time.Second
	endLimit    = 15 * time.Second
	callLimit   = 2 * time.Minute
)

var shared = sync.OnceValues(func() (*daemon, error) {
	home, err := openHome()
	if err != nil {
		return nil, err
	}
	return home.join("shared", "-linger="+linger.String(), "-no-fsync", "-management", "-sweep="+filepath.Dir(home.dir))
})

// Shared returns the endpoints of the stack that all tests share. A test must keep to a database, a vhost ([NewVhost])
// and an etcd prefix ([EtcdPrefix]) of its own on it, and leave the servers running.
func Shared(t testing.TB) Endpoints {
	t.Helper()
	return sharedDaemon(t).endpoints
}

func sharedDaemon(t testing.TB) *daemon {
	t.Helper()
	d, err := shared()
	if err != nil {
		t.Fatalf("start the shared test servers: %v", err)
	}
	return d
}

// Vhost is a RabbitMQ vhost for one test.
type Vhost struct {
	AMQPURL        string `json:"amqp_url"`         // as an administrator
	GatewayAMQPURL string `json:"gateway_amqp_url"` // as a user who can consume, and cannot publish to an exchange
}

// NewVhost makes a vhost on the shared stack. It is deleted when the test ends.
func NewVhost(t testing.TB) Vhost {
	t.Helper()
	d := sharedDaemon(t)
	path := "/vhosts/" + uniqueName()
	var v Vhost
	if err := d.call(http.MethodPut, path, &v); err != nil {
		t.Fatalf("make a vhost: %v", err)
	}
	t.Cleanup(func() {
		if err := d.call(http.MethodDelete, path, nil); err != nil {
			t.Errorf("delete a vhost: %v", err)
		}
	})
	return v
}

// EtcdPrefix returns a prefix of keys, without a slash at the end, that no other test uses.
func EtcdPrefix(testing.TB) string { return "/t/" + uniqueName() }

func uniqueName() string { return strings.ToLower(rand.Text()) }

// Stack is a set of servers for one test. Its methods fail the test if they cannot do what they say.
type Stack struct {
	t      testing.TB
	daemon *daemon
}

// Own starts servers for this test alone, all three if none is named. They end with the test, and also if its process
// is killed.
func Own(t testing.TB, servers ...Server) *Stack {
	t.Helper()
	home, err := openHome()
	if err != nil {
		t.Fatal(err)
	}
	var args []string
	for _, s := range []Server{Postgres, RabbitMQ, Etcd} {
		if len(servers) > 0 && !slices.Contains(servers, s) {
			args = append(args, "-without="+string(s))
		}
	}
	d, err := home.join("own-"+uniqueName()[:8], args...)
	if err != nil {
		t.Fatalf("start test servers: %v", err)
	}
	t.Cleanup(func() {
		if err := d.leave(); err != nil {
			t.Errorf("end test servers: %v", err)
		}
	})
	return &Stack{t: t, daemon: d}
}

// Endpoints tell how to reach the servers. They stay the same over stops and starts.
func (s *Stack) Endpoints() Endpoints { return s.daemon.endpoints }

// Stop ends a server in good order.
func (s *Stack) Stop(server Server) { s.t.Helper(); s.control(server, "stop") }

// Kill ends a server as a crash would.
func (s *Stack) Kill(server Server) { s.t.Helper(); s.control(server, "kill") }

// Start starts a server that does not run, and returns when it answers.
func (s *Stack) Start(server Server) { s.t.Helper(); s.control(server, "start") }

// Wipe deletes all data of a server, and kills it before that if it runs.
func (s *Stack) Wipe(server Server) { s.t.Helper(); s.control(server, "wipe") }

// Backup copies the data of a server, which is down for that time.
func (s *Stack) Backup(server Server) { s.t.Helper(); s.control(server, "backup") }

// Restore puts the last copy in place of the data of a server, which is down for that time.
func (s *Stack) Restore(server Server) { s.t.Helper(); s.control(server, "restore") }

func (s *Stack) control(server Server, action string) {
	s.t.Helper()
	if err := s.daemon.call(http.MethodPost, "/servers/"+string(server)+"/"+action, nil); err != nil {
		s.t.Fatalf("%s %s: %v", action, server, err)
	}
}

// home is the folder for everything that the tests of one checkout keep outside of it.
type home struct {
	dir    string
	module string // the root of the checkout
}

// openHome makes the folder. Its name holds a hash of the sources of what runs in it, so that a process never uses the
// stack of an older version.
var openHome = sync.OnceValues(func() (*home, error) {
	module, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	key := sha256.New()
	fmt.Fprintf(key, "%s\n%d\n", module, os.Getuid())
	err = filepath.WalkDir(filepath.Join(module, "internal/devstack"), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || strings.HasSuffix(path, "_test.go") {
			return err
		}
		content, err := os.ReadFile(path)
		fmt.Fprintf(key, "%s %d\n%s", path, len(content), content)
		return err
	})
	if err != nil {
		return nil, err
	}
	root, err := cacheRoot()
	if err != nil {
		return nil, err
	}
	h := &home{dir: filepath.Join(root, hex.EncodeToString(key.Sum(nil)[:6])), module: module}
	return h, os.MkdirAll(h.dir, 0o700)
})

// cacheRoot is a folder of this user, in the cache if that is possible and short enough for a socket's address.
func cacheRoot() (string, error) {
	const socketName = "/0123456789ab/own-01234567.sock"
	if cache, err := os.UserCacheDir(); err == nil && len(cache)+len("/rescind-test"+socketName) <= 100 {
		if root := filepath.Join(cache, "rescind-test"); os.MkdirAll(root, 0o700) == nil {
			return root, nil
		}
	}
	root := fmt.Sprintf("/tmp/rescind-test-%d", os.Getuid())
	if err := os.Mkdir(root, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	info, err := os.Lstat(root)
	if err != nil {
		return "", err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || int(stat.Uid) != os.Getuid() || info.Mode().Perm() != 0o700 {
		return "", fmt.Errorf("%s is not a folder of this user alone: remove it", root)
	}
	return root, nil
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd() // go test runs a package's tests in its folder
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("find the module that is tested: no go.mod in the working folder or above")
		}
		dir = parent
	}
}

// daemon is a process that runs a stack, seen from here.
type daemon struct {
	endpoints Endpoints
	client    *http.Client
	use       io.Closer   // the request that says that we use it
	ended     chan error  // gets how it ended, if we have started it
	process   *os.Process // if we have started it
	logFile   string
}

// join uses the daemon of that name, and starts it first if there is none. args are for that.
func (h *home) join(name string, args ...string) (*daemon, error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), startLimit, fmt.Errorf("not ready within %s", startLimit))
	defer cancel()
	d := &daemon{logFile: filepath.Join(h.dir, name+".log")}
	socket := filepath.Join(h.dir, name+".sock")
	d.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	use, err := d.enter(ctx, h, name, append(args, "-socket="+socket, "-dir="+filepath.Join(h.dir, name)))
	if err != nil {
		return nil, err
	}
	d.use = use
	var state struct {
		Endpoints Endpoints `json:"endpoints"`
		Error     string    `json:"error"`
	}
	read := make(chan error, 1)
	go func() { read <- json.NewDecoder(use).Decode(&state) }()
	select {
	case err = <-read:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err == nil && state.Error != "" {
		err = errors.New(state.Error)
	}
	if err != nil {
		return nil, fmt.Errorf("%w (log: %s)", errors.Join(err, use.Close()), d.logFile)
	}
	d.endpoints = state.Endpoints
	return d, nil
}

// enter returns the open answer to the request that makes us a user. One process at a time looks for the daemon and
// starts it.
func (d *daemon) enter(ctx context.Context, h *home, name string, args []string) (io.ReadCloser, error) {
	lock, err := lockFile(ctx, filepath.Join(h.dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if use, err := d.tryUse(); err == nil {
		return use, nil
	}
	program := filepath.Join(h.dir, "stackd")
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "./internal/devstack/stackd")
	build.Dir = h.module
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", build, err, out)
	}
	now := time.Now() // an old program is deleted as one that nobody uses
	if err := os.Chtimes(program, now, now); err != nil {
		return nil, err
	}
	if err := d.start(program, args); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, listenLimit, fmt.Errorf("it does not listen after %s", listenLimit))
	defer cancel()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		if use, err := d.tryUse(); err == nil {
			return use, nil
		}
		select {
		case err := <-d.ended:
			return nil, fmt.Errorf("%s ended by itself: %v (log: %s)", program, err, d.logFile)
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: %w (log: %s)", program, context.Cause(ctx), d.logFile)
		case <-poll.C:
		}
	}
}

func lockFile(ctx context.Context, path string) (*os.File, error) {
	lock, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return lock, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), lock.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, context.Cause(ctx)), lock.Close())
		case <-poll.C:
		}
	}
}

func (d *daemon) tryUse() (io.ReadCloser, error) {
	resp, err := d.client.Get("http://stackd/use")
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, errors.Join(errors.New(resp.Status), resp.Body.Close())
	}
	return resp.Body, nil
}

// start starts the daemon so that it outlives this process, and go test does not wait for it: in a session of its own,
// with none of our files open.
func (d *daemon) start(program string, args []string) error {
	log, err := os.OpenFile(d.logFile, os.O_CREATE|os.O_TRUNC|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	d.process, d.ended = cmd.Process, make(chan error, 1)
	go func() { d.ended <- cmd.Wait() }()
	return nil
}

// leave ends our use, and waits for the end of a daemon that was ours alone.
func (d *daemon) leave() error {
	if err := d.use.Close(); err != nil {
		return err
	}
	select {
	case err := <-d.ended:
		if err != nil {
			return fmt.Errorf("%w (log: %s)", err, d.logFile)
		}
		return errors.Join(os.Remove(d.logFile), os.RemoveAll(strings.TrimSuffix(d.logFile, ".log")+".sock"))
	case <-time.After(endLimit):
		return errors.Join(fmt.Errorf("not ended within %s: killed (log: %s)", endLimit, d.logFile), d.process.Kill())
	}
}

// call asks the daemon to do something, and reads its answer into result if that is not nil.
func (d *daemon) call(method, path string, result any) error {
	ctx, cancel := context.WithTimeout(context.Background(), callLimit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://stackd"+path, nil)
	if err != nil {
		return err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(strings.TrimSpace(string(answer)))
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(answer, result)
}
