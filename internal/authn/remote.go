package authn

import (
	"net/http"
	"net/netip"
	"strings"
)

// Remote is the address that r comes from: the peer's, or, where the peer is a
// trusted proxy, the last one in X-Forwarded-For that is not. The zero Addr when
// there is none.
func (a *Authenticator) Remote(r *http.Request) netip.Addr {
	from := parseAddr(r.RemoteAddr)
	forwarded := r.Header["X-Forwarded-For"]
	// From the right: only what trusted proxies have appended is true.
	for i := len(forwarded) - 1; i >= 0; i-- {
		for rest := forwarded[i]; rest != "" && a.trusted(from); {
			cut := strings.LastIndexByte(rest, ',')
			next := parseAddr(strings.Trim(rest[cut+1:], " \t"))
			if !next.IsValid() {
				return from
			}
			from, rest = next, rest[:max(cut, 0)]
		}
	}
	return from
}

func (a *Authenticator) trusted(addr netip.Addr) bool {
	for _, p := range a.cfg.TrustedProxies {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

func parseAddr(s string) netip.Addr {
	addr, err := netip.ParseAddr(strings.Trim(s, "[]"))
	if err != nil {
		withPort, err := netip.ParseAddrPort(s)
		if err != nil {
			return netip.Addr{}
		}
		addr = withPort.Addr()
	}
	return addr.Unmap().WithZone("")
}

// bucket is what shares one allowance of failures with addr: one subscriber
// commonly has a whole IPv6 /64.
func bucket(addr netip.Addr) netip.Addr {
	if !addr.Is6() {
		return addr
	}
	p, err := addr.Prefix(64)
	if err != nil {
		return addr
	}
	return p.Addr()
}
