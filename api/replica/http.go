package replica

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/revocation"
)

// HTTPConfig says where the service is. URL, Username and Password are needed.
type HTTPConfig struct {
	// URL is the service's base URL, for example https://rescind.example.com. Plain http is
	// for loopback only, unless AllowHTTP.
	URL string
	// AllowHTTP permits http:// to other hosts, for those who have TLS of their own in between.
	AllowHTTP bool
	// Username and Password are of an account with the role gateway.
	Username, Password string
	// Tenant narrows what is fetched to one tenant, by its domain. Empty: all that the
	// account sees.
	Tenant string
	// RootCAs verify the service's certificate, for one of a private authority. Default: those of
	// the system. It goes without Client, which has its own.
	RootCAs *x509.CertPool
	// Client sends the requests. It must have no timeout of its own: streams last. Redirects are
	// not followed, whatever it says. Default: one with timeouts to connect, RootCAs, and the
	// proxy of the environment ([http.ProxyFromEnvironment]). The keys of issuers are fetched
	// by package gateway, which has RootCAs of its own and uses no proxy.
	Client *http.Client
}

// HTTP is the service's own API: a [Source] of snapshots and deltas, a [Feed] of server-sent events,
// and a [Reporter]. Make one with [NewHTTP].
type HTTP struct {
	url           *url.URL
	tenant        string
	secret        string // the password
	authorization string // the header field
	client        *http.Client
	maxPage       int64 // a constant but in tests
}

var (
	_ Source   = (*HTTP)(nil)
	_ Feed     = (*HTTP)(nil)
	_ Reporter = (*HTTP)(nil)
)

// NewHTTP checks cfg; its error names all that is wrong with it. It does not connect.
func NewHTTP(cfg HTTPConfig) (*HTTP, error) {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	u, err := url.Parse(cfg.URL)
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		// It is not repeated: nobody knows what it is.
		wrong("URL must be a base URL such as https://rescind.example.com")
	case u.User != nil:
		wrong("URL has a user or password, which logs would show: set Username and Password")
	case u.RawQuery != "" || u.Fragment != "":
		wrong("URL has a query or a fragment, must be a base URL such as https://%s", u.Host)
	case u.Scheme == "http" && !cfg.AllowHTTP && !isLoopback(u.Hostname()):
		wrong("URL is http://%s, which shows the password on the network: use https, or set AllowHTTP if there is TLS in between", u.Host)
	}
	switch {
	case cfg.Username == "":
		wrong("Username is empty, must be that of an account with the role gateway")
	case strings.ContainsFunc(cfg.Username, isControl) || strings.Contains(cfg.Username, ":"):
		wrong("Username has a colon or a control character, which no account's has")
	}
	switch {
	case cfg.Password == "":
		wrong("Password is empty, must be that of the account")
	case strings.ContainsFunc(cfg.Password, isControl):
		wrong("Password has a control character, a line end perhaps: trim what was read from a file")
	}
	if cfg.Tenant != "" && !catalog.ValidDomain(cfg.Tenant) {
		wrong("Tenant is %q, must be a tenant's domain such as carbon.super, or empty for all", cfg.Tenant)
	}
	if cfg.Client != nil && cfg.Client.Timeout != 0 {
		wrong("Client has a Timeout of %s, which would end every stream: leave it 0", cfg.Client.Timeout)
	}
	if cfg.Client != nil && cfg.RootCAs != nil {
		wrong("Client and RootCAs are both set: give Client's transport the authorities, or leave it nil")
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("configure replica over HTTP: %w", err)
	}
	transport := newTransport()
	transport.TLSClientConfig = &tls.Config{RootCAs: cfg.RootCAs, MinVersion: tls.VersionTLS12}
	h := &HTTP{
		url: u.JoinPath("/"), tenant: cfg.Tenant, secret: cfg.Password,
		authorization: "Basic " + base64.StdEncoding.EncodeToString([]byte(cfg.Username+":"+cfg.Password)),
		client:        &http.Client{Transport: transport}, maxPage: maxPage,
	}
	if cfg.Client != nil {
		client := *cfg.Client
		h.client = &client
	}
	h.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return h, nil
}

