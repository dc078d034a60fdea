package main

import (
	"cmp"
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

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/sts"
)

const (
	usageKeys = "rescind keys list | rotate | retire KID  [flags]"
	aboutKeys = `Manages the keys with which our own issuers sign tokens. The service may be running,
and follows within seconds.

  list        shows them: next (published, not used yet), active (signs), retired
              (published until its last token has ended), ended, revoked
  rotate      makes a new key. It is published first and signs once everybody has had
              the time to read it; until then the key in use goes on. Not while
              processes of a version before 3 of the schema run: they know no such key
  retire KID  stops a key from signing, now; it is published until its last token
              has ended

For a key that somebody else may have: rotate --compromised KID. That key is used and
published no longer, and all its tokens are revoked for good. Another key goes on if
there is one; else a new one signs at once. It asks, unless --yes says that somebody
has looked already.

Exit status: 0 done, 1 failed, 2 used wrongly, 3 not confirmed.`
)

// keyFlags are the flags of the command, and the verbs that take them.
var keyFlags = map[string][]string{
	"iss":         {"list", "rotate"},
	"algorithm":   {"rotate"},
	"compromised": {"rotate"},
	"yes":         {"rotate"},
	"reason":      {"rotate", "retire"},
	"json":        {"list", "rotate", "retire"},
}

func runKeys(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind keys", usageKeys, aboutKeys, stdout, stderr)
	var r sts.Rotation
	inv.flags.StringVar(&r.Iss, "iss", "", "The `issuer`. By default that of carbon.super to rotate, and all to list.")
	inv.flags.StringVar(&r.Algorithm, "algorithm", "", "The `algorithm` of the new key, RS256 or ES256, for rotate. By default that of the key in use.")
	inv.flags.StringVar(&r.Compromised, "compromised", "", "The `kid` of a key that somebody else may have, or all, for rotate. Asks.")
	inv.flags.StringVar(&r.Reason, "reason", "", "Why, a `text`, for rotate and retire. It is in the audit, and published with the revocation of a key.")
	yes := inv.flags.Bool("yes", false, "Do not ask.")
	asJSON := inv.flags.Bool("json", false, "Write JSON to standard output.")
	cfg, code, ok := inv.settings(app.ForApply, args)
	if !ok {
		return code
	}
	verb, kid, err := keysWords(inv.words)
	if err == nil {
		err = inv.keyFlags(verb)
	}
	if err != nil {
		return inv.misused("%v", err)
	}
	if r.Algorithm != "" && r.Algorithm != "RS256" && r.Algorithm != "ES256" {
		return inv.misused("--algorithm is %q: it must be RS256 or ES256", r.Algorithm)
	}
	tools, err := app.OpenKeys(ctx, cfg, obs.NewLogger(cfg.Obs, stderr))
	if err != nil {
		return inv.failed(err)
	}
	defer tools.Close()
	var keys []sts.KeyInfo
	switch verb {
	case "list":
		keys, err = tools.List(ctx, r.Iss)
	case "rotate":
		r.Iss = cmp.Or(r.Iss, cfg.Issuer)
		if r.Compromised != "" {
			lost, err := compromised(ctx, tools, r)
			if err != nil {
				return inv.failed(err)
			}
			if !*yes {
				if err := printKeys(stderr, lost); err != nil {
					return inv.failed(err)
				}
				if !isTerminal(os.Stdin) {
					return inv.unconfirmed("there is nobody to ask: nothing was changed; give --yes")
				}
				question := fmt.Sprintf("This ends all tokens of %s, for ever.", count(len(lost), "key"))
				if !confirm(question, os.Stdin, stderr) {
					return inv.unconfirmed("not confirmed, nothing was changed")
				}
			}
		}
		keys, err = tools.Rotate(ctx, r)
	case "retire":
		var key sts.KeyInfo
		key, err = tools.Retire(ctx, kid, r.Reason)
		keys = []sts.KeyInfo{key}
	}
	if err != nil {
		return inv.failed(flagged(err))
	}
	switch {
	case *asJSON:
		err = writeJSON(stdout, keysJSON(keys))
	case verb == "list":
		err = printKeys(stdout, keys)
	default:
		err = tellKeys(stdout, keys, time.Now())
	}
	if err != nil {
		return inv.failed(err)
	}
	return exitOK
}

// keysWords checks the words of a keys command.
func keysWords(words []string) (verb, kid string, err error) {
	if len(words) == 0 {
		return "", "", errors.New("say what to do: list, rotate or retire KID")
	}
	verb, words = words[0], words[1:]
	switch verb {
	case "list", "rotate":
		if len(words) != 0 {
			return "", "", fmt.Errorf("%s takes no argument, not %q", verb, words[0])
		}
		return verb, "", nil
	case "retire":
		if len(words) != 1 || words[0] == "" {
			return "", "", errors.New("retire takes the kid of one key")
		}
		return verb, words[0], nil
	}
	return "", "", fmt.Errorf("%q is none of list, rotate and retire KID", verb)
}

