package replica

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// service is a log and what it stands for, as the service has them, in memory. It is a [Source].
type service struct {
	t testing.TB

	mu      sync.Mutex
	epoch   revocation.Epoch
	log     []revocation.Event
	grown   chan struct{}
	gone    revocation.Seq // events up to it are not to be had
	tenants []string       // that readers see; nil: all
	broken  error          // what the source fails with
	hangs   bool           // the source does not answer
	lag     int            // how many of the newest events the source does not have yet
	silent  bool           // the source does not tell the head
	loads   int
	pages   int
	ended   []revocation.Event // of former epochs
}

func newService(t testing.TB) *service {
	return &service{t: t, epoch: epoch, grown: make(chan struct{})}
}

// set changes something.
func (s *service) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	close(s.grown)
	s.grown = make(chan struct{})
}

func (s *service) append(e revocation.Event) revocation.Event {
	s.set(func() {
		e.Position = revocation.Position{Epoch: s.epoch, Seq: revocation.Seq(len(s.log) + 1)}
		e.Source, e.Time = iss, time.Now().UTC().Truncate(time.Millisecond)
		for i := len(s.log) - 1; i >= 0 && e.Previous == 0; i-- {
			if s.log[i].Tenant == e.Tenant {
				e.Previous = s.log[i].Seq
			}
		}
		s.log = append(s.log, e)
	})
	return e
}

// revoke revokes a token.
func (s *service) revoke(jti string, tenant ...revocation.Tenant) revocation.Event {
	return s.append(revoke(Record{Target: ofJTI(jti), Tenant: append(tenant, acme)[0], Exp: time.Now().Add(24 * time.Hour).Unix()}))
}

func (s *service) change(verb catalog.Verb, e catalog.Entity) {
	event, err := catalog.NewEvent(catalog.Change{Verb: verb, Entity: e})
	must(s.t, err)
	s.append(event)
}

func (s *service) head() revocation.Position {
	s.mu.Lock()
	defer s.mu.Unlock()
	return revocation.Position{Epoch: s.epoch, Seq: revocation.Seq(len(s.log))}
}

// restore loses the newest events, and begins a new epoch.
func (s *service) restore(lost int, next revocation.Epoch) {
	s.set(func() {
		s.ended = append(s.ended, s.log...)
		s.log = slices.Clone(s.log[:len(s.log)-lost])
		s.epoch, s.gone = next, revocation.Seq(len(s.log))
	})
}

func (s *service) sees(domain string) bool {
	return s.tenants == nil || slices.Contains(s.tenants, domain)
}

// stateAt is what the first n events stand for. It needs s.mu.
func (s *service) stateAt(n int) *model {
	m := newModel()
	for _, e := range s.log[:n] {
		switch {
		case !s.sees(e.Tenant.Domain):
		case catalog.IsChange(e.Type):
			c, err := catalog.ParseChange(e)
			must(s.t, err)
			if m.entities[c.Entity.Base().UUID] = c.Entity; c.Verb == catalog.Deleted {
				delete(m.entities, c.Entity.Base().UUID)
			}
		default:
			rev, err := e.Revocation()
			must(s.t, err)
			m.hold(Record{Target: rev.Target, Tenant: rev.Tenant, Exp: rev.Exp, NotAfter: rev.NotAfter})
		}
	}
	return m
}

// asked is what every question to the source begins with.
func (s *service) asked(ctx context.Context, count *int) error {
	s.mu.Lock()
	*count++
	err, hangs := s.broken, s.hangs
	s.mu.Unlock()
	if hangs {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	time.Sleep(time.Duration(rand.N(20)) * time.Millisecond)
	return err
}

func (s *service) Load(ctx context.Context, to *State) error {
	if err := s.asked(ctx, &s.loads); err != nil {
		return err
	}
	s.mu.Lock()
	n := max(0, len(s.log)-s.lag)
	at, m, scope := revocation.Position{Epoch: s.epoch, Seq: revocation.Seq(n)}, s.stateAt(n), slices.Clone(s.tenants)
	s.mu.Unlock()
	time.Sleep(time.Duration(rand.N(20)) * time.Millisecond) // events go on
	return to.Load(at, func(l *Loader) error {
		l.Tenants(scope)
		m.fill(l)
		return nil
	})
}

func (s *service) Events(ctx context.Context, after revocation.Position) (Page, error) {
	if err := s.asked(ctx, &s.pages); err != nil {
		return Page{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if after.Epoch != s.epoch || after.Seq < s.gone {
		return Page{}, fmt.Errorf("after %s: %w", after, ErrGone)
	}
	const limit = 7
	p := Page{Head: revocation.Seq(len(s.log)), Through: after.Seq}
	for p.Through < revocation.Seq(len(s.log)-s.lag) && len(p.Events) < limit {
		if e := s.log[p.Through]; s.sees(e.Tenant.Domain) {
			p.Events = append(p.Events, e)
		}
		p.Through++
	}
	if s.silent {
		p.Head = -1
	}
	return p, nil
}

func (s *service) asks() (loads, pages int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loads, s.pages
}

// wire is a feed of a service. It tells everything at once, in order, unless spoil does
// something about it.
type wire struct {
	s    *service
	name string
	// spoil returns what becomes of an event: what is told in its place. An error cuts the connection.
	spoil func(e revocation.Event) ([]revocation.Event, error)
	// beat changes a heartbeat, or keeps it back.
	beat func(b *Beat) bool
	// refuse is why no connection is made.
	refuse func() error

	mu       sync.Mutex
	connects int
}

func (w *wire) Name() string { return cmp.Or(w.name, "wire") }

func (w *wire) Follow(ctx context.Context, _ func() revocation.Position, to Receiver) error {
	w.mu.Lock()
	w.connects++
	w.mu.Unlock()
	if w.refuse != nil {
		if err := w.refuse(); err != nil {
			return err
		}
	}
	at := w.s.head()
	if err := to.Connected(ctx); err != nil {
		return err
	}
	beat := time.NewTicker(time.Second)
	defer beat.Stop()
	for {
		w.s.mu.Lock()
		if at.Epoch != w.s.epoch { // the broker goes on as if nothing had been
			at = revocation.Position{Epoch: w.s.epoch, Seq: w.s.gone}
		}
		at.Seq = min(at.Seq, revocation.Seq(len(w.s.log))) // the log was restored
		events, grown := slices.Clone(w.s.log[at.Seq:]), w.s.grown
		w.s.mu.Unlock()
		for _, e := range events {
			at = e.Position
			told := []revocation.Event{e}
			if w.spoil != nil {
				var err error
				if told, err = w.spoil(e); err != nil {
					return err
				}
			}
			for _, e := range told {
				if err := to.Event(ctx, e); err != nil {
					return err
				}
			}
		}
		select {
		case <-grown:
		case <-beat.C:
			b := Beat{Position: at, Head: w.s.head().Seq, Time: time.Now()}
			if b.Head < b.Seq || w.s.head().Epoch != at.Epoch || w.beat != nil && !w.beat(&b) {
				continue
			}
			if err := to.Heartbeat(ctx, b); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// start runs a replica until the test ends, or stop is called. It belongs in a bubble of synctest.
func start(t *testing.T, cfg Config) (r *Replica, stop func()) {
	t.Helper()
	r, err := New(cfg)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run returned %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return r, stop
}

// bubble runs f where time passes at once while everybody waits.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, f)
}

// within waits until ok, at most for d.
func within(t *testing.T, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after %s still not: %s", d, what)
		}
	}
}

func (s *service) reachedBy(r *Replica) func() bool {
	return func() bool { return r.state.At() == s.head() }
}

// equal compares a replica with the service.
func (s *service) equal(t *testing.T, r *Replica) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.stateAt(len(s.log))
	entities := make(map[string]catalog.Entity)
	r.state.View(func(v *View) {
		collect(t, entities, v.Applications())
		collect(t, entities, v.APIs())
	})
	if diff := gocmp.Diff(m.entities, entities); diff != "" {
		t.Errorf("the catalog (-service +replica):\n%s", diff)
	}
	for target := range m.revoked {
		if _, ok := r.state.Check(tokenOf(target.ID), time.Now().Unix()); !ok {
			t.Errorf("%s is not revoked", target.ID)
		}
	}
	for _, id := range []string{"never", "neither"} {
		if _, ok := r.state.Check(tokenOf(id), time.Now().Unix()); ok {
			t.Errorf("%s is revoked", id)
		}
	}
	if former := len(s.ended) > 0; !former && r.Status().Revocations != len(m.revoked) {
		t.Errorf("%d are revoked, want %d", r.Status().Revocations, len(m.revoked))
	}
}

func tokenOf(jti string) Token { return Token{Iss: iss, Tenant: acme.Domain, JTI: jti} }

func application(id int32, name string) *catalog.Application {
	return &catalog.Application{
		Meta: catalog.Meta{ID: id, UUID: fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012x", id), Tenant: acme}, Name: name,
	}
}

func TestFollowing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("before")
		r, stop := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}, ID: "gw-1"})
		if d := r.Check(tokenOf("x")); r.Ready() || d != (Decision{Outcome: Refused, Age: Never}) {
			t.Errorf("nothing is known: ready %t, %+v", r.Ready(), d)
		}
		within(t, time.Second, "the snapshot is there", s.reachedBy(r))
		if d := r.Check(tokenOf("before")); d.Outcome != Revoked || d.Kind != revocation.KindToken {
			t.Errorf("%+v", d)
		}
		within(t, time.Second, "the feed is connected", func() bool { return r.connected(nil) })
		s.revoke("after")
		synctest.Wait()
		if d := r.Check(tokenOf("after")); d.Outcome != Revoked {
			t.Errorf("%+v", d)
		}
		time.Sleep(time.Minute)
		loads, pages := s.asks()
		got := r.Status()
		if got.Feeds[0].Heard < time.Now().Add(-2*time.Second).UnixMilli() || got.Age > 2*time.Second || r.Check(tokenOf("x")).Outcome != Valid {
			t.Errorf("%+v", got)
		}
		got.Age, got.Feeds[0].Heard = 0, 0
		want := Status{
			ID: "gw-1", Position: s.head(), Ready: true, From: "source", Revocations: 2, Snapshots: 1,
			Feeds: []FeedStatus{{Name: "wire", Connected: true, Events: 1}},
		}
		if diff := gocmp.Diff(want, got); diff != "" || loads != 1 || pages > 3 {
			t.Errorf("after %d loads and %d pages (-want +got):\n%s", loads, pages, diff)
		}
		stop()
		if f := r.Status().Feeds[0]; f.Connected || f.Error == "" {
			t.Errorf("the end: %+v", f)
		}
	})
}

