package devstack

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const amqpUser, gatewayUser = "rescind", "gateway"

// permissions are patterns of the names that a user may declare, publish to or bind, and consume from or bind to.
type permissions struct {
	Configure string `json:"configure"`
	Write     string `json:"write"`
	Read      string `json:"read"`
}

var (
	everything = permissions{Configure: ".*", Write: ".*", Read: ".*"}
	// A gateway has queues named by the server, bound to the exchanges that events go to. It may not publish to them: a
	// forged event would be believed. WSO2's gateways declare amq.topic before they use it, which takes a permission to
	// configure it although it exists.
	consuming = permissions{Configure: `^(amq\.topic|amq\.gen-.*)$`, Write: `^amq\.gen-.*$`, Read: `^(amq\.topic|rescind\.events|amq\.gen-.*)$`}
)

type rabbitMQ struct {
	folder     *folder
	account    *account
	found      programs
	management bool
	epmd, run  *process
}

func newRabbitMQ(f *folder, found programs, management bool) (*rabbitMQ, error) {
	acct, err := lookupAccount("rabbitmq")
	return &rabbitMQ{folder: f, account: acct, found: found, management: management}, err
}

func rabbitMQPIDFile(f *folder) string { return filepath.Join(f.servers, "rabbitmq.pid") }

func epmdPIDFile(f *folder) string { return filepath.Join(f.servers, "epmd.pid") }

var (
	rabbitMQStop = []ending{{syscall.SIGTERM, 6 * time.Second}, killing}
	epmdStop     = []ending{{syscall.SIGTERM, time.Second}, killing}
)

func endRabbitMQOrphans(f *folder) error {
	return errors.Join(endOrphan(rabbitMQPIDFile(f), rabbitMQStop...), endOrphan(epmdPIDFile(f), epmdStop...))
}

func (r *rabbitMQ) dir() string { return filepath.Join(r.folder.servers, string(RabbitMQ)) }

func (r *rabbitMQ) describe(e *Endpoints) {
	u := url.URL{
		Scheme:  "amqp",
		User:    url.UserPassword(amqpUser, r.folder.AMQPSecret),
		Host:    r.folder.addr(amqpPort),
		Path:    "//",
		RawPath: "/%2F",
	}
	e.AMQPURL = u.String()
	u.User = url.UserPassword(gatewayUser, r.folder.GatewaySecret)
	e.GatewayAMQPURL = u.String()
	if r.management {
		e.ManagementURL = (&url.URL{Scheme: "http", User: url.UserPassword(amqpUser, r.folder.AMQPSecret), Host: r.folder.addr(httpPort)}).String()
	}
}

func (r *rabbitMQ) start(ctx context.Context) (_ <-chan struct{}, err error) {
	if err := r.configure(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.kill())
		}
	}()
	life := context.WithoutCancel(ctx)
	epmdEnv := []string{"ERL_EPMD_ADDRESS=127.0.0.1", "ERL_EPMD_PORT=" + r.port(epmdPort)}
	cmd := r.account.command(life, r.dir(), epmdEnv, r.found.epmd)
	if r.epmd, err = startProcess(cmd, epmdPIDFile(r.folder), r.folder.logFile(RabbitMQ), syscall.SIGTERM); err != nil {
		return nil, err
	}
	// RabbitMQ starts an epmd itself when there is none, which would not be ours to end.
	if err := r.epmd.await(ctx, r.epmdAnswers); err != nil {
		return nil, fmt.Errorf("epmd: %w", err)
	}
	script, err := r.slimHome()
	if err != nil {
		return nil, err
	}
	cmd = r.account.command(life, r.dir(), append(r.env(), epmdEnv...), script)
	if r.run, err = startProcess(cmd, rabbitMQPIDFile(r.folder), r.folder.logFile(RabbitMQ), syscall.SIGTERM); err != nil {
		return nil, err
	}
	if err := r.run.await(ctx, r.answers); err != nil {
		return nil, err
	}
	return r.run.done, nil
}

func (r *rabbitMQ) path(name string) string { return filepath.Join(r.dir(), name) }

func (r *rabbitMQ) port(n int) string { return strconv.Itoa(r.folder.PortBase + n) }

// env points RabbitMQ at files of ours alone, where it would look below /etc/rabbitmq and /var/lib/rabbitmq.
func (r *rabbitMQ) env() []string {
	return []string{
		"RABBITMQ_NODENAME=rescind-" + r.port(amqpPort) + "@localhost",
		"RABBITMQ_DIST_PORT=" + r.port(erlangPort),
		"RABBITMQ_CONF_ENV_FILE=" + r.path("rabbitmq-env.conf"),
		"RABBITMQ_CONFIG_FILE=" + r.path("rabbitmq.conf"),
		"RABBITMQ_CONFIG_FILES=" + r.path("conf.d"),
		"RABBITMQ_ADVANCED_CONFIG_FILE=" + r.path("advanced.config"),
		"RABBITMQ_ENABLED_PLUGINS_FILE=" + r.path("enabled_plugins"),
		"RABBITMQ_MNESIA_BASE=" + r.path("mnesia"),
		"RABBITMQ_MNESIA_DIR=" + r.path("mnesia/node"),
		"RABBITMQ_GENERATED_CONFIG_DIR=" + r.path("config"),
		"RABBITMQ_SCHEMA_DIR=" + r.path("schema"),
		"RABBITMQ_LOG_BASE=" + r.path("log"),
		"RABBITMQ_LOGS=-",
		"RABBITMQ_PID_FILE=" + r.path("node.pid"),
		// Erlang takes the place of the script that starts it, so that our signals reach it.
		"RUNNING_UNDER_SYSTEMD=true",
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS=-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none +A 4 +SDio 8",
	}
}

