package sink

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
)

func TestEtcdLeaseEnd(t *testing.T) {
	t.Parallel()
	tests := []struct{ exp, want int64 }{
		{exp: 0, want: 120},
		{exp: 1, want: 180},
		{exp: 59, want: 180},
		{exp: 60, want: 180},
		{exp: 61, want: 240},
		{exp: 1795260000, want: 1795260120},
		{exp: 1795260001, want: 1795260180},
		{exp: 1795260059, want: 1795260180},
		{exp: 1795260060, want: 1795260180},
	}
	for _, tt := range tests {
		if got := etcdLeaseEnd(tt.exp); got != tt.want {
			t.Errorf("lease for exp %d ends at %d, want %d", tt.exp, got, tt.want)
		}
	}
	for exp := int64(1795260000); exp < 1795260600; exp++ {
		if end := etcdLeaseEnd(exp); end < exp+120 || end >= exp+180 || end%60 != 0 {
			t.Errorf("lease for exp %d ends at %d, want the first full minute from exp + 120 on", exp, end)
		}
	}
	if end := etcdLeaseEnd(math.MaxInt64); end < 1<<53 {
		t.Errorf("the end for the greatest exp overflows to %d", end)
	}
}

func TestEtcdLeaseTTL(t *testing.T) {
	t.Parallel()
	const end = 1795260120
	tests := []struct {
		now  time.Time
		want int64
	}{
		{now: time.Unix(end-3600, 0), want: 3603},
		{now: time.Unix(end-3600, 1), want: 3603},
		{now: time.Unix(end-3601, 999_999_999), want: 3604},
		{now: time.Unix(end-1, 0), want: 4},
		{now: time.Unix(end, 0), want: 4},
		{now: time.Unix(end+9999, 0), want: 4},
		{now: time.Unix(end-20_000_000_000, 0), want: 9_000_000_000},
	}
	for _, tt := range tests {
		if got := etcdLeaseTTL(end, tt.now); got != tt.want {
			t.Errorf("TTL to %d at %d.%09d is %d, want %d", end, tt.now.Unix(), tt.now.Nanosecond(), got, tt.want)
		}
	}
}

func TestEtcdDead(t *testing.T) {
	t.Parallel()
	const exp = 1795260000
	tests := []struct {
		now  time.Time
		want bool
	}{
		{time.Unix(exp, 0), false},
		{time.Unix(exp+119, 999_999_999), false},
		{time.Unix(exp+120, 0), true},
		{time.Unix(exp+121, 0), true},
	}
	for _, tt := range tests {
		if got := etcdDead(exp, tt.now); got != tt.want {
			t.Errorf("dead at exp%+.9f: %t, want %t", tt.now.Sub(time.Unix(exp, 0)).Seconds(), got, tt.want)
		}
	}
}

// etcdTestGrants counts, and remembers what was asked for.
type etcdTestGrants struct {
	last atomic.Int64
	err  error
}

func (g *etcdTestGrants) grant(context.Context, int64) (clientv3.LeaseID, error) {
	return clientv3.LeaseID(g.last.Add(1)), g.err
}

func putsUntil(exp int64, n int) []*etcdPut {
	puts := make([]*etcdPut, n)
	for i := range puts {
		puts[i] = &etcdPut{entry: directory.Entry{Exp: exp}}
	}
	return puts
}

// byLease counts the keys of each lease.
func byLease(puts []*etcdPut) map[clientv3.LeaseID]int {
	n := make(map[clientv3.LeaseID]int)
	for _, p := range puts {
		n[p.lease]++
	}
	return n
}

func TestEtcdLeasesAreShared(t *testing.T) {
	t.Parallel()
	now := time.Now()
	exp := now.Unix()/60*60 + 3600
	var grants etcdTestGrants
	leases := newEtcdLeases(10)
	assign := func(puts []*etcdPut) map[clientv3.LeaseID]int {
		t.Helper()
		if err := leases.assign(t.Context(), now, puts, grants.grant); err != nil {
			t.Fatal(err)
		}
		return byLease(puts)
	}
	if got := assign(putsUntil(exp, 4)); len(got) != 1 || got[1] != 4 {
		t.Errorf("4 keys are on leases %v, want all on the first", got)
	}
	if got := assign(putsUntil(exp, 29)); got[1] != 6 || len(got) != 4 {
		t.Errorf("29 more keys are on leases %v, want 6 on the first and the rest on three more", got)
	}
	if got := assign(putsUntil(exp+60, 1)); got[5] != 1 {
		t.Errorf("a key of the next minute is on leases %v, want a new one", got)
	}
	both := append(putsUntil(exp, 3), putsUntil(exp-59, 2)...)
	if got := assign(both); grants.last.Load() != 5 || len(got) != 1 {
		t.Errorf("keys of one bucket are on leases %v after %d grants, want one of the 5 there are", got, grants.last.Load())
	}
	leases.forget()
	if got := assign(putsUntil(exp, 1)); got[6] != 1 {
		t.Errorf("after forget a key is on leases %v, want a new one", got)
	}
}

