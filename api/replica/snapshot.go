package replica

import (
	"io"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// SnapshotType is the media type of snapshots in the binary form, as GET /v1/snapshots/{kind}
// gives them to those who accept it, and as replicas keep them on disk.
const SnapshotType = "application/vnd.rescind.snapshot.v1"

// SnapshotHeader is what a binary snapshot begins with.
type SnapshotHeader struct {
	revocation.Position
	// Kind is the last segment of the snapshot's path, for example "all".
	Kind string
	// Tenants are the domains of those that it is about. Nil: all there are.
	Tenants []string
	// Entries is about how many revocations follow, so that room can be made. It may be 0.
	Entries int
}

// SnapshotEncoder makes the binary form of a snapshot, in pieces that are appended to the
// caller's buffers: the header, then revocations and entities in any order, then the end. It
// is for one goroutine.
type SnapshotEncoder struct{}

// NewSnapshotEncoder returns an encoder for one snapshot.
func NewSnapshotEncoder(h SnapshotHeader) *SnapshotEncoder { panic("skeleton") }

// AppendHeader appends what comes first.
func (e *SnapshotEncoder) AppendHeader(b []byte) []byte { panic("skeleton") }

// AppendRevocation appends rec, or keeps it until there are more.
func (e *SnapshotEncoder) AppendRevocation(b []byte, rec Record) []byte { panic("skeleton") }

// AppendEntity appends an entity of the catalog.
func (e *SnapshotEncoder) AppendEntity(b []byte, entity catalog.Entity) ([]byte, error) {
	panic("skeleton")
}

// AppendEnd appends what was kept, and the checksum by which a reader knows that it has all.
func (e *SnapshotEncoder) AppendEnd(b []byte) []byte { panic("skeleton") }

// ReadSnapshot is [State.Load] of a binary snapshot. Nothing is changed unless r has all of
// it, undamaged, and ends there.
func (s *State) ReadSnapshot(r io.Reader) (SnapshotHeader, error) { panic("skeleton") }

// WriteSnapshot writes the state in the binary form. Events wait only while the catalog and
// one table at a time are copied: what is applied meanwhile may be in it, and its position is
// that before.
func (s *State) WriteSnapshot(w io.Writer) (revocation.Position, error) { panic("skeleton") }
