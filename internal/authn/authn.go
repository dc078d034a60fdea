// Package authn hides how callers prove who they are: OAuth clients by their
// secret, people and gateways by a password, and what slows down those who
// guess. It owns the tables clients, client_secrets and accounts.
//
// # Invariants
//
// A credential is refused only on the word of a row that was read from the
// database within the last second, so a secret made elsewhere works at once.
// It is accepted on the word of one that is at most [Config.Freshness] old, so
// a secret removed elsewhere ends within that time.
//
// When the database is away, callers that were seen in the last [Config.MaxStale]
// are still let in, to be told by what they call that it cannot be done now. All
// others get 503, and never a 401 that would send them looking for a mistake of
// their own.
//
// An unknown id, a wrong secret or assertion and the wrong way to send it take the same
// steps and get the same answer.
//
// An assertion is accepted once, whichever process it is sent to, and only if that is on
// disk: so it gets 503 when the database is away, even if its client was seen. It may count as
// used then, and when an answer is lost: to ask again takes a new one.
//
// # Decisions
//
// Client secrets have 256 bits, so a fast HMAC is enough, which costs a request
// about a microsecond; it is keyed, so a stolen database is of no use
// without the master key, and it covers the client id, so rows cannot be swapped.
// Passwords that people choose take Argon2id.
//
// Failures count for each source address, and for each client id at an address,
// never for a client id alone: a thief must not lock the owner out of revoking.
// For the same reason an id that has proved itself at an address is spared what
// others fail there: behind one proxy or NAT all have one address. The throttle is asked
// before a signature is verified: that costs as much as a hundred secrets. A Bearer token says
// nothing of its sender before that, so it counts for the address alone.
package authn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// Config tunes authentication. The zero value is ready for production.
type Config struct {
	// Issuer is the iss of the super tenant: assertions of clients must be for it, or for the
	// issuer of the client's tenant, which is below it.
	Issuer string
	// LegacyAssertionAudience also accepts assertions for the URL of the token endpoint.
	LegacyAssertionAudience bool
	// TrustedProxies are those whose X-Forwarded-For is believed. Default none.
	TrustedProxies []netip.Prefix
	// Freshness is how long a client, key mapping or account is used without
	// asking the database again, hence how long one that was removed lives on in
	// the other processes. Default 10s, 1s to 1m.
	Freshness time.Duration
	// MaxStale is how long it is used while the database cannot be asked.
	// Default 5m, at least Freshness, at most 1h.
	MaxStale time.Duration
	// LookupTimeout bounds one question to the database with the wait for its turn, and
	// one wait for a place to hash a password. Default 2s, 100ms to 30s.
	LookupTimeout time.Duration
	// MaxLookups is how many questions to the database run at a time: callers
	// nobody knows must not take all its connections. Assertions, of clients that are
	// known, are used up through one more. Default 4, 1 to 100.
	MaxLookups int
	// CacheSize is how many clients are remembered, how many key mappings, and how
	// many accounts, known and unknown ones together. A client takes about 1 KiB, with
	// private_key_jwt about 3 KiB, and 16 KiB with ten keys of 8192 bits; who has more
	// clients than this at work asks the database for each request. Default 50000, 100
	// to 10000000.
	CacheSize int
	// AddressFailures is how many failures an address may make at once, and
	// CallerFailures how many for one client id or user name; after that, one a
	// second. More is kinder to many clients behind one address, and to guessers.
	// Default 50 and 10, 1 to 100000.
	AddressFailures, CallerFailures int
	// MaxSources is how many addresses are watched, and how many callers at
	// them. Default 50000, 1000 to 10000000.
	MaxSources int
	// MaxHashes is how many passwords are hashed at a time, each with 19 MiB of
	// memory. Default 2, 1 to 64.
	MaxHashes int
}

func (c Config) withDefaults() (Config, error) {
	var errs []error
	duration := func(name string, p *time.Duration, d, low, high time.Duration) {
		if *p == 0 {
			*p = d
		}
		if *p < low || *p > high {
			errs = append(errs, fmt.Errorf("%s is %s, must be %s to %s", name, *p, low, high))
		}
	}
	number := func(name string, p *int, n, low, high int) {
		if *p == 0 {
			*p = n
		}
		if *p < low || *p > high {
			errs = append(errs, fmt.Errorf("%s is %d, must be %d to %d", name, *p, low, high))
		}
	}
	duration("Freshness", &c.Freshness, 10*time.Second, time.Second, time.Minute)
	duration("MaxStale", &c.MaxStale, max(5*time.Minute, c.Freshness), c.Freshness, time.Hour)
	duration("LookupTimeout", &c.LookupTimeout, 2*time.Second, 100*time.Millisecond, 30*time.Second)
	number("MaxLookups", &c.MaxLookups, 4, 1, 100)
	number("CacheSize", &c.CacheSize, 50000, 100, 10000000)
	number("AddressFailures", &c.AddressFailures, 50, 1, 100000)
	number("CallerFailures", &c.CallerFailures, 10, 1, 100000)
	number("MaxSources", &c.MaxSources, 50000, 1000, 10000000)
	number("MaxHashes", &c.MaxHashes, 2, 1, 64)
	for _, p := range c.TrustedProxies {
		if !p.IsValid() {
			errs = append(errs, errors.New("TrustedProxies has an entry that is no address range"))
		}
	}
	return c, errors.Join(errs...)
}

