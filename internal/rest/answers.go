package rest

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/internal/authn"
)

const (
	// keptFor is how long an answer is kept.
	keptFor = 24 * time.Hour
	// abandonedAfter is when a request without an answer is taken for that of a process that
	// died, or one that nobody will know the outcome of: none is worked on for so long.
	abandonedAfter = time.Minute
	// Every trimEvery-th request removes up to trimRows answers that are over: more than
	// were added since, and not so many that it would be felt.
	trimEvery = 64
	trimRows  = 4 * trimEvery

	sealPurpose = "rescind idempotent answers"
)

// Answers is an [IdempotencyStore] in the database, which all processes share. It owns
// the table idempotency. Bodies are sealed with AES-256-GCM under a key derived from the
// master key. Its methods may be called from any goroutine.
type Answers struct {
	pool  *pgxpool.Pool
	seals []cipher.AEAD // the first seals, all open
	begun atomic.Uint64
}

// NewIdempotencyStore returns Answers on pool. The first of masterKeys, of which there
// must be one, seals answers; the others open those that were sealed before.
func NewIdempotencyStore(pool *pgxpool.Pool, masterKeys []authn.MasterKey) *Answers {
	if len(masterKeys) == 0 {
		panic("no master key is given")
	}
	a := &Answers{pool: pool}
	for _, master := range masterKeys {
		a.seals = append(a.seals, sealer(master))
	}
	return a
}

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

const (
	beginAnswerSQL = `
INSERT INTO rescind.idempotency AS i (caller, method, path, key, fingerprint)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT (caller, method, path, key) DO UPDATE
SET fingerprint = excluded.fingerprint, status = NULL, header = NULL, body = NULL, begun_at = excluded.begun_at
WHERE i.begun_at < clock_timestamp() - $6::interval
   OR i.status IS NULL AND i.fingerprint = excluded.fingerprint AND i.begun_at < clock_timestamp() - $7::interval`
	answerSQL = `
SELECT fingerprint, coalesce(status, 0), header, body
FROM rescind.idempotency
WHERE (caller, method, path, key) = ($1, $2, $3, $4)`
	trimAnswersSQL = `
DELETE FROM rescind.idempotency WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM rescind.idempotency
    WHERE begun_at < clock_timestamp() - $1::interval
    ORDER BY begun_at LIMIT $2 FOR UPDATE SKIP LOCKED))`
)

// Begin implements [IdempotencyStore].
func (a *Answers) Begin(ctx context.Context, caller, method, path, key string, fingerprint [32]byte) (Earlier, error) {
	if a.begun.Add(1)%trimEvery == 1 {
		if _, err := a.pool.Exec(ctx, trimAnswersSQL, keptFor, trimRows); err != nil {
			return Earlier{}, fmt.Errorf("remove old answers: %w", err)
		}
	}
	for {
		tag, err := a.pool.Exec(ctx, beginAnswerSQL, caller, method, path, key, fingerprint[:], keptFor, abandonedAfter)
		if err != nil {
			return Earlier{}, fmt.Errorf("begin request: %w", err)
		}
		if tag.RowsAffected() == 1 {
			return Earlier{Begun: true}, nil
		}
		var (
			e      Earlier
			first  []byte
			sealed []byte
		)
		err = a.pool.QueryRow(ctx, answerSQL, caller, method, path, key).Scan(&first, &e.Status, &e.Header, &sealed)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			continue // it was given up meanwhile
		case err != nil:
			return Earlier{}, fmt.Errorf("read answer: %w", err)
		case [32]byte(first) != fingerprint:
			return Earlier{Mismatch: true}, nil
		case e.Status == 0:
			return Earlier{Running: true}, nil
		}
		if e.Body, err = a.open(sealed, bound(caller, method, path, key)); err != nil {
			return Earlier{}, err
		}
		return e, nil
	}
}

func (a *Answers) open(sealed, bound []byte) ([]byte, error) {
	for _, seal := range a.seals {
		if body, err := seal.Open(nil, nil, sealed, bound); err == nil {
			return body, nil
		}
	}
	return nil, errors.New("open answer: it is damaged, or sealed under a master key that is not configured: " +
		"start with that one too, or wait a day until the answer is forgotten")
}

// bound is what a sealed body belongs to: moved to another row, it does not open. No
// part has a NUL, which Postgres does not store.
func bound(parts ...string) []byte { return []byte(strings.Join(parts, "\x00")) }

const (
	finishAnswerSQL = `
UPDATE rescind.idempotency SET status = $5, header = $6, body = $7
WHERE (caller, method, path, key) = ($1, $2, $3, $4) AND status IS NULL`
	giveUpAnswerSQL = `
DELETE FROM rescind.idempotency
WHERE (caller, method, path, key) = ($1, $2, $3, $4) AND status IS NULL`
)

// Finish implements [IdempotencyStore].
func (a *Answers) Finish(ctx context.Context, caller, method, path, key string, status int, header http.Header, body []byte) error {
	if status == 0 {
		if _, err := a.pool.Exec(ctx, giveUpAnswerSQL, caller, method, path, key); err != nil {
			return fmt.Errorf("give up request: %w", err)
		}
		return nil
	}
	sealed := a.seals[0].Seal(nil, nil, body, bound(caller, method, path, key))
	if _, err := a.pool.Exec(ctx, finishAnswerSQL, caller, method, path, key, status, header, sealed); err != nil {
		return fmt.Errorf("keep answer: %w", err)
	}
	return nil
}
