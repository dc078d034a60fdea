package devstack

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// installScript installs the packages that are its arguments, as root.
//
//go:embed install.sh
var installScript string

// installTimeout bounds an installation, the wait for other package managers included.
const installTimeout = 10 * time.Minute

// packageManager is a program that installs packages.
type packageManager struct {
	program, install, postgres, rabbitMQ string
}

// packageManagers are tried in this order. Only apt-get is used; the others are for what a person is told to type.
var packageManagers = []packageManager{
	{"apt-get", "apt-get update && %[1]sapt-get install -y --no-install-recommends", "postgresql", "rabbitmq-server"},
	{"dnf", "dnf install -y", "postgresql-server", "rabbitmq-server"},
	{"zypper", "zypper install -y", "postgresql-server", "rabbitmq-server"},
	{"pacman", "pacman -S --noconfirm", "postgresql", "rabbitmq"},
	{"apk", "apk add", "postgresql", "rabbitmq-server"},
	{"brew", "brew install", "postgresql@17", "rabbitmq"},
}

// findOrInstall finds the programs of the wanted servers, and before that installs what is missing if it may and can.
func findOrInstall(ctx context.Context, cfg Config, wanted []Server) (programs, error) {
	found := find(ctx)
	missing := found.missing(wanted)
	if len(missing) == 0 {
		return found, nil
	}
	names, packages, byHand := whatToInstall(missing)
	absent := fmt.Errorf("%s (PostgreSQL %d or newer, RabbitMQ 3.8 or newer) is not on this machine; install it with: %s", names, oldestPostgres, byHand)
	if cfg.NoInstall {
		return programs{}, absent
	}
	shell := rootShell(ctx)
	if shell == nil {
		return programs{}, absent
	}
	if err := installLogged(ctx, cfg.Log, shell, packages); err != nil {
		return programs{}, fmt.Errorf("install %s: %w; by hand it is: %s", names, err, byHand)
	}
	found = find(ctx)
	if len(found.missing(wanted)) > 0 {
		return programs{}, absent
	}
	return found, nil
}

// InstallPackages installs packages by their names on Debian and Ubuntu, on a machine that has apt-get, as root or with a
// sudo that asks for no password. It starts and enables no service of theirs. Its error has the command for a person to type.
// Log gets a line before and after. Processes that call it at once wait for each other.
func InstallPackages(ctx context.Context, log io.Writer, packages ...string) error {
	names, byHand := strings.Join(packages, " and "), systemPackageManager().command(packages)
	shell := rootShell(ctx)
	if shell == nil {
		return fmt.Errorf("install %s: only root, or a sudo that asks for no password, and apt-get can do it from here; by hand it is: %s", names, byHand)
	}
	if err := installLogged(ctx, log, shell, packages); err != nil {
		return fmt.Errorf("install %s: %w; by hand it is: %s", names, err, byHand)
	}
	return nil
}

// installLogged installs packages with shell, which [rootShell] returned.
func installLogged(ctx context.Context, log io.Writer, shell, packages []string) error {
	names := strings.Join(packages, " ")
	fmt.Fprintf(log, "Installing %s with apt-get; this starts and enables no service ...\n", names)
	began := time.Now()
	if err := install(ctx, append(shell, packages...), nil); err != nil {
		return err
	}
	fmt.Fprintf(log, "Installed %s in %.0f s.\n", names, time.Since(began).Seconds())
	return nil
}

// systemPackageManager is the one of this machine, else apt-get.
func systemPackageManager() packageManager {
	for _, m := range packageManagers {
		if _, err := exec.LookPath(m.program); err == nil {
			return m
		}
	}
	return packageManagers[0]
}

// command is what a person types to install packages.
func (m packageManager) command(packages []string) string {
	sudo := ""
	if os.Geteuid() != 0 && m.program != "brew" {
		sudo = "sudo "
	}
	return sudo + strings.ReplaceAll(m.install, "%[1]s", sudo) + " " + strings.Join(packages, " ")
}

// whatToInstall is the names of the missing servers, their packages, and the command with which a person installs them.
func whatToInstall(missing []Server) (names string, packages []string, byHand string) {
	manager := systemPackageManager()
	var all []string
	for _, s := range missing {
		all = append(all, string(s))
		if s == Postgres {
			packages = append(packages, manager.postgres)
		} else {
			packages = append(packages, manager.rabbitMQ)
		}
	}
	return strings.Join(all, " and "), packages, manager.command(packages)
}

// rootShell is the command that runs a script from its input as root on a machine that has apt-get, or nil.
func rootShell(ctx context.Context) []string {
	if _, err := exec.LookPath("apt-get"); err != nil {
		return nil
	}
	shell := []string{"sh", "-s", "--"}
	if os.Geteuid() == 0 {
		return shell
	}
	if err := exec.CommandContext(ctx, "sudo", "-n", "true").Run(); err != nil {
		return nil
	}
	return append([]string{"sudo", "-n"}, shell...)
}

// install runs the script with command, and with env added to the environment.
func install(ctx context.Context, command, env []string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, installTimeout, fmt.Errorf("not done within %s", installTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Env = append(os.Environ(), env...)
	var output bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(installScript), &output, &output
	// To interrupt is what apt-get heeds while it downloads, and puts off while packages are half installed. The script
	// then puts back what it has changed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		lines := strings.Split(strings.TrimSpace(output.String()), "\n")
		return errors.Join(err, errors.New(strings.Join(lines[max(0, len(lines)-10):], "\n")))
	}
	return nil
}
