// Package revocation holds the words that a publisher of revocations and its
// readers share: what is revoked, the event that says so, and an event's place
// in the log. It hides how these look on the wire.
//
// # Decisions
//
// An entry names the end of the tokens that it matches, not the time at which
// it may be forgotten: a reader keeps it [MaxLeeway] longer, because a gateway
// may accept a token for that long after its expiry. One number thus serves
// gateways of any leeway.
package revocation

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// Version is the version of the event's form on the wire.
//
//	1  2026-11-21  the first
const Version = 1

// MaxLeeway is the most that any gateway may add to a token's exp before it
// refuses the token. Whoever holds an entry keeps it until [Revocation.Exp]
// plus MaxLeeway.
const MaxLeeway = 120 * time.Second

// MaxExpiryAhead is how far ahead an entry's end may lie.
const MaxExpiryAhead = 10 * 365 * 24 * time.Hour

// maxIDLen bounds issuers and identifiers, in bytes.
const maxIDLen = 255

// Seq is an event's place in the log: 1, 2, 3 … without a gap, in commit order.
// Zero is before the first event.
type Seq int64

// Epoch is the identity of the log, a canonical UUID. It changes only when the
// log was restored to an older state; seqs of two epochs cannot be compared.
type Epoch string

// Position is a place in one epoch of the log.
type Position struct {
	Epoch Epoch `json:"epoch"`
	Seq   Seq   `json:"seq"`
}

// String is the form of event ids: "<epoch>:<seq>".
func (p Position) String() string { return fmt.Sprintf("%s:%d", p.Epoch, p.Seq) }

// Kind says what of a token a revocation is compared with.
type Kind string

// The kinds of revocation. Client, subject and tenant also compare the token's
// iat with [Revocation.NotAfter].
const (
	KindToken   Kind = "token"   // (iss, jti), or a digest of a token without jti
	KindClient  Kind = "client"  // (iss, consumer key)
	KindSubject Kind = "subject" // (iss, sub)
	KindSession Kind = "session" // (iss, sid)
	KindTenant  Kind = "tenant"  // every issuer of a tenant
	KindKey     Kind = "key"     // (iss, kid)
)

// Kinds are all kinds, in the order in which a gateway checks them.
var Kinds = []Kind{KindKey, KindToken, KindSession, KindClient, KindSubject, KindTenant}

// HasTime reports whether revocations of kind k spare tokens issued later.
func (k Kind) HasTime() bool {
	return k == KindClient || k == KindSubject || k == KindTenant
}

// Target is what a revocation ends. Two revocations with an equal Target are
// about the same tokens; a Target can be a map key.
type Target struct {
	Kind Kind
	// Iss is the issuer, compared byte for byte. Empty for KindTenant.
	Iss string
	// ID is the jti, consumer key, sub, sid, tenant domain or kid; with Digest,
	// a SHA-256 in lower-case hexadecimal.
	ID string
	// Digest is for tokens without a jti: ID is the SHA-256 of a JWT's signing
	// input, or of an opaque token. Never of a whole JWT: its signature can be
	// altered and stay valid.
	Digest bool
}

// DigestTarget is the target of a token that has no jti: hashed is the signing
// input of a JWT, or an opaque token.
func DigestTarget(iss, hashed string) Target {
	sum := sha256.Sum256([]byte(hashed))
	return Target{Kind: KindToken, Iss: iss, ID: hex.EncodeToString(sum[:]), Digest: true}
}

// An InvalidError says why a value from outside cannot be used. Its Detail is
// safe to show to the caller and does not repeat the value.
type InvalidError struct {
	Detail string
}

func (e *InvalidError) Error() string { return e.Detail }

func invalidf(format string, args ...any) error {
	return &InvalidError{Detail: fmt.Sprintf(format, args...)}
}

// Validate returns an [InvalidError] unless t can be stored and published.
func (t Target) Validate() error {
	switch t.Kind {
	case KindToken, KindClient, KindSubject, KindSession, KindKey:
		if err := validateText("iss", t.Iss); err != nil {
			return err
		}
	case KindTenant:
		if t.Iss != "" {
			return invalidf("a tenant revocation names no issuer")
		}
	default:
		return invalidf("the kind of revocation is not known")
	}
	if t.Digest {
		if t.Kind != KindToken {
			return invalidf("only a token is named by a digest")
		}
		if len(t.ID) != 2*sha256.Size || strings.Trim(t.ID, "0123456789abcdef") != "" {
			return invalidf("a digest is 64 lower-case hexadecimal digits")
		}
	}
	return validateText(t.idName(), t.ID)
}

func validateText(name, s string) error {
	switch {
	case s == "":
		return invalidf("%s is empty", name)
	case len(s) > maxIDLen:
		return invalidf("%s is longer than %d bytes", name, maxIDLen)
	case !utf8.ValidString(s):
		return invalidf("%s is not UTF-8", name)
	}
	for _, r := range s {
		if r < 0x20 || 0x7f <= r && r < 0xa0 {
			return invalidf("%s has a control character", name)
		}
	}
	return nil
}

// idName is the member of event data that holds t.ID.
func (t Target) idName() string {
	switch {
	case t.Digest:
		return "digest"
	case t.Kind == KindToken:
		return "jti"
	case t.Kind == KindClient:
		return "client_id"
	case t.Kind == KindSubject:
		return "sub"
	case t.Kind == KindSession:
		return "sid"
	case t.Kind == KindKey:
		return "kid"
	}
	return "tenant"
}

// Tenant is an organisation. The super tenant is -1234, carbon.super.
type Tenant struct {
	ID     int32  `json:"id"`
	Domain string `json:"domain"`
}

// SuperTenant is the tenant that exists everywhere.
var SuperTenant = Tenant{ID: -1234, Domain: "carbon.super"}

// Revocation is the statement that tokens which match Target are dead.
type Revocation struct {
	// ID is a version-7 UUID.
	ID     string
	Target Target
	// Tenant owns the issuer.
	Tenant Tenant
	// Exp is when the last matching token ends by itself, in Unix seconds: the
	// token's exp for KindToken. The entry outlives it by MaxLeeway.
	Exp int64
	// NotAfter is the latest iat, in Unix seconds, of tokens that are dead.
	// Only for kinds that have a time.
	NotAfter int64
	// ClientID is the consumer key that the token was issued to, if known.
	ClientID string
	// Signature is the third segment of a JWT without jti; gateways that know
	// neither jti nor digest compare it. Empty otherwise.
	Signature string
	// Reason is for people: "client" when the token's own client revoked it.
	Reason string
}
