package authn

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
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
	// permits Basic too, "private_key_jwt", or "none" for a public client.
	AuthMethod string
	// JWKS is the JWK set with the public keys of a client with private_key_jwt, as JSON;
	// empty for all others. It is kept in a canonical form: as encoding/json writes it,
	// members sorted, after having read it into an any.
	JWKS string
	// Secret is made when it is empty. One that is given should have 256 random bits
	// too: it is not hashed slowly. A public client has none, nor has one with keys.
	Secret string

	// DefaultScopes are some of Scopes.
	Scopes, DefaultScopes, Audience []string
	// TokenLifetime is in seconds, up to 3600; 0 is the server's default.
	TokenLifetime int
	// GrantTypes default to client_credentials; a list with nothing in it gives up all.
	GrantTypes []string
	// TokenTyp is "at+jwt", the default, or "JWT".
	TokenTyp string
	// ResourceAudiences are as in [Client].
	ResourceAudiences []string
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
	check(slices.Contains(methods, method), "auth_method", "must be one of %s", strings.Join(methods, ", "))
	check(!public || r.Secret == "", "secret", "must not be there: a public client has none")
	check(method != methodKey || r.Secret == "", "secret", "must not be there: a client with %s proves itself with its keys", methodKey)
	check(isSecret(r.Secret), "secret", "must be UTF-8 of at most %d bytes", maxSecretBytes)
	if method == methodKey {
		wrong := checkClientKeys(r.JWKS)
		check(wrong == "", "jwks", "%s", wrong)
	} else {
		check(r.JWKS == "", "jwks", "must not be there: only a client with %s has keys", methodKey)
	}
	lists := []struct {
		name  string
		items []string
		what  string
		ok    func(string) bool
	}{
		{"scopes", r.Scopes, `must be printable ASCII without space, " and \`, isScope},
		{"default_scopes", r.DefaultScopes, "must be one of scopes", func(s string) bool { return slices.Contains(r.Scopes, s) }},
		{"audience", r.Audience, "must be UTF-8 without control characters", isAudience},
		{"resource_audiences", r.ResourceAudiences, "must be UTF-8 without control characters", isAudience},
		{"grant_types", r.GrantTypes, "must be " + grantClientCredentials, func(s string) bool { return s == grantClientCredentials }},
	}
	for _, l := range lists {
		check(len(l.items) <= maxItems, l.name, "has %d items, must be at most %d", len(l.items), maxItems)
		for i, item := range l.items[:min(len(l.items), maxItems)] {
			at := fmt.Sprintf("%s/%d", l.name, i)
			check(item != "" && len(item) <= maxItemBytes, at, "must be 1 to %d bytes", maxItemBytes)
			check(item == "" || l.ok(item), at, "%s", l.what)
		}
	}
	check(r.TokenTyp == "" || r.TokenTyp == typAccessToken || r.TokenTyp == "JWT", "token_typ", "must be %s or JWT", typAccessToken)
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

var methods = []string{methodBasic, methodPost, methodKey, methodNone}

// What a client is registered with by default.
const (
	grantClientCredentials = "client_credentials"
	typAccessToken         = "at+jwt"
)

const (
	maxClientKeys = 10
	maxJWKSBytes  = 32 << 10
)

// checkClientKeys returns what is wrong with a client's JWK set. Unlike those of issuers,
// which we can but take as they are, it must be right in all of its keys.
func checkClientKeys(jwks string) (wrong string) {
	if jwks == "" {
		return "must be there: a JWK set with the client's public keys"
	}
	if len(jwks) > maxJWKSBytes {
		return fmt.Sprintf("has %d bytes, must be at most %d", len(jwks), maxJWKSBytes)
	}
	var set map[string]json.RawMessage // not a struct, whose members match in any case
	var keys []json.RawMessage
	if json.Unmarshal([]byte(jwks), &set) != nil || json.Unmarshal(set["keys"], &keys) != nil {
		return `must be a JSON object with an array "keys"`
	}
	if len(keys) < 1 || len(keys) > maxClientKeys {
		return fmt.Sprintf("has %d keys, must be 1 to %d", len(keys), maxClientKeys)
	}
	for i, key := range keys {
		if wrong := checkClientKey(key, len(keys) > 1); wrong != "" {
			return fmt.Sprintf("key %d %s", i+1, wrong)
		}
	}
	if _, err := token.ParseKeySet([]byte(jwks)); err != nil { // such as a kid that is there twice
		return err.Error()
	}
	canonical, err := canonicalJSON(jwks)
	if err != nil || strings.Contains(strings.ReplaceAll(canonical, `\\`, ""), `\u0000`) { // Postgres has no NUL
		return "has a number or a character that cannot be stored"
	}
	return ""
}

func checkClientKey(key json.RawMessage, oneOfMany bool) (wrong string) {
	var members map[string]json.RawMessage
	if json.Unmarshal(key, &members) != nil || members == nil {
		return "is not a JSON object"
	}
	for _, name := range []string{"d", "k", "priv"} {
		if _, ok := members[name]; ok {
			return fmt.Sprintf("is private or symmetric: it has %q. Make another one, and register its public half alone", name)
		}
	}
	set, err := token.ParseKeySet(fmt.Appendf(nil, `{"keys":[%s]}`, key))
	usable := err == nil && slices.ContainsFunc(AssertionAlgorithms, func(alg string) bool {
		_, err := set.Key(context.Background(), "", alg)
		return err == nil
	})
	switch {
	case !usable:
		return "cannot verify signatures: it must be RSA of 2048 to 8192 bits, EC with P-256, or OKP with Ed25519, and its alg, if it has one, of " +
			strings.Join(AssertionAlgorithms, ", ")
	case oneOfMany && (members["kid"] == nil || string(members["kid"]) == `""` || string(members["kid"]) == "null"):
		return "has no kid: where there are several, each needs one"
	}
	return ""
}

// canonicalJSON brings documents that mean the same to the same text.
func canonicalJSON(document string) (string, error) {
	var v any
	if err := json.Unmarshal([]byte(document), &v); err != nil {
		return "", err
	}
	b, err := json.Marshal(v)
	return string(b), err
}

// isScope reports whether s is a scope-token of RFC 6749 section 3.3.
func isScope(s string) bool { return isPlain(s) && !strings.Contains(s, " ") }

func isAudience(s string) bool { return isText(s) && !strings.ContainsFunc(s, unicode.IsControl) }

// Credentials are what a client proves itself with.
type Credentials struct {
	ID string
	// Secret is empty for a client without one, and for a client that existed already,
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
                             token_lifetime, revoke_by_jti, revoke_opaque, revoke_quota,
                             jwks, grant_types, token_typ, resource_audiences)
VALUES ($1, $2, $3, coalesce($4, '{}'::text[]), coalesce($5, '{}'::text[]), coalesce($6, '{}'::text[]),
        nullif($7, 0), $8, $9, nullif($10, 0),
        nullif($11::text, '')::jsonb, coalesce($12, '{client_credentials}'::text[]), $13, coalesce($14, '{}'::text[]))
ON CONFLICT (client_id) DO NOTHING`
	clientMappingSQL = `SELECT key_mapping_id, auth_method FROM rescind.clients WHERE client_id = $1 FOR UPDATE`
	clientMethodSQL  = `SELECT auth_method FROM rescind.clients WHERE client_id = $1 FOR UPDATE`
	replaceKeysSQL   = `UPDATE rescind.clients SET jwks = $2::text::jsonb WHERE client_id = $1`
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
	if r.JWKS != "" {
		r.JWKS, _ = canonicalJSON(r.JWKS) // it was valid
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
		r.TokenLifetime, r.RevokeByJTI, r.RevokeOpaque, r.RevokeQuota,
		r.JWKS, r.GrantTypes, cmp.Or(r.TokenTyp, typAccessToken), r.ResourceAudiences)
	if err != nil {
		return Credentials{}, err
	}
	var (
		of     int32
		method string
	)
	if err := tx.QueryRow(ctx, clientMappingSQL, cred.ID).Scan(&of, &method); err != nil {
		return Credentials{}, err
	}
	isNew := tag.RowsAffected() == 1
	hasSecret := method == methodBasic || method == methodPost
	switch {
	case of != keyMappingID:
		return Credentials{}, ErrExists
	case !hasSecret && r.Secret != "":
		return Credentials{}, catalog.Invalid{{Pointer: "#/secret", Detail: "must not be there: the client exists already, with the auth_method " + method}}
	case !hasSecret, !isNew && r.Secret == "":
		return cred, nil
	}
	if cred.Secret == "" {
		cred.Secret = newSecret()
	}
	return cred, a.storeSecret(ctx, tx, cred, maxSecrets)
}

// Rotation is what a client proves itself with from then on: a client with a secret has
// Secret and EndPrevious, one with private_key_jwt has JWKS.
type Rotation struct {
	// Secret is made when it is empty; one that is given is as in [Registration].
	Secret string
	// EndPrevious ends all secrets before. Else the newest of them stays valid until the
	// next rotation.
	EndPrevious bool
	// JWKS, as in [Registration], takes the place of all keys before, whatever EndPrevious
	// is. To let an old key live on until the client uses the new one, it has both; a
	// rotation later, to the new one alone, ends the old.
	JWKS string
}

// RotateClient gives a client a secret in tx, which it returns, or other keys. Once tx is
// committed, [Authenticator.Forget] is to be called. In other processes, what is new is good
// within a second, and what was ended lives for up to [Config.Freshness].
//
// Errors: [ErrNotFound] when there is no such client; [catalog.Invalid] for an unusable
// secret, unusable keys or none, for one of them for a client that has the other, and for a
// public client, which has neither. Its pointers are as in [Registration.Validate].
func (a *Authenticator) RotateClient(ctx context.Context, tx pgx.Tx, clientID string, r Rotation) (secret string, err error) {
	secret, err = a.rotateClient(ctx, tx, clientID, r)
	if err != nil {
		return "", fmt.Errorf("rotate client %q: %w", clientID, err)
	}
	return secret, nil
}

func (a *Authenticator) rotateClient(ctx context.Context, tx pgx.Tx, clientID string, r Rotation) (secret string, err error) {
	var method string
	switch err := tx.QueryRow(ctx, clientMethodSQL, clientID).Scan(&method); {
	case errors.Is(err, pgx.ErrNoRows):
		return "", ErrNotFound
	case err != nil:
		return "", err
	case method == methodNone:
		return "", catalog.Invalid{{Pointer: "#", Detail: "a public client has neither a secret nor keys"}}
	}
	if err := (Registration{AuthMethod: method, Secret: r.Secret, JWKS: r.JWKS}).Validate(); err != nil {
		return "", err
	}
	if method == methodKey {
		keys, _ := canonicalJSON(r.JWKS) // it was valid
		_, err := tx.Exec(ctx, replaceKeysSQL, clientID, keys)
		return "", err
	}
	cred, keep := Credentials{clientID, r.Secret}, maxSecrets
	if cred.Secret == "" {
		cred.Secret = newSecret()
	}
	if r.EndPrevious {
		keep = 0
	}
	return cred.Secret, a.storeSecret(ctx, tx, cred, keep)
}

// Forget makes the next look at a consumer key ask the database. It is called after
// the commit of what made, changed or removed its client or its key mapping.
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
	accountForUpdateSQL = `
SELECT a.role, t.id, t.domain, a.extra_tenants, a.revoked_jwt_form
FROM rescind.accounts a
JOIN rescind.tenants t ON t.id = a.tenant_id
WHERE a.username = $1
FOR UPDATE OF a`
	insertAccountSQL = `
INSERT INTO rescind.accounts (username, tenant_id, role, password_hash, extra_tenants, revoked_jwt_form)
VALUES ($1, $2, $3, $4, $5, $6)`
	updateAccountSQL = `
UPDATE rescind.accounts
SET password_hash = coalesce(nullif($2, ''), password_hash), extra_tenants = $3, revoked_jwt_form = $4
WHERE username = $1`
	deleteAccountSQL = `
DELETE FROM rescind.accounts a USING rescind.tenants t
WHERE a.username = $1 AND t.id = a.tenant_id
RETURNING a.role, t.id, t.domain, a.extra_tenants, a.revoked_jwt_form`
	clientExistsSQL = `SELECT EXISTS (SELECT FROM rescind.clients WHERE client_id = $1)`
)

