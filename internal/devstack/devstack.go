// Package devstack hides how real Postgres, RabbitMQ and etcd servers come to run privately on this machine: for
// rescind-dev, which needs nothing but Go, and for the tests.
//
// Servers are found, else installed, given a data folder, ports, users and secrets of their own, and ended with the
// process that started them. They share nothing with servers that are already there, epmd included, and everything
// listens on 127.0.0.1 alone.
//
// # Decisions
//
// etcd is the library, linked into this program: no distribution's package is needed, and its version is ours. It runs
// in a child process all the same, which is this program once more ([Child]): so it can be killed, its memory is not
// mistaken for the service's, and a stop does not wait for its clients.
//
// When this process is killed, the kernel signals the servers. Pid files, with the time that the process started at, let
// the next start find and end what is left.
//
// A data folder has mode 0700. As root, Postgres and RabbitMQ run as their system users, who cannot enter it, so their
// data then always lies in a folder below /var/tmp that is named after it, rather than sometimes.
//
// RabbitMQ reads users and permissions from a definitions file at boot: rabbitmqctl takes seconds a call.
package devstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Server names one of the three servers.
type Server string

// The servers.
const (
	Postgres Server = "postgres"
	RabbitMQ Server = "rabbitmq"
	Etcd     Server = "etcd"
)

var allServers = []Server{Postgres, RabbitMQ, Etcd}

// Config says what to start, and where.
type Config struct {
	// Dir is the data folder. It is made if it does not exist, and gets mode 0700; else it must be empty or an earlier
	// data folder. Data, secrets and, if they are still free, ports in it are used again. One process at a time.
	Dir string
	// Without lists servers not to start.
	Without []Server
	// Fresh empties Dir first.
	Fresh bool
	// Temporary lets [Stack.Stop] delete Dir, after ending the servers without care for their data.
	Temporary bool
	// NoInstall makes a missing server an error that names the command to run, where it would otherwise be installed.
	NoInstall bool
	// NoFsync lets Postgres and etcd answer before data is on disk. They start and run faster, and a crash of the
	// machine, though not of a server, may lose data: for tests.
	NoFsync bool
	// Management runs RabbitMQ's management plugin, which [Stack.AddVhost] needs. It starts a second or two later.
	Management bool
	// Log gets a line for each thing that takes a while, such as an installation. Default: none.
	Log io.Writer
}

// Endpoints tell how to reach the servers. Those of a server that was not started are empty.
type Endpoints struct {
	// DatabaseURL is that of a database named rescind, as a superuser.
	DatabaseURL string `json:"database_url"`
	// AMQPURL is that of the vhost "/", as an administrator.
	AMQPURL string `json:"amqp_url"`
	// GatewayAMQPURL is that of a user who can consume events and not publish any.
	GatewayAMQPURL string `json:"gateway_amqp_url"`
	// EtcdEndpoints are the client URLs of etcd, JSON gateway included.
	EtcdEndpoints []string `json:"etcd_endpoints"`
	// ManagementURL is that of RabbitMQ's management API, with the administrator's credentials; empty without
	// Config.Management.
	ManagementURL string `json:"management_url"`
}

// How long a server may take. Starting includes the recovery of its data.
const (
	startTimeout = 60 * time.Second
	lockTimeout  = 15 * time.Second // longer than another process needs to stop
)

// Stack is a set of running servers. Its methods are safe for concurrent use.
type Stack struct {
	folder    *folder
	temporary bool
	guard     net.Listener
	endpoints Endpoints
	controls  map[Server]*control
	died      chan error
	stop      func() error
}

