package devstack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Vhost is a namespace of its own on the stack's RabbitMQ, with the same users and permissions as "/".
type Vhost struct {
	AMQPURL        string `json:"amqp_url"`
	GatewayAMQPURL string `json:"gateway_amqp_url"`
}

// AddVhost makes a vhost. It needs Config.Management.
func (s *Stack) AddVhost(ctx context.Context, name string) (Vhost, error) {
	escaped := url.PathEscape(name)
	err := s.manage(ctx, http.MethodPut, "/api/vhosts/"+escaped, nil)
	for _, grant := range []struct {
		user string
		permissions
	}{{amqpUser, everything}, {gatewayUser, consuming}} {
		if err == nil {
			err = s.manage(ctx, http.MethodPut, "/api/permissions/"+escaped+"/"+grant.user, grant.permissions)
		}
	}
	if err != nil {
		return Vhost{}, fmt.Errorf("add vhost %s: %w", name, err)
	}
	of := func(root string) string { return strings.TrimSuffix(root, "%2F") + escaped }
	return Vhost{AMQPURL: of(s.endpoints.AMQPURL), GatewayAMQPURL: of(s.endpoints.GatewayAMQPURL)}, nil
}

// DeleteVhost deletes a vhost with all that is in it, and cuts its connections.
func (s *Stack) DeleteVhost(ctx context.Context, name string) error {
	if err := s.manage(ctx, http.MethodDelete, "/api/vhosts/"+url.PathEscape(name), nil); err != nil {
		return fmt.Errorf("delete vhost %s: %w", name, err)
	}
	return nil
}

func (s *Stack) manage(ctx context.Context, method, path string, body any) error {
	if s.endpoints.ManagementURL == "" {
		return errors.New("the management plugin was not asked for")
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	content, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, s.endpoints.ManagementURL+path, bytes.NewReader(content))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1000))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	return nil
}
