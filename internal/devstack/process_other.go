//go:build unix && !linux

package devstack

import (
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// startTime identifies the process that has pid now by the second it was started in. It is empty when there is no
// such process, or only its zombie.
func startTime(pid int) string {
	out, err := exec.Command("ps", "-o", "stat=,lstart=", "-p", strconv.Itoa(pid)).Output()
	stat, start, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if err != nil || strings.HasPrefix(stat, "Z") {
		return ""
	}
	return strings.TrimSpace(start)
}

// processesIn finds nothing: without /proc, the pid files are what is known.
func processesIn(string, string) []processID { return nil }

// setDeathSignal does nothing: only Linux tells a child that its parent has died.
func setDeathSignal(*syscall.SysProcAttr, syscall.Signal) {}
