package manifest

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/rescindhq/rescind/internal/yamlfile"
)

// limits are those of a file.
var limits = yamlfile.Limits{Bytes: 64 << 20, Depth: 32, Marks: 4 << 20, Mistakes: 20}

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
	if err := found.Err(); err != nil {
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
	text, err := io.ReadAll(io.LimitReader(f, int64(limits.Bytes)+1))
	if err != nil {
		return nil, fmt.Errorf("read the catalog's files: %w", err)
	}
	return text, nil
}

// parse reads the documents of a file. With mistakes they are not to be used.
func parse(name string, text []byte) ([]document, Mistakes) {
	d := decoder{File: yamlfile.New(name, limits), fields: make(map[reflect.Type]map[string][]int)}
	var docs []document
	for root := range d.Documents(text) {
		var doc document
		d.decode(root, reflect.ValueOf(&doc).Elem(), "a document")
		docs = append(docs, doc)
	}
	return docs, d.Mistakes()
}
