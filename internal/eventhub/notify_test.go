package eventhub

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rescindhq/rescind/api/replica"
	"github.com/rescindhq/rescind/api/revocation"
	"github.com/rescindhq/rescind/internal/authn"
	"github.com/rescindhq/rescind/internal/ledger"
	"github.com/rescindhq/rescind/internal/pgtest"
	"github.com/rescindhq/rescind/internal/rest"
)

// follower is a replica that reads the ledger's log when it is asked to be fresh.
type follower struct {
	mu      sync.Mutex
	ledger  *ledger.Ledger
	replica *replica.State
}

func (f *follower) Replica() *replica.State { return f.replica }

func (f *follower) Fresh(ctx context.Context, _ time.Duration) (revocation.Position, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		events, err := f.ledger.After(ctx, f.replica.At().Seq, 1000)
		if err != nil || len(events) == 0 {
			return f.replica.At(), err
		}
		for _, e := range events {
			if err := f.replica.Apply(e); err != nil {
				return f.replica.At(), err
			}
		}
	}
}

// notifyWorld is a hub on a real ledger, with the catalog of the tests.
type notifyWorld struct {
	*world
	t      *testing.T
	ledger *ledger.Ledger
	conn   *pgx.Conn // as the owner
}

func newNotifyWorld(t *testing.T) *notifyWorld {
	t.Helper()
	db := pgtest.Create(t)
	pool := pgtest.Pool(t, db.ServiceURL)
	conn, err := pgx.Connect(t.Context(), db.OwnerURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	for _, tenant := range []revocation.Tenant{org, other} {
		if _, err := conn.Exec(t.Context(), `INSERT INTO rescind.tenants (id, domain) VALUES ($1, $2)`, tenant.ID, tenant.Domain); err != nil {
			t.Fatal(err)
		}
	}
	l, err := ledger.New(ledger.Config{Source: superISS}, pool, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	head, err := l.Start(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run the ledger: %v", err)
		}
	})
	state := &follower{ledger: l, replica: replica.NewState(replica.StateConfig{Records: true})}
	err = state.replica.Load(head, func(loader *replica.Loader) error {
		for _, e := range testCatalog() {
			loader.Entity(e)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	master, err := authn.NewMasterKey([]byte("a master key for tests, 32 bytes"))
	if err != nil {
		t.Fatal(err)
	}
	store := rest.NewIdempotencyStore(pool, []authn.MasterKey{master})
	return &notifyWorld{newWorld(t, Config{}, state, l, store), t, l, conn}
}

// post notifies as user, with the type of a key manager.
func (w *notifyWorld) post(user, connector, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, base+"/notify", strings.NewReader(body))
	r.SetBasicAuth(user, "right")
	r.Header.Set("Content-Type", "application/json")
	if connector != "" {
		r.Header.Set("X-WSO2-KEY-MANAGER", connector)
	}
	rec := httptest.NewRecorder()
	w.router.ServeHTTP(rec, r)
	return rec
}

// revoked returns what was revoked after a seq, its ID left out.
func (w *notifyWorld) revoked(after revocation.Seq) (all []revocation.Revocation) {
	w.t.Helper()
	events, err := w.ledger.After(w.t.Context(), after, 100_000)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range events {
		r, err := e.Revocation()
		if err != nil {
			w.t.Fatal(err)
		}
		r.ID = ""
		all = append(all, r)
	}
	return all
}

// byTarget is an order for revocations of one notification, which have none.
func byTarget(a, b revocation.Revocation) int {
	return cmp.Or(strings.Compare(a.Target.Iss, b.Target.Iss), strings.Compare(a.Target.ID, b.Target.ID))
}

func (w *notifyWorld) head() revocation.Seq {
	w.t.Helper()
	head, err := w.ledger.Head(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return head.Seq
}

func jwt(claims string) string {
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(`{"alg":"RS256"}`)) + "." + encode([]byte(claims)) + "." + encode([]byte("signature"))
}

func TestNotify(t *testing.T) {
	t.Parallel()
	w := newNotifyWorld(t)
	now := time.Now().Unix()
	soon := now + 300
	bare := jwt(`{"sub":"ann"}`)
	bareInput := bare[:strings.LastIndexByte(bare, '.')]
	signature := strings.Repeat("Ab-_", 86) // of RSA with 2048 bits, 344 bytes
	token := func(typ, value string, expiry int64) string {
		return fmt.Sprintf(`{"eventId":%q,"timeStamp":1,"type":"token_revocation","tenantId":-1234,"tenantDomain":"carbon.super",
			"accessToken":%q,"expiryTime":%d,"user":"ann","consumerKey":"app-9","tokenType":%q,"properties":{}}`,
			"id "+value[:min(9, len(value))]+typ+fmt.Sprint(expiry), value, expiry, typ)
	}
	byJTI := func(iss, jti string) revocation.Target {
		return revocation.Target{Kind: revocation.KindToken, Iss: iss, ID: jti}
	}
	one := func(target revocation.Target, exp int64) revocation.Revocation {
		return revocation.Revocation{Target: target, Tenant: super, Exp: exp, ClientID: "app-9", Reason: "notified"}
	}
	signed := func(r revocation.Revocation, signature string) revocation.Revocation {
		r.Signature = signature
		return r
	}
	timed := func(kind revocation.Kind, iss, id string, notAfter, lifetime int64) revocation.Revocation {
		return revocation.Revocation{
			Target: revocation.Target{Kind: kind, Iss: iss, ID: id}, Tenant: super, Exp: notAfter + lifetime, NotAfter: notAfter, Reason: "notified",
		}
	}
	for _, tt := range []struct {
		name, user, connector, body string
		want                        []revocation.Revocation
	}{
		{"jti", "notifier", "", token("JWT", "jti-1", soon*1000), []revocation.Revocation{one(byJTI(superISS, "jti-1"), soon)}},
		{"its type of key manager", "notifier", "wso2-is", token("JWT", "jti-2", soon*1000), []revocation.Revocation{one(byJTI(idpISS, "jti-2"), soon)}},
		{
			"an unknown type of key manager", "notifier", "Okta", token("JWT", "jti-3", soon*1000),
			[]revocation.Revocation{one(byJTI(idpISS, "jti-3"), soon), one(byJTI(superISS, "jti-3"), soon)},
		},
		{"part of a second", "notifier", "", token("JWT", "jti-4", soon*1000+1), []revocation.Revocation{one(byJTI(superISS, "jti-4"), soon+1)}},
		{"without end", "notifier", "WSO2-IS", token("JWT", "jti-5", math.MaxInt64), []revocation.Revocation{one(byJTI(idpISS, "jti-5"), -782)}},
		{"the end of a refresh token", "notifier", "", token("JWT", "jti-6", (now+86400)*1000), []revocation.Revocation{one(byJTI(superISS, "jti-6"), -3782)}},
		{"over, within the leeway", "notifier", "", token("JWT", "jti-7", (now-60)*1000), []revocation.Revocation{one(byJTI(superISS, "jti-7"), -0)}},
		{"over", "notifier", "", token("JWT", "jti-8", (now-121)*1000), nil},
		{"opaque", "notifier", "", token("Default", "opaque-token", soon*1000), []revocation.Revocation{one(revocation.DigestTarget(superISS, "opaque-token"), soon)}},
		{"of no type", "notifier", "", token("", "opaque-2", soon*1000), []revocation.Revocation{one(revocation.DigestTarget(superISS, "opaque-2"), soon)}},
		{"an API key", "notifier", "", token("API_KEY", "key-1", soon*1000), []revocation.Revocation{one(byJTI(superISS, "key-1"), soon)}},
		{"whole JWT", "notifier", "", token("Default", jwt(`{"jti":"jti-9","JTI":"forged"}`), soon*1000), []revocation.Revocation{one(byJTI(superISS, "jti-9"), soon)}},
		{
			"whole JWT of another issuer of the tenant", "notifier", "", token("JWT", jwt(`{"iss":"`+idpISS+`","jti":"jti-10"}`), soon*1000),
			[]revocation.Revocation{one(byJTI(idpISS, "jti-10"), soon)},
		},
		{
			"whole JWT of an issuer that is another's", "notifier", "", token("JWT", jwt(`{"iss":"`+orgISS+`","jti":"jti-11"}`), soon*1000),
			[]revocation.Revocation{one(byJTI(superISS, "jti-11"), soon)},
		},
		{
			"whole JWT without jti", "notifier", "", token("JWT", bare, soon*1000),
			[]revocation.Revocation{signed(one(revocation.DigestTarget(superISS, bareInput), soon), "c2lnbmF0dXJl")},
		},
		{"no JWT", "notifier", "", token("JWT", "a.b.c", soon*1000), []revocation.Revocation{one(revocation.DigestTarget(superISS, "a.b.c"), soon)}},
		{
			"long signature", "notifier", "", token("JWT", signature, soon*1000),
			[]revocation.Revocation{signed(one(revocation.DigestTarget(superISS, signature), soon), signature)},
		},
		{
			"client", "notifier", "", `{"eventId":"c1","type":"consumer_app_revocation_event","tenantId":-1234,"consumerKey":"app-1","revocationTime":` + fmt.Sprint(now*1000+999) + `}`,
			[]revocation.Revocation{timed(revocation.KindClient, superISS, "app-1", now, 3600)},
		},
		{
			"client in the future", "notifier", "", `{"eventId":"c2","type":"consumer_app_revocation_event","consumerKey":"app-2","revocationTime":` + fmt.Sprint((now+600)*1000) + `}`,
			[]revocation.Revocation{timed(revocation.KindClient, superISS, "app-2", -2, 3600)},
		},
		{
			"client long ago", "notifier", "", `{"eventId":"c3","type":"consumer_app_revocation_event","consumerKey":"app-3","revocationTime":` + fmt.Sprint((now-3720)*1000) + `}`,
			nil,
		},
		{
			"user", "notifier", "", `{"eventId":"s1","type":"subject_entity_revocation_event","entityId":"ann","entityType":"USER_ID","revocationTime":` + fmt.Sprint(now*1000) + `}`,
			[]revocation.Revocation{timed(revocation.KindSubject, superISS, "ann", now, 3600)},
		},
		{
			"client as subject", "notifier", "", `{"eventId":"s2","type":"subject_entity_revocation_event","entityId":"app-4","entityType":"CLIENT_ID","revocationTime":` + fmt.Sprint(now*1000) + `}`,
			[]revocation.Revocation{timed(revocation.KindClient, superISS, "app-4", now, 3600)},
		},
		{
			"batch", "admin", "", `{"eventId":"b1","type":"token_revocation_batch","consumerKey":"app-9","tokenRevocationEventList":[
				{"accessToken":"b-1","tokenType":"JWT","expiryTime":` + fmt.Sprint(soon*1000) + `},
				{"accessToken":"b-2","tokenType":"Default","expiryTime":` + fmt.Sprint(soon*1000) + `},
				{"accessToken":"b-3","tokenType":"JWT","expiryTime":` + fmt.Sprint((now-500)*1000) + `}]}`,
			[]revocation.Revocation{one(byJTI(superISS, "b-1"), soon), one(revocation.DigestTarget(superISS, "b-2"), soon)},
		},
		{"empty batch", "admin", "", `{"type":"token_revocation_batch","tokenRevocationEventList":[]}`, nil},
		{
			"another tenant by domain", "admin", "", `{"type":"token_revocation","tenantDomain":"org.example","accessToken":"o-1","tokenType":"JWT","expiryTime":` + fmt.Sprint(soon*1000) + `}`,
			[]revocation.Revocation{{Target: byJTI(orgISS, "o-1"), Tenant: org, Exp: soon, Reason: "notified"}},
		},
		{
			"another tenant by id", "admin", "", `{"type":"token_revocation","tenantId":7,"accessToken":"o-2","tokenType":"JWT","expiryTime":` + fmt.Sprint(soon*1000) + `}`,
			[]revocation.Revocation{{Target: byJTI(orgISS, "o-2"), Tenant: org, Exp: soon, Reason: "notified"}},
		},
		{
			"the account's tenant", "tadmin", "", `{"type":"token_revocation","accessToken":"o-3","tokenType":"JWT","expiryTime":` + fmt.Sprint(soon*1000) + `}`,
			[]revocation.Revocation{{Target: byJTI(orgISS, "o-3"), Tenant: org, Exp: soon, Reason: "notified"}},
		},
	} {
		before := w.head()
		for range 2 { // a repeat has no effect
			rec := w.post(tt.user, tt.connector, tt.body)
			if rec.Code != http.StatusOK || rec.Body.Len() != 0 {
				t.Errorf("%s: %d %s", tt.name, rec.Code, rec.Body)
			}
		}
		got := w.revoked(before)
		slices.SortFunc(got, byTarget)
		slices.SortFunc(tt.want, byTarget)
		for i := range min(len(got), len(tt.want)) {
			// An end that is at most 1 is as long after the request.
			if at := tt.want[i].Exp; at <= 1 {
				if base := got[i].Exp + at; base < now || base > now+30 {
					t.Errorf("%s: it ends %d s from now, want %d", tt.name, got[i].Exp-now, -at)
				}
				tt.want[i].Exp = got[i].Exp
			}
			if at := tt.want[i].NotAfter; at < 0 {
				if base := got[i].NotAfter + at; base < now || base > now+30 || got[i].Exp != got[i].NotAfter+3600 {
					t.Errorf("%s: it is about tokens until %d s from now, want %d", tt.name, got[i].NotAfter-now, -at)
				}
				tt.want[i].NotAfter, tt.want[i].Exp = got[i].NotAfter, got[i].Exp
			}
		}
		if diff := gocmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}

	// Gateways get what was notified.
	if body := w.get("gateway", base+"/revokedjwt").Body.String(); !strings.Contains(body, `"jti-1"`) || !strings.Contains(body, signature) ||
		strings.Contains(body, "opaque") {
		t.Errorf("revoked tokens: %s", body)
	}
	var actors []string
	rows, err := w.conn.Query(t.Context(), `SELECT DISTINCT actor || ' ' || action FROM rescind.audit ORDER BY 1`)
	if err == nil {
		actors, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"account:admin notify_token", "account:notifier notify_client", "account:notifier notify_subject", "account:notifier notify_token",
		"account:tadmin notify_token",
	}
	if diff := gocmp.Diff(want, actors); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
	// No opaque token is anywhere in the database.
	var stored int
	err = w.conn.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM rescind.log WHERE data::text LIKE '%opaque-%')
		+ (SELECT count(*) FROM rescind.revocations r WHERE r::text LIKE '%opaque-%')
		+ (SELECT count(*) FROM rescind.audit a WHERE a::text LIKE '%opaque-%')
		+ (SELECT count(*) FROM rescind.idempotency i WHERE i::text LIKE '%opaque-%')`).Scan(&stored)
	if err != nil || stored != 0 {
		t.Errorf("an opaque token is stored in %d rows, %v", stored, err)
	}
}

// A notification without an id is the same again by its type and token, and one whose
// id was used for another is carried out.
func TestNotifyRepeats(t *testing.T) {
	t.Parallel()
	w := newNotifyWorld(t)
	// Without an end, so each time that it is carried out a second later would end later.
	unlimited := func(id, jti string, timeStamp int) string {
		return fmt.Sprintf(`{"eventId":%q,"timeStamp":%d,"type":"token_revocation","tenantId":-1234,"accessToken":%q,"tokenType":"JWT","expiryTime":%d}`,
			id, timeStamp, jti, int64(math.MaxInt64))
	}
	start := time.Now()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if rec := w.post("notifier", "", unlimited("same", "r-1", 1)); rec.Code != http.StatusOK {
				t.Errorf("at the same time: %d %s", rec.Code, rec.Body)
			}
		})
	}
	wg.Wait()
	// One more for each second that begins meanwhile: those that find it running go on.
	if got := len(w.revoked(0)); got > 2+int(time.Since(start).Seconds()) {
		t.Errorf("%d events for one notification", got)
	}
	before := w.head()
	w.post("notifier", "", unlimited("same", "r-1", 1))
	w.post("notifier", "", unlimited("same", "r-2", 1))
	w.post("notifier", "", unlimited("", "r-3", 1))
	got := w.revoked(before)
	if len(got) != 2 || got[0].Target.ID != "r-2" || got[1].Target.ID != "r-3" {
		t.Errorf("%+v", got)
	}
	w.post("notifier", "", unlimited("", "r-3", 1))
	if w.head() != before+2 {
		t.Error("a repeat without an id had an effect")
	}
	client := func(at int64) string {
		return fmt.Sprintf(`{"type":"consumer_app_revocation_event","consumerKey":"app-1","revocationTime":%d}`, at*1000)
	}
	now := time.Now().Unix()
	before = w.head()
	w.post("notifier", "", client(now-5))
	w.post("notifier", "", client(now-5))
	w.post("notifier", "", client(now))
	if got := w.revoked(before); len(got) != 2 || got[1].NotAfter != now {
		t.Errorf("a client that is revoked a second time: %+v", got)
	}
}

func TestNotifyRefuses(t *testing.T) {
	t.Parallel()
	w := newNotifyWorld(t)
	const end = `"expiryTime":9223372036854775807`
	for _, tt := range []struct {
		name, user, body string
		status           int
	}{
		{"gateway", "gateway", `{}`, 403},
		{"auditor", "auditor", `{}`, 403},
		{"nobody", "nobody", `{}`, 401},
		{"throttled", "throttled", `{}`, 503},
		{"empty", "notifier", ``, 400},
		{"no JSON", "notifier", `<xml/>`, 400},
		{"array", "notifier", `[]`, 400},
		{"no type", "notifier", `{}`, 400},
		{"unknown type", "notifier", `{"type":"other"}`, 400},
		{"wrong type of a member", "notifier", `{"type":"token_revocation","accessToken":1}`, 400},
		{"jti with a control character", "notifier", `{"type":"token_revocation","accessToken":"a\u0000b","tokenType":"JWT",` + end + `}`, 400},
		{"jti that is too long", "notifier", `{"type":"token_revocation","accessToken":"` + strings.Repeat("é", 128) + `","tokenType":"JWT",` + end + `}`, 400},
		{"another's tenant", "notifier", `{"type":"token_revocation","tenantDomain":"org.example","accessToken":"a","tokenType":"JWT",` + end + `}`, 403},
		{"another's tenant by id", "notifier", `{"type":"token_revocation","tenantId":7,"accessToken":"a","tokenType":"JWT",` + end + `}`, 403},
		{"no tenant", "admin", `{"type":"token_revocation","tenantDomain":"none.example","accessToken":"a","tokenType":"JWT",` + end + `}`, 403},
		{"no tenant of this id", "admin", `{"type":"token_revocation","tenantId":99,"accessToken":"a","tokenType":"JWT",` + end + `}`, 403},
		{"too large", "notifier", `{"type":"token_revocation","accessToken":"` + strings.Repeat("a", 1<<20) + `"}`, 400},
	} {
		rec := w.post(tt.user, "", tt.body)
		if rec.Code != tt.status || rec.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d, want %d: %s", tt.name, rec.Code, tt.status, rec.Body)
		}
		if tt.status == 400 && !strings.HasPrefix(rec.Body.String(), `{"Message":"`) {
			t.Errorf("%s: %s", tt.name, rec.Body)
		}
	}
	if head := w.head(); head != 0 {
		t.Errorf("%d events were written", head)
	}
	// What is sound in a batch is carried out, and the rest refused.
	rec := w.post("notifier", "", `{"type":"token_revocation_batch","tokenRevocationEventList":[
		{"accessToken":"a\u0001","tokenType":"JWT",`+end+`},{"accessToken":"good","tokenType":"JWT",`+end+`}]}`)
	if got := w.revoked(0); rec.Code != http.StatusBadRequest || len(got) != 1 || got[0].Target.ID != "good" {
		t.Errorf("%d %s: %+v", rec.Code, rec.Body, got)
	}
}

