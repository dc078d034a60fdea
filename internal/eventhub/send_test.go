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
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
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
	state := &fakeState{replica: replica.New(replica.Config{Records: true})}
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

func (s *slowWriter) Write(b []byte) (int, error) {
	s.once.Do(func() { close(s.begun) })
	if err := <-s.released; err != nil {
		return 0, err
	}
	return s.ResponseRecorder.Write(b)
}

// Past its bound a list of revocations waits for its turn, and is refused only when the
// wait was long. Other requests go on.
func TestStreamsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		state := newState(t)
		state.load(t, 50, testCatalog(), many(3000, time.Now()))
		w := newWorld(t, Config{MaxStreams: 1, StreamWait: 20 * time.Second, MaxInFlight: 3}, state, noLedger{}, nil)
		slow := &slowWriter{ResponseRecorder: httptest.NewRecorder(), begun: make(chan struct{}), released: make(chan error)}
		r := httptest.NewRequest(http.MethodGet, base+"/revokedjwt", nil)
		r.SetBasicAuth("gateway", "right")
		var sent sync.WaitGroup
		sent.Go(func() { w.router.ServeHTTP(slow, r) })
		<-slow.begun

		start := time.Now()
		rec := w.get("gateway", "/v2/keys/jti")
		if rec.Code != http.StatusServiceUnavailable || rec.Header().Get("Retry-After") != "5" || time.Since(start) != 20*time.Second {
			t.Errorf("while another is sent: %d after %s", rec.Code, time.Since(start))
		}
		if rec := w.get("gateway", base+"/subscriptions"); rec.Code != http.StatusOK {
			t.Errorf("another resource: %d", rec.Code)
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
			t.Errorf("the fourth request at once: %d", rec.Code)
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

// deadlines notes what deadline each piece has.
type deadlines struct {
	http.ResponseWriter
	at    time.Time
	sizes []int
}

func (d *deadlines) SetWriteDeadline(at time.Time) error { d.at = at; return nil }

func (d *deadlines) Write(b []byte) (int, error) {
	if d.at.Before(time.Now().Add(readerTime / 2)) {
		return 0, errors.New("no time was given")
	}
	d.sizes, d.at = append(d.sizes, len(b)), time.Time{}
	return len(b), nil
}

func TestPaced(t *testing.T) {
	t.Parallel()
	d := &deadlines{}
	n, err := newPaced(d).Write(make([]byte, 2*pieceBytes+7))
	if diff := cmp.Diff([]int{pieceBytes, pieceBytes, 7}, d.sizes); n != 2*pieceBytes+7 || err != nil || diff != "" {
		t.Errorf("%d bytes, %v: %s", n, err, diff)
	}
}

// application is one whose name tells its timestamp.
func application(id int32, ts int64) *catalog.Application {
	m := meta(super, id)
	m.Timestamp = ts
	return &catalog.Application{Meta: m, Name: fmt.Sprintf("at-%d", ts), Owner: "ann", Policy: "Unlimited", TokenType: "JWT"}
}

func change(t testing.TB, r *replica.Replica, verb catalog.Verb, e catalog.Entity) {
	t.Helper()
	event, err := catalog.NewEvent(catalog.Change{Verb: verb, Entity: e})
	if err != nil {
		t.Fatal(err)
	}
	apply(t, r, event)
}

func apply(t testing.TB, r *replica.Replica, event revocation.Event) {
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
	for id := range int32(3000) {
		a := application(1000+id, 1)
		a.Attributes = map[string]string{"note": strings.Repeat("x", 400)}
		all = append(all, a)
	}
	state.load(t, 60, all, nil)
	w := newWorld(t, Config{CacheBytes: 1 << 20}, state, noLedger{}, nil)
	if got := ids(t, w.get("gateway", base+"/applications")); len(got) != 3002 {
		t.Errorf("%d applications", len(got))
	}
	for i := range 3000 {
		w.get("gateway", fmt.Sprintf("%s/apis?gatewayLabel=%0100d", base, i))
	}
	if held := w.count(t, "rescind_eventhub_cache_bytes"); held > 1<<20 || held < 1<<19 {
		t.Errorf("%v bytes are kept", held)
	}
}

// While the catalog changes, every answer has all that there was when it was asked for.
func TestListsAreFresh(t *testing.T) {
	t.Parallel()
	state := &fakeState{replica: replica.New(replica.Config{Records: true})}
	state.load(t, 1, []catalog.Entity{application(1, 1)}, nil)
	c := newLists(1<<20, newMetrics(prometheus.NewRegistry()))
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
					z, zErr := gzip.NewReader(bytes.NewReader(packed))
					if zErr != nil {
						t.Error(zErr)
						return
					}
					unpacked, zErr := io.ReadAll(z)
					if zErr != nil || !bytes.Equal(unpacked, plain) {
						t.Errorf("packed is something else than plain, %v", zErr)
					}
				}
				if err != nil || json.Unmarshal(plain, &list) != nil || len(list.List) != 1 || list.List[0].TimeStamp < want {
					t.Errorf("%s, %v: want a timestamp of at least %d", plain, err, want)
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
			t.Skip()
		}
		state := &fakeState{replica: replica.New(replica.Config{Records: true})}
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
	state := &fakeState{replica: replica.New(replica.Config{Records: true})}
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
