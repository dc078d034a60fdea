package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/obs"
)

const (
	usageGateways = "rescind gateways [forget ID | canary ID URL|none]  [flags]"
	aboutGateways = `Shows the gateways: what each has applied, as of which report, and whether its state
was the log's when they were last compared. A gateway that has not reported within
its lease is lost; one that stops in good order is not there any more.

  forget ID        removes one that is gone for good. One that reports again is there
                   again
  canary ID URL    sets where the canary calls the gateway: a resource of the canary's
                   API, with https, or none for nowhere`
)

// gatewaysFlags are those of a verb; "" is the list.
var gatewaysFlags = map[string]string{"json": "", "label": "", "lost": ""}

func runGateways(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind gateways", usageGateways, aboutGateways, stdout, stderr)
	labels := make(map[string]string)
	inv.flags.Func("label", "Show only those with this label, a `name=value`. May be given more than once: then with all of them.", func(s string) error {
		name, value, ok := strings.Cut(s, "=")
		if !ok || name == "" {
			return errors.New("it must be name=value")
		}
		labels[name] = value
		return nil
	})
	lost := inv.flags.Bool("lost", false, "Show only those that are lost.")
	asJSON := inv.flags.Bool("json", false, "Write one JSON object to standard output.")
	cfg, code, ok := inv.settings(app.ForFleet, args)
	if !ok {
		return code
	}
	verb, id, url, err := gatewaysWords(inv.words)
	if err != nil {
		return inv.misused("%v", err)
	}
	inv.flags.Visit(func(f *flag.Flag) {
		if _, ours := gatewaysFlags[f.Name]; ours && verb != "" {
			err = fmt.Errorf("--%s is not for %s", f.Name, verb)
		}
	})
	if err != nil {
		return inv.misused("%v", err)
	}
	tools, err := app.OpenFleet(ctx, cfg, obs.NewLogger(cfg.Obs, stderr))
	if err != nil {
		return inv.failed(err)
	}
	defer tools.Close()
	switch verb {
	case "forget":
		err = tools.Forget(ctx, id)
	case "canary":
		err = tools.SetCanary(ctx, id, url)
	default:
		var all []fleet.Gateway
		var head revocation.Position
		if all, head, err = tools.Gateways(ctx); err == nil {
			all = selected(all, labels, *lost)
			err = printGateways(stdout, all, head, time.Now(), tools.Served(), *asJSON)
		}
	}
	if errors.Is(err, fleet.ErrNotFound) {
		err = fmt.Errorf("%w with the id %s: see rescind gateways", err, printable(id))
	}
	if err != nil {
		return inv.failed(err)
	}
	return exitOK
}

// gatewaysWords checks the words of a gateways command. Url is empty for none.
func gatewaysWords(words []string) (verb, id, url string, err error) {
	if len(words) == 0 {
		return "", "", "", nil
	}
	verb, words = words[0], words[1:]
	switch verb {
	case "forget":
		if len(words) != 1 || words[0] == "" {
			return "", "", "", errors.New("forget takes the id of one gateway")
		}
		return verb, words[0], "", nil
	case "canary":
		if len(words) != 2 || words[0] == "" || words[1] == "" {
			return "", "", "", errors.New("canary takes the id of one gateway, and a URL or none")
		}
		if words[1] == "none" {
			words[1] = ""
		}
		return verb, words[0], words[1], nil
	}
	return "", "", "", fmt.Errorf("%q is neither forget ID nor canary ID URL|none", verb)
}

// selected are those that have all labels, and are lost if only those are wanted.
func selected(all []fleet.Gateway, labels map[string]string, lost bool) []fleet.Gateway {
	return slices.DeleteFunc(all, func(g fleet.Gateway) bool {
		for name, value := range labels {
			if has, ok := g.Report.Labels[name]; !ok || has != value {
				return true
			}
		}
		return lost && g.Standing != fleet.Lost
	})
}

