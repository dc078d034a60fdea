package rest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// IdempotencyStore remembers answers for 24 hours. [Answers] is one.
type IdempotencyStore interface {
	// Begin takes a place for the request, or returns what became of an earlier one.
	Begin(ctx context.Context, caller, method, path, key string, fingerprint [32]byte) (Earlier, error)
	// Finish keeps the answer; with status 0 it gives the place up. A place for which it is
	// not called is taken over by the same request, once that is sure to be over.
	Finish(ctx context.Context, caller, method, path, key string, status int, header http.Header, body []byte) error
}

// Earlier is what is known about a request with the same key.
type Earlier struct {
	// Begun: this request is the first and goes on.
	Begun bool
	// Mismatch: the other had another body. Running: it has no answer yet.
	Mismatch, Running bool
	// Full: there was none, and no more is kept for the caller.
	Full   bool
	Status int
	Header http.Header
	Body   []byte
}

const (
	// finishTimeout bounds what is done for a request whose caller may be gone.
	finishTimeout = 5 * time.Second
	// fullRetry is what callers are asked to wait for whom no more is kept.
	fullRetry = time.Hour
)

// keptHeaders are those of an answer that come again with it.
var keptHeaders = []string{"Content-Type", "ETag", "Location"}

// Idempotent returns middleware that honours Idempotency-Key on POST, for the accounts
// that [Require] lets through: a request that comes again with its key and body gets the
// answer that there was, with Idempotency-Replayed, another one with that key 422, and
// one that comes while the first is worked on 409. What says nothing about the request
// itself is not kept: 401, 403, 429 and 5xx, and answers of which a handler says [DoNotKeep].
// Callers for whom too much is kept get 429 for a new key. After a 503 for [ledger.ErrDoubt] a request
// counts as worked on: whoever repeats it at once does not do it twice.
//
// It is no guarantee. A request that may have been done although nobody kept its answer, as
// of a process that died or of such a doubt, is taken for abandoned after a minute, and
// done when it comes again.
//
// The handler's answer is held back until it is kept, so handlers cannot stream.
func Idempotent(store IdempotencyStore) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return Handler(func(w http.ResponseWriter, r *http.Request) error {
			header := r.Header["Idempotency-Key"]
			if r.Method != http.MethodPost || len(header) == 0 {
				next.ServeHTTP(w, r)
				return nil
			}
			key, ok := parseKey(header)
			if !ok {
				return Status(http.StatusBadRequest, `Idempotency-Key must be one quoted string, or token, of 1 to 255 characters: "8e03978e".`)
			}
			path := r.URL.EscapedPath()
			if len(path) > maxPathBytes {
				return Status(http.StatusRequestURITooLong, "")
			}
			body, err := readBody(w, r)
			if err != nil {
				return err
			}
			r.Body = io.NopCloser(bytes.NewReader(body))
			p := &place{store: store, caller: ActorOf(w, r).Name, method: r.Method, path: path, key: key}
			return p.serve(w, r, next, fingerprint(body, r.URL.RawQuery))
		})
	}
}

var (
	sfString = regexp.MustCompile(`^"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"$`) // RFC 9651, section 3.3.3
	sfToken  = regexp.MustCompile("^[!#$%&'*+.^_`|~0-9A-Za-z:/-]+$")                  // section 3.3.4, but may begin with any
)

// maxPathBytes is what fits into an index, with the key and the rest.
const (
	maxKeyBytes  = 255
	maxPathBytes = 1024
)