var roles = []string{roleAdmin, "tenant_admin", "gateway", "notifier", "auditor"}

// The forms in which a gateway wants revoked tokens listed.
const (
	formArray  = "array"
	formObject = "object"
)

// AccountChange is what an account is to have. What is empty or nil stays as it is.
type AccountChange struct {
	Username string
	// Role and Tenant, a domain, are those of the account for ever. A new one must be
	// given a role, and is of the super tenant unless another one is given.
	Role, Tenant string
	// Password is needed by a new account.
	Password string
	// ExtraTenants and RevokedJWTObject are as in [Account]. A new account that is not
	// given them has none, and false.
	ExtraTenants     *[]string
	RevokedJWTObject *bool
}

// PutAccount is [Authenticator.StoreAccount] with all of acc, of whose tenant only the
// domain counts, in a transaction of its own. An empty password stays as it is.
func (a *Authenticator) PutAccount(ctx context.Context, acc Account, password string) error {
	defer a.ForgetAccount(acc.Username)
	return pgx.BeginFunc(ctx, a.pool, func(tx pgx.Tx) error {
		_, err := a.StoreAccount(ctx, tx, AccountChange{
			Username: acc.Username, Role: acc.Role, Tenant: acc.Tenant.Domain, Password: password,
			ExtraTenants: &acc.ExtraTenants, RevokedJWTObject: &acc.RevokedJWTObject,
		})
		return err
	})
}

