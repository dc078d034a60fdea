package sts

import (
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
)

const (
	// keySetMaxAge is how long others may keep our key set, by its Cache-Control.
	keySetMaxAge = 5 * time.Minute
	// publishedBefore is how long a further key is published before it is used.
	publishedBefore = 2 * keySetMaxAge
	// publishedAfter is how long a key is published after it was retired: until nobody accepts
	// what was signed last. That is by a process that read the keys just before, and for a token
	// that is stamped as far ahead as can be, with the longest life. Clocks may differ by a minute.
	publishedAfter = maxRingAge + maxAhead*time.Second + MaxTokenLifetime + revocation.MaxLeeway + time.Minute

	sealPurpose = "rescind signing keys"
)

// keyStore keeps the signing keys of all our issuers in the database, private keys
// sealed with AES-256-GCM under a key derived from the master key.
type keyStore struct {
	pool       *pgxpool.Pool
	masterKeys []authn.MasterKey // the first seals, all open
}

// ring is what the database had of an issuer at one time. It is not changed after it was made.
type ring struct {
	iss       string
	at        time.Time           // when it was read, by this process's clock
	keys      *token.StaticKeySet // nil if there are none
	documents []document          // the JWK set, for each media type
	signers   []signer            // in use now, the newest first
	sealed    []error             // keys in use now that no master key opens, and what to do
}

// signer signs with one key.
type signer struct {
	kid, alg string
	byTyp    map[string]jose.Signer
}

// signer is the newest one of the algorithm, or else of another: a new algorithm
// is not used before others know its key. Those of revoked keys are passed over.
func (r *ring) signer(alg string, revoked func(kid string) bool) (signer, error) {
	var other signer
	errs := []error{errors.New("no signing key can be used now")}
	for _, s := range r.signers {
		switch {
		case revoked(s.kid):
			errs = append(errs, fmt.Errorf("signing key %s is revoked: run rescind keys rotate --iss %s", s.kid, r.iss))
		case s.alg == alg:
			return s, nil
		case other.kid == "":
			other = s
		}
	}
	if other.kid == "" {
		return signer{}, errors.Join(append(errs, r.sealed...)...)
	}
	return other, nil
}

// keyRow is a row of signing_keys.
type keyRow struct {
	KID, Alg, Public     string
	Sealed               []byte
	MasterKeyID          string
	CreatedAt, UseFrom   time.Time
	RetiredAt, RevokedAt *time.Time
	Iss                  string
	TenantID             int32
	Domain               string
	Now                  time.Time // the database's clock when it was read
}

// state is what the key is for now.
func (row keyRow) state() KeyState {
	switch {
	case row.RevokedAt != nil:
		return KeyRevoked
	case row.RetiredAt != nil && !row.RetiredAt.After(row.Now):
		if row.RetiredAt.Add(publishedAfter).After(row.Now) {
			return KeyRetired
		}
		return KeyEnded
	case row.UseFrom.After(row.Now):
		return KeyNext
	}
	return KeyActive
}

// revocationOfKeySQL is r, the revocation of the key s of k: whoever ends a key's tokens, by
// whatever way, withdraws it.
const revocationOfKeySQL = `r.iss = k.iss AND r.ident = s.kid AND r.kind = 'key' AND NOT r.digest
    AND r.exp > extract(epoch FROM clock_timestamp())`

const keysSQL = `
SELECT s.kid, s.alg, s.public_jwk::text, s.private_sealed, s.master_key_id, s.created_at, s.use_from, s.retired_at,
       least(s.revoked_at, r.revoked_at), k.iss, t.id, t.domain, clock_timestamp()
FROM rescind.signing_keys s
JOIN rescind.key_managers k ON k.id = s.key_manager_id AND k.resident
JOIN rescind.tenants t ON t.id = k.tenant_id
LEFT JOIN rescind.revocations r ON ` + revocationOfKeySQL + ` `

