package replica

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/rescindhq/rescind/api/revocation"
)

// Sum is a sum of 16-byte hashes mod 2^128, each read as a big-endian number. Its text is 32 lower-case
// hexadecimal digits.
type Sum [16]byte

// MarshalText implements [encoding.TextMarshaler].
func (s Sum) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, s[:]), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (s *Sum) UnmarshalText(text []byte) error {
	if n, err := hex.Decode(s[:], text[:min(len(text), 32)]); err != nil || n != len(s) || len(text) != 32 {
		return fmt.Errorf("read sum %q: must be 32 hexadecimal digits", text)
	}
	return nil
}

// Digest stands for a whole state at one position: two states of the same log and scope that have the
// same position and cutoff have the same digest, or one of them lacks something. See api/digest.md.
type Digest struct {
	revocation.Position
	// Cutoff, Unix seconds of a whole minute: revocations that end before it do not count.
	Cutoff int64 `json:"cutoff"`
	// Revocations is the sum over those that count, which are Count.
	Revocations Sum `json:"revocations"`
	Count       int `json:"count"`
	// Catalog is the sum over all entities with their versions. Both are zero in a state of
	// revocations only.
	Catalog  Sum `json:"catalog"`
	Entities int `json:"entities"`
}

// Digest reads the whole state, a little at a time, and returns its digest at a position that is not
// before after, for which it waits. Its error is that of ctx, or [ErrEpoch] if the state is, or comes to
// be, of another epoch than after. An empty after is any position. One runs at a time; others wait.
func (s *State) Digest(ctx context.Context, cutoff int64, after revocation.Position) (Digest, error) {
	panic("skeleton")
}

// Scope of a digest: what a reader sees of the log.
type DigestScope struct {
	// Sees reports whether a tenant, by its domain, is seen. Nil: all are.
	Sees func(domain string) bool
	// RevocationsOnly leaves the catalog out.
	RevocationsOnly bool
}

// Digests are the digests of a state that has [StateConfig.History], for all scopes, at one cutoff, at
// any position that is not too long ago. Methods may be called from any goroutine.
type Digests struct{}

// Digests reads the whole state once, a little at a time.
func (s *State) Digests(ctx context.Context, cutoff int64) (*Digests, error) { panic("skeleton") }

// The errors of [Digests.At].
var (
	// ErrForgotten: what happened since then is no longer known, or a snapshot was loaded since.
	ErrForgotten = errors.New("this position is too long ago, or of another epoch")
	// ErrNotYet: the state has not come to this position.
	ErrNotYet = errors.New("the state is not at this position yet")
)

// At is the digest that a reader of this scope has at p. Its error is [ErrForgotten] or [ErrNotYet].
func (d *Digests) At(p revocation.Position, scope DigestScope) (Digest, error) { panic("skeleton") }
