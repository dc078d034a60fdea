package snapshotapi

import (
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
)

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	_, err := New(Config{MaxReaders: -1, MaxStreams: 1 << 30, MaxCachedBytes: 1, MaxBehind: 1}, Deps{Registerer: prometheus.NewRegistry()})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"MaxReaders is -1", "MaxStreams is 1073741824", "MaxCachedBytes is 1,", "MaxBehind is 1,"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error does not say %q: %v", want, err)
		}
	}
}

func FuzzParsePosition(f *testing.F) {
	for _, s := range []string{string(epoch) + ":41", string(epoch) + ":041", string(epoch) + ":-1", ":", "abc", string(epoch) + ":9223372036854775808"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if p, ok := parsePosition(s); ok && (p.String() != s || p.Seq < 0 || len(p.Epoch) != 36) {
			t.Errorf("%q makes %+v", s, p)
		}
	})
	if p, ok := parsePosition(string(epoch) + ":41"); !ok || p != (revocation.Position{Epoch: epoch, Seq: 41}) {
		f.Errorf("a sound one makes %v, %t", p, ok)
	}
}

func FuzzPrefers(f *testing.F) {
	for _, s := range []string{
		"text/event-stream", "application/json, text/event-stream;q=0.9", ";;q=,", "text/event-stream;q=NaN", "*/*",
		"application/x-ndjson;q=0.5, text/event-stream;q=0.6",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, accept string) {
		r := &http.Request{Header: http.Header{"Accept": {accept}}}
		got := prefers(r, "text/event-stream", "application/x-ndjson")
		if !strings.Contains(strings.ToLower(accept), got) {
			t.Errorf("Accept: %s is taken to prefer what it does not name", accept)
		}
		if one := prefers(r, "text/event-stream"); one != "" && got == "" || one == "" && got == "text/event-stream" {
			t.Errorf("Accept: %s prefers %q, and of more %q", accept, one, got)
		}
	})
}

func TestPrefers(t *testing.T) {
	t.Parallel()
	const binary, lines = string(formBinary), string(formNDJSON)
	for accept, want := range map[string]string{
		"":                                     "",
		"*/*":                                  "",
		"application/json":                     "",
		binary:                                 binary,
		"Application/VND.Rescind.Snapshot.V1 ": binary,
		"application/vnd.rescind.snapshot.v2":  "",
		lines + ", " + binary:                  binary,
		binary + ";q=0.5, " + lines:            lines,
		binary + ", application/json;q=0.9":    binary,
		binary + ";q=0.8, application/json":    "",
		binary + ";q=0":                        "",
		binary + ";q=0, " + lines:              lines,
	} {
		r := &http.Request{Header: http.Header{"Accept": {accept}}}
		if got := prefers(r, binary, lines); got != want {
			t.Errorf("Accept: %s prefers %q, want %q", accept, got, want)
		}
	}
}
