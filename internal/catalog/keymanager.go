package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"reflect"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

type keyManagers struct{ plain }

const readKeyManagersSQL = `
SELECT e.id, e.uuid::text, t.id, t.domain, e.ts, e.name, e.display_name, e.description, e.type, e.enabled, e.resident, e.iss,
       e.max_token_lifetime, e.jwks_uri, e.algorithms, e.allow_typ, e.consumer_key_claim, e.scopes_claim,
       e.claim_mappings, e.token_type, e.properties
FROM rescind.key_managers e
JOIN rescind.tenants t ON t.id = e.tenant_id`

const insertKeyManagersSQL = `
INSERT INTO rescind.key_managers (id, uuid, tenant_id, ts, name, display_name, description, type, enabled, resident, iss,
    max_token_lifetime, jwks_uri, algorithms, allow_typ, consumer_key_claim, scopes_claim, claim_mappings, token_type, properties)
SELECT r.id, r.uuid, (r.tenant ->> 'id')::integer, r.timestamp, r.name, coalesce(r.display_name, ''), coalesce(r.description, ''),
    r.type, r.enabled, r.resident, r.iss, r.max_token_lifetime, coalesce(r.jwks_uri, ''), coalesce(r.algorithms, '{}'),
    coalesce(r.allow_typ, '{}'), coalesce(r.consumer_key_claim, ''), coalesce(r.scopes_claim, ''),
    coalesce(r.claim_mappings, '[]'), r.token_type, coalesce(r.properties, '{}')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, uuid uuid, tenant jsonb, timestamp bigint, name text, display_name text,
    description text, type text, enabled boolean, resident boolean, iss text, max_token_lifetime integer, jwks_uri text,
    algorithms text[], allow_typ text[], consumer_key_claim text, scopes_claim text, claim_mappings jsonb,
    token_type text, properties jsonb)
ON CONFLICT DO NOTHING
RETURNING uuid::text`

const updateKeyManagersSQL = `
UPDATE rescind.key_managers e
SET ts = r.timestamp, display_name = coalesce(r.display_name, ''), description = coalesce(r.description, ''),
    type = r.type, enabled = r.enabled, max_token_lifetime = r.max_token_lifetime, jwks_uri = coalesce(r.jwks_uri, ''),
    algorithms = coalesce(r.algorithms, '{}'), allow_typ = coalesce(r.allow_typ, '{}'),
    consumer_key_claim = coalesce(r.consumer_key_claim, ''), scopes_claim = coalesce(r.scopes_claim, ''),
    claim_mappings = coalesce(r.claim_mappings, '[]'), token_type = r.token_type, properties = coalesce(r.properties, '{}')
FROM jsonb_to_recordset($1::jsonb) AS r (id integer, timestamp bigint, display_name text,
    description text, type text, enabled boolean, max_token_lifetime integer, jwks_uri text,
    algorithms text[], allow_typ text[], consumer_key_claim text, scopes_claim text, claim_mappings jsonb,
    token_type text, properties jsonb)
WHERE e.id = r.id`

func (keyManagers) sql() statements {
	return statements{"rescind.key_managers", "rescind.key_managers_id_seq", readKeyManagersSQL, insertKeyManagersSQL, updateKeyManagersSQL}
}

func (keyManagers) scan(row pgx.CollectableRow) (catalog.Entity, error) {
	var k catalog.KeyManager
	err := row.Scan(&k.ID, &k.UUID, &k.Tenant.ID, &k.Tenant.Domain, &k.Timestamp, &k.Name, &k.DisplayName, &k.Description,
		&k.Type, &k.Enabled, &k.Resident, &k.Iss, &k.MaxTokenLifetime, &k.JWKSURI, &k.Algorithms, &k.AllowTyp,
		&k.ConsumerKeyClaim, &k.ScopesClaim, &k.ClaimMappings, &k.TokenType, &k.Properties)
	k.Algorithms, k.AllowTyp, k.ClaimMappings = list(k.Algorithms), list(k.AllowTyp), list(k.ClaimMappings)
	if len(k.Properties) == 0 {
		k.Properties = nil
	}
	return &k, err
}

