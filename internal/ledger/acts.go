package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/revocation"
)

// Act is an event by which a revocation was made, or renewed with a later time or end.
type Act struct {
	Seq revocation.Seq
	At  time.Time
	// First: the revocation was made by it.
	First bool
}

// actSQL goes by the entity alone, of which there are few events: the order of seqs would have the planner walk
// the log. The event that made the revocation is still there if an older one is, or if nothing was ever removed.
const actSQL = `
WITH acts AS MATERIALIZED (
	SELECT l.seq, l.at, coalesce((l.data::jsonb->>'not_after')::bigint, 0) AS not_after
	FROM rescind.log l WHERE l.entity_id = $1::text::uuid
), oldest AS MATERIALIZED (SELECT l.seq, l.at FROM rescind.log l ORDER BY l.seq LIMIT 1)
SELECT a.seq, a.at,
	a.seq = (SELECT min(seq) FROM acts) AND whole.whole,
	a.seq > (SELECT min(seq) FROM acts) OR whole.whole
FROM acts a, oldest o, rescind.revocations r,
	LATERAL (SELECT o.seq = 1 OR o.at < r.revoked_at AS whole) AS whole
WHERE r.id = $1::text::uuid AND a.not_after >= $2
ORDER BY a.seq LIMIT 1`

// ActOn returns what first ended tokens that were issued at iat, Unix seconds, of the revocation with this id:
// a renewed one ended those that are older than its first time by its first act, the others by a later one.
// For kinds without a time iat is 0. It returns false if retention has removed that event, or may have.
func (l *Ledger) ActOn(ctx context.Context, id string, iat int64) (Act, bool, error) {
	u, err := uuid.Parse(id)
	if err != nil {
		return Act{}, false, nil // nothing has such an id
	}
	var a Act
	var sure bool
	err = l.pool.QueryRow(ctx, actSQL, u.String(), iat).Scan(&a.Seq, &a.At, &a.First, &sure)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return Act{}, false, nil
	case err != nil:
		return Act{}, false, fmt.Errorf("read the events of revocation %s: %w", id, err)
	case !sure:
		return Act{}, false, nil
	}
	return a, true, nil
}
