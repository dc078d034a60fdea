package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"
	"unicode"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/rescindhq/rescind/api/directory"
	"github.com/rescindhq/rescind/api/revocation"
)

const aboutTail = `Shows each event as it arrives from RabbitMQ and as a key in etcd, with the
milliseconds since its commit. It connects again for as long as it runs, and
shows nothing of what happened before it started.`

// tailer follows one service's messages.
type tailer struct {
	amqpURL    string
	exchange   string
	endpoints  []string
	prefix     string
	heartbeats bool
	stderr     io.Writer
	seen       chan sighting
}

// sighting is one event as it was seen. Its JSON form is stable.
type sighting struct {
	Via     string           `json:"via"` // amqp or etcd
	At      time.Time        `json:"at"`
	AgeMS   float64          `json:"age_ms"` // since the commit, whose time is in whole milliseconds
	Epoch   revocation.Epoch `json:"epoch,omitempty"`
	Seq     revocation.Seq   `json:"seq,omitempty"`
	Type    string           `json:"type"`
	Subject string           `json:"subject,omitempty"`
	Tenant  string           `json:"tenant,omitempty"`
	Exp     int64            `json:"exp,omitempty"`
	Key     string           `json:"key,omitempty"`
	Head    revocation.Seq   `json:"head,omitempty"`
	Through revocation.Seq   `json:"through,omitempty"`
}

func runTail(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	inv := newInvocation("rescind tail", "rescind tail [flags]", aboutTail, stdout, stderr)
	var t tailer
	devJSON := inv.flags.String("dev-json", defaultDevJSON, "Where rescind-dev says where its servers are, a `file`.")
	inv.flags.StringVar(&t.amqpURL, "amqp-url", "", "RabbitMQ's `url`, rather than dev.json's. Others on this machine can read it, so leave this to throw-away passwords.")
	etcd := inv.flags.String("etcd-endpoints", "", "The `urls` of etcd's members, with commas between, rather than dev.json's.")
	inv.flags.StringVar(&t.prefix, "etcd-prefix", "", "What the directory's keys begin with, a `path`.")
	inv.flags.StringVar(&t.exchange, "exchange", "rescind.events", "The exchange of the events, a `name`.")
	inv.flags.BoolVar(&t.heartbeats, "heartbeats", false, "Show heartbeats too.")
	asJSON := inv.flags.Bool("json", false, "Write one JSON object a line.")
	limit := inv.flags.Int("count", 0, "End after so many lines, a `number`.")
	if code, ok := inv.parse(args); !ok {
		return code
	}
	switch {
	case len(inv.words) > 0:
		return inv.misused("takes no argument, not %q", inv.words[0])
	case *limit < 0:
		return inv.misused("--count is %d: it must be at least 1", *limit)
	}
	if *etcd != "" {
		t.endpoints = strings.Split(*etcd, ",")
	}
	if t.amqpURL == "" && t.endpoints == nil {
		dev, err := readDevStack(*devJSON)
		if err != nil {
			return inv.failed(err)
		}
		t.amqpURL, t.endpoints = cmp.Or(dev.GatewayAMQPURL, dev.AMQPURL), dev.EtcdEndpoints
	}
	t.stderr, t.seen = stderr, make(chan sighting)
	if err := t.print(ctx, stdout, *asJSON, *limit); err != nil {
		return inv.failed(err)
	}
	return exitOK
}

