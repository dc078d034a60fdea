package devstack

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

func awaitCondition(t *testing.T, holds func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for !holds() {
		select {
		case <-ctx.Done():
			t.Fatal("condition does not hold after a minute")
		case <-poll.C:
		}
	}
}

// dataDir is a folder that no system user can enter, nor the one it is in.
func dataDir(t *testing.T) string {
	t.Helper()
	private := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(private, 0o700); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(private, "data")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if err := Remove(ctx, dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	return dir
}

func start(t *testing.T, cfg Config) *Stack {
	t.Helper()
	s, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, s) })
	return s
}

func stop(t *testing.T, s *Stack) {
	t.Helper()
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
}

// leaveBehind writes something to each server, and whatIsLeft tells whose is there.
func leaveBehind(t *testing.T, at Endpoints) {
	t.Helper()
	if at.DatabaseURL != "" {
		query(t, at, "CREATE TABLE left_behind (word text)")
	}
	if at.AMQPURL != "" {
		if err := declareQueue(t, at, (*amqp.Channel).QueueDeclare); err != nil {
			t.Fatal(err)
		}
	}
	if at.EtcdEndpoints != nil {
		etcdCall(t, at, "put", map[string]string{"key": encode("left behind"), "value": encode("yes")})
	}
}

func whatIsLeft(t *testing.T, at Endpoints) map[Server]bool {
	t.Helper()
	found := map[Server]bool{}
	if at.DatabaseURL != "" {
		found[Postgres] = query(t, at, "SELECT to_regclass('left_behind') IS NOT NULL")
	}
	if at.AMQPURL != "" {
		found[RabbitMQ] = declareQueue(t, at, (*amqp.Channel).QueueDeclarePassive) == nil
	}
	if at.EtcdEndpoints != nil {
		found[Etcd] = strings.Contains(etcdCall(t, at, "range", map[string]string{"key": encode("left behind")}), encode("yes"))
	}
	return found
}

// running lists the processes of the servers, epmd included, as their pid files have them.
func running(t *testing.T, f *folder) []processID {
	t.Helper()
	var ids []processID
	for _, name := range []Server{"epmd", Postgres, RabbitMQ, Etcd} {
		ids = append(ids, runningServer(t, f, name))
	}
	return ids
}

func runningServer(t *testing.T, f *folder, server Server) processID {
	t.Helper()
	id := recorded(filepath.Join(f.servers, string(server)+".pid"))
	if !id.alive() {
		t.Fatalf("%s has ended", server)
	}
	return id
}

// query runs a statement, and returns its first value if that is a bool.
func query(t *testing.T, at Endpoints, sql string) bool {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), at.DatabaseURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	rows, err := conn.Query(t.Context(), sql)
	if err != nil {
		t.Fatal(err)
	}
	values, err := pgx.CollectRows(rows, pgx.RowTo[bool])
	if err != nil {
		t.Fatal(err)
	}
	return len(values) > 0 && values[0]
}

