package sink

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
	"github.com/rescindhq/rescind/internal/relaytest"
)

const (
	webhookSecret    = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	webhookOldSecret = "whsec_b2xkLW9sZC1vbGQtb2xkLW9sZC1vbGQtb2xkIQ=="
)

// receiver is a webhook's far side: it verifies as Standard Webhooks tells receivers to.
type receiver struct {
	t   *testing.T
	url string

	mu       sync.Mutex
	answers  []int // for the next requests; 204 when there is none
	header   http.Header
	requests []webhookRequest
	arrived  chan revocation.Event
}

type webhookRequest struct {
	ID   string
	Seqs []revocation.Seq
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{t: t, arrived: make(chan revocation.Event, 1<<16)}
	server := httptest.NewServer(r)
	t.Cleanup(server.Close)
	r.url = server.URL
	return r
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return // the network was cut
	}
	events, err := r.read(req, body)
	if err != nil {
		r.t.Errorf("a request that receivers refuse: %v", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests = append(r.requests, webhookRequest{req.Header.Get("webhook-id"), seqsOf(events)})
	status := http.StatusNoContent
	if len(r.answers) > 0 {
		status, r.answers = r.answers[0], r.answers[1:]
	}
	for name, values := range r.header {
		w.Header()[name] = values
	}
	if status <= 299 {
		for _, e := range events {
			r.arrived <- e
		}
	}
	w.WriteHeader(status)
}

func (r *receiver) read(req *http.Request, body []byte) ([]revocation.Event, error) {
	if got := req.Header.Get("Content-Type"); got != "application/cloudevents-batch+json; charset=utf-8" || req.Method != http.MethodPost {
		return nil, fmt.Errorf("%s of %q", req.Method, got)
	}
	at, err := strconv.ParseInt(req.Header.Get("webhook-timestamp"), 10, 64)
	if age := time.Since(time.Unix(at, 0)); err != nil || age < -5*time.Minute || age > 5*time.Minute {
		return nil, fmt.Errorf("webhook-timestamp is %q", req.Header.Get("webhook-timestamp"))
	}
	if !verified(req.Header, body, webhookSecret) {
		return nil, errors.New("the signature is not that of the secret")
	}
	var parts []json.RawMessage
	if err := json.Unmarshal(body, &parts); err != nil || len(parts) == 0 {
		return nil, fmt.Errorf("the body is no batch of events: %v", err)
	}
	events := make([]revocation.Event, len(parts))
	for i, part := range parts {
		if events[i], err = revocation.ParseEvent(part); err != nil {
			return nil, err
		}
	}
	want := fmt.Sprintf("%s:%d-%d", events[0].Epoch, events[0].Seq, events[len(events)-1].Seq)
	if got := req.Header.Get("webhook-id"); got != want {
		return nil, fmt.Errorf("webhook-id is %q, want %q", got, want)
	}
	return events, nil
}

// verified is what a receiver does, in words other than the sink's.
func verified(h http.Header, body []byte, secret string) bool {
	key, _ := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	m := hmac.New(sha256.New, key)
	io.WriteString(m, h.Get("webhook-id")+"."+h.Get("webhook-timestamp")+".")
	m.Write(body)
	for one := range strings.SplitSeq(h.Get("webhook-signature"), " ") {
		sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(one, "v1,"))
		if err == nil && hmac.Equal(sum, m.Sum(nil)) {
			return true
		}
	}
	return false
}

func (r *receiver) next(ctx context.Context) (revocation.Event, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("no event within 30s"))
	defer cancel()
	select {
	case e := <-r.arrived:
		return e, nil
	case <-ctx.Done():
		return revocation.Event{}, context.Cause(ctx)
	}
}

func (r *receiver) seen() []webhookRequest {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.requests
}

func seqsOf(events []revocation.Event) []revocation.Seq {
	var seqs []revocation.Seq
	for _, e := range events {
		seqs = append(seqs, e.Seq)
	}
	return seqs
}

