package replica

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
)

// desk takes reports as the service does: it holds them for a while, unless it has something to ask for.
type desk struct {
	mu    sync.Mutex
	came  []filed
	cuts  []time.Time    // when one was given up
	asks  []Instructions // of the next answers, at once
	fails error
	hold  time.Duration
}

type filed struct {
	at time.Time
	id string
	Report
}

func (d *desk) Report(ctx context.Context, id string, r Report) (Instructions, error) {
	d.mu.Lock()
	d.came = append(d.came, filed{at: time.Now(), id: id, Report: r})
	var in Instructions
	err, hold := d.fails, d.hold
	switch {
	case err != nil || r.Leaving:
		hold = 0
	case len(d.asks) > 0:
		in, hold = d.asks[0], 0
		d.asks = d.asks[1:]
	}
	d.mu.Unlock()
	if hold == 0 || sleep(ctx, hold, nil) {
		return in, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cuts = append(d.cuts, time.Now())
	return Instructions{}, context.Cause(ctx)
}

func (d *desk) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// reports are those since the last call.
func (d *desk) reports() []filed {
	synctest.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	all := d.came
	d.came = nil
	return all
}

// times are when reports came, since a moment.
func times(all []filed, since time.Time) (at []time.Duration) {
	for _, f := range all {
		at = append(at, f.at.Sub(since))
	}
	return at
}

func TestReports(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, d := newService(t), &desk{hold: 2 * time.Second}
		s.revoke("a")
		s.set(func() { s.hangs = true })
		labels := map[string]string{"region": "eu-1"}
		began := time.Now()
		r, stop := start(t, Config{
			Source: s, Feeds: []Feed{&wire{s: s}}, Reporter: d, ID: "gw-1", Labels: labels, Version: "v1", Environments: []string{"Default"},
		})
		labels["region"] = "changed"
		first := d.reports()
		if len(first) != 1 || first[0].id != r.ID() || r.ID() != "gw-1" {
			t.Fatalf("%+v", first)
		}
		first[0].Feeds[0].Heard = 0 // the feed may have been there first
		want := Report{
			Instance: r.instance, Started: began.UnixMilli(), Labels: map[string]string{"region": "eu-1"}, Version: "v1", AgeMS: -1,
			Feeds: []FeedStatus{{Name: "wire"}},
		}
		if diff := gocmp.Diff(want, first[0].Report); diff != "" {
			t.Errorf("before anything is known (-want +got):\n%s", diff)
		}
		stop()
		if left := d.reports(); len(left) != 0 {
			t.Errorf("a gateway of which the service does not know has left: %+v", left)
		}

		s.set(func() { s.hangs = false })
		r, stop = start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}, Reporter: d, ID: "gw-1"})
		time.Sleep(time.Minute)
		all := d.reports()
		if len(all) != 31 { // the last one is held
			t.Errorf("%d reports in a minute", len(all))
		}
		last := all[len(all)-1]
		if last.Position != s.head() || !last.Ready || last.AgeMS < 0 || last.AgeMS > 2000 || last.Revocations != 1 || last.Snapshots != 1 ||
			!last.Feeds[0].Connected || last.Leaving || last.Instance == first[0].Instance || last.Instance != all[0].Instance {
			t.Errorf("%+v", last)
		}
		if got := r.Status(); got.ID != "gw-1" || got.Report.Taken != 30 || got.Report.Failed != 0 || got.Report.At != time.Now().UnixMilli() {
			t.Errorf("%+v", got.Report)
		}
		before := time.Now()
		stop()
		left := d.reports()
		if len(left) != 1 || !left[0].Leaving || left[0].Position != s.head() || time.Since(before) != 0 {
			t.Errorf("it left after %s: %+v", time.Since(before), left)
		}
		if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(last.Instance) {
			t.Errorf("instance %s", last.Instance)
		}
	})
}

// lastQuestion is how long a question to a source may take still that is under way when a replica stops.
const lastQuestion = 40 * time.Millisecond

