package devstack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// processID tells a process from a later one that was given the same pid.
type processID struct {
	PID   int    `json:"pid"`
	Start string `json:"start"`
}

func (id processID) alive() bool { return id.Start != "" && startTime(id.PID) == id.Start }

// ending is one attempt to end a process: a signal, and how long it may take to be heeded.
type ending struct {
	signal syscall.Signal
	wait   time.Duration
}

var killing = ending{syscall.SIGKILL, 5 * time.Second}

// endProcess sends the signals one after another until the process is gone. done, if not nil, is closed when it is.
func endProcess(id processID, done <-chan struct{}, endings ...ending) error {
	for _, e := range endings {
		if !id.alive() {
			break
		}
		if e.signal == syscall.SIGKILL {
			// First its group, which is its own: it cannot tell those it has started any more.
			_ = syscall.Kill(-id.PID, e.signal)
		}
		if err := syscall.Kill(id.PID, e.signal); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end process %d: %w", id.PID, err)
		}
		if awaitEnd(id, done, e.wait) {
			return nil
		}
	}
	if id.alive() {
		return fmt.Errorf("end process %d: still running after SIGKILL", id.PID)
	}
	return nil
}

func awaitEnd(id processID, done <-chan struct{}, wait time.Duration) bool {
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	poll := time.NewTicker(10 * time.Millisecond) // for a process that is not our child, and so cannot be waited for
	defer poll.Stop()
	for {
		select {
		case <-done:
			return true
		case <-timeout.C:
			return false
		case <-poll.C:
			if done == nil && !id.alive() {
				return true
			}
		}
	}
}

// account is the system user that a server runs as. A nil account is the user that runs this process.
type account struct{ uid, gid int }

// lookupAccount finds the system user for a server that refuses to run as root. Without root there is no choice, and
// it is nil.
func lookupAccount(name string) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return nil, fmt.Errorf("find the system user %s, which the server must run as because root may not run it: %w", name, err)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	return &account{uid, gid}, errors.Join(err1, err2)
}

// own gives path to the account.
func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	return os.Lchown(path, a.uid, a.gid)
}

// ownedDir makes the folder if it is not there, for the account alone.
func (a *account) ownedDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return a.own(dir)
}

// writeFile writes a file that the account alone can read.
func (a *account) writeFile(path, content string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		return err
	}
	return a.own(path)
}

// command prepares a program that runs as the account, in dir, with nothing of our environment but the search path:
// variables such as PGDATA or RABBITMQ_NODENAME would point it at servers that are not ours.
func (a *account) command(ctx context.Context, dir string, env []string, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = dir
	cmd.Env = append([]string{"PATH=" + searchPath(), "LANG=C.UTF-8", "HOME=" + dir}, env...)
	// A group of its own: the Ctrl-C that ends us must not reach the servers, which end when we say so.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if a != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	}
	return cmd
}

// spawner runs functions on one operating system thread that lasts as long as the process: a death signal is sent
// when the *thread* that started the child ends, and Go ends threads when it likes.
var spawner = sync.OnceValue(func() chan<- func() {
	calls := make(chan func())
	go func() {
		runtime.LockOSThread()
		for call := range calls {
			call()
		}
	}()
	return calls
})

// process is a running server, recorded in a pid file so that a later run can end it if we cannot.
type process struct {
	id      processID
	pidFile string
	done    chan struct{} // closed when it has ended
	err     error         // how, once done is closed
}

// startProcess starts the command with its output going to logFile. onDeath is what it gets if we are killed.
func startProcess(cmd *exec.Cmd, pidFile, logFile string, onDeath syscall.Signal) (*process, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	setDeathSignal(cmd.SysProcAttr, onDeath)
	started := make(chan error)
	spawner() <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, err
	}
	p := &process{pidFile: pidFile, done: make(chan struct{})}
	p.id = processID{PID: cmd.Process.Pid, Start: startTime(cmd.Process.Pid)}
	record, err := json.Marshal(p.id)
	if err == nil {
		err = os.WriteFile(pidFile, record, 0o600)
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err != nil {
		return nil, errors.Join(err, p.end(killing))
	}
	return p, nil
}

// end ends the process and forgets it.
func (p *process) end(endings ...ending) error {
	if err := endProcess(p.id, p.done, endings...); err != nil {
		return err
	}
	return os.RemoveAll(p.pidFile)
}

// endOrphan ends the process that an earlier run recorded in pidFile, if it still is that process.
func endOrphan(pidFile string, endings ...ending) error {
	if id := recorded(pidFile); id.alive() {
		if err := endProcess(id, nil, endings...); err != nil {
			return err
		}
	}
	return os.RemoveAll(pidFile)
}

// isRunning tells whether a pid file in dir is of a living process.
func isRunning(dir string) bool {
	files, _ := filepath.Glob(filepath.Join(dir, "*.pid"))
	return slices.ContainsFunc(files, func(file string) bool { return recorded(file).alive() })
}

// recorded is the process that a pid file is of. If the file is not there, or not complete because its writer was killed
// (whose death signal then ended the process), it is none.
func recorded(pidFile string) processID {
	var id processID
	record, err := os.ReadFile(pidFile)
	if err != nil || json.Unmarshal(record, &id) != nil {
		return processID{}
	}
	return id
}

// await calls answers until it is true. It fails when ctx ends or the process does.
func (p *process) await(ctx context.Context, answers func(context.Context) bool) error {
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for !answers(ctx) {
		select {
		case <-p.done:
			return fmt.Errorf("it ended by itself: %w", exitReason(p.err))
		case <-ctx.Done():
			return fmt.Errorf("it does not answer: %w", context.Cause(ctx))
		case <-poll.C:
		}
	}
	return nil
}

func exitReason(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// logTail is the end of a log file, to be shown with an error.
func logTail(file string) string {
	const lines = 15
	b, _ := os.ReadFile(file)
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return "the end of " + file + ":\n  " + strings.Join(all[max(0, len(all)-lines):], "\n  ")
}

// searchPath is PATH and the usual folders of system programs, which the PATH of a plain user often lacks.
func searchPath() string {
	dirs := append(filepath.SplitList(os.Getenv("PATH")),
		"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/opt/homebrew/bin", "/opt/homebrew/sbin")
	return strings.Join(dirs, string(os.PathListSeparator))
}
