package devstack

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcdQuota is the size of the database at which etcd refuses writes, in bytes.
const etcdQuota = 2 << 30

type etcd struct {
	folder  *folder
	noFsync bool
	run     *embed.Etcd
}

func (e *etcd) dir() string { return filepath.Join(e.folder.base, string(Etcd)) } // this process reads it, whoever it runs as

func (e *etcd) describe(to *Endpoints) { to.EtcdEndpoints = []string{e.clientURL().String()} }

func (e *etcd) clientURL() *url.URL { return &url.URL{Scheme: "http", Host: e.folder.addr(etcdPort)} }

func (e *etcd) start(ctx context.Context) (<-chan struct{}, error) {
	clients, peers := []url.URL{*e.clientURL()}, []url.URL{{Scheme: "http", Host: e.folder.addr(etcdPeersPort)}}
	cfg := embed.NewConfig()
	cfg.Name = "rescind"
	cfg.Dir = e.dir()
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = clients, clients
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = peers, peers
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.AutoCompactionMode = embed.CompactorModePeriodic
	cfg.AutoCompactionRetention = "5m"
	cfg.QuotaBackendBytes = etcdQuota
	cfg.UnsafeNoFsync = e.noFsync
	cfg.LogOutputs = []string{e.folder.logFile(Etcd)}
	cfg.LogLevel = "info"
	if err := os.MkdirAll(e.dir(), 0o700); err != nil {
		return nil, err
	}
	run, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, err
	}
	e.run = run
	select {
	case <-run.Server.ReadyNotify():
		return run.Server.StopNotify(), nil
	case err = <-run.Err():
	case <-run.Server.StopNotify():
		err = errors.New("it ended by itself")
	case <-ctx.Done():
		err = fmt.Errorf("it is not ready: %w", context.Cause(ctx))
	}
	return nil, errors.Join(err, e.kill())
}

func (e *etcd) stop() error { return e.close() }

func (e *etcd) kill() error {
	e.run.Server.HardStop()
	return e.close()
}

func (e *etcd) close() error {
	const limit = 8 * time.Second
	closed := make(chan struct{})
	go func() {
		e.run.Close()
		close(closed)
	}()
	select {
	case <-closed:
		return nil
	case <-time.After(limit):
		return fmt.Errorf("not closed within %s", limit)
	}
}
