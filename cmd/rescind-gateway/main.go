// Rescind-gateway checks the requests of gateways that embed nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/rescindhq/rescind/internal/sidecar"
)

// The exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const about = `Usage: rescind-gateway --config FILE [--check]

Decides about the requests of gateways that embed nothing: it answers nginx, Caddy,
Traefik, HAProxy (forward-auth) and Envoy (ext_authz), or stands before upstreams as a
reverse proxy. It runs until it gets SIGINT or SIGTERM, then finishes what it has begun;
a second signal ends it at once.

  --config FILE
        The configuration, in YAML.
  --check
        Check the configuration, with the files and variables that it names, and end.
  --version
        Show the version of this program, and end.
  --help
        Show this, and end.

A configuration to begin with:

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal does not wait
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("rescind-gateway", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	name := flags.String("config", "", "")
	check := flags.Bool("check", false, "")
	version := flags.Bool("version", false, "")
	misused := func(format string, args ...any) int {
		fmt.Fprintf(stderr, "rescind-gateway: %s\nSee: rescind-gateway --help\n", fmt.Sprintf(format, args...))
		return exitUsage
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, about+"  "+strings.ReplaceAll(strings.TrimSpace(sidecar.Example), "\n", "\n  ")+"\n")
		return exitOK
	case err != nil:
		return misused("%v", err)
	case flags.NArg() > 0:
		return misused("takes no argument, not %q", flags.Arg(0))
	case *version:
		fmt.Fprintln(stdout, versionLine())
		return exitOK
	case *name == "":
		return misused("say which configuration: --config FILE")
	}
	cfg, err := sidecar.ReadConfig(*name)
	if err != nil {
		if text := err.Error(); strings.Contains(text, "\n") {
			return misused("\n%s", text) // a list
		}
		return misused("%v", err)
	}
	if *check {
		fmt.Fprintf(stdout, "%s is sound\n", *name)
		return exitOK
	}
	log := cfg.Logger(stderr)
	if err := sidecar.Run(ctx, cfg, log, nil); err != nil {
		log.Error("ended", "error", err)
		return exitFailed
	}
	return exitOK
}

func versionLine() string {
	line := "rescind-gateway unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		line = "rescind-gateway " + info.Main.Version
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				line += " " + s.Value
			}
		}
		line += " " + info.GoVersion
	}
	return line
}