var errDown = errors.New("it is down")

func TestEmpty(t *testing.T) {
	bubble(t, func(t *testing.T) {
		for _, empty := range []OnStale{Deny, Serve} {
			s := newService(t)
			s.broken = errDown
			r, stop := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}, Empty: empty, Staleness: Staleness{Then: Introspect}})
			time.Sleep(time.Minute)
			want := map[OnStale]Outcome{Deny: Refused, Serve: Valid}[empty]
			if d := r.Check(tokenOf("x")); d.Outcome != want || d.Age != Never || r.Ready() != (empty == Serve) {
				t.Errorf("%s: %+v, ready %t", empty, d, r.Ready())
			}
			if got := r.Status(); got.Error != errDown.Error() || got.Feeds[0].Connected || !strings.Contains(got.Feeds[0].Error, "down") {
				t.Errorf("%s: %+v", empty, got)
			}
			_, before := s.asks()
			if loads, _ := s.asks(); loads > 40 || before != 0 {
				t.Errorf("%d questions in a minute", loads)
			}
			s.set(func() { s.broken = nil })
			within(t, 8*time.Second, "it is loaded", s.reachedBy(r))
			within(t, 8*time.Second, "it is ready", func() bool { return r.Ready() && r.Status().Error == "" && r.connected(nil) })
			stop()
		}
	})
}

// lossy loses the events about what is called so.
func lossy(e revocation.Event) ([]revocation.Event, error) {
	if e.Subject == "lost" {
		return nil, nil
	}
	return []revocation.Event{e}, nil
}

// Feeds that lose events, without telling: the next event, or the next heartbeat, shows it.
func TestGap(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s, spoil: lossy}, &wire{s: s, spoil: lossy, name: "other"}}})
		within(t, 2*time.Second, "both are connected", func() bool { return r.connected(r.feeds[0]) && r.connected(r.feeds[1]) })
		loads, pages := s.asks()
		for range 5 {
			s.revoke("lost")
		}
		s.revoke("told") // by both
		within(t, 500*time.Millisecond, "the gap is closed", s.reachedBy(r))
		if l, p := s.asks(); l != loads || p != pages+1 {
			t.Errorf("it took %d loads and %d pages, want one page", l-loads, p-pages)
		}
		s.revoke("lost")
		within(t, 2500*time.Millisecond, "a heartbeat shows the gap", s.reachedBy(r))
		if l, p := s.asks(); l != loads || p != pages+2 {
			t.Errorf("it took %d loads and %d pages, want two pages", l-loads, p-pages)
		}
		s.equal(t, r)
		if got := r.Status().Deltas; got != 2 {
			t.Errorf("%d deltas, want 2", got)
		}
	})
}

// What is revoked holds as soon as a feed tells it, though events are missing and the source hangs.
func TestRevokedAheadOfGap(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("first")
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s, spoil: lossy}}, Staleness: Staleness{Max: 30 * time.Second}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		s.set(func() { s.hangs = true })
		s.revoke("lost")
		for i := range 100 {
			jti := fmt.Sprint("told-", i)
			s.revoke(jti)
			if i == 0 {
				time.Sleep(10 * time.Second) // nobody waits for the source for that long
			}
			synctest.Wait()
			if r.Check(tokenOf(jti)).Outcome != Revoked {
				t.Fatalf("%s is not revoked", jti)
			}
		}
		if r.Check(tokenOf("lost")).Outcome != Valid {
			t.Error("nobody has told it, yet it is revoked?")
		}
		time.Sleep(40 * time.Second)
		if d := r.Check(tokenOf("x")); d.Outcome != Refused || d.Age < 40*time.Second {
			t.Errorf("with a hole it is fresh: %+v", d)
		}
	})
}

const thirdEpoch revocation.Epoch = "77777777-0b52-4f0d-8f7b-2d8f5f9c6a11"

