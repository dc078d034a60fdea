package eventhub

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// many are revocations of the super tenant's tokens, client and subjects in turn.
func many(n int, now time.Time) []replica.Record {
	kinds := []revocation.Kind{revocation.KindToken, revocation.KindClient, revocation.KindSubject}
	all := make([]replica.Record, n)
	for i := range all {
		all[i] = replica.Record{
			Target: revocation.Target{Kind: kinds[i%3], Iss: superISS, ID: fmt.Sprintf("0193a2f4-7c11-7d02-9b1e-%012d", i)},
			Tenant: super, Exp: now.Unix() + 3600, NotAfter: now.Unix(),
		}
	}
	return all
}

// A list of revocations that is sent in many pieces is whole, packed or not, in each of
// its forms.
func TestStreams(t *testing.T) {
	t.Parallel()
	const n = 9000
	state := &fakeState{replica: replica.NewState(replica.StateConfig{Records: true})}
	state.load(t, 1, testCatalog(), many(n, time.Now()))
	w := newWorld(t, Config{}, state, noLedger{}, nil)
	count := func(list []json.RawMessage, member string) {
		t.Helper()
		ids := make(map[string]bool)
		for _, item := range list {
			var row map[string]any
			if err := json.Unmarshal(item, &row); err != nil {
				t.Fatal(err)
			}
			ids[fmt.Sprint(row[member])] = true
		}
		if len(list) != n/3 || len(ids) != n/3 {
			t.Errorf("%d items with %d different %s, want %d", len(list), len(ids), member, n/3)
		}
	}
	for _, coding := range []string{"", "gzip", "deflate, gzip;q=0.5", "gzip;q=0", "*"} {
		read := func(user, path string, into any) {
			t.Helper()
			rec := w.get(user, path, "Accept-Encoding", coding)
			var body io.Reader = rec.Body
			packed := rec.Header().Get("Content-Encoding") == "gzip"
			if packed {
				z, err := gzip.NewReader(body)
				if err != nil {
					t.Fatal(err)
				}
				body = z
			}
			if want := strings.Contains(coding, "gzip") && coding != "gzip;q=0"; packed != want {
				t.Errorf("%s with Accept-Encoding %q: packed %t", path, coding, packed)
			}
			if err := json.NewDecoder(body).Decode(into); err != nil {
				t.Fatalf("%s: %v", path, err)
			}
		}
		var array []json.RawMessage
		read("gateway", base+"/revokedjwt", &array)
		count(array, "jwt_signature")
		var object map[string][]json.RawMessage
		read("newer", base+"/revokedjwt", &object)
		count(object["revokedJWTList"], "jwt_signature")
		count(object["revokedJWTConsumerKeyList"], "consumer_key")
		count(object["revokedJWTSubjectEntityList"], "entity_id")
		for _, name := range directoryNames {
			var directory struct {
				Node struct{ Nodes []json.RawMessage }
			}
			read("gateway", "/v2/keys/"+name, &directory)
			count(directory.Node.Nodes, "key")
		}
	}
	if rec := w.get("gateway", base+"/keyTemplates", "Accept-Encoding", "gzip"); rec.Header().Get("Content-Encoding") != "" {
		t.Error("two bytes were packed")
	}
}

// slowWriter takes nothing until it is told to.
type slowWriter struct {
	*httptest.ResponseRecorder
	begun    chan struct{}
	released chan error
	once     sync.Once
}

func newSlowWriter() *slowWriter {
	return &slowWriter{ResponseRecorder: httptest.NewRecorder(), begun: make(chan struct{}), released: make(chan error)}
}

func (s *slowWriter) Write(b []byte) (int, error) {
	s.once.Do(func() { close(s.begun) })
	if err := <-s.released; err != nil {
		return 0, err
	}
	return s.ResponseRecorder.Write(b)
}