// A service that does not answer holds up a process that stops for half a second.
func TestLeavingInVain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, d := newService(t), &desk{}
		_, stop := start(t, Config{Source: s, Reporter: reporterFunc(func(ctx context.Context, id string, r Report) (Instructions, error) {
			if r.Leaving {
				<-ctx.Done()
				return Instructions{}, ctx.Err()
			}
			in, err := d.Report(ctx, id, r)
			in.NextMS = 2000
			return in, err
		})})
		time.Sleep(10 * time.Second)
		if all := d.reports(); len(all) != 6 && len(all) != 5 {
			t.Errorf("%d reports, each due 2 s after the last", len(all))
		}
		before := time.Now()
		stop()
		if took := time.Since(before); took < leaveWithin || took > leaveWithin+lastQuestion {
			t.Errorf("it took %s to stop", took)
		}
	})
}

type reporterFunc func(ctx context.Context, id string, r Report) (Instructions, error)

func (f reporterFunc) Report(ctx context.Context, id string, r Report) (Instructions, error) {
	return f(ctx, id, r)
}

func TestConfirm(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, d := newService(t), &desk{hold: 10 * time.Second}
		s.revoke("a")
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}, Reporter: d})
		within(t, time.Second, "it is connected", func() bool { return r.connected(nil) && s.reachedBy(r)() })
		ask := func(p revocation.Position) (since time.Time) {
			d.reports()
			d.set(func() { d.asks = []Instructions{{Confirm: p}} })
			for len(d.reports()) == 0 {
				time.Sleep(time.Millisecond)
			}
			return time.Now()
		}

		since := ask(s.head())
		time.Sleep(5 * time.Second)
		if all := d.reports(); len(all) != 0 {
			t.Fatalf("what is there already is to be told at once, in the same moment, was at %s", times(all, since))
		}

		p := s.head()
		p.Seq++
		since = ask(p)
		time.Sleep(700 * time.Millisecond)
		s.revoke("b")
		time.Sleep(5 * time.Second)
		all := d.reports()
		if diff := gocmp.Diff([]time.Duration{700 * time.Millisecond}, times(all, since)); diff != "" || all[0].Position != p {
			t.Fatalf("what comes in time is told when it comes (-want +got):\n%s", diff)
		}

		p.Seq++
		since = ask(p)
		time.Sleep(4 * time.Second)
		s.revoke("c")
		time.Sleep(4 * time.Second)
		all = d.reports()
		if diff := gocmp.Diff([]time.Duration{2 * time.Second, 4 * time.Second}, times(all, since)); diff != "" || all[0].Seq != p.Seq-1 || all[1].Position != p {
			t.Fatalf("what comes late is told when it comes, though a report is held (-want +got):\n%s", diff)
		}
		if len(d.cuts) != 1 || d.cuts[0].Sub(since) != 4*time.Second {
			t.Errorf("reports that were held are given up at %s", d.cuts)
		}

		since = ask(revocation.Position{Epoch: "7c9e6679-7425-40de-944b-e07fc1f90ae7", Seq: 1})
		time.Sleep(3 * time.Second)
		if diff := gocmp.Diff([]time.Duration{2 * time.Second}, times(d.reports(), since)); diff != "" {
			t.Fatalf("what never comes (-want +got):\n%s", diff)
		}
		ask(s.head())
		r.state.mu.Lock()
		defer r.state.mu.Unlock()
		if n := len(r.state.waiters); n != 0 {
			t.Errorf("%d still wait for what is not waited for any more", n)
		}
	})
}