// A restored log lacks what was revoked last. It stays revoked, and the catalog is that of the log.
func TestNewEpoch(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.change("created", application(1, "kept"))
		s.revoke("kept")
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		s.revoke("lost")
		s.change("created", application(2, "lost"))
		within(t, time.Second, "it is told", s.reachedBy(r))
		s.restore(2, newEpoch)
		s.revoke("new")
		within(t, time.Second, "the new epoch is there", s.reachedBy(r))
		s.equal(t, r)
		for _, jti := range []string{"kept", "lost", "new"} {
			if r.Check(tokenOf(jti)).Outcome != Revoked {
				t.Errorf("%s is not revoked", jti)
			}
		}
		time.Sleep(5 * time.Second)
		if r.Age() > 3*time.Second {
			t.Errorf("it is %s old", r.Age())
		}
	})
}

// What a broker kept from another epoch is no reason to load one snapshot after the other.
func TestOldEpoch(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		old := s.revoke("old")
		s.restore(1, newEpoch)
		spoil := func(e revocation.Event) ([]revocation.Event, error) { return []revocation.Event{old, e, old}, nil }
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s, spoil: spoil}, &wire{s: s, name: "beats", beat: func(b *Beat) bool {
			b.Epoch, b.Seq, b.Head = thirdEpoch, 5, 9
			return true
		}}}})
		within(t, 2*time.Second, "both are connected", func() bool { return r.connected(r.feeds[0]) && r.connected(r.feeds[1]) })
		for i := range 600 {
			s.revoke(fmt.Sprint("new-", i))
			time.Sleep(100 * time.Millisecond)
		}
		loads, pages := s.asks()
		if loads > 1 || pages > 40 {
			t.Errorf("%d loads and %d pages in a minute", loads, pages)
		}
		within(t, time.Second, "it is at the head", s.reachedBy(r))
		s.equal(t, r)
		if got := r.Status(); !got.Feeds[0].Connected || !got.Feeds[1].Connected || got.Error != "" || got.Age > 3*time.Second {
			t.Errorf("%+v", got)
		}
	})
}

// A source that has never what is asked for is asked for a few snapshots, then for one in a while.
func TestLoadsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("one")
		s.gone = 1 << 40
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}})
		time.Sleep(5 * time.Minute)
		if loads, _ := s.asks(); loads < 3 || loads > 33 {
			t.Errorf("%d loads in five minutes", loads)
		}
		if r.Check(tokenOf("one")).Outcome != Revoked {
			t.Error("what was loaded is not there")
		}
		if got := r.Status().Error; got == "" {
			t.Error("nobody is told")
		}
	})
}

// An event that this version cannot read is got over with a snapshot.
func TestUnreadableEvent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("one")
		strange := func(e revocation.Event) ([]revocation.Event, error) {
			if e.Subject == "strange" {
				e.Type = "revocation.galaxy"
			}
			return []revocation.Event{e}, nil
		}
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s, spoil: strange}}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		s.revoke("strange")
		within(t, time.Second, "it is got over", s.reachedBy(r))
		s.revoke("next")
		within(t, time.Second, "it goes on", s.reachedBy(r))
		if got := r.Status(); got.Snapshots != 2 || !got.Feeds[0].Connected {
			t.Errorf("%d snapshots, %+v", got.Snapshots, got.Feeds)
		}
		s.equal(t, r)
	})
}

// A feed that knows how far the log is, but brings nothing, is helped by the source.
func TestStuckFeed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		at := s.revoke("one").Position
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{
			s: s, spoil: func(revocation.Event) ([]revocation.Event, error) { return nil, nil },
			beat: func(b *Beat) bool { b.Seq = at.Seq; return true },
		}}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		for i := range 20 {
			s.revoke(fmt.Sprint("next-", i))
			within(t, 5*time.Second, "the source is asked", s.reachedBy(r))
		}
		s.equal(t, r)
		if got := r.Status(); got.Snapshots != 1 || got.Age > 5*time.Second {
			t.Errorf("%+v", got)
		}
	})
}

// Without a feed the source is asked every few seconds, and tells how old the state is.
func TestPolling(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		refused := func() error { return errDown }
		for _, feeds := range [][]Feed{nil, {&wire{s: s, refuse: refused}}} {
			r, stop := start(t, Config{Source: s, Feeds: feeds})
			within(t, time.Second, "it is loaded", s.reachedBy(r))
			_, before := s.asks()
			for i := range 10 {
				s.revoke(fmt.Sprint("next-", i))
				within(t, 5*time.Second, "it is asked for", s.reachedBy(r))
				if age := r.Age(); age < headAge || age > headAge+time.Second {
					t.Errorf("it is %s old", age)
				}
			}
			time.Sleep(time.Minute)
			if _, pages := s.asks(); pages-before > 50 {
				t.Errorf("%d questions in some 90 s", pages-before)
			}
			if len(feeds) > 0 {
				w := feeds[0].(*wire)
				w.mu.Lock()
				if w.connects < 15 || w.connects > 60 {
					t.Errorf("it was tried %d times to connect in some 90 s", w.connects)
				}
				w.mu.Unlock()
			}
			stop()
		}
	})
}

// What does not connect is tried less and less often; what was connected for long, at once.
func TestReconnecting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("one")
		down := true
		w := &wire{s: s}
		w.refuse = func() error {
			s.mu.Lock()
			defer s.mu.Unlock()
			if down {
				return errDown
			}
			return nil
		}
		w.spoil = func(e revocation.Event) ([]revocation.Event, error) { return nil, errDown }
		connects := func() int {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.connects
		}
		r, _ := start(t, Config{Source: s, Feeds: []Feed{w}})
		time.Sleep(2 * time.Second)
		if n := connects(); n < 4 || n > 8 {
			t.Errorf("%d times in two seconds", n)
		}
		time.Sleep(time.Minute)
		before := connects()
		time.Sleep(time.Minute)
		if n := connects() - before; n < 11 || n > 25 {
			t.Errorf("%d times in a minute", n)
		}
		s.set(func() { down = false })
		within(t, maxBackoff, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(2 * steady)
		before = connects()
		s.revoke("cuts")
		within(t, 2*minBackoff, "it is tried again", func() bool { return connects() > before })
	})
}

// Heartbeats that take long to come do not make a state look fresh; the source can tell, if it is
// there.
func TestLateHeartbeats(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		var late atomic.Int64
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s, beat: func(b *Beat) bool {
			b.Time = b.Time.Add(-time.Duration(late.Load()) - time.Minute) // a minute is the clock's
			return true
		}}}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(10 * time.Second)
		if r.Age() > 2*time.Second {
			t.Errorf("it is %s old", r.Age())
		}
		const by = 40 * time.Second
		late.Store(int64(by))
		time.Sleep(time.Minute)
		if r.Age() > oldAge+2*pollEvery {
			t.Errorf("it is %s old, though the source can be asked", r.Age())
		}
		s.set(func() { s.broken = errDown })
		time.Sleep(30 * time.Second)
		if age := r.Age(); age < by-time.Second || age > by+2*time.Second {
			t.Errorf("it is %s old, want %s", age, by)
		}
		time.Sleep(time.Minute)
		if r.Age() > 2*time.Second {
			t.Errorf("it is %s old, though the clock was set minutes ago", r.Age())
		}
	})
}

