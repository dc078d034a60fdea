package sts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// KeyState says what a signing key is for at a time.
type KeyState string

// The states of a signing key, in their order.
const (
	KeyNext    KeyState = "next"    // published, not used yet
	KeyActive  KeyState = "active"  // may sign: of several, the newest of the service's algorithm does
	KeyRetired KeyState = "retired" // signs no more, published until its last token has ended
	KeyEnded   KeyState = "ended"   // retired, and no longer published
	KeyRevoked KeyState = "revoked" // withdrawn: its tokens are dead
)

// KeyInfo is a signing key of an issuer of our own, without its secret.
type KeyInfo struct {
	KID, Algorithm string
	Iss            string
	Tenant         revocation.Tenant
	State          KeyState
	CreatedAt      time.Time
	// UseFrom is when it begins to sign.
	UseFrom time.Time
	// RetiredAt is when it stops; zero if it is not known.
	RetiredAt time.Time
	// PublishedUntil is when others need it no longer; zero while it is not retired.
	PublishedUntil time.Time
	// RevokedAt is when it was withdrawn or its tokens were revoked, which is the same; else zero.
	RevokedAt time.Time
}

// Errors of [Keys].
var (
	// ErrNoKey means that there is no such key, or none that can still be changed so.
	ErrNoKey = errors.New("there is no such signing key, or it is used no longer")
	// ErrNoIssuer means that the issuer is not one of our own.
	ErrNoIssuer = errors.New("it is no issuer of our own")
	// ErrLastKey means that an issuer would have no key left to sign with.
	ErrLastKey = errors.New("it is the only key that can sign now: rotate first")
	// ErrNextKey means that an issuer has a new key already, which is not used yet.
	ErrNextKey = errors.New("a new key is there already")
)

// Changer is [ledger.Ledger].
type Changer interface {
	Change(ctx context.Context, f func(ctx context.Context, tx *ledger.Tx) error) (revocation.Position, error)
}

// Keys manages the signing keys of our own issuers. Running services see a change within
// seconds. Its methods may be called from any goroutine.
type Keys struct {
	store  *keyStore
	ledger Changer
}

// NewKeys returns a Keys. The first of masterKeys seals new keys.
func NewKeys(pool *pgxpool.Pool, ledger Changer, masterKeys []authn.MasterKey) *Keys {
	if len(masterKeys) == 0 {
		panic("sts: no master key is given")
	}
	return &Keys{&keyStore{pool: pool, masterKeys: masterKeys}, ledger}
}

const listKeysSQL = keysSQL + `
WHERE $1 IN ('', k.iss)
ORDER BY k.iss, s.created_at DESC, s.kid`

// List returns the signing keys of all issuers, or of iss, by issuer and the newest first.
func (k *Keys) List(ctx context.Context, iss string) ([]KeyInfo, error) {
	rows, err := readKeys(ctx, k.store.pool, listKeysSQL, iss)
	if err != nil {
		return nil, err
	}
	keys := make([]KeyInfo, len(rows))
	for i, row := range rows {
		keys[i] = row.info()
	}
	return keys, nil
}

// info is the key as it is shown.
func (row keyRow) info() KeyInfo {
	k := KeyInfo{
		KID: row.KID, Algorithm: row.Alg, Iss: row.Iss, Tenant: revocation.Tenant{ID: row.TenantID, Domain: row.Domain},
		State: row.state(), CreatedAt: row.CreatedAt, UseFrom: row.UseFrom,
	}
	if row.RetiredAt != nil {
		k.RetiredAt, k.PublishedUntil = *row.RetiredAt, row.RetiredAt.Add(publishedAfter)
	}
	if row.RevokedAt != nil {
		k.RevokedAt = *row.RevokedAt
		if k.PublishedUntil.IsZero() || k.PublishedUntil.After(k.RevokedAt) {
			k.PublishedUntil = k.RevokedAt
		}
	}
	return k
}

// AllKeys is the [Rotation.Compromised] that means every key that has not ended.
const AllKeys = "all"

