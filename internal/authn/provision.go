package authn

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/revocation"
)

// ErrExists is returned for a natural key that something else has already.
var ErrExists = errors.New("it exists already, as something else")

// ErrNotFound is returned for something named that does not exist.
var ErrNotFound = errors.New("it does not exist")

// Application is what clients belong to. Its natural key is tenant, owner and name.
type Application struct {
	// ID is made by the database.
	ID int32
	// UUID is made by the database when it is empty.
	UUID        string
	TenantID    int32
	Owner, Name string
}

const (
	insertApplicationSQL = `
INSERT INTO rescind.applications (uuid, tenant_id, owner, name)
VALUES (coalesce(nullif($1, '')::uuid, gen_random_uuid()), $2, $3, $4)
ON CONFLICT (tenant_id, owner, name) DO NOTHING`
	applicationSQL = `
SELECT id, uuid::text FROM rescind.applications WHERE tenant_id = $1 AND owner = $2 AND name = $3`
)

// CreateApplication makes the application unless it is there, and returns it with
// the ID and UUID that it has.
func (a *Authenticator) CreateApplication(ctx context.Context, app Application) (Application, error) {
	err := pgx.BeginFunc(ctx, a.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, insertApplicationSQL, app.UUID, app.TenantID, app.Owner, app.Name); err != nil {
			return err
		}
		return tx.QueryRow(ctx, applicationSQL, app.TenantID, app.Owner, app.Name).Scan(&app.ID, &app.UUID)
	})
	if err != nil {
		return Application{}, fmt.Errorf("create application %q: %w", app.Name, err)
	}
	return app, nil
}

// Registration is what a client is registered with.
type Registration struct {
	// ID is the client id and consumer key. One is made when it is empty.
	ID            string
	ApplicationID int32
	// Issuer is the iss of the client's key manager, of the application's tenant.
	Issuer string
	// KeyType is PRODUCTION, the default, or SANDBOX.
	KeyType string
	// AuthMethod is "client_secret_basic", the default, "client_secret_post", which
	// permits Basic too, or "none" for a public client.
	AuthMethod string
	// Secret is made when it is empty. One that is given should have 256 random bits
	// too: it is not hashed slowly. A public client has none.
	Secret string

	Scopes, DefaultScopes, Audience []string
	// TokenLifetime is in seconds, up to 3600; 0 is the server's default.
	TokenLifetime int
	// RevokeByJTI and RevokeOpaque exclude each other. RevokeQuota is in requests
	// a second; 0 is no limit.
	RevokeByJTI, RevokeOpaque bool
	RevokeQuota               int
}

func (r *Registration) complete() error {
	set := func(s *string, value string) {
		if *s == "" {
			*s = value
		}
	}
	set(&r.ID, rand.Text())
	set(&r.KeyType, "PRODUCTION")
	set(&r.AuthMethod, methodBasic)
	target := revocation.Target{Kind: revocation.KindClient, Iss: r.Issuer, ID: r.ID}
	if err := target.Validate(); err != nil {
		return err
	}
	if r.AuthMethod == methodNone && r.Secret != "" {
		return errors.New("a public client has no secret")
	}
	if r.AuthMethod == methodNone && (r.RevokeByJTI || r.RevokeOpaque) {
		return errors.New("a public client proves nothing, so it cannot be permitted to revoke what proves nothing")
	}
	return nil
}

// Credentials are what a client proves itself with.
type Credentials struct {
	ID string
	// Secret is empty for a public client, and for a client that existed already,
	// unless it was given.
	Secret string
}

