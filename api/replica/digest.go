package replica

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"

	"github.com/rescindhq/rescind/api/catalog"
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
// before after, for which it waits, as it does for a state that is at no position yet. An empty after is
// any position. It also waits until the state holds nothing ahead of its position, see [State.Revoke] and
// [State.Through]: only then is the digest that of the position. In a state of some tenants it leaves out what
// [State.Revoke] alone has told, of issuers that the log has nothing of. One runs at a time; others wait.
//
// Its error is that of ctx; [ErrEpoch] if the state is, or comes to be, of another epoch than after; or
// says that the cutoff is too early: revocations that it counts may be forgotten, see [Kept].
//
// A state of [State.ReadSnapshot] may hold what was applied while [State.WriteSnapshot] wrote that
// snapshot, and not know it: name as after a position that the log has come to since.
func (s *State) Digest(ctx context.Context, cutoff int64, after revocation.Position) (Digest, error) {
	sc := newScan(cutoff, after, false)
	if err := s.read(ctx, sc); err != nil {
		return Digest{}, fmt.Errorf("digest the state: %w", err)
	}
	return sc.sum("").digest(sc.at, cutoff), nil
}

// DigestScope is what a reader sees of the log.
type DigestScope struct {
	// Sees reports whether a tenant, by its domain, is seen. Nil: all are.
	Sees func(domain string) bool
	// RevocationsOnly leaves the catalog out.
	RevocationsOnly bool
}

// Digests are the digests of a state that has [StateConfig.Records], for all scopes, at one cutoff, at
// any position that is not too long ago. Methods may be called from any goroutine.
type Digests struct {
	state  *State
	at     revocation.Position
	breaks uint64 // State.breaks, then
	cutoff int64
	sums   map[string]*tally // by the tenant's domain
}

// Digests reads the whole state once, a little at a time, as [State.Digest] does, and waits and fails as
// that. A state of a part of the log has none: that is an error. It panics without
// [StateConfig.Records], for then nobody knows whose revocations these are.
func (s *State) Digests(ctx context.Context, cutoff int64) (*Digests, error) {
	if !s.cfg.Records {
		panic("replica: Digests of a state without StateConfig.Records")
	}
	sc := newScan(cutoff, revocation.Position{}, true)
	if err := s.read(ctx, sc); err != nil {
		return nil, fmt.Errorf("digest the state for all scopes: %w", err)
	}
	return &Digests{state: s, at: sc.at, breaks: sc.breaks, cutoff: cutoff, sums: sc.sums}, nil
}

// The errors of [Digests.At].
var (
	// ErrForgotten: what happened since then, or until then, is no longer known, or a snapshot was
	// loaded since.
	ErrForgotten = errors.New("this position is too long ago, or of another epoch")
	// ErrNotYet: the state has not come to this position.
	ErrNotYet = errors.New("the state is not at this position yet")
)

// At is the digest that a reader of this scope has at p. Its error is [ErrForgotten] or [ErrNotYet]. It
// goes by the events between p and the position that d was made at, of which [StateConfig.History] are
// known: for each some nanoseconds, and Sees is asked once for each tenant at least.
func (d *Digests) At(p revocation.Position, scope DigestScope) (Digest, error) {
	if p.Epoch != d.at.Epoch {
		return Digest{}, fmt.Errorf("digest at %s: %w", p, ErrForgotten)
	}
	sees := scope.Sees
	if sees == nil {
		sees = func(string) bool { return true }
	}
	var sum tally
	for domain, t := range d.sums {
		if sees(domain) {
			sum.join(t)
		}
	}
	if err := d.state.roll(d, p, sees, &sum); err != nil {
		return Digest{}, fmt.Errorf("digest at %s: %w", p, err)
	}
	if scope.RevocationsOnly {
		sum.catalog, sum.entities = total{}, 0
	}
	return sum.digest(p, d.cutoff), nil
}

// total is a sum of hashes mod 2^128, or a hash.
type total struct{ hi, lo uint64 }

func (t *total) add(h total) {
	var carry uint64
	t.lo, carry = bits.Add64(t.lo, h.lo, 0)
	t.hi, _ = bits.Add64(t.hi, h.hi, carry)
}

func (t *total) sub(h total) {
	var borrow uint64
	t.lo, borrow = bits.Sub64(t.lo, h.lo, 0)
	t.hi, _ = bits.Sub64(t.hi, h.hi, borrow)
}

func (t total) sum() (s Sum) {
	binary.BigEndian.PutUint64(s[:], t.hi)
	binary.BigEndian.PutUint64(s[8:], t.lo)
	return s
}

// hashOf is the first half of the SHA-256 of b.
func hashOf(b []byte) total {
	sum := sha256.Sum256(b)
	return total{binary.BigEndian.Uint64(sum[:]), binary.BigEndian.Uint64(sum[8:])}
}

// hashedSet is the hash of a set, with which those of its entries begin.
type hashedSet struct{ total }

func hashSet(c class, iss string) hashedSet {
	var b [len("session") + 1 + maxID]byte
	p := append(append(b[:0], classes[c].label...), 0)
	return hashedSet{hashOf(append(p, iss...))}
}

// entry is the hash of an entry; notAfter is 0 in a set without.
func (s hashedSet) entry(k key, exp, notAfter int64) total {
	var b [48]byte
	for i, word := range [...]uint64{s.hi, s.lo, k[0], k[1], uint64(exp), uint64(notAfter)} {
		binary.BigEndian.PutUint64(b[8*i:], word)
	}
	return hashOf(b[:])
}

func hashEntity(e catalog.Entity) total {
	var b [96]byte // more than a canonical UUID needs
	p := append(append(b[:0], e.Noun()...), 0)
	p = append(append(p, e.Base().UUID...), 0)
	return hashOf(binary.BigEndian.AppendUint64(p, uint64(e.Base().Timestamp)))
}

// counted is a revocation or an entity, as digests count it. The zero value counts nowhere.
type counted struct {
	hash   total
	end    int64 // exp of a revocation, or always
	domain string
}

// always is counted.end of an entity. No revocation has it.
const always = -1

func countedOf(e catalog.Entity) counted {
	return counted{hashEntity(e), always, e.Base().Tenant.Domain}
}

// tally is what there is of some tenants.
type tally struct {
	revocations, catalog total
	count, entities      int
}

// add counts what has this hash and end, see counted.
func (t *tally) add(hash total, end, cutoff int64) {
	switch {
	case end == always:
		t.catalog.add(hash)
		t.entities++
	case end > 0 && end >= cutoff:
		t.revocations.add(hash)
		t.count++
	}
}

// sub is the opposite of add.
func (t *tally) sub(hash total, end, cutoff int64) {
	switch {
	case end == always:
		t.catalog.sub(hash)
		t.entities--
	case end > 0 && end >= cutoff:
		t.revocations.sub(hash)
		t.count--
	}
}

func (t *tally) join(o *tally) {
	t.revocations.add(o.revocations)
	t.catalog.add(o.catalog)
	t.count += o.count
	t.entities += o.entities
}

func (t *tally) digest(at revocation.Position, cutoff int64) Digest {
	return Digest{
		Position: at, Cutoff: cutoff,
		Revocations: t.revocations.sum(), Count: t.count,
		Catalog: t.catalog.sum(), Entities: t.entities,
	}
}
