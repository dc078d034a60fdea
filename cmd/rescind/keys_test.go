package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/internal/sts"
)

func TestKeysUsage(t *testing.T) {
	t.Parallel()
	w := newOfflineWorld(t)
	for _, tt := range []struct {
		code   int
		stderr string
		words  string
		flags  []string
	}{
		{2, "say what to do: list, rotate or retire KID", "keys", nil},
		{2, `"drop" is none of list, rotate and retire KID`, "keys drop", nil},
		{2, "list takes no argument", "keys list k1", nil},
		{2, "retire takes the kid of one key", "keys retire", nil},
		{2, "--yes is for rotate, not for retire", "keys retire k1", []string{"--yes"}},
		{2, "--iss is for list and rotate, not for retire", "keys retire k1", []string{"--iss", "https://i"}},
		{2, "--compromised has nothing in it", "keys rotate", []string{"--compromised", ""}},
		{2, `--algorithm is "HS256": it must be RS256 or ES256`, "keys rotate", []string{"--algorithm", "HS256"}},
		{1, "rescind keys: ", "keys list", nil}, // no database
	} {
		code, stdout, stderr := w.run(tt.words, tt.flags...)
		if code != tt.code || stdout != "" || !strings.Contains(stderr, tt.stderr) {
			t.Errorf("%s %q: status %d, want %d\nstdout: %s\nstderr: %s", tt.words, tt.flags, code, tt.code, stdout, stderr)
		}
	}
}

func TestTellKeys(t *testing.T) {
	t.Parallel()
	const iss = "https://i"
	for _, tt := range []struct {
		key  sts.KeyInfo
		want string
	}{
		{sts.KeyInfo{State: sts.KeyNext, UseFrom: at.Add(10 * time.Minute)}, "is published, and signs from 12:10:00 UTC."},
		{sts.KeyInfo{State: sts.KeyNext, UseFrom: at.Add(13 * time.Hour)}, "is published, and signs from 2026-07-02 01:00:00 UTC."},
		{sts.KeyInfo{State: sts.KeyActive, UseFrom: at}, "signs."},
		{sts.KeyInfo{State: sts.KeyActive, RetiredAt: at.Add(10 * time.Minute), PublishedUntil: at.Add(time.Hour)},
			"signs until 12:10:00 UTC, and is published until 13:00:00 UTC, when its last token has ended."},
		{sts.KeyInfo{State: sts.KeyRetired, RetiredAt: at, PublishedUntil: at.Add(time.Hour)},
			"signs no more, and is published until 13:00:00 UTC, when its last token has ended."},
		{sts.KeyInfo{State: sts.KeyRevoked, RevokedAt: at},
			"is withdrawn: neither used nor published any more, and all tokens that it has signed are dead."},
	} {
		tt.key.KID, tt.key.Algorithm, tt.key.Iss = "k1", "ES256", iss
		var b bytes.Buffer
		if err := tellKeys(&b, []sts.KeyInfo{tt.key}, at); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(fmt.Sprintf("ES256 key k1 of %s %s\n", iss, tt.want), b.String()); diff != "" {
			t.Error(diff)
		}
	}
}

func TestPrintKeys(t *testing.T) {
	t.Parallel()
	keys := []sts.KeyInfo{
		{Iss: "https://i", KID: "k2", Algorithm: "ES256", State: sts.KeyNext, CreatedAt: at, UseFrom: at.Add(time.Minute)},
		{Iss: "https://i", KID: "k1", Algorithm: "RS256", State: sts.KeyRevoked, CreatedAt: at, UseFrom: at, RevokedAt: at.Add(time.Hour)},
	}
	var b bytes.Buffer
	if err := printKeys(&b, keys); err != nil {
		t.Fatal(err)
	}
	want := `ISSUER     KID  ALG    STATE    USE FROM              RETIRED AT            PUBLISHED UNTIL
https://i  k2   ES256  next     2026-07-01T12:01:00Z  -                     -
https://i  k1   RS256  revoked  2026-07-01T12:00:00Z  2026-07-01T13:00:00Z  2026-07-01T13:00:00Z
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestKeysCommand(t *testing.T) {
	t.Parallel()
	w := newCommandWorld(t)
	w.ensureIssuers()
	const own = "https://km.example.com"
	list := func(flags ...string) (keys []keyJSON) {
		t.Helper()
		if err := json.Unmarshal([]byte(w.expect(0, "", "", "keys list", append(flags, "--json")...)), &keys); err != nil {
			t.Fatal(err)
		}
		return keys
	}
	states := func(want ...string) []keyJSON {
		t.Helper()
		keys := list("--iss", own)
		var got []string
		for _, k := range keys {
			got = append(got, k.Alg+" "+string(k.State))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("keys (-want +got):\n%s", diff)
		}
		return keys
	}
	w.expect(0, "", "Would end", "revoke", "--client", "c")
	states() // it makes no key
	w.expect(0, "RS256 key ", "", "keys rotate")
	first := states("RS256 active")[0]

	w.expect(0, "ES256 key ", "", "keys rotate", "--algorithm", "ES256", "--reason", "smaller")
	keys := states("ES256 next", "RS256 active")
	if keys[1].KID != first.KID || keys[1].RetiredAt.IsZero() || !keys[1].RetiredAt.Equal(keys[0].UseFrom) || !keys[1].PublishedUntil.After(keys[1].RetiredAt) {
		t.Errorf("after a rotation: %+v", keys)
	}
	w.expect(0, "ISSUER                  KID", "", "keys list")
	w.expect(1, "", "rotate first", "keys retire "+first.KID)
	w.expect(1, "", "no such signing key", "keys retire nobody")
	w.expect(1, "", "has no key nobody that is not revoked yet", "keys rotate", "--compromised", "nobody", "--yes")
	w.expect(1, "", "no issuer of our own", "keys rotate", "--iss", "https://nobody")

	code, stdout, stderr := w.run("keys rotate", "--compromised", first.KID)
	if code != 3 || stdout != "" || !strings.Contains(stderr, first.KID) || !strings.Contains(stderr, "there is nobody to ask: nothing was changed; give --yes") {
		t.Errorf("status %d\nstdout: %s\nstderr: %s", code, stdout, stderr)
	}
	states("ES256 next", "RS256 active")
	w.expect(0, first.KID+" of "+own+" is withdrawn", "", "keys rotate", "--compromised", first.KID, "--algorithm", "ES256", "--yes")
	keys = list("--iss", own)
	active := 0
	for _, k := range keys {
		if k.State == sts.KeyActive {
			active++
		}
		if (k.KID == first.KID) != (k.State == sts.KeyRevoked) {
			t.Errorf("after a key was lost: %+v", k)
		}
	}
	if active == 0 {
		t.Errorf("nothing signs: %+v", keys)
	}
	w.expect(0, `"state": "revoked"`, "", "keys rotate", "--compromised", "all", "--yes", "--json")
	for _, k := range list("--iss", own)[1:] {
		if k.State != sts.KeyRevoked {
			t.Errorf("after all keys were lost: %+v", k)
		}
	}
}
