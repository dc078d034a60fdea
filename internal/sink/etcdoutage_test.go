package sink

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
)

// catchUp opens e and delivers what it lacks, over errors.
func (et *etcdTest) catchUp(e *Etcd) {
	et.Helper()
	var err error
	et.await("the sink does not come back", func() bool {
		var seq revocation.Seq
		if seq, err = e.Open(et.Context(), revocation.Position{}); err == nil {
			err = e.Deliver(et.Context(), et.log.after(seq))
		}
		return err == nil
	}, func() string { return err.Error() })
}

// One etcd of its own for all that would disturb other tests, one after the other.
func TestEtcdOutages(t *testing.T) {
	t.Parallel()
	stack := stacktest.Own(t, stacktest.Etcd)
	et := newEtcdTestAt(t, stack.Endpoints().EtcdEndpoints)
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 1500)...))

	// Stopped and started.
	stack.Stop(stacktest.Etcd)
	if err := e.Deliver(t.Context(), et.log.revoke(tokens(1500, 10)...)); err == nil {
		t.Error("delivered to a stopped etcd")
	}
	if _, err := e.Open(t.Context(), revocation.Position{}); err == nil || !strings.Contains(err.Error(), "connection error") {
		t.Errorf("open with etcd stopped: %v, want the reason", err)
	}
	if err := e.Check(t.Context()); err == nil || strings.Contains(err.Error(), "127.0.0.1") {
		t.Errorf("check with etcd stopped: %v, want an error without an address", err)
	}
	stack.Start(stacktest.Etcd)
	et.catchUp(e)
	et.wantRight()

	// Crashed between two deliveries.
	stack.Kill(stacktest.Etcd)
	stack.Start(stacktest.Etcd)
	et.log.revoke(tokens(1600, 10)...)
	et.catchUp(e)
	et.wantRight()

	// Its data wiped; also while nothing is delivered.
	stack.Wipe(stacktest.Etcd)
	stack.Start(stacktest.Etcd)
	et.await("the loss is not noticed", func() bool { return et.beat(e) != nil }, func() string { return "" })
	et.catchUp(e)
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 1520})
	et.awaitRight()

	// Its data restored to an older state.
	stack.Backup(stacktest.Etcd)
	et.log.revoke(tokens(1700, 300)...)
	et.catchUp(e)
	stack.Restore(stacktest.Etcd)
	et.log.revoke(tokens(2000, 5)...)
	et.catchUp(e)
	et.wantStream(revocation.Position{Epoch: etcdTestEpoch, Seq: 1825})
	et.wantRight()

	// Full.
	if err := e.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	et.alarm(pb.AlarmRequest_ACTIVATE)
	if err := e.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "NOSPACE") {
		t.Errorf("check of a full etcd: %v, want NOSPACE", err)
	}
	if err := e.Deliver(t.Context(), et.log.revoke(tokens(3000, 1)...)); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("deliver to a full etcd: %v, want %v", err, rpctypes.ErrNoSpace)
	}
	et.alarm(pb.AlarmRequest_DEACTIVATE)
	et.catchUp(e)
	et.wantRight()

	et.testEtcdUser(e)
}

func (et *etcdTest) alarm(action pb.AlarmRequest_AlarmAction) {
	et.Helper()
	status, err := et.client.Status(et.Context(), et.cfg.Endpoints[0])
	if err != nil {
		et.Fatal(err)
	}
	_, err = pb.NewMaintenanceClient(et.client.ActiveConnection()).Alarm(et.Context(),
		&pb.AlarmRequest{Action: action, Alarm: pb.AlarmType_NOSPACE, MemberID: status.Header.MemberId})
	if err != nil {
		et.Fatal(err)
	}
}

