package sidecar

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/rescindhq/rescind/api/catalog"
	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/api/token"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/tlsfile"
)

// Config is the file of rescind-gateway. [ParseConfig] fills it and checks it; sections that the file
// does not have are nil.
type Config struct {
	// ID is what the service knows the gateway by; empty for the one that Folder keeps, or a new one. Labels are for
	// people, and for those who select gateways.
	ID     string
	Labels map[string]string
	// Service or Etcd is where the state comes from, Service if there are both.
	Service *Service
	// Tenant is the domain of the only one that is served; empty for all that the account sees.
	Tenant string
	// AMQP and Etcd tell of events beside the service's own stream.
	AMQP *AMQP
	Etcd *Etcd
	// Folder is where state and keys are kept for a start without all of these. Empty: nowhere.
	Folder string

	// Audiences, or AnyAudience, as in [gateway.Config]; so are Leeway and Realm.
	Audiences   []string
	AnyAudience bool
	Leeway      time.Duration
	Realm       string
	// Claims and what follows are as in [replica.Config].
	Claims       replica.ClaimsMode
	Environments []string
	Staleness    replica.Staleness
	Routes       []replica.Route
	Empty        replica.OnStale

	Introspection *Introspection
	Issuers       []Issuer
	// KeyNetworks are private ones that keys may come from.
	KeyNetworks []netip.Prefix

	// Auth, Envoy and Proxy are how requests are asked about. At least one is there.
	Auth  *Listener
	Envoy *Listener
	Proxy *Proxy
	// OpsListen is the address of the operators' listener.
	OpsListen string
	Log       obs.Config
	// MaxInFlight are the most decisions at a time.
	MaxInFlight int
	// ShutdownGrace is how long open requests may take once the process is told to stop.
	ShutdownGrace time.Duration
}

// Service is how to reach Rescind.
type Service struct {
	URL       string
	Username  string
	Password  Secret
	TLS       tlsfile.Files // CA only
	AllowHTTP bool
}

// AMQP is how to reach RabbitMQ.
type AMQP struct {
	URL Secret
	TLS tlsfile.Files
	// AllowPlain lets URL be without TLS, and of another host.
	AllowPlain bool
	Exchange   string
}

// Etcd is how to reach etcd.
type Etcd struct {
	Endpoints []string
	TLS       tlsfile.Files
	// AllowPlain lets Endpoints be without TLS, and of other hosts.
	AllowPlain bool
	Username   string
	Password   Secret
	Prefix     string
	// Issuer is that of the super tenant.
	Issuer string
}

// Introspection is as in package gateway.
type Introspection struct {
	URL          string
	ClientID     string
	ClientSecret Secret
	// Issuers are those whose tokens it is asked about; empty for all.
	Issuers       []string
	TLS           tlsfile.Files // CA only
	Timeout       time.Duration
	MaxConcurrent int
}

// Issuer is trusted beside those in the catalog.
type Issuer struct {
	Iss    string
	Tenant string
	// Exactly one of JWKSURI and JWKSFile is set.
	JWKSURI, JWKSFile string
	// Algorithms is empty for the default.
	Algorithms       []string
	AllowTyp         []string
	MaxTokenLifetime time.Duration
}

// Listener is one for the proxy beside us.
type Listener struct {
	Listen string
	// AllowRemote lets Listen be other than loopback.
	AllowRemote bool
}

// Proxy is the reverse proxy.
type Proxy struct {
	Listen string
	// TLS has a certificate and its key, or nothing for plain HTTP.
	TLS tlsfile.Files
	// BehindTLSProxy: a proxy ends TLS before us, and is believed what it says of the caller.
	BehindTLSProxy bool
	Upstreams      []Upstream
	// Default is the URL for APIs without an upstream of their own. Empty: there is none.
	Default string
	// UpstreamTLS has an authority for upstreams with https, or nothing for the system's.
	UpstreamTLS tlsfile.Files
	// ForwardAuthorization sends the token on to upstreams, any of which could then use it for the others.
	ForwardAuthorization bool
	// UpstreamTimeout is until the header of an answer has come, IdleTimeout how long bytes may
	// take to follow, and how long a WebSocket may be silent both ways.
	UpstreamTimeout, IdleTimeout time.Duration
	// MaxInFlight are the most requests at work, MaxConnections the most open connections.
	MaxInFlight, MaxConnections int
}