// newTransport returns one that has a connection for each request, so that a stream that is not read
// holds up no snapshot.
func newTransport() *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	// A peer that is gone is noticed within 20 s, also while it is waited for: it holds reports for long.
	alive := net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 5 * time.Second, Count: 3}
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 10 * time.Second, KeepAliveConfig: alive}).DialContext,
		TLSHandshakeTimeout:    10 * time.Second,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		Protocols:              &protocols,
	}
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// String is the service's URL.
func (h *HTTP) String() string { return h.url.String() }

const (
	// answerIn is how long the service may take until it answers.
	answerIn = 30 * time.Second
	// stallFor is how long it may take for the next bytes of what it sends.
	stallFor = 15 * time.Second
	// An answer that it has been waited for longer than slowFor must bring leastRate from then
	// on, in bytes a second: while it is read nothing else is fetched. The service demands the
	// same of readers.
	slowFor   = 30 * time.Second
	leastRate = 64 << 10
	// reportIn is how long the service may take to answer a report, which it holds for up to a minute.
	reportIn = 75 * time.Second
	// maxInstructions bounds what it answers.
	maxInstructions = 64 << 10
	// pageLimit is how many events are asked for at a time, the most that there may be.
	pageLimit = 1000
	// maxPage bounds an answer with so many, of less than 64 KiB each.
	maxPage = (pageLimit + 1) * 64 << 10
	// maxProblem bounds what is read of an answer that tells of an error.
	maxProblem = 16 << 10
)

// Load implements [Source]: GET /v1/snapshots/all in the binary form.
func (h *HTTP) Load(ctx context.Context, s *State) error {
	a, err := h.get(ctx, "/v1/snapshots/all", nil, http.Header{"Accept": {SnapshotType}}, stallFor)
	if err == nil {
		defer a.close()
		a.ends = true
		_, err = s.ReadSnapshot(a)
	}
	if err != nil {
		return fmt.Errorf("load snapshot from %s: %w", h.url.Host, err)
	}
	return nil
}

// ErrAhead is returned by [HTTP.Events] when the service's log, in the same epoch, ends before the
// position that it was asked about. That is no matter of waiting: the log
// was restored to what it was before, and events that follow have numbers that others had.
var ErrAhead = errors.New("the log ends before what was applied here: was it restored? Run `rescind epoch new`")

// pastTheEnd is how the service says so in a problem.
const pastTheEnd = "past the end of the log"

// Events implements [Source]: GET /v1/events, up to 1,000 of them. Its error is [ErrAhead] if
// the log ends before after.
func (h *HTTP) Events(ctx context.Context, after revocation.Position) (Page, error) {
	page, err := h.events(ctx, after)
	if err != nil {
		return Page{}, fmt.Errorf("get events after %s from %s: %w", after, h.url.Host, err)
	}
	return page, nil
}

func (h *HTTP) events(ctx context.Context, after revocation.Position) (Page, error) {
	query := url.Values{"after": {after.String()}, "limit": {strconv.Itoa(pageLimit)}}
	a, err := h.get(ctx, "/v1/events", query, http.Header{"Accept": {"application/json"}}, stallFor)
	if r, ok := errors.AsType[*refusal](err); ok && r.status == http.StatusBadRequest && strings.Contains(r.text, pastTheEnd) {
		return Page{}, ErrAhead
	}
	if err != nil {
		return Page{}, err
	}
	defer a.close()
	a.ends = true
	var body struct {
		Epoch   revocation.Epoch  `json:"epoch"`
		Head    *revocation.Seq   `json:"head"` // not there when it is not known
		Through revocation.Seq    `json:"through"`
		Events  []json.RawMessage `json:"events"`
	}
	limited := &io.LimitedReader{R: a, N: h.maxPage}
	if err := json.NewDecoder(limited).Decode(&body); err != nil {
		if limited.N == 0 {
			err = fmt.Errorf("the answer is longer than %d bytes", h.maxPage)
		}
		return Page{}, fmt.Errorf("read answer: %w", err)
	}
	switch {
	case body.Epoch != after.Epoch:
		return Page{}, ErrGone
	case body.Through < after.Seq || body.Head != nil && *body.Head < body.Through:
		return Page{}, fmt.Errorf("read answer: its through %d and its head are not in order after %d", body.Through, after.Seq)
	}
	page := Page{Through: body.Through, Head: -1}
	if body.Head != nil {
		page.Head = *body.Head
	}
	last := after.Seq
	for _, raw := range body.Events {
		e, err := revocation.ParseEvent(raw)
		if err != nil {
			return Page{}, fmt.Errorf("read event after %d: %w", last, errors.Join(err, ErrGone))
		}
		if e.Epoch != after.Epoch || e.Seq <= last || e.Seq > body.Through {
			return Page{}, fmt.Errorf("read answer: event %s is not in order after %d", e.Position, last)
		}
		last = e.Seq
		page.Events = append(page.Events, e)
	}
	return page, nil
}

