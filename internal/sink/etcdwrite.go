package sink

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
)

// etcdTerm is one time of being the directory's writer, from Open to the first
// error. Whoever uses it holds the writing gate.
type etcdTerm struct {
	*Etcd
	client *clientv3.Client
	// at is what the stream key says; during a build, what it will say.
	at revocation.Position
	// Every write compares the revision of fenceKey with fenceRev: the stream key,
	// or during a build the rebuild key.
	fenceKey string
	fenceRev int64
	leases   *etcdLeases
}

var errEtcdOvertaken = errors.New("somebody else has written to the etcd directory or removed its stream key")

func (t *etcdTerm) streamKey() string { return directory.StreamKey(t.cfg.Prefix) }

// etcdPut is an entry on its way into the directory.
type etcdPut struct {
	key   string
	entry directory.Entry
	lease clientv3.LeaseID
}

func (t *etcdTerm) put(s directory.Stored, seq revocation.Seq) *etcdPut {
	return &etcdPut{
		key:   directory.Key(t.cfg.Prefix, t.cfg.Source, s.Target),
		entry: directory.Entry{Target: s.Target, Exp: s.Exp, NotAfter: s.NotAfter, Seq: seq, At: s.At},
	}
}

// etcdBatch is what fits into one transaction, beside the stream key. Etcd takes
// a key only once in each.
type etcdBatch struct {
	puts  []*etcdPut
	byKey map[string]*etcdPut
	// seq is the last event that is in the batch or before it.
	seq revocation.Seq
}

// etcdBatches collects puts; the last batch is the open one.
type etcdBatches struct {
	size int
	all  []*etcdBatch
}

func (b *etcdBatches) last() *etcdBatch {
	if len(b.all) == 0 {
		b.next()
	}
	return b.all[len(b.all)-1]
}

func (b *etcdBatches) next() *etcdBatch {
	b.all = append(b.all, &etcdBatch{byKey: make(map[string]*etcdPut, b.size)})
	return b.all[len(b.all)-1]
}

// add joins p with an earlier put to its key: the later end counts.
func (b *etcdBatches) add(p *etcdPut) {
	batch := b.last()
	if earlier, ok := batch.byKey[p.key]; ok {
		p.entry.Exp = max(p.entry.Exp, earlier.entry.Exp)
		p.entry.NotAfter = max(p.entry.NotAfter, earlier.entry.NotAfter)
		*earlier = *p
		return
	}
	if len(batch.puts) == b.size {
		batch = b.next()
	}
	batch.puts = append(batch.puts, p)
	batch.byKey[p.key] = p
}

func (b *etcdBatches) puts() []*etcdPut {
	var all []*etcdPut
	for _, batch := range b.all {
		all = append(all, batch.puts...)
	}
	return all
}

func (t *etcdTerm) newBatches() etcdBatches { return etcdBatches{size: t.cfg.MaxTxnOps - 1} }

