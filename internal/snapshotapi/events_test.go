package snapshotapi

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/follow"
)

// pollAnswer is the body of a poll, events by their seq.
type pollAnswer struct {
	Epoch         revocation.Epoch
	Head, Through *revocation.Seq
	Events        []json.RawMessage
}

func (p pollAnswer) seqs(t *testing.T) []revocation.Seq {
	t.Helper()
	seqs := []revocation.Seq{}
	for _, raw := range p.Events {
		e, err := revocation.ParseEvent(raw)
		if err != nil {
			t.Fatal(err)
		}
		seqs = append(seqs, e.Seq)
	}
	return seqs
}

func (s *served) poll(t *testing.T, path string, header ...string) pollAnswer {
	t.Helper()
	resp := s.do(s.request(path, header...))
	b := body(t, resp)
	var got pollAnswer
	if err := json.Unmarshal(b, &got); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s, error %v: %s", resp.Status, err, b)
	}
	if resp.Header.Get("Cache-Control") != "no-store" || resp.ContentLength != int64(len(b)) {
		t.Errorf("header is %v, body has %d bytes", resp.Header, len(b))
	}
	return got
}

func after(seq int) string { return fmt.Sprintf("/v1/events?after=%s:%d", epoch, seq) }

func TestPoll(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.tenant(pizza)
	s.follower.tenant(revocation.Tenant{ID: 8, Domain: "nobody.example"})
	for i := range 2500 { // every third is the pizzeria's
		tenant := revocation.SuperTenant
		if i%3 == 2 {
			tenant = pizza
		}
		s.follower.revoke(tenant, 0)
	}
	for _, tt := range []struct {
		name, user, path string
		first, n         int // what comes, 0 for nothing
		step             int
		through          revocation.Seq
	}{
		{"from the start", "admin", after(0), 1, 1000, 1, 1000},
		{"limit", "admin", after(41) + "&limit=3", 42, 3, 1, 44},
		{"the rest", "admin", after(2400), 2401, 100, 1, 2500},
		{"nothing", "admin", after(2500), 0, 0, 0, 2500},
		{"nothing, waiting", "admin", after(2500) + "&wait=10ms", 0, 0, 0, 2500},
		{"of one tenant", "admin", after(2490) + "&tenant=pizza.example", 2493, 3, 3, 2500},
		{"of one's own", "pizza-admin", after(0) + "&limit=2", 3, 2, 3, 6},
		{"others' only", "admin", after(0) + "&tenant=nobody.example", 0, 0, 0, 2500},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := s.poll(t, tt.path, "user", tt.user)
			want := []revocation.Seq{}
			for i := range tt.n {
				want = append(want, revocation.Seq(tt.first+i*tt.step))
			}
			if diff := cmp.Diff(want, got.seqs(t)); diff != "" {
				t.Errorf("seqs (-want +got):\n%s", diff)
			}
			if got.Epoch != epoch || *got.Head != 2500 || *got.Through != tt.through {
				t.Errorf("epoch %s, head %d, through %d; want through %d", got.Epoch, *got.Head, *got.Through, tt.through)
			}
		})
	}
	t.Run("HEAD", func(t *testing.T) {
		req := s.request(after(0))
		req.Method = http.MethodHead
		if resp := s.do(req); resp.StatusCode != http.StatusOK || resp.ContentLength < 100 {
			t.Errorf("%s, length %d", resp.Status, resp.ContentLength)
		}
	})
}