// publishedSQL are an issuer's keys that others see, the newest first.
const publishedSQL = keysSQL + `
WHERE k.iss = $1 AND s.revoked_at IS NULL AND r.id IS NULL AND (s.retired_at IS NULL OR s.retired_at > now() - make_interval(secs => $2))
ORDER BY s.use_from DESC, s.kid`

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func readKeys(ctx context.Context, db querier, sql string, args ...any) ([]keyRow, error) {
	rows, err := db.Query(ctx, sql, args...)
	if err != nil {
		return nil, fmt.Errorf("read signing keys: %w", err)
	}
	keys, err := pgx.CollectRows(rows, pgx.RowToStructByPos[keyRow])
	if err != nil {
		return nil, fmt.Errorf("read signing keys: %w", err)
	}
	return keys, nil
}

// published reads the keys of iss that others see, and their JWK set in the same order.
func (s *keyStore) published(ctx context.Context, iss string) (rows []keyRow, set jose.JSONWebKeySet, err error) {
	rows, err = readKeys(ctx, s.pool, publishedSQL, iss, publishedAfter.Seconds())
	if err != nil {
		return nil, set, err
	}
	for _, row := range rows {
		public, err := row.public()
		if err != nil {
			return nil, set, fmt.Errorf("read signing key %s: %w", row.KID, err)
		}
		set.Keys = append(set.Keys, public)
	}
	return rows, set, nil
}

// load reads the keys of iss. Opening one costs milliseconds, so those that
// are open in last stay so.
func (s *keyStore) load(ctx context.Context, iss string, last *ring) (*ring, error) {
	r := &ring{iss: iss, at: time.Now()}
	rows, set, err := s.published(ctx, iss)
	if err != nil || len(rows) == 0 {
		return r, err
	}
	for i, row := range rows {
		if row.state() != KeyActive {
			continue
		}
		signer, err := s.signerOf(row, set.Keys[i], last)
		if err != nil {
			r.sealed = append(r.sealed, err)
			continue
		}
		r.signers = append(r.signers, signer)
	}
	body, err := json.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("encode key set: %w", err)
	}
	for _, mediaType := range []string{jsonType, jwkSetType} {
		r.documents = append(r.documents, newDocument(mediaType, body))
	}
	r.keys, err = token.ParseKeySet(body)
	return r, err
}

// public is the key as others see it: whatever the row has, no private member.
func (row keyRow) public() (jose.JSONWebKey, error) {
	var key jose.JSONWebKey
	if err := json.Unmarshal([]byte(row.Public), &key); err != nil {
		return key, err
	}
	kid, err := thumbprint(key)
	if err != nil {
		return key, err
	}
	if !key.IsPublic() || kid != row.KID {
		return key, errors.New("public_jwk is not the public key that its kid names")
	}
	return publicKey(key.Key, row.KID, row.Alg), nil
}

func publicKey(key any, kid, alg string) jose.JSONWebKey {
	return jose.JSONWebKey{Key: key, KeyID: kid, Algorithm: alg, Use: "sig"}
}

// thumbprint is the kid of a key: RFC 7638 with SHA-256.
func thumbprint(key jose.JSONWebKey) (string, error) {
	sum, err := key.Thumbprint(crypto.SHA256)
	return base64.RawURLEncoding.EncodeToString(sum), err
}

