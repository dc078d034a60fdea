package catalog

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

// residentName is what WSO2 calls an issuer of one's own.
const residentName = "Resident Key Manager"

// system is who changes what nobody asked for.
var system = Caller{Actor: ledger.Actor{Name: "system"}}

// issuerOf is the iss of a tenant's own key manager. The characters of a domain stand for
// themselves in a path.
func (c Config) issuerOf(t revocation.Tenant) string {
	if t == revocation.SuperTenant {
		return c.Issuer
	}
	return c.Issuer + tenantPath + t.Domain
}

const tenantPath = "/t/"

// noIssuer says why a tenant cannot have an issuer, "" if it can.
func (c Config) noIssuer(t revocation.Tenant) string {
	switch {
	case t.Domain == "." || t.Domain == "..":
		return "must be neither . nor ..: it is a part of the tenant's issuer, which is a URL"
	case len(c.issuerOf(t)) > maxIssuer:
		base := c.Issuer + tenantPath
		return fmt.Sprintf("has %d bytes, must be at most %d: the tenant's issuer is %s and the domain, and has at most %d bytes",
			len(t.Domain), max(0, maxIssuer-len(base)), base, maxIssuer)
	}
	return ""
}

const maxIssuer = 255

// resident is a tenant's own key manager at first.
func (c Config) resident(t revocation.Tenant) *catalog.KeyManager {
	k := &catalog.KeyManager{
		Meta: catalog.Meta{Tenant: t}, Name: residentName, Resident: true, Enabled: true,
		Iss: c.issuerOf(t), MaxTokenLifetime: int32(c.MaxTokenLifetime / time.Second),
	}
	keyManagers{}.complete(k)
	return k
}

// withoutIssuerSQL finds the tenants whose own key manager is not there or not as it should
// be, the super tenant, $1, first. $2 is its iss. A tenant that has not been announced yet would
// come after its issuer in the log.
const withoutIssuerSQL = `
SELECT t.id, t.domain
FROM rescind.tenants t
LEFT JOIN rescind.key_managers k ON k.tenant_id = t.id AND k.resident
WHERE t.ts <> 0 AND (k.id IS NULL OR k.max_token_lifetime < $3
    OR k.iss <> CASE t.id WHEN $1 THEN $2 ELSE $2 || '` + tenantPath + `' || t.domain END COLLATE "C")
ORDER BY t.id <> $1, t.id`

// EnsureIssuers makes the own key managers of tenants that have none: all of a new database,
// later those that processes of the version before made, once they are announced. It raises the MaxTokenLifetime of others
// to Config's; what else they are, callers may have changed. Any number of processes may do it at
// any time; when there is nothing to do, it costs one small query.
//
// A tenant whose place is taken, by an external key manager, stays without, and is warned of
// once. That of the super tenant is an error, a [Conflict] that says what to do: the database
// may belong to another issuer. Nothing is made then.
func (s *Store) EnsureIssuers(ctx context.Context) error {
	if s.cfg.Issuer == "" {
		return nil
	}
	const doing = "make the issuers of tenants: %w"
	super := revocation.SuperTenant
	rows, err := s.pool.Query(ctx, withoutIssuerSQL, super.ID, s.cfg.Issuer, int32(s.cfg.MaxTokenLifetime/time.Second))
	if err != nil {
		return fmt.Errorf(doing, err)
	}
	without, err := pgx.CollectRows(rows, pgx.RowToStructByPos[revocation.Tenant])
	if err != nil {
		return fmt.Errorf(doing, err)
	}
	if len(without) > 0 && without[0] == super {
		if _, err := s.EnsureKeyManager(ctx, *s.cfg.resident(super)); err != nil {
			return err
		}
		without = without[1:]
	}
	for chunk := range slices.Chunk(without, maxEvents) {
		var refused map[revocation.Tenant]string
		_, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) (err error) {
			refused, err = s.newBatch(system, tx).ensureIssuers(ctx, chunk)
			return err
		})
		if err != nil {
			return fmt.Errorf(doing, err)
		}
		for t, why := range refused {
			if _, again := s.warned.LoadOrStore(t.Domain, true); !again {
				s.log.Warn("a tenant has no issuer of its own: clients of it get no tokens here, and all else goes on; remove what is in the way",
					"tenant", t.Domain, "issuer", s.cfg.issuerOf(t), "reason", why)
			}
		}
	}
	return nil
}

// placesSQL finds who has the places of issuers $1, of tenants $2.
const placesSQL = ` WHERE e.iss = ANY($1) OR e.tenant_id = ANY($2) AND (e.resident OR e.name = $3) ORDER BY e.id FOR NO KEY UPDATE OF e`

// ensureIssuers makes what is lacking, and says why it cannot be made for the others.
func (b *batch) ensureIssuers(ctx context.Context, of []revocation.Tenant) (refused map[revocation.Tenant]string, err error) {
	b.system = true
	var w wanted
	for _, t := range of {
		w.domains = append(w.domains, t.Domain)
	}
	if err := b.lock(ctx, w); err != nil {
		return nil, err
	}
	var issuers []string
	var ids []int32
	for _, t := range b.tenants {
		issuers, ids = append(issuers, b.cfg.issuerOf(t)), append(ids, t.ID)
	}
	found, err := b.fetch(ctx, keyManagers{}, placesSQL, issuers, ids, residentName)
	if err != nil {
		return nil, err
	}
	byIss := make(map[string]*catalog.KeyManager)
	inTheWay := make(map[int32]*catalog.KeyManager) // by tenant
	for _, e := range found {
		k := e.(*catalog.KeyManager)
		byIss[k.Iss] = k
		if k.Resident || k.Name == residentName {
			inTheWay[k.Tenant.ID] = k
		}
	}
	refused = make(map[revocation.Tenant]string)
	var made, raised []*step
	for _, t := range of {
		if b.tenants[t.Domain] != t {
			continue // deleted meanwhile
		}
		want := b.cfg.resident(t)
		cur, other := byIss[want.Iss], inTheWay[t.ID]
		switch wrong := b.cfg.noIssuer(t); {
		case wrong != "":
			refused[t] = "its domain " + wrong
		case cur != nil && cur.Resident && cur.Tenant == t:
			want = copyOf(cur).(*catalog.KeyManager)
			want.MaxTokenLifetime = max(cur.MaxTokenLifetime, int32(b.cfg.MaxTokenLifetime/time.Second))
			raised = append(raised, &step{op: Update, cur: cur, want: want, reason: "configured"})
		case cur != nil:
			refused[t] = fmt.Sprintf("key manager %q of tenant %s has this issuer", cur.Name, cur.Tenant.Domain)
		case other != nil:
			refused[t] = fmt.Sprintf("its key manager %q has issuer %s", other.Name, other.Iss)
		default:
			made = append(made, &step{op: Create, want: want, reason: "configured"})
		}
	}
	if len(made) > 0 {
		if err := b.create(ctx, keyManagers{}, made); err != nil {
			return nil, err
		}
	}
	return refused, b.put(ctx, keyManagers{}, raised)
}
