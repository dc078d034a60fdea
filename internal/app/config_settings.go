package app

import (
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/tlsfile"
	"github.com/rescindhq/rescind/internal/wso2"
)

const (
	envPrefix  = "RESCIND_"
	fileSuffix = "_FILE"
)

// setting is one row of the table that flags, --help and the README are made of.
type setting struct {
	name     string // RESCIND_<name>, and as a flag in lower case with dashes
	use      Use    // the commands that have it
	required Use    // the commands that cannot do without
	def      string
	value
	help string
	fix  string // what to do about a mistake, where the rule does not say it
}

// value is a kind of setting, bound to the field of Config that it fills.
type value struct {
	rule    string             // completes "it must be …"
	set     func(string) error // errRule if the rule says all there is to say
	secret  bool               // environment or file only; a command line is for all to read
	boolean bool
}

var errRule = errors.New("breaks its rule")

func (s *setting) env() string { return envPrefix + s.name }

func (s *setting) flag() string {
	name := strings.ReplaceAll(strings.ToLower(s.name), "_", "-")
	if s.secret {
		name += "-file"
	}
	return name
}

// named is how the environment gives it.
func (s *setting) named() string {
	if s.secret {
		return s.env() + " (or " + s.env() + fileSuffix + ")"
	}
	return s.env()
}

func (s *setting) remedy() string {
	switch {
	case s.fix != "":
		return s.fix
	case s.def != "":
		return "Change it, or leave it out for " + s.def
	case s.required == 0:
		return "Change it, or leave it out"
	}
	return "Set it"
}

func (s *setting) ruleAndDefault(use Use) string {
	text := "It is " + s.rule + "."
	if s.def != "" {
		text += " Default " + s.def + "."
	} else if s.required&use != 0 {
		text += " Required."
	}
	return text
}

const (
	forAll    = ForServe | ForMigrate | ForEpoch | ForApply | ForRevoke | forLooks
	forState  = ForServe | ForEpoch
	forLog    = forState | ForApply | ForRevoke
	forTokens = ForServe | ForRevoke
	forLooks  = ForFleet | ForVerify | ForExplain
)

