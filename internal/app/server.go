package app

import (
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"net/url"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/internal/httpapi"
	"github.com/rescindhq/rescind/internal/tlsfile"
)

func httpConfig(cfg Config) httpapi.Config {
	c := httpapi.Config{MaxInFlight: cfg.HTTP.MaxInFlight, MaxConnections: cfg.HTTP.MaxConnections}
	if u, err := url.Parse(cfg.Issuer); err == nil {
		c.IssuerPath = u.Path
	}
	return c
}

// newServer returns the server of the public listener, and the listener with TLS if
// there is a certificate.
func newServer(cfg Config, handler http.Handler, on net.Listener, reg prometheus.Registerer, log *slog.Logger) (*http.Server, net.Listener, error) {
	server, err := httpapi.NewServer(httpConfig(cfg), handler, reg, log)
	if err != nil || cfg.HTTP.CertFile == "" {
		return server, on, err
	}
	tlsConfig, err := tlsfile.Files{Cert: cfg.HTTP.CertFile, Key: cfg.HTTP.KeyFile}.Server(log)
	if err != nil {
		return nil, nil, err
	}
	return server, tls.NewListener(on, tlsConfig), nil
}
