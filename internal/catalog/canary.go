package catalog

import (
	"context"
	"errors"
	"fmt"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/ledger"
)

// CanaryKey is the consumer key of the canary's application at the super tenant's own issuer.
const CanaryKey = "rescind-canary"

// CanaryActor is who the log and the audit say makes, and revokes, what is the canary's.
const CanaryActor = "canary"

const canaryOwner = "rescind"

// asCanary is who makes what the canary needs.
var asCanary = Caller{Actor: ledger.Actor{Name: CanaryActor}}

// The canary's entities, each in the super tenant.
func canaryPolicy(kind string) *catalog.Policy {
	return &catalog.Policy{Kind: kind, Name: unlimited}
}

// To gateways that validate offline, a token without its APIs is good for all: so it carries them.
func canaryApplication() *catalog.Application {
	return &catalog.Application{Name: "rescind-canary", Owner: canaryOwner, SelfContained: true}
}

func canaryAPI() *catalog.API {
	return &catalog.API{
		Name: "RescindCanary", Version: "v1", Context: "/rescind-canary/v1", Provider: canaryOwner, Status: catalog.APIPublished,
		SecurityScheme: []string{"oauth2"}, Operations: []catalog.Operation{{Target: "/*", Verb: "GET"}},
	}
}

// EnsureCanary makes what the canary needs and is not there, because it is new or was deleted: in
// the super tenant an application rescind-canary of rescind, its API RescindCanary v1 at
// /rescind-canary/v1, the subscription of one to the other, [CanaryKey], which nobody has a secret of, and the policies
// that these refer to. What is there stays as it is, also where somebody has changed or blocked it. Any number
// of processes may do it at any time.
//
// Errors: a [Conflict] that says what to do where something else has a place of these, or where tokens
// of the application would be good for other APIs; those of [ledger.Ledger.Change].
func (s *Store) EnsureCanary(ctx context.Context) error {
	var b *batch
	_, err := s.ledger.Change(ctx, func(ctx context.Context, tx *ledger.Tx) error {
		b = s.newBatch(asCanary, tx)
		return b.ensureCanary(ctx)
	})
	s.forget(b)
	if failed, ok := errors.AsType[*Failed](err); ok {
		err = failed.Err // the index is of no list that a caller has
	}
	if err != nil {
		return fmt.Errorf("make what the canary needs: %w", err)
	}
	return nil
}

// What tells whether one of the canary's entities is there. Its tenant is $1.
const (
	canaryPolicySQL       = ` WHERE e.tenant_id = $1 AND e.kind = $2 AND e.name = $3`
	canaryApplicationSQL  = ` WHERE e.tenant_id = $1 AND e.owner = $2 AND e.name = $3`
	canaryAPISQL          = ` WHERE e.tenant_id = $1 AND e.name = $2 AND e.version = $3`
	canarySubscriptionSQL = ` WHERE e.tenant_id = $1 AND e.application_id = $2`
	canaryKeySQL          = ` WHERE k.tenant_id = $1 AND k.iss = $2 AND e.consumer_key = $3`
)

func (b *batch) ensureCanary(ctx context.Context) error {
	// Whoever else makes or deletes these waits for this lock.
	if err := b.lock(ctx, wanted{domains: []string{revocation.SuperTenant.Domain}}); err != nil {
		return err
	}
	tenant := revocation.SuperTenant.ID
	for _, kind := range []string{catalog.PolicySubscription, catalog.PolicyApplication, catalog.PolicyAPI} {
		if _, err := b.ensureOne(ctx, canaryPolicy(kind), canaryPolicySQL, tenant, kind, unlimited); err != nil {
			return err
		}
	}
	app := canaryApplication()
	application, err := b.ensureOne(ctx, app, canaryApplicationSQL, tenant, app.Owner, app.Name)
	if err != nil {
		return err
	}
	if !application.(*catalog.Application).SelfContained {
		return &Conflict{Slug: "exists", Detail: "the application rescind-canary of rescind is not self_contained, so gateways that validate offline " +
			"would take its tokens for every API: set self_contained, or delete it, and it is made anew"}
	}
	own := canaryAPI()
	api, err := b.ensureOne(ctx, own, canaryAPISQL, tenant, own.Name, own.Version)
	if err != nil {
		return err
	}
	if err := b.ensureCanarySubscription(ctx, application.Base(), api.Base()); err != nil {
		return err
	}
	return b.ensureCanaryKey(ctx, application.Base())
}