// serve answers a GET, and reports whether the answer came to its end.
func (w *world) serve(rw http.ResponseWriter, user, path string) (whole bool) {
	r := httptest.NewRequest(http.MethodGet, path, nil)
	r.SetBasicAuth(user, "right")
	defer func() {
		if got := recover(); got != nil && got != http.ErrAbortHandler {
			panic(got)
		}
	}()
	w.router.ServeHTTP(rw, r)
	return true
}

// Past its share an account's readers wait for their turn, and are refused only when the
// wait was long. Others go on, and so do other requests.
func TestReadersAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		state := newState(t)
		state.load(t, 50, testCatalog(), many(3000, time.Now()))
		w := newWorld(t, Config{MaxReaders: 4, MaxInFlight: 12, Wait: 20 * time.Second}, state, noLedger{}, nil)
		slow := newSlowWriter()
		var sent sync.WaitGroup
		sent.Go(func() {
			if w.serve(slow, "gateway", base+"/revokedjwt") {
				t.Error("an answer that did not get to its end looks whole")
			}
		})
		<-slow.begun

		start := time.Now()
		rec := w.get("gateway", "/v2/keys/jti")
		if rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Retry-After") != "5" || time.Since(start) != 20*time.Second {
			t.Errorf("another of the account: %d after %s", rec.Code, time.Since(start))
		}
		start = time.Now()
		for _, path := range []string{"/subscriptions", "/applications?appId=41"} {
			if rec := w.get("gateway", base+path); rec.Code != http.StatusOK {
				t.Errorf("%s: %d", path, rec.Code)
			}
		}
		for _, path := range []string{"/v2/keys", "/v2/keys/jti/none", "/v2/keys/none"} {
			if rec := w.get("gateway", path); rec.Code == http.StatusServiceUnavailable {
				t.Errorf("%s: %d", path, rec.Code)
			}
		}
		for _, path := range []string{base + "/revokedjwt", "/v2/keys/jti"} {
			if rec := w.get("newer", path); rec.Code != http.StatusOK || !json.Valid(rec.Body.Bytes()) {
				t.Errorf("%s of another account: %d", path, rec.Code)
			}
		}
		if time.Since(start) != 0 {
			t.Errorf("others waited for %s", time.Since(start))
		}

		waiting := make(chan *httptest.ResponseRecorder, 3)
		for range 2 {
			go func() { waiting <- w.get("gateway", base+"/revokedjwt") }()
		}
		synctest.Wait()
		if got := w.count(t, "rescind_eventhub_requests_in_flight"); got != 3 {
			t.Errorf("%v requests are in flight, want 3", got)
		}
		if rec := w.get("gateway", base+"/block"); rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Retry-After") != "1" {
			t.Errorf("the account's fourth request at once: %d", rec.Code)
		}
		if rec := w.get("newer", base+"/block"); rec.Code != http.StatusOK {
			t.Errorf("another account: %d", rec.Code)
		}
		slow.released <- errors.New("the reader is gone")
		sent.Wait()
		for range 2 {
			if rec := <-waiting; rec.Code != http.StatusOK || !json.Valid(rec.Body.Bytes()) {
				t.Errorf("after its turn came: %d", rec.Code)
			}
		}
		if dropped, refused := w.count(t, "rescind_eventhub_dropped_total"), w.count(t, "rescind_eventhub_refused_total"); dropped != 1 || refused != 2 {
			t.Errorf("%v dropped, %v refused; want 1 and 2", dropped, refused)
		}
	})
}

