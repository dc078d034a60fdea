package sink

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/internal/relay"
)

// etcdStepTimeout bounds one step of the reconciler, for which a delivery may wait.
const etcdStepTimeout = 30 * time.Second

// page returns the entries of the next page of the state that are not over.
func (t *etcdTerm) page(ctx context.Context, after string) (puts []*etcdPut, last string, more bool, err error) {
	rows, err := t.state.Page(ctx, after, etcdPage)
	if err != nil || len(rows) == 0 {
		return nil, after, false, err
	}
	puts, err = t.putsOf(ctx, rows)
	return puts, rows[len(rows)-1].ID, len(rows) >= etcdPage, err
}

// putsOf makes entries of rows that were just read. They may be newer than the
// directory's seq says; the head, read after them, is no lower than the seq of any.
func (t *etcdTerm) putsOf(ctx context.Context, rows []directory.Stored) ([]*etcdPut, error) {
	head, err := t.head(ctx)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	puts := make([]*etcdPut, 0, len(rows))
	for _, s := range rows {
		if !etcdDead(s.Exp, now) {
			puts = append(puts, t.put(s, head))
		}
	}
	return puts, nil
}

// putAll writes entries without moving the stream key.
func (t *etcdTerm) putAll(ctx context.Context, puts []*etcdPut) error {
	batches := t.newBatches()
	for _, p := range puts {
		batches.add(p)
	}
	if err := t.leases.assign(ctx, time.Now(), batches.puts(), t.grant); err != nil {
		return err
	}
	for _, b := range batches.all {
		if _, err := t.commit(ctx, etcdPutOps(b)...); err != nil {
			return err
		}
	}
	return nil
}

// wrong returns those puts that would change the directory for the better.
func (t *etcdTerm) wrong(ctx context.Context, puts []*etcdPut, ends etcdLeaseEnds) ([]*etcdPut, error) {
	gets := make([]clientv3.Op, len(puts))
	for i, p := range puts {
		gets[i] = clientv3.OpGet(p.key)
	}
	found, err := t.read(ctx, gets)
	if err != nil {
		return nil, err
	}
	var wrong []*etcdPut
	for i, p := range puts {
		right := false
		if kvs := found[i].Kvs; len(kvs) > 0 {
			if right, err = t.sound(ctx, p, kvs[0], ends); err != nil {
				return nil, err
			}
		}
		if !right {
			wrong = append(wrong, p)
		}
	}
	return wrong, nil
}

// sound reports whether kv says what p would, and lasts as long as it has to. A
// seq below p's may be the right one, as the state does not know it; the time of
// the commit is news only and is not compared.
func (t *etcdTerm) sound(ctx context.Context, p *etcdPut, kv *mvccpb.KeyValue, ends etcdLeaseEnds) (bool, error) {
	e, err := directory.Parse(t.cfg.Prefix, t.cfg.Source, p.key, kv.Value)
	if err != nil || e.Target != p.entry.Target || e.Exp != p.entry.Exp || e.NotAfter != p.entry.NotAfter ||
		e.Seq < 1 || e.Seq > p.entry.Seq {
		return false, nil
	}
	end, err := ends.of(ctx, t, clientv3.LeaseID(kv.Lease))
	return end.Unix() >= etcdNeededUntil(e.Exp), err
}

// sweepPage removes what the state does not have from the next page of the walk,
// and returns how much of it had no place there, not counting what is merely over.
//
// Nothing that counts can be lost: the state is asked after the page was read, so
// it knows every event that the directory has, unless it was restored since,
// which the head then tells. A revocation that is committed meanwhile is put back
// by its event. What no event can have written is removed only if it is older
// than a repair of everything, which would have replaced it, and is still there.
func (t *etcdTerm) sweepPage(ctx context.Context, c *etcdCursor) (removed int, err error) {
	next := *c
	kvs, err := t.scan(ctx, &next)
	if err != nil {
		return 0, err
	}
	now := time.Now()
	var strange []*mvccpb.KeyValue
	var keys []string
	var entries []directory.Entry
	for _, kv := range kvs {
		e, err := directory.Parse(t.cfg.Prefix, t.cfg.Source, string(kv.Key), kv.Value)
		switch {
		case err == nil && kv.Lease != 0 && etcdDead(e.Exp-etcdBucket, now) && !etcdDead(e.Exp+2*etcdBucket, now):
			// Its end is near, or has just been: left to the lease. Clocks differ, and
			// the state may think it over before it is.
		case err == nil:
			entries, keys = append(entries, e), append(keys, string(kv.Key))
		case kv.ModRevision <= c.since:
			strange = append(strange, kv)
		}
	}
	foreign, err := t.unchanged(ctx, strange)
	if err != nil {
		return 0, err
	}
	stored, err := t.lookup(ctx, entries)
	if err != nil {
		return 0, err
	}
	if _, err := t.head(ctx); err != nil {
		return 0, err
	}
	removed = len(foreign)
	for i, e := range entries {
		if _, ok := stored[e.Target]; ok {
			continue
		}
		foreign = append(foreign, keys[i])
		if !etcdDead(e.Exp, now) {
			removed++
		}
	}
	for len(foreign) > 0 {
		n := min(len(foreign), t.cfg.MaxTxnOps)
		ops := make([]clientv3.Op, n)
		for i, key := range foreign[:n] {
			ops[i] = clientv3.OpDelete(key)
		}
		if _, err := t.commit(ctx, ops...); err != nil {
			return 0, err
		}
		foreign = foreign[n:]
	}
	*c = next
	return removed, nil
}