// Rotation asks for a new signing key of Iss.
type Rotation struct {
	Iss string
	// Algorithm is RS256 or ES256; empty is that of the key in use. A service that is told to
	// use the other one makes a key of that when it starts again.
	Algorithm string
	// Compromised withdraws the issuer's key of this kid, or with [AllKeys] all that have not
	// ended: they are published no longer, and a revocation of each ends its tokens. If none is
	// left that can sign now, the new key is used at once. Else no key is made: what others have
	// in their caches goes on, and so does a key that the withdrawn one was to replace.
	// Empty: the keys in use go on until others know the new one, and are published until their
	// last tokens have ended. If all of them are revoked, or none can be opened with the master
	// keys that there are, the new one is used at once all the same.
	Compromised string
	// Reason is for the audit and for the revocation.
	Reason string
}

// keyRevocation is how long after it was made the revocation of a key ends: practically never.
// A day less than there can be is for clocks that differ.
const keyRevocation = revocation.MaxExpiryAhead - 24*time.Hour

const withdrawKeysSQL = `
UPDATE rescind.signing_keys SET revoked_at = $2, retired_at = least(retired_at, $2) WHERE kid = ANY($1)`

// retireOthersSQL also lets go on until then what a key was to replace that was revoked since.
const retireOthersSQL = `
UPDATE rescind.signing_keys SET retired_at = $3
WHERE key_manager_id = $1 AND kid <> $2 AND revoked_at IS NULL AND (retired_at IS NULL OR retired_at > $4)
RETURNING kid`

// Rotate makes a new key, and retires or withdraws others, in one transaction with its audit
// records. It returns the keys that it made or changed, a new one first. Errors: [ErrNoIssuer],
// [ErrNoKey], also for a key that is withdrawn or revoked already, [ErrNextKey] while the last
// rotation's key is not used yet and none is compromised, those of the ledger.
//
// Services of the database's schema 2 sign with no key that has a time to be retired, be it in
// the future. While there still are some, a rotation that is not at once leaves these without
// any for the ten minutes until the new key is used: rotate when all have been replaced.
func (k *Keys) Rotate(ctx context.Context, by ledger.Actor, r Rotation) ([]KeyInfo, error) {
	made, err := k.make(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("rotate signing key of %s: %w", r.Iss, err)
	}
	var changed []KeyInfo
	_, err = k.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) (err error) {
		changed, err = k.rotate(ctx, tx, by, r, made)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("rotate signing key of %s: %w", r.Iss, err)
	}
	return changed, nil
}

// make makes the key that r wants. It takes long, so nothing is locked.
func (k *Keys) make(ctx context.Context, r Rotation) (keyRow, error) {
	keys, err := readKeys(ctx, k.store.pool, listKeysSQL, r.Iss)
	if err != nil {
		return keyRow{}, err
	}
	alg := r.Algorithm
	if i := slices.IndexFunc(keys, func(row keyRow) bool { return row.state() == KeyActive }); alg == "" && i >= 0 {
		alg = keys[i].Alg
	} else if alg == "" && len(keys) > 0 { // none is in use: the newest was
		alg = keys[0].Alg
	}
	alg = cmp.Or(alg, algorithms[0])
	if !slices.Contains(algorithms, alg) {
		return keyRow{}, fmt.Errorf("signing algorithm %q: must be one of %q", alg, algorithms)
	}
	return k.store.newKey(r.Iss, alg)
}

