package devstack

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fakeRoot is a folder that the install script takes for the root of a machine, with programs that record what they
// are asked to do in its file "calls".
type fakeRoot struct {
	t   *testing.T
	dir string
	env []string
}

func newFakeRoot(t *testing.T, aptGet string) *fakeRoot {
	dir := t.TempDir()
	r := &fakeRoot{t: t, dir: dir, env: []string{"RESCIND_INSTALL_ROOT=" + dir, "PATH=" + dir + "/bin:" + os.Getenv("PATH")}}
	r.write("lib/systemd/system/old.service", "", 0o644)
	r.write("var/lock/.keep", "", 0o644)
	r.write("usr/sbin/.keep", "", 0o644)
	r.write("bin/apt-get", "#!/bin/sh\n"+aptGet, 0o755)
	for _, program := range []string{"systemctl", "update-rc.d"} {
		r.write("bin/"+program, "#!/bin/sh\necho "+program+" \"$@\" >>\"$RESCIND_INSTALL_ROOT/calls\"\n", 0o755)
	}
	return r
}

func (r *fakeRoot) write(name, content string, mode os.FileMode) {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), mode)); err != nil {
		r.t.Fatal(err)
	}
}

func (r *fakeRoot) read(name string) string {
	r.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return "none"
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return string(b)
}

func (r *fakeRoot) install(ctx context.Context) error {
	return install(ctx, []string{"sh", "-s", "--", "some-server"}, r.env)
}

// installing stands for an apt-get that works: it says what the packages would find, and brings two services.
const installing = `
printf '%s; ' "$*" >>"$RESCIND_INSTALL_ROOT/calls"
"$RESCIND_INSTALL_ROOT/usr/sbin/policy-rc.d" some-server start; echo "policy $?; $(cat "$RESCIND_INSTALL_ROOT"/etc/postgresql-common/createcluster.d/*)" >>"$RESCIND_INSTALL_ROOT/calls"
mkdir -p "$RESCIND_INSTALL_ROOT/etc/init.d"
: >"$RESCIND_INSTALL_ROOT/lib/systemd/system/new.service"
: >"$RESCIND_INSTALL_ROOT/etc/init.d/new"
`

const aptGetOptions = "-o DPkg::Lock::Timeout=300 -o Acquire::Retries=2 "