// printGateways writes what is known of gateways. Unless it is served that is what the database remembers: then none is
// lost for its own sake.
func printGateways(w io.Writer, all []fleet.Gateway, head revocation.Position, now time.Time, served, asJSON bool) error {
	if asJSON {
		out := fleetJSON{Epoch: head.Epoch, Head: head.Seq, Served: served, Gateways: make([]gatewayJSON, len(all))}
		for i := range all {
			out.Gateways[i] = newGatewayJSON(&all[i], head, now)
		}
		return writeJSON(w, out)
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ID\tSTANDING\tSEQ\tBEHIND\tAGE\tREPORTED\tVERDICT\tCANARY\tFEEDS\tVERSION\tACCOUNT")
	for i := range all {
		g := &all[i]
		behind, age := "another epoch", "-"
		if n := behindOf(g, head); n != nil {
			behind = fmt.Sprint(*n)
		} else if g.Report.Epoch == "" {
			behind = "-"
		}
		if g.Report.AgeMS >= 0 {
			d := time.Duration(g.Report.AgeMS) * time.Millisecond
			if g.Standing == fleet.Lost { // it has grown since the report, as far as is known
				d += max(0, now.Sub(g.ReportedAt))
			}
			age = rough(d)
		}
		fmt.Fprintf(table, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", g.ID, g.Standing, g.Report.Seq, behind, age, ago(g.ReportedAt, now),
			cmp.Or(g.Comparison.Verdict, fleet.Unknown), canaryOf(g, now), feedsOf(g), orDash(g.Report.Version), printable(g.Account))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	var b strings.Builder
	if !served {
		b.WriteString("No service process answers, so no gateway can report: this is what the database remembers\n")
	}
	for i := range all {
		tellGateway(&b, &all[i], now, served)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// tellGateway says what is wrong with a gateway, and what to do.
func tellGateway(b *strings.Builder, g *fleet.Gateway, now time.Time, served bool) {
	if g.Standing == fleet.Lost && served {
		fmt.Fprintf(b, "%s is lost: it last reported %s, and confirms nothing. If it is gone for good: rescind gateways forget %s\n", g.ID, ago(g.ReportedAt, now), g.ID)
	}
	if g.Comparison.Verdict == fleet.Diverged {
		fmt.Fprintf(b, "%s has diverged from the log: %s. To compare it again: rescind verify\n", g.ID, strings.TrimSuffix(printable(g.Comparison.Detail), "."))
	}
	if !g.Conflict.IsZero() {
		fmt.Fprintf(b, "%s is the id of two processes: the other one last reported %s. Each needs an id of its own\n", g.ID, ago(g.Conflict, now))
	}
	if g.Report.Error != "" {
		fmt.Fprintf(b, "%s says: %s\n", g.ID, printable(g.Report.Error))
	}
}

// behindOf is how many events there are after a gateway's position, nil if it is of another epoch.
func behindOf(g *fleet.Gateway, head revocation.Position) *int64 {
	if g.Report.Epoch != head.Epoch || head.Epoch == "" {
		return nil
	}
	n := int64(max(0, head.Seq-g.Report.Seq)) // the head was read before the last reports, perhaps
	return &n
}

func canaryOf(g *fleet.Gateway, now time.Time) string {
	switch {
	case g.CanaryURL == "":
		return "-"
	case g.Canary == nil:
		return "not called yet"
	case g.Canary.RefusedMS > 0:
		return fmt.Sprintf("%s after %.0f ms, %s", printable(g.Canary.Outcome), g.Canary.RefusedMS, ago(g.Canary.At, now))
	}
	return printable(g.Canary.Outcome) + ", " + ago(g.Canary.At, now)
}

// feedsOf names the feeds of a gateway, those that are cut off as such.
func feedsOf(g *fleet.Gateway) string {
	names := make([]string, len(g.Report.Feeds))
	for i, f := range g.Report.Feeds {
		names[i] = printable(f.Name)
		if !f.Connected {
			names[i] += " (cut off)"
		}
	}
	return orDash(strings.Join(names, ", "))
}

func orDash(s string) string { return cmp.Or(printable(s), "-") }

// ago is how long before now t was.
func ago(t, now time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return rough(max(0, now.Sub(t))) + " ago"
}

// rough is d for people: two or three digits of it.
func rough(d time.Duration) string {
	switch {
	case d < time.Second:
		d = d.Round(time.Millisecond)
	case d < 10*time.Second:
		d = d.Round(100 * time.Millisecond)
	default:
		d = d.Round(time.Second)
	}
	if d >= 48*time.Hour {
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	}
	s := d.String()
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, zero) {
			s = s[:len(s)-2]
		}
	}
	return s
}

// fleetJSON is what --json writes. Its members are those of GET /v1/gateways, but for Served.
type fleetJSON struct {
	Epoch revocation.Epoch `json:"epoch"`
	Head  revocation.Seq   `json:"head"`
	// Served: a service process has answered. Without one this is what the database remembers.
	Served   bool          `json:"served"`
	Gateways []gatewayJSON `json:"gateways"`
}

type gatewayJSON struct {
	ID         string               `json:"id"`
	Standing   fleet.Standing       `json:"standing"`
	ReportedAt time.Time            `json:"reported_at"`
	ReportAge  int64                `json:"age_of_report_ms"`
	Epoch      revocation.Epoch     `json:"epoch"`
	Seq        revocation.Seq       `json:"seq"`
	Behind     *int64               `json:"behind"` // null if it is of another epoch
	AgeMS      *int64               `json:"age_ms"` // null if it has never known that it was up to date
	Ready      bool                 `json:"ready"`
	Digest     fleet.Comparison     `json:"digest"`
	Account    string               `json:"account"`
	Tenant     string               `json:"tenant"`
	Labels     map[string]string    `json:"labels,omitempty"`
	Version    string               `json:"version,omitempty"`
	FirstSeen  time.Time            `json:"first_seen,omitzero"`
	Feeds      []replica.FeedStatus `json:"feeds"`
	Error      string               `json:"error,omitempty"`
	Conflict   time.Time            `json:"conflict,omitzero"` // when another process last reported with this id
	CanaryURL  string               `json:"canary_url,omitempty"`
	Canary     *fleet.CanaryResult  `json:"canary,omitempty"`
}

func newGatewayJSON(g *fleet.Gateway, head revocation.Position, now time.Time) gatewayJSON {
	out := gatewayJSON{
		ID: g.ID, Standing: g.Standing, ReportedAt: g.ReportedAt.UTC(), ReportAge: max(0, now.Sub(g.ReportedAt).Milliseconds()),
		Epoch: g.Report.Epoch, Seq: g.Report.Seq, Behind: behindOf(g, head), Ready: g.Report.Ready, Digest: g.Comparison,
		Account: g.Account, Tenant: g.Tenant, Labels: g.Report.Labels, Version: g.Report.Version, FirstSeen: g.FirstSeen.UTC(),
		Feeds: append([]replica.FeedStatus{}, g.Report.Feeds...), Error: g.Report.Error, Conflict: g.Conflict.UTC(),
		CanaryURL: g.CanaryURL, Canary: g.Canary,
	}
	out.Digest.Verdict = cmp.Or(out.Digest.Verdict, fleet.Unknown)
	if g.Report.AgeMS >= 0 {
		out.AgeMS = &g.Report.AgeMS
	}
	return out
}
