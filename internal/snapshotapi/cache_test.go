package snapshotapi

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/rest"
)

func testCache(t *testing.T, f *fakeFollower, maxBytes int) *cache {
	c := newCache(f, maxBytes, newMetrics(prometheus.NewRegistry(), &API{}), slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		c.close()
		synctest.Wait()
		if c.bytes != 0 || len(c.blobs) != 0 {
			t.Errorf("%d bytes and %d snapshots are left", c.bytes, len(c.blobs))
		}
	})
	return c
}

var revocationsKey = key{kind: "revocations", scope: "*", form: formJSON}

func mustOpen(t *testing.T, c *cache, k key) *reading {
	t.Helper()
	rd, err := c.open(k, scope{key: "*"}, c.follower.Replica().At())
	if err != nil {
		t.Fatal(err)
	}
	return rd
}

// readAll reads a snapshot to its end and closes it.
func readAll(t *testing.T, rd *reading) (size int) {
	t.Helper()
	defer rd.close()
	for {
		chunk, err := rd.next(t.Context())
		if errors.Is(err, io.EOF) {
			return size
		}
		if err != nil {
			t.Fatal(err)
		}
		size += len(chunk)
	}
}

func TestCacheReuse(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeFollower(t)
		c := testCache(t, f, 1<<20)
		last := ""
		apis := revocationsKey
		apis.kind = "apis"
		for _, step := range []struct {
			name string
			do   func()
			key  key
			same bool
		}{
			{"first", func() {}, revocationsKey, false},
			{"at once", func() {}, revocationsKey, true},
			{"a little later, something has changed", func() { time.Sleep(reuseFor / 2); f.revoke(pizza, 0) }, revocationsKey, true},
			{"too old", func() { time.Sleep(reuseFor / 2) }, revocationsKey, false},
			{"later, nothing has changed", func() { time.Sleep(30 * time.Second) }, revocationsKey, true},
			{"something may have ended", func() { time.Sleep(30 * time.Second) }, revocationsKey, false},
			{"a new epoch", func() { f.restart(revocation.Position{Epoch: epoch2, Seq: 1}) }, revocationsKey, false},
			{"another kind", func() {}, apis, false},
			{"in which nothing ends", func() { time.Sleep(time.Hour) }, apis, true},
		} {
			step.do()
			rd := mustOpen(t, c, step.key)
			in, err := rd.info(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if (in.etag == last) != step.same {
				t.Errorf("%s: tag is %s after %s, want the same: %t", step.name, in.etag, last, step.same)
			}
			last = in.etag
			rd.close()
		}
		f.revoke(pizza, 0)
		time.Sleep(2 * reuseFor)
		if synctest.Wait(); c.bytes != 0 || c.sweeps != nil {
			t.Errorf("%d bytes are held of what nobody would get, sweeping: %t", c.bytes, c.sweeps != nil)
		}
	})
}

// A snapshot with a slow reader is not made faster than it is read, and what was read is
// given back once no other can want it.
func TestCacheHoldsLittle(t *testing.T) {
	t.Parallel()
	f := manyRevocations(t, 100_000) // some 50 chunks
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, f, 1<<30)
		held := func(want int, when string) {
			t.Helper()
			synctest.Wait()
			if got := (c.bytes + chunkSize/2) / chunkSize; got != want {
				t.Errorf("%s: about %d chunks are held, want %d", when, got, want)
			}
		}
		rd := mustOpen(t, c, revocationsKey)
		held(ahead, "nothing was read")
		next := func(rd *reading) {
			t.Helper()
			if _, err := rd.next(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for range 1 + 3 {
			next(rd)
		}
		held(ahead+3, "three were read")
		second := mustOpen(t, c, revocationsKey)
		next(second)
		time.Sleep(cutoffStep * time.Second) // no more readers can come
		held(ahead+3, "another is at the beginning")
		next(second)
		held(ahead+2, "another is past the first chunk")
		second.close()
		held(ahead, "another is gone")
		next(rd)
		held(ahead, "one more was read")

		abandoned := c.bytes
		rd.close()
		held(0, "nobody reads any more")
		if abandoned == 0 {
			t.Error("nothing was held before")
		}

		// One that was left half read waits for others, and goes on with them.
		mustOpen(t, c, revocationsKey).close()
		held(ahead, "left at once")
		rd = mustOpen(t, c, revocationsKey)
		if got := readAll(t, rd); got != int(rd.b.size) || got < 40*chunkSize {
			t.Errorf("%d bytes were read of %d", got, rd.b.size)
		}
		if builds := rd.b; builds != mustOpenAndClose(t, c) {
			t.Error("what was read whole is made again")
		}
	})
}

func mustOpenAndClose(t *testing.T, c *cache) *blob {
	t.Helper()
	rd := mustOpen(t, c, revocationsKey)
	rd.close()
	return rd.b
}

func TestCacheMakesRoom(t *testing.T) {
	t.Parallel()
	f := manyRevocations(t, 20_000) // some 2.5 MiB
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, f, 4<<20)
		gz, ndjson := revocationsKey, revocationsKey
		gz.coding, ndjson.form = rest.Gzip, formNDJSON
		readAll(t, mustOpen(t, c, revocationsKey))
		time.Sleep(time.Millisecond)
		readAll(t, mustOpen(t, c, gz))
		time.Sleep(time.Millisecond)
		inUse := mustOpen(t, c, ndjson)
		readAll(t, mustOpen(t, c, ndjson))
		if c.blobs[revocationsKey] != nil || c.blobs[gz] == nil || c.blobs[ndjson] == nil {
			t.Errorf("the snapshots that are held are %v, want those but the one asked for longest ago", c.blobs)
		}
		c.mu.Lock()
		c.max = 1 << 20
		c.mu.Unlock()
		if _, err := c.open(revocationsKey, scope{key: "*"}, f.replica.At()); !errors.Is(err, errFull) {
			t.Errorf("error is %v although what is in use is more than may be held", err)
		}
		if c.blobs[gz] != nil {
			t.Error("what nobody uses is held although there is no room")
		}
		readAll(t, inUse)
		readAll(t, mustOpen(t, c, revocationsKey))
	})
}

// A caller that goes away does not wait for what is being made.
func TestCacheReaderGivesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, newFakeFollower(t), 1<<20)
		c.blobs[revocationsKey] = &blob{ // nobody makes it
			key: revocationsKey, wanted: []int{0}, grown: make(chan struct{}), room: sync.NewCond(&c.mu),
		}
		rd := mustOpen(t, c, revocationsKey)
		defer rd.close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := rd.info(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("info: %v", err)
		}
		if _, err := rd.next(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("next: %v", err)
		}
	})
}
