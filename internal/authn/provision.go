package authn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// ErrExists is returned for a natural key that something else has already.
var ErrExists = errors.New("it exists already, as something else")

// ErrNotFound is returned for something named that does not exist.
var ErrNotFound = errors.New("it does not exist")

// Registration is what a client is registered with.
type Registration struct {
	// ID is the client id, which is the consumer key of its key mapping, and taken
	// from there when it is empty.
	ID string
	// AuthMethod is "client_secret_basic", the default, "client_secret_post", which
	// permits Basic too, or "none" for a public client.
	AuthMethod string
	// Secret is made when it is empty. One that is given should have 256 random bits
	// too: it is not hashed slowly. A public client has none.
	Secret string

	// DefaultScopes are some of Scopes.
	Scopes, DefaultScopes, Audience []string
	// TokenLifetime is in seconds, up to 3600; 0 is the server's default.
	TokenLifetime int
	// RevokeByJTI and RevokeOpaque exclude each other. RevokeQuota is in requests
	// a second; 0 is no limit.
	RevokeByJTI, RevokeOpaque bool
	RevokeQuota               int
}

// The most that a client has of each list, and the longest item in bytes.
const (
	maxItems     = 100
	maxItemBytes = 255
)

// Validate returns a [catalog.Invalid] unless a client can be registered with r. Its
// pointers name members as in the database: "#/auth_method".
func (r Registration) Validate() error {
	var found catalog.Invalid
	check := func(ok bool, member, format string, args ...any) {
		if !ok {
			found = append(found, catalog.FieldError{Pointer: "#/" + member, Detail: fmt.Sprintf(format, args...)})
		}
	}
	method := r.AuthMethod
	if method == "" {
		method = methodBasic
	}
	public := method == methodNone
	check(slices.Contains([]string{methodBasic, methodPost, methodNone}, method),
		"auth_method", "must be one of %s, %s, %s", methodBasic, methodPost, methodNone)
	check(!public || r.Secret == "", "secret", "must not be there: a public client has none")
	check(isSecret(r.Secret), "secret", "must be UTF-8 of at most %d bytes", maxSecretBytes)
	lists := []struct {
		name  string
		items []string
		what  string
		ok    func(string) bool
	}{
		{"scopes", r.Scopes, `must be printable ASCII without space, " and \`, isScope},
		{"default_scopes", r.DefaultScopes, "must be one of scopes", func(s string) bool { return slices.Contains(r.Scopes, s) }},
		{"audience", r.Audience, "must be UTF-8 without control characters", isAudience},
	}
	for _, l := range lists {
		check(len(l.items) <= maxItems, l.name, "has %d items, must be at most %d", len(l.items), maxItems)
		for i, item := range l.items[:min(len(l.items), maxItems)] {
			at := fmt.Sprintf("%s/%d", l.name, i)
			check(item != "" && len(item) <= maxItemBytes, at, "must be 1 to %d bytes", maxItemBytes)
			check(item == "" || l.ok(item), at, "%s", l.what)
		}
	}
	const maxLifetime = int(time.Hour / time.Second)
	check(0 <= r.TokenLifetime && r.TokenLifetime <= maxLifetime, "token_lifetime", "must be 1 to %d seconds, or 0 for the server's default", maxLifetime)
	check(!r.RevokeByJTI || !r.RevokeOpaque, "revoke_opaque", "must not be there with revoke_by_jti: an opaque token would be taken for a jti")
	check(!public || !r.RevokeByJTI, "revoke_by_jti", "must not be there for a public client, which proves nothing")
	check(!public || !r.RevokeOpaque, "revoke_opaque", "must not be there for a public client, which proves nothing")
	check(0 <= r.RevokeQuota && r.RevokeQuota <= 1<<31-1, "revoke_quota", "must be at least 1, or 0 for no limit")
	if len(found) == 0 {
		return nil
	}
	return found
}

// isScope reports whether s is a scope-token of RFC 6749 section 3.3.
func isScope(s string) bool { return isPlain(s) && !strings.Contains(s, " ") }

func isAudience(s string) bool { return isText(s) && !strings.ContainsFunc(s, unicode.IsControl) }

// Credentials are what a client proves itself with.
type Credentials struct {
	ID string
	// Secret is empty for a public client, and for a client that existed already,
	// unless it was given.
	Secret string
}

const (
	consumerKeySQL = `
SELECT k.iss, m.consumer_key
FROM rescind.key_mappings m
JOIN rescind.key_managers k ON k.id = m.key_manager_id
WHERE m.id = $1`
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

// StoreClient makes the client of a key mapping in tx unless it is there, and sees to
// it that a secret that is given is one of the client's. What an existing client is
// registered with stays as it is. Only the answer to the call that made a secret has
// it. Once tx is committed, [Authenticator.Forget] is to be called.
//
// Errors: [catalog.Invalid] for an unusable registration, [revocation.InvalidError]
// for an unusable ID, [ErrNotFound] when there is no such mapping, [ErrExists] when
// the ID is that of another mapping's client, or of an account: tokens name both as sub.
func (a *Authenticator) StoreClient(ctx context.Context, tx pgx.Tx, keyMappingID int32, r Registration) (Credentials, error) {
	cred, err := a.storeClient(ctx, tx, keyMappingID, r)
	if err != nil {
		return Credentials{}, fmt.Errorf("store client of key mapping %d: %w", keyMappingID, err)
	}
	return cred, nil
}

func (a *Authenticator) storeClient(ctx context.Context, tx pgx.Tx, keyMappingID int32, r Registration) (Credentials, error) {
	if err := r.Validate(); err != nil {
		return Credentials{}, err
	}
	if r.AuthMethod == "" {
		r.AuthMethod = methodBasic
	}
	target := revocation.Target{Kind: revocation.KindClient}
	switch err := tx.QueryRow(ctx, consumerKeySQL, keyMappingID).Scan(&target.Iss, &target.ID); {
	case errors.Is(err, pgx.ErrNoRows):
		return Credentials{}, ErrNotFound
	case err != nil:
		return Credentials{}, err
	case r.ID != "" && r.ID != target.ID:
		return Credentials{}, &revocation.InvalidError{Detail: "the client id is not the consumer key of its key mapping"}
	}
	if err := target.Validate(); err != nil {
		return Credentials{}, err
	}
	cred := Credentials{ID: target.ID, Secret: r.Secret}
	if err := lockName(ctx, tx, cred.ID); err != nil {
		return Credentials{}, err
	}
	if err := refuseIf(ctx, tx, accountExistsSQL, cred.ID); err != nil {
		return Credentials{}, err
	}
	tag, err := tx.Exec(ctx, insertClientSQL, cred.ID, keyMappingID, r.AuthMethod, r.Scopes, r.DefaultScopes, r.Audience,
		r.TokenLifetime, r.RevokeByJTI, r.RevokeOpaque, r.RevokeQuota)
	if err != nil {
		return Credentials{}, err
	}
	var of int32
	if err := tx.QueryRow(ctx, clientMappingSQL, cred.ID).Scan(&of); err != nil {
		return Credentials{}, err
	}
	if of != keyMappingID {
		return Credentials{}, ErrExists
	}
	isNew := tag.RowsAffected() == 1
	if r.AuthMethod == methodNone || !isNew && r.Secret == "" {
		return cred, nil
	}
	if cred.Secret == "" {
		cred.Secret = newSecret()
	}
	return cred, a.storeSecret(ctx, tx, cred, maxSecrets)
}

// RotateClient gives a client a secret in tx and returns it. Its newest one before
// stays valid until the next rotation; with endPrevious none does. An empty given
// makes a new one. Once tx is committed, [Authenticator.Forget] is to be called; in
// other processes a secret that was ended lives for [Config.Freshness].
//
// Errors: [ErrNotFound] when there is no such client, [catalog.Invalid] for an unusable
// secret, and for a public client, which has none.
func (a *Authenticator) RotateClient(ctx context.Context, tx pgx.Tx, clientID, given string, endPrevious bool) (secret string, err error) {
	cred := Credentials{clientID, given}
	if given == "" {
		cred.Secret = newSecret()
	}
	keep := maxSecrets
	if endPrevious {
		keep = 0
	}
	var method string
	err = tx.QueryRow(ctx, clientMethodSQL, clientID).Scan(&method)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		err = ErrNotFound
	case err != nil:
	case method == methodNone:
		err = catalog.Invalid{{Pointer: "#", Detail: "a public client has no secret"}}
	case !isSecret(given):
		err = catalog.Invalid{{Pointer: "#/secret", Detail: fmt.Sprintf("must be UTF-8 of at most %d bytes", maxSecretBytes)}}
	default:
		err = a.storeSecret(ctx, tx, cred, keep)
	}
	if err != nil {
		return "", fmt.Errorf("rotate secret of client %q: %w", clientID, err)
	}
	return cred.Secret, nil
}

// Forget makes the next look at a consumer key ask the database. It is called after
// the commit of what made, changed or removed its client or its key mapping, or
// blocked its application.
func (a *Authenticator) Forget(iss, consumerKey string) {
	a.clients.forget(consumerKey)
	a.owners.forget(consumer{iss, consumerKey})
}

// maxSecretBytes bounds a secret or a password that is given.
const maxSecretBytes = 1024

func isSecret(s string) bool { return len(s) <= maxSecretBytes && isText(s) }

const (
	findSecretSQL = `
SELECT id FROM rescind.client_secrets
WHERE client_id = $1 AND mac = $2 AND master_key_id = $3 AND (expires_at IS NULL OR expires_at > now())
ORDER BY id DESC LIMIT 1`
	insertSecretSQL = `INSERT INTO rescind.client_secrets (client_id, mac, master_key_id) VALUES ($1, $2, $3) RETURNING id`
	trimSecretsSQL  = `
DELETE FROM rescind.client_secrets
WHERE client_id = $1 AND id <> $2 AND id NOT IN (
    SELECT id FROM rescind.client_secrets
    WHERE client_id = $1 AND (expires_at IS NULL OR expires_at > now())
    ORDER BY id DESC LIMIT $3)`
)

// storeSecret adds the secret unless the client has it, and removes all others but
// those among the newest keep. The client's row must be locked.
func (a *Authenticator) storeSecret(ctx context.Context, tx pgx.Tx, cred Credentials, keep int) error {
	m := a.secrets.mac(0, cred.ID, cred.Secret)
	var id int64
	err := tx.QueryRow(ctx, findSecretSQL, cred.ID, m[:], a.secrets.ids[0]).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		err = tx.QueryRow(ctx, insertSecretSQL, cred.ID, m[:], a.secrets.ids[0]).Scan(&id)
	}
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, trimSecretsSQL, cred.ID, id, keep)
	return err
}

const (
	tenantSQL           = `SELECT id FROM rescind.tenants WHERE domain = $1`
	accountForUpdateSQL = `SELECT role, tenant_id FROM rescind.accounts WHERE username = $1 FOR UPDATE`
	insertAccountSQL    = `
INSERT INTO rescind.accounts (username, tenant_id, role, password_hash, extra_tenants, revoked_jwt_form)
VALUES ($1, $2, $3, $4, $5, $6)`
	updateAccountSQL = `
UPDATE rescind.accounts
SET password_hash = coalesce(nullif($2, ''), password_hash), extra_tenants = $3, revoked_jwt_form = $4
WHERE username = $1`
	clientExistsSQL = `SELECT EXISTS (SELECT FROM rescind.clients WHERE client_id = $1)`
)

var roles = []string{roleAdmin, "tenant_admin", "gateway", "notifier", "auditor"}

// The forms in which a gateway wants revoked tokens listed.
const (
	formArray  = "array"
	formObject = "object"
)

// PutAccount makes the account unless it is there, and sees to it that password is its
// password and that it has acc's extra tenants and form. Of acc.Tenant only the domain
// counts. An empty password keeps that of an account that is there. Other processes see
// the change within [Config.Freshness].
//
// Errors: [ErrExists] when the name is taken by an account of another tenant or role,
// or by a client; [ErrNotFound] when there is no such tenant; another one that says
// what is wrong with acc or password.
func (a *Authenticator) PutAccount(ctx context.Context, acc Account, password string) error {
	err := validateAccount(acc, password)
	if err == nil {
		hash := ""
		if password != "" {
			hash = newPHC(password).String() // before the transaction: it is slow
		}
		err = pgx.BeginFunc(ctx, a.pool, func(tx pgx.Tx) error { return putAccount(ctx, tx, acc, hash) })
		a.accounts.forget(acc.Username)
	}
	if err != nil {
		return fmt.Errorf("put account %q: %w", acc.Username, err)
	}
	return nil
}

func validateAccount(acc Account, password string) error {
	var errs []error
	if acc.Username == "" || len(acc.Username) > maxIDBytes || strings.Contains(acc.Username, ":") || !isText(acc.Username) {
		errs = append(errs, fmt.Errorf("its name must be UTF-8 of 1 to %d bytes without a colon", maxIDBytes))
	}
	if !slices.Contains(roles, acc.Role) {
		errs = append(errs, fmt.Errorf("role %q: must be one of %s", acc.Role, strings.Join(roles, ", ")))
	}
	if !catalog.ValidDomain(acc.Tenant.Domain) {
		errs = append(errs, fmt.Errorf("tenant %q: must be the domain of a tenant, such as %s", acc.Tenant.Domain, revocation.SuperTenant.Domain))
	}
	for _, domain := range acc.ExtraTenants {
		if domain != allTenants && !catalog.ValidDomain(domain) {
			errs = append(errs, fmt.Errorf("extra tenant %q: must be the domain of a tenant, or %s for all", domain, allTenants))
		}
	}
	if !isSecret(password) {
		errs = append(errs, fmt.Errorf("its password must be UTF-8 of 1 to %d bytes", maxSecretBytes))
	}
	return errors.Join(errs...)
}

func putAccount(ctx context.Context, tx pgx.Tx, acc Account, hash string) error {
	if err := lockName(ctx, tx, acc.Username); err != nil {
		return err
	}
	if err := refuseIf(ctx, tx, clientExistsSQL, acc.Username); err != nil {
		return err
	}
	var tenantID int32
	switch err := tx.QueryRow(ctx, tenantSQL, acc.Tenant.Domain).Scan(&tenantID); {
	case errors.Is(err, pgx.ErrNoRows):
		return fmt.Errorf("tenant %q: %w: make it first, or correct the domain", acc.Tenant.Domain, ErrNotFound)
	case err != nil:
		return err
	}
	extra, form := acc.ExtraTenants, formArray
	if extra == nil {
		extra = []string{}
	}
	if acc.RevokedJWTObject {
		form = formObject
	}
	var (
		oldTenantID int32
		oldRole     string
	)
	err := tx.QueryRow(ctx, accountForUpdateSQL, acc.Username).Scan(&oldRole, &oldTenantID)
	switch {
	case errors.Is(err, pgx.ErrNoRows) && hash == "":
		return errors.New("a new account needs a password")
	case errors.Is(err, pgx.ErrNoRows):
		_, err = tx.Exec(ctx, insertAccountSQL, acc.Username, tenantID, acc.Role, hash, extra, form)
	case err != nil:
	case oldRole != acc.Role || oldTenantID != tenantID:
		return fmt.Errorf("%w: an account's tenant and role stay as they are, so delete it first", ErrExists)
	default:
		_, err = tx.Exec(ctx, updateAccountSQL, acc.Username, hash, extra, form)
	}
	return err
}

const accountsSQL = `
SELECT a.username, a.role, t.id, t.domain, a.extra_tenants, a.revoked_jwt_form
FROM rescind.accounts a
JOIN rescind.tenants t ON t.id = a.tenant_id
ORDER BY a.username`

// Accounts returns all accounts, by name.
func (a *Authenticator) Accounts(ctx context.Context) ([]Account, error) {
	rows, err := a.pool.Query(ctx, accountsSQL)
	if err != nil {
		return nil, fmt.Errorf("read accounts: %w", err)
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Account, error) {
		var (
			acc  Account
			form string
		)
		err := row.Scan(&acc.Username, &acc.Role, &acc.Tenant.ID, &acc.Tenant.Domain, &acc.ExtraTenants, &form)
		acc.RevokedJWTObject = form == formObject
		return acc, err
	})
	if err != nil {
		return nil, fmt.Errorf("read accounts: %w", err)
	}
	return all, nil
}

// DeleteAccount removes an account, which other processes let in for at most
// [Config.Freshness] more. Its error is [ErrNotFound] when there is none.
func (a *Authenticator) DeleteAccount(ctx context.Context, username string) error {
	tag, err := a.pool.Exec(ctx, `DELETE FROM rescind.accounts WHERE username = $1`, username)
	a.accounts.forget(username)
	if err == nil && tag.RowsAffected() == 0 {
		err = ErrNotFound
	}
	if err != nil {
		return fmt.Errorf("delete account %q: %w", username, err)
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
