package sts

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/revocation"
)

// residentName is what WSO2 calls an issuer of one's own.
const residentName = "Resident Key Manager"

// Registration is what the database keeps of an issuer. Where its keys are is a
// matter of configuration.
type Registration struct {
	// Iss is compared with that of tokens byte for byte.
	Iss string
	// Name is unique in its tenant. Default "Resident Key Manager" for our own.
	Name string
	// Tenant is the domain of the tenant that it belongs to, for ever. Default
	// carbon.super.
	Tenant string
	// MaxTokenLifetime is the longest from iat to exp of its tokens, in whole
	// seconds: revocations of more than one token are kept that long. For our own
	// it is [MaxTokenLifetime].
	MaxTokenLifetime time.Duration
	// Resident is an issuer of our own, at most one for each tenant.
	Resident bool
}

// RegisterIssuer adds an issuer to the database, or changes its name or raises
// its longest token lifetime, and returns its tenant. A lower lifetime is an
// error: revocations made with it would end before the tokens of the time before.
func RegisterIssuer(ctx context.Context, pool *pgxpool.Pool, r Registration) (revocation.Tenant, error) {
	registered, err := register(ctx, pool, r)
	return registered.tenant, err
}

// Issuers returns the iss of every issuer that the database knows.
func Issuers(ctx context.Context, pool *pgxpool.Pool) ([]string, error) {
	rows, err := pool.Query(ctx, `SELECT iss FROM rescind.key_managers ORDER BY id`)
	if err != nil {
		return nil, fmt.Errorf("read issuers: %w", err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("read issuers: %w", err)
	}
	return all, nil
}

type registered struct {
	id     int32
	tenant revocation.Tenant
}

const tenantSQL = `SELECT id FROM rescind.tenants WHERE domain = $1`

const insertIssuerSQL = `
INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime)
VALUES ($1, $2, $3, $4, $5)
ON CONFLICT DO NOTHING
RETURNING id`

const issuerSQL = `
SELECT k.id, k.name, k.resident, k.max_token_lifetime, t.domain
FROM rescind.key_managers k JOIN rescind.tenants t ON t.id = k.tenant_id
WHERE k.iss = $1
FOR UPDATE OF k`

const updateIssuerSQL = `
UPDATE rescind.key_managers SET name = $2, max_token_lifetime = $3
WHERE id = $1 AND (name, max_token_lifetime) <> ($2, $3)`

// issuerInTheWaySQL finds what else has the place that an issuer wants.
const issuerInTheWaySQL = `
SELECT iss, resident AND $2 AS resident
FROM rescind.key_managers
WHERE tenant_id = $1 AND iss <> $4 AND (resident AND $2 OR name = $3)
ORDER BY 2 DESC
LIMIT 1`

func register(ctx context.Context, pool *pgxpool.Pool, r Registration) (registered, error) {
	if r.Tenant == "" {
		r.Tenant = revocation.SuperTenant.Domain
	}
	if r.Resident {
		r.MaxTokenLifetime = MaxTokenLifetime
		if r.Name == "" {
			r.Name = residentName
		}
	}
	seconds := int32(r.MaxTokenLifetime / time.Second)
	done := registered{tenant: revocation.Tenant{Domain: r.Tenant}}
	err := r.validate()
	if err == nil {
		err = pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
			err := tx.QueryRow(ctx, tenantSQL, r.Tenant).Scan(&done.tenant.ID)
			if errors.Is(err, pgx.ErrNoRows) {
				return fmt.Errorf("there is no tenant %q: add it first, or correct its domain", r.Tenant)
			}
			if err != nil {
				return err
			}
			err = tx.QueryRow(ctx, insertIssuerSQL, done.tenant.ID, r.Name, r.Resident, r.Iss, seconds).Scan(&done.id)
			if !errors.Is(err, pgx.ErrNoRows) {
				return err
			}
			done.id, err = update(ctx, tx, r, seconds, done.tenant.ID)
			return err
		})
	}
	if err != nil {
		return registered{}, fmt.Errorf("register issuer %q: %w", r.Iss, err)
	}
	return done, nil
}

func (r Registration) validate() error {
	var errs []error
	target := revocation.Target{Kind: revocation.KindToken, Iss: r.Iss, ID: "any"}
	errs = append(errs, target.Validate())
	if r.Name == "" || len(r.Name) > 255 {
		errs = append(errs, fmt.Errorf("name %q: must have 1 to 255 bytes", r.Name))
	}
	if r.MaxTokenLifetime < time.Second || r.MaxTokenLifetime > revocation.MaxExpiryAhead || r.MaxTokenLifetime%time.Second != 0 {
		errs = append(errs, fmt.Errorf("longest token lifetime %s: must be whole seconds, 1s to %s",
			r.MaxTokenLifetime, revocation.MaxExpiryAhead))
	}
	return errors.Join(errs...)
}

// update makes the row of an issuer that could not be inserted as r says.
func update(ctx context.Context, tx pgx.Tx, r Registration, seconds, tenantID int32) (int32, error) {
	var (
		id, oldSeconds  int32
		oldName, domain string
		resident        bool
	)
	err := tx.QueryRow(ctx, issuerSQL, r.Iss).Scan(&id, &oldName, &resident, &oldSeconds, &domain)
	known := !errors.Is(err, pgx.ErrNoRows)
	switch {
	case known && err != nil:
		return 0, err
	case known && domain != r.Tenant:
		return 0, fmt.Errorf("it belongs to tenant %q and cannot go to %q: name its own tenant", domain, r.Tenant)
	case known && resident != r.Resident:
		was, is := "an external issuer", "our own"
		if resident {
			was, is = is, was
		}
		return 0, fmt.Errorf("it is registered as %s and cannot become %s: correct the configuration, or use another database", was, is)
	case known && oldSeconds > seconds:
		return 0, fmt.Errorf("its longest token lifetime is %d s and cannot become %d s while tokens of before live: "+
			"go on with %d s; once it has made no longer ones for that long, lower it in its row of rescind.key_managers first",
			oldSeconds, seconds, oldSeconds)
	}

	if !known || oldName != r.Name {
		var other string
		var otherResident bool
		err := tx.QueryRow(ctx, issuerInTheWaySQL, tenantID, r.Resident, r.Name, r.Iss).Scan(&other, &otherResident)
		switch {
		case errors.Is(err, pgx.ErrNoRows) && known:
		case err != nil:
			return 0, err
		case otherResident:
			return 0, fmt.Errorf("the database belongs to issuer %q: configure that one (RESCIND_ISSUER), or use another database", other)
		default:
			return 0, fmt.Errorf("tenant %q has an issuer named %q already, %q: choose another name", r.Tenant, r.Name, other)
		}
	}
	_, err = tx.Exec(ctx, updateIssuerSQL, id, r.Name, seconds)
	return id, err
}
