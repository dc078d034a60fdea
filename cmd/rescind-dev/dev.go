package main

import (
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/devstack"
	"github.com/rescindhq/rescind/internal/manifest"
	"github.com/rescindhq/rescind/internal/obs"
)

const (
	keptName    = "service.json"
	devJSONName = "dev.json"
	devEnvName  = "dev.env"

	ownerRole, serviceRole = "rescind_owner", "rescind_app"
)

// kept is what stays the same from one start of a data folder to the next.
type kept struct {
	Issuer          string `json:"issuer"`
	Listen          string `json:"listen"`
	OpsListen       string `json:"ops_listen"`
	MasterKey       string `json:"master_key"`
	OwnerPassword   string `json:"owner_password"`
	ServicePassword string `json:"service_password"`
	ClientSecret    string `json:"client_secret"`
	AdminPassword   string `json:"admin_password"`
	GatewayPassword string `json:"gateway_password"`
	// Of each gateway: where it takes requests, and its operators' listener.
	Gateways [gateways]struct {
		Listen    string `json:"listen"`
		OpsListen string `json:"ops_listen"`
	} `json:"gateways"`
}

// devJSON is what other programs need to use the running system.
type devJSON struct {
	BaseURL         string   `json:"base_url"`
	OpsURL          string   `json:"ops_url"`
	DatabaseURL     string   `json:"database_url"`
	AMQPURL         string   `json:"amqp_url"`
	GatewayAMQPURL  string   `json:"gateway_amqp_url"`
	EtcdEndpoints   []string `json:"etcd_endpoints"`
	ClientID        string   `json:"client_id"`
	ClientSecret    string   `json:"client_secret"`
	AdminUser       string   `json:"admin_user"`
	AdminPassword   string   `json:"admin_password"`
	GatewayUser     string   `json:"gateway_user"`
	GatewayPassword string   `json:"gateway_password"`
	GatewayURLs     []string `json:"gateway_urls"`
	GatewayOpsURLs  []string `json:"gateway_ops_urls"`
	GatewayPIDs     []int    `json:"gateway_pids"`
	MasterKey       string   `json:"master_key"`
	PID             int      `json:"pid"`
}

// runDev runs servers, demo data and the service until ctx ends.
func runDev(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var cfg devstack.Config
	flags := flag.NewFlagSet("rescind-dev", flag.ContinueOnError)
	flags.SetOutput(stderr)
	stackFlags(flags, &cfg)
	listen := flags.String("listen", "", "the service's `address` (default the data folder's, at first 127.0.0.1:8080); "+
		"port 0 takes a free one and keeps it")
	logLevel := flags.String("log-level", "warn", "debug, info, warn or error")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "rescind-dev takes no argument, not %q.\n\n%s", flags.Arg(0), usage)
		return 2
	}
	cfg.Log = stderr
	d := dev{listen: *listen, logLevel: *logLevel, stdout: stdout, stderr: stderr, began: time.Now()}
	if err := d.run(ctx, cfg); err != nil && ctx.Err() == nil {
		fmt.Fprintf(stderr, "rescind-dev: %v\n", err)
		return 1
	} else if err != nil {
		fmt.Fprintf(stderr, "rescind-dev: stopped: %v\n", err)
		return 1
	}
	return 0
}

type dev struct {
	listen, logLevel string
	stdout, stderr   io.Writer
	began            time.Time

	dir  string
	kept kept
	at   devstack.Endpoints
	// serviceURL and ownerURL are the database's, for the two roles.
	serviceURL, ownerURL string
	gatewayPIDs          []int
}

