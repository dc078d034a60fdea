package replica

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rescindhq/rescind/api/revocation"
)

const (
	// confirmPatience is how long a position that is to be confirmed is waited for before a report
	// goes without it.
	confirmPatience = 2 * time.Second
	// digestPatience is how long a report waits for a digest. Most take less: to wait is cheaper than to
	// give up a report that the service holds, and with it the connection.
	digestPatience = 250 * time.Millisecond
	// digestWithin is how long a digest may take. What it leaves out goes by a cutoff: one that is
	// older would compare with nothing.
	digestWithin = time.Minute
	// leaveWithin bounds the last report, which a process waits for that is told to stop.
	leaveWithin = 500 * time.Millisecond
	// maxNext is the longest that the service can have a gateway be silent.
	maxNext = time.Minute
	// No more than reportsAtOnce reports are sent within reportsWithin, whatever is asked for.
	reportsAtOnce = 20
	reportsWithin = time.Second
	// digestLate is how long a digest must have taken that was not made for people to be told, when it is given
	// up for another one.
	digestLate = digestWithin / 2
	// minReportWait is the wait after a report that has failed: many gateways lose a service at once.
	// What takes a person to mend, or an update of the service, is tried seldom.
	minReportWait     = time.Second
	refusedReportWait = 30 * time.Second
	unknownReportWait = 5 * time.Minute
	// maxHeardLoads is how many names of [Instructions].Load are remembered.
	maxHeardLoads = 8
)

// The bounds of Config.Labels and Config.Version, and of what a report says of an error.
const (
	maxLabels      = 16
	maxLabelValue  = 255
	maxVersion     = 128
	maxReportError = 500
	// A report must not be too large for the service, which takes 64 KiB.
	maxReportTenants     = 500
	maxReportTenantBytes = 24 << 10
)