// settings is the table, filling c. A name never changes, and a new setting's
// default keeps what was before it: new code runs with old configuration.
func settings(c *Config) []setting {
	return slices.Concat([]setting{
		{name: "ISSUER", use: forLog | forLooks, required: forLog | forLooks, value: issuerValue(&c.Issuer),
			help: "The iss of our tokens and the base of all published URLs. Tokens and clients hold on to it: choose it once.",
			fix:  "Give the URL under which clients reach the service, for example https://km.example.com"},
		{name: "MASTER_KEY", use: forTokens | ForApply, required: forTokens | ForApply, value: masterKeyValue(&c.MasterKey),
			help: "Encrypts the signing keys in the database and keys the HMACs of client secrets. Without it both are lost: keep a copy.",
			fix:  "Make one with: openssl rand -base64 32"},
		{name: "DATABASE_URL", use: forAll, required: forLog | forLooks, value: secretValue(&c.Database.URL, postgresURL, checkPostgresURL),
			help: "Postgres, as the service's role (a member of rescind_service). Not through a transaction pooler: leaders hold session locks.",
			fix:  "Give the URL of the database"},
		{name: "MIGRATE_DATABASE_URL", use: ForServe | ForMigrate, value: secretValue(&c.Database.MigrateURL, postgresURL, checkPostgresURL),
			help: "Postgres, as the role that owns the schema. Default: as RESCIND_DATABASE_URL. Needed by migrate and serve --migrate only."},
	}, tlsSettings("DATABASE", "Postgres", forAll, &c.Database.TLS), []setting{
		{name: "DATABASE_MAX_CONNS", use: ForServe, def: "16", value: countValue(&c.Database.MaxConns, "connections", 4, 1000),
			help: "Most connections to Postgres of one process. Commits share a few; each sink that this process leads holds one more for its lock."},
		{name: "SINKS", use: forLog, def: "amqp,amqp-wso2,etcd", value: sinksValue(&c.Sinks),
			help: "What the log is fed to. A sink that is left out keeps its place in the log, and the log keeps what it has not had."},
		{name: "AMQP_URL", use: ForServe, value: secretValue(&c.AMQP.URL, "a URL such as amqps://user:password@host:5671/vhost", checkAMQPURL),
			help: "RabbitMQ, with user, password and virtual host. Needed by the sinks whose names begin with amqp."},
	}, tlsSettings("AMQP", "RabbitMQ", ForServe, &c.AMQP.TLS), []setting{
		{name: "AMQP_EXCHANGE", use: ForServe, def: "rescind.events", value: exchangeValue(&c.AMQP.Exchange, false),
			help: "The topic exchange of our own events. It is declared, durable, if it is not there."},
		{name: "AMQP_WSO2_EXCHANGE", use: ForServe, def: "amq.topic", value: exchangeValue(&c.AMQP.WSO2Exchange, true),
			help: "The topic exchange of the events in WSO2's words."},
		{name: "AMQP_WSO2_ROUTING_KEY", use: ForServe, def: "tokenRevocation", value: textValue(&c.AMQP.WSO2RoutingKey, "1 to 255 bytes of printable ASCII", regexp.MustCompile(`^[!-~]{1,255}$`)),
			help: "The routing key of revocations in WSO2's words."},
		{name: "AMQP_WSO2_MIN_SPACING", use: ForServe, def: "0s", value: optionalPeriodValue(&c.AMQP.WSO2MinSpacing, time.Millisecond, time.Second),
			help: "Publish each revocation in WSO2's words a second time, at least this far from the one before: Choreo Connect loses some that come at once. 0s: only once."},
		{name: "AMQP_WSO2_SWEEP", use: ForServe, def: "0s", value: optionalPeriodValue(&c.AMQP.WSO2Sweep, 10*time.Second, 24*time.Hour),
			help: "Publish all live revocations in WSO2's words again and again, once in this time: for gateways that were cut off. 0s: never."},
		{name: "AMQP_WSO2_LEGACY_ROUTING_KEY", use: ForServe, def: "jwtRevocation", value: textValue(&c.AMQP.WSO2LegacyRoutingKey, "1 to 255 bytes of printable ASCII", regexp.MustCompile(`^[!-~]{1,255}$`)),
			help: "The routing key of revocations as MapMessages, of the sink amqp-wso2-legacy. No gateway that reads text may listen there."},
		{name: "AMQP_WSO2_LEGACY_NOTIFICATION_KEY", use: ForServe, value: textValue(&c.AMQP.WSO2LegacyNotificationKey, "empty, or 1 to 255 bytes of printable ASCII", regexp.MustCompile(`^[!-~]{0,255}$`)),
			help: "The routing key of notifications as MapMessages. Empty: there are none."},
		{name: "AMQP_WSO2_LEGACY_KEY_MANAGER_KEY", use: ForServe, value: textValue(&c.AMQP.WSO2LegacyKeyManagerKey, "empty, or 1 to 255 bytes of printable ASCII", regexp.MustCompile(`^[!-~]{0,255}$`)),
			help: "The routing key of key manager events as MapMessages. Empty: there are none."},
		{name: "AMQP_WINDOW", use: ForServe, def: "1024", value: countValue(&c.AMQP.Window, "messages", 1, 65536),
			help: "Most messages that wait for RabbitMQ's confirms. More means more throughput, and more repeats after a lost connection."},
		{name: "ETCD_ENDPOINTS", use: forLog | ForVerify, value: endpointsValue(&c.Etcd.Endpoints),
			help: "The members of the etcd cluster. Needed by the sink etcd."},
		{name: "ETCD_USERNAME", use: forLog | ForVerify, value: textValue(&c.Etcd.Username, "1 to 255 bytes of printable ASCII", regexp.MustCompile(`^[!-~]{1,255}$`)),
			help: "The user at etcd, where it asks for one."},
		{name: "ETCD_PASSWORD", use: forLog | ForVerify, value: secretValue(&c.Etcd.Password, "a password", func(string) error { return nil }),
			help: "The password of RESCIND_ETCD_USERNAME."},
	}, tlsSettings("ETCD", "etcd", forLog|ForVerify, &c.Etcd.TLS), []setting{
		{name: "ETCD_PREFIX", use: forLog | ForVerify, value: textValue(&c.Etcd.Prefix, "empty, or a path such as /rescind that begins with / and does not end with it", regexp.MustCompile(`^((/[A-Za-z0-9._~-]+)+)?$`)),
			help: "What every key of the directory begins with."},
		{name: "ETCD_RECONCILE_INTERVAL", use: ForServe, def: "5m", value: periodValue(&c.Etcd.ReconcileInterval, time.Second, 24*time.Hour),
			help: "How often the directory is compared with Postgres and repaired. Each time reads every live revocation."},
		{name: "LISTEN", use: ForServe, def: "127.0.0.1:8080", value: addressValue(&c.HTTP.Listen),
			help: "Where clients connect. Anything but loopback needs RESCIND_TLS_CERT_FILE or RESCIND_BEHIND_TLS_PROXY."},
		{name: "TLS_CERT_FILE", use: ForServe, value: fileValue(&c.HTTP.CertFile),
			help: "The certificate chain of RESCIND_LISTEN, PEM. Read again when it changes."},
		{name: "TLS_KEY_FILE", use: ForServe, value: fileValue(&c.HTTP.KeyFile),
			help: "The private key of RESCIND_TLS_CERT_FILE, PEM."},
		{name: "BEHIND_TLS_PROXY", use: ForServe, def: "0", value: boolValue(&c.HTTP.BehindTLSProxy),
			help: "A proxy ends TLS before us, so plain HTTP is right on any address. Nobody else may reach RESCIND_LISTEN."},
		{name: "TRUSTED_PROXIES", use: ForServe, value: networksValue(&c.HTTP.TrustedProxies),
			help: "The proxies whose X-Forwarded-For names the caller. From anybody else the header is ignored."},
		{name: "MAX_IN_FLIGHT", use: ForServe, def: "5000", value: countValue(&c.HTTP.MaxInFlight, "requests", 1, 100_000),
			help: "Most requests at work at once. Past it the answer is 503 with Retry-After."},
		{name: "MAX_CONNECTIONS", use: ForServe, def: "10000", value: countValue(&c.HTTP.MaxConnections, "connections", 1, 1_000_000),
			help: "Most open connections to RESCIND_LISTEN. Past it the one that has been idle for longest is closed. 40 % may be streams of events, 20 % gateways' reports, 15 % snapshots, 15 % WSO2's gateways. Keep the limit of open files above it."},
		{name: "OPS_LISTEN", use: ForServe, def: "127.0.0.1:9090", value: addressValue(&c.OpsListen),
			help: "Where operators' tools reach /healthz, /readyz and /metrics, unauthenticated. Not for clients."},
		{name: "PPROF", use: ForServe, def: "0", value: boolValue(&c.Obs.Pprof),
			help: "Serve /debug/pprof/ on RESCIND_OPS_LISTEN. Profiles show memory, so secrets too."},
		{name: "TRUSTED_ISSUERS_FILE", use: forTokens | ForExplain, value: issuersFileValue(&c.TrustedIssuers),
			help: "The other issuers whose tokens may be revoked here.",
			fix:  "Mend the file"},
		{name: "KEY_SET_NETWORKS", use: forTokens | ForExplain, value: networksValue(&c.KeySetNetworks),
			help: "Private networks that the jwks_uri of a key manager may lead to. Without it only public addresses are fetched from."},
		{name: "WEBHOOKS_FILE", use: ForServe, value: webhooksFileValue(&c.Webhooks),
			help: "Where events are posted to: each is a sink of its own, webhook-<name>.",
			fix:  "Mend the file"},
		{name: "TOKEN_LIFETIME", use: ForServe, def: "900s", value: secondsValue(&c.TokenLifetime, time.Second, time.Hour),
			help: "How long our tokens live, unless the client has its own. Short lives bound the damage while a gateway is cut off."},
		{name: "SIGNING_ALGORITHM", use: ForServe, def: "RS256", value: choiceValue(&c.SigningAlgorithm, "RS256", "ES256"),
			help: "What new signing keys of ours are for. Every gateway must know it."},
		{name: "REMEMBER_TOKENS", use: ForServe, def: "0", value: boolValue(&c.RememberTokens),
			help: "Keep the jti of each token that we issue for as long as it lives, so that a revocation of a client, subject or tenant is also told token by token, to gateways that know no other (Choreo Connect, Microgateway), and its dry run can count. The same for all processes. Costs a commit for each token, shared by those that come at once."},
		{name: "LEGACY_ASSERTION_AUDIENCE", use: ForServe, def: "0", value: boolValue(&c.LegacyAssertionAudience),
			help: "Accept assertions of clients (private_key_jwt) that name the URL of the token endpoint in place of the issuer."},
		{name: "LEEWAY", use: ForServe | ForExplain, def: "30s", value: secondsValue(&c.Leeway, 0, revocation.MaxLeeway),
			help: "By how much an issuer's clock may differ from ours where introspection says whether a token is active."},
		{name: "CLOCK_SKEW", use: forTokens | ForApply, def: "2s", value: secondsValue(&c.ClockSkew, 0, time.Minute),
			help: "By how much an issuer's clock may be ahead of the database's. Revoking a client, subject or tenant reaches that much ahead."},
		{name: "MAX_BATCH", use: ForServe, def: "500", value: countValue(&c.MaxBatch, "revocations", 1, 5000),
			help: "Most revocations in one commit. More means fewer commits under load, and one slow commit delays more callers."},
		{name: "QUEUE_SIZE", use: ForServe, def: "10000", value: countValue(&c.QueueSize, "revocations", 1, 1_000_000),
			help: "Most revocations that wait for a commit. Past it the answer is 503 with Retry-After."},
		{name: "COMMIT_TIMEOUT", use: ForServe, def: "5s", value: periodValue(&c.CommitTimeout, 100*time.Millisecond, time.Minute),
			help: "How long one commit may take, also while stopping. Past it its callers get 503."},
		{name: "LOG_RETENTION", use: ForServe, def: "72h", value: periodValue(&c.LogRetention, time.Hour, 10*365*24*time.Hour),
			help: "How long the log keeps events. A reader that was away for longer starts again from the whole state. What a sink still needs stays."},
		{name: "GATEWAY_LEASE", use: ForServe | ForRevoke | forLooks, def: "10s", value: periodValue(&c.GatewayLease, 10*time.Second, 10*time.Minute),
			help: "How long a gateway may be silent before it counts as lost: no barrier waits for it, and it confirms nothing."},
		{name: "CANARY_INTERVAL", use: ForServe, def: "0s", value: optionalPeriodValue(&c.Canary.Every, 10*time.Second, 24*time.Hour),
			help: "How often a token is issued, accepted by each gateway that has a canary URL, revoked, and tried until it is refused. Each round adds two revocations. 0s: never."},
		{name: "CANARY_LIMIT", use: ForServe, def: "10s", value: periodValue(&c.Canary.Limit, 100*time.Millisecond, time.Minute),
			help: "How long a gateway may take to refuse the canary's token before /readyz warns and the metrics give the alarm."},
		{name: "CANARY_AUDIENCE", use: ForServe, value: textValue(&c.Canary.Audience, "1 to 255 bytes of printable ASCII", regexp.MustCompile(`^[!-~]{1,255}$`)),
			help: "The aud of the canary's tokens: what the gateways take them for. Default: RESCIND_ISSUER."},
		{name: "LOG_LEVEL", use: forAll, def: "info", value: levelValue(&c.Obs.Level),
			help: "The least severe lines that are logged."},
		{name: "LOG_FORMAT", use: forAll, def: "json", value: formatValue(&c.Obs),
			help: "JSON for machines, text for people. Lines go to standard error."},
		{name: "MIGRATE", use: ForServe, def: "0", value: boolValue(&c.Migrate),
			help: "Bring the schema up to date before starting."},
		{name: "SHUTDOWN_GRACE", use: ForServe, def: "20s", value: periodValue(&c.ShutdownGrace, time.Second, 10*time.Minute),
			help: "How long accepted requests may take once the process is told to stop. Whoever supervises the process must wait longer."},
	})
}

