package app_test

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/rest"
	"github.com/rescindhq/rescind/internal/wso2test"
	"github.com/rescindhq/rescind/migrations"
)

// receiver is a webhook's far side.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	events []revocation.Event
	signed int
	down   bool
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.down {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		body, err := io.ReadAll(req.Body)
		var batch []json.RawMessage
		if err == nil {
			err = json.Unmarshal(body, &batch)
		}
		if err != nil {
			t.Errorf("a post that cannot be read: %v", err)
		}
		for _, raw := range batch {
			e, err := revocation.ParseEvent(raw)
			if err != nil {
				t.Error(err)
			}
			r.events = append(r.events, e)
		}
		if strings.HasPrefix(req.Header.Get("Webhook-Signature"), "v1,") {
			r.signed++
		}
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) subjects() (list []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		list = append(list, e.Subject)
	}
	return list
}

func (r *receiver) setDown(down bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = down
}

// A webhook gets everything of its types, also what happened while it was down, and one
// of the old gateways what is for it.
func TestWebhooksAndLegacyGateways(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	hook := newReceiver(t)
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	hooks := writeJSON(t, "webhooks.json", []any{
		map[string]any{"name": "siem", "url": hook.URL + "/in", "secret_files": []string{secret}, "types": []string{"revocation", "scope.created"}},
	})
	s := w.serve("RESCIND_WEBHOOKS_FILE="+hooks, "RESCIND_SINKS=amqp-wso2-legacy", "RESCIND_AMQP_WSO2_LEGACY_NOTIFICATION_KEY=oldNotification")
	tokens := w.consume(w.amqpURL, "amq.topic", "jwtRevocation")
	changes := w.consume(w.amqpURL, "amq.topic", "oldNotification")
	client, admin := newHTTPClient(t), w.person(s, rest.Admin)
	s.mustRevoke(client, accessToken("first"))
	await(t, "the first event at the webhook", func() bool { return slices.Contains(hook.subjects(), "first") })
	hook.setDown(true)
	admin.made("/v1/scopes", `{"name":"meanwhile"}`)
	admin.made("/v1/applications", `{"name":"Not for it","owner":"o"}`)
	s.mustRevoke(client, accessToken("second"))
	status := ""
	await(t, "the service to say that a sink is down", func() bool { status, _ = s.readyz(client); return status == "warn" })
	hook.setDown(false)
	await(t, "what happened meanwhile at the webhook", func() bool { return slices.Contains(hook.subjects(), "second") })
	if got, want := hook.subjects(), []string{"first", "meanwhile", "second"}; !slices.Equal(got, want) {
		t.Errorf("the webhook got %q, want %q", got, want)
	}
	hook.mu.Lock()
	if hook.signed == 0 {
		t.Error("nothing was signed")
	}
	hook.mu.Unlock()
	for what, inbox := range map[string]*consumer{"revocations": tokens, "notifications": changes} {
		await(t, what+" as maps", func() bool {
			inbox.mu.Lock()
			defer inbox.mu.Unlock()
			return len(inbox.messages) > 0
		})
		inbox.mu.Lock()
		for _, m := range inbox.messages {
			if decoded, err := wso2test.DecodeJMS(m); err != nil || decoded.Map == nil {
				t.Errorf("%s: %+v, %v; want a MapMessage", what, decoded, err)
			}
		}
		inbox.mu.Unlock()
	}
}

// What a database of the first schema has is told to everybody when the service starts
// on the second.
func TestUpgradeAnnouncesWhatIsThere(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	pool := pgtest.Pool(t, w.db.OwnerURL)
	db, quiet := app.Database{URL: app.Secret(w.db.ServiceURL), MigrateURL: app.Secret(w.db.OwnerURL)}, slog.New(slog.DiscardHandler)
	if err := app.MigrateDown(t.Context(), db, migrations.Latest-1, quiet); err != nil {
		t.Fatalf("back to the first schema: %v", err)
	}
	for _, sql := range []string{
		`INSERT INTO rescind.key_managers (tenant_id, name, resident, iss, max_token_lifetime) VALUES (-1234, 'Old IdP', false, 'https://old.example.com', 600)`,
		`INSERT INTO rescind.applications (tenant_id, name, owner) VALUES (-1234, 'Old app', 'alice')`,
		`INSERT INTO rescind.key_mappings (application_id, key_manager_id, consumer_key, key_type)
			SELECT a.id, k.id, 'old-key', 'PRODUCTION' FROM rescind.applications a, rescind.key_managers k WHERE k.name = 'Old IdP'`,
	} {
		if _, err := pool.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := app.Migrate(t.Context(), db, quiet); err != nil {
		t.Fatalf("to the second schema: %v", err)
	}
	events := w.consume(w.amqpURL, "rescind.events", "#")
	s := w.serve()
	await(t, "the events of what was there", func() bool {
		return hasAll(events.seen(), []string{"Old IdP", "Old app", "old-key", "subscription/Unlimited"})
	})
	gateway := w.person(s, rest.Gateway)
	_, found := gateway.snapshot()
	if len(found["applications"]) == 0 || len(found["key_mappings"]) == 0 || len(found["policies"]) != 3 {
		t.Errorf("the snapshot has %d applications, %d key mappings and %d policies",
			len(found["applications"]), len(found["key_mappings"]), len(found["policies"]))
	}
	before := w.allEvents()
	w.serve()
	if n := w.allEvents(); n != before {
		t.Errorf("another process announced %d things again", n-before)
	}
}
