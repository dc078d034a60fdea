package app

import (
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

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
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