// newBench runs a replica whose reports, and digests, the test has in hand.
func newBench(t *testing.T, d *desk, digest func(ctx context.Context, cutoff int64, after revocation.Position) (Digest, error)) {
	r, err := New(Config{Source: newService(t), Reporter: d})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	tells := newTeller(r)
	tells.digest = digest
	done := make(chan struct{})
	go func() {
		defer close(done)
		tells.run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

func TestDigestAsked(t *testing.T) {
	request := func(cutoff int64) Instructions { return Instructions{Digest: &DigestRequest{Cutoff: cutoff}} }
	for name, tt := range map[string]struct {
		asks []Instructions
		took time.Duration
		// When reports come, and the cutoff of the digest in each. 0: it has none.
		at      []time.Duration
		cutoffs []int64
		begun   int // digests
	}{
		"at once":           {[]Instructions{request(60)}, 0, []time.Duration{0, 0}, []int64{0, 60}, 1},
		"soon":              {[]Instructions{request(60)}, 200 * time.Millisecond, []time.Duration{0, 200 * time.Millisecond}, []int64{0, 60}, 1},
		"while one is held": {[]Instructions{request(60)}, time.Second, []time.Duration{0, 250 * time.Millisecond, time.Second}, []int64{0, 0, 60}, 1},
		"asked twice for the same": {[]Instructions{request(60), request(60)}, time.Second,
			[]time.Duration{0, 250 * time.Millisecond, 500 * time.Millisecond, time.Second}, []int64{0, 0, 0, 60}, 1},
		"the newest": {[]Instructions{request(60), request(120)}, time.Second,
			[]time.Duration{0, 250 * time.Millisecond, 500 * time.Millisecond, 1250 * time.Millisecond}, []int64{0, 0, 0, 120}, 2},
		"later than it is of use": {[]Instructions{request(60)}, 2 * time.Minute,
			[]time.Duration{0, 250 * time.Millisecond, time.Minute + 250*time.Millisecond}, []int64{0, 0, 0}, 1},
		"the same again": {[]Instructions{request(60), request(60)}, 0, []time.Duration{0, 0, 0}, []int64{0, 60, 60}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				d := &desk{hold: time.Minute, asks: tt.asks}
				began, begun := time.Now(), 0
				newBench(t, d, func(ctx context.Context, cutoff int64, _ revocation.Position) (Digest, error) {
					begun++
					if tt.took > 0 && !sleep(ctx, tt.took, nil) {
						return Digest{}, ctx.Err()
					}
					return Digest{Cutoff: cutoff}, nil
				})
				time.Sleep(time.Minute + 500*time.Millisecond)
				all := d.reports()
				if len(all) > len(tt.at) && all[len(tt.at)].at.Sub(began) >= time.Minute {
					all = all[:len(tt.at)] // the hold is over
				}
				var cutoffs []int64
				for _, f := range all {
					cutoff := int64(0)
					if f.Digest != nil {
						cutoff = f.Digest.Cutoff
					}
					cutoffs = append(cutoffs, cutoff)
				}
				if diff := gocmp.Diff(tt.at, times(all, began)) + gocmp.Diff(tt.cutoffs, cutoffs); diff != "" || begun != tt.begun {
					t.Errorf("%d digests (-want +got):\n%s", begun, diff)
				}
			})
		})
	}
}

// A digest that the service asks for is that of the state.
func TestDigestTold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, d := newService(t), &desk{hold: time.Minute}
		s.revoke("a")
		p := s.head()
		p.Seq++
		d.asks = []Instructions{{Digest: &DigestRequest{Cutoff: time.Now().Unix() / 60 * 60, After: p}}}
		start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}, Reporter: d})
		time.Sleep(5 * time.Second)
		s.revoke("b")
		time.Sleep(5 * time.Second)
		all := d.reports()
		got := all[len(all)-1].Digest
		if got == nil || got.Position != p || got.Count != 2 || got.Revocations == (Sum{}) {
			t.Fatalf("%d reports, the last with digest %+v", len(all), got)
		}
	})
}

func TestLoadAsked(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, d := newService(t), &desk{hold: 2 * time.Second}
		s.revoke("a")
		r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}, Reporter: d})
		time.Sleep(time.Minute)
		loaded := func(asks ...string) uint64 {
			t.Helper()
			before := r.Status().Snapshots
			d.set(func() {
				for _, name := range asks {
					d.asks = append(d.asks, Instructions{Load: name})
				}
			})
			time.Sleep(10 * time.Second)
			return r.Status().Snapshots - before
		}
		if n := loaded("one", "one"); n != 1 {
			t.Errorf("%d snapshots, asked for one twice", n)
		}
		if n := loaded("one"); n != 0 {
			t.Errorf("%d snapshots, asked for the one before", n)
		}
		time.Sleep(time.Minute)
		var many []string
		for i := range 50 {
			many = append(many, fmt.Sprint("many-", i))
		}
		if n := loaded(many...); n == 0 || n > loadsAtOnce {
			t.Errorf("%d snapshots within 10 s, however many are asked for", n)
		}
	})
}

