package etcdfeed

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
)

const (
	iss    = "https://km.example.com"
	theirs = "https://login.example.org/realms/a"
	epoch1 = revocation.Epoch("3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10")
	epoch2 = revocation.Epoch("5e1f4a90-0c3b-4a77-8f0e-2b9d8c7a6e51")

	// limit bounds every wait of these tests.
	limit = 30 * time.Second
)

// service writes a directory as the service does.
type service struct {
	*testing.T
	cfg    Config
	client *clientv3.Client
	epoch  revocation.Epoch
	seq    revocation.Seq // where the directory stands
	beats  int64
}

func newService(t *testing.T) *service {
	t.Helper()
	return newServiceAt(t, stacktest.Shared(t).EtcdEndpoints)
}

func newServiceAt(t *testing.T, endpoints []string) *service {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop(), DialTimeout: limit})
	if err != nil {
		t.Fatal(err)
	}
	s := &service{T: t, client: client, epoch: epoch1, cfg: Config{Endpoints: endpoints, Prefix: stacktest.EtcdPrefix(t), Issuer: iss}}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		defer cancel()
		_, _ = s.client.Delete(ctx, s.cfg.Prefix, clientv3.WithPrefix()) // spares the others' memory, if it is still there
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *service) txn(ops ...clientv3.Op) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), limit)
	defer cancel()
	if _, err := s.client.Txn(ctx).Then(ops...).Commit(); err != nil {
		s.Fatalf("write to etcd: %v", err)
	}
}

func (s *service) putEntry(target revocation.Target) clientv3.Op {
	e := directory.Entry{Target: target, Exp: time.Now().Unix() + 3600, Seq: s.seq, At: time.Now()}
	if target.Kind.HasTime() {
		e.NotAfter = time.Now().Unix()
	}
	return clientv3.OpPut(directory.Key(s.cfg.Prefix, iss, target), e.Value())
}

func (s *service) putStream() clientv3.Op {
	return clientv3.OpPut(directory.StreamKey(s.cfg.Prefix), fmt.Sprintf(`{"epoch":%q,"seq":%d}`, s.epoch, s.seq))
}

// revoke delivers one event for each target, all in one transaction.
func (s *service) revoke(targets ...revocation.Target) {
	s.Helper()
	var ops []clientv3.Op
	for _, target := range targets {
		s.seq++
		ops = append(ops, s.putEntry(target))
	}
	s.txn(append(ops, s.putStream())...)
}

func (s *service) heartbeat(head revocation.Seq) directory.Heartbeat {
	s.beats++
	return directory.Heartbeat{Epoch: s.epoch, Head: head, Through: s.seq, Source: iss, Time: time.UnixMilli(1795256400000 + s.beats).UTC()}
}

func (s *service) beat(head revocation.Seq) {
	s.Helper()
	s.txn(clientv3.OpPut(directory.HeartbeatKey(s.cfg.Prefix), s.heartbeat(head).Value()))
}

// build writes the whole directory anew.
func (s *service) build(targets ...revocation.Target) {
	s.Helper()
	s.txn(clientv3.OpPut(directory.RebuildKey(s.cfg.Prefix), "x"), clientv3.OpDelete(directory.StreamKey(s.cfg.Prefix)))
	for _, target := range targets {
		s.txn(s.putEntry(target))
	}
	s.txn(s.putStream(), clientv3.OpDelete(directory.RebuildKey(s.cfg.Prefix)))
	s.beat(s.seq)
}

func token(n int) revocation.Target {
	return revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: fmt.Sprintf("token-%d", n)}
}

func tokens(first, n int) []revocation.Target {
	var all []revocation.Target
	for i := range n {
		all = append(all, token(first+i))
	}
	return all
}