var other = revocation.Tenant{ID: 2, Domain: "other.example"}

// An account that sees some tenants gets a part of the log.
func TestSomeTenants(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.tenants = []string{acme.Domain}
		s.revoke("before")
		s.revoke("others", other)
		seen := func(e revocation.Event) ([]revocation.Event, error) {
			if e.Tenant == other {
				return nil, nil
			}
			return []revocation.Event{e}, nil
		}
		cut := &wire{s: s, spoil: seen, name: "cut"}
		r, _ := start(t, Config{Source: s, Feeds: []Feed{cut}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		for i := range 30 {
			s.revoke(fmt.Sprint("others-", i), other)
			s.revoke(fmt.Sprint("ours-", i))
			s.change("created", application(int32(i+1), "ours"))
			synctest.Wait()
			if r.Check(tokenOf(fmt.Sprint("ours-", i))).Outcome != Revoked {
				t.Fatalf("ours-%d is not revoked", i)
			}
		}
		within(t, 2*time.Second, "a heartbeat moves the position", s.reachedBy(r))
		s.equal(t, r)
		if got := r.Status(); len(got.Tenants) != 1 || got.Snapshots != 1 || got.Age > 2*time.Second {
			t.Errorf("%+v", got)
		}
	})
}

// own is a source that is a feed too, of what its readers see.
type own struct {
	*service
	wire
}

func (o *own) Name() string { return "own" }

// An account may come to see more: what it did not see is loaded, once.
func TestAnotherTenant(t *testing.T) {
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprint("cut ", cut), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				s.tenants = []string{acme.Domain}
				s.revoke("unseen", other)
				down := false
				o := &own{s, wire{s: s, spoil: func(e revocation.Event) ([]revocation.Event, error) {
					s.mu.Lock()
					defer s.mu.Unlock()
					if cut && down {
						return nil, errDown
					}
					if !s.sees(e.Tenant.Domain) {
						return nil, nil
					}
					return []revocation.Event{e}, nil
				}}}
				r, _ := start(t, Config{Source: o})
				within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
				s.revoke("unseen too", other)
				time.Sleep(20 * time.Second)
				if got := r.Status(); len(got.Tenants) != 1 || got.Snapshots != 1 || got.Revocations != 0 {
					t.Errorf("%s: %+v", got, got.Tenants)
				}
				s.set(func() { s.tenants, down = append(s.tenants, other.Domain), true })
				s.revoke("seen", other)
				within(t, 10*time.Second, "what it sees now is there", func() bool { return len(r.Status().Tenants) == 2 })
				within(t, 10*time.Second, "it is at the head", s.reachedBy(r))
				s.equal(t, r)
				if got := r.Status(); got.Snapshots < 2 || got.Snapshots > 3 { // perhaps one as the feed began anew
					t.Errorf("%d snapshots", got.Snapshots)
				}
			})
		})
	}
}

// seen is a source that is a feed too, of the tenants that s has at each moment.
func seen(s *service) *own {
	return &own{s, wire{s: s, spoil: func(e revocation.Event) ([]revocation.Event, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.sees(e.Tenant.Domain) {
			return nil, nil
		}
		return []revocation.Event{e}, nil
	}}}
}

// othersToken is a token of the other tenant.
func othersToken(jti string) Token { return Token{Iss: iss, Tenant: other.Domain, JTI: jti} }

// What an account sees may change while nobody looks, without an event that shows it.
func TestScopeChangesWhileDown(t *testing.T) {
	for name, now := range map[string][]string{"all": nil, "another": {other.Domain}, "both": {acme.Domain, other.Domain}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				s.tenants = []string{acme.Domain}
				s.revoke("ours")
				s.revoke("others", other)
				cfg := Config{Source: seen(s), Folder: t.TempDir()}
				r, stop := start(t, cfg)
				within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
				time.Sleep(10 * time.Second)
				if d := r.Check(othersToken("others")); d.Outcome != Refused {
					t.Errorf("of a tenant that it knows nothing about: %+v", d)
				}
				stop()
				s.set(func() { s.tenants = now })
				r, _ = start(t, cfg)
				within(t, 2*time.Second, "what it sees now is there", func() bool { return slices.Equal(r.Status().Tenants, now) })
				within(t, 2*time.Second, "it is connected", func() bool { return r.connected(nil) })
				s.revoke("new", other)
				within(t, 3*time.Second, "it is at the head", s.reachedBy(r))
				for _, jti := range []string{"others", "new"} {
					if d := r.Check(othersToken(jti)); d.Outcome != Revoked {
						t.Errorf("%s: %+v", jti, d)
					}
				}
				if got := r.Status(); got.Snapshots > 2 || got.Age > 3*time.Second {
					t.Errorf("%+v", got)
				}
			})
		})
	}
}

// An account that does not see a tenant for a while misses its events, which nothing shows when it
// sees it again.
func TestScopeChangesForAWhile(t *testing.T) {
	for _, kind := range []string{"a feed of the source", "another feed", "no feed"} {
		t.Run(kind, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				s.tenants = []string{acme.Domain, other.Domain}
				s.revoke("ours")
				s.revoke("others", other)
				o := seen(s)
				cfg, patience := Config{Source: o}, scopeEveryBeside
				switch kind {
				case "another feed":
					cfg = Config{Source: s, Feeds: []Feed{o}}
				case "no feed":
					cfg, patience = Config{Source: s}, scopeEvery
				}
				r, _ := start(t, cfg)
				within(t, time.Second, "it is loaded", s.reachedBy(r))
				s.set(func() { s.tenants = []string{acme.Domain} })
				s.revoke("unseen", other)
				time.Sleep(5 * time.Second)
				s.set(func() { s.tenants = []string{acme.Domain, other.Domain} })
				within(t, patience+10*time.Second, "what it did not see is there", func() bool { return r.Check(othersToken("unseen")).Outcome == Revoked })
				if got := r.Status(); got.Snapshots > 4 || got.Age > 6*time.Second {
					t.Errorf("%+v", got)
				}
			})
		})
	}
}

// A folder of a replica that had a directory alone says nothing about the catalog.
func TestDirectoryNoMore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("one")
		s.change("created", application(1, "unseen by the directory"))
		cfg := Config{Source: &etcd{s}, Folder: t.TempDir()}
		r, stop := start(t, cfg)
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(10 * time.Second)
		stop()
		cfg.Source, cfg.Feeds = s, []Feed{&wire{s: s}}
		r, _ = start(t, cfg)
		within(t, time.Second, "the catalog is there", func() bool { return !r.Status().RevocationsOnly })
		s.equal(t, r)
	})
}

// A feed that was told of other tenants than the state is about tells nothing that is missing, and is
// not believed.
func TestFeedOfOtherTenants(t *testing.T) {
	for _, tenants := range [][]string{nil, {acme.Domain}, {acme.Domain, other.Domain}} {
		t.Run(fmt.Sprint(tenants), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				s.tenants = tenants
				s.revoke("before")
				w := &wire{s: s, spoil: func(e revocation.Event) ([]revocation.Event, error) {
					if e.Tenant == acme {
						return nil, nil
					}
					return []revocation.Event{e}, nil
				}, beat: func(b *Beat) bool {
					b.Tenants = []string{other.Domain}
					return true
				}}
				r, _ := start(t, Config{Source: s, Feeds: []Feed{w}})
				within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
				time.Sleep(5 * time.Second)
				for i := range 5 {
					s.revoke(fmt.Sprint("next-", i))
					within(t, partPatience+2*time.Second, "the source tells it", s.reachedBy(r))
					s.equal(t, r)
				}
			})
		})
	}
}

