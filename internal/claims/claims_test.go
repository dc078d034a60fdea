package claims_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/claims"
)

var update = flag.Bool("update", false, "write the golden files")

var org = revocation.Tenant{ID: 7, Domain: "org.example"}

func meta(id int32) catalog.Meta {
	return catalog.Meta{ID: id, UUID: fmt.Sprintf("d1a2b3c4-0000-4000-8000-%012d", id), Tenant: org, Timestamp: 1760000000000}
}

func ref(id int32) catalog.Ref { return catalog.Ref{ID: id, UUID: meta(id).UUID} }

func api(id int32, name, version, status string) *catalog.API {
	return &catalog.API{Meta: meta(id), Name: name, Version: version, Context: "/" + name + "/" + version, Provider: "ann", Type: "HTTP", Status: status}
}

const (
	mobile  = 41
	shop    = 42
	nobody  = 43
	blocked = 44
)

// entities have subscriptions in an order that is not that of the claims.
func entities() []catalog.Entity {
	all := []catalog.Entity{
		&catalog.Policy{
			Meta: meta(11), Kind: catalog.PolicySubscription, Name: "Gold", QuotaType: "requestCount", Quota: 5000, UnitTime: 2, TimeUnit: "hour",
			RateLimitCount: 10, RateLimitTimeUnit: "sec", StopOnQuotaReach: true, GraphQLMaxDepth: 5, GraphQLMaxComplexity: 400,
		},
		&catalog.Policy{Meta: meta(12), Kind: catalog.PolicySubscription, Name: "Data", QuotaType: "bandwidthVolume", Quota: 1 << 20, UnitTime: 1, TimeUnit: "day"},
		&catalog.Policy{Meta: meta(13), Kind: catalog.PolicySubscription, Name: "Unlimited", QuotaType: "requestCount"},
		&catalog.Policy{Meta: meta(14), Kind: catalog.PolicyApplication, Name: "Unlimited", QuotaType: "requestCount"},
		&catalog.Policy{Meta: meta(15), Kind: catalog.PolicyApplication, Name: "Gold", QuotaType: "eventCount"}, // of another kind than the first
		api(31, "pizza", "2.0.0", catalog.APIPublished),
		api(32, "pizza", "1.0.0", catalog.APIDeprecated),
		api(33, "books", "1", catalog.APIPrototyped),
		api(34, "new", "1", catalog.APICreated),
		api(35, "closed", "1", catalog.APIBlocked),
		api(36, "old", "1", catalog.APIRetired),
		api(37, "held", "1", catalog.APIPublished),
		&catalog.Application{Meta: meta(mobile), Name: "Mobile", Owner: "bob", Policy: "Gold", TokenType: "JWT", SelfContained: true},
		&catalog.Application{Meta: meta(shop), Name: "Shop", Owner: "cy", Policy: "Unlimited", TokenType: "JWT", SelfContained: true},
		&catalog.Application{Meta: meta(nobody), Name: "Nobody", Owner: "di", Policy: "Unlimited", TokenType: "JWT"},
		&catalog.Application{Meta: meta(blocked), Name: "Blocked", Owner: "ed", Policy: "Unlimited", TokenType: "JWT", Blocked: true},
	}
	id := int32(60)
	subscribe := func(app, api int32, policy, state string) *catalog.Subscription {
		id++
		s := &catalog.Subscription{Meta: meta(id), Application: ref(app), API: ref(api), Policy: policy, State: state}
		all = append(all, s)
		return s
	}
	subscribe(mobile, 31, "Gold", catalog.Unblocked)
	subscribe(mobile, 32, "Data", catalog.TierUpdatePending)
	subscribe(mobile, 33, "Unlimited", catalog.ProdOnlyBlocked)
	subscribe(mobile, 34, "Unlimited", catalog.Unblocked)
	subscribe(mobile, 35, "Unlimited", catalog.Unblocked)
	subscribe(mobile, 36, "Unlimited", catalog.Unblocked)
	subscribe(mobile, 37, "Unlimited", catalog.OnHold)
	subscribe(shop, 31, "Unlimited", catalog.Blocked)
	subscribe(shop, 33, "Unlimited", catalog.Unblocked).ApplicationBlocked = true
	subscribe(shop, 37, "Unlimited", catalog.Rejected)
	subscribe(blocked, 31, "Unlimited", catalog.Unblocked) // not yet told of its application
	return all
}

// The claims are those of the WSO2 contract, section 10.3, letter for letter.
func TestOf(t *testing.T) {
	t.Parallel()
	r := replica.NewState(replica.StateConfig{})
	at := revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: 1}
	if err := r.Load(at, func(l *replica.Loader) error {
		for _, e := range entities() {
			l.Entity(e)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name        string
		application int32
		keyType     string
		consumerKey string
	}{
		{"production", mobile, catalog.Production, "Jx3k9aAbCq"},
		{"sandbox", mobile, catalog.Sandbox, "sandbox-key"},
		{"nothing-let-through", shop, catalog.Production, "shop"},
		{"no-subscriptions-no-key", nobody, catalog.Sandbox, ""},
		{"blocked", blocked, catalog.Production, "blocked"},
	} {
		var got []byte
		r.View(func(v *replica.View) {
			var err error
			got, err = json.MarshalIndent(claims.Of(v, v.ApplicationByID(tt.application), tt.keyType, tt.consumerKey), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
		})
		got = append(got, '\n')
		path := filepath.Join("testdata", tt.name+".golden")
		if *update {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s (-golden +got):\n%s", tt.name, diff)
		}
		if bytes.Contains(got, []byte("null")) {
			t.Errorf("%s has a null", tt.name)
		}
	}
}

// What is told a moment later than what refers to it makes no token that gateways stumble over.
func TestOfWhatIsIncomplete(t *testing.T) {
	t.Parallel()
	app := &catalog.Application{Meta: meta(mobile), Name: "Mobile", Owner: "bob", Policy: "Gold", TokenType: "JWT"}
	r := replica.NewState(replica.StateConfig{})
	if err := r.Load(revocation.Position{Epoch: "3b0d7c52-5d0e-4a2f-9a61-6c1f0a7f9d10", Seq: 1}, func(l *replica.Loader) error {
		l.Entity(app)
		l.Entity(api(31, "pizza", "1", catalog.APIPublished))
		l.Entity(&catalog.Subscription{Meta: meta(61), Application: ref(mobile), API: ref(31), Policy: "Gold", State: catalog.Unblocked})
		l.Entity(&catalog.Subscription{Meta: meta(62), Application: ref(mobile), API: ref(32), Policy: "Gold", State: catalog.Unblocked})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	r.View(func(v *replica.View) {
		want := claims.SelfContained{
			Application: claims.Application{ID: mobile, UUID: app.UUID, Name: "Mobile", Tier: "Gold", Owner: "bob", TierQuotaType: "requestCount"},
			TierInfo:    map[string]claims.Tier{"Gold": {TierQuotaType: "requestCount"}},
			KeyType:     catalog.Production,
			SubscribedAPIs: []claims.SubscribedAPI{{
				Name: "pizza", Context: "/pizza/1", Version: "1", Publisher: "ann", SubscriptionTier: "Gold", SubscriberTenantDomain: "org.example",
			}},
		}
		if diff := cmp.Diff(want, claims.Of(v, app, catalog.Production, "")); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}
