package devstack

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

var bootID = sync.OnceValue(func() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
})

// startTime identifies the process that has pid now: the boot of the machine and the clock ticks from it to the
// start of the process (proc_pid_stat(5), field 22). It is empty when there is no such process, or only its zombie.
func startTime(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return ""
	}
	// The second field is the name of the command in parentheses, and may hold spaces and parentheses itself.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return ""
	}
	return bootID() + "/" + fields[19]
}

// processesIn lists the processes of the program named exe whose working folder is dir.
func processesIn(dir, exe string) []processID {
	cwds, _ := filepath.Glob("/proc/[0-9]*/cwd")
	var found []processID
	for _, cwd := range cwds {
		proc := filepath.Dir(cwd)
		if at, err := os.Readlink(cwd); err != nil || at != dir {
			continue
		}
		if file, err := os.Readlink(proc + "/exe"); err != nil || filepath.Base(strings.TrimSuffix(file, " (deleted)")) != exe {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(proc))
		if start := startTime(pid); start != "" {
			found = append(found, processID{PID: pid, Start: start})
		}
	}
	return found
}

// setDeathSignal lets the kernel send sig to the child when the thread that started it ends.
func setDeathSignal(attr *syscall.SysProcAttr, sig syscall.Signal) { attr.Pdeathsig = sig }