// Whoever waits for revocations at the same time gets the same bytes. Slow ones do not
// keep others from it, and hold little.
func TestSlowReaders(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		state := &fakeState{replica: replica.NewState(replica.StateConfig{Records: true})}
		state.load(t, 50, testCatalog(), many(45000, time.Now()))
		w := newWorld(t, Config{}, state, noLedger{}, nil)
		const slow = 60
		var sent sync.WaitGroup
		var all []*slowWriter
		for i := range slow {
			s := newSlowWriter()
			all = append(all, s)
			sent.Go(func() { w.serve(s, []string{"gateway", "all"}[i%2], base+"/revokedjwt") })
		}
		synctest.Wait()
		if got := w.count(t, "rescind_eventhub_revocation_lists_total", listEncoded); got != 2 {
			t.Errorf("%v lists were encoded for two selections of tenants", got)
		}
		if got := w.count(t, "rescind_eventhub_revocation_bytes"); got > 2*(ahead+1)*chunkBytes*9/8 {
			t.Errorf("%d slow readers hold %v bytes", slow, got)
		}
		var array []json.RawMessage
		want := w.get("gateway", base+"/revokedjwt").Body.Bytes()
		if err := json.Unmarshal(want, &array); err != nil || len(array) != 15000 {
			t.Errorf("a reader that keeps up: %d tokens, %v", len(array), err)
		}
		for _, s := range all {
			close(s.released)
		}
		sent.Wait()
		for _, s := range all {
			if !bytes.Equal(s.Body.Bytes(), want) {
				t.Fatal("a slow reader got something else")
			}
		}
		if got := w.count(t, "rescind_eventhub_revocation_bytes"); got == 0 {
			t.Error("nothing is kept for who comes next")
		}
		time.Sleep(sharedFor)
		synctest.Wait()
		if got := w.count(t, "rescind_eventhub_revocation_bytes"); got != 0 {
			t.Errorf("%v bytes are held by nobody", got)
		}
	})
}

// pattern encodes n chunks that tell the position that they are of.
func pattern(n int) func(*encoder, needed) {
	return func(e *encoder, content needed) {
		filler := make([]byte, 4<<10)
		for i := range n * chunkBytes / len(filler) {
			at := len(e.buf)
			e.buf = append(e.buf, filler...)
			_ = fmt.Appendf(e.buf[:at], "%d/%d", content.at.Seq, i)
			if !e.next() {
				return
			}
		}
	}
}

// readAll reads to the end, and checks that what it gets is of one position.
func readAll(rd *reading, n int) (revocation.Seq, error) {
	defer rd.close()
	var got []byte
	for {
		chunk, err := rd.next(context.Background())
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
		got = append(got, chunk...)
	}
	in := rd.info()
	if in.size != len(got) {
		return 0, fmt.Errorf("%d bytes, but its size is %d", len(got), in.size)
	}
	if in.packed {
		z, err := gzip.NewReader(bytes.NewReader(got))
		if err != nil {
			return 0, err
		}
		if got, err = io.ReadAll(z); err != nil {
			return 0, err
		}
	}
	var e encoder
	pattern(n)(&e, needed{at: in.at})
	if !bytes.Equal(got, e.buf) {
		return 0, fmt.Errorf("%d bytes are not those of %s", len(got), in.at)
	}
	return in.at.Seq, nil
}

func TestBlobsAreFresh(t *testing.T) {
	t.Parallel()
	const n, limit = 6, 4 << 20
	c := newBlobs(limit, make(chan struct{}, 2), newMetrics(prometheus.NewRegistry()))
	var head atomic.Int64
	at := func() revocation.Position { return revocation.Position{Epoch: epoch, Seq: revocation.Seq(head.Load())} }
	take := func() needed { return needed{at: at()} }
	head.Store(1)
	var workers sync.WaitGroup
	for worker := range 8 {
		workers.Go(func() {
			for try := range 12 {
				asked := at()
				rd, err := c.open(blobKey{packed: worker%2 == 0}, asked, take, pattern(n))
				if errors.Is(err, errBusy) {
					continue
				}
				if try%7 == 3 { // its reader goes away
					_, _ = rd.next(context.Background())
					rd.close()
					continue
				}
				switch seq, err := readAll(rd, n); {
				case errors.Is(err, errBehind):
				case err != nil || seq < asked.Seq:
					t.Errorf("asked at %d: %d, %v", asked.Seq, seq, err)
				}
				if try%3 == 0 {
					head.Add(1)
				}
			}
		})
	}
	workers.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for b := range c.live {
		c.retire(b)
	}
	if c.bytes != 0 || len(c.live) != 0 {
		t.Errorf("%d bytes of %d lists are left", c.bytes, len(c.live))
	}
}