func tlsSettings(prefix, server string, use Use, files *tlsfile.Files) []setting {
	return []setting{
		{name: prefix + "_CA_FILE", use: use, value: fileValue(&files.CA),
			help: "The authorities, PEM, that may vouch for " + server + ", rather than the system's. Makes TLS with full verification a must."},
		{name: prefix + "_CERT_FILE", use: use, value: fileValue(&files.Cert),
			help: "Our client certificate for " + server + ", PEM."},
		{name: prefix + "_KEY_FILE", use: use, value: fileValue(&files.Key),
			help: "The private key of RESCIND_" + prefix + "_CERT_FILE, PEM."},
	}
}

// checkTogether finds what is wrong only in combination.
func (p *configParser) checkTogether(c *Config) {
	if c.Database.MigrateURL == "" {
		c.Database.MigrateURL = c.Database.URL
	}
	p.together(p.use == ForMigrate && c.Database.MigrateURL == "",
		"RESCIND_MIGRATE_DATABASE_URL is not set: it must be "+postgresURL+". Set it, or RESCIND_DATABASE_URL",
		"DATABASE_URL", "MIGRATE_DATABASE_URL")
	p.together(c.AMQP.URL == "" && slices.ContainsFunc(c.Sinks, func(name string) bool { return strings.HasPrefix(name, sinkAMQP) }),
		"RESCIND_AMQP_URL (or RESCIND_AMQP_URL_FILE) is not set: the sinks whose names begin with amqp need it. Set it, or leave them out of RESCIND_SINKS",
		"AMQP_URL", "SINKS")
	if slices.Contains(c.Sinks, sinkAMQPLegacy) {
		keys := []string{wso2.TopicNotification, wso2.TopicKeyManagerGo, wso2.TopicKeyManagerJava, c.AMQP.WSO2RoutingKey, c.AMQP.WSO2LegacyRoutingKey}
		for _, key := range []string{c.AMQP.WSO2LegacyNotificationKey, c.AMQP.WSO2LegacyKeyManagerKey} {
			if key != "" {
				keys = append(keys, key)
			}
		}
		slices.Sort(keys)
		p.together(len(slices.Compact(slices.Clone(keys))) != len(keys),
			fmt.Sprintf("two of the routing keys %s are the same: a gateway that reads text ends at a MapMessage. Choose others for the sink amqp-wso2-legacy", strings.Join(keys, ", ")),
			"AMQP_WSO2_ROUTING_KEY", "AMQP_WSO2_LEGACY_ROUTING_KEY", "AMQP_WSO2_LEGACY_NOTIFICATION_KEY", "AMQP_WSO2_LEGACY_KEY_MANAGER_KEY")
	}
	// The log itself tells whoever only changes it whether etcd is a sink.
	p.together(p.use&(ForApply|ForRevoke) == 0 && len(c.Etcd.Endpoints) == 0 && slices.Contains(c.Sinks, "etcd"),
		"RESCIND_ETCD_ENDPOINTS is not set: the sink etcd needs it. Set it, or leave etcd out of RESCIND_SINKS",
		"ETCD_ENDPOINTS", "SINKS")
	p.together(c.QueueSize < c.MaxBatch,
		fmt.Sprintf("RESCIND_QUEUE_SIZE is %d and RESCIND_MAX_BATCH is %d: a batch must fit into the queue. Raise one or lower the other", c.QueueSize, c.MaxBatch),
		"QUEUE_SIZE", "MAX_BATCH")
	p.together((c.Etcd.Username == "") != (c.Etcd.Password == ""),
		"RESCIND_ETCD_USERNAME and RESCIND_ETCD_PASSWORD belong together: only one is set. Set both, or neither",
		"ETCD_USERNAME", "ETCD_PASSWORD")

	p.tlsFiles("DATABASE", c.Database.TLS, !strings.Contains(string(c.Database.URL), "sslmode=disable"), "a RESCIND_DATABASE_URL without sslmode=disable", "DATABASE_URL")
	p.tlsFiles("AMQP", c.AMQP.TLS, strings.HasPrefix(string(c.AMQP.URL), "amqps:"), "a RESCIND_AMQP_URL that begins with amqps://", "AMQP_URL")
	p.tlsFiles("ETCD", c.Etcd.TLS, len(c.Etcd.Endpoints) > 0 && strings.HasPrefix(c.Etcd.Endpoints[0], "https:"), "RESCIND_ETCD_ENDPOINTS that begin with https://", "ETCD_ENDPOINTS")
	p.pair("TLS", c.HTTP.CertFile, c.HTTP.KeyFile)

	p.together(c.HTTP.CertFile == "" && !c.HTTP.BehindTLSProxy && !isLoopback(c.HTTP.Listen),
		fmt.Sprintf("RESCIND_LISTEN is %q, which others can reach, and has no TLS: tokens and secrets would travel in the clear. "+
			"Set RESCIND_TLS_CERT_FILE and RESCIND_TLS_KEY_FILE, or RESCIND_BEHIND_TLS_PROXY=1 if a proxy ends TLS before us", c.HTTP.Listen),
		"LISTEN", "TLS_CERT_FILE", "BEHIND_TLS_PROXY")
	p.together(strings.HasPrefix(c.Issuer, "http:") && !c.HTTP.BehindTLSProxy && !isLoopback(hostOf(c.Issuer)),
		fmt.Sprintf("RESCIND_ISSUER is %q: plain http is for loopback only. Begin it with https://, or set RESCIND_BEHIND_TLS_PROXY=1", c.Issuer),
		"ISSUER", "BEHIND_TLS_PROXY")
	for _, ti := range c.TrustedIssuers {
		p.together(ti.Iss == c.Issuer,
			fmt.Sprintf("RESCIND_TRUSTED_ISSUERS_FILE names %q, which is RESCIND_ISSUER: we know our own keys. Take it out of the file", ti.Iss),
			"ISSUER", "TRUSTED_ISSUERS_FILE")
	}
}