// What a state lacks comes back, however fast events follow each other; what is revoked meanwhile does not wait for it.
func TestLoadAskedRepairs(t *testing.T) {
	for _, tenants := range [][]string{nil, {acme.Domain}} {
		t.Run(fmt.Sprint(tenants), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s, d := newService(t), &desk{hold: 2 * time.Second}
				s.tenants = tenants
				s.revoke("lost")
				s.change("created", application(1, "a"))
				r, _ := start(t, Config{Source: s, Feeds: []Feed{&wire{s: s}}, Reporter: d})
				within(t, 5*time.Second, "it is connected", func() bool { return r.connected(nil) && s.reachedBy(r)() })
				time.Sleep(time.Minute)
				r.state.mu.Lock()
				r.state.content.marks = newMarks(false)
				r.state.marks.Store(r.state.content.marks)
				r.state.mu.Unlock()
				if r.Check(tokenOf("lost")).Outcome == Revoked {
					t.Fatal("nothing is lost")
				}
				d.set(func() { d.asks = []Instructions{{Load: "one"}} })
				for i := range 1000 {
					s.revoke(fmt.Sprint("meanwhile-", i))
					time.Sleep(5 * time.Millisecond) // a snapshot takes longer
					if jti := fmt.Sprint("meanwhile-", i-40); i >= 40 && r.Check(tokenOf(jti)).Outcome != Revoked {
						t.Fatalf("%s is not revoked after 200 ms, at %s", jti, r.state.At())
					}
				}
				if r.Check(tokenOf("lost")).Outcome != Revoked {
					t.Errorf("what was lost is still not there: %+v", r.Status())
				}
				time.Sleep(10 * time.Second)
				s.equal(t, r)
				if n := r.Status().Snapshots; n != 2 && tenants == nil {
					t.Errorf("%d snapshots", n)
				}
			})
		})
	}
}

// The folder is free before the service is told that the replica stops, and a reporter that does not mind its
// context holds up nothing.
func TestLeavingFreesTheFolder(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s, folder := newService(t), t.TempDir()
		s.revoke("a")
		free, hang := make(chan error, 1), make(chan struct{})
		_, stop := start(t, Config{Source: s, Folder: folder, Reporter: reporterFunc(func(_ context.Context, _ string, r Report) (Instructions, error) {
			if !r.Leaving {
				return Instructions{NextMS: 1000}, nil
			}
			next, err := New(Config{Source: s, Folder: folder})
			if err == nil {
				err = next.Close()
			}
			free <- err
			<-hang
			return Instructions{}, nil
		})})
		time.Sleep(5 * time.Second)
		before := time.Now()
		stop()
		if took := time.Since(before); took < leaveWithin || took > leaveWithin+lastQuestion {
			t.Errorf("it took %s to stop", took)
		}
		if err := <-free; err != nil {
			t.Errorf("the folder is not free: %v", err)
		}
		close(hang)
	})
}

func TestReporterThatHangs(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var calls atomic.Int32
		s, hang := newService(t), make(chan struct{})
		_, stop := start(t, Config{Source: s, Reporter: reporterFunc(func(context.Context, string, Report) (Instructions, error) {
			if calls.Add(1) > 1 {
				<-hang
			}
			return Instructions{}, nil
		})})
		time.Sleep(5 * time.Second)
		before := time.Now()
		stop()
		if took := time.Since(before); took < leaveWithin || took > leaveWithin+lastQuestion || calls.Load() != 2 {
			t.Errorf("it took %s to stop, with %d calls", took, calls.Load())
		}
		close(hang)
	})
}

// What there is to tell when an answer comes is told at once, whenever the service wants the next report.
func TestToldAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		var came []filed
		asked := false
		d := reporterFunc(func(ctx context.Context, id string, r Report) (Instructions, error) {
			came = append(came, filed{at: time.Now(), Report: r})
			in := Instructions{NextMS: 60_000}
			if !asked {
				asked = true
				return Instructions{Digest: &DigestRequest{Cutoff: 60}}, nil
			}
			if len(came) == 2 {
				<-ctx.Done() // the answer was on its way
			}
			return in, nil
		})
		r, err := New(Config{Source: s, Reporter: d})
		must(t, err)
		tells := newTeller(r)
		tells.digest = func(ctx context.Context, cutoff int64, _ revocation.Position) (Digest, error) {
			sleep(ctx, time.Second, nil)
			return Digest{Cutoff: cutoff}, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		done := make(chan struct{})
		go func() {
			defer close(done)
			tells.run(ctx)
		}()
		time.Sleep(10 * time.Second)
		cancel()
		<-done
		if diff := gocmp.Diff([]time.Duration{0, digestPatience, time.Second}, times(came, began)); diff != "" || came[2].Digest == nil {
			t.Errorf("reports (-want +got):\n%s", diff)
		}
	})
}

