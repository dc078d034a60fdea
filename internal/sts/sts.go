// Package sts is our own token issuer. It hides how tokens are minted, where the
// signing keys are kept and how they are sealed. It owns the table signing_keys.
//
// # Tokens and revocations
//
// A revocation of a client, a subject or a tenant ends what was issued up to its time,
// which is the database's clock when it was made plus the clock skew. So a token that is
// minted just after it must be stamped later, with the first second that no revocation
// reaches, or it is dead when it is handed out.
//
// For that the replica must have all that was committed when the request came. If it were
// a second behind, whoever has ended its tokens and asks for the next one would get a dead
// one, and whoever was registered a moment ago would get none.
//
// A client that loses its right to tokens, because it is blocked, deleted or rotated, has
// its tokens revoked in the same transaction. If that is committed after the request came,
// and so missed, its time is not before the request's, which is what the token bears. Two
// things keep a token from its reach: a commit that takes longer than the clock skew, and
// another revocation of the client so short before that the token is stamped past both.
// The events of the block or the deletion still stop such a token at the gateways.
//
// # Decisions
//
// A client without an audience gets tokens for the issuer itself: aud is
// required, and no API that checks it accepts such a token.
//
// The database's clock alone decides which keys are in use: a process whose
// clock is behind must not find itself without one.
//
// A key goes on being published after it was retired until its last token has
// ended, and a second key is published before it is used, for as long as others
// may cache the key set. Signing keys are read again every few seconds, so
// processes agree on them without talking to each other.
package sts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/authn"
)

// MaxTokenLifetime is the longest that a token of ours lives.
const MaxTokenLifetime = time.Hour

// Config tunes the issuer. All but Issuer, KeyManagerID and State may stay zero.
type Config struct {
	// Issuer is the iss of the super tenant's tokens, and the URL below which
	// clients reach us, with no slash at its end. A database belongs to the one
	// that it was first used with.
	Issuer string
	// KeyManagerID is the row of rescind.key_managers that is Issuer's. Its longest
	// token lifetime is [MaxTokenLifetime].
	KeyManagerID int32
	// State says who may have tokens and which are revoked.
	State State
	// TokenLifetime is how long tokens of clients live that have no lifetime of
	// their own. Shorter limits what a lost gateway accepts; longer means fewer
	// requests for tokens. Default 15 min, 1 s to 1 h.
	TokenLifetime time.Duration
	// Algorithm of new tokens is RS256, the default, which every gateway knows, or
	// ES256, which is cheaper to sign. A new choice takes effect ten minutes after
	// the first start with it, when all have the new key.
	Algorithm string
	// MaxQueue is how many tokens may be waiting for their signature; past that
	// callers are told to come back. As many as there are CPUs are signed at a time,
	// at about 1 ms each. Default 128, 1 to 10000.
	MaxQueue int
}

var (
	algorithms = []string{"RS256", "ES256"}
	issuerPath = regexp.MustCompile(`^(/[A-Za-z0-9._~-]+)*$`)
)

// complete sets what is zero and reports all that is wrong.
func (c Config) complete() (Config, error) {
	if c.TokenLifetime == 0 {
		c.TokenLifetime = 15 * time.Minute
	}
	if c.Algorithm == "" {
		c.Algorithm = algorithms[0]
	}
	if c.MaxQueue == 0 {
		c.MaxQueue = 128
	}
	var errs []error
	u, err := url.Parse(c.Issuer)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" ||
		!issuerPath.MatchString(u.EscapedPath()) || u.String() != c.Issuer || len(c.Issuer) > 255 {
		errs = append(errs, fmt.Errorf("issuer %q: must be a URL such as https://km.example.com, at most 255 bytes, "+
			"without user, query, fragment and slash at its end", c.Issuer))
	}
	if c.KeyManagerID <= 0 {
		errs = append(errs, fmt.Errorf("key manager %d: must be the id of a key manager", c.KeyManagerID))
	}
	if c.TokenLifetime < time.Second || c.TokenLifetime > MaxTokenLifetime || c.TokenLifetime%time.Second != 0 {
		errs = append(errs, fmt.Errorf("token lifetime %s: must be whole seconds, 1s to %s", c.TokenLifetime, MaxTokenLifetime))
	}
	if !slices.Contains(algorithms, c.Algorithm) {
		errs = append(errs, fmt.Errorf("signing algorithm %q: must be one of %q", c.Algorithm, algorithms))
	}
	if c.MaxQueue < 1 || c.MaxQueue > 10000 {
		errs = append(errs, fmt.Errorf("signing queue of %d: must be 1 to 10000", c.MaxQueue))
	}
	return c, errors.Join(errs...)
}

// State is the state of the log in this process. [follow.Follower] is one.
type State interface {
	// Fresh waits until the replica has everything up to a head of the log that was read
	// at most maxAge before the call, or after it with 0.
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.Replica
}

