// Package gateway is the whole check of a gateway: the JWT, what is revoked, and what the
// catalog says. It hides key sets and what is asked of whom when too little is known, so that a
// gateway in Go is a few lines around [Gateway.Handler].
//
// # Invariants
//
// What is authorised is what is on the wire: a target that two readers could read as two is
// refused, and nothing of it is decoded before. A token is looked for in the field Authorization
// alone, and nothing that a client sends of [IdentityHeaders] reaches what is behind.
//
// Every request is checked against what the replica knows at that moment: nothing is decided
// once and remembered. What is revoked is looked at last, after all waiting.
//
// A refused token is told no cause: status, challenge and body are the same for all.
//
// # Decisions
//
// A token that cannot be judged, because no keys of its issuer are here, is answered 503 with
// WSO2's code 900912, where WSO2's gateways answer 401. A client throws its token away at 401, and
// gets another one from a key manager that may be ill itself. One whose kid the keys that are
// here lack is 401: anybody can invent a kid.
//
// An operation without authentication is for everybody. With a token that is no good it is as without
// one, since whoever sent it could have left it out; with any token, the backend is told of nobody.
package gateway

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// Config is what [New] makes a gateway of. Replica is needed, and Audiences or AnyAudience, and
// URL or Issuers.
type Config struct {
	// Replica is run by [Gateway.Run].
	Replica *replica.Replica
	// URL is the service's base URL: the keys of issuers of its own are fetched there, wherever
	// its host lies. https, or http where the host is loopback.
	URL string
	// AllowHTTP permits http:// to other hosts than loopback.
	AllowHTTP bool
	// RootCAs verify the certificate of URL. Default: those of the system. Keys are fetched without
	// a proxy, whatever the environment says, from URL too: a proxy would connect where the rules
	// for that cannot be checked.
	RootCAs *x509.CertPool
	// Issuers are trusted besides the key managers in the catalog. Their keys, algorithms and
	// types come before those of a key manager with the same iss, whose tenant counts, and which
	// can be disabled. Of two lifetimes the shorter one counts; where there is none it is an hour.
	// Needed where the replica has revocations only; then one without a Tenant is believed about
	// all tenants, unless the replica serves one alone.
	Issuers []token.Issuer
	// Networks are ranges in which key sets of key managers that are not the service's own
	// may be fetched though they are not public, there by http:// too.
	Networks []netip.Prefix
	// Folder is where key sets are kept for a start without those who serve them, in files that begin
	// with keys-; those of key managers that are gone are removed. It is made if it is not there,
	// may be the replica's, and is not shared with another gateway. Empty: nowhere.
	Folder string

	// Audiences are the identifiers of this gateway, one of which aud must have. AnyAudience
	// in their place: aud is not looked at.
	Audiences   []string
	AnyAudience bool
	// Leeway is for the clocks of issuers. Up to 120 s, whole seconds. Default 30 s; negative: none.
	Leeway time.Duration
	// Realm is in WWW-Authenticate: printable ASCII without " and \. Default "api".
	Realm string
	// Introspection is needed where a staleness is [replica.Introspect]: without it what is to be
	// asked there is answered 503.
	Introspection *Introspection
	// Logger is told of keys that cannot be fetched, of issuers that cannot be used, and of
	// introspection that fails. Default: nobody.
	Logger *slog.Logger
}

// Introspection is whom to ask about tokens when too little is known (RFC 7662).
type Introspection struct {
	// URL is the introspection endpoint, without a query; https unless the host is loopback.
	URL string
	// Issuers are those, by iss, whose tokens are sent to URL; nobody can be asked about others. Empty:
	// all are, which is right only where URL is the service's, which judges tokens of all its
	// tenants. Another issuer's endpoint would get to see tokens that are not its own.
	Issuers []string
	// ClientID and ClientSecret are of a client that is the resource server of the tokens' audience.
	ClientID, ClientSecret string
	// Client sends the requests. It follows no redirect, whatever its own policy. Default: one
	// with timeouts, and the system's authorities.
	Client *http.Client
	// Timeout bounds one question. Default 2 s.
	Timeout time.Duration
	// MaxConcurrent are asked at a time; past it the token is refused. Default 64.
	MaxConcurrent int
}

// Gateway decides about requests. Make one with [New]. Its methods may be called from any goroutine.
type Gateway struct {
	replica       *replica.Replica
	issuers       *issuers
	acceptance    token.Acceptance
	challenges    challenges
	introspection *introspection // nil: there is nobody to ask
}

const (
	defaultLeeway = 30 * time.Second
	defaultRealm  = "api"
)

