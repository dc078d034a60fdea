package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/revoke"
)

const (
	usageRevoke = "rescind revoke --jti JTI | --token - | --client ID | --subject SUB | --session SID | --tenant DOMAIN | --key KID  [flags]"
	aboutRevoke = `Ends tokens before they expire: one, or all of a client, a subject, a session, a
tenant or a signing key. The service may be running, and every gateway hears of
it. It is final: nothing gives such a token its life back.

Where more than one token can be meant, what would end is shown first. --dry-run
shows only that. For a tenant and for a key it asks, unless --yes says that
somebody has looked already.

With --wait it says of each gateway that serves the tenant when it had applied it.
One that is lost is named, and not waited for.

Exit status: 0 done, 1 failed, or a live gateway had not applied it in time or was
lost meanwhile, or all are lost, or no service runs that they could report to, 2 used
wrongly, 3 not confirmed.`
)

// aim is a flag that says what is to end.
type aim struct {
	flag, help string
	kind       revocation.Kind
	member     string // of the order's JSON
	of         func(*revoke.Order) *string
}

// aims are all of them. One is given.
var aims = []aim{
	{"jti", "One token, by its `jti`.", revocation.KindToken, "jti", func(o *revoke.Order) *string { return &o.JTI }},
	{"token", "One token: the `file` that holds it, or - for standard input. Never the token itself.", revocation.KindToken, "token", func(o *revoke.Order) *string { return &o.Token }},
	{"client", "All tokens so far of a client, by its `id`, the consumer key.", revocation.KindClient, "client_id", func(o *revoke.Order) *string { return &o.ClientID }},
	{"subject", "All tokens so far of a subject, by its `sub`.", revocation.KindSubject, "sub", func(o *revoke.Order) *string { return &o.Sub }},
	{"session", "All tokens of a session, by its `sid`.", revocation.KindSession, "sid", func(o *revoke.Order) *string { return &o.SID }},
	{"tenant", "All tokens so far of all issuers of a tenant, by its `domain`. Asks.", revocation.KindTenant, "tenant", func(o *revoke.Order) *string { return &o.Tenant }},
	{"key", "All tokens, for ever, that the key of this `kid` has signed. Asks. For a key of our own see rescind keys rotate --compromised.", revocation.KindKey, "kid", func(o *revoke.Order) *string { return &o.KID }},
}

