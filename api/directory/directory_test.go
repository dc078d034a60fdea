package directory

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
)

const (
	ours   = "https://km.example.com"
	theirs = "https://login.example.org/realms/a"
)

var entries = []struct {
	name  string
	entry Entry
	key   string
	value string
}{
	{
		name: "token",
		entry: Entry{
			Target: revocation.Target{Kind: revocation.KindToken, Iss: ours, ID: "0193a2f4-7c11-7d02-9b1e-000000000001"},
			Exp:    1795260000, Seq: 42, At: time.UnixMilli(1795256400123).UTC(),
		},
		key:   "/x/jti/0193a2f4-7c11-7d02-9b1e-000000000001",
		value: `{"iss":"https://km.example.com","exp":1795260000,"seq":42,"at":1795256400123}`,
	},
	{
		name: "token of another issuer, awkward",
		entry: Entry{
			Target: revocation.Target{Kind: revocation.KindToken, Iss: theirs, ID: "a/b c%ü~._-\"<&>"},
			Exp:    1795260000, Seq: 43, At: time.UnixMilli(1).UTC(),
		},
		key:   "/x/issuers/78128d0a5ecda3e1/jti/a%2Fb%20c%25%C3%BC~._-%22%3C%26%3E",
		value: `{"iss":"https://login.example.org/realms/a","exp":1795260000,"seq":43,"at":1}`,
	},
	{
		name: "digest",
		entry: Entry{
			Target: revocation.DigestTarget(ours, "header.payload"),
			Exp:    1795260000, Seq: 44, At: time.UnixMilli(2).UTC(),
		},
		key:   "/x/digests/e3febc57f3bd48b48df14b271f9905ab2574222b615ae766aa9b606f383a4a93",
		value: `{"iss":"https://km.example.com","exp":1795260000,"seq":44,"at":2}`,
	},
	{
		name: "client",
		entry: Entry{
			Target: revocation.Target{Kind: revocation.KindClient, Iss: ours, ID: "9aF_x"},
			Exp:    1795260000, NotAfter: 1795256402, Seq: 45, At: time.UnixMilli(3).UTC(),
		},
		key:   "/x/consumer-keys/9aF_x",
		value: `{"iss":"https://km.example.com","exp":1795260000,"seq":45,"at":3,"not_after":1795256402}`,
	},
	{
		name: "subject of another issuer",
		entry: Entry{
			Target: revocation.Target{Kind: revocation.KindSubject, Iss: theirs, ID: "alice@example.org"},
			Exp:    1795260000, NotAfter: 1795256402, Seq: 46, At: time.UnixMilli(4).UTC(),
		},
		key:   "/x/issuers/78128d0a5ecda3e1/users/alice%40example.org",
		value: `{"iss":"https://login.example.org/realms/a","exp":1795260000,"seq":46,"at":4,"not_after":1795256402}`,
	},
	{
		name: "session",
		entry: Entry{
			Target: revocation.Target{Kind: revocation.KindSession, Iss: ours, ID: ".."},
			Exp:    1795260000, Seq: 47, At: time.UnixMilli(5).UTC(),
		},
		key:   "/x/sessions/..",
		value: `{"iss":"https://km.example.com","exp":1795260000,"seq":47,"at":5}`,
	},
	{
		name: "tenant",
		entry: Entry{
			Target: revocation.Target{Kind: revocation.KindTenant, ID: "acme.example"},
			Exp:    1795260000, NotAfter: 1795256402, Seq: 48, At: time.UnixMilli(6).UTC(),
		},
		key:   "/x/tenants/acme.example",
		value: `{"iss":"","exp":1795260000,"seq":48,"at":6,"not_after":1795256402}`,
	},
	{
		name: "key",
		entry: Entry{
			Target: revocation.Target{Kind: revocation.KindKey, Iss: ours, ID: "kid=1"},
			Exp:    1795260000, Seq: 49, At: time.UnixMilli(7).UTC(),
		},
		key:   "/x/keys/kid%3D1",
		value: `{"iss":"https://km.example.com","exp":1795260000,"seq":49,"at":7}`,
	},
}

