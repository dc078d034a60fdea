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
	// publishedAfter is how long a key is published after it was retired: until
	// nobody accepts what was signed last, by a process that learned of it late.
	publishedAfter = MaxTokenLifetime + revocation.MaxLeeway + time.Minute

	sealPurpose = "rescind signing keys"
)

// keyStore keeps the signing keys of one issuer in the database, private keys
// sealed with AES-256-GCM under a key derived from the master key.
type keyStore struct {
	pool         *pgxpool.Pool
	iss          string
	keyManagerID int32
	masterKeys   []authn.MasterKey // the first seals, all open
}

// ring is what the database had at one time. It is not changed after it was made.
type ring struct {
	keys      *token.StaticKeySet
	documents []document // the JWK set, for each media type
	signers   []signer   // in use now, the newest first
	sealed    []error    // keys in use now that no master key opens, and what to do
}

type signer struct {
	kid, alg string
	jose.Signer
}

// signer is the newest one of the algorithm, or else of another: a new algorithm
// is not used before others know its key.
func (r *ring) signer(alg string) (signer, error) {
	for _, s := range r.signers {
		if s.alg == alg {
			return s, nil
		}
	}
	if len(r.signers) == 0 {
		return signer{}, errors.Join(append([]error{errors.New("no signing key can be used now")}, r.sealed...)...)
	}
	return r.signers[0], nil
}

const signingKeysSQL = `
SELECT kid, alg, public_jwk::text, private_sealed, master_key_id, retired_at IS NULL AND use_from <= now()
FROM rescind.signing_keys
WHERE key_manager_id = $1 AND (retired_at IS NULL OR retired_at > now() - make_interval(secs => $2))
ORDER BY use_from DESC, kid`

type keyRow struct {
	KID, Alg, Public string
	Sealed           []byte
	MasterKeyID      string
	InUse            bool
}

// load reads the issuer's keys. Opening one costs milliseconds, so those that
// are open in last stay so.
func (s *keyStore) load(ctx context.Context, last *ring) (*ring, error) {
	rows, err := s.pool.Query(ctx, signingKeysSQL, s.keyManagerID, publishedAfter.Seconds())
	if err != nil {
		return nil, fmt.Errorf("read signing keys: %w", err)
	}
	keys, err := pgx.CollectRows(rows, pgx.RowToStructByPos[keyRow])
	if err != nil {
		return nil, fmt.Errorf("read signing keys: %w", err)
	}
	r := &ring{}
	var set jose.JSONWebKeySet
	for _, row := range keys {
		public, err := row.public()
		if err != nil {
			return nil, fmt.Errorf("read signing key %s: %w", row.KID, err)
		}
		set.Keys = append(set.Keys, public)
		if !row.InUse {
			continue
		}
		signer, err := s.signerOf(row, public, last)
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
		return signer{}, fmt.Errorf("signing key %s of %s: its private key is another's: restore the table from a backup", row.KID, s.iss)
	}
	opts := (&jose.SignerOptions{}).WithType("at+jwt")
	sign, err := jose.NewSigner(jose.SigningKey{
		Algorithm: jose.SignatureAlgorithm(row.Alg),
		Key:       jose.JSONWebKey{Key: private, KeyID: row.KID},
	}, opts)
	if err != nil {
		return signer{}, fmt.Errorf("signing key %s of %s: %w", row.KID, s.iss, err)
	}
	return signer{row.KID, row.Alg, sign}, nil
}

// open unseals a private key. Its error says what to do.
func (s *keyStore) open(row keyRow) (crypto.Signer, error) {
	const retire = "if it is lost, retire the key with UPDATE rescind.signing_keys SET retired_at = now() WHERE kid = '%s': " +
		"its tokens stay valid until they end, and the next start makes a new key"
	for _, master := range s.masterKeys {
		if master.ID() != row.MasterKeyID {
			continue
		}
		der, err := sealer(master).Open(nil, nil, row.Sealed, s.bound(row.KID))
		if err != nil {
			return nil, fmt.Errorf("signing key %s of %s: what the database has of it is damaged: restore it from a backup; "+
				retire, row.KID, s.iss, row.KID)
		}
		key, err := x509.ParsePKCS8PrivateKey(der)
		if err != nil {
			return nil, fmt.Errorf("signing key %s of %s: %w", row.KID, s.iss, err)
		}
		private, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("signing key %s of %s: a %T cannot sign", row.KID, s.iss, key)
		}
		return private, nil
	}
	return nil, fmt.Errorf("signing key %s of %s: it is sealed under master key %s, and the one given is %s: "+
		"start with that master key (RESCIND_MASTER_KEY); "+retire, row.KID, s.iss, row.MasterKeyID, s.masterKeys[0].ID(), row.KID)
}

// bound is what a sealed key belongs to: moved to another row, it does not open.
func (s *keyStore) bound(kid string) []byte { return []byte(s.iss + "\x00" + kid) }

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

const hasKeySQL = `
SELECT EXISTS (SELECT FROM rescind.signing_keys WHERE key_manager_id = $1 AND alg = $2 AND retired_at IS NULL)`

// lockIssuerSQL lets one process at a time decide whether a key is missing.
const lockIssuerSQL = `SELECT FROM rescind.key_managers WHERE id = $1 FOR UPDATE`

const insertKeySQL = `
INSERT INTO rescind.signing_keys (kid, key_manager_id, alg, public_jwk, private_sealed, master_key_id, use_from)
SELECT $2::text, $1::integer, $3::text, $4::text::jsonb, $5::bytea, $6::text, CASE
    WHEN EXISTS (SELECT FROM rescind.signing_keys WHERE key_manager_id = $1 AND retired_at IS NULL)
    THEN now() + make_interval(secs => $7::double precision)
    ELSE now() END
WHERE NOT EXISTS (SELECT FROM rescind.signing_keys WHERE key_manager_id = $1 AND alg = $3 AND retired_at IS NULL)`

// ensureKey makes a key for alg unless the issuer has one, and returns its kid if
// it did. The first key of an issuer is used at once, a further one when others
// have had the time to learn of it.
func (s *keyStore) ensureKey(ctx context.Context, alg string) (made string, err error) {
	var has bool
	if err := s.pool.QueryRow(ctx, hasKeySQL, s.keyManagerID, alg).Scan(&has); err != nil || has {
		return "", err
	}
	private, err := generate(alg) // takes long: not while others wait for the lock
	if err != nil {
		return "", err
	}
	row, err := s.seal(private, alg)
	if err != nil {
		return "", err
	}
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, lockIssuerSQL, s.keyManagerID); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, insertKeySQL, s.keyManagerID, row.KID, row.Alg, row.Public, row.Sealed, row.MasterKeyID,
			publishedBefore.Seconds())
		if tag.RowsAffected() > 0 {
			made = row.KID
		}
		return err
	})
	return made, err
}

func generate(alg string) (crypto.Signer, error) {
	if alg == "ES256" {
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	return rsa.GenerateKey(rand.Reader, 2048)
}

func (s *keyStore) seal(private crypto.Signer, alg string) (keyRow, error) {
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
		KID: kid, Alg: alg, Public: string(public), MasterKeyID: master.ID(),
		Sealed: sealer(master).Seal(nil, nil, der, s.bound(kid)),
	}, nil
}