// fakeLedger fails as it is told to, at first or always.
type fakeLedger struct {
	err    error
	fails  int // how many times; 0 always
	pause  time.Duration
	called atomic.Int64
}

func (l *fakeLedger) Revoke(context.Context, ledger.Request) (ledger.Result, error) {
	n := l.called.Add(1)
	time.Sleep(l.pause)
	if l.fails > 0 && n > int64(l.fails) {
		return ledger.Result{Added: true}, nil
	}
	return ledger.Result{Added: true}, l.err
}

// fakeStore remembers nothing and counts what is given up.
type fakeStore struct {
	err               error
	pause             time.Duration
	finished, givenUp int
}

func (s *fakeStore) Begin(ctx context.Context, _, _, _, _ string, _ [32]byte) (rest.Earlier, error) {
	select {
	case <-time.After(s.pause):
		return rest.Earlier{Begun: true}, s.err
	case <-ctx.Done():
		return rest.Earlier{}, ctx.Err()
	}
}

func (s *fakeStore) Finish(_ context.Context, _, _, _, _ string, status int, _ http.Header, _ []byte) error {
	if status == 0 {
		s.givenUp++
	} else {
		s.finished++
	}
	return nil
}

// What could not be made durable is never answered 200, and can be sent again. What can
// be without the newest state or what is remembered is done.
func TestNotifyFails(t *testing.T) {
	t.Parallel()
	const body = `{"type":"token_revocation","accessToken":"a","tokenType":"JWT","expiryTime":9223372036854775807}`
	for _, tt := range []struct {
		name    string
		ledger  *fakeLedger
		store   *fakeStore
		state   error
		status  int
		retry   string
		atLeast time.Duration
	}{
		{"well", &fakeLedger{}, &fakeStore{}, nil, 200, "", 0},
		{"busy for a while", &fakeLedger{err: fmt.Errorf("queue: %w", ledger.ErrBusy), fails: 20}, &fakeStore{}, nil, 200, "", time.Second},
		{"busy", &fakeLedger{err: fmt.Errorf("queue: %w", ledger.ErrBusy)}, &fakeStore{}, nil, 503, "1", 10 * time.Second},
		{"database away", &fakeLedger{err: ledger.ErrUnavailable}, &fakeStore{}, nil, 503, "5", 0},
		{"something else", &fakeLedger{err: errors.New("secret detail")}, &fakeStore{}, nil, 500, "", 0},
		{"store away", &fakeLedger{}, &fakeStore{err: io.ErrUnexpectedEOF}, nil, 200, "", 0},
		{"store that hangs", &fakeLedger{}, &fakeStore{pause: time.Hour}, nil, 200, "", 2500 * time.Millisecond},
		{"stale", &fakeLedger{}, &fakeStore{}, context.DeadlineExceeded, 200, "", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				state := newState(t)
				state.err = tt.state
				w := &notifyWorld{world: newWorld(t, Config{}, state, tt.ledger, tt.store), t: t}
				start := time.Now()
				rec := w.post("notifier", "", body)
				if took := time.Since(start); took < tt.atLeast || took > tt.atLeast+100*time.Millisecond {
					t.Errorf("it took %s, want %s", took, tt.atLeast)
				}
				if rec.Code != tt.status || rec.Header().Get("Retry-After") != tt.retry || strings.Contains(rec.Body.String(), "secret") {
					t.Errorf("%d, Retry-After %q: %s", rec.Code, rec.Header().Get("Retry-After"), rec.Body)
				}
				begun := tt.store.err == nil && tt.store.pause == 0
				if begun && (tt.store.finished+tt.store.givenUp != 1 || (tt.status == 200) != (tt.store.finished == 1)) {
					t.Errorf("%+v", tt.store)
				}
			})
		})
	}
}