// Upstream is where requests for an API go.
type Upstream struct {
	// Tenant is the API's, by its domain.
	Tenant string
	// Context or API, which is name:version, says which one it is.
	Context, API string
	// URL has a scheme and a host only.
	URL string
}

// Secret is a setting that no log, error or answer may show. A conversion to string gives the value.
type Secret string

const hidden = "[hidden]"

func (Secret) String() string               { return hidden }
func (Secret) GoString() string             { return hidden }
func (Secret) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, hidden) }
func (Secret) LogValue() slog.Value         { return slog.StringValue(hidden) }
func (Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// decisionTime bounds how long a decision takes: keys may be waited for twice, 5 s each, and then an issuer is asked.
func (c Config) decisionTime() time.Duration {
	most := 10 * time.Second
	if c.Introspection != nil {
		most += c.Introspection.Timeout
	}
	return most
}

// Logger is the logger that the file asks for, writing to w.
func (c Config) Logger(w io.Writer) *slog.Logger { return obs.NewLogger(c.Log, w) }

// Example is a configuration file to begin with.
const Example = `# The service, and a listener for the proxy beside us, are all that is needed.
service:
  url: https://rescind.example.com
  username: gateway-1
  password_file: /etc/rescind-gateway/password   # or password_env: NAME
folder: /var/lib/rescind-gateway                 # to start from while the service is away
id: gateway-1                                    # what the service and people know it by
labels: {region: eu-1}                           # to select it by
audiences: [https://api.example.com]             # one of these must be in a token's aud
staleness: {max: 300s, then: deny}               # or serve, or introspect
routes:
  - {path: /payments, max: 30s, then: deny}
auth: {listen: "127.0.0.1:8081"}                 # forward-auth: /auth, and /auth/nginx for nginx
`

// ReadConfig reads and checks a configuration file. All mistakes are in its error, a line each, with
// their places.
func ReadConfig(name string) (Config, error) {
	f, err := os.Open(name)
	if err != nil {
		return Config{}, fmt.Errorf("read the configuration: %w", err)
	}
	defer f.Close()
	return parseConfig(f, reader{file: name, folder: filepath.Dir(name), getenv: os.Getenv})
}

// ParseConfig is [ReadConfig] of what it would read; relative names of files are relative to folder. It
// also reads the secrets, which are in files and variables of the environment that the configuration
// names.
func ParseConfig(r io.Reader, folder string) (Config, error) {
	return parseConfig(r, reader{file: "configuration", folder: folder, getenv: os.Getenv})
}

func parseConfig(from io.Reader, r reader) (Config, error) {
	text, err := io.ReadAll(io.LimitReader(from, maxFileBytes+1))
	if err != nil {
		return Config{}, fmt.Errorf("read the configuration: %w", err)
	}
	cfg := Config{
		Leeway: 30 * time.Second, Realm: "api", Claims: replica.ClaimsFirst,
		Staleness: replica.Staleness{Max: 300 * time.Second, Then: replica.Deny}, Empty: replica.Deny,
		OpsListen: "127.0.0.1:9091", MaxInFlight: 10_000, ShutdownGrace: 20 * time.Second,
	}
	if s := r.root(text); s != nil {
		cfg.read(s)
	}
	if err := r.err(); err != nil {
		return Config{}, err
	}
	return cfg, nil
}

const (
	idRule     = "1 to 128 of A-Z a-z 0-9 . _ - that begin with a letter or a digit"
	domainRule = "the domain of a tenant: 1 to 200 of a-z 0-9 . -"
	hostRule   = "a URL of scheme, host and port, such as http://127.0.0.1:9000, without a path"
)

var (
	printableForm = regexp.MustCompile(`^[!-~]{1,255}$`)
	realmForm     = regexp.MustCompile(`^[ !#-\[\]-~]{1,100}$`)
	prefixForm    = regexp.MustCompile(`^(/[A-Za-z0-9._~-]+)*$`)
	exchangeForm  = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,127}$`)
)

// read fills c, which has the defaults, and tells s of all that is wrong.
func (c *Config) read(s *section) {
	s.optional("id", checkedValue(&c.ID, idRule, replica.ValidID), "one that folder keeps")
	c.Labels = s.labels("labels")
	c.Service, c.AMQP, c.Etcd = readService(s.sub("service")), readAMQP(s.sub("amqp")), readEtcd(s.sub("etcd"))
	s.optional("tenant", checkedValue(&c.Tenant, domainRule, catalog.ValidDomain), "all that the account sees")
	s.optional("folder", textValue(&c.Folder, "the name of a folder"), "")
	c.Folder = s.r.within(c.Folder)

	s.list("audiences", each(&c.Audiences, "text of 1 to 255 bytes", func(s string) bool { return len(s) <= 255 }))
	s.optional("any_audience", boolValue(&c.AnyAudience), "false")
	s.optional("leeway", secondsValue(&c.Leeway, 0, revocation.MaxLeeway), "30s")
	s.optional("realm", checkedValue(&c.Realm, `1 to 100 of printable ASCII but " and \`, realmForm.MatchString), "api")
	s.optional("claims", choiceValue(&c.Claims, []string{"claims-first", "catalog-first", "claims-only"},
		replica.ClaimsFirst, replica.CatalogFirst, replica.ClaimsOnly), "claims-first")
	s.list("environments", each(&c.Environments, "the name of a gateway environment", func(s string) bool { return len(s) <= 255 }))

	introspects := c.readStaleness(s)
	c.Introspection = readIntrospection(s.sub("introspection"))
	tenant := cmp.Or(c.Tenant, revocation.SuperTenant.Domain)
	for _, i := range s.subs("issuers") {
		c.Issuers = append(c.Issuers, readIssuer(i, tenant, c.Issuers))
	}
	s.list("key_networks", networksItem(&c.KeyNetworks))

	c.Auth, c.Envoy = readListener(s.sub("auth"), "127.0.0.1:8081"), readListener(s.sub("envoy"), "127.0.0.1:8082")
	c.Proxy = readProxy(s.sub("proxy"), tenant)
	if ops := s.sub("ops"); ops != nil {
		ops.optional("listen", addressValue(&c.OpsListen), c.OpsListen)
		ops.end()
	}
	if log := s.sub("log"); log != nil {
		log.optional("level", choiceValue(&c.Log.Level, []string{"debug", "info", "warn", "error"},
			slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError), "info")
		log.optional("format", choiceValue(&c.Log.Text, []string{"json", "text"}, false, true), "json")
		log.end()
	}
	s.optional("max_in_flight", countValue(&c.MaxInFlight, "decisions", 1, 1_000_000), "10000")
	s.optional("shutdown_grace", periodValue(&c.ShutdownGrace, time.Second, 10*time.Minute), "20s")
	c.together(s, introspects)
	s.end()
}

