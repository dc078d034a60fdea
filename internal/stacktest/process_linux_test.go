package stacktest_test

import (
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestProcessesShareOneStack starts processes at once where nothing runs, then kills the process that runs their stack,
// and starts more.
func TestProcessesShareOneStack(t *testing.T) {
	t.Parallel()
	cache := t.TempDir()
	first := startChildren(t, 3, "shared", cache)
	for i, c := range first {
		if diff := cmp.Diff(first[0].endpoints, c.endpoints); diff != "" {
			t.Errorf("child %d has another stack (-first +this):\n%s", i, diff)
		}
	}
	supervisor := peerPID(t, filepath.Join(cache, "rescind-test", "*", "shared.sock"))
	if err := syscall.Kill(supervisor, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	second := startChildren(t, 2, "shared", cache)
	if diff := cmp.Diff(second[0].endpoints, second[1].endpoints); diff != "" {
		t.Errorf("two processes have two stacks after the first was killed (-one +other):\n%s", diff)
	}
	if now := peerPID(t, filepath.Join(cache, "rescind-test", "*", "shared.sock")); now == supervisor {
		t.Error("the killed process still runs the stack")
	}
	for _, c := range second {
		if status := etcdHealth(t, c.endpoints); status != http.StatusOK {
			t.Errorf("etcd of the second stack answers %d", status)
		}
		c.input.Close()
	}
	awaitCondition(t, "etcd has ended after the last user", func() bool { return etcdHealth(t, second[0].endpoints) == 0 })
	awaitCondition(t, "the data is deleted", isGone(t, filepath.Join(cache, "rescind-test", "*", "shared", "*")))
}

// peerPID is the process that listens at the socket that matches the pattern.
func peerPID(t *testing.T, pattern string) int {
	t.Helper()
	sockets, err := filepath.Glob(pattern)
	if err != nil || len(sockets) != 1 {
		t.Fatalf("sockets %q, want one: %v", sockets, err)
	}
	conn, err := net.Dial("unix", sockets[0])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var (
		peer    *syscall.Ucred
		peerErr error
	)
	err = raw.Control(func(fd uintptr) {
		peer, peerErr = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err := errors.Join(err, peerErr); err != nil {
		t.Fatal(err)
	}
	return int(peer.Pid)
}
