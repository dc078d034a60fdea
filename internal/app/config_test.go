package app

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/internal/obs"
	"github.com/rescindhq/rescind/internal/tlsfile"
)

const (
	testKey   = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	testDBURL = "postgres://rescind:hunter2@db.example:5432/rescind"
)

// minimalEnv is the least that serve runs with.
func minimalEnv(more ...string) []string {
	return append([]string{
		"RESCIND_ISSUER=https://km.example.com",
		"RESCIND_MASTER_KEY=" + testKey,
		"RESCIND_DATABASE_URL=" + testDBURL,
		"RESCIND_AMQP_URL=amqp://rescind:hunter2@127.0.0.1:5672/rescind",
		"RESCIND_ETCD_ENDPOINTS=http://127.0.0.1:2379",
	}, more...)
}

func TestParseConfigDefaults(t *testing.T) {
	t.Parallel()
	got, err := ParseConfig(Input{Environ: minimalEnv("PATH=/bin", "RESCIND_LISTEN=")})
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Database: Database{URL: testDBURL, MigrateURL: testDBURL, MaxConns: 16},
		AMQP: AMQP{URL: "amqp://rescind:hunter2@127.0.0.1:5672/rescind", Exchange: "rescind.events",
			WSO2Exchange: "amq.topic", WSO2RoutingKey: "tokenRevocation", WSO2LegacyRoutingKey: "jwtRevocation", Window: 1024},
		Etcd:             Etcd{Endpoints: []string{"http://127.0.0.1:2379"}, ReconcileInterval: 5 * time.Minute},
		Sinks:            []string{"amqp", "amqp-wso2", "etcd"},
		MasterKey:        testKey,
		Issuer:           "https://km.example.com",
		HTTP:             HTTP{Listen: "127.0.0.1:8080", MaxInFlight: 5000, MaxConnections: 10000},
		OpsListen:        "127.0.0.1:9090",
		TokenLifetime:    15 * time.Minute,
		SigningAlgorithm: "RS256",
		Leeway:           30 * time.Second,
		ClockSkew:        2 * time.Second,
		MaxBatch:         500,
		QueueSize:        10000,
		CommitTimeout:    5 * time.Second,
		LogRetention:     72 * time.Hour,
		GatewayLease:     10 * time.Second,
		Canary:           Canary{Limit: 10 * time.Second},
		ShutdownGrace:    20 * time.Second,
	}
	if diff := cmp.Diff(want, got, equalSecrets); diff != "" {
		t.Error(diff)
	}
}

// equalSecrets tells them apart where a printed difference could not.
var equalSecrets = cmp.Comparer(func(a, b Secret) bool { return a == b })

var equalNetworks = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

func TestParseConfigPrecedence(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		args    []string
		environ []string
		want    int
	}{
		{"default", nil, nil, 500},
		{"an empty variable is none", nil, []string{"RESCIND_MAX_BATCH="}, 500},
		{"environment", nil, []string{"RESCIND_MAX_BATCH=7"}, 7},
		{"flag", []string{"--max-batch", "8"}, nil, 8},
		{"flag over environment", []string{"--max-batch=8"}, []string{"RESCIND_MAX_BATCH=7"}, 8},
		{"flag over a mistake", []string{"--max-batch=8"}, []string{"RESCIND_MAX_BATCH=many"}, 8},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c, err := ParseConfig(Input{Flags: quietFlags(), Args: tt.args, Environ: minimalEnv(tt.environ...)})
			if err != nil || c.MaxBatch != tt.want {
				t.Errorf("MaxBatch %d, error %v, want %d", c.MaxBatch, err, tt.want)
			}
		})
	}
}