// Why there is no digest is logged once, until there is one again.
func TestDigestsFail(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var broken atomic.Bool
		var asked atomic.Int64
		logged := &logs{}
		broken.Store(true) // before the first is asked for
		r, err := New(Config{Source: newService(t), Logger: slog.New(slog.NewTextHandler(logged, nil)), Reporter: reporterFunc(
			func(context.Context, string, Report) (Instructions, error) {
				in, minute := Instructions{NextMS: 59_000}, time.Now().Unix()/59 // before it is given up
				if asked.Swap(minute) != minute {
					in.Digest = &DigestRequest{Cutoff: minute * 60}
				}
				return in, nil
			})})
		must(t, err)
		tells := newTeller(r)
		tells.digest = func(ctx context.Context, cutoff int64, _ revocation.Position) (Digest, error) {
			if broken.Load() {
				<-ctx.Done()
				return Digest{}, ctx.Err()
			}
			return Digest{Cutoff: cutoff}, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			tells.run(ctx)
		}()
		for streak := range 2 {
			broken.Store(true)
			time.Sleep(10 * time.Minute)
			if lines := logged.with("was not made"); len(lines) != streak+1 || !strings.Contains(lines[0], "level=WARN") || !strings.Contains(lines[0], "in vain for") {
				t.Errorf("after streak %d: %s", streak, lines)
			}
			broken.Store(false)
			time.Sleep(10 * time.Minute)
		}
		cancel()
		<-done
	})
}

// A report is no larger than the service takes, however many tenants there are.
func TestReportIsBounded(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		n, length, told int
	}{
		"few": {500, 20, 500}, "many": {501, 20, 0}, "long": {200, 200, 0}, "thousands": {20_000, 100, 0},
	} {
		r, err := New(Config{Source: newService(t), Version: strings.Repeat("<", maxVersion)})
		must(t, err)
		must(t, r.state.Load(revocation.Position{Epoch: epoch, Seq: 1}, func(l *Loader) error {
			var domains []string
			for i := range tt.n {
				domains = append(domains, fmt.Sprintf("%0*d.example", tt.length-8, i))
			}
			l.Tenants(domains)
			return nil
		}))
		report := r.reportNow()
		body, err := json.Marshal(report)
		must(t, err)
		if len(report.Tenants) != tt.told || len(body) > 32<<10 || len(r.Status().Tenants) != tt.n {
			t.Errorf("%s: %d tenants in %d bytes", name, len(report.Tenants), len(body))
		}
	}
}

// A service that does not hold its answers, or asks and asks, has no more reports than it can take.
func TestReportsArePaced(t *testing.T) {
	bubble(t, func(t *testing.T) {
		d := &desk{}
		start(t, Config{Source: newService(t), Reporter: d})
		time.Sleep(time.Minute - time.Millisecond)
		if n := len(d.reports()); n != 60*reportsAtOnce {
			t.Errorf("%d reports in a minute", n)
		}
		d.set(func() { d.asks = []Instructions{{NextMS: 1 << 62}} })
		time.Sleep(time.Second)
		d.reports()
		time.Sleep(maxNext)
		if len(d.reports()) == 0 {
			t.Error("the service can silence a gateway")
		}
	})
}

func TestReportRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		status      int
		header      string
		least, most int // reports in ten minutes
		level, says string
	}{
		"another account's id":   {http.StatusForbidden, "", 17, 24, "ERROR", "belongs to another account"},
		"another process's id":   {http.StatusConflict, "", 17, 24, "ERROR", "another process, started later, reports with this id"},
		"an older service":       {http.StatusNotFound, "", 2, 3, "INFO", "older than this gateway"},
		"another older service":  {http.StatusMethodNotAllowed, "", 2, 3, "INFO", "older than this gateway"},
		"a wrong password":       {http.StatusUnauthorized, "", 17, 24, "WARN", "check Username and Password"},
		"what is broken":         {http.StatusBadGateway, "", 120, 600, "WARN", "status 502"},
		"what is busy":           {http.StatusTooManyRequests, "60", 7, 11, "WARN", "status 429"},
		"what is no instruction": {http.StatusOK, "", 120, 600, "WARN", "read answer"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := newService(t)
				s.revoke("a")
				web := newWeb(t, s)
				var count atomic.Int32
				var well atomic.Bool
				web.reported = func(w http.ResponseWriter, r *http.Request) {
					count.Add(1)
					switch {
					case well.Load():
						w.Header().Set("Content-Type", "application/json")
						fmt.Fprint(w, `{"next_ms":2000}`)
					case tt.status == http.StatusOK:
						w.Header().Set("Content-Type", "application/json")
						fmt.Fprint(w, `{"next_ms":"soon"}`)
					default:
						if tt.header != "" {
							w.Header().Set("Retry-After", tt.header)
						}
						problem(w, tt.status, secret)
					}
				}
				logged := &logs{}
				r, _ := start(t, Config{Source: web.source(t, ""), ID: "gw-1", Logger: slog.New(slog.NewTextHandler(logged, nil))})
				time.Sleep(10 * time.Minute)
				n := int(count.Load())
				if n < tt.least || n > tt.most {
					t.Errorf("%d reports in ten minutes, must be %d to %d", n, tt.least, tt.most)
				}
				got := r.Status()
				if got.Report.Failed != uint64(n) || got.Report.Taken != 0 || got.Report.At != 0 || !strings.Contains(got.Report.Error, tt.says) || got.Error != "" {
					t.Errorf("%+v", got.Report)
				}
				about := logged.with("id=gw-1")
				if len(about) != 1 || !strings.Contains(about[0], "level="+tt.level) || !strings.Contains(about[0], tt.says) || strings.Contains(about[0], secret) {
					t.Errorf("logged: %s", about)
				}
				if got.Snapshots != 1 || !got.Feeds[0].Connected {
					t.Errorf("all else is as ever: %+v", got)
				}
				well.Store(true)
				time.Sleep(7 * time.Minute)
				if got := r.Status().Report; got.Error != "" || got.Taken == 0 || len(logged.with("id=gw-1")) != 2 {
					t.Errorf("once all is well: %+v", got)
				}
			})
		})
	}
}

// logs are lines of a log.
type logs struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logs) with(text string) (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}

// A report is a request like the others, on a connection that is kept.
func TestReportOverHTTP(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newService(t)
		s.revoke("a")
		web := newWeb(t, s)
		var dials atomic.Int32
		transport := web.client.Transport.(*http.Transport)
		dial := transport.DialContext
		transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials.Add(1)
			return dial(ctx, network, addr)
		}
		var mu sync.Mutex
		var last *http.Request
		var body []byte
		count := 0
		web.reported = func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			count++
			last = r
			body, _ = io.ReadAll(r.Body)
			mu.Unlock()
			sleep(r.Context(), 2*time.Second, nil)
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			fmt.Fprintf(w, `{"next_ms":0,"of_tomorrow":%q}`+"\n", strings.Repeat("x", 10_000))
		}
		r, stop := start(t, Config{Source: web.source(t, acme.Domain), ID: "gw-1", Labels: map[string]string{"zone": "é"}})
		time.Sleep(5*time.Minute + time.Second)
		mu.Lock()
		defer mu.Unlock()
		if count != 151 || dials.Load() > 3 { // the snapshot and the stream have one each
			t.Errorf("%d reports over %d connections", count, dials.Load())
		}
		if user, password, _ := last.BasicAuth(); user != "gw" || password != secret || last.URL.String() != "/base/v1/gateways/gw-1/status" ||
			last.Header.Get("Content-Type") != "application/json" || last.Header.Get("Accept") != "application/json" || last.Header.Get("Idempotency-Key") != "" {
			t.Errorf("%s %v", last.URL, last.Header)
		}
		var members map[string]any
		must(t, json.Unmarshal(body, &members))
		want := []string{"age_ms", "deltas", "entities", "epoch", "feeds", "instance", "labels", "ready", "revocations", "revocations_only", "seq", "snapshots", "started"}
		if diff := gocmp.Diff(want, slices.Sorted(maps.Keys(members))); diff != "" || len(body) > 600 {
			t.Errorf("%d bytes (-want +got):\n%s", len(body), diff)
		}
		mu.Unlock()
		stop()
		mu.Lock()
		if !bytes.Contains(body, []byte(`"leaving":true`)) {
			t.Errorf("the last report: %s", body)
		}
		if got := r.Status(); got.Report.Failed != 0 || got.Snapshots != 1 {
			t.Errorf("%+v", got)
		}
	})
}