func (p *configParser) tlsFiles(prefix string, files tlsfile.Files, isTLS bool, want, url string) {
	p.together(files != tlsfile.Files{} && !isTLS,
		fmt.Sprintf("RESCIND_%s_CA_FILE, _CERT_FILE or _KEY_FILE is set, and the connection has no TLS: they need %s. Change one or the other", prefix, want),
		url, prefix+"_CA_FILE")
	p.pair(prefix, files.Cert, files.Key)
	if files.CA != "" {
		err := tlsfile.Files{CA: files.CA}.Check()
		p.together(err != nil, fmt.Sprintf("RESCIND_%s_CA_FILE is %q: %v. Name a file of PEM certificates", prefix, files.CA, err), prefix+"_CA_FILE")
	}
}

func (p *configParser) pair(prefix, cert, key string) {
	certName, keyName := prefix+"_CERT_FILE", prefix+"_KEY_FILE"
	p.together((cert == "") != (key == ""),
		fmt.Sprintf("RESCIND_%s and RESCIND_%s belong together: only one is set. Set both, or neither", certName, keyName), certName, keyName)
	if cert != "" && key != "" {
		err := tlsfile.Files{Cert: cert, Key: key}.Check()
		p.together(err != nil, fmt.Sprintf("RESCIND_%s is %q and RESCIND_%s is %q: %v. Name a certificate and its key, both PEM", certName, cert, keyName, key, err), certName, keyName)
	}
}

