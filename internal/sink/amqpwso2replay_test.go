package sink

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relaytest"
	"github.com/rescindhq/rescind/internal/stacktest"
)

// replayed is a message that a lane published, and when, from the start of the test.
type replayed struct {
	at    time.Duration
	token string
}

// lane is a replay without a broker, for tests within synctest.
type lane struct {
	*wso2Replay
	begun time.Time
	log   strings.Builder

	mu    sync.Mutex
	calls int
	sent  []replayed
	fail  error // of publish, if set
}

func newLane(t *testing.T, cfg AMQPWSO2Config) *lane {
	l := &lane{begun: time.Now()}
	// The publisher is never opened.
	publisher, err := newWSO2Publisher("amqp-wso2", "", AMQPBroker{URL: "amqp://u:p@h/"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.wso2Replay = newWSO2Replay(cfg, "tokenRevocation", publisher, slog.New(slog.NewTextHandler(&l.log, nil)))
	l.publish = func(_ context.Context, messages []amqp.Publishing) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.calls++
		if l.fail != nil {
			return l.fail
		}
		for _, m := range messages {
			l.sent = append(l.sent, replayed{time.Since(l.begun), tokenIn(t, m.Body)})
		}
		return nil
	}
	return l
}

func (l *lane) failing(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail = err
}

// taken returns what was published since the last call.
func (l *lane) taken() []replayed {
	l.mu.Lock()
	defer l.mu.Unlock()
	sent := l.sent
	l.sent = nil
	return sent
}

func tokenIn(t *testing.T, body []byte) string {
	t.Helper()
	var m struct {
		Event struct {
			PayloadData struct {
				RevokedToken string `json:"revokedToken"`
			} `json:"payloadData"`
		} `json:"event"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		t.Error(err)
	}
	return m.Event.PayloadData.RevokedToken
}

// tokensOf are n live revocations, t-1 to t-n, that end an hour from now.
func tokensOf(n int) []revocation.Revocation {
	list := make([]revocation.Revocation, n)
	for i := range list {
		list[i] = revocation.Revocation{
			Target: revocation.Target{Kind: revocation.KindToken, Iss: "https://km.example.com", ID: fmt.Sprintf("t-%d", i+1)},
			Tenant: revocation.SuperTenant, Exp: time.Now().Unix() + 3600,
		}
	}
	return list
}

func listing(list []revocation.Revocation) func(context.Context) iter.Seq2[revocation.Revocation, error] {
	return func(context.Context) iter.Seq2[revocation.Revocation, error] {
		return func(yield func(revocation.Revocation, error) bool) {
			for _, r := range list {
				if !yield(r, nil) {
					return
				}
			}
		}
	}
}

func eventsOf(t *testing.T, list []revocation.Revocation) []revocation.Event {
	t.Helper()
	events := make([]revocation.Event, len(list))
	for i, r := range list {
		e, err := revocation.NewEvent(r)
		if err != nil {
			t.Fatal(err)
		}
		e.Position = revocation.Position{Epoch: relaytest.Epoch, Seq: revocation.Seq(i + 1)}
		events[i] = e
	}
	return events
}

func tokensSent(sent []replayed) (list []string) {
	for _, r := range sent {
		list = append(list, r.token)
	}
	return list
}

func TestReplaySpacing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLane(t, AMQPWSO2Config{MinSpacing: 50 * time.Millisecond})
		l.start(t.Context())
		list := tokensOf(4)
		list[2].Target.Kind = revocation.KindClient
		l.add(eventsOf(t, list))
		time.Sleep(3 * time.Second)
		l.add(eventsOf(t, tokensOf(1)))
		l.add(changeEventsOf(t))
		time.Sleep(time.Second)
		ms := time.Millisecond
		want := []replayed{{0, "t-1"}, {50 * ms, "t-2"}, {100 * ms, "t-4"}, {3000 * ms, "t-1"}}
		if diff := cmp.Diff(want, l.taken(), cmp.AllowUnexported(replayed{})); diff != "" {
			t.Errorf("replayed (-want +got):\n%s", diff)
		}
		l.close()
		if got := l.log.String(); got != "" {
			t.Errorf("log: %s", got)
		}
	})
}

// changeEventsOf is one event of another kind that the lane must not take.
func changeEventsOf(t *testing.T) []revocation.Event {
	e := eventsOf(t, tokensOf(1))
	e[0].Type, e[0].Data = "application.created", json.RawMessage(`{}`)
	return e
}

func TestReplayLeavesOutWhatEndsInTheQueue(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLane(t, AMQPWSO2Config{MinSpacing: time.Second})
		l.start(t.Context())
		list := tokensOf(4)
		list[2].Exp = time.Now().Unix() + 2
		l.add(eventsOf(t, list))
		time.Sleep(10 * time.Second)
		want := []replayed{{0, "t-1"}, {time.Second, "t-2"}, {2 * time.Second, "t-4"}}
		if diff := cmp.Diff(want, l.taken(), cmp.AllowUnexported(replayed{})); diff != "" {
			t.Errorf("replayed (-want +got):\n%s", diff)
		}
		l.close()
	})
}

func TestReplayQueueIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLane(t, AMQPWSO2Config{MinSpacing: time.Millisecond})
		l.failing(errors.New("down"))
		l.start(t.Context())
		list := tokensOf(1 + replayQueue + 10)
		events := eventsOf(t, list)
		l.add(events[:1]) // the one that is tried
		synctest.Wait()
		l.add(events[1:])
		time.Sleep(10 * time.Second)
		if got := l.taken(); len(got) > 0 {
			t.Fatalf("replayed %v while the broker is down", got)
		}
		l.failing(nil)
		time.Sleep(time.Minute)
		got := tokensSent(l.taken())
		if len(got) != 1+replayQueue || got[0] != "t-1" || got[1] != "t-12" || got[replayQueue] != fmt.Sprintf("t-%d", len(list)) {
			t.Errorf("replayed %d, the first are %v, want all but t-2 to t-11", len(got), got[:min(3, len(got))])
		}
		l.close()
		for _, want := range []string{"faster than they can be published", "left_to_the_sweep=10", "tried until it succeeds", "error=down"} {
			if !strings.Contains(l.log.String(), want) {
				t.Errorf("the log does not say %q:\n%s", want, l.log.String())
			}
		}
	})
}

func TestReplaySweep(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		list := tokensOf(5)
		list[1].Target.Kind = revocation.KindSubject
		list[2].Exp = time.Now().Unix()
		list = append(list, revocation.Revocation{Target: revocation.DigestTarget("i", "opaque"), Exp: list[0].Exp})
		l := newLane(t, AMQPWSO2Config{SweepEvery: 9 * time.Second, Live: listing(list)})
		opening, opened := context.WithCancel(t.Context())
		l.start(opening)
		opened()
		time.Sleep(17 * time.Second)
		s := time.Second
		want := []replayed{{0, "t-1"}, {3 * s, "t-4"}, {6 * s, "t-5"}, {9 * s, "t-1"}, {12 * s, "t-4"}, {15 * s, "t-5"}}
		if diff := cmp.Diff(want, l.taken(), cmp.AllowUnexported(replayed{})); diff != "" {
			t.Errorf("replayed (-want +got):\n%s", diff)
		}
		l.close()
		l.start(t.Context()) // leads again
		l.start(t.Context()) // opened again
		time.Sleep(s)
		if diff := cmp.Diff([]string{"t-1"}, tokensSent(l.taken())); diff != "" {
			t.Errorf("replayed after a new start (-want +got):\n%s", diff)
		}
		l.close()
		time.Sleep(time.Hour)
		if got := l.taken(); len(got) > 0 {
			t.Errorf("replayed %v after the end", got)
		}
	})
}

// A large sweep takes its time and not many wake-ups, and makes good nothing in haste.
func TestReplayLargeSweep(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const n, every = 50_000, 10 * time.Second
		l := newLane(t, AMQPWSO2Config{SweepEvery: every, Live: listing(tokensOf(n))})
		l.start(t.Context())
		for second := range 10 {
			time.Sleep(time.Second - time.Millisecond)
			synctest.Wait()
			if got := len(l.taken()); got < n/10-100 || got > n/10+100 {
				t.Errorf("%d were replayed in second %d, want about %d", got, second, n/10)
			}
			time.Sleep(time.Millisecond)
		}
		if l.calls > 1001 {
			t.Errorf("%d deliveries in one sweep, want no more than 1000", l.calls)
		}
		l.failing(errors.New("down"))
		time.Sleep(15 * time.Second)
		l.failing(nil)
		l.taken()
		time.Sleep(30 * time.Second)
		var worst int
		sent := l.taken()
		for i, j := 0, 0; j < len(sent); j++ {
			for sent[j].at-sent[i].at >= time.Second {
				i++
			}
			worst = max(worst, j-i+1)
		}
		if worst > n/10+100 || len(sent) == 0 {
			t.Errorf("%d replays in one second after an outage, %d in all", worst, len(sent))
		}
		l.close()
	})
}

func TestReplaySweepKeepsTheSpacing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const spacing = 100 * time.Millisecond
		l := newLane(t, AMQPWSO2Config{MinSpacing: spacing, SweepEvery: time.Second, Live: listing(tokensOf(20))})
		l.start(t.Context())
		others := tokensOf(100)
		for i := range others {
			others[i].Target.ID = fmt.Sprintf("new-%d", i)
		}
		l.add(eventsOf(t, others))
		time.Sleep(5 * time.Second)
		synctest.Wait()
		sent := l.taken()
		swept := 0
		for i, r := range sent {
			if i > 0 && r.at-sent[i-1].at < spacing {
				t.Fatalf("%v follows %v", r, sent[i-1])
			}
			if strings.HasPrefix(r.token, "t-") {
				swept++
			}
		}
		if len(sent) < 49 || swept < 20 || swept > 30 {
			t.Errorf("%d replays of which %d are of the sweep, want 50, about half of them", len(sent), swept)
		}
		l.close()
		if got := l.log.String(); !strings.Contains(got, "takes longer than it should") || !strings.Contains(got, "takes=2s") {
			t.Errorf("the log does not say that a sweep takes 2s:\n%s", got)
		}
	})
}

func TestReplaySweepSurvivesItsLister(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		live := func(context.Context) iter.Seq2[revocation.Revocation, error] {
			return func(yield func(revocation.Revocation, error) bool) {
				calls++
				if calls == 1 || calls == 3 { // while it counts, while it sweeps
					if calls == 3 && !yield(tokensOf(1)[0], nil) {
						return
					}
					yield(revocation.Revocation{}, io.ErrUnexpectedEOF)
					return
				}
				for _, r := range tokensOf(2) {
					if !yield(r, nil) {
						return
					}
				}
			}
		}
		l := newLane(t, AMQPWSO2Config{SweepEvery: 10 * time.Second, Live: live})
		l.start(t.Context())
		time.Sleep(29 * time.Second)
		s := time.Second
		// 0: no count. 10: t-1, then the list ends early. 20 later, all of it.
		want := []replayed{{10 * s, "t-1"}, {20 * s, "t-1"}, {25 * s, "t-2"}}
		if diff := cmp.Diff(want, l.taken(), cmp.AllowUnexported(replayed{})); diff != "" {
			t.Errorf("replayed (-want +got):\n%s", diff)
		}
		l.close()
		if got := strings.Count(l.log.String(), "unexpected EOF"); got != 2 {
			t.Errorf("%d errors in the log, want 2:\n%s", got, l.log.String())
		}
	})
}

// The ordered lane is at full speed while the other takes its time, and the lane mends
// its own connection.
func TestAMQPWSO2ReplayBesideTheOrderedLane(t *testing.T) {
	t.Parallel()
	vhost := stacktest.NewVhost(t)
	deliveries := consume(t, vhost.AMQPURL, "amq.topic", "tokenRevocation")
	u, proxy := proxied(t, vhost.AMQPURL)
	live := tokensOf(2)
	s := openedAMQPWSO2(t, AMQPWSO2Config{
		AMQPBroker: patient(u), MinSpacing: 200 * time.Millisecond, SweepEvery: time.Second, Live: listing(live),
	})
	const n = 500
	begun := time.Now()
	mustDeliver(t, s, relaytest.Events(1, n)...)
	if took := time.Since(begun); took > n*200*time.Millisecond/5 {
		t.Errorf("the delivery took %s: it waits for the lane beside it", took)
	}
	counts := func(until func(map[string]int) bool) map[string]int {
		seen := map[string]int{}
		for !until(seen) {
			d := mustReceive(t, deliveries)
			if d.ContentType != "text/plain" || len(d.Headers) > 0 || d.DeliveryMode != 2 {
				t.Fatalf("message %+v", d)
			}
			seen[tokenIn(t, d.Body)]++
		}
		return seen
	}
	// Both lanes have got something through when one of the burst came twice and one of
	// the sweep came.
	through := func(seen map[string]int) bool {
		return seen["at-0000000000000001"] == 2 && seen["t-1"] > 0 && len(seen) >= n
	}
	counts(through)

	proxy.Cut()
	mustOpen(t, s, n)
	counts(func(seen map[string]int) bool { return seen["t-1"] > 0 && seen["t-2"] > 0 })
	s.Close()
	s.Close()
	mustOpen(t, s, n)
	mustDeliver(t, s, relaytest.Events(n+1, 1)...)
	counts(func(seen map[string]int) bool { return seen[fmt.Sprintf("at-%016x", n+1)] == 2 && seen["t-2"] > 0 })
}

// Ending the sink does not wait for a lane that cannot reach the broker.
func TestAMQPWSO2CloseWithoutABroker(t *testing.T) {
	t.Parallel()
	u, proxy := proxied(t, stacktest.NewVhost(t).AMQPURL)
	s := openedAMQPWSO2(t, AMQPWSO2Config{
		AMQPBroker: patient(u), MinSpacing: time.Millisecond, SweepEvery: time.Second, Live: listing(tokensOf(1000)),
	})
	mustDeliver(t, s, relaytest.Events(1, 100)...)
	held := proxy.Stall()
	select {
	case <-held:
	case <-t.Context().Done():
		t.Fatal("the lane sends nothing")
	}
	begun := time.Now()
	s.Close()
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("closing took %s", took)
	}
}
