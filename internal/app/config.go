package app

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/tlsfile"
)

// Config is every setting of the process. [ParseConfig] fills it from flags and
// the environment; README.md has the table of names, defaults and rules.
type Config struct {
	Database Database
	AMQP     AMQP
	Etcd     Etcd
	// Sinks are what this process feeds, beside Webhooks: "amqp", "amqp-wso2",
	// "amqp-wso2-legacy", "etcd". May be empty.
	Sinks    []string
	Webhooks []Webhook
	// MasterKey is 32 bytes in base64: it encrypts signing keys and keys the HMACs of client secrets.
	MasterKey Secret
	// Issuer is the iss of carbon.super's tokens, and the base of every published URL.
	Issuer         string
	TrustedIssuers []TrustedIssuer
	// KeySetNetworks are private ones that a key manager's keys may come from.
	KeySetNetworks []netip.Prefix
	HTTP           HTTP
	OpsListen      string
	Obs            obs.Config
	TokenLifetime  time.Duration
	// SigningAlgorithm is RS256 or ES256.
	SigningAlgorithm string
	// RememberTokens keeps the jti of every token that we issue, while it lives.
	RememberTokens bool
	// LegacyAssertionAudience lets clients name the token endpoint in their assertions.
	LegacyAssertionAudience bool
	// Leeway is by how much other clocks may differ where we say whether a token is active.
	Leeway        time.Duration
	ClockSkew     time.Duration
	MaxBatch      int
	QueueSize     int
	CommitTimeout time.Duration
	LogRetention  time.Duration
	// GatewayLease is how long a gateway may be silent before it is lost.
	GatewayLease time.Duration
	Canary       Canary
	// Migrate brings the schema up to date before the service starts.
	Migrate       bool
	ShutdownGrace time.Duration
	// Warnings name what was given and has no effect, such as a misspelt setting.
	Warnings []string
}

// Canary is how gateways are tried.
type Canary struct {
	// Every is the time from one round to the next, 0 for none.
	Every time.Duration
	// Limit is how long a gateway may take to refuse what was revoked.
	Limit time.Duration
	// Audience is what the tokens are for.
	Audience string
}

// Database is how to reach Postgres.
type Database struct {
	// URL logs in as the service, MigrateURL as the owner of the schema.
	URL, MigrateURL Secret
	TLS             tlsfile.Files
	MaxConns        int
}

// AMQP is how to reach RabbitMQ, and where its events go.
type AMQP struct {
	URL                                    Secret
	TLS                                    tlsfile.Files
	Exchange, WSO2Exchange, WSO2RoutingKey string
	// WSO2MinSpacing and WSO2Sweep are 0 for off.
	WSO2MinSpacing, WSO2Sweep time.Duration
	// The keys of MapMessages. Those of notifications and key managers may be empty.
	WSO2LegacyRoutingKey, WSO2LegacyNotificationKey, WSO2LegacyKeyManagerKey string
	// Window is the most messages that wait for their confirms.
	Window int
}

// Etcd is how to reach etcd, and where its directory lies.
type Etcd struct {
	Endpoints []string
	Username  string
	Password  Secret
	TLS       tlsfile.Files
	// Prefix is empty, or begins with a slash and does not end with one.
	Prefix            string
	ReconcileInterval time.Duration
}

// HTTP is the listener that clients reach.
type HTTP struct {
	Listen string
	// CertFile and KeyFile are both empty for plain HTTP.
	CertFile, KeyFile string
	BehindTLSProxy    bool
	TrustedProxies    []netip.Prefix
	MaxInFlight       int
	MaxConnections    int
}

// Secret is a setting that no log, error or answer may show. A conversion to
// string gives the value.
type Secret string

const hidden = "[hidden]"