func textValue(p *string, rule string, re *regexp.Regexp) value {
	return value{rule: rule, set: func(s string) error {
		*p = s
		return ruleIf(!re.MatchString(s))
	}}
}

func ruleIf(broken bool) error {
	if broken {
		return errRule
	}
	return nil
}

// fileValue only takes the name: what must be in the file is checked by whoever reads it.
func fileValue(p *string) value {
	return value{rule: "the name of a file", set: func(s string) error {
		*p = s
		return ruleIf(s == "")
	}}
}

func countValue(p *int, what string, low, high int) value {
	return value{rule: fmt.Sprintf("a number of %s, %d to %d", what, low, high), set: func(s string) error {
		n, err := strconv.Atoi(s)
		*p = n
		return ruleIf(err != nil || n < low || n > high)
	}}
}

func periodValue(p *time.Duration, low, high time.Duration) value {
	return value{rule: fmt.Sprintf("a duration with its unit, %s to %s", shortDuration(low), shortDuration(high)), set: func(s string) error {
		d, err := time.ParseDuration(s)
		*p = d
		return ruleIf(err != nil || d < low || d > high)
	}}
}

// secondsValue is a period that ends up in whole seconds on the wire or in the database.
func secondsValue(p *time.Duration, low, high time.Duration) value {
	v := periodValue(p, low, high)
	inRange := v.set
	v.rule += ", in whole seconds"
	v.set = func(s string) error {
		return errors.Join(inRange(s), ruleIf(*p%time.Second != 0))
	}
	return v
}

