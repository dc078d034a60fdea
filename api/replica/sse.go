package replica

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// silence is how long a stream may bring nothing: three heartbeats (HTTP-14).
const silence = 15 * time.Second

// Name implements [Feed]. It is "sse".
func (h *HTTP) Name() string { return "sse" }

// Follow implements [Feed] with server-sent events (OAuth contract, HTTP-14 and HTTP-15), from
// where the replica stands. If the log ends before that, it goes on from its end: what is revoked
// there is told, though the log was restored.
func (h *HTTP) Follow(ctx context.Context, at func() revocation.Position, to Receiver) error {
	header := http.Header{"Accept": {"text/event-stream"}, "Accept-Encoding": {"identity"}} // what is compressed may be held back
	from := at()
	if from.Epoch != "" {
		header.Set("Last-Event-ID", from.String())
	}
	a, err := h.get(ctx, "/v1/events", nil, header, silence)
	if err != nil {
		return fmt.Errorf("follow events at %s: %w", h.url.Host, err)
	}
	defer a.close()
	// The stream goes on from where it was asked to, so it misses nothing from here on. If that
	// was not possible it says so first.
	if err := to.Connected(ctx); err != nil {
		return err
	}
	r := newStreamReader(a)
	for {
		m, err := r.next()
		if err == nil {
			from, err = h.tell(ctx, m, from, at, to)
		} else if errors.Is(err, io.EOF) {
			err = errors.New("the service has ended the stream")
		}
		if err != nil {
			return fmt.Errorf("follow events at %s: %w", h.url.Host, err)
		}
	}
}

// tell passes m on. From is how far the stream had come, and it returns how far it has.
func (h *HTTP) tell(ctx context.Context, m message, from revocation.Position, at func() revocation.Position, to Receiver) (revocation.Position, error) {
	switch m.event {
	case "heartbeat":
		b, err := m.beat()
		if err != nil {
			return from, err
		}
		return b.Position, to.Heartbeat(ctx, b)
	case "reset":
		p, err := m.reset()
		if err != nil {
			return from, err
		}
		// One that goes on before where it was is not of events that are gone: the log ends
		// there, and the source will say so.
		isAhead := p.Epoch == from.Epoch && p.Seq < from.Seq
		if here := at(); !isAhead && here.Epoch == p.Epoch && here.Seq >= p.Seq {
			return p, nil // Connected found out before this was read
		}
		return p, to.Connected(ctx)
	}
	e, err := revocation.ParseEvent(m.data)
	if err != nil {
		return from, fmt.Errorf("read event: %w", err)
	}
	return e.Position, to.Event(ctx, e)
}

// message is one of a stream of server-sent events.
type message struct {
	id    string
	event string
	data  []byte // valid until the next one is read
}

// beat reads the heartbeat that m is.
func (m message) beat() (Beat, error) {
	var data struct {
		Epoch   revocation.Epoch `json:"epoch"`
		Head    revocation.Seq   `json:"head"`
		Through revocation.Seq   `json:"through"`
		Time    string           `json:"time"` // services of before have none
	}
	if err := json.Unmarshal(m.data, &data); err != nil {
		return Beat{}, errors.New("read heartbeat: its data is not the expected JSON object")
	}
	b := Beat{Position: revocation.Position{Epoch: data.Epoch, Seq: data.Through}, Head: data.Head}
	if data.Epoch == "" || data.Through < 0 || data.Head < data.Through || m.id != b.Position.String() {
		return Beat{}, errors.New("read heartbeat: its id, epoch, head and through do not fit together")
	}
	if data.Time != "" {
		var err error
		if b.Time, err = time.Parse(time.RFC3339Nano, data.Time); err != nil {
			return Beat{}, errors.New("read heartbeat: its time is not RFC 3339")
		}
	}
	return b, nil
}

// reset reads the position after which the stream goes on.
func (m message) reset() (revocation.Position, error) {
	var p revocation.Position
	if err := json.Unmarshal(m.data, &p); err != nil || p.Epoch == "" || p.Seq < 0 || m.id != p.String() {
		return p, errors.New("read reset: its id, epoch and seq do not fit together")
	}
	return p, nil
}

const (
	// maxData bounds the data of a message: an event has less than 64 KiB.
	maxData = 64 << 10
	// maxLine bounds a line, which has the name of its field too.
	maxLine = maxData + 1<<10
)

// streamReader reads server-sent events (HTML, section 9.2.6) whose lines end in LF or CRLF. It holds a
// line and a message.
type streamReader struct {
	r    *bufio.Reader
	id   string
	data []byte
}

func newStreamReader(r io.Reader) *streamReader {
	return &streamReader{r: bufio.NewReaderSize(r, maxLine)}
}

// next returns the next message that has data. One that is cut off is none.
func (s *streamReader) next() (message, error) {
	var m message
	s.data = s.data[:0]
	has := false
	for lines := 0; ; lines++ {
		line, err := s.r.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull), len(s.data)+len(line) > maxLine, lines > maxLine:
			return m, fmt.Errorf("read stream: a message is longer than %d bytes", maxLine)
		case err != nil:
			return m, err
		}
		line = bytes.TrimSuffix(line[:len(line)-1], []byte("\r"))
		if len(line) == 0 {
			if has {
				m.id, m.data = s.id, s.data
				return m, nil
			}
			m, lines = message{}, 0
			continue
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch string(name) { // no name: a comment, which shows that the connection lives
		case "data":
			if has {
				s.data = append(s.data, '\n')
			}
			s.data, has = append(s.data, value...), true
		case "event":
			m.event = string(value)
		case "id":
			if bytes.IndexByte(value, 0) < 0 {
				s.id = string(value)
			}
		}
	}
}