// oneOfEach has every kind, of both issuers.
func oneOfEach() []revocation.Target {
	var all []revocation.Target
	for _, iss := range []string{iss, theirs} {
		all = append(all,
			revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "one jti/of both"},
			revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "0193a2f4-7c11-7d02-9b1e-000000000001"},
			revocation.DigestTarget(iss, "a.b"),
			revocation.Target{Kind: revocation.KindSession, Iss: iss, ID: "s1"},
			revocation.Target{Kind: revocation.KindKey, Iss: iss, ID: "k1"},
			revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "c1"},
			revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "ü@x"},
		)
	}
	return append(all, revocation.Target{Kind: revocation.KindTenant, ID: "acme.example"})
}

// revoked reports whether s has a revocation of target.
func revoked(s *replica.State, target revocation.Target) bool {
	t := replica.Token{Iss: target.Iss}
	switch target.Kind {
	case revocation.KindToken:
		if t.JTI = target.ID; target.Digest {
			t.JTI, t.Digest = "", target.ID
		}
	case revocation.KindClient:
		t.ClientID = target.ID
	case revocation.KindSubject:
		t.Sub = target.ID
	case revocation.KindSession:
		t.SID = target.ID
	case revocation.KindKey:
		t.KID = target.ID
	case revocation.KindTenant:
		t.Tenant = target.ID
	}
	_, ok := s.Check(t, time.Now().Unix())
	return ok
}

func (s *service) etcd() *Etcd {
	s.Helper()
	e, err := New(s.cfg)
	if err != nil {
		s.Fatal(err)
	}
	e.silence = limit
	s.Cleanup(func() {
		if err := e.Close(); err != nil {
			s.Error(err)
		}
	})
	return e
}

// receiver is that of a replica whose only source is etcd. It writes down what it is told.
type receiver struct {
	etcd      *Etcd
	state     *replica.State
	told      chan string
	connected func() error // before the load
}

func newReceiver(e *Etcd) *receiver {
	return &receiver{
		etcd: e, state: replica.NewState(replica.StateConfig{}), told: make(chan string, 100_000), connected: func() error { return nil },
	}
}

func (r *receiver) Connected(ctx context.Context) error {
	err := r.connected()
	if err == nil {
		err = r.etcd.Load(ctx, r.state)
	}
	if err == nil {
		r.told <- "connected"
	}
	return err
}

func (r *receiver) Event(context.Context, revocation.Event) error {
	panic("the directory has no events")
}

func (r *receiver) Revoked(rec replica.Record, at revocation.Position) {
	r.told <- fmt.Sprintf("revoked %s %s at %d", rec.Target.Kind, rec.Target.ID, at.Seq)
	r.state.Revoke(rec, at)
}

func (r *receiver) Heartbeat(_ context.Context, b replica.Beat) error {
	r.told <- fmt.Sprintf("heartbeat %d/%d of %d, %t", b.Seq, b.Head, b.Time.UnixMilli()-1795256400000, b.RevocationsOnly)
	return r.state.Through(b.Position)
}