// New checks cfg, and reads the key sets that cfg.Folder has, so that the gateway can decide at
// once if its replica can. It connects to nothing. Its error names all that is wrong with cfg.
func New(cfg Config) (*Gateway, error) {
	if cfg.Leeway == 0 {
		cfg.Leeway = defaultLeeway
	}
	if cfg.Realm == "" {
		cfg.Realm = defaultRealm
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	log := cfg.Logger.With("component", "gateway")
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if cfg.Replica == nil {
		wrong("Replica is nil, must be one from replica.New")
	}
	switch {
	case len(cfg.Audiences) == 0 && !cfg.AnyAudience:
		wrong("Audiences is empty, must have the identifiers of this gateway; AnyAudience says that tokens for others are taken too")
	case len(cfg.Audiences) > 0 && cfg.AnyAudience:
		wrong("Audiences and AnyAudience are both set: leave one of them out")
	case slices.Contains(cfg.Audiences, ""):
		wrong("Audiences has an empty one: leave it out")
	}
	if cfg.URL == "" && len(cfg.Issuers) == 0 {
		wrong("URL and Issuers are both empty: without one of them no token can be verified")
	}
	if cfg.URL != "" {
		if err := checkURL(cfg.URL, cfg.AllowHTTP); err != nil {
			wrong("URL: %w", err)
		}
	}
	if cfg.Leeway > revocation.MaxLeeway || cfg.Leeway%time.Second != 0 && cfg.Leeway > 0 {
		wrong("Leeway is %s, must be whole seconds up to %s", cfg.Leeway, revocation.MaxLeeway)
	}
	if strings.ContainsFunc(cfg.Realm, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }) {
		wrong(`Realm is %q, must be printable ASCII without " and \`, cfg.Realm)
	}
	if _, err := token.NewVerifier(cfg.Issuers...); err != nil {
		wrong("Issuers: %w", err)
	}
	for _, issuer := range cfg.Issuers {
		if issuer.MaxLifetime < 0 {
			wrong("Issuers: issuer %q: MaxLifetime is %s, must be positive, or 0 for that of its key manager", issuer.Iss, issuer.MaxLifetime)
		}
	}
	for _, p := range cfg.Networks {
		if !p.IsValid() {
			wrong("Networks has one that is none: leave it out")
		}
	}
	var asking *introspection
	if cfg.Introspection != nil {
		var err error
		if asking, err = newIntrospection(*cfg.Introspection, log); err != nil {
			wrong("Introspection: %w", err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configure gateway: %w", err)
	}
	if cfg.Folder != "" {
		if err := os.MkdirAll(cfg.Folder, 0o700); err != nil {
			return nil, fmt.Errorf("make folder for key sets: %w", err)
		}
	}
	g := &Gateway{
		replica:       cfg.Replica,
		issuers:       newIssuers(cfg, log),
		acceptance:    token.Acceptance{Leeway: cfg.Leeway, Audiences: slices.Clone(cfg.Audiences)},
		challenges:    newChallenges(cfg.Realm),
		introspection: asking,
	}
	g.issuers.refresh()
	return g, nil
}

// checkURL is about a URL that requests with secrets, or for what is believed, go to.
func checkURL(s string, allowHTTP bool) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Hostname() == "" || u.Scheme != "https" && u.Scheme != "http":
		return errors.New("must be a URL such as https://rescind.example.com")
	case u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return fmt.Errorf("%s://%s/…: must have no user, query and fragment", u.Scheme, u.Host)
	case u.Scheme == "http" && !allowHTTP && !isLoopback(u.Hostname()):
		return fmt.Errorf("%s: must be https; http is for loopback", s)
	}
	return nil
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// Run keeps the replica and the key sets up to date until ctx ends, then returns nil. It is called once.
func (g *Gateway) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { g.issuers.run(ctx) })
	err := g.replica.Run(ctx)
	cancel()
	wg.Wait()
	return err
}

// Ready reports whether the replica is ready and the keys of at least one issuer are here
// (JWT-23). It asks nobody.
func (g *Gateway) Ready() bool { return g.replica.Ready() && g.Status().WithKeys > 0 }

// Status is how a gateway does, besides its replica.
type Status struct {
	// Issuers is how many issuers are trusted now.
	Issuers int
	// WithKeys is of how many of them there are keys, so that their tokens can be judged.
	WithKeys int
}

// Status counts the issuers. It asks nobody.
func (g *Gateway) Status() Status {
	keys := g.issuers.trusted.Load().keys
	s := Status{Issuers: len(keys)}
	for _, k := range keys {
		if held(k) {
			s.WithKeys++
		}
	}
	return s
}
