package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

// The limits of a file.
const (
	maxFileBytes = 64 << 20
	maxDepth     = 32
	// maxMarks bounds the memory for a document's syntax tree: each of its nodes, of
	// some 200 bytes, needs one of the characters that are counted.
	maxMarks = 4 << 20
)

// Read parses a file, or the files of a folder. Its error is [Mistakes], up to 20 of each
// file, or that of the file system.
func Read(path string) (*Desired, error) {
	names, err := files(path)
	if err != nil {
		return nil, err
	}
	var found Mistakes
	want := newDesired()
	for _, name := range names {
		text, err := readFile(name)
		if err != nil {
			return nil, err
		}
		docs, mistakes := parse(name, text)
		if found = append(found, mistakes...); len(mistakes) > 0 {
			continue
		}
		for i := range docs {
			want.add(&docs[i], &found)
		}
	}
	if err := found.err(); err != nil {
		return nil, err
	}
	return want, nil
}

// files are those that path stands for, sorted.
func files(path string) ([]string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read the catalog's files: %w", err)
	}
	if !info.IsDir() {
		return []string{path}, nil
	}
	var names []string
	err = filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name != path && strings.HasPrefix(entry.Name(), ".") {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if ext := filepath.Ext(name); !entry.IsDir() && (ext == ".yaml" || ext == ".yml") {
			names = append(names, name)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the catalog's files: %w", err)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("the folder %s has no file *.yaml or *.yml: name another", path)
	}
	slices.Sort(names)
	return names, nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read the catalog's files: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read the catalog's files: %w", err)
	}
	return text, nil
}

// parse reads the documents of a file. With mistakes they are not to be used.
func parse(name string, text []byte) ([]document, Mistakes) {
	d := decoder{file: name, fields: make(map[reflect.Type]map[string][]int)}
	if !d.readable(text) {
		return nil, d.found
	}
	loader, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithPlugin(limits{}))
	if err != nil {
		panic(err) // the options are constants
	}
	var docs []document
	for !d.full() {
		var n yaml.Node
		err := loader.Load(&n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			d.syntax(text, err)
			break
		}
		if n.Kind != yaml.DocumentNode || len(n.Content) != 1 {
			continue // there is nothing but comments
		}
		root := n.Content[0]
		if root.Kind == yaml.ScalarNode && root.Value == "" && root.Style == 0 {
			continue // nor here, between two ---
		}
		if !d.plain(root) {
			continue
		}
		var doc document
		d.decode(root, reflect.ValueOf(&doc).Elem(), "a document")
		docs = append(docs, doc)
	}
	return docs, d.found
}

// readable looks at what can be told of a file without its grammar.
func (d *decoder) readable(text []byte) bool {
	if len(text) > maxFileBytes {
		d.found.add(Place{File: d.file}, "the file has more than %d MiB: split it", maxFileBytes>>20)
		return false
	}
	line, begin, marks := 1, 0, 0
	at := func(i int) Place { return Place{d.file, line, utf8.RuneCount(text[begin:i]) + 1} }
	for i := 0; i < len(text); {
		r, size := rune(text[i]), 1
		if r >= utf8.RuneSelf {
			r, size = utf8.DecodeRune(text[i:])
		}
		switch {
		case r == utf8.RuneError && size == 1:
			d.found.add(at(i), "this is not UTF-8: save the file as UTF-8")
			return false
		case r == '\n':
			line, begin = line+1, i+1
			if rest, ok := bytes.CutPrefix(text[begin:], []byte("---")); ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0) {
				marks = 0 // a new document, whatever came before
			}
		case r < ' ' && r != '\t' && r != '\r', r == 0x7f, 0x80 <= r && r < 0xa0:
			d.found.add(at(i), "this is a control character (U+%04X): take it away", r)
			return false
		case r == ',', r == ':', r == '-', r == '?', r == '[', r == '{':
			if marks++; marks > maxMarks {
				d.found.add(at(i), "the document has too many items: split it in several, with --- between them")
				return false
			}
		}
		i += size
	}
	return true
}

// syntax reports an error of the parser.
func (d *decoder) syntax(text []byte, err error) {
	at, what := Place{File: d.file}, err.Error()
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
	d.found.add(at, "%s", what)
}

// limits is how deep a file may nest. Aliases are refused as such.
type limits struct{}

func (limits) CheckDepth(depth int, _ *yaml.DepthContext) error {
	if depth > maxDepth {
		return fmt.Errorf("it nests more than %d deep", maxDepth)
	}
	return nil
}

func (limits) CheckAlias(int, int) error { return nil }
