package catalog

import (
	"fmt"
	"testing"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/internal/pgtest"
)

func TestStatementsPrepare(t *testing.T) {
	t.Parallel()
	statements := []string{
		lockSQL, givenIDsLockSQL, announceLockSQL, tenantsInUseSQL, policiesInUseSQL, scopesInUseSQL, apisInUseSQL, keyManagersInUseSQL,
		readPoliciesSQL + unlimitedSQL, existingPoliciesSQL, existingScopesSQL, applicationsSQL, referredAPIsSQL, keyManagersSQL, keysOfSQL,
		readSubscriptionsSQL + subscriptionsOfSQL, readKeyMappingsSQL + keyMappingsOfSQL, readSubscriptionsSQL + blockedOtherwiseSQL, heldSQL,
		inTheWaySQL, keyManagerOfSQL, withoutIssuerSQL, takenIssuersSQL, deleteSigningKeysSQL,
		readKeyManagersSQL + placesSQL, readKeyManagersSQL + residentsSQL, oursAboveSQL, anyUnannouncedSQL(),
	}
	full := Filter{Tenant: "t", Name: "n", Kind: "k", Application: "a", API: "i", ConsumerKey: "c"}
	for _, n := range catalog.Nouns {
		k := kindOf(n)
		s := k.sql()
		statements = append(statements, s.read, s.insert, s.read+unannouncedSQL,
			fmt.Sprintf(moveSequenceSQL, s.sequence), fmt.Sprintf(makeIDsSQL, s.sequence, s.table), fmt.Sprintf(announcedSQL, s.table))
		if s.update != "" {
			statements = append(statements, s.update)
		}
		for _, p := range k.unique(catalog.New(n)) {
			statements = append(statements, p.query(k))
		}
		clause, args := afterSQL, 2
		for _, part := range full.parts(n) {
			if part.condition != "" {
				args++
				clause += ` AND ` + fmt.Sprintf(part.condition, args)
			}
		}
		statements = append(statements, s.read+clause+orderedSQL)
	}
	conn, err := pgtest.New(t).Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	for i, sql := range statements {
		if _, err := conn.Conn().Prepare(t.Context(), fmt.Sprint("s", i), sql); err != nil {
			t.Errorf("%v:\n%s", err, sql)
		}
	}
}
