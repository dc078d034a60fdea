// Package etcdfeed reads and watches the directory of revocations in etcd for a replica. It
// hides revisions, compaction and how the directory is rebuilt. The keys and values are those of
// package directory.
package etcdfeed

import (
	"context"
	"crypto/tls"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
)

// Config says where the directory is. Endpoints and Issuer are needed.
type Config struct {
	// Endpoints are the members of the cluster, for example https://etcd-1:2379.
	Endpoints []string
	// TLS is for https. Default: the system's authorities.
	TLS *tls.Config
	// Username and Password are for where etcd asks for them.
	Username, Password string
	// Prefix is what every key begins with. Default: none.
	Prefix string
	// Issuer is the issuer of the super tenant (RESCIND_ISSUER).
	Issuer string
}

// Etcd is a [replica.Source] of revocations only, and a [replica.Feed], which may stand beside
// another source. Make one with [New], and Close it.
type Etcd struct{}

var (
	_ replica.Source = (*Etcd)(nil)
	_ replica.Feed   = (*Etcd)(nil)
)

// New checks cfg and makes a client. It does not wait for a connection.
func New(cfg Config) (*Etcd, error) { panic("skeleton") }

// Close ends the client. Follow must have returned.
func (e *Etcd) Close() error { panic("skeleton") }

// Load implements [replica.Source].
func (e *Etcd) Load(ctx context.Context, s *replica.State) error { panic("skeleton") }

// Events implements [replica.Source]. The directory has no events: its error is [replica.ErrGone].
func (e *Etcd) Events(context.Context, revocation.Position) (replica.Page, error) {
	return replica.Page{}, replica.ErrGone
}

// Name implements [replica.Feed]. It is "etcd".
func (e *Etcd) Name() string { return "etcd" }

// Follow implements [replica.Feed].
func (e *Etcd) Follow(ctx context.Context, at func() revocation.Position, to replica.Receiver) error {
	panic("skeleton")
}
