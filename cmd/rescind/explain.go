package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/explain"
	"github.com/rescindhq/rescind/internal/obs"
)

const (
	usageExplain = "rescind explain --token -|FILE | --claims -|FILE  [flags]"
	aboutExplain = `Says why a token is let through or refused: the checks in order with what each looked
at, the facts behind the first that fails, and what to do. With --gateway it says too
whether that gateway knew. The token is not repeated anywhere.

Claims stand for a token that is not at hand: they are believed.

Exit status: 0 explained, whatever the answer is, 1 failed, 2 used wrongly.`
)

func runExplain(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind explain", usageExplain, aboutExplain, stdout, stderr)
	var q explain.Question
	var api explain.API
	token := inv.flags.String("token", "", "The `file` that holds the token, or - for standard input. Never the token itself.")
	claims := inv.flags.String("claims", "", "The `file` that holds the claims of a token as JSON, or - for standard input, in place of a token.")
	inv.flags.StringVar(&api.Context, "context", "", "The `context` of the API that was called, such as /shop/1.0.0. Without it only the token is looked at.")
	inv.flags.StringVar(&api.Version, "version", "", "The `version` of the API.")
	inv.flags.StringVar(&api.Method, "method", "", "The HTTP `method` of the request.")
	inv.flags.StringVar(&api.Path, "path", "", "The whole `path` of the request, which begins with the context.")
	inv.flags.StringVar(&q.Gateway, "gateway", "", "The `id` of the gateway that refused it.")
	at := inv.flags.String("at", "", "The `time` when that was, such as 2026-07-01T12:00:00Z. By default now.")
	asJSON := inv.flags.Bool("json", false, "Write one JSON object to standard output.")
	cfg, code, ok := inv.settings(app.ForExplain, args)
	switch {
	case !ok:
		return code
	case len(inv.words) > 0:
		return inv.misused("takes no argument") // which may be a token
	case (*token == "") == (*claims == ""):
		return inv.misused("give --token or --claims, one of them")
	case api.Context == "" && api != (explain.API{}):
		return inv.misused("--version, --method and --path are of an API: give its --context")
	case api.Context != "" && api.Version == "":
		return inv.misused("give the --version of the API too")
	}
	if blank := inv.blank("context", "version", "method", "path", "gateway", "at"); blank != "" {
		return inv.misused("--%s has nothing in it", blank)
	}
	if api.Context != "" {
		q.API = &api
	}
	var err error
	if *at != "" {
		if q.At, err = time.Parse(time.RFC3339, *at); err != nil {
			return inv.misused("--at is %q: it must be a time such as 2026-07-01T12:00:00Z", *at)
		}
	}
	if *token != "" {
		if _, err := os.Stat(*token); *token != "-" && err != nil {
			return inv.misused("%v", errBareToken)
		}
		if q.Token, err = readSecret("token", *token); err != nil {
			return inv.failed(err)
		}
	} else if q.Claims, err = readClaims(*claims); err != nil {
		return inv.failed(err)
	}
	explainer, err := app.OpenExplainer(ctx, cfg, obs.NewLogger(cfg.Obs, stderr))
	if err != nil {
		return inv.failed(err)
	}
	defer explainer.Close()
	answer, err := explainer.Explain(ctx, q)
	if err == nil && *asJSON {
		err = writeJSON(stdout, answer)
	} else if err == nil {
		_, err = io.WriteString(stdout, strings.TrimSuffix(answer.Text(), "\n")+"\n")
	}
	if err != nil {
		return inv.failed(questioned(err))
	}
	return exitOK
}

// readClaims reads claims from a file, or from standard input for -.
func readClaims(path string) (json.RawMessage, error) {
	text, err := readSecret("claims", path)
	if err != nil {
		return nil, err
	}
	if !json.Valid([]byte(text)) {
		return nil, errors.New("read the claims: they are not JSON")
	}
	return json.RawMessage(text), nil
}

// questioned is what is wrong with a question, by the flags of its members.
func questioned(err error) error {
	invalid, ok := errors.AsType[catalog.Invalid](err)
	if !ok {
		return err
	}
	lines := make([]string, len(invalid))
	for i, f := range invalid {
		lines[i] = f.Detail
		member, _ := strings.CutPrefix(f.Pointer, "#/")
		member = strings.TrimPrefix(member, "api/")
		switch member, _, _ = strings.Cut(member, "/"); member {
		case "token", "claims", "context", "version", "method", "path", "gateway", "at":
			lines[i] = fmt.Sprintf("--%s: %s", member, f.Detail)
		}
	}
	return errors.New(strings.Join(lines, "\n"))
}
