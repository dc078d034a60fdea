package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRun(t *testing.T) {
	t.Parallel()
	password := writeFile(t, "password", "secret\n")
	sound := writeFile(t, "sound.yaml", "service: {url: \"http://127.0.0.1:1\", username: u, password_file: "+password+"}\nany_audience: true\n"+
		"auth: {listen: \"127.0.0.1:0\"}\nops: {listen: \"127.0.0.1:0\"}\n")
	taken := writeFile(t, "taken.yaml", "service: {url: \"http://127.0.0.1:1\", username: u, password_file: "+password+"}\nany_audience: true\n"+
		"auth: {listen: \"127.0.0.1:0\"}\nops: {listen: \"localhost:99999\"}\n")
	broken := writeFile(t, "broken.yaml", "service: {}\nauth: {}\nlisten: x\n")
	far := writeFile(t, "far.yaml", "service: {url: \"http://127.0.0.1:1\", username: u, password_file: "+password+"}\nany_audience: true\n"+
		"folder: "+password+"\nauth: {listen: \"127.0.0.1:0\"}\nops: {listen: \"127.0.0.1:0\"}\n")
	for _, tt := range []struct {
		args   string
		code   int
		stdout string // a part of it
		stderr string // a part of it
	}{
		{"", 2, "", "say which configuration: --config FILE"},
		{"--help", 0, "staleness: {max: 300s, then: deny}", ""},
		{"-h", 0, "Usage: rescind-gateway --config FILE", ""},
		{"--version", 0, "rescind-gateway ", ""},
		{"--no-such", 2, "", "-no-such"},
		{"extra", 2, "", `takes no argument, not "extra"`},
		{"--config /no/such", 2, "", "no such file or directory"},
		{"--check --config " + broken, 2, "", "broken.yaml:3:1: listen is not known."},
		{"--check --config " + taken, 2, "", `ops.listen is "localhost:99999": it must be host:port`},
		{"--config " + broken, 2, "", "broken.yaml:1:10: service.url is not set"},
		{"--check --config " + sound, 0, "sound.yaml is sound\n", ""},
		{"--config " + far, 1, "", "not a directory"},
		{"--config " + sound, 0, "", `"msg":"stopped"`}, // it is told to stop before it begins
	} {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			var stdout, stderr bytes.Buffer
			code := run(ctx, strings.Fields(tt.args), &stdout, &stderr)
			if code != tt.code || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) {
				t.Errorf("status %d, want %d\nstdout: %s\nstderr: %s", code, tt.code, &stdout, &stderr)
			}
		})
	}
}

// Whoever runs beside a proxy is light: no database's client, and no server of any kind.
func TestLinksNoServer(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	for _, must := range []string{"go.etcd.io/etcd/client/v3", "github.com/rescindhq/rescind/api/gateway"} {
		if !strings.Contains(string(out), must+"\n") {
			t.Fatalf("%s is not among %d dependencies: the list is not what this test takes it for", must, len(deps))
		}
	}
	for _, dep := range deps {
		for _, never := range []string{
			"github.com/jackc/", "go.etcd.io/etcd/server", "go.etcd.io/raft", "go.etcd.io/bbolt", "github.com/golang-migrate/",
			"github.com/rescindhq/rescind/internal/ledger", "github.com/rescindhq/rescind/internal/app", "github.com/rescindhq/rescind/migrations",
			"github.com/go-chi/", "github.com/envoyproxy/go-control-plane/pkg",
		} {
			if strings.HasPrefix(dep, never) {
				t.Errorf("rescind-gateway links %s", dep)
			}
		}
	}
}