var (
	idForm       = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)
	labelKeyForm = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,63}$`)
)

// ValidID reports whether id can be that of a gateway: 1 to 128 of A-Z a-z 0-9 . _ - that begin with a
// letter or a digit.
func ValidID(id string) bool { return idForm.MatchString(id) }

// ValidLabels reports whether these can be [Config].Labels; its error names all that is wrong with them.
func ValidLabels(labels map[string]string) error {
	var errs []error
	if len(labels) > maxLabels {
		errs = append(errs, fmt.Errorf("there are %d labels, must be at most %d", len(labels), maxLabels))
	}
	for key, value := range labels {
		if !labelKeyForm.MatchString(key) {
			errs = append(errs, fmt.Errorf("label %.80q must have a name of 1 to 63 of A-Z a-z 0-9 . _ / -", key))
		}
		if !isLabelValue(value) {
			errs = append(errs, fmt.Errorf("label %.80q is %.80q, must be at most %d bytes of printable UTF-8", key, value, maxLabelValue))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

func isLabelValue(s string) bool {
	return len(s) <= maxLabelValue && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// newID makes one that people can find the machine by.
func newID() string {
	host, _ := os.Hostname() // without one chance is enough
	host = strings.Map(func(r rune) rune {
		if r < utf8.RuneSelf && (r == '.' || r == '_' || r == '-' || unicode.IsLetter(r) || unicode.IsDigit(r)) {
			return r
		}
		return '-'
	}, host)
	host = strings.TrimLeft(host[:min(len(host), 100)], "._-")
	if host == "" {
		host = "gateway"
	}
	var b [6]byte
	_, _ = rand.Read(b[:]) // it never fails
	return host + "-" + hex.EncodeToString(b[:])
}

// newInstance makes a UUID (version 4).
func newInstance() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// ID is what the service knows the replica by: Config.ID, or the one that was made in its place.
func (r *Replica) ID() string { return r.id }

// ReportStatus is how reporting goes.
type ReportStatus struct {
	// At is when the service last took a report, in Unix milliseconds. 0: never.
	At int64 `json:"at"`
	// Taken and Failed count reports since the start.
	Taken  uint64 `json:"taken"`
	Failed uint64 `json:"failed"`
	// Error is why the last one was not taken.
	Error string `json:"error,omitempty"`
}

// reportNow is what there is to tell.
func (r *Replica) reportNow() Report {
	s := r.Status()
	report := Report{
		Instance: r.instance, Started: r.start.UnixMilli(), Labels: r.cfg.Labels, Version: r.cfg.Version,
		Position: s.Position, AgeMS: s.Age.Milliseconds(), Ready: s.Ready, Tenants: s.Tenants, RevocationsOnly: s.RevocationsOnly,
		Revocations: s.Revocations, Entities: s.Entities, Snapshots: s.Snapshots, Deltas: s.Deltas, Feeds: s.Feeds, Error: shortened(s.Error),
	}
	for i := range report.Feeds {
		report.Feeds[i].Error = shortened(report.Feeds[i].Error)
	}
	if s.Age == Never {
		report.AgeMS = -1
	}
	size := 0
	for _, domain := range report.Tenants {
		size += len(domain)
	}
	if len(report.Tenants) > maxReportTenants || size > maxReportTenantBytes {
		report.Tenants = nil
	}
	return report
}

// shortened is an error as a report has it: a report must not be refused for its length.
func shortened(text string) string {
	return strings.ToValidUTF8(text[:min(len(text), maxReportError)], "")
}

// teller reports a replica, and does what it is asked for. It is for one goroutine.
type teller struct {
	r      *Replica
	to     Reporter
	digest func(ctx context.Context, cutoff int64, after revocation.Position) (Digest, error)

	sent  []instant // the last reports
	taken bool      // one was, ever
	loads []string  // the last names of Instructions.Load

	confirm revocation.Position // that is waited for, if there is here
	here    <-chan struct{}     // closed when it is there; nil: nothing is waited for
	giveUp  func()              // waiting

	asked   DigestRequest // the last one
	began   instant       // when its digest was
	digests <-chan made   // where that comes; nil: none is on its way
	cancel  func()        // the one that is
	last    *Digest
	untold  bool // last was in no report that was taken
	failing bool // the last digest was not made
	running sync.WaitGroup

	reporting <-chan struct{} // closed when the last call of Report has ended; nil: there was none
}

// reply is what became of a report.
type reply struct {
	Instructions
	err error
}

// made is what became of a digest.
type made struct {
	Digest
	err error
}

// errSooner is that a report was given up for another one.
var errSooner = errors.New("there is something else to tell")

func newTeller(r *Replica) *teller {
	return &teller{r: r, to: r.cfg.Reporter, digest: r.state.Digest, giveUp: func() {}, cancel: func() {}}
}

// run reports until ctx ends.
func (t *teller) run(ctx context.Context) {
	defer func() {
		t.cancel()
		t.giveUp()
		t.running.Wait()
	}()
	var wait backoff
	for t.pace(ctx) {
		in, sooner, err := t.send(ctx)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errSooner) {
			continue
		}
		t.r.reported(err)
		if err != nil {
			_, all := wait.next(err)
			if !sleep(ctx, max(all, t.leastWait(err)), nil) {
				return
			}
			continue
		}
		wait.reset()
		t.taken = true
		next := t.follow(ctx, in)
		if sooner || t.untold {
			next = 0
		}
		due := time.NewTimer(next)
		t.wait(ctx, nil, due.C)
		due.Stop()
	}
}

// pace waits until there may be another report, and reports whether ctx goes on.
func (t *teller) pace(ctx context.Context) bool {
	if n := len(t.sent); n == reportsAtOnce {
		if wait := reportsWithin - t.r.now().since(t.sent[0]); wait > 0 && !sleep(ctx, wait, nil) {
			return false
		}
	}
	t.sent = append(t.sent, t.r.now())
	t.sent = t.sent[max(0, len(t.sent)-reportsAtOnce):]
	return ctx.Err() == nil
}

// report calls the reporter, once it has returned from the call before.
func (t *teller) report(ctx context.Context, report Report) <-chan reply {
	answers, before, ended := make(chan reply, 1), t.reporting, make(chan struct{})
	t.reporting = ended
	go func() {
		defer close(ended)
		if before != nil {
			<-before
		}
		var a reply
		if a.err = ctx.Err(); a.err == nil {
			a.Instructions, a.err = t.to.Report(ctx, t.r.id, report)
		}
		answers <- a
	}()
	return answers
}

// send sends a report. Sooner: there is something to tell that came before the answer. Then the error is
// errSooner if the service held the report.
func (t *teller) send(ctx context.Context) (in Instructions, sooner bool, err error) {
	report := t.r.reportNow()
	if t.here != nil && has(report.Position, t.confirm) {
		t.expectNothing()
	}
	report.Digest = t.last
	held, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := t.report(held, report)
	a, ok := t.wait(ctx, answers, nil)
	if !ok {
		cancel()
		select {
		case a = <-answers:
		case <-ctx.Done():
			return in, false, context.Cause(ctx)
		}
		if a.err != nil {
			a.err = errSooner
		}
	}
	if a.err == nil && report.Digest == t.last {
		t.untold = false
	}
	return a.Instructions, !ok, a.err
}

// wait waits for an answer or until something is due, of which one is nil. It returns false if there is
// something to tell before that, or ctx has ended.
func (t *teller) wait(ctx context.Context, answers <-chan reply, due <-chan time.Time) (a reply, ok bool) {
	for {
		select {
		case a := <-answers:
			return a, true
		case <-due:
			return a, true
		case <-t.here:
			t.expectNothing()
			return a, false
		case d := <-t.digests:
			t.digests = nil
			if d.err != nil {
				t.notMade(d.err)
				continue
			}
			t.last, t.untold, t.failing = &d.Digest, true, false
			return a, false
		case <-ctx.Done():
			return a, false
		}
	}
}

func (t *teller) expectNothing() {
	t.giveUp()
	t.here, t.giveUp = nil, func() {}
}

// follow does what the service asks for, and returns when the next report is due.
func (t *teller) follow(ctx context.Context, in Instructions) time.Duration {
	next := time.Duration(min(max(in.NextMS, 0), maxNext.Milliseconds())) * time.Millisecond
	if in.Load != "" && !slices.Contains(t.loads, in.Load) {
		t.loads = append(t.loads, in.Load)
		t.loads = t.loads[max(0, len(t.loads)-maxHeardLoads):]
		t.r.log.Warn("the service asks for a snapshot to be loaded: what is known here differs from the log", "position", t.r.state.At())
		t.r.ask(goal{repair: true})
	}
	if in.Digest != nil && t.begin(ctx, *in.Digest) {
		next = max(next, digestPatience)
	}
	if in.Confirm.Epoch != "" {
		t.expectNothing()
		t.confirm = in.Confirm
		t.here, t.giveUp = t.r.state.comesTo(in.Confirm)
		next = confirmPatience
	}
	return next
}

// begin begins a digest, in place of the one before, and reports whether one is on its way.
func (t *teller) begin(ctx context.Context, asked DigestRequest) bool {
	if t.asked == asked && (t.digests != nil || t.untold) {
		return t.digests != nil // the service did not have it yet when it asked again
	}
	t.cancel()
	if took := t.r.now().since(t.began); t.digests != nil && took >= digestLate {
		t.notMade(fmt.Errorf("it was waited for in vain for %s", took.Round(time.Second)))
	}
	digests := make(chan made, 1)
	ctx, t.cancel = context.WithTimeoutCause(ctx, digestWithin, fmt.Errorf("it was waited for in vain for %s", digestWithin))
	t.asked, t.began, t.digests = asked, t.r.now(), digests
	cancel := t.cancel
	t.running.Go(func() {
		defer cancel()
		d, err := t.digest(ctx, asked.Cutoff, asked.After)
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		digests <- made{d, err}
	})
	return true
}

// notMade notes that the digest that was asked for last was not made.
func (t *teller) notMade(err error) {
	if t.failing {
		return
	}
	t.failing = true
	t.r.log.Warn("the digest that the service has asked for was not made: it cannot see whether what is known here is what the log says",
		"after", t.asked.After, "position", t.r.state.At(), "error", err)
}

// leave tells the service that the gateway stops, if it knows of it. It is called once run has returned.
func (t *teller) leave(ctx context.Context) {
	if !t.taken {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveWithin)
	defer cancel()
	report := t.r.reportNow()
	report.Leaving = true
	var err error
	select {
	case a := <-t.report(ctx, report):
		err = a.err
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		t.r.log.Debug("the service was not told that this gateway stops; it will take it for lost", "error", err)
	}
}

// leastWait is how long to wait at least after a report has failed.
func (t *teller) leastWait(err error) time.Duration {
	switch status := refusedWith(err); {
	case (status == http.StatusNotFound || status == http.StatusMethodNotAllowed) && !t.taken:
		return jittered(unknownReportWait) // once one was taken, this is a process of before in the midst of an update
	case status/100 == 4 && status != http.StatusRequestTimeout && status != http.StatusTooManyRequests:
		return jittered(refusedReportWait)
	}
	return jittered(minReportWait)
}

// refusedWith is the status of an answer that is not 200, or 0.
func refusedWith(err error) int {
	if e, ok := errors.AsType[*refusal](err); ok {
		return e.status
	}
	return 0
}

// reported notes what became of a report. Only changes are logged.
func (r *Replica) reported(err error) {
	r.mu.Lock()
	was := r.reportErr
	r.reportErr = err
	if err == nil {
		r.reports.Taken++
		r.reports.At, r.reports.Error = time.Now().UnixMilli(), ""
	} else {
		r.reports.Failed++
		r.reports.Error = err.Error()
	}
	r.mu.Unlock()
	log, status := r.log.With("id", r.id), refusedWith(err)
	switch {
	case err == nil && was == nil:
	case err == nil:
		log.Info("the service takes the reports of this gateway again")
	case was != nil && refusedWith(was) == status:
	case status == http.StatusForbidden || status == http.StatusConflict:
		log.Error("the service takes no reports of this gateway, and cannot tell what it has applied", "error", err)
	case status == http.StatusNotFound || status == http.StatusMethodNotAllowed:
		log.Info("the service takes no reports of gateways: it is older than this one", "error", err)
	default:
		log.Warn("the service cannot be told how this gateway does; it is tried again until it can", "error", err)
	}
}
