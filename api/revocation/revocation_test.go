package revocation_test

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	iss   = "https://km.example.com"
)

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.TrimSuffix(string(want), "\n"), string(got)); diff != "" {
		t.Errorf("%s: %s", name, diff)
	}
}

func event(t testing.TB, r revocation.Revocation) revocation.Event {
	t.Helper()
	e, err := revocation.NewEvent(r)
	if err != nil {
		t.Fatal(err)
	}
	e.Position = revocation.Position{Epoch: epoch, Seq: 88213}
	e.Previous, e.Source = 88209, iss
	e.Time = time.UnixMilli(1795200598214).UTC()
	e.Traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	return e
}

var revocations = map[string]revocation.Revocation{
	"token": {
		Target:   revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "at-7f3c2a91d0"},
		ClientID: "app-2", Reason: "client",
	},
	"digest": {
		Target:   revocation.DigestTarget(iss, "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJ4In0"),
		ClientID: "app <&> one", Signature: "c2ln", Reason: "client",
	},
	"client":  {Target: revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "app-2"}, NotAfter: 1795200600},
	"subject": {Target: revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "u-1009"}, NotAfter: 1795200600},
	"session": {Target: revocation.Target{Kind: revocation.KindSession, Iss: iss, ID: "s-1"}},
	"tenant":  {Target: revocation.Target{Kind: revocation.KindTenant, ID: "carbon.super"}, NotAfter: 1795200600},
	"key":     {Target: revocation.Target{Kind: revocation.KindKey, Iss: iss, ID: "k-1"}},
}

func TestEventForm(t *testing.T) {
	t.Parallel()
	for name, r := range revocations {
		r.ID, r.Tenant, r.Exp = "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", revocation.SuperTenant, 1795201400
		e := event(t, r)
		b, err := e.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name+".golden", b)
		back, err := revocation.ParseEvent(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(e, back); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		got, err := back.Revocation()
		if diff := cmp.Diff(r, got); diff != "" || err != nil {
			t.Errorf("%s: %v %s", name, err, diff)
		}
	}
	if got := event(t, revocations["tenant"]).RoutingKey(); got != "revocation.tenant." {
		t.Errorf("routing key of a tenant without domain: %q", got)
	}
	e := revocation.Event{Type: "revocation.token", Tenant: revocation.Tenant{Domain: "a.b-c.example"}}
	if got := e.RoutingKey(); got != "revocation.token.a_b-c_example" {
		t.Errorf("routing key %q", got)
	}
}

func TestHeartbeatForm(t *testing.T) {
	t.Parallel()
	h := revocation.Heartbeat{
		Epoch: epoch, ID: epoch + ":hb:0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3", Source: iss,
		Time: time.UnixMilli(1795200598214).UTC(), Head: 12, Through: 11,
	}
	b, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "heartbeat.golden", b)
	back, err := revocation.ParseHeartbeat(b)
	if diff := cmp.Diff(h, back); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	if _, err := revocation.ParseEvent(b); err == nil {
		t.Error("a heartbeat parses as an event")
	}
}

func TestSequenceSortsAsText(t *testing.T) {
	t.Parallel()
	var texts []string
	for _, seq := range []revocation.Seq{1, 9, 10, 99, 100, 1 << 40, 1<<63 - 1} {
		e := event(t, revocations["token"])
		e.Seq, e.Previous = seq, 0
		b, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var w struct{ Sequence string }
		if err := json.Unmarshal(b, &w); err != nil {
			t.Fatal(err)
		}
		texts = append(texts, w.Sequence)
	}
	if !sort.StringsAreSorted(texts) {
		t.Errorf("%q", texts)
	}
}

func TestEventBelow64KiB(t *testing.T) {
	t.Parallel()
	r := revocations["token"]
	r.Reason = strings.Repeat("x", 64<<10)
	e := event(t, r)
	if _, err := json.Marshal(e); err == nil {
		t.Error("a longer event was encoded")
	}
}

