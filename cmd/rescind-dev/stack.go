package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/rescindhq/rescind/internal/devstack"
)

// runStack runs the three servers until ctx ends, for those who run the service themselves.
func runStack(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var cfg devstack.Config
	flags := flag.NewFlagSet("rescind-dev stack", flag.ContinueOnError)
	flags.SetOutput(stderr)
	stackFlags(flags, &cfg)
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "rescind-dev stack takes no argument, not %q.\n", flags.Arg(0))
		return 2
	}
	cfg.Log = stderr
	began := time.Now()
	stack, err := devstack.Start(ctx, cfg)
	if err != nil && ctx.Err() != nil {
		fmt.Fprintln(stderr, "rescind-dev stack: interrupted before the servers were ready.")
		return 1
	}
	if err != nil {
		fmt.Fprintf(stderr, "rescind-dev stack: %v\n", err)
		return 1
	}
	at := stack.Endpoints()
	fmt.Fprintf(stdout, "export RESCIND_DATABASE_URL='%s'\nexport RESCIND_AMQP_URL='%s'\nexport RESCIND_ETCD_ENDPOINTS='%s'\n",
		at.DatabaseURL, at.AMQPURL, strings.Join(at.EtcdEndpoints, ","))
	fmt.Fprintf(stderr, "Ready after %.1f s. Ctrl-C ends the servers; their data stays in %s.\n", time.Since(began).Seconds(), cfg.Dir)
	select {
	case <-ctx.Done():
	case err = <-stack.Died():
	}
	if err = errors.Join(err, stack.Stop()); err != nil {
		fmt.Fprintf(stderr, "rescind-dev stack: %v\n", err)
		return 1
	}
	return 0
}

// stackFlags are the flags of every command that runs servers.
func stackFlags(flags *flag.FlagSet, cfg *devstack.Config) {
	flags.StringVar(&cfg.Dir, "data-dir", ".rescind", "the `folder` for all data; it gets mode 0700")
	flags.BoolVar(&cfg.Fresh, "fresh", false, "begin with an empty data folder")
	flags.BoolVar(&cfg.NoInstall, "no-install", false, "do not install missing servers: say how to")
}
