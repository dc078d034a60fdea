package eventhub

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/internal/rest"
)

const (
	// pieceBytes is how much is written at once. A reader must take it within stallTime: the
	// system says that there is room only when a third of its buffer is free, which can be
	// more than a MiB.
	pieceBytes = 128 << 10
	stallTime  = 30 * time.Second
	// leastRate, in bytes a second, is what a reader must take all in all, beside what it
	// may be late by, graceTime.
	leastRate = 64 << 10
	graceTime = 30 * time.Second
	// readTime is for how much longer a connection stays timed for reading than for
	// writing: the server takes a reader for gone when its time for reading is over.
	readTime = time.Minute
)

// acceptsGzip reports whether r's sender takes gzip (RFC 9110, section 12.5.3), as Go's
// clients do.
func acceptsGzip(r *http.Request) bool {
	for _, field := range r.Header["Accept-Encoding"] {
		for coding := range strings.SplitSeq(field, ",") {
			name, parameters, _ := strings.Cut(coding, ";")
			if strings.EqualFold(strings.TrimSpace(name), "gzip") {
				q, ok := strings.CutPrefix(strings.ReplaceAll(parameters, " ", ""), "q=")
				return !ok || strings.Trim(q, "0.") != ""
			}
		}
	}
	return false
}

// paced writes to a reader that must keep up.
type paced struct {
	w     http.ResponseWriter
	rc    *http.ResponseController
	sent  int
	spent time.Duration // in writes
}

func newPaced(w http.ResponseWriter) *paced {
	return &paced{w: w, rc: http.NewResponseController(w)}
}

func (p *paced) Write(b []byte) (n int, err error) {
	for len(b) > 0 && err == nil {
		piece := b[:min(len(b), pieceBytes)]
		start := time.Now()
		due := graceTime + time.Duration(p.sent+len(piece))*time.Second/leastRate - p.spent
		deadline := start.Add(min(due, stallTime))
		_ = p.rc.SetWriteDeadline(deadline) // a recorder in a test has none
		_ = p.rc.SetReadDeadline(deadline.Add(readTime))
		var written int
		written, err = p.w.Write(piece)
		n, b = n+written, b[written:]
		p.sent += written
		p.spent += time.Since(start)
	}
	return n, err
}

// send answers 200 with plain, or with packed, the same in gzip, if that is not nil.
func (h *Hub) send(w http.ResponseWriter, r *http.Request, plain, packed *body) error {
	b := plain
	header := w.Header()
	if packed != nil {
		b = packed
	}
	if !h.sending.begin(rest.AccountOf(r.Context()).Username, b) {
		return errBusy
	}
	defer h.sending.end(b)
	if packed != nil {
		header.Set("Content-Encoding", "gzip")
	}
	header.Set("Content-Type", "application/json")
	header.Set("Vary", "Accept-Encoding")
	header.Set("Content-Length", strconv.Itoa(len(b.bytes)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	if _, err := newPaced(w).Write(b.bytes); err != nil {
		h.abort()
	}
	return nil
}

// abort ends an answer that does not get to its end so that it does not look whole.
func (h *Hub) abort() {
	h.metrics.dropped.Inc()
	panic(http.ErrAbortHandler)
}

// revoked answers with a list of revocations, which encode makes. Name distinguishes it
// from others.
func (h *Hub) revoked(w http.ResponseWriter, r *http.Request, name string, encode func(*encoder, needed)) error {
	h.untimed(w)
	wait, cancel := h.patience(r)
	defer cancel()
	for _, places := range []chan struct{}{h.readerShares.of(rest.AccountOf(r.Context()).Username), h.readers} {
		select {
		case places <- struct{}{}:
			defer func() { <-places }()
		case <-wait.Done():
			return context.Cause(wait)
		}
	}
	head, err := h.fresh(r.Context())
	if err != nil {
		return err
	}
	tenants := h.revocationsOf(r)
	if r.Method == http.MethodHead {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusOK)
		return nil
	}
	k := blobKey{name, tenants.String(), acceptsGzip(r)}
	rd, err := h.blobs.open(k, head, func() needed { return h.needed(tenants) }, encode)
	if err != nil {
		return err
	}
	defer rd.close()
	first, cancel := h.patience(r)
	defer cancel()
	chunk, err := rd.next(first)
	if err != nil {
		return err
	}
	in := rd.info()
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Vary", "Accept-Encoding")
	if in.packed {
		header.Set("Content-Encoding", "gzip")
	}
	if in.size >= 0 {
		header.Set("Content-Length", strconv.Itoa(in.size))
	}
	if _, isDirectory := directories[name]; isDirectory {
		setIndex(w, in.at)
	}
	w.WriteHeader(http.StatusOK)
	out := newPaced(w)
	for err == nil {
		if _, err = out.Write(chunk); err == nil {
			chunk, err = rd.next(r.Context())
		}
	}
	if !errors.Is(err, io.EOF) {
		h.abort()
	}
	return nil
}

// encoder makes a list of revocations. What belongs to it is appended to buf, and next is
// called between the parts.
type encoder struct {
	buf []byte
	// emit takes what is in full, and returns the buffer to go on with. Without it all
	// stays in buf.
	emit func(full []byte) ([]byte, error)
	err  error
}

// next hands on what is in buf if that is enough, and reports whether anybody still
// wants it.
func (e *encoder) next() bool {
	if e.emit != nil && len(e.buf) >= chunkBytes {
		e.buf, e.err = e.emit(e.buf)
	}
	return e.err == nil
}

// appendString appends s as JSON.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c > 0x7e || c == '"' || c == '\\' {
			quoted, err := json.Marshal(s)
			if err != nil {
				panic(err) // every text can be encoded
			}
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