// together finds what is wrong only in combination. introspects is a member that needs introspection, ""
// if there is none.
func (c *Config) together(s *section, introspects string) {
	service, amqp, etcd := s.given("service"), s.given("amqp"), s.given("etcd")
	s.together(!service && !etcd,
		"neither service nor etcd is set: what is revoked must come from somewhere. Set service, or etcd for revocations only", "service", "etcd")
	s.together(amqp && !service && etcd,
		"amqp is set, and service is not: events can be followed only from a state that the service gives. Set service, or take amqp away", "amqp")
	if etcd && !service {
		s.together(c.Claims != replica.ClaimsOnly,
			"claims is not claims-only, and service is not set: etcd has no catalog to look at. Set claims: claims-only, or service", "claims")
		s.together(len(c.Issuers) == 0,
			"issuers is not set, nor is service: nobody else says whose tokens are trusted. Set issuers, or service", "issuers")
	}
	s.together(len(c.Audiences) == 0 && !c.AnyAudience,
		"audiences is not set: a token for any other service would be accepted. List what the tokens for these APIs have in aud, or set any_audience: true", "audiences", "any_audience")
	s.together(len(c.Audiences) > 0 && c.AnyAudience,
		"audiences is set, and any_audience is true: it would not be looked at. Leave one out", "audiences", "any_audience")
	s.together(introspects != "" && !s.given("introspection"),
		introspects+" is introspect, and introspection is not set: nobody could be asked. Set introspection, or choose deny or serve", "introspection")
	s.together(!s.given("auth") && !s.given("envoy") && !s.given("proxy"),
		"none of auth, envoy and proxy is set: nobody could ask. Set one, such as auth: {}", "auth")
	for i, issuer := range c.Issuers {
		s.together(strings.HasPrefix(issuer.JWKSURI, "http:") && len(c.KeyNetworks) == 0,
			fmt.Sprintf("issuers[%d].jwks_uri is %s: keys come over http only from a network that key_networks names. Begin it with https://, or set key_networks", i, shown(issuer.JWKSURI)),
			"issuers", "key_networks")
	}
	if c.Proxy != nil && c.Claims == replica.ClaimsOnly {
		for i, u := range c.Proxy.Upstreams {
			s.together(u.Context != "",
				fmt.Sprintf("proxy.upstreams[%d] is named by its context, and claims is claims-only: tokens then say by name:version what they are for. Give api in place of context", i), "proxy", "claims")
		}
	}
	listens := map[string]string{}
	for _, l := range []struct{ name, at string }{{"auth", c.Auth.at()}, {"envoy", c.Envoy.at()}, {"proxy", c.Proxy.at()}, {"ops", c.OpsListen}} {
		if other, taken := listens[l.at]; taken && !strings.HasSuffix(l.at, ":0") {
			s.together(true, fmt.Sprintf("%s.listen and %s.listen are both %q: each needs a port of its own. Change one", other, l.name, l.at), l.name, other)
		}
		if l.at != "" {
			listens[l.at] = l.name
		}
	}
}

