package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rescindhq/rescind/internal/devstack"
)

// running is a rescind-dev that is ready.
type running struct {
	t      *testing.T
	cmd    *exec.Cmd
	output *output
	done   chan error
	info   devJSON
}

type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

func start(t *testing.T, program, dir string, args ...string) *running {
	t.Helper()
	r := &running{t: t, output: &output{}, done: make(chan error, 1)}
	r.cmd = exec.Command(program, append([]string{"--data-dir", dir}, args...)...)
	r.cmd.Stdout, r.cmd.Stderr = r.output, r.output
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is for the test
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { r.done <- r.cmd.Wait() }()
	path := filepath.Join(dir, devJSONName)
	patience := time.NewTimer(3 * time.Minute) // it may have to install servers
	defer patience.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if b, err := os.ReadFile(path); err == nil && json.Unmarshal(b, &r.info) == nil && r.info.PID == r.cmd.Process.Pid {
			t.Cleanup(func() { r.end(os.Kill) })
			return r
		}
		select {
		case <-tick.C:
		case err := <-r.done:
			t.Fatalf("it has ended: %v\n%s", err, r.output)
		case <-patience.C:
			t.Fatalf("it is not ready\n%s", r.output)
		}
	}
}

// end sends s and waits for the end; a second call does nothing.
func (r *running) end(s os.Signal) error {
	if r.done == nil {
		return nil
	}
	_ = r.cmd.Process.Signal(s) // it may have ended
	err := <-r.done
	r.done = nil
	return err
}

func (r *running) post(url, contentType, body string) string {
	r.t.Helper()
	req, err := http.NewRequest(http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.SetBasicAuth(r.info.ClientID, r.info.ClientSecret)
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		r.t.Fatalf("%s: %s %s, %v", url, resp.Status, b, err)
	}
	return string(b)
}

// call calls the demo's API through a gateway.
func (r *running) call(gateway, token string) (status int, body string) {
	r.t.Helper()
	req, err := http.NewRequest(http.MethodGet, gateway+demoContext+"/menu", nil)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// inEtcd asks etcd's JSON gateway, as the walk-through does.
func (r *running) inEtcd(jti string) bool {
	r.t.Helper()
	key := base64.StdEncoding.EncodeToString([]byte("/jti/" + jti))
	return strings.Contains(r.post(r.info.EtcdEndpoints[0]+"/v3/kv/range", "application/json", fmt.Sprintf(`{"key":%q}`, key)), `"value"`)
}

func (r *running) await(what string, ok func() bool) {
	r.t.Helper()
	patience := time.NewTimer(30 * time.Second)
	defer patience.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-patience.C:
			r.t.Fatalf("in vain awaited: %s\n%s", what, r.output)
		}
	}
}

// The whole of it, in a folder that the servers' system users cannot enter: started,
// used, stopped, started again, killed, and started once more.
func TestDev(t *testing.T) {
	t.Parallel()
	program := filepath.Join(t.TempDir(), "rescind-dev")
	if out, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	private := t.TempDir()
	if err := os.Chmod(private, 0o700); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(private, "d")
	t.Cleanup(func() { // what it keeps outside of the folder too
		if err := devstack.Remove(context.Background(), dir); err != nil {
			t.Error(err)
		}
	})

	r := start(t, program, dir, "--listen", "127.0.0.1:0")
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, devJSONName): 0o600, filepath.Join(dir, keptName): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want mode %o", path, info.Mode(), err, want)
		}
	}
	for _, u := range append([]string{r.info.BaseURL, r.info.OpsURL, r.info.DatabaseURL, r.info.AMQPURL, r.info.GatewayAMQPURL}, r.info.EtcdEndpoints...) {
		if parsed, err := url.Parse(u); err != nil || parsed.Hostname() != "127.0.0.1" {
			t.Errorf("%q in dev.json is not on loopback", u)
		}
	}
	answer := r.post(r.info.BaseURL+"/oauth2/token", "application/x-www-form-urlencoded", "grant_type=client_credentials")
	token := regexp.MustCompile(`"access_token":"([^"]+)"`).FindStringSubmatch(answer)[1]
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		t.Fatal(err)
	}
	jti := regexp.MustCompile(`"jti":"([^"]+)"`).FindStringSubmatch(string(payload))[1]
	if len(r.info.GatewayURLs) != 2 {
		t.Errorf("dev.json has the gateways %q", r.info.GatewayURLs)
	}
	for _, gateway := range r.info.GatewayURLs {
		if status, body := r.call(gateway, token); status != http.StatusOK || !strings.Contains(body, jti) {
			t.Errorf("%s: %d for a live token: %s", gateway, status, body)
		}
	}
	r.post(r.info.BaseURL+"/revoke", "application/x-www-form-urlencoded", "token="+token)
	for _, gateway := range r.info.GatewayURLs {
		r.await("the token is refused", func() bool { status, _ := r.call(gateway, token); return status == http.StatusUnauthorized })
	}
	r.await("the key in etcd", func() bool { return r.inEtcd(jti) })
	r.post(r.info.BaseURL+"/revoke", "application/x-www-form-urlencoded", "token=a-bare-jti")
	r.await("the key of the bare jti in etcd", func() bool { return r.inEtcd("a-bare-jti") })

	if err := r.end(syscall.SIGTERM); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, r.output)
	}
	if _, err := os.Stat(filepath.Join(dir, devJSONName)); !os.IsNotExist(err) {
		t.Errorf("dev.json is left: %v", err)
	}
	first := r.info

	r = start(t, program, dir)
	if r.info.BaseURL != first.BaseURL || r.info.ClientSecret != first.ClientSecret || r.info.DatabaseURL != first.DatabaseURL {
		t.Errorf("a second start has %+v, the first had %+v", r.info, first)
	}
	if !r.inEtcd(jti) {
		t.Error("a second start has lost the revocation")
	}
	for _, gateway := range r.info.GatewayURLs {
		if status, _ := r.call(gateway, token); status != http.StatusUnauthorized {
			t.Errorf("%s: %d for a revoked token after a second start", gateway, status)
		}
	}
	_ = r.end(os.Kill) // "signal: killed"

	r = start(t, program, dir)
	if !r.inEtcd(jti) {
		t.Error("a killed run has lost the revocation")
	}
	if err := r.end(os.Interrupt); err != nil {
		t.Errorf("after Ctrl-C: %v\n%s", err, r.output)
	}
}
