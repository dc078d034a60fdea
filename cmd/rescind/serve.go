package main

import (
	"context"
	"io"
	"log/slog"

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/obs"
)

const aboutServe = `Runs the service until it gets SIGINT or SIGTERM. Then it finishes what it has
accepted and ends; a second signal ends it at once. Secrets have no flag of
their own: their flag, and a variable that ends in _FILE, names a file.`

func runServe(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind serve", "rescind serve [settings]", aboutServe, stdout, stderr)
	cfg, code, ok := inv.settings(app.ForServe, args)
	if !ok {
		return code
	}
	if len(inv.words) > 0 {
		return inv.misused("takes no argument, not %q", inv.words[0])
	}
	log := newLogger(cfg, stderr)
	if cfg.Migrate {
		if err := app.Migrate(ctx, cfg.Database, log); err != nil {
			return logged(log, err)
		}
	}
	if err := app.Serve(ctx, cfg, log, nil); err != nil {
		return logged(log, err)
	}
	return exitOK
}

func newLogger(cfg app.Config, w io.Writer) *slog.Logger {
	log := obs.NewLogger(cfg.Obs, w)
	for _, warning := range cfg.Warnings {
		log.Warn("check the settings", "problem", warning)
	}
	return log
}

// logged is how what runs under a supervisor fails: in its log.
func logged(log *slog.Logger, err error) int {
	log.Error("ended", "error", err)
	return exitFailed
}