// noneAhead is a source that knows no position after its end.
type noneAhead struct{ *service }

func (a noneAhead) Events(ctx context.Context, after revocation.Position) (Page, error) {
	if head := a.head(); after.Epoch == head.Epoch && after.Seq > head.Seq {
		return Page{}, errors.New("the log ends before")
	}
	return a.service.Events(ctx, after)
}

// A log that was restored without a new epoch takes nothing back, what is revoked in it holds, also
// after a restart, and somebody is told.
func TestLogWentBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		for i := range 20 {
			s.revoke(fmt.Sprint("old-", i))
		}
		cfg := Config{Source: noneAhead{s}, Feeds: []Feed{&wire{s: s}, &wire{s: s}}, Folder: t.TempDir()}
		r, stop := start(t, cfg)
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(30 * time.Second)
		s.set(func() { s.log = s.log[:10:10] })
		synctest.Wait()
		for i := range 5 {
			s.revoke(fmt.Sprint("new-", i))
		}
		within(t, 20*time.Second, "it is told", func() bool { return strings.Contains(r.Status().Error, "ends at seq 15") })
		age := r.Age()
		time.Sleep(30 * time.Second)
		if now := r.Age(); now < age+30*time.Second {
			t.Errorf("it is %s old, and was %s", now, age)
		}
		check := func(r *Replica) {
			t.Helper()
			for jti, n := range map[string]int{"old": 20, "new": 5} {
				for i := range n {
					if d := r.Check(tokenOf(fmt.Sprint(jti, "-", i))); d.Outcome != Revoked {
						t.Errorf("%s-%d: %+v", jti, i, d)
					}
				}
			}
		}
		check(r)
		stop()
		again, err := New(cfg)
		must(t, err)
		check(again)
		must(t, again.Close())
		r, _ = start(t, cfg)
		s.restore(0, newEpoch)
		s.revoke("newer")
		within(t, 20*time.Second, "it is over", func() bool { return s.reachedBy(r)() && r.Status().Error == "" && r.Age() < 3*time.Second })
		check(r)
	})
}

// What is told again, late, is not written again.
func TestRepeatedRevocationIsNotKept(t *testing.T) {
	t.Parallel()
	s := newService(t)
	e := s.revoke("one")
	s.revoke("two")
	r, err := New(Config{Source: s, Folder: t.TempDir()})
	must(t, err)
	must(t, r.load(t.Context()))
	for range 3 {
		must(t, r.apply(e))
		r.revokeAhead(e)
	}
	if r.folder.length != 0 {
		t.Errorf("%d bytes", r.folder.length)
	}
	e.Data = revoke(Record{Target: ofJTI("one"), Tenant: acme, Exp: time.Now().Add(48 * time.Hour).Unix()}).Data // for longer
	must(t, r.apply(e))
	length := r.folder.length
	must(t, r.apply(e))
	if length == 0 || r.folder.length != length {
		t.Errorf("%d bytes, then %d", length, r.folder.length)
	}
	must(t, r.Close())
}

// A heartbeat about what the state was about must not move a state that was loaded since.
func TestThroughInAnotherScope(t *testing.T) {
	t.Parallel()
	s := NewState(StateConfig{})
	at := func(seq revocation.Seq) revocation.Position { return revocation.Position{Epoch: epoch, Seq: seq} }
	about := func(seq revocation.Seq, tenants ...string) {
		t.Helper()
		must(t, s.Load(at(seq), func(l *Loader) error { l.Tenants(tenants); return nil }))
	}
	ours := &scope{epoch: epoch, tenants: map[string]bool{acme.Domain: true}}
	about(1, acme.Domain)
	if !s.throughIn(at(3), ours) || !s.throughIn(at(2), ours) || s.At() != at(3) {
		t.Errorf("at %s", s.At())
	}
	if s.throughIn(revocation.Position{Epoch: newEpoch, Seq: 9}, ours) {
		t.Error("it went to another epoch")
	}
	about(4, acme.Domain, other.Domain)
	if s.throughIn(at(9), ours) || s.At() != at(4) {
		t.Errorf("of more tenants: at %s", s.At())
	}
	about(5)
	if s.throughIn(at(9), ours) || s.At() != at(5) {
		t.Errorf("of all: at %s", s.At())
	}
}

// A folder is a replica's until it was run or closed.
func TestClose(t *testing.T) {
	bubble(t, func(t *testing.T) {
		cfg := Config{Source: newService(t), Folder: t.TempDir()}
		r, err := New(cfg)
		must(t, err)
		if _, err := New(cfg); err == nil {
			t.Fatal("two share a folder")
		}
		must(t, r.Close())
		must(t, r.Close())
		if err := r.Run(t.Context()); err == nil {
			t.Error("it was run after it was closed")
		}
		r, stop := start(t, cfg)
		time.Sleep(time.Second)
		if err := r.Run(t.Context()); err == nil {
			t.Error("it was run twice")
		}
		must(t, r.Close())
		if _, err := New(cfg); err == nil {
			t.Error("Close took the folder from one that runs")
		}
		stop()
		must(t, r.Close())
		r, err = New(cfg)
		must(t, err)
		must(t, r.Close())
	})
}

// Of other tenants than the state's nothing is known, but that they are revoked.
func TestCheckOfOtherTenants(t *testing.T) { // not parallel: allocations are the process's
	s := newService(t)
	s.tenants = []string{acme.Domain}
	for _, empty := range []OnStale{Deny, Serve} {
		r, err := New(Config{Source: s, Empty: empty, Staleness: Staleness{Then: Serve}})
		must(t, err)
		want := map[OnStale]Outcome{Deny: Refused, Serve: Valid}[empty]
		if d := r.Check(othersToken("x")); d.Outcome != want {
			t.Errorf("nothing is known, %s: %s", empty, d.Outcome)
		}
		must(t, r.load(t.Context()))
		r.revoke(Record{Target: revocation.Target{Kind: revocation.KindTenant, ID: "gone.example"}, Exp: time.Now().Add(time.Hour).Unix(), NotAfter: time.Now().Unix()}, r.state.At())
		for token, want := range map[Token]Outcome{
			othersToken("x"):         Refused,
			tokenOf("x"):             Valid,
			{Iss: iss, JTI: "x"}:     Valid,
			{Tenant: "gone.example"}: Revoked,
		} {
			if d := r.Check(token); d.Outcome != want {
				t.Errorf("%+v: %s, want %s", token, d.Outcome, want)
			}
			if got := testing.AllocsPerRun(100, func() { r.Check(token) }); got != 0 {
				t.Errorf("%v allocations", got)
			}
		}
	}
}