// optionalPeriodValue is a period, or none.
func optionalPeriodValue(p *time.Duration, low, high time.Duration) value {
	v := periodValue(p, low, high)
	inRange := v.set
	v.rule += ", or 0s"
	v.set = func(s string) error {
		if d, err := time.ParseDuration(s); err == nil && d == 0 {
			*p = 0
			return nil
		}
		return inRange(s)
	}
	return v
}

// shortDuration is d without the "0s" that String adds to whole minutes and hours.
func shortDuration(d time.Duration) string {
	s := d.String()
	if d >= time.Minute {
		s = strings.TrimSuffix(s, "0s")
	}
	if d >= time.Hour {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func boolValue(p *bool) value {
	return value{boolean: true, rule: "0 or 1", set: func(s string) error {
		*p = s == "1" || s == "true"
		return ruleIf(!*p && s != "0" && s != "false")
	}}
}

func choiceValue(p *string, words ...string) value {
	return value{rule: strings.Join(words, " or "), set: func(s string) error {
		*p = s
		return ruleIf(!slices.Contains(words, s))
	}}
}

func secretValue(p *Secret, rule string, check func(string) error) value {
	return value{secret: true, rule: rule, set: func(s string) error {
		*p = Secret(s)
		return check(s)
	}}
}

func masterKeyValue(p *Secret) value {
	return value{secret: true, rule: "32 random bytes in base64", set: func(s string) error {
		b, err := base64.StdEncoding.Strict().DecodeString(s)
		*p = Secret(s)
		return ruleIf(err != nil || len(b) != 32)
	}}
}

const postgresURL = "a URL such as postgres://user:password@host:5432/database"

// errNoURL does not wrap what the parser says: its words may quote a part of a
// password that was not escaped. That is also the likeliest mistake.
var errNoURL = errors.New("percent-encode what is special in user and password")

func checkPostgresURL(s string) error {
	if _, err := url.Parse(s); err != nil {
		return errNoURL
	}
	if !strings.HasPrefix(s, "postgres://") && !strings.HasPrefix(s, "postgresql://") {
		return errRule
	}
	if _, err := pgx.ParseConfig(s); err != nil {
		return errors.New("one of its parameters, or a file that it names, cannot be used")
	}
	return nil
}

func checkAMQPURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return errNoURL
	}
	return ruleIf(u.Scheme != "amqp" && u.Scheme != "amqps" || u.Hostname() == "" || u.Fragment != "" ||
		strings.Count(u.EscapedPath(), "/") > 1)
}

