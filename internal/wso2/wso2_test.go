package wso2

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/revocation"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const (
	epoch = "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10"
	iss   = "https://km.example.com"
	exp   = 1760003600
)

// now is in the middle of a second: 1,740 s and a half before exp.
var now = time.Unix(exp-1740, 5e8)

func event(t *testing.T, seq revocation.Seq, change func(*revocation.Revocation)) revocation.Event {
	t.Helper()
	r := revocation.Revocation{
		ID:       "0193a2f4-7c11-7d02-9b1e-5f6a70c1d2e3",
		Target:   revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: "at-7f3c2a91d0"},
		Tenant:   revocation.SuperTenant,
		Exp:      exp,
		ClientID: "app-2",
		Reason:   "client",
	}
	change(&r)
	e, err := revocation.NewEvent(r)
	if err != nil {
		t.Fatal(err)
	}
	e.Position = revocation.Position{Epoch: epoch, Seq: seq}
	return e
}

func TestTokenRevocation(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		change func(*revocation.Revocation)
	}{
		{"jti", func(*revocation.Revocation) {}},
		{"no-jti", func(r *revocation.Revocation) {
			r.Target = revocation.DigestTarget(iss, "header.claims")
			r.Signature = "MEUCIQDx-kZ_3n2Bq9"
		}},
		{"jti-beats-signature", func(r *revocation.Revocation) { r.Signature = "MEUCIQDx-kZ_3n2Bq9" }},
		{"other-tenant", func(r *revocation.Revocation) { r.Tenant = revocation.Tenant{ID: 7, Domain: "org.example"} }},
		{"odd-jti", func(r *revocation.Revocation) { r.Target.ID = `<a&b> "q" \ é ` + "\u2028" }},
		{"last-second", func(r *revocation.Revocation) { r.Exp = now.Unix() + 1 }},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := TokenRevocation(event(t, revocation.Seq(88213+i), tt.change), now)
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", tt.name+".golden")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTokenRevocationNoMessage(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		change func(*revocation.Revocation)
	}{
		{"expires now", func(r *revocation.Revocation) { r.Exp = now.Unix() }},
		{"expired long ago", func(r *revocation.Revocation) { r.Exp = 1 }},
		{"opaque", func(r *revocation.Revocation) { r.Target = revocation.DigestTarget(iss, "opaque-token") }},
		{"client", func(r *revocation.Revocation) { r.Target.Kind, r.NotAfter = revocation.KindClient, exp }},
		{"subject", func(r *revocation.Revocation) { r.Target.Kind, r.NotAfter = revocation.KindSubject, exp }},
		{"session", func(r *revocation.Revocation) { r.Target.Kind = revocation.KindSession }},
		{"tenant", func(r *revocation.Revocation) {
			r.Target, r.NotAfter = revocation.Target{Kind: revocation.KindTenant, ID: "carbon.super"}, exp
		}},
		{"key", func(r *revocation.Revocation) { r.Target.Kind = revocation.KindKey }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got, err := TokenRevocation(event(t, 1, tt.change), now); got != nil || err != nil {
				t.Errorf("got %s, %v, want no message and no error", got, err)
			}
		})
	}
}

func TestTokenRevocationRefusesWhatIsNoRevocation(t *testing.T) {
	t.Parallel()
	e := event(t, 1, func(*revocation.Revocation) {})
	for name, data := range map[string]string{
		"no object": `7`,
		"no target": `{"kind":"token"}`,
		"two kinds": `{"kind":"key","iss":"i","kid":"k"}`,
	} {
		e.Data = json.RawMessage(data)
		if got, err := TokenRevocation(e, now); err == nil {
			t.Errorf("%s: got %s, want an error", name, got)
		}
	}
}

// The expected value is from an independent implementation (Python's uuid.uuid5).
func TestEventID(t *testing.T) {
	t.Parallel()
	got := eventID(revocation.Position{Epoch: epoch, Seq: 88213})
	if want := "3359ecb0-c565-5564-9fbf-10d9cb74b523"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
