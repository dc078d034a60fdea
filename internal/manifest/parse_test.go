package manifest

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
)

// mistakesOf parses text as the file f.yaml.
func mistakesOf(text string) string {
	docs, found := parse("f.yaml", []byte(text))
	if want := newDesired(); len(found) == 0 {
		for i := range docs {
			want.add(&docs[i], &found)
		}
	}
	return found.Error()
}

func TestMistakes(t *testing.T) {
	t.Parallel()
	app := "applications:\n  - name: A\n    owner: o\n"
	for _, tt := range []struct {
		name, text, want string
	}{
		{"nothing", "", ""},
		{"only comments", "# a\n---\n# b\n", ""},
		{"an empty document between", "scopes: []\n---\n---\napis: []\n", ""},
		{"a byte order mark", "\ufeffscopes: []\n", ""},
		{"a list", "- a\n", "f.yaml:1:1: a document is a list, must be a mapping of members"},
		{"text", "tenant\n", "f.yaml:1:1: a document is a single value, must be a mapping of members"},

		{"not YAML", "a: b: c\n", "f.yaml:1:5: mapping values are not allowed in this context"},
		{"no end", "scopes: [\n", "f.yaml:2:1: did not find expected node content, while parsing a flow node"},
		{"a quote without end", "scopes:\n  - name: \"x\n", "f.yaml:3:1: found unexpected end of stream, while scanning a quoted scalar that begins in line 2"},
		{"a tab", "scopes:\n\t- name: x\n", "f.yaml:2:1: a tab cannot indent: use spaces"},
		{"a tab within", "scopes:\n  -\tname: x\n\tdescription: y\n", "f.yaml:2:4: found a tab character where an indentation space is expected"},
		{"Latin-1", "scopes:\n- name: caf\xe9\n", "f.yaml:2:12: this is not UTF-8: save the file as UTF-8"},
		{"UTF-16", "\xff\xfes\x00", "f.yaml:1:1: this is not UTF-8: save the file as UTF-8"},
		{"a control character", "scopes: [] # é\x01\n", "f.yaml:1:15: this is a control character (U+0001): take it away"},
		{"NUL", "\x00", "f.yaml:1:1: this is a control character (U+0000): take it away"},
		{"another YAML", "%YAML 2.0\n---\nscopes: []\n", "f.yaml:1:1: found incompatible YAML document"},

		{"an anchor", "scopes: &all []\n", "f.yaml:1:9: an anchor (&all) has no place in these files: take it away"},
		{"an alias", "scopes: &a []\napis: *a\n", "f.yaml:1:9: an anchor (&a) has no place in these files: take it away\n" +
			"f.yaml:2:7: an alias (*a) has no place in these files: write out what it stands for"},
		{"an alias for nothing", "apis: *a\n", "f.yaml:1:7: unknown anchor 'a' referenced"},
		{"a merge key", app + "    <<: {policy: Gold}\n", "f.yaml:4:5: a merge key (<<) has no place in these files: write out what it merges"},
		{"a merge key in a map", app + "    attributes: {<<: {a: b}}\n", "f.yaml:4:18: a merge key (<<) has no place in these files: write out what it merges"},
		{"a tag", app + "    policy: !!str Gold\n", "f.yaml:4:13: a tag (!!str) has no place in these files: take it away"},
		{"a tag of one's own", app + "    policy: !exec Gold\n", "f.yaml:4:13: a tag (!exec) has no place in these files: take it away"},
		{"a bomb", "a: &a [x,x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nscopes: *c\n", "f.yaml:1:4: an anchor (&a)…"},
		{"too deep", "scopes: " + strings.Repeat("[", 40), "f.yaml:1:41: it nests more than 32 deep, while increasing flow level"},
		{"too deep in blocks", strings.Repeat("- ", 40), "f.yaml:1:65: it nests more than 32 deep, while increasing indent level"},
		{"a member twice", app + "    name: B\n", `f.yaml:4:5: "name" is given twice, first in line 2: leave one`},
		{"a list twice", "scopes: []\nscopes: []\n", `f.yaml:2:1: "scopes" is given twice, first in line 1: leave one`},
		{"a name twice in a map", app + "    attributes: {a: b, a: c}\n", `f.yaml:4:24: "a" is given twice, first in line 4: leave one`},
		{"a list as a name", "? [a]\n: b\n", "f.yaml:1:3: the name of a member is a list, must be text"},

		{"an unknown member", "scope: []\n",
			`f.yaml:1:1: "scope" is not known here: correct it to one of apis, applications, key_managers, policies, scopes, tenant, tenants`},
		{"an unknown kind", "policies: {apis: []}\n", `f.yaml:1:12: "apis" is not known here: correct it to one of api, application, subscription`},
		{"what the service sets", app + "    timestamp: 1\n", `f.yaml:4:5: "timestamp" is not known here: …`},
		{"an untaught secret", app + "    keys: [{consumer_key: c, client: {secret: s3cret}}]\n", `f.yaml:4:39: "secret" is not known here: …`},
		{"a list without value", "scopes:\n", "f.yaml:1:8: scopes has no value: give one, or leave it out, or write [] for an empty list"},
		{"a member without value", app + "    policy:\n", "f.yaml:4:12: policy has no value: give one, or leave it out"},
		{"an item without value", "scopes: [~]\n", "f.yaml:1:10: an item of scopes has no value: give one, or leave it out"},
		{"a list for text", app + "    policy: [Gold]\n", "f.yaml:4:13: policy is a list, must be a single value"},
		{"text for a list", app + "    groups: staff\n", "f.yaml:4:13: groups is a single value, must be a list"},
		{"a mapping for a list", "apis: {name: A}\n", "f.yaml:1:7: apis is a mapping of members, must be a list"},
		{"a number for text", "apis: [{name: A, version: 1.0, context: /a, provider: p}]\n", "f.yaml:1:27: version is a number, must be text: put it in quotes"},
		{"a date for text", app + "    policy: 2024-01-01\n", "f.yaml:4:13: policy is a time, must be text: put it in quotes"},
		{"true for text", app + "    policy: true\n", "f.yaml:4:13: policy is true or false, must be text: put it in quotes"},
		{"text for true", app + "    blocked: \"true\"\n", `f.yaml:4:14: blocked is "true", must be true or false, without quotes`},
		{"yes for true", app + "    blocked: yes\n", `f.yaml:4:14: blocked is "yes", must be true or false, without quotes`},
		{"text for a number", app + "    id: \"7\"\n", `f.yaml:4:9: id is "7", must be a whole number in decimal digits, without quotes`},
		{"a fraction", app + "    id: 1.5\n", `f.yaml:4:9: id is "1.5", must be a whole number in decimal digits, without quotes`},
		{"octal", app + "    id: 0755\n", `f.yaml:4:9: id is "0755", must be a whole number in decimal digits, without quotes`},
		{"hexadecimal", app + "    id: 0x10\n", `f.yaml:4:9: id is "0x10", must be a whole number in decimal digits, without quotes`},
		{"too large", app + "    id: 2147483648\n", `f.yaml:4:9: id is "2147483648", which is too large`},
		{"a negative id", app + "    id: -1\n", "f.yaml:4:9: id must be at least 1"},
		{"a UUID that is none", app + "    uuid: 0D7A8F7E-7E53-4B9E-8AD4-000000000000\n", "f.yaml:4:11: uuid must be a UUID in lower case, such as 01234567-89ab-cdef-0123-456789abcdef"},

		{"a domain that is none", "tenant: Foo Bar\n", "f.yaml:1:9: tenant must be a domain: 1 to 200 of a-z 0-9 . -"},
		{"a tenant without domain", "tenants: [{id: 7}]\n", "f.yaml:1:11: domain must be 1 to 200 of a-z 0-9 . -"},
		{"an application without owner", "applications:\n  - name: A\n", "f.yaml:2:5: owner must not be empty"},
		{"an operation", "apis:\n  - name: A\n    version: v1\n    context: /a\n    provider: p\n    operations:\n      - {target: /x, verb: get}\n",
			"f.yaml:7:28: operations.0.verb must be capital letters, for example GET"},
		{"a colon in a version", "apis: [{name: A, version: \"1:0\", context: /a, provider: p}]\n",
			`f.yaml:1:27: version must have no colon: subscriptions name an API by "name:version"`},
		{"a policy", "policies:\n  application:\n    - {name: P, level: apiLevel}\n", "f.yaml:3:24: application.0.level is for policies of kind api"},
		{"a policy's UUID", "policies: {api: [{name: P, uuid: x}]}\n", "f.yaml:1:34: api.0.uuid must be a UUID in lower case, such as 01234567-89ab-cdef-0123-456789abcdef"},
		{"a scope with a space", "scopes: [{name: a b}]\n", "f.yaml:1:17: name must …"},
		{"a very long name", "scopes: [{name: " + strings.Repeat("x", 1<<20) + "}]\n", "f.yaml:1:17: name has 1048576 bytes, must be at most 255"},
		{"a very long member", strings.Repeat("x", 1000) + ": 1\n", `f.yaml:1:1: "` + strings.Repeat("x", 80) + `…" is not known here: …`},
		{"more than a resident key manager has", "key_managers: [{name: R, resident: true, iss: x}]\n",
			"f.yaml:1:36: resident is true: of a key manager of our own only enabled, display_name, description and properties can be said"},
		{"a resident key manager", "key_managers: [{name: R, resident: true, enabled: false}]\n", ""},
		{"properties", "key_managers: [{name: K, iss: i, max_token_lifetime: 1, properties: {a: [1, 2.5, {b: c}], \"1\": true}}]\n", ""},
		{"properties that gateways fall over", "key_managers: [{name: K, iss: i, max_token_lifetime: 1, properties: {a: [1, 2.5, {b: null}], grant_types: x}}]\n",
			"f.yaml:1:86: properties.a.2.b must not be null\nf.yaml:1:107: properties.grant_types must be an array of strings"},
		{"properties that JSON has not", "key_managers: [{name: K, iss: i, max_token_lifetime: 1, properties: {a: .inf}}]\n",
			`f.yaml:1:73: properties.a is ".inf", must be a number as in JSON, or text in quotes`},
		{"a subscription to nothing", app + "    subscriptions: [{policy: Gold}]\n", `f.yaml:4:21: api must name an API and its version, such as "PizzaShackAPI:1.0.0"`},
		{"a state that is none", app + "    subscriptions: [{api: \"A:1\", state: blocked}]\n",
			"f.yaml:4:41: state must be one of UNBLOCKED, BLOCKED, PROD_ONLY_BLOCKED, ON_HOLD, REJECTED, TIER_UPDATE_PENDING"},
		{"a key without consumer key", app + "    keys: [{key_type: SANDBOX}]\n", "f.yaml:4:12: consumer_key must not be empty"},
		{"a client", app + "    keys: [{consumer_key: c, client: {default_scopes: [a]}}]\n", "f.yaml:4:56: default_scopes.0 must be one of scopes"},
		{"two secrets", app + "    keys: [{consumer_key: c, client: {secret_env: A, secret_file: b}}]\n", "f.yaml:4:67: secret_file and secret_env are both given: one is enough"},
		{"a secret for a public client", app + "    keys: [{consumer_key: c, client: {auth_method: none, secret_env: A}}]\n", "f.yaml:4:52: auth_method is none: such a client has no secret"},

		{"a secret for a client with a key", app + "    keys: [{consumer_key: c, client: {auth_method: private_key_jwt, jwks: " + keys + ", secret_file: a}}]\n",
			"f.yaml:4:52: auth_method is private_key_jwt: such a client has no secret"},
		{"a client with a key", app + "    keys: [{consumer_key: c, client: {auth_method: private_key_jwt, jwks: " + keys + "}}]\n", ""},
		{"a client without its key", app + "    keys: [{consumer_key: c, client: {auth_method: private_key_jwt}}]\n", "f.yaml:4:38: jwks must …"},
		{"a client with a key for nothing", app + "    keys: [{consumer_key: c, client: {jwks: " + keys + "}}]\n", "f.yaml:4:45: jwks must …"},
		{"keys as text", app + "    keys: [{consumer_key: c, client: {jwks: '{}'}}]\n", "f.yaml:4:45: jwks is a single value, must be a mapping of members"},
		{"a client with a private key", app + "    keys: [{consumer_key: c, client: {auth_method: private_key_jwt, jwks: {keys: [{kty: EC, crv: P-256, x: a, y: b, d: c}]}}}]\n",
			"f.yaml:4:…"},
		{"grants without value", app + "    keys: [{consumer_key: c, client: {grant_types: }}]\n",
			"f.yaml:4:52: grant_types has no value: give one, or leave it out, or write [] for an empty list"},
		{"a grant that is none", app + "    keys: [{consumer_key: c, client: {grant_types: [password]}}]\n", "f.yaml:4:53: grant_types.0 must …"},
		{"a typ that is none", app + "    keys: [{consumer_key: c, client: {token_typ: jwt}}]\n", "f.yaml:4:50: token_typ must …"},
		{"an empty audience", app + "    keys: [{consumer_key: c, client: {resource_audiences: [\"\"]}}]\n", "f.yaml:4:60: resource_audiences.0 must …"},
		{"self-contained but opaque", app + "    token_type: OAUTH\n    self_contained: true\n", "f.yaml:5:21: self_contained must …"},

		{"a tenant twice", "tenants:\n- domain: a\n- domain: a\n", `f.yaml:3:3: tenant "a" is listed twice, first at f.yaml:2:3: leave one`},
		{"an application twice", app + "---\n" + app, "f.yaml:6:5: application o/A is listed twice in tenant carbon.super, first at f.yaml:2:5: leave one"},
		{"an application of two owners", app + "  - {name: A, owner: p}\n", ""},
		{"of two tenants", app + "---\ntenant: b\n" + app, ""},
		{"a policy of two kinds", "policies: {api: [{name: P}], application: [{name: P}]}\n", ""},
		{"a subscription twice", app + "    subscriptions: [{api: \"A:1\"}, {api: \"A:1\"}]\n", `f.yaml:4:35: application o/A subscribes to "A:1" twice, first at f.yaml:4:21: leave one`},
		{"several", "x: 1\napis: 2\nscopes: [{name: 3}]\n---\ntenant: [\n",
			"f.yaml:1:1: \"x\" is not known here: correct it to one of apis, applications, key_managers, policies, scopes, tenant, tenants\n" +
				"f.yaml:2:7: apis is a single value, must be a list\n" +
				"f.yaml:3:17: name is a number, must be text: put it in quotes\n" +
				"f.yaml:6:1: did not find expected node content, while parsing a flow node"},
	} {
		got := mistakesOf(tt.text)
		if begin, ok := strings.CutSuffix(tt.want, "…"); ok && strings.HasPrefix(got, begin) {
			continue
		}
		if got != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

func TestTellsTwentyMistakes(t *testing.T) {
	t.Parallel()
	got := strings.Split(mistakesOf("scopes:\n"+strings.Repeat("- {nmae: x}\n", 1000)), "\n")
	if len(got) != 20 || !strings.HasPrefix(got[19], "f.yaml:21:4:") {
		t.Errorf("%d mistakes, the last %q", len(got), got[len(got)-1])
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	large := bytes.Repeat([]byte("# comment\n"), limits.Bytes/10+1)
	if _, found := parse("f.yaml", large); found.Error() != "f.yaml: the file has more than 64 MiB: split it" {
		t.Error(found)
	}
	many := append([]byte("scopes: ["), bytes.Repeat([]byte("a,"), limits.Marks+1)...)
	if _, found := parse("f.yaml", many); !strings.HasSuffix(found.Error(), "the document has too many items: split it in several, with --- between them") {
		t.Error(found)
	}
}

func TestReadFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"b.yaml": "scopes: [{name: b}]", "a/z.yml": "scopes: [{name: z}]", "a/note.txt": "[", ".hidden.yaml": "[", ".git/x.yaml": "[",
		"..2024/c.yaml": "scopes: [{name: c}]",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// As Kubernetes mounts a ConfigMap.
	if err := os.Symlink(filepath.Join("..2024", "c.yaml"), filepath.Join(dir, "c.yaml")); err != nil {
		t.Fatal(err)
	}
	want, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"z", "b", "c"}, want.tenants["carbon.super"].order["scope"]); diff != "" {
		t.Error(diff)
	}
	for path, wrong := range map[string]string{
		filepath.Join(dir, "none"): "no such file", filepath.Join(dir, ".git"): "", t.TempDir(): "has no file *.yaml or *.yml",
	} {
		if _, err := Read(path); err == nil || !strings.Contains(err.Error(), wrong) {
			t.Errorf("%s: %v, want %q", path, err, wrong)
		}
	}
}

