// Package directory holds the words that the writer of the etcd directory of
// live revocations shares with its readers. It hides how keys and values look.
//
// # Keys
//
// The entries of the super tenant's issuer, the source, lie where gateways look
// for them by name alone: in /jti/, /digests/, /consumer-keys/, /users/,
// /sessions/ and /keys/. Those of every other issuer lie in the same folders
// below /issuers/<first 16 hexadecimal digits of SHA-256(iss)>, so that two
// issuers may use one jti. Tenants, which have no issuer, are in /tenants/. The
// last segment is the identifier, percent-encoded outside A-Z a-z 0-9 - . _ ~.
//
// # Values
//
// The value of an entry is {"iss","exp","seq","at"}, with "not_after" for kinds
// that have a time. Its lease ends no earlier than exp plus
// [revocation.MaxLeeway]; a lease may outlive the entry, so readers go by exp,
// and a key that vanishes tells them nothing.
//
// [StreamKey] holds {"epoch","seq"}: the directory has everything up to that
// seq, and may have later entries already. It is written in the same
// transactions as the entries, and is the last that they write. While it is
// absent the directory is being built, and whoever reads it is not ready: it is
// removed in the transaction that writes [RebuildKey], and comes back, as a new
// key, in the one that removes that.
//
// [HeartbeatKey] holds {"epoch","head","through","source","time"}, written about
// once a second: at that time, in Unix milliseconds, the last seq of the log was
// head, and the directory had everything up to through; source is the issuer of
// the super tenant. It tells a reader how old its copy is, and that it has the
// right directory. One that was written before the reader came says nothing of
// how things are: only one that is seen to be written does.
//
// # Cost of heartbeats
//
// Heartbeats add 86,400 revisions a day of some 200 bytes each, and one sync a
// second to the log of each member, in place of a read that the writer sent before. With
// periodic auto-compaction after 5 minutes no more than about 600 of them are kept,
// 120 kB. Without compaction every write stays, these too, which alone add 20 MB a day
// until etcd's quota is full and it refuses all writes.
package directory

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
)

const (
	issuersFolder  = "/issuers/"
	issuerHashLen  = 16
	unescapedRunes = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
)

// folders are where the entries of an issuer lie, by what they name.
var folders = []struct {
	name   string
	kind   revocation.Kind
	digest bool
}{
	{name: "/jti/", kind: revocation.KindToken},
	{name: "/digests/", kind: revocation.KindToken, digest: true},
	{name: "/consumer-keys/", kind: revocation.KindClient},
	{name: "/users/", kind: revocation.KindSubject},
	{name: "/sessions/", kind: revocation.KindSession},
	{name: "/tenants/", kind: revocation.KindTenant},
	{name: "/keys/", kind: revocation.KindKey},
}

// Folders returns the prefixes of all keys of entries. Whatever is below them
// belongs to the directory.
func Folders(prefix string) []string {
	names := make([]string, 0, len(folders)+1)
	for _, f := range folders {
		names = append(names, prefix+f.name)
	}
	return append(names, prefix+issuersFolder)
}

// StreamKey is the key that says where the directory stands.
func StreamKey(prefix string) string { return prefix + "/rescind/stream" }

// RebuildKey is the key that is there while the directory is being built. Its value
// is for its writer alone.
func RebuildKey(prefix string) string { return prefix + "/rescind/rebuild" }

// HeartbeatKey is the key that says how far the log reaches, see [Heartbeat].
func HeartbeatKey(prefix string) string { return prefix + "/rescind/heartbeat" }

// Key is where the entry of t lies. Source is the issuer of the super tenant.
// Targets share a key only if the hashes of their issuers collide.
func Key(prefix, source string, t revocation.Target) string {
	var b strings.Builder
	b.WriteString(prefix)
	if t.Kind != revocation.KindTenant && t.Iss != source {
		sum := sha256.Sum256([]byte(t.Iss))
		b.WriteString(issuersFolder)
		b.WriteString(hex.EncodeToString(sum[:issuerHashLen/2]))
	}
	for _, f := range folders {
		if f.kind == t.Kind && f.digest == t.Digest {
			b.WriteString(f.name)
		}
	}
	escape(&b, t.ID)
	return b.String()
}

// escape is percent-encoding of all but RFC 3986's unreserved characters;
// url.PathEscape leaves more as it is.
func escape(b *strings.Builder, s string) {
	const digits = "0123456789ABCDEF"
	for i := range len(s) {
		c := s[i]
		if strings.IndexByte(unescapedRunes, c) >= 0 {
			b.WriteByte(c)
			continue
		}
		b.WriteByte('%')
		b.WriteByte(digits[c>>4])
		b.WriteByte(digits[c&15])
	}
}

func unescape(s string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '%' {
			if i+2 >= len(s) {
				return "", false
			}
			h, err := hex.DecodeString(s[i+1 : i+3])
			if err != nil {
				return "", false
			}
			c, i = h[0], i+2
		}
		b.WriteByte(c)
	}
	return b.String(), true
}