func declareQueue(t *testing.T, at Endpoints, declare func(*amqp.Channel, string, bool, bool, bool, bool, amqp.Table) (amqp.Queue, error)) error {
	t.Helper()
	conn, err := amqp.Dial(at.AMQPURL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	_, err = declare(ch, "left behind", true, false, false, false, nil)
	return err
}

func encode(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

func etcdCall(t *testing.T, at Endpoints, method string, body any) string {
	t.Helper()
	content, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(at.EtcdEndpoints[0]+"/v3/kv/"+method, "application/json", strings.NewReader(string(content)))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("etcd %s: %s %s %v", method, resp.Status, answer, err)
	}
	return string(answer)
}

func TestDataOutlivesServersAndStacks(t *testing.T) {
	t.Parallel()
	dir := dataDir(t)
	s := start(t, Config{Dir: dir})
	at := s.Endpoints()
	leaveBehind(t, at)
	all := map[Server]bool{Postgres: true, RabbitMQ: true, Etcd: true}
	for _, server := range allServers {
		end := s.KillServer
		if server == RabbitMQ {
			end = s.StopServer // it writes down what was declared some seconds later
		}
		if err := end(server); err != nil {
			t.Fatal(err)
		}
		if err := s.StartServer(t.Context(), server); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(all, whatIsLeft(t, at)); diff != "" {
		t.Errorf("after each server was ended and started (-want +got):\n%s", diff)
	}
	stop(t, s)

	s = start(t, Config{Dir: dir})
	if diff := cmp.Diff(at, s.Endpoints()); diff != "" {
		t.Errorf("endpoints of the second start (-first +second):\n%s", diff)
	}
	if diff := cmp.Diff(all, whatIsLeft(t, at)); diff != "" {
		t.Errorf("after a second start (-want +got):\n%s", diff)
	}
	if err := s.StopServer(RabbitMQ); err != nil {
		t.Fatal(err)
	}
	for _, server := range allServers {
		if err := s.WipeServer(server); err != nil {
			t.Fatal(err)
		}
		if err := s.StartServer(t.Context(), server); err != nil {
			t.Fatal(err)
		}
	}
	none := map[Server]bool{Postgres: false, RabbitMQ: false, Etcd: false}
	if diff := cmp.Diff(none, whatIsLeft(t, at)); diff != "" {
		t.Errorf("after each server was wiped (-want +got):\n%s", diff)
	}
	select {
	case err := <-s.Died():
		t.Errorf("servers that were ended on purpose are reported: %v", err)
	default:
	}
}

func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	s := start(t, Config{Dir: dataDir(t), Without: []Server{RabbitMQ}, NoFsync: true})
	at := s.Endpoints()
	for _, server := range []Server{Postgres, Etcd} {
		if err := s.BackupServer(t.Context(), server); err != nil {
			t.Fatal(err)
		}
	}
	leaveBehind(t, at)
	if diff := cmp.Diff(map[Server]bool{Postgres: true, Etcd: true}, whatIsLeft(t, at)); diff != "" {
		t.Errorf("before (-want +got):\n%s", diff)
	}
	for _, server := range []Server{Postgres, Etcd} {
		if err := s.RestoreServer(t.Context(), server); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(map[Server]bool{Postgres: false, Etcd: false}, whatIsLeft(t, at)); diff != "" {
		t.Errorf("after the backup came back (-want +got):\n%s", diff)
	}
}

func TestFreshStartForgets(t *testing.T) {
	t.Parallel()
	cfg := Config{Dir: dataDir(t), Without: []Server{RabbitMQ}, NoFsync: true}
	s := start(t, cfg)
	leaveBehind(t, s.Endpoints())
	stop(t, s)
	cfg.Fresh = true
	s = start(t, cfg)
	if diff := cmp.Diff(map[Server]bool{Postgres: false, Etcd: false}, whatIsLeft(t, s.Endpoints())); diff != "" {
		t.Errorf("after a fresh start (-want +got):\n%s", diff)
	}
}

func TestLostBaseFolderMakesServersDataWorthless(t *testing.T) {
	t.Parallel()
	cfg := Config{Dir: dataDir(t), Without: []Server{RabbitMQ, Etcd}, NoFsync: true}
	s := start(t, cfg)
	leaveBehind(t, s.Endpoints())
	stop(t, s)
	if err := os.RemoveAll(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	s = start(t, cfg)
	if diff := cmp.Diff(map[Server]bool{Postgres: false}, whatIsLeft(t, s.Endpoints())); diff != "" {
		t.Errorf("after the base folder was deleted (-want +got):\n%s", diff)
	}
}

func TestDeadServerIsReportedAndCanBeStarted(t *testing.T) {
	t.Parallel()
	for _, server := range []Server{Postgres, Etcd} {
		t.Run(string(server), func(t *testing.T) {
			t.Parallel()
			without := slices.DeleteFunc(slices.Clone(allServers), func(s Server) bool { return s == server })
			s := start(t, Config{Dir: dataDir(t), Without: without, NoFsync: true})
			leaveBehind(t, s.Endpoints())
			if err := syscall.Kill(runningServer(t, s.folder, server).PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-s.Died():
				if !strings.Contains(err.Error(), string(server)) {
					t.Errorf("report %q does not name %s", err, server)
				}
			case <-t.Context().Done():
				t.Fatal("its end is not reported")
			}
			if err := s.StartServer(t.Context(), server); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(map[Server]bool{server: true}, whatIsLeft(t, s.Endpoints())); diff != "" {
				t.Errorf("after it was started again (-want +got):\n%s", diff)
			}
		})
	}
}

// TestKilledRunIsClearedUp kills a process that runs a stack, and starts another on its data folder at once.
func TestKilledRunIsClearedUp(t *testing.T) {
	t.Parallel()
	dir := dataDir(t)
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), childDir+"="+dir)
	output, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the child says %q: %v", line, err)
	}
	servers := running(t, &folder{base: dir, servers: serversDir(dir)})
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := child.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Fatalf("the child ended with %v, want our SIGKILL", err)
	}
	s := start(t, Config{Dir: dir, NoFsync: true})
	for _, server := range servers {
		if server.alive() {
			t.Errorf("process %d of the killed run is alive", server.PID)
		}
	}
	leaveBehind(t, s.Endpoints())
}

