package stacktest_test

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/rescindhq/rescind/internal/stacktest"
)

// childMode, when set to "shared" or "own", makes this test binary a process that uses such a stack, prints its
// endpoints, and ends when its input does.
const childMode = "STACKTEST_CHILD"

func TestMain(m *testing.M) {
	var at stacktest.Endpoints
	switch mode := os.Getenv(childMode); mode {
	case "":
		os.Exit(m.Run())
	case "shared":
		at = stacktest.Shared(childTB{})
	case "own":
		at = stacktest.Own(childTB{}, stacktest.Etcd).Endpoints()
	}
	if err := json.NewEncoder(os.Stdout).Encode(at); err != nil {
		panic(err)
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// childTB is as much of a test as a stack needs, for a process that is none. It cleans up nothing.
type childTB struct{ testing.TB }

func (childTB) Helper()        {}
func (childTB) Cleanup(func()) {}
func (childTB) Fatalf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(1)
}
