package adminapi

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/rescindhq/rescind/internal/claims"
)

func TestClaims(t *testing.T) {
	t.Parallel()
	w := &transcript{world: newWorld(t)}
	w.populate()
	const path = "/v1/applications/" + applicationUUID + "/claims"
	for _, query := range []string{"", "?key_type=SANDBOX", "?consumer_key=shop-1", "?consumer_key=shop-1&key_type=SANDBOX"} {
		if a := w.do("acme-admin", "GET", path+query, ""); a.status != http.StatusOK || a.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %d %v", query, a.status, a.header)
		}
	}
	w.golden("claims")
	get := func(path string) (c claims.SelfContained) {
		t.Helper()
		w.must(http.StatusOK, "acme-admin", "GET", path, "").into(t, &c)
		return c
	}

	// Of a consumer key that two key managers gave the application, the type decides.
	w.must(http.StatusCreated, "admin", "POST", "/v1/key-managers",
		`{"tenant":{"domain":"acme.com"},"name":"idp2","iss":"https://idp2.acme.com","max_token_lifetime":600}`)
	w.must(http.StatusCreated, "acme-admin", "POST", keysOfApplication, `{"key_manager":"idp2","consumer_key":"shop-1","generate":false}`)
	for _, keyType := range []string{"PRODUCTION", "SANDBOX"} {
		if c := get(path + "?consumer_key=shop-1&key_type=" + keyType); c.KeyType != keyType || c.ConsumerKey != "shop-1" {
			t.Errorf("%+v, want type %s", c, keyType)
		}
	}

	// Who may read them, in which tenants. What others have does not exist.
	for who, want := range map[string]int{
		"admin": 200, "acme-admin": 200, "acme-auditor": 200, "two-auditor": 200, "gateway": 200, "two-gateway": 200, "acme-gateway": 200,
		"super-admin": 404, "two-admin": 404, "auditor": 404, "own-gateway": 404, "notifier": 403,
	} {
		if a := w.get(who, path); a.status != want {
			t.Errorf("%s: status %d, want %d: %s", who, a.status, want, a.body)
		}
	}

	// They are those of this moment, and of the application's number too.
	subscribed := func(path string) (names []string) {
		t.Helper()
		for _, api := range get(path).SubscribedAPIs {
			names = append(names, api.Name)
		}
		return names
	}
	if got := subscribed("/v1/applications/6001/claims"); !slices.Equal(got, []string{"Pizza"}) {
		t.Errorf("subscribed to %q", got)
	}
	w.must(http.StatusNoContent, "acme-admin", "DELETE", "/v1/subscriptions/"+subUUID, "", "If-Match", "*")
	if got := subscribed(path); len(got) != 0 {
		t.Errorf("still subscribed to %q", got)
	}
	w.fresh.mu.Lock()
	w.fresh.err = errors.New("the database is away")
	w.fresh.mu.Unlock()
	if a := w.must(http.StatusServiceUnavailable, "acme-admin", "GET", path, ""); a.header.Get("Retry-After") == "" || strings.Contains(a.body, "database") {
		t.Errorf("%v %s", a.header, a.body)
	}
}