func (k *Keys) rotate(ctx context.Context, tx *ledger.Tx, by ledger.Actor, r Rotation, made keyRow) ([]KeyInfo, error) {
	o, err := lockIssuer(ctx, tx, r.Iss)
	if err != nil {
		return nil, err
	}
	keys, err := readKeys(ctx, tx, listKeysSQL, r.Iss)
	if err != nil {
		return nil, err
	}
	var withdrawn []string
	useFrom := o.now
	if r.Compromised != "" {
		if withdrawn, err = compromised(keys, r.Compromised); err != nil {
			return nil, err
		}
	} else if k.canSign(keys) {
		if i := slices.IndexFunc(keys, func(row keyRow) bool { return row.state() == KeyNext }); i >= 0 {
			return nil, fmt.Errorf("%w: %s, which signs from %s; to have another in its place, retire it first",
				ErrNextKey, keys[i].KID, keys[i].UseFrom.UTC().Format(time.RFC3339))
		}
		useFrom = o.now.Add(publishedBefore)
	}

	audit := func(action, kid string) {
		tx.Audit(ledger.AuditEntry{Tenant: o.tenant, Action: action, Iss: r.Iss, Subject: kid, Reason: r.Reason, Actor: by})
	}
	if _, err := tx.Exec(ctx, withdrawKeysSQL, withdrawn, o.now); err != nil {
		return nil, fmt.Errorf("withdraw signing keys: %w", err)
	}
	for _, kid := range withdrawn {
		audit(actionWithdraw, kid)
		tx.Revoke(ledger.Request{
			Target: revocation.Target{Kind: revocation.KindKey, Iss: r.Iss, ID: kid}, Tenant: o.tenant,
			Exp: o.now.Add(keyRevocation).Unix(), Reason: r.Reason, Action: actionRevoke, Actor: by,
		})
	}
	withdrawn = append(withdrawn, o.withdrawn...)
	if r.Compromised != "" && k.canSign(keys, withdrawn...) {
		kept, err := queryKIDs(ctx, tx, keepOthersSQL, o.keyManagerID, o.now)
		if err != nil {
			return nil, fmt.Errorf("keep signing keys: %w", err)
		}
		for _, kid := range kept {
			audit(actionKeep, kid)
		}
		return infos(ctx, tx, r.Iss, append(withdrawn, kept...))
	}
	if err := insertKey(ctx, tx, o, made, useFrom); err != nil {
		return nil, err
	}
	audit(actionMake, made.KID)
	retired, err := queryKIDs(ctx, tx, retireOthersSQL, o.keyManagerID, made.KID, useFrom, o.now)
	if err != nil {
		return nil, fmt.Errorf("retire signing keys: %w", err)
	}
	for _, kid := range retired {
		audit(actionRetire, kid)
	}
	return infos(ctx, tx, r.Iss, slices.Concat([]string{made.KID}, withdrawn, retired))
}

// The words of the audit.
const (
	actionMake     = "make_signing_key"
	actionRetire   = "retire_signing_key"
	actionKeep     = "keep_signing_key" // what was to be retired is not
	actionWithdraw = "withdraw_signing_key"
	actionRevoke   = "revoke_key"
)

// compromised are the kids of those of an issuer's keys that which names.
func compromised(keys []keyRow, which string) (kids []string, err error) {
	for _, row := range keys {
		if state := row.state(); state != KeyRevoked && (row.KID == which || which == AllKeys && state != KeyEnded) {
			kids = append(kids, row.KID)
		}
		if row.RevokedAt != nil && row.KID == which {
			return nil, fmt.Errorf("%w: it was withdrawn at %s", ErrNoKey, row.RevokedAt.UTC().Format(time.RFC3339))
		}
	}
	if len(kids) == 0 && which != AllKeys {
		return nil, ErrNoKey
	}
	return kids, nil
}

// canSign reports whether one of an issuer's keys, other than those of the kids but, can sign now.
func (k *Keys) canSign(keys []keyRow, but ...string) bool {
	return slices.ContainsFunc(keys, func(row keyRow) bool {
		if slices.Contains(but, row.KID) || row.state() != KeyActive {
			return false
		}
		_, err := k.store.open(row)
		return err == nil
	})
}

// infos returns the keys of iss with these kids, in that order.
func infos(ctx context.Context, tx pgx.Tx, iss string, kids []string) ([]KeyInfo, error) {
	rows, err := readKeys(ctx, tx, listKeysSQL, iss)
	if err != nil {
		return nil, err
	}
	list := make([]KeyInfo, len(kids))
	for _, row := range rows {
		if i := slices.Index(kids, row.KID); i >= 0 {
			list[i] = row.info()
		}
	}
	return list, nil
}

