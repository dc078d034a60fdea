package tlsfile_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rescindhq/rescind/internal/tlsfile"
)

// writePair writes a certificate for 127.0.0.1 that vouches for itself, and its key.
func writePair(t *testing.T, files tlsfile.Files, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC), IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, files.Cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})), serial)
	write(t, files.Key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})), serial)
}

// write gives each version of a file a time of its own: those of the file system may be coarse.
func write(t *testing.T, name, text string, version int64) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 1, 0, 0, int(version), 0, time.UTC)
	if err := os.Chtimes(name, at, at); err != nil {
		t.Fatal(err)
	}
}

func newPair(t *testing.T, serial int64) tlsfile.Files {
	t.Helper()
	dir := t.TempDir()
	files := tlsfile.Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	writePair(t, files, serial)
	return files
}

func serial(t *testing.T, cert *tls.Certificate, err error) int64 {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return cert.Leaf.SerialNumber.Int64()
}

// A listener's certificate is renewed while it listens; one that does not fit its key is not taken.
func TestServerRenews(t *testing.T) {
	t.Parallel()
	files, other := newPair(t, 1), newPair(t, 9)
	synctest.Test(t, func(t *testing.T) {
		var logs strings.Builder
		cfg, err := files.Server(slog.New(slog.NewTextHandler(&logs, nil)))
		if err != nil {
			t.Fatal(err)
		}
		served := func() int64 {
			t.Helper()
			cert, err := cfg.GetCertificate(nil)
			return serial(t, cert, err)
		}
		complaints := func() int { return strings.Count(logs.String(), "the renewed certificate cannot be used") }
		if got := served(); got != 1 {
			t.Fatalf("certificate %d, want 1", got)
		}
		writePair(t, files, 2)
		if got := served(); got != 1 {
			t.Errorf("certificate %d at once: the files are looked at for every connection", got)
		}
		time.Sleep(time.Second)
		if got := served(); got != 2 {
			t.Errorf("certificate %d, want 2", got)
		}

		theirs, err := os.ReadFile(other.Key)
		if err != nil {
			t.Fatal(err)
		}
		write(t, files.Key, string(theirs), 3)
		time.Sleep(time.Second)
		if got := served(); got != 2 || complaints() != 1 {
			t.Errorf("certificate %d with a key that does not fit; %s", got, logs.String())
		}
		if err := os.Remove(files.Cert); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if got := served(); got != 2 || complaints() != 2 {
			t.Errorf("certificate %d, while the file is away; %s", got, logs.String())
		}
		writePair(t, files, 4)
		time.Sleep(time.Second)
		if got := served(); got != 4 {
			t.Errorf("certificate %d, want 4", got)
		}
	})
}

func TestServerNeedsAPair(t *testing.T) {
	t.Parallel()
	files := newPair(t, 1)
	for _, f := range []tlsfile.Files{{}, {Cert: files.Cert}, {Cert: files.Cert, Key: newPair(t, 2).Key}} {
		if _, err := f.Server(slog.New(slog.DiscardHandler)); err == nil || !strings.HasPrefix(err.Error(), "read certificate "+f.Cert) {
			t.Errorf("%+v: error %v", f, err)
		}
	}
}

func TestClient(t *testing.T) {
	t.Parallel()
	if cfg, err := (tlsfile.Files{}).Client(); cfg != nil || err != nil {
		t.Errorf("without files: %v, %v", cfg, err)
	}
	files := newPair(t, 1)
	if cfg, err := files.Client(); err != nil || cfg.RootCAs != nil {
		t.Errorf("without an authority: %v, want the system's; %v", cfg, err)
	}
	files.CA = newPair(t, 2).Cert
	cfg, err := files.Client()
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(files.CA)
	if err != nil {
		t.Fatal(err)
	}
	want := x509.NewCertPool()
	want.AppendCertsFromPEM(pem)
	if !cfg.RootCAs.Equal(want) || cfg.MinVersion != tls.VersionTLS12 || cfg.InsecureSkipVerify {
		t.Errorf("trusts others than those in %s, or speaks old TLS", files.CA)
	}
	for _, n := range []int64{1, 3} { // at every handshake
		writePair(t, files, n)
		cert, err := cfg.GetClientCertificate(nil)
		if got := serial(t, cert, err); got != n {
			t.Errorf("shows certificate %d, want %d", got, n)
		}
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	files := newPair(t, 1)
	for _, tt := range []struct {
		name  string
		files tlsfile.Files
		want  string // begins the error; empty: there is none
	}{
		{"nothing", tlsfile.Files{}, ""},
		{"all", tlsfile.Files{CA: files.Cert, Cert: files.Cert, Key: files.Key}, ""},
		{"an authority that is none", tlsfile.Files{CA: files.Key}, "it holds no certificate"},
		{"an authority that is not there", tlsfile.Files{CA: "/no/ca.pem"}, "open /no/ca.pem: "},
		{"another's key", tlsfile.Files{Cert: files.Cert, Key: newPair(t, 2).Key}, "tls: private key does not match"},
		{"no key", tlsfile.Files{Cert: files.Cert}, "open : "},
	} {
		err := tt.files.Check()
		if (err == nil) != (tt.want == "") || err != nil && !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}