func newTestWebhook(t *testing.T, cfg WebhookConfig) *Webhook {
	t.Helper()
	if cfg.Secrets == nil {
		cfg.Secrets = []string{webhookSecret}
	}
	s, err := NewWebhook(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestWebhook(t *testing.T) {
	t.Parallel()
	relaytest.Sink(t, func(t *testing.T) relaytest.Far {
		r := newReceiver(t)
		u, proxy := proxied(t, strings.Replace(r.url, "http://", "http://hook:pass-3f@", 1)+"/in?key=query-7b")
		s := newTestWebhook(t, WebhookConfig{URL: u, Timeout: time.Minute})
		return relaytest.Far{
			Sink: s, Proxy: proxy, Secrets: []string{"pass-3f", "query-7b", webhookSecret},
			Next: func(ctx context.Context) (revocation.Seq, error) {
				e, err := r.next(ctx)
				return e.Seq, err
			},
		}
	})
}

func TestWebhookSignature(t *testing.T) {
	t.Parallel()
	s := newTestWebhook(t, WebhookConfig{URL: "https://hooks.example.com/", Secrets: []string{webhookSecret, webhookOldSecret}})
	got := s.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", time.Unix(1614265330, 0), []byte(`{"test": 2432232314}`))
	// The first is what the libraries of Standard Webhooks are tested with.
	const want = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE= v1,"
	if !strings.HasPrefix(got, want) || len(got) != len(want)+44 {
		t.Errorf("signatures are %q, want %q and another one", got, want)
	}
}

func TestWebhookRequest(t *testing.T) {
	t.Parallel()
	var got http.Header
	var both bool
	r := newReceiver(t)
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			t.Error(err)
		}
		got, both = req.Header, verified(req.Header, body, webhookSecret) && verified(req.Header, body, webhookOldSecret)
		req.Body = io.NopCloser(strings.NewReader(string(body)))
		r.ServeHTTP(w, req)
	}))
	t.Cleanup(server.Close)
	s := newTestWebhook(t, WebhookConfig{
		URL:     strings.Replace(server.URL, "https://", "https://hook:pass-3f@", 1) + "/in",
		Secrets: []string{webhookOldSecret, webhookSecret},
		TLS:     &tls.Config{RootCAs: server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs},
	})
	sent := relaytest.Events(88213, 1)[0]
	for range 2 {
		mustDeliver(t, s, sent)
		if !both {
			t.Error("a signature is not that of its secret")
		}
		e, err := r.next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if e.Traceparent == sent.Traceparent || e.Traceparent[:36] != sent.Traceparent[:36] {
			t.Errorf("traceparent is %s, want another parent id in the trace of %s", e.Traceparent, sent.Traceparent)
		}
		e.Traceparent = sent.Traceparent
		if diff := cmp.Diff(sent, e); diff != "" {
			t.Errorf("event (-want +got):\n%s", diff)
		}
	}
	if first, again := r.seen()[0].ID, r.seen()[1].ID; first != again {
		t.Errorf("the id of the same batch is %s, then %s", first, again)
	}
	if got.Get("Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte("hook:pass-3f")) || got.Get("User-Agent") != "rescind" {
		t.Errorf("header is %v", got)
	}
}

