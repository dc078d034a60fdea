package token

import (
	"compress/gzip"
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// remote is the key set that a server with this handler serves.
func remote(t *testing.T, handler http.HandlerFunc, change func(*RemoteConfig)) *CachedKeySet {
	t.Helper()
	server := httptest.NewTLSServer(handler)
	t.Cleanup(server.Close)
	server.Config.ErrorLog = nil
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	cfg := RemoteConfig{URL: server.URL + "/jwks?secret=hush", AllowedNetworks: loopback, RootCAs: roots}
	if change != nil {
		change(&cfg)
	}
	keys, err := NewRemoteKeySet(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func TestRemoteKeySet(t *testing.T) {
	t.Parallel()
	document := jwks(t, public("k1", "", &rsaTestKey().PublicKey))
	keys := remote(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/jwks" || r.Header.Get("Authorization") != "" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		_, _ = w.Write(document)
	}, nil)
	v := verifier(t, Issuer{Iss: iss, Keys: keys})
	if _, err := v.Verify(t.Context(), raw(t, `{"alg":"RS256","kid":"k1"}`, `{"iss":"`+iss+`"}`)); err != nil {
		t.Error(err)
	}
}

func TestHostileKeyServer(t *testing.T) {
	t.Parallel()
	document := jwks(t, public("k1", "", &rsaTestKey().PublicKey))
	serve := func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(document) }
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("a redirect was followed")
	}))
	t.Cleanup(elsewhere.Close)
	for _, tt := range []struct {
		name    string
		handler http.HandlerFunc
		change  func(*RemoteConfig)
		want    string
	}{
		{"redirects", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusFound)
		}, nil, "status 302"},
		{"answers an error with a key set", func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = w.Write(document)
		}, nil, "status 500"},
		{"sends a page", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "<html>")
		}, nil, "not a JSON object"},
		{"sends more than 1 MiB", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(document)
			_, _ = io.WriteString(w, strings.Repeat(" ", 1<<20))
		}, nil, "more than 1048576 bytes"},
		{"sends little that unpacks to much, for ever", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = io.Copy(gzip.NewWriter(w), zeros{})
		}, func(c *RemoteConfig) { c.Cache.Timeout = time.Minute }, "more than 1048576 bytes"},
		{"never answers", func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
		}, func(c *RemoteConfig) { c.Cache.Timeout = 50 * time.Millisecond }, "not done within 50ms"},
		{"never ends its answer", func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write(document)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, func(c *RemoteConfig) { c.Cache.Timeout = 50 * time.Millisecond }, "not done within 50ms"},
		{"has a certificate of nobody", serve, func(c *RemoteConfig) { c.RootCAs = x509.NewCertPool() }, "certificate"},
		{"lies on loopback", serve, func(c *RemoteConfig) { c.AllowedNetworks = nil }, "not a public address"},
		{"lies in another network than allowed", serve, func(c *RemoteConfig) {
			c.AllowedNetworks = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		}, "not a public address"},
		{"has a name that leads to loopback", serve, func(c *RemoteConfig) {
			c.URL = strings.Replace(c.URL, "127.0.0.1", "localhost", 1)
			c.AllowedNetworks = nil
		}, "not a public address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := remote(t, tt.handler, tt.change).Key(t.Context(), "k1", "RS256")
			if !errors.Is(err, ErrKeysUnavailable) || errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Key = %v, want %v about %q", err, ErrKeysUnavailable, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "hush") {
				t.Errorf("error repeats the URL's query: %v", err)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

func TestKeyServerGoesAway(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(jwks(t, public("k1", "", &rsaTestKey().PublicKey)))
	}))
	t.Cleanup(server.Close)
	keys, err := NewRemoteKeySet(RemoteConfig{URL: server.URL, AllowedNetworks: loopback})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, keys, "k1", nil)
	server.Close()
	expect(t, keys, "k1", nil)
	expect(t, keys, "k2", ErrKeysUnavailable)
}