func parseKey(header []string) (key string, ok bool) {
	if len(header) != 1 {
		return "", false
	}
	key = header[0]
	if m := sfString.FindStringSubmatch(key); m != nil {
		key = strings.NewReplacer(`\"`, `"`, `\\`, `\`).Replace(m[1])
	} else if !sfToken.MatchString(key) {
		return "", false
	}
	return key, 1 <= len(key) && len(key) <= maxKeyBytes
}

// fingerprint is the SHA-256 of the body, and of the query string where there is one:
// it may change what the request means.
func fingerprint(body []byte, query string) [32]byte {
	if query == "" {
		return sha256.Sum256(body)
	}
	return sha256.Sum256(fmt.Appendf(body[:len(body):len(body)], "\x00?%s", query))
}

// place is that of one request in a store.
type place struct {
	store                     IdempotencyStore
	caller, method, path, key string
}

func (p *place) serve(w http.ResponseWriter, r *http.Request, next http.Handler, fingerprint [32]byte) error {
	earlier, err := p.store.Begin(r.Context(), p.caller, p.method, p.path, p.key, fingerprint)
	switch {
	case err != nil:
		return fmt.Errorf("look up idempotency key: %w", err)
	case earlier.Mismatch:
		return &Problem{
			Slug: "idempotency-key-reused", Title: "The idempotency key was used for another request.", Status: http.StatusUnprocessableEntity,
			Detail: "Send a new key with a new request, or the same body with the same key.",
		}
	case earlier.Running:
		return &Problem{
			Slug: "idempotency-in-progress", Title: "The request with this idempotency key is still being worked on.", Status: http.StatusConflict,
			Detail: "Send it again later for its answer. If its outcome is not known, this ends after a minute: look until then whether it was done.",
		}
	case earlier.Full:
		return &Problem{
			Slug: "too-many-answers", Title: "No more answers are kept for this account.", Status: http.StatusTooManyRequests, RetryAfter: fullRetry,
			Detail: "Nothing was done. The answer to a request with an Idempotency-Key is kept for a day, and those of this account take " +
				"all the room that one has. Send the request without the key if repeating it does no harm, or later.",
		}
	case !earlier.Begun:
		answer := held{ResponseWriter: w, status: earlier.Status}
		answer.body.Write(earlier.Body)
		for _, name := range keptHeaders {
			if values := earlier.Header.Values(name); len(values) > 0 {
				w.Header()[http.CanonicalHeaderKey(name)] = values
			}
		}
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Idempotency-Replayed", "true")
		answer.send()
		return nil
	}

	answer := &held{ResponseWriter: w}
	returned := false
	defer func() {
		if !returned { // a panic, which goes on
			_ = p.finish(r.Context(), 0, nil, nil)
		}
	}()
	next.ServeHTTP(answer, r)
	returned = true
	if answer.status == 0 {
		answer.status = http.StatusOK // what net/http sends for a handler that wrote nothing
	}
	switch {
	case answer.doubt: // the place stays taken
	case answer.isFinal():
		kept := make(http.Header)
		for _, name := range keptHeaders {
			if values := w.Header().Values(name); len(values) > 0 {
				kept[http.CanonicalHeaderKey(name)] = values
			}
		}
		err = p.finish(r.Context(), answer.status, kept, answer.body.Bytes())
	default:
		err = p.finish(r.Context(), 0, nil, nil)
	}
	if rec, ok := find[authn.Recorder](w); ok && err != nil {
		// What was done is done: the caller is told, though not a second time.
		rec.RecordError(fmt.Errorf("keep answer for idempotency key: %w", err))
	}
	answer.send()
	return nil
}

func (p *place) finish(ctx context.Context, status int, header http.Header, body []byte) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishTimeout)
	defer cancel()
	return p.store.Finish(ctx, p.caller, p.method, p.path, p.key, status, header, body)
}

// held is an answer that is not sent yet, but for its header.
type held struct {
	http.ResponseWriter
	status int
	body   bytes.Buffer
	doubt  bool // it is not known whether the request was done
	unkept bool // see [DoNotKeep]
}

// DoNotKeep says that [Idempotent] need not keep the answer that a handler is about to write:
// the request changes nothing, and may as well be worked on again.
func DoNotKeep(w http.ResponseWriter) {
	if h, ok := find[*held](w); ok {
		h.unkept = true
	}
}

var _ authn.Recorder = (*held)(nil)

// RecordClient implements [authn.Recorder].
func (h *held) RecordClient(id string) {
	if rec, ok := find[authn.Recorder](h.ResponseWriter); ok {
		rec.RecordClient(id)
	}
}

// RecordError implements [authn.Recorder].
func (h *held) RecordError(err error) {
	h.doubt = h.doubt || errors.Is(err, ledger.ErrDoubt)
	if rec, ok := find[authn.Recorder](h.ResponseWriter); ok {
		rec.RecordError(err)
	}
}

// Unwrap is for [http.ResponseController] and [find].
func (h *held) Unwrap() http.ResponseWriter { return h.ResponseWriter }

func (h *held) WriteHeader(status int) {
	if h.status == 0 && status >= 200 {
		h.status = status
	}
}

func (h *held) Write(b []byte) (int, error) {
	h.WriteHeader(http.StatusOK)
	return h.body.Write(b)
}

// FlushError keeps [http.ResponseController] from flushing what h wraps.
func (h *held) FlushError() error { return errors.ErrUnsupported }

// isFinal reports whether the same request must be answered so again.
func (h *held) isFinal() bool {
	switch h.status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests:
		return false
	}
	return h.status < 500 && !h.unkept
}

func (h *held) send() {
	h.ResponseWriter.WriteHeader(h.status)
	_, _ = h.ResponseWriter.Write(h.body.Bytes()) // a caller that is gone does not read it
}