// StoreAccount makes the account in tx unless it is there, sees to it that it has what c
// says, and returns it. Once tx is committed, [Authenticator.ForgetAccount] is to be
// called; other processes see the change within [Config.Freshness].
//
// Errors: [ErrExists] when the name is taken by an account of another tenant or role,
// or by a client; [ErrNotFound] when there is no such tenant; another one that says
// what is wrong with c.
func (a *Authenticator) StoreAccount(ctx context.Context, tx pgx.Tx, c AccountChange) (Account, error) {
	acc, err := Account{}, c.validate()
	if err == nil {
		acc, err = storeAccount(ctx, tx, c)
	}
	if err != nil {
		return Account{}, fmt.Errorf("put account %q: %w", c.Username, err)
	}
	return acc, nil
}

func (c AccountChange) validate() error {
	var errs []error
	if c.Username == "" || len(c.Username) > maxIDBytes || strings.Contains(c.Username, ":") || !isText(c.Username) {
		errs = append(errs, fmt.Errorf("its name must be UTF-8 of 1 to %d bytes without a colon", maxIDBytes))
	}
	if c.Role != "" && !slices.Contains(roles, c.Role) {
		errs = append(errs, fmt.Errorf("role %q: must be one of %s", c.Role, strings.Join(roles, ", ")))
	}
	if c.Tenant != "" && !catalog.ValidDomain(c.Tenant) {
		errs = append(errs, fmt.Errorf("tenant %q: must be the domain of a tenant, such as %s", c.Tenant, revocation.SuperTenant.Domain))
	}
	if c.ExtraTenants != nil {
		for _, domain := range *c.ExtraTenants {
			if domain != allTenants && !catalog.ValidDomain(domain) {
				errs = append(errs, fmt.Errorf("extra tenant %q: must be the domain of a tenant, or %s for all", domain, allTenants))
			}
		}
	}
	if !isSecret(c.Password) {
		errs = append(errs, fmt.Errorf("its password must be UTF-8 of 1 to %d bytes", maxSecretBytes))
	}
	return errors.Join(errs...)
}

