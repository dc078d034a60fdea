package eventhub

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/rescindhq/rescind/api/catalog"
)

// What Choreo Connect decodes the lists into: integers of 32 bits, and names without
// regard to their case.
type ccSubscriptions struct {
	List []struct {
		SubscriptionID   int32  `json:"subscriptionId"`
		SubscriptionUUID string `json:"subscriptionUUID"`
		PolicyID         string `json:"policyId"`
		APIID            int32  `json:"apiId"`
		APIUUID          string `json:"apiUUID"`
		AppID            int32  `json:"appId"`
		ApplicationUUID  string `json:"applicationUUID"`
		State            string `json:"subscriptionState"`
		TenantID         int32  `json:"tenanId"`
		TenantDomain     string `json:"tenanDomain"`
		TimeStamp        int64  `json:"timeStamp"`
	} `json:"list"`
}

type ccApplications struct {
	List []struct {
		UUID       string            `json:"uuid"`
		ID         int32             `json:"id"`
		Name       string            `json:"name"`
		SubID      int32             `json:"subId"`
		SubName    string            `json:"subName"`
		Policy     string            `json:"policy"`
		TokenType  string            `json:"tokenType"`
		GroupIDs   []string          `json:"groupIds"`
		Attributes map[string]string `json:"attributes"`
		TenantID   int32             `json:"tenanId"`
	} `json:"list"`
}

type ccKeyMappings struct {
	List []struct {
		ApplicationID   int32  `json:"applicationId"`
		ApplicationUUID string `json:"applicationUUID"`
		ConsumerKey     string `json:"consumerKey"`
		KeyType         string `json:"keyType"`
		KeyManager      string `json:"keyManager"`
	} `json:"list"`
}

type ccPolicies struct {
	List []struct {
		ID        int32  `json:"id"`
		TenantID  int32  `json:"tenantId"`
		Name      string `json:"name"`
		QuotaType string `json:"quotaType"`
	} `json:"list"`
}

type ccAPIs struct {
	List []struct {
		APIID            int32  `json:"apiId"`
		UUID             string `json:"uuid"`
		Provider         string `json:"provider"`
		Name             string `json:"name"`
		Version          string `json:"version"`
		Context          string `json:"context"`
		Policy           string `json:"policy"`
		APIType          string `json:"apiType"`
		IsDefaultVersion bool   `json:"isDefaultVersion"`
		APIStatus        string `json:"status"`
	} `json:"list"`
}

type ccKeyManager struct {
	Name          string         `json:"name"`
	Type          string         `json:"type"`
	Enabled       bool           `json:"enabled"`
	TenantDomain  string         `json:"tenantDomain"`
	Configuration map[string]any `json:"configuration"`
}

type ccRevoked struct {
	JWTSignature string `json:"jwt_signature"`
	ExpiryTime   int64  `json:"expiry_time"`
}

// gateway is a consumer that decodes what it is sent.
type gateway struct {
	t      *testing.T
	client *http.Client
	base   string
	user   string
}

func newGateway(t *testing.T, w *world, user string) *gateway {
	server := httptest.NewServer(w.router)
	t.Cleanup(server.Close)
	client := server.Client()
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return errors.New("redirected") }
	return &gateway{t, client, server.URL + base, user}
}

func (g *gateway) call(method, path string, into any) int {
	g.t.Helper()
	r, err := http.NewRequest(method, g.base+path, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	r.SetBasicAuth(g.user, "right")
	resp, err := g.client.Do(r)
	if err != nil {
		g.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatalf("%s %s: %v", method, path, err)
	}
	if into != nil {
		if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/json" {
			g.t.Errorf("%s %s: %d, %q", method, path, resp.StatusCode, resp.Header)
		}
		if err := json.Unmarshal(body, into); err != nil {
			g.t.Errorf("%s %s: %v: %s", method, path, err, body)
		}
	}
	return resp.StatusCode
}

