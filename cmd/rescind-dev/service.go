package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/sidecar"
)

// The commands that are for this program itself: the service, and each gateway, runs in
// a process of its own, without etcd, so that its memory and its failures are its own.
const (
	serviceCommand = "service"
	gatewayCommand = "gateway"
)

// readyFD is where a child says that it takes requests.
const readyFD = 3

// runService runs the service by the settings in the environment until its parent,
// who holds the other end of standard input, has gone or wants it to end.
func runService(ctx context.Context, stderr io.Writer) int {
	cfg, err := app.ParseConfig(app.Input{Environ: os.Environ()})
	if err != nil {
		fmt.Fprintf(stderr, "%v\n", err)
		return 2
	}
	return runChild(ctx, serviceCommand, stderr, func(ctx context.Context, ready func()) error {
		return app.Serve(ctx, cfg, obs.NewLogger(cfg.Obs, stderr), func(app.Addresses) { ready() })
	})
}

// runGateway runs a gateway by a configuration file as runService runs the service.
func runGateway(ctx context.Context, args []string, stderr io.Writer) int {
	if len(args) != 1 {
		fmt.Fprintf(stderr, "rescind-dev %s takes the name of one file, not %q\n", gatewayCommand, args)
		return 2
	}
	cfg, err := sidecar.ReadConfig(args[0])
	if err != nil {
		fmt.Fprintf(stderr, "%v\n", err)
		return 2
	}
	log := obs.NewLogger(cfg.Log, stderr)
	return runChild(ctx, gatewayCommand, stderr, func(ctx context.Context, ready func()) error {
		return sidecar.Run(ctx, cfg, log, func(sidecar.Addresses) { ready() })
	})
}

// runChild calls run with a context that ends when the parent wants it to, or has gone.
func runChild(ctx context.Context, name string, stderr io.Writer, run func(ctx context.Context, ready func()) error) int {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // a Ctrl-C is for the parent
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	err := run(ctx, func() {
		ready := os.NewFile(readyFD, "ready")
		_, _ = ready.WriteString("ready\n")
		_ = ready.Close()
	})
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return 1
	}
	return 0
}

// child is a running process of this program.
type child struct {
	pid         int
	ready, done chan struct{} // closed when it takes requests, and when it has ended
	stop        func() error  // ends it and returns how it ended
}

// stopPatience leaves the servers their part of ten seconds.
const stopPatience = 5 * time.Second

// startChild starts this program with args.
func startChild(ctx context.Context, environ []string, stderr io.Writer, args ...string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	readEnd, writeEnd, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), self, args...)
	cmd.Env = environ
	cmd.Stderr = stderr
	cmd.ExtraFiles = []*os.File{writeEnd}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	_ = writeEnd.Close()
	if err != nil {
		_ = readEnd.Close()
		return nil, fmt.Errorf("start the %s: %w", args[0], err)
	}
	s := &child{pid: cmd.Process.Pid, ready: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer readEnd.Close()
		if n, _ := readEnd.Read(make([]byte, 1)); n > 0 {
			close(s.ready)
		}
	}()
	var ended error
	go func() {
		ended = cmd.Wait()
		close(s.done)
	}()
	s.stop = sync.OnceValue(func() error {
		_ = stdin.Close()
		patience := time.AfterFunc(stopPatience, func() { _ = cmd.Process.Kill() })
		defer patience.Stop()
		<-s.done
		if ended != nil {
			return fmt.Errorf("the %s: %w", args[0], ended)
		}
		return nil
	})
	return s, nil
}