func TestPollWaits(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{MaxStreams: 1})
	answers := make(chan pollAnswer, 1)
	wait := func(user string) {
		at := s.follower.replica.At().Seq
		go func() { answers <- s.poll(t, after(int(at))+"&wait=1m", "user", user) }()
		await(t, "the poll is there", func() bool { return s.metric("rescind_events_readers") == 1 })
	}
	wait("gateway")
	if resp := s.do(s.request(after(0))); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("past the bound: %s", resp.Status)
	}
	s.follower.revoke(pizza, 0) // not for this one
	s.follower.revoke(revocation.SuperTenant, 0)
	if got := <-answers; len(got.Events) != 1 || *got.Through != 2 {
		t.Errorf("answer is %+v", got)
	}
	await(t, "the poll is over", func() bool { return s.metric("rescind_events_readers") == 0 })

	wait("gateway")
	s.follower.revoke(pizza, 0)
	s.api.Close()
	if got := <-answers; len(got.Events) != 0 || *got.Through != 3 {
		t.Errorf("answer when the service stops is %+v", got)
	}
}

func TestPollErrors(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.fill(50)
	s.follower.revoke(pizza, 0)
	for _, tt := range []struct {
		path   string
		status int
		typ    string
	}{
		{"/v1/events", 400, "/invalid-parameter"},
		{"/v1/events?after=", 400, "/invalid-parameter"},
		{"/v1/events?after=51", 400, "/invalid-parameter"},
		{after(-1), 400, "/invalid-parameter"},
		{after(50) + "0000000000000000000", 400, "/invalid-parameter"},
		{after(50) + "x", 400, "/invalid-parameter"},
		{after(50) + "&wait=61s", 400, "/invalid-parameter"},
		{after(50) + "&wait=-1s", 400, "/invalid-parameter"},
		{after(50) + "&wait=30", 400, "/invalid-parameter"},
		{after(50) + "&limit=1001", 400, "/invalid-parameter"},
		{after(50) + "&cursor=x", 400, "/invalid-parameter"},
		{after(52), 400, "/invalid-parameter"},
		{after(49), 410, "/seq-gone"},
		{"/v1/events?after=" + string(epoch2) + ":50", 410, "/seq-gone"},
	} {
		t.Run(tt.path, func(t *testing.T) {
			resp := s.do(s.request(tt.path))
			var p struct {
				Type, Detail string
				Epoch        revocation.Epoch
				Seq          revocation.Seq
			}
			if err := json.Unmarshal(body(t, resp), &p); err != nil || resp.StatusCode != tt.status || !strings.HasSuffix(p.Type, tt.typ) || p.Detail == "" {
				t.Errorf("%s, %+v, error %v", resp.Status, p, err)
			}
			if tt.status == http.StatusGone && (p.Epoch != epoch || p.Seq != 51) {
				t.Errorf("members are %s and %d, want where the log is", p.Epoch, p.Seq)
			}
		})
	}
}

// failingFresh is a follower that has events but cannot read the head.
type failingFresh struct{ *fakeFollower }

func (failingFresh) Fresh(context.Context, time.Duration) (revocation.Position, error) {
	return revocation.Position{}, follow.ErrStale
}

// Revocations that are known are not kept back because it is not known whether there
// are more.
func TestPollWithoutHead(t *testing.T) {
	t.Parallel()
	f := newFakeFollower(t)
	s := serveFollower(t, Config{}, failingFresh{f})
	f.revoke(pizza, 0)
	if got := s.poll(t, after(0)); len(got.Events) != 1 || got.Head != nil || *got.Through != 1 {
		t.Errorf("answer is %+v", got)
	}
	if resp := s.do(s.request(after(1))); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("without events: %s", resp.Status)
	}
}

// sse is a server-sent event.
type sse struct{ ID, Event, Data string }

// source reads a stream as a browser does (HTML, section 9.2.6).
type source struct {
	t    *testing.T
	resp *http.Response
	in   *bufio.Reader
}

func (s *served) source(t *testing.T, path string, header ...string) *source {
	t.Helper()
	resp := s.do(s.request(path, append([]string{"Accept", "text/event-stream"}, header...)...))
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s", resp.Status, body(t, resp))
	}
	return &source{t, resp, bufio.NewReader(resp.Body)}
}