// testEtcdUser turns etcd's authentication on, for good.
func (et *etcdTest) testEtcdUser(anonymous *Etcd) {
	et.Helper()
	ctx := et.Context()
	must := func(_ any, err error) {
		et.Helper()
		if err != nil {
			et.Fatal(err)
		}
	}
	must(et.client.RoleAdd(ctx, "root"))
	must(et.client.UserAdd(ctx, "root", "root's secret"))
	must(et.client.UserGrantRole(ctx, "root", "root"))
	must(et.client.RoleAdd(ctx, "writer"))
	must(et.client.RoleGrantPermission(ctx, "writer", et.cfg.Prefix+"/", clientv3.GetPrefixRangeEnd(et.cfg.Prefix+"/"),
		clientv3.PermissionType(clientv3.PermReadWrite)))
	must(et.client.UserAdd(ctx, "rescind", "hunter2"))
	must(et.client.UserGrantRole(ctx, "rescind", "writer"))
	must(et.client.AuthEnable(ctx))
	root, err := clientv3.New(clientv3.Config{
		Endpoints: et.cfg.Endpoints, Username: "root", Password: "root's secret", Logger: zap.NewNop(), DialTimeout: etcdTestLimit,
	})
	if err != nil {
		et.Fatal(err)
	}
	et.Cleanup(func() {
		if err := root.Close(); err != nil {
			et.Error(err)
		}
	})
	et.client = root

	if err := anonymous.Deliver(ctx, et.log.revoke(tokens(4000, 1)...)); err == nil {
		et.Error("delivered without a user")
	}
	et.cfg.Username, et.cfg.Password = "rescind", "hunter3"
	refused := et.sink()
	if _, err := refused.Open(ctx, revocation.Position{}); !errors.Is(err, rpctypes.ErrAuthFailed) || strings.Contains(err.Error(), "hunter3") {
		et.Errorf("open with a wrong password: %v, want %v and no password", err, rpctypes.ErrAuthFailed)
	}
	if err := refused.Check(ctx); err == nil || strings.Contains(err.Error(), "hunter3") {
		et.Errorf("check with a wrong password: %v, want an error without the password", err)
	}
	et.cfg.Password = "hunter2"
	e := et.sink()
	et.catchUp(e)
	et.wantRight()
	if err := e.Check(ctx); err != nil {
		et.Errorf("check as a user: %v", err)
	}
	// A change of the users makes all tokens of the clients void.
	must(root.UserAdd(ctx, "another", "x"))
	et.deliver(e, et.log.revoke(tokens(4100, 1)...))
	et.wantRight()
}

func TestEtcdHealth(t *testing.T) {
	t.Parallel()
	status := func(size, quota int64, errs ...string) *clientv3.StatusResponse {
		return &clientv3.StatusResponse{Header: &pb.ResponseHeader{MemberId: 0xabc}, DbSize: size << 20, DbSizeQuota: quota << 20, Errors: errs}
	}
	tests := []struct {
		name   string
		status *clientv3.StatusResponse
		want   string
	}{
		{name: "well", status: status(1000, 2048)},
		{name: "unknown quota", status: status(1000, 0)},
		{name: "nearly full", status: status(1700, 2048), want: "member abc uses 1700 MiB of its quota of 2048 MiB"},
		{name: "no leader", status: status(1, 2048, "etcdserver: no leader"), want: "no leader"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := etcdHealth(tt.status)
			if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("err is %v, want %q", err, tt.want)
			}
		})
	}
}

func TestEtcdCheckOneOfTwoMembers(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	proxy := relaytest.NewProxy(t, strings.TrimPrefix(et.cfg.Endpoints[0], "http://"))
	proxy.Refuse()
	et.cfg.Endpoints = append(et.cfg.Endpoints[:1:1], "http://"+proxy.Addr())
	e := et.sink()
	if err := e.Check(t.Context()); err == nil || err.Error() != "1 of 2 etcd members do not answer" {
		t.Errorf("err is %v, want that 1 of 2 does not answer", err)
	}
	et.open(e) // the other is enough
	et.deliver(e, et.log.revoke(tokens(0, 5)...))
	et.wantRight()
}

// Etcd that does not answer holds nobody up for longer than the limit, and the
// error says which limit.
func TestEtcdNoAnswer(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	proxy := relaytest.NewProxy(t, strings.TrimPrefix(et.cfg.Endpoints[0], "http://"))
	et.cfg.Endpoints, et.cfg.RequestTimeout = []string{"http://" + proxy.Addr()}, 2*time.Second
	e := et.opened()
	proxy.Stall()
	err := e.Deliver(t.Context(), et.log.revoke(tokens(0, 5)...))
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no answer within 2s") {
		t.Errorf("err is %v, want the limit", err)
	}
	proxy.Heal()
	et.catchUp(e)
	et.wantRight()
}

func TestEtcdTLS(t *testing.T) {
	t.Parallel()
	et := newEtcdTest(t)
	addr, ca := startTLS(t, strings.TrimPrefix(et.cfg.Endpoints[0], "http://"))
	et.cfg.Endpoints = []string{"https://" + addr}
	et.cfg.TLS = &tls.Config{RootCAs: ca}
	e := et.opened()
	et.deliver(e, et.log.revoke(tokens(0, 5)...))
	et.wantRight()
	if err := e.Check(t.Context()); err != nil {
		t.Errorf("check: %v", err)
	}
	et.cfg.TLS = &tls.Config{RootCAs: x509.NewCertPool()}
	if _, err := et.sink().Open(t.Context(), revocation.Position{}); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("open with an unknown authority: %v, want a word about the certificate", err)
	}
}

// startTLS speaks TLS in front of target.
func startTLS(t *testing.T, target string) (addr string, ca *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	ca = x509.NewCertPool()
	ca.AddCert(cert)
	ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"h2"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer near.Close()
				far, err := net.Dial("tcp", target)
				if err != nil {
					return
				}
				go func() {
					defer far.Close()
					_, _ = io.Copy(far, near)
				}()
				_, _ = io.Copy(near, far)
			}()
		}
	}()
	return ln.Addr().String(), ca
}
