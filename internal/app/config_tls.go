package app

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// TLSFiles are the PEM files that a connection to a server of ours needs. Each
// may be empty; Cert and Key go together.
type TLSFiles struct {
	CA, Cert, Key string
}

// Config trusts CA, or the system's authorities, and shows the client
// certificate, which is read at every handshake: it may be renewed in place. It
// is nil when no file is named.
func (f TLSFiles) Config() (*tls.Config, error) {
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
		if err := checkPair(f.Cert, f.Key); err != nil {
			return nil, err
		}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
			return &cert, err
		}
	}
	return cfg, nil
}

func checkPair(cert, key string) error {
	_, err := tls.LoadX509KeyPair(cert, key)
	return err
}

// secure makes cc use d's TLS files, if there are any, for every host that it
// may try. The server's name is then always verified, and nothing falls back to
// a connection without TLS, whatever sslmode says. Unix sockets stay as they are.
func (d Database) secure(cc *pgx.ConnConfig) error {
	base, err := d.TLS.Config()
	if err != nil {
		return fmt.Errorf("read the TLS files of Postgres: %w", err)
	}
	if base == nil {
		return nil
	}
	tlsFor := func(host string) *tls.Config {
		if strings.HasPrefix(host, "/") {
			return nil
		}
		cfg := base.Clone()
		cfg.ServerName = host
		return cfg
	}
	place := func(host string, port uint16) string { return net.JoinHostPort(host, strconv.Itoa(int(port))) }
	cc.TLSConfig = tlsFor(cc.Host)
	tried := []string{place(cc.Host, cc.Port)}
	var others = cc.Fallbacks[:0:0]
	for _, f := range cc.Fallbacks {
		if slices.Contains(tried, place(f.Host, f.Port)) {
			continue // the same host without TLS
		}
		tried = append(tried, place(f.Host, f.Port))
		f.TLSConfig = tlsFor(f.Host)
		others = append(others, f)
	}
	cc.Fallbacks = others
	return nil
}