// configure writes RabbitMQ's configuration. It is the same at each start, but for the ports.
func (r *rabbitMQ) configure() error {
	plugins, conf := "[].\n", []string{
		"listeners.tcp.1 = " + r.folder.addr(amqpPort),
		"load_definitions = " + r.path("definitions.json"),
		"log.console = true",
		"log.console.level = info",
		"log.file = false",
		"disk_free_limit.absolute = 50MB",
	}
	if r.management {
		plugins = "[rabbitmq_management].\n"
		conf = append(conf, "management.tcp.ip = 127.0.0.1", "management.tcp.port = "+r.port(httpPort))
	}
	definitions, err := r.definitions()
	if err != nil {
		return err
	}
	return errors.Join(
		r.account.ownedDir(r.dir()),
		r.account.ownedDir(r.path("conf.d")),
		r.account.writeFile(r.path(".erlang.cookie"), r.folder.ErlangCookie),
		r.account.writeFile(r.path("rabbitmq-env.conf"), ""),
		r.account.writeFile(r.path("advanced.config"), "[].\n"),
		r.account.writeFile(r.path("rabbitmq.conf"), strings.Join(conf, "\n")+"\n"),
		r.account.writeFile(r.path("enabled_plugins"), plugins),
		r.account.writeFile(r.path("definitions.json"), definitions),
	)
}

// slimHome makes a home folder with links to the installed one, all but the plugins that are not used, and returns the
// script in it that starts the broker. Erlang looks for each of a thousand modules in every folder of plugins, which is a
// third of the time that a start takes.
func (r *rabbitMQ) slimHome() (string, error) {
	installed, home := filepath.Dir(filepath.Dir(r.found.rabbitMQ)), r.path("home")
	plugins, err := os.ReadDir(filepath.Join(installed, "plugins"))
	if errors.Is(err, os.ErrNotExist) { // another layout than any we know
		return r.found.rabbitMQ, nil
	}
	if err != nil {
		return "", err
	}
	used := []string{"sbin", "escript"}
	for _, p := range plugins {
		app, _, _ := strings.Cut(p.Name(), "-")
		switch app {
		case "rabbitmq_prelaunch": // a part of the broker, whatever its name
		case "rabbitmq_management", "rabbitmq_management_agent", "rabbitmq_web_dispatch":
			if !r.management {
				continue
			}
		default: // the broker, and libraries
			if strings.HasPrefix(app, "rabbitmq_") {
				continue
			}
		}
		used = append(used, filepath.Join("plugins", p.Name()))
	}
	if err := os.RemoveAll(home); err != nil {
		return "", err
	}
	if err := errors.Join(r.account.ownedDir(home), r.account.ownedDir(filepath.Join(home, "plugins"))); err != nil {
		return "", err
	}
	for _, name := range used {
		if err := os.Symlink(filepath.Join(installed, name), filepath.Join(home, name)); err != nil {
			return "", err
		}
	}
	return filepath.Join(home, "sbin", filepath.Base(r.found.rabbitMQ)), nil
}

func (r *rabbitMQ) definitions() (string, error) {
	type user struct {
		Name             string `json:"name"`
		PasswordHash     string `json:"password_hash"`
		HashingAlgorithm string `json:"hashing_algorithm"`
		Tags             string `json:"tags"`
	}
	type vhost struct {
		Name string `json:"name"`
	}
	type grant struct {
		User  string `json:"user"`
		Vhost string `json:"vhost"`
		permissions
	}
	const sha256Hashing = "rabbit_password_hashing_sha256"
	b, err := json.MarshalIndent(struct {
		Users       []user  `json:"users"`
		Vhosts      []vhost `json:"vhosts"`
		Permissions []grant `json:"permissions"`
	}{
		Users: []user{
			{amqpUser, hashPassword(r.folder.AMQPSecret), sha256Hashing, "administrator"},
			{gatewayUser, hashPassword(r.folder.GatewaySecret), sha256Hashing, ""},
		},
		Vhosts:      []vhost{{"/"}},
		Permissions: []grant{{amqpUser, "/", everything}, {gatewayUser, "/", consuming}},
	}, "", "  ")
	return string(b), err
}

// hashPassword makes RabbitMQ's form of a salted SHA-256.
func hashPassword(password string) string {
	salt := make([]byte, 4)
	rand.Read(salt)
	sum := sha256.Sum256(append(salt[:4:4], password...))
	return base64.StdEncoding.EncodeToString(append(salt, sum[:]...))
}

func (r *rabbitMQ) epmdAnswers(ctx context.Context) bool {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", r.folder.addr(epmdPort))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// answers tells whether the broker begins an AMQP conversation, which it does once users and vhosts are there.
func (r *rabbitMQ) answers(ctx context.Context) bool {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", r.folder.addr(amqpPort))
	if err != nil {
		return false
	}
	defer conn.Close()
	const methodFrame = 1
	answer, err := ask(conn, []byte("AMQP\x00\x00\x09\x01"))
	return err == nil && answer == methodFrame
}

func (r *rabbitMQ) stop() error { return r.end(rabbitMQStop) }

func (r *rabbitMQ) kill() error { return r.end([]ending{killing}) }

func (r *rabbitMQ) end(endings []ending) error {
	var errs []error
	if r.run != nil {
		errs = append(errs, r.run.end(endings...))
	}
	if r.epmd != nil {
		errs = append(errs, r.epmd.end(epmdStop...))
	}
	r.run, r.epmd = nil, nil
	return errors.Join(errs...)
}
