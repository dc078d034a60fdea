package replica

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
)

// told is a message that is kept.
type told struct{ id, event, data string }

func messages(r io.Reader) (all []told, err error) {
	s := newStreamReader(r)
	for {
		m, err := s.next()
		if err != nil {
			return all, err
		}
		all = append(all, told{m.id, m.event, string(m.data)})
	}
}

func TestStream(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", maxData-1)
	for name, tt := range map[string]struct {
		stream string
		want   []told
		err    bool
	}{
		"nothing":               {"", nil, false},
		"one":                   {"id: 1\nevent: a\ndata: b\n\n", []told{{"1", "a", "b"}}, false},
		"line ends of CRLF":     {"id: 1\r\nevent: a\r\ndata: b\r\n\r\n", []told{{"1", "a", "b"}}, false},
		"without spaces":        {"id:1\nevent:a\ndata:  b\n\n", []told{{"1", "a", " b"}}, false},
		"lines of data":         {"data: a\ndata\ndata: b\n\n", []told{{"", "", "a\n\nb"}}, false},
		"the id stays":          {"id: 1\ndata: a\n\nevent: x\ndata: b\n\nid\ndata: c\n\n", []told{{"1", "", "a"}, {"1", "x", "b"}, {"", "", "c"}}, false},
		"an id with NUL":        {"id: 1\x00\ndata: a\n\n", []told{{"", "", "a"}}, false},
		"comments":              {": here\n:\n\n: again\ndata: a\n: in between\n\n", []told{{"", "", "a"}}, false},
		"without data":          {"retry: 3000\n\nevent: a\nid: 7\n\ndata: b\n\n", []told{{"7", "", "b"}}, false},
		"other fields":          {"datum: x\nData: x\nretry: 1\ndata: a\n\n", []told{{"", "", "a"}}, false},
		"broken off":            {"data: a\n\ndata: b\n", []told{{"", "", "a"}}, false},
		"in a line":             {"data: a\n\ndata: b", []told{{"", "", "a"}}, false},
		"as long as may be":     {"data: " + long + "\n\n", []told{{"", "", long}}, false},
		"too long a line":       {"data: a\n\ndata: " + strings.Repeat("x", maxLine) + "\n\n", []told{{"", "", "a"}}, true},
		"a line without an end": {"id: " + strings.Repeat("x", 2*maxLine), nil, true},
		"too much data":         {strings.Repeat("data: "+strings.Repeat("x", 1000)+"\n", 70), nil, true},
		"too many lines":        {strings.Repeat(":\n", 2*maxLine), nil, true},
	} {
		for way, r := range map[string]io.Reader{
			"at once": strings.NewReader(tt.stream), "byte by byte": iotest.OneByteReader(strings.NewReader(tt.stream)),
		} {
			got, err := messages(r)
			if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(told{})); diff != "" || (err != io.EOF) != tt.err {
				t.Errorf("%s, %s: %v %s", name, way, err, diff)
			}
		}
	}
	cut := errors.New("the connection is cut")
	if _, err := messages(io.MultiReader(strings.NewReader("data: a\n"), iotest.ErrReader(cut))); !errors.Is(err, cut) {
		t.Errorf("%v, want that it is cut", err)
	}
}

func TestHeartbeatMessage(t *testing.T) {
	t.Parallel()
	id := string(epoch) + ":7"
	for name, tt := range map[string]struct {
		data string
		want Beat
		ok   bool
	}{
		"in full": {`{"epoch":"` + string(epoch) + `","head":9,"through":7,"time":"2026-11-22T06:00:01.250Z"}`,
			Beat{Position: position(7), Head: 9, Time: time.Date(2026, 11, 22, 6, 0, 1, 250e6, time.UTC)}, true},
		"without a time": {`{"epoch":"` + string(epoch) + `","head":7,"through":7,"new":{}}`, Beat{Position: position(7), Head: 7}, true},
		"head below":     {`{"epoch":"` + string(epoch) + `","head":6,"through":7}`, Beat{}, false},
		"another seq":    {`{"epoch":"` + string(epoch) + `","head":9,"through":8}`, Beat{}, false},
		"another epoch":  {`{"epoch":"` + string(newEpoch) + `","head":9,"through":7}`, Beat{}, false},
		"no epoch":       {`{"head":9,"through":7}`, Beat{}, false},
		"a bad time":     {`{"epoch":"` + string(epoch) + `","head":9,"through":7,"time":"yesterday"}`, Beat{}, false},
		"no JSON":        {`{`, Beat{}, false},
	} {
		got, err := message{id: id, event: "heartbeat", data: []byte(tt.data)}.beat()
		if (err == nil) != tt.ok || tt.ok && cmp.Diff(tt.want, got) != "" {
			t.Errorf("%s: %v %s", name, err, cmp.Diff(tt.want, got))
		}
	}
	for data, ok := range map[string]bool{
		`{"epoch":"` + string(epoch) + `","seq":7}`: true, `{"epoch":"` + string(epoch) + `","seq":8}`: false, `{"seq":7}`: false, `[]`: false,
	} {
		if p, err := (message{id: id, event: "reset", data: []byte(data)}).reset(); (err == nil) != ok || ok && p != position(7) {
			t.Errorf("reset %s: %s, %v", data, p, err)
		}
	}
}

// What is read is bounded, does not depend on how it comes, and is the same when it is written anew.
func FuzzSSE(f *testing.F) {
	for _, seed := range []string{
		"retry: 3000\n\nid: " + string(epoch) + ":7\nevent: heartbeat\ndata: {\"epoch\":\"" + string(epoch) + "\",\"head\":9,\"through\":7}\n\n",
		"id: " + string(epoch) + ":7\nevent: reset\ndata: {\"epoch\":\"" + string(epoch) + "\",\"seq\":7}\n\n",
		"id: 1\r\nevent: revocation.token\r\ndata: {}\r\ndata: \r\n\r\n: x\n\n", "data\n\ndata:\n\n", "\n\n\n", "id\x00: 1\ndata: \xff\n\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		got, err := messages(bytes.NewReader(stream))
		slowly, slowErr := messages(iotest.HalfReader(bytes.NewReader(stream)))
		if diff := cmp.Diff(got, slowly, cmp.AllowUnexported(told{})); diff != "" || (err == io.EOF) != (slowErr == io.EOF) {
			t.Fatalf("%v, %v: %s", err, slowErr, diff)
		}
		var again strings.Builder
		for _, m := range got {
			if len(m.data) > maxLine {
				t.Fatalf("%d bytes of data", len(m.data))
			}
			again.WriteString("id: " + m.id + "\r\nevent: " + m.event + "\r\n")
			for line := range strings.SplitSeq(m.data, "\n") {
				again.WriteString("data: " + line + "\r\n")
			}
			again.WriteString("\n")
		}
		// Data that is nearly too long may be so with what is written beside it.
		if back, err := messages(strings.NewReader(again.String())); err == io.EOF {
			if diff := cmp.Diff(got, back, cmp.AllowUnexported(told{})); diff != "" {
				t.Fatal(diff)
			}
		}
		for _, m := range got {
			m := message{m.id, m.event, []byte(m.data)}
			if b, err := m.beat(); err == nil && (b.Head < b.Seq || b.Epoch == "" || b.Position.String() != m.id) {
				t.Fatalf("%+v", b)
			}
			if p, err := m.reset(); err == nil && (p == revocation.Position{} || p.String() != m.id) {
				t.Fatalf("%+v", p)
			}
		}
	})
}