// ensureOne returns the entity that clause finds, or makes e.
func (b *batch) ensureOne(ctx context.Context, e catalog.Entity, clause string, args ...any) (catalog.Entity, error) {
	k := kindOf(e.Noun())
	found, err := b.fetch(ctx, k, clause, args...)
	if err != nil {
		return nil, b.failed("look for the "+string(e.Noun()), err)
	}
	if len(found) > 0 {
		return found[0], nil
	}
	return e, b.makeCanary(ctx, e)
}

func (b *batch) makeCanary(ctx context.Context, e catalog.Entity) error {
	k := kindOf(e.Noun())
	k.complete(e)
	e.Base().Tenant = revocation.SuperTenant
	st := &step{op: Create, noun: e.Noun(), want: e, reason: "canary"}
	if err := validate(st); err != nil {
		return err
	}
	return b.create(ctx, k, []*step{st})
}

func (b *batch) ensureCanarySubscription(ctx context.Context, application, api *catalog.Meta) error {
	found, err := b.fetch(ctx, subscriptions{}, canarySubscriptionSQL, application.Tenant.ID, application.ID)
	if err != nil {
		return b.failed("look for the subscription", err)
	}
	there := false
	for _, e := range found {
		if e.(*catalog.Subscription).API.ID != api.ID {
			return &Conflict{Slug: "exists", Detail: "the application rescind-canary has subscriptions of other APIs, which its tokens would be good for: delete them"}
		}
		there = true
	}
	if there {
		return nil
	}
	return b.makeCanary(ctx, &catalog.Subscription{
		Application: catalog.Ref{ID: application.ID, UUID: application.UUID}, API: catalog.Ref{ID: api.ID, UUID: api.UUID},
	})
}

// ensureCanaryKey makes the consumer key as one that is mapped is made: there is no client that could ask for
// its tokens.
func (b *batch) ensureCanaryKey(ctx context.Context, application *catalog.Meta) error {
	found, err := b.fetch(ctx, keyMappings{}, canaryKeySQL, application.Tenant.ID, b.cfg.Issuer, CanaryKey)
	if err != nil {
		return b.failed("look for the consumer key", err)
	}
	if len(found) > 0 {
		if found[0].(*catalog.KeyMapping).Application.ID != application.ID {
			return taken("#/consumer_key", "the consumer key "+CanaryKey+" is another application's: delete it there")
		}
		return nil
	}
	m := &catalog.KeyMapping{
		Application: catalog.Ref{ID: application.ID, UUID: application.UUID}, ConsumerKey: CanaryKey, KeyType: catalog.Production,
	}
	if _, err := b.findKeyManager(ctx, m); err != nil {
		return b.failed("look up the key manager", err)
	}
	b.forget = append(b.forget, consumer{b.cfg.Issuer, CanaryKey})
	return b.makeCanary(ctx, m)
}

// IsCanary reports whether e is the application or the API that [Store.EnsureCanary] makes.
func IsCanary(e catalog.Entity) bool {
	if e.Base().Tenant.Domain != revocation.SuperTenant.Domain {
		return false
	}
	switch e := e.(type) {
	case *catalog.Application:
		own := canaryApplication()
		return e.Name == own.Name && e.Owner == own.Owner
	case *catalog.API:
		own := canaryAPI()
		return e.Name == own.Name && e.Version == own.Version
	}
	return false
}
