package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/manifest"
	"github.com/rescindhq/rescind/internal/obs"
)

const (
	usageApply = "rescind apply -f FILE|FOLDER [flags]"
	aboutApply = `Makes the catalog what YAML files say: tenants, key managers, policies, scopes, APIs,
applications, their keys and subscriptions. What is as they say already is left
alone, so a run that ended early is finished by running it again. The service may
be running, and hears of each change.

A list that is left out of the files says nothing. With --prune, what is missing in
a list that is there is deleted, last of all, and the tokens that it stood for are
revoked.

Try first with --dry-run. Examples are in api/examples/catalog, and rescind export
writes such files.`
)

func runApply(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind apply", usageApply, aboutApply, stdout, stderr)
	path := inv.flags.String("f", "", "The `file`, or the folder whose *.yaml and *.yml count.")
	dryRun := inv.flags.Bool("dry-run", false, "Show what would be changed, and change nothing.")
	prune := inv.flags.Bool("prune", false, "Delete what the files' lists do not have.")
	yes := inv.flags.Bool("yes", false, "Delete without asking.")
	asJSON := inv.flags.Bool("json", false, "Write JSON to standard output.")
	quiet := inv.flags.Bool("quiet", false, "Show no progress.")
	secretsOut := inv.flags.String("secrets-out", "", "The `file` to which secrets are added that are made, a line of JSON each.")
	cfg, code, ok := inv.settings(app.ForApply, args)
	switch {
	case !ok:
		return code
	case len(inv.words) > 0:
		return inv.misused("takes no argument, not %q", inv.words[0])
	case *path == "":
		return inv.misused("say which files: -f FILE or -f FOLDER")
	}
	want, err := manifest.Read(*path)
	if err != nil {
		return inv.failedAll(err)
	}
	log := obs.NewLogger(cfg.Obs, stderr)
	tools, err := app.OpenCatalog(ctx, cfg, log)
	if err != nil {
		return inv.failed(err)
	}
	defer tools.Close()
	if !*dryRun { // as a service does that starts, where none has yet
		if err := tools.Catalog.EnsureIssuers(ctx); err != nil {
			return inv.failed(err)
		}
	}
	have, err := manifest.ReadState(ctx, tools.Pool, want.Tenants())
	if err != nil {
		return inv.failed(err)
	}
	plan, err := manifest.NewPlan(want, have, *prune)
	if err != nil {
		return inv.failedAll(err)
	}
	if *dryRun {
		if err := printPlan(stdout, plan, *asJSON); err != nil {
			return inv.failed(err)
		}
		return exitOK
	}
	if plan.Deletes() > 0 && !*yes {
		if !isTerminal(os.Stdin) {
			return inv.failed(fmt.Errorf("%s would be deleted, and there is nobody to ask: nothing was changed; give --yes", things(plan.Deletes())))
		}
		printDeletes(stderr, plan)
		if !confirm(fmt.Sprintf("This deletes %s, and revokes their tokens.", things(plan.Deletes())), os.Stdin, stderr) {
			return inv.failed(errors.New("not confirmed, nothing was changed"))
		}
	}
	apply := manifest.Config{Actor: app.Operator()}
	if plan.Secrets > 0 {
		if *secretsOut == "" {
			return inv.failed(fmt.Errorf("%d keys get a secret that can be read only now: nothing was changed; "+
				"give --secrets-out FILE, or say in the files where the secrets are", plan.Secrets))
		}
		secrets, err := openSecrets(*secretsOut)
		if err != nil {
			return inv.failed(err)
		}
		defer secrets.Close()
		apply.Keep = secrets.keep
	}
	p := progress{w: stderr, total: len(plan.Steps), terminal: isTerminal(stderr), began: time.Now()}
	if !*quiet {
		apply.Progress = p.show
	}
	done, err := manifest.Apply(ctx, tools.Catalog, plan, apply)
	p.end()
	if err := printDone(stdout, plan, done, *asJSON); err != nil {
		return inv.failed(err)
	}
	if err != nil {
		return inv.failed(fmt.Errorf("%w\nIt stopped after %d of %d changes, which stay. To make the others, run it again", err, done, len(plan.Steps)))
	}
	return exitOK
}

// failedAll is failed for what may be many mistakes, each with its own place.
func (inv *invocation) failedAll(err error) int {
	mistakes, ok := errors.AsType[manifest.Mistakes](err)
	if !ok {
		return inv.failed(err)
	}
	fmt.Fprintln(inv.stderr, mistakes)
	return inv.failed(fmt.Errorf("%s to correct in the files; nothing was changed", count(len(mistakes), "mistake")))
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func things(n int) string { return count(n, "thing") }

// isTerminal reports whether v is a file that leads to a person: a device, and not the
// one that is always empty.
func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(info, null)
}

// changeJSON is a step as --json shows it.
type changeJSON struct {
	Op     manifest.Op      `json:"op"`
	Noun   catalog.Noun     `json:"noun"`
	Tenant string           `json:"tenant"`
	Name   string           `json:"name"`
	At     string           `json:"at,omitempty"`
	Diff   []differenceJSON `json:"diff,omitempty"`
}

type differenceJSON struct {
	Member string          `json:"member"`
	Old    json.RawMessage `json:"old"`
	New    json.RawMessage `json:"new"`
}

