package sts

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/rest"
)

// tenantPath is between the super tenant's issuer and the domain of another.
const tenantPath = "/t/"

const (
	// keysRefresh is the age at which signing keys are read again. Up to twice that a process
	// signs with what it has.
	keysRefresh = 10 * time.Second
	// maxRingAge is how old they may be at most to be signed with: publishedAfter counts on it.
	maxRingAge = 30 * time.Second
	// lookEvery is the shortest time between two looks for tenants that are not known here.
	lookEvery = 50 * time.Millisecond
)

// issuer is one of our own issuers, with its keys as this process has them.
type issuer struct {
	iss      string
	manager  string // the UUID of its key manager; empty before one is known. Under Server.mu
	keys     *token.CachedKeySet
	ring     atomic.Pointer[ring] // what keys last loaded
	metadata atomic.Pointer[describedAt]
}

// current are the issuer's keys, not older than some seconds while the database can be read.
func (is *issuer) current(ctx context.Context) (*ring, error) {
	if _, err := is.keys.Current(ctx); err != nil {
		return nil, err
	}
	return is.ring.Load(), nil
}

// reload reads the keys anew, whatever their age, as the search for a kid that no key has does.
func (is *issuer) reload(ctx context.Context) error {
	_, err := is.keys.Key(ctx, "none", algorithms[0])
	if errors.Is(err, token.ErrUnknownKey) {
		return nil
	}
	return err
}

// issuer is the one of this iss whose key manager has this UUID, or whichever there is if that
// is empty. Nothing is read before its keys are used. What was read for a tenant that was
// deleted is not used for one that was made in its place.
func (s *Server) issuer(iss, manager string) *issuer {
	s.mu.Lock()
	defer s.mu.Unlock()
	is := s.issuers[iss]
	if is == nil || is.manager != "" && manager != "" && is.manager != manager {
		is = &issuer{iss: iss}
		is.keys = cachedKeys(iss, s.log, func(ctx context.Context) (*token.StaticKeySet, error) { return s.loadKeys(ctx, is) })
		s.issuers[iss] = is
	}
	is.manager = cmp.Or(is.manager, manager)
	return is
}

func cachedKeys(iss string, log *slog.Logger, load func(context.Context) (*token.StaticKeySet, error)) *token.CachedKeySet {
	return token.NewCachedKeySet(token.CacheConfig{
		Refresh: keysRefresh,
		// Whether a kid is unknown is always answered from the database, and a flood
		// of invented ones costs it twenty short queries a second.
		Refetch: 50 * time.Millisecond, Patience: time.Second,
		Logger: log.With("issuer", iss),
	}, load)
}

// loadKeys reads is's keys, and makes one first if it has none to sign with. There is one
// call at a time for an issuer.
func (s *Server) loadKeys(ctx context.Context, is *issuer) (*token.StaticKeySet, error) {
	last := is.ring.Load()
	ensured := last == nil // there may be none of the algorithm that this process was told to use
	if ensured {
		if err := s.ensureKey(ctx, is.iss); err != nil {
			return nil, err
		}
	}
	r, err := s.store.load(ctx, is.iss, last)
	if err == nil && len(r.signers)+len(r.sealed) == 0 && !ensured {
		if err := s.ensureKey(ctx, is.iss); err != nil {
			return nil, err
		}
		r, err = s.store.load(ctx, is.iss, last)
	}
	if err != nil {
		return nil, err
	}
	if r.keys == nil {
		return nil, fmt.Errorf("%s has no signing key", is.iss)
	}
	if len(r.sealed) > 0 && (last == nil || len(r.sealed) > len(last.sealed)) {
		s.log.Warn("cannot sign with all of the issuer's keys", "issuer", is.iss, "error", errors.Join(r.sealed...))
	}
	is.ring.Store(r)
	return r.keys, nil
}

// ensureKey makes a key of the algorithm that this process was told to use, if iss needs one.
func (s *Server) ensureKey(ctx context.Context, iss string) error {
	has, err := s.store.hasKey(ctx, iss, s.cfg.Algorithm)
	if err != nil || has {
		return err
	}
	select {
	case s.making <- struct{}{}:
		defer func() { <-s.making }()
	case <-ctx.Done():
		return fmt.Errorf("make signing key of %s: %w", iss, context.Cause(ctx))
	}
	made, revoked, err := s.store.ensureKey(ctx, iss, s.cfg.Algorithm)
	switch {
	case err != nil:
		return fmt.Errorf("make signing key of %s: %w", iss, err)
	case made != "" && len(revoked) > 0:
		s.log.Warn("signing keys are revoked, so another was made", "issuer", iss, "revoked", revoked, "kid", made, "alg", s.cfg.Algorithm)
	case made != "":
		s.log.Info("signing key made", "issuer", iss, "kid", made, "alg", s.cfg.Algorithm)
	}
	return nil
}

// Issuer is what verifiers need of an issuer of our own, whose key manager km is: a resident
// one. Its keys are read from the database when one is asked for that was not there before.
// It may be called within a [replica.View].
func (s *Server) Issuer(km *catalog.KeyManager) token.Issuer {
	return verified(km, s.issuer(km.Iss, km.UUID).keys)
}

func verified(km *catalog.KeyManager, keys token.KeySet) token.Issuer {
	return token.Issuer{
		Iss: km.Iss, Tenant: km.Tenant, Keys: keys,
		Algorithms: algorithms, AllowTypes: []string{typJWT}, MaxLifetime: MaxTokenLifetime,
	}
}

