package rest

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
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
	// maxKept is how many bytes of answers are kept for a caller: an answer may be twenty times
	// as large as its request. They are counted again after recountAfter, so that what other
	// processes keep, and what is over, counts by then.
	maxKept      = 64 << 20
	recountAfter = time.Minute
	// packFrom is the size of bodies that are compressed, in bytes.
	packFrom = 4 << 10

	sealPurpose = "rescind idempotent answers"
)

// Answers is an [IdempotencyStore] in the database, which all processes share. It owns
// the table idempotency. Bodies are compressed, and sealed with AES-256-GCM under a key
// derived from the master key. Its methods may be called from any goroutine.
type Answers struct {
	pool  *pgxpool.Pool
	seals []cipher.AEAD // the first seals, all open
	begun atomic.Uint64

	mu   sync.Mutex
	kept map[string]usage // by caller, of those that this process has kept a body for
}

// usage is how many bytes of answers are kept for a caller, about.
type usage struct {
	bytes   int64
	counted time.Time // zero: only this process's were
}

// NewIdempotencyStore returns Answers on pool. The first of masterKeys, of which there
// must be one, seals answers; the others open those that were sealed before.
func NewIdempotencyStore(pool *pgxpool.Pool, masterKeys []authn.MasterKey) *Answers {
	if len(masterKeys) == 0 {
		panic("no master key is given")
	}
	a := &Answers{pool: pool, kept: make(map[string]usage)}
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
WHERE (caller, method, path, key) = ($1, $2, $3, $4) AND begun_at >= clock_timestamp() - $5::interval`
	countAnswersSQL = `
SELECT coalesce(sum(octet_length(body)), 0)
FROM rescind.idempotency
WHERE caller = $1 AND begun_at >= clock_timestamp() - $2::interval`
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
	full, err := a.isFull(ctx, caller)
	if err != nil {
		return Earlier{}, err
	}
	for {
		if !full {
			tag, err := a.pool.Exec(ctx, beginAnswerSQL, caller, method, path, key, fingerprint[:], keptFor, abandonedAfter)
			if err != nil {
				return Earlier{}, fmt.Errorf("begin request: %w", err)
			}
			if tag.RowsAffected() == 1 {
				return Earlier{Begun: true}, nil
			}
		}
		var (
			e      Earlier
			first  []byte
			sealed []byte
		)
		err = a.pool.QueryRow(ctx, answerSQL, caller, method, path, key, keptFor).Scan(&first, &e.Status, &e.Header, &sealed)
		switch {
		case errors.Is(err, pgx.ErrNoRows) && full:
			return Earlier{Full: true}, nil
		case errors.Is(err, pgx.ErrNoRows):
			continue // it was given up meanwhile, or is over
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

// isFull reports whether as much is kept for caller as may be. One that this process has
// kept nothing for is not asked about: notifiers, of which nothing is, come often.
func (a *Answers) isFull(ctx context.Context, caller string) (bool, error) {
	a.mu.Lock()
	k, ok := a.kept[caller]
	recount := ok && time.Since(k.counted) >= recountAfter
	if recount {
		a.kept[caller] = usage{k.bytes, time.Now()} // others do not count meanwhile
	}
	a.mu.Unlock()
	if recount {
		if err := a.pool.QueryRow(ctx, countAnswersSQL, caller, keptFor).Scan(&k.bytes); err != nil {
			return false, fmt.Errorf("count what is kept for a caller: %w", err)
		}
		a.mu.Lock()
		a.kept[caller] = usage{k.bytes, time.Now()}
		a.mu.Unlock()
	}
	return k.bytes >= maxKept, nil
}

// keep notes that n more bytes are kept for caller.
func (a *Answers) keep(caller string, n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	k := a.kept[caller]
	k.bytes += int64(n)
	a.kept[caller] = k
}

func (a *Answers) open(sealed, bound []byte) ([]byte, error) {
	for _, seal := range a.seals {
		if packed, err := seal.Open(nil, nil, sealed, bound); err == nil {
			return unpack(packed)
		}
	}
	return nil, errors.New("open answer: it is damaged, or sealed under a master key that is not configured: " +
		"start with that one too, or wait a day until the answer is forgotten")
}

const gzipMagic = "\x1f\x8b"

// pack compresses body if that is worth it, or if it would be taken for compressed.
func pack(body []byte) []byte {
	if len(body) < packFrom && !bytes.HasPrefix(body, []byte(gzipMagic)) {
		return body
	}
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		panic(err) // there is such a level
	}
	_, _ = w.Write(body) // a buffer takes everything
	_ = w.Close()
	return b.Bytes()
}

func unpack(packed []byte) ([]byte, error) {
	if !bytes.HasPrefix(packed, []byte(gzipMagic)) {
		return packed, nil
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("decompress answer: %w", err)
	}
	body, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("decompress answer: %w", err)
	}
	return body, nil
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
	sealed := a.seals[0].Seal(nil, nil, pack(body), bound(caller, method, path, key))
	if len(body) > 0 {
		a.keep(caller, len(sealed))
	}
	if _, err := a.pool.Exec(ctx, finishAnswerSQL, caller, method, path, key, status, header, sealed); err != nil {
		return fmt.Errorf("keep answer: %w", err)
	}
	return nil
}