func (Secret) String() string               { return hidden }
func (Secret) GoString() string             { return hidden }
func (Secret) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, hidden) }
func (Secret) LogValue() slog.Value         { return slog.StringValue(hidden) }
func (Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// Use is a command that reads settings. It decides which of them there are, and
// which must be given.
type Use uint8

// The uses. ForServe is every setting.
const (
	ForServe Use = 1 << iota
	ForMigrate
	ForEpoch
	// ForApply is for whatever changes the catalog, the accounts or the signing keys by itself.
	ForApply
	// ForRevoke is for what ends tokens by itself.
	ForRevoke
	// ForFleet is for what looks at the gateways, ForVerify for what compares them and etcd with the
	// log, ForExplain for what explains refusals. None of them needs the master key.
	ForFleet
	ForVerify
	ForExplain
)

// Input is where settings come from. A flag outranks the environment, which
// outranks the default.
type Input struct {
	// Use defaults to ForServe.
	Use Use
	// Flags may have flags of the command's own; the settings' are added to
	// them, and Args parsed. With nil there are no flags.
	Flags *flag.FlagSet
	Args  []string
	// Environ is in the form of [os.Environ].
	Environ []string
}

// ParseConfig reads all settings and reports every mistake at once: what was
// given (unless it is a secret), the rule, and what to do. It returns
// [flag.ErrHelp] as it is.
func ParseConfig(in Input) (Config, error) {
	if in.Use == 0 {
		in.Use = ForServe
	}
	var c Config
	p := configParser{table: settings(&c), use: in.Use, env: make(map[string]string), flags: make(map[string]string), bad: make(map[string]bool)}
	for _, kv := range in.Environ {
		if name, value, _ := strings.Cut(kv, "="); strings.HasPrefix(name, envPrefix) && value != "" {
			p.env[name] = value
		}
	}
	if in.Flags != nil {
		p.addFlags(in.Flags)
		if err := in.Flags.Parse(in.Args); err != nil {
			return Config{}, err
		}
	}
	for i := range p.table {
		p.read(&p.table[i])
	}
	p.checkTogether(&c)
	if err := errors.Join(p.mistakes...); err != nil {
		return Config{}, err
	}
	c.Warnings = p.unknown()
	return c, nil
}

// configParser collects what was given, and what is wrong with it.
type configParser struct {
	table      []setting
	use        Use
	env, flags map[string]string // by full name: RESCIND_MAX_BATCH, max-batch
	bad        map[string]bool   // settings with a mistake, by setting.name
	mistakes   []error
}

func (p *configParser) addFlags(fs *flag.FlagSet) {
	for _, s := range p.table {
		if s.use&p.use == 0 {
			continue
		}
		name := s.flag()
		set := func(v string) error { p.flags[name] = v; return nil }
		if s.boolean {
			fs.BoolFunc(name, s.help, set)
		} else {
			fs.Func(name, s.help, set)
		}
	}
}

// read gives s its value: from a flag, the environment, a secret's file, or the default.
func (p *configParser) read(s *setting) {
	if s.use&p.use == 0 {
		return
	}
	text, from, given := s.def, s.env(), false
	switch fromFlag, isFlag := p.flags[s.flag()]; {
	case isFlag && s.secret:
		text, given = p.readFile(s, "--"+s.flag(), fromFlag)
	case isFlag:
		text, from, given = fromFlag, "--"+s.flag(), true
	case s.secret && p.env[s.env()] != "" && p.env[s.env()+fileSuffix] != "":
		p.mistake(s, fmt.Sprintf("%s and %s are both set: one is enough. Unset one of them", s.env(), s.env()+fileSuffix))
	case p.env[s.env()] != "":
		text, given = p.env[s.env()], true
	case s.secret && p.env[s.env()+fileSuffix] != "":
		text, given = p.readFile(s, s.env()+fileSuffix, p.env[s.env()+fileSuffix])
	}
	if p.bad[s.name] {
		return
	}
	if !given && text == "" {
		if s.required&p.use != 0 {
			p.mistake(s, fmt.Sprintf("%s is not set: it must be %s. %s", s.named(), s.rule, s.remedy()))
		}
		return
	}
	if err := s.set(text); err != nil {
		value := " is " + shown(text)
		if s.secret {
			value = " has an unusable value (not shown)"
		}
		if !errors.Is(err, errRule) {
			value += " (" + err.Error() + ")"
		}
		p.mistake(s, fmt.Sprintf("%s%s: it must be %s. %s", from, value, s.rule, s.remedy()))
	}
}

// readFile reads a secret. Editors and echo end a file with a newline that is
// not part of it.
func (p *configParser) readFile(s *setting, from, path string) (string, bool) {
	b, err := os.ReadFile(path)
	text := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if err == nil && text == "" {
		err = fmt.Errorf("%s is empty", path)
	}
	if err != nil {
		p.mistake(s, fmt.Sprintf("%s cannot be read: %v. Name a file that holds %s", from, err, s.rule))
	}
	return text, true
}

func (p *configParser) mistake(s *setting, text string) {
	p.bad[s.name] = true
	p.mistakes = append(p.mistakes, errors.New(text+"."))
}

// together reports text unless one of the named settings is already known to be
// wrong, or is none of this command's.
func (p *configParser) together(broken bool, text string, names ...string) {
	for _, s := range p.table {
		if slices.Contains(names, s.name) && (p.bad[s.name] || s.use&p.use == 0) {
			return
		}
	}
	if broken {
		p.mistakes = append(p.mistakes, errors.New(text+"."))
	}
}

// unknown finds what looks like a setting and is none: a typing mistake would
// otherwise pass for the default.
func (p *configParser) unknown() []string {
	known := make(map[string]bool)
	for _, s := range p.table {
		known[s.env()] = true
		known[s.env()+fileSuffix] = known[s.env()+fileSuffix] || s.secret
	}
	var out []string
	for name := range p.env {
		if !known[name] {
			out = append(out, name+" is not a setting and has no effect.")
		}
	}
	slices.Sort(out)
	return out
}

// shown is text as it may appear in a message: not for ever, and without the
// credentials of a URL.
func shown(text string) string {
	if i := strings.LastIndexByte(text, '@'); i >= 0 {
		scheme, _, isURL := strings.Cut(text[:i], "://")
		if isURL {
			text = scheme + "://" + hidden + text[i:]
		} else {
			text = hidden + text[i:]
		}
	}
	if len(text) > 200 {
		text = text[:200] + "…"
	}
	return strconv.Quote(text)
}

// PrintSettings writes the settings of a command for people, one paragraph each.
func PrintSettings(w io.Writer, use Use) {
	for _, s := range settings(new(Config)) {
		if s.use&use == 0 {
			continue
		}
		var arg string
		if s.secret {
			arg = " FILE"
		} else if !s.boolean {
			arg = " VALUE"
		}
		fmt.Fprintf(w, "  --%s%s\n  %s\n        %s\n        %s\n", s.flag(), arg, s.named(), s.help, s.ruleAndDefault(use))
	}
}
