// Stackd runs one stack of private servers for test processes, which reach it at a Unix socket. It ends, and deletes all
// data, some time after the last of them is gone. Each holds a request open for as long as it lives, so that the kernel
// tells when it has ended, however it did.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rescindhq/rescind/internal/devstack"
)

// firstUser bounds the wait for the first user: whoever started this process may have ended in the meantime.
const firstUser = 30 * time.Second

func main() {
	devstack.Child()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(ctx, os.Args[1:], log); err != nil {
		log.Error("failed", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, log *slog.Logger) error {
	cfg := devstack.Config{Fresh: true, Temporary: true, Log: os.Stderr}
	flags := flag.NewFlagSet("stackd", flag.ContinueOnError)
	socket := flags.String("socket", "", "the `path` of the socket to listen at")
	linger := flags.Duration("linger", 0, "how long to wait for another user after the last one")
	sweep := flags.String("sweep", "", "a `folder` of folders like the data folder's, in which to delete what no process uses")
	flags.StringVar(&cfg.Dir, "dir", "", "the data `folder`")
	flags.BoolVar(&cfg.NoFsync, "no-fsync", false, "answer before data is on disk")
	flags.BoolVar(&cfg.Management, "management", false, "run RabbitMQ's management plugin")
	flags.Func("without", "a `server` not to start; may be repeated", func(name string) error {
		cfg.Without = append(cfg.Without, devstack.Server(name))
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	// An earlier process that is still ending has closed its socket and left the file.
	if err := os.Remove(*socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", *socket)
	if err != nil {
		return err
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false) // by then it may be the next process's

	ctx, end := context.WithCancel(ctx)
	defer end()
	d := &daemon{end: end, linger: *linger, ready: make(chan struct{})}
	d.idle = time.AfterFunc(firstUser, d.endIfUnused)
	server := &http.Server{Handler: d.routes(), BaseContext: func(net.Listener) context.Context { return ctx }}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	began := time.Now()
	d.stack, d.failure = devstack.Start(ctx, cfg)
	close(d.ready)
	if d.failure == nil {
		log.Info("ready", "seconds", time.Since(began).Seconds())
		if *sweep != "" {
			go sweepUnused(ctx, *sweep, log)
		}
		d.wait(ctx, served, log)
	}
	d.refuse()
	ending := time.Now()
	log.Info("ending")
	if d.failure == nil {
		end() // and with it all requests
	} // else those who wait get the reason
	replies, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	err = server.Shutdown(replies)
	if d.stack != nil {
		err = errors.Join(err, d.stack.Stop())
	}
	log.Info("ended", "seconds", time.Since(ending).Seconds())
	return errors.Join(d.failure, err)
}

// daemon counts users, and does what they ask for.
type daemon struct {
	end     context.CancelFunc
	linger  time.Duration
	ready   chan struct{} // closed when one of these two is set
	stack   *devstack.Stack
	failure error

	mu      sync.Mutex
	users   int
	refused bool
	idle    *time.Timer // runs while there are no users
}

func (d *daemon) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /use", d.use)
	mux.HandleFunc("POST /servers/{server}/{action}", d.control)
	mux.HandleFunc("PUT /vhosts/{name}", d.addVhost)
	mux.HandleFunc("DELETE /vhosts/{name}", d.deleteVhost)
	return mux
}

// wait returns when ctx ends, or the socket is lost. Servers that tests kill are no news: we are asked to do it.
func (d *daemon) wait(ctx context.Context, served <-chan error, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case err := <-served:
			log.Error("serve socket", "error", err)
			return
		case err := <-d.stack.Died():
			log.Error("server died", "error", err)
		}
	}
}

// enter counts one more user, or refuses it because the end has begun.
func (d *daemon) enter() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refused {
		return false
	}
	d.users++
	d.idle.Stop()
	return true
}

func (d *daemon) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.users--
	if d.users == 0 {
		d.idle.Reset(d.linger)
	}
}

func (d *daemon) endIfUnused() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.users == 0 {
		d.refused = true
		d.end()
	}
}

func (d *daemon) refuse() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refused = true
}

