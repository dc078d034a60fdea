package authn

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"time"
)

const minMasterKeyBytes = 32

// MasterKey is the server's secret from which the keys of all its parts are
// derived. Printing one does not show it.
type MasterKey struct {
	id  string
	key []byte
}

// NewMasterKey makes a MasterKey of at least 32 random bytes.
func NewMasterKey(key []byte) (MasterKey, error) {
	if len(key) < minMasterKeyBytes {
		return MasterKey{}, fmt.Errorf("the master key has %d bytes, must be at least %d", len(key), minMasterKeyBytes)
	}
	k := MasterKey{key: append([]byte(nil), key...)}
	k.id = hex.EncodeToString(k.Derive("rescind key id", 8))
	return k, nil
}

// ID names the key without telling it: what is made under a key is stored with its ID.
func (k MasterKey) ID() string { return k.id }

// Derive returns n bytes, at most 8160, that are the same for the same purpose
// and tell nothing about the key or other purposes.
func (k MasterKey) Derive(purpose string, n int) []byte {
	b, err := hkdf.Key(sha256.New, k.key, nil, purpose, n)
	if err != nil {
		panic(err) // n is too large
	}
	return b
}

// Format keeps every verb of package fmt from printing the key.
func (k MasterKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[hidden]") }

const maxSecrets = 2

type mac [sha256.Size]byte

// storedSecret is what the database has of a client's secret. The zero value
// matches nothing.
type storedSecret struct {
	usable  bool
	key     int // index in secretHasher.keys
	mac     mac
	expires time.Time // zero: never
}

type secretHasher struct {
	ids  []string
	keys [][]byte
	// equal is subtle.ConstantTimeCompare, but where a test counts its calls.
	equal func(x, y []byte) int
}

func newSecretHasher(keys []MasterKey) *secretHasher {
	h := &secretHasher{equal: subtle.ConstantTimeCompare}
	for _, k := range keys {
		h.ids = append(h.ids, k.ID())
		h.keys = append(h.keys, k.Derive("rescind client secrets", sha256.Size))
	}
	return h
}

func (h *secretHasher) mac(key int, clientID, secret string) mac {
	m := hmac.New(sha256.New, h.keys[key])
	_, _ = io.WriteString(m, clientID)
	_, _ = m.Write([]byte{0}) // no id has it
	_, _ = io.WriteString(m, secret)
	return mac(m.Sum(nil))
}

// matches reports whether secret is one of the client's. What it does depends
// only on the number of master keys: not on whether there is such a client, how
// many secrets it has, or how much of one is right.
func (h *secretHasher) matches(stored *[maxSecrets]storedSecret, clientID, secret string, now time.Time) bool {
	macs := make([]mac, len(h.keys))
	for i := range macs {
		macs[i] = h.mac(i, clientID, secret)
	}
	found := 0
	for i := range stored {
		s := &stored[i]
		live := s.usable && (s.expires.IsZero() || now.Before(s.expires))
		equal := h.equal(macs[s.key][:], s.mac[:])
		if live {
			found |= equal
		}
	}
	return found == 1
}

// newSecret returns 256 random bits in characters that form-encoding leaves as
// they are, so that clients that forget to encode still get in.
func newSecret() string {
	var b [32]byte
	rand.Read(b[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}