// Start starts the servers, all at once, and returns when each of them answers, or with an error as soon as ctx ends
// or one of them fails. The caller ends them with [Stack.Stop].
func Start(ctx context.Context, cfg Config) (_ *Stack, err error) {
	if cfg.Dir == "" {
		return nil, errors.New("start private servers: no data folder is named")
	}
	if cfg.Log == nil {
		cfg.Log = io.Discard
	}
	f, err := openUnused(ctx, cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Stack{folder: f, temporary: cfg.Temporary, controls: map[Server]*control{}, died: make(chan error, len(allServers))}
	s.stop = sync.OnceValue(s.stopAll)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
		}
	}()
	if cfg.Fresh {
		if err := f.clear(); err != nil {
			return nil, fmt.Errorf("empty data folder %s: %w", f.base, err)
		}
	}
	if err := os.MkdirAll(f.path(logDir), 0o700); err != nil {
		return nil, err
	}
	wanted := slices.DeleteFunc(slices.Clone(allServers), func(s Server) bool { return slices.Contains(cfg.Without, s) })
	programs, err := findOrInstall(ctx, cfg, wanted)
	if err != nil {
		return nil, err
	}
	if s.guard, err = f.takePorts(); err != nil {
		return nil, err
	}
	for _, name := range wanted {
		var srv server
		switch name {
		case Postgres:
			srv, err = newPostgres(f, programs, cfg.NoFsync)
		case RabbitMQ:
			srv, err = newRabbitMQ(f, programs, cfg.Management)
		case Etcd:
			srv, err = newEtcd(f, cfg.NoFsync)
		}
		if err != nil {
			return nil, err
		}
		if err := os.RemoveAll(f.logFile(name)); err != nil {
			return nil, err
		}
		srv.describe(&s.endpoints)
		s.controls[name] = &control{name: name, logFile: f.logFile(name), died: s.died, server: srv}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	return s, s.all(func(c *control) error {
		err := c.start(ctx)
		if err != nil {
			cancel(err)
		}
		return err
	})
}

// LockFile is the name of a file that is in every data folder, and tells that it is one.
const LockFile = "rescind.lock"

// Remove deletes a data folder, and ends what a killed process has left running on it.
func Remove(ctx context.Context, dir string) error {
	if _, err := os.Stat(filepath.Join(dir, LockFile)); err != nil {
		return fmt.Errorf("remove data folder: %w", err)
	}
	f, err := openUnused(ctx, dir)
	if err != nil {
		return err
	}
	return f.remove()
}

// openUnused opens the data folder, and ends servers that a killed process has left running on it.
func openUnused(ctx context.Context, dir string) (*folder, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lockTimeout, fmt.Errorf("not free after %s", lockTimeout))
	defer cancel()
	f, err := openFolder(ctx, dir)
	if err != nil {
		return nil, err
	}
	var wait sync.WaitGroup
	errs := make([]error, 3)
	wait.Go(func() { errs[0] = endPostgresOrphans(f) })
	wait.Go(func() { errs[1] = endRabbitMQOrphans(f) })
	wait.Go(func() { errs[2] = endEtcdOrphans(f) })
	wait.Wait()
	err = errors.Join(errs...)
	if err == nil {
		err = f.discardStrangers()
	}
	sweepAbandoned()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("clear up data folder %s: %w", f.base, err), f.close())
	}
	return f, nil
}

// Endpoints tells how to reach the servers. They stay the same when a server is stopped and started.
func (s *Stack) Endpoints() Endpoints { return s.endpoints }

// Died gets an error for each server that ends without having been told to.
func (s *Stack) Died() <-chan error { return s.died }

// Stop ends all servers, in under 10 seconds. Calling it again has no effect.
func (s *Stack) Stop() error { return s.stop() }

func (s *Stack) stopAll() error {
	end := (*control).stop
	if s.temporary {
		end = (*control).kill
	}
	err := s.all(end)
	if s.guard != nil {
		err = errors.Join(err, s.guard.Close())
	}
	if s.temporary {
		return errors.Join(err, s.folder.remove())
	}
	return errors.Join(err, s.folder.close())
}

// StopServer ends one server in good order. A server that is not running stays so.
func (s *Stack) StopServer(name Server) error { return s.on(name, (*control).stop) }

// KillServer ends one server as a crash would.
func (s *Stack) KillServer(name Server) error { return s.on(name, (*control).kill) }

