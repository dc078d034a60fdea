// Package sts is our own token issuers: one for each tenant, whose endpoints are below its
// iss. It hides how tokens are minted, where the signing keys are kept and how they are
// sealed. It owns the table signing_keys.
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
// The events of the block or the deletion still stop such a token at the gateways. The log
// has the change before its revocation: who sees the revocation, and stamps a token past it,
// sees the change too, and if he sees the change alone, the revocation ends the token.
//
// Gateways that know no revocations of more than one token are told of each token by its
// jti: those that were remembered when the revocation was committed, see [Memory]. So a
// token is remembered once it is signed, and then the state is looked at once more. A
// revocation that was committed before the token was remembered, and so will not name it, is
// in that state: if it ends the token, another is begun, with another jti and a later time.
// One that is committed afterwards finds the token among those that it names.
//
// A token is handed out only if the replica has no revocation of it or of its key. Whoever
// withdraws a key revokes it in the same transaction, and whoever revokes one has withdrawn
// it. So a process that learns of the revocation reads its keys anew, and makes another if
// none is left: to revoke the only key must not stop the issuer.
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
//
// The first key of a tenant's issuer is made when somebody first asks for its tokens or
// its key set: most tenants never do. As anybody may ask, one key is made at a time.
//
// An application without a subscription gets no self-contained token: to Microgateway 3.0
// one that names no APIs is good for all.
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
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
)

// MaxTokenLifetime is the longest that a token of ours lives.
const MaxTokenLifetime = time.Hour

// Config tunes the issuers. All but Issuer and State may stay zero.
type Config struct {
	// Issuer is the iss of the super tenant's tokens, and the URL below which
	// clients reach us, with no slash at its end. That of another tenant is
	// Issuer/t/<domain>. A database belongs to the one that it was first used with.
	Issuer string
	// State says which issuers there are, who may have tokens and which are revoked.
	State State
	// Memory remembers tokens before they are issued. Nil: they are not.
	Memory Memory
	// TokenLifetime is how long tokens of clients live that have no lifetime of
	// their own. Shorter limits what a lost gateway accepts; longer means fewer
	// requests for tokens. Default 15 min, 1 s to 1 h.
	TokenLifetime time.Duration
	// Algorithm of new tokens is RS256, the default, which every gateway knows, or
	// ES256, which is cheaper to sign. A new choice takes effect ten minutes after
	// the first start with it, or the first use of a tenant's issuer after that: when all
	// have the new key.
	Algorithm string
	// MaxQueue is how many tokens may be in the making, most of them waiting for their
	// signature; past that callers are told to come back. As many as there are CPUs are
	// signed at a time, at about 1 ms each. Default 128, 1 to 10000.
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
	Replica() *replica.State
}

// Memory remembers the tokens that are issued. [ledger.Ledger] does.
type Memory interface {
	// Remember returns nil once t is remembered durably. Who revokes more than one token
	// names those that were remembered before.
	Remember(ctx context.Context, t ledger.Issued) error
}

// Forms reads a form and authenticates the client that sent it.
// [authn.Authenticator] does.
type Forms interface {
	Form(w http.ResponseWriter, r *http.Request, known ...string) (authn.Client, url.Values, error)
}

// Server is the issuers of all tenants. Its methods may be called from any goroutine.
type Server struct {
	cfg   Config
	forms Forms
	log   *slog.Logger
	now   func() time.Time
	store *keyStore

	queue   chan struct{} // a place for each token that is being made
	signing chan struct{} // a place for each that is being signed
	making  chan struct{} // the one place for a key that is being made

	mu      sync.Mutex
	issuers map[string]*issuer // by iss, those that were asked for
	sweepAt int                // how many there may be before those of tenants that are gone are dropped
	next    *look              // that has not begun; nil if nobody waits for one
	lastAt  time.Time          // when the last look began
}

// New makes the first signing key of the super tenant's issuer unless there is one, and loads
// its keys. Its key manager must be in the database; cfg.State need not have it yet. The first
// of masterKeys seals new signing keys; the others open old ones too.
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
		store:   &keyStore{pool: pool, masterKeys: masterKeys},
		queue:   make(chan struct{}, cfg.MaxQueue),
		signing: make(chan struct{}, runtime.GOMAXPROCS(0)),
		making:  make(chan struct{}, 1),
		issuers: make(map[string]*issuer),
	}
	if err := s.ensureKey(ctx, cfg.Issuer); err != nil {
		return nil, err
	}
	keys, err := s.issuer(cfg.Issuer, "").current(ctx)
	if err != nil {
		return nil, fmt.Errorf("load signing keys of %s: %w", cfg.Issuer, err)
	}
	if len(keys.sealed) > 0 {
		return nil, errors.Join(keys.sealed...)
	}
	return s, nil
}

// Routes adds the token endpoint, the key set (RFC 7517) and the metadata (RFC 8414, and OpenID
// Connect Discovery for those who read only that) of every issuer to r, which stands at the root
// of the host. What is below an issuer with a path is there with that path and without it, so
// that it does not matter whether a proxy cuts it off.
func (s *Server) Routes(r chi.Router) {
	u, err := url.Parse(s.cfg.Issuer)
	if err != nil {
		panic(err) // complete has parsed it
	}
	paths := []string{""}
	if u.Path != "" {
		paths = append(paths, u.Path)
	}
	get := func(path string, handler http.HandlerFunc) {
		r.Get(path, handler)
		r.Head(path, handler)
	}
	for _, path := range paths {
		for _, at := range []struct {
			path   string
			domain func(*http.Request) string
		}{
			{path, func(*http.Request) string { return revocation.SuperTenant.Domain }},
			{path + tenantPath + "{tenant}", tenantOf},
		} {
			r.HandleFunc(at.path+tokenPath, s.serveToken(at.domain)) // of any method: Form answers them all
			get(at.path+jwksPath, s.serveIssuer(at.domain, s.serveKeys))
			get(at.path+openIDPath, s.serveIssuer(at.domain, s.serveOpenID))
			get(metadataPath+at.path, s.serveIssuer(at.domain, s.serveMetadata)) // RFC 8414 section 3.1: before the issuer's path
		}
	}
}

// tenantOf is the domain in the path of r, empty for that of the super tenant: its issuer is not there.
func tenantOf(r *http.Request) string {
	domain := chi.URLParam(r, "tenant")
	if domain == revocation.SuperTenant.Domain || !catalog.ValidDomain(domain) {
		return ""
	}
	return domain
}