func TestTargetValidate(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", 128)
	for name, tt := range map[string]struct {
		target revocation.Target
		ok     bool
	}{
		"token":             {revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "a"}, true},
		"255 bytes":         {revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: long[:254] + "x"}, true},
		"256 bytes":         {revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: long}, false},
		"empty":             {revocation.Target{Kind: revocation.KindToken, Iss: iss}, false},
		"no issuer":         {revocation.Target{Kind: revocation.KindToken, ID: "a"}, false},
		"unknown kind":      {revocation.Target{Kind: "app", Iss: iss, ID: "a"}, false},
		"NUL":               {revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "a\x00"}, false},
		"line feed":         {revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "a\n"}, false},
		"C1 control":        {revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "a\u0085"}, false},
		"not UTF-8":         {revocation.Target{Kind: revocation.KindSubject, Iss: iss, ID: "a\xc3"}, false},
		"space and slashes": {revocation.Target{Kind: revocation.KindClient, Iss: iss, ID: "app one/../x"}, true},
		"digest":            {revocation.DigestTarget(iss, "x"), true},
		"short digest":      {revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "abc", Digest: true}, false},
		"digest of a key":   {revocation.Target{Kind: revocation.KindKey, Iss: iss, ID: strings.Repeat("a", 64), Digest: true}, false},
		"tenant":            {revocation.Target{Kind: revocation.KindTenant, ID: "carbon.super"}, true},
		"tenant and issuer": {revocation.Target{Kind: revocation.KindTenant, Iss: iss, ID: "carbon.super"}, false},
	} {
		err := tt.target.Validate()
		if _, invalid := errors.AsType[*revocation.InvalidError](err); (err == nil) != tt.ok || (err != nil && !invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseEventRefuses(t *testing.T) {
	t.Parallel()
	r := revocations["token"]
	r.Tenant = revocation.SuperTenant
	good, err := json.Marshal(event(t, r))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := revocation.ParseEvent(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{
		"specversion":         {`"1.0"`, `"0.3"`},
		"other id":            {`d10:88213"`, `d10:88214"`},
		"unpadded sequence":   {`"00000000000000088213"`, `"88213"`},
		"negative sequence":   {`"00000000000000088213"`, `"-0000000000000088213"`},
		"previous not before": {`"00000000000000088209"`, `"00000000000000088213"`},
		"foreign type":        {"io.github.rescindhq.", "com.example."},
		"no source":           {iss + `","type`, `","type`},
		"upper-case epoch":    {`"epoch":"3b`, `"epoch":"3B`},
		"time":                {"2026-", "26-"},
		"no tenant":           {`"tenant"`, `"renter"`},
	} {
		bad := strings.Replace(string(good), change[0], change[1], 1)
		if bad == string(good) {
			t.Fatalf("%s changes nothing", name)
		}
		_, err := revocation.ParseEvent([]byte(bad))
		if _, ok := errors.AsType[*revocation.InvalidError](err); !ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is accepted comes back the same.
func FuzzParseEvent(f *testing.F) {
	for name := range revocations {
		b, err := os.ReadFile(filepath.Join("testdata", name+".golden"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := revocation.ParseEvent(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(e)
		if err != nil {
			return // larger than it was
		}
		back, err := revocation.ParseEvent(again)
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		if back.Position != e.Position || back.Previous != e.Previous || back.Type != e.Type || back.Tenant != e.Tenant {
			t.Fatalf("%+v became %+v", e, back)
		}
		r, err := e.Revocation()
		if err != nil {
			return
		}
		if r2, err := back.Revocation(); err != nil || r2 != r {
			t.Fatalf("%+v became %+v, %v", r, r2, err)
		}
	})
}

func FuzzParseHeartbeat(f *testing.F) {
	b, err := os.ReadFile(filepath.Join("testdata", "heartbeat.golden"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := revocation.ParseHeartbeat(b)
		if err == nil && h.Through > h.Head {
			t.Fatalf("%+v", h)
		}
	})
}

func BenchmarkEventMarshal(b *testing.B) {
	e := event(b, revocations["token"])
	b.ReportAllocs()
	for b.Loop() {
		if _, err := e.MarshalJSON(); err != nil {
			b.Fatal(err)
		}
	}
}