// read returns the next event, and [io.EOF] when the stream has ended well.
func (s *source) read() (sse, error) {
	var e sse
	for {
		line, err := s.in.ReadString('\n')
		if err != nil {
			return e, err
		}
		switch name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); name {
		case "id":
			e.ID = value
		case "event":
			e.Event = value
		case "data":
			e.Data = value
			if e.Event == "heartbeat" {
				if e, err = e.timeless(); err != nil {
					return e, err
				}
			}
		case "": // also a comment
			if e.Data != "" {
				return e, nil
			}
		case "retry":
			if value != "3000" {
				return e, fmt.Errorf("retry is %s", value)
			}
		default:
			return e, fmt.Errorf("line is %q", line)
		}
	}
}

// timeless takes the time out of a heartbeat, which must be of now, or somewhat before.
func (e sse) timeless() (sse, error) {
	data, rest, ok := strings.Cut(e.Data, `,"time":"`)
	text, ok2 := strings.CutSuffix(rest, `"}`)
	at, err := time.Parse("2006-01-02T15:04:05.000Z", text)
	if !ok || !ok2 || err != nil || time.Until(at) > 0 || time.Since(at) > time.Minute {
		return e, fmt.Errorf("the heartbeat is %s", e.Data)
	}
	e.Data = data + "}"
	return e, nil
}

func (s *source) want(events ...sse) {
	s.t.Helper()
	for _, want := range events {
		got, err := s.read()
		if err != nil {
			s.t.Fatalf("read stream: %v", err)
		}
		if want.Data == "" {
			got.Data = ""
		}
		if diff := cmp.Diff(want, got); diff != "" {
			s.t.Fatalf("event (-want +got):\n%s", diff)
		}
	}
}

func event(seq int) sse {
	return sse{ID: fmt.Sprintf("%s:%d", epoch, seq), Event: "revocation.token"}
}

func heartbeat(head, through int) sse {
	return sse{
		ID: fmt.Sprintf("%s:%d", epoch, through), Event: "heartbeat",
		Data: fmt.Sprintf(`{"epoch":"%s","head":%d,"through":%d}`, epoch, head, through),
	}
}

// aged is a follower that knows heads as old as they may be, of a log with an event each millisecond,
// and those that are newer than it has maybe not in time.
type aged struct {
	*fakeFollower
	begin time.Time
	has   time.Duration
}

func (f aged) headAt(t time.Time) revocation.Seq {
	return revocation.Seq(t.Sub(f.begin).Milliseconds())
}

func (f aged) Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error) {
	if maxAge < f.has {
		<-ctx.Done()
		return revocation.Position{}, context.Cause(ctx)
	}
	return revocation.Position{Epoch: epoch, Seq: f.headAt(time.Now().Add(-maxAge))}, nil
}

// A heartbeat's time is no later than its head, and not much earlier.
func TestHeartbeatTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			has, age time.Duration
		}{{0, beatAge}, {beatAge, beatAge}, {headAge, headAge}, {time.Hour, -1}} {
			f := aged{newFakeFollower(t), time.Now().Add(-time.Hour), tt.has}
			began := time.Now()
			frame := string(beat(t.Context(), f, revocation.Position{Epoch: epoch}))
			if took := time.Since(began); took > beatTimeout {
				t.Errorf("a heartbeat took %s", took)
			}
			_, data, ok := strings.Cut(frame, "data: ")
			if tt.age < 0 {
				if ok {
					t.Errorf("it says what it does not know: %s", frame)
				}
				continue
			}
			var got struct {
				Head revocation.Seq
				Time time.Time
			}
			if err := json.Unmarshal([]byte(data), &got); err != nil {
				t.Fatalf("%q: %v", frame, err)
			}
			if got.Head != f.headAt(got.Time) || time.Since(got.Time) < tt.age || time.Since(got.Time) > tt.age+time.Millisecond {
				t.Errorf("%s, at %s: the head was %d then", frame, time.Now(), f.headAt(got.Time))
			}
		}
	})
}