func TestWebhookBatches(t *testing.T) {
	t.Parallel()
	large := relaytest.Events(1, 9)
	for i := range large[:8] {
		large[i].Subject = strings.Repeat("x", 40<<10)
	}
	mixed := relaytest.Events(1, 6)
	mixed[1].Type, mixed[3].Type, mixed[4].Type = "application.deleted", "application.created", "api.created"
	tests := []struct {
		name   string
		cfg    WebhookConfig
		events []revocation.Event
		want   []webhookRequest
	}{
		{"by number", WebhookConfig{MaxEvents: 2}, relaytest.Events(7, 5), []webhookRequest{
			{"7-8", []revocation.Seq{7, 8}}, {"9-10", []revocation.Seq{9, 10}}, {"11-11", []revocation.Seq{11}},
		}},
		{"by size", WebhookConfig{MaxBytes: 128 << 10}, large, []webhookRequest{
			{"1-3", []revocation.Seq{1, 2, 3}}, {"4-6", []revocation.Seq{4, 5, 6}}, {"7-9", []revocation.Seq{7, 8, 9}},
		}},
		{"by type", WebhookConfig{Types: []string{"revocation", "application.deleted"}, MaxEvents: 2}, mixed, []webhookRequest{
			{"1-2", []revocation.Seq{1, 2}}, {"3-6", []revocation.Seq{3, 6}},
		}},
		{"nothing of it", WebhookConfig{Types: []string{"scope"}}, mixed, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newReceiver(t)
			tt.cfg.URL = r.url
			mustDeliver(t, newTestWebhook(t, tt.cfg), tt.events...)
			for i := range tt.want {
				tt.want[i].ID = string(relaytest.Epoch) + ":" + tt.want[i].ID
			}
			if diff := cmp.Diff(tt.want, r.seen()); diff != "" {
				t.Errorf("requests (-want +got):\n%s", diff)
			}
		})
	}
}

// A receiver that takes a little at a time must not get the beginning for ever.
func TestWebhookGoesOnWhereItFailed(t *testing.T) {
	t.Parallel()
	r := newReceiver(t)
	s := newTestWebhook(t, WebhookConfig{URL: r.url, MaxEvents: 1})
	r.answers = []int{200, 200, 429, 202, 503, 200, 200}
	events := relaytest.Events(1, 4)
	for try := 1; try <= 2; try++ {
		if err := s.Deliver(t.Context(), events); err == nil {
			t.Fatalf("try %d: no error", try)
		}
	}
	mustDeliver(t, s, append(events, relaytest.Events(5, 1)...)...) // the relay has more by then
	var seqs []revocation.Seq
	for _, req := range r.seen() {
		seqs = append(seqs, req.Seqs...)
	}
	if diff := cmp.Diff([]revocation.Seq{1, 2, 3, 3, 4, 4, 5}, seqs); diff != "" {
		t.Errorf("seqs that were sent (-want +got):\n%s", diff)
	}
	mustDeliver(t, s, events...) // an operator set the cursor back
	if got := len(r.seen()); got != 11 {
		t.Errorf("%d requests after the same events again, want 11", got)
	}
}

