package sink

import (
	"testing"

	"github.com/rescindhq/rescind/api/revocation"
)

func TestContinueTrace(t *testing.T) {
	t.Parallel()
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	tests := []struct {
		name, in string
		parent   uint64
		want     string
	}{
		{"sampled", "00-" + trace + "-00f067aa0ba902b7-01", 0xab, "00-" + trace + "-00000000000000ab-01"},
		{"not sampled", "00-" + trace + "-00f067aa0ba902b7-00", 1 << 63, "00-" + trace + "-8000000000000000-00"},
		{"other flags", "00-" + trace + "-00f067aa0ba902b7-03", 0xab, "00-" + trace + "-00000000000000ab-03"},
		{"no parent id", "00-" + trace + "-00f067aa0ba902b7-01", 0, "00-" + trace + "-0000000000000001-01"},
		{"later version", "cc-" + trace + "-00f067aa0ba902b7-01", 0xab, "00-" + trace + "-00000000000000ab-01"},
		{"later version with more", "cc-" + trace + "-00f067aa0ba902b7-f8-what", 0xab, "00-" + trace + "-00000000000000ab-00"},
		{"later version, flags", "cc-" + trace + "-00f067aa0ba902b7-ff", 0xab, "00-" + trace + "-00000000000000ab-01"},
		{"later version with more, no dash", "cc-" + trace + "-00f067aa0ba902b7-01.what", 0xab, ""},
		{"version 00 with more", "00-" + trace + "-00f067aa0ba902b7-01-what", 0xab, ""},
		{"version ff", "ff-" + trace + "-00f067aa0ba902b7-01", 0xab, ""},
		{"upper case", "00-" + "4BF92F3577B34DA6A3CE929D0E0E4736" + "-00f067aa0ba902b7-01", 0xab, ""},
		{"zero trace", "00-00000000000000000000000000000000-00f067aa0ba902b7-01", 0xab, ""},
		{"zero parent", "00-" + trace + "-0000000000000000-01", 0xab, ""},
		{"dashes elsewhere", "00-" + trace + "0-0f067aa0ba902b7-01", 0xab, ""},
		{"too few fields", "00-" + trace + "000f067aa0ba902b7-01", 0xab, ""},
		{"short", "00-" + trace + "-00f067aa0ba902b7", 0xab, ""},
		{"empty", "", 0xab, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := continueTrace(tt.in, tt.parent); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestPublicationID(t *testing.T) {
	t.Parallel()
	at := revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: 1}
	next := at
	next.Seq++
	first := publicationID("amqp", at)
	if again := publicationID("amqp", at); again != first {
		t.Errorf("a repeat has id %x, the first %x", again, first)
	}
	if first == publicationID("amqp-west", at) || first == publicationID("amqp", next) {
		t.Error("two publications have one id")
	}
}
