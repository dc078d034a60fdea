package canary

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// caller is a canary that only calls.
func caller(client *http.Client) *Canary { return &Canary{client: strict(client)} }

func TestCalls(t *testing.T) {
	t.Parallel()
	var elsewhere atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	gateway := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.Header.Get("Authorization") != "Bearer "+secret || r.UserAgent() != "rescind-canary" || r.Header.Get("Cookie") != "" {
			t.Errorf("the request is %s with %v", r.Method, r.Header)
		}
		http.SetCookie(w, &http.Cookie{Name: "session", Value: "x", Path: "/"})
		switch r.URL.Path {
		case "/200":
		case "/204":
			w.WriteHeader(http.StatusNoContent)
		case "/301":
			http.Redirect(w, r, other.URL, http.StatusMovedPermanently)
		case "/307":
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		case "/401":
			http.Error(w, "Invalid Credentials", http.StatusUnauthorized)
		case "/403":
			w.WriteHeader(http.StatusForbidden)
		case "/404":
			w.WriteHeader(http.StatusNotFound)
		case "/500":
			w.WriteHeader(http.StatusInternalServerError)
		case "/endless":
			for chunk := make([]byte, 1024); ; {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		case "/broken":
			panic(http.ErrAbortHandler)
		}
	}))
	t.Cleanup(gateway.Close)
	roots := x509.NewCertPool()
	roots.AddCert(gateway.Certificate())
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	client := NewClient(&tls.Config{RootCAs: roots})
	client.Jar = jar
	c := caller(client)
	const long = time.Minute
	for path, want := range map[string]kind{
		"/200": accepting, "/204": accepting, "/endless": accepting, "/401": refusing, "/403": forbidding,
		"/301": silent, "/307": silent, "/404": silent, "/500": silent, "/broken": silent,
	} {
		for range 2 { // with what the first one left
			before := time.Now()
			a := c.call(t.Context(), gateway.URL+path, secret, long)
			if a.kind != want || a.cut || a.at.Before(before) || a.detail == "" {
				t.Errorf("%s: %+v, want %d", path, a, want)
			}
			if strings.Contains(a.detail, secret) || strings.Contains(a.detail, gateway.URL) {
				t.Errorf("%s: detail is %q", path, a.detail)
			}
		}
	}
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("%d requests went where a gateway said", n)
	}
	if a := caller(NewClient(nil)).call(t.Context(), gateway.URL+"/200", secret, long); a.kind != silent || !strings.Contains(a.detail, "certificate") {
		t.Errorf("with a certificate that nobody vouches for: %+v", a)
	}
}

func TestCallsThatEnd(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	gateway := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-stop:
		}
	}))
	t.Cleanup(gateway.Close)
	t.Cleanup(func() { close(stop) })
	c := caller(NewClient(nil))
	if a := c.call(t.Context(), gateway.URL, secret, 20*time.Millisecond); a.kind != silent || !a.cut {
		t.Errorf("a call with less than its time: %+v", a)
	}
	if a := c.call(t.Context(), gateway.URL, secret, requestTime); a.kind != silent || a.cut || a.detail != "it did not answer within 2s" {
		t.Errorf("a call that hangs: %+v", a)
	}
	gateway.Close()
	if a := c.call(t.Context(), gateway.URL, secret, time.Minute); a.kind != silent || !strings.Contains(a.detail, "refused") || strings.Contains(a.detail, "http:") {
		t.Errorf("a call of nobody: %+v", a)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if a := c.call(ctx, gateway.URL, secret, requestTime); a.kind != silent {
		t.Errorf("a call that was given up: %+v", a)
	}
}

func TestNoProxy(t *testing.T) {
	t.Parallel()
	if NewClient(nil).Transport.(*http.Transport).Proxy != nil {
		t.Error("canaries are called through a proxy")
	}
}

func TestCheckURL(t *testing.T) {
	t.Parallel()
	for raw, want := range map[string]string{
		"https://g.example.com/rescind-canary/v1/": "", "https://g.example.com:8243/x?probe=1": "", "https://[2001:db8::1]/": "",
		"http://127.0.0.1:8280/x": "", "http://localhost/": "", "http://[::1]:8280/": "", "http://[::ffff:127.0.0.1]/": "",
		"http://g.example.com/": "must be https", "http://10.0.0.1/": "must be https", "http://localhost.example.com/": "must be https",
		"https://user:password@g.example.com/": "no user", "https://g.example.com/#x": "no fragment", "https://g.example.com/#": "no fragment",
		"": "must be one such as", "g.example.com": "must be one such as", "ftp://g.example.com/": "must be one such as", "https:///x": "must be one such as",
		"https://:8243/": "must be one such as", "https://g.example.com/%zz": "must be one such as", "https://g.example.com/\n": "must be one such as",
		"https://g.example.com/" + strings.Repeat("x", maxURL): "2070 bytes",
	} {
		err := CheckURL(raw)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("CheckURL(%q) = %v, want %q", raw, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "password") {
			t.Errorf("CheckURL(%q) = %v", raw, err)
		}
	}
}

// What is allowed is a request that goes where it says.
func FuzzCheckURL(f *testing.F) {
	for _, seed := range []string{"https://g.example.com/", "http://127.0.0.1:1/", "https://a@b/#c", "http://[::1%25lo]/", "https://g\\@h/"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		if CheckURL(raw) != nil {
			return
		}
		req, err := http.NewRequest(http.MethodGet, raw, nil)
		if err != nil {
			t.Fatalf("%q is allowed and makes no request: %v", raw, err)
		}
		u, err := url.Parse(raw)
		if err != nil || u.User != nil || u.Fragment != "" || req.URL.Hostname() == "" {
			t.Fatalf("%q is allowed: %+v", raw, u)
		}
		if addr, err := netip.ParseAddr(u.Hostname()); u.Scheme != "https" && u.Hostname() != "localhost" && (err != nil || !addr.Unmap().IsLoopback()) {
			t.Fatalf("%q is allowed over plain HTTP", raw)
		}
	})
}
