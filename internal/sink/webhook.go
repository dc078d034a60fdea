package sink

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/relay"
)

// WebhookConfig is for [NewWebhook]. All but URL and Secrets may stay zero.
type WebhookConfig struct {
	// URL is where events are posted: https, or http to a loopback address. User and
	// password in it are sent as HTTP Basic. It is a secret: errors name its host only.
	URL string
	// Secrets sign what is sent: "whsec_" and 24 to 64 bytes in base64, each. There is
	// one, or two while the receiver changes from one to the other.
	Secrets []string
	// Name tells sinks apart. Default "webhook".
	Name string
	// TLS is for https URLs; without it the system's authorities are trusted.
	TLS *tls.Config
	// AllowHTTP permits http to any host. The signature keeps anybody from changing
	// what is sent, and nobody from reading it.
	AllowHTTP bool
	// Types are what the receiver wants: nouns ("revocation", or one of [catalog.Nouns])
	// and whole types ("revocation.client", "application.deleted"). Empty: everything.
	Types []string
	// MaxEvents caps the events in one request. More are faster to a distant receiver,
	// and repeated together if an answer is lost. Default 100, 1 to 10000.
	MaxEvents int
	// MaxBytes caps a request's body. Default 1 MiB, at least 128 KiB: an event has up to 64.
	MaxBytes int
	// Timeout bounds one request until its answer is there. Default 15s, 1s to 5m.
	Timeout time.Duration
}

// Webhook posts every event to a URL, in order and at least once: a batch of structured
// CloudEvents as a JSON array (application/cloudevents-batch+json), signed as Standard
// Webhooks demand (version 1.0.0, github.com/standard-webhooks/standard-webhooks). The
// next batch waits for the answer to the one before; 2xx says that the receiver has it
// safe, and 410 that it wants nothing more, which stops the sink. After any other answer
// the batch is sent again: what is wrong may be mended at the far side, where nobody can
// restart us. After 413 batches are smaller for a while. The id of a batch, "<epoch>:<first seq>-<last seq>", and its body are the same
// whenever it is sent again; how events are divided into batches may differ then, so
// receivers go by the id of each event.
//
// It is no cleverer than a sink must be, and meant to be read by those who write one of
// their own. What a sink is told and what it may answer is in [relay.Sink]; in short:
//
//   - Deliver returns nil when the far side has every event safe, and not before.
//   - Any other error is tried again, all the events with it; a sink needs no backoff.
//   - [relay.Permanent] is for what no retry mends. It stops the sink until a restart,
//     since skipping an event is never right.
//   - The relay hands a sink to another process by [relay.Closer].
//   - Errors are logged: nothing secret is in them.
//
// relaytest.Sink shows whether a sink keeps to that.
type Webhook struct {
	name    string
	url     *url.URL
	keys    [][]byte
	types   []string
	events  int
	bytes   int
	timeout time.Duration
	client  *http.Client
	now     func() time.Time

	// failed is the first event of the delivery that failed last, and safe the last one
	// of it that the receiver has: a receiver that takes a little at a time gets on.
	failed revocation.Position
	safe   revocation.Seq
	// atOnce is how many events the receiver takes in one request: events at first, half of
	// a batch that it finds too large, and one more after each that it takes.
	atOnce int
	// notBefore is when the receiver wants to be asked again.
	notBefore time.Time
}

var _ relay.Closer = (*Webhook)(nil)

const (
	// webhookMaxWait bounds what a receiver's Retry-After can ask for.
	webhookMaxWait = time.Minute
	// webhookMaxAnswer is how much of an answer is read, so that its connection can be
	// used again.
	webhookMaxAnswer = 64 << 10

	webhookSecretPrefix = "whsec_"
)