// When memory is short those go that are furthest behind. Those who keep up do not
// notice, and those who are alone with their list stay.
func TestBlobsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const n, limit = 16, 3 * 4 << 20 // a list is 4 MiB
		c := newBlobs(limit, make(chan struct{}, 1), newMetrics(prometheus.NewRegistry()))
		seq := revocation.Seq(0)
		open := func() *reading {
			rd, err := c.open(blobKey{}, revocation.Position{Epoch: epoch, Seq: seq}, func() needed {
				return needed{at: revocation.Position{Epoch: epoch, Seq: seq}}
			}, pattern(n))
			if err != nil {
				t.Fatal(err)
			}
			return rd
		}
		var behind []*reading
		for range 6 {
			seq++
			slow := open()
			if _, err := slow.next(t.Context()); err != nil {
				t.Fatal(err)
			}
			behind = append(behind, slow)
			if got, err := readAll(open(), n); got != seq || err != nil {
				t.Errorf("one that keeps up: %d, %v", got, err)
			}
			if held := c.held(); held > limit+chunkBytes {
				t.Errorf("%d bytes are held", held)
			}
		}
		seq++
		alone := open()
		synctest.Wait()
		dropped := 0
		for _, rd := range behind {
			if _, err := readAll(rd, n); errors.Is(err, errBehind) {
				dropped++
			}
		}
		if dropped < 2 || dropped > 5 {
			t.Errorf("%d of %d that were behind were dropped", dropped, len(behind))
		}
		if got, err := readAll(alone, n); got != seq || err != nil {
			t.Errorf("one that is alone: %d, %v", got, err)
		}
		time.Sleep(sharedFor)
		synctest.Wait()
		if c.held() != 0 || len(c.live) != 0 {
			t.Errorf("%d bytes of %d lists are left", c.held(), len(c.live))
		}
	})
}

func TestSendingIsBounded(t *testing.T) {
	t.Parallel()
	s := newSending(100)
	large, small, shared := &body{bytes: make([]byte, 1000)}, &body{bytes: make([]byte, 25)}, &body{bytes: make([]byte, 20)}
	begin := func(account string, b *body, want bool) {
		t.Helper()
		if got := s.begin(account, b); got != want {
			t.Errorf("begin for %s: %t, want %t with %d bytes", account, got, want, s.held())
		}
	}
	begin("a", large, true) // alone
	begin("b", small, false)
	begin("b", large, true) // nothing more
	s.end(large)
	s.end(large)
	begin("a", small, true)
	begin("a", shared, false) // more than its share
	begin("b", shared, true)
	begin("a", shared, true)
	begin("c", large, false)
	s.end(shared)
	if s.held() != 45 {
		t.Errorf("%d bytes, want 45", s.held())
	}
	s.end(shared)
	s.end(small)
	if s.held() != 0 || len(s.byAccount) != 0 {
		t.Errorf("%d bytes, %v are left", s.held(), s.byAccount)
	}
}

// reader takes each piece in a time, if that is before the deadline.
type reader struct {
	http.ResponseWriter
	write, read time.Time
	takes       func(i int) time.Duration
	pieces      int
}

func (d *reader) SetWriteDeadline(at time.Time) error { d.write = at; return nil }
func (d *reader) SetReadDeadline(at time.Time) error  { d.read = at; return nil }

