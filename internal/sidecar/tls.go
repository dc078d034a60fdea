package sidecar

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// TLSFiles are PEM files. Each may be empty; Cert and Key go together.
type TLSFiles struct{ CA, Cert, Key string }

// config is for connections to others. It trusts CA, or the system's authorities, and shows the
// certificate, which is read at every handshake: it may be renewed in place. It is nil when no file
// is named.
func (f TLSFiles) config() (*tls.Config, error) {
	if f == (TLSFiles{}) {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.CA != "" {
		pem, err := os.ReadFile(f.CA)
		if err != nil {
			return nil, err
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("it holds no certificate")
		}
	}
	if f.Cert != "" {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
			return &cert, err
		}
	}
	return cfg, nil
}

// certificate is a listener's, read again when its files change, so that it can be renewed while
// connections are open.
type certificate struct {
	files TLSFiles
	log   *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	looked  time.Time
	changed [2]time.Time // of the files that current was read from
}

// lookEvery is how long a renewed certificate may wait.
const lookEvery = time.Second

func newCertificate(files TLSFiles, log *slog.Logger) (*certificate, error) {
	c := &certificate{files: files, log: log}
	return c, c.read()
}

func (c *certificate) config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: c.get}
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) < lookEvery {
		return c.current, nil
	}
	if c.times() != c.changed {
		if err := c.read(); err != nil {
			c.log.Error("the renewed certificate cannot be used, the old one stays in use; put a matching pair in place", "error", err)
		} else {
			c.log.Info("uses the renewed certificate")
		}
	}
	c.looked = time.Now()
	return c.current, nil
}

func (c *certificate) times() (t [2]time.Time) {
	for i, name := range []string{c.files.Cert, c.files.Key} {
		if info, err := os.Stat(name); err == nil {
			t[i] = info.ModTime()
		}
	}
	return t
}

func (c *certificate) read() error {
	changed := c.times()
	cert, err := tls.LoadX509KeyPair(c.files.Cert, c.files.Key)
	if err != nil {
		return fmt.Errorf("read certificate %s and key %s: %w", c.files.Cert, c.files.Key, err)
	}
	c.current, c.changed, c.looked = &cert, changed, time.Now()
	return nil
}