// use answers at once whether the caller is a user now, says when the stack is ready or why there is none, and lasts as
// long as the user.
func (d *daemon) use(w http.ResponseWriter, r *http.Request) {
	if !d.enter() {
		http.Error(w, "ending", http.StatusServiceUnavailable)
		return
	}
	defer d.leave()
	out := http.NewResponseController(w)
	w.WriteHeader(http.StatusOK)
	if err := out.Flush(); err != nil {
		return
	}
	var state struct {
		Endpoints devstack.Endpoints `json:"endpoints"`
		Error     string             `json:"error"`
	}
	select {
	case <-d.ready:
	case <-r.Context().Done():
		return
	}
	if d.failure != nil {
		state.Error = d.failure.Error()
	} else {
		state.Endpoints = d.stack.Endpoints()
	}
	if err := json.NewEncoder(w).Encode(state); err != nil || d.failure != nil {
		return
	}
	if err := out.Flush(); err != nil {
		return
	}
	<-r.Context().Done()
}

func (d *daemon) control(w http.ResponseWriter, r *http.Request) {
	<-d.ready
	if d.failure != nil {
		reply(w, nil, d.failure)
		return
	}
	name := devstack.Server(r.PathValue("server"))
	var err error
	switch action := r.PathValue("action"); action {
	case "start":
		err = d.stack.StartServer(r.Context(), name)
	case "stop":
		err = d.stack.StopServer(name)
	case "kill":
		err = d.stack.KillServer(name)
	case "wipe":
		err = d.stack.WipeServer(name)
	case "backup":
		err = d.stack.BackupServer(r.Context(), name)
	case "restore":
		err = d.stack.RestoreServer(r.Context(), name)
	default:
		err = fmt.Errorf("there is no action %q", action)
	}
	reply(w, struct{}{}, err)
}

func (d *daemon) addVhost(w http.ResponseWriter, r *http.Request) {
	<-d.ready
	if d.failure != nil {
		reply(w, nil, d.failure)
		return
	}
	vhost, err := d.stack.AddVhost(r.Context(), r.PathValue("name"))
	reply(w, vhost, err)
}

func (d *daemon) deleteVhost(w http.ResponseWriter, r *http.Request) {
	<-d.ready
	if d.failure != nil {
		reply(w, nil, d.failure)
		return
	}
	reply(w, struct{}{}, d.stack.DeleteVhost(r.Context(), r.PathValue("name")))
}

func reply(w http.ResponseWriter, body any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	// A write fails when the user is gone, and then nobody wants to know.
	_ = json.NewEncoder(w).Encode(body)
}

// sweepUnused deletes what processes like this one have left in the folders below root because they were killed, or
// because nobody tests that checkout any more.
func sweepUnused(ctx context.Context, root string, log *slog.Logger) {
	locks, err := filepath.Glob(filepath.Join(root, "*", "*", devstack.LockFile))
	if err != nil {
		log.Error("sweep", "root", root, "error", err)
		return
	}
	for _, lock := range locks {
		dir := filepath.Dir(lock)
		if age(dir) < time.Minute { // its process may be about to lock it
			continue
		}
		in, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		if err := devstack.Remove(in, dir); err == nil {
			log.Info("removed unused data folder", "dir", dir)
		}
		cancel()
	}
	// What is left then is small files, and programs that are built again when they are needed.
	for pattern, old := range map[string]time.Duration{"stackd": 24 * time.Hour, "own-*.log": time.Hour, "own-*.sock": time.Hour} {
		files, err := filepath.Glob(filepath.Join(root, "*", pattern))
		if err != nil {
			log.Error("sweep", "root", root, "error", err)
			return
		}
		for _, file := range files {
			if age(file) < old || isUsed(strings.TrimSuffix(file, filepath.Ext(file))) {
				continue
			}
			if err := os.Remove(file); err != nil {
				log.Error("sweep", "file", file, "error", err)
			}
		}
	}
}

// isUsed tells whether a data folder is there. Those that are still there after a sweep have a process.
func isUsed(dir string) bool {
	info, err := os.Stat(dir)
	return err == nil && info.IsDir()
}

func age(path string) time.Duration {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return time.Since(info.ModTime())
}
