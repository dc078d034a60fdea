package app

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const modulePath = "github.com/rescindhq/rescind/"

// layer is where a package stands. An import points to a lower level; packages on
// one level do not know each other.
type layer struct {
	level int
	// testOnly packages are imported by _test.go files alone, from any level.
	testOnly bool
	// outside are the modules, or parts of them, that it may import beside the
	// standard library.
	outside []string
}

const (
	fromPgx          = "github.com/jackc/pgx/v5"
	fromMigrate      = "github.com/golang-migrate/migrate/v4"
	fromPrometheus   = "github.com/prometheus/client_golang"
	fromAMQP         = "github.com/rabbitmq/amqp091-go"
	fromEtcd         = "go.etcd.io/etcd/client/v3"
	fromEtcdAPI      = "go.etcd.io/etcd/api/v3"
	fromChi          = "github.com/go-chi/chi/v5"
	fromJOSE         = "github.com/go-jose/go-jose/v4"
	fromUUID         = "github.com/google/uuid"
	fromSync         = "golang.org/x/sync"
	fromCompress     = "github.com/klauspost/compress"
	fromYAML         = "go.yaml.in/yaml/v4"
	fromZap          = "go.uber.org/zap"        // etcd's client takes no other logger
	fromGRPC         = "google.golang.org/grpc" // how etcd's client is told to connect
	fromControlPlane = "github.com/envoyproxy/go-control-plane/envoy"
	fromGenproto     = "google.golang.org/genproto/googleapis/rpc"
)

// layers has every package. What a package may import from outside is kept short
// on purpose: gateways link what is under api/, and the rest is what we must
// trust and keep up to date.
var layers = map[string]layer{
	"api/revocation":    {level: 0},
	"migrations":        {level: 0},
	"internal/devstack": {level: 0, outside: []string{"go.etcd.io/etcd/server/v3/embed"}},
	// It runs commands of this module and imports nothing of it.
	"internal/stacktest": {level: 0, testOnly: true},

	"api/catalog":              {level: 1},
	"api/directory":            {level: 1},
	"api/token":                {level: 1},
	"internal/devstack/stackd": {level: 1},
	"internal/pgtest":          {level: 1, testOnly: true, outside: []string{fromPgx, fromMigrate}},

	"api/replica":     {level: 2},
	"internal/wso2":   {level: 2},
	"internal/ledger": {level: 2, outside: []string{fromPgx, fromPrometheus, fromUUID, fromSync}},
	"internal/relay":  {level: 2, outside: []string{fromPrometheus, fromUUID, fromSync, "github.com/cenkalti/backoff/v5"}},
	"internal/authn": {level: 2, outside: []string{fromPgx, fromPrometheus, "golang.org/x/crypto/argon2", "golang.org/x/time/rate",
		"github.com/hashicorp/golang-lru/v2/simplelru"}},
	"internal/obs":     {level: 2, outside: []string{fromPrometheus}},
	"internal/process": {level: 2},
	"internal/tlsfile": {level: 2},

	"api/replica/amqpfeed": {level: 3, outside: []string{fromAMQP}},
	"api/replica/etcdfeed": {level: 3, outside: []string{fromEtcd, fromEtcdAPI, fromZap, fromGRPC}},
	"api/gateway":          {level: 3},

	"internal/rest":      {level: 3, outside: []string{fromPgx}},
	"internal/claims":    {level: 3},
	"internal/revoke":    {level: 3},
	"internal/catalog":   {level: 3, outside: []string{fromPgx, fromUUID}},
	"internal/follow":    {level: 3, outside: []string{fromPrometheus, fromSync, "github.com/cenkalti/backoff/v5"}},
	"internal/fleet":     {level: 3, outside: []string{fromPgx, fromPrometheus, fromUUID, fromSync, fromCompress}},
	"internal/yamlfile":  {level: 3, outside: []string{fromYAML}},
	"internal/wso2test":  {level: 3, testOnly: true, outside: []string{fromAMQP}},
	"internal/relaytest": {level: 3, testOnly: true, outside: []string{"github.com/google/go-cmp/cmp"}},

	"internal/sink":        {level: 4, outside: []string{fromAMQP, fromEtcd, fromEtcdAPI, fromZap, fromGRPC, fromSync}},
	"internal/adminapi":    {level: 4, outside: []string{fromChi}},
	"internal/snapshotapi": {level: 4, outside: []string{fromChi, fromPrometheus, fromCompress}},
	"internal/eventhub":    {level: 4, outside: []string{fromChi, fromPrometheus, fromCompress}},
	"internal/revokeapi":   {level: 4, outside: []string{fromChi}},
	"internal/introspect":  {level: 4, outside: []string{fromPrometheus}},
	"internal/manifest":    {level: 4, outside: []string{fromPgx, fromUUID, fromYAML}},
	"internal/sts":         {level: 4, outside: []string{fromChi, fromJOSE, fromPgx}},
	"internal/httpapi":     {level: 4, outside: []string{fromChi, fromPrometheus}},

	"internal/fleetapi": {level: 4, outside: []string{fromChi}},
	"internal/verify":   {level: 4},
	"internal/canary":   {level: 4, outside: []string{fromPrometheus}},
	"internal/explain":  {level: 4, outside: []string{fromChi}},

	"internal/sidecar": {level: 4, outside: []string{fromPrometheus, fromSync, fromYAML, fromGRPC, fromControlPlane, fromGenproto}},

	"internal/app": {level: 5, outside: []string{fromPgx, fromMigrate, fromPrometheus, fromChi, fromUUID}},

	"cmd/rescind":         {level: 6, outside: []string{fromPgx, fromPrometheus, fromAMQP, fromEtcd, fromEtcdAPI, fromZap, fromUUID}},
	"cmd/rescind-gateway": {level: 6},
	"cmd/rescind-dev":     {level: 6, outside: []string{fromPgx, fromYAML}},
}