func TestEtcdLeaseCap(t *testing.T) {
	t.Parallel()
	var grants etcdTestGrants
	leases := newEtcdLeases(EtcdConfig{}.withDefaults().KeysPerLease)
	now := time.Now()
	var all []*etcdPut
	for _, n := range []int{1, 999, 1, 127, 5000, 2} {
		puts := putsUntil(now.Unix()+1, n)
		if err := leases.assign(t.Context(), now, puts, grants.grant); err != nil {
			t.Fatal(err)
		}
		all = append(all, puts...)
	}
	for id, n := range byLease(all) {
		if n > 1000 {
			t.Errorf("lease %d has %d keys, want at most 1000", id, n)
		}
	}
	if got := grants.last.Load(); got != 7 {
		t.Errorf("%d grants for 6130 keys, want 7", got)
	}
}

func TestEtcdReaches(t *testing.T) {
	t.Parallel()
	granted := time.Unix(1795260000, 999_999_999)
	end := granted.Unix() + 3600
	ttl := etcdLeaseTTL(end, granted)
	for age := time.Duration(0); age < time.Hour; age += 777 * time.Millisecond {
		if !etcdReaches(end, granted.Add(age), ttl, age) {
			t.Errorf("a lease does not reach its own end when it is %s old", age)
		}
	}
	// Our clock was an hour ahead at the grant and was then set right: the lease ends
	// too early for what comes later.
	if etcdReaches(end, granted.Add(-time.Hour), ttl, 0) {
		t.Error("a lease that ends an hour early is used")
	}
}

func TestEtcdGrantFails(t *testing.T) {
	t.Parallel()
	grants := etcdTestGrants{err: errors.New("no space")}
	leases := newEtcdLeases(10)
	err := leases.assign(t.Context(), time.Now(), putsUntil(time.Now().Unix(), 25), grants.grant)
	if !errors.Is(err, grants.err) {
		t.Errorf("err is %v, want %v", err, grants.err)
	}
	if len(leases.open) != 0 {
		t.Errorf("%d leases are in use after failed grants, want 0", len(leases.open))
	}
}

func TestEtcdLeasesOfThePastAreForgotten(t *testing.T) {
	t.Parallel()
	var grants etcdTestGrants
	leases := newEtcdLeases(10)
	now := time.Now()
	for i := range 100 {
		if err := leases.assign(t.Context(), now, putsUntil(now.Unix()+int64(60*i), 1), grants.grant); err != nil {
			t.Fatal(err)
		}
	}
	later := now.Add(50 * time.Minute)
	if err := leases.assign(t.Context(), later, putsUntil(later.Unix()+3600, 1), grants.grant); err != nil {
		t.Fatal(err)
	}
	if got := len(leases.open); got > 56 {
		t.Errorf("%d leases are kept, want no more than the 53 that have not ended", got)
	}
}

// Etcd refuses a request of more than 1.5 MiB.
func TestEtcdTransactionFits(t *testing.T) {
	t.Parallel()
	long := make([]rune, 127)
	for i := range long {
		long[i] = 'ü'
	}
	e := directory.Entry{
		Target: revocation.Target{Kind: revocation.KindSubject, Iss: fmt.Sprintf(`"%s"`, string(long[:126])), ID: string(long)},
		Exp:    math.MaxInt64, NotAfter: math.MaxInt64, Seq: math.MaxInt64, At: time.UnixMilli(math.MaxInt64),
	}
	if err := e.Target.Validate(); err != nil {
		t.Fatal(err)
	}
	const protocol = 64 // bytes around a put, more than there are
	each := len(directory.Key("/"+string(long), etcdTestSource, e.Target)) + len(e.Value()) + protocol
	if total := 512 * each; total > 1536<<10 {
		t.Errorf("512 of the longest entries take %d bytes, etcd accepts %d", total, 1536<<10)
	}
}