// Report implements [Reporter]: POST /v1/gateways/{id}/status. It waits up to 75 s for the service, which
// holds its answer.
func (h *HTTP) Report(ctx context.Context, id string, r Report) (Instructions, error) {
	in, err := h.report(ctx, id, r)
	if err != nil {
		return Instructions{}, fmt.Errorf("report gateway %.200q to %s: %w", id, h.url.Host, err)
	}
	return in, nil
}

func (h *HTTP) report(ctx context.Context, id string, r Report) (in Instructions, err error) {
	if !ValidID(id) {
		return in, errors.New("this can be no id of a gateway")
	}
	body, err := json.Marshal(r)
	if err != nil {
		return in, err
	}
	req, err := http.NewRequest(http.MethodPost, h.url.JoinPath("/v1/gateways", id, "status").String(), bytes.NewReader(body))
	if err != nil {
		return in, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, reportIn, errStalled)
	defer cancel()
	a, err := h.do(ctx, req, http.Header{
		"Accept": {"application/json"}, "Content-Type": {"application/json"},
		// Not sent: that a report can be sent again when the service closes the connection just then.
		"Idempotency-Key": {},
	}, reportIn, stallFor)
	if r, ok := errors.AsType[*refusal](err); ok {
		switch r.status {
		case http.StatusForbidden:
			r.text = "status 403: this id belongs to another account, or the account lacks the role gateway: " +
				"give the gateway an id of its own, or have an administrator forget this one"
		case http.StatusConflict:
			r.text = "status 409: another process, started later, reports with this id: " +
				"give each an id of its own; those that began with copies of one folder have the same"
		case http.StatusNotFound, http.StatusMethodNotAllowed:
			r.text = "status " + strconv.Itoa(r.status) + ": the service takes no reports: it is older than this gateway"
		}
	}
	if err != nil {
		return in, err
	}
	defer a.close()
	text, err := io.ReadAll(io.LimitReader(a, maxInstructions+1)) // to its end, so that the connection can be used again
	switch {
	case err != nil:
		return in, fmt.Errorf("read answer: %w", err)
	case len(text) > maxInstructions:
		return in, fmt.Errorf("read answer: it is longer than %d bytes", maxInstructions)
	}
	if err := json.Unmarshal(text, &in); err != nil {
		return in, fmt.Errorf("read answer: %w", err)
	}
	return in, nil
}

// answer is the body of an answer with status 200. Reading fails when nothing comes for long or, of
// one that ends, too little. It must be closed.
type answer struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	body   io.ReadCloser
	stall  time.Duration
	timer  *time.Timer

	ends   bool // it is no stream, and must keep to leastRate
	came   int64
	waited time.Duration // for what came
}

var (
	// errStalled is the cause of requests that are given up.
	errStalled = errors.New("nothing came for long: the service, or the way to it, hangs")
	errSlow    = fmt.Errorf("less than %d KiB a second came for long: the service, or the way to it, is too slow", leastRate>>10)
)

