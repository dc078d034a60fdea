package sts

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
)

var operator = ledger.Actor{Name: "system", RequestID: "r-1", Remote: "127.0.0.1"}

func newLedger(t testing.TB, pool *pgxpool.Pool) *ledger.Ledger {
	t.Helper()
	l, err := ledger.New(ledger.Config{Source: iss}, pool, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Start(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return l
}

func newKeys(t testing.TB, pool *pgxpool.Pool, master authn.MasterKey) *Keys {
	t.Helper()
	return NewKeys(pool, newLedger(t, pool), []authn.MasterKey{master})
}

// later lets time pass for all keys.
func later(t testing.TB, pool *pgxpool.Pool, d time.Duration) {
	t.Helper()
	exec(t, pool, `
UPDATE rescind.signing_keys SET created_at = created_at - $1::interval, use_from = use_from - $1::interval,
    retired_at = retired_at - $1::interval, revoked_at = revoked_at - $1::interval`, d)
}

// keyWorld is a server with keys to manage.
type keyWorld struct {
	*testing.T
	pool *pgxpool.Pool
	s    *Server
	keys *Keys
}

func newKeyWorld(t *testing.T) keyWorld {
	t.Helper()
	pool := pgtest.New(t)
	return keyWorld{t, pool, start(t, pool, Config{}), newKeys(t, pool, masterKey(t, "a"))}
}

func (w keyWorld) rotate(r Rotation) []KeyInfo {
	w.Helper()
	if r.Iss == "" {
		r.Iss = iss
	}
	changed, err := w.keys.Rotate(w.Context(), operator, r)
	if err != nil {
		w.Fatal(err)
	}
	return changed
}

// states are those of the keys that w was told of, by kid.
func (w keyWorld) states() map[string]KeyState {
	w.Helper()
	list, err := w.keys.List(w.Context(), "")
	if err != nil {
		w.Fatal(err)
	}
	states := make(map[string]KeyState)
	for _, k := range list {
		states[k.KID] = k.State
	}
	return states
}

// published are the kids that others see.
func (w keyWorld) published() (kids []string) {
	w.Helper()
	if err := w.s.own().reload(w.Context()); err != nil {
		w.Fatal(err)
	}
	var set jose.JSONWebKeySet
	get(w, w.s, jwksPath, nil).decode(w, &set)
	for _, key := range set.Keys {
		kids = append(kids, key.KeyID)
	}
	slices.Sort(kids)
	return kids
}

// META-11: the whole life of a key.
func TestLifeOfAKey(t *testing.T) {
	t.Parallel()
	w := newKeyWorld(t)
	first := signing(t, w.s)
	compact := mint(t, w.s)
	changed := w.rotate(Rotation{Reason: "yearly"})
	next := changed[0].KID
	if len(changed) != 2 || changed[1].KID != first || changed[0].Algorithm != "ES256" || changed[0].Tenant != revocation.SuperTenant {
		t.Fatalf("Rotate = %+v", changed)
	}
	if !changed[1].RetiredAt.Equal(changed[0].UseFrom) || changed[1].PublishedUntil.Sub(changed[1].RetiredAt) != 66*time.Minute+30*time.Second ||
		changed[0].UseFrom.Sub(changed[0].CreatedAt) != 10*time.Minute {
		t.Errorf("Rotate = %+v, want one key to follow the other ten minutes later", changed)
	}
	both := slices.Sorted(slices.Values([]string{first, next}))
	for _, step := range []struct {
		after     time.Duration
		states    [2]KeyState
		signs     string
		published []string
	}{
		{0, [2]KeyState{KeyActive, KeyNext}, first, both},
		{publishedBefore - 5*time.Second, [2]KeyState{KeyActive, KeyNext}, first, both},
		{10 * time.Second, [2]KeyState{KeyRetired, KeyActive}, next, both},
		// The last token under it is signed half a minute later, by a process that read the keys just
		// before, is stamped three minutes ahead, and has an hour and the leeway to go.
		{publishedAfter - 10*time.Second, [2]KeyState{KeyRetired, KeyActive}, next, both},
		{10 * time.Second, [2]KeyState{KeyEnded, KeyActive}, next, []string{next}},
	} {
		later(t, w.pool, step.after)
		want := map[string]KeyState{first: step.states[0], next: step.states[1]}
		if diff := cmp.Diff(want, w.states()); diff != "" {
			t.Errorf("%s later, states (-want +got):\n%s", step.after, diff)
		}
		if got := signing(t, w.s); got != step.signs {
			t.Errorf("%s later, %s signs, want %s", step.after, got, step.signs)
		}
		if diff := cmp.Diff(step.published, w.published()); diff != "" {
			t.Errorf("%s later, published (-want +got):\n%s", step.after, diff)
		}
		var wantErr error
		if step.states[0] == KeyEnded {
			wantErr = token.ErrUnknownKey
		}
		if _, err := verify(t, w.s, compact); !errors.Is(err, wantErr) {
			t.Errorf("%s later, a token of the first key: %v, want %v", step.after, err, wantErr)
		}
	}
	want := []string{"make_signing_key " + next + " yearly", "retire_signing_key " + first + " yearly"}
	if diff := cmp.Diff(want, audited(t, w.pool)); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}

// audited are the actions on keys, with their kids and reasons, in order.
func audited(t testing.TB, pool *pgxpool.Pool) (lines []string) {
	t.Helper()
	rows, err := pool.Query(t.Context(), `
SELECT action || ' ' || subject || ' ' || reason FROM rescind.audit
WHERE iss = $1 AND tenant_id = -1234 AND actor = 'system' AND request_id = 'r-1' AND remote = '127.0.0.1' ORDER BY id`, iss)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var line string
		if err := rows.Scan(&line); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, line)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestKeyStates(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 20, 21, 10, 0, 0, time.UTC)
	at := func(d time.Duration) *time.Time { t := now.Add(d); return &t }
	for _, tt := range []struct {
		useFrom          time.Duration
		retired, revoked *time.Time
		want             KeyState
	}{
		{time.Microsecond, nil, nil, KeyNext},
		{time.Minute, at(time.Hour), nil, KeyNext},
		{0, nil, nil, KeyActive},
		{-time.Hour, at(time.Microsecond), nil, KeyActive},
		{-time.Hour, at(0), nil, KeyRetired},
		{time.Minute, at(0), nil, KeyRetired}, // before it was used
		{-2 * time.Hour, at(time.Microsecond - publishedAfter), nil, KeyRetired},
		{-2 * time.Hour, at(-publishedAfter), nil, KeyEnded},
		{-2 * time.Hour, at(-publishedAfter), at(0), KeyRevoked},
		{time.Minute, nil, at(0), KeyRevoked},
	} {
		row := keyRow{UseFrom: *at(tt.useFrom), RetiredAt: tt.retired, RevokedAt: tt.revoked, Now: now}
		if got := row.state(); got != tt.want {
			t.Errorf("used from %s, retired %v, revoked %v: %s, want %s", tt.useFrom, tt.retired, tt.revoked, got, tt.want)
		}
	}
}

func TestRotateTwice(t *testing.T) {
	t.Parallel()
	w := newKeyWorld(t)
	next := w.rotate(Rotation{})[0].KID
	before := w.states()
	_, err := w.keys.Rotate(t.Context(), operator, Rotation{Iss: iss})
	if !errors.Is(err, ErrNextKey) || !strings.Contains(err.Error(), next) {
		t.Errorf("rotating again: %v, want %v with its kid", err, ErrNextKey)
	}
	if diff := cmp.Diff(before, w.states()); diff != "" {
		t.Errorf("rotating again changes:\n%s", diff)
	}
	later(t, w.pool, publishedBefore)
	changed := w.rotate(Rotation{Algorithm: "ES256"})
	if len(changed) != 2 || changed[1].KID != next || changed[1].State != KeyActive {
		t.Errorf("rotating ten minutes later = %+v, want %s replaced", changed, next)
	}
}

// A rotation is taken back by retiring its key, and then those that were there go on.
func TestRetire(t *testing.T) {
	t.Parallel()
	w := newKeyWorld(t)
	first := signing(t, w.s)
	retire := func(kid string, want error) KeyInfo {
		t.Helper()
		k, err := w.keys.Retire(t.Context(), operator, kid, "why")
		if !errors.Is(err, want) {
			t.Fatalf("Retire = %v, want %v", err, want)
		}
		return k
	}
	retire("nobody", ErrNoKey)
	retire(first, ErrLastKey)
	next := w.rotate(Rotation{})[0].KID
	retire(first, ErrLastKey) // it still is
	if k := retire(next, nil); k.State != KeyRetired || k.KID != next || k.PublishedUntil.IsZero() {
		t.Errorf("Retire = %+v", k)
	}
	later(t, w.pool, 2*publishedBefore)
	if diff := cmp.Diff(map[string]KeyState{first: KeyActive, next: KeyRetired}, w.states()); diff != "" {
		t.Errorf("a rotation that was taken back (-want +got):\n%s", diff)
	}
	retire(next, ErrNoKey)

	// Of two in use, either may go, once.
	exec(t, w.pool, `UPDATE rescind.signing_keys SET retired_at = NULL`)
	if k := retire(first, nil); k.State != KeyRetired {
		t.Errorf("Retire = %+v", k)
	}
	retire(next, ErrLastKey)
	if got := signing(t, w.s); got != next {
		t.Errorf("%s signs, want %s", got, next)
	}
	want := []string{
		"make_signing_key " + next + " ", "retire_signing_key " + first + " ",
		"retire_signing_key " + next + " why", "keep_signing_key " + first + " why", "retire_signing_key " + first + " why",
	}
	if diff := cmp.Diff(want, audited(t, w.pool)); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}

// META-12: a key that is withdrawn is dead, and another signs at once.
func TestCompromised(t *testing.T) {
	t.Parallel()
	w := newKeyWorld(t)
	first := signing(t, w.s)
	compact := mint(t, w.s)
	next := w.rotate(Rotation{})[0].KID
	changed := w.rotate(Rotation{Compromised: first, Reason: "stolen"})
	now := changed[0].KID
	want := map[string]KeyState{now: KeyActive, first: KeyRevoked, next: KeyRetired}
	got := make(map[string]KeyState)
	for _, k := range changed {
		got[k.KID] = k.State
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Rotate (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want, w.states()); diff != "" {
		t.Errorf("List (-want +got):\n%s", diff)
	}
	if got := signing(t, w.s); got != now {
		t.Errorf("%s signs, want %s", got, now)
	}
	if kids := w.published(); slices.Contains(kids, first) || !slices.Contains(kids, now) {
		t.Errorf("published are %q, want %s among them and not %s", kids, now, first)
	}
	if _, err := verify(t, w.s, compact); !errors.Is(err, token.ErrUnknownKey) {
		t.Errorf("a token of the withdrawn key: %v, want %v", err, token.ErrUnknownKey)
	}

	events, err := newLedger(t, w.pool).After(t.Context(), 0, 10)
	if err != nil || len(events) != 1 {
		t.Fatalf("events are %+v, %v, want one", events, err)
	}
	r, err := events[0].Revocation()
	if err != nil {
		t.Fatal(err)
	}
	ahead := time.Until(time.Unix(r.Exp, 0))
	if r.Target != (revocation.Target{Kind: revocation.KindKey, Iss: iss, ID: first}) || r.Reason != "stolen" || r.Tenant != revocation.SuperTenant ||
		ahead > keyRevocation || ahead < keyRevocation-time.Hour {
		t.Errorf("revocation is %+v", r)
	}
	for kid, want := range map[string]error{first: ErrNoKey, "nobody": ErrNoKey} {
		if _, err := w.keys.Rotate(t.Context(), operator, Rotation{Iss: iss, Compromised: kid}); !errors.Is(err, want) {
			t.Errorf("Rotate for %s: %v, want %v", kid, err, want)
		}
		if _, err := w.keys.Retire(t.Context(), operator, kid, ""); !errors.Is(err, want) {
			t.Errorf("Retire of %s: %v, want %v", kid, err, want)
		}
	}

	changed = w.rotate(Rotation{Compromised: AllKeys, Reason: "all"})
	if got := changed[0]; len(changed) != 3 || got.State != KeyActive || got.KID == now {
		t.Errorf("Rotate for all = %+v, want a new key and two that are withdrawn", changed)
	}
	if diff := cmp.Diff([]string{changed[0].KID}, w.published()); diff != "" {
		t.Errorf("published (-want +got):\n%s", diff)
	}
	lines := audited(t, w.pool)
	for _, want := range []string{
		"withdraw_signing_key " + first + " stolen", "revoke_key " + first + " stolen", "retire_signing_key " + next + " stolen",
		"withdraw_signing_key " + now + " all", "revoke_key " + next + " all",
	} {
		if !slices.Contains(lines, want) {
			t.Errorf("audit lacks %q: %q", want, lines)
		}
	}
}

// revokeKey revokes a key by itself, as the API does.
func revokeKey(t testing.TB, pool *pgxpool.Pool, iss, kid string) {
	t.Helper()
	_, err := newLedger(t, pool).Change(t.Context(), func(_ context.Context, tx *ledger.Tx) error {
		tx.Revoke(ledger.Request{
			Target: revocation.Target{Kind: revocation.KindKey, Iss: iss, ID: kid}, Tenant: revocation.SuperTenant,
			Exp: time.Now().Add(keyRevocation).Unix(), Action: "revoke_key", Actor: operator,
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A key that is revoked by itself counts as withdrawn, for ever.
func TestKeyRevokedByItself(t *testing.T) {
	t.Parallel()
	w := newKeyWorld(t)
	first := signing(t, w.s)
	revokeKey(t, w.pool, "https://far.example", first) // another issuer's key of this name
	if got := signing(t, w.s); got != first {
		t.Errorf("%s signs, want %s, which is not revoked", got, first)
	}
	revokeKey(t, w.pool, iss, first)
	list, err := w.keys.List(t.Context(), iss)
	if err != nil || len(list) != 1 || list[0].State != KeyRevoked || list[0].RevokedAt.IsZero() || !list[0].PublishedUntil.Equal(list[0].RevokedAt) {
		t.Errorf("List = %+v, %v, want a revoked key", list, err)
	}
	if _, err := w.keys.Retire(t.Context(), operator, first, ""); !errors.Is(err, ErrNoKey) {
		t.Errorf("Retire = %v, want %v", err, ErrNoKey)
	}
	if _, err := w.keys.Rotate(t.Context(), operator, Rotation{Iss: iss, Compromised: first}); !errors.Is(err, ErrNoKey) {
		t.Errorf("Rotate = %v, want %v", err, ErrNoKey)
	}

	// A plain rotation then is at once, with the same algorithm.
	changed := w.rotate(Rotation{})
	if len(changed) != 2 || changed[0].State != KeyActive || changed[0].Algorithm != "ES256" || changed[1].KID != first || changed[1].State != KeyRevoked {
		t.Fatalf("Rotate = %+v, want a key that signs and one that is revoked", changed)
	}
	second := changed[0].KID
	if got := signing(t, w.s); got != second {
		t.Errorf("%s signs, want %s", got, second)
	}
	if diff := cmp.Diff([]string{second}, w.published()); diff != "" {
		t.Errorf("published (-want +got):\n%s", diff)
	}

	// One that is to take over is revoked: what it was to replace goes on until the next one does.
	third := w.rotate(Rotation{})[0].KID
	revokeKey(t, w.pool, iss, third)
	later(t, w.pool, time.Minute)
	fourth := w.rotate(Rotation{})[0]
	list, err = w.keys.List(t.Context(), iss)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range list {
		if k.KID == second && !k.RetiredAt.Equal(fourth.UseFrom) {
			t.Errorf("%s signs until %s, want until %s", second, k.RetiredAt, fourth.UseFrom)
		}
	}

	// The revocation ends some day, the withdrawal does not.
	exec(t, w.pool, `UPDATE rescind.revocations SET exp = 1`)
	want := map[string]KeyState{first: KeyRevoked, second: KeyActive, third: KeyRevoked, fourth.KID: KeyNext}
	if diff := cmp.Diff(want, w.states()); diff != "" {
		t.Errorf("without the revocations (-want +got):\n%s", diff)
	}
}

// A service whose only key is revoked makes another at once, also beside one that is to be used later.
func TestOnlyKeyRevoked(t *testing.T) {
	t.Parallel()
	for _, next := range []bool{false, true} {
		w := newKeyWorld(t)
		first := signing(t, w.s)
		kids := []string{first}
		if next {
			kids = append(kids, w.rotate(Rotation{})[0].KID)
		}
		revokeKey(t, w.pool, iss, first)
		now := signing(t, w.s)
		if slices.Contains(kids, now) {
			t.Errorf("%s signs, want a new key", now)
		}
		want := slices.Sorted(slices.Values(append(kids[1:], now)))
		if diff := cmp.Diff(want, w.published()); diff != "" {
			t.Errorf("published (-want +got):\n%s", diff)
		}
		start(t, w.pool, Config{})
		if n := count(t, w.pool, `SELECT count(*) FROM rescind.signing_keys WHERE revoked_at IS NULL`); n != len(want) {
			t.Errorf("%d keys are not withdrawn, want %d", n, len(want))
		}
	}
}

// Whoever withdraws a key without which others can sign leaves these alone.
func TestCompromisedKeyThatDoesNotSign(t *testing.T) {
	t.Parallel()
	w := newKeyWorld(t)
	first := signing(t, w.s)
	second := w.rotate(Rotation{})[0].KID

	// It is to take over: then it does not, and the one that it was to replace goes on.
	changed := w.rotate(Rotation{Compromised: second, Reason: "next"})
	if len(changed) != 2 || changed[0].KID != second || changed[0].State != KeyRevoked || changed[1].KID != first || !changed[1].RetiredAt.IsZero() {
		t.Errorf("Rotate for a next key = %+v, want it withdrawn and %s kept", changed, first)
	}
	third := w.rotate(Rotation{})[0].KID
	later(t, w.pool, 2*publishedBefore)

	// It signs no more.
	changed = w.rotate(Rotation{Compromised: first, Reason: "retired"})
	if len(changed) != 1 || changed[0].KID != first || changed[0].State != KeyRevoked {
		t.Errorf("Rotate for a retired key = %+v, want it withdrawn", changed)
	}
	want := map[string]KeyState{first: KeyRevoked, second: KeyRevoked, third: KeyActive}
	if diff := cmp.Diff(want, w.states()); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
	if got := signing(t, w.s); got != third {
		t.Errorf("%s signs, want %s", got, third)
	}
	if n := count(t, w.pool, `SELECT count(*) FROM rescind.revocations WHERE kind = 'key' AND ident = ANY($1)`, []string{first, second}); n != 2 {
		t.Errorf("%d keys are revoked, want 2", n)
	}

	// All are all that can matter: of one that ended long ago no token lives.
	fourth := w.rotate(Rotation{})[0].KID
	later(t, w.pool, publishedBefore+publishedAfter)
	changed = w.rotate(Rotation{Compromised: AllKeys})
	if len(changed) != 2 || changed[0].State != KeyActive || changed[1].KID != fourth {
		t.Errorf("Rotate for all = %+v, want a new key, and %s withdrawn", changed, fourth)
	}
	if got := w.states()[third]; got != KeyEnded {
		t.Errorf("a key that ended is %s after all others were withdrawn", got)
	}
	if !slices.Contains(audited(t, w.pool), "keep_signing_key "+first+" next") {
		t.Errorf("audit is %q, want %s kept", audited(t, w.pool), first)
	}
}

func TestRotateRefuses(t *testing.T) {
	t.Parallel()
	w := newKeyWorld(t)
	if _, err := w.keys.Rotate(t.Context(), operator, Rotation{Iss: "https://far.example", Algorithm: "ES256"}); !errors.Is(err, ErrNoIssuer) {
		t.Errorf("of an issuer that is not ours: %v, want %v", err, ErrNoIssuer)
	}
	if _, err := w.keys.Rotate(t.Context(), operator, Rotation{Iss: iss, Algorithm: "HS256"}); err == nil || !strings.Contains(err.Error(), "HS256") {
		t.Errorf("of another algorithm: %v, want it refused", err)
	}
	if lines := audited(t, w.pool); len(lines) != 0 {
		t.Errorf("audit has %q", lines)
	}
}

// What is published has nothing private in it, and names keys by their thumbprints.
func TestPublishedKeys(t *testing.T) {
	t.Parallel()
	w := newKeyWorld(t)
	w.rotate(Rotation{Algorithm: "RS256"})
	w.published()
	var set struct{ Keys []map[string]any }
	answer := get(t, w.s, jwksPath, nil)
	answer.decode(t, &set)
	members := map[string][]string{
		"RSA": {"alg", "e", "kid", "kty", "n", "use"}, "EC": {"alg", "crv", "kid", "kty", "use", "x", "y"},
	}
	kids := make(map[string]bool)
	for _, key := range set.Keys {
		var names []string
		for name := range key {
			names = append(names, name)
		}
		slices.Sort(names)
		if diff := cmp.Diff(members[key["kty"].(string)], names); diff != "" {
			t.Errorf("members of a key (-want +got):\n%s", diff)
		}
		kids[key["kid"].(string)] = true
	}
	var jose jose.JSONWebKeySet
	answer.decode(t, &jose)
	for _, key := range jose.Keys {
		if kid, err := thumbprint(key); err != nil || kid != key.KeyID {
			t.Errorf("kid is %s, want the thumbprint %s (%v)", key.KeyID, kid, err)
		}
	}
	if len(kids) != 2 {
		t.Errorf("%d kids, want 2", len(kids))
	}
}