func storeAccount(ctx context.Context, tx pgx.Tx, c AccountChange) (Account, error) {
	hash := ""
	if c.Password != "" {
		hash = newPHC(c.Password).String() // before anything is locked: it is slow
	}
	if err := lockName(ctx, tx, c.Username); err != nil {
		return Account{}, err
	}
	if err := refuseIf(ctx, tx, clientExistsSQL, c.Username); err != nil {
		return Account{}, err
	}
	acc, err := scanAccount(tx.QueryRow(ctx, accountForUpdateSQL, c.Username), c.Username)
	isNew := errors.Is(err, pgx.ErrNoRows)
	if err != nil && !isNew {
		return Account{}, err
	}
	if isNew {
		acc.Role, acc.Tenant.Domain, acc.ExtraTenants = c.Role, cmp.Or(c.Tenant, revocation.SuperTenant.Domain), []string{}
	}
	if c.Tenant != "" || isNew {
		switch err := tx.QueryRow(ctx, tenantSQL, cmp.Or(c.Tenant, acc.Tenant.Domain)).Scan(&acc.Tenant.ID); {
		case errors.Is(err, pgx.ErrNoRows):
			return Account{}, fmt.Errorf("tenant %q: %w: make it first, or correct the domain", c.Tenant, ErrNotFound)
		case err != nil:
			return Account{}, err
		}
	}
	switch {
	case isNew && c.Role == "":
		return Account{}, fmt.Errorf("a new account needs a role, one of %s", strings.Join(roles, ", "))
	case isNew && hash == "":
		return Account{}, errors.New("a new account needs a password")
	case c.Role != "" && c.Role != acc.Role, c.Tenant != "" && c.Tenant != acc.Tenant.Domain:
		return Account{}, fmt.Errorf("%w: an account's tenant and role stay as they are, so delete it first", ErrExists)
	}
	if c.ExtraTenants != nil {
		acc.ExtraTenants = append([]string{}, *c.ExtraTenants...) // never NULL
	}
	if c.RevokedJWTObject != nil {
		acc.RevokedJWTObject = *c.RevokedJWTObject
	}
	form := formArray
	if acc.RevokedJWTObject {
		form = formObject
	}
	if isNew {
		_, err = tx.Exec(ctx, insertAccountSQL, acc.Username, acc.Tenant.ID, acc.Role, hash, acc.ExtraTenants, form)
	} else {
		_, err = tx.Exec(ctx, updateAccountSQL, acc.Username, hash, acc.ExtraTenants, form)
	}
	return acc, err
}

// scanAccount reads a row of what [accountForUpdateSQL] selects.
func scanAccount(row pgx.Row, username string) (Account, error) {
	acc := Account{Username: username}
	var form string
	err := row.Scan(&acc.Role, &acc.Tenant.ID, &acc.Tenant.Domain, &acc.ExtraTenants, &form)
	acc.RevokedJWTObject = form == formObject
	return acc, err
}

// ForgetAccount makes the next look at an account ask the database. It is called after
// the commit of what made, changed or removed it.
func (a *Authenticator) ForgetAccount(username string) { a.accounts.forget(username) }

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

// DeleteAccount removes an account in tx and returns what it was. Once tx is committed,
// [Authenticator.ForgetAccount] is to be called; other processes let the account in for
// at most [Config.Freshness] more. Its error is [ErrNotFound] when there is none.
func (a *Authenticator) DeleteAccount(ctx context.Context, tx pgx.Tx, username string) (Account, error) {
	acc, err := scanAccount(tx.QueryRow(ctx, deleteAccountSQL, username), username)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotFound
	}
	if err != nil {
		return Account{}, fmt.Errorf("delete account %q: %w", username, err)
	}
	return acc, nil
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