// get asks for path below the service's URL. The answer is of the type that header accepts; its
// reader may be slow, but the service must send something every stall.
func (h *HTTP) get(ctx context.Context, path string, query url.Values, header http.Header, stall time.Duration) (*answer, error) {
	u := h.url.JoinPath(path)
	if query == nil {
		query = url.Values{}
	}
	if h.tenant != "" {
		query.Set("tenant", h.tenant)
	}
	u.RawQuery = query.Encode()
	req, err := http.NewRequest(http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	return h.do(ctx, req, header, answerIn, stall)
}

// do sends a request. It must be answered within that time, and what else is said of get holds.
func (h *HTTP) do(ctx context.Context, req *http.Request, header http.Header, within, stall time.Duration) (*answer, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	a := &answer{ctx: ctx, cancel: cancel, stall: stall}
	a.timer = time.AfterFunc(within, func() { cancel(errStalled) })
	header.Set("Authorization", h.authorization)
	header.Set("User-Agent", "rescind-replica")
	req.Header = header
	resp, err := h.client.Do(req.WithContext(ctx))
	a.timer.Stop()
	if err != nil {
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err // without the URL, which has been named
		}
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		a.close()
		return nil, err
	}
	a.body = resp.Body
	want := header.Get("Accept")
	media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	switch {
	case resp.StatusCode != http.StatusOK:
		err = h.refusal(resp, a)
	case media != want:
		err = fmt.Errorf("the answer is %q, must be %s: URL may lead elsewhere, or the service is older than this gateway", media, want)
	default:
		return a, nil
	}
	a.close()
	return nil, err
}

// Read waits for the service no longer than a.stall, however long the reader takes in between. Nor
// does that count as time in which little came.
func (a *answer) Read(p []byte) (int, error) {
	a.timer.Reset(a.stall)
	began := time.Now()
	n, err := a.body.Read(p)
	a.timer.Stop()
	a.waited += time.Since(began)
	a.came += int64(n)
	if err == nil && a.ends && isSlow(a.came, a.waited-slowFor) {
		return n, errSlow
	}
	if err != nil && !errors.Is(err, io.EOF) {
		if cause := context.Cause(a.ctx); cause != nil {
			err = cause
		}
	}
	return n, err
}

// isSlow reports whether so many bytes are too few for a time, which may be negative.
func isSlow(came int64, waited time.Duration) bool {
	return float64(came) < waited.Seconds()*leastRate
}

func (a *answer) close() {
	a.timer.Stop()
	a.cancel(nil)
	if a.body != nil {
		a.body.Close()
	}
}

// refusal is an answer of the service that is not 200.
type refusal struct {
	status int
	text   string
	wait   time.Duration // that the service asks for
}

func (r *refusal) Error() string { return r.text }

// Is makes 410 an [ErrGone].
func (r *refusal) Is(target error) bool { return target == ErrGone && r.status == http.StatusGone }

// accountWait is how long to wait after a password was refused: trying it faster looks like an
// attack.
const accountWait = 5 * time.Second

// refusal reads what the service says.
func (h *HTTP) refusal(resp *http.Response, body io.Reader) error {
	r := &refusal{status: resp.StatusCode}
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		r.wait = time.Duration(min(s, 60)) * time.Second
	}
	advice := h.problem(resp, body)
	switch {
	case r.status == http.StatusUnauthorized:
		advice, r.wait = "the service does not accept the account: check Username and Password", max(r.wait, accountWait)
	case r.status == http.StatusForbidden:
		advice, r.wait = "the account may not read this: check that it has the role gateway, and sees Tenant if that is set", max(r.wait, accountWait)
	case r.status == http.StatusNotFound:
		advice = "there is no such thing: check URL, and Tenant if that is set"
	case r.status/100 == 3:
		advice = "redirects are not followed: set URL to where the service is"
	}
	r.text = "status " + strconv.Itoa(r.status)
	if advice != "" {
		r.text += ": " + advice
	}
	return r
}

// problem is the detail of a problem (RFC 9457), if there is one and it can be shown: what stands
// between the service and this process may repeat the request.
func (h *HTTP) problem(resp *http.Response, body io.Reader) string {
	if media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); media != "application/problem+json" {
		return ""
	}
	var problem struct{ Title, Detail string }
	if json.NewDecoder(io.LimitReader(body, maxProblem)).Decode(&problem) != nil {
		return ""
	}
	text := strings.TrimSpace(problem.Title + " " + problem.Detail)
	secret := strings.Contains(text, h.secret) || strings.Contains(text, strings.TrimPrefix(h.authorization, "Basic "))
	if secret || strings.ContainsFunc(text, isControl) || len(text) > 300 {
		return ""
	}
	return text
}