// at is "" if there is no listener.
func (l *Listener) at() string {
	if l == nil {
		return ""
	}
	return l.Listen
}

func (p *Proxy) at() string {
	if p == nil {
		return ""
	}
	return p.Listen
}

func readService(s *section) *Service {
	if s == nil {
		return nil
	}
	c := &Service{}
	s.required("url", urlValue(&c.URL, "the service's https URL, without user, query and fragment", func(u *url.URL) bool { return u.RawQuery == "" && !u.ForceQuery }))
	s.required("username", checkedValue(&c.Username, "the name of an account, 1 to 255 bytes without a colon", func(s string) bool {
		return len(s) <= 255 && !strings.Contains(s, ":")
	}))
	c.Password = s.secret("password", "the account's password", true, nil)
	s.optional("allow_http", boolValue(&c.AllowHTTP), "false")
	c.TLS = s.authority("ca_file", strings.HasPrefix(c.URL, "https:"), "a url that begins with https://", "url")
	s.together(isPlain(c.URL) && !c.AllowHTTP,
		fmt.Sprintf("%s is %s: the password would travel in the clear. Begin it with https://, or set allow_http: true if there is TLS in between", s.name("url"), shown(c.URL)),
		"url", "allow_http")
	s.end()
	return c
}

func readAMQP(s *section) *AMQP {
	if s == nil {
		return nil
	}
	c := &AMQP{Exchange: "rescind.events"}
	plain := false
	c.URL = s.secret("url", "a URL such as amqps://user:password@host:5671/vhost", true, func(text string) error {
		u, err := url.Parse(text)
		if err != nil { // its words may quote a part of the password
			return fmt.Errorf("percent-encode what is special in user and password")
		}
		plain = u.Scheme == "amqp" && !isLoopback(u.Host)
		return ruleIf(u.Scheme != "amqp" && u.Scheme != "amqps" || u.Hostname() == "" || u.Fragment != "" || strings.Count(u.EscapedPath(), "/") > 1)
	})
	s.optional("exchange", checkedValue(&c.Exchange, "1 to 127 of A-Z a-z 0-9 . _ : -", exchangeForm.MatchString), c.Exchange)
	s.optional("allow_plain", boolValue(&c.AllowPlain), "false")
	from := "url_file"
	if s.given("url_env") {
		from = "url_env"
	}
	s.together(plain && !c.AllowPlain,
		s.name(from)+" leads to a URL that begins with amqp://, of another host: the password would travel in the clear, and events could be changed on the way. "+
			"Begin it with amqps://, or set allow_plain: true if there is TLS in between", from, "allow_plain")
	c.TLS = s.tlsFiles(strings.HasPrefix(string(c.URL), "amqps:"), "a URL that begins with amqps://", "url_file")
	s.end()
	return c
}