// What was told before a feed was connected may be unknown to the source yet. A reader of some
// tenants, who cannot count, must not pass over it.
func TestSourceBehindFeed(t *testing.T) {
	for _, tenants := range [][]string{nil, {acme.Domain}} {
		t.Run(fmt.Sprint(tenants), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				s.tenants = tenants
				s.revoke("one")
				s.revoke("unseen") // before the feed is connected, and the source does not have it
				s.lag = 1
				r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s, beat: func(b *Beat) bool { b.Head = max(b.Seq, 1); return true }}}})
				within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
				time.Sleep(5 * time.Second)
				if at := r.state.At(); at.Seq != 1 || r.Age() < 4*time.Second {
					t.Fatalf("at %s, %s old, with a hole", at, r.Age())
				}
				s.set(func() { s.lag = 0 })
				within(t, 10*time.Second, "it comes", s.reachedBy(r))
				s.equal(t, r)
			})
		})
	}
}

// What a feed tells may be some moments ahead of the source, which is asked until it has what was before.
func TestGapBeforeSource(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		silent := &wire{s: s, spoil: lossy, beat: func(*Beat) bool { return false }}
		r, _ := start(t, Config{Source: s, Feeds: []Feed{silent}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		s.set(func() { s.lag = 2 })
		s.revoke("lost")
		s.revoke("told")
		time.Sleep(300 * time.Millisecond)
		s.set(func() { s.lag = 0 })
		within(t, time.Second, "the gap is closed", s.reachedBy(r))
		// A feed that tells of what is not there does not keep the source busy for ever.
		r.ask(goal{Position: revocation.Position{Epoch: s.epoch, Seq: 1 << 40}})
		time.Sleep(2 * time.Minute)
		_, before := s.asks()
		time.Sleep(time.Minute)
		if _, pages := s.asks(); pages-before > 30 || r.Status().Error != "" {
			t.Errorf("%d questions in a minute, %q", pages-before, r.Status().Error)
		}
	})
}

// A reader of some tenants notices a loss by the next event of the tenant, and believes no heartbeat
// until it is made good.
func TestLossOfSomeTenants(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.tenants = []string{acme.Domain}
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s, spoil: lossy}}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		s.revoke("one")
		within(t, 3*time.Second, "a heartbeat moves the position", s.reachedBy(r))
		s.set(func() { s.broken = errDown })
		before := s.head()
		s.revoke("lost")
		s.revoke("told")
		s.change("created", application(1, "told"))
		time.Sleep(20 * time.Second)
		if r.state.At() != before || r.Age() < 19*time.Second || r.Check(tokenOf("told")).Outcome != Revoked {
			t.Errorf("with a hole: at %s, %s old", r.state.At(), r.Age())
		}
		s.set(func() { s.broken = nil })
		within(t, 8*time.Second, "it is made good", s.reachedBy(r))
		s.equal(t, r)
		s.revoke("next")
		within(t, 3*time.Second, "heartbeats are believed again", s.reachedBy(r))
	})
}

// Where a position moves by heartbeats, a feed may begin after what it told since.
func TestWhereFeedsBegin(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.tenants = []string{acme.Domain}
		first := s.revoke("one").Position
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s, spoil: lossy}}})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(1100 * time.Millisecond) // a heartbeat
		second := s.revoke("two").Position
		synctest.Wait()
		if here, begin := r.state.At(), r.at(r.feeds[0]); here != first || begin != second {
			t.Errorf("at %s, the feed may begin at %s, want %s", here, begin, second)
		}
		s.set(func() { s.broken = errDown })
		s.revoke("lost")
		s.revoke("three")
		synctest.Wait()
		if begin := r.at(r.feeds[0]); begin != second {
			t.Errorf("with a hole after %s the feed may begin at %s", second, begin)
		}
	})
}

// etcd is a directory of revocations: a source that has snapshots only, and a feed that has no
// events.
type etcd struct{ *service }

func (d *etcd) Name() string { return "etcd" }

func (d *etcd) Load(ctx context.Context, to *State) error {
	if err := d.asked(ctx, &d.loads); err != nil {
		return err
	}
	d.mu.Lock()
	at, m := revocation.Position{Epoch: d.epoch, Seq: revocation.Seq(len(d.log))}, d.stateAt(len(d.log))
	d.mu.Unlock()
	return to.Load(at, func(l *Loader) error {
		l.RevocationsOnly()
		for _, rec := range m.revoked {
			l.Revocation(rec)
		}
		return nil
	})
}

func (d *etcd) Events(context.Context, revocation.Position) (Page, error) { return Page{}, ErrGone }

func (d *etcd) Follow(ctx context.Context, _ func() revocation.Position, to Receiver) error {
	w := &wire{s: d.service}
	return w.Follow(ctx, nil, &asDirectory{to})
}

// asDirectory tells a receiver what a directory can.
type asDirectory struct{ Receiver }

func (a *asDirectory) Event(_ context.Context, e revocation.Event) error {
	if rev, err := e.Revocation(); err == nil {
		a.Revoked(Record{Target: rev.Target, Tenant: rev.Tenant, Exp: rev.Exp}, e.Position)
	}
	return nil
}

func (a *asDirectory) Heartbeat(ctx context.Context, b Beat) error {
	b.RevocationsOnly = true
	return a.Receiver.Heartbeat(ctx, b)
}

func TestDirectory(t *testing.T) {
	t.Run("alone", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			d := &etcd{newService(t)}
			d.revoke("one")
			r, _ := start(t, Config{Source: d})
			within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
			for i := range 50 {
				d.change("created", application(int32(i+1), "unseen"))
				d.revoke(fmt.Sprint("next-", i))
				synctest.Wait()
				if r.Check(tokenOf(fmt.Sprint("next-", i))).Outcome != Revoked {
					t.Fatalf("next-%d is not revoked", i)
				}
				time.Sleep(time.Second)
			}
			within(t, 2*time.Second, "a heartbeat moves the position", d.reachedBy(r))
			if got := r.Status(); !got.RevocationsOnly || got.Snapshots > 2 || got.Age > 2*time.Second || got.Entities != 0 || got.Revocations != 51 {
				t.Errorf("%+v", got)
			}
		})
	})
	// What a directory says of the log is no word about the catalog.
	for _, tenants := range [][]string{nil, {acme.Domain}} {
		t.Run(fmt.Sprint("beside a source of ", tenants), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				s.tenants = tenants
				s.revoke("one")
				r, _ := start(t, Config{Source: s, Feeds: []Feed{&etcd{s}}})
				within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
				for i := range 10 {
					s.change("created", application(int32(i+1), "seen"))
					s.revoke(fmt.Sprint("next-", i))
					synctest.Wait()
					if r.Check(tokenOf(fmt.Sprint("next-", i))).Outcome != Revoked {
						t.Fatalf("next-%d is not revoked", i)
					}
					within(t, 10*time.Second, "the source tells the rest", s.reachedBy(r))
					s.equal(t, r)
				}
			})
		})
	}
}

