package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/verify"
)

const (
	usageVerify = "rescind verify [flags]"
	aboutVerify = `Compares what etcd and each gateway have with what Postgres has, by digests of all
revocations and of the catalog, each at the same place of the log. Nothing is stopped
for it. A gateway that has diverged is named, and asked to load a snapshot: that brings
what it lacks; what it has too much stays until it ends.

Exit status: 0 all are equal, 1 one is not, or could not be compared, 2 used wrongly.`
)

func runVerify(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind verify", usageVerify, aboutVerify, stdout, stderr)
	tell := inv.flags.Bool("tell", true, "Ask gateways that have diverged to load a snapshot. With --tell=false they are only named.")
	timeout := inv.flags.Duration("timeout", 15*time.Second, "How long gateways and etcd have to answer, 1s to 5m.")
	asJSON := inv.flags.Bool("json", false, "Write one JSON object to standard output.")
	cfg, code, ok := inv.settings(app.ForVerify, args)
	switch {
	case !ok:
		return code
	case len(inv.words) > 0:
		return inv.misused("takes no argument, not %q", inv.words[0])
	case *timeout < time.Second || *timeout > 5*time.Minute:
		return inv.misused("--timeout is %s: it must be 1s to 5m", *timeout)
	}
	verifier, err := app.OpenVerifier(ctx, cfg, obs.NewLogger(cfg.Obs, stderr))
	if err != nil {
		return inv.failed(err)
	}
	defer verifier.Close()
	report, err := verifier.Verify(ctx, verify.Options{Timeout: *timeout, Tell: *tell})
	if err != nil {
		return inv.failed(err)
	}
	if err := printVerified(stdout, &report, *asJSON); err != nil {
		return inv.failed(err)
	}
	if !report.Equal() {
		return inv.failed(unequal(&report, verifier.Served()))
	}
	return exitOK
}

// unequal says what to do. Unless it is served no gateway could be asked.
func unequal(r *verify.Report, served bool) error {
	var lines []string
	if d := r.Directory; d != nil && d.Verdict == fleet.Diverged {
		lines = append(lines, "etcd is not what Postgres is. Running services compare and repair it each RESCIND_ETCD_RECONCILE_INTERVAL: verify again after that")
	} else if d != nil && d.Verdict != fleet.Equal {
		lines = append(lines, "etcd was not compared")
	}
	var told, diverged, lost, silent []string
	for _, m := range r.Gateways {
		switch {
		case m.Verdict == fleet.Equal:
		case m.Told:
			told = append(told, m.ID)
		case m.Verdict == fleet.Diverged:
			diverged = append(diverged, m.ID)
		case m.Standing == fleet.Lost:
			lost = append(lost, m.ID)
		default:
			silent = append(silent, m.ID)
		}
	}
	if !served {
		lines = append(lines, "no service process answers: no gateway was compared")
		silent, lost = nil, nil
	}
	for _, p := range []struct {
		ids  []string
		text string
	}{
		{told, "diverged, and asked to load a snapshot: %s. Verify again in a moment; what a gateway still lacks then, a restart without its folder brings"},
		{diverged, "diverged: %s. Without --tell=false they are asked to load a snapshot"},
		{silent, "not compared, although it reports: %s. Verify again, with a longer --timeout if it is large"},
		{lost, "lost, and not compared: %s. For one that is gone for good: rescind gateways forget ID"},
	} {
		if len(p.ids) > 0 {
			lines = append(lines, fmt.Sprintf(p.text, strings.Join(p.ids, ", ")))
		}
	}
	return fmt.Errorf("not all is known to be equal\n%s", strings.Join(lines, "\n"))
}

func printVerified(w io.Writer, r *verify.Report, asJSON bool) error {
	if asJSON {
		return writeJSON(w, newVerifiedJSON(r))
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "WHAT\tSTANDING\tSEQ\tREVOCATIONS\tENTITIES\tDIGEST\tVERDICT\tNOTE")
	p := &r.Postgres
	fmt.Fprintf(table, "postgres\t-\t%d\t%d\t%d\t%s\t-\tof all tenants\n", p.Seq, p.Count, p.Entities, shortDigest(*p))
	if r.Directory != nil {
		verifiedRow(table, "etcd", "-", r.Directory, true)
	}
	for i := range r.Gateways {
		m := &r.Gateways[i]
		verifiedRow(table, "gateway "+m.ID, string(m.Standing), m, false)
	}
	return table.Flush()
}

func verifiedRow(table io.Writer, what, standing string, m *verify.Member, revocationsOnly bool) {
	seq, revocations, entities, digest := "-", "-", "-", "-"
	if d := m.Digest; d.Epoch != "" {
		seq, revocations, entities, digest = fmt.Sprint(d.Seq), fmt.Sprint(d.Count), fmt.Sprint(d.Entities), shortDigest(d)
		if revocationsOnly {
			entities = "-"
		}
	}
	note := printable(m.Detail)
	if m.Told {
		note += "; it was asked to load a snapshot"
	}
	fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", what, standing, seq, revocations, entities, digest, m.Verdict, note)
}

// shortDigest tells digests apart for people. It is of the revocations, which etcd has too.
func shortDigest(d replica.Digest) string { return fmt.Sprintf("%x", d.Revocations[:6]) }

// verifiedJSON is what --json writes.
type verifiedJSON struct {
	Equal    bool           `json:"equal"`
	Postgres replica.Digest `json:"postgres"`
	Etcd     *memberJSON    `json:"etcd,omitempty"` // missing if the log is fed to none
	Gateways []memberJSON   `json:"gateways"`
}

type memberJSON struct {
	ID       string          `json:"id,omitempty"`
	Standing fleet.Standing  `json:"standing,omitempty"`
	Verdict  fleet.Verdict   `json:"verdict"`
	Digest   *replica.Digest `json:"digest,omitempty"` // missing if it was not compared
	Want     *replica.Digest `json:"want,omitempty"`
	Detail   string          `json:"detail,omitempty"`
	Told     bool            `json:"told"` // to load a snapshot
}

func newVerifiedJSON(r *verify.Report) verifiedJSON {
	out := verifiedJSON{Equal: r.Equal(), Postgres: r.Postgres, Gateways: make([]memberJSON, len(r.Gateways))}
	if r.Directory != nil {
		etcd := newMemberJSON(r.Directory)
		out.Etcd = &etcd
	}
	for i := range r.Gateways {
		out.Gateways[i] = newMemberJSON(&r.Gateways[i])
	}
	return out
}

func newMemberJSON(m *verify.Member) memberJSON {
	out := memberJSON{ID: m.ID, Standing: m.Standing, Verdict: m.Verdict, Detail: m.Detail, Told: m.Told}
	if m.Digest.Position != (revocation.Position{}) {
		out.Digest, out.Want = &m.Digest, &m.Want
	}
	return out
}