// What the parser takes, the dumper writes so that the parser reads the same.
func FuzzParse(f *testing.F) {
	f.Add("tenant: a\nscopes: [{name: x, roles: [r]}]\n---\napis: []\n")
	f.Add("a: &a [x,x]\nb: *a\n")
	f.Add("applications:\n  - name: \"1.0\"\n    owner: |\n      text\n    blocked: true\n    attributes: {yes: \"no\", \"null\": ~}\n")
	f.Add("key_managers: [{name: K, iss: i, max_token_lifetime: 1, properties: {a: [1e3, {b: \"\\u2028\"}]}}]")
	f.Add("policies: {api: [{name: \"- x: #\"}]}\n...\n# end")
	f.Add("applications:\n  - {name: A, owner: o, self_contained: true, keys: [{consumer_key: c, client: {auth_method: private_key_jwt, jwks: " + keys + "}}]}\n")
	f.Add("applications: [{name: A, owner: o, keys: [{consumer_key: c, client: {grant_types: [], token_typ: JWT, resource_audiences: [a, \"\\u2028\"]}}]}]")
	f.Add("applications: [{name: A, owner: o, keys: [{consumer_key: c, client: {jwks: {keys: [~, {kty: 1e3, n: [null, {}]}]}}}]}]")
	examples, err := files("../../api/examples/catalog")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range append(examples, "../../cmd/rescind-dev/demo.yaml") {
		text, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	f.Fuzz(func(t *testing.T, text string) {
		docs, found := parse("f.yaml", []byte(text))
		for _, m := range found {
			if m.Place.File != "f.yaml" || m.Text == "" {
				t.Errorf("a mistake without place or text: %#v", m)
			}
		}
		if len(found) > limits.Mistakes {
			t.Errorf("%d mistakes", len(found))
		}
		if len(found) > 0 {
			return
		}
		var b bytes.Buffer
		if err := dump(&b, docs); err != nil {
			t.Fatal(err)
		}
		again, found := parse("f.yaml", b.Bytes())
		if len(found) > 0 {
			t.Fatalf("%v\nin %s", found, &b)
		}
		if diff := cmp.Diff(plainly(docs), plainly(again)); diff != "" {
			t.Errorf("%s\nin %s", diff, &b)
		}
	})
}

// plainly is what docs say.
func plainly(docs []document) []string {
	var out []string
	for i := range docs {
		b, err := yaml.Dump(&docs[i])
		out = append(out, fmt.Sprint(string(b), err))
	}
	return out
}