func (r *receiver) want(t testing.TB, want ...string) {
	t.Helper()
	var got []string
	end := time.After(limit)
	for len(got) < len(want) {
		select {
		case s := <-r.told:
			got = append(got, s)
		case <-end:
			t.Fatalf("after %s told %q, want %q", limit, got, want)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("told (-want +got):\n%s", diff)
	}
}

// following is a call of Follow.
type following struct {
	testing.TB
	end  context.CancelFunc
	done chan error
}

func follow(t testing.TB, e *Etcd, to replica.Receiver) *following {
	ctx, end := context.WithCancel(t.Context())
	c := &following{TB: t, end: end, done: make(chan error, 1)}
	go func() { c.done <- e.Follow(ctx, func() revocation.Position { return revocation.Position{} }, to) }()
	t.Cleanup(end)
	return c
}

func (c *following) wantEnd(want error) {
	c.Helper()
	select {
	case err := <-c.done:
		if !errors.Is(err, want) {
			c.Errorf("Follow: %v, want %v", err, want)
		}
	case <-time.After(limit):
		c.Fatalf("Follow has not ended after %s", limit)
	}
}

// stop ends the call as its caller would.
func (c *following) stop() {
	c.Helper()
	c.end()
	c.wantEnd(context.Canceled)
}

func TestNew(t *testing.T) {
	t.Parallel()
	good := Config{Endpoints: []string{"http://127.0.0.1:2379"}, Issuer: iss}
	tests := []struct {
		name   string
		change func(*Config)
		want   []string
	}{
		{name: "good", change: func(*Config) {}},
		{name: "bare address", change: func(c *Config) { c.Endpoints = []string{"etcd-1:2379", "[::1]:2379"} }},
		{name: "TLS", change: func(c *Config) { c.Endpoints, c.TLS = []string{"https://etcd-1:2379"}, &tls.Config{} }},
		{
			name: "all at once", change: func(c *Config) { *c = Config{Username: "u", Prefix: "a/"} },
			want: []string{"no endpoints", "user name and password", `prefix "a/"`, "no issuer"},
		},
		{
			name: "endpoints",
			change: func(c *Config) {
				c.TLS = &tls.Config{}
				c.Endpoints = []string{"https://user:hunter2@etcd-1:2379", "http://etcd-2:2379", "ftp://etcd-3", "://hunter2", "https://etcd-4:2379/hunter2"}
			},
			want: []string{"endpoint 1 is not of the form", "endpoint 2 is http, but TLS", "endpoint 3 is ftp", "endpoint 4 is not", "endpoint 5 is not"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			cfg := good
			tt.change(&cfg)
			_, err := New(cfg)
			if len(tt.want) == 0 {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error does not mention %q: %v", want, err)
				}
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("error shows the password: %v", err)
			}
		})
	}
}

// What lies in the directory's folders and cannot be an entry is passed over.
func (s *service) litter() {
	s.Helper()
	at := func(path, value string) clientv3.Op { return clientv3.OpPut(s.cfg.Prefix+path, value) }
	s.txn(
		at("/jti/a", "true"), at("/users/not%20ours", ""), at("/sessions/b", `{"exp":1}`), at("/issuers/abc/def", "{"),
		at("/jti/misplaced", directory.Entry{Target: revocation.Target{Iss: theirs}, Exp: -1, Seq: 1}.Value()),
		at("/other/c", "not in a folder"), at("/rescind/notes", "neither"),
	)
}

const littered = 5

func TestLoad(t *testing.T) {
	t.Parallel()
	s := newService(t)
	all := append(tokens(0, 50), oneOfEach()...)
	s.seq = revocation.Seq(len(all))
	s.build(all...)
	s.litter()
	// The issuer of the super tenant has just changed, and these have not moved.
	moving := []revocation.Target{
		{Kind: revocation.KindToken, Iss: "https://km.former.example.com", ID: "former"},
		{Kind: revocation.KindToken, Iss: iss, ID: "latter"},
	}
	s.txn(
		clientv3.OpPut(directory.Key(s.cfg.Prefix, moving[0].Iss, moving[0]), directory.Entry{Target: moving[0], Exp: 1 << 40, Seq: 1}.Value()),
		clientv3.OpPut(directory.Key(s.cfg.Prefix, moving[0].Iss, moving[1]), directory.Entry{Target: moving[1], Exp: 1 << 40, Seq: 1}.Value()),
	)
	for _, page := range []int64{1, 7, 10_000} {
		e := s.etcd()
		e.page = page
		state := replica.NewState(replica.StateConfig{})
		if err := e.Load(t.Context(), state); err != nil {
			t.Fatal(err)
		}
		if want := (revocation.Position{Epoch: epoch1, Seq: s.seq}); state.At() != want {
			t.Errorf("the state is at %s, want %s", state.At(), want)
		}
		for _, target := range slices.Concat(all, moving) {
			if !revoked(state, target) {
				t.Errorf("in pages of %d: %+v is not revoked", page, target)
			}
		}
		if tenants, only := state.Scope(); tenants != nil || !only {
			t.Errorf("the state is about tenants %v, revocations only is %t, want all of them and true", tenants, only)
		}
		if got := e.Foreign(); got != littered {
			t.Errorf("%d keys are foreign, want %d", got, littered)
		}
		if revoked(state, token(99)) {
			t.Error("what nobody revoked is revoked")
		}
	}
}