// goPackage is what go list says of a package.
type goPackage struct {
	ImportPath                         string
	Dir                                string
	GoFiles                            []string
	Imports, TestImports, XTestImports []string
}

func (p goPackage) name() string { return strings.TrimPrefix(p.ImportPath, modulePath) }

func ourPackages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,Imports,TestImports,XTestImports", modulePath+"...").Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var all []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		switch err := dec.Decode(&p); {
		case err == io.EOF:
			return all
		case err != nil:
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestDependencyRule(t *testing.T) {
	t.Parallel()
	packages := ourPackages(t)
	for _, p := range packages {
		for _, complaint := range complaints(p) {
			t.Errorf("%s %s", p.name(), complaint)
		}
	}
	for name := range layers {
		if !slices.ContainsFunc(packages, func(p goPackage) bool { return p.name() == name }) {
			t.Errorf("%s has a level, and is not there", name)
		}
	}
}

// complaints are what p imports against the rule.
func complaints(p goPackage) (out []string) {
	own, known := layers[p.name()]
	if !known {
		return []string{"has no level: give it one in this file"}
	}
	for _, path := range p.Imports {
		name, ours := strings.CutPrefix(path, modulePath)
		target := layers[name]
		switch {
		case !ours:
			if isOutside(path) && !slices.ContainsFunc(own.outside, func(allowed string) bool { return within(path, allowed) }) {
				out = append(out, "imports "+path+", which is not among what it may import from outside")
			}
		case target.testOnly && !own.testOnly:
			out = append(out, "imports "+name+", which is for tests")
		case target.level >= own.level:
			out = append(out, "imports "+name+", which is on no lower level")
		case strings.HasPrefix(p.name(), "api/") && strings.HasPrefix(name, "internal/"):
			out = append(out, "imports "+name+": gateways cannot")
		}
	}
	for _, path := range slices.Concat(p.TestImports, p.XTestImports) {
		name, ours := strings.CutPrefix(path, modulePath)
		if target := layers[name]; ours && path != p.ImportPath && !target.testOnly && target.level >= own.level {
			out = append(out, "imports "+name+" in its tests, which is on no lower level")
		}
	}
	sees := func(name string) bool { return slices.Contains(p.Imports, modulePath+name) }
	if sees("internal/sink") && sees("internal/ledger") && p.name() != "internal/app" && !strings.HasPrefix(p.name(), "cmd/") {
		out = append(out, "sees both a sink and the ledger")
	}
	return out
}

// isOutside reports whether path is of another module: only these have a dot in
// their first element.
func isOutside(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return strings.Contains(first, ".")
}

func within(path, parent string) bool {
	return path == parent || strings.HasPrefix(path, parent+"/")
}

// The rule would pass for whatever reason if it found nothing wrong with these.
func TestDependencyRuleFinds(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		p    goPackage
		want string
	}{
		{"no level", goPackage{ImportPath: modulePath + "internal/util"}, "has no level"},
		{"upward", goPackage{ImportPath: modulePath + "internal/relay", Imports: []string{modulePath + "internal/sink"}}, "no lower level"},
		{"sideways", goPackage{ImportPath: modulePath + "internal/httpapi", Imports: []string{modulePath + "internal/sts"}}, "no lower level"},
		{"upward in a test", goPackage{ImportPath: modulePath + "internal/relay", TestImports: []string{modulePath + "internal/sink"}}, "in its tests"},
		{"a test's help", goPackage{ImportPath: modulePath + "internal/app", Imports: []string{modulePath + "internal/pgtest"}}, "is for tests"},
		{"from outside", goPackage{ImportPath: modulePath + "api/revocation", Imports: []string{fromUUID}}, "may import from outside"},
		{"a neighbour of what is allowed", goPackage{ImportPath: modulePath + "internal/obs", Imports: []string{fromPrometheus + "x"}}, "may import from outside"},
		{"internal from api", goPackage{ImportPath: modulePath + "api/token", Imports: []string{modulePath + "internal/devstack"}}, "gateways cannot"},
	} {
		if got := strings.Join(complaints(tt.p), "; "); !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
