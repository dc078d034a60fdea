//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package replica

import (
	"errors"
	"os"
	"syscall"
)

// lockFile locks f until it is closed, or fails at once if somebody else has.
func lockFile(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }

// syncDir makes the names in a folder last.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