// Batches that the receiver finds too large are halved, and grow again with what it takes.
func TestWebhookTooLarge(t *testing.T) {
	t.Parallel()
	r := newReceiver(t)
	s := newTestWebhook(t, WebhookConfig{URL: r.url, MaxEvents: 8})
	r.answers = []int{413, 413, 200, 413, 413}
	events := relaytest.Events(1, 6)
	if err := s.Deliver(t.Context(), events); err == nil || !strings.Contains(err.Error(), "413") || isPermanent(err) {
		t.Errorf("error is %v, want one that says 413 and that is not permanent", err)
	}
	mustDeliver(t, s, events...)
	var ids []string
	for _, req := range r.seen() {
		_, id, _ := strings.Cut(req.ID, ":")
		ids = append(ids, id)
	}
	if diff := cmp.Diff([]string{"1-6", "1-3", "1-1", "2-3", "2-2", "2-2", "3-4", "5-6"}, ids); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestWebhookTypes(t *testing.T) {
	t.Parallel()
	for typ, want := range map[string]bool{
		"revocation": true, "revocation.client": true, "revocation.key": true, "application": true, "key_mapping.deleted": true,
		"api.lifecycle_changed": true, "api.deployed": true, "tenant.created": true,
		"revocations": false, "revocation.clients": false, "revocation.": false, "revocation.created": false, "application.removed": false,
		"application.deployed": false, "Application": false, "heartbeat": false, "": false, "api.": false,
	} {
		_, err := NewWebhook(WebhookConfig{URL: "https://hooks.example.com/", Secrets: []string{webhookSecret}, Types: []string{typ}})
		if (err == nil) != want {
			t.Errorf("type %q: %v, want it to be known: %t", typ, err, want)
		}
	}
}

func isPermanent(err error) bool {
	return strings.Contains(err.Error(), relay.Permanent(errors.New("")).Error())
}

func TestWebhookAnswers(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]string{
		200: "", 201: "", 204: "", 299: "",
		301: "retry", 302: "retry", 304: "retry", 307: "retry", 308: "retry",
		400: "retry", 401: "retry", 403: "retry", 404: "retry", 410: "permanent", 413: "retry", 422: "retry",
		408: "retry", 425: "retry", 429: "retry", 500: "retry", 501: "retry", 502: "retry", 503: "retry", 504: "retry", 599: "retry",
	} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			t.Parallel()
			elsewhere := newReceiver(t)
			r := newReceiver(t)
			r.answers = []int{status}
			r.header = http.Header{"Location": {elsewhere.url + "/?key=query-7b"}, "Retry-After": {"soon"}}
			err := newTestWebhook(t, WebhookConfig{URL: r.url + "/path-9c?key=query-7b"}).Deliver(t.Context(), relaytest.Events(1, 1))
			got := ""
			if err != nil {
				got = "retry"
				if isPermanent(err) {
					got = "permanent"
				}
				if s := err.Error(); strings.Contains(s, "query-7b") || strings.Contains(s, "path-9c") || !strings.Contains(s, strconv.Itoa(status)) {
					t.Errorf("error is %v, want one with the status and without the URL", err)
				}
			}
			if got != want {
				t.Errorf("error is %v, want %q", err, want)
			}
			if len(elsewhere.seen()) > 0 {
				t.Error("a redirect was followed")
			}
		})
	}
}

func TestWebhookRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 20, 21, 10, 0, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"": 0, "0": 0, "7": 7 * time.Second, "60": time.Minute, "86400": time.Minute, "4294967296": 0, "-1": 0, "soon": 0,
		"Fri, 20 Nov 2026 21:10:09 GMT": 9 * time.Second, "Fri, 20 Nov 2026 20:00:00 GMT": 0, "Fri, 20 Nov 2037 20:00:00 GMT": time.Minute,
	} {
		if got := retryAfter(header, now); got != want {
			t.Errorf("Retry-After: %s makes %s, want %s", header, got, want)
		}
	}

	r := newReceiver(t)
	s := newTestWebhook(t, WebhookConfig{URL: r.url})
	r.answers, r.header = []int{429}, http.Header{"Retry-After": {"3600"}}
	if err := s.Deliver(t.Context(), relaytest.Events(1, 1)); err == nil {
		t.Fatal("no error for 429")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := s.Deliver(ctx, relaytest.Events(1, 1)); !errors.Is(err, context.DeadlineExceeded) || len(r.seen()) != 1 {
		t.Errorf("before its time: error %v after %d requests, want the context's after 1", err, len(r.seen()))
	}
	later := time.Now().Add(webhookMaxWait)
	s.now = func() time.Time { return later }
	mustDeliver(t, s, relaytest.Events(1, 1)...)
}

