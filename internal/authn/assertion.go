package authn

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/token"
)

// AssertionAlgorithms are the signature algorithms of client assertions, for the metadata
// of RFC 8414. It is not to be changed.
var AssertionAlgorithms = token.DefaultAlgorithms

// assertionType is the client_assertion_type of RFC 7523 section 2.2.
const assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

const (
	maxAssertionBytes = 16 << 10
	maxJTIBytes       = 255
	// maxAssertionLife is how far ahead exp may be: until then its use is remembered.
	maxAssertionLife = 300 * time.Second
	// assertionLeeway is how far a client's clock may be off.
	assertionLeeway = 30 * time.Second
)

// assertionTypes are the typ values of client assertions, as in [token.Token]. Others
// mark what was made for another purpose, such as an access token.
var assertionTypes = []string{"", "jwt", "client-authentication+jwt"}

// assertedClient reads which client an assertion is of, to know whose keys to verify it
// with. Nothing else may be concluded from it: the verifier reads it again, more strictly.
func assertedClient(jwt string) (id string, ok bool) {
	if len(jwt) > maxAssertionBytes {
		return "", false
	}
	_, rest, _ := strings.Cut(jwt, ".")
	payload, _, _ := strings.Cut(rest, ".")
	b, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return "", false
	}
	var claims map[string]json.RawMessage // not a struct, whose members match in any case
	if err := json.Unmarshal(b, &claims); err != nil {
		return "", false
	}
	err = json.Unmarshal(claims["iss"], &id)
	return id, err == nil && id != "" && isText(id)
}

// newAssertionVerifier returns what verifies the signatures of a client with these keys: to it
// the client is an issuer, of assertions about itself.
func newAssertionVerifier(clientID, jwks string) (*token.Verifier, error) {
	keys, err := token.ParseKeySet([]byte(jwks))
	if err != nil {
		return nil, err
	}
	return token.NewVerifier(token.Issuer{Iss: clientID, Keys: keys, Algorithms: AssertionAlgorithms})
}

// once is a proof that is right one time.
type once struct {
	clientID string
	jti      [sha256.Size]byte
	until    int64 // in Unix seconds: from then on it is not right anyway
}

// verifyAssertion checks all of RFC 7523 section 3 but whether the assertion was used
// before. What is well-formed and of an allowed algorithm costs one verification of its
// signature, be there such a client, have it such a key, or not.
//
// One of another length than its key makes is refused at once, by the client's key and by the
// decoy alike, which are of one size for all algorithms but RSA. There the decoy has 2048 bits,
// as most keys have. Of a larger one, who measures the time can find out the size, and so that
// there is such a client: ids are no secrets.
func (a *Authenticator) verifyAssertion(row *clientRow, cred credentials) (*once, *OAuthError) {
	ctx := context.Background() // the keys are in memory
	err := errors.New("the client is not registered with keys")
	var t *token.Token
	if row.keys != nil { // only with private_key_jwt
		t, err = row.keys.Verify(ctx, cred.secret)
	}
	if err != nil {
		if !errors.Is(err, token.ErrSignature) && !errors.Is(err, token.ErrClaims) {
			if v, err := token.NewVerifier(token.Issuer{Iss: cred.id, Keys: a.decoy, Algorithms: AssertionAlgorithms}); err == nil {
				_, _ = v.Verify(ctx, cred.secret)
			}
		}
		return nil, because(err.Error())
	}
	const leeway = int64(assertionLeeway / time.Second)
	now := time.Now().Unix()
	wrong := ""
	switch {
	case !slices.Contains(assertionTypes, t.Type):
		wrong = "its typ is of something else"
	case t.Subject != cred.id:
		wrong = "its sub is not its iss"
	case t.AudienceList:
		wrong = "its aud is an array"
	case len(t.Audience) != 1 || !a.isAssertionAudience(t.Audience[0], row.client.Issuer):
		wrong = "its aud is not the issuer"
	case !t.HasExpiry:
		wrong = "it has no exp"
	case now >= t.Expiry+leeway:
		wrong = "it has expired"
	case t.Expiry > now+int64(maxAssertionLife/time.Second)+leeway:
		wrong = "its exp is too far ahead"
	case t.IssuedAt > now+leeway:
		wrong = "its iat is ahead"
	case t.NotBefore > now+leeway:
		wrong = "its nbf is ahead"
	case t.ID == "" || len(t.ID) > maxJTIBytes:
		wrong = fmt.Sprintf("its jti is not 1 to %d bytes", maxJTIBytes)
	}
	if wrong != "" {
		return nil, because("the assertion is not acceptable: " + wrong)
	}
	return &once{cred.id, sha256.Sum256([]byte(t.ID)), t.Expiry + leeway}, nil
}

// because is errClient with a cause for the log.
func because(why string) *OAuthError {
	e := *errClient
	e.Cause = errors.New(why)
	return &e
}

