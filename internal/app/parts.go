package app

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// part is one long-lived piece of the process. Its run blocks until ctx ends,
// finishes what it has accepted, and returns nil. Returning sooner is a failure.
type part struct {
	name  string
	grace time.Duration // to finish after ctx ends
	run   func(context.Context) error
}

// runParts starts parts in order and, when ctx ends or one of them returns, stops
// them one by one in reverse, so that each can still use those before it.
func runParts(ctx context.Context, parts []part) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	var stops []func() error
	for _, p := range parts {
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // outlives the signal
		done := make(chan error, 1)
		go func() {
			defer end()
			err := p.run(pctx)
			if err == nil && pctx.Err() == nil {
				err = errors.New("ended before it was stopped")
			}
			done <- err
		}()
		stops = append(stops, func() error {
			cancel()
			patience := time.NewTimer(p.grace)
			defer patience.Stop()
			select {
			case err := <-done:
				if err != nil {
					return fmt.Errorf("%s: %w", p.name, err)
				}
				return nil
			case <-patience.C:
				return fmt.Errorf("%s: still running %s after it was stopped", p.name, p.grace)
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
