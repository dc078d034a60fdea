package app

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// certificate is the listener's, read again when its files change, so that it can
// be renewed while connections are open.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	looked  time.Time
	changed [2]time.Time // of the files that current was read from
}

// lookEvery is how long a renewed certificate may wait.
const lookEvery = time.Second

func newCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	return c, c.read()
}

func (c *certificate) config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: c.get}
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
	for i, name := range []string{c.certFile, c.keyFile} {
		if info, err := os.Stat(name); err == nil {
			t[i] = info.ModTime()
		}
	}
	return t
}

func (c *certificate) read() error {
	changed := c.times()
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("read certificate %s and key %s: %w", c.certFile, c.keyFile, err)
	}
	c.current, c.changed, c.looked = &cert, changed, time.Now()
	return nil
}
