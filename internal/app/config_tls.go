package app

import (
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
)

// secure makes cc use d's TLS files, if there are any, for every host that it
// may try. The server's name is then always verified, and nothing falls back to
// a connection without TLS, whatever sslmode says. Unix sockets stay as they are.
func (d Database) secure(cc *pgx.ConnConfig) error {
	base, err := d.TLS.Client()
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
