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

// Issued is a token of an issuer of our own.
type Issued struct {
	// JTI is a canonical UUID.
	JTI string
	// ClientID and Subject are the token's client_id and sub, Exp its exp in Unix seconds.
	ClientID, Subject string
	Exp               int64
}

type issuedItem struct {
	Issued
	done chan error // buffered: no caller can hold up the rest
}

// Remember returns nil once t is remembered durably. It must be called, and return, before
// the state is looked at that says that t may be issued: see package sts. If ctx ends first t
// may be remembered all the same. Errors: [ErrBusy], [ErrUnavailable], ctx's, and one that is
// none of these when t cannot be stored.
func (l *Ledger) Remember(ctx context.Context, t Issued) error {
	if !isCanonicalUUID(t.JTI) {
		return errors.New("remember a token: its jti is not a canonical UUID")
	}
	it := &issuedItem{Issued: t, done: make(chan error, 1)}
	if err := l.issued.add(it); err != nil {
		return err
	}
	select {
	case err := <-it.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// isCanonicalUUID reports whether s is a UUID as Postgres writes it: what is remembered
// must be the very jti of the token when it is read again.
func isCanonicalUUID(s string) bool {
	u, err := uuid.Parse(s)
	return err == nil && u.String() == s
}

// rememberBatch is [Ledger.commitBatch] for tokens.
func (l *Ledger) rememberBatch(ctx context.Context, batch []*issuedItem) {
	ctx, cancel := l.outlive(ctx)
	defer cancel()
	err := l.remember(ctx, batch)
	if isItemFault(err) && len(batch) > 1 {
		for _, it := range batch {
			it.done <- l.rememberFailed(l.remember(ctx, []*issuedItem{it}))
		}
		return
	}
	err = l.rememberFailed(err)
	for _, it := range batch {
		it.done <- err
	}
}

func (l *Ledger) rememberFailed(err error) error {
	switch {
	case err == nil:
		return nil
	case isItemFault(err):
		return fmt.Errorf("remember a token: %w", err)
	}
	l.log.Warn("issued tokens could not be remembered", "error", err)
	return fmt.Errorf("%w: remember a token: %w", ErrUnavailable, err)
}

// issuedLock is what keeps apart transactions that remember tokens and those that end the
// tokens of a client, a subject or a tenant. See the decisions of the package.
const issuedLock = `(hashtextextended('rescind.ledger issued', 0))`

const (
	rememberLockSQL = `SELECT pg_advisory_xact_lock_shared` + issuedLock

	// The lock's statement comes before, so that n is drawn under it. A batch may be sent twice.
	rememberSQL = `
INSERT INTO rescind.issued_tokens (jti, client_id, subject, exp)
SELECT jti, client_id, subject, exp FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bigint[]) AS i (jti, client_id, subject, exp)
ON CONFLICT (jti) DO NOTHING`
)

func (l *Ledger) remember(ctx context.Context, batch []*issuedItem) error {
	n := len(batch)
	ids, clients, subjects, exps := make([]string, n), make([]string, n), make([]string, n), make([]int64, n)
	for i, it := range batch {
		ids[i], clients[i], subjects[i], exps[i] = it.JTI, it.ClientID, it.Subject, it.Exp
	}
	return l.retry(ctx, func() error {
		conn, err := l.pool.Acquire(ctx)
		if err != nil {
			return err
		}
		defer conn.Release()
		var b pgx.Batch
		b.Queue("BEGIN")
		b.Queue(rememberLockSQL)
		b.Queue(rememberSQL, ids, clients, subjects, exps)
		return sendCommit(ctx, conn, &b)
	})
}

// SetRemembering is called when a process starts: on says whether it remembers all tokens that
// it issues. The first with on begins the time of [Living.Since], one without ends it.
func (l *Ledger) SetRemembering(ctx context.Context, on bool) error {
	sql := `DELETE FROM rescind.issued_since`
	if on {
		sql = `INSERT INTO rescind.issued_since DEFAULT VALUES ON CONFLICT DO NOTHING`
	}
	if _, err := l.pool.Exec(ctx, sql); err != nil {
		return fmt.Errorf("%w: note whether issued tokens are remembered: %w", ErrUnavailable, err)
	}
	return nil
}

// IssuedToken returns what is remembered of the token with this jti, and false if nothing is.
// A jti that is no UUID is never remembered. A token that has expired is forgotten a while later.
func (l *Ledger) IssuedToken(ctx context.Context, jti string) (Issued, bool, error) {
	if !isCanonicalUUID(jti) {
		return Issued{}, false, nil
	}
	t := Issued{JTI: jti}
	err := l.pool.QueryRow(ctx, `SELECT client_id, subject, exp FROM rescind.issued_tokens WHERE jti = $1::text::uuid`, jti).
		Scan(&t.ClientID, &t.Subject, &t.Exp)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return Issued{}, false, nil
	case err != nil:
		return Issued{}, false, fmt.Errorf("%w: look up an issued token: %w", ErrUnavailable, err)
	}
	return t, true, nil
}

// Remembered tokens i that a revocation ends, with their issuer: those of clients that are
// registered with its issuer, or no more with any. A client that is removed is revoked in
// the same transaction, so by then nobody can say whose it was.
const (
	clientIssuers = `(
		SELECT c.client_id, k.iss, k.tenant_id, k.resident FROM rescind.clients c
		JOIN rescind.key_mappings m ON m.id = c.key_mapping_id
		JOIN rescind.key_managers k ON k.id = m.key_manager_id)`
	issuedTo = `(
	SELECT i.*, @iss::text AS iss FROM rescind.issued_tokens i LEFT JOIN ` + clientIssuers + ` AS c ON c.client_id = i.client_id
	WHERE coalesce(c.iss, @iss) = @iss AND `

	issuedToClient  = issuedTo + `i.client_id = @ident) AS i`
	issuedToSubject = issuedTo + `i.subject = @ident) AS i`
	issuedInTenant  = `(
	SELECT i.*, c.iss FROM ` + clientIssuers + ` AS c JOIN rescind.issued_tokens i ON i.client_id = c.client_id
	WHERE c.tenant_id = @tenant AND c.resident) AS i`
)

// endedBy is the part of a FROM clause that has the tokens i, with their issuers, that a
// revocation of a kind that has a time ends.
func endedBy(kind revocation.Kind) string {
	switch kind {
	case revocation.KindClient:
		return issuedToClient
	case revocation.KindSubject:
		return issuedToSubject
	}
	return issuedInTenant
}

// Living says how many remembered tokens a revocation would end now.
type Living struct {
	Tokens int64
	// Since is when remembering began: tokens issued before are not counted. Zero: tokens
	// are not remembered, and Tokens says nothing.
	Since time.Time
}

// livingSQL leaves out those that were revoked one by one.
func livingSQL(kind revocation.Kind) string {
	return `
SELECT (SELECT since FROM rescind.issued_since), count(*) FROM ` + endedBy(kind) + `
WHERE i.exp > extract(epoch FROM clock_timestamp()) AND NOT EXISTS (
	SELECT FROM rescind.revocations r
	WHERE r.iss = i.iss COLLATE "C" AND r.ident = i.jti::text COLLATE "C" AND r.kind = 'token' AND NOT r.digest)`
}

// Living counts the remembered tokens that have not expired and that a revocation of target,
// of a kind that has a time, would end. tenant owns the target's issuer. Errors:
// [revocation.InvalidError], [ErrUnavailable]. It may read as many rows as it counts.
func (l *Ledger) Living(ctx context.Context, target revocation.Target, tenant revocation.Tenant) (Living, error) {
	if err := target.Validate(); err != nil {
		return Living{}, err
	}
	if !target.Kind.HasTime() {
		return Living{}, &revocation.InvalidError{Detail: fmt.Sprintf("a revocation of kind %s has no time", target.Kind)}
	}
	var living Living
	var since *time.Time
	args := pgx.NamedArgs{"ident": target.ID, "iss": target.Iss, "tenant": tenant.ID}
	if err := l.pool.QueryRow(ctx, livingSQL(target.Kind), args).Scan(&since, &living.Tokens); err != nil {
		return Living{}, fmt.Errorf("%w: count living tokens: %w", ErrUnavailable, err)
	}
	if since != nil {
		living.Since = *since
	}
	return living, nil
}