func TestEntry(t *testing.T) {
	t.Parallel()
	for _, tt := range entries {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := Key("/x", ours, tt.entry.Target); got != tt.key {
				t.Errorf("Key = %s, want %s", got, tt.key)
			}
			if got := tt.entry.Value(); got != tt.value {
				t.Errorf("Value = %s, want %s", got, tt.value)
			}
			got, err := Parse("/x", ours, tt.key, []byte(tt.value))
			if err != nil {
				t.Fatalf("Parse: %v", err)
			}
			if diff := cmp.Diff(tt.entry, got); diff != "" {
				t.Errorf("Parse (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseUnknownMember(t *testing.T) {
	t.Parallel()
	e, err := Parse("", ours, "/jti/a", []byte(`{"iss":"https://km.example.com","exp":9,"seq":1,"at":1,"later":{"a":1}}`))
	if err != nil || e.Exp != 9 {
		t.Errorf("got %v, %v, want exp 9", e, err)
	}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	good := `{"iss":"https://km.example.com","exp":9,"seq":1,"at":1}`
	other := strings.Replace(good, ours, theirs, 1)
	tests := []struct{ name, key, value string }{
		{"no JSON", "/x/jti/a", `{`},
		{"more than JSON", "/x/jti/a", good + "{}"},
		{"no object", "/x/jti/a", `7`},
		{"no exp", "/x/jti/a", `{"iss":"https://km.example.com","seq":1,"at":1}`},
		{"negative seq", "/x/jti/a", strings.Replace(good, `"seq":1`, `"seq":-1`, 1)},
		{"negative not_after", "/x/jti/a", strings.Replace(good, `"at":1`, `"not_after":-1`, 1)},
		{"no issuer", "/x/jti/a", `{"exp":9,"seq":1,"at":1}`},
		{"issuer for a tenant", "/x/tenants/acme.example", good},
		{"another issuer's in ours", "/x/jti/a", other},
		{"ours in another issuer's", "/x/issuers/78128d0a5ecda3e1/jti/a", good},
		{"wrong hash", "/x/issuers/78128d0a5ecda3e2/jti/a", other},
		{"upper-case hash", "/x/issuers/78128D0A5ECDA3E1/jti/a", other},
		{"short hash", "/x/issuers/7812/jti/a", other},
		{"tenant below an issuer", "/x/issuers/78128d0a5ecda3e1/tenants/acme.example", `{"iss":"","exp":9,"seq":1,"at":1}`},
		{"other prefix", "/y/jti/a", good},
		{"no prefix", "/jti/a", good},
		{"unknown folder", "/x/jtis/a", good},
		{"no identifier", "/x/jti/", good},
		{"slash in identifier", "/x/jti/a/b", good},
		{"needlessly encoded", "/x/jti/%61", good},
		{"lower-case digits", "/x/jti/%2f", good},
		{"not hexadecimal", "/x/jti/%zz", good},
		{"cut short", "/x/jti/a%2", good},
		{"control character", "/x/jti/%0A", good},
		{"not UTF-8", "/x/jti/%FF", good},
		{"too long", "/x/jti/" + strings.Repeat("a", 256), good},
		{"no digest", "/x/digests/abc", good},
		{"stream key", StreamKey("/x"), good},
		{"heartbeat", HeartbeatKey("/x"), good},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if e, err := Parse("/x", ours, tt.key, []byte(tt.value)); err == nil {
				t.Errorf("Parse = %+v, want an error", e)
			}
		})
	}
}

func TestFoldersHoldAllKeys(t *testing.T) {
	t.Parallel()
	for _, tt := range entries {
		n := 0
		for _, folder := range Folders("/x") {
			if strings.HasPrefix(tt.key, folder) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%s is in %d folders, want 1", tt.key, n)
		}
	}
	for _, folder := range Folders("/x") {
		for _, key := range []string{StreamKey("/x"), RebuildKey("/x"), HeartbeatKey("/x")} {
			if strings.HasPrefix(key, folder) {
				t.Errorf("%s, which is no entry, is in folder %s", key, folder)
			}
		}
	}
}

func TestParseStream(t *testing.T) {
	t.Parallel()
	got, err := ParseStream([]byte(`{"epoch":"3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10","seq":7}`))
	want := revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: 7}
	if err != nil || got != want {
		t.Errorf("ParseStream = %v, %v, want %v", got, err, want)
	}
	for _, s := range []string{"", "{}", `{"seq":7}`, `{"epoch":"e","seq":-1}`, `{"epoch":"e","seq":"7"}`, `[]`} {
		if got, err := ParseStream([]byte(s)); err == nil {
			t.Errorf("ParseStream(%s) = %v, want an error", s, got)
		}
	}
}

