// Rescind revokes tokens: the service, and the tools around it. Run it without
// arguments for a list.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/migrations"
)

// The exit statuses.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnconfirmed = 3 // of revoke and keys: a person did not agree, or was not there
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal does not wait
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// command is one subcommand. Its run gets the arguments after its name.
type command struct {
	name, about string
	run         func(ctx context.Context, args []string, stdout, stderr io.Writer) int
}

func commands() []command {
	return []command{
		{"serve", "run the service", runServe},
		{"migrate", "change the database's schema, or show its version", runMigrate},
		{"epoch", "give a restored log its new identity", runEpoch},
		{"apply", "make the catalog what YAML files say", runApply},
		{"export", "write the catalog as YAML files", runExport},
		{"revoke", "end tokens: one, or all of a client, a subject, a session, a tenant or a key", runRevoke},
		{"explain", "say why a token is let through or refused", runExplain},
		{"gateways", "show what each gateway has applied", runGateways},
		{"verify", "compare Postgres, etcd and each gateway", runVerify},
		{"keys", "list, rotate and retire the signing keys of our own issuers", runKeys},
		{"account", "manage the accounts of people and gateways", runAccount},
		{"tail", "show events as they arrive at RabbitMQ and etcd", runTail},
		{"bench", "measure a running rescind-dev", runBench},
		{"version", "show the version of this program", runVersion},
	}
}

// run returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		printCommands(stderr)
		return exitUsage
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		printCommands(stdout)
		return exitOK
	}
	for _, c := range commands() {
		if c.name == args[0] {
			return c.run(ctx, args[1:], stdout, stderr)
		}
	}
	fmt.Fprintf(stderr, "rescind has no command %q.\n\n", args[0])
	printCommands(stderr)
	return exitUsage
}

func printCommands(w io.Writer) {
	fmt.Fprint(w, "Usage: rescind COMMAND [arguments]\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-9s %s\n", c.name, c.about)
	}
	fmt.Fprint(w, "\nEach command has --help.\n")
}

// invocation is what a subcommand was asked to do: words, as in "migrate down 1",
// then flags, then perhaps more words.
type invocation struct {
	name           string // with "rescind" before it
	usage          string // after "Usage: "
	about          string
	stdout, stderr io.Writer
	flags          *flag.FlagSet
	words          []string
}

func newInvocation(name, usage, about string, stdout, stderr io.Writer) *invocation {
	inv := &invocation{name: name, usage: usage, about: about, stdout: stdout, stderr: stderr, flags: flag.NewFlagSet(name, flag.ContinueOnError)}
	inv.flags.SetOutput(io.Discard)
	inv.flags.Usage = func() {}
	return inv
}

// takeWords splits the leading words off args.
func (inv *invocation) takeWords(args []string) (flags []string) {
	n := slices.IndexFunc(args, func(a string) bool { return strings.HasPrefix(a, "-") })
	if n < 0 {
		n = len(args)
	}
	inv.words = args[:n:n]
	return args[n:]
}

// parse reads args without any settings. With ok false, code is the exit status.
func (inv *invocation) parse(args []string) (code int, ok bool) {
	err := inv.flags.Parse(inv.takeWords(args))
	inv.words = append(inv.words, inv.flags.Args()...)
	return inv.check(err, inv.printOwnFlags)
}

// settings is parse for a command that has settings.
func (inv *invocation) settings(use app.Use, args []string) (cfg app.Config, code int, ok bool) {
	own := inv.ownFlags()
	cfg, err := app.ParseConfig(app.Input{Use: use, Flags: inv.flags, Args: inv.takeWords(args), Environ: os.Environ()})
	inv.words = append(inv.words, inv.flags.Args()...)
	code, ok = inv.check(err, func() {
		fmt.Fprint(inv.stdout, own)
		fmt.Fprint(inv.stdout, "\nSettings, from a flag, else the environment, else their default:\n\n")
		app.PrintSettings(inv.stdout, use)
	})
	return cfg, code, ok
}

func (inv *invocation) check(err error, printFlags func()) (code int, ok bool) {
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(inv.stdout, "Usage: %s\n\n%s\n", inv.usage, inv.about)
		printFlags()
		return exitOK, false
	case err != nil:
		return inv.misused("%v", err), false
	}
	return exitOK, true
}

// misused tells what is wrong with the command line.
func (inv *invocation) misused(format string, args ...any) int {
	text := fmt.Sprintf(format, args...)
	if strings.Contains(text, "\n") {
		text = "\n" + text // a list
	}
	fmt.Fprintf(inv.stderr, "%s: %s\nSee: %s --help\n", inv.name, text, inv.name)
	return exitUsage
}

func (inv *invocation) failed(err error) int {
	fmt.Fprintf(inv.stderr, "%s: %v\n", inv.name, err)
	return exitFailed
}

func (inv *invocation) printOwnFlags() { fmt.Fprint(inv.stdout, inv.ownFlags()) }

func (inv *invocation) ownFlags() string {
	var b strings.Builder
	inv.flags.VisitAll(func(f *flag.Flag) {
		arg, help := flag.UnquoteUsage(f)
		if arg != "" {
			arg = " " + strings.ToUpper(arg)
		}
		fmt.Fprintf(&b, "\n  --%s%s\n        %s", f.Name, arg, help)
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
			fmt.Fprintf(&b, " Default %s.", f.DefValue)
		}
	})
	if b.Len() > 0 {
		b.WriteByte('\n')
	}
	return b.String()
}

func (inv *invocation) unconfirmed(text string) int {
	fmt.Fprintf(inv.stderr, "%s: %s\n", inv.name, text)
	return exitUnconfirmed
}

// blank is the first of the flags that was given with nothing in it, as by a script whose
// variable is empty; "" if there is none.
func (inv *invocation) blank(names ...string) (blank string) {
	inv.flags.Visit(func(f *flag.Flag) {
		if blank == "" && f.Value.String() == "" && slices.Contains(names, f.Name) {
			blank = f.Name
		}
	})
	return blank
}

// given reports whether the flag was.
func (inv *invocation) given(name string) (given bool) {
	inv.flags.Visit(func(f *flag.Flag) { given = given || f.Name == name })
	return given
}

// confirm asks a person. Anything but yes, and nobody there to ask, is no.
func confirm(question string, in io.Reader, stderr io.Writer) bool {
	return confirmWith("yes", question, in, stderr)
}

// confirmWith asks for a word other than yes, where a habit must not answer.
func confirmWith(word, question string, in io.Reader, stderr io.Writer) bool {
	fmt.Fprintf(stderr, "%s Type %s to go on: ", question, word)
	answer, _ := bufio.NewReader(in).ReadString('\n')
	return strings.TrimSpace(answer) == word
}

func runVersion(_ context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind version", "rescind version", "Shows the version of this program and of the schema that it needs.", stdout, stderr)
	if code, ok := inv.parse(args); !ok {
		return code
	}
	if len(inv.words) > 0 {
		return inv.misused("takes no argument, not %q", inv.words[0])
	}
	version, revision, toolchain := "unknown", "", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		version, toolchain = info.Main.Version, info.GoVersion
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				revision = " " + s.Value
			}
		}
	}
	fmt.Fprintf(stdout, "rescind %s%s %s, schema %d\n", version, revision, toolchain, migrations.Latest)
	return exitOK
}