func reset(epoch revocation.Epoch, seq int) sse {
	return sse{ID: fmt.Sprintf("%s:%d", epoch, seq), Event: "reset", Data: fmt.Sprintf(`{"epoch":"%s","seq":%d}`, epoch, seq)}
}

func TestStreamConformance(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{}, func(a *API) { a.hub.beatEvery = 50 * time.Millisecond })
	s.follower.fill(40)
	for range 3 {
		s.follower.revoke(revocation.SuperTenant, 0)
	}
	t.Run("C105", func(t *testing.T) {
		src := s.source(t, "/v1/events", "user", "gateway")
		for name, want := range map[string]string{
			"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no", "Content-Length": "",
		} {
			if got := src.resp.Header.Get(name); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
		first, err := src.in.Peek(len("retry: 3000\n"))
		if err != nil || string(first) != "retry: 3000\n" {
			t.Errorf("stream begins with %q, error %v", first, err)
		}
		src.want(heartbeat(43, 43))
		src.want(heartbeat(43, 43)) // although it is quiet
		s.follower.revoke(revocation.SuperTenant, 0)
		for {
			e, err := src.read()
			if err != nil {
				t.Fatal(err)
			}
			if e.Event == "heartbeat" {
				continue
			}
			if _, err := revocation.ParseEvent([]byte(e.Data)); err != nil || e.ID != event(44).ID || e.Event != "revocation.token" {
				t.Errorf("event is %+v: %v", e, err)
			}
			break
		}
	})
	t.Run("C106", func(t *testing.T) {
		s.source(t, "/v1/events", "Last-Event-ID", string(epoch)+":41").want(event(42), event(43), event(44), heartbeat(44, 44))
		s.source(t, after(42)).want(event(43))
		s.source(t, after(0), "Last-Event-ID", string(epoch)+":43").want(event(44))
	})
	t.Run("C107", func(t *testing.T) {
		for _, id := range []string{
			string(epoch) + ":39", "abc", string(epoch2) + ":41", string(epoch) + ":-1", string(epoch) + ":4\u00e9", string(epoch) + ":45",
		} {
			s.source(t, "/v1/events", "Last-Event-ID", id).want(reset(epoch, 44), heartbeat(44, 44))
		}
		s.source(t, after(39)).want(reset(epoch, 44))
		if resp := s.do(s.request("/v1/events?after=abc", "Accept", "text/event-stream")); resp.StatusCode != http.StatusBadRequest {
			t.Errorf("a parameter that is garbage: %s", resp.Status)
		}
	})
	t.Run("C113", func(t *testing.T) {
		for _, trace := range []string{
			"00-00000000000000000000000000000000-00f067aa0ba902b7-01", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", "ff-x",
		} {
			s.source(t, after(43), "traceparent", trace).want(event(44))
		}
	})
	t.Run("HEAD", func(t *testing.T) {
		req := s.request("/v1/events", "Accept", "text/event-stream")
		req.Method = http.MethodHead
		if resp := s.do(req); resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" {
			t.Errorf("%s, %v", resp.Status, resp.Header)
		}
	})
	t.Run("Accept", func(t *testing.T) {
		for accept, want := range map[string]string{
			"": "application/json", "*/*": "application/json", "application/json": "application/json",
			"text/event-stream;q=0": "application/json", "application/json, text/event-stream;q=0.9": "application/json",
			"text/*": "application/json", "TEXT/Event-Stream ; q=0.5, application/json;q=0.2": "text/event-stream",
		} {
			resp := s.do(s.request(after(44), "Accept", accept))
			if got := resp.Header.Get("Content-Type"); got != want {
				t.Errorf("Accept: %s: %s, want %s", accept, got, want)
			}
			resp.Body.Close()
		}
	})
}