func quietFlags() *flag.FlagSet {
	fs := flag.NewFlagSet("test", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	return fs
}

// settingCases are the settings, each with a value that its rule allows and values that it does not.
var settingCases = []struct {
	name string
	text string
	want any
	got  func(Config) any
	bad  []string
}{
	{"ISSUER", "https://km.example.com/t1", "https://km.example.com/t1", func(c Config) any { return c.Issuer }, []string{
		"km.example.com", "https://km.example.com/", "https://km.example.com?a=1", "https://km.example.com?", "https://km.example.com#f", "https://km.example.com#",
		"ftp://km.example.com", "https://user:hunter2@km.example.com", "https://", "https://km.example.com/a/../b", "https://km.example.com/a b", "https://" + strings.Repeat("a", 255)}},
	{"MASTER_KEY", testKey, nil, nil, []string{"short", testKey[:40], testKey + testKey, "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh9="}},
	{"DATABASE_URL", "postgresql://u:p%40@h/d?sslmode=disable", nil, nil, []string{
		"mysql://u:hunter2@h/d", "host=h user=u password=hunter2", "postgres://u:hunter2%zz@h/d", "postgres://u:hunter2@h/d?sslmode=often", "postgres://u:hunter2@h:port/d"}},
	{"MIGRATE_DATABASE_URL", "postgres:///d?host=/run/postgresql", nil, nil, []string{"hunter2"}},
	{"DATABASE_CA_FILE", "", nil, nil, nil},
	{"DATABASE_CERT_FILE", "", nil, nil, nil},
	{"DATABASE_KEY_FILE", "", nil, nil, nil},
	{"DATABASE_MAX_CONNS", "4", 4, func(c Config) any { return c.Database.MaxConns }, []string{"3", "1001", "x"}},
	{"SINKS", "etcd, amqp", []string{"etcd", "amqp"}, func(c Config) any { return c.Sinks }, []string{"kafka", "amqp,amqp", "amqp,", "none,amqp"}},
	{"AMQP_URL", "amqps://u:p@rabbit/%2F", nil, nil, []string{
		"rabbit:5672", "http://u:hunter2@rabbit", "amqp://", "amqp://u:hunter2@rabbit/a/b", "amqp://u:hunter2@rabbit/#f", "amqp://u:hunter2%@rabbit"}},
	{"AMQP_CA_FILE", "", nil, nil, nil},
	{"AMQP_CERT_FILE", "", nil, nil, nil},
	{"AMQP_KEY_FILE", "", nil, nil, nil},
	{"AMQP_EXCHANGE", "a.b_c:D-1", "a.b_c:D-1", func(c Config) any { return c.AMQP.Exchange }, []string{"amq.topic", "a b", strings.Repeat("a", 128)}},
	{"AMQP_WSO2_EXCHANGE", "amq.fanout", "amq.fanout", func(c Config) any { return c.AMQP.WSO2Exchange }, []string{"a/b"}},
	{"AMQP_WSO2_ROUTING_KEY", "jwtRevocation", "jwtRevocation", func(c Config) any { return c.AMQP.WSO2RoutingKey }, []string{"a b", strings.Repeat("a", 256)}},
	{"AMQP_WSO2_MIN_SPACING", "30ms", 30 * time.Millisecond, func(c Config) any { return c.AMQP.WSO2MinSpacing }, []string{"1us", "2s", "30"}},
	{"AMQP_WSO2_SWEEP", "5m", 5 * time.Minute, func(c Config) any { return c.AMQP.WSO2Sweep }, []string{"1s", "25h", "-5m"}},
	{"AMQP_WSO2_LEGACY_ROUTING_KEY", "old", "old", func(c Config) any { return c.AMQP.WSO2LegacyRoutingKey }, []string{"a b"}},
	{"AMQP_WSO2_LEGACY_NOTIFICATION_KEY", "oldNotification", "oldNotification", func(c Config) any { return c.AMQP.WSO2LegacyNotificationKey }, []string{"a b"}},
	{"AMQP_WSO2_LEGACY_KEY_MANAGER_KEY", "oldKeyManager", "oldKeyManager", func(c Config) any { return c.AMQP.WSO2LegacyKeyManagerKey }, []string{"a b"}},
	{"AMQP_WINDOW", "65536", 65536, func(c Config) any { return c.AMQP.Window }, []string{"0", "65537"}},
	{"ETCD_ENDPOINTS", "https://a:2379, https://b:2379", []string{"https://a:2379", "https://b:2379"}, func(c Config) any { return c.Etcd.Endpoints }, []string{
		"a:2379", "https://a:2379,http://b:2379", "https://u:hunter2@a:2379", "https://a:2379/v3", "https://a:2379,", "unix:///run/etcd"}},
	{"ETCD_USERNAME", "", nil, nil, []string{"a b"}},
	{"ETCD_PASSWORD", "", nil, nil, nil},
	{"ETCD_CA_FILE", "", nil, nil, nil},
	{"ETCD_CERT_FILE", "", nil, nil, nil},
	{"ETCD_KEY_FILE", "", nil, nil, nil},
	{"ETCD_PREFIX", "/a/b-1", "/a/b-1", func(c Config) any { return c.Etcd.Prefix }, []string{"a", "/", "/a/", "//a"}},
	{"ETCD_RECONCILE_INTERVAL", "1m30s", 90 * time.Second, func(c Config) any { return c.Etcd.ReconcileInterval }, []string{"0", "60", "25h", "-1m"}},
	{"LISTEN", "[::1]:0", "[::1]:0", func(c Config) any { return c.HTTP.Listen }, []string{"8080", "localhost", "localhost:http", "127.0.0.1:65536"}},
	{"TLS_CERT_FILE", "", nil, nil, nil},
	{"TLS_KEY_FILE", "", nil, nil, nil},
	{"BEHIND_TLS_PROXY", "1", true, func(c Config) any { return c.HTTP.BehindTLSProxy }, []string{"yes"}},
	{"TRUSTED_PROXIES", "10.1.2.3/16, 2001:db8::1", []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("2001:db8::1/128")},
		func(c Config) any { return c.HTTP.TrustedProxies }, []string{"proxy", "0.0.0.0/0", "::/0", "10.0.0.0/33", "10.0.0.1,"}},
	{"MAX_IN_FLIGHT", "1", 1, func(c Config) any { return c.HTTP.MaxInFlight }, []string{"0", "100001"}},
	{"MAX_CONNECTIONS", "1", 1, func(c Config) any { return c.HTTP.MaxConnections }, []string{"0", "1e3"}},
	{"OPS_LISTEN", ":9090", ":9090", func(c Config) any { return c.OpsListen }, []string{"9090"}},
	{"PPROF", "true", true, func(c Config) any { return c.Obs.Pprof }, []string{"on"}},
	{"TRUSTED_ISSUERS_FILE", "", nil, nil, []string{"/does/not/exist.json"}},
	{"KEY_SET_NETWORKS", "10.1.0.0/16", []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, func(c Config) any { return c.KeySetNetworks }, []string{"inside", "0.0.0.0/0"}},
	{"WEBHOOKS_FILE", "", nil, nil, []string{"/does/not/exist.json"}},
	{"TOKEN_LIFETIME", "1h", time.Hour, func(c Config) any { return c.TokenLifetime }, []string{"900", "0s", "3601s", "1500ms"}},
	{"SIGNING_ALGORITHM", "ES256", "ES256", func(c Config) any { return c.SigningAlgorithm }, []string{"HS256", "none", "rs256"}},
	{"REMEMBER_TOKENS", "1", true, func(c Config) any { return c.RememberTokens }, []string{"yes"}},
	{"LEGACY_ASSERTION_AUDIENCE", "1", true, func(c Config) any { return c.LegacyAssertionAudience }, []string{"yes"}},
	{"LEEWAY", "0s", time.Duration(0), func(c Config) any { return c.Leeway }, []string{"121s", "-1s", "100ms"}},
	{"CLOCK_SKEW", "0s", time.Duration(0), func(c Config) any { return c.ClockSkew }, []string{"61s", "-1s", "100ms"}},
	{"MAX_BATCH", "5000", 5000, func(c Config) any { return c.MaxBatch }, []string{"0", "5001", "1.5"}},
	{"QUEUE_SIZE", "500", 500, func(c Config) any { return c.QueueSize }, []string{"0"}},
	{"COMMIT_TIMEOUT", "100ms", 100 * time.Millisecond, func(c Config) any { return c.CommitTimeout }, []string{"99ms", "61s"}},
	{"LOG_RETENTION", "1h", time.Hour, func(c Config) any { return c.LogRetention }, []string{"59m", "3d"}},
	{"GATEWAY_LEASE", "1m", time.Minute, func(c Config) any { return c.GatewayLease }, []string{"9s", "11m", "0s"}},
	{"CANARY_INTERVAL", "10s", 10 * time.Second, func(c Config) any { return c.Canary.Every }, []string{"9s", "25h", "-1s"}},
	{"CANARY_LIMIT", "250ms", 250 * time.Millisecond, func(c Config) any { return c.Canary.Limit }, []string{"99ms", "61s"}},
	{"CANARY_AUDIENCE", "https://gw.example.com", "https://gw.example.com", func(c Config) any { return c.Canary.Audience }, []string{"a b", "ü"}},
	{"LOG_LEVEL", "warn", slog.LevelWarn, func(c Config) any { return c.Obs.Level }, []string{"warning", "WARN", "info+1"}},
	{"LOG_FORMAT", "text", obs.Config{Text: true}, func(c Config) any { return c.Obs }, []string{"logfmt"}},
	{"MIGRATE", "1", true, func(c Config) any { return c.Migrate }, []string{"2"}},
	{"SHUTDOWN_GRACE", "1s", time.Second, func(c Config) any { return c.ShutdownGrace }, []string{"0s", "11m"}},
}