// However often the directory is written while it is read: what is loaded is all of one revision.
func TestLoadIsOfOneRevision(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.build()
	user := func(n int) revocation.Target {
		return revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: fmt.Sprint(n)}
	}
	ctx, end := context.WithCancel(t.Context())
	defer end()
	written := make(chan int, 1)
	go func() {
		defer close(written)
		for n := 1; ctx.Err() == nil && n < 2000; n++ {
			s.revoke(token(n), user(n)) // in two folders
			select {
			case written <- n:
			default:
			}
		}
	}()
	e := s.etcd()
	e.page = 20
	for range 5 {
		<-written
		state := replica.NewState(replica.StateConfig{})
		if err := e.Load(ctx, state); err != nil {
			t.Fatal(err)
		}
		last := int(state.At().Seq) / 2
		for n := 1; n < last+50; n++ {
			if a, b := revoked(state, token(n)), revoked(state, user(n)); a != (n <= last) || b != a {
				t.Fatalf("at %s: of the pair %d the token is revoked: %t, the user: %t", state.At(), n, a, b)
			}
		}
	}
	end()
	for range written { // until the writer has ended
	}
}

func TestNotReady(t *testing.T) {
	t.Parallel()
	put := func(s *service, key, value string) { s.txn(clientv3.OpPut(key, value)) }
	tests := []struct {
		name string
		make func(*service)
		want string
	}{
		{"empty", func(*service) {}, "is building it"},
		{"being built", func(s *service) {
			s.build()
			s.txn(clientv3.OpPut(directory.RebuildKey(s.cfg.Prefix), "x"), clientv3.OpDelete(directory.StreamKey(s.cfg.Prefix)))
		}, "is building it"},
		{"no heartbeat", func(s *service) { s.revoke(token(1)) }, "no heartbeat yet"},
		{"heartbeat of another epoch", func(s *service) {
			s.build()
			s.epoch = epoch2
			s.revoke(token(1))
		}, "no heartbeat of its epoch"},
		{"of another service", func(s *service) {
			s.build()
			s.cfg.Issuer = theirs
		}, `of issuer "https://km.example.com", not of "https://login.example.org/realms/a"`},
		{"unreadable stream key", func(s *service) {
			s.build()
			put(s, directory.StreamKey(s.cfg.Prefix), "seven")
		}, "stream key does not hold"},
		{"unreadable heartbeat", func(s *service) {
			s.build()
			put(s, directory.HeartbeatKey(s.cfg.Prefix), "seven")
		}, "heartbeat does not hold"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			tt.make(s)
			e := s.etcd()
			state := replica.NewState(replica.StateConfig{})
			if err := e.Load(t.Context(), state); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Load: %v, want %q", err, tt.want)
			}
			if state.At() != (revocation.Position{}) {
				t.Errorf("the state is at %s", state.At())
			}
			r := newReceiver(e)
			if err := e.Follow(t.Context(), state.At, r); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Follow: %v, want %q", err, tt.want)
			}
			if len(r.told) > 0 {
				t.Errorf("told %q", <-r.told)
			}
		})
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	if _, err := new(Etcd).Events(t.Context(), revocation.Position{}); !errors.Is(err, replica.ErrGone) {
		t.Errorf("Events: %v, want %v", err, replica.ErrGone)
	}
}

