package sink

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
)

// etcdPage is how many entries are read, compared and written in one go. A
// delivery waits for one such page of the reconciler at most.
const etcdPage = 500

func (t *etcdTerm) rebuildKey() string { return directory.RebuildKey(t.cfg.Prefix) }

// etcdMarks is what the directory says about itself.
type etcdMarks struct {
	// at is where it stands or, while it is built, where it will. Zero if unknown.
	at revocation.Position
	// whole is false when it must be built.
	whole bool
	// The revisions at which the two keys were last written, 0 where absent.
	streamRev, rebuildRev int64
}

func (t *etcdTerm) marks(ctx context.Context) (etcdMarks, error) {
	var m etcdMarks
	resp, err := t.read(ctx, []clientv3.Op{clientv3.OpGet(t.streamKey()), clientv3.OpGet(t.rebuildKey())})
	if err != nil {
		return m, err
	}
	parse := func(kvs []*mvccpb.KeyValue) (at revocation.Position, rev int64, ok bool) {
		if len(kvs) == 0 {
			return at, 0, false
		}
		at, err := directory.ParseStream(kvs[0].Value)
		return at, kvs[0].ModRevision, err == nil
	}
	stream, streamRev, ok := parse(resp[0].Kvs)
	target, rebuildRev, building := parse(resp[1].Kvs)
	m = etcdMarks{at: stream, whole: ok && rebuildRev == 0, streamRev: streamRev, rebuildRev: rebuildRev}
	if !ok && building {
		m.at = target
	}
	return m, nil
}

// begin makes this term the writer, and builds the directory if it has to.
func (t *etcdTerm) begin(ctx context.Context) (built bool, err error) {
	m, err := t.marks(ctx)
	if err != nil {
		return false, err
	}
	head, err := t.state.Head(ctx) // after the marks, so that it cannot be below what they name
	if err != nil {
		return false, err
	}
	if m.at.Epoch != "" {
		switch {
		case m.at.Epoch != head.Epoch:
			if err := t.importMissing(ctx); err != nil {
				return false, err
			}
			m.whole = false
		case m.at.Seq > head.Seq:
			return false, etcdRestored(m.at, head)
		}
	}
	if m.whole {
		oldest, err := t.state.Oldest(ctx)
		if err != nil {
			return false, err
		}
		m.whole = oldest <= m.at.Seq+1
	}
	if !m.whole {
		return true, t.build(ctx, m)
	}
	t.at, t.fenceKey, t.fenceRev = m.at, t.streamKey(), m.streamRev
	// Written anew, so that whatever an earlier writer still has on its way fails.
	t.fenceRev, err = t.commit(ctx, t.putStream(t.at))
	return false, err
}

// build writes the whole directory. There is no stream key until it is done.
func (t *etcdTerm) build(ctx context.Context, m etcdMarks) error {
	head, err := t.state.Head(ctx)
	if err != nil {
		return err
	}
	t.at = head
	start := time.Now()
	t.log.Info("building the etcd directory", "head", head.Seq)
	unchanged := func(key string, rev int64) clientv3.Cmp { return clientv3.Compare(clientv3.ModRevision(key), "=", rev) }
	rev, err := t.txn(ctx,
		[]clientv3.Cmp{unchanged(t.streamKey(), m.streamRev), unchanged(t.rebuildKey(), m.rebuildRev)},
		clientv3.OpPut(t.rebuildKey(), etcdPosition(head)), clientv3.OpDelete(t.streamKey()))
	if err != nil {
		return err
	}
	t.fenceKey, t.fenceRev = t.rebuildKey(), rev
	entries := 0
	for after, more := "", true; more; {
		var puts []*etcdPut
		if puts, after, more, err = t.page(ctx, after); err == nil {
			err = t.putAll(ctx, puts)
		}
		if err != nil {
			return fmt.Errorf("build the etcd directory: %w", err)
		}
		entries += len(puts)
	}
	removed := 0
	for c := t.firstFolder(rev); !c.done(); {
		n, err := t.sweepPage(ctx, &c)
		if err != nil {
			return fmt.Errorf("build the etcd directory: %w", err)
		}
		removed += n
	}
	t.fenceRev, err = t.txn(ctx,
		[]clientv3.Cmp{unchanged(t.rebuildKey(), rev), unchanged(t.streamKey(), 0)},
		t.putStream(head), clientv3.OpDelete(t.rebuildKey()))
	if err != nil {
		return fmt.Errorf("end the build of the etcd directory: %w", err)
	}
	t.fenceKey = t.streamKey()
	t.log.Info("built the etcd directory", "head", head.Seq, "entries", entries, "removed", removed,
		"seconds", time.Since(start).Seconds())
	return nil
}

// importMissing gives the state what only the directory has: it was written from
// another epoch of the log, whose end was lost.
func (t *etcdTerm) importMissing(ctx context.Context) error {
	imported := 0
	for page, err := range t.livePages(ctx) {
		if err != nil {
			return fmt.Errorf("import from the etcd directory: %w", err)
		}
		stored, err := t.lookup(ctx, page)
		if err != nil {
			return fmt.Errorf("import from the etcd directory: %w", err)
		}
		var missing []revocation.Revocation
		for _, e := range page {
			if s, ok := stored[e.Target]; !ok || s.Exp < e.Exp || s.NotAfter < e.NotAfter {
				missing = append(missing, etcdRevocation(e))
			}
		}
		if len(missing) == 0 {
			continue
		}
		if err := t.state.Import(ctx, missing); err != nil {
			return fmt.Errorf("import %d revocations from the etcd directory: %w", len(missing), err)
		}
		imported += len(missing)
	}
	t.log.Warn("the epoch has changed, imported what only the etcd directory had", "revocations", imported)
	return nil
}

