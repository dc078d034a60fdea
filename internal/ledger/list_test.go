package ledger

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/pgtest"
)

func TestList(t *testing.T) {
	t.Parallel()
	l := open(t, keyManagers(t), Config{})
	other := ending(revocation.KindSubject, otherIss, "a")
	over := request("over")
	over.Exp = time.Now().Unix() - 730
	digest := request("")
	digest.Target = revocation.DigestTarget(externalIss, "opaque")
	digest.Tenant = otherTenant
	for _, r := range []Request{
		request("a"), ending(revocation.KindClient, iss, "a"), other, digest, ending(revocation.KindTenant, "", otherTenant.Domain), request("b"), over,
	} { // one by one, so that their ids are in this order
		if _, err := l.commit(t.Context(), []Request{r}); err != nil {
			t.Fatal(err)
		}
	}
	later := request("a")
	later.Exp++
	if _, err := l.commit(t.Context(), []Request{later}); err != nil {
		t.Fatal(err)
	}
	all := []string{"token a 8", "client a 2", "subject a 3", "token " + digest.Target.ID + " 4", "tenant a.example 5", "token b 6"}
	pick := func(of ...int) (some []string) {
		for _, i := range of {
			some = append(some, all[i])
		}
		return some
	}
	for name, tt := range map[string]struct {
		filter ListFilter
		want   []string
	}{
		"all":                   {ListFilter{}, all},
		"empty lists":           {ListFilter{Tenants: []string{}, Iss: []string{}}, all},
		"a tenant":              {ListFilter{Tenants: []string{"a.example"}}, pick(2, 3, 4)},
		"two tenants":           {ListFilter{Tenants: []string{"a.example", "carbon.super"}}, all},
		"no such tenant":        {ListFilter{Tenants: []string{"b.example"}}, nil},
		"a kind":                {ListFilter{Kind: revocation.KindToken}, pick(0, 3, 5)},
		"an issuer":             {ListFilter{Iss: []string{iss}}, pick(0, 1, 5)},
		"two issuers":           {ListFilter{Iss: []string{otherIss, externalIss}}, pick(2, 3)},
		"an id":                 {ListFilter{ID: "a"}, pick(0, 1, 2)},
		"an id of a kind":       {ListFilter{ID: "a", Kind: revocation.KindClient}, pick(1)},
		"an id of an issuer":    {ListFilter{ID: "a", Iss: []string{otherIss}}, pick(2)},
		"an id within a tenant": {ListFilter{ID: "a", Tenants: []string{"carbon.super"}}, pick(0, 1)},
		"a digest":              {ListFilter{ID: digest.Target.ID}, pick(3)},
		"a tenant's own":        {ListFilter{ID: otherTenant.Domain}, pick(4)},
		"all at once":           {ListFilter{Tenants: []string{"carbon.super"}, Kind: revocation.KindToken, Iss: []string{iss}, ID: "b"}, pick(5)},
		"nothing":               {ListFilter{Kind: revocation.KindKey}, nil},
	} {
		for _, limit := range []int{1, 4, 100} {
			var got []string
			for after := ""; ; {
				page, err := l.List(t.Context(), tt.filter, after, limit)
				if err != nil {
					t.Fatal(name, err)
				}
				for _, s := range page {
					got = append(got, fmt.Sprintf("%s %s %d", s.Target.Kind, s.Target.ID, s.Seq))
				}
				if len(page) < limit {
					break
				}
				after = page[len(page)-1].ID
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("%s, in pages of %d (-want +got):\n%s", name, limit, diff)
			}
		}
	}

	page, err := l.List(t.Context(), ListFilter{ID: "a", Kind: revocation.KindToken}, "", 1)
	if err != nil || len(page) != 1 {
		t.Fatalf("%+v, %v", page, err)
	}
	got, ok, err := l.Get(t.Context(), page[0].ID)
	if diff := cmp.Diff(page[0], got); diff != "" || !ok || err != nil {
		t.Errorf("Get: %t, %v (-listed +got):\n%s", ok, err, diff)
	}
	if got.Exp != leap+1 || got.Tenant != revocation.SuperTenant || got.At.IsZero() || got.Reason != "client" {
		t.Errorf("Get: %+v", got)
	}
	var gone string
	if err := l.pool.QueryRow(t.Context(), `SELECT id::text FROM rescind.revocations WHERE ident = 'over'`).Scan(&gone); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{gone, uuid.NewString(), "x", ""} {
		if got, ok, err := l.Get(t.Context(), id); ok || err != nil {
			t.Errorf("Get %q: %+v, %v", id, got, err)
		}
	}
}

func TestAuditPage(t *testing.T) {
	t.Parallel()
	l := open(t, pgtest.New(t), Config{})
	entries := []AuditEntry{
		{Tenant: revocation.SuperTenant, Action: "revoke_token", EntityID: uuid.NewString(), Iss: iss, Subject: "a", Reason: "lost",
			Actor: Actor{Name: "client:c1", RequestID: "r-1", Remote: "192.0.2.1"}},
		{Tenant: revocation.SuperTenant, Action: "revoke_client", Iss: iss, Subject: "c1", Actor: Actor{Name: "account:admin", RequestID: "r-2"}},
		{Tenant: revocation.Tenant{ID: 4711}, Action: "revoke_client", Iss: externalIss, Subject: "c1", Actor: Actor{Name: "system"}},
	}
	for _, e := range entries {
		if err := l.Audit(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	newest, err := l.AuditPage(t.Context(), AuditFilter{}, 0, 10)
	if err != nil || len(newest) != len(entries) {
		t.Fatalf("%+v, %v", newest, err)
	}
	for i, r := range newest {
		if diff := cmp.Diff(entries[len(entries)-1-i], r.AuditEntry); diff != "" {
			t.Errorf("record %d (-want +got):\n%s", i, diff)
		}
	}
	middle := newest[1].At
	for name, tt := range map[string]struct {
		filter AuditFilter
		want   []int // of entries
	}{
		"all":              {AuditFilter{Tenants: []string{}}, []int{2, 1, 0}},
		"tenant":           {AuditFilter{Tenants: []string{"carbon.super", "x"}}, []int{1, 0}},
		"actor":            {AuditFilter{Actor: "account:admin"}, []int{1}},
		"action":           {AuditFilter{Action: "revoke_client"}, []int{2, 1}},
		"subject":          {AuditFilter{Subject: "c1"}, []int{2, 1}},
		"subject and iss":  {AuditFilter{Subject: "c1", Iss: iss}, []int{1}},
		"entity":           {AuditFilter{EntityID: entries[0].EntityID}, []int{0}},
		"no entity's id":   {AuditFilter{EntityID: "x"}, nil},
		"request":          {AuditFilter{RequestID: "r-1"}, []int{0}},
		"from":             {AuditFilter{From: middle}, []int{2, 1}},
		"to":               {AuditFilter{To: middle}, []int{0}},
		"from and to":      {AuditFilter{From: middle, To: middle.Add(time.Microsecond)}, []int{1}},
		"nothing":          {AuditFilter{Actor: "account:nobody"}, nil},
		"an empty account": {AuditFilter{Actor: "account:"}, nil},
	} {
		var got []int
		for before := int64(0); ; {
			page, err := l.AuditPage(t.Context(), tt.filter, before, 2)
			if err != nil {
				t.Fatal(name, err)
			}
			for _, r := range page {
				got = append(got, int(r.ID-newest[2].ID))
			}
			if len(page) < 2 {
				break
			}
			before = page[1].ID
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}