// What is written from the beginning of Follow on is told, what is revoked before the heartbeat
// that comes with it, and no heartbeat but those that are seen to be written.
func TestFollow(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.revoke(tokens(1, 3)...)
	s.beat(3)
	e := s.etcd()
	r := newReceiver(e)
	r.connected = func() error { s.revoke(token(4)); return nil }
	c := follow(t, e, r)
	r.want(t, "connected", "revoked token token-4 at 4")
	s.revoke(tokens(5, 2)...)
	s.beat(9)
	r.want(t, "revoked token token-5 at 5", "revoked token token-6 at 6", "heartbeat 6/9 of 2, true")
	s.litter()
	s.revoke(oneOfEach()[:1]...)
	r.want(t, "revoked token one jti/of both at 7", "heartbeat 7/9 of 2, true")
	s.revoke(tokens(8, 5)...)
	r.want(t, "revoked token token-8 at 8", "revoked token token-9 at 9", "revoked token token-10 at 10", "revoked token token-11 at 11",
		"revoked token token-12 at 12", "heartbeat 12/12 of 2, true")
	// A repair, and an entry that goes.
	s.txn(s.putEntry(token(3)), clientv3.OpDelete(directory.Key(s.cfg.Prefix, iss, token(5))))
	s.beat(12)
	r.want(t, "revoked token token-3 at 12", "heartbeat 12/12 of 3, true")
	for n := range 12 {
		if want := n > 0 && n != 7; revoked(r.state, token(n)) != want {
			t.Errorf("token %d is revoked: %t, want %t", n, !want, want)
		}
	}
	if want := (revocation.Position{Epoch: epoch1, Seq: 12}); r.state.At() != want {
		t.Errorf("the state is at %s, want %s", r.state.At(), want)
	}
	if got := e.Foreign(); got != littered {
		t.Errorf("%d keys are foreign, want %d", got, littered)
	}
	c.stop()
}

func TestReceiverFails(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.build()
	e := s.etcd()
	r := newReceiver(e)
	gone := errors.New("the source is away")
	r.connected = func() error { return gone }
	follow(t, e, r).wantEnd(gone)
	r.connected = func() error { return nil }
	c := follow(t, e, r)
	r.want(t, "connected")
	if err := r.state.Load(revocation.Position{Epoch: epoch2, Seq: 1}, func(*replica.Loader) error { return nil }); err != nil {
		t.Fatal(err)
	}
	s.beat(0)
	c.wantEnd(replica.ErrEpoch) // what Through says to the receiver
}

// Whatever makes the directory another one ends the watch, and the next one begins with it.
func TestBuiltAnew(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		change func(*service)
		want   error
	}{
		{"a build begins", func(s *service) {
			s.txn(clientv3.OpPut(directory.RebuildKey(s.cfg.Prefix), "x"), clientv3.OpDelete(directory.StreamKey(s.cfg.Prefix)))
		}, errBuilding},
		{"a build was missed", func(s *service) {
			s.txn(clientv3.OpDelete(directory.StreamKey(s.cfg.Prefix)))
			s.txn(s.putStream())
		}, errHistory},
		{"a new epoch", func(s *service) {
			s.epoch, s.seq = epoch2, 1
			s.txn(s.putStream())
		}, errHistory},
		{"a heartbeat of a new epoch", func(s *service) {
			s.epoch = epoch2
			s.beat(5)
		}, errHistory},
		{"a lower seq", func(s *service) {
			s.seq--
			s.txn(s.putStream())
		}, errHistory},
		{"another heartbeat key", func(s *service) {
			s.txn(clientv3.OpDelete(directory.HeartbeatKey(s.cfg.Prefix)))
			s.beat(5)
		}, errHistory},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newService(t)
			s.revoke(tokens(1, 5)...)
			s.beat(5)
			e := s.etcd()
			r := newReceiver(e)
			c := follow(t, e, r)
			r.want(t, "connected")
			tt.change(s)
			c.wantEnd(tt.want)
			if len(r.told) > 0 {
				t.Errorf("told %q", <-r.told)
			}
			s.epoch, s.seq = epoch2, 3
			s.build(tokens(6, 3)...)
			c = follow(t, e, r)
			r.want(t, "connected")
			s.revoke(token(9))
			s.beat(4)
			r.want(t, "revoked token token-9 at 4", fmt.Sprintf("heartbeat 4/4 of %d, true", s.beats))
			for n := 1; n < 10; n++ { // those of the former epoch too
				if !revoked(r.state, token(n)) {
					t.Errorf("token %d is not revoked", n)
				}
			}
			c.stop()
		})
	}
}