// NewWebhook checks cfg. It does not connect.
func NewWebhook(cfg WebhookConfig) (*Webhook, error) {
	s := &Webhook{
		name: cmp.Or(cfg.Name, "webhook"), types: slices.Clone(cfg.Types), now: time.Now,
		events: cmp.Or(cfg.MaxEvents, 100), bytes: cmp.Or(cfg.MaxBytes, 1<<20), timeout: cmp.Or(cfg.Timeout, 15*time.Second),
	}
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	u, err := url.Parse(cfg.URL)
	if err != nil || u.Host == "" || u.Fragment != "" || u.Scheme != "https" && u.Scheme != "http" {
		check(false, "URL is not of the form https://host/path") // its text may have a secret in it
	} else {
		plain := u.Scheme == "http"
		check(!plain || cfg.AllowHTTP || isLoopback(u.Hostname()),
			"URL's scheme is http and %s is not loopback, so everybody on the way could read the events: use https", u.Host)
		check(!plain || cfg.TLS == nil, "TLS is set, but the URL's scheme is http: use https")
	}
	s.url = u
	check(len(cfg.Secrets) == 1 || len(cfg.Secrets) == 2, "there are %d secrets, must be 1, or 2 while they change", len(cfg.Secrets))
	for i, secret := range cfg.Secrets {
		encoded, prefixed := strings.CutPrefix(secret, webhookSecretPrefix)
		key, err := base64.StdEncoding.DecodeString(encoded)
		check(prefixed && err == nil && 24 <= len(key) && len(key) <= 64,
			"secret %d is not %s and 24 to 64 bytes in base64; make one with: echo %s$(openssl rand -base64 32)",
			i+1, webhookSecretPrefix, webhookSecretPrefix)
		s.keys = append(s.keys, key)
	}
	for _, typ := range cfg.Types {
		check(knownType(typ), "there are no events of type %q; a noun is revocation or one of %s, a whole type is such as revocation.client or application.deleted",
			typ, catalog.Nouns)
	}
	check(1 <= s.events && s.events <= 10000, "events in one request are %d, must be 1 to 10000", s.events)
	check(s.bytes >= 128<<10, "bytes in one request are %d, must be at least %d", s.bytes, 128<<10)
	check(time.Second <= s.timeout && s.timeout <= 5*time.Minute, "timeout is %s, must be 1s to 5m", s.timeout)
	if len(errs) > 0 {
		return nil, fmt.Errorf("sink %s: %w", s.name, errors.Join(errs...))
	}
	s.atOnce = s.events
	http1 := new(http.Protocols)
	http1.SetHTTP1(true) // there is one request at a time
	s.client = &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: cfg.TLS, Protocols: http1,
			DisableCompression: true, IdleConnTimeout: 90 * time.Second, MaxResponseHeaderBytes: webhookMaxAnswer,
		},
		// Whoever can answer must not choose who gets the events.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return s, nil
}