func (keyManagers) complete(e catalog.Entity) {
	k := e.(*catalog.KeyManager)
	set(&k.Type, "default")
	set(&k.TokenType, "DIRECT")
	k.Algorithms, k.AllowTyp, k.ClaimMappings = list(k.Algorithms), list(k.AllowTyp), list(k.ClaimMappings)
	// The numbers in it have many types; the database gives back one. What cannot be
	// encoded is left for Validate to refuse.
	var properties map[string]any
	if b, err := json.Marshal(k.Properties); err == nil && json.Unmarshal(b, &properties) == nil {
		k.Properties = properties
	}
	if len(k.Properties) == 0 {
		k.Properties = nil
	}
}

func (keyManagers) unique(e catalog.Entity) []place {
	k := e.(*catalog.KeyManager)
	return []place{
		{`e.tenant_id = $2 AND e.name = $3`, []any{k.Tenant.ID, k.Name}, taken("#/name", "the tenant has a key manager of this name already")},
		{`e.iss = $2`, []any{k.Iss}, taken("#/iss", "there is a key manager of this issuer already, and an issuer belongs to one tenant")},
	}
}

func (keyManagers) keep(b *batch, cur, want catalog.Entity) *Conflict {
	c, w := cur.(*catalog.KeyManager), want.(*catalog.KeyManager)
	w.Resident = c.Resident
	members := []member{{"name", w.Name == c.Name}, {"iss", w.Iss == c.Iss}}
	if c.Resident && !b.system {
		members = append(members,
			member{"type", w.Type == c.Type},
			member{"max_token_lifetime", w.MaxTokenLifetime == c.MaxTokenLifetime},
			member{"jwks_uri", w.JWKSURI == c.JWKSURI},
			member{"algorithms", reflect.DeepEqual(w.Algorithms, c.Algorithms)},
			member{"allow_typ", reflect.DeepEqual(w.AllowTyp, c.AllowTyp)},
			member{"consumer_key_claim", w.ConsumerKeyClaim == c.ConsumerKeyClaim},
			member{"scopes_claim", w.ScopesClaim == c.ScopesClaim},
			member{"claim_mappings", reflect.DeepEqual(w.ClaimMappings, c.ClaimMappings)},
			member{"token_type", w.TokenType == c.TokenType},
		)
		if conflict := fixed(members...); conflict != nil {
			conflict.Detail = conflict.Pointer[len("#/"):] + " of an issuer of our own never changes: leave it as it is"
			return conflict
		}
		return nil
	}
	if w.MaxTokenLifetime < c.MaxTokenLifetime {
		return &Conflict{Slug: "immutable", Pointer: "#/max_token_lifetime", Detail: lowerLifetime(c.MaxTokenLifetime, w.MaxTokenLifetime)}
	}
	return fixed(members...)
}

func (keyManagers) refer(ctx context.Context, b *batch, run []*step) error {
	for _, st := range run {
		cur, _ := st.cur.(*catalog.KeyManager)
		want := st.want.(*catalog.KeyManager)
		if cur == nil {
			if err := b.refuseBelowOurs(ctx, st, want.Iss); err != nil {
				return err
			}
		}
		if b.by.Tenant != "" && cur != nil {
			if wrong := trustOnly(cur, want); len(wrong) > 0 {
				return st.fail(wrong)
			}
		}
		uri := want.JWKSURI
		if uri == "" || cur != nil && cur.JWKSURI == uri || b.system {
			continue
		}
		if !isSafe(uri) {
			return st.fail(catalog.Invalid{{Pointer: "#/jwks_uri", Detail: "must be https, unless its host is loopback"}})
		}
	}
	return nil
}

// oursAboveSQL finds an issuer of our own that $1 is below.
const oursAboveSQL = `SELECT iss FROM rescind.key_managers WHERE resident AND starts_with($1, rtrim(iss, '/') || '/') LIMIT 1`

// refuseBelowOurs keeps names that people take for ours from others.
func (b *batch) refuseBelowOurs(ctx context.Context, st *step, iss string) error {
	if st.want.(*catalog.KeyManager).Resident {
		return nil
	}
	var ours string
	switch err := b.tx.QueryRow(ctx, oursAboveSQL, iss).Scan(&ours); {
	case errors.Is(err, pgx.ErrNoRows):
		return nil
	case err != nil:
		return err
	}
	return st.fail(taken("#/iss", fmt.Sprintf("it is below %s, an issuer of our own: nobody else has names there", ours)))
}