// A batch that takes too long begins nothing more when its time is over.
func TestNotifyBatchEndsInTime(t *testing.T) {
	t.Parallel()
	var batch strings.Builder
	const n = 10_000
	for i := range n {
		fmt.Fprintf(&batch, `,{"accessToken":"b-%d","tokenType":"JWT"}`, i)
	}
	synctest.Test(t, func(t *testing.T) {
		l := &fakeLedger{pause: time.Second}
		w := &notifyWorld{world: newWorld(t, Config{}, newState(t), l, &fakeStore{}), t: t}
		start := time.Now()
		rec := w.post("notifier", "", `{"type":"token_revocation_batch","tokenRevocationEventList":[`+batch.String()[1:]+`]}`)
		if took := time.Since(start); rec.Code != http.StatusServiceUnavailable || took > 11*time.Second {
			t.Errorf("%d after %s", rec.Code, took)
		}
		if called := l.called.Load(); called >= n/2 || called < 9*maxAtOnce {
			t.Errorf("%d revocations were begun", called)
		}
	})
}

// Readers leave notifications their places.
func TestNotifyHasPlacesOfItsOwn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := &notifyWorld{world: newWorld(t, Config{MaxInFlight: 1}, newState(t), &fakeLedger{}, &fakeStore{}), t: t}
		slow := newSlowWriter()
		go w.serve(slow, "gateway", base+"/revokedjwt")
		<-slow.begun
		if rec := w.get("gateway", base+"/block"); rec.Code != http.StatusServiceUnavailable {
			t.Errorf("another reader: %d", rec.Code)
		}
		if rec := w.post("notifier", "", `{"type":"token_revocation","accessToken":"a","tokenType":"JWT"}`); rec.Code != http.StatusOK {
			t.Errorf("a notification: %d", rec.Code)
		}
		close(slow.released)
	})
}
