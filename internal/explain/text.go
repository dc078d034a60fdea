package explain

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rescindhq/rescind/api/replica"
)

// width is how long lines of text get, in characters, where words allow it.
const width = 100

var marks = map[replica.CheckResult]string{replica.Passed: "ok", replica.Failed: "FAILED"}

// Text is the answer for people, lines of at most about 100 columns: the verdict, one check after the other,
// the facts. What comes from tokens cannot control a terminal.
func (a Answer) Text() string {
	var b strings.Builder
	b.WriteString(strings.ToUpper(strings.ReplaceAll(a.Verdict, "_", " ")))
	if a.Code != 0 {
		fmt.Fprintf(&b, "  %d %s (HTTP %d)", a.Code, printable(a.Message), a.HTTPStatus)
	}
	b.WriteString("\n")
	wrap(&b, "", a.Summary)
	if len(a.Checks) > 0 {
		b.WriteString("\n")
	}
	longest := 0
	for _, c := range a.Checks {
		longest = max(longest, utf8.RuneCountInString(c.Name))
	}
	for _, c := range a.Checks {
		mark := marks[c.Result]
		if mark == "" {
			mark = "-"
		}
		wrap(&b, fmt.Sprintf("%-6s  %-*s  ", mark, longest, c.Name), c.Detail)
	}
	if failed := firstFailed(a.Checks); failed != nil && len(failed.Facts) > 0 {
		var rows [][2]string
		for _, name := range slices.Sorted(maps.Keys(failed.Facts)) {
			rows = append(rows, [2]string{name, factText(failed.Facts[name])})
		}
		table(&b, "Facts of "+failed.Name, rows)
	}
	if r := a.Revocation; r != nil {
		table(&b, "Revocation", r.rows())
	}
	if g := a.Gateway; g != nil {
		table(&b, "Gateway "+g.ID, [][2]string{
			{"standing", string(g.Standing)}, {"knew", g.Knew}, {"as of", when(g.At)}, {"detail", g.Detail},
		})
	}
	b.WriteString("\n")
	if a.Next != "" {
		wrap(&b, "Next   ", a.Next)
	}
	wrap(&b, "State  ", a.Position.String())
	return b.String()
}

func (r *Revocation) rows() [][2]string {
	seq, at, notAfter := "the log has removed the event", "", ""
	if r.Seq != 0 {
		seq = fmt.Sprint(r.Seq)
	}
	if !r.RevokedAt.IsZero() {
		at = when(r.RevokedAt)
	}
	if r.NotAfter != 0 {
		notAfter = when(time.Unix(r.NotAfter, 0)) + ", the latest iat of dead tokens"
	}
	return [][2]string{
		{"id", r.ID}, {"kind", string(r.Kind)}, {"identifier", r.Identifier}, {"issuer", r.Iss}, {"tenant", r.Tenant},
		{"revoked at", at}, {"by", r.Actor}, {"reason", r.Reason}, {"seq", seq}, {"not after", notAfter},
		{"lasts until", when(time.Unix(r.Exp, 0))},
	}
}

// factText is a fact as it is written in JSON, but for text, which is written as it is.
func factText(v any) string {
	if s, ok := v.(string); ok {
		return s
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	return strings.Trim(string(b), `"`)
}

// table writes what has a value.
func table(b *strings.Builder, title string, rows [][2]string) {
	fmt.Fprintf(b, "\n%s\n", printable(title))
	longest := 0
	for _, row := range rows {
		if row[1] != "" {
			longest = max(longest, utf8.RuneCountInString(row[0]))
		}
	}
	for _, row := range rows {
		if row[1] != "" {
			wrap(b, fmt.Sprintf("  %-*s  ", longest, row[0]), row[1])
		}
	}
}

// wrap writes text after head, and its further lines below its first.
func wrap(b *strings.Builder, head, text string) {
	head = printable(head)
	indent := utf8.RuneCountInString(head)
	line, n := head, indent
	for _, word := range strings.Fields(printable(text)) {
		long := utf8.RuneCountInString(word)
		switch {
		case n == indent:
			line, n = line+word, n+long
			continue
		case n+1+long > width:
			b.WriteString(strings.TrimRight(line, " ") + "\n")
			line, n = strings.Repeat(" ", indent)+word, indent+long
			continue
		}
		line, n = line+" "+word, n+1+long
	}
	b.WriteString(strings.TrimRight(line, " ") + "\n")
}

// printable is s without what a terminal could take for an order.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r != ' ' && !unicode.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, s)
}
