package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/obs"
)

const aboutEpoch = `Gives the log a new identity after Postgres was restored to an older state, and
puts back the live revocations that only etcd still has. Every gateway then
starts again from the whole state.

Stop every service process first. serve names this command when it is needed;
otherwise leave it alone.`

func runEpoch(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind epoch", "rescind epoch new [flags]", aboutEpoch, stdout, stderr)
	yes := inv.flags.Bool("yes", false, "Do not ask.")
	cfg, code, ok := inv.settings(app.ForEpoch, args)
	if !ok {
		return code
	}
	if len(inv.words) != 1 || inv.words[0] != "new" {
		return inv.misused("the one thing to do is: rescind epoch new")
	}
	const question = "This makes every gateway start again from the whole state. All service processes must be stopped."
	if !*yes && !confirm(question, os.Stdin, stderr) {
		return inv.failed(errors.New("not confirmed, nothing was changed"))
	}
	report, err := app.NewEpoch(ctx, cfg, obs.NewLogger(cfg.Obs, stderr))
	if err != nil {
		return inv.failed(err)
	}
	fmt.Fprintf(stdout, "The log has a new epoch, %s. It was at seq %d; with what etcd still had it is at %d.\n",
		report.After.Epoch, report.Before.Seq, report.After.Seq)
	return exitOK
}