func runRevoke(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind revoke", usageRevoke, aboutRevoke, stdout, stderr)
	var order revoke.Order
	for _, a := range aims {
		inv.flags.StringVar(a.of(&order), a.flag, "", a.help)
	}
	inv.flags.StringVar(&order.Iss, "iss", "", "The `issuer` of the tokens. By default our own of carbon.super. A JWT names its own, and a tenant has none.")
	inv.flags.StringVar(&order.Reason, "reason", "", fmt.Sprintf("Why, a `text` of up to %d bytes. It is published.", revoke.MaxReason))
	dryRun := inv.flags.Bool("dry-run", false, "Show what would end, and revoke nothing.")
	yes := inv.flags.Bool("yes", false, "Do not ask.")
	wait := inv.flags.Duration("wait", 0, "How long to wait for every live gateway to apply it, up to 60s, such as 5s.")
	asJSON := inv.flags.Bool("json", false, "Write one JSON object to standard output.")
	cfg, code, ok := inv.settings(app.ForRevoke, args)
	switch {
	case !ok:
		return code
	case len(inv.words) > 0:
		return inv.misused("takes no argument, not %q", inv.words[0])
	}
	if waits := inv.given("wait"); waits && (*wait <= 0 || *wait > maxWait) {
		return inv.misused("--wait is %s: it must be above 0s, up to %s", *wait, maxWait)
	} else if waits && *dryRun {
		return inv.misused("--wait and --dry-run are both given: there is nothing to wait for")
	}
	given, err := inv.aim()
	if err != nil {
		return inv.misused("%v", err)
	}
	order.Kind = given.kind
	if given.member == "token" {
		if _, err := os.Stat(order.Token); order.Token != "-" && err != nil {
			return inv.misused("%v", errBareToken)
		}
		if order.Token, err = readSecret("token", order.Token); err != nil {
			return inv.failed(err)
		}
	}
	log := obs.NewLogger(cfg.Obs, stderr)
	revoker, err := app.OpenRevoker(ctx, cfg, log)
	if err != nil {
		return inv.failed(err)
	}
	defer revoker.Close()
	orders := []revoke.Order{order}
	var effect *revoke.Effect
	if *dryRun || order.Kind != revocation.KindToken {
		effects, err := revoker.Preview(ctx, orders)
		if err != nil {
			return inv.failed(flagged(err))
		}
		effect = &effects[0]
	}
	if *dryRun {
		if err := printDryRun(stdout, effect, *asJSON); err != nil {
			return inv.failed(err)
		}
		return exitOK
	}
	asks := !*yes && (order.Kind == revocation.KindTenant || order.Kind == revocation.KindKey)
	if effect != nil && (asks || !*asJSON) {
		if err := printEffect(stderr, effect); err != nil {
			return inv.failed(err)
		}
	}
	if asks {
		if !isTerminal(os.Stdin) {
			return inv.unconfirmed("there is nobody to ask: nothing was revoked; give --yes")
		}
		if !confirmEffect(effect, os.Stdin, stderr) {
			return inv.unconfirmed("not confirmed, nothing was revoked")
		}
	}
	if *wait > 0 {
		if err := revoker.Watch(ctx, cfg, log); err != nil {
			return inv.failed(fmt.Errorf("look at the gateways before anything is revoked: %w; nothing was revoked", err))
		}
	}
	outcomes, err := revoker.Revoke(ctx, orders)
	if err != nil {
		return inv.failed(flagged(err))
	}
	outcome := &outcomes[0]
	if *wait == 0 || outcome.Expired {
		if err := printOutcome(stdout, outcome, effect, nil, *asJSON); err != nil {
			return inv.failed(err)
		}
		return exitOK
	}
	limited, cancel := context.WithTimeout(ctx, *wait)
	defer cancel()
	var waited *app.Convergence
	result, unknown := revoker.Wait(limited, outcome)
	if unknown == nil {
		waited = &result
	}
	if err := printOutcome(stdout, outcome, effect, waited, *asJSON); err != nil {
		return inv.failed(err)
	}
	if unknown == nil {
		unknown = unconverged(&result)
	} else {
		unknown = fmt.Errorf("whether gateways have it cannot be told: %w", unknown)
	}
	if unknown != nil {
		return inv.failed(fmt.Errorf("the revocation is committed and will arrive; %w", unknown))
	}
	return exitOK
}

// maxWait is the longest time to wait for gateways.
const maxWait = 60 * time.Second

// unconverged says why it is not known that the gateways have applied what was revoked, nil if they have or there are
// none.
func unconverged(c *app.Convergence) error {
	if !c.Served {
		return errors.New("no service is running, or none answers: whether gateways have it cannot be told")
	}
	var missing, lost []string
	applied := 0
	for i := range c.Gateways {
		switch g := &c.Gateways[i]; {
		case g.Applied:
			applied++
		case g.Standing != fleet.Lost:
			missing = append(missing, g.ID)
		case slices.Contains(c.LostMeanwhile, g.ID):
			missing = append(missing, g.ID+" (lost meanwhile)")
		default:
			lost = append(lost, g.ID)
		}
	}
	switch {
	case len(missing) > 0:
		return fmt.Errorf("not confirmed by: %s", strings.Join(missing, ", "))
	case applied == 0 && len(lost) > 0:
		return fmt.Errorf("no gateway confirmed: all that are known are lost: %s", strings.Join(lost, ", "))
	case !c.Reached:
		return errors.New("not all service processes have answered in time: whether all gateways have it cannot be told")
	}
	return nil
}

// errBareToken does not repeat what was given, which may be a token.
var errBareToken = errors.New("--token takes - for standard input, or a file that is there. " +
	"A token itself is not for a command line: all on this machine can read it there, and the shell keeps it")