func readEtcd(s *section) *Etcd {
	if s == nil {
		return nil
	}
	c := &Etcd{}
	s.list("endpoints", each(&c.Endpoints, "a URL such as https://etcd-1:2379", func(text string) bool {
		u, err := url.Parse(text)
		return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" && u.User == nil && u.Path == "" && u.RawQuery == "" && u.Fragment == ""
	}))
	s.together(len(c.Endpoints) == 0, s.name("endpoints")+" is not set: it must be a list of URLs such as https://etcd-1:2379. Set it", "endpoints")
	secure := slices.IndexFunc(c.Endpoints, func(e string) bool { return !strings.HasPrefix(e, "https:") }) < 0
	mixed := !secure && slices.ContainsFunc(c.Endpoints, func(e string) bool { return strings.HasPrefix(e, "https:") })
	s.together(mixed, s.name("endpoints")+" are some with https and some with http: they must be all of one kind. Change them", "endpoints")
	s.optional("allow_plain", boolValue(&c.AllowPlain), "false")
	if i := slices.IndexFunc(c.Endpoints, isPlain); i >= 0 && !mixed {
		s.together(!c.AllowPlain,
			fmt.Sprintf("%s has %s: what is revoked could be changed on the way, and a password would travel in the clear. "+
				"Begin them with https://, or set allow_plain: true if there is TLS in between", s.name("endpoints"), shown(c.Endpoints[i])), "endpoints", "allow_plain")
	}
	s.optional("prefix", value{rule: "empty, or a path such as /rescind that begins with / and does not end with it", text: true, set: func(text string) error {
		c.Prefix = text
		return ruleIf(!prefixForm.MatchString(text))
	}}, "")
	s.required("issuer", checkedValue(&c.Issuer, "the issuer of carbon.super (RESCIND_ISSUER), at most 255 bytes", func(s string) bool { return len(s) <= 255 }))
	s.optional("username", checkedValue(&c.Username, "1 to 255 bytes of printable ASCII", printableForm.MatchString), "")
	c.Password = s.secret("password", "the password of username", c.Username != "", nil)
	s.together(c.Username == "" && c.Password != "", s.name("password_file")+" or _env is set, and username is not: they belong together. Set both, or neither", "password_file", "password_env", "username")
	c.TLS = s.tlsFiles(secure, "endpoints that begin with https://", "endpoints")
	s.end()
	return c
}

// isPrefix reports whether whole segments of clean paths can be compared with p.
func isPrefix(p string) bool {
	path, ok := replica.CleanPath(p)
	return ok && path == p && !strings.HasSuffix(p, "/")
}

// readStaleness returns a member that needs introspection.
func (c *Config) readStaleness(s *section) (introspects string) {
	words, meanings := []string{"deny", "serve", "introspect"}, []replica.OnStale{replica.Deny, replica.Serve, replica.Introspect}
	read := func(s *section, to *replica.Staleness) {
		s.optional("max", secondsValue(&to.Max, time.Second, 24*time.Hour), short(to.Max))
		s.optional("then", choiceValue(&to.Then, words, meanings...), words[slices.Index(meanings, to.Then)])
		if to.Then == replica.Introspect && introspects == "" {
			introspects = s.name("then")
		}
		s.end()
	}
	if st := s.sub("staleness"); st != nil {
		read(st, &c.Staleness)
	}
	for _, rs := range s.subs("routes") {
		route := replica.Route{Staleness: c.Staleness}
		rs.required("path", checkedValue(&route.Path, "what paths begin with, whole segments as they are on the wire, such as /payments, without / at its end", isPrefix))
		rs.together(slices.ContainsFunc(c.Routes, func(r replica.Route) bool { return r.Path == route.Path }),
			fmt.Sprintf("%s is %s, which is another's too. Leave one", rs.name("path"), shown(route.Path)), "path")
		read(rs, &route.Staleness)
		c.Routes = append(c.Routes, route)
	}
	s.optional("empty", choiceValue(&c.Empty, words[:2], meanings[:2]...), "deny")
	return introspects
}

func readIntrospection(s *section) *Introspection {
	if s == nil {
		return nil
	}
	c := &Introspection{Timeout: 2 * time.Second, MaxConcurrent: 64}
	s.required("url", urlValue(&c.URL, "the https URL of an introspection endpoint (http for loopback), without user, query and fragment", func(u *url.URL) bool {
		return !isPlain(u.String()) && u.RawQuery == "" && !u.ForceQuery
	}))
	s.required("client_id", checkedValue(&c.ClientID, "1 to 255 bytes", func(s string) bool { return len(s) <= 255 }))
	c.ClientSecret = s.secret("client_secret", "the client's secret", true, nil)
	s.list("issuers", each(&c.Issuers, "the iss of an issuer: text of 1 to 255 bytes", func(s string) bool { return len(s) <= 255 }))
	s.optional("timeout", periodValue(&c.Timeout, 10*time.Millisecond, 10*time.Second), "2s")
	s.optional("max_concurrent", countValue(&c.MaxConcurrent, "questions", 1, 10_000), "64")
	c.TLS = s.authority("ca_file", strings.HasPrefix(c.URL, "https:"), "a url that begins with https://", "url")
	s.end()
	return c
}

