package app_test

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/rescindhq/rescind/internal/app"
	"github.com/rescindhq/rescind/internal/ledger"
)

// A command does not write to a restored log, and where etcd is a sink it goes on only
// at etcd's word.
func TestCommandsAskEtcd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	open := func(settings ...string) error {
		cfg, err := app.ParseConfig(app.Input{Use: app.ForApply, Environ: w.environ(settings...)})
		if err != nil {
			t.Fatal(err)
		}
		tools, err := app.OpenCatalog(t.Context(), cfg, slog.New(slog.DiscardHandler))
		if err == nil {
			tools.Close()
		}
		return err
	}
	const none, deaf = "RESCIND_ETCD_ENDPOINTS=", "RESCIND_ETCD_ENDPOINTS=http://127.0.0.1:1"
	if err := open(none); err != nil {
		t.Errorf("a log that etcd is no sink of: %v", err)
	}
	if err := open(deaf, "RESCIND_SINKS=amqp"); err != nil {
		t.Errorf("a log that etcd is no sink of, with an address of it: %v", err)
	}

	pool := w.pool()
	if _, err := pool.Exec(t.Context(), `INSERT INTO rescind.sink_cursors (sink, seq) VALUES ('etcd', 0)`); err != nil {
		t.Fatal(err)
	}
	var epoch string
	if err := pool.QueryRow(t.Context(), `SELECT epoch::text FROM rescind.log_head`).Scan(&epoch); err != nil {
		t.Fatal(err)
	}
	if err := open(); err != nil {
		t.Errorf("before etcd has anything: %v", err)
	}
	if err := open(none, "RESCIND_SINKS=amqp"); err == nil || !strings.Contains(err.Error(), "give RESCIND_ETCD_ENDPOINTS") {
		t.Errorf("without an address of etcd: %v, want what to give", err)
	}
	if err := open(deaf); err == nil || !strings.Contains(err.Error(), "reachable") {
		t.Errorf("without etcd: %v, want what to do", err)
	}
	for seq, want := range map[int]error{0: nil, 5: ledger.ErrRestored} {
		if _, err := w.etcdClient().Put(t.Context(), w.prefix+"/rescind/stream", fmt.Sprintf(`{"epoch":%q,"seq":%d}`, epoch, seq)); err != nil {
			t.Fatal(err)
		}
		if err := open(); !errors.Is(err, want) {
			t.Errorf("the log ends at 0 and etcd stands at %d: %v, want %v", seq, err, want)
		}
	}
}