func TestInstallStartsAndEnablesNothing(t *testing.T) {
	t.Parallel()
	r := newFakeRoot(t, installing)
	if err := r.install(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := aptGetOptions + "install -y --no-install-recommends some-server; policy 101; create_main_cluster = false\n" +
		"update-rc.d new disable\nsystemctl disable new.service\n"
	if diff := cmp.Diff(want, r.read("calls")); diff != "" {
		t.Errorf("what was done (-want +got):\n%s", diff)
	}
}

func TestInstallFetchesListsOnlyWhenNeeded(t *testing.T) {
	t.Parallel()
	r := newFakeRoot(t, `
case "$*" in
*update) : >"$RESCIND_INSTALL_ROOT/lists" ;;
*) [ -e "$RESCIND_INSTALL_ROOT/lists" ] || { echo "Unable to locate package"; exit 100; } ;;
esac
echo "${*##*Retries=2 }" >>"$RESCIND_INSTALL_ROOT/calls"
`)
	if err := r.install(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := "update\ninstall -y --no-install-recommends some-server\n"
	if diff := cmp.Diff(want, r.read("calls")); diff != "" {
		t.Errorf("apt-get calls that succeeded (-want +got):\n%s", diff)
	}
}

func TestInstallPutsBackWhatWasThere(t *testing.T) {
	t.Parallel()
	const hang = "echo started >\"$RESCIND_INSTALL_ROOT/started\"; trap 'exit 1' INT; while :; do sleep 0.01; done\n"
	tests := []struct {
		name   string
		policy string // the content of policy-rc.d before, none if empty
		aptGet string
		killed bool // an earlier run was, and has left its own policy-rc.d
		want   string
	}{
		{name: "there was no policy", aptGet: installing, want: "none"},
		{name: "there was one", policy: "#!/bin/sh\nexit 104\n", aptGet: installing, want: "#!/bin/sh\nexit 104\n"},
		{name: "and apt-get fails", policy: "#!/bin/sh\nexit 104\n", aptGet: "exit 100", want: "#!/bin/sh\nexit 104\n"},
		{name: "and it is interrupted", policy: "#!/bin/sh\nexit 104\n", aptGet: hang, want: "#!/bin/sh\nexit 104\n"},
		{name: "and a run before was killed", policy: "#!/bin/sh\nexit 104\n", killed: true, aptGet: installing, want: "#!/bin/sh\nexit 104\n"},
		{name: "a run before was killed", killed: true, aptGet: installing, want: "none"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newFakeRoot(t, tt.aptGet)
			const policy = "usr/sbin/policy-rc.d"
			switch {
			case tt.killed && tt.policy != "":
				r.write(policy+".before-rescind", tt.policy, 0o755)
				fallthrough
			case tt.killed:
				r.write(policy, "#!/bin/sh\n# made by rescind-dev, for as long as it installs packages\nexit 101\n", 0o755)
			case tt.policy != "":
				r.write(policy, tt.policy, 0o755)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			interrupted := tt.aptGet == hang
			done := make(chan error)
			go func() { done <- r.install(ctx) }()
			if interrupted {
				awaitCondition(t, func() bool { return strings.HasPrefix(r.read("started"), "started") })
				cancel()
			}
			err := <-done
			if wantErr := interrupted || tt.aptGet == "exit 100"; (err != nil) != wantErr {
				t.Errorf("install: error %v, want one: %t", err, wantErr)
			}
			if diff := cmp.Diff(tt.want, r.read(policy)); diff != "" {
				t.Errorf("policy-rc.d afterwards (-want +got):\n%s", diff)
			}
			for _, left := range []string{policy + ".before-rescind", "etc/postgresql-common/createcluster.d", "etc/postgresql-common/createcluster.d.made-by-rescind"} {
				if _, err := os.Lstat(filepath.Join(r.dir, left)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left behind", left)
				}
			}
		})
	}
}

func TestInstallPackagesNamesTheCommand(t *testing.T) {
	t.Setenv("PATH", t.TempDir()) // with no package manager
	err := InstallPackages(t.Context(), io.Discard, "nginx", "caddy")
	if err == nil || !strings.HasSuffix(err.Error(), "apt-get install -y --no-install-recommends nginx caddy") {
		t.Errorf("error %v, want one that ends with the command to type", err)
	}
}

func TestMissingServersAreNamedWithTheCommand(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		found  programs
		wanted []Server
		want   []Server
	}{
		{name: "nothing is here", wanted: allServers, want: []Server{Postgres, RabbitMQ}},
		{name: "Postgres is too old", found: programs{postgres: map[int]string{13: "/bin"}, rabbitMQ: "/r", epmd: "/e"}, wanted: allServers, want: []Server{Postgres}},
		{name: "one of two is new enough", found: programs{postgres: map[int]string{13: "/a", 14: "/b"}}, wanted: []Server{Postgres, Etcd}},
		{name: "a broker without epmd", found: programs{rabbitMQ: "/r"}, wanted: []Server{RabbitMQ}, want: []Server{RabbitMQ}},
		{name: "etcd is always here", wanted: []Server{Etcd}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			missing := tt.found.missing(tt.wanted)
			if diff := cmp.Diff(tt.want, missing); diff != "" {
				t.Errorf("missing (-want +got):\n%s", diff)
			}
			if len(missing) == 0 {
				return
			}
			names, packages, byHand := whatToInstall(missing)
			for _, s := range missing {
				if !strings.Contains(names, string(s)) {
					t.Errorf("names %q lack %s", names, s)
				}
			}
			if len(packages) != len(missing) || !strings.HasSuffix(byHand, " "+strings.Join(packages, " ")) {
				t.Errorf("command %q for packages %q, want one for each of %q", byHand, packages, missing)
			}
		})
	}
}