var issuerPath = regexp.MustCompile(`^(/[A-Za-z0-9._~-]+)*$`)

func issuerValue(p *string) value {
	return value{rule: "an https URL of at most 255 bytes, without trailing slash, query, fragment or user", set: func(s string) error {
		*p = s
		u, err := url.Parse(s)
		return ruleIf(err != nil || len(s) > 255 || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.User != nil ||
			strings.HasSuffix(s, "/") || strings.ContainsAny(s, "?#") || u.String() != s || !issuerPath.MatchString(u.EscapedPath()) ||
			u.Path != "" && path.Clean(u.Path) != u.Path)
	}}
}

func endpointsValue(p *[]string) value {
	return value{rule: "a comma-separated list of URLs such as https://etcd-1:2379, all https or all http", set: func(s string) error {
		*p = splitList(s)
		var schemes []string
		for _, e := range *p {
			u, err := url.Parse(e)
			if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil ||
				u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
				return errRule
			}
			schemes = append(schemes, u.Scheme)
		}
		return ruleIf(len(slices.Compact(schemes)) != 1)
	}}
}

// splitList splits at commas; spaces around them do not count.
func splitList(s string) []string {
	list := strings.Split(s, ",")
	for i := range list {
		list[i] = strings.TrimSpace(list[i])
	}
	return list
}

