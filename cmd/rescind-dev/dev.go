package main

import (
	"context"
	"io"
)

// runDev runs the servers until ctx ends.
func runDev(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	return runStack(ctx, args, stdout, stderr)
}
