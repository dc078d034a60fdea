// Rescind-dev runs Rescind on this machine, on private Postgres, RabbitMQ and etcd servers of its own.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/rescindhq/rescind/internal/devstack"
)

const usage = `Rescind-dev runs Rescind on this machine, on servers of its own.

	rescind-dev [flags]        the three servers, demo data, the service, and two gateways
	rescind-dev stack [flags]  the three servers alone

Each takes --help. Ctrl-C ends everything that was started.
`

func main() {
	devstack.Child()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx = withGoRun(ctx)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit status: 0, 1 if something failed, 2 if the command line is wrong.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	command := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command, args = args[0], args[1:]
	}
	switch command {
	case "":
		return runDev(ctx, args, stdout, stderr)
	case "stack":
		return runStack(ctx, args, stdout, stderr)
	case serviceCommand:
		return runService(ctx, stderr)
	case gatewayCommand:
		return runGateway(ctx, args, stderr)
	case "help":
		fmt.Fprint(stdout, usage)
		return 0
	default:
		fmt.Fprintf(stderr, "rescind-dev has no command %q.\n\n%s", command, usage)
		return 2
	}
}

// withGoRun ends ctx when `go run` started this process and has ended: a SIGTERM that is meant for both reaches only
// the go command, which does not pass it on.
func withGoRun(ctx context.Context) context.Context {
	parent := os.Getppid()
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", parent))
	if err != nil || strings.TrimSpace(string(name)) != "go" {
		return ctx
	}
	ctx, end := context.WithCancelCause(ctx)
	go func() {
		poll := time.NewTicker(200 * time.Millisecond)
		defer poll.Stop()
		for os.Getppid() == parent {
			select {
			case <-ctx.Done():
				return
			case <-poll.C:
			}
		}
		end(fmt.Errorf("go run (process %d) has ended", parent))
	}()
	return ctx
}