// trustOnly finds what only those who see all tenants may change: what decides which tokens
// are believed, from where every process fetches keys, and how long revocations are kept.
func trustOnly(cur, want *catalog.KeyManager) (wrong catalog.Invalid) {
	for _, m := range []member{
		{"type", want.Type == cur.Type},
		{"max_token_lifetime", want.MaxTokenLifetime == cur.MaxTokenLifetime},
		{"jwks_uri", want.JWKSURI == cur.JWKSURI},
		{"algorithms", reflect.DeepEqual(want.Algorithms, cur.Algorithms)},
		{"allow_typ", reflect.DeepEqual(want.AllowTyp, cur.AllowTyp)},
		// Each type of key manager has names of its own for whom gateways ask about tokens.
		{"properties", reflect.DeepEqual(want.Properties, cur.Properties)},
	} {
		if !m.same {
			wrong = append(wrong, catalog.FieldError{
				Pointer: "#/" + m.name, Detail: "is changed by those who see all tenants: leave it as it is, or ask them",
			})
		}
	}
	return wrong
}

// isSafe reports whether keys may be fetched from uri: over plain HTTP anybody on the way
// could replace them.
func isSafe(uri string) bool {
	u, err := url.Parse(uri)
	if err != nil {
		return false
	}
	addr, err := netip.ParseAddr(u.Hostname())
	return u.Scheme == "https" || u.Hostname() == "localhost" || err == nil && addr.Unmap().IsLoopback()
}

// Revocations made with a lower lifetime would end before the tokens of the time before.
func lowerLifetime(old, lower int32) string {
	return fmt.Sprintf("its longest token lifetime is %d s and cannot become %d s while tokens of before live: "+
		"go on with %d s; once it has made no longer ones for that long, lower it in its row of rescind.key_managers", old, lower, old)
}

// The revocations of its tokens are no use: without it, gateways accept none.
const keyManagersInUseSQL = `
SELECT k.id, CASE
    WHEN EXISTS (SELECT FROM rescind.key_mappings x WHERE x.key_manager_id = k.id) THEN 'consumer keys'
    WHEN EXISTS (SELECT FROM rescind.signing_keys x WHERE x.key_manager_id = k.id) THEN 'signing keys'
    END
FROM rescind.key_managers k WHERE k.id = ANY($1)`

func (keyManagers) release(ctx context.Context, b *batch, run []*step) error {
	for _, st := range run {
		if st.cur.(*catalog.KeyManager).Resident {
			return st.fail(&Conflict{Slug: "in-use", Detail: "it is an issuer of our own, which goes with its tenant only: disable it to have its tokens refused"})
		}
	}
	return b.refuseUsed(ctx, keyManagersInUseSQL, run, "%s are of this key manager: delete them first")
}

// inTheWaySQL finds what else has the place that an issuer wants.
const inTheWaySQL = `
SELECT iss, resident AND $2 AS resident
FROM rescind.key_managers
WHERE tenant_id = $1 AND iss <> $4 AND (resident AND $2 OR name = $3)
ORDER BY 2 DESC
LIMIT 1`

// EnsureKeyManager makes a key manager as the process is configured with, or changes the one
// of its Iss to have its MaxTokenLifetime, JWKSURI, Algorithms and AllowTyp, and returns it as
// it is. What else it is at first, callers may have changed. An empty Name is that of an issuer
// of our own; another one than it has is ignored with a warning: others refer to it by its name.
// So is a MaxTokenLifetime below the one that it has: revocations must last as long as the
// tokens of before, and callers who raised it must keep no process from starting. A JWKSURI
// that has a query or a user is not stored: it could be a secret.
//
// Errors: a [Conflict], which says what to do, for another tenant, a change between resident and
// external, a name that another one has, a second resident one and an external one below ours.
func (s *Store) EnsureKeyManager(ctx context.Context, k catalog.KeyManager) (*catalog.KeyManager, error) {
	set(&k.Tenant.Domain, revocation.SuperTenant.Domain)
	if k.Resident {
		set(&k.Name, residentName)
	}
	if u, err := url.Parse(k.JWKSURI); err != nil || u.RawQuery != "" || u.User != nil {
		k.JWKSURI = ""
	}
	keyManagers{}.complete(&k)
	var done catalog.Entity
	_, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
		b := s.newBatch(system, tx)
		b.system = true
		var err error
		done, err = b.ensure(ctx, k)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("register issuer %q: %w", k.Iss, err)
	}
	made := done.(*catalog.KeyManager)
	if made.Name != k.Name {
		s.log.Warn("an issuer is configured with another name than it has, which never changes: it keeps it; correct the configuration",
			"issuer", k.Iss, "name", made.Name, "configured", k.Name)
	}
	if made.MaxTokenLifetime > k.MaxTokenLifetime {
		s.log.Warn("an issuer is configured with a lower longest token lifetime than it has: it keeps it; correct the configuration, "+
			"or once it has made no longer tokens for that long, lower it in its row of rescind.key_managers",
			"issuer", k.Iss, "seconds", made.MaxTokenLifetime, "configured", k.MaxTokenLifetime)
	}
	return made, nil
}

