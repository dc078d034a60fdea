package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/follow"
	"github.com/rescindhq/rescind/internal/httpapi"
)

// issuers verifies the tokens of every key manager in the catalog, also of one that
// was added a moment ago by another process.
type issuers struct {
	// configured have keys that this process was given, by iss.
	configured map[string]token.Issuer
	networks   []netip.Prefix
	own        ownIssuers
	state      state
	log        *slog.Logger

	verifier atomic.Pointer[token.Verifier]

	mu     sync.Mutex
	remote map[string]remoteKeys // by iss
	warned map[string]bool       // issuers without keys
	seen   []version             // what verifier was made of
}

var _ httpapi.Verifier = (*issuers)(nil)

// state is the state of the log. [follow.Follower] is one.
type state interface {
	Fresh(ctx context.Context, maxAge time.Duration) (revocation.Position, error)
	Replica() *replica.State
}

// ownIssuers knows the keys of key managers of our own. [sts.Server] is one.
type ownIssuers interface {
	Issuer(*catalog.KeyManager) token.Issuer
}

type remoteKeys struct {
	url  string
	keys token.KeySet
}

type version struct {
	iss       string
	timestamp int64
}

func newIssuers(configured []token.Issuer, networks []netip.Prefix, own ownIssuers, state state, log *slog.Logger) *issuers {
	v := &issuers{
		configured: make(map[string]token.Issuer), networks: networks, own: own, state: state, log: log,
		remote: make(map[string]remoteKeys), warned: make(map[string]bool),
	}
	for _, issuer := range configured {
		v.configured[issuer.Iss] = issuer
	}
	v.refresh()
	return v
}

// run keeps up with the catalog until ctx ends.
func (v *issuers) run(ctx context.Context, state *follow.Follower) error {
	for {
		changed := state.Changed()
		v.refresh()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// refresh makes a new verifier if key managers have changed.
func (v *issuers) refresh() {
	v.mu.Lock() // before the look at the catalog: an older one must not come last
	defer v.mu.Unlock()
	var managers []*catalog.KeyManager
	v.state.Replica().View(func(s *replica.View) { managers = s.KeyManagers() })
	now := make([]version, len(managers))
	for i, m := range managers {
		now[i] = version{m.Iss, m.Timestamp}
	}
	if v.verifier.Load() != nil && slices.Equal(now, v.seen) {
		return
	}
	v.seen = now
	list := make([]token.Issuer, 0, len(managers))
	kept := make(map[string]remoteKeys)
	for _, m := range managers {
		issuer := v.issuer(m, kept)
		if _, err := token.NewVerifier(issuer); err != nil {
			v.log.Error("a key manager cannot be used as it is: its tokens are taken for unknown; correct it", "issuer", m.Iss, "error", err)
			continue
		}
		list = append(list, issuer)
	}
	verifier, err := token.NewVerifier(list...)
	if err != nil {
		panic(err) // each is sound by itself, and iss is unique in the catalog
	}
	v.remote = kept
	v.verifier.Store(verifier)
}

// issuer is a key manager as the verifier knows it. Its remote keys go into kept.
func (v *issuers) issuer(m *catalog.KeyManager, kept map[string]remoteKeys) token.Issuer {
	if configured, ok := v.configured[m.Iss]; ok {
		configured.Tenant, configured.MaxLifetime = m.Tenant, time.Duration(m.MaxTokenLifetime)*time.Second
		return configured
	}
	if m.Resident {
		return v.own.Issuer(m)
	}
	issuer := token.Issuer{
		Iss: m.Iss, Tenant: m.Tenant, Algorithms: m.Algorithms, AllowTypes: m.AllowTyp,
		MaxLifetime: time.Duration(m.MaxTokenLifetime) * time.Second, Keys: noKeys{},
	}
	if m.JWKSURI == "" {
		if !v.warned[m.Iss] {
			v.warned[m.Iss] = true
			v.log.Warn("a key manager has no jwks_uri and this process is not configured with its keys: revocations of its tokens are "+
				"refused with 503; give it a jwks_uri, or add it to RESCIND_TRUSTED_ISSUERS_FILE", "issuer", m.Iss)
		}
		return issuer
	}
	if r, ok := v.remote[m.Iss]; ok && r.url == m.JWKSURI {
		kept[m.Iss], issuer.Keys = r, r.keys
		return issuer
	}
	keys, err := token.NewRemoteKeySet(token.RemoteConfig{
		URL: m.JWKSURI, AllowedNetworks: v.networks, Cache: token.CacheConfig{Logger: v.log.With("issuer", m.Iss)},
	})
	if err != nil {
		v.log.Warn("a key manager's keys cannot be fetched: revocations of its tokens are refused with 503", "issuer", m.Iss, "error", err)
		return issuer
	}
	kept[m.Iss], issuer.Keys = remoteKeys{m.JWKSURI, keys}, keys
	return issuer
}

// freshWait bounds how long a token of an unknown issuer waits for the newest catalog.
const freshWait = 2 * time.Second

// Verify implements [httpapi.Verifier].
func (v *issuers) Verify(ctx context.Context, compact string) (*token.Token, error) {
	t, err := v.verifier.Load().Verify(ctx, compact)
	if !errors.Is(err, token.ErrUntrustedIssuer) {
		return t, err
	}
	// "Not ours" must be true, and another process may have just registered it.
	fresh, cancel := context.WithTimeout(ctx, freshWait)
	defer cancel()
	if _, freshErr := v.state.Fresh(fresh, 0); freshErr != nil {
		return nil, fmt.Errorf("%w: whether the issuer is known cannot be told: %w", token.ErrKeysUnavailable, freshErr)
	}
	v.refresh()
	return v.verifier.Load().Verify(ctx, compact)
}

// Issuer implements [httpapi.Verifier].
func (v *issuers) Issuer(iss string) (token.Issuer, bool) { return v.verifier.Load().Issuer(iss) }

type noKeys struct{}

func (noKeys) Key(context.Context, string, string) (token.Key, error) {
	return token.Key{}, fmt.Errorf("%w: they are not configured", token.ErrKeysUnavailable)
}
