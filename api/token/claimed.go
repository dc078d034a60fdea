package token

import "fmt"

// Claimed is what a JWT says, without verifying anything: it may be anybody's word. It is for those who
// explain why a token is refused. Its error is [ErrMalformed], or [ErrClaims] with what could be read of
// the token all the same; it repeats no part of the token.
func Claimed(compact string) (*Token, error) {
	t, _, claimsErr, err := parse(compact)
	if err != nil {
		return nil, err
	}
	return t, claimsErr
}

// OfClaims is a token with these claims, a JSON object of at most 16 KiB, that nobody has signed: it is
// for those who explain what would become of one that is not at hand. It has the type of access
// tokens, and no algorithm, key and signature. Its error is as that of [Claimed].
func OfClaims(claims []byte) (*Token, error) {
	if len(claims) > maxTokenBytes {
		return nil, fmt.Errorf("%w: more than %d bytes", ErrMalformed, maxTokenBytes)
	}
	t := &Token{Type: accessTokenType}
	var err error
	if t.claims, err = parseObject(claims); err != nil {
		return nil, err
	}
	if t.Issuer, err = text(t.claims, "iss"); err != nil {
		return nil, fmt.Errorf("%w: iss is not a string", ErrMalformed)
	}
	return t, t.readClaims()
}