func (d *dev) run(ctx context.Context, cfg devstack.Config) (err error) {
	given := map[devstack.Server]string{
		devstack.Postgres: os.Getenv("RESCIND_DATABASE_URL"),
		devstack.RabbitMQ: os.Getenv("RESCIND_AMQP_URL"),
		devstack.Etcd:     os.Getenv("RESCIND_ETCD_ENDPOINTS"),
	}
	for server, at := range given {
		if at != "" {
			cfg.Without = append(cfg.Without, server)
		}
	}
	stack, err := devstack.Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stack.Stop()) }()
	d.dir, d.at = cfg.Dir, stack.Endpoints()
	if at := given[devstack.RabbitMQ]; at != "" {
		d.at.AMQPURL, d.at.GatewayAMQPURL = at, at
	}
	if at := given[devstack.Etcd]; at != "" {
		d.at.EtcdEndpoints = strings.Split(at, ",")
	}
	if err := d.keep(); err != nil {
		return err
	}
	if at := given[devstack.Postgres]; at != "" {
		d.serviceURL, d.ownerURL = at, cmp.Or(os.Getenv("RESCIND_MIGRATE_DATABASE_URL"), at)
	} else if err := d.makeRoles(ctx); err != nil {
		return err
	}
	environ := d.environ()
	settings, err := app.ParseConfig(app.Input{Environ: environ})
	if err != nil {
		return err
	}
	if err := app.Migrate(ctx, settings.Database, obs.NewLogger(settings.Obs, d.stderr)); err != nil {
		return err
	}
	if given[devstack.Postgres] == "" {
		if err := d.admit(ctx); err != nil {
			return err
		}
	}
	return d.serve(ctx, environ, stack)
}

// serve runs the service and the gateways until ctx ends, a server dies, or one of them ends.
func (d *dev) serve(ctx context.Context, environ []string, stack *devstack.Stack) (err error) {
	told := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case err := <-stack.Died():
			cancel(err)
		case <-ctx.Done():
		}
	}()
	// run starts a child, which is stopped when serve returns, and waits until it is ready.
	run := func(environ []string, args ...string) (*child, error) {
		c, err := startChild(ctx, environ, d.stderr, args...)
		if err != nil {
			return nil, err
		}
		go func() {
			select {
			case <-c.done:
				cancel(fmt.Errorf("the %s has ended", args[0]))
			case <-ctx.Done():
			}
		}()
		select {
		case <-c.ready:
		case <-c.done:
		case <-ctx.Done():
		}
		return c, ctx.Err()
	}
	// What ended first is why the others are stopped.
	var stops []func() error
	defer func() {
		if told.Err() != nil {
			err = nil
		} else if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		for _, stop := range slices.Backward(stops) {
			err = errors.Join(err, stop())
		}
	}()
	service, err := run(append(environ, fmt.Sprintf("RESCIND_SHUTDOWN_GRACE=%s", stopPatience-time.Second)), serviceCommand)
	if service != nil {
		stops = append(stops, service.stop)
	}
	if err != nil {
		return err
	}
	if err := d.loadDemo(ctx); err != nil {
		return err
	}
	upstream, err := startUpstream()
	if err != nil {
		return err
	}
	defer upstream.Close() //nolint:errcheck // it has nothing to finish
	for i, at := range d.kept.Gateways {
		file, err := d.writeGateway(i, upstream.url)
		if err != nil {
			return err
		}
		gateway, err := run(os.Environ(), gatewayCommand, file)
		if gateway != nil {
			stops = append(stops, gateway.stop)
		}
		if err == nil {
			d.gatewayPIDs = append(d.gatewayPIDs, gateway.pid)
			err = awaitReady(ctx, "http://"+at.OpsListen)
		}
		if err != nil {
			return err
		}
	}
	if err := d.setCanaries(ctx); err != nil {
		return err
	}
	path, env := filepath.Join(d.dir, devJSONName), filepath.Join(d.dir, devEnvName)
	defer os.Remove(path) //nolint:errcheck // it may not be there yet
	defer os.Remove(env)  //nolint:errcheck // as above
	if err := d.writeEnv(env); err != nil {
		return err
	}
	if err := d.announce(path, env); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

// keep reads what earlier starts chose, and chooses the rest.
func (d *dev) keep() error {
	path := filepath.Join(d.dir, keptName)
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		if err := json.Unmarshal(b, &d.kept); err != nil {
			return fmt.Errorf("read %s: %w; begin anew with --fresh", path, err)
		}
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	k := &d.kept
	if k.Listen, err = fixPort(cmp.Or(d.listen, k.Listen, "127.0.0.1:8080"), k.Listen); err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	if k.OpsListen, err = fixPort("127.0.0.1:0", k.OpsListen); err != nil {
		return err
	}
	for i := range k.Gateways {
		for _, address := range []*string{&k.Gateways[i].Listen, &k.Gateways[i].OpsListen} {
			if *address, err = fixPort("127.0.0.1:0", *address); err != nil {
				return err
			}
		}
	}
	k.Issuer = cmp.Or(k.Issuer, "http://"+k.Listen)
	if k.MasterKey == "" {
		key := make([]byte, 32)
		rand.Read(key) //nolint:errcheck // never fails
		k.MasterKey = base64.StdEncoding.EncodeToString(key)
	}
	for _, secret := range []*string{&k.OwnerPassword, &k.ServicePassword, &k.ClientSecret, &k.AdminPassword, &k.GatewayPassword} {
		if *secret == "" {
			*secret = rand.Text() + rand.Text()
		}
	}
	return writePrivate(path, k)
}

