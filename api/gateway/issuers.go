package gateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

const (
	// refreshEvery is how soon at the latest the tokens of a key manager are no longer
	// accepted after it was removed. One that was disabled is refused by the replica at once.
	refreshEvery = time.Second
	// warmEvery is how often it is looked whether keys are due to be fetched.
	warmEvery = 5 * time.Second
	// maxFetches bounds the fetches at a time: at a start all key sets are due.
	maxFetches = 16
	// ownLifetime is of configured issuers that nobody knows the longest lifetime of.
	ownLifetime = time.Hour
	// tenantPath is between the super tenant's issuer and the domain of another one.
	tenantPath = "/t/"
	jwksPath   = "/oauth2/jwks"
)

// issuers are those whose tokens are believed: the key managers in the catalog that are
// enabled, and those that were configured. Their keys are here before they are needed.
type issuers struct {
	cfg        Config
	configured map[string]token.Issuer // by iss
	state      *replica.State
	log        *slog.Logger

	trusted atomic.Pointer[trust]

	mu     sync.Mutex // of what follows, and of whoever replaces trusted
	seen   []*catalog.KeyManager
	remote map[string]remoteKeys // by iss
	warned map[warning]string    // the last cause of each
}

// trust is who is believed from one change of the catalog to the next.
type trust struct {
	*token.Verifier
	keys   []token.KeySet
	cached []*token.CachedKeySet // those of keys that can be fetched anew
}

type warning struct{ iss, message string }

type remoteKeys struct {
	url  string
	keys *token.CachedKeySet
}

func newIssuers(cfg Config, log *slog.Logger) *issuers {
	is := &issuers{
		cfg: cfg, configured: make(map[string]token.Issuer), state: cfg.Replica.State(), log: log,
		remote: make(map[string]remoteKeys), warned: make(map[warning]string),
	}
	for _, issuer := range cfg.Issuers {
		is.configured[issuer.Iss] = issuer
	}
	return is
}

