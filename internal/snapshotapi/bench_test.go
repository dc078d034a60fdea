package snapshotapi

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/rest"
)

// manyRevocations is a follower with n live revocations of tokens, most of them named by UUIDs.
func manyRevocations(t testing.TB, n int) *fakeFollower {
	f := newFakeFollower(t)
	exp := time.Now().Add(time.Hour).Unix()
	f.replica = replica.NewState(replica.StateConfig{Records: true})
	f.load(revocation.Position{Epoch: epoch, Seq: revocation.Seq(n)}, func(l *replica.Loader) {
		for i := range n {
			sum := sha256.Sum256(fmt.Append(nil, i))
			id := uuid.UUID(sum[:16])
			l.Revocation(replica.Record{
				Target: revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: id.String()},
				Tenant: revocation.SuperTenant, Exp: exp + int64(i%3600),
			})
		}
	})
	f.gone = revocation.Seq(n)
	f.frames = nil
	return f
}

func BenchmarkEncodeRevocations(b *testing.B) {
	const n = 1_000_000
	f := manyRevocations(b, n)
	c := contentOf(f.replica, kinds["revocations"])
	for _, coding := range []rest.Coding{rest.Identity, rest.Gzip, rest.Zstd} {
		b.Run("coding="+string(coding), func(b *testing.B) {
			var size int64
			b.ReportAllocs()
			for b.Loop() {
				size = 0
				count := countingWriter{&size}
				e := &encoder{kind: "revocations", form: formJSON, scope: scope{key: "*"}}
				var w coder
				if coding != rest.Identity {
					w = coders[coding].Get().(coder)
					w.Reset(count)
				}
				e.emit = func(full []byte) ([]byte, error) {
					if w != nil {
						_, err := w.Write(full)
						return full[:0], err
					}
					size += int64(len(full))
					return full[:0], nil
				}
				if err := e.encode(c); err != nil {
					b.Fatal(err)
				}
				if w != nil {
					w.Write(e.buf)
					w.Close()
				}
			}
			b.ReportMetric(float64(size)/n, "B/entry")
		})
	}
}

type countingWriter struct{ n *int64 }

func (w countingWriter) Write(p []byte) (int, error) { *w.n += int64(len(p)); return len(p), nil }

// BenchmarkFanOut is 500 events/s to 1,000 streams, for b.N events: how long after an event
// its last byte reaches a reader. The readers take part of the processor.
func BenchmarkFanOut(b *testing.B) {
	const readers, perSecond = 1000, 500
	s := serve(b, Config{})
	b.StopTimer()
	var (
		ready, all sync.WaitGroup
		mu         sync.Mutex
		delays     []time.Duration
	)
	sent := make([]time.Time, b.N+1)
	last := fmt.Appendf(nil, "id: %s:%d\n", epoch, b.N)
	ready.Add(readers)
	for range readers {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			b.Fatal(err)
		}
		if err := s.request("/v1/events", "Accept", "text/event-stream").Write(conn); err != nil {
			b.Fatal(err)
		}
		all.Go(func() {
			defer conn.Close()
			var mine []time.Duration
			buf := make([]byte, 64<<10)
			seen := 0
			for first := true; ; {
				n, err := conn.Read(buf)
				if err != nil {
					b.Error(err)
					return
				}
				if first && bytes.Contains(buf[:n], []byte("event: heartbeat")) {
					first = false
					ready.Done()
				}
				now := time.Now()
				for range bytes.Count(buf[:n], []byte("\nevent: revocation")) {
					seen++
					mu.Lock()
					at := sent[seen]
					mu.Unlock()
					mine = append(mine, now.Sub(at))
				}
				if bytes.Contains(buf[:n], last) || seen == b.N {
					mu.Lock()
					delays = append(delays, mine...)
					mu.Unlock()
					return
				}
			}
		})
	}
	ready.Wait()
	var before, after syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
		b.Fatal(err)
	}
	tick := time.NewTicker(time.Second / perSecond)
	defer tick.Stop()
	start := time.Now()
	b.StartTimer()
	for i := 1; i <= b.N; i++ {
		<-tick.C
		mu.Lock()
		sent[i] = time.Now()
		mu.Unlock()
		s.follower.revoke(revocation.SuperTenant, 100)
	}
	all.Wait()
	b.StopTimer()
	took := time.Since(start)
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
		b.Fatal(err)
	}
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	slices.Sort(delays)
	b.ReportMetric(float64(delays[len(delays)*99/100].Milliseconds()), "p99-ms")
	b.ReportMetric(float64(delays[len(delays)/2].Milliseconds()), "p50-ms")
	b.ReportMetric(cpu.Seconds()/took.Seconds(), "cores")
	b.ReportMetric(s.metric("rescind_events_dropped_total"), "dropped")
}

// BenchmarkColdStarts is 1,000 gateways that fetch 100,000 revocations at once: until the
// last has its last byte.
func BenchmarkColdStarts(b *testing.B) {
	const readers, entries = 1000, 100_000
	for _, coding := range []rest.Coding{rest.Zstd, rest.Identity} {
		b.Run("coding="+string(coding), func(b *testing.B) {
			s := serveFollower(b, Config{}, manyRevocations(b, entries))
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			var received atomic.Int64
			for b.Loop() {
				received.Store(0)
				var all sync.WaitGroup
				for range readers {
					all.Go(func() {
						conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
						if err != nil {
							b.Error(err)
							return
						}
						defer conn.Close()
						req := s.request("/v1/snapshots/revocations", "Accept-Encoding", cmp.Or(string(coding), "identity"))
						req.Close = true
						if err := req.Write(conn); err != nil {
							b.Error(err)
						}
						n, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{conn}, make([]byte, 64<<10))
						if err != nil {
							b.Error(err)
						}
						received.Add(n)
					})
				}
				all.Wait()
			}
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(received.Load())/readers/entries, "B/entry")
			b.ReportMetric(s.metric("rescind_snapshot_builds_total"), "builds")
			b.ReportMetric(float64(after.Sys-before.Sys)/(1<<20), "MiB-more")
		})
	}
}

// BenchmarkBuild is a snapshot of 1,000,000 revocations for one reader: to its first and to
// its last byte.
func BenchmarkBuild(b *testing.B) {
	const entries = 1_000_000
	f := manyRevocations(b, entries)
	for _, coding := range []rest.Coding{rest.Identity, rest.Zstd, rest.Gzip} {
		b.Run("coding="+string(coding), func(b *testing.B) {
			s := serveFollower(b, Config{}, f)
			var first time.Duration
			for b.Loop() {
				start := time.Now()
				resp := s.do(s.request("/v1/snapshots/revocations", "Accept-Encoding", cmp.Or(string(coding), "identity")))
				if _, err := io.ReadFull(resp.Body, make([]byte, 1)); err != nil {
					b.Fatal(err)
				}
				first = time.Since(start)
				n, err := io.Copy(io.Discard, resp.Body)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(n)/entries, "B/entry")
				s.api.cache.mu.Lock()
				for _, blob := range s.api.cache.blobs {
					s.api.cache.retire(blob)
				}
				s.api.cache.mu.Unlock()
			}
			b.ReportMetric(float64(first.Microseconds())/1000, "ms-to-first")
		})
	}
}