func (d *reader) Write(b []byte) (int, error) {
	if !d.read.After(d.write) {
		return 0, errors.New("the server would take the reader for gone")
	}
	if len(b) > pieceBytes {
		return 0, errors.New("the piece is too large")
	}
	takes := d.takes(d.pieces)
	d.pieces++
	if left := time.Until(d.write); takes > left {
		time.Sleep(max(left, 0))
		return 0, os.ErrDeadlineExceeded
	}
	time.Sleep(takes)
	return len(b), nil
}

// A reader may stop for a while, as it seems while much is on its way, but not take
// less than it must all in all.
func TestPaced(t *testing.T) {
	t.Parallel()
	const size = 4000*pieceBytes + 7
	every := func(n int, d time.Duration) func(int) time.Duration {
		return func(i int) time.Duration {
			if i%n == n-1 {
				return d
			}
			return 0
		}
	}
	for _, tt := range []struct {
		name    string
		takes   func(i int) time.Duration
		dropped time.Duration // 0: never
	}{
		{"at once", every(1, 0), 0},
		{"a little more than it must", every(1, 1990*time.Millisecond), 0},
		{"in jumps", every(10, 19*time.Second), 0},
		{"one that takes nothing", every(1, time.Hour), 30 * time.Second},
		{"one that stops in the middle", every(1000, time.Hour), 30 * time.Second},
		{"too slow", every(1, 4*time.Second), time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				n, err := newPaced(&reader{takes: tt.takes}).Write(make([]byte, size))
				took := time.Since(start)
				switch {
				case tt.dropped == 0 && (n != size || err != nil):
					t.Errorf("%d bytes after %s, %v", n, took, err)
				case tt.dropped != 0 && (err == nil || took < tt.dropped || took > tt.dropped+4*time.Second):
					t.Errorf("%v after %s, want it dropped after %s", err, took, tt.dropped)
				}
			})
		})
	}
}

// application is one whose name tells its timestamp.
func application(id int32, ts int64) *catalog.Application {
	m := meta(super, id)
	m.Timestamp = ts
	return &catalog.Application{Meta: m, Name: fmt.Sprintf("at-%d", ts), Owner: "ann", Policy: "Unlimited", TokenType: "JWT"}
}

func change(t testing.TB, r *replica.State, verb catalog.Verb, e catalog.Entity) {
	t.Helper()
	event, err := catalog.NewEvent(catalog.Change{Verb: verb, Entity: e})
	if err != nil {
		t.Fatal(err)
	}
	apply(t, r, event)
}

func apply(t testing.TB, r *replica.State, event revocation.Event) {
	t.Helper()
	at := r.At()
	event.Position, event.Time, event.Source = revocation.Position{Epoch: at.Epoch, Seq: at.Seq + 1}, time.Now(), superISS
	if err := r.Apply(event); err != nil {
		t.Fatal(err)
	}
}

func TestListsAreShared(t *testing.T) {
	t.Parallel()
	state := newState(t)
	w := newWorld(t, Config{}, state, noLedger{}, nil)
	encoded := func(step string, want float64) {
		t.Helper()
		if got := w.count(t, "rescind_eventhub_lists_total", listEncoded); got != want {
			t.Errorf("%s: encoded %v times, want %v", step, got, want)
		}
	}
	first := w.get("gateway", base+"/applications").Body.String()
	w.get("newer", base+"/applications", "xWSO2Tenant", "carbon.super")
	encoded("two accounts", 1)

	event, err := revocation.NewEvent(revocation.Revocation{
		ID: "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Target: revocation.Target{Kind: revocation.KindToken, Iss: superISS, ID: "new"},
		Tenant: super, Exp: time.Now().Unix() + 60,
	})
	if err != nil {
		t.Fatal(err)
	}
	apply(t, state.replica, event)
	if got := w.get("gateway", base+"/applications").Body.String(); got != first {
		t.Errorf("a revocation changed the applications: %s", got)
	}
	encoded("a revocation", 1)

	change(t, state.replica, catalog.Updated, application(42, 1760000000100))
	if got := w.get("gateway", base+"/applications").Body.String(); !strings.Contains(got, "at-1760000000100") {
		t.Errorf("the change is not there: %s", got)
	}
	encoded("a change", 2)
	change(t, state.replica, catalog.Deleted, application(42, 1760000000101))
	if got := ids(t, w.get("gateway", base+"/applications")); len(got) != 1 {
		t.Errorf("after one was deleted: %v", got)
	}
	encoded("a deletion", 3)

	w.get("org", base+"/applications")
	encoded("another tenant", 4)
	w.get("gateway", base+"/apis?gatewayLabel=Default")
	w.get("gateway", base+"/apis")
	encoded("a label, and none", 6)
	w.get("gateway", base+"/applications?appId=41")
	encoded("one entity", 6)
}