// fixPort returns address with a free port in place of port 0: before's, if that is
// the same host and still free.
func fixPort(address, before string) (string, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", fmt.Errorf("address %q is not host:port", address)
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return "", fmt.Errorf("address %q is not on loopback: a development server is for this machine alone", address)
	}
	if port != "0" {
		return address, nil
	}
	for _, try := range []string{before, address} {
		if h, _, err := net.SplitHostPort(try); err != nil || h != host {
			continue
		}
		if l, err := net.Listen("tcp", try); err == nil {
			defer l.Close()
			return l.Addr().String(), nil
		}
	}
	return "", fmt.Errorf("no free port on %s", host)
}

func writePrivate(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	temp := path + ".new"
	if err := os.WriteFile(temp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// makeRoles makes the role that owns the schema and the service's.
func (d *dev) makeRoles(ctx context.Context) error {
	return d.asAdmin(ctx, func(conn *pgx.Conn) error {
		for _, role := range []struct{ name, password, option string }{
			{ownerRole, d.kept.OwnerPassword, "CREATEROLE"},
			{serviceRole, d.kept.ServicePassword, "NOCREATEROLE"},
		} {
			var there bool
			err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)`, role.name).Scan(&there)
			if err != nil {
				return err
			}
			verb := "CREATE"
			if there {
				verb = "ALTER"
			}
			// The password is ours, of letters and digits.
			_, err = conn.Exec(ctx, fmt.Sprintf(`%s ROLE %s LOGIN %s PASSWORD '%s'`, verb, role.name, role.option, role.password))
			if err != nil {
				return err
			}
		}
		// The benchmark takes sinks away from the service by ending its sessions.
		_, err := conn.Exec(ctx, `ALTER DATABASE rescind OWNER TO `+ownerRole+`;
			GRANT CREATE ON SCHEMA public TO `+ownerRole+`;
			GRANT pg_signal_backend, pg_read_all_stats TO `+ownerRole)
		d.ownerURL = withUser(d.at.DatabaseURL, ownerRole, d.kept.OwnerPassword)
		d.serviceURL = withUser(d.at.DatabaseURL, serviceRole, d.kept.ServicePassword)
		return err
	})
}

// admit makes the service's role one of the service.
func (d *dev) admit(ctx context.Context) error {
	return d.asAdmin(ctx, func(conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `GRANT rescind_service TO `+serviceRole)
		return err
	})
}

func (d *dev) asAdmin(ctx context.Context, f func(*pgx.Conn) error) error {
	conn, err := pgx.Connect(ctx, d.at.DatabaseURL)
	if err == nil {
		err = errors.Join(f(conn), conn.Close(ctx))
	}
	if err != nil {
		return fmt.Errorf("set up the database's roles: %w", err)
	}
	return nil
}

func withUser(rawURL, user, password string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		panic(err) // ours
	}
	u.User = url.UserPassword(user, password)
	return u.String()
}

// environ is the service's: what the data folder fixes, and else ours.
func (d *dev) environ() []string {
	fixed := map[string]string{
		"RESCIND_DATABASE_URL":         d.serviceURL,
		"RESCIND_MIGRATE_DATABASE_URL": d.ownerURL,
		"RESCIND_AMQP_URL":             d.at.AMQPURL,
		"RESCIND_ETCD_ENDPOINTS":       strings.Join(d.at.EtcdEndpoints, ","),
		"RESCIND_LISTEN":               d.kept.Listen,
		"RESCIND_OPS_LISTEN":           d.kept.OpsListen,
		"RESCIND_ISSUER":               d.kept.Issuer,
		"RESCIND_MASTER_KEY":           d.kept.MasterKey,
		"RESCIND_CANARY_INTERVAL":      "10s",
		"RESCIND_CANARY_LIMIT":         "5s",
		"RESCIND_CANARY_AUDIENCE":      demoAudience,
	}
	environ := []string{"RESCIND_LOG_FORMAT=text", "RESCIND_LOG_LEVEL=" + d.logLevel}
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); fixed[strings.TrimSuffix(name, "_FILE")] == "" {
			environ = append(environ, kv)
		}
	}
	for name, value := range fixed {
		environ = append(environ, name+"="+value)
	}
	return environ
}

// writeEnv writes the settings of commands, as a shell reads them.
func (d *dev) writeEnv(path string) error {
	var b strings.Builder
	for _, kv := range d.environ() {
		name, value, _ := strings.Cut(kv, "=")
		switch name {
		case "RESCIND_DATABASE_URL", "RESCIND_ISSUER", "RESCIND_MASTER_KEY", "RESCIND_ETCD_ENDPOINTS", "RESCIND_ETCD_PREFIX",
			"RESCIND_SINKS", "RESCIND_LOG_FORMAT":
			fmt.Fprintf(&b, "%s=%s\n", name, quoted(value))
		}
	}
	b.WriteString("RESCIND_LOG_LEVEL=error\n")
	return os.WriteFile(path, []byte(b.String()), 0o600)
}

// quoted is s as one word of a shell's.
func quoted(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// The demo's names. Ids are WSO2's first ones.
const (
	demoClientID = "PizzaShackConsumerKey"
	demoContext  = "/pizzashack/1.0.0"
	demoAudience = "https://pizzashack.example.com"
	adminUser    = "admin"
	gatewayUser  = "gateway"
)

// announce writes dev.json and tells how to go on.
func (d *dev) announce(path, env string) error {
	info := devJSON{
		BaseURL: "http://" + d.kept.Listen, OpsURL: "http://" + d.kept.OpsListen, DatabaseURL: d.ownerURL,
		AMQPURL: d.at.AMQPURL, GatewayAMQPURL: d.at.GatewayAMQPURL, EtcdEndpoints: d.at.EtcdEndpoints,
		ClientID: demoClientID, ClientSecret: d.kept.ClientSecret, AdminUser: adminUser, AdminPassword: d.kept.AdminPassword,
		GatewayUser: gatewayUser, GatewayPassword: d.kept.GatewayPassword, MasterKey: d.kept.MasterKey, PID: os.Getpid(),
		GatewayPIDs: d.gatewayPIDs,
	}
	for _, g := range d.kept.Gateways {
		info.GatewayURLs = append(info.GatewayURLs, "http://"+g.Listen)
		info.GatewayOpsURLs = append(info.GatewayOpsURLs, "http://"+g.OpsListen)
	}
	if err := writePrivate(path, info); err != nil {
		return err
	}
	env, err := filepath.Abs(env)
	if err != nil {
		return fmt.Errorf("find the folder of %s: %w", devEnvName, err)
	}
	fmt.Fprintf(d.stdout, walkthrough, time.Since(d.began).Seconds(), path,
		info.BaseURL, info.OpsURL, d.kept.Issuer, info.DatabaseURL, info.AMQPURL, info.GatewayAMQPURL, strings.Join(info.EtcdEndpoints, ","),
		info.ClientID, info.ClientSecret, adminUser, info.AdminPassword, gatewayUser, info.GatewayPassword,
		info.GatewayURLs[0], info.GatewayURLs[1],
		info.BaseURL, info.ClientID, info.ClientSecret, strings.Join(info.GatewayURLs, " "),
		quoted(env), info.GatewayPIDs[0], info.GatewayPIDs[0],
		info.EtcdEndpoints[0], info.GatewayPassword, info.GatewayPassword)
	return nil
}

//go:embed demo.yaml
var demo []byte

// demoSecretEnv is where demo.yaml says that the client's secret is.
const demoSecretEnv = "RESCIND_DEV_CLIENT_SECRET"

// loadDemo makes the accounts, and the catalog what demo.yaml says.
func (d *dev) loadDemo(ctx context.Context) error {
	cfg, err := app.ParseConfig(app.Input{Use: app.ForApply, Environ: d.environ()})
	if err != nil {
		return err
	}
	tools, err := app.OpenCatalog(ctx, cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer tools.Close()
	for _, a := range []struct {
		account  authn.Account
		password string
	}{
		{authn.Account{Username: adminUser, Role: "admin"}, d.kept.AdminPassword},
		{authn.Account{Username: gatewayUser, Role: "gateway", ExtraTenants: []string{"*"}}, d.kept.GatewayPassword},
	} {
		a.account.Tenant = revocation.SuperTenant
		if err := tools.Accounts.PutAccount(ctx, a.account, a.password); err != nil {
			return err
		}
	}
	file := filepath.Join(d.dir, "demo.yaml")
	if err := os.WriteFile(file, demo, 0o600); err != nil {
		return err
	}
	if err := os.Setenv(demoSecretEnv, d.kept.ClientSecret); err != nil {
		return err
	}
	want, err := manifest.Read(file)
	if err != nil {
		return err
	}
	have, err := manifest.ReadState(ctx, tools.Pool, want.Tenants())
	if err != nil {
		return err
	}
	plan, err := manifest.NewPlan(want, have, false)
	if err != nil {
		return err
	}
	_, err = manifest.Apply(ctx, tools.Catalog, plan, manifest.Config{Actor: app.Operator()})
	return err
}

const walkthrough = `Rescind is ready after %.1f s. All of this is in %s too.

  service     %s   operators' listener %s   issuer %s
  Postgres    %s
  RabbitMQ    %s
  for gateways %s
  etcd        %s
  client      %s / %s
  admin       %s / %s
  gateway     %s / %s
  gateways    %s and %s, before an upstream that tells what it was told

Call an API through both gateways, revoke the token, and see how long they still let it through (needs nothing but curl):

  BASE=%s ID=%s SECRET=%s GATEWAYS="%s"
  TOKEN=$(curl -s -u $ID:$SECRET -d grant_type=client_credentials $BASE/oauth2/token | sed 's/.*"access_token":"\([^"]*\)".*/\1/')
  call() { curl -s -o /dev/null -w '%%{http_code}' -H "Authorization: Bearer $TOKEN" $1/pizzashack/1.0.0/menu; }
  for G in $GATEWAYS; do echo "$G: $(call $G)"; done
  REVOKED=$(date +%%s%%N); curl -i -u $ID:$SECRET -d token=$TOKEN $BASE/revoke
  for G in $GATEWAYS; do until [ $(call $G) = 401 ]; do :; done; echo "$G: 401 after $((($(date +%%s%%N) - REVOKED) / 1000000)) ms"; done

Ask who has applied a revocation, and why the call was refused:

  rescind() { (set -a; . %s; go run ./cmd/rescind "$@"); }
  TOKEN=$(curl -s -u $ID:$SECRET -d grant_type=client_credentials $BASE/oauth2/token | sed 's/.*"access_token":"\([^"]*\)".*/\1/')
  echo $TOKEN | rescind revoke --token - --wait 5s
  rescind gateways
  echo $TOKEN | rescind explain --token - --context /pizzashack/1.0.0 --version 1.0.0 --gateway gateway-1
  rescind verify

Pause a gateway: --wait names it, and in some seconds its canary gives the alarm:

  kill -STOP %d; rescind revoke --jti $(date +%%s) --wait 2s
  sleep 20; rescind gateways
  kill -CONT %d

It is in etcd too, until it would have expired:

  ETCD=%s
  JTI=$(echo $TOKEN | cut -d. -f2 | tr '_-' '/+' | base64 -d 2>/dev/null | sed 's/.*"jti":"\([^"]*\)".*/\1/')
  KEY=$(printf /jti/$JTI | base64 -w0)
  FOUND=$(curl -s $ETCD/v3/kv/range -d "{\"key\":\"$KEY\"}"); echo "$FOUND"
  echo "$FOUND" | sed 's/.*"value":"\([^"]*\)".*/\1/' | base64 -d; echo
  curl -s $ETCD/v3/lease/timetolive -d "{\"ID\":$(echo "$FOUND" | sed 's/.*"lease":"\([0-9]*\)".*/\1/')}"; echo

What a gateway starts with, and what follows:

  curl -s -u gateway:%s $BASE/v1/snapshots/all
  curl -sN -u gateway:%s -H 'Accept: text/event-stream' $BASE/v1/events

The catalog is what demo.yaml in the data folder says; change it with rescind apply, or over $BASE/v1 as admin.
See the events arrive, in a second terminal: go run ./cmd/rescind tail
Ctrl-C ends everything; the data stays.
`