func etcdRevocation(e directory.Entry) revocation.Revocation {
	return revocation.Revocation{Target: e.Target, Exp: e.Exp, NotAfter: e.NotAfter}
}

// lookup finds what the state has of entries.
func (t *etcdTerm) lookup(ctx context.Context, entries []directory.Entry) (map[revocation.Target]directory.Stored, error) {
	if len(entries) == 0 {
		return nil, nil
	}
	targets := make([]revocation.Target, len(entries))
	for i, e := range entries {
		targets[i] = e.Target
	}
	rows, err := t.state.Lookup(ctx, targets)
	if err != nil {
		return nil, err
	}
	stored := make(map[revocation.Target]directory.Stored, len(rows))
	for _, s := range rows {
		stored[s.Target] = s
	}
	return stored, nil
}

// livePages reads all live entries. It needs no right to write.
func (t *etcdTerm) livePages(ctx context.Context) iter.Seq2[[]directory.Entry, error] {
	return func(yield func([]directory.Entry, error) bool) {
		for c := t.firstFolder(0); !c.done(); {
			kvs, err := t.scan(ctx, &c)
			if err != nil {
				yield(nil, err)
				return
			}
			now := time.Now()
			farthest := now.Add(revocation.MaxExpiryAhead).Unix() // beyond it lies no entry of ours
			var page []directory.Entry
			for _, kv := range kvs {
				e, err := directory.Parse(t.cfg.Prefix, t.cfg.Source, string(kv.Key), kv.Value)
				if err == nil && !etcdDead(e.Exp, now) && e.Exp <= farthest {
					page = append(page, e)
				}
			}
			if len(page) > 0 && !yield(page, nil) {
				return
			}
		}
	}
}

// Stream reads where the directory stands; the zero position if it does not say.
func (e *Etcd) Stream(ctx context.Context) (revocation.Position, error) {
	client, err := e.connect(ctx)
	if err != nil {
		return revocation.Position{}, err
	}
	m, err := (&etcdTerm{Etcd: e, client: client}).marks(ctx)
	return m.at, err
}

// Live reads the live revocations whose seq in the directory is above seq, for an
// import into a log that was restored to it. ID and Tenant are empty, and so is
// all that only the log knows.
func (e *Etcd) Live(ctx context.Context, above revocation.Seq) iter.Seq2[revocation.Revocation, error] {
	return func(yield func(revocation.Revocation, error) bool) {
		client, err := e.connect(ctx)
		if err != nil {
			yield(revocation.Revocation{}, err)
			return
		}
		t := &etcdTerm{Etcd: e, client: client}
		for page, err := range t.livePages(ctx) {
			if err != nil {
				yield(revocation.Revocation{}, err)
				return
			}
			for _, entry := range page {
				if entry.Seq > above && !yield(etcdRevocation(entry), nil) {
					return
				}
			}
		}
	}
}

// etcdCursor is a place on a walk through all folders of the directory.
type etcdCursor struct {
	folders []string // the first is the one that the walk is in
	from    string
	// since is the revision at which everything that the state has was in place, or
	// was put there later.
	since int64
	ahead []*mvccpb.KeyValue // read, and not yet handed out
}

// etcdScan is how many entries are read at once: for each read etcd counts all that
// are left of the folder. What is read ahead may have changed since.
const etcdScan = 20 * etcdPage

func (t *etcdTerm) firstFolder(since int64) etcdCursor {
	folders := directory.Folders(t.cfg.Prefix)
	return etcdCursor{folders: folders, from: folders[0], since: since}
}

func (c *etcdCursor) done() bool { return len(c.folders) == 0 && len(c.ahead) == 0 }

// scan returns the next page of the walk.
func (t *etcdTerm) scan(ctx context.Context, c *etcdCursor) ([]*mvccpb.KeyValue, error) {
	if len(c.ahead) == 0 {
		var err error
		if c.ahead, err = t.readAhead(ctx, c); err != nil {
			return nil, err
		}
	}
	n := min(etcdPage, len(c.ahead))
	page := c.ahead[:n]
	c.ahead = c.ahead[n:]
	return page, nil
}

func (t *etcdTerm) readAhead(ctx context.Context, c *etcdCursor) ([]*mvccpb.KeyValue, error) {
	resp, err := etcdCall(ctx, t.cfg.RequestTimeout, "read the etcd directory", func(ctx context.Context) (*clientv3.GetResponse, error) {
		return t.client.Get(ctx, c.from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(c.folders[0])), clientv3.WithLimit(etcdScan))
	})
	if err != nil {
		return nil, err
	}
	if !resp.More {
		if c.folders = c.folders[1:]; len(c.folders) > 0 {
			c.from = c.folders[0]
		}
	} else if n := len(resp.Kvs); n > 0 {
		c.from = string(resp.Kvs[n-1].Key) + "\x00"
	} else {
		return nil, errors.New("read the etcd directory: an empty page that is not the last")
	}
	return resp.Kvs, nil
}
