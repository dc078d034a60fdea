// Package token hides what makes a string a genuine JWT of a trusted issuer:
// strict decoding, algorithms, key sets and how these are fetched.
//
// A [Verifier] answers one question: did this issuer sign exactly these claims? An
// [Acceptance] answers the next: is this an access token, for this receiver, now? They are two
// because who revokes tokens asks the first alone. [Verifier.Accept] asks both. Neither knows
// what is revoked.
//
// # Decisions
//
// A verification ends in one of three ways: a [Token]; an error that is
// [ErrInvalid], which proves that this string is no sound token of a trusted
// issuer; or [ErrKeysUnavailable], which proves nothing. Who revokes tokens must
// keep the last two apart: to say "unknown, nothing to do" of a token whose keys
// could not be fetched would leave a live token alive. Of the former, only what
// is [ErrClaims] was signed by its issuer.
//
// JSON is checked by encoding/json and then taken apart here, because
// encoding/json matches member names in any case and lets the last of two equal
// names win: {"jti":"a","JTI":"b"} would be b. encoding/json/v2 does neither,
// and replaces object.go once it is out of its experiment.
//
// A claim that is null counts as absent: several issuers write null for what
// they do not have.
package token

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

const (
	maxTokenBytes = 16 << 10
	maxKeyIDBytes = 256
	maxNumeric    = 1 << 53 // the largest integer that every JSON reader keeps exact
)

// ErrInvalid is what all errors are that prove that a string is no sound token of
// a trusted issuer.
var ErrInvalid = errors.New("the token is not valid")

// The ways in which a token is invalid; each is [ErrInvalid] too.
var (
	// ErrMalformed is for what is not three segments of strict base64url with
	// JSON objects in the first two, is too large, or demands extensions.
	ErrMalformed error = &failure{ErrInvalid, "malformed", "the token is malformed"}
	// ErrUntrustedIssuer is for an iss that no configured issuer has.
	ErrUntrustedIssuer error = &failure{ErrInvalid, "untrusted_issuer", "the token's issuer is not trusted"}
	// ErrAlgorithm is for an alg that its issuer or its key is not for.
	ErrAlgorithm error = &failure{ErrInvalid, "algorithm", "the token's algorithm is not allowed"}
	// ErrUnknownKey is for a kid that a key set lacked which was read after the
	// verification began.
	ErrUnknownKey error = &failure{ErrInvalid, "unknown_key", "the token's issuer does not have its key"}
	// ErrSignature is for a signature that the key did not make.
	ErrSignature error = &failure{ErrInvalid, "signature", "the token's signature does not match"}
	// ErrClaims is for a token that its issuer did sign, with a claim of a type
	// that RFC 7519 or RFC 9068 does not allow.
	ErrClaims error = &failure{ErrInvalid, "claims", "a claim of the token has the wrong type"}
)

// ErrKeysUnavailable says that a trusted issuer's keys cannot be had now. It is
// not [ErrInvalid]: the token may be genuine, try again.
var ErrKeysUnavailable error = &failure{nil, "keys_unavailable", "the keys of the token's issuer cannot be had now"}

// failure is an error with a word for metrics. It is also the error that it is one of, if any.
type failure struct {
	of           error
	reason, text string
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.of }

// Reasons are all values of [Reason] for errors of [Verifier.Verify], [RefusedReasons] those
// for errors of [Acceptance.Check].
var (
	Reasons = []string{
		"malformed", "untrusted_issuer", "algorithm", "unknown_key", "signature", "claims", "keys_unavailable",
	}
	RefusedReasons = []string{"type", "no_expiry", "expired", "not_yet_valid", "no_issue_time", "lifetime", "audience"}
)

// Reason is a word for metrics that says why a token was not accepted; empty when
// err is none of this package's errors.
func Reason(err error) string {
	if f, ok := errors.AsType[*failure](err); ok {
		return f.reason
	}
	return ""
}

