package app

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/wso2"
)

var update = flag.Bool("update", false, "write the README's table of settings")

// topFile is a file of the repository's top folder, or below it.
func topFile(name string) string { return filepath.Join("..", "..", filepath.FromSlash(name)) }

func readTopFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(topFile(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestEveryPackageHasOneDoc(t *testing.T) {
	t.Parallel()
	for _, p := range ourPackages(t) {
		var documented []string
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if f.Doc != nil {
				documented = append(documented, name)
			}
		}
		if len(documented) != 1 {
			t.Errorf("%s has %d package docs %v, must have one", p.name(), len(documented), documented)
		}
	}
}

const (
	tableBegin = "<!-- The table is made of internal/app/config_settings.go: go test ./internal/app -run TestREADME -update -->\n"
	tableEnd   = "<!-- end of the table -->"
)

func TestREADMEHasTheSettings(t *testing.T) {
	t.Parallel()
	text := readTopFile(t, "README.md")
	before, rest, found := strings.Cut(text, tableBegin)
	got, after, ended := strings.Cut(rest, tableEnd)
	if !found || !ended {
		t.Fatal("the marks of the table are not there")
	}
	want := settingsTable()
	if *update {
		if err := os.WriteFile(topFile("README.md"), []byte(before+tableBegin+want+tableEnd+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the table is not that of the settings; write it with -update\n%s", diff)
	}
}

func settingsTable() string {
	var b strings.Builder
	b.WriteString("| Setting | Default | It is | What for |\n| --- | --- | --- | --- |\n")
	for _, s := range settings(new(Config)) {
		name, def := "`"+s.env()+"`", ""
		if s.secret {
			name += " (secret)"
		}
		switch {
		case s.def != "":
			def = "`" + s.def + "`"
		case s.required&ForServe != 0:
			def = "required"
		}
		cell := func(text string) string { return strings.ReplaceAll(text, "|", `\|`) }
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", name, def, cell(s.rule), cell(s.help))
	}
	return b.String()
}

// The files of a deployment and of the documentation name no setting that is none.
func TestSettingsInFiles(t *testing.T) {
	t.Parallel()
	known := map[string]bool{"RESCIND_HEAVY": true} // of the tests
	for _, s := range settings(new(Config)) {
		known[s.env()] = true
		if s.secret {
			known[s.env()+fileSuffix] = true
		}
	}
	name := regexp.MustCompile(`RESCIND_[A-Z0-9_]+`)
	for _, file := range []string{
		"docker-compose.yml", "README.md", "DEVELOPMENT.md", "CHANGELOG.md", "scripts/do", "scripts/Dockerfile", ".ci/run",
		"api/openapi.yaml", "api/asyncapi.yaml",
	} {
		for _, n := range name.FindAllString(readTopFile(t, file), -1) {
			if !known[n] {
				t.Errorf("%s names %s, which is not a setting", file, n)
			}
		}
	}
}

type composeFile struct {
	Services map[string]struct {
		Image       string
		Build       struct{ Context, Dockerfile string }
		Command     []string
		Environment map[string]string
		Restart     string
		Healthcheck struct{ Test []string }
		DependsOn   map[string]struct{ Condition string } `yaml:"depends_on"`
	}
	Configs map[string]struct{ Content string }
}

// interpolated has given instead of the variables that Compose would replace.
func interpolated(text string, given map[string]string) string {
	variable := regexp.MustCompile(`\$\$|\$\{([A-Z_]+)(:\?[^}]*)?\}`)
	return variable.ReplaceAllStringFunc(text, func(v string) string {
		if v == "$$" {
			return "$"
		}
		return given[variable.FindStringSubmatch(v)[1]]
	})
}

func TestCompose(t *testing.T) {
	t.Parallel()
	out, err := exec.Command(topFile("scripts/do"), "compose-env").Output()
	if err != nil {
		t.Fatalf("make secrets as the file says: %v", err)
	}
	given := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		given[name] = value
	}
	text := readTopFile(t, "docker-compose.yml")
	for _, m := range regexp.MustCompile(`\$\{([A-Z_]+)`).FindAllStringSubmatch(text, -1) {
		if given[m[1]] == "" {
			t.Errorf("nothing gives %s", m[1])
		}
	}
	var file composeFile
	if err := yaml.Unmarshal([]byte(text), &file); err != nil {
		t.Fatal(err)
	}

	names := slices.Sorted(maps.Keys(file.Services))
	if diff := cmp.Diff([]string{"etcd", "migrate", "postgres", "rabbitmq", "rescind-1", "rescind-2"}, names); diff != "" {
		t.Error(diff)
	}
	for name, want := range map[string]string{"postgres": `^postgres:17\.\d+`, "rabbitmq": `^rabbitmq:4\.2\.\d+`, "etcd": `/etcd:v3\.6\.\d+$`} {
		if image := file.Services[name].Image; !regexp.MustCompile(want).MatchString(image) {
			t.Errorf("%s runs %s, which does not match %s", name, image, want)
		}
	}
	for name, s := range file.Services {
		uses := map[string]Use{"migrate": ForMigrate, "rescind-1": ForServe, "rescind-2": ForServe}
		use, ours := uses[name]
		if name != "migrate" && len(s.Healthcheck.Test) == 0 {
			t.Errorf("%s has no health check", name)
		}
		if !ours {
			continue
		}
		if _, err := os.Stat(topFile(filepath.Join(s.Build.Context, s.Build.Dockerfile))); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		var environ []string
		for variable, value := range s.Environment {
			environ = append(environ, variable+"="+interpolated(value, given))
		}
		c, err := ParseConfig(Input{Use: use, Environ: environ})
		if err != nil || len(c.Warnings) > 0 {
			t.Errorf("the settings of %s: %v %v", name, err, c.Warnings)
		}
		if use == ForServe && s.DependsOn["migrate"].Condition != "service_completed_successfully" {
			t.Errorf("%s does not wait for the migrations", name)
		}
	}

	var definitions struct {
		Users       []struct{ Name, Password string }
		Permissions []struct{ User, Configure, Write, Read string }
	}
	if err := json.Unmarshal([]byte(interpolated(file.Configs["broker-definitions"].Content, given)), &definitions); err != nil {
		t.Fatalf("the broker's definitions: %v", err)
	}
	for _, p := range definitions.Permissions {
		write := regexp.MustCompile(p.Write)
		for _, exchange := range []string{"rescind.events", "amq.topic", "amq.default"} {
			if p.User == "gateway" && write.MatchString(exchange) {
				t.Errorf("a gateway may publish to %s", exchange)
			}
		}
		if read := regexp.MustCompile(p.Read); !read.MatchString("rescind.events") || !read.MatchString("amq.topic") {
			t.Errorf("%s cannot read the events", p.User)
		}
	}
	if len(definitions.Users) != 2 || len(definitions.Permissions) != 2 {
		t.Errorf("the broker has %d users with %d permissions, must have the service and the gateways", len(definitions.Users), len(definitions.Permissions))
	}
}

// The image is built with the language that go.mod asks for.
func TestDockerfile(t *testing.T) {
	t.Parallel()
	goMod := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(readTopFile(t, "go.mod"))
	image := regexp.MustCompile(`(?m)^FROM golang:(\d+\.\d+)\.\d+ `).FindStringSubmatch(readTopFile(t, "scripts/Dockerfile"))
	if goMod == nil || image == nil || goMod[1] != image[1] {
		t.Errorf("go.mod asks for %q, the image is built with %q", goMod, image)
	}
}

func TestScripts(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"scripts/do", ".ci/run"} {
		info, err := os.Stat(topFile(name))
		if err != nil || info.Mode()&0o111 == 0 {
			t.Errorf("%s cannot be run: %v", name, err)
		}
		if out, err := exec.Command("bash", "-n", topFile(name)).CombinedOutput(); err != nil {
			t.Errorf("%s: %s", name, out)
		}
	}
}

func TestOpenAPI(t *testing.T) {
	t.Parallel()
	doc, err := openapi3.NewLoader().LoadFromFile(topFile("api/openapi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context(), openapi3.EnableExamplesValidation()); err != nil {
		t.Error(err)
	}
	var operations []string
	for path, item := range doc.Paths.Map() {
		for method, op := range item.Operations() {
			operations = append(operations, method+" "+path)
			for status, response := range op.Responses.Map() {
				if response.Value.Headers["X-Request-Id"] == nil {
					t.Errorf("%s %s %s has no X-Request-Id", method, path, status)
				}
			}
		}
	}
	slices.Sort(operations)
	want := []string{
		"GET /.well-known/oauth-authorization-server", "GET /healthz", "GET /metrics", "GET /oauth2/jwks", "GET /readyz",
		"POST /oauth2/revoke", "POST /oauth2/token", "POST /revoke",
	}
	if diff := cmp.Diff(want, operations); diff != "" {
		t.Error(diff)
	}
}

type asyncAPI struct {
	AsyncAPI string `yaml:"asyncapi"`
	Channels map[string]struct {
		Address  string
		Messages map[string]reference
		Bindings struct {
			AMQP struct {
				Is       string
				Exchange struct {
					Name, Type string
					Durable    bool
				}
			} `yaml:"amqp"`
		}
	}
	Operations map[string]struct {
		Action  string
		Channel reference
	}
	Components struct {
		Messages map[string]struct {
			ContentType string `yaml:"contentType"`
			Headers     reference
			Payload     reference
			Examples    []struct{ Payload any }
		}
		Schemas map[string]any
	}
}

type reference struct {
	Ref string `yaml:"$ref"`
}

// What we publish is what asyncapi.yaml says: it is our contract with gateways.
func TestAsyncAPI(t *testing.T) {
	t.Parallel()
	var doc asyncAPI
	var tree any
	for _, into := range []any{&doc, &tree} {
		if err := yaml.Unmarshal([]byte(readTopFile(t, "api/asyncapi.yaml")), into); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.HasPrefix(doc.AsyncAPI, "3.0.") {
		t.Errorf("version %s", doc.AsyncAPI)
	}
	checkReferences(t, tree, tree)

	defaults, err := ParseConfig(Input{Environ: minimalEnv()})
	if err != nil {
		t.Fatal(err)
	}
	event := revocation.Event{Type: "revocation.{kind}", Tenant: revocation.Tenant{Domain: "{tenant}"}}
	for name, want := range map[string][3]string{
		"revocations":          {defaults.AMQP.Exchange, event.RoutingKey(), "revocation"},
		"heartbeats":           {defaults.AMQP.Exchange, revocation.HeartbeatRoutingKey, "heartbeat"},
		"wso2TokenRevocations": {defaults.AMQP.WSO2Exchange, defaults.AMQP.WSO2RoutingKey, "tokenRevocation"},
	} {
		c := doc.Channels[name]
		got := [3]string{c.Bindings.AMQP.Exchange.Name, c.Address, strings.Join(slices.Collect(maps.Keys(c.Messages)), " ")}
		if diff := cmp.Diff(want, got); diff != "" || c.Bindings.AMQP.Exchange.Type != "topic" || !c.Bindings.AMQP.Exchange.Durable {
			t.Errorf("channel %s: %+v\n%s", name, c, diff)
		}
	}
	if len(doc.Channels) != 3 || len(doc.Operations) != 3 {
		t.Errorf("%d channels and %d operations", len(doc.Channels), len(doc.Operations))
	}

	contentTypes := map[string]string{"revocation": revocation.ContentType, "heartbeat": revocation.ContentType, "tokenRevocation": wso2.ContentType}
	for name, message := range doc.Components.Messages {
		if message.ContentType != contentTypes[name] {
			t.Errorf("message %s: content type %q, want %q", name, message.ContentType, contentTypes[name])
		}
		schema := schemaOf(t, doc, message.Payload.Ref)
		for _, e := range message.Examples {
			conforms(t, schema, "the example of "+name, e.Payload)
		}
		for what, payload := range messagesByName(t)[name] {
			conforms(t, schema, what, payload)
		}
	}
	// A schema that takes everything would prove nothing.
	revoked := schemaOf(t, doc, "#/components/schemas/RevocationEvent")
	for _, change := range []func(event, data map[string]any){
		func(e, _ map[string]any) { e["sequence"] = "7" },
		func(e, _ map[string]any) { delete(e, "epoch") },
		func(_, d map[string]any) { delete(d, "jti") },
		func(_, d map[string]any) { d["kind"] = "subject" },
		func(_, d map[string]any) { d["exp"] = "1795201400" },
	} {
		e := asJSON(t, messagesByName(t)["revocation"]["an event of kind token"]).(map[string]any)
		change(e, e["data"].(map[string]any))
		if err := revoked.VisitJSON(e); err == nil {
			t.Errorf("the schema takes %v", e)
		}
	}
}

// checkReferences finds references to what is not there.
func checkReferences(t *testing.T, root, node any) {
	t.Helper()
	switch n := node.(type) {
	case map[string]any:
		if ref, ok := n["$ref"].(string); ok {
			at := root
			for _, step := range strings.Split(strings.TrimPrefix(ref, "#/"), "/") {
				parent, _ := at.(map[string]any)
				at = parent[step]
			}
			if at == nil {
				t.Errorf("%s leads nowhere", ref)
			}
		}
		for _, child := range n {
			checkReferences(t, root, child)
		}
	case []any:
		for _, child := range n {
			checkReferences(t, root, child)
		}
	}
}

func schemaOf(t *testing.T, doc asyncAPI, ref string) *openapi3.Schema {
	t.Helper()
	b, err := json.Marshal(doc.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")])
	if err != nil {
		t.Fatal(err)
	}
	schema := openapi3.NewSchema()
	if err := schema.UnmarshalJSON(b); err != nil {
		t.Fatalf("schema %s: %v", ref, err)
	}
	if err := schema.Validate(t.Context()); err != nil {
		t.Fatalf("schema %s: %v", ref, err)
	}
	return schema
}

func conforms(t *testing.T, schema *openapi3.Schema, what string, payload any) {
	t.Helper()
	if err := schema.VisitJSON(asJSON(t, payload), openapi3.MultiErrors()); err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// asJSON is payload as a reader of JSON has it.
func asJSON(t *testing.T, payload any) (v any) {
	t.Helper()
	b, isBytes := payload.([]byte)
	if !isBytes {
		var err error
		if b, err = json.Marshal(payload); err != nil {
			t.Fatal(err)
		}
	}
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// messagesByName is what our own code makes, by message and by what it is.
func messagesByName(t *testing.T) map[string]map[string]any {
	t.Helper()
	const (
		iss   = "https://km.example.com"
		epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	)
	now := time.Now()
	out := map[string]map[string]any{"revocation": {}, "heartbeat": {}, "tokenRevocation": {}}
	add := func(what string, r revocation.Revocation) {
		r.ID, r.Tenant, r.Exp = "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", revocation.SuperTenant, now.Unix()+900
		e, err := revocation.NewEvent(r)
		if err != nil {
			t.Fatal(err)
		}
		e.Position, e.Previous, e.Source, e.Time = revocation.Position{Epoch: epoch, Seq: 12}, 9, iss, now
		e.Traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
		out["revocation"]["an event of "+what] = e
		body, err := wso2.TokenRevocation(e, now)
		if err != nil {
			t.Fatal(err)
		}
		if body != nil {
			out["tokenRevocation"]["a message of "+what] = body
		}
	}
	for _, kind := range revocation.Kinds {
		r := revocation.Revocation{Target: revocation.Target{Kind: kind, Iss: iss, ID: "x-1"}}
		if kind == revocation.KindTenant {
			r.Target.Iss, r.Target.ID = "", revocation.SuperTenant.Domain
		}
		if kind.HasTime() {
			r.NotAfter = now.Unix()
		}
		add("kind "+string(kind), r)
	}
	add("a digest", revocation.Revocation{Target: revocation.DigestTarget(iss, "e30.e30"), Signature: "c2ln", ClientID: "app-2", Reason: "client"})
	out["heartbeat"]["a heartbeat"] = revocation.Heartbeat{
		Epoch: epoch, ID: epoch + ":hb:6f1d1e0c-8f0e-4f63-8f3e-1f0c3a2b4d5e", Source: iss, Time: now, Head: 12, Through: 12,
	}
	return out
}
