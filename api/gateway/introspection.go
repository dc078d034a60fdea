package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
)

// maxAnswerBytes bounds what an introspection endpoint may say of a token.
const maxAnswerBytes = 64 << 10

// introspection asks an issuer about tokens (RFC 7662). Nothing that it says is kept.
type introspection struct {
	url, id, secret string
	issuers         []string // none: all
	client          *http.Client
	timeout         time.Duration
	slots           chan struct{}
	log             *slog.Logger
	failing         atomic.Bool
}

func newIntrospection(cfg Introspection, log *slog.Logger) (*introspection, error) {
	cfg.Timeout = cmp.Or(cfg.Timeout, 2*time.Second)
	cfg.MaxConcurrent = cmp.Or(cfg.MaxConcurrent, 64)
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := checkURL(cfg.URL, false); err != nil {
		wrong("URL: %w", err)
	}
	if cfg.ClientID == "" || cfg.ClientSecret == "" {
		wrong("needs both ClientID and ClientSecret")
	}
	if slices.Contains(cfg.Issuers, "") {
		wrong("Issuers has an empty one: leave it out")
	}
	if cfg.Timeout < 0 {
		wrong("Timeout is %s, must be positive", cfg.Timeout)
	}
	if cfg.MaxConcurrent < 0 {
		wrong("MaxConcurrent is %d, must be positive", cfg.MaxConcurrent)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Client == nil {
		cfg.Client = &http.Client{Transport: &http.Transport{
			DialContext:            (&net.Dialer{Timeout: cfg.Timeout}).DialContext,
			TLSHandshakeTimeout:    cfg.Timeout,
			MaxIdleConnsPerHost:    cfg.MaxConcurrent,
			IdleConnTimeout:        time.Minute,
			MaxResponseHeaderBytes: 64 << 10,
			ForceAttemptHTTP2:      true,
		}}
	}
	client := *cfg.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &introspection{
		url: cfg.URL, id: cfg.ClientID, secret: cfg.ClientSecret, issuers: slices.Clone(cfg.Issuers), client: &client, timeout: cfg.Timeout,
		slots: make(chan struct{}, cfg.MaxConcurrent), log: log,
	}, nil
}

// canAsk reports whether there is somebody to ask about t. Nil has nobody, and for the tokens of other issuers
// there is nobody either.
func (i *introspection) canAsk(t *token.Token) bool {
	return i != nil && (len(i.issuers) == 0 || slices.Contains(i.issuers, t.Issuer))
}

// ask returns "" if the issuer says that t, which is compact, is active; else the reason why the
// token is not let through.
func (i *introspection) ask(ctx context.Context, compact string, t *token.Token) (reason string) {
	if !i.canAsk(t) {
		return reasonNoAnswer
	}
	select {
	case i.slots <- struct{}{}:
		defer func() { <-i.slots }()
	default:
		return reasonOverload
	}
	asked := ctx
	ctx, cancel := context.WithTimeoutCause(ctx, i.timeout, fmt.Errorf("no answer within %s", i.timeout))
	defer cancel()
	active, err := i.active(ctx, compact, t)
	switch {
	case asked.Err() != nil: // its caller is gone: that says nothing of the issuer
		return reasonNoAnswer
	case err != nil:
		if !i.failing.Swap(true) {
			i.log.Warn("tokens cannot be introspected, and are answered 503 where nothing else is known of them", "error", err)
		}
		return reasonNoAnswer
	}
	if i.failing.Swap(false) {
		i.log.Info("tokens can be introspected again")
	}
	if !active {
		return reasonInactive
	}
	return ""
}

// active is what the issuer says. Its error repeats nothing of the token.
func (i *introspection) active(ctx context.Context, compact string, t *token.Token) (bool, error) {
	form := url.Values{"token": {compact}, "token_type_hint": {"access_token"}}.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, i.url, strings.NewReader(form))
	if err != nil {
		return false, err
	}
	req.SetBasicAuth(url.QueryEscape(i.id), url.QueryEscape(i.secret)) // RFC 6749 section 2.3.1
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "rescind")
	resp, err := i.client.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return false, fmt.Errorf("introspect at %s: %w", req.URL.Host, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return false, fmt.Errorf("introspect at %s: status %d, must be 200; redirects are not followed", req.URL.Host, resp.StatusCode)
	}
	if kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return false, fmt.Errorf("introspect at %s: the answer is no application/json", req.URL.Host)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	if err != nil {
		return false, fmt.Errorf("introspect at %s: %w", req.URL.Host, err)
	}
	active, err := parseAnswer(body, t, time.Now())
	if err != nil {
		return false, fmt.Errorf("introspect at %s: %w", req.URL.Host, err)
	}
	return active, nil
}

// parseAnswer reads an introspection response (RFC 7662 section 2.2) about t. What it says of
// another token is an error.
func parseAnswer(body []byte, t *token.Token, now time.Time) (active bool, err error) {
	if len(body) > maxAnswerBytes {
		return false, fmt.Errorf("the answer has more than %d bytes", maxAnswerBytes)
	}
	var answer map[string]json.RawMessage // names are exact, which they are not for a struct
	if err := json.Unmarshal(body, &answer); err != nil {
		return false, errors.New("the answer is no JSON object")
	}
	switch string(answer["active"]) {
	case "true":
	case "false":
		return false, nil
	default:
		return false, errors.New("the answer does not say whether the token is active")
	}
	for name, want := range map[string]string{"iss": t.Issuer, "jti": t.ID} {
		raw, ok := answer[name]
		if !ok || string(raw) == "null" {
			continue
		}
		var got string
		if json.Unmarshal(raw, &got) != nil || got != want {
			return false, fmt.Errorf("the answer is about another token: its %s differs", name)
		}
	}
	if raw, ok := answer["exp"]; ok && string(raw) != "null" {
		var exp float64
		if json.Unmarshal(raw, &exp) != nil || int64(exp) < now.Add(-revocation.MaxLeeway).Unix() {
			return false, errors.New("the answer contradicts itself: the token is active, and its exp is over")
		}
	}
	return true, nil
}