func TestSettings(t *testing.T) {
	t.Parallel()
	table := settings(new(Config))
	if len(table) != len(settingCases) {
		t.Fatalf("%d settings, %d of them tried here", len(table), len(settingCases))
	}
	for i, f := range settingCases {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			if table[i].name != f.name {
				t.Fatalf("the setting in its place is %s", table[i].name)
			}
			env := "RESCIND_" + f.name
			if f.text != "" {
				c, err := ParseConfig(Input{Environ: minimalEnv(env + "=" + f.text)})
				if err != nil {
					t.Fatal(err)
				}
				if f.got != nil {
					if diff := cmp.Diff(f.want, f.got(c), equalNetworks); diff != "" {
						t.Error(diff)
					}
				}
			}
			for _, bad := range f.bad {
				_, err := ParseConfig(Input{Environ: minimalEnv(env + "=" + bad)})
				if err == nil || !strings.Contains(err.Error(), env) || !strings.Contains(err.Error(), table[i].rule) {
					t.Errorf("%q: error %v, want one with the name and the rule", bad, err)
				}
				if err != nil && strings.Contains(err.Error(), "hunter2") {
					t.Errorf("%q: the error shows a password: %v", bad, err)
				}
			}
		})
	}
}

func TestParseConfigReportsAllMistakes(t *testing.T) {
	t.Parallel()
	_, err := ParseConfig(Input{
		Flags: quietFlags(),
		Args:  []string{"--queue-size", "0"},
		Environ: []string{
			"RESCIND_MASTER_KEY=c2VjcmV0LW1hc3Rlci1rZXk=",
			"RESCIND_DATABASE_URL=" + testDBURL,
			"RESCIND_DATABASE_URL_FILE=/run/secrets/db",
			"RESCIND_MAX_BATCH=9000",
			"RESCIND_LISTEN=0.0.0.0:8080",
			"RESCIND_ETCD_USERNAME=rescind",
			"RESCIND_TLS_KEY_FILE=key.pem",
		},
	})
	want := `RESCIND_ISSUER is not set: it must be an https URL of at most 255 bytes, without trailing slash, query, fragment or user. Give the URL under which clients reach the service, for example https://km.example.com.
RESCIND_MASTER_KEY has an unusable value (not shown): it must be 32 random bytes in base64. Make one with: openssl rand -base64 32.
RESCIND_DATABASE_URL and RESCIND_DATABASE_URL_FILE are both set: one is enough. Unset one of them.
RESCIND_MAX_BATCH is "9000": it must be a number of revocations, 1 to 5000. Change it, or leave it out for 500.
--queue-size is "0": it must be a number of revocations, 1 to 1000000. Change it, or leave it out for 10000.
RESCIND_AMQP_URL (or RESCIND_AMQP_URL_FILE) is not set: the sinks whose names begin with amqp need it. Set it, or leave them out of RESCIND_SINKS.
RESCIND_ETCD_ENDPOINTS is not set: the sink etcd needs it. Set it, or leave etcd out of RESCIND_SINKS.
RESCIND_ETCD_USERNAME and RESCIND_ETCD_PASSWORD belong together: only one is set. Set both, or neither.
RESCIND_TLS_CERT_FILE and RESCIND_TLS_KEY_FILE belong together: only one is set. Set both, or neither.
RESCIND_LISTEN is "0.0.0.0:8080", which others can reach, and has no TLS: tokens and secrets would travel in the clear. Set RESCIND_TLS_CERT_FILE and RESCIND_TLS_KEY_FILE, or RESCIND_BEHIND_TLS_PROXY=1 if a proxy ends TLS before us.`
	if diff := cmp.Diff(want, fmt.Sprint(err)); diff != "" {
		t.Error(diff)
	}
}

