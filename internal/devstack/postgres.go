package devstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const databaseUser, databaseName = "rescind", "rescind"

type postgres struct {
	folder  *folder
	account *account
	bin     string // the folder of postgres and initdb
	noFsync bool
	run     *process
}

func postgresDir(f *folder) string { return filepath.Join(f.servers, string(Postgres)) }

func postgresPIDFile(f *folder) string { return filepath.Join(f.servers, "postgres.pid") }

// endPostgresOrphans ends what an earlier run has left: the postmaster, and its children if it is gone already. They
// would hold the shared memory that the next postmaster checks.
func endPostgresOrphans(f *folder) error {
	err := endOrphan(postgresPIDFile(f), postgresStop...)
	return errors.Join(err, endPostgresChildren(postgresDir(f)))
}

// postgresStop is a fast shutdown, then an immediate one (recovery at the next start).
var postgresStop = []ending{{syscall.SIGINT, 5 * time.Second}, {syscall.SIGQUIT, 2 * time.Second}, killing}

// endPostgresChildren waits for the processes that notice by themselves that their postmaster is gone.
func endPostgresChildren(dir string) error {
	for _, child := range processesIn(filepath.Join(dir, "data"), "postgres") {
		if awaitEnd(child, nil, time.Second) {
			continue
		}
		if err := endProcess(child, nil, killing); err != nil {
			return err
		}
	}
	return nil
}

func newPostgres(f *folder, found programs, noFsync bool) (*postgres, error) {
	acct, err := lookupAccount("postgres")
	if err != nil {
		return nil, err
	}
	p := &postgres{folder: f, account: acct, noFsync: noFsync}
	p.bin, err = found.postgresFor(p.data())
	return p, err
}

func (p *postgres) dir() string { return postgresDir(p.folder) }

func (p *postgres) data() string { return filepath.Join(p.dir(), "data") }

func (p *postgres) describe(e *Endpoints) {
	e.DatabaseURL = (&url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword(databaseUser, p.folder.PostgresSecret),
		Host:     p.folder.addr(postgresPort),
		Path:     databaseName,
		RawQuery: "sslmode=disable",
	}).String()
}

func (p *postgres) start(ctx context.Context) (<-chan struct{}, error) {
	if _, err := os.Stat(p.data()); errors.Is(err, os.ErrNotExist) {
		if err := p.init(ctx); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	// Nothing of ours runs, or it would have been ended: the pid in this file, if another process has it by now, would
	// stop the server.
	if err := os.Remove(filepath.Join(p.data(), "postmaster.pid")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	socketDir := p.dir()
	if len(socketDir)+len("/.s.PGSQL.00000") > 107 { // what a socket's address can hold
		socketDir = ""
	}
	settings := []string{
		"listen_addresses=127.0.0.1",
		fmt.Sprintf("port=%d", p.folder.PortBase+postgresPort),
		"unix_socket_directories=" + socketDir,
		"max_connections=400",
		"password_encryption=scram-sha-256",
		"cluster_name=rescind",
		"log_line_prefix=%m [%p] %q%u@%d ",
	}
	if p.noFsync {
		settings = append(settings, "fsync=off", "full_page_writes=off")
	}
	args := []string{"-D", p.data()}
	for _, s := range settings {
		args = append(args, "-c", s)
	}
	cmd := p.account.command(context.WithoutCancel(ctx), p.data(), nil, filepath.Join(p.bin, "postgres"), args...)
	run, err := startProcess(cmd, postgresPIDFile(p.folder), p.folder.logFile(Postgres), syscall.SIGINT)
	if err != nil {
		return nil, err
	}
	p.run = run
	if err := run.await(ctx, p.answers); err != nil {
		return nil, errors.Join(err, p.kill())
	}
	return run.done, nil
}

// init makes the data folder. It gets its name only when it is complete.
func (p *postgres) init(ctx context.Context) error {
	next, secret := filepath.Join(p.dir(), "data.new"), filepath.Join(p.dir(), "secret")
	err := errors.Join(
		p.account.ownedDir(p.dir()),
		os.RemoveAll(next),
		p.account.writeFile(secret, p.folder.PostgresSecret),
	)
	if err != nil {
		return err
	}
	initdb := []string{"-D", next, "--username=" + databaseUser, "--pwfile=" + secret, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"}
	if p.noFsync {
		initdb = append(initdb, "--no-sync")
	}
	if out, err := p.account.command(ctx, p.dir(), nil, filepath.Join(p.bin, "initdb"), initdb...).CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, out)
	}
	if err := os.Remove(secret); err != nil {
		return err
	}
	// The server cannot be asked to make a database before it runs, but a single session without a server can.
	single := p.account.command(ctx, p.dir(), nil, filepath.Join(p.bin, "postgres"), "--single", "-D", next, "-c", "fsync=off", "postgres")
	single.Stdin = strings.NewReader("CREATE DATABASE " + databaseName + "\n")
	if out, err := single.CombinedOutput(); err != nil || bytes.Contains(out, []byte("ERROR:")) {
		return fmt.Errorf("create database %s: %w: %s", databaseName, exitReason(err), out)
	}
	return os.Rename(next, p.data())
}

// answers tells whether the server asks for a password, which it does once it accepts connections.
func (p *postgres) answers(ctx context.Context) bool {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", p.folder.addr(postgresPort))
	if err != nil {
		return false
	}
	defer conn.Close()
	const protocol = 3 << 16
	startup := binary.BigEndian.AppendUint32(make([]byte, 4), protocol)
	startup = append(startup, "user\x00"+databaseUser+"\x00database\x00"+databaseName+"\x00\x00"...)
	binary.BigEndian.PutUint32(startup, uint32(len(startup)))
	answer, err := ask(conn, startup)
	return err == nil && answer == 'R' // an authentication request; 'E', an error, while it recovers
}

// ask sends a message and returns the first byte of the answer.
func ask(conn net.Conn, message []byte) (byte, error) {
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return 0, err
	}
	if _, err := conn.Write(message); err != nil {
		return 0, err
	}
	answer := make([]byte, 1)
	_, err := conn.Read(answer)
	return answer[0], err
}

func (p *postgres) stop() error {
	err := p.run.end(postgresStop...)
	return errors.Join(err, endPostgresChildren(p.dir()))
}

func (p *postgres) kill() error {
	err := p.run.end(killing)
	return errors.Join(err, endPostgresChildren(p.dir()))
}