// knownType reports whether typ is a noun or a type of events that there are.
func knownType(typ string) bool {
	noun, verb, whole := strings.Cut(typ, ".")
	switch {
	case noun == "revocation":
		return !whole || slices.Contains(revocation.Kinds, revocation.Kind(verb))
	case !slices.Contains(catalog.Nouns, catalog.Noun(noun)):
		return false
	}
	verbs := []catalog.Verb{catalog.Created, catalog.Updated, catalog.Deleted}
	if catalog.Noun(noun) == catalog.NounAPI {
		verbs = append(verbs, catalog.LifecycleChanged, catalog.Deployed, catalog.Undeployed)
	}
	return !whole || slices.Contains(verbs, catalog.Verb(verb))
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Deliver implements [relay.Sink].
func (s *Webhook) Deliver(ctx context.Context, events []revocation.Event) error {
	if len(events) == 0 {
		return nil
	}
	first := events[0].Position
	if first != s.failed {
		s.safe = 0
	}
	for len(events) > 0 {
		b, err := s.take(events)
		if err != nil {
			return relay.Permanent(err)
		}
		if b.id != "" {
			err := s.post(ctx, b.id, b.body)
			if errors.Is(err, errTooLarge) && b.sent > 1 {
				s.atOnce = b.sent / 2
				continue
			}
			if err != nil {
				s.failed = first
				return fmt.Errorf("sink %s: post events to %s: %w", s.name, s.url.Host, err)
			}
			s.atOnce = min(s.atOnce+1, s.events)
		}
		s.safe = b.through
		events = events[b.n:]
	}
	s.failed = revocation.Position{}
	return nil
}

// Close implements [relay.Closer].
func (s *Webhook) Close() {
	s.failed, s.notBefore, s.atOnce = revocation.Position{}, time.Time{}, s.events
	s.client.CloseIdleConnections()
}

// webhookBatch is what one request is about.
type webhookBatch struct {
	n       int // events, those included that the receiver does not want
	through revocation.Seq
	sent    int // those that it does
	// id is empty, and there is no body, if there is nothing to send.
	id   string
	body []byte
}

// take makes a batch of as many of events as fit. Its body is new: a connection that
// was given up may still read the one before.
func (s *Webhook) take(events []revocation.Event) (webhookBatch, error) {
	var (
		b           webhookBatch
		first, last revocation.Seq
	)
	for _, e := range events {
		if e.Seq > s.safe && s.wants(e.Type) {
			e.Traceparent = continueTrace(e.Traceparent, publicationID(s.name, e.Position))
			body, err := e.MarshalJSON()
			if err != nil {
				return b, err
			}
			if b.sent == s.atOnce || b.sent > 0 && len(b.body)+len(body)+len(",]") > s.bytes {
				break
			}
			if b.sent == 0 {
				first = e.Seq
				b.body = append(b.body, '[')
			} else {
				b.body = append(b.body, ',')
			}
			b.body = append(b.body, body...)
			last = e.Seq
			b.sent++
		}
		b.n, b.through = b.n+1, e.Seq
	}
	if b.sent > 0 {
		b.body = append(b.body, ']')
		b.id = fmt.Sprintf("%s:%d-%d", events[0].Epoch, first, last)
	}
	return b, nil
}

func (s *Webhook) wants(typ string) bool {
	noun, _, _ := strings.Cut(typ, ".")
	return len(s.types) == 0 || slices.Contains(s.types, typ) || slices.Contains(s.types, noun)
}

// post sends one batch.
func (s *Webhook) post(ctx context.Context, id string, body []byte) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, s.timeout, fmt.Errorf("no answer within %s", s.timeout))
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url.String(), bytes.NewReader(body))
	if err != nil {
		return relay.Permanent(errors.New("the URL makes no request")) // err has the URL in it
	}
	now := s.now()
	req.Header.Set("Content-Type", "application/cloudevents-batch+json; charset=utf-8")
	req.Header.Set("User-Agent", "rescind")
	req.Header.Set("Webhook-Id", id)
	req.Header.Set("Webhook-Timestamp", strconv.FormatInt(now.Unix(), 10))
	req.Header.Set("Webhook-Signature", s.sign(id, now, body))
	resp, err := s.client.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if outer, ok := errors.AsType[*url.Error](err); ok {
			err = outer.Err // the outer one names the URL
		}
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, webhookMaxAnswer)) // the status is the answer
	return s.judge(resp)
}

// wait lets the time pass that the receiver has asked for.
func (s *Webhook) wait(ctx context.Context) error {
	wait := s.notBefore.Sub(s.now())
	if wait <= 0 {
		return nil
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// sign is the webhook-signature header: a signature for each key.
func (s *Webhook) sign(id string, at time.Time, body []byte) string {
	var all []string
	for _, key := range s.keys {
		m := hmac.New(sha256.New, key)
		fmt.Fprintf(m, "%s.%d.", id, at.Unix())
		m.Write(body)
		all = append(all, "v1,"+base64.StdEncoding.EncodeToString(m.Sum(nil)))
	}
	return strings.Join(all, " ")
}

// judge says what an answer means.
func (s *Webhook) judge(resp *http.Response) error {
	code := resp.StatusCode
	if 200 <= code && code <= 299 {
		return nil
	}
	if wait := retryAfter(resp.Header.Get("Retry-After"), s.now()); wait > 0 {
		s.notBefore = s.now().Add(wait)
	}
	err := fmt.Errorf("the answer is %d %s", code, http.StatusText(code))
	switch {
	case 300 <= code && code <= 399:
		return fmt.Errorf("%w, and redirects are not followed: set the URL that it leads to", err)
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return fmt.Errorf("%w: compare the secret, and the URL's user and password, with the receiver's", err)
	case code == http.StatusGone:
		return relay.Permanent(fmt.Errorf("%w: the receiver wants no more events", err))
	case code == http.StatusRequestEntityTooLarge:
		return fmt.Errorf("%w: %w", err, errTooLarge)
	}
	return err
}

// errTooLarge is of 413. A batch of one event cannot be made smaller.
var errTooLarge = errors.New("the receiver must take an event of 64 KiB")

// retryAfter reads the header of that name (RFC 9110, section 10.2.3), up to
// webhookMaxWait. What cannot be read asks for nothing.
func retryAfter(header string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(header, 10, 32); err == nil {
		return min(time.Duration(seconds)*time.Second, webhookMaxWait)
	}
	if at, err := http.ParseTime(header); err == nil {
		return min(max(at.Sub(now), 0), webhookMaxWait)
	}
	return 0
}
