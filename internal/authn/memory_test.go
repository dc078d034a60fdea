package authn

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// memory is an Authenticator whose rows are in a map. What the database does is
// tested on the database.
type memory struct {
	*Authenticator
	rows    map[string]*clientRow
	down    atomic.Bool
	queries atomic.Int64
	reads   atomic.Int64  // of rows
	gate    chan struct{} // if not nil, each query takes one

	mu   sync.Mutex
	used map[once]bool
}

func testKey(t testing.TB, fill string) MasterKey {
	t.Helper()
	k, err := NewMasterKey([]byte(strings.Repeat(fill, 32)))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newMemory(t testing.TB, cfg Config) *memory {
	t.Helper()
	a, err := New(cfg, nil, []MasterKey{testKey(t, "k")}, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	m := &memory{Authenticator: a, rows: make(map[string]*clientRow), used: make(map[once]bool)}
	a.clients.read = func(_ context.Context, ids []string) (map[string]*clientRow, error) {
		m.queries.Add(1)
		m.reads.Add(int64(len(ids)))
		if m.gate != nil {
			<-m.gate
		}
		if m.down.Load() {
			return nil, errDown
		}
		found := make(map[string]*clientRow)
		for _, id := range ids {
			if found[id] = m.rows[id]; found[id] == nil {
				found[id] = noClient
			}
		}
		return found, nil
	}
	a.useUp = func(_ context.Context, o *once) (bool, error) {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.down.Load() {
			return false, errDown
		}
		fresh := !m.used[*o]
		m.used[*o] = true
		return fresh, nil
	}
	m.add("app one", methodBasic, "s3cr:t+/=%")
	m.add("app-2", methodPost, "Secret-2")
	m.add("spa-1", methodNone)
	m.add("spa-2", methodNone, "left-over")
	return m
}

type downError struct{}

func (downError) Error() string { return "the database is away" }

var errDown downError

func (m *memory) add(id, method string, secrets ...string) {
	row := &clientRow{client: Client{ID: id, Public: method == methodNone}, method: method}
	for i, s := range secrets {
		row.secrets[i] = storedSecret{usable: true, mac: m.secrets.mac(0, id, s)}
	}
	m.rows[id] = row
}

// Headers of the clients that newMemory makes.
const (
	basicOne   = "Basic YXBwK29uZTpzM2NyJTNBdCUyQiUyRiUzRCUyNQ=="
	basicTwo   = "Basic YXBwLTI6U2VjcmV0LTI="
	basicWrong = "Basic YXBwLTI6d3Jvbmc=" // app-2:wrong
)

func postForm(body string, header ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/revoke", strings.NewReader(body))
	r.Header.Set("Content-Type", formType)
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	return r
}

// answer is what Form and WriteError make of r; 200 stands for "go on".
func (m *memory) answer(r *http.Request) (*httptest.ResponseRecorder, Client) {
	w := httptest.NewRecorder()
	client, _, err := m.Form(w, r, "token", "token_type_hint")
	if err != nil {
		WriteError(w, err)
	}
	return w, client
}
