package main

import (
	"encoding/base64"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
)

func TestExplainUsage(t *testing.T) {
	t.Parallel()
	w := newOfflineWorld(t).looks()
	const jwt = "eyJhbGciOiJSUzI1NiJ9.eyJqdGkiOiJ4In0.c2ln"
	file := writeFile(t, "token", jwt)
	for _, tt := range []struct {
		code   int
		stderr string
		flags  []string
	}{
		{2, "give --token or --claims, one of them", nil},
		{2, "give --token or --claims, one of them", []string{"--token", file, "--claims", file}},
		{2, "takes no argument", []string{"--token", file, jwt}},
		{2, "--token takes - for standard input, or a file that is there.", []string{"--token", jwt}},
		{2, "give its --context", []string{"--token", file, "--method", "GET"}},
		{2, "give the --version of the API too", []string{"--token", file, "--context", "/shop/1.0.0"}},
		{2, "--gateway has nothing in it", []string{"--token", file, "--gateway", ""}},
		{2, `--at is "yesterday"`, []string{"--token", file, "--at", "yesterday"}},
		{1, "read the claims: they are not JSON", []string{"--claims", file}},
		{1, "rescind explain: ", []string{"--token", file}}, // no database
	} {
		code, stdout, stderr := w.run("explain", tt.flags...)
		if code != tt.code || stdout != "" || !strings.Contains(stderr, tt.stderr) || strings.Contains(stderr, jwt) {
			t.Errorf("%q: status %d, want %d\nstdout: %s\nstderr: %s", tt.flags, code, tt.code, stdout, stderr)
		}
	}
}

func TestQuestioned(t *testing.T) {
	t.Parallel()
	err := questioned(catalog.Invalid{{Pointer: "#/claims/iss", Detail: "is missing"}, {Pointer: "#/api/context", Detail: "is long"}, {Pointer: "#", Detail: "It is wrong."}})
	if diff := cmp.Diff("--claims: is missing\n--context: is long\nIt is wrong.", err.Error()); diff != "" {
		t.Error(diff)
	}
	if other := errors.New("another"); questioned(other) != other {
		t.Error("an error of another kind is changed")
	}
}

func TestExplainCommand(t *testing.T) {
	t.Parallel()
	w := newCommandWorld(t)
	w.ensureIssuers()
	w.expect(0, "token  j1", "", "revoke", "--jti", "j1", "--reason", "lost laptop")
	look := w.looks()

	claims := writeFile(t, "claims", `{"iss":"https://km.example.com","jti":"j1","iat":1,"exp":4000000000}`)
	answer := decode[struct {
		Verdict    string
		Revocation struct{ Reason, Actor string }
	}](t, look.expect(0, "", "", "explain", "--claims", claims, "--json"))
	if answer.Verdict != "refused" || answer.Revocation.Reason != "lost laptop" || !strings.HasPrefix(answer.Revocation.Actor, "operator:") {
		t.Errorf("%+v", answer)
	}
	look.expect(0, "lost laptop", "", "explain", "--claims", claims, "--at", time.Now().Format(time.RFC3339))

	part := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	forged := part(`{"alg":"ES256","kid":"k","typ":"at+jwt"}`) + "." + part(`{"iss":"https://km.example.com","jti":"j2","iat":1,"exp":4000000000}`) + "." + part(strings.Repeat("s", 64))
	if out := look.expect(0, "REFUSED", "", "explain", "--token", writeFile(t, "token", forged+"\n")); strings.Contains(out, forged) || strings.Contains(out, strings.Split(forged, ".")[2]) {
		t.Errorf("the token is repeated: %s", out)
	}
	look.expect(1, "", "--claims: ", "explain", "--claims", writeFile(t, "claims", "[]"))
}