// TestOrphansAreEnded abandons a stack whose servers run, as a process does that the kernel did not get to tell them of.
func TestOrphansAreEnded(t *testing.T) {
	t.Parallel()
	cfg := Config{Dir: dataDir(t), NoFsync: true}
	abandoned, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	leaveBehind(t, abandoned.Endpoints())
	servers := running(t, abandoned.folder)
	for _, c := range abandoned.controls {
		c.mu.Lock()
		c.ended = nil
		c.mu.Unlock()
	}
	if err := errors.Join(abandoned.guard.Close(), abandoned.folder.close()); err != nil {
		t.Fatal(err)
	}
	s := start(t, cfg)
	for _, server := range servers {
		if server.alive() {
			t.Errorf("orphan %d is alive", server.PID)
		}
	}
	if diff := cmp.Diff(abandoned.Endpoints(), s.Endpoints()); diff != "" {
		t.Errorf("endpoints (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(map[Server]bool{Postgres: true, RabbitMQ: true, Etcd: true}, whatIsLeft(t, s.Endpoints())); diff != "" {
		t.Errorf("data (-want +got):\n%s", diff)
	}
}

// TestOrphanThatHeedsNoSignalIsKilled has a process that ignores all that can be ignored, and so must have been recorded
// by a pid file to be found.
func TestOrphanThatHeedsNoSignalIsKilled(t *testing.T) {
	t.Parallel()
	orphan := exec.Command("sh", "-c", "trap '' INT TERM; echo deaf; while :; do sleep 1; done")
	orphan.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	output, err := orphan.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := orphan.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(output).ReadString('\n'); line != "deaf\n" {
		t.Fatalf("the orphan says %q: %v", line, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- orphan.Wait() }()
	pidFile := recordPID(t, processID{PID: orphan.Process.Pid, Start: startTime(orphan.Process.Pid)})
	if err := endOrphan(pidFile, ending{syscall.SIGTERM, 50 * time.Millisecond}, killing); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || err.Error() != "signal: killed" {
		t.Errorf("the orphan ended with %v, want SIGKILL", err)
	}
}

func recordPID(t *testing.T, id processID) string {
	t.Helper()
	record, err := json.Marshal(id)
	if err != nil {
		t.Fatal(err)
	}
	pidFile := filepath.Join(t.TempDir(), "server.pid")
	if err := os.WriteFile(pidFile, record, 0o600); err != nil {
		t.Fatal(err)
	}
	return pidFile
}

// TestAnotherProcessWithARecordedPIDIsSpared has a pid file that names a living process by its pid, but by another
// start time: the pid was given anew.
func TestAnotherProcessWithARecordedPIDIsSpared(t *testing.T) {
	t.Parallel()
	innocent := exec.Command("sleep", "600")
	if err := innocent.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- innocent.Wait() }()
	pidFile := recordPID(t, processID{PID: innocent.Process.Pid, Start: "another boot/1"})
	if err := endOrphan(pidFile, killing); err != nil {
		t.Fatal(err)
	}
	if err := innocent.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || err.Error() != "signal: terminated" {
		t.Errorf("the process ended with %v, want our SIGTERM", err)
	}
	if _, err := os.Stat(pidFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pid file is still there: %v", err)
	}
}

func TestFolderIsForOneProcess(t *testing.T) {
	t.Parallel()
	cfg := Config{Dir: dataDir(t), Without: allServers}
	start(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	s, err := Start(ctx, cfg)
	if err == nil {
		stop(t, s)
	}
	if err == nil || !strings.Contains(err.Error(), "another process is using it") {
		t.Errorf("second start on one folder: %v", err)
	}
}

func TestFolderIsPrivate(t *testing.T) {
	t.Parallel()
	dir := dataDir(t)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	start(t, Config{Dir: dir, Without: allServers})
	got := map[string]os.FileMode{}
	for _, name := range []string{".", stateFile, LockFile} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		got[name] = info.Mode().Perm()
	}
	if diff := cmp.Diff(map[string]os.FileMode{".": 0o700, stateFile: 0o600, LockFile: 0o600}, got); diff != "" {
		t.Errorf("modes (-want +got):\n%s", diff)
	}
}

func TestFolderWithOtherFilesIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "thesis.tex"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := Start(t.Context(), Config{Dir: dir, Without: allServers, Fresh: true})
	if err == nil {
		stop(t, s)
		t.Fatal("a folder with somebody's files is taken")
	}
	if err := Remove(t.Context(), dir); err == nil {
		t.Error("a folder with somebody's files is removed")
	}
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o755 {
		t.Errorf("its mode is %v now", info.Mode())
	}
	if _, err := os.Stat(filepath.Join(dir, "thesis.tex")); err != nil {
		t.Error(err)
	}
}

func TestServersFolderOfSomebodyElseIsRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		path string
		uid  int
		ok   bool
	}{
		{name: "ours", path: dir, uid: os.Geteuid(), ok: true},
		{name: "another user's", path: dir, uid: os.Geteuid() + 1},
		{name: "a link", path: link, uid: os.Geteuid()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if err := checkOwner(tt.path, tt.uid); (err == nil) != tt.ok {
				t.Errorf("error %v, want none: %t", err, tt.ok)
			}
		})
	}
}

func TestPortsAreHeld(t *testing.T) {
	t.Parallel()
	first, second := &folder{base: t.TempDir()}, &folder{base: t.TempDir()}
	guard, err := first.takePorts()
	if err != nil {
		t.Fatal(err)
	}
	defer guard.Close()
	second.PortBase = first.PortBase
	other, err := second.takePorts()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if first.PortBase == second.PortBase {
		t.Errorf("two stacks have port %d", first.PortBase)
	}
}

func TestAbandonedDataIsRemoved(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	tests := []struct {
		name    string
		base    string
		running processID
		kept    bool
	}{
		{name: "its base folder is there", base: base, kept: true},
		{name: "its base folder is gone", base: filepath.Join(base, "gone")},
		{name: "but its servers run", base: filepath.Join(base, "gone"), running: processID{PID: os.Getpid(), Start: startTime(os.Getpid())}, kept: true},
		{name: "and they have ended", base: filepath.Join(base, "gone"), running: processID{PID: os.Getpid(), Start: "another boot/1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp(filepath.Dir(serversPrefix), filepath.Base(serversPrefix)+"test-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			record, err := json.Marshal(tt.running)
			if err != nil {
				t.Fatal(err)
			}
			// The owner's name comes last: without it, the folder is not looked at.
			err = errors.Join(
				os.WriteFile(filepath.Join(dir, "postgres.pid"), record, 0o600),
				os.WriteFile(filepath.Join(dir, ownerFile), []byte("id\n"+tt.base), 0o600),
			)
			if err != nil {
				t.Fatal(err)
			}
			sweepAbandoned()
			if _, err := os.Stat(dir); (err == nil) != tt.kept {
				t.Errorf("afterwards: %v, want it kept: %t", err, tt.kept)
			}
		})
	}
}
