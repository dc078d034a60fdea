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
// Files are parsed strictly, by package yamlfile: a file is never larger than it looks, and
// never says two things.
package manifest

import "github.com/rescindhq/rescind/internal/yamlfile"

type (
	// Place is where something stands in a file.
	Place = yamlfile.Place
	// Mistake is something that is wrong with the files.
	Mistake = yamlfile.Mistake
	// Mistakes are what is wrong with the files: nothing was changed.
	Mistakes = yamlfile.Mistakes
)
