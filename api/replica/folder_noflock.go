//go:build !(darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd)

package replica

import "os"

// lockFile does nothing: here it is for the operator to give no folder to two replicas.
func lockFile(*os.File) error { return nil }

// syncDir does nothing: folders cannot be synced everywhere, and their file systems see to it.
func syncDir(string) error { return nil }
