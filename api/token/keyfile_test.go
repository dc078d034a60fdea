package token

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// nowhere is where no fetch connects to, and fails at once.
const nowhere = "https://192.0.2.1/jwks?secret=hush"

// keptKeys is a key set with a file, and a channel that tells of each time that it was written to.
func keptKeys(t *testing.T, cfg RemoteConfig) (*CachedKeySet, <-chan struct{}) {
	t.Helper()
	keys, err := NewRemoteKeySet(cfg)
	if err != nil {
		t.Fatal(err)
	}
	saved := make(chan struct{}, 100)
	save := keys.loaded
	keys.loaded = func() {
		save()
		saved <- struct{}{}
	}
	return keys, saved
}

// writeKeyFile writes what a process would have that fetched a key at that time.
func writeKeyFile(t *testing.T, path, url, kid string, at time.Time) []byte {
	t.Helper()
	b := encodeKeyFile(keyDocument{at, jwks(t, public(kid, "RS256", &rsaTestKey().PublicKey))}, hexSum([]byte(url)))
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestKeysSurviveARestart(t *testing.T) {
	t.Parallel()
	var requests atomic.Int32
	handler := atomic.Pointer[http.HandlerFunc]{}
	handle := func(h http.HandlerFunc) { handler.Store(&h) }
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		(*handler.Load())(w, r)
	}))
	t.Cleanup(server.Close)
	path := filepath.Join(t.TempDir(), "keys")
	cfg := RemoteConfig{URL: server.URL + "/jwks?secret=hush", AllowedNetworks: loopback, File: path,
		Cache: CacheConfig{Refetch: time.Nanosecond}}
	serve := func(kid string) {
		handle(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write(jwks(t, public(kid, "RS256", &rsaTestKey().PublicKey)))
		})
	}
	serve("a")
	if err := os.WriteFile(path+".tmp", []byte("of a process that died"), 0o644); err != nil {
		t.Fatal(err)
	}
	first, saved := keptKeys(t, cfg)
	if first.Held() {
		t.Error("keys are held before there were any")
	}
	expect(t, first, "a", nil)
	<-saved
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file has the mode %v (%v), want 0600", info.Mode(), err)
	}
	if _, err := os.Stat(path + ".tmp"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file is still there: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || bytes.Contains(b, []byte("hush")) {
		t.Errorf("the file repeats the URL (%v):\n%s", err, b)
	}

	// Another process starts some hours later, and the server never answers: nobody waits for it.
	writeKeyFile(t, path, cfg.URL, "a", time.Now().Add(-5*time.Hour))
	release := make(chan struct{})
	handle(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	requests.Store(0)
	second, saved := keptKeys(t, cfg)
	if !second.Held() {
		t.Error("the keys in the file are not held")
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("%d requests before a key was asked for", n)
	}
	expect(t, second, "a", nil)
	expect(t, second, "a", nil)
	second.mu.Lock()
	if second.running == nil || second.begun != 1 {
		t.Error("somebody waited for the end of the load, or none began")
	}
	second.mu.Unlock()
	serve("b")
	close(release)
	expect(t, second, "b", nil) // after the load that is running, which fails
	<-saved
	expect(t, second, "a", ErrUnknownKey)
	if kept, _ := newKeyFile(path, cfg.URL, slog.New(slog.DiscardHandler)).read(time.Now()); kept == nil || kept.all[0].id != "b" {
		t.Errorf("the file has %+v, want the newest key", kept)
	}
}

// What is in the file is no younger than it is, and proves nothing.
func TestKeptKeysAge(t *testing.T) {
	t.Parallel()
	rsaTestKey()
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "keys")
		start := func() *CachedKeySet {
			keys, err := NewRemoteKeySet(RemoteConfig{URL: nowhere, File: path})
			if err != nil {
				t.Fatal(err)
			}
			return keys
		}
		writeKeyFile(t, path, nowhere, "a", time.Now())
		time.Sleep(23 * time.Hour)
		keys := start()
		expect(t, keys, "a", nil)
		expect(t, keys, "b", ErrKeysUnavailable)
		time.Sleep(time.Hour - time.Second)
		expect(t, start(), "a", nil) // a restart makes them no younger
		expect(t, keys, "a", nil)
		time.Sleep(time.Second)
		for _, keys := range []*CachedKeySet{keys, start()} {
			if keys.Held() {
				t.Error("keys of 24 h are held")
			}
			expect(t, keys, "a", ErrKeysUnavailable)
		}

		writeKeyFile(t, path, nowhere, "a", time.Now().Add(maxAhead))
		if keys := start(); !keys.Held() {
			t.Error("keys from a clock that is a little fast are not held")
		}
		writeKeyFile(t, path, nowhere, "a", time.Now().Add(maxAhead+time.Second))
		if keys := start(); keys.Held() {
			t.Error("keys from the future are held: they would be for ever")
		}
		synctest.Wait()
	})
}

