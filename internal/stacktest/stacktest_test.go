package stacktest_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/rescindhq/rescind/internal/stacktest"
)

func TestSharedAnswers(t *testing.T) {
	t.Parallel()
	at := stacktest.Shared(t)
	resp, err := http.Post(at.EtcdEndpoints[0]+"/v3/kv/range", "application/json", strings.NewReader(`{"key":"Zm9v"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("etcd's JSON gateway answers %s", resp.Status)
	}
}

func TestVhosts(t *testing.T) {
	t.Parallel()
	a, b := stacktest.NewVhost(t), stacktest.NewVhost(t)
	if a == b {
		t.Errorf("two calls gave one vhost")
	}
}
