package ledger

import (
	"testing"

	"github.com/google/uuid"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/pgtest"
)

// TestActOn: a token is ended by the first act that is about it, however often the revocation is renewed.
func TestActOn(t *testing.T) {
	t.Parallel()
	db := pgtest.Create(t)
	l, owner := open(t, pgtest.Pool(t, db.ServiceURL), Config{}), pgtest.Pool(t, db.OwnerURL)
	commit := func(r Request) Result {
		t.Helper()
		results, err := l.commit(t.Context(), []Request{r})
		if err != nil {
			t.Fatal(err)
		}
		return results[0]
	}
	commit(request("before"))
	client := ending(revocation.KindClient, iss, "c")
	var acts []Result
	for _, notAfter := range []int64{1000, 1000, 2000, 3000} {
		client.NotAfter = notAfter
		client.Exp++
		acts = append(acts, commit(client))
	}
	longer := request("t")
	once := commit(longer)
	longer.Exp++
	commit(longer)

	check := func(when, id string, iat int64, want *Result, first bool) {
		t.Helper()
		a, ok, err := l.ActOn(t.Context(), id, iat)
		if err != nil || ok != (want != nil) || ok && (a.Seq != want.Seq || a.First != first || a.At.IsZero()) {
			t.Errorf("%s, iat %d: %+v, %t, %v", when, iat, a, ok, err)
		}
	}
	id := acts[0].ID
	check("all there", id, 900, &acts[0], true)
	check("all there", id, 1000, &acts[0], true)
	check("all there", id, 1001, &acts[2], false)
	check("all there", id, 3000, &acts[3], false)
	check("all there", id, 3001, nil, false)
	check("a kind without a time", once.ID, 0, &once, true)
	check("nothing has this id", uuid.NewString(), 0, nil, false)
	check("this is no id", "x", 0, nil, false)

	remove := func(upTo revocation.Seq) {
		t.Helper()
		if _, err := owner.Exec(t.Context(), `DELETE FROM rescind.log WHERE seq <= $1`, upTo); err != nil {
			t.Fatal(err)
		}
	}
	remove(acts[0].Seq)
	check("the first is gone", id, 900, nil, false)
	check("the first is gone", id, 1500, &acts[2], false)
	remove(acts[2].Seq)
	check("three are gone", id, 1500, nil, false)
	check("three are gone", id, 2500, nil, false)
	check("older ones are there", once.ID, 0, &once, true)
	remove(acts[3].Seq)
	check("all are gone", id, 3000, nil, false)
}