// aim is what is to end.
func (inv *invocation) aim() (aim, error) {
	var found []aim
	var names []string
	for _, a := range aims {
		names = append(names, "--"+a.flag)
		inv.flags.Visit(func(f *flag.Flag) {
			if f.Name == a.flag {
				found = append(found, a)
			}
		})
	}
	switch all := strings.Join(names[:len(names)-1], ", ") + " or " + names[len(names)-1]; {
	case len(found) == 0:
		return aim{}, fmt.Errorf("say what is to end: %s", all)
	case len(found) > 1:
		return aim{}, fmt.Errorf("--%s and --%s are both given: exactly one of %s is", found[0].flag, found[1].flag, all)
	}
	if blank := inv.blank(found[0].flag, "iss", "reason"); blank != "" {
		return aim{}, fmt.Errorf("--%s has nothing in it", blank)
	}
	return found[0], nil
}

// flagged is what is wrong with an order, by the flags of its members.
func flagged(err error) error {
	invalid, ok := errors.AsType[catalog.Invalid](err)
	if !ok {
		return err
	}
	var lines []string
	for _, f := range invalid {
		member := f.Pointer[strings.LastIndex(f.Pointer, "/")+1:]
		name := ""
		switch member {
		case "iss", "reason":
			name = member
		}
		for _, a := range aims {
			if a.member == member {
				name = a.flag
			}
		}
		if name == "" {
			lines = append(lines, f.Detail)
			continue
		}
		lines = append(lines, "--"+name+": "+f.Detail)
	}
	return errors.New(strings.Join(lines, "\n"))
}

// confirmEffect asks whether so much is to end.
func confirmEffect(e *revoke.Effect, in io.Reader, stderr io.Writer) bool {
	if e.Target.Kind == revocation.KindTenant {
		return confirmWith(e.Target.ID, "This ends all tokens that the tenant's issuers have issued so far.", in, stderr)
	}
	return confirm("This ends all tokens that the key has signed or will ever sign.", in, stderr)
}

// maxNamed is how many applications, and clients, people are shown.
const maxNamed = 20

func printDryRun(w io.Writer, e *revoke.Effect, asJSON bool) error {
	if asJSON {
		out := newRevokedJSON(e.Target, e.Tenant, e.NotAfter, e.Exp)
		out.DryRun, out.Expired, out.AlreadyRevoked, out.Effect = true, e.Expired, e.Revoked, newEffectJSON(e)
		return writeJSON(w, out)
	}
	return printEffect(w, e)
}

// printEffect tells a person what would end.
func printEffect(w io.Writer, e *revoke.Effect) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "Would end\t%s\n", title(e.Target))
	if e.Target.Iss != "" {
		fmt.Fprintf(table, "  issuer\t%s\n", printable(e.Target.Iss))
	}
	fmt.Fprintf(table, "  tenant\t%s\n", e.Tenant.Domain)
	switch {
	case e.NotAfter != 0:
		fmt.Fprintf(table, "  issued up to\t%s\n", second(e.NotAfter))
	case e.Target.Kind != revocation.KindToken:
		fmt.Fprintln(table, "  issued\tat any time, also later")
	}
	fmt.Fprintf(table, "  kept until\t%s\n", second(e.Exp))
	if e.Target.Kind.HasTime() {
		if e.Living.Since.IsZero() {
			fmt.Fprintln(table, "  live tokens\tnot remembered: set RESCIND_REMEMBER_TOKENS, for issuers of our own")
		} else {
			fmt.Fprintf(table, "  live tokens\t%d known, of those issued since %s\n", e.Living.Tokens, e.Living.Since.UTC().Format(time.RFC3339))
		}
	}
	applications := make([]string, len(e.Applications))
	for i, a := range e.Applications {
		applications[i] = a.Owner + "/" + a.Name
	}
	printNamed(table, "applications", applications, e.ApplicationCount)
	printNamed(table, "clients", e.Clients, e.ClientCount)
	switch {
	case e.Expired:
		fmt.Fprintln(table, "  but\tit has ended already: there is nothing to revoke")
	case e.Revoked:
		fmt.Fprintln(table, "  but\tit is revoked already: only a later time or end would change anything")
	}
	return table.Flush()
}

