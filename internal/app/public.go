package app

import (
	"bytes"

	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/adminapi"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/canary"
	store "github.com/rescindhq/rescind/internal/catalog"
	"github.com/rescindhq/rescind/internal/eventhub"
	"github.com/rescindhq/rescind/internal/explain"
	"github.com/rescindhq/rescind/internal/fleet"
	"github.com/rescindhq/rescind/internal/fleetapi"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/httpapi"
	"github.com/rescindhq/rescind/internal/introspect"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/revokeapi"
	"github.com/rescindhq/rescind/internal/snapshotapi"
	"github.com/rescindhq/rescind/internal/sts"
)

// public is what clients, gateways and admins reach.
type public struct {
	handler http.Handler
	issuers *issuers
	drain   func() // ends what would last
	fleet   *fleet.Fleet
	canary  *canary.Canary // nil: there is none

	state    *follow.Follower
	callers  *authn.Authenticator
	entities *store.Store
	ledger   *ledger.Ledger
	remember bool
	log      *slog.Logger
}

// newPublic brings the catalog and the replica up to date, then makes what answers
// requests.
func newPublic(ctx context.Context, cfg Config, pool *pgxpool.Pool, l *ledger.Ledger, state *follow.Follower, reg prometheus.Registerer, log *slog.Logger) (*public, error) {
	keys, err := masterKeys(cfg)
	if err != nil {
		return nil, err
	}
	callers, err := authn.New(authn.Config{
		Issuer: cfg.Issuer, LegacyAssertionAudience: cfg.LegacyAssertionAudience,
		TrustedProxies: cfg.HTTP.TrustedProxies,
		MaxLookups:     max(1, min(2, cfg.Database.MaxConns/4)), // commits use the same connections
	}, pool, keys, reg, log)
	if err != nil {
		return nil, err
	}
	entities := store.New(catalogConfig(cfg), pool, l, callers, log)
	if err := entities.EnsureIssuers(ctx); err != nil {
		return nil, err
	}
	trusted, err := trustedIssuers(ctx, cfg, entities, log)
	if err != nil {
		return nil, err
	}
	if err := entities.Announce(ctx); err != nil {
		return nil, err
	}
	if err := entities.EnsureIssuers(ctx); err != nil { // of tenants that were not announced before
		return nil, err
	}
	if err := l.SetRemembering(ctx, cfg.RememberTokens); err != nil {
		return nil, err
	}
	if err := state.Load(ctx); err != nil {
		return nil, err
	}
	debug.FreeOSMemory() // loading leaves as much garbage as there is state
	ownConfig := sts.Config{
		Issuer: cfg.Issuer, State: state, TokenLifetime: cfg.TokenLifetime, Algorithm: cfg.SigningAlgorithm,
	}
	if cfg.RememberTokens {
		ownConfig.Memory = l
	}
	own, err := sts.New(ctx, ownConfig, pool, keys, callers, log)
	if err != nil {
		return nil, err
	}
	p := &public{issuers: newIssuers(trusted, cfg.KeySetNetworks, own, state, log), state: state, callers: callers, entities: entities,
		ledger: l, remember: cfg.RememberTokens, log: log}

	repeats := rest.NewIdempotencyStore(pool, keys)
	admin, err := adminapi.New(adminapi.Deps{Catalog: entities, Accounts: callers, Idempotency: repeats, State: state, Audit: l})
	if err != nil {
		return nil, err
	}
	p.fleet, err = fleet.New(fleet.Config{Lease: cfg.GatewayLease, MaxHeld: share(cfg, reportShare)}, pool, state.Replica(), reg, log)
	if err != nil {
		return nil, err
	}
	if err := p.fleet.Load(ctx); err != nil {
		return nil, err
	}
	if p.canary, err = newCanary(cfg, entities, own, l, p.fleet, reg, log); err != nil {
		return nil, err
	}
	gateways, err := fleetapi.New(fleetapi.Config{}, fleetapi.Deps{
		Fleet: p.fleet, State: state, Accounts: callers, Audit: l, CheckCanaryURL: canary.CheckURL,
	})
	if err != nil {
		return nil, err
	}
	explainer, err := explain.New(explain.Deps{Ledger: l, State: state, Verifier: p.issuers, Fleet: p.fleet, Leeway: cfg.Leeway})
	if err != nil {
		return nil, err
	}
	revocations, err := revokeapi.New(revokeapi.Deps{
		Revoker: newRevoker(cfg, l, state, p.issuers), Ledger: l, Fleet: p.fleet, Accounts: callers, Idempotency: repeats,
		MaxWaiting: max(1, cfg.HTTP.MaxInFlight/8),
	})
	if err != nil {
		return nil, err
	}
	introspection, err := introspect.New(introspect.Config{Leeway: orNone(cfg.Leeway)}, introspect.Deps{
		Callers: callers, Verifier: p.issuers, State: state, Seen: l.Seen, Registerer: reg,
	})
	if err != nil {
		return nil, err
	}
	reads, err := snapshotapi.New(snapshotapi.Config{
		MaxReaders: share(cfg, snapshotShare), MaxStreams: share(cfg, streamShare),
	}, snapshotapi.Deps{Follower: state, Accounts: callers, Registerer: reg, Log: log})
	if err != nil {
		return nil, err
	}
	hub, err := eventhub.New(eventhub.Config{MaxInFlight: share(cfg, hubShare), ClockSkew: orNone(cfg.ClockSkew)}, eventhub.Deps{
		State: state, Accounts: callers, Ledger: l, Idempotency: repeats, Registerer: reg, Log: log,
	})
	if err != nil {
		return nil, err
	}
	p.drain = func() {
		gateways.Close()
		revocations.Close()
		reads.Close()
	}
	p.handler, err = httpapi.New(httpConfig(cfg), httpapi.Deps{
		Clients: callers, Verifier: p.issuers, Ledger: l,
		Introspection: introspection, Tenant: own.CheckTenant,
		Routes: []func(chi.Router){own.Routes, admin.Routes, revocations.Routes, reads.Routes, hub.Routes,
			gateways.Routes, explain.NewEndpoint(explainer, callers).Routes},
		Remote: callers.Remote, Registerer: reg, Log: log,
	})
	return p, err
}

