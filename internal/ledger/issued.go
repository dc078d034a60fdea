package ledger

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/rescindhq/rescind/api/revocation"
)

// Issued is a token of an issuer of our own.
type Issued struct {
	// JTI is a canonical UUID.
	JTI string
	// Iss is the issuer, one of our own.
	Iss string
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
// none of these when t cannot be stored, as when its issuer is none of our own.
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

	// The lock's statement comes before, so that n is drawn under it. A batch may be sent
	// twice. An issuer that is none of our own yields a NULL, which the table refuses.
	rememberSQL = `
INSERT INTO rescind.issued_tokens (jti, key_manager_id, client_id, subject, exp)
SELECT i.jti, k.id, i.client_id, i.subject, i.exp
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bigint[]) AS i (jti, iss, client_id, subject, exp)
LEFT JOIN rescind.key_managers k ON k.iss = i.iss COLLATE "C" AND k.resident
ON CONFLICT (jti) DO NOTHING`
)

// errRepeated is why a repeat is no success where the first try did commit.
var errRepeated = errors.New("the first try was committed without a word from the server or with a warning, and a standby may lack it")

func (l *Ledger) remember(ctx context.Context, batch []*issuedItem) error {
	n := len(batch)
	ids, iss, clients, subjects, exps := make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]int64, n)
	for i, it := range batch {
		ids[i], iss[i], clients[i], subjects[i], exps[i] = it.JTI, it.Iss, it.ClientID, it.Subject, it.Exp
	}
	again := false
	return l.retry(ctx, func() error {
		conn, err := l.pool.Acquire(ctx)
		if err != nil {
			return err
		}
		defer conn.Release()
		var added int64
		var b pgx.Batch
		b.Queue("BEGIN")
		b.Queue(rememberLockSQL)
		b.Queue(rememberSQL, ids, iss, clients, subjects, exps).Exec(func(tag pgconn.CommandTag) error {
			added = tag.RowsAffected()
			return nil
		})
		err = sendCommit(ctx, conn, &b)
		// What is there already is not written again, so this commit waited for no standby.
		if err == nil && again && added < int64(n) {
			return errRepeated
		}
		again = true
		return err
	})
}

// SetRemembering says whether this process remembers all tokens that it issues. Each process
// calls it when it starts, before it issues any, and then every minute: the first with on begins
// the time of [Living.Since], one without ends it. While processes differ that time begins anew
// each minute, and in the end it is at most a minute before the last process without was gone.
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
// A jti that is no UUID is never remembered. A token that has expired is forgotten a while
// later, one whose issuer is removed at once. Errors: [ErrUnavailable].
func (l *Ledger) IssuedToken(ctx context.Context, jti string) (Issued, bool, error) {
	found, err := l.IssuedTokens(ctx, []string{jti})
	t, ok := found[jti]
	return t, ok, err
}

// IssuedTokens is [Ledger.IssuedToken] for many: what is remembered, by jti.
func (l *Ledger) IssuedTokens(ctx context.Context, jtis []string) (map[string]Issued, error) {
	var asked []string
	for _, jti := range jtis {
		if isCanonicalUUID(jti) {
			asked = append(asked, jti)
		}
	}
	if len(asked) == 0 {
		return nil, nil
	}
	const sql = `
SELECT i.jti::text, k.iss, i.client_id, i.subject, i.exp
FROM rescind.issued_tokens i JOIN rescind.key_managers k ON k.id = i.key_manager_id
WHERE i.jti = ANY ($1::text[]::uuid[])`
	rows, _ := l.pool.Query(ctx, sql, asked) // CollectRows has its error
	tokens, err := pgx.CollectRows(rows, pgx.RowToStructByName[Issued])
	if err != nil {
		return nil, fmt.Errorf("%w: look up %d issued tokens: %w", ErrUnavailable, len(asked), err)
	}
	found := make(map[string]Issued, len(tokens))
	for _, t := range tokens {
		found[t.JTI] = t
	}
	return found, nil
}

// endedBy are a FROM clause, and conditions, for the remembered tokens i of key managers k that
// a revocation of a kind that has a time ends. Tokens of a key manager that is gone are
// nobody's. It is asked for by one value, so that an index which begins with it gives an order.
func endedBy(kind revocation.Kind) string {
	const of = `rescind.issued_tokens i JOIN rescind.key_managers k ON k.id = i.key_manager_id
WHERE i.key_manager_id = (SELECT o.id FROM rescind.key_managers o WHERE `
	switch kind {
	case revocation.KindClient:
		return of + `o.iss = @iss AND o.resident) AND i.client_id = @ident`
	case revocation.KindSubject:
		return of + `o.iss = @iss AND o.resident) AND i.subject = @ident`
	}
	return of + `o.tenant_id = @tenant AND o.resident)`
}

// Living says how many remembered tokens a revocation would end now.
type Living struct {
	Tokens int64
	// Since is when remembering began: tokens issued before are not counted. Zero: tokens
	// are not remembered, and Tokens says nothing. See [Ledger.SetRemembering] for what it is
	// while processes differ.
	Since time.Time
}

// livingSQL leaves out those that were revoked one by one.
func livingSQL(kind revocation.Kind) string {
	return `
SELECT (SELECT since FROM rescind.issued_since), count(*) FROM ` + endedBy(kind) + `
AND i.exp > extract(epoch FROM clock_timestamp()) AND NOT EXISTS (
	SELECT FROM rescind.revocations r
	WHERE r.iss = k.iss AND r.ident = i.jti::text COLLATE "C" AND r.kind = 'token' AND NOT r.digest)`
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
