package yamlfile

import (
	"fmt"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
)

var some = Limits{Bytes: 1 << 20, Depth: 4, Marks: 8, Mistakes: 3}

// read returns the line of each document that can be used, and what is wrong with the others.
func read(text string, limits Limits) (lines, found string) {
	f := New("f.yaml", limits)
	for n := range f.Documents([]byte(text)) {
		lines += fmt.Sprint(n.Line, " ")
	}
	return strings.TrimSpace(lines), f.Mistakes().Error()
}

func TestDocuments(t *testing.T) {
	t.Parallel()
	single := some
	single.Single = true
	for _, tt := range []struct {
		name, text  string
		limits      Limits
		lines, want string
	}{
		{"nothing", "", some, "", ""},
		{"only comments", "# a\n---\n# b\n---\n", some, "", ""},
		{"several", "a: 1\n---\n---\n~\n---\n[]\n", some, "1 4 6", ""},
		{"a byte order mark and CR LF", "\ufeffa: 1\r\n---\r\nb: 2\r\n", some, "1 3", ""},
		{"a merge key is a member", "<<: {a: b}\n", some, "1", ""},
		{"what comes before a mistake", "a: 1\n---\nb: [\n", some, "1", "f.yaml:4:1: did not find expected node content, while parsing a flow node"},
		{"an anchor in one of them", "a: &x 1\n---\nb: 1\n", some, "3", "f.yaml:1:4: an anchor (&x) has no place in these files: take it away"},
		{"a tag of a key", "? !!str a\n: 1\n", some, "", "f.yaml:1:3: a tag (!!str) has no place in these files: take it away"},
		{"as many as are told", "- &a 1\n- &b 1\n- &c 1\n- &d 1\n---\n[\n", some, "", "f.yaml:1:3: an anchor (&a) has no place in these files: take it away\n" +
			"f.yaml:2:3: an anchor (&b) has no place in these files: take it away\nf.yaml:3:3: an anchor (&c) has no place in these files: take it away"},

		{"a tab", "a:\n\t- b\n", some, "", "f.yaml:2:1: a tab cannot indent: use spaces"},
		{"NEL", "é: \u0085\n", some, "", "f.yaml:1:4: this is a control character (U+0085): take it away"},
		{"Latin-1", "a: 1\n# caf\xe9\n", some, "", "f.yaml:2:6: this is not UTF-8: save the file as UTF-8"},
		{"as deep as can be", "[[[[]]]]", some, "1", ""},
		{"too deep", "[[[[[]]]]]", some, "", "f.yaml:1:5: it nests more than 4 deep, while increasing flow level"},

		{"as large as can be", "a" + strings.Repeat("\n", 1<<20-1), some, "1", ""},
		{"too large", "a" + strings.Repeat("\n", 1<<20), some, "", "f.yaml: the file has more than 1 MiB: split it"},
		{"as many items as can be", "[,,,,,,,", some, "", "f.yaml:1:2: did not find expected node content, while parsing a flow node"},
		{"too many items", "[,,,,,,,,]", some, "", "f.yaml:1:9: the document has too many items: split it in several, with --- between them"},
		{"each document has the limit for itself", "[a,a,a,a,a]\n---\n[a,a,a,a,a]\n--- \n[a,a,a,a,a]\n", some, "1 3 5", ""},
		{"what looks like the begin of a document", "[a,a,a,a,a,\n---x]", some, "", "f.yaml:2:3: the document has too many items: split it in several, with --- between them"},

		{"one", "---\na: 1\n---\n# b\n", single, "2", ""},
		{"one too many", "a: 1\n---\nb: 1\n---\nc: 1\n", single, "1", "f.yaml:3:1: a second document begins here, and the file can have one only: take away the ---"},
		{"one, too large", strings.Repeat("\n", 1<<20+1), single, "", "f.yaml: the file has more than 1 MiB: name another, or make it shorter"},
		{"one, of too many items", "[,,,,,,,,]", single, "", "f.yaml:1:9: the file has too many items: take some away"},
	} {
		if lines, found := read(tt.text, tt.limits); lines != tt.lines || found != tt.want {
			t.Errorf("%s:\n got %q %s\nwant %q %s", tt.name, lines, found, tt.lines, tt.want)
		}
	}
}

// Who has seen enough gets no more, and nothing that follows is told.
func TestDocumentsEnd(t *testing.T) {
	t.Parallel()
	f := New("f.yaml", some)
	for n := range f.Documents([]byte("a: 1\n---\nb: [\n")) {
		if n.Line != 1 {
			t.Errorf("line %d", n.Line)
		}
		break
	}
	if f.Count() != 0 {
		t.Error(f.Mistakes())
	}
}

func TestMistakesStandInTheOrderOfTheFile(t *testing.T) {
	t.Parallel()
	f := New("f.yaml", some)
	at := func(line, column int) *yaml.Node { return &yaml.Node{Line: line, Column: column} }
	f.Wrong(at(2, 1), "late")
	f.Wrong(at(1, 10), "%s", "early")
	f.Wrong(nil, "all of it")
	f.Wrong(at(1, 1), "too much")
	if got := f.Mistakes().Error(); got != "f.yaml: all of it\nf.yaml:1:10: early\nf.yaml:2:1: late" || !f.Full() {
		t.Errorf("%s, full %v", got, f.Full())
	}
}

func TestMistakesAreToldShortly(t *testing.T) {
	t.Parallel()
	var m Mistakes
	if m.Err() != nil {
		t.Error("nothing is wrong")
	}
	for range MaxTold + 2 {
		m.Add(Place{}, "x")
	}
	if got, want := m.Err().Error(), strings.Repeat("x\n", MaxTold)+"… and 2 more"; got != want {
		t.Error(got)
	}
	if got, want := Shorten(strings.Repeat("é", 100)), strings.Repeat("é", 40)+"…"; got != want {
		t.Error(got)
	}
}