// Stored is a revocation together with the time of its commit: what entries are
// made of.
type Stored struct {
	revocation.Revocation
	At time.Time
}

// Entry is one revocation as the directory has it.
type Entry struct {
	Target revocation.Target
	// Exp is when the last matching token ends by itself, in Unix seconds. The
	// entry counts until revocation.MaxLeeway later.
	Exp int64
	// NotAfter is the latest iat, in Unix seconds, of tokens that are dead. Zero
	// for kinds without a time.
	NotAfter int64
	// Seq is the seq of the entry's event, or a later one of the same epoch.
	Seq revocation.Seq
	// At is when the revocation was committed, in milliseconds.
	At time.Time
}

type wireEntry struct {
	Iss      string         `json:"iss"`
	Exp      int64          `json:"exp"`
	Seq      revocation.Seq `json:"seq"`
	At       int64          `json:"at"`
	NotAfter int64          `json:"not_after,omitempty"`
}

// Value is what the directory holds at the key of e.
func (e Entry) Value() string {
	return marshal(wireEntry{Iss: e.Target.Iss, Exp: e.Exp, Seq: e.Seq, At: e.At.UnixMilli(), NotAfter: e.NotAfter})
}

// marshal leaves <, > and & as they are: what it is given has strings and numbers
// alone, which always have a JSON form.
func marshal(v any) string {
	var b strings.Builder
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v)
	return strings.TrimSuffix(b.String(), "\n")
}

// errForeign is constant: what others left in the directory is repeated nowhere.
var errForeign = errors.New("not an entry of the directory")

// Parse reads an entry. It fails for whatever [Key] and [Entry.Value] cannot have
// made; members of the value that it does not know are ignored.
func Parse(prefix, source, key string, value []byte) (Entry, error) {
	var w wireEntry
	if err := json.Unmarshal(value, &w); err != nil || w.Exp <= 0 || w.Seq < 0 || w.NotAfter < 0 {
		return Entry{}, errForeign
	}
	e := Entry{Exp: w.Exp, NotAfter: w.NotAfter, Seq: w.Seq, At: time.UnixMilli(w.At).UTC()}
	rest, ok := strings.CutPrefix(key, prefix)
	if !ok {
		return Entry{}, errForeign
	}
	if below, ok := strings.CutPrefix(rest, issuersFolder); ok {
		rest = below[min(len(below), issuerHashLen):]
	}
	for _, f := range folders {
		if name, ok := strings.CutPrefix(rest, f.name); ok {
			id, ok := unescape(name)
			if !ok {
				return Entry{}, errForeign
			}
			e.Target = revocation.Target{Kind: f.kind, Iss: w.Iss, ID: id, Digest: f.digest}
		}
	}
	// A target has one key, so an equal key proves the rest: the issuer's hash,
	// the folder, the one way to encode the identifier.
	if e.Target.Validate() != nil || Key(prefix, source, e.Target) != key {
		return Entry{}, errForeign
	}
	return e, nil
}

// ParseStream reads the value of [StreamKey], which is the JSON of a position.
func ParseStream(value []byte) (revocation.Position, error) {
	var p revocation.Position
	if err := json.Unmarshal(value, &p); err != nil || p.Epoch == "" || p.Seq < 0 {
		return revocation.Position{}, errors.New("the directory's stream key does not hold an epoch and a seq")
	}
	return p, nil
}

// Heartbeat is what [HeartbeatKey] holds.
type Heartbeat struct {
	Epoch revocation.Epoch
	// Head is the last seq of the log.
	Head revocation.Seq
	// Through is where the directory stands, at most Head.
	Through revocation.Seq
	// Source is the issuer of the super tenant.
	Source string
	// Time is when Head was read, in milliseconds, by the writer's clock.
	Time time.Time
}

type wireHeartbeat struct {
	Epoch   revocation.Epoch `json:"epoch"`
	Head    revocation.Seq   `json:"head"`
	Through revocation.Seq   `json:"through"`
	Source  string           `json:"source"`
	Time    int64            `json:"time"`
}

// Value is what the directory holds for h.
func (h Heartbeat) Value() string {
	return marshal(wireHeartbeat{Epoch: h.Epoch, Head: h.Head, Through: h.Through, Source: h.Source, Time: h.Time.UnixMilli()})
}

// ParseHeartbeat reads the value of [HeartbeatKey].
func ParseHeartbeat(value []byte) (Heartbeat, error) {
	var w wireHeartbeat
	if err := json.Unmarshal(value, &w); err != nil || w.Epoch == "" || w.Through < 0 || w.Through > w.Head || w.Time <= 0 {
		return Heartbeat{}, errors.New("the directory's heartbeat does not hold an epoch, two seqs in order and a time")
	}
	return Heartbeat{Epoch: w.Epoch, Head: w.Head, Through: w.Through, Source: w.Source, Time: time.UnixMilli(w.Time).UTC()}, nil
}