// Forms reads a form and authenticates the client that sent it.
// [authn.Authenticator] does.
type Forms interface {
	Form(w http.ResponseWriter, r *http.Request, known ...string) (authn.Client, url.Values, error)
}

// Server is the issuer of the super tenant. Its methods may be called from any
// goroutine.
type Server struct {
	cfg      Config
	forms    Forms
	log      *slog.Logger
	now      func() time.Time
	store    *keyStore
	keys     *token.CachedKeySet
	ring     atomic.Pointer[ring] // what keys last loaded
	metadata document

	queue   chan struct{} // a place for each token that waits or is being signed
	signing chan struct{} // a place for each that is being signed
}

// New makes the issuer's first signing key unless there is one, and loads its keys. The
// first of masterKeys seals new signing keys; the others open old ones too.
func New(ctx context.Context, cfg Config, pool *pgxpool.Pool, masterKeys []authn.MasterKey, forms Forms, log *slog.Logger) (*Server, error) {
	cfg, err := cfg.complete()
	if len(masterKeys) == 0 {
		err = errors.Join(err, errors.New("no master key is given"))
	}
	if cfg.State == nil {
		err = errors.Join(err, errors.New("no state is given"))
	}
	if err != nil {
		return nil, fmt.Errorf("configure token issuer: %w", err)
	}
	s := &Server{
		cfg:     cfg,
		forms:   forms,
		log:     log.With("component", "sts"),
		now:     time.Now,
		store:   &keyStore{pool: pool, iss: cfg.Issuer, keyManagerID: cfg.KeyManagerID, masterKeys: masterKeys},
		queue:   make(chan struct{}, cfg.MaxQueue),
		signing: make(chan struct{}, runtime.GOMAXPROCS(0)),
	}
	if s.metadata, err = newMetadata(cfg.Issuer); err != nil {
		return nil, err
	}
	made, err := s.store.ensureKey(ctx, cfg.Algorithm)
	if err != nil {
		return nil, fmt.Errorf("make signing key of %s: %w", cfg.Issuer, err)
	}
	if made != "" {
		s.log.Info("signing key made", "kid", made, "alg", cfg.Algorithm)
	}
	s.keys = token.NewCachedKeySet(token.CacheConfig{
		Refresh: 10 * time.Second,
		// Whether a kid is unknown is always answered from the database, and a flood
		// of invented ones costs it twenty short queries a second.
		Refetch: 50 * time.Millisecond, Patience: time.Second,
		Logger: s.log,
	}, s.loadKeys)
	keys, err := s.currentKeys(ctx)
	if err != nil {
		return nil, fmt.Errorf("load signing keys of %s: %w", cfg.Issuer, err)
	}
	if len(keys.sealed) > 0 {
		return nil, errors.Join(keys.sealed...)
	}
	return s, nil
}

func (s *Server) loadKeys(ctx context.Context) (*token.StaticKeySet, error) {
	last := s.ring.Load()
	r, err := s.store.load(ctx, last)
	if err != nil {
		return nil, err
	}
	if last != nil && len(r.sealed) > len(last.sealed) {
		s.log.Warn("cannot sign with all of the issuer's keys", "error", errors.Join(r.sealed...))
	}
	s.ring.Store(r)
	return r.keys, nil
}

// currentKeys are the issuer's keys, not older than some seconds while the
// database can be read.
func (s *Server) currentKeys(ctx context.Context) (*ring, error) {
	if _, err := s.keys.Current(ctx); err != nil {
		return nil, err
	}
	return s.ring.Load(), nil
}

// Issuer is what verifiers of our tokens need. Its keys are read from the
// database when one is asked for that was not there before.
func (s *Server) Issuer() token.Issuer {
	return token.Issuer{
		Iss: s.cfg.Issuer, Tenant: revocation.SuperTenant, Keys: s.keys,
		Algorithms: algorithms, MaxLifetime: MaxTokenLifetime,
	}
}

// Routes adds the token endpoint, the key set (RFC 7517) and the metadata (RFC
// 8414) to r, which stands at the root of the host. The endpoints of an issuer
// with a path are there with it and without it, so that it does not matter
// whether a proxy cuts it off.
func (s *Server) Routes(r chi.Router) {
	u, err := url.Parse(s.cfg.Issuer)
	if err != nil {
		panic(err) // complete has parsed it
	}
	prefixes := []string{""}
	if u.Path != "" {
		prefixes = append(prefixes, u.Path)
	}
	for _, prefix := range prefixes {
		r.HandleFunc(prefix+tokenPath, s.serveToken) // of any method: Form answers them all
		r.Get(prefix+jwksPath, s.serveKeys)
		r.Head(prefix+jwksPath, s.serveKeys)
	}
	metadata := metadataPath + u.Path // RFC 8414 section 3.1: before the issuer's path
	r.Get(metadata, s.serveMetadata)
	r.Head(metadata, s.serveMetadata)
}