// printNamed writes the number of what would be hit, and the first names, each in a line.
func printNamed(table io.Writer, what string, names []string, count int) {
	fmt.Fprintf(table, "  %s\t%d\n", what, count)
	names = names[:min(len(names), maxNamed)]
	for _, name := range names {
		fmt.Fprintf(table, "\t%s\n", printable(name))
	}
	if more := count - len(names); more > 0 {
		fmt.Fprintf(table, "\tand %d more\n", more)
	}
}

// title names what a revocation ends.
func title(t revocation.Target) string {
	switch {
	case t.Kind == revocation.KindToken && t.Digest:
		return "the token with the SHA-256 " + t.ID
	case t.Kind == revocation.KindToken:
		return "the token " + printable(t.ID)
	}
	return fmt.Sprintf("all tokens of the %s %s", t.Kind, printable(t.ID))
}

func second(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }

// printOutcome writes what was revoked, and who has applied it if that was waited for.
func printOutcome(w io.Writer, o *revoke.Outcome, e *revoke.Effect, waited *app.Convergence, asJSON bool) error {
	if asJSON {
		out := newRevokedJSON(o.Target, o.Tenant, o.NotAfter, o.Exp)
		out.ID, out.Seq, out.Expired, out.AlreadyRevoked = o.ID, o.Seq, o.Expired, !o.Added && !o.Expired
		if e != nil {
			out.Effect = newEffectJSON(e)
		}
		if waited != nil {
			out.Convergence = newConvergenceJSON(waited)
		}
		return writeJSON(w, out)
	}
	note, id, seq := "", o.ID, fmt.Sprint(o.Seq)
	switch {
	case o.Expired:
		note, id, seq = "has ended already, nothing was revoked", "-", "-"
	case !o.Added:
		note = "already revoked"
	}
	iss := o.Target.Iss
	if iss == "" {
		iss = "all of the tenant"
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "KIND\tIDENTIFIER\tISSUER\tTENANT\tUNTIL\tID\tSEQ\tNOTE")
	fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", o.Target.Kind, printable(o.Target.ID), printable(iss), o.Tenant.Domain, second(o.Exp), id, seq, note)
	if err := table.Flush(); err != nil || waited == nil {
		return err
	}
	return printConvergence(w, o, waited, time.Now())
}

