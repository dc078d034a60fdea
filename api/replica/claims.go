package replica

import (
	"fmt"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/token"
)

// carried is what a self-contained token says of itself (WSO2 contract, section 10.3). A nil one says
// nothing.
type carried struct {
	keyType string
	// Of the application: its tier's quota type is quota.
	id                             int32
	uuid, name, tier, owner, quota string

	apis  []carriedAPI
	tiers token.Object
}

// carriedAPI is an item of subscribedAPIs.
type carriedAPI struct{ name, context, version, publisher, tier, tenant string }

// carriedTier is a member of tierInfo.
type carriedTier struct {
	stop       bool
	limit      int32
	unit       string
	quota      string
	depth      int32
	complexity int32
}

// readCarried reads the claims of a token that has subscribedAPIs, else it returns nil. Its error is
// [token.ErrClaims]: what is only half there, or of another type, is not passed over.
func readCarried(t *token.Token) (*carried, error) {
	claims := t.Claims()
	if !claims.Has("subscribedAPIs") {
		return nil, nil
	}
	if !claims.Has("application") {
		return nil, fmt.Errorf("%w: subscribedAPIs without application", token.ErrClaims)
	}
	application, err := claims.Object("application")
	if err != nil {
		return nil, err
	}
	c := new(carried)
	if c.id, err = application.Int32("id"); err != nil {
		return nil, err
	}
	if err := readTexts(application, []textOf{
		{"uuid", &c.uuid}, {"name", &c.name}, {"tier", &c.tier}, {"owner", &c.owner}, {"tierQuotaType", &c.quota},
	}); err != nil {
		return nil, err
	}
	if c.keyType, err = claims.Text("keytype"); err != nil {
		return nil, err
	}
	switch c.keyType {
	case "":
		c.keyType = catalog.Production
	case catalog.Production, catalog.Sandbox:
	default:
		return nil, fmt.Errorf("%w: keytype is neither PRODUCTION nor SANDBOX", token.ErrClaims)
	}
	if c.tiers, err = claims.Object("tierInfo"); err != nil {
		return nil, err
	}
	list, err := claims.Objects("subscribedAPIs")
	if err != nil {
		return nil, err
	}
	c.apis = make([]carriedAPI, len(list))
	for i, item := range list {
		a := &c.apis[i]
		if err := readTexts(item, []textOf{
			{"name", &a.name}, {"context", &a.context}, {"version", &a.version}, {"publisher", &a.publisher},
			{"subscriptionTier", &a.tier}, {"subscriberTenantDomain", &a.tenant},
		}); err != nil {
			return nil, err
		}
	}
	return c, nil
}

type textOf struct {
	name string
	to   *string
}

func readTexts(o token.Object, list []textOf) (err error) {
	for _, f := range list {
		if *f.to, err = o.Text(f.name); err != nil {
			return err
		}
	}
	return nil
}

// api finds the item of an API: by context and version, else by name and version. An item
// without a version, or for any ("*"), is for none.
func (c *carried) api(a *catalog.API) (carriedAPI, bool) {
	var named carriedAPI
	var ok bool
	for _, item := range c.apis {
		if item.tenant != a.Tenant.Domain || item.version != a.Version {
			continue
		}
		if item.context == a.Context {
			return item, true
		}
		if item.name == a.Name {
			named, ok = item, true
		}
	}
	return named, ok
}

// below finds the item of a tenant with the longest context that a plain path begins with, where
// only that tenant is served, or else among those with contexts of its own.
func (c *carried) below(path, tenant, only string) (found carriedAPI, ok bool) {
	if c == nil || tenant == "" {
		return found, false
	}
	longest := 0
	for _, item := range c.apis {
		context := unescaped(item.context)
		if item.tenant != tenant || item.version == "" || item.version == "*" || len(context) <= longest {
			continue
		}
		if only == "" && !fits(context, tenant) {
			continue
		}
		if _, within := beneath(path, context); within {
			found, ok, longest = item, true, len(context)
		}
	}
	return found, ok
}

// tenant is the one that all items name, empty if they do not agree.
func (c *carried) tenant() (domain string) {
	if c == nil {
		return ""
	}
	for i, item := range c.apis {
		if i > 0 && item.tenant != domain {
			return ""
		}
		domain = item.tenant
	}
	return domain
}

// tierOf reads what is told of a subscription tier. One that is not told of has no limits.
func (c *carried) tierOf(name string) (tier carriedTier, err error) {
	o, err := c.tiers.Object(name)
	if err != nil {
		return tier, err
	}
	if tier.stop, err = o.Bool("stopOnQuotaReach"); err != nil {
		return tier, err
	}
	for _, f := range []struct {
		name string
		to   *int32
	}{{"spikeArrestLimit", &tier.limit}, {"graphQLMaxDepth", &tier.depth}, {"graphQLMaxComplexity", &tier.complexity}} {
		if *f.to, err = o.Int32(f.name); err != nil {
			return tier, err
		}
	}
	return tier, readTexts(o, []textOf{{"spikeArrestUnit", &tier.unit}, {"tierQuotaType", &tier.quota}})
}