const (
	insertMappingSQL = `
INSERT INTO rescind.key_mappings (application_id, key_manager_id, consumer_key, key_type)
SELECT a.id, k.id, $3, $4
FROM rescind.applications a
JOIN rescind.key_managers k ON k.tenant_id = a.tenant_id
WHERE a.id = $1 AND k.iss = $2
ON CONFLICT (key_manager_id, consumer_key) DO NOTHING`
	mappingSQL = `
SELECT m.id, m.application_id
FROM rescind.key_mappings m
JOIN rescind.key_managers k ON k.id = m.key_manager_id
WHERE k.iss = $1 AND m.consumer_key = $2`
	insertClientSQL = `
INSERT INTO rescind.clients (client_id, key_mapping_id, auth_method, scopes, default_scopes, audience,
                             token_lifetime, revoke_by_jti, revoke_opaque, revoke_quota)
VALUES ($1, $2, $3, coalesce($4, '{}'::text[]), coalesce($5, '{}'::text[]), coalesce($6, '{}'::text[]),
        nullif($7, 0), $8, $9, nullif($10, 0))
ON CONFLICT (client_id) DO NOTHING`
	clientMappingSQL = `SELECT key_mapping_id FROM rescind.clients WHERE client_id = $1 FOR UPDATE`
	clientMethodSQL  = `SELECT auth_method FROM rescind.clients WHERE client_id = $1 FOR UPDATE`
	accountExistsSQL = `SELECT EXISTS (SELECT FROM rescind.accounts WHERE username = $1)`
)

// CreateClient makes the key mapping and the client unless they are there, and
// sees to it that a secret that is given is one of the client's. What an existing
// client is registered with stays as it is. Only the answer to the call that made
// a secret has it.
//
// Errors: [revocation.InvalidError] for an unusable ID, [ErrNotFound] when the
// application's tenant has no such issuer, [ErrExists] when the ID is taken by
// another application or issuer, or by an account: tokens name both as sub.
func (a *Authenticator) CreateClient(ctx context.Context, r Registration) (Credentials, error) {
	if err := r.complete(); err != nil {
		return Credentials{}, fmt.Errorf("create client: %w", err)
	}
	cred := Credentials{ID: r.ID, Secret: r.Secret}
	err := pgx.BeginFunc(ctx, a.pool, func(tx pgx.Tx) error {
		if err := lockName(ctx, tx, r.ID); err != nil {
			return err
		}
		if err := refuseIf(ctx, tx, accountExistsSQL, r.ID); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, insertMappingSQL, r.ApplicationID, r.Issuer, r.ID, r.KeyType); err != nil {
			return err
		}
		var mapping, application int32
		switch err := tx.QueryRow(ctx, mappingSQL, r.Issuer, r.ID).Scan(&mapping, &application); {
		case errors.Is(err, pgx.ErrNoRows):
			return fmt.Errorf("the issuer in the application's tenant: %w", ErrNotFound)
		case err != nil:
			return err
		case application != r.ApplicationID:
			return ErrExists
		}
		tag, err := tx.Exec(ctx, insertClientSQL, r.ID, mapping, r.AuthMethod, r.Scopes, r.DefaultScopes, r.Audience,
			r.TokenLifetime, r.RevokeByJTI, r.RevokeOpaque, r.RevokeQuota)
		if err != nil {
			return err
		}
		var of int32
		if err := tx.QueryRow(ctx, clientMappingSQL, r.ID).Scan(&of); err != nil {
			return err
		}
		if of != mapping {
			return ErrExists
		}
		isNew := tag.RowsAffected() == 1
		if r.AuthMethod == methodNone || !isNew && r.Secret == "" {
			return nil
		}
		if cred.Secret == "" {
			cred.Secret = newSecret()
		}
		return a.storeSecret(ctx, tx, r.ID, cred.Secret)
	})
	a.clients.forget(r.ID)
	a.owners.forget(consumer{r.Issuer, r.ID})
	if err != nil {
		return Credentials{}, fmt.Errorf("create client %q: %w", r.ID, err)
	}
	return cred, nil
}

// RotateSecret gives a client a second secret and returns it; the one before it
// stays valid until the next rotation. An empty given makes a new one.
func (a *Authenticator) RotateSecret(ctx context.Context, clientID, given string) (string, error) {
	secret := given
	if secret == "" {
		secret = newSecret()
	}
	err := pgx.BeginFunc(ctx, a.pool, func(tx pgx.Tx) error {
		var method string
		switch err := tx.QueryRow(ctx, clientMethodSQL, clientID).Scan(&method); {
		case errors.Is(err, pgx.ErrNoRows):
			return ErrNotFound
		case err != nil:
			return err
		case method == methodNone:
			return errors.New("a public client has no secret")
		}
		return a.storeSecret(ctx, tx, clientID, secret)
	})
	a.clients.forget(clientID)
	if err != nil {
		return "", fmt.Errorf("rotate secret of client %q: %w", clientID, err)
	}
	return secret, nil
}