// print follows all that t has an address for, until ctx ends or limit lines are
// written, if limit is not 0.
func (t *tailer) print(ctx context.Context, stdout io.Writer, asJSON bool, limit int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if t.amqpURL != "" {
		go t.again(ctx, "RabbitMQ", t.followAMQP)
	}
	if len(t.endpoints) > 0 {
		go t.again(ctx, "etcd", t.followEtcd)
	}
	for lines := 0; limit == 0 || lines < limit; lines++ {
		select {
		case s := <-t.seen:
			if err := s.write(stdout, asJSON); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
	return nil
}

const (
	firstPause   = 250 * time.Millisecond
	longestPause = 10 * time.Second
)

// again calls follow until ctx ends, with longer and longer pauses while it gets
// no connection. Follow calls connected once it has one.
func (t *tailer) again(ctx context.Context, server string, follow func(ctx context.Context, connected func()) error) {
	pause := firstPause
	for {
		err := follow(ctx, func() {
			fmt.Fprintf(t.stderr, "Listening to %s.\n", server)
			pause = firstPause
		})
		if ctx.Err() != nil {
			return
		}
		wait := pause/2 + rand.N(pause/2)
		fmt.Fprintf(t.stderr, "%s: %v. Trying again in %s.\n", server, err, wait.Round(time.Millisecond))
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		pause = min(2*pause, longestPause)
	}
}

func (t *tailer) show(ctx context.Context, s sighting) {
	select {
	case t.seen <- s:
	case <-ctx.Done():
	}
}

// followAMQP reads a queue of its own, which ends with the connection.
func (t *tailer) followAMQP(ctx context.Context, connected func()) error {
	uri, err := amqp.ParseURI(t.amqpURL)
	if err != nil {
		return errors.New("the URL is not one of RabbitMQ's") // its words could show the password
	}
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName("rescind tail")
	conn, err := amqp.DialConfig(uri.String(), amqp.Config{Properties: properties, Dial: amqp.DefaultDial(5 * time.Second)})
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	channel, err := conn.Channel()
	if err != nil {
		return err
	}
	queue, err := channel.QueueDeclare("", false, true, true, false, nil)
	if err != nil {
		return err
	}
	if err := channel.QueueBind(queue.Name, "#", t.exchange, false, nil); err != nil {
		return err
	}
	messages, err := channel.Consume(queue.Name, "", true, true, false, false, nil)
	if err != nil {
		return err
	}
	closed := channel.NotifyClose(make(chan *amqp.Error, 1))
	connected()
	for m := range messages {
		now := time.Now()
		if m.RoutingKey == revocation.HeartbeatRoutingKey {
			if h, err := revocation.ParseHeartbeat(m.Body); err == nil && t.heartbeats {
				t.show(ctx, sighting{
					Via: "amqp", At: now, AgeMS: milliseconds(now.Sub(h.Time)), Epoch: h.Epoch, Type: "heartbeat", Head: h.Head, Through: h.Through,
				})
			}
			continue
		}
		e, err := revocation.ParseEvent(m.Body)
		if err != nil {
			fmt.Fprintf(t.stderr, "RabbitMQ: a message that is no event of ours (%v).\n", err)
			continue
		}
		s := sighting{
			Via: "amqp", At: now, AgeMS: milliseconds(now.Sub(e.Time)), Epoch: e.Epoch, Seq: e.Seq,
			Type: e.Type, Subject: e.Subject, Tenant: e.Tenant.Domain,
		}
		if r, err := e.Revocation(); err == nil {
			s.Exp = r.Exp
		}
		t.show(ctx, s)
	}
	select {
	case err := <-closed:
		return fmt.Errorf("connection lost: %w", err)
	default:
		return errors.New("connection lost")
	}
}

// followEtcd watches the directory from now on.
func (t *tailer) followEtcd(ctx context.Context, connected func()) error {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: t.endpoints, DialTimeout: 5 * time.Second, DialKeepAliveTime: 5 * time.Second, DialKeepAliveTimeout: 5 * time.Second,
		Context: ctx, Logger: zap.NewNop(), // what matters comes back as an error
	})
	if err != nil {
		return err
	}
	defer client.Close()
	// A watch alone would wait in silence for a server that is not there.
	asking, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := client.Get(asking, directory.StreamKey(t.prefix)); err != nil {
		return err
	}
	watching, end := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer end()
	updates := client.Watch(watching, t.prefix+"/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	for u := range updates {
		now := time.Now()
		if u.Created {
			connected()
		}
		if err := u.Err(); err != nil {
			return err
		}
		for _, e := range u.Events {
			if s, ok := t.sighted(e, now); ok {
				t.show(ctx, s)
			}
		}
	}
	return errors.New("the watch ended")
}

// sighted reads a change of the directory; ok is false for keys that are not
// entries. A key that goes has no age: its token has ended.
func (t *tailer) sighted(e *clientv3.Event, now time.Time) (s sighting, ok bool) {
	key := string(e.Kv.Key)
	if e.Type == mvccpb.DELETE {
		if !below(key, directory.Folders(t.prefix)) {
			return s, false
		}
		return sighting{Via: "etcd", At: now, Type: "removed", Key: key}, true
	}
	// Entries outside /issuers/ are those of the super tenant's issuer, whoever that is.
	var value struct {
		Iss string `json:"iss"`
	}
	_ = json.Unmarshal(e.Kv.Value, &value) // Parse finds what is wrong
	source := value.Iss
	if strings.HasPrefix(key, t.prefix+"/issuers/") {
		source = ""
	}
	entry, err := directory.Parse(t.prefix, source, key, e.Kv.Value)
	if err != nil {
		return s, false
	}
	return sighting{
		Via: "etcd", At: now, AgeMS: milliseconds(now.Sub(entry.At)), Seq: entry.Seq,
		Type: "revocation." + string(entry.Target.Kind), Subject: entry.Target.ID, Exp: entry.Exp, Key: key,
	}, true
}

func below(key string, folders []string) bool {
	for _, f := range folders {
		if strings.HasPrefix(key, f) {
			return true
		}
	}
	return false
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (s sighting) write(w io.Writer, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(s)
	}
	var about string
	switch s.Type {
	case "heartbeat":
		about = fmt.Sprintf("head %d, through %d", s.Head, s.Through)
	case "removed":
		_, err := fmt.Fprintf(w, "%s  %-4s  %23s  %s\n", s.At.Format("15:04:05.000"), s.Via, "removed", printable(s.Key))
		return err
	default:
		about = fmt.Sprintf("seq %-8d %s %s", s.Seq, s.Type, printable(cmp.Or(s.Key, s.Subject)))
	}
	_, err := fmt.Fprintf(w, "%s  %-4s  %8.1f ms  %s\n", s.At.Format("15:04:05.000"), s.Via, s.AgeMS, about)
	return err
}

// printable keeps what others wrote from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}