func TestSettingsTogether(t *testing.T) {
	t.Parallel()
	cert, key := testPair(t)
	otherCert, _ := testPair(t)
	noCert := writeFile(t, "ca.pem", "not a certificate")
	tests := []struct {
		name    string
		environ []string
		want    string // a part of the error, empty for none
	}{
		{"no sinks, no servers", []string{"RESCIND_SINKS=none", "RESCIND_AMQP_URL=", "RESCIND_ETCD_ENDPOINTS="}, ""},
		{"TLS of our own", []string{"RESCIND_LISTEN=:8443", "RESCIND_TLS_CERT_FILE=" + cert, "RESCIND_TLS_KEY_FILE=" + key}, ""},
		{"a key of another certificate", []string{"RESCIND_TLS_CERT_FILE=" + otherCert, "RESCIND_TLS_KEY_FILE=" + key}, "private key does not match"},
		{"a certificate that is not there", []string{"RESCIND_TLS_CERT_FILE=/no/cert.pem", "RESCIND_TLS_KEY_FILE=" + key}, "open /no/cert.pem"},
		{"a proxy ends TLS", []string{"RESCIND_LISTEN=:8080", "RESCIND_BEHIND_TLS_PROXY=1", "RESCIND_ISSUER=http://km.example.com"}, ""},
		{"plain on a name", []string{"RESCIND_LISTEN=km.example.com:8080"}, "others can reach"},
		{"plain on loopback", []string{"RESCIND_LISTEN=localhost:8080", "RESCIND_ISSUER=http://[::1]:8080"}, ""},
		{"plain issuer", []string{"RESCIND_ISSUER=http://km.example.com"}, "plain http is for loopback only"},
		{"TLS to all servers", []string{
			"RESCIND_AMQP_URL=amqps://u:p@rabbit", "RESCIND_ETCD_ENDPOINTS=https://etcd:2379",
			"RESCIND_DATABASE_CA_FILE=" + cert, "RESCIND_DATABASE_CERT_FILE=" + cert, "RESCIND_DATABASE_KEY_FILE=" + key,
			"RESCIND_AMQP_CA_FILE=" + cert, "RESCIND_AMQP_CERT_FILE=" + cert, "RESCIND_AMQP_KEY_FILE=" + key,
			"RESCIND_ETCD_CA_FILE=" + cert, "RESCIND_ETCD_CERT_FILE=" + cert, "RESCIND_ETCD_KEY_FILE=" + key,
			"RESCIND_ETCD_USERNAME=u", "RESCIND_ETCD_PASSWORD=p"}, ""},
		{"files for a plain database", []string{"RESCIND_DATABASE_URL=postgres://h/d?sslmode=disable", "RESCIND_DATABASE_CA_FILE=" + cert}, "has no TLS: they need a RESCIND_DATABASE_URL without"},
		{"files for a plain broker", []string{"RESCIND_AMQP_CA_FILE=" + cert}, "has no TLS: they need a RESCIND_AMQP_URL that begins with amqps://"},
		{"files for a plain etcd", []string{"RESCIND_ETCD_CA_FILE=" + cert}, "has no TLS: they need RESCIND_ETCD_ENDPOINTS that begin with https://"},
		{"a batch above the queue", []string{"RESCIND_QUEUE_SIZE=499"}, "a batch must fit into the queue"},
		{"half a client certificate", []string{"RESCIND_DATABASE_KEY_FILE=" + key}, "RESCIND_DATABASE_CERT_FILE and RESCIND_DATABASE_KEY_FILE belong together"},
		{"no authorities", []string{"RESCIND_DATABASE_CA_FILE=" + noCert}, "holds no certificate"},
		{"our own issuer among the trusted", []string{"RESCIND_TRUSTED_ISSUERS_FILE=" +
			writeFile(t, "issuers.json", `[{"iss":"https://km.example.com","name":"k","max_token_lifetime":1,"jwks_url":"https://k"}]`)}, "which is RESCIND_ISSUER"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := ParseConfig(Input{Environ: minimalEnv(tt.environ...)})
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// A command asks for its own settings only, and lets alone what is wrong with others.
func TestParseConfigForACommand(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		use     Use
		environ []string
		want    string
	}{
		{"migrate", ForMigrate, []string{"RESCIND_MIGRATE_DATABASE_URL=" + testDBURL, "RESCIND_MAX_BATCH=many"}, ""},
		{"migrate as the service", ForMigrate, []string{"RESCIND_DATABASE_URL=" + testDBURL}, ""},
		{"migrate without database", ForMigrate, nil, "RESCIND_MIGRATE_DATABASE_URL is not set"},
		{"epoch", ForEpoch, []string{"RESCIND_DATABASE_URL=" + testDBURL, "RESCIND_ISSUER=https://km.example.com", "RESCIND_ETCD_ENDPOINTS=http://a:1"}, ""},
		{"epoch without database", ForEpoch, nil, "RESCIND_DATABASE_URL (or RESCIND_DATABASE_URL_FILE) is not set"},
		{"apply", ForApply, []string{"RESCIND_DATABASE_URL=" + testDBURL, "RESCIND_ISSUER=https://km.example.com", "RESCIND_MASTER_KEY=" + testKey, "RESCIND_AMQP_URL=none at all"}, ""},
		{"apply with a sink that is none", ForApply, []string{"RESCIND_DATABASE_URL=" + testDBURL, "RESCIND_ISSUER=https://km.example.com", "RESCIND_MASTER_KEY=" + testKey, "RESCIND_SINKS=none at all"}, "RESCIND_SINKS is"},
		{"apply without master key", ForApply, []string{"RESCIND_DATABASE_URL=" + testDBURL, "RESCIND_ISSUER=https://km.example.com"}, "RESCIND_MASTER_KEY (or RESCIND_MASTER_KEY_FILE) is not set"},
		{"revoke", ForRevoke, []string{"RESCIND_DATABASE_URL=" + testDBURL, "RESCIND_ISSUER=https://km.example.com", "RESCIND_MASTER_KEY=" + testKey, "RESCIND_AMQP_URL=none at all"}, ""},
		{"serve", ForServe, nil, "RESCIND_MASTER_KEY (or RESCIND_MASTER_KEY_FILE) is not set"},
	} {
		_, err := ParseConfig(Input{Use: tt.use, Environ: tt.environ})
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestSecretFiles(t *testing.T) {
	t.Parallel()
	good := writeFile(t, "url", testDBURL+"\n")
	without := func() []string { return append(minimalEnv()[:2:2], minimalEnv()[3:]...) }
	for _, tt := range []struct {
		name    string
		args    []string
		environ []string
		want    string // a part of the error, empty for none
	}{
		{"environment", nil, []string{"RESCIND_DATABASE_URL_FILE=" + good}, ""},
		{"flag", []string{"--database-url-file", good}, nil, ""},
		{"flag over a value", []string{"--database-url-file", good}, []string{"RESCIND_DATABASE_URL=postgres://other/other"}, ""},
		{"carriage return", nil, []string{"RESCIND_DATABASE_URL_FILE=" + writeFile(t, "url", testDBURL+"\r\n")}, ""},
		{"one newline only", nil, []string{"RESCIND_DATABASE_URL_FILE=" + writeFile(t, "url", testDBURL+"\n\n")}, "RESCIND_DATABASE_URL has an unusable value"},
		{"missing", nil, []string{"RESCIND_DATABASE_URL_FILE=/no/such/file"}, "RESCIND_DATABASE_URL_FILE cannot be read: open /no/such/file"},
		{"empty", []string{"--database-url-file", writeFile(t, "url", "\n")}, nil, "--database-url-file cannot be read"},
	} {
		c, err := ParseConfig(Input{Flags: quietFlags(), Args: tt.args, Environ: append(without(), tt.environ...)})
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.want)
		}
		if err == nil && c.Database.URL != testDBURL {
			t.Errorf("%s: another URL than the file's", tt.name)
		}
	}
}

func TestFlags(t *testing.T) {
	t.Parallel()
	fs := quietFlags()
	yes := fs.Bool("yes", false, "")
	c, err := ParseConfig(Input{Flags: fs, Args: []string{"--yes", "--migrate", "--sinks=", "rest"}, Environ: minimalEnv()})
	if err != nil {
		t.Fatal(err)
	}
	if !*yes || !c.Migrate || len(c.Sinks) != 0 || fs.Arg(0) != "rest" {
		t.Errorf("yes %t, migrate %t, sinks %q, argument %q", *yes, c.Migrate, c.Sinks, fs.Arg(0))
	}
	if _, err := ParseConfig(Input{Flags: quietFlags(), Args: []string{"--help"}}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
	for _, arg := range []string{"--master-key=x", "--database-url=x", "--no-such"} {
		if _, err := ParseConfig(Input{Flags: quietFlags(), Args: []string{arg}, Environ: minimalEnv()}); err == nil {
			t.Errorf("%s is taken", arg)
		}
	}
}

func TestWarnings(t *testing.T) {
	t.Parallel()
	c, err := ParseConfig(Input{Environ: minimalEnv("RESCIND_MAX_BACTH=9", "RESCIND_LISTEN_FILE=x", "RESCIND_AMQP_URL_FILE=", "RESCINDED=1")})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"RESCIND_LISTEN_FILE is not a setting and has no effect.", "RESCIND_MAX_BACTH is not a setting and has no effect."}
	if diff := cmp.Diff(want, c.Warnings); diff != "" {
		t.Error(diff)
	}
}

func TestPrintSettings(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	PrintSettings(&b, ForMigrate)
	for _, want := range []string{
		"  --migrate-database-url-file FILE\n  RESCIND_MIGRATE_DATABASE_URL (or RESCIND_MIGRATE_DATABASE_URL_FILE)\n        Postgres, as the role that owns",
		"  --log-format VALUE\n  RESCIND_LOG_FORMAT\n",
		"It is json or text. Default json.\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "RESCIND_MAX_BATCH") {
		t.Error("a setting of serve is shown for migrate")
	}
}

func TestSecretIsHidden(t *testing.T) {
	t.Parallel()
	s := Secret("hunter2")
	c := Config{MasterKey: s, Database: Database{URL: s}}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("started", "key", s, "config", c)
	slog.New(slog.NewTextHandler(&log, nil)).Info("started", "key", s, "config", c)
	j, err := json.Marshal(map[string]any{"config": c, "pointer": &s})
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]string{"slog": log.String(), "json": string(j)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%10.3s"} {
		shown[verb] = fmt.Sprintf(verb+" "+verb+" "+verb, s, &c, []any{s, &s})
	}
	for how, got := range shown {
		for _, leak := range []string{"hunter2", "68756e74657232", "68756E74657232", "hun"} {
			if strings.Contains(got, leak) {
				t.Errorf("%s shows it: %s", how, got)
			}
		}
		if !strings.Contains(got, "[hidden]") {
			t.Errorf("%s does not say that it is hidden: %s", how, got)
		}
	}
	if s.String() != "[hidden]" || s.GoString() != "[hidden]" {
		t.Error("String or GoString show it")
	}
}

func TestTrustedIssuers(t *testing.T) {
	t.Parallel()
	const good = `[
  {"iss":"https://idp.example.com","name":"idp","max_token_lifetime":3600,"jwks_url":"https://idp.example.com/keys",
   "algorithms":["ES256","PS256"],"allow_typ":["JWT"]},
  {"iss":"urn:legacy","name":"legacy","tenant":"example.org","max_token_lifetime":60,"jwks_file":"legacy.json"},
  {"iss":"http://127.0.0.1:9/","name":"test","max_token_lifetime":1,"jwks_url":"http://127.0.0.1:9/keys","allow_private_addresses":true}
]`
	c, err := ParseConfig(Input{Environ: minimalEnv("RESCIND_TRUSTED_ISSUERS_FILE=" + writeFile(t, "issuers.json", good))})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(c.TrustedIssuers[1].JWKSFile)
	want := []TrustedIssuer{
		{Iss: "https://idp.example.com", Name: "idp", Tenant: "carbon.super", JWKSURL: "https://idp.example.com/keys",
			MaxTokenLifetime: time.Hour, Algorithms: []string{"ES256", "PS256"}, AllowTyp: []string{"JWT"}},
		{Iss: "urn:legacy", Name: "legacy", Tenant: "example.org", JWKSFile: filepath.Join(dir, "legacy.json"), MaxTokenLifetime: time.Minute},
		{Iss: "http://127.0.0.1:9/", Name: "test", Tenant: "carbon.super", JWKSURL: "http://127.0.0.1:9/keys", MaxTokenLifetime: time.Second, AllowPrivateAddresses: true},
	}
	if diff := cmp.Diff(want, c.TrustedIssuers); diff != "" || !filepath.IsAbs(dir) {
		t.Errorf("folder %q: %s", dir, diff)
	}

	for _, tt := range []struct{ name, text, want string }{
		{"all mistakes at once", `[{"iss":"","name":"a","max_token_lifetime":0,"JWKS_URL":"https://a","jwks_file":"f"},
		  {"iss":"https://b","name":"a","max_token_lifetime":1.5,"jwks_url":"http://b","jwks_file":"f","algorithms":["none"],"tenant":"B","allow_typ":[""],"allow_private_addresses":1},
		  7]`,
			`[0]: iss must be text of 1 to 255 bytes; [0]: max_token_lifetime must be a whole number of seconds, 1 to 315360000; [0]: "JWKS_URL" is not known; ` +
				`[1]: tenant must be a domain of a-z 0-9 . -, at most 200; [1]: max_token_lifetime must be a whole number of seconds, 1 to 315360000; ` +
				`[1]: algorithms must be a list of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, EdDSA, Ed25519; ` +
				`[1]: allow_typ must be a list of text such as "JWT"; [1]: allow_private_addresses must be true or false; ` +
				`[1]: jwks_url must be an https URL (http only with allow_private_addresses); [1]: one of jwks_url and jwks_file must be given, not both; ` +
				`[2]: must be an object`},
		{"two of one iss", `[{"iss":"a","name":"a","max_token_lifetime":1,"jwks_file":"f"},{"iss":"a","name":"b","max_token_lifetime":1,"jwks_file":"f"}]`, "[1]: iss is another's too"},
		{"two of one name", `[{"iss":"a","name":"a","max_token_lifetime":1,"jwks_file":"f"},{"iss":"b","name":"a","max_token_lifetime":1,"jwks_file":"f"}]`, "[1]: name is another's of that tenant too"},
		{"a member twice", `[{"iss":"a","iss":"b"}]`, `[0]: "iss" is given twice`},
		{"null", `[{"iss":"a","name":"a","max_token_lifetime":1,"jwks_file":"f","algorithms":null}]`, "[0]: algorithms must be"},
		{"an object", `{}`, "not a JSON array"},
		{"two values", `[] []`, "not a JSON array"},
		{"cut short", `[{"iss":"a"`, "not a JSON array"},
		{"plain http", `[{"iss":"a","name":"a","max_token_lifetime":1,"jwks_url":"http://10.0.0.1/keys"}]`, "[0]: jwks_url must be"},
	} {
		_, err := parseTrustedIssuers([]byte(tt.text), ".")
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %s", tt.name, err, tt.want)
		}
	}
}

