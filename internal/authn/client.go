package authn

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/token"
)

// maxIDBytes is the longest client id and user name that there can be.
const maxIDBytes = 255

type clientRow struct {
	client  Client
	method  string // as in rescind.clients.auth_method
	secrets [maxSecrets]storedSecret
	keys    *token.Verifier // of the client's assertions; nil without usable keys
}

// noClient is the row of every id that no client has.
var noClient = &clientRow{}

const (
	methodBasic = "client_secret_basic"
	methodPost  = "client_secret_post"
	methodKey   = "private_key_jwt"
	methodNone  = "none"
)

func (a *Authenticator) authenticate(w http.ResponseWriter, r *http.Request, cred credentials) (Client, error) {
	client, err := a.identify(r, cred)
	a.count(err)
	if rec, ok := w.(Recorder); ok && err == nil {
		rec.RecordClient(client.ID)
	}
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

// identify is the one way in. Whatever is wrong with an id and what shall prove it,
// the steps are the same: ask for the row, compare, ask again unless it is new.
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
		return Client{}, a.refuse(who, errClient)
	}
	row, waited, err := a.clients.get(ctx, cred.id)
	if err != nil {
		return Client{}, lookupError(ctx, err)
	}
	if waited && a.throttle.throttled(who) { // others may have guessed meanwhile
		return Client{}, errThrottled
	}
	once, refused := a.admits(row, cred)
	if refused != nil {
		if err := a.refuse(who, refused); err == errThrottled {
			return Client{}, err
		}
		if row, err = a.clients.recheck(ctx, cred.id); err != nil {
			return Client{}, lookupError(ctx, err)
		}
		if once, refused = a.admits(row, cred); refused != nil {
			return Client{}, refused
		}
	}
	if once != nil { // last, so that nobody can use up what he could not have made
		fresh, err := a.useUp(ctx, once)
		switch {
		case err != nil:
			return Client{}, lookupError(ctx, err)
		case !fresh:
			// No guess, so not counted: whoever sends it has, or had, what proves the client.
			return Client{}, because("the assertion was used before, or has expired by the database's clock")
		}
	}
	if !row.client.Public {
		a.throttle.succeeded(who)
	}
	return row.client, nil
}

// refuse counts a failure and returns what to answer: refused, unless others have
// failed too often meanwhile.
func (a *Authenticator) refuse(who caller, refused *OAuthError) *OAuthError {
	if a.throttle.failed(who) {
		return errThrottled
	}
	return refused
}

// admits returns nil, or why not. It hashes and compares before it looks at anything
// else, so that all refusals take as long. What is right only once is for the caller to
// use up.
func (a *Authenticator) admits(row *clientRow, cred credentials) (*once, *OAuthError) {
	if cred.mechanism == assertion {
		return a.verifyAssertion(row, cred)
	}
	proved := a.secrets.matches(&row.secrets, cred.id, cred.secret, time.Now())
	ok := false
	switch cred.mechanism {
	case basic:
		ok = proved && (row.method == methodBasic || row.method == methodPost)
	case post:
		ok = proved && row.method == methodPost
	case none:
		ok = row.method == methodNone
	}
	if !ok {
		return nil, errClient
	}
	return nil, nil
}

// lookupError keeps apart a caller who went away and a database that did.
func lookupError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return Unavailable(storageRetry, err)
}

const clientsSQL = `
SELECT c.client_id, m.application_id, t.id, t.domain, k.iss, k.max_token_lifetime, c.auth_method,
       c.scopes, c.default_scopes, c.audience, coalesce(c.token_lifetime, 0),
       c.grant_types, c.token_typ, c.resource_audiences,
       c.revoke_by_jti, c.revoke_opaque AND NOT k.resident, coalesce(c.revoke_quota, 0),
       coalesce(c.jwks::text, ''), s.macs, s.key_ids, s.expiries
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
WHERE c.client_id = ANY ($1)`

// readClients logs what is of no use in a row and goes on without it: one bad row must
// not keep other clients out.
func (a *Authenticator) readClients(ctx context.Context, ids []string) (map[string]*clientRow, error) {
	all := make(map[string]*clientRow, len(ids))
	for _, id := range ids {
		all[id] = noClient
	}
	found, err := a.pool.Query(ctx, clientsSQL, ids)
	if err != nil {
		return nil, fmt.Errorf("read clients: %w", err)
	}
	var (
		row                   *clientRow
		maxLifetime, lifetime int64
		jwks                  string
		macs                  [][]byte
		keyIDs                []string
		expiries              []*time.Time
	)
	for found.Next() {
		row = &clientRow{}
		c := &row.client
		err := found.Scan(
			&c.ID, &c.ApplicationID, &c.Tenant.ID, &c.Tenant.Domain, &c.Issuer, &maxLifetime, &row.method,
			&c.Scopes, &c.DefaultScopes, &c.Audience, &lifetime,
			&c.GrantTypes, &c.TokenTyp, &c.ResourceAudiences,
			&c.RevokeByJTI, &c.RevokeOpaque, &c.RevokeQuota,
			&jwks, &macs, &keyIDs, &expiries)
		if err != nil {
			break // found.Err has it
		}
		c.MaxTokenLifetime = time.Duration(maxLifetime) * time.Second
		c.TokenLifetime = time.Duration(lifetime) * time.Second
		c.Public = row.method == methodNone
		for i := range macs {
			key := slices.Index(a.secrets.ids, keyIDs[i])
			if key < 0 {
				a.log.Warn("a client's secret is of no use: the master key that it was made under is not configured",
					"client", c.ID, "master_key_id", keyIDs[i])
				continue
			}
			s := storedSecret{usable: true, key: key, mac: mac(macs[i])}
			if expiries[i] != nil {
				s.expires = *expiries[i]
			}
			row.secrets[i] = s
		}
		if jwks != "" {
			if row.keys, err = newAssertionVerifier(c.ID, jwks); err != nil {
				a.log.Warn("a client's keys are of no use: none of its assertions will be taken", "client", c.ID, "error", err)
			}
		}
		all[c.ID] = row
	}
	if err := found.Err(); err != nil {
		return nil, fmt.Errorf("read clients: %w", err)
	}
	return all, nil
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
	row, _, err := a.owners.get(ctx, c)
	if err == nil && !row.found {
		row, err = a.owners.recheck(ctx, c)
	}
	if err != nil {
		return 0, false, lookupError(ctx, err)
	}
	return row.applicationID, row.found, nil
}

// A consumer key that several of the issuers have comes more often than was asked for.
const ownersSQL = `
SELECT k.iss, m.consumer_key, m.application_id
FROM rescind.key_mappings m
JOIN rescind.key_managers k ON k.id = m.key_manager_id
WHERE m.consumer_key = ANY ($2) AND k.iss = ANY ($1)`

func (a *Authenticator) readOwners(ctx context.Context, consumers []consumer) (map[consumer]ownerRow, error) {
	issuers, keys := make([]string, len(consumers)), make([]string, len(consumers))
	for i, c := range consumers {
		issuers[i], keys[i] = c.iss, c.key
	}
	all := make(map[consumer]ownerRow, len(consumers))
	found, err := a.pool.Query(ctx, ownersSQL, issuers, keys)
	if err == nil {
		var c consumer
		row := ownerRow{found: true}
		_, err = pgx.ForEachRow(found, []any{&c.iss, &c.key, &row.applicationID}, func() error {
			all[c] = row
			return nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("read key mappings: %w", err)
	}
	return all, nil
}
