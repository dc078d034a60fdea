// Package yamlfile reads YAML files that people write, strictly. It hides the parser, what
// such files may not have, how large they may be, and where their mistakes are. What the
// nodes of a document mean is for its callers, who tell of their own mistakes by [File.Wrong].
//
// # Decisions
//
// Files have no anchors, aliases or tags: without them a file is never larger than it
// looks, and never says two things. Merge keys are members named << here, which callers do
// not know.
//
// Documents come one after another, so that only one syntax tree is in memory.
//
// The parser is go.yaml.in/yaml/v4, where the YAML organisation carries on what
// gopkg.in/yaml.v3 was. v3 is frozen but for security fixes; it does not say the column of
// a syntax error, nor lets depth be limited. sigs.k8s.io/yaml goes by way of JSON, so what
// is wrong with a value has no line. goccy/go-yaml took nearly four times the time, and
// two and a half times the memory, for the syntax tree of 100,000 subscriptions.
package yamlfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// Limits are those of a file. All are needed.
type Limits struct {
	// Bytes are the most of the file, in whole MiB.
	Bytes int
	// Depth is how deep it may nest.
	Depth int
	// Marks bounds the memory for a document's syntax tree: each of its nodes, of some 200
	// bytes, needs one of the characters that are counted.
	Marks int
	// Mistakes are the most that are told.
	Mistakes int
	// Single files have one document.
	Single bool
}

// File is one that is read, with what is wrong with it. It is for one goroutine.
type File struct {
	name   string
	limits Limits
	found  Mistakes
}

// New returns a file without mistakes. The name is for people.
func New(name string, limits Limits) *File { return &File{name: name, limits: limits} }

// Documents yields the root of each document that can be used; what is wrong with others, and
// with the text, is among the mistakes. Empty documents are left out. It ends early when the
// file is full of mistakes.
func (f *File) Documents(text []byte) iter.Seq[*yaml.Node] {
	return func(yield func(*yaml.Node) bool) {
		if !f.readable(text) {
			return
		}
		loader, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithPlugin(depth(f.limits.Depth)))
		if err != nil {
			panic(err) // the options are constants
		}
		for another := false; !f.Full(); {
			var n yaml.Node
			err := loader.Load(&n)
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				f.syntax(text, err)
				return
			}
			if n.Kind != yaml.DocumentNode || len(n.Content) != 1 {
				continue // there is nothing but comments
			}
			root := n.Content[0]
			if root.Kind == yaml.ScalarNode && root.Value == "" && root.Style == 0 {
				continue // nor here, between two ---
			}
			if another && f.limits.Single {
				f.Wrong(root, "a second document begins here, and the file can have one only: take away the ---")
				return
			}
			another = true
			if f.plain(root) && !yield(root) {
				return
			}
		}
	}
}

// Wrong tells of a mistake at n, which is nil for the file as a whole.
func (f *File) Wrong(n *yaml.Node, format string, args ...any) {
	f.wrong(f.Place(n), format, args...)
}

func (f *File) wrong(at Place, format string, args ...any) {
	if !f.Full() {
		f.found.Add(at, format, args...)
	}
}

// Place is where n stands, which is nil for the file as a whole.
func (f *File) Place(n *yaml.Node) Place {
	if n == nil {
		return Place{File: f.name}
	}
	return Place{f.name, n.Line, n.Column}
}

// Count is how many mistakes there are.
func (f *File) Count() int { return len(f.found) }

// Full: more mistakes would not be told.
func (f *File) Full() bool { return len(f.found) >= f.limits.Mistakes }

// Mistakes are those found until now, in the order of the file.
func (f *File) Mistakes() Mistakes { return f.found.sorted() }

// readable looks at what can be told of a file without its grammar.
func (f *File) readable(text []byte) bool {
	shorter, fewer := "split it", "the document has too many items: split it in several, with --- between them"
	if f.limits.Single {
		shorter, fewer = "name another, or make it shorter", "the file has too many items: take some away"
	}
	if len(text) > f.limits.Bytes {
		f.Wrong(nil, "the file has more than %d MiB: %s", f.limits.Bytes>>20, shorter)
		return false
	}
	line, begin, marks := 1, 0, 0
	at := func(i int) Place { return Place{f.name, line, utf8.RuneCount(text[begin:i]) + 1} }
	for i := 0; i < len(text); {
		r, size := rune(text[i]), 1
		if r >= utf8.RuneSelf {
			r, size = utf8.DecodeRune(text[i:])
		}
		switch {
		case r == utf8.RuneError && size == 1:
			f.wrong(at(i), "this is not UTF-8: save the file as UTF-8")
			return false
		case r == '\n':
			line, begin = line+1, i+1
			if rest, ok := bytes.CutPrefix(text[begin:], []byte("---")); ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0) {
				marks = 0 // a new document, whatever came before
			}
		case r < ' ' && r != '\t' && r != '\r', r == 0x7f, 0x80 <= r && r < 0xa0:
			f.wrong(at(i), "this is a control character (U+%04X): take it away", r)
			return false
		case r == ',', r == ':', r == '-', r == '?', r == '[', r == '{':
			if marks++; marks > f.limits.Marks {
				f.wrong(at(i), "%s", fewer)
				return false
			}
		}
		i += size
	}
	return true
}

// syntax reports an error of the parser.
func (f *File) syntax(text []byte, err error) {
	at, what := f.Place(nil), err.Error()
	if e, ok := errors.AsType[*yaml.LoadError](err); ok {
		at.Line, at.Column, what = e.Mark.Line, e.Mark.Column, e.Message
		if e.ContextMsg != "" {
			what += ", " + e.ContextMsg
			if e.ContextMark.Line > 0 && e.ContextMark.Line != at.Line {
				what += fmt.Sprintf(" that begins in line %d", e.ContextMark.Line)
			}
		}
		if i := e.Mark.Index; i >= 0 && i < len(text) && text[i] == '\t' && strings.Contains(what, "cannot start any token") {
			what = "a tab cannot indent: use spaces"
		}
	}
	f.wrong(at, "%s", what)
}

// plain reports what no node may have, wherever it stands.
func (f *File) plain(n *yaml.Node) bool {
	before := f.Count()
	switch {
	case n.Kind == yaml.AliasNode:
		f.Wrong(n, "an alias (*%s) has no place in these files: write out what it stands for", Shorten(n.Value))
	case n.Anchor != "":
		f.Wrong(n, "an anchor (&%s) has no place in these files: take it away", Shorten(n.Anchor))
	case n.Style&yaml.TaggedStyle != 0:
		f.Wrong(n, "a tag (%s) has no place in these files: take it away", Shorten(n.Tag))
	}
	for _, child := range n.Content {
		if f.Full() {
			break
		}
		f.plain(child)
	}
	return f.Count() == before
}

// depth is how deep a file may nest. Aliases are refused as such.
type depth int

func (d depth) CheckDepth(at int, _ *yaml.DepthContext) error {
	if at > int(d) {
		return fmt.Errorf("it nests more than %d deep", int(d))
	}
	return nil
}

func (depth) CheckAlias(int, int) error { return nil }

// KindName is how people are told of a kind of node.
func KindName(kind yaml.Kind) string {
	switch kind {
	case yaml.SequenceNode:
		return "a list"
	case yaml.MappingNode:
		return "a mapping of members"
	}
	return "a single value"
}

// IsNull reports whether n is a member or an item without value.
func IsNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// Shorten is text of a file, which may be long, for a message.
func Shorten(s string) string {
	const most = 80
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