func TestDamagedKeyFile(t *testing.T) {
	t.Parallel()
	sound := writeKeyFile(t, filepath.Join(t.TempDir(), "keys"), nowhere, "a", time.Now())
	noKeys := encodeKeyFile(keyDocument{time.Now(), []byte(`{"keys":[]}`)}, hexSum([]byte(nowhere)))
	files := map[string][]byte{
		"empty": nil, "of another kind": []byte("{}"), "cut short": sound[:len(sound)-1], "longer": append(bytes.Clone(sound), '\n'),
		"without a line end": bytes.ReplaceAll(sound, []byte("\n"), nil), "of a later version": bytes.Replace(sound, []byte(" 1 "), []byte(" 2 "), 1),
		"without keys": noKeys, "more than can be": append(bytes.Clone(sound), make([]byte, 2<<20)...),
	}
	for i := range sound {
		flipped := bytes.Clone(sound)
		flipped[i] ^= 1
		files[fmt.Sprint("with a flipped bit in byte ", i)] = flipped
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "keys")
	for name, content := range files {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		keys, err := NewRemoteKeySet(RemoteConfig{URL: nowhere, File: path, Cache: CacheConfig{Logger: slog.New(slog.NewTextHandler(&log, nil))}})
		if err != nil || keys.Held() {
			t.Fatalf("%s: NewRemoteKeySet = %v, and keys are held: %t", name, err, keys.Held())
		}
		aside, err := os.ReadFile(path + ".damaged")
		if err != nil || !bytes.Equal(aside, content) {
			t.Fatalf("%s: it is not set aside: %v", name, err)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("%s: it is still there: %v", name, err)
		}
		if !strings.Contains(log.String(), "set aside") || !strings.Contains(log.String(), path) {
			t.Fatalf("%s: logged %q", name, &log)
		}
	}
}

// Keys of one server say nothing about tokens once another one is named.
func TestKeyFileOfAnotherURL(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "keys")
	writeKeyFile(t, path, "https://192.0.2.2/jwks", "a", time.Now())
	keys, err := NewRemoteKeySet(RemoteConfig{URL: nowhere, File: path})
	if err != nil {
		t.Fatal(err)
	}
	if keys.Held() {
		t.Error("they are held")
	}
	expect(t, keys, "a", ErrKeysUnavailable)
}

// What is trusted no longer is nowhere for a later start, and no load that ends afterwards brings
// it back.
func TestDiscard(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(jwks(t, public("a", "RS256", &rsaTestKey().PublicKey)))
	}))
	t.Cleanup(server.Close)
	folder := t.TempDir()
	cfg := RemoteConfig{
		URL: server.URL, AllowedNetworks: loopback, File: filepath.Join(folder, "keys"), Cache: CacheConfig{Refetch: time.Nanosecond},
	}
	if err := os.WriteFile(cfg.File, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	left := func() []string {
		names, err := filepath.Glob(filepath.Join(folder, "*"))
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	keys, saved := keptKeys(t, cfg)
	expect(t, keys, "a", nil)
	<-saved
	if n := len(left()); n != 2 {
		t.Fatalf("there are %q, want what was kept and what was set aside", left())
	}
	keys.Discard()
	expect(t, keys, "b", ErrUnknownKey) // loads once more
	<-saved
	if n := len(left()); n != 0 {
		t.Errorf("there are %q", left())
	}
	expect(t, keys, "a", nil)
	keys.Discard()
	NewCachedKeySet(CacheConfig{}, nil).Discard()
}

// A disk that fails takes no key away.
func TestKeyFileCannotBeWritten(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(jwks(t, public("a", "RS256", &rsaTestKey().PublicKey)))
	}))
	t.Cleanup(server.Close)
	var log bytes.Buffer
	keys, saved := keptKeys(t, RemoteConfig{
		URL: server.URL, AllowedNetworks: loopback, File: filepath.Join(t.TempDir(), "is not there", "keys"),
		Cache: CacheConfig{Refetch: time.Nanosecond, Logger: slog.New(slog.NewTextHandler(&log, nil))},
	})
	expect(t, keys, "a", nil)
	<-saved
	expect(t, keys, "b", ErrUnknownKey) // loads once more
	<-saved
	if n := strings.Count(log.String(), "cannot be kept"); n != 1 {
		t.Errorf("%d lines about it, want 1:\n%s", n, &log)
	}
}