// WipeServer deletes all data of one server, which it kills if it is running.
func (s *Stack) WipeServer(name Server) error { return s.on(name, (*control).wipe) }

// StartServer starts one server again, at the same address, and returns when it answers.
func (s *Stack) StartServer(ctx context.Context, name Server) error {
	return s.on(name, func(c *control) error { return c.start(ctx) })
}

// BackupServer copies the data of one server, in place of any earlier copy. The server is down while it copies.
func (s *Stack) BackupServer(ctx context.Context, name Server) error {
	return s.on(name, func(c *control) error { return c.copy(ctx, "back up", c.server.dir(), c.server.dir()+".backup") })
}

// RestoreServer puts the copy in place of the data of one server. The server is down while it copies.
func (s *Stack) RestoreServer(ctx context.Context, name Server) error {
	return s.on(name, func(c *control) error { return c.copy(ctx, "restore", c.server.dir()+".backup", c.server.dir()) })
}

func (s *Stack) on(name Server, do func(*control) error) error {
	c, ok := s.controls[name]
	if !ok {
		return fmt.Errorf("server %s is not a part of this stack", name)
	}
	return do(c)
}

func (s *Stack) all(do func(*control) error) error {
	var (
		wait sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	for _, c := range s.controls {
		wait.Go(func() {
			err := do(c)
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	wait.Wait()
	return errors.Join(errs...)
}

// server is one kind of server. Calls come one at a time.
type server interface {
	// describe fills in how the server is reached.
	describe(*Endpoints)
	// dir holds all of its data, and nothing else. It may not exist.
	dir() string
	// start returns when the server answers, with a channel that is closed when it has ended, or fails and leaves
	// nothing running. It makes what the server needs on disk.
	start(ctx context.Context) (ended <-chan struct{}, err error)
	// stop ends it in good order, or within 8 seconds.
	stop() error
	// kill ends it, or what an ending by itself has left of it, at once.
	kill() error
}

// control does one thing at a time to a server.
type control struct {
	name    Server
	logFile string
	died    chan<- error

	mu     sync.Mutex
	server server
	ended  <-chan struct{} // of the running server, nil if there is none
}

func (c *control) start(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.startLocked(ctx)
}

func (c *control) startLocked(ctx context.Context) error {
	if c.ended != nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("no answer within %s", startTimeout))
	defer cancel()
	ended, err := c.server.start(ctx)
	if err != nil {
		return fmt.Errorf("start %s: %w; %s", c.name, err, logTail(c.logFile))
	}
	c.ended = ended
	go c.watch(ended)
	return nil
}

// watch reports a server that ends by itself.
func (c *control) watch(ended <-chan struct{}) {
	<-ended
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended != ended {
		return
	}
	c.ended = nil
	err := errors.Join(fmt.Errorf("%s ended by itself; %s", c.name, logTail(c.logFile)), c.server.kill())
	select {
	case c.died <- err:
	default: // nobody listens, and has not for a while
	}
}

func (c *control) stop() error { return c.end("stop", server.stop) }

func (c *control) kill() error { return c.end("kill", server.kill) }

func (c *control) end(verb string, end func(server) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.endLocked(verb, end)
}

func (c *control) endLocked(verb string, end func(server) error) error {
	if c.ended == nil {
		return nil
	}
	c.ended = nil
	if err := end(c.server); err != nil {
		return fmt.Errorf("%s %s: %w", verb, c.name, err)
	}
	return nil
}

func (c *control) wipe() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.endLocked("kill", server.kill); err != nil {
		return err
	}
	return os.RemoveAll(c.server.dir())
}

func (c *control) copy(ctx context.Context, verb, from, to string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	wasRunning := c.ended != nil
	if err := c.endLocked("stop", server.stop); err != nil {
		return err
	}
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-Rp", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", verb, c.name, err, out)
	}
	if !wasRunning {
		return nil
	}
	return c.startLocked(ctx)
}