func TestStreamOfTenants(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{}, func(a *API) { a.hub.beatEvery = 20 * time.Millisecond })
	s.follower.tenant(pizza)
	for user, want := range map[string]int{"gateway": http.StatusForbidden, "admin": http.StatusNotFound} {
		for _, accept := range []string{"text/event-stream", "application/json"} {
			resp := s.do(s.request("/v1/events?tenant=nobody.example&after="+string(epoch)+":0", "user", user, "Accept", accept))
			if resp.StatusCode != want {
				t.Errorf("%s as %s: %s, want %d", user, accept, resp.Status, want)
			}
		}
	}
	src := s.source(t, "/v1/events", "user", "gateway")
	src.want(heartbeat(0, 0))
	s.follower.revoke(pizza, 0)
	s.follower.revoke(pizza, 0)
	for { // what was for others is in through
		e, err := src.read()
		if err != nil || e.Event != "heartbeat" {
			t.Fatal(e, err)
		}
		if e == heartbeat(2, 2) {
			break
		}
	}
	s.follower.revoke(revocation.SuperTenant, 0)
	for {
		e, err := src.read()
		if err != nil || e.Event != "heartbeat" && e.ID != event(3).ID {
			t.Fatal(e, err)
		}
		if e.Event != "heartbeat" {
			break
		}
	}
	s.source(t, "/v1/events?tenant=pizza.example", "Last-Event-ID", string(epoch)+":1").want(event(2))
}

func TestStreamOfANewEpoch(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{})
	s.follower.revoke(pizza, 0)
	src := s.source(t, "/v1/events")
	src.want(heartbeat(1, 1))
	s.follower.restart(revocation.Position{Epoch: epoch2, Seq: 7})
	src.want(reset(epoch2, 7))
	s.follower.revoke(pizza, 0)
	src.want(sse{ID: string(epoch2) + ":8", Event: "revocation.token"})
	s.source(t, "/v1/events", "Last-Event-ID", string(epoch2)+":7").want(sse{ID: string(epoch2) + ":8", Event: "revocation.token"})
	s.source(t, "/v1/events", "Last-Event-ID", string(epoch)+":1").want(reset(epoch2, 8))
}

func TestStreamEnds(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{MaxStreams: 1})
	src := s.source(t, "/v1/events")
	src.want(heartbeat(0, 0))
	if resp := s.do(s.request("/v1/events", "Accept", "text/event-stream")); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("past the bound: %s", resp.Status)
	}
	s.api.Close()
	s.api.Close()
	if e, err := src.read(); err != io.EOF {
		t.Errorf("after Close: %+v, %v, want the end", e, err)
	}
	await(t, "the stream is over", func() bool { return s.metric("rescind_events_readers") == 0 })
	src = s.source(t, "/v1/events")
	src.want(heartbeat(0, 0))
	if e, err := src.read(); err != io.EOF {
		t.Errorf("begun after Close: %+v, %v, want the end", e, err)
	}

	// Whoever may no longer read learns nothing more some time later.
	s = serve(t, Config{}, func(a *API) { a.streamFor = 50 * time.Millisecond })
	src = s.source(t, "/v1/events")
	src.want(heartbeat(0, 0))
	if e, err := src.read(); err != io.EOF {
		t.Errorf("when it is time to ask again who reads: %+v, %v, want the end", e, err)
	}
}