func TestReportAnswers(t *testing.T) {
	long := strings.Repeat(" ", maxInstructions)
	for name, tt := range map[string]struct {
		id, answer, kind string
		hang             bool
		want             Instructions
		says             string
		took             time.Duration
	}{
		"all there is": {
			answer: `{"confirm":{"epoch":"` + string(epoch) + `","seq":7},"digest":{"cutoff":60,"after":{"epoch":"e","seq":1}},"load":"l","next_ms":9}`,
			want: Instructions{
				Confirm: revocation.Position{Epoch: epoch, Seq: 7}, Digest: &DigestRequest{60, revocation.Position{Epoch: "e", Seq: 1}}, Load: "l", NextMS: 9,
			},
		},
		"nothing":             {answer: `{}`},
		"as long as can be":   {answer: long[2:] + `{}`},
		"longer":              {answer: long[1:] + `{}`, says: "longer than 65536 bytes"},
		"half of it":          {answer: `{"next_ms":`, says: "read answer"},
		"a page":              {answer: `{}`, kind: "text/html", says: "URL may lead elsewhere"},
		"held for ever":       {hang: true, says: errStalled.Error(), took: reportIn},
		"an id that is none":  {id: "../x", says: "no id of a gateway"},
		"an id that is empty": {id: "-", says: "no id of a gateway"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				web := newWeb(t, newService(t))
				web.reported = func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(io.Discard, r.Body)
					if tt.hang {
						<-r.Context().Done()
						return
					}
					w.Header().Set("Content-Type", "application/json")
					if tt.kind != "" {
						w.Header().Set("Content-Type", tt.kind)
					}
					fmt.Fprint(w, tt.answer)
				}
				id := tt.id
				if id == "" {
					id = "gw-1"
				}
				began := time.Now()
				got, err := web.source(t, "").Report(t.Context(), id, Report{})
				if diff := gocmp.Diff(tt.want, got); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) || time.Since(began) != tt.took {
					t.Errorf("after %s: %v", time.Since(began), err)
				}
			})
		})
	}
}

func TestID(t *testing.T) {
	t.Parallel()
	made := func(cfg Config) string {
		t.Helper()
		cfg.Source = newService(t)
		r, err := New(cfg)
		must(t, err)
		must(t, r.Close())
		if !ValidID(r.ID()) || r.Status().ID != r.ID() {
			t.Errorf("its id is %q", r.ID())
		}
		return r.ID()
	}
	if a, b := made(Config{}), made(Config{}); a == b {
		t.Errorf("two without folders have the id %s", a)
	}
	one, two := t.TempDir(), t.TempDir()
	first := made(Config{Folder: one})
	if again := made(Config{Folder: one}); again != first {
		t.Errorf("it is %s after a restart, was %s", again, first)
	}
	if other := made(Config{Folder: two}); other == first {
		t.Errorf("two folders have the id %s", other)
	}
	if id := made(Config{Folder: one, ID: "configured"}); id != "configured" {
		t.Errorf("it is %s, not what was configured", id)
	}
	if again := made(Config{Folder: one}); again != first {
		t.Errorf("it is %s once none is configured, was %s", again, first)
	}
	file := filepath.Join(one, idName)
	must(t, os.WriteFile(file, []byte("torn\x00"), 0o600))
	next := made(Config{Folder: one})
	if again := made(Config{Folder: one}); next == first || again != next {
		t.Errorf("after damage it is %s, then %s; it was %s", next, again, first)
	}
	must(t, os.Remove(file))
	must(t, os.MkdirAll(filepath.Join(file, "x"), 0o700))
	if a, b := made(Config{Folder: one}), made(Config{Folder: one}); a == b {
		t.Errorf("it is %s, which cannot be kept", a)
	}
}

