package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/rescindhq/rescind/api/gateway"
)

// gateways is how many there are. Both follow the service's stream; the first follows
// RabbitMQ beside it, the second etcd.
const gateways = 2

// The names of the environment variables in which the gateways' files say that secrets are.
const (
	gatewayPasswordEnv = "RESCIND_DEV_GATEWAY_PASSWORD"
	gatewayAMQPEnv     = "RESCIND_DEV_GATEWAY_AMQP_URL"
)

// canaryContext is the context of the service's canary API.
const canaryContext = "/rescind-canary/v1"

func gatewayName(i int) string { return fmt.Sprintf("gateway-%d", i+1) }

// setCanaries tells the service where each gateway's canary is called, once the gateway has reported.
func (d *dev) setCanaries(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("it has not reported after 30s"))
	defer cancel()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for i, at := range d.kept.Gateways {
		for {
			status, err := d.putCanary(ctx, gatewayName(i), "http://"+at.Listen+canaryContext+"/ping")
			if err == nil && status == http.StatusOK {
				break
			}
			if err == nil && status != http.StatusNotFound {
				return fmt.Errorf("set the canary of %s: the service answers %d", gatewayName(i), status)
			}
			select {
			case <-poll.C:
			case <-ctx.Done():
				return fmt.Errorf("set the canary of %s: %w", gatewayName(i), context.Cause(ctx))
			}
		}
	}
	return nil
}

func (d *dev) putCanary(ctx context.Context, id, target string) (status int, err error) {
	body, err := json.Marshal(map[string]string{"url": target})
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+d.kept.Listen+"/v1/gateways/"+id+"/canary", bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.SetBasicAuth(adminUser, d.kept.AdminPassword)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// writeGateway writes the configuration of gateway i, before an upstream, and returns its name.
func (d *dev) writeGateway(i int, upstream string) (string, error) {
	for name, value := range map[string]string{gatewayPasswordEnv: d.kept.GatewayPassword, gatewayAMQPEnv: d.at.GatewayAMQPURL} {
		if err := os.Setenv(name, value); err != nil { // for the gateways
			return "", err
		}
	}
	at := d.kept.Gateways[i]
	name := gatewayName(i)
	cfg := map[string]any{
		"id":        name,
		"labels":    map[string]string{"site": "demo"},
		"service":   map[string]any{"url": "http://" + d.kept.Listen, "username": gatewayUser, "password_env": gatewayPasswordEnv},
		"folder":    filepath.Join(d.dir, name),
		"audiences": []string{demoAudience},
		"proxy": map[string]any{"listen": at.Listen, "upstreams": []any{
			map[string]any{"context": demoContext, "url": upstream}, map[string]any{"context": canaryContext, "url": upstream},
		}},
		"ops":            map[string]any{"listen": at.OpsListen},
		"shutdown_grace": "1s",
		"log":            map[string]any{"level": d.logLevel, "format": "text"},
	}
	if i == 0 {
		amqp := map[string]any{"url_env": gatewayAMQPEnv}
		if exchange := os.Getenv("RESCIND_AMQP_EXCHANGE"); exchange != "" {
			amqp["exchange"] = exchange
		}
		cfg["amqp"] = amqp
	} else {
		cfg["etcd"] = map[string]any{
			"endpoints": d.at.EtcdEndpoints, "prefix": os.Getenv("RESCIND_ETCD_PREFIX"), "issuer": d.kept.Issuer,
		}
	}
	b, err := yaml.Marshal(cfg)
	if err != nil {
		return "", err
	}
	file := filepath.Join(d.dir, name+".yaml")
	return file, os.WriteFile(file, b, 0o600)
}

// awaitReady returns when a gateway whose operators' listener is at url has what it needs.
func awaitReady(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("it is not ready after 30s"))
	defer cancel()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/readyz", nil)
		if err != nil {
			return err
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for the gateway at %s: %w", url, context.Cause(ctx))
		}
	}
}

// upstream is what is behind the gateways.
type upstream struct {
	*http.Server
	url string
}

// startUpstream runs one that answers with what it was told: the request line, and who calls.
func startUpstream() (*upstream, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start the upstream: %w", err)
	}
	u := &upstream{url: "http://" + l.Addr().String(), Server: &http.Server{ReadHeaderTimeout: 5 * time.Second}}
	u.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller := make(map[string]string)
		for _, name := range gateway.IdentityHeaders {
			if value := r.Header.Get(name); value != "" {
				caller[name] = value
			}
		}
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(map[string]any{"method": r.Method, "target": r.RequestURI, "caller": caller}) // the caller may be gone
	})
	go u.Serve(l) //nolint:errcheck // it ends when it is closed
	return u, nil
}
