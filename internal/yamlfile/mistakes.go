package yamlfile

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Place is where something stands in a file.
type Place struct {
	File string
	// Line and Column begin at 1. 0 is not known.
	Line, Column int
}

// String is file:line:column, as editors and compilers write it.
func (p Place) String() string {
	s := p.File
	for _, n := range []int{p.Line, p.Column} {
		if n == 0 {
			break
		}
		s += ":" + strconv.Itoa(n)
	}
	return s
}

// Mistake is something that is wrong with a file.
type Mistake struct {
	Place Place
	Text  string
}

// Error says where and what.
func (m Mistake) Error() string {
	if m.Place.File == "" {
		return m.Text
	}
	return m.Place.String() + ": " + m.Text
}

// Mistakes are what is wrong with one file, or with several.
type Mistakes []Mistake

// MaxTold is how many mistakes people are told of at once.
const MaxTold = 100

// Error has a line for each of the first [MaxTold].
func (m Mistakes) Error() string {
	lines := make([]string, 0, min(len(m), MaxTold)+1)
	for i := range m[:min(len(m), MaxTold)] {
		lines = append(lines, m[i].Error())
	}
	if more := len(m) - MaxTold; more > 0 {
		lines = append(lines, fmt.Sprintf("… and %d more", more))
	}
	return strings.Join(lines, "\n")
}

// Add adds one at its end.
func (m *Mistakes) Add(at Place, format string, args ...any) {
	*m = append(*m, Mistake{at, fmt.Sprintf(format, args...)})
}

// Err returns nil if there are none.
func (m Mistakes) Err() error {
	if len(m) == 0 {
		return nil
	}
	return m
}

// sorted has those of one file in its order; those of one place stay as they were found.
func (m Mistakes) sorted() Mistakes {
	m = slices.Clone(m)
	slices.SortStableFunc(m, func(a, b Mistake) int {
		return cmp.Or(cmp.Compare(a.Place.Line, b.Place.Line), cmp.Compare(a.Place.Column, b.Place.Column))
	})
	return m
}