// printConvergence tells a person of each gateway whether it has applied o.
func printConvergence(w io.Writer, o *revoke.Outcome, r *app.Convergence, now time.Time) error {
	var b strings.Builder
	b.WriteByte('\n')
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "GATEWAY\tSTANDING\tAPPLIED")
	for i := range r.Gateways {
		c := &r.Gateways[i]
		var applied string
		switch {
		case c.Applied && c.After == 0:
			applied = "before it was asked"
		case c.Applied:
			applied = "after " + afterwards(c.After)
		case c.Standing == fleet.Lost:
			applied = fmt.Sprintf("not known: silent since %s, at seq %d", moment(c.ReportedAt), c.Report.Seq)
		case c.Report.Epoch == "":
			applied = "not yet: it has loaded nothing"
		default:
			applied = fmt.Sprintf("not yet: at seq %d, reported %s", c.Report.Seq, ago(c.ReportedAt, now))
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", c.ID, c.Standing, applied)
	}
	switch {
	case len(r.Gateways) > 0:
		_ = table.Flush() // into memory
	case r.Served:
		fmt.Fprintf(&b, "No gateway that serves %s is known, none has ever reported or all have left: there was nobody to wait for.\n", o.Tenant.Domain)
	default:
		return nil // what is wrong is told on standard error
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// afterwards is d for people, with a digit after the point where that says something.
func afterwards(d time.Duration) string {
	ms := milliseconds(d)
	if ms < 10 {
		return fmt.Sprintf("%.1f ms", ms)
	}
	return fmt.Sprintf("%.0f ms", ms)
}

// revokedJSON is what --json writes.
type revokedJSON struct {
	DryRun     bool            `json:"dry_run"`
	Kind       revocation.Kind `json:"kind"`
	Iss        string          `json:"iss,omitempty"`
	Identifier string          `json:"identifier"`
	Digest     bool            `json:"digest,omitempty"` // the identifier is a SHA-256
	Tenant     string          `json:"tenant"`
	// NotAfter is the latest iat of the tokens that are meant, for kinds that have a time.
	NotAfter int64 `json:"not_after,omitempty"`
	// Exp is when the last of them ends by itself.
	Exp int64 `json:"exp"`
	// ID and Seq are of what was revoked.
	ID             string         `json:"id,omitempty"`
	Seq            revocation.Seq `json:"seq,omitempty"`
	AlreadyRevoked bool           `json:"already_revoked"`
	Expired        bool           `json:"expired"`
	// Effect is missing for one token that is really revoked.
	Effect *effectJSON `json:"effect,omitempty"`
	// Convergence is there with --wait, if something was revoked.
	Convergence *convergenceJSON `json:"convergence,omitempty"`
}

// convergenceJSON says who has applied a revocation, in the words of POST /v1/barrier. Reached is as the exit status.
type convergenceJSON struct {
	Reached  bool           `json:"reached"`
	TookMS   float64        `json:"took_ms"`
	Live     int            `json:"live"`
	Lost     int            `json:"lost"`
	Applied  int            `json:"applied"`
	Gateways []standingJSON `json:"gateways"`
}

type standingJSON struct {
	ID         string           `json:"id"`
	Standing   fleet.Standing   `json:"standing"`
	Applied    bool             `json:"applied"`
	Epoch      revocation.Epoch `json:"epoch"`
	Seq        revocation.Seq   `json:"seq"`
	AfterMS    *float64         `json:"after_ms,omitempty"` // after the commit; missing if it is not applied
	ReportedAt time.Time        `json:"reported_at"`
}

func newConvergenceJSON(r *app.Convergence) *convergenceJSON {
	out := &convergenceJSON{Reached: unconverged(r) == nil, TookMS: milliseconds(r.Took), Gateways: make([]standingJSON, len(r.Gateways))}
	for i := range r.Gateways {
		c := &r.Gateways[i]
		shown := standingJSON{ID: c.ID, Standing: c.Standing, Applied: c.Applied, Epoch: c.Report.Epoch, Seq: c.Report.Seq, ReportedAt: c.ReportedAt.UTC()}
		if c.Applied {
			after := milliseconds(c.After)
			shown.AfterMS = &after
			out.Applied++
		}
		if c.Standing == fleet.Lost {
			out.Lost++
		} else {
			out.Live++
		}
		out.Gateways[i] = shown
	}
	return out
}

func newRevokedJSON(t revocation.Target, tenant revocation.Tenant, notAfter, exp int64) revokedJSON {
	return revokedJSON{Kind: t.Kind, Iss: t.Iss, Identifier: t.ID, Digest: t.Digest, Tenant: tenant.Domain, NotAfter: notAfter, Exp: exp}
}

// effectJSON is what was, or would be, hit. Its lists may be shorter than the counts say.
type effectJSON struct {
	ApplicationCount int               `json:"application_count"`
	Applications     []applicationJSON `json:"applications"`
	ClientCount      int               `json:"client_count"`
	Clients          []string          `json:"clients"`
	// LiveTokens is missing where nobody remembers them.
	LiveTokens      *int64     `json:"live_tokens,omitempty"`
	RememberedSince *time.Time `json:"remembered_since,omitempty"`
}

type applicationJSON struct {
	UUID  string `json:"uuid"`
	Owner string `json:"owner"`
	Name  string `json:"name"`
}

func newEffectJSON(e *revoke.Effect) *effectJSON {
	out := &effectJSON{
		ApplicationCount: e.ApplicationCount, Applications: []applicationJSON{},
		ClientCount: e.ClientCount, Clients: append([]string{}, e.Clients...),
	}
	for _, a := range e.Applications {
		out.Applications = append(out.Applications, applicationJSON{a.UUID, a.Owner, a.Name})
	}
	if e.Target.Kind.HasTime() && !e.Living.Since.IsZero() {
		since := e.Living.Since.UTC()
		out.LiveTokens, out.RememberedSince = &e.Living.Tokens, &since
	}
	return out
}