// unchanged returns the keys of those kvs that are still what they were when read.
func (t *etcdTerm) unchanged(ctx context.Context, kvs []*mvccpb.KeyValue) ([]string, error) {
	gets := make([]clientv3.Op, len(kvs))
	for i, kv := range kvs {
		gets[i] = clientv3.OpGet(string(kv.Key), clientv3.WithKeysOnly())
	}
	now, err := t.read(ctx, gets)
	if err != nil {
		return nil, err
	}
	var same []string
	for i, kv := range kvs {
		if found := now[i].Kvs; len(found) > 0 && found[0].ModRevision == kv.ModRevision {
			same = append(same, string(kv.Key))
		}
	}
	return same, nil
}

// startReconciler compares the directory with the state now and then, until halt
// or the end of t. After a build there is nothing to compare at first.
func (e *Etcd) startReconciler(ctx context.Context, t *etcdTerm, built bool) {
	// It lives until Close, not only as long as the call of Open.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	e.halt = func() {
		cancel()
		<-done
	}
	go func() {
		defer close(done)
		e.reconcileLoop(ctx, t, built)
	}()
}

func (e *Etcd) reconcileLoop(ctx context.Context, t *etcdTerm, built bool) {
	wait := time.Duration(0)
	if built {
		wait = e.cfg.ReconcileEvery
	}
	for etcdPause(ctx, wait-wait/10+rand.N(wait/5+1)) {
		wait = e.cfg.ReconcileEvery
		put, removed, err := e.reconcile(ctx, t)
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, errEtcdTermOver):
			return // the relay has the reason, or gets it with its next call
		case err != nil:
			wait /= 10
			e.log.Warn("comparison of the etcd directory with the database failed, it is tried again",
				"error", err, "in", wait, "put", put, "removed", removed)
		case put+removed > 0:
			e.log.Warn("repaired the etcd directory: somebody else has changed it, or etcd has lost data",
				"put", put, "removed", removed)
		}
	}
}

func etcdPause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

var errEtcdTermOver = errors.New("no longer the writer of the etcd directory")

// reconcile is one pass: everything that the state has is put right, then
// everything that it does not have is removed.
func (e *Etcd) reconcile(ctx context.Context, t *etcdTerm) (put, removed int, err error) {
	var since int64
	err = e.step(ctx, t, func(ctx context.Context) error {
		resp, err := etcdCall(ctx, e.cfg.RequestTimeout, "read the etcd stream key", func(ctx context.Context) (*clientv3.GetResponse, error) {
			return t.client.Get(ctx, t.streamKey(), clientv3.WithKeysOnly())
		})
		if err == nil {
			since = resp.Header.Revision
		}
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	ends := make(etcdLeaseEnds)
	after := ""
	for more := true; more; {
		var suspects []*etcdPut
		err := e.step(ctx, t, func(ctx context.Context) (err error) {
			var puts []*etcdPut
			if puts, after, more, err = t.page(ctx, after); err != nil {
				return err
			}
			suspects, err = t.wrong(ctx, puts, ends)
			return err
		})
		if err == nil && len(suspects) > 0 {
			var n int
			n, err = e.repair(ctx, t, suspects, ends)
			put += n
		}
		if err != nil {
			return put, removed, err
		}
	}
	for c := t.firstFolder(since); !c.done(); {
		err := e.step(ctx, t, func(ctx context.Context) error {
			n, err := t.sweepPage(ctx, &c)
			removed += n
			return err
		})
		if err != nil {
			return put, removed, err
		}
	}
	return put, removed, nil
}

// etcdBehindPoll is how often the reconciler looks whether deliveries have come
// to where it saw the state.
const etcdBehindPoll = 50 * time.Millisecond

// repair puts suspects right. Their events may only be on the way, so it waits
// for these, and looks again.
func (e *Etcd) repair(ctx context.Context, t *etcdTerm, suspects []*etcdPut, ends etcdLeaseEnds) (put int, err error) {
	entries := make([]directory.Entry, len(suspects))
	for i, p := range suspects {
		entries[i] = p.entry
	}
	seenAt := suspects[0].entry.Seq
	for done := false; !done; {
		err := e.step(ctx, t, func(ctx context.Context) error {
			if t.at.Seq < seenAt {
				return nil
			}
			done = true
			stored, err := t.lookup(ctx, entries)
			if err != nil {
				return err
			}
			puts, err := t.putsOf(ctx, slices.Collect(maps.Values(stored)))
			if err != nil {
				return err
			}
			if puts, err = t.wrong(ctx, puts, ends); err != nil {
				return err
			}
			put = len(puts)
			return t.putAll(ctx, puts)
		})
		if err != nil {
			return 0, err
		}
		if !done && !etcdPause(ctx, etcdBehindPoll) {
			return 0, context.Cause(ctx)
		}
	}
	return put, nil
}

// step runs f while no delivery does, and then leaves deliveries as much time as
// f has taken.
func (e *Etcd) step(ctx context.Context, t *etcdTerm, f func(context.Context) error) error {
	took, err := e.stepNow(ctx, t, f)
	if err == nil && !etcdPause(ctx, took) {
		return context.Cause(ctx)
	}
	return err
}

func (e *Etcd) stepNow(ctx context.Context, t *etcdTerm, f func(context.Context) error) (time.Duration, error) {
	if err := e.writing.lock(ctx); err != nil {
		return 0, err
	}
	defer e.writing.unlock()
	if e.term != t {
		return 0, errEtcdTermOver
	}
	start := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, etcdStepTimeout, fmt.Errorf("not done within %s", etcdStepTimeout))
	defer cancel()
	err := f(ctx)
	if errors.Is(err, errEtcdOvertaken) || errors.Is(err, relay.ErrRestored) {
		e.term, e.lost = nil, err
		return 0, errEtcdTermOver
	}
	if err != nil {
		t.leases.forget() // one that is gone would fail every put
	}
	return time.Since(start), err
}