// maxSecretBytes bounds a secret or a password that is given.
const maxSecretBytes = 1024

const (
	hasSecretSQL = `
SELECT EXISTS (SELECT FROM rescind.client_secrets
               WHERE client_id = $1 AND mac = $2 AND master_key_id = $3 AND (expires_at IS NULL OR expires_at > now()))`
	insertSecretSQL = `INSERT INTO rescind.client_secrets (client_id, mac, master_key_id) VALUES ($1, $2, $3)`
	trimSecretsSQL  = `
DELETE FROM rescind.client_secrets
WHERE client_id = $1 AND id NOT IN (
    SELECT id FROM rescind.client_secrets
    WHERE client_id = $1 AND (expires_at IS NULL OR expires_at > now())
    ORDER BY id DESC LIMIT 2)`
)

// storeSecret adds secret unless the client has it, and removes all but the
// newest two. The client's row must be locked.
func (a *Authenticator) storeSecret(ctx context.Context, tx pgx.Tx, clientID, secret string) error {
	if len(secret) > maxSecretBytes || !isText(secret) {
		return fmt.Errorf("the secret is not UTF-8 of at most %d bytes", maxSecretBytes)
	}
	m := a.secrets.mac(0, clientID, secret)
	var has bool
	if err := tx.QueryRow(ctx, hasSecretSQL, clientID, m[:], a.secrets.ids[0]).Scan(&has); err != nil || has {
		return err
	}
	if _, err := tx.Exec(ctx, insertSecretSQL, clientID, m[:], a.secrets.ids[0]); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, trimSecretsSQL, clientID)
	return err
}

const (
	accountForUpdateSQL = `SELECT role, tenant_id FROM rescind.accounts WHERE username = $1 FOR UPDATE`
	putAccountSQL       = `
INSERT INTO rescind.accounts (username, tenant_id, role, password_hash) VALUES ($1, $2, $3, $4)
ON CONFLICT (username) DO UPDATE SET password_hash = excluded.password_hash`
	clientExistsSQL = `SELECT EXISTS (SELECT FROM rescind.clients WHERE client_id = $1)`
)

// CreateAccount makes the account unless it is there, and sees to it that
// password is its password. Only the tenant's ID is used.
//
// Errors: [ErrExists] when the name is taken by an account of another tenant or
// role, or by a client.
func (a *Authenticator) CreateAccount(ctx context.Context, acc Account, password string) error {
	if acc.Username == "" || strings.Contains(acc.Username, ":") || !isText(acc.Username) {
		return errors.New("create account: its name must be UTF-8 without a colon, and not empty")
	}
	if password == "" || len(password) > maxSecretBytes || !isText(password) {
		return fmt.Errorf("create account: its password must be UTF-8 of 1 to %d bytes", maxSecretBytes)
	}
	hash := newPHC(password).String() // before the transaction: it is slow
	err := pgx.BeginFunc(ctx, a.pool, func(tx pgx.Tx) error {
		if err := lockName(ctx, tx, acc.Username); err != nil {
			return err
		}
		if err := refuseIf(ctx, tx, clientExistsSQL, acc.Username); err != nil {
			return err
		}
		var (
			tenantID int32
			role     string
		)
		switch err := tx.QueryRow(ctx, accountForUpdateSQL, acc.Username).Scan(&role, &tenantID); {
		case errors.Is(err, pgx.ErrNoRows):
		case err != nil:
			return err
		case role != acc.Role || tenantID != acc.Tenant.ID:
			return ErrExists
		}
		_, err := tx.Exec(ctx, putAccountSQL, acc.Username, acc.Tenant.ID, acc.Role, hash)
		return err
	})
	a.accounts.forget(acc.Username)
	if err != nil {
		return fmt.Errorf("create account %q: %w", acc.Username, err)
	}
	return nil
}

// lockName keeps two transactions from giving one name to a client and to an account.
func lockName(ctx context.Context, tx pgx.Tx, name string) error {
	_, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtextextended('rescind.authn ' || $1, 0))`, name)
	return err
}

func refuseIf(ctx context.Context, tx pgx.Tx, existsSQL, name string) error {
	var exists bool
	if err := tx.QueryRow(ctx, existsSQL, name).Scan(&exists); err != nil {
		return err
	}
	if exists {
		return ErrExists
	}
	return nil
}