const issuerOfKeySQL = `
SELECT k.iss FROM rescind.signing_keys s JOIN rescind.key_managers k ON k.id = s.key_manager_id AND k.resident WHERE s.kid = $1`

const retireKeySQL = `UPDATE rescind.signing_keys SET retired_at = $2 WHERE kid = $1`

// keepOthersSQL takes a rotation back whose new key was retired or withdrawn before it was used:
// else no key would be left when the others are retired.
const keepOthersSQL = `
UPDATE rescind.signing_keys SET retired_at = NULL
WHERE key_manager_id = $1 AND revoked_at IS NULL AND retired_at > $2 AND NOT EXISTS (
    SELECT FROM rescind.signing_keys WHERE key_manager_id = $1 AND revoked_at IS NULL AND retired_at IS NULL)
RETURNING kid`

// Retire stops a key from signing, now. One that was to take over and is not used yet never
// is, and those that it was to replace go on. Errors: [ErrNoKey], also for a key that signs no
// more, [ErrLastKey], those of the ledger.
func (k *Keys) Retire(ctx context.Context, by ledger.Actor, kid, reason string) (KeyInfo, error) {
	var retired KeyInfo
	_, err := k.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) (err error) {
		retired, err = k.retire(ctx, tx, by, kid, reason)
		return err
	})
	if err != nil {
		return KeyInfo{}, fmt.Errorf("retire signing key: %w", err)
	}
	return retired, nil
}

func (k *Keys) retire(ctx context.Context, tx *ledger.Tx, by ledger.Actor, kid, reason string) (KeyInfo, error) {
	var iss string
	err := tx.QueryRow(ctx, issuerOfKeySQL, kid).Scan(&iss)
	if errors.Is(err, pgx.ErrNoRows) {
		return KeyInfo{}, ErrNoKey
	}
	if err != nil {
		return KeyInfo{}, fmt.Errorf("read its issuer: %w", err)
	}
	o, err := lockIssuer(ctx, tx, iss)
	if err != nil {
		return KeyInfo{}, err
	}
	keys, err := readKeys(ctx, tx, listKeysSQL, iss)
	if err != nil {
		return KeyInfo{}, err
	}
	i := slices.IndexFunc(keys, func(row keyRow) bool { return row.KID == kid })
	if i < 0 {
		return KeyInfo{}, ErrNoKey
	}
	switch info := keys[i].info(); info.State {
	case KeyRevoked:
		return KeyInfo{}, fmt.Errorf("%w: it was withdrawn at %s", ErrNoKey, info.RevokedAt.UTC().Format(time.RFC3339))
	case KeyRetired, KeyEnded:
		return KeyInfo{}, fmt.Errorf("%w: it was retired at %s", ErrNoKey, info.RetiredAt.UTC().Format(time.RFC3339))
	case KeyActive:
		if !k.canSign(keys, kid) {
			return KeyInfo{}, ErrLastKey
		}
	}
	if _, err := tx.Exec(ctx, retireKeySQL, kid, o.now); err != nil {
		return KeyInfo{}, fmt.Errorf("store when it was retired: %w", err)
	}
	kept, err := queryKIDs(ctx, tx, keepOthersSQL, o.keyManagerID, o.now)
	if err != nil {
		return KeyInfo{}, fmt.Errorf("keep others: %w", err)
	}
	audit := func(action, kid string) {
		tx.Audit(ledger.AuditEntry{Tenant: o.tenant, Action: action, Iss: iss, Subject: kid, Reason: reason, Actor: by})
	}
	audit(actionRetire, kid)
	for _, other := range kept {
		audit(actionKeep, other)
	}
	list, err := infos(ctx, tx, iss, []string{kid})
	if err != nil {
		return KeyInfo{}, err
	}
	return list[0], nil
}
