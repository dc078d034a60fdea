// Package verify compares what Postgres has, what etcd has, and what each gateway has, at the same places
// of the log.
package verify

import (
	"context"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/fleet"
)

// Log is the state in Postgres: a follower that was loaded from it by this process, with history, and that
// is run. [follow.Follower] is one.
type Log interface {
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.State
}

// Directory is etcd's. Load reads all of it at one moment into a state of revocations only. It is nil where
// the log is fed to none.
type Directory interface {
	Load(ctx context.Context, s *replica.State) error
}

// Fleet is [fleet.Fleet].
type Fleet interface {
	Refresh(ctx context.Context) error
	Gateways() []fleet.Gateway
	AskDigests(ctx context.Context, r replica.DigestRequest) error
	AskLoad(ctx context.Context, ids []string) error
	Changed() <-chan struct{}
}

// Options are for [Run].
type Options struct {
	// Timeout is how long gateways have to answer. Default 15 s.
	Timeout time.Duration
	// Tell asks gateways that have diverged to load a snapshot.
	Tell bool
}

// Report is what came of it.
type Report struct {
	// Postgres is the log's digest, of all tenants.
	Postgres  replica.Digest
	Directory *Member // nil: there is none
	Gateways  []Member
}

// Equal reports whether everything that could be compared is equal, and everything live could be.
func (r Report) Equal() bool { panic("skeleton") }

// Member is etcd, or a gateway.
type Member struct {
	ID       string // of a gateway
	Standing fleet.Standing
	Verdict  fleet.Verdict
	// Digest is the member's, Want what the log says it had to be.
	Digest, Want replica.Digest
	// Detail says in a sentence how they differ, or why they were not compared.
	Detail string
	// Told: it was asked to load a snapshot.
	Told bool
}

// Run compares. Its error is one of Postgres; what concerns etcd and gateways is in the report.
func Run(ctx context.Context, log Log, directory Directory, f Fleet, o Options) (Report, error) {
	panic("skeleton")
}
