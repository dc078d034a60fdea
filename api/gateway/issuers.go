package gateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
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
	only   string     // the domain of the only tenant that is served, when seen was looked at
	known  bool       // seen is of a catalog
	seen   []*catalog.KeyManager
	remote map[string]remoteKeys // by iss
	warned map[warning]string    // the cause of each that there is
	swept  bool                  // no files are left that an earlier process wrote
	gone   []*token.CachedKeySet // whose files are to be removed
}

// trust is who is believed from one change of the catalog to the next.
type trust struct {
	*token.Verifier
	managers map[string]*catalog.KeyManager // by iss: what was looked at, whether or not it can be used
	keys     []token.KeySet
	cached   []*token.CachedKeySet // those of keys that can be fetched anew
}

type warning struct{ iss, message string }

// remoteKeys are of a key manager at a URL. One that was made anew has keys of its own: if the last
// one was removed since its keys had leaked, these are not to come back.
type remoteKeys struct {
	manager, url string // UUID
	file         string // its name
	keys         *token.CachedKeySet
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
		if gone, sweep := is.leftovers(); len(gone) > 0 || sweep {
			wg.Go(func() { is.clean(gone, sweep) }) // a disk that hangs holds nobody up
		}
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

// behind reports whether the catalog has an issuer that is enabled, and t was made without it.
func (is *issuers) behind(t *trust, iss string) bool {
	var m *catalog.KeyManager
	is.state.View(func(v *replica.View) { m = v.KeyManager(iss) })
	return m != nil && m.Enabled && t.managers[iss] != m
}

// held reports whether there are keys to verify tokens with.
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
	only := is.cfg.Replica.Tenant()
	_, revocationsOnly := is.state.Scope()
	is.known = !revocationsOnly && is.state.At().Epoch != ""
	var managers []*catalog.KeyManager
	byIss := make(map[string]*catalog.KeyManager)
	is.state.View(func(v *replica.View) {
		managers = v.KeyManagers()
		for _, m := range managers {
			byIss[m.Iss] = v.KeyManager(m.Iss)
		}
	})
	if is.trusted.Load() != nil && only == is.only && slices.Equal(managers, is.seen) {
		return
	}
	is.only, is.seen = only, managers
	before := is.warned
	is.warned = make(map[warning]string)
	var list []token.Issuer
	kept := make(map[string]remoteKeys)
	others := maps.Clone(is.configured)
	for _, m := range managers {
		delete(others, m.Iss)
		if chosen := byIss[m.Iss]; m != chosen {
			is.warn(before, m.Iss, "several key managers have one iss, and only one of them counts: remove the others", among(chosen))
			continue
		}
		if !m.Enabled || only != "" && m.Tenant.Domain != only {
			continue
		}
		issuer := is.issuer(m, before, kept)
		if _, err := token.NewVerifier(issuer); err != nil {
			is.warn(before, m.Iss, "a key manager cannot be used as it is, and its tokens are refused: correct it", err)
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
		panic(err) // each is sound by itself, and was chosen among those with its iss
	}
	next := &trust{Verifier: verifier, managers: byIss}
	for _, issuer := range list {
		next.keys = append(next.keys, issuer.Keys)
		if cached, ok := issuer.Keys.(*token.CachedKeySet); ok {
			next.cached = append(next.cached, cached)
		}
	}
	for iss, r := range is.remote {
		if kept[iss].keys != r.keys {
			is.gone = append(is.gone, r.keys)
		}
	}
	is.remote = kept
	is.trusted.Store(next)
}

// among tells of the key manager that counts among several with one iss.
func among(m *catalog.KeyManager) error {
	if m == nil {
		return errors.New("none counts")
	}
	return fmt.Errorf("the one that counts is %q of %s", m.Name, m.Tenant.Domain)
}

// leftovers takes the key sets whose files are to be removed, and once says that those of earlier
// processes are: when the catalog tells which.
func (is *issuers) leftovers() (gone []*token.CachedKeySet, sweep bool) {
	is.mu.Lock()
	defer is.mu.Unlock()
	gone, is.gone = is.gone, nil
	sweep = is.known && !is.swept && is.cfg.Folder != ""
	is.swept = is.swept || sweep
	return gone, sweep
}

// clean removes what leftovers has found.
func (is *issuers) clean(gone []*token.CachedKeySet, sweep bool) {
	for _, keys := range gone {
		keys.Discard()
	}
	if !sweep {
		return
	}
	files, err := os.ReadDir(is.cfg.Folder)
	is.mu.Lock() // after that, so that it knows of whoever has made one of them
	used := make(map[string]bool, len(is.remote))
	for _, r := range is.remote {
		used[r.file] = true
	}
	is.mu.Unlock()
	for _, f := range files {
		if name := keyFileName.FindStringSubmatch(f.Name()); name != nil && !used[name[1]] {
			err = errors.Join(err, os.Remove(filepath.Join(is.cfg.Folder, f.Name())))
		}
	}
	if err != nil {
		is.log.Warn("kept keys of key managers that are gone cannot be removed: remove the files", "error", err)
	}
}

// keyFileName matches the names of files with keys, and of what [token.RemoteConfig] makes of them.
var keyFileName = regexp.MustCompile(`^(keys-[0-9a-f]{32})(\.tmp|\.damaged)?$`)

// fileOf is the name of the file for keys of a key manager at a URL.
func fileOf(m *catalog.KeyManager, url string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q", m.UUID, m.Iss, url))
	return fmt.Sprintf("keys-%x", sum[:16])
}

// issuer is a key manager as the verifier knows it. Its remote keys go into kept.
func (is *issuers) issuer(m *catalog.KeyManager, before map[warning]string, kept map[string]remoteKeys) token.Issuer {
	lifetime := time.Duration(m.MaxTokenLifetime) * time.Second
	if lifetime <= 0 { // which would be any
		lifetime = ownLifetime
		is.warn(before, m.Iss, "a key manager has no longest lifetime of tokens, and those that live longer than an hour are refused: correct it",
			fmt.Errorf("max_token_lifetime is %d", m.MaxTokenLifetime))
	}
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
		is.warn(before, m.Iss, "a key manager's keys cannot be fetched, and its tokens are answered 503", err)
		return issuer
	}
	if r, ok := is.remote[m.Iss]; ok && r.url == cfg.URL && r.manager == m.UUID {
		kept[m.Iss], issuer.Keys = r, r.keys
		return issuer
	}
	keys, err := token.NewRemoteKeySet(cfg)
	if err != nil {
		is.warn(before, m.Iss, "a key manager's keys cannot be fetched, and its tokens are answered 503", err)
		return issuer
	}
	kept[m.Iss], issuer.Keys = remoteKeys{m.UUID, cfg.URL, filepath.Base(cfg.File), keys}, keys
	return issuer
}

// keysOf says where the keys of a key manager are.
func (is *issuers) keysOf(m *catalog.KeyManager) (token.RemoteConfig, error) {
	cfg := token.RemoteConfig{
		URL: m.JWKSURI, AllowedNetworks: is.cfg.Networks, Cache: token.CacheConfig{Logger: is.log.With("issuer", m.Iss)},
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
	if is.cfg.Folder != "" {
		cfg.File = filepath.Join(is.cfg.Folder, fileOf(m, cfg.URL))
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

// warn logs what is wrong with an issuer, unless it was so before or was said just now.
func (is *issuers) warn(before map[warning]string, iss, message string, err error) {
	w, cause := warning{iss, message}, err.Error()
	if before[w] != cause && is.warned[w] != cause {
		is.log.Warn(message, "issuer", iss, "error", err)
	}
	is.warned[w] = cause
}

// noKeys is of an issuer whose keys nobody knows.
type noKeys struct{}

func (noKeys) Key(context.Context, string, string) (token.Key, error) {
	return token.Key{}, fmt.Errorf("%w: nobody has told where they are", token.ErrKeysUnavailable)
}
