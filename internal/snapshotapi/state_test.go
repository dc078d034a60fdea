package snapshotapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// The state that a snapshot says is the state folded from the events up to its seq,
// whatever happened.
func TestSnapshotIsTheFoldOfEvents(t *testing.T) {
	t.Parallel()
	for seed := range uint64(size(2, 4)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			s := serve(t, Config{})
			s.follower.live(rand.New(rand.NewPCG(seed, 1)), 1500)
			for user, tenant := range map[string]string{"admin": "", "pizza-admin": pizza.Domain} {
				want := s.fold(t, user)
				got := map[string]string{}
				lines := bytes.Lines(body(t, s.do(s.request("/v1/snapshots/all?limit=1", "user", user, "Accept", "application/x-ndjson"))))
				for line := range lines {
					var item struct {
						Kind string
						Seq  revocation.Seq
						Item json.RawMessage
					}
					if err := json.Unmarshal(line, &item); err != nil {
						t.Fatal(err)
					}
					if item.Kind == "all" {
						if item.Seq != s.follower.replica.At().Seq {
							t.Fatalf("snapshot is of %d", item.Seq)
						}
						continue
					}
					name, text := identify(t, item.Kind, item.Item)
					if _, twice := got[name]; twice {
						t.Errorf("%s is there twice", name)
					}
					got[name] = text
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("state of tenant %q (-events +snapshot):\n%s", tenant, diff)
				}
				if len(want) < 50 {
					t.Errorf("the state has %d entries only", len(want))
				}
			}
		})
	}
}

// identify returns a name for what item is about, and what both events and snapshots say
// of it.
func identify(t *testing.T, kind string, item []byte) (name, text string) {
	t.Helper()
	if kind != "revocation" {
		var e struct{ ID int32 }
		if err := json.Unmarshal(item, &e); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(kind, e.ID), string(item)
	}
	var r struct {
		Kind, Iss, JTI, Digest, Sub, SID, KID string
		ClientID                              string `json:"client_id"`
		Exp                                   int64
		NotAfter                              int64 `json:"not_after"`
		Tenant                                json.RawMessage
	}
	if err := json.Unmarshal(item, &r); err != nil {
		t.Fatal(err)
	}
	var tenant revocation.Tenant
	if json.Unmarshal(r.Tenant, &tenant) != nil { // a snapshot names it
		if err := json.Unmarshal(r.Tenant, &tenant.Domain); err != nil {
			t.Fatal(err)
		}
	}
	return strings.Join([]string{r.Kind, tenant.Domain, r.Iss, r.JTI, r.Digest, r.ClientID, r.Sub, r.SID, r.KID}, "|"), fmt.Sprint(r.Exp, " ", r.NotAfter)
}

// fold is the state as a reader of all events knows it.
func (s *served) fold(t *testing.T, user string) map[string]string {
	t.Helper()
	state := map[string]string{}
	for through := revocation.Seq(0); through < s.follower.replica.At().Seq; {
		answer := s.poll(t, after(int(through))+"&limit=700", "user", user)
		for _, raw := range answer.Events {
			e, err := revocation.ParseEvent(raw)
			if err != nil {
				t.Fatal(err)
			}
			noun, verb, _ := strings.Cut(e.Type, ".")
			name, text := identify(t, noun, e.Data)
			if state[name] = text; verb == string(catalog.Deleted) {
				delete(state, name)
			}
		}
		through = *answer.Through
	}
	return state
}

// live makes n random changes and revocations.
func (f *fakeFollower) live(rnd *rand.Rand, n int) {
	f.t.Helper()
	entities := map[string]catalog.Entity{}
	ends := map[revocation.Target]int64{}
	for i := range n {
		tenant := revocation.SuperTenant
		if rnd.IntN(2) == 0 {
			tenant = pizza
		}
		if rnd.IntN(3) == 0 {
			f.revokeSome(rnd, tenant, ends)
			continue
		}
		noun := catalog.Nouns[rnd.IntN(len(catalog.Nouns))]
		e := catalog.New(noun)
		id := int32(rnd.IntN(40) + 1)
		if tenant == pizza {
			id += 100
		}
		*e.Base() = catalog.Meta{ID: id, UUID: fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012d", id), Tenant: tenant, Timestamp: int64(i)}
		name := fmt.Sprintf("%s <&> \u2028 %d", noun, id)
		switch e := e.(type) {
		case *catalog.Tenant:
			e.DisplayName = fmt.Sprint(name, i)
		case *catalog.KeyManager:
			e.Name, e.Iss, e.Enabled = name, fmt.Sprint(iss, "/", id), rnd.IntN(2) == 0
			e.Properties = map[string]any{"n": float64(i), "list": []any{"a", nil, true}}
		case *catalog.Policy:
			e.Kind, e.Name, e.Quota = catalog.PolicySubscription, name, int64(i)
		case *catalog.Scope:
			e.Name, e.Description = name, fmt.Sprint(i)
		case *catalog.API:
			e.Name, e.Version, e.Context, e.Status = name, "1", fmt.Sprint("/", id), catalog.APIPublished
			e.Operations = []catalog.Operation{{Target: "/*", Verb: "GET", Scopes: []string{fmt.Sprint(i)}}}
		case *catalog.Application:
			e.Name, e.Owner, e.Attributes = name, "ann", map[string]string{"n": fmt.Sprint(i)}
		case *catalog.KeyMapping:
			e.ConsumerKey, e.Iss = name, iss
		case *catalog.Subscription:
			e.Application, e.API = catalog.Ref{ID: id, UUID: e.UUID}, catalog.Ref{ID: id, UUID: e.UUID}
			e.State, e.ApplicationBlocked = catalog.Blocked, rnd.IntN(2) == 0
		}
		key := fmt.Sprint(noun, id)
		verb := catalog.Created
		if entities[key] != nil {
			verb = catalog.Updated
			if rnd.IntN(3) == 0 {
				verb = catalog.Deleted
			}
		}
		if entities[key] = e; verb == catalog.Deleted {
			delete(entities, key)
		}
		f.change(catalog.Change{Verb: verb, Entity: e})
	}
}

func (f *fakeFollower) revokeSome(rnd *rand.Rand, tenant revocation.Tenant, ends map[revocation.Target]int64) {
	f.t.Helper()
	target := revocation.Target{
		Kind: revocation.Kinds[rnd.IntN(len(revocation.Kinds))], Iss: fmt.Sprint(iss, "/t/", tenant.Domain), ID: fmt.Sprint("x", rnd.IntN(20)),
	}
	switch {
	case target.Kind == revocation.KindTenant:
		target.Iss, target.ID = "", tenant.Domain
	case target.Kind == revocation.KindToken && rnd.IntN(2) == 0:
		target = revocation.DigestTarget(target.Iss, target.ID)
	}
	ends[target] += int64(rnd.IntN(1000) + 1) // a repeat is an event only if it ends later
	r := revocation.Revocation{
		ID: "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Target: target, Tenant: tenant, Exp: farAway + ends[target],
	}
	if target.Kind.HasTime() {
		r.NotAfter = 1795200400 + ends[target]
	}
	e, err := revocation.NewEvent(r)
	if err != nil {
		f.t.Fatal(err)
	}
	f.append(e)
}