func TestRemoteConfigRefuses(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		url     string
		allowed []netip.Prefix
	}{
		{"", nil},
		{"://", nil},
		{"https://", nil},
		{"keys.json", nil},
		{"file:///etc/passwd", loopback},
		{"http://km.example.com/jwks", nil},
		{"https://user:hush@km.example.com/jwks", nil},
	} {
		_, err := NewRemoteKeySet(RemoteConfig{URL: tt.url, AllowedNetworks: tt.allowed})
		if err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("NewRemoteKeySet(%q) = %v, want an error without the password", tt.url, err)
		}
	}
}

func TestDialGuard(t *testing.T) {
	t.Parallel()
	private := netip.MustParsePrefix("10.1.0.0/16")
	for _, tt := range []struct {
		ip                            string
		public, allowed, plainAllowed bool
	}{
		{"93.184.216.34", true, true, false},
		{"2606:2800:220:1::1", true, true, false},
		{"10.1.2.3", false, true, true},
		{"::ffff:10.1.2.3", false, true, true},
		{"10.2.0.1", false, false, false},
		{"127.0.0.1", false, false, false},
		{"::ffff:127.0.0.1", false, false, false},
		{"::1", false, false, false},
		{"0.0.0.0", false, false, false},
		{"::", false, false, false},
		{"169.254.169.254", false, false, false},
		{"fe80::1%eth0", false, false, false},
		{"172.16.0.1", false, false, false},
		{"192.168.1.1", false, false, false},
		{"fd00::1", false, false, false},
		{"100.64.0.1", false, false, false},
		{"198.18.0.1", false, false, false},
		{"224.0.0.1", false, false, false},
		{"255.255.255.255", false, false, false},
		{"64:ff9b::7f00:1", false, false, false},
		{"2002:7f00:1::", false, false, false},
		{"::127.0.0.1", false, false, false},
		{"fec0::1", false, false, false},
	} {
		address := net.JoinHostPort(tt.ip, "443")
		for guard, want := range map[*dialGuard]bool{
			{}:                                 tt.public,
			{allowed: []netip.Prefix{private}}: tt.allowed,
			{allowed: []netip.Prefix{private}, plain: true}: tt.plainAllowed,
		} {
			if err := guard.control("tcp", address, nil); (err == nil) != want {
				t.Errorf("%+v: connect to %s: %v, want allowed %t", *guard, tt.ip, err, want)
			}
		}
	}
	linkLocal := dialGuard{allowed: []netip.Prefix{netip.MustParsePrefix("fe80::/10")}}
	if err := linkLocal.control("tcp", "[fe80::1%eth0]:443", nil); err != nil {
		t.Errorf("an allowed address with a zone: %v", err)
	}
	for _, p := range PrivateNetworks {
		if err := (dialGuard{}).control("tcp", net.JoinHostPort(p.Addr().String(), "443"), nil); err == nil {
			t.Errorf("%s is public", p)
		}
	}
}

func TestProxyOfEnvironmentIsIgnored(t *testing.T) {
	proxy := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the proxy was used")
	}))
	t.Cleanup(proxy.Close)
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("HTTPS_PROXY", proxy.URL)
	t.Setenv("NO_PROXY", "")
	keys, err := NewRemoteKeySet(RemoteConfig{
		URL: "https://192.0.2.1/jwks", AllowedNetworks: loopback, // the proxy could be reached, the server is refused
	})
	if err != nil {
		t.Fatal(err)
	}
	expect(t, keys, "k1", ErrKeysUnavailable)
}

func TestFileKeySet(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "jwks.json")
	if _, err := NewFileKeySet(t.Context(), path, nil); !errors.Is(err, ErrKeysUnavailable) || !strings.Contains(err.Error(), path) {
		t.Errorf("without a file: %v, want an error that names it", err)
	}
	write := func(kid string) {
		t.Helper()
		if err := os.WriteFile(path, jwks(t, public(kid, "", &rsaTestKey().PublicKey)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a")
	keys, err := NewFileKeySet(t.Context(), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, keys, "a", nil)
	write("b")
	expect(t, keys, "b", nil)
	expect(t, keys, "a", ErrUnknownKey)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := keys.Key(ctx, "c", "RS256"); !errors.Is(err, ErrKeysUnavailable) {
		t.Errorf("with an ended context: %v, want %v", err, ErrKeysUnavailable)
	}
}