// algorithms are those that package token knows.
var algorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519"}

func readIssuer(s *section, tenant string, others []Issuer) Issuer {
	c := Issuer{Tenant: tenant}
	s.required("iss", checkedValue(&c.Iss, "text of 1 to 255 bytes", func(s string) bool { return len(s) <= 255 }))
	s.together(slices.ContainsFunc(others, func(o Issuer) bool { return o.Iss == c.Iss }),
		fmt.Sprintf("%s is %s, which is another's too. Leave one", s.name("iss"), shown(c.Iss)), "iss")
	s.optional("tenant", checkedValue(&c.Tenant, domainRule, catalog.ValidDomain), c.Tenant)
	s.optional("jwks_uri", urlValue(&c.JWKSURI, "an https URL without user and fragment", func(*url.URL) bool { return true }), "")
	c.JWKSFile = s.file("jwks_file", "keys (RFC 7517)")
	s.together((c.JWKSURI == "") == (c.JWKSFile == ""),
		fmt.Sprintf("one of %s and jwks_file must be set, not both: the keys come from one place", s.name("jwks_uri")), "jwks_uri", "jwks_file")
	if c.JWKSFile != "" && !s.bad["jwks_file"] {
		b, err := os.ReadFile(c.JWKSFile)
		if err == nil {
			_, err = token.ParseKeySet(b)
		}
		s.together(err != nil, fmt.Sprintf("%s is %q, which cannot be used: %v. Name a file of public keys (RFC 7517)", s.name("jwks_file"), c.JWKSFile, reason(err)), "jwks_file")
	}
	s.list("algorithms", each(&c.Algorithms, "one of "+strings.Join(algorithms, ", "), func(a string) bool { return slices.Contains(algorithms, a) }))
	s.list("allow_typ", each(&c.AllowTyp, "a value of the header typ, such as JWT", func(s string) bool { return len(s) <= 255 }))
	seconds := 0
	s.required("max_token_lifetime", countValue(&seconds, "seconds", 1, 10*365*24*3600)) // as where key managers are registered
	c.MaxTokenLifetime = time.Duration(seconds) * time.Second
	s.end()
	return c
}

func readListener(s *section, def string) *Listener {
	if s == nil {
		return nil
	}
	c := &Listener{Listen: def}
	s.optional("listen", addressValue(&c.Listen), def)
	s.optional("allow_remote", boolValue(&c.AllowRemote), "false")
	s.together(!c.AllowRemote && !isLoopback(c.Listen),
		fmt.Sprintf("%s is %q, which others can reach: it is for the proxy beside us, has no TLS, and tells whoever asks what is in a token. "+
			"Listen on 127.0.0.1, or set allow_remote: true if only the proxy gets there", s.name("listen"), c.Listen), "listen", "allow_remote")
	s.end()
	return c
}

