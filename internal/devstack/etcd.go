package devstack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcdQuota is the size of the database at which etcd refuses writes, in bytes.
const etcdQuota = 2 << 30

// etcdVariable is set in the environment of a process that is to be etcd, to an etcdConfig as JSON.
const etcdVariable = "RESCIND_DEVSTACK_ETCD"

type etcdConfig struct {
	Dir       string
	ClientURL string
	PeerURL   string
	NoFsync   bool
}

var childCalled atomic.Bool

// Child must be called by main before anything else. In a process that [Start] has started to be etcd, it does not
// return.
func Child() {
	childCalled.Store(true)
	text := os.Getenv(etcdVariable)
	if text == "" {
		return
	}
	var cfg etcdConfig
	err := json.Unmarshal([]byte(text), &cfg)
	if err == nil {
		err = runEtcd(cfg)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// runEtcd lasts until etcd fails. A signal ends it with the process, between any two instructions: that is no worse than
// a crash, after which etcd has what it has answered for, and faster than its own ending, which waits for open watches.
func runEtcd(cfg etcdConfig) error {
	clientURL, err1 := url.Parse(cfg.ClientURL)
	peerURL, err2 := url.Parse(cfg.PeerURL)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	ec := embed.NewConfig()
	ec.Name = "rescind"
	ec.Dir = cfg.Dir
	ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{*clientURL}, []url.URL{*clientURL}
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = []url.URL{*peerURL}, []url.URL{*peerURL}
	ec.InitialCluster = ec.InitialClusterFromName(ec.Name)
	ec.AutoCompactionMode = embed.CompactorModePeriodic
	ec.AutoCompactionRetention = "5m"
	ec.QuotaBackendBytes = etcdQuota
	ec.UnsafeNoFsync = cfg.NoFsync
	run, err := embed.StartEtcd(ec)
	if err != nil {
		return err
	}
	return <-run.Err()
}

type etcd struct {
	folder  *folder
	noFsync bool
	run     *process
}

func newEtcd(f *folder, noFsync bool) (*etcd, error) {
	if !childCalled.Load() {
		return nil, errors.New("start etcd: main has not called devstack.Child")
	}
	return &etcd{folder: f, noFsync: noFsync}, nil
}

func etcdPIDFile(f *folder) string { return filepath.Join(f.servers, "etcd.pid") }

var etcdStop = []ending{{syscall.SIGTERM, 2 * time.Second}, killing}

func endEtcdOrphans(f *folder) error { return endOrphan(etcdPIDFile(f), etcdStop...) }

func (e *etcd) dir() string { return filepath.Join(e.folder.base, string(Etcd)) } // it runs as we do

func (e *etcd) describe(to *Endpoints) { to.EtcdEndpoints = []string{e.url(etcdPort)} }

func (e *etcd) url(port int) string { return "http://" + e.folder.addr(port) }

func (e *etcd) start(ctx context.Context) (<-chan struct{}, error) {
	cfg, err := json.Marshal(etcdConfig{Dir: e.dir(), ClientURL: e.url(etcdPort), PeerURL: e.url(etcdPeersPort), NoFsync: e.noFsync})
	if err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(e.dir(), 0o700); err != nil {
		return nil, err
	}
	var sameUser *account
	cmd := sameUser.command(context.WithoutCancel(ctx), e.dir(), []string{etcdVariable + "=" + string(cfg)}, program)
	cmd.Args = []string{"rescind-etcd"}
	if e.run, err = startProcess(cmd, etcdPIDFile(e.folder), e.folder.logFile(Etcd), syscall.SIGTERM); err != nil {
		return nil, err
	}
	if err := e.run.await(ctx, e.answers); err != nil {
		return nil, errors.Join(err, e.kill())
	}
	return e.run.done, nil
}

// answers tells whether etcd can agree with itself on a read.
func (e *etcd) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.url(etcdPort)+"/health", nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

func (e *etcd) stop() error { return e.run.end(etcdStop...) }

func (e *etcd) kill() error { return e.run.end(killing) }