// The versions of the directory's marks tell a write that was missed, whatever was missed with it.
func TestMarkFollows(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.build()
	e := s.etcd()
	client, err := e.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := newReceiver(e)
	m, err := e.marks(t.Context(), client, 0)
	if err != nil {
		t.Fatal(err)
	}
	s.revoke(token(1)) // is missed
	resp, err := client.Get(t.Context(), directory.StreamKey(s.cfg.Prefix))
	if err != nil {
		t.Fatal(err)
	}
	missed := resp.Header.Revision
	s.revoke(token(2))
	history := client.Watch(t.Context(), s.cfg.Prefix+"/", clientv3.WithPrefix(), clientv3.WithRev(missed+1))
	update := <-history
	watch := &session{Etcd: e, marks: m, to: r}
	if err := watch.take(t.Context(), update); !errors.Is(err, errHistory) {
		t.Errorf("take after a missed write: %v, want %v", err, errHistory)
	}
}

func TestSilence(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.build()
	e := s.etcd()
	e.silence = 50 * time.Millisecond
	r := newReceiver(e)
	if err := e.Follow(t.Context(), r.state.At, r); err == nil || !strings.Contains(err.Error(), "nothing came for too long") {
		t.Errorf("Follow: %v, want that nothing came", err)
	}
}

// A connection that is cut costs nothing but time, a dead network holds nobody up, and
// nobody waits for an etcd that is not there.
func TestNetwork(t *testing.T) {
	t.Parallel()
	s := newService(t)
	s.build()
	proxy := relaytest.NewProxy(t, strings.TrimPrefix(s.cfg.Endpoints[0], "http://"))
	s.cfg.Endpoints = []string{"http://" + proxy.Addr()}
	e := s.etcd()
	r := newReceiver(e)
	c := follow(t, e, r)
	r.want(t, "connected")
	proxy.Refuse()
	s.revoke(token(1))
	s.beat(2)
	proxy.Heal()
	r.want(t, "revoked token token-1 at 1", "heartbeat 1/2 of 2, true")
	proxy.Stall()
	c.stop()

	proxy.Heal()
	proxy.Refuse()
	absent := s.etcd()
	if err := absent.Load(t.Context(), r.state); err == nil || !strings.Contains(err.Error(), "read where the etcd directory stands") {
		t.Errorf("Load: %v, want the request that failed", err)
	}
	proxy.Heal()
	held := proxy.Stall()
	dead := s.etcd()
	c = follow(t, dead, newReceiver(dead))
	<-held
	c.stop()
}

