package devstack

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	stateFile = "stack.json"
	logDir    = "log"
)

// folder is the data folder, open for this process alone.
type folder struct {
	base    string   // mode 0700, ours: what only this process reads and writes
	servers string   // what the servers read and write: base, or when we are root a folder that other users can enter
	lock    *os.File // the kernel lets go of it however this process ends
	state
}

// state is what stays the same from one start to the next.
type state struct {
	// ID ties servers to base, which can be deleted without it.
	ID             string `json:"id"`
	PortBase       int    `json:"port_base"`
	PostgresSecret string `json:"postgres_secret"`
	AMQPSecret     string `json:"amqp_secret"`
	GatewaySecret  string `json:"gateway_secret"`
	ErlangCookie   string `json:"erlang_cookie"`
}

// openFolder makes or opens the data folder. While another process has it, it waits until ctx ends.
func openFolder(ctx context.Context, dir string) (*folder, error) {
	base, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	f := &folder{base: base, servers: serversDir(base)}
	if err := f.lockBase(ctx); err != nil {
		return nil, fmt.Errorf("open data folder %s: %w", base, err)
	}
	err = f.loadState()
	if err == nil {
		err = f.openServers()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open data folder %s: %w", base, err), f.close())
	}
	return f, nil
}

// lockBase makes the base folder and locks it. Whoever had it before may have removed it, and with it the file that
// the lock is on: then it starts anew.
func (f *folder) lockBase(ctx context.Context) error {
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for {
		if err := os.MkdirAll(f.base, 0o700); err != nil {
			return err
		}
		if err := checkOurs(f.base); err != nil {
			return err
		}
		if err := os.Chmod(f.base, 0o700); err != nil {
			return err
		}
		lock, err := os.OpenFile(f.path(LockFile), os.O_CREATE|os.O_RDWR, 0o600)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		switch err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); {
		case err == nil:
			if isAt(lock, f.path(LockFile)) {
				f.lock = lock
				return nil
			}
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return errors.Join(err, lock.Close())
		}
		if err := lock.Close(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("another process is using it: stop that one, or name another folder: %w", context.Cause(ctx))
		case <-poll.C:
		}
	}
}

func isAt(file *os.File, path string) bool {
	opened, err1 := file.Stat()
	there, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(opened, there)
}

// checkOurs refuses a folder that holds other files than ours, before its mode is changed.
func checkOurs(base string) error {
	entries, err := os.ReadDir(base)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == LockFile {
			return nil
		}
	}
	if len(entries) > 0 {
		return errors.New("it has files that are not ours: name a new or an empty folder")
	}
	return nil
}

func (f *folder) loadState() error {
	b, err := os.ReadFile(f.path(stateFile))
	if err == nil {
		return json.Unmarshal(b, &f.state)
	}
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f.state = state{
		ID:             rand.Text(),
		PostgresSecret: rand.Text(),
		AMQPSecret:     rand.Text(),
		GatewaySecret:  rand.Text(),
		ErlangCookie:   rand.Text(),
	}
	return f.saveState()
}

func (f *folder) saveState() error {
	b, err := json.MarshalIndent(f.state, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(f.path(stateFile+".new"), append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(f.path(stateFile+".new"), f.path(stateFile))
}

const serversPrefix = "/var/tmp/rescind-"

// serversDir is where servers that run as system users keep what is theirs: they cannot enter base.
func serversDir(base string) string {
	if os.Geteuid() != 0 {
		return base
	}
	sum := sha256.Sum256([]byte(base))
	return serversPrefix + hex.EncodeToString(sum[:8])
}

// openServers makes the folder, which all users can enter. Its name is no secret, and anybody can make a folder below
// /var/tmp: only one that is ours will do.
func (f *folder) openServers() error {
	if f.servers == f.base {
		return nil
	}
	if err := os.Mkdir(f.servers, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := checkOwner(f.servers, os.Geteuid()); err != nil {
		return err
	}
	return os.Chmod(f.servers, 0o711) // whatever the umask
}

func checkOwner(dir string, uid int) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || int(stat.Uid) != uid {
		return fmt.Errorf("%s, the place for the servers' data, is not a folder of user %d: remove it", dir, uid)
	}
	return nil
}

// ownerFile, in servers, names the base folder that it belongs to, by its ID and its path.
const ownerFile = "owner"

// discardStrangers removes servers' data that was made for an earlier base folder of this name: its passwords are
// lost. The servers themselves must have ended.
func (f *folder) discardStrangers() error {
	if f.servers == f.base {
		return nil
	}
	owner := f.ID + "\n" + f.base
	file := filepath.Join(f.servers, ownerFile)
	if had, err := os.ReadFile(file); err == nil && string(had) == owner {
		return nil
	}
	if err := f.clearServers(); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(owner), 0o600)
}

// sweepAbandoned removes servers' data whose base folder was deleted, as people do who know of no other. It is nobody's
// trouble if that fails.
func sweepAbandoned() {
	files, _ := filepath.Glob(serversPrefix + "*/" + ownerFile)
	for _, file := range files {
		dir := filepath.Dir(file)
		if checkOwner(dir, os.Geteuid()) != nil {
			continue
		}
		owner, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		_, base, written := strings.Cut(string(owner), "\n")
		if !written { // somebody is at it
			continue
		}
		if _, err := os.Stat(base); !errors.Is(err, os.ErrNotExist) || isRunning(dir) {
			continue
		}
		_ = os.RemoveAll(dir)
	}
}

func (f *folder) clearServers() error {
	for _, s := range allServers {
		if err := os.RemoveAll(filepath.Join(f.servers, string(s))); err != nil {
			return err
		}
	}
	return nil
}

// clear empties the folder, for a start from nothing. The servers must have ended.
func (f *folder) clear() error {
	if err := f.clearServers(); err != nil {
		return err
	}
	entries, err := os.ReadDir(f.base)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == LockFile { // we hold it
			continue
		}
		if err := os.RemoveAll(f.path(e.Name())); err != nil {
			return err
		}
	}
	return f.loadState()
}

// remove deletes the folder. The servers must have ended.
func (f *folder) remove() error {
	return errors.Join(os.RemoveAll(f.servers), os.RemoveAll(f.base), f.close())
}

func (f *folder) close() error { return f.lock.Close() }

func (f *folder) path(name string) string { return filepath.Join(f.base, name) }

func (f *folder) logFile(s Server) string { return filepath.Join(f.base, logDir, string(s)+".log") }
