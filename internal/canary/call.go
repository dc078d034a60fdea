package canary

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"
)

const (
	// requestTime bounds a call.
	requestTime = 2 * time.Second
	// dialTime bounds the making of a connection, which goes on when its call is over.
	dialTime = 5 * time.Second
	// maxBody of an answer is read, so that its connection can be used again.
	maxBody = 4 << 10
	// maxURL is how long a URL may be.
	maxURL = 2048
)

// NewClient returns a client for canaries, which goes through no proxy. A nil tlsConfig is the system's roots.
func NewClient(tlsConfig *tls.Config) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: (&net.Dialer{Timeout: dialTime}).DialContext, TLSHandshakeTimeout: dialTime,
		TLSClientConfig: tlsConfig, ForceAttemptHTTP2: true, DisableCompression: true,
		// Gateways may be behind one host, each with a connection that is used every few milliseconds.
		MaxIdleConnsPerHost: maxAccepting, IdleConnTimeout: 30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
	}}
}

// strict is client without what could take the token elsewhere or change what is asked.
func strict(client *http.Client) *http.Client {
	own := *client
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	own.Jar = nil
	return &own
}

// kind is what an answer says.
type kind int

const (
	silent kind = iota // none of the others
	accepting
	refusing    // 401
	forbidding  // 403
	refusingAll // 401, and also what is not revoked
)

// answer is what came of a call.
type answer struct {
	kind kind
	// at is when the status was there.
	at time.Time
	// detail is for people.
	detail string
	// cut: there was no answer, and less time for it than a call has.
	cut bool
}

var unasked = answer{detail: "it has not answered"}

// call calls a canary with a token.
func (c *Canary) call(ctx context.Context, url, compact string, within time.Duration) answer {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{at: time.Now(), detail: "its canary URL cannot be called"}
	}
	req.Header.Set("Authorization", "Bearer "+compact)
	req.Header.Set("User-Agent", "rescind-canary")
	resp, err := c.client.Do(req)
	a := answer{at: time.Now()}
	if err != nil {
		if ctx.Err() != nil {
			a.cut = within < requestTime
			a.detail = fmt.Sprintf("it did not answer within %s", requestTime)
			return a
		}
		a.detail = "it could not be called: " + cause(err).Error()
		return a
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, maxBody) // the status has said all
	switch status := resp.StatusCode; {
	case status >= 200 && status < 300:
		a.kind = accepting
	case status == http.StatusUnauthorized:
		a.kind = refusing
	case status == http.StatusForbidden:
		a.kind = forbidding
	}
	a.detail = fmt.Sprintf("it answered %d", resp.StatusCode)
	return a
}

// cause is err without the URL, which a detail need not repeat: whoever sees the one sees the other. Host and
// address may still be in it, as a dialer names them.
func cause(err error) error {
	if outer, ok := errors.AsType[*url.Error](err); ok {
		return outer.Err
	}
	return err
}

// CheckURL reports what is wrong with where a canary is called: https, or http on loopback, no user, no
// fragment, at most 2048 bytes. Its error is for people and does not repeat the URL.
func CheckURL(raw string) error {
	u, err := url.Parse(raw)
	switch {
	case err != nil, u.Hostname() == "", u.Scheme != "https" && u.Scheme != "http":
		return errors.New("the canary's URL must be one such as https://gateway-1.example.com/rescind-canary/v1/")
	case len(raw) > maxURL:
		return fmt.Errorf("the canary's URL has %d bytes, must be at most %d", len(raw), maxURL)
	case u.User != nil:
		return errors.New("the canary's URL must have no user: the token says who calls")
	case u.Fragment != "" || u.RawFragment != "" || raw[len(raw)-1] == '#':
		return errors.New("the canary's URL must have no fragment")
	case u.Scheme == "http" && !isLoopback(u.Hostname()):
		return errors.New("the canary's URL must be https, unless its host is loopback")
	}
	return nil
}

func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.Unmap().IsLoopback()
}