// Whenever and wherever streams begin, and even if they are dropped and come back, each
// gets what follows, once and in order.
func TestStreamHasNoGaps(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{MaxBehind: 1 << 20})
	total, readers := size(2000, 4000), size(20, 40)
	done := make(chan struct{})
	var all sync.WaitGroup
	for i := range readers {
		user, tenant := "admin", ""
		if i%4 == 3 {
			user, tenant = "pizza-admin", pizza.Domain
		}
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			for {
				last := revocation.Seq(rnd.Int64N(int64(s.follower.replica.At().Seq) + 1))
				n := rnd.IntN(2000)
				end, err := s.follow(last, n, user, tenant, revocation.Seq(total))
				for err == io.EOF { // it was too slow
					end, err = s.follow(end, n, user, tenant, revocation.Seq(total))
				}
				if err != nil {
					t.Errorf("reader %d from %d: %v", i, last, err)
					return
				}
				if end == revocation.Seq(total) {
					return
				}
			}
		})
	}
	go func() {
		defer close(done)
		rnd := rand.New(rand.NewPCG(7, 7))
		for range total - 1 {
			tenant := revocation.SuperTenant
			if rnd.IntN(5) == 0 {
				tenant = pizza
			}
			s.follower.revoke(tenant, rnd.IntN(200))
			if rnd.IntN(50) == 0 {
				pause(t.Context(), time.Duration(rnd.IntN(30))*time.Millisecond)
			}
		}
		s.follower.revoke(pizza, 0) // the end, for all to see
	}()
	<-done
	all.Wait()
}

// follow reads n events after last, or up to the one that is total, and returns the last.
func (s *served) follow(last revocation.Seq, n int, user, tenant string, total revocation.Seq) (revocation.Seq, error) {
	req := s.request("/v1/events", "user", user, "Accept", "text/event-stream", "Last-Event-ID", fmt.Sprintf("%s:%d", epoch, last))
	resp, err := plainClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	src := &source{nil, resp, bufio.NewReader(resp.Body)}
	for range n {
		e, err := src.read()
		if err != nil {
			return last, err
		}
		_, id, _ := strings.Cut(e.ID, ":")
		seq, err := strconv.ParseInt(id, 10, 64)
		if err != nil {
			return 0, err
		}
		switch {
		case e.Event == "heartbeat":
			if revocation.Seq(seq) < last {
				return 0, fmt.Errorf("a heartbeat is through %d after event %d", seq, last)
			}
			continue
		case e.Event != "revocation.token":
			return 0, fmt.Errorf("event is %+v", e)
		}
		for want := last + 1; ; want++ {
			if want > revocation.Seq(seq) {
				return 0, fmt.Errorf("event %d after %d", seq, last)
			}
			s.follower.mu.Lock()
			visible := tenant == "" || s.follower.frames[want-1].Tenant == tenant
			s.follower.mu.Unlock()
			if want == revocation.Seq(seq) {
				break
			}
			if visible {
				return 0, fmt.Errorf("event %d after %d, without %d", seq, last, want)
			}
		}
		if last = revocation.Seq(seq); last == total {
			return last, nil
		}
	}
	return last, nil
}

// A burst is for those who can take it; who cannot is dropped, and nobody waits for it.
func TestStreamSlowReaderIsDropped(t *testing.T) {
	t.Parallel()
	for reason, cfg := range map[string]struct {
		behind  int
		timeout time.Duration
		total   int
	}{
		droppedBehind:  {4 << 20, time.Minute, size(400, 1000)}, // 16 MB, of which some wait in the system's buffers
		droppedStalled: {1 << 30, time.Second, size(350, 500)},
	} {
		t.Run(reason, func(t *testing.T) {
			t.Parallel()
			s := serve(t, Config{MaxBehind: cfg.behind}, func(a *API) { a.sendTimeout = cfg.timeout })
			req := s.request("/v1/events", "Accept", "text/event-stream")
			conn := s.stuck(req)
			fast := s.source(t, "/v1/events")
			fast.want(heartbeat(0, 0))
			await(t, "both are there", func() bool { return s.metric("rescind_events_readers") == 2 })
			go func() {
				for range cfg.total {
					s.follower.revoke(pizza, 40<<10)
				}
			}()
			for seq := 1; seq <= cfg.total; {
				e, err := fast.read()
				if err != nil {
					t.Fatalf("the fast reader after %d events: %v", seq-1, err)
				}
				if e.Event == "heartbeat" {
					continue
				}
				if e.ID != event(seq).ID {
					t.Fatalf("the fast reader got %s, want %d", e.ID, seq)
				}
				seq++
			}
			if reason == droppedBehind { // it notices when it reads on
				if _, err := io.Copy(io.Discard, conn); err != nil {
					t.Fatal(err)
				}
			}
			await(t, "the slow reader is dropped", func() bool { return s.metric("rescind_events_readers") == 1 })
			if got := s.metric("rescind_events_dropped_total"); got != 1 {
				t.Errorf("%v were dropped, want 1", got)
			}
		})
	}
}