// One etcd of its own for all that would disturb other tests, one after the other.
func TestOutages(t *testing.T) {
	t.Parallel()
	stack := stacktest.Own(t, stacktest.Etcd)
	s := newServiceAt(t, stack.Endpoints().EtcdEndpoints)
	direct := s.cfg.Endpoints
	proxy := relaytest.NewProxy(t, strings.TrimPrefix(direct[0], "http://"))
	s.cfg.Endpoints = []string{"http://" + proxy.Addr()}
	s.revoke(tokens(1, 3)...)
	s.beat(3)

	// What the watch would go on with is compacted.
	e := s.etcd()
	r := newReceiver(e)
	c := follow(t, e, r)
	r.want(t, "connected")
	proxy.Refuse()
	s.revoke(token(4))
	s.beat(4)
	now, err := s.client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Compact(t.Context(), now.Header.Revision); err != nil {
		t.Fatal(err)
	}
	proxy.Heal()
	c.wantEnd(rpctypes.ErrCompacted)
	c = follow(t, e, r)
	r.want(t, "connected")
	s.beat(4)
	r.want(t, "heartbeat 4/4 of 3, true")
	if !revoked(r.state, token(4)) {
		t.Error("what was revoked meanwhile is not in the next load")
	}

	// Etcd loses its data, and is filled again past where the watch was before it goes on there.
	proxy.Refuse()
	stack.Wipe(stacktest.Etcd)
	stack.Start(stacktest.Etcd)
	s.seq++
	s.build(tokens(1, 5)...)
	for range 50 {
		s.beat(5)
	}
	proxy.Heal()
	s.revoke(token(6))
	c.wantEnd(errHistory)
	for len(r.told) > 0 {
		if told := <-r.told; strings.HasPrefix(told, "heartbeat") {
			t.Errorf("told %q of the new directory", told)
		}
	}
	c = follow(t, e, r)
	r.want(t, "connected")
	for n := range 6 {
		if !revoked(r.state, token(n+1)) {
			t.Errorf("token %d is not revoked after etcd has lost its data", n+1)
		}
	}

	// It asks for a user now.
	s.users()
	s.beat(6)
	c.stop()
	if err := e.Load(t.Context(), r.state); err == nil {
		t.Error("loaded without a user")
	}
	for _, tt := range []struct{ username, password, want string }{
		{"reader", "hunter3", "authentication failed"},
		{"stranger", "hunter2", "permission denied"},
		{"narrow", "hunter2", "permission denied"}, // may read every key that is there, and not watch them all
	} {
		s.cfg.Username, s.cfg.Password = tt.username, tt.password
		e = s.etcd()
		r = newReceiver(e)
		if err := e.Follow(t.Context(), r.state.At, r); err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "hunter") {
			t.Errorf("follow as %s: %v, want %q and no password", tt.username, err, tt.want)
		}
		if len(r.told) > 0 {
			t.Errorf("%s: told %q", tt.username, <-r.told)
		}
	}
	s.cfg.Username, s.cfg.Password = "reader", "hunter2"
	e = s.etcd()
	r = newReceiver(e)
	c = follow(t, e, r)
	r.want(t, "connected")
	s.beat(6)
	r.want(t, fmt.Sprintf("heartbeat 6/6 of %d, true", s.beats))
	// A change of the users makes all tokens of the clients void.
	if _, err := s.client.UserAdd(t.Context(), "another", "x"); err != nil {
		t.Fatal(err)
	}
	proxy.Cut()
	s.revoke(token(7))
	r.want(t, "revoked token token-7 at 7", fmt.Sprintf("heartbeat 7/7 of %d, true", s.beats))
	if err := e.Load(t.Context(), r.state); err != nil {
		t.Errorf("Load: %v", err)
	}
	c.stop()
}

// users turns etcd's authentication on, and makes s.client one of root.
func (s *service) users() {
	s.Helper()
	ctx := s.Context()
	must := func(_ any, err error) {
		s.Helper()
		if err != nil {
			s.Fatal(err)
		}
	}
	read := func(role, from, end string) {
		must(s.client.RoleGrantPermission(ctx, role, from, end, clientv3.PermissionType(clientv3.PermRead)))
	}
	for _, name := range []string{"root", "reader", "stranger", "narrow"} {
		must(s.client.RoleAdd(ctx, name))
		must(s.client.UserAdd(ctx, name, "hunter2"))
		must(s.client.UserGrantRole(ctx, name, name))
	}
	read("reader", s.cfg.Prefix+"/", clientv3.GetPrefixRangeEnd(s.cfg.Prefix+"/"))
	read("stranger", "/somewhere/else/", clientv3.GetPrefixRangeEnd("/somewhere/else/"))
	for _, folder := range append(directory.Folders(s.cfg.Prefix), s.cfg.Prefix+"/rescind/") {
		read("narrow", folder, clientv3.GetPrefixRangeEnd(folder))
	}
	must(s.client.AuthEnable(ctx))
	root, err := clientv3.New(clientv3.Config{
		Endpoints: s.client.Endpoints(), Username: "root", Password: "hunter2", Logger: zap.NewNop(), DialTimeout: limit,
	})
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		if err := root.Close(); err != nil {
			s.Error(err)
		}
	})
	s.client = root
}