func TestWebhookErrors(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	silent := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
	t.Cleanup(func() { close(release); silent.Close() })
	tooLarge := relaytest.Events(1, 1)
	tooLarge[0].Subject = strings.Repeat("x", 64<<10)
	trusted := silent.Client().Transport.(*http.Transport).TLSClientConfig
	for _, tt := range []struct {
		name      string
		url       string
		tls       *tls.Config
		events    []revocation.Event
		want      string
		permanent bool
	}{
		{"nobody listens", "http://127.0.0.1:1", nil, relaytest.Events(1, 1), "connection refused", false},
		{"not trusted", silent.URL, nil, relaytest.Events(1, 1), "certificate", false},
		{"silent", silent.URL, trusted, relaytest.Events(1, 1), "no answer within 50ms", false},
		{"an event that cannot be sent", silent.URL, trusted, tooLarge, "must be below 65536", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			u := strings.Replace(tt.url, "://", "://hook:pass-3f@", 1) + "/path-9c?key=query-7b"
			s := newTestWebhook(t, WebhookConfig{URL: u, TLS: tt.tls})
			s.timeout = 50 * time.Millisecond
			if strings.Contains(tt.want, "certificate") {
				s.timeout = time.Minute
			}
			err := s.Deliver(t.Context(), tt.events)
			if err == nil || !strings.Contains(err.Error(), tt.want) || isPermanent(err) != tt.permanent {
				t.Fatalf("error is %v, want one that says %q; permanent: %t", err, tt.want, tt.permanent)
			}
			for _, secret := range []string{"pass-3f", "query-7b", "path-9c"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error tells %s: %v", secret, err)
				}
			}
		})
	}
}

func TestNewWebhook(t *testing.T) {
	t.Parallel()
	for _, u := range []string{"https://hooks.example.com/in", "http://localhost:8080/", "http://127.0.0.9/", "http://[::1]:80/"} {
		newTestWebhook(t, WebhookConfig{URL: u})
	}
	newTestWebhook(t, WebhookConfig{URL: "http://hooks.example.com/", AllowHTTP: true})
	_, err := NewWebhook(WebhookConfig{
		URL: "http://hook:pass-3f@hooks.example.com/path-9c?key=query-7b", TLS: &tls.Config{},
		Secrets: []string{"MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_c2hvcnQ=", "whsec_%"}, Types: []string{"revocation.*"},
		MaxEvents: -1, MaxBytes: 1, Timeout: time.Hour,
	})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		"hooks.example.com is not loopback", "TLS is set", "3 secrets", "secret 1", "secret 2", "secret 3", `"revocation.*"`,
		"events in one request are -1", "bytes in one request are 1,", "timeout is 1h0m0s",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not say %q: %v", want, err)
		}
	}
	for _, u := range []string{"", "hooks.example.com", "ftp://query-7b.example.com", "https://", "https://pass-3f:%zz@query-7b", "https://a/#query-7b"} {
		_, other := NewWebhook(WebhookConfig{URL: u, Secrets: []string{webhookSecret}})
		if other == nil {
			t.Errorf("URL %q: no error", u)
			continue
		}
		err = errors.Join(err, other)
	}
	for _, secret := range []string{"pass-3f", "query-7b", "path-9c", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "c2hvcnQ"} {
		if strings.Contains(err.Error(), secret) {
			t.Errorf("an error tells %s: %v", secret, err)
		}
	}
}

// journal is a sink of one's own: it appends events to a file.
type journal struct{ file *os.File }

func (j journal) Deliver(_ context.Context, events []revocation.Event) error {
	for _, e := range events {
		line, err := e.MarshalJSON()
		if err != nil {
			return relay.Permanent(err) // it will be no better next time
		}
		if _, err := j.file.Write(append(line, '\n')); err != nil {
			return fmt.Errorf("append to journal: %w", err) // the disk may have room again
		}
	}
	return j.file.Sync() // before that nothing is safe
}

// Whatever is a relay.Sink can be fed: a name for its cursor and lock is all that the
// relay needs beside it.
func Example_sinkOfOnesOwn() {
	file, err := os.CreateTemp("", "journal")
	if err != nil {
		panic(err)
	}
	defer os.Remove(file.Name())
	own := relay.Named{Name: "journal", Sink: journal{file}}

	err = own.Sink.Deliver(context.Background(), relaytest.Events(1, 2))
	written, _ := os.ReadFile(file.Name())
	fmt.Println(err, strings.Count(string(written), "\n"))
	// Output: <nil> 2
}