var sinkNames = []string{sinkAMQP, sinkAMQPWSO2, sinkAMQPLegacy, sinkEtcd}

func sinksValue(p *[]string) value {
	return value{rule: "a comma-separated list of " + strings.Join(sinkNames, ", ") + ", or none", set: func(s string) error {
		*p = nil
		if s == "" || s == "none" {
			return nil
		}
		for _, name := range splitList(s) {
			if !slices.Contains(sinkNames, name) || slices.Contains(*p, name) {
				return errRule
			}
			*p = append(*p, name)
		}
		return nil
	}}
}

func exchangeValue(p *string, reserved bool) value {
	rule := "1 to 127 of A-Z a-z 0-9 . _ : -"
	if !reserved {
		rule += ", not beginning with amq. (the broker's own)"
	}
	v := textValue(p, rule, regexp.MustCompile(`^[A-Za-z0-9._:-]{1,127}$`))
	matches := v.set
	v.set = func(s string) error {
		return errors.Join(matches(s), ruleIf(!reserved && strings.HasPrefix(s, "amq.")))
	}
	return v
}

func addressValue(p *string) value {
	return value{rule: "host:port, with port 0 for any that is free", set: func(s string) error {
		*p = s
		_, port, err := net.SplitHostPort(s)
		_, notPort := strconv.ParseUint(port, 10, 16)
		return ruleIf(err != nil || notPort != nil)
	}}
}

// isLoopback takes a host with or without a port. A name other than localhost
// may resolve to anything.
func isLoopback(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.Unmap().IsLoopback()
}

func hostOf(rawURL string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

func networksValue(p *[]netip.Prefix) value {
	return value{rule: "a comma-separated list of addresses or networks such as 10.1.0.0/16, none of them everybody", set: func(s string) error {
		*p = nil
		for _, item := range splitList(s) {
			network, err := netip.ParsePrefix(item)
			if addr, notAddr := netip.ParseAddr(item); notAddr == nil {
				network, err = netip.PrefixFrom(addr, addr.BitLen()), nil
			}
			if err != nil || network.Bits() == 0 {
				return errRule
			}
			*p = append(*p, network.Masked())
		}
		return nil
	}}
}

func levelValue(p *slog.Level) value {
	return value{rule: "debug, info, warn or error", set: func(s string) error {
		if !slices.Contains([]string{"debug", "info", "warn", "error"}, s) {
			return errRule
		}
		return p.UnmarshalText([]byte(s))
	}}
}

func formatValue(p *obs.Config) value {
	return value{rule: "json or text", set: func(s string) error {
		p.Text = s == "text"
		return ruleIf(!p.Text && s != "json")
	}}
}
