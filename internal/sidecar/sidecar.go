// Package sidecar is the gateway for those that embed nothing: it answers forward-auth over HTTP and
// Envoy's ext_authz over gRPC, or stands before upstreams as a reverse proxy. It hides how each of
// them asks, and how the process is configured and watched.
package sidecar

import (
	"context"
	"io"
	"log/slog"
)

// Config is the file of rescind-gateway.
type Config struct{}

// ReadConfig reads and checks a configuration file. All mistakes are in its error.
func ReadConfig(name string) (Config, error) { panic("skeleton") }

// ParseConfig is ReadConfig of what it would read; relative names of files are relative to folder.
func ParseConfig(r io.Reader, folder string) (Config, error) { panic("skeleton") }

// Addresses are where a running gateway listens; empty what is not configured.
type Addresses struct{ Auth, Envoy, Proxy, Ops string }

// Run runs the gateway until ctx ends; then it finishes what it has begun. Ready is called once it listens.
func Run(ctx context.Context, cfg Config, log *slog.Logger, listening func(Addresses)) error {
	panic("skeleton")
}