func (t *etcdTerm) deliver(ctx context.Context, events []revocation.Event) error {
	now := time.Now()
	batches := t.newBatches()
	next := t.at.Seq + 1
	for _, ev := range events {
		switch {
		case ev.Epoch != t.at.Epoch:
			return fmt.Errorf("deliver event %s to etcd: the directory is of epoch %s", ev.Position, t.at.Epoch)
		case ev.Seq < next:
			continue // is there already
		case ev.Seq > next:
			return fmt.Errorf("deliver event %s to etcd: the directory stands at %d, what is between is missing", ev.Position, next-1)
		}
		if strings.HasPrefix(ev.Type, "revocation.") {
			r, err := ev.Revocation()
			if err != nil {
				return relay.Permanent(fmt.Errorf("deliver event %s to etcd: %w", ev.Position, err))
			}
			if !etcdDead(r.Exp, now) {
				batches.add(t.put(directory.Stored{Revocation: r, At: ev.Time}, ev.Seq))
			}
		}
		batches.last().seq = ev.Seq
		next++
	}
	if err := t.leases.assign(ctx, now, batches.puts(), t.grant); err != nil {
		return err
	}
	for _, b := range batches.all {
		if err := t.advance(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

func etcdPutOps(b *etcdBatch) []clientv3.Op {
	ops := make([]clientv3.Op, 0, len(b.puts)+1)
	for _, p := range b.puts {
		ops = append(ops, clientv3.OpPut(p.key, p.entry.Value(), clientv3.WithLease(p.lease)))
	}
	return ops
}

// advance writes b and moves the stream key with it.
func (t *etcdTerm) advance(ctx context.Context, b *etcdBatch) error {
	to := revocation.Position{Epoch: t.at.Epoch, Seq: b.seq}
	rev, err := t.commit(ctx, append(etcdPutOps(b), t.putStream(to))...)
	if err != nil {
		return err
	}
	t.at, t.fenceRev = to, rev
	return nil
}

func (t *etcdTerm) putStream(p revocation.Position) clientv3.Op {
	return clientv3.OpPut(t.streamKey(), etcdPosition(p))
}

func etcdPosition(p revocation.Position) string {
	b, _ := json.Marshal(p) // a string and a number always have a JSON form
	return string(b)
}

// commit applies ops if this term still is the writer, and returns the revision
// of what they wrote.
func (t *etcdTerm) commit(ctx context.Context, ops ...clientv3.Op) (int64, error) {
	return t.txn(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(t.fenceKey), "=", t.fenceRev)}, ops...)
}

func (t *etcdTerm) txn(ctx context.Context, conditions []clientv3.Cmp, ops ...clientv3.Op) (int64, error) {
	resp, err := etcdCall(ctx, t.cfg.RequestTimeout, "write to etcd", func(ctx context.Context) (*clientv3.TxnResponse, error) {
		return t.client.Txn(ctx).If(conditions...).Then(ops...).Commit()
	})
	if err != nil {
		return 0, err
	}
	if !resp.Succeeded {
		return 0, fmt.Errorf("write to etcd: %w", errEtcdOvertaken)
	}
	return resp.Header.Revision, nil
}

// read gets ops at one revision. Their number may exceed what one transaction
// takes; then there are several revisions.
func (t *etcdTerm) read(ctx context.Context, ops []clientv3.Op) ([]*clientv3.GetResponse, error) {
	var all []*clientv3.GetResponse
	for len(ops) > 0 {
		n := min(len(ops), t.cfg.MaxTxnOps)
		resp, err := etcdCall(ctx, t.cfg.RequestTimeout, "read from etcd", func(ctx context.Context) (*clientv3.TxnResponse, error) {
			return t.client.Txn(ctx).Then(ops[:n]...).Commit()
		})
		if err != nil {
			return nil, err
		}
		for _, r := range resp.Responses {
			all = append(all, (*clientv3.GetResponse)(r.GetResponseRange()))
		}
		ops = ops[n:]
	}
	return all, nil
}

// beat writes the heartbeat. Like every write it fails if the directory is no longer
// as this term left it.
func (t *etcdTerm) beat(ctx context.Context, h revocation.Heartbeat) error {
	head := h.Head
	// The heartbeat's head may have been read before the last delivery; what it
	// seems to say is asked again.
	if h.Epoch != t.at.Epoch || head < t.at.Seq {
		var err error
		if head, err = t.head(ctx); err != nil {
			return err
		}
	}
	beat := directory.Heartbeat{Epoch: t.at.Epoch, Head: head, Through: t.at.Seq, Source: t.cfg.Source, Time: h.Time}
	_, err := t.commit(ctx, clientv3.OpPut(directory.HeartbeatKey(t.cfg.Prefix), beat.Value()))
	return err
}

// head reads the head of the log, and makes sure that all that the directory has
// comes from there.
func (t *etcdTerm) head(ctx context.Context) (revocation.Seq, error) {
	head, err := t.state.Head(ctx)
	switch {
	case err != nil:
		return 0, err
	case head.Epoch != t.at.Epoch:
		return 0, fmt.Errorf("the log's epoch is %s, the etcd directory's is %s", head.Epoch, t.at.Epoch)
	case head.Seq < t.at.Seq:
		return 0, etcdRestored(t.at, head)
	}
	return head.Seq, nil
}

func etcdRestored(directory, log revocation.Position) error {
	return fmt.Errorf("the etcd directory stands at seq %d of epoch %s, the log's head is %d: %w",
		directory.Seq, directory.Epoch, log.Seq, relay.ErrRestored)
}
