package replica

import (
	"log/slog"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

// folder keeps a state across restarts: the last snapshot, and a journal of what followed. Its
// methods are called by one goroutine at a time, but for save.
type folder struct{}

// openFolder makes the folder if it is not there, and takes it for this process alone.
func openFolder(path string, log *slog.Logger) (*folder, error) { panic("skeleton") }

// load puts what the folder has into s, which is empty, and returns when that was known to be
// everything, zero if there is nothing. What is damaged is set aside and logged, never returned as
// an error: what remains is loaded.
func (f *folder) load(s *State) (fresh time.Time, err error) { panic("skeleton") }

// event adds an event, before it is applied: then what was ever answered from it is on disk (in
// the system's cache at least; it is synced within a second).
func (f *folder) event(e revocation.Event) error { panic("skeleton") }

// revoked adds what is revoked ahead of the events, before it is.
func (f *folder) revoked(rec Record, at revocation.Position) error { panic("skeleton") }

// fresh says that the state was known to have everything at that time.
func (f *folder) fresh(at time.Time) error { panic("skeleton") }

// due reports whether the journal is long enough for another snapshot.
func (f *folder) due() bool { panic("skeleton") }

// save writes a snapshot of s and begins another journal. What is added meanwhile is in both. It may
// take long, and must be called once s was loaded from elsewhere.
func (f *folder) save(s *State, fresh time.Time) error { panic("skeleton") }

// close gives the folder up.
func (f *folder) close() error { panic("skeleton") }