func (s *keyStore) signerOf(row keyRow, public jose.JSONWebKey, last *ring) (signer, error) {
	if last != nil {
		for _, open := range last.signers {
			if open.kid == row.KID {
				return open, nil
			}
		}
	}
	private, err := s.open(row)
	if err != nil {
		return signer{}, err
	}
	if same, ok := private.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !same.Equal(public.Key) {
		return signer{}, fmt.Errorf("signing key %s of %s: its private key is another's: restore the table from a backup", row.KID, row.Iss)
	}
	made := signer{row.KID, row.Alg, make(map[string]jose.Signer)}
	key := jose.SigningKey{Algorithm: jose.SignatureAlgorithm(row.Alg), Key: jose.JSONWebKey{Key: private, KeyID: row.KID}}
	for _, typ := range []string{typAccessToken, typJWT} {
		made.byTyp[typ], err = jose.NewSigner(key, (&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
		if err != nil {
			return signer{}, fmt.Errorf("signing key %s of %s: %w", row.KID, row.Iss, err)
		}
	}
	return made, nil
}

// open unseals a private key. Its error says what to do.
func (s *keyStore) open(row keyRow) (crypto.Signer, error) {
	const rotate = "if it is lost, run rescind keys rotate --iss %s: a new key signs at once, and the tokens of this one stay valid until they end"
	for _, master := range s.masterKeys {
		if master.ID() != row.MasterKeyID {
			continue
		}
		der, err := sealer(master).Open(nil, nil, row.Sealed, bound(row.Iss, row.KID))
		if err != nil {
			return nil, fmt.Errorf("signing key %s of %s: what the database has of it is damaged: restore it from a backup; "+
				rotate, row.KID, row.Iss, row.Iss)
		}
		key, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			return nil, fmt.Errorf("signing key %s of %s: %w", row.KID, row.Iss, err)
		}
		private, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("signing key %s of %s: a %T cannot sign", row.KID, row.Iss, key)
		}
		return private, nil
	}
	return nil, fmt.Errorf("signing key %s of %s: it is sealed under master key %s, and the one given is %s: "+
		"start with that master key (RESCIND_MASTER_KEY); "+rotate, row.KID, row.Iss, row.MasterKeyID, s.masterKeys[0].ID(), row.Iss)
}

// bound is what a sealed key belongs to: moved to another row, it does not open.
func bound(iss, kid string) []byte { return []byte(iss + "\x00" + kid) }

func sealer(master authn.MasterKey) cipher.AEAD {
	block, err := aes.NewCipher(master.Derive(sealPurpose, 32))
	if err != nil {
		panic(err) // the length is right
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err) // AES has the block size of GCM
	}
	return aead
}

// needsKey reports whether an issuer needs one of alg, if the keys that others see are these,
// and whether at once, because none of them is in use.
func needsKey(keys []keyRow, alg string) (needed, atOnce bool) {
	needed, atOnce = true, true
	for _, row := range keys {
		if row.Alg == alg && row.RetiredAt == nil { // one that is to be retired has its successor
			needed = false
		}
		if row.state() == KeyActive {
			atOnce = false
		}
	}
	return needed || atOnce, atOnce
}

// hasKey reports whether iss needs no key of alg.
func (s *keyStore) hasKey(ctx context.Context, iss, alg string) (bool, error) {
	keys, err := readKeys(ctx, s.pool, publishedSQL, iss, publishedAfter.Seconds())
	if err != nil {
		return false, err
	}
	needed, _ := needsKey(keys, alg)
	return !needed, nil
}

// owner is the issuer that keys belong to.
type owner struct {
	keyManagerID int32
	tenant       revocation.Tenant
	// now is the database's clock once the issuer was locked: no change of its keys is later.
	now time.Time
	// withdrawn are the kids of those of its keys that were found to be revoked.
	withdrawn []string
}

// lockIssuerSQL lets one process at a time decide about an issuer's keys.
const lockIssuerSQL = `
SELECT k.id, t.id, t.domain
FROM rescind.key_managers k JOIN rescind.tenants t ON t.id = k.tenant_id
WHERE k.iss = $1 AND k.resident FOR UPDATE OF k`

// withdrawRevokedSQL keeps what a revocation has done for longer than the revocation is there.
const withdrawRevokedSQL = `
UPDATE rescind.signing_keys s SET revoked_at = r.revoked_at, retired_at = least(s.retired_at, r.revoked_at)
FROM rescind.key_managers k, rescind.revocations r
WHERE k.id = s.key_manager_id AND k.id = $1 AND s.revoked_at IS NULL AND ` + revocationOfKeySQL + `
RETURNING s.kid`

