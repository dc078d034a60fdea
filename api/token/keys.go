package token

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

const (
	maxKeySetBytes = 1 << 20
	maxKeys        = 100
	minRSABits     = 2048
	maxRSABits     = 8192 // a larger one only costs time
)

// DefaultAlgorithms are those of an [Issuer] that names none.
var DefaultAlgorithms = []string{"RS256", "PS256", "ES256", "Ed25519", "EdDSA"}

// scheme is what a signature algorithm of RFC 7518 or RFC 8037 asks of its key.
type scheme struct {
	hash  crypto.Hash
	pss   bool
	curve elliptic.Curve // of ECDSA
}

var schemes = map[string]scheme{
	"RS256":   {hash: crypto.SHA256},
	"RS384":   {hash: crypto.SHA384},
	"RS512":   {hash: crypto.SHA512},
	"PS256":   {hash: crypto.SHA256, pss: true},
	"PS384":   {hash: crypto.SHA384, pss: true},
	"PS512":   {hash: crypto.SHA512, pss: true},
	"ES256":   {hash: crypto.SHA256, curve: elliptic.P256()},
	"ES384":   {hash: crypto.SHA384, curve: elliptic.P384()},
	"ES512":   {hash: crypto.SHA512, curve: elliptic.P521()},
	"Ed25519": {},
	"EdDSA":   {},
}

// Key is a public key of an issuer. It is not changed after it was made.
type Key struct {
	id     string
	alg    string           // the one algorithm that it is for, empty for all of its type
	public crypto.PublicKey // *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey
}

// suits reports whether the key may verify signatures of alg.
func (k Key) suits(alg string) bool {
	s, ok := schemes[alg]
	if !ok || k.alg != "" && sameAlgorithm(k.alg) != sameAlgorithm(alg) {
		return false
	}
	switch public := k.public.(type) {
	case *rsa.PublicKey:
		return s.hash != 0 && s.curve == nil
	case *ecdsa.PublicKey:
		return s.curve == public.Curve
	case ed25519.PublicKey:
		return s.hash == 0
	}
	return false
}

// sameAlgorithm maps the two names of Ed25519 (RFC 8037, RFC 9864) to one.
func sameAlgorithm(alg string) string {
	if alg == "EdDSA" {
		return "Ed25519"
	}
	return alg
}

// verify reports whether the key made signature over signed. The key suits alg.
func (k Key) verify(alg, signed string, signature []byte) bool {
	s := schemes[alg]
	switch public := k.public.(type) {
	case *rsa.PublicKey:
		if s.pss {
			opts := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}
			return rsa.VerifyPSS(public, s.hash, digest(s.hash, signed), signature, opts) == nil
		}
		return rsa.VerifyPKCS1v15(public, s.hash, digest(s.hash, signed), signature) == nil
	case *ecdsa.PublicKey:
		size := coordinateSize(public.Curve)
		if len(signature) != 2*size {
			return false
		}
		r, t := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
		return ecdsa.Verify(public, digest(s.hash, signed), r, t)
	case ed25519.PublicKey:
		return ed25519.Verify(public, []byte(signed), signature)
	}
	return false
}

func digest(hash crypto.Hash, s string) []byte {
	switch hash {
	case crypto.SHA384:
		sum := sha512.Sum384([]byte(s))
		return sum[:]
	case crypto.SHA512:
		sum := sha512.Sum512([]byte(s))
		return sum[:]
	default:
		sum := sha256.Sum256([]byte(s))
		return sum[:]
	}
}

func coordinateSize(curve elliptic.Curve) int { return (curve.Params().BitSize + 7) / 8 }

// KeySet is where an issuer's keys come from. Its methods may be called
// concurrently.
type KeySet interface {
	// Key returns the key named kid, which is for alg. An empty kid stands for
	// the only key that is for alg. The error is [ErrUnknownKey] only when this
	// is proven by keys read after the call, [ErrAlgorithm] when the key is for
	// another algorithm, else [ErrKeysUnavailable].
	Key(ctx context.Context, kid, alg string) (Key, error)
}

// StaticKeySet is a key set that is what it is: a kid that it lacks does not exist.
type StaticKeySet struct {
	byID    map[string]Key
	all     []Key
	refused []string // for people: which keys of the document are not used, and why
}

// Key implements [KeySet].
func (s *StaticKeySet) Key(_ context.Context, kid, alg string) (Key, error) {
	if kid != "" {
		key, ok := s.byID[kid]
		if !ok {
			return Key{}, ErrUnknownKey
		}
		if !key.suits(alg) {
			return Key{}, fmt.Errorf("%w: its key is for another one", ErrAlgorithm)
		}
		return key, nil
	}
	var suitable []Key
	for _, key := range s.all {
		if key.suits(alg) {
			suitable = append(suitable, key)
		}
	}
	if len(suitable) != 1 {
		return Key{}, fmt.Errorf("%w: it names none, and its issuer has %d for %s", ErrUnknownKey, len(suitable), alg)
	}
	return suitable[0], nil
}

