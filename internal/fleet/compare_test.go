package fleet

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// fakeState has a digest that is made of the position alone.
type fakeState struct {
	mu   sync.Mutex
	at   revocation.Position
	made map[int64]int // by cutoff
}

func (s *fakeState) At() revocation.Position { s.mu.Lock(); defer s.mu.Unlock(); return s.at }
func (s *fakeState) Digests(context.Context, int64) (*replica.Digests, error) {
	panic("makeDigests takes its place")
}

type fakeDigests struct {
	s      *fakeState
	cutoff int64
}

func (d fakeDigests) At(p revocation.Position, scope replica.DigestScope) (replica.Digest, error) {
	switch now := d.s.At(); {
	case p.Epoch != now.Epoch:
		return replica.Digest{}, replica.ErrForgotten
	case p.Seq > now.Seq:
		return replica.Digest{}, replica.ErrNotYet
	}
	return honest(p, d.cutoff, scope.Sees == nil || scope.Sees("b.example")), nil
}

func honest(p revocation.Position, cutoff int64, b bool) replica.Digest {
	d := replica.Digest{Position: p, Cutoff: cutoff, Count: int(p.Seq)}
	d.Revocations[0] = byte(p.Seq)
	if b {
		d.Revocations[1]++
	}
	return d
}