// What is kept stays within its bound, and what does not fit is sent all the same.
func TestListsAreBounded(t *testing.T) {
	t.Parallel()
	state := newState(t)
	all := testCatalog()
	for id := range int32(3000) { // more than is kept
		a := application(1000+id, 1)
		a.Attributes = map[string]string{"note": strings.Repeat("x", 400)}
		all = append(all, a)
	}
	labelled := &catalog.API{Meta: meta(super, 9000), Name: "Everywhere", Version: "1", Context: "/everywhere/1", Provider: "admin", Type: "HTTP", Status: catalog.APIPublished}
	for i := range 1500 {
		labelled.GatewayLabels = append(labelled.GatewayLabels, fmt.Sprintf("%0100d", i))
	}
	state.load(t, 60, append(all, labelled), nil)
	w := newWorld(t, Config{CacheBytes: 1 << 20}, state, noLedger{}, nil)
	if got := ids(t, w.get("gateway", base+"/applications")); len(got) != 3002 {
		t.Errorf("%d applications", len(got))
	}
	for i := range 1500 {
		w.get("gateway", fmt.Sprintf("%s/apis?gatewayLabel=%0100d", base, i))
	}
	held := w.count(t, "rescind_eventhub_cache_bytes")
	for i := range 500 {
		w.get("gateway", fmt.Sprintf("%s/apis?gatewayLabel=none-%0100d", base, i))
		w.get("all", fmt.Sprintf("%s/applications?organizationId=none-%d", base, i))
	}
	if got := w.count(t, "rescind_eventhub_cache_bytes"); got != held {
		t.Errorf("what is not there changed the bytes that are kept from %v to %v", held, got)
	}
	if held > 1<<20 || held < 1<<19 {
		t.Errorf("%v bytes are kept", held)
	}
}

// While the catalog changes, every answer has all that there was when it was asked for.
func TestListsAreFresh(t *testing.T) {
	t.Parallel()
	state := &fakeState{replica: replica.NewState(replica.StateConfig{Records: true})}
	state.load(t, 1, []catalog.Entity{application(1, 1)}, nil)
	free := func(context.Context) (func(), error) { return func() {}, nil }
	c := newLists(1<<20, free, newMetrics(prometheus.NewRegistry()))
	take := func() (l listing) {
		state.replica.View(func(v *replica.View) {
			l = applications(v, &query{tenants: selection{all: true}})
			l.at = v.At()
		})
		return l
	}
	ctx, stop := context.WithCancel(t.Context())
	var changed atomic.Int64
	changed.Store(1)
	var workers sync.WaitGroup
	for worker := range 4 {
		workers.Go(func() {
			for ctx.Err() == nil {
				want := changed.Load()
				plain, packed, err := c.get(ctx, "applications", state.replica.At(), worker%2 == 0, take)
				if ctx.Err() != nil {
					return
				}
				var list struct{ List []struct{ TimeStamp int64 } }
				if packed != nil {
					z, zErr := gzip.NewReader(bytes.NewReader(packed.bytes))
					if zErr != nil {
						t.Error(zErr)
						return
					}
					unpacked, zErr := io.ReadAll(z)
					if zErr != nil || !bytes.Equal(unpacked, plain.bytes) {
						t.Errorf("packed is something else than plain, %v", zErr)
					}
				}
				if err != nil || json.Unmarshal(plain.bytes, &list) != nil || len(list.List) != 1 || list.List[0].TimeStamp < want {
					t.Errorf("%v: want a timestamp of at least %d in %+v", err, want, list)
					return
				}
			}
		})
	}
	for ts := int64(2); ts < 2000; ts++ {
		change(t, state.replica, catalog.Updated, application(1, ts))
		changed.Store(ts)
	}
	stop()
	workers.Wait()
}