// Choreo Connect starts: each call is as it makes it, in its order, and what it joins in
// memory fits together (WSO2 contract, sections 7.3 and 10.1).
func TestChoreoConnectStarts(t *testing.T) {
	t.Parallel()
	g := newGateway(t, readWorld(t, Config{}), "gateway")
	var (
		subscriptions ccSubscriptions
		applications  ccApplications
		mappings      ccKeyMappings
		appPolicies   ccPolicies
		subPolicies   ccPolicies
		apis          ccAPIs
		revoked       []ccRevoked
		managers      []ccKeyManager
		templates     []string
		blocked       struct {
			API, Application, User, Subscription, Custom []string
			IP                                           []struct{}
		}
	)
	g.call("GET", "/subscriptions", &subscriptions)
	g.call("GET", "/applications", &applications)
	g.call("GET", "/application-key-mappings", &mappings)
	g.call("GET", "/application-policies", &appPolicies)
	g.call("GET", "/subscription-policies", &subPolicies)
	g.call("GET", "/apis?gatewayLabel=Default", &apis)
	g.call("GET", "/revokedjwt", &revoked)
	g.call("GET", "/keymanagers", &managers)
	g.call("GET", "/keyTemplates", &templates)
	g.call("GET", "/block", &blocked)
	if status := g.call("GET", "/runtime-artifacts?gatewayLabel=RGVmYXVsdA==&type=Envoy", nil); status != http.StatusNoContent {
		t.Errorf("artifacts: %d", status)
	}
	if status := g.call("PATCH", "/apis/deployed-revisions", nil); status != http.StatusOK {
		t.Errorf("deployed revisions: %d", status)
	}

	tiers := make(map[string]bool)
	for _, p := range appPolicies.List {
		tiers["app "+p.Name] = p.TenantID == super.ID
	}
	for _, p := range subPolicies.List {
		tiers["sub "+p.Name] = p.TenantID == super.ID
	}
	apps := make(map[string]int32)
	for _, a := range applications.List {
		apps[a.UUID] = a.ID
		if !tiers["app "+a.Policy] {
			t.Errorf("application %d has policy %s, which is not there", a.ID, a.Policy)
		}
	}
	names := make(map[string]bool)
	for _, k := range managers {
		names[k.Name] = true
		if _, ok := k.Configuration["self_validate_jwt"].(bool); !ok {
			t.Errorf("key manager %s: %v", k.Name, k.Configuration)
		}
	}
	for _, k := range mappings.List {
		if id, ok := apps[k.ApplicationUUID]; !ok || id != k.ApplicationID || !names[k.KeyManager] {
			t.Errorf("key mapping %+v fits no application or key manager", k)
		}
	}
	for _, s := range subscriptions.List {
		if id, ok := apps[s.ApplicationUUID]; !ok || id != s.AppID || !tiers["sub "+s.PolicyID] || s.TenantID != super.ID {
			t.Errorf("subscription %+v fits no application or policy", s)
		}
	}
	if len(subscriptions.List) != 3 || len(apps) != 2 || len(mappings.List) != 3 || len(apis.List) != 1 || len(revoked) != 3 || len(managers) != 2 {
		t.Errorf("%d subscriptions, %d applications, %d key mappings, %d APIs, %d revoked, %d key managers",
			len(subscriptions.List), len(apps), len(mappings.List), len(apis.List), len(revoked), len(managers))
	}
}

// An API Microgateway 3.2 asks with two slashes, and needs an array for groupIds and an
// object for attributes.
func TestMicrogatewayStarts(t *testing.T) {
	t.Parallel()
	g := newGateway(t, readWorld(t, Config{}), "gateway")
	for _, path := range []string{"//subscriptions", "//apis", "//application-key-mappings"} {
		var list struct{ List []map[string]any }
		if g.call("GET", path, &list); len(list.List) == 0 {
			t.Errorf("%s is empty", path)
		}
	}
	var applications struct{ List []map[string]json.RawMessage }
	g.call("GET", "//applications", &applications)
	for _, a := range applications.List {
		if !strings.HasPrefix(string(a["attributes"]), "{") || string(a["groupIds"]) != "[]" {
			t.Errorf("attributes %s, groupIds %s", a["attributes"], a["groupIds"])
		}
	}
	var revoked []struct {
		JWTSignature, ExpiryTime json.RawMessage
	}
	if g.call("GET", "/revokedjwt", &revoked); len(revoked) != 3 || revoked[0].JWTSignature == nil {
		t.Errorf("%+v", revoked)
	}
}

// A gateway in Java starts for each tenant with its header.
func TestJavaGatewayStarts(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{})
	for _, tenant := range []string{super.Domain, org.Domain} {
		for _, path := range []string{
			"/subscriptions", "/applications", "/application-key-mappings", "/apis", "/subscription-policies", "/api-policies",
			"/application-policies", "/scopes", "/keymanagers",
		} {
			rec := w.get("two", base+path, "xWSO2Tenant", tenant)
			if rec.Code != http.StatusOK || !strings.Contains(rec.Body.String(), tenant) && path != "/scopes" {
				t.Errorf("%s of %s: %d %s", path, tenant, rec.Code, rec.Body)
			}
		}
	}
	for _, path := range []string{"/block", "/keyTemplates", "/revokedjwt"} {
		if rec := w.get("two", base+path); rec.Code != http.StatusOK {
			t.Errorf("%s: %d", path, rec.Code)
		}
	}
	rec := w.get("two", base+"/runtime-artifacts?gatewayLabel=RGVmYXVsdA==&type=Synapse")
	if rec.Code != http.StatusNotFound || !strings.Contains(rec.Body.String(), "No Api artifacts found") {
		t.Errorf("artifacts: %d %s", rec.Code, rec.Body)
	}
}

// Every row of the catalog has a place in the answer of some gateway's own tenant, so
// that what is in the catalog is never kept from all.
func TestWholeCatalogIsServed(t *testing.T) {
	t.Parallel()
	w := readWorld(t, Config{})
	var all strings.Builder
	for name := range resources {
		fmt.Fprint(&all, w.get("all", base+"/"+name, "xWSO2Tenant", "ALL").Body)
	}
	for _, e := range testCatalog() {
		m := e.Base()
		if a, ok := e.(*catalog.API); ok && a.Status == catalog.APIRetired {
			continue
		}
		if e.Noun() == "tenant" || e.Noun() == "scope" {
			continue // these have no id there
		}
		if e.Noun() == "policy" {
			if !strings.Contains(all.String(), fmt.Sprintf(`"id":%d,`, m.ID)) {
				t.Errorf("policy %d is nowhere", m.ID)
			}
		} else if !strings.Contains(all.String(), m.UUID) && e.Noun() != "key_mapping" {
			t.Errorf("%s %d is nowhere", e.Noun(), m.ID)
		}
	}
}