// What is parsed has the key that it was parsed from, and survives another turn.
func FuzzParse(f *testing.F) {
	for _, tt := range entries {
		f.Add("/x", ours, tt.key, []byte(tt.value))
	}
	f.Add("", ours, "/issuers/78128d0a5ecda3e1/", []byte(`{"iss":"`+theirs+`","exp":1}`))
	f.Add("", "", "/jti/%", []byte(`{"exp":1}`))
	f.Fuzz(func(t *testing.T, prefix, source, key string, value []byte) {
		e, err := Parse(prefix, source, key, value)
		if err != nil {
			return
		}
		if got := Key(prefix, source, e.Target); got != key {
			t.Fatalf("Key = %q, parsed from %q", got, key)
		}
		again, err := Parse(prefix, source, key, []byte(e.Value()))
		if err != nil {
			t.Fatalf("Parse of %s: %v", e.Value(), err)
		}
		if diff := cmp.Diff(e, again); diff != "" {
			t.Fatalf("second turn (-first +second):\n%s", diff)
		}
	})
}

// Every target that may be stored has a key of its own that leads back to it.
func FuzzKey(f *testing.F) {
	for _, tt := range entries {
		f.Add(string(tt.entry.Target.Kind), tt.entry.Target.Iss, tt.entry.Target.ID, tt.entry.Target.Digest)
	}
	f.Fuzz(func(t *testing.T, kind, iss, id string, digest bool) {
		target := revocation.Target{Kind: revocation.Kind(kind), Iss: iss, ID: id, Digest: digest}
		if target.Validate() != nil {
			return
		}
		e := Entry{Target: target, Exp: 1, At: time.UnixMilli(0).UTC()}
		got, err := Parse("/p", ours, Key("/p", ours, target), []byte(e.Value()))
		if err != nil {
			t.Fatalf("Parse of %s at %s: %v", e.Value(), Key("/p", ours, target), err)
		}
		if diff := cmp.Diff(e, got); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	})
}

func FuzzParseStream(f *testing.F) {
	f.Add([]byte(`{"epoch":"3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10","seq":7}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		if p, err := ParseStream(value); err == nil && (p.Epoch == "" || p.Seq < 0) {
			t.Fatalf("ParseStream(%q) = %v", value, p)
		}
	})
}

func TestHeartbeat(t *testing.T) {
	t.Parallel()
	h := Heartbeat{
		Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Head: 12, Through: 7, Source: "https://km.example.com/<a&b>",
		Time: time.UnixMilli(1795256400123).UTC(),
	}
	const value = `{"epoch":"3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10","head":12,"through":7,"source":"https://km.example.com/<a&b>","time":1795256400123}`
	if got := h.Value(); got != value {
		t.Errorf("Value = %s, want %s", got, value)
	}
	got, err := ParseHeartbeat([]byte(strings.Replace(value, "{", `{"later":[1],`, 1)))
	if err != nil {
		t.Fatalf("ParseHeartbeat: %v", err)
	}
	if diff := cmp.Diff(h, got); diff != "" {
		t.Errorf("ParseHeartbeat (-want +got):\n%s", diff)
	}
	for name, s := range map[string]string{
		"nothing": "", "no object": "7", "more than one value": value + value,
		"no epoch":        strings.Replace(value, "epoch", "epic", 1),
		"negative seq":    strings.Replace(value, `"through":7`, `"through":-7`, 1),
		"ahead of itself": strings.Replace(value, `"through":7`, `"through":13`, 1),
		"no time":         strings.Replace(value, "time", "tide", 1),
		"negative time":   strings.Replace(value, "17952", "-17952", 1),
		"text for a seq":  strings.Replace(value, `"head":12`, `"head":"12"`, 1),
	} {
		if got, err := ParseHeartbeat([]byte(s)); err == nil {
			t.Errorf("%s: ParseHeartbeat(%s) = %+v, want an error", name, s, got)
		}
	}
}

// What is parsed survives another turn.
func FuzzParseHeartbeat(f *testing.F) {
	f.Add([]byte(`{"epoch":"3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10","head":12,"through":7,"source":"https://km.example.com","time":1795256400123}`))
	f.Add([]byte(`{"epoch":"e","head":0,"through":0,"time":1}`))
	f.Fuzz(func(t *testing.T, value []byte) {
		h, err := ParseHeartbeat(value)
		if err != nil {
			return
		}
		again, err := ParseHeartbeat([]byte(h.Value()))
		if err != nil {
			t.Fatalf("ParseHeartbeat of %s: %v", h.Value(), err)
		}
		if diff := cmp.Diff(h, again); diff != "" {
			t.Fatalf("second turn (-first +second):\n%s", diff)
		}
	})
}