// run keeps up with the catalog, and the keys young, until ctx ends.
func (is *issuers) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, maxFetches)
	warm := make(map[*token.CachedKeySet]context.CancelFunc)
	tick := time.NewTicker(refreshEvery)
	defer tick.Stop()
	var last *trust
	for {
		is.refresh()
		if current := is.trusted.Load(); current != last {
			last = current
			still := make(map[*token.CachedKeySet]bool, len(current.cached))
			for _, keys := range current.cached {
				still[keys] = true
				if warm[keys] != nil {
					continue
				}
				ctx, cancel := context.WithCancel(ctx)
				warm[keys] = cancel
				wg.Go(func() { keepWarm(ctx, keys, slots) })
			}
			maps.DeleteFunc(warm, func(keys *token.CachedKeySet, cancel context.CancelFunc) bool {
				if !still[keys] {
					cancel()
				}
				return !still[keys]
			})
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// keepWarm fetches keys when they are due, rather than when a request needs them, until ctx ends.
func keepWarm(ctx context.Context, keys *token.CachedKeySet, slots chan struct{}) {
	tick := time.NewTicker(warmEvery)
	defer tick.Stop()
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		_, _ = keys.Current(ctx) // it logs what is wrong
		<-slots
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// knows reports whether the catalog has an issuer that is enabled now.
func (is *issuers) knows(iss string) bool {
	var m *catalog.KeyManager
	is.state.View(func(v *replica.View) { m = v.KeyManager(iss) })
	return m != nil && m.Enabled
}

// held reports whether there are keys of any issuer.
func (is *issuers) held() bool { return slices.ContainsFunc(is.trusted.Load().keys, held) }

func held(keys token.KeySet) bool {
	switch keys := keys.(type) {
	case *token.CachedKeySet:
		return keys.Held()
	case noKeys:
		return false
	}
	return true
}

// refresh makes another trust if key managers have changed. An entity is never changed where it
// is, so the pointers tell.
func (is *issuers) refresh() {
	is.mu.Lock() // before the look at the catalog: an older one must not come last
	defer is.mu.Unlock()
	var managers []*catalog.KeyManager
	is.state.View(func(v *replica.View) { managers = v.KeyManagers() })
	if is.trusted.Load() != nil && slices.Equal(managers, is.seen) {
		return
	}
	is.seen = managers
	var list []token.Issuer
	kept := make(map[string]remoteKeys)
	others := maps.Clone(is.configured)
	for _, m := range managers {
		delete(others, m.Iss)
		if !m.Enabled {
			continue
		}
		issuer := is.issuer(m, kept)
		if _, err := token.NewVerifier(issuer); err != nil {
			is.warn(m.Iss, "a key manager cannot be used as it is, and its tokens are refused: correct it", err)
			continue
		}
		list = append(list, issuer)
	}
	for _, issuer := range others {
		issuer.MaxLifetime = cmp.Or(issuer.MaxLifetime, ownLifetime)
		list = append(list, issuer)
	}
	verifier, err := token.NewVerifier(list...)
	if err != nil {
		panic(err) // each is sound by itself, and iss is unique in the catalog
	}
	next := &trust{Verifier: verifier}
	for _, issuer := range list {
		next.keys = append(next.keys, issuer.Keys)
		if cached, ok := issuer.Keys.(*token.CachedKeySet); ok {
			next.cached = append(next.cached, cached)
		}
	}
	is.remote = kept
	is.trusted.Store(next)
}

// issuer is a key manager as the verifier knows it. Its remote keys go into kept.
func (is *issuers) issuer(m *catalog.KeyManager, kept map[string]remoteKeys) token.Issuer {
	lifetime := time.Duration(m.MaxTokenLifetime) * time.Second
	if issuer, ok := is.configured[m.Iss]; ok {
		issuer.Tenant = m.Tenant
		// Past that of the catalog, revocations of more than one token are forgotten.
		issuer.MaxLifetime = min(cmp.Or(issuer.MaxLifetime, lifetime), lifetime)
		return issuer
	}
	issuer := token.Issuer{
		Iss: m.Iss, Tenant: m.Tenant, Algorithms: m.Algorithms, AllowTypes: m.AllowTyp, MaxLifetime: lifetime, Keys: noKeys{},
	}
	cfg, err := is.keysOf(m)
	if err != nil {
		is.warn(m.Iss, "a key manager's keys cannot be fetched, and its tokens are answered 503", err)
		return issuer
	}
	if r, ok := is.remote[m.Iss]; ok && r.url == cfg.URL {
		kept[m.Iss], issuer.Keys = r, r.keys
		return issuer
	}
	keys, err := token.NewRemoteKeySet(cfg)
	if err != nil {
		is.warn(m.Iss, "a key manager's keys cannot be fetched, and its tokens are answered 503", err)
		return issuer
	}
	kept[m.Iss], issuer.Keys = remoteKeys{cfg.URL, keys}, keys
	return issuer
}

// keysOf says where the keys of a key manager are.
func (is *issuers) keysOf(m *catalog.KeyManager) (token.RemoteConfig, error) {
	cfg := token.RemoteConfig{
		URL: m.JWKSURI, AllowedNetworks: is.cfg.Networks, Cache: token.CacheConfig{Logger: is.log.With("issuer", m.Iss)},
	}
	if is.cfg.Folder != "" {
		cfg.File = filepath.Join(is.cfg.Folder, fmt.Sprintf("keys-%x", sha256.Sum256([]byte(m.Iss)))[:len("keys-")+32])
	}
	switch {
	case m.Resident && is.cfg.URL == "":
		return cfg, fmt.Errorf("it is the service's own, and the gateway is not told the service's URL")
	case m.Resident:
		path, err := ownPath(m)
		if err != nil {
			return cfg, err
		}
		cfg.URL, cfg.RootCAs = strings.TrimSuffix(is.cfg.URL, "/")+path, is.cfg.RootCAs
		cfg.AllowedNetworks = everywhere // the host is the operator's word, not the catalog's
		if strings.HasPrefix(cfg.URL, "http:") && !is.cfg.AllowHTTP {
			cfg.AllowedNetworks = loopback // whatever localhost resolves to
		}
	case m.JWKSURI == "":
		return cfg, fmt.Errorf("it has no jwks_uri, and the gateway is not configured with its keys")
	}
	return cfg, nil
}

// ownPath is where the service serves the keys of an issuer of its own. The service's URL need
// not be how the world, and hence iss, calls it.
func ownPath(m *catalog.KeyManager) (string, error) {
	if m.Tenant.ID == revocation.SuperTenant.ID {
		return jwksPath, nil
	}
	path := tenantPath + m.Tenant.Domain
	if !strings.HasSuffix(m.Iss, path) || !catalog.ValidDomain(m.Tenant.Domain) {
		return "", fmt.Errorf("it is the service's own, and its iss does not end in %s", path)
	}
	return path + jwksPath, nil
}

var (
	everywhere = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	loopback   = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
)

// warn logs what is wrong with an issuer, unless it was so before.
func (is *issuers) warn(iss, message string, err error) {
	if w := (warning{iss, message}); is.warned[w] != err.Error() {
		is.warned[w] = err.Error()
		is.log.Warn(message, "issuer", iss, "error", err)
	}
}

// noKeys is of an issuer whose keys nobody knows.
type noKeys struct{}

func (noKeys) Key(context.Context, string, string) (token.Key, error) {
	return token.Key{}, fmt.Errorf("%w: nobody has told where they are", token.ErrKeysUnavailable)
}
