package authn

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// maxIDBytes is the longest client id and user name that there can be.
const maxIDBytes = 255

type clientRow struct {
	client  Client
	method  string // as in rescind.clients.auth_method
	secrets [maxSecrets]storedSecret
}

const (
	methodBasic = "client_secret_basic"
	methodPost  = "client_secret_post"
	methodNone  = "none"
)

func (a *Authenticator) authenticate(r *http.Request, cred credentials) (Client, error) {
	client, err := a.identify(r, cred)
	a.count(err)
	return client, err
}

func (a *Authenticator) count(err error) {
	result := callerUnavailable
	switch e, ok := errors.AsType[*OAuthError](err); {
	case err == nil:
		result = callerAccepted
	case ok && e.Status == http.StatusUnauthorized:
		result = callerRefused
	case ok && e.Status == http.StatusTooManyRequests:
		result = callerThrottled
	}
	a.metrics.callers.WithLabelValues(result).Inc()
}

// identify is the one way in. Whatever is wrong with an id and a secret, the
// steps are the same: ask for the row, compare, ask again unless it is new.
func (a *Authenticator) identify(r *http.Request, cred credentials) (Client, error) {
	ctx := r.Context()
	who := caller{id: cred.id, from: bucket(a.Remote(r))}
	if len(cred.id) > maxIDBytes {
		cred, who.id = credentials{mechanism: unreadable}, ""
	}
	if a.throttle.throttled(who) {
		return Client{}, errThrottled
	}
	switch cred.mechanism {
	case nothing:
		return Client{}, errClient // no guess, so not counted
	case unreadable:
		return Client{}, a.refuse(who)
	}
	row, waited, err := a.clients.get(ctx, cred.id, a.cfg.Freshness)
	if err != nil {
		return Client{}, lookupError(ctx, err)
	}
	if waited && a.throttle.throttled(who) { // others may have guessed meanwhile
		return Client{}, errThrottled
	}
	if !a.admits(&row, cred) {
		if err := a.refuse(who); err != errClient {
			return Client{}, err
		}
		if row, err = a.clients.recheck(ctx, cred.id); err != nil {
			return Client{}, lookupError(ctx, err)
		}
		if !a.admits(&row, cred) {
			return Client{}, errClient
		}
	}
	if !row.client.Public {
		a.throttle.succeeded(who)
	}
	return row.client, nil
}

// refuse counts a failure and returns what to answer.
func (a *Authenticator) refuse(who caller) *OAuthError {
	if a.throttle.failed(who) {
		return errThrottled
	}
	return errClient
}

// admits hashes and compares before it looks at anything else, so that all
// refusals take as long.
func (a *Authenticator) admits(row *clientRow, cred credentials) bool {
	proved := a.secrets.matches(&row.secrets, cred.id, cred.secret, time.Now())
	switch cred.mechanism {
	case basic:
		return proved && row.method != methodNone
	case post:
		return proved && row.method == methodPost
	case none:
		return row.method == methodNone
	}
	return false
}

// lookupError keeps apart a caller who went away and a database that did.
func lookupError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return Unavailable(storageRetry, err)
}

const clientSQL = `
SELECT m.application_id, t.id, t.domain, k.iss, k.max_token_lifetime, c.auth_method,
       c.scopes, c.default_scopes, c.audience, coalesce(c.token_lifetime, 0),
       c.revoke_by_jti, c.revoke_opaque AND NOT k.resident, coalesce(c.revoke_quota, 0),
       s.macs, s.key_ids, s.expiries
FROM rescind.clients c
JOIN rescind.key_mappings m ON m.id = c.key_mapping_id
JOIN rescind.key_managers k ON k.id = m.key_manager_id
JOIN rescind.tenants t ON t.id = k.tenant_id
CROSS JOIN LATERAL (
    SELECT array_agg(mac ORDER BY id DESC) AS macs, array_agg(master_key_id ORDER BY id DESC) AS key_ids,
           array_agg(expires_at ORDER BY id DESC) AS expiries
    FROM (SELECT id, mac, master_key_id, expires_at FROM rescind.client_secrets
          WHERE client_id = c.client_id AND (expires_at IS NULL OR expires_at > now())
          ORDER BY id DESC LIMIT 2) AS active
) s
WHERE c.client_id = $1`

func (a *Authenticator) readClient(ctx context.Context, id string) (clientRow, error) {
	row := clientRow{client: Client{ID: id}}
	c := &row.client
	var (
		maxLifetime, lifetime int64
		macs                  [][]byte
		keyIDs                []string
		expiries              []*time.Time
	)
	err := a.pool.QueryRow(ctx, clientSQL, id).Scan(
		&c.ApplicationID, &c.Tenant.ID, &c.Tenant.Domain, &c.Issuer, &maxLifetime, &row.method,
		&c.Scopes, &c.DefaultScopes, &c.Audience, &lifetime,
		&c.RevokeByJTI, &c.RevokeOpaque, &c.RevokeQuota,
		&macs, &keyIDs, &expiries)
	if errors.Is(err, pgx.ErrNoRows) {
		return clientRow{}, nil
	}
	if err != nil {
		return clientRow{}, fmt.Errorf("read client: %w", err)
	}
	c.MaxTokenLifetime = time.Duration(maxLifetime) * time.Second
	c.TokenLifetime = time.Duration(lifetime) * time.Second
	c.Public = row.method == methodNone
	for i := range macs {
		key := slices.Index(a.secrets.ids, keyIDs[i])
		if key < 0 {
			a.log.Warn("a client's secret is of no use: the master key that it was made under is not configured",
				"client", id, "master_key_id", keyIDs[i])
			continue
		}
		s := storedSecret{usable: true, key: key, mac: mac(macs[i])}
		if expiries[i] != nil {
			s.expires = *expiries[i]
		}
		row.secrets[i] = s
	}
	return row, nil
}

// consumer is a client as its tokens name it.
type consumer struct{ iss, key string }

type ownerRow struct {
	found         bool
	applicationID int32
}

// Owner returns the application of a consumer key at an issuer, and false when
// there is none. Its error is an [OAuthError] or that of ctx.
func (a *Authenticator) Owner(ctx context.Context, iss, consumerKey string) (applicationID int32, ok bool, err error) {
	if len(iss) > maxIDBytes || len(consumerKey) > maxIDBytes || !isText(iss) || !isText(consumerKey) {
		return 0, false, nil
	}
	c := consumer{iss, consumerKey}
	row, _, err := a.owners.get(ctx, c, a.cfg.Freshness)
	if err == nil && !row.found {
		row, err = a.owners.recheck(ctx, c)
	}
	if err != nil {
		return 0, false, lookupError(ctx, err)
	}
	return row.applicationID, row.found, nil
}

const ownerSQL = `
SELECT m.application_id
FROM rescind.key_mappings m
JOIN rescind.key_managers k ON k.id = m.key_manager_id
WHERE k.iss = $1 AND m.consumer_key = $2`

func (a *Authenticator) readOwner(ctx context.Context, c consumer) (ownerRow, error) {
	row := ownerRow{found: true}
	err := a.pool.QueryRow(ctx, ownerSQL, c.iss, c.key).Scan(&row.applicationID)
	if errors.Is(err, pgx.ErrNoRows) {
		return ownerRow{}, nil
	}
	if err != nil {
		return ownerRow{}, fmt.Errorf("read key mapping: %w", err)
	}
	return row, nil
}