// Token is a JWT whose signature has been verified. Its claims are as its issuer
// wrote them. It is not changed after it was made and may be shared.
type Token struct {
	// Alg is the algorithm of the signature.
	Alg string
	// KeyID is the kid of the key that verified it, also when the token names none; empty when
	// the key has none either.
	KeyID string
	// Type is the header's typ in lower case without "application/"; empty when absent.
	Type string

	// Issuer is iss, ID is jti, Subject is sub, Session is sid.
	Issuer, ID, Subject, Session string
	// ClientID is the first of azp, client_id and consumerKey that is there and
	// not empty.
	ClientID string
	// HasExpiry is false when there is no exp; Expiry is 0 then.
	HasExpiry bool
	// Expiry, IssuedAt and NotBefore are exp, iat and nbf in Unix seconds,
	// fractions cut off; 0 when absent.
	Expiry, IssuedAt, NotBefore int64
	// Audience is aud, be it one string or several. AudienceList is true when it was an array,
	// for those who must not take one.
	Audience     []string
	AudienceList bool
	// Scope is scope; of several strings, joined by spaces.
	Scope string

	// SigningInput is the first two segments with the dot between them,
	// Signature the third.
	SigningInput, Signature string

	claims []member
}

// Has reports whether the token has the claim, exactly so named, and it is not null.
func (t *Token) Has(claim string) bool {
	_, ok := lookup(t.claims, claim)
	return ok
}

// LooksLikeJWT reports whether s was meant as a JWT, sound or damaged, and hence
// must never be taken for an opaque token or a jti. It holds for whatever has
// three segments, and for what begins like a JOSE header and has a dot, such as
// a JWE or a JWT cut short.
func LooksLikeJWT(s string) bool {
	dots := strings.Count(s, ".")
	return dots == 2 || dots > 0 && strings.HasPrefix(s, "eyJ")
}

// ClaimedIssuer reads the iss of a JWT without verifying anything: it may be anybody's word.
// It is for those who look at whose token one might be before they pay for its verification.
// It is false for what [Verifier.Verify] finds [ErrMalformed], and for a token without iss; a
// token that Verify accepts has the iss that is claimed.
func ClaimedIssuer(compact string) (iss string, ok bool) {
	t, _, _, err := parse(compact)
	if err != nil || t.Issuer == "" {
		return "", false
	}
	return t.Issuer, true
}

// parse takes compact apart. Claims of a wrong type are reported by claimsErr:
// they matter only once the signature has shown that the issuer wrote them.
func parse(compact string) (t *Token, signature []byte, claimsErr, err error) {
	if len(compact) > maxTokenBytes {
		return nil, nil, nil, fmt.Errorf("%w: more than %d bytes", ErrMalformed, maxTokenBytes)
	}
	header64, rest, _ := strings.Cut(compact, ".")
	payload64, signature64, ok := strings.Cut(rest, ".")
	if !ok {
		return nil, nil, nil, fmt.Errorf("%w: not three segments", ErrMalformed)
	}
	header, err := decodeSegment(header64)
	if err != nil {
		return nil, nil, nil, err
	}
	payload, err := decodeSegment(payload64)
	if err != nil {
		return nil, nil, nil, err
	}
	if signature, err = decodeSegment(signature64); err != nil {
		return nil, nil, nil, err
	}
	t = &Token{SigningInput: compact[:len(header64)+1+len(payload64)], Signature: signature64}
	if err := t.readHeader(header); err != nil {
		return nil, nil, nil, err
	}
	if t.claims, err = parseObject(payload); err != nil {
		return nil, nil, nil, err
	}
	if t.Issuer, err = text(t.claims, "iss"); err != nil {
		return nil, nil, nil, fmt.Errorf("%w: iss is not a string", ErrMalformed)
	}
	return t, signature, t.readClaims(), nil
}

var strictBase64 = base64.RawURLEncoding.Strict()

