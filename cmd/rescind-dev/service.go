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
)

// serviceCommand is for this program itself: the service runs in a process of its
// own, without etcd, so that its memory and its failures are its own.
const serviceCommand = "service"

// readyFD is where the service says that it takes requests.
const readyFD = 3

// runService runs the service by the settings in the environment until its parent,
// who holds the other end of standard input, has gone or wants it to end.
func runService(ctx context.Context, stderr io.Writer) int {
	cfg, err := app.ParseConfig(app.Input{Environ: os.Environ()})
	if err != nil {
		fmt.Fprintf(stderr, "%v\n", err)
		return 2
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // a Ctrl-C is for the parent
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	err = app.Serve(ctx, cfg, obs.NewLogger(cfg.Obs, stderr), func(app.Addresses) {
		ready := os.NewFile(readyFD, "ready")
		_, _ = ready.WriteString("ready\n")
		_ = ready.Close()
	})
	if err != nil {
		fmt.Fprintf(stderr, "service: %v\n", err)
		return 1
	}
	return 0
}

// service is the running service.
type service struct {
	ready, done chan struct{} // closed when it takes requests, and when it has ended
	stop        func() error  // ends it and returns how it ended
}

// stopPatience leaves the servers their part of ten seconds.
const stopPatience = 5 * time.Second

func startService(ctx context.Context, environ []string, stderr io.Writer) (*service, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	readEnd, writeEnd, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), self, serviceCommand)
	cmd.Env = append(environ, fmt.Sprintf("RESCIND_SHUTDOWN_GRACE=%s", stopPatience-time.Second))
	cmd.Stderr = stderr
	cmd.ExtraFiles = []*os.File{writeEnd}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	_ = writeEnd.Close()
	if err != nil {
		_ = readEnd.Close()
		return nil, fmt.Errorf("start the service: %w", err)
	}
	s := &service{ready: make(chan struct{}), done: make(chan struct{})}
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
			return fmt.Errorf("the service: %w", ended)
		}
		return nil
	})
	return s, nil
}