func TestDatabaseSecure(t *testing.T) {
	t.Parallel()
	cert, key := testPair(t)
	parse := func(url string) *pgx.ConnConfig {
		cc, err := pgx.ParseConfig(url)
		if err != nil {
			t.Fatal(err)
		}
		return cc
	}
	plain := parse("postgres://h/d?sslmode=disable")
	if err := (Database{}).secure(plain); err != nil || plain.TLSConfig != nil {
		t.Errorf("without files: TLS %v, error %v", plain.TLSConfig, err)
	}

	cc := parse("postgres://a:1,b:2/d") // each host with TLS, then without
	if err := (Database{TLS: tlsfile.Files{CA: cert, Cert: cert, Key: key}}).secure(cc); err != nil {
		t.Fatal(err)
	}
	if len(cc.Fallbacks) != 1 || cc.Fallbacks[0].Host != "b" {
		t.Fatalf("falls back to %v", cc.Fallbacks)
	}
	if cc.TLSConfig.ServerName != "a" || cc.Fallbacks[0].TLSConfig.ServerName != "b" || cc.TLSConfig.InsecureSkipVerify || cc.TLSConfig.RootCAs == nil {
		t.Error("the servers' names are not verified")
	}
	if c, err := cc.TLSConfig.GetClientCertificate(nil); err != nil || len(c.Certificate) != 1 {
		t.Errorf("client certificate: %v", err)
	}

	socket := parse("postgres:///d?host=/run/postgresql")
	if err := (Database{TLS: tlsfile.Files{CA: cert}}).secure(socket); err != nil || socket.TLSConfig != nil {
		t.Errorf("socket: TLS %v, error %v", socket.TLSConfig, err)
	}
	if err := (Database{TLS: tlsfile.Files{CA: "/no/ca.pem"}}).secure(socket); err == nil {
		t.Error("a missing file is no error")
	}
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// testPair is a certificate that vouches for itself, and its key.
func testPair(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))),
		writeFile(t, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
}

func TestWebhooksFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("whsec_abc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, file string
		wrong      []string // in the error; none: it is right
	}{
		{"right", `[{"name":"siem","url":"https://siem.example.com/in?key=hunter2","secret_files":["secret"],"types":["revocation","api.deleted"],"timeout":"5s","max_events":7},
			{"name":"local","url":"http://127.0.0.1:1/","secret_files":["secret","secret"]},
			{"name":"inside","url":"http://inside/","allow_http":true,"secret_files":["secret"]}]`, nil},
		{"no array", `{}`, []string{"not a JSON array"}},
		{"everything", `[{"name":"A B","url":"ftp://hunter2/","secret_files":[],"max_events":-1,"timeout":"1ms","max_bytes":1,"colour":"red"},{"name":"x","url":"http://outside/","secret_files":["missing"]},
			{"name":"x","url":"https://u:hunter2@h/","secret_files":["secret"]}]`,
			[]string{"[0]: ", "name must be", "url must be an https URL", "secret_files must be", "max_events must be", "max_bytes must be", "timeout must be", `"colour" is not known`, "[1]: ", "missing", "[2]: name is another's too"}},
		{"twice", `[{"name":"a","name":"b"}]`, []string{`"name" is given twice`}},
	} {
		hooks, err := parseWebhooks([]byte(tt.file), dir)
		if (err == nil) != (tt.wrong == nil) {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		for _, text := range tt.wrong {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v, want it to say %q", tt.name, err, text)
			}
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error shows a secret: %v", tt.name, err)
		}
		if err == nil && (hooks[0].sink() != "webhook-siem" || string(hooks[1].Secrets[1]) != "whsec_abc" || !hooks[2].AllowHTTP) {
			t.Errorf("%s: %+v", tt.name, hooks)
		}
	}
}
