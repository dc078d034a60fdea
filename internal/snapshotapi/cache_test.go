package snapshotapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/rest"
)

func testCache(t *testing.T, f *fakeFollower, maxBytes int) *cache {
	c := newCache(f, maxBytes, newMetrics(prometheus.NewRegistry(), &API{}), slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		c.close()
		synctest.Wait()
		if c.bytes != 0 || len(c.blobs) != 0 || len(c.retired) != 0 || len(c.builds) != 0 {
			t.Errorf("%d bytes and %d snapshots are left", c.bytes, len(c.blobs)+len(c.retired))
		}
	})
	return c
}

var revocationsKey = key{kind: "revocations", scope: "*", form: formJSON}

func mustOpen(t *testing.T, c *cache, k key) *reading {
	t.Helper()
	rd, err := c.open(k, scope{key: "*"}, time.Now(), c.follower.Replica().At())
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
		c := testCache(t, f, 16<<20)
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
			all := slices.Collect(maps.Values(c.blobs))
			all = append(all, slices.Collect(maps.Keys(c.retired))...)
			bytes, overhead := 0, 0
			for _, b := range all {
				for _, chunk := range b.chunks {
					bytes += len(chunk)
				}
				if overhead += blobBytes; !b.done {
					overhead += buildBytes
				}
			}
			if got := (bytes + chunkSize/2) / chunkSize; got != want {
				t.Errorf("%s: about %d chunks are held, want %d", when, got, want)
			}
			if c.bytes != bytes+overhead {
				t.Errorf("%s: %d bytes and %d beside them are held, %d are counted", when, bytes, overhead, c.bytes)
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

// How old a snapshot may be goes by when its reader asked, not by when the head was known.
func TestCacheGoesByWhenItWasAsked(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeFollower(t)
		c := testCache(t, f, 16<<20)
		open := func(asked time.Time) *blob {
			t.Helper()
			rd, err := c.open(revocationsKey, scope{key: "*"}, asked, f.replica.At())
			if err != nil {
				t.Fatal(err)
			}
			readAll(t, rd)
			return rd.b
		}
		asked := time.Now()
		time.Sleep(reuseFor - time.Millisecond) // for the head
		first := open(asked)
		f.revoke(pizza, 0)
		time.Sleep(10 * time.Millisecond)
		if open(asked.Add(reuseFor/2)) != first {
			t.Error("one who asked then does not share")
		}
		if open(time.Now()) == first {
			t.Error("a snapshot is older than it may be")
		}
	})
}

// Two processes, and two loads of one, have the same state in another order.
func TestTagsAreOfOneOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFakeFollower(t)
		tag := func(c *cache) string {
			t.Helper()
			rd := mustOpen(t, c, revocationsKey)
			defer rd.close()
			in, err := rd.info(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return in.etag
		}
		c, other := testCache(t, f, 16<<20), testCache(t, f, 16<<20)
		first := tag(c)
		if tag(c) != first || tag(other) == first {
			t.Errorf("tags are %s, %s and %s of another", first, tag(c), tag(other))
		}
		f.load(f.replica.At(), nil)
		time.Sleep(2 * reuseFor)
		f.replica.View(func(v *replica.View) {
			if v.Loads() != 2 {
				t.Errorf("%d loads", v.Loads())
			}
		})
		c.sweep()
		c.mu.Lock()
		for _, b := range c.blobs {
			c.retire(b)
		}
		c.mu.Unlock()
		if tag(c) == first {
			t.Error("the tag is the same after the state was loaded again")
		}
	})
}

// What is held has a bound, also while a slow reader and a fast one share a snapshot that
// is larger, or many are made at a time.
func TestCacheBound(t *testing.T) {
	t.Parallel()
	f := manyRevocations(t, 50_000) // some 6 MiB
	synctest.Test(t, func(t *testing.T) {
		const limit = 4 << 20
		c := testCache(t, f, limit)
		slow, fast := mustOpen(t, c, revocationsKey), mustOpen(t, c, revocationsKey)
		if _, err := slow.next(t.Context()); err != nil {
			t.Fatal(err)
		}
		for {
			_, err := fast.next(t.Context())
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if synctest.Wait(); c.bytes > limit+2*chunkSize {
				t.Fatalf("%d bytes are held", c.bytes)
			}
		}
		fast.close()
		if _, err := slow.next(t.Context()); !errors.Is(err, errDropped) {
			t.Errorf("the slow one: %v", err)
		}
		slow.close()

		// Many small ones: each takes what making it takes.
		for i := range 1000 {
			k := revocationsKey
			k.kind, k.scope = "apis", fmt.Sprint(i)
			rd, err := c.open(k, scope{key: k.scope, domains: []string{}}, time.Now(), f.replica.At())
			if err != nil {
				t.Fatalf("%d: %v", i, err)
			}
			readAll(t, rd)
			if synctest.Wait(); c.bytes > limit {
				t.Fatalf("%d bytes are held", c.bytes)
			}
		}
		if len(c.blobs) == 0 || len(c.blobs) > limit/blobBytes {
			t.Errorf("%d snapshots are held", len(c.blobs))
		}
	})
}

// Two who take next to nothing do not deny snapshots to all others.
func TestCacheSlowReadersMakeRoom(t *testing.T) {
	t.Parallel()
	f := manyRevocations(t, 50_000)
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, f, 9<<20) // two that are being made, and hold what is ahead
		ndjson := revocationsKey
		ndjson.form = formNDJSON
		slow := []*reading{mustOpen(t, c, revocationsKey), mustOpen(t, c, ndjson)}
		synctest.Wait()
		apis := revocationsKey
		apis.kind = "apis"
		if _, err := c.open(apis, scope{key: "*"}, time.Now(), f.replica.At()); !errors.Is(err, errFull) {
			t.Fatalf("error is %v", err)
		}
		time.Sleep(slowFor)
		readAll(t, mustOpen(t, c, apis))
		dropped := 0
		for _, rd := range slow {
			if _, err := rd.next(t.Context()); errors.Is(err, errDropped) {
				dropped++
			}
			rd.close()
		}
		if dropped == 0 {
			t.Error("nobody was dropped")
		}
	})
}

// No more than some are worked on at a time, and who is waited for takes no place among them.
func TestCacheBuilds(t *testing.T) {
	t.Parallel()
	f := manyRevocations(t, 50_000)
	synctest.Test(t, func(t *testing.T) {
		c := testCache(t, f, 1<<30)
		var all []*reading
		for i := range 4 * maxBuilds {
			k := revocationsKey
			k.scope = fmt.Sprint(i)
			all = append(all, mustOpen(t, c, k))
		}
		synctest.Wait()
		if len(c.builds) != 0 {
			t.Errorf("%d are worked on although all wait for readers", len(c.builds))
		}
		for _, rd := range all {
			if len(rd.b.chunks) != ahead {
				t.Errorf("%d chunks were made ahead", len(rd.b.chunks))
			}
			readAll(t, rd)
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
		c := testCache(t, f, 6<<20)
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
		c.max = 3 << 20
		c.mu.Unlock()
		if _, err := c.open(revocationsKey, scope{key: "*"}, time.Now(), f.replica.At()); !errors.Is(err, errFull) {
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
		c := testCache(t, newFakeFollower(t), 16<<20)
		c.blobs[revocationsKey] = &blob{ // nobody makes it
			key: revocationsKey, wanted: []int{0}, readings: make(map[*reading]struct{}), grown: make(chan struct{}), room: sync.NewCond(&c.mu),
		}
		c.bytes = blobBytes
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