// A burst of more than a reader may be behind the fastest does not drop the fastest.
func TestStreamBurst(t *testing.T) {
	t.Parallel()
	s := serve(t, Config{MaxBehind: 2 << 20})
	total := size(200, 1500) // 8 MB
	src := s.source(t, "/v1/events")
	src.want(heartbeat(0, 0))
	s.follower.set(func() { s.follower.held = true })
	for range total {
		s.follower.revoke(pizza, 40<<10)
	}
	s.follower.set(func() { s.follower.held = false })
	for seq := 1; seq <= total; {
		e, err := src.read()
		if err != nil || e.Event != "heartbeat" && e.ID != event(seq).ID {
			t.Fatalf("%s after %d events, error %v", e.ID, seq-1, err)
		}
		if e.Event != "heartbeat" {
			seq++
		}
	}
}

func TestStreamWithoutHead(t *testing.T) {
	t.Parallel()
	f := newFakeFollower(t)
	s := serveFollower(t, Config{}, failingFresh{f}, func(a *API) { a.hub.beatEvery = 20 * time.Millisecond })
	if resp := s.do(s.request("/v1/events", "Accept", "text/event-stream")); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a live stream: %s", resp.Status)
	}
	src := s.source(t, after(0))
	for { // no heartbeat that would say what is not known
		line, err := src.in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(line, "event:") {
			t.Fatal(line)
		}
		if strings.HasPrefix(line, ":") {
			break
		}
	}
	f.revoke(pizza, 0)
	src.want(event(1))
	f.set(func() { f.stale = errors.New("no database") })
	if resp := s.do(s.request(after(0), "Accept", "text/event-stream")); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("a stream from before: %s", resp.Status)
	}
}

// changing is accounts of which a test decides what they are now.
type changing struct {
	mu      sync.Mutex
	account authn.Account
	err     error
	asked   int
}

func (c *changing) Account(*http.Request) (authn.Account, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	return c.account, c.err
}

func (c *changing) set(a authn.Account, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.account, c.err = a, err
}

// Whoever may no longer read what a stream has learns nothing more, but a database that is
// away for a while ends no stream.
func TestStreamAsksAgainWhoReads(t *testing.T) {
	t.Parallel()
	gateway := authn.Account{Username: "gw", Tenant: revocation.SuperTenant, Role: "gateway", ExtraTenants: []string{pizza.Domain}}
	auditor, notifier, fewer, other := gateway, gateway, gateway, gateway
	auditor.Role, notifier.Role, fewer.ExtraTenants = "auditor", "notifier", nil
	other.ExtraTenants = []string{"*"}
	refused := func(status int) error { return &authn.OAuthError{Status: status} }
	for _, tt := range []struct {
		name    string
		account authn.Account
		err     error
		query   string
		ends    bool
	}{
		{"the same", gateway, nil, "", false},
		{"another role that may", auditor, nil, "", false},
		{"deleted", authn.Account{}, refused(http.StatusUnauthorized), "", true},
		{"forbidden", authn.Account{}, refused(http.StatusForbidden), "", true},
		{"role", notifier, nil, "", true},
		{"fewer tenants", fewer, nil, "", true},
		{"more tenants", other, nil, "", true},
		{"no longer the one tenant", fewer, nil, "?tenant=pizza.example", true},
		{"fewer tenants, but not the one", fewer, nil, "?tenant=carbon.super", false},
		{"busy", authn.Account{}, refused(http.StatusServiceUnavailable), "", false},
		{"throttled", authn.Account{}, refused(http.StatusTooManyRequests), "", false},
		{"no answer", authn.Account{}, context.DeadlineExceeded, "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			who := &changing{account: gateway}
			s := serve(t, Config{}, func(a *API) {
				a.accounts, a.askEvery = who, 20*time.Millisecond
				a.hub.beatEvery = 50 * time.Millisecond
			})
			src := s.source(t, "/v1/events"+tt.query)
			src.want(heartbeat(0, 0))
			who.set(tt.account, tt.err)
			if tt.ends {
				for {
					if _, err := src.read(); err == io.EOF {
						return
					} else if err != nil {
						t.Fatal(err)
					}
				}
			}
			who.mu.Lock()
			before := who.asked
			who.mu.Unlock()
			for asked := before; asked < before+5; {
				if e, err := src.read(); err != nil || e.Event != "heartbeat" {
					t.Fatal(e, err)
				}
				who.mu.Lock()
				asked = who.asked
				who.mu.Unlock()
			}
		})
	}
}

