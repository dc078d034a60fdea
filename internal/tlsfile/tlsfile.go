// Package tlsfile makes TLS configurations of PEM files. It hides how a certificate is renewed in place while
// a process runs: which of its files is read when, and what is used while half of a pair is there.
package tlsfile

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

// Files are the names of PEM files. Each may be empty; Cert and Key go together.
type Files struct {
	CA, Cert, Key string
}

// Client is for connections to others. It trusts CA, or the system's authorities, and shows the certificate,
// which is read at every handshake: it may be renewed in place. It is nil when no file is named, and fails
// when [Files.Check] does.
func (f Files) Client() (*tls.Config, error) {
	if f == (Files{}) {
		return nil, nil
	}
	roots, err := f.roots()
	if err != nil {
		return nil, err
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
	if f.Cert != "" {
		if _, err := f.pair(); err != nil {
			return nil, err
		}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return f.pair() }
	}
	return cfg, nil
}

// Check reports whether the files that are named can be used now. Its error does not repeat their names,
// unless one cannot be read.
func (f Files) Check() error {
	_, err := f.Client()
	return err
}

// Server is for a listener with the certificate, which is needed; CA is not looked at. The files are looked at
// again once a second, if somebody connects: what has been renewed is used then, and is a line in log. A pair
// that does not fit is an error there, and the one before stays in use.
func (f Files) Server(log *slog.Logger) (*tls.Config, error) {
	s := &served{files: f, log: log}
	if err := s.read(); err != nil {
		return nil, fmt.Errorf("read certificate %s and key %s: %w", f.Cert, f.Key, err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.get}, nil
}

// roots is nil, which stands for the system's authorities, if there is no CA.
func (f Files) roots() (*x509.CertPool, error) {
	if f.CA == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New("it holds no certificate")
	}
	return roots, nil
}

func (f Files) pair() (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	return &cert, err
}

// served is the certificate of a listener.
type served struct {
	files Files
	log   *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	looked  time.Time
	changed [2]time.Time // of the files that current was read from
}

// lookEvery is how long a renewed certificate may wait.
const lookEvery = time.Second

func (s *served) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.looked) < lookEvery {
		return s.current, nil
	}
	if s.times() != s.changed {
		if err := s.read(); err != nil {
			s.log.Error("the renewed certificate cannot be used, the old one stays in use; put a matching pair in place",
				"cert_file", s.files.Cert, "key_file", s.files.Key, "error", err)
		} else {
			s.log.Info("uses the renewed certificate", "cert_file", s.files.Cert)
		}
	}
	s.looked = time.Now()
	return s.current, nil
}

func (s *served) times() (t [2]time.Time) {
	for i, name := range []string{s.files.Cert, s.files.Key} {
		if info, err := os.Stat(name); err == nil {
			t[i] = info.ModTime()
		}
	}
	return t
}

func (s *served) read() error {
	changed := s.times()
	cert, err := s.files.pair()
	if err != nil {
		return err
	}
	s.current, s.changed, s.looked = cert, changed, time.Now()
	return nil
}