func TestReportsConfig(t *testing.T) {
	t.Parallel()
	s, d := newService(t), &desk{}
	many := make(map[string]string)
	for i := range maxLabels + 1 {
		many[fmt.Sprint("label-", i)] = ""
	}
	for _, tt := range []struct {
		cfg  Config
		says string
	}{
		{Config{ID: strings.Repeat("a", 128), Labels: map[string]string{"A.b_c/d-9": strings.Repeat("x", 255)}, Version: "v1.2 (é)"}, ""},
		{Config{ID: strings.Repeat("a", 129)}, "ID is "},
		{Config{ID: ".a"}, "ID is "},
		{Config{ID: "a\n"}, "ID is "},
		{Config{ID: "a/b"}, "ID is "},
		{Config{Labels: many}, "Labels: there are 17 labels"},
		{Config{Labels: map[string]string{"": "x"}}, `label "" must have a name`},
		{Config{Labels: map[string]string{"a b": "x"}}, `label "a b" must have a name`},
		{Config{Labels: map[string]string{strings.Repeat("a", 64): "x"}}, "must have a name of 1 to 63"},
		{Config{Labels: map[string]string{"a": strings.Repeat("x", 256)}}, "must be at most 255 bytes"},
		{Config{Labels: map[string]string{"a": "x\ny"}}, `is "x\ny"`},
		{Config{Labels: map[string]string{"a": "\xff"}}, `is "\xff"`},
		{Config{Version: "\x1b[2J"}, "Version is "},
		{Config{Version: strings.Repeat("1", 129)}, "must be at most 128 bytes"},
		{Config{Reporter: d, NoReports: true}, "Reporter and NoReports are both set"},
	} {
		tt.cfg.Source = s
		_, err := New(tt.cfg)
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%+v: %v, must say %q", tt.cfg, err, tt.says)
		}
	}

	h, err := NewHTTP(HTTPConfig{URL: "http://localhost", Username: "gw", Password: secret})
	must(t, err)
	for name, tt := range map[string]struct {
		cfg  Config
		want Reporter
	}{
		"the source":      {Config{Source: h, Feeds: []Feed{&wire{s: s}}}, h},
		"a feed":          {Config{Source: s, Feeds: []Feed{&wire{s: s}, h}}, h},
		"neither":         {Config{Source: s, Feeds: []Feed{&wire{s: s}}}, nil},
		"what is set":     {Config{Source: h, Reporter: d}, d},
		"nobody is to be": {Config{Source: h, NoReports: true}, nil},
	} {
		r, err := New(tt.cfg)
		must(t, err)
		if r.cfg.Reporter != tt.want || (r.Status().Report != nil) != (tt.want != nil) {
			t.Errorf("%s: told is %v", name, r.cfg.Reporter)
		}
	}
}

// What a state comes to, those who wait for it are told, however it comes there.
func TestComesTo(t *testing.T) {
	t.Parallel()
	s := NewState(StateConfig{})
	at := func(seq revocation.Seq) revocation.Position { return revocation.Position{Epoch: epoch, Seq: seq} }
	load := func(seq revocation.Seq, tenants ...string) {
		t.Helper()
		must(t, s.Load(at(seq), func(l *Loader) error {
			l.Tenants(tenants)
			return nil
		}))
	}
	is := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	by := map[revocation.Seq]func(){
		3: func() { load(3) },
		4: func() {
			e := revoke(Record{Target: ofJTI("a"), Tenant: acme, Exp: time.Now().Add(time.Hour).Unix()})
			e.Position, e.Time = at(4), time.Now()
			must(t, s.Apply(e))
		},
		6: func() { load(6, acme.Domain) },
		9: func() { must(t, s.Through(at(9))) },
	}
	stopped, stop := s.comesTo(at(9))
	stop()
	stop()
	for _, seq := range []revocation.Seq{3, 4, 6, 9} {
		here, _ := s.comesTo(at(seq))
		next, stopNext := s.comesTo(at(seq + 1))
		if is(here) {
			t.Errorf("%d is there before it is", seq)
		}
		by[seq]()
		if already, _ := s.comesTo(at(seq)); !is(here) || is(next) || !is(already) {
			t.Errorf("%d: told %t, and of the next %t", seq, is(here), is(next))
		}
		stopNext()
	}
	if is(stopped) || len(s.waiters) != 0 {
		t.Errorf("who has stopped waiting is told, or kept: %d", len(s.waiters))
	}
}
