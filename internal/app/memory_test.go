package app

import "testing"

func TestGCPercent(t *testing.T) {
	t.Parallel()
	for live, want := range map[uint64]int{
		0: 400, 1 << 20: 400, 16 << 20: 400, 32 << 20: 200, 64 << 20: 100, 100 << 20: 60, 128 << 20: 50, 10 << 30: 50,
	} {
		if got := gcPercent(live); got != want {
			t.Errorf("with %d MiB live: %d, want %d", live>>20, got, want)
		}
	}
}