// lockIssuer also withdraws the keys of iss that were revoked by themselves. Their revocations
// are in the audit.
func lockIssuer(ctx context.Context, tx pgx.Tx, iss string) (o owner, err error) {
	err = tx.QueryRow(ctx, lockIssuerSQL, iss).Scan(&o.keyManagerID, &o.tenant.ID, &o.tenant.Domain)
	if errors.Is(err, pgx.ErrNoRows) {
		return o, ErrNoIssuer
	}
	if err == nil {
		err = tx.QueryRow(ctx, `SELECT clock_timestamp()`).Scan(&o.now)
	}
	if err != nil {
		return o, fmt.Errorf("lock issuer: %w", err)
	}
	if o.withdrawn, err = queryKIDs(ctx, tx, withdrawRevokedSQL, o.keyManagerID); err != nil {
		return o, fmt.Errorf("withdraw revoked signing keys: %w", err)
	}
	return o, nil
}

// queryKIDs are the kids that a statement returns.
func queryKIDs(ctx context.Context, tx pgx.Tx, sql string, args ...any) ([]string, error) {
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

const insertKeySQL = `
INSERT INTO rescind.signing_keys (kid, key_manager_id, alg, public_jwk, private_sealed, master_key_id, created_at, use_from)
VALUES ($1, $2, $3, $4::text::jsonb, $5, $6, $7, $8)`

func insertKey(ctx context.Context, tx pgx.Tx, o owner, row keyRow, useFrom time.Time) error {
	_, err := tx.Exec(ctx, insertKeySQL, row.KID, o.keyManagerID, row.Alg, row.Public, row.Sealed, row.MasterKeyID, o.now, useFrom)
	if err != nil {
		return fmt.Errorf("store signing key: %w", err)
	}
	return nil
}

// ensureKey makes a key of iss if it needs one of alg, and returns its kid if it did, and
// those of keys that it found to be revoked. The key is used at once if no other can be: it is
// the first, or all others are revoked. Else it is when others have had the time to learn of it.
func (s *keyStore) ensureKey(ctx context.Context, iss, alg string) (made string, revoked []string, err error) {
	if has, err := s.hasKey(ctx, iss, alg); err != nil || has {
		return "", nil, err
	}
	row, err := s.newKey(iss, alg) // takes long: not while others wait for the lock
	if err != nil {
		return "", nil, err
	}
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		o, err := lockIssuer(ctx, tx, iss)
		if err != nil {
			return err
		}
		keys, err := readKeys(ctx, tx, publishedSQL, iss, publishedAfter.Seconds())
		if err != nil {
			return err
		}
		revoked = o.withdrawn
		needed, atOnce := needsKey(keys, alg)
		if !needed {
			return nil
		}
		useFrom := o.now
		if !atOnce {
			useFrom = o.now.Add(publishedBefore)
		}
		made = row.KID
		return insertKey(ctx, tx, o, row, useFrom)
	})
	if err != nil {
		return "", nil, err
	}
	return made, revoked, nil
}

// newKey makes a key of iss that is not in the database yet.
func (s *keyStore) newKey(iss, alg string) (keyRow, error) {
	private, err := generate(alg)
	if err != nil {
		return keyRow{}, err
	}
	return s.seal(private, iss, alg)
}

func generate(alg string) (crypto.Signer, error) {
	if alg == "ES256" {
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	return rsa.GenerateKey(rand.Reader, 2048)
}

func (s *keyStore) seal(private crypto.Signer, iss, alg string) (keyRow, error) {
	kid, err := thumbprint(jose.JSONWebKey{Key: private.Public()})
	if err != nil {
		return keyRow{}, err
	}
	public, err := publicKey(private.Public(), kid, alg).MarshalJSON()
	if err != nil {
		return keyRow{}, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return keyRow{}, err
	}
	master := s.masterKeys[0]
	return keyRow{
		KID: kid, Alg: alg, Public: string(public), MasterKeyID: master.ID(), Iss: iss,
		Sealed: sealer(master).Seal(nil, nil, der, bound(iss, kid)),
	}, nil
}