// ParseKeySet reads a JWK set (RFC 7517) of up to 1 MiB and 100 keys. A key that
// cannot verify signatures safely is left out: symmetric, private, RSA below
// 2048 bits, of an unknown kind, or not for signatures. None left, a name or a
// kid that is there twice, and a document of another form are errors.
func ParseKeySet(jwks []byte) (*StaticKeySet, error) {
	if len(jwks) > maxKeySetBytes {
		return nil, fmt.Errorf("read key set: more than %d bytes", maxKeySetBytes)
	}
	document, err := parseObject(jwks)
	if err != nil {
		return nil, errors.New("read key set: not a JSON object with each name once")
	}
	raw, ok := lookup(document, "keys")
	if !ok {
		return nil, errors.New(`read key set: no "keys"`)
	}
	documents, err := elements(raw)
	if err != nil {
		return nil, errors.New(`read key set: "keys" is not an array`)
	}
	if len(documents) > maxKeys {
		return nil, fmt.Errorf("read key set: %d keys, at most %d are allowed", len(documents), maxKeys)
	}
	set := &StaticKeySet{byID: map[string]Key{}}
	for i, document := range documents {
		key, err := parseKey(document)
		if err != nil {
			set.refused = append(set.refused, fmt.Sprintf("key %d %q: %v", i+1, key.id, err))
			continue
		}
		if key.id != "" {
			if _, twice := set.byID[key.id]; twice {
				return nil, fmt.Errorf("read key set: kid %q is there twice", key.id)
			}
			set.byID[key.id] = key
		}
		set.all = append(set.all, key)
	}
	if len(set.all) == 0 {
		return nil, fmt.Errorf("read key set: none of its %d keys can be used %q",
			len(documents), set.refused[:min(3, len(set.refused))])
	}
	return set, nil
}

// parseKey reads a JWK. With an error, the key has its id alone, if it has one.
func parseKey(document string) (Key, error) {
	if document[0] != '{' {
		return Key{}, errors.New("not a JSON object")
	}
	w := walker{s: document}
	members, err := w.object(1)
	if err != nil {
		return Key{}, err
	}
	var kid, kty, use, alg string
	for _, f := range []textField{{"kid", &kid}, {"kty", &kty}, {"use", &use}, {"alg", &alg}} {
		if *f.to, err = text(members, f.name); err != nil {
			return Key{}, fmt.Errorf("%s is not a string", f.name)
		}
		if len(*f.to) > maxKeyIDBytes {
			return Key{}, fmt.Errorf("%s is longer than %d bytes", f.name, maxKeyIDBytes)
		}
	}
	refused := Key{id: kid}
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"} {
		if _, ok := lookup(members, name); ok {
			return refused, fmt.Errorf("symmetric or private: it has %q", name)
		}
	}
	if use != "" && use != "sig" {
		return refused, fmt.Errorf("not for signatures: use is %q", use)
	}
	operations, err := texts(members, "key_ops")
	if err != nil || operations != nil && !slices.Contains(operations, "verify") {
		return refused, errors.New("not for signatures: key_ops lacks verify")
	}
	// Clones, since a part of a string keeps all of it: keys live long, their documents need not.
	key := Key{id: strings.Clone(kid), alg: strings.Clone(alg)}
	switch kty {
	case "RSA":
		key.public, err = rsaKey(members)
	case "EC":
		key.public, err = ecKey(members)
	case "OKP":
		key.public, err = okpKey(members)
	default:
		return refused, fmt.Errorf("kty %q is not supported", kty)
	}
	if err != nil {
		return refused, err
	}
	if alg != "" && !key.suits(alg) {
		return refused, fmt.Errorf("alg %q is not one for this key", alg)
	}
	return key, nil
}

func rsaKey(members []member) (*rsa.PublicKey, error) {
	n, err := bytesOf(members, "n")
	if err != nil {
		return nil, err
	}
	e, err := bytesOf(members, "e")
	if err != nil {
		return nil, err
	}
	modulus, exponent := new(big.Int).SetBytes(n), new(big.Int).SetBytes(e)
	if bits := modulus.BitLen(); bits < minRSABits || bits > maxRSABits {
		return nil, fmt.Errorf("an RSA modulus of %d bits, must be %d to %d", bits, minRSABits, maxRSABits)
	}
	if modulus.Bit(0) == 0 || exponent.Bit(0) == 0 || exponent.BitLen() > 31 || exponent.Cmp(big.NewInt(3)) < 0 {
		return nil, errors.New("n and e are no RSA key")
	}
	return &rsa.PublicKey{N: modulus, E: int(exponent.Int64())}, nil
}

func ecKey(members []member) (*ecdsa.PublicKey, error) {
	crv, err := text(members, "crv")
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(curves, func(c elliptic.Curve) bool { return c.Params().Name == crv })
	if i < 0 {
		return nil, errors.New("its crv is not supported")
	}
	x, err := bytesOf(members, "x")
	if err != nil {
		return nil, err
	}
	y, err := bytesOf(members, "y")
	if err != nil {
		return nil, err
	}
	if size := coordinateSize(curves[i]); len(x) != size || len(y) != size {
		return nil, fmt.Errorf("x and y must have %d bytes each", size)
	}
	return ecdsa.ParseUncompressedPublicKey(curves[i], slices.Concat([]byte{4}, x, y))
}

var curves = []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()}

func okpKey(members []member) (ed25519.PublicKey, error) {
	crv, err := text(members, "crv")
	if err != nil || crv != "Ed25519" {
		return nil, errors.New("its crv is not supported")
	}
	x, err := bytesOf(members, "x")
	if err != nil {
		return nil, err
	}
	if len(x) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("x must have %d bytes", ed25519.PublicKeySize)
	}
	return x, nil
}

func bytesOf(members []member, name string) ([]byte, error) {
	s, err := text(members, name)
	if err != nil || s == "" {
		return nil, fmt.Errorf("no %s", name)
	}
	b, err := decodeSegment(s)
	if err != nil {
		return nil, fmt.Errorf("%s is not base64url", name)
	}
	return b, nil
}