// With everything down but the disk, and the clock of the wall.
func TestRestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		cfg := Config{Source: s, Feeds: []Feed{&wire{s: s}}, Folder: filepath.Join(t.TempDir(), "replica"), Staleness: Staleness{Max: time.Minute}}
		s.revoke("first")
		r, stop := start(t, cfg)
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(5 * time.Second)
		s.revoke("journalled")
		s.change("created", application(1, "journalled"))
		within(t, time.Second, "it is told", s.reachedBy(r))
		time.Sleep(5 * time.Second)
		if got := r.Status(); got.Error != "" {
			t.Fatalf("%+v", got)
		}
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), cfg.Folder) {
			t.Errorf("two replicas share a folder: %v", err)
		}
		stop()

		s.set(func() { s.broken = errDown })
		time.Sleep(20 * time.Second)
		cfg.Feeds = []Feed{&wire{s: s, refuse: func() error { return errDown }}}
		r, stop = start(t, cfg)
		if got := r.Status(); got.From != "folder" || got.Position != s.head() || !got.Ready || got.Age < 20*time.Second || got.Age > 25*time.Second {
			t.Fatalf("%+v", got)
		}
		s.equal(t, r)
		if d := r.Check(tokenOf("journalled")); d.Outcome != Revoked {
			t.Errorf("%+v", d)
		}
		if d := r.Check(tokenOf("x")); d.Outcome != Valid {
			t.Errorf("%+v", d)
		}
		time.Sleep(time.Minute)
		if d := r.Check(tokenOf("x")); d.Outcome != Refused || r.Ready() {
			t.Errorf("%+v", d)
		}
		s.revoke("after")
		s.set(func() { s.broken = nil })
		within(t, 10*time.Second, "it catches up", s.reachedBy(r))
		if d := r.Check(tokenOf("x")); d.Outcome != Valid {
			t.Errorf("%+v", d)
		}
		if got := r.Status(); got.Snapshots != 0 || got.Deltas != 1 || got.Error != "" {
			t.Errorf("%+v", got)
		}
		stop()
		s.equal(t, r)
	})
}

// A journal does not grow for ever.
func TestFolderIsRenewed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		cfg := Config{Source: s, Feeds: []Feed{&wire{s: s}}, Folder: t.TempDir()}
		r, stop := start(t, cfg)
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(5 * time.Second)
		snapshots := func() []string {
			all, err := filepath.Glob(filepath.Join(cfg.Folder, snapshotPrefix+"*"))
			must(t, err)
			return all
		}
		before := snapshots()
		for i := range 120 {
			s.change("updated", application(1, fmt.Sprint(i, strings.Repeat("x", 40_000))))
		}
		within(t, 10*time.Second, "another snapshot is there", func() bool { return !slices.Equal(before, snapshots()) })
		stop()
		r, err := New(cfg)
		must(t, err)
		s.equal(t, r)
		must(t, r.folder.close())
	})
}

// A folder that cannot be written to stops nobody, is told, and has everything once it can.
func TestFolderFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		cfg := Config{Source: s, Feeds: []Feed{&wire{s: s}}, Folder: t.TempDir()}
		r, stop := start(t, cfg)
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(5 * time.Second)
		full := errors.New("no space left on device")
		var mu sync.Mutex
		broken := true
		disk := r.folder.disk
		fails := func() error {
			mu.Lock()
			defer mu.Unlock()
			if broken {
				return full
			}
			return nil
		}
		r.keeping.Lock()
		r.folder.disk.write = func(f *os.File, b []byte, at int64) error { return cmp.Or(fails(), disk.write(f, b, at)) }
		r.folder.disk.create = func(name string) (*os.File, error) {
			if err := fails(); err != nil {
				return nil, err
			}
			return disk.create(name)
		}
		r.keeping.Unlock()
		s.revoke("unwritten")
		synctest.Wait()
		if d := r.Check(tokenOf("unwritten")); d.Outcome != Revoked {
			t.Errorf("%+v", d)
		}
		time.Sleep(time.Minute)
		if got := r.Status(); !strings.Contains(got.Error, full.Error()) || !got.Ready || got.Age > 2*time.Second {
			t.Errorf("%+v", got)
		}
		mu.Lock()
		broken = false
		mu.Unlock()
		s.revoke("written")
		within(t, 3*time.Minute, "the error is over", func() bool { return r.Status().Error == "" })
		time.Sleep(5 * time.Second)
		stop()
		s.broken = errDown
		r, err := New(cfg)
		must(t, err)
		for _, jti := range []string{"unwritten", "written"} {
			if d := r.Check(tokenOf(jti)); d.Outcome != Revoked {
				t.Errorf("%s: %+v", jti, d)
			}
		}
		if r.state.At() != s.head() || r.Age() > 15*time.Second {
			t.Errorf("at %s, want %s; %s old", r.state.At(), s.head(), r.Age())
		}
		must(t, r.folder.close())
	})
}

func TestStaleness(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("revoked")
		var silent atomic.Bool
		feed := &wire{s: s, beat: func(*Beat) bool { return !silent.Load() }}
		r, _ := start(t, Config{
			Source: s, Feeds: []Feed{feed}, Staleness: Staleness{Max: time.Minute, Then: Introspect},
			Routes: []Route{
				{"/payments", Staleness{30 * time.Second, Deny}},
				{"/account", Staleness{30 * time.Second, Introspect}},
				{"/catalog", Staleness{30 * time.Second, Serve}},
				{"/catalog/prices/", Staleness{10 * time.Second, Deny}},
			},
		})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) })
		time.Sleep(5 * time.Second)
		check := func(want map[string]Outcome) {
			t.Helper()
			for path, outcome := range want {
				if d := r.CheckWith(tokenOf("x"), r.StalenessOf(path)); d.Outcome != outcome {
					t.Errorf("%s old: %s: %s, want %s", r.Age(), path, d.Outcome, outcome)
				}
				if d := r.CheckWith(tokenOf("revoked"), r.StalenessOf(path)); d.Outcome != Revoked {
					t.Errorf("%s old: %s: %s of what is revoked", r.Age(), path, d.Outcome)
				}
			}
		}
		check(map[string]Outcome{"/payments": Valid, "/account": Valid, "/catalog": Valid, "/catalog/prices": Valid, "/": Valid, "": Valid})
		s.set(func() { s.broken = errDown })
		silent.Store(true)
		time.Sleep(35 * time.Second)
		check(map[string]Outcome{
			"/payments": Refused, "/payments/": Refused, "/payments/1": Refused, "/payments-old": Valid, "/Payments": Valid, "/account": Ask,
			"/catalog": Valid, "/catalog/x/y": Valid, "/catalog/prices": Refused, "/catalog/prices/1": Refused, "/catalog/pricesx": Valid, "/": Valid,
		})
		time.Sleep(30 * time.Second)
		check(map[string]Outcome{"/payments": Refused, "/account": Ask, "/catalog": Valid, "/payments-old": Ask, "/": Ask, "": Ask})
		if d := r.CheckWith(tokenOf("x"), Staleness{}); d.Outcome != Valid {
			t.Errorf("the zero value: %s, want 300 s", d.Outcome)
		}
		if !r.Ready() {
			t.Error("it is not ready, though some paths are served")
		}
	})
}

