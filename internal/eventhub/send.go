package eventhub

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	// pieceBytes is how much is written at once. A reader must take it within readerTime.
	pieceBytes = 128 << 10
	readerTime = 10 * time.Second
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

// paced writes to a reader that has a little time for each piece.
type paced struct {
	w  http.ResponseWriter
	rc *http.ResponseController
}

func newPaced(w http.ResponseWriter) paced {
	return paced{w, http.NewResponseController(w)}
}

func (p paced) Write(b []byte) (n int, err error) {
	for len(b) > 0 && err == nil {
		piece := b[:min(len(b), pieceBytes)]
		_ = p.rc.SetWriteDeadline(time.Now().Add(readerTime)) // a recorder in a test has none
		var written int
		written, err = p.w.Write(piece)
		n, b = n+written, b[written:]
	}
	return n, err
}

// send answers 200 with body, or with packed, the same in gzip, if that is not nil.
func (h *Hub) send(w http.ResponseWriter, r *http.Request, body, packed []byte) {
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Vary", "Accept-Encoding")
	if packed != nil {
		body = packed
		header.Set("Content-Encoding", "gzip")
	}
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return
	}
	if _, err := newPaced(w).Write(body); err != nil {
		h.metrics.dropped.Inc()
	}
}

// head answers a HEAD whose GET would be a stream.
func (h *Hub) head(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
}

// stream is an answer that is too large to be in memory. What is to be sent is
// appended to buf, and next is called between the parts.
type stream struct {
	hub *Hub
	w   http.ResponseWriter
	r   *http.Request
	buf []byte

	out   io.Writer // nil while everything is in buf
	close func() error
	err   error
}

// stream waits for r's turn to be sent a list of revocations. done ends it.
func (h *Hub) stream(w http.ResponseWriter, r *http.Request) (s *stream, done func(), err error) {
	untimed(w, r)
	wait, cancel := context.WithTimeout(r.Context(), h.cfg.StreamWait)
	defer cancel()
	select {
	case h.streams <- struct{}{}:
	case <-wait.Done():
		if r.Context().Err() != nil {
			return nil, nil, context.Cause(r.Context())
		}
		h.metrics.refused.Inc()
		return nil, nil, unavailable(storageRetry, errors.New("too many lists of revocations are being sent"))
	}
	return &stream{hub: h, w: w, r: r, buf: make([]byte, 0, pieceBytes+4<<10)}, func() { <-h.streams }, nil
}

// next sends what is in buf if that is enough, and reports whether the reader is still
// there.
func (s *stream) next() bool {
	if len(s.buf) >= pieceBytes {
		s.flush()
	}
	return s.err == nil
}

func (s *stream) flush() {
	if s.out == nil {
		header := s.w.Header()
		header.Set("Content-Type", "application/json")
		header.Set("Vary", "Accept-Encoding")
		s.out, s.close = newPaced(s.w), func() error { return nil }
		if acceptsGzip(s.r) {
			header.Set("Content-Encoding", "gzip")
			pieces := bufio.NewWriterSize(s.out, pieceBytes)
			packer := newGzip(pieces)
			s.out, s.close = packer, func() error { return errors.Join(packer.Close(), pieces.Flush()) }
		}
		s.w.WriteHeader(http.StatusOK)
	}
	if s.err == nil {
		_, s.err = s.out.Write(s.buf)
	}
	s.buf = s.buf[:0]
}

// end sends what is left.
func (s *stream) end() {
	if s.out == nil {
		var packed []byte
		if len(s.buf) >= minPacked && acceptsGzip(s.r) {
			packed = pack(s.buf)
		}
		s.hub.send(s.w, s.r, s.buf, packed)
		return
	}
	s.flush()
	if s.err == nil {
		s.err = s.close()
	}
	if s.err != nil {
		s.hub.metrics.dropped.Inc()
	}
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
