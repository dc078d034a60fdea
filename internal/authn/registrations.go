package authn

import (
	"context"
	"fmt"
	"iter"

	"github.com/jackc/pgx/v5"
)

const registrationsSQL = `
SELECT client_id, auth_method, scopes, default_scopes, audience,
       coalesce(token_lifetime, 0), revoke_by_jti, revoke_opaque, coalesce(revoke_quota, 0),
       coalesce(jwks::text, ''), grant_types, token_typ, resource_audiences
FROM rescind.clients
ORDER BY client_id`

// ReadRegistrations yields what every client is registered with, as tx sees it, without
// its secrets. What [Registration] has a default for is there.
func ReadRegistrations(ctx context.Context, tx pgx.Tx) iter.Seq2[Registration, error] {
	return func(yield func(Registration, error) bool) {
		rows, err := tx.Query(ctx, registrationsSQL)
		if err != nil {
			yield(Registration{}, fmt.Errorf("read clients: %w", err))
			return
		}
		defer rows.Close()
		for rows.Next() {
			var r Registration
			err := rows.Scan(&r.ID, &r.AuthMethod, &r.Scopes, &r.DefaultScopes, &r.Audience,
				&r.TokenLifetime, &r.RevokeByJTI, &r.RevokeOpaque, &r.RevokeQuota,
				&r.JWKS, &r.GrantTypes, &r.TokenTyp, &r.ResourceAudiences)
			if err == nil && r.JWKS != "" {
				r.JWKS, err = canonicalJSON(r.JWKS)
			}
			if err != nil {
				yield(Registration{}, fmt.Errorf("read clients: %w", err))
				return
			}
			if !yield(r, nil) {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(Registration{}, fmt.Errorf("read clients: %w", err))
		}
	}
}