// Verifier is what of a [Server] verifies: it makes and opens no signing keys.
type Verifier struct {
	store *keyStore
	log   *slog.Logger
}

// NewVerifier returns a Verifier, which reads keys from pool when they are asked for.
func NewVerifier(pool *pgxpool.Pool, log *slog.Logger) *Verifier {
	return &Verifier{&keyStore{pool: pool}, log.With("component", "sts")}
}

// Issuer is [Server.Issuer], each time with keys that are read anew. One that has no keys yet
// knows no kid.
func (v *Verifier) Issuer(km *catalog.KeyManager) token.Issuer {
	return verified(km, cachedKeys(km.Iss, v.log, func(ctx context.Context) (*token.StaticKeySet, error) {
		_, set, err := v.store.published(ctx, km.Iss)
		if err != nil || len(set.Keys) == 0 {
			return &token.StaticKeySet{}, err
		}
		body, err := json.Marshal(set)
		if err != nil {
			return nil, fmt.Errorf("encode key set: %w", err)
		}
		return token.ParseKeySet(body)
	}))
}

// CheckTenant returns nil if a tenant's issuer is at /t/domain below that of the super tenant,
// also if the tenant was made a moment ago by another process. Else its error is an
// [authn.OAuthError] with status 404, or 503 where it cannot be told now.
func (s *Server) CheckTenant(ctx context.Context, domain string) error {
	if domain == revocation.SuperTenant.Domain {
		return errNoIssuerHere
	}
	if _, _, err := s.find(ctx, domain); err != nil {
		return oauthError(err)
	}
	return nil
}

// errNoTenant is of paths at which there is no issuer.
var errNoTenant = errors.New("there is no issuer here")

// find returns a tenant's issuer and its key manager. Its error is [errNoTenant] when there is
// none, also in the database.
func (s *Server) find(ctx context.Context, domain string) (*issuer, *catalog.KeyManager, error) {
	iss := s.cfg.Issuer
	if domain != revocation.SuperTenant.Domain {
		if !catalog.ValidDomain(domain) {
			return nil, nil, errNoTenant
		}
		iss += tenantPath + domain
	}
	km := s.keyManager(iss, domain)
	if km == nil {
		if err := s.look(ctx); err != nil {
			return nil, nil, err
		}
		if km = s.keyManager(iss, domain); km == nil {
			return nil, nil, errNoTenant
		}
	}
	s.sweep()
	return s.issuer(iss, km.UUID), km, nil
}

func (s *Server) keyManager(iss, domain string) (km *catalog.KeyManager) {
	s.cfg.State.Replica().View(func(v *replica.View) { km = residentOf(v, iss, domain) })
	return km
}

// residentOf is the key manager of iss, if that is the tenant's issuer of our own.
func residentOf(v *replica.View, iss, domain string) *catalog.KeyManager {
	km := v.KeyManager(iss)
	if km == nil || !km.Resident || km.Tenant.Domain != domain {
		return nil
	}
	return km
}

// sweep drops the issuers of tenants that are gone, whenever there are twice as many as it left.
func (s *Server) sweep() {
	s.mu.Lock()
	if len(s.issuers) <= s.sweepAt {
		s.mu.Unlock()
		return
	}
	all := make([]string, 0, len(s.issuers))
	for iss := range s.issuers {
		all = append(all, iss)
	}
	s.mu.Unlock()
	var gone []string
	s.cfg.State.Replica().View(func(v *replica.View) { // without s.mu: within a view it may be waited for
		for _, iss := range all {
			if v.KeyManager(iss) == nil {
				gone = append(gone, iss)
			}
		}
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, iss := range gone {
		delete(s.issuers, iss)
	}
	s.sweepAt = 2*len(s.issuers) + 16
}

// look is a look for what other processes have committed. err is set before done is closed.
type look struct {
	done chan struct{}
	err  error
}

// look returns when the replica has all that was committed before the call. Those who call
// within a short time look together: tenants that are invented must not cost a question each.
func (s *Server) look(ctx context.Context) error {
	s.mu.Lock()
	l := s.next
	if l == nil {
		l = &look{done: make(chan struct{})}
		s.next = l
		time.AfterFunc(lookEvery-time.Since(s.lastAt), func() {
			s.mu.Lock()
			s.next, s.lastAt = nil, time.Now()
			s.mu.Unlock()
			// Not that of one who waits: others do too. Fresh ends within seconds.
			_, l.err = s.cfg.State.Fresh(context.Background(), 0)
			close(l.done)
		})
	}
	s.mu.Unlock()
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// serveIssuer answers with what serve does for the issuer of a tenant.
func (s *Server) serveIssuer(domain func(*http.Request) string,
	serve func(w http.ResponseWriter, r *http.Request, is *issuer, km *catalog.KeyManager) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		is, km, err := s.find(r.Context(), domain(r))
		if err == nil {
			err = serve(w, r, is, km)
		}
		switch {
		case errors.Is(err, errNoTenant):
			rest.Write(w, r, rest.Status(http.StatusNotFound, "There is no issuer at this address."))
		case err != nil:
			rest.Write(w, r, &rest.Problem{
				Status: http.StatusServiceUnavailable, Detail: "This cannot be read now.", RetryAfter: storageRetry, Cause: err,
			})
		}
	}
}

// oauthError is an error of find as a form endpoint answers it.
func oauthError(err error) *authn.OAuthError {
	if errors.Is(err, errNoTenant) {
		return errNoIssuerHere
	}
	return authn.Unavailable(storageRetry, err)
}