func FuzzAppendString(f *testing.F) {
	f.Add("plain")
	f.Add("\"\\/\b\f\n\r\t\x00é\u2028<&>\xff")
	f.Fuzz(func(t *testing.T, s string) {
		b := appendString([]byte("before"), s)
		var got string
		if err := json.Unmarshal(b[len("before"):], &got); err != nil {
			t.Fatalf("%q: %v", b, err)
		}
		if got != s && utf8.ValidString(s) {
			t.Errorf("%q became %q", s, got)
		}
	})
}

// A key of the image is found by the path that its listing gives it.
func FuzzKeys(f *testing.F) {
	f.Add("3f1d2c0e-7b1a-4f53-9a50-8a2f6b1f2f10")
	f.Add("a/b c%2F?#é..")
	f.Add("..")
	f.Fuzz(func(t *testing.T, jti string) {
		rec := replica.Record{Target: revocation.Target{Kind: revocation.KindToken, Iss: superISS, ID: jti}, Tenant: super, Exp: time.Now().Unix() + 60}
		if rec.Target.Validate() != nil {
			return // no such revocation is ever made
		}
		state := &fakeState{replica: replica.NewState(replica.StateConfig{Records: true})}
		state.load(t, 1, nil, []replica.Record{rec})
		w := newWorld(t, Config{}, state, noLedger{}, nil)
		var listed struct {
			Node struct{ Nodes []struct{ Key string } }
		}
		if err := json.Unmarshal(w.get("gateway", "/v2/keys/jti").Body.Bytes(), &listed); err != nil || len(listed.Node.Nodes) != 1 {
			t.Fatalf("%+v, %v", listed, err)
		}
		key := listed.Node.Nodes[0].Key
		var found struct{ Node struct{ Key string } }
		answer := w.get("gateway", "/v2/keys"+key)
		if err := json.Unmarshal(answer.Body.Bytes(), &found); answer.Code != http.StatusOK || err != nil || found.Node.Key != key {
			t.Errorf("%s: %d %s", key, answer.Code, answer.Body)
		}
	})
}

// The goal: 1,000,000 revocations to localhost in less than 3 s.
func BenchmarkRevokedJWT(b *testing.B) {
	state := &fakeState{replica: replica.NewState(replica.StateConfig{Records: true})}
	all := many(1_000_000, time.Now())
	for i := range all {
		all[i].Target.Kind = revocation.KindToken
	}
	state.load(b, 1, testCatalog(), all)
	w := newWorld(b, Config{}, state, noLedger{}, nil)
	server := httptest.NewServer(w.router)
	defer server.Close()
	for _, coding := range []string{"identity", "gzip"} {
		b.Run(coding, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				r, err := http.NewRequest(http.MethodGet, server.URL+base+"/revokedjwt", nil)
				if err != nil {
					b.Fatal(err)
				}
				r.SetBasicAuth("gateway", "right")
				r.Header.Set("Accept-Encoding", coding)
				resp, err := server.Client().Do(r)
				if err != nil {
					b.Fatal(err)
				}
				n, err := io.Copy(io.Discard, resp.Body)
				if err != nil || resp.StatusCode != http.StatusOK {
					b.Fatal(resp.StatusCode, err)
				}
				resp.Body.Close()
				b.SetBytes(n)
			}
		})
	}
}