// decodeSegment is stricter than encoding/base64 in strict mode, which skips
// line ends: one token must not have two spellings.
func decodeSegment(s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") {
		return nil, fmt.Errorf("%w: a segment is not base64url", ErrMalformed)
	}
	b, err := strictBase64.DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("%w: a segment is not base64url", ErrMalformed)
	}
	return b, nil
}

// readHeader reads what decides on the key. jku, jwk, x5u and x5c are not
// looked at: a token does not bring its own keys.
func (t *Token) readHeader(b []byte) error {
	header, err := parseObject(b)
	if err != nil {
		return err
	}
	if _, ok := lookup(header, "crit"); ok {
		return fmt.Errorf("%w: it demands extensions (crit)", ErrMalformed)
	}
	if b64, ok := lookup(header, "b64"); ok && b64 != "true" {
		return fmt.Errorf("%w: its payload is not encoded (b64)", ErrMalformed)
	}
	for _, f := range [...]textField{{"alg", &t.Alg}, {"kid", &t.KeyID}, {"typ", &t.Type}} {
		if *f.to, err = text(header, f.name); err != nil {
			return fmt.Errorf("%w: %s is not a string", ErrMalformed, f.name)
		}
	}
	if t.Alg == "" {
		return fmt.Errorf("%w: no alg", ErrMalformed)
	}
	if len(t.KeyID) > maxKeyIDBytes {
		return fmt.Errorf("%w: kid is longer than %d bytes", ErrMalformed, maxKeyIDBytes)
	}
	t.Type = mediaType(t.Type)
	return nil
}

// mediaType is a typ in the one form that is compared: RFC 7515 section 4.1.9.
func mediaType(typ string) string { return strings.TrimPrefix(strings.ToLower(typ), "application/") }

type textField struct {
	name string
	to   *string
}

type timeField struct {
	name string
	to   *int64
}

func (t *Token) readClaims() (err error) {
	var azp, clientID, consumerKey string
	for _, f := range [...]textField{
		{"jti", &t.ID}, {"sub", &t.Subject}, {"sid", &t.Session},
		{"azp", &azp}, {"client_id", &clientID}, {"consumerKey", &consumerKey},
	} {
		if *f.to, err = text(t.claims, f.name); err != nil {
			return fmt.Errorf("%w: %s is not a string", ErrClaims, f.name)
		}
	}
	t.ClientID = cmp.Or(azp, clientID, consumerKey)
	for _, f := range [...]timeField{{"exp", &t.Expiry}, {"iat", &t.IssuedAt}, {"nbf", &t.NotBefore}} {
		raw, ok := lookup(t.claims, f.name)
		if !ok {
			continue
		}
		if *f.to, ok = numericDate(raw); !ok {
			return fmt.Errorf("%w: %s is not a time in seconds", ErrClaims, f.name)
		}
	}
	t.HasExpiry = t.Has("exp")
	if t.Audience, err = texts(t.claims, "aud"); err != nil {
		return fmt.Errorf("%w: aud is neither a string nor several", ErrClaims)
	}
	aud, _ := lookup(t.claims, "aud")
	t.AudienceList = strings.HasPrefix(aud, "[")
	scopes, err := texts(t.claims, "scope")
	if err != nil {
		return fmt.Errorf("%w: scope is neither a string nor several", ErrClaims)
	}
	t.Scope = strings.Join(scopes, " ")
	return nil
}

// numericDate reads a NumericDate of RFC 7519 section 2: a JSON number from 0 to
// 2^53, cut off to whole seconds.
func numericDate(raw string) (int64, bool) {
	if n, err := strconv.ParseUint(raw, 10, 64); err == nil {
		return int64(n), n <= maxNumeric
	}
	if c := raw[0]; c < '0' || c > '9' { // a sign, a string, true, …
		return 0, false
	}
	f, err := strconv.ParseFloat(raw, 64)
	if err != nil || f > maxNumeric {
		return 0, false
	}
	return int64(f), true
}
