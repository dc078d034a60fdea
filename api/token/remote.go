package token

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"syscall"
	"time"
)

// RemoteConfig says where an issuer serves its keys.
type RemoteConfig struct {
	// URL is the issuer's jwks_uri: https, without user and password.
	URL string
	// AllowedNetworks are ranges that the server may lie in though they are not
	// public, such as 10.0.0.0/8. Inside of them, and only there, the URL may
	// also be plain http. Default: none.
	AllowedNetworks []netip.Prefix
	// RootCAs verify the server's certificate. Default: those of the system.
	RootCAs *x509.CertPool
	// Cache says how long keys are kept, and how often they are fetched.
	Cache CacheConfig
	// File is where the last good key set is kept, so that there are keys after a start while
	// the server cannot be reached. They count from when they were fetched, as those in memory
	// do. No two key sets may share one. Its folder must be there, and be writable by nobody
	// else: whoever writes to it can sign tokens. Empty: nowhere. See [CachedKeySet.Discard].
	File string
}

// PrivateNetworks are the loopback, link-local and private ranges, for an
// operator who has an issuer inside.
var PrivateNetworks = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fc00::/7"),
	netip.MustParsePrefix("fe80::/10"),
}

// NewRemoteKeySet makes a key set of what a URL serves, with the keys that
// [RemoteConfig.File] has. Nothing is fetched before it is needed; while keys from the
// file are all there is, none waits for a fetch that it does not need. A fetch follows no redirect,
// uses no proxy of the environment, reads at most 1 MiB, and connects to no address
// that is not public: this is checked when it connects, after names are resolved.
func NewRemoteKeySet(cfg RemoteConfig) (*CachedKeySet, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, errors.New("key set URL is not a URL")
	}
	plain := u.Scheme == "http" && len(cfg.AllowedNetworks) > 0
	switch {
	case u.Scheme != "https" && !plain || u.Hostname() == "":
		return nil, fmt.Errorf("key set URL %s://%s/…: must be https; http is for networks that are allowed by name",
			u.Scheme, u.Host)
	case u.User != nil:
		return nil, fmt.Errorf("key set URL %s://%s/…: must have no user and password", u.Scheme, u.Host)
	}
	guard := dialGuard{allowed: cfg.AllowedNetworks, plain: plain}
	fetcher := &fetcher{url: u.String(), client: &http.Client{
		Transport: &http.Transport{
			Proxy:                  nil,
			DialContext:            (&net.Dialer{Control: guard.control}).DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: cfg.RootCAs, MinVersion: tls.VersionTLS12},
			DisableKeepAlives:      true, // one request in minutes
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	s := NewCachedKeySet(cfg.Cache, fetcher.fetch)
	if cfg.File != "" {
		fetcher.file = newKeyFile(cfg.File, cfg.URL, s.cfg.Logger)
		s.file, s.loaded = fetcher.file, fetcher.file.save
		if keys, at := fetcher.file.read(time.Now()); keys != nil {
			s.held.Store(&heldKeys{keys: keys, at: at})
		}
	}
	return s, nil
}

type fetcher struct {
	url    string
	client *http.Client
	file   *keyFile // nil: keys are not kept
}

func (f *fetcher) fetch(ctx context.Context) (*StaticKeySet, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	req.Header.Set("User-Agent", "rescind")
	at := time.Now()
	resp, err := f.client.Do(req)
	if err != nil {
		// The URL that *url.Error repeats may carry a key in its query.
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err
		}
		return nil, fmt.Errorf("fetch keys from %s: %w", req.URL.Host, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch keys from %s: status %d, must be 200; redirects are not followed",
			req.URL.Host, resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxKeySetBytes+1))
	if err != nil {
		return nil, fmt.Errorf("fetch keys from %s: %w", req.URL.Host, err)
	}
	keys, err := ParseKeySet(body)
	if err != nil {
		return nil, fmt.Errorf("fetch keys from %s: %w", req.URL.Host, err)
	}
	if f.file != nil {
		f.file.next.Store(&keyDocument{at, body})
	}
	return keys, nil
}

// dialGuard decides to which addresses a fetch may connect.
type dialGuard struct {
	allowed []netip.Prefix
	plain   bool // without TLS: then to the allowed ones alone
}

func (g dialGuard) control(_, address string, _ syscall.RawConn) error {
	target, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("connect to %s: %w", address, err)
	}
	ip := target.Addr().Unmap().WithZone("")
	switch within := func(p netip.Prefix) bool { return p.Contains(ip) }; {
	case slices.ContainsFunc(g.allowed, within):
		return nil
	case g.plain:
		return fmt.Errorf("connect to %s: without https only to a network that is allowed by name", ip)
	case !ip.IsGlobalUnicast() || ip.IsPrivate() || slices.ContainsFunc(notPublic, within):
		return fmt.Errorf("connect to %s: not a public address; allow its network by name if this is meant", ip)
	}
	return nil
}

// notPublic are the ranges of the IANA special-purpose registries that package
// netip takes for global unicast: shared, reserved, for documentation or
// benchmarks, and those whose addresses embed an IPv4 one, whatever that be.
var notPublic = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"),
	netip.MustParsePrefix("192.88.99.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"),
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("::/96"),
	netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("100::/64"),
	netip.MustParsePrefix("2001::/23"),
	netip.MustParsePrefix("2001:db8::/32"),
	netip.MustParsePrefix("2002::/16"),
	netip.MustParsePrefix("3fff::/20"),
	netip.MustParsePrefix("fec0::/10"),
}

// NewFileKeySet makes a key set of a JWK set in a file, which is read anew when
// a kid is asked for that it lacks, and when a minute has passed. Its error says
// why the file cannot be used now.
func NewFileKeySet(ctx context.Context, path string, logger *slog.Logger) (*CachedKeySet, error) {
	read := func(context.Context) (*StaticKeySet, error) {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, maxKeySetBytes+1))
		if err != nil {
			return nil, err
		}
		keys, err := ParseKeySet(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		return keys, nil
	}
	s := NewCachedKeySet(CacheConfig{
		Refresh: time.Minute, Refetch: time.Second, Patience: time.Second, Logger: logger,
	}, read)
	if _, err := s.Current(ctx); err != nil {
		return nil, err
	}
	return s, nil
}