// keyFlags checks that the flags that are given are the verb's, and have something in them.
func (inv *invocation) keyFlags(verb string) (err error) {
	inv.flags.Visit(func(f *flag.Flag) {
		if verbs := keyFlags[f.Name]; verbs != nil && !slices.Contains(verbs, verb) && err == nil {
			err = fmt.Errorf("--%s is for %s, not for %s", f.Name, strings.Join(verbs, " and "), verb)
		}
	})
	if blank := inv.blank("iss", "algorithm", "compromised", "reason"); blank != "" && err == nil {
		err = fmt.Errorf("--%s has nothing in it", blank)
	}
	return err
}

// compromised are the keys that r withdraws.
func compromised(ctx context.Context, tools *app.KeyTools, r sts.Rotation) ([]sts.KeyInfo, error) {
	keys, err := tools.List(ctx, r.Iss)
	if err != nil {
		return nil, err
	}
	lost := slices.DeleteFunc(keys, func(k sts.KeyInfo) bool {
		return k.State == sts.KeyRevoked || r.Compromised == sts.AllKeys && k.State == sts.KeyEnded || r.Compromised != sts.AllKeys && k.KID != r.Compromised
	})
	if len(lost) == 0 && r.Compromised != sts.AllKeys {
		return nil, fmt.Errorf("--compromised: %s has no key %s that is not revoked yet: see rescind keys list", r.Iss, printable(r.Compromised))
	}
	return lost, nil
}

func printKeys(w io.Writer, keys []sts.KeyInfo) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ISSUER\tKID\tALG\tSTATE\tUSE FROM\tRETIRED AT\tPUBLISHED UNTIL")
	for _, k := range keys {
		retired, until := k.RetiredAt, k.PublishedUntil
		if k.State == sts.KeyRevoked {
			retired, until = k.RevokedAt, k.RevokedAt
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", k.Iss, k.KID, k.Algorithm, k.State, moment(k.UseFrom), moment(retired), moment(until))
	}
	return table.Flush()
}

// moment is a time in a table, or - where there is none.
func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

// tellKeys says of keys that were made or changed what happens when.
func tellKeys(w io.Writer, keys []sts.KeyInfo, now time.Time) error {
	var b strings.Builder
	for _, k := range keys {
		fmt.Fprintf(&b, "%s key %s of %s ", k.Algorithm, k.KID, k.Iss)
		switch {
		case k.State == sts.KeyRevoked:
			b.WriteString("is withdrawn: neither used nor published any more, and all tokens that it has signed are dead.\n")
		case k.RetiredAt.IsZero() && k.UseFrom.After(now):
			fmt.Fprintf(&b, "is published, and signs from %s.\n", clock(k.UseFrom, now))
		case k.RetiredAt.IsZero():
			b.WriteString("signs.\n")
		case k.RetiredAt.After(now):
			fmt.Fprintf(&b, "signs until %s, and is published until %s, when its last token has ended.\n", clock(k.RetiredAt, now), clock(k.PublishedUntil, now))
		default:
			fmt.Fprintf(&b, "signs no more, and is published until %s, when its last token has ended.\n", clock(k.PublishedUntil, now))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// clock is a time in a sentence, with its day only if that is not today.
func clock(t, now time.Time) string {
	t, now = t.UTC(), now.UTC()
	if t.YearDay() == now.YearDay() && t.Year() == now.Year() {
		return t.Format("15:04:05 UTC")
	}
	return t.Format("2006-01-02 15:04:05 UTC")
}

// keyJSON is a key as --json shows it.
type keyJSON struct {
	Iss            string       `json:"iss"`
	Tenant         string       `json:"tenant"`
	KID            string       `json:"kid"`
	Alg            string       `json:"alg"`
	State          sts.KeyState `json:"state"`
	CreatedAt      time.Time    `json:"created_at"`
	UseFrom        time.Time    `json:"use_from"`
	RetiredAt      time.Time    `json:"retired_at,omitzero"`
	PublishedUntil time.Time    `json:"published_until,omitzero"`
	RevokedAt      time.Time    `json:"revoked_at,omitzero"`
}

func keysJSON(keys []sts.KeyInfo) []keyJSON {
	shown := make([]keyJSON, len(keys))
	for i, k := range keys {
		shown[i] = keyJSON{
			k.Iss, k.Tenant.Domain, k.KID, k.Algorithm, k.State, k.CreatedAt.UTC(), k.UseFrom.UTC(), k.RetiredAt.UTC(), k.PublishedUntil.UTC(), k.RevokedAt.UTC(),
		}
	}
	return shown
}