// isAssertionAudience reports whether aud is us, as a client of iss may name us.
func (a *Authenticator) isAssertionAudience(aud, iss string) bool {
	if a.cfg.Issuer == "" {
		return false
	}
	// Only our own issuers are below ours; the client of another one knows us by the first.
	ours := func(aud string) bool {
		return aud == a.cfg.Issuer || aud == iss && strings.HasPrefix(iss, a.cfg.Issuer+"/t/")
	}
	endpointOf, ok := strings.CutSuffix(aud, "/oauth2/token")
	return ours(aud) || ok && a.cfg.LegacyAssertionAudience && ours(endpointOf)
}

// use is a wait for an assertion to be used up.
type use struct {
	once
	done  chan struct{}
	fresh bool // no other use was before
	err   error
}

// uses collects assertions while others are being used up. However many there are, they take
// one connection, and commits by the batch.
type uses struct {
	mu      sync.Mutex
	waiting []*use
	running bool // somebody takes what waits
}

// join adds u to those that wait. If nobody takes them, it is for the caller to see to that.
func (q *uses) join(u *use) (alone bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = append(q.waiting, u)
	alone = !q.running
	q.running = true
	return alone
}

// take returns all that wait. With none, its caller is to stop taking.
func (q *uses) take() []*use {
	q.mu.Lock()
	defer q.mu.Unlock()
	batch := q.waiting
	q.waiting = nil
	q.running = len(batch) > 0
	return batch
}

// leave keeps u from being taken, unless it was.
func (q *uses) leave(u *use) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.waiting, u); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	}
}

// useUpAssertion is true for one call with o in all processes. After an error, o may have been
// used up or not.
func (a *Authenticator) useUpAssertion(ctx context.Context, o *once) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.LookupTimeout)
	defer cancel()
	u := &use{once: *o, done: make(chan struct{})}
	if a.uses.join(u) {
		go a.useUpWaiting() // for all who wait, so nobody's ctx ends it
	}
	select {
	case <-u.done:
		return u.fresh, u.err
	case <-ctx.Done():
		a.uses.leave(u)
		return false, fmt.Errorf("use up client assertion: %w", context.Cause(ctx))
	}
}

func (a *Authenticator) useUpWaiting() {
	for batch := a.uses.take(); len(batch) > 0; batch = a.uses.take() {
		fresh, err := a.useUpAll(batch)
		for _, u := range batch {
			u.fresh, u.err = fresh[u.once], err
			delete(fresh, u.once) // of two that are the same, one counts
			close(u.done)
		}
	}
}

// Assertions that have expired by the database's clock are refused, since those are what it
// forgets: rescind.trim_issued_tokens. They are in order, so that two processes with the same
// ones cannot deadlock.
const useUpSQL = `
INSERT INTO rescind.client_assertions (client_id, jti, expires_at)
SELECT client_id, jti, to_timestamp(until)
FROM unnest($1::text[], $2::bytea[], $3::bigint[]) AS used (client_id, jti, until)
WHERE to_timestamp(until) > clock_timestamp()
ORDER BY jti, client_id
ON CONFLICT DO NOTHING
RETURNING client_id, jti, extract(epoch FROM expires_at)::bigint`

// useUpAll returns those of a batch that were not used before.
func (a *Authenticator) useUpAll(batch []*use) (fresh map[once]bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), a.cfg.LookupTimeout)
	defer cancel()
	ids, jtis, untils := make([]string, len(batch)), make([][]byte, len(batch)), make([]int64, len(batch))
	for i, u := range batch {
		ids[i], jtis[i], untils[i] = u.clientID, u.jti[:], u.until
	}
	fresh = make(map[once]bool, len(batch))
	rows, err := a.pool.Query(ctx, useUpSQL, ids, jtis, untils)
	if err == nil {
		var o once
		var jti []byte
		_, err = pgx.ForEachRow(rows, []any{&o.clientID, &jti, &o.until}, func() error {
			o.jti = [sha256.Size]byte(jti)
			fresh[o] = true
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("use up client assertions: %w", err)
	}
	return fresh, nil
}

// anyKey is a key set that does not mind which of its keys is asked for.
type anyKey struct{ *token.StaticKeySet }

// Key implements [token.KeySet].
func (k anyKey) Key(ctx context.Context, _, alg string) (token.Key, error) {
	return k.StaticKeySet.Key(ctx, "", alg)
}

// decoyKeys has a key for each of AssertionAlgorithms, of which nobody has the private
// half: the RSA modulus is a random number.
var decoyKeys = sync.OnceValue(func() *token.StaticKeySet {
	modulus := make([]byte, 256)
	rand.Read(modulus) // never fails
	modulus[0] |= 0x80
	modulus[255] |= 1
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // not with this curve
	}
	point, err := private.PublicKey.Bytes()
	if err != nil {
		panic(err)
	}
	ed, _, err := ed25519.GenerateKey(nil)
	if err != nil {
		panic(err)
	}
	text := base64.RawURLEncoding.EncodeToString
	keys, err := token.ParseKeySet(fmt.Appendf(nil, `{"keys":[{"kty":"RSA","e":"AQAB","n":%q},{"kty":"EC","crv":"P-256","x":%q,"y":%q},{"kty":"OKP","crv":"Ed25519","x":%q}]}`,
		text(modulus), text(point[1:33]), text(point[33:]), text(ed)))
	if err != nil {
		panic(err)
	}
	return keys
})
