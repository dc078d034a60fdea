// Package manifest loads a catalog from YAML files and writes it back. It hides the form
// of the files, how they are compared with what the database has, and in which steps
// one becomes the other.
//
// # Files
//
// A path is a file, or a folder whose *.yaml and *.yml are read, sorted by name and with
// those of its folders; names that begin with a dot are left out. A file has one or more
// documents. Each says something about one tenant, carbon.super unless it names another;
// what several say about one tenant counts together.
//
//	tenant: carbon.super
//	key_managers: [...]
//	policies: {subscription: [...], application: [...], api: [...]}
//	scopes: [...]
//	apis: [...]
//	applications:
//	  - name: PizzaShackApp
//	    owner: admin
//	    keys: [...]
//	    subscriptions: [...]
//
// A document may also have a list of tenants: domain, and perhaps id, uuid and
// display_name. Members have the names, rules and defaults that they have in the HTTP
// API, and one thing refers to another by name, an API by "name:version". So a file is
// for any database. An id or uuid may be given for those who move from WSO2.
//
// # Decisions
//
// What a file lists is stated whole: a member that is left out takes its default. There
// is one exception. Blocking an application is what people do in an emergency, so a file
// that does not say blocked leaves it as it is.
//
// A list that is left out says nothing, and one that is there is all there is of its kind
// in the tenant, or the application: with pruning, what it does not have is deleted.
// Tenants, resident key managers and the policies named Unlimited never are. Deletes
// come after all else, so the context of an API that is pruned is free in the next run.
//
// A file never has a secret. A key with a client member gets a client where the key is
// made: its secret is in the environment or a file that the member names, or it is made
// and written to a file of its own. One that proves itself with a private key has none: the
// member jwks has its public ones. An existing client keeps what it is registered with.
//
// A tenant that is made gets its resident key manager from the service, so a plan counts on
// it before it is there, and never knows its issuer.
//
// A run is planned as a whole, then made in transactions of at most 500 events. What the
// plan saw of an entity is what its change is for: a change by somebody else in between
// ends the run. Nothing needs to be known of a run that ended early: planning again
// finds what is left.
//
// Files are parsed strictly. They have no anchors, aliases, merge keys or tags: without
// them a file is never larger than it looks, and never says two things.
//
// The parser is go.yaml.in/yaml/v4, where the YAML organisation carries on what
// gopkg.in/yaml.v3 was. v3 is frozen but for security fixes; it does not say the column of
// a syntax error, nor lets depth be limited. sigs.k8s.io/yaml goes by way of JSON, so what
// is wrong with a value has no line. goccy/go-yaml took nearly four times the time, and
// two and a half times the memory, for the syntax tree of 100,000 subscriptions.
package manifest

import (
	"fmt"
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

// Mistake is something that is wrong with the files.
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

// Mistakes are what is wrong with the files: nothing was changed.
type Mistakes []Mistake

// maxTold is how many mistakes people are told of at once.
const maxTold = 100

// Error has a line for each of the first 100.
func (m Mistakes) Error() string {
	lines := make([]string, 0, min(len(m), maxTold)+1)
	for i := range m[:min(len(m), maxTold)] {
		lines = append(lines, m[i].Error())
	}
	if more := len(m) - maxTold; more > 0 {
		lines = append(lines, fmt.Sprintf("… and %d more", more))
	}
	return strings.Join(lines, "\n")
}

func (m *Mistakes) add(at Place, format string, args ...any) {
	*m = append(*m, Mistake{at, fmt.Sprintf(format, args...)})
}

// err returns nil if there are none.
func (m Mistakes) err() error {
	if len(m) == 0 {
		return nil
	}
	return m
}