// orNone is d for a setting of a package that takes 0 for its default.
func orNone(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// Requests that last take at most these shares of the connections, in percent, so that
// there is always room for those who revoke.
const (
	streamShare   = 40
	reportShare   = 20
	snapshotShare = 15
	hubShare      = 15
)

func share(cfg Config, percent int) int { return max(1, cfg.HTTP.MaxConnections*percent/100) }

// forget follows the log and drops what is remembered of clients that have changed,
// whichever process changed them, until ctx ends.
func (p *public) forget(ctx context.Context) error {
	at := p.state.Replica().At()
	for ctx.Err() == nil {
		changed := p.state.Changed()
		frames, err := p.state.Frames(ctx, at, 1000)
		if errors.Is(err, follow.ErrGone) {
			at = p.state.Replica().At() // what was remembered then is no longer used by now
			continue
		}
		for _, f := range frames {
			at = f.Position
			if iss, consumerKey, ok := changedClient(f); ok {
				p.callers.Forget(iss, consumerKey)
			}
		}
		if len(frames) > 0 {
			continue
		}
		select {
		case <-changed:
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
	return nil
}

// changedClient is the client that f is about, if it is about one. Most events are not,
// and are not parsed.
func changedClient(f follow.Frame) (iss, consumerKey string, ok bool) {
	start := f.JSON[:min(len(f.JSON), 512)]
	revoked := bytes.Contains(start, []byte(`.revocation.client.`))
	if !revoked && !bytes.Contains(start, []byte(`.key_mapping.`)) {
		return "", "", false
	}
	e, err := revocation.ParseEvent(f.JSON)
	if err != nil {
		return "", "", false // our own event
	}
	if revoked {
		r, err := e.Revocation()
		return r.Target.Iss, r.Target.ID, err == nil
	}
	change, err := catalog.ParseChange(e)
	if err != nil {
		return "", "", false
	}
	mapping, ok := change.Entity.(*catalog.KeyMapping)
	if !ok {
		return "", "", false
	}
	return mapping.Iss, mapping.ConsumerKey, true
}

// announceEvery is how long what a process of the schema before makes may be unknown to
// gateways while processes are being replaced.
const announceEvery = time.Minute

// announce tells of rows that have no event yet, until ctx ends.
func (p *public) announce(ctx context.Context) error {
	tick := time.NewTicker(announceEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		// A process of the schema before makes tenants without an issuer, and one that is
		// configured otherwise remembers no tokens.
		err := errors.Join(p.entities.Announce(ctx), p.entities.EnsureIssuers(ctx), p.ledger.SetRemembering(ctx, p.remember))
		if err != nil && ctx.Err() == nil {
			p.log.Warn("what other processes do otherwise could not be made up for, it is tried again", "in", announceEvery, "error", err)
		}
	}
}

func masterKeys(cfg Config) ([]authn.MasterKey, error) {
	raw, err := base64.StdEncoding.DecodeString(string(cfg.MasterKey))
	if err != nil {
		return nil, errors.New("RESCIND_MASTER_KEY is not base64")
	}
	master, err := authn.NewMasterKey(raw)
	if err != nil {
		return nil, err
	}
	return []authn.MasterKey{master}, nil
}

// trustedIssuers registers those that cfg names.
func trustedIssuers(ctx context.Context, cfg Config, entities *store.Store, log *slog.Logger) (trusted []token.Issuer, err error) {
	for _, t := range cfg.TrustedIssuers {
		issuer, err := newTrustedIssuer(ctx, t, entities, log)
		if _, isConflict := errors.AsType[*store.Conflict](err); isConflict {
			// One entry that somebody else is in the way of must not stop all revocations.
			log.Error("an issuer of RESCIND_TRUSTED_ISSUERS_FILE is left out: its tokens are not known here", "issuer", t.Iss, "error", err)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("trusted issuer %s: %w", t.Iss, err)
		}
		trusted = append(trusted, issuer)
	}
	return trusted, nil
}

// newTrustedIssuer registers t, whose keys are not needed before a token of its
// own is revoked: an issuer that is down keeps nobody from starting.
func newTrustedIssuer(ctx context.Context, t TrustedIssuer, entities *store.Store, log *slog.Logger) (token.Issuer, error) {
	manager, err := entities.EnsureKeyManager(ctx, catalog.KeyManager{
		Meta: catalog.Meta{Tenant: revocation.Tenant{Domain: t.Tenant}}, Iss: t.Iss, Name: t.Name, Enabled: true,
		MaxTokenLifetime: int32(t.MaxTokenLifetime / time.Second), JWKSURI: t.JWKSURL, Algorithms: t.Algorithms, AllowTyp: t.AllowTyp,
	})
	if err != nil {
		return token.Issuer{}, err
	}
	return t.issuer(ctx, manager, log)
}

// issuer is t, registered as manager.
func (t TrustedIssuer) issuer(ctx context.Context, manager *catalog.KeyManager, log *slog.Logger) (issuer token.Issuer, err error) {
	issuer = token.Issuer{
		Iss: t.Iss, Tenant: manager.Tenant, Algorithms: t.Algorithms, AllowTypes: t.AllowTyp, MaxLifetime: time.Duration(manager.MaxTokenLifetime) * time.Second,
	}
	log = log.With("issuer", t.Iss)
	if t.JWKSFile != "" {
		issuer.Keys, err = token.NewFileKeySet(ctx, t.JWKSFile, log)
		return issuer, err
	}
	remote := token.RemoteConfig{URL: t.JWKSURL, Cache: token.CacheConfig{Logger: log}}
	if t.AllowPrivateAddresses {
		remote.AllowedNetworks = token.PrivateNetworks
	}
	issuer.Keys, err = token.NewRemoteKeySet(remote)
	return issuer, err
}
