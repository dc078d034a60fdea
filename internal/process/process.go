// Package process runs the long-lived parts of a process. It hides in which order they start and stop, how long
// each may take to finish, and what becomes of the others when one fails.
package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"
)

// Part is one long-lived piece of a process.
type Part struct {
	Name string
	// Grace is how long Run may take to return once its context has ended.
	Grace time.Duration
	// Run blocks until its context ends, finishes what it has accepted, and returns nil. Returning sooner is
	// a failure.
	Run func(context.Context) error
}

// Run starts parts in order and, when ctx ends or one of them returns, stops them one by one in reverse, so that
// each can still use those before it. Its error names the parts that failed, and those that took longer than
// their grace, which still run then.
func Run(ctx context.Context, parts []Part) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	var stops []func() error
	for _, p := range parts {
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // outlives the signal
		done := make(chan error, 1)
		go func() {
			defer end()
			err := p.Run(pctx)
			if err == nil && pctx.Err() == nil {
				err = errors.New("ended before it was stopped")
			}
			done <- err
		}()
		stops = append(stops, func() error {
			cancel()
			patience := time.NewTimer(p.Grace)
			defer patience.Stop()
			select {
			case err := <-done:
				if err != nil {
					return fmt.Errorf("%s: %w", p.Name, err)
				}
				return nil
			case <-patience.C:
				return fmt.Errorf("%s: still running %s after it was stopped", p.Name, p.Grace)
			}
		})
	}
	<-ctx.Done()
	var errs []error
	for _, stop := range slices.Backward(stops) {
		errs = append(errs, stop())
	}
	return errors.Join(errs...)
}

// ServeHTTP serves until ctx ends, then takes no more requests and waits for open ones, at most grace. Who reads
// a long answer slowly is cut off then, which is no failure of ours. Connections that were hijacked are left
// to whoever has them.
func ServeHTTP(ctx context.Context, server *http.Server, on net.Listener, grace time.Duration, log *slog.Logger) error {
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(on) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		log.Warn("requests that were not over in time are cut off", "grace", grace)
		return server.Close()
	}
	return nil
}