// lagging is a follower whose old events take long to come.
type lagging struct {
	*fakeFollower
	every time.Duration
}

func (l lagging) Frames(ctx context.Context, after revocation.Position, limit int) ([]follow.Frame, error) {
	if after.Seq < l.replica.At().Seq {
		t := time.NewTimer(l.every)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return l.fakeFollower.Frames(ctx, after, min(limit, 10))
}

// Whatever the service has to look at before there is something for the reader, it is told
// how far that is.
func TestOthersEventsTakeLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := lagging{newFakeFollower(t), 300 * time.Millisecond}
		for range 2000 {
			f.revoke(revocation.SuperTenant, 0)
		}
		a, err := New(Config{}, Deps{Follower: f, Accounts: accounts, Registerer: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		q := query{scope: scope{key: pizza.Domain, domains: []string{pizza.Domain}}, limit: maxLimit}
		begin := time.Now()
		found, at, err := a.find(t.Context(), q, revocation.Position{Epoch: epoch}, time.Minute)
		if took := time.Since(begin); err != nil || len(found) != 0 || at.Seq < 30 || took < pollWork || took > pollWork+time.Second {
			t.Errorf("after %s: %d events through %s, %v", took, len(found), at, err)
		}
		f.every = time.Hour // there is nothing to be had
		a.follower = f
		begin = time.Now()
		_, same, err := a.find(t.Context(), q, at, 0)
		if took := time.Since(begin); err != nil || same != at || took > pollWork {
			t.Errorf("after %s: through %s, %v", took, same, err)
		}

		f.every = 300 * time.Millisecond
		a.follower, a.hub.follower = f, f
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		w := &written{ResponseRecorder: httptest.NewRecorder()}
		r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/v1/events", nil)
		s := &stream{api: a, r: r, query: q, conn: a.connection(w), at: at, last: time.Now(), ask: time.Now().Add(time.Hour), end: time.Now().Add(time.Hour)}
		s.run(ctx)
		if len(w.at) < 3 {
			t.Fatalf("%d writes in 20s", len(w.at))
		}
		for i := 1; i < len(w.at); i++ {
			if pause := w.at[i].Sub(w.at[i-1]); pause > beatEvery+time.Second {
				t.Errorf("nothing was written for %s", pause)
			}
		}
		if body := w.Body.String(); !strings.Contains(body, fmt.Sprintf(`"through":%d}`, s.at.Seq)) && !strings.Contains(body, "heartbeat") {
			t.Errorf("stream is %s", body)
		}
	})
}

// written notes when something was.
type written struct {
	*httptest.ResponseRecorder
	at []time.Time
}

func (w *written) Write(b []byte) (int, error) {
	w.at = append(w.at, time.Now())
	return w.ResponseRecorder.Write(b)
}