func (b *batch) ensure(ctx context.Context, k catalog.KeyManager) (catalog.Entity, error) {
	// Who is configured is not held to what callers may store: its keys may come from elsewhere.
	if err := validateIssuer(&k); err != nil {
		return nil, err
	}
	if err := b.lock(ctx, wanted{domains: []string{k.Tenant.Domain}}); err != nil {
		return nil, err
	}
	tenant, ok := b.tenants[k.Tenant.Domain]
	if !ok {
		return nil, fmt.Errorf("there is no tenant %q: add it first, or correct its domain", k.Tenant.Domain)
	}
	found, err := b.fetch(ctx, keyManagers{}, ` WHERE e.iss = $1 FOR NO KEY UPDATE OF e`, k.Iss)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		var other string
		var resident bool
		switch err := b.tx.QueryRow(ctx, inTheWaySQL, tenant.ID, k.Resident, k.Name, k.Iss).Scan(&other, &resident); {
		case errors.Is(err, pgx.ErrNoRows):
		case err != nil:
			return nil, err
		case resident:
			return nil, taken("#/iss", fmt.Sprintf("the database belongs to issuer %q: configure that one (RESCIND_ISSUER), or use another database", other))
		default:
			return nil, taken("#/name", fmt.Sprintf("tenant %q has an issuer named %q already, %q: choose another name", tenant.Domain, k.Name, other))
		}
		st := &step{op: Create, want: &k, reason: "configured"}
		err := b.create(ctx, keyManagers{}, []*step{st})
		return st.want, err
	}
	cur := found[0].(*catalog.KeyManager)
	switch {
	case cur.Tenant != tenant:
		return nil, taken("#/tenant", fmt.Sprintf("it belongs to tenant %q and cannot go to %q: name its own tenant, or delete it there first",
			cur.Tenant.Domain, tenant.Domain))
	case cur.Resident != k.Resident:
		was, is := "an external issuer", "our own"
		if cur.Resident {
			was, is = is, was
		}
		return nil, &Conflict{Slug: "immutable", Pointer: "#/resident",
			Detail: fmt.Sprintf("it is registered as %s and cannot become %s: correct the configuration, or use another database", was, is)}
	}
	want := copyOf(cur).(*catalog.KeyManager)
	want.MaxTokenLifetime, want.JWKSURI, want.Algorithms, want.AllowTyp = max(cur.MaxTokenLifetime, k.MaxTokenLifetime), k.JWKSURI, k.Algorithms, k.AllowTyp
	st := &step{op: Update, cur: cur, want: want, reason: "configured"}
	err = b.put(ctx, keyManagers{}, []*step{st})
	return st.want, err
}

func validateIssuer(k *catalog.KeyManager) error {
	target := revocation.Target{Kind: revocation.KindToken, Iss: k.Iss, ID: "any"}
	errs := []error{target.Validate()}
	if k.Name == "" || len(k.Name) > 255 {
		errs = append(errs, fmt.Errorf("name %q: must have 1 to 255 bytes", k.Name))
	}
	const longest = int32(revocation.MaxExpiryAhead / 1e9)
	if k.MaxTokenLifetime < 1 || k.MaxTokenLifetime > longest {
		errs = append(errs, fmt.Errorf("longest token lifetime %d s: must be 1 to %d", k.MaxTokenLifetime, longest))
	}
	return errors.Join(errs...)
}