func readProxy(s *section, tenant string) *Proxy {
	if s == nil {
		return nil
	}
	c := &Proxy{
		Listen: "127.0.0.1:8000", UpstreamTimeout: 30 * time.Second, IdleTimeout: time.Minute,
		MaxInFlight: 5000, MaxConnections: 10_000,
	}
	s.optional("listen", addressValue(&c.Listen), c.Listen)
	c.TLS = s.pair()
	s.optional("behind_tls_proxy", boolValue(&c.BehindTLSProxy), "false")
	s.together(c.TLS.Cert == "" && !c.BehindTLSProxy && !isLoopback(c.Listen),
		fmt.Sprintf("%s is %q, which others can reach, and has no TLS: tokens would travel in the clear. "+
			"Set cert_file and key_file, or behind_tls_proxy: true if a proxy ends TLS before us", s.name("listen"), c.Listen), "listen", "cert_file", "key_file", "behind_tls_proxy")
	s.together(c.TLS.Cert != "" && c.BehindTLSProxy,
		s.name("behind_tls_proxy")+" is true, and cert_file is set: anybody could then say where a request comes from. Leave one out", "behind_tls_proxy", "cert_file", "key_file")

	bare := func(u *url.URL) bool { return u.Path == "" && u.RawQuery == "" && !u.ForceQuery }
	var urls []string
	for _, us := range s.subs("upstreams") {
		u := Upstream{Tenant: tenant}
		us.optional("tenant", checkedValue(&u.Tenant, domainRule, catalog.ValidDomain), tenant)
		us.optional("context", checkedValue(&u.Context, "the context of an API, with its version, such as /pizzashack/1.0.0", isPrefix), "")
		us.optional("api", checkedValue(&u.API, "name:version of an API, such as PizzaShackAPI:1.0.0", func(s string) bool {
			i := strings.LastIndexByte(s, ':')
			return i > 0 && i < len(s)-1
		}), "")
		us.together((u.Context == "") == (u.API == ""),
			fmt.Sprintf("one of %s and api must be set, not both: it says which API this is for", us.name("context")), "context", "api")
		us.required("url", urlValue(&u.URL, hostRule, bare))
		us.together(slices.ContainsFunc(c.Upstreams, func(o Upstream) bool { return o.Tenant == u.Tenant && o.Context == u.Context && o.API == u.API }),
			us.path+" is for the same API as one before. Leave one", "context", "api", "tenant")
		us.end()
		c.Upstreams, urls = append(c.Upstreams, u), append(urls, u.URL)
	}
	s.optional("default", urlValue(&c.Default, hostRule, bare), "")
	s.together(len(c.Upstreams) == 0 && c.Default == "" && !s.given("upstreams"),
		s.name("upstreams")+" is not set, nor is default: requests could go nowhere. Set one of them", "upstreams", "default")
	s.together(s.given("upstreams") && len(s.values["upstreams"].Content) == 0 && c.Default == "",
		s.name("upstreams")+" is empty, and default is not set: requests could go nowhere. Set one of them", "upstreams", "default")
	secure := slices.ContainsFunc(append(urls, c.Default), func(u string) bool { return strings.HasPrefix(u, "https:") })
	c.UpstreamTLS = s.authority("upstream_ca_file", secure, "an upstream whose url begins with https://", "upstreams")
	s.optional("forward_authorization", boolValue(&c.ForwardAuthorization), "false")
	s.optional("upstream_timeout", periodValue(&c.UpstreamTimeout, 100*time.Millisecond, time.Hour), "30s")
	s.optional("idle_timeout", periodValue(&c.IdleTimeout, time.Second, time.Hour), "1m")
	s.optional("max_in_flight", countValue(&c.MaxInFlight, "requests", 1, 1_000_000), "5000")
	s.optional("max_connections", countValue(&c.MaxConnections, "connections", 1, 1_000_000), "10000")
	s.end()
	return c
}

// authority reads the file of whom to trust instead of the system's authorities.
func (s *section) authority(member string, isTLS bool, want string, of string) tlsfile.Files {
	files := tlsfile.Files{CA: s.file(member, "certificates (PEM)")}
	if files.CA == "" || s.bad[member] {
		return files
	}
	s.together(!isTLS, fmt.Sprintf("%s is set, and the connection has no TLS: it needs %s. Change one or the other", s.name(member), want), member, of)
	err := files.Check()
	s.together(err != nil, fmt.Sprintf("%s is %q, which cannot be used: %v. Name a file of PEM certificates", s.name(member), files.CA, reason(err)), member)
	return files
}

// tlsFiles reads the files of a connection that may show a certificate of ours.
func (s *section) tlsFiles(isTLS bool, want, of string) tlsfile.Files {
	files := s.pair()
	s.together(files.Cert != "" && !isTLS, fmt.Sprintf("%s is set, and the connection has no TLS: it needs %s. Change one or the other", s.name("cert_file"), want), "cert_file", of)
	files.CA = s.authority("ca_file", isTLS, want, of).CA
	return files
}

// pair reads the files of a certificate of ours and its key.
func (s *section) pair() tlsfile.Files {
	files := tlsfile.Files{Cert: s.file("cert_file", "certificates (PEM)"), Key: s.file("key_file", "a private key (PEM)")}
	s.together((files.Cert == "") != (files.Key == ""), s.name("cert_file")+" and key_file belong together: only one is set. Set both, or neither", "cert_file", "key_file")
	if files.Cert != "" && files.Key != "" {
		err := files.Check()
		s.together(err != nil, fmt.Sprintf("%s is %q and key_file is %q, which cannot be used: %v. Name a certificate and its key, both PEM", s.name("cert_file"), files.Cert, files.Key, err), "cert_file", "key_file")
	}
	return files
}