func TestDivergedIsFound(t *testing.T) {
	t.Parallel()
	state := &fakeState{at: at(10), made: make(map[int64]int)}
	f, err := New(Config{ReportEvery: 100 * time.Millisecond, Lease: 10 * time.Second}, pgtest.New(t), state, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f.makeDigests = func(_ context.Context, cutoff int64) (digests, error) {
		state.mu.Lock()
		defer state.mu.Unlock()
		state.made[cutoff]++
		return fakeDigests{state, cutoff}, nil
	}
	run(t, f)
	digest := func(n *node, p revocation.Position, lies int) {
		n.digest = func(r replica.DigestRequest) *replica.Digest {
			d := honest(p, r.Cutoff, len(n.base.Tenants) == 0)
			if lies > 0 {
				lies--
				d.Count--
				d.Revocations[0]--
			}
			return &d
		}
	}
	well, other, bad, chance, ahead, strange := newNode(t, "well", gw1, at(9)), newNode(t, "well-b", gw2, at(9)),
		newNode(t, "bad", gw1, at(10)), newNode(t, "chance", gw1, at(10)), newNode(t, "ahead", gw1, at(11)), newNode(t, "strange", gw1, at(11))
	well.base.Tenants = []string{"carbon.super"} // another's is not in its digest
	digest(well, at(9), 0)
	digest(other, at(9), 0)
	digest(bad, at(10), 2)
	digest(chance, at(10), 1)
	digest(ahead, at(11), 0)
	digest(strange, revocation.Position{Epoch: "9b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: 3}, 0)
	for _, n := range []*node{well, other, bad, chance, ahead, strange} {
		n.run(f)
	}
	cutoff := time.Now().Unix() / 60 * 60
	if err := f.AskDigests(t.Context(), replica.DigestRequest{Cutoff: cutoff}); err != nil {
		t.Fatal(err)
	}
	await(t, f, "the first verdicts", func() bool {
		g, _ := f.Gateway("bad")
		c, _ := f.Gateway("chance")
		s, _ := f.Gateway("strange")
		return g.Comparison.Verdict == Diverged && c.Comparison.Verdict == Equal && s.Comparison.Detail != ""
	})
	if g, _ := f.Gateway("ahead"); g.Comparison.Verdict != Unknown {
		t.Errorf("one that is ahead of this process is %s", g.Comparison.Verdict)
	}
	state.mu.Lock()
	state.at = at(11)
	state.mu.Unlock()
	await(t, f, "the one that is ahead is compared", func() bool { g, _ := f.Gateway("ahead"); return g.Comparison.Verdict == Equal })
	got := make(map[string]Verdict)
	for _, g := range f.Gateways() {
		got[g.ID] = g.Comparison.Verdict
	}
	want := map[string]Verdict{"well": Equal, "well-b": Equal, "bad": Diverged, "chance": Equal, "ahead": Equal, "strange": Unknown}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("verdicts (-want +got)\n%s", diff)
	}
	g, _ := f.Gateway("bad")
	const detail = "At 3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10:10 it holds 9 revocations where the log has 10."
	if g.Comparison.Detail != detail || g.Comparison.At != at(10) {
		t.Errorf("got %q at %s", g.Comparison.Detail, g.Comparison.At)
	}
	await(t, f, "it is told to load a snapshot", func() bool { bad.mu.Lock(); defer bad.mu.Unlock(); return len(bad.loads) == 1 })
	// What was loaded put it right.
	if err := f.AskDigests(t.Context(), replica.DigestRequest{Cutoff: cutoff, After: at(11)}); err != nil {
		t.Fatal(err)
	}
	bad.mu.Lock()
	digest(bad, at(11), 0)
	bad.mu.Unlock()
	await(t, f, "it is equal again", func() bool {
		_ = f.AskDigests(t.Context(), replica.DigestRequest{Cutoff: cutoff + 60, After: at(11)})
		g, _ := f.Gateway("bad")
		return g.Comparison.Verdict == Equal
	})
	state.mu.Lock()
	defer state.mu.Unlock()
	for cutoff, n := range state.made {
		if n != 1 {
			t.Errorf("the log's digests of %d were made %d times", cutoff, n)
		}
	}
}

// With states as they are: one gateway lacks a revocation of its tenant, another one holds another tenant
// only and cannot know of it.
func TestDivergedState(t *testing.T) {
	t.Parallel()
	cutoff := time.Now().Unix() / 60 * 60
	stateOf := func(cfg replica.StateConfig, domain string, jtis ...string) *replica.State {
		s := replica.NewState(cfg)
		err := s.Load(at(10), func(l *replica.Loader) error {
			for _, jti := range jtis {
				tenant := revocation.Tenant{ID: -1234, Domain: "carbon.super"}
				if jti[0] == 'b' {
					tenant = revocation.Tenant{ID: 2, Domain: "b.example"}
				}
				if domain == "" || domain == tenant.Domain {
					l.Revocation(replica.Record{
						Target: revocation.Target{Kind: revocation.KindToken, Iss: "https://km/" + tenant.Domain, ID: jti},
						Tenant: tenant, Exp: cutoff + 3600,
					})
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	log := stateOf(replica.StateConfig{Records: true, History: 64}, "", "a1", "a2", "b1", "b2")
	f, _ := start(t, pgtest.New(t), Config{ReportEvery: 100 * time.Millisecond, Lease: 10 * time.Second}, log)
	nodeOf := func(id string, by authn.Account, s *replica.State, tenants ...string) {
		n := newNode(t, id, by, at(10))
		n.base.Tenants = tenants
		n.digest = func(r replica.DigestRequest) *replica.Digest {
			d, err := s.Digest(context.Background(), r.Cutoff, r.After)
			if err != nil {
				t.Error(err)
			}
			return &d
		}
		n.run(f)
	}
	nodeOf("super", gw1, stateOf(replica.StateConfig{}, "carbon.super", "a1", "a2"), "carbon.super", "a.example")
	nodeOf("b-all", gw2, stateOf(replica.StateConfig{}, "", "a1", "a2", "b1", "b2")) // as one that follows etcd
	nodeOf("b-well", gw2, stateOf(replica.StateConfig{}, "b.example", "b1", "b2"), "b.example")
	nodeOf("b-lacks", gw2, stateOf(replica.StateConfig{}, "b.example", "b1"), "b.example")
	if err := f.AskDigests(t.Context(), replica.DigestRequest{Cutoff: cutoff}); err != nil {
		t.Fatal(err)
	}
	want := map[string]Verdict{"super": Equal, "b-all": Equal, "b-well": Equal, "b-lacks": Diverged}
	await(t, f, "the verdicts", func() bool {
		got := make(map[string]Verdict)
		for _, g := range f.Gateways() {
			got[g.ID] = g.Comparison.Verdict
		}
		return cmp.Equal(want, got)
	})
}

func TestDigestsAcrossProcesses(t *testing.T) {
	t.Parallel()
	pool := pgtest.New(t)
	f, _ := start(t, pool, Config{ReportEvery: time.Minute, Lease: 3 * time.Minute}, nil)
	watcher, _ := start(t, pool, Config{Observe: true}, nil)
	n := newNode(t, "edge", gw1, at(5))
	n.digest = func(r replica.DigestRequest) *replica.Digest { d := honest(at(5), r.Cutoff, false); return &d }
	n.run(f)
	want := replica.DigestRequest{Cutoff: time.Now().Unix() / 60 * 60, After: at(4)}
	await(t, watcher, "the digest", func() bool {
		if err := watcher.AskDigests(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		g, _ := watcher.Gateway("edge")
		return g.Report.Digest != nil
	})
	if err := watcher.AskLoad(t.Context(), []string{"edge"}); err != nil {
		t.Fatal(err)
	}
	await(t, f, "the load", func() bool { n.mu.Lock(); defer n.mu.Unlock(); return len(n.loads) == 1 })
	n.mu.Lock()
	defer n.mu.Unlock()
	if diff := cmp.Diff([]replica.DigestRequest{want}, n.requests); diff != "" {
		t.Errorf("requests (-want +got)\n%s", diff)
	}
}
