package devstack

import (
	"context"
	"fmt"
	"os"
	"testing"
)

// childDir, when set, makes this test binary a process that runs a stack in that folder until it is killed.
const childDir = "DEVSTACK_CHILD_DIR"

func TestMain(m *testing.M) {
	Child()
	dir := os.Getenv(childDir)
	if dir == "" {
		os.Exit(m.Run())
	}
	if _, err := Start(context.Background(), Config{Dir: dir, NoFsync: true}); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	select {}
}
