package app

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/httpapi"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/sts"
)

// newHandler makes what answers requests: authentication, our own issuer, the
// verifier of its tokens and of other issuers', and the routes.
func newHandler(ctx context.Context, cfg Config, pool *pgxpool.Pool, l *ledger.Ledger, reg prometheus.Registerer, log *slog.Logger) (http.Handler, error) {
	raw, err := base64.StdEncoding.DecodeString(string(cfg.MasterKey))
	if err != nil {
		return nil, errors.New("RESCIND_MASTER_KEY is not base64")
	}
	master, err := authn.NewMasterKey(raw)
	if err != nil {
		return nil, err
	}
	keys := []authn.MasterKey{master}
	clients, err := authn.New(authn.Config{
		TrustedProxies: cfg.HTTP.TrustedProxies,
		MaxLookups:     max(1, min(4, cfg.Database.MaxConns/4)), // commits use the same connections
	}, pool, keys, reg, log)
	if err != nil {
		return nil, err
	}
	issuer, err := sts.New(ctx, sts.Config{Issuer: cfg.Issuer, TokenLifetime: cfg.TokenLifetime, Algorithm: cfg.SigningAlgorithm}, pool, keys, clients, log)
	if err != nil {
		return nil, err
	}
	issuers := []token.Issuer{issuer.Issuer()}
	for _, t := range cfg.TrustedIssuers {
		trusted, err := newTrustedIssuer(ctx, t, pool, log)
		if err != nil {
			return nil, fmt.Errorf("trusted issuer %s: %w", t.Iss, err)
		}
		issuers = append(issuers, trusted)
	}
	left, err := issuersWithoutKeys(ctx, pool, issuers, log)
	if err != nil {
		return nil, err
	}
	verifier, err := token.NewVerifier(append(issuers, left...)...)
	if err != nil {
		return nil, err
	}
	return httpapi.New(httpConfig(cfg), httpapi.Deps{
		Clients: clients, Verifier: verifier, Ledger: l, Routes: []func(chi.Router){issuer.Routes},
		Remote: clients.Remote, Registerer: reg, Log: log,
	})
}

// issuersWithoutKeys are those that the database knows and cfg does not. Their tokens
// may well be live elsewhere: they are not unknown, their keys cannot be had.
func issuersWithoutKeys(ctx context.Context, pool *pgxpool.Pool, configured []token.Issuer, log *slog.Logger) ([]token.Issuer, error) {
	registered, err := sts.Issuers(ctx, pool)
	if err != nil {
		return nil, err
	}
	var left []token.Issuer
	for _, iss := range registered {
		if slices.ContainsFunc(configured, func(c token.Issuer) bool { return c.Iss == iss }) {
			continue
		}
		log.Warn("an issuer is registered and its keys are not configured: revocations of its tokens are refused with 503; "+
			"add it to RESCIND_TRUSTED_ISSUERS_FILE, or delete it from rescind.key_managers", "issuer", iss)
		left = append(left, token.Issuer{Iss: iss, Keys: noKeys{}})
	}
	return left, nil
}

type noKeys struct{}

func (noKeys) Key(context.Context, string, string) (token.Key, error) {
	return token.Key{}, fmt.Errorf("%w: they are not configured", token.ErrKeysUnavailable)
}

// newTrustedIssuer registers t, whose keys are not needed before a token of its
// own is revoked: an issuer that is down keeps nobody from starting.
func newTrustedIssuer(ctx context.Context, t TrustedIssuer, pool *pgxpool.Pool, log *slog.Logger) (token.Issuer, error) {
	tenant, err := sts.RegisterIssuer(ctx, pool, sts.Registration{
		Iss: t.Iss, Name: t.Name, Tenant: t.Tenant, MaxTokenLifetime: t.MaxTokenLifetime,
	})
	if err != nil {
		return token.Issuer{}, err
	}
	issuer := token.Issuer{
		Iss: t.Iss, Tenant: tenant, Algorithms: t.Algorithms, AllowTypes: t.AllowTyp, MaxLifetime: t.MaxTokenLifetime,
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
