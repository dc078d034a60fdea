package sink

import (
	"context"
	"fmt"
	"maps"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/rescindhq/rescind/api/revocation"
)

const (
	// etcdBucket is the step of leases' ends, in seconds.
	etcdBucket = 60
	// etcdLeaseSlack is what reading a lease's remaining time back may lose to
	// rounding and to the way there, in seconds: a sound lease never looks short.
	etcdLeaseSlack = 3
	// etcdMaxTTL is etcd's bound on a lease, in seconds.
	etcdMaxTTL = 9_000_000_000
	// etcdGrants is how many leases are asked for at a time.
	etcdGrants = 16

	etcdLeeway = int64(revocation.MaxLeeway / time.Second)
)

// etcdNeededUntil is how long the entry of a token that ends at exp must be there,
// in Unix seconds.
func etcdNeededUntil(exp int64) int64 {
	return min(exp, 1<<53) + etcdLeeway
}

// etcdDead reports whether no gateway accepts a token that ends at exp any more.
func etcdDead(exp int64, now time.Time) bool {
	return etcdNeededUntil(exp) <= now.Unix()
}

// etcdLeaseEnd is the end of the lease for exp, in Unix seconds: rounded up to a
// bucket, so that entries can share leases, and never down.
func etcdLeaseEnd(exp int64) int64 {
	return (etcdNeededUntil(exp) + etcdBucket - 1) / etcdBucket * etcdBucket
}

// etcdLeaseTTL is how long a lease that is granted after now must last to reach
// end, in seconds.
func etcdLeaseTTL(end int64, now time.Time) int64 {
	return min(max(end-now.Unix(), 1)+etcdLeaseSlack, etcdMaxTTL)
}

// etcdLease is a lease of ours.
type etcdLease struct {
	id      clientv3.LeaseID
	granted time.Time // before it was asked for
	ttl     int64
	used    int // keys put on it
}

// etcdReaches reports whether a lease of ttl seconds that was granted age ago lasts
// until end. Its age is by the monotonic clock, as etcd counts; the wall clock may
// have been set since the grant.
func etcdReaches(end int64, now time.Time, ttl int64, age time.Duration) bool {
	return now.Add(time.Duration(ttl)*time.Second-age).Unix() >= end || ttl == etcdMaxTTL
}

// etcdLeases hands out the leases that one time of being the writer has granted.
type etcdLeases struct {
	perLease int
	open     map[int64]*etcdLease // by end: the one that still has room
	pruned   time.Time
}

func newEtcdLeases(perLease int) *etcdLeases {
	return &etcdLeases{perLease: perLease, open: make(map[int64]*etcdLease)}
}

// forget makes every later put use a new lease.
func (ls *etcdLeases) forget() { clear(ls.open) }

// room is how many more keys the open lease for end can take.
func (ls *etcdLeases) room(end int64, now time.Time) int {
	l := ls.open[end]
	if l == nil {
		return 0
	}
	if !etcdReaches(end, now, l.ttl, now.Sub(l.granted)) {
		delete(ls.open, end)
		return 0
	}
	return ls.perLease - l.used
}

// assign gives each put its lease, granting those that are missing at the same time.
func (ls *etcdLeases) assign(ctx context.Context, now time.Time, puts []*etcdPut,
	grant func(ctx context.Context, ttl int64) (clientv3.LeaseID, error),
) error {
	if now.Sub(ls.pruned) > time.Minute {
		maps.DeleteFunc(ls.open, func(end int64, _ *etcdLease) bool { return end <= now.Unix() })
		ls.pruned = now
	}
	need := make(map[int64]int)
	for _, p := range puts {
		need[etcdLeaseEnd(p.entry.Exp)]++
	}
	fresh := make(map[int64][]*etcdLease)
	var g errgroup.Group
	g.SetLimit(etcdGrants)
	for end, n := range need {
		for left := n - ls.room(end, now); left > 0; left -= ls.perLease {
			l := &etcdLease{granted: now, ttl: etcdLeaseTTL(end, now)}
			fresh[end] = append(fresh[end], l)
			g.Go(func() (err error) {
				l.id, err = grant(ctx, l.ttl)
				return err
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, p := range puts {
		end := etcdLeaseEnd(p.entry.Exp)
		l := ls.open[end]
		if l == nil || l.used == ls.perLease {
			l, fresh[end] = fresh[end][0], fresh[end][1:]
			ls.open[end] = l
		}
		l.used++
		p.lease = l.id
	}
	return nil
}

func (t *etcdTerm) grant(ctx context.Context, ttl int64) (clientv3.LeaseID, error) {
	resp, err := etcdCall(ctx, t.cfg.RequestTimeout, "grant etcd lease", func(ctx context.Context) (*clientv3.LeaseGrantResponse, error) {
		return t.client.Grant(ctx, ttl)
	})
	if err != nil {
		return 0, err
	}
	return resp.ID, nil
}

// etcdLeaseEnds reads when leases end, once for each. It is for one pass of the
// reconciler.
type etcdLeaseEnds map[clientv3.LeaseID]time.Time

// of returns a time at which the lease certainly still is there; the zero time if
// it is gone.
func (ends etcdLeaseEnds) of(ctx context.Context, t *etcdTerm, id clientv3.LeaseID) (time.Time, error) {
	if end, ok := ends[id]; ok || id == clientv3.NoLease {
		return end, nil
	}
	asked := time.Now()
	resp, err := etcdCall(ctx, t.cfg.RequestTimeout, fmt.Sprintf("read etcd lease %x", id),
		func(ctx context.Context) (*clientv3.LeaseTimeToLiveResponse, error) {
			return t.client.TimeToLive(ctx, id)
		})
	if err != nil {
		return time.Time{}, err
	}
	if resp.TTL > 0 {
		ends[id] = asked.Add(time.Duration(resp.TTL) * time.Second)
	} else {
		ends[id] = time.Time{}
	}
	return ends[id], nil
}