// recheckAge is the greatest age of a row on whose word a caller is refused.
const recheckAge = time.Second

// Authenticator knows who calls. Its methods may be called from any goroutine.
type Authenticator struct {
	cfg      Config
	pool     *pgxpool.Pool
	secrets  *secretHasher
	log      *slog.Logger
	metrics  *metrics
	throttle *throttle

	clients  *cache[string, *clientRow]
	owners   *cache[consumer, ownerRow]
	accounts *cache[string, accountRow]
	verified *passwords

	decoy token.KeySet // verifies nothing of anybody
	uses  uses
	// useUp is useUpAssertion, but where a test has no database.
	useUp func(context.Context, *once) (bool, error)
}

// New returns an Authenticator on pool. The first of keys keys the HMACs of new
// secrets; the others only verify, for as long as secrets made under them live.
func New(cfg Config, pool *pgxpool.Pool, keys []MasterKey, reg prometheus.Registerer, log *slog.Logger) (*Authenticator, error) {
	cfg, err := cfg.withDefaults()
	if len(keys) == 0 {
		err = errors.Join(err, errors.New("no master key is given"))
	}
	if err != nil {
		return nil, fmt.Errorf("configure authentication: %w", err)
	}
	a := &Authenticator{
		cfg:      cfg,
		pool:     pool,
		secrets:  newSecretHasher(keys),
		log:      log.With("component", "authn"),
		metrics:  newMetrics(reg),
		throttle: newThrottle(cfg),
		verified: newPasswords(cfg.MaxHashes),
		decoy:    anyKey{decoyKeys()},
	}
	a.useUp = a.useUpAssertion
	slots := make(chan struct{}, cfg.MaxLookups)
	a.clients = newCache(cfg, slots, a.metrics, a.readClients)
	a.owners = newCache(cfg, slots, a.metrics, a.readOwners)
	a.accounts = newCache(cfg, slots, a.metrics, a.readAccounts)
	return a, nil
}

// Client is an OAuth client that has proved who it is. Its slices are shared:
// they are not to be changed.
type Client struct {
	ID            string
	ApplicationID int32
	// Tenant owns the client's application and the issuer of its tokens.
	Tenant revocation.Tenant
	// Issuer is the iss of the client's key manager, MaxTokenLifetime the longest
	// life of a token of it.
	Issuer           string
	MaxTokenLifetime time.Duration
	// Public is a client without a secret or keys: it has said who it is, and proved nothing.
	Public bool

	Scopes, DefaultScopes, Audience []string
	// TokenLifetime is 0 for the server's default.
	TokenLifetime time.Duration
	// GrantTypes are those that it may use at the token endpoint.
	GrantTypes []string
	// TokenTyp is the typ of its tokens: "at+jwt", or "JWT" for gateways that know no other.
	TokenTyp string
	// ResourceAudiences are the audiences that it is the resource server of: of tokens for
	// these, issued in its tenant, it may ask whether they are active.
	ResourceAudiences []string

	// RevokeByJTI permits a bare jti in place of a token.
	RevokeByJTI bool
	// RevokeOpaque permits tokens of the client's issuer that only that issuer can
	// read. Never set for our own issuers.
	RevokeOpaque bool
	// RevokeQuota is how many revocation requests it may make a second; 0 is no limit.
	RevokeQuota int
}

type metrics struct {
	callers *prometheus.CounterVec
	lookups *prometheus.CounterVec
}

const (
	callerAccepted    = "accepted"
	callerRefused     = "refused"
	callerThrottled   = "throttled"
	callerUnavailable = "unavailable"

	lookupRead   = "read"
	lookupFailed = "failed"
	lookupStale  = "stale"
)

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		callers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_authn_callers_total",
			Help: "Callers by what became of their credentials.",
		}, []string{"result"}),
		lookups: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rescind_authn_lookups_total",
			Help: "Questions to the database about callers; stale ones were answered from memory because it failed.",
		}, []string{"result"}),
	}
	for _, result := range []string{callerAccepted, callerRefused, callerThrottled, callerUnavailable} {
		m.callers.WithLabelValues(result)
	}
	for _, result := range []string{lookupRead, lookupFailed, lookupStale} {
		m.lookups.WithLabelValues(result)
	}
	reg.MustRegister(m.callers, m.lookups)
	return m
}