func TestReplicaCheckAllocatesNothing(t *testing.T) { // not parallel: allocations are the process's
	r, err := New(Config{Source: newService(t), Routes: []Route{{Path: "/payments"}}})
	must(t, err)
	load(t, r.state, revocation.Position{Epoch: epoch})
	r.age.freshen(r.now())
	if got := testing.AllocsPerRun(100, func() { r.CheckWith(tokenOf("x"), r.StalenessOf("/payments/1")) }); got != 0 {
		t.Errorf("%v allocations", got)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	s := newService(t)
	_, err := New(Config{
		Feeds: []Feed{nil}, Staleness: Staleness{Max: time.Millisecond, Then: 7}, Empty: Introspect, Claims: 9, Environments: []string{""},
		Routes: []Route{{Path: "payments"}, {Path: "/a", Staleness: Staleness{Max: 25 * time.Hour}}, {Path: "/a/"}, {Path: "/a/../b"}, {}},
	})
	if err == nil {
		t.Fatal("it was accepted")
	}
	for _, want := range []string{
		"configure replica: ", "Source is nil", "Feeds[0] is nil", "Staleness.Max is 1ms, must be 1s to 24h0m0s", "Staleness.Then is OnStale(7)",
		`Routes[0].Path is "payments"`, "Routes[1].Max is 25h0m0s", `Routes[2].Path is "/a", which another`, `Routes[3].Path is "/a/../b"`,
		`Routes[4].Path is ""`, "Empty is introspect", "Claims is 9", "Environments[0] is empty",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("it does not say %q:\n%v", want, err)
		}
	}
	r, err := New(Config{Source: s})
	must(t, err)
	if got := r.StalenessOf("/x"); got != (Staleness{300 * time.Second, Deny}) {
		t.Errorf("the default is %+v", got)
	}
	if len(r.feeds) != 0 {
		t.Errorf("%d feeds of a source that is none", len(r.feeds))
	}
	d := &etcd{s}
	if r, err = New(Config{Source: d}); err != nil || len(r.feeds) != 1 || !r.feeds[0].isSource {
		t.Errorf("a source that is a feed: %v", err)
	}
}

func TestOnStaleText(t *testing.T) {
	t.Parallel()
	for o, text := range map[OnStale]string{Deny: "deny", Serve: "serve", Introspect: "introspect"} {
		b, err := o.MarshalText()
		if string(b) != text || err != nil || o.String() != text {
			t.Errorf("%d: %q, %v", o, b, err)
		}
		var back OnStale
		if err := back.UnmarshalText(b); err != nil || back != o {
			t.Errorf("%s: %s, %v", text, back, err)
		}
	}
	var o OnStale
	if err := o.UnmarshalText([]byte("Deny")); err == nil || !strings.Contains(err.Error(), `"Deny" must be one of deny, serve, introspect`) {
		t.Error(err)
	}
	if _, err := OnStale(3).MarshalText(); err == nil {
		t.Error("OnStale(3) has a text")
	}
}

// A replica ends whatever it is doing.
func TestRunEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("one")
		for i := range 10 {
			s.set(func() { s.hangs = i%3 == 2 })
			_, stop := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}, &wire{s: s}}, Folder: t.TempDir()})
			time.Sleep(time.Duration(i*i) * 7 * time.Millisecond)
			stop()
		}
	})
}

// Whatever happens to feeds and source, what was revoked here once is never valid again, and when
// all is over the state is that of the service.
func TestHostileWorld(t *testing.T) {
	for seed := range uint64(size(5, 15)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			bubble(t, func(t *testing.T) { hostileWorld(t, rand.New(rand.NewPCG(seed, 5))) })
		})
	}
}

func hostileWorld(t *testing.T, world *rand.Rand) {
	s := newService(t)
	scoped := world.IntN(3) == 0
	if scoped {
		s.tenants = []string{acme.Domain}
	}
	var mu sync.Mutex
	calm := false
	roll := func(n int) bool {
		mu.Lock()
		defer mu.Unlock()
		return !calm && world.IntN(n) == 0
	}
	// A feed of some tenants that loses an event without being cut off breaks its promise: its
	// readers cannot count.
	spoiler := func() func(e revocation.Event) ([]revocation.Event, error) {
		var kept []revocation.Event
		return func(e revocation.Event) ([]revocation.Event, error) {
			if scoped && e.Tenant == other {
				return nil, nil
			}
			told := append(slices.Clone(kept), e)
			kept = nil
			switch {
			case roll(25):
				return nil, errDown
			case roll(8):
				time.Sleep(time.Duration(rand.N(3000)) * time.Millisecond)
			case roll(8):
				told = append(told, e)
			case scoped:
			case roll(10):
				return nil, nil // lost
			case roll(8):
				kept, told = told, nil // later, perhaps
			case roll(8):
				slices.Reverse(told)
			}
			return told, nil
		}
	}
	cfg := Config{
		Source: s, Folder: t.TempDir(),
		Feeds: []Feed{
			&wire{s: s, name: "a", spoil: spoiler(), beat: func(*Beat) bool { return !roll(5) }, refuse: func() error {
				if roll(3) {
					return errDown
				}
				return nil
			}},
			&wire{s: s, name: "b", spoil: spoiler()},
		},
	}
	if !scoped && world.IntN(2) == 0 {
		cfg.Feeds = append(cfg.Feeds, &etcd{s})
	}
	r, stop := start(t, cfg)

	// The check goes on across restarts: what one replica has refused its successor refuses.
	current := make(chan struct{}, 1) // a lock that lets time pass
	revoked, tokens := make(map[string]bool), 0
	checking, checked := context.WithCancel(t.Context())
	var checker sync.WaitGroup
	defer checker.Wait()
	defer checked()
	check := func() {
		current <- struct{}{}
		defer func() { <-current }()
		for i := range tokens {
			jti := fmt.Sprint("t-", i)
			now := r.Check(tokenOf(jti)).Outcome == Revoked
			if revoked[jti] && !now {
				t.Errorf("%s was revoked, and is not any more, at %s", jti, r.state.At())
			}
			revoked[jti] = now
		}
	}
	checker.Go(func() {
		for checking.Err() == nil {
			check()
			time.Sleep(3 * time.Millisecond)
		}
	})

	epochs := 0
	for range 100 {
		switch n := rand.N(100); {
		case n < 50:
			current <- struct{}{}
			jti := fmt.Sprint("t-", tokens)
			tokens++
			<-current
			s.revoke(jti, []revocation.Tenant{acme, other}[rand.N(2)])
		case n < 60:
			s.change("updated", application(int32(1+rand.N(5)), fmt.Sprint(rand.N(1000))))
		case n < 63:
			s.change("deleted", application(int32(1+rand.N(5)), ""))
		case n < 68:
			s.set(func() { s.broken = errDown })
		case n < 72:
			s.set(func() { s.lag = min(rand.N(5), len(s.log)-int(s.gone)) })
		case n < 82:
			s.set(func() { s.broken, s.lag = nil, 0 })
		case n < 84:
			s.set(func() { s.gone = revocation.Seq(len(s.log) - s.lag) })
		case n < 86 && epochs < 2:
			epochs++
			s.set(func() { s.lag = 0 })
			s.restore(rand.N(min(4, len(s.log)-int(s.gone)+1)), revocation.Epoch(fmt.Sprintf("00000000-0000-4000-8000-%012d", epochs)))
		case n < 90:
			current <- struct{}{} // a restart, of which no check is to see a half
			stop()
			r, stop = start(t, cfg)
			<-current
		default:
			time.Sleep(time.Duration(rand.N(2000)) * time.Millisecond)
		}
		time.Sleep(time.Duration(rand.N(100)) * time.Millisecond)
	}
	mu.Lock()
	calm = true
	mu.Unlock()
	s.set(func() { s.broken, s.lag = nil, 0 })
	within(t, 2*time.Minute, "it is healed", func() bool { return s.reachedBy(r)() && r.Age() < 5*time.Second })
	s.equal(t, r)
	check()
}