// resultJSON is what --json writes.
type resultJSON struct {
	DryRun  bool                                 `json:"dry_run"`
	Planned int                                  `json:"planned"`
	Made    int                                  `json:"made"`
	Counts  map[catalog.Noun]map[manifest.Op]int `json:"counts"`
	Changes []changeJSON                         `json:"changes,omitempty"`
}

// signs begin a line of a plan.
var signs = map[manifest.Op]string{
	manifest.Create: "+", manifest.Update: "~", manifest.Block: "~", manifest.Unblock: "~", manifest.Delete: "-",
}

func printPlan(w io.Writer, plan *manifest.Plan, asJSON bool) error {
	if asJSON {
		out := resultJSON{DryRun: true, Planned: len(plan.Steps), Counts: plan.Counts(), Changes: []changeJSON{}}
		for i := range plan.Steps {
			s := &plan.Steps[i]
			c := changeJSON{Op: s.Op, Noun: s.Noun, Tenant: s.Tenant, Name: s.Name, At: s.At.String()}
			for _, d := range s.Diff {
				c.Diff = append(c.Diff, differenceJSON(d))
			}
			out.Changes = append(out.Changes, c)
		}
		return writeJSON(w, out)
	}
	var b strings.Builder
	for i := range plan.Steps {
		printStep(&b, &plan.Steps[i])
	}
	printCounts(&b, plan)
	if plan.Secrets > 0 {
		fmt.Fprintf(&b, "A secret is made for %s: --secrets-out is needed.\n", count(plan.Secrets, "key"))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func printStep(w io.Writer, s *manifest.Step) {
	fmt.Fprintf(w, "%s %s %s", signs[s.Op], s.Op, s)
	if at := s.At.String(); at != "" {
		fmt.Fprintf(w, "  (%s)", at)
	}
	fmt.Fprintln(w)
	for _, d := range s.Diff {
		fmt.Fprintf(w, "    %s: %s -> %s\n", d.Member, shownValue(d.Old), shownValue(d.New))
	}
}

func shownValue(v json.RawMessage) string { return cmp.Or(string(v), "nothing") }

// printCounts writes a table of what a plan does, a line for each noun.
func printCounts(w io.Writer, plan *manifest.Plan) {
	if len(plan.Steps) == 0 {
		fmt.Fprintln(w, "Nothing to change: the catalog is as the files say.")
		return
	}
	counts := plan.Counts()
	for _, n := range catalog.Nouns {
		var parts []string
		for _, op := range manifest.Ops {
			if c := counts[n][op]; c > 0 {
				parts = append(parts, fmt.Sprintf("%d to %s", c, op))
			}
		}
		if len(parts) > 0 {
			fmt.Fprintf(w, "%-13s %s\n", n, strings.Join(parts, ", "))
		}
	}
}

// printDeletes writes what a person is asked about.
func printDeletes(w io.Writer, plan *manifest.Plan) {
	const most = 50
	shown := 0
	for i := range plan.Steps {
		s := &plan.Steps[i]
		if s.Op != manifest.Delete {
			continue
		}
		if shown++; shown > most {
			fmt.Fprintf(w, "… and %d more; --dry-run shows them\n", plan.Deletes()-most)
			return
		}
		printStep(w, s)
	}
}

func printDone(w io.Writer, plan *manifest.Plan, done int, asJSON bool) error {
	if asJSON {
		return writeJSON(w, resultJSON{Planned: len(plan.Steps), Made: done, Counts: plan.Counts()})
	}
	printCounts(w, plan)
	if done > 0 {
		fmt.Fprintf(w, "Made %s.\n", count(done, "change"))
	}
	return nil
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// secretsFile is where secrets go that are made.
type secretsFile struct{ *os.File }

// openSecrets opens a file that only its owner can read.
func openSecrets(path string) (secretsFile, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return secretsFile{}, fmt.Errorf("open the file for secrets: %w", err)
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("others can read %s: run chmod 600 on it, or name another file", path)
	}
	if err != nil {
		return secretsFile{}, errors.Join(err, f.Close())
	}
	return secretsFile{f}, nil
}

// keep adds a line. A run that fails may leave one for a key that was not made; of
// several lines for a key the last one is right.
func (f secretsFile) keep(s manifest.Secret) error {
	line, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if _, err := f.Write(append(line, '\n')); err != nil {
		return err
	}
	if err := f.Sync(); err != nil && isRegular(f.File) {
		return err
	}
	return nil
}

func isRegular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

// progress tells a person how far a run is: on a terminal in one line that changes,
// else in a line every 5 s.
type progress struct {
	w        io.Writer
	total    int
	terminal bool
	began    time.Time
	shown    time.Time
	open     bool // a line that is not ended
}

func (p *progress) show(done int) {
	every := 5 * time.Second
	if p.terminal {
		every = 200 * time.Millisecond
	}
	now := time.Now()
	if last := slices.MaxFunc([]time.Time{p.began, p.shown}, time.Time.Compare); now.Sub(last) < every {
		return
	}
	p.shown = now
	text := fmt.Sprintf("%d of %d changes made, %.0f a second", done, p.total, float64(done)/now.Sub(p.began).Seconds())
	if p.terminal {
		p.open = true
		fmt.Fprintf(p.w, "\r\x1b[K%s", text)
		return
	}
	fmt.Fprintln(p.w, text)
}

// end lets what is written next begin in a new line.
func (p *progress) end() {
	if p.open {
		fmt.Fprintln(p.w)
	}
}
